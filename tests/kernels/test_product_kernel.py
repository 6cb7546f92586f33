"""Products of plain matrices against float64, and the processors on which the kernels compute them."""

import pytest
import torch
import torch.nn.functional as F

from bessemer.addons.accelerate.kernels import library, product
from bessemer.model import ops
from bessemer.model.ops import Linear

SHAPES = ((1, 1, 1), (5, 3, 7), (97, 300, 33), (100, 256, 257), (3, 700, 520))
"""M, K, N; blocks are 96 x 256 and sums are cut at 256."""


@pytest.fixture
def of_amd(instructions, monkeypatch, tmp_path):
    """The processor calls itself AMD's, and its instruction set is one whose products serve."""
    path = tmp_path / "cpuinfo"
    path.write_text("vendor_id\t: AuthenticAMD\n")
    monkeypatch.setattr(library, "CPUINFO", path)
    monkeypatch.setattr(library, "MULTIPLIES", (instructions,))
    library.beat_mkl.cache_clear()
    yield
    library.beat_mkl.cache_clear()


def drawn(M, K, N, seed=0):
    numbers = torch.Generator().manual_seed(seed)
    return torch.randn(M, K, generator=numbers), torch.randn(K, N, generator=numbers)


def layouts(x):
    """The same matrix by rows, by columns, as a part of a larger one, and as every second number of each row."""
    wide, gaps = torch.zeros(x.shape[0], x.shape[1] + 5), torch.zeros(x.shape[0], 2 * x.shape[1])
    wide[:, 2:-3], gaps[:, ::2] = x, x
    return x, x.t().contiguous().t(), wide[:, 2:-3], gaps[:, ::2]


def test_products_of_every_layout_equal_float64(of_amd):
    for M, K, N in SHAPES:
        a, b = drawn(M, K, N)
        exact = a.double() @ b.double()
        for left in layouts(a):
            for right in layouts(b):
                assert ops.multiply.serves(left, right)
                torch.testing.assert_close(ops.multiply(left, right).double(), exact, atol=2e-4, rtol=0)


def test_results_go_where_they_belong_and_are_added_as_a_whole(of_amd):
    for M, K, N in SHAPES:
        a, b = drawn(M, K, N)
        wide = torch.full((M, N + 4), 2.0)
        apart = ops.multiply(a, b)
        assert ops.multiply(a, b, wide[:, 1:-3], add=True).data_ptr() == wide[:, 1:].data_ptr()
        assert torch.equal(wide[:, 1:-3], 2.0 + apart), "not the finished sum was added"
        assert (wide[:, :1] == 2.0).all() and (wide[:, -3:] == 2.0).all()
        ops.multiply(a, b, wide[:, 1:-3])
        assert torch.equal(wide[:, 1:-3], apart)
    a, b = drawn(4, 5, 6)
    assert not ops.multiply.serves(a, b, torch.empty(6, 4).t()), "columns are not written"


def test_bits_depend_on_neither_threads_nor_other_rows(of_amd):
    a, b = drawn(300, 300, 70)
    alone = ops.multiply(a, b)
    before = torch.get_num_threads()
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        assert torch.equal(ops.multiply(a, b), alone)
    torch.set_num_threads(before)
    for rows in (slice(0, 1), slice(95, 203)):
        assert torch.equal(ops.multiply(a[rows], b), alone[rows])


def test_a_bad_number_reaches_its_own_row(of_amd):
    a, b = drawn(200, 40, 40)
    a[100, 7] = torch.nan
    bad = ops.multiply(a, b).isnan().any(1)
    assert bad[100] and bad.sum() == 1


def test_a_matrix_has_the_values_and_gradients_of_float64(of_amd):
    matrix, x = Linear(300, 64), torch.randn(2, 150, 300, requires_grad=True)
    dy = torch.randn(2, 150, 64)
    y = matrix(x)
    y.backward(dy)
    exact_x, exact_w = (t.detach().double().requires_grad_() for t in (x, matrix.weight))
    exact = F.linear(exact_x, exact_w)
    exact.backward(dy.double())
    torch.testing.assert_close(y.double(), exact, atol=1e-5, rtol=0)
    torch.testing.assert_close(x.grad.double(), exact_x.grad, atol=1e-5, rtol=0)
    torch.testing.assert_close(matrix.weight.grad.double(), exact_w.grad, atol=2e-4, rtol=0)


def test_a_gradient_that_exists_receives_the_finished_sum(of_amd):
    """Which process of several computed a micro-batch changes no bit."""
    matrix, x = Linear(64, 32), torch.randn(700, 64)
    first = torch.randn(32, 64)
    matrix(x).sum().backward()
    apart = matrix.weight.grad.clone()
    matrix.weight.grad = into = first.clone()
    matrix(x).sum().backward()
    assert matrix.weight.grad is into and torch.equal(into, first + apart)


@pytest.mark.parametrize(("vendor", "serves"), [("AuthenticAMD", True), ("GenuineIntel", False), ("", False)])
def test_torch_multiplies_where_it_is_faster(of_amd, vendor, serves, tmp_path):
    (tmp_path / "cpuinfo").write_text(f"vendor_id : {vendor}\n" if vendor else "")
    library.beat_mkl.cache_clear()
    a, b = drawn(20, 30, 40)
    assert ops.multiply.serves(a, b) == ops.linear.serves(a, b.t()) == serves
    assert not ops.multiply.serves(a.bfloat16(), b.bfloat16())
    if not serves:
        assert torch.equal(ops.multiply(a, b), a @ b)


def test_empty_products_are_torchs(of_amd):
    assert not product.serves(torch.empty(0, 3), torch.empty(3, 4))
    assert ops.multiply(torch.empty(0, 3), torch.empty(3, 4)).shape == (0, 4)
