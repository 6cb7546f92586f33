"""`bessemer data export`: the stages' data of a run as data sets that TRL's own functions read."""

import json

import pytest
from datasets import Dataset, load_dataset
from made_run import TEXTS, write_run
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer
from trl.data_utils import apply_chat_template, is_conversational, maybe_extract_prompt, maybe_unpair_preference_dataset

from bessemer.addons.curate.export import export
from bessemer.addons.families import formats
from bessemer.data import chat, sft_rows
from bessemer.data.documents import document
from bessemer.data.tokenizer import Tokenizer
from bessemer.errors import UserError

TALKS = [
    chat.exchange("What is 3+4?", "<think>3+4=7</think>\n\n\\boxed{7}"),
    [{"role": "system", "content": "Be brief."}, *chat.exchange("你好", "你好！"), *chat.exchange("Who?", "An ox.")],
]
PAIRS = [
    {"prompt": "Name a colour.", "chosen": "Blue.", "rejected": "No."},
    {"prompt": [*TALKS[1], {"role": "user", "content": "Why?"}], "chosen": "It pulls.", "rejected": "."},
]
LABELS = [{"prompt": "Insult me.", "response": "I would rather not.", "safe": True}]
ROLLOUTS = [
    {"step": n, "id": "sums/test/0", "prompt": "3+4?", "completion": f"<think>\n</think>{n}", "reward": n / 8,
     "correct": n == 7, "formatted": True, "reason": "correct", "length": 3}
    for n in (6, 7)
]  # fmt: skip


@pytest.fixture
def run(tmp_path):
    """A run of five stages: one wrote no data, another is still writing."""
    root = tmp_path / "a-run"
    files = {
        "01-corpus/meta.json": [{}],
        "02-dev1/samples.jsonl": [{"messages": talk} for talk in TALKS],
        "03-helpful/judged.jsonl": [PAIRS[0], formats.conversational(PAIRS[1])],
        "04-harmless/judged.jsonl": LABELS,
        "05-zero/rollouts.jsonl": ROLLOUTS,
    }
    for name, lines in files.items():
        (root / name).parent.mkdir(parents=True)
        (root / name).write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    with (root / "05-zero/rollouts.jsonl").open("a") as file:
        file.write('{"step": 8, "prom')
    (root / "recipe.toml").write_text('name = "a-run"\n')
    return root


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_trl_reads_what_is_written_and_renders_it_as_we_do(run, tmp_path, call):
    out = tmp_path / "out"
    status, printed, _ = call("data", "export", run, out, "--json")
    done = json.loads(printed)
    assert status == 0 and [(entry["stage"], entry["file"].rpartition("/")[2], entry["records"]) for entry in done] == [
        ("dev1", "dev1-conversations.jsonl", 2), ("helpful", "helpful-preferences.jsonl", 2),
        ("harmless", "harmless-preferences.jsonl", 1), ("zero", "zero-rollouts.jsonl", 2),
    ]  # fmt: skip
    sets = [
        load_dataset("json", data_files=entry["file"], split="train", cache_dir=tmp_path / "cache") for entry in done
    ]
    Tokenizer.train(TEXTS, 300).save(tmp_path / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    for style in ("zero", "r1"):
        tokenizer.chat_template = chat.jinja(style)
        for rows in sets:
            for row in rows:
                assert is_conversational(row) and maybe_extract_prompt(row) == row
                trl_row = apply_chat_template(row, tokenizer)
                for key in ("completion", "chosen", "rejected"):
                    if key in row:
                        rendered = chat.render([*row["prompt"], *row[key]], style, add_generation_prompt=False)
                        assert trl_row["prompt"] + trl_row[key] == rendered
                if "messages" in row:
                    assert trl_row["text"] == chat.render(row["messages"], style, add_generation_prompt=False)
    talks, pairs, labels, rollouts = ([*rows] for rows in sets)
    assert [list(document(row, "own", "here").messages) for row in talks] == TALKS
    assert [formats.pair(row, "here") for row in pairs] == PAIRS
    assert [formats.label(row, "here") for row in labels] == LABELS
    assert [(row["label"], row["reward"], row["step"]) for row in rollouts] == [(False, 0.75, 6), (True, 0.875, 7)]


def test_preferences_without_a_prompt_are_cut_as_trl_cuts_them():
    """TRL's own extraction is the reference, for texts and for messages."""
    texts = [chat.exchange("Why?", answer) for answer in ("So.", "No.")]
    for chosen, rejected in (
        ("The sky is blue.", "The sky is green."),
        ("The sky is gray.", "The sky is green."),
        ("ab", "ac"),
        tuple(texts),
    ):
        trl_pair = maybe_extract_prompt({"chosen": chosen, "rejected": rejected})
        assert formats.pair({"chosen": chosen, "rejected": rejected}, "here") == formats.pair(trl_pair, "here")
    beside = maybe_extract_prompt({"prompt": "Why?", "chosen": texts[0], "rejected": texts[1]})
    own_pair = formats.pair({"prompt": "Why?", "chosen": texts[0], "rejected": texts[1]}, "here")
    assert beside == formats.conversational(own_pair)
    unpaired = maybe_unpair_preference_dataset(Dataset.from_list([beside]))
    assert [formats.label(row, "here") for row in unpaired] == [
        {"prompt": "Why?", "response": "So.", "safe": True}, {"prompt": "Why?", "response": "No.", "safe": False},
    ]  # fmt: skip


def test_export_refuses_stages_without_data_and_existing_files(run, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match='"helpfull"; did you mean "helpful"'):
        export(run, out, ["helpfull"])
    with pytest.raises(UserError, match=r"nothing of corpus .*kind rl, reject"):
        export(run, out, ["corpus"])
    with pytest.raises(UserError, match="belongs to a run"):
        (run / "02-dev1" / "stage.json").write_text("{}")
        export(run, run / "02-dev1" / "out")
    export(run, out, ["zero"])
    assert [path.name for path in out.iterdir()] == ["zero-rollouts.jsonl"]
    with pytest.raises(UserError, match=r"zero-rollouts.jsonl exists"):
        export(run, out)
    assert len([*out.iterdir()]) == 1, "nothing is written beside a file that exists"
    (run / "02-dev1/samples.jsonl").write_text('{"messages": 5}\n')
    with pytest.raises(UserError, match=r"jsonl:1: messages must be a"):
        export(run, out, ["dev1"])
    assert len([*out.iterdir()]) == 1


def test_trl_trains_on_the_same_tokens_of_a_completion(tmp_path):
    """As SFTTrainer prepares them: the same ids, with a loss on the completion and not on answers in the prompt."""
    write_run(tmp_path / "run")
    folder = tmp_path / "run" / "01-zero" / "model"
    tokenizer, hf_tokenizer = Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    records = [
        {"prompt": [*chat.exchange("the quick?", "brown"), {"role": "user", "content": "fox"}],
         "completion": [{"role": "assistant", "content": "jumps over"}]},
        {"prompt": [{"role": "user", "content": "lazy"}], "completion": [{"role": "assistant", "content": "dog"}]},
    ]  # fmt: skip
    config = SFTConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_length=64,
        gradient_checkpointing=False, disable_tqdm=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(folder)
    for style in ("zero", "r1"):
        hf_tokenizer.chat_template = chat.jinja(style)
        trainer = SFTTrainer(
            model, args=config, train_dataset=Dataset.from_list(records), processing_class=hf_tokenizer
        )
        for record, row in zip(records, trainer.train_dataset, strict=True):
            packed = sft_rows._sample(document(record, "own", "here"), tokenizer, style)
            assert (packed >> 2).tolist() == row["input_ids"]
            assert (packed & 1).tolist() == [label != -100 for label in row["labels"]]
