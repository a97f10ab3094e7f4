// The chart of admitted and refused requests, by uPlot, with its figures as a table for who can't see it.

import { make, setText } from "./dom.js";
import { clock, count, rate, total } from "./format.js";

const HEIGHT = 200;
const NARROW = 500;
const ADMITTED = 1;
const SHADOW = 3;
const SHORTEST = 2;
const LONGEST = 3600;
const dark = matchMedia("(prefers-color-scheme: dark)");

export class Chart {
  constructor(place, title) {
    this.place = make("div", { className: "chart", role: "img", "aria-label": title });
    this.table = make("tbody");
    const head = ["From", "Admitted", "Refused", "Would be refused (shadow)"];
    const row = make("tr", {}, ...head.map((text) => make("th", { scope: "col", text })));
    const table = make("table", {}, make("thead", {}, row), this.table);
    this.gaps = make("p", { className: "gaps", hidden: true });
    this.details = make("details", {}, make("summary", { text: "The same in numbers, by minute" }), table);
    place.append(this.place, this.gaps, this.details);
    this.title = title;
    this.seconds = 300;
    dark.addEventListener("change", () => this.rebuild());
    new ResizeObserver(() => this.resize()).observe(this.place);
    this.details.addEventListener("toggle", () => this.fillTable());
  }

  show(series, bucket, now) {
    this.details.hidden = false;
    this.series = series;
    this.bucket = bucket;
    this.now = now;
    this.draw();
    this.fillTable();
  }

  // Nothing is known of whom the chart is about now, for this reason.
  forget(why) {
    this.series = null;
    this.plot?.destroy();
    this.plot = null;
    this.place.setAttribute("aria-label", `${this.title}: no figures`);
    this.details.hidden = true;
    setText(this.gaps, why);
    this.gaps.hidden = why === "";
  }

  draw() {
    if (!this.series?.length || !this.place.clientWidth) return;
    const data = this.data();
    if (this.plot) this.plot.setData(data);
    else this.plot = new uPlot(options(this.place.clientWidth), data, this.place);
    this.plot.setSeries(SHADOW, { show: data[SHADOW].some((number) => number) });
    // After uPlot has drawn, which empties the legend: it tells the present, unless somebody points at the past.
    setTimeout(() => {
      if (this.plot?.cursor.idx === null || this.plot?.cursor.idx === undefined) this.plot?.setLegend({ idx: data[0].length - 1 });
    }, 0);
    const sum = this.lastMinute();
    const numbers = `${count(sum.admitted)} requests admitted and ${count(sum.refused)} refused in the last minute`;
    const said = sum.seconds ? numbers : "no figures of the last minute";
    this.sayGaps(data[0], data[ADMITTED]);
    this.place.setAttribute("aria-label", `${this.title}: ${said}`);
  }

  sayGaps(times, numbers) {
    const last = numbers.findLastIndex((number) => number != null);
    const texts = [[last < 0, "No worker reported in the time shown."],
      [last < numbers.length - 1, `No figures since ${clock(times[last + 1] ?? 0)}; everything else here is from that time.`],
      [numbers.includes(null), "Where the lines have gaps, no worker reported."]];
    const text = texts.find(([fits]) => fits)?.[1] ?? "";
    setText(this.gaps, text);
    this.gaps.hidden = text === "";
  }

  // The last day, which is read now and then; shorter times come with each event.
  remember(day) {
    this.day = day;
    this.draw();
    this.fillTable();
  }

  get told() {
    return this.seconds > LONGEST && this.day ? this.day : this;
  }

  data() {
    const { series, bucket, now } = this.told;
    // The bucket that is still filling stands for the part of it that has passed, unless that is too short.
    const shown = series.filter((point) => point.at > now - this.seconds - bucket && point.at <= now - SHORTEST);
    // Where nobody reported, the lines break: nothing is known, which is not the same as nothing.
    const line = (of) => shown.map((point) => (point.known ? of(point) / Math.min(bucket, now - point.at) : null));
    return [
      shown.map((point) => point.at),
      line((point) => point.admitted),
      line((point) => total(point.refused)),
      line((point) => point.shadow),
    ];
  }

  // Sums over what is known of the last minute; of no seconds at all where nothing is.
  lastMinute() {
    const first = this.series.find((point) => point.admitted || point.shadow || total(point.refused));
    const recent = this.series.filter((point) => point.at > this.now - 60 && point.known);
    const sum = (of) => recent.reduce((all, point) => all + of(point), 0);
    const seconds = recent.reduce((all, { at }) => all + (at < first?.at ? 0 : Math.min(this.bucket, this.now - at)), 0);
    return {
      admitted: sum((point) => point.admitted + point.shadow),
      refused: sum((point) => total(point.refused)),
      seconds: recent.length ? Math.max(1, seconds) : 0,
    };
  }

  fillTable() {
    const length = this.told === this ? 60 : 3600;
    setText(this.details.firstChild, `The same in numbers, by ${length === 60 ? "minute" : "hour"}`);
    if (!this.details.open || !this.series) return;
    const minutes = new Map();
    for (const point of this.told.series) {
      const minute = Math.floor(point.at / length) * length;
      const row = minutes.get(minute) ?? [null, null, null];
      minutes.set(minute, point.known ? [row[0] + point.admitted, row[1] + total(point.refused), row[2] + point.shadow] : row);
    }
    const rows = [...minutes].reverse().slice(0, length === 60 ? 15 : 25);
    while (this.table.rows.length < rows.length) {
      this.table.append(make("tr", {}, ...Array.from({ length: 4 }, (_, i) => make("td", i ? { className: "number" } : {}))));
    }
    while (this.table.rows.length > rows.length) this.table.lastChild.remove();
    rows.forEach(([minute, numbers], index) => {
      [clock(minute), ...numbers.map((number) => (number == null ? "–" : count(number)))].forEach((text, i) => setText(this.table.rows[index].cells[i], text));
    });
  }

  zoom(seconds) {
    this.seconds = seconds;
    this.draw();
    this.fillTable();
  }

  resize() {
    if (this.plot && this.place.clientWidth) this.plot.setSize({ width: this.place.clientWidth, height: HEIGHT });
    else this.draw();
  }

  rebuild() {
    this.plot?.destroy();
    this.plot = null;
    this.draw();
  }
}

// Places of the numbers that no line leads to or from: a point each, or nobody would see them.
function alone(plot, series) {
  const numbers = plot.data[series];
  return [...numbers.keys()].filter((i) => numbers[i] != null && numbers[i - 1] == null && numbers[i + 1] == null);
}

function options(width) {
  const styles = getComputedStyle(document.documentElement);
  const colour = (name) => styles.getPropertyValue(`--${name}`).trim();
  const axis = { stroke: colour("soft"), grid: { stroke: colour("line"), width: 1 }, ticks: { show: false } };
  const value = (_plot, number) => (number == null ? "–" : `${rate(number)}/s`);
  const line = (label, name, more) => ({
    label, value, stroke: colour(name), width: 2, points: { show: false, filter: alone }, ...more,
  });
  return {
    width,
    height: HEIGHT,
    padding: [null, 28, null, null],
    cursor: { y: false, drag: { x: false, y: false } },
    legend: { live: true },
    scales: { y: { range: (_plot, _low, high) => [0, Math.max(1, high * 1.1)] } },
    axes: [
      { ...axis, size: 30, space: width < NARROW ? 45 : 70, values: (_plot, times) => times.map((at) => clock(at).slice(0, at % 60 ? 8 : 5)) },
      { ...axis, size: 44, values: (_plot, numbers) => numbers.map(String) },
    ],
    series: [
      { label: "Time", value: (_plot, at) => (at == null ? "–" : clock(at)) },
      line("Admitted", "admitted", { fill: colour("admitted-fill") }),
      line("Refused", "refused", { fill: colour("refused-fill") }),
      line("Would be refused (shadow)", "near", { dash: [6, 4] }),
    ],
  };
}
