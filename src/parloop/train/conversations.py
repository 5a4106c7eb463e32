"""The conversations that a recipe trains on: read, encoded and packed once, into the run's folder."""

import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets import Dataset
from rich.console import Console
from transformers import GenerationConfig

from ..checkpoints import load_part
from ..corpus import sources
from ..corpus.chat import Chat, Reasoning, load_chat
from ..errors import RecipeError
from ..model.configuration import PLTConfig
from ..record import write_json
from .recipe import ChatRecipe
from .run import TRAINED_ON

ROWS, SUMMARY = "conversations", "summary.json"  # packed rows and their counts, in the run's folder


def prepare(recipe: ChatRecipe, output: Path, tokenizer: Any, stop_ids: set[int], console: Console) -> None:
    """Encode and pack the conversations into the run's folder, where all processes and resumed runs read them.

    Raises:
        SourceError: there are no conversations.
        RecipeError: they have changed since the run began.
    """
    folder, known = output / ROWS, json.loads(json.dumps([sources.fingerprint(recipe.chat), tokenizer.chat_template]))
    kept = json.loads((folder / SUMMARY).read_text(encoding="utf-8")) if (folder / SUMMARY).exists() else None
    if kept is not None and kept["fingerprint"] == known:
        return
    datasets.disable_progress_bars()
    reasoning = Reasoning(recipe.max_reasoning_tokens, recipe.long_reasoning)
    chat = load_chat(recipe.chat, tokenizer, recipe.length, recipe.validation_share, stop_ids, reasoning)
    _report(chat, console)
    begun = output / TRAINED_ON
    if begun.exists() and json.loads(begun.read_text(encoding="utf-8"))["digest"] != chat.digest:
        raise RecipeError(
            f"chat={recipe.chat!r} has changed since the run in {str(output)!r} began: start over with --fresh, or choose another "
            f"--output."
        )
    shutil.rmtree(folder, ignore_errors=True)
    for name, rows in (("train", chat.train), ("validation", chat.validation)):
        if len(rows):  # with few conversations none may be held out, and `datasets` cannot load an empty set
            packed(rows, recipe).save_to_disk(str(folder / name))
    summary = {
        "fingerprint": known,
        "digest": chat.digest,
        "conversations": chat.conversations,
        "left_out": dict(chat.left_out),
        "cut": chat.cut,
    }
    write_json(folder / SUMMARY, summary)


def order_of(rows: int, wanted: int, seed: int) -> np.ndarray:
    """Return the indices of the rows to train on, [wanted]: all rows, epoch after epoch, in a new order each time."""
    epochs = [np.random.default_rng([seed, epoch]).permutation(rows) for epoch in range(-(-wanted // rows))]
    return np.concatenate(epochs)[:wanted]


def packed(data: Dataset, recipe: ChatRecipe) -> Dataset:
    """Return conversations packed into rows of at most `length` tokens: input_ids, labels, seq_lengths."""
    from trl import pack_dataset

    if recipe.packing:
        return pack_dataset(data, seq_length=recipe.length, strategy="bfd")
    return data.add_column("seq_lengths", [[len(ids)] for ids in data["input_ids"]])


class Rows:
    """Collates packed rows: input_ids, labels and position_ids [B, T]. Positions restart with every conversation.

    Padding comes last, each padding token as a text of its own, so that no real token attends to it.
    """

    def __init__(self, length: int | None, pad: int):
        self.length, self.pad = length, pad

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        T = self.length or max(len(row["input_ids"]) for row in rows)
        ids, labels, positions = [], [], []
        for row in rows:
            missing = T - len(row["input_ids"])
            ids.append(list(row["input_ids"]) + [self.pad] * missing)
            starts = [i for size in row["seq_lengths"] for i in range(size)]
            positions.append(starts + [0] * missing)
            learnt = [-100 if position == 0 else label for label, position in zip(row["labels"], starts)]
            labels.append(learnt + [-100] * missing)
        return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "position_ids": torch.tensor(positions)}


def stop_ids(config: PLTConfig, tokenizer: Any, folder: Path) -> set[int]:
    """Return the ids of the tokens that end a checkpoint's answers, from its generation settings, configuration and
    tokenizer."""
    name = "generation_config.json"
    given = load_part(GenerationConfig, folder, name).eos_token_id if (folder / name).is_file() else None
    stops: set[int] = set()
    for ids in (given, config.eos_token_id, tokenizer.eos_token_id):
        stops |= set(ids) if isinstance(ids, (list, tuple)) else set() if ids is None else {ids}
    return stops


def _report(chat: Chat, console: Console) -> None:
    left_out = ", ".join(f"{n:,} {reason}" for reason, n in chat.left_out.most_common()) or "nothing"
    console.print(
        f"{chat.conversations:,} conversations: {len(chat.train):,} rows to train on, {len(chat.validation):,} held out. Left out: {left_out}",
        highlight=False,
        markup=False,
    )
    if chat.cut:
        console.print(f"Reasoning was cut in {chat.cut:,} of them.", highlight=False, markup=False)
    if not chat.stops:
        console.print(
            "In some turns the last token to be learnt does not end generation: the model may not learn to stop. Add it to "
            "eos_token_id in generation_config.json, or let the chat template's {% generation %} block include the end of the turn.",
            style="yellow",
            markup=False,
        )
