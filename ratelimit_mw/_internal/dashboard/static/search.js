// Finds callers: among those shown by text and plan, and on the server among all who are known.

import { callerLink, find, keepRows, knownAs, make, plain } from "./dom.js";

const WAIT_MS = 300;

export class Search {
  constructor(ask, changed) {
    this.ask = ask;
    this.text = "";
    this.plan = "";
    this.others = [];
    find("find-caller").addEventListener("input", () => {
      this.text = find("find-caller").value.trim().replace(/…$/, "").toLowerCase();
      clearTimeout(this.timer);
      this.timer = setTimeout(() => this.look(), WAIT_MS);
      changed();
    });
    find("find-plan").addEventListener("change", () => {
      this.plan = find("find-plan").value;
      changed();
    });
  }

  // Those of the callers who are looked for.
  of(callers) {
    return callers.filter((each) => this.fits(each));
  }

  fits({ caller, label, account, api_key_hash: hash, plan }) {
    const texts = [caller, label, account, hash].filter(Boolean);
    const hasText = texts.some((each) => each.toLowerCase().includes(this.text));
    return hasText && (this.plan === "" || plan === this.plan);
  }

  plans(plans) {
    const select = find("find-plan");
    const names = ["", ...plans];
    if (JSON.stringify(names) === select.names) return;
    select.names = JSON.stringify(names);
    select.replaceChildren(...names.map((name) => make("option", { value: name, text: name === "" ? "all" : plain(name) })));
    select.value = this.plan;
  }

  async look() {
    const text = this.text;
    const answer = text === "" ? { ok: true, value: { callers: [] } } : await this.ask("search", { text });
    if (text === this.text && answer.ok) this.others = answer.value.callers;
    this.showOthers();
  }

  showOthers(shown = this.shown ?? []) {
    this.shown = shown;
    const present = new Set(shown.map(({ caller }) => caller));
    const others = this.others.filter(({ caller }) => !present.has(caller));
    find("found").hidden = others.length === 0;
    keepRows(find("found").lastElementChild, others, ({ caller }) => caller, (each) => {
      const name = knownAs(each);
      return make("li", {}, callerLink(each.caller), make("bdi", { text: name ? ` ${name}` : "" }));
    }, () => {});
  }
}
