"""Robust accuracy with its evidence: a verdict per image, intervals, checks, and what it took."""

from robudget.attacks.autoattack import Member
from robudget.evaluation.evaluate import evaluate
from robudget.evaluation.stages import Progress
from robudget.evaluation.verdicts import Finding, Spent, Verdicts

__all__ = ["Finding", "Member", "Progress", "Spent", "Verdicts", "evaluate"]
