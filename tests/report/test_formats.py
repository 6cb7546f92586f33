"""The comparison of number formats: which stages are compared, and the gap against a plain loop."""

from pathlib import Path

import pytest
from chinese_pages import untranslated

from bessemer.addons.watch import card, comparisons
from bessemer.addons.watch.facts import RunFacts, Series, StageFacts

SETTINGS = {"kind": "pretrain", "from": "corpus", "tokens": 1000, "lr": [["0", 1.0]], "fp8": "off",
            "precision": "bfloat16", "moments": "bfloat16", "micro_rows": 8}  # fmt: skip


def stage(name, losses, bpb=None, **changes):
    settings = SETTINGS | {"name": name, "seed": 1} | changes
    series = Series([*range(1, len(losses) + 1)], [10 * n for n in range(1, len(losses) + 1)], list(losses))
    summary = {} if bpb is None else {"bpb_english": bpb, "bpb_code": 2 * bpb}
    return StageFacts(name, "pretrain", Path("x"), True, 1.0, summary, settings, series={"train/loss": series})


def run(*stages):
    return RunFacts(Path("runs/x"), {"name": "x", "stage": []}, "", list(stages), [], 0.0)


def curve(shift, n=40):
    return [5.0 - 0.05 * step + shift * (step % 3) for step in range(n)]


def test_the_gap_matches_that_of_smoothed_losses():
    base, other = curve(0.01), curve(0.02)
    (result,) = comparisons.format_gaps(run(stage("a", base, 1.0), stage("b", other, 1.01, fp8="paper")))
    e, f, expected = base[0], other[0], [100 * (other[0] - base[0]) / base[0]]
    for x, y in zip(base[1:], other[1:], strict=True):
        e, f = 0.9 * e + 0.1 * x, 0.9 * f + 0.1 * y
        expected.append(100 * (f - e) / e)
    assert result.gap == pytest.approx(expected) and result.tokens == [10 * n for n in range(1, 41)]
    assert result.heldout == pytest.approx(1.0) and result.label == "FP8, paper"
    assert result.settled == result.gap[4:]


def test_only_stages_that_share_all_else_are_compared():
    stages = [
        stage("one", curve(0.0)),
        stage("fp8", curve(0.1), fp8="paper", micro_rows=4),
        stage("plain", curve(0.1), precision="float32"),
        stage("other-rate", curve(0.3), lr=[["0", 2.0]], fp8="paper"),
        stage("two", curve(0.0), seed=2),
        stage("fp8-2", curve(0.2), seed=2, fp8="paper"),
    ]
    compared = {(gap.label, gap.seed) for gap in comparisons.format_gaps(run(*stages))}
    assert compared == {("FP8, paper", 1), ("float32", 1), ("FP8, paper", 2)}
    assert comparisons.format_gaps(run(stages[0], stages[3])) == [] and comparisons.formats_text(run(stages[0])) == ""
    assert comparisons.formats_html(run(stages[0], stages[4])) == ""


def test_the_table_and_the_page():
    facts = run(
        stage("a", curve(0.0), 1.0),
        stage("b", curve(0.1), 1.02, fp8="block-gradients"),
        stage("c", curve(0.0), 1.0, seed=2),
        stage("d", curve(0.2), 1.00, seed=2, fp8="block-gradients"),
    )
    lines = comparisons.formats_text(facts).splitlines()
    assert "BF16 with the same seed" in lines[0] and len({len(line) for line in lines[1:]}) == 1
    assert lines[2].startswith("FP8, block gradients") and lines[2].split()[3] == "2"
    mean, low, _, high, largest, heldout, *interval = lines[2].split()[4:]
    assert float(low) < float(mean) < float(high) and float(mean) < float(largest)
    # held-out gaps of 2 and 0 %: mean 1, standard error 1, Student's t for one degree of freedom 12.706
    assert (heldout, interval) == ("+1.000", ["-11.706", "to", "+13.706"])
    page = card.render(facts)
    assert untranslated(page, "pretrain block gradients english code") == []
    assert 'id="formats"' in page and "FP8, block gradients" in page and "formats/gap" not in page


def test_the_heading_names_the_baselines_that_were_used():
    """BF16 where a seed has it, whichever stage comes first."""
    stages = [stage("a", curve(0.0), precision="float32"), stage("b", curve(0.1)), stage("c", curve(0.1), fp8="paper")]
    assert {gap.label for gap in comparisons.format_gaps(run(*stages))} == {"float32", "FP8, paper"}
    assert "against BF16 with" in comparisons.formats_text(run(*stages))
    assert "against BF16 with" in comparisons.formats_html(run(*stages))
    other = stage("d", curve(0.0), seed=2, precision="float32"), stage("e", curve(0.1), seed=2, fp8="paper")
    assert "against BF16 or float32 with" in comparisons.formats_text(run(*stages, *other))
