"""Many recipes: a study expands to them, a local sweep runs what is not done yet. Imports no torch."""

from robudget.sweep.local import sweep
from robudget.sweep.state import SweepState
from robudget.sweep.study import Study, recipes_of
from robudget.sweep.weight import weight

__all__ = ["Study", "SweepState", "recipes_of", "sweep", "weight"]
