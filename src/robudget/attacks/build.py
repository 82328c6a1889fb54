"""From a member of an ensemble to its state machine and its rows; and any attack alone, as a function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from robudget.attacks.apgd import Apgd
from robudget.attacks.driver import Attack, Rows, drive, plan
from robudget.attacks.ensemble import MINIMUM_NORM, Member, fit_to_classes
from robudget.attacks.fab import Fab
from robudget.attacks.fmn import Fmn
from robudget.attacks.geometry import GEOMETRY
from robudget.attacks.noise import Noise
from robudget.attacks.pgd import Pgd
from robudget.attacks.square import Square
from robudget.attacks.transfer import Transfer
from robudget.attacks.victim import Model, Victim, frozen
from robudget.errors import InputError
from robudget.threat import Threat


def build(
    member: Member,
    victim: Victim,
    threat: Threat,
    seed: int,
    *,
    first: bool = True,
    sources: Sequence[Mapping[int, Tensor]] = (),
) -> Attack[Any]:
    """The state machine of a member. `first`: FAB stops at its first point within ε, as in an ensemble. `sources`: what
    transfer shows. Raises InputError for a transfer without them."""
    n = member.length
    if member.name == "transfer":
        if len(sources) != len(member.files):
            raise InputError("transfer is a member of an evaluation, and no attack alone (see examples.replay)")
        return Transfer(victim, threat, sources)
    if member.name == "square":
        return Square(victim, threat, seed, steps=n, p=member.p)
    if member.name in ("fab", "fab-t"):
        return Fab(victim, threat, member.name, targeted=member.targeted, steps=n, first=first)
    if member.name == "fmn":
        return Fmn(victim, threat, n)
    if member.name == "pgd":
        size = 2.5 * threat.eps / max(n, 1) if member.step_size is None else member.step_size
        return Pgd(victim, threat, n, size, loss=member.loss or "ce", eot=member.eot)
    loss = member.loss or {"apgd-ce": "ce", "apgd-dlr": "dlr", "apgd-t": "dlr-targeted"}[member.name]
    return Apgd(victim, threat, member.name, loss, n, member.eot, large_eps=member.large_eps)


def rows_of(member: Member, images: Tensor, logits: Tensor) -> Rows:
    """The rows of a member over `images` (positions); `logits` (N, classes) are those of all clean images."""
    return plan(images, logits, targets=member.targets if member.targeted else 0, restarts=member.restarts)


def attack(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    member: Member | str,
    *,
    noise: Noise | None = None,
    batch_size: int = 500,
) -> Tensor:
    """One attack alone: adversarial images x_adv, for a `member` such as `Member("pgd", steps=50)` or "apgd-ce".

    x (N, C, H, W) float32 in [0, 1], y (N,) int64. Only images that the model classifies correctly are attacked. The
    answer has the shape and device of x, lies in the threat's ball and in [0, 1], and is the image itself where the
    attack failed. FAB and FMN, which look for the nearest adversarial point, run all their steps and give the nearest;
    for one without a bound, give a threat that allows everything (L∞: ε = 1). The model's mode, BatchNorm statistics
    and every `requires_grad` are as before afterwards, also when the attack raises. Raises InputError.
    """
    member = Member.parse(member) if isinstance(member, str) else member
    noise = noise or Noise()
    check_images(x, y)
    x_adv = x.clone()
    with frozen(model):
        victim = Victim(model)
        logits = torch.cat([victim.logits(part) for part in x.split(batch_size)])  # type: ignore[no-untyped-call]
        images = (logits.argmax(1) == y).nonzero().squeeze(1)
        if not len(images) or threat.eps == 0:
            return x_adv
        member, _ = fit_to_classes(member, logits.shape[1])
        # These run to their end and every example of theirs is heard of; of others an image's first ends the search.
        exhaust = member.name in MINIMUM_NORM
        reports = drive(
            build(member, victim, threat, noise.seed, first=False),
            rows_of(member, images, logits),
            x,
            y,
            threat,
            noise=noise,
            verify=lambda at, label: victim.logits(at).argmax(1) != label,
            batch_size=batch_size,
            exhaust=exhaust,
        )
        distance = GEOMETRY[threat.norm].distance
        best = torch.full((len(x),), torch.inf, device=x.device)
        for report in reports:
            for i, example in zip(report.image.to(x.device), report.x_adv.to(x.device), strict=True):
                away = distance(example.unsqueeze(0), x[i].unsqueeze(0))[0]
                if away < best[i]:
                    best[i], x_adv[i] = away, example
    return x_adv


def check_images(x: Tensor, y: Tensor, *, stored: bool = False) -> None:
    """Raises InputError unless x is a float32 (N, C, H, W) batch in [0, 1] with N > 0 and y its int64 labels. `stored`:
    x may be uint8 too, as data sets are stored."""
    if x.dim() != 4:
        raise InputError(f"images have shape {tuple(x.shape)} (allowed: (N, C, H, W))")
    if x.dtype != torch.float32 and not (stored and x.dtype == torch.uint8):
        raise InputError(f"images are {x.dtype} (allowed: torch.float32 in [0, 1]; divide uint8 by 255)")
    if not len(x):
        raise InputError("there are 0 images (allowed: at least 1)")
    if y.dtype != torch.int64 or y.shape != (len(x),):
        raise InputError(f"labels are {y.dtype} {tuple(y.shape)} (allowed: torch.int64 ({len(x)},))")
    if x.dtype == torch.uint8:
        return
    low, high = float(x.min()), float(x.max())
    if not (low >= 0 and high <= 1):
        raise InputError(f"images lie in [{low:.4g}, {high:.4g}] (allowed: [0, 1])")
