"""What a release is made of: the changelog's form, one version everywhere, its notes, one address, pages by version."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from datetime import date
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
KINDS = ["Highlights", "Changed", "Added", "Deprecated", "Removed", "Fixed", "Security"]
PROJECTS = [f"{folder}pyproject.toml" for folder in ("", "claims/", "diagnose/", "vectors/")]
CLONED = ["README.md", "README.zh.md", "docs/install.md", "docs/your-model.md"]
"""Pages that tell people to clone the repository."""


@pytest.fixture
def copy(tmp_path):
    """The files of a release in a folder of their own."""
    for name in [*PROJECTS, *CLONED, "CHANGELOG.md", "CITATION.cff"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(ROOT / name, tmp_path / name)
    for name in (".ci", ".github"):
        shutil.copytree(ROOT / name, tmp_path / name)
    return tmp_path


def ci(folder, script, *arguments):
    command = [sys.executable, folder / ".ci" / script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert not done.returncode or done.stderr.startswith("error: "), done.stderr
    return done.stdout if not done.returncode else done.stderr


def edit(file, *changes):
    text = file.read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    file.write_text(text)


def test_the_changelog_has_the_form_of_keep_a_changelog():
    text = (ROOT / "CHANGELOG.md").read_text()
    versions = re.findall(r"^## (.*)$", text, re.M)
    heading = re.compile(r"\[(\d+\.\d+\.\d+)\] - (unreleased|\d{4}-\d\d-\d\d)")
    parts = [heading.fullmatch(version) for version in versions]
    assert all(parts) and "unreleased" not in [part[2] for part in parts[1:]]
    dates = [date.fromisoformat(part[2]) for part in parts if part[2] != "unreleased"]
    assert dates == sorted(dates, reverse=True)
    newest = text.split("\n## ")[1]
    kinds = re.findall(r"^### (.*)$", newest, re.M)
    assert kinds == [kind for kind in KINDS if kind in kinds] and kinds[:2] == ["Highlights", "Changed"]
    highlights = newest.partition("### Highlights")[2].partition("###")[0].strip().splitlines()
    assert [line.partition(". ")[0] for line in highlights] == [str(n) for n in range(1, 11)]
    entries = [line for line in newest.splitlines() if line.startswith("- ")]
    assert entries and all(entry.endswith((".", ".)")) for entry in entries)
    assert not [entry for entry in entries if re.search(r"[a-z`)]\. [A-Z]", entry)], "an entry is one sentence"
    assert newest.partition("### Changed")[2].strip().startswith("What breaks:")
    assert len(newest.split()) <= 1000


def test_the_version_is_the_same_everywhere():
    newest = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)[1]
    found = {tomllib.loads((ROOT / name).read_text())["project"]["version"] for name in PROJECTS}
    found |= set(re.findall(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.M))
    found |= set(re.findall(r'^__version__ = "(.*)"$', (ROOT / "src/bessemer/__init__.py").read_text(), re.M))
    assert found == {newest}


def test_a_date_stands_in_the_citation_when_the_changelog_has_it():
    dated = re.search(r"^## \[.+?\] - (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.M)[1]
    cited = re.findall(r"^date-released: (.*)$", (ROOT / "CITATION.cff").read_text(), re.M)
    assert cited == ([] if dated == "unreleased" else [dated])


def test_notes_of_a_release_are_its_section_and_an_unfinished_release_is_refused(copy):
    version = tomllib.loads((copy / "pyproject.toml").read_text())["project"]["version"]
    assert "has no heading of 9.9.9" in ci(copy, "notes.py", "9.9.9")
    text = re.sub(r"(?m)^(## \[.+?\] - ).*", r"\g<1>2031-02-03", (copy / "CHANGELOG.md").read_text(), count=1)
    (copy / "CHANGELOG.md").write_text(text)
    (copy / "CITATION.cff").write_text(re.sub(r"(?m)^date-released.*\n", "", (copy / "CITATION.cff").read_text()))
    assert "date-released in CITATION.cff is missing" in ci(copy, "notes.py", version)
    with open(copy / "CITATION.cff", "a") as file:
        file.write("date-released: 2031-02-03\n")
    assert "no public address yet" in ci(copy, "notes.py", version)
    ci(copy, "address.py", "someone/steel")
    notes = ci(copy, "notes.py", version)
    assert notes.startswith("### Highlights\n") and "## [" not in notes and notes.rstrip().endswith(".")
    edit(copy / "vectors" / "pyproject.toml", (f'version = "{version}"', 'version = "9.0.0"'))
    assert "vectors/pyproject.toml 9.0.0" in ci(copy, "notes.py", version)


def test_the_address_is_written_everywhere_and_can_change(copy):
    for address in ("First/one", "someone/steel"):
        assert not ci(copy, "address.py", address)
    urls = tomllib.loads((copy / "pyproject.toml").read_text())["project"]["urls"]
    assert urls["Repository"] == "https://github.com/someone/steel"
    assert urls["Documentation"] == "https://someone.github.io/steel" and "DeepSeek-V3 report" in urls
    files = [path for path in copy.rglob("*") if path.is_file() and ".ci" not in path.parts]
    texts = {path.relative_to(copy).as_posix(): path.read_text() for path in files}
    assert not [name for name, text in texts.items() if re.search(r"com/OWNER|@OWNER|First|this repository>", text)]
    assert 'repository-code: "https://github.com/someone/steel"\n' in texts["CITATION.cff"]
    assert "https://github.com/someone/steel/security/advisories/new" in texts[".github/ISSUE_TEMPLATE/config.yml"]
    assert "@someone/maintainers" in texts[".github/CODEOWNERS"]
    assert "must have the form OWNER/NAME" in ci(copy, "address.py", "https://github.com/a/b")


def test_pages_hold_every_version_the_newest_as_latest_and_their_list(tmp_path):
    pages, site = tmp_path / "pages", tmp_path / "site"
    (pages / ".git").mkdir(parents=True)
    for version in ("0.9.0", "0.10.0", "0.11.0rc1", "0.9.1", "0.9.0"):
        shutil.rmtree(site, ignore_errors=True)
        site.mkdir()
        (site / "index.html").write_text(f"{version}: {len(list(pages.iterdir()))}")
        assert not ci(ROOT, "pages.py", site, pages, version)
    listed = json.loads((pages / "versions.json").read_text())
    assert [row["version"] for row in listed] == ["0.11.0rc1", "0.10.0", "0.9.1", "0.9.0"]
    assert [row["version"] for row in listed if row["aliases"] == ["latest"]] == ["0.10.0"]
    assert (pages / "latest" / "index.html").read_text().startswith("0.10.0")
    assert "latest/index.html" in (pages / "index.html").read_text()
    assert "is not a version" in ci(ROOT, "pages.py", site, pages, "../elsewhere")
    assert "holds no site" in ci(ROOT, "pages.py", pages / ".git", pages, "1.0.0")


def test_every_action_is_named_by_a_sha_and_the_release_it_is_of():
    uses = [line for file in (ROOT / ".github" / "workflows").glob("*.yml") for line in file.read_text().splitlines()
            if "uses:" in line]  # fmt: skip
    form = re.compile(r"\s*(- )?uses: [a-z-]+/[a-z-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+")
    assert uses and not [line for line in uses if not form.fullmatch(line)]
    names = {re.search(r"uses: (\S+)@(\S+)", line).groups() for line in uses}
    assert len(names) == len({name for name, _ in names}), "one version of an action"
