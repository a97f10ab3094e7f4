// Starts the page: the stream of figures, the status line, and which of the two pages is shown.

import { Actions } from "./act.js";
import { CallerPage } from "./caller.js";
import { find, keepRows, make, plain, setText, shortCaller } from "./dom.js";
import { milliseconds } from "./format.js";
import { Overview, showHeadline } from "./overview.js";

const POINTS = 720;
const SILENT_MS = 4000;
const FROM_BACKEND = ["workers", "settings"];
const SAY_EVERY_MS = 10000;

const overview = new Overview(ask);
const callerPage = new CallerPage(ask, (caller) => last?.callers.find((each) => each.caller === caller));
const actions = new Actions(ask);
const folder = document.body.dataset.folder;
let source = null;
let series = [];
let last = null;
let heard = performance.now();
let heardAt = Date.now();
let said = { at: -SAY_EVERY_MS, text: "" };

async function ask(path, values) {
  try {
    const answer = await fetch(folder + path, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(values),
      redirect: "error",
    });
    if (answer.status === 401) location.reload();
    const value = answer.status === 204 ? {} : await answer.json();
    return answer.ok ? { ok: true, value } : { ok: false, error: value.error };
  } catch {
    return { ok: false, error: "The server does not answer." };
  }
}

function connect() {
  source?.close();
  source = new EventSource(`${folder}events`);
  source.addEventListener("full", (event) => {
    const snapshot = JSON.parse(event.data);
    series = snapshot.series;
    take(snapshot);
  });
  source.addEventListener("news", (event) => {
    const snapshot = JSON.parse(event.data);
    const [first] = snapshot.series;
    if (first && series.length && first.at > series.at(-1).at + snapshot.bucket) {
      connect(); // this page slept through some of it
      return;
    }
    if (last && !last.backend.up && snapshot.backend.up) {
      connect(); // what was reported before and after the outage
      return;
    }
    if (first) series = [...series.filter((point) => point.at < first.at), ...snapshot.series].slice(-POINTS);
    take(snapshot);
  });
  source.addEventListener("error", async () => {
    if (source.readyState !== EventSource.CLOSED) return;
    const answer = await fetch(`${folder}snapshot`).catch(() => null);
    if (answer?.status === 401) location.reload();
    else setTimeout(connect, SILENT_MS);
  });
}

function take(snapshot) {
  heard = performance.now();
  heardAt = Date.now();
  last = snapshot;
  status(snapshot);
  whoIsIn(snapshot);
  actions.take(snapshot);
  if (!find("overview").hidden) overview.show(snapshot, series);
  announce();
}

function status(snapshot) {
  const { backend, settings, workers, partial } = snapshot;
  const { p50, p99 } = backend.latency_ms ?? {};
  const latency = p50 == null ? "" : `, ${milliseconds(p50)} (p99 ${milliseconds(p99)})`;
  const agree = settings.versions.length < 2;
  const unheard = performance.now() - heard > SILENT_MS;
  const silent = workers.filter((worker) => worker.silent).length;
  const someSilent = silent ? `, ${silent} silent` : "";
  const facts = [
    ["live", unheard ? "no news" : "live", !unheard],
    ["backend", backend.up ? `${backend.kind} up${latency}` : `${backend.kind} is away`, backend.up],
    ["workers", `${workers.length} ${workers.length === 1 ? "worker" : "workers"}${someSilent}`, !silent],
    ["settings", `settings ${settings.versions.map(plain).join(", ")}${agree ? "" : ": workers disagree"}`, agree],
  ];
  // What is not of now is neither good nor bad.
  const old = unheard || snapshot.headline.kind === "silent";
  keepRows(find("status"), facts, ([name]) => name, ([name]) => make("li", { id: `status-${name}` }),
    (element, [name, text, good]) => {
      setText(element, text);
      const isOld = old || (!backend.up && FROM_BACKEND.includes(name));
      element.className = isOld && good ? "unknown" : good ? "good" : "bad";
    });
  document.body.classList.toggle("old", old);
  if (unheard) {
    const number = `${workers.length} ${workers.length === 1 ? "worker" : "workers"}`;
    const more = "The server does not answer this page: all figures below are old.";
    showHeadline({ level: "alarm", title: `No news from ${number} since`, more, since: heardAt / 1000 });
    find("headline-act").hidden = true;
    announce(find("headline-text").textContent);
  }
  find("notice").hidden = !partial || snapshot.headline.kind === "backend";
  setText(find("notice"), partial ?? "");
}

// Changes bear this name, so whoever makes one should see it.
function whoIsIn({ operator, changes }) {
  find("operator").hidden = !operator;
  setText(find("operator"), `${plain(operator ?? "")}${changes ? "" : ", read-only"}`);
}

// Screen readers are told what changed, and not every second.
function announce(text = overview.said ?? "") {
  if (text === said.text || find("overview").hidden || performance.now() - said.at < SAY_EVERY_MS) return;
  said = { at: performance.now(), text };
  setText(find("announce"), text);
}

function route() {
  const hash = location.hash.slice(1);
  const isCaller = hash.startsWith("caller=");
  const wasCaller = !find("caller").hidden;
  find("overview").hidden = isCaller;
  find("caller").hidden = !isCaller;
  if (isCaller) {
    const caller = decoded(hash.slice("caller=".length));
    document.title = `${shortCaller(caller)}: rate limits`;
    callerPage.open(caller);
    scrollTo(0, 0);
    return;
  }
  document.title = "Rate limits";
  callerPage.close();
  if (last) overview.show(last, series);
  if (wasCaller) find("main").focus({ preventScroll: true });
}

function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

find("logout").addEventListener("click", async () => {
  await ask("logout", {});
  location.reload();
});
addEventListener("hashchange", route);
// What scrolls sideways can be scrolled with the keyboard.
const scrolls = new ResizeObserver((entries) => {
  for (const { target } of entries) {
    const card = target.closest(".card");
    if (card.scrollWidth > card.clientWidth) card.tabIndex = 0;
    else card.removeAttribute("tabindex");
  }
});
document.querySelectorAll(".card, .card table").forEach((each) => scrolls.observe(each));
// A page that nobody sees costs the server nothing.
document.addEventListener("visibilitychange", () => {
  if (document.hidden) source?.close();
  else connect();
});
setInterval(() => last && status(last), 1000);
route();
connect();
