"""A byte-level BPE tokenizer, trained on the corpus and saved as a standard fast tokenizer."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"  # ids 0, 1, 2


def text_ids(tokenizer: Any, text: Any) -> Any:
    """Return the token ids of a text, or of each text of a list.

    No special tokens are added, and a string such as <|eos|> in the text is encoded as text, not as a border.
    """
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def document_ids(tokenizer: Any, text: str) -> np.ndarray:
    """Return the ids of a document between its borders, <bos> text <eos>, int32 [tokens]."""
    return np.array([tokenizer.bos_token_id, *text_ids(tokenizer, text), tokenizer.eos_token_id], dtype=np.int32)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a tokenizer on `texts`.

    Args:
        texts: training documents.
        vocab_size: number of ids: 3 special tokens, 256 bytes, the rest merges.

    Raises:
        ValueError: vocab_size is too small for the bytes.
    """
    if vocab_size < 259:
        raise ValueError(f"vocab_size={vocab_size} must be at least 259: 256 bytes and 3 special tokens.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
