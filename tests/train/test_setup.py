"""When layers are compiled, and in which precision a stage computes."""

import re
from pathlib import Path

import pytest
import torch

import bessemer
from bessemer.addons.accelerate.kernels import attention_gpu
from bessemer.config.recipe import Recipe
from bessemer.config.rl import RLConfig
from bessemer.config.training import OptimizerConfig
from bessemer.errors import UserError
from bessemer.model.config import preset
from bessemer.model.transformer import Transformer
from bessemer.train import setup

PACKAGE = Path(bessemer.__file__).parent


H100, V100 = ("NVIDIA H100 80GB HBM3", (9, 0)), ("Tesla V100-SXM2-16GB", (7, 0))
GPU, CPU = torch.device("cuda"), torch.device("cpu")
RECIPES = Path(__file__).parents[2] / "recipes"


def has_card(monkeypatch, card):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *where: card[0])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *where: card[1])


def training_stages():
    """The settings of every stage that trains, in every recipe."""
    for file in sorted(path for path in RECIPES.glob("*.toml") if "[[stage]]" in path.read_text()):
        for config in Recipe.load(file).stages:
            if isinstance(config, OptimizerConfig):
                yield pytest.param(config, id=f"{file.stem}-{config.name}")


@pytest.mark.parametrize("config", list(training_stages()))
def test_no_stage_trains_in_float32_on_a_gpu_unless_its_recipe_says_so(monkeypatch, config):
    has_card(monkeypatch, H100)
    expected = torch.float32 if config.precision == "float32" else torch.bfloat16
    assert setup.precision_on(config.precision, GPU).dtype == expected
    assert config.precision != "float32" or "precision" in config.model_fields_set
    has_card(monkeypatch, V100)
    if config.precision == "bfloat16":
        with pytest.raises(UserError, match=r"V100-SXM2-16GB has no BF16.*7\.0"):
            setup.precision_on(config.precision, GPU)
    else:
        choice = setup.precision_on(config.precision, GPU)
        assert choice.dtype == torch.float32 and ("has no BF16" in choice.why or "set by the recipe" in choice.why)


def test_untrained_models_load_in_sampling_precision():
    """Only code that goes on to train loads float32 weights: no call of `load_model` but those of a runtime omits the
    dtype, and only stages that train ask the runtime for a model."""

    def calls(pattern):
        texts = {file.relative_to(PACKAGE).as_posix(): file.read_text("utf-8") for file in PACKAGE.rglob("*.py")}
        return {name: count for name, text in texts.items() if (count := len(re.findall(pattern, text)))}

    assert calls(r"(?<!def )load_model\((?!directory|[^\n]*dtype)") == {"train/runtime.py": 2}  # `read` and `scorer`
    assert calls(r"\bruntime\.(read|scorer)\(") == dict.fromkeys(
        ("pipeline/stages/pretrain.py", "pipeline/stages/sft.py", "rl/loop.py",
         "addons/r1/extend.py", "addons/r1/distill.py", "addons/r1/reward.py"), 1,
    )  # fmt: skip


def test_cpu_precision_is_unchanged():
    assert setup.precision_on("device", CPU).dtype == torch.float32
    assert setup.precision_on("bfloat16", CPU) == (torch.bfloat16, "bfloat16 (set by the recipe)")


@pytest.mark.parametrize("card", [H100, V100], ids=["H100", "V100"])
def test_stage_prints_its_precision(monkeypatch, card, tmp_path):
    """Device, card, dtype, experts and compilation in one line."""
    has_card(monkeypatch, card)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(setup, "device", lambda: GPU)
    monkeypatch.setattr(attention_gpu, "_try", lambda *trial: None)  # pretend that every kernel works
    attention_gpu._tried.cache_clear()
    messages, before = [], torch.get_float32_matmul_precision()
    config = RLConfig(kind="rl", tasks=["countdown"])
    try:
        with torch.device("meta"):
            network = Transformer(preset("tiny"))
        dtype = setup.set_precision(network, config, messages.append, tmp_path)
        assert torch.get_float32_matmul_precision() == ("highest" if card is H100 else "high")
        odd = Transformer(preset("tiny", moe_inter_dim=36)) if card is H100 else network
        setup.announce(odd, setup.choose_precision("device"), messages.append, compiled=True)
    finally:
        torch.set_float32_matmul_precision(before)
    if card is H100:
        assert dtype == torch.bfloat16 and messages == [
            "compute in bfloat16 with float32 masters, on NVIDIA H100 80GB HBM3; experts: grouped_mm; "
            "attention: cudnn; layers not compiled",
            "compute in bfloat16, on NVIDIA H100 80GB HBM3; experts: one after another; "
            "attention: cudnn; layers compiled",
        ]
    else:
        assert dtype == torch.float32 and messages[0].startswith(
            "compute in float32 (Tesla V100-SXM2-16GB has no BF16: "
        )
        assert "products in TF32" in messages[0]
