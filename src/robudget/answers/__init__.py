"""What runs answer to the question of a study: one analysis for every kind of question, each with its interval.

from robudget.answers import answer
print(answer(Study.load("steps-law:small"), load_runs("runs")).sentence)
"""

from robudget.answers.answer import Answer, TooFewRuns
from robudget.answers.studies import ANALYSES, answer

__all__ = ["ANALYSES", "Answer", "TooFewRuns", "answer"]
