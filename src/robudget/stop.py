"""Stopping on request: a scheduler's signal, `robudget stop` or the end of a job's time asks; work looks and saves.

Whoever works looks at `requested()` where it can stop, saves, and raises `Stopped`. Ctrl-C ends it at once instead.
"""

from __future__ import annotations

import math
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from robudget.errors import InputError, RobudgetError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # what schedulers send some time before they kill
MARGIN_SECONDS = 30.0  # of a job's time, for saving
_MARGIN_SHARE = 0.1  # of a job's time that is shorter than ten margins
FILE = "stop"
END_TIME = "ROBUDGET_END_TIME"  # seconds since 1970, as SLURM_JOB_END_TIME
_why: str | None = None
_watched: tuple[Path, str] | None = None  # a file of requests, and what it said at the start
_ends: float = math.inf  # of the monotonic clock
_margin: float = 0.0


class Stopped(RobudgetError):
    """Stopped on request with everything saved; the same command goes on from there. A scheduler may run it again."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again later


class Paused(RobudgetError):
    """The training has come to where it was to pause, with everything saved; without that it goes on from there."""


def request(why: str) -> None:
    """Ask the work of this process to save and stop. `why` is a few words, e.g. "SIGTERM"; the first one stays."""
    global _why
    _why = _why or why


def requested() -> bool:
    """Has anybody asked, or is the time up?"""
    if _why is None and seconds_left() <= 0:
        request("the time is up")
    return _why is not None


def withdraw() -> None:
    """Forget what was asked, for a process that goes on with other work."""
    global _why
    _why = None


def check() -> None:
    """Raise Stopped where a stop was requested; to be called where everything is saved."""
    if requested():
        raise Stopped(f"stopped ({_why}); what was done is saved, and the same command goes on from there")


@contextmanager
def on_signals() -> Iterator[None]:
    """SIGTERM and SIGUSR1 request a stop inside; afterwards they do what they did before, and no end of time is known.
    Elsewhere than in the main thread, which alone may handle signals, nothing changes."""
    global _ends
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
        _ends = math.inf


# -- the end of a job's time -------------------------------------------------------------------------------------------


def end_after(seconds: float) -> None:
    """The time of this process ends in so many seconds; some of them are kept for saving."""
    global _ends, _margin
    _margin = min(MARGIN_SECONDS, _MARGIN_SHARE * seconds)
    _ends = time.monotonic() + seconds


def end_of_job() -> None:
    """Take the end of the job's time from the environment, where a driver or Slurm says it there."""
    ends = os.environ.get(END_TIME) or os.environ.get("SLURM_JOB_END_TIME", "")
    if ends.isdigit():
        end_after(max(0.0, int(ends) - time.time()))


def seconds_left() -> float:
    """For work, infinite where no end is known."""
    return _ends - _margin - time.monotonic()


def seconds_of(text: str) -> float:
    """`90`, `90s`, `30min`, `2h`, `1d`, or Slurm's `[days-]hours:minutes:seconds` in seconds. Raises InputError."""
    if match := re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)", text):
        days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
        return ((24 * days + hours) * 60 + minutes) * 60 + seconds
    units = {"": 1, "s": 1, "min": 60, "m": 60, "h": 3600, "d": 86400}
    match = re.fullmatch(r"([\d.]+) *([a-z]*)", text)
    try:
        assert match is not None
        return float(match[1]) * units[match[2]]
    except (AssertionError, KeyError, ValueError):
        raise InputError(f"time = {text!r} (allowed: 90s, 30min, 2h, 1d or 1-12:00:00)") from None


# -- `robudget stop STORE`: a file in the store that says something new ------------------------------------------------


def token(store: Path) -> str:
    """What the store's file of requests says; "" where nobody ever asked, or where the store is away."""
    try:
        return (store / ".sweeps" / FILE).read_text("utf-8")
    except OSError:
        return ""


@contextmanager
def on_file(store: Path, known: str | None = None) -> Iterator[str]:
    """Let `look` request a stop where the store's file says something else than `known` (default: than now). A request
    of this store ends with the context."""
    global _watched
    before, since = _watched, token(store) if known is None else known
    _watched = (store, since)
    try:
        yield since
    finally:
        _watched = before
        if _why == _BY_FILE:
            withdraw()


_BY_FILE = "robudget stop"


def look() -> None:
    """Read the file of requests; to be called every few seconds."""
    if _watched is not None and (now := token(_watched[0])) and now != _watched[1]:
        request(_BY_FILE)
