"""Tables of runs, wherever they are, and which of their rows count. Imports no torch."""

from robudget.tables.read import read_table

__all__ = ["read_table"]
