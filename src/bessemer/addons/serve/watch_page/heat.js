// Expert load of one layer: experts on the vertical axis, time on the horizontal, one map per run.

import { make } from "./dom.js";
import { t, told } from "./words.js";

const COLOURS = [[42, 111, 176], [185, 186, 182], [212, 100, 28]]; // idle, an even share, twice an even share or more

export class HeatMap {
  constructor({ label }) {
    this.boxes = make("div.boxes");
    this.figure = make("figure.chart", {}, make("figcaption", {}, make("span.title", {}, told(label))), this.boxes);
  }

  // maps: [{ steps, shares, label }]; shares in hundredths of an even share, by time and expert.
  update(maps) {
    this.boxes.replaceChildren(...maps.map((map) => this.drawn(map)));
  }

  drawn({ steps, shares, label }) {
    const [width, height] = [shares.length, shares[0].length];
    const last = shares.at(-1);
    const [most, least] = [Math.max(...last), Math.min(...last)];
    const times = (share) => (share / 100).toFixed(2);
    const end =
      most === least
        ? t("all have an equal share")
        : t("expert {a} has {most}× its share, expert {b} {least}×", {
            a: last.indexOf(most), most: times(most), b: last.indexOf(least), least: times(least),
          });
    const said = { n: height, first: steps[0], last: steps.at(-1), end };
    const words = `${label ? `${label} · ` : ""}${t("{n} experts, steps {first} to {last}. At the end {end}.", said)}`;
    const canvas = make("canvas.heat", { width, height, role: "img", "aria-label": words });
    const context = canvas.getContext("2d");
    const image = context.createImageData(width, height);
    shares.forEach((column, x) =>
      column.forEach((share, y) => image.data.set([...colour(share / 100), 255], 4 * (y * width + x))),
    );
    context.putImageData(image, 0, 0);
    const note = make("p.unit", {}, words);
    canvas.addEventListener("pointermove", (event) => {
      const box = canvas.getBoundingClientRect();
      const x = Math.max(0, Math.min(width - 1, Math.floor(((event.clientX - box.left) / box.width) * width)));
      const y = Math.max(0, Math.min(height - 1, Math.floor(((event.clientY - box.top) / box.height) * height)));
      const place = { step: steps[x], expert: y, times: times(shares[x][y]) };
      note.textContent = t("step {step}, expert {expert}: {times}× its share", place);
    });
    canvas.addEventListener("pointerleave", () => (note.textContent = words));
    return make("div", {}, canvas, note);
  }
}

function colour(share) {
  const place = Math.min(2, share);
  const [from, to] = place < 1 ? [COLOURS[0], COLOURS[1]] : [COLOURS[1], COLOURS[2]];
  const between = place < 1 ? place : place - 1;
  return from.map((value, i) => Math.round(value + (to[i] - value) * between));
}
