"""A recipe: every choice that changes the result of a run, and nothing else.

Frozen, typed and complete. A recipe reads from YAML and from `key=value` overrides with dots, writes back to YAML, and
has a content id: the hash of its fields that differ from the schema's defaults, so that a new field with a neutral
default orphans no run. What does not change a result (folders, device, threads, workers) is in `Site`, not here.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from robudget.config import Number, load_yaml, merge, nest, one_line, read_named
from robudget.errors import InputError, nearest
from robudget.losses import LOSSES, LossName
from robudget.recipe.parts import (
    AwpPart,
    CollapsePart,
    CraftPart,
    DataPart,
    EmaPart,
    EvaluationPart,
    ModelPart,
    OptimPart,
    Part,
    Share,
    SyntheticPart,
    TrainingBall,
    ValidationPart,
)
from robudget.threat import Threat

SCHEMA = 1
_LATER = ("confirm", "until")


class Recipe(Part):
    """Every choice that changes a result. `id` names the training, `evaluation_id` the evaluation."""

    schema_: int = Field(SCHEMA, alias="schema")
    seed: int = Field(0, ge=0)
    model: ModelPart = ModelPart()
    data: DataPart = DataPart()
    synthetic: SyntheticPart = SyntheticPart()
    threat: TrainingBall = TrainingBall()
    loss: LossName = "at"
    beta: Number = Field(6.0, ge=0)  # weight of the robust term in TRADES, MART, IKL (its paper: 20) and grad-norm (1)
    metric: Literal["kl", "squared"] = "kl"  # cross-entropy and KL, or squared distances (SCORE/LSE, Pang 2022)
    label_smoothing: Share = 0.0
    craft: CraftPart = CraftPart()
    optim: OptimPart = OptimPart()
    ema: EmaPart = EmaPart()
    awp: AwpPart = AwpPart()
    epochs: int = Field(100, ge=1)
    epoch_images: int | None = Field(None, ge=1)  # of the mixed stream; null = as many as there are real images
    batch_size: int = Field(256, ge=1)
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    validation: ValidationPart = ValidationPart()
    collapse: CollapsePart = CollapsePart()
    evaluation: EvaluationPart = EvaluationPart()

    model_config = ConfigDict(populate_by_name=True)

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.schema_ != SCHEMA:
            raise InputError(f"schema = {self.schema_} is from another version of robudget (this one reads {SCHEMA})")
        if self.adversarial and self.craft.steps == 0:
            raise InputError(
                f"craft.steps = 0 with loss = {self.loss!r}: an adversarial loss needs at least 1 (or loss=standard)"
            )
        if LOSSES[self.loss].steps == 1 != self.craft.steps:
            raise InputError(
                f"craft.steps = {self.craft.steps} with loss = {self.loss!r}: it takes 1 step by definition"
            )
        if LOSSES[self.loss].remembers:
            self._can_remember()
        if self.threat.warmup_epochs:
            self._can_warm_up()
        self._can_craft()
        if self.synthetic.later:
            self._can_change_fraction()
        if self.optim.nesterov and self.optim.momentum == 0:
            raise InputError("optim.nesterov = true with optim.momentum = 0: Nesterov's step needs momentum")
        if (self.optim.schedule == "trapezoid") != (self.optim.decay_epochs is not None):
            said = "null" if self.optim.decay_epochs is None else f"{self.optim.decay_epochs:g}"
            raise InputError(
                f"optim.decay_epochs = {said} with optim.schedule = {self.optim.schedule} (allowed: a number with "
                "trapezoid, null elsewhere)"
            )
        if self.optim.decay_epochs is not None:
            before = self.epochs - self.optim.cooldown_epochs - self.optim.warmup_epochs
            if self.optim.decay_epochs > before:
                raise InputError(
                    f"optim.decay_epochs = {self.optim.decay_epochs:g} (allowed: at most {before:g} of epochs)"
                )
        if self.ema.equal_after is not None and self.ema.equal_after >= self.epochs:
            raise InputError(f"ema.equal_after = {self.ema.equal_after:g} leaves nothing of epochs = {self.epochs}")
        if self.optim.cooldown_epochs >= self.epochs:
            raise InputError(
                f"optim.cooldown_epochs = {self.optim.cooldown_epochs:g} leaves nothing of epochs = {self.epochs}"
            )
        return self

    def _can_craft(self) -> None:
        """Crafting is a choice of its own where the loss leaves it open; what is a loss by itself has one name."""
        loss, craft, said = LOSSES[self.loss], self.craft, f"with loss = {self.loss!r}"
        fixed = not loss.adversarial or loss.replays or loss.remembers
        for name, value in (("method", craft.method), ("objective", craft.objective)):
            if value is not None and (fixed or self.loss in ("fgsm-rs", "n-fgsm")):
                raise InputError(f"craft.{name} = {value} {said}, which says how it crafts (allowed: null)")
        if craft.objective == loss.craft:
            raise InputError(f"craft.objective = {craft.objective} {said}, whose own it is (allowed: null)")
        if self.loss == "at" and craft.method is not None and craft.objective is None:
            raise InputError(f"craft.method = {craft.method} {said} is loss={craft.method} (allowed: that)")
        if craft.method is not None and craft.steps != 1:
            raise InputError(f"craft.steps = {craft.steps} with craft.method = {craft.method} (allowed: 1)")
        if craft.grad_align:
            said = f"craft.grad_align = {craft.grad_align:g}"
            if fixed:
                raise InputError(
                    f"{said} with loss = {self.loss!r} (allowed: 0, or a loss that crafts and then updates)"
                )
            if self.threat.norm != "linf":
                raise InputError(f"{said} with threat.norm = {self.threat.norm} (allowed: linf)")
        if self.differentiates_twice and self.awp.gamma is not None:
            raise InputError(f"awp.gamma = {self.awp.gamma:g} with a penalty on gradients (allowed: null)")
        if loss.penalises and self.metric != "kl":
            raise InputError(f"metric = {self.metric} with loss = {self.loss!r} (allowed: kl)")

    def _can_change_fraction(self) -> None:
        """Every phase begins after the one before, and within the training."""
        before = 0.0
        for epoch, _ in self.synthetic.later:
            if not before < epoch < self.epochs:
                raise InputError(
                    f"synthetic.later has a fraction from epoch {epoch:g} on (allowed: epochs that grow, above 0 and "
                    f"below epochs = {self.epochs})"
                )
            before = epoch

    def _can_warm_up(self) -> None:
        """A radius that grows needs perturbations that are made afresh in every step, and an end."""
        loss, said = LOSSES[self.loss], f"threat.warmup_epochs = {self.threat.warmup_epochs:g}"
        if not loss.adversarial:
            raise InputError(f"{said} with loss = {self.loss!r}, which crafts nothing (allowed: 0)")
        if loss.replays or loss.remembers:
            raise InputError(f"{said} with loss = {self.loss!r}, whose perturbations outlive a step (allowed: 0)")
        if self.threat.warmup_epochs >= self.epochs:
            raise InputError(f"{said} leaves nothing of epochs = {self.epochs}")

    def _can_remember(self) -> None:
        """A perturbation kept of every training image needs images that are the same ones each time."""
        others = {
            "threat.norm": (self.threat.norm, "linf"),
            "synthetic.source": (self.synthetic.source, None),
            "data.cutmix": (self.data.cutmix, False),
            "awp.gamma": (self.awp.gamma, None),
            "metric": (self.metric, "kl"),
        }
        for key, (value, allowed) in others.items():
            if value != allowed:
                raise InputError(
                    f"{key} = {value} with loss = {self.loss!r}, which remembers a perturbation of every real image "
                    f"(allowed: {'null' if allowed is None else str(allowed).lower()})"
                )

    @property
    def adversarial(self) -> bool:
        return LOSSES[self.loss].adversarial

    @property
    def crafting(self) -> str:
        """How it crafts where that is not the loss's own way, in a few words; "own" where it is."""
        craft = self.craft
        parts = (craft.method, craft.objective, f"align {craft.grad_align:g}" if craft.grad_align else None)
        return " ".join(part for part in parts if part) or "own"

    @property
    def raises(self) -> Literal["none", "ce", "kl"]:
        """What the attack raises, as in `Loss.craft`."""
        return self.craft.objective or LOSSES[self.loss].craft

    @property
    def differentiates_twice(self) -> bool:
        """Does the update differentiate a gradient of the images?"""
        return LOSSES[self.loss].penalises or self.craft.grad_align > 0

    @property
    def evaluation_threat(self) -> Threat:
        return (self.evaluation.threat or self.threat).threat()

    @property
    def synthetic_share(self) -> float:
        """The synthetic images' share of all that are trained on."""
        phases = self.synthetic.phases
        if len(phases) == 1:
            return self.synthetic.share
        ends = [*(epoch for epoch, _ in phases[1:]), self.epochs]
        return sum(share * (end - begin) for (begin, share), end in zip(phases, ends, strict=True)) / self.epochs

    # -- identity ---------------------------------------------------------------------------------------------------

    def changes(self) -> dict[str, Any]:
        """Dotted key → value of every field that differs from the default; the schema number is always in it."""
        fields, default = dict(_leaves(self.to_dict())), dict(_leaves(Recipe().to_dict()))
        return {"schema": self.schema_} | {
            key: value for key, value in fields.items() if key not in default or value != default[key]
        }

    @cached_property
    def id(self) -> str:
        """12 hex digits naming the training: equal for equal choices in any process, Python version or key order."""
        return _digest({k: v for k, v in self.changes().items() if not k.startswith("evaluation.")})

    @cached_property
    def evaluation_id(self) -> str:
        """12 hex digits naming what the trained model is put through (the threat resolved)."""
        threat = self.evaluation_threat
        part = self.evaluation.model_dump(mode="json", exclude={"threat"})
        # Fields that came later are in it only where they say something else than what was always done.
        later = {name: EvaluationPart.model_fields[name].default for name in _LATER}
        part = {name: value for name, value in part.items() if name not in later or value != later[name]}
        return _digest(part | {"norm": threat.norm, "eps": threat.eps})

    @property
    def evaluated_in_full(self) -> Recipe:
        """The same training, and a verdict of the standard ensemble for every image where version quick estimates."""
        if self.evaluation.version != "quick":
            return self
        return self.with_({"evaluation.version": "standard", "evaluation.until": None})

    @property
    def slug(self) -> str:
        """A short readable name; not unique, unlike `id`."""
        loss = self.loss if not self.adversarial else f"{self.loss}{self.craft.steps}"
        parts = [
            self.data.name,
            self.model.name,
            f"b{self.model.base}" if self.model.base != 16 else "",
            self.model.activation if self.model.activation != "relu" else "",
            loss,
            "ema" if self.ema.decay is not None else "swa" if self.ema.averages else "",
            "syn" if self.synthetic.source else "",
            self.crafting.replace(" ", "-") if self.crafting != "own" else "",
        ]
        return "-".join(filter(None, parts))

    # -- in and out -------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Nested plain data, complete, in the order of the schema; ε as `8/255` where it is that."""
        return self.model_dump(mode="json", by_alias=True)

    def to_row(self) -> dict[str, Any]:
        """The columns of a table of runs (`robudget.columns`) that the recipe alone gives; NaN where it leaves one
        open. A store has the `synthetic_amount` that was really read."""
        threat = self.evaluation_threat
        return {
            "run_id": self.id,
            "slug": self.slug,
            "dataset": self.data.name,
            "norm": threat.norm,
            "eps": threat.eps,
            "model": self.model.name,
            "base": self.model.base,
            "activation": self.model.activation,
            "variant": self.model.variant,
            "loss": self.loss,
            "beta": self.beta if LOSSES[self.loss].beta else math.nan,
            "steps": self.craft.steps if self.adversarial else 0,
            "craft_method": self.crafting,
            "epochs": self.epochs,
            "epoch_images": _or_nan(self.epoch_images),
            "batch_size": self.batch_size,
            "ema": self.ema.decay is not None,
            "ema_decay": _or_nan(self.ema.decay),
            "cutmix": self.data.cutmix,
            "synthetic": self.synthetic.source is not None,
            "synthetic_fraction": self.synthetic_share,
            "synthetic_amount": _or_nan(self.synthetic.amount),
            "seed": self.seed,
            "precision": self.precision,
        }

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, where: str = "recipe") -> Recipe:
        """Validate nested plain data. Raises InputError: one line naming `where`, the key and what is allowed."""
        _check_keys(cls, data, where)
        try:
            return cls.model_validate(dict(data))
        except ValidationError as error:
            raise InputError(f"{where}: {one_line(error)}") from None
        except InputError as error:
            raise InputError(f"{where}: {error}") from None

    @classmethod
    def from_yaml(cls, text: str, *, where: str = "recipe") -> Recipe:
        return cls.from_dict(load_yaml(text, where), where=where)

    @classmethod
    def load(cls, source: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
        """A named recipe (`recipes/<name>.yaml` of the package) or a YAML file, with dotted overrides on top."""
        text, where = read_named("recipes", "recipe", source)
        return cls.from_dict(merge(load_yaml(text, where), nest(overrides or {})), where=where)

    def with_(self, overrides: Mapping[str, Any], *, where: str = "recipe") -> Recipe:
        """A copy with dotted keys replaced, validated again: `recipe.with_({"craft.steps": 5})`. Parts that stay equal
        are the same objects, so that the 10,000 recipes of a study take little memory."""
        new = Recipe.from_dict(merge(self.to_dict(), nest(overrides)), where=where)
        for name in Recipe.model_fields:
            if isinstance(part := getattr(self, name), Part) and part == getattr(new, name):
                new.__dict__[name] = part  # frozen, and checked
        object.__setattr__(
            new, "__pydantic_fields_set__", _ALL
        )  # which fields were given: 2 KiB where each has its own
        return new


_ALL = set(Recipe.model_fields)


def wide_resnet(name: str) -> tuple[int, int] | None:
    """Depth and width of a model called `wrn-<depth>-<width>`; None for any other."""
    match = re.fullmatch(r"wrn-(\d+)-(\d+)", name.lower())
    return (int(match[1]), int(match[2])) if match else None


# -- keys and their errors --------------------------------------------------------------------------------------------


def keys() -> list[str]:
    """Every dotted key of a recipe, in the order of the schema."""
    return [key for key, _ in _fields(Recipe)]


def _fields(part: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, info in part.model_fields.items():
        key = prefix + (info.alias or name)
        inner = _part_of(info.annotation)
        if inner is not None:
            yield from _fields(inner, key + ".")
        else:
            yield key, info


def _part_of(annotation: Any) -> type[Part] | None:
    for option in (annotation, *get_args(annotation)):
        if isinstance(option, type) and issubclass(option, Part):
            return option
    return None


def _check_keys(part: type[BaseModel], data: Mapping[str, Any], where: str, prefix: str = "") -> None:
    """Unknown keys name the nearest valid one, looked for among the siblings first and then in the whole recipe."""
    allowed = {info.alias or name: info for name, info in part.model_fields.items()}
    for key, value in data.items():
        if key not in allowed:
            sibling = nearest(key, allowed, 0.6)
            others = [k for k in keys() if k.rpartition(".")[2] == key] or keys()
            near = prefix + sibling if sibling else nearest(key, others, 0.4)
            meant = f"; did you mean {near!r}?" if near else ""
            raise InputError(
                f"{where}: unknown key {prefix + key!r}{meant} (allowed: {', '.join(prefix + k for k in allowed)})"
            )
        inner = _part_of(allowed[key].annotation)
        if inner is not None and value is not None:
            if not isinstance(value, Mapping):
                raise InputError(
                    f"{where}: {prefix + key} = {value!r} must hold keys ({', '.join(inner.model_fields)})"
                )
            _check_keys(inner, value, where, prefix + key + ".")


def _leaves(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _digest(data: Mapping[str, Any]) -> str:
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
