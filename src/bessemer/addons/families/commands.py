"""Commands on model directories: conversion, and exchange with the hub."""

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from bessemer.addons.families.options import Model, NoVerify
from bessemer.cli.common import AsJson, print_json
from bessemer.errors import UserError


class Dtype(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Format(StrEnum):
    hf = "hf"
    gguf = "gguf"
    dcp = "dcp"


class Scales(StrEnum):
    float32 = "float32"
    ue8m0 = "ue8m0"


def convert(
    src: Annotated[
        str,
        typer.Argument(
            metavar="SRC",
            help="A model directory, a run (its main model, by default the last), RUN/STAGE, a training checkpoint "
            "(RUN/NN-STAGE/state/step-...), written on any layout, a checkpoint of torch.distributed.checkpoint, or a "
            "LoRA adapter (RUN/NN-STAGE/adapter), which is merged into its base.",
        ),
    ],
    dst: Annotated[Path, typer.Argument(metavar="DST", help="Where to write the result: a directory, or NAME.gguf.")],
    to: Annotated[
        Format | None,
        typer.Option(
            "--to",
            help="hf: a directory; gguf: one file for llama.cpp, with a Modelfile for Ollama; dcp: "
            "torch.distributed.checkpoint. Default: by DST.",
        ),
    ] = None,
    mtp: Annotated[
        bool | None, typer.Option("--mtp/--no-mtp", help="Keep the MTP layers. Default: yes, except for gguf.")
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Dtype. Default: unchanged; bfloat16 next to FP8 matrices.")
    ] = None,
    fp8: Annotated[
        bool, typer.Option("--fp8", help="Matrices in FP8 with a scale per 128 x 128 tile, as in V3's release.")
    ] = False,
    scales: Annotated[
        Scales | None, typer.Option(help="With --fp8. ue8m0: powers of two, as in V3.1's release. Default: float32.")
    ] = None,
    like: Annotated[
        Path | None,
        typer.Option(
            help="For a DCP checkpoint: the model directory with its config and tokenizer. For an adapter: its base."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what is at DST; never the source.")] = False,
    no_verify: NoVerify = False,
) -> None:
    """Rewrite a model: FP8 to plain and back, with or without MTP, another dtype, as a GGUF file or for torch's DCP."""
    if to is None:
        to = Format.gguf if dst.suffix.lower() == ".gguf" else Format.hf
    if scales and not fp8:
        raise UserError("--scales: only FP8 matrices have scales; add --fp8 or leave it out")
    if to is not Format.hf and fp8:
        what = "a GGUF file" if to is Format.gguf else "a DCP checkpoint"
        raise UserError(f"--fp8: {what} has no FP8 in tiles; leave --fp8 out, or use --to hf")
    if to is Format.gguf and mtp:
        raise UserError("--mtp: a GGUF file of this architecture has no place for MTP layers; leave --mtp out")
    from bessemer.addons.families.named_models import check_not_of_a_run, model_dir, tokenizer_of_checkpoint

    trained = (Path(src) / "manifest.json").is_file()
    distributed = (Path(src) / ".metadata").is_file() and not any(Path(src).glob("*.safetensors"))
    if (trained or distributed) and to is not Format.hf:
        raise UserError(f"{src} is a checkpoint; convert it to a model directory first, then that to {to.value}")
    adapter = (Path(src) / "adapter_config.json").is_file() and not (Path(src) / "config.json").is_file()
    if like and not distributed and not adapter:
        raise UserError("--like: only for an adapter or a checkpoint of torch.distributed.checkpoint; leave it out")
    if adapter and (to is not Format.hf or fp8 or mtp):
        raise UserError(f"{src} is an adapter; merge it into a model directory first (leave --to, --fp8 and --mtp out)")
    source = Path(src) if trained or distributed or adapter else model_dir(src)
    if not (trained or distributed or adapter):
        _check_ours(source)
    check_not_of_a_run(dst)
    from bessemer.addons.families.conversion import check_target

    check_target(source, dst, force)
    target = dtype.value if dtype else None
    if to is Format.gguf:
        from bessemer.addons.families import gguf_file, modelfile

        check_target(source, modelfile.path_of(dst), force)
        gguf_file.write(source, dst, target)
        print(dst)
        modelfile.write(source, dst)
        print(f"for Ollama: {modelfile.command(dst)}", file=sys.stderr)
        return
    if to is Format.dcp:
        from bessemer.addons.families import dcp
        from bessemer.hf import deepseek

        dcp.export(source, dst, deepseek.parse_dtype(target), mtp is not False)
        print(dst)
        return
    how: dict[str, Any] = {"mtp": mtp is not False, "dtype": target}
    fp8_scales: Any = (scales or Scales.float32).value if fp8 else None
    if trained:
        from bessemer.addons.distributed.sharded_checkpoint import of_checkpoint
        from bessemer.addons.families.block_fp8_form import BlockFp8

        how |= {"form": BlockFp8(fp8_scales)} if fp8_scales else {}
        of_checkpoint(source, dst, tokenizer_dir=tokenizer_of_checkpoint(source), **how)
    elif adapter:
        from bessemer.addons.families.lora import merge

        merge(source, dst, like, target)
    elif distributed:
        from bessemer.addons.families import dcp

        dcp.convert(source, dst, like, fp8=fp8_scales, **how)
    else:
        from bessemer.addons.families.conversion import convert as rewrite

        rewrite(source, dst, fp8=fp8_scales, **how)
    print(dst)


def _check_ours(source: Path) -> None:
    """UserError for a model of another family, which is stored in transformers' form from the start."""
    from bessemer.hf.families import architecture_of
    from bessemer.hf.mapping import FAMILIES

    if (architecture := architecture_of(source)) in FAMILIES:
        return
    beside = source.parent / "adapter"
    merged = f"; the adapter of {beside} is merged into it" if beside.is_dir() else ""
    raise UserError(
        f"{source}: a model of type {architecture!r} needs no export: the folder is in transformers' form, which vLLM, "
        f"SGLang and llama.cpp's convert_hf_to_gguf.py read{merged}. Copy it where you need it; only models of the "
        "DeepSeek V2 and V3 family are rewritten, and LoRA adapters merged: bessemer convert RUN/NN-STAGE/adapter DST"
    )


def push(
    model: Model,
    name: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="A repository on the hub; created if new.")],
    licence: Annotated[
        str | None, typer.Option("--licence", "--license", metavar="ID", help="Licence of the weights, such as mit.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the model card; send nothing.")] = False,
) -> None:
    """Put a model on the Hugging Face hub, with a model card from the run that made it."""
    from bessemer import plugins
    from bessemer.addons.families import remote
    from bessemer.addons.families.named_models import model_dir

    if (model_card := plugins.hook("model-card")) is None:
        raise UserError("the model card comes with the add-on watch, which is not here; install it")
    folder, (repository, _) = model_dir(model), remote.address(name)
    card = model_card(folder, repository, licence)
    print(card if dry_run else remote.push(folder, card, name, private))


def pull(
    name: Annotated[
        str,
        typer.Argument(
            metavar="OWNER/NAME[@REVISION]",
            help="A model on the Hugging Face hub, or a file NAME.tar of bessemer pack.",
        ),
    ],
    folder: Annotated[Path | None, typer.Argument(metavar="[DST]", help="The new directory. Default: NAME.")] = None,
    as_json: AsJson = False,
) -> None:
    """Download a model from the Hugging Face hub, or unpack an archive: weights, configuration, tokenizer; no code."""
    from bessemer.addons.families import archive, remote

    commit = {}
    if name.endswith(".tar"):
        target = folder or Path(Path(name).stem)
        archive.unpack(Path(name), target)
    else:
        target = folder or Path(remote.address(name)[0].split("/")[1])
        commit = {"commit": remote.pull(name, target)}
    if as_json:
        print_json({"directory": str(target), **commit})
    else:
        print(target)
