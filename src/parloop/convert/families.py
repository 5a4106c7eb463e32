"""Configurations: the model types that can become a PLT, and the mapping of their fields onto a PLT's and back.

The source's configuration is read field by field: an unknown field is refused, since it may change the computation.
"""

import json
import re
import warnings
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from ..errors import ConvertError
from ..model.configuration import ARCHITECTURE, PLTConfig


@dataclass(frozen=True)
class Family:
    """A model type of transformers: the options of ours that it always has, and the fields of its configuration that set one."""

    architecture: str
    has: dict[str, Any] = field(default_factory=dict)
    says: tuple[str, ...] = ()


FAMILIES = {
    "llama": Family("LlamaForCausalLM", says=("attention_bias", "mlp_bias")),
    "mistral": Family("MistralForCausalLM"),
    "qwen2": Family("Qwen2ForCausalLM", has={"attention_bias": True, "attention_output_bias": False}),
    "qwen3": Family("Qwen3ForCausalLM", has={"qk_norm": True}, says=("attention_bias",)),
    PLTConfig.model_type: Family(ARCHITECTURE, says=("attention_bias", "attention_output_bias", "mlp_bias", "qk_norm")),
}
OPTIONS = {
    "attention_bias": False,
    "attention_output_bias": None,
    "mlp_bias": False,
    "qk_norm": False,
}  # and the default values
CARRIED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache", "pad_token_id", "bos_token_id",
    "eos_token_id", "tie_word_embeddings", "rope_parameters", "attention_dropout", "dtype",
)  # fmt: skip
# Fields that are checked by name below, or do not change the computation.
LOOKED_AT = {
    "model_type", "architectures", "head_dim", "rope_theta", "rope_scaling", "torch_dtype", "sliding_window", "use_sliding_window",
    "max_window_layers", "layer_types", "auto_map", "quantization_config", "transformers_version", "_name_or_path",
    "_attn_implementation", "_attn_implementation_autoset", "pretraining_tp", "output_hidden_states", "output_attentions",
    "return_dict", "chunk_size_feed_forward", "id2label", "label2id", "problem_type", "task_specific_params", "tokenizer_class",
    "torchscript", "max_length", "max_new_tokens", "do_sample", "temperature", "top_p", "top_k", "repetition_penalty",
}  # fmt: skip
# Mechanisms of other architectures, by patterns of their fields, for errors that name what is missing.
MISSING = {
    r"expert|moe": "mixture of experts",
    r"vision|image|audio|video": "images or sound",
    r"softcap|logit_scale|logits_scaling": "scaled or capped logits",
    r"partial_rotary|rotary_pct|rotary_dim": "RoPE on a part of a head",
    r"sliding|window|chunk": "attention in windows",
    r"sink": "attention sinks",
    r"lora_rank|qk_nope|qk_rope": "latent attention",
    r"alibi|n_positions|relative": "position embedding other than RoPE",
    r"residual_multiplier|embedding_multiplier|scale_emb|scale_depth": "scaled embeddings or residuals",
    r"per_layer": "layers of different shapes",
    r"parallel": "attention and feed-forward side by side",
    r"ssm|mamba|conv": "state-space layers",
    r"layer_norm_eps|layer_norm_epsilon|norm_bias": "LayerNorm",
}


def source_config(source: Path) -> PreTrainedConfig:
    """Return a checkpoint's configuration, as its class in transformers reads it.

    Raises:
        ConvertError: it describes a model that the PLT's layers cannot compute.
    """
    try:
        raw = json.loads((source / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConvertError(f"source {str(source)!r} has no config.json that can be read ({error}).") from error
    if not isinstance(raw, dict):
        raise ConvertError(f"{str(source / 'config.json')!r} does not hold a JSON object, so it describes no model.")
    kind = raw.get("model_type")
    if kind not in FAMILIES:
        known = ", ".join(name for name in FAMILIES if name != PLTConfig.model_type)
        raise ConvertError(f"model_type {kind!r} is not supported: {_lacks(raw)}. Supported are {known}.")
    try:
        config = AutoConfig.from_pretrained(source)
    except Exception as error:  # transformers raises a dozen kinds for fields of a wrong type
        raise ConvertError(f"{str(source / 'config.json')!r} describes no {kind}: {str(error).strip()}") from error
    if isinstance(config, PLTConfig):
        return config

    family = FAMILIES[kind]
    if raw.get("architectures") not in (None, [], [family.architecture]):
        raise ConvertError(
            f"architectures={raw['architectures']} is not a language model of this kind: use {family.architecture}."
        )
    if raw.get("quantization_config"):
        raise ConvertError("the source is quantised: convert the original model.")
    if raw.get("auto_map"):
        raise ConvertError(
            f"auto_map={raw['auto_map']}: the source comes with code of its own, which may compute something other than {kind}. If "
            f"it does not, remove auto_map from config.json."
        )
    ours = {*CARRIED, *LOOKED_AT, *family.says}
    unknown = {name: value for name, value in raw.items() if name not in ours and value not in (None, False, [], {})}
    if unknown:
        shown = ", ".join(f"{name}={value!r}" for name, value in unknown.items())
        raise ConvertError(
            f"config.json has fields that are not known for {kind} and may change its computation ({shown}; {_lacks(unknown)}). Remove "
            f"those that change nothing."
        )
    layers = set(getattr(config, "layer_types", None) or ["by sliding_window"])
    window = getattr(config, "sliding_window", None)
    if (window is not None and layers != {"full_attention"}) or layers - {"full_attention", "by sliding_window"}:
        raise ConvertError(
            f"the source attends through sliding windows (sliding_window={window}): loop 1 of a PLT sees the whole text, which would "
            f"be another function. If its texts never exceed the window, set sliding_window to null in config.json."
        )
    rope = config.rope_parameters
    if rope.get("partial_rotary_factor", 1.0) not in (None, 1.0) and rope.get("rope_type") != "proportional":
        raise ConvertError(
            f"partial_rotary_factor={rope['partial_rotary_factor']}: the PLT's layers have no RoPE on a part of a head."
        )
    return config


def _lacks(fields: dict[str, Any]) -> str:
    """Return which mechanisms, by the names of these fields, the PLT's layers lack."""
    on = [name for name, value in fields.items() if value and name != "chunk_size_feed_forward"]
    missing = sorted({what for name in on for pattern, what in MISSING.items() if re.search(pattern, name)})
    return f"the PLT's layers have no {', no '.join(missing)}" if missing else "the PLT's layers are Llama's"


def plt_config(given: PreTrainedConfig, loops: int, window: int) -> PLTConfig:
    """Return a PLT's configuration with the source's fields and options. The scales are set later.

    Raises:
        ConvertError: no PLT has these values.
    """
    family = FAMILIES[given.model_type]
    fields: dict[str, Any] = {name: getattr(given, name) for name in (*CARRIED, *family.says)}
    fields |= family.has | {"rope_parameters": deepcopy(given.rope_parameters), "head_dim": getattr(given, "head_dim", None)}
    try:
        return PLTConfig(
            **fields,
            architectures=[ARCHITECTURE],
            plt_num_loops=loops,
            plt_window_size=[window, 0],
            plt_gate_use_hidden_states=True,
        )
    except ValueError as error:
        raise ConvertError(f"the source's config.json gives no PLT: {error}") from error


def dense_config(config: PLTConfig) -> PreTrainedConfig:
    """Return the configuration of the plain model that loop 1 is, in the first family that has its options.

    Raises:
        ConvertError: no family has them.
    """
    on = {name: getattr(config, name) for name in OPTIONS} | {"attention_output_bias": config.output_bias}
    for kind, family in FAMILIES.items():
        possible = OPTIONS | {name: on[name] for name in family.says} | family.has
        if possible["attention_output_bias"] is None:
            possible["attention_output_bias"] = possible["attention_bias"]
        if possible != on or kind == PLTConfig.model_type:
            continue
        fields: dict[str, Any] = {name: getattr(config, name) for name in (*CARRIED, "head_dim", *family.says)}
        fields["rope_parameters"] = deepcopy(config.rope_parameters)
        try:
            with warnings.catch_warnings(action="ignore"):
                dense = CONFIG_MAPPING[kind](**fields, architectures=[family.architecture])
        except Exception:  # Llama requires that heads divide hidden_size
            continue
        if hasattr(dense, "sliding_window"):
            dense.sliding_window = None  # Mistral's default is a window
        return dense
    shown = ", ".join(f"{name}={value}" for name, value in on.items())
    raise ConvertError(f"no model of transformers among {', '.join(FAMILIES)} has these options together: {shown}.")
