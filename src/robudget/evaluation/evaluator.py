"""The robust accuracy of a classifier: clean pass, checks, ensemble, confirmation in float32; it may be resumed."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robudget.attacks.build import build, check_images, rows_of
from robudget.attacks.driver import Report, drive
from robudget.attacks.ensemble import Member, Passes, fit_to_classes
from robudget.attacks.noise import Noise
from robudget.attacks.victim import Model, Victim, frozen, margin
from robudget.backend.batch_size import call_size, keep_freed_memory, least_size, tile
from robudget.backend.folding import crafting_copy
from robudget.backend.precision import gains_in_attacks, resolve
from robudget.errors import InputError
from robudget.evaluation.checks import (
    PROBE,
    Subject,
    carries_gradient,
    check_logits,
    check_mode,
    check_model,
    check_verdicts,
    few_classes,
    no_gradient,
)
from robudget.evaluation.confirmation import Confirmation, Part, block_size, enough, images_if_none_falls
from robudget.evaluation.specification import AGAIN, Confirm, Precision, Specification, Stage, stages
from robudget.evaluation.state import Account, Estimate, Progress, State, Window, fingerprint, weights_of
from robudget.evaluation.verdicts import Finding, Spent, Verdicts, by_attack
from robudget.threat import Threat

REPORT_EVERY_STEPS = 10  # on an accelerator
SAVE_EVERY_SECONDS = 30.0  # at most, between two writes of the state


def evaluate(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    version: str = "standard",
    attacks: Sequence[str | Member] | None = None,
    seed: int = 0,
    batch_size: int = 500,
    precision: Precision = "auto",
    index: Tensor | None = None,
    classes: int | None = None,
    device: torch.device | str | None = None,
    state: str | Path | None = None,
    progress: Callable[[Progress], None] | None = None,
    window: Window | None = None,
    checks: bool = True,
    examples: bool = False,
    confirm: Confirm = "auto",
) -> Verdicts:
    """A verdict for each image x (N, C, H, W) float32 in [0, 1] with label y (N,) int64.

    `Specification` describes what is asked (version … precision, checks … confirm), `Evaluator` how it executes
    (device, state, progress, window), `Evaluator.run` index and classes. Raises InputError for what can be mended.
    """
    specification = Specification(threat, version, attacks, seed, batch_size, precision, checks, examples, confirm)
    evaluator = Evaluator(model, specification, device=device, state=state, progress=progress, window=window)
    return evaluator.run(x, y, index=index, classes=classes)


@dataclass(frozen=True)
class Evaluator:
    """Puts a model through what a specification asks.

    `device` None: where the model is. `state`: a folder that the evaluation resumes from and writes to. `progress` is
    told a few times a second; `window(name)` is a context entered around "evaluation/<attack>", and a meter's gives
    each attack its energy.
    """

    model: Model
    specification: Specification
    device: torch.device | str | None = None
    state: str | Path | None = None
    progress: Callable[[Progress], None] | None = None
    window: Window | None = None

    def run(self, x: Tensor, y: Tensor, *, index: Tensor | None = None, classes: int | None = None) -> Verdicts:
        """A verdict for each image x (N, C, H, W) float32 in [0, 1] with label y (N,) int64.

        `index`: each image's row in the full split, which keys its noise (default 0 … N − 1). `classes`: how many the
        data have, where that is known. The model is left as it was. Raises InputError.
        """
        check_images(x, y)
        index = torch.arange(len(x)) if index is None else index.to("cpu", torch.int64)
        if index.shape != (len(x),) or len(torch.unique(index)) != len(x) or bool((index < 0).any()):
            raise InputError(f"index must hold {len(x)} different row numbers, one per image")
        device = torch.device(self.device) if self.device is not None else _device_of(self.model, x)
        model = self.model
        if isinstance(model, nn.Module) and any(t.device.type != device.type for t in model.parameters()):
            model = deepcopy(model).to(device)
        if device.type == "cpu":
            keep_freed_memory()
        findings = check_mode(model)
        with frozen(model):
            images = _Images(x, y, index, device)
            return _Evaluation(self, images, _Victims(model, images, self.specification, classes)).verdicts(findings)


def _device_of(model: Model, x: Tensor) -> torch.device:
    if isinstance(model, nn.Module):
        for tensor in (*model.parameters(), *model.buffers()):
            return tensor.device
    return x.device


@dataclass(frozen=True)
class _Images:
    """Images and labels in the caller's memory, their rows in the full split, and the device that computes."""

    x: Tensor
    y: Tensor
    index: Tensor
    device: torch.device

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, rows: slice | Tensor) -> tuple[Tensor, Tensor]:
        return self.x[rows].to(self.device), self.y[rows].to(self.device)

    def batches(self, size: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
        for first in range(0, len(self), size):
            part = slice(first, first + size)
            yield part, *self[part]


class _Victims:
    """The model as given, which decides every verdict, and the copies of it that attacks compute with."""

    def __init__(self, model: Model, images: _Images, specification: Specification, classes: int | None) -> None:
        self.model, self.images, self.batch_size = model, images, specification.batch_size
        size = tile(images.device, self.batch_size)
        self.given = Victim(model, least=size, most=size)
        probe, _ = images[:2]
        self.classes = check_logits(model, probe, images.y, classes).shape[1]
        self.differentiable = carries_gradient(model, probe[:1])
        resolved = resolve(specification.precision, images.device, functools.partial(gains_in_attacks, model, probe))
        self.precision = resolved.name if self.differentiable else "float32"
        self.all = [self.given]
        self._copies: dict[bool, Victim] = {}

    @property
    def passes(self) -> Passes:
        """By all of them, so far."""
        return sum((victim.passes for victim in self.all), Passes())

    def copy(self, *, precise: bool) -> Victim:
        """A folded copy, in float32 (`precise`) or in the precision of this evaluation."""
        if precise not in self._copies:
            precision = "float32" if precise else self.precision
            x, y = self.images[: min(len(self.images), 64)]
            copy = crafting_copy(self.model, x, precision) if self.differentiable else self.model
            victim = Victim(copy, most=call_size(self.model, x, self.batch_size, 2 if precision == "bfloat16" else 4))
            victim.least = least_size(victim, x, y if self.differentiable else None, victim.most)
            victim.passes = Passes()
            self._copies[precise] = victim
            self.all.append(victim)
        return self._copies[precise]

    def unpadded(self) -> Victim:
        """The model as given, in calls of as many images as it is asked about."""
        self.all.append(Victim(self.model, most=self.batch_size))
        return self.all[-1]

    def misclassified(self, x: Tensor, y: Tensor) -> Tensor:
        """(N,) bool, by the model as given."""
        return misclassified(self.given.logits(x), y)


def misclassified(logits: Tensor, y: Tensor) -> Tensor:
    """(N,) bool; an answer that is not finite is no answer."""
    return (logits.argmax(1) != y) | ~logits.isfinite().all(1)


class _Evaluation:
    """One run of an evaluator: the attacks as they fit the model, the state, and the stages."""

    def __init__(self, evaluator: Evaluator, images: _Images, victims: _Victims) -> None:
        self.specification, self.images, self.victims = evaluator.specification, images, victims
        self.folder = None if evaluator.state is None else Path(evaluator.state)
        self.window = evaluator.window or (lambda name: nullcontext())
        members = self.specification.members
        blind = [member.name for member in members if member.name != "square"]
        if blind and not victims.differentiable:
            raise InputError(
                f"{blind[0]} needs a gradient, and the model's logits carry none to the image (is it wrapped in "
                "torch.no_grad or inference_mode?; allowed: attacks=['square'], which needs none and proves little)"
            )
        fitted = [fit_to_classes(member, victims.classes) for member in members]
        self.members, self.notes = [member for member, _ in fitted], [note for _, note in fitted if note]
        self.stages = stages(self.members, precise=victims.precision == "float32")
        norm = self.specification.threat.norm
        confirm: dict[str, Callable[[int], int]] = {
            "auto": images_if_none_falls,
            "all": int,
            "none": lambda survivors: 0,
        }
        self.estimate = Estimate(
            self.stages,
            victims.classes,
            norm,
            len(images),
            evaluator.progress,
            confirm["none" if victims.precision == "float32" else self.specification.confirm],
        )
        self.about = self._identity()
        state = None if self.folder is None else State.load(self.folder, self.about)
        self.state = state or State.blank(len(images), keep_examples=self.specification.examples)
        self.saved = time.monotonic()

    def _identity(self) -> dict[str, Any]:
        """What has to be equal for a resume."""
        specification, images, victims = self.specification, self.images, self.victims
        return {
            "weights": weights_of(victims.model, lambda: victims.given.logits(images[:64][0])),
            "images": fingerprint(images.x),
            "labels": fingerprint(images.y),
            "index": fingerprint(images.index),
            "threat": str(specification.threat),
            "version": specification.ensemble_name,
            "attacks": [member.name for member in self.members],
            "members": [str(member) for member in self.members],
            "seed": specification.seed,
            "batch_size": specification.batch_size,
            "precision": victims.precision,
            "device": images.device.type,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "examples": specification.examples,
        }

    # -- the whole ----------------------------------------------------------------------------------------------------

    def verdicts(self, findings: list[Finding]) -> Verdicts:
        """`findings`: what was noticed before the model was put into evaluation mode."""
        state = self.state
        if not state.done("clean"):
            with self._stage("clean", len(self.images)) as account:
                account.broken = self._clean_pass()
        if "findings" not in state.notes:
            findings += [few_classes(self.victims.classes, note) for note in self.notes]
            findings += [] if self.victims.differentiable else [no_gradient()]
            if self.specification.checks:
                with self._stage("checks", 0):
                    findings += self._checks()
            state.notes["findings"] = [finding.to_dict() for finding in findings]
        self._run(self.stages)
        confirmation = None if self.victims.precision == "float32" else self._confirm()
        verdicts = self._collect(confirmation)
        if not self.specification.checks:
            return verdicts
        return replace(verdicts, findings=[*verdicts.findings, *check_verdicts(verdicts)])

    def _run(self, plan: Sequence[Stage], among: Sequence[int] | None = None) -> None:
        """Attack the robust images, or those of them at the positions `among`."""
        for n, stage in enumerate(plan):
            if self.state.done(stage.name):
                continue
            robust = self.state.robust.nonzero()[0]
            images = torch.from_numpy(robust if among is None else robust[np.isin(robust, among)])
            with self._stage(stage.name, len(images)) as account:
                if len(images) and self.specification.threat.eps > 0:
                    self._attack(stage, images, plan[n + 1 :], account)
                self.state.finished[:] = False

    def _confirm(self) -> Confirmation:
        """Low precision may miss what float32 finds: attack survivors again, block by block (`confirmation.py`)."""
        notes, mode = self.state.notes, self.specification.confirm
        if "order" not in notes:
            robust = self.state.robust.nonzero()[0]
            notes["order"] = robust[np.argsort(self.state.worst_margin[robust], kind="stable")].tolist()
            notes["blocks"] = []
        order, blocks = notes["order"], notes["blocks"]
        fell: list[int] = []
        while True:
            if len(fell) == len(blocks):
                left = len(order) - sum(blocks)
                if (not left and blocks) or mode == "none" or (mode == "auto" and enough(len(order), blocks, fell)):
                    return Confirmation((Part.of(len(order), blocks, fell),))
                blocks.append(left if mode == "all" else min(block_size(len(blocks), len(order)), left))
            first = sum(blocks[: len(fell)])
            plan = stages(self.members, precise=True, again=len(fell) + 1)
            self._run(plan, order[first : first + blocks[len(fell)]])
            fell.append(sum(self.state.spent[stage.name].broken for stage in plan))

    @contextmanager
    def _stage(self, name: str, images: int) -> Iterator[Account]:
        """Meters a stage; saves what it found and took when it is over."""
        with self.window(f"evaluation/{name}") as meter:
            before = self.state.spent.get(name) or Spent(name, images=images)
            account = Account(before, lambda: self.victims.passes, meter)
            yield account
            if self.images.device.type == "cuda":
                torch.cuda.synchronize(self.images.device)
        self.state.spent[name] = account.total(done=True)
        self._save()

    def _save(self) -> None:
        if self.folder is not None:
            self.state.save(self.folder, self.about)
            self.saved = time.monotonic()

    # -- its stages ---------------------------------------------------------------------------------------------------

    def _clean_pass(self) -> int:
        """How many images the model misclassifies unattacked."""
        state = self.state
        for part, x, y in self.images.batches(self.specification.batch_size):
            logits = self.victims.given.logits(x)
            state.clean_margin[part] = margin(logits, y).cpu().numpy()
            wrong = misclassified(logits, y).cpu().numpy()
            state.broken_by[part] = np.where(wrong, "clean", state.broken_by[part])
        return int((~state.robust).sum())

    def _checks(self) -> list[Finding]:
        """On the first of the correctly classified images."""
        some = torch.from_numpy(self.state.robust.nonzero()[0][:PROBE])
        x, y = self.images[some]
        subject = Subject(
            self.victims.unpadded(),
            x,
            y,
            self.images.index[some],
            self.specification.threat,
            self.specification.seed,
            self.victims.differentiable,
        )
        random_expected = any(member.eot > 1 for member in self.members)
        return check_model(subject, self.state.clean_margin, random_expected=random_expected)

    def _attack(self, stage: Stage, images: Tensor, later: Sequence[Stage], account: Account) -> None:
        state = self.state
        # On resume, what the stage had finished for an image stays finished; the rest of it is done from its start.
        before = state.finished[images.numpy()]
        left = images[torch.from_numpy(~before)].to(self.images.device)
        robust, resumed, saved = int(state.robust.sum()), int(before.sum()), 0
        tell = functools.partial(self.estimate.tell, stage, later, state.spent, images=len(images))
        for report in self._reports(stage, left) if len(left) else ():
            outcome = report.outcome
            state.keep(report.image, report.x_adv)
            account.broken, account.refuted = int(outcome.broken.sum()), outcome.refuted
            finished = int(outcome.finished.sum())
            if self.estimate.due:
                part = (report.rows_done + report.evaluations / (stage.member.length + 1)) / max(report.rows, 1)
                part = min((resumed + part * len(left)) / len(images), 1.0)
                tell(images_done=resumed + finished, part=part, robust=robust - account.broken)
            late = finished > saved and time.monotonic() - self.saved > SAVE_EVERY_SECONDS
            if self.folder is not None and (late or finished - saved >= self.specification.batch_size):
                state.record(stage.member.name, outcome)
                state.spent[stage.name] = account.total()
                self._save()
                saved = finished
        if len(left):
            state.record(stage.member.name, outcome)
        tell(images_done=len(images), part=1.0, robust=robust - account.broken)

    def _reports(self, stage: Stage, images: Tensor) -> Iterator[Report]:
        """Attack the images at these positions."""
        victims, specification = self.victims, self.specification
        attack = build(stage.member, victims.copy(precise=stage.precise), specification.threat, specification.seed)
        if self.images.device.type != "cpu":
            # A report waits for the device, and rows that are done work on for nothing until the next one.
            attack.stride = REPORT_EVERY_STEPS
        # Clean logits, for the targets, are computed again rather than kept, since a resumed run needs them too.
        batches = self.images.batches(specification.batch_size)
        logits = torch.cat([victims.given.logits(x) for _, x, _ in batches])
        return drive(
            attack,
            rows_of(stage.member, images, logits),
            self.images.x,
            self.images.y,
            specification.threat,
            noise=Noise(specification.seed, self.images.index),
            verify=victims.misclassified,
            batch_size=specification.batch_size,
        )

    def _collect(self, confirmation: Confirmation | None) -> Verdicts:
        state, index, y = self.state, self.images.index.numpy(), self.images.y.cpu().numpy()
        findings = [Finding(**item) for item in state.notes["findings"]]
        halved = [size for victim in self.victims.all for size in victim.halved]
        about = self.about | {"halved": halved, "confirm": self.specification.confirm}
        threat = self.specification.threat
        examples = state.examples_of(index, y, self.images.x.shape[1:], threat)
        spent = by_attack(replace(item, attack=_without_block(item.attack)) for item in state.spent.values())
        return Verdicts(state.table(index, y), threat, spent, findings, about, examples, confirmation)


def _without_block(stage: str) -> str:
    """All blocks of a confirmation are one line of the account: `square@float32-3` → `square@float32`."""
    name, again, _ = stage.partition(AGAIN)
    return name + again
