"""The cost of starting: reading recipes and their help imports nothing heavy, and `bessemer --help` is instant."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[1] / "recipes"
HEAVY = ("torch", "numpy", "transformers", "pyarrow", "tokenizers")
LOAD = """
from bessemer.config.recipe import Recipe
for path in {paths}:
    Recipe.load(path)
"""
KEYS = """
from bessemer.cli import main
sys.argv = ["bessemer", *{arguments}]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
"""
WATCH = """
from pathlib import Path
from bessemer.addons.serve.run_follower import RunFollower
from bessemer.addons.serve.watch import build
follower = RunFollower(Path({run!r}), "run")
build([follower])
while follower.poll():
    pass
assert follower.state()["stages"][0]["step"] == 7
"""
NETWORK = """
import os
import sys
from pathlib import Path
import torch
import bessemer.engine.engine, bessemer.pipeline.runner, bessemer.addons.serve.server
from bessemer.model.config import preset
from bessemer.model.transformer import Transformer
print(Path(os.environ.pop("BESSEMER_KERNEL_CACHE")).exists())
model = Transformer(preset("tiny", dim=64, n_layers=2))
model.train_outputs(torch.zeros(1, 8, dtype=torch.int64)).hidden_BTD.sum().backward()
print("torch._dynamo" in sys.modules)
"""


def loaded(code: str) -> list[str]:
    """The heavy modules that a fresh process has loaded after running `code`."""
    code = f"import json, sys\n{code}\nprint(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_loading_any_recipe_imports_nothing_heavy():
    paths = [str(path) for path in sorted(RECIPES.glob("*.toml")) if "[[stage]]" in path.read_text()]
    assert len(paths) > 3
    assert loaded(LOAD.format(paths=paths)) == []


@pytest.mark.parametrize("arguments", [["--help"], ["keys"], ["keys", "rl"], ["keys", "data"]])
def test_help_and_keys_import_nothing_heavy(arguments):
    assert loaded(KEYS.format(arguments=arguments)) == []


def test_a_worker_of_a_data_build_starts_without_torch():
    assert "torch" not in loaded("import bessemer.addons.curate.steps, bessemer.addons.curate.data_recipe")


def test_the_live_page_reads_a_run_and_imports_nothing_heavy(tmp_path):
    (tmp_path / "recipe.toml").write_text('name = "r"\n[[stage]]\nkind = "rl"\n')
    (tmp_path / "01-rl").mkdir()
    values = {"rl/accuracy": 0.5, "rl/entropy": 1.0}
    line = {"time": 1.0, "stage": "rl", "step": 7, "tokens": 9, "values": values}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    assert loaded(WATCH.format(run=str(tmp_path))) == []


def test_help_is_instant():
    """It takes 0.25 s of CPU time on two cores; the test takes the best of three, as other work slows them."""

    def cpu_seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "bessemer", "--help"], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(cpu_seconds() for _ in range(3)) < 0.5


def test_the_network_comes_without_torch_s_compiler_and_builds_no_kernels(tmp_path):
    """torch's compiler takes as long to import as torch itself, and only `compile` needs it. Kernels are built on the
    first call of one."""
    environment = os.environ | {"BESSEMER_KERNEL_CACHE": str(tmp_path / "none")}
    command = [sys.executable, "-c", NETWORK]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
