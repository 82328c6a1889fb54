"""What every attack owes its caller: the ball, the box, the model as it was, clear errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from robudget.attacks.build import attack
from robudget.attacks.ensemble import Member, ensemble, fit_to_classes
from robudget.attacks.geometry import within
from robudget.attacks.noise import Noise
from robudget.attacks.square import side
from robudget.errors import InputError
from robudget.threat import Threat

ATTACKS = {
    "pgd": Member("pgd", steps=10),
    "apgd-ce": Member("apgd-ce", steps=15),
    "apgd-dlr": Member("apgd-dlr", steps=15, restarts=2),
    "apgd-t": Member("apgd-t", steps=15, targets=3),
    "fab": Member("fab", steps=8, restarts=2),
    "fab-t": Member("fab-t", steps=15, targets=3),
    "square": Member("square", steps=150),
}
THREATS = [Threat("linf", 0.12), Threat("l2", 0.7), Threat("l1", 4.0)]


@pytest.mark.parametrize("threat", THREATS, ids=str)
@pytest.mark.parametrize("name", ATTACKS)
def test_examples_obey_the_contract_and_the_model_is_as_it_was(small, images, name, threat):
    x, y = images
    before = {k: v.clone() for k, v in small.state_dict().items()}
    asked = x.clone()
    small.train()
    next(small.parameters()).requires_grad_(False)
    try:
        x_adv = attack(small, x, y, threat, ATTACKS[name])
        assert all(m.training for m in small.modules())
        assert [p.requires_grad for p in small.parameters()].count(False) == 1
        assert all(p.grad is None for p in small.parameters())
    finally:
        next(small.parameters()).requires_grad_(True)
        for p in small.parameters():
            p.grad = None
        small.eval()
    assert all(torch.equal(v, before[k]) for k, v in small.state_dict().items())
    assert torch.equal(x, asked)
    assert x_adv.shape == x.shape
    assert x_adv.dtype == x.dtype
    assert within(x_adv, x, threat.eps, threat.norm).all()
    with torch.no_grad():
        clean, attacked = small(x).argmax(1) == y, small(x_adv).argmax(1) == y
    moved = (x_adv != x).flatten(1).any(1)
    # An image is moved where, and only where, that misleads the model.
    assert torch.equal(moved, clean & ~attacked)
    assert moved.any()


class Breaks(nn.Module):
    """Fails after so many calls."""

    def __init__(self, model: nn.Module, after: int) -> None:
        super().__init__()
        self.model, self.left = model, after

    def forward(self, x: Tensor) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("device lost")
        return self.model(x)


@pytest.mark.parametrize("name", ATTACKS)
def test_the_model_is_as_it_was_after_a_failure(small, images, name):
    x, y = images
    model = Breaks(small, 4)
    model.train()
    with pytest.raises(RuntimeError, match="device lost"):
        attack(model, x, y, Threat("linf", 0.1), ATTACKS[name])
    assert model.training
    assert small.training
    small.eval()


@pytest.mark.parametrize("name", ATTACKS)
def test_an_image_does_not_know_its_batch(small, images, name):
    """Alone, in another order and in other company an image meets the same noise, and so the same verdict (but for
    kernels that a library chooses by the batch's size, whose last bits may tip a close one)."""
    x, y = images
    threat, index = Threat("linf", 0.1), torch.arange(len(x))
    whole = attack(small, x, y, threat, ATTACKS[name], noise=Noise(3))
    for order in (torch.arange(20, 40), torch.randperm(len(x), generator=torch.Generator().manual_seed(0))):
        for batch_size in (7, 500):
            noise = Noise(3, index[order])
            part = attack(small, x[order], y[order], threat, ATTACKS[name], noise=noise, batch_size=batch_size)
            with torch.no_grad():
                same = (small(part).argmax(1) == y[order]) == (small(whole[order]).argmax(1) == y[order])
            assert float(same.float().mean()) >= 0.95


def test_other_seeds_other_examples(small, images):
    x, y = images
    threat = Threat("linf", 0.12)
    first, again, other = (attack(small, x, y, threat, ATTACKS["apgd-ce"], noise=Noise(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_eps_zero_moves_nothing(small, images):
    x, y = images
    for name in ATTACKS:
        assert torch.equal(attack(small, x, y, Threat("linf", 0), ATTACKS[name]), x)


def test_a_plain_function_is_a_model_too(small, images):
    x, y = images
    x_adv = attack(lambda v: small(v), x, y, Threat("linf", 0.12), "pgd:steps=10,step_size=0.03")
    assert (small(x_adv).argmax(1) != y).float().mean() > (small(x).argmax(1) != y).float().mean()


BAD = [
    ({"x": torch.rand(3, 8, 8)}, "shape"),
    ({"x": torch.rand(3, 1, 8, 8).double()}, "float64"),
    ({"x": torch.rand(3, 1, 8, 8) * 255}, "\\[0, 1\\]"),
    ({"x": torch.full((3, 1, 8, 8), torch.nan)}, "\\[0, 1\\]"),
    ({"x": torch.empty(0, 1, 8, 8), "y": torch.empty(0, dtype=torch.int64)}, "0 images"),
    ({"y": torch.zeros(3)}, "int64"),
    ({"y": torch.zeros(4, dtype=torch.int64)}, "int64"),
]


@pytest.mark.parametrize(("change", "words"), BAD)
def test_bad_input_is_one_clear_line(small, change, words):
    given = {"x": torch.rand(3, 1, 8, 8), "y": torch.zeros(3, dtype=torch.int64)} | change
    with pytest.raises(InputError, match=words) as error:
        attack(small, given["x"], given["y"], Threat("linf", 0.1), "pgd:steps=1,step_size=0.1")
    assert "\n" not in str(error.value)


def test_bad_choices_name_what_is_allowed(small, images):
    x, y = images
    threat = Threat("linf", 0.1)
    for call in (
        lambda: attack(small, x, y, threat, "pgd:start=unform"),
        lambda: Member("pgd", loss="crossentropy"),
        lambda: Member("apgd-t", loss="dlr"),
        lambda: Member("apgd-dlr", loss="dlr-targeted"),
        lambda: Member("apgd-cee"),
        lambda: Member("square", restarts=0),
        lambda: ensemble("standart", "linf"),
    ):
        with pytest.raises(InputError, match=r"allowed|did you mean"):
            call()


@pytest.mark.parametrize(
    "member",
    [
        Member("square"),
        Member("square", steps=20_000, p=0.5),
        Member("pgd", steps=50, restarts=5, loss="cw", step_size=2 / 255),
        Member("apgd-t", targets=5, eot=20, large_eps=True, loss="ce-targeted"),
    ],
    ids=str,
)
def test_a_member_is_what_its_text_says(member):
    assert Member.parse(str(member)) == member


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("pgdd", "did you mean 'pgd'"),
        ("pgd:step=5", "did you mean 'steps'"),
        ("pgd:steps=many", "a whole number"),
        ("pgd:steps", "a whole number"),
        ("pgd:loss=cv", "did you mean 'cw'"),
        ("square:loss=ce", "unknown loss of square"),
        ("square:p=1.5", "p = 1.5"),
        ("pgd:step_size=0", "step_size = 0"),
        ("apgd-ce:large_eps=yes", "true, false"),
    ],
)
def test_a_text_that_is_no_member_is_one_clear_line(text, words):
    with pytest.raises(InputError, match=words) as error:
        Member.parse(text)
    assert "\n" not in str(error.value)


def test_ensembles_are_the_authors():
    standard = ensemble("standard", "linf")
    assert [m.name for m in standard] == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert [(m.restarts, m.targets, m.length) for m in standard] == [
        (1, 9, 100),
        (1, 9, 100),
        (1, 9, 100),
        (1, 9, 5000),
    ]
    in_l1 = ensemble("standard", "l1")
    assert [(m.restarts, m.targets, m.large_eps) for m in in_l1[:2]] == [(5, 9, True), (1, 5, True)]
    plus = ensemble("plus", "l2")
    assert [m.name for m in plus] == ["apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"]
    assert [m.restarts for m in plus] == [5, 5, 5, 1, 1, 1]
    assert [(m.name, m.eot) for m in ensemble("rand", "linf")] == [("apgd-ce", 20), ("apgd-dlr", 20)]


@pytest.mark.parametrize(("classes", "targets", "loss"), [(10, 9, None), (4, 3, None), (3, 2, "ce-targeted")])
def test_members_fit_the_number_of_classes(classes, targets, loss):
    member, note = fit_to_classes(Member("apgd-t"), classes)
    assert (member.targets, member.loss) == (targets, loss)
    assert (note is None) == (classes == 10)


def test_two_classes_are_attacked_by_cross_entropy():
    member, note = fit_to_classes(Member("apgd-dlr"), 2)
    assert member.loss == "ce"
    assert note is not None
    assert "DLR" in note


def test_square_windows_shrink_as_published():
    """p = 0.8 halved after queries 10, 50, 200, 500, 1000, 2000, 4000; on 32×32 that is these sides."""
    at = [0, 10, 11, 50, 51, 201, 501, 1001, 2001, 4001, 4999]
    assert [side(q, 0.8, "linf", 32, 32) for q in at] == [29, 29, 20, 20, 14, 10, 7, 5, 4, 3, 3]
    assert [side(q, 0.8, "l2", 32, 32) for q in at] == [29, 29, 21, 21, 15, 11, 7, 5, 5, 3, 3]
    assert side(4999, 0.01, "linf", 8, 8) == 1
    assert side(0, 0.8, "linf", 4, 32) == 4
