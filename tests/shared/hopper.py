"""Our Triton kernels compiled for a Hopper card by Triton and NVIDIA's assembler; no GPU is needed."""

import contextlib
import io
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from triton_layer_checks import hopper_kernels

FIGURES = Path(__file__).parents[2] / "bench" / "results" / "ptxas_sm90.json"
SHARED_MEMORY = 227 * 1024
"""Bytes available to a program on compute capability 9.0."""


class Job(NamedTuple):
    """A kernel and what it is compiled for."""

    kind: str
    kernel: object
    warps: int = 4
    types: dict | None = None
    constants: Mapping = MappingProxyType({})
    stages: int = 3
    maxnreg: int | None = None

    @property
    def label(self) -> str:
        """The key in the table of figures."""
        function = self.kernel.fn if hasattr(self.kernel, "configs") else self.kernel
        module = function.fn.__module__.rpartition(".")[2]
        constants = " ".join(f"{k}={int(v)}" for k, v in self.constants.items())
        limit = "" if self.maxnreg is None else f" maxnreg={self.maxnreg}"
        return f"{module}.{function.fn.__name__} {constants} warps={self.warps} stages={self.stages}{limit}"


class Compiled(NamedTuple):
    job: Job
    ptx: str
    registers: int
    """Per thread."""
    spilled: int
    """Bytes spilled to memory for lack of registers."""
    shared: int
    """Bytes of shared memory."""

    @property
    def figures(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in ("registers", "spilled", "shared")}

    def faults(self) -> list[str]:
        """What none of our kernels may do."""
        faults = [f"{self.job.label}: {self.spilled} bytes are spilled"] if self.spilled else []
        if self.shared > SHARED_MEMORY:
            faults.append(f"{self.job.label}: {self.shared} bytes of shared memory do not fit")
        if self.job.kind.startswith(("gemm", "grouped")) and "wgmma.mma_async" not in self.ptx:
            faults.append(f"{self.job.label}: no wgmma")
        return faults


def samples() -> Iterator[Job]:
    """Every kernel once or twice."""
    from bessemer.addons.accelerate.kernels import triton_swiglu
    from bessemer.addons.accelerate.precision import triton_e5m6, triton_gemm, triton_quantise, triton_rms_norm

    for power_of_two in (False, True):
        yield Job("tiles", triton_quantise._tiles, constants={"POWER_OF_TWO": power_of_two, "ROWS": 32})
    yield Job("blocks", triton_quantise._blocks, 8, constants={"POWER_OF_TWO": False})
    for groups in (GROUPS, ALONE):
        retile = {"POWER_OF_TWO": False, "FILL": groups is GROUPS, "COLUMNS": 64, **groups}
        yield Job("retile", triton_quantise._retile, constants=retile)
    swiglu = {"WEIGHTED": True, "POWER_OF_TWO": False, "ROWS": 32}
    yield Job("swiglu", triton_quantise._swiglu, constants=swiglu)
    quantised = {n: "*fp8e4nv" for n in ("h", "act", "dh", "turned")} | {"dact": "*bf16", "count": "*i32"}
    quantised |= {n: "*fp32" for n in ("h_scale", "weight", "act_scale", "dh_scale", "turned_scale", "parts")}
    for groups in (GROUPS, ALONE):
        filled = groups is GROUPS
        backward = {"WEIGHTED": filled, "POWER_OF_TWO": False, "FILL": filled, "ROWS": 32, **groups}
        yield Job("swiglu backward", triton_quantise._swiglu_backward, 8, quantised, backward)
    normed = {n: "*bf16" for n in ("x", "dy")} | {n: "*fp32" for n in ("gain", "dgain", "scale")}
    normed |= {"value": "*fp8e4nv", "eps": "fp32"}
    for kernel in (triton_rms_norm._forward_quantised, triton_rms_norm._backward_quantised):
        for block in (512, 8192):
            constants = {"POWER_OF_TWO": False, "BLOCK": block}
            yield Job("rms norm", kernel, triton_rms_norm.warps(block), normed, constants)
    for kernel in (triton_e5m6._pack, triton_e5m6._unpack):
        packed = {"x": "*bf16", "out": "*bf16", "scale": "*fp32", "code": "*i32"}
        yield Job("e5m6", kernel, types=packed, constants={"ROWS": 16})
    for kernel, rows in ((triton_swiglu._forward, 16), (triton_swiglu._backward, 4)):
        yield Job("expert swiglu", kernel, constants={"ROWS": rows, "COLUMNS": 128, "WEIGHTED": True})
    yield from (Job(*fields) for fields in hopper_kernels())
    wide, narrow = {"BLOCK_M": 128, "BLOCK_N": 128}, {"BLOCK_M": 64, "BLOCK_N": 128}
    for tma in (False, True):
        options = {"TMA": tma, "BLOCKS": True, "EVEN": True}
        yield Job("gemm", triton_gemm._gemm, 8, None, {**options, "ADD": False, **wide})
        yield Job("grouped_gemm", triton_gemm._grouped, 8, None, {**GROUPS, **options, **wide})
        yield Job("grouped_wgrad", triton_gemm._wgrad, 4, None, {**GROUPS, "TMA": tma, "ADD": tma, **narrow})
    options = {"TMA": False, "BLOCKS": False, "EVEN": False, "ADD": False}
    yield Job("gemm", triton_gemm._gemm, 4, None, {**options, **narrow})


GROUPS = {"GROUPS": 5, "ROOM": 8}
ALONE = {"GROUPS": 1, "ROOM": 1}


def everything() -> Iterator[Job]:
    """The samples, and every configuration that autotuning may choose for a product."""
    from bessemer.addons.accelerate.precision import triton_gemm

    yield from samples()
    loads = [
        {"TMA": tma, "BLOCKS": blocks, "EVEN": even}
        for tma, even in ((True, True), (False, True), (False, False))
        for blocks in (True, False)
    ]
    for kind, kernel, variants in (
        # only weight gradients are added, and both of their operands have a factor for every row
        ("gemm", triton_gemm._gemm, [load | {"ADD": add} for load in loads for add in {False, not load["BLOCKS"]}]),
        ("grouped_gemm", triton_gemm._grouped, [GROUPS | load for load in loads]),
        (
            "grouped_wgrad",
            triton_gemm._wgrad,
            [GROUPS | {"TMA": t, "ADD": a} for t in (True, False) for a in (True, False)],
        ),
    ):
        for variant in variants:
            for config in triton_gemm.without_spills(kernel.configs, variant):
                constants = variant | config.kwargs
                yield Job(kind, kernel, config.num_warps, None, constants, config.num_stages, config.maxnreg)


def compiled(job: Job) -> Compiled:
    """Runs NVIDIA's assembler too, whose report gives registers and spills."""
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = job.kernel.fn if hasattr(job.kernel, "configs") else job.kernel  # without autotuning
    types = job.types
    if types is None:
        types = {n: "*fp8e4nv" for n in ("x", "w", "dy", "value", "out")}
        types |= {n: "*bf16" for n in ("h", "y", "act", "dact", "dh")} | {"count": "*i32"}
        types |= {
            n: "*fp32" for n in ("dw", "weight", "dweight", "scale", "out_scale", "scale_x", "scale_w", "scale_dy")
        }
        if "value" in kernel.arg_names:
            types["x"] = "*bf16"
    if job.constants.get("ADD"):
        types["y"] = "*fp32"
    if job.constants.get("TMA"):
        for name, rows in zip(kernel.arg_names, ("BLOCK_M", "BLOCK_N"), strict=False):
            types[name] = f"tensordesc<fp8e4nv[{job.constants[rows]}, 128]>"
    signature = {n: "constexpr" if n in job.constants else types.get(n, "i32") for n in kernel.arg_names}
    free = {p.name for p in kernel.params if p.do_not_specialize} | {"M", "sx_row", "sw_row", "sdy_row"}
    free |= {n for n, kind in signature.items() if kind.startswith("tensordesc")}
    # the others are multiples of 16 in every model
    aligned = [i for i, n in enumerate(kernel.arg_names) if signature[n] != "constexpr" and n not in free]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=dict(job.constants), attrs=attributes)
    options = {"num_warps": job.warps, "num_stages": job.stages, "maxnreg": job.maxnreg}
    report = io.StringIO()
    with tempfile.TemporaryDirectory() as fresh, contextlib.redirect_stdout(report):  # a cached kernel is not assembled
        knobs.nvidia.dump_ptxas_log, before = True, os.environ.get("TRITON_CACHE_DIR")
        os.environ["TRITON_CACHE_DIR"] = fresh
        try:
            done = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        finally:
            knobs.nvidia.dump_ptxas_log = False
            if before is None:
                del os.environ["TRITON_CACHE_DIR"]
            else:
                os.environ["TRITON_CACHE_DIR"] = before
    log = report.getvalue()
    registers = max(map(int, re.findall(r"Used (\d+) registers", log)))
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill", log)))
    return Compiled(job, done.asm["ptx"], registers, spilled, done.metadata.shared)


def versions() -> dict[str, str]:
    """Versions that the figures depend on."""
    import triton
    from triton.backends.nvidia.compiler import get_ptxas_version

    release = re.search(r"release ([\d.]+)", get_ptxas_version(90))
    return {"triton": triton.__version__, "ptxas": release[1] if release else "unknown"}


def committed() -> dict:
    """The committed table of figures, {"versions": ..., "kernels": {label: figures}}."""
    return json.loads(FIGURES.read_text())
