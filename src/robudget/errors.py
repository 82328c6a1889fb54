"""The errors that robudget raises on purpose, and the one-line messages for names it does not know."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RobudgetError(Exception):
    """Base of everything robudget raises on purpose. `exit_code` is what the command line returns."""

    exit_code = 1


class InputError(RobudgetError, ValueError):
    """The user's mistake: the message names the thing, its value and what is allowed, in one line."""

    exit_code = 2


class RunFailed(RobudgetError):
    """A run that could not be completed (diverged, out of disk, device lost); what was saved stays usable."""


class OutOfMemory(RunFailed):
    """No batch was small enough for the memory at hand."""


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its class where it says nothing; 200 characters at most."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def nearest(value: object, names: Iterable[str], cutoff: float = 0.5) -> str | None:
    """The name most like `value`, whatever their case; None where the likeness stays below `cutoff`."""
    by_lower = {name.lower(): name for name in sorted(names)}
    near = difflib.get_close_matches(str(value).lower(), by_lower, n=1, cutoff=cutoff)
    return by_lower[near[0]] if near else None


def hint(value: object, names: Iterable[str], cutoff: float = 0.5) -> str:
    """`; did you mean 'x'?` for the nearest name, or nothing."""
    near = nearest(value, names, cutoff)
    return f"; did you mean {near!r}?" if near else ""


def unknown(kind: str, value: object, allowed: Iterable[str]) -> InputError:
    """The error for a name that is not one of `allowed`, with the nearest valid one."""
    names = sorted(allowed)
    shown = ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
    return InputError(f"unknown {kind} {str(value)!r}{hint(value, names)} (allowed: {shown})")
