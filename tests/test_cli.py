"""The command line: help is instant, a mistake costs one line, and thin commands call the right functions."""

import html
import json
import re
import resource
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import typer

from bessemer import cli, plugins
from bessemer.config.kinds import CORE
from bessemer.config.table import StageConfig
from bessemer.errors import UserError
from bessemer.eval.preamble import ALONE
from bessemer.pipeline.stage import Stage
from bessemer.runs.directory import digest

HEAVY = ("torch", "numpy", "pydantic", "matplotlib", "tokenizers", "bessemer.config", "bessemer.pipeline")


def test_help_is_instant_and_loads_nothing_heavy():
    code = (
        "import sys\n"
        "from bessemer import cli\n"
        "sys.argv = ['bessemer', '--help']\n"
        "try: cli.main()\n"
        "except SystemExit as done: assert not done.code, done.code\n"
        f"print('HEAVY', [name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    seconds = []
    for _ in range(3):  # best of three, in processor seconds, so that other work on the machine does not count
        began = processor_seconds_of_children()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        seconds.append(processor_seconds_of_children() - began)
    assert "HEAVY []" in done.stdout
    assert all(verb in done.stdout for verb in ("run", "report", "doctor", "eval", "generate", "chat", "convert"))
    assert min(seconds) < 0.5


def processor_seconds_of_children():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.fixture
def stub(monkeypatch):
    """stub("a.module", name=function) replaces a module behind the commands, so that a test sees how it is called."""

    def stub(name, **names):
        module = types.ModuleType(name)
        for key, value in names.items():
            setattr(module, key, value)
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, last = name.rpartition(".")
        monkeypatch.setattr(
            sys.modules[parent] if parent in sys.modules else __import__(parent, fromlist=["_"]),
            last,
            module,
            raising=False,
        )

    return stub


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def recipe(tmp_path, monkeypatch, stub):
    class NoteConfig(StageConfig):
        words: str = "hello"
        """What to write."""
        stop: bool = False
        """Stop as if the user had asked."""

    class Note(Stage):
        def run(self, config, ctx):
            if config.stop:
                ctx.interrupt()
            (ctx.dir / "model").mkdir()
            (ctx.dir / "model" / "config.json").write_text("{}")
            ctx.metrics.write(1, 10, {"train/loss": 2.0})
            return {"words": config.words}

    monkeypatch.setitem(plugins._built_in["stages"], "cli-note", Note)
    monkeypatch.setitem(CORE, "cli-note", NoteConfig)
    path = tmp_path / "note.toml"
    path.write_text(
        'name = "note"\n[[stage]]\nkind = "cli-note"\nname = "a"\n[[stage]]\nkind = "cli-note"\nname = "b"\n'
    )
    monkeypatch.chdir(tmp_path)
    return path


def test_run_and_run_again(call, recipe, tmp_path):
    status, out, err = call("run", recipe)
    assert status == 0 and "runs/note/report.html" in out and "bessemer chat runs/note" in out
    assert "items of the papers" not in err and "a: done" in err
    assert json.loads((tmp_path / "runs" / "note" / "conformance.json").read_text())[0]["state"]
    assert (tmp_path / "runs" / "note" / "report.html").exists()
    status, out, _ = call("run", recipe, "--set", "b.words=bye", "--json")
    facts = json.loads(out)
    assert [stage["status"] for stage in facts["stages"]] == ["skipped", "done"]
    assert facts["stages"][1]["summary"] == {"words": "bye"} and facts["directory"] == "runs/note"
    done = tmp_path / "runs" / "note" / "01-a" / "done.json"
    facts = json.loads(done.read_text()) | {"seconds": 300.0}
    del facts["checksum"]
    done.write_text(json.dumps(facts | {"checksum": digest(facts)}))
    _, out, _ = call("run", recipe, "--set", "b.words=bye")
    assert re.search(r"^note: [\d.]+s, 5m 00s with earlier work; report: ", out, re.M), out
    status, out, _ = call("report", "note")
    assert status == 0 and out.strip() == "runs/note/report.html"


def test_a_finished_run_says_how_to_free_the_space_of_its_checkpoints(call, recipe, tmp_path):
    state = tmp_path / "runs" / "note" / "02-b" / "state"
    assert "rm -r" not in call("run", recipe)[1]
    state.mkdir(exist_ok=True)
    with (state / "weights").open("wb") as file:
        file.truncate(2_500_000_000)  # sparse: takes no space
    out = call("run", recipe)[1]
    assert "2.5 GB are checkpoints" in out and out.endswith("\nrm -r runs/note/*/state\n")
    assert "rm -r" not in call("run", recipe, "--until", "b")[1]
    shutil.rmtree(state)
    assert call("run", recipe)[2].count("already done") == 2


def test_the_papers_recipe_item_by_item(call, recipe, tmp_path):
    status, out, _ = call("conformance", recipe)
    assert status == 0 and "MTP" in out and not (tmp_path / "runs").exists()
    first = json.loads(call("conformance", recipe, "--json")[1])[0]
    assert first.keys() == {"item", "section", "paper", "here", "state"}


def test_options_until_and_out(call, recipe, tmp_path):
    status, _, _ = call("run", recipe, "--until", "a", "--out", tmp_path / "here")
    assert status == 0 and sorted(path.name for path in (tmp_path / "here").iterdir() if path.is_dir()) == ["01-a"]


def test_options_of_a_run_are_refused_where_nothing_runs(call, recipe, tmp_path):
    for beside, option in (
        ("--dry-run", ("--until", "a")),
        ("--dry-run", ("--out", tmp_path)),
    ):
        status, _, err = call("run", recipe, beside, *option)
        assert status and f"{option[0]} has no effect with {beside}" in err
    assert "names no task" in call("eval", tmp_path, "--lm-eval", ",")[2]


def test_an_interrupted_run_says_how_to_continue(call, recipe):
    status, out, err = call("run", recipe, "--set", "b.stop=true")
    assert status == 130 and out == "" and "bessemer run runs/note/recipe.toml" in err


def test_commands_to_copy_hold_for_a_path_with_a_space(call, recipe, tmp_path):
    err = call("run", recipe, "--out", "my run", "--set", "b.stop=true")[2]
    assert "continue with: bessemer run 'my run'/recipe.toml --out 'my run'\n" in err
    assert call("run", recipe, "--out", "my run")[1].endswith(
        "bessemer chat 'my run' (or bessemer chat 'my run'/STAGE: a)\n"
    )
    assert "bessemer run 'my run'/recipe.toml --out 'my run'\nbessemer chat 'my run'\n" in html.unescape(
        (tmp_path / "my run" / "report.html").read_text()
    )
    for folder in (tmp_path / "my run").glob("0*"):
        (folder / "model" / "config.json").unlink(missing_ok=True)
    assert "bessemer run 'my run'/recipe.toml --out 'my run'\n" in call("chat", "my run")[2]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(("run", "no.toml"), "no recipe at no.toml"),
     (("run", "note.toml", "--set", "a.wordz=1"), 'did you mean "words"?'),
     (("run", "note.toml", "--until", "c"), 'no stage "c"'), (("report", "nothing"), "not a run directory"),
     (("chat", "nothing"), "no model or run at nothing"), (("generate", "nothing", "hi"), "no model or run at nothing"),
     (("eval", "nothing", "--task", "t"), "no model or run"), (("keys", "cli-nope"), 'did you mean "cli-note"')],
)  # fmt: skip
def test_a_mistake_is_one_line_and_status_2(call, recipe, stub, arguments, words):
    stub("bessemer.addons.serve.terminal_chat", chat=None)
    stub("bessemer.addons.evals.evaluate", evaluate=None)
    status, out, err = call(*arguments)
    assert status == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1 and words in err


def test_usage_mistakes_are_status_2_and_bugs_keep_their_traceback(call, stub, model, monkeypatch):
    assert call("run")[0] == 2
    assert call("frobnicate")[0] == 2

    def broken(*_, **__):
        raise KeyError("a bug")

    stub("bessemer.addons.serve.terminal_chat", chat=broken)
    with pytest.raises(KeyError):
        call("chat", model)


def test_eval(call, stub, model):
    from bessemer.addons.evals.evaluate import table

    calls = []

    def row(name, pass_at_1):
        rates = dict.fromkeys(("pass_at_1", "pass_at_k", "maj_at_k"), pass_at_1)
        return {"task": name, "domain": "search", "language": "en", "model": "m", "temperature": 1.0, "n": 5, "k": 4,
                **rates, "pass_at_1_interval": [0.4, 0.6], "readable": 0.75, "mean_length": 9.5}  # fmt: skip

    def evaluate(folder, **options):
        calls.append((folder, options))
        return [row(name, 0.5) for name in options["names"]]

    def evaluate_lm_eval(folder, **options):
        calls.append((folder, options))
        return [{**row(name, 0.25), "domain": "lm-eval", "k": 1, "metric": "acc"} for name in options["names"]]

    stub("bessemer.addons.evals.evaluate", evaluate=evaluate, evaluate_lm_eval=evaluate_lm_eval, table=table)
    arguments = "--task countdown --task logic --samples 4 --k 2 --seed 3 --temperature 0.6 --top-p 0.95 --problems 5"
    status, out, _ = call("eval", model, *arguments.split(), "--max-tokens", 9, "--json")
    facts = json.loads(out)
    assert status == 0 and facts["model"] == str(model) and facts["rows"][0]["pass_at_1_interval"] == [0.4, 0.6]
    options = {"samples": 4, "problems": 5, "k": 2, "temperature": 0.6, "top_p": 0.95, "max_new_tokens": 9, "seed": 3}
    options["before"] = ALONE
    assert calls == [(model, {"names": ["countdown", "logic"], **options})]
    status, out, _ = call("eval", model, "--task", "countdown", "--lm-eval", "a, b", "--include", "here", "--limit", 7)
    assert calls[1:] == [
        (model, {"names": ["countdown"], "before": ALONE}),
        (model, {"names": ["a", "b"], "include": Path("here"), "limit": 7}),
    ]
    assert status == 0 and "50.0 %" in out and "40.0 - 60.0" in out and "25.0 %" in out and "75.0 %" in out
    assert "pass@4" in out and out.count("pass@1") == 1, "an accuracy of lm-eval is no pass@1"
    assert re.search(r"lm-eval\s+task +model +n +shots +metric +value", out)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [((), "name a task with --task"), (("--lm-eval", "a", "--k", 2), "--k has no effect without --task"),
     (("--lm-eval", "a", "--max-tokens", 2), "--max-tokens has no effect"),
     (("--task", "a", "--limit", 3), "--limit has no effect without --lm-eval"),
     (("--task", "a", "--chat", "no"), "--chat has no effect"),
     (("--task", "a", "--only", "mmlu"), "--only has no effect without --suite"),
     (("--suite", "r1", "--skip", 2), "--skip has no effect without --task"),
     (("--task", "a", "--suite", "r1"), "--suite cannot be combined with --task"),
     (("--suite", "r1", "--k", 2), "--suite cannot be combined with --task, --lm-eval or --k"),
     (("--suite", "r1", "--answers", "a.jsonl"), "name either a model, or a file of answers")],
)  # fmt: skip
def test_eval_refuses_what_would_have_no_effect(call, model, arguments, complaint):
    status, out, err = call("eval", model, *arguments)
    assert status == 2 and out == "" and complaint in err


@pytest.mark.parametrize(
    "option", [("--samples", 4), ("--temperature", 0.1), ("--top-p", 0.5), ("--max-tokens", 9), ("--seed", 3)]
)
def test_existing_answers_are_not_sampled_again(call, option):
    status, out, err = call("eval", "--suite", "r1", "--answers", "a.jsonl", *option)
    assert status == 2 and out == "" and f"{option[0]} has no effect without MODEL" in err


def test_eval_of_a_suite(call, monkeypatch, model):
    from bessemer.addons.evals import suite_run

    calls = []

    def evaluate_suite(folder, **options):
        calls.append((folder, options))
        row = {"title": "MMLU", "n": 3, "k": 2, "domain": "stem", "pass_at_1": 0.5, "pass_at_1_interval": [0.4, 0.6],
               "maj_at_k": 0.75, "truncated": None, "mean_length": None, "published": {"R1": 0.908},
               "model": "m"}  # fmt: skip
        return {"rows": [row], "skipped": []}

    monkeypatch.setattr(suite_run, "evaluate_suite", evaluate_suite)
    status, out, _ = call("eval", model, "--suite", "r1", "--only", "mmlu, c-eval", "--samples", 2, "--max-tokens", 9)
    assert status == 0 and "90.8 %" in out and "75.0 %" in out and "40.0 - 60.0" in out
    call("eval", "--suite", "r1", "--answers", "a.jsonl", "--data", "d", "--data", "mmlu=x.csv", "--json")
    assert calls == [
        (model, {"suite": "r1", "samples": 2, "max_new_tokens": 9, "only": ["mmlu", "c-eval"]}),
        (None, {"suite": "r1", "only": [], "data": ["d", "mmlu=x.csv"], "answers": Path("a.jsonl")}),
    ]
    assert call("eval", "--suite", "r1") == (2, "", "error: name either a model, or a file of answers with --answers\n")


def test_chat_finds_the_model_of_a_run(call, stub, recipe, tmp_path):
    calls = []
    stub(
        "bessemer.addons.serve.terminal_chat",
        chat=lambda folder, **options: calls.append((str(folder), options["alone"])),
    )
    call("run", recipe)
    assert call("chat", "runs/note")[0] == 0 and call("chat", "note")[0] == 0
    assert calls == [("runs/note/02-b/model", False)] * 2


def test_plan_draws_a_schedule(call, tmp_path):
    status, out, _ = call(
        "plan", "--schedule", "dualpipe", "--pp", "4", "--micro", "8", "--svg", str(tmp_path / "a.svg")
    )
    assert status == 0 and "makespan 26; idle at most 2 per rank (7.7 %)" in out and "F3&b1" in out
    assert (tmp_path / "a.svg").read_text().startswith("<svg")
    status, out, _ = call("plan", "--schedule", "dualpipe", "--micro", "20", "--costs", "1,1,1,2.5", "--json")
    facts = json.loads(out)
    assert (facts["makespan"], max(facts["idle"]), facts["overlapped_pairs"]) == (54, 1.5, [15] * 4)
    assert facts["steps"][0][0] == ["F0", 0, 1]
    for wrong in ("1,2", "1,x,1", "0,1,1", "1,1,nan"):
        status, _, err = call("plan", "--schedule", "zbv", "--costs", wrong)
        assert status == 2 and "three or four positive numbers" in err
    assert "did you mean" in call("plan", "--schedule", "zbw")[2]


def test_a_chart_replaces_only_a_chart(call, tmp_path):
    precious = tmp_path / "recipe.toml"
    precious.write_text("name = 'mine'")
    for target, words in (
        (precious, "something else"), (tmp_path, "is a directory"), (precious / "x.svg", "is a file, not a folder"),
    ):  # fmt: skip
        status, _, err = call("plan", "--schedule", "zbv", "--svg", target)
        assert status == 2 and words in err and err.count("\n") == 1
    assert precious.read_text() == "name = 'mine'"
    for _ in range(2):
        assert call("plan", "--schedule", "zbv", "--svg", tmp_path / "new" / "x.svg")[0] == 0


def test_doctor(call, monkeypatch, tmp_path):
    from bessemer.addons.plan import doctor

    monkeypatch.setattr(doctor.measured, "gemm_rates", lambda: {"float32": 60.0, "bfloat16": 70.0})
    facts = json.loads(call("doctor", "--json", "--folder", tmp_path)[1])
    assert facts["dtype"] == "float32" and {note["about"] for note in facts["notes"]} >= {
        "GPU",
        "CPU",
        "disk",
        "memory",
    }
    assert "training computes in float32" in call("doctor")[1]


def test_keys_are_the_docstrings(call, recipe):
    out = call("keys", "cli-note")[1]
    assert 'words (string, default "hello")\n      What to write.' in out
    assert "from (earlier stage)" in out


def test_a_help_text_is_printed_whole(call, monkeypatch):
    """The library that prints it takes square brackets for markup."""
    monkeypatch.setenv("COLUMNS", "200")

    def walk(command, path):
        words = call(*path, "--help")[1].split()
        for param in command.params:
            lost = [word for word in (getattr(param, "help", None) or "").split() if word not in words]
            assert not lost, (path, param.name)
        for name, subcommand in getattr(command, "commands", {}).items():
            walk(subcommand, [*path, name])

    walk(typer.main.get_command(cli.app), [])


def test_version(call):
    import bessemer

    assert call("--version")[1].strip() == f"bessemer {bessemer.__version__}"


def test_a_message_of_two_lines_becomes_one(call, stub, model):
    def refuse(*_, **__):
        raise UserError("first\nsecond")

    stub("bessemer.addons.serve.terminal_chat", chat=refuse)
    assert call("chat", model) == (2, "", "error: first second\n")
