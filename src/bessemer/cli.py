"""The command line: one verb per thing a user wants.

Nothing heavy is imported before a command has its arguments, so `bessemer --help` is instant. Figures go to standard
output (as JSON with --json), everything else to standard error. Exit status: 0 done, 2 a mistake the user can mend
(`error: ...`), 130 stopped by a signal with everything saved.
"""

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from bessemer import __version__
from bessemer.errors import UserError

app = typer.Typer(
    help="From documents to a reasoning model: DeepSeek-V3 pre-training and R1-Zero in one run.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A model directory, or a run: its last finished model.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Seed = Annotated[int, typer.Option(help="Same seed, same text.")]
Drafts = Annotated[int, typer.Option(min=0, max=8, help="Tokens that the MTP module guesses ahead at each step.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")]


class YesNo(StrEnum):
    yes = "yes"
    no = "no"


class Dtype(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Format(StrEnum):
    hf = "hf"
    gguf = "gguf"


def main() -> None:
    """The program `bessemer`."""
    try:
        app()
    except UserError as error:
        print("error: " + " ".join(str(error).split("\n")), file=sys.stderr)
        sys.exit(2)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"bessemer {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    pass


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe, such as recipes/tiny.toml.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="STAGE.KEY=VALUE", help="Override a key; may be repeated.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The run's directory. Default: runs/NAME.")] = None,
    until: Annotated[str | None, typer.Option(metavar="STAGE", help="Stop after this stage.")] = None,
    reuse: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Copy finished stages from this run where they would be equal.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run a recipe; what is finished is skipped, what was interrupted goes on."""
    from bessemer.recipe import conformance
    from bessemer.recipe.rundir import writing_models
    from bessemer.recipe.runner import run as run_recipe
    from bessemer.recipe.schema import Recipe
    from bessemer.recipe.stage import Interrupted
    from bessemer.recipe.values import show_seconds
    from bessemer.report import card

    loaded = Recipe.load(recipe, set_ or [])
    root = out or Path("runs") / loaded.name
    try:
        results = run_recipe(loaded, out, until, conformance=conformance.rows, reuse=reuse)
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(130)
    report = card.write(root)
    if as_json:
        stages = [
            {"name": result.name, "kind": result.kind, "status": result.status, "seconds": result.seconds,
             "summary": result.summary, "directory": str(result.folder)}
            for result in results
        ]  # fmt: skip
        _print_json({"name": loaded.name, "directory": str(root), "report": str(report), "stages": stages})
        return
    if table := card.table(root):
        print(table)
    print(f"{loaded.name}: {show_seconds(sum(result.seconds for result in results))} in all; report: {report}")
    if models := writing_models(root):
        others = [name for name, _ in models[:-1]]
        which = f" (or bessemer chat {root}/STAGE: {', '.join(others)})" if others else ""
        print(f"talk to {models[-1][0]}: bessemer chat {root}{which}")


@app.command()
def report(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's directory, or its name under runs/.")],
    open_: Annotated[YesNo, typer.Option("--open", help="Show it in the browser.")] = YesNo.no,
) -> None:
    """Write the run's report card, one HTML file."""
    from bessemer.recipe.rundir import run_dir
    from bessemer.report import card

    path = card.write(run_dir(run))
    print(path)
    if open_ is YesNo.yes:
        typer.launch(str(path))


@app.command()
def doctor(
    folder: Annotated[Path, typer.Option("--folder", help="Where runs would be kept.")] = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """What this machine is good for, and what will be slow on it."""
    from bessemer.report import doctor as machine

    facts = machine.examine(folder)
    if as_json:
        _print_json(facts)
    else:
        print(machine.describe(facts))


@app.command("eval")
def evaluate(
    model: Model,
    task: Annotated[list[str] | None, typer.Option(help="A task, such as countdown; may be repeated.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Answers per problem. Default: 8.")] = None,
    problems: Annotated[int | None, typer.Option(min=1, help="Held-out problems per task. Default: 100.")] = None,
    k: Annotated[int | None, typer.Option("--k", min=1, help="k of pass@k and maj@k. Default: all answers.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0.0, help="Default: 1; 0 takes the likeliest token.")] = None,
    top_p: Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Nucleus. Default: 1 (R1: 0.95).")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens per answer, at most. Default: 200.")] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same answers. Default: 0.")] = None,
    lm_eval: Annotated[
        str | None, typer.Option("--lm-eval", metavar="TASK[,TASK]", help="Tasks of lm-eval, after those of --task.")
    ] = None,
    include: Annotated[Path | None, typer.Option(help="Folder of your own lm-eval tasks; code in them runs.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions per lm-eval task. Default: all.")] = None,
    chat: Annotated[YesNo | None, typer.Option(help="Ask lm-eval's questions in the model's chat template.")] = None,
    as_json: AsJson = False,
) -> None:
    """pass@1, pass@k and maj@k on held-out problems, and lm-eval's tasks, with 95 % intervals."""
    from bessemer.recipe.rundir import model_dir

    ours = {"samples": samples, "problems": problems, "k": k, "temperature": temperature, "top_p": top_p,
            "max_new_tokens": max_tokens, "seed": seed}  # fmt: skip
    theirs = {"include": include, "limit": limit, "chat": None if chat is None else chat is YesNo.yes}
    _check_used("--task", task, ours)
    _check_used("--lm-eval", lm_eval, theirs)
    if not task and not lm_eval:
        raise UserError("nothing to evaluate on: name a task with --task (bessemer eval MODEL --task countdown)")
    folder, rows = model_dir(model), []
    from bessemer.recipe import evaluate as evaluation

    if task:
        rows += evaluation.evaluate(folder, names=task, **_given(ours))
    if lm_eval:
        names = [name.strip() for name in lm_eval.split(",") if name.strip()]
        rows += evaluation.evaluate_lm_eval(folder, names=names, **_given(theirs))
    if as_json:
        _print_json({"model": str(folder), "rows": rows})
        return
    from rich.console import Console

    from bessemer.recipe.results import table

    Console(width=None if sys.stdout.isatty() else 200).print(table(rows))


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _check_used(what_for: str, wanted: Any, options: dict[str, Any]) -> None:
    """Refuse options that could have no effect."""
    if not wanted and (given := _given(options)):
        name = next(iter(given)).replace("max_new_tokens", "max_tokens").replace("_", "-")
        raise UserError(f"--{name} has no effect without {what_for}; add {what_for}, or leave it out")


@app.command()
def generate(
    model: Model,
    prompts: Annotated[list[str] | None, typer.Argument(metavar="[PROMPT]...", help="Texts to go on from.")] = None,
    file: Annotated[
        Path | None, typer.Option(help='More prompts: one a line, or {"prompt": "..."} a line in a .jsonl file.')
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="At most so many new tokens each.")] = 128,
    temperature: Temperature = 1.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Nucleus; 1 keeps all tokens.")] = 1.0,
    drafts: Drafts = 0,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Continue texts."""
    from bessemer.infer.generate import generate_texts, read_prompts
    from bessemer.recipe.rundir import model_dir

    texts_to_continue = [*(prompts or []), *(read_prompts(file) if file else [])]
    if not texts_to_continue:
        raise UserError("no prompt: write one after the model, or name a file of them with --file")
    folder = model_dir(model)
    texts = generate_texts(folder, texts_to_continue, max_new_tokens=max_tokens, temperature=temperature, top_p=top_p,
                           drafts=drafts, seed=seed)  # fmt: skip
    if as_json:
        pairs = zip(texts_to_continue, texts, strict=True)
        _print_json([{"prompt": prompt, "text": text} for prompt, text in pairs])
        return
    for prompt, text in zip(texts_to_continue, texts, strict=True):
        print(prompt + text + "\n")


@app.command()
def chat(
    model: Model,
    max_tokens: Annotated[int, typer.Option(min=1, help="At most so many new tokens per answer.")] = 256,
    temperature: Temperature = 0.6,
    drafts: Drafts = 0,
    seed: Seed = 0,
) -> None:
    """Talk to a model."""
    from bessemer.infer.chat import chat as talk
    from bessemer.recipe.rundir import model_dir

    talk(model_dir(model), max_new_tokens=max_tokens, temperature=temperature, drafts=drafts, seed=seed)


@app.command()
def convert(
    src: Annotated[Path, typer.Argument(metavar="SRC", help="A Hugging Face model directory.")],
    dst: Annotated[Path, typer.Argument(metavar="DST", help="Where to write the new one.")],
    to: Annotated[Format, typer.Option("--to", help="hf: a directory; gguf: one file for llama.cpp.")] = Format.hf,
    mtp: Annotated[
        bool | None, typer.Option("--mtp/--no-mtp", help="Keep the multi-token-prediction layers. Default: hf yes.")
    ] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Number format. Default: as it is.")] = None,
) -> None:
    """Rewrite a model directory: FP8 to plain, with or without MTP, another dtype, or as a GGUF file."""
    wanted = dtype.value if dtype else None
    if to is Format.gguf:
        if mtp:
            raise UserError("--mtp: a GGUF file of this architecture has no place for MTP layers; leave --mtp out")
        from bessemer.model.gguf_writer import write

        write(src, dst, wanted)
    else:
        from bessemer.model.hub import convert as rewrite

        rewrite(src, dst, mtp=mtp is not False, dtype=wanted)
    print(dst)


@app.command()
def keys(
    kind: Annotated[str | None, typer.Argument(metavar="[KIND]", help="One stage kind. Default: all.")] = None,
) -> None:
    """Every key a recipe may have, its default and what it does."""
    from bessemer.recipe.help import describe_keys

    print(describe_keys(kind))


def _print_json(facts: Any) -> None:
    print(json.dumps(facts, ensure_ascii=False, indent=1))
