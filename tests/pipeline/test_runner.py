"""Skipping, staleness, damage and ownership: what running the same command again does."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import toy_stage  # noqa: F401 (registers the kinds)
from forks import Fork

from bessemer.config.recipe import Recipe
from bessemer.errors import UserError
from bessemer.pipeline import runner
from bessemer.runs.directory import RunDir
from bessemer.runs.files import explained, write_atomic

ALL_DONE = {"first": "done", "second": "done", "compare": "done"}
ALL_SKIPPED = {"first": "skipped", "second": "skipped", "compare": "skipped"}


def run(toy, until=None, overrides=(), **kwargs):
    results = runner.run(Recipe.load(toy.path, overrides), toy.out, until, **kwargs)
    return {result.name: result.status for result in results}


def folders(toy):
    return sorted(path.name for path in toy.out.iterdir() if path.is_dir())


def test_a_run_leaves_what_the_contract_says_and_is_skipped_the_second_time(toy):
    assert run(toy) == ALL_DONE
    assert folders(toy) == ["01-first", "02-second", "03-compare"]
    assert (toy.out / "01-first" / "model" / "config.json").exists()
    done = json.loads((toy.out / "01-first" / "done.json").read_text())
    assert sorted(done["outputs"]) == ["model/config.json", "rollouts.jsonl", "samples.md"]
    assert done["summary"]["steps"] == 20 and done["seconds"] > 0
    line = toy.lines()[0]
    assert sorted(line) == ["stage", "step", "time", "tokens", "values"]
    assert line["values"] == {"train/loss": 4.0, "train/nan": None}
    before = toy.result()
    assert run(toy) == ALL_SKIPPED
    assert toy.result() == before
    assert not (toy.out / "03-compare" / "state").exists(), "a stage that saves nothing would seem to be resumed"


def test_until_stops_after_a_stage_and_the_next_call_continues(toy):
    assert run(toy, until="first") == {"first": "done", "second": "waiting", "compare": "waiting"}
    assert folders(toy) == ["01-first"]
    assert run(toy) == {"first": "skipped", "second": "done", "compare": "done"}
    with pytest.raises(UserError, match=r'no stage "third".*first, second, compare'):
        run(toy, until="third")


def test_a_changed_setting_moves_the_stage_and_its_dependents_aside(toy, capsys):
    run(toy)
    old = (toy.out / "02-second" / "model" / "config.json").read_bytes()
    toy.write(second=22)
    assert run(toy) == {"first": "skipped", "second": "done", "compare": "done"}
    output = capsys.readouterr().err
    assert "second: steps 20 -> 22" in output and "02-second.stale-1" in output
    assert 'compare: its input "second" changed' in output and "03-compare.stale-1" in output
    assert (toy.out / "02-second.stale-1" / "model" / "config.json").read_bytes() == old
    kept = (toy.out / "02-second.stale-1" / "metrics.jsonl").read_text().splitlines()
    assert len(kept) == 20 and [line["step"] for line in toy.lines() if line["stage"] == "second"] == list(range(1, 23))
    toy.write(second=23)
    run(toy)
    assert "02-second.stale-2" in folders(toy)


def test_the_seed_counts_and_settings_that_change_nothing_do_not(toy):
    run(toy)
    assert run(toy, overrides=["second.pause=0.001", "first.save_every=3"]) == ALL_SKIPPED
    toy.write(seed=8)
    assert run(toy) == ALL_DONE
    assert run(toy, overrides=["model.n_layers=9"])["first"] == "done"  # "count" depends on [model]


def test_a_stage_may_have_a_seed_of_its_own(toy):
    """The stage and what depends on it run again; its inputs do not. Stating the recipe's own seed changes nothing."""
    run(toy)
    before = (toy.out / "02-second" / "model" / "config.json").read_bytes()
    assert run(toy, overrides=["second.seed=7"]) == ALL_SKIPPED
    found = run(toy, overrides=["second.seed=8"])
    assert found["first"] == "skipped" and found["second"] == "done"
    assert (toy.out / "02-second" / "model" / "config.json").read_bytes() != before


@pytest.mark.parametrize("line", ["", "# bessemer 0.1.0, run format 1\n", "# bessemer 9.0.0, run format 99\n"])
def test_a_run_of_another_format_is_refused_and_stays_what_it_is(toy, line, tmp_path):
    run(toy)
    own = toy.out / "recipe.toml"
    own.write_text(line + own.read_text().partition("\n")[2])
    before = toy.result()
    for again in (
        lambda: run(toy),
        lambda: Recipe.load(own),
        lambda: runner.run(Recipe.load(toy.path), tmp_path / "other", reuse=toy.out),
    ):
        with pytest.raises(UserError, match=f"bessemer run RECIPE.toml --out {toy.out}-new"):
            again()
    assert toy.result() == before


@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_damaged_output_is_noticed_and_made_again(toy, harm, capsys):
    run(toy)
    before = toy.result()
    victim = toy.out / "01-first" / "model" / "config.json"
    data = victim.read_bytes()
    if harm == "flip":
        victim.write_bytes(data[:10] + bytes([data[10] ^ 1]) + data[11:])
    elif harm == "cut":
        victim.write_bytes(data[:-1])
    else:
        victim.unlink()
    # the same output is reproduced, so what was made from it stays valid
    assert run(toy) == {"first": "done", "second": "skipped", "compare": "skipped"}
    assert "first: model/config.json" in capsys.readouterr().err
    after = toy.result()
    assert {name: after[name] for name in before if name != "metrics.jsonl"} == {
        name: before[name] for name in before if name != "metrics.jsonl"
    }


def test_a_wrong_bit_in_a_record_is_no_traceback_and_costs_no_later_stage(toy, capsys):
    toy.write(steps=4, second=4)
    run(toy)
    before, path = toy.result(), toy.out / "01-first" / "done.json"
    data = path.read_bytes()
    for word in (b'"outputs"', b'"sha256"', b'"digest"', b'"digest": "', b'"summary"', b'"seconds"', b'"fingerprint"'):
        place = data.index(word) + len(word) - (word != b'"digest": "')
        path.write_bytes(data[:place] + bytes([data[place] ^ 2]) + data[place + 1 :])
        assert run(toy) == {"first": "done", "second": "skipped", "compare": "skipped"}, word
        assert "first: done.json is damaged" in capsys.readouterr().err or word == b'"fingerprint"', word
        assert {name: file for name, file in toy.result().items() if name != "metrics.jsonl"} == {
            name: file for name, file in before.items() if name != "metrics.jsonl"
        }
    recipe = (toy.out / "recipe.toml").read_bytes()
    (toy.out / "recipe.toml").write_bytes(recipe.replace(b"toy", b"t\xefy"))
    with pytest.raises(UserError, match=r"recipe\.toml cannot be read"):
        run(toy)


def test_an_input_that_comes_out_differently_redoes_what_was_made_from_it(toy, monkeypatch, capsys):
    run(toy)
    (toy.out / "01-first" / "model" / "config.json").unlink()
    monkeypatch.setattr("toy_stage.ROUNDING", "other")  # a machine that rounds differently
    assert run(toy) == ALL_DONE
    assert "the output of first is not the one it was made from" in capsys.readouterr().err


def test_removed_and_inserted_stages(toy, capsys):
    run(toy)
    text = toy.path.read_text()
    toy.path.write_text(text.replace("[[stage]]", '[[stage]]\nkind = "count"\nname = "zeroth"\n[[stage]]', 1))
    run(toy)
    # first now starts from zeroth, so everything is new, under new numbers
    live = [name for name in folders(toy) if "stale" not in name]
    assert live == ["01-zeroth", "02-first", "03-second", "04-compare"]
    toy.path.write_text(text)
    run(toy)
    assert [name for name in folders(toy) if "stale" not in name] == ["01-first", "02-second", "03-compare"]
    assert "no longer has this stage" in capsys.readouterr().err
    assert {line["stage"] for line in toy.lines()} == {"first", "second"}  # the others went with their folder


def test_a_stage_that_only_moves_keeps_its_output(toy):
    toy.write()
    stage = '[[stage]]\nkind = "compare"\nname = "{}"\nfrom = "first"\nmodels = ["first"]\n'
    head = toy.path.read_text().split("[[stage]]")[:2]
    toy.path.write_text("[[stage]]".join(head) + stage.format("late"))
    assert run(toy) == {"first": "done", "late": "done"}
    toy.path.write_text("[[stage]]".join(head) + stage.format("early") + stage.format("late"))
    assert run(toy) == {"first": "skipped", "early": "done", "late": "skipped"}
    assert folders(toy) == ["01-first", "02-early", "03-late"]


def test_a_directory_of_another_recipe_is_refused(toy):
    run(toy, until="first")
    toy.write(name="other")
    with pytest.raises(UserError, match=r'"toy", not "other".*--out'):
        run(toy)
    toy.out = toy.out.parent / "mine"
    toy.out.mkdir()
    (toy.out / "thesis.doc").write_text("years of work")
    with pytest.raises(UserError, match=r"not a run directory .*thesis.doc"):
        run(toy)
    assert (toy.out / "thesis.doc").read_text() == "years of work"
    toy.out = toy.out / "thesis.doc"
    with pytest.raises(UserError, match="a file is in the way"):
        run(toy)


def test_a_run_that_was_killed_in_its_first_write_begins_again(toy):
    """Only then does a folder hold the temporary and no recipe."""
    toy.out.mkdir()
    (toy.out / ".lock").touch()
    left = toy.out / f"recipe.toml.tmp-{os.getpid()}"
    left.write_text("name =")
    run(toy)
    assert not left.exists()


def test_missing_permission_is_reported(toy, tmp_path):
    toy.out = tmp_path / "closed" / "run"
    toy.out.parent.mkdir(mode=0o555)
    root = os.geteuid() == 0
    if root:  # root may write anywhere, so switch to another user for a moment
        for folder in [tmp_path, *tmp_path.parents]:  # up to pytest's own folder: one level more under xdist
            os.chmod(folder, 0o755)
            if folder.name.startswith("pytest-of-"):
                break
        os.seteuid(65534)
    try:
        with pytest.raises(UserError, match=f"no permission for {toy.out}.*--out"):
            run(toy)
    finally:
        if root:
            os.seteuid(0)


def test_a_full_disk_is_reported_and_the_run_resumes_afterwards(toy):
    toy.write(fill="true")
    with pytest.raises(UserError, match=r"disk full: cannot write .*(full|02-second).*free some space"):
        run(toy)
    toy.write(fill="false")  # fill_disk is runtime_only: freeing space does not change the recipe
    assert run(toy) == {"first": "skipped", "second": "done", "compare": "done"}
    assert [line["step"] for line in toy.lines() if line["stage"] == "second"] == list(range(1, 21))


def test_a_file_larger_than_the_system_allows_is_reported(tmp_path):
    def write():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        told = pytest.raises(UserError, match=r"file\.json: .*maximum size.*ulimit -f")
        with told, explained(tmp_path / "file.json"):
            write_atomic(tmp_path / "file.json", "x" * 2000)

    assert Fork(write).wait() == 0 and list(tmp_path.iterdir()) == []


def test_a_stage_without_a_state_starts_over_and_so_do_its_lines(toy, monkeypatch):
    def run_stage(self, settings, ctx):
        ctx.metrics.write(1, 1, {"a": 1})
        ctx.sample(1, 1, "text")
        if not (tmp := ctx.dir / "model").exists():
            tmp.mkdir()
            raise RuntimeError("a bug")
        return {}

    monkeypatch.setattr("toy_stage.Count.run", run_stage)
    with pytest.raises(RuntimeError, match="a bug"):  # bugs keep their traceback
        run(toy, until="first")
    assert run(toy, until="first")["first"] == "done"
    assert len(toy.lines()) == 1 and (toy.out / "01-first" / "samples.md").read_text().count("## step") == 1


def test_what_a_kill_left_in_the_run_is_removed_but_not_what_another_process_is_writing(toy):
    with subprocess.Popen(["sleep", "60"]) as other:
        toy.write(steps=1, second=1)
        run(toy, until="first")
        files = [toy.out / f"{name}.tmp-{pid}" for name, pid in (("trackers.json", other.pid), ("plan", os.getpid()))]
        for file in files:
            file.touch()
        (toy.out / "02-second.tmp-reuse").mkdir()
        run(toy, until="second")
        left = [path for path in toy.out.iterdir() if ".tmp-" in path.name]
        other.kill()
    run(toy)
    assert left == files[:1]
    assert not files[0].exists()


def test_the_first_screen(toy, capsys):
    """It says what will run, where and how long."""
    run(toy, until="first")
    plan = json.loads((toy.out / "plan.json").read_text())
    assert plan["seconds"] == dict.fromkeys(("first", "second", "compare"), 30.0)
    assert plan["interval"]["low"] < plan["interval"]["likely"] == 30 < plan["interval"]["high"]
    output = capsys.readouterr().err.splitlines()
    assert output[0].startswith(f"toy in {toy.out}: 1 of 3 stages to run, about 30s (") and "CPU core" in output[0]
    assert [line.split() for line in output[1:4]] == [
        ["1", "first", "about", "30s", "(count)"], ["2", "second", "-", "(count)"], ["3", "compare", "-"]
    ]  # fmt: skip
    run(toy)
    output = capsys.readouterr().err.splitlines()
    assert output[0].startswith(f"toy in {toy.out}: 2 of 3 stages to run, about 1m 00s (")


def test_the_first_estimate_of_a_stage_stays_and_is_compared_with_what_it_took(toy):
    """A second call plans only what is left; `bench/estimates.py` reads what was planned before a stage began."""
    run(toy, until="first")
    plan = toy.out / "plan.json"
    plan.write_text(json.dumps({"seconds": {"first": 12.5, "second": 99.0}}))
    run(toy)
    assert json.loads(plan.read_text())["seconds"] == {"first": 12.5, "second": 30.0, "compare": 30.0}
    done = toy.out / "01-first" / "done.json"
    done.write_text(json.dumps(json.loads(done.read_text()) | {"seconds": 10.0}))
    facts = toy.out / "estimates.json"
    script = Path(__file__).parents[2] / "bench" / "estimates.py"
    command = [sys.executable, script, toy.out, "--json", facts]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    first = json.loads(facts.read_text())[str(toy.out)][0]
    assert first.items() >= {"stage": "first", "estimated": 12.5, "took": 10.0, "error": 0.25}.items()
    assert "12s" in output and "+25%" in output and "within 25 %: 1 of " in output


def test_resolve_runs_for_every_stage_before_anything_is_written(toy, monkeypatch):
    def refuse(self, settings, recipe):
        raise UserError("the model has one expert per group")

    monkeypatch.setattr("toy_stage.Compare.resolve", refuse)
    with pytest.raises(UserError, match="one expert"):
        run(toy)
    assert not toy.out.exists()


def test_a_call_that_a_probe_refuses_leaves_the_records_of_the_run(toy, monkeypatch):
    def probes(self, settings, recipe, cache):
        def probe():
            if settings.steps > 20:
                raise UserError("steps is more than the file holds")

        yield probe

    monkeypatch.setattr("toy_stage.Count.probes", probes)
    with pytest.raises(UserError, match="than the file holds"):
        run(toy, overrides=["second.steps=30"])
    assert run(toy) == ALL_DONE, "a new folder belongs to the recipe even if its first call is refused"
    before = {name: (toy.out / name).read_bytes() for name in ("recipe.toml", "plan.json") if (toy.out / name).exists()}
    with pytest.raises(UserError, match="than the file holds"):
        run(toy, overrides=["second.steps=30", "compare.name='third'"])
    assert before == {name: (toy.out / name).read_bytes() for name in before} and run(toy) == ALL_SKIPPED


def test_derived_facts_count_as_settings(toy, monkeypatch):
    run(toy)
    monkeypatch.setattr("toy_stage.Compare.resolve", lambda self, settings, recipe: {"width": (1, 2)})
    assert run(toy) == {"first": "skipped", "second": "skipped", "compare": "done"}
    assert run(toy) == ALL_SKIPPED


def test_the_lock_file_of_a_dead_process_does_not_matter(toy):
    toy.out.mkdir()
    (toy.out / ".lock").write_text("1\n")
    with RunDir.open(toy.out, "toy"):
        assert (toy.out / ".lock").read_text().split()[0] == str(os.getpid())
