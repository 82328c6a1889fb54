"""One worker of a local sweep: `python -m robudget.sweep.worker <pid of whoever starts it>`.

Reads one JSON job a line from stdin, runs it, and writes one JSON event a line to stdout. A separate interpreter rather
than a forked one: it sets its thread count before torch starts, and needs no guard in the user's script. It lives no
longer than the process that started it, however that ends: nobody may train on unseen.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

_LOOK_SECONDS = 1.0


def _end_with(parent: int) -> None:
    """Leave when the process that started this one is gone; what is worth keeping is on the disk at any moment."""
    while os.getppid() == parent:
        time.sleep(_LOOK_SECONDS)
    os._exit(1)


def main() -> int:
    threading.Thread(target=_end_with, args=(int(sys.argv[1]),), daemon=True).start()
    # Whatever a library prints must not end up between the events, so they get the real stdout and print gets stderr.
    events = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)

    def send(**event: Any) -> None:
        try:
            print(json.dumps(event), file=events, flush=True)
        except BrokenPipeError:
            os._exit(1)  # whoever asked is gone; everything worth keeping is on the disk

    for line in sys.stdin:
        _work(json.loads(line), send)
    return 0


def _work(job: dict[str, Any], send: Callable[..., None]) -> None:
    from robudget.errors import RobudgetError
    from robudget.execution import Site
    from robudget.recipe import Recipe
    from robudget.runner import Progress, run
    from robudget.store import Busy

    index = job["index"]

    def tell(progress: Progress) -> None:
        send(index=index, kind="progress", phase=progress.phase, fraction=progress.fraction, note=progress.note)

    try:
        result = run(Recipe.from_dict(job["recipe"]), store=job["store"], site=Site(**job["site"]), progress=tell)
    except Busy:
        send(index=index, kind="busy")
    except RobudgetError as error:
        send(index=index, kind="failed", note=str(error), exit_code=error.exit_code)
    except Exception as error:  # a defect of ours or of a library: the other runs go on, and it is reported as such
        traceback.print_exc()
        send(index=index, kind="failed", note=f"{type(error).__name__}: {error}", exit_code=1)
    else:
        send(index=index, kind="done", note=result.summary)


if __name__ == "__main__":
    sys.exit(main())
