"""`bessemer drift`: the layer and the part at which two engines begin to compute something else from the same ids."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from bessemer.addons.families.options import NoVerify
from bessemer.cli.common import AsJson, print_json
from bessemer.errors import UserError


class Who(StrEnum):
    trainer = "trainer"
    engine = "engine"
    transformers = "transformers"
    vllm = "vllm"
    llama_cpp = "llama.cpp"


class DriftDtype(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"


def drift(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A model directory, or a run: its main model, by default the last.")
    ],
    between: Annotated[tuple[Who, Who], typer.Option(help="The two that compute.")] = (
        Who.trainer,
        Who.engine,
    ),
    second: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The model of the second: an export of the first, or a GGUF file for llama.cpp. Default: the same.",
        ),
    ] = None,
    ids: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Token ids: a JSON list, or numbers between blanks.")
    ] = None,
    text: Annotated[str | None, typer.Option(help="Text, encoded by the model's tokenizer.")] = None,
    length: Annotated[
        int | None, typer.Option(min=2, metavar="N", help="So many ids drawn at random. Default: a text.")
    ] = None,
    dtype: Annotated[DriftDtype, typer.Option(help="DriftDtype of weights and activations.")] = DriftDtype.float32,
    decoded: Annotated[
        int, typer.Option(min=1, metavar="N", help="The engine decodes the last N ids one by one, after a prefill.")
    ] = 16,
    all_rows: Annotated[bool, typer.Option("--all", help="Print every layer.")] = False,
    no_verify: NoVerify = False,
    as_json: AsJson = False,
) -> None:
    """Compare two engines on the same ids, layer by layer: where they begin to differ by more than rounding. Ends with
    code 1 if they do."""
    from bessemer.addons.families.named_models import model_dir

    if sum(source is not None for source in (ids, text, length)) > 1:
        raise UserError("--ids, --text and --length all say which ids to compute; give one of them")
    folder = model_dir(model)
    gguf = second is not None and second.endswith(".gguf") and between[1] == Who.llama_cpp
    other = folder if second is None else Path(second) if gguf else model_dir(second)
    if other == folder and between[0] == between[1]:
        raise UserError(f"--between {between[0].value} {between[1].value}: name two, or another model with --second")
    from bessemer.addons.evals import drift_run

    row = drift_run.ids_of(folder, ids, text, length)
    result = drift_run.drift((between[0].value, folder), (between[1].value, other), row, dtype.value, decoded=decoded)
    if as_json:
        print_json(result.facts())
    else:
        from bessemer.cli.runs import print_table

        for part in result.show(all_rows):
            print_table(part)
    if result.first is not None:
        raise typer.Exit(1)
