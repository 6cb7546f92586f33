// The empty page: questions of the kinds that the stages of a run are trained on.

import { find, make } from "./dom.js";
import { about } from "./picker.js";

const EXAMPLES = [
  ["Countdown", ["Use 2, 5, 3 to make 30.", "Get 2 from 3, 10, 9.", "Make 16 from 4, 1, 5."]],
  ["算式", ["用3、5、2算出5。", "用5、2、3算出11。", "计算10*4+18-14。"]],
  ["Arithmetic", ["What is 17+17+13+10?", "Compute 9*4-18+19.", "Compute 7*2+10*4-3*10."]],
  ["Plain words", ["Write 14 and 24 in words.", "Say thanks to Wendy for the bag.", "用莉莉和书包造句。"]],
];

// ask(question): a question was chosen. Returns a function that shows which models would answer.
export function showExamples(ask) {
  const answering = make("dl.answering");
  const groups = EXAMPLES.map(([name, questions]) =>
    make(
      "div.group",
      {},
      make("h3", {}, name),
      ...questions.map((question) =>
        make("button.example", { type: "button", onclick: () => ask(question) }, question),
      ),
    ),
  );
  find("start").append(
    make("h2", {}, "Ask any stage of the run"),
    make(
      "p.lead",
      {},
      "Every stage is a model of its own. Put up to four side by side and watch what training changed.",
    ),
    make("div.groups", {}, ...groups),
    answering,
  );
  return (models) =>
    answering.replaceChildren(
      ...models.map((model) => make("div", {}, make("dt", {}, model.id), make("dd", {}, about(model)))),
    );
}
