// The panel of conversations: open one, delete one, save the open one as a file.

import { find, make } from "./dom.js";
import { asJson, asMarkdown, save } from "./export.js";
import { language, t } from "./words.js";

export class Chats {
  // talks: the stored conversations; turns(): the open one; open(id), remove(id): called for the user's choice.
  constructor(talks, turns, open, remove) {
    Object.assign(this, { talks, turns, opening: open, remove, panel: find("chats"), opener: find("list") });
    this.rows = make("ol.talks");
    const file = (kind, made) =>
      make("button.quiet", { type: "button", onclick: () => this.turns().length && made(this.turns()) }, t(kind));
    this.files = make(
      "div.choices",
      {},
      file("Save as Markdown", (all) => save("conversation.md", "text/markdown", asMarkdown(all))),
      file("Save as JSON", (all) => save("conversation.json", "application/json", asJson(all))),
    );
    this.panel.append(
      make(
        "div.head",
        {},
        make("h2", {}, t("Conversations")),
        make("button.quiet", { type: "button", onclick: () => this.show(false) }, t("Close")),
      ),
      this.files,
      this.rows,
      make("p.unit", {}, t("Stored in this browser only.")),
    );
    this.opener.addEventListener("click", () => this.show(this.panel.hidden));
    this.panel.addEventListener("keydown", (event) => {
      if (event.key !== "Escape") return;
      event.stopPropagation();
      this.show(false);
    });
  }

  show(on) {
    this.panel.hidden = !on;
    this.opener.setAttribute("aria-expanded", String(on));
    if (on) this.draw();
    (on ? this.panel.querySelector("button") : this.opener).focus();
  }

  draw() {
    if (this.panel.hidden) return;
    const all = this.talks.all();
    this.files.hidden = !this.turns().length;
    this.rows.replaceChildren(
      ...all.map(({ id, name, at }) =>
        make(
          "li",
          {},
          make(
            "button.talk",
            { type: "button", "aria-current": id === this.talks.id ? "true" : null, onclick: () => this.opening(id) },
            make("span", { dir: "auto" }, name),
            make("small", {}, when(at)),
          ),
          make(
            "button.quiet",
            { type: "button", "aria-label": t("Delete {name}", { name }), title: t("Delete"), onclick: () => this.remove(id) },
            "×",
          ),
        ),
      ),
      ...(all.length ? [] : [make("li.unit", {}, t("No conversation yet."))]),
    );
  }
}

const when = (at) =>
  new Date(at).toLocaleString(language === "zh" ? "zh-CN" : "en", { dateStyle: "medium", timeStyle: "short" });
