"""Commands that generate text: for prompts, in a chat on the terminal, over HTTP."""

import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bessemer.addons.families.options import Drafts, Model, NoVerify, Seed, Temperature, TopP, read_prompts
from bessemer.cli.common import AsJson, print_json
from bessemer.errors import UserError
from bessemer.escape import escaped

if TYPE_CHECKING:
    from bessemer.engine.generation import Completion


class Reasoning(StrEnum):
    auto = "auto"
    deepseek = "deepseek"
    none = "none"
    hidden = "hidden"


def generate(
    model: Model,
    prompts: Annotated[list[str] | None, typer.Argument(metavar="[PROMPT]...", help="Texts to continue.")] = None,
    file: Annotated[
        Path | None, typer.Option(help='More prompts: one per line, or {"prompt": "..."} in a .jsonl file.')
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Maximum new tokens per text. Default: the rest of the context, up to 2048."),
    ] = None,
    temperature: Temperature = 1.0,
    top_p: TopP = 1.0,
    drafts: Drafts = 0,
    seed: Seed = 0,
    no_verify: NoVerify = False,
    as_json: AsJson = False,
) -> None:
    """Continue texts."""
    from bessemer.addons.families.named_models import model_dir
    from bessemer.engine.engine import load_engine
    from bessemer.engine.generation import NEW_TOKENS

    begun = [*(prompts or []), *(read_prompts(file) if file else [])]
    if not begun:
        raise UserError("no prompt: write one after the model, or name a file of them with --file")
    engine = load_engine(model_dir(model), drafts)
    groups = engine.generate(begun, max_new_tokens=max_tokens or NEW_TOKENS, temperature=temperature, top_p=top_p,
                             drafts=drafts, seed=seed)  # fmt: skip
    texts = [completion for (completion,) in groups]
    if as_json:
        print_json([{"prompt": prompt, "text": one.text, "finish_reason": one.finish_reason}
                    for prompt, one in zip(begun, texts, strict=True)])  # fmt: skip
    else:
        for prompt, one in zip(begun, texts, strict=True):
            print(escaped(prompt + one.text) + "\n")
    for note in _about_cuts(texts, max_tokens, engine.model.cfg.max_seq_len):
        print(note, file=sys.stderr)


def _about_cuts(completions: Sequence["Completion"], max_tokens: int | None, context: int) -> list[str]:
    """What a user should know about texts that were cut off. `asked`: the option --max-tokens."""
    from bessemer.engine.generation import NEW_TOKENS

    rooms = [context - completion.prompt_tokens for completion in completions]
    cut = [
        (completion, room)
        for completion, room in zip(completions, rooms, strict=True)
        if completion.finish_reason == "length"
    ]
    full = sum(len(completion.tokens) >= room for completion, room in cut)
    of = f" of {len(completions)} texts" if len(completions) > 1 else " text"
    notes = []
    if max_tokens is not None and max_tokens > min(rooms):
        notes.append(f"--max-tokens {max_tokens}: the context of {context} tokens leaves {min(rooms)} after the prompt")
    if len(cut) > full:
        more = f"--max-tokens, here at most {max(rooms)}, allows more"
        notes.append(f"{len(cut) - full}{of} cut at {max_tokens or NEW_TOKENS} tokens; {more}")
    if full:
        notes.append(f"{full}{of} cut where the model's context of {context} tokens is full")
    return notes


def chat(
    model: Model,
    system: Annotated[str, typer.Option(help="System message; /system changes it.")] = "",
    alone: Annotated[
        bool | None,
        typer.Option(
            "--alone/--no-alone",
            help="Answer each question without the conversation before it; /alone switches. Default: if the model was "
            "trained on single questions.",
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Maximum new tokens per answer. Default: the rest of the context, up to 2048."),
    ] = None,
    temperature: Temperature = 0.6,
    top_p: TopP = 0.95,
    drafts: Drafts = 0,
    seed: Seed = 0,
    no_verify: NoVerify = False,
) -> None:
    """Talk to a model. /help in the conversation lists its commands."""
    from bessemer.addons.families.named_models import model_dir
    from bessemer.addons.serve import trained_on
    from bessemer.addons.serve.terminal_chat import chat as talk

    folder = model_dir(model)
    single = trained_on.of_model(folder).multi_turn is False
    talk(
        folder, system=system, alone=single if alone is None else alone, max_new_tokens=max_tokens,
        temperature=temperature, top_p=top_p, drafts=drafts, seed=seed,
    )  # fmt: skip


def serve(
    model: Model,
    host: Annotated[str, typer.Option(help="Address to serve at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 picks a free one.")] = 8000,
    no_verify: NoVerify = False,
    api_key: Annotated[
        str | None, typer.Option(envvar="BESSEMER_API_KEY", help="Key that every client must send.")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Answers generated in parallel, per model.")] = 64,
    waiting: Annotated[int, typer.Option(min=0, help="Answers that may queue; more are rejected with 429.")] = 256,
    cache_tokens: Annotated[int | None, typer.Option(min=1, help="Capacity of a model's KV cache in tokens.")] = None,
    drafts: Drafts = 0,
    batch_invariant: Annotated[
        bool, typer.Option("--batch-invariant", help="The same seed gives the same answer in any batch, in BF16 too.")
    ] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads per model. Default: all cores but one.")] = None,
    loaded: Annotated[int, typer.Option(min=1, help="Models in memory at once.")] = 4,
    origin: Annotated[
        list[str] | None, typer.Option(help="A web origin whose pages may call the API; may be repeated.")
    ] = None,
    reasoning_format: Annotated[Reasoning, typer.Option(help="Where thoughts go in an answer.")] = Reasoning.auto,
    drain: Annotated[
        float, typer.Option(min=0.0, help="Seconds to finish running answers after a stop signal.")
    ] = 30.0,
    force: Annotated[bool, typer.Option("--force", help="Serve other machines without an API key.")] = False,
) -> None:
    """Serve the models of a run: an OpenAI-compatible API and a chat page."""
    from bessemer.addons.serve import ServeConfig
    from bessemer.addons.serve.server import serve as run_server

    config = ServeConfig(
        rows=rows, waiting=waiting, cache_tokens=cache_tokens, drafts=drafts, threads=threads,
        batch_invariant=batch_invariant, loaded=loaded, api_key=api_key, origins=tuple(origin or ()),
        reasoning_format=reasoning_format.value,
    )  # fmt: skip
    run_server(model, host=host, port=port, config=config, drain_seconds=drain, force=force)
