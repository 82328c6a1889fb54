"""Robust accuracy with its evidence: a verdict per image, intervals, checks, and what it took."""
