"""The stage "rl": GRPO on problems with rewards (R1 2.2, 2.3.2, 2.3.4)."""

from typing import ClassVar, Literal

from pydantic import Field

from bessemer.config.table import ConfigTable, StageRef
from bessemer.config.training import OnPolicyConfig
from bessemer.config.units import Points

Exported = Literal["nothing", "correct", "all"]
"""Which samples of a run are exported as conversations."""


class RolloutConfig(ConfigTable):
    """[rollout]: where samples are generated."""

    renamed_values: ClassVar = {"engine": {"here": "local"}}

    engine: Literal["local", "ray", "vllm"] = "local"
    """local: the trainer's processes, taking turns with the updates; ray: separate rollout workers with our Engine, on
    Ray; vllm: the same with vLLM, whose samples differ by rounding and random numbers."""
    workers: int = Field(1, ge=1)
    """Separate rollout workers, each with the whole model: a core each, or `gpus` GPUs."""
    gpus: int | None = Field(None, ge=0)
    """GPUs of each worker. Default: 1 where Ray has any; vLLM spreads one copy of the model over several. Ray takes the
    trainer's GPU for free: start it with the others (CUDA_VISIBLE_DEVICES=1,2,3 ray start --head, RAY_ADDRESS=auto)."""
    rows: int = Field(0, ge=0)
    """Samples that are decoded together. 0: a quarter of the rollout, 128 to 512. More workers than a rollout has
    such batches have nothing to do."""


class RLConfig(OnPolicyConfig):
    renamed: ClassVar = {"ahead": "max_off_policy_rollouts", "draws": "max_resamples", "leaves": "export_samples"}
    runtime_only = frozenset({"save_seconds", "micro_tokens", "rollout"})
    ignore_at_default = frozenset({"difficulty_filter", "filter_explore", "filter_window", "filter_pool"})

    tasks: list[str]
    """Task families; problems are taken from them in turn, from their train split."""
    general_tasks: list[str] = Field(default_factory=list)
    """Task families whose prompts are judged by reward models where `reward_models` has one for their aim."""
    general_prompts: int = Field(0, ge=0)
    """How many of a rollout's problems are taken from general_tasks."""
    general_from: int = Field(0, ge=0)
    """First rollout with general prompts (R1: the last 400 of 1,700 steps; longer invites reward hacking)."""
    reward_models: list[StageRef] = Field(default_factory=list)
    """Earlier stages of kind reward-model."""
    rollouts: int = Field(60, ge=1)
    """How many rollouts; optimizer steps are this times updates_per_rollout."""
    prompts_per_rollout: int = Field(16, ge=1)
    """Problems per rollout (R1: 512)."""
    samples: int = Field(16, ge=2)
    """Completions per problem G (R1: 16)."""
    updates_per_rollout: int = Field(1, ge=1)
    """Optimizer steps per rollout, each sample used once (R1: 16)."""
    max_resamples: int = Field(1, ge=1)
    """Maximum sampling rounds per rollout, each with new problems, until enough groups differ in their rewards (DAPO's
    dynamic sampling); 1: every group is trained on, whether its rewards differ or not (the paper)."""
    difficulty_filter: bool = False
    """Ask only problems whose pass rate lies strictly between 0 and 1 by a moving estimate: its own or, before it
    was asked, that of its task, difficulty and language. General prompts are all asked (R1: every prompt is)."""
    filter_explore: float = Field(0.1, ge=0, lt=1)
    """Share of the draws that ask what the filter leaves out, so that its estimates stay alive."""
    filter_window: float = Field(2.0, gt=0)
    """Groups of samples that a problem's estimate goes back over (fading by 1/e); a family's goes back 16 times as
    far."""
    filter_pool: int = Field(4, ge=2)
    """Candidates that the filter looks at for each problem asked; where too few pass it, others fill up."""
    max_off_policy_rollouts: int = Field(0, ge=0, le=1)
    """How many rollouts before its own updates a rollout is generated (R1: 0). 1: the policy that generates it is
    updates_per_rollout steps old."""
    rollout: RolloutConfig = RolloutConfig()
    """Where samples are generated."""
    routing_replay: bool = False
    """Train with the experts that the sampler chose for each token; gates are still made from current scores."""
    correction: Literal["none", "token-truncate", "token-mask", "sequence-truncate", "sequence-mask"] = "none"
    """Importance weights from the sampler to the policy before the updates, per token or per output, cut at
    correction_cap or left out above it; for samples that are older or were drawn in another number format."""
    correction_cap: float = Field(2.0, ge=1)
    """Largest importance weight."""
    max_new_tokens: Points = Points(160)
    """Length cap of a completion over optimizer steps (R1-Zero: 32,768, 65,536 from step 8.2k)."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature (R1-Zero: 1)."""
    lr: Points = Points(3e-4)
    """Learning rate over optimizer steps (R1-Zero: 3e-6)."""
    clip_low: float = Field(0.2, gt=0)
    """Lower clip of the ratio."""
    clip_high: float = Field(0.28, gt=0)
    """Upper clip of the ratio (R1: 10)."""
    kl: float = Field(0.001, ge=0)
    """Coefficient of the k3 divergence from the reference (R1: 0.001)."""
    reference_every: int = Field(400, ge=1)
    """Optimizer steps after which the reference becomes the current policy (R1: 400)."""
    surrogate: Literal["grpo", "gspo", "cispo", "reinforce"] = "grpo"
    """What a token contributes: the paper's clipped ratio; one ratio per output (GSPO, clips of 3e-4); a cut weight
    that spares every gradient (CISPO); no ratio at all."""
    normalise: Literal["sequence", "token", "constant"] = "sequence"
    """sequence: mean over each output, then over outputs (the paper); token: mean over all tokens (DAPO);
    constant: sum over an output divided by max_new_tokens, whatever its length (Dr. GRPO)."""
    scale_by_std: bool = True
    """Divide advantages by the standard deviation of the group (the paper), or of the rollout with a critic."""
    advantage: Literal["group", "critic"] = "group"
    """What a sample is measured against: the others of its prompt (the paper), or a second network that says before
    every token what reward to expect (PPO, for comparison; costs that network's memory and time)."""
    gae_lambda: float = Field(1.0, ge=0, le=1)
    """Lambda of the critic's advantages (R1-Nature A.3: 1 is nearly GRPO's equal, 0.95 much worse)."""
    critic_lr: Points = Points(1e-3)
    """Learning rate of the critic over optimizer steps (undocumented)."""
    format_reward: float = Field(0.1, ge=0)
    """Weight of the format reward beside accuracy (R1: 1; at this size a large one teaches form alone)."""
    language_reward: float = Field(0.0, ge=0)
    """Weight of language consistency, the share of the thoughts' words in the problem's language (R1-Zero: none;
    R1's first RL stage: 1)."""
    preference_reward: float = Field(1.0, ge=0)
    """Weight of a reward model's score on general prompts (R1: 1)."""
    export_samples: Exported = "nothing"
    """Samples exported as conversations for an SFT stage, never those that hit the length cap: a control on the same
    tokens."""
    overlong: int = Field(0, ge=0)
    """Tokens before the cap over which an answer is punished more and more, up to 1 (DAPO: 4,096; R1: none)."""
    reward: Literal["task", "format", "random"] = "task"
    """What is rewarded: the task's verdict, or for controls the form alone or a coin."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled decay of matrices, none of norms and biases (undocumented)."""
    eval_every: int = Field(10, ge=1)
    """Held-out evaluation every so many rollouts."""
    eval_problems: int = Field(64, ge=1)
    """Held-out problems of that evaluation, 4 samples each."""
    minimum_pass: float = Field(0.02, ge=0, le=1)
    """Refuse to start when the base solves fewer: RL cannot amplify what is not there."""
