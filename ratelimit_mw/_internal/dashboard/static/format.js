// Numbers and words.

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const tenths = new Intl.NumberFormat("en", { minimumFractionDigits: 1, maximumFractionDigits: 1 });

export const count = (number) => whole.format(number);
export const rate = (number) => (number > 0 && number < 0.1 ? "<0.1" : (number >= 100 ? whole : tenths).format(number));
export function percent(share) {
  const rounded = Math.round(share * 100);
  if (rounded === 0 && share > 0) return "<1 %";
  return rounded === 100 && share < 1 ? ">99 %" : `${rounded} %`;
}
export const total = (refused) => Object.values(refused).reduce((sum, number) => sum + number, 0);

export const KINDS = {
  rate: "request rate",
  concurrency: "requests at once",
  spending: "budget",
  cost: "cost above the limit",
  capacity: "shared limit",
  unavailable: "backend away",
  blocked: "blocked",
};
export const kind = (name) => KINDS[name] ?? name;

export function reasons(refused) {
  const found = Object.entries(refused).filter(([, number]) => number > 0);
  return found.sort((a, b) => b[1] - a[1]).map(([name]) => kind(name)).join(", ");
}

export function duration(seconds) {
  if (seconds < 1) return "now";
  if (seconds < 100) return `${Math.round(seconds)} s`;
  const minutes = Math.round(seconds / 60);
  if (minutes < 100) return `${minutes} min`;
  const hours = Math.round(seconds / 360) / 10;
  return hours < 48 ? `${hours} h` : `${Math.round(hours / 24)} days`;
}

const within = (seconds) => (seconds < 1 ? "now" : `in ${duration(seconds)}`);

export const milliseconds = (number) => (number == null ? "–" : `${number < 10 ? number.toFixed(1) : Math.round(number)} ms`);
export const clock = (at) => new Date(at * 1000).toLocaleTimeString("en-GB");

export function used(limit) {
  const unit = limit.currency && limit.currency !== "token" ? ` ${limit.currency}` : "";
  const held = limit.kind === "spending" && limit.held > 0 ? `, ${amount(limit)} held` : "";
  return `${limit.used_text} of ${limit.limit_text}${unit}${held}`;
}

const money = new Intl.NumberFormat("en", { minimumFractionDigits: 2, maximumFractionDigits: 6 });
const amount = ({ held, currency }) => (currency === "token" ? count(held) : money.format(held));

export function outlook(limit) {
  if (limit.kind === "slots") return limit.share >= 1 ? "all held" : "–";
  if (limit.forecast != null && limit.share < 1) return `used up ${within(limit.forecast)} at this pace`;
  const again = limit.reset_after ? `${limit.kind === "window" ? "more left" : "starts again"} ${within(limit.reset_after)}` : "–";
  return limit.share >= 1 ? `used up, ${again}` : again;
}

// How long a change holds, as a select says; null for good.
export function chosenSeconds(id) {
  const { value } = document.getElementById(id);
  return value === "" ? null : Number(value);
}
