"""Verbs about laws: fit, predict, plan, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer

from robudget.cli.app import AsJson, Brief, Overrides, TableFrom, app, collect_rarely
from robudget.files import local

Where = Annotated[
    list[str] | None,
    typer.Option("--where", metavar="COLUMN=VALUE", help="only these runs, e.g. dataset=cifar10; may be repeated"),
]
RobustBench = Annotated[
    str | None, typer.Option("--robustbench", metavar="FOLDER", help="RobustBench's JSON folder, to set beside")
]


@app.command()
def fit(
    table: Annotated[
        str, typer.Argument(help="a folder or URL of runs, a csv or parquet table, or RobustBench's JSON folder")
    ],
    x: Annotated[str, typer.Option("-x", help="what is spent: a column of the table")] = "train_flops_exact",
    y: Annotated[str, typer.Option("-y", help="what is bought")] = "aa_acc",
    form: Annotated[
        str, typer.Option(help="the headline's form: power (the paper's), saturating, shifted, m4 or broken")
    ] = "power",
    bins: Annotated[int | None, typer.Option(help="bins of x; default: 19, fewer for small tables")] = None,
    how: Annotated[
        str | None, typer.Option(help="bins equal in log or linear x, quantile, pareto (no bins), or all runs")
    ] = None,
    no_predict: Annotated[
        bool, typer.Option("--no-predict", help="laws only: no effects, no small runs as judges")
    ] = False,
    joint: Annotated[
        bool, typer.Option("--joint", help="one law in parameters, images seen and, where they vary, steps and data")
    ] = False,
    checklist: Annotated[
        bool, typer.Option("--checklist", help="what a report of these laws must say, filled in (arXiv 2502.18969)")
    ] = False,
    where: Where = None,
    brief: Brief = False,
    json: AsJson = False,
) -> None:
    """What compute bought and what the next point costs: frontier, forms, intervals, hold-outs, effects of choices."""
    collect_rarely()
    from robudget.analysis import analyse
    from robudget.cli.view.console import show
    from robudget.cli.view.laws import fit_text
    from robudget.config import parse_overrides
    from robudget.laws.envelope import How
    from robudget.laws.forms import FormName
    from robudget.tables import read_table

    if joint:
        from robudget.cli.view.laws import joint_text
        from robudget.laws.joint import fit_table
        from robudget.tables.usable import select_rows

        law = fit_table(select_rows(read_table(table), parse_overrides(where or [])), y)
        show(json, law.to_dict, lambda: joint_text(law, brief))
        return
    analysis = analyse(
        read_table(table),
        x=x,
        y=y,
        choose=parse_overrides(where or []),
        form=cast(FormName, form),
        bins="auto" if bins is None else bins,
        how=cast(How | None, how),
        predict=not (no_predict or checklist or (brief and not json)),
        predictor=False,
        details=json,
        splits=not (checklist or (brief and not json)),
    )
    if checklist:
        from robudget.cli.view.laws import checklist_text
        from robudget.laws.checklist import checklist as filled

        answers = filled(analysis.law, analysis.frontier)
        show(json, lambda: answers, lambda: checklist_text(answers))
        return
    show(json, analysis.to_dict, lambda: fit_text(analysis, brief))


@app.command()
def predict(
    recipe: Annotated[str, typer.Argument(help="a named recipe or a YAML file")],
    overrides: Overrides = None,
    table: TableFrom = "runs",
    together: Annotated[
        list[str] | None,
        typer.Option(
            "--together", metavar="COLUMN", help="runs equal in it are left out together, as seeds always are"
        ),
    ] = None,
    where: Where = None,
    brief: Brief = False,
    json: AsJson = False,
) -> None:
    """A recipe's robust accuracy before it is trained, with its interval; its own run first where the table has one."""
    collect_rarely()
    from robudget.cli.view.console import show
    from robudget.cli.view.prediction import prediction_text
    from robudget.config import parse_overrides
    from robudget.prediction import PaperGBR, Predictor
    from robudget.recipe import Recipe
    from robudget.tables import read_table
    from robudget.tables.usable import select_rows

    chosen = Recipe.load(recipe, parse_overrides(overrides or []))
    runs = select_rows(read_table(table), parse_overrides(where or []))
    predictor = Predictor.fit(runs, together=together or ())
    prediction = predictor.predict([chosen])[0]
    gbr = None if brief or json else PaperGBR.fit(runs)
    show(json, prediction.to_dict, lambda: prediction_text(chosen.slug, prediction, predictor, gbr))


@app.command()
def plan(
    choices: Annotated[
        list[str] | None, typer.Argument(metavar="[CHOICE=VALUE]...", help="only recipes with, e.g. synthetic=false")
    ] = None,
    table: TableFrom = "runs",
    budget: Annotated[str | None, typer.Option(help="50usd, 100gpu-h, 20kWh, 5kgCO2e, 1e19flops")] = None,
    target: Annotated[float | None, typer.Option(help="robust accuracy to reach, in percent")] = None,
    study: Annotated[
        str | None, typer.Option(help="choose among a study's recipes (a name or a YAML file), not the table's")
    ] = None,
    count_in: Annotated[
        str | None, typer.Option("--in", metavar="UNIT", help="what a target is counted in: usd, gpu-h, kWh, flops, …")
    ] = None,
    where: Where = None,
    prices: Annotated[
        str | None, typer.Option("--prices", help="a YAML file with usd_per_gpu_hour, to add the rent of the GPUs")
    ] = None,
    next_: Annotated[
        int | None, typer.Option("--next", metavar="N", help="instead: the N runs that would tell most, for the money")
    ] = None,
    question: Annotated[
        str, typer.Option(help="what --next is to tell of: exponent, price (of --target), or a choice, e.g. loss")
    ] = "exponent",
    brief: Brief = False,
    json: AsJson = False,
) -> None:
    """What to train for a budget, or the cheapest way to a target, with risk and the price of the next point."""
    collect_rarely()
    from robudget.cli.view.console import show
    from robudget.cli.view.laws import next_text, plan_text
    from robudget.config import parse_overrides
    from robudget.meter.prices import Prices
    from robudget.planning import plan as make_plan
    from robudget.planning import plan_next
    from robudget.planning.cost_model import column_of
    from robudget.sweep.study import recipes_of
    from robudget.tables import read_table
    from robudget.tables.usable import select_rows

    runs = select_rows(read_table(table), parse_overrides(where or []))
    if next_ is not None:
        following = plan_next(
            runs,
            next_,
            question,
            target=target,
            budget=budget,
            candidates=recipes_of(study) if study else None,
            column=column_of(count_in) if count_in else None,
            choose=parse_overrides(choices or []),
        )
        show(json, following.to_dict, lambda: next_text(following, brief))
        return
    result = make_plan(
        runs,
        budget=budget,
        target=target,
        candidates=recipes_of(study) if study else None,
        column=column_of(count_in) if count_in else None,
        choose=parse_overrides(choices or []),
        prices=Prices.load(prices) if prices else None,
    )
    show(json, result.to_dict, lambda: plan_text(result, brief))


@app.command()
def report(
    table: Annotated[str, typer.Argument(help="a folder or URL of runs, a csv or parquet table")] = "runs",
    out: Annotated[Path, typer.Option(callback=local, help="folder for report.html and figures/")] = Path("report"),
    title: Annotated[str, typer.Option(help="heading of the page")] = "What does robustness cost?",
    robustbench: RobustBench = None,
    where: Where = None,
) -> None:
    """One offline interactive page and the paper's figures."""
    collect_rarely()
    from robudget.analysis import analyse
    from robudget.cli.view.console import out as console
    from robudget.config import parse_overrides
    from robudget.report import write
    from robudget.tables import read_table
    from robudget.tables.usable import select_rows

    frame = select_rows(read_table(table), parse_overrides(where or []))
    others = read_table(robustbench) if robustbench else None
    page = write(frame, analyse(frame), out, title=title, others=others)
    console.print(str(page), soft_wrap=True, markup=False)
