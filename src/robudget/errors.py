"""The two ways a command can end badly, and the one-line messages that go with them."""

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


def unknown(kind: str, value: object, allowed: Iterable[str]) -> InputError:
    """The error for a name that is not one of `allowed`, with the nearest valid one."""
    names = sorted(allowed)
    # Case is the commonest slip, so matching ignores it while the answer keeps the true spelling.
    by_lower = {name.lower(): name for name in names}
    near = difflib.get_close_matches(str(value).lower(), by_lower, n=1, cutoff=0.5)
    hint = f"; did you mean {by_lower[near[0]]!r}?" if near else ""
    listed = ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
    return InputError(f"unknown {kind} {str(value)!r}{hint} (allowed: {listed})")
