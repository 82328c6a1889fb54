"""Verbs about sweeps that run elsewhere: how they stand, stop them, watch them as a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from robudget.cli.app import AsJson, app, interruptible

StoreArgument = Annotated[str, typer.Argument(help="folder of runs")]


@app.command()
def status(store: StoreArgument = "runs", json: AsJson = False) -> None:
    """How the sweeps of a store stand: running, done, failed, stale; time and money left. Reads the store only."""
    from robudget.cli.view.console import show
    from robudget.cli.view.sweeps import status_text
    from robudget.sweep.status import status as read_status

    now = read_status(store)
    show(json, now.to_dict, lambda: status_text(now))


@app.command()
def stop(
    store: StoreArgument = "runs",
    wait: Annotated[float, typer.Option(min=0, help="seconds to wait until all have saved; 0: do not")] = 120.0,
    json: AsJson = False,
) -> None:
    """Ask every sweep and run of a store, on any node, to save and stop. The same commands go on from there."""
    from robudget.cli.view.console import show
    from robudget.cli.view.sweeps import status_text
    from robudget.store import Store
    from robudget.sweep.journal import request_stop
    from robudget.sweep.status import status as read_status
    from robudget.sweep.status import until_over

    read_status(store)  # raises where there is no such store
    request_stop(Store(store))
    now = until_over(Path(store), wait)
    show(json, now.to_dict, lambda: status_text(now))
    if wait and (now.live or now.count("running")):
        raise typer.Exit(1)


@app.command()
@interruptible
def watch(
    store: StoreArgument = "runs",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 = any that is free")] = 8765,
) -> None:
    """Serve `status` as a page that refreshes, on this machine only (127.0.0.1), until Ctrl-C."""
    from robudget.cli.view.console import out
    from robudget.sweep.page import serve
    from robudget.sweep.status import status as read_status

    read_status(store)
    serve(Path(store), port, lambda url: out.print(f"{url}  (Ctrl-C ends it)"))
