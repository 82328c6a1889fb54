"""What to train with a budget, or for a target. Imports no torch."""

from robudget.planning.answer import Option, Plan
from robudget.planning.planner import plan

__all__ = ["Option", "Plan", "plan"]
