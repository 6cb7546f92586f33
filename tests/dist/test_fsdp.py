"""Models of other families under FSDP2 on gloo ranks, against one process: losses, gradients, bytes, checkpoints that
any number of ranks resumes from, exports, LoRA and recomputation."""

import math
import resource
import signal
from functools import partial

import pytest
import torch
import torch.distributed as dist
from hf_cases import made, tokens
from ranks import on_ranks
from safetensors.torch import load_file
from train_config import train_config

from bessemer.addons.distributed.fsdp import layers_of, local
from bessemer.addons.distributed.fsdp_collective import of_fsdp
from bessemer.addons.distributed.on_fsdp_ranks import OnFSDPRanks
from bessemer.addons.distributed.ranks import Ranks
from bessemer.addons.families import causal_lm, lora
from bessemer.config.recipe import LayoutConfig
from bessemer.config.training import LoRAConfig
from bessemer.data.batch import Batch
from bessemer.errors import UserError
from bessemer.rl.losses import logprobs_of
from bessemer.train import objective, setup
from bessemer.train.runtime import Runtime

torch.set_num_threads(1)
KINDS = ("qwen2", "llama-tied")
LORA = LoRAConfig(rank=4, alpha=6)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    for kind in (*KINDS, "mixtral"):
        made(kind).save_pretrained(folder / kind)
    return folder


def rows(first, count):
    """Two packed samples per row, whose first three tokens are a prompt."""
    ids = torch.stack([tokens(24, seed=number) for number in range(first, first + count)])
    segments = torch.tensor([0] * 10 + [1] * 14).expand(count, -1).contiguous()
    loss = torch.ones(count, 24)
    loss[:, :3] = loss[:, 10:13] = 0.0
    return Batch(ids, loss, segments_BT=segments)


def runtime_of_rank(n):
    ranks = Ranks(dist.distributed_c10d._get_default_store(), dist.get_rank(), n, torch.device("cpu"))
    return OnFSDPRanks(ranks, LayoutConfig(), lambda text: None)


def network(runtime, base, with_lora=False, recompute=()):
    read = causal_lm.load(base, torch.float32) if type(runtime) is Runtime else runtime.read_network(base)
    if with_lora:
        read = lora.attach(read, LORA, 5, base, "sft")
    setup.recompute(read, LayoutConfig(recompute=list(recompute)), lambda text: None)
    return read


def trainer(runtime, model, folder=None, losses=None, **options):
    """A trainer of four steps of eight rows."""
    log = (lambda step, tokens, values: losses.append(values)) if losses is not None else (lambda *values: None)
    fixed = dict(tokens=4 * 8 * 24, lr=1e-2, batch_rows=8, micro_rows=2, weight_decay=0.1,
                 terms={"mtp_lambda": 0.0, "balance_alpha": 1e-4})  # fmt: skip
    plan = train_config(**(fixed | options))
    return runtime.trainer(model, objective.next_token, rows, *plan, folder, log, model_config=model.cfg.model_dump())


def gradients(run):
    """Sums of gradients of the first step, whole, by name."""
    run.collective.accumulate(run.on_device.micro_batches(), {"mtp_lambda": 0.0, "balance_alpha": 1e-4})
    found = {}
    for name, parameter in run.model.named_parameters():
        if parameter.requires_grad:
            grad = parameter.grad
            found[name] = (grad.full_tensor() if hasattr(grad, "full_tensor") else grad).clone()
    run.optimizer.zero_grad()
    return found


def trained(rank, n, base, folder, steps=4, export=None, stop_after=None, **options):
    """(losses and norms, gradients of the first step, bytes of weights, of gradients and moments) on this rank."""
    runtime = Runtime() if rank is None else runtime_of_rank(n)
    keys = {name: options.pop(name) for name in ("with_lora", "recompute") if name in options}
    losses = []
    run = trainer(runtime, network(runtime, base, **keys), folder, losses, **options)
    first = gradients(run) if folder is None else {}
    if stop_after is not None:
        run.asked_to_stop = lambda: len(losses) == stop_after - (rank is not None)  # ranks ask within the step
    run.run()
    if export is not None:
        runtime.save(run, export, base)
    sizes = ()
    if rank is not None:
        gradients(run)
        sharded = of_fsdp(run).sharded
        sizes = sharded.bytes(), sum(local(m).nbytes for kind in run.optimizer.moments.values() for m in kind.values())
    return [(values["train/loss"], values["train/grad_norm"]) for values in losses], first, sizes


def close(actual, expected, bound=1e-5):
    return torch.allclose(torch.tensor(actual), torch.tensor(expected), rtol=bound, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_gradients_and_bytes(bases, kind):
    """Losses of four steps to 1e-5, gradients to 1e-6, and half the bytes on each of two ranks."""
    losses, expected, _ = trained(None, 1, bases / kind, None)
    parameters = sum(p.numel() for p in causal_lm.load(bases / kind).parameters())
    for own, grads, (weights, moments) in on_ranks(2, trained, 2, bases / kind, None):
        assert close(own, losses)
        assert grads.keys() == expected.keys()
        for name, gradient in expected.items():
            assert (grads[name] - gradient).norm() <= 1e-6 * gradient.norm(), name
        assert abs(weights / (4 * parameters) - 0.5) < 0.01 and moments == 2 * weights


def norm_of_a_large_gradient(rank, base):
    run = trainer(runtime := runtime_of_rank(2), network(runtime, base))
    parameter = next(iter(run.optimizer.weights.values()))
    large = torch.rand(20_000_000, generator=torch.Generator().manual_seed(rank))
    run.optimizer.weights = {"embedding": torch.nn.Parameter(torch.zeros_like(large))}
    run.optimizer.weights["embedding"].grad = large
    assert hasattr(parameter, "to_local"), "the weights of a run are sharded"
    return run.optimizer.grad_norm().item(), large.double().square().sum().item()


def test_the_norm_of_a_large_embedding_is_exact(bases):
    """One float32 sum over 20M elements is off by a thousandth."""
    found, squares = zip(*on_ranks(2, norm_of_a_large_gradient, bases / "qwen2"), strict=True)
    assert found == pytest.approx([math.sqrt(sum(squares))] * 2, rel=1e-6)


def with_a_full_disk(rank, base, folder):
    """Rank 1 alone cannot write the second checkpoint: (error, what is left)."""
    run = trainer(runtime := runtime_of_rank(2), network(runtime, base), folder, save_steps=1)

    def limited(trainer):
        if trainer.step == 2 and rank == 1:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    run.on_step = [limited]
    with pytest.raises(UserError) as failed:
        run.run()
    dist.barrier()
    return str(failed.value), sorted(path.name for path in folder.iterdir())


def test_a_full_disk_of_one_rank_is_named_and_leaves_nothing_behind(bases, tmp_path):
    for error, left in on_ranks(2, with_a_full_disk, bases / "qwen2", tmp_path):
        assert "rank 1 cannot write" in error and "File too large" in error
        assert left and not any(name.startswith(".tmp") for name in left)


def test_a_step_of_two_rows_on_four_ranks(bases, tmp_path):
    """Two ranks have no row. Losses and gradients are those of one process, and a checkpoint goes on anywhere."""
    base, few = bases / "llama-tied", {"batch_rows": 2, "tokens": 4 * 2 * 24}
    losses, expected, _ = trained(None, 1, base, None, **few)
    for own, grads, _ in on_ranks(4, partial(trained, **few), 4, base, None):
        assert close(own, losses)
        for name, gradient in expected.items():
            assert (grads[name] - gradient).norm() <= 1e-6 * gradient.norm(), name
    (first, _, _), *_ = on_ranks(4, partial(trained, **few), 4, base, tmp_path, 4, None, 2)
    (rest, _, _), *_ = on_ranks(4, partial(trained, **few), 4, base, tmp_path)
    assert len(first) == len(rest) == 2 and close([*first, *rest], losses)


@pytest.mark.parametrize("resumes", [1, 4, None], ids=["one rank", "four ranks", "one process"])
def test_two_ranks_save_and_any_number_resumes(bases, tmp_path, resumes):
    """With the losses of a run that never stopped."""
    base = bases / "qwen2"
    losses, _, _ = trained(None, 1, base, None)
    (first, _, _), _ = on_ranks(2, trained, 2, base, tmp_path, 4, None, 2)
    assert len(first) == 2 and (tmp_path / "step-00000002" / "rank-00001-0.distcp").is_file()
    if resumes is None:
        rest, _, _ = trained(None, 1, base, tmp_path)
    else:
        (rest, _, _), *_ = on_ranks(resumes, trained, resumes, base, tmp_path)
    assert len(rest) == 2 and close([*first, *rest], losses)


def test_ranks_resume_from_one_process(bases, tmp_path):
    losses, _, _ = trained(None, 1, bases / "llama-tied", None)
    first, _, _ = trained(None, 1, bases / "llama-tied", tmp_path, stop_after=2)
    (rest, _, _), _ = on_ranks(2, trained, 2, bases / "llama-tied", tmp_path)
    assert len(first) == 2 and close([*first, *rest], losses)


def test_a_damaged_checkpoint_is_passed_over(bases, tmp_path):
    base = bases / "qwen2"
    options = {"save_steps": 1, "keep": 3}
    (losses, _, _), _ = on_ranks(2, partial(trained, **options), 2, base, tmp_path)
    file = tmp_path / "step-00000004" / "rank-00001-0.distcp"
    file.write_bytes(file.read_bytes()[:-8] + b"otherend")
    (rest, _, _), _ = on_ranks(2, partial(trained, **options), 2, base, tmp_path)
    assert close(rest, losses[-1:]), "it goes on from step 3"


@pytest.mark.parametrize("kind", ["qwen2", "llama-tied", "mixtral"])
def test_the_exported_model_is_that_of_one_process(bases, tmp_path, kind):
    trained(None, 1, bases / kind, None, export=tmp_path / "one")
    on_ranks(2, trained, 2, bases / kind, None, 4, tmp_path / "two")
    files = [{file.name for file in (tmp_path / name).iterdir()} for name in ("one", "two")]
    assert files[0] == files[1]
    one, two = (causal_lm.load(tmp_path / name).state_dict() for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert (two[name] - tensor).norm() <= 1e-4 * tensor.norm(), name


def test_lora_trains_adapters_alone_and_merges(bases, tmp_path):
    base, options = bases / "qwen2", {"with_lora": True, "weight_decay": 0.0}
    losses, expected, _ = trained(None, 1, base, None, export=tmp_path / "one" / "model", **options)
    results = on_ranks(2, partial(trained, **options), 2, base, None, 4, tmp_path / "two" / "model")
    for own, grads, (weights, moments) in results:
        assert close(own, losses) and grads.keys() == expected.keys()
        assert moments == sum(grad.nbytes for grad in grads.values()) < weights / 2, "the base has no moments"
    for name in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        one, two = (load_file(tmp_path / run / name) for run in ("one", "two"))
        assert one.keys() == two.keys()
        assert all((two[key] - one[key]).norm() <= 1e-3 * one[key].norm() for key in one)


@pytest.mark.parametrize("with_lora", [False, True])
def test_recomputed_layers_give_the_same_gradients(bases, with_lora):
    options = {"with_lora": with_lora}
    losses, expected, _ = trained(None, 1, bases / "qwen2", None, **options)
    for own, grads, _ in on_ranks(2, partial(trained, recompute=("attend",), **options), 2, bases / "qwen2", None):
        assert close(own, losses)
        assert all((grads[name] - grad).norm() <= 1e-6 * grad.norm() for name, grad in expected.items())
    assert trained(None, 1, bases / "qwen2", None, recompute=("attend",), **options)[0] == losses


@pytest.mark.parametrize("with_lora", [False, True])
def test_bfloat16_computes_with_float32_masters(bases, with_lora):
    options = {"compute_dtype": torch.bfloat16, "moments": "bfloat16", "with_lora": with_lora}
    losses, _, _ = trained(None, 1, bases / "qwen2", None, **options)
    for own, grads, (weights, moments) in on_ranks(2, partial(trained, **options), 2, bases / "qwen2", None):
        assert close(own, losses, 0.05) and all(grad.dtype == torch.float32 for grad in grads.values())
        assert moments == weights or with_lora


def test_a_model_without_decoder_layers_is_refused():
    model = causal_lm.CausalLM(made("llama"))
    model.inner.model.layers = torch.nn.ModuleDict({str(n): layer for n, layer in enumerate(model.inner.model.layers)})
    with pytest.raises(UserError, match=r"FSDP2 cannot wrap llama.*--processes 1"):
        layers_of(model)


def refused(rank, n, base):
    with pytest.raises(UserError, match="is not a directory"):
        runtime_of_rank(n).read_network(base)
    return True


def test_a_directory_that_only_rank_0_reads_is_refused_on_all(bases, tmp_path):
    assert on_ranks(2, refused, 2, tmp_path / "nothing") == [True, True]


def streamed(rank, n, base):
    """(names, what rank 0 and others receive, whether the whole model is what was read, its bytes when released)"""
    runtime = runtime_of_rank(n)
    run = trainer(runtime, network(runtime, base))
    whole = runtime.whole(run)
    released = sum(parameter.untyped_storage().nbytes() for parameter in whole.model.parameters())
    received = {name: tensor.clone() for name, tensor in whole.weights([0])}
    whole.refresh()
    model = {name: tensor.clone() for name, tensor in whole.model.state_dict().items()}
    rounded = {name: tensor.dtype for name, tensor in whole.rounded(run, torch.bfloat16, None).weights()}
    return received, model, released, rounded


@pytest.mark.parametrize("kind", KINDS)
def test_weights_stream_to_rank_0_alone(bases, kind):
    expected = causal_lm.load(bases / kind).state_dict()
    for rank, (received, model, released, rounded) in enumerate(on_ranks(2, streamed, 2, bases / kind)):
        assert list(model) == list(expected) and all(torch.equal(model[name], expected[name]) for name in expected)
        assert list(received) == ([] if rank else list(expected)) and released == 0
        assert all(torch.equal(received[name], expected[name]) for name in received)
        assert list(rounded) == list(expected) and set(rounded.values()) == {torch.bfloat16}


def compared(rank, n, base, with_lora=False):
    """Log-probabilities of rows before and after steps, of a frozen copy in between and of one that was stored, and the
    nats; on one process or this rank."""
    runtime = Runtime() if rank is None else runtime_of_rank(n)
    run = trainer(runtime, network(runtime, base, with_lora), lr=3e-2)
    read = partial(logprobs_of, temperature=1.0)
    batches = [rows(number, 1) for number in range(100, 105)]

    def now():
        return torch.cat(run.collective.outputs(batches, lambda *parts: read(*parts).flatten(), [24] * 5))

    def of(copy):
        own = run.collective.mine(batches)
        numbers = run.collective.numbers_by_pipeline(len(batches))[run.collective.pipeline]
        values = zip(numbers, copy.outputs(own), strict=True)
        return torch.cat(run.collective.exchanged({i: v.flatten() for i, v in values if i is not None}, [24] * 5))

    copy, before = runtime.frozen_copy(run, read), now()
    for _ in range(2):
        run.update(run.on_device.micro_batches())
    after, frozen, again = now(), of(copy), now()
    state = {name: tensor.clone() for name, tensor in copy.state().items()}
    copy.follow()
    followed = of(copy)
    copy.set(state)
    return [before, after, frozen, again, followed, of(copy)], run.collective.nats(batches)


@pytest.mark.parametrize("with_lora", [False, True])
def test_current_weights_and_frozen_copy_between_steps(bases, with_lora):
    expected, nats = compared(None, 1, bases / "qwen2", with_lora)
    before, after = expected[:2]
    assert (before - after).abs().max() > 0.1
    for actual, own_nats in on_ranks(2, compared, 2, bases / "qwen2", with_lora):
        for output, reference in zip(actual, [before, after, before, after, after, before], strict=True):
            assert (output - reference).abs().max() < 1e-4
        assert own_nats == pytest.approx(nats, rel=1e-5)
