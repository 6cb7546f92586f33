"""What vLLM receives, as far as it can be tested without vLLM: names and values of weights, fields of a request."""

import os
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from bessemer.addons.distributed import ray_cluster, ray_sampler, vllm_engine, vllm_weights
from bessemer.addons.distributed.ray_settings import DEFAULTS, RaySettings, VLLMOptions, VLLMSettings
from bessemer.addons.distributed.ray_worker import RolloutWorker, pack_weights, unpack_weights
from bessemer.addons.distributed.server_sampler import ServerSampler
from bessemer.config.rl import RLConfig
from bessemer.data.tokenizer import Tokenizer
from bessemer.engine.engine import Engine
from bessemer.errors import UserError
from bessemer.model.config import preset
from bessemer.model.transformer import Transformer


@pytest.fixture(scope="module")
def engine():
    tokenizer = Tokenizer.train(["Compute 3*7+6."] * 8, 274)
    shape = dict(
        vocab_size=tokenizer.vocab_size, dim=32, n_layers=2, inter_dim=48, moe_inter_dim=16, n_heads=2, q_lora_rank=16,
        kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, n_routed_experts=8,
        n_activated_experts=2, n_expert_groups=4, n_limited_groups=2, max_seq_len=64,
    )  # fmt: skip
    return Engine(Transformer(preset("tiny", **shape)).initialise(3), tokenizer)


def test_hub_state_matches_the_export_without_mtp(engine, tmp_path):
    model = engine.model
    assert model.cfg.n_mtp == 1
    model.save(tmp_path / "model", mtp=False)
    expected = load_file(tmp_path / "model" / "model.safetensors")
    weights = unpack_weights(pack_weights(model.state_dict()))
    loaded = vllm_engine.hub_state(weights, model.cfg, tmp_path)
    assert loaded.keys() == expected.keys() and any("e_score_correction_bias" in name for name in loaded)
    assert all(torch.equal(loaded[name], tensor) and loaded[name].is_contiguous() for name, tensor in expected.items())


def test_a_request_becomes_vllm_sampling_params(engine):
    plan = engine.plan([[0, 5, 6]], samples=3, temperature=0.7, max_new_tokens=11, seeds=[4])
    calls = [vllm_engine.sampling_params(sample.request) for sample in plan.batches[0].samples]
    assert len({params["seed"] for params in calls}) == 3 and all(0 <= params["seed"] < 2**63 for params in calls)
    assert calls[0] | {"seed": 0} == dict(
        temperature=0.7, top_p=1.0, top_k=0, min_p=0.0, seed=0, max_tokens=11, ignore_eos=True, logprobs=0,
        stop_token_ids=list(engine.tokenizer.stop_ids), detokenize=False,
    )  # fmt: skip
    stopped = vllm_engine.sampling_params(engine.plan([[0, 5]], stop_strings=["x"]).batches[0].samples[0].request)
    assert stopped["stop"] == ["x"] and stopped["detokenize"]
    cut = engine.plan([[0, 5]], top_p=0.9, top_k=9, min_p=0.1).batches[0].samples[0].request
    assert {"top_p": 0.9, "top_k": 9, "min_p": 0.1}.items() <= vllm_engine.sampling_params(cut).items()


def test_sampling_masks_want_a_bound_and_no_greedy_request(engine):
    def chosen(**options):
        request = engine.plan([[0, 5]], **options).batches[0].samples[0].request
        params = vllm_engine.sampling_params(request, most_kept=1024)
        return params["temperature"], params["top_k"]

    assert chosen(temperature=0.7, top_p=0.9) == (0.7, 1024) and chosen(top_k=9) == (1.0, 9)
    assert chosen(top_k=5000) == (1.0, 1024) and chosen(temperature=0.0) == (1.0, 1)


def test_a_batch_longer_than_the_engines_context_is_refused(engine):
    plan = engine.plan([[0, 5, 6]], samples=3, temperature=0.7, max_new_tokens=11, seeds=[4])
    with pytest.raises(UserError, match=r"rollout.max_model_len is 13, .* may have 14 tokens"):
        vllm_engine.check_length(plan.batches[0], 13)
    vllm_engine.check_length(plan.batches[0], 14)


def output(**fields):
    """What a `vllm.outputs.CompletionOutput` holds; test_vllm_runs.py makes real ones."""
    return SimpleNamespace(token_ids=[7, 8, 9], **fields)


def test_routed_experts_are_those_of_the_sparse_layers(engine):
    cfg = preset("tiny", **{**engine.model.cfg.model_dump(), "n_layers": 4, "n_dense_layers": 1})
    experts = np.random.default_rng(0).integers(0, 8, (5 + 3 - 1, 4, 2)).astype(np.uint8)
    routing = vllm_engine.routing_of(output(routed_experts=experts), cfg, 5)
    assert routing.dtype == torch.uint8 and torch.equal(routing, torch.from_numpy(experts[:, 1:]))
    many = cfg.model_copy(update={"n_routed_experts": 300})
    assert vllm_engine.routing_of(output(routed_experts=experts.astype(np.uint16)), many, 5).dtype == torch.int16
    for bad in (experts[:-1], experts[:, 1:], experts[..., :1]):
        with pytest.raises(UserError, match="routed_experts of shape"):
            vllm_engine.routing_of(output(routed_experts=bad), cfg, 5)
    for lacking in (output(), output(routed_experts=None)):
        with pytest.raises(UserError, match="no routed_experts"):
            vllm_engine.routing_of(lacking, cfg, 5)


def test_sampling_masks_become_kept_tokens():
    kept = vllm_engine.kept_of(output(sampling_mask=SimpleNamespace(token_ids=[[9, 7], [8], [9, 3, 4]])))
    assert kept.id_M.tolist() == [7, 9, 8, 3, 4, 9] and kept.count_T.tolist() == [2, 1, 3]
    for lacking in (output(), output(sampling_mask=None), output(sampling_mask=SimpleNamespace(token_ids=[[7]]))):
        with pytest.raises(UserError, match="no sampling_mask"):
            vllm_engine.kept_of(lacking)


def stage(**settings):
    table = {"kind": "rl", "name": "zero", "tasks": ["arithmetic"], "lr": 1e-4, "rollout": "vllm"}
    return RLConfig(**table | settings)


def test_what_a_stage_needs_of_vllm():
    needs = ray_sampler.VLLMSampler.needs
    assert needs(stage()) == {"records_routing": False, "records_kept": False, "lora_rank": 0}
    more = stage(hooks=["routing-replay"], top_p=0.9, lora={"rank": 12})
    assert needs(more) == {"records_routing": True, "records_kept": True, "lora_rank": 12}
    arguments = vllm_engine.llm_arguments(1, VLLMOptions(**needs(more)))
    assert arguments["enable_return_routed_experts"] and arguments["return_sampling_mask"]
    assert arguments["enable_lora"] and arguments["max_lora_rank"] == 16
    with pytest.raises(UserError, match="keep_sampling_mask = true"):
        ray_sampler.VLLMSampler.check_stage(stage(top_p=0.9, keep_sampling_mask=False))
    for key, settings in {"lora": {"lora": {}}, "top_p": {"top_p": 0.9}}.items():
        server = stage(rollout={"engine": "vllm-server", "url": "http://127.0.0.1:1"}, **settings)
        with pytest.raises(UserError, match=f"{key} does not reach"):
            ServerSampler.facts(server)


def test_adapters_are_files_of_their_own(tmp_path):
    files = vllm_weights.AdapterFiles()
    weights = {"a.lora_A.weight": torch.randn(2, 3), "a.lora_B.weight": torch.randn(4, 2).t().contiguous().t()}
    assert files.request() is None
    files.write(weights, '{"r": 2}')
    first = files.folder
    loaded = load_file(first / "adapter_model.safetensors")
    assert all(torch.equal(loaded[name], w) for name, w in weights.items())
    assert (first / "adapter_config.json").read_text() == '{"r": 2}'
    files.write(weights, "{}")
    assert not first.exists() and files.folder.is_dir() and files.number == 2


def test_engine_arguments_and_mla_by_shape():
    plain = vllm_engine.llm_arguments(1, DEFAULTS)
    assert plain["gpu_memory_utilization"] == 0.9
    assert not plain.keys() & {"max_model_len", "enable_sleep_mode", "distributed_executor_backend"}
    more = vllm_engine.llm_arguments(4, VLLMOptions(gpu_memory_utilization=0.4, max_model_len=2048, sleep=True))
    added = {"max_model_len": 2048, "enable_sleep_mode": True, "distributed_executor_backend": "mp"}
    assert more == plain | added | {"gpu_memory_utilization": 0.4, "tensor_parallel_size": 4}
    assert not vllm_engine.mla_off({"kv_lora_rank": 512, "qk_rope_head_dim": 64})
    assert vllm_engine.mla_off({"kv_lora_rank": 256, "qk_rope_head_dim": 32})
    assert not vllm_engine.mla_off({"hidden_size": 64}), "a model without MLA"


class Receiver:
    """vLLM's side of a transfer, modelled on the source of 0.33: a session, and views of a buffer that is reused."""

    def __init__(self):
        self.log, self.weights = [], {}

    def init_weight_transfer_engine(self, request):
        assert request == {"init_info": {"packed": True}}

    def start_weight_update(self):
        assert self.log[-1:] != ["start"]
        self.log.append("start")

    def update_weights(self, request):
        assert "start" in self.log[-2:] or self.log[-1] == "update"
        info = request["update_info"]
        assert info.keys() == {"names", "dtype_names", "shapes", "tensor_sizes", "ipc_handles"}
        parts = info["ipc_handles"]["GPU-1"][: sum(info["tensor_sizes"])].split(info["tensor_sizes"])
        for name, shape, dtype, part in zip(info["names"], info["shapes"], info["dtype_names"], parts, strict=True):
            assert name not in self.weights
            self.weights[name] = part.contiguous().view(getattr(torch, dtype)).view(shape).clone()
        self.log.append("update")

    def finish_weight_update(self):
        self.log.append("finish")


def test_weight_chunks_can_be_read_by_the_receiver(monkeypatch):
    """With odd-sized BF16 tensors between float32 ones, a tensor larger than a chunk, and two GPUs."""
    mapped = vllm_weights.MappedWeights
    buffers = []
    monkeypatch.setattr(mapped, "_buffer", lambda self, gpu, size: torch.full((size,), 255, dtype=torch.uint8))
    monkeypatch.setattr(
        mapped, "_handle", lambda self, buffer: (f"GPU-{len(buffers)}", buffers.append(buffer) or buffer)
    )
    monkeypatch.setattr(mapped, "_wait", lambda self, buffer: None)
    monkeypatch.setattr(mapped, "_collect", lambda self: None)
    monkeypatch.setattr(vllm_weights, "CHUNK", 64)
    weights = {
        "a": torch.randn(3).bfloat16(), "b": torch.randn(2, 3), "c": torch.randn(40), "d": torch.randn(5).bfloat16(),
        "e": torch.randn(6, 2).t(), "f": torch.randn(()),
    }  # fmt: skip
    receiver = Receiver()
    mapped(receiver, 2).load(weights)
    assert receiver.weights.keys() == weights.keys()
    assert all(torch.equal(receiver.weights[n], w) and receiver.weights[n].dtype == w.dtype for n, w in weights.items())
    assert receiver.log[0] == "start" and receiver.log[-1] == "finish" and receiver.log.count("update") > 2
    assert len(buffers) == 2 and all(len(buffer) == 160 for buffer in buffers)


def test_older_releases_reload_from_a_checkpoint(engine, tmp_path):
    calls = []

    class LLM:
        def collective_rpc(self, method, kwargs):
            folder = Path(kwargs["weights_path"])
            calls.append((method, load_file(folder / "model.safetensors"), (folder / "config.json").read_text()))

    assert not vllm_weights.transfers(LLM)
    (tmp_path / "config.json").write_text("{}")
    weights = {"a": torch.randn(3), "b": torch.randn(2).bfloat16()}
    files = vllm_weights.FileWeights(LLM(), tmp_path / "config.json")
    files.load(weights)
    ((method, loaded, config),) = calls
    assert [path.name for path in files.file.folder.iterdir()] == ["config.json"], (
        "a killed worker leaves no weights behind"
    )
    assert method == "reload_weights" and config == "{}" and all(torch.equal(loaded[n], w) for n, w in weights.items())


def test_workers_get_the_gpus_that_the_trainer_leaves(monkeypatch):
    def offered(visible, ranks, **rollout):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(visible.split(",")) if visible else 0)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        monkeypatch.setattr(ray_sampler.setup, "device", lambda: torch.device("cuda" if visible else "cpu"))
        form = VLLMSettings if rollout.pop("engine") == "vllm" else RaySettings
        trains = rollout.pop("trains", True)
        return ray_sampler.gpus_of_workers(form(**rollout), trains)

    assert offered("4,5,6,7", 2, engine="vllm", workers=1, gpus=2) == ["6", "7"]
    assert offered("4,5,6,7", 1, engine="ray", workers=3) == ["5", "6", "7"]
    assert offered("4,5,6,7", 4, engine="vllm", workers=2, gpus=2, trains=False) == ["4", "5", "6", "7"]
    assert offered("0,1", 1, engine="ray", workers=4, gpus=0) == [], "workers on the CPU see none"
    assert offered("0", 1, engine="vllm", sleep=True) is None
    assert offered("", 1, engine="ray") is None
    with pytest.raises(UserError, match=r"need 2 beside the 1 .* shows 2"):
        offered("0,1", 1, engine="ray", workers=2)
    with pytest.raises(UserError, match=r"take turns with the trainer \(rollout.sleep = true\)"):
        offered("0", 1, engine="vllm")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0"
    with ray_cluster._visible(["3"]):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "3"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0"


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_the_extra_is_named(engine, tmp_path):
    engine.model.save(tmp_path / "model")
    with pytest.raises(UserError, match=r"pip install 'bessemer\[vllm\]'"):
        RolloutWorker("vllm", str(tmp_path / "model"), 1).open()
