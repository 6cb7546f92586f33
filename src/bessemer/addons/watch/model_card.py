"""The model card that `bessemer push` and `pack` write: what made the model, on what data, and how well it does."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from bessemer import __version__
from bessemer.addons.evals import tables
from bessemer.addons.families.modelfile import style_of
from bessemer.addons.watch import chinese
from bessemer.addons.watch.facts import RunFacts, StageFacts, read
from bessemer.config.kinds import starts_from
from bessemer.config.units import show_seconds, show_tokens
from bessemer.data.model_files import read_object
from bessemer.hf.mapping import FAMILIES, is_reward_model

TAGS = ["bessemer", "reasoning"]
MLA_KERNELS = (512, 64)
"""Latent and rotary width for which vLLM and SGLang have MLA kernels (docs/guide.md)."""


def model_card(model: Path, name: str, licence: str | None, packed: bool = False) -> str:
    """The card of a model directory, in Markdown. A model that belongs to a run gets the run's facts, any other only
    those of its config. `packed`: it comes as NAME.tar and not from the hub."""
    config = read_object(model / "config.json")
    kind = "text-classification" if is_reward_model(config) else "text-generation"
    tags = [*TAGS, *filter(None, [config.get("model_type")])]
    head = {"license": licence or "other", "library_name": "transformers", "pipeline_tag": kind}
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in (head | {"tags": tags}).items()), "---", ""]
    lines += [f"# {name}", "", "[中文](#中文)", ""]
    about = [_network(config), ""]
    folder = model.resolve().parent
    # a recipe.toml above a model proves nothing: it may be of another run or another program
    of_run = (folder / "done.json").is_file() and (folder.parent / "recipe.toml").is_file()
    facts = read(folder.parent) if of_run else None
    stage = (
        next((candidate for candidate in facts.stages if candidate.folder.resolve() == folder), None) if facts else None
    )
    if facts and stage:
        about += _of_run(facts, stage)
    about += _use(model, config, name, packed)
    about += [f"Written by Bessemer {__version__}{' from the records of the run' if stage else ''}.", ""]
    return "\n".join([*lines, *about, *_in_chinese(about)])


def _in_chinese(lines: list[str]) -> list[str]:
    """The same in Chinese, under a heading of its own; commands and the recipe are not repeated."""
    said = ["## 中文", ""]
    for line in re.sub(r"(?ms)^(`{3,})\w*\n.*?^\1\n", "", "\n".join(lines)).split("\n"):
        if line.startswith("## "):
            said.append(f"### {chinese.said(line[3:])}")
        elif line.startswith("| "):
            said.append(f"| {' | '.join(map(chinese.said, line[2:-2].split(' | ')))} |")
        elif line or said[-1]:
            said.append(chinese.said(line))
    return said


def _network(config: dict[str, Any]) -> str:
    shape = f"{config.get('num_hidden_layers')} layers of width {config.get('hidden_size')}"
    if experts := config.get("n_routed_experts"):
        shape += f", {experts} routed experts ({config.get('num_experts_per_tok')} per token)"
    name, context = (config.get("architectures") or ["?"])[0], config.get("max_position_embeddings")
    return f"`{name}` with {shape}, a vocabulary of {config.get('vocab_size')} and a context of {context} tokens."


def _use(model: Path, config: dict[str, Any], name: str, packed: bool) -> list[str]:
    """Commands to chat with the model and to serve it; those of other programs follow their documentation."""
    pull, folder = (f"bessemer pull {name}.tar", name) if packed else (f"bessemer pull {name} model", "model")
    if is_reward_model(config):
        note = "It is a reward model: it scores a conversation at the last token, and answers nothing."
        return ["## Use", "", "```", pull, "```", "", note, ""]
    r1 = style_of(model) == "r1"
    vllm = f"vllm serve {name}{' --reasoning-parser deepseek_r1' if r1 else ''}"
    sglang = f"python -m sglang.launch_server --model-path {name}{' --reasoning-parser deepseek-r1' if r1 else ''}"
    commands, notes = [f"{pull} && bessemer chat {folder}"], []
    latent = (config.get("kv_lora_rank"), config.get("qk_rope_head_dim"))
    if config.get("model_type") not in FAMILIES:
        commands += [vllm, sglang]
    elif not latent[0]:
        notes.append("Its attention has no latent, so no other program can serve it.")
    else:
        fits = latent == MLA_KERNELS
        commands += [vllm, sglang] if fits else [f"VLLM_MLA_DISABLE=1 {vllm}"]
        commands.append(f"bessemer convert {folder} model.gguf && ollama create my-model -f model.Modelfile")
        if not fits:
            wide, shape = ("{} + {}".format(*sizes) for sizes in (MLA_KERNELS, latent))
            notes.append(
                f"The MLA kernels of vLLM and SGLang are written for latents of {wide}; this model has {shape}."
            )
    notes.append("The commands of other programs come from their documentation and were not run with this model.")
    return ["## Use", "", "```", *commands, "```", "", *notes, ""]


def _of_run(facts: RunFacts, stage: StageFacts) -> list[str]:
    chain = " → ".join(_lineage(facts, stage))
    lines = [f"It is the stage `{stage.name}` of a run that took {show_seconds(facts.seconds)}: {chain}.", ""]
    lines += [*_scores(facts, stage), *_data(facts, stage)]
    fence = "`" * 4  # a recipe may quote three
    recipe = re.sub(r"(?m)^folder = .*\n", "", facts.recipe_text).rstrip()  # a path of the machine where it ran
    lines += ["## Recipe", "", "`bessemer run recipe.toml` with this file reproduces it.", ""]
    return [*lines, f"{fence}toml", recipe, fence, ""]


def _lineage(facts: RunFacts, stage: StageFacts) -> list[str]:
    """The stages from the first to this one, each starting from the one before."""
    by_name, chain = {other.name: other for other in facts.stages}, [stage.name]
    while (source := _source(by_name[chain[0]])) in by_name and source not in chain:
        chain.insert(0, source)
    return chain


def _source(stage: StageFacts) -> str:
    return stage.source if starts_from(stage.kind) else ""


def _scores(facts: RunFacts, stage: StageFacts) -> list[str]:
    rows = [row for row in facts.evaluations if row.get("model") == stage.name]
    by_task = [models for tasks in tables.by_sampling(rows).values() for models in tasks.values()]
    if not by_task:
        return ["The run did not evaluate it.", ""]
    lines = ["## Evaluation", "", "On problems of the test split.", ""]
    lines += ["| task | language | T | pass@1 (95 % interval) | problems | samples |", "|---|---|---|---|---|---|"]
    return [*lines, *(_score(row) for models in by_task for row in models.values()), ""]


def _score(row: dict[str, Any]) -> str:
    score = f"{100 * row['pass_at_1']:.1f} %"
    if row.get("pass_at_1_interval"):
        score += " ({:.1f}-{:.1f})".format(*(100 * end for end in row["pass_at_1_interval"]))
    top_p = row.get("top_p") or 1
    task = ", ".join(filter(None, (row.get("task"), "" if top_p == 1 else f"top-p {top_p:g}", tables.before(row))))
    cells = [task, row.get("language", ""), row.get("temperature", ""), score]
    cells += [row.get("n", ""), row.get("samples", row.get("k", ""))]
    # a user's text before the question may hold what ends a cell or a line
    return "| " + " | ".join(" ".join(str(cell).replace("|", "\\|").split()) for cell in cells) + " |"


def _corpora(facts: RunFacts, stage: StageFacts) -> list[StageFacts]:
    """The corpora that it or a stage before it was trained on."""
    by_name, queue, visited = {other.name: other for other in facts.stages}, [stage.name], set[str]()
    while queue:
        if (name := queue.pop()) in by_name and name not in visited:
            visited.add(name)
            table = by_name[name].settings
            samples = table.get("samples")  # of SFT stages a list of stages, of others a number
            queue += [_source(by_name[name]), str(table.get("corpus")), *(samples if isinstance(samples, list) else ())]
    return [other for other in facts.stages if other.name in visited and other.kind == "corpus"]


def _data(facts: RunFacts, stage: StageFacts) -> list[str]:
    from bessemer.data import sources

    tables = [corpus.settings for corpus in _corpora(facts, stage)]
    parts = [
        (part, source, table.get("limits") or {})
        for table in tables
        for part, source in (table.get("parts") or {}).items()
    ]
    if not parts:
        return []
    lines = ["## Training data", "", "| part | source | at most | licence |", "|---|---|---|---|"]
    for part, source, limits in parts:
        listed = sources.registered().get(str(source))
        written = "written by Bessemer" if str(source).startswith("task:") else "not recorded"
        most = limits.get(part, "all")
        most = show_tokens(most) if isinstance(most, int) else most
        lines.append(f"| {part} | `{source}` | {most} tokens | {written if listed is None else listed.licence} |")
    return [*lines, ""]
