const root = document.documentElement;
const heading = document.querySelector("h1");
const switcher = document.getElementById("language");
const filters = [...document.querySelectorAll(".verdicts button")];
const everything = document.querySelector("main");
const first = document.getElementById("headlines");

function show(language) {
  root.lang = language;
  document.title = heading.querySelector(language === "en" ? ".en" : ".zh").textContent;
}

switcher.addEventListener("click", () => show(root.lang === "en" ? "zh-Hans" : "en"));
if (navigator.language.startsWith("zh")) show("zh-Hans");

for (const button of filters) {
  button.addEventListener("click", () => {
    const on = button.getAttribute("aria-pressed") !== "true";
    for (const other of filters) other.setAttribute("aria-pressed", String(on && other === button));
    everything.classList.toggle("only", on);
    for (const card of everything.querySelectorAll(".claim")) {
      card.classList.toggle("chosen", on && card.classList.contains(button.dataset.kind));
    }
    for (const chapter of everything.querySelectorAll(".chapter")) chapter.open = on;
    if (on) first.scrollIntoView();
  });
}

function reveal() {
  const card = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  const chapter = card && card.closest(".chapter");
  if (chapter) {
    chapter.open = true;
    card.scrollIntoView();
  }
}

addEventListener("hashchange", reveal);
reveal();
