"""Stopping on request: a scheduler's signal, `robudget stop` or the end of a job's time asks; work looks and saves.

Whoever works looks at `requested()` where it can stop, saves, and raises `Stopped`. Ctrl-C ends it at once instead.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from robudget.errors import RobudgetError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # what schedulers send some time before they kill
_why: str | None = None


class Stopped(RobudgetError):
    """Stopped on request with everything saved; the same command goes on from there. A scheduler may run it again."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again later


def request(why: str) -> None:
    """Ask the work of this process to save and stop. `why` is a few words, e.g. "SIGTERM"; the first one stays."""
    global _why
    _why = _why or why


def requested() -> bool:
    """Has anybody asked?"""
    return _why is not None


def withdraw() -> None:
    """Forget what was asked, for a process that goes on with other work."""
    global _why
    _why = None


def check() -> None:
    """Raise Stopped where a stop was requested; to be called where everything is saved."""
    if _why is not None:
        raise Stopped(f"stopped ({_why}); what was done is saved, and the same command goes on from there")


@contextmanager
def on_signals() -> Iterator[None]:
    """SIGTERM and SIGUSR1 request a stop inside; what they did before is put back. Elsewhere than in the main thread,
    which alone may handle signals, nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda n, frame: request(signal.Signals(n).name)) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        withdraw()
