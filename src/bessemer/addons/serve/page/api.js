// The server's HTTP interface: models, and one answer as a stream of chunks. Failures are `Trouble` with plain words.
//
// Addresses are relative to the page, so that a proxy can serve it under a path. A chunk is
//   { thought, text, tokens, experts, finish, usage }
// whichever endpoint it came from; tokens are [{ t, bytes, p, top: [[t, p]] }], experts one [layer][k] per token.

import { key } from "./state.js";
import { t } from "./words.js";

const TOO_LONG =
  "The conversation is longer than the model's context: start a new chat, or let models read the question alone (in " +
  "the settings).";
const TOP = 5; // alternatives requested with every token

export class Trouble extends Error {
  // kind: "gone" (no server), "key", "full" (too many wait), "busy" (no room for one more model), "model" (unknown),
  // "asked" (our request is wrong), "server".
  constructor(kind, words, after = null) {
    super(words);
    this.kind = kind;
    this.after = after; // seconds until a retry makes sense
  }
}

export async function models() {
  const response = await call("v1/models", {});
  const told = await response.json().catch(() => null);
  const known = Array.isArray(told?.data) ? told.data.filter((model) => typeof model?.id === "string") : [];
  if (!known.length) throw new Trouble("server", "The server offers no model.");
  return known.map(({ id, bessemer: facts = {} }) => {
    const talks = facts.style !== null; // without a chat template it continues a text, and thoughts are not separate
    return { ...facts, id, talks, thinks: Boolean(facts.thinks && talks) };
  });
}

// Whether the server has the live page of its models' run.
export async function watched() {
  return (await (await call("health", {})).json()).watch === true;
}

// One answer. `model` is an entry of models(), `talk` [{ role, content }], `sampling` further fields of the request.
export async function* stream(model, talk, sampling, signal) {
  const body = {
    model: model.id,
    stream: true,
    stream_options: { include_usage: true, continuous_usage_stats: true },
    ...sampling,
    ...(model.talks ? { messages: talk, logprobs: true, top_logprobs: TOP } : { prompt: plain(talk), logprobs: TOP }),
    ...(model.sparse_layers ? { return_routing: true } : {}),
  };
  const response = await call(model.talks ? "v1/chat/completions" : "v1/completions", {
    method: "POST",
    body: JSON.stringify(body),
    signal,
    headers: { "Content-Type": "application/json" },
  });
  let ended = false;
  for await (const event of events(response.body, signal)) {
    if (event === "[DONE]") {
      ended = true;
      break;
    }
    const told = parsed(event);
    if (told.error) throw new Trouble("server", sentence(told.error.message));
    yield chunk(told);
  }
  if (!ended) throw new Trouble("gone", "The connection was lost before the answer was complete.");
}

// Held-out problems from the tasks that a model was trained on: [{ task, language, number, prompt }].
export async function problems(model) {
  const told = await (await call(`v1/problems?model=${encodeURIComponent(model)}`, {})).json();
  return (Array.isArray(told?.data) ? told.data : []).filter(
    (one) => typeof one?.prompt === "string" && typeof one.task === "string" && Number.isInteger(one.number),
  );
}

// The verdict of a task's verifier on an answer to one of these problems: { correct, reason }.
export async function verdict(model, problem, answer) {
  const body = JSON.stringify({ model, ...problem, answer });
  const headers = { "Content-Type": "application/json" };
  return (await call("v1/verdict", { method: "POST", body, headers })).json();
}

// A model without a chat template continues a text: what was asked, what it wrote after that, and so on.
const plain = (talk) => talk.map(({ role, content }, i) => (role === "user" && i ? "\n" : "") + content).join("");

async function call(path, options) {
  const headers = { ...options.headers, ...(key() ? { Authorization: `Bearer ${key()}` } : {}) };
  let response;
  try {
    response = await fetch(new URL(path, document.baseURI), { ...options, headers, cache: "no-store" });
  } catch (failure) {
    throw options.signal?.aborted ? failure : new Trouble("gone", "The server does not answer.");
  }
  if (response.ok) return response;
  throw troubleOf(response, (await response.json().catch(() => null))?.error ?? {});
}

function troubleOf(response, error) {
  const after = Number(response.headers.get("Retry-After")) || null;
  const said = sentence(error.message);
  switch (response.status) {
    case 401:
      return new Trouble("key", key() ? "The server rejected this key." : "This server requires a key.");
    case 404:
      return new Trouble("model", said || "The server does not know this model.");
    case 413:
      return new Trouble("asked", "The conversation is too large for the server.");
    case 429:
      return error.code === "models_busy"
        ? new Trouble("busy", "All models in memory are busy.", after ?? 5)
        : new Trouble("full", "The queue is full.", after ?? 1);
    case 502:
    case 504:
      return new Trouble("gone", "The server does not answer.");
    case 503:
      return error.code === "model_unavailable"
        ? new Trouble("server", said)
        : new Trouble("gone", "The server is shutting down.", after);
  }
  if (error.code === "context_length_exceeded") {
    return new Trouble("asked", `${t(TOO_LONG)} ${said}`);
  }
  return response.status < 500
    ? new Trouble("asked", said || t("The server refused the request ({n}).", { n: response.status }))
    : new Trouble("server", said || t("The server failed ({n}).", { n: response.status }));
}

// The data of each server-sent event. An event ends with an empty line; a line that begins with ":" is a comment.
export async function* events(body, signal) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  let data = [];
  try {
    while (true) {
      const { done, value } = await reader.read();
      const lines = (rest + (done ? "\n" : decoder.decode(value, { stream: true }))).split(/\r\n|\n|\r(?!$)/);
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
        else if (line === "" && data.length) yield data.splice(0).join("\n");
      }
      if (done) return;
    }
  } catch (failure) {
    throw signal?.aborted ? failure : new Trouble("gone", "The connection was lost before the answer was complete.");
  } finally {
    reader.cancel().catch(() => {}); // free the slot when the reader stops
  }
}

function parsed(event) {
  try {
    const told = JSON.parse(event);
    if (typeof told === "object" && told !== null) return told;
  } catch {
    // reported below
  }
  throw new Trouble("server", "The server sent something that is not a chunk of an answer.");
}

function chunk(told) {
  const choice = told.choices?.[0] ?? {};
  const delta = choice.delta ?? {};
  return {
    thought: string(delta.reasoning_content ?? delta.reasoning),
    text: string(delta.content ?? choice.text),
    tokens: choice.logprobs ? tokensOf(choice.logprobs) : [],
    experts: Array.isArray(choice.routing) ? choice.routing : [],
    finish: choice.finish_reason ?? null,
    usage: told.usage ?? null,
  };
}

// /v1/chat/completions gives `content`, /v1/completions columns.
function tokensOf(logprobs) {
  if (Array.isArray(logprobs.content)) {
    return logprobs.content.map(({ token, logprob, bytes, top_logprobs }) => ({
      t: string(token),
      p: logprob,
      bytes,
      top: (top_logprobs ?? []).map((other) => [string(other.token), other.logprob]),
    }));
  }
  return (logprobs.tokens ?? []).map((token, i) => ({
    t: string(token),
    p: logprobs.token_logprobs?.[i],
    bytes: spelled(string(token)),
    top: Object.entries(logprobs.top_logprobs?.[i] ?? {}),
  }));
}

// "bytes:\xe4\xbd", if the endpoint does not send bytes separately.
const spelled = (token) =>
  Array.from(token.replace("bytes:", "").matchAll(/\\x([0-9a-f]{2})|[^]/g), ([char, hex]) =>
    hex ? parseInt(hex, 16) : char.charCodeAt(0),
  );

const string = (value) => (typeof value === "string" ? value : "");

function sentence(message) {
  const said = string(message).trim();
  return said && said[0].toUpperCase() + said.slice(1) + (/[.!?。]$/.test(said) ? "" : ".");
}
