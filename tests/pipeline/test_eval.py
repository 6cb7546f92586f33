"""The stage `eval` and `bessemer eval`: what a row holds, against counting; a search for planted problems; resuming."""

import json
from collections import Counter

import pytest
import stages_run

import bessemer
from bessemer import tasks
from bessemer.config.recipe import Recipe
from bessemer.config.table import StageConfig
from bessemer.data.chat import exchange, question_ids
from bessemer.engine.engine import Engine
from bessemer.errors import UserError
from bessemer.eval import contamination, evaluate, scoring
from bessemer.pipeline.stage import Stage, find_kind
from bessemer.pipeline.stages.eval import ancestors
from bessemer.report import facts
from bessemer.runs import files
from bessemer.runs.metrics import StageMetrics
from bessemer.tasks.readability import readable
from bessemer.tasks.verdict_metrics import maj_at_k, pass_at_k

EVAL = """
[[stage]]
kind = "eval"
from = "pretrain"
models = ["pretrain"]
tasks = ["arithmetic", "countdown"]
problems = 5
samples = 4
k = 2
top_p = 0.95
temperatures = [1.0, 0.6]
max_new_tokens = 30
"""


def recipe_in(folder):
    """A corpus, hardly any training, an evaluation."""
    path = stages_run.write_recipe(folder)
    text = path.read_text().split('[[stage]]\nkind = "rl"')[0]
    for large, small in (('tokens = "80K"', 'tokens = "2K"'), ('arithmetic = "50K"', 'arithmetic = "10K"'),
                         ('[["0", 0.0], ["5K", 1e-2], ["60K", 1e-2], ["80K", 2e-3]]', "1e-2")):  # fmt: skip
        assert large in text
        text = text.replace(large, small)
    path.write_text(text + EVAL)
    return path


PLANTED = tasks.get("arithmetic", languages=["en"]).problem("test", 3)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A run whose own text holds one held-out problem, word for word."""
    folder = tmp_path_factory.mktemp("eval")
    path = recipe_in(folder)
    with (folder / "text.jsonl").open("a") as file:
        for n in range(20):  # some fall on the held-out side of the corpus
            file.write(json.dumps({"text": f"Lesson {n}. {PLANTED.prompt} We shall see."}) + "\n")
    return folder, stages_run.run(path, folder / "run")


def results_of(folder):
    return json.loads((folder / "run" / "03-eval" / "results.json").read_text())


def test_a_row_is_what_counting_gives(done):
    folder, _ = done
    rows = results_of(folder)["rows"]
    assert [(row["task"], row["language"], row["temperature"]) for row in rows] == [
        (name, language, t) for name in ("arithmetic", "countdown") for language in ("en", "zh") for t in (1.0, 0.6)
    ]
    assert {row["domain"] for row in rows} == {"arithmetic", "search"}
    directory = folder / "run" / "02-pretrain" / "model"
    tokenizer = bessemer.Tokenizer.load(directory)
    engine = Engine(bessemer.load(directory), tokenizer)
    row, task = rows[0], tasks.get("arithmetic", languages=["en"])
    problems = [task.problem("test", i) for i in range(5)]
    seeds = [tasks.stable_hash("eval", 7, "arithmetic", i) & (2**62 - 1) for i in range(5)]
    groups = engine.generate([question_ids(tokenizer, p.prompt) for p in problems], samples=4, seeds=seeds,
                             top_p=0.95, max_new_tokens=30)  # fmt: skip
    verdicts = [[task.verify(p, c.text) for c in group] for p, group in zip(problems, groups, strict=True)]
    each = [sum(v.correct for v in group) / 4 for group in verdicts]
    assert row["pass_at_1"] == pytest.approx(sum(each) / 5)
    assert row["pass_at_k"] == pytest.approx(sum(pass_at_k(4, int(4 * one), 2) for one in each) / 5)
    majority = [maj_at_k([v.answer for v in g], [v.correct for v in g], 2) for g in verdicts]
    assert row["maj_at_k"] == pytest.approx(sum(majority) / 5)
    reasons = Counter(readable(c.text, "en").reason for group in groups for c in group)
    assert row["readable"] == reasons.pop("readable", 0) / 20 and row["unreadable"] == dict(reasons)
    difficulty: dict = {}
    for problem, one in zip(problems, each, strict=True):
        difficulty.setdefault(str(problem.meta["difficulty"]), []).append(one)
    assert row["by_difficulty"] == {
        key: {"n": len(values), "pass_at_1": pytest.approx(sum(values) / len(values))}
        for key, values in difficulty.items()
    }
    for one in rows:
        assert (one["n"], one["samples"], one["k"], one["top_p"]) == (5, 4, 2, 0.95)
        assert sum(part["n"] for part in one["by_difficulty"].values()) == 5
        for key in ("pass_at_1", "pass_at_k", "maj_at_k"):
            low, high = one[f"{key}_interval"]
            assert 0 <= low <= one[key] <= high <= 1
        assert round(20 * one["readable"]) + sum(one["unreadable"].values()) == 20


def test_the_planted_problem_is_found_where_it_lies(done):
    folder, results = done
    found = results_of(folder)["contamination"]
    assert found["checked"] == 20 and found["hit"] == 1 and found["hits"] == [PLANTED.id]
    assert found["worst"]["stage"] == "corpus" and found["worst"]["by"] == "words"
    assert found["worst"]["words"] == found["worst"]["of"] and found["worst"]["prompt"] == PLANTED.prompt
    corpus = found["searched"]["corpus"]
    assert corpus["words"] > 10_000 and corpus["problems"] > 100 and list(found["searched"]) == ["corpus"]
    assert results["eval"].summary == {"rows": 8, "contaminated": 1}


def test_the_report_reads_it(done):
    folder, _ = done
    rows = facts.read(folder / "run").evaluations
    assert len(rows) == 8 and all(row["model"] == "pretrain" for row in rows)


def test_an_evaluation_that_dies_goes_on_with_the_next_row(done, tmp_path, monkeypatch):
    folder, _ = done
    out = stages_run.copy_without(folder / "run", tmp_path / "run", "03-eval")
    asked = []
    real = scoring.evaluate

    def counted(engine, encode, task, **settings):
        asked.append((task.name, task.languages, settings["temperature"]))
        return real(engine, encode, task, **settings)

    def dies(self, step, tokens, values):  # after the row, before its line: neither may be kept without the other
        if len(asked) == 4:
            raise MemoryError("killed")
        write(self, step, tokens, values)

    write = StageMetrics.write
    monkeypatch.setattr(scoring, "evaluate", counted)
    with monkeypatch.context() as killed, pytest.raises(MemoryError):
        killed.setattr(StageMetrics, "write", dies)
        stages_run.run(folder / "small.toml", out)
    state = out / "03-eval" / "state"
    assert len(json.loads((state / "rows.json").read_text())) == 3 and not (out / "03-eval" / "results.json").exists()
    monkeypatch.setattr(contamination, "ContaminationSearch", None)  # found already
    stages_run.run(folder / "small.toml", out)
    assert asked[3] == asked[4] and len(asked) == 4 + 5
    for name in ("03-eval/results.json", "metrics.jsonl"):
        got, expected = ((root / name).read_text() for root in (out, folder / "run"))
        if name == "metrics.jsonl":
            got, expected = ([json.loads(line)["values"] for line in text.splitlines()] for text in (got, expected))
        assert got == expected, name


@pytest.mark.parametrize(
    ("change", "complaint"),
    [("eval.k=5", "k is 5, of 4 samples"), ("eval.top_p=0", "top_p"), ("eval.searched_words=x", "searched_words")],
)
def test_settings_that_cannot_work(done, change, complaint):
    folder, _ = done
    with pytest.raises(UserError, match=complaint):
        stages_run.run(folder / "small.toml", folder / "run", change)


def test_rl_and_rejection_show_what_they_asked(tmp_path):
    text = stages_run.write_recipe(tmp_path).read_text()
    text += '[[stage]]\nkind = "reject"\ntasks = ["arithmetic", "countdown"]\nfirst_problem = 4\nproblems = 3\n'
    recipe = Recipe.parse(text)
    one, two = tasks.get("arithmetic"), tasks.get("countdown")

    def ids(name):
        settings = recipe.stage(name)
        shown = find_kind(settings.kind)().training_data(settings, recipe, tmp_path, tmp_path)
        return [problem if isinstance(problem, str) else problem.id for problem in shown]

    assert ids("zero") == [one.problem("train", i, 7).id for i in range(9)]
    (tmp_path / "samples.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "1+1"}]}) + "\n")
    asked = [one.problem("train", 2, 7), two.problem("train", 2, 7), one.problem("train", 3, 7)]
    assert ids("reject") == ["1+1", *(problem.id for problem in asked)]
    assert [stage.name for stage in ancestors(recipe, ["pretrain"])] == ["corpus", "pretrain"]
    assert [stage.name for stage in ancestors(recipe, ["zero"])] == ["corpus", "pretrain", "zero"]


def test_a_stage_shows_the_conversations_it_leaves(tmp_path):
    class Talk(Stage):
        kind = "talk"

        def exports_conversations(self, settings):
            return True

    files.write_conversations(tmp_path, [files.conversation_line(exchange("小?", "大"))])
    assert list(Talk().training_data(StageConfig(kind="talk"), None, tmp_path, tmp_path)) == ["小?\n大"]
    assert list(Stage().training_data(StageConfig(kind="x"), None, tmp_path, tmp_path)) == []


def test_several_tasks_from_the_command_line(done, monkeypatch):
    folder, _ = done
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    directory = folder / "run" / "02-pretrain" / "model"
    rows = evaluate.evaluate(directory, names=["arithmetic", "countdown"], samples=2, problems=3, k=1, top_p=0.9,
                             temperature=0.6, max_new_tokens=20)  # fmt: skip
    assert [(row["task"], row["language"], row["n"], row["k"]) for row in rows] == [
        ("arithmetic", "en+zh", 3, 1), ("countdown", "en+zh", 3, 1)
    ]  # fmt: skip
    assert all(row["model"] == str(directory) and row["top_p"] == 0.9 for row in rows)
    with pytest.raises(UserError, match="countdwn"):
        evaluate.evaluate(directory, names=["arithmetic", "countdwn"])
    with pytest.raises(UserError, match="k is 3"):
        evaluate.evaluate(directory, names=["arithmetic"], samples=2, k=3)
