"""The paper's recipe item by item: the published value, the value of this run, and where it is built and tested.

`rows(recipe)` is the table of conformance.json and of the report; `markdown()` is docs/conformance.md, and a
test fails when that file differs or an entry points nowhere. Items that are off are listed as well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bessemer.config.recipe import LayoutConfig, Recipe
from bessemer.config.units import Points, show_tokens
from bessemer.model.config import ModelConfig
from bessemer.train.setup import model_config


class RecipeFacts:
    """The recipe and its model, for the items."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.model: ModelConfig = model_config(recipe)

    def stage(self, kind: str) -> Any | None:
        """The table of the first stage of a kind."""
        return next((stage for stage in self.recipe.stages if stage.kind == kind), None)

    def stages(self, kind: str) -> list[Any]:
        """The tables of all stages of a kind."""
        return [stage for stage in self.recipe.stages if stage.kind == kind]

    def is_student(self, name: str | None) -> bool:
        """Whether a stage brings in a model of another shape than the recipe's."""
        stage = next((stage for stage in self.recipe.stages if stage.name == name), None)
        return stage is not None and bool(getattr(stage, "model", None)) and self.stage("rl") is not None

    def imported(self) -> bool:
        """Whether the run begins with a model from elsewhere, which the [model] table does not describe."""
        return self.recipe.stages[0].kind == "import"

    def masked(self) -> bool:
        """Whether pre-training hides the other documents of a row."""
        pretrain = self.stage("pretrain")
        return pretrain is not None and pretrain.document_mask


Status = tuple[str, bool]
ABSENT: Status = ("no such stage", False)
IMPORTED: Status = ("the imported model's own", False)


@dataclass(frozen=True)
class Item:
    item: str
    section: str
    paper: str
    status: Callable[[RecipeFacts], Status]
    """The value of a run, and whether the item is on."""
    code: str
    """File under src/bessemer."""
    test: str
    """File under tests."""


def _points(points: Points) -> str:
    texts = [f"{value:g} at {show_tokens(at)}" for at, value in zip(points.tokens, points.values, strict=True)]
    return f"{points.values[0]:g}" if len(texts) == 1 else ", ".join(texts)


def _model(
    show: Callable[[ModelConfig], Any], on: Callable[[ModelConfig], bool] = lambda m: True
) -> Callable[[RecipeFacts], Status]:
    return lambda facts: IMPORTED if facts.imported() else (str(show(facts.model)), on(facts.model))


def _of(
    kind: str, show: Callable[[Any], Any], on: Callable[[Any], bool] = lambda s: True
) -> Callable[[RecipeFacts], Status]:
    def status(facts: RecipeFacts) -> Status:
        stage = facts.stage(kind)
        return ABSENT if stage is None else (str(show(stage)), on(stage))

    return status


def _any(kind: str, show: Callable[[Any], Any], on: Callable[[Any], bool]) -> Callable[[RecipeFacts], Status]:
    """As `_of`, of the first stage that has the item on; several stages of a kind differ on purpose."""

    def status(facts: RecipeFacts) -> Status:
        stages = facts.stages(kind)
        stage = next(filter(on, stages), stages[0] if stages else None)
        return ABSENT if stage is None else (f"{stage.name}: {show(stage)}", on(stage))

    return status


def _layout(show: Callable[[LayoutConfig], str], on: Callable[[LayoutConfig], bool]) -> Callable[[RecipeFacts], Status]:
    def status(facts: RecipeFacts) -> Status:
        layout = facts.recipe.layout
        return ("one process", False) if layout.fewest == 1 else (show(layout), on(layout))

    return status


def _extended(facts: RecipeFacts) -> Status:
    phases = facts.stages("extend")
    if not phases:
        return ABSENT
    steps = ", ".join(f"{s.tokens / s.length / s.batch_rows.values[0]:.0f}" for s in phases)
    return " -> ".join(["short", *(str(s.length) for s in phases)]) + f", {steps} steps", len(phases) > 1


_TEMPLATES = {"r1-zero": "R1-Zero's, its preamble in our words", "zero": "the question without a preamble"}


def _template(facts: RecipeFacts) -> Status:
    """That of the first RL stage, or of the model that it starts from."""
    if (rl := facts.stage("rl")) is None:
        return ABSENT
    source = next((stage for stage in facts.recipe.stages if stage.name == rl.source), None)
    named = rl.prompt_template
    if named == "model":
        named = "zero" if source is None or source.kind == "pretrain" else getattr(source, "style", None)
    return _TEMPLATES.get(named or "", "the model's own"), named == "r1-zero"


def _sparse(m: ModelConfig) -> bool:
    return m.n_dense_layers < m.n_layers


ITEMS: tuple[Item, ...] = (
    Item("Multi-head latent attention", "V3 2.1.1", "latent 512 + 64, 128 heads",
         _model(lambda m: f"latent {m.kv_lora_rank} + {m.qk_rope_head_dim}, {m.n_heads} heads"),
         "model/mla.py", "model/test_model_attention.py"),
    Item("Query compression", "V3 4.2", "rank 1536",
         _model(lambda m: f"rank {m.q_lora_rank}", lambda m: m.q_lora_rank > 0),
         "model/mla.py", "model/test_hub_parity.py"),
    Item("Interleaved RoPE, YaRN off in the short stage", "V3 4.2-4.3", "theta 10000, plain at 4K",
         _model(lambda m: f"theta {m.rope_theta:g}, " + (f"YaRN {m.rope_factor:g}" if m.yarn else "plain"),
                lambda m: not m.yarn),
         "model/mla.py", "model/test_model_rope.py"),
    Item("DeepSeekMoE", "V3 2.1.2", "256 routed + 1 shared, top-8",
         _model(lambda m: f"{m.n_routed_experts} routed + {m.n_shared_experts} shared, top-{m.n_activated_experts}",
                _sparse), "model/moe.py", "model/test_model_network.py"),
    Item("Sigmoid gate, normalised, scaled", "V3 2.1.2", "sigmoid, x 2.5",
         _model(lambda m: f"{m.score_func}, x {m.route_scale:g}", _sparse), "model/moe.py", "model/test_model_gate.py"),
    Item("Group-limited routing", "V3 2.1.2", "4 of 8 groups",
         _model(lambda m: f"{m.n_limited_groups} of {m.n_expert_groups} groups", lambda m: m.n_expert_groups > 1),
         "model/moe.py", "model/test_model_gate.py"),
    Item("Leading dense layers", "V3 4.2", "3 of 61", _model(lambda m: f"{m.n_dense_layers} of {m.n_layers}"),
         "model/layer.py", "model/test_model_network.py"),
    Item("Bias balancing, MTP layers included", "V3 2.1.2, 4.2", "gamma 0.001, 0 at the end",
         _of("pretrain", lambda s: f"gamma {_points(s.gamma)}", lambda s: max(s.gamma.values) > 0),
         "train/balance.py", "train/test_balance.py"),
    Item("Sequence-wise balance loss", "V3 2.1.2", "alpha 0.0001",
         _of("pretrain", lambda s: f"alpha {s.balance_alpha:g}", lambda s: s.balance_alpha > 0),
         "train/objective.py", "train/test_objective.py"),
    Item("No token dropping", "V3 2.1.2", "none dropped", _model(lambda m: "none dropped"),
         "model/moe.py", "model/test_model_gate.py"),
    Item("Multi-token prediction", "V3 2.2", "depth 1, lambda 0.3 then 0.1",
         lambda f: IMPORTED if f.imported() else (f"depth {f.model.n_mtp}" + (
             f", lambda {_points(s.mtp_lambda)}" if (s := f.stage("pretrain")) else ""), f.model.n_mtp > 0),
         "model/transformer.py", "model/test_hub_mtp.py"),
    Item("AdamW, FP32 masters", "V3 4.2, 3.3.2", "0.9 / 0.95, decay 0.1, clip 1.0",
         _of("pretrain", lambda s: ("Muon for matrices inside layers, else " if s.optimizer == "muon" else "")
             + f"0.9 / 0.95, decay {s.weight_decay:g}, clip {s.clip:g}", lambda s: s.optimizer == "adamw"),
         "train/optimizer.py", "train/test_optim.py"),
    Item("Learning rate over consumed tokens", "V3 4.2", "warm-up, constant, cosine, two steps",
         _of("pretrain", lambda s: _points(s.lr)), "config/units.py", "pipeline/test_recipe_values.py"),
    Item("Batch size over consumed tokens", "V3 4.2", "3072 -> 15360 rows",
         _of("pretrain", lambda s: f"{_points(s.batch_rows)} rows", lambda s: len(set(s.batch_rows.values)) > 1),
         "train/trainer.py", "train/test_trainer.py"),
    Item("Initialisation", "V3 4.2", "std 0.006 at width 7168",
         _model(lambda m: f"std {m.init_std:g} at width {m.dim}"),
         "model/transformer.py", "model/test_model_network.py"),
    Item("Packing without cross-document mask", "V3 4.1", "rows of 4096",
         lambda f: (f"rows of {s.row_length}" + (", masked" if f.masked() else ""), not f.masked())
         if (s := f.stage("corpus")) else ABSENT, "data/rows.py", "data/test_data_corpus.py"),
    Item("Fill-in-the-middle", "V3 4.1", "rate 0.1, PSM",
         _of("corpus", lambda s: f"rate {s.fim_rate:g} on {', '.join(s.fim_parts) or 'no part'}",
             lambda s: s.fim_rate > 0 and bool(s.fim_parts)), "data/corpus.py", "data/test_data_augment.py"),
    Item("Random split of punctuation + line break", "V3 4.1", "a certain proportion",
         _of("corpus", lambda s: f"rate {s.boundary_split_rate:g}", lambda s: s.boundary_split_rate > 0),
         "data/corpus.py", "data/test_data_augment.py"),
    Item("Byte-level BPE with V3's pre-split", "V3 4.1", "128K entries",
         _model(lambda m: f"{m.vocab_size} entries"), "data/tokenizer.py", "data/test_data_tokenizer.py"),
    Item("FP8 training", "V3 3.3", "E4M3, 1x128 and 128x128, sums to float32 every 128",
         _any("pretrain", lambda s: s.fp8, lambda s: s.fp8 in ("paper", "power-of-two")),
         "precision/fp8_linear.py", "precision/test_fp8_gemm.py"),
    Item("Activations stored in FP8 and E5M6; norms and up-projections recomputed", "V3 3.2.3, 3.3.3",
         "a byte, 12 bits",
         _any("pretrain", lambda s: "with FP8" if s.fp8 != "off" else "no FP8", lambda s: s.fp8 != "off"),
         "model/fp8.py", "model/test_model_fp8.py"),
    Item("Moments of the optimizer in BF16", "V3 3.3.2", "bfloat16, masters and gradients float32",
         _any("pretrain", lambda s: s.moments, lambda s: s.moments == "bfloat16"),
         "train/optimizer.py", "train/test_optim.py"),
    Item("Moving average of the weights", "V3 3.2.3", "in CPU memory, after each step",
         _any("pretrain", lambda s: f"decay {s.ema_decay:g}" if s.ema_decay else "none", lambda s: s.ema_decay > 0),
         "train/optimizer.py", "train/test_ema.py"),
    Item("DualPipe", "V3 3.2.1", "16 pipeline ranks",
         _layout(lambda x: f"{x.pp} pipeline ranks, {x.schedule}",
                 lambda x: x.schedule == "dualpipe" or (x.schedule == "auto" and x.pp % 2 == 0)),
         "dist/executor.py", "dist/test_executor.py"),
    Item("Expert parallelism, a token to a node once", "V3 3.2.2", "64 ranks on 8 nodes",
         _layout(lambda x: f"{x.ep} ranks, {x.node} a node", lambda x: x.ep > 1),
         "dist/expert_parallel.py", "dist/test_expert_parallel.py"),
    Item("ZeRO-1", "V3 3.2", "optimizer state sharded over data-parallel ranks",
         _layout(lambda x: f"{x.dp if x.dp != 'auto' else 'all'} x {x.ep} ranks", lambda x: x.ep > 1 or x.dp != 1),
         "dist/zero1.py", "dist/test_distributed_trainer.py"),
    Item("Long-context extension in phases", "V3 4.3", "4K -> 32K -> 128K, 1000 steps each", _extended,
         "pipeline/stages/extend.py", "pipeline/test_extend.py"),
    Item("YaRN on the rotary key, the same in every phase", "V3 4.3", "s 40, alpha 1, beta 32, sqrt(t) 0.1 ln s + 1",
         lambda f: (f"s {s.rope_factor:g}, alpha {f.model.beta_slow:g}, beta {f.model.beta_fast:g}, "
                    f"sqrt(t) {0.1 * f.model.mscale_all_dim:g} ln s + 1", True) if (s := f.stage("extend")) else ABSENT,
         "model/mla.py", "model/test_model_rope.py"),
    Item("Needle in a haystack over lengths and depths", "V3 4.3, Figure 8", "up to 128K, after SFT",
         _of("longeval", lambda s: f"up to {max(s.lengths)}, {s.problems * len(s.depths)} problems of each length",
             lambda s: bool(s.haystack)), "tasks/needle.py", "tasks/test_needle.py"),
    Item("R1-Zero: RL from the base, no SFT", "R1 2.2", "rule rewards only",
         _of("rl", lambda s: "tasks: " + ", ".join(s.tasks)), "pipeline/stages/rl.py", "pipeline/test_stages.py"),
    Item("Prompt template", "R1 Table 1", "preamble, User: question, Assistant:", _template,
         "data/chat.py", "data/test_data_chat.py"),
    Item("GRPO groups", "R1 2.2.1", "16 samples, 512 prompts a rollout",
         _of("rl", lambda s: f"{s.samples} samples, {s.prompts_per_rollout} prompts a rollout"),
         "rl/reward.py", "rl/test_rl_advantage.py"),
    Item("Clip", "R1-Nature B", "eps 10", _of("rl", lambda s: f"-{s.clip_low:g} / +{s.clip_high:g}"),
         "rl/losses.py", "rl/test_rl_losses.py"),
    Item("KL to the reference (k3, in the loss)", "R1-Nature B", "0.001, refreshed every 400 steps",
         _of("rl", lambda s: f"{s.kl:g}, refreshed every {s.reference_every} steps", lambda s: s.kl > 0),
         "rl/losses.py", "rl/test_rl_losses.py"),
    Item("Mini-batches per rollout", "R1-Nature B", "16, one epoch",
         _of("rl", lambda s: f"{s.updates_per_rollout}, one epoch"), "rl/loop.py", "pipeline/test_stages.py"),
    Item("Rewards", "R1 2.2.2", "accuracy + format, equal weight",
         _of("rl", lambda s: f"accuracy + {s.format_reward:g} x format"), "rl/reward.py", "rl/test_rl_reward.py"),
    Item("SFT: answers only, samples packed with masks", "V3 5.1, R1 2.3.1", "cosine 5e-5 -> 5e-6, 2 to 3 epochs",
         _of("sft", lambda s: f"cosine {s.lr:g} -> {s.lr_final:g}, {s.epochs} epochs"),
         "data/sft_rows.py", "data/test_sft_rows.py"),
    Item("Length cap raised mid-run", "R1-Nature Methods", "32,768 -> 65,536 at step 8.2k",
         _any("rl", lambda s: f"{_points(s.max_new_tokens)} tokens", lambda s: len(set(s.max_new_tokens.values)) > 1),
         "rl/loop.py", "pipeline/test_r1.py"),
    Item("Cold start: readable R1-Zero answers in one form", "R1 2.3.1", "thousands, thoughts and a summary",
         _any("reject", lambda s: f"{s.problems} problems, form {s.form}", lambda s: s.form == "r1"),
         "pipeline/stages/reject.py", "pipeline/test_reject.py"),
    Item("Language consistency reward", "R1 2.3.2", "share of target-language words, from R1's first RL stage on",
         _any("rl", lambda s: f"{s.language_reward:g} x consistency", lambda s: s.language_reward > 0),
         "tasks/readability.py", "tasks/test_language.py"),
    Item("Rejection sampling: correct and readable answers", "R1 2.3.3", "several answers, 3 reasoning to 1 other",
         _any("reject", lambda s: f"{s.samples} answers, {s.keep} kept, {s.others} other conversations",
              lambda s: s.others > 0), "pipeline/stages/reject.py", "pipeline/test_r1.py"),
    Item("Reward models: helpful by pairs, harmless by labels", "R1-Nature Methods", "66,000 pairs, 106,000 labels",
         _any("reward-model", lambda s: f"{s.aim}, {s.made} made prompts", lambda s: True),
         "pipeline/stages/reward.py", "pipeline/test_reward_stage.py"),
    Item("Preference rewards only at the end", "R1 2.3.4", "last 400 of 1,700 steps",
         _any("rl", lambda s: f"from rollout {s.general_from} of {s.rollouts}",
              lambda s: bool(s.reward_models) and s.general_from > 0), "rl/rollout_queue.py", "pipeline/test_r1.py"),
    Item("Distillation: SFT of a smaller model on checked samples", "R1 2.4", "800K samples, dense students",
         lambda f: next(((f"{s.name}: from {s.source}", True) for s in f.stages("sft") if f.is_student(s.source)),
                        ABSENT), "pipeline/stages/sft.py", "pipeline/test_r1.py"),
    Item("Evaluation by sampling", "R1 3", "pass@1 over k samples, T 0.6, and cons@k",
         _of("eval", lambda s: f"{s.samples} samples, T {', '.join(f'{t:g}' for t in s.temperatures)}"),
         "tasks/verdict_metrics.py", "tasks/test_verdict_metrics.py"),
)  # fmt: skip


def rows(recipe: Recipe) -> list[dict[str, Any]]:
    """The table for one run."""
    facts = RecipeFacts(recipe)
    table = []
    for item in ITEMS:
        value, on = item.status(facts)
        table.append({"item": item.item, "section": item.section, "paper": item.paper, "here": value, "on": on})
    return table


def markdown() -> str:
    """docs/conformance.md."""
    lines = [
        "# Conformance",
        "",
        "Each item of the published recipe, the file that builds it and the test that checks it. A run prints the same",
        "table with its own values. Written by `python -m bessemer.pipeline.conformance`; a test compares.",
        "",
        "| item | section | in the paper | built in | tested by |",
        "|---|---|---|---|---|",
    ]
    for item in ITEMS:
        built = f"`src/bessemer/{item.code}` | `tests/{item.test}`"
        lines.append(f"| {item.item} | {item.section} | {item.paper} | {built} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
