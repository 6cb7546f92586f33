"""Decoding steps of all layers in one call: against float64, against `decode.step`, and bit for bit across batches."""

import exact_network
import pytest
import torch

from bessemer.addons.accelerate import kernel_steps
from bessemer.addons.accelerate.kernel_steps import KernelSteps
from bessemer.data.tokenizer import Tokenizer
from bessemer.engine.decode import TorchSteps
from bessemer.engine.engine import Engine
from bessemer.engine.steps import PrefillChunk, RoutingTrace
from bessemer.model.config import preset
from bessemer.model.transformer import Transformer

TINY = dict(vocab_size=100, dim=64, n_layers=3, max_seq_len=160, init_std=0.12)
VARIANTS = {
    "v3": {},
    "v2": dict(q_lora_rank=0, score_func="softmax", topk_method="group_limited_greedy", norm_topk_prob=False,
               n_shared_experts=2),
    "odd widths": dict(dim=40, q_lora_rank=20, kv_lora_rank=26, qk_nope_head_dim=10, qk_rope_head_dim=6, v_head_dim=9,
                       n_heads=3, inter_dim=37, moe_inter_dim=13, vocab_size=77, topk_method="greedy"),
    "yarn, no shared expert": dict(rope_factor=4.0, original_seq_len=64, n_shared_experts=0, n_mtp=0),
    "dense": dict(n_dense_layers=3, n_mtp=0, kv_lora_rank=48),
}  # fmt: skip


def network(dtype=torch.float32, **values):
    model = Transformer(preset("tiny", **(TINY | values))).initialise(1).eval().to_compute(dtype)
    for n, gate in enumerate(model.gates().values()):
        if gate.bias_E is not None:
            gate.bias_E.normal_(0.0, 0.05, generator=torch.Generator().manual_seed(n))
    return model


def texts(*lengths, vocab=77):
    generator = torch.Generator().manual_seed(len(lengths))
    return [torch.randint(0, vocab, (n,), generator=generator).tolist() for n in lengths]


class Rows:
    """Texts as rows of a cache, each prefilled alone, so that no row's latents depend on the others."""

    def __init__(self, model, rows, drafts=0):
        self.cache, self.rows = TorchSteps(model).new_cache(drafts=drafts), [list(row) for row in rows]
        prompts = [self.cache.open(row) for row in rows]
        for prompt in prompts:
            self.cache.extend(prompt, len(prompt.ids))
            TorchSteps(model).prefill(self.cache, [PrefillChunk(prompt, len(prompt.ids))])
        self.cache.admit([(prompt, 1) for prompt in prompts])

    def go_on(self, steps, token_BT, trace=None):
        position_B = torch.tensor([len(row) for row in self.rows])
        for row, new in zip(self.rows, token_BT.tolist(), strict=True):
            row += new
        return steps.forward(token_BT, position_B, self.cache, trace)


def distance(x, y):
    return float((x - y).norm() / y.norm())


@pytest.mark.parametrize("variant", VARIANTS)
@torch.inference_mode()
def test_steps_equal_float64(instructions, variant):
    model = network(**VARIANTS[variant])
    cached = Rows(model, texts(1, 5, 63, 64, 70, 130))
    trace = None if variant == "dense" else RoutingTrace(model.cfg.n_routed_experts)
    for T in (1, 3, 1):
        logits = cached.go_on(KernelSteps.of(model), torch.tensor(texts(*[T] * 6)), trace).logits_BTV
        chosen = None if trace is None else trace.take().unflatten(0, (6, T)).long()
        for b, row in enumerate(cached.rows):
            exact, routes = exact_network.forward(model, row)
            assert distance(logits[b].double(), exact[-T:]) < 3e-6, (b, T)
            assert chosen is None or torch.equal(chosen[b], routes[-T:])


@pytest.mark.parametrize("variant", ["v3", "odd widths", "dense"])
@torch.inference_mode()
def test_bfloat16_equals_float64_up_to_its_rounding(instructions, variant):
    """Every token takes every expert: between two almost equal ones, rounding could pick the other."""
    every = dict(n_routed_experts=4, n_activated_experts=4, n_expert_groups=1, n_limited_groups=1)
    model = network(torch.bfloat16, **VARIANTS[variant], **every)
    cached = Rows(model, texts(1, 5, 70, 130, 2, *[8] * 15))
    for T in (1, 3):
        logits = cached.go_on(KernelSteps.of(model), torch.tensor(texts(*[T] * 20))).logits_BTV
        for b, row in enumerate(cached.rows[:6]):
            assert distance(logits[b].double(), exact_network.forward(model, row)[0][-T:]) < 0.02, (b, T)


@torch.inference_mode()
def test_rows_do_not_depend_on_batch_threads_or_drafts(instructions):
    for variant in ("v3", "odd widths"):
        model = network(**VARIANTS[variant])
        steps, rows = KernelSteps.of(model), texts(*range(1, 20), 64, 127, 66)
        new_BT = torch.tensor(texts(*[3] * len(rows)))
        together = Rows(model, rows).go_on(steps, new_BT).logits_BTV
        rows_held = Rows(model, rows)
        one_by_one = torch.cat([rows_held.go_on(steps, new_BT[:, t : t + 1]).logits_BTV for t in range(3)], 1)
        assert torch.equal(one_by_one, together), "tokens one after the other"
        for part in ([0], [21], [19, 20], [3, 7, 5], [9, 2, 0, 21], [*range(21, 9, -1)]):
            actual = Rows(model, [rows[b] for b in part]).go_on(steps, new_BT[part]).logits_BTV
            assert torch.equal(actual, together[part]), "other rows, another order"
        rows_held, before = Rows(model, rows), torch.get_num_threads()  # prefill's sums may depend on threads
        try:
            torch.set_num_threads(2)
            assert torch.equal(rows_held.go_on(steps, new_BT).logits_BTV, together), "two threads"
        finally:
            torch.set_num_threads(before)


@torch.inference_mode()
def test_prefill_equals_float64_in_any_batch_and_chunking(instructions, monkeypatch):
    for variant in ("v3", "odd widths"):
        model, rows = network(**VARIANTS[variant]), texts(1, 64, 150, 33, 65, 2)
        steps = KernelSteps.of(model)

        def filled(cuts=(), parts=slice(None), steps=steps, model=model, rows=rows):
            """(logits after the last part, routes, latents) of the rows."""
            cache, trace = TorchSteps(model).new_cache(), RoutingTrace(model.cfg.n_routed_experts)
            prompts = [cache.open(row) for row in rows[parts]]
            for cut in (*cuts, 150):
                ends = [min(cut, len(prompt.ids)) for prompt in prompts]
                chunks = [PrefillChunk(p, end) for p, end in zip(prompts, ends, strict=True) if end > p.length]
                for chunk in chunks:
                    cache.extend(chunk.prompt, chunk.end)
                logits = steps.prefill(cache, chunks, trace)
            latents = [cache.read_prompt(2, prompt, len(prompt.ids)) for prompt in prompts]
            return logits, [torch.cat(prompt.routing) for prompt in prompts], latents

        logits, routes, latents = filled()
        for b, row in enumerate(rows):
            exact, chosen = exact_network.forward(model, row)
            assert distance(logits[b].double(), exact[-1]) < 3e-6
            assert torch.equal(routes[b].long(), chosen)
        with monkeypatch.context() as patch:
            patch.setattr("bessemer.addons.accelerate.kernel_steps.PASS", 17)
            again = filled()
        assert torch.equal(again[0], logits)
        assert torch.equal(filled((1, 40, 64, 149))[0][-1], logits[2])
        alone = filled(parts=slice(2, 4))
        assert torch.equal(alone[0], logits[2:4])
        for other, where in ((again, slice(None)), (alone, slice(2, 4))):
            for k, expected in ((1, routes), (2, latents)):
                assert all(map(torch.equal, other[k], expected[where]))


def prefilled(model, rows, cuts=(), drafts=0, n_prompt=None, steps=None):
    """(logits after the last part, routes, latents of the last layer) of prompts that are cut at these positions."""
    steps = steps or KernelSteps.of(model)
    cache, trace = TorchSteps(model).new_cache(drafts=drafts), RoutingTrace(model.cfg.n_routed_experts)
    prompts = [cache.open(row, asked=n_prompt) for row in rows]
    logits = {}
    for cut in (*cuts, max(map(len, rows))):
        chunks = [PrefillChunk(p, end) for p in prompts if (end := min(cut, len(p.ids))) > p.length]
        for chunk in chunks:
            cache.extend(chunk.prompt, chunk.end)
        for chunk, logits_V in zip(chunks, steps.prefill(cache, chunks, trace), strict=True):
            logits[id(chunk.prompt)] = logits_V
    latents = [cache.read_prompt(len(cache.layers) - 1, prompt, len(prompt.ids) - drafts) for prompt in prompts]
    return [logits[id(p)] for p in prompts], [torch.cat(p.routing) for p in prompts], latents


@pytest.fixture
def short_blocks(monkeypatch):
    """The expanded form from position 64 on, in blocks of 64 tokens."""
    monkeypatch.setattr(kernel_steps, "LONG", 64)
    monkeypatch.setattr(kernel_steps, "PASS", 64)


@pytest.mark.parametrize("variant", ["v3", "odd widths", "yarn, no shared expert"])
@torch.inference_mode()
def test_expanded_prefill_equals_float64_in_any_batch_chunking_and_thread_count(instructions, short_blocks, variant):
    model, rows = network(**VARIANTS[variant] | {"max_seq_len": 700}), texts(330, 1, 129, 128, 65)
    steps = KernelSteps.of(model)
    actual = prefilled(model, rows, steps=steps)
    few = int(steps.attention_products)
    for b, row in enumerate(rows):
        exact, chosen = exact_network.forward(model, row)
        assert distance(actual[0][b].double(), exact[-1]) < 3e-6, b
        assert torch.equal(actual[1][b].long(), chosen)
    again, before = [prefilled(model, rows, (1, 63, 64, 100, 256, 300))], torch.get_num_threads()
    try:
        for threads in (2, 7):  # the second: more than heads
            torch.set_num_threads(threads)
            again.append(prefilled(model, rows))
    finally:
        torch.set_num_threads(before)
    alone = [prefilled(model, [row]) for row in rows]
    again.append([[result[k][0] for result in alone] for k in range(3)])
    for other in again:
        for k in range(3):
            assert all(map(torch.equal, other[k], actual[k]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel_steps, "LONG", 1 << 40)
        absorbed = KernelSteps.of(model)
        prefilled(model, rows, steps=absorbed)
    assert few != int(absorbed.attention_products), "it took part"


@torch.inference_mode()
def test_the_expanded_form_in_bfloat16(instructions, short_blocks):
    every = dict(n_routed_experts=4, n_activated_experts=4, n_expert_groups=1, n_limited_groups=1)
    for variant in ("v3", "odd widths"):
        model, rows = network(torch.bfloat16, **VARIANTS[variant] | every | {"max_seq_len": 700}), texts(610, 129, 200)
        for logits, row in zip(prefilled(model, rows, (100,))[0], rows, strict=True):
            assert distance(logits.double(), exact_network.forward(model, row)[0][-1]) < 0.02


@torch.inference_mode()
def test_preempted_sequences_recompute_the_same_bits(instructions, short_blocks):
    """They were computed in the absorbed form, by steps; a prefill of prompt and tokens must do the same."""
    model, row = network(max_seq_len=700), texts(200)[0]
    new = texts(150, vocab=77)[0]
    cache, steps = TorchSteps(model).new_cache(), KernelSteps.of(model)
    prompt = cache.open(row)
    cache.extend(prompt, len(row))
    steps.prefill(cache, [PrefillChunk(prompt, len(row))])
    cache.admit([(prompt, 1)])
    for n, token in enumerate(new):
        logits = steps.forward(torch.tensor([[token]]), torch.tensor([len(row) + n]), cache).logits_BTV
    total = len(row) + len(new)
    latents = cache.layers[2].index_select(0, torch.tensor(cache.row_pages[0])).flatten(0, 1)[:total]
    again = prefilled(model, [row + new], n_prompt=len(row))
    assert torch.equal(again[0][0], logits[0, 0]) and torch.equal(again[2][0], latents)
    assert not torch.equal(prefilled(model, [row + new])[2][0], latents), "as a prompt they would be other bits"


@torch.inference_mode()
def test_long_prefill_needs_hardly_more_products_than_forward():
    """16K tokens: multiplications of the attention, counted by the kernel. The last layer attends for one token."""
    T = 16_384
    model = network(n_layers=2, n_dense_layers=2, n_mtp=0, max_seq_len=T, inter_dim=32)
    cfg, steps = model.cfg, KernelSteps.of(model)
    prompt = (cache := TorchSteps(model).new_cache()).open([7] * T)
    cache.extend(prompt, T)
    logits_1V = steps.prefill(cache, [PrefillChunk(prompt, T)])
    pairs = cfg.n_heads * T * (T + 1) // 2
    own = pairs * (cfg.qk_nope_head_dim + cfg.qk_rope_head_dim + cfg.v_head_dim)
    absorbed = pairs * (2 * cfg.kv_lora_rank + cfg.qk_rope_head_dim)
    assert own < int(steps.attention_products) < min(1.2 * own, 0.7 * absorbed)
    assert distance(logits_1V[0], model(torch.tensor([[7] * T]))[0, -1]) < 3e-6


@torch.inference_mode()
def test_steps_equal_the_torch_path_after_every_update(instructions):
    """Weights that change in place, weights that move, and a cache that grows."""
    model, rows = network(), texts(3, 9, 60)
    steps, kernel_rows, torch_rows = KernelSteps.of(model), Rows(model, rows), Rows(model, rows)
    for n in range(12):
        if n == 4:
            model.head.weight.mul_(0.5)
        if n == 6:
            weight = model.layers[1].attn.wo.weight
            weight.data = weight.data * 1.5
        token_B, position_B = torch.tensor([n, n + 5, n + 9]), torch.tensor([len(row) for row in kernel_rows.rows])
        trace, expected_trace = RoutingTrace(model.cfg.n_routed_experts), RoutingTrace(model.cfg.n_routed_experts)
        out = TorchSteps(model).forward(token_B[:, None], position_B, torch_rows.cache, expected_trace)
        expected = out.logits_BTV[:, 0]
        actual = kernel_rows.go_on(steps, token_B[:, None], trace)
        assert distance(actual.logits_BTV[:, 0], expected) < 3e-6
        assert torch.equal(trace.take(), expected_trace.take())
        assert distance(model.head(actual.state_BTD), actual.logits_BTV) < 1e-6


@torch.inference_mode()
def test_what_is_not_finite_stays_in_its_row(instructions):
    model, rows = network(), texts(4, 5, 6)
    steps = KernelSteps.of(model)
    clean = Rows(model, rows).go_on(steps, torch.tensor([[7], [8], [9]])).logits_BTV
    for bad in (float("nan"), float("inf")):
        model.embed.weight[8] = bad
        broken = Rows(model, rows).go_on(steps, torch.tensor([[7], [8], [9]])).logits_BTV
        assert broken[1].isnan().any() and torch.equal(broken[[0, 2]], clean[[0, 2]])


def test_completions_are_the_same_bits_in_any_batch(instructions):
    """Prefill, steps and sampling together; the log-probabilities show every bit."""
    model, tokenizer = network(vocab_size=305), Tokenizer.train(["the quick brown fox 盛钢水"] * 8, 280)
    engine, prompts = Engine(model, tokenizer), texts(1, 5, 64, 70, 9)
    options = dict(samples=3, max_new_tokens=12, temperature=0.8, top_p=0.9, seed=3, record_routing=True)
    expected = engine.generate(prompts, **options)
    assert engine.generate(prompts, batch_rows=2, **options) == expected
    assert engine.generate(prompts[::-1], **options) == expected[::-1]


def test_what_the_kernel_does_not_know_is_left_to_torch(instructions):
    assert KernelSteps.of(torch.nn.Linear(1, 1)) is None
    assert KernelSteps.of(network().double()) is None
    model = network()
    model.layers[2].attn.wo.bfloat16()
    assert KernelSteps.of(model) is None
