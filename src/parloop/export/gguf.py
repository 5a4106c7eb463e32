"""GGUF files of PLT checkpoints, for authors of engines. Their keys are our proposal (docs/porting.md). They hold no tokenizer."""

from pathlib import Path

from ..errors import ExportError

WARNING = (
    "No engine runs this file yet: llama.cpp has no PLT, nor have Ollama, LM Studio and others that build on it. Its keys are a proposal "
    "(docs/porting.md). Please do not publish it: names cannot be changed once files are in circulation."
)
TYPES = {None: "F32", 8: "Q8_0", 4: "Q4_0"}  # types of matrices; gates and norms stay float32
NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "self_attn.plt_gate": "loop_gate", "self_attn.plt_gate.gate_norm": "loop_gate_norm",
}  # fmt: skip


def export_gguf(checkpoint: Path, folder: Path, bits: int | None = None) -> None:
    """Write `model.gguf`.

    Args:
        checkpoint: folder of a PLT.
        folder: folder to write into.
        bits: bits per quantised weight, 4 or 8. None: float32.

    Raises:
        ExportError: the package gguf is missing, or the proposal does not cover this checkpoint.
    """
    try:
        import gguf
    except ImportError as error:
        raise ExportError('the package gguf is not installed: pip install "parloop[gguf]".') from error
    from safetensors import safe_open

    from ..checkpoints import check_weights, load_config
    from ..model.configuration import released_name

    config = load_config(checkpoint)
    if any(getattr(config, name, None) for name in ("quantization_config", "quantization")):
        raise ExportError(f"checkpoint {str(checkpoint)!r} is quantised already: export what it was made from, with --bits.")
    check_weights(checkpoint)
    rope: dict = config.rope_parameters or {}
    if bits not in TYPES or rope.get("rope_type", "default") != "default":
        raise ExportError(f"bits={bits}, {rope}: only F32, Q8_0 (8 bits) and Q4_0 (4) with plain RoPE are written.")
    writer = gguf.GGUFWriter(folder / "model.gguf", "plt")
    a, c = (1.0 if scale is None else scale for scale in (config.plt_emb_scale, config.plt_hidden_scale))
    for add, *arguments in (
        ("vocab_size", config.vocab_size), ("context_length", config.max_position_embeddings), ("embedding_length", config.hidden_size),
        ("feed_forward_length", config.intermediate_size), ("block_count", config.num_hidden_layers), ("key_length", config.head_dim),
        ("head_count", config.num_attention_heads), ("head_count_kv", config.num_key_value_heads), ("value_length", config.head_dim),
        ("rope_dimension_count", config.head_dim), ("rope_freq_base", rope["rope_theta"]), ("layer_norm_rms_eps", config.rms_norm_eps),
        ("sliding_window", config.window_tokens + 1), ("uint32", "plt.loop.count", config.plt_num_loops),  # GGUF's window counts the token itself
        ("bool", "plt.loop.norm_per_loop", config.plt_normalize_per_loop), ("float32", "plt.loop.embedding_scale", a),
        ("float32", "plt.loop.hidden_scale", c),
        ("string", "plt.loop.gate_input", "hidden" if config.plt_gate_use_hidden_states else "query"),
    ):  # fmt: skip
        getattr(writer, f"add_{add}")(*arguments)
    for path in sorted(checkpoint.glob("model*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.offset_keys():
                module, _, kind = released_name(name).removeprefix("model.layers.").rpartition(".")
                layer, _, rest = module.partition(".") if module[0].isdigit() else ("", "", module)
                plain = "norm" in rest or "plt_gate" in rest or kind == "bias"
                form = gguf.GGMLQuantizationType["F32" if plain else TYPES[bits]]
                values = gguf.quants.quantize(file.get_tensor(name).float().numpy(), form)
                writer.add_tensor(f"{layer and f'blk.{layer}.'}{NAMES[rest]}.{kind}", values, raw_dtype=form)
    for part in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{part}_to_file")()
    writer.close()
