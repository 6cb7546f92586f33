"""The stage "rl": GRPO on problems with rewards (R1 2.2, 2.3.2, 2.3.4)."""

from typing import ClassVar, Literal

from pydantic import Field

from bessemer.config.table import AskingConfig, ConfigTable, OwnCode, StageRef, TaskName
from bessemer.config.training import OnPolicyConfig
from bessemer.config.units import LearningRates, Points

Exported = Literal["nothing", "correct", "all"]
"""Which samples of a run are exported as conversations."""
TaskOption = bool | int | float | str | list[bool | int | float | str]


class RolloutConfig(ConfigTable):
    """[rollout]: where samples are generated."""

    engine: Literal["local", "ray", "vllm"] = "local"
    """local: in the trainer's processes, alternating with the updates; ray: in separate rollout workers on Ray, with
    Bessemer's engine; vllm: the same with vLLM, whose samples differ by rounding and random numbers."""
    precision: Literal["trainer", "bfloat16"] = "trainer"
    """Weights used for sampling: the trainer's own, or a copy of them rounded to BF16, half as large and faster on
    processors with AMX. Evaluations use the copy, too. rl/sampler_gap measures the difference; routing_replay and
    correction remove its effect on the updates. vLLM always rounds."""
    workers: int = Field(1, ge=1)
    """Number of separate rollout workers. Each holds the whole model, on one core or on `gpus` GPUs. Workers in excess
    of a rollout's batches are idle."""
    gpus: int | None = Field(None, ge=0)
    """GPUs per worker. Default: 1 if Ray has any. vLLM spreads one copy of the model over several. A Ray cluster that
    the run starts gets the GPUs that the trainer does not use. One of your own does not know which these are, so start
    it with them alone (CUDA_VISIBLE_DEVICES=1,2,3 ray start --head, RAY_ADDRESS=auto)."""
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1)
    """vLLM: share of a GPU's memory for a worker's weights, cache and workspace together."""
    max_model_len: int | None = Field(None, ge=1)
    """vLLM: maximum tokens of prompt and answer. Default: the model's context. Less leaves room for more samples."""
    sleep: bool = False
    """vLLM: release the GPU's memory between batches (the weights wait in the node's memory) and share GPUs with the
    trainer, which needs memory too: lower gpu_memory_utilization. Without it, vLLM has GPUs of its own."""


class RLConfig(AskingConfig, OnPolicyConfig):
    makes_model: ClassVar = True
    runtime_only = OnPolicyConfig.runtime_only | {"micro_tokens", "rollout", "keep_every"}

    @property
    def keeps_mask(self) -> bool:
        """The tokens that truncation left are recorded, and trained on alone."""
        return self.keep_sampling_mask and self.top_p < 1

    @property
    def contrasts(self) -> bool:
        """Samples are compared by their rewards within their group alone, so equal ones teach nothing."""
        return self.samples > 1 and self.advantage == "group" and self.supervision == "outcome"

    tasks: list[TaskName]
    """Task families; problems come from their train splits in turn."""
    task_options: dict[str, dict[str, TaskOption]] = Field(default={})
    """Task name = its settings in this stage, for training and held-out evaluations: `share`, its turns in a round
    (1); `languages`; `phrasing` ("seen" or "held-out"); `difficulty`, the least and the greatest; and those of the
    task itself, such as {countdown = {numbers = 4, languages = ["en"]}}."""
    first_problem: int = Field(0, ge=0)
    """Index of the first problem. A stage that continues another one's model asks new problems if this is at least the
    number that the other may have asked: rollouts times prompts_per_rollout times max_resamples, with difficulty_filter
    times filter_pool, and its own first_problem more (R1: undocumented). This holds if both stages have the same
    `tasks` and shares, since the number counts turns over the stage's own list; otherwise compare task by task."""
    general_tasks: list[TaskName] = Field(default_factory=list)
    """Task families whose answers are scored by reward models, if `reward_models` has one for their aim."""
    general_prompts: int = Field(0, ge=0)
    """Problems per rollout that come from general_tasks."""
    general_from: int = Field(0, ge=0)
    """First rollout with general prompts (R1: the last 400 of 1,700 steps; longer invites reward hacking)."""
    reward_models: list[StageRef] = Field(default_factory=list)
    """Earlier stages of kind reward-model."""
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
    difficulty_filter: bool = False
    """Use only problems whose estimated pass rate lies strictly between 0 and 1. The moving estimate is the problem's
    own or, before its first group, that of its task, difficulty and language. General prompts are not filtered (R1: no
    filter)."""
    filter_explore: float = Field(0.1, ge=0, lt=1)
    """Share of problems that bypass the filter, to keep the estimates of rejected problems current."""
    filter_window: float = Field(2.0, gt=0)
    """Groups after which a group's weight in a problem's estimate has decayed to 1/e; 16 times as many in a family's
    estimate."""
    filter_pool: int = Field(4, ge=2)
    """Candidate problems per problem used; if too few pass the filter, rejected ones fill the rollout."""
    max_off_policy_rollouts: int = Field(0, ge=0, le=1)
    """How many rollouts sampling runs ahead of the updates (R1: 0). 1: samples come from a policy that is
    updates_per_rollout steps old."""
    rollout: RolloutConfig = RolloutConfig()
    """Where samples are generated."""
    routing_replay: bool = False
    """Train with the experts that the sampler chose for each token; gate values still come from current scores."""
    correction: Literal["none", "token-truncate", "token-mask", "sequence-truncate", "sequence-mask"] = "none"
    """Importance weights from the sampler to the policy before the updates, per token or per output: truncated at
    correction_cap, or masked above it. For off-policy samples, or samples generated in another number format."""
    correction_cap: float = Field(2.0, ge=1)
    """Maximum importance weight."""
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
    clip_low: float = Field(0.2, gt=0)
    """Lower clip of the ratio."""
    clip_high: float = Field(0.28, gt=0)
    """Upper clip of the ratio (R1: 10)."""
    kl: float = Field(0.001, ge=0, le=100)
    """Coefficient of the divergence from the reference, as k3 in the loss (R1: 0.001), or in the reward
    (`kl_in_reward`)."""
    kl_in_reward: bool = False
    """With advantage = "critic": subtract kl log(pi_old / pi_ref) from the reward of every token, as PPO does
    (DeepSeekMath 4.1.1), instead of adding a divergence to the loss."""
    unbiased_kl: bool = False
    """Multiply k3 by the ratio pi/pi_old: its gradient is then that of the divergence (DeepSeek-V3.2 3.1; R1: no)."""
    off_policy_mask: float = Field(0.0, ge=0)
    """Leave out outputs with a negative advantage whose mean of log(pi_sampler/pi) over their tokens exceeds this, as
    the policy has already moved away from them (DeepSeek-V3.2 3.1; R1: no). 0: none."""
    reference_every: int = Field(400, ge=1)
    """Optimizer steps between replacements of the reference by the current policy (R1: 400). With kl = 0 there is no
    reference."""
    surrogate: Literal["grpo", "gspo", "cispo", "reinforce"] = "grpo"
    """Contribution of a token. grpo: the paper's clipped ratio; gspo: one ratio per output (clips of 3e-4); cispo: a
    truncated weight that keeps every token's gradient; reinforce: no ratio, for one update per rollout; later ones
    take its samples for their own."""
    normalise: Literal["sequence", "token", "constant"] = "sequence"
    """sequence: mean over each output, then over outputs (the paper); token: mean over all tokens (DAPO);
    constant: sum over an output divided by max_new_tokens, whatever the output's length (Dr. GRPO)."""
    scale_by_std: bool = True
    """Divide advantages by the standard deviation of the group (the paper), or of the rollout with another baseline."""
    advantage: Literal["group", "batch", "critic"] = "group"
    """Baseline of a sample. group: the mean of its prompt's samples (the paper); batch: the mean of all samples of the
    rollout, whatever their prompts (for comparison); critic: a second network that predicts the reward before every
    token (PPO, for comparison; costs that network's memory and time)."""
    supervision: Literal["outcome", "process"] = "outcome"
    """What is rewarded with advantage = "group". outcome: the whole output (R1); process: every calculation in it, 1 if
    it is right and 0 if not, and the whole output at its end (DeepSeekMath 4.1.3, with a rule in place of its process
    reward model)."""
    gae_lambda: float = Field(1.0, ge=0, le=1)
    """Lambda of the critic's advantages (R1-Nature A.3: 1 nearly equals GRPO, 0.95 is much worse)."""
    critic_lr: LearningRates = Points(1e-3)
    """Learning rate of the critic over optimizer steps (undocumented)."""
    format_reward: float = Field(0.1, ge=0)
    """Weight of the format reward relative to accuracy (R1: 1; in small models a large weight teaches only the
    form)."""
    accuracy_needs_format: bool = False
    """Whether a right answer earns accuracy only in the right form: R1-Zero's two blocks and nothing around them or,
    where the template opens the thoughts, R1's thoughts and a short summary. By default accuracy and format are
    separate terms (R1 2.2.2); with format_reward = 0 nothing would then ask for thoughts."""
    language_reward: float = Field(0.0, ge=0)
    """Weight of language consistency, the share of the thoughts' words in the problem's language (R1-Zero: none;
    R1's first RL stage: 1)."""
    language_scope: Literal["thoughts", "reply"] = "thoughts"
    """What language consistency reads. thoughts: the thoughts (R1 2.3.2); reply: the summary too, and the less
    consistent of the two counts (for small models, whose thoughts are mostly numbers, so a summary in another language
    would cost nothing)."""
    preference_reward: float = Field(1.0, ge=0)
    """Weight of a reward model's score on general prompts (R1: 1)."""
    export_samples: Exported = "nothing"
    """Samples to export as conversations for an SFT stage, except those that reach the length cap: a control trained on
    the same tokens."""
    overlong: int = Field(0, ge=0)
    """Tokens before the length cap over which a penalty grows to 1 (DAPO: 4,096; R1: none)."""
    reward: Literal["task", "format", "random"] | OwnCode = "task"
    """What is rewarded: the task's verdict; FILE.py:FUNCTION, a function of your own in place of the accuracy, which
    runs with your permissions; or, as controls, only the form, or a random value."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay of matrices; norms and biases have none (undocumented)."""
    mtp: Literal["frozen", "trained", "dropped"] = "frozen"
    """The MTP modules, which draft in speculative decoding. frozen: they stay as they are while the policy moves away;
    trained: on the samples, apart from the policy, which they touch only through the norm that is clipped; dropped: the
    model has none from here on. rl/mtp_1 is the first one's loss (undocumented)."""
    eval_tasks: list[TaskName] = Field(default=[])
    """Task families of the held-out evaluations, such as a file of evaluation problems (R1-Zero: AIME 2024). Default:
    those of tasks and general_tasks that hold problems out."""
    eval_every: int = Field(10, ge=1)
    """Rollouts between held-out evaluations."""
    eval_problems: int = Field(64, ge=1)
    """Held-out problems per task and evaluation, 4 samples each. rl/heldout_accuracy and rl/heldout_reward count them
    as training does; rl/heldout_pass_at_1 counts a right answer in any form, as the stage eval does."""
    eval_temperature: float | None = Field(None, gt=0)
    """Sampling temperature of the held-out evaluations (R1: 0.6). Default: `temperature`, so that they measure what is
    trained."""
    minimum_pass: float = Field(0.02, ge=0, le=1)
    """Minimum held-out accuracy of the base model, as training counts it. Below it the stage refuses to start: RL
    cannot amplify what is not there. With partial credit or a reward of your own, it is enough that the answers to this
    share of the problems earn different rewards. 0: start anyway."""
