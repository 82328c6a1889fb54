"""The crafting copy: the same function as the model, cheaper; or the model itself. Low precision is verified."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from robudget.attacks.ensemble import Member
from robudget.attacks.victim import Victim
from robudget.backend.batch_size import call_size, least_size
from robudget.backend.folding import Folded, crafting_copy
from robudget.backend.kernels import Arithmetic, Conv, Norm, Residual
from robudget.backend.precision import gains_in_attacks, has_bfloat16, resolve
from robudget.evaluation.confirmation import images_if_none_falls
from robudget.evaluation.evaluator import evaluate
from robudget.models import build
from robudget.threat import Threat

CPU = torch.device("cpu")


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Statistics and scales as after a training, so that folding has something to get wrong."""
    g = torch.Generator().manual_seed(seed)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.copy_(0.2 * torch.randn(m.num_features, generator=g))
            m.running_var.copy_(0.5 + torch.rand(m.num_features, generator=g))
            with torch.no_grad():
                m.weight.copy_(0.5 + torch.rand(m.num_features, generator=g))
                m.bias.copy_(0.1 * torch.randn(m.num_features, generator=g))
    return model.eval()


def answers(model, x: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    z = model(leaf)
    (g,) = torch.autograd.grad((z.float() * torch.arange(z.shape[1])).sum(), leaf)
    return z.detach().float(), g


NETWORKS = {
    "wrn-10-1 on digits": lambda: (build("wrn-10-1", classes=10, image_size=8, channels=1, base=4), (1, 8, 8)),
    "wrn-16-2": lambda: (build("wrn-16-2", classes=10, image_size=32), (3, 32, 32)),
    "wrn-10-1 silu": lambda: (
        build("wrn-10-1", classes=10, image_size=16, activation="silu", variant="deepmind"),
        (3, 16, 16),
    ),
    "preact-resnet-18": lambda: (build("preact-resnet-18", classes=10, image_size=16, base=4), (3, 16, 16)),
    "timm resnet10t": lambda: (build("resnet10t", classes=10, image_size=32), (3, 32, 32)),
    "timm mobilenet": lambda: (build("mobilenetv3_small_050", classes=10, image_size=32), (3, 32, 32)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_copy_is_the_same_function(name):
    torch.manual_seed(0)
    model, shape = NETWORKS[name]()
    randomised(model)
    x = torch.rand(6, *shape, generator=torch.Generator().manual_seed(1))
    copy = Folded(model, x, Arithmetic(torch.float32, shape[1] >= 16))
    assert any(isinstance(m, Conv) for m in copy.modules())
    assert any(isinstance(m, Residual) for m in copy.modules()) == name.startswith(("wrn-10-1 on", "wrn-16", "preact"))
    assert not any(isinstance(m, (nn.Conv2d, nn.BatchNorm2d)) for m in copy.modules())
    for mine, theirs in zip(answers(copy, x), answers(model, x), strict=True):
        error = (mine - theirs).flatten(1).norm(dim=1) / theirs.flatten(1).norm(dim=1)
        assert float(error.max()) < 3e-3  # a gradient may cross a ReLU's kink
        assert float(error.median()) < 1e-5
    with_gradient = answers(copy, x)[0]
    with torch.no_grad():
        assert torch.equal(copy(x), with_gradient)


CONVOLUTIONS = [
    # in, out, size, kernel, stride, padding, bias
    (1, 4, 8, 3, 1, 1, False),
    (4, 4, 8, 3, 1, 1, True),
    (4, 8, 8, 3, 2, 1, False),
    (4, 8, 8, 1, 2, 0, True),
    (8, 16, 4, 3, 2, 1, True),
    (16, 16, 2, 3, 1, 1, False),
    (3, 8, 9, 3, 2, 1, True),
    (3, 8, 9, 5, 2, 2, False),
    (20, 12, 7, 3, 2, 0, True),
    (6, 6, 8, 1, 1, 0, False),
]


@pytest.mark.parametrize("case", CONVOLUTIONS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_every_kernel_of_a_convolution(case, channels_last):
    c, out, size, k, s, p, bias = case
    torch.manual_seed(1)
    source = nn.Conv2d(c, out, k, s, p, bias=bias)
    layer = Conv(source, (c, size, size))
    layer.relu, layer.how = True, Arithmetic(torch.float32, channels_last)
    layer.load(source.weight, source.bias)
    x = torch.randn(5, c, size, size)
    skip = torch.randn_like(source(x))
    ours, theirs = (t.clone().requires_grad_() for t in (x, x))
    ours_skip, theirs_skip = (t.clone().requires_grad_() for t in (skip, skip))
    y, z = layer(ours, ours_skip), (source(theirs) + theirs_skip).relu()
    g = torch.randn_like(z)
    y.backward(g)
    z.backward(g)
    assert torch.allclose(y, z, atol=1e-5)
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-4)
    assert torch.allclose(ours_skip.grad, theirs_skip.grad, atol=1e-5)


def test_grouped_and_dilated_convolutions():
    for source in (nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.Conv2d(4, 6, 3, 1, 2, dilation=2)):
        c = source.in_channels
        layer = Conv(source, (c, 6, 6))
        layer.load(source.weight, source.bias)
        x = torch.randn(3, c, 6, 6)
        for mine, theirs in zip(answers_of_layer(layer, x), answers_of_layer(source, x), strict=True):
            assert torch.allclose(mine, theirs, atol=1e-5)


def answers_of_layer(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    y = layer(leaf)
    return y.detach(), torch.autograd.grad((y * torch.linspace(-1, 1, y[0].numel()).view(y[0].shape)).sum(), leaf)[0]


def test_norm_alone_and_with_relu():
    source = randomised(nn.BatchNorm2d(5))
    for relu in (False, True):
        layer = Norm()
        layer.relu = relu
        layer.load(source)
        plain = nn.Sequential(source, nn.ReLU() if relu else nn.Identity())
        x = torch.randn(4, 5, 3, 3)
        for mine, theirs in zip(answers_of_layer(layer, x), answers_of_layer(plain, x), strict=True):
            assert torch.allclose(mine, theirs, atol=1e-5)


def test_folding_leaves_the_model_as_it_was(small, images):
    before = {k: v.clone() for k, v in small.state_dict().items()}
    for precision in ("float32", "bfloat16"):
        crafting_copy(small, images[0][:8], precision)
    assert all(torch.equal(v, before[k]) for k, v in small.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in small.parameters())


class Branches(nn.Module):
    """What cannot be traced: the path depends on the image."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) if float(x.mean()) > 0 else self.model(-x)


class Jitters(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x + 0.1 * torch.rand(x.shape[1:]))


def test_what_cannot_be_copied_is_run_as_it_is(small, images, capsys):
    for model in (Branches(small), Jitters(small)):
        assert crafting_copy(model, images[0][:8], "float32") is model
    function = small.forward
    assert crafting_copy(function, images[0][:8], "float32") is function
    assert capsys.readouterr().err == ""


def test_bfloat16_falls_back_to_autocast(small, images):
    copy = crafting_copy(Branches(small), images[0][:8], "bfloat16")
    with torch.no_grad():
        assert torch.allclose(copy(images[0][:8]).float(), small(images[0][:8]), atol=0.1, rtol=0.05)


def test_low_precision_changes_no_verdict(small, many):
    """Attacked in bfloat16, verified and confirmed in float32: the same accuracy as in float32 throughout."""
    x, y = many
    threat = Threat("linf", 0.04)
    quick = [Member("apgd-ce", steps=20), Member("fab-t", steps=20, targets=3), Member("square", steps=200)]
    low = evaluate(small, x, y, threat, attacks=quick, precision="bfloat16", checks=False)
    full = evaluate(small, x, y, threat, attacks=quick, precision="float32", checks=False)
    assert float((low.robust == full.robust).mean()) >= 0.99
    names = [item.attack for item in low.spent]
    assert names[:5] == ["clean", "apgd-ce", "fab-t", "square", "apgd-ce@float32"][:5]
    again = next(item for item in low.spent if item.attack == "apgd-ce@float32")
    standing = low.robust.sum() + sum(item.broken for item in low.spent if "@" in item.attack)
    fell = sum(item.broken for item in low.spent if "@" in item.attack)
    assert again.images == images_if_none_falls(standing) if fell == 0 else again.images >= 0.05 * standing


@pytest.mark.parametrize("name", ["fab-t", "square"])
@pytest.mark.parametrize("masked", [False, True])
def test_each_attack_alone_is_as_strong_in_low_precision(small, many, name, masked):
    """An ensemble's agreement cannot show that one of its members is broken. Masked: logits times a thousand."""
    x, y = many
    model = nn.Sequential(small, Scale(1e3)).eval() if masked else small
    member = [Member(name, steps=30 if name == "fab-t" else 600, targets=3)]
    threat = Threat("linf", 0.05 if name == "fab-t" else 0.1)
    low = evaluate(model, x, y, threat, attacks=member, precision="bfloat16", checks=False)
    full = evaluate(model, x, y, threat, attacks=member, precision="float32", checks=False)
    fast = next(item for item in low.spent if item.attack == name)
    slow = next(item for item in full.spent if item.attack == name)
    assert abs(fast.broken - slow.broken) <= 0.02 * len(x)
    assert slow.broken > 10


class Scale(nn.Module):
    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by

    def forward(self, z: Tensor) -> Tensor:
        return self.by * z


def test_auto_precision_follows_flags_and_size(small, images, monkeypatch):
    x = images[0][:4]

    def resolved(asked: str, model: nn.Module) -> str:
        return resolve(asked, CPU, lambda: gains_in_attacks(model, x)).name

    monkeypatch.setattr("robudget.backend.precision.has_bfloat16", lambda device: True)
    assert resolved("auto", small) == "float32"  # a small network gains nothing
    big = nn.Sequential(nn.Conv2d(1, 512, 3), nn.Conv2d(512, 512, 3), nn.Flatten(), nn.Linear(8192, 6)).eval()
    assert resolved("auto", big) == "bfloat16"
    assert resolved("float32", big) == "float32"
    monkeypatch.setattr("robudget.backend.precision.has_bfloat16", lambda device: False)
    assert resolved("auto", big) == "float32"
    assert isinstance(has_bfloat16(CPU), bool)


def test_least_size_is_where_answers_stop_changing(small, images):
    x, y = images

    class Fickle(nn.Module):
        """Answers otherwise in batches below 12, as a library with two kernels would."""

        def forward(self, v: Tensor) -> Tensor:
            return small(v) * (1 + 1e-6 * (len(v) < 12))

    assert least_size(Victim(Fickle()), x, y, 64) == 12
    assert least_size(Victim(small), x, y, 64) <= 16

    class Always(nn.Module):
        def forward(self, v: Tensor) -> Tensor:
            return small(v) * (1 + 1e-6 * len(v))

    assert least_size(Victim(Always()), x, y, 64) == 64


def test_a_call_on_a_cpu_keeps_a_layers_output_within_the_caches():
    wide = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5))
    x = torch.rand(2, 3, 32, 32)
    assert call_size(wide, x, 500, 2) == 2**23 // (32 * 32 * 32 * 2) == 128
    assert call_size(wide, x, 500, 4) == 64
    assert call_size(wide, x, 50, 4) == 50, "never more than was asked for"
    assert call_size(wide, torch.rand(1, 3, 224, 224), 500, 4) == 16, "nor so few that the call itself costs most"
    assert call_size(lambda v: wide(v), x, 500, 4) == 500, "a function does not tell its layers"
