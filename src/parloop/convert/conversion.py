"""Dense to PLT and back: convert a Llama-family checkpoint into a PLT that computes the same function and can be trained further.

With a = 1 and c = 0 every loop's input is the embedding, so layer by layer its queries, keys and values are loop 1's. With gates at 1
its attention reads loop 1's cache only. Then every loop's output is loop 1's, and so the source's. A gate is g = sigmoid(b) for its
initial bias b (its weights are zero), and the share of the window changes the output by about 1 - g = exp(-b):

    exact   c = 0, b = 16: 1 - g = 1e-7. The logits change by no more than float32's rounding. From b = 17 on a gate is 1 in float32, and
            has no gradient
    open    c such that the state is as large as the embedding, b = 0: gates at one half, as in a new PLT. It learns best
            (docs/upcycling.md); the change of the loss is measured

Tensors keep their names, so they are copied as bytes from file to file: memory does not grow with the checkpoint. The gates go into one
more file. The source's configuration is read field by field: an unknown field is refused, since it may change the computation.
"""

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..card import CARD, model_card, shown, table
from ..corpus.sources import STDLIB
from ..errors import ConvertError
from ..folder import check_room, new_folder
from ..model.configuration import PLTConfig
from ..result import Result, not_kept
from .families import dense_config, plt_config, source_config
from .opening import EXACT_BIAS, OPEN_BIAS, OPEN_SHARE, embedding_size, initial_gates, opening_loss, sample_rows
from .weights import check_weights, dtype_of, weight_files, write_weights

COMPANIONS = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.tiktoken", "chat_template*",
    "additional_chat_templates", "generation_config.json", "LICENSE*",
)  # fmt: skip


@dataclass
class Converted(Result):
    """A converted model.

    Attributes:
        family: model type of the source.
        model_type: model type of the result.
        weights_bytes: bytes of its weights.
        files: number of its weight files.
        gate_bias: initial bias of the gates; None: there are none.
        source_loss: loss of a PLT's loop 1, which is the source's, in nats per token of the sample text; None: not measured.
        loss: loss of its last loop, likewise.
        config: its configuration.
        folder: its folder.
    """

    family: str
    model_type: str
    weights_bytes: int
    files: int
    gate_bias: float | None = None
    source_loss: float | None = None
    loss: float | None = None
    config: Any = not_kept(default=None)
    folder: Path | None = not_kept(default=None)

    def shown(self) -> list[Any]:
        """Return what `rich` prints of the result."""
        from rich.text import Text

        lines = [f"{self.family} -> {self.model_type}: {self.weights_bytes / 1e9:.2f} GB of weights in {self.files} file(s)"]
        if self.gate_bias is not None:
            opening = f"c = {self.config.plt_hidden_scale:.4g}, gates at sigmoid({self.gate_bias:g})"
            lines.append(f"loops: {self.config.plt_num_loops}, window {self.config.window_tokens} tokens, {opening}")
        if self.loss is not None and self.source_loss is not None:
            change = self.loss - self.source_loss
            lines.append(f"loss on the sample: {self.source_loss:.4f} -> {self.loss:.4f} nats per token ({change:+.4f})")
        return [Text("\n".join([*lines, f"model: {self.folder}"]), overflow="fold")]


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
    """Convert a dense checkpoint into a PLT, or a PLT's loop 1 into a dense checkpoint.

    Args:
        source: folder of a Llama, Mistral, Qwen2 or Qwen3 checkpoint in safetensors, or of a PLT.
        out: folder to create. It appears when it is complete.
        to: plt or dense.
        loops: R of the PLT; default: 2.
        start: exact (the same logits) or open (all of the window and of the previous loop's state, which learns best).
        window: w, in tokens: loops 2..R see the token itself and the w before it.
        hidden_scale: c; default: the start's.
        gate_bias: b; default: the start's.
        data: a source of text, as for training, to measure the loss on. Default: the standard library for the open start.
        samples: rows of up to 512 tokens of that text; 0: do not measure, and never load the model.
        console: where progress is printed; default: the standard error.

    Returns:
        sizes, gates and losses of the result.

    Raises:
        ConvertError: the source cannot be converted.
        OutputError: the folder exists and is not empty, or cannot be written.
        SourceError: the text cannot be read.
    """
    source, out = Path(source), Path(out)
    console = console or Console(stderr=True)
    _check_options(to, loops, start, window, hidden_scale, gate_bias, samples)
    with new_folder(out) as scratch:
        result, rows = _convert(
            source, scratch, out, to, loops, start, window, hidden_scale, gate_bias, data, samples, console
        )
    if rows:
        result.source_loss, result.loss = opening_loss(out, rows)
        (out / CARD).write_text(card_of(result, source), encoding="utf-8")
    return result


def card_of(result: Converted, source: Path) -> str:
    """Return the model card of a converted model, in Markdown."""
    made = f"Loop 1 of the PLT {shown(str(source.absolute()))}, as a dense model."
    if result.gate_bias is not None:
        made = (
            f"Converted from {shown(str(source.absolute()))} ({result.family}), and not trained since: gates at sigmoid({result.gate_bias:g}), "
            f"c = {result.config.plt_hidden_scale:.4g}. Its loops learn when it is trained on."
        )
    elif isinstance(result.config, PLTConfig):
        made = f"Converted from {shown(str(source.absolute()))} ({result.family}), with one loop."
    sections = {
        "How it was made": made,
        "Licence": f"That of {shown(str(source.absolute()))}: name it in `license` at the top of this file.",
    }
    if result.loss is not None:
        losses = [["loop 1, the source", f"{result.source_loss:.4f}"], ["last loop", f"{result.loss:.4f}"]]
        sections["Loss"] = "In nats per token, on a sample of text.\n\n" + table(["", "loss"], losses)
    name = (result.folder or Path()).absolute().name
    return model_card(name, result.config, sections)


def _convert(
    source: Path,
    scratch: Path,
    out: Path,
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
    """Convert into a folder that becomes `out`. Also returns the rows to measure the loss on."""
    if not source.is_dir():
        raise ConvertError(
            f"source {str(source)!r} is not a folder. For a model of the Hub: hf download OWNER/NAME --local-dir FOLDER"
        )
    given = source_config(source)
    files = weight_files(source)
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
    check_weights(files, plain)
    gates: dict[str, torch.Tensor] = {}
    rows: list[torch.Tensor] = []
    if isinstance(config, PLTConfig):
        if hidden_scale is None:
            hidden_scale = 0.0 if start == "exact" else OPEN_SHARE * embedding_size(files)
        config.plt_emb_scale, config.plt_hidden_scale = 1.0, hidden_scale
        if gate_bias is None:
            gate_bias = EXACT_BIAS if start == "exact" else OPEN_BIAS
        if loops > 1 and samples and (start == "open" or data is not None):
            rows = sample_rows(source, data or STDLIB, samples, config.max_position_embeddings)
        if loops > 1:
            gates = initial_gates(config, gate_bias, dtype_of(files))

    written = write_weights(files, gates, scratch, drop_gates=to == "dense", console=console)
    for pattern in COMPANIONS:
        for path in source.glob(pattern):
            if path.is_dir():
                shutil.copytree(path, scratch / path.name)
            elif path.suffix != ".py":
                shutil.copyfile(path, scratch / path.name)
    config.save_pretrained(scratch)
    result = Converted(
        family=given.model_type,
        model_type=config.model_type,
        weights_bytes=written,
        files=len(list(scratch.glob("*.safetensors"))),
        config=config,
    )
    if isinstance(config, PLTConfig) and loops > 1:
        result.gate_bias = gate_bias
    result.folder = out
    (scratch / CARD).write_text(card_of(result, source), encoding="utf-8")
    return result, rows


def _check_options(to, loops, start, window, hidden_scale, gate_bias, samples) -> None:
    for name, value, allowed, what in (
        ("to", to, to in ("plt", "dense"), "plt or dense"),
        ("start", start, start in ("exact", "open"), "exact or open"),
        ("loops", loops, loops is None or (type(loops) is int and loops >= 1), "an integer of at least 1"),
        ("window", window, type(window) is int and window >= 0, "a number of tokens, at least 0"),
        ("samples", samples, samples >= 0, "at least 0"),
        ("hidden_scale", hidden_scale, hidden_scale is None or math.isfinite(hidden_scale), "a finite number"),
        ("gate_bias", gate_bias, gate_bias is None or abs(gate_bias) <= 1000, "from -1000 to 1000"),
    ):
        if not allowed:
            raise ConvertError(f"{name}={value!r} must be {what}.")
    if to == "dense" and loops not in (None, 1):
        raise ConvertError(f"loops={loops} says nothing to --to dense, which keeps loop 1 only: leave it out.")
