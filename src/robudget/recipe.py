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
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError, model_validator

from robudget.config import Number, load_yaml, merge, nest, one_line, read_named
from robudget.errors import InputError, nearest
from robudget.losses import LOSSES, LossName
from robudget.threat import Norm, Threat, format_eps, parse_eps

SCHEMA = 1


Eps = Annotated[float, BeforeValidator(parse_eps), PlainSerializer(format_eps, when_used="json")]
Share = Annotated[Number, Field(ge=0, lt=1)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)


class Ball(_Part):
    """A threat: what an adversary may do."""

    norm: Norm = "linf"
    eps: Eps = 8 / 255

    @model_validator(mode="after")
    def _possible(self) -> Ball:
        if self.eps == 0 or (self.norm == "linf" and self.eps > 1):
            raise InputError(
                f"threat.eps = {format_eps(self.eps)} is outside (0, 1] (images live in [0, 1]; write 8/255)"
            )
        return self

    def threat(self) -> Threat:
        return Threat(self.norm, self.eps)


class TrainingBall(Ball):
    """The training threat; evaluation uses the same ball unless `evaluation.threat` says otherwise."""

    warmup_epochs: Number = Field(0.0, ge=0)  # ε of crafting grows linearly over so many; validation has all of it


class ModelPart(_Part):
    """The classifier. `name` is `wrn-<depth>-<width>` or any name that `robudget.models.build` knows."""

    name: str = "wrn-28-10"
    activation: Literal["relu", "gelu", "silu"] = "relu"
    variant: Literal["original", "deepmind"] = "original"  # padding and BatchNorm momentum, as in Gowal 2020
    base: int = Field(16, ge=1)  # channels of a WideResNet's stem; any model is base/16 times as wide as published
    patch: int | None = Field(None, ge=1)  # patch size of a timm transformer; null = as published
    init: str | None = None  # SHA-256 of the file of weights to start from, which `Site.weights` names; null = fresh

    @model_validator(mode="after")
    def _digest(self) -> ModelPart:
        if self.init is not None and not re.fullmatch("[0-9a-f]{64}", self.init):
            raise InputError(
                f"model.init = {self.init!r} is no SHA-256 (allowed: null, 64 hex digits; name a file by "
                "model.weights=<best.safetensors of a run>)"
            )
        return self


class DataPart(_Part):
    """The real images. `name` is a dataset that `robudget.data` can read; where it lies is `Site.data_root`."""

    name: str = "cifar10"
    amount: int | None = Field(None, ge=1)  # the first n training images; null = all
    crop: int = Field(4, ge=0)  # random crop after padding by so many pixels; 0 = none
    flip: bool = True
    cutmix: bool = False
    randaugment: Number = Field(0.0, ge=0, le=10)  # magnitude of two random operations an image; 0 = none
    image_size: int | None = Field(None, ge=8, le=1024)  # scale and crop to so many pixels; null = as the dataset is


class SyntheticPart(_Part):
    """Generated images mixed into every batch. `source`: null, `mixture` (fitted on the training split) or `file`."""

    source: Literal["mixture", "file"] | None = None
    amount: int | None = Field(None, ge=1)  # take (or generate) the first n
    fraction: Share = 0.7  # of every batch
    relabel: bool = False  # labels made by a teacher (`Site.teacher`) in place of the file's own

    @property
    def share(self) -> float:
        """The fraction that is really mixed in: 0 without a source."""
        return self.fraction if self.source else 0.0


class CraftPart(_Part):
    """How adversarial examples are made during training (paper: 1.5·ε/steps, uniform start, 10 steps)."""

    steps: int = Field(10, ge=0)
    step_size: Number | None = Field(None, gt=0)  # null = 1.5·ε/steps
    start: Literal["uniform", "gaussian", "none"] = "uniform"
    batchnorm: Literal["eval", "batch"] = "eval"  # statistics used while crafting; never updated by it
    precision: Literal["same", "float32", "bfloat16"] = "same"  # same = as the update's

    def step_size_for(self, eps: float) -> float:
        return self.step_size if self.step_size is not None else 1.5 * eps / max(self.steps, 1)


class OptimPart(_Part):
    name: str = "sgd"
    lr: Number = Field(0.1, gt=0)
    lr_batch: int | None = Field(256, ge=1)  # lr is for this batch size and scales linearly with it; null = as given
    momentum: Number = Field(0.9, ge=0, lt=1)
    nesterov: bool = False
    weight_decay: Number = Field(5e-4, ge=0)
    decay_norm: bool = False  # weight decay on BatchNorm and biases too
    schedule: Literal["cosine", "piecewise", "onecycle", "constant"] = "cosine"
    warmup_epochs: Number = Field(0.0, ge=0)
    cooldown_epochs: Number = Field(0.0, ge=0)  # at the end, of `epochs`: at the lowest lr
    final: Share = 0.0  # the lowest lr of the cosine, as a share of the peak
    clip: Number | None = Field(None, gt=0)  # gradient norm; null = none


class EmaPart(_Part):
    decay: Number | None = Field(None, gt=0, lt=1)  # null = no EMA; the paper: 0.995
    warmup: bool = True  # decay_t = min(decay, (1 + t) / (10 + t))
    evaluate: bool = True  # validate and keep the average; false = the raw weights


class AwpPart(_Part):
    """Adversarial weight perturbation (Wu 2020): weights move against the loss before every update."""

    gamma: Number | None = Field(None, gt=0)  # relative to each layer's norm; null = off, 0.005 to 0.01 in the paper
    after_epochs: Number = Field(0.0, ge=0)


class CollapsePart(_Part):
    """The watch for catastrophic overfitting: one-step against multi-step robust accuracy, every epoch."""

    action: Literal["off", "warn", "stop", "restore"] = "warn"  # restore = back to before it, at half the lr
    images: int = Field(128, ge=1)  # of the held-out split
    steps: int = Field(10, ge=2)
    # Collapsed: one-step − multi-step accuracy above this; multi-step below 0.3 × clean and fallen to half of its best.
    gap: Share = 0.2


class ValidationPart(_Part):
    """How the best checkpoint is chosen: PGD on a split held out of the training set (or the paper's test subset)."""

    split: Literal["holdout", "paper"] = "holdout"
    fraction: Share = 0.1  # of the training set, held out
    images: int | None = Field(None, ge=1)  # the first n of the split; null = all
    steps: int = Field(40, ge=1)
    step_size: Number | None = Field(None, gt=0)  # null = 2.5·ε/steps (Madry 2018)
    every: int = Field(1, ge=1)  # epochs
    patience: int | None = Field(None, ge=1)  # stop after so many validations without a better one; null = never

    def step_size_for(self, eps: float) -> float:
        return self.step_size if self.step_size is not None else 2.5 * eps / self.steps


class EvaluationPart(_Part):
    """What the trained model is put through. Hashed apart from training: one run can have many evaluations."""

    version: Literal["standard", "plus", "rand", "quick"] = "standard"
    images: int | None = Field(None, ge=1)  # the first n of the test split; null = all
    threat: Ball | None = None  # null = the training threat
    seed: int = Field(0, ge=0)
    batch_size: int = Field(500, ge=1)
    until: Number | None = Field(None, gt=0)  # version quick: audit until the interval is so many points to either side
    confirm: Literal["auto", "all", "none"] = "auto"  # survivors of a low precision that are attacked again in float32

    @model_validator(mode="after")
    def _possible(self) -> EvaluationPart:
        if self.until is not None and self.version != "quick":
            raise InputError(
                f"evaluation.until = {self.until:g} with evaluation.version = {self.version} (allowed: with quick)"
            )
        if self.confirm != "auto" and self.version == "quick":
            raise InputError(
                f"evaluation.confirm = {self.confirm} with evaluation.version = quick, whose audit is in float32 "
                "(allowed: auto)"
            )
        return self


_LATER = ("confirm", "until")


class Recipe(_Part):
    """Every choice that changes a result. `id` names the training, `evaluation_id` the evaluation."""

    schema_: int = Field(SCHEMA, alias="schema")
    seed: int = Field(0, ge=0)
    model: ModelPart = ModelPart()
    data: DataPart = DataPart()
    synthetic: SyntheticPart = SyntheticPart()
    threat: TrainingBall = TrainingBall()
    loss: LossName = "at"
    beta: Number = Field(6.0, ge=0)  # weight of the robust term in TRADES and MART
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
        if self.optim.nesterov and self.optim.momentum == 0:
            raise InputError("optim.nesterov = true with optim.momentum = 0: Nesterov's step needs momentum")
        if self.optim.cooldown_epochs >= self.epochs:
            raise InputError(
                f"optim.cooldown_epochs = {self.optim.cooldown_epochs:g} leaves nothing of epochs = {self.epochs}"
            )
        return self

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
    def evaluation_threat(self) -> Threat:
        return (self.evaluation.threat or self.threat).threat()

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
            "ema" if self.ema.decay is not None else "",
            "syn" if self.synthetic.source else "",
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
            "epochs": self.epochs,
            "epoch_images": _or_nan(self.epoch_images),
            "batch_size": self.batch_size,
            "ema": self.ema.decay is not None,
            "ema_decay": _or_nan(self.ema.decay),
            "cutmix": self.data.cutmix,
            "synthetic": self.synthetic.source is not None,
            "synthetic_fraction": self.synthetic.share,
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
            if isinstance(part := getattr(self, name), _Part) and part == getattr(new, name):
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


def _part_of(annotation: Any) -> type[_Part] | None:
    for option in (annotation, *get_args(annotation)):
        if isinstance(option, type) and issubclass(option, _Part):
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
