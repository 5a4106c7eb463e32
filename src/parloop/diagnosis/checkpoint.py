"""Diagnose a checkpoint on real text: load it, draw samples, look, and keep everything a report needs."""

import csv
import hashlib
import json
import os
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import AutoTokenizer

from ..corpus.samples import Document, draw_samples, padded_batches, samples_of
from ..errors import CheckpointError, DiagnosisError, SourceError
from ..folder import DIAGNOSIS, OutputFolder, claimed, read_claim
from ..generate import load_model
from ..record import environment
from .diagnosis import diagnose
from .lenses import LENSES
from .text import choose_text
from .tokens import token_view
from .verdict import give_verdict

DEFAULT_LENGTH = 1024
VIEWED_TOKENS = 160


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
    console: Console | None = None,
) -> dict[str, Any]:
    """Diagnose one checkpoint.

    Args:
        data: a source of text, as for training. Default: what the model's recipe.yaml trained on (of a mixture, the source with the
            largest share), or the standard library.
            Of the text that a model was trained on, only its held-out documents are used.
        samples: rows, each from one document as far as there are enough.
        length: tokens per sample. Default: the recipe's, else 1024, at most the model's.
        loops: loop count; default: as trained.
        held_out: names and texts of the documents that training held out, where they are at hand: the source is not read then.

    Returns:
        what results.json holds for a checkpoint: diagnosis (`Diagnosis.to_dict`), verdict, tokens (the token view), settings.

    Raises:
        CheckpointError, SourceError, DiagnosisError: with what to do.
    """
    console = console or Console(stderr=True)
    if samples < 1 or batch_size < 1 or (length is not None and length < 2):
        raise DiagnosisError(
            f"samples={samples} and batch_size={batch_size} must be at least 1, length={length} at least 2."
        )
    model = load_model(checkpoint, device, dtype)
    longest = model.config.max_position_embeddings
    if length is not None and length > longest:
        raise DiagnosisError(
            f"--length {length} is more than the {longest} tokens that {str(checkpoint)!r} was made for: use at most {longest}."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint {str(checkpoint)!r} has no tokenizer: {error}") from error
    text = choose_text(checkpoint, data, extensions)
    settings = text.settings
    length = length or min(text.recipe.length if text.recipe else DEFAULT_LENGTH, longest)
    try:
        rows = draw_samples(held_out, tokenizer, length, samples) if held_out is not None else []
        rows = rows or samples_of(settings, tokenizer, length, samples, text.held_out)
    except SourceError as error:
        if data is not None or text.recipe_file is None:
            raise
        raise SourceError(f"{error} This is the text of {text.recipe_file}: for another one, use --data.") from error
    if len(rows) < samples:
        console.print(
            f"source {settings.source!r} gives {len(rows)} samples of up to {length} tokens, not {samples}.", markup=False
        )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"))
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
        task = progress.add_task(f"diagnosing {escape(Path(checkpoint).name)}", total=len(rows))
        diagnosis = diagnose(
            model,
            padded_batches(rows, batch_size),
            num_loops=loops,
            center_rank=center_rank,
            on_batch=lambda n: progress.advance(task, n),
        )
    shown = max(rows[: min(8, len(rows))], key=lambda row: len(row.ids))
    return {
        "checkpoint": str(checkpoint),
        "diagnosis": diagnosis.to_dict(),
        "sample_hash": hashlib.sha256(json.dumps([row.ids for row in rows]).encode()).hexdigest()[:16],
        "verdict": give_verdict(diagnosis).to_dict(),
        "tokens": {
            "document": shown.name,
            "first": tokenizer.decode(shown.ids[:1], skip_special_tokens=True),
            "view": token_view(model, tokenizer, shown.ids[:VIEWED_TOKENS], diagnosis.loops),
        },
        "settings": {
            "loops": diagnosis.loops,
            "trained_loops": diagnosis.trained_loops,
            "layers": model.config.num_hidden_layers,
            "heads": model.config.num_attention_heads,
            "window_tokens": model.config.window_tokens,
            "data": settings.source,
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
    }


def subjects(checkpoints: Iterable[str | Path]) -> str:
    """What a folder with a diagnosis is about: folders by their whole paths, and names of the Hub."""
    return ", ".join(os.path.realpath(place) if Path(place).is_dir() else str(place) for place in checkpoints)


def default_folder(checkpoints: Iterable[str | Path]) -> Path:
    """runs/diagnose-NAMES; if that is about other checkpoints of these names, a hash is appended."""
    checkpoints = list(checkpoints)
    names = "-".join(Path(os.path.realpath(place)).name for place in checkpoints)[:80]
    folder, about = Path("runs", f"diagnose-{names}"), subjects(checkpoints)
    if os.path.lexists(folder) and read_claim(folder).get("of") != about:
        return folder.with_name(f"{folder.name}-{hashlib.sha256(about.encode('utf-8', 'surrogateescape')).hexdigest()[:8]}")
    return folder


def diagnosis_folder(
    folder: str | Path | OutputFolder, checkpoints: Iterable[str | Path]
) -> AbstractContextManager[OutputFolder]:
    """A folder, claimed for a diagnosis of these checkpoints.

    Raises:
        OutputError: it cannot be written, or holds something else or a diagnosis of others.
    """
    return claimed(folder, DIAGNOSIS, of=subjects(checkpoints), going_on="the diagnosis begins again")


def save_results(records: list[dict[str, Any]], folder: str | Path | OutputFolder, command: str) -> None:
    """results.json: every value of every sample, and lenses.csv: the means with their intervals.

    Raises:
        OutputError: the folder is not a diagnosis of these checkpoints, or cannot be written.
    """
    rows: list[list[Any]] = [["checkpoint", "lens", "unit", "loop", "mean", "low", "high"]]
    for record in records:
        for lens, loops in record["diagnosis"]["summary"].items():
            for loop, interval in enumerate(loops, 1):
                if interval is not None:
                    rows.append([record["checkpoint"], lens, LENSES[lens].unit, loop, *interval])
    with diagnosis_folder(folder, [record["checkpoint"] for record in records]) as out:
        out.write_json("results.json", {"command": command, "checkpoints": records})
        with out.file("lenses.csv") as path, path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)
