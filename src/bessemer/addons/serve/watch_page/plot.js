// One plot of curves, drawn as SVG from columns of numbers. The pointer or the arrow keys show values; dragging over a
// stretch zooms in. All plots share the stretch, so the page holds it.

import { make } from "./dom.js";
import { sizes } from "./speech.js";
import { language, t, told } from "./words.js";

const HEIGHT = 190;
const [LEFT, RIGHT, TOP, BOTTOM] = [46, 6, 8, 22];
const SMALLEST = 8; // a drag over fewer pixels is a click

export class Plot {
  // zoom([low, high]) or zoom(null): called when the user wants a stretch, or everything.
  constructor(panel, zoom) {
    Object.assign(this, { panel, zoom, lines: [], stops: [], shown: null, from: null, span: null });
    this.svg = drawn("svg", { "aria-hidden": "true", height: HEIGHT });
    this.tip = make("div.tip", { role: "status", hidden: true });
    this.whole = make("button.whole", { type: "button", hidden: true, onclick: () => zoom(null) }, t("show all"));
    this.legend = make("ul.legend");
    this.last = make("span.last");
    const caption = make("figcaption", {}, make("span.title", {}, told(panel.title)), this.last);
    caption.append(make("span.unit", {}, told(panel.unit)));
    const parts = [caption, this.svg, this.legend, this.tip, this.whole];
    this.figure = make("figure.chart", { tabindex: "0", "aria-label": told(panel.title) }, ...parts);
    this.svg.addEventListener("pointermove", (event) => this.move(event));
    this.svg.addEventListener("pointerleave", () => this.from === null && this.hide());
    this.svg.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      this.from = this.placeOf(event);
      if (event.pointerType === "mouse") this.svg.setPointerCapture(event.pointerId);
      this.move(event);
    });
    this.svg.addEventListener("pointerup", (event) => this.drop(this.placeOf(event)));
    this.svg.addEventListener("pointercancel", () => this.drop(this.from));
    this.svg.addEventListener("dblclick", () => zoom(null));
    this.figure.addEventListener("keydown", (event) => this.key(event));
    this.figure.addEventListener("blur", () => this.hide());
    new ResizeObserver(() => this.draw()).observe(this.svg);
  }

  // lines: [{ x, y, sx, sy, label, last, look }]; sx and sy are the smoothed curve, empty if there is none. last is the
  // end of the curve that is drawn bold.
  update(lines, span) {
    Object.assign(this, { lines, span });
    this.whole.hidden = !span;
    this.figure.classList.toggle("none", !lines.length);
    const entries = lines.map(({ look, label, last }) => {
      const key = drawn("svg", { viewBox: "0 0 24 4", "aria-hidden": "true", class: "key" });
      key.append(drawn("line", { x1: 0, x2: 24, y1: 2, y2: 2, class: `line ${look}` }));
      return make("li", {}, key, make("b", {}, label), make("em", {}, short(last)));
    });
    this.legend.replaceChildren(...(lines.length > 1 ? entries : []));
    this.last.textContent = lines.length === 1 ? short(lines[0].last) : lines.length ? "" : t("no values here");
    this.draw();
  }

  draw() {
    const width = this.svg.getBoundingClientRect().width || 320;
    this.svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    if (!this.lines.length) return this.svg.replaceChildren();
    this.scales(width);
    const noisy = this.lines.filter(({ sx }) => sx.length);
    const faint = noisy.map(({ x, y, look }) => drawn("path", { d: this.path(x, y), class: `line faint ${look}` }));
    const parts = [...this.ticks(width), ...faint]; // faint lines first, so that none covers a bold one
    for (const { x, y, sx, sy, look } of this.lines) {
      const [bx, by] = sx.length ? [sx, sy] : [x, y];
      parts.push(drawn("path", { d: this.path(bx, by), class: `line ${look}` }));
      if (x.length === 1) parts.push(drawn("circle", { cx: this.atX(x[0]), cy: this.atY(y[0]), r: 3, class: look }));
    }
    this.over = drawn("g", {});
    this.svg.replaceChildren(...parts, this.over);
    this.stops = [...new Set(this.lines.flatMap(({ x }) => x))].sort((a, b) => a - b);
    if (this.shown !== null) this.show(this.stops[nearest(this.stops, this.shown)]);
  }

  scales(width) {
    const xs = this.lines.flatMap(({ x }) => [x[0], x.at(-1)]);
    let [left, right] = [Math.min(...xs), Math.max(...xs)];
    if (left === right) [left, right] = [left - 0.5, right + 0.5];
    let [low, high] = [Infinity, -Infinity];
    for (const { y } of this.lines) for (const value of y) [low, high] = [Math.min(low, value), Math.max(high, value)];
    this.log = this.panel.log && low > 0 && high / low > 30;
    if (!this.span && !this.log) {
      low = Math.min(low, this.panel.floor ?? low);
      high = Math.max(high, this.panel.ceiling ?? high);
    }
    const [a, b] = this.log ? [Math.log10(low), Math.log10(high)] : [low, high];
    const margin = a === b ? Math.abs(a) * 0.05 || 0.5 : (b - a) * 0.05;
    Object.assign(this, { left, right, low: a - margin, high: b + margin, width });
  }

  atX(x) {
    return LEFT + ((x - this.left) / (this.right - this.left)) * (this.width - LEFT - RIGHT);
  }
  atY(y) {
    const value = this.log ? Math.log10(y) : y;
    return HEIGHT - BOTTOM - ((value - this.low) / (this.high - this.low)) * (HEIGHT - TOP - BOTTOM);
  }

  path(xs, ys) {
    return xs.map((x, i) => `${i ? "L" : "M"}${this.atX(x).toFixed(1)} ${this.atY(ys[i]).toFixed(1)}`).join("");
  }

  ticks(width) {
    const text = (words, attributes) => {
      const one = drawn("text", attributes);
      one.textContent = words;
      return one;
    };
    const heights = this.log ? powers(this.low, this.high) : nice(this.low, this.high);
    const up = heights.flatMap((value) => {
      const y = this.atY(value);
      const ruler = drawn("line", { x1: LEFT, x2: width - RIGHT, y1: y, y2: y, class: "grid" });
      return [ruler, text(short(value), { x: LEFT - 6, y: y + 4, "text-anchor": "end" })];
    });
    const across = nice(this.left, this.right).map((value) => {
      const x = Math.min(this.atX(value), width - 14);
      return text(short(value), { x, y: HEIGHT - 6, "text-anchor": "middle" });
    });
    return [...up, ...across];
  }

  // The x of an event in pixels, clamped to the axes.
  placeOf({ clientX }) {
    return Math.max(LEFT, Math.min(this.width - RIGHT, clientX - this.svg.getBoundingClientRect().left));
  }
  valueAt(place) {
    return this.left + ((place - LEFT) / (this.width - LEFT - RIGHT)) * (this.right - this.left);
  }

  move(event) {
    if (!this.stops.length) return;
    const place = this.placeOf(event);
    if (this.from !== null && Math.abs(place - this.from) >= SMALLEST) return this.select(place);
    this.show(this.stops[nearest(this.stops, this.valueAt(place))]);
  }

  key(event) {
    if (event.target !== this.figure || !this.stops.length) return;
    const by = { ArrowLeft: -1, ArrowRight: 1, PageUp: -20, PageDown: 20 }[event.key];
    const middle = this.shown ?? (this.left + this.right) / 2;
    const reach = (this.right - this.left) / 4;
    if (by) {
      const at = this.shown === null ? (by > 0 ? -1 : this.stops.length) : nearest(this.stops, this.shown);
      this.show(this.stops[Math.max(0, Math.min(this.stops.length - 1, at + by))]);
    } else if (event.key === "+" || event.key === "=") this.zoom([middle - reach, middle + reach]);
    else if (event.key === "-" || event.key === "Escape") this.zoom(null);
    else return;
    event.preventDefault();
  }

  // Shows the values of all lines nearest to one place.
  show(stop) {
    this.shown = stop;
    const rows = [];
    const at = this.atX(stop);
    const marks = [drawn("line", { x1: at, x2: at, y1: TOP, y2: HEIGHT - BOTTOM, class: "ruler" })];
    for (const { x, y, sx, sy, label, look } of this.lines) {
      if (stop < x[0] || stop > x.at(-1)) continue;
      const measured = y[nearest(x, stop)];
      const bold = sx.length ? sy[nearest(sx, stop)] : measured;
      marks.push(drawn("circle", { cx: at, cy: this.atY(bold), r: 2.8, class: look }));
      const row = make("div.row", {}, make(`i.${look.split(" ")[0]}`), make("span", {}, label), make("b", {}, short(bold)));
      if (sx.length) row.append(make("small", {}, short(measured)));
      rows.push(row);
    }
    this.over.replaceChildren(...marks);
    this.tip.replaceChildren(make("div.at", {}, long(stop)), ...rows);
    this.tip.hidden = false;
    const width = this.tip.offsetWidth;
    const home = this.svg.getBoundingClientRect().left - this.figure.getBoundingClientRect().left;
    this.tip.style.left = `${Math.max(4, at + 12 + width < this.width ? home + at + 12 : home + at - 12 - width)}px`;
  }

  hide() {
    this.shown = null;
    this.over?.replaceChildren();
    this.tip.hidden = true;
  }

  select(place) {
    this.hide();
    const [low, high] = [Math.min(place, this.from), Math.max(place, this.from)];
    const box = { x: low, width: high - low, y: TOP, height: HEIGHT - TOP - BOTTOM, class: "chosen" };
    this.over.replaceChildren(drawn("rect", box));
  }

  drop(place) {
    const from = this.from;
    this.from = null;
    if (from === null || Math.abs(place - from) < SMALLEST) return;
    this.hide();
    this.zoom([this.valueAt(Math.min(place, from)), this.valueAt(Math.max(place, from))]);
  }
}

// The index of the entry in a sorted list that is nearest to a value.
function nearest(sorted, value) {
  let [low, high] = [0, sorted.length - 1];
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < value) low = middle;
    else high = middle;
  }
  return value - sorted[low] <= sorted[high] - value ? low : high;
}

// At most six round values in a stretch.
function nice(low, high) {
  const raw = (high - low) / 4;
  const unit = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((times) => times * unit).find((size) => size >= raw);
  const first = Math.ceil(low / step);
  return Array.from({ length: Math.max(0, Math.floor(high / step) - first + 1) }, (_, i) => (first + i) * step);
}

// Powers of ten between two exponents; both ends if there are fewer than two.
function powers(low, high) {
  const whole = Array.from({ length: Math.max(0, Math.floor(high) - Math.ceil(low) + 1) }, (_, i) => Math.ceil(low) + i);
  return (whole.length > 1 ? whole : [low, (low + high) / 2, high]).map((exponent) => 10 ** exponent);
}

// 1234567 -> "1.23M", as on the axes.
export function short(value) {
  const size = Number(Math.abs(value).toPrecision(3));
  const [suffix, unit] = sizes(language).find(([, unit]) => size >= unit) ?? ["", 1];
  if (size !== 0 && size < 0.001) return value.toExponential(1);
  return `${Number((value / unit).toPrecision(3))}${suffix}`;
}

const long = (value) => (Math.abs(value) < 1e6 ? String(Math.round(value * 100) / 100) : short(value));

export function drawn(tag, attributes) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}
