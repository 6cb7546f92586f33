"""Pre-training with controls: what its feed changes, and nothing else."""

from types import SimpleNamespace

import pytest
import torch

from bessemer.config.recipe import Recipe
from bessemer.data.tokenizer import Tokenizer
from bessemer.errors import UserError
from bessemer.pipeline import runner
from bessemer.pipeline.stages.pretrain import Start
from bessemer_claims.controls import Controlled

TEXT = """
name = "controls"
seed = 7
[model]
preset = "tiny"
vocab_size = 300

[[stage]]
kind = "corpus"
row_length = 64
heldout = 0.1
parts = { countdown = "task:countdown" }
limits = { countdown = "30K" }

[[stage]]
kind = "bessemer_claims.controls:Controlled"
name = "pretrain"
tokens = "4K"
lr = 1e-3
mtp_targets = "other-row"
token_noise = 0.3
"""


@pytest.fixture(scope="module")
def feed_of(tmp_path_factory):
    """Makes the feed of a stage whose keys are changed."""
    folder = tmp_path_factory.mktemp("controls")
    runner.run(Recipe.parse(TEXT, [], "controls.toml"), folder / "run", until="corpus")
    corpus = folder / "run" / "01-corpus"
    tokenizer = Tokenizer.load(corpus / "tokenizer")

    def made(*overrides):
        recipe = Recipe.parse(TEXT, list(overrides), "controls.toml")
        config = recipe.stage("pretrain")
        facts = Controlled().resolve(config, recipe)
        ctx = SimpleNamespace(name="pretrain", state=folder, seed=7, say=print, runtime=SimpleNamespace(n=1))
        cfg = SimpleNamespace(**facts["model"])
        return Controlled().feed(config, ctx, Start(corpus, None, cfg, None), tokenizer)

    return made


def test_noise_is_in_training_rows_alone(feed_of):
    def read(share):
        feed = feed_of(f"pretrain.token_noise={share}", "pretrain.mtp_targets=own")
        held_out = feed.validation("countdown")[0]
        return feed.batch(3, 8).tokens_BT, feed.batch(5, 6).tokens_BT, held_out.tokens_BT

    (plain, _, held), (noisy, later, held_too) = read(0.0), read(0.3)
    assert 0.2 < (plain != noisy).float().mean() < 0.32 and torch.equal(noisy[2:], later)
    assert torch.equal(held, held_too)


def test_shuffled_targets_never_match_their_row_in_any_micro_batch(feed_of):
    feed = feed_of()
    whole_step, alone = feed.batch(3, 4), [feed.batch(row, 1) for row in range(3, 7)]
    targets = [batch.extras["mtp_tokens_BT"] for batch in alone]
    assert not any(torch.equal(batch.tokens_BT, other) for batch, other in zip(alone, targets, strict=True))
    assert torch.equal(whole_step.extras["mtp_tokens_BT"], torch.cat(targets))


def test_experts_chosen_by_token_match_those_of_its_entry(feed_of):
    feed = feed_of("pretrain.routing=token")
    for batch in (feed.batch(0, 2), feed.validation("countdown")[0]):
        assert torch.equal(batch.extras["choice_BTLK"], feed.table_VLK[batch.tokens_BT])
    with pytest.raises(UserError, match="new networks with experts"):
        feed_of("pretrain.routing=token", "model.n_dense_layers=4", "model.n_layers=4")
