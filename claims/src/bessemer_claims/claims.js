const root = document.documentElement;
const question = document.querySelector("h1 .question");
const everything = document.querySelector("main");
const cards = [...document.querySelectorAll(".claim")];
const filters = [...document.querySelectorAll(".answers button")];
const search = document.getElementById("search");
const showing = document.getElementById("showing");
const clear = document.getElementById("everything");
const counted = [...showing.querySelectorAll("span")].map((span) => [span, span.textContent]);

const inLanguage = (element) => element.querySelector(root.lang === "en" ? ".en" : ".zh")?.textContent ?? element.textContent;

function named() {
  const card = document.getElementById(decodeURIComponent(location.hash.slice(1)))?.closest(".claim");
  document.title = (card ? `${card.id}: ${inLanguage(card.querySelector("h3"))} · ` : "") + inLanguage(question);
}

function show(language) {
  root.lang = language;
  named();
}

function remember(language) {
  const address = new URL(location.href);
  address.searchParams.set("lang", language === "en" ? "en" : "zh");
  try {
    history.replaceState(null, "", address);
  } catch {
    // a page without an address of its own keeps its language until it is closed
  }
}

document.getElementById("language").addEventListener("click", () => {
  show(root.lang === "en" ? "zh-Hans" : "en");
  remember(root.lang);
});
const asked = new URLSearchParams(location.search).get("lang");
if ((asked ?? navigator.language).startsWith("zh")) show("zh-Hans");

// Cards that have every chosen answer and every word of the search, in either language.
const plain = new Map(cards.map((card) => [card, card.textContent.toLowerCase().replaceAll("\u202f", " ")]));

function choose() {
  const kinds = filters.filter((button) => button.getAttribute("aria-pressed") === "true").map((button) => button.dataset.kind);
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  const on = kinds.length + words.length > 0;
  let number = 0;
  for (const card of cards) {
    const chosen = on && kinds.every((kind) => card.classList.contains(kind)) &&
      (words.join("") === card.id.toLowerCase() || words.every((word) => plain.get(card).includes(word)));
    card.classList.toggle("chosen", chosen);
    number += chosen;
  }
  everything.classList.toggle("only", on);
  for (const chapter of everything.querySelectorAll(".chapter")) chapter.open = on;
  showing.hidden = clear.hidden = !on;
  for (const [span, text] of counted) span.textContent = text.replace("…", String(number));
  if (on) document.getElementById("all").scrollIntoView();
}

for (const button of filters) {
  button.addEventListener("click", () => {
    const on = button.getAttribute("aria-pressed") !== "true";
    for (const other of button.parentElement.children) other.setAttribute("aria-pressed", String(on && other === button));
    choose();
  });
}
search.addEventListener("input", choose);
search.form.addEventListener("submit", (event) => event.preventDefault());

function all() {
  search.value = "";
  for (const button of filters) button.setAttribute("aria-pressed", "false");
  choose();
}

clear.addEventListener("click", () => {
  all();
  search.focus();
});

// A link to a card copies its claim and its address in this language; where that is not allowed, the address bar has it.
for (const button of document.querySelectorAll(".share")) {
  button.addEventListener("click", async () => {
    const card = button.closest(".claim");
    remember(root.lang);
    location.hash = card.id;
    try {
      await navigator.clipboard.writeText(`${document.title}\n${location.href}`);
      button.classList.add("copied");
      setTimeout(() => button.classList.remove("copied"), 2000);
    } catch {
      // the address bar has it
    }
  });
}

function reveal() {
  named();
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (!target) return;
  if (target.matches(".claim:not(.chosen)") && everything.classList.contains("only")) all();
  const chapter = target.closest(".chapter");
  if (chapter) {
    chapter.open = true;
    target.scrollIntoView();
  }
}

addEventListener("hashchange", reveal);
reveal();

// Paper has no folds: printing opens them all, and closes again what was closed.
let closed = [];
addEventListener("beforeprint", () => {
  closed = [...document.querySelectorAll("details:not([open])")];
  for (const fold of closed) fold.open = true;
});
addEventListener("afterprint", () => {
  for (const fold of closed) fold.open = false;
});
