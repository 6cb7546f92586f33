"""FP8 kernels on a GPU: checks each against the emulation on fresh random inputs, then measures its speed.

    python bench/gpu/fp8.py [--check-only] [--json bench/results/fp8_h100.json] [--rounds 30] [--seed N]
    TRITON_INTERPRET=1 python bench/gpu/fp8.py --interpret      only the checks, on a CPU

Every backend that supports a call on this GPU is checked and timed separately (BESSEMER_FP8_BACKEND), and our products
in both forms, by tensor descriptors and by pointers (BESSEMER_FP8_LOADS), whose results must be the same bits.

    checks     quantisation bit for bit against the emulation on the CPU (on CUDA torch divides by a scalar through its
               reciprocal, which occasionally changes the last bit of a factor); SwiGLU and GEMMs against the emulation
               by 1 - 2 <a, b> / (|a|^2 + |b|^2), which must stay below 1e-6 and 1e-3
    time       median over CUDA events around one call, after a warm-up, with the L2 cache overwritten before each call
    TFLOPS     2 M N K / time, and its share of a large BF16 GEMM of torch on the same GPU
    GB/s       operands read and results written once / time, and its share of a device-to-device copy
    published  DeepGEMM's first release on an H800 (its README), and our share of it

GEMMs are timed with the factors in the layout that our quantisation produces; a backend's time includes any
rearrangement it needs. Inputs are normal, routing is balanced.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bessemer.addons.accelerate.kernels.norm import normalise, normalise_backward
from bessemer.addons.accelerate.precision import adapters, backends, emulation, formats
from bessemer.addons.accelerate.precision.operand import TILE, DeviceCounts, Group, Operand, quantise
from bessemer.errors import UserError

DENSE = {
    (2112, 7168): 1058, (24576, 1536): 990, (32768, 512): 590, (7168, 16384): 1358, (4096, 7168): 1304,
    (7168, 2048): 1025,
}  # fmt: skip
"""(N, K) at M = 4096: published TFLOPS."""
GROUPED = {(4096, 7168): 1297, (7168, 2048): 1099}
"""(N, K) with 4 groups of 8192 rows: published TFLOPS."""
FEW = 64
"""Rows of the memory-bound cases; published figures lie between 1,700 and 2,700 GB/s."""
BOUND = 1e-3
PRODUCTS = ("gemm", "grouped_gemm", "grouped_wgrad")
POINTERS = "triton by pointers"
"""Our products without tensor descriptors, where `triton` has them."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check-only", action="store_true", help="check without timing")
    parser.add_argument("--interpret", action="store_true", help="only check, in Triton's interpreter on the CPU")
    parser.add_argument("--rounds", type=int, default=30, help="timed calls of each kernel")
    parser.add_argument("--seed", type=int, default=None, help="seed of the inputs; random by default")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    seed = secrets.randbelow(2**31) if args.seed is None else args.seed
    try:
        device = place(args.interpret)
    except UserError as fault:
        sys.exit(f"error: {fault}")
    torch.manual_seed(seed)
    facts: dict[str, Any] = {"torch": torch.__version__, "seed": seed, "device": card(device)}
    print(f"{facts['device']}, torch {torch.__version__}, input seed {seed}")
    facts["table"] = backends.table(device)
    for call, backend, why in facts["table"]:
        print(f"  {call}: {backend} ({why})")
    facts["checks"] = checks(device, small=args.interpret)
    if not facts["checks"]:
        sys.exit("error: only the emulation supports this GPU; is triton installed?")
    write(args.json, facts)
    failed = [line for line in facts["checks"] if not line["good"]]
    if not (args.check_only or args.interpret):
        facts |= speed(device, args.rounds, {(line["call"], line["backend"]) for line in failed})
        write(args.json, facts)
    if failed:
        sys.exit(f"{len(failed)} of {len(facts['checks'])} checks failed; the failed backends were not timed")
    if untimed := facts.get("failed"):
        sys.exit(f"{len(untimed)} call{'s' if len(untimed) > 1 else ''} could not be timed")
    print(f"{len(facts['checks'])} checks passed")


def write(path: Path | None, facts: dict[str, Any]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(facts, indent=1) + "\n")


def place(interpret: bool) -> torch.device:
    """The GPU, or the CPU for the interpreter. Raises UserError if neither is available."""
    if interpret:
        if os.environ.get("TRITON_INTERPRET") != "1":
            raise UserError("--interpret needs TRITON_INTERPRET=1 in the environment before Python starts")
        torch.set_num_threads(1)
        return torch.device("cpu")
    if not torch.cuda.is_available() or torch.version.cuda is None:
        raise UserError("needs an NVIDIA GPU of compute capability 8.9 or newer; none was found")
    if (capability := torch.cuda.get_device_capability()) < (8, 9):
        name = torch.cuda.get_device_name()
        raise UserError(
            f"needs an NVIDIA GPU of compute capability 8.9 or newer; {name} has {capability[0]}.{capability[1]}"
        )
    return torch.device("cuda", torch.cuda.current_device())


def card(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, Triton's interpreter"


@contextmanager
def only(backend: str) -> Iterator[None]:
    """Routes every call to this backend."""
    before = {name: os.environ.get(name, "") for name in (backends.VARIABLE, adapters.LOADS)}
    os.environ[backends.VARIABLE] = backend.removesuffix(" by pointers")
    os.environ[adapters.LOADS] = "pointers" if backend == POINTERS else ""
    try:
        yield
    finally:
        os.environ |= before


def fast(name: str, *operands: Any) -> list[str]:
    """The backends other than the emulation that support this call."""
    rows = []
    for backend in backends.ORDER:
        with only(backend):
            try:
                backends.choose(name, *operands)
            except UserError:
                continue
            rows += [backend] if backend != "emulation" else []
            values = [o.value_MK for o in operands if isinstance(o, Operand)]
            if backend == "triton" and name in PRODUCTS and adapters.by_pointers(values[0].device, *values) is None:
                rows.append(POINTERS)
    return rows


# --- checks ----------------------------------------------------------------------------------------------------------


def checks(device: torch.device, small: bool) -> list[dict[str, Any]]:
    """Runs and prints all checks. Returns dicts {call, backend, shape, difference, good}."""
    lines: list[dict[str, Any]] = []

    def check(
        name: str,
        label: str,
        call_args: tuple[Any, ...],
        run: Callable[[], Any],
        compare: Callable[[Any], float],
        bound: float,
    ) -> None:
        """Checks every backend that supports the call, one line each; an exception counts as a failure."""
        results: dict[str, Any] = {}
        for backend in fast(name, *call_args):
            difference, fault = float("nan"), ""
            with only(backend):
                try:
                    results[backend] = run()
                    difference = compare(results[backend])
                except Exception as error:
                    fault = f", {type(error).__name__}: {error}"
            good = difference <= bound  # False for NaN
            if backend == POINTERS and "triton" in results and not torch.equal(results["triton"], results[backend]):
                good, fault = False, ", and other bits than by descriptors"
            lines.append({"call": name, "backend": backend, "shape": label, "difference": difference, "good": good})
            print(f"{'ok  ' if good else 'FAIL'} {name} {label} by {backend}: {difference:.1e}{fault}", flush=True)

    sizes = [(70, 200), (70, 256)] if small else [(1, 1), (70, 200), (129, 7168), (4096, 7168), (8192, 576)]
    for rows, columns, dtype in ((*size, dtype) for size in sizes for dtype in (torch.float32, torch.bfloat16)):
        x, label = spread(rows, columns, device).to(dtype), f"{rows}x{columns} {dtype}"
        for power_of_two in (False, True):
            for group in ("tile", "block"):
                expected = quantise(x.cpu(), group, power_of_two)
                run = partial(backends.quantise, x, group, power_of_two)
                check("quantise", f"{label} by {group}", (x, group), run, partial(mismatches, expected), 0)
            operand = quantise(x, "tile", power_of_two)
            for count in (None, [rows // 3, 0, rows - rows // 3]):
                expected = emulation.retile(Operand(*(part.cpu() for part in operand)), count, power_of_two)
                run = partial(backends.retile, operand, count, power_of_two)
                check("retile", f"{label} {count}", (operand,), run, partial(mismatches, expected), 0)
        h, weight = torch.randn(rows, 2 * columns, device=device).to(dtype), torch.rand(rows, device=device)
        expected = emulation.swiglu(h, weight, False)
        check("swiglu", label, (h,), partial(backends.swiglu, h, weight), partial(calc_diff, expected), 1e-6)
        dy, gain = torch.randn_like(x), torch.rand(columns, device=device) + 0.5
        # sums differ in their last bits, then bfloat16, to which the interpreter truncates
        bound = 1e-6 if dtype == torch.float32 else 5e-4 if small else 1e-5
        normed = quantise(normalise(x.cpu(), gain.cpu(), 1e-6))
        run = partial(backends.rms_norm, x, gain, 1e-6, False, normalise)
        check("rms_norm", label, (x,), run, partial(calc_diff, normed), bound)
        normed = quantise(normalise_backward(dy.cpu(), x.cpu(), gain.cpu(), 1e-6)[0])

        def run_backward(dy: Tensor = dy, x: Tensor = x, gain: Tensor = gain) -> Operand:
            return backends.rms_norm_backward(dy, x, gain, 1e-6, False, normalise_backward)[0]

        if columns > 1:  # one column's gradient is only rounding errors
            check("rms_norm_backward", label, (x,), run_backward, partial(calc_diff, normed), bound)
        if columns % 8 == 0:
            scale = quantise(x, "tile", True).scale_MJ
            packed = formats.pack_e5m6(x.cpu(), scale.cpu())
            run = partial(backends.pack_e5m6, x, scale)
            check("pack_e5m6", label, (x,), run, partial(differ, packed.code), 0)
            packed_copy, plain = formats.PackedE5M6(packed.code.to(device), scale), packed.unpack(columns, dtype)
            run = partial(backends.unpack_e5m6, packed_copy, columns, dtype)
            check("unpack_e5m6", label, (packed_copy.code, columns), run, partial(differ, plain), 0)
        if columns % TILE == 0:
            operand, dact = quantise(h), torch.randn(rows, columns, device=device).to(dtype)
            for part in range(3):
                expected = emulation.swiglu_backward(dact, operand, weight, None, False)[part]

                def run(dact: Tensor = dact, h: Operand = operand, weight: Tensor = weight, part: int = part) -> Any:
                    return backends.swiglu_backward(dact, h, weight, None)[part]

                check("swiglu_backward", f"{label} [{part}]", (dact,), run, partial(calc_diff, expected), 1e-6)
    sizes = [(70, 144, 200), (70, 144, 208)]  # descriptors cannot load rows of 200 bytes
    if not small:
        sizes += [(1, 1, 1), (64, 2112, 7168), (333, 576, 7168), (4096, 4096, 2048)]
    for M, N, K, group in ((*size, group) for size in sizes for group in ("tile", "block")):
        x, w = operands(M, N, K, group, device)
        expected = emulation.reference_gemm(x, w)
        # at the larger sizes, which take long to tune, only as training calls them
        usual = (torch.float32,) if group == "tile" else (torch.bfloat16,)
        for out in usual if M * N > TILE**2 else (torch.float32, torch.bfloat16):
            run = partial(backends.gemm, x, w, out, group)
            check("gemm", f"{M}x{N}x{K} by {group} {out}", (x, w, out, group), run, partial(calc_diff, expected), BOUND)
    for count, N, K in [([70, 0, 30], 72, 208)] + ([] if small else [([256, 0, 512, 128], 4096, 7168)]):
        x, w = grouped_operands(count, N, K, device)
        expected, label = emulation.grouped_gemm(x, count, w, torch.float32, "block"), f"{count}x{N}x{K}"
        # as training calls it: the host does not know the counts, and spare rows follow the groups
        whole_tiles = not any(c % TILE for c in count)
        remainder = TILE if whole_tiles else 0
        unknown = DeviceCounts(
            torch.tensor(count, dtype=torch.int32, device=device), sum(count) + remainder, whole_tiles
        )
        longer = quantise(F.pad(x.dequantise(), (0, 0, 0, remainder)))
        padded = F.pad(expected, (0, 0, 0, remainder))
        run = partial(backends.grouped_gemm, longer, unknown, w, torch.bfloat16, "block")
        call_args = (longer, w, torch.bfloat16, "block", unknown)
        check("grouped_gemm", f"{label}, on the device", call_args, run, partial(calc_diff, padded), BOUND)
        run = partial(backends.grouped_gemm, x, count, w, torch.bfloat16, "block")
        call_args = (x, w, torch.bfloat16, "block", tuple(count))
        check("grouped_gemm", label, call_args, run, partial(calc_diff, expected), BOUND)
        dy = quantise(torch.randn(sum(count), N, device=device))
        sides = emulation.retile(dy, count, False), emulation.retile(x, count, False)
        alone = emulation.retile(dy, None, False), emulation.retile(x, None, False)
        for call, product, plain in (
            ("grouped_wgrad", partial(backends.grouped_wgrad, *sides, count), emulation.grouped_wgrad),
            ("gemm", partial(backends.gemm, *alone, torch.float32), emulation.gemm),
        ):
            packed_copy, remainder = (
                (sides, (count, torch.float32)) if call == "grouped_wgrad" else (alone, (torch.float32, "tile"))
            )
            exact = plain(*packed_copy, *remainder)

            def add(product: Callable[..., Tensor] = product, like: Tensor = exact) -> Tensor:
                """Adds the product to ones twice: each call adds once, even if the first one tunes."""
                into = torch.ones_like(like)
                product(add_to=into)
                return product(add_to=into)

            call_args = (*packed_copy, torch.float32, "tile", *([tuple(count)] if call == "grouped_wgrad" else []))
            check(call, f"{label}, added", call_args, add, partial(calc_diff, 1 + 2 * exact), BOUND)
        expected = emulation.grouped_wgrad(*sides, count, torch.float32)
        run = partial(backends.grouped_wgrad, *sides, count)
        check(
            "grouped_wgrad",
            label,
            (*sides, torch.float32, "tile", tuple(count)),
            run,
            partial(calc_diff, expected),
            BOUND,
        )
    return lines


def spread(rows: int, columns: int, device: torch.device) -> Tensor:
    """Random values whose magnitudes span twelve decades, with zeros."""
    x = torch.randn(rows, columns, device=device) * torch.logspace(-6, 6, columns, device=device)
    x[:, ::13] = 0
    return x


def operands(M: int, N: int, K: int, group: Group, device: torch.device) -> tuple[Operand, Operand]:
    """x quantised by tiles and w by `group`, with the emulation."""
    return quantise(torch.randn(M, K, device=device)), quantise(torch.randn(N, K, device=device), group)


def grouped_operands(count: list[int], N: int, K: int, device: torch.device) -> tuple[Operand, Operand]:
    """x quantised by tiles and stacked w by blocks, one matrix per group."""
    w = [quantise(torch.randn(N, K, device=device), "block") for _ in count]
    return quantise(torch.randn(sum(count), K, device=device)), Operand(*map(torch.stack, zip(*w, strict=True)))


def calc_diff(expected: Tensor | Operand, actual: Tensor | Operand) -> float:
    """1 - 2 <a, b> / (|a|^2 + |b|^2)."""
    actual, expected = ((o.dequantise() if isinstance(o, Operand) else o).double() for o in (actual, expected))
    return abs(float(1 - 2 * (actual * expected).sum() / (actual.square().sum() + expected.square().sum())))


def mismatches(expected: Operand, actual: Operand) -> float:
    """Number of values and factors that differ in any bit; `expected` is on the CPU."""
    values = [o.value_MK.cpu().contiguous().view(torch.uint8) for o in (actual, expected)]
    return float((values[0] != values[1]).sum() + (actual.scale_MJ.cpu() != expected.scale_MJ).sum())


def differ(expected: Tensor, actual: Tensor | formats.PackedE5M6) -> float:
    """Numbers, or bytes of a packed matrix, that differ."""
    return float((expected != (actual if isinstance(actual, Tensor) else actual.code).cpu()).sum())


# --- speed -----------------------------------------------------------------------------------------------------------


def seconds(call: Callable[[], Any], rounds: int, cold: Tensor) -> float:
    """Median seconds of a call with none of its operands in the L2 cache."""
    for _ in range(3):  # tunes, compiles and warms up
        call()
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    for begin, end in marks:
        cold.zero_()  # takes longer than Python needs to enqueue the call
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize(cold.device)
    return statistics.median(begin.elapsed_time(end) for begin, end in marks) / 1e3


def ceilings(rounds: int, cold: Tensor) -> dict[str, float]:
    """torch's rates on this GPU: a large BF16 GEMM, and a device-to-device copy (bytes read and written)."""
    a, b = (torch.randn(8192, 8192, device=cold.device, dtype=torch.bfloat16) for _ in range(2))
    target = torch.empty_like(cold)
    best = {
        "bf16_tflops": 2 * 8192**3 / seconds(lambda: a @ b.t(), rounds, cold) / 1e12,
        "copy_gb_per_s": 2 * cold.numel() / seconds(lambda: target.copy_(cold), rounds, cold) / 1e9,
    }
    print(f"BF16 GEMM of 8192: {best['bf16_tflops']:.0f} TFLOPS; copy: {best['copy_gb_per_s']:.0f} GB/s")
    return best


def speed(device: torch.device, rounds: int, wrong: set[tuple[str, str]]) -> dict[str, Any]:
    """The peak rates of this GPU and every kernel's share of them, without the (call, backend) pairs in `wrong`."""
    cold = torch.empty(512 * 2**20, dtype=torch.uint8, device=device)  # larger than any L2
    best = ceilings(rounds, cold)
    lines: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []

    def line(
        call: str, backend: str, shape: str, run: Callable[[], Any], flops: float, moved: float, published: float | None
    ) -> None:
        try:
            with only(backend):
                time = seconds(run, rounds, cold)
        except Exception as error:
            fault = f"{type(error).__name__}: {error}"
            failed.append({"call": call, "backend": backend, "shape": shape, "fault": fault})
            print(f"FAIL {call} {shape} by {backend}: {fault}", flush=True)
            return
        tflops, rate = flops / time / 1e12, moved / time / 1e9
        lines.append({
            "call": call, "backend": backend, "shape": shape, "us": time * 1e6, "tflops": tflops, "gb_per_s": rate,
            "of_bf16": tflops / best["bf16_tflops"], "of_copy": rate / best["copy_gb_per_s"],
            "published_tflops": published, "of_published": tflops / published if published else None,
        })  # fmt: skip
        label = f"{call} {shape} by {backend}: {time * 1e6:.0f} us"
        if flops:
            label += f", {tflops:.0f} TFLOPS ({tflops / best['bf16_tflops']:.2f} of BF16)"
        label += f", {rate:.0f} GB/s ({rate / best['copy_gb_per_s']:.2f} of a copy)"
        print(label + (f"; {tflops / published:.2f} of the published {published}" if published else ""), flush=True)

    for shape, flops, moved, published, x, w, count in gemms(device):
        call, rest = ("gemm", ()) if count is None else ("grouped_gemm", (tuple(count),))
        for backend in fast(call, x, w, torch.bfloat16, "block", *rest):
            if (call, backend) in wrong:
                continue
            if count is None:
                run = partial(backends.gemm, x, w, torch.bfloat16, "block")
            else:
                run = partial(backends.grouped_gemm, x, count, w, torch.bfloat16, "block")
            line(call, backend, shape, run, flops, moved, published)
    for call, shape, flops, moved, run, call_args in passes(device):
        for backend in fast(call, *call_args):
            if (call, backend) not in wrong:
                line(call, backend, shape, run, flops, moved, None)
    return {"best": best, "speed": lines, "failed": failed}


def gemms(device: torch.device) -> Iterator[tuple[str, float, float, float | None, Operand, Operand, list[int] | None]]:
    """The cases of DeepGEMM's README: shape, FLOPs, bytes moved, published TFLOPS, operands, rows per group."""
    for rows in (4096, FEW):
        for (N, K), published in DENSE.items():
            x, w = (_ours(o) for o in operands(rows, N, K, "block", device))
            moved = (rows + N) * K + 2 * rows * N
            yield f"{rows}x{N}x{K}", 2 * rows * N * K, moved, published if rows != FEW else None, x, w, None
    for (N, K), published in GROUPED.items():
        count = [8192] * 4
        x, w = grouped_operands(count, N, K, device)
        M = sum(count)
        moved = M * K + len(count) * N * K + 2 * M * N
        yield f"4x8192x{N}x{K}", 2 * M * N * K, moved, published, _ours(x), w, count


def _ours(operand: Operand) -> Operand:
    """The same factors in column-major order, as our kernels store them."""
    return Operand(operand.value_MK, operand.scale_MJ.t().contiguous().t())


def passes(
    device: torch.device,
) -> Iterator[tuple[str, str, float, float, Callable[[], Any], tuple[Any, ...]]]:
    """The other FP8 kernels at V3 widths: call, shape, FLOPs, bytes moved, function, operands for `fast`."""
    M, K, N = 4096, 7168, 4096
    x = torch.randn(M, K, device=device, dtype=torch.bfloat16)
    for group in ("tile", "block"):
        run = partial(backends.quantise, x, group)
        yield "quantise", f"{M}x{K} by {group}", 0, x.numel() * 3, run, (x, group)
    operand = _ours(quantise(x))
    yield "retile", f"{M}x{K}", 0, x.numel() * 2, partial(backends.retile, operand), (operand,)
    gain, dy = torch.rand(K, device=device), torch.randn_like(x)
    run = partial(backends.rms_norm, x, gain, 1e-6, False, normalise)
    yield "rms_norm", f"{M}x{K}", 0, x.numel() * 3, run, (x,)
    run = partial(backends.rms_norm_backward, dy, x, gain, 1e-6, False, normalise_backward)
    yield "rms_norm_backward", f"{M}x{K}", 0, x.numel() * 5, run, (x,)
    packed = backends.pack_e5m6(x, scale := quantise(x, "tile", True).scale_MJ)
    yield "pack_e5m6", f"{M}x{K}", 0, x.numel() * 3.5, partial(backends.pack_e5m6, x, scale), (x,)
    run = partial(backends.unpack_e5m6, packed, K, torch.bfloat16)
    yield "unpack_e5m6", f"{M}x{K}", 0, x.numel() * 3.5, run, (packed.code, K)
    h, weight = torch.randn(8 * M, 4096, device=device, dtype=torch.bfloat16), torch.rand(8 * M, device=device)
    yield "swiglu", f"{8 * M}x4096", 0, h.numel() * 2.5, partial(backends.swiglu, h, weight), (h,)
    dact, operand = torch.randn(8 * M, 2048, device=device, dtype=torch.bfloat16), _ours(quantise(h))
    run = partial(backends.swiglu_backward, dact, operand, weight, None)
    yield "swiglu_backward", f"{8 * M}x4096", 0, h.numel() * 4.5, run, (dact,)
    count = [8192] * 4
    sides = [_ours(quantise(torch.randn(rows, sum(count), device=device))) for rows in (N, K)]
    flops, moved = 2 * sum(count) * N * K, (N + K) * sum(count) + 4 * len(count) * N * K
    call_args = (*sides, torch.float32, "tile", tuple(count))
    alone = [_ours(quantise(torch.randn(rows, M, device=device))) for rows in (N, K)]
    run = partial(backends.gemm, *alone, torch.float32)
    alone_moved = (N + K) * M + 4 * N * K
    yield "gemm", f"{N}x{K}x{M}, a weight gradient", 2 * M * N * K, alone_moved, run, (*alone, torch.float32, "tile")
    into = torch.zeros(len(count), N, K, device=device)
    run = partial(backends.grouped_wgrad, *sides, count, add_to=into)
    more = moved + 4 * into.numel()
    yield "grouped_wgrad", f"4x8192x{N}x{K}, added", flops, more, run, (*sides, torch.float32, "tile", tuple(count))
    yield "grouped_wgrad", f"4x8192x{N}x{K}", flops, moved, partial(backends.grouped_wgrad, *sides, count), call_args


# bench/fp8_step.py measures the step of a 1B-active model in FP8 against BF16.


if __name__ == "__main__":
    main()
