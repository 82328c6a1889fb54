"""The parts of a recipe: each one's fields with their defaults, and what is impossible within it.

A new field needs a default that leaves every older recipe what it was: only what differs from the defaults is in an id.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, model_validator

from robudget.config import Number
from robudget.errors import InputError
from robudget.threat import Norm, Threat, format_eps, parse_eps

Eps = Annotated[float, BeforeValidator(parse_eps), PlainSerializer(format_eps, when_used="json")]
Share = Annotated[Number, Field(ge=0, lt=1)]
Fraction = Annotated[Number, Field(ge=0, le=1)]


class Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)


class Ball(Part):
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


class ModelPart(Part):
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


class DataPart(Part):
    """The real images. `name` is a dataset that `robudget.data` can read; where it lies is `Site.data_root`."""

    name: str = "cifar10"
    amount: int | None = Field(None, ge=1)  # the first n training images; null = all
    crop: int = Field(4, ge=0)  # random crop after padding by so many pixels; 0 = none
    flip: bool = True
    cutmix: bool = False
    randaugment: Number = Field(0.0, ge=0, le=10)  # magnitude of two random operations an image; 0 = none
    idbh: Literal["weak", "strong"] | None = None  # augmentation in place of crop and flip (Li & Spratling 2023)
    image_size: int | None = Field(None, ge=8, le=1024)  # scale and crop to so many pixels; null = as the dataset is


class SyntheticPart(Part):
    """Generated images mixed into every batch. `source`: null, `mixture` (fitted on the training split) or `file`."""

    source: Literal["mixture", "file"] | None = None
    amount: int | None = Field(None, ge=1)  # take (or generate) the first n
    fraction: Fraction = 0.7  # of every batch; 1 = no real image is trained on
    # [[epochs done, the fraction from then on], …]: [[6000, 0.875]] after fraction = 1 (Bartoldson et al. 2024)
    later: tuple[tuple[Number, Fraction], ...] = ()
    relabel: bool = False  # labels made by a teacher (`Site.teacher`) in place of the file's own

    @property
    def phases(self) -> tuple[tuple[float, float], ...]:
        """(epochs done, the fraction from then on), the first one from 0 on; one of 0 without a source."""
        return ((0.0, self.fraction), *self.later) if self.source else ((0.0, 0.0),)

    @property
    def share(self) -> float:
        """The largest fraction that is ever mixed in: 0 without a source."""
        return max(fraction for _, fraction in self.phases)


class CraftPart(Part):
    """How adversarial examples are made during training (paper: 1.5·ε/steps, uniform start, 10 steps)."""

    steps: int = Field(10, ge=0)
    step_size: Number | None = Field(None, gt=0)  # null = 1.5·ε/steps
    start: Literal["uniform", "gaussian", "none"] = "uniform"
    batchnorm: Literal["eval", "batch"] = "eval"  # statistics used while crafting; never updated by it
    precision: Literal["same", "float32", "bfloat16"] = "same"  # same = as the update's
    method: Literal["fgsm-rs", "n-fgsm"] | None = (
        None  # one step as that loss takes it; null = PGD, or as the loss says
    )
    objective: Literal["ce", "kl"] | None = (
        None  # what is raised: cross-entropy or KL(clean ‖ adversarial); null = the loss's
    )
    grad_align: Number = Field(
        0.0, ge=0
    )  # weight of GradAlign's penalty: 0.2 at ε = 8/255 on CIFAR-10 in its paper; 0 = off

    def step_size_for(self, eps: float) -> float:
        return self.step_size if self.step_size is not None else 1.5 * eps / max(self.steps, 1)


class OptimPart(Part):
    name: str = "sgd"
    lr: Number = Field(0.1, gt=0)
    lr_batch: int | None = Field(256, ge=1)  # lr is for this batch size and scales linearly with it; null = as given
    momentum: Number = Field(0.9, ge=0, lt=1)
    nesterov: bool = False
    weight_decay: Number = Field(5e-4, ge=0)
    decay_norm: bool = False  # weight decay on BatchNorm and biases too
    schedule: Literal["cosine", "piecewise", "onecycle", "constant", "trapezoid"] = "cosine"
    warmup_epochs: Number = Field(0.0, ge=0)
    cooldown_epochs: Number = Field(0.0, ge=0)  # at the end, of `epochs`: at the lowest lr
    final: Share = 0.0  # the lowest lr of the cosine and the trapezoid, as a share of the peak
    decay_epochs: Number | None = Field(None, gt=0)  # of the trapezoid: its way down, at the end of `epochs`
    clip: Number | None = Field(None, gt=0)  # gradient norm; null = none


class EmaPart(Part):
    decay: Number | None = Field(None, gt=0, lt=1)  # null = no EMA; the paper: 0.995
    warmup: bool = True  # decay_t = min(decay, (1 + t) / (10 + t))
    evaluate: bool = True  # validate and keep the average; false = the raw weights
    equal_after: Number | None = Field(None, ge=0)  # instead, the plain mean of every later epoch's weights (SWA)

    @model_validator(mode="after")
    def _one(self) -> EmaPart:
        if self.decay is not None and self.equal_after is not None:
            raise InputError(
                f"ema.decay = {self.decay:g} with ema.equal_after = {self.equal_after:g} (allowed: one of the two)"
            )
        return self

    @property
    def averages(self) -> bool:
        return self.decay is not None or self.equal_after is not None


class AwpPart(Part):
    """Adversarial weight perturbation (Wu 2020): weights move against the loss before every update."""

    gamma: Number | None = Field(None, gt=0)  # relative to each layer's norm; null = off, 0.005 to 0.01 in the paper
    after_epochs: Number = Field(0.0, ge=0)


class CollapsePart(Part):
    """The watch for catastrophic overfitting: one-step against multi-step robust accuracy, every epoch."""

    action: Literal["off", "warn", "stop", "restore"] = "warn"  # restore = back to before it, at half the lr
    images: int = Field(128, ge=1)  # of the held-out split
    steps: int = Field(10, ge=2)
    # Collapsed: one-step − multi-step accuracy above this; multi-step below 0.3 × clean and fallen to half of its best.
    gap: Share = 0.2


class ValidationPart(Part):
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


class EvaluationPart(Part):
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
