"""The claims page in headless Chromium: two widths, two languages, the keyboard, no axe-core violations."""

import re
from pathlib import Path

import pytest
from browser import chromium, violations

from bessemer.addons.evals.intervals import Interval
from bessemer_claims import cards, page, phrases, registry
from bessemer_claims.registry import Part
from bessemer_claims.verdict import Outcome, PartFinding


@pytest.fixture(scope="module")
def file(tmp_path_factory, all_cards):
    path = tmp_path_factory.mktemp("claims") / "claims.html"
    path.write_text(page.document(all_cards), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture
def opened(browser, file, request):
    """The page, which must log nothing to the console, raise no error and request no other file."""
    width, language, scheme = getattr(request, "param", (1280, "en-GB", "light"))
    context = browser.new_context(viewport={"width": width, "height": 850}, locale=language, color_scheme=scheme)
    tab, complaints = context.new_page(), []
    tab.on("console", lambda message: complaints.append(message.text))
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("request", lambda outgoing: complaints.append(outgoing.url))
    tab.goto(f"file://{file}")
    yield tab
    context.close()
    assert set(complaints) == {f"file://{file}"}


def test_docs_page_matches_committed_results():
    root = Path(__file__).parents[2]
    due = "run: python claims/tools/page.py"
    all_cards = page.committed()
    body = re.compile(r"<main>.*</main>", re.S)  # styles and script may change
    committed = (root / "docs" / "claims.html").read_text(encoding="utf-8")
    assert body.search(committed)[0] == body.search(page.document(all_cards))[0], due
    assert len(committed.encode()) < 2_000_000
    names, numbers = phrases.words()["verdict"], cards.counts(all_cards)
    for index, (name, form) in enumerate((("README.md", "{1} {0}"), ("README.zh.md", "{0} {1} 条"))):
        readme = (root / name).read_text(encoding="utf-8")
        for verdict, number in numbers.items():
            assert form.format(names[verdict][index], number) in readme, f"{name}: {due}"


def test_size_and_content(file):
    text = file.read_text(encoding="utf-8")
    assert len(text.encode()) < 2_000_000 and not re.search(r'(?:src|href)="(?!#)', text)
    ids = re.findall(r'<article class="claim [\w-]+" id="(\w+)"', text)
    assert sorted(ids) == sorted(registry.claims()) and tuple(ids[:12]) == page.HEADLINES
    assert registry.rules_hash()[:16] in text and "{" not in re.sub(r"<(style|script)>.*?</\1>", "", text, flags=re.S)


VIEWS = [(1280, "en-GB", "light"), (390, "zh-CN", "dark"), (390, "en-GB", "light"), (1280, "zh-CN", "dark")]
OPEN = "chosen => document.querySelectorAll(chosen).forEach(element => { element.open = true; })"


@pytest.mark.parametrize("opened", VIEWS, indirect=True)
def test_one_language_is_shown_and_nothing_overflows(opened):
    opened.evaluate(OPEN, "details")
    assert opened.evaluate("document.documentElement.scrollWidth") <= opened.viewport_size["width"]
    chinese = opened.evaluate("document.documentElement.lang") == "zh-Hans"
    assert opened.locator("h1 .zh").is_visible() == chinese and opened.locator("h1 .en").is_visible() != chinese


@pytest.mark.parametrize("opened", VIEWS[:2], indirect=True)
def test_axe_finds_nothing(opened):
    """With one card of every verdict and the glossary open; all cards are built alike."""
    opened.evaluate(
        OPEN, ":is(#F7, #L5, #L6, #Z2) details, .chapter:has(#D5), #D5 details, #D2 details, #method details"
    )
    assert violations(opened) == []


def test_the_language_changes_by_keyboard(opened):
    opened.keyboard.press("Tab")
    assert opened.evaluate("document.activeElement.id") == "language"
    opened.keyboard.press("Enter")
    assert opened.title() == "关于 DeepSeek-R1 的说法可信吗？" and opened.locator(".answer .en").first.is_hidden()
    opened.keyboard.press("Enter")
    assert opened.title() == "Can you believe what is said about DeepSeek-R1?"


def test_a_verdict_shows_its_claims_alone(opened):
    wrong = opened.locator("button.v-contradicted")
    wrong.click()
    visible = [card.get_attribute("id") for card in opened.locator(".claim").all() if card.is_visible()]
    assert len(visible) == int(wrong.locator("em").inner_text()) and {"M12", "L5", "K6"} < set(visible)
    wrong.click()
    assert opened.locator("#M5").is_visible() and opened.locator("#K6").is_hidden()


def test_a_link_opens_the_chapter_of_its_card(opened, file):
    assert opened.locator("#K9").is_hidden()
    opened.evaluate("location.hash = 'K9'")
    opened.locator("#K9").wait_for(state="visible")
    opened.locator("#K9 summary").click()
    assert "bessemer claims --only K9" in opened.locator("#K9").inner_text()


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_pictures_of_extreme_values_stay_inside(size):
    part = Part(kind="R", side="equal", metric="<b>x</b>", threshold=0.0, margin=0.1, paper=-3 * size)
    reach, control = Interval(0.0, -size, size), Interval(size, size, 2 * size)
    drawn = page._gap("Q1", PartFinding(part, Outcome.UNCLEAR, part.metric, reach, control, value=0.0))
    places = [float(position) for position in re.findall(r"(?:left|width):(-?[\d.]+)%", drawn)]
    assert places and all(0 <= position <= 100 for position in places) and "<b>x" not in drawn
