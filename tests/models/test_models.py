"""Architectures: published parameter and FLOP counts, parity with the reference network, names, folding."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from safetensors.torch import load_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from robudget.backend.folding import Folded
from robudget.backend.kernels import Arithmetic
from robudget.errors import InputError
from robudget.models import Normalize, PreActNet, build, build_for
from robudget.models.preact import Block, checkpoint_activations
from robudget.recipe import Recipe

SHARED = Path(__file__).resolve().parents[2] / ".." / "shared"


def on_meta(name: str, **options: object) -> nn.Module:
    with torch.device("meta"):
        return build(name, classes=10, image_size=32, **options)  # type: ignore[arg-type]


def trained_a_little(model: nn.Module) -> nn.Module:
    """BatchNorm statistics and weights away from their start, so that every term counts."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            for tensor in (module.running_mean, module.bias.data):
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
            for tensor in (module.running_var, module.weight.data):
                tensor.copy_(1 + 0.3 * torch.rand(tensor.shape, generator=generator))
    return model


@pytest.mark.parametrize(
    ("name", "parameters", "gflops"),
    [
        ("wrn-28-10", 36_479_194, 10.49),
        ("wrn-34-10", 46_160_474, 13.32),
        ("wrn-34-20", 184_531_674, 53.16),
        ("wrn-70-16", 266_796_506, 77.53),
    ],
)
def test_the_papers_models(name: str, parameters: int, gflops: float) -> None:
    for variant in ("original", "deepmind"):
        model = on_meta(name, variant=variant, activation="silu")
        assert sum(p.numel() for p in model.parameters()) == parameters
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, 32, 32, device="meta"))
        assert counter.get_total_flops() / 1e9 == pytest.approx(gflops, rel=0.005)


def test_other_families_have_their_published_sizes() -> None:
    assert sum(p.numel() for p in on_meta("preact-resnet-18").parameters()) == 11_172_170
    assert sum(p.numel() for p in on_meta("rawrn-70-16").parameters()) == pytest.approx(267.2e6, rel=1e-3)
    assert sum(p.numel() for p in on_meta("wrn-94-16").parameters()) == pytest.approx(366e6, rel=0.01)


def test_same_function_as_the_reference_network() -> None:
    home = SHARED / "reference"
    if not home.exists():
        pytest.skip("the shared folder with the reference network is not beside this checkout")
    spec = importlib.util.spec_from_file_location("reference_wrn", home / "wrn.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    weights = load_file(home / "wrn16_2_at.safetensors")
    theirs = module.WideResNet(16, 2)
    theirs.load_state_dict(weights)
    ours = build("wrn-16-2", classes=10, image_size=32, mean=(0, 0, 0), std=(1, 1, 1))
    ours.load_state_dict(weights | {"normalize.mean": torch.zeros(1, 3, 1, 1), "normalize.std": torch.ones(1, 3, 1, 1)})
    x = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=0, atol=1e-6)


def test_normalisation_is_the_first_layer() -> None:
    torch.manual_seed(0)
    plain = build("wrn-10-1", classes=10, image_size=8, base=4, mean=(0, 0, 0), std=(1, 1, 1)).eval()
    inside = build("wrn-10-1", classes=10, image_size=8, base=4, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7)).eval()
    inside.load_state_dict({k: v for k, v in plain.state_dict().items() if "normalize" not in k}, strict=False)
    x = torch.rand(3, 3, 8, 8)
    mean, std = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1), torch.tensor([0.5, 0.6, 0.7]).view(3, 1, 1)
    torch.testing.assert_close(inside(x), plain((x - mean) / std))


def test_deepmind_padding_looks_right_and_down() -> None:
    torch.manual_seed(0)
    block = Block(2, 3, 2, nn.ReLU, "deepmind")
    x = torch.rand(1, 2, 6, 6)
    seen = block.conv1(block.pad(x))
    weight = block.conv1.weight
    wide = F.pad(x, (0, 3, 0, 3))
    by_hand = torch.stack(
        [
            torch.stack(
                [(weight * wide[:, :, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3]).sum((1, 2, 3)) for j in range(3)], 1
            )
            for i in range(3)
        ],
        1,
    )
    torch.testing.assert_close(seen[0], by_hand)
    assert block.bn1.momentum == 0.01
    assert Block(2, 3, 2, nn.ReLU, "original").bn1.momentum == 0.1


@pytest.mark.parametrize(
    ("name", "size", "channels", "options"),
    [
        ("wrn-10-1", 8, 1, {"base": 3, "activation": "gelu"}),
        ("wrn-16-1", 64, 3, {"variant": "deepmind", "activation": "silu"}),
        ("preact-resnet-18", 32, 3, {"base": 4}),
        ("rawrn-70-16", 16, 3, {"base": 2}),
        ("resnet18", 8, 1, {}),
        ("vit_tiny_patch16_224", 32, 3, {"patch": 4}),
        ("xcit_nano_12_p8_224", 32, 3, {}),
        ("convnext_atto", 32, 3, {}),
        ("convnext_atto", 224, 3, {}),
    ],
)
def test_any_size_and_family(name: str, size: int, channels: int, options: dict[str, object]) -> None:
    model = build(name, classes=7, image_size=size, channels=channels, **options)  # type: ignore[arg-type]
    assert model.training
    x = torch.rand(2, channels, size, size, requires_grad=True)
    logits = model(x)
    assert logits.shape == (2, 7)
    logits.sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize(
    ("name", "options"),
    [("vit_tiny_patch16_224", {"patch": 4}), ("xcit_nano_12_p8_224", {}), ("convnext_atto", {}), ("wrn-10-2", {})],
)
def test_the_base_is_sixteenths_of_the_published_width(name: str, options: dict[str, object]) -> None:
    def weights(base: int) -> int:
        return sum(p.numel() for p in on_meta(name, base=base, **options).parameters() if p.dim() > 1)

    published = weights(16)
    assert 3.5 * published < weights(32) < 4 * published
    assert published / 4 < weights(8) < published / 3.2
    assert weights(11) < published


def test_bad_names_and_sizes() -> None:
    def refused(name: str, match: str, **options: object) -> None:
        with pytest.raises(InputError, match=match) as caught:
            build(name, **({"classes": 10, "image_size": 32} | options))  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)

    refused("wrm-28-10", "unknown model 'wrm-28-10'; did you mean 'wrn-28-10'")
    refused("resnet-18", "unknown model 'resnet-18'; did you mean 'resnet18'")
    refused("wrn-27-10", r"depth must be 6n \+ 4 .*did you mean wrn-28-10")
    refused("wrn-16-1", "unknown activation 'mish'", activation="mish")
    refused("wrn-16-1", "unknown variant", variant="google")
    refused("wrn-16-1", "model.patch = 4", patch=4)
    refused("resnet18", r"model.base = 8 with model 'resnet18' \(ResNet\), whose width can't be changed", base=8)
    refused("wrn-16-1", "image_size = 4", image_size=4)
    refused("wrn-16-1", "classes = 1", classes=1)
    refused("vit_tiny_patch16_224", "can't take images of 8×8×3", image_size=8)


def test_timm_users_get_them_too() -> None:
    import timm

    import robudget.models.timm_registry  # noqa: F401

    assert "robudget_wrn_28_10" in timm.list_models("robudget_*")
    model = timm.create_model("robudget_wrn_10_1", num_classes=5, in_chans=1, base=4, activation="silu")
    assert isinstance(model, PreActNet)
    assert model(torch.rand(2, 1, 8, 8)).shape == (2, 5)
    with pytest.raises(InputError, match="no published weights"):
        timm.create_model("robudget_wrn_10_1", pretrained=True)


def test_weights_come_from_the_recipes_seed_and_leave_the_global_generator() -> None:
    class Spec:
        classes, image_shape, mean, std = 10, (1, 8, 8), (0.3,), (0.4,)

    recipe = Recipe().with_({"model.name": "wrn-10-1", "model.base": 2})
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, again = build_for(recipe, Spec()), build_for(recipe, Spec())
    assert torch.equal(torch.rand(3), expected)
    other = build_for(recipe.with_({"seed": 1}), Spec())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.stem.weight, other.stem.weight)  # type: ignore[union-attr, arg-type]


@pytest.mark.parametrize(("variant", "excite"), [("original", False), ("deepmind", False), ("deepmind", True)])
def test_folding_keeps_the_function(variant: str, excite: bool) -> None:
    torch.manual_seed(0)
    normalize = Normalize((0.5,) * 3, (0.25,) * 3)
    model = PreActNet(8, [2, 1, 1], [8, 16, 24], classes=10, normalize=normalize, variant=variant, excite=excite)
    trained_a_little(model).eval()
    x = torch.rand(4, 3, 16, 16)
    folded = Folded(model, x, Arithmetic(torch.float32, channels_last=True, live=True))
    torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    folded.refresh()
    torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-5)
    # The gradient of the input too; to the weights none flows.
    leaf = x.clone().requires_grad_(True)
    (mine,) = torch.autograd.grad(F.cross_entropy(folded(leaf), torch.arange(4)), leaf)
    (exact,) = torch.autograd.grad(F.cross_entropy(model(leaf), torch.arange(4)), leaf)
    torch.testing.assert_close(mine, exact, rtol=1e-3, atol=1e-6)
    low = Folded(model, x, Arithmetic(torch.bfloat16, channels_last=True, live=True))
    leaf = x.clone().requires_grad_(True)
    (mine,) = torch.autograd.grad(F.cross_entropy(low(leaf), torch.arange(4), reduction="sum"), leaf)
    (exact,) = torch.autograd.grad(F.cross_entropy(model(leaf), torch.arange(4), reduction="sum"), leaf)
    assert F.cosine_similarity(mine.flatten(1), exact.flatten(1)).min() > 0.9


def test_recomputed_activations_change_nothing() -> None:
    def gradients(checkpointing: bool) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        torch.manual_seed(0)
        model = build("wrn-16-1", classes=10, image_size=16, base=4)
        if checkpointing:
            checkpoint_activations(model, "wrn-16-1")
        x = torch.rand(8, 3, 16, 16)
        F.cross_entropy(model(x), torch.arange(8)).backward()
        return [p.grad for p in model.parameters() if p.grad is not None], model.state_dict()

    plain, statistics = gradients(False)
    again, statistics_again = gradients(True)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    # BatchNorm has seen the batch once, not twice.
    assert all(torch.equal(statistics[name], statistics_again[name]) for name in statistics)


def test_recomputed_activations_are_not_kept() -> None:
    def kept(checkpointing: bool) -> int:
        model = build("wrn-28-1", classes=10, image_size=16, base=4)
        if checkpointing:
            checkpoint_activations(model, "wrn-28-1")
        own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
        sizes: dict[int, int] = {}
        alive = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                sizes[storage.data_ptr()] = storage.nbytes()
                alive.append(storage)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            logits = model(torch.rand(8, 3, 16, 16))
        assert logits.requires_grad
        return sum(sizes.values())

    assert kept(True) < 0.4 * kept(False)


def test_recomputation_where_it_would_be_wrong_is_refused() -> None:
    with pytest.raises(InputError, match="not available"):
        checkpoint_activations(build("resnet18", classes=10, image_size=32), "resnet18")
    model = build("vit_tiny_patch16_224", classes=10, image_size=32)
    checkpoint_activations(model, "vit_tiny_patch16_224")
    model(torch.rand(2, 3, 32, 32)).sum().backward()


def test_normalisation_needs_positive_deviations() -> None:
    with pytest.raises(InputError, match="positive std"):
        Normalize((0.5,), (0.0,))
