"""The checks of first_hour.py, one function each. A check runs in a process of its own, prints what it does, and writes
what it found as JSON:

    python bench/gpu/checks.py layer --json layer.json [--rehearse]

`--rehearse` runs the same code with a small network on whatever this machine has, a CPU included. What only a GPU can
tell is then left out.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bessemer.system import prepare_cuda

prepare_cuda()

import torch  # noqa: E402 (CUDA reads the environment as it starts)

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "bench"), str(Path(__file__).parent)]
GOOD, BAD, SHOWN, LEFT = "good", "bad", "no bound", "left out"
POINTERS = "triton by pointers"
"""fp8.py's name for our products without tensor descriptors, where `triton` has them."""


@dataclass
class Finding:
    """What a check found."""

    verdict: str
    """GOOD or BAD against a bound; SHOWN: figures without one; LEFT: not possible on this machine."""
    says: str
    """One sentence with the figures that decided."""
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Site:
    """Where the checks run, and at what size."""

    rehearse: bool
    device: torch.device

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"

    def wait(self) -> None:
        if self.gpu:
            torch.cuda.synchronize()

    def network(self, **changes: Any) -> Any:
        """The network of recipes/one-gpu.toml; in a rehearsal the preset `tiny`."""
        from bessemer.model.config import preset

        table = {"preset": "tiny"}
        if not self.rehearse:
            table = tomllib.loads((ROOT / "recipes" / "one-gpu.toml").read_text())["model"]
        table |= changes
        return preset(table.pop("preset"), **table)


def median_seconds(site: Site, run: Callable[[], Any], times: int) -> float:
    """Median seconds of a call after two that warm up, all of its work on the device included."""
    times_taken = []
    for number in range(times + 2):
        site.wait()
        began = time.perf_counter()
        run()
        site.wait()
        if number >= 2:
            times_taken.append(time.perf_counter() - began)
    return statistics.median(times_taken)


def machine(site: Site) -> Finding:
    """What is here: the card, its driver, the libraries, and whether torch can use them."""
    doctor = subprocess.run([sys.executable, "-m", "bessemer", "doctor", "--json"], capture_output=True, text=True)
    figures: dict[str, Any] = {"doctor": json.loads(doctor.stdout or "null"), "torch": torch.__version__}
    if not site.gpu:
        return Finding(LEFT if site.rehearse else BAD, "no GPU that torch can use", figures)
    card = torch.cuda.get_device_properties(site.device)
    figures |= {
        "card": card.name, "capability": list(torch.cuda.get_device_capability()), "cuda": torch.version.cuda,
        "gib": card.total_memory / 2**30, "cards": torch.cuda.device_count(), "bf16": torch.cuda.is_bf16_supported(),
        "nccl": list(torch.cuda.nccl.version()),
    }  # fmt: skip
    if not figures["bf16"]:
        return Finding(BAD, f"{card.name} has no BF16", figures)
    return Finding(GOOD, f"{figures['cards']} x {card.name}, {figures['gib']:.1f} GiB, CUDA {figures['cuda']}", figures)


def compiler(site: Site) -> Finding:
    """torch.compile on a layer: does it work at all, how long does it take, and what does it gain?"""
    from bessemer.model.transformer import Transformer

    cfg = site.network(n_layers=2, n_dense_layers=1)
    model = Transformer(cfg).initialise(0).to(site.device).to_compute(torch.bfloat16)
    tokens = torch.randint(0, cfg.vocab_size, (4, min(1024, cfg.max_seq_len)), device=site.device)

    def step() -> None:
        model(tokens).float().square().mean().backward()

    plain = median_seconds(site, step, 3)
    began = time.perf_counter()
    for layer in model.layers:
        layer.compile(dynamic=False)
    step()
    site.wait()
    first = time.perf_counter() - began
    compiled = median_seconds(site, step, 3)
    figures = {"eager_seconds": plain, "compiled_seconds": compiled, "first_seconds": first}
    says = f"the first step took {first:.0f} s; after it {plain / compiled:.2f} times as fast as without"
    return Finding(GOOD if compiled < plain or site.rehearse else BAD, says, figures)


def fp8(site: Site) -> Finding:
    """Every FP8 kernel against the emulation, and its speed (bench/gpu/fp8.py)."""
    command = [sys.executable, str(Path(__file__).parent / "fp8.py")]
    if not site.gpu:
        return Finding(LEFT, "needs a GPU; on a CPU: TRITON_INTERPRET=1 python bench/gpu/fp8.py --interpret")
    if torch.cuda.get_device_capability() < (8, 9):
        return Finding(LEFT, "this card has no FP8 products")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fp8.json"
        try:  # what it found until then is kept
            status = subprocess.run([*command, "--json", str(path)], timeout=CHECKS["fp8"][1] - 60).returncode
            ended = f"fp8.py ended with {status}" if status else ""
        except subprocess.TimeoutExpired:
            ended = "fp8.py did not end in time"
        if not path.exists():
            return Finding(BAD, ended)
        facts = json.loads(path.read_text())
    wrong = [f"{line['call']} of {line['backend']}" for line in facts["checks"] if not line["good"]]
    says = f"{len(facts['checks']) - len(wrong)} of {len(facts['checks'])} checks passed"
    us = {(line["call"], line["shape"], line["backend"]): line["us"] for line in facts.get("speed", [])}
    gains = [us[call, shape, POINTERS] / time for (call, shape, by), time in us.items()
             if by == "triton" and (call, shape, POINTERS) in us]  # fmt: skip
    if gains:
        gain = statistics.median(gains)
        says += f"; Triton's products by tensor descriptors {gain:.2f} times as fast as by pointers"
    fault = f"wrong: {', '.join(wrong)}" if wrong else ended
    return Finding(BAD if fault else GOOD, says + (f"; {fault}" if fault else ""), facts)


def values(site: Site) -> Finding:
    """Loss and gradients of the network with packed documents and an expert without tokens: in float32 against the
    CPU, in BF16 against that."""
    from bessemer.data.batch import Batch
    from bessemer.model.transformer import Transformer
    from bessemer.train import objective

    cfg = site.network(n_layers=3, n_routed_experts=16 if site.rehearse else 32, vocab_size=4096)
    generator = torch.Generator().manual_seed(3)
    length = min(512, cfg.max_seq_len) // (4 if site.rehearse else 1)
    tokens = torch.randint(0, cfg.vocab_size, (2, length), generator=generator)
    segments = (torch.arange(length) * 3 // length).expand(2, -1).contiguous()
    weight = torch.ones(2, length)
    weight[:, 0] = 0
    batch = Batch(tokens, weight, segments)

    routed: dict[str, list[float]] = {}
    garbage: set[str] = set()

    def run(device: torch.device, dtype: torch.dtype) -> tuple[float, dict[str, torch.Tensor]]:
        model = Transformer(cfg).initialise(0).to(device).to_compute(dtype)
        for gate in model.gates().values():
            gate.bias_E[0] = -10
        torch.full((2**24 if site.rehearse else 2**28,), float("nan"), device=device)  # memory that nothing wrote
        loss = objective.next_token(model, batch.to(device), mtp_lambda=0.3, balance_alpha=1e-4).total
        loss.backward()
        gradients = {name: p.grad.double().cpu() for name, p in model.named_parameters() if p.grad is not None}
        routed.update({name: gate.load_E.tolist() for name, gate in model.gates().items()})
        garbage.update(f"{name} in {dtype}" for name, g in gradients.items() if g.dim() == 3 and g[0].count_nonzero())
        return loss.item() / (2 * (length - 1)), gradients

    def off(gradients: dict[str, torch.Tensor]) -> dict[str, float]:
        return {
            name: ((gradients[name] - g).norm() / g.norm()).item() for name, g in exact_gradients.items() if g.norm()
        }

    exact, exact_gradients = run(torch.device("cpu"), torch.float32)
    full, full_gradients = run(site.device, torch.float32)
    half, half_gradients = run(site.device, torch.bfloat16)
    figures: dict[str, Any] = {"loss": {"cpu": exact, "float32": full, "bfloat16": half}}
    figures |= {"float32": off(full_gradients), "bfloat16": off(half_gradients), "tokens_of_experts": routed}
    worst = max(figures["float32"], key=figures["float32"].__getitem__)
    middle = statistics.median(figures["bfloat16"].values())  # near a tie BF16 sends a token to another expert
    says = (
        f"loss a token {exact:.5f}, in float32 here {full:.5f}, in BF16 {half:.5f}; gradients differ by at most "
        f"{figures['float32'][worst]:.1e} ({worst}) in float32, by {middle:.1%} in the middle in BF16"
    )
    if garbage:
        says += f"; not zero for the expert without tokens: {', '.join(sorted(garbage))}"
    good = not garbage and all(gap < 1e-3 for gap in figures["float32"].values()) and abs(full - exact) < 1e-5 * exact
    return Finding(GOOD if good and middle < 0.1 and abs(half - exact) < 5e-3 * exact else BAD, says, figures)


def layer(site: Site) -> Finding:
    """Kernels that one MoE layer launches in forward and backward, at two numbers of experts, and waits of the host."""
    from torch.profiler import ProfilerActivity, profile

    from bessemer.model.segments import Packed
    from bessemer.model.transformer import Transformer

    if not site.gpu:
        return Finding(LEFT, "needs a GPU; the counts that a CPU can make are tests/model/test_gpu_path.py")
    launches: dict[str, int] = {}
    segments = (torch.arange(1024) // 300).expand(4, -1).contiguous()
    for n_experts, packed in ((16, None), (64, None), (64, Packed.of(segments, site.device))):
        cfg = site.network(n_layers=2, n_routed_experts=n_experts, n_mtp=0)
        model = Transformer(cfg).initialise(0).to(site.device).to_compute(torch.bfloat16)
        block = model.layers[1]
        x = torch.randn(4, 1024, cfg.dim, device=site.device, dtype=torch.bfloat16, requires_grad=True)
        angles = model.rope_table(1024)

        def step(block: Any = block, x: Any = x, angles: Any = angles, packed: Any = packed) -> None:
            y, balance = block(x, angles, packed)
            (y.float().sum() + balance).backward()

        for _ in range(3):
            step()
        site.wait()
        with waits_are_errors():
            step()
        site.wait()
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
            step()
            site.wait()
        name = f"{n_experts} experts{', packed' if packed is not None else ''}"
        launches[name] = sum("Launch" in event.name for event in profiler.events())
    says = ", ".join(f"{count} launches with {name}" for name, count in launches.items())
    good = max(launches.values()) <= 150 and launches["16 experts"] == launches["64 experts"]
    return Finding(GOOD if good else BAD, f"{says} (bound 150); the host waited for none", {"launches": launches})


@contextmanager
def waits_are_errors() -> Iterator[None]:
    """Every wait of the host for the GPU raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def waits_of(run: Callable[[], Any]) -> int:
    """How often the host waits for the GPU in a call."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def step(site: Site) -> Finding:
    """Training steps: MFU in BF16, FP8 against BF16, and memory against the planner's."""
    from bessemer.model.accounting import flops_per_token

    cfg = site.network()
    rows, length = (4, 64) if site.rehearse else (16, 2048)
    cases = {"BF16": dict(dtype=torch.bfloat16, fp8=None, compile=False)}
    if site.gpu:
        cases["BF16, compiled"] = dict(dtype=torch.bfloat16, fp8=None, compile=True)
        if torch.cuda.get_device_capability() >= (8, 9):
            cases["FP8"] = dict(dtype=torch.bfloat16, fp8="paper", compile=False)
    peak, predicted = _card(site, cfg, rows, length)
    flops, figures = flops_per_token(cfg, length).training, {}
    for name, case in cases.items():
        figures[name] = result = _steps(site, cfg, case, rows, length)
        rate = rows * length / result["seconds"]
        result |= {"tokens_per_second": rate, "mfu": None if peak is None else rate * flops / peak}
        result |= {"planned_gib": predicted["fp8" if case["fp8"] else "bf16"]}
        print(name, result, flush=True)
    best = max((case for name, case in figures.items() if name != "FP8"), key=lambda case: case["tokens_per_second"])
    says, good = f"BF16 {best['tokens_per_second']:,.0f} tokens/s", True
    if best["mfu"] is not None:
        says, good = says + f", {best['mfu']:.1%} of the peak (aim 40 %)", best["mfu"] >= 0.4
    if "FP8" in figures:
        gain = best["seconds"] / figures["FP8"]["seconds"]
        says, good = says + f"; FP8 {gain:.2f} times as fast (aim 1.25)", good and gain >= 1.25
    if best["peak_gib"] is not None:
        over = best["peak_gib"] / best["planned_gib"]
        says, good = says + f"; memory {over:.2f} of the planner's", good and 0.7 < over < 1.15
    verdict = SHOWN if peak is None else GOOD if good else BAD
    figures |= {"rows": rows, "length": length, "peak_tflops": None if peak is None else peak / 1e12}
    return Finding(verdict, says, figures)


def _steps(site: Site, cfg: Any, case: dict[str, Any], rows: int, length: int) -> dict[str, Any]:
    """Seconds, peak memory and waits of one case's steps. Its trainer ends with the call, before the next is made."""
    import fp8_step

    gc.collect()
    if site.gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    trainer, numbers = fp8_step.trainer(cfg, case, site.device, rows), iter(range(10_000))

    def update() -> None:
        trainer.update([fp8_step.fresh(cfg, rows, length, next(numbers))])

    return {
        "seconds": median_seconds(site, update, 6),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if site.gpu else None,
        "waits": waits_of(update) if site.gpu else None,
    }


def _card(site: Site, cfg: Any, rows: int, length: int) -> tuple[float | None, dict[str, float]]:
    """(dense BF16 FLOPs a second of the card if the planner knows it, GiB that it predicts by number format)."""
    from bessemer.addons.distributed.mesh import Layout
    from bessemer.addons.distributed.schedules import schedule
    from bessemer.addons.plan import hardware
    from bessemer.addons.plan.cost import setup_memory
    from bessemer.addons.plan.training_setup import ModelShape, Setup

    name = torch.cuda.get_device_name().replace(" ", "") if site.gpu else ""
    card_key = next((key for key in hardware.devices() if key.split("-")[0] in name), None)
    device, gib = hardware.device(card_key or "H100"), {}
    for form in ("bf16", "fp8"):
        planned = Setup(
            ModelShape.of(cfg), Layout(1, 1, 1, 8), device, "1f1b", 1, rows, length, form == "fp8", cfg.n_mtp > 0
        )
        gib[form] = max(sum(kinds.values()) for kinds in setup_memory(cfg, planned, schedule("1f1b", 1, 1))) / 2**30
    return (device.bf16 * 1e12 if card_key else None), gib


def decode(site: Site) -> Finding:
    """Decoding with the engine, from one row to many; against vLLM where it is installed."""
    from bessemer.data.tokenizer import Tokenizer
    from bessemer.engine.engine import Engine
    from bessemer.model.transformer import Transformer

    texts = [f"User: What is {i} plus {i}?\nAssistant: {2 * i}." for i in range(400)]
    tokenizer = Tokenizer.train(texts, 300)

    def drawn(n_mtp: int) -> Transformer:
        network = Transformer(site.network(n_mtp=n_mtp)).initialise(0)
        return network.to(site.device).to_compute(torch.bfloat16).eval()

    model = drawn(0)
    engine = Engine(model, tokenizer)
    new, figures = (8 if site.rehearse else 256), {}
    generator = torch.Generator().manual_seed(0)
    for rows in (1, 4) if site.rehearse else (1, 64, 256):
        prompts = torch.randint(3, 290, (rows, 32), generator=generator).tolist()

        def run(rows: int = rows, prompts: Any = prompts) -> None:
            engine.generate(prompts, samples=1, max_new_tokens=new, stop_ids=(), batch_rows=rows)

        figures[f"{rows} rows"] = rows * new / median_seconds(site, run, 2)
        print(rows, "rows", figures[f"{rows} rows"], "tokens/s", flush=True)
    few = 4 if site.rehearse else 64
    figures[f"{few} rows with a draft"] = _with_a_draft(site, Engine(drawn(1), tokenizer), few, new)
    says = rates(figures)
    if not site.gpu or importlib.util.find_spec("vllm") is None:
        return Finding(SHOWN, says + "; vLLM is not installed here", figures)
    figures["vllm"] = peer_rate = _vllm(model, tokenizer, new)
    return Finding(SHOWN, says + f"; {figures['64 rows'] / peer_rate:.2f} of vLLM's at 64 rows", figures)


def rates(figures: dict[str, float]) -> str:
    """Tokens per second by name."""
    return ", ".join(f"{name} {rate:,.0f} tokens/s" for name, rate in figures.items())


def _with_a_draft(site: Site, engine: Any, rows: int, new: int) -> float:
    """Tokens per second with drafts: the cost alone, since random weights have hardly a draft accepted."""
    prompts = [[3 + i % 280] * 32 for i in range(rows)]
    options = {"max_new_tokens": new, "stop_ids": (), "drafts": 1}
    return rows * new / median_seconds(site, lambda: engine.generate(prompts, **options), 2)


def _vllm(model: Any, tokenizer: Any, new: int) -> float:
    """Tokens per second of vLLM on the same weights at 64 rows."""
    from vllm import LLM, SamplingParams

    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder) / "tokenizer")
        model.save(Path(folder) / "model", tokenizer_dir=Path(folder) / "tokenizer")
        del model
        gc.collect()
        torch.cuda.empty_cache()
        llm = LLM(str(Path(folder) / "model"), dtype="bfloat16", gpu_memory_utilization=0.5, max_model_len=512)
        options = SamplingParams(max_tokens=new, ignore_eos=True, detokenize=False)
        prompts = [{"prompt_token_ids": [3 + i % 280] * 32} for i in range(64)]
        llm.generate(prompts, options, use_tqdm=False)
        began = time.perf_counter()
        llm.generate(prompts, options, use_tqdm=False)
        return 64 * new / (time.perf_counter() - began)


def samplers(site: Site) -> Finding:
    """vLLM as a sampler: weights mapped into it, sleep, routed experts (R3), sampling masks, against our engine."""
    if not site.gpu or importlib.util.find_spec("vllm") is None:
        return Finding(LEFT, "needs a GPU and vLLM: pip install 'bessemer[vllm]'")
    import vllm_checks

    from bessemer.data.tokenizer import Tokenizer
    from bessemer.model.transformer import Transformer

    tokenizer = Tokenizer.train(["Compute 3*7+6."] * 8, 300)
    model = Transformer(site.network(n_mtp=0)).initialise(0).to(site.device).to_compute(torch.bfloat16).eval()
    figures = vllm_checks.figures(model, tokenizer)
    gap, routed = max(v for k, v in figures.items() if k.startswith("gap")), figures[vllm_checks.MISROUTED]
    good = gap < 0.05 and routed < 0.1 and figures[vllm_checks.OUTSIDE] == 0
    says = f"log-probabilities differ by {gap:.2g} nats, {routed:.1%} of the experts do, no mask lacks its token"
    return Finding(GOOD if good else BAD, says, figures)


def save(site: Site) -> Finding:
    """A checkpoint while training goes on: how long training waits, and how long its steps take."""
    import fp8_step

    from bessemer.addons.accelerate.background import CheckpointWriter

    cfg = site.network()
    rows, length = (2, 32) if site.rehearse else (8, 2048)
    saver = fp8_step.trainer(cfg, dict(dtype=torch.bfloat16, fp8=None, compile=False), site.device, rows)
    numbers = iter(range(10_000))

    def step() -> float:
        began = time.perf_counter()
        saver.update([fp8_step.fresh(cfg, rows, length, next(numbers))])
        site.wait()
        return time.perf_counter() - began

    alone = statistics.median([step() for _ in range(6)][2:])
    with tempfile.TemporaryDirectory() as folder:
        writer = CheckpointWriter(Path(folder), 1, print)
        waits, beside = [], []
        for _ in range(2):  # the first allocates the buffer
            began = time.perf_counter()
            state = saver.state()
            saver.optimizer.copied = writer.save(saver.step, state)
            waits.append(time.perf_counter() - began)
            while writer.background.busy:
                beside.append(step())
            writer.background.finish()
        size = state.bytes()
    figures = {"bytes": size, "waited_seconds": waits, "step_seconds": alone, "beside_seconds": beside}
    lost = waits[1] + sum(beside) - alone * len(beside)
    says = (
        f"{size / 1e9:.2f} GB; training lost {lost:.2f} s, {waits[1]:.2f} of them waiting; a step takes {alone:.2f} s"
    )
    share = lost / 60  # a checkpoint a minute, the default
    verdict = SHOWN if site.rehearse else GOOD if share < 0.05 else BAD
    return Finding(verdict, says + f"; {share:.1%} of a minute (aim under 5 %)", figures)


def repeat(site: Site) -> Finding:
    """Five steps twice from one seed, as they are and in deterministic mode: the same bits, and at what price?"""
    import fp8_step

    from bessemer.addons.accelerate import determinism

    cfg = site.network(n_layers=2)
    rows, length = (2, 32) if site.rehearse else (8, 1024)

    def run() -> tuple[list[float], float]:
        """Sums over all weights after each step, and median seconds of a step."""
        built = fp8_step.trainer(cfg, dict(dtype=torch.bfloat16, fp8=None, compile=False), site.device, rows)
        losses, durations = [], []
        for n in range(5):
            durations.append(fp8_step.seconds(built, fp8_step.fresh(cfg, rows, length, n)))
            losses.append(sum(float(p.detach().double().sum()) for p in built.model.parameters()))
        return losses, statistics.median(durations)

    figures: dict[str, Any] = {}
    for name, on in (("plain", False), ("deterministic", True)):
        with determinism.kept(on, print):
            (first, _), (second, seconds) = run(), run()
        n_equal = sum(a == b for a, b in zip(first, second, strict=True))
        figures[name] = {"same": n_equal, "seconds": seconds, "first": first, "second": second}
    slower = figures["deterministic"]["seconds"] / figures["plain"]["seconds"]
    says = (
        f"after {figures['plain']['same']} of 5 steps the weights are the same, in deterministic mode after "
        f"{figures['deterministic']['same']}, whose steps take {slower:.2f} times as long"
    )
    return Finding(GOOD if figures["deterministic"]["same"] == 5 else BAD, says, figures)


def recipe(site: Site) -> Finding:
    """recipes/tiny.toml from its corpus to its RL with the devices of this machine, shortened."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "tiny"
        sets = {"pretrain.tokens": "40K" if site.rehearse else "800K", "zero.rollouts": "1" if site.rehearse else "4",
                "zero.minimum_pass": "0", "zero.eval_problems": "4"}  # fmt: skip
        if site.rehearse:
            sets |= {"zero.prompts_per_rollout": "2", "zero.samples": "2", "zero.max_new_tokens": "8",
                     "corpus.limits.countdown": "60K", "corpus.limits.arithmetic": "60K"}  # fmt: skip
        words = [word for key, value in sets.items() for word in ("--set", f"{key}={value}")]
        command = [sys.executable, "-m", "bessemer", "run", str(ROOT / "recipes" / "tiny.toml"), "--out", str(out)]
        began = time.monotonic()
        ended = subprocess.run([*command, "--until", "zero", *words], capture_output=True, text=True)
        seconds = time.monotonic() - began
        output = (ended.stdout + ended.stderr).splitlines()
        print("\n".join(output), flush=True)
        computed = [line for line in output if line.startswith("compute in")]
        losses = []
        if (path := out / "metrics.jsonl").exists():
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            losses = [line["values"]["train/loss"] for line in lines if "train/loss" in line["values"]]
    figures = {"seconds": seconds, "compute": computed, "losses": losses, "said": output[-20:]}
    if ended.returncode:
        return Finding(BAD, f"ended with {ended.returncode}: {output[-1] if output else ''}", figures)
    named = computed[0] if computed else "no device named"
    there = bool(computed) and (not site.gpu or all(torch.cuda.get_device_name() in line for line in computed))
    says = f"{seconds:.0f} s; loss {losses[0]:.2f} -> {losses[-1]:.2f}; {named}"
    return Finding(GOOD if there and losses[-1] < losses[0] else BAD, says, figures)


def layouts(site: Site) -> Finding:
    """The same steps under every layout that the cards allow (bench/layouts.py)."""
    cards = torch.cuda.device_count() if site.gpu else 0
    if cards < 2:
        return Finding(LEFT, "needs two GPUs; on CPUs: python bench/layouts.py --out runs/layouts")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "layouts.json"
        command = [sys.executable, str(ROOT / "bench" / "layouts.py"), "--out", folder, "--tokens", "40K"]
        ended = subprocess.run([*command, "--json", str(path)]).returncode
        if not path.exists():
            return Finding(BAD, f"the command ended with {ended}")
        rows = json.loads(path.read_text())["rows"]
    worst = max(rows, key=lambda row: row["first_20"])
    says = f"{len(rows)} layouts; {worst['layout']} differs most, by {worst['first_20']:.1e} in the first 20 steps"
    return Finding(GOOD if worst["first_20"] < 2e-3 else BAD, says, {"rows": rows})


def exchange(site: Site) -> Finding:
    """Tokens between ranks that share experts: every backend available, timed and compared with all-to-all."""
    cards = torch.cuda.device_count() if site.gpu else 0
    ranks = max((n for n in (2, 4, 8) if n <= cards), default=2)
    if cards < 2 and not site.rehearse:
        return Finding(LEFT, "needs two GPUs")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "exchange.json"
        command = [sys.executable, str(Path(__file__).with_name("exchange.py")), "--ranks", str(ranks)]
        ended = subprocess.run([*command, "--json", str(path), *(["--rehearse"] if site.rehearse else [])]).returncode
        if not path.exists():
            return Finding(BAD, f"the command ended with {ended}")
        facts = json.loads(path.read_text())
    reports = [
        f"{row['backend']} in {row['rows']}: there {1e3 * row['dispatch_seconds']:.2f}, back "
        f"{1e3 * row['combine_seconds']:.2f}, backward {1e3 * row['backward_seconds']:.2f} ms"
        for row in facts["rows"]
    ]
    wrong = [f"{row['backend']} by {row['off']:.1e}" for row in facts["rows"] if row["off"] > 1e-2]
    missing = [f"{name}: {why}" for name, why in facts["missing"].items()]
    says = "; ".join([f"{facts['ranks']} ranks", *reports, *missing])
    return Finding(BAD if wrong else GOOD, says + (f"; other results: {', '.join(wrong)}" if wrong else ""), facts)


def streams(site: Site) -> Finding:
    """Ten steps under torch's stream sanitizer: does a kernel touch what another stream still uses?"""
    if not site.gpu:
        return Finding(LEFT, "needs a GPU")
    environment = os.environ | {"TORCH_CUDA_SANITIZER": "1"}
    command = [sys.executable, str(Path(__file__)), "repeat", "--json", os.devnull]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    races = ended.stderr.count("CSAN detected a possible data race")
    figures = {"said": ended.stderr[-4000:], "exit": ended.returncode}
    return Finding(BAD if races or ended.returncode else GOOD, f"{races} possible races", figures)


CHECKS: dict[str, tuple[Callable[[Site], Finding], float]] = {
    "machine": (machine, 60), "compiler": (compiler, 300), "values": (values, 300), "layer": (layer, 180),
    "fp8": (fp8, 900), "step": (step, 600), "decode": (decode, 420),
    "samplers": (samplers, 600), "save": (save, 180), "repeat": (repeat, 180),
    "streams": (streams, 240), "recipe": (recipe, 420), "layouts": (layouts, 600), "exchange": (exchange, 240),
}  # fmt: skip
"""Function and longest time in seconds, in the order in which a first run would meet what they check."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("check", choices=CHECKS)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args()
    site = Site(args.rehearse, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if args.rehearse:
        torch.set_num_threads(1)
    finding = CHECKS[args.check][0](site)
    args.json.write_text(json.dumps(asdict(finding)) + "\n")


if __name__ == "__main__":
    main()
