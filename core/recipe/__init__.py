"""How to sample what was trained: the recipe in a file's header, and the public few-step models' by name."""

from .definition import Recipe as Recipe
from .presets import PRESETS as PRESETS
from .presets import recipe_of as recipe_of
from .step_files import step_files as step_files
from .step_files import step_names as step_names
