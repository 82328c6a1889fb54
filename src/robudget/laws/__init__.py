"""Tables in, laws out. Imports no torch."""

from robudget.laws.envelope import Envelope, envelope
from robudget.laws.fit import fit_law, fit_power_law
from robudget.laws.law import Law, Reach

__all__ = ["Envelope", "Law", "Reach", "envelope", "fit_law", "fit_power_law"]
