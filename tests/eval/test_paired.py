"""`bessemer compare`: differences per problem, their intervals, and what cannot be compared."""

import json

import numpy as np
import pytest
from made_run import write_run

from bessemer.errors import UserError
from bessemer.eval import paired, tables
from bessemer.eval.intervals import stratified
from bessemer.eval.paired import Asked
from bessemer.runs.files import write_json

SUMS = Asked("sums", "en", 1.0, 1.0)
WORDS = Asked("words", "en", 1.0, 1.0)


def model(*shares, asked=SUMS):
    return {asked: {f"p{place}": share for place, share in enumerate(shares)}}


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
def test_the_interval_covers_what_is_true(seeds, spread):
    """In 400 simulated comparisons, at the nominal rate minus an allowance for so few."""
    rng = np.random.default_rng(3)
    inside = 0
    for _ in range(400):
        (line,) = paired.compare(*simulated(rng, 60, 0.08, seeds, spread))
        inside += line.low <= 0.08 <= line.high
    assert inside >= 400 * 0.92


def test_pairing_sees_what_two_intervals_would_not():
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
    first = model(*[0.0] * 10) | model(*[0.5] * 90, asked=WORDS)
    second = model(*[0.4] * 10) | model(*[0.5] * 90, asked=WORDS)
    *_, mean = paired.compare([first], [second])
    (line,) = paired.compare([first], [second], only=["sums"])
    assert line.asked == "sums en, T 1"
    with pytest.raises(UserError, match="not both asked logic; they were both asked sums, words"):
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
    first, second = (model(*side) | model(*side, asked=chinese) for side in ([0.25] * 20, shares))
    english, _, mean = paired.compare([first], [second])
    assert mean.n == english.n == 20 and (mean.low, mean.high) == (english.low, english.high)
    rows = [
        {"model": "m", "task": "sums", "language": language, "pass_at_1": 0.5, "readable": 0.5, "samples": 1,
         "readable_by_problem": second[SUMS]}
        for language in ("en", "zh")
    ]  # fmt: skip
    ((readable,),) = ([row.cells for row in table.overall] for table in tables.stage_tables(rows))
    (both,) = readable
    assert both.interval == stratified([("sums", dict(enumerate(shares)))])[1:]


def test_other_problems_are_refused_and_the_common_ones_offered():
    second = {SUMS: {f"p{place}": 0.5 for place in range(10, 40)}}
    with pytest.raises(UserError, match="asked 20 and 30 problems, 10 of them the same; --common compares"):
        paired.compare([model(*[0.1] * 20)], [second])
    assert paired.compare([model(*[0.1] * 20)], [second], common=True)[0].n == 10
    with pytest.raises(UserError, match="0 of them the same; evaluate both again with --task"):
        paired.compare([model(0.1)], [second])
    with pytest.raises(UserError, match=r"nothing in common \(sums en, T 1; words en, T 1\)"):
        paired.compare([model(0.1)], [model(0.1, asked=WORDS)])


def test_other_measures_than_accuracy():
    row = {"task": "sums", "language": "en", "temperature": 1.0, "top_p": 1.0}
    first = row | {"by_problem": {"a": 0.5, "b": 1.0}, "readable_by_problem": {"a": 0.0, "b": 0.5}}
    second = first | {"readable_by_problem": {"a": 0.5, "b": 1.0}}
    one, other = (paired.rates([found], "it", "readable") for found in (first, second))
    assert paired.compare([one], [other])[0].difference == 0.5
    with pytest.raises(UserError, match="earlier version"):
        paired.rates([row | {"by_problem": {"a": 0.5}}], "it", "language")


def test_answers_with_another_cap_are_something_else():
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


def test_two_stages_of_a_run_by_the_command(call, tmp_path):
    """From their run's evaluation, and by asking them again."""
    root = write_run(tmp_path / "tiny")
    row = {"model": "zero", "domain": "maths", "task": "sums", "language": "en", "temperature": 1.0, "top_p": 1.0}
    (root / "02-eval").mkdir()
    status, _, err = call("compare", root / "zero", root / "zero")
    assert status == 2 and "asked nothing in common (nothing; nothing); evaluate both again with --task" in err
    write_json(root / "02-eval" / "results.json", {"rows": [row]})
    status, _, err = call("compare", root / "zero", root / "zero")
    assert status == 2 and "earlier version" in err and "--task sums" in err
    write_json(root / "02-eval" / "results.json", {"rows": [row | {"by_problem": {"a": 0.5, "b": 1.0}}]})
    status, out, _ = call("compare", root / "zero", f"{root / 'zero'},{root / 'zero'}")
    assert status == 0 and "sums en, T 1" in out and "2 seeds" in out and "no significant difference" in out
    assert call("compare", root / "zero", root / "zero", "--measure", "beauty")[2].endswith(
        'there is no measure "beauty"; choose from pass@1, readable, language\n'
    )
    asked = ("--task", "countdown", "--problems", 3, "--samples", 2, "--max-tokens", 8, "--json")
    status, out, _ = call("compare", root, root / "zero", *asked)
    (line,) = json.loads(out)["rows"]
    assert status == 0 and line["asked"] == "countdown en+zh, T 1, at most 8 tokens"
    assert line["n"] == 3 and line["difference"] == 0
    status, out, _ = call("compare", root, root / "zero", *asked, "--measure", "readable")
    found = json.loads(out)
    assert status == 0 and found["measure"] == "readable" and 0 <= found["rows"][0]["first"] <= 1
    assert "has no effect without --task" in call("compare", root, root, "--problems", 3)[2]
