"""Datasets as uint8 tensors, where they come from, and how batches are made of them."""

from robudget.data.catalog import load, names
from robudget.data.dataset import Dataset, Split, hold_out, to_unit

__all__ = ["Dataset", "Split", "hold_out", "load", "names", "to_unit"]
