"""The form of quantised weights: equal to the package compressed-tensors, and nothing else is taken for it."""

from copy import deepcopy

import pytest
import torch

from parloop.quantize.form import Scheme, dequantised, pack, rounded, unpack


def weights(dtype=torch.bfloat16):
    values = torch.randn(24, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    values[3, 32:64] = 0  # a group of zeros has no scale of its own
    return values


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 128), (8, 128)])
def test_what_is_packed_is_unpacked(bits, group):
    q, scale = rounded(weights(), bits, group)
    assert q.dtype == torch.uint8
    assert int(q.max()) < 2**bits
    packed = pack(q, bits)
    assert packed.shape == (24, 128 * bits // 32)
    assert torch.equal(unpack(packed, bits), q)
    assert scale.dtype == torch.bfloat16
    error = (dequantised(q, scale.float(), bits) - weights().float()).view(24, -1, group).abs().amax(-1)
    last_level = 2 ** (bits - 1) / 256  # and what bfloat16 rounded the scale by, times the last level
    assert (error <= (0.5 + last_level) * scale.float()).all()
    assert not dequantised(q, scale, bits)[3, 32:64].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 64), (8, None)])
def test_the_package_compressed_tensors_computes_and_reads_the_same(bits, group, dtype):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.quantization.utils import calculate_qparams

    scheme = QuantizationConfig.model_validate(Scheme(bits, group, ("lm_head",)).settings()).config_groups["group_0"]
    w = weights(dtype)
    grouped = w.view(24, -1, group or 128)
    theirs_scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), scheme.weights)
    q, scale = rounded(w, bits, group or 128)
    used = scale != 1  # of a group of zeros the package says the smallest number, which means the same
    assert torch.equal(scale[used], theirs_scale[used])
    # The package divides in the dtype of the weights, and so rounds some bfloat16 ones to the second nearest.
    state = {"weight": w.float(), "weight_scale": scale.float(), "weight_zero_point": zero}
    theirs = PackedQuantizationCompressor.compress(state, scheme)
    assert torch.equal(pack(q, bits), theirs["weight_packed"])
    ours = {"weight_packed": pack(q, bits), "weight_scale": scale, "weight_shape": torch.tensor([24, 128])}
    assert torch.equal(PackedQuantizationCompressor.decompress(ours, scheme)["weight"], dequantised(q, scale, bits))


@pytest.mark.parametrize("scheme", [Scheme(4, 32, ("lm_head", "re:.*down_proj")), Scheme(8, None)])
def test_settings_are_read_back(scheme):
    assert Scheme.of(scheme.settings()) == scheme


def test_layers_are_ignored_by_name_and_by_pattern():
    scheme = Scheme(4, 32, ("lm_head", "re:.*down_proj"))
    names = ("lm_head", "model.layers.0.mlp.down_proj", "model.layers.0.mlp.up_proj", "my.lm_head")
    assert [scheme.ignores(name) for name in names] == [True, True, False, False]


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("quant_method",), "gptq"),
        (("format",), "float-quantized"),
        (("kv_cache_scheme",), {"num_bits": 8}),
        (("config_groups", "group_0", "targets"), ["re:.*q_proj"]),
        (("config_groups", "group_0", "input_activations"), {"num_bits": 8}),
        (("config_groups", "group_0", "weights"), None),
        (("config_groups", "group_0", "weights", "type"), "float"),
        (("config_groups", "group_0", "weights", "symmetric"), False),
        (("config_groups", "group_0", "weights", "num_bits"), 3),
        (("config_groups", "group_0", "weights", "actorder"), "group"),
        (("config_groups", "group_0", "weights", "strategy"), "block"),
        (("config_groups", "group_0", "weights", "group_size"), None),
    ],
)
def test_other_forms_are_left_to_others(place, value):
    settings = deepcopy(Scheme(4, 32).settings())
    part = settings
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = value
    assert Scheme.of(settings) is None


@pytest.mark.parametrize("settings", [None, {}, "int4", [4], {"quant_method": "compressed-tensors", "config_groups": {}}])
def test_what_is_no_quantisation_of_ours_is_none(settings):
    assert Scheme.of(settings) is None
