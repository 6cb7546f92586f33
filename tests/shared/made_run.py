"""A finished run of one stage, `zero`, whose small random model has every mechanism of V3 and an MTP layer."""

from bessemer.data.tokenizer import Tokenizer
from bessemer.model.config import preset
from bessemer.model.transformer import Transformer
from bessemer.runs.directory import write_done
from bessemer.runs.files import write_json

TEXTS = ["the quick brown fox jumps over the lazy dog", "<think>two</think> <answer>4</answer>"] * 8
CONTEXT = 64


def write_run(root, context=CONTEXT, endless=False):
    """`endless`: at temperature 0 the model never ends its answer, whatever the machine's arithmetic."""
    stage = root / "01-zero"
    stage.mkdir(parents=True)
    (root / "recipe.toml").write_text('name = "tiny"\n[[stage]]\nkind = "rl"\nname = "zero"\n')
    write_json(stage / "stage.json", {"fingerprint": "f", "identity": {"kind": "rl"}, "inputs": {}})
    Tokenizer.train(TEXTS, 300).save(root / "tokenizer")
    cfg = preset("tiny", vocab_size=300, dim=32, n_layers=2, max_seq_len=context, init_std=0.12)
    model = Transformer(cfg).initialise(0)
    if endless:
        model.head.weight.data[Tokenizer.load(root / "tokenizer").stop_ids] = 0  # some other logit is above 0
    model.save(stage / "model", tokenizer_dir=root / "tokenizer")
    write_done(stage, {"fingerprint": "f", "inputs": {}}, {}, 1.0)
    return root
