// The models as chips, in the order of the run's stages: one answers, or up to four side by side.

import { find, make, number } from "./dom.js";
import { MOST } from "./state.js";
import { sizes } from "./speech.js";
import { language, t } from "./words.js";

// What the stages of DeepSeek-R1's pipeline are, for the chip's title; other stages show only their name.
const STAGES = {
  base: "pre-trained only",
  zero: "R1-Zero: reinforcement learning from the base, no examples of thinking",
  r1: "R1, the final model",
  dev1: "R1 Dev1: fine-tuned on the cold start",
  dev2: "R1 Dev2: reinforcement learning on reasoning",
  dev3: "R1 Dev3: fine-tuned on chosen answers of Dev2",
  distilled: "a smaller model that learnt from R1's answers",
};
const MILESTONES = ["base", "zero", "r1", "distilled"];

export class Picker {
  // chosen(picked, side): called when the user's choice changes.
  constructor(settings, chosen) {
    Object.assign(this, { settings, chosen, models: [], box: find("models") });
    this.box.addEventListener("keydown", (event) => this.move(event));
  }

  // Draws the chips, at first and whenever the server is found again. Drops picks that it no longer has.
  show(models) {
    this.models = models;
    const known = models.map(({ id }) => id);
    const fallback = models.find((model) => model.default) ?? models.at(-1);
    this.settings.picked = this.settings.picked
      .filter((id) => known.includes(id))
      .slice(0, this.settings.side ? MOST : 1);
    if (!this.settings.picked.length) this.settings.picked = [fallback.id];
    this.draw();
    this.box.querySelector("[aria-pressed=true]").scrollIntoView({ block: "nearest", inline: "center" });
  }

  draw() {
    const { picked, side } = this.settings;
    const full = side && picked.length >= MOST;
    const left = this.box.firstElementChild?.scrollLeft ?? 0;
    const focused = document.activeElement?.dataset?.pick;
    const chips = this.models.map((model) => {
      const place = picked.indexOf(model.id);
      const on = place >= 0;
      const chip = make(
        `button.chip${on && side ? `.c${place + 1}` : ""}`,
        {
          type: "button",
          "data-pick": model.id,
          "aria-pressed": String(on),
          title: about(model),
          disabled: full && !on,
          onclick: (event) => this.pick(model.id, event.shiftKey || event.ctrlKey || event.metaKey),
        },
        model.id,
      );
      return make("li", {}, chip);
    });
    const milestones = MILESTONES.filter((id) => this.models.some((model) => model.id === id));
    const both = make(
      "label.switch",
      { title: t("Let up to {n} models answer the same question", { n: MOST }) },
      make("input", {
        type: "checkbox",
        role: "switch",
        checked: side,
        "data-pick": "*side",
        onchange: ({ target }) => this.aside(target.checked),
      }),
      make("span", {}, t("Side by side")),
    );
    const whole =
      side && milestones.length > 1 && milestones.join() !== picked.join()
        ? make(
            "button.quiet",
            {
              type: "button",
              "data-pick": "*way",
              title: t("The models on the way to DeepSeek-R1"),
              onclick: () => this.take(milestones, true),
            },
            milestones.join(" · "),
          )
        : null;
    this.box.replaceChildren(
      make("ol.chips", {}, ...chips),
      ...(this.models.length > 1 ? [whole, both].filter(Boolean) : []),
    );
    this.box.firstElementChild.scrollLeft = left;
    if (focused) this.box.querySelector(`[data-pick="${CSS.escape(focused)}"]`)?.focus();
  }

  // A click picks this model; side by side, it adds or removes it. Shift or Ctrl means side by side.
  pick(id, adding) {
    const { picked, side } = this.settings;
    if (!side && !adding) return this.take([id], false);
    if (!picked.includes(id)) return picked.length < MOST && this.take([...picked, id], true);
    const others = picked.filter((other) => other !== id);
    if (others.length) this.take(others, true);
  }

  aside(on) {
    this.take(on ? this.settings.picked : this.settings.picked.slice(0, 1), on);
  }

  take(picked, side) {
    Object.assign(this.settings, { picked, side });
    this.draw();
    this.chosen();
  }

  move(event) {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    const chips = [...this.box.querySelectorAll(".chip:enabled")];
    const at = chips.indexOf(document.activeElement);
    if (!by || at < 0) return;
    event.preventDefault();
    chips[(at + by + chips.length) % chips.length].focus();
  }
}

export function about(model) {
  const { parameters, active_parameters: active, mtp_parameters: mtp, sparse_layers: layers } = model;
  const words = [t(STAGES[model.stage] ?? STAGES[model.id] ?? "")];
  if (parameters) {
    const some = active && active !== parameters;
    const named = { n: short(parameters), active: some ? short(active) : "" };
    words.push(t(some ? "{n} parameters, {active} active per token" : "{n} parameters", named));
    if (mtp) words.push(t("{n} more in MTP modules", { n: short(mtp) }));
  }
  if (layers) {
    const named = { k: model.experts_per_token, n: model.experts, layers };
    words.push(t("{k} of {n} experts in each of {layers} layers", named));
  }
  if (model.context) words.push(t("context of {n} tokens", { n: number(model.context) }));
  return words.filter(Boolean).join(" · ");
}

const short = (n) => {
  const [name, size] = sizes(language).find(([, size]) => n >= size) ?? ["", 1];
  return `${number(n / size, size <= 1e3 || n >= 1e3 * size ? 0 : 1)} ${name.trim()}`.trim();
};
