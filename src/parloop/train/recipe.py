"""Recipes: everything that determines a run, one documented field per line, as YAML and as command-line options.

`Recipe` trains a model on text, from scratch or from a checkpoint; `ChatRecipe` fine-tunes a checkpoint on conversations. They
share the fields of the optimiser and of the run. A file with the field `chat` is a ChatRecipe.
"""

import dataclasses
import difflib
import glob
import math
import os
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import yaml
from yaml.reader import ReaderError

from ..corpus import CorpusSettings
from ..corpus.sources import HUB, INSTALLED, STDLIB
from ..corpus.tasks import is_task, task_of
from ..errors import RecipeError
from ..model.configuration import ARCHITECTURE, PLTConfig


def _(default: Any, doc: str) -> Any:
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"doc": doc})
    return field(default=default, metadata={"doc": doc})


@dataclass
class RunSettings:
    """Fields of every run: the optimiser (Adam, with the paper's values but for the learning rate), and how it is run."""

    batch_size: int = _(8, "rows per optimiser step, over all processes")
    gradient_accumulation: int = _(1, "split a step's rows into this many passes, to save memory")
    learning_rate: float = _(3e-3, "peak learning rate")
    min_learning_rate_share: float = _(0.05, "share of the peak at the end of the cosine")
    warmup_share: float = _(0.05, "share of the steps with a linear warm-up")
    adam_beta1: float = _(0.9, "decay of the first moment")
    adam_beta2: float = _(0.95, "decay of the second moment")
    adam_epsilon: float = _(1e-15, "the paper's epsilon")
    weight_decay: float = _(0.1, "decoupled, on matrices only")
    max_grad_norm: float = _(1.0, "gradient clipping")

    seed: int = _(0, "seed of the initial weights and of the data order")
    precision: str = _("auto", "float32, bfloat16, or auto: bfloat16 on GPUs that have it, else float32")
    device: str = _("auto", "auto, cpu or cuda")
    attention: str = _("sdpa", "attention backend: sdpa, eager, flex_attention")
    gradient_checkpointing: str = _(
        "none", "what is recomputed in the backward pass, to save memory: none, layer, loop, or both (layers within loops)"
    )
    gather: str = _(
        "step",
        "with several processes, weights are gathered once per step, or at every visit of a layer: less memory, more traffic",
    )
    replicas: int = _(
        1, "with several processes, copies of the sharded model; the number of nodes keeps gathering inside a node"
    )
    compile: bool = _(False, "torch.compile the model")
    log_every: int = _(10, "steps between two points of the loss curve")
    eval_every: int = _(100, "steps between two validation losses during training; 0: none")
    eval_rows: int = _(64, "rows of these validation losses")
    save_every: int = _(200, "steps between two checkpoints")
    keep_checkpoints: int = _(2, "checkpoints kept; older ones are deleted")

    def __post_init__(self) -> None:
        for f in fields(self):
            setattr(self, f.name, _typed(type(self), f, getattr(self, f.name)))
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise RecipeError(f"{f.name}={value} must be a finite number: {f.metadata['doc']}.")
            if value is None:
                continue
            for allowed, names in BOUNDS.items():
                if f.name in names and not all(ALLOWED[allowed](x) for x in (value if isinstance(value, list) else [value])):
                    raise RecipeError(f"{f.name}={value} must be {allowed}: {f.metadata['doc']}.")
        if self.attention.startswith("flash_attention"):
            raise RecipeError(
                f"attention={self.attention!r} knows document borders only in a single row, but every row of a batch is packed "
                f"with several documents: use sdpa or flex_attention."
            )
        for name, known in CHOICES.items():
            if hasattr(self, name) and getattr(self, name) not in known:
                raise RecipeError(f"{name}={getattr(self, name)!r} is unknown: use one of {', '.join(known)}.")
        if self.batch_size % self.gradient_accumulation:
            raise RecipeError(
                f"gradient_accumulation={self.gradient_accumulation} must divide batch_size={self.batch_size}: it splits the "
                f"rows of a step."
            )

    @classmethod
    def load(cls, path: str | Path, **overrides: Any) -> typing.Self:
        """Read a YAML file, or a shipped recipe by name; `overrides` that are not None win over it.

        Paths in the file are looked for beside it, then where this process runs.

        Raises:
            RecipeError: no such file or shipped recipe, not a mapping, an unknown field, a value of the wrong type.
        """
        path, values = read_recipe(path)
        known = [f.name for f in fields(cls)]
        for name in values:
            if name not in known:
                close = difflib.get_close_matches(str(name), [*known, *RENAMED], n=1)
                guess = RENAMED.get(close[0], close[0]) if close else ""
                hint = f" Did you mean {guess!r}?" if close else f" Known fields: {', '.join(known)}."
                raise RecipeError(f"recipe {str(path)!r} has an unknown field {name!r}.{hint}")
        values = _with_paths(values, lambda given: _beside(given, path.parent))
        return cls(**(values | {name: value for name, value in overrides.items() if value is not None}))

    def save(self, path: str | Path) -> None:
        """Write the recipe as YAML."""
        Path(path).write_text(self.to_yaml(), encoding="utf-8")

    def to_yaml(self) -> str:
        """Return the recipe as YAML, every field in it."""
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False)

    def placed(self) -> typing.Self:
        """Return the recipe with absolute paths, so that it can be read from anywhere."""
        here = _with_paths(
            {f.name: getattr(self, f.name) for f in fields(self)}, lambda given: _found(given, Path()) or given
        )
        return type(self)(**here)


@dataclass
class Recipe(RunSettings):
    """Trains a PLT on text. The learning rate's default is tuned for models of the default size (docs/log.md)."""

    # The corpus
    source: str = _(
        "stdlib",
        "stdlib, installed (packages too), a folder, a glob, a .jsonl or .parquet file, hub:OWNER/NAME, or a task: task:parity, task:s5, task:hops, "
        "task:run, with options behind commas",
    )
    mixture: list[dict] = _(
        [],
        "instead of source, several of them, streamed: each with source and weight (its share of the tokens), and extensions, "
        "text_column or max_file_bytes if they differ",
    )
    extensions: list[str] = _([".py"], "endings of the files to read in a folder; empty: all text files")
    text_column: str = _("text", "column with the text, for tables and Hub data sets")
    tokenizer: str | None = _(
        None, "folder or Hub name of an existing tokenizer; default: train one; of a task, one token for each of its symbols"
    )
    vocab_size: int = _(512, "size of the tokenizer to train, in tokens; of the embedding at least, if a tokenizer is given")
    length: int = _(128, "T, tokens per row")
    validation_share: float = _(0.05, "share of the documents kept for validation")
    max_bytes: int = _(0, "read at most this many bytes of text; 0: all. Of a mixture, for its tokenizer; 0: 20 MB")
    max_file_bytes: int = _(1_000_000, "leave out longer documents")
    shuffle_documents: int = _(
        10_000, "of a mixture, documents of each source that are shuffled at a time, over all streams"
    )
    data_streams: int = _(
        8,
        "of a mixture, number of streams that its documents are split into; processes share them; it must divide batch_size",
    )

    # The model
    init_from: str | None = _(
        None,
        "folder or Hub name of a PLT checkpoint to continue; its shape and scales replace the fields below, and its tokenizer is used unless one is given",
    )
    loops: int | list[int] = _(
        2, "R, how often the stack is run; several, such as [1, 2]: another one of them at every step"
    )
    num_hidden_layers: int = _(3, "L, layers of the stack")
    hidden_size: int = _(128, "D, width of the residual stream")
    num_attention_heads: int = _(4, "H, query heads")
    num_key_value_heads: int = _(2, "G, key/value heads")
    head_dim: int | None = _(None, "K, width of a head; default: hidden_size / num_attention_heads")
    intermediate_size: int = _(384, "width of the feed-forward")
    window_tokens: int = _(32, "w: in loops 2..R a token sees itself and w tokens before it")
    gate: str = _("hidden", "what the gate reads: hidden (the layer's input) or query")
    normalize_per_loop: bool = _(True, "final norm after every loop, not only the last")
    emb_scale: float | None = _(None, "a in a * E + c * shift(h); default: the square root of 1/2")
    hidden_scale: float | None = _(None, "c in a * E + c * shift(h); default: such that both terms start equally large")
    offset: int = _(
        1,
        "s, how many tokens to the left a loop reads the state of the loop before: 1, the paper's; 0: none, a pass per loop",
    )
    branch_scaling: str = _(
        "none",
        "loops: the projections into the residual stream (o_proj, down_proj) start, and learn, smaller by R^(-1/2); the model is the same (docs/log.md)",
    )
    hidden_scale_warmup_share: float = _(
        0.0, "share of the steps over which c grows from 0 to its value: for models that were converted"
    )
    tie_word_embeddings: bool = _(False, "one matrix for embedding and head")
    rope_theta: float = _(10_000.0, "base of the rotary position embedding")
    max_position_embeddings: int | None = _(
        None,
        "longest text that the model is meant for; default: length, of a task whose held-out documents are longer, as many times that",
    )
    initializer_range: float = _(0.05, "standard deviation of the initial weights")

    tokens: int = _(1_000_000, "training tokens; with length and batch_size, this gives the number of steps")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.mixture = [_mixture_entry(entry) for entry in self.mixture]
        if self.mixture and self.source != type(self).source:
            raise RecipeError(
                f"source={self.source!r} beside a mixture: put it among the mixture's entries, or leave one of them out."
            )
        if self.mixture and self.batch_size % self.data_streams:
            raise RecipeError(
                f"data_streams={self.data_streams} must divide batch_size={self.batch_size}: each gives as many rows to a step."
            )
        for entry in self.mixture:
            if is_task(entry["source"]):
                raise RecipeError(
                    f"mixture: {entry['source']!r} is a task, which cannot be part of a mixture: train on it alone, as source."
                )
        if is_task(self.source):
            task_of(self.source)  # raises: there is none, or none with these options
        self.plt_config()  # raises for an impossible shape

    @property
    def loop_counts(self) -> list[int]:
        """The loop counts that are trained."""
        return [self.loops] if isinstance(self.loops, int) else list(self.loops)

    @property
    def num_loops(self) -> int:
        """R, the largest of the trained loop counts."""
        return max(self.loop_counts)

    @property
    def sources(self) -> list[dict[str, Any]]:
        """The sources with their weights: the mixture's entries, or the one source."""
        return self.mixture or [{"source": self.source, "weight": 1.0}]

    @property
    def steps(self) -> int:
        """Number of optimizer steps."""
        return max(1, round(self.tokens / (self.length * self.batch_size)))

    def corpus_settings(self, source: dict | None = None) -> CorpusSettings:
        """Return the settings of the recipe's corpus, or of one source of its mixture."""
        values = {f.name: getattr(self, f.name) for f in fields(CorpusSettings)} | (source or {})
        values.pop("weight", None)
        return CorpusSettings(**(values | {"extensions": tuple(values["extensions"])}))

    def _vocabulary(self, tokenizer: Any) -> int:
        if tokenizer is None:
            return self.vocab_size
        return max(len(tokenizer), self.vocab_size) if self.tokenizer is not None else len(tokenizer)

    def _longest_text(self) -> int:
        return self.length * (task_of(self.source).longer if is_task(self.source) else 1)

    def plt_config(self, tokenizer: Any = None) -> PLTConfig:
        """Return the model's configuration.

        Scales that the recipe leaves open follow from the initialisation: a fresh embedding has root mean square
        `initializer_range`, a normed state has 1, so c = a * initializer_range makes both terms of a * E + c * shift(h)
        equally large at the start, and a = sqrt(1/2) makes their sum as large as E.

        Raises:
            RecipeError: no model has such a shape.
        """
        a = 0.5**0.5 if self.emb_scale is None else self.emb_scale
        c = a * self.initializer_range if self.hidden_scale is None else self.hidden_scale
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise RecipeError(
                f"num_attention_heads={self.num_attention_heads} must divide hidden_size={self.hidden_size}: change one of them, "
                f"or set head_dim."
            )
        try:
            return PLTConfig(
                architectures=[ARCHITECTURE],
                vocab_size=self._vocabulary(tokenizer),
                hidden_size=self.hidden_size,
                intermediate_size=self.intermediate_size,
                num_hidden_layers=self.num_hidden_layers,
                num_attention_heads=self.num_attention_heads,
                num_key_value_heads=self.num_key_value_heads,
                head_dim=self.head_dim or self.hidden_size // self.num_attention_heads,
                max_position_embeddings=self.max_position_embeddings or self._longest_text(),
                initializer_range=self.initializer_range,
                rope_parameters={"rope_type": "default", "rope_theta": self.rope_theta},
                tie_word_embeddings=self.tie_word_embeddings,
                bos_token_id=None if tokenizer is None else tokenizer.bos_token_id,
                eos_token_id=None if tokenizer is None else tokenizer.eos_token_id,
                pad_token_id=None if tokenizer is None else tokenizer.pad_token_id,
                plt_num_loops=self.num_loops,
                plt_trained_loops=None if isinstance(self.loops, int) else self.loop_counts,
                plt_window_size=[self.window_tokens, 0],
                plt_normalize_per_loop=self.normalize_per_loop,
                plt_emb_scale=a,
                plt_offset=self.offset,
                plt_hidden_scale=c,
                plt_gate_use_hidden_states=self.gate == "hidden",
            )
        except RecipeError:
            raise
        except ValueError as error:
            raise RecipeError(str(error)) from error


@dataclass
class ChatRecipe(RunSettings):
    """Fine-tunes a checkpoint on conversations. Only the assistant's tokens enter the loss."""

    model: str = _("", "folder or Hub name of the PLT checkpoint to fine-tune")
    chat: str = _("", "a .jsonl file, or a glob of them: rows with messages, and tools if there are any")
    loops: int | list[int] | None = _(
        None, "loop counts to train, as in pretraining; default: as the checkpoint was trained"
    )
    length: int = _(2048, "T, tokens per row; longer conversations are left out")
    packing: bool = _(True, "several conversations per row, which do not attend to each other")
    max_reasoning_tokens: int = _(0, "tokens of a turn's reasoning beyond which it is long; 0: none is")
    long_reasoning: str = _(
        "drop",
        "drop: a conversation with long reasoning is left out; cut: its first max_reasoning_tokens are kept. Both are counted",
    )
    epochs: float = _(1.0, "how often every conversation is seen")
    validation_share: float = _(0.05, "share of the conversations kept for validation")
    lora_rank: int = _(0, "rank of LoRA adapters; 0: train all weights")
    lora_alpha: float = _(32.0, "their scale: what they add is multiplied by lora_alpha / lora_rank")
    lora_dropout: float = _(0.0, "dropout of their input")
    lora_targets: list[str] = _(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], "layers that get one"
    )

    batch_size: int = _(16, "rows per optimiser step, over all processes")
    learning_rate: float = _(1e-5, "peak learning rate; for LoRA ten to twenty times that")
    weight_decay: float = _(0.0, "decoupled, on matrices only")
    warmup_share: float = _(0.03, "share of the steps with a linear warm-up")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("model", "chat"):
            if not getattr(self, name):
                raise RecipeError(f"{name} is missing: {self.__dataclass_fields__[name].metadata['doc']}.")

    @property
    def loop_counts(self) -> list[int] | None:
        """The loop counts that are trained; None: those of the checkpoint."""
        return [self.loops] if isinstance(self.loops, int) else self.loops


ALLOWED: dict[str, Callable[[float], bool]] = {
    "at least 0": lambda x: x >= 0,
    "at least 1": lambda x: x >= 1,
    "at least 2": lambda x: x >= 2,
    "at least 259 (256 bytes and 3 special tokens)": lambda x: x >= 259,
    "above 0": lambda x: x > 0,
    "from 0 to 1": lambda x: 0 <= x <= 1,
    "at least 0 and below 1": lambda x: 0 <= x < 1,
    "above 0 and below 1": lambda x: 0 < x < 1,
    "from 0 to 4294967295": lambda x: 0 <= x < 2**32,  # what numpy takes
}
BOUNDS = {
    "at least 2": ("length",),  # in a row of one token nothing is predicted
    "at least 1": (
        "max_file_bytes", "loops", "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads",
        "head_dim", "intermediate_size", "max_position_embeddings", "tokens", "batch_size", "gradient_accumulation", "log_every",
        "eval_rows", "save_every", "keep_checkpoints", "replicas", "shuffle_documents", "data_streams",
    ),
    "at least 0": ("max_reasoning_tokens", "offset", "max_bytes", "weight_decay", "eval_every", "lora_rank"),
    "at least 259 (256 bytes and 3 special tokens)": ("vocab_size",),
    "above 0": (
        "rope_theta", "initializer_range", "learning_rate", "adam_epsilon", "max_grad_norm", "lora_alpha", "epochs",
    ),
    "from 0 to 1": ("min_learning_rate_share", "warmup_share", "hidden_scale_warmup_share"),
    "at least 0 and below 1": ("adam_beta1", "adam_beta2", "lora_dropout"),
    "above 0 and below 1": ("validation_share",),
    "from 0 to 4294967295": ("seed",),
}  # fmt: skip
CHOICES = {
    "attention": ("sdpa", "eager", "flex_attention"),
    "branch_scaling": ("none", "loops"),
    "gate": ("hidden", "query"),
    "long_reasoning": ("drop", "cut"),
    "precision": ("auto", "float32", "bfloat16"),
    "device": ("auto", "cpu", "cuda"),
    "gradient_checkpointing": ("none", "layer", "loop", "both"),
    "gather": ("step", "visit"),
}
RENAMED = {"num_loops": "loops"}  # the configuration's name for the same
OF_A_SOURCE = ("source", "weight", "extensions", "text_column", "max_file_bytes")


def load_recipe(path: str | Path, **overrides: Any) -> Recipe | ChatRecipe:
    """Read a recipe of either kind: a ChatRecipe if the file or the overrides have the field `chat`, otherwise a Recipe.

    Raises:
        RecipeError: as RunSettings.load; also if this kind of recipe has no field for an override.
    """
    kind = ChatRecipe if "chat" in read_recipe(path)[1] or overrides.get("chat") else Recipe
    known = {f.name for f in fields(kind)}
    for name, value in overrides.items():
        if value is not None and name not in known:
            what = "fine-tunes on conversations" if kind is ChatRecipe else "trains on text"
            raise RecipeError(
                f"--{name.replace('_', '-')} says nothing to recipe {str(path)!r}, which {what}: leave it out."
            )
    return kind.load(path, **{name: value for name, value in overrides.items() if name in known})


def read_recipe(path: str | Path) -> tuple[Path, dict[str, Any]]:
    """Return the file of a recipe and its fields. `path` is a file or the name of a shipped recipe.

    Raises:
        RecipeError: no such file or shipped recipe, or not a mapping.
    """
    shipped, file = shipped_recipes(), Path(path)
    found: Traversable = file if file.is_file() else shipped.get(str(path), file)
    if not found.is_file():
        raise RecipeError(f"recipe {str(path)!r} is neither a file nor one of the shipped recipes ({', '.join(shipped)}).")
    try:
        values = yaml.safe_load(found.read_bytes()) or {}  # from bytes, YAML detects UTF-8 or UTF-16
    except RecursionError as error:
        raise RecipeError(f"recipe {str(found)!r} is nested too deeply.") from error
    except ReaderError as error:
        kind = "text" if error.encoding == "unicode" else error.encoding.upper()
        raise RecipeError(
            f"recipe {str(found)!r} is not {kind} ({error.reason}, position {error.position}): save it as UTF-8."
        ) from error
    except (yaml.YAMLError, ValueError, LookupError, AttributeError) as error:  # the last three: values such as 2020-99-01
        raise RecipeError(f"recipe {str(found)!r} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"recipe {str(found)!r} must be a mapping of fields to values.")
    return Path(str(found)), values


def shipped_recipes() -> dict[str, Traversable]:
    """Return the recipes that come with parloop, by name."""
    folder = files("parloop") / "recipes"
    recipes = {file.name.removesuffix(".yaml"): file for file in folder.iterdir() if file.name.endswith(".yaml")}
    return dict(sorted(recipes.items()))


PATHS = ("source", "tokenizer", "init_from", "model", "chat")  # fields that may name a file, a folder or a glob


def _with_paths(values: dict[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """Return the fields with `change` applied to every path among them, also in a mixture's entries."""
    changed = {name: change(value) if name in PATHS and isinstance(value, str) else value for name, value in values.items()}
    if isinstance(mixture := values.get("mixture"), list):
        changed["mixture"] = [_with_paths(entry, change) if isinstance(entry, dict) else entry for entry in mixture]
    return changed


def _beside(given: str, folder: Path) -> str:
    """Resolve a path relative to a folder; return it unchanged if nothing is there, or if it means the same from the current
    folder."""
    found = _found(given, folder)
    return given if found is None or found == _found(given, Path()) else found


def _found(given: str, folder: Path) -> str | None:
    """Return the absolute path of an existing file, folder or glob, relative to `folder`; None if nothing is there or it is
    no path."""
    if not given or given in (STDLIB, INSTALLED) or given.startswith(HUB) or is_task(given):
        return None
    try:
        path = folder / os.path.expanduser(given)
        there = path.exists() or (glob.has_magic(given) and next(glob.iglob(str(path), recursive=True), None) is not None)
    except (OSError, ValueError, RuntimeError):  # not a valid file name, or the home of an unknown user
        return None
    return os.path.abspath(path) if there else None


def _mixture_entry(entry: Any) -> dict[str, Any]:
    if not isinstance(entry, dict) or "source" not in entry or "weight" not in entry or entry.keys() - set(OF_A_SOURCE):
        raise RecipeError(
            f"mixture has the entry {entry!r}: each needs source and weight, and may have {', '.join(OF_A_SOURCE[2:])}."
        )
    try:
        weight = float(entry["weight"])
    except (TypeError, ValueError, OverflowError):
        weight = math.nan
    if not (math.isfinite(weight) and weight > 0):
        raise RecipeError(
            f"mixture: weight={entry['weight']!r} of {entry['source']!r} must be a number above 0: its share of the tokens."
        )
    kinds = {"source": str, "text_column": str, "extensions": list, "max_file_bytes": int}
    for name, kind in kinds.items():
        if name in entry and not isinstance(entry[name], kind):
            raise RecipeError(f"mixture: {name}={entry[name]!r} of {entry['source']!r} must be of type {kind.__name__}.")
    if not all(isinstance(ending, str) for ending in entry.get("extensions", ())):
        raise RecipeError(f"mixture: extensions={entry['extensions']!r} of {entry['source']!r} must be endings of files.")
    if entry.get("max_file_bytes", 1) < 1:
        raise RecipeError(f"mixture: max_file_bytes={entry['max_file_bytes']} of {entry['source']!r} must be at least 1.")
    return entry | {"weight": weight}


def _typed(cls: type, f: dataclasses.Field, value: Any) -> Any:
    """Convert a value to its field's type. (YAML reads 1e-3 and 1e6 as text, for example.)"""
    hint = typing.get_type_hints(cls)[f.name]
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for kind in kinds:
        try:
            return _as(kind, value)
        except (TypeError, ValueError, OverflowError):
            continue
    names = " or ".join(getattr(kind, "__name__", str(kind)) for kind in kinds if kind is not types.NoneType)
    raise RecipeError(f"{f.name}={value!r} must be of type {names}: {f.metadata['doc']}.")


def _as(kind: Any, value: Any) -> Any:
    origin = typing.get_origin(kind) or kind
    if origin is types.NoneType and value is None:
        return None
    if origin is list and isinstance(value, (list, tuple)) and not (kind == list[int] and not value):
        return [_as(typing.get_args(kind)[0], item) for item in value]
    if origin is dict and isinstance(value, dict):
        return value
    if origin is bool and isinstance(value, bool):
        return value
    if origin is int and not isinstance(value, bool) and float(value) == int(float(value)):
        return int(float(value))
    if origin is float and not isinstance(value, bool):
        return float(value)
    if origin is str and isinstance(value, str):
        return value
    raise TypeError
