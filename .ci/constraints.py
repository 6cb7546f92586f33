"""Writes constraints.txt: the tested version of every direct dependency in this environment.

    python .ci/constraints.py > constraints.txt

torch and triton are left out: which build fits depends on the machine, and pyproject.toml states the range. So are
extras that `dev` does not install.
"""

import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

OPEN = {"torch", "triton", "bessemer", "vllm", "llama-cpp-python", "gigatoken", "inspect-ai", "verifiers"}

ROOT = Path(__file__).parents[1]
project, *others = (
    tomllib.loads((ROOT / folder / "pyproject.toml").read_text())["project"] for folder in (".", "claims", "vectors")
)
groups = [project["dependencies"], *(other["dependencies"] for other in others)]
groups += project["optional-dependencies"].values()
names = {canonicalize_name(Requirement(line).name) for group in groups for line in group}
print("# The versions that the tests passed with. Written by .ci/constraints.py; `make` installs with it.")
for name in sorted(names - OPEN):
    try:
        print(f"{name}=={version(name)}")
    except PackageNotFoundError:
        raise SystemExit(f"{name} is not installed; run: make test") from None
