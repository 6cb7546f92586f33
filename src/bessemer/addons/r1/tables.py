"""Tables of R1's own stages: examples, rejection sampling, reward models, distillation, longer contexts."""

import math
from typing import Any, ClassVar, Literal

from pydantic import Field

from bessemer.addons.r1.judge_config import JudgeConfig
from bessemer.config.table import RolloutConfig, SamplingConfig, SourceName, StageConfig, StageRef, TaskName
from bessemer.config.training import FineTuningConfig, OnPolicyConfig, OptimizerConfig, PretrainConfig
from bessemer.config.units import Gammas, LearningRates, LossWeights, Points, Tokens


class ExamplesConfig(StageConfig):
    starts_from: ClassVar = False

    tasks: list[TaskName]
    """Task families with pre-training documents; examples come from each in turn."""
    examples: int = Field(200, ge=1)
    """Number of conversations (R1: thousands)."""


class RejectConfig(SamplingConfig):
    tasks: list[TaskName]
    """Task families; problems come from their train splits in turn."""
    problems: int = Field(1000, ge=1)
    """Number of training problems to answer."""
    first_problem: int = Field(0, ge=0)
    """Index of the first problem, to avoid problems that RL has seen: rollouts times prompts_per_rollout times
    max_resamples of that stage, times the pool of a hook that filters, and its own first_problem more. This holds if
    both stages have the same `tasks`, since the number counts turns over the stage's own list."""
    samples: int = Field(4, ge=1)
    """Answers per problem."""
    judge: JudgeConfig | None = None
    """A model that judges answers to problems with a reference answer and no rule, such as general prompts (R1 2.3.3).
    Without it, such answers are dropped."""
    answers: Literal["right", "wrong", "all"] = "right"
    """Which answers to keep. right: right ones in the required form; wrong, all: controls, readable ones that are
    wrong, or every readable one."""
    keep: int = Field(1, ge=1)
    """Maximum number of answers kept per problem."""
    temperature: float = Field(1.0, gt=0, le=100)
    """Sampling temperature (cold start: 1)."""
    max_new_tokens: Tokens = Field(200, ge=1)
    """Length cap of an answer; answers that reach it are dropped."""
    consistency: float = Field(1.0, ge=0, le=1)
    """Minimum share in the problem's language, of the thoughts' words and of the summary's."""
    repeated: float = Field(0.25, ge=0, le=1)
    """Maximum share of repeated thought lines, and of repeated runs of ten words."""
    paragraph: int = Field(200, ge=1)
    """Maximum words (Chinese: characters) of the thoughts between two line breaks."""
    others: int = Field(0, ge=0)
    """Number of non-reasoning conversations to add (R1: 200K, next to 600K)."""
    others_data: list[SourceName] = Field(default=[])
    """Conversations to add, the first `others` of them: .jsonl or .parquet files with `messages`, directories of them,
    or hf://owner/name. Default: written answers of `general`."""
    form: Literal["as-is", "r1"] = "as-is"
    """as-is: the unchanged answer; r1: thoughts on lines of their own, then a sentence with the answer."""


class RewardModelConfig(FineTuningConfig):
    runtime_only = OptimizerConfig.runtime_only | {"micro_rows"}
    optimizer: ClassVar = "adamw"  # type: ignore[misc]  # constant, no key of the table

    previous: StageRef | None = None
    """Earlier reward-model stage to continue from: its weights, and some of its judged answers. New answers are sampled
    from the model of `from`, the policy that was trained with it (DeepSeekMath 4.1.4, iterative GRPO)."""
    aim: Literal["helpful", "harmless"]
    """helpful: pairwise, reads the prompt and the summary; harmless: pointwise, also reads the thoughts."""
    data: list[SourceName] = Field(default_factory=list)
    """Files (.jsonl, .parquet, or hf://owner/name) of {"prompt", "chosen", "rejected"} for helpful, {"prompt",
    "response", "safe"} for harmless, or TRL's forms of these."""
    made: int = Field(2000, ge=0)
    """Prompts of the task `general` to generate judged answers for (R1: 66,000 pairs, 106,000 labelled answers)."""
    tasks: list[TaskName] = Field(["general"])
    """Task families of these prompts, in turn; any other than general needs a `judge` and samples."""
    samples: int = Field(0, ge=0)
    """Answers per generated prompt sampled from the starting model, judged like the written ones."""
    judge: JudgeConfig | None = None
    """A model that compares answers for aim = "helpful" (R1: V3; pairs whose mean scores differ by more than 1 are
    kept, chosen and rejected ones of equal total length). Default: the rule-based judge of `general`, with noise."""
    max_new_tokens: Tokens = Field(100, ge=1)
    """Length cap of a sampled answer."""
    heldout: float = Field(0.1, gt=0, lt=0.5)
    """Share of prompts held out, chosen by hash, to measure the accuracy and the scale of rewards."""
    heldout_data: list[SourceName] = Field(default=[])
    """Files of judged answers to measure on, in the format of `data`; all of `data` is then used for training."""
    epochs: int = Field(1, ge=1)
    """Passes over the rows (R1: 1)."""
    row_length: int = Field(256, ge=8)
    """Tokens per row, which holds several pairs; longer ones are left out and counted (R1: 8,192 in training, no
    limit in use)."""
    lr: float = Field(gt=0, le=1)
    """Learning rate at the start of a cosine over consumed tokens, which ends at a tenth of it (R1: 6e-6, schedule
    undocumented)."""
    batch_rows: int = Field(8, ge=1)
    """Packed rows per optimizer step."""
    batch_examples: int = Field(0, ge=0)
    """Pairs or labelled answers per optimizer step, instead of batch_rows (R1: 256). Steps end at row boundaries, so
    each has a few more or fewer; their mean is exact. 0: batch_rows decides."""
    style: Literal["zero", "r1-zero", "r1"] | None = None
    """Chat template for reading answers. Default: the model's own."""
    balance_alpha: float = Field(1e-4, ge=0, le=100)
    """Weight of the sequence-wise balance loss (V3: 1e-4)."""

    @property
    def judges(self) -> str:
        return self.aim

    def learning_rate(self, tokens: int, step: int, total: int) -> float:
        return self.lr * (0.1 + 0.9 * (1 + math.cos(math.pi * min(1.0, tokens / total))) / 2)


class DistillConfig(OnPolicyConfig):
    makes_model: ClassVar = True
    runtime_only = OptimizerConfig.runtime_only | {"micro_tokens", "rollout"}
    optimizer: ClassVar = "adamw"  # type: ignore[misc]  # constant, no key of the table
    weight_decay: ClassVar = 0.0  # type: ignore[misc]  # constant, no key of the table

    teacher: StageRef | None = None
    """The earlier stage whose model teaches; the student is the model of `from`."""
    teachers: dict[str, StageRef] = Field(default={})
    """Specialists: {task = stage}, which teach these tasks in place of `teacher` (DeepSeek-V3.2 merges RL specialists
    into one model by SFT on their answers; here the student learns their distributions on its own samples)."""
    tasks: list[TaskName]
    """Task families; problems come from their train splits in turn."""
    steps: int = Field(100, ge=1)
    """Optimizer steps, each on new samples of the student."""
    prompts_per_step: int = Field(64, ge=1)
    """Problems per step."""
    samples: int = Field(1, ge=1)
    """Answers per problem."""
    max_new_tokens: Tokens = Field(200, ge=1)
    """Length cap of an answer."""
    temperature: float = Field(1.0, gt=0, le=100)
    """Temperature of sampling and of both distributions."""
    lr: LearningRates = Points(1e-3)
    """Learning rate over optimizer steps."""
    eval_every: int = Field(25, ge=1)
    """Steps between held-out evaluations."""
    eval_problems: int = Field(64, ge=1)
    """Held-out problems per task and evaluation, 4 answers each."""
    rollout: RolloutConfig = RolloutConfig()
    """Where the student's answers are sampled."""

    # what samplers read of an RL stage
    top_p: ClassVar = 1.0
    general_tasks: ClassVar = ()
    hooks: ClassVar = ()

    @property
    def prompts_per_rollout(self) -> int:
        return self.prompts_per_step


class ExtendConfig(PretrainConfig):
    corpus: StageRef
    """Corpus stage whose documents are packed into rows of `length` tokens: the model's own, or another one with the
    same tokenizer."""
    length: int = Field(ge=16)
    """Tokens per row, and the model's maximum length from then on (V3: 32,768, then 131,072)."""
    rope_factor: float = Field(40.0, gt=1)
    """YaRN's scale s, the same in every phase: the reachable length over the original length (V3: 40)."""
    tokens: Tokens = Field(1_000_000, ge=1)
    """Tokens to train on, padding included (V3: 62.9B in each phase)."""
    gamma: Gammas = Points(0.0)
    """Update speed of the routing bias (V3: 0 from 14.3T on)."""
    mtp_lambda: LossWeights = Points(0.1)
    """Weight of the MTP loss (V3: 0.1 from 10T on)."""
    model: dict[str, Any] = Field(default_factory=dict, max_length=0)
    """Not available for this kind: the model is that of the stage it starts from."""

    @property
    def context(self) -> int:
        return self.length


class LongEvalConfig(StageConfig):
    models: list[StageRef]
    """Stages whose models are compared: the one before the extension first, the longest last."""
    switched: list[StageRef] = Field(default_factory=list)
    """Those of `models` to evaluate also with the last model's position encoding, without training: the effect of YaRN
    alone."""
    haystack: SourceName = ""
    """Source of the text that hides the needles, held out in the same way as the documents of `corpus`. Empty: no
    needles."""
    corpus: StageRef
    """Corpus whose held-out rows give the loss by position; its rows are as long as the longest length."""
    parts: list[str] = Field(default_factory=list)
    """Parts of `corpus` for the loss by position."""
    lengths: list[int] = Field(default=[256, 1024, 4096])
    """Tokens per prompt, answer included."""
    depths: list[float] = Field(default=[0.0, 0.25, 0.5, 0.75, 1.0])
    """Depths of the needle: the share of the text before it."""
    problems: int = Field(40, ge=1)
    """Problems per length and depth."""
    needles: int = Field(8, ge=1)
    """Needles per text: one is asked for, the others are distractors."""
    rows: int = Field(32, ge=1)
    """Held-out rows per part for the loss by position; of short rows, four times as many."""
    short: StageRef | None = None
    """Corpus of short rows, to measure what the extension costs on them. Default: not measured."""
    short_parts: list[str] = Field(default_factory=list)
    """Parts of `short` to measure. Default: all. Rows are read without a document mask, so parts with many short
    documents say little if the model was trained with a mask."""
    short_bound: float = Field(0.1, gt=0)
    """Acceptable increase over the first model in bits per byte, as a mean over those parts; a larger one is
    reported."""
