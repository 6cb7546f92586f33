"""DeepEP as the exchange: the bits of all-to-all, few calls, no wait in backward, and who may use it.

The package needs NVLink; a stand-in with its signatures computes over gloo (tests/shared/deep_ep_stand_in.py).
"""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import deep_ep_stand_in
import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from test_distributed_trainer import across
from test_executor import CFG, batch
from test_overlap import Jittery, different, step

from bessemer.addons.accelerate.precision.fp8_linear import PAPER
from bessemer.addons.distributed import deepep, distributed, mesh, process_groups
from bessemer.addons.distributed.chunk import Serial
from bessemer.addons.distributed.expert_parallel import AllToAll, Hop
from bessemer.addons.distributed.mesh import Layout, Mesh
from bessemer.addons.distributed.model_shard import heldout_nats
from bessemer.addons.distributed.ranks import Ranks
from bessemer.addons.distributed.schedules import schedule
from bessemer.config.recipe import LayoutConfig, Recipe
from bessemer.errors import UserError
from bessemer.model import moe
from bessemer.model.config import preset

E, K, D, F = 8, 3, 256, 32
CASES = [(case, fp8) for case in ("uneven", "one expert", "half idle") for fp8 in (False, True)]


def install(node):
    sys.modules["deep_ep"] = deep_ep_stand_in
    deepep.absent.cache_clear()
    deep_ep_stand_in.Buffer.nvl_peers = node


def problem(rank, case):
    """Rank 0 has most tokens, rank 1 none, and expert 5 gets none. Or all tokens go to expert 2; or only the first half
    of the ranks gets any."""
    own = torch.Generator().manual_seed(100 + rank)
    N = [40, 0, 7, 12][rank] if case == "uneven" else 11
    x = torch.randn(N, D, generator=own).bfloat16()
    score = torch.rand(N, E, generator=own)
    score[:, 5] = 0
    weight, expert = score.topk(K, -1)
    if case == "one expert":
        expert, weight = torch.full((N, 1), 2), weight[:, :1].contiguous()
    elif case == "half idle":
        expert %= E // 2
        expert[:, 1:] = torch.stack([(expert[:, 0] + 1) % 4, (expert[:, 0] + 2) % 4], 1)
    return x, expert, weight, torch.randn(N, D, generator=own).bfloat16()


def there_and_back(exchange, rank, n, case, fp8):
    x, expert, weight, dy = problem(rank, case)
    draw = torch.Generator().manual_seed(0)
    experts = moe.Experts.__new__(moe.Experts)
    torch.nn.Module.__init__(experts)
    own = slice(rank * (E // n), (rank + 1) * (E // n))
    for name, shape in (("w13", (E, 2 * F, D)), ("w2", (E, D, F))):
        complete = (torch.randn(shape, generator=draw) * 0.2).bfloat16()
        setattr(experts, name, torch.nn.Parameter(complete[own].clone()))
    experts.fp8 = PAPER if fp8 else None
    x.requires_grad_(), weight.requires_grad_()
    sent = exchange.dispatch(x, moe.Routing(expert, weight, x.new_zeros(())), experts.fp8)
    y = exchange.combine(experts(sent), sent)
    y.backward(dy)
    gradients = [x.grad, weight.grad, experts.w13.grad, experts.w2.grad]
    return [y.detach(), sent.count_E, *gradients], sum(exchange.bytes_sent())


def hopping(rank, n, node):
    local = E // n
    if n <= node:
        return AllToAll((Hop(dist.group.WORLD, n, rank, 0, local, "node"),), rank * local, local, K)
    across = [dist.new_group([0, 2]), dist.new_group([1, 3])][rank % 2]
    within = [dist.new_group([0, 1]), dist.new_group([2, 3])][rank // 2]
    hops = (
        Hop(across, 2, rank // 2, 0, E // 2, "network"),
        Hop(within, 2, rank % 2, (rank // 2) * (E // 2), local, "node"),
    )
    return AllToAll(hops, rank * local, local, K)


def both(rank, n, node):
    """For every case: names of what differs from all-to-all, and the calls that DeepEP received."""
    install(node)
    reference = hopping(rank, n, node)
    buffer = deepep.buffer_of(dist.new_group(list(range(n)), backend="gloo"), D)
    exchange = deepep.DeepEP(buffer, rank, node, E, hopping(rank, n, node))
    reports = []
    for case, fp8 in CASES:
        del buffer.calls[:]
        (actual, bytes_), (expected, wanted_bytes) = (
            there_and_back(way, rank, n, case, fp8) for way in (exchange, reference)
        )
        names = ("y", "count", "x", "gates", "w13", "w2")
        off = {
            name: float((a.float() - b.float()).norm() / b.float().norm().clamp_min(1e-9))
            for name, a, b in zip(names, actual, expected, strict=True)
            if not (a.dtype == b.dtype and torch.equal(a, b))
        }
        reports.append((case, fp8, off, bytes_, wanted_bytes, [call for call, _ in buffer.calls],
                     len({handle for _, handle in buffer.calls if handle})))  # fmt: skip
    x, calls = torch.randn(3, D).requires_grad_(), len(buffer.calls)  # float32 goes through all-to-all
    sent = exchange.dispatch(x, moe.Routing(torch.tensor([[0, 5, 7]] * 3), torch.ones(3, K), None))
    exchange.combine(sent.rows_MD, sent).sum().backward()
    reports.append(len(buffer.calls) == calls and torch.equal(x.grad, torch.full_like(x, 3.0)))
    deepep.close()
    return reports


ONCE = ["layout", "dispatch", "combine", "dispatch again", "combine"]
"""Two forwards, the first with the layout, and a backward that uses the same handle."""


@pytest.mark.parametrize(("n", "node"), [(2, 8), (4, 8), (4, 2)], ids=["two", "four", "two-nodes"])
def test_deepep_is_bit_identical_to_all_to_all(n, node):
    """Between nodes DeepEP does not fix the order in which rows arrive, so sums over them may differ in order."""
    actual = on_ranks(n, both, n, node)
    for *cases, other_dtype in actual:
        assert other_dtype
        for case, fp8, off, _, _, calls, handles in cases:
            if node < n:
                assert off.keys() <= {"w13", "w2"} and max(off.values(), default=0) < 0.05, (case, fp8, off)
            else:
                assert not off, (case, fp8, off)
            how = ["dispatch and wait" if node < n and call == "dispatch" else call for call in ONCE]
            assert calls == how and handles == 1, (case, fp8)
    for number, (case, fp8) in enumerate(CASES):
        sent, expected = (sum(cases[number][place] for cases in actual) for place in (3, 4))
        assert sent == expected > 0, (case, fp8)


def overlapped(rank):
    """A DualPipe step with pairs on two expert-parallel ranks: through DeepEP, whose exchanges take random times,
    against all-to-all without overlap."""
    install(8)
    table, runs = schedule("dualpipe-v", 1, 3), []
    for backend, streams in (("all-to-all", Serial()), ("deepep", Jittery(rank))):
        mesh = Mesh(Layout(ep=2), CFG, backend=backend)
        exchange = InBF16(mesh.exchange())
        runs.append(step(table, [[0], [1]], 0, CFG, False, exchange, mesh.experts, 3 * rank, streams))
    buffer = deepep.buffer_of(process_groups.get("meetings", [0, 1]), CFG.dim)
    used = [name for name, _ in buffer.calls]
    rows = benched(rank)
    exchange.inner.begin()
    assert buffer.group is not process_groups.get("experts", [0, 1])
    met = meetings()
    message = out_of_step(rank, buffer)
    process_groups.at_leave[0]()
    off, freed = different(runs[1], runs[0]), buffer.group is None
    return off, used.count("dispatch"), used.count("dispatch again"), message, freed, rows, met


def meetings():
    """When a trainer's ranks meet: before every step, and before held-out rows."""
    training, met = across(Layout(ep=2), "1f1b"), []
    training.collective.shard.exchange.begin = lambda: met.append(reason)
    reason = "step"
    for number in range(2):
        training.update([batch(2 * number, False), batch(2 * number + 1, False)])
    reason = "held out"
    heldout_nats(training.collective.shard, [batch(0, False), batch(1, False)])
    return met


def benched(rank):
    sys.path.insert(0, str(Path(__file__).parents[2] / "bench" / "gpu"))
    import exchange as command

    mesh.unfit_for_deepep = lambda layout, cfg, device: ""
    ranks = Ranks(dist.distributed_c10d._get_default_store(), rank, 2, torch.device("cpu"))
    facts = command.compared(ranks, 16, preset("tiny", dim=256), True)
    assert facts["missing"] == {} and all(row["dispatch_gb_per_second"] > 0 for row in facts["rows"])
    return facts["rows"]


def out_of_step(rank, buffer):
    sending, x = deepep._Way(buffer, None, dist.group.WORLD), torch.ones(2, D).bfloat16()
    sending.send(x, torch.ones(2, 1), torch.tensor([[0], [7]]), E)
    try:
        sending.send_again(x) if rank else sending.sum_back(x)
    except AssertionError as error:
        return str(error)


class InBF16:
    """Exchanges a float32 model's rows in BF16."""

    def __init__(self, inner):
        self.inner = inner

    def dispatch(self, x, routing, recipe):
        sent = self.inner.dispatch(x.bfloat16(), routing, recipe)
        return sent._replace(rows_MD=sent.rows_MD.float())

    def combine(self, y, sent):
        return self.inner.combine(y.bfloat16(), sent).float()


def test_dualpipe_overlap_is_bit_identical():
    """The stand-in also notices ranks that call in different orders, and the benchmark of the first hour compares both
    backends."""
    for off, forward, backward, message, freed, rows, met in on_ranks(2, overlapped):
        assert off == [] and forward == backward == 3 * 4 and freed
        assert message == "ranks are in different calls" and met == ["step", "step", "held out"]
        kinds = [("all-to-all", "bfloat16"), ("all-to-all", "fp8"), ("deepep", "bfloat16"), ("deepep", "fp8")]
        assert [(row["backend"], row["rows"]) for row in rows] == kinds and all(row["same_bits"] for row in rows)


MISSING = "the package deep_ep is not installed"
CHOICES = [
    ("auto", "cuda", ("", ""), "deepep", "tokens: DeepEP"),
    ("deepep", "cuda", ("", ""), "deepep", "tokens: DeepEP"),
    ("auto", "cuda", ("", MISSING), "all-to-all", f"not DeepEP: rank 1 on .*: {MISSING}"),
    ("auto", "cpu", ("", ""), "all-to-all", None),
    ("all-to-all", "cuda", ("", ""), "all-to-all", "as .layout. exchange says"),
    ("deepep", "cuda", (MISSING, ""), f'exchange = "deepep": rank 0 on .*: {MISSING}; install its wheel', None),
    ("deepep", "cpu", ("", ""), 'exchange = "deepep": rank 0 on .*: it needs GPUs; set exchange = "auto"', None),
]


def chosen(rank):
    deepep.unfit_card = lambda device: ""
    answers = []
    for expected, device, faults, *_ in CHOICES:
        deepep.absent = lambda faults=faults: faults[rank]
        ranks = Ranks(dist.distributed_c10d._get_default_store(), rank, 2, torch.device(device))
        message = []
        try:
            answer = mesh.choose_exchange(expected, Layout(ep=2), preset("tiny", dim=256), ranks, message.append)
        except UserError as error:
            answer = str(error)
        answers.append((answer, message))
    return answers


def test_all_ranks_choose_the_same_backend():
    """One rank without the wheel makes all fall back, or refuse."""
    own, on_rank = on_ranks(2, chosen)
    assert own == on_rank
    for (answer, message), (*_, expected, words) in zip(own, CHOICES, strict=True):
        assert re.match(f"(.layout. )?{expected}", answer) and len(message) == (words is not None), answer
        assert words is None or re.search(words, message[0])


@pytest.mark.parametrize(
    ("shape", "words"),
    [((8, 8, 7168, 8, 256), None), ((64, 8, 7168, 8, 256), None), ((2, 8, 2048, 6, 64), None),
     ((3, 8, 2048, 6, 66), "not of 3"), ((8, 4, 2048, 6, 64), "nodes of 8 ranks, not of 4"),
     ((2, 8, 160, 6, 64), "multiples of 128 up to 8064, not 160"), ((16, 8, 128, 6, 64), "multiples of 256"),
     ((2, 8, 8192, 6, 64), "not 8192"), ((2, 8, 2048, 33, 64), "at most 32 experts")],
)  # fmt: skip
def test_unfit_layouts_are_named(shape, words):
    why = deepep.unfit_shape(*shape)
    assert words in why if words else why == ""


def test_missing_package_is_explained(monkeypatch):
    assert deepep.absent.__wrapped__() == MISSING
    deepep.absent.cache_clear()
    assert mesh.unfit_for_deepep(Layout(ep=2), preset("tiny", dim=256), torch.device("cuda")) == MISSING

    def broken(name):
        raise AssertionError("Invalid NCCL versions: a v.s. b\nplease upgrade")

    monkeypatch.setattr(deepep.importlib, "import_module", broken)
    assert "deep_ep does not load: Invalid NCCL versions" in deepep.absent.__wrapped__()
    old = SimpleNamespace(Buffer=SimpleNamespace(dispatch=lambda x, handle=None: None))
    monkeypatch.setattr(deepep.importlib, "import_module", lambda name: old)
    assert "too old" in deepep.absent.__wrapped__()
    monkeypatch.setattr(deepep.importlib, "import_module", lambda name: deep_ep_stand_in)
    assert deepep.absent.__wrapped__() == "" and LayoutConfig().exchange == "auto"


def card(monkeypatch, capability=(9, 0), reach=lambda gpu, peer: True):
    monkeypatch.setattr(deepep, "_package", lambda: deep_ep_stand_in)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", reach)
    return deepep.unfit_card(torch.device("cuda", 1))


def test_unfit_gpus_and_links_are_named(monkeypatch):
    assert card(monkeypatch) == ""
    assert "a card is older" in card(monkeypatch, (8, 0))
    words = "GPUs 1 and 3 of a machine cannot access each other's memory"
    assert card(monkeypatch, reach=lambda gpu, peer: peer != 3) == words


def test_recipe_with_deepep_is_refused_up_front(monkeypatch):
    recipe = Recipe.load("recipes/tiny.toml", ["layout.ep=2", "layout.exchange=deepep"])
    cfg = preset("tiny", dim=96)
    with pytest.raises(UserError, match=r'exchange = "deepep": it supports hidden sizes .* not 96; set exchange'):
        distributed.check(recipe, "pretrain", [16], cfg, 2)
    fits = preset("tiny", dim=128)
    distributed.check(recipe, "pretrain", [16], fits, 2)
    monkeypatch.setattr(Ranks, "started", lambda: True)
    with pytest.raises(UserError, match="it needs GPUs"):
        distributed.check(recipe, "pretrain", [16], fits, 2)
