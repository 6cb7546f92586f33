// Expert load of one layer: experts down, time across, one map for each run.

import { make } from "./dom.js";

const COLOURS = [[42, 111, 176], [185, 186, 182], [212, 100, 28]]; // idle, an even share, twice its share and more

export class HeatMap {
  constructor({ label }) {
    this.boxes = make("div.boxes");
    this.figure = make("figure.chart", {}, make("figcaption", {}, make("span.title", {}, label)), this.boxes);
  }

  // maps: [{ steps, shares, label }], shares in hundredths of an even share, by time and expert.
  update(maps) {
    this.boxes.replaceChildren(...maps.map((map) => this.drawn(map)));
  }

  drawn({ steps, shares, label }) {
    const [width, height] = [shares.length, shares[0].length];
    const last = shares.at(-1);
    const [most, least] = [Math.max(...last), Math.min(...last)];
    const times = (share) => `${(share / 100).toFixed(2)}×`;
    const end =
      most === least
        ? "all have an even share"
        : `expert ${last.indexOf(most)} has ${times(most)} its share, expert ${last.indexOf(least)} ${times(least)}`;
    const words = `${label ? `${label} · ` : ""}${height} experts, steps ${steps[0]} to ${steps.at(-1)}. At the end ${end}.`;
    const canvas = make("canvas.heat", { width, height, role: "img", "aria-label": words });
    const context = canvas.getContext("2d");
    const image = context.createImageData(width, height);
    shares.forEach((column, x) =>
      column.forEach((share, y) => image.data.set([...colour(share / 100), 255], 4 * (y * width + x))),
    );
    context.putImageData(image, 0, 0);
    const told = make("p.unit", {}, words);
    canvas.addEventListener("pointermove", (event) => {
      const box = canvas.getBoundingClientRect();
      const x = Math.max(0, Math.min(width - 1, Math.floor(((event.clientX - box.left) / box.width) * width)));
      const y = Math.max(0, Math.min(height - 1, Math.floor(((event.clientY - box.top) / box.height) * height)));
      told.textContent = `step ${steps[x]}, expert ${y}: ${times(shares[x][y])} its share`;
    });
    canvas.addEventListener("pointerleave", () => (told.textContent = words));
    return make("div", {}, canvas, told);
  }
}

function colour(share) {
  const place = Math.min(2, share);
  const [from, to] = place < 1 ? [COLOURS[0], COLOURS[1]] : [COLOURS[1], COLOURS[2]];
  const between = place < 1 ? place : place - 1;
  return from.map((value, i) => Math.round(value + (to[i] - value) * between));
}
