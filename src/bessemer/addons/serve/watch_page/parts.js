// The text parts of the page: runs, alarms, rollouts, times. Models and files are not trusted: text enters only through
// textContent, and control characters that a page would obey invisibly are made visible.

import { make, say } from "./dom.js";
import { short } from "./plot.js";
import { t, told } from "./words.js";

const STATES = { running: "running", finished: "finished", stopped: "stopped", waiting: "not started" };

// Control characters as their symbols; marks that change the text direction as a box.
export function visible(text) {
  return String(text)
    .replace(/[\u0000-\u0008\u000b-\u001f]/g, (one) => String.fromCharCode(0x2400 + one.charCodeAt(0)))
    .replace(/[\u007f-\u009f\u200e\u200f\u202a-\u202e\u2066-\u2069]/g, "\ufffd");
}

export function duration(seconds) {
  if (seconds === null) return "–";
  const two = (n) => String(Math.floor(n)).padStart(2, "0");
  if (seconds < 60) return t("{s} s", { s: seconds < 10 ? seconds.toFixed(1) : Math.floor(seconds) });
  if (seconds < 3600) return t("{m} min {s} s", { m: Math.floor(seconds / 60), s: two(seconds % 60) });
  const minutes = Math.floor(seconds / 60);
  return t("{h} h {m} min", { h: Math.floor(minutes / 60), m: two(minutes % 60) });
}

// A button for each run, with its colour, name and state; pressed while its curves are shown.
export function runList(box, runs, hidden, toggle) {
  while (box.children.length < runs.length) {
    const place = box.children.length;
    const button = make("button.run", { type: "button", onclick: () => toggle(runs[place].label) });
    button.append(make(`i.c${(place % 6) + 1}`), make("b"), make("span"));
    box.append(make("li", {}, button));
  }
  runs.forEach((run, place) => {
    const button = box.children[place].firstChild;
    button.setAttribute("aria-pressed", String(!hidden.has(run.label)));
    button.disabled = runs.length === 1;
    button.title = visible(run.path);
    say(button.children[1], visible(run.label));
    say(button.children[2], how(run));
  });
}

function how(run) {
  const at = run.stages.findLast(({ state }) => state !== "waiting");
  if (!at) return t("no stage has started");
  if (run.stages.every(({ state }) => state === "finished")) return t("finished");
  const step = at.step === null ? "" : t(", step {n}", { n: short(at.step) });
  const quiet = at.state === "running" || at.quiet === null ? "" : t(", last line {time} ago", { time: duration(at.quiet) });
  const left = at.state === "running" && run.left ? t(", about {time} left", { time: duration(run.left) }) : "";
  return `${run.reading ? `${t("reading")} · ` : ""}${visible(at.name)} ${t(STATES[at.state])}${step}${left}${quiet}`;
}

export function alarmList(box, runs) {
  const all = runs.flatMap((run) => run.alarms.map((alarm) => ({ ...alarm, run: run.label })));
  const key = JSON.stringify(all);
  if (box.dataset.shown === key) return;
  box.dataset.shown = key;
  box.hidden = !all.length;
  box.replaceChildren(
    ...all.sort((a, b) => b.active - a.active).map((alarm) => {
      const where = [...(runs.length > 1 ? [alarm.run] : []), alarm.stage, ""].map(visible).join(t(", "));
      const when = t(alarm.active ? "since step {n}" : "at step {n}, over now", { n: alarm.step });
      const reasons = { cause: told(alarm.cause), advice: told(alarm.advice) };
      const advice = alarm.cause && t("Likely cause: {cause}. What to do: {advice}.", reasons);
      return make(
        `div.alarm${alarm.active ? "" : ".over"}`, {},
        make("b", {}, visible(told(alarm.title))), make("span.unit", {}, ` ${where}${when}`),
        make("p", {}, t("{sentence}.", { sentence: visible(told(alarm.message)) })), advice ? make("p.unit", {}, visible(advice)) : null,
      );
    }),
  );
}

// The newest rollouts, newest first. Those already on the page stay open or folded.
export function rolloutList(box, rollouts, stage, name) {
  const before = new Map([...box.children].map((child) => [child.dataset.key, child]));
  const newest = [...rollouts].sort((a, b) => (b.step ?? 0) - (a.step ?? 0) || b.number - a.number);
  const after = newest.map((rollout) => {
    const key = JSON.stringify([stage, rollout]);
    const child = before.get(key) ?? answer(rollout, name);
    child.dataset.key = key;
    return child;
  });
  if (!after.length) after.push(make("p.unit", {}, t("This stage has no rollouts.")));
  if (after.some((child, i) => child !== box.children[i]) || after.length !== box.children.length) {
    box.replaceChildren(...after);
  }
}

function answer({ run, step, prompt, completion, reward, correct, length, formatted }, name) {
  const facts = [t("step {n}", { n: step ?? "?" })];
  if (name) facts.unshift(name(run));
  if (reward !== null) facts.push(t("reward {n}", { n: short(reward) }));
  if (length !== null) facts.push(t("{n} tokens", { n: short(length) }));
  if (formatted === false) facts.push(t("not well-formed"));
  const mark = correct === null ? null : make(correct ? "i.right" : "i.wrong", {}, t(correct ? "✓ right" : "✗ wrong"));
  const line = visible(prompt).replace(/\s+/g, " ").slice(0, 160);
  return make(
    "details", {},
    make("summary", {}, mark, " ", make("span.unit", {}, facts.join(" · ")), " ", make("span.prompt", {}, line)),
    make("h3", {}, t("Prompt")), make("pre", { tabindex: "0", "aria-label": t("prompt") }, visible(prompt)),
    make("h3", {}, t("Answer")), make("pre", { tabindex: "0", "aria-label": t("answer") }, visible(completion)),
  );
}

export function timeTable(box, runs) {
  const key = JSON.stringify(runs.map((run) => [run.label, run.stages.map((s) => [s.name, s.state, s.seconds, s.planned])]));
  if (box.dataset.shown === key) return;
  box.dataset.shown = key;
  const several = runs.length > 1;
  const head = [...(several ? ["run"] : []), "stage", "", "planned", "measured", "of the plan"].map((word) => word && t(word));
  const rows = runs.flatMap((run) => [...run.stages.map((stage) => row(run, stage)), total(run)]);

  function row(run, { name, state, planned, seconds }) {
    return cells(run, visible(name), t(STATES[state]), planned, seconds);
  }
  function total(run) {
    const sum = (name) => run.stages.reduce((all, stage) => all + (stage[name] ?? 0), 0) || null;
    return cells(run, t("all"), "", sum("planned"), sum("seconds"), ".all");
  }
  function cells(run, stage, state, planned, seconds, kind = "") {
    const share = planned && seconds !== null ? t("{n} %", { n: Math.round((100 * seconds) / planned) }) : "–";
    const first = several ? [visible(run.label), stage] : [stage];
    const body = [...first, state, duration(planned), duration(seconds), share];
    return make(`tr${kind}`, {}, ...body.map((text, i) => make(i >= body.length - 3 ? "td.n" : "td", {}, text)));
  }
  const heads = head.map((text, i) => make(i >= head.length - 3 ? "th.n" : text ? "th" : "td", {}, text));
  const table = make("table", {}, make("thead", {}, make("tr", {}, ...heads)), make("tbody", {}, ...rows));
  box.replaceChildren(make("div.scroll", { tabindex: "0", role: "group", "aria-label": t("Times of the stages") }, table));
}
