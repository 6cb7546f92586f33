"""The Triton kernels in Triton's interpreter against the emulation, and the table of backends.

What needs the interpreter runs in a process of its own (`in_interpreter`): the switch must be set before triton is
imported, and no other test may see it set. The process runs once; each of its checks reports separately.
"""

import functools
import importlib.util
import os
import re
import subprocess
import sys
import traceback
from types import SimpleNamespace

import hopper
import pytest
import torch
import torch.nn.functional as F
from triton_layer_checks import *  # noqa: F403  # checks of other kernels, run in the same processes

from bessemer.addons.accelerate.precision import adapters, backends, emulation, formats
from bessemer.addons.accelerate.precision.emulation import reference_gemm
from bessemer.addons.accelerate.precision.operand import TILE, DeviceCounts, Operand, quantise, transpose
from bessemer.errors import UserError

torch.set_num_threads(1)
PATHS = os.pathsep.join(sys.path)

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: pip install triton"
)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def apart(actual, expected):
    """1 - 2 <a, b> / (|a|^2 + |b|^2)."""
    actual, expected = actual.double(), expected.double()
    return abs(float(1 - 2 * (actual * expected).sum() / (actual.square().sum() + expected.square().sum())))


def same(actual, expected):
    """Values and factors agree in every bit; where a value is not finite, both need only dequantise to NaN."""
    bad = expected.dequantise().isnan()
    assert torch.equal(actual.dequantise().isnan(), bad)
    assert actual.value_MK.shape == expected.value_MK.shape and actual.scale_MJ.shape == expected.scale_MJ.shape
    bits = [o.value_MK.contiguous().view(torch.uint8).masked_fill(bad, 0) for o in (actual, expected)]
    assert torch.equal(*bits)
    factors = [o.scale_MJ.nan_to_num(0.0, 0.0, 0.0) for o in (actual, expected)]
    assert torch.equal(*factors)


def of_all_sizes(rows, columns, seed=0):
    """Values over 2^60, with zeros, negative zeros, and ties of the E4M3 grid in rows with factor 1."""
    x = normal(rows, columns, seed=seed) * torch.logspace(-9, 9, columns)
    x[:, ::7] = 0
    x[:, 3::11] = -0.0
    ties = torch.arange(16.0, 32.0) + 0.5  # halfway between two steps of 2, 1 and less
    x[0] = 0
    x[0, : min(columns, 33)] = torch.cat([torch.tensor([448.0]), ties, ties / 8192])[:columns]
    return x


SHAPES = [(70, 300), (1, 1), (129, 127), (3, 128)]


# --- checks that run in the interpreter ------------------------------------------------------------------------------


def check_quantise():
    for rows, columns in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            for power_of_two in (False, True):
                x = of_all_sizes(rows, columns).to(dtype)
                for group in ("tile", "block"):
                    same(backends.quantise(x, group, power_of_two), quantise(x, group, power_of_two))


def check_quantise_of_other_layouts():
    stack = normal(3, 150, 140)
    for group in ("tile", "block"):
        actual = backends.quantise(stack, group)
        for g in range(3):
            same(Operand(actual.value_MK[g], actual.scale_MJ[g]), quantise(stack[g], group))
    wide = normal(140, 70)
    same(backends.quantise(wide.t()), quantise(wide.t().contiguous()))
    same(backends.quantise(wide[::2, 5:]), quantise(wide[::2, 5:].contiguous()))


def check_edge_values():
    x = torch.zeros(6, 3 * TILE)
    x[1, 3], x[2, 5], x[3, 7], x[4, 9], x[5, 300] = float("nan"), float("-inf"), 1e-44, 3e38, -3e-39
    for power_of_two in (False, True):
        for group in ("tile", "block"):
            same(backends.quantise(x, group, power_of_two), quantise(x, group, power_of_two))
    actual = backends.quantise(x)
    assert actual.scale_MJ[0].tolist() == [1.0] * 3
    assert actual.value_MK.float()[1:3, :TILE].isnan().all() and actual.scale_MJ[1:3, 0].isnan().all()  # both are right
    assert backends.gemm(actual, actual, torch.float32)[1:3].isnan().all()
    h = torch.ones(3, 2 * TILE)
    h[1, 0], h[2, 2 * TILE - 1] = float("nan"), float("inf")
    dequantised = backends.swiglu(h).dequantise()
    assert dequantised[1:].isnan().all() and dequantised[0].isfinite().all()


def check_retile():
    for rows, columns in SHAPES:
        for power_of_two in (False, True):
            operand = quantise(of_all_sizes(rows, columns), "tile", power_of_two)
            same(backends.retile(operand, None, power_of_two), emulation.retile(operand, None, power_of_two))
    operand = quantise(normal(330, 150))
    for count in ([330], [70, 0, 1, 259, 0], [128, 202], [0, 0, 330]):
        actual = backends.retile(operand, count)
        same(actual, emulation.retile(operand, count, False))
        first = 0
        for rows, end in zip(count, torch.tensor(count).cumsum(0).tolist(), strict=True):
            alone = quantise(operand.dequantise()[end - rows : end].t())
            values = actual.value_MK[:, first : first + rows]
            assert torch.equal(values.float(), alone.value_MK.float())
            first += -(-rows // TILE) * TILE
        assert actual.value_MK.shape[1] == first


def check_swiglu():
    for rows, features in ((70, 200), (1, 1), (33, 128)):
        h, weight = normal(rows, 2 * features) * 3, normal(rows, seed=1).abs()
        h[1:2, 0] = -200.0  # exp(200) is infinite, silu is -0
        for dtype in (torch.float32, torch.bfloat16):
            for row_weight in (None, weight, weight.to(dtype)):
                x = h.to(dtype)
                actual, expected = backends.swiglu(x, row_weight), emulation.swiglu(x, row_weight, False)
                assert apart(actual.dequantise(), expected.dequantise()) < 1e-6
                gate, up = x.double().chunk(2, 1)
                exact = F.silu(gate) * up * (1 if row_weight is None else row_weight.double()[:, None])
                assert apart(actual.dequantise(), exact) < 1e-3  # 3 bits of mantissa: about 7e-4
    assert (backends.swiglu(h, power_of_two=True).scale_MJ.log2() % 1 == 0).all()


def check_swiglu_backward():
    """Values agree up to a sigmoid's last bit; tiles along the tokens are, bit for bit, those made from the tiles along
    the features, for each group separately."""
    for rows, count, forms in ((200, None, (0, 1)), (300, [70, 0, 1, 229], (0,)), (256, [128, 128], (1,))):
        h, dact, weight = normal(rows, 512) * 3, normal(rows, 256, seed=1), normal(rows, seed=2)
        dact[:, 5] = 0
        h = quantise(h)
        for form in forms:
            dtype, row_weight, power = ((torch.float32, weight, False), (torch.bfloat16, None, True))[form]
            actual = backends.swiglu_backward(dact.to(dtype), h, row_weight, count, power)
            expected = emulation.swiglu_backward(dact.to(dtype), h, row_weight, count, power)
            for a, b in zip(actual[:3], expected[:3], strict=True):
                assert a.value_MK.shape == b.value_MK.shape and a.scale_MJ.shape == b.scale_MJ.shape
                assert apart(a.dequantise(), b.dequantise()) < 1e-6
            same(actual[2], emulation.retile(actual[1], count, power))
            assert actual[3] is None if row_weight is None else apart(actual[3], expected[3]) < 1e-9
            assert not power or all((part.scale_MJ.log2() % 1 == 0).all() for part in actual[:3])
    dact[7, 9] = float("nan")
    act, dh, turned, _ = backends.swiglu_backward(dact, h, None, None)
    assert dh.dequantise()[7, :128].isnan().all() and turned.dequantise()[9, :128].isnan().all()
    assert not act.dequantise().isnan().any() and dh.dequantise()[8:].isfinite().all()
    none = backends.swiglu_backward(torch.zeros(0, 256), quantise(torch.zeros(0, 512)), None, [0, 0])
    assert none[0].value_MK.shape == (256, 0) and none[2].value_MK.shape == (512, 0)
    with pytest.raises(UserError, match="F must be a multiple of 128, not 100"):
        backends.swiglu_backward(torch.zeros(2, 100), quantise(torch.zeros(2, 200)), None, None)


def check_rms_norm():
    """Bit for bit the norm's kernel followed by the quantisation's. It agrees with torch up to the last bits of a sum,
    which may show in the factors."""
    from bessemer.addons.accelerate.kernels import triton_norm
    from bessemer.addons.accelerate.kernels.norm import normalise, normalise_backward
    from bessemer.addons.accelerate.precision import triton_rms_norm

    triton_norm.PARTS = triton_rms_norm.PARTS = 4  # so that a program takes several rows
    wide = normal(9, 700) * torch.logspace(-3, 3, 700)
    for x in (wide, wide[:7, 20:276], normal(2, 3)):
        gain, dy = normal(x.shape[1], seed=1) + 1, normal(*x.shape, seed=2)
        for dtype, power in ((torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)):
            arguments = dy.to(dtype), x.to(dtype), gain, 1e-5
            actual, (dx, dgain) = (
                backends.rms_norm(*arguments[1:], power, None),
                backends.rms_norm_backward(*arguments, power, None),
            )
            dx_again, dgain_two = triton_norm.backward(*arguments)
            same(actual, quantise(triton_norm.forward(*arguments[1:]), "tile", power))
            same(dx, quantise(dx_again, "tile", power))
            assert torch.equal(dgain, dgain_two)
            bound = 1e-12 if dtype == torch.float32 else 5e-4  # the interpreter truncates float32 to bfloat16
            assert apart(actual.dequantise(), quantise(normalise(*arguments[1:]), "tile", power).dequantise()) < bound
            expected, right = normalise_backward(*arguments)
            assert apart(dx.dequantise(), quantise(expected, "tile", power).dequantise()) < bound
            assert apart(dgain, right) < 1e-10
    x = normal(3, 256)
    x[1, 3] = float("nan")
    bad = backends.rms_norm(x, torch.ones(256), 1e-5, False, None).dequantise().isnan()
    assert bad[1].all() and bad.sum() == 256
    assert backends.rms_norm(torch.zeros(0, 256), torch.ones(256), 1e-5, False, None).scale_MJ.shape == (0, 2)
    dx, dgain = backends.rms_norm_backward(torch.zeros(0, 8), torch.zeros(0, 8), torch.ones(8), 1e-5, False, None)
    assert dx.value_MK.shape == (0, 8) and torch.equal(dgain, torch.zeros(8))
    with pytest.raises(UserError, match="at most 16384 numbers"):
        backends.rms_norm(torch.zeros(1, 16385), torch.ones(16385), 1e-5, False, None)


def check_e5m6():
    """Agrees bit for bit with `formats`: all sizes and signs, ties, subnormals, saturated and non-finite values."""
    for rows, columns in ((19, 304), (1, 8), (33, 128)):
        x = of_all_sizes(rows, columns)
        x[0, :8] = torch.tensor([1 + 2**-7, -1 - 3 * 2**-7, 7e4, -65280.0, 2**-14, 3 * 2**-21, -(2**-22), -0.0])
        for dtype in (torch.float32, torch.bfloat16):
            for scale in (quantise(x, power_of_two=True).scale_MJ, torch.ones(rows, -(-columns // TILE))):
                actual = backends.pack_e5m6(x.to(dtype), scale.t().contiguous().t())
                assert torch.equal(actual.code, formats.pack_e5m6(x.to(dtype), scale).code)
                unpacked = backends.unpack_e5m6(actual, columns, dtype)
                assert unpacked.dtype == dtype and torch.equal(unpacked, actual.unpack(columns, dtype))
    every = (torch.arange(4096, dtype=torch.int16) << 4).view(torch.float16).float().view(16, 256)
    unit_scale = torch.ones(16, 2)
    code, expected = backends.pack_e5m6(every, unit_scale).code, formats.pack_e5m6(every, unit_scale)
    unpacked = backends.unpack_e5m6(expected, 256, torch.float32)
    assert torch.equal(unpacked.nan_to_num(7.0), every.nan_to_num(7.0)) and torch.equal(unpacked.isnan(), every.isnan())
    finite = every.isfinite().all(1)
    assert finite.sum() == 14 and torch.equal(code[finite], expected.code[finite])
    for group in (every, normal(3, 512)[:, ::2], normal(2, 300)[:, 4:140]):
        group = group.nan_to_num(float("nan"), float("inf"))
        scale = quantise(group, power_of_two=True).scale_MJ
        actual = backends.unpack_e5m6(backends.pack_e5m6(group, scale), group.shape[1], torch.float32)
        torch.testing.assert_close(
            actual,
            formats.pack_e5m6(group, scale).unpack(group.shape[1], torch.float32),
            rtol=0,
            atol=0,
            equal_nan=True,
        )
    assert backends.pack_e5m6(torch.zeros(0, 128), torch.zeros(0, 1)).code.shape == (0, 192)
    with pytest.raises(UserError, match="K must be a multiple of 8, not 12"):
        backends.pack_e5m6(torch.zeros(2, 12), torch.ones(2, 1))


def check_gemm():
    for M, N, K in ((5, 7, 128), (130, 140, 300), (1, 1, 1), (33, 257, 129), (64, 64, 384)):
        for group in ("tile", "block"):
            x, w = quantise(of_rows(M, K)), quantise(of_rows(N, K, seed=1), group)
            # The interpreter truncates float32 to bfloat16, which costs 5e-6; rounding to nearest costs 1.4e-6.
            for dtype, bound in ((torch.float32, 1e-12), (torch.bfloat16, 1e-5)):
                for w_group in {"tile", group}:
                    actual = backends.gemm(x, w, dtype, w_group)
                    assert actual.dtype == dtype and apart(actual, reference_gemm(x, w)) < bound, (
                        M,
                        N,
                        K,
                        group,
                        w_group,
                    )


def of_rows(rows, columns, seed=0):
    """Factors differ by 2^13 from tile to tile, so that one left out or taken from elsewhere shows."""
    size = 2.0 ** torch.randint(-6, 7, (rows, -(-columns // TILE)), generator=torch.Generator().manual_seed(seed))
    return normal(rows, columns, seed=seed) * size.repeat_interleave(TILE, 1)[:, :columns]


def check_nan_stays_in_its_row():
    """Only through the factors: the interpreter reads an E4M3 NaN as 480."""
    for K in (200, 208):  # with pointers and with descriptors
        x, w = normal(4, K), normal(5, K, seed=1)
        x[1], w[3] = float("nan"), float("inf")
        x, w = quantise(x), quantise(w)
        actual = backends.gemm(x, w, torch.float32)
        bad = torch.zeros(4, 5, dtype=torch.bool)
        bad[1], bad[:, 3] = True, True
        assert torch.equal(actual.isnan(), bad)
        stacked = Operand(w.value_MK[None], w.scale_MJ[None])
        assert torch.equal(backends.grouped_gemm(x, [4], stacked, torch.float32).isnan(), bad)


def check_layouts_of_a_gemm():
    x, w = normal(70, 300), quantise(normal(300, 150, seed=1), "block")
    turned = transpose(w)
    loose = Operand(turned.value_MK.t().contiguous().t(), turned.scale_MJ.t().contiguous().t())
    expected = reference_gemm(quantise(x), turned)
    for operand in (quantise(x), backends.quantise(x)):
        assert apart(backends.gemm(operand, loose, torch.float32, "block"), expected) < 1e-12


def check_a_broken_promise_is_nan():
    x, w = quantise(normal(10, 256)), quantise(normal(200, 256, seed=1), "tile")
    assert backends.gemm(x, w, torch.float32, "block").isnan().all()


def stack(*operands):
    return Operand(*(torch.stack(part) for part in zip(*operands, strict=True)))


def check_grouped():
    x, dy = quantise(of_rows(200, 300)), quantise(of_rows(200, 70, seed=2))
    for count in ([70, 0, 1, 129], [0, 0, 0, 200], [200, 0, 0, 0]):
        for group in ("tile", "block"):
            w = stack(*(quantise(of_rows(150, 300, seed=g), group) for g in range(4)))
            expected = emulation.grouped_gemm(x, count, w, torch.float32, group)
            assert apart(backends.grouped_gemm(x, count, w, torch.float32, group), expected) < 1e-12
        sides = backends.retile(dy, count), backends.retile(x, count)
        actual = backends.grouped_wgrad(*sides, count)
        assert apart(actual, emulation.grouped_wgrad(*sides, count, torch.float32)) < 1e-12
        rows = [part.split(count) for part in (dy.dequantise(), x.dequantise())]
        for g, (own_dy, own_x) in enumerate(zip(*rows, strict=True)):
            assert apart(actual[g], own_dy.t() @ own_x) < 2e-3 if count[g] else actual[g].eq(0).all()


def check_descriptors_load_what_pointers_do():
    """Bit for bit, for matrices surrounded by numbers that must not be read or must not show: tiles extend beyond a
    group, a matrix and the columns."""
    from bessemer.addons.accelerate.precision import triton_gemm

    forms, tiled = [], triton_gemm.tiled
    triton_gemm.tiled = lambda tma, *matrices: (forms.append(tma), tiled(tma, *matrices))[1]

    def both(call, *arguments):
        actual = []
        for forced in ("", "pointers"):
            os.environ[adapters.LOADS] = forced
            actual.append(call(*arguments))
        assert torch.equal(*actual) and actual[0].isfinite().all()
        return actual[0]

    count = [70, 0, 1, 59]
    unknown = DeviceCounts(torch.tensor(count, dtype=torch.int32), 150)
    try:
        for K in (16, 304):
            x, dy = between(quantise(of_rows(150, K))), quantise(of_rows(130, 80, seed=2))
            cut_rows = Operand(x.value_MK[:130], x.scale_MJ[:130])
            w = between(stack(*(quantise(of_rows(72, K, seed=g), "block") for g in range(4))))
            matrix = Operand(w.value_MK[1], w.scale_MJ[1])
            for group in ("tile", "block"):
                both(backends.gemm, x, matrix, torch.bfloat16, group)
            actual = both(backends.grouped_gemm, cut_rows, count, w, torch.float32, "block")
            assert apart(actual, emulation.grouped_gemm(cut_rows, count, w, torch.float32, "block")) < 1e-12
            actual = both(backends.grouped_gemm, x, unknown, w, torch.bfloat16, "tile")
            assert not actual[130:].any()
            sides = between(backends.retile(dy, count)), between(backends.retile(cut_rows, count))
            actual = both(backends.grouped_wgrad, *sides, count)
            assert apart(actual, emulation.grouped_wgrad(*sides, count, torch.float32)) < 1e-12
        assert forms == [True, False] * (len(forms) // 2) and len(forms) == 2 * 2 * 5
        both(backends.gemm, *[quantise(normal(20, 200))] * 2, torch.float32)
        assert forms[-2:] == [False, False]
    finally:
        triton_gemm.tiled = tiled
        os.environ.pop(adapters.LOADS)


def check_weight_gradients_that_are_added():
    """Bit for bit the product and one addition; groups without rows add nothing."""
    count = [70, 0, 1, 59]
    dy, x = (quantise(of_rows(130, columns, seed=columns)) for columns in (80, 150))
    sides = backends.retile(dy, count), backends.retile(x, count)
    for shape, call in (
        ((4, 80, 150), lambda **to: backends.grouped_wgrad(*sides, count, **to)),
        ((80, 150), lambda **to: backends.gemm(backends.retile(dy), backends.retile(x), torch.float32, **to)),
    ):
        before = normal(*shape)
        into = before.clone()
        assert call(add_to=into) is into and torch.equal(into, before + call())
    none = backends.retile(quantise(torch.zeros(0, 80)), [0, 0, 0, 0])
    assert backends.grouped_wgrad(none, none, [0, 0, 0, 0], add_to=torch.ones(4, 80, 80)).eq(1).all()


def check_no_program_writes_rows_of_another():
    """Programs run in reverse order too: what one writes into another's rows would stay there."""
    from triton.runtime.interpreter import interpreter_builder

    x = quantise(of_rows(130, 304))
    w = stack(*(quantise(of_rows(72, 304, seed=g), "block") for g in range(4)))
    in_order, results = interpreter_builder.set_grid_idx, []
    try:
        for step in (1, -1):
            interpreter_builder.set_grid_idx = lambda at, *others, step=step: in_order(
                at if step > 0 else interpreter_builder.grid_dim[0] - 1 - at, *others
            )
            for forced in ("", "pointers"):
                os.environ[adapters.LOADS] = forced
                results.append(backends.grouped_gemm(x, [70, 0, 1, 59], w, torch.float32, "block"))
    finally:
        interpreter_builder.set_grid_idx = in_order
        os.environ.pop(adapters.LOADS)
    assert all(torch.equal(results[0], other) for other in results[1:])


def between(operand):
    """The same operand, with NaN before its first row and after its last; the interpreter reads these as 480."""
    rows = operand.value_MK.flatten(0, -2).view(torch.uint8)
    padded = F.pad(rows, (0, 0, 4, 100), value=0x7F).view(torch.float8_e4m3fn)
    return Operand(padded[4 : 4 + len(rows)].view(operand.value_MK.shape), operand.scale_MJ)


def check_counts_that_the_host_does_not_know():
    """Bit for bit what counts on the host give, and zeros after the groups; the emulation likewise."""
    for counts in ([70, 0, 1, 3], [0, 130, 0, 0], [0, 0, 0, 128]):
        whole_tiles = not any(c % TILE for c in counts)
        rows, total = sum(counts), sum(counts) + (TILE if whole_tiles else 0)
        unknown = DeviceCounts(torch.tensor(counts, dtype=torch.int32), total, whole_tiles)
        dy, h, x = (of_rows(rows, columns, seed=columns) for columns in (128, 256, 150))
        w = stack(*(quantise(of_rows(70, 150, seed=g), "block") for g in range(4)))
        gate = normal(rows).abs()
        long = [F.pad(t, (0, 0, 0, total - rows)) for t in (dy, h, x)]
        for serve in (backends, emulation):
            counted = [quantise(t) for t in (h, x)]
            filled = [quantise(t) for t in long[1:]]
            y = serve.grouped_gemm(counted[1], counts, w, torch.float32, "block")
            actual = serve.grouped_gemm(filled[1], unknown, w, torch.float32, "block")
            assert torch.equal(actual[:rows], y) and not actual[rows:].any()
            turned, expected = serve.retile(filled[1], unknown, False), serve.retile(counted[1], counts, False)
            behind(turned, expected, unknown)
            of_known = serve.swiglu_backward(dy, counted[0], gate, counts, False)
            of_all = serve.swiglu_backward(long[0], filled[0], F.pad(gate, (0, total - rows)), unknown, False)
            for part in (0, 2):
                behind(of_all[part], of_known[part], unknown)
            same(Operand(*(t[:rows] for t in of_all[1])), of_known[1])
            assert torch.equal(of_all[3][:rows], of_known[3]) and not of_all[3][rows:].any()
            assert not of_all[1].dequantise()[rows:].any() and (of_all[1].scale_MJ[rows:] == 1).all()
            result = serve.grouped_wgrad(of_all[0], turned, unknown, torch.float32)
            assert torch.equal(result, serve.grouped_wgrad(of_known[0], expected, counts, torch.float32))
            assert result.shape == (4, 128, 150)
    nobody = DeviceCounts(torch.zeros(2, dtype=torch.int32), 0)
    none = quantise(torch.zeros(0, 256))
    assert backends.grouped_gemm(none, nobody, stack(*[quantise(normal(40, 256))] * 2)).shape == (0, 40)
    turned = backends.retile(none, nobody)
    assert turned.value_MK.shape == (256, 0) and backends.grouped_wgrad(turned, turned, nobody).eq(0).all()


def behind(actual, expected, count):
    """The same columns, followed by zeros of factor 1."""
    used = expected.value_MK.shape[1]
    assert actual.value_MK.shape[1] == count.columns >= used and actual.scale_MJ.shape[1] == count.columns // TILE
    same(Operand(actual.value_MK[:, :used], actual.scale_MJ[:, : used // TILE]), expected)
    assert not actual.value_MK[:, used:].float().any() and (actual.scale_MJ[:, used // TILE :] == 1).all()


def check_nothing_to_do():
    none, w = quantise(torch.zeros(0, 256)), quantise(normal(40, 256), "block")
    for name in ("tile", "block"):
        assert backends.quantise(torch.zeros(0, 256), name).scale_MJ.shape == (0, 2)
        assert backends.quantise(torch.zeros(4, 0), name).value_MK.shape == (4, 0)
    assert backends.gemm(none, w).shape == (0, 40) and backends.gemm(w, none).shape == (40, 0)
    assert backends.swiglu(torch.zeros(0, 64)).value_MK.shape == (0, 32)
    assert backends.retile(none).value_MK.shape == (256, 0)
    assert backends.grouped_gemm(none, [0, 0], stack(w, w)).shape == (0, 40)
    turned = backends.retile(none, [0, 0])
    assert backends.grouped_wgrad(turned, turned, [0, 0]).eq(0).all()


def check_swiglu_of_experts():
    """The BF16 and float32 kernels between the two products of an expert, against torch in float64."""
    from bessemer.addons.accelerate.kernels import swiglu, triton_swiglu

    for M, width, dtype, bound in ((37, 200, torch.float32, 1e-6), (5, 64, torch.bfloat16, 1e-2)):
        h, dact = normal(M, 2 * width).to(dtype), normal(M, width, seed=1).to(dtype)
        weight = normal(M, seed=2)
        actual = [triton_swiglu.forward(h, weight), *triton_swiglu.backward(dact, h, weight)]
        exact = [h.double().requires_grad_(), weight.double().requires_grad_()]
        act = F.silu(exact[0][:, :width]) * exact[0][:, width:] * exact[1][:, None]
        act.backward(dact.double())
        plain = [swiglu.forward_reference(h, weight), *swiglu.backward_reference(dact, h, weight)]
        for own_result, torchs, expected in zip(actual, plain, (act, act, exact[0].grad, exact[1].grad), strict=True):
            assert own_result.dtype == torchs.dtype and own_result.shape == expected.shape
            for output in (own_result, torchs):
                assert (output.double() - expected).norm() < bound * expected.norm()
    none = triton_swiglu.backward(torch.zeros(0, 8), torch.zeros(0, 16), torch.zeros(0))
    assert [tuple(t.shape) for t in none] == [(0, 8), (0, 16), (0,)]


def check_tensor_groups_are_refused():
    with pytest.raises(UserError, match=r"BESSEMER_FP8_BACKEND=triton.*quantise.*: emulation"):
        backends.quantise(normal(4, 4), "tensor")


# --- what Hopper would run -------------------------------------------------------------------------------------------


def check_hopper_code():
    """Instructions, and the assembler's figures: those of `bench/gpu/ptxas.py` if the versions are the same."""
    recorded = hopper.committed()["kernels"] if hopper.committed()["versions"] == hopper.versions() else {}
    for job in hopper.samples():
        kernel = hopper.compiled(job)
        name, code = job.kind, kernel.ptx
        assert not kernel.faults()
        assert recorded.get(job.label, kernel.figures) == kernel.figures, job.label
        assert not recorded or job.label in recorded, f"{job.label}: write the table again (bench/gpu/ptxas.py --write)"
        if name in ("norm", "heads", "gate", "loss"):
            assert "ld.global" in code and "st.global" in code and ".local" not in code, name
        elif name == "e5m6":
            assert ".global.v4.b32" in code and ".local" not in code and "div.full" not in code, name
            assert "st.global.b8" not in code, name
        elif name == "expert swiglu":
            assert "cvt.rn.bf16x2.f32" in code and "ld.global.v" in code and "st.global.v" in code, name
        elif "g" in name and not name.startswith("swiglu"):
            assert code.count("wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3") == 4, name  # 128 columns a step
            by_tiles = job.constants["TMA"]
            assert ("cp.async.bulk.tensor.2d.shared" in code) == by_tiles, name
            assert ("cp.async.cg.shared.global" in code) != by_tiles, name  # 16 bytes at a time
            assert (name == "grouped_wgrad") != ("cvt.rn.bf16x2.f32" in code), name  # to nearest
        else:
            assert "cvt.rn.satfinite.e4m3x2.f32" in code and "div.rn.f32" in code, name
            assert "st.global.v4.b32" in code, name
            # a sigmoid and a norm's divisor may be approximate
            assert "div.full.f32" not in code or name.startswith(("swiglu", "rms norm")), name


CHECKS = [name for name in list(globals()) if name.startswith("check_") and name != "check_hopper_code"]


@functools.cache
def in_interpreter():
    """What went wrong in each check; empty if nothing did."""
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        backends.VARIABLE: "triton",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": PATHS,
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__], env=environment, capture_output=True, text=True, timeout=580
    )
    outputs = dict(part.split("\n", 1) for part in done.stdout.split("\0")[1:])
    return outputs if done.returncode == 0 else {name: done.stdout + done.stderr for name in CHECKS}


@needs_triton
@pytest.mark.parametrize("name", CHECKS)
def test_kernels(name):
    trouble = in_interpreter()[name].strip()
    assert not trouble, trouble


@needs_triton
def test_kernels_compile_for_hopper(tmp_path):
    """What the interpreter cannot see: types, layouts, tensor core instructions, exact division."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": PATHS}
    command = [sys.executable, "-W", "ignore", __file__, "check_hopper_code"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=580)
    assert done.stdout.split("\n", 1) == ["\0check_hopper_code", ""], done.stdout + done.stderr


class Tuned:
    """Stands for an autotuned kernel; tuning picks the last configuration."""

    def __init__(self, configs, messages):
        self.configs, self.best_config, self.fn, self._said = configs, configs[-1], self, messages
        self.arg_names = ["x", "w", "TMA"]

    def __getitem__(self, grid):
        def run(*arguments, **config):
            self.given = arguments
            self._said.append((grid, config))

        return run


@needs_triton
def test_where_nothing_may_be_tuned_the_nearest_size_serves():
    from bessemer.addons.accelerate.precision import tuning
    from bessemer.addons.accelerate.precision.triton_gemm import configurations, launch, size_class

    configs, messages = configurations(narrow=True), []
    kernel = Tuned(configs, messages)
    kernel.fn = Tuned(configs, messages)
    first = configs[0].all_kwargs()
    x, w = SimpleNamespace(), SimpleNamespace()
    with tuning.without():
        launch(kernel, "a", 512, (7, 8), x, w, True)
    assert x.block_shape == [first["BLOCK_M"], TILE] and w.block_shape == [first["BLOCK_N"], TILE]
    launch(kernel, "b", 4096, (7, 8), x, w, True)
    kernel.best_config = configs[1]
    launch(kernel, "c", 64, (7, 8), x, w, True)
    kernel.best_config = configs[2]
    with tuning.without():
        for size in (4096, 64, 2048, 128):
            launch(kernel, size, size, (7, 8), x, w, True)
        launch(kernel, "d", 64, (8, 8), None, None, False)
    seen, y = [], torch.ones(2)
    adds = Tuned(configs, seen)
    adds.fn = Tuned(configs, seen)
    for _ in range(2):
        launch(adds, "e", 64, (7, 8), x, w, True, None, y, add=True)
    last = configs[-1].all_kwargs()
    assert seen == [("e", {}), ("e", last), ("e", last)]
    assert [(arguments[4] is y, arguments[5]) for arguments in (adds.given, adds.fn.given)] == [
        (False, True),
        (True, True),
    ]
    assert tuning.allowed()
    nearest = [(2048, configs[-1].all_kwargs()), (128, configs[1].all_kwargs()), ("d", first)]
    assert messages == [("a", first), ("b", {}), ("c", {}), (4096, {}), (64, {}), *nearest]
    assert {"BLOCK_M", "BLOCK_N", "num_warps", "num_stages"} <= first.keys()
    sizes = [
        size_class(*arguments) for arguments in ((1,), (65,), (8192,), (10**6,), (4096, 256), (65537, 64), (65536, 64))
    ]
    assert sizes == [64, 128, 8192, 8192, 64, 2048, 1024]


@needs_triton
@pytest.mark.parametrize("gradient", [False, True])
def test_dense_products_tune_a_few_sizes_and_reuse_the_nearest(monkeypatch, gradient):
    """Also where they are the summed dimension, as for a weight gradient."""
    from bessemer.addons.accelerate.precision import triton_gemm, tuning

    messages = []
    kernel = Tuned(triton_gemm.configurations(narrow=True), messages)
    kernel.fn, kernel.arg_names = Tuned(kernel.configs, messages), triton_gemm._gemm.arg_names
    keys = triton_gemm._gemm.keys
    monkeypatch.setattr(triton_gemm, "_gemm", kernel)
    monkeypatch.setattr(triton_gemm, "_tuned", {})

    def operand(rows, columns):
        return Operand(torch.empty(rows, columns, device="meta"), torch.empty(rows, 1, device="meta"))

    def tuned_for(tokens):
        rows, columns, sums = (512, 1024, tokens) if gradient else (tokens, 512, 1024)
        dtype = torch.float32 if gradient else torch.bfloat16
        triton_gemm.gemm(operand(rows, sums), operand(columns, sums), dtype, not gradient, False)
        inputs = dict(zip(kernel.arg_names, kernel.given, strict=False))
        return tuple(inputs[name] for name in keys if name in inputs)

    assert len({tuned_for(tokens) for tokens in range(4096, 16384, 64)}) == 2
    kernel.best_config = kernel.configs[1]
    tuned_for(64)
    messages.clear()
    with tuning.without():
        tuned_for(70)
    assert messages[0][1] == kernel.configs[1].all_kwargs()


@needs_triton
def test_what_is_tried_has_registers_enough():
    """Every configuration that tuning may choose is in the assembler's table of figures, and none spills."""
    recorded, labels = hopper.committed()["kernels"], {job.label for job in hopper.everything()}
    assert labels == recorded.keys()
    assert not [label for label, figures in recorded.items() if figures["spilled"]]
    assert sum("triton_gemm._wgrad" in label for label in labels) > 1
    for variant in ("TMA=0 BLOCKS=0 EVEN=1", "TMA=0 BLOCKS=1 EVEN=1", "TMA=1 BLOCKS=0", "TMA=1 BLOCKS=1"):
        assert sum(f"triton_gemm._grouped GROUPS=5 ROOM=8 {variant}" in label for label in labels) > 3


@needs_triton
def test_routed_row_counts_cause_no_recompilation():
    from bessemer.addons.accelerate.precision import triton_gemm, triton_quantise

    rows = {
        triton_quantise._tiles: {"M"}, triton_quantise._retile: {"scale_column"}, triton_quantise._swiglu: {"M"},
        triton_quantise._swiglu_backward: {"M", "scale_column"}, triton_gemm._grouped.fn: {"M", "sx_column", "SIZE"},
        triton_gemm._wgrad.fn: {"TILES", "SIZE"},
    }  # fmt: skip
    for kernel, names in rows.items():  # any other size that follows the rows is a multiple of 128
        assert {p.name for p in kernel.params if p.do_not_specialize} == names


# --- without triton --------------------------------------------------------------------------------------------------


def test_a_cpu_is_served_by_the_emulation(monkeypatch):
    monkeypatch.delenv(backends.VARIABLE, raising=False)
    rows = backends.table("cpu")
    assert [row[0] for row in rows] == list(backends.CALLS) and {row[1] for row in rows} == {"emulation"}
    assert all("not triton: " in why and "not torch: " in why and "not deep_gemm: " in why for _, _, why in rows)
    x, w = normal(300, 200), normal(150, 200, seed=1)
    row_tiles, blocks = backends.quantise(x), backends.quantise(w, "block")
    same(row_tiles, quantise(x))
    assert apart(backends.gemm(row_tiles, blocks, torch.float32, "block"), reference_gemm(row_tiles, blocks)) < 1e-12
    assert backends.gemm(row_tiles, blocks).dtype == torch.bfloat16
    turned = backends.retile(row_tiles, [100, 200])
    assert turned.value_MK.shape == (200, 384)
    assert backends.grouped_wgrad(turned, turned, [100, 200]).shape == (2, 200, 200)
    assert apart(backends.swiglu(x).dequantise(), F.silu(x[:, :100]) * x[:, 100:]) < 1e-3


def test_importing_the_table_imports_no_triton():
    code = (
        "import sys, bessemer.addons.accelerate.precision.backends; "
        "sys.exit(any(m.split('.')[0] == 'triton' for m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    "name, fault",
    [
        ("torch", r"BESSEMER_FP8_BACKEND=torch cannot serve gemm: .*Hopper.*; unset it, or use one of: emulation"),
        ("triton", "cannot serve gemm: it needs an NVIDIA GPU of compute capability 8.9 or newer; unset it"),
        ("deep_gemm", "cannot serve gemm: .*; unset it"),
        ("cutlass", "is not a backend; unset it, or use one of: deep_gemm, torch, triton, emulation"),
    ],
)
def test_a_forced_backend_that_cannot(monkeypatch, name, fault):
    if name == "triton" and importlib.util.find_spec("triton") is None:
        fault = "the package triton is not installed"
    monkeypatch.setenv(backends.VARIABLE, name)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x = quantise(normal(16, 128))
    with pytest.raises(UserError, match=fault):
        backends.gemm(x, x)


UNKNOWN = DeviceCounts(torch.tensor([8192], dtype=torch.int32), 8192, True)
WGRAD = dict(group="tile", shape=(4096, 7168, 8192), out_dtype=torch.float32, count=(8000, 100))
HOPPER = dict(device=torch.device("cuda"), group="block", shape=(4096, 2112, 7168), out_dtype=torch.bfloat16)


@pytest.mark.parametrize(
    "name, call, change, why",
    [
        ("torch", "gemm", {}, None),
        ("torch", "gemm", {"group": "tile", "out_dtype": torch.float32}, None),
        ("torch", "gemm", {"shape": (4096, 2112, 7170)}, "multiples of 16"),
        ("torch", "gemm", {"shape": (0, 2112, 7168)}, "multiples of 16"),
        ("torch", "grouped_gemm", {}, "two matrices only"),
        ("deep_gemm", "gemm", {}, None),
        ("deep_gemm", "gemm", {"group": "tile"}, "float32 here, not torch.bfloat16"),
        ("deep_gemm", "gemm", {"group": "tile", "out_dtype": torch.float32}, None),
        ("deep_gemm", "gemm", {"group": "tensor"}, "by blocks"),
        ("deep_gemm", "gemm", {"out_dtype": torch.float32}, "bfloat16"),
        ("deep_gemm", "grouped_gemm", {"group": "tile"}, "by blocks"),
        ("deep_gemm", "grouped_wgrad", WGRAD, None),
        ("deep_gemm", "grouped_wgrad", WGRAD | {"out_dtype": torch.bfloat16}, "float32 here"),
        ("deep_gemm", "grouped_wgrad", WGRAD | {"shape": (4100, 7168, 8192)}, "rows of a gradient .* not 4100"),
        ("deep_gemm", "grouped_wgrad", WGRAD | {"count": UNKNOWN}, "asks the host for every group's rows"),
        ("deep_gemm", "grouped_wgrad", WGRAD | {"release": "old"}, "has no k_grouped_fp8_gemm_nt_contiguous"),
        ("deep_gemm", "grouped_wgrad", WGRAD | {"release": None}, "cannot be imported .ModuleNotFoundError"),
        ("deep_gemm", "gemm", {"shape": (4096, 2100, 7168)}, "multiple of 64"),
        ("deep_gemm", "grouped_gemm", {"count": (8192, 8192)}, None),
        ("deep_gemm", "grouped_gemm", {"count": (8192, 100)}, "multiple of 128"),
        ("deep_gemm", "quantise", {}, "only its products"),
    ],
)
def test_what_is_refused_on_hopper(monkeypatch, name, call, change, why):
    monkeypatch.setattr(adapters, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(adapters, "_installed", lambda package: True)
    monkeypatch.setattr(torch.version, "cuda", "12.9")
    facts = HOPPER | change
    functions = {"new": {adapters.K_GROUPED: None}, "old": {}, None: None}[facts.pop("release", "new")]
    monkeypatch.setitem(sys.modules, "deep_gemm", functions if functions is None else SimpleNamespace(**functions))
    message = backends.BACKENDS[name].refuses(backends.Call(call, **facts))
    assert message is None if why is None else re.search(why, message)


@pytest.mark.parametrize(
    "device, change, why",
    [
        ("cuda", {}, None),
        ("cuda", {"_capability": (8, 9)}, "on Hopper"),
        ("cuda", {"_capability": (10, 0)}, "on Hopper"),
        ("cuda", {"_installed": False}, "came with 3.4"),
        ("cuda", {"forced": "pointers"}, "BESSEMER_FP8_LOADS=pointers"),
        ("cuda", {"columns": 200}, "a multiple of 16 bytes, but has 200"),
        ("cuda", {"offset": 8}, "begin at a multiple of 16 bytes"),
        ("cuda", {"offset": 32}, None),
    ],
)
def test_which_products_load_by_pointers_and_why(monkeypatch, device, change, why):
    facts = {"_capability": (9, 0), "_installed": True, "forced": "", "columns": 256, "offset": 0} | change
    monkeypatch.setattr(adapters, "_capability", lambda device: facts["_capability"])
    monkeypatch.setattr(adapters, "_installed", lambda package: facts["_installed"])
    monkeypatch.setenv(adapters.LOADS, facts["forced"])
    values = torch.zeros(10_000, dtype=torch.uint8)[facts["offset"] :][: 4 * facts["columns"]].view(4, -1)
    message = adapters.by_pointers(torch.device(device), values)
    assert message is None if why is None else why in message
    monkeypatch.setattr(torch.version, "cuda", "12.9")
    monkeypatch.setattr(adapters, "_installed", lambda name: facts["_installed"] if "." in name else name == "triton")
    known_without_operands = not {"columns", "offset"} & change.keys()
    rows = {name: text for name, backend, text in backends.table(device) if backend == "triton"}
    form = f"by pointers: {message}" if message and known_without_operands else "by tensor descriptors"
    assert form in rows["grouped_wgrad"] if facts["_capability"] >= (8, 9) else "grouped_wgrad" not in rows
    assert "descriptors" not in rows["retile"]


def test_a_way_of_loading_that_there_is_not(monkeypatch):
    monkeypatch.setenv(adapters.LOADS, "tma")
    with pytest.raises(UserError, match=r"BESSEMER_FP8_LOADS=tma.*unset it"):
        adapters.by_pointers(torch.device("cuda"))


def test_the_table_tells_of_a_forced_backend(monkeypatch):
    monkeypatch.setenv(backends.VARIABLE, "torch")
    rows = {name: (backend, why) for name, backend, why in backends.table("cpu")}
    backend, why = rows["retile"]
    assert backend == "torch" and "BESSEMER_FP8_BACKEND" in why and "block" in why
    monkeypatch.setenv(backends.VARIABLE, "emulation")
    assert backends.table("cpu")[0] == ("quantise", "emulation", "forced by BESSEMER_FP8_BACKEND")
    monkeypatch.setenv(backends.VARIABLE, "tritn")
    with pytest.raises(UserError, match=r"BESSEMER_FP8_BACKEND=tritn.*unset it.*: deep"):
        backends.table("cpu")


@pytest.mark.parametrize("capability, order", [((9, 0), "deep_gemm"), ((10, 0), "triton"), ((8, 0), "emulation")])
def test_the_card_decides(monkeypatch, capability, order):
    monkeypatch.setattr(adapters, "_capability", lambda device: capability)
    monkeypatch.setattr(adapters, "_installed", lambda package: True)
    monkeypatch.setattr(torch.version, "cuda", "12.9")
    assert {row[0]: row[1] for row in backends.table("cuda")}["gemm"] == order


def test_factors_as_scaled_mm_wants_them(monkeypatch):
    """x's column by column; w's blocks column by column, each padded to a multiple of four."""
    captured = {}

    def scaled_mm(a, b, scale_a, recipe_a, scale_b, recipe_b, **how):
        captured.update(a=a, b=b, scale_a=scale_a, scale_b=scale_b, recipes=(recipe_a.name, recipe_b.name), **how)
        return torch.zeros(len(a), b.shape[1], dtype=how["output_dtype"])

    monkeypatch.setattr(F, "scaled_mm", scaled_mm)
    x, w = quantise(normal(48, 640)), quantise(normal(272, 640, seed=1), "block")
    serve = backends.BACKENDS["torch"].serve["gemm"]
    serve(x, w, torch.bfloat16, "block")
    assert captured["recipes"] == ("BlockWise1x128", "BlockWise128x128") and not captured["use_fast_accum"]
    assert captured["scale_a"].stride() == (1, 48) and torch.equal(captured["scale_a"], x.scale_MJ)
    assert captured["scale_b"].shape == (8, 3) and captured["scale_b"].stride() == (1, 8)
    assert torch.equal(captured["scale_b"][:5], w.scale_MJ[::TILE].t()) and captured["scale_b"][5:].eq(0).all()
    assert captured["b"].shape == (640, 272) and captured["b"].stride() == (1, 640)
    serve(x, w, torch.float32, "tile")
    assert captured["recipes"][1] == "BlockWise1x128" and captured["scale_b"].stride() == (1, 272)


def test_bad_operands():
    """The same errors from every backend: operands are checked before one is chosen."""
    x, w = quantise(normal(20, 256)), quantise(normal(30, 128))
    value, scale = x
    bad = {
        "256 and 128 columns": lambda: backends.gemm(x, w),
        r"needs factors \[20, 2\], got \[20, 1\]": lambda: backends.gemm(Operand(value, scale[:, :1]), x),
        "w needs float8_e4m3fn and float32 factors": lambda: backends.gemm(x, Operand(value.float(), scale)),
        "float32 factors, got .* torch.float64": lambda: backends.gemm(Operand(value, scale.double()), x),
        "x needs values of 2 dimensions": lambda: backends.gemm(Operand(value[0], scale[0]), x),
        "float32 or bfloat16, not torch.float16": lambda: backends.gemm(x, x, torch.float16),
        "must be an Operand": lambda: backends.gemm(value, x),
        "is a matrix": lambda: backends.quantise(torch.zeros(3)),
        "quantised, got torch.float64": lambda: backends.quantise(torch.zeros(3, 3).double()),
        "quantised, got torch.int64": lambda: backends.swiglu(torch.zeros(3, 4).long()),
        "even number of columns": lambda: backends.swiglu(torch.zeros(3, 5)),
        r"\[4\] weights": lambda: backends.swiglu(torch.zeros(3, 4), torch.ones(4)),
        r"factors .* \[20, 2\] do not fit \[20, 257\]": lambda: backends.pack_e5m6(torch.ones(20, 257), scale),
        "192 bytes a row do not hold 130": lambda: backends.unpack_e5m6(
            backends.pack_e5m6(torch.ones(20, 128), torch.ones(20, 1)), 130, torch.float32
        ),
        "do not fit 20 rows and 2 matrices": lambda: backends.grouped_gemm(x, [10, 9], stack(x, x)),
        "2 groups .* and 1 matrices": lambda: backends.grouped_gemm(x, [10, 10], stack(x)),
        "w must be an Operand": lambda: backends.grouped_gemm(x, [10, 10], [x, w]),
        r"\[25, -5\] rows do not fit": lambda: backends.retile(x, [25, -5]),
        r"make them with retile\(operand, count\)": lambda: backends.grouped_wgrad(x, x, [100, 200]),
        r"is added to a contiguous tensor of its kind, not to torch.float32 \[20, 21\]": lambda: backends.gemm(
            x, x, torch.float32, add_to=torch.zeros(20, 21)
        ),
        "not to torch.bfloat16": lambda: backends.gemm(x, x, add_to=torch.zeros(20, 20, dtype=torch.bfloat16)),
        "differ within a block": lambda: backends.gemm(x, x, w_group="block"),
    }
    for match, call in bad.items():
        with pytest.raises(ValueError, match=match):
            call()


def main():
    """Runs all checks, or those named. After a zero byte each, prints its name and what went wrong."""
    for name in sys.argv[1:] or CHECKS:
        print(f"\0{name}")
        try:
            globals()[name]()
        except Exception:
            traceback.print_exc(file=sys.stdout)


if __name__ == "__main__":
    main()
