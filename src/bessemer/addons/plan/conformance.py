"""The papers' recipe item by item: the published values, this run's values, and where each item is built and tested.

`rows(recipe)` is the table of conformance.json and of the report. An item is *as published* if the run has every
published value, *scaled* if only sizes differ (widths, counts, lengths, batches, rates: they follow the model's size),
*adapted* if a choice differs, and *off* if the run lacks the mechanism. `markdown()` returns docs/conformance.md; a
test fails when that file differs or an entry points nowhere.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

from bessemer import plugins
from bessemer.addons.distributed import distributed, schedules
from bessemer.addons.distributed.schedule_shapes import corners, levels, shape
from bessemer.addons.plan.conformance_item import ANY, IMPORTED, Found, Item, Read, RecipeFacts
from bessemer.config.recipe import Recipe
from bessemer.config.rl import RLConfig
from bessemer.config.units import Points, show_tokens
from bessemer.data.corpus import BOUNDARY_SPLIT_RATE
from bessemer.model.config import ModelConfig
from bessemer.rl.algorithms import LOSS
from bessemer.train import lineage


def _stages(
    kind: str, which: Callable[[RecipeFacts, Any], bool] = lambda f, s: True
) -> Callable[[RecipeFacts], list[Any]]:
    return lambda facts: [stage for stage in facts.stages(kind) if which(facts, stage)]


def _model(facts: RecipeFacts) -> Found:
    if not facts.foreign:
        return [facts.model]
    family = (lineage.imported_config(facts.recipe, facts.recipe.stages[0].name) or {}).get("model_type")
    return f"{IMPORTED}, {family}" if family else IMPORTED


def _layout(facts: RecipeFacts) -> Found:
    return "one process" if facts.recipe.layout.fewest == 1 else [facts.recipe.layout]


def _corpus(facts: RecipeFacts) -> list[Any]:
    return facts.stages("corpus")[:1]  # the later ones have longer rows


def _pretrain(facts: RecipeFacts) -> list[Any]:
    """Without students, which are not the recipe's model; continued training only if there is no other."""
    stages = [stage for stage in facts.stages("pretrain") if not stage.model]
    return [stage for stage in stages if stage.corpus is None] or stages


_rl = _stages("rl")
_sft = _stages("sft", lambda f, s: not f.is_distillation(s))


V3_LR = Points([[0, 2.2e-4], ["10T", 2.2e-4], ["14.3T", 2.2e-5, "cosine"], ["14633B", 2.2e-5], ["14633B", 7.3e-6]])
"""V3 4.2, after a warm-up of 2,000 steps."""


def _warm_up(steps: int) -> str:
    return f", after a warm-up of {steps:,} steps" if steps else ""


def _used(rows: Callable[[list[float]], float]) -> Callable[[RecipeFacts, Any], str]:
    """The pipeline schedule of a pre-training step of `rows(batch sizes)` rows."""

    def name(facts: RecipeFacts, layout: Any) -> str:
        ranks, schedule, _ = distributed.layout_of(layout, layout.fewest)
        steps = [(rows(s.batch_rows.values), s.micro_rows) for s in facts.stages("pretrain")] or [(1, 1)]
        micro = math.ceil(steps[0][0] / (ranks.dp * ranks.ep * steps[0][1]))
        return schedules.schedule(schedule, ranks.pp, schedules.micro_batches(schedule, ranks.pp, micro)).name

    return name


def _rejected(facts: RecipeFacts, count: Callable[[Any], int]) -> int:
    """A sum over the rejection sampling stages, of which there may be one per kind of problem."""
    return sum(count(stage) for stage in facts.stages("reject") if stage not in facts.cold_starts())


def _weight(stage: RLConfig, name: str) -> float:
    """The weight of a term of the reward; 0 if there is none of that name."""
    return sum(term.weight for term in stage.reward if term.name == name)


def _scope(facts: RecipeFacts, stage: RLConfig) -> str:
    return next(
        (term.settings.get("scope", "thoughts") for term in stage.reward if term.name == "language"), "thoughts"
    )


def _scales_by_std(stage: RLConfig) -> bool:
    return bool(stage.advantage.settings.get("scale_by_std", True))


def _behind(stage: RLConfig) -> int:
    """Rollouts between sampling and updates."""
    ahead = [hook.settings for hook in stage.hooks if hook.name == "sample-ahead"]
    return sum(settings.get("max_off_policy_rollouts", 1) for settings in ahead)


def _own_hooks(stage: RLConfig) -> str:
    return ", ".join(hook.name for hook in stage.hooks if ":" in hook.name)


def _clip(stage: RLConfig, key: str) -> float:
    """A bound of the stage's loss: its setting, or the default of the package's function; infinite if there is none."""
    if key in stage.loss.settings or not plugins.is_built_in("losses", stage.loss.name):
        return float(stage.loss.settings.get(key, math.inf))
    bound = inspect.signature(plugins.find("losses", stage.loss.name, takes=LOSS)).parameters.get(key)
    return math.inf if bound is None else float(bound.default)


def _has_general_rewards(facts: RecipeFacts, stage: Any) -> bool:
    return bool(stage.reward_models)


def _extended(facts: RecipeFacts) -> Found:
    return facts.stages("extend")[:1]


def _has_experts(facts: RecipeFacts, model: ModelConfig) -> bool:
    return model.n_dense_layers < model.n_layers


def _lengths(facts: RecipeFacts, first: Any) -> str:
    short = next((str(corpus.row_length) for corpus in _corpus(facts)), "short")
    return " -> ".join([short, *(str(stage.length) for stage in facts.stages("extend"))])


def _extension_rate(facts: RecipeFacts, first: Any) -> str:
    return next(
        (" ".join(segments) for x in facts.stages("extend") if (segments := shape(x.lr)) != ["constant"]), "constant"
    )


def _template(facts: RecipeFacts, rl: Any) -> str:
    """The prompt template of an RL stage, or of the model that it starts from."""
    source = facts.recipe.stage(rl.source)
    while getattr(source, "corpus", None) and source.source:  # trained further, with the template it had
        source = facts.recipe.stage(source.source)
    own = "zero" if source.kind == "pretrain" else getattr(source, "style", None)
    return TEMPLATES.get(own or "" if rl.prompt_template == "model" else rl.prompt_template, "the model's own")


def _batch(facts: RecipeFacts, stage: Any) -> str:
    rows = "rows by the data" if stage.batch_rows is None else f"{stage.batch_rows} rows"
    return f"{stage.batch_examples} samples" if stage.batch_examples else rows


def _start(facts: RecipeFacts, stage: Any) -> str:
    return "after SFT" if facts.is_after_sft(stage.name) else "no SFT"


def _author(facts: RecipeFacts, stage: Any) -> str:
    if stage.kind != "reject":
        return "written"
    return "after SFT" if facts.is_after_sft(stage.source) else "by R1-Zero"


def _student(facts: RecipeFacts, sft: Any) -> str:
    teachers = {facts.base(author.source) for author in facts.authors(sft) if author.kind == "reject"}
    return "the teacher's own base" if facts.base(sft.source) in teachers else "another model"


TEMPLATES = {"r1-zero": "R1-Zero's, its preamble in our words", "zero": "the question without a preamble"}
MEANS = {"sequence": "each output, then outputs", "token": "all tokens", "constant": "the length cap"}

ITEMS: tuple[Item, ...] = (
    Item("Multi-head latent attention", "V3 2.1.1", "latent {kv_lora_rank} + {qk_rope_head_dim}, {n_heads} heads",
         _model, "model/mla.py", "model/test_model_attention.py",
         sizes=dict(kv_lora_rank=512, qk_rope_head_dim=64, n_heads=128, qk_nope_head_dim=128, v_head_dim=128)),
    Item("Query compression", "V3 4.2", "rank {q_lora_rank}", _model, "model/mla.py", "model/test_deepseek_parity.py",
         sizes=dict(q_lora_rank=1536), on=lambda v: v["q_lora_rank"] > 0),
    Item("Interleaved RoPE, YaRN off in the short stage", "V3 4.2-4.3", "theta {rope_theta}, YaRN {rope_factor}",
         _model, "model/mla.py", "model/test_model_rope.py", dict(rope_theta=10000.0, rope_factor=1.0),
         paper="theta 10000, plain at 4K"),
    Item("DeepSeekMoE", "V3 2.1.2", "{n_routed_experts} routed + {n_shared_experts} shared, top-{n_activated_experts}",
         _model, "model/moe.py", "model/test_model_network.py",
         dict(n_shared_experts=1, experts=Read(True, _has_experts)),
         dict(n_routed_experts=256, n_activated_experts=8, moe_inter_dim=2048), on=lambda v: v["experts"]),
    Item("Sigmoid gate, normalised, scaled", "V3 2.1.2", "{score_func}, {norm}, x {route_scale}", _model,
         "model/gate.py", "model/test_model_gate.py",
         dict(score_func="sigmoid", route_scale=2.5, experts=Read(True, _has_experts),
              norm=Read("normalised", lambda f, m: "normalised" if m.norm_topk_prob else "not normalised")),
         on=lambda v: v["experts"]),
    Item("Group-limited routing", "V3 2.1.2", "{n_limited_groups} of {n_expert_groups} groups", _model,
         "model/gate.py", "model/test_model_gate.py", sizes=dict(n_limited_groups=4, n_expert_groups=8),
         on=lambda v: v["n_limited_groups"] < v["n_expert_groups"]),
    Item("Leading dense layers", "V3 4.2", "{n_dense_layers} of {n_layers}", _model,
         "model/layer.py", "model/test_deepseek_parity.py", sizes=dict(n_dense_layers=3, n_layers=61),
         on=lambda v: 0 < v["n_dense_layers"] < v["n_layers"]),
    Item("Bias balancing, MTP layers included", "V3 2.1.2, 4.2", "gamma {gamma}", _pretrain,
         "train/balance.py", "train/test_balance.py", dict(levels=Read([0.001, 0.0], lambda f, s: levels(s.gamma))),
         dict(gamma=Points([[0, 0.001], ["14.3T", 0.001], ["14.3T", 0.0]])), on=lambda v: max(v["levels"]) > 0),
    Item("Sequence-wise balance loss", "V3 2.1.2", "alpha {balance_alpha}", _pretrain,
         "train/objective.py", "train/test_objective.py", dict(balance_alpha=1e-4),
         on=lambda v: v["balance_alpha"] > 0),
    Item("No token dropping", "V3 2.1.2", "none dropped", _model, "model/moe.py", "model/test_model_gate.py"),
    Item("Multi-token prediction", "V3 2.2", "depth {depth}, lambda {mtp_lambda}", _pretrain,
         "model/transformer.py", "model/test_deepseek_mtp.py",
         dict(depth=Read(1, lambda f, s: f.model.n_mtp), levels=Read([0.3, 0.1], lambda f, s: levels(s.mtp_lambda))),
         dict(mtp_lambda=Points([[0, 0.3], ["10T", 0.3], ["10T", 0.1]])),
         on=lambda v: v["depth"] > 0 and max(v["levels"]) > 0),
    Item("AdamW, FP32 masters", "V3 4.2, 3.3.2", "{optimizer}, {betas}, decay {weight_decay}, clip {clip}", _pretrain,
         "train/optimizer.py", "train/test_optim.py",
         dict(optimizer="adamw", weight_decay=0.1, clip=1.0, betas=Read([0.9, 0.95], lambda f, s: list(s.betas)))),
    Item("Learning rate over consumed tokens", "V3 4.2", "{shape}: {lr}{warm_up}; {tokens} tokens", _pretrain,
         "config/units.py", "pipeline/test_recipe_values.py",
         dict(shape=Read(shape(V3_LR), lambda f, s: shape(s.lr)),
              counted=Read(True, lambda f, s: s.warmup_steps > 0)),
         dict(lr=Read(corners(V3_LR), lambda f, s: corners(s.lr)),
              warm_up=Read(_warm_up(2000), lambda f, s: _warm_up(s.warmup_steps)),
              tokens=Read("14.8T", lambda f, s: show_tokens(s.tokens)))),
    Item("Batch size over consumed tokens", "V3 4.2", "{batch_rows} rows", _pretrain,
         "train/trainer.py", "train/test_trainer.py", dict(shape=Read(["warm-up"], lambda f, s: shape(s.batch_rows))),
         dict(batch_rows=Points([[0, 3072], ["469B", 15360]])), on=lambda v: v["shape"] != ["constant"]),
    Item("Initialisation", "V3 4.2", "std {init_std} at width {dim}", _model,
         "model/transformer.py", "model/test_model_network.py", sizes=dict(init_std=0.006, dim=7168)),
    Item("Packing without cross-document mask", "V3 4.1", "rows of {row_length}{mask}", _corpus,
         "data/plans.py", "data/test_data_corpus.py",
         dict(mask=Read("", lambda f, s: ", masked" if any(p.document_mask for p in _pretrain(f)) else "")),
         dict(row_length=4096), on=lambda v: not v["mask"]),
    Item("Fill-in-the-middle", "V3 4.1", "rate {fim_rate} on {parts}, PSM", _corpus,
         "data/corpus.py", "data/test_data_augment.py",
         dict(fim_rate=0.1, parts=Read("all parts", lambda f, s: "all parts" if s.parts and {*s.fim_parts} >= {*s.parts}
                                       else ", ".join(s.fim_parts) or "no part")),
         on=lambda v: v["fim_rate"] > 0 and v["parts"] != "no part"),
    Item("Random split of punctuation + line break", "V3 4.1", "rate {boundary_split_rate}", _corpus,
         "data/corpus.py", "data/test_data_augment.py",
         dict(boundary_split_rate=Read(ANY, lambda f, s: BOUNDARY_SPLIT_RATE)), paper="a certain proportion"),
    Item("Byte-level BPE with V3's pre-split", "V3 4.1", "{vocab_size} entries", _model,
         "data/tokenizer.py", "data/test_data_tokenizer.py", sizes=dict(vocab_size=129_280)),
    Item("FP8 training", "V3 3.3", "{fp8}", _pretrain, "addons/accelerate/precision/fp8_linear.py",
         "precision/test_fp8_gemm.py",
         dict(fp8="paper"), on=lambda v: v["fp8"] != "off", best=True,
         paper="E4M3, 1x128 and 128x128, sums to float32 every 128"),
    Item("Activations stored in FP8 and E5M6; norms and up-projections recomputed", "V3 3.2.3, 3.3.3", "fp8 {fp8}",
         _pretrain, "addons/accelerate/precision/fp8_layers.py", "model/test_model_fp8.py", dict(fp8="paper"),
         on=lambda v: v["fp8"] != "off", best=True, paper="a byte, 12 bits"),
    Item("Moments of the optimizer in BF16", "V3 3.3.2", "{moments}", _pretrain,
         "train/flat_parameters.py", "train/test_optim.py", dict(moments="bfloat16"),
         on=lambda v: v["moments"] == "bfloat16", best=True, paper="bfloat16, masters and gradients float32"),
    Item("Moving average of the weights", "V3 3.2.3", "decay {ema_decay}", _pretrain,
         "train/flat_parameters.py", "train/test_ema.py", dict(ema_decay=Read(ANY, lambda f, s: s.ema_decay)),
         on=lambda v: v["ema_decay"] > 0, best=True, paper="in CPU memory, after each step"),
    Item("DualPipe", "V3 3.2.1", "{pp} pipeline ranks, {used}, in the smallest steps {small}", _layout,
         "addons/distributed/executor.py", "dist/test_executor.py",
         dict(used=Read("dualpipe", _used(max)), small=Read(ANY, _used(min))),
         dict(pp=16), on=lambda v: v["used"].startswith("dualpipe"), paper="16 pipeline ranks"),
    Item("Expert parallelism, a token to a node once", "V3 3.2.2", "{ep} ranks, {node} a node", _layout,
         "addons/distributed/expert_parallel.py", "dist/test_expert_parallel.py", sizes=dict(ep=64, node=8),
         on=lambda v: v["ep"] > 1),
    Item("ZeRO-1", "V3 3.2", "optimizer state sharded over {dp} x {ep} ranks", _layout,
         "addons/distributed/zero1.py", "dist/test_distributed_trainer.py", sizes=dict(dp=2, ep=64),
         on=lambda v: v["ep"] > 1 or v["dp"] != 1),
    Item("Long-context extension in phases", "V3 4.3", "{lengths}, {steps} steps, rate {shape} {lr}", _extended,
         "addons/r1/extend.py", "pipeline/test_extend.py",
         dict(phases=Read(2, lambda f, s: len(f.stages("extend"))), shape=Read("constant", _extension_rate)),
         dict(lengths=Read("4096 -> 32768 -> 131072", _lengths),
              steps=Read([1000, 1000], lambda f, s: [round(x.tokens / x.length / x.batch_rows.values[0])
                                                     for x in f.stages("extend")]),
              lr=Read([7.3e-6, 7.3e-6], lambda f, s: [max(x.lr.values) for x in f.stages("extend")]))),
    Item("YaRN on the rotary key, the same in every phase", "V3 4.3",
         "s {rope_factor}, alpha {alpha}, beta {beta}, sqrt(t) {mscale} ln s + 1", _stages("extend"),
         "model/mla.py", "model/test_model_rope.py",
         dict(alpha=Read(1.0, lambda f, s: f.model.beta_slow), beta=Read(32.0, lambda f, s: f.model.beta_fast),
              mscale=Read(0.1, lambda f, s: 0.1 * f.model.mscale_all_dim),
              same=Read(1, lambda f, s: len({x.rope_factor for x in f.stages("extend")}))),
         dict(rope_factor=40.0)),
    Item("Needle in a haystack over lengths and depths", "V3 4.3, Figure 8", "up to {longest} tokens, {tuned}",
         _stages("longeval", lambda f, s: bool(s.haystack and s.models and s.lengths)),
         "addons/tasks/needle.py", "tasks/test_needle.py",
         dict(tuned=Read("after SFT", lambda f, s: "after SFT" if f.is_after_sft(s.models[-1]) else "without SFT")),
         dict(longest=Read(131_072, lambda f, s: max(s.lengths)))),
    Item("R1-Zero: RL from the base, no SFT", "R1 2.2", "{start}, {rewards}", _rl,
         "rl/loop.py", "pipeline/test_stages.py",
         dict(start=Read("no SFT", _start),
              rewards=Read("rule rewards", lambda f, s: "reward models" if s.reward_models else
                           "rule rewards" if _weight(s, "accuracy") else f"reward {s.reward[0].name}")),
         on=lambda v: v["start"] == "no SFT", best=True),
    Item("Prompt template", "R1 Table 1", "{template}", _stages("rl", lambda f, s: not f.is_after_sft(s.name)),
         "data/chat.py", "data/test_data_chat.py", dict(template=Read("R1-Zero's, word for word", _template)),
         best=True, paper="preamble, User: question, Assistant:"),
    Item("GRPO groups", "R1 2.2.1", "{samples} samples, {prompts_per_rollout} prompts a rollout", _rl,
         "rl/algorithms/grpo.py", "rl/test_rl_advantage.py", dict(samples=16), dict(prompts_per_rollout=512)),
    Item("Advantage: reward minus the group's mean, over its standard deviation", "R1 2.2.1, Math 4.1",
         "{advantage}, {std}, outcome rewarded", _rl, "rl/algorithms/grpo.py", "rl/test_rl_advantage.py",
         dict(advantage=Read("group", lambda f, s: s.advantage.name),
              std=Read("over std", lambda f, s: "over std" if _scales_by_std(s) else "not over std")),
         on=lambda v: v["advantage"] == "group"),
    Item("Loss of a token", "Math 4.1", "{surrogate}, mean over {normalise}", _rl,
         "rl/rollout.py", "rl/test_rl_rollout.py",
         dict(surrogate=Read("grpo", lambda f, s: s.loss.name),
              normalise=Read(MEANS["sequence"], lambda f, s: MEANS[s.normalise]))),
    Item("Clip", "R1-Nature B", "-{low} / +{high}", _rl, "rl/algorithms/grpo.py", "rl/test_rl_losses.py",
         dict(low=Read(10.0, lambda f, s: _clip(s, "clip_low")),
              high=Read(10.0, lambda f, s: _clip(s, "clip_high"))),
         on=lambda v: v["high"] < math.inf),
    Item("KL to the reference (k3, in the loss)", "R1-Nature B", "{kl}, refreshed every {every} steps", _rl,
         "rl/losses.py", "rl/test_rl_losses.py",
         dict(kl=Read(0.001, lambda f, s: s.kl.weight), every=Read(400, lambda f, s: s.kl.reference_every)),
         on=lambda v: v["kl"] > 0),
    Item("Mini-batches per rollout", "R1-Nature B", "{updates_per_rollout}, one epoch", _rl,
         "rl/loop.py", "pipeline/test_rl_reference.py", dict(updates_per_rollout=16)),
    Item("On policy, every sample used", "R1-Nature B",
         "{behind} rollouts behind, {max_resamples} round, {filter}",
         _rl, "rl/generator.py", "pipeline/test_rl_reference.py",
         dict(behind=Read(0, lambda f, s: _behind(s)), max_resamples=1,
              filter=Read("no filter", lambda f, s: _own_hooks(s) or "no filter"))),
    Item("Learning rate of RL", "R1-Nature B", "{lr}", _rl, "train/trainer.py", "pipeline/test_rl_reference.py",
         sizes=dict(lr=Read(3e-6, lambda f, s: max(s.lr.values)))),
    Item("Sampling temperature of RL", "R1-Nature Methods", "{temperature}",
         _stages("rl", lambda f, s: not s.reward_models), "rl/losses.py", "rl/test_rl_losses.py",
         dict(temperature=1.0)),
    Item("Sampling temperature with preference rewards", "R1-Nature Methods", "{temperature}",
         _stages("rl", _has_general_rewards), "rl/losses.py", "rl/test_rl_losses.py", dict(temperature=0.7)),
    Item("Rewards", "R1 2.2.2", "{what} + {format_reward} x format", _rl, "rl/reward.py", "rl/test_rl_reward.py",
         dict(format_reward=Read(1.0, lambda f, s: _weight(s, "format")),
              what=Read("accuracy", lambda f, s: "accuracy" if _weight(s, "accuracy") else s.reward[0].name)),
         on=lambda v: v["what"] == "accuracy"),
    Item("SFT: answers only, samples packed with masks", "V3 5.1, R1 2.3.1",
         "cosine {lr} -> {lr_final}, {epochs} epochs, rows of {row_length}, {batch} a step", _sft,
         "data/sft_rows.py", "data/test_sft_rows.py",
         dict(epochs=range(2, 4), fall=Read(0.1, lambda f, s: s.lr_final / s.lr)),
         dict(lr=5e-5, lr_final=5e-6, row_length=32768, batch=Read("128 samples", _batch))),
    Item("Length cap raised mid-run", "R1-Nature Methods", "{max_new_tokens} tokens",
         _stages("rl", lambda f, s: not f.is_after_sft(s.name)), "rl/loop.py", "pipeline/test_r1.py",
         sizes=dict(max_new_tokens=Points([[0, 32768], [8200, 32768], [8200, 65536]])),
         on=lambda v: len({*v["max_new_tokens"].values}) > 1, best=True),
    Item("Cold start: readable R1-Zero answers in one form", "R1 2.3.1",
         "{problems} problems, {author}, {edited}, form {form}, T {temperature}",
         RecipeFacts.cold_starts, "addons/r1/reject.py", "pipeline/test_reject.py",
         dict(author=Read("by R1-Zero", _author), edited=Read("edited by people", lambda f, s: "not edited"),
              form=Read("r1", lambda f, s: getattr(s, "form", "of the task")),
              temperature=Read(1.0, lambda f, s: getattr(s, "temperature", 1.0))),
         dict(problems=Read(range(1000, 10_000), lambda f, s: s.problems if s.kind == "reject" else s.examples)),
         paper="thousands, thoughts and a summary, edited by people"),
    Item("Language consistency reward", "R1 2.3.2", "{weight} x consistency of the {scope}, {start}",
         _stages("rl", lambda f, s: _weight(s, "language") > 0 or f.is_after_sft(s.name)),
         "tasks/language.py", "tasks/test_language.py",
         dict(weight=Read(1.0, lambda f, s: _weight(s, "language")), scope=Read("thoughts", _scope),
              start=Read("after SFT", _start)),
         on=lambda v: v["weight"] > 0, paper="share of target-language words, from R1's first RL stage on"),
    Item("Rejection sampling: correct and readable answers", "R1 2.3.3",
         "{samples} answers, up to {kept} kept in all, {others} others, form {form}, consistency {consistency}",
         _stages("reject", lambda f, s: s not in f.cold_starts()), "addons/r1/reject.py",
         "pipeline/test_reject.py",
         dict(consistency=1.0, several=Read(True, lambda f, s: s.samples > 1),
              mixed=Read(True, lambda f, s: _rejected(f, lambda x: x.others) > 0), form="r1"),
         dict(kept=Read(range(600_000, 800_000), lambda f, s: _rejected(f, lambda x: x.problems * x.keep)),
              others=Read(200_000, lambda f, s: _rejected(f, lambda x: x.others)),
              samples=Read(ANY, lambda f, s: s.samples)),
         paper="several answers, 600K reasoning samples and 200K others"),
    Item("Reward models: helpful by pairs, harmless by labels", "R1-Nature Methods",
         "{aims}; {data}, {epochs} epoch, rate {lr}, rows of {row_length}, {batch} a step",
         _stages("reward-model"), "addons/r1/reward.py", "pipeline/test_reward_stage.py",
         dict(aims=Read(["harmless", "helpful"], lambda f, s: sorted({x.aim for x in f.stages("reward-model")})),
              data=Read("judged", lambda f, s: f"{s.made} made prompts" if s.made else "judged"), epochs=1),
         dict(lr=6e-6, batch=Read("256 samples", _batch), row_length=8192), paper="66,000 pairs, 106,000 labels"),
    Item("Preference rewards only at the end", "R1 2.3.4",
         "last {last} of {total} steps, weight {weight}", _stages("rl", _has_general_rewards),
         "rl/generator.py", "pipeline/test_r1.py",
         dict(weight=Read(1.0, lambda f, s: _weight(s, "accuracy"))),
         dict(last=Read(400, lambda f, s: (s.rollouts - s.general.start) * s.updates_per_rollout),
              total=Read(range(1684, 1701), lambda f, s: s.rollouts * s.updates_per_rollout)),  # whole rollouts
         on=lambda v: v["last"] < v["total"], paper="last 400 of 1,700 steps"),
    Item("Distillation: SFT of a smaller model on checked samples", "R1 2.4",
         "{student}: cosine {lr} -> {lr_final}, {epochs} epochs, rows of {row_length}, {batch} a step",
         _stages("sft", RecipeFacts.is_distillation), "pipeline/stages/sft.py", "pipeline/test_sft.py",
         dict(student=Read("another model", _student), epochs=range(2, 4),
              fall=Read(0.1, lambda f, s: s.lr_final / s.lr)),
         dict(lr=frozenset((1e-4, 8e-5, 7e-5, 6e-5, 5e-5, 2e-5)), row_length=32768, batch=Read("64 samples", _batch),
              lr_final=Read(ANY, lambda f, s: s.lr_final)), paper="800K samples, dense students"),
    Item("Evaluation by sampling", "R1 3",
         "pass@1 over {samples} samples, T {temperatures}, top-p {top_p}, {max_new_tokens} tokens",
         _stages("eval"), "tasks/verdict_metrics.py", "tasks/test_verdict_metrics.py",
         dict(temperatures=[0.6], top_p=0.95), dict(samples=range(4, 65), max_new_tokens=32768)),
)  # fmt: skip


def rows(recipe: Recipe) -> list[dict[str, Any]]:
    """The table for one run."""
    facts = RecipeFacts(recipe)
    table = []
    for item in ITEMS:
        state, value = item.status(facts)
        row = {"item": item.item, "section": item.section, "paper": item.published(), "here": value, "state": state}
        table.append(row)
    return table


def markdown() -> str:
    """docs/conformance.md."""
    lines = [
        "# Conformance",
        "",
        "Each item of the published recipe, the file that builds it and the test that checks it. A listed item is",
        "built and tested; whether it helps is another question. So far, small networks compared with and without MLA,",
        "experts, shared experts, balancing and MTP show only that balancing spreads the load and that finer experts",
        "lower the loss ([results.md](results.md#small-networks-compared-the-runs-of-bessemer-claims)).",
        "`bessemer conformance RECIPE` shows the recipe's own values and one of four states: as published (every",
        "value is the paper's), scaled (only sizes differ: widths, counts, lengths, batches, learning rates), adapted",
        "(a choice differs) and off (absent). `python -m bessemer.addons.plan.conformance` writes this page; a test",
        "checks it. `python bench/mutations.py` breaks each file and reports whether its test notices.",
        "",
        "| item | section | in the paper | built in | tested by |",
        "|---|---|---|---|---|",
    ]
    for item in ITEMS:
        built = f"`src/bessemer/{item.code}` | `tests/{item.test}`"
        lines.append(f"| {item.item} | {item.section} | {item.published()} | {built} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
