// A model's text as nodes: keeps whitespace; shows Markdown's headings, lists, quotes, rules, tables, code, bold and
// italic, and <answer>. Links and images stay as written: a model's text must not lead anywhere.
//
// Each line is one element, so that a frame of a streamed answer changes only the last line. The format's characters
// (asterisks, backticks, fences, ...) stay in the nodes as `.mark`; the style sheet hides them unless tokens are shown,
// when every character belongs to a token. A token is cut where a line or a format begins; its parts share an index.

import { make } from "./dom.js";

// A mark beside a letter, a digit or a bracket is arithmetic: (1+2)*(3+4)*(5).
const INLINE = new RegExp(
  [
    "(`+)(?!`)(.+?)(?<!`)\\1(?!`)",
    "(?<![\\w*)\\]])\\*\\*(?=[^\\s*])(.+?)(?<=[^\\s*])\\*\\*(?![\\w*(\\[])",
    "(?<![\\w*_)\\]])([*_])(?=[^\\s*_])(.+?)(?<=[^\\s*_])\\4(?![\\w*_(\\[])",
    "<(\\/?)(answer|think)>",
  ].join("|"),
  "g",
);
// What a line is, by its first characters; `mark` says whether they are hidden.
const BLOCKS = [
  { name: (all) => `h${all.trim().length}`, form: /^ {0,3}#{1,6}[ \t]+(?=\S)/, mark: true },
  { name: () => "rule", form: /^ {0,3}([-*_])(?: ?\1){2,}[ \t]*$/, mark: true },
  { name: (all) => `item.${level(all)}`, form: /^ {0,12}[-*+][ \t]+(?=\S)/, mark: true },
  { name: (all) => `numbered.${level(all)}`, form: /^ {0,12}\d{1,3}[.)][ \t]+(?=\S)/, mark: false },
  { name: () => "quote", form: /^ {0,3}>[ \t]?/, mark: true },
  { name: () => "row", form: /^\s*\|.*\|\s*$/, mark: false },
];
const level = (all) => `in${Math.min(3, Math.floor(/^ */.exec(all)[0].length / 2))}`;
const FENCE = /^\s*(```|~~~)/;
const LONGEST = 2000; // most characters of a line that is searched for formats: the search may take quadratic time

// Makes `box` show `text`. `tokens`, [{ text, look, tag }] in order, add up to `text`; without them the text is
// plain. A token without text shows its tag, at the start of the first line or the end of its own. `blocks`: also show
// headings, lists and the like; not in thoughts, where a line that begins with a minus may be arithmetic.
export function paint(box, text, tokens = null, blocks = false) {
  const lines = cut(text);
  const starts = tokens && offsets(tokens);
  const drawn = (box.drawn ??= []); // { key, node } of each line
  let first = 0;
  lines.forEach((line, place) => {
    while (starts && first + 1 < starts.length && starts[first + 1] <= line.start) first += 1;
    const owners = tokens && { tokens, starts, first };
    const key = `${line.kind} ${owners ? `${first}+${count(owners, line)}` : "plain"} ${line.text}`;
    if (drawn[place]?.key === key) return;
    const node = draw(line, owners, blocks);
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

// What a line is, and how many characters at its beginning say so: { name, size, mark }, or null.
export function blockOf(line) {
  if (line.length > LONGEST) return null;
  for (const { name, form, mark } of BLOCKS) {
    const [all] = form.exec(line) ?? [];
    if (all) return { name: name(all), size: all.length, mark };
  }
  return null;
}

// Stretches of one line: { from, to, name }; name is null, "mark", "strong", "em", "code", "tag" or "given" (inside
// <answer>). The line's first `size` characters are already known to be a mark.
export function stretches(line, size = 0) {
  const found = size ? [{ from: 0, to: size, name: "mark" }] : [];
  if (line.length > LONGEST) return [{ from: 0, to: line.length, name: null }];
  let at = size;
  let given = false;
  const add = (to, name) => {
    if (to > at) found.push({ from: at, to, name: name ?? (given ? "given" : null) });
    at = to;
  };
  for (const match of line.matchAll(INLINE)) {
    if (match.index < at) continue;
    const [all, ticks, , bold, italic, , slash, tag] = match;
    const end = match.index + all.length;
    const mark = tag ? 0 : bold ? 2 : italic ? 1 : ticks.length;
    add(match.index);
    if (tag) {
      add(end, "tag");
      if (tag === "answer") given = !slash;
    } else {
      add(at + mark, "mark");
      add(end - mark, bold ? "strong" : italic ? "em" : "code");
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

function draw(line, owners, blocks) {
  const [kind, side] = line.kind.split(".");
  const block = blocks && kind === "text" ? blockOf(line.text) : null;
  const shape = kind !== "text" ? `.fence.${side}` : block ? `.${block.name}` : "";
  const box = make(kind === "code" ? "code.line" : `div.line${shape}`, { dir: "auto" });
  const parts = kind === "text" ? stretches(line.text, block?.mark ? block.size : 0) : [{ from: 0, to: line.text.length, name: null }];
  for (const { from, to, name } of parts) {
    if (to === from) continue;
    const home = name === null ? box : make(["strong", "em", "code"].includes(name) ? name : `span.${name}`);
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

// The tokens without text in a line. Those at its end count only in the last line: the end of any other line is the
// start of the next.
const empty = ({ tokens, starts }, { start, end, last }) =>
  tokens.flatMap(({ text, tag }, i) => (!text && tag && starts[i] >= start && (starts[i] < end || last) ? [i] : []));

// [token, from, to] of the tokens that cover a stretch of the text.
function* owned({ starts, first }, from, to) {
  for (let i = first; i < starts.length && starts[i] < to; i += 1) {
    const next = i + 1 < starts.length ? starts[i + 1] : Infinity;
    if (next > from) yield [i, Math.max(from, starts[i]), Math.min(to, next)];
  }
}
