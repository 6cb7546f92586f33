"""The kernels on another processor: `python bench/kernels_arm.py` repeats the calls of the kernels' tests on ARM.

The tests run here; every call of a kernel is recorded with its memory before and after. Then the library is built for
the other instruction set, `replay.cpp` makes the same calls with it, and the results are compared. qemu runs ARM:
this needs aarch64-linux-gnu-g++ and qemu-aarch64 (Debian: g++-aarch64-linux-gnu, qemu-user). `--instructions baseline`
or `avx2` compares other x86 code with what the recording used; `--record emulated-amx` records AMX's code, for
`--instructions emulated-amx` on ARM with `--arm`.
"""

from __future__ import annotations

import argparse
import gc
import os
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from bessemer.addons.accelerate.kernels import build, library

ROOT = Path(__file__).parents[1]
MOST_BYTES, MOST_CALLS = 8 << 20, 40
"""Limits on a call's memory and on the calls of one function: qemu is twenty to fifty times slower."""
TOLERANCE = {torch.float32: (2e-5, 2e-6), torch.bfloat16: (8e-3, 1e-3), torch.float64: (1e-6, 1e-7)}
"""Relative error of a number, plus absolute error in units of the largest number in the memory or the call, since
gradients may be what is left of equal terms. A BF16 function may round its float32 results, too."""


class Memory(NamedTuple):
    """A tensor's whole storage, since strides may lead beyond the tensor."""

    dtype: torch.dtype
    before: Tensor
    after: Tensor
    addresses: list[tuple[int, int, int]]
    """(place in this memory, number of the memory, offset) for each address, if it is a table of addresses."""


class Call(NamedTuple):
    """One call of a kernel."""

    name: str
    signature: str
    arguments: list[Any]
    """(number of the memory, offset in bytes) where the kernel takes a pointer."""
    memories: list[Memory]


class Recorder:
    """A pytest plug-in that keeps the calls made with one instruction set."""

    def __init__(self, instructions: str):
        self.instructions, self.calls, self.seen = instructions, [], Counter()  # type: ignore[var-annotated]

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.original = library.call
        for name, module in list(sys.modules.items()):
            if getattr(module, "call", None) is self.original and name.partition(".")[0] != "__main__":
                module.call = self.record

    def record(self, name: str, signature: str, *arguments: Any) -> None:
        tensors = [a for a in arguments if isinstance(a, Tensor)]
        roots = {t.untyped_storage().data_ptr(): t for t in reversed(tensors)}
        tables = _tables(roots)
        roots |= {t.untyped_storage().data_ptr(): t for table in tables.values() for _, t, _ in table}
        size = sum(t.untyped_storage().nbytes() for t in roots.values())
        is_recorded = (
            library.status().instructions == self.instructions and size <= MOST_BYTES and set(signature) <= set("pifd")
        )
        before = {at: _bytes(t).clone() for at, t in roots.items()} if is_recorded else {}
        self.original(name, signature, *arguments)
        self.seen[name] += is_recorded
        if not is_recorded or self.seen[name] > MOST_CALLS:
            return
        numbers = {at: number for number, at in enumerate(roots)}

        def place(a: Any) -> Any:
            if not isinstance(a, Tensor):
                return a
            start = a.untyped_storage().data_ptr()
            return numbers[start], a.data_ptr() - start

        memories = [
            Memory(
                t.dtype, before[at], _bytes(t).clone(),
                [(i, numbers[to.untyped_storage().data_ptr()], offset) for i, to, offset in tables.get(at, [])],
            )
            for at, t in roots.items()
        ]  # fmt: skip
        self.calls.append(Call(name, signature, [place(a) for a in arguments], memories))


def _bytes(tensor: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


def _tables(roots: dict[int, Tensor]) -> dict[int, list[tuple[int, Tensor, int]]]:
    """Small int64 memories that hold addresses of tensors: (place, tensor, offset into its memory)."""
    suspects = {
        at: [(i, value) for i, value in enumerate(_bytes(t).view(torch.int64).tolist()) if value > 1 << 32]
        for at, t in roots.items()
        if t.dtype == torch.int64 and t.untyped_storage().nbytes() < 1 << 14
    }
    if not any(suspects.values()):
        return {}
    live = [t for t in gc.get_objects() if type(t) in (Tensor, torch.nn.Parameter) and t.device.type == "cpu"]
    starts = {t.untyped_storage().data_ptr(): t for t in live if t.untyped_storage().nbytes()}
    tables: dict[int, list[tuple[int, Tensor, int]]] = {}
    for at, values in suspects.items():
        for address, value in values:
            start = max((s for s in starts if s <= value), default=0)
            if start and value < start + starts[start].untyped_storage().nbytes():
                tables.setdefault(at, []).append((address, starts[start], value - start))
    return tables


def write(calls: list[Call], path: Path) -> None:
    with path.open("wb") as file:
        for call in calls:
            file.write(call.name.encode() + b"\0" + call.signature.encode() + b"\0")
            file.write(struct.pack("<q", len(call.memories)))
            for memory in call.memories:
                file.write(struct.pack("<q", memory.before.numel()) + memory.before.numpy().tobytes())
                file.write(struct.pack("<q", len(memory.addresses)))
                for address in memory.addresses:
                    file.write(struct.pack("<qqq", *address))
            for letter, value in zip(call.signature, call.arguments, strict=True):
                if letter == "p":
                    file.write(struct.pack("<qq", *(value or (-1, 0))))
                else:
                    file.write(struct.pack("<q" if letter == "i" else "<d", value))


def compare(calls: list[Call], results: bytes) -> list[str]:
    """Prints the largest error of every function; returns what is wrong."""
    at, worst, wrong = 0, {}, []  # type: ignore[var-annotated]
    for call in calls:
        floats = [m.after[: len(m.after) // 8 * 8].view(m.dtype) for m in call.memories if m.dtype.is_floating_point]
        largest = max(
            (float(values_of.abs().nan_to_num(0, 0).max()) for values_of in floats if len(values_of)), default=0.0
        )
        ill = 1000 if largest > 1000 else 1  # rounding a score of 7,000 changes its exponential by a thousandth
        for number, memory in enumerate(call.memories):
            if not memory.after.numel():
                continue
            raw = torch.frombuffer(bytearray(results[at : at + memory.after.numel()]), dtype=torch.uint8)
            at += memory.after.numel()
            if memory.addresses:
                continue
            actual, reference = (
                values_of[: len(values_of) // 8 * 8].view(memory.dtype) for values_of in (memory.after, raw)
            )
            if not actual.is_floating_point():
                if not torch.equal(actual, reference):
                    wrong.append(f"{call.name}: memory {number} of {memory.dtype} differs")
                continue
            relative, absolute = TOLERANCE[torch.bfloat16 if call.name.endswith("bfloat16") else memory.dtype]
            a, b = actual.double(), reference.double()
            finite = a.isfinite()
            if not torch.equal(finite, b.isfinite()):  # which overflows become NaN depends on the order
                differ = int((finite != b.isfinite()).sum())
                wrong.append(f"{call.name}: {differ} of {len(a)} numbers of memory {number} are finite in one alone")
                continue
            if not finite.any():
                continue
            error = (a - b).abs()[finite] / (
                relative * a.abs()[finite] + absolute * a.abs()[finite].max().clamp(min=largest) + 1e-30
            )
            worst[call.name] = max(worst.get(call.name, 0.0), float(error.max()) / ill)
            if error.max() > ill:
                wrong.append(f"{call.name}: memory {number} of {memory.dtype} is {error.max():.1f} tolerances off")
    counts = Counter(call.name for call in calls)
    for name in sorted(counts):
        print(f"{name:32} {counts[name]:4} calls, largest error {worst.get(name, 0.0):.3f} of what is allowed")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instructions", default="neon", choices=build.FLAGS, help="of the library that is checked")
    parser.add_argument("--arm", action="store_true", help="build for ARM, as for neon")
    parser.add_argument("--record", default="auto", help="instruction set of the recording")
    parser.add_argument("tests", nargs="*", default=[str(ROOT / "tests" / "kernels")], help="tests to record")
    options = parser.parse_args()
    arm = options.arm or options.instructions == "neon"
    os.environ[library.VARIABLE] = options.record
    recorder = Recorder(library.status().instructions)
    tests = [*options.tests, "--ignore", str(ROOT / "tests" / "kernels" / "test_build.py")]
    if pytest.main(["-q", "-p", "no:cacheprovider", *tests], plugins=[recorder]):
        sys.exit("the tests fail here")
    print(f"{len(recorder.calls)} calls recorded with {recorder.instructions}")
    with tempfile.TemporaryDirectory() as folder:
        work, compiler = Path(folder), "aarch64-linux-gnu-g++" if arm else build.compiler()[0]
        flags = [flag for flag in build.FLAGS[options.instructions] if not arm or flag not in build.AVX2]
        sources = sorted(map(str, build.SOURCES.glob("*.cpp")))
        built, replay, calls, results = (work / name for name in ("kernels.so", "replay", "calls", "results"))
        subprocess.run([compiler, *build.COMMON, *flags, "-shared", *sources, "-o", built, "-ldl"], check=True)
        subprocess.run(
            [compiler, "-std=gnu++17", "-O1", ROOT / "bench" / "replay.cpp", "-o", replay, "-ldl"], check=True
        )
        write(recorder.calls, calls)
        start = time.monotonic()
        subprocess.run(
            [*(["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu"] if arm else []), replay, built, calls, results],
            check=True,
        )
        print(f"repeated with {options.instructions}{' on ARM' if arm else ''} in {time.monotonic() - start:.1f} s")
        wrong = compare(recorder.calls, results.read_bytes())
    sys.exit("\n".join(wrong) if wrong else 0)


if __name__ == "__main__":
    main()
