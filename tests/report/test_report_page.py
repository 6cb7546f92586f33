"""The report in headless Chromium: values under the pointer, zoom, where rollouts open, no axe-core violations."""

import json
import re
from itertools import combinations
from pathlib import Path

import fake_run
import numpy as np
import pytest
from browser import chromium, violations

from bessemer.addons.watch import card


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = fake_run.make(tmp_path_factory.mktemp("report") / "run")
    card.write(root)
    return root


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture
def opened(browser, root, request):
    """The page, which must log nothing to the console, raise no error and request no other file."""
    width, scheme = getattr(request, "param", (1280, "light"))
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page, complaints = context.new_page(), []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: complaints.append(request.url))
    page.goto(f"file://{root}/report.html")
    yield page
    context.close()
    assert complaints == [f"file://{root}/report.html"]


def chart(page, title, section="learning"):
    figure = page.locator(f"#{section} figure", has=page.locator(f".title:text-is('{title}')")).first
    figure.scroll_into_view_if_needed()
    return figure, figure.locator("svg").bounding_box()


def measured(root, stage, metric):
    lines = map(json.loads, (root / "metrics.jsonl").read_text().splitlines())
    return {
        line["step"]: line["values"][metric] for line in lines if line["stage"] == stage and metric in line["values"]
    }


def test_values_under_the_pointer_match_those_of_the_run(opened, root):
    figure, box = chart(opened, "Accuracy")
    correct, formatted = measured(root, "zero", "rl/accuracy"), measured(root, "zero", "rl/format")
    for share in (0.3, 0.8):
        opened.mouse.move(box["x"] + share * box["width"], box["y"] + 50)
        step = int(figure.locator(".tip .at").text_content())
        labels = figure.locator(".tip .row span").all_text_contents()
        raw = [float(value) for value in figure.locator(".tip .row small").all_text_contents()]
        assert labels == ["correct", "well-formed"] and 20 < step < 180
        assert raw == pytest.approx([correct[step], formatted[step]], abs=0.0006)
        assert float(figure.locator(".tip .row b").first.text_content()) == pytest.approx(
            np.mean([correct[near] for near in range(step - 3, step + 4)]), abs=0.002
        )
    figure.focus()
    opened.keyboard.press("ArrowRight")
    assert int(figure.locator(".tip .at").text_content()) == step + 1
    grown, _ = chart(opened, "Gradient norm", "curves")  # its axis is logarithmic
    grown.focus()
    opened.keyboard.press("ArrowLeft")
    last = measured(root, "pretrain", "train/grad_norm")
    assert float(grown.locator(".tip small").text_content()) == pytest.approx(
        np.mean([last[step] for step in (499, 500)]), rel=0.02
    )


def drag(page, box, start, end):
    """Across a share of a drawing's width."""
    page.mouse.move(box["x"] + start * box["width"], box["y"] + 60)
    page.mouse.down()
    page.mouse.move(box["x"] + end * box["width"], box["y"] + 60, steps=3)
    page.mouse.up()


def test_a_drag_zooms_and_a_double_click_goes_back(opened, root):
    figure, box = chart(opened, "Length")
    line = figure.locator("[data-line='0'] path")
    full = line.get_attribute("d")
    drag(opened, box, 0.3, 0.6)
    assert line.get_attribute("d") != full and figure.locator(".whole").is_visible()
    ticks = [float(value) for value in figure.locator(".zoomed text").all_text_contents()]
    lengths = measured(root, "zero", "rl/length")
    heights, steps = ticks[:4], ticks[4:]
    assert min(steps) >= 40 and max(steps) <= 130  # the middle of 200 steps
    seen = [lengths[step] for step in range(60, 110)]
    assert heights == sorted(heights) and min(seen) - 3 < heights[0] and heights[-1] < max(seen) + 5
    opened.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 60)
    step = int(figure.locator(".tip .at").text_content())
    assert float(figure.locator(".tip small").text_content()) == pytest.approx(lengths[step], abs=0.06)
    opened.mouse.dblclick(box["x"] + 0.5 * box["width"], box["y"] + 60)
    assert line.get_attribute("d") == full and not figure.locator(".whole").is_visible()


def test_no_zoom_into_fewer_than_two_points(opened):
    figure, box = chart(opened, "Length")
    line = figure.locator("[data-line='0'] path")
    shown = [line.get_attribute("d")]
    while len(shown) < 2 or shown[-1] != shown[-2]:
        drag(opened, box, 0.5, 0.56)
        shown.append(line.get_attribute("d"))
        assert len(shown) < 8
    ticks = [float(text) for text in figure.locator(".zoomed [text-anchor=middle]").all_text_contents()]
    for share in (0.2, 0.9):  # the values are still those of the stretch that is drawn
        opened.mouse.move(box["x"] + share * box["width"], box["y"] + 60)
        assert abs(int(figure.locator(".tip .at").text_content()) - ticks[0]) < 14  # of 200 steps


def test_rollouts_open_where_answers_became_right(opened):
    dots = opened.locator("#rollouts .dot")
    marks = dots.all_text_contents()
    at = dots.evaluate_all("all => all.findIndex(dot => dot.getAttribute('aria-pressed') === 'true')")
    assert marks[at] == "✓" and marks[at - 1] == "✗" and set(marks[at:]) == {"✓"} and marks[0] == "✗"
    assert "whose answers changed most" in opened.locator("#rollouts h3").text_content()


def test_chinese_by_the_browser_the_address_and_the_button(browser, root):
    with browser.new_context(locale="zh-TW") as context:
        page, complaints = context.new_page(), []
        page.on("console", lambda message: complaints.append(message.text))
        page.goto(f"file://{root}/report.html")
        assert page.evaluate("document.documentElement.lang") == "zh-CN"
        assert page.locator("h2").first.text_content() == "逐阶段结果"
        figure, box = chart(page, "准确率")
        page.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 50)
        assert figure.locator(".tip .row span").all_text_contents() == ["正确", "格式正确"]
        assert page.locator("#rollouts .dot").first.get_attribute("aria-label") == "第 1 步，错误"
        assert page.locator("#rollouts pre").first.text_content().startswith("<think>")
        assert "980 万" in page.locator(".tile .value").all_text_contents()
        assert violations(page) == []
        page.click("#language")
        page.wait_for_selector("html[lang=en]")
        assert page.url.endswith("?lang=en") and page.locator("h2").first.text_content() == "Stage by stage"
        page.goto(f"file://{root}/report.html?lang=zh#learning")
        page.wait_for_selector("html[lang=zh-CN]")
        assert complaints == []


def test_the_labels_of_every_chart_lie_within_it(opened):
    opened.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true })")
    labels = opened.locator("figure svg text").evaluate_all("""all => all.map(label => {
        const [mine, whole] = [label, label.closest("svg")].map(one => one.getBoundingClientRect());
        return [label.textContent, Math.max(whole.left - mine.left, mine.right - whole.right,
                                            whole.top - mine.top, mine.bottom - whole.bottom)];
    })""")
    assert len(labels) > 100 and [label for label in labels if label[1] > 0.5] == []


@pytest.mark.parametrize("opened", [(1280, "light"), (390, "dark")], indirect=True)
def test_axe_finds_nothing(opened):
    figure, _ = chart(opened, "Accuracy")
    figure.focus()
    opened.keyboard.press("ArrowRight")
    assert figure.locator(".tip").is_visible() and violations(opened) == []


# Simulated colour blindness: Machado, Oliveira and Fernandes 2009, table 1, severity 1, for linear RGB.
SEEN = {
    "all cones": np.eye(3),
    "protanopia": np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
                            [-0.003882, -0.048116, 1.051998]]),
    "deuteranopia": np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                              [-0.011820, 0.042940, 0.968881]]),
    "tritanopia": np.array([[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
                            [0.004733, 0.691367, 0.303900]]),
}  # fmt: skip
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def linear(colour):
    parts = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)


def lab(light):
    ratio = XYZ @ np.clip(light, 0, 1) / [0.95047, 1.0, 1.08883]
    x, y, z = np.where(ratio > 0.008856, np.cbrt(ratio), 7.787 * ratio + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("theme", [0, 1])
def test_lines_are_distinguishable(theme):
    """Also by the colour-blind: 16 apart in CIELAB, where 2.3 is just noticeable, and 3:1 contrast with the card."""
    css = Path(card.__file__).with_name("card.css").read_text("utf-8").split("prefers-color-scheme: dark")[theme]
    hues = [re.search(rf"--s{number}: (#\w+)", css)[1] for number in range(1, 7)]
    for kind, matrix in SEEN.items():
        for first, second in combinations(hues, 2):
            assert np.linalg.norm(lab(matrix @ linear(first)) - lab(matrix @ linear(second))) > 16, (
                kind,
                first,
                second,
            )
    background = float(XYZ[1] @ linear(re.search(r"--card: (#\w+)", css)[1]))
    for hue in hues:
        light, dark = sorted((float(XYZ[1] @ linear(hue)), background), reverse=True)
        assert (light + 0.05) / (dark + 0.05) > 3, hue
