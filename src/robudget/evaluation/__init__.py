"""Robust accuracy with its evidence: a verdict per image, intervals, checks, and what it took."""

from robudget.evaluation.evaluate import evaluate
from robudget.evaluation.stages import Progress
from robudget.evaluation.verdicts import Finding, Spent, Verdicts

__all__ = ["Finding", "Progress", "Spent", "Verdicts", "evaluate"]
