"""Training: recipes, the loop, checkpoints, metrics, export."""

from mosaics.training.export import export_run
from mosaics.training.plan import plan
from mosaics.training.recipe import Recipe, load_recipe, make_recipe, shipped_recipes
from mosaics.training.run_folder import Outcome, train
from mosaics.training.validation import evaluate

__all__ = [
    "Outcome",
    "Recipe",
    "evaluate",
    "export_run",
    "load_recipe",
    "make_recipe",
    "plan",
    "shipped_recipes",
    "train",
]
