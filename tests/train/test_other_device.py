"""Training and sampling on a device like MPS, neither CPU nor CUDA and without float64, match the CPU's numbers.

They run in their own process, since torch cannot unregister such a device."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bessemer import probe
from bessemer.addons.accelerate import compiling, gpu_device
from bessemer.addons.plan import doctor
from bessemer.config.training import PretrainConfig
from bessemer.config.units import Points
from bessemer.errors import UserError
from bessemer.model.config import preset
from bessemer.model.transformer import Transformer
from bessemer.train import setup

SHARED = Path(__file__).parents[1] / "shared"
PROGRAM = """
import json, sys, tempfile
from pathlib import Path
import torch
torch.inference_mode = lambda mode=True: torch.no_grad()  # tensors in disguise have no version counters
torch.set_num_threads(1)
from made_run import TEXTS
from other_device import OTHER, OtherDevice
from train_config import train_config
from bessemer.data.batch import Batch
from bessemer.data.tokenizer import Tokenizer
from bessemer.engine.engine import Engine
from bessemer.addons.serve.scheduler import Scheduler
from bessemer.addons.serve.requests import ServedRequest as Request
from bessemer.engine.sequence import SamplingParams
from bessemer.model.config import preset
from bessemer.model.transformer import Transformer
from bessemer.train import checkpoint
from bessemer.train.objective import next_token
from bessemer.train.trainer import Trainer

CFG = preset("tiny", vocab_size=300, dim=32, n_layers=2, max_seq_len=96, init_std=0.12, n_heads=2, q_lora_rank=16,
             kv_lora_rank=16, moe_inter_dim=16, inter_dim=64, n_routed_experts=8, n_activated_experts=2)
DRAWN = torch.Generator().manual_seed(1)
TOKENS = torch.randint(3, 300, (4, 33), generator=DRAWN)
SEGMENTS = (torch.arange(33) > 19).long().expand(4, 33)
WEIGHTS = ((torch.arange(33) > 0) & (torch.arange(33) != 20)).float().expand(4, 33)

def trained(device, **values):
    config, plan = train_config(terms=dict(mtp_lambda=0.3, balance_alpha=1e-4), **values)
    trainer = Trainer(Transformer(CFG).initialise(0).to(device), next_token, None, config, plan)
    steps = [trainer.update(Batch(TOKENS, WEIGHTS, SEGMENTS).to(device).micro(2)) for _ in range(2)]
    return [[step[name] for name in ("train/loss", "train/mtp_1", "train/grad_norm")] for step in steps]

def sampled(device, tokenizer, **options):
    engine = Engine(Transformer(CFG).initialise(0).to(device), tokenizer)
    prompts = [tokenizer.encode("the quick"), tokenizer.encode("two <answer>")]
    found = engine.generate(prompts, samples=2, max_new_tokens=6, **options)
    return [list(one.tokens) for group in found for one in group]

def scheduled(device, tokenizer):
    scheduler = Scheduler(Engine(Transformer(CFG).initialise(0).to(device), tokenizer), rows=2, prefill_tokens=8)
    for key, text in enumerate(["the quick brown fox jumps over the lazy dog", "two", "four"]):
        sampling = SamplingParams(temperature=0.8, top_k=20)
        scheduler.add(Request(tuple(tokenizer.encode(text)), key, max_new_tokens=3, sampling=sampling))
    events = []
    while not scheduler.is_idle:
        events += [(event.ticket, getattr(event, "token", None)) for event in scheduler.step()]
    return events

with OtherDevice():
    devices, tokenizer = (torch.device("cpu"), OTHER), Tokenizer.train(TEXTS, 300)
    found = {}
    for name, values in json.loads(sys.argv[1]).items():
        found[name] = [trained(device, **values) for device in devices]
    for name, options in json.loads(sys.argv[2]).items():
        found[name] = [sampled(device, tokenizer, **options) for device in devices]
    with tempfile.TemporaryDirectory() as folder:
        there = Transformer(CFG).initialise(0).to(OTHER)
        trained_there = Trainer(there, next_token, None, *train_config(), Path(folder))
        trained_there.start()
        trained_there.finish()
        saved = checkpoint.load(checkpoint.steps(Path(folder))[-1]).tensors["model"]
        assert all(torch.equal(saved[name], one.cpu()) for name, one in trained_there.optimizer.masters().items())
    found["scheduled"] = [scheduled(device, tokenizer) for device in devices]
print(json.dumps(found))
"""
TRAINED = {"adamw": {"ema_decay": 0.9}, "muon": {"optimizer": "muon"}}
SAMPLED = {
    "plain": {}, "truncated": {"temperature": 0.7, "top_p": 0.9}, "greedy": {"temperature": 0.0},
    "drafts": {"drafts": 1},
}  # fmt: skip


def test_training_and_sampling_give_the_numbers_of_the_cpu():
    command = [sys.executable, "-c", PROGRAM, json.dumps(TRAINED), json.dumps(SAMPLED)]
    path = f"{SHARED}:{Path(probe.__file__).parents[1]}"
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(done.stdout)
    for name in TRAINED:
        cpu, other = map(torch.tensor, results[name])
        # Muon multiplies in BF16 off the CPU
        torch.testing.assert_close(other, cpu, rtol=2e-2 if name == "muon" else 2e-4, atol=0)
        assert (cpu[0] - cpu[1]).abs().min() > 0.01
    for name in (*SAMPLED, "scheduled"):
        assert results[name][0] == results[name][1], name


@pytest.fixture
def mac(monkeypatch):
    monkeypatch.delenv(probe.VARIABLE, raising=False)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(probe, "idle_gpu", lambda: None)


@pytest.mark.usefixtures("mac")
def test_mps_is_chosen_where_torch_has_it_unless_a_user_or_ranks_say_cpu(monkeypatch):
    assert probe.device().type == "mps" and gpu_device.describe() == "the GPU of a Mac (MPS)"
    assert setup.precision_on("auto", probe.device()).dtype == torch.float32
    assert setup.workers().n == 1 and not compiling.want_compile("auto", 1e20)
    monkeypatch.setenv("RANK", "0")
    assert probe.device().type == "cpu"
    monkeypatch.delenv("RANK")
    monkeypatch.setenv(probe.VARIABLE, "cpu")
    assert probe.device().type == "cpu"
    monkeypatch.setenv(probe.VARIABLE, "gpu")
    with pytest.raises(UserError, match='BESSEMER_DEVICE is "gpu"; it must be "auto" or "cpu"'):
        probe.device()


@pytest.mark.usefixtures("mac")
def test_fp8_is_refused_on_mps(tmp_path):
    config = PretrainConfig(kind="pretrain", lr=Points(1e-3), fp8="paper", precision="float32")
    with pytest.raises(UserError, match=r'MPS has no FP8; set fp8 = "off", or BESSEMER_DEVICE=cpu'):
        setup.set_precision(Transformer(preset("tiny")), config, lambda text: None, tmp_path)


def test_doctor_measures_a_training_of_tiny_and_names_the_faster_device():
    assert doctor.trained(["cpu"], seconds=0.1)["cpu"] > 0
    facts = {"gpus": [], "idle_gpu": None, "trained": {"cpu": 4000.0, "mps": 9000.0}}
    assert doctor._about_device(facts) == (
        "GPU", "ok", "MPS trains the recipe tiny at 9,000 tokens/s, the CPU at 4,000: runs use MPS"
    )  # fmt: skip
    _, level, text = doctor._about_device(facts | {"trained": {"cpu": 9000.0, "mps": 4000.0}})
    assert level == "slow" and "set BESSEMER_DEVICE=cpu" in text
