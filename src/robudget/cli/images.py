"""The verb that looks at images before anything is trained on them: how near generated ones come to test images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from robudget.cli.app import AsJson, app


@app.command()
def leakage(
    generated: Annotated[
        Path, typer.Argument(metavar="GENERATED", help="generated images: an npz, parquet files, or class sub-folders")
    ],
    data: Annotated[str, typer.Option(help="the dataset whose test images are looked for")] = "cifar10",
    data_root: Annotated[str | None, typer.Option(help="where the dataset lies")] = None,
    amount: Annotated[int | None, typer.Option(min=1, help="the first n generated images; default: all")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="the first n test images; default: all")] = None,
    within: Annotated[float, typer.Option(help="levels of 255 (root mean square) that count as near")] = 8.0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1")] = "auto",
    out: Annotated[Path | None, typer.Option(help="folder for every test image's neighbours and a picture")] = None,
    json: AsJson = False,
) -> None:
    """How near generated images come to test images, beside the training images: leaked ones show as near pairs."""
    import sys

    from robudget import data as datasets
    from robudget.cli.view.console import show
    from robudget.data.leakage import audit
    from robudget.data.synthetic import read
    from robudget.environment import resolve_device

    dataset = datasets.load(data, root=data_root)
    images = read(generated, dataset, cache=None).first(amount)

    def progress(done: float) -> None:
        if sys.stderr.isatty():
            print(f"\r{100 * done:3.0f}% compared", end="\n" if done == 1 else "", file=sys.stderr, flush=True)

    found = audit(images, dataset, samples=samples, within=within, device=resolve_device(device), progress=progress)
    if out is not None:
        found.save(out)
    show(json, found.summary, lambda: found.page() if out is None else f"{found.page()}\n{out}")
