"""recipes/r1-paper.toml in miniature: the same file, every number divided, on files and a model made here."""

import json
import re
import tomllib
from pathlib import Path

import pytest
import stages_run
import torch

from bessemer.config.recipe import Recipe
from bessemer.data import chat
from bessemer.data.batch import Batch
from bessemer.data.tokenizer import Tokenizer
from bessemer.model.config import preset
from bessemer.model.transformer import Transformer
from bessemer.pipeline import preflight
from bessemer.train.objective import next_token

PAPER = Path(__file__).parents[2] / "recipes" / "r1-paper.toml"

DIVISORS = {
    "rollouts": 300, "general.start": 80, "prompts_per_rollout": 128, "general.prompts": 128, "samples": 4,
    "updates_per_rollout": 8, "kl.reference_every": 200, "max_new_tokens": 512, "row_length": 64, "problems": 2000,
    "keep": 4, "others": 20_000, "batch_examples": 16,
}  # fmt: skip
"""The divisor of every number in the recipe; learning rates are multiplied instead, because there are few steps."""
FASTER = {"rl": 30, "sft": 10, "reward-model": 500}
KEPT = {
    "temperature", "temperatures", "top_p", "kl.weight", "loss.clip_low", "loss.clip_high", "heldout.temperature",
    "consistency", "epochs", "made", "micro_rows",
}  # fmt: skip

ASKED = {
    "maths": [(f"What is {n} plus {n}?", str(2 * n)) for n in (2, 3, 4, 5)],
    "stem": [(f"Which is a {what}?", "B") for what in ("gas", "metal")],
    "logic": [(f"Who is {what}?", "Bo") for what in ("oldest", "youngest")],
    "code": [
        ("Write f(n) that returns n.", "def f(n): return n"),
        ("Read a number and print it.", "print(input())"),
    ],
    "aime_2024": [(f"Find the root {n}.", str(n)) for n in (7, 8, 9)],
    "math_500": [("Find the sum 6.", "6")],
    "gpqa_diamond": [("Which decays?", "B")],
    "livecodebench": [("Write f(n) that returns n again.", "def f(n): return n")],
}
CHOICES = ["Fe", "Ne", "Cu"]
CHOSEN = "\n\nA) Fe\nB) Ne\nC) Cu\n\nAnswer with the letter of one choice."


def record(kind, question, answer):
    """A line of the data file for this kind."""
    if kind in ("stem", "gpqa_diamond"):
        return {"question": question, "choices": CHOICES, "answer": answer}
    if kind in ("code", "livecodebench"):
        function = {"entry_point": "f", "tests": [{"input": [3], "output": 3}]}
        return {"prompt": question} | (
            function if "f(n)" in question else {"tests": [{"input": "3\n", "output": "3\n"}]}
        )
    return {"question": question, "answer": answer}


def write_data(folder):
    def write(name, lines):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    for kind, asked in ASKED.items():
        write(kind, [record(kind, *one) for one in asked])
    write("general", [{"prompt": f"Tell me {n}.", "aim": "harmless" if n == 3 else "helpful"} for n in range(4)])
    for name, count in (("preference_pairs", 64), ("preference_heldout", 8)):
        write(name, [{"prompt": f"Tell me {n}.", "chosen": "It is so.", "rejected": "no no no"} for n in range(count)])
    for name, count in (("safety_labels", 64), ("safety_heldout", 8)):
        labels = [("It is so.", True), ("no no no", False)]
        write(
            name,
            [{"prompt": f"Tell {n}.", "response": labels[n % 2][0], "safe": labels[n % 2][1]} for n in range(count)],
        )
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "It is so."}]
    write("others", [{"messages": turns}] * 12)


def write_base(folder):
    """Train a model that knows the files' answers by heart, in R1-Zero's form and in R1's."""
    pages = []
    for kind, asked in ASKED.items():
        for question, answer in asked:
            prompt = question + (CHOSEN if kind in ("stem", "gpqa_diamond") else "")
            pages.append(("r1-zero", prompt, f"<think>we know it</think><answer>{answer}</answer>"))
            pages.append(("r1", prompt, f"<think>\nwe know it\n</think>\n\nThe answer is <answer>{answer}</answer>."))
    pages += [("r1", f"Tell me {n}.", "<think>\nwe know it\n</think>\n\nIt is so.") for n in range(4)]
    texts = [f"{chat.ZERO_PREAMBLE} {prompt} {answer}" for _, prompt, answer in pages]
    tokenizer = Tokenizer.train(texts * 4, 420)
    tokenizer.chat_style = "r1-zero"
    rows = []
    for style, prompt, answer in pages:
        rows.append(chat.render_answers(tokenizer, chat.exchange(prompt, answer), style))
    width = max(len(ids) for ids, _ in rows)
    tokens = torch.full((len(rows), width), tokenizer.pad_id)
    loss = torch.zeros(len(rows), width)
    for n, (ids, answers) in enumerate(rows):
        tokens[n, : len(ids)], loss[n, : len(ids)] = torch.tensor(ids), torch.tensor(answers).float()
    shape = dict(
        vocab_size=tokenizer.vocab_size, dim=48, n_layers=2, inter_dim=96, moe_inter_dim=24, n_heads=4, q_lora_rank=24,
        kv_lora_rank=24, qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=12, n_routed_experts=4,
        n_activated_experts=2, n_expert_groups=2, n_limited_groups=1, max_seq_len=512, init_std=0.08, n_mtp=1,
    )  # fmt: skip
    model = Transformer(preset("tiny", **shape)).initialise(3)
    optimizer, draw = torch.optim.AdamW(model.parameters(), lr=5e-3), torch.Generator().manual_seed(0)
    model.train()
    for step in range(160):
        chosen = torch.randperm(len(rows), generator=draw)[:16]
        one = next_token(model, Batch(tokens[chosen], loss[chosen]), 0.0, 1e-4)
        (one.total / one.tokens).backward()
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * min(1, (160 - step) / 60)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    tokenizer.save(folder / "tokenizer")
    model.save(folder / "model", tokenizer_dir=folder / "tokenizer")
    return (one.total / one.tokens).item()


def miniature(folder):
    """The recipe on one process, with overrides that divide every number and name the files and the model made here."""
    text = re.sub(r"(?m)^rollout = .*\n|^\[layout\]\n(?:\w.*\n)+", "", PAPER.read_text())
    changes = [f'{name}.model="{folder}/model"' for name in ("base", "student")]
    for stage in tomllib.loads(text)["stage"]:
        inner = {
            f"{key}.{name}": one
            for key, value in stage.items()
            if isinstance(value, dict)
            for name, one in value.items()
        }
        for key, value in (stage | inner).items():
            if key in ("lr", "lr_final"):
                value *= FASTER[stage["kind"]]
            elif key in DIVISORS and value != "all" and not isinstance(value[0] if isinstance(value, list) else 0, str):
                value = divided(value, DIVISORS[key], least=2 if key == "rollouts" else 1)
            elif isinstance(value, int | float) and not isinstance(value, bool):
                assert key in KEPT, f"{key} is neither divided nor kept"
                continue
            else:
                continue
            changes.append(f"{stage['name']}.{key}={json.dumps(value)}")
    return Recipe.parse(text.replace("data/", f"{folder}/"), changes)


def divided(value, divisor, least=1):
    if isinstance(value, list):  # a schedule of (step, value) pairs
        return [[str(int(at) // 2050), divided(one, divisor)] for at, one in value]
    return max(least, value // divisor)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("paper")
    torch.set_num_threads(1)
    write_data(folder)
    assert write_base(folder) < 0.05
    recipe = miniature(folder)
    results = stages_run.runner.run(recipe, folder / "out")
    return recipe, folder, {result.name: result for result in results}


def test_every_stage_runs_to_its_end(run):
    recipe, folder, results = run
    assert [result.status for result in results.values()] == ["done"] * len(recipe.stages)
    assert not any(one.faults for one in preflight.examine(recipe, folder, recipe.names()))


def test_samples_of_all_kinds_and_the_others_are_taught(run):
    results = run[2]
    for name in ("cold-start", "maths", "code", "stem", "logic"):
        assert results[name].summary["kept"] >= 1, name
    assert results["logic"].summary["others"] == 10
    assert results["dev3"].summary["samples"] == 10 + sum(
        results[name].summary["kept"] for name in ("maths", "code", "stem", "logic")
    )
    assert results["distilled"].summary["samples"] == results["dev3"].summary["samples"]


def test_preferences_come_at_the_end_and_evaluations_are_whole_files(run):
    _, folder, results = run
    lines = [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
    scored = [line["step"] for line in lines if line["stage"] == "r1" and "rl/preference" in line["values"]]
    assert scored == [results["r1"].summary["steps"]], "the last rollout alone"
    for name, kind in (("aime", "aime_2024"), ("gpqa", "gpqa_diamond"), ("math-500", "math_500")):
        rows = json.loads((results[name].folder / "results.json").read_text())["rows"]
        assert {row["model"] for row in rows} == {"zero", "dev1", "dev2", "dev3", "r1", "distilled"}
        assert {row["n"] for row in rows} == {len(ASKED[kind])}


def test_a_dry_run_of_2048_ranks_walks_to_the_end(call, tmp_path, monkeypatch):
    """The recipe as it stands, student included: every stage fits an H200, and nothing is in its way."""
    (tmp_path / "data").mkdir()
    write_data(tmp_path / "data")
    other = (tmp_path / "data" / "others.jsonl").read_text().splitlines()[0]
    (tmp_path / "data" / "others.jsonl").write_text(f"{other}\n" * 200_000)
    monkeypatch.chdir(tmp_path)
    command = ("run", PAPER, "--dry-run", "--world", "2048", "--device", "H200", "--json")
    status, out, err = call(*command)
    stages = {stage["name"]: stage for stage in json.loads(out)["stages"]}
    assert status == 0, err
    assert [*stages] == Recipe.load(PAPER).names() and not any(stage["faults"] for stage in stages.values())
    assert any("1,984 of 2,048 ranks without any" in line for line in stages["distilled"]["found"])
    assert not (tmp_path / "runs").exists()
    status, out, _ = call(*command, "--set", "layout.recompute=[]")
    assert status == 2 and json.loads(out)["stages"][2]["faults"], "R1-Zero's rows do not fit without"


def test_every_number_has_its_source():
    """The source is cited on the line, or the line says `undocumented`. Sizes in the header are those of B.3.1."""
    text = PAPER.read_text()
    for line in text.partition("[[stage]]")[2].splitlines():
        value, _, comment = line.partition("#")
        _, equals, value = value.partition("=")
        if equals and re.search(r"\d", re.sub(r'"[^"]*"', "", value)):
            assert re.search(r"\[(R1|Nature|Math|V3)\b.*\]|undocumented", comment), line
    head = text.partition("name =")[0]
    for size in ("26K", "25K", "22K", "15K", "66K helpful", "12K harmless"):
        assert size in head
    asked = {stage["name"]: stage.get("problems") for stage in tomllib.loads(text)["stage"]}
    assert [asked[name] for name in ("maths", "code", "stem", "logic")] == [26_000, 25_000, 22_000, 15_000]
    most = {stage["name"]: stage["problems"] * stage["keep"] for stage in map(dict, _complete(text)) if "keep" in stage}
    expected = {"maths": 395_285, "code": 211_129, "stem": 10_124, "logic": 10_395}
    assert all(expected[name] <= most[name] < 3 * expected[name] for name in expected)


def _complete(text):
    return [stage.model_dump() for stage in Recipe.parse(text).stages]
