// One answer on the page: who gives it, its thought (folded once the answer begins), its text, figures and buttons.
//
// An AnswerView is made once and then brought up to date, so that a streamed answer never loses its selection, its
// focus or the place it is scrolled to.

import { find, make, number, say, seconds } from "./dom.js";
import { about } from "./picker.js";
import { running } from "./state.js";
import { paint } from "./text.js";
import { looks } from "./tokens.js";

export class AnswerView {
  // page: what the answer needs of the page: settings, card, modelOf(id) and the actions of its buttons.
  constructor(answer, turn, page) {
    Object.assign(this, { answer, turn, page });
    const button = (words, title, act) => make("button.quiet", { type: "button", title, onclick: act }, words);
    this.who = make("b", {}, answer.model);
    this.now = make("span.now");
    this.halt = button("Stop", "Stop this answer", () => page.stop(answer));
    this.summary = make("summary", { onclick: () => page.open(answer, !this.thought.open) });
    this.thinking = make("div.lines", { role: "group", "aria-label": `Thought by ${answer.model}` });
    this.thought = make("details.thought", {}, this.summary, this.thinking);
    this.text = make("div.lines.text", { role: "group", "aria-label": `Answer by ${answer.model}` });
    this.trouble = make("p.trouble");
    this.figures = make("span.figures");
    this.seed = make("button.quiet.seed", {
      type: "button",
      title: "Use this seed for the next answers too",
      onclick: () => page.takeSeed(answer.seed),
    });
    this.copy = button("Copy", "Copy the answer", () => this.copied());
    this.more = button("Continue", "Let it continue from here", () => page.more(turn, answer));
    this.again = button("Retry", "Ask this model again", () => page.retry(turn, answer));
    const acts = make("span.acts", {}, this.copy, this.more, this.again);
    this.foot = make("footer", {}, this.figures, this.seed, acts);
    this.root = make(
      "article.answer",
      { "aria-label": `Answer by ${answer.model}` },
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
    say(this.trouble, troubleWords(answer));
    this.trouble.hidden = !this.trouble.textContent;
    this.trouble.classList.toggle("mild", !answer.trouble);
    this.foot.hidden = live && !figures.rate;
    say(this.figures, figureWords(figures));
    say(this.seed, answer.seed === null ? "" : `seed ${answer.seed}`);
    this.seed.hidden = live || answer.seed === null || !figures.tokens;
    this.copy.hidden = live || !(answer.text || answer.thought);
    this.more.hidden = live || !answer.text || answer.finish === "stop";
    this.again.hidden = live;
  }

  fill(box, part) {
    const { answer, page } = this;
    const shown = page.settings.details ? answer.pieces[part] : null;
    const usable = shown?.length ? shown : null; // an answer of another day may have lost them
    const low = box.scrollHeight - box.scrollTop - box.clientHeight < 24;
    paint(box, answer[part], usable && looks(usable));
    page.card.watch(box, usable, page.modelOf(answer.model));
    if (low && running(answer)) box.scrollTop = box.scrollHeight;
  }

  async copied() {
    const done = await copyText(this.answer.text || this.answer.thought);
    say(this.copy, done ? "Copied" : "Not allowed");
    setTimeout(() => say(this.copy, "Copy"), 1500);
  }
}

// The columns of one turn. On a narrow screen they are swiped, all turns together.
export function columns(turn, views) {
  const box = make("div.columns", { "data-count": views.length }, ...views.map((view) => view.root));
  views.forEach((view, i) => view.root.classList.add(`c${i + 1}`));
  if (views.length > 1) {
    const together = () => {
      if (!box.matches(":hover, :focus-within")) return; // moved by another one
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
      return `${answer.why} Asking again in ${answer.left} s.`;
    case "waiting":
      return model && model.loaded === false ? "being loaded" : "";
    case "thinking":
      return "thinking";
    default:
      return "";
  }
}

function thoughtWords({ figures, phase }) {
  const words = `for ${plural(figures.thoughtTokens, "token")}, ${seconds(figures.thoughtSeconds ?? 0)}`;
  return phase === "thinking" ? `Thinking ${words}` : `Thought ${words}`;
}

function troubleWords({ trouble, phase, finish, text, thought, figures }) {
  if (trouble) return trouble.words;
  if (phase === "stopped") return text || thought ? "Stopped." : "Stopped before the first token.";
  if (phase === "done" && finish === "length") return `Cut off after ${plural(figures.tokens, "token")}.`;
  return phase === "done" && !text ? "No answer followed." : "";
}

function figureWords({ tokens, rate, first }) {
  const words = tokens ? [plural(tokens, "token")] : [];
  if (rate) words.push(`${number(rate, rate < 10 ? 1 : 0)} tokens/s`);
  if (first !== null) words.push(`first in ${seconds(first)}`);
  return words.join(" · ");
}

const plural = (n, what) => `${number(n)} ${what}${n === 1 ? "" : "s"}`;

// The clipboard interface exists on secure pages only; over plain HTTP in one's own network the old way remains.
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
