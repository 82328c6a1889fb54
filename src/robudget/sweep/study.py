"""A study: a question, a base recipe and axes of named alternatives; their product is the recipes to run.

    question: what does compute buy on digits?
    base: digits                 # a named recipe, or a mapping
    axes:
      size:
        small: {model.base: 4}
        large: {model.base: 16}
      training:
        at-2: {loss: at, craft.steps: 2}
    model_flops: 1e8             # optional: every model is as wide as brings one image nearest to so many FLOP
    flops: 1e13                  # optional: all train for so many FLOP, counted exactly, by longer or shorter epochs
                                 #   (an alternative may set either of the two for itself)
    frontier: standard           # optional: at last, the standard ensemble for the best runs that quick evaluated
    analysis: exponents          # optional: what answers the question from the runs (robudget.answers)
    along: size                  # optional: the axis that the analysis compares
    sizes:                       # optional: the study as `NAME:smoke`, `NAME:small`, …; what each says goes before the
      smoke: {base: digits}      #   study's own, an axis as a whole

Alternatives are dotted overrides, so that an axis may change several fields at once and no combination is meaningless
(standard training has no attack steps). Imports no torch.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robudget.config import load_yaml, named, read_named
from robudget.errors import InputError, unknown
from robudget.recipe import Recipe

KEYS = ("question", "base", "axes", "model_flops", "flops", "frontier", "analysis", "along", "sizes")
LARGEST_BASE = 4096  # 256 times as wide as published
TARGETS = ("model_flops", "flops")  # keys of a study, and of an alternative, that are none of a recipe
MOST = 1_000_000  # runs of a study that nobody has confirmed
NEAR = 1.25  # a model may miss the FLOPs that are asked of it by this factor


@dataclass(frozen=True)
class Study:
    """`recipes` are in the order of the axes, the first axis slowest; no two have the same id. `frontier`: those
    that turn out best for their compute are evaluated in full at last (`frontier.unconfirmed` says which). `choices`:
    of every recipe, its alternative by axis; `analysis`, `along`: what answers the question, and the axis it compares
    (`robudget.answers`)."""

    name: str
    question: str
    axes: Mapping[str, Mapping[str, Mapping[str, Any]]]
    recipes: tuple[Recipe, ...]
    frontier: bool = False
    choices: tuple[Mapping[str, str], ...] = ()
    analysis: str | None = None
    along: str | None = None

    @classmethod
    def load(cls, source: str | Path, overrides: Mapping[str, Any] | None = None, *, most: int | None = MOST) -> Study:
        """A named study (`studies/<name>.yaml` of the package) or a YAML file, `NAME:SIZE` where it comes in sizes;
        `overrides` change every recipe."""
        source, size = split_size(source)
        text, where = read_named("studies", "study", source)
        name = Path(source).stem + (f"-{size}" if size else "")
        data = of_size(load_yaml(text, where), size, where)
        return cls.from_dict(data, name=name, where=where, overrides=overrides, most=most)

    @classmethod
    def from_dict(
        cls,
        data: Mapping[str, Any],
        *,
        name: str,
        where: str = "study",
        overrides: Mapping[str, Any] | None = None,
        most: int | None = MOST,
    ) -> Study:
        """Raises InputError for more than `most` runs, before any is made; None: for no number of them."""
        for key in data:
            if key not in KEYS:
                raise unknown(f"key in study {where}", key, KEYS)
        axes = _axes(data.get("axes") or {}, where)
        size = math.prod(len(alternatives) for alternatives in axes.values())
        if most is not None and size > most:
            raise InputError(f"{where}: the axes have {size:,} combinations (allowed: {most:,}; more with --yes)")
        _refuse_contradictions(axes, where)
        if data.get("along") is not None and data["along"] not in axes:
            raise unknown(f"{where}: axis in along", data["along"], axes)
        base = data.get("base") or {}
        if not isinstance(base, str | Mapping):
            raise InputError(f"{where}: base = {base!r} (allowed: a named recipe, or keys of one)")
        start = Recipe.load(base) if isinstance(base, str) else Recipe.from_dict(base, where=f"{where}: base")
        recipes: dict[str, Recipe] = {}
        choices: dict[str, dict[str, str]] = {}
        for choice in itertools.product(*(axis.items() for axis in axes.values())):
            label = "/".join(str(alternative) for alternative, _ in choice)
            changes = {key: value for _, change in choice for key, value in change.items()}
            model_flops, flops = (changes.pop(key, data.get(key)) for key in TARGETS)
            recipe = start.with_(changes | dict(overrides or {}), where=f"{where}: {label}")
            if model_flops is not None:
                recipe = _of_size(recipe, model_flops, f"{where}: {label}")
            if flops is not None:
                recipe = _at_flops(recipe, flops, f"{where}: {label}")
            recipes.setdefault(recipe.id, recipe)
            names = (str(alternative) for alternative, _ in choice)
            choices.setdefault(recipe.id, dict(zip(axes, names, strict=True)))
        if data.get("frontier") not in (None, "standard"):
            raise InputError(f"{where}: frontier = {data['frontier']!r} (allowed: standard, or leave it out)")
        return cls(
            name, str(data.get("question", "")), axes, tuple(recipes.values()), data.get("frontier") is not None,
            tuple(choices.values()), data.get("analysis"), data.get("along"),
        )  # fmt: skip


def split_size(source: str | Path) -> tuple[str, str | None]:
    """`cifar10-law:small` → name and size; the size is None where none is written."""
    name, colon, size = str(source).rpartition(":")
    return (name, size) if colon and name and size.isidentifier() else (str(source), None)


def of_size(data: Mapping[str, Any], size: str | None, where: str) -> dict[str, Any]:
    """The study as it is at a size: what the size says goes before the study's own, an axis as a whole. Raises
    InputError for a size that it does not have, and where it has some and none is asked for."""
    sizes = data.get("sizes") or {}
    if not isinstance(sizes, Mapping) or not all(isinstance(change, Mapping) for change in sizes.values()):
        raise InputError(f"{where}: sizes must map each size to keys of a study, e.g. smoke: {{base: digits}}")
    if size is None and not sizes:
        return dict(data)
    if size not in sizes:
        if not sizes:
            raise InputError(f"{where} comes in one size (allowed: {where}, not {where}:{size})")
        if size is None:
            choice = ", ".join(f"{where}:{name}" for name in sizes)
            raise InputError(f"study {where} comes in sizes (allowed: {choice})")
        raise unknown(f"size of study {where}", size, sizes)
    change = dict(sizes[size])
    if odd := [key for key in change if key not in KEYS or key in ("sizes", "analysis", "along")]:
        raise unknown(f"key in size {size} of study {where}", odd[0], KEYS)
    out = {key: value for key, value in data.items() if key != "sizes"} | change
    if isinstance(change.get("axes"), Mapping):
        out["axes"] = dict(data.get("axes") or {}) | dict(change["axes"])
    return out


def sizes_in(name: str) -> list[str]:
    """The sizes of a study by its name or file, in its order; none where it comes in one."""
    text, where = read_named("studies", "study", name)
    return list(load_yaml(text, where).get("sizes") or {})


def _axes(axes: Any, where: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Alternatives by axis, each with the dotted keys that it sets (it may have them nested, or set none)."""
    if not isinstance(axes, Mapping) or not all(isinstance(a, Mapping) and a for a in axes.values()):
        raise InputError(f"{where}: axes must map each axis to its named alternatives, e.g. size: {{small: {{…}}}}")
    for axis, alternatives in axes.items():
        for name, change in alternatives.items():
            if change is not None and not isinstance(change, Mapping):
                raise InputError(
                    f"{where}: {axis}: {name} = {change!r} (allowed: keys of a recipe, e.g. {name}: {{model.base: 4}})"
                )
    return {
        str(axis): {str(name): dict(_dotted(change or {})) for name, change in alternatives.items()}
        for axis, alternatives in axes.items()
    }


def _dotted(change: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in change.items():
        if isinstance(value, Mapping) and value:
            yield from _dotted(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _refuse_contradictions(axes: Mapping[str, Mapping[str, Any]], where: str) -> None:
    """Two axes that set one key differently: which of them counts would depend on their order."""
    said: dict[str, tuple[str, Any]] = {}  # by key: an alternative that sets it, and its value
    for axis, alternatives in axes.items():
        mine: dict[str, tuple[str, Any]] = {}
        for name, change in alternatives.items():
            for key, value in change.items():
                here = f"{axis}: {name}"
                there, other = said.get(key, (here, value))
                if other != value:
                    both = f"{there} sets {key} = {other!r} and {here} sets {value!r}"
                    raise InputError(f"{where}: {both} (allowed: one axis for a key)")
                mine.setdefault(key, (here, value))
        said |= mine


def _of_size(recipe: Recipe, flops: Any, where: str) -> Recipe:
    """The recipe with the `model.base` that brings the forward pass of one image nearest to `flops`, which a factor of
    `NEAR` may miss: widths are whole numbers."""
    from robudget.datasets import sizes_of
    from robudget.forecast.forecast import image_flops  # torch, which counts the model

    flops, sizes = _number(flops, "model_flops", where), sizes_of(recipe.data.name)

    def forward(base: int) -> int:
        return image_flops(recipe.with_({"model.base": base}, where=where), sizes)

    base = recipe.model.base
    tried = {base}
    while (base := _clamped(base * math.sqrt(flops / forward(base)))) not in tried:  # FLOPs grow about as base²
        tried.add(base)
    base = min(tried, key=lambda base: abs(math.log(forward(base) / flops)))
    found = forward(base)
    if not 1 / NEAR <= found / flops <= NEAR:
        raise InputError(
            f"{where}: model_flops = {flops:.3g}, but {recipe.model.name} takes {found:.3g} at model.base = {base}, "
            "which is the nearest"
        )
    return recipe.with_({"model.base": base}, where=where)


def _clamped(base: float) -> int:
    return min(max(round(base), 1), LARGEST_BASE)


def _at_flops(recipe: Recipe, flops: Any, where: str) -> Recipe:
    """The recipe with as many images an epoch as bring its training, validation included, nearest to `flops` in all;
    steps are whole, so that it misses by half a step an epoch at most."""
    from robudget.datasets import sizes_of
    from robudget.forecast.forecast import training_flops  # torch, which counts the model

    flops = _number(flops, "flops", where)
    sizes = sizes_of(recipe.data.name)
    one, two = (training_flops(recipe.with_({"epoch_images": n * recipe.batch_size}), sizes) for n in (1, 2))
    steps = 1 + round((flops - one) / (two - one))
    if steps < 1:
        raise InputError(f"{where}: flops = {flops:.3g} is too little for {recipe.epochs} epochs (allowed: {one:.3g})")
    return recipe.with_({"epoch_images": steps * recipe.batch_size}, where=where)


def _number(value: Any, key: str, where: str) -> float:
    if isinstance(value, str):  # YAML reads 1e13 as a word
        with contextlib.suppress(ValueError):
            value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise InputError(f"{where}: {key} = {value!r} (allowed: a positive number, e.g. 1e9)")
    return value


def recipes_of(source: str | Path, overrides: Mapping[str, Any] | None = None) -> list[Recipe]:
    """The recipe or the study of that name or in that file, as a list of recipes.

    A file is a study if it has axes. Raises InputError naming the nearest of either.
    """
    names = {"recipes": named("recipes"), "studies": named("studies")}
    study, _ = split_size(source)
    if study in names["studies"]:
        return list(Study.load(source, overrides).recipes)
    if Path(study).suffix in (".yaml", ".yml"):
        text, where = read_named("studies", "study", study)
        if "axes" in load_yaml(text, where):
            return list(Study.load(source, overrides).recipes)
    elif str(source) not in names["recipes"]:
        raise unknown("recipe or study", source, [*names["recipes"], *names["studies"]])
    return [Recipe.load(source, overrides)]
