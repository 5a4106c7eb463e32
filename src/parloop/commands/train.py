"""`parloop train`."""

from typing import Annotated, Any

from cyclopts import Parameter

from ..train.recipe import ChatRecipe, Recipe, load_recipe
from .options import Output, given, overrides_of
from .terminal import terminal

Overrides: Any = overrides_of(Recipe, ChatRecipe, without=("mixture",))


def train(
    recipe: str,
    /,
    *,
    output: Output | None = None,
    fresh: bool = False,
    plan: bool = False,
    overrides: Annotated[Overrides, Parameter(name="*")] = Overrides(),  # noqa: B008
) -> None:
    """Train a model on text, or fine-tune one on conversations, as a recipe says. Run it again to continue after an interruption.

    Example: parloop train quick --loops 2 --learning-rate 2e-3

    On several processes: torchrun --nproc-per-node 8 -m parloop train gpu

    Parameters
    ----------
    recipe
        A YAML file with the fields below, or the name of a shipped one: quick, laptop, gpu, loopcoder-v2-7b, task, chat, chat-lora, think.
    output
        Folder of the run. Default: runs/train/NAME-OF-THE-RECIPE-rR.
    fresh
        Delete the run in the folder and start over. Refused if the folder holds anything else.
    plan
        Train nothing; print parameters, FLOPs, memory and days, for several numbers of GPUs.
    """
    changes = given(overrides)
    if plan:
        from ..train.plan import plan_of
        from ..train.plan_tables import plan_tables

        for part in plan_tables(plan_of(load_recipe(recipe, **changes))):
            terminal().print(part, highlight=False)
        return
    from ..train import train as run
    from ..train.sharding import main_process

    result = run(recipe, output, changes=changes, fresh=fresh)
    if main_process():
        terminal().print(result, highlight=False)
