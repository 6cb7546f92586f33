// The details of each token: its probability as a shade, and on hover or focus a card with the alternatives that the
// model considered and the experts that it used.
//
// Painted tokens carry `data-token`, the number of their piece; `Card.watch` ties a box to the pieces painted into it.

import { make, number } from "./dom.js";
import { t } from "./words.js";

const SHADES = [0.1, 0.25, 0.5, 0.8, 0.95]; // a token below the first is shaded most, one above the last not at all
const WIDTH = 240; // pixels of the expert grid
const LABELLED = 12; // rows up to which each gets a label

// The pieces in the form that paint() takes. Tags without text are shown.
export const looks = (pieces) =>
  pieces.map(({ text, of }) => ({
    text,
    tag: text ? "" : of.map(({ t }) => (t.startsWith("<") ? t : "")).join(""),
    look: of.length ? shade(of) : "unknown",
  }));

const shade = (of) => {
  const p = Math.exp(Math.min(...of.map((token) => token.p)));
  const place = SHADES.findIndex((bound) => p < bound);
  return `shade${place < 0 ? SHADES.length : place}`;
};

export class Card {
  // told(words): announces words to users who cannot see the card.
  constructor(box, told) {
    Object.assign(this, { box, told, boxes: new WeakMap(), at: null });
    document.addEventListener("pointerover", ({ target }) => {
      const token = target.closest?.(".token");
      if (token) this.show(token);
      else if (!box.contains(target)) this.hide();
    });
    document.addEventListener("scroll", () => this.hide(), { capture: true, passive: true });
    document.addEventListener(
      "focusin",
      ({ target }) => this.boxes.has(target) && target.matches(":focus-visible") && this.step(target, 0),
    );
    document.addEventListener("focusout", ({ target }) => this.boxes.has(target) && this.hide());
    document.addEventListener("keydown", (event) => {
      const by = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10 }[event.key];
      if (!by || !this.boxes.has(event.target)) return;
      event.preventDefault();
      this.step(event.target, by);
    });
  }

  // Call it when `box` was painted with `pieces` (null: with plain text) of an answer by `model`.
  watch(box, pieces, model) {
    if (pieces) {
      this.boxes.set(box, { pieces, model });
      box.tabIndex = 0;
      box.setAttribute("aria-describedby", this.box.id);
    } else if (this.boxes.delete(box)) {
      box.removeAttribute("tabindex");
      box.removeAttribute("aria-describedby");
    }
  }

  // Moves by `by` tokens from the one last shown in this box.
  step(box, by) {
    const all = [...box.querySelectorAll(".token")];
    if (!all.length) return;
    const from = this.at && box.contains(this.at) ? all.indexOf(this.at) : 0;
    const token = all[Math.max(0, Math.min(all.length - 1, from + by))];
    token.scrollIntoView({ block: "nearest" });
    // after the scroll event, which hides the card
    requestAnimationFrame(() => {
      this.show(token);
      this.told(this.box.dataset.said ?? "");
    });
  }

  show(token) {
    const home = [...ancestors(token)].map((box) => this.boxes.get(box)).find(Boolean);
    const piece = home?.pieces[token.dataset.token];
    if (!piece?.of.length) return this.hide();
    this.at?.classList.remove("here");
    this.at = token;
    token.classList.add("here");
    this.box.replaceChildren(...piece.of.flatMap((one) => sides(one, home.model)));
    this.box.dataset.said = piece.of.map(({ t, p }) => `${visible(t)}, ${percent(p)}`).join("; ");
    this.box.hidden = false;
    this.place(token.getClientRects()[0] ?? token.getBoundingClientRect());
  }

  place(rect) {
    const { offsetWidth: width, offsetHeight: height } = this.box;
    const gap = 8;
    const above = rect.top - gap - height;
    const below = rect.bottom + gap;
    const top =
      below + height <= innerHeight - gap || above < gap ? Math.min(below, innerHeight - height - gap) : above;
    this.box.style.left = `${Math.max(gap, Math.min(rect.left - 16, innerWidth - width - gap))}px`;
    this.box.style.top = `${Math.max(gap, top)}px`;
  }

  hide() {
    if (this.box.hidden) return;
    this.box.hidden = true;
    this.at?.classList.remove("here");
  }
}

function* ancestors(element) {
  for (let at = element; at; at = at.parentElement) yield at;
}

function sides({ t, p, top, experts }, model) {
  const among = top.some(([text]) => text === t);
  const shown = among ? top : [...top, [t, p]];
  const rows = shown.map(([text, logp]) => {
    const bar = make("i.bar");
    bar.style.width = `${Math.max(1, Math.exp(logp) * 100)}%`;
    return make(
      `li${text === t ? ".taken" : ""}`,
      {},
      make("code", {}, visible(text)),
      make("span.track", {}, bar),
      make("b", {}, percent(logp)),
    );
  });
  const head = make("p.head", {}, make("code", {}, visible(t)), make("b", {}, percent(p)));
  return [head, make("ol.others", {}, ...rows), ...(experts?.length ? grid(experts, model) : [])];
}

// One row of cells per sparse layer, the chosen experts filled.
function grid(experts, model) {
  const count = Math.max(model?.experts ?? 0, ...experts.flat().map((e) => e + 1));
  const rows = experts.length;
  const first = model?.layers ? model.layers - model.sparse_layers + 1 : 1;
  const labelled = rows <= LABELLED;
  const left = labelled ? 26 : 0;
  const cell = (WIDTH - left) / count;
  const pitch = Math.max(3, Math.min(cell, 14));
  const gap = cell > 4 ? 1.5 : 0;
  const shape = (x, y, w, h) => `M${x} ${y}h${w}v${h}h${-w}z`;
  const y = (row) => row * (pitch + 1);
  const tall = Math.max(pitch - gap, 2);
  const all = experts.map((_, row) =>
    gap
      ? Array.from({ length: count }, (_, e) => shape(left + e * cell, y(row), cell - gap, tall)).join("")
      : shape(left, y(row), WIDTH - left, tall),
  );
  const taken = experts.flatMap((chosen, row) =>
    chosen.map((e) => shape(left + e * cell, y(row), Math.max(cell - gap, 2), tall)),
  );
  const label = experts.map((chosen, row) => t("layer {n}: {experts}", { n: first + row, experts: chosen.join(", ") })).join("; ");
  const svg = draw(
    "svg",
    {
      viewBox: `0 0 ${WIDTH} ${y(rows)}`,
      width: WIDTH,
      height: y(rows),
      role: "img",
      "aria-label": t("Experts in {layers}", { layers: label }),
    },
    draw("path", { class: "cells", d: all.join("") }),
    draw("path", { class: "chosen", d: taken.join("") }),
  );
  for (let row = 0; labelled && row < rows; row += 1) {
    const text = draw("text", { x: left - 8, y: y(row) + tall / 2 });
    text.textContent = first + row;
    svg.append(text);
  }
  const words = rows > 1 ? "{k} of {n} experts, layers {first} to {last}" : "{k} of {n} experts, layer {first}";
  return [make("p.unit", {}, t(words, { k: experts[0].length, n: count, first, last: first + rows - 1 })), svg];
}

function draw(name, attributes, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

const percent = (logp) => {
  const p = Math.exp(logp) * 100;
  return t("{n} %", { n: p >= 99.95 ? "100" : p < 0.1 ? "< 0.1" : number(p, 1) });
};

// Makes white space visible.
export const visible = (text) =>
  text.startsWith("bytes:")
    ? text.slice(6)
    : text
        .replaceAll("\n", "↵")
        .replaceAll("\t", "⇥")
        .replace(/^ +| +$/g, (blanks) => "␣".repeat(blanks.length)) || t("(nothing)");
