// Makes each chart of curves answer: its values under the pointer (or the arrow keys), and a closer look at a stretch
// that is dragged over; a double click takes it back. Only the drawing is read: `data-axes` says what a place means.
const SMALLEST = 8; // a drag over fewer units is a click

class Plot {
  constructor(svg) {
    const { x, y, log, named } = JSON.parse(svg.dataset.axes);
    Object.assign(this, { svg, x, y, log, named, figure: svg.closest("figure"), shown: null, from: null });
    const labels = [...this.figure.querySelectorAll(".legend b")].map((label) => label.textContent);
    this.lines = [];
    for (const group of svg.querySelectorAll("[data-line]")) {
      const path = group.querySelector(":scope > path");
      if (!path) continue;
      const [place, raw] = group.dataset.line.split(" ");
      const line = (this.lines[place] ??= { label: labels[place] ?? "", colour: path.style.stroke });
      line[raw ? "raw" : "bold"] = { path, d: path.getAttribute("d"), points: pointsOf(path.getAttribute("d")) };
    }
    this.lines = this.lines.filter((line) => line?.bold?.points.length);
    if (!this.lines.length) return;
    const stops = new Set(this.lines.flatMap(({ bold }) => bold.points.map((point) => point.x)));
    this.stops = [...stops].sort((a, b) => a - b);
    this.ticks = [...svg.querySelectorAll('[id^="xtick_"], [id^="ytick_"]')];
    this.names = [...svg.querySelectorAll('[id^="xtick_"] text')].map((text) => text.textContent);
    this.build();
  }

  build() {
    const { svg, figure } = this;
    this.over = drawn("g", { class: "over" });
    this.axes = drawn("g", { class: "zoomed" });
    svg.append(this.axes, this.over);
    this.tip = made("div", "tip");
    this.tip.setAttribute("role", "status");
    this.tip.hidden = true;
    this.whole = made("button", "whole", t("show all"));
    this.whole.hidden = true;
    this.whole.addEventListener("click", () => this.zoom(null));
    figure.append(this.tip, this.whole);
    figure.tabIndex = 0;
    svg.addEventListener("pointermove", (event) => this.move(event));
    svg.addEventListener("pointerleave", () => this.from === null && this.hide());
    svg.addEventListener("pointerdown", (event) => {
      if (event.button !== 0 || this.named) return;
      this.from = this.placeOf(event);
      svg.setPointerCapture(event.pointerId);
    });
    svg.addEventListener("pointerup", (event) => this.drop(this.placeOf(event)));
    svg.addEventListener("pointercancel", () => this.drop(this.from));
    svg.addEventListener("dblclick", () => this.zoom(null));
    figure.addEventListener("keydown", (event) => this.key(event));
    figure.addEventListener("blur", () => this.hide());
  }

  // The x of an event in the units of the drawing, inside the axes.
  placeOf({ clientX }) {
    const box = this.svg.getBoundingClientRect();
    const place = ((clientX - box.left) / box.width) * this.svg.viewBox.baseVal.width;
    return Math.max(this.x[0], Math.min(this.x[1], place));
  }

  move(event) {
    const place = this.placeOf(event);
    if (this.from !== null && Math.abs(place - this.from) >= SMALLEST) return this.select(place);
    const seen = this.visible();
    const at = this.back(place);
    this.show(seen.reduce((best, stop) => (Math.abs(stop - at) < Math.abs(best - at) ? stop : best), seen[0]));
  }

  key(event) {
    if (event.target !== this.figure) return;
    const by = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10 }[event.key];
    if (event.key === "Escape") this.zoom(null);
    else if (!by) return;
    else {
      const seen = this.visible();
      const at = seen.indexOf(this.shown);
      this.show(seen[at < 0 ? (by > 0 ? 0 : seen.length - 1) : Math.max(0, Math.min(seen.length - 1, at + by))]);
    }
    event.preventDefault();
  }

  visible() {
    const seen = this.view ? this.stops.filter((x) => x >= this.view.x[0] && x <= this.view.x[1]) : this.stops;
    return seen.length ? seen : this.stops;
  }

  // The values of all lines at one place.
  show(stop) {
    this.shown = stop;
    const marks = [];
    const rows = [];
    for (const { label, colour, bold, raw } of this.lines) {
      const y = heightAt(bold.points, stop);
      if (y === null) continue;
      const dot = drawn("circle", { cx: this.forth(stop), cy: this.forthY(y), r: 2.6 });
      dot.style.fill = colour;
      marks.push(dot);
      const row = made("div", "row");
      const key = made("i", "");
      key.style.background = colour;
      row.append(key, made("span", "", label), made("b", "", short(this.valueY(y))));
      const measured = raw && heightAt(raw.points, stop);
      if (measured != null) row.append(made("small", "", short(this.valueY(measured))));
      rows.push(row);
    }
    const across = this.forth(stop);
    const ruler = drawn("line", { x1: across, x2: across, y1: this.y[0], y2: this.y[1], class: "ruler" });
    this.over.replaceChildren(ruler, ...marks);
    const x = this.valueX(stop);
    this.tip.replaceChildren(made("div", "at", this.named ? this.names[Math.round(x)] : long(x)), ...rows);
    this.tip.hidden = false;
    const box = this.svg.getBoundingClientRect();
    const home = this.figure.getBoundingClientRect();
    const px = box.left - home.left + (across / this.svg.viewBox.baseVal.width) * box.width;
    const width = this.tip.offsetWidth;
    this.tip.style.left = `${Math.max(4, px + 12 + width < home.width ? px + 12 : px - 12 - width)}px`;
    this.tip.style.top = `${box.top - home.top + 4}px`;
  }

  hide() {
    this.shown = null;
    this.over.replaceChildren();
    this.tip.hidden = true;
  }

  select(place) {
    this.tip.hidden = true;
    const [low, high] = [Math.min(place, this.from), Math.max(place, this.from)];
    const height = this.y[0] - this.y[1];
    this.over.replaceChildren(drawn("rect", { x: low, width: high - low, y: this.y[1], height, class: "chosen" }));
  }

  drop(place) {
    const from = this.from;
    this.from = null;
    if (from === null || Math.abs(place - from) < SMALLEST) return;
    this.zoom([this.back(Math.min(place, from)), this.back(Math.max(place, from))]);
  }

  // Shows the stretch between two places of the whole drawing, as high as what is in it, if that is at least two points;
  // null: all of it again.
  zoom(x) {
    this.hide();
    let view = null;
    if (x) {
      const all = this.lines.flatMap(({ bold, raw }) => (raw ?? bold).points);
      const inside = all.filter((point) => point.x >= x[0] && point.x <= x[1]);
      if (inside.length < 2) return;
      const [top, bottom] = [Math.min(...inside.map((p) => p.y)), Math.max(...inside.map((p) => p.y))];
      const margin = Math.max(0.5, (bottom - top) * 0.06);
      view = { x, y: [bottom + margin, top - margin] };
    }
    this.view = view;
    this.whole.hidden = !x;
    for (const line of this.lines) for (const part of [line.bold, line.raw]) part && this.redraw(part);
    for (const tick of this.ticks) tick.setAttribute("visibility", x ? "hidden" : "visible");
    this.axes.replaceChildren(...(x ? this.newTicks() : []));
  }

  redraw({ path, d, points }) {
    const place = ({ x, y, first }) => `${first ? "M" : "L"}${this.forth(x).toFixed(2)} ${this.forthY(y).toFixed(2)}`;
    path.setAttribute("d", this.view ? points.map(place).join("") : d);
  }

  newTicks() {
    const text = (words, attributes) => {
      const one = drawn("text", attributes);
      one.textContent = words;
      return one;
    };
    const across = nice(this.valueX(this.view.x[0]), this.valueX(this.view.x[1])).map((value) => {
      const x = this.forth(this.x[0] + ((value - this.x[2]) / (this.x[3] - this.x[2])) * (this.x[1] - this.x[0]));
      return text(short(value), { x, y: this.y[0] + 14, "text-anchor": "middle" });
    });
    const steps = [0.08, 0.36, 0.64, 0.92].map((share) => this.y[0] + share * (this.y[1] - this.y[0]));
    const up = steps.flatMap((y) => [
      drawn("line", { x1: this.x[0], x2: this.x[1], y1: y, y2: y }),
      text(short(this.valueY(this.backY(y))), { x: this.x[0] + 2, y: y - 2 }),
    ]);
    return [...up, ...across];
  }

  // Between places of the whole drawing and those where they are shown now.
  forth(x) {
    return this.view ? scale(x, this.view.x, this.x) : x;
  }
  back(x) {
    return this.view ? scale(x, this.x, this.view.x) : x;
  }
  forthY(y) {
    return this.view ? scale(y, this.view.y, this.y) : y;
  }
  backY(y) {
    return this.view ? scale(y, this.y, this.view.y) : y;
  }

  valueX(x) {
    return scale(x, this.x, this.x.slice(2));
  }
  valueY(y) {
    if (!this.log) return scale(y, this.y, this.y.slice(2));
    return 10 ** scale(y, this.y, this.y.slice(2).map(Math.log10));
  }
}

function scale(value, [a, b], [c, d]) {
  return c + ((value - a) / (b - a)) * (d - c);
}

function pointsOf(d) {
  return [...d.matchAll(/([ML])\s*(-?[\d.e+-]+)[\s,]+(-?[\d.e+-]+)/g)].map(([, letter, x, y]) => ({
    x: Number(x),
    y: Number(y),
    first: letter === "M",
  }));
}

// The height of a line between its points; null beyond its ends.
function heightAt(points, x) {
  const next = points.findIndex((point) => point.x >= x - 1e-6);
  if (next < 0) return null;
  const [a, b] = [points[Math.max(0, next - 1)], points[next]];
  if (Math.abs(b.x - x) < 1e-6) return b.y;
  return next === 0 || b.first ? null : scale(x, [a.x, b.x], [a.y, b.y]);
}

// At most six round values of a stretch.
function nice(low, high) {
  const raw = (high - low) / 4;
  const unit = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((times) => times * unit).find((size) => size >= raw);
  const values = [];
  for (let value = Math.ceil(low / step) * step; value <= high; value += step) values.push(value);
  return values;
}

// 1234567 -> "1.23M", as on the axes.
function short(value) {
  const size = Number(Math.abs(value).toPrecision(3));
  const [suffix, unit] = sizes(language).find(([, unit]) => size >= unit) ?? ["", 1];
  if (size !== 0 && size < 0.001) return value.toExponential(1);
  return `${Number((value / unit).toPrecision(3))}${suffix}`;
}

const long = (value) => (Math.abs(value) < 1e5 ? String(Math.round(value * 100) / 100) : short(value));

function made(tag, name, text = "") {
  const element = document.createElement(tag);
  element.className = name;
  element.textContent = text;
  return element;
}

function drawn(tag, attributes) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

for (const svg of document.querySelectorAll("svg[data-axes]")) new Plot(svg);

// What scrolls can be reached by the keyboard, as long as it scrolls.
const scrolling = new ResizeObserver((all) => {
  for (const { target } of all) {
    const fits = target.scrollWidth <= target.clientWidth + 1 && target.scrollHeight <= target.clientHeight + 1;
    const words = { tabindex: "0", role: "group", "aria-label": target.tagName === "PRE" ? t("text") : t("table") };
    for (const [name, value] of Object.entries(words)) {
      if (fits) target.removeAttribute(name);
      else target.setAttribute(name, value);
    }
  }
});
for (const box of document.querySelectorAll(".scroll, pre")) scrolling.observe(box);
