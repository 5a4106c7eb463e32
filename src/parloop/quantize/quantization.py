"""Quantise a PLT's weights: round to the nearest of 16 or 256 levels, file by file, into a checkpoint that transformers and vLLM load.

    w = (q - 2^(bits-1)) * scale        q in 4 or 8 bits; one scale for a group of inputs, at 8 bits for all inputs of an output

The linear layers of the stack are quantised. Embedding, norms, gates and the head stay byte by byte what they were: they are small, and the
head decides on every token. One file is in memory at a time, and of it one matrix.
"""

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from safetensors import safe_open
from safetensors.torch import save_file

from ..card import CARD, model_card, shown
from ..checkpoints import check_weights, load_config, local_folder
from ..convert.conversion import COMPANIONS
from ..convert.weights import INDEX, WEIGHTS, weight_files
from ..errors import QuantizeError
from ..folder import check_room, new_folder
from ..model.configuration import PLTConfig
from ..record import write_json
from ..result import Result, not_kept
from .form import BITS, GROUPS, HEAD, PARTS, Scheme, dequantised, pack, rounded
from .quantizer import linear_layers

AT_ONCE = 2**23  # weights that are rounded at a time: what they take in float32 does not grow with the matrix


@dataclass
class Quantized(Result):
    """A quantised model.

    Attributes:
        bits: of a weight.
        group: inputs that share a scale; None: all of an output.
        layers: linear layers that were quantised.
        weights_bytes: of its weights, in `files` files; source_bytes: of the source's.
        error: root mean square of what rounding changed, over that of the weights.
        folder: where it is.
    """

    bits: int
    group: int | None
    layers: int
    weights_bytes: int
    source_bytes: int
    files: int
    error: float
    folder: Path | None = not_kept(default=None)

    def shown(self) -> list[Any]:
        from rich.text import Text

        scales = f"a scale for {self.group} weights" if self.group else "a scale for each output"
        files = f"{self.files} file" + ("s" if self.files > 1 else "")
        lines = [
            f"{self.layers} linear layers in {self.bits} bits, {scales}; weights moved by {self.error:.2%} (root mean square)",
            f"weights: {self.source_bytes / 1e9:.3g} GB -> {self.weights_bytes / 1e9:.3g} GB in {files}",
            f"model: {self.folder}",
        ]
        return [Text("\n".join(lines), overflow="fold")]


def quantize(
    checkpoint: str | Path,
    out: str | Path,
    *,
    bits: int = 4,
    group: int | None = None,
    head: bool = False,
    console: Console | None = None,
) -> Quantized:
    """Write a PLT checkpoint with the linear layers of its stack in 4 or 8 bits, in the compressed-tensors format.

    Args:
        checkpoint: a PLT in safetensors, a folder or a Hub name.
        out: folder to make. It appears when it is complete.
        bits: 4 or 8.
        group: at 4 bits, inputs that share a scale: 32, 64 or 128. Default: 64, or 32 where 64 does not divide the layers' inputs.
        head: quantise the head, too.

    Raises:
        QuantizeError: it cannot be quantised so.
        CheckpointError, ConvertError: it is no PLT, or its weights are not those that its config.json asks for.
        OutputError: the folder exists and is not empty, or cannot be written.
    """
    console = console or Console(stderr=True)
    if bits not in BITS:
        raise QuantizeError(f"--bits {bits} must be 4 or 8.")
    if bits == 8 and group is not None:
        raise QuantizeError(f"--group {group} is for 4 bits: at 8 bits every output has one scale. Leave it out.")
    if group is not None and group not in GROUPS:
        raise QuantizeError(f"--group {group} must be one of {', '.join(map(str, GROUPS))}.")
    source = local_folder(checkpoint)
    config = load_config(source)
    for name in ("quantization_config", "quantization"):  # the latter is MLX's
        if getattr(config, name, None) is not None:
            raise QuantizeError(
                f"checkpoint {str(checkpoint)!r} is quantised already (config.json has {name}): quantise what it was made from."
            )
    if head and config.tie_word_embeddings:
        raise QuantizeError(
            "--head: the head of this checkpoint is its embedding (tie_word_embeddings), which stays as it is."
        )
    files = weight_files(source)
    check_weights(source)
    scheme, layers = _scheme(config, bits, group, head)
    with new_folder(out) as scratch:
        held = sum(path.stat().st_size for path in files)
        check_room(scratch, held * bits / 16, "the quantised model")
        result = _write_weights(files, scratch, scheme, layers, console)
        for pattern in (*COMPANIONS, "*.py"):
            for path in source.glob(pattern):
                if path.is_dir():
                    shutil.copytree(path, scratch / path.name)
                else:
                    shutil.copyfile(path, scratch / path.name)
        config.quantization_config = scheme.settings()
        config.save_pretrained(scratch)
        (scratch / CARD).write_text(_card(result, source, Path(out), config), encoding="utf-8")
    result.folder = Path(out)
    return result


def _scheme(config: PLTConfig, bits: int, group: int | None, head: bool) -> tuple[Scheme, set[str]]:
    """How the layers are quantised, and the names of their weights.

    Raises:
        QuantizeError: a layer's inputs do not fit.
    """
    from ..model.modeling import PLTForCausalLM

    with torch.device("meta"):
        model = PLTForCausalLM(config)
    inputs: dict[str, Any] = {
        name: model.get_submodule(name).in_features for name in linear_layers(model) if head or name != HEAD
    }
    if bits == 4 and group is None:
        group = next((size for size in (64, 32) if not any(K % size for K in inputs.values())), 64)
    unit = 4 if group is None else group
    for name, K in inputs.items():
        if K % unit:
            smaller = [size for size in GROUPS if not any(n % size for n in inputs.values())]
            how = (
                f"take --group {smaller[-1]}"
                if bits == 4 and smaller
                else "leave the model as it is"
                if bits == 8
                else "take --bits 8"
            )
            raise QuantizeError(f"{name} has {K} inputs, no multiple of {unit}, so they do not fit into groups: {how}.")
    return Scheme(bits, group, () if head else (HEAD,)), {f"{name}.weight" for name in inputs}


def _write_weights(files: Any, folder: Path, scheme: Scheme, layers: set[str], console: Console) -> Quantized:
    """Write a file for each of the source's, and an index if there are several.

    Raises:
        QuantizeError: a weight is no finite number, or a layer has another name in the files.
    """
    names = (
        [WEIGHTS]
        if len(files) == 1
        else [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    )
    where: dict[str, str] = {}
    size = source_size = done = 0
    moved = whole = 0.0
    for (path, tensors), name in track(list(zip(files.items(), names)), "quantising", console=console, transient=True):
        made: dict[str, torch.Tensor] = {}
        with safe_open(path, framework="pt") as file:
            for tensor in tensors:
                weight = file.get_tensor(tensor)
                source_size += weight.nbytes
                if tensor not in layers:
                    made[tensor] = weight
                    continue
                packed, squares = _quantised(tensor, weight, scheme)
                made |= packed
                moved, whole, done = moved + squares[0], whole + squares[1], done + 1
        save_file(made, folder / name, metadata={"format": "pt"})
        size += sum(tensor.nbytes for tensor in made.values())
        where |= dict.fromkeys(made, name)
    if done != len(layers):
        raise QuantizeError(
            f"the files hold {done} of {len(layers)} linear layers by the names of a PLT: load the model with transformers, and save it anew."
        )
    if len(files) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": where})
    error = math.sqrt(moved / whole) if whole else 0.0
    return Quantized(scheme.bits, scheme.group, done, size, source_size, len(files), error)


def _quantised(name: str, weight: torch.Tensor, scheme: Scheme) -> tuple[dict[str, torch.Tensor], tuple[float, float]]:
    """Return the tensors in a weight's place, and the sums of squares of what rounding changed, and of the weight."""
    N, K = weight.shape
    parts, moved, whole = [], 0.0, 0.0
    for rows in weight.split(max(1, AT_ONCE // K)):
        q, scale = rounded(rows, scheme.bits, scheme.group_of(K))
        if not scale.isfinite().all():
            raise QuantizeError(f"{name} holds numbers that are not finite (NaN or infinity): the checkpoint is broken.")
        parts.append((pack(q, scheme.bits), scale))
        exact = rows.float()
        moved += float((dequantised(q, scale.float(), scheme.bits) - exact).square().sum(dtype=torch.float64))
        whole += float(exact.square().sum(dtype=torch.float64))
    packed, scales = (torch.cat(part) for part in zip(*parts))
    values = (packed, scales, torch.tensor([N, K]))
    return {name.removesuffix("weight") + part: value for part, value in zip(PARTS, values)}, (moved, whole)


def _card(result: Quantized, source: Path, out: Path, config: PLTConfig) -> str:
    """Return the source's model card with a section more, or one of our own."""
    scales = f"a scale for {result.group} weights" if result.group else "a scale for each output"
    made = (
        f"The {result.layers} linear layers of {shown(str(source.absolute()))} rounded to {result.bits} bits with {scales}, in the compressed-tensors "
        f"format; everything else is as it was. Weights moved by {result.error:.2%} (root mean square)."
    )
    if (source / CARD).is_file():
        card = (source / CARD).read_text(encoding="utf-8", errors="replace").rstrip("\n")
        return f"{card}\n\n## Quantised\n\n{made}\n"
    licence = f"That of {shown(str(source.absolute()))}: name it in `license` at the top of this file."
    return model_card(out.absolute().name, config, {"How it was made": made, "Licence": licence})
