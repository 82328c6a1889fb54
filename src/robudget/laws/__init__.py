"""Laws of what compute buys: forms fitted to the best runs, with intervals and hold-outs. Imports no torch."""

from robudget.laws.envelope import Envelope, envelope
from robudget.laws.fit import fit_law, fit_power_law
from robudget.laws.form_selection import Average, Holdout, average, fit_forms, holdout
from robudget.laws.frontier import Frontier, fit_frontier
from robudget.laws.joint import BARTOLDSON, Bartoldson, Joint, fit_joint
from robudget.laws.law import Law, Reach
from robudget.laws.price import Price, price

__all__ = [
    "BARTOLDSON", "Average", "Bartoldson", "Envelope", "Frontier", "Holdout", "Joint", "Law", "Price", "Reach",
    "average", "envelope", "fit_forms", "fit_frontier", "fit_joint", "fit_law", "fit_power_law", "holdout", "price",
]  # fmt: skip
