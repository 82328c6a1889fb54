"""The columns of a table of runs, once: name, unit, kind, what it is called, how its values are printed.

Every other list of columns is a selection of these. A new column is a line of `_ALL` here and a value in `store.py`,
or in `Recipe.to_row` where the recipe alone gives it. Imports neither torch nor pandas.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from robudget.formats import amount, word
from robudget.losses import LOSSES

# identity: which run it is · scope: runs that differ in it answer different questions · choice: of the recipe ·
# size: follows from the choices and can be counted before training · outcome: measured on test or validation images ·
# cost: of training · evaluation cost · other cost: in no sum · how: how the values of another column were obtained.
Kind = Literal["identity", "scope", "choice", "size", "outcome", "cost", "evaluation cost", "other cost", "how"]
# Of the values: positive numbers that matter by their ratio, other numbers, yes or no, names.
Scale = Literal["log", "number", "flag", "category"]


@dataclass(frozen=True)
class Column:
    """One column of a table of runs.

    `phrase` names it inside a sentence and `short` at the head of a table; `unit` is the table's ("count": a number
    without a unit, written in thousands and millions). `how` is the column that says how its values were obtained,
    `evaluation` the one that holds the same cost of the evaluation. `complement`: this is 100 − that column.
    `images`: the column with the number of images over which this percentage was counted. `words`: how a choice's
    values are written for a reader. `budget`: units in which a user may write an amount, each with its size in the
    table's unit; later names of the same size are other spellings.
    """

    name: str
    kind: Kind
    scale: Scale
    phrase: str
    short: str = ""
    unit: str = ""
    how: str | None = None
    evaluation: str | None = None
    complement: str | None = None
    images: str | None = None
    robust: bool = False  # robustness: runs without an adversary, and collapsed ones, are no point of its laws
    none: bool = False  # a missing value means that there is none; elsewhere it is unknown
    switch: str | None = None  # the choice without which this one has no effect
    spends: bool = False  # changing it changes what training computes, and so its cost
    grouping: bool = False  # the page colours and filters runs by it
    stored: bool = True  # a store's table has it
    words: Mapping[str, str] = field(default_factory=dict, hash=False)
    budget: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "short", self.short or self.phrase)

    @property
    def label(self) -> str:
        """The name with a capital letter: `Training compute`."""
        first = self.phrase[0]
        return (first.upper() if first.isascii() else first) + self.phrase[1:]

    @property
    def axis(self) -> str:
        """The label with the unit: `Training energy (kWh)`."""
        return f"{self.label} ({self.unit})" if self.unit not in ("", "count") else self.label

    @property
    def budget_unit(self) -> str:
        """The unit of a budget that is the table's own; the column's name where there is none."""
        return next((unit for unit, size in self.budget if size == 1), self.name)

    def write(self, value: float | None) -> str:
        """A value of a numeric column for a reader, with its unit."""
        return amount(value, self.unit)

    def level(self, value: object) -> str:
        """A choice's value as a word: `TRADES`, `yes`, `5`, `36.5 M`; unknown where it is missing."""
        if self.unit == "count" and isinstance(value, (int, float)):
            return amount(value, "count")
        text = word(value)
        return self.words.get(text, text)


_LOSSES: dict[str, str] = {name: loss.label for name, loss in LOSSES.items()}
_ACTIVATIONS = {"relu": "ReLU", "gelu": "GELU", "silu": "SiLU"}
_VARIANTS = {"deepmind": "DeepMind's"}  # Gowal et al. 2020; the other value is "original"
_NORMS = {"linf": "L∞", "l2": "L2", "l1": "L1"}
_FLOPS = (("flops", 1.0), ("flop", 1.0), ("TFLOPs", 1e12), ("PFLOPs", 1e15), ("EFLOPs", 1e18))
_TIME = (("h", 3600.0), ("min", 60.0), ("s", 1.0))
_GPU_TIME = (("gpu-h", 1.0), ("gpuh", 1.0), ("gpu-hours", 1.0))
_ENERGY = (("kWh", 1.0), ("Wh", 1e-3), ("MWh", 1e3))
_MONEY = (("usd", 1.0), ("$", 1.0))
_CARBON = (("kgCO2e", 1.0), ("kgCO2", 1.0), ("kg", 1.0), ("gCO2e", 1e-3), ("tCO2e", 1e3))

# In the order of a store's table.
_ALL = (
    Column("run_id", "identity", "category", "run"),
    Column("slug", "identity", "category", "run"),
    Column("path", "identity", "category", "folder"),
    Column("status", "identity", "category", "status"),
    Column("dataset", "scope", "category", "dataset"),
    Column("norm", "scope", "category", "norm", words=_NORMS),
    Column("eps", "scope", "number", "ε"),
    Column("model", "choice", "category", "model", spends=True, grouping=True),
    Column("base", "choice", "log", "base width", spends=True),
    Column("activation", "choice", "category", "activation", grouping=True, words=_ACTIVATIONS),
    Column("variant", "choice", "category", "padding and BatchNorm momentum", "variant", words=_VARIANTS),
    Column("parameters", "size", "log", "parameters", unit="count", spends=True),
    Column("loss", "choice", "category", "loss", grouping=True, words=_LOSSES),
    Column("beta", "choice", "number", "β", none=True, switch="loss"),
    Column("steps", "choice", "log", "attack steps", switch="loss", spends=True, grouping=True),
    Column("craft_method", "choice", "category", "crafting", spends=True),
    Column("epochs", "choice", "log", "epochs", spends=True, grouping=True),
    Column("epoch_images", "choice", "log", "images an epoch", spends=True),
    Column("batch_size", "choice", "log", "batch size"),
    Column("ema", "choice", "flag", "EMA", grouping=True),
    Column("ema_decay", "choice", "number", "EMA decay", none=True, switch="ema"),
    Column("cutmix", "choice", "flag", "CutMix"),
    Column("synthetic", "choice", "flag", "synthetic data", grouping=True),
    Column("synthetic_fraction", "choice", "number", "synthetic share", none=True, switch="synthetic"),
    Column("synthetic_amount", "choice", "log", "synthetic images", unit="count", none=True, switch="synthetic"),
    Column("synthetic_fid", "identity", "number", "Fréchet inception distance of the synthetic images", "FID"),
    Column("seed", "choice", "number", "seed"),
    Column("precision", "choice", "category", "precision"),
    Column("aa_acc", "outcome", "number", "AutoAttack accuracy", "AutoAttack", "%", "aa_acc_how",
           images="n_eval", robust=True),
    Column("aa_acc_how", "how", "category", "the attacks of the AutoAttack accuracy (quick: estimated)"),
    Column("aa_acc_low", "outcome", "number", "AutoAttack accuracy, lower end of its interval", "low", "%"),
    Column("aa_acc_high", "outcome", "number", "AutoAttack accuracy, upper end of its interval", "high", "%"),
    Column("aa_acc_audit_sd", "outcome", "number",
           "standard deviation, in points, that an audit leaves to the AutoAttack accuracy (0: no audit)"),
    Column("n_eval", "outcome", "number", "evaluated images", unit="count"),
    Column("clean_acc", "outcome", "number", "clean accuracy", "clean", "%", images="n_eval"),
    Column("val_acc", "outcome", "number", "validation accuracy (PGD-40)", "val.", "%", robust=True),
    Column("union_acc", "outcome", "number", "accuracy against all threats", "union", "%", "union_acc_how"),
    Column("union_acc_how", "how", "category", "the threats of the accuracy against all threats"),
    Column("corruption_acc", "outcome", "number", "accuracy under corruptions", "corruptions", "%",
           "corruption_acc_how"),
    Column("corruption_acc_how", "how", "category", "where the corruptions came from"),
    Column("unseen_acc", "outcome", "number", "accuracy under unseen attacks", "unseen", "%", "unseen_acc_how"),
    Column("unseen_acc_how", "how", "category", "the unseen attacks and their strengths"),
    Column("collapsed", "outcome", "flag", "collapsed"),
    Column("images_seen", "size", "log", "images seen", "images", "count", spends=True),
    Column("train_flops_exact", "cost", "log", "training compute", "FLOP", "FLOP", "train_flops_how",
           "eval_flops_exact", budget=_FLOPS),
    Column("train_flops_paper", "cost", "log", "training compute as the paper counts it", "FLOP (paper)", "FLOP",
           "train_flops_how", budget=(("paper-flops", 1.0),)),
    Column("train_flops_how", "how", "category", "how training compute was obtained"),
    Column("eval_flops_exact", "evaluation cost", "log", "evaluation compute", "eval FLOP", "FLOP"),
    Column("train_seconds", "cost", "log", "training time", "time", "s", "train_seconds_how", "eval_seconds",
           budget=_TIME),
    Column("train_seconds_how", "how", "category", "how training time was obtained"),
    Column("gpu_hours", "cost", "log", "GPU time", "GPU-h", "GPU-h", "train_seconds_how", budget=_GPU_TIME),
    Column("eval_seconds", "evaluation cost", "log", "evaluation time", "eval time", "s", "train_seconds_how"),
    Column("train_energy_kwh", "cost", "log", "training energy", "energy", "kWh", "train_energy_how",
           "eval_energy_kwh", budget=_ENERGY),
    Column("train_energy_how", "how", "category", "how training energy was obtained"),
    Column("eval_energy_kwh", "evaluation cost", "log", "evaluation energy", "eval energy", "kWh", "eval_energy_how"),
    Column("eval_energy_how", "how", "category", "how evaluation energy was obtained"),
    Column("cost_usd", "cost", "log", "electricity cost", "cost", "$", "cost_usd_how", "eval_cost_usd", budget=_MONEY),
    Column("eval_cost_usd", "evaluation cost", "log", "electricity cost of evaluation", "eval cost", "$",
           "eval_energy_how"),
    Column("cost_usd_how", "how", "category", "how the electricity cost was obtained"),
    Column("co2_kg", "cost", "log", "carbon", "CO₂e", "kg CO₂e", "co2_kg_how", "eval_co2_kg", budget=_CARBON),
    Column("eval_co2_kg", "evaluation cost", "log", "carbon of evaluation", "eval CO₂e", "kg CO₂e", "eval_energy_how"),
    Column("co2_kg_how", "how", "category", "how carbon was obtained"),
    Column("lost_flops", "other cost", "log", "compute of killed attempts", "lost FLOP", "FLOP", "lost_flops_how"),
    Column("lost_flops_how", "how", "category", "how the compute of killed attempts was obtained"),
    Column("rent_usd", "other cost", "log", "rent of GPUs", "rent", "$"),
    Column("synthetic_energy_kwh", "other cost", "log", "energy of making the synthetic images", "synthetic energy",
           "kWh", "synthetic_energy_how"),
    Column("synthetic_energy_how", "how", "category", "how the energy of the synthetic images was obtained"),
    # Not in a store's table: they follow from another column, or are known of published runs alone.
    Column("aa_error", "outcome", "number", "AutoAttack error", "AA error", "%", complement="aa_acc", images="n_eval",
           robust=True, stored=False),
    Column("clean_error", "outcome", "number", "clean error", unit="%", complement="clean_acc", images="n_eval",
           stored=False),
    Column("val_error", "outcome", "number", "validation error (PGD-40)", "val. error", "%", complement="val_acc",
           robust=True, stored=False),
    Column("published_run_tflops", "cost", "log", "compute of one GPU, as published", "TFLOP (published)", "TFLOP",
           stored=False),
    Column("forward_flops", "size", "log", "compute of one image", "FLOP an image", "FLOP", stored=False),
    Column("extra_data", "choice", "flag", "extra data", stored=False),
    Column("year", "identity", "number", "year", stored=False),
)  # fmt: skip
COLUMNS: dict[str, Column] = {c.name: c for c in _ALL}


def column(name: str) -> Column:
    """The column of that name; one that robudget does not know is called by its name, without a unit."""
    return COLUMNS.get(name) or Column(name, "outcome", "number", name.replace("_", " "), stored=False)


def stored(*kinds: Kind) -> tuple[str, ...]:
    """The columns of a store's table, in its order, of these kinds (default: all)."""
    return tuple(c.name for c in _ALL if c.stored and (not kinds or c.kind in kinds))


AUDIT_SD = "aa_acc_audit_sd"
SCOPE = stored("scope")
COSTS = stored("cost")
# One each of compute, time, energy, money and carbon.
MAIN_COSTS = tuple(name for name in COSTS if COLUMNS[name].evaluation)
ERRORS = {c.name: c.complement for c in _ALL if c.complement is not None}
ROBUST = tuple(c.name for c in _ALL if c.robust)
GROUPING = tuple(c.name for c in _ALL if c.grouping)
NONE_IF_MISSING = tuple(c.name for c in _ALL if c.none)
ACCURACIES = tuple(c.name for c in _ALL if c.unit == "%" and not c.complement)
# What a predictor may look at before training, in order of precedence: where two say the same in a table (EMA came with
# CutMix and 400 epochs in the paper's), the first stands for both. The paper's own six come first (its Section
# "Prediction").
FEATURES = (
    "parameters", "synthetic", "activation", "loss", "steps", "ema", "epochs", "cutmix", "synthetic_fraction",
    "synthetic_amount", "beta", "variant", "batch_size", "epoch_images", "base", "model", "ema_decay", "precision",
)  # fmt: skip
PAPER_FEATURES = FEATURES[:6]
# Columns that can be an axis, a figure in a sentence, or a cell with a unit.
QUANTITIES = tuple(c.name for c in _ALL if c.unit and c.kind != "choice")
