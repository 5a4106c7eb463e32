"""Dense to PLT and back: a Llama-family checkpoint as a PLT that computes the same function, ready to be trained on.

With a = 1 and c = 0 every loop's input is the embedding, so layer by layer its queries, keys and values are loop 1's. With gates at 1
its attention reads loop 1's cache only. Then every loop's output is loop 1's, the source's. A gate is g = sigmoid(b) for the bias b
that it starts with (its weights are zero), and what it lets in of the window changes the output by about 1 - g = exp(-b):

    exact   c = 0, b = 16: 1 - g = 1e-7. The logits move by as much as float32 rounds them. From b = 17 a gate is 1 in float32, and has
            no gradient
    open    c such that the state is as large as the embedding, b = 0: gates at one half, as a new PLT has them. It learns best
            (docs/upcycling.md); how much the loss changes is measured

Tensors keep their names, so they are copied as bytes from file to file: memory does not grow with the checkpoint. The gates are a
file more. The source's configuration is read field by field: one that is not known here is refused, since it may change what is
computed.
"""

import json
import math
import re
import shutil
import warnings
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer, PreTrainedConfig

from .corpus.corpus import CorpusSettings
from .corpus.samples import samples_of
from .corpus.sources import STDLIB
from .errors import ConvertError
from .folder import check_room, new_folder
from .generate import load_model
from .model.configuration import ARCHITECTURE, GATE, GATE_ALIASES, PLTConfig
from .model.modeling import PLTForCausalLM
from .record import write_json

EXACT_BIAS = 16.0
OPEN_BIAS = 0.0
OPEN_SHARE = 1.0  # of the previous loop's state in a later loop's input, relative to the embedding
SAMPLE_TOKENS = 512


@dataclass(frozen=True)
class Family:
    """A model type of transformers: which of our options it always has, and which fields of its configuration set one."""

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
OPTIONS = {"attention_bias": False, "attention_output_bias": None, "mlp_bias": False, "qk_norm": False}  # and when absent
CARRIED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache", "pad_token_id", "bos_token_id",
    "eos_token_id", "tie_word_embeddings", "rope_parameters", "attention_dropout", "dtype",
)  # fmt: skip
# Fields that are looked at by name below, or change nothing that is computed.
LOOKED_AT = {
    "model_type", "architectures", "head_dim", "rope_theta", "rope_scaling", "torch_dtype", "sliding_window", "use_sliding_window",
    "max_window_layers", "layer_types", "auto_map", "quantization_config", "transformers_version", "_name_or_path",
    "_attn_implementation", "_attn_implementation_autoset", "pretraining_tp", "output_hidden_states", "output_attentions",
    "return_dict", "chunk_size_feed_forward", "id2label", "label2id", "problem_type", "task_specific_params", "tokenizer_class",
    "torchscript", "max_length", "max_new_tokens", "do_sample", "temperature", "top_p", "top_k", "repetition_penalty",
}  # fmt: skip
# What another architecture's fields stand for, for an error that says what is missing.
MISSING = {
    r"expert|moe": "mixture of experts",
    r"vision|image|audio|video": "images or sound",
    r"softcap|logit_scale|logits_scaling": "scaled or capped logits",
    r"partial_rotary|rotary_pct|rotary_dim": "RoPE on a part of a head",
    r"sliding|window|chunk": "attention in windows",
    r"sink": "attention sinks",
    r"lora_rank|qk_nope|qk_rope": "latent attention",
    r"alibi|n_positions|relative": "position embedding but RoPE",
    r"residual_multiplier|embedding_multiplier|scale_emb|scale_depth": "scaled embeddings or residuals",
    r"per_layer": "layers of different shapes",
    r"parallel": "attention and feed-forward side by side",
    r"ssm|mamba|conv": "state-space layers",
    r"layer_norm_eps|layer_norm_epsilon|norm_bias": "LayerNorm",
}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
COMPANIONS = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.tiktoken", "chat_template*",
    "additional_chat_templates", "generation_config.json", "LICENSE*",
)  # fmt: skip
IS_GATE = re.compile(rf"\.self_attn\.({'|'.join((GATE, *GATE_ALIASES))})\.")
UNUSED = re.compile(r"\.rotary_emb\.inv_freq$")  # old Llama files keep what is computed
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass
class Converted:
    """What came out: the folder, its configuration, and for a PLT the loss in nats per token of loop 1, which is the source's, and of the
    last loop, on the sample text (None: not measured)."""

    folder: Path
    config: PreTrainedConfig
    family: str
    weights_bytes: int
    files: int
    gate_bias: float | None = None
    source_loss: float | None = None
    loss: float | None = None


def convert(
    source: str | Path,
    out: str | Path,
    *,
    to: str = "plt",
    loops: int | None = None,
    start: str = "exact",
    window: int = 64,
    hidden_scale: float | None = None,
    gate_bias: float | None = None,
    data: str | None = None,
    samples: int = 8,
    console: Console | None = None,
) -> Converted:
    """Write a dense checkpoint as a PLT, or a PLT's loop 1 as a dense checkpoint.

    Args:
        source: folder of a Llama, Mistral, Qwen2 or Qwen3 checkpoint in safetensors, or of a PLT.
        out: folder to make. It appears when it is complete.
        to: plt or dense.
        loops: R of the PLT; default: 2.
        start: exact (the same logits) or open (all of the window and of the previous loop's state, which learns best).
        window: w, in tokens: loops 2..R see the token itself and the w before it.
        hidden_scale: c, instead of the start's.
        gate_bias: b, instead of the start's.
        data: a source of text, as for training, to measure the loss on. Default: the standard library for the open start.
        samples: rows of up to 512 tokens of that text; 0: do not measure, and never load the model.

    Raises:
        ConvertError: the source is nothing that can be converted.
        OutputError: the folder exists and is not empty, or cannot be written.
        SourceError: the text cannot be read.
    """
    source, out = Path(source), Path(out)
    console = console or Console(stderr=True)
    _check_options(to, loops, start, window, hidden_scale, gate_bias, samples)
    with new_folder(out) as scratch:
        result, rows = _convert(source, scratch, to, loops, start, window, hidden_scale, gate_bias, data, samples, console)
    result.folder = out
    if rows:
        result.source_loss, result.loss = opening_loss(out, rows)
    return result


def _convert(
    source: Path,
    scratch: Path,
    to: str,
    loops: int | None,
    start: str,
    window: int,
    hidden_scale: float | None,
    gate_bias: float | None,
    data: str | None,
    samples: int,
    console: Console,
) -> tuple[Converted, list[torch.Tensor]]:
    """Convert into a folder that is there; also returns the rows to measure the loss on."""
    if not source.is_dir():
        raise ConvertError(
            f"source {str(source)!r} is not a folder. For a model of the Hub: hf download OWNER/NAME --local-dir FOLDER"
        )
    given = source_config(source)
    files = _weight_files(source)
    check_room(scratch, sum(path.stat().st_size for path in files), "the converted model")
    loops = loops or 2
    if to == "dense":
        if not isinstance(given, PLTConfig):
            raise ConvertError(f"source {str(source)!r} has model_type {given.model_type!r} and is dense already.")
        plain, config = given, dense_config(given)
    else:
        if isinstance(given, PLTConfig) and given.plt_num_loops > 1:
            raise ConvertError(
                f"source {str(source)!r} is a PLT with {given.plt_num_loops} loops: for its first loop alone, use --to dense; for "
                f"another loop count, set plt_num_loops in its config.json, and train."
            )
        plain = config = plt_config(given, loops, window)
    _check_weights(files, plain)
    gates: dict[str, torch.Tensor] = {}
    rows: list[torch.Tensor] = []
    if isinstance(config, PLTConfig):
        if hidden_scale is None:
            hidden_scale = 0.0 if start == "exact" else OPEN_SHARE * _embedding_size(files)
        config.plt_emb_scale, config.plt_hidden_scale = 1.0, hidden_scale
        if gate_bias is None:
            gate_bias = EXACT_BIAS if start == "exact" else OPEN_BIAS
        if loops > 1 and samples and (start == "open" or data is not None):
            rows = _sample_rows(source, data or STDLIB, samples, config.max_position_embeddings)
        if loops > 1:
            gates = initial_gates(config, gate_bias, _dtype(files))

    written = _write_weights(files, gates, scratch, drop_gates=to == "dense", console=console)
    for pattern in COMPANIONS:
        for path in source.glob(pattern):
            if path.is_dir():
                shutil.copytree(path, scratch / path.name)
            elif path.suffix != ".py":
                shutil.copyfile(path, scratch / path.name)
    config.save_pretrained(scratch)
    result = Converted(scratch, config, given.model_type, written, len(list(scratch.glob("*.safetensors"))))
    if isinstance(config, PLTConfig) and loops > 1:
        result.gate_bias = gate_bias
    return result, rows


def _check_options(to, loops, start, window, hidden_scale, gate_bias, samples) -> None:
    for name, value, allowed, what in (
        ("to", to, to in ("plt", "dense"), "plt or dense"),
        ("start", start, start in ("exact", "open"), "exact or open"),
        ("loops", loops, loops is None or (type(loops) is int and loops >= 1), "an integer of at least 1"),
        ("window", window, type(window) is int and window >= 0, "a number of tokens, at least 0"),
        ("samples", samples, samples >= 0, "at least 0"),
        ("hidden_scale", hidden_scale, hidden_scale is None or math.isfinite(hidden_scale), "a finite number"),
        ("gate_bias", gate_bias, gate_bias is None or math.isfinite(gate_bias), "a finite number"),
    ):
        if not allowed:
            raise ConvertError(f"{name}={value!r} must be {what}.")
    if to == "dense" and loops not in (None, 1):
        raise ConvertError(f"loops={loops} says nothing to --to dense, which keeps loop 1 only: leave it out.")


# The configuration


def source_config(source: Path) -> PreTrainedConfig:
    """A checkpoint's configuration as its class in transformers reads it.

    Raises:
        ConvertError: it describes something that the PLT's layers cannot compute.
    """
    try:
        raw = json.loads((source / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConvertError(f"source {str(source)!r} has no config.json that can be read ({error}).") from error
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
        raise ConvertError("the source is quantised: convert the model that it was made from.")
    if raw.get("auto_map"):
        raise ConvertError(
            f"auto_map={raw['auto_map']}: the source comes with code of its own, which may compute something else than {kind}. If "
            f"it does not, remove auto_map from config.json."
        )
    ours = {*CARRIED, *LOOKED_AT, *family.says}
    unknown = {name: value for name, value in raw.items() if name not in ours and value not in (None, False, [], {})}
    if unknown:
        shown = ", ".join(f"{name}={value!r}" for name, value in unknown.items())
        raise ConvertError(
            f"config.json has fields that are not known for {kind} and may change what it computes ({shown}; {_lacks(unknown)}). Remove "
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
    """What the PLT's layers lack that these fields are about."""
    on = [name for name, value in fields.items() if value and name != "chunk_size_feed_forward"]
    missing = sorted({what for name in on for pattern, what in MISSING.items() if re.search(pattern, name)})
    return f"the PLT's layers have no {', no '.join(missing)}" if missing else "the PLT's layers are Llama's, and no others"


def plt_config(given: PreTrainedConfig, loops: int, window: int) -> PLTConfig:
    """The source's fields and options, and the loops. Scales are left to the start."""
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
    """The configuration of the plain model that loop 1 is: of the first family that has its options.

    Raises:
        ConvertError: none has.
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
        except Exception:  # Llama wants heads that divide hidden_size
            continue
        if hasattr(dense, "sliding_window"):
            dense.sliding_window = None  # Mistral's default is a window
        return dense
    shown = ", ".join(f"{name}={value}" for name, value in on.items())
    raise ConvertError(f"no model of transformers among {', '.join(FAMILIES)} has these options together: {shown}.")


# The weights


def _weight_files(source: Path) -> dict[Path, dict[str, tuple[str, list[int]]]]:
    """Files of weights -> names of the tensors in use -> dtype, shape."""
    index = source / INDEX
    try:
        names: dict[str, str] | None = None
        if (source / WEIGHTS).is_file():
            files = [source / WEIGHTS]
        elif index.is_file():
            names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = sorted({source / file for file in names.values()})
        else:
            raise ConvertError(f"source {str(source)!r} has neither {WEIGHTS} nor {INDEX}: only safetensors are read.")
        tensors: dict[Path, dict[str, tuple[str, list[int]]]] = {}
        for path in files:
            with safe_open(path, framework="pt") as file:
                views = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                tensors[path] = {
                    name: (view.get_dtype(), list(view.get_shape()))
                    for name, view in views.items()
                    if (names is None or names.get(name) == path.name) and not UNUSED.search(name)
                }
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        if isinstance(error, ConvertError):
            raise
        raise ConvertError(f"the weights in {str(source)!r} cannot be read: {error}") from error
    absent = set(names or {}) - {name for held in tensors.values() for name in held}
    absent = {name for name in absent if not UNUSED.search(name)}
    if absent:
        raise ConvertError(f"{INDEX} names {_some(absent)}, which the files do not hold: download them again.")
    return tensors


def _check_weights(files: dict[Path, dict[str, tuple[str, list[int]]]], config: PLTConfig) -> None:
    """Exactly the names and shapes of this configuration's loop 1."""
    held = {name: what for tensors in files.values() for name, what in tensors.items() if not IS_GATE.search(name)}
    plain = deepcopy(config)
    plain.plt_num_loops = 1
    with torch.device("meta"):
        model = PLTForCausalLM(plain)
    wanted = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    if config.tie_word_embeddings and head not in held:
        del wanted[head]
    if missing := wanted.keys() - held.keys():
        raise ConvertError(f"the weights lack {_some(missing)}, which config.json asks for.")
    if extra := held.keys() - wanted.keys():
        raise ConvertError(f"the weights hold {_some(extra)}, for which the PLT's layers have no place.")
    for name, (dtype, shape) in held.items():
        if shape != wanted[name]:
            raise ConvertError(f"{name} has shape {shape}, but config.json says {wanted[name]}.")
        if dtype not in FLOATS:
            raise ConvertError(f"{name} has dtype {dtype}: convert the model that was quantised to it.")
    if config.tie_word_embeddings and head in held:
        pairs = zip(_rows(files, head), _rows(files, embedding))
        if not all(torch.equal(one, other) for one, other in pairs):
            raise ConvertError(f"tie_word_embeddings is true, but {head} and {embedding} differ: set it to false.")


def _rows(files: Iterable[Path], name: str, at_once: int = 2048) -> Iterable[torch.Tensor]:
    """A tensor some rows at a time."""
    for path in files:
        with safe_open(path, framework="pt") as file:
            if name in file.keys():  # noqa: SIM118
                view = file.get_slice(name)
                for row in range(0, view.get_shape()[0], at_once):
                    yield view[row : row + at_once]


def _embedding_size(files: Iterable[Path]) -> float:
    """Size of the embedding relative to a state after the final norm, as root mean squares: the c that makes both equally large."""

    def mean_square(name: str) -> float:
        parts = [(float(rows.double().pow(2).sum()), rows.numel()) for rows in _rows(files, name)]
        return sum(total for total, _ in parts) / sum(count for _, count in parts)

    return math.sqrt(mean_square("model.embed_tokens.weight") / mean_square("model.norm.weight"))


def _dtype(files: Iterable[Path]) -> torch.dtype:
    return next(iter(_rows(files, "model.norm.weight"))).dtype


def initial_gates(config: PLTConfig, bias: float, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Gates of zero weight: sigmoid(bias) at every token."""
    gates = {}
    for i in range(config.num_hidden_layers):
        name = f"model.layers.{i}.self_attn.plt_gate"
        gates[f"{name}.weight"] = torch.zeros(config.num_attention_heads, config.hidden_size, dtype=dtype)
        gates[f"{name}.bias"] = torch.full((config.num_attention_heads,), bias, dtype=dtype)
        gates[f"{name}.gate_norm.weight"] = torch.ones(config.hidden_size, dtype=dtype)
    return gates


def _write_weights(files, gates: dict[str, torch.Tensor], folder: Path, drop_gates: bool, console: Console) -> int:
    """The source's files, the gates in one more, and an index if there are several. Returns bytes of tensors."""
    kept = {path: [name for name in tensors if not (drop_gates and IS_GATE.search(name))] for path, tensors in files.items()}
    kept = {path: names for path, names in kept.items() if names}
    total = len(kept) + bool(gates)
    targets = [WEIGHTS] if total == 1 else [f"model-{i:05d}-of-{total:05d}.safetensors" for i in range(1, total + 1)]
    where: dict[str, str] = {}
    size = 0
    for (path, names), target in track(list(zip(kept.items(), targets)), "converting", console=console, transient=True):
        size += copy_tensors(path, folder / target, names)
        where |= dict.fromkeys(names, target)
    if gates:
        save_file(gates, folder / targets[-1], metadata={"format": "pt"})
        where |= dict.fromkeys(gates, targets[-1])
        size += sum(gate.nbytes for gate in gates.values())
    if total > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": where})
    return size


def copy_tensors(source: Path, target: Path, names: Iterable[str]) -> int:
    """Copy tensors from one safetensors file into a new one, byte by byte and in pieces. Returns their bytes."""
    wanted = set(names)
    with open(source, "rb") as file, open(target, "wb") as copy:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        kept = {name: entry for name, entry in header.items() if name in wanted}
        ordered = sorted(kept.items(), key=lambda item: item[1]["data_offsets"])
        new: dict[str, Any] = {"__metadata__": {"format": "pt"} | header.get("__metadata__", {})}
        end = 0
        for name, entry in ordered:
            size = entry["data_offsets"][1] - entry["data_offsets"][0]
            new[name] = entry | {"data_offsets": [end, end + size]}
            end += size
        text = json.dumps(new).encode()
        text += b" " * (-len(text) % 8)  # tensors start at multiples of eight bytes
        copy.write(len(text).to_bytes(8, "little") + text)
        for _, entry in ordered:
            start, stop = entry["data_offsets"]
            file.seek(8 + length + start)
            for at in range(start, stop, 2**24):
                copy.write(file.read(min(2**24, stop - at)))
    return end


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# The opening


def _sample_rows(source: Path, data: str, samples: int, longest: int) -> list[torch.Tensor]:
    """Rows of tokens of a text, [1, T] each."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ConvertError(
            f"source {str(source)!r} has no tokenizer to measure a loss with: use --samples 0 ({error})."
        ) from error
    rows = samples_of(CorpusSettings(source=data), tokenizer, min(SAMPLE_TOKENS, longest), samples, held_out=False)
    return [torch.tensor([row.ids]) for row in rows]


@torch.no_grad()
def opening_loss(folder: Path, rows: list[torch.Tensor], device: str = "auto") -> tuple[float, float]:
    """Loss of loop 1, which is the dense model, and of the last loop, in nats per token."""
    model = load_model(folder, device)
    losses = torch.zeros(2, dtype=torch.float64)
    for row in rows:
        ids = row.to(model.device)
        states = model.model(ids, use_cache=False).loop_states
        for i, state in enumerate((states[0], states[-1])):
            logits = model.lm_head(state)[0, :-1].float()
            losses[i] += F.cross_entropy(logits, ids[0, 1:], reduction="sum").double().cpu()
    source_loss, loss = (losses / sum(row.shape[1] - 1 for row in rows)).tolist()
    return source_loss, loss
