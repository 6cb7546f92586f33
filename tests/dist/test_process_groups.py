"""Process groups: few communicators, made once, with the layout's timeout; what a GPU rank asks of NCCL and CUDA."""

import os
import platform
import socket
import threading
from collections import Counter
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from test_distributed_trainer import across
from test_executor import batch

from bessemer.addons.distributed import chunk, distributed, executor, process_groups, schedules
from bessemer.addons.distributed.mesh import Layout, Mesh
from bessemer.addons.distributed.on_ranks import OnRanks
from bessemer.addons.distributed.ranks import Ranks, _device
from bessemer.config.recipe import LayoutConfig, Recipe
from bessemer.errors import UserError
from bessemer.model.config import preset


def alone(work, *arguments):
    """work(...) in a fork that is the only rank of a run, whose ranks wait at most 17 seconds. This process itself
    could not destroy the groups in its later forks."""
    return on_ranks(1, _join, work, *arguments)[0]


def _join(_, work, *arguments):
    dist.destroy_process_group()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    Ranks.join({}, 17.0)
    return work(*arguments)


def timeouts(folder):
    training = across(Layout(), "1f1b", state_dir=folder)
    training.collective.executor_for(2)
    groups = list(dist.distributed_c10d._world.pg_map)
    return [group._get_backend(torch.device("cpu")).options._timeout for group in groups]


def test_groups_have_the_layout_timeout(tmp_path):
    """17 seconds, plus a minute in which the watchdog reports first. A rank that is alone has three groups: the world,
    files, and one for everything else."""
    assert alone(timeouts, tmp_path) == [timedelta(seconds=77)] * 3


def stages_and_runs(folder):
    first = Mesh(Layout(), preset("tiny"))
    is_equal = Mesh(Layout(), preset("tiny")).group == first.group
    n_groups = len(dist.distributed_c10d._world.pg_map)
    dist.destroy_process_group()
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    return is_equal, n_groups, {*Mesh(Layout(), preset("tiny")).group.values()} & {*first.group.values()}


def test_stages_share_groups_and_runs_do_not(tmp_path):
    assert alone(stages_and_runs, tmp_path) == (True, 2, set())


def communicators(layout, schedule):
    """For each rank, how many groups it is in, as `Mesh`, `Channels`, checkpoints and held-out rows create them; and
    the number of all groups. The world's two are not counted."""
    table, pipelines = schedules.schedule(schedule, layout.pp, 120), layout.groups("pp")
    specs = {spec.shared for spec in (*layout.needed_groups(), *executor.needed_groups(table, pipelines))}
    return Counter(rank for spec in specs for rank in spec.ranks), len(specs)


def test_v3_rank_has_few_communicators():
    recipe = Recipe.load("recipes/v3.toml")
    layout, schedule, _ = distributed.layout_of(recipe.layout, recipe.layout.fewest)
    actual, everyone_s = communicators(layout, schedule)
    assert len(actual) == layout.world == 2048
    assert max(actual.values()) + 2 == 12 <= 64
    assert everyone_s > 6000, "what one communicator for each group of the world would be"


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zbv", "dualpipe-v"])
def test_other_schedules_need_no_more_communicators(schedule):
    actual, _ = communicators(Layout(8, 2, 16, 8, 2), schedule)
    assert max(actual.values()) + 2 <= 16


def test_equal_ranks_share_a_group_unless_uses_overlap():
    specs = [*Layout(ep=4).needed_groups()]
    assert {spec.shared for spec in specs if len(spec.ranks) > 1} == {
        process_groups.GroupSpec("sums", (0, 1, 2, 3)), process_groups.GroupSpec("experts", (0, 1, 2, 3))
    }  # fmt: skip
    assert {spec.shared for spec in specs if len(spec.ranks) == 1} == {
        process_groups.GroupSpec("sums", (rank,)) for rank in range(4)
    }


def test_nccl_and_cuda_options(monkeypatch):
    """This build of torch has no NCCL; its options are faked as torch declares them."""
    made = SimpleNamespace(Options=lambda: SimpleNamespace(is_high_priority_stream=False, config=SimpleNamespace()))
    monkeypatch.setattr(dist, "ProcessGroupNCCL", made, raising=False)
    most = {}
    for use in ("sums", "experts", "messages"):
        backend, options = process_groups._backend(use, torch.device("cuda", 1))
        assert backend == "nccl" and options.is_high_priority_stream
        most[use] = getattr(options.config, "max_ctas", None)
    assert most == {"sums": 16, "experts": 20, "messages": 4}
    assert process_groups._backend("sums", torch.device("cpu")) == (None, None)
    for name in process_groups.ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    process_groups.set_environment()
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "1" and os.environ["CUDA_MODULE_LOADING"] == "EAGER"


def test_exchange_thread_sets_its_device(monkeypatch):
    """Otherwise all ranks of a machine would create a context on its first GPU."""
    chosen = {}
    stream = SimpleNamespace(wait_event=lambda event: None, record_event=lambda: None)
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda device: chosen.update({threading.current_thread().name: device})
    )
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: threading.Lock())
    streams = chunk.Overlapped(torch.device("cuda", 3))
    streams.run(True, lambda: None, None).result()
    assert chosen == {"exchange_0": torch.device("cuda", 3)}


def whole_layers():
    training = across(Layout(), "1f1b")
    assert training.collective.shard.exchange is None
    runtime = OnRanks(Ranks(None, 0, 1, torch.device("cpu")), LayoutConfig(), print)
    called, layers = Counter(), runtime.layers(runtime.held(training.collective.shard))
    assert len(layers) == len(training.model.layers) + len(training.model.mtp)
    for number, layer in enumerate(layers):

        def whole(*arguments, number=number, layer=layer):  # stands for what `compile` would install
            called[number] += 1
            return layer._call_impl(*arguments)

        layer._compiled_call_impl = whole
    training.update([batch(number, False) for number in range(2)])
    return called == {number: 2 for number in range(len(layers))}


def test_pure_data_parallelism_calls_whole_layers():
    assert alone(whole_layers)


def compared(rank, facts, faults):
    ranks = Ranks(dist.distributed_c10d._get_default_store(), rank, len(facts), torch.device("cpu"))
    try:
        ranks._compare(facts[rank], faults[rank])
    except UserError as error:
        return str(error)


def test_odd_rank_is_named():
    """Two of three agree; the odd one may be rank 0."""
    cpu, gpu = {"device": "cpu", "NCCL": None}, {"device": "cuda 9.0", "NCCL": "2.29.7"}
    for facts, faults, words in (
        (
            (gpu, gpu, cpu),
            ("", "", ""),
            'device differs between ranks: "cuda 9.0" on rank 0 (HOST) and "cpu" on rank 2 (HOST)',
        ),
        (
            (cpu, gpu, gpu),
            ("", "", ""),
            'device differs between ranks: "cuda 9.0" on rank 1 (HOST) and "cpu" on rank 0 (HOST)',
        ),
        ((gpu, cpu, gpu), ("", "2 ranks", ""), "rank 1 on HOST: 2 ranks"),
    ):
        message = on_ranks(3, compared, facts, faults)
        assert len({*message}) == 1 and message[0].startswith(words.replace("HOST", platform.node())), message


def test_rank_needs_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert _device() == (torch.device("cuda", 3), "")
    monkeypatch.setenv("LOCAL_RANK", "4")
    assert _device() == (torch.device("cpu"), "at least 5 ranks were started here, for 4 GPUs; start at most 4")
