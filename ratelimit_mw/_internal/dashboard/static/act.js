// What can be done about a caller from anywhere on the page: ask first, say what was done, offer to undo it.

import { callerLink, find, keepRows, knownAs, make, plain, setText, shortCaller } from "./dom.js";
import { chosenSeconds, clock } from "./format.js";

const AUDIT_MS = 5000;
const SHOWN = 8;

export class Actions {
  constructor(ask) {
    this.ask = ask;
    this.allowed = false;
    this.plans = [];
    find("act-give").addEventListener("click", () => this.do("plan", { caller: this.caller, plan: find("act-plan").value, for: chosenSeconds("act-for") }));
    find("act-reset").addEventListener("click", () => this.do("reset", { caller: this.caller }));
    find("toast-undo").addEventListener("click", () => this.undo(this.last));
    find("toast-close").addEventListener("click", () => { find("toast").hidden = true; });
    find("headline-act").addEventListener("click", () => this.open(this.headlined));
    find("callers").addEventListener("click", (event) => {
      const caller = event.target.closest("button.act")?.dataset.caller;
      if (caller !== undefined) this.open(this.callers.find((each) => each.caller === caller) ?? { caller });
    });
    setInterval(() => this.audit(), AUDIT_MS);
  }

  // The settings and the rights decide whether anything can be done.
  take({ changes, missing_rights: missing, choices, callers, headline }) {
    this.allowed = changes && !missing;
    this.plans = choices ?? [];
    this.callers = callers;
    this.headlined = callers.find((each) => each.caller === headline.caller);
    document.body.classList.toggle("acting", this.allowed);
    find("headline-act").hidden = !this.allowed || !this.headlined;
    find("rights").hidden = !changes || !missing;
    setText(find("rights"), missing ? `Nothing can be changed from here: rights are missing in the backend. This command gives them: ${missing}` : "");
    if (this.read === undefined) this.audit();
  }

  open(figures) {
    this.caller = figures.caller;
    const name = knownAs(figures);
    setText(find("act-caller"), `${shortCaller(figures.caller)}${name ? ` (${name})` : ""}`);
    setText(find("act-facts"), `Its plan is ${plain(figures.plan ?? "unknown")}.`);
    setText(find("act-error"), "");
    const others = this.plans.filter((plan) => plan !== figures.plan);
    find("act-plan").replaceChildren(...others.map((plan) => make("option", { value: plan, text: plain(plan) })));
    find("act-for").value = "";
    find("act").showModal();
  }

  async do(path, values) {
    const answer = await this.ask(path, values);
    if (!answer.ok) {
      setText(find("act-error"), answer.error);
      return;
    }
    find("act").close();
    this.said(answer.value.change);
  }

  async undo(change) {
    const answer = await this.ask("undo", { id: change.id });
    if (answer.ok) this.said(answer.value.change);
    else this.toast(answer.error, null);
  }

  said(change) {
    this.toast(`${named(change)}: ${plain(change.detail)}.`, change.can_undo ? change : null);
    this.audit();
  }

  toast(text, change) {
    this.last = change;
    setText(find("toast-text"), text);
    find("toast-undo").hidden = !change;
    find("toast").hidden = false;
  }

  // The latest changes of everybody.
  async audit() {
    if (document.hidden) return;
    this.read = fetch(`${document.body.dataset.folder}audit`).catch(() => null);
    const answer = await this.read;
    if (!answer?.ok) return;
    const { changes, partial } = await answer.json();
    if (partial) return;
    find("audit-card").hidden = changes.length === 0;
    keepRows(find("audit").tBodies[0], changes.slice(0, SHOWN), ({ id }) => id, (change) => this.row(change), () => {});
  }

  row(change) {
    const undo = make("button", { type: "button", className: "quiet", text: "Undo", "aria-label": `Undo for ${named(change)}: ${plain(change.detail)}` });
    undo.hidden = !change.can_undo || !this.allowed;
    undo.addEventListener("click", () => this.undo(change));
    const [first, ...others] = change.callers;
    const whom = make("td", {}, ...(first === undefined ? [] : [callerLink(first)]), others.length ? ` and ${others.length} more` : "");
    return make("tr", {},
      make("th", { scope: "row", text: clock(change.at) }), whom,
      make("td", { text: plain(change.detail) }), make("td", { text: plain(change.who) }), make("td", {}, undo));
  }
}

const named = ({ callers }) => callers.slice(0, 3).map(shortCaller).join(", ") + (callers.length > 3 ? " …" : "");
