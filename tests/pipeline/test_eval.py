"""The stage `eval` and `bessemer eval`: rows against direct counts, the search for planted problems, resuming."""

import json
import re
import weakref
from collections import Counter
from itertools import islice
from typing import get_args

import pytest
import stages_run

import bessemer
from bessemer import tasks
from bessemer.addons.evals import contamination, evaluate, paired, shots, tables
from bessemer.addons.tasks import worked
from bessemer.addons.tasks.readable import readable
from bessemer.addons.watch import facts
from bessemer.config.evaluation import EvalConfig, ShotKind
from bessemer.config.recipe import Recipe
from bessemer.config.table import StageConfig
from bessemer.data.chat import exchange, question_ids
from bessemer.engine.engine import Engine
from bessemer.errors import UserError
from bessemer.eval import scoring
from bessemer.eval.preamble import ALONE
from bessemer.pipeline.stage import Stage, find_kind
from bessemer.pipeline.stages.eval import Eval, ancestors
from bessemer.rl import sampler
from bessemer.runs import files
from bessemer.runs.metrics import StageMetrics
from bessemer.tasks.answer import parse_reply
from bessemer.tasks.base import split_of
from bessemer.tasks.language import consistency
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
    for group, read, language in zip(
        groups, row["readable_by_problem"].values(), row["language_by_problem"].values(), strict=True
    ):
        assert read == sum(readable(c.text, "en").readable for c in group) / 4
        assert language == pytest.approx(sum(consistency(c.text, "en") for c in group) / 4)
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
        for key in ("pass_at_1", "pass_at_k", "maj_at_k", "readable", "language_consistency"):
            low, high = one[f"{key}_interval"]
            assert 0 <= low <= one[key] <= high <= 1
        assert round(20 * one["readable"]) + sum(one["unreadable"].values()) == 20


def test_answers_that_were_cut_off_are_worth_a_line(done, capsys):
    """The first model writes on to the cap of 30 tokens; the line names model and key."""
    folder, _ = done
    cut = [row["truncated"] for row in results_of(folder)["rows"]]
    stages_run.run(folder / "small.toml", folder / "other", 'eval.tasks=["arithmetic"]')
    line = next(line for line in capsys.readouterr().err.splitlines() if "cut off" in line)
    assert min(cut) > 0.05 and line.startswith("pretrain: ") and "max_new_tokens, 30" in line


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


def test_an_evaluation_that_dies_continues_with_the_next_row(done, tmp_path, monkeypatch):
    folder, _ = done
    out = stages_run.copy_without(folder / "run", tmp_path / "run", "03-eval")
    asked = []
    real = scoring.evaluate

    def counted(engine, encode, task, **settings):
        asked.append((task.name, task.languages, settings["temperature"]))
        return real(engine, encode, task, **settings)

    def dies(self, step, tokens, values):  # between the row and its line: neither may be kept without the other
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
    monkeypatch.setattr(contamination, "ContaminationSearch", None)  # its result is already saved
    stages_run.run(folder / "small.toml", out)
    assert asked[3] == asked[4] and len(asked) == 4 + 5
    for name in ("03-eval/results.json", "metrics.jsonl"):
        actual, expected = ((root / name).read_text() for root in (out, folder / "run"))
        if name == "metrics.jsonl":
            actual, expected = (
                [json.loads(line)["values"] for line in text.splitlines()] for text in (actual, expected)
            )
        assert actual == expected, name


def test_a_model_is_gone_before_the_next_is_loaded(done, tmp_path, monkeypatch):
    folder, _ = done
    out = stages_run.copy_without(folder / "run", tmp_path / "run", "03-eval")
    again = f'[[stage]]\nkind = "import"\nname = "again"\nmodel = "{out / "02-pretrain" / "model"}"\n\n'
    text = (folder / "small.toml").read_text().replace(EVAL.lstrip(), again + EVAL.lstrip())
    (tmp_path / "small.toml").write_text(text.replace('models = ["pretrain"]', 'models = ["pretrain", "again"]'))
    held, real = [], sampler.engine_of

    def noted(*args, **options):
        assert [model() for model in held] == [None] * len(held)
        engine = real(*args, **options)
        held.append(weakref.ref(engine.model))
        return engine

    monkeypatch.setattr(sampler, "engine_of", noted)
    few = ("eval.problems=1", "eval.samples=1", "eval.k=1", 'eval.tasks=["arithmetic"]', "eval.max_new_tokens=4")
    stages_run.run(tmp_path / "small.toml", out, *few)
    assert len(held) == 2


@pytest.mark.parametrize(
    ("change", "complaint"),
    [("eval.k=5", "k is 5, but samples is 4"), ("eval.top_p=0", "top_p"), ("eval.searched_words=x", "searched_words")],
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
    again = Recipe.parse(text + '[[stage]]\nkind = "import"\nmodel = "package:smollm2-135m"\n')
    assert [stage.name for stage in ancestors(again, ["import"])] == ["import"], "it reads nothing of the stage before"


@pytest.mark.parametrize("change", ["temperatures=[-1.0]", "max_new_tokens=0"])
def test_values_that_sampling_cannot_use_are_refused_with_the_recipe(tmp_path, change):
    text = stages_run.write_recipe(tmp_path).read_text()
    text += '[[stage]]\nkind = "eval"\nname = "last"\nmodels = ["zero"]\ntasks = ["arithmetic"]\n'
    with pytest.raises(UserError, match=change.split("=")[0]):
        Recipe.parse(text, [f"last.{change}"])


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
    later = evaluate.evaluate(directory, names=["arithmetic"], samples=2, problems=2, skip=1, k=1, top_p=0.9,
                              temperature=0.6, max_new_tokens=20)  # fmt: skip
    assert [*later[0]["by_problem"].items()] == [*rows[0]["by_problem"].items()][1:], "the same answers to the same"
    with pytest.raises(UserError, match="countdwn"):
        evaluate.evaluate(directory, names=["arithmetic", "countdwn"])
    with pytest.raises(UserError, match="k is 3"):
        evaluate.evaluate(directory, names=["arithmetic"], samples=2, k=3)


def documents(ids, tokenizer):
    """The documents of a prompt, each as ids."""
    starts = [place for place, one in enumerate(ids) if one == tokenizer.bos_id]
    return [ids[begin:end] for begin, end in zip(starts, [*starts[1:], len(ids)], strict=True)]


def test_worked_examples_think_and_are_right_and_come_from_the_train_split():
    task = tasks.get("countdown")
    for language in ("en", "zh"):
        pages = list(islice(worked.examples(task, language, "a"), 30))
        for page in pages:
            assert split_of(page.problem.meta["numbers"]) == "train" and page.problem.language == language
            assert task.verify(page.problem, page.response).sound and consistency(page.response, language) == 1
        assert next(worked.examples(task, language, "b")) not in pages
    with pytest.raises(UserError, match="no pre-training documents"):
        next(worked.examples(tasks.get("gym:simple_equations"), "en", "a"))


def test_the_controls_ask_the_same_and_are_as_long(done, monkeypatch):
    tokenizer = bessemer.Tokenizer.load(done[0] / "run" / "02-pretrain" / "model")
    task, fables = tasks.get("countdown"), [f"{name} saw a fox. " * 9 for name in "abcdef"]
    monkeypatch.setattr(shots, "_texts", lambda language, cache: fables)
    problems = scoring.heldout(task, 6)
    kinds = get_args(ShotKind)
    prompts = [map(shots.Shots(2, kind).encoder(tokenizer, task, 700), problems) for kind in kinds]
    seen = set()
    for problem, *four in zip(problems, *prompts, strict=True):
        question = question_ids(tokenizer, problem.prompt)
        for ids in four:
            assert ids[-len(question) :] == question and len(ids) <= 700
            assert [part[-1] for part in documents(ids, tokenizer)[:-1]] == [tokenizer.eos_id] * 2
        cut = [documents(ids, tokenizer)[:-1] for ids in four]
        assert [len(one) for one in cut[3]] == [len(one) for one in cut[0]]
        for long, short, foreign, fable in zip(*cut, strict=True):
            long, short, foreign, fable = map(tokenizer.decode, (long, short, foreign, fable))
            assert "fox" in fable and "Assistant" not in fable
            (asked, answer), (again, brief) = (text.split("\nAssistant:") for text in (long, short))
            assert asked == again and "<think>" not in brief
            assert parse_reply(brief.strip()).answer == parse_reply(answer).answer is not None
            chinese = [bool(re.search("[一-鿿]", text)) for text in (asked, foreign)]
            assert chinese == [problem.language == "zh", problem.language == "en"]
            seen.add(asked)
    assert len(seen) == 12  # every problem has its own examples


def test_r1_sees_examples_with_their_thoughts(done):
    tokenizer = bessemer.Tokenizer.load(done[0] / "run" / "02-pretrain" / "model")
    tokenizer.chat_style = "r1"
    [problem] = scoring.heldout(tasks.get("arithmetic", languages=["en"]), 1)
    ids = shots.Shots(1).encoder(tokenizer, tasks.get("arithmetic"), 700)(problem)
    first, question = documents(ids, tokenizer)
    assert question == question_ids(tokenizer, problem.prompt)
    text = tokenizer.decode(first)
    assert text.startswith("<think>\n", text.index("<think>")) and "</think>\n\n" in text and "<answer>" in text


def test_text_before_a_question_is_in_its_row(done):
    directory = done[0] / "run" / "02-pretrain" / "model"
    row, plain = (
        evaluate.evaluate(directory, names=["arithmetic"], samples=1, problems=2, max_new_tokens=8, before=one)[0]
        for one in (shots.Shots(1, "direct", "Think well."), ALONE)
    )
    assert (row["shots"], row["shot_kind"], row["prefix"]) == (1, "direct", "Think well.")
    assert not {"shots", "shot_kind", "prefix"} & plain.keys()
    assert len(tables.stage_tables([row, plain])) == 2 and len(paired.rates([row, plain], "it")) == 2
    assert "1 direct examples first" in tables.stage_tables([row])[0].sampling
    with pytest.raises(UserError, match="leave room for an answer"):
        evaluate.evaluate(directory, names=["countdown"], problems=1, max_new_tokens=100, before=shots.Shots(9))
    with pytest.raises(UserError, match="shot_kind has no effect"):
        Eval().resolve(EvalConfig(name="e", kind="eval", models=["a"], tasks=["countdown"], shot_kind="fables"), None)


def test_the_stage_asks_with_each_number_of_examples(done, tmp_path):
    folder, _ = done
    out = stages_run.copy_without(folder / "run", tmp_path / "run", "03-eval")
    stages_run.run(folder / "small.toml", out, "eval.shots=[0, 1]", "eval.tasks=['arithmetic']",
                   "eval.temperatures=[1.0]", "eval.shot_kind='direct'")  # fmt: skip
    rows = json.loads((out / "03-eval" / "results.json").read_text())["rows"]
    assert [(row["language"], row.get("shots", 0)) for row in rows] == [("en", 0), ("en", 1), ("zh", 0), ("zh", 1)]
    assert rows[0]["by_problem"].keys() == rows[1]["by_problem"].keys()
