"""Tables and laws in; figures and one offline page out. Imports no torch."""

from robudget.report.figures import draw_all
from robudget.report.page import write

__all__ = ["draw_all", "write"]
