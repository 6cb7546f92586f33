"""Families of add-ons read what is not in our own format: the one of an architecture, else the one for all others."""

import json

import pytest

from bessemer import plugins
from bessemer.config.training import LoRAConfig
from bessemer.data.tokenizer import Tokenizer
from bessemer.errors import UserError
from bessemer.hf import model_directory
from bessemer.hf.families import load_tokenizer
from bessemer.model.config import preset
from bessemer.model.protocol import LanguageModel
from bessemer.model.transformer import Scorer, Transformer


class Echoes(LanguageModel):
    """A network of a family that nobody else reads."""

    layers, mtp = (), ()


class EchoFamily:
    def load(self, directory, dtype, device):
        return Echoes()

    def load_scorer(self, directory, dtype, device):
        return Echoes()

    def load_tokenizer(self, directory, own_template):
        return Tokenizer.train(["a b c"], 268)

    def check_adapters(self):
        pass

    def attach(self, model, config, seed, base, stage):
        return model, f"{config.rank} adapters"


@pytest.fixture
def echoes(tmp_path):
    if "echo" not in plugins.names("families"):
        plugins.register("families", "echo")(EchoFamily())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "echo"}))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    return tmp_path


def test_an_add_on_s_family_reads_its_architecture(echoes):
    model = model_directory.load(echoes)
    assert isinstance(model, Echoes) and model_directory.own_config(echoes) is None
    assert isinstance(model_directory.load_scorer(echoes), Echoes)
    assert load_tokenizer(echoes).vocab_size == 268
    config = LoRAConfig(rank=2, alpha=4)
    assert model_directory.adapted(model, config, 0, echoes, "sft") == (model, "2 adapters")


def test_a_model_without_layers_of_ours_refuses_what_needs_them(echoes):
    model = model_directory.load(echoes)
    assert model.gates() == {} and model.frozen() == {} and model.training_flops(16, False) is None
    for ask in (lambda: model.set_recompute(["attend"]), model.hidden_matrices):
        with pytest.raises(UserError, match=r"set|leave"):
            ask()


def test_own_format_needs_no_family(tmp_path, monkeypatch):
    Transformer(preset("tiny", n_layers=2)).initialise(0).save(tmp_path / "own")
    Transformer(preset("tiny", n_layers=2)).initialise(0).scorer(1).save(tmp_path / "scorer")
    Tokenizer.train(["a b c"], 268).save(tmp_path / "own")
    monkeypatch.setattr(plugins, "table", lambda kind: pytest.fail("asked"))
    assert isinstance(model_directory.load(tmp_path / "own"), Transformer)
    assert isinstance(model_directory.load_scorer(tmp_path / "scorer"), Scorer)
    assert load_tokenizer(tmp_path / "own").vocab_size == 268


def test_without_the_add_on_the_error_names_the_architecture(echoes, monkeypatch):
    monkeypatch.setattr(plugins, "table", lambda kind: {})
    for read in (model_directory.load, model_directory.load_scorer, load_tokenizer):
        with pytest.raises(UserError, match=r"echo.*install"):
            read(echoes)
