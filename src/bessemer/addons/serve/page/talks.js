// The conversations that this browser stores: a list, newest first, and the turns of each under its own key.
//
// The list is rebuilt from what can be read: a broken conversation affects no other. If the storage is full, token
// details go first, those of older conversations before this one's, then this conversation's oldest turns.

import { forget, isObject, list, read, turnsOf, write } from "./state.js";

const LIST = "bessemer.talks.1";
const TALK = "bessemer.talk.1"; // + "." + id; without one: the only conversation of an earlier version
const OPEN = "bessemer.open";
const ID = /^[\w-]{1,40}$/;
const NAME = 80; // characters

export class Talks {
  constructor() {
    const old = turnsOf(read(localStorage, TALK));
    forget(TALK);
    const open = read(sessionStorage, OPEN);
    this.id = ID.test(open) && this.all().some(({ id }) => id === open) ? open : (this.all()[0]?.id ?? fresh());
    if (old.length) {
      this.fresh();
      this.save(old);
    }
  }

  // [{ id, name, at, turns }], newest first.
  all() {
    return list(read(localStorage, LIST))
      .filter((one) => isObject(one) && ID.test(one.id) && typeof one.name === "string" && Number.isFinite(one.at))
      .map(({ id, name, at, turns }) => ({ id, name: name.slice(0, NAME), at, turns }))
      .sort((one, other) => other.at - one.at);
  }

  turns(id = this.id) {
    return turnsOf(read(localStorage, `${TALK}.${id}`));
  }

  open(id) {
    this.id = id;
    write(sessionStorage, OPEN, id);
  }

  fresh() {
    this.open(fresh());
  }

  save(turns, id = this.id) {
    if (!turns.length) return this.remove(id);
    const name = turns[0].question.replace(/\s+/g, " ").slice(0, NAME);
    const others = this.all().filter((one) => one.id !== id);
    if (!this.store(id, turns, others)) return;
    const kept = this.all().find((one) => one.id === id);
    const at = kept?.turns === turns.length && kept.name === name ? kept.at : Date.now(); // the time of the last question
    write(localStorage, LIST, [{ id, name, at, turns: turns.length }, ...others]);
    write(sessionStorage, OPEN, this.id);
  }

  store(id, turns, others) {
    const place = `${TALK}.${id}`;
    if (write(localStorage, place, turns)) return true;
    for (const other of others.reverse()) {
      write(localStorage, `${TALK}.${other.id}`, this.turns(other.id).map(bare));
      if (write(localStorage, place, turns)) return true;
    }
    for (let from = 0; from < turns.length; from += 1) {
      if (write(localStorage, place, turns.slice(from).map(bare))) return true;
    }
    return false;
  }

  remove(id) {
    forget(`${TALK}.${id}`);
    write(localStorage, LIST, this.all().filter((one) => one.id !== id));
  }

  removeAll() {
    for (const { id } of this.all()) forget(`${TALK}.${id}`);
    forget(LIST);
    this.fresh();
  }
}

const fresh = () => `${Date.now().toString(36)}-${Math.floor(Math.random() * 2 ** 31).toString(36)}`;

const bare = (turn) => ({
  ...turn,
  answers: turn.answers.map((answer) => ({ ...answer, pieces: { thought: [], text: [] } })),
});
