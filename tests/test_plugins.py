"""What a recipe names is found: built-in members, entry points, files and modules; mistakes are one line."""

import subprocess
import sys

import pytest

from bessemer import plugins
from bessemer.config import places
from bessemer.errors import UserError

TAKES = "rewards_PG, samples"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A recipe's folder, which is also a place of installed packages."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(plugins, "_built_in", {kind: {} for kind in plugins.KINDS})
    for cached in (plugins._entry_points, plugins._loaded):
        cached.cache_clear()
    before = set(sys.modules)
    with places.of_recipe(tmp_path):
        yield tmp_path
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in sys.modules[name].__file__:
            del sys.modules[name]
    for cached in (plugins._entry_points, plugins._loaded):
        cached.cache_clear()


def install(folder, package, kind, **members):
    metadata = folder / f"{package}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = [f"{name} = {member}\n" for name, member in members.items()]
    (metadata / "entry_points.txt").write_text(f"[bessemer.{kind}]\n" + "".join(lines))


def test_a_name_resolves_from_each_of_the_four_sources(folder):
    @plugins.register("advantages", "ours")
    def ours(rewards_PG, samples):
        return "ours"

    (folder / "mine.py").write_text("def f(rewards_PG, samples): return 'file'\n")
    (folder / "brought.py").write_text("def f(rewards_PG, samples): return 'package'\n")
    install(folder, "Others", "advantages", other="brought:f")
    named = {"ours": "ours", "mine.py:f": "file", "other": "package", "brought:f": "package"}
    for name, result in named.items():
        assert plugins.find("advantages", name, takes=TAKES)([], []) == result
    assert {"other", "ours"} <= {*plugins.names("advantages")} == {*plugins.table("advantages")}


def test_only_code_of_others_has_a_digest(folder):
    plugins.register("losses", "ours")(max)
    for file in ("mine.py", "brought.py"):
        (folder / file).write_text("def f(): return 1\n")
    install(folder, "Others", "losses", other="brought:f")
    before = [plugins.digest("losses", name) for name in ("ours", "mine.py:f", "other", "brought:f", "absent.py:f")]
    assert [list(hashes) for hashes in before] == [[], ["mine.py"], ["brought"], ["brought"], []]
    for file in ("mine.py", "brought.py"):
        (folder / file).write_text("def f(): return 2\n")
    after = [plugins.digest("losses", name) for name in ("mine.py:f", "other", "brought:f")]
    assert all(new != old for new, old in zip(after, before[1:4], strict=True))


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("grop", "there is no advantage 'grop'; did you mean 'group'"),
        ("absent.py:f", r"no file absent\.py"),
        ("absent_module:f", "no module absent_module"),
        ("json.absent:f", r"no module json\.absent"),
        ("mine.py:g", r"mine\.py defines no g; did you mean f"),
        ("brought:g", "brought defines no g"),
        ("mine.py:few", r"mine\.py, line 2.*2 arguments.*is def few\(rewards_PG, samples\)"),
        ("mine.py:Kind", r"mine\.py, line 3.*not a function.*def Kind\(rewards_PG, samples\)"),
        ("broken_part.py:f", r"broken_part\.py, line 2: ZeroDivisionError"),
        ("broken_part:f", r"broken_part\.py, line 2: ZeroDivisionError"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*your own code")
def test_an_error_names_its_line_and_the_expected_form(folder, name, fault):
    plugins.register("advantages", "group")(max)
    text = "def f(rewards_PG, samples): return 1\ndef few(rewards_PG): return 1\nclass Kind: pass\n"
    for file in ("mine.py", "brought.py"):
        (folder / file).write_text(text)
    (folder / "broken_part.py").write_text("x = 1\n1 / 0\n")
    with pytest.raises(UserError, match=fault):
        plugins.find("advantages", name, takes=TAKES)


def test_a_class_derives_from_the_base(folder):
    (folder / "mine.py").write_text("class Mine: pass\n")
    with pytest.raises(UserError, match=r"mine\.py, line 1\) is not a stage; derive the class from pathlib.*Path"):
        plugins.find("stages", "mine.py:Mine", derives=type(folder))


def test_what_user_code_raises_names_its_line(folder):
    (folder / "mine.py").write_text(
        "import json\ndef f(rewards_PG, samples):\n    json.loads('\\n{')\n"
        "async def later(rewards_PG, samples):\n    return rewards_PG[7]\n"
        "def call(rewards_PG, samples):\n    return samples()\n"
    )
    with pytest.raises(UserError, match=r"mine\.py, line 3: JSONDecodeError"):
        plugins.find("advantages", "mine.py:f", takes=TAKES)([], [])
    waiting = plugins.find("advantages", "mine.py:later", takes=TAKES)([], [])
    with pytest.raises(UserError, match=r"mine\.py, line 5: IndexError"):
        waiting.send(None)


def test_an_error_of_ours_keeps_its_traceback(folder):
    (folder / "mine.py").write_text("def f(rewards_PG, samples): return 1\n")
    function = plugins.find("advantages", "mine.py:f", takes=TAKES)
    with pytest.raises(ZeroDivisionError), plugins.blamed("mine.py:f", function):
        raise ZeroDivisionError


def test_a_broken_package_is_named_and_stops_only_what_needs_it(folder):
    (folder / "brought.py").write_text("import absent_library\n")
    (folder / "works.py").write_text("f = max\n")
    install(folder, "Others", "samplers", other="brought:f", fine="works:f")
    assert plugins.find("samplers", "fine") is max
    with pytest.raises(UserError, match=r"'other' of the package Others .*cannot be loaded.*absent_library"):
        plugins.find("samplers", "other")


def test_a_removed_add_on_is_named_and_left_out(folder):
    (folder / "pack").mkdir()
    (folder / "pack" / "__init__.py").write_text("")
    install(folder, "Others", "stages", gone="pack.removed.stage:Stage")
    assert "gone" in plugins.names("stages") and "gone" not in plugins.table("stages")
    with pytest.raises(UserError, match=r"'gone' of the package Others .*comes with pack\.removed, which is not here"):
        plugins.find("stages", "gone")


def test_modules_that_register_are_imported_once(folder):
    (folder / "kernels_of_mine.py").write_text("from bessemer import plugins\nplugins.register('ops', 'norm')(min)\n")
    install(folder, "Others", "ops", mine="kernels_of_mine", gone="removed.kernels")
    assert plugins.table("ops") == plugins.table("ops") == {"norm": min}


def test_two_packages_with_one_name_are_refused(folder):
    for package in ("First", "Second"):
        install(folder, package, "rewards", short="brought:f")
    with pytest.raises(UserError, match=r"(First|Second) and (First|Second) both bring the reward .short"):
        plugins.names("rewards")


UNINSTALLED = """
import sys
from importlib.metadata import MetadataPathFinder
MetadataPathFinder.find_distributions = lambda *args, **kwargs: iter(())
from bessemer import plugins
from bessemer.model.norm import RMSNorm
import torch
print(*plugins.names("stages"), plugins.find("stages", "rl").__name__, plugins.names("tasks"))
RMSNorm(4, 1e-6)(torch.ones(1, 4))
"""


def test_an_uninstalled_checkout_knows_the_core_stages_and_warns_once():
    done = subprocess.run([sys.executable, "-c", UNINSTALLED], capture_output=True, text=True, check=True)
    assert done.stdout.split()[:6] == ["corpus", "eval", "pretrain", "rl", "sft", "RL"]
    assert done.stderr.count("pip install -e .") == 1


def test_a_missing_library_is_named_with_the_extra_that_brings_it(folder):
    install(folder, "Others", "advantages", lacking="brought:f")
    (folder / "brought.py").write_text("import no_such_library.part\n")
    with open(folder / "Others-1.0.dist-info" / "METADATA", "a") as file:
        file.write('Requires-Dist: no-such-library>=2; extra == "fast"\n')
    with pytest.raises(UserError, match=r"no_such_library.*pip install 'Others\[fast\]'"):
        plugins.find("advantages", "lacking")
