"""Stages that train by gradient descent on given data: pre-training, extension, SFT, distillation, reward models."""

import math
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from bessemer.config.table import ConfigTable, Precision, Seed, SourceName, StageConfig, StageRef
from bessemer.config.units import Gammas, LearningRates, LossWeights, Points, Seconds, Steps, Tokens, Weight


class LoRAConfig(ConfigTable):
    """[stage.lora]: low-rank adapters are trained, and the model's own weights stay as they are."""

    rank: int = Field(16, ge=1)
    """Rank of an adapter's two matrices."""
    alpha: int = Field(32, ge=1)
    """The adapters' output is multiplied by alpha / rank."""
    targets: Literal["all-linear"] | list[str] = "all-linear"
    """Matrices that get adapters: all in the layers, or those with these names, such as ["q_proj", "v_proj"]."""

    @field_validator("targets")
    @classmethod
    def _some(cls, targets: str | list[str]) -> str | list[str]:
        if not targets:
            raise ValueError('name matrices, or write "all-linear"')
        return targets


class OptimizerConfig(StageConfig):
    """The keys of every stage that trains. The trainer gets the stage's table itself, so a value set in a recipe is the
    value that the optimizer uses.

    Each kind has its own `lr`; its `learning_rate` defines what the value means. A key that a kind does not have is a
    class constant there.
    """

    runtime_only = frozenset({"save_seconds", "profile_steps"})

    betas: ClassVar[tuple[float, float]] = (0.9, 0.95)  # decay rates of AdamW's moments (V3 4.2)
    eps: ClassVar[float] = 1e-8  # of AdamW (undocumented in V3)

    optimizer: Literal["adamw", "muon"] = "adamw"
    """Optimizer of the matrices inside the layers; AdamW updates the rest (V3: adamw for all; R1: undocumented)."""
    weight_decay: float = Field(0.1, ge=0)
    """Decoupled weight decay of matrices; norms and biases have none (V3: 0.1; R1: undocumented)."""
    clip: float = Field(1.0, gt=0, alias="clip_norm")
    """Maximum gradient norm (V3: 1.0)."""
    moments: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the optimizer's moments (V3: bfloat16)."""
    ema_decay: float = Field(0.0, ge=0, lt=1)
    """Decay of a moving average of the weights, which is also validated, and exported as model-ema/; 0: none (V3 keeps
    one in CPU memory; its decay is undocumented)."""
    precision: Precision = "auto"
    """Compute dtype. device: bfloat16 on a GPU that supports it, float32 on a CPU; auto: the same on a GPU, whichever
    measures faster on a CPU. Master weights and gradients are always float32."""
    fp8: Literal[
        "off", "paper", "power-of-two", "block-gradients", "per-tensor", "short-sums", "coarse", "coarsest", "unscaled",
        "outlier",
    ] = "off"  # fmt: skip
    """Matrices of attention, FFN and experts in FP8, with activations stored in FP8 (V3: paper). power-of-two: all
    scaling factors are powers of two; block-gradients, per-tensor: variants for comparison; short-sums: sums of 14 bits
    inside a block, as on an H800. coarse, coarsest, unscaled, outlier: controls with two mantissa bits, with none,
    without scaling factors, or with the factor of a tensor whose first channel is 1,000 times as large. On a CPU, FP8
    is emulated, and slower."""
    micro_rows: int = Field(4, ge=1)
    """Rows per forward pass; affects memory and speed only."""
    save_seconds: Seconds = 60.0
    """Minimum time between checkpoints; it grows to 20 times the time that writing one takes. 0: after every step."""
    profile_steps: list[int] = Field(default_factory=list)
    """Optimizer steps (from 1) whose torch.profiler traces are written to the stage's state/profile. On a GPU the
    phases of the layers are also ranges in NVIDIA's tools."""

    def learning_rate(self, tokens: int, step: int, total: int) -> float:
        """The rate of the step that begins at `tokens` consumed tokens of `total`, after `step` optimizer steps."""
        raise NotImplementedError


class FineTuningConfig(OptimizerConfig):
    """Stages that train a model further on samples with loss on the answers: float32 moments, no moving average."""

    moments: ClassVar = "float32"  # type: ignore[misc]  # constant, no key of the table
    ema_decay: ClassVar = 0.0  # type: ignore[misc]  # constant, no key of the table

    lora: LoRAConfig | None = None
    """Train only adapters: only they have gradients and moments, and GRPO's reference needs no second copy of the
    weights. The stage exports the merged model; of another family (pip install 'bessemer[lora]') also the adapter in
    peft's format. Of the DeepSeek V3 family routed experts stay frozen. Default: all weights are trained."""


class OnPolicyConfig(FineTuningConfig):
    """Stages that train a model on its own samples: schedules over optimizer steps, batches of a number of tokens."""

    micro_rows: ClassVar = 1  # type: ignore[misc]  # constant, no key of the table

    lr: LearningRates
    """Learning rate over optimizer steps."""
    micro_tokens: int = Field(4096, ge=16)
    """Padded tokens per forward pass; affects memory and speed only."""
    precision: Precision = "device"
    """Compute dtype of sampling and training. device: bfloat16 on a GPU that supports it, float32 on a CPU; auto: on a
    CPU, whichever measures faster. Master weights and gradients are always float32."""

    def learning_rate(self, tokens: int, step: int, total: int) -> float:
        return self.lr(step)


class PretrainConfig(OptimizerConfig):
    makes_model: ClassVar = True
    runtime_only = OptimizerConfig.runtime_only | {"micro_rows"}

    corpus: StageRef | None = None
    """Corpus stage to train on, if `from` names a model to train further; the optimizer then starts fresh, so lr should
    rise from 0 again. Default: `from` names the corpus, and the weights are random."""
    model: dict[str, Any] = Field(default_factory=dict)
    """Overrides of the recipe's [model] for this stage, such as a smaller student for distillation."""
    weights_seed: Seed | None = None
    """Seed for the random weights alone, so that two runs can still read the same rows. Default: the stage's seed."""
    tokens: Tokens = Field(8_000_000, ge=1)
    """Tokens to train on, padding included."""
    mixture: dict[str, Weight] = Field(default_factory=dict)
    """Part of the corpus = its share of the rows, a number or a function of consumed tokens: [["0", 0.5],
    ["2M", 0.5], ["2M", 0.2]] switches to a cool-down mix at 2M tokens. A corpus of one part needs none."""
    temperature: float | None = Field(None, ge=0, le=1)
    """Instead of a mixture: shares proportional to (tokens of the part)^temperature."""
    epoch_caps: dict[str, float] = Field(default_factory=dict)
    """Part = maximum number of times it is read."""
    lengths: Steps | None = None
    """Tokens per row over consumed tokens, such as [["0", 128], ["2M", 256]]; a step keeps its number of tokens, so
    shorter rows mean more rows. Default: the corpus' row_length throughout (as V3 in pre-training)."""
    lr: LearningRates
    """Learning rate over consumed tokens; a point written ["14.3T", 2.2e-5, "cosine"] is reached by half a cosine (V3:
    2.2e-4 to 10T, cosine to 2.2e-5)."""
    warmup_steps: int = Field(0, ge=0)
    """Optimizer steps in which the rate rises from 0 to that of `lr`, by the same amount in each, also while batches
    grow (V3: 2000). 0: only `lr` decides."""
    batch_rows: Points = Points(64)
    """Rows per optimizer step over consumed tokens (V3: 3072 -> 15360), in rows of the corpus' row_length."""
    micro_rows: int = Field(32, ge=1)
    """Rows per forward pass; affects memory and speed only (with fp8 also the last digits: tiles run along tokens)."""
    gamma: Gammas = Points(0.001)
    """Update speed of the routing bias (V3: 0.001, 0 for the last 500B of 14.8T)."""
    mtp_lambda: LossWeights = Points([["0", 0.3]])
    """Weight of the MTP loss (V3: 0.3, then 0.1 from 10T)."""
    balance_alpha: float = Field(1e-4, ge=0, le=100)
    """Weight of the sequence-wise balance loss (V3: 1e-4)."""
    validate_every: Tokens = 1_000_000
    """Tokens between measurements of the held-out bits per byte of every part, with `document_mask` if it is set; 0:
    only at the end."""
    sample_every: Tokens = 1_000_000
    """Tokens between continuations of `prompts`; 0: only that at `first_sample`."""
    first_sample: Tokens = 400_000
    """Consumed tokens at the first continuation."""
    prompts: list[str] = Field(default_factory=list)
    """Texts to continue, for reading."""
    document_mask: bool = False
    """Tokens attend to their own document only. V3 packs without a mask; if rows hold many short documents, small
    models learn to copy from a prompt far sooner with one."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile the layers. auto: on a GPU, or on a CPU if our own kernels are off and the training is long enough
    to gain from it. Never with fp8 or on several ranks."""

    def learning_rate(self, tokens: int, step: int, total: int) -> float:
        return self.lr(tokens) * (step / self.warmup_steps if step < self.warmup_steps else 1.0)


class SFTConfig(FineTuningConfig):
    makes_model: ClassVar = True
    runtime_only = OptimizerConfig.runtime_only | {"micro_rows"}

    data: list[SourceName] = Field(default_factory=list)
    """Conversations: .jsonl or .parquet files with `messages`, or `prompt` and `completion`, directories of them, or
    hf://owner/name."""
    samples: list[StageRef] = Field(default_factory=list)
    """Earlier stages whose conversations are added, such as one of kind reject."""
    epochs: int | None = Field(None, ge=1)
    """Passes over the rows (R1: 2 to 3). Default: 2, or up to 10 if the data gives fewer than 20 steps."""
    row_length: int = Field(512, ge=2)
    """Tokens per row; longer conversations are left out and counted (R1: 32,768)."""
    lr: float = Field(gt=0, le=1)
    """Learning rate at the start of a cosine over consumed tokens (R1: 5e-5)."""
    lr_final: float = Field(ge=0, le=1)
    """Learning rate at the end of the cosine (R1: 5e-6)."""
    batch_rows: int | None = Field(None, ge=1)
    """Packed rows per optimizer step. Default: 8, or fewer if the data gives fewer than 20 steps."""
    batch_examples: int = Field(0, ge=0)
    """Conversations per optimizer step, instead of batch_rows (R1: 128). Steps end at row boundaries, so each has a few
    more or fewer; their mean is exact. 0: batch_rows decides."""
    style: Literal["zero", "r1-zero", "r1"] | None = None
    """Chat template for training, exported with the model. Default: the model's own."""
    mtp_lambda: float = Field(0.1, ge=0, le=100)
    """Weight of the MTP loss, which keeps the module useful for speculative decoding (undocumented; V3 ends with
    0.1)."""
    balance_alpha: float = Field(1e-4, ge=0, le=100)
    """Weight of the sequence-wise balance loss (V3: 1e-4)."""
    prompts: list[str] = Field(default_factory=list)
    """Questions to answer after every epoch, for reading."""

    def learning_rate(self, tokens: int, step: int, total: int) -> float:
        share = (1 + math.cos(math.pi * min(1.0, tokens / total))) / 2
        return self.lr_final + (self.lr - self.lr_final) * share
