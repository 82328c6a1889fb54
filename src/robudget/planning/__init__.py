"""What to train with a budget, or for a target. Imports no torch."""

from robudget.planning.planner import Option, Plan, plan

__all__ = ["Option", "Plan", "plan"]
