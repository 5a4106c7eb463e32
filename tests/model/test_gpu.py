"""On a GPU: the backends and ways of running that a CPU does not have, against sdpa in float32 on the same GPU. `pytest -m gpu`."""

import importlib.util

import pytest
import torch

from parloop import make_cache
from tests.helpers.decoding import GREEDY, in_pieces
from tests.helpers.models import left_padded, random_ids, tiny_model

pytestmark = pytest.mark.gpu
SHAPE = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "plt_window_size": [16, 0]}


def needs(package: str):
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"needs pip install {package}")


def on_gpu(R: int, dtype=torch.bfloat16, **changes):
    return tiny_model(dtype=dtype, plt_num_loops=R, **SHAPE, **changes).to("cuda")


def log_probabilities(model, ids, **options):
    with torch.no_grad():
        return model(ids, **options).logits.float().log_softmax(-1)


@pytest.mark.parametrize("R", [1, 2, 4])
@pytest.mark.parametrize("attn", [pytest.param("flash_attention_2", marks=needs("flash_attn")), "flex_attention", "eager"])
def test_backends_agree_in_bfloat16(attn, R):
    ids = random_ids(2, 200).to("cuda")
    exact = log_probabilities(on_gpu(R, torch.float32), ids)
    model = on_gpu(R)
    usual = (log_probabilities(model, ids) - exact).abs().max()
    model.set_attn_implementation(attn)
    whole = (log_probabilities(model, ids) - exact).abs().max()
    with torch.no_grad():
        in_calls = in_pieces(model, ids, [150, 1, 1, 48])
    pieces = (in_calls.float().log_softmax(-1) - exact).abs().max()
    assert whole < 2 * usual + 1e-2  # no further from float32 than sdpa's rounding
    assert pieces < 2 * usual + 1e-2


@pytest.mark.parametrize("R", [1, 2, 4])
def test_float32_on_the_gpu_is_float32_on_the_cpu(R):
    ids = random_ids(1, 200)
    cpu = log_probabilities(tiny_model(dtype=torch.float32, plt_num_loops=R, **SHAPE), ids)
    torch.testing.assert_close(log_probabilities(on_gpu(R, torch.float32), ids.to("cuda")).cpu(), cpu, atol=1e-4, rtol=0)


@pytest.mark.parametrize("R", [2, 4])
def test_a_decode_step_in_a_cuda_graph(R):
    """torch.compile's graphs over a static cache, left-padded rows included, against eager decoding."""
    model = on_gpu(R, torch.float32)
    ids, mask = left_padded([random_ids(30, seed=1), random_ids(50, seed=2)])
    batch = {"attention_mask": mask.to("cuda"), "pad_token_id": 0, **GREEDY}
    eager = model.generate(ids.to("cuda"), **batch)
    model.forward = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)
    assert torch.equal(model.generate(ids.to("cuda"), cache_implementation="static", **batch), eager)


@needs("bitsandbytes")
def test_four_bits_of_bitsandbytes(tmp_path):
    """All linear layers but the gates are packed, and loops 1..R of a step are those of a pass per loop."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    tiny_model(dtype=torch.float32, **SHAPE).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(load_in_4bit=True), device_map="cuda"
    )
    ids = random_ids(1, 40).to("cuda")
    with torch.no_grad():
        prompt = [make_cache(model.config), make_cache(model.config)]
        for cache in prompt:
            model(ids[:, :-1], past_key_values=cache)
        at_once, one_by_one = (
            model(ids[:, -1:], past_key_values=cache, one_pass=one_pass).logits
            for cache, one_pass in zip(prompt, (True, False))
        )
    torch.testing.assert_close(at_once, one_by_one, atol=2e-2, rtol=2e-2)
