"""The robust accuracy of a classifier: clean pass, checks, ensemble, confirmation in float32; it may be resumed."""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robudget import stop
from robudget.attacks.build import build, check_images, rows_of
from robudget.attacks.driver import Attack, Report, drive
from robudget.attacks.ensemble import Member, Passes, fit_to_classes
from robudget.attacks.noise import Noise
from robudget.attacks.victim import Model, Victim, frozen, margin
from robudget.backend.attack_steps import StepGraphs, one_line, why_called
from robudget.backend.batch_size import keep_freed_memory
from robudget.backend.graph import Graphs
from robudget.backend.precision import float32_as
from robudget.errors import InputError
from robudget.evaluation.again import Again
from robudget.evaluation.audit import Audit
from robudget.evaluation.checks import (
    PROBE,
    Subject,
    check_mode,
    check_model,
    few_classes,
    no_examples,
    no_gradient,
)
from robudget.evaluation.confirmation import Confirmation
from robudget.evaluation.examples import Source
from robudget.evaluation.specification import Confirm, Precision, Specification, Stage, line_of, stages
from robudget.evaluation.spent import Finding, Spent, by_attack
from robudget.evaluation.state import Account, Estimate, Progress, State, Window
from robudget.evaluation.verdict_checks import check_audit, check_verdicts
from robudget.evaluation.verdicts import Verdicts
from robudget.evaluation.victims import Backward, Images, Victims, misclassified, on_device, surrogate_of
from robudget.evaluation.votes import Votes
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
    until: float | None = None,
    backward: Backward = "own",
    known: Verdicts | None = None,
    add: Sequence[str | Member] = (),
    votes: int | None = None,
    cuda_graphs: bool = True,
) -> Verdicts:
    """A verdict for each image x (N, C, H, W) float32 in [0, 1] with label y (N,) int64.

    `Specification` describes what is asked (version … precision, checks … until, add, votes), `Evaluator` how it
    executes (backward, device, state, progress, window, known, cuda_graphs), `Evaluator.run` index and classes. Raises
    InputError for what can be mended.
    """
    check_images(x, y)
    specification = Specification(
        threat, version, attacks, seed, batch_size, precision, checks, examples, confirm, until, add, votes
    )
    evaluator = Evaluator(
        model, specification, device, state, progress, window, backward, known, cuda_graphs=cuda_graphs
    )
    return evaluator.run(x, y, index=index, classes=classes)


@dataclass(frozen=True)
class Evaluator:
    """Puts a model through what a specification asks.

    `device` None: where the model is. `state`: a folder that the evaluation resumes from and writes to. `progress` is
    told a few times a second; `window(name)` is a context entered around "evaluation/<attack>", and a meter's gives
    each attack its energy. `backward`: a surrogate that gradients are taken through (`attacks.victim.Victim` says how);
    by default the model's own `surrogate()`, where it has that method. Verdicts are of the model alone. `known`:
    verdicts of the same model on the same images under another threat, whose clean pass is taken over (where they are
    of others, it is made). `counting` is given a function at the start: the passes that the attacks have made so far.
    `cuda_graphs`: on CUDA an attack's steps are launched as one graph each; no verdict depends on it.
    """

    model: Model
    specification: Specification
    device: torch.device | str | None = None
    state: str | Path | None = None
    progress: Callable[[Progress], None] | None = None
    window: Window | None = None
    backward: Backward = "own"
    known: Verdicts | None = None
    counting: Callable[[Callable[[], Passes]], None] | None = None
    cuda_graphs: bool = True

    def run(self, x: Tensor, y: Tensor, *, index: Tensor | None = None, classes: int | None = None) -> Verdicts:
        """A verdict for each image x (N, C, H, W) float32 in [0, 1], or uint8, with label y (N,) int64.

        `index`: each image's row in the full split, which keys its noise (default 0 … N − 1). `classes`: how many the
        data have, where that is known. The model is left as it was. Raises InputError.
        """
        check_images(x, y, stored=True)
        index = torch.arange(len(x)) if index is None else index.to("cpu", torch.int64)
        if index.shape != (len(x),) or len(torch.unique(index)) != len(x) or bool((index < 0).any()):
            raise InputError(f"index must hold {len(x)} different row numbers, one per image")
        device = torch.device(self.device) if self.device is not None else _device_of(self.model, x)
        model = on_device(device, self.model)
        surrogate = surrogate_of(model, self.backward)
        surrogate = None if surrogate is None else on_device(device, surrogate)
        if device.type == "cpu":
            keep_freed_memory()
        findings = check_mode(model)
        with frozen(model), nullcontext() if surrogate is None else frozen(surrogate), float32_as(tf32=False):
            images = Images(x, y, index, device)
            victims = Victims(model, images, self.specification, classes, surrogate)
            return _Evaluation(self, images, victims).verdicts(findings)


def _device_of(model: Model, x: Tensor) -> torch.device:
    if isinstance(model, nn.Module):
        for tensor in (*model.parameters(), *model.buffers()):
            return tensor.device
    return x.device


_SAME_CLEAN_PASS = ("weights", "images", "labels", "index", "batch_size", "device", "threads", "torch")


class _Evaluation:
    """One run of an evaluator: the attacks as they fit the model, the state, and the stages."""

    def __init__(self, evaluator: Evaluator, images: Images, victims: Victims) -> None:
        self.specification, self.images, self.victims = evaluator.specification, images, victims
        self.folder = None if evaluator.state is None else Path(evaluator.state)
        self.cuda_graphs, self.graphs = evaluator.cuda_graphs, dict[str, str]()  # by stage: "on", or "off" and why
        self.window, self.known = evaluator.window or (lambda name: nullcontext()), evaluator.known
        if evaluator.counting is not None:
            evaluator.counting(lambda: victims.passes)
        members = self.specification.members
        blind = [member.name for member in members if member.name not in ("square", "transfer")]
        if blind and not victims.differentiable:
            raise InputError(
                f"{blind[0]} needs a gradient, and the model's logits carry none to the image (is it wrapped in "
                "torch.no_grad, or does it round or compare?; allowed: backward=, a differentiable stand-in for it, or "
                "attacks=['square'], which needs no gradient and proves little)"
            )
        x, y, index, threat = images.x, images.y, images.index, self.specification.threat
        self.sources = [Source.load(file, x, y, index, threat) for member in members for file in member.files]
        fitted = [fit_to_classes(member, victims.classes) for member in members]
        self.members, self.notes = [member for member, _ in fitted], [note for _, note in fitted if note]
        self.stages = stages(self.members, precise=victims.precision == "float32")
        self.again = Again(self.specification, images, victims, self.members)
        self.estimate = Estimate(
            self.stages,
            self.again.rounds,
            victims.classes,
            threat.norm,
            len(images),
            evaluator.progress,
        )
        self.about = self._identity()
        state = None if self.folder is None else State.load(self.folder, self.about)
        self.state = state or State.blank(
            len(images), keep_examples=self.specification.examples or self.specification.passes > 1
        )
        judge = Votes(self.specification.passes, self.specification.seed, images, victims, self.state)
        self.votes = judge if self.specification.passes > 1 else None
        self.saved = time.monotonic()

    def _identity(self) -> dict[str, Any]:
        """What has to be equal for a resume."""
        specification = self.specification
        return self.victims.identity() | {
            "threat": str(specification.threat),
            "version": specification.ensemble_name,
            "attacks": [member.name for member in self.members],
            # Of transferred examples their content: the file may lie elsewhere when an evaluation goes on.
            "members": [
                f"{member.name}:{' '.join(source.digest for source in self.sources)}" if member.files else str(member)
                for member in self.members
            ],
            "seed": specification.seed,
            "examples": specification.examples,
            "votes": specification.passes if specification.passes > 1 else None,
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
            findings += [no_examples(source.file) for source in self.sources if not source.of]
            checked = self.specification.checks
            with self._stage("checks", 0) if checked else nullcontext():
                findings += self._checks() if checked else []
                # Saved with the stage: else an attempt that is killed just then makes its passes twice.
                state.notes["findings"] = [finding.to_dict() for finding in findings]
        self._run(self.stages)
        if self.votes is not None:
            self._judge(self.votes)
        again = self.again.run(state, self._run)
        verdicts = self._collect(again)
        if self.specification.checks:
            verdicts = replace(verdicts, findings=[*verdicts.findings, *check_verdicts(verdicts)])
        return replace(verdicts, findings=[*verdicts.findings, *check_audit(verdicts)])

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

    @contextmanager
    def _stage(self, name: str, images: int) -> Iterator[Account]:
        """Meters a stage; saves what it found and took when it is over."""
        keyed = nullcontext() if self.votes is None else self.votes.keyed("stage", name)
        with self.window(f"evaluation/{name}") as meter, keyed:
            before = self.state.spent.get(name) or Spent(name, images=images)
            account = Account(before, lambda: self.victims.passes, meter)
            yield account
            if self.images.device.type == "cuda":
                torch.cuda.synchronize(self.images.device)
        self.state.spent[name] = account.total(done=True)
        self._save()
        self._check_stop()

    def _save(self) -> None:
        if self.folder is not None:
            self.state.save(self.folder, self.about)
            self.saved = time.monotonic()

    def _check_stop(self) -> None:
        """To be called where everything is saved; an evaluation that keeps nothing on the disk is not stopped."""
        if self.folder is not None:
            stop.check()

    # -- its stages ---------------------------------------------------------------------------------------------------

    def _clean_pass(self) -> int:
        """How many images the model misclassifies unattacked."""
        state, known = self.state, self.known
        if self.votes is not None:
            self.votes.clean_pass(self.specification.batch_size)
            return int((~state.robust).sum())
        if known is not None and all(known.about.get(key) == self.about[key] for key in _SAME_CLEAN_PASS):
            state.clean_margin[:] = known.frame["clean_margin"]
            state.broken_by = np.where(known.clean, state.broken_by, "clean").astype(state.broken_by.dtype)
            return int((~state.robust).sum())
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
        return check_model(
            subject, self.state.clean_margin, random_expected=random_expected, voted=self.votes is not None
        )

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
            due = stop.requested() or time.monotonic() - self.saved > SAVE_EVERY_SECONDS
            if self.folder is not None and (
                (due and finished > saved) or finished - saved >= self.specification.batch_size
            ):
                state.record(stage.member.name, outcome)
                state.spent[stage.name] = account.total()
                self._save()
                saved = finished
            self._check_stop()
        if len(left):
            state.record(stage.member.name, outcome)
        tell(images_done=len(images), part=1.0, robust=robust - account.broken)

    def _reports(self, stage: Stage, images: Tensor) -> Iterator[Report]:
        """Attack the images at these positions."""
        victims, specification = self.victims, self.specification
        # Examples of others are shown to the model as given: there is nothing to gain from a copy.
        victim = victims.given if stage.member.files else victims.copy(precise=stage.precise)
        sources = [source.of for source in self.sources]
        attack = build(stage.member, victim, specification.threat, specification.seed, sources=sources)
        if self.images.device.type != "cpu":
            # A report waits for the device, and rows that are done work on for nothing until the next one.
            attack.stride = REPORT_EVERY_STEPS
        # Clean logits, for the targets, are computed again rather than kept, since a resumed run needs them too.
        batches = () if stage.member.files else self.images.batches(specification.batch_size)
        logits = torch.cat([torch.empty(0, device=images.device), *(victims.given.logits(x) for _, x, _ in batches)])
        steps = self._graphed(stage, attack, victim)
        yield from drive(
            attack,
            rows_of(stage.member, images, logits),
            self.images.x,
            self.images.y,
            specification.threat,
            noise=Noise(specification.seed, self.images.index),
            verify=victims.misclassified if self.votes is None else self.votes.verify,
            batch_size=specification.batch_size,
            tried=None if self.votes is None else functools.partial(self.votes.tried, stage.member.name),
            steps_of=steps,
        )
        if steps is not None:
            self.graphs[stage.name] = steps.record

    def _graphed(self, stage: Stage, attack: Attack[Any], victim: Victim) -> StepGraphs | None:
        """The attack's steps as CUDA graphs; None where they are called one by one, for what `graphs` says then."""
        device = self.images.device
        why = why_called(victim, device, asked=self.cuda_graphs)
        why = "the model is randomised" if not why and self.votes is not None else why
        self.graphs[stage.name] = f"off: {why}" if why else "on"
        return None if why else StepGraphs(attack, victim, Graphs(device, warnings.warn))

    def _judge(self, votes: Votes) -> None:
        """The last word on a randomised model; what it says of an attack is entered in that attack's account."""
        state, candidates = self.state, self.state.notes["candidates"]
        if not state.done("votes"):
            with self._stage("votes", len(candidates)):
                votes.judge(self.specification.batch_size)
                for stage in self.stages:
                    broken = int((state.broken_by == stage.member.name).sum())
                    state.spent[stage.name] = replace(state.spent[stage.name], broken=broken)

    def _collect(self, again: Confirmation | Audit | None) -> Verdicts:
        state, index, y = self.state, self.images.index.numpy(), self.images.y.cpu().numpy()
        attacks = "IEEE float32" if self.victims.precision == "float32" else self.victims.precision
        halved = [size for victim in self.victims.all for size in victim.halved]
        threat, notes = self.specification.threat, state.notes
        audited = notes["order"][: sum(notes["blocks"])] if isinstance(again, Audit) else None
        table, votes = state.table(index, y, audited), self.votes
        return Verdicts(
            table if votes is None else table.assign(**votes.shares()),
            threat,
            by_attack(replace(item, attack=line_of(item.attack)) for item in state.spent.values()),
            [Finding(**item) for item in notes["findings"]],
            self.about
            | {"halved": halved, "confirm": self.specification.confirm}
            | {"arithmetic": {"verdicts": "IEEE float32", "attacks": attacks}}
            | {"fast_paths": {"CUDA graphs": one_line(self.graphs)}}
            | ({"transfer": [source.to_dict() for source in self.sources]} if self.sources else {}),
            state.examples_of(index, y, self.images.x.shape[1:], threat) if self.specification.examples else None,
            confirmation=again if isinstance(again, Confirmation) else None,
            audit=again if isinstance(again, Audit) else None,
            votes=None if votes is None else votes.summary(),
        )
