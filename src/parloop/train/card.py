"""The model card of a run: its data, its settings and its losses."""

from typing import Any

from ..card import model_card, shown, table
from .recipe import ChatRecipe, Recipe

LOSSES = 10  # rows of a loss table


def card_of_run(
    name: str,
    recipe: Recipe | ChatRecipe | None,
    config: Any,
    losses: list[list[float]],
    validation: list[list[float]],
    parameters: int = 0,
) -> str:
    """Return the model card, in Markdown, of a model that a recipe trained.

    Args:
        name: name of the model.
        recipe: the recipe, or None if it is no longer known.
        config: configuration of the model.
        losses: pairs of step and training loss, in nats per token.
        validation: pairs of step and loss on held-out text, in nats per token.
        parameters: number of parameters; 0: not known.
    """
    sections: dict[str, str] = {}
    base: str | None = None
    sources: tuple[str, ...] = ()
    if recipe is not None:
        base = recipe.model if isinstance(recipe, ChatRecipe) else recipe.init_from
        sources = () if isinstance(recipe, ChatRecipe) else tuple(entry["source"] for entry in recipe.sources)
        sections = {"Data": _data(recipe), "Training": _settings(recipe)}
    sections["Loss"] = _loss_table(losses, validation)
    return model_card(name, config, sections, parameters=parameters or None, base_model=base, sources=sources)


def _data(recipe: Recipe | ChatRecipe) -> str:
    if isinstance(recipe, ChatRecipe):
        adapters = f", by LoRA adapters of rank {recipe.lora_rank}" if recipe.lora_rank else ""
        return f"Fine-tuned from {shown(recipe.model)} on the assistant's tokens of the conversations in {shown(recipe.chat)}{adapters}."
    how = f"on from {shown(recipe.init_from)}" if recipe.init_from else "from scratch"
    rows = [[shown(entry["source"]), f"{entry['weight']:g}"] for entry in recipe.sources]
    return f"Trained {how} on {recipe.tokens:,} tokens of text:\n\n{table(['source', 'weight'], rows)}"


def _settings(recipe: Recipe | ChatRecipe) -> str:
    rate = f"peak {recipe.learning_rate:g}, linear warm-up over {recipe.warmup_share:.0%} of the steps, then a cosine to {recipe.min_learning_rate_share:.0%}"
    settings = {
        "rows per step": f"{recipe.batch_size:,} of {recipe.length:,} tokens",
        "learning rate": rate,
        "Adam": f"betas {recipe.adam_beta1:g} and {recipe.adam_beta2:g}, epsilon {recipe.adam_epsilon:g}, weight decay {recipe.weight_decay:g}",
        "gradient clipping": f"{recipe.max_grad_norm:g}",
        "seed": str(recipe.seed),
    }
    return f"{table(['', ''], [[*row] for row in settings.items()])}\n\n`recipe.yaml`, where it is beside this file, has every setting."


def _loss_table(losses: list[list[float]], validation: list[list[float]]) -> str:
    trained, held_out = ({int(step): loss for step, loss in curve} for curve in (losses, validation))
    steps = sorted(held_out or trained)
    if not steps:
        return "Not measured."
    kept = sorted({steps[round(i * (len(steps) - 1) / (LOSSES - 1))] for i in range(LOSSES)})
    rows = [
        [f"{step:,}", *(f"{curve[step]:.4f}" if step in curve else "" for curve in (trained, held_out))] for step in kept
    ]
    note = "In nats per token of the last loop. Training losses are means over the steps since the row before; held-out losses are over a small part."
    return f"{table(['step', 'training', 'held out'], rows)}\n\n{note}"
