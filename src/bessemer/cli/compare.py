"""Commands that compare two things: two models, or a recipe or RL step with a changed version of itself."""

import contextlib
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from bessemer.cli.common import AsJson, NoVerify, app, one_line, print_json
from bessemer.cli.runs import check_used, chosen, print_table
from bessemer.errors import UserError

Side = Annotated[
    str,
    typer.Argument(
        metavar="MODEL[,MODEL]",
        help="A model directory, a run, or RUN/STAGE; for one model trained with several seeds, all of them.",
    ),
]

RunStage = Annotated[str, typer.Argument(metavar="RUN[/STAGE]", help="A run; add the stage if several are of kind rl.")]


@app.command()
def compare(
    first: Side,
    second: Side,
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="Evaluate both on this task now, such as countdown; may be repeated. Default: their runs' evaluations."
        ),
    ] = None,
    problems: Annotated[int | None, typer.Option(min=1, help="Held-out problems per task. Default: 100.")] = None,
    skip: Annotated[
        int | None, typer.Option(min=0, help="Leave out the first held-out problems of each task. Default: 0.")
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Answers per problem. Default: 8.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0.0, help="Default: 1.")] = None,
    top_p: Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Nucleus threshold. Default: 1.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Maximum tokens per answer. Default: 200.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Same seed, same answers. Default: 0.")] = None,
    measure: Annotated[
        str,
        typer.Option(
            help="pass@1; readable: share of answers that a person can read; language: share of the words of their "
            "thoughts in the question's language."
        ),
    ] = "pass@1",
    only: Annotated[
        list[str] | None,
        typer.Option(help="Compare on this task only; may be repeated. Default: all that both were asked."),
    ] = None,
    common: Annotated[
        bool, typer.Option("--common", help="If the two were asked different problems, compare on those in common.")
    ] = False,
    no_verify: NoVerify = False,
    as_json: AsJson = False,
) -> None:
    """Test whether one model is better than another, problem by problem: the difference in pass@1, or in another
    measure, with its confidence interval."""
    from bessemer.eval import paired
    from bessemer.runs.directory import model_dir

    options = {"problems": problems, "skip": skip, "samples": samples, "temperature": temperature, "top_p": top_p,
               "max_new_tokens": max_tokens, "seed": seed}  # fmt: skip
    check_used("--task", task, options)
    sides = [[model_dir(name.strip()) for name in side.split(",")] for side in (first, second)]
    if same := {folder.resolve() for folder in sides[0]} & {folder.resolve() for folder in sides[1]}:
        raise UserError(f"{min(same)} is on both sides; compare it with another model")

    def rows(folder: Any) -> list[dict[str, Any]]:
        if not task:
            return paired.evaluated(folder)
        from bessemer.eval import evaluate

        return evaluate.evaluate(folder, names=task, **chosen(options))

    one, other = ([paired.rates(rows(folder), str(folder), measure) for folder in side] for side in sides)
    lines, differing = paired.compare(one, other, common, only or []), paired.left_out(one, other, only or [])
    if as_json:
        facts = {"first": first, "second": second, "measure": measure, "rows": paired.facts(lines)}
        print_json(facts | {"left_out": differing})
    else:
        print_table(paired.table(lines, first, second, measure))
        for line in differing:
            print(one_line(line))


@app.command()
def whatif(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE|RUN", help="The recipe of a run, or one derived from it; or the run.")
    ],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="STAGE.KEY=VALUE", help="A change; may be repeated.")
    ] = None,
    run: Annotated[
        str | None, typer.Option(metavar="RUN", help="The existing run. Default: the run given, or runs/NAME.")
    ] = None,
    usd: Annotated[float | None, typer.Option(min=0.0, help="Price of this machine per hour, in dollars.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show which stages of a run a change would rerun, with time, memory and price. Nothing is run or moved."""
    from bessemer.config.builtin import run_of
    from bessemer.config.recipe import Recipe
    from bessemer.plan import whatif as fates
    from bessemer.runs.directory import run_dir

    loaded = Recipe.load(recipe, set_ or [])
    root = run_of(recipe) or Path("runs") / loaded.name if run is None else run_dir(run)
    answer = fates.whatif(loaded, root, usd)
    if as_json:
        print_json(answer.facts())
    else:
        print(answer.describe())


@app.command()
def replay(
    run: Annotated[str, typer.Argument(metavar="RUN[/STAGE]", help="A run; add the stage if several are of kind rl.")],
    step: Annotated[int, typer.Option(min=1, help="Optimizer step; all steps of its rollout are replayed.")],
    rollouts: Annotated[int, typer.Option(min=1, help="Rollouts to replay from there on.")] = 1,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Replay once more with this key changed; may be repeated."),
    ] = None,
    from_start: Annotated[
        bool,
        typer.Option(
            "--from-start",
            help="If no checkpoint before the step is kept: start at the stage's beginning, however long it takes.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Replay an RL step of a run bit for bit: rollouts, rewards, gradients; then with a setting changed, side by side.
    The run itself is not touched."""
    from bessemer.pipeline import replay as replays
    from bessemer.report import replay_text
    from bessemer.runs.context import Interrupted

    root, name = _stage_of(run)
    try:
        found = replays.replay(root, name, step, rollouts, set_ or [], from_start)
    except Interrupted:
        print("stopped; the run is as it was", file=sys.stderr)
        raise typer.Exit(130) from None
    if as_json:
        print_json(found.facts())
    else:
        print(replay_text.describe(found))
    if any(found.differences()):
        raise typer.Exit(1)


@app.command()
def why(
    run: RunStage,
    problems: Annotated[int, typer.Option(min=8, help="Held-out problems.")] = 64,
    samples: Annotated[int, typer.Option(min=4, help="Answers per problem and model.")] = 16,
    as_json: AsJson = False,
) -> None:
    """Show why the reward of an RL stage rose: which ways of answering it chose, what each earned, what was new."""
    from bessemer.pipeline import why as causes
    from bessemer.report import card
    from bessemer.report import why as words

    root, name = _stage_of(run)
    stage, found = causes.explain(root, name, problems, samples)
    report = card.write(root)
    if as_json:
        print_json({"stage": stage} | found.facts())
    else:
        print(words.describe(stage, found))
        print(f"\n{report}")


def _stage_of(run: str) -> tuple[Path, str | None]:
    """The run directory and the stage of RUN[/STAGE], where STAGE is a stage's name or that of its folder."""
    from bessemer.runs.directory import run_dir, stage_folders

    try:
        return run_dir(run), None
    except UserError:
        path = Path(run)
        with contextlib.suppress(UserError):
            root = run_dir(path.parent)
            named = {folder.name: name for _, name, folder in stage_folders(root)}
            return root, named.get(path.name, path.name)
        raise
