// Elements from data. Text enters the page only through textContent, so whatever a model wrote stays text.

// make("button.quiet", { type: "button", title: "..." }, "text", child): tag and classes, attributes, children.
export function make(kind, attributes = {}, ...children) {
  const [tag, ...classes] = kind.split(".");
  const made = document.createElement(tag);
  if (classes.length) made.className = classes.join(" ");
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value != null) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child != null));
  return made;
}

// Sets textContent only if it differs: assigning an equal text would clear a selection and trigger screen readers.
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

export const find = (id) => document.getElementById(id);

export const number = (n, digits = 0) =>
  n.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits }).replaceAll(",", "\u2009");

export const seconds = (s) => (s < 1 ? `${Math.round(s * 1000)} ms` : `${number(s, s < 10 ? 1 : 0)} s`);
