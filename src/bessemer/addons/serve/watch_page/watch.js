// The live page: requests the state of the runs every second, and what is on the screen when a run has new lines.
// Everything from a run's files enters the page through textContent.

import { find, make, say } from "./dom.js";
import { HeatMap } from "./heat.js";
import { alarmList, rolloutList, runList, timeTable, visible } from "./parts.js";
import { Plot } from "./plot.js";
import { learn, offerOther, t, told, translatePage } from "./words.js";

const EVERY = 1000;
const HUES = 6;
const OTHERS = 6; // plots shown for a stage that has none of the default ones
const KEPT = "bessemer.watch.1";

const view = { stage: null, over: "step", chosen: {}, hidden: new Set(), span: null, ...kept() };
const pictures = new Map(); // by "stage panel": { plot, seen, stale }
const maps = new Map(); // by "stage layer"
let state = null;
let versions = "";

async function get(path, query = {}) {
  const reply = await fetch(`${path}?${new URLSearchParams(query)}`);
  if (!reply.ok) throw new Error(String(reply.status));
  const body = await reply.json();
  learn(body);
  return body;
}

async function tick() {
  const began = performance.now();
  try {
    if (!document.hidden || !state) {
      state = await get("api/state");
      const now = JSON.stringify(state.runs.map((run) => [run.label, run.version]));
      frame();
      if (now !== versions) {
        versions = now;
        stale();
      }
      await refresh();
    }
  } catch {
    say(find("notice"), t("The server does not answer. This page keeps trying and resumes when it does."));
  }
  // poll a busy machine less often
  setTimeout(tick, Math.max(state?.runs.some((run) => run.reading) ? 300 : EVERY, 5 * (performance.now() - began)));
}

function stale() {
  for (const picture of [...pictures.values(), ...maps.values()]) picture.stale = true;
}

// Draws what needs no further request: runs, stages, alarms, times, and the list of plots.
function frame() {
  const { runs, stages } = state;
  document.title = `${runs.map(({ label }) => visible(label)).join(", ")} · Bessemer watch`;
  complain(runs.flatMap((run) => run.trouble));
  runList(find("runs"), runs, view.hidden, (label) => {
    view.hidden.has(label) ? view.hidden.delete(label) : view.hidden.add(label);
    changed();
  });
  if (!view.picked || !stages.some(({ name }) => name === view.stage)) {
    const now = newest();
    if (now !== view.stage) Object.assign(view, { stage: now, span: null }); // the run has moved on
  }
  const drawn = stages.filter(({ panels, name }) => panels.length || name === view.stage);
  keyed(find("stages"), drawn, ({ name }) => name, ({ name }) => {
    const pick = () => {
      Object.assign(view, { stage: name, span: null, picked: true });
      changed();
    };
    return make("button", { type: "button", onclick: pick }, visible(name));
  }).forEach((button, i) => button.setAttribute("aria-pressed", String(drawn[i].name === view.stage)));
  alarmList(find("alarms"), runs);
  timeTable(find("clock"), runs);
  arrange(stages.find(({ name }) => name === view.stage) ?? { panels: [], layers: [] });
  talk();
}

// The stage that a run is in, or else the last one that trained.
function newest() {
  const drawn = new Set(state.stages.filter(({ panels }) => panels.some(({ first }) => first)).map(({ name }) => name));
  const all = state.runs.flatMap((run) => run.stages).filter(({ name }) => drawn.has(name));
  return (all.find((stage) => stage.state === "running") ?? all.at(-1) ?? state.stages[0])?.name ?? null;
}

function arrange({ panels, layers }) {
  const known = panels.some((panel) => panel.first);
  const shown = panels.filter((panel, i) => view.chosen[panel.key] ?? (known ? panel.first : i < OTHERS));
  keyed(find("list"), panels, ({ key }) => key, ({ key, title }) => {
    const box = make("input", { type: "checkbox", onchange: () => ((view.chosen[key] = box.checked), changed()) });
    return make("label", {}, box, ` ${visible(told(title))}`);
  }).forEach((row, i) => (row.firstChild.checked = shown.includes(panels[i])));
  find("choose").hidden = !panels.length;
  hold(find("pictures"), pictures, shown.map((panel) => [panel.key, () => new Plot(panel, zoom)]));
  hold(find("maps"), maps, layers.map((layer) => [layer.key, () => new HeatMap(layer)]));
  find("experts").hidden = !layers.length;
  find("empty").hidden = shown.length > 0;
  say(find("empty"), t(panels.length ? "No curve is chosen." : "No stage has written a metric yet."));
}

// Gives a box one child per item; a child whose key was already there is kept, with its focus.
function keyed(box, items, key, build) {
  const before = new Map([...box.children].map((child) => [child.dataset.key, child]));
  const after = items.map((item) => {
    const child = before.get(key(item)) ?? build(item);
    child.dataset.key = key(item);
    return child;
  });
  if (after.length !== box.children.length || after.some((child, i) => child !== box.children[i])) {
    box.replaceChildren(...after);
  }
  return after;
}

// Keeps one plot for each entry [key, build] of this stage, built when first needed.
function hold(box, all, entries) {
  const wanted = entries.map(([key, build]) => {
    const name = `${view.stage} ${key}`;
    if (!all.has(name)) {
      const drawing = build();
      const picture = { key, drawing, seen: false, stale: true };
      drawing.figure.dataset.key = name;
      drawing.figure.picture = picture;
      watcher.observe(drawing.figure);
      all.set(name, picture);
    }
    return all.get(name).drawing.figure;
  });
  if (wanted.length !== box.children.length || wanted.some((one, i) => one !== box.children[i])) {
    box.replaceChildren(...wanted);
  }
}

const watcher = new IntersectionObserver(
  (entries) => {
    for (const { target, isIntersecting } of entries) target.picture.seen = isIntersecting;
    refresh().catch(() => {}); // the next tick says so
  },
  { rootMargin: "200px" },
);

// Requests what is on the screen and out of date.
async function refresh() {
  const stage = view.stage;
  if (stage === null) return;
  const due = (all) => [...all.values()].filter((one) => one.seen && one.stale && one.drawing.figure.isConnected);
  const jobs = due(pictures).map(async (picture) => {
    picture.stale = false;
    const [low, high] = view.span ?? [];
    const query = { stage, panel: picture.key, over: view.over, ...(view.span ? { low, high } : {}) };
    const { lines } = await failing(picture, get("api/curves", query));
    if (stage === view.stage) picture.drawing.update(looks(lines, picture.drawing.panel.ordered), view.span);
  });
  jobs.push(...due(maps).map(async (picture) => {
    picture.stale = false;
    const { maps: found } = await failing(picture, get("api/experts", { stage, layer: picture.key }));
    const shown = found.filter(({ run }) => !view.hidden.has(state.runs[run].label));
    picture.drawing.update(shown.map((map) => ({ ...map, label: state.runs.length > 1 ? name(map.run) : "" })));
  }));
  if (answers.stage !== stage || answers.version !== versions) {
    Object.assign(answers, { stage, version: versions });
    jobs.push(failing(answers, get("api/rollouts", { stage })).then(({ rollouts }) => {
      const shown = rollouts.filter(({ run }) => !view.hidden.has(state.runs[run].label));
      rolloutList(find("answers"), shown, stage, state.runs.length > 1 ? name : null);
    }));
  }
  await Promise.all(jobs);
}

const answers = { stage: null, version: null };
const name = (run) => visible(state.runs[run].label);

async function failing(picture, reply) {
  try {
    return await reply;
  } catch (error) {
    Object.assign(picture, { stale: true, version: null });
    throw error;
  }
}

// One run: a colour for each metric. Several runs: a colour for each run, a dash pattern for each metric.
function looks(lines, ordered) {
  const several = state.runs.length > 1;
  const metrics = [...new Set(lines.map(({ metric }) => metric))];
  const step = (HUES - 1) / Math.max(1, metrics.length - 1);
  return lines
    .filter(({ run }) => !view.hidden.has(state.runs[run].label))
    .map((measured) => {
      const line = { ...measured, label: told(measured.label) };
      const at = metrics.indexOf(line.metric);
      const dash = `d${((at + Math.floor(at / HUES)) % HUES) + 1}`; // shifts at every round of the hues
      if (!several) {
        const shade = ordered && metrics.length > 1;
        return { ...line, look: `${shade ? `r${1 + Math.round(at * step)}` : `c${(at % HUES) + 1}`} ${dash}` };
      }
      const label = metrics.length > 1 ? `${name(line.run)} · ${line.label}` : name(line.run);
      return { ...line, label, look: `c${(line.run % HUES) + 1} ${dash}` };
    });
}

function zoom(span) {
  view.span = span;
  changed();
}

function changed() {
  const { over, chosen } = view;
  try {
    localStorage.setItem(KEPT, JSON.stringify({ over, chosen }));
  } catch {
    // a browser without storage just forgets the choice
  }
  stale();
  answers.version = null;
  frame();
  refresh().catch(() => {}); // the next tick says so
}

function kept() {
  try {
    const { over, chosen } = JSON.parse(localStorage.getItem(KEPT));
    return { over: ["step", "tokens", "minutes"].includes(over) ? over : "step", chosen: { ...chosen } };
  } catch {
    return {};
  }
}

function complain(sentences) {
  say(find("notice"), sentences.map((sentence) => t("{sentence}.", { sentence: visible(told(sentence)) })).join(" "));
}

function talk() {
  const models = state.runs.filter((run) => run.model);
  find("talk").hidden = !models.length;
  keyed(find("models"), models, ({ label, model }) => `${label} ${model}`, ({ label, path, model }) => {
    const command = `bessemer chat ${path}/${model}`;
    const words = state.runs.length > 1 ? `${visible(label)}, ${visible(model)}: ` : `${visible(model)}: `;
    return make("li", {}, words, make("code", {}, visible(command)), t(" or "), make("code", {}, `bessemer serve ${visible(path)}`));
  });
  find("chat").hidden = !state.chat;
  if (state.chat) find("chat").setAttribute("href", state.chat);
}

translatePage();
offerOther(find("language"));
find("over").value = view.over;
find("over").addEventListener("change", ({ target }) => {
  Object.assign(view, { over: target.value, span: null });
  for (const { drawing } of pictures.values()) drawing.hide(); // its position now means something else
  changed();
});
document.addEventListener("visibilitychange", () => !document.hidden && refresh().catch(() => {}));
tick();
