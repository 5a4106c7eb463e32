"""Packing of documents into rows of T tokens: `<bos> text <eos>`, concatenated and cut every T tokens.

position_ids restart at 0 with every document and at every row, which keeps attention and the shift within a document (see
model/masks.py). The first token of a piece has no predecessor and is never a target.
"""

from typing import Any

import numpy as np
import torch


def pack(documents: list[np.ndarray], length: int) -> dict[str, np.ndarray]:
    """Concatenate tokenized documents and cut rows of `length` tokens; an incomplete last row is left out.

    Args:
        documents: arrays of token ids, none of them empty.
        length: T, tokens per row.

    Returns:
        {"input_ids": int32 [rows, length], "position_ids": int32 [rows, length]}
    """
    ids = np.concatenate(documents).astype(np.int32) if documents else np.zeros(0, dtype=np.int32)
    rows = len(ids) // length
    index = np.arange(rows * length)
    begin = np.zeros(len(ids), dtype=np.int64)  # at the first token of a piece, its index; 0 elsewhere
    starts = np.cumsum([len(document) for document in documents], dtype=np.int64)[:-1]
    begin[starts] = starts
    begin = begin[: rows * length]
    begin[::length] = index[::length]
    positions = index - np.maximum.accumulate(begin)
    return {
        "input_ids": ids[: rows * length].reshape(rows, length),
        "position_ids": positions.astype(np.int32).reshape(rows, length),
    }


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Collate rows of a packed data set into a batch: input_ids, position_ids and labels, int64 [B, T].

    If rows have no labels they are text, and every token is a label except the first of a piece.
    """
    ids = torch.from_numpy(np.stack([np.asarray(row["input_ids"]) for row in rows])).long()
    positions = torch.from_numpy(np.stack([np.asarray(row["position_ids"]) for row in rows])).long()
    if "labels" in rows[0]:
        labels = torch.from_numpy(np.stack([np.asarray(row["labels"]) for row in rows])).long()
    else:
        labels = ids.masked_fill(positions == 0, -100)
    return {"input_ids": ids, "position_ids": positions, "labels": labels}
