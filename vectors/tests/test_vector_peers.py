"""Other people's code against the vectors, and the verdicts of bench/vectors_peers.py on their old bugs."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from bessemer_vectors import check
from bessemer_vectors.reader import load
from bessemer_vectors.runner import AGREES, DIFFERS, FAILED, load_adapter

ROOT = Path(__file__).parents[2]
ADAPTERS = ROOT / "vectors" / "adapters"
REPORT = ROOT / "bench" / "results" / "vectors_peers.json"


@pytest.fixture(scope="module")
def peers():
    spec = importlib.util.spec_from_file_location("vectors_peers", ROOT / "bench" / "vectors_peers.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def adapter(monkeypatch):
    """adapter(name) -> its module; a default dtype that it sets is taken back."""
    torch = pytest.importorskip("torch")
    before = torch.get_default_dtype()
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield lambda name: load_adapter(ADAPTERS / f"{name}_adapter.py")
    torch.set_default_dtype(before)


def counts(report):
    return {outcome: report.count(outcome) for outcome in (AGREES, DIFFERS, FAILED)}


@pytest.mark.parametrize("name, needs, least", [("transformers", "transformers", 14), ("peft", "peft", 2)])
def test_layers_of_others_agree(adapter, name, needs, least):
    pytest.importorskip(needs)
    found = counts(check(adapter(name)))
    assert found[AGREES] >= least
    assert not found[DIFFERS] and not found[FAILED]


def test_steps_of_a_trainer_of_others_agree(adapter):
    pytest.importorskip("trl")
    report = check(adapter("trl"))
    assert counts(report)[AGREES] >= 28 and not report.count(FAILED)
    assert {entry.topic.name for entry in report.topics if entry.count(DIFFERS)} <= {"kept_logprobs"}, "but trl#6789"
    assert {entry.topic.name for entry in report.topics if entry.count(AGREES)} >= {"loss_mask", "loss_weights"}


def test_a_fault_planted_in_their_code_is_seen(adapter, monkeypatch):
    pytest.importorskip("transformers")
    module = adapter("transformers")
    monkeypatch.setattr(module.v3, "apply_rotary_pos_emb_interleave", module.v3.apply_rotary_pos_emb)
    (entry,) = check(module, ["rope_scores"]).topics
    outcomes = {result.case: result.outcome for result in entry.results}
    assert outcomes["interleaved"] == DIFFERS and outcomes["halves"] == AGREES


def test_the_table_answers_with_its_own_numbers(adapter):
    torch = pytest.importorskip("torch")
    adapter("peft") if importlib.util.find_spec("peft") else sys.path.insert(0, str(ADAPTERS))
    sys.path.insert(0, str(ADAPTERS))
    from table_model import FIRST_PROMPT, TOKEN, Table

    table = Table([[-0.5, -2.0, -0.01], [-1.0, -3.0, -0.7]])
    ids = torch.tensor([[FIRST_PROMPT + 1, TOKEN, TOKEN, TOKEN], [FIRST_PROMPT, TOKEN, TOKEN, TOKEN]])
    found = table.logits(ids).log_softmax(-1)[:, :3, TOKEN]
    torch.testing.assert_close(found, table.table[[1, 0]].detach(), rtol=1e-9, atol=1e-9, check_dtype=False)
    cotangent = torch.tensor([[0.3, -1.0, 2.0], [1.0, 0.5, -0.2]], dtype=torch.float64)
    (found * cotangent).sum().backward()
    torch.testing.assert_close(table.table.grad, cotangent[[1, 0]], rtol=1e-6, atol=1e-9)


# ---- the facts and the verdicts ------------------------------------------------------------------------------------


def test_every_fact_names_what_exists(peers):
    versions = {f"{peer['name']} {version['version']}" for peer in peers.FACTS["peer"] for version in peer["versions"]}
    topics = load()
    for peer in peers.FACTS["peer"]:
        assert (ADAPTERS / f"{peer['adapter']}_adapter.py").is_file()
        assert all(("pip" in version) != ("commit" in version) for version in peer["versions"])
    for bug in peers.FACTS["bug"]:
        named = {bug["with"], bug.get("without", bug["with"]), *bug.get("also", [])}
        assert named <= versions and bug["topic"] in topics
    for entry in peers.FACTS["convention"]:
        assert set(entry["cases"]) <= {case.name for case in topics[entry["topic"]].cases}


def made(name, version, **outcomes):
    cases = {case: {"outcome": outcome, "text": "", "rivals": []} for case, outcome in outcomes.items()}
    return {"peer": name, "version": version, "vectors": "", "topics": {"loss_mask": cases}}


@pytest.mark.parametrize(
    "old, new, verdict",
    [
        ({"a": "agrees", "b": "differs"}, {"a": "agrees", "b": "agrees"}, "caught"),
        ({"a": "agrees", "b": "failed"}, {"a": "agrees", "b": "agrees"}, "caught"),
        ({"a": "agrees", "b": "agrees"}, {"a": "agrees", "b": "agrees"}, "missed"),
        ({"a": "agrees", "b": "differs"}, {"a": "agrees", "b": "differs"}, "missed"),
        ({"a": "differs", "b": "differs"}, {"a": "agrees", "b": "differs"}, "missed"),
    ],
)
def test_a_bug_is_caught_if_only_the_version_with_it_differs(peers, old, new, verdict):
    judged = peers.judged([made("TRL", "1.8.0", **old), made("TRL", "1.9.0", **new)])
    (bug,) = judged["bugs"]
    assert bug["verdict"] == verdict
    assert len(judged["false_alarms"]) == sum(outcome == "differs" for outcome in new.values())


def test_a_difference_without_a_bug_or_a_convention_is_a_false_alarm(peers, monkeypatch):
    run = made("OpenRLHF", "0.11.2", a="differs", b="agrees")
    assert peers.judged([run])["false_alarms"] == [{"version": "OpenRLHF 0.11.2", "topic": "loss_mask", "case": "a"}]
    stated = {"peers": ["OpenRLHF"], "topic": "loss_mask", "cases": ["a"]}
    monkeypatch.setitem(peers.FACTS, "convention", [stated])
    assert not peers.judged([run])["false_alarms"]


def test_the_stored_verdicts_follow_from_the_stored_runs(peers):
    report = json.loads(REPORT.read_text())
    assert {key: report[key] for key in ("bugs", "conventions", "false_alarms")} == peers.judged(report["runs"])
    assert len({entry["vectors"] for entry in report["runs"]}) == 1, "runs of different vectors"


def test_tables_replace_what_stands_between_the_comments(peers):
    page = f"# Page\n\n{peers.BEGIN}old\n{peers.END}after\n"
    new = peers.with_tables(page, "| a |\n")
    assert "old" not in new and new.endswith("after\n") and peers.with_tables(new, "| a |\n") == new
    with pytest.raises(ValueError, match="the page needs"):
        peers.with_tables("# Page\n", "| a |\n")


def test_the_page_has_the_tables_of_the_stored_report(peers):
    page = (ROOT / "docs" / "vectors.md").read_text()
    assert peers.with_tables(page, peers.tables(json.loads(REPORT.read_text()))) == page
