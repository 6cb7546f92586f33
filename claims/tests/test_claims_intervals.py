"""bench/claims_intervals.py, which shares no code with the package, computes every figure of the page again."""

import ast
import copy
import json
import runpy
import sys
from pathlib import Path

import pytest
from scipy import stats

from bessemer_claims import both_rules, page, results

SCRIPT = Path(__file__).parents[2] / "bench" / "claims_intervals.py"


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(SCRIPT))


@pytest.fixture(scope="module")
def committed():
    return page.committed()


@pytest.fixture(scope="module")
def facts(committed):
    return json.loads(json.dumps([card.facts() for card in committed]))


def test_both_rules_stand_side_by_side_in_the_docs(committed):
    text = (SCRIPT.parents[1] / "docs" / "claims-rules.md").read_text(encoding="utf-8")
    assert text == both_rules.compared(committed), "run: python claims/tools/page.py"


def test_it_imports_numpy_alone():
    tree = ast.walk(ast.parse(SCRIPT.read_text(encoding="utf-8")))
    names = {alias.name for node in tree if isinstance(node, ast.Import) for alias in node.names}
    tree = ast.walk(ast.parse(SCRIPT.read_text(encoding="utf-8")))
    names |= {node.module for node in tree if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} <= {"numpy", *sys.stdlib_module_names}


def test_every_figure_agrees(script, facts):
    right, left, wrong = script["check"](facts, results.COMMITTED)
    assert wrong == [] and right > 200
    assert left == sum("r1-small" in side.get("size", "") for card in facts for side in card["beside"])


def test_a_figure_that_is_off_by_a_millionth_is_found(script, facts):
    for key in ("interval", "positive_control"):
        changed = copy.deepcopy(facts)
        [card] = [card for card in changed if card["id"] == "M5"]
        [part] = [part for part in card["parts"] if "interval" in part]
        part[key][1] *= 1 + 1e-6
        _, _, wrong = script["check"](changed, results.COMMITTED)
        assert len(wrong) == 1 and wrong[0].startswith("M5 bpb(ref) - bpb(DACT)"), key


def test_its_quantiles_are_scipys(script):
    for degrees in (1, 2, 3, 4, 9, 30):
        assert script["quantile"](degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=1e-10)
        assert script["tail"](2.5, degrees) == pytest.approx(2 * stats.t.sf(2.5, degrees), rel=1e-9)
