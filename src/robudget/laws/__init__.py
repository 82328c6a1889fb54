"""Tables in, laws out. Imports no torch."""

from robudget.laws.envelope import Envelope, envelope
from robudget.laws.fit import fit_law, fit_power_law
from robudget.laws.law import Law, Reach
from robudget.laws.planner import Plan, plan
from robudget.laws.predictor import PaperGBR, Prediction, Predictor

__all__ = [
    "Envelope", "Law", "PaperGBR", "Plan", "Prediction", "Predictor", "Reach",
    "envelope", "fit_law", "fit_power_law", "plan",
]  # fmt: skip
