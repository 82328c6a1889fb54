"""The verb that evaluates: any classifier against the ensemble, shards put together, examples shown to another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from robudget.cli.app import AsJson, app, resumable
from robudget.errors import InputError


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
    model: Annotated[str | None, typer.Option(help="architecture of a safetensors file, e.g. wrn-28-10")] = None,
    norm: Annotated[str | None, typer.Option(help="linf, l2 or l1 (default: linf)")] = None,
    eps: Annotated[
        str | None, typer.Option(help="radius, e.g. 8/255; default: the run's, or the data's customary threat")
    ] = None,
    version: Annotated[str, typer.Option(help="standard, plus or rand")] = "standard",
    attack: Annotated[
        list[str] | None,
        typer.Option(help="instead of a version, once or more: pgd:steps=50,restarts=5,loss=cw or square:steps=20000"),
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="the first n test images; default: all")] = None,
    shard: Annotated[str, typer.Option(help="i/n: the i-th of n contiguous parts; put together with --merge")] = "1/1",
    merge: Annotated[bool, typer.Option("--merge", help="put the results of shards (their folders) together")] = False,
    examples: Annotated[bool, typer.Option("--examples", help="keep the adversarial examples (examples.npz)")] = False,
    transfer: Annotated[
        Path | None, typer.Option(help="only show MODEL these examples (examples.npz) of another model")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume/--restart", help="go on with what was begun, or forget it")] = True,
    batch_size: Annotated[int, typer.Option(min=1)] = 500,
    precision: Annotated[
        str, typer.Option(help="auto, float32 or bfloat16, of the attacks; successes are confirmed in float32")
    ] = "auto",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1")] = "auto",
    threads: Annotated[int, typer.Option(min=0, help="CPU threads, 0 = one per core; a resume needs the same")] = 0,
    out: Annotated[Path | None, typer.Option(help="folder of the results")] = None,
    json: AsJson = False,
) -> None:
    """Attack any classifier with the standard ensemble: a verdict per image, intervals, checks, the bill. Resumes."""
    from robudget.benchmark import Candidate, benchmark, merge_shards, parse_shard
    from robudget.benchmark import transfer as transfer_examples
    from robudget.cli.view.console import show
    from robudget.cli.view.progress import EvaluationDisplay
    from robudget.evaluation.specification import Specification
    from robudget.evaluation.verdicts import page
    from robudget.execution import Site
    from robudget.threat import Threat

    if merge:
        verdicts, folder = merge_shards([Path(source) for source in sources], out)
        show(json, lambda: {"folder": str(folder), **verdicts.summary()}, lambda: f"{page(verdicts)}\n{folder}")
        return
    if len(sources) > 1:
        raise InputError(
            f"{len(sources)} models: {' '.join(sources)} (allowed: one, or the folders of shards with --merge)"
        )
    if norm is not None and eps is None:
        raise InputError(f"--norm {norm} needs its radius (--eps 8/255)")
    if attack and version != "standard":
        raise InputError(f"--attack and --version {version} (allowed: one of the two)")
    source, site = sources[0], Site(data_root=data_root, device=device, threads=threads)
    candidate = Candidate.load(source, dataset=data, model=model, site=site)
    if transfer is not None:
        replay = transfer_examples(candidate, transfer, batch_size=batch_size, site=site)
        show(json, lambda: {"examples": str(transfer), **replay.to_dict()}, lambda: f"{transfer}: {replay}")
        return
    threat = candidate.threat if eps is None else Threat(norm or "linf", eps)  # type: ignore[arg-type]
    specification = Specification(
        threat,
        version,
        attack or None,
        seed,
        batch_size,
        precision,  # type: ignore[arg-type]
        examples=examples,
    )
    with EvaluationDisplay(Path(source).name) as display:
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
