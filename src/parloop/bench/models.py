"""Models of a bench: a PLT with random weights or from a checkpoint, and a Llama of the same shape on the same weights.

One copy of the weights serves every loop count: the model is built for the largest one, and each call passes its loop count. With one loop
no gate is computed, so R = 1 has no cost that a plain transformer does not have.
"""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from ..checkpoints import load_config, load_model
from ..convert.families import dense_config
from ..errors import BenchError
from ..model.configuration import PLTConfig
from ..model.modeling import PLTForCausalLM
from ..model.rotary import PLTRotaryEmbedding
from ..model.shapes import SHAPES, SHARED
from ..quantize.form import HEAD, Scheme
from ..quantize.linear import PackedLinear
from ..quantize.quantizer import linear_layers

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def config_of(checkpoint: str | None, shape: str | None, max_loops: int) -> PLTConfig:
    """Return the configuration of a checkpoint, or of a shape with gates for `max_loops` loops.

    Raises:
        BenchError: there is no such shape.
    """
    if checkpoint is not None:
        return load_config(checkpoint)
    if shape not in SHAPES:
        raise BenchError(f"--shape {shape!r} is unknown: use one of {', '.join(SHAPES)}.")
    return PLTConfig(**(SHARED | SHAPES[shape]), plt_num_loops=max_loops)


def build(
    checkpoint: str | None, config: PLTConfig, dtype: str, device: torch.device, weights: Sequence[str] = ()
) -> dict[str, Any]:
    """Return {"plt": the model, "llama": its twin, "int4": ..}, in eval mode. A quantised checkpoint has no twins: its modules are not Llama's.

    Raises:
        BenchError: quantised weights of a quantised checkpoint.
    """
    if checkpoint is None:
        model = random_model(config, DTYPES[dtype], device)
    else:
        model = load_model(checkpoint, str(device), dtype)
    model.requires_grad_(False)
    quantized = getattr(model, "hf_quantizer", None) is not None
    if quantized and weights:
        raise BenchError(f"--weights {weights[0]}: checkpoint {checkpoint!r} is quantised already: leave --weights out.")
    if quantized:
        return {"plt": model}
    return {"plt": model, "llama": llama_twin(model), **{name: packed_twin(model, name) for name in weights}}


def on_meta(config: PLTConfig, dtype: torch.dtype) -> PLTForCausalLM:
    """Return the model on the meta device: names, shapes and sizes without memory."""
    with torch.device("meta"):
        model: Any = PLTForCausalLM(config)
    return model.to(dtype)


def random_model(config: PLTConfig, dtype: torch.dtype, device: torch.device) -> PLTForCausalLM:
    """Return a model with random weights, drawn in their final dtype, so that no copy in another dtype exists."""
    model = on_meta(config, dtype).to_empty(device=device)
    # Note: to_empty leaves arbitrary values in buffers, and this one is not filled by loading weights.
    model.model.rotary_emb = PLTRotaryEmbedding(config).to(device)  # type: ignore[arg-type]
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, 0.02, generator=generator)
    return model.eval()


def llama_twin(model: PLTForCausalLM) -> Any:
    """Return transformers' own Llama, or the family with this model's options, on the same weight tensors, without a
    copy."""
    config = dense_config(model.config)
    with torch.device("meta"):
        llama = AutoModelForCausalLM.from_config(config)
    missing, _ = llama.load_state_dict(model.state_dict(), strict=False, assign=True)  # the gates remain unused
    llama.model.rotary_emb = type(llama.model.rotary_emb)(config).to(model.device)
    llama.set_attn_implementation(model.config._attn_implementation)
    assert not missing, missing
    assert not any(tensor.is_meta for tensor in itertools.chain(llama.parameters(), llama.buffers()))
    return llama.requires_grad_(False).eval()


def packed_twin(model: PLTForCausalLM, weights: str) -> PLTForCausalLM:
    """Return the model with linear layers as `parloop quantize` makes them; everything else is the model's own tensors.

    Args:
        weights: int4 or int8, with +head where the head is quantised, too.

    Raises:
        BenchError: the model is quantised already, or layers do not fit into groups of 64, nor of 32.
    """
    bits, head = int(weights[3]), weights.endswith("+head")
    scheme = Scheme(bits, None, () if head else (HEAD,))
    twin = on_meta(model.config, model.dtype)
    names = [name for name in linear_layers(model) if not scheme.ignores(name)]
    inputs: list[Any] = [model.get_submodule(name).in_features for name in names]
    if bits == 4:
        group = next((size for size in (64, 32) if not any(K % size for K in inputs)), None)
        if group is None:
            raise BenchError(
                f"--weights {weights}: layers have {max(inputs)} inputs, which groups of 32 weights do not divide."
            )
        scheme = replace(scheme, group=group)
    for name in names:
        layer: Any = model.get_submodule(name)
        twin.set_submodule(name, PackedLinear.of(layer.weight, layer.bias, bits, scheme.group_of(layer.in_features)))
    twin.load_state_dict(
        {n: p for n, p in model.state_dict().items() if n.rpartition(".")[0] not in names}, strict=False, assign=True
    )
    twin.model.rotary_emb = PLTRotaryEmbedding(model.config).to(model.device)  # type: ignore[arg-type]
    twin.set_attn_implementation(model.config._attn_implementation)
    assert not any(tensor.is_meta for tensor in itertools.chain(twin.parameters(), twin.buffers()))
    return twin.requires_grad_(False).eval()


def bytes_read(model: Any, loops: int, batch_size: int, passes: int) -> int:
    """Return the bytes of weights that one decode step reads: `passes` times the stack and once the head.

    Of the embedding only the rows of the new tokens count. A tied head is the embedding, read once as a head. Gates belong to loops 2..R:
    one pass over R > 1 rows reads them once, a pass per loop R - 1 times.
    """
    stack = sum(p.nbytes for p in model.model.layers.parameters())
    gates = sum(p.nbytes for name, p in model.model.layers.named_parameters() if "plt_gate" in name)
    rows = batch_size * model.config.hidden_size * model.model.embed_tokens.weight.element_size()
    norm, head = model.model.norm.weight.nbytes, sum(p.nbytes for p in model.lm_head.parameters())
    return passes * (stack - gates + norm) + min(passes, loops - 1) * gates + rows + head


def available_bytes(device: torch.device) -> int | None:
    """Return the bytes of memory that new tensors can use; None if the system does not say."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None
    try:  # a container may have less than the machine; its inactive file cache can be reclaimed
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text(encoding="utf-8"))  # "max": no limit, not a number
        stat = dict(line.split() for line in (group / "memory.stat").read_text(encoding="utf-8").splitlines())
        held = int((group / "memory.current").read_text(encoding="utf-8")) - int(stat["inactive_file"])
        return min(free, limit - held)
    except (OSError, ValueError, KeyError):
        return free


def check_memory(name: str, weights: int, work: int, dtype: str, device: torch.device) -> None:
    """Check that the weights and `work` more bytes fit into memory.

    Raises:
        BenchError: they do not.
    """
    free = available_bytes(device)
    if free is not None and weights + work > free:
        raise BenchError(
            f"{name} needs {(weights + work) / 1e9:.1f} GB: {weights / 1e9:.1f} GB of {dtype} weights and "
            f"{work / 1e9:.1f} GB to work in. {free / 1e9:.1f} GB are free on {device}: end other programs, take a machine "
            f"with more memory, or a smaller model (--shape 600m)."
        )
