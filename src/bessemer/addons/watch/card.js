// Makes each list of rollouts a browser: pick a prompt, step through training. It shows, hides and counts what is on the
// page already; text moves through textContent alone, so what a model wrote stays text.
for (const box of document.querySelectorAll(".browser")) {
  const prompts = [...box.querySelectorAll("details")];
  const make = (tag, name, text) => {
    const made = document.createElement(tag);
    made.className = name;
    made.textContent = text;
    return made;
  };
  const bar = make("div", "controls", ""), pick = make("select", "pick", ""), dots = make("div", "dots", "");
  const back = make("button", "step", "‹"), on = make("button", "step", "›");
  pick.setAttribute("aria-label", t("prompt"));
  back.setAttribute("aria-label", t("earlier"));
  on.setAttribute("aria-label", t("later"));
  for (const prompt of prompts) pick.append(make("option", "", prompt.querySelector(".prompt").textContent));
  let moments = [], now = 0;

  const show = (place) => {
    now = Math.max(0, Math.min(moments.length - 1, place));
    moments.forEach((moment, i) => moment.classList.toggle("now", i === now));
    [...dots.children].forEach((dot, i) => dot.setAttribute("aria-pressed", i === now));
    back.disabled = now === 0;
    on.disabled = now === moments.length - 1;
  };
  const choose = (place) => {
    const share = moments.length > 1 ? now / (moments.length - 1) : 0;
    prompts.forEach((prompt, i) => { prompt.open = i === place; });
    moments = [...prompts[place].querySelectorAll(".when")];
    dots.replaceChildren(...moments.map((moment, i) => {
      const mark = moment.querySelector(".moment > i"), dot = make("button", "dot", mark ? mark.textContent : "·");
      dot.classList.add(mark ? mark.className : "unknown");
      const step = moment.dataset.step;
      dot.title = t("step {step}", { step });
      dot.setAttribute("aria-label", mark ? t("step {step}, {mark}", { step, mark: mark.title }) : dot.title);
      dot.addEventListener("click", () => show(i));
      return dot;
    }));
    show(Math.round(share * (moments.length - 1)));
  };

  pick.addEventListener("change", () => choose(pick.selectedIndex));
  back.addEventListener("click", () => show(now - 1));
  on.addEventListener("click", () => show(now + 1));
  bar.addEventListener("keydown", (event) => {
    if (event.target === pick || !["ArrowLeft", "ArrowRight"].includes(event.key)) return;
    event.preventDefault();
    show(now + (event.key === "ArrowLeft" ? -1 : 1));
  });
  bar.append(pick, back, dots, on);
  box.prepend(bar);
  box.classList.add("live");
  choose(0);
  const telling = moments.findIndex((moment) => "telling" in moment.dataset);
  if (telling >= 0) show(telling);
}
