"""The objective against TRL's GRPOTrainer on the same rollout: loss and gradient, one network on both sides.

TRL runs its own path (transformers' DeepseekV3ForCausalLM, prompts padded left, its chunked head); ours runs over the
same weights, padded right. TRL's settings correspond to ours as follows:

    TRL                                        here
    loss_type "grpo"                           surrogate "grpo",  normalise "sequence"
    loss_type "dapo" (and "bnpo": of a         surrogate "grpo",  normalise "token"
      micro-batch, so equal where there is one)
    loss_type "dr_grpo"                        surrogate "grpo",  normalise "constant", max_completion_length
    loss_type "grpo",                          surrogate "gspo",  normalise "sequence"
      importance_sampling_level "sequence"
    loss_type "cispo", epsilon_high e          surrogate "cispo", normalise "token", clip_low 1, clip_high e - 1
                                               (MiniMax's weight has no lower bound, and e is the bound itself)
    loss_type "dapo" without old               surrogate "reinforce", normalise "token" (the gradient; the value of
      log-probabilities                        the one is A, of the other A log pi)
    epsilon, epsilon_high, beta, temperature   clip_low, clip_high, kl, temperature
    use_bias_correction_kl                     unbiased_kl
    off_policy_mask_threshold                  loss "off-policy-mask", limit

Bounds: 1e-6 for the loss, in sizes of its largest term; 1e-5 for the gradient, |difference| / |gradient| in float32
through two different implementations of one network.
"""

from functools import partial

import pytest
import torch
from completions import completion
from datasets import Dataset
from rl_parts import loss_of, to_batches
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as hf_logging
from trl import GRPOConfig, GRPOTrainer

from bessemer.addons.r1.off_policy_mask import off_policy_mask
from bessemer.rl.losses import GRPO
from bessemer.rl.rollout import ScoredSample
from bessemer.tasks.base import Problem, Verdict

hf_logging.disable_progress_bar()

PAD, CAP = 2, 12
PROMPTS, ANSWERS = (3, 9, 6, 5), (2, 12, 7, 4)
CLIP = dict(loss=loss_of())
EPSILON = dict(epsilon=0.2, epsilon_high=0.28)

CASES = {
    "grpo": (dict(loss_type="grpo", **EPSILON), dict(**CLIP), "sequence"),
    "dapo": (dict(loss_type="dapo", **EPSILON), dict(**CLIP), "token"),
    "bnpo": (dict(loss_type="bnpo", **EPSILON), dict(**CLIP), "token"),
    "dr_grpo": (dict(loss_type="dr_grpo", **EPSILON), dict(**CLIP, constant=CAP), "constant"),
    "gspo": (
        dict(loss_type="grpo", importance_sampling_level="sequence", epsilon=0.02, epsilon_high=0.04),
        dict(loss=loss_of("gspo", 0.02, 0.04)),
        "sequence",
    ),
    "cispo": (
        dict(loss_type="cispo", epsilon_high=1.3),
        dict(loss=loss_of("cispo", 1.0, 0.3)),
        "token",
    ),
    "symmetric clip": (dict(loss_type="grpo", epsilon=0.1), dict(loss=loss_of("grpo", 0.1, 0.1)), "sequence"),
    "temperature": (
        dict(loss_type="dapo", temperature=0.7, **EPSILON),
        dict(temperature=0.7, **CLIP),
        "token",
    ),
    "unbiased KL": (
        dict(loss_type="dapo", use_bias_correction_kl=True, **EPSILON),
        dict(unbiased_kl=True, **CLIP),
        "token",
    ),
    "off-policy mask": (
        dict(loss_type="dapo", off_policy_mask_threshold=0.02, **EPSILON),
        dict(loss=partial(off_policy_mask, limit=0.02, clip_low=0.2, clip_high=0.28)),
        "token",
    ),
}


class Rollout:
    """Four outputs of different lengths with invented advantages. The log-probabilities of sampler and reference differ
    enough from the policy's for clips to bind."""

    def __init__(self, model, temperature):
        generator = torch.Generator().manual_seed(5)
        self.prompts, self.answers = (
            [torch.randint(3, 290, (n,), generator=generator).tolist() for n in lengths]
            for lengths in (PROMPTS, ANSWERS)
        )
        self.advantage = [1.3, -0.8, -0.6, 1.1]
        self.old, self.ref = [], []
        for prompt, answer in zip(self.prompts, self.answers, strict=True):
            with torch.no_grad():
                logp = (model(torch.tensor([prompt + answer]))[0] / temperature).log_softmax(-1)
            mine = logp[len(prompt) - 1 : -1].gather(1, torch.tensor(answer)[:, None]).squeeze(1)
            self.old.append((mine + 0.3 * torch.randn(len(answer), generator=generator)).tolist())
            self.ref.append((mine + 0.5 * torch.randn(len(answer), generator=generator)).tolist())

    def theirs(self, rows):
        """The inputs that TRL's trainer passes to its loss."""

        def padded(values, left=False, fill=0):
            width = max(map(len, values))
            return torch.tensor([
                [fill] * (width - len(v)) + v if left else v + [fill] * (width - len(v)) for v in values
            ])  # fmt: skip

        prompts, answers, old, ref = (
            [part[r] for r in rows] for part in (self.prompts, self.answers, self.old, self.ref)
        )
        return {
            "prompt_ids": padded(prompts, left=True, fill=PAD),
            "prompt_mask": padded([[1] * len(p) for p in prompts], left=True),
            "completion_ids": padded(answers, fill=PAD),
            "completion_mask": padded([[1] * len(a) for a in answers]),
            "advantages": torch.tensor([self.advantage[r] for r in rows]),
            "old_per_token_logps": padded(old, fill=0.0),
            "ref_per_token_logps": padded(ref, fill=0.0),
            "num_items_in_batch": torch.tensor(sum(map(len, self.answers))),
        }

    def ours(self, normalise):
        def batches(logprobs):
            rows = [
                ScoredSample(Problem("p", "", "en"), prompt, completion(answer, "", logp, "stop", len(prompt)),
                        Verdict(True, True, "", None), 1.0, advantage)
                for prompt, answer, logp, advantage
                in zip(self.prompts, self.answers, logprobs, self.advantage, strict=True)
            ]  # fmt: skip
            return to_batches(rows, PAD, 10_000, normalise)

        ((batch,), (reference,)) = batches(self.old), batches(self.ref)
        batch.extras["ref_logp_BT"] = reference.extras["old_logp_BT"]
        return batch


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("policy") / "model"


@pytest.fixture
def policy(make_model, tokenizer, directory):
    """Our model, saved where transformers will load it."""
    model = make_model(3, n_expert_groups=2, n_limited_groups=1)  # K/M = 2, hard-coded in transformers
    if not directory.exists():
        tokenizer.save(directory.parent / "tokenizer")
        model.save(directory, tokenizer_dir=directory.parent / "tokenizer", mtp=False)
    return model


@pytest.fixture
def peer(policy, directory, tmp_path):
    """A function: settings -> a GRPOTrainer in training mode, with its own copy of the model."""

    def make(beta=0.0, **settings):
        config = GRPOConfig(
            output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", beta=beta, num_generations=4,
            per_device_train_batch_size=4, max_completion_length=CAP, gradient_checkpointing=False,
            disable_tqdm=True, **{"use_bias_correction_kl": False} | settings,
        )  # fmt: skip
        # its grouped GEMM refuses widths that are not a multiple of 16 bytes
        model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
        )
        trainer = GRPOTrainer(
            model, reward_funcs=lambda completions, **_: [0.0] * len(completions), args=config,
            train_dataset=Dataset.from_dict({"prompt": ["x"] * 4}),
            processing_class=AutoTokenizer.from_pretrained(directory, padding_side="left"),
        )  # fmt: skip
        trainer.current_gradient_accumulation_steps = config.gradient_accumulation_steps
        trainer.model.train()
        return trainer

    return make


def gradients(model, embedding, head):
    """Gradients of embedding and head, and the norm of all: the other parameters come in different orders."""
    norm = torch.stack([p.grad.double().norm() for p in model.parameters() if p.grad is not None]).norm()
    return embedding.weight.grad, head.weight.grad, norm


def agree(peer_model, model):
    reference = gradients(peer_model, peer_model.get_input_embeddings(), peer_model.get_output_embeddings())
    ours = gradients(model, model.embed, model.head)
    for actual, expected in zip(ours, reference, strict=True):
        assert float(expected.norm()) > 1e-3
        assert float((actual - expected).norm() / expected.norm()) < 1e-5


def our_loss(objective, model, batch):
    loss = objective(model, batch)
    mean = loss.total / loss.tokens
    mean.backward()
    weight = loss.tokens if loss.weight is None else loss.weight
    return mean.item(), {name: float(value / weight) for name, value in loss.metrics.items()}


@pytest.mark.parametrize("beta", [0.0, 0.05])
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_are_trl_s(policy, peer, name, beta):
    reference, ours, normalise = CASES[name]
    objective = GRPO(kl=beta, **ours)
    sampled = Rollout(policy.eval(), objective.temperature)
    trainer = peer(beta=beta, **reference)
    expected = trainer.compute_loss(trainer.model, sampled.theirs(range(4)))
    expected.backward()
    actual, metrics = our_loss(objective, policy.train(), sampled.ours(normalise))
    assert actual == pytest.approx(expected.item(), abs=1e-6)
    agree(trainer.model, policy)
    logged = {key: values[-1] for key, values in trainer._metrics["train"].items()}
    assert metrics["clip_share"] > 0, "the clip binds somewhere"
    if normalise != "sequence":  # means over tokens on both sides
        assert metrics["entropy"] == pytest.approx(logged["entropy"], rel=1e-5)
        assert metrics.get("kl") == (pytest.approx(logged["kl"], rel=1e-5) if beta else None)
    if name == "dapo":
        assert metrics["clip_share"] == pytest.approx(logged["clip_ratio/region_mean"])


def test_two_micro_batches_are_trl_s_accumulated_step(policy, peer):
    """DAPO divides by the tokens of the whole step on both sides, however the step is cut."""
    reference, ours, _ = CASES["dapo"]
    sampled = Rollout(policy.eval(), 1.0)
    trainer = peer(gradient_accumulation_steps=2, steps_per_generation=2, **reference)
    losses = [trainer.compute_loss(trainer.model, sampled.theirs(rows)) for rows in ((0, 1), (2, 3))]
    sum(losses).backward()
    actual, _ = our_loss(GRPO(kl=0.0, **ours), policy.train(), sampled.ours("token"))
    assert actual == pytest.approx(float(sum(losses).detach()), abs=1e-6)
    agree(trainer.model, policy)


def test_reinforce_has_the_gradient_of_trl_on_policy(policy, peer):
    sampled = Rollout(policy.eval(), 1.0)
    trainer = peer(loss_type="dapo")
    inputs = sampled.theirs(range(4))
    del inputs["old_per_token_logps"]
    trainer.compute_loss(trainer.model, inputs).backward()
    our_loss(GRPO(loss_of("reinforce"), kl=0.0), policy.train(), sampled.ours("token"))
    agree(trainer.model, policy)
