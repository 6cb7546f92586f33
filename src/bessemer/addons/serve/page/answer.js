// One answer on the page: its model, its thought (folded once the answer begins), its text, figures and buttons.
//
// An AnswerView is built once and then updated, so that a streamed answer never loses its selection, focus or scroll
// position.

import { find, make, number, say, seconds } from "./dom.js";
import { taskName } from "./examples.js";
import { about } from "./picker.js";
import { running } from "./state.js";
import { paint } from "./text.js";
import { looks } from "./tokens.js";
import { t } from "./words.js";

// The verifiers' names for the faults of an answer; other faults are not named.
const FAULTS = {
  "wrong-value": "another value",
  "wrong-numbers": "other numbers",
  unparsable: "no answer to read",
  "no-answer": "no answer to read",
  empty: "no answer to read",
  "in-thoughts": "the answer is in its thought",
  unclosed: "unfinished",
  unfinished: "unfinished",
  "several-answers": "several answers",
  echo: "it repeats the question",
};

export class AnswerView {
  // page: what the answer needs from the page: settings, card, modelOf(id) and the actions of its buttons.
  constructor(answer, turn, page) {
    Object.assign(this, { answer, turn, page });
    const button = (words, title, act) => make("button.quiet", { type: "button", title, onclick: act }, words);
    this.who = make("b", {}, answer.model);
    this.now = make("span.now");
    this.halt = button(t("Stop"), t("Stop this answer"), () => page.stop(answer));
    this.summary = make("summary", { onclick: () => page.open(answer, !this.thought.open) });
    this.thinking = make("div.lines", { role: "group", "aria-label": t("Thought by {model}", answer) });
    this.thought = make("details.thought", {}, this.summary, this.thinking);
    this.text = make("div.lines.text", { role: "group", "aria-label": t("Answer by {model}", answer) });
    this.trouble = make("p.trouble");
    this.verdict = make("span.verdict");
    this.figures = make("span.figures");
    this.seed = make("button.quiet.seed", {
      type: "button",
      title: t("Use this seed for the next answers too"),
      onclick: () => page.takeSeed(answer.seed),
    });
    this.copy = button(t("Copy"), t("Copy the answer"), () => this.copied());
    this.more = button(t("Continue"), t("Let it continue from here"), () => page.more(turn, answer));
    this.again = button(t("Retry"), t("Ask this model again"), () => page.retry(turn, answer));
    const acts = make("span.acts", {}, this.copy, this.more, this.again);
    this.foot = make("footer", {}, this.verdict, this.figures, this.seed, acts);
    this.root = make(
      "article.answer",
      { "aria-label": t("Answer by {model}", answer) },
      make("header", {}, make("i.dot"), this.who, this.now, this.halt),
      this.thought,
      this.text,
      this.trouble,
      this.foot,
    );
    this.update();
  }

  update() {
    const { answer, page } = this;
    const live = running(answer);
    const { figures } = answer;
    const model = page.modelOf(answer.model);
    this.who.title = model ? about(model) : "";
    this.root.classList.toggle("live", live);
    this.root.dataset.phase = answer.phase;
    this.root.setAttribute("aria-busy", live);
    say(this.now, live ? doing(answer, model) : "");
    this.halt.hidden = !live;
    this.thought.hidden = !answer.thought;
    if (answer.thought) {
      say(this.summary, thoughtWords(answer));
      const open = answer.open ?? { open: true, folded: false, auto: !answer.text }[page.settings.thoughts];
      if (this.thought.open !== open) this.thought.open = open;
      this.fill(this.thinking, "thought");
    }
    this.fill(this.text, "text");
    this.text.hidden = !answer.text;
    say(this.trouble, troubleWords(answer, model));
    this.trouble.hidden = !this.trouble.textContent;
    this.trouble.classList.toggle("mild", !answer.trouble);
    this.foot.hidden = live && !figures.rate;
    this.judged(live);
    say(this.figures, figureWords(answer));
    say(this.seed, answer.seed === null ? "" : t("seed {n}", { n: answer.seed }));
    this.seed.hidden = live || answer.seed === null || !figures.tokens;
    this.copy.hidden = live || !(answer.text || answer.thought);
    this.more.hidden = live || !(answer.text || answer.thought) || answer.finish === "stop" || full(answer, model);
    this.again.hidden = live;
  }

  fill(box, part) {
    const { answer, page } = this;
    const shown = page.settings.details ? answer.pieces[part] : null;
    const usable = shown?.length ? shown : null; // an old answer may have lost them
    const low = box.scrollHeight - box.scrollTop - box.clientHeight < 24;
    paint(box, answer[part], usable && looks(usable), part === "text");
    page.card.watch(box, usable, page.modelOf(answer.model));
    if (low && running(answer)) box.scrollTop = box.scrollHeight;
  }

  async copied() {
    const done = await copyText(this.answer.text || this.answer.thought);
    say(this.copy, t(done ? "Copied" : "Not allowed"));
    setTimeout(() => say(this.copy, t("Copy")), 1500);
  }

  // The verifier's verdict, if the question was a known problem.
  judged(live) {
    const { verdict } = this.answer;
    this.verdict.hidden = live || !verdict;
    if (!verdict) return;
    const why = t(FAULTS[verdict.reason] ?? "");
    say(this.verdict, verdict.correct ? `✓ ${t("Right")}` : `✗ ${why ? t("Wrong: {why}", { why }) : t("Wrong")}`);
    this.verdict.classList.toggle("wrong", !verdict.correct);
    this.verdict.title = t("Checked by the verifier of {task}", { task: taskName(this.turn.problem?.task ?? "") });
  }
}

// The columns of one turn. On a narrow screen, a swipe moves all turns together.
export function columns(turn, views) {
  const box = make("div.columns", { "data-count": views.length }, ...views.map((view) => view.root));
  views.forEach((view, i) => view.root.classList.add(`c${i + 1}`));
  if (views.length > 1) {
    const together = () => {
      if (!box.matches(":hover, :focus-within")) return; // another turn moved it
      for (const other of document.querySelectorAll(`.columns[data-count="${views.length}"]`)) {
        if (Math.abs(other.scrollLeft - box.scrollLeft) > 1) other.scrollLeft = box.scrollLeft;
      }
    };
    box.addEventListener("scroll", together, { passive: true });
  }
  return box;
}

function doing(answer, model) {
  switch (answer.phase) {
    case "queued":
      return t("{why} Trying again in {n} s.", { why: t(answer.why), n: answer.left });
    case "waiting":
      return model && model.loaded === false ? t("loading") : "";
    case "thinking":
      return t("thinking");
    default:
      return "";
  }
}

function thoughtWords({ figures, phase }) {
  const values = { tokens: tokens(figures.thoughtTokens), time: seconds(figures.thoughtSeconds ?? 0) };
  return t(phase === "thinking" ? "Thinking for {tokens}, {time}" : "Thought for {tokens}, {time}", values);
}

// Why an answer is incomplete, and what would make it longer.
function troubleWords(answer, model) {
  const { trouble, phase, finish, text, thought, figures } = answer;
  if (trouble) return t(trouble.words);
  if (phase === "stopped") return t(text || thought ? "Stopped." : "Stopped before the first token.");
  if (phase !== "done") return "";
  if (finish !== "length") return text ? "" : t("No answer followed.");
  const words = text ? "Cut off after {tokens}." : "Cut off after {tokens}, inside its thought.";
  const longest = model?.practice?.trained_length;
  const why = full(answer, model)
    ? t("Its context of {n} tokens is full.", { n: number(model.context) })
    : longest && figures.context >= longest
      ? t("It was trained on texts of up to {n} tokens.", { n: number(longest) })
      : "";
  return [t(words, { tokens: tokens(figures.tokens) }), why].filter(Boolean).join(" ");
}

const full = ({ figures }, model) => Boolean(model?.context && figures.context >= model.context);

function figureWords({ alone, figures: { tokens: count, rate, first } }) {
  const words = count ? [tokens(count)] : [];
  if (rate) words.push(t("{n} tokens/s", { n: number(rate, rate < 10 ? 1 : 0) }));
  if (first !== null) words.push(t("first in {time}", { time: seconds(first) }));
  if (alone) words.push(t("read the question alone"));
  return words.join(" · ");
}

const tokens = (n) => t(n === 1 ? "{n} token" : "{n} tokens", { n: number(n) });

// The clipboard API exists only on secure pages; over plain HTTP in a local network only the old way works.
async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const area = make("textarea.unseen", { readonly: true });
    area.value = text;
    find("ask").append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  }
}
