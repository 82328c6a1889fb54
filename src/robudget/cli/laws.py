"""Verbs about laws: fit, predict, plan, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from robudget.cli.app import AsJson, Overrides, TableFrom, app


@app.command()
def fit(
    table: Annotated[
        str, typer.Argument(help="a folder of runs, a csv or parquet table, or RobustBench's JSON folder")
    ],
    x: Annotated[str, typer.Option("-x", help="what is spent: a column of the table")] = "train_flops_exact",
    y: Annotated[str, typer.Option("-y", help="what is bought")] = "aa_acc",
    where: Annotated[
        list[str] | None, typer.Option(help="only these runs, e.g. dataset=cifar10; may be repeated")
    ] = None,
    json: AsJson = False,
) -> None:
    """Laws of robustness against compute: envelope, forms, intervals, hold-outs, effects of each choice."""
    from robudget import terminal, terminal_laws
    from robudget.config import parse_overrides
    from robudget.laws import analyse, read_table

    analysis = analyse(read_table(table), x=x, y=y, choose=parse_overrides(where or []))
    if json:
        terminal.print_json(analysis.to_dict())
    else:
        terminal.out.print(terminal_laws.analysis(analysis))


@app.command()
def predict(
    recipe: Annotated[str, typer.Argument(help="a named recipe or a YAML file")],
    overrides: Overrides = None,
    table: TableFrom = "runs",
    json: AsJson = False,
) -> None:
    """A recipe's robust accuracy before it is trained, with its interval, P(collapse) and the nearest real runs."""
    from robudget import terminal, terminal_laws
    from robudget.config import parse_overrides
    from robudget.laws import Predictor, read_table
    from robudget.recipe import Recipe

    chosen = Recipe.load(recipe, parse_overrides(overrides or []))
    prediction = Predictor.fit(read_table(table)).predict([chosen])[0]
    if json:
        terminal.print_json(prediction.to_dict())
    else:
        terminal.out.print(terminal_laws.prediction(chosen.slug, prediction))


@app.command()
def plan(
    table: TableFrom = "runs",
    budget: Annotated[str | None, typer.Option(help="50usd, 100gpu-h, 20kWh, 5kgCO2e, 1e19flops")] = None,
    target: Annotated[float | None, typer.Option(help="robust accuracy to reach, in percent")] = None,
    json: AsJson = False,
) -> None:
    """What to train for a budget, or the cheapest way to a target, with risk and the price of the next point."""
    from robudget import terminal, terminal_laws
    from robudget.laws import plan as make_plan
    from robudget.laws import read_table

    made = make_plan(read_table(table), budget=budget, target=target)
    if json:
        terminal.print_json(made.to_dict())
    else:
        terminal.out.print(terminal_laws.plan(made))


@app.command()
def report(
    table: Annotated[str, typer.Argument(help="a folder of runs, a csv or parquet table")] = "runs",
    out: Annotated[Path, typer.Option(help="folder for report.html and figures/")] = Path("report"),
    title: Annotated[str, typer.Option(help="heading of the page")] = "What does robustness cost?",
) -> None:
    """One offline interactive page and the paper's figures."""
    from robudget import terminal
    from robudget.laws import analyse, read_table
    from robudget.report import write

    frame = read_table(table)
    terminal.out.print(str(write(frame, analyse(frame), out, title=title)))
