"""Laws of what compute buys: forms fitted to the best runs, with intervals and hold-outs. Imports no torch."""

from robudget.laws.envelope import Envelope, envelope
from robudget.laws.fit import fit_law, fit_power_law
from robudget.laws.form_selection import Average, Holdout, average, fit_forms, holdout
from robudget.laws.joint import BARTOLDSON, Bartoldson, Joint, fit_joint
from robudget.laws.law import Law, Reach

__all__ = [
    "BARTOLDSON", "Average", "Bartoldson", "Envelope", "Holdout", "Joint", "Law", "Reach",
    "average", "envelope", "fit_forms", "fit_joint", "fit_law", "fit_power_law", "holdout",
]  # fmt: skip
