"""A rehearsal certificate: what was run, what was computed, what remains unproved, for one recipe, one cluster and one
state of the code."""

from __future__ import annotations

import hashlib
import json
import platform
from pathlib import Path
from typing import Any

import torch

import bessemer
from bessemer.addons.plan.hardware import ClusterSpec
from bessemer.addons.plan.rehearsal import computed, miniature, runs, unproved
from bessemer.addons.plan.rehearsal.collectives import Wrap
from bessemer.addons.plan.rehearsal.runs import Say
from bessemer.config import places
from bessemer.config.recipe import Recipe
from bessemer.config.table import nearest
from bessemer.errors import UserError

FORMAT = 1
PASSED, REFUSED = "PASSED", "REFUSED"
CODE = (".py", ".cpp", ".hpp", ".toml", ".json")
"""Endings of the package's files that decide what a run computes."""


def certify(
    path: str, overrides: list[str], cluster: ClusterSpec, processes: int, say: Say = lambda text: None,
    until: str | None = None, plant: Wrap | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The certificate of a recipe, of its stages up to `until`. `plant`: as in `runs.run_all`."""
    recipe = part_of(Recipe.load(path, overrides), until)
    with places.of_recipe(recipe.folder):
        sizes = computed.compute(recipe, cluster)
        networks, left_out = miniature.networks(recipe, cluster.size, processes)
        ran = runs.run_all(networks, recipe, say, plant) if cluster.size > 1 and not sizes["faults"] else []
        reasons = [*sizes["faults"], *(fault for network in ran for fault in network["faults"])]
        if cluster.size > 1 and not sizes["faults"]:
            for network in networks:
                used = {axis for group in network.groups for axis in group.axes}
                reasons += [
                    f"no run has {axis}, which needs --processes 4" for axis in network.wanted if axis not in used
                ]
            if not networks:
                reasons.append(f"nothing was run: {'; '.join(left_out) or 'no stage trains'}")
        rest = unproved.remaining(recipe, cluster, left_out, sizes)
        if not ran:
            rest = ["everything that runs: nothing was run", *rest]
        facts = {
            "format": FORMAT, "recipe": str(path), "set": overrides, "until": until, "name": recipe.name,
            "cluster": f"{cluster.size}x{cluster.device.name}", "processes": processes,
            "verdict": REFUSED if reasons else PASSED, "reasons": reasons,
            "hashes": {"recipe": recipe_hash(recipe), "code": code_hash()},
            "versions": {"bessemer": bessemer.__version__, "torch": torch.__version__,
                         "python": platform.python_version()},
            "bounds": {"losses": runs.LOSSES, "gradients": runs.GRADIENTS, "later": runs.LATER},
            "run": ran, "computed": sizes, "unproved": rest,
        }  # fmt: skip
    return facts | {"digest": digest(facts)}


def part_of(recipe: Recipe, until: str | None) -> Recipe:
    """The recipe with its stages up to one of them."""
    if until is None:
        return recipe
    names = recipe.names()
    if until not in names:
        raise UserError(f"--until {until}: no such stage; {nearest(until, names)}")
    return recipe.model_copy(update={"stages": recipe.stages[: names.index(until) + 1]})


def recipe_hash(recipe: Recipe) -> str:
    """SHA-256 of the recipe with its defaults and overrides, wherever it lies, and of the files with code of the user's
    own that it names."""
    text = recipe.model_copy(update={"folder": None}).to_toml()
    sha = hashlib.sha256(text.encode())
    for name in sorted({word for word in text.replace('"', " ").split() if ".py:" in word}):
        file = Path(recipe.folder or ".") / name.partition(":")[0]
        sha.update(name.encode() + (file.read_bytes() if file.is_file() else b""))
    return sha.hexdigest()


def code_hash() -> str:
    """SHA-256 of the package's files."""
    sha, root = hashlib.sha256(), Path(bessemer.__file__).parent
    for path in sorted(root.rglob("*")):
        if path.suffix in CODE and path.is_file():
            sha.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return sha.hexdigest()


def digest(facts: dict[str, Any]) -> str:
    """SHA-256 of a certificate without its digest, which shows that somebody has edited it."""
    plain = {key: value for key, value in facts.items() if key != "digest"}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def check(path: Path, recipe_path: str | None = None) -> list[str]:
    """What speaks against relying on a certificate now; [] if nothing does. `recipe_path`: where the recipe lies today.
    UserError for a file that is no certificate."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        stated, verdict, recorded = facts["hashes"], facts["verdict"], facts["digest"]
        source, overrides, until = recipe_path or facts["recipe"], list(facts["set"]), facts["until"]
        own = (facts["format"], stated["recipe"], stated["code"], facts["versions"]["torch"])
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{path} is no rehearsal certificate; name the .json file that bessemer rehearse wrote"
        ) from None
    if own[0] != FORMAT:
        raise UserError(f"{path} has format {own[0]}, and this version reads {FORMAT}; rehearse again")
    found = []
    if digest(facts) != recorded:
        found.append("the certificate itself was edited after it was written")
    if verdict != PASSED:
        found.append(f"its verdict is {verdict}")
    if recipe_hash(part_of(Recipe.load(source, overrides), until)) != stated["recipe"]:
        found.append(f"the recipe {source} has changed")
    if code_hash() != stated["code"]:
        found.append("the code of bessemer has changed")
    if torch.__version__ != own[3]:
        found.append(f"torch is {torch.__version__}, and was {own[3]}")
    return found
