"""Generators keyed by what they are for, so that no state has to be saved and any step can be repeated alone."""

from __future__ import annotations

import hashlib

import torch


def key(*parts: int | str) -> int:
    """63 bits from a tuple of numbers and words, the same in every process and Python version."""
    text = "/".join(f"{type(part).__name__[0]}{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator_for(device: torch.device | str, *parts: int | str) -> torch.Generator:
    """A generator on `device` seeded by `parts`, e.g. (recipe.seed, "craft", step)."""
    return torch.Generator(device).manual_seed(key(*parts))
