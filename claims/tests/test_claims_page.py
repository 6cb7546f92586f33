"""The claims page in headless Chromium: two widths, two languages, the keyboard, paper, no axe-core violations."""

import datetime
import re
from pathlib import Path

import pytest
from browser import chromium, violations

from bessemer.addons.evals.intervals import Interval
from bessemer_claims import card_page, cards, first_screen, page, phrases, pictures, registry
from bessemer_claims.registry import Part
from bessemer_claims.verdict import ClaimVerdict, Outcome, PartFinding, Seen

DAY = datetime.date(2026, 2, 1)


@pytest.fixture(scope="module")
def file(tmp_path_factory, all_cards):
    path = tmp_path_factory.mktemp("claims") / "claims.html"
    path.write_text(page.document(all_cards, DAY), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def all_cards():
    """From the committed results, as the page of the documentation."""
    return page.committed()


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
    assert {address.partition("?")[0] for address in complaints} == {f"file://{file}"}


def test_docs_page_matches_committed_results():
    root = Path(__file__).parents[2]
    due = "run: python claims/tools/page.py"
    all_cards = page.committed()
    body = re.compile(r"<main>.*</main>", re.S)  # styles and script may change
    committed = (root / "docs" / "claims.html").read_text(encoding="utf-8")
    day = re.search(r'<time datetime="([\d-]+)">', committed)
    assert day, due
    document = page.document(all_cards, datetime.date.fromisoformat(day[1]))
    assert body.search(committed)[0] == body.search(document)[0], due
    assert len(committed.encode()) < 2_000_000
    for name, tally in zip(("README.md", "README.zh.md"), page.tallies(all_cards), strict=True):
        assert tally in (root / name).read_text(encoding="utf-8"), f"{name}: {due}"


def test_size_and_content(file):
    text = file.read_text(encoding="utf-8")
    assert len(text.encode()) < 2_000_000 and not re.search(r'src="|href="(?!#|https://)', text)
    ids = re.findall(r'<article class="claim [\w -]+" id="(\w+)"', text)
    assert ids == list(registry.claims())
    assert tuple(re.findall(r'<div class="brief"><a class="id" href="#(\w+)"', text)) == page.HEADLINES
    assert '<time datetime="2026-02-01">' in text
    assert registry.rules_hash()[:16] in text and "{" not in re.sub(r"<(style|script)>.*?</\1>", "", text, flags=re.S)


VIEWS = [(1280, "en-GB", "light"), (390, "zh-CN", "dark"), (390, "en-GB", "light"), (1280, "zh-CN", "dark")]
OPEN = "chosen => document.querySelectorAll(chosen).forEach(element => { element.open = true; })"


@pytest.mark.parametrize("opened", VIEWS, indirect=True)
def test_one_language_is_shown_and_nothing_overflows(opened):
    opened.evaluate(OPEN, "details")
    assert opened.evaluate("document.documentElement.scrollWidth") <= opened.viewport_size["width"]
    chinese = opened.evaluate("document.documentElement.lang") == "zh-Hans"
    assert (
        opened.locator(".question .zh").is_visible() == chinese
        and opened.locator(".question .en").is_visible() != chinese
    )


@pytest.mark.parametrize("opened", VIEWS[:2], indirect=True)
def test_axe_finds_nothing(opened):
    """With one card of every verdict and the glossary open; all cards are built alike."""
    opened.evaluate(OPEN, ":is(#F7, #L5, #L6, #Z2, #D5, #D2) details, .chapter:has(:is(#F7, #L5, #L6, #Z2, #D5))")
    assert violations(opened) == []


def test_the_language_changes_by_keyboard(opened):
    opened.keyboard.press("Tab")
    assert opened.evaluate("document.activeElement.id") == "language"
    opened.keyboard.press("Enter")
    chinese = phrases.words()["title"][1]
    assert opened.title() == chinese and opened.locator(".corrections .en").first.is_hidden()
    opened.reload()
    assert opened.title() == chinese, "a reload keeps the language"
    opened.goto(opened.url.replace("lang=zh", "lang=en"))
    assert opened.title() == phrases.words()["title"][0]


def visible(tab):
    chosen = "[...document.querySelectorAll('.claim')].filter(card => card.checkVisibility()).map(card => card.id)"
    return set(tab.evaluate(chosen))


def test_an_answer_and_words_choose_cards(opened):
    wrong = opened.locator(".answers button.v-no").first
    wrong.click()
    chosen, number = visible(opened), int(wrong.locator("em").inner_text())
    assert len(chosen) == number and {"M12", "K6"} < chosen
    showing = opened.locator("#showing")
    assert re.findall(r"\d+", showing.inner_text()) == [str(number), str(len(registry.claims()))]
    opened.locator("#search").fill("Experts PARAMETERS")
    both = visible(opened)
    assert "M12" in both and both < chosen
    wrong.click()
    assert both < visible(opened), "the words alone leave more"
    opened.locator("#search").fill("k6")
    assert visible(opened) == {"K6"}
    opened.locator("#search").fill("注意力")
    assert "L6" in visible(opened)
    opened.locator("#everything").click()
    assert not visible(opened) and showing.is_hidden() and opened.locator("#headlines").is_visible()


def test_the_chapters_add_up_to_the_bar(all_cards, opened):
    """Chapter by chapter the cards of an answer are as many as the bar says, and all of them are there."""
    first = next(iter(card_page.ANSWERS))
    total = 0
    for _, look, number in card_page.tally(all_cards, first):
        tallies = opened.locator(f".tally .v-{look.style}").all_text_contents()
        assert sum(int(re.search(r"\d+", text)[0]) for text in tallies) == number
        total += number
    assert total == len(all_cards) == len(registry.claims())


def test_every_card_has_both_answers(all_cards, opened):
    """In the words of the bars; what runs do not show is said with its size."""
    shown = opened.evaluate("""Object.fromEntries([...document.querySelectorAll(".claim")].map(card =>
        [card.id, [[...card.querySelectorAll(".chip b .en")].map(word => word.textContent), card.textContent]]))""")
    for card in all_cards:
        chips, text = shown[card.name]
        assert chips == [phrases.words()[field][getattr(card, field)][0] for field in card_page.ANSWERS], card.name
        if card.seen is Seen.NO:
            assert card.seen_at[0] in text


def test_every_source_is_a_link_under_its_card(all_cards, opened):
    """With the address of sources.toml."""
    linked = opened.evaluate("""Object.fromEntries([...document.querySelectorAll(".claim")].map(card =>
        [card.id, [...card.querySelectorAll("a[href^=https]")].map(link => link.getAttribute("href"))]))""")
    for card in all_cards:
        assert linked[card.name] == [cited.source.url for cited in card.claim.citations() if cited.source.url]
    assert sum(map(len, linked.values())) > len(all_cards)


def test_old_counts_stand_beside_the_new(all_cards, opened):
    rows = [row.locator("td").all_text_contents() for row in opened.locator("#changed tbody tr").all()]
    numbers = [[int(cell) for cell in row[1:]] for row in rows]
    *old, total = numbers
    assert [sum(column) for column in zip(*old, strict=True)] == total and total[0] == sum(total[1:5]) == sum(total[5:])
    newer = sum(card.rules_1 is None for card in all_cards)
    assert [row[0] for row in old] == [number for number in (*cards.counts(all_cards).values(), newer) if number]
    moved = re.findall(r"[A-Z]\d+", " ".join(opened.locator("#changed ul a").all_text_contents()))
    kept = {ClaimVerdict.CONTRADICTED: "no", ClaimVerdict.PART: "partly", ClaimVerdict.SHOWN: "yes"}
    assert {"L10", "R1"} < set(moved) and len(moved) == len(set(moved))
    assert not [card for card in all_cards if card.name in moved and kept.get(card.rules_1) == card.documented]


@pytest.mark.parametrize("opened", [(390, "en-GB", "light"), (390, "zh-CN", "light")], indirect=True)
def test_a_telephone_shows_answer_corrections_and_bar_at_once(opened):
    assert opened.locator(".corrections li").count() == 3
    places = [opened.locator(name).first.bounding_box() for name in ("h1", ".corrections", ".bar")]
    assert all(place["y"] >= 0 and place["y"] + place["height"] <= 844 for place in places)


def test_the_first_screen_follows_from_figures(all_cards):
    """Against arithmetic by hand: published hours and prices, NVIDIA's tokens per second, Meta's hours."""
    computed = first_screen.values()
    assert computed["bill"] == pytest.approx(2.788 * 2) and computed["own"] == pytest.approx(2.664 * 2)
    assert computed["again"] == pytest.approx(2 * 14.8e12 / 1297 / 3600 / 1e6)
    assert computed["speed"] == pytest.approx(100 * 1297 * 2.664e6 * 3600 / 14.8e12)
    assert computed["work"] == pytest.approx(405 * 15.6 / (37 * 14.8))
    assert computed["use"] == pytest.approx(1, abs=0.02), "the page says that both do the same"
    assert computed["smaller"] == pytest.approx(671e9 / 2.3e6, rel=0.03)
    assert computed["smaller"] == pytest.approx(1e4 * computed["smaller_wan"])
    text = first_screen.answer(all_cards)
    assert f"{computed['lead']:.1f} points ahead" in text and text.count("<li>") == 3


def test_paper_holds_all_cards(opened):
    """Chromium's PDF has a place for every card and for the limit in its folded part: what a link leads to has one only
    where it is laid out."""
    opened.evaluate("""() => {
        for (const limit of document.querySelectorAll(".claim .limit")) {
            limit.id = "limit-" + limit.closest(".claim").id;
            document.querySelector("footer").insertAdjacentHTML("beforeend", `<a href="#${limit.id}">.</a>`);
        }
    }""")
    printed = opened.pdf()
    places = set(re.findall(rb"/(?:limit-)?[A-Z]\d{1,2}(?= \[)", printed))
    for name in registry.claims():
        assert {f"/{name}".encode(), f"/limit-{name}".encode()} <= places, name


def test_a_link_opens_the_chapter_of_its_card(opened, file):
    assert opened.locator("#K9").is_hidden()
    opened.evaluate("location.hash = 'K9'")
    opened.locator("#K9").wait_for(state="visible")
    opened.locator("#K9 summary").click()
    assert "bessemer claims --part none --only K9" in opened.locator("#K9").inner_text()
    assert opened.title().startswith("K9: " + registry.claims()["K9"].text[0])


def test_a_card_copies_its_title_and_address(opened):
    opened.context.grant_permissions(["clipboard-read", "clipboard-write"])
    opened.evaluate("location.hash = 'K2'")
    opened.locator("#K2 .share").click()
    opened.locator("#K2 .copied").wait_for()
    title, address = opened.evaluate("navigator.clipboard.readText()").split("\n")
    assert title.startswith("K2: ") and address.endswith("?lang=en#K2")


def test_a_control_stands_with_its_number(all_cards):
    """Every grey mark has its value beside the picture, in both languages."""
    drawn = [
        (card.name, finding)
        for card in all_cards
        for finding in card.findings
        if phrases.pictured(finding) and finding.control is not None
    ]
    assert len(drawn) > 20
    for name, finding in drawn:
        picture = pictures.measured(name, finding)
        for text in phrases.amount(name, finding, finding.control.middle):
            number = re.match(r"[+−]?[\d.,e+-]+", text)[0]
            assert picture.count(number) >= 1, name


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_pictures_of_extreme_values_stay_inside(size):
    part = Part(kind="R", side="equal", metric="<b>x</b>", threshold=0.0, margin=0.1, paper=-3 * size)
    reach, control = Interval(0.0, -size, size), Interval(size, size, 2 * size)
    drawn = pictures.measured("Q1", PartFinding(part, Outcome.UNCLEAR, part.metric, reach, control, value=0.0))
    places = [float(position) for position in re.findall(r"(?:left|width):(-?[\d.]+)%", drawn)]
    assert places and all(0 <= position <= 100 for position in places) and "<b>x" not in drawn
