"""The authors' interface: one import changed, the same calls, the same types."""

from __future__ import annotations

import inspect
import logging

import pytest
import torch
from torch import Tensor, nn

from robudget.attacks.geometry import within
from robudget.errors import InputError
from robudget.evaluation.state import identity_of_state
from robudget.interop.autoattack import AutoAttack


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """A linear classifier of 6×6 images whose correct images lie at all distances from the boundary."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 5)).eval()
    with torch.no_grad():
        net[1].weight.copy_(torch.randn(5, 36, generator=torch.Generator().manual_seed(0)))
        net[1].bias.zero_()
    return net


@pytest.fixture(scope="module")
def images(model) -> tuple[Tensor, Tensor]:
    x = torch.rand(40, 1, 6, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = model(x).argmax(1)
    y[:3] = (y[:3] + 1) % 5
    return x, y


def fast(model, **changes) -> AutoAttack:
    given = {"norm": "Linf", "eps": 0.06, "seed": 0, "device": "cpu", "verbose": False} | changes
    aa = AutoAttack(model, **given)
    aa.square.n_queries = 100
    return aa


def test_returns_x_adv_as_the_authors_do(model, images):
    x, y = images
    aa = fast(model)
    x_adv = aa.run_standard_evaluation(x, y, bs=16)
    assert isinstance(x_adv, Tensor)
    assert x_adv.shape == x.shape
    assert within(x_adv, x, 0.06, "linf").all()
    with torch.no_grad():
        robust = model(x_adv).argmax(1) == y
    assert float(robust.float().mean()) == pytest.approx(aa.verdicts.robust_accuracy)
    assert 0 < robust.sum() < 37
    assert torch.equal(x_adv[robust], x[robust])
    again, labels = fast(model).run_standard_evaluation(x, y, bs=16, return_labels=True)
    assert torch.equal(again, x_adv)
    with torch.no_grad():
        assert torch.equal(labels, model(again).argmax(1))


def test_returns_both_as_pyautoattack_does(model, images):
    x_adv, labels = fast(model).run_standard_evaluation(*images, batch_size=16)
    assert labels.shape == (40,)
    assert x_adv.shape == images[0].shape


def test_the_same_accuracy_as_the_authors(model, images):
    pyautoattack = pytest.importorskip("pyautoattack")
    logging.disable(logging.WARNING)
    x, y = images
    for norm, eps in (("Linf", 0.06), ("L2", 0.3), ("L1", 1.0)):
        ours = fast(model, norm=norm, eps=eps)
        theirs = pyautoattack.AutoAttack(model, norm=norm, eps=eps, seed=0, device="cpu")
        theirs.square.n_queries = 100
        theirs.apgd_targeted.n_target_classes = theirs.fab.n_target_classes = 4
        adv, _ = theirs.run_standard_evaluation(x, y, batch_size=40)
        mine, _ = ours.run_standard_evaluation(x, y, batch_size=40)
        with torch.no_grad():
            a, b = model(mine).argmax(1) == y, model(adv).argmax(1) == y
        assert (a == b).sum() >= 39
    logging.disable(logging.NOTSET)


def test_individual_runs_every_attack_on_all_images(model, images):
    x, y = images
    aa = fast(model, version="custom", attacks_to_run=["apgd-ce", "fab-t"])
    each = aa.run_standard_evaluation_individual(x, y, bs=40)
    assert list(each) == ["apgd-ce", "fab-t"]
    assert all(isinstance(v, Tensor) for v in each.values())
    both = aa.run_standard_evaluation_individual(x, y, bs=40, return_labels=True)
    assert all(len(v) == 2 for v in both.values())
    assert aa.attacks_to_run == ["apgd-ce", "fab-t"]


def test_settings_are_the_authors(model):
    aa = fast(model)
    assert (aa.apgd.n_restarts, aa.fab.n_restarts, aa.apgd_targeted.n_restarts) == (1, 1, 1)
    assert (aa.apgd_targeted.n_target_classes, aa.fab.n_target_classes) == (9, 9)
    assert AutoAttack(model, device="cpu").square.n_queries == 5000
    l1 = fast(model, norm="L1")
    assert (l1.apgd.n_restarts, l1.apgd.use_largereps, l1.apgd_targeted.n_target_classes) == (5, True, 5)
    plus = fast(model, version="plus")
    assert (plus.apgd.n_restarts, plus.fab.n_restarts) == (5, 5)
    assert [m.restarts for m in plus.members()] == [5, 5, 5, 1, 1, 1]
    rand = fast(model, version="rand")
    assert (rand.apgd.eot_iter, rand.attacks_to_run) == (20, ["apgd-ce", "apgd-dlr"])


def test_custom_keeps_five_restarts_and_may_be_changed(model, images):
    aa = fast(model, version="custom", attacks_to_run=["apgd-ce", "fab"])
    assert [(m.name, m.restarts) for m in aa.members()] == [("apgd-ce", 5), ("fab", 5)]
    aa.attacks_to_run = ["apgd-dlr", "square"]
    aa.apgd.n_restarts = 2
    aa.square.n_queries = 7
    assert [(m.name, m.restarts, m.length) for m in aa.members()] == [("apgd-dlr", 2, 100), ("square", 1, 7)]
    aa.run_standard_evaluation(*images, bs=40)
    assert [item.attack for item in aa.verdicts.spent if item.attack.startswith(("a", "s"))] == ["apgd-dlr", "square"]
    assert fast(model, version="custom", attacks=["square"]).attacks_to_run == ["square"]


def test_it_says_what_it_does(model, images, tmp_path, capsys):
    log = tmp_path / "log.txt"
    fast(model, verbose=True, log_path=log).run_standard_evaluation(*images, bs=40)
    shown = capsys.readouterr().out
    for words in ("initial accuracy: 92.50%", "robust accuracy after APGD-CE", "robust accuracy: "):
        assert words in shown
        assert words in log.read_text()
    accuracy = fast(model).clean_accuracy(*images)
    assert accuracy == pytest.approx(37 / 40)
    assert capsys.readouterr().out == ""


def test_state_path_resumes(model, images, tmp_path):
    first = fast(model).run_standard_evaluation(*images, bs=40, state_path=tmp_path / "state")
    again = fast(model).run_standard_evaluation(*images, bs=40, state_path=tmp_path / "state")
    assert torch.equal(first, again)


def test_a_state_without_a_seed_keeps_the_one_it_was_begun_with(model, images, tmp_path, monkeypatch):
    first = fast(model, seed=None).run_standard_evaluation(*images, bs=40, state_path=tmp_path / "state")
    monkeypatch.setattr("robudget.interop.autoattack.time.time", lambda: 12345.0)
    again = fast(model, seed=None)
    assert torch.equal(first, again.run_standard_evaluation(*images, bs=40, state_path=tmp_path / "state"))
    assert again.verdicts.about["seed"] != 12345
    fast(model, seed=None).run_standard_evaluation(*images, bs=40, state_path=tmp_path / "new")
    assert identity_of_state(tmp_path / "new")["seed"] == 12345


def test_a_state_of_the_authors_is_refused(model, images, tmp_path):
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(InputError, match="is a file"):
        fast(model).run_standard_evaluation(*images, bs=40, state_path=tmp_path / "state.json")


def test_signatures_are_the_specs():
    def head(function) -> list[tuple[str, object]]:
        kinds = inspect.signature(function).parameters.values()
        return [(p.name, p.default) for p in kinds if p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "self"]

    none = inspect.Parameter.empty
    assert head(AutoAttack.__init__) == [
        ("model", none),
        ("norm", "Linf"),
        ("eps", 0.3),
        ("seed", None),
        ("verbose", True),
        ("attacks_to_run", ()),
        ("version", "standard"),
        ("is_tf_model", False),
        ("device", "cuda"),
        ("log_path", None),
    ]
    images = [("x_orig", none), ("y_orig", none), ("bs", 250)]
    assert head(AutoAttack.run_standard_evaluation) == [*images, ("return_labels", False), ("state_path", None)]
    assert head(AutoAttack.run_standard_evaluation_individual) == [*images, ("return_labels", False)]
    assert head(AutoAttack.clean_accuracy) == images


def test_return_types_are_pyautoattacks(model, images):
    pyautoattack = pytest.importorskip("pyautoattack")
    logging.disable(logging.WARNING)
    x, y = images[0][:12], images[1][:12]
    theirs = pyautoattack.AutoAttack(
        model, eps=0.06, seed=0, device="cpu", version="custom", attacks=["apgd-ce", "fab-t"]
    )
    theirs.fab.n_target_classes = 4
    ours = fast(model, version="custom", attacks=["apgd-ce", "fab-t"])

    def shape(value: object) -> object:
        if isinstance(value, dict):
            return {name: shape(item) for name, item in value.items()}
        if isinstance(value, tuple):
            return tuple(shape(item) for item in value)
        return type(value), value.dtype, tuple(value.shape), value.device

    for call in ("run_standard_evaluation", "run_standard_evaluation_individual"):
        assert shape(getattr(ours, call)(x, y, batch_size=12)) == shape(getattr(theirs, call)(x, y, batch_size=12))
    assert type(ours.clean_accuracy(x, y)) is type(theirs.clean_accuracy(x, y)) is float
    logging.disable(logging.NOTSET)


def test_rand_takes_expectations(model, images):
    aa = fast(model, version="rand")
    aa.run_standard_evaluation(images[0][:8], images[1][:8], bs=8)
    spent = {item.attack: item for item in aa.verdicts.spent}
    assert list(spent) == ["clean", "checks", "apgd-ce", "apgd-dlr"]
    assert spent["apgd-dlr"].backward >= 20 * 101 * aa.verdicts.robust.sum() > 0


def test_a_setting_that_nothing_reads_is_refused(model):
    with pytest.raises(InputError, match="did you mean 'n_iter'"):
        fast(model).fab.n_iters = 3
    with pytest.raises(InputError, match="unknown setting 'eta'"):
        fast(model).fab.eta = 1.1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"norm": "linf"}, "did you mean 'Linf'"),
        ({"version": "fast"}, "unknown version"),
        ({"is_tf_model": True}, "is_tf_model"),
        ({"attacks_to_run": ["square"]}, "version='custom'"),
        ({"eps": -1}, "negative"),
        ({"version": "custom", "attacks": ["sqare"]}, "did you mean 'square'"),
    ],
)
def test_mistakes(model, images, changes, words):
    with pytest.raises(InputError, match=words):
        fast(model, **changes).run_standard_evaluation(*images)


def test_a_gpu_that_is_not_there(model):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(InputError, match="no CUDA GPU"):
        AutoAttack(model)
