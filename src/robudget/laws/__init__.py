"""Tables in, laws out. Imports no torch."""

from robudget.laws.analysis import Analysis, Split, analyse
from robudget.laws.compare import Average, average, fit_forms
from robudget.laws.effects import Effect, Effects, effects
from robudget.laws.envelope import Envelope, envelope
from robudget.laws.fit import fit_law, fit_power_law
from robudget.laws.holdout import Holdout, holdout
from robudget.laws.joint import BARTOLDSON, Bartoldson, Joint, fit_joint
from robudget.laws.law import Law, Reach
from robudget.laws.planner import Option, Plan, plan
from robudget.laws.predictor import PaperGBR, Prediction, Predictor, predict
from robudget.laws.table import read_table

__all__ = [
    "BARTOLDSON", "Analysis", "Average", "Bartoldson", "Effect", "Effects", "Envelope", "Holdout", "Joint", "Law",
    "Option", "PaperGBR", "Plan", "Prediction", "Predictor", "Reach", "Split",
    "analyse", "average", "effects", "envelope", "fit_forms", "fit_joint", "fit_law", "fit_power_law", "holdout",
    "plan", "predict", "read_table",
]  # fmt: skip
