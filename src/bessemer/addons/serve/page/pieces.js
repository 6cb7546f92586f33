// Which tokens produced which stretch of a streamed text.
//
// A chunk holds text and the tokens sampled since the last one, but they do not match one to one: a character may take
// several tokens, the server may hold text back, and <think>, </think> and other control tokens have no text of their
// own. Tokens wait here until their text comes. Tokens that cannot be told apart become one piece with several tokens,
// never a wrong one.

const BYTES = "bytes:";
const END = "</think>";
const TAG = /^<\S+>$/;

export class Pieces {
  constructor(answer) {
    this.answer = answer;
    this.waiting = [];
  }

  // Adds a chunk: its text goes to answer.thought or answer.text, with pieces that add up to it.
  add({ thought, text, tokens, experts }) {
    const { answer, waiting } = this;
    waiting.push(...tokens.map((token, i) => ({ ...token, experts: experts[i] ?? null })));
    if (text && !answer.text) this.leaveThought();
    if (thought) this.cover("thought", thought);
    if (text) this.cover("text", text);
    if (!text && answer.thought && !answer.text) this.leaveThought();
  }

  // </think> has no text and ends the thought: it and the tokens that wait before it belong to the thought.
  leaveThought() {
    const end = this.waiting.findLastIndex((token) => token.t === END);
    this.waiting.splice(0, end + 1).forEach((token) => this.put("thought", "", [token]));
  }

  cover(part, text) {
    const { waiting } = this;
    let at = 0;
    while (waiting.length && at < text.length) {
      const size = this.match(text, at);
      if (size) {
        const of = waiting.splice(0, size);
        const said = spell(of);
        this.put(part, said, of);
        at += said.length;
      } else if (TAG.test(waiting[0].t) || !waiting[0].t.trim()) {
        this.put(part, "", waiting.splice(0, 1)); // a tag, or white space that the server dropped
      } else break;
    }
    if (at < text.length) this.put(part, text.slice(at), waiting.splice(0));
    this.answer[part] += text;
  }

  // How many waiting tokens spell the next part of the text: one, or the few that share a character. 0: none.
  match(text, at) {
    const { waiting } = this;
    for (let size = 1; size <= waiting.length; size += 1) {
      const said = spell(waiting.slice(0, size));
      if (said && text.startsWith(said, at)) return size;
      if (!waiting[size - 1].t.startsWith(BYTES)) return 0;
    }
    return 0;
  }

  put(part, text, of) {
    const kept = of
      .filter((token) => Number.isFinite(token.p))
      .map(({ t, p, top, experts }) => ({ t, p, top, experts }));
    this.answer.pieces[part].push({ text, of: kept });
  }
}

// The text of a few tokens; tokens that are not whole characters are joined byte by byte.
function spell(group) {
  if (!group[0].t.startsWith(BYTES)) return group[0].t;
  return new TextDecoder().decode(Uint8Array.from(group.flatMap((token) => token.bytes ?? [])));
}
