"""The robust accuracy of a classifier: clean pass, ensemble, float32 confirmation, checks; resumable at any moment."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from robudget.attacks.build import build, check_images, rows_of
from robudget.attacks.driver import Look, Outcome, drive
from robudget.attacks.ensemble import Member, Passes, ensemble, fit_to_classes
from robudget.attacks.noise import Noise
from robudget.attacks.victim import Model, Victim, frozen, margin
from robudget.backend.batch_size import call_size, least_size, tile
from robudget.backend.folding import crafting_copy
from robudget.backend.memory import keep_freed_memory
from robudget.backend.precision import gains_in_attacks, resolve
from robudget.errors import InputError
from robudget.evaluation.accounts import Book, Metered, Window, charge
from robudget.evaluation.checks import (
    PROBE,
    Subject,
    after,
    before,
    carries_gradient,
    few_classes,
    logits_of,
    no_gradient,
    of_mode,
)
from robudget.evaluation.stages import Pace, Progress, Stage, confirmed
from robudget.evaluation.state import State, fingerprint, weights_of
from robudget.evaluation.verdicts import Finding, Spent, Verdicts
from robudget.threat import Threat

Precision = Literal["auto", "float32", "bfloat16"]

LOOK_EVERY = 10  # steps, on an accelerator
SAVE_EVERY = 30.0  # seconds, at most, between two writes of the state


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
) -> Verdicts:
    """A verdict for each image x (N, C, H, W) float32 in [0, 1] with label y (N,) int64.

    `version` names the ensemble (standard, plus, rand); `attacks` replaces it by a list of `Member`s, or of their text
    (`pgd:steps=50,restarts=5,loss=cw`). `index`: each image's row in the full split, which keys its noise (default
    0 … N − 1). `classes`: how many the data have, where that is known. `precision`: what the attacks compute in; every
    success is confirmed in float32 on the model as given. `device` None: where the model is. `state`: a folder that the
    evaluation resumes from and writes to. `progress` is told a few times a second; `window(name)` is a context entered
    around "evaluation/<attack>"; a meter's gives each attack its energy. `examples` keeps the adversarial examples
    (`Verdicts.examples`). Raises InputError for what the caller can mend.
    """
    members = list(ensemble(version, threat.norm)) if attacks is None else [_member(a) for a in attacks]
    check_images(x, y)
    if not members:
        raise InputError("attacks = [] (allowed: at least one attack, or a version)")
    if twice := [name for name, n in Counter(member.name for member in members).items() if n > 1]:
        raise InputError(f"attacks has {twice[0]!r} twice (allowed: each attack once; see its restarts)")
    if batch_size < 1:
        raise InputError(f"batch_size = {batch_size} (allowed: at least 1)")
    where = torch.arange(len(x)) if index is None else index.to("cpu", torch.int64)
    if where.shape != (len(x),) or len(torch.unique(where)) != len(x) or bool((where < 0).any()):
        raise InputError(f"index must hold {len(x)} different row numbers, one per image")
    place = torch.device(device) if device is not None else _home(model, x)
    if isinstance(model, nn.Module) and any(t.device.type != place.type for t in model.parameters()):
        model = deepcopy(model).to(place)
    found = of_mode(model)
    if place.type == "cpu":
        keep_freed_memory()
    with frozen(model):
        return _Run(
            model=model,
            x=x,
            y=y,
            threat=threat,
            version=version if attacks is None else "custom",
            members=members,
            seed=seed,
            batch_size=batch_size,
            asked=precision,
            index=where,
            classes=classes,
            device=place,
            folder=None if state is None else Path(state),
            progress=progress,
            window=window or (lambda name: nullcontext()),
            check=checks,
            examples=examples,
        ).verdicts(found)


def _member(item: str | Member) -> Member:
    return item if isinstance(item, Member) else Member.parse(item)


def _home(model: Model, x: Tensor) -> torch.device:
    if isinstance(model, nn.Module):
        for tensor in (*model.parameters(), *model.buffers()):
            return tensor.device
    return x.device


class _Run:
    """One evaluation: the resolved choices, the state, and the stages."""

    def __init__(
        self,
        *,
        model: Model,
        x: Tensor,
        y: Tensor,
        threat: Threat,
        version: str,
        members: list[Member],
        seed: int,
        batch_size: int,
        asked: Precision,
        index: Tensor,
        classes: int | None,
        device: torch.device,
        folder: Path | None,
        progress: Callable[[Progress], None] | None,
        window: Window,
        check: bool,
        examples: bool,
    ) -> None:
        self.model, self.x, self.y, self.threat, self.device = model, x, y, threat, device
        self.version, self.seed, self.batch_size, self.index = version, seed, batch_size, index
        self.folder, self.window, self.check = folder, window, check
        size = tile(device, batch_size)
        self.judge = Victim(model, least=size, most=size)
        probe = self.x[:2].to(device)
        self.classes = logits_of(model, probe, y, classes).shape[1]
        self.differentiable = carries_gradient(model, probe[:1])
        blind = [member.name for member in members if member.name != "square"]
        if blind and not self.differentiable:
            raise InputError(
                f"{blind[0]} needs a gradient, and the model's logits carry none to the image (is it wrapped in "
                "torch.no_grad or inference_mode?; allowed: attacks=['square'], which needs none and proves little)"
            )
        fitted = [fit_to_classes(member, self.classes) for member in members]
        self.members = [member for member, _ in fitted]
        resolved = resolve(asked, device, partial(gains_in_attacks, model, probe))
        self.precision = resolved.name if self.differentiable else "float32"
        self.about: dict[str, Any] = {
            "weights": weights_of(model, lambda: self.judge.logits(self.x[:64].to(device))),
            "images": fingerprint(x),
            "labels": fingerprint(y),
            "index": fingerprint(index),
            "threat": str(threat),
            "version": version,
            "attacks": [member.name for member in members],
            "members": [str(member) for member in self.members],
            "seed": seed,
            "batch_size": batch_size,
            "precision": self.precision,
            "device": device.type,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "examples": examples,
        }
        self.state = self._resumed() or State.blank(len(x), keep_examples=examples)
        self.notes = [note for _, note in fitted if note]
        self.stages = [Stage(m.name, m, self._cost(m), self.precision == "float32") for m in self.members]
        self.pace = Pace(self.stages, len(x), progress)
        self.saved = time.monotonic()
        self.victims: dict[bool, Victim] = {}

    def _cost(self, member: Member) -> int:
        """Passes of a surviving image, a backward pass counted as a forward one."""
        passes = member.passes(self.classes, self.threat.norm)
        return passes.forward + passes.backward

    def _resumed(self) -> State | None:
        return None if self.folder is None else State.load(self.folder, self.about)

    # -- the whole --------------------------------------------------------------------------------------------------

    def verdicts(self, mode: list[Finding]) -> Verdicts:
        s = self.state
        with self._stage("clean", len(self.x)) as spent:
            if not spent.done:
                self._clean_pass(spent)
        if "findings" not in s.notes:
            found = [*mode, *(few_classes(self.classes, note) for note in self.notes)]
            found += [] if self.differentiable else [no_gradient()]
            if self.check:
                with self._stage("checks", 0) as spent:
                    found += self._before(spent)
            s.notes["findings"] = [finding.to_dict() for finding in found]
        self._run(self.stages)
        if self.precision != "float32":
            self._confirm()
        findings = [Finding(**item) for item in s.notes["findings"]]
        out = self._collect(findings)
        return replace(out, findings=[*findings, *after(out)]) if self.check else out

    def _before(self, spent: Spent) -> list[Finding]:
        some = torch.from_numpy(self.state.standing.nonzero()[0][:PROBE])
        victim = Victim(self.model, most=self.batch_size)
        x, y = self.x[some].to(self.device), self.y[some].to(self.device)
        subject = Subject(victim, x, y, self.index[some], self.threat, self.seed, self.differentiable)
        found = before(subject, self.state.clean_margin, random_expected=any(m.eot > 1 for m in self.members))
        charge(spent, Passes(), victim.passes)
        return found

    def _run(self, stages: list[Stage]) -> None:
        for n, stage in enumerate(stages):
            if self._done(stage):
                continue
            entering = self._entering(stage)
            with self._stage(stage.name, len(entering)) as spent:
                if len(entering) and self.threat.eps > 0:
                    self._attack(stage, entering, stages[n + 1 :], spent)
                self.state.finished[:] = False

    def _done(self, stage: Stage) -> bool:
        return stage.name in self.state.spent and self.state.spent[stage.name].done

    def _entering(self, stage: Stage) -> Tensor:
        mask = self.state.standing
        if stage.round_ == 1:
            mask = mask & np.isin(np.arange(len(mask)), self.state.notes["nearest"])
        return torch.from_numpy(mask.nonzero()[0])

    def _confirm(self) -> None:
        """Low precision may miss what float32 finds: attack the nearest survivors again, and all if one falls."""
        s = self.state
        if "nearest" not in s.notes:
            alive = s.standing.nonzero()[0]
            near = np.argsort(s.worst_margin[alive], kind="stable")[: confirmed(len(alive))]
            s.notes["nearest"] = alive[near].tolist()
        again = [stage.again(1) for stage in self.stages]
        self._run(again)
        if any(s.spent[stage.name].broken for stage in again):
            self._run([stage.again(2) for stage in self.stages])

    @contextmanager
    def _stage(self, name: str, images: int) -> Iterator[Spent]:
        spent = self.state.spent.setdefault(name, Spent(name, images=images))
        if spent.done:
            yield spent
            return
        book = Book(spent)
        with self.window(f"evaluation/{name}") as opened:
            book.meter = opened if isinstance(opened, Metered) else None
            self.book = book
            yield spent
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        book.close()
        spent.done = True
        self._save()

    # -- one stage --------------------------------------------------------------------------------------------------

    def _clean_pass(self, spent: Spent) -> None:
        s, passes = self.state, self.judge.passes
        for i in range(0, len(self.x), self.batch_size):
            part = slice(i, i + self.batch_size)
            y = self.y[part].to(self.device)
            logits = self.judge.logits(self.x[part].to(self.device))
            s.clean_margin[part] = margin(logits, y).cpu().numpy()
            wrong = misclassified(logits, y).cpu().numpy()
            s.broken_by[part] = np.where(wrong, "clean", s.broken_by[part])
        spent.broken = int((~s.standing).sum())
        charge(spent, passes, self.judge.passes)

    def clean_logits(self) -> Tensor:
        """(N, classes) on the device; recomputed rather than kept, since a resumed run needs them too."""
        parts = range(0, len(self.x), self.batch_size)
        return torch.cat([self.judge.logits(self.x[i : i + self.batch_size].to(self.device)) for i in parts])

    def victim(self, precise: bool) -> Victim:
        """The model as attacks see it: a folded copy, in float32 or in the low precision."""
        if precise not in self.victims:
            precision = "float32" if precise else self.precision
            probe = self.x[: min(len(self.x), 64)].to(self.device)
            copy = crafting_copy(self.model, probe, precision) if self.differentiable else self.model
            most = call_size(self.model, probe, self.batch_size, 2 if precision == "bfloat16" else 4)
            victim = Victim(copy, most=most)
            labels = self.y[: len(probe)].to(self.device) if self.differentiable else None
            victim.least = least_size(victim, probe, labels, most)
            victim.passes = Passes()
            self.victims[precise] = victim
        return self.victims[precise]

    def _attack(self, stage: Stage, entering: Tensor, later: list[Stage], spent: Spent) -> None:
        s, victim, total = self.state, self.victim(stage.precise), len(entering)
        ours, theirs = victim.passes, self.judge.passes
        base = replace(spent)
        # On resume, what the stage had finished for an image stays finished; the rest of it is done from its start.
        images = entering[torch.from_numpy(~s.finished[entering.numpy()])].to(self.device)
        resumed = total - len(images)

        def update(out: Outcome) -> None:
            done = out.finished.nonzero().squeeze(1).cpu()
            fell = out.broken.nonzero().squeeze(1).cpu()
            s.finished[done.numpy()] = True
            for name in ("when", "restart", "target"):
                getattr(s, name)[fell.numpy()] = getattr(out, name)[fell.to(self.device)].cpu().numpy()
            s.broken_by[fell.numpy()] = stage.member.name
            seen = out.worst.cpu().numpy()
            s.worst_margin = np.fmin(s.worst_margin, seen)
            spent.broken = base.broken + len(fell)
            spent.refuted = base.refuted + out.refuted
            spent.forward, spent.backward = base.forward, base.backward
            charge(spent, ours, victim.passes)
            charge(spent, theirs, self.judge.passes)

        def found(at: Tensor, x_adv: Tensor) -> None:
            if s.examples is not None:
                for i, example in zip(at.tolist(), x_adv.cpu().numpy(), strict=True):
                    s.examples[i] = example

        def tell(finished: int, part: float, standing: int) -> None:
            past = list(s.spent.values())
            done = resumed + finished
            self.pace.tell(stage, later, past, images_done=done, images=total, part=part, standing=standing)

        def watch(out: Outcome, look: Look) -> None:
            if self.pace.due:
                part = (look.rows_done + look.evaluations / (stage.member.length + 1)) / max(look.rows, 1)
                standing = int(s.standing.sum()) - int(out.broken.sum()) + (spent.broken - base.broken)
                tell(int(out.finished.sum()), min((resumed + part * (total - resumed)) / total, 1.0), standing)
            unsaved = int(out.finished.sum()) + resumed - int(s.finished.sum())
            late = time.monotonic() - self.saved > SAVE_EVERY
            if self.folder is not None and (unsaved >= self.batch_size or (unsaved and late)):
                update(out)
                self.book.close()
                self._save()

        if len(images):
            attack = build(stage.member, victim, self.threat, self.seed)
            if self.device.type != "cpu":
                # A look waits for the device, and rows that are done work on for nothing until the next one.
                attack.stride = LOOK_EVERY
            out = drive(
                attack,
                rows_of(stage.member, images, self.clean_logits()),
                self.x,
                self.y,
                self.threat,
                noise=Noise(self.seed, self.index),
                verify=lambda at, label: misclassified(self.judge.logits(at), label),
                batch_size=self.batch_size,
                found=found,
                watch=watch,
            )
            update(out)
        tell(total - resumed, 1.0, int(s.standing.sum()))

    def _save(self) -> None:
        if self.folder is not None:
            self.state.save(self.folder, self.about)
            self.saved = time.monotonic()

    def _collect(self, findings: list[Finding]) -> Verdicts:
        s, index, y = self.state, self.index.numpy(), self.y.cpu().numpy()
        about = dict(self.about, halved=[*self.judge.halved, *(h for v in self.victims.values() for h in v.halved)])
        kept = s.kept(index, y, self.x.shape[1:], self.threat)
        return Verdicts(s.table(index, y), self.threat, list(s.spent.values()), findings, about, kept)


def misclassified(logits: Tensor, y: Tensor) -> Tensor:
    """(N,) bool; an answer that is not finite is no answer."""
    return (logits.argmax(1) != y) | ~logits.isfinite().all(1)
