"""Diagnose a checkpoint on real text: load it, draw samples, apply the lenses, and collect everything that a report needs."""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import AutoTokenizer

from ..checkpoints import load_model, load_part
from ..corpus.samples import Document, Sample, draw_samples, no_samples, padded_batches, samples_of
from ..errors import CheckpointError, DiagnosisError, SourceError
from ..record import command_line, environment, printable
from .diagnosis import diagnose
from .folders import default_folder, diagnosis_folder
from .report import write_report
from .results import CheckpointDiagnosis, DiagnosisResult, TokenView
from .text import Text, choose_text
from .tokens import token_view
from .verdict import give_verdict

DEFAULT_LENGTH = 1024
VIEWED_TOKENS = 160


def diagnose_checkpoints(
    checkpoints: Sequence[str | Path],
    output: str | Path | None = None,
    *,
    console: Console | None = None,
    command: str | None = None,
    **options: Any,
) -> DiagnosisResult:
    """Diagnose one checkpoint, or several side by side, and write a report.

    Args:
        checkpoints: folders or Hub names.
        output: folder of the report. Default: runs/diagnose-NAMES, followed by a hash if that folder holds another diagnosis.
        console: where progress is printed; default: the standard error.
        command: the command that the report names; default: this process's own.
        **options: keyword arguments of `diagnose_checkpoint`.

    Returns:
        the diagnoses, in the order of the checkpoints. results.json in the folder holds the same.

    Raises:
        CheckpointError, SourceError, DiagnosisError: as `diagnose_checkpoint`.
        OutputError: the folder cannot be written, or holds something other than a diagnosis of these checkpoints.
    """
    if not checkpoints:
        raise CheckpointError("name at least one checkpoint: parloop diagnose runs/study-quick/r2-seed0")
    command = command or command_line()
    with diagnosis_folder(output or default_folder(checkpoints), checkpoints) as out:
        diagnoses = [diagnose_checkpoint(checkpoint, **options, console=console) for checkpoint in checkpoints]
        result = DiagnosisResult(command, diagnoses, out.path)
        write_report(result, out)
    return result


def diagnose_checkpoint(
    checkpoint: str | Path,
    *,
    data: str | None = None,
    extensions: list[str] | None = None,
    samples: int = 64,
    length: int | None = None,
    loops: int | None = None,
    batch_size: int = 1,
    device: str = "auto",
    dtype: str = "auto",
    center_rank: bool = False,
    held_out: Iterable[Document] | None = None,
    model: Any = None,
    on_batch: Callable[[int], None] | None = None,
    console: Console | None = None,
) -> CheckpointDiagnosis:
    """Diagnose one checkpoint. Nothing is written.

    Args:
        checkpoint: folder or Hub name.
        data: a source of text, as for training. Default: the source in the model's recipe.yaml (of a mixture, the one with the largest
            share), or the standard library. Of text that the model was trained on, only held-out documents are used.
        extensions: extensions of the files to read in a folder, instead of the recipe's.
        samples: number of rows, each from a document of its own if there are enough.
        length: tokens per sample. Default: the recipe's, otherwise 1024, at most the model's.
        loops: loop count; default: the trained one.
        batch_size: samples per forward pass.
        device: auto, cpu or cuda.
        dtype: dtype of the weights; auto: the checkpoint's.
        center_rank: take the effective rank of centred states.
        held_out: names and texts of the held-out documents, if they are known already; the source is then not read.
        model: the checkpoint's model, if it is loaded already; device and dtype are then its own.
        on_batch: called after each batch with its number of samples; no progress bar is then shown.
        console: where progress is printed; default: the standard error.

    Returns:
        the diagnosis, with advice and settings.

    Raises:
        CheckpointError: the checkpoint cannot be loaded.
        SourceError: the source cannot be read, or has no document that is long enough.
        DiagnosisError: a number is out of its bounds, or the model cannot be diagnosed.
    """
    console = console or Console(stderr=True)
    if samples < 1 or batch_size < 1 or (length is not None and length < 2):
        raise DiagnosisError(
            f"samples={samples} and batch_size={batch_size} must be at least 1, length={length} at least 2."
        )
    model = load_model(checkpoint, device, dtype) if model is None else model
    longest = model.config.max_position_embeddings
    if length is not None and length > longest:
        raise DiagnosisError(
            f"--length {length} is more than the {longest} tokens that {str(checkpoint)!r} was made for: use at most {longest}."
        )
    tokenizer = load_part(AutoTokenizer, checkpoint, "tokenizer (tokenizer.json)")
    text = choose_text(checkpoint, data, extensions)
    length = length or min(text.recipe.length if text.recipe else DEFAULT_LENGTH, longest)
    rows = _rows(text, tokenizer, length, samples, held_out, data)
    if len(rows) < samples:
        console.print(
            f"source {text.settings.source!r} gives {len(rows)} samples of up to {length} tokens, not {samples}.",
            markup=False,
        )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"))
    bar = Progress(*columns, TimeRemainingColumn(), console=console, transient=True)
    task = bar.add_task(f"diagnosing {escape(Path(checkpoint).name)}", total=len(rows))
    with contextlib.nullcontext() if on_batch else bar:
        diagnosis = diagnose(
            model, padded_batches(rows, batch_size), num_loops=loops, center_rank=center_rank,
            on_batch=on_batch or partial(bar.advance, task),
        )  # fmt: skip
    viewed = max(rows[: min(8, len(rows))], key=lambda row: len(row.ids))
    return CheckpointDiagnosis(
        checkpoint=printable(checkpoint),
        diagnosis=diagnosis,
        sample_hash=hashlib.sha256(json.dumps([row.ids for row in rows]).encode()).hexdigest()[:16],
        verdict=give_verdict(diagnosis),
        tokens=TokenView(
            document=viewed.name,
            first=str(tokenizer.decode(viewed.ids[:1], skip_special_tokens=True)),
            view=token_view(model, tokenizer, viewed.ids[:VIEWED_TOKENS], diagnosis.loops),
        ),
        settings={
            "loops": diagnosis.loops,
            "trained_loops": diagnosis.trained_loops,
            "layers": model.config.num_hidden_layers,
            "heads": model.config.num_attention_heads,
            "window_tokens": model.config.window_tokens,
            "data": printable(text.settings.source),
            "held_out_only": text.held_out,
            "trained_on_this_text": text.trained_on,
            "samples": diagnosis.samples,
            "length": length,
            "tokens": int(diagnosis.tokens.sum()),
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": str(model.device),
            "center_rank": center_rank,
            **environment(),
        },
    )


def _rows(
    text: Text, tokenizer: Any, length: int, samples: int, held_out: Iterable[Document] | None, data: str | None
) -> list[Sample]:
    """Draw samples from the given documents, or from the source.

    Raises:
        SourceError: there are none.
    """
    try:
        if held_out is None:
            return samples_of(text.settings, tokenizer, length, samples, text.held_out)
        if rows := draw_samples(held_out, tokenizer, length, samples):
            return rows
        raise no_samples(text.settings, text.held_out)
    except SourceError as error:
        if data is not None or text.recipe_file is None:
            raise
        raise SourceError(f"{error} This is the text of {text.recipe_file}: for another one, use --data.") from error
