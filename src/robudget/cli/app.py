"""The application all verbs belong to, the options they share, and how a command ends."""

from __future__ import annotations

import functools
import gc
import sys
from collections.abc import Callable
from typing import Annotated, ParamSpec, TypeVar

import typer

from robudget import __version__
from robudget.errors import RobudgetError
from robudget.execution import first_process
from robudget.stop import Stopped, on_signals

EXAMPLES = """
[bold]Examples[/bold]

  robudget demo                               the tour, about 5 minutes
  robudget run digits loss=trades             train, attack, meter a recipe
  robudget run cifar10-smoke data.root=PATH   the same on CIFAR-10
  robudget eval MODEL --data cifar10          attack any PyTorch model
  robudget sweep paper-320 --dry-run          what a study would run
  robudget cost paper-320                     what it would cost
  robudget status runs                        how sweeps stand, from any shell
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
Time = Annotated[str | None, typer.Option(help="this job's time (90s, 30min, 2h): saves before it ends, exit code 75")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON instead of a table")]
Brief = Annotated[bool, typer.Option("--brief", help="print only the answer and what it stands on")]
ImageList = Annotated[
    str | None, typer.Option("--image-list", help="imagenet: only these validation images, a file; robustbench: 5,000")
]
Preprocessed = Annotated[
    str | None,
    typer.Option("--preprocessing", help="imagenet: Res256Crop224, BicubicRes256Crop224, …; default: the model's own"),
]
TableFrom = Annotated[
    str, typer.Option("--from", help="a folder or URL of runs, a csv or parquet table, or RobustBench's JSON folder")
]


def main() -> None:
    """The `robudget` command. Exit codes: 0 done, 1 a run failed, 2 bad input, 75 stopped on request with everything
    saved (SIGTERM, SIGUSR1, the end of a job's time, `robudget stop`; running it again goes on), 130 Ctrl-C."""
    try:
        app()
    except RobudgetError as error:
        if first_process():
            print(error if isinstance(error, Stopped) else f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def interruptible(command: Callable[P, R]) -> Callable[P, R]:
    """Ctrl-C in long work is an ordinary way to stop it: say how to go on."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except KeyboardInterrupt:
            if first_process():
                print("stopped; what was done is kept, and the same command goes on from there", file=sys.stderr)
            raise typer.Exit(130) from None

    return wrapped


def collect_rarely() -> None:
    """For commands that make many small objects and end: to look through them all for cycles, again and again, takes a
    fifth of `report`."""
    gc.set_threshold(20_000, 50, 100)


def resumable(command: Callable[P, R]) -> Callable[P, R]:
    """`interruptible`, and a scheduler's SIGTERM or SIGUSR1 lets the work save first (`stop.py`)."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        with on_signals():
            return command(*args, **kwargs)

    return interruptible(wrapped)


def option_names(context: typer.Context) -> list[str]:
    """The options of the command, `--workers` among them."""
    return [name for option in context.command.params for name in option.opts if name.startswith("-")]


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
