"""Robust accuracy with its evidence: a verdict per image, intervals, checks, and what it took."""

from robudget.attacks.ensemble import Member
from robudget.evaluation.evaluator import evaluate
from robudget.evaluation.stages import Progress
from robudget.evaluation.verdicts import Finding, Spent, Verdicts

__all__ = ["Finding", "Member", "Progress", "Spent", "Verdicts", "evaluate"]
