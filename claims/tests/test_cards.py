"""The registry is complete, and the cards' figures agree with independent ways of counting."""

import hashlib
import json
import random
import re
import string
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bessemer.cli import app
from bessemer.errors import UserError
from bessemer_claims import cards, exact, phrases, planned, registry, spot_checks, verdict
from bessemer_claims.verdict import Doubt, Measured, Seen

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def all_cards(all_cards):
    return {card.name: card for card in all_cards}


def test_every_claim_of_the_account_is_there():
    numbers = {"H": 18, "M": 22, "L": 13, "T": 12, "F": 12, "P": 7, "G": 7, "Z": 11, "R": 7, "D": 5, "K": 9}
    assert list(registry.claims()) == [f"{letter}{n + 1}" for letter, most in numbers.items() for n in range(most)]


def test_both_languages_have_the_same_placeholders():
    for name, claim in registry.claims().items():
        texts = [claim.text, *filter(None, (claim.found, claim.limit))]
        for english, chinese in texts:
            assert english.isascii() or not re.search("[一-鿿]", english), name
            assert re.search("[一-鿿]", chinese), name
            fields = [
                sorted(field for _, field, *_ in string.Formatter().parse(sentence) if field)
                for sentence in (english, chinese)
            ]
            assert fields[0] == fields[1], name


def test_no_sentence_reports_a_run_that_never_happened():
    """The page derives that from the results that exist."""
    stale = re.compile(r"(run|made|measured) yet|not (been )?(run|repeated)|尚未|还没有")
    texts = {name: [*(claim.found or ()), *(claim.limit or ())] for name, claim in registry.claims().items()}
    texts |= {name: [*experiment.does, *experiment.limit] for name, experiment in registry.experiments().items()}
    assert not [name for name, several in texts.items() if stale.search(" ".join(several))]


def test_every_kind_has_what_decides_it():
    rules = registry.rules().claim
    words = phrases.words()
    for name, claim in registry.claims().items():
        plain = registry.metrics().get(name, {})
        parts = [part for part in rules[name].parts if part.kind != "B"] if name in rules else []
        assert set(plain) == {part.metric for part in parts}, name
        assert all(re.search("[一-鿿]", chinese) and unit in words["unit"] for _, chinese, unit in plain.values()), name
        for control in filter(None, (candidate for part in parts for candidate in (part.positive, part.negative))):
            assert control in registry.metrics()["control"], (name, control)
        kinds = {part.kind for part in rules[name].parts} if name in rules else set()
        if claim.kinds[0] in "RXS":
            planned_only = {"X"} if "S" in kinds else set()
            assert claim.kinds[0] in kinds | planned_only | ({"R"} if name in spot_checks.CHECKS else set()), name
        if claim.kinds[0] == "A":
            assert claim.audit or "B" in kinds, name
        assert bool(claim.scores) == ("B" in kinds), name


def test_answers_from_documents(all_cards):
    """To change this test is to change what the page claims."""
    for answer, names in {
        "yes": "H6 H7 H10 H12 H14 M1 M5 M13 M21 L3", "no": "H3 L13 F10 Z9 K6 M17 L5 L10", "partly": "H2 H8 T10 K5 R3",
        "unknown": "H13 G6 D5",
    }.items():  # fmt: skip
        assert {all_cards[name].documented for name in names.split()} == {answer}, answer
    assert {card.seen for card in all_cards.values() if card.name != "T3"} == {"not-asked"}, "no runs"


def test_the_old_verdicts_are_kept(all_cards):
    totals = cards.counts(list(all_cards.values()))
    assert [*totals.values()] == [37, 36, 26, 17, 3, 0] and not set(registry.verdicts_1()) - set(registry.claims())
    newer = {name for name, card in all_cards.items() if card.rules_1 is None}
    assert newer == set(registry.claims()) - set(registry.verdicts_1()) == {"H15", "H16", "H17", "H18"}
    first = registry.data("rules-1.toml")
    assert [hashlib.sha256(first).hexdigest()] == registry.rules().before
    assert all_cards["R1"].rules_1 == "contradicted" and all_cards["R1"].documented != "no"


def test_what_agrees_with_itself_or_is_predicted_answers_nothing(all_cards):
    """Every part of these rules is this package's own number, or the planner's; the source alone can answer."""
    for name in ("F1", "F2", "P1", "G2", "M18", "T8", "F5", "P7", "F9", "R7", "K8", "K9"):
        findings = [finding for finding in all_cards[name].findings if finding.part is not None]
        assert {finding.role for finding in findings} <= {"consistency", "prediction"}, name
        source = verdict.documented([finding for finding in all_cards[name].findings if finding.part is None])
        assert all_cards[name].documented is source, name


def test_results_of_runs_take_their_place():
    """How trained arms enter a card: three seeds, one control that must show harm and one that must not."""
    unchanged = Measured([-0.004, -0.002, -0.003], positive=[0.02, 0.03, 0.025], negative=[0.001, -0.001, 0.0])
    metric = "bpb(ref) / bpb(MHA) - 1"
    results = {"L6": {metric: unchanged}, "F7": {"held-out, FP8 / BF16 - 1, %": Measured([0.1, 0.12, 0.11])}}
    results["Z2"] = {"pass@1 after - before, points": Measured([20.0, 22.0, 27.0])}
    latent, fp8, rise = cards.make(["L6", "F7", "Z2"], results)
    assert latent.seen is Seen.YES and latent.facts()["parts"][-1]["interval"][0] == pytest.approx(-0.003)
    assert fp8.seen is Seen.CANNOT_TELL and fp8.open  # its other metric has not been run
    assert rise.seen_text is not None and "23 points" in rise.seen_text[0] and "3 runs" in rise.seen_text[0]
    [unrun] = cards.make(["Z2"])
    assert unrun.seen_text is None or "23" not in unrun.seen_text[0], "no sentence about runs that were not made"
    [blind] = cards.make(["L6"], {"L6": {metric: Measured(unchanged.values, positive=[0.02, -0.03, 0.0])}})
    assert blind.seen is Seen.CANNOT_TELL


def test_the_larger_recipe_stands_beside_the_rule(all_cards):
    """Figures of docs/results.md: they are on the page of results, and move no answer."""
    results = (Path(__file__).parents[2] / "docs" / "results.md").read_text(encoding="utf-8")
    for name in ("R1", "R3", "R5", "Z3", "Z4", "Z5", "Z10", "R6"):
        assert any("r1-small" in side.size[0] for side in all_cards[name].beside), name
        assert all_cards[name].seen in (Seen.NOT_ASKED, Seen.CANNOT_TELL), name
        for figure in registry.r1_small().figures[name]:
            times = 100 if figure.unit == "+share" else 1
            if figure.mean is not None:
                ends = f"({times * figure.low:.1f} to {times * figure.high:.1f})"
                assert f"{times * figure.mean:+.1f} {ends}" in results, figure.name[0]
    [taught] = all_cards["R6"].beside
    assert taught.outcome == "holds" and taught.interval.low == 20.9
    [less] = all_cards["Z10"].beside
    assert less.outcome == "unclear" and less.doubts == (Doubt.MEANS,) and less.value == pytest.approx(-9.55)


def test_the_correction_is_over_all_claims_whichever_are_asked_for():
    weak = Measured([-0.03, -0.034, -0.04], positive=[-0.1, -0.11, -0.12], negative=[0.001, -0.001, 0.0])
    nothing = Measured([0.5, -0.5, 0.1], positive=[1.0, 1.1, 1.2], negative=[0.0, 0.1, -0.1])
    metric = "bpb(ref) - bpb(DACT)"
    rules = registry.rules().claim
    others = {name: {part.metric: nothing for part in rule.parts if part.kind == "R"} for name, rule in rules.items()}
    [alone], [among] = (cards.make(["M5"], results | {"M5": {metric: weak}}) for results in ({}, others))
    assert alone.seen is Seen.YES and among.seen is Seen.CANNOT_TELL
    [part] = [finding for finding in among.findings if finding.seeds]
    assert Doubt.CHANCE in part.doubts and part.p < 0.05 < part.q
    everything = {card.name: card for card in cards.make(list(registry.claims()), others | {"M5": {metric: weak}})}
    assert everything["M5"].facts() == among.facts()


def test_figures_match_independent_sums(all_cards):
    """Against published totals and hand counts, not against the code that made the cards."""
    assert exact.COMPUTED["L5"]()["share"] == pytest.approx(100 * (512 + 64) / (128 * (128 + 128)))
    assert exact.COMPUTED["L4"]()["context_gb"] == pytest.approx(128 * 256 * 61 * 2 * 131072 / 1e9)
    assert exact.COMPUTED["M12"]()["stored_ratio"] == pytest.approx(671.026 / 37.552, rel=1e-4)
    assert exact.COMPUTED["F12"]()["released"] == pytest.approx(688.587, rel=1e-4)  # its index on the Hub
    pipeline = exact.COMPUTED["P2"]()  # V3, Table 2, F = I = W = 1
    assert (pipeline["one_f_one_b"], pipeline["zb1p"]) == (7 * 3, 7 * (1 + 2 - 2))
    assert (pipeline["dualpipe"], pipeline["overlapped"]) == (3 * (3 + 2 - 3), 3 * (2.5 + 2 - 3))
    meta = exact.COMPUTED["K5"]()
    assert meta["hours"] == pytest.approx(meta["work"] * meta["use"]) == pytest.approx(30.84 / 2.664)
    assert exact.COMPUTED["T9"]()["without"] == pytest.approx(250.46, abs=0.01)
    table = {run["name"]: run for run in planned.reference()}
    assert table["Llama 3.1 405B"]["tflops"] == pytest.approx(341.4, abs=0.1)
    assert table["Llama 4 Scout"]["v3_hours"] == pytest.approx(4.03, abs=0.01)
    assert table["DeepSeek-V3, NVIDIA NeMo 25.09"]["v3_hours"] == pytest.approx(3.17, abs=0.01)
    assert planned.floor() == pytest.approx(0.52, abs=0.005)


def test_nodes_touched_matches_sampling():
    draw = random.Random(0)
    mean = sum(len({e // 32 for e in draw.sample(range(256), 8)}) for _ in range(4000)) / 4000
    assert exact.nodes_touched(exact.v3()) == pytest.approx(mean, abs=0.05)


def test_a_wrong_printed_figure_ends_with_1(monkeypatch):
    monkeypatch.setitem(exact.COMPUTED, "M1", lambda: exact._experts() | {"routed": 255})
    done = CliRunner().invoke(app, ["claims", "--only", "m1"])
    assert done.exit_code == 1 and "arithmetic does not give: M1 (routed = 256)" in done.stderr


def test_some_claims_as_json(monkeypatch):
    done = CliRunner().invoke(app, ["claims", "--only", "l5, M12,K7", "--json"])
    facts = json.loads(done.stdout)
    assert [card["id"] for card in facts["claims"]] == ["M12", "L5", "K7"]
    assert facts["claims"][1]["rules_1"] == "contradicted" and facts["rules"] == registry.rules_hash()
    assert "1.76%" in facts["claims"][1]["found"]["zh"]


def test_both_rules_side_by_side():
    done = CliRunner().invoke(app, ["claims", "--rules", "--only", "R1,M17"])
    assert (
        done.exit_code == 0 and "| R1 | contradicted |" in done.stdout and "| M17 | contradicted | no |" in done.stdout
    )
    assert "(as M12)" in done.stdout and registry.rules_hash()[:16] in done.stdout


def test_unknown_ids_name_the_nearest():
    with pytest.raises(UserError, match='no claim "M77"; did you mean M7'):
        registry.chosen(["M77"])
    with pytest.raises(UserError, match="at least one id"):
        registry.chosen([" "])


@pytest.mark.parametrize("other", [["--list"], ["--json"], ["--only", "M7"]])
def test_a_page_that_would_not_be_written_is_refused(other):
    done = CliRunner().invoke(app, ["claims", "--out", "x.html", *other])
    assert isinstance(done.exception, UserError) and other[0] in str(done.exception)


def test_wrong_data_names_file_and_key():
    with pytest.raises(UserError, match=r"claims.toml, Q1: kinds"):
        registry.entry(registry.ClaimEntry, {"kinds": "Q"}, "claims.toml, Q1")
    with pytest.raises(UserError, match="nothing to compare with"):
        registry.entry(registry.Part, {"kind": "X", "side": "above", "metric": "x"}, "rules.toml, Q1")


def test_the_list_imports_nothing_heavy():
    code = """
import sys
from bessemer.cli import main
sys.argv = ["bessemer", "claims", "--list"]
try:
    main()
except SystemExit:
    pass
print(sorted({"torch", "numpy"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    claims = [line for line in lines if re.match(r"[A-Z]\d+ ", line)]
    assert len(claims) == len(registry.claims()) and lines[-1] == "[]" and lines[0].startswith("H1   A   E33")
    assert "R a run here" in done.stdout


def test_cards_of_r1_zero_show_what_the_long_recipe_gave(all_cards):
    """The figures are those of the committed result of bench/zero_long.py, to the last digit."""
    seeds = json.loads((ROOT / "bench" / "results" / "zero_long.json").read_text())["seeds"]
    rows = {(i, row["model"], row["task"]): row for i, seed in enumerate(seeds) for row in seed["held_out"]}
    before, after = ([rows[i, model, "countdown:5"] for i in range(len(seeds))] for model in ("base", "zero"))
    table = cards.zero_long()
    for name, measured, key, times in (
        ("tokens_before", before, "mean_length", 1), ("tokens", after, "mean_length", 1),
        ("right_before", before, "pass_at_1", 100), ("right", after, "pass_at_1", 100),
        ("cut_off", after, "truncated", 100),
    ):  # fmt: skip
        values = [times * row[key] for row in measured]
        assert table[name] == pytest.approx([min(values), max(values)]), name
    assert table["n"] == len(seeds)
    shown = {name for name, card in all_cards.items() if card.longer}
    assert shown == {"Z2", "Z3", "Z6"} and "54" in all_cards["Z2"].longer[0]


def test_z3_and_the_first_screen_show_what_filtering_gave(all_cards):
    """The figures are those of the committed result of bench/filtering.py, to the last digit."""
    table = json.loads((ROOT / "bench" / "results" / "filtering.json").read_text())
    [row] = [
        row for row in table["table"]
        if (row["task"], row["answers"], row["against"]) == ("in distribution", 6144, "rounds")
    ]  # fmt: skip
    shown = cards.filtering()
    assert shown["n"] == len(table["seeds"]) == len(row["equal samples"]["values"])
    for name, value in {
        "base": row["base"], "grpo": row["grpo"], "rounds": row["filtering"],
        "lead": row["equal samples"]["mean"], "low": row["equal samples"]["low"], "high": row["equal samples"]["high"],
    }.items():  # fmt: skip
        assert shown[name] == pytest.approx(100 * value), name
    assert f"{shown['lead']:.1f} points ahead" in all_cards["Z3"].longer[0]
