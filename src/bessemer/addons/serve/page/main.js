// The chat page: connects the parts. Actions change `turns` or `settings`; the view follows, and both are stored.

import { watched } from "./api.js";
import { Asking, begun, readsAlone, samplingOf, talkOf } from "./ask.js";
import { Chats } from "./chats.js";
import { Connection } from "./connection.js";
import { find, say } from "./dom.js";
import { Examples, judge } from "./examples.js";
import { Picker } from "./picker.js";
import { Settings } from "./settings.js";
import * as state from "./state.js";
import { Talks } from "./talks.js";
import { Card } from "./tokens.js";
import { Conversation, fit, sends } from "./turns.js";
import { t, translatePage } from "./words.js";

translatePage();
const settings = state.loadSettings();
const spoken = settings.language; // when the page was built
const talks = new Talks();
const question = find("question");
const asking = new Map(); // answer -> the Asking that fetches it
const page = {
  settings,
  turns: talks.turns(),
  card: new Card(find("card"), tell),
  ask,
  retry,
  more,
  takeSeed,
  open,
  modelOf: (id) => picker.models.find((model) => model.id === id),
  stop: (answer) => asking.get(answer)?.stop(),
};
const conversation = new Conversation(page);
const picker = new Picker(settings, changed);
const panel = new Settings(settings, changed, forget);
const examples = new Examples((words) => ask(page.turns.length, words));
const chats = new Chats(talks, () => page.turns, openTalk, removeTalk);
const connection = new Connection((models) => {
  picker.show(models);
  changed();
  conversation.updateAll();
});

// Asks the picked models `words` as turn number `at`, replacing the turns from there on. False if that is not possible.
function ask(at, words) {
  if (asking.size || !connection.ready) return false;
  const before = page.turns[at];
  const problem = examples.problemOf(words) ?? (before?.question === words ? before.problem : null);
  drop(at, at < page.turns.length);
  const answers = settings.picked.map((id) => state.newAnswer(id, seed()));
  page.turns.push({ question: words, problem, answers });
  conversation.draw();
  for (const answer of answers) start(answer, page.turns[at], talkTo(answer, at));
  conversation.toEnd();
  focus();
  return true;
}

// Asks for an answer anew. In the last turn the other columns may still be running.
function retry(turn, answer) {
  const at = page.turns.indexOf(turn);
  const later = at + 1 < page.turns.length;
  if (!connection.ready || at < 0 || (later && asking.size)) return;
  drop(at + 1, later);
  const fresh = state.newAnswer(answer.model, seed());
  turn.answers[turn.answers.indexOf(answer)] = fresh;
  conversation.draw();
  start(fresh, turn, talkTo(fresh, at));
}

// Continues an answer from where it was stopped or cut off, even inside its thought.
function more(turn, answer) {
  const at = page.turns.indexOf(turn);
  const later = at + 1 < page.turns.length;
  if (!connection.ready || at < 0 || (later && asking.size)) return;
  drop(at + 1, later);
  Object.assign(answer, { phase: "waiting", finish: null, trouble: null, verdict: null });
  conversation.draw();
  const said = begun(answer, page.modelOf(answer.model)?.style);
  start(answer, turn, [...talkOf(page.turns, at, answer, settings), { role: "assistant", content: said }]);
}

function talkTo(answer, at) {
  answer.alone = at > 0 && readsAlone(settings, page.modelOf(answer.model));
  return talkOf(page.turns, at, answer, settings);
}

function start(answer, turn, talk) {
  const model = page.modelOf(answer.model);
  if (!model) {
    Object.assign(answer, {
      phase: "failed",
      trouble: { kind: "model", words: "The server no longer has this model." },
    });
    return conversation.changed(answer);
  }
  const one = new Asking(answer, model, talk, samplingOf(settings, model, answer.seed), (grown) =>
    conversation.changed(grown),
  );
  asking.set(answer, one);
  busy();
  one.ended.then(async () => {
    asking.delete(answer);
    if (answer.text || answer.thought) model.loaded = true;
    if (answer.trouble) connection.trouble(answer.trouble.kind);
    busy();
    keep();
    if (turn.problem && answer.text) {
      answer.verdict = await judge(answer, turn.problem);
      conversation.changed(answer);
      keep();
    }
    const verdict = answer.verdict ? ` ${t(answer.verdict.correct ? "Right" : "Wrong")}.` : "";
    tell(answer.trouble?.words ?? `${answer.model}: ${answer.text.slice(0, 300) || t("no answer")}.${verdict}`);
  });
}

// Drops the turns from number `at` on, and offers to bring them back.
function drop(at, offer) {
  const gone = [...page.turns];
  page.turns.splice(at);
  if (!offer) return connection.dismiss();
  connection.notice(t(gone.length - at === 1 ? "The turn was replaced." : "Later turns were dropped."), t("Undo"), () => {
    stopAll();
    page.turns.splice(0, Infinity, ...gone);
    conversation.draw();
    keep();
  });
}

function stopAll() {
  for (const one of asking.values()) one.stop();
}

// Begins a new conversation; the old one stays in the list.
function startAfresh() {
  stopAll();
  focus();
  if (!page.turns.length) return;
  keep();
  talks.fresh();
  show([]);
}

function openTalk(id) {
  stopAll();
  keep();
  talks.open(id);
  show(talks.turns());
  conversation.toEnd();
}

function removeTalk(id) {
  const open = id === talks.id;
  if (open) stopAll();
  const gone = open ? [...page.turns] : talks.turns(id);
  talks.remove(id);
  if (open) {
    talks.fresh();
    show([]);
  } else chats.draw();
  connection.notice(t("The conversation was deleted."), t("Undo"), () => {
    talks.save(gone, id);
    chats.draw();
  });
}

function show(turns) {
  page.turns.splice(0, Infinity, ...turns);
  conversation.draw();
  chats.draw();
}

function forget() {
  stopAll();
  talks.removeAll();
  show([]);
  Object.assign(settings, state.DEFAULTS, { picked: settings.picked });
  panel.show();
  picker.show(picker.models);
  changed();
  state.forgetSettings();
  connection.notice(t("Everything stored here was deleted."));
}

function changed() {
  if (settings.theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = settings.theme;
  const picked = settings.picked.map(page.modelOf).filter(Boolean);
  panel.suit(picked);
  examples.show(picked, picker.models.length);
  find("details").setAttribute("aria-pressed", String(settings.details));
  document.body.classList.toggle("details", settings.details);
  find("think").hidden = !picked.some((model) => model.thinks);
  find("think").firstElementChild.checked = settings.thinking !== "never";
  const names = picked.length > 2 ? t("all {n}", { n: picked.length }) : picked.map(({ id }) => id).join(t(" and "));
  question.placeholder = names ? t("Ask {names}", { names }) : t("Ask something");
  conversation.updateAll();
  state.saveSettings(settings);
  if (settings.language !== spoken) location.reload();
}

function busy() {
  find("send").hidden = asking.size > 0;
  find("stop").hidden = !asking.size;
}

// Not on a touch screen, where the keyboard would pop up.
const focus = () => matchMedia("(pointer: fine)").matches && question.focus();
const seed = () => settings.seed ?? Math.floor(Math.random() * 2 ** 31);
const keep = () => talks.save(page.turns);

function tell(words) {
  say(find("said"), words);
}

function takeSeed(value) {
  const before = settings.seed;
  const use = (seed) => {
    panel.set("seed", seed);
    panel.show();
  };
  use(value);
  connection.notice(t("Seed {n} is used from now on.", { n: value }), t("Undo"), () => use(before));
}

function open(answer, on) {
  answer.open = on;
  keep();
}

function send() {
  const words = question.value.trim();
  if (!words || !ask(page.turns.length, words)) return;
  question.value = "";
  fit(question);
}

find("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
question.addEventListener("input", () => fit(question));
question.addEventListener("keydown", (event) => {
  if (sends(event)) {
    event.preventDefault();
    send();
  } else if (event.key === "ArrowUp" && !question.value && page.turns.length) {
    event.preventDefault();
    conversation.editLast();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || event.defaultPrevented) return;
  if (asking.size) stopAll();
  else page.card.hide();
});
find("stop").addEventListener("click", () => {
  stopAll();
  focus();
});
find("fresh").addEventListener("click", startAfresh);
find("details").addEventListener("click", () => {
  settings.details = !settings.details;
  changed();
});
find("think").firstElementChild.addEventListener("change", ({ target }) => {
  settings.thinking = target.checked ? "own" : "never";
  panel.show();
  changed();
});
addEventListener("pagehide", keep);

conversation.draw();
if (page.turns.length) conversation.toEnd();
focus();
connection.begin();
watched().then((there) => (find("watch").hidden = !there), () => {}); // a lost server is already reported
