from .corpus import Corpus, CorpusSettings, load_corpus
from .packing import collate, pack
from .tokenizer import text_ids, train_tokenizer

__all__ = ["Corpus", "CorpusSettings", "collate", "load_corpus", "pack", "text_ids", "train_tokenizer"]
