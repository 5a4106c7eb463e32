"""A recipe: everything that determines a training run, one documented field per line, as YAML and as command-line options."""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from ..corpus import CorpusSettings
from ..errors import RecipeError
from ..model.configuration import PLTConfig


def _(default: Any, doc: str) -> Any:
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"doc": doc})
    return field(default=default, metadata={"doc": doc})


@dataclass
class Recipe:
    """Pretraining of a PLT from scratch. The optimiser's defaults are the paper's, but for the learning rate, which is
    tuned for models of this size (docs/log.md)."""

    # The corpus
    source: str = _(
        "stdlib", "stdlib, installed (packages too), a folder, a glob, a .jsonl or .parquet file, or hub:OWNER/NAME"
    )
    extensions: list[str] = _([".py"], "endings of the files to read in a folder; empty: all text files")
    text_column: str = _("text", "column with the text, for tables and Hub data sets")
    tokenizer: str | None = _(None, "folder or Hub name of an existing tokenizer; default: train one")
    vocab_size: int = _(512, "size of the tokenizer to train, in tokens")
    length: int = _(128, "T, tokens per row")
    validation_share: float = _(0.05, "share of the documents kept for validation")
    max_bytes: int = _(0, "read at most this many bytes of text; 0: all")
    max_file_bytes: int = _(1_000_000, "leave out longer documents")

    # The model
    num_loops: int = _(2, "R, how often the stack is run")
    num_hidden_layers: int = _(3, "L, layers of the stack")
    hidden_size: int = _(128, "D, width of the residual stream")
    num_attention_heads: int = _(4, "H, query heads")
    num_key_value_heads: int = _(2, "G, key/value heads")
    intermediate_size: int = _(384, "width of the feed-forward")
    window_tokens: int = _(32, "w: in loops 2..R a token sees itself and w tokens before it")
    gate: str = _("hidden", "what the gate reads: hidden (the layer's input) or query")
    normalize_per_loop: bool = _(True, "final norm after every loop, not only the last")
    emb_scale: float | None = _(None, "a in a * E + c * shift(h); default: the square root of 1/2")
    hidden_scale: float | None = _(None, "c in a * E + c * shift(h); default: such that both terms start equally large")
    tie_word_embeddings: bool = _(False, "one matrix for embedding and head")
    rope_theta: float = _(10_000.0, "base of the rotary position embedding")
    initializer_range: float = _(0.05, "standard deviation of the initial weights")

    # The optimiser (Adam)
    tokens: int = _(1_000_000, "training tokens; with length and batch_size, this gives the number of steps")
    batch_size: int = _(8, "rows per optimiser step and process")
    gradient_accumulation: int = _(1, "split a step's rows into this many passes, to save memory")
    learning_rate: float = _(3e-3, "peak learning rate")
    min_learning_rate_share: float = _(0.05, "share of the peak at the end of the cosine")
    warmup_share: float = _(0.05, "share of the steps with a linear warm-up")
    adam_beta1: float = _(0.9, "decay of the first moment")
    adam_beta2: float = _(0.95, "decay of the second moment")
    adam_epsilon: float = _(1e-15, "the paper's epsilon")
    weight_decay: float = _(0.1, "decoupled, on matrices only")
    max_grad_norm: float = _(1.0, "gradient clipping")

    # The run
    seed: int = _(0, "seed of the initial weights and of the data order")
    precision: str = _("auto", "float32, bfloat16, or auto: bfloat16 on GPUs that have it, else float32")
    device: str = _("auto", "auto, cpu or cuda")
    attention: str = _("sdpa", "attention backend: sdpa, eager, flex_attention")
    gradient_checkpointing: bool = _(False, "recompute layers in the backward pass, to save memory")
    compile: bool = _(False, "torch.compile the model")
    log_every: int = _(10, "steps between two points of the loss curve")
    eval_every: int = _(100, "steps between two validation losses during training; 0: none")
    eval_rows: int = _(64, "rows of these validation losses")
    save_every: int = _(200, "steps between two checkpoints")
    keep_checkpoints: int = _(2, "checkpoints kept; older ones are deleted")

    def __post_init__(self) -> None:
        for f in fields(self):
            setattr(self, f.name, _typed(f, getattr(self, f.name)))
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise RecipeError(f"{f.name}={value} must be a finite number: {f.metadata['doc']}.")
            for allowed, names in BOUNDS.items():
                if f.name in names and not ALLOWED[allowed](value):
                    raise RecipeError(f"{f.name}={value} must be {allowed}: {f.metadata['doc']}.")
        if self.attention.startswith("flash_attention"):
            raise RecipeError(
                f"attention={self.attention!r} is told document borders only for a single row, and the rows of a batch are packed "
                f"with several documents: use sdpa or flex_attention."
            )
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise RecipeError(f"{name}={getattr(self, name)!r} is unknown: use one of {', '.join(known)}.")
        if self.batch_size % self.gradient_accumulation:
            raise RecipeError(
                f"gradient_accumulation={self.gradient_accumulation} must divide batch_size={self.batch_size}: it splits the "
                f"rows of a step."
            )
        self.plt_config()  # raises for an impossible shape

    @property
    def steps(self) -> int:
        return max(1, round(self.tokens / (self.length * self.batch_size)))

    def corpus_settings(self) -> CorpusSettings:
        values = {f.name: getattr(self, f.name) for f in fields(CorpusSettings)}
        return CorpusSettings(**(values | {"extensions": tuple(self.extensions)}))

    def plt_config(self, tokenizer: Any = None) -> PLTConfig:
        """The model's configuration. Scales that the recipe leaves open follow from the initialisation: a fresh embedding
        has root mean square `initializer_range`, a normed state has 1, so c = a * initializer_range makes both terms of
        a * E + c * shift(h) equally large at the start, and a = sqrt(1/2) makes their sum as large as E."""
        a = 0.5**0.5 if self.emb_scale is None else self.emb_scale
        c = a * self.initializer_range if self.hidden_scale is None else self.hidden_scale
        if self.hidden_size % self.num_attention_heads:
            raise RecipeError(
                f"num_attention_heads={self.num_attention_heads} must divide hidden_size={self.hidden_size}: change one of them."
            )
        try:
            return PLTConfig(
                vocab_size=self.vocab_size if tokenizer is None else len(tokenizer),
                hidden_size=self.hidden_size,
                intermediate_size=self.intermediate_size,
                num_hidden_layers=self.num_hidden_layers,
                num_attention_heads=self.num_attention_heads,
                num_key_value_heads=self.num_key_value_heads,
                head_dim=self.hidden_size // self.num_attention_heads,
                max_position_embeddings=self.length,
                initializer_range=self.initializer_range,
                rope_parameters={"rope_type": "default", "rope_theta": self.rope_theta},
                tie_word_embeddings=self.tie_word_embeddings,
                bos_token_id=None if tokenizer is None else tokenizer.bos_token_id,
                eos_token_id=None if tokenizer is None else tokenizer.eos_token_id,
                pad_token_id=None if tokenizer is None else tokenizer.pad_token_id,
                plt_num_loops=self.num_loops,
                plt_window_size=[self.window_tokens, 0],
                plt_normalize_per_loop=self.normalize_per_loop,
                plt_emb_scale=a,
                plt_hidden_scale=c,
                plt_gate_use_hidden_states=self.gate == "hidden",
            )
        except RecipeError:
            raise
        except ValueError as error:
            raise RecipeError(str(error)) from error

    @classmethod
    def load(cls, path: str | Path, **overrides: Any) -> "Recipe":
        """Read a YAML file, or a shipped recipe by name; `overrides` that are not None win over it.

        Raises:
            RecipeError: no such file or shipped recipe, not a mapping, an unknown field, a value of the wrong type.
        """
        given, path = str(path), Path(path)
        if not path.is_file() and given in shipped_recipes():
            path = shipped_recipes()[given]
        if not path.is_file():
            names = ", ".join(shipped_recipes())
            raise RecipeError(f"recipe {given!r} is neither a file nor one of the shipped recipes ({names}).")
        try:
            values = yaml.safe_load(path.read_text()) or {}
        except yaml.YAMLError as error:
            raise RecipeError(f"recipe {str(path)!r} is not valid YAML: {error}") from error
        if not isinstance(values, dict):
            raise RecipeError(f"recipe {str(path)!r} must be a mapping of fields to values.")
        known = [f.name for f in fields(cls)]
        for name in values:
            if name not in known:
                close = difflib.get_close_matches(str(name), known, n=1)
                hint = f" Did you mean {close[0]!r}?" if close else f" Known fields: {', '.join(known)}."
                raise RecipeError(f"recipe {str(path)!r} has an unknown field {name!r}.{hint}")
        return cls(**(values | {name: value for name, value in overrides.items() if value is not None}))

    def save(self, path: str | Path) -> None:
        Path(path).write_text(yaml.safe_dump(dataclasses.asdict(self), sort_keys=False))


ALLOWED: dict[str, Callable[[float], bool]] = {
    "at least 0": lambda x: x >= 0,
    "at least 1": lambda x: x >= 1,
    "at least 259 (256 bytes and 3 special tokens)": lambda x: x >= 259,
    "above 0": lambda x: x > 0,
    "from 0 to 1": lambda x: 0 <= x <= 1,
    "at least 0 and below 1": lambda x: 0 <= x < 1,
    "above 0 and below 1": lambda x: 0 < x < 1,
    "from 0 to 4294967295": lambda x: 0 <= x < 2**32,  # what numpy takes
}
BOUNDS = {
    "at least 1": (
        "length", "max_file_bytes", "num_loops", "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads",
        "intermediate_size", "tokens", "batch_size", "gradient_accumulation", "log_every", "eval_rows", "save_every",
        "keep_checkpoints",
    ),
    "at least 0": ("max_bytes", "weight_decay", "eval_every"),
    "at least 259 (256 bytes and 3 special tokens)": ("vocab_size",),
    "above 0": ("rope_theta", "initializer_range", "learning_rate", "adam_epsilon", "max_grad_norm"),
    "from 0 to 1": ("min_learning_rate_share", "warmup_share"),
    "at least 0 and below 1": ("adam_beta1", "adam_beta2"),
    "above 0 and below 1": ("validation_share",),
    "from 0 to 4294967295": ("seed",),
}  # fmt: skip
CHOICES = {
    "attention": ("sdpa", "eager", "flex_attention"),
    "gate": ("hidden", "query"),
    "precision": ("auto", "float32", "bfloat16"),
    "device": ("auto", "cpu", "cuda"),
}


def shipped_recipes() -> dict[str, Path]:
    """Name -> file of the recipes that come with parloop: `recipes/` of the repository, `parloop/recipes` of a wheel."""
    package = Path(__file__).parents[1]
    folder = next(f for f in (package / "recipes", package.parents[1] / "recipes") if f.is_dir())
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def _typed(f: dataclasses.Field, value: Any) -> Any:
    """The value in the field's type. (YAML reads 1e-3 and 1e6 as text, for one.)"""
    kind = typing.get_type_hints(Recipe)[f.name] if isinstance(f.type, str) else f.type
    optional = isinstance(kind, types.UnionType)
    if optional and value is None:
        return None
    kind = next(t for t in typing.get_args(kind) if t is not type(None)) if optional else kind
    origin = typing.get_origin(kind) or kind
    try:
        if origin is list and isinstance(value, (list, tuple)):
            return [str(item) for item in value]
        if origin is bool and isinstance(value, bool):
            return value
        if origin is int and not isinstance(value, bool) and float(value) == int(float(value)):
            return int(float(value))
        if origin is float and not isinstance(value, bool):
            return float(value)
        if origin is str and isinstance(value, str):
            return value
    except (TypeError, ValueError, OverflowError):
        pass
    raise RecipeError(f"{f.name}={value!r} must be of type {getattr(origin, '__name__', origin)}: {f.metadata['doc']}.")
