"""A whole build: what it leaves out, that it resumes where it stopped, the same result whoever does the work."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from forks import Fork
from made_texts import jsonl, prose

from bessemer.addons.curate import origins
from bessemer.addons.curate.build import Build
from bessemer.addons.curate.data_recipe import build, engine, load, plain
from bessemer.addons.curate.jobs import Job
from bessemer.addons.curate.output import check, check_folder
from bessemer.addons.curate.settings import Source
from bessemer.addons.distributed import ray_cluster
from bessemer.cli import main
from bessemer.data import corpus, documents
from bessemer.errors import UserError
from bessemer.runs.progress import RunProgress

MORE = '[decontaminate]\ntasks = ["jsonl:{tasks}"]'


@pytest.fixture
def recipe_file(tmp_path, recipe):
    """A recipe over three sources with copies, a leaked question and broken lines."""
    first = [prose(i) for i in range(40)]
    near = first[5].replace("the", "this", 1)
    leaked = prose(900, 2)
    second = [prose(100 + i) for i in range(30)] + [
        first[3].upper(),
        near,
        f"{prose(80)} {leaked} {prose(81)}",
        f"{prose(80)} {prose(81)}",
        "short",
    ]
    jsonl(tmp_path / "raw" / "first.jsonl", first)
    path = jsonl(tmp_path / "raw" / "second.jsonl", second)
    path.write_text(path.read_text() + "{broken\n\n" + json.dumps({"text": "Das ist ein deutscher Satz. " * 9}) + "\n")
    (tmp_path / "raw" / "code.txt").write_text("def one():\n    return 1\n\ndef two():\n    return 2\n" * 8)
    tasks = tmp_path / "tasks"
    jsonl_line = {"question": leaked, "answer": "7"}
    tasks.mkdir()
    (tasks / "test.jsonl").write_text(json.dumps(jsonl_line) + "\n")
    (tasks / "train.jsonl").write_text(json.dumps({"question": prose(901, 2), "answer": "8"}) + "\n")
    raw = tmp_path / "raw"
    return recipe(
        f'name = "first"\nfrom = "{raw}/first.jsonl"\ndomain = "english"\nlanguages = ["en"]',
        f'name = "second"\nfrom = "{raw}/second.jsonl"\ndomain = "english"\nlanguages = ["en"]\nbad = "skip"\n'
        'filters = "web"\nrules = { max_repeated_5_words = false }',
        f'name = "code"\nfrom = "{raw}/code.txt"\ndomain = "code"\nfilters = "code"',
        more=MORE.format(tasks=tasks),
    )


def _files(folder: Path) -> dict[str, bytes]:
    """All output of a build but its reports, which hold times."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and "work" not in file.parts and not file.name.startswith(("report.", "."))
    }


def test_foreign_output_folder_is_refused(recipe_file, tmp_path):
    """A build replaces its own documents/, tokenizer/ and parts, never those in a home directory."""
    home = tmp_path / "home"
    (home / "documents").mkdir(parents=True)
    (home / "documents" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match=r"home .*contains documents"):
        build(load(recipe_file), home)
    with pytest.raises(UserError, match="a file is in the way"):
        build(load(recipe_file), home / "documents" / "thesis.tex")
    begun = tmp_path / "begun"
    (begun / "work" / "read").mkdir(parents=True)
    killed = tmp_path / "killed in its first write"
    killed.mkdir()
    (killed / "revisions.json.tmp-1").write_text("{")
    check_folder(killed, ["english"])
    (begun / "code").mkdir()
    (begun / "code" / "main.py").write_text("x")
    with pytest.raises(UserError, match="in the way of the part code"):
        build(load(recipe_file), begun)
    assert (home / "documents" / "thesis.tex").read_text() == (begun / "code" / "main.py").read_text() == "x"


def test_counts_of_kept_and_dropped_documents(recipe_file, tmp_path):
    facts = build(load(recipe_file), tmp_path / "out")
    second = facts["sources"]["second"]
    reasons = {reason: counts["documents"] for reason, counts in second["dropped"].items()}
    assert reasons == {
        "broken-record": 1, "empty": 1, "language": 1, "min_words": 1, "duplicate": 1, "near-duplicate": 1,
        "contaminated": 1,
    }  # fmt: skip
    for source in facts["sources"].values():
        dropped = sum(counts["documents"] for counts in source["dropped"].values())
        assert source["found"]["documents"] == source["kept"]["documents"] + dropped
        assert source["kept"]["documents"] == sum(side["documents"] for side in source["tokens"].values())
    assert facts["sources"]["code"]["kept"]["documents"] == 3
    remaining = [document.text for document in documents.read_files(tmp_path / "out" / "documents" / "second", "x")]
    # the last one is a near copy of the contaminated one, which was removed before
    assert remaining == [*(prose(100 + i) for i in range(30)), f"{prose(80)} {prose(81)}"]
    loaded = corpus.load(tmp_path / "out" / "english")
    assert loaded.train.facts["documents"] + loaded.heldout.facts["documents"] == 71
    assert loaded.train.n_rows
    text = (tmp_path / "out" / "report.txt").read_text()
    assert "contaminated" in text
    assert "second.jsonl at byte" in text
    tasks = load(recipe_file).decontaminate.tasks[0]
    assert facts["searched_for"] == {tasks: 1} and f"searched for: {tasks} (1 problem)" in text
    assert check(tmp_path / "out")["parts"].keys() == {"english", "code"}


def test_evaluation_without_held_out_problems_is_refused_first(recipe_file, tmp_path):
    tasks = load(recipe_file).decontaminate.tasks[0]
    task = f"{tasks}/train.jsonl@train"
    with pytest.raises(UserError, match=r"train\.jsonl@train holds out no problem.*@test"):
        build(load(recipe_file, [f'decontaminate.tasks=["{task}"]']), tmp_path / "out")
    assert not list((tmp_path / "out").glob("work/read/*"))


def test_number_of_workers_does_not_change_files(recipe_file, tmp_path, monkeypatch):
    build(load(recipe_file), tmp_path / "one")
    monkeypatch.setattr("bessemer.addons.curate.data_recipe.DEDUP_MEMORY", 3000)
    build(load(recipe_file, ["engine.workers=3"]), tmp_path / "three")
    assert _files(tmp_path / "one") == _files(tmp_path / "three")
    assert sum("train-" in name and "tokens" in name for name in _files(tmp_path / "one")) >= 4


@pytest.mark.skipif(not ray_cluster.is_installed(), reason="needs Ray")
def test_ray_builds_the_same_files_and_reports_errors(recipe_file, tmp_path):
    build(load(recipe_file), tmp_path / "one")
    curation = load(recipe_file, ['engine.kind="ray"', "engine.workers=2"])
    on_ray = engine(curation.engine)
    broken = tmp_path / "broken.jsonl"
    broken.write_text("{")
    unit = origins.units(Source("s", str(broken), "english", "english"), 1000, None)[0][0]
    with pytest.raises(UserError, match=r"broken\.jsonl at byte 0: not JSON"):
        list(on_ray.run([Job("read", "b", tmp_path / "b", "b", {"unit": unit, "cache": None})]))
    facts = Build(plain(curation), tmp_path / "ray", on_ray, RunProgress({})).run()
    assert facts["workers"] == 2
    assert _files(tmp_path / "one") == _files(tmp_path / "ray")


def _times(out: Path, step: str) -> dict[str, int]:
    return {str(file.parent): file.stat().st_mtime_ns for file in (out / "work" / step).rglob("facts.json")}


def test_only_changed_units_are_rebuilt(recipe_file, tmp_path):
    out = tmp_path / "out"
    build(load(recipe_file), out)
    before = {step: _times(out, step) for step in ("read", "sign", "match", "write")}
    repeated = build(load(recipe_file), out)
    assert all(step["done_now"] == 0 for step in repeated["steps"].values())
    assert before == {step: _times(out, step) for step in before}
    code = tmp_path / "raw" / "code.txt"
    os.utime(code, (1, 1))  # the same bytes: read again, and found unchanged
    touched = build(load(recipe_file), out)
    assert {name: step["done_now"] for name, step in touched["steps"].items()} == {
        "read": 1, "sign": 0, "match": 0, "join": 0, "tokenizer": 0, "write": 0
    }  # fmt: skip
    code.write_text(code.read_text() + "\n\ndef three():\n    return 3\n")
    changed = build(load(recipe_file), out)
    assert changed["steps"]["read"]["done_now"] == changed["steps"]["sign"]["done_now"] == 1
    assert changed["sources"]["code"]["kept"]["documents"] == 4
    stricter = build(load(recipe_file, ["dedup.threshold=1"]), out)
    assert stricter["steps"]["read"]["done_now"] == stricter["steps"]["sign"]["done_now"] == 0
    assert stricter["sources"]["second"]["kept"]["documents"] == 32
    fewer = recipe_file.read_text().split("[[source]]")
    recipe_file.write_text("[[source]]".join(fewer[:2]) + "[engine]\nunit_bytes = 20000\n")
    build(load(recipe_file), out)
    assert not (out / "documents" / "code").exists()
    assert not (out / "code").exists()
    assert not any("code" in name for name in _times(out, "write"))


def program(*arguments):
    """`bessemer data ...`, forked."""

    def work():
        sys.argv = ["bessemer", "data", *map(str, arguments)]
        main()

    return Fork(work)


def test_killed_build_resumes_to_the_same_files(recipe_file, tmp_path):
    build(load(recipe_file), tmp_path / "whole")
    out = tmp_path / "out"
    kills = 0
    for step in ("read", "sign", "write"):
        process = program("build", recipe_file, "--out", out)
        while process.poll() is None and not list((out / "work" / step).glob("*/*/facts.json")):
            time.sleep(0.005)
        process.kill()
        process.communicate()
        kills += process.returncode == -9
    assert kills >= 2
    done = _times(out, "read")
    build(load(recipe_file), out)
    made_so = _files(out)
    assert made_so.pop("revisions.json") == b"{}\n", "the command records commits of the hub, even if none is read yet"
    assert made_so == _files(tmp_path / "whole")
    assert all(_times(out, "read")[name] == when for name, when in done.items())


def _alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_interrupted_build_ends_its_workers(recipe_file, tmp_path):
    out = tmp_path / "out"
    process = program("build", recipe_file, "--out", out, "--set", "engine.workers=2", "--set", "engine.unit_bytes=500")
    while not list((out / "work" / "read").glob("*/*/facts.json")):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, message = process.communicate(timeout=60)
    assert process.returncode == 130
    assert message.rstrip().endswith("stopped; run the same command again to continue")
    until = time.monotonic() + 20
    while _alive(process.pid):
        assert time.monotonic() < until, "a worker is left"
        time.sleep(0.02)


def test_output_folder_is_locked(recipe_file, tmp_path):
    import filelock

    (tmp_path / "out").mkdir()
    with filelock.FileLock(tmp_path / "out" / ".lock"), pytest.raises(UserError, match="another build"):
        build(load(recipe_file), tmp_path / "out")


def test_empty_part_is_an_error_that_names_it(recipe_file, tmp_path):
    with pytest.raises(UserError, match='part "code" has no training documents left'):
        build(load(recipe_file, ["code.rules.min_words=100000"]), tmp_path / "out")
    assert "min_words" in (tmp_path / "out" / "report.txt").read_text()


def test_check_finds_altered_files(recipe_file, tmp_path):
    out = tmp_path / "out"
    build(load(recipe_file), out)
    for pattern in ("documents/first/*.zst", "english/train-*.tokens", "english/train-*.ends.npy"):
        file = next(iter(sorted(out.glob(pattern))))
        data = file.read_bytes()
        file.unlink()  # it also has a hard link under work/
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(UserError, match=file.name):
            check(out)
        file.write_bytes(data)
    check(out)
    with pytest.raises(UserError, match="not a finished build"):
        check(tmp_path)


def test_build_command_with_json_and_an_existing_tokenizer(recipe_file, tmp_path, call):
    build(load(recipe_file), tmp_path / "out")
    status, out, message = call(
        "data", "build", recipe_file, "--out", tmp_path / "two", "--json",
        "--set", f"tokenizer.from={tmp_path / 'out' / 'tokenizer'}", "--set", "first.languages=[]",
    )  # fmt: skip
    assert status == 0, message
    facts = json.loads(out)
    assert facts["parts"]["english"]["train"]["documents"] > 50
    assert "tokenizer" not in facts["steps"]
    first, second = (corpus.load(tmp_path / name / "english").meta["tokenizer"] for name in ("out", "two"))
    assert first == second
    assert "is intact: " in call("data", "check", tmp_path / "two")[1]
