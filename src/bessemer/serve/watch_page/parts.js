// The parts of the page that are text: runs, alarms, rollouts, times. Models and files are hostile: text enters through
// textContent alone, and characters that a page obeys without showing them are shown.

import { make, say } from "./dom.js";
import { short } from "./plot.js";

const STATES = { running: "running", finished: "finished", stopped: "stopped", waiting: "not begun" };

// Control characters as their pictures; marks that turn the direction of text, as a box.
export function visible(text) {
  return String(text)
    .replace(/[\u0000-\u0008\u000b-\u001f]/g, (one) => String.fromCharCode(0x2400 + one.charCodeAt(0)))
    .replace(/[\u007f-\u009f\u200e\u200f\u202a-\u202e\u2066-\u2069]/g, "\ufffd");
}

export function duration(seconds) {
  if (seconds === null) return "–";
  if (seconds < 60) return `${seconds < 10 ? seconds.toFixed(1) : Math.floor(seconds)} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ${String(Math.floor(seconds % 60)).padStart(2, "0")} s`;
  const minutes = Math.floor(seconds / 60);
  return `${Math.floor(minutes / 60)} h ${String(minutes % 60).padStart(2, "0")} min`;
}

// A button for each run: its colour, its name and how it is; pressed while its curves are shown.
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
  if (!at) return "no stage has begun";
  if (run.stages.every(({ state }) => state === "finished")) return "finished";
  const step = at.step === null ? "" : `, step ${short(at.step)}`;
  const quiet = at.state === "running" || at.quiet === null ? "" : `, last line ${duration(at.quiet)} ago`;
  return `${run.reading ? "reading · " : ""}${visible(at.name)} ${STATES[at.state]}${step}${quiet}`;
}

export function alarmList(box, runs) {
  const all = runs.flatMap((run) => run.alarms.map((alarm) => ({ ...alarm, run: run.label })));
  const key = JSON.stringify(all);
  if (box.dataset.shown === key) return;
  box.dataset.shown = key;
  box.hidden = !all.length;
  box.replaceChildren(
    ...all.sort((a, b) => b.active - a.active).map((alarm) => {
      const where = `${runs.length > 1 ? `${visible(alarm.run)}, ` : ""}${visible(alarm.stage)}, `;
      const when = alarm.active ? `since step ${alarm.step}` : `at step ${alarm.step}, over now`;
      const advice = alarm.cause && `Likely cause: ${alarm.cause}. What to do: ${alarm.advice}.`;
      return make(
        `div.alarm${alarm.active ? "" : ".over"}`, {},
        make("b", {}, visible(alarm.title)), make("span.unit", {}, ` ${where}${when}`),
        make("p", {}, `${visible(alarm.message)}.`), advice ? make("p.unit", {}, visible(advice)) : null,
      );
    }),
  );
}

// The newest rollouts, the newest first. Those that are on the page stay as they are, opened or folded.
export function rolloutList(box, rollouts, stage, name) {
  const before = new Map([...box.children].map((child) => [child.dataset.key, child]));
  const newest = [...rollouts].sort((a, b) => (b.step ?? 0) - (a.step ?? 0) || b.number - a.number);
  const after = newest.map((rollout) => {
    const key = JSON.stringify([stage, rollout]);
    const child = before.get(key) ?? answer(rollout, name);
    child.dataset.key = key;
    return child;
  });
  if (!after.length) after.push(make("p.unit", {}, "This stage has no rollouts."));
  if (after.some((child, i) => child !== box.children[i]) || after.length !== box.children.length) {
    box.replaceChildren(...after);
  }
}

function answer({ run, step, prompt, completion, reward, correct, length, formatted }, name) {
  const facts = [`step ${step ?? "?"}`];
  if (name) facts.unshift(name(run));
  if (reward !== null) facts.push(`reward ${short(reward)}`);
  if (length !== null) facts.push(`${short(length)} tokens`);
  if (formatted === false) facts.push("not well-formed");
  const mark = correct === null ? null : make(correct ? "i.right" : "i.wrong", {}, correct ? "✓ right" : "✗ wrong");
  const line = visible(prompt).replace(/\s+/g, " ").slice(0, 160);
  return make(
    "details", {},
    make("summary", {}, mark, make("span.unit", {}, facts.join(" · ")), make("span.prompt", {}, line)),
    make("h3", {}, "Prompt"), make("pre", { tabindex: "0", "aria-label": "prompt" }, visible(prompt)),
    make("h3", {}, "Answer"), make("pre", { tabindex: "0", "aria-label": "answer" }, visible(completion)),
  );
}

export function timeTable(box, runs) {
  const key = JSON.stringify(runs.map((run) => [run.label, run.stages.map((s) => [s.name, s.state, s.seconds, s.planned])]));
  if (box.dataset.shown === key) return;
  box.dataset.shown = key;
  const several = runs.length > 1;
  const head = [...(several ? ["run"] : []), "stage", "", "planned", "measured", "of the plan"];
  const rows = runs.flatMap((run) => [...run.stages.map((stage) => row(run, stage)), total(run)]);

  function row(run, { name, state, planned, seconds }) {
    return cells(run, visible(name), STATES[state], planned, seconds);
  }
  function total(run) {
    const sum = (name) => run.stages.reduce((all, stage) => all + (stage[name] ?? 0), 0) || null;
    return cells(run, "all", "", sum("planned"), sum("seconds"), ".all");
  }
  function cells(run, stage, state, planned, seconds, kind = "") {
    const share = planned && seconds !== null ? `${Math.round((100 * seconds) / planned)} %` : "–";
    const first = several ? [visible(run.label), stage] : [stage];
    const body = [...first, state, duration(planned), duration(seconds), share];
    return make(`tr${kind}`, {}, ...body.map((text, i) => make(i >= body.length - 3 ? "td.n" : "td", {}, text)));
  }
  const heads = head.map((text, i) => make(i >= head.length - 3 ? "th.n" : text ? "th" : "td", {}, text));
  const table = make("table", {}, make("thead", {}, make("tr", {}, ...heads)), make("tbody", {}, ...rows));
  box.replaceChildren(make("div.scroll", { tabindex: "0", role: "group", "aria-label": "Times of the stages" }, table));
}
