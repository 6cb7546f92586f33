"""Environments of the package verifiers, made with its own classes (verifiers_packages) and played by its own loops.
The package is an extra that pins many others, so most of these tests run where it is installed:

    pip install -e '.[verifiers]' && pytest tests/tasks/test_env_verifiers.py
"""

import os
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest

from bessemer.addons.tasks import env_verifiers
from bessemer.addons.tasks.environment import EnvironmentFailure, Invocation, ModelTurn
from bessemer.errors import UserError
from bessemer.tasks import get

PACKAGES = Path(__file__).parent / "verifiers_packages"
played = pytest.mark.skipif(find_spec("verifiers") is None, reason="needs the extra verifiers")


@pytest.fixture
def packages(monkeypatch):
    """The environments are importable, in servers of tools too."""
    monkeypatch.syspath_prepend(str(PACKAGES))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(PACKAGES), *sys.path]))


def write(path, text):
    path.write_text(text)
    return f"verifiers:{path}@train"


@pytest.mark.parametrize("installed", ["0.3.1", "0.5.0", "1.0"])
def test_other_versions_are_refused(monkeypatch, installed):
    monkeypatch.setattr(env_verifiers, "version", lambda package: installed)
    with pytest.raises(UserError, match=rf"{installed} .*>=0\.4,<0\.5.*bessemer\[verifiers\]"):
        get("verifiers:gsm8k")


@pytest.mark.skipif(find_spec("verifiers") is not None, reason="it is installed")
def test_a_missing_package_is_named():
    with pytest.raises(UserError, match=r"pip install .bessemer\[verifiers\]"):
        get("verifiers:gsm8k")


@played
def test_one_turn(packages):
    task = get("verifiers:sum-once")
    sizes = task.size("train"), task.size("test")
    assert sum(sizes) == 60 and min(sizes) > 0 and task.schemas == []
    prompts = {split: {task.problem(split, n).prompt for n in range(task.size(split))} for split in ("train", "test")}
    assert not prompts["train"] & prompts["test"] and len(prompts["train"] | prompts["test"]) == 60
    problem = task.problem("train", 4)
    n = int(problem.prompt.partition("+")[0])
    scores = []
    for answer in (str(2 * n), "a long wrong answer", "-1"):
        episode = task.reset(problem, 1)
        assert episode.start == [
            {"role": "system", "content": "Answer with the number."}, {"role": "user", "content": f"{n}+{n}="}
        ]  # fmt: skip
        assert episode.step(ModelTurn(answer)).done
        verdict = episode.verdict(answer)
        scores.append((verdict.correct, verdict.score, verdict.answer))
        episode.close()
    assert scores == [(True, 1.0, "1.25"), (False, 0.0, "0"), (False, 0.25, "0.25")]


@played
def test_several_turns_at_once(packages):
    """Three episodes are open at the same time, and each is told what its own turns call for."""
    task = get("verifiers:guess-number@train")
    problems = [task.problem("train", n) for n in range(3)]
    episodes = [task.reset(problem, 1) for problem in problems]
    assert [episode.start for episode in episodes] == [[{"role": "user", "content": "Guess my number."}]] * 3
    first = [episode.step(ModelTurn("5")) for episode in episodes]
    assert [[message["content"] for message in seen.messages] for seen in first] == [["less"], [], ["more"]]
    assert [seen.done for seen in first] == [False, True, False]
    assert episodes[1].verdict("5").correct
    assert episodes[0].step(ModelTurn("<think>so</think>3")).messages == [{"role": "user", "content": "more"}]
    assert episodes[0].step(ModelTurn("3")).done and episodes[0].verdict("3").correct
    for number in ("6", "8"):
        assert not episodes[2].step(ModelTurn(number)).done
    assert episodes[2].step(ModelTurn("9")).done and not episodes[2].verdict("9").correct
    assert not task.endpoint.episodes and not task.endpoint.waiting


@played
def test_an_episode_that_a_bound_of_ours_ends(packages):
    task = get("verifiers:guess-number@train")
    episode = task.reset(task.problem("train", 0), 1)
    episode.step(ModelTurn("9"))
    verdict = episode.verdict("9")
    assert not verdict.correct and verdict.score == 0.0
    episode.close()
    limit = time.monotonic() + 30
    while task.endpoint.episodes and time.monotonic() < limit:
        time.sleep(0.05)
    assert not task.endpoint.episodes and not task.endpoint.waiting


@played
def test_a_bug_of_the_environment_fails_its_episode_alone(packages):
    task = get("verifiers:guess-number@train")
    broken, sound = (task.reset(task.problem("train", 0), 1) for _ in range(2))
    with pytest.raises(EnvironmentFailure, match="a bug of the environment"):
        broken.step(ModelTurn("break"))
    assert sound.step(ModelTurn("3")).done and sound.verdict("3").correct


@played
def test_tools(packages):
    task = get("verifiers:add-with-tool@train")
    (schema,) = task.schemas
    assert schema["function"]["name"] == "add" and set(schema["function"]["parameters"]["properties"]) == {"a", "b"}
    episode = task.reset(task.problem("train", 0), 1)
    calls = (Invocation("add", {"a": 20, "b": 22}), Invocation("subtract", {}), Invocation("add", {}, "not JSON"))
    seen = episode.step(ModelTurn("let me see", calls)).messages
    assert [message["role"] for message in seen] == ["tool"] * 3 and seen[0]["content"] == "sum 42"
    assert "unknown tool" in seen[1]["content"] and "invalid JSON" in seen[2]["content"]
    assert episode.step(ModelTurn("42")).done and episode.verdict("42").correct


@played
def test_a_table_of_the_package_s_own_settings(packages, tmp_path):
    task = get(write(tmp_path / "short.toml", '[taskset]\nid = "sum-once"\ncount = 3\n[agent]\nmax_turns = 1\n'))
    assert task.size("train") == 3
    for table, fault in (
        ('[taskset]\nid = "sum-once"\n[agent.harness]\nid = "bash"\n', r"bash .*runs the model's commands.*docker"),
        ('id = "user-sim"\n[taskset]\nid = "sum-once"\n', r"2 agents.*assistant, user.*model and client"),
        ('[taskset]\nid = "nowhere"\n', "install the package"),
        ('[taskset]\nid = "sum-once"\ncounts = 3\n', "counts"),
        ("[taskset\n", r"wrong\.toml.*no settings"),
    ):
        with pytest.raises(UserError, match=fault):
            get(write(tmp_path / "wrong.toml", table))
    with pytest.raises(UserError, match=r"no test task .*@test"):
        get("verifiers:add-with-tool@train").problem("test", 0)


@played
def test_only_the_package_reaches_an_episode(packages):
    task = get("verifiers:guess-number@train")
    episode = task.reset(task.problem("train", 0), 1)
    url = f"{task.endpoint.url}/chat/completions"
    body = {"messages": [{"role": "user", "content": "hi"}]}
    for headers in ({}, {"X-Session-ID": "guess"}):
        assert httpx.post(url, json=body, headers=headers, trust_env=False).status_code == 404
    assert url.startswith("http://127.0.0.1:")
    assert episode.step(ModelTurn("3")).done and episode.verdict("3").correct


@played
def test_a_program_that_asks_for_two_turns_at_once_fails_its_episode(packages):
    task = get("verifiers:guess-number@train")
    episode = task.reset(task.problem("train", 0), 1)
    (session,) = task.endpoint.episodes
    body = {"messages": [{"role": "user", "content": "and this?"}]}
    url, headers = f"{task.endpoint.url}/chat/completions", {"X-Session-ID": session}
    assert httpx.post(url, json=body, headers=headers, trust_env=False).status_code == 400
    with pytest.raises(EnvironmentFailure, match="two turns at once"):
        episode.step(ModelTurn("3"))


@played
def test_a_program_that_begins_anew_fails_its_episode(packages, tmp_path):
    """The package's own best-of-n, whose agent answers one task several times."""
    task = get(write(tmp_path / "best.toml", 'id = "best-of-n"\n[taskset]\nid = "sum-once"\n'))
    episode = task.reset(task.problem("train", 0), 1)
    with pytest.raises(EnvironmentFailure, match="rewrote"):
        episode.step(ModelTurn("3"))
