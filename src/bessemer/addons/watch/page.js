// Shows the page in Chinese where the address or the browser asks for it; `data-zh` holds the texts of this page.
const language = browserLanguage();
const inChinese = document.querySelector("main").dataset.zh;
const { t, translatePage, offerOther } = speech(JSON.parse(inChinese ?? "{}"), language);
if (inChinese) {
  translatePage();
  offerOther(document.getElementById("language"));
}
