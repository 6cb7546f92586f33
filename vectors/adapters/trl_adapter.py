"""TRL: `GRPOTrainer`, whole steps of it, with a table of log-probabilities for its model.

`_compute_loss` gives the losses; `train()` gives what depends on masks and accumulation, over completions that a
`rollout_func` hands in as an engine would.
"""

import os
import tempfile
import warnings
from types import SimpleNamespace

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
if os.environ.get("TRL"):
    from table_model import checkout

    checkout("TRL")

import numpy as np
import torch
from datasets import Dataset
from table_model import EOS, FIRST_PROMPT, PAD, TOKEN, Table
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    TopKLogitsWarper,
    TopPLogitsWarper,
    logging,
)
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput
from trl import GRPOConfig, GRPOTrainer

warnings.filterwarnings("ignore")
logging.set_verbosity_error()
FOLDER = tempfile.TemporaryDirectory()


class TableConfig(PretrainedConfig):
    model_type = "table"


class Backbone(torch.nn.Module):
    """Hidden states that are the logits, for versions that apply the head themselves."""

    def __init__(self, table):
        super().__init__()
        self.table = table

    def forward(self, input_ids, **_):
        return BaseModelOutput(last_hidden_state=self.table.logits(input_ids))


class TableLM(PreTrainedModel):
    config_class, base_model_prefix = TableConfig, "backbone"

    def __init__(self, config, logprobs=None):
        super().__init__(config)
        self.table = Table(logprobs)
        self.backbone = Backbone(self.table)
        self.lm_head = torch.nn.Linear(1, 1, bias=False)
        self.lm_head.weight = torch.nn.Parameter(torch.eye(self.table.vocabulary).double(), requires_grad=False)
        self.generation_config = GenerationConfig()

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, attention_mask=None, logits_to_keep=0, **_):
        logits = self.table.logits(input_ids)
        return CausalLMOutput(logits=logits[:, -logits_to_keep:] if logits_to_keep else logits)


def _trainer(
    logprobs, rollout, rewards, *, micro_batches=1, cls=GRPOTrainer, config_cls=GRPOConfig, per_group=None, rate=1.0,
    model=None, **settings,
):  # fmt: skip
    rows, tokens = logprobs.shape
    model = model or TableLM(TableConfig(), logprobs)
    words = {"<token>": TOKEN, "<eos>": EOS, "<pad>": PAD, "<other>": 3} | {
        f"p{b}": FIRST_PROMPT + b for b in range(rows)
    }
    words = Tokenizer(models.WordLevel(words, unk_token="<other>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<eos>", pad_token="<pad>", padding_side="left"
    )
    config = config_cls(
        output_dir=FOLDER.name, use_cpu=True, bf16=False, fp16=False, report_to="none",
        per_device_train_batch_size=rows // micro_batches, gradient_accumulation_steps=micro_batches,
        num_generations=per_group or rows, max_completion_length=tokens,
        learning_rate=rate, lr_scheduler_type="constant", max_grad_norm=0.0, save_strategy="no",
        disable_tqdm=True, logging_strategy="no", gradient_checkpointing=False,
        shuffle_dataset=False, remove_unused_columns=False,
        **{"beta": 0.0, "max_steps": 1, "temperature": 1.0, **settings},
    )  # fmt: skip
    dataset = Dataset.from_list([{"prompt": "<other>"}] * (rows // (per_group or rows)))
    optimizer = torch.optim.SGD([model.table.table], lr=rate)
    trainer = cls(
        model=model, reward_funcs=rewards, args=config, train_dataset=dataset, processing_class=tokenizer,
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)), rollout_func=rollout,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    return trainer, model.table.table


def _weightless(rows):
    """Rewards of one group whose advantages (reward minus mean) are all different from zero."""
    if rows == 1:
        raise NotImplementedError("a group of one has no advantage")
    return np.arange(rows, dtype=np.float64) ** 2


def _rollout(completion_mask, tool_mask, truncated):
    def rollout(prompts, trainer):
        lengths = [int(np.flatnonzero(row)[-1]) + 1 for row in completion_mask]
        return {
            "prompt_ids": [[FIRST_PROMPT + b] for b in range(len(lengths))], "logprobs": None,
            "completion_ids": [
                [TOKEN] * (n - 1) + [TOKEN if cut else EOS] for n, cut in zip(lengths, truncated, strict=True)
            ],
            "env_mask": [[int(keep) for keep in row[:n]] for row, n in zip(tool_mask, lengths, strict=True)],
            "row": list(range(len(lengths))),
        }  # fmt: skip

    return rollout


def _weights(completion_mask, tool_mask, truncated, **settings):
    """d loss / d (loss of a token) of one whole step: the step of the table, by the advantage of its row."""
    rewards = _weightless(len(completion_mask))
    start = np.full(completion_mask.shape, -1.0)
    trainer, table = _trainer(
        start, _rollout(completion_mask, tool_mask, truncated), lambda row, **_: [float(rewards[b]) for b in row],
        scale_rewards="none", **settings,
    )  # fmt: skip
    trainer.train()
    step = table.detach().numpy() - start  # learning rate 1: minus the gradient
    return step / (rewards - rewards.mean())[:, None]


def loss_mask(completion_mask, tool_mask, truncated):
    weights = _weights(
        completion_mask, tool_mask, truncated, loss_type="dapo", mask_truncated_completions=bool(truncated.any())
    )
    mask = np.abs(weights) > 1e-12
    return {"mask": mask, "tokens": round(1 / float(weights[mask].mean()))} if mask.any() else {"mask": mask}


def loss_weights(mask, micro_batch, level, length):
    sizes = np.bincount(micro_batch)
    if (sizes != sizes[0]).any() or not mask.any(1).all():
        raise NotImplementedError("micro-batches of one size, completions of at least one token")
    if level == "constant" and length != mask.shape[1]:
        raise NotImplementedError("the constant is max_completion_length")
    name = {"token": "dapo", "sequence": "grpo", "constant": "dr_grpo"}[level]
    everything = np.ones_like(mask)
    return {"weights": _weights(everything, mask, [False] * len(mask), loss_type=name, micro_batches=len(sizes))}


def _inputs(old, advantages, mask, **more):
    rows, tokens = mask.shape
    completion = torch.full((rows, tokens), TOKEN)
    return {
        "prompt_ids": FIRST_PROMPT + torch.arange(rows)[:, None], "prompt_mask": torch.ones(rows, 1, dtype=torch.int64),
        "completion_ids": completion, "completion_mask": torch.ones_like(completion),
        "tool_mask": torch.tensor(mask).long(), "old_per_token_logps": torch.tensor(old),
        "advantages": torch.tensor(advantages), "num_items_in_batch": torch.tensor(mask).sum(), **more,
    }  # fmt: skip


def _loss(logprobs, inputs, beta=0.0, **settings):
    rows = len(logprobs)
    if rows == 1:  # a trainer wants two completions of a prompt; the second row is never asked for
        logprobs = np.concatenate([logprobs, logprobs])
    trainer, table = _trainer(logprobs, None, lambda **_: [], **settings)
    trainer.beta, trainer.current_gradient_accumulation_steps = beta, 1
    trainer.model.train()
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    return {"loss": loss.detach(), "gradient": table.grad[:rows]}


def policy_loss(logprobs, old_logprobs, advantages, mask, clip_low, clip_high, dual_clip, ratio, level):
    return _loss(
        logprobs, _inputs(old_logprobs, advantages, mask), epsilon=clip_low, epsilon_high=clip_high,
        delta=dual_clip or None, importance_sampling_level=ratio,
        loss_type={"token": "dapo", "sequence": "grpo"}[level],
    )  # fmt: skip


def kl_loss(logprobs, ref_logprobs, mask, beta, form, level):
    if form != "k3":
        raise NotImplementedError("k3 only")
    inputs = _inputs(logprobs, np.zeros(len(mask)), mask, ref_per_token_logps=torch.tensor(ref_logprobs))
    return _loss(logprobs, inputs, beta=beta, loss_type={"token": "dapo", "sequence": "grpo"}[level], **PLAIN_KL)


def sequence_ratio(logprobs, old_logprobs, mask):
    rows = len(mask)
    ratios = []
    for b in range(rows):
        advantages = np.where(np.arange(rows) == b, float(rows), 0.0)
        ratios.append(
            -float(
                policy_loss(logprobs, old_logprobs, advantages, mask, 1 - 1e-9, 1e9, 0, "sequence", "sequence")["loss"]
            )
        )
    return {"ratio": ratios}


def _score(logprobs, mask, rewards=None, sampled=None, per_group=None, **settings):
    """What one generation leaves for the loss, before any update."""
    rows = len(logprobs)
    everything = np.ones(logprobs.shape, dtype=bool)
    rewards = np.zeros(rows) if rewards is None else rewards
    rollout = _rollout(everything, mask, [False] * rows)

    def with_logprobs(prompts, trainer):
        return {**rollout(prompts, trainer), "logprobs": None if sampled is None else sampled.tolist()}

    trainer, _ = _trainer(
        logprobs, with_logprobs, lambda row, **_: [float(rewards[b]) for b in row], per_group=per_group, **settings
    )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    if sampled is not None:
        trainer.use_vllm, trainer._last_loaded_step = True, -1
        trainer.vllm_generation = SimpleNamespace(sync_weights=lambda: None)
    with torch.no_grad():
        return trainer._generate_and_score_completions([{"prompt": "<other>"} for _ in range(rows)])


def group_advantages(rewards, groups, std, eps):
    sizes = np.bincount(groups)
    sizes = sizes[sizes > 0]
    if std == "population" or (sizes != sizes[0]).any() or sizes[0] == 1:
        raise NotImplementedError("groups of one size, standard deviation of a sample or none")
    order = np.argsort(groups, kind="stable")  # the completions of a prompt follow each other
    start = np.full((len(rewards), 1), -1.0)
    out = _score(
        start,
        start < 0,
        rewards[order],
        per_group=int(sizes[0]),
        scale_rewards={"sample": "group", "none": "none"}[std],
    )
    advantages = np.empty(len(rewards))
    advantages[order] = out["advantages"].reshape(-1)
    return {"advantages": advantages}


def importance_weights(trainer_logprobs, sampler_logprobs, mask, mode, cap):
    if len(mask) == 1:
        raise NotImplementedError("a trainer wants two completions of a prompt")
    out = _score(
        trainer_logprobs, mask, sampled=sampler_logprobs, vllm_importance_sampling_correction=True,
        vllm_importance_sampling_mode=mode.replace("-", "_"), **{CAP: cap},
    )  # fmt: skip
    return {"weights": out["importance_sampling_ratio"] * torch.tensor(mask)}


# newer versions weigh the KL term by the ratio unless told otherwise
PLAIN_KL = {"use_bias_correction_kl": False} if "use_bias_correction_kl" in GRPOConfig.__dataclass_fields__ else {}


class LogitsLM(TableLM):
    """The logits of a case at every position, whatever the input."""

    def __init__(self, logits):
        super().__init__(TableConfig(), np.full((1, 1), -1.0))
        self.lm_head.weight = torch.nn.Parameter(torch.eye(logits.shape[1]).double(), requires_grad=False)
        self.backbone.forward = lambda input_ids, **_: BaseModelOutput(last_hidden_state=self.logits(input_ids))
        rows = torch.tensor(logits)
        self.logits = lambda input_ids: torch.cat([rows, rows[:1]])[None].repeat(len(input_ids), 1, 1)

    def forward(self, input_ids, attention_mask=None, logits_to_keep=0, **_):
        return CausalLMOutput(logits=self.logits(input_ids)[:, -logits_to_keep:])


def kept_logprobs(logits, temperature, top_k, top_p):
    """What the trainer computes for completions of one token each, of those that the samplers of transformers leave."""
    trainer, _ = _trainer(
        np.full((2, 1), -1.0),
        None,
        lambda **_: [],
        model=LogitsLM(logits),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
    )
    ids = torch.arange(logits.shape[1])[:, None].expand(-1, len(logits))
    ids = torch.cat([torch.zeros_like(ids[:, :1]), ids], 1)
    with torch.no_grad():
        found, *_ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, torch.ones_like(ids), len(logits))
    warped = torch.tensor(logits) / temperature
    for warper in ([TopKLogitsWarper(top_k)] if top_k else []) + ([TopPLogitsWarper(top_p)] if top_p < 1 else []):
        warped = warper(None, warped)
    return {"kept": warped.isfinite(), "logprobs": found.T.masked_fill(~warped.isfinite(), float("-inf"))}


CAP = next(
    name for name in ("vllm_importance_sampling_clip_max", "vllm_importance_sampling_cap")
    if name in GRPOConfig.__dataclass_fields__
)  # fmt: skip
