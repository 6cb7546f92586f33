"""The package's recipes as a beginning: what each is for, and a copy of one under a name of the user's own."""

from __future__ import annotations

import os
import re
from pathlib import Path

from bessemer.config.builtin import NAME, PREFIX, builtin_recipes
from bessemer.config.table import nearest
from bessemer.errors import UserError


def purpose(file: Path) -> str:
    """What a recipe is for: the first sentence, up to a colon, of the comment that it begins with."""
    lines = []
    for line in file.read_text("utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    return re.split(r":(?=\s)|\.(?=\s+[A-Z][a-z])|\.$", " ".join(lines))[0]


def write_own(file: Path, name: str) -> list[Path]:
    """Writes a built-in recipe as the user's `file`, whose stem becomes the run's name, and beside it what the recipe
    names by file. Returns what was written; UserError where a file is in the way."""
    recipes = builtin_recipes() | builtin_recipes(data=True)
    name = name.removeprefix(PREFIX)
    if name not in recipes:
        raise UserError(f'no built-in recipe "{name}"; {nearest(name, list(recipes))}')
    if file.suffix != ".toml" or not NAME.fullmatch(file.stem):
        raise UserError(
            f"{file}: name a .toml file whose stem has letters, digits, ., - and _ alone; it names the run, too"
        )
    text = recipes[name].read_text("utf-8")
    beside = sorted(
        {
            file_name
            for file_name in re.findall(r'"([\w./-]+\.py):\w+"', text)
            if (recipes[name].parent / file_name).is_file()
        }
    )
    files = {file: re.sub(r'(?m)^name = ".*"', f'name = "{file.stem}"', text, count=1)}
    files |= {file.parent / file_name: (recipes[name].parent / file_name).read_text("utf-8") for file_name in beside}
    if present := [path for path in files if os.path.lexists(path)]:
        raise UserError(f"{present[0]} exists; give another name, or move it away")
    try:
        for path, content in files.items():
            with open(path, "x", encoding="utf-8") as new:
                new.write(content)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); name another folder") from None
    return list(files)
