"""Commands that evaluate a model, or compare two."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from bessemer.addons.families.options import NoVerify, YesNo
from bessemer.cli.common import AsJson, one_line, print_json
from bessemer.cli.runs import check_used, chosen, print_table
from bessemer.errors import UserError

Side = Annotated[
    str,
    typer.Argument(
        metavar="MODEL[,MODEL]",
        help="A model directory, a run, or RUN/STAGE; for one model trained with several seeds, all of them.",
    ),
]


class ShotChoice(StrEnum):
    worked = "worked"
    direct = "direct"
    other_language = "other-language"
    fables = "fables"


def evaluate(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="A model directory, or a run: its main model, by default the last; for a suite also the address of a "
            "server with an OpenAI-compatible API, such as http://127.0.0.1:8000/v1.",
        ),
    ] = None,
    task: Annotated[list[str] | None, typer.Option(help="A task, such as countdown; may be repeated.")] = None,
    suite: Annotated[
        str | None, typer.Option(help="Published evaluations and their sampling: r1. Can be resumed.")
    ] = None,
    only: Annotated[
        str | None, typer.Option(metavar="NAME[,NAME]", help="Evaluations of the suite. Default: all.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FOLDER|NAME=PATH|hf://",
            help="Data of the suite: a folder of NAME.jsonl, .csv or .parquet; for one evaluation, a path or an hf:// "
            "address; hf://: the public data sets. May be repeated. Default: data/evals.",
        ),
    ] = None,
    answers: Annotated[
        Path | None, typer.Option(help="Score these answers, a file or a folder of NAME.jsonl, instead of a model's.")
    ] = None,
    served_model: Annotated[
        str | None, typer.Option(metavar="NAME", help="The server's name of the model. Default: its only one.")
    ] = None,
    api_key_env: Annotated[
        str | None, typer.Option(metavar="VARIABLE", help="Environment variable with the server's key. Default: none.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the suite's answers. Default: evals/SUITE/MODEL.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Answers per problem. Default: 8, or the suite's.")] = None,
    problems: Annotated[
        int | None, typer.Option(min=1, help="Held-out problems per task. Default: 100, or all of the suite's.")
    ] = None,
    skip: Annotated[
        int | None, typer.Option(min=0, help="Leave out the first held-out problems of each task. Default: 0.")
    ] = None,
    k: Annotated[int | None, typer.Option("--k", min=1, help="k of pass@k and maj@k. Default: all answers.")] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="Default: 1, or the suite's; 0 picks the most likely token.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Nucleus threshold. Default: 1, or the suite's.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Maximum tokens per answer. Default: 200, or the suite's.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Same seed, same answers. Default: 0.")] = None,
    shots: Annotated[int | None, typer.Option(min=0, help="Worked examples before the question. Default: 0.")] = None,
    shot_kind: Annotated[
        ShotChoice | None, typer.Option(help="What the examples are; the others are controls. Default: worked.")
    ] = None,
    prefix: Annotated[str | None, typer.Option(metavar="TEXT", help="Text before every question.")] = None,
    lm_eval: Annotated[
        str | None, typer.Option("--lm-eval", metavar="TASK[,TASK]", help="Tasks of lm-eval, after those of --task.")
    ] = None,
    include: Annotated[Path | None, typer.Option(help="Folder of your own lm-eval tasks; their code is run.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions per lm-eval task. Default: all.")] = None,
    chat: Annotated[YesNo | None, typer.Option(help="Ask lm-eval's questions in the model's chat template.")] = None,
    no_verify: NoVerify = False,
    as_json: AsJson = False,
) -> None:
    """Evaluate a model: pass@1, pass@k and maj@k on held-out problems, published evaluations, and lm-eval's tasks."""
    from bessemer.addons.families.named_models import model_dir

    task_options = {"samples": samples, "problems": problems, "k": k, "temperature": temperature, "top_p": top_p,
            "max_new_tokens": max_tokens, "seed": seed}  # fmt: skip
    first_pages = {"count": shots, "kind": shot_kind and shot_kind.value, "prefix": prefix}
    lm_eval_options = {"include": include, "limit": limit, "chat": None if chat is None else chat is YesNo.yes}
    of_suite = {"only": only, "data": data, "answers": answers, "out": out}
    check_used("--task", task or suite, task_options)
    check_used("--task", task, {"skip": skip, "shots": shots, "shot_kind": shot_kind, "prefix": prefix})
    check_used("--shots", shots, {"shot_kind": shot_kind})
    check_used("--lm-eval", lm_eval, lm_eval_options)
    check_used("--suite", suite, of_suite)
    if lm_eval is not None and not _names(lm_eval):
        raise UserError("--lm-eval names no task; write names with commas between them, such as arc_easy,gsm8k")
    if not task and not lm_eval and not suite:
        raise UserError("nothing to evaluate on: name a task with --task (bessemer eval MODEL --task countdown)")
    if (model is None) == (answers is None):
        raise UserError("name either a model, or a file of answers with --answers")
    check_used("MODEL", model, {name: value for name, value in task_options.items() if name not in ("problems", "k")})
    address = model if model is not None and model.startswith(("http://", "https://")) else None
    check_used("the address of a server", address, {"served_model": served_model, "api_key_env": api_key_env})
    if address is not None and not suite:
        raise UserError("a server answers the evaluations of a suite; add --suite r1, or name a model directory")
    folder, rows = None if model is None or address is not None else model_dir(model), []
    from bessemer.addons.evals import evaluate as evaluation

    if suite:
        if task or lm_eval or k:
            raise UserError("--suite cannot be combined with --task, --lm-eval or --k; make two calls")
        from bessemer.addons.evals import suite_run
        from bessemer.addons.evals.endpoint import Endpoint

        asked = folder if address is None else Endpoint(address, served_model, api_key_env or "")
        result = suite_run.evaluate_suite(
            asked, suite=suite, **chosen(task_options | of_suite | {"only": _names(only)})
        )
        if as_json:
            print_json(result)
        else:
            print_table(suite_run.suite_table(result["rows"]))
        return
    assert folder is not None, "only a suite is scored without a model"
    if task:
        from bessemer.eval.preamble import preamble

        rows += evaluation.evaluate(
            folder, names=task, before=preamble(**chosen(first_pages)), **chosen(task_options | {"skip": skip})
        )
    if lm_eval:
        rows += evaluation.evaluate_lm_eval(folder, names=_names(lm_eval), **chosen(lm_eval_options))
    if as_json:
        print_json({"model": str(folder), "rows": rows})
        return
    print_table(evaluation.table(rows))


def _names(text: str | None) -> list[str]:
    return [name.strip() for name in (text or "").split(",") if name.strip()]


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
    from bessemer.addons.evals import paired
    from bessemer.addons.families.named_models import model_dir

    options = {"problems": problems, "skip": skip, "samples": samples, "temperature": temperature, "top_p": top_p,
               "max_new_tokens": max_tokens, "seed": seed}  # fmt: skip
    check_used("--task", task, options)
    sides = [[model_dir(name.strip()) for name in side.split(",")] for side in (first, second)]
    if shared := {folder.resolve() for folder in sides[0]} & {folder.resolve() for folder in sides[1]}:
        raise UserError(f"{min(shared)} is on both sides; compare it with another model")

    def rows(folder: Any) -> list[dict[str, Any]]:
        if not task:
            return paired.evaluated(folder)
        from bessemer.addons.evals import evaluate

        return evaluate.evaluate(folder, names=task, **chosen(options))

    first_rates, second_rates = (
        [paired.rates(rows(folder), str(folder), measure) for folder in side] for side in sides
    )
    lines, differing = (
        paired.compare(first_rates, second_rates, common, only or []),
        paired.left_out(first_rates, second_rates, only or []),
    )
    if as_json:
        facts = {"first": first, "second": second, "measure": measure, "rows": paired.facts(lines)}
        print_json(facts | {"left_out": differing})
    else:
        print_table(paired.table(lines, first, second, measure))
        for line in differing:
            print(one_line(line))
