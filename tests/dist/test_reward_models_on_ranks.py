"""RL's reward models on many ranks: divided, with the scores of a whole one, of our family and of another."""

import pytest
import torch
import torch.distributed as dist
from allocator import kept_bytes
from hf_cases import made
from ranks import on_ranks
from test_executor import CFG

from bessemer.addons.distributed.mesh import Layout
from bessemer.addons.distributed.on_fsdp_ranks import OnFSDPRanks
from bessemer.addons.distributed.on_ranks import OnRanks
from bessemer.addons.distributed.ranks import Ranks
from bessemer.addons.families.causal_lm import CausalLM
from bessemer.addons.plan import memory
from bessemer.addons.plan.other_models import from_config
from bessemer.addons.r1.preference import FACTS, RewardModel, Scale
from bessemer.config.recipe import LayoutConfig
from bessemer.data.tokenizer import Tokenizer
from bessemer.model.transformer import Scorer, Transformer

ITEMS = [(f"Make {n}.", f"<think>\n{'so ' * n}\n</think>\n\nit is {n} " + "yes " * (n % 3)) for n in range(9)]
LAYOUTS = [{"pp": 2}, {"ep": 2}, {"pp": 2, "ep": 2, "schedule": "dualpipe"}, {"dp": 2}, {"cp": 2}]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A reward model of our family and one like Qwen2, with the same tokenizer."""
    folder = tmp_path_factory.mktemp("judges")
    words = Tokenizer.train([answer for _, answer in ITEMS] * 8, 300)
    words.chat_style = "r1"
    words.save(folder / "tokenizer")
    cfg = CFG.model_copy(update={"vocab_size": words.vocab_size, "n_mtp": 0, "max_seq_len": 512})
    qwen = made("qwen2", vocab_size=words.vocab_size, max_position_embeddings=512)
    networks = {"own": Scorer.of(Transformer(cfg).initialise(3), 2), "qwen2": CausalLM(qwen).scorer(2)}
    for name, network in networks.items():
        facts = {FACTS: Scale("harmless", -0.5, 1.5, words.fingerprint).to_json()}
        network.save(folder / name / "model", tokenizer_dir=folder / "tokenizer", files=facts)
    return folder, cfg, from_config(qwen.config.to_dict())


def on_a_rank(rank, kind, folder, n, layout, items, batch_tokens):
    from bessemer.addons.r1 import preference

    preference.BATCH_TOKENS = batch_tokens
    said = []
    ranks = Ranks(dist.distributed_c10d._get_default_store(), rank, n, torch.device("cpu"))
    runtime, held = kind(ranks, LayoutConfig(**layout), said.append), []
    size = kept_bytes(lambda: held.append(RewardModel.load(folder, runtime)))
    scores = held[0].score(items)
    assert held[0].score(items[:1]) == pytest.approx(scores[:1], abs=1e-5), "one text, for all ranks"
    return scores, size, said


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_reward_model_of_our_family_is_cut_as_the_policy_is(folders, layout):
    """Scores to 1e-6 of a whole model's; the bytes of the fullest rank are those that the planner predicts."""
    folder, cfg, _ = folders
    sizes = {key: size for key, size in layout.items() if key != "schedule"}
    n = Layout(**sizes).world
    expected = RewardModel.load(folder / "own" / "model").score(ITEMS)
    assert len(set(expected)) == len(ITEMS)
    outcomes = on_ranks(n, on_a_rank, OnRanks, folder / "own" / "model", n, layout, ITEMS, 200)
    for scores, _, _ in outcomes:
        assert scores == pytest.approx(expected, rel=1e-6, abs=1e-6)
    divided = Layout(layout.get("pp", 1), layout.get("dp", 1) * layout.get("cp", 1), layout.get("ep", 1))
    predicted, most = max(memory.scorer_bytes(cfg, divided, 4)), max(size for _, size, _ in outcomes)
    assert most == pytest.approx(predicted, rel=0.05)
    if divided.pp * divided.ep > 1:
        assert most < 0.8 * memory.scorer_bytes(cfg, Layout(), 4)[0]


@pytest.mark.parametrize(("kind", "n"), [(OnFSDPRanks, 2), (OnRanks, 2), (OnFSDPRanks, 4)])
def test_one_of_another_family_is_sharded_over_all_ranks(folders, kind, n):
    """Beside a policy of any family: as 1 / N, embedding included."""
    folder, _, shape = folders
    expected = RewardModel.load(folder / "qwen2" / "model").score(ITEMS)
    for scores, size, _ in on_ranks(n, on_a_rank, kind, folder / "qwen2" / "model", n, {}, ITEMS, 200):
        assert scores == pytest.approx(expected, rel=1e-6, abs=1e-6)
        assert size == pytest.approx(4 * shape.scorer(n), rel=0.05)
        assert size == pytest.approx(4 * shape.scorer(1) / n, rel=0.05)


def test_a_layout_that_does_not_fit_it_keeps_it_whole_and_says_so(folders):
    folder, cfg, _ = folders
    layout, whole = {"ep": 3}, folder / "own" / "model"
    assert cfg.n_routed_experts % 3
    expected = RewardModel.load(whole).score(ITEMS)
    for scores, size, said in on_ranks(3, on_a_rank, OnRanks, whole, 3, layout, ITEMS, 100):
        assert scores == pytest.approx(expected, rel=1e-6, abs=1e-6)
        assert size == pytest.approx(memory.scorer_bytes(cfg, Layout(), 4)[0], rel=0.05)
        assert any("own is whole on every rank" in line and "experts" in line for line in said)
