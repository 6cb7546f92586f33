"""`bessemer compare`: differences per problem, their intervals, and what cannot be compared."""

import json
import shutil
from unittest.mock import Mock

import numpy as np
import pytest
from made_run import write_run

from bessemer import tasks
from bessemer.addons.evals import evaluate, paired, tables
from bessemer.addons.evals.intervals import stratified
from bessemer.addons.evals.mean_interval import wilson
from bessemer.addons.evals.paired import Asked
from bessemer.errors import UserError
from bessemer.eval import scoring
from bessemer.runs.files import write_json

SUMS = Asked("sums", "en", 1.0, 1.0)
WORDS = Asked("words", "en", 1.0, 1.0)


def row(setting, shares, **more):
    stated = setting._asdict() | {"max_new_tokens": setting.max_new_tokens, "translated": True} | more
    return stated | {"by_problem": {f"p{number}": share for number, share in enumerate(shares, more.get("skip", 0))}}


def model(*shares, setting=SUMS, **more):
    return paired.rates([row(setting, shares, **more)], "it")


def simulated(rng, n, gain, seeds=1, spread=0.0, samples=16):
    """Two sides on n problems of very different difficulty; a seed shifts all its problems alike."""
    easy = rng.beta(0.5, 0.5, n)
    sides = []
    for more in (0.0, gain):
        moved = more + spread * rng.standard_normal(seeds)
        chances = [np.clip(0.1 + 0.7 * easy + one, 0, 1) for one in moved]
        sides.append([model(*(rng.binomial(samples, chance) / samples)) for chance in chances])
    return sides


@pytest.mark.parametrize("seeds, spread", [(1, 0.0), (3, 0.03)])
def test_the_paired_interval_covers_the_truth(seeds, spread):
    """In 400 simulated comparisons, at the nominal rate minus an allowance for so few."""
    rng = np.random.default_rng(3)
    inside = 0
    for _ in range(400):
        (line,) = paired.compare(*simulated(rng, 60, 0.08, seeds, spread))
        inside += line.low <= 0.08 <= line.high
    assert inside >= 400 * 0.92


def test_pairing_finds_differences_that_two_intervals_hide():
    """Problems differ far more than the models do: unpaired intervals overlap widely, the paired one excludes 0."""
    hard, easy = [0.0, 0.1] * 20, [0.9, 1.0] * 20
    gains = [0.03, 0.04, 0.05, 0.04] * 20
    better = [share + gain for share, gain in zip((*hard, *easy), gains, strict=True)]
    (line,) = paired.compare([model(*hard, *easy)], [model(*better)])
    assert line.difference == pytest.approx(0.04) and line.low > 0.03 and line.verdict == "the second is better"
    (line,) = paired.compare([model(*better[:40])], [model(*hard)])
    assert line.verdict == "the first is better"


def test_few_problems_that_differ_are_not_taken_for_certain():
    (line,) = paired.compare([model(*[0.0] * 19, 0.0)], [model(*[0.0] * 19, 1.0)])
    assert line.low < 0 < line.high and line.verdict == "no significant difference"
    (line,) = paired.compare([model(*[0.5] * 20)], [model(*[0.5] * 20)])
    assert line.difference == 0 and line.low < -0.1 and line.high > 0.1


@pytest.mark.parametrize(("first", "second"), [([0.0] * 6, [1.0] * 6), ([0.1, 0.7, 0.3] * 2, [0.2, 0.8, 0.4] * 2)])
def test_equal_differences_have_an_interval(first, second):
    """Resampling them gives the same difference every time."""
    (line,) = paired.compare([model(*first)], [model(*second)])
    assert line.high - line.low > 0.3 and line.low <= line.difference <= line.high


def test_seeds_that_disagree_widen_the_interval_and_one_base_serves_all():
    base = model(*[0.2, 0.4] * 30)
    agreed = [model(*[0.4, 0.6] * 30)] * 3
    torn = [model(*[0.0, 0.2] * 30), model(*[0.4, 0.6] * 30), model(*[0.8, 1.0] * 30)]
    assert paired.compare([base], agreed)[0].verdict == "the second is better"
    (line,) = paired.compare([base], torn)
    assert line.difference == pytest.approx(0.2) and line.seeds == 3 and line.low < 0
    with pytest.raises(UserError, match="2 models against 3: name equally many seeds"):
        paired.compare([base, base], torn)


def test_tasks_count_the_same_in_their_mean():
    first = model(*[0.0] * 10) | model(*[0.5] * 90, setting=WORDS)
    second = model(*[0.4] * 10) | model(*[0.5] * 90, setting=WORDS)
    *_, mean = paired.compare([first], [second])
    (line,) = paired.compare([first], [second], only=["sums"])
    assert line.asked == "sums en, T 1"
    with pytest.raises(UserError, match=r"logic; .*sums, words"):
        paired.compare([first], [second], only=["sums", "logic"])
    assert mean.asked == "mean of these 2" and mean.difference == pytest.approx(0.2) and mean.n == 100
    rng = np.random.default_rng(0)
    groups = [rng.normal(0.1, 0.3, 50), rng.normal(0.5, 0.1, 200)]
    middle, low, high = stratified([(task, dict(enumerate(rates))) for task, rates in zip("ab", groups, strict=True)])
    half = 1.96 * (groups[0].var() / 50 + groups[1].var() / 200) ** 0.5 / 2
    assert (low, high) == pytest.approx((middle - half, middle + half), abs=0.006)


def test_a_problem_in_two_languages_is_one_problem():
    chinese = SUMS._replace(language="zh")
    shares = np.linspace(0, 1, 20).tolist()
    first, second = (model(*side) | model(*side, setting=chinese) for side in ([0.25] * 20, shares))
    english, _, mean = paired.compare([first], [second])
    assert mean.n == english.n == 20 and (mean.low, mean.high) == (english.low, english.high)
    assert readable(*[("sums", language, shares) for language in ("en", "zh")]) == stratified(
        [("sums", dict(enumerate(shares)))]
    )


def readable(*rows, **more):
    """The mean of a stage table, with its interval."""
    rows = [
        {"model": "m", "task": task, "language": language, "pass_at_1": 0.5, "readable": np.mean(shares), "samples": 1,
         "translated": True, "readable_by_problem": {f"p{number}": share for number, share in enumerate(shares)}} | more
        for task, language, shares in rows
    ]  # fmt: skip
    (table,) = tables.stage_tables(rows)
    cells = table.overall[-1].cells
    return cells[0].value, *cells[0].interval


@pytest.mark.parametrize("task", ["jsonl:mine.jsonl@test", "sums"])
def test_other_problems_in_another_language_are_other_problems(task):
    """A file has its own questions in each language, and may have more in one."""
    english, shares = SUMS._replace(task=task), np.linspace(0, 1, 30).tolist()
    chinese = english._replace(language="zh")
    first, second = (
        model(*side, setting=english, translated=False)
        | model(*side[: len(side) - 10], setting=chinese, translated=False)
        for side in ([0.25] * 30, shares)
    )
    *_, mean = paired.compare([first], [second])
    assert mean.n == 50
    apart = stratified([("a", dict(enumerate(shares))), ("b", dict(enumerate(shares[:20])))])
    assert readable((task, "en", shares), (task, "zh", shares[:20]), translated=False) == pytest.approx(
        tuple(apart), abs=0.01
    )
    both = readable((task, "en", shares), (task, "zh", shares))
    assert both == stratified([("a", dict(enumerate(shares)))])


@pytest.mark.parametrize("few", [[1.0], [1.0, 0.0], [1.0, 1.0], [1.0, 0.0, 1.0]])
def test_a_task_of_few_problems_is_uncertain_in_the_mean_and_no_more(few):
    many_rates = ([0.0, 1.0] * 250, [0.25, 0.75] * 250)
    mean, low, high = readable(("sums", "en", many_rates[0]), ("words", "en", few))
    alone = wilson(np.mean(few), len(few))
    assert (low, high) == pytest.approx([(0.5 + end) / 2 for end in alone], abs=0.03) and low < mean < high
    *_, both = paired.compare(
        [model(*many_rates[1]) | model(*[0.0] * len(few), setting=WORDS)],
        [model(*many_rates[0]) | model(*few, setting=WORDS)],
    )
    assert both.low > -0.55 and both.high < 0.55 and both.high - both.low > 0.3


def test_other_problems_are_refused_and_the_common_ones_offered():
    second = model(*[0.5] * 30, skip=10)
    with pytest.raises(UserError, match=r"20 and 30 problems, 10 .*--common"):
        paired.compare([model(*[0.1] * 20)], [second])
    assert paired.compare([model(*[0.1] * 20)], [second], common=True)[0].n == 10
    with pytest.raises(UserError, match=r"0 of them .*--task"):
        paired.compare([model(0.1)], [second])
    with pytest.raises(UserError, match=r"nothing in common \(sums en, T 1; words en, T 1\)"):
        paired.compare([model(0.1)], [model(0.1, setting=WORDS)])


def test_other_measures_than_accuracy():
    row = {"task": "sums", "language": "en", "temperature": 1.0, "top_p": 1.0}
    first = row | {"by_problem": {"a": 0.5, "b": 1.0}, "readable_by_problem": {"a": 0.0, "b": 0.5}}
    second = first | {"readable_by_problem": {"a": 0.5, "b": 1.0}}
    one, other = (paired.rates([actual], "it", "readable") for actual in (first, second))
    assert paired.compare([one], [other])[0].difference == 0.5
    with pytest.raises(UserError, match="earlier version"):
        paired.rates([row | {"by_problem": {"a": 0.5}}], "it", "language")


def test_answers_with_different_length_caps_are_not_compared():
    """Except beside a row of an earlier version, which does not state it."""
    row = {"task": "sums", "language": "en", "temperature": 1.0, "top_p": 1.0, "by_problem": {"a": 0.5, "b": 1.0}}
    short, long, older = (
        paired.rates([row | cap], "it") for cap in ({"max_new_tokens": 40}, {"max_new_tokens": 200}, {})
    )
    with pytest.raises(UserError, match=r"\(sums en, T 1, at most 40 tokens; sums en, T 1, at most 200 tokens\)"):
        paired.compare([short], [long])
    assert [line.asked for line in paired.compare([short], [short])] == ["sums en, T 1, at most 40 tokens"]
    for first, second in ((older, long), (short, older)):
        assert [line.asked for line in paired.compare([first], [second])] == ["sums en, T 1"]


def test_another_cap_is_named_and_a_row_without_one_does_not_hide_it():
    """A row of an earlier version states no cap; it is compared where nothing else could be meant."""
    maths, words, capped = Asked("maths", "en", 1.0, 1.0), WORDS._replace(max_new_tokens=40), SUMS._replace
    low, high = ([share] * 20 for share in (0.25, 0.75))
    first = model(*low, setting=capped(max_new_tokens=40)) | model(*low, setting=words) | model(*low, setting=maths)
    second = model(*high, setting=capped(max_new_tokens=900)) | model(*high, setting=words)
    (line,) = paired.left_out([first], [second])
    assert line.startswith("sums en is not compared, since it was asked differently (sums en, T 1, at most 40 tokens; ")
    assert line.endswith("sums en, T 1, at most 900 tokens); evaluate both again with --task sums")
    assert [one.asked for one in paired.compare([first], [second])] == ["words en, T 1, at most 40 tokens"]
    with pytest.raises(UserError, match="sums en is not compared, since"):
        paired.compare([first], [second], only=["sums"])
    assert not paired.left_out([first], [second], only=["words"])
    twice = first | model(*high, setting=capped(max_new_tokens=900))
    actual = {line.asked: line.difference for line in paired.compare([twice], [second | model(*low, setting=maths)])}
    assert actual["sums en, T 1, at most 900 tokens"] == 0 and len(actual) == 4
    with pytest.raises(UserError, match="nothing in common"):  # which of the two?
        paired.compare([twice], [model(*low)])
    rows = [
        {"model": name, "task": task, "language": "en", "samples": 1, "pass_at_1": 0.5} | cap
        for name, task, cap in (
            ("a", "sums", {"max_new_tokens": 40}), ("a", "sums", {"max_new_tokens": 900}), ("b", "words", {}),
        )
    ]  # fmt: skip
    assert [table.models for table in tables.stage_tables(rows)] == [("a",), ("a",), ("b",)]
    assert [table.models for table in tables.stage_tables(rows[1:])] == [("a", "b")]


def test_a_row_says_which_held_out_problems_it_asked(tmp_path, monkeypatch):
    (tmp_path / "train.jsonl").write_text('{"question": "What is 1 plus 1?", "answer": "2"}\n')
    monkeypatch.setattr(scoring, "played", lambda engine, setting, *_, **__: (None, [[]] * len(setting)))
    monkeypatch.setattr(scoring, "judge", lambda task, problems, *_, **__: {"n": len(problems)})
    call = {"problems": 3, "samples": 1}
    assert scoring.evaluate(None, None, tasks.get("sums"), **call, skip=2) == {"n": 3, "skip": 2}
    with pytest.raises(UserError, match="holds out no problem; write @test"):
        scoring.evaluate(None, None, tasks.get(f"jsonl:{tmp_path}"), **call)
    for size, skip, setting in ((None, 5, 10), (20, 5, 10), (12, 5, 7), (5, 5, 10), (0, 0, 10)):
        assert evaluate._available(Mock(size=lambda _, size=size: size), 10, skip) == setting


def test_two_stages_of_a_run_by_the_command(call, tmp_path):
    """From their run's evaluation, and by asking them again."""
    root = write_run(tmp_path / "tiny")
    sums = {"model": "zero", "domain": "maths", "task": "sums", "language": "en", "temperature": 1.0, "top_p": 1.0}
    (root / "02-eval").mkdir()
    other = shutil.copytree(root, tmp_path / "other")

    def evaluated(row):
        for run in (root, other):
            write_json(run / "02-eval" / "results.json", {"rows": [row]})

    assert "on both sides" in call("compare", root / "zero", root / "zero")[2]
    status, _, err = call("compare", root / "zero", other / "zero")
    assert status == 2 and "asked nothing in common (nothing; nothing); evaluate both again with --task" in err
    evaluated(sums)
    status, _, err = call("compare", root / "zero", other / "zero")
    assert status == 2 and "earlier version" in err and "--task sums" in err
    evaluated(sums | {"by_problem": {"a": 0.5, "b": 1.0}})
    status, out, _ = call("compare", root / "zero", f"{other / 'zero'},{other / 'zero'}")
    assert status == 0 and "sums en, T 1" in out and "2 seeds" in out and "no significant difference" in out
    sides = []
    for cap in (8, 9):
        sides.append(shutil.copytree(root, tmp_path / str(cap)))
        rows = [
            sums | {"by_problem": {"a": 0.5}},
            sums | {"task": "words", "by_problem": {"a": 1}, "max_new_tokens": cap},
        ]
        write_json(sides[-1] / "02-eval" / "results.json", {"rows": rows})
    named = "words en is not compared, since it was asked differently (words en, T 1, at most 8 tokens; "
    assert (
        named in call("compare", *sides)[1] and named in json.loads(call("compare", *sides, "--json")[1])["left_out"][0]
    )
    assert call("compare", root / "zero", other / "zero", "--measure", "beauty")[2].endswith(
        'there is no measure "beauty"; choose from pass@1, readable, language\n'
    )
    setting = ("--task", "countdown", "--problems", 3, "--samples", 2, "--max-tokens", 8, "--json")
    status, out, _ = call("compare", root, other / "zero", *setting)
    (line,) = json.loads(out)["rows"]
    assert status == 0 and line["asked"] == "countdown en+zh, T 1, at most 8 tokens"
    assert line["n"] == 3 and line["difference"] == 0
    status, out, _ = call("compare", root, other / "zero", *setting, "--measure", "readable")
    actual = json.loads(out)
    assert status == 0 and actual["measure"] == "readable" and 0 <= actual["rows"][0]["first"] <= 1
    assert "has no effect without --task" in call("compare", root, other, "--problems", 3)[2]
    for command in (("compare", root, other), ("eval", root)):
        assert "Input should be greater than or equal to 0" in call(*command, "--task", "countdown", "--seed", -1)[2]
