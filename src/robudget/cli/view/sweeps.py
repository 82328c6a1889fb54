"""How the sweeps of a store stand, as text for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.text import Text

from robudget.cli.view.console import TextTable, duration
from robudget.formats import UNKNOWN, known
from robudget.sweep.status import STATES

if TYPE_CHECKING:
    from robudget.sweep.journal import Driver
    from robudget.sweep.status import StoreStatus

MOST = 30  # runs shown that are not done


def status_text(now: StoreStatus) -> Group:
    """A sentence, a line for each driver, and a table of what is not done."""
    counts = ", ".join(f"{now.count(s)} {s}" for s in reversed(STATES) if now.count(s))
    waiting = f", {now.waiting} not begun" if now.waiting else ""
    lines = [Text(f"{now.store}: {counts or 'no runs yet'}{waiting}", style="bold")]
    lines += [Text(driver_text(driver, live=driver in now.live)) for driver in now.drivers]
    rows = [
        {
            "run": run.run,
            "state": run.state,
            "last": run.last,
            "ago": UNKNOWN if run.seconds_ago is None else duration(run.seconds_ago),
            "owner": run.owner,
        }
        for run in now.runs
        if run.state != "done"
    ]
    if len(rows) > MOST:
        lines.append(Text(f"the first {MOST} of {len(rows)} runs that are not done; --json has them all", style="dim"))
    return Group(*lines, *([TextTable(rows[:MOST], left=("run", "state", "last", "owner"))] if rows else []))


def driver_text(driver: Driver, *, live: bool) -> str:
    """`digits-30 on local (process 12 on host): 3 of 30 runs done, about 5 min left; spent …, forecast …`"""
    data = driver.data
    who = f"{driver.title} on {driver.on} (process {driver.owner['pid']} on {driver.owner['host']})"
    text = f"{who}: {data['done']} of {data['runs']} runs done"
    if data.get("ended_early"):
        text += f", {data['ended_early']} ended early"
    if data.get("failed"):
        text += f", {len(data['failed'])} failed"
    if not live:
        last = data.get("last") or f"ended without a word, last heard of {duration(driver.silent_seconds)} ago"
        text += f"; ended: {last}"
    elif data.get("seconds_left") is not None:
        text += f", about {duration(data['seconds_left'])} left"
    text += f"; spent {money(data['spent'])}"
    if data["left"]:
        text += f", forecast of the rest {money(data['forecast'])}"
    return text + (f", budget {data['budget']}" if data.get("budget") else "")


def money(spend: dict[str, Any] | None) -> str:
    """A spend's FLOP, energy, money and hours of GPUs, as far as they are known."""
    if spend is None:
        return UNKNOWN
    names = (("flops", "FLOP"), ("kwh", "kWh"), ("usd", "usd"), ("gpu_hours", "GPU-h"))
    known_parts = ((spend.get(key), unit) for key, unit in names)  # an earlier version's has no FLOP
    parts = [f"{value:.3g} {unit}" for value, unit in known_parts if value is not None and known(value)]
    return ", ".join(part for part in parts if not part.startswith("0 ")) or UNKNOWN
