"""The queue of rows and the physical batch: refilled, cut, padded, halved; passes counted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from robudget.attacks.build import build, rows_of
from robudget.attacks.driver import Report, drive, plan
from robudget.attacks.ensemble import Member, Passes, ensemble, fit_to_classes
from robudget.attacks.noise import Noise
from robudget.attacks.pgd import Pgd
from robudget.attacks.victim import Victim, ce, frozen
from robudget.backend.batch_size import physical_sizes
from robudget.threat import Threat


class Sizes(nn.Module):
    """Remembers the batches it saw; optionally runs out of memory above a size."""

    def __init__(self, model: nn.Module, most: int = 10**9) -> None:
        super().__init__()
        self.model, self.seen, self.most = model, [], most

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(len(x))
        if len(x) > self.most:
            raise torch.OutOfMemoryError("out of memory")
        return self.model(x)


def attack(model, images, *, batch_size, restarts=3, eps=0.1, exhaust=False, steps=10):
    """The outcome, the positions of the examples in the order of their reports, the victim, and all reports."""
    x, y = images
    victim, given = Victim(model), Victim(model)
    rows = plan(torch.arange(len(x)), torch.empty(0), restarts=restarts)
    threat = Threat("linf", eps)
    reports = list(
        drive(
            Pgd(victim, threat, steps, 0.02),
            rows,
            x,
            y,
            threat,
            noise=Noise(0),
            verify=lambda at, label: given.logits(at).argmax(1) != label,
            batch_size=batch_size,
            exhaust=exhaust,
        )
    )
    examples = [i for report in reports for i in report.image.tolist()]
    return reports[-1].outcome, examples, victim, reports


def test_plan_orders_target_by_target_and_takes_ranked_classes():
    logits = torch.tensor([[0.1, 3.0, 2.0, -1.0], [5.0, 1.0, 2.0, 3.0]])
    rows = plan(torch.tensor([0, 1]), logits, targets=2, restarts=2)
    assert rows.image.tolist() == [0, 1] * 4
    assert rows.rank.tolist() == [1] * 4 + [2] * 4
    assert rows.restart.tolist() == [0, 0, 1, 1] * 2
    assert rows.target.tolist() == [2, 3, 2, 3, 0, 2, 0, 2]


def test_broken_images_leave_and_the_batch_is_refilled(small, images):
    model = Sizes(small)
    out, examples, victim, _ = attack(model, images, batch_size=16)
    gradients = model.seen[: victim.passes.forward]
    # The batch stays full while rows wait, and no image that is broken is worked on again.
    assert max(gradients) == 16
    assert sorted(examples) == out.broken.nonzero().squeeze(1).tolist()
    assert len(examples) == len(set(examples))
    everything = 3 * len(images[0]) * 11
    assert victim.passes.forward < everything
    assert out.finished.all()


def test_batch_size_changes_no_verdict(small, images):
    verdicts = [attack(small, images, batch_size=b)[0] for b in (3, 16, 200)]
    assert all(torch.equal(v.broken, verdicts[0].broken) for v in verdicts)
    assert 0 < int(verdicts[0].broken.sum()) < len(images[0])


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("name", ["apgd-ce", "apgd-t", "fab-t", "square"])
def test_looking_seldom_changes_no_verdict(small, short_attack, name, norm):
    """On an accelerator the queue looks every few steps, and rows that are done work on until then."""
    x, y, threat, rows, member = short_attack(name, norm)
    outcomes = []
    for stride in (1, 10):
        machine = build(member, Victim(small), threat, seed=0)
        machine.stride = stride
        *_, last = drive(
            machine,
            rows,
            x,
            y,
            threat,
            noise=Noise(0),
            verify=lambda at, label: small(at).argmax(1) != label,
            batch_size=16,
        )
        outcomes.append(last.outcome)
    often, seldom = outcomes
    assert torch.equal(often.broken, seldom.broken)
    assert torch.equal(often.finished, seldom.finished)
    assert 0 < int(often.broken.sum()) < len(torch.unique(rows.image))


def test_exhaust_goes_on_with_broken_images(small, images):
    _, once, _, _ = attack(small, images, batch_size=16)
    _, often, _, _ = attack(small, images, batch_size=16, exhaust=True)
    assert set(once) == set(often)
    assert len(often) > len(once)


def test_reports_show_rows_done_grow_to_all(small, images):
    reports: list[Report] = attack(small, images, batch_size=16)[3]
    done = [report.rows_done for report in reports]
    assert done == sorted(done)
    assert done[-1] == reports[-1].rows
    assert reports[-1].evaluations == 0


def test_a_refuted_claim_keeps_its_row_in_the_attack(small, images):
    x, y = images
    with torch.no_grad():
        keep = small(x).argmax(1) == y
    x, y = x[keep], y[keep]
    victim = Victim(small)
    threat = Threat("linf", 0.3)
    seen = 0

    def verify(at: Tensor, label: Tensor) -> Tensor:
        nonlocal seen
        seen += len(at)
        return torch.zeros(len(at), dtype=torch.bool)

    rows = plan(torch.arange(len(x)), torch.empty(0))
    reports = list(
        drive(Pgd(victim, threat, 20, 0.1), rows, x, y, threat, noise=Noise(0), verify=verify, batch_size=100)
    )
    assert not any(len(report.x_adv) for report in reports)
    assert not reports[-1].outcome.broken.any()
    assert reports[-1].outcome.refuted == seen > len(x)
    assert victim.passes.forward == 21 * len(x)


def test_calls_are_padded_and_cut(small, images):
    model = Sizes(small)
    victim = Victim(model, least=8, most=20)
    x = images[0][:45]
    with torch.no_grad():
        assert torch.allclose(victim.logits(x), small(x), atol=1e-5)
    assert model.seen == [20, 20, 8]
    assert victim.passes.forward == 48
    z, value, grad = victim.gradient(x[:3], ce, images[1][:3], images[1][:3])
    assert z.shape == (3, 6)
    assert value.shape == (3,)
    assert grad.shape == (3, 1, 8, 8)
    assert model.seen[-1] == 8
    assert victim.passes.backward == 8


def test_out_of_memory_halves_the_batch_and_goes_on(small, images):
    model = Sizes(small, most=16)
    victim = Victim(model, most=60)
    with pytest.warns(UserWarning, match="out of memory at batch 60: going on with 30"):
        z = victim.logits(images[0])
    with torch.no_grad():
        assert torch.allclose(z, small(images[0]), atol=1e-5)
    assert victim.halved == [30, 15]
    assert victim.most == 15


def test_other_errors_are_not_swallowed(small, images):
    victim = Victim(lambda x: small(x[:, :, :3]))
    with pytest.raises(RuntimeError, match="shape"):
        victim.logits(images[0])
    with pytest.raises(torch.OutOfMemoryError):
        Victim(Sizes(small, most=0)).logits(images[0][:4])


def test_jacobian_is_the_gradient_of_every_logit(small, images):
    x = images[0][:5]
    z, grads = Victim(small).jacobian(x)
    leaf = x.clone().requires_grad_()
    out = small(leaf)
    for c in range(6):
        assert torch.allclose(grads[:, c], torch.autograd.grad(out[:, c].sum(), leaf, retain_graph=True)[0], atol=1e-6)
    assert torch.allclose(z, out)


def test_frozen_restores_mixed_modes(small):
    small.train()
    small.body[1].eval()
    with frozen(small):
        assert not any(m.training for m in small.modules())
    assert small.training
    assert not small.body[1].training
    assert small.body[0].training
    small.eval()


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("version", ["standard", "plus", "rand"])
def test_the_passes_that_a_member_announces_are_those_that_it_makes(version, norm):
    """On a model that nothing breaks; with Square's queries a multiple of its block and its start on top."""

    def constant(x: Tensor) -> Tensor:
        return torch.tensor([0.0, 1.0, 2.0, 5.0, 3.0]) + 0 * x.sum((1, 2, 3)).unsqueeze(1)

    x, y = torch.rand(3, 1, 6, 6), torch.full((3,), 3)
    logits, threat = constant(x), Threat(norm, 0.5)
    for member in [*ensemble(version, norm), Member("pgd", restarts=2, eot=3)]:
        member, _ = fit_to_classes(replace(member, steps=128 if member.name == "square" else 11), 5)
        victim = Victim(constant)
        *_, last = drive(
            build(member, victim, threat, seed=0),
            rows_of(member, torch.arange(3), logits),
            x,
            y,
            threat,
            noise=Noise(0),
            verify=lambda at, label: constant(at).argmax(1) != label,
            batch_size=7,
        )
        assert last.outcome.finished.all()
        assert not last.outcome.broken.any()
        each = member.passes(5, norm)
        assert victim.passes == Passes(3 * each.forward, 3 * each.backward), member


def test_a_call_has_one_of_a_few_sizes(small, images):
    model = Sizes(small)
    victim = Victim(model, most=32, sizes=(8, 16, 32))
    x = torch.cat((images[0], images[0]))[:60]
    with torch.no_grad():
        assert torch.allclose(victim.logits(x), small(x), atol=1e-5)
    victim.logits(x[:5])
    victim.logits(x[:9])
    assert model.seen == [32, 32, 8, 16]
    victim.most = 12  # halved for want of memory: never more than that
    victim.logits(x[:10])
    assert model.seen[-1] == 12


def linear(x):
    return x.flatten(1) @ torch.linspace(-1, 1, x[0].numel() * 3).view(-1, 3)


def test_sizes_that_answer_otherwise_are_left_out():
    def model(x):
        return linear(x) * (1 + 1e-6 * (len(x) == 128))  # a kernel of its own for this size

    x, y = torch.rand(20, 1, 4, 4), torch.arange(20) % 3
    assert physical_sizes(Victim(model), x, y, 512) == (64, 256, 512)
    assert physical_sizes(Victim(model), x, None, 64) == (64,)

    def by_place(x):
        return linear(x) * torch.linspace(1, 1 + 1e-5, len(x))[:, None]

    assert physical_sizes(Victim(by_place), x, y, 256) == (256,)


@pytest.mark.parametrize(("name", "norm"), [("apgd-ce", "linf"), ("apgd-ce", "l1"), ("fab-t", "linf"), ("pgd", "l2")])
def test_a_look_falls_on_the_last_step_of_a_row(small, images, name, norm):
    """With a report every 10 steps, APGD's rows of 101 evaluations used to make 110."""
    x, y = images[0][:12], images[1][:12]
    member, threat = Member(name, steps=21, targets=2), Threat(norm, 1e-4)  # nothing falls
    passes = []
    for stride in (1, 10):
        victim = Victim(small)
        attack = build(member, victim, threat, 0)
        attack.stride = stride
        rows = rows_of(member, torch.arange(12), small(x).detach())
        reports = list(drive(attack, rows, x, y, threat, noise=Noise(), verify=never, batch_size=12))
        assert reports[-1].outcome.finished.all()
        passes.append((victim.passes.forward, victim.passes.backward))
    assert passes[0] == passes[1]


def never(x, y):
    return torch.zeros(len(x), dtype=torch.bool)
