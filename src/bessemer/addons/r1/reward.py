"""Stage "reward-model": a reward model for helpfulness or for harmlessness (R1 2.3.4, R1-Nature Methods).

It is the body of an earlier stage's model, of any family, with a scalar head. Helpfulness learns from pairs, -log
sigmoid(r_chosen - r_rejected), and reads summaries; harmlessness learns from answers labelled safe or unsafe and reads
thoughts too. Judged answers come from files, or are made from the `general` task: candidates written in different
styles, and samples from the model itself, which are what it will judge in RL. Another model may judge the pairs
(`rl/judge`), as V3 did for R1; they may then answer any prompts. Prompts chosen by hash are held out; accuracy and the
scale of rewards (`rl/preference`) are measured on them. `judged.jsonl` holds the answers.

Iterative GRPO (DeepSeekMath 4.1.4, Algorithm 1) alternates RL stages and reward models: a reward model with `previous`
trains that stage's weights further on answers of the newest policy and a share of old ones; the next RL stage starts
from the policy, which is also its reference.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from bessemer import tasks
from bessemer.addons.families import formats
from bessemer.addons.r1 import objectives, preference_rows
from bessemer.addons.r1.judge import Judge
from bessemer.addons.r1.judge_api import api_key
from bessemer.addons.r1.preference import FACTS, Scale, judged_ids, score_by
from bessemer.addons.r1.tables import RewardModelConfig
from bessemer.addons.tasks import general_quality
from bessemer.addons.tasks.general import General
from bessemer.config.places import located
from bessemer.config.recipe import Recipe
from bessemer.config.table import StageConfig, is_changed
from bessemer.data import sft_rows, sources
from bessemer.data.chat import question_ids
from bessemer.data.documents import HUB
from bessemer.data.tokenizer import Tokenizer
from bessemer.engine.engine import Engine
from bessemer.errors import UserError
from bessemer.hf.families import load_tokenizer
from bessemer.model.protocol import LanguageModel
from bessemer.pipeline import preflight
from bessemer.pipeline.stage import Probe, Stage
from bessemer.pipeline.work import TRAINED, StageWork, answers
from bessemer.rl import rollout
from bessemer.runs.context import StageContext
from bessemer.runs.files import JUDGED, json_lines, write_atomic
from bessemer.runs.step_log import StepLog
from bessemer.tasks.answer import summary
from bessemer.train import lineage, setup
from bessemer.train.plan import TrainingPlan, constant
from bessemer.train.trainer import Trainer

Line = dict[str, Any]
WRITTEN = 4
"""Candidates per made prompt that are written, not sampled."""
ANSWERS = "judged.json"
"""File in the state with all judged answers, held-out ones included."""
SAMPLES = 6
"""Held-out answers, with their scores, written to samples.md."""


class RewardModelling(Stage[RewardModelConfig]):
    distributed = True

    def resolve(self, config: RewardModelConfig, recipe: Recipe) -> dict[str, Any]:
        setup.check_layout(recipe, config.name, [config.batch_examples or config.batch_rows], split_rows=False)
        if not config.data and not config.made:
            raise UserError(f'stage "{config.name}": nothing to judge; give data = [...] or made = 2000')
        if config.samples and not config.made:
            raise UserError(f'stage "{config.name}": samples are answers to made prompts; set made too')
        if config.judge is None and config.tasks != [General.name]:
            raise UserError(f'stage "{config.name}": only a judge can compare answers to {", ".join(config.tasks)}')
        if config.judge is not None:
            if config.aim != "helpful" or not config.made or config.samples < 2 or config.judge.samples % 2:
                raise UserError(
                    f'stage "{config.name}": a judge compares answers of the model, for aim = "helpful", in both '
                    "orders: it needs made, samples of 2 or more, and an even judge.samples"
                )
            api_key(config.name, config.judge)
        if config.heldout_data and is_changed(config, "heldout"):
            raise UserError(f'stage "{config.name}": heldout has no effect beside heldout_data; leave one of them out')
        if config.previous is not None:
            earlier = recipe.stage(config.previous)
            if not isinstance(earlier, RewardModelConfig) or earlier.aim != config.aim:
                raise UserError(
                    f'stage "{config.name}": previous = "{earlier.name}" is not a reward model for aim = '
                    f'"{config.aim}"; name one'
                )
        lineage.check_lora(config, recipe)
        return {}

    def probes(self, config: RewardModelConfig, recipe: Recipe, cache: Path) -> Iterator[Probe]:
        yield partial(_check_heldout, config, recipe)
        yield from preflight.length_probes(config, recipe, [config.source], "row_length", config.row_length)
        if config.judge is not None:
            yield from preflight.task_probes(config.tasks, config.made)
        for key, names in (("data", config.data), ("heldout_data", config.heldout_data)):
            yield from (preflight.of_key(key, partial(_counted, config, name)) for name in names)

    def work(self, config: RewardModelConfig, recipe: Recipe) -> list[StageWork]:
        written = answers(config.made * config.samples, config.max_new_tokens)
        trained = config.epochs * config.made * 100
        return [StageWork(config.name, trained=trained, sampled=written, bytes=TRAINED)]

    def training_data(
        self, config: RewardModelConfig, recipe: Recipe, folder: Path, cache: Path
    ) -> Iterator[tasks.Problem | str]:
        """The lines of its files and the problems it made answers for: a policy learns from them through rewards."""
        for line in _from_files(config, config.data):
            yield "\n".join([formats.text_of(line["prompt"]), *(line[key] for key in _keys(line))])
        yield from _problems(config, recipe)

    def run(self, config: RewardModelConfig, ctx: StageContext) -> dict[str, Any]:
        if ctx.source is None or not (ctx.source / "model").is_dir():
            raise UserError(f'stage "{ctx.name}" needs a model to start from: name its stage with from = "..."')
        setup.keep_memory()
        tokenizer = load_tokenizer(ctx.source / "model")
        if config.style is not None:
            tokenizer.chat_style = config.style
        ctx.led(lambda alone: _judge(config, alone, tokenizer))
        lines, facts = json.loads((ctx.state / ANSWERS).read_text())
        train, heldout = _split(lines, config, ctx)
        folder = ctx.source / "model"
        if config.previous is not None:
            folder = ctx.inputs[config.previous] / "model"
            if load_tokenizer(folder).fingerprint != tokenizer.fingerprint:
                raise UserError(f'stage "{ctx.name}": {config.previous} has another tokenizer than the model of from')
            replayed = _replayed(config, ctx, train, heldout)
            train, facts = [*train, *replayed], {**facts, "replayed": len(replayed)}
        new_head = ctx.seed if config.previous is None else None
        scorer = ctx.runtime.scorer(folder, new_head)
        model = setup.adapted(scorer, config, folder, ctx.seed, ctx.recipe.layout, ctx.say)
        packed = ctx.agree(lambda: _pack(config, ctx, tokenizer, train, heldout))
        kind, objective = _BY_AIM[config.aim]
        rows = preference_rows.load(ctx.state / "rows", kind, ctx.seed)
        ctx.say(f"{packed['units']} judged answers in {packed['rows']} rows, {len(heldout)} held out")
        monitor = _Monitor(config, ctx, tokenizer, heldout)
        trainer = ctx.runtime.trainer(
            model, objective, rows.batch, config, _runtime(config, rows, model, ctx), ctx.state,
            log=monitor.log, stop=lambda: ctx.stop, on_step=[monitor],
            model_config=model.cfg.model_dump(), warn=ctx.say,
        )  # fmt: skip
        monitor.train(trainer)
        scale = Scale.learn(config.aim, trainer.extras["bad"], trainer.extras["good"], tokenizer.fingerprint)
        if ctx.leads:
            tokenizer.save(ctx.state / "tokenizer")
        ctx.runtime.save(trainer, ctx.dir / "model", ctx.state / "tokenizer", files={FACTS: scale.to_json()})
        counts = {"steps": trainer.step, "trained": packed["units"], "heldout": len(heldout)}
        return counts | {"accuracy": trainer.extras["accuracy"], "too_long": packed["too_long"], **facts}


_BY_AIM = {
    "helpful": (preference_rows.PairRows, objectives.pairwise),
    "harmless": (preference_rows.LabelRows, objectives.pointwise),
}


def _judge(config: RewardModelConfig, ctx: StageContext, tokenizer: Tokenizer) -> None:
    """Saves all lines, and facts about the made ones, in the state, since sampling takes time."""
    path = ctx.state / ANSWERS
    if not path.exists():
        new, facts = _made(config, ctx, tokenizer) if config.made else ([], {})
        write_atomic(path, json.dumps([[*_from_files(config, config.data), *new], facts]))


def _pack(
    config: RewardModelConfig, ctx: StageContext, tokenizer: Tokenizer, train: Sequence[Line], heldout: Sequence[Line]
) -> dict[str, Any]:
    """Writes the judged answers, and the training ones as rows; returns the facts of the rows."""
    written = (line if isinstance(line["prompt"], str) else formats.conversational(line) for line in [*train, *heldout])
    write_atomic(ctx.dir / JUDGED, json_lines(written))
    units = (_texts(line, config.aim, tokenizer) for line in train)
    return preference_rows.build(units, config.row_length, tokenizer.pad_id, ctx.state / "rows")


def _from_files(config: RewardModelConfig, names: Sequence[str]) -> Iterator[Line]:
    for name in names:
        yield from preference_rows.read(name, _line(config))


def _counted(config: RewardModelConfig, name: str) -> str | None:
    """What a file of judged answers holds; UserError if it is empty, or all labels are the same."""
    if name.startswith(HUB):
        return sources.check(name)  # not downloaded to be counted
    marks = Counter(line.get("safe") for line in _from_files(config, [name]))
    if not marks or (config.aim == "harmless" and len(marks) < 2):
        raise UserError(
            f"{name} holds no judged answer"
            if not marks
            else f"{name}: all {marks.total()} answers have one label; add some of the other"
        )
    labels = "" if config.aim == "helpful" else f", {marks[True]:,} of them safe"
    return f"{name}: {marks.total():,} {'pairs' if config.aim == 'helpful' else 'answers'}{labels}"


def _line(config: RewardModelConfig) -> Callable[[dict[str, Any], str], Line]:
    return formats.pair if config.aim == "helpful" else formats.label


def _earlier(config: RewardModelConfig, recipe: Recipe) -> Iterator[RewardModelConfig]:
    """The reward models whose weights this one trains further, the last one first."""
    earlier: StageConfig = config
    while isinstance(earlier, RewardModelConfig) and earlier.previous is not None:
        earlier = recipe.stage(earlier.previous)
        if isinstance(earlier, RewardModelConfig):
            yield earlier


def _check_heldout(config: RewardModelConfig, recipe: Recipe) -> None:
    """UserError if answers are held out here that an earlier one was trained on."""
    for earlier in sorted(_earlier(config, recipe), key=_share):
        trained, share = {located(name).resolve() for name in earlier.data}, _share(earlier)
        lower = f"set it to {share:g}" if share else "give heldout_data"
        for key, names, fix in (
            ("heldout_data", config.heldout_data, "give other answers"),
            ("heldout", config.data if _share(config) > share else [], lower),
        ):
            if shared := [name for name in names if located(name).resolve() in trained]:
                raise UserError(
                    f'stage "{config.name}": {key} holds out answers in {shared[0]} that "{earlier.name}" was trained '
                    f"on; {fix}"
                )


def _share(config: RewardModelConfig) -> float:
    """The share of the answers in `data` that is held out."""
    return 0.0 if config.heldout_data else config.heldout


def _problems(config: RewardModelConfig, recipe: Recipe) -> list[tasks.Problem]:
    """The problems of the generated answers, after those of the reward models that it continues; half of the harmless
    model's prompts ask for something unsafe."""
    first = sum(earlier.made for earlier in _earlier(config, recipe))
    share = {"harmless_share": 0.0 if config.aim == "helpful" else 0.5}
    families = [tasks.get(name, **(share if name == General.name else {})) for name in config.tasks]
    seed = recipe.seed_of(config)
    problems = [problem for _, problem in rollout.problems_of(families, "train", first, config.made, seed)]
    if config.judge is None:
        return problems
    return [problem for problem in problems if problem.meta.get("aim", config.aim) == config.aim]


def _made(config: RewardModelConfig, ctx: StageContext, tokenizer: Tokenizer) -> tuple[list[Line], dict[str, Any]]:
    problems = _problems(config, ctx.recipe)
    answers = [
        general_quality.candidates(problem, config.aim, WRITTEN, ctx.seed)
        if problem.id.startswith(f"{General.name}/")
        else []
        for problem in problems
    ]
    if config.samples:
        prompts = [question_ids(tokenizer, problem.prompt) for problem in problems]
        seeds = [tasks.stable_hash("judged", ctx.seed, p) & (2**62 - 1) for p in range(len(prompts))]
        assert ctx.source is not None, "run() has checked it"
        folder = ctx.source / "model"
        model, _ = setup.load_model(folder, dtype=setup.choose_precision("device").dtype)
        engine = ctx.runtime.dealt(Engine(model, tokenizer, setup.workers()), folder)
        prefix = tokenizer.opening
        groups = engine.generate(
            prompts, samples=config.samples, seeds=seeds, max_new_tokens=config.max_new_tokens,
            batch_rows=setup.batch_rows(len(prompts) * config.samples),
        )  # fmt: skip
        for written, group in zip(answers, groups, strict=True):
            written += [prefix + completion.text for completion in group]
    answered = zip(problems, answers, strict=True)
    if config.aim == "harmless":
        return general_quality.labels(answered, ctx.seed)
    scores = general_quality.votes if config.judge is None else partial(_model_votes, Judge(config.judge, ctx))
    return general_quality.pairs(answered, ctx.seed, lambda text: len(tokenizer.encode(text)), scores)


def _model_votes(judge: Judge, pairs: Sequence[general_quality.Pair]) -> list[general_quality.Scores]:
    """The judge reads what the reward model will read: the summaries."""
    return judge.scores([(problem.prompt, summary(one), summary(two)) for problem, one, two, _ in pairs])


def _split(lines: Iterable[Line], config: RewardModelConfig, ctx: StageContext) -> tuple[list[Line], list[Line]]:
    """(train, held out); all lines of a prompt are on one side."""
    splits: tuple[list[Line], list[Line]] = [], [*_from_files(config, config.heldout_data)]
    for line in lines:
        splits[tasks.stable_hash("heldout", formats.text_of(line["prompt"])) < _share(config) * 2**64].append(line)
    marks = {line.get("safe") for line in splits[1]}
    if not splits[1] or (config.aim == "harmless" and marks != {True, False}):
        raise UserError(
            f'stage "{ctx.name}": {len(splits[1])} judged answers are held out, too few (of both kinds) to measure on; '
            "give more data or raise heldout or made"
        )
    return splits


REPLAY = 0.1
"""Share of the training answers taken from the previous reward model (DeepSeekMath 4.1.4)."""


def _replayed(config: RewardModelConfig, ctx: StageContext, new: Sequence[Line], heldout: Sequence[Line]) -> list[Line]:
    """Training answers of the previous reward model: a share REPLAY of the total that includes the `new` ones. None
    is among these, as those of a file that both read; no answer to a prompt of `heldout` is among them: with
    heldout_data the hash of a prompt does not say what is."""
    assert config.previous is not None
    old, _ = _split(preference_rows.read(ctx.inputs[config.previous] / JUDGED, _line(config)), config, ctx)
    apart = {formats.text_of(line["prompt"]) for line in heldout}
    lines = {json.dumps(line, sort_keys=True) for line in new}
    old = [line for line in old if formats.text_of(line["prompt"]) not in apart]
    old = [line for line in old if json.dumps(line, sort_keys=True) not in lines]
    order = sorted(old, key=lambda line: tasks.stable_hash("replay", ctx.seed, *map(line.get, sorted(line))))
    return order[: round(len(new) * REPLAY / (1 - REPLAY))]


def _texts(line: Line, aim: str, tokenizer: Tokenizer) -> list[tuple[list[int], int]]:
    """The token ids that the model reads of a line, with marks."""

    def ids(key: str) -> list[int]:
        return judged_ids(tokenizer, aim, line["prompt"], line[key])

    if aim == "helpful":
        return [(ids("chosen"), preference_rows.GOOD), (ids("rejected"), preference_rows.BAD)]
    return [(ids("response"), preference_rows.GOOD if line["safe"] else preference_rows.BAD)]


def _runtime(
    config: RewardModelConfig, rows: preference_rows.PairRows, model: LanguageModel, ctx: StageContext
) -> TrainingPlan:
    return TrainingPlan(
        counts_padding=False,
        tokens=config.epochs * rows.n_rows * config.row_length,
        batch_rows=sft_rows.batch_rows(rows, config.epochs, config.batch_rows, config.batch_examples),
        terms={"balance_alpha": constant(config.balance_alpha)},
        workers=ctx.runtime.workers(),
        compute_dtype=setup.set_precision(model, config, ctx.say_once, ctx.state, ctx.agree),
    )  # fmt: skip


class _Monitor(StepLog):
    """Metrics of every step; after the last one the held-out scores, which are stored in the checkpoint's extras."""

    def __init__(
        self, config: RewardModelConfig, ctx: StageContext, tokenizer: Tokenizer, heldout: Sequence[Line]
    ) -> None:
        super().__init__(ctx)
        self.config, self.tokenizer, self.heldout = config, tokenizer, heldout

    def __call__(self, trainer: Trainer) -> None:
        if trainer.tokens < trainer.plan.tokens:
            return
        units = [_texts(line, self.config.aim, self.tokenizer) for line in self.heldout]
        flat = score_by(trainer.collective.outputs, [ids for unit in units for ids, _ in unit], self.tokenizer.pad_id)
        scores = iter(flat)
        scored = [[(next(scores), mark) for _, mark in unit] for unit in units]
        good, bad = (
            [s for unit in scored for s, mark in unit if mark == kind]
            for kind in (preference_rows.GOOD, preference_rows.BAD)
        )
        accuracy = fmean(map(_right, scored))
        trainer.extras = {"good": good, "bad": bad, "accuracy": accuracy}
        values = {"reward/accuracy": accuracy, "reward/good": fmean(good), "reward/bad": fmean(bad)}
        self.ctx.metrics.write(trainer.step, trainer.tokens, values)
        for line, unit in list(zip(self.heldout, scored, strict=True))[:SAMPLES]:
            texts = [f"{line[key]}\n[{score:+.2f}]" for key, (score, _) in zip(_keys(line), unit, strict=True)]
            self.ctx.sample(trainer.step, trainer.tokens, "\n\n".join([formats.text_of(line["prompt"]), *texts]))


def _right(unit: list[tuple[float, int]]) -> bool:
    """Whether the chosen text scores higher, or a labelled one is on its side of 0."""
    if len(unit) == 2:
        return unit[0][0] > unit[1][0]
    ((score, mark),) = unit
    return (score > 0) == (mark == preference_rows.GOOD)


def _keys(line: Line) -> tuple[str, ...]:
    return ("response",) if "response" in line else ("chosen", "rejected")
