"""Before the first stage: every file is read, every size compared, and all faults are named at once."""

import json
import sys

import pytest

from bessemer import cli
from bessemer.config.recipe import Recipe
from bessemer.errors import UserError
from bessemer.pipeline import preflight, runner

RECIPE = """
name = "chain"
[[stage]]
kind = "import"
name = "base"
model = "{folder}/base"
[[stage]]
kind = "reject"
name = "collect"
tasks = ["jsonl:{folder}/maths"]
problems = 20
max_new_tokens = 100
others = 2
others_data = ["{folder}/others.jsonl"]
[[stage]]
kind = "sft"
name = "dev"
from = "base"
samples = ["collect"]
data = ["{folder}/others.jsonl"]
row_length = 128
lr = 1e-3
lr_final = 1e-4
[[stage]]
kind = "reward-model"
name = "helpful"
aim = "helpful"
data = ["{folder}/pairs.jsonl"]
made = 0
lr = 1e-3
[[stage]]
kind = "reward-model"
name = "harmless"
from = "dev"
aim = "harmless"
data = ["{folder}/labels.jsonl"]
made = 0
lr = 1e-3
[[stage]]
kind = "rl"
name = "r1"
from = "dev"
tasks = ["jsonl:{folder}/maths"]
general.tasks = ["general"]
general.prompts = 1
general.reward_models = ["helpful", "harmless"]
prompts_per_rollout = 2
rollouts = 10
[[stage]]
kind = "eval"
models = ["r1"]
tasks = ["jsonl:{folder}/maths"]
problems = "all"
max_new_tokens = 100
"""


def lines(path, records):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


TURN = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hello to you"}]}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "base").mkdir()
    rope = {"rope_scaling": {"type": "longrope"}, "original_max_position_embeddings": 256}  # as Phi's
    (tmp_path / "base" / "config.json").write_text(json.dumps({"max_position_embeddings": 4096} | rope))
    for split, first, count in (("train", 0, 5), ("test", 5, 3)):
        questions = [{"question": f"What is {n}+{n}?", "answer": str(2 * n)} for n in range(first, first + count)]
        lines(tmp_path / "maths" / f"{split}.jsonl", questions)
    lines(tmp_path / "others.jsonl", [TURN] * 3)
    lines(tmp_path / "pairs.jsonl", [{"prompt": "hi", "chosen": "hello", "rejected": "what"}] * 4)
    lines(tmp_path / "labels.jsonl", [{"prompt": "hi", "response": "hello", "safe": n < 3} for n in range(4)])
    return tmp_path


OWN_TASK = """
from bessemer.tasks.countdown import Countdown

class Own(Countdown):
    def __init__(self, **settings):
        super().__init__(**{"languages": ["en"]} | settings)
        self.name = "countdown of my own"
"""


def recipe(folder, *overrides):
    return Recipe.parse(RECIPE.replace("{folder}", str(folder)), overrides)


def examine(folder, *overrides):
    chain = recipe(folder, *overrides)
    return {one.name: one for one in preflight.examine(chain, folder, chain.names())}


def test_what_is_there_is_counted(folder):
    found = examine(folder)
    assert not any(one.faults for one in found.values())
    assert found["collect"].found == [
        f"jsonl:{folder}/maths: 5 problems, 20 asked for, each 4 times",
        f"{folder}/others.jsonl: 3 conversations, 2 asked for",
    ]
    assert found["dev"].found == [f"{folder}/others.jsonl: 3 conversations"]
    assert found["helpful"].found == [f"{folder}/pairs.jsonl: 4 pairs"]
    assert found["harmless"].found == [f"{folder}/labels.jsonl: 4 answers, 3 of them safe"]
    assert found["r1"].found == [f"jsonl:{folder}/maths: 5 problems, 10 asked for, each 2 times"]
    assert found["eval"].found == [f"jsonl:{folder}/maths: 3 problems"]


def test_problems_of_a_task_that_names_itself_are_counted(folder):
    """A task of the user's own may set `name` when it is made, as countdown with other numbers does."""
    (folder / "own.py").write_text(OWN_TASK)
    found = examine(folder, f"eval.tasks=['{folder}/own.py:Own']", "eval.problems=7")
    assert found["eval"].found == [f"{folder}/own.py:Own: 7 problems"]


@pytest.mark.parametrize(
    ("change", "stage", "fault"),
    [
        ("collect.others=4", "collect", "others is 4, .*others.jsonl hold only 3"),
        ("collect.others=0", "collect", "others_data has no effect while others is 0"),
        ("collect.max_new_tokens=300", "collect", 'max_new_tokens is 300, but the model of "base" reads 256'),
        ("dev.row_length=512", "dev", 'row_length is 512, but the model of "base" reads 256'),
        ("helpful.row_length=512", "helpful", 'row_length is 512, but the model of "dev" reads 256'),
        ('helpful.heldout_data=["none.jsonl"]', "helpful", "no file or directory .*none.jsonl"),
        ("r1.max_new_tokens=300", "r1", "max_new_tokens is 300"),
        ('r1.general.reward_models=["helpful", "helpful"]', "r1", "two reward models are for helpful"),
        ('r1.general.reward_models=["dev"]', "r1", 'reward_models names "dev", of kind sft'),
        ("eval.problems=4", "eval", "problems is 4, jsonl:.*maths has 3 held-out ones"),
        ('eval.tasks=["arithmetic"]', "eval", "arithmetic is endless; give problems a number"),
        ('eval.tasks=["jsonl:gone.jsonl"]', "eval", "no file or directory gone.jsonl"),
    ],
)
def test_what_does_not_fit_is_a_fault_of_its_stage(folder, change, stage, fault):
    found = examine(folder, change)
    assert {name for name, one in found.items() if one.faults} == {stage}
    with pytest.raises(UserError, match=fault):
        raise UserError(found[stage].faults[0])


def test_an_unknown_task_or_teacher_hides_no_other_fault(folder):
    chain = recipe(folder, 'eval.tasks=["nosuch"]', "eval.shots=[1]", 'helpful.heldout_data=["none.jsonl"]')
    text = chain.to_toml() + '[[stage]]\nkind = "distill"\nfrom = "dev"\ntasks = ["arithmetic"]\n'
    chain = Recipe.parse(text)
    found = {one.name: one.faults for one in preflight.examine(chain, folder, chain.names()) if one.faults}
    assert found.keys() == {"eval", "helpful", "distill"}
    assert "nosuch" in found["eval"][0] and "arithmetic has no teacher" in found["distill"][0]


LONG = """
name = "long"
[model]
preset = "tiny"
[[stage]]
kind = "corpus"
parts = { pages = "task:countdown" }
limits = { pages = "20K" }
[[stage]]
kind = "pretrain"
tokens = "20K"
lr = 1e-3
[[stage]]
kind = "longeval"
models = ["pretrain"]
haystack = "fables-en"
corpus = "corpus"
parts = ["pages"]
"""


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ('longeval.haystack="gone.txt"', "no file or directory gone.txt"),
        ("longeval.lengths=[56, 256]", "lengths has 56, too short for 8 needles"),
        ("longeval.needles=9999", "too short for 9999 needles"),
    ],
)
def test_what_a_long_evaluation_cannot_read_is_found_before_the_training(tmp_path, change, fault):
    chain = Recipe.parse(LONG, [change])
    found = {one.name: one.faults for one in preflight.examine(chain, tmp_path, ["longeval"])}
    assert fault in found["longeval"][0]


@pytest.mark.parametrize(
    ("file", "record", "fault"),
    [
        ("maths/train.jsonl", TURN, "train.jsonl, line 3"),
        ("others.jsonl", {"text": "plain"}, "record 3 of .*others.jsonl is plain text; SFT needs messages"),
        ("others.jsonl", {"prompt": "p"}, "others.jsonl:3: needs text .*, or prompt and completion; has prompt"),
        ("pairs.jsonl", {"prompt": "p", "response": "r", "safe": True}, 'pairs.jsonl:3: .*"chosen": str, "rejected"'),
        ("labels.jsonl", {"prompt": "p", "chosen": "c", "rejected": "r"}, 'labels.jsonl:3: .*"response": str, "safe"'),
    ],
)
def test_a_file_of_the_wrong_kind_is_named_with_its_line_and_the_fields(folder, tmp_path, file, record, fault):
    """The dry run names it, and so does a run before it makes a folder for its first stage."""
    path = folder / file
    good = path.read_text().splitlines()[:2]
    path.write_text("\n".join([*good, json.dumps(record)]) + "\n")
    with pytest.raises(UserError, match=fault):
        runner.run(recipe(folder), tmp_path / "out")
    assert not (tmp_path / "out" / "01-base").exists()
    assert any(one.faults for one in examine(folder).values())


CORPUS = """
name = "text"
[[stage]]
kind = "corpus"
parts = {{ mine = "{folder}/{file}" }}
limits = {limits}
vocab_sample = 10000
[[stage]]
kind = "pretrain"
tokens = "1K"
lr = 1e-3
"""


@pytest.mark.parametrize(
    ("file", "text", "fault"),
    [
        ("gone.txt", None, "there is no file or directory .*gone.txt"),
        ("a.jsonl", '{"text": "one"}\n{"txt": "two"}\n', "a.jsonl:2: needs text"),
        ("empty.txt", "\n\n", "empty.txt contains no document"),
        ("a.csv", "text\none\n", "must end in .jsonl"),
    ],
)
def test_a_corpus_is_read_before_the_run(tmp_path, file, text, fault):
    if text is not None:
        (tmp_path / file).write_text(text)
    chain = Recipe.parse(CORPUS.format(folder=tmp_path, file=file, limits="{}"))
    with pytest.raises(UserError, match=f'^stage "corpus": parts.mine: .*{fault}'):
        runner.run(chain, tmp_path / "out")
    assert not (tmp_path / "out" / "01-corpus").exists()


def test_of_a_corpus_no_more_is_read_than_the_run_will(tmp_path):
    """A limit ends before the broken record, so that is no fault. A hub part only has its address parsed, offline."""
    texts = [json.dumps({"text": "a" * 2000})] * 20
    (tmp_path / "a.jsonl").write_text("\n".join([*texts, "{}"]) + "\n")

    def faults(text):
        chain = Recipe.parse(text)
        return [fault for one in preflight.examine(chain, tmp_path, chain.names()) for fault in one.faults]

    assert not faults(CORPUS.format(folder=tmp_path, file="a.jsonl", limits='{ mine = "40K" }'))
    assert "a.jsonl:21" in str(faults(CORPUS.format(folder=tmp_path, file="a.jsonl", limits="{}")))
    hub = CORPUS.replace("{folder}/{file}", "hf://{file}")
    assert "parts.mine: 'hf://owner' must be hf://owner/name" in str(faults(hub.format(file="owner", limits="{}")))


def test_one_fault_of_two_stages_is_one_line(folder):
    (folder / "others.jsonl").write_text("{}\n")
    with pytest.raises(UserError) as raised:
        preflight.check(recipe(folder), folder, ["collect", "dev"])
    output = str(raised.value).splitlines()
    assert [line.partition(": ")[2].partition(":")[0] for line in output] == ["others_data", "data"]
    gone = recipe(folder, 'collect.tasks=["jsonl:gone"]', 'r1.tasks=["jsonl:gone"]')
    with pytest.raises(UserError, match=r'^stages "collect", "r1": tasks: .*no file or directory') as raised:
        preflight.check(gone, folder, ["collect", "r1"])
    assert str(raised.value).count("no file or directory") == 1
    with pytest.raises(UserError, match=r'^stage "collect": tasks: .*no file or directory'):
        runner.run(gone, folder / "out")


def test_every_fault_at_once_from_the_command_line(folder, monkeypatch, capsys):
    path = folder / "chain.toml"
    path.write_text(RECIPE.replace("{folder}", str(folder)))

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["bessemer", "run", str(path), "--dry-run", *arguments])
        code = 0
        try:
            cli.main()
        except SystemExit as done:
            code = done.code
        return code, capsys.readouterr().out

    code, output = call()
    assert not code and "no fault found" in output and "4 pairs" in output
    (folder / "pairs.jsonl").unlink()
    code, output = call("--set", "eval.problems=4", "--set", "dev.row_length=512")
    assert code == 2
    assert all(f"\n{name}: " in output for name in ("helpful", "eval", "dev"))
    code, output = call("--json")
    stages = {stage["name"]: stage for stage in json.loads(output)["stages"]}
    assert code == 2 and len(stages["helpful"]["faults"]) == 1 and not stages["dev"]["faults"]
