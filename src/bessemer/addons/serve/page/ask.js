// One answer from request to end: the stream goes into the answer, with times, and `changed` is called as it grows.
//
// Phases: waiting (for the first token) -> thinking -> writing -> done, or stopped by the user (what came stays), or
// failed with a Trouble. A full queue is tried once more after the waiting time that the server names (phase queued);
// models that keep each other out of memory, as columns side by side may, are retried for longer.

import { stream, Trouble } from "./api.js";
import { Pieces } from "./pieces.js";
import { t } from "./words.js";

const PATIENCE = { full: 1, busy: 60 }; // retries

export class Asking {
  // talk: the messages that lead to the answer; sampling: fields of the request.
  constructor(answer, model, talk, sampling, changed) {
    Object.assign(this, { answer, model, talk, sampling, changed });
    this.abort = new AbortController();
    this.ended = this.run();
  }

  stop() {
    this.abort.abort();
  }

  async run() {
    const { answer } = this;
    try {
      await this.attempt();
    } catch (failure) {
      if (this.abort.signal.aborted) answer.phase = "stopped";
      else if (failure instanceof Trouble) {
        answer.phase = "failed";
        answer.trouble = { kind: failure.kind, words: failure.message };
      } else {
        answer.phase = "failed";
        answer.trouble = { kind: "server", words: t("The page could not follow the answer: {why}.", { why: failure.message }) };
      }
    }
    this.endThought();
    this.changed(answer);
    return answer;
  }

  async attempt() {
    for (let waits = 0; ; waits += 1) {
      try {
        return await this.follow();
      } catch (failure) {
        if (this.abort.signal.aborted || waits >= (PATIENCE[failure.kind] ?? 0)) throw failure;
        await this.wait(failure.after, failure.message);
      }
    }
  }

  async wait(seconds, words) {
    const { answer } = this;
    answer.phase = "queued";
    answer.why = words;
    for (answer.left = Math.ceil(seconds); answer.left > 0; answer.left -= 1) {
      this.changed(answer);
      await pause(1000, this.abort.signal);
    }
    delete answer.left;
    delete answer.why;
    answer.phase = "waiting";
    this.changed(answer);
  }

  async follow() {
    const { answer } = this;
    const { figures } = answer;
    const pieces = new Pieces(answer);
    const sent = performance.now();
    const before = figures.tokens;
    const thoughtBefore = figures.thoughtTokens;
    this.secondsBefore = figures.thoughtSeconds ?? 0;
    let began = null;
    let first = 0;
    this.thoughtBegan = null;
    for await (const chunk of stream(this.model, this.talk, this.sampling, this.abort.signal)) {
      const now = performance.now();
      if (chunk.thought || chunk.text || chunk.tokens.length) {
        const count = chunk.usage?.completion_tokens ?? figures.tokens - before + Math.max(1, chunk.tokens.length);
        if (began === null) {
          began = now;
          first = count;
          figures.first ??= (now - sent) / 1000;
        } else if (now > began) figures.rate = ((count - first) * 1000) / (now - began);
        if (chunk.thought) {
          this.thoughtBegan ??= now;
          figures.thoughtSeconds = this.secondsBefore + (now - this.thoughtBegan) / 1000;
          answer.phase = "thinking";
          if (!chunk.usage) figures.thoughtTokens += Math.max(1, chunk.tokens.length);
        }
        if (chunk.text) {
          this.endThought(now);
          answer.phase = "writing";
        }
        figures.tokens = before + count;
        pieces.add(chunk);
      }
      if (chunk.usage) {
        figures.tokens = before + (chunk.usage.completion_tokens ?? 0);
        figures.context = chunk.usage.total_tokens ?? null;
        figures.thoughtTokens = thoughtBefore + (chunk.usage.completion_tokens_details?.reasoning_tokens ?? 0);
      }
      if (chunk.finish) answer.finish = chunk.finish;
      this.changed(answer);
    }
    answer.phase = "done";
  }

  // The thought lasted until the first word of the answer, or until the stream ended.
  endThought(now = performance.now()) {
    if (this.thoughtBegan == null) return;
    this.answer.figures.thoughtSeconds = this.secondsBefore + (now - this.thoughtBegan) / 1000;
    this.thoughtBegan = null;
  }
}

// Whether a model reads a question without the earlier turns: by the settings, which may leave it to its training.
export const readsAlone = ({ reads }, model) =>
  reads === "alone" || (reads === "auto" && model?.practice?.multi_turn === false);

// The messages that lead to an answer in turn `until`: the conversation, or the question alone. A model that joined
// late gets the first column's earlier answers; turns without an answer and all thoughts are left out.
export function talkOf(turns, until, { model, alone }, { system }) {
  const talk = system.trim() ? [{ role: "system", content: system }] : [];
  for (const turn of alone ? [] : turns.slice(0, until)) {
    const own = turn.answers.find((answer) => answer.model === model) ?? turn.answers[0];
    if (own.text) talk.push({ role: "user", content: turn.question }, { role: "assistant", content: own.text });
  }
  return [...talk, { role: "user", content: turns[until].question }];
}

// What an answer to be continued has said so far, as its model's template would have written it.
export function begun({ thought, text }, style) {
  if (!thought) return text;
  if (style === "zero" || style === "r1-zero") return `<think>${thought}${text ? `</think> ${text}` : ""}`;
  return `<think>\n${thought}${text ? `\n</think>\n\n${text}` : ""}`;
}

// The settings as fields of a request; a null leaves the choice to the server.
export function samplingOf(settings, model, seed) {
  const names = ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens"];
  const fields = Object.fromEntries(
    names.filter((name) => settings[name] !== null).map((name) => [name, settings[name]]),
  );
  if (model.thinks && settings.thinking !== "own") fields.thinking = settings.thinking === "always";
  if (model.thinks && settings.thinking !== "never" && settings.thinking_budget !== null) {
    fields.thinking_budget = settings.thinking_budget;
  }
  return { ...fields, seed };
}

const pause = (ms, signal) =>
  new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, ms);
    signal.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(signal.reason);
    });
  });
