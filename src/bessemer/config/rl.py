"""The stage "rl": GRPO on problems with rewards (R1 2.2, 2.3.2, 2.3.4)."""

from functools import partial
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from bessemer.config.table import AskingConfig, ConfigTable, PluginTable, RolloutConfig, StageRef, TaskName
from bessemer.config.training import OnPolicyConfig
from bessemer.config.units import LearningRates, Points

TaskOption = bool | int | float | str | list[bool | int | float | str]


class AdvantageTable(PluginTable):
    """[advantage]: how a sample compares with others. Its other keys are settings of the advantage."""

    plugins: ClassVar = "advantages"

    name: str = "group"
    """group: with the mean of its prompt's samples (the paper); batch: with the mean of all samples of the rollout,
    whatever their prompts (for comparison); critic: with a second network that predicts the reward before every token
    (PPO, for comparison; costs that network's memory and time); or an advantage of your own (docs/plugins.md)."""


class LossTable(PluginTable):
    """[loss]: the contribution of a token. Its other keys are settings of the loss, such as clip_high."""

    plugins: ClassVar = "losses"

    name: str = "grpo"
    """grpo: the paper's clipped ratio; gspo: one ratio per output (clips of 3e-4); cispo: a truncated weight that keeps
    every token's gradient; reinforce: no ratio, for one update per rollout; later ones take its samples for their own;
    off-policy-mask: grpo without the bad outputs that the policy has left (`limit`, DeepSeek-V3.2 3.1); or a loss of
    your own (docs/plugins.md)."""


class RewardTable(PluginTable):
    """A term of the reward. Its other keys are settings of the term."""

    plugins: ClassVar = "rewards"

    name: str
    """accuracy: the verdict's score, or on general prompts that of a reward model; format: 1 in the right form;
    language: the share of the thoughts' words in the problem's language; rubric: a model rates the answers to general
    prompts (docs/tasks.md); or a reward of your own (docs/plugins.md)."""
    weight: float = 1.0
    """What its values are multiplied by."""


class HookTable(PluginTable):
    """A component of the loop. Its other keys are settings of the component."""

    plugins: ClassVar = "hooks"

    name: str
    """correction: importance weights from the sampler to the policy, for off-policy samples, or samples generated in
    another number format (`form`, `cap`); routing-replay: train with the experts that the sampler chose for each token;
    sample-ahead: sample each rollout up to `max_off_policy_rollouts` (1 to 8) rollouts before its updates, so that
    separate workers are never idle (R1: no), with `segment` in parts of so many tokens, each by the newest weights;
    export-samples: write samples as conversations for an SFT stage (`which`); or a component of your own
    (docs/plugins.md)."""


class KLTable(ConfigTable):
    """[kl]: the divergence from the reference, a frozen copy of the policy."""

    weight: float = Field(0.001, ge=0, le=100)
    """Coefficient of the divergence, as k3 in the loss (R1: 0.001). 0: there is no reference."""
    reference_every: int = Field(400, ge=1)
    """Optimizer steps between replacements of the reference by the current policy (R1: 400)."""
    unbiased: bool = False
    """Multiply k3 by the ratio pi/pi_old: its gradient is then that of the divergence (DeepSeek-V3.2 3.1; R1: no)."""


class GeneralTable(ConfigTable):
    """[general]: prompts whose answers are scored by reward models."""

    tasks: list[TaskName] = Field(min_length=1)
    """Task families."""
    prompts: int = Field(ge=1)
    """Problems per rollout that come from them."""
    start: int = Field(0, ge=0)
    """First rollout with such prompts (R1: the last 400 of 1,700 steps; longer invites reward hacking)."""
    reward_models: list[StageRef] = Field(default_factory=list)
    """Earlier stages of kind reward-model, which score the answers to the prompts of their aim."""


class HeldoutTable(ConfigTable):
    """[heldout]: evaluations on held-out problems during the stage."""

    tasks: list[TaskName] = Field(default=[])
    """Task families, such as a file of evaluation problems (R1-Zero: AIME 2024). Default: those of the stage that hold
    problems out."""
    every: int = Field(10, ge=1)
    """Rollouts between evaluations."""
    problems: int = Field(64, ge=1)
    """Problems per task and evaluation, 4 samples each. rl/heldout_accuracy and rl/heldout_reward count them as
    training does; rl/heldout_pass_at_1 counts a right answer in any form, as the stage eval does."""
    temperature: float | None = Field(None, gt=0)
    """Sampling temperature (R1: 0.6). Default: that of the stage, so that they measure what is trained."""
    minimum_pass: float = Field(0.02, ge=0, le=1)
    """Minimum accuracy of the base model, as training counts it. Below it the stage refuses to start: RL cannot amplify
    what is not there. With partial credit or a reward of your own, it is enough that the answers to this share of the
    problems earn different rewards. 0: start anyway."""


def _table_of(key: str, kind: Any) -> BeforeValidator:
    """kl = 0.001 is short for kl = { weight = 0.001 }."""
    wrap = partial(_wrapped, key)
    return BeforeValidator(wrap, json_schema_input_type=kind)


def _wrapped(key: str, value: object) -> object:
    return {key: value} if isinstance(value, str | int | float) else value


def _listed(value: object) -> object:
    return value if isinstance(value, list) else [value]


class RLConfig(AskingConfig, OnPolicyConfig):
    makes_model: ClassVar = True
    runtime_only = OnPolicyConfig.runtime_only | {"micro_tokens", "rollout", "keep_every"}

    @property
    def keeps_mask(self) -> bool:
        """The tokens that truncation left are recorded, and trained on alone."""
        return self.keep_sampling_mask and self.top_p < 1

    @property
    def general_tasks(self) -> list[str]:
        return self.general.tasks if self.general else []

    @property
    def reward_models(self) -> list[str]:
        return self.general.reward_models if self.general else []

    tasks: list[TaskName]
    """Task families; problems come from their train splits in turn."""
    task_options: dict[str, dict[str, TaskOption]] = Field(default={})
    """Task name = its settings in this stage, for training and held-out evaluations: `share`, its turns in a round
    (1); `languages`; `phrasing` ("seen" or "held-out"); and those of the task itself, such as
    {countdown = {share = 3, languages = ["en"]}}."""
    first_problem: int = Field(0, ge=0)
    """Index of the first problem. A stage that continues another one's model asks new problems if this is at least the
    number that the other may have asked: rollouts times prompts_per_rollout times max_resamples, and its own
    first_problem more (R1: undocumented). This holds if both stages have the same
    `tasks` and shares, since the number counts turns over the stage's own list; otherwise compare task by task."""
    general: GeneralTable | None = None
    """Prompts whose answers are scored by reward models (R1's second RL stage). Default: none."""
    rollouts: int = Field(60, ge=1)
    """Number of rollouts; each is followed by updates_per_rollout optimizer steps."""
    keep_every: int = Field(0, ge=0)
    """Rollouts between checkpoints that are kept permanently, so that `bessemer replay` can start near any step. 0:
    only the newest two are kept, after the stage's end one if they exceed 256 MiB, and older steps are replayed from
    the stage's start."""
    prompts_per_rollout: int = Field(16, ge=1)
    """Problems per rollout (R1: 512)."""
    samples: int = Field(16, ge=1)
    """Completions per problem, the group size G (R1: 16). With an advantage other than "group", 1 is enough."""
    updates_per_rollout: int = Field(1, ge=1)
    """Optimizer steps per rollout, each sample used once (R1: 16)."""
    max_resamples: int = Field(1, ge=1)
    """Maximum sampling rounds per rollout, each with new problems of `tasks`, until enough groups have differing
    rewards (DAPO's dynamic sampling); 1: train on every group, even one whose rewards are all equal (the paper)."""
    rollout: RolloutConfig = RolloutConfig()
    """Where samples are generated."""
    max_new_tokens: Points = Points(160)
    """Length cap of a completion over optimizer steps (R1-Zero: 32,768, 65,536 from step 8.2k); of an episode, what the
    model writes in all turns together."""
    temperature: float = Field(1.0, gt=0, le=100)
    """Sampling temperature (R1-Zero: 1)."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Sample from the most likely tokens that together hold this mass, so that no very unlikely token becomes a target
    (DeepSeek-V3.2 3.1; R1-Zero: 1). The stage's held-out evaluations use it, too."""
    keep_sampling_mask: bool = True
    """With top_p below 1: policy, reference and corrections renormalise their probabilities over the tokens that the
    sampler's truncation left (DeepSeek-V3.2 3.1, Keep Sampling Mask); rl/kept_tokens is the mean number of these.
    false: log-probabilities are over the whole vocabulary, as in most trainers, although samples come from the
    truncated distribution, which biases the gradient; for comparison."""
    lr: LearningRates = Points(3e-4)
    """Learning rate over optimizer steps (R1-Zero: 3e-6)."""
    loss: LossTable = LossTable()
    """Contribution of a token to the objective: a name, or a table of the name and its settings."""
    kl: Annotated[KLTable, _table_of("weight", KLTable | float)] = KLTable()
    """Divergence from the reference: its coefficient, or a table."""
    normalise: Literal["sequence", "token", "constant"] = "sequence"
    """sequence: mean over each output, then over outputs (the paper); token: mean over all tokens (DAPO);
    constant: sum over an output divided by max_new_tokens, whatever the output's length (Dr. GRPO)."""
    advantage: AdvantageTable = AdvantageTable()
    """Baseline of a sample: a name, or a table of the name and its settings."""
    reward: Annotated[
        list[RewardTable], BeforeValidator(_listed, json_schema_input_type=RewardTable | list[RewardTable])
    ] = Field([RewardTable(name="accuracy"), RewardTable(name="format", weight=0.1)], min_length=1)
    """The terms whose weighted sum is rewarded: names, or tables of a name, its weight and its settings. R1 weighs
    accuracy and format equally; in small models a large weight of the format teaches only the form."""
    accuracy_needs_format: bool = False
    """Whether a right answer earns accuracy only in the right form: R1-Zero's two blocks and nothing around them or,
    where the template opens the thoughts, R1's thoughts and a short summary. By default accuracy and format are
    separate terms (R1 2.2.2); without a reward of the format nothing would then ask for thoughts."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay of matrices; norms and biases have none (undocumented)."""
    mtp: Literal["frozen", "trained", "dropped"] = "frozen"
    """The MTP modules, which draft in speculative decoding. frozen: they stay as they are while the policy moves away;
    trained: on the samples, apart from the policy, which they touch only through the norm that is clipped; dropped: the
    model has none from here on. rl/mtp_1 is the first one's loss (undocumented)."""
    heldout: HeldoutTable = HeldoutTable()
    """Evaluations on held-out problems during the stage."""
    hooks: list[HookTable] = Field(default=[])
    """Further components of the loop."""
