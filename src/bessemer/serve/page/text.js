// A model's text as nodes: whitespace kept, code fences, `code`, **bold** and <answer> lightly formatted.
//
// One element per line, so that a frame of a streamed answer touches the last line only. The characters that make the
// format (asterisks, backticks, fences) stay in the nodes as `.mark`; the style sheet hides them unless tokens are
// shown, when every character belongs to a token. A token is cut where a line or a format begins; cuts share an index.

import { make } from "./dom.js";

const INLINE =
  /(`+)(?!`)(.+?)(?<!`)\1(?!`)|(?<![\w*])\*\*(?=[^\s*])(.+?)(?<=[^\s*])\*\*(?![\w*])|<(\/?)(answer|think)>/g;
const FENCE = /^\s*(```|~~~)/;
const LONGEST = 2000; // characters of a line that is still searched for formats: the search may take their square

// Makes `box` show `text`. `tokens`, [{ text, look, tag }] in order, add up to `text`; without them the text is
// plain. A token without text shows its tag, at the head of the first line or the end of its own.
export function paint(box, text, tokens = null) {
  const lines = cut(text);
  const starts = tokens && offsets(tokens);
  const drawn = (box.drawn ??= []); // { key, node } of each line
  let first = 0;
  lines.forEach((line, place) => {
    while (starts && first + 1 < starts.length && starts[first + 1] <= line.start) first += 1;
    const owners = tokens && { tokens, starts, first };
    const key = `${line.kind} ${owners ? `${first}+${count(owners, line)}` : "plain"} ${line.text}`;
    if (drawn[place]?.key === key) return;
    const node = draw(line, owners);
    if (drawn[place]) drawn[place].node.replaceWith(node);
    else box.append(node);
    drawn[place] = { key, node };
  });
  for (const { node } of drawn.splice(lines.length)) node.remove();
}

// Lines with their kind: text, fence (the line that opens or closes) or code. `end` counts the line break.
export function cut(text) {
  let at = 0;
  let fence = null;
  return text.split("\n").map((line, i, all) => {
    const start = at;
    const mark = FENCE.exec(line)?.[1];
    at += line.length + (i < all.length - 1 ? 1 : 0);
    let kind = fence ? "code" : "text";
    if (mark && (!fence || mark === fence)) {
      kind = fence ? "fence.close" : "fence.open";
      fence = fence ? null : mark;
    }
    return { text: line, kind, start, end: at, last: i === all.length - 1 };
  });
}

// Stretches of one line: { from, to, name }, name null, "mark", "strong", "code", "tag" or "given" (inside <answer>).
export function stretches(line) {
  const found = [];
  if (line.length > LONGEST) return [{ from: 0, to: line.length, name: null }];
  let at = 0;
  let given = false;
  const add = (to, name) => {
    if (to > at) found.push({ from: at, to, name: name ?? (given ? "given" : null) });
    at = to;
  };
  for (const match of line.matchAll(INLINE)) {
    const [all, ticks, , bold, slash, tag] = match;
    const end = match.index + all.length;
    const mark = tag ? 0 : bold ? 2 : ticks.length;
    add(match.index);
    if (tag) {
      add(end, "tag");
      if (tag === "answer") given = !slash;
    } else {
      add(at + mark, "mark");
      add(end - mark, bold ? "strong" : "code");
      add(end, "mark");
    }
  }
  add(line.length);
  return found;
}

const offsets = (tokens) => {
  let at = 0;
  return tokens.map(({ text }) => (at += text.length) - text.length);
};

function count({ starts, first }, line) {
  if (line.last) return starts.length - first;
  let last = first;
  while (last < starts.length && starts[last] < line.end) last += 1;
  return last - first;
}

function draw(line, owners) {
  const [kind, side] = line.kind.split(".");
  const box = make(kind === "code" ? "code.line" : `div.line${kind === "text" ? "" : `.fence.${side}`}`, {
    dir: "auto",
  });
  const parts = kind === "text" ? stretches(line.text) : [{ from: 0, to: line.text.length, name: null }];
  for (const { from, to, name } of parts) {
    if (to === from) continue;
    const home = name === null ? box : make(name === "strong" || name === "code" ? name : `span.${name}`);
    if (owners) {
      for (const [index, a, b] of owned(owners, line.start + from, line.start + to)) {
        home.append(token(owners, index, line.text.slice(a - line.start, b - line.start)));
      }
    } else home.append(line.text.slice(from, to));
    if (home !== box) box.append(home);
  }
  if (owners && line.end > line.start + line.text.length) {
    for (const [index] of owned(owners, line.end - 1, line.end)) {
      const end = token(owners, index, "");
      end.classList.add("break");
      box.append(end);
    }
  }
  for (const index of owners ? empty(owners, line) : []) {
    const made = token(owners, index, owners.tokens[index].tag);
    made.classList.add("unsaid");
    if (owners.starts[index] === 0) box.prepend(made);
    else box.append(made);
  }
  if (!line.text) {
    box.classList.add("empty");
    box.append("\n"); // gives it a height
  }
  return box;
}

const token = ({ tokens }, index, text) => make(`span.token.${tokens[index].look}`, { "data-token": index }, text);

// The tokens without text that stand in a line. At its end they are the last line's: another's end is the next one's
// start.
const empty = ({ tokens, starts }, { start, end, last }) =>
  tokens.flatMap(({ text, tag }, i) => (!text && tag && starts[i] >= start && (starts[i] < end || last) ? [i] : []));

// [token, from, to] of the tokens that cover a stretch of the text.
function* owned({ starts, first }, from, to) {
  for (let i = first; i < starts.length && starts[i] < to; i += 1) {
    const next = i + 1 < starts.length ? starts[i + 1] : Infinity;
    if (next > from) yield [i, Math.max(from, starts[i]), Math.min(to, next)];
  }
}
