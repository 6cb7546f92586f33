// A page's text in English or Chinese: `zh` has the English text as keys, with {places} for what varies. The address
// (?lang=zh, ?lang=en) chooses the language, or else the browser does.

const asked = new URLSearchParams(location.search).get("lang") ?? navigator.language;
export const browserLanguage = () => (asked.startsWith("zh") ? "zh" : "en");

// The names of large numbers, largest first.
export const sizes = (language) =>
  language === "zh" ? [[" 万亿", 1e12], [" 亿", 1e8], [" 万", 1e4]] : [["T", 1e12], ["B", 1e9], ["M", 1e6], ["K", 1e3]];

export function speech(zh, language) {
  // The text in the page's language, with its {places} filled in.
  function t(words, values = {}) {
    const said = language === "zh" && Object.hasOwn(zh, words) ? zh[words] : words;
    return said.replace(/\{(\w+)\}/g, (place, name) => values[name] ?? place);
  }

  // Translates the text in the page itself, but not what a model or a program wrote.
  function translatePage() {
    document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
    if (language === "en") return;
    document.title = t(document.title);
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_ELEMENT | NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
      const node = walker.currentNode;
      if ((node.parentElement ?? node).closest("pre, code, script, [translate=no]")) continue;
      if (node.nodeType === Node.TEXT_NODE) {
        const words = node.data.trim().replace(/\s+/g, " ");
        if (Object.hasOwn(zh, words)) node.data = node.data.replace(/\S(?:[^]*\S)?/, () => t(words));
      } else {
        for (const name of ["title", "aria-label", "placeholder"]) {
          if (node.hasAttribute(name)) node.setAttribute(name, t(node.getAttribute(name)));
        }
      }
    }
  }

  // Makes a button change to the other language, which the address then names.
  function offerOther(button) {
    button.textContent = language === "zh" ? "English" : "中文";
    button.lang = language === "zh" ? "en" : "zh-CN";
    button.hidden = false;
    button.addEventListener("click", () => {
      const address = new URL(location.href);
      address.searchParams.set("lang", language === "zh" ? "en" : "zh");
      location.replace(address);
    });
  }
  return { t, translatePage, offerOther };
}
