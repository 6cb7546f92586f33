// A conversation as a file: Markdown for people, JSON for programs.

import { make } from "./dom.js";

export function asMarkdown(turns) {
  const parts = [];
  for (const { question, answers } of turns) {
    parts.push(`## ${question.replace(/\s+/g, " ")}`);
    if (question.includes("\n")) parts.push(quoted(question));
    for (const { model, seed, thought, text, verdict } of answers) {
      const facts = [seed === null ? "" : `seed ${seed}`, verdict ? (verdict.correct ? "right" : "wrong") : ""];
      parts.push(`**${model}**${facts.filter(Boolean).map((fact) => `, ${fact}`).join("")}`);
      if (thought) parts.push(quoted(thought));
      if (text) parts.push(text);
    }
  }
  return `${parts.join("\n\n")}\n`;
}

export function asJson(turns) {
  const answers = (turn) =>
    turn.answers.map(({ model, seed, thought, text, finish, verdict }) => ({
      model,
      seed,
      thought,
      text,
      finish,
      correct: verdict?.correct ?? null,
    }));
  const all = turns.map((turn) => ({ question: turn.question, problem: turn.problem, answers: answers(turn) }));
  return `${JSON.stringify({ turns: all }, null, 1)}\n`;
}

export function save(name, type, text) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  make("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

const quoted = (text) => text.replace(/^/gm, "> ");
