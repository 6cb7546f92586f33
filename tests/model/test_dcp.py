"""torch.distributed.checkpoint: read by torch itself and by us; damaged and hostile checkpoints are refused."""

import io
import json
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from model_cases import random_model, tiny
from ranks import on_ranks
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

from bessemer.hf import deepseek
from bessemer.model.transformer import Transformer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "plain"
    Transformer(tiny(n_mtp=1)).initialise(3).save(folder)
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def weights(folder):
    return {key: value for file in sorted(folder.glob("*.safetensors")) for key, value in load_file(file).items()}


def same(actual, expected):
    assert sorted(actual) == sorted(expected)
    return all(torch.equal(actual[key], value) and actual[key].dtype == value.dtype for key, value in expected.items())


def test_round_trip_through_torchs_own_reader(call, model, tmp_path):
    assert call("convert", model, tmp_path / "dcp", "--to", "dcp")[0] == 0
    expected = weights(model)
    state = {key: torch.zeros_like(value) for key, value in expected.items()}
    dcp.load(state, storage_reader=FileSystemReader(tmp_path / "dcp"), no_dist=True)
    assert same(state, expected)
    assert call("convert", tmp_path / "dcp", tmp_path / "back")[0] == 0
    assert same(weights(tmp_path / "back"), expected)
    assert sorted(path.name for path in (tmp_path / "back").iterdir()) == sorted(path.name for path in model.iterdir())
    assert call("convert", tmp_path / "dcp", tmp_path / "half", "--dtype", "bfloat16", "--no-mtp")[0] == 0
    assert deepseek.load(tmp_path / "half").cfg.n_mtp == 0


def test_export_writes_source_ids_and_exact_routing_biases(call, tmp_path):
    model = random_model(tiny())
    model.save(tmp_path / "model")
    values = json.loads((tmp_path / "model" / "config.json").read_text()) | {"bos_token_id": 17, "eos_token_id": [18]}
    (tmp_path / "model" / "config.json").write_text(json.dumps(values))
    (tmp_path / "model" / "generation_config.json").unlink()
    assert call("convert", tmp_path / "model", tmp_path / "dcp", "--to", "dcp", "--dtype", "bfloat16")[0] == 0
    for name in ("config.json", "generation_config.json"):
        written = json.loads((tmp_path / "dcp" / name).read_text())
        assert (written["bos_token_id"], written["eos_token_id"]) == (17, [18])
    assert call("convert", tmp_path / "dcp", tmp_path / "back")[0] == 0
    assert call("convert", tmp_path / "model", tmp_path / "wanted", "--dtype", "bfloat16")[0] == 0
    assert same(weights(tmp_path / "back"), weights(tmp_path / "wanted"))


def test_a_model_that_replaces_a_checkpoint_leaves_none_of_its_weights(call, model, tmp_path):
    """A `.metadata` left behind would be read in place of the new weights."""
    Transformer(tiny(n_mtp=1)).initialise(4).save(tmp_path / "other")
    assert call("convert", model, tmp_path / "x", "--to", "dcp")[0] == 0
    assert call("convert", tmp_path / "other", tmp_path / "x", "--force")[0] == 0
    names = {path.name for path in (tmp_path / "x").iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors"}
    (tmp_path / "x" / ".metadata").write_bytes(b"of another program")
    assert call("convert", tmp_path / "x", tmp_path / "back")[0] == 0
    assert same(weights(tmp_path / "back"), weights(tmp_path / "other"))


def test_a_model_directory_is_itself_a_checkpoint_for_dcp(model):
    """torchtitan reads it with `initial_load_in_hf`."""
    expected = weights(model)
    state = {key: torch.zeros_like(value) for key, value in expected.items()}
    dcp.load(state, storage_reader=HuggingFaceStorageReader(str(model)), no_dist=True)
    assert same(state, expected)


def save_shards(me, model, out):
    """Saves as a trainer does: every matrix split in halves over two ranks, in a nested state next to an optimizer."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    shards = {key: distribute_tensor(value, mesh, [Shard(0)]) for key, value in weights(model).items()}
    state = {"model": shards, "optimizer": {"step": torch.tensor(7.0), "note": {"any": "object"}}}
    dcp.save(state, checkpoint_id=str(out))


def test_shards_of_several_ranks_beside_an_optimizer(call, model, tmp_path):
    on_ranks(2, save_shards, model, tmp_path / "dcp")
    status, _, err = call("convert", tmp_path / "dcp", tmp_path / "back")
    assert status == 2 and "--like" in err
    assert call("convert", tmp_path / "dcp", tmp_path / "back", "--like", model)[0] == 0
    assert same(weights(tmp_path / "back"), weights(model))


class Bomb:
    def __reduce__(self):
        return (io.open, ("/tmp/never-written-by-bessemer", "w"))


@pytest.fixture
def broken(call, model, tmp_path):
    assert call("convert", model, tmp_path / "dcp", "--to", "dcp")[0] == 0
    return tmp_path / "dcp"


def moved(path):
    metadata = pickle.loads(path.read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = "../../etc/passwd"
    return pickle.dumps(metadata)


def grown(path):
    metadata = pickle.loads(path.read_bytes())
    record = next(iter(metadata.state_dict_metadata.values()))
    record.size = torch.Size([1 << 40, 4])
    return pickle.dumps(metadata)


def renamed(path):
    metadata = pickle.loads(path.read_bytes())
    metadata.state_dict_metadata = {
        f"layers.{n}.w": record for n, record in enumerate(metadata.state_dict_metadata.values())
    }
    return pickle.dumps(metadata)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: pickle.dumps(Bomb()), "which no DCP checkpoint needs"),
        (lambda path: path.read_bytes()[:200], "not a readable DCP checkpoint"),
        (moved, "outside its folder"),
        (grown, "declares"),
        (renamed, "need Hugging Face's names"),
    ],
    ids=["code", "cut", "outside", "size", "names"],
)
def test_damage_is_one_line_and_runs_nothing(call, broken, damage, words):
    path = broken / ".metadata"
    path.write_bytes(damage(path))
    status, out, err = call("convert", broken, broken.parent / "back")
    assert status == 2 and not out and words in err and err.count("\n") == 1
    assert not (broken.parent / "back").exists() and [p.name for p in broken.parent.iterdir()] == ["dcp"]


def test_files_that_lost_bytes_are_named(call, broken):
    file = next(broken.glob("*.distcp"))
    data = bytearray(file.read_bytes())
    data[: len(data) // 2] = bytes(len(data) // 2)
    file.write_bytes(data)
    status, _, err = call("convert", broken, broken.parent / "back")
    assert status == 2 and "cannot be read" in err and not (broken.parent / "back").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--to", "dcp", "--fp8"), "a DCP checkpoint has no FP8 in tiles"),
        (("--like", "elsewhere"), "--like: only for an adapter or a checkpoint"),
    ],
)
def test_options_that_do_not_fit(call, model, tmp_path, arguments, words):
    status, _, err = call("convert", model, tmp_path / "x", *arguments)
    assert status == 2 and words in err
