"""Training data of a recipe: rows of a prepared corpus, a streamed mixture, or a task whose documents are generated on the fly."""

import dataclasses
import shutil
from typing import Any

import numpy as np
from datasets import Dataset, disable_progress_bars, load_from_disk
from transformers import AutoTokenizer

from ..checkpoints import load_part
from ..corpus import Corpus, Mixture, Part, StreamLoader, load_corpus, pack, train_tokenizer
from ..corpus.tasks import HELD_OUT, TaskRows, digest_of, is_task, task_of
from ..corpus.tokenizer import document_ids
from ..errors import RecipeError
from ..folder import OutputFolder
from .recipe import Recipe
from .run import Run, has_begun, same_text, save_tokenizer
from .sharding import first_process_first

TOKENIZER_BYTES = 20_000_000  # text of a mixture that its tokenizer is trained on


class TextData:
    """The rows of a run: from a prepared corpus, a streamed mixture, or a task.

    Attributes:
        tokenizer: the run's tokenizer.
        rows: training rows for Trainer's own loader; a placeholder if the source is a mixture.
        validation: rows for losses during training, or None.
        stream: the loader of a mixture, or None.
        digest: hash that identifies the training data.
    """

    def __init__(self, run: Run, recipe: Recipe, corpus: Corpus | None):
        settings = recipe
        if recipe.init_from is not None and recipe.tokenizer is None:
            settings = dataclasses.replace(recipe, tokenizer=recipe.init_from)
        if recipe.mixture:
            self._open_mixture(run, settings)
            return
        if is_task(recipe.source):
            self._open_task(run, settings)
            return
        if corpus is None:
            with first_process_first(run.state):
                corpus = load_corpus(settings.corpus_settings(), console=run.console)
            same_text(corpus.summary, run.output)
        self.stream: StreamLoader | None = None
        self.tokenizer, self.digest = corpus.tokenizer, corpus.summary["digest"]
        self.rows: Any = whole_batches(corpus, recipe)
        self.validation: Any = (
            validation_rows(corpus.validation["text"], corpus.tokenizer, recipe) if recipe.eval_every else None
        )

    def _open_task(self, run: Run, recipe: Recipe) -> None:
        task = task_of(recipe.source)
        self.stream, self.digest = None, digest_of(task)
        same_text({"source": recipe.source, "digest": self.digest}, run.output)
        self.tokenizer = task.tokenizer() if recipe.tokenizer is None else _given_tokenizer(recipe.tokenizer)
        self.rows = TaskRows(task, self.tokenizer, recipe.length, recipe.steps * recipe.batch_size, seed=recipe.seed)
        self.validation = None
        if recipe.eval_every:
            self.validation = TaskRows(task, self.tokenizer, recipe.length * task.longer, recipe.eval_rows, HELD_OUT)

    def _open_mixture(self, run: Run, recipe: Recipe) -> None:
        # Its digest and cursors hold paths as they were spelt when the run began.
        mixture = mixture_of(dataclasses.replace(recipe, mixture=Recipe.load(run.output / "recipe.yaml").mixture))
        rows = (recipe.batch_size, recipe.gradient_accumulation, run.state.process_index, run.state.num_processes)
        StreamLoader(mixture, None, *rows)  # raises if streams and processes do not fit, before anything is prepared
        with first_process_first(run.state):
            self.digest = mixture.digest()
            if run.out is not None:
                same_text({"source": "mixture", "digest": self.digest}, run.output)
                with run.console.status("reading the mixture: tokenizer and validation rows"):
                    self._prepare(recipe, mixture, run.out)
            self.tokenizer = AutoTokenizer.from_pretrained(run.output)
            self.validation = (
                load_from_disk(str(run.output / "validation")).with_format("numpy") if recipe.eval_every else None
            )
        self.stream = StreamLoader(mixture, self.tokenizer, *rows)
        self.rows = Dataset.from_dict(
            {"input_ids": [[0]] * recipe.batch_size}
        )  # Trainer requires a data set; rows come from the stream

    def _prepare(self, recipe: Recipe, mixture: Mixture, out: OutputFolder) -> None:
        if has_begun(out.path):
            return
        if recipe.tokenizer is not None:
            tokenizer = _given_tokenizer(recipe.tokenizer)
        else:
            tokenizer = train_tokenizer(mixture.sample_texts(recipe.max_bytes or TOKENIZER_BYTES), recipe.vocab_size)
        save_tokenizer(tokenizer, out)
        if recipe.eval_every:
            rows = packed_rows(mixture.validation_documents(tokenizer, recipe.eval_rows * recipe.length), recipe)
            if not len(rows):
                raise RecipeError(
                    f"the mixture's held-out documents fill no row of length={recipe.length}: raise validation_share, lower length, "
                    f"or set eval_every: 0."
                )
            shutil.rmtree(out.path / "validation", ignore_errors=True)
            disable_progress_bars()
            rows.save_to_disk(str(out.path / "validation"))


def _given_tokenizer(name: str) -> Any:
    tokenizer = load_part(AutoTokenizer, name, "tokenizer (tokenizer.json)")
    if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
        raise RecipeError(f"tokenizer {name!r} has no bos_token or no eos_token; both mark document borders.")
    return tokenizer


def mixture_of(recipe: Recipe) -> Mixture:
    """Return the mixture that a recipe describes."""
    parts = [Part(recipe.corpus_settings(entry), entry["weight"]) for entry in recipe.mixture]
    return Mixture(parts, recipe.length, recipe.data_streams, recipe.shuffle_documents, recipe.seed)


def whole_batches(corpus: Corpus, recipe: Recipe) -> Dataset:
    """Return the training rows without the last few that do not fill a step, so that every step has all its rows.

    Raises:
        RecipeError: the corpus has fewer rows than one step.
    """
    rows, step = len(corpus.train), recipe.batch_size
    if rows < step:
        raise RecipeError(
            f"the corpus has {rows} rows of length={recipe.length} to train on, but a step takes {step} (batch_size): lower "
            f"batch_size or length, or add text."
        )
    return corpus.train.select(range(rows - rows % step))


def validation_rows(texts: Any, tokenizer: Any, recipe: Recipe) -> Dataset:
    """Return the first validation documents in packed rows, for losses during training."""
    tokens: list[np.ndarray] = []
    wanted = recipe.eval_rows * recipe.length
    for text in texts:
        tokens.append(document_ids(tokenizer, text))
        wanted -= len(tokens[-1])
        if wanted < 0:
            break
    return packed_rows(tokens, recipe)


def packed_rows(tokens: list[np.ndarray], recipe: Recipe) -> Dataset:
    """Return documents [tokens] packed into at most eval_rows rows of `length` tokens."""
    rows = pack(tokens, recipe.length)
    return Dataset.from_dict({name: values[: recipe.eval_rows] for name, values in rows.items()}).with_format("numpy")
