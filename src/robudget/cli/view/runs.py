"""Runs as text for a terminal: the leaderboard, what runs will cost, devices, what the demo ends with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd
from rich.console import Group
from rich.text import Text

from robudget.cli.view.console import TextTable, notes
from robudget.columns import COSTS, MAIN_COSTS, column
from robudget.formats import amount_range, fixed, interval, known, number, word
from robudget.store import ENDED_EARLY

if TYPE_CHECKING:
    from robudget.demo import DemoResult
    from robudget.doctor import Line
    from robudget.meter.devices import Device

MOST = 40  # forecasts shown
EVALUATION = ("eval_seconds", "eval_energy_kwh")


def leaderboard(table: pd.DataFrame, top: int = 0) -> Group:
    """Runs, most robust first, the best `top` of them (0: all); an estimated value is marked."""
    noted = bool((table.collapsed | (table.status != "done")).any())
    rows = []
    ordered = table.sort_values(["aa_acc", "train_flops_exact"], ascending=[False, True], na_position="last")
    shown = ordered.head(top or len(ordered))
    for rank, (_, run) in enumerate(shown.iterrows(), 1):
        note = run.status if run.status != "done" else "collapsed" if run.collapsed else ""
        rows.append({
            "rank": str(rank), "run": run.slug, "id": run.run_id, "AutoAttack %": fixed(run.aa_acc),
            "95% interval": interval(run.aa_acc_low, run.aa_acc_high), "clean %": fixed(run.clean_acc),
            "images": word(run.n_eval), **({"note": note} if noted else {}),
            **{column(name).short: _cost(run, name) for name in (*MAIN_COSTS, *EVALUATION)},
        })  # fmt: skip
    lines = [Text("~ is estimated, not measured", style="dim")] if "~" in str(rows) else []
    if early := int((table.status == ENDED_EARLY).sum()):
        lines.append(Text(f"{early} ended early by a sweep, in no law; the sweep without --halving and --end-collapsed "
                          "finishes them (robudget status says why)", style="dim"))  # fmt: skip
    if len(shown) < len(table):
        lines.append(Text(f"the best {len(shown)} of {len(table)} runs; --top 0 or --json: all", style="dim"))
    for how in dict.fromkeys(table.synthetic_energy_how[table.synthetic]):
        lines.append(Text(f"energy of making synthetic images, not in the sums: {how}", style="dim"))
    return Group(TextTable(rows, left=("run", "id", "note")), *lines)


def _cost(run: pd.Series, name: str) -> str:
    cost, value = column(name), run[name]
    text = cost.write(value).removesuffix(" FLOP")
    return f"~{text}" if known(value) and cost.how is not None and run[cost.how] == "estimated" else text


def forecasts_text(runs: Sequence[Mapping[str, Any]], total: Mapping[str, Any]) -> Group:
    """What runs will cost: a line each (the first 40) and the total, ranges in brackets."""
    first = runs[:MOST]
    rows = [_forecast_row(run["slug"], run) for run in first]
    if len(runs) > 1:
        rows.append(_forecast_row(f"all {len(runs)} runs", total))
    above = [Text(f"on {runs[0]['device']}; every figure but FLOPs and parameters is estimated, [low to high]")]
    if len(runs) > len(first):
        above.append(Text(f"the first {len(first)} of {len(runs)} runs; --json has them all", style="dim"))
    synthetic = dict.fromkeys(run["synthetic"] for run in first if run["synthetic"] != "none")
    below = [f"synthetic data, not in the sums: {how}" for how in synthetic]
    shares = [100 * run["flops_not_counted_share"] for run in runs]
    share = " to ".join(dict.fromkeys(number(end, 2) for end in (min(shares), max(shares))))
    below.append(f"FLOPs leave out {share}% of the work: normalisation, activations, sums (--json lists them)")
    remarks = dict.fromkeys(note for run in runs for note in (run["basis"], *run["notes"]))
    return Group(*above, TextTable(rows, left=("run",)), *(Text(line, style="dim") for line in below), *notes(remarks))


def _forecast_row(name: str, forecast: Mapping[str, Any]) -> dict[str, str]:
    row = {"run": name}
    for cost in (column(c) for c in (*COSTS, "eval_seconds") if c in forecast):
        low, high = (forecast.get(f"{cost.name}_{end}") for end in ("low", "high"))
        text = amount_range(forecast[cost.name], low, high, cost.unit, 2)
        row[cost.short] = text.removesuffix(" FLOP")
    return row


def device_table(devices: Iterable[Device]) -> TextTable:
    rows = [
        {
            "device": device.key,
            "name": device.name,
            "watts": number(device.watts),
            "peak TFLOP/s": ", ".join(f"{name} {peak / 1e12:.4g}" for name, peak in device.peak.items()),
            "memory GB": number(device.memory_gb),
            "source": device.source,
        }
        for device in devices
    ]
    return TextTable(rows, left=("device", "name", "peak TFLOP/s", "source"))


def doctor_text(lines: Sequence[Line]) -> Group:
    """A table a part."""
    parts = dict.fromkeys(line.part for line in lines)
    tables = [
        TextTable(
            [{"what": line.name, "is": line.value, "because": line.why} for line in lines if line.part == part],
            title=part,
            left=("what", "is", "because"),
        )
        for part in parts
    ]
    return Group(*tables)


def demo_text(result: DemoResult) -> str:
    """The four things a newcomer wants to see."""
    return (
        f"law     {result.law}\n"
        f"        {result.formula}\n"
        f"        {result.trust}\n"
        f"best    {result.best}\n"
        f"spent   {result.seconds:.0f} s of work in {result.runs} runs, {result.wh:.3g} Wh, "
        f"{result.co2_g:.3g} g CO2e ({result.how})\n"
        f"report  {result.report}"
    )
