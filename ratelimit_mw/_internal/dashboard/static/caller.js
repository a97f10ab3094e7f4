// One caller's own page: how it stands, its history, and what can be done about it.

import { bar, find, keepRows, make, plain, setBar, setText } from "./dom.js";
import { Chart } from "./chart.js";
import { chosenSeconds, count, outlook, rate, reasons, total, used } from "./format.js";

const EVERY_MS = 2000;
// Of a caller of whom nothing was ever told.
const NOTHING = { rate: 0, admitted: 0, refused: {}, limits: [], known_as: [], plans: [], set_live: [], changes: false };

export class CallerPage {
  // `lastSeen` has what the overview knows of a caller, if it does.
  constructor(ask, lastSeen) {
    this.ask = ask;
    this.lastSeen = lastSeen;
    this.chart = new Chart(find("history"), "Its requests a second");
    this.chart.zoom(600);
    find("plan-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.setPlan(find("plan-name").value);
    });
    find("plan-back").addEventListener("click", () => this.setPlan(null));
    find("reset").addEventListener("click", () => this.reset());
    find("plan-key").addEventListener("change", () => this.showBack());
  }

  open(caller) {
    this.close();
    this.caller = caller;
    this.chosen = null;
    setText(find("done"), "");
    find("caller-notice").hidden = true;
    setText(find("caller-name"), plain(caller));
    for (const id of ["limits", "caller-facts", "addresses", "asked"]) emptied(find(id).tBodies?.[0] ?? find(id));
    this.chart.forget("");
    find("sightings").hidden = true;
    find("changes").hidden = true;
    find("caller-name").focus({ preventScroll: true });
    this.refresh();
  }

  close() {
    clearTimeout(this.timer);
    this.caller = null;
  }

  async refresh() {
    const caller = this.caller;
    clearTimeout(this.timer);
    const answer = document.hidden ? null : await this.ask("caller", { caller });
    if (caller !== this.caller) return;
    if (answer?.ok) this.show(answer.value);
    else if (answer) this.show({ ...NOTHING, ...this.lastSeen(caller), ...(this.detail?.caller === caller ? this.detail : {}), partial: `${answer.error.replace(/[.]?$/, ".")} The page shows this caller as last seen.` });
    this.timer = setTimeout(() => this.refresh(), EVERY_MS);
  }

  show(detail) {
    const refused = total(detail.refused);
    find("caller-logs").hidden = !detail.logs_url;
    if (detail.logs_url) find("caller-logs").firstElementChild.href = detail.logs_url.replaceAll("{caller}", encodeURIComponent(this.caller.toWellFormed()));
    find("caller-notice").hidden = !detail.partial;
    setText(find("caller-notice"), detail.partial ?? "");
    const facts = [
      ...(detail.label ? [["Label", plain(detail.label)]] : []),
      ["Plan", plain(detail.plan ?? "–")],
      ...(detail.until ? [["This plan ends", new Date(detail.until * 1000).toLocaleString("en-GB")]] : []),
      ["Account", detail.account ? plain(detail.account) : "–"],
      ["Requests a second", rate(detail.rate)],
      ["Admitted in the last minute", count(detail.admitted)],
      ["Refused in the last minute", refused ? `${count(refused)}, by ${reasons(detail.refused)}` : "0"],
      ["API key", detail.known_as.length ? detail.known_as.map(plain).join(", ") : "–"],
    ];
    keepRows(find("caller-facts"), facts, ([name]) => name,
      ([name]) => make("div", {}, make("dt", { text: name }), make("dd")),
      (element, [name, text]) => {
        setText(element.lastChild, text);
        element.classList.toggle("trouble", refused > 0 && name.startsWith("Refused"));
      });
    this.limits(detail.limits);
    if (detail.partial && !this.chart.series) this.chart.forget("No figures for now.");
    if (!detail.partial) {
      find("sightings").hidden = false;
      places("addresses", detail.addresses, ({ address }) => address);
      places("asked", detail.routes, ({ route }) => route);
      this.chart.show(detail.series, detail.bucket, detail.now);
    }
    this.changes(detail);
  }

  limits(limits) {
    keepRows(find("limits").tBodies[0], limits, ({ name, scope }) => JSON.stringify([name, scope]),
      ({ name, scope }) => make("tr", {},
        make("th", { scope: "row", text: plain(name) }),
        make("td", { text: plain(scope) }),
        make("td", {}, bar(0), make("span", { className: "amount" })),
        make("td")),
      (element, limit) => {
        setBar(element.cells[2].firstChild, limit.share);
        setText(element.cells[2].lastChild, used(limit));
        setText(element.cells[3], outlook(limit));
      });
    find("no-limits").hidden = limits.length > 0;
    find("limits").hidden = limits.length === 0;
  }

  changes(detail) {
    find("changes").hidden = !detail.changes || Boolean(detail.missing_rights);
    const names = detail.network ? [detail.network] : detail.known_as;
    find("plan-form").hidden = names.length === 0;
    find("no-key").hidden = names.length > 0;
    this.detail = detail;
    fillSelect(find("plan-key"), names, null);
    // What somebody is choosing at this moment is left alone.
    const isNew = this.chosen !== detail.plan;
    this.chosen = detail.plan;
    fillSelect(find("plan-name"), detail.plans, isNew ? detail.plan : null);
    this.showBack();
  }

  showBack() {
    find("plan-back").hidden = !this.detail.set_live.includes(find("plan-key").value);
  }

  async setPlan(plan) {
    const key = find("plan-key").value;
    const whom = key.includes("/") ? plain(key) : "this API key";
    const what = plan === null ? `Take back what was set live for ${whom}?` : `Give ${whom} the plan ${plain(plan)}?`;
    if (!(await confirmed(what))) return;
    const answer = await this.ask("plan", { key, plan, for: plan === null ? null : chosenSeconds("plan-for") });
    this.say(answer, plan === null ? "Taken back" : `Plan ${plain(plan)} is set`, "in force on every worker within 2 seconds");
  }

  async reset() {
    const caller = this.caller;
    if (!(await confirmed("Clear all counts of this caller? Its limits then start at zero."))) return;
    const answer = await this.ask("reset", { caller });
    this.say(answer, "Cleared", `${answer.ok ? answer.value.cleared : 0} counters`);
  }

  say(answer, what, more) {
    setText(find("done"), answer.ok ? `${what}: ${more}.` : answer.error);
    find("done").classList.toggle("failed", !answer.ok);
    this.refresh();
  }
}

// Addresses or routes, with how often each was met.
function places(id, found, nameOf) {
  keepRows(find(id).tBodies[0], found, nameOf,
    (each) => make("tr", {}, make("th", { scope: "row", className: "code", text: plain(nameOf(each)) }), make("td", { className: "number" })),
    (element, { requests }) => setText(element.lastChild, count(requests)));
  find(id).hidden = found.length === 0;
  find(`no-${id}`).hidden = found.length > 0;
}

function confirmed(question) {
  const dialog = find("confirm");
  setText(find("confirm-text"), question);
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
  });
}

function fillSelect(select, values, chosen) {
  const present = [...select.options].map((option) => option.value);
  if (present.length !== values.length || present.some((value, index) => value !== values[index])) {
    const before = select.value;
    select.replaceChildren(...values.map((value) => make("option", { value, text: plain(value) })));
    if (values.includes(before)) select.value = before;
  }
  if (chosen !== null) select.value = chosen;
}

function emptied(element) {
  element.replaceChildren();
  element.known = new Map();
}
