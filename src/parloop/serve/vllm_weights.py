"""Check that a checkpoint's weights match its config.json.

vLLM's loader does not: it leaves a matrix that no file fills, or a part of one, uninitialised, and cuts off surplus rows.
"""

import re
from collections.abc import Iterable, Iterator, Set

import torch

from ..model.configuration import GATE, PLTConfig, released_name
from ..quantize.form import PARTS, Scheme

COMPUTED = "rotary_emb.inv_freq"  # a buffer in old Llama files, which is computed
HEAD = "lm_head.weight"


def shapes_of(config: PLTConfig) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every weight of a checkpoint."""
    D, F, V, K = config.hidden_size, config.intermediate_size, config.vocab_size, config.head_dim
    H, G = config.num_attention_heads, config.num_key_value_heads
    attention, mlp = config.attention_bias, config.mlp_bias
    linear = {
        "self_attn.q_proj": (H * K, D, attention),
        "self_attn.k_proj": (G * K, D, attention),
        "self_attn.v_proj": (G * K, D, attention),
        "self_attn.o_proj": (D, H * K, config.output_bias),
        "mlp.gate_proj": (F, D, mlp),
        "mlp.up_proj": (F, D, mlp),
        "mlp.down_proj": (D, F, mlp),
    }
    norms = {"input_layernorm": D, "post_attention_layernorm": D}
    if config.qk_norm:
        norms |= {"self_attn.q_norm": K, "self_attn.k_norm": K}
    if config.plt_num_loops > 1:
        hidden = config.plt_gate_use_hidden_states
        linear[f"self_attn.{GATE}"] = (H, D if hidden else K, True)
        norms |= {f"self_attn.{GATE}.gate_norm": D} if hidden else {}
    layer: dict[str, tuple[int, ...]] = {f"{name}.weight": (size,) for name, size in norms.items()}
    for name, (out, inputs, bias) in linear.items():
        layer |= {f"{name}.weight": (out, inputs)} | ({f"{name}.bias": (out,)} if bias else {})
    shapes = {f"model.layers.{i}.{name}": shape for i in range(config.num_hidden_layers) for name, shape in layer.items()}
    shapes |= {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    if not config.tie_word_embeddings:
        shapes[HEAD] = (V, D)
        linear["lm_head"] = (V, D, False)
    scheme = Scheme.of(getattr(config, "quantization_config", None))
    return shapes if scheme is None else _packed(shapes, scheme, linear.keys() - {f"self_attn.{GATE}"})


def _packed(shapes: dict[str, tuple[int, ...]], scheme: Scheme, linear: Set[str]) -> dict[str, tuple[int, ...]]:
    """Return the shapes with the parts that quantised matrices are kept in (quantize/form.py)."""
    packed: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        layer = name.removesuffix(".weight")
        if layer == name or re.sub(r"^model\.layers\.\d+\.", "", layer) not in linear or scheme.ignores(layer):
            packed[name] = shape
            continue
        out, inputs = shape
        parts = ((out, inputs * scheme.bits // 32), (out, inputs // scheme.group_of(inputs)), (2,))
        packed |= {f"{layer}.{part}": size for part, size in zip(PARTS, parts)}
    return packed


def checked(
    weights: Iterable[tuple[str, torch.Tensor]], config: PLTConfig, gates_may_lack: bool = False
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield all weights of a checkpoint, names and tensors, and check them on the way.

    Args:
        weights: names and tensors in the files.
        config: configuration of the model.
        gates_may_lack: allow that all gates are missing, as in a checkpoint that was trained with one loop.

    Raises:
        ValueError: a weight has another shape, is not the model's, or, at the end, is missing.
    """
    mismatch = "The checkpoint does not match its config.json:"
    shapes, seen = shapes_of(config), set()
    for given, tensor in weights:
        name = released_name(given)
        gate, tied_head = f".{GATE}." in name, name == HEAD and config.tie_word_embeddings
        if COMPUTED in name or tied_head or (gate and config.plt_num_loops == 1):
            yield given, tensor
            continue
        if name not in shapes:
            raise ValueError(
                f"{mismatch} the files hold {given}, which a model of this configuration does not have: correct it."
            )
        if tuple(tensor.shape) != shapes[name]:
            raise ValueError(f"{mismatch} {given} has shape {tuple(tensor.shape)}, and not {shapes[name]}: correct it.")
        seen.add(name)
        yield given, tensor
    missing = shapes.keys() - seen
    if gates_may_lack and not any(f".{GATE}." in name for name in seen):
        missing = {name for name in missing if f".{GATE}." not in name}
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"{mismatch} the files lack {min(missing)}{more}: correct it, or take the files that belong to it.")
