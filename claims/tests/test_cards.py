"""The registry is complete, and the cards' figures agree with independent ways of counting."""

import json
import random
import re
import string
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from bessemer.cli import app
from bessemer.errors import UserError
from bessemer_claims import cards, exact, phrases, planned, registry, spot_checks
from bessemer_claims.verdict import ClaimVerdict, Measured


@pytest.fixture(scope="module")
def all_cards(all_cards):
    return {card.name: card for card in all_cards}


def test_every_claim_of_the_account_is_there():
    numbers = {"H": 14, "M": 22, "L": 13, "T": 12, "F": 12, "P": 7, "G": 7, "Z": 11, "R": 7, "D": 5, "K": 9}
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
            assert claim.kinds[0] in kinds | ({"R"} if name in spot_checks.CHECKS else set()), name
        if claim.kinds[0] == "A":
            assert claim.audit or "B" in kinds, name
        assert bool(claim.scores) == ("B" in kinds), name


def test_verdicts(all_cards):
    """The verdicts of this version: to change this test is to change what the page claims."""
    verdicts = {
        verdict: " ".join(name for name, card in all_cards.items() if card.verdict is verdict)
        for verdict in ClaimVerdict
    }
    assert verdicts[ClaimVerdict.CONTRADICTED] == "H3 H9 M12 M17 M18 L5 L11 L13 T2 F10 G5 Z7 Z9 K6"
    assert verdicts[ClaimVerdict.NOT_TESTABLE] == "H13 G6 D5" and verdicts[ClaimVerdict.NOT_SHOWN] == "F7 K3"
    expected = "H6 H7 H10 H12 H14 M1 M13 M21 L3 L4 T1 T3 T8 T9 F1 F2 F4 F5 F11 P1 P4 G1 G2 G7 Z1"
    assert verdicts[ClaimVerdict.SHOWN] == expected
    assert len(verdicts[ClaimVerdict.PART].split()) == 41 and len(verdicts[ClaimVerdict.NOT_RUN].split()) == 34
    assert all(card.verdict is not ClaimVerdict.SHOWN for card in all_cards.values() if card.earlier)


def test_results_of_runs_take_their_place():
    """How trained arms enter a card: three seeds, one control that must show harm and one that must not."""
    unchanged = Measured([-0.004, -0.002, -0.003], positive=[0.02, 0.03, 0.025], negative=[0.001, -0.001, 0.0])
    metric = "bpb(ref) / bpb(MHA) - 1"
    results = {"L6": {metric: unchanged}, "F7": {"held-out, FP8 / BF16 - 1, %": Measured([0.1, 0.12, 0.11])}}
    results["Z2"] = {}
    latent, fp8, rise = cards.make(["L6", "F7", "Z2"], results)
    assert latent.verdict is ClaimVerdict.SHOWN and latent.facts()["parts"][0]["interval"][0] == pytest.approx(-0.003)
    assert fp8.verdict is ClaimVerdict.PART and fp8.earlier is None  # its other metric has not been run
    assert rise.found is not None and "three runs" in rise.found[0]
    [blind] = cards.make(["L6"], {"L6": {metric: Measured(unchanged.values, positive=[0.02, -0.03, 0.0])}})
    assert blind.verdict is ClaimVerdict.NOT_SHOWN


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
    assert facts["claims"][1]["verdict"] == "contradicted" and facts["rules"] == registry.rules_hash()
    assert "1.76 %" in facts["claims"][1]["found"]["zh"]


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
    assert len(claims) == 119 and lines[-1] == "[]" and lines[0].startswith("H1   A   E33")
    assert "R a run here" in done.stdout
