// Curves of one run or two as SVG.  A run's lines are read from where the last reading ended.
import { got, runPath } from "./ask.js";
import { word } from "./words.js";

const WIDE = 640, HIGH = 300, LEFT = 56, BOTTOM = 32, TOP = 24, MOST = 800;
const SVG = "http://www.w3.org/2000/svg";

export class Curves {
  constructor(name) { this.name = name; this.forget(); }

  forget() { this.lines = []; this.next = 0; this.file = 0; }

  async read() {
    for (;;) {
      const found = await got(runPath(this.name, "metrics?from=" + this.next + "&file=" + this.file));
      if (found.again) this.lines = [];
      this.lines.push(...found.lines);
      this.next = found.next;
      this.file = found.file;
      if (!found.more) return;
    }
  }

  keys() {
    const seen = new Set();
    for (const line of this.lines) for (const key of Object.keys(line)) seen.add(key);
    seen.delete("step");
    seen.delete("time");
    return [...seen].sort((a, b) => (b.includes("loss") - a.includes("loss")) || a.localeCompare(b));
  }

  points(key) {
    return this.lines.filter((line) => Number.isFinite(line[key]) && Number.isFinite(line.step)).map((line) => [line.step, line[key]]);
  }

  broken(key) {                            // where it was no number: NaN or infinite
    return this.lines.filter((line) => typeof line[key] === "string" && Number.isFinite(line.step)).map((line) => [line.step, line[key]]);
  }

  series(key) { return [this.name, this.points(key), this.broken(key)]; }
}

function svg(tag, attributes, text) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

function thinned(points) {                 // the ends, lows and highs of equal stretches: no peak is lost
  if (points.length <= MOST) return points;
  const size = Math.ceil(points.length / (MOST / 4)), kept = [];
  for (let at = 0; at < points.length; at += size) {
    const part = points.slice(at, at + size).map((point, place) => [place, point]);
    const sorted = [...part].sort((a, b) => a[1][1] - b[1][1]);
    const four = new Set([part[0], sorted[0], sorted.at(-1), part.at(-1)]);
    kept.push(...[...four].sort((a, b) => a[0] - b[0]).map((one) => one[1]));
  }
  return kept;
}

const short = (value) => (value === 0 ? "0" : Math.abs(value) >= 1e5 || Math.abs(value) < 1e-3 ? value.toExponential(1) : String(+value.toPrecision(4)));

export function draw(place, key, named) {
  const series = named.map(([name, points, broken]) => [name, thinned(points), points.length, broken]);
  const every = series.flatMap(([, points]) => points), breaks = series.flatMap(([, , , broken]) => broken);
  const picture = svg("svg", { viewBox: `0 0 ${WIDE} ${HIGH}`, role: "img" });
  const counts = series.map(([name, , count, broken]) => `${name}: ${count}` + broken.slice(0, 3).map(([step, what]) => `, ${what} (${word("step")} ${step})`).join("")).join(", ");
  picture.append(svg("title", {}, `${key} – ${word("points")}: ${counts}`));
  picture.dataset.points = series.map(([, , count]) => count).join(",");
  picture.dataset.breaks = series.map(([, , , broken]) => broken.length).join(",");
  if (every.length || breaks.length) {
    const bounds = (at) => (at ? (every.length ? every : [[0, 0]]) : every.concat(breaks)).reduce(([low, high], point) => [Math.min(low, point[at]), Math.max(high, point[at])], [Infinity, -Infinity]);
    const [x0, x1] = bounds(0), [y0, y1] = bounds(1);
    const x = (value) => LEFT + (WIDE - LEFT - 12) * (x1 > x0 ? (value - x0) / (x1 - x0) : 0.5);
    const y = (value) => HIGH - BOTTOM - (HIGH - BOTTOM - TOP) * (y1 > y0 ? (value - y0) / (y1 - y0) : 0.5);
    for (const share of [0, 0.5, 1]) {
      const high = y0 + share * (y1 - y0), far = x0 + share * (x1 - x0);
      picture.append(svg("line", { class: "axis", x1: LEFT, x2: WIDE - 12, y1: y(high), y2: y(high) }));
      picture.append(svg("text", { x: LEFT - 6, y: y(high) + 4, "text-anchor": "end" }, short(high)));
      picture.append(svg("text", { x: x(far), y: HIGH - 10, "text-anchor": share ? (share === 1 ? "end" : "middle") : "start" }, short(far) + (share === 1 ? " " + word("step") : "")));
    }
    for (const [step, what] of breaks.slice(0, MOST)) {
      picture.append(svg("line", { class: "break", x1: x(step), x2: x(step), y1: TOP, y2: HIGH - BOTTOM }));
      if (step === breaks[0][0]) picture.append(svg("text", { class: "broke", x: x(step) - 4, y: TOP + 12, "text-anchor": "end" }, what));
    }
    for (const [number, [name, points]] of series.entries()) {
      picture.append(svg("polyline", { class: "line" + number, points: points.map(([a, b]) => x(a).toFixed(1) + "," + y(b).toFixed(1)).join(" ") }));
      if (series.length > 1) picture.append(svg("text", { class: "name" + number, x: LEFT + number * 280, y: 14 }, name.slice(0, 36)));
    }
  }
  place.replaceChildren(picture);
}
