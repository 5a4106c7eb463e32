"""Checkpoints of `parloop quantize` as stock vLLM serves them: on a CPU, 4 bits on its own kernel (CPUWNA16LinearKernel)."""

import json

import pytest
import torch
from conftest import engine, random_checkpoint, tokens
from safetensors.torch import load_file, save_file
from vllm import SamplingParams

from parloop.quantize.form import Scheme, dequantised, pack, rounded

SCHEME = Scheme(4, 64, ("lm_head",))


def packed_checkpoint(folder, scheme=SCHEME):
    """The same in 4 bits, and with the weights that these stand for. (This transformers has no PLT to run parloop quantize with.)"""
    plain = random_checkpoint(folder / "plain", torch_dtype="bfloat16")
    packed = random_checkpoint(folder / "packed", torch_dtype="bfloat16")
    weights = load_file(plain / "model.safetensors")
    small, rough = {}, {}
    for name, tensor in weights.items():
        tensor = tensor.bfloat16()
        small[name] = rough[name] = tensor
        if "_proj.weight" in name:
            q, scale = rounded(tensor, scheme.bits, scheme.group_of(tensor.shape[1]))
            rough[name] = dequantised(q, scale, scheme.bits)
            del small[name]
            parts = (pack(q, scheme.bits), scale, torch.tensor(tensor.shape))
            small |= {f"{name}_{part}": value for part, value in zip(("packed", "scale", "shape"), parts)}
    for where, held in ((plain, rough), (packed, small)):
        save_file(held, where / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((packed / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps(config | {"quantization_config": scheme.settings()}))
    return plain, packed


def test_four_bits_are_the_weights_that_they_stand_for(tmp_path):
    answers = []
    for folder in packed_checkpoint(tmp_path):
        with engine(folder, dtype="bfloat16") as llm:
            params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=512, detokenize=False)
            (output,) = llm.generate(tokens([5, 7, 11, 13, 17] * 4), params, use_tqdm=False)
            first = output.outputs[0].logprobs[0]
            answers.append(torch.tensor([first[i].logprob for i in range(512)]))
    assert (answers[0] - answers[1]).abs().max() < 0.1  # bfloat16: of a plain model in float32, the same difference
    assert (answers[0] - answers[1]).abs().mean() < 0.02


def test_what_is_missing_is_named(tmp_path):
    _, packed = packed_checkpoint(tmp_path)
    weights = load_file(packed / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight_scale"]
    save_file(weights, packed / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lack model.layers.1.mlp.up_proj.weight_scale"), engine(packed, dtype="bfloat16"):
        pass


def test_eight_bits_have_no_kernel_on_a_cpu(tmp_path):
    """When this fails, docs/performance.md and docs/serving.md have something better to say."""
    _, packed = packed_checkpoint(tmp_path, Scheme(8, None, ("lm_head",)))
    with pytest.raises(ValueError, match="Failed to find a kernel"), engine(packed, dtype="bfloat16"):
        pass
