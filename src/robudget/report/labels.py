"""How columns are named and how numbers are written: the one place where the report turns data into words.

An unknown number (None, NaN, ±∞) reads "unknown", never 0, in every function here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from robudget.threat import format_eps

UNKNOWN = "unknown"


@dataclass(frozen=True)
class Quantity:
    """A numeric column: `name` for an axis, `short` for a table head, `unit` as printed, `how` = the column that says
    how it was obtained (None where it needs no saying)."""

    column: str
    name: str
    short: str
    unit: str
    how: str | None = None

    @property
    def axis(self) -> str:
        return f"{self.name} ({self.unit})" if self.unit else self.name


QUANTITIES: dict[str, Quantity] = {
    q.column: q
    for q in (
        Quantity("aa_acc", "AutoAttack accuracy", "AutoAttack", "%"),
        Quantity("aa_error", "AutoAttack error", "AA error", "%"),
        Quantity("clean_acc", "Clean accuracy", "clean", "%"),
        Quantity("val_acc", "Validation accuracy (PGD-40)", "val.", "%"),
        Quantity("train_flops_exact", "Training compute", "FLOP", "FLOP", "train_flops_how"),
        Quantity(
            "train_flops_paper", "Training compute as the paper counts it", "FLOP (paper)", "FLOP", "train_flops_how"
        ),
        Quantity("published_run_tflops", "Compute of one GPU, as published", "TFLOP (published)", "TFLOP"),
        Quantity("eval_flops_exact", "Evaluation compute", "eval FLOP", "FLOP"),
        Quantity("train_energy_kwh", "Training energy", "energy", "kWh", "train_energy_how"),
        Quantity("eval_energy_kwh", "Evaluation energy", "eval energy", "kWh", "eval_energy_how"),
        Quantity("cost_usd", "Electricity cost", "cost", "$", "cost_usd_how"),
        Quantity("eval_cost_usd", "Electricity cost of evaluation", "eval cost", "$", "eval_energy_how"),
        Quantity("eval_co2_kg", "Carbon of evaluation", "eval CO₂e", "kg CO₂e", "eval_energy_how"),
        Quantity("co2_kg", "Carbon", "CO₂e", "kg CO₂e", "co2_kg_how"),
        Quantity("train_seconds", "Training time", "time", "s", "train_seconds_how"),
        Quantity("gpu_hours", "GPU time", "GPU-h", "GPU-h", "train_seconds_how"),
        Quantity("eval_seconds", "Evaluation time", "eval time", "s", "train_seconds_how"),
        Quantity("parameters", "Parameters", "parameters", ""),
        Quantity("images_seen", "Images seen", "images", ""),
    )
}

FEATURES: dict[str, str] = {
    "synthetic": "synthetic data",
    "synthetic_fraction": "synthetic share",
    "loss": "loss",
    "parameters": "parameters",
    "steps": "attack steps",
    "activation": "activation",
    "ema": "EMA",
    "cutmix": "CutMix",
    "epochs": "epochs",
    "model": "model",
    "base": "base width",
    "variant": "variant",
    "batch_size": "batch size",
    "ema_decay": "EMA decay",
    "beta": "β",
    "seed": "seed",
    "dataset": "dataset",
    "eps": "ε",
    "train_flops_exact": "compute (exact)",
    "train_flops_paper": "compute (paper)",
    "images_seen": "images seen",
}


def short(name: str) -> str:
    """A leaderboard's entry as authors and year, then the model: `Wang2023Better_WRN-70-16` → `Wang 2023 WRN-70-16`."""
    match = re.fullmatch(r"([A-Za-z]+?)(\d{4})[A-Za-z0-9]*?(?:_(.*))?", name)
    return " ".join(part for part in match.groups() if part).replace("_", " ") if match else name


def phrase(column: str) -> str:
    """A quantity inside a sentence: lower case but for names."""
    name = quantity(column).name
    return name if name.startswith("AutoAttack") else name[0].lower() + name[1:]


def capital(text: str) -> str:
    """The first letter raised, the rest as it is."""
    return text[:1].upper() + text[1:]


def formula(text: str) -> str:
    """`y = C·x^α` as it is written by hand: `y = C·xᵅ`."""
    for plain, raised in (("^−α", "⁻ᵅ"), ("^α", "ᵅ"), ("^γ", "ᵞ")):
        text = text.replace(plain, raised)
    return text


def quantity(column: str) -> Quantity:
    """The quantity of a column; a column that robudget does not know is named by itself, without a unit."""
    return QUANTITIES.get(column) or Quantity(column, column.replace("_", " "), column.replace("_", " "), "")


def feature(name: str) -> str:
    return FEATURES.get(name, name.replace("_", " "))


def known(value: object) -> bool:
    """Whether a cell holds something: not None, NaN, pandas' NA or NaT, or an infinity."""
    if value is None or type(value).__name__ in (
        "NAType",
        "NaTType",
    ):  # by name: the command line starts without pandas
        return False
    return not isinstance(value, float) or math.isfinite(value)


_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number(value: float | None, digits: int = 3) -> str:
    """`digits` significant digits; `1.23×10¹⁷` at and above 1e6 or below 1e-4; thousands separated."""
    if value is None or not known(float(value)):
        return UNKNOWN
    value = float(value)
    if value == 0:
        return "0"
    sign, size = ("−" if value < 0 else ""), abs(value)
    power = math.floor(math.log10(float(f"{size:.{digits - 1}e}")))
    if power >= 6 or power < -4:
        mantissa = f"{size / 10.0**power:.{digits - 1}f}"
        return f"{sign}{mantissa}×10{str(power).translate(_SUPERSCRIPT)}"
    return f"{sign}{size:,.{max(digits - 1 - power, 0)}f}"


def fixed(value: float | None, decimals: int = 1, *, signed: bool = False) -> str:
    if value is None or not known(float(value)):
        return UNKNOWN
    text = f"{float(value):+.{decimals}f}" if signed else f"{float(value):.{decimals}f}"
    return text.replace("-", "−")


def percent(value: float | None, decimals: int = 1) -> str:
    text = fixed(value, decimals)
    return text if text == UNKNOWN else text + "%"


def interval(low: float | None, high: float | None, decimals: int = 1) -> str:
    """`[61.2, 64.0]`; an end that is unknown says so; both unknown is just "unknown"."""
    ends = fixed(low, decimals), fixed(high, decimals)
    return UNKNOWN if ends == (UNKNOWN, UNKNOWN) else f"[{ends[0]}, {ends[1]}]"


def scaled(value: float | None, steps: Iterable[tuple[float, str]], digits: int = 3) -> str:
    """`value` in the largest unit of `steps` (size, name; ascending) that keeps it at or above 1."""
    if value is None or not known(float(value)):
        return UNKNOWN
    if value == 0:
        return f"0 {next(iter(steps))[1]}"
    chosen = None
    for size, name in steps:
        if chosen is None or abs(value) >= size:
            chosen = size, name
    assert chosen is not None
    return f"{number(float(value) / chosen[0], digits)} {chosen[1]}"


def seconds(value: float | None) -> str:
    return scaled(value, ((1, "s"), (60, "min"), (3600, "h")))


def gpu_hours(value: float | None) -> str:
    return scaled(value, ((1, "GPU-h"),))


def energy(kwh: float | None) -> str:
    return scaled(kwh, ((1e-6, "mWh"), (1e-3, "Wh"), (1, "kWh"), (1e3, "MWh")))


def carbon(kg: float | None) -> str:
    return scaled(kg, ((1e-6, "mg CO₂e"), (1e-3, "g CO₂e"), (1, "kg CO₂e"), (1e3, "t CO₂e")))


def dollars(usd: float | None) -> str:
    if usd is None or not known(float(usd)):
        return UNKNOWN
    if usd == 0 or abs(usd) >= 0.995:
        return f"${usd:,.2f}"
    return f"${number(usd, 2)}"


def flop(value: float | None) -> str:
    text = number(value)
    return text if text == UNKNOWN else f"{text} FLOP"


def count(value: float | None) -> str:
    """Large counts in thousands, millions and billions: `36.5 M`."""
    return scaled(value, ((1, ""), (1e3, "k"), (1e6, "M"), (1e9, "G"))).strip()


_WRITERS = {
    "FLOP": flop,
    "kWh": energy,
    "kg CO₂e": carbon,
    "$": dollars,
    "s": seconds,
    "GPU-h": gpu_hours,
    "%": percent,
}


def write(column: str, value: float | None) -> str:
    """The value of a column as a reader wants it, with its unit."""
    q = quantity(column)
    if q.unit in _WRITERS:
        return _WRITERS[q.unit](value)
    return count(value) if column in ("parameters", "images_seen") else number(value)


def word(value: object) -> str:
    """A recipe's choice as text: true → yes, 5.0 → 5, unknown → unknown."""
    if not known(value):
        return UNKNOWN
    if isinstance(value, bool) or type(value).__name__ == "bool_":
        return "yes" if value else "no"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return f"{value:g}" if isinstance(value, float) else str(value)


LOSSES = {"standard": "standard", "at": "AT", "trades": "TRADES", "mart": "MART"}
ACTIVATIONS = {"relu": "ReLU", "gelu": "GELU", "silu": "SiLU"}


def choice(column: str, value: str) -> str:
    """The word of a recipe's choice as the field writes it: `trades` → TRADES, `relu` → ReLU."""
    return {"loss": LOSSES, "activation": ACTIVATIONS}.get(column, {}).get(value, value)


def threat(norm: object, eps: object) -> str:
    """`L∞ 8/255`."""
    name = {"linf": "L∞", "l2": "L2", "l1": "L1"}.get(str(norm), word(norm))
    return f"{name} {format_eps(float(eps))}" if isinstance(eps, (int, float)) and known(float(eps)) else name
