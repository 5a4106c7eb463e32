from .corpus import Corpus, CorpusSettings, load_corpus
from .packing import collate, pack
from .stream import Mixture, Part, StreamLoader
from .tokenizer import text_ids, train_tokenizer

__all__ = [
    "Corpus",
    "CorpusSettings",
    "Mixture",
    "Part",
    "StreamLoader",
    "collate",
    "load_corpus",
    "pack",
    "text_ids",
    "train_tokenizer",
]
