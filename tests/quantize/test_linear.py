"""Packed linear layers: equal to a product with the weights that they stand for, and no row knows of another."""

import pytest
import torch
import torch.nn.functional as F

from parloop.quantize import linear
from parloop.quantize.form import pack, rounded
from parloop.quantize.linear import KERNEL_ROWS, PackedLinear, in_blocks, kernel_block, out_of_blocks

ROWS = (1, 2, 3, 5, 12, 13, 64, 65, 70)


def random(*shape, seed=0, dtype=torch.bfloat16):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def layer(bits=4, group=32, inputs=128, outputs=192, bias=False, dtype=torch.bfloat16) -> PackedLinear:
    made = PackedLinear(inputs, outputs, bias, bits, group, dtype)
    q, scale = rounded(random(outputs, inputs, dtype=dtype), bits, group)
    with torch.no_grad():
        made.weight_packed.copy_(pack(q, bits))
        made.weight_scale.copy_(scale)
        made.weight_shape.copy_(torch.tensor([outputs, inputs]))
        if bias:
            made.bias.copy_(random(outputs, seed=1, dtype=dtype))
    made.arrange()
    return made


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 128), (8, 128)])
@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_few_rows_and_many_are_a_product_with_the_dequantised_weights(bits, group, bias, monkeypatch):
    monkeypatch.setattr(linear, "AT_ONCE", 128 * 64 * 2)  # several pieces, and one that is left
    packed = layer(bits, group, bias=bias)
    w, b = packed.dequantised().double(), packed.bias
    for rows in ROWS:
        x = random(1, rows, 128, seed=rows)
        exact = F.linear(x.double(), w, None if b is None else b.double())
        got = packed(x)
        assert got.shape == (1, rows, 192)
        assert got.dtype == torch.bfloat16
        assert (got.double() - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (8, 128)])
@torch.no_grad()
def test_a_row_alone_is_the_row_among_others_bit_for_bit(bits, group):
    """Or the loops of a token, which are rows of one pass, would depend on each other."""
    packed = layer(bits, group)
    if kernel_block() is not None:
        assert packed.has_kernel(torch.bfloat16)
    x = random(KERNEL_ROWS[bits], 128)
    x[1] *= 1000  # a scale shared by rows would drown the others
    alone = torch.cat([packed(row[None]) for row in x])
    for rows in range(2, len(x) + 1):
        assert torch.equal(packed(x[:rows]), alone[:rows])


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (8, 128)])
@torch.no_grad()
def test_above_the_kernels_rows_other_rows_still_do_not_matter(bits, group):
    packed = layer(bits, group)
    x = random(70, 128)
    other = random(70, 128, seed=1) * 1000
    other[:3] = x[:3]
    assert torch.equal(packed(x)[:3], packed(other)[:3])


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": torch.float32},
        {"dtype": torch.float16},
        {"bits": 8, "group": 128, "dtype": torch.float32},
        {"bits": 8, "group": 32},  # the kernel has one scale for an output
        {"group": 16},  # no group of the kernel's
        {"outputs": 48},  # half a block
        {"outputs": 6},
    ],
    ids=str,
)
@torch.no_grad()
def test_without_a_kernel_weights_are_turned_back(options):
    packed = layer(**options)
    dtype = options.get("dtype", torch.bfloat16)
    assert not packed.has_kernel(dtype) or kernel_block() == 32
    for rows in (1, 5, 70):
        x = random(rows, 128, seed=rows, dtype=dtype)
        exact = F.linear(x.double(), packed.dequantised().double())
        assert (packed(x).double() - exact).norm() < 0.01 * exact.norm()


def test_without_the_kernels_layout_it_is_not_called(monkeypatch):
    """As on processors for which torch packs otherwise: a wrong layout would be wrong numbers."""
    monkeypatch.setattr(linear, "kernel_block", lambda: None)
    packed = layer()
    assert not packed.has_kernel(torch.bfloat16)
    x = random(2, 128)
    exact = F.linear(x.double(), packed.dequantised().double())
    assert (packed(x).double() - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize("block", [64, 32, 2])
def test_blocks_are_undone(block):
    q = torch.randint(16, (192, 32), dtype=torch.uint8)
    assert torch.equal(out_of_blocks(in_blocks(q, block)), q)


@pytest.mark.parametrize(
    ("bits", "group", "dtype"), [(4, 32, torch.bfloat16), (8, 128, torch.bfloat16), (4, 32, torch.float32)]
)
def test_state_dicts_are_of_the_files_form(bits, group, dtype):
    one, q_and_scale = layer(bits, group, bias=True, dtype=dtype), rounded(random(192, 128, dtype=dtype), bits, group)
    state = one.state_dict()
    assert list(state) == ["weight_packed", "weight_scale", "weight_shape", "bias"]
    assert torch.equal(state["weight_packed"], pack(q_and_scale[0], bits))
    assert torch.equal(state["weight_scale"], q_and_scale[1])
    other = layer(bits, group, bias=True, dtype=dtype)
    with torch.no_grad():
        other.scale.mul_(3)
        other.arranged.zero_()
    other.load_state_dict(state)
    assert other.is_arranged
    x = random(3, 128, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(other(x), one(x))


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (8, 128)])
def test_gradients_pass_through(bits, group):
    packed = layer(bits, group)
    x = random(3, 128).requires_grad_()
    packed(x).sum().backward()
    assert torch.allclose(x.grad.float(), packed.dequantised().float().sum(0).expand(3, -1), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("sizes", [{"inputs": 100}, {"outputs": 7}], ids=str)
def test_sizes_that_cannot_be_packed_are_refused(sizes):
    with pytest.raises(ValueError, match="cannot be packed to 4 bits in groups of 32"):
        layer(**sizes)
