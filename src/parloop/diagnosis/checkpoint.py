"""Diagnose a checkpoint on real text: load it, draw samples, look, and keep everything a report needs."""

import csv
import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import AutoTokenizer

from ..corpus.corpus import CorpusSettings
from ..corpus.samples import draw_samples, padded_batches
from ..corpus.sources import STDLIB
from ..errors import DiagnosisError
from ..generate import load_model, load_part
from ..record import environment, printable, write_json
from ..train.recipe import Recipe, load_recipe
from .diagnosis import diagnose
from .lenses import LENSES
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
    tokenizer = load_part(AutoTokenizer, checkpoint, "tokenizer (tokenizer.json)")
    recipe_file = Path(checkpoint, "recipe.yaml")
    recipe = load_recipe(recipe_file) if recipe_file.is_file() else None
    trained_on = sorted(recipe.sources, key=lambda part: -part["weight"]) if isinstance(recipe, Recipe) else []
    parts = [part for part in trained_on if data in (None, part["source"])]  # of a mixture, the largest
    own = bool(parts)
    settings = (
        recipe.corpus_settings(parts[0]) if isinstance(recipe, Recipe) and own else CorpusSettings(source=data or STDLIB)
    )
    if extensions:
        settings = dataclasses.replace(settings, extensions=tuple(extensions))
    length = length or min(recipe.length if recipe else DEFAULT_LENGTH, longest)
    rows = draw_samples(settings, tokenizer, length, samples, held_out=own)
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
        "checkpoint": printable(checkpoint),
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
            "data": printable(settings.source),
            "held_out_only": own,
            "samples": diagnosis.samples,
            "length": length,
            "tokens": int(diagnosis.tokens.sum()),
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": str(model.device),
            "center_rank": center_rank,
            **environment(),
        },
    }


def save_results(records: list[dict[str, Any]], folder: Path, command: str) -> None:
    """results.json: every value of every sample, and lenses.csv: the means with their intervals."""
    write_json(folder / "results.json", {"command": command, "checkpoints": records})
    with open(folder / "lenses.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["checkpoint", "lens", "unit", "loop", "mean", "low", "high"])
        for record in records:
            for lens, loops in record["diagnosis"]["summary"].items():
                for loop, interval in enumerate(loops, 1):
                    if interval is not None:
                        table.writerow([record["checkpoint"], lens, LENSES[lens].unit, loop, *interval])
