// Pages of the list of callers. Whoever turns one holds the order of that moment: figures move on, rows stay.

import { find, setText } from "./dom.js";
import { count } from "./format.js";

const EVERY_MS = 2000;
const narrow = matchMedia("(max-width: 46rem)");

export class Pages {
  constructor(ask, changed) {
    this.ask = ask;
    this.changed = changed;
    this.page = 0;
    this.held = null;
    find("page-before").addEventListener("click", () => this.turn(-1));
    find("page-next").addEventListener("click", () => this.turn(1));
    find("page-live").addEventListener("click", () => this.release());
    narrow.addEventListener("change", () => this.release());
    setInterval(() => this.refresh(), EVERY_MS);
  }

  get size() {
    return narrow.matches ? 10 : 25;
  }

  // The rows of this page, of callers in their order.
  of(callers) {
    const last = Math.max(0, Math.ceil(callers.length / this.size) - 1);
    this.page = Math.min(this.page, last);
    const first = this.page * this.size;
    this.shown = callers.slice(first, first + this.size);
    find("pager").hidden = last === 0 && !this.held;
    find("page-before").disabled = this.page === 0;
    find("page-next").disabled = this.page === last;
    find("page-live").hidden = !this.held;
    setText(find("page-text"), `${count(first + Math.min(1, callers.length))} to ${count(first + this.shown.length)} of ${count(callers.length)}${this.held ? ", order fixed" : ""}`);
    return this.shown;
  }

  // `live` are the callers of the stream, in the order shown.
  async turn(step) {
    if (!this.held) {
      const answer = await fetch(`${document.body.dataset.folder}callers`).catch(() => null);
      const all = answer?.ok ? (await answer.json()).callers : [];
      const known = new Map(this.live.callers.map((each) => [each.caller, each]));
      this.held = (all.length ? all : this.live.callers).map((each) => known.get(each.caller) ?? each).sort(this.live.order);
    }
    this.page = Math.max(0, this.page + step);
    this.changed();
    this.refresh();
  }

  // As it is now, for the rows of this page alone.
  async refresh() {
    if (!this.held || document.hidden || find("overview").hidden || !this.shown?.length) return;
    const { held } = this;
    const answer = await this.ask("callers", { names: this.shown.map(({ caller }) => caller) });
    if (!answer.ok || held !== this.held) return;
    const now = new Map(answer.value.callers.map((each) => [each.caller, each]));
    this.held = held.map((each) => now.get(each.caller) ?? each);
    this.changed(false);
  }

  release() {
    this.held = null;
    this.page = 0;
    this.changed();
  }
}
