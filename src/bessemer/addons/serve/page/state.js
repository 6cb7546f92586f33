// The page's state: the conversation and the settings, stored only in this browser's localStorage.
//
// A turn is { question, problem, answers }, with one answer per model asked; problem { task, language, number } names
// the held-out problem behind the question, or is null. A piece is a stretch of an answer with the tokens that make it
// up: { text, of: [{ t, p, top, experts }] }; p is a log-probability, experts is [layer][k]. Everything read back is
// taken apart and rebuilt, so a broken or foreign entry costs only that entry, never the page. talks.js stores the
// conversations themselves.

const SETTINGS = "bessemer.settings.1";
const KEY = "bessemer.key";

// null leaves the choice to the server, which uses the model's generation_config.json.
export const DEFAULTS = {
  picked: [],
  side: false,
  details: false,
  system: "",
  temperature: null,
  top_p: null,
  top_k: null,
  min_p: null,
  repetition_penalty: null,
  max_tokens: null,
  seed: null,
  thinking: "own",
  thinking_budget: null,
  thoughts: "auto",
  reads: "auto",
  theme: "auto",
  language: "auto",
};
const CHOICES = {
  thinking: ["own", "always", "never"],
  thoughts: ["auto", "open", "folded"],
  reads: ["auto", "talk", "alone"],
  theme: ["auto", "light", "dark"],
  language: ["auto", "en", "zh"],
};
export const LIMITS = {
  temperature: [0, 2],
  top_p: [0, 1],
  top_k: [0, 1e6],
  min_p: [0, 1],
  repetition_penalty: [0.5, 2],
  max_tokens: [1, 1e6],
  seed: [0, 2 ** 31 - 1],
  thinking_budget: [0, 1e6],
};
const WHOLE = ["top_k", "max_tokens", "seed", "thinking_budget"];
export const MOST = 4; // models side by side

export function newAnswer(model, seed) {
  return {
    model,
    seed,
    thought: "",
    text: "",
    pieces: { thought: [], text: [] },
    phase: "waiting",
    finish: null,
    trouble: null,
    open: null,
    alone: false, // it read the question without the earlier turns
    verdict: null, // { correct, reason } of an answer to a known problem
    figures: { tokens: 0, context: null, thoughtTokens: 0, thoughtSeconds: null, first: null, rate: null }, // context: prompt and answer
  };
}

export const running = (answer) => ["waiting", "queued", "thinking", "writing"].includes(answer.phase);

export function loadSettings() {
  const kept = read(localStorage, SETTINGS);
  const settings = { ...DEFAULTS };
  if (!isObject(kept)) return settings;
  for (const [name, fallback] of Object.entries(DEFAULTS)) {
    const value = kept[name];
    if (name === "picked") settings.picked = list(value).filter(isString).slice(0, MOST);
    else if (name in LIMITS) settings[name] = setting(name, value);
    else if (name in CHOICES) settings[name] = CHOICES[name].includes(value) ? value : fallback;
    else if (typeof value === typeof fallback) settings[name] = value;
  }
  return settings;
}

// A number clamped to its limits, or null if there is none.
export function setting(name, value) {
  if (value === null || value === "" || !Number.isFinite(Number(value)) || typeof value === "object") return null;
  const [low, high] = LIMITS[name];
  const inside = Math.min(high, Math.max(low, Number(value)));
  return WHOLE.includes(name) ? Math.round(inside) : inside;
}

export const saveSettings = (settings) => write(localStorage, SETTINGS, settings);

// The turns of a stored conversation.
export function turnsOf(kept) {
  return list(kept)
    .filter((turn) => isObject(turn) && typeof turn.question === "string")
    .map(({ question, problem, answers }) => ({
      question,
      problem: problemOf(problem),
      answers: list(answers).filter(isObject).slice(0, MOST).map(answerOf),
    }))
    .filter((turn) => turn.answers.length);
}

export function forgetSettings() {
  forget(SETTINGS);
  setKey("");
}

// The key is stored for this tab only.
export const key = () => {
  const kept = read(sessionStorage, KEY);
  return typeof kept === "string" ? kept : "";
};
export const setKey = (text) => write(sessionStorage, KEY, text);

export const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);
export const list = (value) => (Array.isArray(value) ? value : []);
const isString = (value) => typeof value === "string";
const string = (value) => (isString(value) ? value : "");
const isRow = (value) => Array.isArray(value) && value.every(Number.isInteger);
const figure = (value) => (Number.isFinite(value) && value >= 0 ? value : null);

function problemOf(kept) {
  if (!isObject(kept) || !isString(kept.task) || !isString(kept.language) || !Number.isInteger(kept.number)) return null;
  return { task: kept.task, language: kept.language, number: kept.number };
}

function answerOf(kept) {
  const made = newAnswer(string(kept.model), setting("seed", kept.seed ?? null));
  made.thought = string(kept.thought);
  made.text = string(kept.text);
  made.finish = ["stop", "length"].includes(kept.finish) ? kept.finish : null;
  // closing the page stopped its answers
  made.phase = ["done", "failed"].includes(kept.phase) ? kept.phase : "stopped";
  if (isObject(kept.trouble)) made.trouble = { kind: string(kept.trouble.kind), words: string(kept.trouble.words) };
  if (typeof kept.open === "boolean") made.open = kept.open;
  made.alone = kept.alone === true;
  if (typeof kept.verdict?.correct === "boolean") {
    made.verdict = { correct: kept.verdict.correct, reason: string(kept.verdict.reason) };
  }
  const figures = isObject(kept.figures) ? kept.figures : {};
  for (const name of Object.keys(made.figures)) made.figures[name] = figure(figures[name]) ?? made.figures[name];
  for (const part of ["thought", "text"]) {
    const pieces = list(kept.pieces?.[part]).map(pieceOf);
    if (pieces.every(Boolean) && pieces.map((piece) => piece.text).join("") === made[part]) made.pieces[part] = pieces;
  }
  return made;
}

function pieceOf(kept) {
  if (!isObject(kept) || typeof kept.text !== "string" || !Array.isArray(kept.of)) return null;
  const of = kept.of.filter((token) => isObject(token) && typeof token.t === "string" && typeof token.p === "number");
  return {
    text: kept.text,
    of: of.map(({ t, p, top, experts }) => ({
      t,
      p,
      top: list(top).filter((other) => typeof other?.[0] === "string" && typeof other[1] === "number"),
      experts: Array.isArray(experts) && experts.every(isRow) ? experts : null,
    })),
  };
}

export function read(storage, name) {
  try {
    return JSON.parse(storage.getItem(name));
  } catch {
    return null; // not ours, truncated, or storage is disabled
  }
}

export function write(storage, name, value) {
  try {
    storage.setItem(name, JSON.stringify(value));
    return true;
  } catch {
    return false; // full or disabled: the page works without it
  }
}

export function forget(name) {
  try {
    localStorage.removeItem(name);
  } catch {
    // nothing was stored
  }
}
