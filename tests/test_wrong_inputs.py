"""What a user can get wrong, for every command: one line that names the fix, status 2, and nothing written."""

import pytest
from made_run import write_run

RECIPE = """
name = "x"
[[stage]]
kind = "import"
name = "base"
model = "runs/tiny"
[[stage]]
kind = "sft"
from = "base"
lr = 1e-3
lr_final = 0.0
data = ["{data}"]
"""
FILES = {
    "file": b"x",
    "latin.txt": "café".encode("latin-1"),
    "latin.toml": 'name = "café"\n'.encode("latin-1"),
    "mark.toml": b"\xef\xbb\xbf" + RECIPE.format(data="chat5.jsonl").encode(),
    "empty.toml": b"",
    "empty.jsonl": b"",
    "number.jsonl": b'{"prompt": 5}\n',
    "chat5.jsonl": b'{"messages": 5}\n',
    "sft.toml": RECIPE.format(data="chat5.jsonl").encode(),
    "nodata.toml": RECIPE.format(data="none.jsonl").encode(),
}
WRONG = """
generate runs/tiny/zerro hi | the run runs/tiny has no stage "zerro"; did you mean "zero"?
generate other/tiny/sft hi | the run other/tiny has no stage "sft"; known: zero
replay runs/none --step 3 | runs/none is not a run directory (no recipe.toml in it); available runs: runs/tiny
generate nosuch hi | no model or run at nosuch; available runs: runs/tiny
generate file hi | file is a file, not a model directory or a run
generate dir hi | no model in dir: no config.json; it holds nothing
generate runs/tiny | no prompt: write one after the model, or name a file of them with --file
generate runs/tiny --file nosuch | no file of prompts at nosuch
generate runs/tiny --file dir | dir is a directory; name the file of prompts itself
generate runs/tiny --file latin.txt | latin.txt, line 1 is not UTF-8 text (byte 0xe9); save it as UTF-8
generate runs/tiny --file number.jsonl | number.jsonl, line 1: not an object with a text under "prompt"
generate runs/tiny hi --max-tokens 0 | '--max-tokens'
generate runs/tiny hi --temperature nan | '--temperature'
generate runs/tiny hi --temperature inf | temperature must be a number at least 0, not inf
generate runs/tiny hi --top-p 0 | use temperature 0 for the most likely token
generate runs/tiny hi --max-token 5 | --max-token
chat file | file is a file
serve nosuch | no model or run at nosuch
serve runs/tiny --port 99999 | '--port'
report dir | dir is not a run directory
convert nosuch out | no model or run at nosuch
convert runs/tiny file/x | Choose another place
convert runs/tiny /proc/x | Choose another place
eval runs/tiny | name a task with --task
eval runs/tiny --task countdwn | did you mean 'countdown'?
eval runs/tiny --task jsonl:empty.jsonl | empty.jsonl contains no problem
eval --suite r1 --answers nosuch | --answers nosuch: no such file or folder
placement runs/tiny --gpus 2 | name a task with --task
plan latin.toml --cluster 8xH800 | save it as UTF-8
plan v9 | no model or recipe "v9": 
plan v3 --cluster 2048 | such as 2048xH800
data build latin.toml | latin.toml, line 1 is not UTF-8 text (byte 0xe9); save it as UTF-8
data build dir | dir is a directory; name the recipe itself
data check file | file is not a finished build
keys sftt | did you mean "sft"?
keys lr | distill.lr
keys rl.lrr | rl has no key "lrr"; did you mean "lr"?
keys rll.lr | unknown kind "rll"; did you mean "rl"?
compare runs/tiny/zero runs/tiny/01-zero | is on both sides
drift nosuch | no model or run at nosuch
compare runs/tiny runs/tiny --task countdown | is on both sides
whatif runs/none | no recipe at runs/none
plan v3 --cluster 8xH100 --search | layouts rejected (needs more memory
run nosuch.toml | no recipe at nosuch.toml; available recipes:
run dir | dir is a directory; name the recipe itself
run latin.toml | latin.toml, line 1 is not UTF-8 text (byte 0xe9); save it as UTF-8
run empty.toml | a recipe needs at least one [[stage]] table
run mark.toml | messages must be a list, not int
run sft.toml | chat5.jsonl:1: messages must be a list, not int
run nodata.toml | none.jsonl
run sft.toml --until sftt | no stage "sftt" in the recipe "x"; stages: base, sft
run sft.toml --out file | file: a file is in the way; move it, or choose another folder (--out)
run sft.toml --out file/x | file/x: a file is in the way
data export runs/tiny file | file: a file is in the way
run sft.toml --set main=bas | main = "bas" is no stage with a model; did you mean "base"?
run sft.toml --set sft.lr=nan | key "lr" is NaN
run tiny --set zero.rollout=5 | key "rollout" is 5 (a whole number), expected a table; did you mean "rollouts"?
run tiny --set zero.rollout=5 | --set zero.rollout=5: [[stage]] "zero" (kind rl): key "rollout"
run tiny --set zero.rollout.workers=2 | stage "zero": sampler local: unknown key "workers"
run tiny --set zero.rolouts=4 | --set zero.rolouts=4: [[stage]] "zero" (kind rl): unknown key "rolouts"; did you mean
run tiny --set zero.from=bas | --set zero.from=bas: [[stage]] "zero": from = "bas" does not exist
run tiny --set layout.pq=2 | --set layout.pq=2: [layout]: unknown key "pq"
run tiny --set seed=x | --set seed=x: key "seed"
run tiny --set model.hidden=64 | --set model.hidden=64: model (preset 'tiny'): unknown key 'hidden'; did you mean 'dim'?
run tiny --set model.num_hidden_layers=2 | did you mean 'n_layers'?
run tiny --set model.dim=x | --set model.dim=x: model (preset 'tiny'): dim:
run tiny --set model.preset=v9 | --set model.preset=v9: model: unknown preset 'v9'
run tiny --set model.name=x | unknown key 'name'
plan v3 --cluster 8xH100 --set model.hidden=64 | did you mean 'dim'?
run tiny --set pretrain.lr=100 | --set pretrain.lr=100: [[stage]] "pretrain" (kind pretrain): key "lr" is 100: expected
run tiny --set zero.lr=100 | key "lr" is 100: expected values of at most 1
run sft.toml --set sft.lr=100 | key "lr" is 100
run tiny --set zero.kl.weight=1e9 | key "kl.weight" is 1000000000.0 (a number), expected less than or equal to 100
run tiny --set zero.temperature=1e9 | key "temperature"
run tiny --set zero.kl.weight=nan | key "kl.weight" is NaN (a number), expected a finite number
run tiny --set zero.weight_decay=inf | key "weight_decay" is Infinity (a number), expected a finite number
run tiny --set model.max_seq_len=0 | max_seq_len: Input should be greater than 0
run tiny --set model.moe_inter_dim=0 | moe_inter_dim: Input should be greater than 0
run tiny --set model.rope_theta=-1 | rope_theta: Input should be greater than 0
run tiny --set model.init_std=-1 | init_std: Input should be greater than or equal to 0
plan v3 --cluster 2048xH800 --set model.q_lora_rank=-1536 | q_lora_rank: Input should be greater than or equal to 0
run tiny --set model.rope_theta=inf | rope_theta: Input should be a finite number
run tiny --set pretrain.gamma=5 | key "gamma" is 5
run tiny --set pretrain.mtp_lambda=1e9 | key "mtp_lambda"
run | 'RECIPE'; see bessemer run --help
frobnicate | No such command 'frobnicate'; see bessemer --help
"""
CASES = [tuple(part.strip() for part in line.split(" | ")) for line in WRONG.strip().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("folder")
    write_run(folder / "runs" / "tiny")
    answer = '{"step": 1, "id": "p", "prompt": "2+2", "completion": "4"}\n'
    (folder / "runs" / "tiny" / "01-zero" / "rollouts.jsonl").write_text(answer)
    (folder / "other").mkdir()
    (folder / "other" / "tiny").symlink_to(folder / "runs" / "tiny")
    (folder / "dir").mkdir()
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize(("command", "words"), CASES)
def test_one_line_names_the_fix(call, folder, monkeypatch, command, words):
    monkeypatch.chdir(folder)
    before = {path for path in folder.rglob("*") if path.parts[-1] != ".lock"}
    status, out, err = call(*command.split())
    *earlier, last = err.splitlines()
    assert status == 2 and not out and last.startswith("error: ") and words in last, err
    assert len(earlier) == 0 or command.startswith("run "), "a run may have said what it will do"
    written = {path for path in folder.rglob("*") if path.parts[-1] != ".lock"} - before
    assert {path.relative_to(folder).parts[0] for path in written} <= {"runs"}


def test_ctrl_c_and_a_closed_terminal_are_no_bugs(call, folder, monkeypatch):
    from bessemer.engine import engine

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.chdir(folder)
    monkeypatch.setattr(engine, "load_engine", interrupted)
    status, _, err = call("generate", "runs/tiny", "hi")
    assert status == 130 and "Traceback" not in err


def test_a_name_that_the_system_refuses(call, folder, monkeypatch):
    monkeypatch.chdir(folder)
    status, _, err = call("chat", "x" * 300)
    assert status == 2 and err.startswith("error: ") and "too long" in err and err.count("\n") == 1
