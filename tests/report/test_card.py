"""The report card: everything a run recorded is on it, and text written by a model cannot inject markup."""

import base64
import hashlib
import html.parser
import json
import re
import xml.etree.ElementTree as ElementTree

import fake_run
import pytest
from chinese_pages import untranslated

from bessemer.addons.evals import tables
from bessemer.addons.watch import card, charts, facts, page, panels
from bessemer.errors import UserError


class Page(html.parser.HTMLParser):
    """Checks that tags nest, and collects tags, attributes and text."""

    EMPTY = ("meta", "col", "br", "img", "link", "input", "path", "use", "image")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attributes]
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attributes]

    def handle_endtag(self, tag):
        if tag not in self.EMPTY:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return fake_run.make(tmp_path_factory.mktemp("report") / "run")


@pytest.fixture(scope="module")
def text(root):
    return card.write(root).read_text(encoding="utf-8")


def test_the_page_holds_everything(text, root):
    visible = " ".join(" ".join(Page(text).text).split())
    for section in card.SECTIONS:
        # these need runs of their own: test_report_r1.py, test_formats.py, test_report_long.py, pipeline/test_replay.py
        assert section.title in visible or section.anchor in ("controls", "formats", "long", "why")
    assert "Left out because the run recorded nothing for it: controls (" in visible and "Not finished" not in visible
    assert "; number formats (no two pre-training stages that differ only in number format); long context (" in visible
    for words in (
        "pass@1, countdown en", "18 % → 57 %", "14.9–21.5", "+38.8", "99.2", "8 samples each",
        "200 held-out problems per task", "cons@8", "No alarm.", "12.8 min", "MaxVio", "chinese 1.94", "layer 3",
        "16 experts",
        "step 500 · 8000K tokens", "Use 3, 8, 2 to make 19.", "in the group correct", "FP8 training",
        "bessemer chat", "Also in metrics.jsonl: guard/skipped, train/mtp_lambda", "狐狸",
    ):  # fmt: skip
        assert words in visible, words
    assert root.joinpath("recipe.toml").read_text() in "".join(Page(text).text)
    assert text.index('<section id="rollouts">') < text.index('<section id="learning">')  # answers before curves


def test_a_legend_is_the_end_of_the_drawn_line_and_no_single_minibatch(tmp_path):
    """At the size where it misled: 300 noisy steps whose last minibatch is half of the loss."""
    root = fake_run.make(tmp_path / "run")
    noisy = {"train/loss": 1.0, "train/mtp_1": 2.0, "moe/max_vio/1": 0.4, "moe/max_vio/2": 0.8, "train/balance": 3.0}
    lines = []
    for step in range(1, 301):
        noise = (1.1 if step % 2 else 0.9) * (0.5 if step == 300 else 1)
        values = {name: value * noise for name, value in noisy.items()}
        lines.append({"stage": "pretrain", "step": step, "tokens": step, "values": values})
    (root / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    figures = re.findall(r"<figure.*?</figure>", card.write(root).read_text(encoding="utf-8"), re.DOTALL)
    ends = {
        re.search('class="title">([^<]*)', figure)[1]: [float(end) for end in re.findall("<em>([^<]*)</em>", figure)]
        for figure in figures
    }
    assert ends["Training loss"] == pytest.approx([1.0, 2.0], rel=0.1)
    assert ends["Expert imbalance"] == pytest.approx([0.4, 0.8], rel=0.1)
    single = next(figure for figure in figures if "Balance loss" in figure)
    assert float(re.search('class="last">[^<]*→ ([0-9.]+)<', single)[1]) == pytest.approx(3.0, rel=0.1)


def test_the_samples_of_one_prompt_stand_together(text, tmp_path):
    """Three prompts at six steps: each can be followed from the first step to the last."""
    section = text.split('id="samples"')[1].split("</section>")[0]
    assert "18 samples of 3 prompts, 15 shown" in section
    parts = section.split('<p class="lead">')[1:]
    assert [re.match("Prompt ([0-9]): (.*?)</p>", part).groups() for part in parts] == [
        ("1", "The fox"), ("2", "从前"), ("3", "User: What is 2+2? Assistant:"),
    ]  # fmt: skip
    for part, prompt in zip(parts, ("The fox", "从前", "User: What is 2+2?"), strict=True):
        assert [int(step) for step in re.findall("<summary>step ([0-9]+) ", part)] == [50, 100, 200, 400, 500]
        assert all(block.startswith(prompt) for block in re.findall("<pre[^>]*>(.*?)</pre>", part, re.DOTALL))
    root = fake_run.make(tmp_path / "run")
    for texts, heading in ((["a", "b"], "2 samples"), (["one"], "1 sample")):  # of one step, and of an old file
        lines = [f"## step 7 · 1K tokens\n\n    {words}\n" for words in texts]
        (root / "02-pretrain" / "samples.md").write_text("\n".join(lines))
        section = card.write(root).read_text().split('id="samples"')[1].split("</section>")[0]
        assert f">{heading}<" in section and "Prompt 1" not in section


def test_every_text_has_its_chinese(text, root, tmp_path):
    names = " ".join(facts.read(root).names) + " countdown chinese code drills fables"
    assert untranslated(text, names, *fake_run.PROMPTS) == []
    (tmp_path / "recipe.toml").write_text('name = "new"\n[[stage]]\nkind = "pretrain"\nname = "pretrain"\n')
    assert untranslated(card.write(tmp_path).read_text(), "new pretrain") == []
    assert untranslated(text.replace("逐阶段结果", "Stage by stage"), names, *fake_run.PROMPTS) == ["Stage by stage"]


def test_the_report_is_one_file_that_requests_nothing(text):
    page = Page(text)
    assert not {"link", "iframe", "object", "base", "form"} & set(page.tags)
    for tag, name, value in page.attributes:
        if name in ("src", "href", "xlink:href", "action", "data"):
            assert value.startswith(("#", "data:image/png;base64,")), (tag, name, value)
        assert not name.startswith("on")
    assert "url(http" not in text and "@import" not in text and "<!DOCTYPE svg" not in text
    # one script, ours, and a policy that permits no other: it states this script's hash
    assert page.tags.count("script") == 1 and not any(tag == "script" for tag, _, _ in page.attributes)
    script = text.split("<script>")[1].split("</script>")[0]
    expected = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{expected}'"
    assert ("meta", "content", policy) in page.attributes
    for unsafe in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "fetch(",
        "XMLHttp",
        "import",
    ):
        assert unsafe not in script
    assert len(text) < 600_000  # small enough to e-mail


def test_charts_use_the_colours_of_the_page(text):
    svgs = re.findall(r"<svg .*?</svg>", text, re.DOTALL)
    assert len(svgs) > 15
    for svg in svgs:
        ElementTree.fromstring(svg)
        # all placeholders are replaced, and no black or white is left that would vanish in one of the two themes
        assert "var(--" in svg and "#010" not in svg and "#000000" not in svg and "#ffffff" not in svg
        assert "<text" in svg  # labels are text, not paths
    ids = [re.findall(r'<clipPath id="([^"]+)"', svg) for svg in svgs]
    flat = [element for svg in ids for element in svg]
    assert len(flat) == len(set(flat))  # one chart's clip must not cut another's lines
    css = text.split("<style>")[1].split("</style>")[0]
    used = set(re.findall(r"var\(--([a-z0-9-]+)\)", text))
    light, dark = css.split("prefers-color-scheme: dark")
    assert all(f"--{name}:" in light for name in used) and all(f"--{name}:" in dark.split("}")[0] for name in used)


def test_the_papers_recipe(text, tmp_path):
    """All four states are shown and counted."""
    assert "6 of 8 items of the papers" in text and "recipe as published, 0 scaled, 0 adapted, 2 off." in text
    assert text.count('<span class="pill on">as published</span>') == 6
    assert text.count('<span class="pill off">off</span>') == 2
    root = fake_run.make(tmp_path / "run")
    states = ["scaled", "off", "adapted", "as published", "as published"]
    (root / "conformance.json").write_text(json.dumps([{"item": state, "state": state} for state in states]))
    html = card.write(root).read_text(encoding="utf-8")
    assert "recipe as published, 1 scaled, 1 adapted, 1 off." in html and "2 of 5 items" in html
    pills = re.findall(r'<span class="pill (on|off)">([^<]*)</span>', html)
    assert pills == [("on" if state in ("scaled", "as published") else "off", state) for state in states]


def test_hostile_output_stays_text(tmp_path):
    root = fake_run.make(tmp_path / "run", hostile=True)
    (root / "02-pretrain" / "samples.md").write_text(
        f"## step 1 {fake_run.HOSTILE[:60]}\n\n    {fake_run.HOSTILE[:60]}\n"
    )
    evil = {"task": "<b>", "model": "<i>", "n": "<u>", "samples": 8, "pass_at_1": 0.5, "language": "<s>"}
    (root / "05-after" / "results.json").write_text(json.dumps([evil]))
    (root / "conformance.json").write_text(json.dumps([{"item": "<h5>", "state": "<h6>"}]))
    with open(root / "metrics.jsonl", "a") as file:
        values = {"val/bpb/<a href=x>$\\frac{$": 1.0, "guard/<h1>": 2.0}
        file.write(json.dumps({"stage": "zero", "step": 1, "tokens": 1, "values": values}) + "\n")
    (root / "recipe.toml").write_text(
        'name = "<title>"\n[[stage]]\nkind = "<hr>"\nname="zero"\n[model]\npreset="<p>"\n'
    )
    html = card.write(root).read_text(encoding="utf-8")
    page = Page(html)
    assert not {"img", "u", "s", "h5", "h6", "hr"} & set(page.tags) and page.tags.count("script") == 1
    assert page.tags.count("title") == 1 and page.tags.count("h1") == 1 and "a" in page.tags
    assert all(value.startswith("#") for tag, name, value in page.attributes if tag == "a")
    assert html.count("&lt;script&gt;") > 10
    assert "\x00" not in html and "\x1b" not in html and "\u2400\u241b[31m" in html


def test_an_empty_run_says_what_is_missing(tmp_path):
    (tmp_path / "recipe.toml").write_text('name = "new"\n[[stage]]\nkind = "pretrain"\nname = "pretrain"\n')
    visible = " ".join(Page(card.write(tmp_path).read_text()).text)
    assert "Left out because the run recorded nothing for it: stage by stage (no results.json in a stage)" in visible
    assert "rollouts (no rollouts.jsonl" in visible and "Not finished yet: pretrain" in visible
    with pytest.raises(UserError, match="not a run directory"):
        card.write(tmp_path / "nowhere")


def test_a_run_in_progress_can_be_read(root, tmp_path):
    run = fake_run.make(tmp_path / "run")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"time": 1, "sta')
    (run / "04-zero" / "done.json").unlink()
    (run / "04-zero" / "wall.json").write_text('{"seconds": 60.0}')
    visible = " ".join(Page(card.write(run).read_text()).text)
    assert "Not finished yet: zero" in visible and "9.0 min" in visible


def test_results_in_all_spellings_and_what_may_be_compared(tmp_path):
    row = {"task": "t", "language": "en", "samples": 4, "pass_at_1": 0.25, "n": 10}
    (tmp_path / "recipe.toml").write_text('name = "x"\n')
    for number, results in enumerate(
        [
            {"rows": [{"model": "a", **row}]},
            {"before": row, "after": row | {"temperature": 0.6}},
            [{"model": "c", **row}],
        ],
        1,
    ):
        (tmp_path / f"0{number}-e{number}").mkdir()
        (tmp_path / f"0{number}-e{number}" / "results.json").write_text(json.dumps(results))
    results = tables.by_sampling(facts.read(tmp_path).evaluations)
    assert [list(rows) for tasks in results.values() for rows in tasks.values()] == [["a", "before", "c"], ["after"]]
    (tmp_path / "01-e1" / "results.json").write_text("{")
    with pytest.raises(UserError, match=r"results.json is not valid"):
        facts.read(tmp_path)


def test_rollouts_that_never_repeat_a_prompt_are_spread_over_training(tmp_path):
    run = fake_run.make(tmp_path / "run")
    lines = [
        {"step": s, "id": f"p{s}", "prompt": f"prompt number {s}.", "completion": f"c{s}-{m}"}
        for s in range(100)
        for m in range(2)
    ]
    (run / "04-zero" / "rollouts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    visible = " ".join(Page(card.write(run).read_text()).text)
    assert (
        "prompt number 0." in visible and "prompt number 99." in visible and "c99-0" in visible and "c99-1" in visible
    )
    assert "8 of 100 prompts" in visible


def test_curves_stay_small_and_true():
    _, y = charts._thin(list(range(10_000)), [float(value) for value in range(10_000)])
    assert len(y) <= charts._MOST_POINTS and y == sorted(y) and abs(sum(y) / len(y) - 4999.5) < 25
    assert charts._smooth([1.0, 9.0]) == [1.0, 9.0]  # too few points to smooth
    flat = charts._smooth([5.0] * 200)
    assert flat == [5.0] * 200
    assert [charts.short(v) for v in (0, 0.00022, 3e-3, 1.5, 21400, 8e6, -0.5)] == [
        "0", "0.00022", "0.003", "1.5", "21.4K", "8M", "-0.5"
    ]  # fmt: skip
    assert [charts.short(v) for v in (999.7, -999.7, 999_499, 999_936)] == ["1K", "-1K", "999K", "1M"]


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("count", [2, 6, 7, 12, 30])
def test_no_two_lines_of_a_chart_look_alike(count, ordered):
    panel = charts.panel(
        "a", "b", [charts.Curve(f"line {n}", [1, 2], [n, n + 1]) for n in range(count)], "c", ordered=ordered
    )
    keys = re.findall(r'<span class="k(\d)" style="color:var\(--(\w+)\)">', panel)
    strokes = re.findall(r'data-line="\d+">\s*<path [^>]*style="fill: none;([^"]*)"', panel)
    assert len(strokes) == len(keys) == len(set(keys)) == len(set(strokes)) == count
    dashes = {}
    for (dash, colour), stroke in zip(keys, strokes, strict=True):  # the legend shows each line as it is drawn
        pattern = re.search(r"stroke-dasharray: ([^;]*)", stroke)
        assert f"var(--{colour})" in stroke and dashes.setdefault(dash, pattern and pattern[1]) == (
            pattern and pattern[1]
        )
    assert len(set(dashes.values())) == len(dashes) == min(count, 6)


def test_heat_map_means_shares_not_counts():
    heat_map = charts.heat([1, 2], [[1.0, 3.0], [2.0, 2.0]], "a")
    assert (
        heat_map.split("base64,")[1][:2000]
        == charts.heat([1, 2], [[10.0, 30.0], [20.0, 20.0]], "a").split("base64,")[1][:2000]
    )
    assert "base64," in charts.heat([5], [[0.0, 0.0]], "b")  # nothing routed yet: no division by zero


def test_layers_are_in_order_and_nan_is_skipped(tmp_path):
    (tmp_path / "recipe.toml").write_text('name = "x"\n')
    (tmp_path / "01-p").mkdir()
    names = [f"moe/max_vio/{layer}" for layer in ("mtp0", "10", "2", "1")]
    lines = [{"stage": "p", "step": s, "tokens": s, "values": {n: 0.5 if s else None for n in names}} for s in range(3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    html = panels.training(facts.read(tmp_path))
    assert re.findall(r"layer \d+|MTP \d+", html) == ["layer 1", "layer 2", "layer 10", "MTP 1"]


def test_long_output_is_cut():
    html = page.block("x" * 10_000)
    assert "6,000 more characters" in html and len(html) < 4200
