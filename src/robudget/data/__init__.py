"""Datasets as uint8 tensors, where they come from, and how batches are made of them."""

from robudget.data.dataset import Dataset, Split, hold_out, to_unit
from robudget.data.load import load, names

__all__ = ["Dataset", "Split", "hold_out", "load", "names", "to_unit"]
