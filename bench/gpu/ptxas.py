"""Registers, spills and shared memory of every Triton kernel on Hopper, from NVIDIA's assembler; no GPU is needed.

    python bench/gpu/ptxas.py            compiles all configurations that tuning may choose, and compares with the table
    python bench/gpu/ptxas.py --write    writes the table, bench/results/ptxas_sm90.json

No kernel may spill, none may need more than 227 KiB of shared memory, and every product must use wgmma. Triton and its
assembler decide the rest, so figures are compared only for the versions that the table names.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "shared"))

from hopper import FIGURES, committed, compiled, everything, versions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the table instead of comparing with it")
    args = parser.parse_args()
    jobs = {job.label: job for job in everything()}
    committed_kernels = {} if args.write or committed()["versions"] != versions() else committed()["kernels"]
    kernels, faults = {}, []
    for label, job in sorted(jobs.items()):
        kernel = compiled(job)
        kernels[label] = kernel.figures
        print(
            f"{kernel.registers:4} registers {kernel.shared:7,} bytes shared {kernel.spilled:5} spilled  {label}",
            flush=True,
        )
        faults += kernel.faults()
        if committed_kernels and committed_kernels.get(label) != kernel.figures:
            faults.append(f"{label}: {kernel.figures}, in the table {committed_kernels.get(label)}")
    if args.write:
        FIGURES.write_text(json.dumps({"versions": versions(), "kernels": kernels}, indent=1) + "\n")
    print(f"{len(kernels)} configurations, {max(kernel['registers'] for kernel in kernels.values())} registers at most")
    if faults:
        sys.exit("\n".join(faults))


if __name__ == "__main__":
    main()
