// A page's text in English or Chinese: `zh` has the English text as keys, with {places} for what varies.

export const browserLanguage = () => (navigator.language.startsWith("zh") ? "zh" : "en");

export function speech(zh, language) {
  // The text in the page's language, with its {places} filled in.
  function t(words, values = {}) {
    const said = (language === "zh" && zh[words]) || words;
    return said.replace(/\{(\w+)\}/g, (place, name) => values[name] ?? place);
  }

  // Translates the text in index.html itself.
  function translatePage() {
    document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
    if (language === "en") return;
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_ELEMENT | NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
      const node = walker.currentNode;
      if (node.nodeType === Node.TEXT_NODE) {
        const words = node.data.trim().replace(/\s+/g, " ");
        if (words in zh) node.data = node.data.replace(/\S(?:[^]*\S)?/, () => t(words));
      } else {
        for (const name of ["title", "aria-label", "placeholder"]) {
          if (node.hasAttribute(name)) node.setAttribute(name, t(node.getAttribute(name)));
        }
      }
    }
  }
  return { t, translatePage };
}
