"""Prints what CHANGELOG.md says of a version, for its release: python .ci/notes.py VERSION

Refuses a version whose heading has no date, one that the packages or CITATION.cff do not have, and a repository without
an address (.ci/address.py).
"""

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROJECTS = (".", "claims", "diagnose", "vectors")


def section(version: str) -> tuple[str, str]:
    """The date after a version's heading, or "unreleased", and the text below it."""
    text = (ROOT / "CHANGELOG.md").read_text("utf-8")
    parts = re.split(r"^## \[(.+)\] - (.+)\n", text, flags=re.M)
    for found, date, body in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        if found == version:
            return date, body.strip() + "\n"
    sys.exit(f"error: CHANGELOG.md has no heading of {version}")


def stated() -> dict[str, str]:
    """Every place that states the version."""
    places = {
        f"{folder}/pyproject.toml": tomllib.loads((ROOT / folder / "pyproject.toml").read_text())["project"]["version"]
        for folder in PROJECTS
    }
    places["CITATION.cff"] = citation("version")
    return places


def citation(key: str) -> str:
    found = re.search(rf"^{key}: (.+)$", (ROOT / "CITATION.cff").read_text("utf-8"), re.M)
    return found[1].strip('"') if found else ""


def main(version: str) -> None:
    date, body = section(version)
    others = [f"{place} {found}" for place, found in stated().items() if found != version]
    if others:
        sys.exit(f"error: not of version {version}: {', '.join(others)}")
    if date != (cited := citation("date-released")):
        sys.exit(
            f"error: {version} is of {date} in CHANGELOG.md; date-released in CITATION.cff is {cited or 'missing'}"
        )
    if "OWNER" in (ROOT / ".github" / "CODEOWNERS").read_text():
        sys.exit("error: the repository has no public address yet; run .ci/address.py OWNER/NAME")
    print(body, end="")


if __name__ == "__main__":
    main(sys.argv[1])
