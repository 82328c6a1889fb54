"""Verbs that evaluate a classifier beyond one threat: the robustness curve, corruptions, unseen attacks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from robudget.cli.app import AsJson, ImageList, Preprocessed, app, resumable

if TYPE_CHECKING:
    from robudget.benchmark import Candidate
    from robudget.beyond import Asked
    from robudget.evaluation.measurement import Measured

Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="a run's folder, weights.safetensors, a timm model, robustbench:…, FILE:NAME"),
]
Data = Annotated[str | None, typer.Option("--data", help="dataset; a run brings its own")]
DataRoot = Annotated[str | None, typer.Option("--data-root", help="where the dataset lies")]
Architecture = Annotated[str | None, typer.Option("--model", help="architecture of a safetensors file, e.g. wrn-28-10")]
Samples = Annotated[int | None, typer.Option("--samples", min=1, help="the first n test images; default: all")]
Shard = Annotated[str, typer.Option("--shard", help="i/n: the i-th of n parts; put together with eval --merge")]
Resume = Annotated[bool, typer.Option("--resume/--restart", help="go on with what was begun, or forget it")]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1)]
Seed = Annotated[int, typer.Option("--seed", min=0)]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1")]
Threads = Annotated[int, typer.Option("--threads", min=0, help="CPU threads, 0 = this process's share of the cores")]
Out = Annotated[Path | None, typer.Option("--out", help="folder of the results")]


@app.command()
@resumable
def curve(
    model: Model,
    data: Data = None,
    data_root: DataRoot = None,
    image_list: ImageList = None,
    preprocessing: Preprocessed = None,
    architecture: Architecture = None,
    norm: Annotated[str | None, typer.Option(help="linf, l2 or l1; default: that of the model's threat")] = None,
    eps: Annotated[str | None, typer.Option(help="where the curve ends; default: twice the ε of the threat")] = None,
    attack: Annotated[
        list[str] | None, typer.Option(help="minimum-norm attacks: fmn:steps=100, fab-t:targets=3,steps=30 (default)")
    ] = None,
    samples: Samples = None,
    shard: Shard = "1/1",
    resume: Resume = True,
    batch_size: BatchSize = 500,
    seed: Seed = 0,
    device: Device = "auto",
    threads: Threads = 0,
    out: Out = None,
    json: AsJson = False,
) -> None:
    """Accuracy at every ε: how near the nearest adversarial point of each image is, an upper bound. Resumes."""
    from robudget.beyond import robustness_curve
    from robudget.evaluation.curve import ATTACKS
    from robudget.threat import parse_eps

    _evaluated(
        model,
        lambda candidate, asked: robustness_curve(
            candidate,
            asked,
            norm=norm,  # type: ignore[arg-type]
            limit=None if eps is None else parse_eps(eps),
            attacks=attack or ATTACKS,
        ),
        (data, data_root, image_list, preprocessing, architecture),
        (samples, shard, resume, batch_size, seed, device, threads, out),
        json,
    )


@app.command()
@resumable
def corruptions(
    model: Model,
    kinds: Annotated[
        list[str] | None, typer.Argument(metavar="[KIND]...", help="e.g. fog gaussian_noise; default: the usual 15")
    ] = None,
    corruption_root: Annotated[
        Path | None, typer.Option(help="read them from here, in CIFAR-10-C's layout; default: computed")
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(help="folder of another model's result, to which errors are relative (mCE)")
    ] = None,
    data: Data = None,
    data_root: DataRoot = None,
    image_list: ImageList = None,
    preprocessing: Preprocessed = None,
    architecture: Architecture = None,
    samples: Samples = None,
    shard: Shard = "1/1",
    resume: Resume = True,
    batch_size: BatchSize = 500,
    seed: Seed = 0,
    device: Device = "auto",
    threads: Threads = 0,
    out: Out = None,
    json: AsJson = False,
) -> None:
    """Accuracy under common corruptions: 15 kinds at 5 severities, with intervals, and their mean. Resumes."""
    from robudget.beyond import under_corruptions

    _evaluated(
        model,
        lambda candidate, asked: under_corruptions(
            candidate, asked, kinds=kinds or (), root=corruption_root, reference=reference
        ),
        (data, data_root, image_list, preprocessing, architecture),
        (samples, shard, resume, batch_size, seed, device, threads, out),
        json,
    )


@app.command()
@resumable
def unseen(
    model: Model,
    attack: Annotated[
        list[str] | None, typer.Option(help="once or more: elastic:eps=1,steps=50, jpeg, gabor; default: all three")
    ] = None,
    data: Data = None,
    data_root: DataRoot = None,
    image_list: ImageList = None,
    preprocessing: Preprocessed = None,
    architecture: Architecture = None,
    samples: Samples = None,
    shard: Shard = "1/1",
    resume: Resume = True,
    batch_size: BatchSize = 500,
    precision: Annotated[str, typer.Option(help="auto, float32 or bfloat16, of the attacks")] = "auto",
    seed: Seed = 0,
    device: Device = "auto",
    threads: Threads = 0,
    out: Out = None,
    json: AsJson = False,
) -> None:
    """Accuracy under attacks outside the norms, that nothing here trains against: elastic, JPEG, Gabor. Resumes."""
    from robudget.beyond import unseen_attacks
    from robudget.evaluation.unseen import ATTACKS

    _evaluated(
        model,
        lambda candidate, asked: unseen_attacks(candidate, asked, attacks=attack or ATTACKS),
        (data, data_root, image_list, preprocessing, architecture),
        (samples, shard, resume, batch_size, seed, device, threads, out),
        json,
        precision,
    )


def _evaluated(
    model: str,
    run: Callable[[Candidate, Asked], tuple[Path, Measured]],
    data: tuple[str | None, str | None, str | None, str | None, str | None],
    how: tuple[int | None, str, bool, int, int, str, int, Path | None],
    json: bool,
    precision: str = "float32",
) -> None:
    """Load the model and its data, run, print."""
    from robudget.benchmark import Candidate, parse_shard
    from robudget.beyond import Asked
    from robudget.cli.view.console import EvaluationDisplay, show
    from robudget.execution import Site

    dataset, data_root, image_list, preprocessing, architecture = data
    samples, shard, resume, batch_size, seed, device, threads, out = how
    site = Site(data_root=data_root, device=device, threads=threads)
    candidate = Candidate.load(
        model,
        dataset=dataset,
        model=architecture,
        image_list=image_list,
        preprocessing=preprocessing,
        site=site,
    )
    with EvaluationDisplay(Path(model).name) as display:
        asked = Asked(
            site,
            samples,
            parse_shard(shard),
            out,
            not resume,
            seed,
            batch_size,
            precision,  # type: ignore[arg-type]
            display.update,
        )
        folder, result = run(candidate, asked)
    show(json, lambda: {"folder": str(folder), **result.summary()}, lambda: f"{result.page()}\n{folder}")
