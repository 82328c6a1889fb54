"""The command line: thin over the public API, one function a verb. Nothing heavy is imported before it is needed."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, ParamSpec, TypeVar

import typer

from robudget import __version__
from robudget.errors import RobudgetError

EXAMPLES = """
[bold]Examples[/bold]

  robudget demo                               the tour, about 5 minutes
  robudget run digits loss=trades             train, attack, meter a recipe
  robudget run cifar10-smoke data.root=PATH   the same on CIFAR-10
  robudget eval MODEL --data cifar10          attack any PyTorch model
  robudget sweep paper-320 --dry-run          what a study would run
  robudget cost paper-320                     what it would cost
  robudget runs                               the leaderboard
  robudget fit runs                           laws, with intervals
  robudget predict digits --from runs         before it is trained
  robudget plan --from runs --budget 1usd     what to train for that
"""

app = typer.Typer(
    name="robudget",
    help="How much adversarial robustness does your compute buy, and what would the next point cost?",
    epilog=EXAMPLES,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

P = ParamSpec("P")
R = TypeVar("R")

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="e.g. craft.steps=5 threat.eps=8/255")
]
StoreOption = Annotated[str, typer.Option("--store", help="folder of runs")]
Prices = Annotated[
    str | None, typer.Option("--prices", help="prices: a YAML file, a preset or a region (default: paper)")
]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON instead of a table")]
TableFrom = Annotated[
    str, typer.Option("--from", help="a folder of runs, a csv or parquet table, or RobustBench's JSON folder")
]


def main() -> None:
    """The `robudget` command. Exit codes: 0 done, 1 a run failed, 2 bad input, 130 stopped by Ctrl-C."""
    try:
        app()
    except RobudgetError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def resumable(command: Callable[P, R]) -> Callable[P, R]:
    """Ctrl-C in long work is an ordinary way to stop it: say how to go on."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except KeyboardInterrupt:
            print("stopped; what was done is kept, and the same command goes on from there", file=sys.stderr)
            raise typer.Exit(130) from None

    return wrapped


def _version(asked: bool) -> None:
    if asked:
        print(f"robudget {__version__}")
        raise typer.Exit


@app.callback()
def robudget(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    pass


@app.command()
@resumable
def run(
    recipe: Annotated[str, typer.Argument(help="a named recipe (digits, cifar10-smoke, paper, …) or a YAML file")],
    overrides: Overrides = None,
    store: StoreOption = "runs",
    json: AsJson = False,
) -> None:
    """Train a recipe, attack it with the standard ensemble, meter both, and keep the record. Resumes what was begun."""
    from robudget import terminal
    from robudget.config import parse_overrides
    from robudget.recipe import Recipe
    from robudget.runner import run as run_recipe
    from robudget.site import Site
    from robudget.store import load_runs

    site, changes = Site.take(parse_overrides(overrides or []))
    chosen = Recipe.load(recipe, changes)
    with terminal.RunDisplay(chosen.slug) as display:
        result = run_recipe(chosen, store=store, site=site, progress=display.update)
    table = load_runs(result.folder.path)
    if json:
        terminal.print_json(terminal.records(table)[0])
    else:
        terminal.out.print(terminal.leaderboard(table))
        terminal.out.print(f"\n{result.summary}\n{result.folder.path}")


@app.command("eval")
@resumable
def evaluate(
    source: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="a run's folder, weights.safetensors, a timm model, robustbench:…, FILE.py:FUNCTION"
        ),
    ],
    data: Annotated[str | None, typer.Option(help="dataset; a run brings its own")] = None,
    data_root: Annotated[str | None, typer.Option(help="where the dataset lies")] = None,
    model: Annotated[str | None, typer.Option(help="architecture of a safetensors file, e.g. wrn-28-10")] = None,
    norm: Annotated[str, typer.Option(help="linf, l2 or l1")] = "linf",
    eps: Annotated[str | None, typer.Option(help="radius, e.g. 8/255; a run brings its own")] = None,
    version: Annotated[str, typer.Option(help="standard, plus or rand")] = "standard",
    samples: Annotated[int | None, typer.Option(min=1, help="the first n test images; default: all")] = None,
    shard: Annotated[str, typer.Option(help="i/n: the i-th of n contiguous parts; put together with --merge")] = "1/1",
    merge: Annotated[
        list[Path] | None, typer.Option(help="folders of further shards, to be merged with MODEL, a shard too")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 500,
    precision: Annotated[
        str, typer.Option(help="auto, float32 or bfloat16, of the attacks; successes are confirmed in float32")
    ] = "auto",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1")] = "auto",
    out: Annotated[Path | None, typer.Option(help="folder of the results")] = None,
    json: AsJson = False,
) -> None:
    """Attack any classifier with the standard ensemble: a verdict per image, intervals, checks, the bill. Resumes."""
    from robudget import judge, terminal
    from robudget.evaluation.page import page
    from robudget.site import Site
    from robudget.threat import Threat

    if merge:
        merged = judge.merged([Path(source), *merge], out)
        terminal.print_json(merged.summary()) if json else terminal.out.print(page(merged), end="")
        return
    with terminal.EvaluationDisplay(Path(source).name) as display:
        found = judge.judge(
            source,
            dataset=data,
            threat=None if eps is None else Threat(norm, eps),  # type: ignore[arg-type]
            version=version,
            images=samples,
            shard=judge.parse_shard(shard),
            seed=seed,
            batch_size=batch_size,
            precision=precision,
            model=model,
            out=out,
            site=Site(data_root=data_root, device=device),
            progress=display.update,
        )
    if json:
        terminal.print_json(found.to_dict())
    else:
        terminal.out.print(page(found.verdicts), end="")
        terminal.out.print(f"\n{found.folder}")


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
    from robudget import terminal
    from robudget.config import parse_overrides
    from robudget.site import Site
    from robudget.store import Store, load_runs
    from robudget.sweep import Study, weight
    from robudget.sweep import sweep as run_sweep

    site, changes = Site.take(parse_overrides(overrides or []))
    chosen = Study.load(study, changes)
    home = Store(store)
    if dry_run:
        rows = [
            {"run": r.slug, "id": r.id, "state": "done" if home.folder(r).done else "to do"} for r in chosen.recipes
        ]
        if json:
            terminal.print_json(rows)
        else:
            terminal.out.print(terminal.table_of(rows, title=chosen.question, left=("run", "id", "state")))
        return
    with terminal.SweepDisplay(chosen.name) as display:
        state = run_sweep(chosen.recipes, store=store, site=site, workers=workers, weight=weight, watch=display.update)
    mine = {r.id for r in chosen.recipes}
    table = load_runs(store) if home.root.is_dir() else None
    table = table[table.run_id.isin(mine)] if table is not None else None
    if table is not None and json:
        terminal.print_json(terminal.records(table))
    elif table is not None:
        terminal.out.print(terminal.leaderboard(table))
    if state.failed:
        for index, why in state.failed.items():
            print(f"error: {chosen.recipes[index].slug}: {why}", file=sys.stderr)
        raise typer.Exit(1)


@app.command()
def study(
    name: Annotated[str | None, typer.Argument(help="show this one")] = None,
    json: AsJson = False,
) -> None:
    """List the studies that ship with robudget, or show one."""
    from robudget import terminal
    from robudget.config import named
    from robudget.sweep import Study

    studies = [Study.load(n) for n in ([name] if name else named("studies"))]
    rows = [
        {"study": s.name, "runs": str(len(s.recipes)), "axes": " × ".join(s.axes), "question": s.question}
        for s in studies
    ]
    if json:
        terminal.print_json(rows)
    else:
        terminal.out.print(terminal.table_of(rows, left=("study", "axes", "question")))


@app.command()
def runs(
    store: Annotated[str, typer.Argument(help="folder of runs")] = "runs",
    prices: Prices = None,
    json: AsJson = False,
) -> None:
    """The leaderboard of a folder of runs: accuracy with its interval, FLOPs, energy, cost."""
    from robudget import terminal
    from robudget.meter.cost import Prices as PriceList
    from robudget.store import load_runs

    table = load_runs(store, prices=PriceList.load(prices) if prices else None)
    if json:
        terminal.print_json(terminal.records(table))
    elif table.empty:
        terminal.out.print(f"no finished runs in {store!r} yet")
    else:
        terminal.out.print(terminal.leaderboard(table))


@app.command()
@resumable
def cost(
    what: Annotated[str, typer.Argument(metavar="RECIPE|STUDY", help="a recipe or a study, by name or YAML file")],
    overrides: Overrides = None,
    device: Annotated[
        str | None, typer.Option(help="a device of `robudget devices`; default: this machine, calibrated in 20 s")
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, help="how many of them")] = 1,
    prices: Prices = None,
    json: AsJson = False,
) -> None:
    """What a recipe or a whole study will cost, before training: FLOPs, time, energy, money, carbon, with ranges."""
    from robudget import terminal
    from robudget.config import parse_overrides
    from robudget.meter.cost import Prices as PriceList
    from robudget.meter.forecast import forecast_study, total
    from robudget.site import Site
    from robudget.sweep import recipes_of

    site, changes = Site.take(parse_overrides(overrides or []))
    forecasts = forecast_study(
        recipes_of(what, changes),
        device=device,
        gpus=gpus,
        prices=PriceList.load(prices) if prices else None,
        site_device="cpu" if site.device == "auto" else site.device,
        progress=lambda note: print(note, file=sys.stderr),
    )
    if json:
        terminal.print_json([each.to_dict() for each in forecasts])
    else:
        terminal.out.print(terminal.bill([each.to_dict() for each in forecasts], total(forecasts)))


@app.command()
def devices(json: AsJson = False) -> None:
    """The devices that `robudget cost --device` knows: peak, power, attainable share, source."""
    from dataclasses import asdict

    from robudget import terminal
    from robudget.meter.devices import devices as known

    if json:
        terminal.print_json([asdict(device) for device in known().values()])
    else:
        terminal.out.print(terminal.device_table(known().values()))


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


@app.command()
@resumable
def demo(
    out: Annotated[Path, typer.Option(help="where the runs and the report go")] = Path("demo"),
    workers: Annotated[int, typer.Option(min=0, help="processes side by side; 0 = one per core")] = 0,
    json: AsJson = False,
) -> None:
    """The main job on scikit-learn's digits: train, attack, meter, fit a law, write a report. About 5 minutes."""
    from robudget import terminal
    from robudget.demo import demo as run_demo

    with terminal.SweepDisplay("demo") as display:
        result = run_demo(out, workers=workers, watch=display.update)
    if json:
        terminal.print_json(result.to_dict())
    else:
        terminal.out.print(result.text)
