// The settings panel. An empty field leaves the choice to the server; the placeholder shows that choice.

import { find, make } from "./dom.js";
import { DEFAULTS, LIMITS, setting } from "./state.js";
import { t } from "./words.js";

// name, label, the field's step, what it does
const NUMBERS = [
  ["temperature", "Temperature", 0.05, "0 always takes the likeliest token; higher is more varied"],
  ["top_p", "Top-p", 0.01, "samples from the likeliest tokens that together have this probability"],
  ["top_k", "Top-k", 1, "samples from this many of the likeliest tokens; 0: from all"],
  ["min_p", "Min-p", 0.01, "samples from tokens with at least this share of the likeliest one's probability"],
  ["repetition_penalty", "Repetition penalty", 0.05, "above 1, tokens that have already occurred become less likely"],
  ["max_tokens", "Maximum tokens", 1, "the longest answer, thought included"],
  ["seed", "Seed", 1, "empty: a new one for every answer. The same seed and question give the same answer"],
];
const CHOICES = [
  [
    "thinking",
    "Thinking",
    "whether the models think before they answer",
    [
      ["own", "the model decides"],
      ["always", "always"],
      ["never", "never"],
    ],
  ],
  [
    "thoughts",
    "Thoughts",
    "open at first: a thought folds when its answer begins",
    [
      ["auto", "open at first"],
      ["open", "open"],
      ["folded", "folded"],
    ],
  ],
  [
    "reads",
    "Models read",
    "auto: models that were trained on single questions read the question alone, others the conversation",
    [
      ["auto", "auto"],
      ["talk", "the conversation"],
      ["alone", "the question alone"],
    ],
  ],
  [
    "theme",
    "Theme",
    "light or dark; auto: as the system has it",
    [
      ["auto", "auto"],
      ["light", "light"],
      ["dark", "dark"],
    ],
  ],
  [
    "language",
    "Language",
    "of the page; models answer in the language of the question",
    [
      ["auto", "auto"],
      ["en", "English"],
      ["zh", "中文"],
    ],
  ],
];
const BUDGET = [
  "thinking_budget",
  "Thinking budget",
  1,
  "the answer begins after this many tokens of thought; empty: no limit",
];
const NEUTRAL = { temperature: 1, top_p: 1, top_k: 0, min_p: 0, repetition_penalty: 1 };

export class Settings {
  // changed(): called when a setting changes; forget(): the user wants to delete everything stored here.
  constructor(settings, changed, forget) {
    Object.assign(this, { settings, changed, panel: find("settings"), opener: find("tune"), fields: {} });
    const system = make("textarea", {
      rows: 3,
      placeholder: t("none"),
      spellcheck: "false",
      oninput: () => this.set("system", system.value),
    });
    this.fields.system = system;
    const [thinking, ...others] = CHOICES.map((choice) => this.choice(...choice));
    this.budget = this.number(...BUDGET);
    this.thinking = make("div", {}, thinking, this.budget);
    this.panel.append(
      make(
        "div.head",
        {},
        make("h2", {}, t("Settings")),
        make("button.quiet", { type: "button", onclick: () => this.open(false) }, t("Close")),
      ),
      make("label.tall", {}, make("span", {}, t("System prompt")), system),
      ...NUMBERS.map((row) => this.number(...row)),
      this.thinking,
      ...others,
      make(
        "div.choices",
        {},
        make("button.quiet", { type: "button", onclick: () => this.reset() }, t("Reset to the defaults")),
        make(
          "button.quiet",
          { type: "button", title: t("The conversations, the settings and the key"), onclick: forget },
          t("Delete everything stored here"),
        ),
      ),
      make("p.unit", {}, t("The conversations and settings are stored in this browser only.")),
    );
    this.opener.addEventListener("click", () => this.open(this.panel.hidden));
    this.panel.addEventListener("keydown", (event) => {
      if (event.key !== "Escape") return;
      event.stopPropagation();
      this.open(false);
    });
    this.show();
  }

  open(on) {
    this.panel.hidden = !on;
    this.opener.setAttribute("aria-expanded", String(on));
    (on ? this.fields.system : this.opener).focus();
  }

  number(name, label, step, title) {
    const [min, max] = LIMITS[name];
    const field = make("input", {
      type: "number",
      step,
      min,
      max,
      inputmode: "decimal",
      name,
      oninput: () =>
        this.set(
          name,
          field.validity.valid || field.validity.stepMismatch ? setting(name, field.value) : this.settings[name],
        ),
      onchange: () => this.show(),
    });
    this.fields[name] = field;
    return make("label", { title: t(title) }, make("span", {}, t(label)), field);
  }

  choice(name, label, title, options) {
    const field = make(
      "select",
      { name, onchange: () => this.set(name, field.value) },
      ...options.map(([value, words]) => make("option", { value }, t(words))),
    );
    this.fields[name] = field;
    return make("label", { title: t(title) }, make("span", {}, t(label)), field);
  }

  set(name, value) {
    this.settings[name] = value;
    this.changed(name);
  }

  reset() {
    for (const name of Object.keys(this.fields)) this.settings[name] = DEFAULTS[name];
    this.show();
    this.changed();
  }

  // Fills the fields from the settings.
  show() {
    for (const [name, field] of Object.entries(this.fields)) field.value = this.settings[name] ?? "";
  }

  // The models that would answer now; the empty fields show their own sampling.
  suit(models) {
    for (const [name, field] of Object.entries(this.fields)) {
      if (!(name in LIMITS)) continue;
      const own = models.map((model) => model.sampling?.[name] ?? NEUTRAL[name]);
      const rooms = models.map((model) => model.practice?.trained_length ?? model.context).filter(Boolean);
      if (name === "max_tokens")
        field.placeholder = rooms.length ? t("up to {n}", { n: Math.max(...rooms) }) : t("as many as fit");
      else if (name === "seed") field.placeholder = t("new each time");
      else if (name === "thinking_budget") field.placeholder = t("no limit");
      else field.placeholder = new Set(own).size === 1 ? String(own[0]) : t("each model's default");
    }
    this.thinking.hidden = !models.some((model) => model.thinks);
  }
}
