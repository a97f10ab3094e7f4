// The overview: who is the trouble, the traffic, the callers, and what stands behind them.

import { bar, callerLink, find, keepRows, knownAs, make, plain, setBar, setText, shortCaller } from "./dom.js";
import { Chart } from "./chart.js";
import { Pages } from "./pages.js";
import { Search } from "./search.js";
import { clock, count, duration, kind, milliseconds, outlook, percent, rate, reasons, total, used } from "./format.js";

const DAY = 86400;
const DAY_EVERY_MS = 30000;
const RANGES = [["5 min", 300], ["15 min", 900], ["1 hour", 3600], ["1 day", DAY]];
const ORDERS = [
  ["Most refused", (a, b) => total(b.refused) - total(a.refused) || b.rate - a.rate],
  ["Nearest to a limit", (a, b) => (b.nearest ?? 0) - (a.nearest ?? 0) || b.rate - a.rate],
  ["Busiest", (a, b) => b.rate - a.rate],
];
const HELD = 12;

export class Overview {
  constructor(ask) {
    const changed = (resort = true) => this.snapshot && this.callers(this.snapshot, resort);
    this.pages = new Pages(ask, changed);
    this.search = new Search(ask, () => {
      this.pages.page = 0;
      changed();
    });
    this.chart = new Chart(find("traffic"), "Requests a second");
    this.order = ORDERS[0][1];
    choice(find("range"), RANGES, 0, (seconds) => {
      this.seconds = seconds;
      this.chart.zoom(seconds);
      this.day();
    });
    setInterval(() => this.day(), DAY_EVERY_MS);
    choice(find("order"), ORDERS, 0, (order) => {
      this.order = order;
      this.pages.release();
    });
  }

  show(snapshot, series) {
    this.snapshot = snapshot;
    this.headline(snapshot);
    this.chart.show(series, snapshot.bucket, snapshot.now);
    this.now(this.chart.lastMinute());
    this.callers(snapshot);
    this.kinds(snapshot.plans);
    this.plans(snapshot.plans);
    this.routes(snapshot);
    this.held(snapshot.callers);
    this.workers(snapshot.workers);
  }

  // Read only while somebody looks at it.
  async day() {
    if (this.seconds !== DAY || document.hidden || find("overview").hidden) return;
    const answer = await fetch(`${document.body.dataset.folder}day`).catch(() => null);
    if (answer?.ok) this.chart.remember(await answer.json());
  }

  // The sentence that says what to know first, also given to screen readers when it changes.
  headline({ headline, callers }) {
    const caller = callers.find((each) => each.caller === headline.caller);
    showHeadline(headline, caller);
    this.said = find("headline-text").textContent;
  }

  now(sum) {
    const speed = (number) => (sum.seconds ? `${rate(number / sum.seconds)}/s` : "–");
    const share = sum.refused ? percent(sum.refused / (sum.admitted + sum.refused)) : "0 %";
    const facts = [
      ["admitted", speed(sum.admitted), "admitted"],
      ["refused", speed(sum.refused), "refused"],
      ["of all", sum.seconds ? share : "–", "refused"],
    ];
    keepRows(find("now"), facts, ([name]) => name,
      ([name, , style]) => make("div", { className: style }, make("dt", { text: name }), make("dd")),
      (element, [, text, style]) => {
        setText(element.lastChild, text);
        element.classList.toggle("none", style === "refused" && !sum.refused);
      });
  }

  callers({ callers, callers_seen: seen, choices, headline }, resort = false) {
    const body = find("callers").tBodies[0];
    this.search.plans(choices ?? []);
    this.pages.live = { callers, order: this.order };
    const { held } = this.pages;
    const sorted = this.pages.of(held ? this.search.of(held) : this.search.of(callers).toSorted(this.order));
    const number = seen > sorted.length ? `${count(sorted.length)} of ${count(seen)} in the last minute` : "in the last minute";
    setText(find("callers-number"), number);
    this.search.showOthers(sorted);
    if (resort) {
      body.replaceChildren();
      body.known = new Map();
    }
    const most = Math.max(0, ...callers.map((caller) => total(caller.refused)));
    const worst = callers.toSorted(ORDERS[0][1])[0];
    keepRows(body, sorted, ({ caller }) => caller, callerRow, (row, caller) => {
      const refused = total(caller.refused);
      const isWorst = refused > 0 && caller === worst;
      // Limits that do their job look calm.
      row.classList.toggle("worst", isWorst && headline.level === "alarm");
      row.classList.toggle("refused", refused > 0);
      const [name, plan, speed, admitted, cell, why, limits] = row.cells;
      name.querySelector(".tag").hidden = !isWorst;
      setText(name.querySelector(".account"), knownAs(caller));
      setText(plan.firstChild, plain(caller.plan ?? "–"));
      setText(speed, rate(caller.rate));
      setText(admitted, count(caller.admitted));
      setText(cell.firstChild, count(refused));
      setBar(cell.lastChild, most ? refused / most : 0);
      cell.lastChild.hidden = refused === 0;
      setText(why, reasons(caller.refused) || (caller.shadow ? `${count(caller.shadow)} in shadow` : "–"));
      limitBars(limits.firstChild, caller.limits.filter(({ share }) => share > 0));
    });
    find("no-callers").hidden = sorted.length > 0;
    setText(find("no-callers"), callers.length ? "No caller in this list fits your search." : "Nobody has called in the last minute.");
    find("callers").hidden = sorted.length === 0;
  }

  kinds(plans) {
    const kinds = new Map();
    for (const plan of plans) {
      for (const [name, number] of Object.entries(plan.refused)) kinds.set(name, (kinds.get(name) ?? 0) + number);
    }
    const found = [...kinds].filter(([, number]) => number > 0).sort((a, b) => b[1] - a[1]);
    const all = found.reduce((sum, [, number]) => sum + number, 0);
    keepRows(find("kinds").tBodies[0], found, ([name]) => name,
      ([name]) => row(make("th", { scope: "row", text: kind(name) }), make("td", {}, bar(0, "of-refused")), number()),
      (element, [, each]) => {
        setBar(element.cells[1].firstChild, each / all);
        setText(element.cells[2], count(each));
      });
    find("no-kinds").hidden = found.length > 0;
  }

  plans(plans) {
    const sorted = plans.toSorted((a, b) => total(b.refused) - total(a.refused) || b.admitted - a.admitted);
    keepRows(find("plans").tBodies[0], sorted, ({ plan }) => plan,
      ({ plan }) => row(named(plan), make("td"), number(), number()),
      (element, plan) => outcomes(element, plan));
  }

  // By the app's own routes as soon as workers count by them, which they do while a page is open; until then
  // by the rules of the settings.
  routes({ routes: rules = [], app_routes: appRoutes = [], app_routes_since: since }) {
    const routes = appRoutes.length ? appRoutes : rules.map(({ route, ...each }) => ({ route: route || "no rule of its own", ...each }));
    const when = since == null ? "in the last minute" : `since ${clock(since)}`;
    setText(find("routes-when"), appRoutes.length ? when : "in the last minute, by the rules of the settings");
    keepRows(find("routes").tBodies[0], routes, ({ route, rule }) => JSON.stringify([route, rule]),
      ({ route, rule }) => row(namedRoute(route, rule), make("td"), number(), number()),
      (element, each) => outcomes(element, each));
    find("no-routes").hidden = routes.length > 0;
    find("routes").hidden = routes.length === 0;
  }

  held(callers) {
    const all = callers.flatMap(({ caller, limits }) => limits.map((limit) => ({ caller, limit })));
    const held = all.filter(({ limit }) => limit.kind !== "window" && (limit.used > 0 || limit.held > 0));
    const sorted = held.sort((a, b) => b.limit.share - a.limit.share).slice(0, HELD);
    keepRows(find("held").tBodies[0], sorted, ({ caller, limit }) => JSON.stringify([caller, limit.name, limit.scope]),
      ({ caller, limit }) => row(
        make("th", { scope: "row" }, callerLink(caller)),
        make("td", { text: plain(limit.name) }),
        make("td", {}, bar(0), make("span", { className: "amount" })),
        make("td"),
      ),
      (element, { limit }) => {
        setBar(element.cells[2].firstChild, limit.share);
        setText(element.cells[2].lastChild, used(limit));
        setText(element.cells[3], outlook(limit));
      });
    find("no-held").hidden = sorted.length > 0;
    find("held").hidden = sorted.length === 0;
  }

  workers(workers) {
    const versions = new Set(workers.map((worker) => worker.version));
    keepRows(find("workers").tBodies[0], workers, ({ worker }) => worker,
      (each) => row(named(`${each.host} ${each.pid}`), number(), number(), number(), make("td", { className: "code" })),
      (element, each) => {
        element.classList.toggle("bad", !each.backend_up || each.silent || versions.size > 1);
        const notes = [each.compiled ? "" : ", not compiled", each.seen > 5 ? `, silent for ${duration(each.seen)}` : ""];
        setText(element.cells[1], rate(each.requests));
        setText(element.cells[2], count(each.leases));
        const { p50, p99 } = each.latency_ms ?? {};
        setText(element.cells[3], each.backend_up ? `${milliseconds(p50)}, ${milliseconds(p99)}` : "backend away");
        setText(element.cells[4], plain(each.version) + notes.join(""));
      });
  }
}

function outcomes(element, { admitted, refused }) {
  setText(element.cells[1], reasons(refused) || "–");
  setText(element.cells[2], count(admitted));
  setText(element.cells[3], count(total(refused)));
  element.cells[3].classList.toggle("refused-text", total(refused) > 0);
}

export function showHeadline({ level, title, more, caller, since }, figures) {
  const section = find("headline");
  section.classList.toggle("trouble", level === "alarm");
  section.classList.toggle("some", level === "notice");
  const whom = figures ? knownAs(figures) : "";
  const said = JSON.stringify([title, caller, since, whom]);
  if (section.said !== said) {
    section.said = said;
    const parts = caller ? [callerLink(caller), make("bdi", { text: whom ? ` (${whom})` : "" }), ` ${title}`] : [plain(title)];
    if (since != null) parts.push(` ${clock(since)}`);
    find("headline-text").replaceChildren(...parts);
  }
  setText(find("headline-more"), plain(more));
}

// What the settings call a caller beside its name.
function callerRow({ caller }) {
  const tag = make("strong", { className: "tag", text: "most refused" });
  const cell = (className, ...children) => make("td", { role: "cell", className }, ...children);
  const account = make("bdi", { className: "account" });
  return make("tr", { role: "row" },
    make("th", { scope: "row", role: "rowheader" }, callerLink(caller), tag, account),
    cell("plan", make("bdi")),
    cell("number speed"), cell("number admitted"),
    cell("number refusals", make("span"), bar(0, "of-refused")),
    cell("why"),
    cell("limits", make("ul")),
    cell("act", make("button", {
      type: "button", className: "act quiet", text: "Act …", "data-caller": caller, "aria-label": `Act on ${shortCaller(caller)}`,
    })));
}

function limitBars(list, limits) {
  keepRows(list, limits.slice(0, 4), ({ name, scope }) => JSON.stringify([name, scope]),
    ({ name, scope }) => make("li", {},
      make("span", { className: "what", text: plain(scope === "plan" ? name : `${name}, ${scope}`) }),
      bar(0), make("span", { className: "amount" })),
    (element, limit) => {
      setBar(element.children[1], limit.share);
      setText(element.lastChild, used(limit));
    });
}

function choice(place, options, first, choose) {
  const buttons = options.map(([name, value], index) => {
    const button = make("button", { type: "button", "aria-pressed": String(index === first), text: name });
    button.addEventListener("click", () => {
      buttons.forEach((each) => each.setAttribute("aria-pressed", String(each === button)));
      choose(value);
    });
    return button;
  });
  place.append(...buttons);
}

// The rule of the settings stands below the route that it is for, where the two differ.
function namedRoute(route, rule) {
  const cell = named(route);
  if (rule && rule !== route) cell.append(make("bdi", { className: "rule", text: plain(`rule ${rule}`) }));
  return cell;
}

const row = (...cells) => make("tr", {}, ...cells);
const number = () => make("td", { className: "number" });
const named = (name) => make("th", { scope: "row" }, make("bdi", { text: plain(name) }));
