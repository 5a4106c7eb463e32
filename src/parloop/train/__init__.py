from .evaluate import Evaluation, evaluate_documents
from .pretrain import TrainingDivergedError, build_model, train
from .recipe import Recipe, RecipeError

__all__ = ["Evaluation", "Recipe", "RecipeError", "TrainingDivergedError", "build_model", "evaluate_documents", "train"]
