"""The weights of all shards put together: as a stream for a sampler on some ranks, and as a network to sample from."""

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from test_distributed_trainer import across, update
from test_executor import CFG, model_of

from bessemer.addons.distributed.mesh import Layout
from bessemer.addons.distributed.whole import GatheredModel, stream
from bessemer.workers import Workers

LAYOUTS = [
    ("1f1b", Layout(pp=2)),
    ("gpipe", Layout(ep=2)),
    ("gpipe", Layout(dp=2)),
    ("dualpipe", Layout(pp=2, ep=2)),
    ("gpipe", Layout(dp=2, ep=2)),
]


def memory_of(model):
    return sum(p.untyped_storage().nbytes() for p in {id(p): p for p in model.parameters()}.values())


def streamed(rank, name, layout, dtype, receivers):
    """What a rank gets out of the stream after a step, and the bytes of the messages that it sends."""
    training, sent = across(layout, name, dtype=dtype), []
    update(training, 0, 4)
    training.optimizer.settle()
    send, broadcast = dist.send, dist.broadcast
    dist.send = lambda data, target: (sent.append((target, data.nbytes)), send(data, target))
    dist.broadcast = lambda *arguments: pytest.fail("messages go to the receivers alone")
    got = {name: tensor.float().clone() for name, tensor in stream(training.collective.shard, receivers)}
    dist.send, dist.broadcast = send, broadcast
    masters = {name: value.numpy() for name, value in training.optimizer.masters().items()}
    experts = training.collective.mesh.experts
    dtypes = {name: str(tensor.dtype) for name, tensor in training.model.state_dict().items()}
    got = {name: tensor.numpy() for name, tensor in got.items()}
    return got, masters, (experts.start, experts.stop), dtypes, sent


@pytest.mark.parametrize(("name", "layout"), LAYOUTS, ids=str)
def test_stream_brings_every_tensor_to_its_receivers_alone(name, layout):
    """In the state dict's order, with the bits that were trained; nobody else gets or stores anything."""
    receivers = [0] if layout.world == 2 else [0, 3]
    for dtype in (torch.float32, torch.bfloat16):
        outcomes = on_ranks(layout.world, streamed, name, layout, dtype, receivers)
        whole = model_of(CFG, False).to_compute(dtype)
        for rank, (got, *_, sent) in enumerate(outcomes):
            assert list(got) == (list(whole.state_dict()) if rank in receivers else [])
            assert {target for target, _ in sent} <= {*receivers}
        for _, masters, (begin, end), dtypes, _ in outcomes:
            assert all(dtypes[n] == str(whole.state_dict()[n].dtype) for n in dtypes)
            for parameter, value in masters.items():
                for rank in receivers:
                    actual = torch.from_numpy(outcomes[rank][0][parameter])
                    actual = actual[begin:end] if ".experts." in parameter else actual
                    expected = torch.from_numpy(value).to(whole.state_dict()[parameter].dtype).float()
                    assert torch.equal(actual, expected), parameter


def gathered(rank, name, layout):
    training = across(layout, name)
    policy = GatheredModel(training)
    low = policy.rounded(training, torch.bfloat16, Workers())
    before = memory_of(policy.model), memory_of(low.model)
    update(training, 0, 4)
    for model in (policy, low):
        model.refresh()
    first = policy.model.state_dict()["layers.1.attn.wo.weight"]
    after = memory_of(policy.model), memory_of(low.model)
    exact, rounded = policy.model.state_dict(), low.model.state_dict()
    same = all(torch.equal(exact[n].to(rounded[n].dtype), rounded[n]) for n in exact)
    streamed = {n: t.clone() for n, t in low.weights()}
    same &= all(torch.equal(streamed[n], t) for n, t in rounded.items())
    at_first = first.clone()
    for model in (policy, low):
        model.release()
    released = memory_of(policy.model), memory_of(low.model)
    policy.refresh()
    again = torch.equal(policy.model.state_dict()["layers.1.attn.wo.weight"], at_first)
    update(training, 1, 4)
    policy.refresh()
    moved = not torch.equal(policy.model.state_dict()["layers.1.attn.wo.weight"], at_first)
    return before, after, released, same, again, moved


@pytest.mark.parametrize(("name", "layout"), [LAYOUTS[0], LAYOUTS[3]], ids=str)
def test_gathered_model_has_memory_from_refresh_to_release(name, layout):
    exact, low = memory_of(model_of(CFG, False)), memory_of(model_of(CFG, False).to_compute(torch.bfloat16))
    for before, after, released, *checks in on_ranks(layout.world, gathered, name, layout):
        assert (before, after, released) == ((0, 0), (exact, low), (0, 0)) and all(checks)
