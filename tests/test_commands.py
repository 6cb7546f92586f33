"""Commands of other packages: found by their entry points, imported only when asked for, refused in one line."""

import sys
from pathlib import Path

import pytest

from bessemer.cli import common


@pytest.fixture
def install(tmp_path, monkeypatch):
    """install("name = module:function", source) puts a package with that entry point on the path."""
    monkeypatch.syspath_prepend(tmp_path)

    def install(entry, source):
        module = entry.partition("=")[2].partition(":")[0].strip()
        (tmp_path / f"{module}.py").write_text(source)
        about = tmp_path / f"{module}-1.0.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
        (about / "entry_points.txt").write_text(f"[bessemer.commands]\n{entry}\n")
        monkeypatch.delitem(sys.modules, module, raising=False)

    return install


def test_an_installed_command_runs_and_is_listed(call, install):
    install("greet = greeting:greet", 'def greet(who: str, twice: bool = False):\n    """Say hello."""\n'
            "    print(f'hello {who}' * (1 + twice))\n")  # fmt: skip
    assert call("greet", "--twice", "you") == (0, "hello youhello you\n", "")
    assert "Say hello" in call("--help")[1] and "--twice" in call("greet", "--help")[1]


def test_a_package_is_imported_only_for_its_command(call, install):
    install("greet = lazy_greeting:greet", "def greet():\n    pass\n")
    assert call("run", "--help")[0] == 0 and "lazy_greeting" not in sys.modules
    assert call("greet")[0] == 0 and "lazy_greeting" in sys.modules


@pytest.mark.parametrize(
    ("source", "why"),
    [("import no_such_library\n", "no_such_library"), ("x = 1\n", "no attribute 'greet'"), ("greet = 1\n", "greet")],
)
def test_a_broken_command_costs_one_line_and_no_other_command(call, install, source, why):
    install("greet = broken:greet", source)
    status, out, err = call("greet", "--any", "words")
    assert (status, out) == (2, "") and err.count("\n") == 1 and "broken:greet" in err and why in err
    assert call("run", "--help")[0] == 0 and call("--help")[0] == 0


def test_a_command_of_a_removed_add_on_names_what_brings_it(call, install):
    install("greet = greeting_addon:greet", "")
    (Path(sys.path[0]) / "greeting_addon.py").unlink()
    status, _, err = call("greet", "you")
    assert status == 2 and err.count("\n") == 1
    assert "package greeting_addon" in err and "pip install greeting_addon" in err


def test_a_command_of_the_package_is_not_replaced(call, install):
    install("run = thief:run", "def run():\n    print('stolen')\n")
    assert "stolen" not in call("run", "--help")[1]
    assert "thief:run is left out" in call("--help")[2]


def test_a_command_that_is_not_installed_names_its_project(call, monkeypatch):
    monkeypatch.setitem(common.ELSEWHERE, "elsewhere", "nowhere")
    status, _, err = call("elsewhere", "--help", "x")
    assert status == 2 and err.count("\n") == 1 and "bessemer-nowhere" in err and "pip install -e ./nowhere" in err
    assert "elsewhere" not in call("--help")[1]
