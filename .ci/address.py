"""Writes the repository's public address wherever it stands: python .ci/address.py OWNER/NAME

The package's links, from which the site takes its own (site_pages.py), CITATION.cff, the links above the issue forms,
who owns the code, and what pages tell people to clone. A second call replaces the first one's.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TEMPLATES = (".github/ISSUE_TEMPLATE/config.yml", ".github/CODEOWNERS")
"""Files with OWNER/NAME where the address belongs."""


def write(address: str) -> None:
    if not (match := re.fullmatch(r"([A-Za-z0-9][A-Za-z0-9-]*)/([A-Za-z0-9._-]+)", address)):
        sys.exit(f"error: {address!r} must have the form OWNER/NAME, as in github.com/OWNER/NAME")
    owner, name = match.groups()
    code, site = f"https://github.com/{address}", f"https://{owner.lower()}.github.io/{name}"
    urls = {"Documentation": site, "Repository": code, "Changelog": f"{code}/blob/main/CHANGELOG.md",
            "Issues": f"{code}/issues"}  # fmt: skip
    lines = "".join(f'{key} = "{url}"\n' for key, url in urls.items())
    change("pyproject.toml", r"(?m)(^\[project\.urls\]).*\n(?:(?:Documentation|Repository|Changelog|Issues) = .*\n)*",
           rf"\1\n{lines}")  # fmt: skip
    change("CITATION.cff", r"(?m)^(license: .*\n)(?:repository-code: .*\n)?", rf'\1repository-code: "{code}"\n')
    for file in TEMPLATES:
        change(file, r"github\.com/[^/\s]+/[^/\s]+|@[^/\s]+(?=/maintainers)",
               lambda found: f"@{owner}" if found[0][0] == "@" else f"github.com/{address}")  # fmt: skip
    for file in ("README.md", "README.zh.md", "docs/install.md", "docs/your-model.md"):
        change(file, r"(git clone )(?:<[^>]+>|https://\S+)", rf"\1{code}")


def change(file: str, pattern: str, new) -> None:
    path = ROOT / file
    text, count = re.subn(pattern, new, path.read_text("utf-8"))
    if not count:
        sys.exit(f"error: {file} has no place for the address; none of the files after it is changed")
    path.write_text(text, "utf-8")


if __name__ == "__main__":
    write(sys.argv[1])
