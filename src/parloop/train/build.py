"""The model that a recipe trains: its shape, and the weights that it starts from."""

from collections.abc import Iterator
from typing import Any

import torch
from accelerate import PartialState
from torch import nn

from ..checkpoints import load_config, local_folder
from ..errors import RecipeError
from ..model.configuration import PLTConfig
from ..model.modeling import PLTForCausalLM
from .checkpoint import load_base
from .recipe import Recipe
from .sharding import empty_model, fill


def build_model(recipe: Recipe, tokenizer: Any = None, state: PartialState | None = None) -> PLTForCausalLM:
    """Return a model to train: new, or loaded from the checkpoint that the recipe continues. On several processes it is
    sharded.

    Raises:
        RecipeError: the checkpoint's loop count, vocabulary or longest text does not fit the recipe.
        CheckpointError: it cannot be read.
    """
    config = recipe.plt_config(tokenizer) if recipe.init_from is None else _config_to_go_on_from(recipe, tokenizer)
    model = empty_model(config, recipe, state or PartialState(cpu=True))
    if recipe.init_from is None:
        fill(model, initial_weights(model, recipe.seed, branch_scale(recipe)))
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


INTO_THE_STREAM = ("o_proj.weight", "down_proj.weight")


def branch_scale(recipe: Recipe) -> float:
    """Return the factor on the initial values and learning rate of projections into the residual stream: 1, or R^(-1/2).

    Adam moves a weight by the learning rate, whatever its gradient. A shared weight is added to the stream by R visits, so one step moves
    the stream R times as far. The effect equals a factor of R^(-1/2) at every branch (depth-muP does this for layers, arXiv 2310.02244),
    without such a factor in the model.
    """
    return max(recipe.loop_counts) ** -0.5 if recipe.branch_scaling == "loops" else 1.0


def initial_weights(model: PLTForCausalLM, seed: int, branch_scale: float = 1.0) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the name and the float32 value of every weight of a new model.

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
            if name.endswith(INTO_THE_STREAM):
                value *= branch_scale * (2 * visits) ** -0.5
        elif "norm" in name.rsplit(".", 2)[-2]:
            value.fill_(1.0)
        yield name, value
