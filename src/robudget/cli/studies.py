"""The verb about studies: which there are, and run one and answer its question."""

from __future__ import annotations

import math
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from robudget.cli.app import AsJson, Overrides, StoreOption, Time, app, resumable
from robudget.errors import InputError
from robudget.files import local


@app.command()
@resumable
def study(
    name: Annotated[str | None, typer.Argument(help="one of them, or a YAML file of a study")] = None,
    overrides: Overrides = None,
    size: Annotated[
        str | None, typer.Option(help="run it at this size and answer its question: smoke, small, full")
    ] = None,
    store: StoreOption = "runs",
    table: Annotated[
        str | None, typer.Option(help="run nothing: answer from these runs (a folder or URL of runs, csv, parquet)")
    ] = None,
    beside: Annotated[
        str | None,
        typer.Option(help="others' runs that cifar10-law predicts: a table, e.g. the paper's paper_runs.csv"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(callback=local, help="where answer, runs and figure go; default: NAME-SIZE")
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="processes side by side; 0 = one per GPU, else one per core")] = 0,
    time: Time = None,
    json: AsJson = False,
) -> None:
    """List the studies that ship with robudget, show one, or (--size) run it, skipping what is done, and answer it."""
    from robudget.cli.view.console import TextTable, show
    from robudget.cli.view.console import out as console

    if size is None and table is None:
        rows = _outlines(name)
        show(json, lambda: rows, lambda: TextTable(rows, left=("study", "axes", "question")))
        return
    from robudget.config import parse_overrides
    from robudget.execution import Site
    from robudget.sweep.study import Study

    if name is None:
        raise InputError("--size and --table need the name of a study (robudget study lists them)")
    site, changes = Site.take(parse_overrides(overrides or []))
    chosen = Study.load(name if size is None else f"{name}:{size}", changes)
    if table is None:
        _run(chosen, store, site, workers, time)
    from robudget.answers import answer
    from robudget.answers.answer import TooFewRuns
    from robudget.report.study_answer import environment_of, page, write_answer
    from robudget.store import Store
    from robudget.tables.read import read_table

    everything = read_table(table or store)
    others = read_table(beside) if beside is not None else None
    try:
        found = answer(chosen, everything, others)
    except TooFewRuns as error:
        if not {recipe.id for recipe in chosen.recipes} - set(everything.run_id):
            raise
        words = ["robudget", "study", name, *(("--size", size) if size else ()), "--store", store, *(overrides or ())]
        raise InputError(f"{error}; {shlex.join(words)} makes them") from None
    runs = everything[everything.run_id.isin({recipe.id for recipe in chosen.recipes})]
    folder = out or Path(chosen.name)
    place = Store(table or store)
    environment = environment_of(
        [place.folder(recipe).path for recipe in chosen.recipes] if place.root.is_dir() else []
    )
    folder.mkdir(parents=True, exist_ok=True)
    figure = write_answer(
        found,
        runs,
        folder,
        name=chosen.name,
        question=chosen.question,
        asked=len(chosen.recipes),
        environment=environment,
    )
    facts = {"study": chosen.name, "question": chosen.question, "runs": len(runs), "asked": len(chosen.recipes)}
    show(
        json,
        lambda: facts | found.to_dict() | {"figure": str(figure.pdf)},
        lambda: page(found, runs, chosen.name, chosen.question, len(chosen.recipes), environment),
    )
    if not json:
        console.print(f"{folder / chosen.name}.md, .csv, .pdf, .svg, .png")


def _outlines(name: str | None) -> list[dict[str, Any]]:
    """A row a study: its sizes with their numbers of runs, its axes, its question. No recipe is made for it."""
    from robudget.config import load_yaml, named, read_named
    from robudget.sweep.study import of_size

    rows = []
    for one in [name] if name else named("studies"):
        text, where = read_named("studies", "study", one)
        data = load_yaml(text, where)
        counts = {
            size: math.prod(len(axis) for axis in of_size(data, size, where)["axes"].values())
            for size in data.get("sizes") or {None: {}}
        }
        runs = ", ".join(f"{size} {n}" if size else str(n) for size, n in counts.items())
        rows.append(
            {"study": one, "runs": runs, "axes": " × ".join(data["axes"]), "question": data.get("question", "")}
        )
    return rows


def _run(chosen: Any, store: str, site: Any, workers: int, time: str | None) -> None:
    """The missing runs of the study on this machine; what failed is said, and the others are answered from."""
    from collections.abc import Sequence

    from robudget.cli.sweep_terms import set_end
    from robudget.cli.view.console import SweepDisplay
    from robudget.recipe import Recipe
    from robudget.store import Store
    from robudget.sweep.frontier import with_frontier
    from robudget.sweep.local import sweep
    from robudget.sweep.queue import SweepState

    set_end(time)

    def run_all(recipes: Sequence[Recipe], title: str) -> SweepState:
        with SweepDisplay(title) as display:
            return sweep(recipes, store=store, site=site, workers=workers, order="cheapest-first", watch=display.update)

    state = with_frontier(chosen, chosen.recipes, Store(store), run_all)
    for index, why in state.failed.items():
        print(f"error: {chosen.recipes[index].slug}: {why}", file=sys.stderr)
