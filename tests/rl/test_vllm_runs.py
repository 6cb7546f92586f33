"""vLLM itself, on a CPU, in an environment of its own: tools/vllm_cpu.sh build/vllm, then
build/vllm/bin/python -m pytest -m vllm tests/rl/test_vllm_runs.py"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from whole_runs import GRPO, IMPORTED, figures, run, start

from bessemer.addons.distributed import json_server, vllm_engine
from bessemer.addons.distributed.rank0_sampler import TrainedPolicy
from bessemer.addons.distributed.ray_settings import VLLMOptions
from bessemer.addons.distributed.ray_worker import NewWeights, RolloutWorker, pack_weights
from bessemer.addons.distributed.sampler_check import Probe, dtype_of, logprobs
from bessemer.addons.distributed.server_sampler import ServerSampler
from bessemer.addons.distributed.vllm_server import VLLMServer
from bessemer.addons.distributed.vllm_weights import FileWeights
from bessemer.config.table import RolloutConfig
from bessemer.config.training import LoRAConfig
from bessemer.data.tokenizer import Tokenizer
from bessemer.engine.engine import Engine
from bessemer.errors import UserError
from bessemer.model.config import preset
from bessemer.model.transformer import Transformer
from bessemer.train.collective import Collective
from bessemer.train.runtime import Runtime, Whole

pytestmark = [pytest.mark.vllm, pytest.mark.skipif(find_spec("vllm") is None, reason="needs tools/vllm_cpu.sh")]
SETTINGS = VLLMOptions(max_model_len=128)
PROMPTS = [[0, 5, 6, n] for n in range(7, 19)]


@pytest.fixture(scope="module")
def engine():
    """Our engine, with a random network whose logits differ: sparse layers in groups, biases, latent attention."""
    tokenizer = Tokenizer.train(["Compute 3*7+6."] * 8, 274)
    shape = dict(
        vocab_size=tokenizer.vocab_size, dim=64, n_layers=3, n_dense_layers=1, inter_dim=96, moe_inter_dim=32,
        n_heads=2, q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=24, qk_rope_head_dim=8, v_head_dim=32,
        n_routed_experts=8,
        n_activated_experts=4, n_expert_groups=4, n_limited_groups=2, max_seq_len=128, n_mtp=1,
    )  # fmt: skip
    model = Transformer(preset("tiny", **shape)).initialise(3)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "embed" not in name:
            torch.nn.init.normal_(parameter, std=0.15)
    for gate in model.gates().values():
        gate.bias_E.normal_(0, 0.05)
    return Engine(model, tokenizer)


@pytest.fixture(scope="module")
def directory(engine, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    engine.tokenizer.save(folder / "tokenizer")
    engine.model.save(folder / "model", tokenizer_dir=folder / "tokenizer")
    return folder / "model"


def batch_of(engine, **options):
    (batch,) = engine.plan(PROMPTS, max_new_tokens=60, stop_ids=[], batch_rows=len(PROMPTS), **options).batches
    return batch


def changed(model, std):
    """The weights after a large step."""
    torch.manual_seed(2)
    return {
        name: w + std * torch.randn_like(w) if w.is_floating_point() else w for name, w in model.state_dict().items()
    }


@pytest.fixture(scope="module")
def worker(directory):
    worker = RolloutWorker("vllm", str(directory), 0, SETTINGS)
    worker.open()
    return worker


def exchange(engine, weights):
    """Loads the weights into our network and packs them, with what the network computes."""
    engine.model.load_state_dict(weights, strict=True)
    ids = [*PROMPTS[0], *range(20, 60)]
    return NewWeights(
        pack_weights(engine.model.state_dict()), Probe(ids, logprobs(engine.model, ids), dtype_of(engine.model))
    )


@pytest.fixture(autouse=True)
def unchanged(engine):
    before = {name: w.clone() for name, w in engine.model.state_dict().items()}
    yield
    engine.model.load_state_dict(before, strict=True)


def test_greedy_tokens_and_logprobs_match_our_engine_across_weight_exchanges(engine, worker):
    for version, weights in enumerate(
        (dict(engine.model.state_dict()), changed(engine.model, 0.02)), start=worker.version + 1
    ):
        packed, batch = exchange(engine, weights), batch_of(engine, temperature=0.0)
        actual, own = worker.generate(version, packed, batch).completions, engine.run(batch)
        assert [list(c.tokens) for c in actual] == [list(c.tokens) for c in own]
        gap = max(
            abs(a - b)
            for one, other in zip(actual, own, strict=True)
            for a, b in zip(one.logprobs, other.logprobs, strict=True)
        )
        assert gap < 1e-4


def test_samples_depend_on_key_and_weights_alone(engine, worker):
    packed, batch = (
        exchange(engine, dict(engine.model.state_dict())),
        batch_of(engine, temperature=1.0, seeds=range(12)),
    )
    first = worker.generate(worker.version + 1, packed, batch).completions
    repeated = worker.generate(worker.version, packed, batch).completions
    assert first == repeated and len({tuple(c.tokens) for c in first}) > 6
    gaps = [
        abs(a - b)
        for sample, answer in zip(batch.samples, first, strict=True)
        for a, b in zip(
            answer.logprobs, logprobs(engine.model, [*sample.request.prompt, *answer.tokens])[3:], strict=True
        )
    ]
    assert max(gaps) < 1e-4


def test_prompts_beyond_one_prefill_step_keep_their_seeds(engine, worker):
    """8,100 tokens of prompts: a step that takes a part of one would rewind its generator."""
    prompts = [[0, *((7 * n + t) % 200 + 8 for t in range(89))] for n in range(90)]
    (batch,) = engine.plan(prompts, max_new_tokens=4, stop_ids=[], batch_rows=90, seeds=range(90)).batches
    packed = exchange(engine, dict(engine.model.state_dict()))
    assert len(worker.generate(worker.version + 1, packed, batch).completions) == 90


def stale(worker):
    worker.engine.weights.load = lambda weights: None


def silent_reload(worker):
    """vLLM's own reload, which returns without a word on CPUs."""
    engine = worker.engine
    engine.weights = FileWeights(engine.llm, Path(worker.directory) / "config.json")


def swapped_experts(worker):
    load = worker.engine.weights.load

    def swap(weights):
        one, other = (next(n for n in weights if f"layers.1.mlp.experts.{e}.up_proj" in n) for e in (1, 2))
        load({**weights, one: weights[other], other: weights[one]})

    worker.engine.weights.load = swap


@pytest.mark.parametrize("fault", [stale, silent_reload, swapped_experts])
def test_a_broken_weight_exchange_is_refused(engine, directory, fault):
    worker = RolloutWorker("vllm", str(directory), 0, SETTINGS)
    worker.open()
    fault(worker)
    with pytest.raises(UserError, match="does not compute what"):
        worker.generate(1, exchange(engine, changed(engine.model, 0.02)), batch_of(engine, temperature=1.0))


def test_a_wrong_rope_operation_is_refused(engine, directory, monkeypatch):
    """The build's own operation for interleaved RoPE; the day it is right, the arguments can go."""
    plain = vllm_engine.llm_arguments
    chosen = ("dtype", "enforce_eager", "logprobs_mode", "max_model_len")
    monkeypatch.setattr(
        vllm_engine, "llm_arguments", lambda *arguments: {name: plain(*arguments)[name] for name in chosen}
    )
    worker = RolloutWorker("vllm", str(directory), 0, SETTINGS)
    with pytest.raises(UserError, match="does not compute what"):
        worker.generate(1, exchange(engine, dict(engine.model.state_dict())), batch_of(engine, temperature=1.0))


RECIPE = IMPORTED + GRPO + 'rollout = {{ engine = "vllm", max_model_len = 128 }}\nmax_new_tokens = 24\n'
MARK = "BESSEMER_TEST"
"""In the environment of a run's processes, with its folder."""


def workers_of(out):
    """The process ids of a run's rollout workers."""
    ids = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            marked = f"{MARK}={out}".encode() in (path / "environ").read_bytes().split(b"\0")
            if marked and b"ray::RolloutWorker" in (path / "cmdline").read_bytes():
                ids.append(int(path.name))
    return ids


@pytest.mark.timeout(900)  # two runs that open four and five engines: about 100 seconds of a core
def test_a_killed_vllm_worker_changes_no_rollout(directory, tmp_path):
    """kill -9 of the worker in the middle of the run: it is replaced, and generates the same samples again. The run
    that nothing disturbs goes on beside it from then on."""
    recipe = tmp_path / "vllm.toml"
    recipe.write_text(RECIPE.format(base=directory))
    killed = start(recipe, tmp_path / "killed", **{MARK: str(tmp_path / "killed")})
    metrics = tmp_path / "killed" / "metrics.jsonl"
    while not metrics.exists() or '"rl/reward"' not in metrics.read_text():
        assert killed.poll() is None, killed.stdout.read()
        time.sleep(0.05)
    workers = workers_of(tmp_path / "killed")
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
    status, output = run(recipe, tmp_path / "whole")
    assert status == 0, output
    assert workers and killed.wait() == 0 and "is replaced" in killed.stdout.read()
    first, second = ((tmp_path / name / "02-zero" / "rollouts.jsonl").read_text() for name in ("whole", "killed"))
    assert first == second
    assert 0 < max(figures(tmp_path / "killed", "zero", "rl/sampler_gap").values()) < 1e-4


def test_an_answer_ends_at_a_stop_string_as_in_our_engine(engine, worker):
    packed, free = exchange(engine, dict(engine.model.state_dict())), engine.run(batch_of(engine, temperature=0.0))
    string = next(c.text[9:11] for c in free if c.text[9:11].isascii() and len(c.text) > 20)
    batch = batch_of(engine, temperature=0.0, stop_strings=[string])
    actual, expected = worker.generate(worker.version + 1, packed, batch).completions, engine.run(batch)
    assert [(c.text, c.finish_reason) for c in actual] == [(c.text, c.finish_reason) for c in expected]
    assert any(c.finish_reason == "stop" for c in actual) and [c.tokens for c in actual] == [c.tokens for c in expected]


def test_the_real_output_class_has_the_experts_and_the_mask(engine):
    """Recorded by hand: this build's runner returns neither."""
    from vllm.outputs import CompletionOutput, SamplingMask

    cfg = engine.model.cfg
    experts = np.random.default_rng(0).integers(0, 8, (4 + 3 - 1, cfg.n_layers, 4)).astype(np.uint8)
    output = CompletionOutput(
        index=0, text="", token_ids=[7, 8, 9], cumulative_logprob=None, logprobs=None, routed_experts=experts,
        sampling_mask=SamplingMask([[9, 7], [8], [9, 3, 4]]), finish_reason="length",
    )  # fmt: skip
    routing = vllm_engine.routing_of(output, cfg, 4)
    assert torch.equal(routing, torch.from_numpy(experts[:, cfg.n_dense_layers :]))
    assert vllm_engine.kept_of(output).id_M.tolist() == [7, 9, 8, 3, 4, 9]
    with pytest.raises(UserError, match="no routed_experts"):
        vllm_engine.routing_of(CompletionOutput(0, "", [7], None, None), cfg, 4)


def test_the_arguments_that_a_stage_needs_exist():
    from vllm import EngineArgs

    options = VLLMOptions(records_routing=True, records_kept=True, lora_rank=8, sleep=2)
    arguments = vllm_engine.llm_arguments(1, options)
    assert arguments.keys() <= {field.name for field in fields(EngineArgs)}


@pytest.mark.parametrize(
    ("needs", "named"),
    [("records_routing", "routed experts"), ("records_kept", "sampling masks"), ("sleep", "with sleep")],
)
def test_a_build_that_lacks_what_a_stage_needs_is_refused(directory, needs, named):
    worker = RolloutWorker("vllm", str(directory), 0, VLLMOptions(max_model_len=128, **{needs: True}))
    with pytest.raises(UserError, match=named):
        worker.open()


@pytest.mark.parametrize("level", [1, 2])
def test_an_engine_that_slept_samples_the_same(engine, directory, level):
    """A CPU build sleeps with its memory held; after level 2 the weights are handed over again."""
    worker = RolloutWorker("vllm", str(directory), 0, SETTINGS)
    worker.open()
    worker.engine.options = SETTINGS.model_copy(update={"sleep": level})
    loads, load = [], worker.engine.weights.load
    worker.engine.weights.load = lambda weights: loads.append(1) or load(weights)
    packed, batch = exchange(engine, changed(engine.model, 0.02)), batch_of(engine, temperature=0.0)
    results = [worker.generate(1, packed, batch).completions for _ in range(2)]
    assert results[0] == results[1] and len(loads) == level and worker.engine.asleep
    assert [list(c.tokens) for c in results[0]] == [list(c.tokens) for c in engine.run(batch)]


@pytest.mark.parametrize("kind", ["mixtral", "qwen3-moe", "qwen2"])  # vLLM's first engine decides on expert groups
def test_a_model_of_another_family_follows_its_trainer(kind, engine, tmp_path):
    """Also one whose experts its library stores in another form than it computes with."""
    from hf_cases import made

    from bessemer.addons.families.causal_lm import load

    wide = dict(hidden_size=128, head_dim=32, vocab_size=engine.tokenizer.vocab_size)
    made(kind, **wide).save_pretrained(tmp_path)
    engine.tokenizer.save(tmp_path)
    model, worker = load(tmp_path, torch.float32), RolloutWorker("vllm", str(tmp_path), 0, SETTINGS)
    own, ids = Engine(model, engine.tokenizer), [*PROMPTS[0], *range(20, 60)]
    batch = batch_of(own, temperature=0.0)
    for version in (1, 2):
        model.load_state_dict(changed(model, 0.02 * version), strict=True)
        packed = NewWeights(pack_weights(model.state_dict()), Probe(ids, logprobs(model, ids), dtype_of(model)))
        actual, expected = worker.generate(version, packed, batch).completions, own.run(batch)
        assert [list(c.tokens) for c in actual] == [list(c.tokens) for c in expected]
        pairs = zip(actual, expected, strict=True)
        assert max(abs(a - b) for one, other in pairs for a, b in zip(one.logprobs, other.logprobs, strict=True)) < 1e-3


def test_adapters_are_exchanged_without_a_new_engine(engine, tmp_path):
    pytest.importorskip("peft")
    from transformers import LlamaConfig, LlamaForCausalLM

    from bessemer.addons.families import lora
    from bessemer.addons.families.causal_lm import load

    folder = tmp_path / "base"
    torch.manual_seed(0)
    shape = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, head_dim=32)
    config = LlamaConfig(
        vocab_size=engine.tokenizer.vocab_size, num_key_value_heads=1, max_position_embeddings=128,
        initializer_range=0.15, bos_token_id=0, eos_token_id=1, **shape,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    engine.tokenizer.save(folder)
    model = lora.attach(load(folder), LoRAConfig(rank=4), 5, folder, "zero")
    model.save_adapter(tmp_path / "adapter")
    settings = (tmp_path / "adapter" / "adapter_config.json").read_text()
    worker = RolloutWorker("vllm", str(folder), 0, VLLMOptions(max_model_len=128, lora_rank=4))
    worker.open()
    own, llm, ids, texts = Engine(model, engine.tokenizer), worker.engine.llm, [*PROMPTS[0], *range(20, 60)], []
    batch = batch_of(own, temperature=0.0)

    def drawn(seed):
        generator = torch.Generator().manual_seed(seed)
        for name, tensor in model.adapters().items():
            if "lora_B" in name:
                tensor.normal_(0.0, 0.1, generator=generator)
        probe = Probe(ids, logprobs(model, ids), dtype_of(model))
        return NewWeights(pack_weights(model.adapters()), probe, settings)

    for version in (1, 2, 3):
        actual, expected = worker.generate(version, drawn(version), batch).completions, own.run(batch)
        assert [list(c.tokens) for c in actual] == [list(c.tokens) for c in expected]
        pairs = zip(actual, expected, strict=True)
        assert max(abs(a - b) for one, other in pairs for a, b in zip(one.logprobs, other.logprobs, strict=True)) < 1e-3
        texts.append([c.text for c in actual])
    assert worker.engine.llm is llm and texts[0] != texts[1] != texts[2]
    worker.engine.adapters.write = lambda weights, config: None
    with pytest.raises(UserError, match="does not compute what"):
        worker.generate(4, drawn(4), batch)


TALK = """
from bessemer.addons.tasks.environment import Environment, Observation
from bessemer.tasks.base import Problem, Verdict

class Talk(Environment):
    domain = "words"
    max_turns = 3

    def make(self, split, index, seed, language, phrasing):
        return Problem(f"{self.name}/{split}/{seed}/{index}/{language}", f"Say {index}.", language, {"difficulty": 0})

    def reset(self, problem, seed):
        return Episode(problem)

class Episode:
    def __init__(self, problem):
        self.problem, self.start = problem, [{"role": "user", "content": problem.prompt}]

    def step(self, action):
        return Observation([{"role": "user", "content": "and more"}])

    def verdict(self, text):
        return Verdict(len(text) % 2 == 0, True, "correct", text)

    def close(self):
        pass
"""


def test_episodes_are_played_turn_by_turn(directory, tmp_path):
    (tmp_path / "talk.py").write_text(TALK)
    recipe, out = tmp_path / "talk.toml", tmp_path / "run"
    text = RECIPE.replace('"arithmetic"', '"talk.py:Talk"').replace("max_new_tokens = 24", "max_new_tokens = 60")
    recipe.write_text(text.format(base=directory))
    status, output = run(recipe, out)
    assert status == 0, output
    gaps = figures(out, "zero", "rl/sampler_gap").values()
    assert max(figures(out, "zero", "rl/turns").values()) > 1 and len(gaps) == 3 and max(gaps) < 1e-4


ENVIRONMENT = {
    "VLLM_SERVER_DEV_MODE": "1", "VLLM_MLA_DISABLE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
    **vllm_engine.CPU_ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
}  # fmt: skip


@pytest.fixture(scope="module")
def serving(directory, tmp_path_factory):
    """(process, address) of a `vllm serve` of the model. The module is its command: this build lacks the metadata that
    the command `vllm` reads."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "128", "--no-enable-chunked-prefill"]
    settings += ["--compilation-config", '{"custom_ops": ["none"]}', "--logprobs-mode", "processed_logprobs"]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(directory), *settings]
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)], env=os.environ | ENVIRONMENT, stdout=file,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        while True:
            assert process.poll() is None, log.read_text()[-2000:]
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/version", timeout=5):
                break
            time.sleep(0.5)
        yield process, address
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture
def server(serving, directory, engine):
    server = VLLMServer(serving[1], directory, engine.tokenizer)
    assert server.open() is None and server.dtype == "float32" and server.max_model_len == 128
    return server


def test_a_server_gives_our_greedy_tokens_and_logprobs(engine, server):
    batch = batch_of(engine, temperature=0.0)
    actual, expected = server.run(batch), engine.run(batch)
    assert [list(c.tokens) for c in actual] == [list(c.tokens) for c in expected]
    pairs = zip(actual, expected, strict=True)
    assert max(abs(a - b) for one, other in pairs for a, b in zip(one.logprobs, other.logprobs, strict=True)) < 1e-4
    ids = [*PROMPTS[0], *range(20, 60)]
    gaps = [abs(a - b) for a, b in zip(server.score(ids), logprobs(engine.model, ids), strict=True)]
    assert max(gaps) < 1e-4


def test_a_server_samples_by_key_at_any_temperature(engine, server):
    batch = batch_of(engine, temperature=0.7, seeds=range(12))
    first, repeated = server.run(batch), server.run(batch)
    assert len({tuple(c.tokens) for c in first}) > 6
    same = [c.tokens == other.tokens for c, other in zip(first, repeated, strict=True)]
    assert sum(same) >= 9, "batches differ, and with them the last digits, which now and then choose another token"
    sample, answer = batch.samples[0], first[0]
    expected = logprobs(engine.model, [*sample.request.prompt, *answer.tokens], 0.7)[3:]
    assert max(abs(a - b) for a, b in zip(answer.logprobs, expected, strict=True)) < 1e-4


def test_a_server_ends_answers_at_stop_strings_as_our_engine_does(engine, server):
    free = engine.run(batch_of(engine, temperature=0.0))
    string = next(c.text[9:11] for c in free if c.text[9:11].isascii() and len(c.text) > 20)
    batch = batch_of(engine, temperature=0.0, stop_strings=[string])
    actual, expected = server.run(batch), engine.run(batch)
    assert [(c.text, c.finish_reason) for c in actual] == [(c.text, c.finish_reason) for c in expected]
    assert any(c.finish_reason == "stop" for c in actual) and [c.tokens for c in actual] == [c.tokens for c in expected]


def sampler_at(address, folder):
    rollout = RolloutConfig(engine="vllm-server", url=address)
    return ServerSampler.of_folder(rollout, folder, print, "the test")


def test_a_server_with_another_model_is_refused(engine, serving, directory, tmp_path):
    sampler_at(serving[1], directory).close()
    engine.model.load_state_dict(changed(engine.model, 0.05), strict=True)
    engine.tokenizer.save(tmp_path / "tokenizer")
    engine.model.save(tmp_path / "model", tokenizer_dir=tmp_path / "tokenizer")
    with pytest.raises(UserError, match="does not compute what"):
        sampler_at(serving[1], tmp_path / "model")


def test_rl_on_a_server_without_a_gpu_is_refused(engine, serving, directory):
    server = VLLMServer(serving[1], directory, engine.tokenizer)
    sampler = ServerSampler(
        engine, TrainedPolicy(Whole(engine.model), Collective(), lambda: 0, Runtime()), server, print
    )
    with pytest.raises(UserError, match=r"runs on a CPU .*rollout\.engine"):
        sampler.open()


STAGES = (
    IMPORTED
    + """
[[stage]]
kind = "eval"
models = ["base"]
tasks = ["arithmetic"]
problems = 6
samples = 1
temperatures = [0.0]
max_new_tokens = 40
searched_words = 0
{rollout}
"""
)


def test_an_evaluation_by_vllm_is_that_of_our_engine(serving, directory, tmp_path):
    """Greedy answers, by a worker with vLLM and by the server."""
    rollouts = {
        "local": "",
        "worker": 'rollout = { engine = "vllm", max_model_len = 128 }',
        "server": f'rollout = {{ engine = "vllm-server", url = "{serving[1]}" }}',
    }
    rows = {}
    for name, rollout in rollouts.items():
        (tmp_path / f"{name}.toml").write_text(STAGES.format(base=directory, rollout=rollout))
        status, output = run(tmp_path / f"{name}.toml", tmp_path / name)
        assert status == 0, output
        rows[name] = json.loads(next((tmp_path / name).glob("*eval/results.json")).read_text())["rows"]
    assert rows["local"] == rows["worker"] == rows["server"]


def test_a_server_that_is_killed_is_reported(engine, serving, directory, monkeypatch):
    """The last test of the server."""
    process, address = serving
    sampler = sampler_at(address, directory)
    monkeypatch.setattr(json_server, "PAUSE", 0.05)
    pending = sampler.policy()(PROMPTS, max_new_tokens=100, samples=32, seeds=range(12), stop_ids=[])
    os.killpg(process.pid, signal.SIGKILL)
    with pytest.raises(UserError, match=r"does not answer .*goes on from the last checkpoint"):
        pending.take()
    sampler.close()
