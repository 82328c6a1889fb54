"""Verbs that show what there is: runs, devices, and what a recipe will cost."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from robudget.cli.app import AsJson, Overrides, Prices, StoreOption, app, interruptible


@app.command()
def runs(
    store: Annotated[str, typer.Argument(help="folder or URL of runs")] = "runs",
    prices: Prices = None,
    top: Annotated[int, typer.Option(min=0, help="show so many of the best runs; 0 = all")] = 100,
    json: AsJson = False,
) -> None:
    """The leaderboard of a folder of runs: accuracy with its interval, FLOPs, energy, cost."""
    from robudget.cli.view.console import show
    from robudget.cli.view.runs import leaderboard
    from robudget.meter.prices import Prices as PriceList
    from robudget.tables.read import load_runs

    table = load_runs(store, prices=PriceList.load(prices) if prices else None)
    show(json, lambda: table, lambda: f"no finished runs in {store!r} yet" if table.empty else leaderboard(table, top))


@app.command()
@interruptible
def cost(
    what: Annotated[str, typer.Argument(metavar="RECIPE|STUDY", help="a recipe or a study, by name or YAML file")],
    overrides: Overrides = None,
    device: Annotated[
        str | None, typer.Option(help="a device of `robudget devices`; default: this machine, calibrated in 30 s")
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, help="how many of them")] = 1,
    prices: Prices = None,
    json: AsJson = False,
) -> None:
    """What a recipe or a whole study will cost, before training: FLOPs, time, energy, money, carbon, with ranges."""
    from robudget import data
    from robudget.cli.view.console import show
    from robudget.cli.view.runs import forecasts_text
    from robudget.config import parse_overrides
    from robudget.datasets import PUBLISHED, Sizes
    from robudget.environment import resolve_device
    from robudget.execution import Site
    from robudget.forecast.forecast import forecast_study, total
    from robudget.meter.prices import Prices as PriceList
    from robudget.sweep.study import recipes_of
    from robudget.threads import claimed

    site, changes = Site.take(parse_overrides(overrides or []))
    recipes = recipes_of(what, changes)
    others = {recipe.data.name for recipe in recipes} - PUBLISHED.keys()
    with claimed(site.threads):
        forecasts = forecast_study(
            recipes,
            sizes={name: Sizes.of(data.load(name, root=site.data_root)) for name in others},
            device=device,
            gpus=gpus,
            prices=PriceList.load(prices) if prices else None,
            site_device=str(resolve_device(site.device)),
            progress=lambda note: print(note, file=sys.stderr),
        )
    plain = [forecast.to_dict() for forecast in forecasts]
    show(json, lambda: plain, lambda: forecasts_text(plain, total(forecasts)))


@app.command()
def devices(json: AsJson = False) -> None:
    """The devices that `robudget cost --device` knows: peak, power, attainable share, source."""
    from dataclasses import asdict

    from robudget.cli.view.console import show
    from robudget.cli.view.runs import device_table
    from robudget.meter.devices import devices as known_devices

    rows = known_devices().values()
    show(json, lambda: [asdict(device) for device in rows], lambda: device_table(rows))


@app.command()
def doctor(overrides: Overrides = None, store: StoreOption = "runs", json: AsJson = False) -> None:
    """What this machine is, what will be measured on it and what estimated, which fast paths are on, and why not."""
    from dataclasses import asdict

    from robudget.cli.view.console import show
    from robudget.cli.view.runs import doctor_text
    from robudget.config import parse_overrides
    from robudget.doctor import diagnose
    from robudget.errors import unknown
    from robudget.execution import Site

    site, rest = Site.take(parse_overrides(overrides or []))
    if rest:
        raise unknown("key", next(iter(rest)), [field.title or name for name, field in Site.model_fields.items()])
    lines = diagnose(site, store)
    show(json, lambda: [asdict(line) for line in lines], lambda: doctor_text(lines))


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="a run's folder")],
    tracker: Annotated[str, typer.Argument(help="tensorboard, wandb or mlflow")],
    to: Annotated[str, typer.Argument(help="folder, or MLflow's tracking URI")],
) -> None:
    """Replay a finished run's log into a tracker."""
    from robudget.interop import trackers
    from robudget.store import RunFolder

    trackers.export(RunFolder(run), tracker, to=to)
