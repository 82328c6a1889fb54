"""Verbs that run something: a recipe, a study, the demo, an evaluation of any classifier."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from robudget.cli.app import (
    AsJson,
    ImageList,
    Overrides,
    Preprocessed,
    Prices,
    StoreOption,
    Time,
    app,
    option_names,
    resumable,
)
from robudget.errors import InputError, unknown
from robudget.files import local

if TYPE_CHECKING:
    from robudget.recipe import Recipe
    from robudget.sweep.queue import SweepState


@app.command()
@resumable
def run(
    recipe: Annotated[str, typer.Argument(help="a named recipe (digits, cifar10-smoke, paper, …) or a YAML file")],
    overrides: Overrides = None,
    store: StoreOption = "runs",
    time: Time = None,
    json: AsJson = False,
) -> None:
    """Train a recipe, attack it with the standard ensemble, meter both, and keep the record. Resumes what was begun."""
    from robudget.cli.sweep_terms import set_end
    from robudget.cli.view.console import RunDisplay, out, show
    from robudget.cli.view.runs import leaderboard
    from robudget.config import parse_overrides
    from robudget.execution import Site, adopt_slurm, first_process
    from robudget.files import to_plain
    from robudget.recipe import Recipe
    from robudget.runner import run as run_recipe
    from robudget.tables.read import load_runs

    os.environ.update(adopt_slurm())
    site, changes = Site.take(parse_overrides(overrides or []))
    chosen = Recipe.load(recipe, changes)
    set_end(time)
    with RunDisplay(chosen.slug) as display:
        result = run_recipe(chosen, store=store, site=site, progress=display.update)
    if not first_process():
        return
    table = load_runs(result.folder.path)
    show(json, lambda: to_plain(table)[0], lambda: leaderboard(table))
    if not json:
        out.print(f"\n{result.summary}\n{result.folder.path}")


@app.command(context_settings={"ignore_unknown_options": True})
@resumable
def sweep(
    context: typer.Context,
    study: Annotated[str, typer.Argument(help="a named study (robudget study lists them) or a YAML file")],
    overrides: Overrides = None,
    store: StoreOption = "runs",
    workers: Annotated[int, typer.Option(min=0, help="processes side by side; 0 = one per GPU, else one per core")] = 0,
    on: Annotated[str, typer.Option(help="local, ray, ray:ADDRESS or slurm; further options are its own")] = "local",
    order: Annotated[str, typer.Option(help="longest-first, cheapest-first or frontier-first")] = "longest-first",
    budget: Annotated[
        str | None, typer.Option(help="start no run that would pass it: 10usd, 50gpu-h, 5kWh, for the study in all")
    ] = None,
    prices: Prices = None,
    only: Annotated[list[str] | None, typer.Option(help="only runs whose name or id has this, e.g. 'wrn-28-*'")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="start so many of the missing runs at most")] = None,
    time: Time = None,
    max_failures: Annotated[
        int | None, typer.Option(min=1, help="end when so many runs have failed; default: when 5 fail for one cause")
    ] = None,
    halving: Annotated[
        int, typer.Option(help="of so many runs one trains on at each rung of validation, the others end early")
    ] = 0,
    end_collapsed: Annotated[
        bool, typer.Option("--end-collapsed", help="end a run where catastrophic overfitting is seen on validation")
    ] = False,
    detach: Annotated[bool, typer.Option("--detach", help="go on without this terminal; see robudget status")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="list what would run, and what it would cost")] = False,
    device: Annotated[
        str | None, typer.Option(help="with --dry-run: forecast for a device of `robudget devices`")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="run a study of more than a million runs")] = False,
    json: AsJson = False,
) -> None:
    """Run every recipe of a study, several side by side; skips what is done and resumes what was begun."""
    from robudget.cli.sweep_terms import (
        chosen_recipes,
        detached,
        dry_run_text,
        early_text,
        forecast_rows,
        set_end,
        terms_of,
    )
    from robudget.cli.view.console import SweepDisplay, out, show
    from robudget.config import parse_overrides
    from robudget.execution import Site
    from robudget.store import Store
    from robudget.sweep.drive import drive
    from robudget.sweep.executor import open_executor, split_address, split_options
    from robudget.sweep.frontier import with_frontier
    from robudget.sweep.halving import Adaptive
    from robudget.sweep.study import MOST, Study

    words, options = split_options(overrides or [])
    split_address(on)
    if device is not None and not dry_run:
        raise InputError(f"--device {device} without --dry-run (allowed: device=auto, cpu, cuda or cuda:1)")
    if options and on == "local":
        raise unknown("option of robudget sweep", f"--{next(iter(options))}", option_names(context))
    if on == "slurm" and time is not None:  # of each job, not of this process
        options, time = options | {"time": time}, None
    site, changes = Site.take(parse_overrides(words))
    chosen = Study.load(study, changes, most=None if yes else MOST)
    recipes = chosen_recipes(chosen, only)
    terms = terms_of(
        chosen, recipes, store, site, on,
        order=order, budget=budget, prices=prices, limit=limit, max_failures=max_failures,
        adaptive=Adaptive(halving, end_collapsed),
    )  # fmt: skip
    if dry_run:
        rows = forecast_rows(recipes, Store(store), terms, device)
        show(json, lambda: rows, lambda: dry_run_text(rows, chosen.question))
        return
    set_end(time)
    if detach:
        out.print(detached(Store(store), chosen.name))
        return

    def run_all(recipes: Sequence[Recipe], title: str) -> SweepState:
        with SweepDisplay(title) as display:
            return drive(
                recipes,
                lambda runs: open_executor(on, site=site, workers=workers, runs=runs, options=options),
                store=store,
                site=site,
                terms=terms,
                watch=display.update,
            )

    state = with_frontier(chosen, recipes, Store(store), run_all)
    # pandas is imported after the first runs are under way
    from robudget.cli.view.runs import leaderboard
    from robudget.tables.read import load_runs

    mine = {r.id for r in recipes}
    table = load_runs(store) if Store(store).root.is_dir() else None
    table = table[table.run_id.isin(mine)] if table is not None else None
    if table is not None:
        show(json, lambda: table, lambda: leaderboard(table))
    for index, why in state.failed.items():
        print(f"error: {recipes[index].slug}: {why}", file=sys.stderr)
    if said := early_text(state, Store(store), terms):
        print(said, file=sys.stderr)
    left = len(recipes) - state.done - len(state.failed) - state.early
    if state.ended:
        print(f"ended with {left} runs not done: {state.ended}", file=sys.stderr)
    elif left:
        print(f"{left} more runs of the study are not done (--limit {limit})", file=sys.stderr)
    if state.failed:
        raise typer.Exit(1)


@app.command()
@resumable
def demo(
    out: Annotated[Path, typer.Option(callback=local, help="where the runs and the report go")] = Path("demo"),
    workers: Annotated[int, typer.Option(min=0, help="processes side by side; 0 = one per core")] = 0,
    json: AsJson = False,
) -> None:
    """The main job on scikit-learn's digits: train, attack, meter, fit a law, write a report. About 5 minutes."""
    from robudget.cli.view.console import SweepDisplay, show
    from robudget.cli.view.runs import demo_text
    from robudget.demo import demo as run_demo

    with SweepDisplay("demo") as display:
        result = run_demo(out, workers=workers, watch=display.update)
    show(json, result.to_dict, lambda: demo_text(result))


@app.command("eval")
@resumable
def evaluate(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL",
            help="a run's folder, weights.safetensors, a timm model, robustbench:…, FILE.py:FUNCTION; shards' folders",
        ),
    ],
    data: Annotated[str | None, typer.Option(help="dataset; a run brings its own")] = None,
    data_root: Annotated[str | None, typer.Option(help="where the dataset lies")] = None,
    image_list: ImageList = None,
    preprocessing: Preprocessed = None,
    model: Annotated[str | None, typer.Option(help="architecture of a safetensors file, e.g. wrn-28-10")] = None,
    threat: Annotated[
        list[str] | None,
        typer.Option(help="once or more: linf:8/255, l2:0.5; all: the data's usual three. Several: the union too"),
    ] = None,
    norm: Annotated[str | None, typer.Option(help="linf, l2 or l1 (default: linf)")] = None,
    eps: Annotated[
        str | None, typer.Option(help="radius, e.g. 8/255; default: the run's, or the data's customary threat")
    ] = None,
    version: Annotated[str, typer.Option(help="standard, plus, rand or quick (short attacks, an audit)")] = "standard",
    attack: Annotated[
        list[str] | None,
        typer.Option(help="instead of a version, once or more: pgd:steps=50,restarts=5,loss=cw or square:steps=20000"),
    ] = None,
    add: Annotated[
        list[str] | None,
        typer.Option(help="one more attack, after the others, once or more: transfer:FILE (another's examples.npz)"),
    ] = None,
    votes: Annotated[
        int | None,
        typer.Option(min=1, help="a randomised model errs where it does in most of so many passes (rand: 100, else 1)"),
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="the first n test images; default: all")] = None,
    shard: Annotated[str, typer.Option(help="i/n: the i-th of n contiguous parts; put together with --merge")] = "1/1",
    merge: Annotated[bool, typer.Option("--merge", help="put the results of shards (their folders) together")] = False,
    examples: Annotated[bool, typer.Option("--examples", help="keep the adversarial examples (examples.npz)")] = False,
    transfer: Annotated[
        Path | None, typer.Option(help="only show MODEL these examples (examples.npz) of another model")
    ] = None,
    backward: Annotated[
        str,
        typer.Option(
            metavar="FILE.py:FUNCTION",
            help="a differentiable stand-in for MODEL that gradients are taken through (its logits still decide); own: "
            "the model's surrogate(), where it has one; none",
        ),
    ] = "own",
    compare: Annotated[
        Path | None,
        typer.Option(
            help="only compare the verdicts in the folder MODEL with others' on the same images: another folder, "
            "AutoAttack's state, a JSON or CSV of verdicts, a RobustBench entry"
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume/--restart", help="go on with what was begun, or forget it")] = True,
    batch_size: Annotated[int, typer.Option(min=1)] = 500,
    precision: Annotated[
        str, typer.Option(help="auto, float32 or bfloat16, of the attacks; successes are confirmed in float32")
    ] = "auto",
    confirm: Annotated[
        str, typer.Option(help="survivors of a low precision attacked again in float32: auto (some), all or none")
    ] = "auto",
    until: Annotated[
        float | None, typer.Option(help="version quick: audit until the interval is so many points to either side")
    ] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1")] = "auto",
    threads: Annotated[
        int, typer.Option(min=0, help="CPU threads, 0 = this process's share of the cores; a resume keeps its number")
    ] = 0,
    cuda_graphs: Annotated[
        bool, typer.Option("--cuda-graphs/--no-cuda-graphs", help="on CUDA, launch an attack's step as one graph")
    ] = True,
    cpu_watts: Annotated[float | None, typer.Option(help="the CPUs' draw under load, where nothing tells it")] = None,
    gpu_watts: Annotated[float | None, typer.Option(help="the GPU's, likewise")] = None,
    overhead: Annotated[
        float, typer.Option(help="energy at the plug ÷ that of GPU, CPU and memory, if measured")
    ] = 1.0,
    out: Annotated[Path | None, typer.Option(help="folder of the results")] = None,
    json: AsJson = False,
) -> None:
    """Attack any classifier with the standard ensemble: a verdict per image, intervals, checks, the bill. Resumes."""
    from robudget.benchmark import Candidate, benchmark, merge_shards, parse_shard
    from robudget.benchmark import compare as compare_with
    from robudget.benchmark import transfer as transfer_examples
    from robudget.beyond import Asked, merge_folders
    from robudget.beyond import threats as under_threats
    from robudget.cli.view.console import EvaluationDisplay, show
    from robudget.evaluation.specification import Specification
    from robudget.evaluation.verdicts import page
    from robudget.execution import Site
    from robudget.threat import Threat, parse_threats

    if merge and (merged := merge_folders([Path(source) for source in sources], out)) is not None:
        folder, whole = merged
        show(json, lambda: {"folder": str(folder), **whole.summary()}, lambda: f"{whole.page()}\n{folder}")
        return
    if merge:
        verdicts, folder = merge_shards([Path(source) for source in sources], out)
        show(json, lambda: {"folder": str(folder), **verdicts.summary()}, lambda: f"{page(verdicts)}\n{folder}")
        return
    if len(sources) > 1:
        raise InputError(
            f"{len(sources)} models: {' '.join(sources)} (allowed: one, or the folders of shards with --merge)"
        )
    if compare is not None:
        comparison = compare_with(sources[0], compare)
        show(json, comparison.to_dict, lambda: str(comparison))
        return
    if norm is not None and eps is None:
        raise InputError(f"--norm {norm} needs its radius (--eps 8/255)")
    if attack and version != "standard":
        raise InputError(f"--attack and --version {version} (allowed: one of the two)")
    watts = {"cpu_watts": cpu_watts, "gpu_watts": gpu_watts}
    source = sources[0]
    site = Site(
        data_root=data_root,
        device=device,
        threads=threads,
        overhead=overhead,
        cuda_graphs=cuda_graphs,
        **watts,  # type: ignore[arg-type]
    )
    candidate = Candidate.load(
        source,
        dataset=data,
        model=model,
        backward=backward,
        image_list=image_list,
        preprocessing=preprocessing,
        site=site,
    )
    if transfer is not None:
        replay = transfer_examples(candidate, transfer, batch_size=batch_size, site=site)
        show(json, lambda: {"examples": str(transfer), **replay.to_dict()}, lambda: f"{transfer}: {replay}")
        return
    chosen = parse_threats(threat or (), candidate.dataset.name)
    if chosen and (norm or eps):
        raise InputError("--threat and --norm or --eps (allowed: one of the two ways)")
    alone = Threat(norm or "linf", eps) if eps is not None else None  # type: ignore[arg-type]
    specification = Specification(
        chosen[0] if chosen else alone or candidate.threat,
        version,
        attack or None,
        seed,
        batch_size,
        precision,  # type: ignore[arg-type]
        examples=examples,
        confirm=confirm,  # type: ignore[arg-type]
        until=until,
        add=add or (),
        votes=votes,
    )
    with EvaluationDisplay(Path(source).name) as display:
        if len(chosen) > 1:
            asked = Asked(site, samples, parse_shard(shard), out, not resume, progress=display.update)
            folder, union = under_threats(candidate, specification, chosen, asked)
            show(json, lambda: {"folder": str(folder), **union.summary()}, lambda: f"{union.page()}\n{folder}")
            return
        result = benchmark(
            candidate,
            specification,
            images=samples,
            shard=parse_shard(shard),
            out=out,
            restart=not resume,
            site=site,
            progress=display.update,
        )
    show(json, result.to_dict, lambda: f"{page(result.verdicts)}\n{result.folder}")
