// The conversation on the page: each question with its answers in columns, edited in place, following the stream.

import { AnswerView, columns } from "./answer.js";
import { find, make } from "./dom.js";
import { t } from "./words.js";

export class Conversation {
  // page: as for AnswerView, plus turns and ask(turn number, question).
  constructor(page) {
    this.page = page;
    this.views = new WeakMap(); // answer -> its view
    this.due = new Set();
    this.talk = find("talk");
    this.following = true; // until the reader scrolls up
    this.talk.addEventListener(
      "scroll",
      () => {
        this.following = this.talk.scrollHeight - this.talk.scrollTop - this.talk.clientHeight < 60;
      },
      { passive: true },
    );
    new ResizeObserver(() => this.following && this.page.turns.length && this.toEnd()).observe(this.talk);
  }

  // Call it when turns were added or removed. Remaining turns keep their nodes.
  draw() {
    const { turns } = this.page;
    const list = find("turns");
    const known = new Map([...list.children].map((item) => [item.turn, item]));
    const items = turns.map((turn) => {
      const kept = known.get(turn);
      if (kept && kept.answers.length === turn.answers.length && kept.answers.every((a, i) => a === turn.answers[i]))
        return kept;
      const item = this.item(turn);
      if (kept) kept.replaceWith(item);
      return item;
    });
    for (const item of [...list.children]) if (!items.includes(item)) item.remove();
    items.forEach((item, i) => list.children[i] !== item && list.insertBefore(item, list.children[i] ?? null));
    list.hidden = !turns.length;
    find("start").hidden = turns.length > 0;
  }

  // Updates once per frame, however many chunks came.
  changed(answer) {
    if (!this.due.size) requestAnimationFrame(() => this.update());
    this.due.add(answer);
  }

  update() {
    const due = [...this.due];
    this.due.clear();
    for (const answer of due) this.views.get(answer)?.update();
    if (this.following) this.toEnd();
  }

  updateAll() {
    for (const turn of this.page.turns) for (const answer of turn.answers) this.changed(answer);
  }

  toEnd() {
    this.following = true;
    this.talk.scrollTop = this.talk.scrollHeight;
  }

  item(turn) {
    const views = turn.answers.map((answer) => {
      if (!this.views.has(answer)) this.views.set(answer, new AnswerView(answer, turn, this.page));
      return this.views.get(answer);
    });
    const item = make(`li.turn${views.length > 1 ? ".many" : ""}`, {}, this.question(turn), columns(turn, views));
    item.turn = turn;
    item.answers = [...turn.answers];
    return item;
  }

  question(turn) {
    const edit = make(
      "button.quiet",
      { type: "button", title: t("Edit and ask again from here"), "aria-label": t("Edit the question") },
      t("Edit"),
    );
    const box = make("div.question", { dir: "auto" }, make("p", {}, turn.question), edit);
    edit.addEventListener("click", () => this.edit(box, turn));
    return box;
  }

  // Turns the text into a field. Sending drops the turns after it; Escape changes nothing.
  edit(box, turn) {
    const field = make("textarea", { "aria-label": t("The question, edited"), rows: 1 });
    field.value = turn.question;
    const close = () => {
      form.replaceWith(box);
      box.querySelector("button").focus();
    };
    const send = () => {
      const question = field.value.trim();
      if (question && this.page.ask(this.page.turns.indexOf(turn), question)) return;
      field.focus();
    };
    const form = make(
      "form.question.editing",
      {
        onsubmit: (event) => {
          event.preventDefault();
          send();
        },
      },
      field,
      make(
        "div.choices",
        {},
        make("button.quiet", { type: "button", onclick: close }, t("Cancel")),
        make("button", { type: "submit" }, t("Ask again")),
      ),
    );
    field.addEventListener("input", () => fit(field));
    field.addEventListener("keydown", (event) => {
      if (event.key === "Escape") close();
      else if (!sends(event)) return;
      else send();
      event.preventDefault();
      event.stopPropagation();
    });
    box.replaceWith(form);
    fit(field);
    field.focus();
    field.setSelectionRange(field.value.length, field.value.length);
  }

  editLast() {
    const item = find("turns").lastElementChild;
    const box = item?.querySelector(".question:not(.editing)");
    if (box) this.edit(box, item.turn);
  }
}

// Enter sends; with Shift, or while an input method is composing (Chinese), it does not.
export const sends = (event) => event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229;

// As tall as its text, up to the style sheet's limit.
export function fit(field) {
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight + field.offsetHeight - field.clientHeight}px`;
}
