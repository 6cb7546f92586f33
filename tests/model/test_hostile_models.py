"""Model directories from a hostile sender are refused at once: the cases of bench/hostile_models.py without the
slowest. The benchmark itself goes through the command line and measures time and memory."""

import importlib.util
import time
from pathlib import Path

import pytest

from bessemer.addons.families.named_models import model_dir
from bessemer.engine.engine import load_engine
from bessemer.errors import UserError

spec = importlib.util.spec_from_file_location(
    "hostile_models", Path(__file__).parents[2] / "bench" / "hostile_models.py"
)
hostile_models = importlib.util.module_from_spec(spec)  # bench/ on the path would hide the package llama_cpp
spec.loader.exec_module(hostile_models)

SLOW = {
    "a pattern of sixth degree",
    "nested loops",
    "a text of 100 MB",
    "a power that takes years",
    "a list that doubles",
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    hostile_models.write_bases(folder)
    for base in ("ours", "llama"):
        assert load_engine(model_dir(str(folder / base))).generate(["What?"], max_new_tokens=2)
    return folder


@pytest.mark.parametrize("name", sorted(hostile_models.KINDS.keys() - SLOW))
def test_a_hostile_directory_is_an_error(bases, tmp_path, name):
    directory = hostile_models.changed(bases, name, tmp_path / "model")
    begun = time.monotonic()
    with pytest.raises(UserError):
        load_engine(model_dir(str(directory))).generate(["What?"], max_new_tokens=2)
    assert time.monotonic() - begun < hostile_models.SECONDS
