"""Training on text: a recipe drives transformers' Trainer, in one process or in as many as a launcher starts.

A run's folder holds recipe.yaml, corpus.json (which documents), tokenizer and, of a mixture, validation rows; checkpoint-N folders
while it runs; and in the end the model and training.json. Running the same recipe again, on any number of processes, continues an
interrupted run from its last whole checkpoint, with the same data order and random numbers, and leaves a finished one alone.
"""

import contextlib
import dataclasses
import glob
import itertools
import json
import math
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset, disable_progress_bars, load_from_disk
from rich.console import Console
from torch import nn
from transformers import AutoTokenizer, TrainingArguments
from transformers.trainer_callback import TrainerState

from ..corpus import Corpus, Mixture, Part, StreamLoader, collate, load_corpus, pack, train_tokenizer
from ..corpus.stream import places_in, what_was_read
from ..corpus.tasks import HELD_OUT, TaskRows, digest_of, is_task, task_of
from ..corpus.tokenizer import document_ids
from ..errors import OutputError, RecipeError
from ..folder import Kind, OutputFolder, check_room, claimed, delete, disk_errors
from ..generate import load_config, load_model, load_part, local_folder
from ..model.configuration import PLTConfig
from ..model.modeling import PLTForCausalLM
from ..record import write_json
from .checkpoint import STATE, checkpoints_of, last_whole_checkpoint, load_base, load_weights, save_model, step_of
from .recipe import ChatRecipe, Recipe, RunSettings
from .sharding import agreed, empty_model, fill, first_process_first, start_processes
from .task_accuracy import task_accuracy
from .trainer import (
    BarCallback,
    Clock,
    HiddenScaleWarmup,
    KeepCheckpoints,
    PLTTrainer,
    StepCallback,
    quiet_libraries,
    training_arguments,
)

MODEL_DONE = "training.json"  # written last: the run is finished
TRAINED_ON = "corpus.json"  # the digest of what is trained on, written when training begins
RUN = Kind(
    "a run",
    files=r"recipe\.yaml|tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json|chat_template\.jinja",
    made=r"corpus\.json|training\.json|config\.json|generation_config\.json|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|"
    r"checkpoint-\d+|runs|adapter|validation|conversations|stream-\d+\.json|diagnosis\.json|evaluation-\d+\.npz|.*\.partial(\.npz)?",
    known=lambda folder: (folder / "recipe.yaml").is_file() and _has_begun(folder),
    over=False,  # what is edited in a run that goes on stays as it is
)
LEFT_OVER = "left-over.partial"  # names of what a finished run has still to delete
GOES_ON = "it goes on from its last whole checkpoint"
TOKENIZER_BYTES = 20_000_000  # of a mixture, to train a tokenizer on
FREE_TO_CHANGE = {  # do not change what is trained
    "device", "log_every", "save_every", "keep_checkpoints", "compile", "gradient_checkpointing", "gradient_accumulation", "gather",
    "replicas",
}  # fmt: skip


def build_model(recipe: Recipe, tokenizer: Any = None, state: PartialState | None = None) -> PLTForCausalLM:
    """A model to train: new, or the checkpoint that the recipe goes on from. On several processes, sharded.

    Raises:
        RecipeError: the checkpoint has another loop count than the recipe.
        CheckpointError: it cannot be read.
    """
    config = recipe.plt_config(tokenizer) if recipe.init_from is None else _config_to_go_on_from(recipe, tokenizer)
    config._attn_implementation = recipe.attention
    model = empty_model(config, recipe, state or PartialState(cpu=True))
    if recipe.init_from is None:
        fill(model, initial_weights(model, recipe.seed))
    else:
        load_base(model, local_folder(recipe.init_from))
    model.model.checkpoint_loops = recipe.gradient_checkpointing in ("loop", "both")
    return model.train()


def _config_to_go_on_from(recipe: Recipe, tokenizer: Any) -> PLTConfig:
    config = load_config(str(recipe.init_from))
    if tokenizer is not None and len(tokenizer) > config.vocab_size:
        raise RecipeError(
            f"tokenizer {recipe.tokenizer or recipe.init_from!r} has {len(tokenizer)} tokens, and the embedding of {recipe.init_from!r} "
            f"{config.vocab_size} rows: leave tokenizer out to use the checkpoint's own."
        )
    if config.plt_num_loops != recipe.num_loops:
        raise RecipeError(
            f"init_from={recipe.init_from!r} has {config.plt_num_loops} loops and the recipe {recipe.loops}: set "
            f"loops: {config.plt_num_loops}, or several up to it. To give a model of one loop more, parloop convert it first."
        )
    config.plt_trained_loops = None if isinstance(recipe.loops, int) else recipe.loop_counts
    config.dtype = torch.float32
    if recipe.length > config.max_position_embeddings:
        raise RecipeError(
            f"length={recipe.length} is more than the {config.max_position_embeddings} tokens that {recipe.init_from!r} was made for."
        )
    return config


def initial_weights(model: PLTForCausalLM, seed: int):
    """The name and value of every weight of a new model.

    Normal weights of standard deviation `initializer_range`; the projections into the residual stream smaller by
    (2 * L * R)^(-1/2), since the stream receives two of them per visit of a layer and there are L * R visits; norms one, gates
    zero. The random numbers depend on the seed alone, so models of different loop counts start from the same draws.
    """
    config = model.config
    generator = torch.Generator().manual_seed(seed)
    visits = config.num_hidden_layers * config.plt_num_loops
    random = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Embedding)) and not (config.tie_word_embeddings and "lm_head" in name)
    }
    for name, parameter in model.named_parameters():
        value = torch.zeros(parameter.shape)
        if name in random:
            value.normal_(0.0, config.initializer_range, generator=generator)
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                value *= (2 * visits) ** -0.5
        elif "norm" in name.rsplit(".", 2)[-2]:
            value.fill_(1.0)
        yield name, value


def train(
    recipe: Recipe,
    output: str | Path,
    *,
    corpus: Corpus | None = None,
    console: Console | None = None,
    on_step: Callable[[int, float], None] | None = None,
    fresh: bool = False,
) -> dict[str, Any]:
    """Run a recipe into a folder, or continue it there. On several processes, all of them call it.

    Args:
        corpus: the prepared corpus, if it is at hand; else it is loaded or made.
        on_step: called after every step with its number and loss; default: a progress bar on `console`.
        fresh: delete what is in the folder and start over.

    Returns:
        what training.json holds: steps, tokens, seconds, tokens per second, the loss curve; of a mixture, what was read of each source; of a
        task, the answers to held-out questions.

    Raises:
        RecipeError: the folder holds a run of another recipe or on other text, or what is read; there is no such device; the corpus
            is too small for a step; a step cannot be divided among the processes.
        OutputError: the folder cannot be written, holds something else than a run, or another command works in it.
        CheckpointError: the checkpoint to go on from cannot be read.
        TrainingDivergedError: the loss is not a number, or far above its start.
    """
    output = Path(output)
    if recipe.init_from is not None:
        load_config(recipe.init_from)  # raises: it is not there
    state = start_processes(recipe)
    console = console or Console(stderr=True, quiet=not state.is_main_process)
    with opened_run(recipe, output, state, fresh, corpus) as out:
        if (output / MODEL_DONE).exists():
            return finished(output, state.is_main_process)
        return _train(recipe, output, out, state, console, corpus, on_step)


def _train(
    recipe: Recipe,
    output: Path,
    out: OutputFolder | None,
    state: PartialState,
    console: Console,
    corpus: Corpus | None,
    on_step: Callable[[int, float], None] | None,
) -> dict[str, Any]:
    """Train from where the run in the folder is. The first process has it claimed, as `out`."""
    data = _Data(recipe, output, out, state, console, corpus)
    if out is not None:
        save_tokenizer(data.tokenizer, out)
    model = build_model(recipe, data.tokenizer, state)
    if out is not None:
        check_room(output, bytes_to_come(model, recipe, recipe.steps, output), "training")
    arguments = training_arguments(
        recipe, output, recipe.steps, state.num_processes, ignore_data_skip=data.stream is not None
    )
    trainer = PLTTrainer(
        model=model,
        args=TrainingArguments(**arguments),
        train_dataset=data.rows,
        eval_dataset=data.validation,
        data_collator=collate,
        processing_class=data.tokenizer,
    )
    trainer.loop_counts = recipe.loop_counts if len(recipe.loop_counts) > 1 else None
    trainer.stream = data.stream
    if recipe.hidden_scale_warmup_share and recipe.num_loops > 1:
        steps = max(1, round(recipe.hidden_scale_warmup_share * recipe.steps))
        trainer.add_callback(HiddenScaleWarmup(model.config, steps))
    label = f"{output.name}: R = {' or '.join(map(str, recipe.loop_counts))}"
    run(trainer, recipe, output, recipe.steps, label, console, on_step, {"digest": data.digest})

    save_model(model, output)
    main = out is not None
    result = {
        "steps": recipe.steps,
        "tokens": recipe.steps * recipe.batch_size * recipe.length,
        "processes": state.num_processes,
        "parameters": sum(p.numel() for p in model.parameters()),
    } | curves(trainer, recipe.batch_size * recipe.length)
    if data.stream is not None:
        data.stream.save(output)
        state.wait_for_everyone()
    if main and is_task(recipe.source):
        saved = load_model(output, recipe.device)
        answers = task_accuracy(saved, task_of(recipe.source), tokenizer=data.tokenizer)
        kept: dict[str, Any] = answers.arrays()
        np.savez_compressed(output / f"evaluation-{len(answers.correct)}.npz", **kept)
        result["answers"] = answers.summary()
    if main:
        if data.stream is not None:
            result["data"] = what_was_read(output)
        close_run(output, result)
    state.wait_for_everyone()
    return result


def run(
    trainer: Any,
    settings: RunSettings,
    output: Path,
    steps: int,
    label: str,
    console: Console,
    on_step: Callable[[int, float], None] | None,
    trained_on: dict[str, Any],
) -> None:
    """Train, from the last whole checkpoint if there is one."""
    main = trainer.is_world_process_zero()
    checkpoint = agreed(last_whole_checkpoint(output) if main else None)
    trainer.clock = Clock(checkpoint)
    trainer.add_callback(trainer.clock)
    trainer.add_callback(KeepCheckpoints(settings.keep_checkpoints))
    bar = None
    if on_step is not None:
        trainer.add_callback(StepCallback(on_step))
    elif main:
        from ..report.terminal import progress_bars

        bar = progress_bars(console)
        trainer.add_callback(BarCallback(bar, label, steps))

    if checkpoint is not None:
        console.print(f"continuing {output} from {checkpoint.name}", highlight=False, markup=False)
        if trainer.stream is not None:
            trainer.stream.restore(checkpoint)
    elif main:
        write_json(output / TRAINED_ON, trained_on)
    if checkpoint is not None and step_of(checkpoint) >= steps:
        # Killed after its last checkpoint: nothing is left to train, but Trainer would do one more step.
        load_weights(trainer.model, checkpoint)
        trainer.state = TrainerState.load_from_json(str(checkpoint / STATE))
    else:
        with warnings.catch_warnings(), bar or contextlib.nullcontext():
            quiet_libraries()
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))


def curves(trainer: Any, step_tokens: int) -> dict[str, Any]:
    """Times and losses of a run, as training.json keeps them."""
    history = trainer.state.log_history
    return {
        "seconds": trainer.clock.seconds,
        "tokens_per_second": step_tokens / (trainer.clock.step_seconds() or math.inf),
        "loss_curve": [[log["step"], log["loss"]] for log in history if "loss" in log],
        "validation_curve": [[log["step"], log["eval_loss"]] for log in history if "eval_loss" in log],
    }


class _Data:
    """What a run trains on: a prepared corpus, or a mixture that is streamed.

    Attributes:
        tokenizer, validation, digest.
        rows: the corpus's, for Trainer's own loader; of a mixture a stand-in.
        stream: the loader of a mixture, or None.
    """

    def __init__(
        self,
        recipe: Recipe,
        output: Path,
        out: OutputFolder | None,
        state: PartialState,
        console: Console,
        corpus: Corpus | None,
    ):
        settings = recipe
        if recipe.init_from is not None and recipe.tokenizer is None:
            settings = dataclasses.replace(recipe, tokenizer=recipe.init_from)
        if recipe.mixture:
            self._open_mixture(settings, output, out, state, console)
            return
        if is_task(recipe.source):
            self._open_task(settings, output)
            return
        if corpus is None:
            with first_process_first(state):
                corpus = load_corpus(settings.corpus_settings(), console=console)
            _same_text(corpus.summary, output)
        self.stream: StreamLoader | None = None
        self.tokenizer, self.digest = corpus.tokenizer, corpus.summary["digest"]
        self.rows = whole_batches(corpus, recipe)
        self.validation = validation_rows(corpus.validation["text"], corpus.tokenizer, recipe) if recipe.eval_every else None

    def _open_task(self, recipe: Recipe, output: Path) -> None:
        task = task_of(recipe.source)
        self.stream, self.digest = None, digest_of(task)
        _same_text({"source": recipe.source, "digest": self.digest}, output)
        self.tokenizer = task.tokenizer() if recipe.tokenizer is None else _given_tokenizer(recipe.tokenizer)
        self.rows = TaskRows(task, self.tokenizer, recipe.length, recipe.steps * recipe.batch_size, seed=recipe.seed)
        self.validation = None
        if recipe.eval_every:
            self.validation = TaskRows(task, self.tokenizer, recipe.length * task.longer, recipe.eval_rows, HELD_OUT)

    def _open_mixture(
        self, recipe: Recipe, output: Path, out: OutputFolder | None, state: PartialState, console: Console
    ) -> None:
        # Its digest and places have paths as they were spelt when the run began.
        mixture = mixture_of(dataclasses.replace(recipe, mixture=Recipe.load(output / "recipe.yaml").mixture))
        rows = (recipe.batch_size, recipe.gradient_accumulation, state.process_index, state.num_processes)
        StreamLoader(mixture, None, *rows)  # whether streams and processes fit, before anything is prepared
        with first_process_first(state):
            self.digest = mixture.digest()
            if out is not None:
                _same_text({"source": "mixture", "digest": self.digest}, output)
                with console.status("reading the mixture: tokenizer and validation rows"):
                    self._prepare(recipe, mixture, out)
            self.tokenizer = AutoTokenizer.from_pretrained(output)
            self.validation = load_from_disk(str(output / "validation")).with_format("numpy") if recipe.eval_every else None
        self.stream = StreamLoader(mixture, self.tokenizer, *rows)
        self.rows = Dataset.from_dict({"input_ids": [[0]] * recipe.batch_size})  # Trainer asks for one; ours is the stream

    def _prepare(self, recipe: Recipe, mixture: Mixture, out: OutputFolder) -> None:
        if _has_begun(out.path):
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
    """The mixture that a recipe describes."""
    parts = [Part(recipe.corpus_settings(entry), entry["weight"]) for entry in recipe.mixture]
    return Mixture(parts, recipe.length, recipe.data_streams, recipe.shuffle_documents, recipe.seed)


def whole_batches(corpus: Corpus, recipe: Recipe) -> Dataset:
    """The training rows without the last few that fill no step, so that every step of every epoch has all its rows."""
    rows, step = len(corpus.train), recipe.batch_size
    if rows < step:
        raise RecipeError(
            f"the corpus has {rows} rows of length={recipe.length} to train on, but a step takes {step} (batch_size): lower "
            f"batch_size or length, or add text."
        )
    return corpus.train.select(range(rows - rows % step))


def validation_rows(texts: Any, tokenizer: Any, recipe: Recipe) -> Dataset:
    """The first validation documents, packed, for losses during training."""
    tokens: list[np.ndarray] = []
    wanted = recipe.eval_rows * recipe.length
    for text in texts:
        tokens.append(document_ids(tokenizer, text))
        wanted -= len(tokens[-1])
        if wanted < 0:
            break
    return packed_rows(tokens, recipe)


def packed_rows(tokens: list[np.ndarray], recipe: Recipe) -> Dataset:
    rows = pack(tokens, recipe.length)
    return Dataset.from_dict({name: values[: recipe.eval_rows] for name, values in rows.items()}).with_format("numpy")


# The run's folder


@contextlib.contextmanager
def opened_run(
    recipe: Recipe | ChatRecipe, output: Path, state: PartialState, fresh: bool, corpus: Corpus | None = None
) -> Iterator[OutputFolder | None]:
    """The run's folder, claimed by the first process for as long as it trains; None on the others, and if the run is finished.

    Raises:
        RecipeError, OutputError: as `train`.
    """
    with contextlib.ExitStack() as stack:
        out = None
        stack.enter_context(disk_errors(output, GOES_ON))  # of the other processes
        with first_process_first(state):
            if state.is_main_process:
                _keep_inputs(recipe, output)
                if fresh or not (output / MODEL_DONE).is_file():
                    out = stack.enter_context(claimed(output, RUN, going_on=GOES_ON))
                    open_run(recipe, out, fresh)
                elif differ := _differences(recipe, output):
                    raise _another_recipe(output, differ)
                if corpus is not None:
                    _same_text(corpus.summary, output)
        yield out


def open_run(recipe: Recipe | ChatRecipe, out: OutputFolder, fresh: bool) -> None:
    """See that the run in the folder is this recipe's, or make it this recipe's. A run that has not begun to train can be changed:
    what was prepared for it is made again.

    Raises:
        RecipeError: it is another recipe's.
        OutputError: the folder holds something else than a run, and would be deleted.
    """
    path = out.path / "recipe.yaml"
    if fresh:
        _delete_run(out)
    if path.exists():
        differ = _differences(recipe, out.path)
        if differ and _has_begun(out.path):
            raise _another_recipe(out.path, differ)
        if differ:
            _delete_run(out)
        elif _fields_of(type(recipe), path) == dataclasses.asdict(recipe.placed()) or not out.owns("recipe.yaml"):
            return
    out.write("recipe.yaml", recipe.placed().to_yaml())


def _differences(recipe: Recipe | ChatRecipe, output: Path) -> dict[str, tuple[Any, Any]]:
    """Fields that determine what is trained, and are another in the folder's recipe: there, and here."""
    before, now = _fields_of(type(recipe), output / "recipe.yaml"), dataclasses.asdict(recipe.placed())
    return {
        name: (before.get(name), now[name]) for name in now if now[name] != before.get(name) and name not in FREE_TO_CHANGE
    }


def _another_recipe(output: Path, differ: dict[str, tuple[Any, Any]]) -> RecipeError:
    shown = ", ".join(f"{name} {before!r} -> {now!r}" for name, (before, now) in differ.items())
    return RecipeError(
        f"output {str(output)!r} holds a run of another recipe ({shown}): choose another output, or start over with --fresh."
    )


def _fields_of(kind: type[RunSettings], path: Path) -> dict[str, Any]:
    try:
        return dataclasses.asdict(kind.load(path).placed())
    except RecipeError as error:
        raise RecipeError(f"the folder holds a run of another kind or version ({error}): choose another output.") from error


def save_tokenizer(tokenizer: Any, out: OutputFolder) -> None:
    """Once: a chat template that is put into the folder later stays as it is."""
    if not (out.path / "tokenizer_config.json").exists():  # the last file that is written
        out.write_files(tokenizer.save_pretrained)


def close_run(output: Path, result: dict[str, Any]) -> None:
    """The run is finished: say so, and delete what was for resuming."""
    left = [*checkpoints_of(output), output / "validation", output / "conversations", *places_in(output)]
    write_json(output / LEFT_OVER, [path.name for path in left])
    write_json(output / MODEL_DONE, result)
    finished(output, True)


def finished(output: Path, main: bool) -> dict[str, Any]:
    """What a finished run left. Deletes what was for resuming, if a process was killed while it did."""
    left_over = output / LEFT_OVER
    if main and left_over.exists():
        for name in json.loads(left_over.read_text(encoding="utf-8")):
            delete(output / name)
        left_over.unlink()
    return json.loads((output / MODEL_DONE).read_text(encoding="utf-8"))


def _has_begun(output: Path) -> bool:
    return (output / TRAINED_ON).exists() or (output / MODEL_DONE).exists()


def _keep_inputs(recipe: Recipe | ChatRecipe, output: Path) -> None:
    """A run must not write into, nor --fresh delete, what it reads.

    Raises:
        RecipeError: it would.
    """
    read: dict[str, str | None]
    if isinstance(recipe, ChatRecipe):
        read = {"model": recipe.model, "chat": recipe.chat}
    else:
        read = {"init_from": recipe.init_from, "tokenizer": recipe.tokenizer}
        read |= {f"source {entry['source']!r}": entry["source"] for entry in recipe.sources}
    for name, place in read.items():
        # Of a glob, the folder before its first wildcard.
        fixed = itertools.takewhile(lambda part: not glob.has_magic(part), Path(place or "").expanduser().parts)
        there = Path(*fixed) if place else None
        if there is not None and there.exists() and there.resolve().is_relative_to(output.resolve()):
            raise RecipeError(f"output {str(output)!r} holds what is read ({name}): choose another output.")


def _delete_run(out: OutputFolder) -> None:
    if Path.cwd().resolve().is_relative_to(out.path.resolve()):
        raise OutputError(
            f"output {str(out.path)!r} holds the folder that this runs in, which is not deleted: choose another output."
        )
    out.clear()


def bytes_to_come(model: Any, settings: RunSettings, steps: int, output: Path, weight_bytes: int = 4) -> float:
    """Bytes of the checkpoints that a run will hold at a time and of its model, but for what is there of them."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    whole = sum(p.numel() for p in model.parameters())
    checkpoint = 3 * 4 * trained + 2**22  # weights and both moments, in float32; tokenizer and the like
    made = math.ceil(steps / settings.save_every)
    kept, there = min(settings.keep_checkpoints, made), len(checkpoints_of(output))
    most = kept + (made > kept)  # an older one is deleted when a new one is whole
    return max((most - there) * checkpoint, (kept - there) * checkpoint + weight_bytes * whole)


def _same_text(summary: dict[str, Any], output: Path) -> None:
    path = output / TRAINED_ON
    if path.exists() and json.loads(path.read_text(encoding="utf-8"))["digest"] != summary["digest"]:
        raise RecipeError(
            f"source {summary['source']!r} has changed since the run in {str(output)!r} began, and losses on different "
            f"text do not compare: start over with --fresh, or choose another --output."
        )
