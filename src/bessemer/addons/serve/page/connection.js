// Whether the server is there, and the line above the question that says so. A lost server is retried at growing
// intervals until it answers; for a server that wants a key, the page asks the user.

import { models, Trouble } from "./api.js";
import { find, make, say } from "./dom.js";
import { setKey } from "./state.js";
import { t } from "./words.js";

const FIRST = 1; // seconds between retries, at first
const LAST = 15; // and at most
const SHOWN = 8; // seconds that a temporary notice stays

export class Connection {
  // found(models): called when the server answers.
  constructor(found) {
    Object.assign(this, {
      found,
      ready: false,
      box: find("notice"),
      form: find("key"),
      timer: null,
      passing: null,
      rounds: 0,
    });
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      setKey(find("key-text").value.trim());
      find("key-text").value = "";
      this.begin();
    });
    addEventListener("online", () => this.timer && this.begin());
  }

  async begin(wait = FIRST) {
    clearTimeout(this.timer);
    this.timer = null;
    const round = (this.rounds += 1); // only the latest attempt counts: four columns may lose the server at once
    try {
      const known = await models();
      if (round !== this.rounds) return;
      const was = this.ready;
      this.ready = true;
      this.form.hidden = true;
      if (!was) this.dismiss();
      this.found(known);
    } catch (failure) {
      if (!(failure instanceof Trouble)) throw failure;
      if (round !== this.rounds) return;
      this.ready = false;
      if (failure.kind === "key") return this.askKey(failure.message);
      const again = wait > 2 ? "{words} Trying again every {n} seconds." : "{words} Trying again.";
      this.show(t(again, { words: t(failure.message), n: wait }), t("Now"), () => this.begin());
      this.timer = setTimeout(() => this.begin(Math.min(LAST, wait * 2)), wait * 1000);
    }
  }

  // Called when an answer fails, with what that says about the server.
  trouble(kind) {
    if (kind === "gone" || kind === "key" || kind === "model") this.begin();
  }

  askKey(words) {
    say(this.form.querySelector("label"), t(words));
    this.dismiss();
    this.form.hidden = false;
    find("key-text").focus();
  }

  // A short notice that disappears by itself.
  notice(words, action, act) {
    if (!this.ready) return;
    this.show(words, action, act);
    this.passing = setTimeout(() => this.dismiss(), SHOWN * 1000);
  }

  show(words, action, act) {
    clearTimeout(this.passing);
    this.box.replaceChildren(make("span", {}, words));
    if (action) this.box.append(make("button.quiet", { type: "button" }, action));
    this.box.querySelector("button")?.addEventListener("click", () => {
      this.dismiss();
      act();
    });
    this.box.hidden = false;
  }

  dismiss() {
    clearTimeout(this.passing);
    this.box.hidden = true;
  }
}
