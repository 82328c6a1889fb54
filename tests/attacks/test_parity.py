"""Attack by attack against the authors' implementation (pyautoattack), on the same noise, step for step."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from robudget.attacks.apgd import Apgd
from robudget.attacks.driver import Rows, State, plan
from robudget.attacks.fab import Fab
from robudget.attacks.geometry import GEOMETRY
from robudget.attacks.noise import Noise
from robudget.attacks.square import Square, bits
from robudget.attacks.victim import Victim, dlr, dlr_targeted, margin
from robudget.threat import Threat

pytest.importorskip("pyautoattack", reason="the authors' implementation is a development dependency")
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from pyautoattack.fab_pt import FABAttack_PT
from pyautoattack.square import SquareAttack

NORMS = {"linf": ("Linf", 0.12), "l2": ("L2", 0.7), "l1": ("L1", 4.0)}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture
def correct(small, images) -> tuple[nn.Module, Tensor, Tensor]:
    x, y = images
    with torch.no_grad():
        keep = small(x).argmax(1) == y
    return small, x[keep][:32], y[keep][:32]


class Tape:
    """Stands in for torch.rand or torch.randn and plays back what it was given."""

    def __init__(self, *tensors: Tensor) -> None:
        self.left = list(tensors)

    def __call__(self, *shape: object, **_: object) -> Tensor:
        only = shape[0]
        wanted = only.shape if isinstance(only, Tensor) else shape if isinstance(only, int) else only
        return self.left.pop(0).reshape(tuple(wanted)).clone()


def run(machine, rows: Rows, x: Tensor, y: Tensor) -> State:
    stream = Noise(4).stream(machine.name, rows.image, rows.rank, rows.restart)
    state = machine.init(rows, x, y, stream)
    while not bool(state.done.all()):
        machine.step(state)
    return state


def uniform_tape(machine, rows: Rows, shape: tuple[int, ...]) -> Tensor:
    stream = Noise(4).stream(machine.name, rows.image, rows.rank, rows.restart)
    return (stream.uniform(0, shape).double() + 1).div(2).float()


def gaussian_tape(machine, rows: Rows, shape: tuple[int, ...]) -> Tensor:
    return Noise(4).stream(machine.name, rows.image, rows.rank, rows.restart).gaussian(0, shape)


def same_rows(ours: Tensor, theirs: Tensor, tolerance: float) -> float:
    """The share of rows that agree; a sign of a gradient near zero may send single rows elsewhere."""
    return float(((ours - theirs).flatten(1).abs().amax(1) < tolerance).float().mean())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", ["ce", "dlr", "dlr-targeted"])
@pytest.mark.parametrize("steps", [100, 12])
def test_apgd_follows_the_same_path(monkeypatch, correct, norm, loss, steps):
    model, x, y = correct
    name, eps = NORMS[norm]
    machine = Apgd(Victim(model), Threat(norm, eps), loss=loss, steps=steps)
    with torch.no_grad():
        logits = model(x)
    rows = plan(torch.arange(len(x)), logits, targets=1 if loss == "dlr-targeted" else 0)
    ours = run(machine, rows, x, y)
    if loss == "dlr-targeted":
        theirs = APGDAttack_targeted(model, n_iter=steps, norm=name, eps=eps, seed=0, device="cpu")
        theirs.y_target = rows.target
    else:
        theirs = APGDAttack(model, n_iter=steps, norm=name, eps=eps, seed=0, loss=loss, device="cpu")
    theirs.init_hyperparam(x)
    shape = tuple(x.shape[1:])
    monkeypatch.setattr(torch, "rand", Tape(uniform_tape(machine, rows, shape)))
    monkeypatch.setattr(torch, "randn", Tape(gaussian_tape(machine, rows, shape)))
    x_best, standing, loss_best, x_adv = theirs.attack_single_run(x, y)
    monkeypatch.undo()
    # Targeted DLR divides by a difference of logits that comes near zero, so single rows part there.
    most = 0.65 if loss == "dlr-targeted" else 0.85
    assert same_rows(ours.x_best, x_best, 1e-3) >= most
    assert float(((ours.loss_best - loss_best) / (1 + loss_best.abs())).abs().median()) < 1e-3
    assert float((ours.fooled == ~standing.bool()).float().mean()) >= 0.9
    both = ours.fooled & ~standing.bool()
    assert same_rows(ours.adv[both], x_adv[both], 1e-3) >= most


def test_apgd_in_l1_follows_the_schedule_of_radii(monkeypatch, correct):
    model, x, y = correct
    eps, steps = 3.0, 40
    machine = Apgd(Victim(model), Threat("l1", eps), steps=steps, large_eps=True)
    assert machine.phases == [(9.0, 12), (6.0, 12), (3.0, 16)]
    rows = plan(torch.arange(len(x)), torch.empty(0))
    ours = run(machine, rows, x, y)
    theirs = APGDAttack(model, n_iter=steps, norm="L1", eps=eps, seed=0, loss="ce", device="cpu", use_largereps=True)
    theirs.init_hyperparam(x)
    noise = gaussian_tape(machine, rows, tuple(x.shape[1:]))
    monkeypatch.setattr(torch, "randn_like", Tape(noise))
    monkeypatch.setattr(torch, "randn", lambda shape, **_: torch.zeros(shape))
    x_best, standing, loss_best, _ = theirs.decr_eps_pgd(x, y, [9.0, 6.0, 3.0], [12, 12, 16])
    monkeypatch.undo()
    # The sparsity of the next steps is a count of entries that differ from the image; rounding leaves the authors'
    # projection a few that differ by 1e-8, so single rows part.
    assert same_rows(ours.x_best, x_best, 1e-3) >= 0.6
    assert float((ours.loss_best - loss_best).abs().median()) < 1e-4
    assert float((ours.fooled == ~standing.bool()).float().mean()) >= 0.9


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_fab_finds_points_at_the_same_distance(correct, norm, rank):
    model, x, y = correct
    name, eps = NORMS[norm]
    machine = Fab(Victim(model), Threat(norm, eps), targeted=rank > 0, steps=30, first=False)
    with torch.no_grad():
        logits = model(x)
    every = plan(torch.arange(len(x)), logits, targets=rank)
    every.keep(every.rank == rank)
    ours = run(machine, every, x, y)
    theirs = FABAttack_PT(model, norm=name, n_iter=30, eps=eps, device="cpu", targeted=rank > 0)
    theirs.target_class = rank + 1
    x_adv = theirs.attack_single_run(x, y, is_targeted=rank > 0)
    distance = GEOMETRY[norm].distance(x_adv, x)
    found = distance > 0
    assert torch.equal(found, ours.nearest.isfinite())
    ratio = (ours.nearest / distance)[found]
    assert float(((ratio - 1).abs() < 1e-3).float().mean()) >= 0.9
    assert float(ratio.median()) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("norm", NORMS)
def test_fab_random_starts(monkeypatch, correct, norm):
    model, x, y = correct
    name, eps = NORMS[norm]
    machine = Fab(Victim(model), Threat(norm, eps), "fab", targeted=False, steps=10, first=False)
    rows = plan(torch.arange(len(x)), torch.empty(0), restarts=2)
    rows.keep(rows.restart == 1)
    ours = run(machine, rows, x, y)
    theirs = FABAttack_PT(model, norm=name, n_iter=10, eps=eps, device="cpu")
    shape = tuple(x.shape[1:])
    monkeypatch.setattr(torch, "rand", Tape(uniform_tape(machine, rows, shape)))
    monkeypatch.setattr(torch, "randn", Tape(gaussian_tape(machine, rows, shape)))
    x_adv = theirs.attack_single_run(x, y, use_rand_start=True)
    monkeypatch.undo()
    distance = GEOMETRY[norm].distance(x_adv, x)
    ratio = (ours.nearest / distance)[distance > 0]
    assert float(((ratio - 1).abs() < 1e-3).float().mean()) >= 0.85


class Queries(nn.Module):
    """Wraps a model and keeps what it was asked."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.asked = model, []

    def forward(self, x: Tensor) -> Tensor:
        self.asked.append(x.detach().clone())
        return self.model(x)


class Plain(nn.Module):
    """10×10 images in 3 channels, 4 classes; robust enough that Square goes on searching."""

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(0.1 * torch.randn(4, 300, generator=g))
        self.bias = nn.Parameter(torch.tensor([6.0, 0.0, 0.0, 0.0]))

    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1) - 0.5).tanh() @ self.weight.T + self.bias


@pytest.mark.parametrize("norm", NORMS)
def test_square_makes_the_same_queries(monkeypatch, norm):
    """One image at a time (the authors share windows across a batch): the accepted points and margins agree,
    until one of hundreds of comparisons is decided by a last bit."""
    name, eps = NORMS[norm]
    steps, channels = 200, 3
    model = Plain().eval()
    x = torch.rand(1, channels, 10, 10, generator=torch.Generator().manual_seed(8))
    y = torch.zeros(1, dtype=torch.int64)
    rows = plan(torch.arange(1), torch.empty(0))
    machine = Square(Victim(model), Threat(norm, eps), seed=4, steps=steps)
    ours = run(machine, rows, x, y)

    stream = Noise(4).stream("square", rows.image, rows.rank, rows.restart)
    tape = list(square_tape(stream, norm, steps, channels, 10))
    asked = Queries(model)
    theirs = SquareAttack(asked, norm=name, eps=eps, n_queries=steps, p_init=0.8, seed=0, resc_schedule=False)
    theirs.init_hyperparam(x)
    monkeypatch.setattr(torch, "rand", Tape(*tape))
    _, x_adv = theirs.attack_single_run(x, y)
    monkeypatch.undo()
    assert len(asked.asked) == steps + 1
    assert torch.allclose(ours.x, x_adv, atol=1e-5)
    with torch.no_grad():
        assert float(ours.best) == pytest.approx(float(margin(model(x_adv), y)), abs=1e-5)


def square_tape(stream, norm: str, steps: int, c: int, size: int) -> Iterator[Tensor]:
    """What the authors' code must draw, in its order, to get our windows and signs."""

    def share(word: Tensor) -> Tensor:
        return ((word.double() + 0.5) / 2**32).float().reshape(1)

    def signs(words: Tensor) -> Tensor:
        return torch.where(bits(words.reshape(1, -1), c), 0.75, 0.25)

    if norm == "linf":
        yield torch.where(stream.words(0, c * size) >= 1 << 31, 0.75, 0.25)
    else:
        tiles = (size // (size // 5)) ** 2
        for words in stream.words(0, tiles * 2).view(tiles, 2):
            yield share(words[0])
            yield signs(words[1])
    for query in range(1, steps + 1):
        words = stream.words(query, 3 if norm == "linf" else 6)[0]
        if norm == "linf":
            yield from (share(words[0]), share(words[1]), signs(words[2]))
        else:
            yield from (share(words[n]) for n in range(5))
            yield signs(words[5])


def test_objectives_agree(correct):
    model, x, y = correct
    with torch.no_grad():
        z = model(x)
    z = torch.cat((z, z.flip(1)))
    y = torch.cat((y, y))
    theirs = APGDAttack_targeted(model, norm="Linf", eps=0.1, device="cpu")
    theirs.y_target = (y + 1) % 6
    assert torch.allclose(dlr(z, y, y), theirs.dlr_loss(z, y), atol=1e-5)
    assert torch.allclose(dlr_targeted(z, y, theirs.y_target), theirs.dlr_loss_targeted(z, y), atol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_projections_agree(norm):
    from pyautoattack import fab_projections
    from pyautoattack.autopgd_base import L1_projection

    from robudget.attacks.fab import to_plane
    from robudget.attacks.geometry import l1_project

    g = torch.Generator().manual_seed(3)
    t, w = torch.rand(50, 64, generator=g), torch.randn(50, 64, generator=g)
    b = (w * torch.rand(50, 64, generator=g)).sum(1)
    theirs = getattr(fab_projections, f"projection_{norm}")(t, w, b)
    ours = to_plane(t, w, (w * t).sum(1) - b, norm)
    assert torch.allclose(GEOMETRY[norm].size(ours), GEOMETRY[norm].size(theirs), rtol=1e-3, atol=1e-5)
    assert same_rows(ours, theirs, 1e-3) >= 0.95
    if norm == "l1":
        x = torch.rand(50, 1, 8, 8, generator=g)
        move = torch.randn(50, 1, 8, 8, generator=g)
        assert torch.allclose(l1_project(x + move, x, 3.0), x + move + L1_projection(x, move, 3.0), atol=1e-5)
