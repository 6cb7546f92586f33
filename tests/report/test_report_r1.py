"""The report of a whole R1 run: the stage table, the board of every RL stage, its alarms, controls and rollouts."""

import json
import re
from dataclasses import replace

import fake_r1
import fake_run
import pytest
from chinese_pages import untranslated
from test_card import Page

from bessemer.addons.evals import tables
from bessemer.addons.watch import card, comparisons, facts, text_metrics, transcripts
from bessemer.addons.watch.facts import read

MAIN = ["pretrain", "zero", "dev1", "dev2", "dev3", "r1", "student", "alone"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return fake_r1.make(tmp_path_factory.mktemp("report") / "run")


@pytest.fixture(scope="module")
def text(root):
    return card.write(root).read_text(encoding="utf-8")


def section(text, anchor):
    return re.search(rf'<section id="{anchor}">.*?</section>', text, re.DOTALL)[0]


def words(html):
    return " ".join(" ".join(Page(html).text).split())


def row(model, task="t", **more):
    return {"model": model, "task": task, "language": "en", "n": 50, "samples": 8, "k": 4, "pass_at_1": 0.5, **more}


def test_the_page_is_whole_and_small(text):
    page = Page(text)
    assert page.tags.count("script") == 1 and len(text) < 2_000_000
    left_out = next(
        words for words in page.text if words.startswith("Left out because the run recorded nothing for it")
    )
    assert "number formats (" in left_out and "samples (" in left_out


def test_every_text_has_its_chinese(text, root):
    names = [*read(root).names, *text_metrics.REFLECTIVE, "countdown shop search words chinese code drills fables"]
    assert untranslated(text, *names, "add the term language to reward, general.start general.prompts") == []


def test_the_stage_table(text):
    html = section(text, "stages")
    heads = re.findall(r'<th scope="col">([a-z0-9]+)<small>', html)
    assert heads[: len(MAIN)] == MAIN  # controls are not part of the main line
    cells = words(html)
    for part in (
        "16 samples each at temperature 1", "100 held-out problems per task", "pass@1 % · search", "pass@1 % · words",
        "74.0", "68.0–80.0", "mean over the 3 above, %", "pass@16", "cons@16", "readable", "language consistency",
        "every measure, task by task", "tokens per answer 68 141 104 132 129 126 131 95",
    ):  # fmt: skip
        assert part in cells, part
    assert "<b>74.0</b>" in html and html.count("<b>71.0</b>") == 0  # only the best of its line is bold
    for headline in ("pass@1, mean of 3 rows", "19 % → 71 %", "20 % → 74 %"):  # R1's, not those of the later student
        assert headline in words(text)


def test_the_stage_table_on_a_terminal(root):
    main, beside, _ = card.table(root).split("\n\n")
    lines = main.split("\n")
    assert lines[0] == "held-out problems: 100 per task, 16 samples each at temperature 1"
    assert lines[1].split() == MAIN
    assert lines[2].startswith("search: countdown en, pass@1 %") and lines[2].split()[-3:] == ["74.0", "49.0", "31.0"]
    assert lines[3].split()[-3:] == ["68-80", "43-55", "25-37"]
    assert len({len(line) for line in lines[1:]}) == 1  # columns align with their headings
    assert comparisons.stage_table_text([]) == ""
    title, _, heads, *_ = beside.split("\n")
    assert (
        title
        == "controls of zero (coin: random reward, form: reward for the format alone, copied: SFT on the same tokens)"
    )
    assert heads.split() == ["pretrain", "zero", "coin", "form", "copied"]


def test_a_control_stands_beside_one_stage_only(root):
    """A second stage rewarded by the task from the same model would match the same controls."""
    run_facts = read(root)
    zero = next(stage for stage in run_facts.stages if stage.name == "zero")
    twin = replace(zero, name="zero-language")
    run_facts.stages.insert(run_facts.stages.index(zero) + 1, twin)
    (group,) = comparisons.control_groups(run_facts)
    assert group.main.name == "zero" and [stage.name for stage, _ in group.controls] == ["coin", "form", "copied"]


def test_the_head_names_models_from_elsewhere(root):
    imported = {"kind": "import", "model": "package:smollm2-135m"}
    recipe = {"model": {"preset": "tiny"}, "stage": [imported, {"kind": "pretrain"}]}
    assert card._origin(recipe) == "DeepSeek-V3 architecture, preset tiny · imported: package:smollm2-135m"
    assert card._origin(recipe | {"stage": [imported]}) == "imported: package:smollm2-135m"


def test_a_mean_over_tasks_has_an_interval_over_their_problems():
    solved = {str(n): float(n < 10) for n in range(20)}
    (table,) = tables.stage_tables([row("a", by_problem=solved), row("a", "u", by_problem=solved)])
    (mean,) = table.overall[0].cells
    assert mean.value == 0.5 and 0.3 < mean.interval[0] < 0.45 and 0.55 < mean.interval[1] < 0.7


def test_unmeasured_cells_and_lines_are_left_out():
    (table,) = tables.stage_tables([row("a", mean_length=10.0), row("b"), row("b", "u", readable=0.4)])
    assert table.models == ("a", "b")
    cells = {line.label: line.cells for _, lines in table.accuracy for line in lines}
    assert cells["u en"][0] is None and cells["t en"][0].value == 0.5
    assert [line.label for line in table.overall] == ["pass@1", "readable", "tokens per answer"]
    _, readable, length = table.overall
    assert readable.cells[0] is None and readable.cells[1].value == 0.4  # measured on one task and for one model
    assert length.cells[0].value == 10.0 and length.cells[1] is None
    assert "–" in comparisons.stage_table_html(facts.RunFacts(None, {}, "", [], [], 0.0), [row("a"), row("b", "u")])
    assert tables.stage_tables([{"model": "a", "pass_at_1": None}, {"model": "b"}]) == []


def test_a_reward_is_a_plain_number():
    """Of any size, unlike the shares; its gain and its interval are in its own units."""
    rows = [row("a", reward=-0.25), row("b", reward=1.5, reward_interval=[0.9, 2.1]), row("b", "u")]
    (table,) = tables.stage_tables(rows)
    line = next(line for line in table.overall if line.label == "reward")
    assert line.best == 1.5 and line.cells[0].interval is None
    text = [text.split() for text in comparisons.stage_table_text(rows).splitlines()]
    assert ["mean", "reward", "-0.250", "1.500"] in text and ["95", "%", "interval", "0.900-2.100"] in text
    html = comparisons.stage_table_html(facts.RunFacts(None, {}, "", [], [], 0.0), rows)
    assert "+1.750" in html and "0.900–2.100" in html


def test_a_mean_over_tasks_has_an_interval_where_the_problems_are_known():
    by_problem = {"readable": 0.5, "readable_by_problem": {f"p{n}": float(n % 2) for n in range(40)}}
    (table,) = tables.stage_tables([row("a", **by_problem), row("a", "u", **by_problem), row("b"), row("b", "u")])
    readable = next(line for line in table.overall if line.label == "readable")
    low, high = readable.cells[0].interval
    assert 0.3 < low < 0.45 and 0.55 < high < 0.7 and readable.cells[1] is None
    text = comparisons.stage_table_text([row("a", **by_problem), row("a", "u", **by_problem)])
    assert f"95 % interval  {100 * low:.0f}-{100 * high:.0f}" in text


def test_an_interval_of_the_table_is_never_empty():
    """Six answers that can all be read do not mean that all can: the row keeps its interval, a mean gets one."""
    perfect = row("a", readable=1.0, readable_interval=[0.61, 1.0], readable_by_problem=dict.fromkeys("abcdef", 1.0))
    for rows, lowest in (([perfect], 0.61), ([perfect, perfect | {"task": "u"}], 0.76)):
        (table,) = tables.stage_tables(rows)
        assert table.overall[-1].cells[0].interval == (pytest.approx(lowest, abs=0.01), 1.0)


def test_means_cover_only_tasks_of_both_models():
    rows = [row("a", maj_at_k=0.2), row("a", "u", maj_at_k=0.4), row("b", maj_at_k=0.9)]
    (table,) = tables.stage_tables(rows)
    mean, cons = table.overall
    assert mean.cells == (tables.Score(0.5), None)  # b was not asked the second task
    assert cons.label == "cons@4" and cons.cells[0].value == pytest.approx(0.3) and cons.cells[1] is None


def test_tables_by_difficulty_and_sampling_settings():
    levels = {"1": {"n": 20, "pass_at_1": 0.9}, "10": {"n": 30, "pass_at_1": 0.2}}
    both = tables.stage_tables([row("a", by_difficulty=levels), row("a", temperature=0.6, top_p=0.95)])
    assert [table.sampling for table in both] == ["8 samples each", "8 samples each at temperature 0.6, top-p 0.95"]
    caps = [row("a", max_new_tokens=40), row("a", max_new_tokens=200), row("b", max_new_tokens=200)]
    assert [(table.sampling, table.models) for table in tables.stage_tables(caps)] == [
        ("8 samples each, at most 40 tokens", ("a",)), ("8 samples each, at most 200 tokens", ("a", "b"))
    ]  # fmt: skip
    (table,) = tables.stage_tables([*caps[1:], row("c")])  # of a file of answers
    assert (table.sampling, table.models) == ("8 samples each", ("a", "b", "c"))
    ((title, lines),) = both[0].details
    assert title == "pass@1 by difficulty"
    assert [(line.label, line.cells[0].value) for line in lines] == [("t en, 1", 0.9), ("t en, 10", 0.2)]


def test_the_last_evaluation_counts(root):
    (table,) = tables.stage_tables([row("a"), row("b"), row("a", pass_at_1=0.75)])
    assert [cell.value for cell in table.accuracy[0][1][0].cells] == [0.75, 0.5]


def test_contamination_is_reported(tmp_path):
    contamination = {
        "n": 10,
        "checked": 100,
        "hit": 0,
        "searched": {"pretrain": {"words": 5000, "problems": 7}},
        "worst": None,
    }
    (tmp_path / "recipe.toml").write_text('name = "x"\n')
    (tmp_path / "01-eval").mkdir()
    (tmp_path / "01-eval" / "results.json").write_text(
        json.dumps({"rows": [row("zero")], "contamination": contamination})
    )
    assert "0 of 100 held-out problems found in 5,000 words and 7 problems" in words(
        section(card.render(read(tmp_path)), "stages")
    )


def test_the_board_of_every_stage(text):
    html = section(text, "learning")
    assert re.findall(r"<h3>(\w+) ", html) == ["zero", "dev2", "r1", "alone"]
    parts = {part.split(" ")[0]: words("<h3>" + part.removesuffix("</section>")) for part in html.split("<h3>")[1:]}
    for part in parts.values():
        for title in (
            "Accuracy", "Length", "Reflection", "Word by word", "Tries", "Thinking", "Language", "Entropy",
            "Lost signal", "Sampler gap", "KL to the reference", "Inside the trace", "Held-out, task by task",
        ):  # fmt: skip
            assert title in part, title
    assert "wait 1.99" in parts["zero"] and "等等" not in parts["zero"]  # the six used most
    assert "Reward model" in parts["r1"] and "Reward model" not in parts["zero"]
    assert "rl/words" not in words(section(text, "curves")) and "Training loss" in section(text, "curves")


def test_alarms_where_they_belong(text):
    html = section(text, "learning")
    alarms = {
        part.split(" ")[0]: re.findall(r'class="alarm[^"]*"><b>([^<]+)</b>', part) for part in html.split("<h3>")[1:]
    }
    assert alarms == {"zero": ["language mixing"], "dev2": [], "r1": ["reward model hacking"], "alone": []}
    assert html.count("No alarm.") == 2 and "cause: only the answer" in words(html)


def test_an_alarm_that_is_over_says_so(tmp_path):
    (tmp_path / "recipe.toml").write_text('name = "x"\n[[stage]]\nkind = "rl"\nname = "zero"\n')
    (tmp_path / "01-zero").mkdir()
    lines = [
        {"stage": "zero", "step": step, "tokens": 0, "values": {"rl/kl": 5.0 if step < 20 else 0.01}}
        for step in range(40)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "kl runaway at step 4, over" in words(card.render(read(tmp_path)))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:20]))
    assert "kl runaway since step 4" in words(card.render(read(tmp_path)))


def test_controls_beside_the_main_run(root, text):
    run = read(root)
    assert comparisons.control_names(run) == {"coin", "form", "copied"}
    ((main, differences),) = [
        (group.main.name, [words for _, words in group.controls]) for group in comparisons.control_groups(run)
    ]
    assert main == "zero"
    assert differences == ["random reward", "reward for the format alone", "SFT on the same tokens"]
    html = section(text, "controls")
    assert re.findall(r'<th scope="col">([a-z0-9]+)<small>', html)[:5] == [
        "pretrain",
        "zero",
        "coin",
        "form",
        "copied",
    ]
    charts = [words(chart) for chart in re.findall(r"<figure.*?</figure>", html, re.DOTALL)]
    assert len(charts) == 6
    for chart in charts:  # one pair of axes for all stages that have the metric
        assert "zero" in chart and "coin" in chart and "form" in chart
    assert len({clip for clip in re.findall(r'<clipPath id="([^"]+)"', text)}) == text.count("<clipPath id=")


def test_rollouts_are_a_list_without_scripts_and_a_browser_with_them(text):
    html = section(text, "rollouts")
    assert html.count('class="browser"') == 6
    browser = html.split('class="browser"')[1]
    assert browser.count("<details") == 8 and browser.count('data-step="200"') == 8
    assert browser.count('class="when"') == 8 * 6 and browser.count("<pre>") == 8 * 6 * 2
    script = text.split("<script>")[1]
    for name in ("browser", "prompt", "when", "moment", "step"):  # the page has what the script looks for
        assert f".{name}" in script and (f'class="{name}"' in html or f"data-{name}" in html)


def test_long_runs_leave_small_rollouts(tmp_path):
    run = fake_run.make(tmp_path / "run")
    lines = [
        {"step": step, "id": f"p{p}", "prompt": "p", "completion": "x" * 3000, "correct": False}
        for step in range(200)
        for p in range(8)
        for _ in range(2)
    ]
    (run / "04-zero" / "rollouts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    html = transcripts.rollouts(read(run))
    assert len(html) < 400_000 and 'data-step="0"' in html and 'data-step="199"' in html
    short = [line | {"completion": "x"} for line in lines]
    (run / "04-zero" / "rollouts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in short))
    assert transcripts.rollouts(read(run)).count('class="when"') == 8 * 24
