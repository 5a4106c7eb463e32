from .recipe import ChatRecipe, Recipe, load_recipe

__all__ = ["ChatRecipe", "Recipe", "load_recipe"]
