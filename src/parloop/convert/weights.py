"""Weights, copied as bytes from file to file: memory does not grow with the checkpoint."""

import json
import re
from collections.abc import Iterable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import ConvertError
from ..model.configuration import GATE, GATE_ALIASES, PLTConfig
from ..model.modeling import PLTForCausalLM
from ..record import write_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
IS_GATE = re.compile(rf"\.self_attn\.({'|'.join((GATE, *GATE_ALIASES))})\.")
UNUSED = re.compile(r"\.rotary_emb\.inv_freq$")  # old Llama files hold this buffer, which is computed
FLOATS = ("F64", "F32", "F16", "BF16")

WeightFiles = dict[Path, dict[str, tuple[str, list[int]]]]  # files -> names of the tensors in use -> dtype, shape


def weight_files(source: Path) -> WeightFiles:
    """Read names, dtypes and shapes of the tensors in a checkpoint's files.

    Raises:
        ConvertError: they are not safetensors, cannot be read, or lack tensors that their index names.
    """
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
        tensors: WeightFiles = {}
        for path in files:
            with safe_open(path, framework="pt") as file:
                views = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                tensors[path] = {
                    name: (view.get_dtype(), list(view.get_shape()))
                    for name, view in views.items()
                    if (names is None or names.get(name) == path.name) and not UNUSED.search(name)
                }
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        if isinstance(error, ConvertError):
            raise
        raise ConvertError(f"the weights in {str(source)!r} cannot be read: {error}") from error
    absent = set(names or {}) - {name for held in tensors.values() for name in held}
    absent = {name for name in absent if not UNUSED.search(name)}
    if absent:
        raise ConvertError(f"{INDEX} names {_some(absent)}, which the files do not hold: download them again.")
    return tensors


def check_weights(files: WeightFiles, config: PLTConfig) -> None:
    """Check that the files hold exactly the names and shapes of this configuration's loop 1, in floating point.

    Raises:
        ConvertError: they do not.
    """
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
        raise ConvertError(f"the weights lack {_some(missing)}, which config.json requires.")
    if extra := held.keys() - wanted.keys():
        raise ConvertError(f"the weights hold {_some(extra)}, which the PLT's layers do not have.")
    for name, (dtype, shape) in held.items():
        if shape != wanted[name]:
            raise ConvertError(f"{name} has shape {shape}, but config.json says {wanted[name]}.")
        if dtype not in FLOATS:
            raise ConvertError(f"{name} has dtype {dtype}: it is quantised, convert the original model.")
    if config.tie_word_embeddings and head in held:
        pairs = zip(rows_of(files, head), rows_of(files, embedding))
        if not all(torch.equal(one, other) for one, other in pairs):
            raise ConvertError(f"tie_word_embeddings is true, but {head} and {embedding} differ: set it to false.")


def rows_of(files: Iterable[Path], name: str, at_once: int = 2048) -> Iterable[torch.Tensor]:
    """Yield a tensor's rows, at most `at_once` at a time."""
    for path in files:
        with safe_open(path, framework="pt") as file:
            if name in file.keys():  # noqa: SIM118
                view = file.get_slice(name)
                for row in range(0, view.get_shape()[0], at_once):
                    yield view[row : row + at_once]


def dtype_of(files: Iterable[Path]) -> torch.dtype:
    """Return the dtype of a checkpoint's weights."""
    return next(iter(rows_of(files, "model.norm.weight"))).dtype


def write_weights(
    files: WeightFiles, gates: dict[str, torch.Tensor], folder: Path, drop_gates: bool, console: Console
) -> int:
    """Write the source's tensors, the gates in one more file, and an index if there are several files. Return the bytes
    of all tensors."""
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
    """Copy tensors from one safetensors file into a new one, byte by byte and in pieces. Return their bytes."""
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
