// The empty page: what the picked models can do, and held-out problems from the tasks they were trained on. The task's
// verifier checks the answer to such a problem.

import { problems, verdict } from "./api.js";
import { find, make, number } from "./dom.js";
import { about } from "./picker.js";
import { t } from "./words.js";

const GROUPS = 4;
const TASKS = {
  countdown: "Countdown",
  arithmetic: "Arithmetic",
  general: "Plain words",
  words: "Word problems",
  logic: "Logic",
};
const LANGUAGES = { en: "English", zh: "Chinese" };

export class Examples {
  // ask(question): called when a question is chosen.
  constructor(ask) {
    this.ask = ask;
    this.found = new Map(); // model -> its problems
    this.groups = make("div.groups");
    this.lead = make("p.lead");
    this.answering = make("dl.answering");
    this.title = make("h2");
    find("start").append(this.title, this.lead, this.groups, this.answering);
  }

  // The models that would answer.
  show(models, of) {
    this.models = models;
    this.title.textContent = t(of > 1 ? "Ask any stage of the run" : "Ask the model");
    this.answering.replaceChildren(
      ...models.map((model) => make("div", {}, make("dt", {}, model.id), make("dd", {}, abilities(model)))),
    );
    this.draw();
    for (const model of models) if (!this.found.has(model.id)) this.load(model);
  }

  async load(model) {
    this.found.set(model.id, []);
    if (!model.practice?.skills?.length) return;
    try {
      this.found.set(model.id, await problems(model.id));
    } catch {
      this.found.delete(model.id); // requested again at the next draw
    }
    this.draw();
  }

  draw() {
    const groups = new Map();
    for (const model of this.models) {
      for (const problem of this.found.get(model.id) ?? []) {
        const name = `${problem.task} ${problem.language}`;
        if (!groups.has(name) && groups.size === GROUPS) continue;
        const group = groups.get(name) ?? { ...problem, problems: new Map() };
        groups.set(name, group);
        group.problems.set(problem.number, problem);
      }
    }
    const known = this.models.some((model) => model.practice?.skills?.length);
    this.lead.textContent = [
      this.models.length && this.title.textContent === t("Ask any stage of the run")
        ? t("Every stage is a model of its own. Put up to four side by side and watch what training changed.")
        : "",
      groups.size ? t("The examples are held-out problems, never trained on; every answer to them is checked.") : "",
      known ? "" : t("There is no record of what these models were trained on."),
    ].join(" ");
    this.groups.replaceChildren(
      ...[...groups.values()].map((group) =>
        make(
          "div.group",
          {},
          make("h3", {}, taskName(group.task, group.language)),
          ...[...group.problems.values()].map(({ prompt }) =>
            make("button.example", { type: "button", dir: "auto", onclick: () => this.ask(prompt) }, prompt),
          ),
        ),
      ),
    );
  }

  // The problem behind a question, if it is one of the examples.
  problemOf(question) {
    for (const known of this.found.values()) {
      const problem = known.find(({ prompt }) => prompt === question);
      if (problem) return { task: problem.task, language: problem.language, number: problem.number };
    }
    return null;
  }
}

export const taskName = (task, language) =>
  `${t(TASKS[task] ?? task)}${language ? ` · ${t(LANGUAGES[language] ?? language)}` : ""}`;

// Whether an answer is right: { correct, reason }, or null if nobody can tell.
export async function judge(answer, problem) {
  try {
    const thought = answer.thought ? `<think>${answer.thought}</think>` : "";
    const { correct, reason } = await verdict(answer.model, problem, thought + answer.text);
    return { correct: correct === true, reason: String(reason) };
  } catch {
    return null;
  }
}

// What a model is and can do, in a sentence.
function abilities(model) {
  const { skills = [], trained_length: longest = null, multi_turn: several = null } = model.practice ?? {};
  const told = (practised) =>
    skills
      .filter((skill) => skill.practised === practised)
      .map(({ task, solved }) => {
        const shares = Object.entries(solved ?? {}).map(
          ([language, share]) => `${t(LANGUAGES[language] ?? language)} ${t("{n} %", { n: number(100 * share) })}`,
        );
        const named = { task: taskName(task), shares: shares.join(t(", ")) };
        return shares.length ? t("{task} (solves {shares} of held-out problems)", named) : named.task;
      })
      .join(t(", "));
  const words = [about(model)];
  if (told(true)) words.push(t("practised: {tasks}", { tasks: told(true) }));
  if (told(false)) words.push(t("read about: {tasks}", { tasks: told(false) }));
  if (longest) {
    words.push(
      t("trained on texts of up to {n} tokens: answers end there unless you set another maximum", { n: number(longest) }),
    );
  }
  if (several === false) words.push(t("trained on single questions: reads each alone unless you set otherwise"));
  return words.join(" · ");
}
