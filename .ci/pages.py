"""Puts a built site among those of other versions: python .ci/pages.py SITE PAGES VERSION

PAGES holds a folder for each version, `latest` with a copy of the newest, versions.json (which the list of versions on
every page reads) and an index.html that leads to latest. A version that is published again replaces itself.
"""

import json
import re
import shutil
import sys
from pathlib import Path

INDEX = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>Bessemer</title>
<meta http-equiv="refresh" content="0; url=latest/index.html">
<a href="latest/index.html">The documentation of the newest version</a>
</html>
"""


def publish(site: Path, pages: Path, version: str) -> None:
    if not (site / "index.html").is_file():
        sys.exit(f"error: {site} holds no site; run make site")
    order(version)
    shutil.rmtree(pages / version, ignore_errors=True)
    shutil.copytree(site, pages / version)
    found = [path.name for path in pages.iterdir() if path.name != "latest" and (path / "index.html").is_file()]
    versions = sorted(found, key=order, reverse=True)
    finished = [name for name in versions if order(name)[1]] or versions
    shutil.rmtree(pages / "latest", ignore_errors=True)
    shutil.copytree(pages / finished[0], pages / "latest")
    rows = [{"version": name, "title": name, "aliases": ["latest"] * (name == finished[0])} for name in versions]
    (pages / "versions.json").write_text(json.dumps(rows, indent=1) + "\n")
    (pages / "index.html").write_text(INDEX)
    (pages / ".nojekyll").touch()  # folders that begin with an underscore are pages too


def order(version: str) -> tuple[list[int], bool, str]:
    """Sorts versions: 1.10 after 1.9, and 1.0rc1 before 1.0."""
    if not (match := re.fullmatch(r"(\d+(?:\.\d+)*)((?:a|b|rc|\.dev)\d+)?", version)):
        sys.exit(f"error: {version!r} is not a version such as 1.2.3 or 1.2.3rc1")
    return [int(part) for part in match[1].split(".")], not match[2], match[2] or ""


if __name__ == "__main__":
    publish(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
