"""PLTConfig: the fields of a released PLT checkpoint's `config.json`, validated.

Field names and the meaning of an absent field are those of the released configuration (`model_type: iquestpltcoder`), so
the released checkpoint loads, and what is saved here loads elsewhere. Absent is not the released value: a file without
`plt_emb_scale` means 1.0 (not 0.707), one without `plt_gate_use_hidden_states` means the query gate.
"""

import math
import re
from copy import deepcopy
from functools import cached_property
from numbers import Integral
from typing import Any, ClassVar

import torch
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

NOT_RELEASED = {
    "attention_output_bias": None,
    "qk_norm": False,
    "plt_trained_loops": None,
    "plt_offset": 1,
}  # fields that released files do not have, and what they are there
ARCHITECTURE = "IQuestPLTCoderForCausalLM"  # the name on disk of what is PLTForCausalLM here; classifiers' follow it
GATE, GATE_ALIASES = "plt_gate", ("loop_gate_proj",)  # the released name of a layer's gate, and others that checkpoints use
# Fields by which stock caches decide that a layer forgets tokens, or shares another one's. A PLT's loops read all of loop 1's.
WINDOWED = ("sliding_window", "attention_chunk_size", "kv_sharing_modes")
PRIVATE = ("_as_read", "_is_complete")  # attributes that are not fields


def released_name(name: str) -> str:
    """Return the name that a weight has in released checkpoints."""
    for alias in GATE_ALIASES:
        name = name.replace(f".{alias}.", f".{GATE}.")
    return name


def loop_count(value: Any, name: str = "num_loops") -> int:
    """Return a loop count as an int. Accepts any integer type of at least 1, numpy's too, but not a bool.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name}={value!r} must be an integer of at least 1.")
    return int(value)


class PLTConfig(PreTrainedConfig):
    """Configuration of a Parallel Loop Transformer (PLT, arXiv 2510.24824; LoopCoder-v2, arXiv 2606.18023).

    Args:
        vocab_size: number of token ids.
        hidden_size: D, width of the residual stream.
        intermediate_size: width of the SwiGLU feed-forward.
        num_hidden_layers: L, the real number of layers. Never L * R.
        num_attention_heads: H, query heads.
        num_key_value_heads: G, key/value heads; divides H. None means H.
        head_dim: K, size of a head. None means hidden_size // num_attention_heads.
        rope_parameters: RoPE base and scaling as transformers 5 names them. `rope_theta` and `rope_scaling`, the names
            in released files, are accepted and are what gets saved.
        attention_bias: biases in the query, key and value projections, and in the output projection unless the next field says
            otherwise.
        attention_output_bias: a bias in the output projection. None means as attention_bias; Qwen2 has the first without it.
        qk_norm: norm each head's query and key before RoPE, as Qwen3 does.
        plt_num_loops: R, how often the stack is run; `num_loops` is another name of it. 1 is the plain transformer: a looped
            checkpoint loaded so drops its gates, and would be saved without them. To only run fewer loops, use the
            `num_loops` of a call.
        plt_trained_loops: the loop counts that the model was trained at, for which the dial does not warn. None: R alone.
        plt_window_size: `[w, 0]`. In loops 2..R a token sees itself and the w tokens before it: w + 1 keys.
        plt_offset: s, how many tokens to the left a loop reads the state of the loop before. 1: the paper's shift. 0: no shift, the
            token's own state; a decode step then takes a pass per loop. Other values are for comparison with these.
        plt_normalize_per_loop: apply the final norm after every loop, not only after the last.
        plt_emb_scale: a in `a * E + c * shift(h)`. None means 1.0.
        plt_hidden_scale: c in `a * E + c * shift(h)`. None means 1.0.
        plt_gate_use_hidden_states: True: the gate reads the layer's normed input; False: the rotated query.

    The remaining fields mean what they mean in transformers' `LlamaConfig`.

    Raises:
        ValueError: at construction and whenever a field is set, if the values do not describe a model.
    """

    model_type = "iquestpltcoder"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["cache", "past_key_values", "loop_states", "loop_logits"]
    attribute_map: ClassVar[dict[str, str]] = {"num_loops": "plt_num_loops"}
    default_theta = 500000.0
    # What FSDP2 gathers together when transformers shards the model. The final norm and the head are left to the root: the norm runs
    # once per loop, and the library would put it into one group with the head, which runs once.
    base_model_fsdp_plan: ClassVar[dict[Any, str]] = {"embed_tokens": "free_full_weight", "layers.*": "free_full_weight"}

    vocab_size: int = 75904
    hidden_size: int = 5120
    intermediate_size: int = 27648
    num_hidden_layers: int = 14
    num_attention_heads: int = 40
    num_key_value_heads: int = 8
    head_dim: int = None  # type: ignore[assignment]  # filled in below
    hidden_act: str = "silu"
    max_position_embeddings: int = 131072
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | tuple[int, ...] | None = (2, 75864, 75869)
    tie_word_embeddings: bool = False
    rope_parameters: dict | None = None
    attention_bias: bool = False
    attention_output_bias: bool | None = None
    qk_norm: bool = False
    attention_dropout: float = 0.0
    mlp_bias: bool = False
    plt_num_loops: int = 2
    plt_trained_loops: list[int] | None = None
    plt_window_size: list[int] = None  # type: ignore[assignment]  # filled in below
    plt_offset: int = 1
    plt_normalize_per_loop: bool = True
    plt_emb_scale: float | None = None
    plt_hidden_scale: float | None = None
    plt_gate_use_hidden_states: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self._check_forms(kwargs)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self._divides("num_attention_heads", "hidden_size")
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.plt_window_size is None:
            self.plt_window_size = [64, 0]
        if isinstance(self.eos_token_id, tuple):
            self.eos_token_id = list(self.eos_token_id)
        if (
            kwargs.get("use_sliding_window") is False
        ):  # a window that is off, in files made from a Qwen2; stock caches do not ask
            kwargs["sliding_window"] = None
        super().__post_init__(**kwargs)
        self._check()
        self.__dict__["_is_complete"] = True

    def __setattr__(self, key: str, value: Any) -> None:
        # from_pretrained(..., plt_num_loops=0) sets fields after construction, so the checks run here too.
        if key == "per_layer_config" and value:
            raise ValueError("per_layer_config: all layers of a PLT are alike; remove the field.")
        if not self.__dict__.get("_is_complete") or key.startswith("_"):
            return super().__setattr__(key, value)
        before = deepcopy(getattr(self, key, None))
        super().__setattr__(key, value)
        try:
            self._check_forms({})
            self._check()
        except ValueError:
            super().__setattr__(key, before)
            raise

    @property
    def window_tokens(self) -> int:
        """w, the number of tokens before itself that a token sees in loops 2..R (its own key is one more)."""
        return self.plt_window_size[0]

    @property
    def visited_layers(self) -> int:
        """L * R, the number of layer visits of a pass, which `output_hidden_states` counts by."""
        return self.num_hidden_layers * self.plt_num_loops

    @cached_property
    def auto_map(self) -> dict[str, str]:
        """Empty, unless a repository's file names its own code. TRL and others read this of every model that
        transformers does not bring itself."""
        return {}

    @property
    def trained_loops(self) -> list[int]:
        """The loop counts that the model was trained at."""
        return list(self.plt_trained_loops or [self.plt_num_loops])

    @property
    def output_bias(self) -> bool:
        """True if the attention's output projection has a bias."""
        return self.attention_bias if self.attention_output_bias is None else self.attention_output_bias

    def _divides(self, small: str, large: str) -> None:
        m, n = getattr(self, small), getattr(self, large)
        if not (isinstance(m, int) and isinstance(n, int) and m > 0 and n > 0 and n % m == 0):
            raise ValueError(f"{small}={m!r} must be a positive divisor of {large}={n!r}: change one of the two.")

    def _check(self) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} must be an integer of at least 1.")
        self._divides("num_key_value_heads", "num_attention_heads")
        if not isinstance(self.head_dim, int) or self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(
                f"head_dim={self.head_dim!r} must be an even integer of at least 2 (RoPE rotates pairs): set head_dim, or "
                f"choose hidden_size and num_attention_heads so that their quotient is even."
            )
        try:
            loop_count(self.plt_num_loops, "plt_num_loops")
        except ValueError as error:
            raise ValueError(f"{error} 1 is the plain transformer, 2 the released model's loop count.") from None
        counts = self.plt_trained_loops
        if counts is not None:
            if not isinstance(counts, (list, tuple)) or not counts:
                raise ValueError(f"plt_trained_loops={counts!r} must be a list of loop counts, each at least 1, or null.")
            for n in counts:
                loop_count(n, "plt_trained_loops: each")
        if type(self.plt_offset) is not int or self.plt_offset < 0:
            raise ValueError(
                f"plt_offset={self.plt_offset!r} must be an integer of at least 0: 1 is the paper's shift by one token, 0 no shift."
            )
        window = self.plt_window_size
        is_pair = isinstance(window, (list, tuple)) and len(window) == 2 and all(type(n) is int for n in window)
        if not is_pair or window[0] < 0 or window[1] != 0:
            raise ValueError(
                f"plt_window_size={window!r} must be [w, 0] with w >= 0: w tokens to the left of the token itself and none "
                f"to its right, for instance [64, 0]."
            )
        for name in WINDOWED:
            if getattr(self, name, None) not in (None, 0, False):
                raise ValueError(
                    f"{name}={getattr(self, name)!r}: caches would forget tokens of loop 1, which every loop of a PLT reads, and "
                    f"generate() would differ from the model. Remove the field, or set it to null (later loops have plt_window_size)."
                )
        other_types = sorted(set(getattr(self, "layer_types", None) or ()) - {"full_attention"})
        if other_types:
            raise ValueError(
                f"layer_types has {', '.join(map(repr, other_types))}: loop 1 of a PLT attends to everything in every layer. Remove "
                f"the field, or set every layer to 'full_attention' (later loops have plt_window_size)."
            )
        for name in ("plt_emb_scale", "plt_hidden_scale"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
                raise ValueError(f"{name}={value!r} must be a number, or null for 1.0.")
        if not isinstance(self.plt_gate_use_hidden_states, bool):
            raise ValueError(
                f"plt_gate_use_hidden_states={self.plt_gate_use_hidden_states!r} is not a known gate mode: use true "
                f"(the gate reads the layer's normed input) or false (the gate reads the rotated query)."
            )
        for name in ("plt_normalize_per_loop", "attention_bias", "mlp_bias", "qk_norm", "tie_word_embeddings"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} must be true or false.")
        if self.attention_output_bias not in (None, True, False):
            raise ValueError(
                f"attention_output_bias={self.attention_output_bias!r} must be true, false, or null for what attention_bias says."
            )
        if not isinstance(self.hidden_act, str) or self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act={self.hidden_act!r} is not known to transformers: use 'silu', the released value.")
        rope_type = (self.rope_parameters or {}).get("rope_type", "default")
        if rope_type != "default" and rope_type not in ROPE_INIT_FUNCTIONS:
            known = ", ".join(sorted(ROPE_INIT_FUNCTIONS))
            raise ValueError(
                f"rope_scaling has rope_type={rope_type!r}, which transformers does not know: use one of {known}."
            )
        try:
            self.validate_rope()
        except KeyError as error:
            raise ValueError(f"rope_scaling={self.rope_parameters!r} lacks a field: {error.args[0]}") from error
        self._check_numbers()

    def _check_forms(self, others: dict[str, Any]) -> None:
        """Check the fields that transformers' own constructor would fail on, before it runs.

        Args:
            others: fields under the names that released files have.
        """
        for name in ("rope_scaling", "rope_parameters"):
            value = others.get(name, getattr(self, name, None))
            if value is not None and not isinstance(value, dict):
                raise ValueError(f"{name}={value!r} must be an object with the scaling's fields, or null for none.")
        if not isinstance(self.architectures, (list, tuple, type(None))):
            raise ValueError(
                f"architectures={self.architectures!r} must be a list of names, for instance [{ARCHITECTURE!r}]."
            )
        dtype = others.get("torch_dtype") if self.dtype is None else self.dtype
        found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
        if dtype is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
            raise ValueError(f"dtype={dtype!r} is not a dtype of models: use 'bfloat16', 'float16' or 'float32'.")

    def _check_numbers(self) -> None:
        rope = {name: value for name, value in (self.rope_parameters or {}).items() if name not in ("rope_type", "type")}
        for name, value in rope.items():
            if not all(
                _is_number(part) or part is None for part in (value if isinstance(value, (list, tuple)) else [value])
            ):
                raise ValueError(f"{name}={value!r}, of RoPE, must be a finite number.")
        if not _is_number(rope["rope_theta"]) or rope["rope_theta"] <= 0:
            raise ValueError(f"rope_theta={rope['rope_theta']!r} must be a number above 0: the base of RoPE, such as 10000.")
        for name in ("rms_norm_eps", "attention_dropout", "initializer_range", "plt_emb_scale", "plt_hidden_scale"):
            value = getattr(self, name)
            if value is not None and not _is_number(value):
                raise ValueError(f"{name}={value!r} must be a finite number.")
        pad = self.pad_token_id
        if pad is not None and (not isinstance(pad, int) or pad >= self.vocab_size):
            raise ValueError(f"pad_token_id={pad!r} must be one of the vocab_size={self.vocab_size} token ids, or null.")

    # What is saved. A field that did not change since it was read is written as it was read, in the released names.

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        as_read = deepcopy(config_dict)
        result = super().from_dict(config_dict, **kwargs)
        config = result[0] if isinstance(result, tuple) else result
        config._as_read = (as_read, cls(**deepcopy(as_read))._released_form())
        return result

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PLTConfig) and self.to_dict() == other.to_dict()

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        for name in PRIVATE:
            output.pop(name, None)
        if not output.get("auto_map"):
            output.pop("auto_map", None)
        return output

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the dictionary that `save_pretrained` writes to `config.json`."""
        now = self._released_form()
        if "_as_read" not in self.__dict__:
            return now
        as_read, baseline = self._as_read
        as_read = {key: value for key, value in as_read.items() if key in now or key not in baseline}
        changed = {key: value for key, value in now.items() if key not in baseline or value != baseline[key]}
        if changed.keys() & {"rope_theta", "rope_scaling"}:  # never the old names beside the new ones
            as_read = {key: value for key, value in as_read.items() if key != "rope_parameters"}
            changed |= {key: now[key] for key in ("rope_theta", "rope_scaling")}
        if "torch_dtype" in changed:
            as_read = {key: value for key, value in as_read.items() if key != "dtype"}
        return as_read | changed

    def _released_form(self) -> dict[str, Any]:
        form = super().to_diff_dict()
        for name in PRIVATE:
            form.pop(name, None)
        rope = dict(form.pop("rope_parameters"))
        form["rope_theta"] = rope.pop("rope_theta")
        form["rope_scaling"] = rope if rope.get("rope_type", "default") != "default" else None
        form["torch_dtype"] = form.pop("dtype", None)
        for name, absent in NOT_RELEASED.items():
            if form.get(name) == absent:
                form.pop(name, None)
        if self.architectures is not None:
            form["architectures"] = [re.sub("^PLTFor", "IQuestPLTCoderFor", name) for name in self.architectures]
        return form


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
