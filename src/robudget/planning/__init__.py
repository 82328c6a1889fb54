"""What to train with a budget, or for a target. Imports no torch."""

from robudget.planning.answer import Option, Plan
from robudget.planning.next_runs import NextRuns
from robudget.planning.planner import plan, plan_next

__all__ = ["NextRuns", "Option", "Plan", "plan", "plan_next"]
