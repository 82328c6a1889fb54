"""A thread that calls something now and then; only sources that would lose energy between two reads have one."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Poller:
    """Calls `poll` every `seconds` until `close`. A daemon, so that it never keeps a process alive."""

    def __init__(self, poll: Callable[[], object], seconds: float) -> None:
        self._poll, self._seconds = poll, seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="robudget-meter", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        while not self._stop.wait(self._seconds):
            self._poll()
