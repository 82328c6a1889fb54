"""Verbs that run something: a recipe, a study, the demo."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from robudget.cli.app import AsJson, Overrides, StoreOption, app, resumable


@app.command()
@resumable
def run(
    recipe: Annotated[str, typer.Argument(help="a named recipe (digits, cifar10-smoke, paper, …) or a YAML file")],
    overrides: Overrides = None,
    store: StoreOption = "runs",
    json: AsJson = False,
) -> None:
    """Train a recipe, attack it with the standard ensemble, meter both, and keep the record. Resumes what was begun."""
    from robudget.cli.view.console import out, show
    from robudget.cli.view.progress import RunDisplay
    from robudget.cli.view.runs import leaderboard
    from robudget.config import parse_overrides
    from robudget.execution import Site, first_process
    from robudget.files import to_plain
    from robudget.recipe import Recipe
    from robudget.runner import run as run_recipe
    from robudget.tables.read import load_runs

    site, changes = Site.take(parse_overrides(overrides or []))
    chosen = Recipe.load(recipe, changes)
    with RunDisplay(chosen.slug) as display:
        result = run_recipe(chosen, store=store, site=site, progress=display.update)
    if not first_process():
        return
    table = load_runs(result.folder.path)
    show(json, lambda: to_plain(table)[0], lambda: leaderboard(table))
    if not json:
        out.print(f"\n{result.summary}\n{result.folder.path}")


@app.command()
@resumable
def sweep(
    study: Annotated[str, typer.Argument(help="a named study (robudget study lists them) or a YAML file")],
    overrides: Overrides = None,
    store: StoreOption = "runs",
    workers: Annotated[int, typer.Option(min=0, help="processes side by side; 0 = one per GPU, else one per core")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="list what would run")] = False,
    json: AsJson = False,
) -> None:
    """Run every recipe of a study, several side by side; skips what is done and resumes what was begun."""
    from robudget.cli.view.console import TextTable, show
    from robudget.cli.view.progress import SweepDisplay
    from robudget.cli.view.runs import leaderboard
    from robudget.config import parse_overrides
    from robudget.execution import Site
    from robudget.store import Store
    from robudget.sweep.local import sweep as run_sweep
    from robudget.sweep.study import Study
    from robudget.tables.read import load_runs

    site, changes = Site.take(parse_overrides(overrides or []))
    chosen = Study.load(study, changes)
    home = Store(store)
    if dry_run:
        rows = [
            {"run": r.slug, "id": r.id, "state": "done" if home.folder(r).has(r) else "to do"} for r in chosen.recipes
        ]
        show(json, lambda: rows, lambda: TextTable(rows, title=chosen.question, left=("run", "id", "state")))
        return
    with SweepDisplay(chosen.name) as display:
        state = run_sweep(chosen.recipes, store=store, site=site, workers=workers, watch=display.update)
    mine = {r.id for r in chosen.recipes}
    table = load_runs(store) if home.root.is_dir() else None
    table = table[table.run_id.isin(mine)] if table is not None else None
    if table is not None:
        show(json, lambda: table, lambda: leaderboard(table))
    if state.failed:
        for index, why in state.failed.items():
            print(f"error: {chosen.recipes[index].slug}: {why}", file=sys.stderr)
        raise typer.Exit(1)


@app.command()
@resumable
def demo(
    out: Annotated[Path, typer.Option(help="where the runs and the report go")] = Path("demo"),
    workers: Annotated[int, typer.Option(min=0, help="processes side by side; 0 = one per core")] = 0,
    json: AsJson = False,
) -> None:
    """The main job on scikit-learn's digits: train, attack, meter, fit a law, write a report. About 5 minutes."""
    from robudget.cli.view.console import show
    from robudget.cli.view.progress import SweepDisplay
    from robudget.cli.view.runs import demo_text
    from robudget.demo import demo as run_demo

    with SweepDisplay("demo") as display:
        result = run_demo(out, workers=workers, watch=display.update)
    show(json, result.to_dict, lambda: demo_text(result))
