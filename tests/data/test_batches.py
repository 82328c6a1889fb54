"""From datasets to batches: splits, mixing, augmentation, and generated images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from robudget import data
from robudget.data import augment, catalog, stream, synthetic
from robudget.data.augment import OPERATIONS, randaugment
from robudget.data.dataset import Dataset, Split, hold_out, stratified_rows, to_unit
from robudget.data.stream import Passes, Stream, prepare
from robudget.errors import InputError
from robudget.recipe import Recipe

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return data.load("digits")


def numbered(n: int, *, first: int = 0) -> Split:
    """Images that carry their own number, so that batches can be traced."""
    numbers = torch.arange(first, first + n)
    images = torch.stack([numbers % 256, numbers // 256], 1).to(torch.uint8)[:, :, None, None]
    return Split(images.contiguous(), numbers % 10)


def numbers_in(images: torch.Tensor) -> list[int]:
    flat = images.long().flatten(1)
    return (flat[:, 0] + 256 * flat[:, 1]).tolist()


# -- datasets and splits -----------------------------------------------------------------------------------------------


def test_digits_are_those_of_scikit_learn() -> None:
    """They are read from its file, without importing it."""
    from sklearn.datasets import load_digits

    images, labels = catalog._digits()
    raw = load_digits()
    np.testing.assert_array_equal(images, raw.images)
    np.testing.assert_array_equal(labels, raw.target)


def test_digits_where_scikit_learn_keeps_them_elsewhere(monkeypatch: pytest.MonkeyPatch, digits: Dataset) -> None:
    monkeypatch.setattr(Path, "exists", lambda self: False)
    assert catalog.load_digits().fingerprint == digits.fingerprint


def test_digits_are_split_once_and_for_all(digits: Dataset) -> None:
    assert (len(digits.train), len(digits.test)) == (1396, 401)
    assert digits.image_shape == (1, 8, 8)
    assert digits.classes == 10
    assert digits.test.labels.bincount().min() >= 38
    assert int(digits.train.images.max()) == 255
    assert data.load("digits").fingerprint == digits.fingerprint
    seen = {bytes(image) for image in digits.train.images.flatten(1).numpy()}
    assert not any(bytes(image) in seen for image in digits.test.images.flatten(1).numpy())


def test_mean_and_std_are_those_of_the_training_images(digits: Dataset) -> None:
    unit = digits.train.unit()
    assert digits.mean == (pytest.approx(float(unit.mean()), abs=1e-4),)
    assert digits.std == (pytest.approx(float(unit.std()), abs=1e-3),)


def test_unit_images_are_exact() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(to_unit(every).flatten(), (torch.arange(256, dtype=torch.float64) / 255).float())


def test_hold_out_is_stratified_disjoint_and_fixed(digits: Dataset) -> None:
    rest, held = stratified_rows(digits.train.labels, 0.15, 10, seed=0)
    assert sorted([*rest.tolist(), *held.tolist()]) == list(range(1396))
    share = digits.train.labels[held].bincount() / digits.train.labels.bincount()
    assert torch.allclose(share, torch.full((10,), 0.15), atol=0.005)
    assert torch.equal(stratified_rows(digits.train.labels, 0.15, 10, seed=0)[1], held)
    assert len(digits.train.labels[held[:60]].unique()) == 10
    _, none = hold_out(digits.train, 0.0, 10)
    assert len(none) == 0
    with pytest.raises(InputError, match="leaves no image of class 0"):
        stratified_rows(torch.tensor([0, 1, 1]), 0.5, 2, seed=0)


def test_prepare_holds_out_before_anything_else(digits: Dataset) -> None:
    recipe = Recipe().with_({"data.name": "digits", "validation.fraction": 0.1, "synthetic.source": "mixture"})
    whole, few = prepare(recipe, digits), prepare(recipe.with_({"data.amount": 200, "synthetic.amount": 50}), digits)
    assert torch.equal(whole.validation.images, few.validation.images)
    assert torch.equal(few.train.images, whole.train.images[:200])
    assert few.synthetic is not None
    assert len(few.synthetic) == 50
    paper = prepare(recipe.with_({"validation.split": "paper", "validation.images": 30}), digits)
    assert len(paper.train) == 1396
    assert torch.equal(paper.validation.images, digits.test.images[:30])
    with pytest.raises(InputError, match=r"data\.amount = 2000, but only 1256 images are left to train on"):
        prepare(recipe.with_({"data.amount": 2000}), digits)


# -- the stream --------------------------------------------------------------------------------------------------------


def test_every_pass_shows_every_image_once() -> None:
    passes = Passes(10, 4, seed=0, name="real")
    rows = [int(row) for step in range(10) for row in passes.rows(step)]
    for first in range(0, 40, 10):
        assert sorted(rows[first : first + 10]) == list(range(10))
    assert rows[:10] != rows[10:20]
    late = Passes(10, 4, seed=0, name="real")
    assert late.rows(9).tolist() == rows[36:]


def test_a_fixed_share_of_every_batch_is_synthetic() -> None:
    made = Stream(numbered(50), numbered(90, first=1000), classes=10, batch_size=20, share=0.7, seed=1, device=CPU)
    synthetic_rows = []
    for step in range(6):
        numbers = numbers_in(made.batch(step).images)
        assert [n >= 1000 for n in numbers] == [False] * 6 + [True] * 14
        synthetic_rows += numbers[6:]
    assert len(set(synthetic_rows)) == 84  # without replacement within a pass


def test_shares_follow_their_schedule_and_no_image_is_left_out() -> None:
    """Generated images alone, then half, then a fifth: each source goes on where it was."""
    parts = numbered(50), numbered(90, first=1000)
    later = [(3, 0.5), (5, 0.2)]
    made = Stream(*parts, classes=10, batch_size=20, share=1.0, seed=1, device=CPU, later=later)
    batches = [numbers_in(made.batch(step).images) for step in range(9)]
    assert [sum(n >= 1000 for n in numbers) for numbers in batches] == [20] * 3 + [10] * 2 + [4] * 4
    assert {len(numbers) for numbers in batches} == {20}
    real = [n for numbers in batches for n in numbers if n < 1000]
    assert sorted(real[:50]) == list(range(50))
    generated = [n for numbers in batches for n in numbers if n >= 1000]
    assert len(set(generated[:90])) == 90
    again = Stream(*parts, classes=10, batch_size=20, share=1.0, seed=1, device=CPU, later=later)
    assert numbers_in(again.batch(7).images) == batches[7]  # of a batch alone, as a resume asks for it
    plain = Stream(*parts, classes=10, batch_size=20, share=0.5, seed=1, device=CPU)
    split = Stream(*parts, classes=10, batch_size=20, share=0.5, seed=1, device=CPU, later=[(2, 0.5)])
    assert torch.equal(plain.batch(4).images, split.batch(4).images)


def test_batches_depend_on_seed_and_step_alone() -> None:
    def batch(seed: int, step: int) -> list[int]:
        made = Stream(numbered(50), None, classes=10, batch_size=8, share=0.0, seed=seed, device=CPU)
        return numbers_in(made.batch(step).images)

    assert batch(0, 3) == batch(0, 3)
    assert batch(0, 3) != batch(1, 3)


def test_processes_share_out_the_batch() -> None:
    def make(mine: slice) -> Stream:
        pair = numbered(50), numbered(90, first=1000)
        return Stream(*pair, classes=10, batch_size=20, share=0.7, seed=1, device=CPU, mine=mine)

    whole = numbers_in(make(slice(None)).batch(2).images)
    for rank in range(2):
        part = make(slice(rank, None, 2)).batch(2)
        assert numbers_in(part.images) == whole[rank::2]
        assert part.labels.tolist() == [n % 10 for n in whole[rank::2]]


def test_reading_ahead_gives_the_same_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    def make() -> Stream:
        real, extra = numbered(50), numbered(90, first=1000)
        # As an npz holds them: height × width × channels.
        nhwc = Split(extra.images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2), extra.labels)
        return Stream(real, nhwc, classes=10, batch_size=20, share=0.7, seed=1, device=CPU)

    resident = make()
    monkeypatch.setattr(stream, "RESIDENT", 0)
    mapped = make()
    for step in (0, 1, 2, 7, 3):
        a, b = resident.batch(step), mapped.batch(step)
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)


def test_a_mapped_source_is_read_by_its_rows_and_never_copied_out(monkeypatch: pytest.MonkeyPatch) -> None:
    real, rows = numbered(60), torch.randperm(60, generator=torch.Generator().manual_seed(0))[:41]

    def make() -> Stream:
        return Stream(real, None, classes=10, batch_size=20, share=0.0, seed=1, device=CPU, rows=rows)

    resident = make()
    copied = Stream(real[rows], None, classes=10, batch_size=20, share=0.0, seed=1, device=CPU)
    monkeypatch.setattr(stream, "RESIDENT", 0)
    mapped = make()
    assert mapped._sources[0].split.images.data_ptr() == real.images.data_ptr()
    for step in range(5):
        a, b, c = resident.batch(step), mapped.batch(step), copied.batch(step)
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.images, c.images)
        assert torch.equal(a.labels, b.labels)
    with pytest.raises(InputError, match="there are only 41"):
        Stream(real, None, classes=10, batch_size=50, share=0.0, seed=1, device=CPU, rows=rows)


def test_soft_labels_mix_with_hard_ones() -> None:
    extra = numbered(40, first=1000)
    soft = torch.softmax(torch.randn(40, 10), 1)
    made = Stream(
        numbered(50),
        Split(extra.images, soft.argmax(1), soft),
        classes=10,
        batch_size=10,
        share=0.5,
        seed=0,
        device=CPU,
    )
    batch = made.batch(0)
    assert batch.soft is not None
    numbers = numbers_in(batch.images)
    torch.testing.assert_close(batch.soft[5:], soft[torch.tensor(numbers[5:]) - 1000])
    torch.testing.assert_close(batch.soft[:5], torch.eye(10)[torch.tensor(numbers[:5]) % 10])


def test_batches_that_cannot_be_filled() -> None:
    with pytest.raises(InputError, match="takes 64 real images at once, but there are only 50"):
        Stream(numbered(50), None, classes=10, batch_size=64, share=0.0, seed=0, device=CPU)
    with pytest.raises(InputError, match="takes 32 synthetic images at once, but there are only 8"):
        Stream(numbered(50), numbered(8), classes=10, batch_size=64, share=0.5, seed=0, device=CPU)
    with pytest.raises(InputError, match="leaves no real image"):
        Stream(numbered(50), numbered(50), classes=10, batch_size=4, share=0.95, seed=0, device=CPU)


# -- augmentation ------------------------------------------------------------------------------------------------------


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_crop_is_a_window_of_the_padded_image() -> None:
    images = torch.randint(1, 256, (40, 3, 6, 6), dtype=torch.uint8, generator=generator())
    moved = augment.crop_flip(images, crop=2, flip=True, generator=generator(1))
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    shifts, mirrored = set(), 0
    for image, wide in zip(moved, padded, strict=True):
        windows = {
            (dy, dx, flip): wide[:, dy : dy + 6, dx : dx + 6].flip(2) if flip else wide[:, dy : dy + 6, dx : dx + 6]
            for dy in range(5)
            for dx in range(5)
            for flip in (False, True)
        }
        found = [where for where, window in windows.items() if torch.equal(window, image)]
        assert len(found) == 1
        shifts.add(found[0][:2])
        mirrored += found[0][2]
    assert len(shifts) > 10
    assert 8 < mirrored < 32


def test_no_augmentation_is_no_copy() -> None:
    images = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    assert augment.crop_flip(images, crop=0, flip=False, generator=generator()) is images


@pytest.mark.parametrize("kind", ["crop_flip", "randaugment"])
def test_a_share_of_a_batch_is_augmented_as_in_the_whole(kind: str) -> None:
    images = torch.randint(0, 256, (8, 3, 6, 6), dtype=torch.uint8)

    def run(part: torch.Tensor, rows: slice) -> torch.Tensor:
        if kind == "crop_flip":
            return augment.crop_flip(part, crop=2, flip=True, generator=generator(), rows=rows, total=8)
        return randaugment(part, 9.0, generator=generator(), rows=rows, total=8)

    whole = run(images, slice(None))
    assert torch.equal(run(images[1::2], slice(1, None, 2)), whole[1::2])


def test_cutmix_mixes_pixels_and_targets_alike() -> None:
    n = 64
    values = torch.arange(n, dtype=torch.uint8)
    images = values[:, None, None, None].expand(n, 1, 8, 8).contiguous()
    mixed, target = augment.cutmix(images, torch.eye(n), generator=generator())
    torch.testing.assert_close(target.sum(1), torch.ones(n))
    for row in range(n):
        counts = mixed[row].long().flatten().bincount(minlength=n) / 64
        torch.testing.assert_close(counts, target[row])
        box = (mixed[row, 0] != row).nonzero()
        if len(box):
            assert len(box) == (box.amax(0) - box.amin(0) + 1).prod()  # a full rectangle
    assert float((target.amax(1) < 0.99).float().mean()) > 0.2


def test_randaugment_keeps_what_it_must() -> None:
    images = torch.randint(0, 256, (400, 3, 8, 8), dtype=torch.uint8, generator=generator())
    assert torch.equal(randaugment(images, 0.0, generator=generator()), images)
    strong = randaugment(images, 10.0, generator=generator())
    assert strong.dtype == torch.uint8
    untouched = (strong == images).flatten(1).all(1).float().mean()
    # Both operations were the identity, or solarised and back, or posterised twice alike.
    assert 0.005 < float(untouched) < 0.1
    assert len(OPERATIONS) == 10


# -- generated images --------------------------------------------------------------------------------------------------


def test_mixture_is_fitted_on_its_input_alone_and_repeats(digits: Dataset) -> None:
    train, _ = hold_out(digits.train, 0.15, 10)
    made = synthetic.mixture(train, 10, 400)
    again = synthetic.mixture(train, 10, 400)
    assert torch.equal(made.images, again.images)
    assert torch.equal(made.labels, again.labels)
    assert made.images.shape == (400, 1, 8, 8)
    # It knows what digits look like: a nearest neighbour of the training set agrees with most labels ...
    distance = torch.cdist(made.unit().flatten(1), train.unit().flatten(1))
    agree = (train.labels[distance.argmin(1)] == made.labels).float().mean()
    assert float(agree) > 0.85
    # ... and it is no copy.
    assert float(distance.amin(1).median()) > 0.3


def write_npz(path: Path, images: np.ndarray, labels: np.ndarray, *, compressed: bool = False) -> Path:
    (np.savez_compressed if compressed else np.savez)(path, image=images, label=labels)
    return path


@pytest.fixture
def generated() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (30, 8, 8, 1), dtype=np.uint8), np.arange(30) % 10


@pytest.mark.parametrize("compressed", [False, True])
def test_npz_is_mapped_or_unpacked(
    tmp_path: Path, digits: Dataset, generated: tuple[np.ndarray, np.ndarray], compressed: bool
) -> None:
    path = write_npz(tmp_path / "g.npz", *generated, compressed=compressed)
    for _ in range(2):
        split = synthetic.read(path, digits, cache=tmp_path / "cache")
        assert torch.equal(split.images.permute(0, 2, 3, 1), torch.from_numpy(generated[0]))
        assert split.labels.tolist() == generated[1].tolist()
    assert (tmp_path / "cache").exists() == compressed
    made = Stream(digits.train, split, classes=10, batch_size=10, share=0.5, seed=0, device=CPU)
    assert made.batch(0).images.shape == (10, 1, 8, 8)


def test_npz_with_probabilities(tmp_path: Path, generated: tuple[np.ndarray, np.ndarray]) -> None:
    soft = np.random.default_rng(1).dirichlet(np.ones(10), size=30).astype(np.float32)
    split = synthetic.read_npz(write_npz(tmp_path / "g.npz", generated[0], soft), classes=10, cache=None)
    assert split.soft is not None
    torch.testing.assert_close(split.soft, torch.from_numpy(soft))
    assert split.labels.tolist() == soft.argmax(1).tolist()


def test_recipe_takes_the_first_of_a_file(
    tmp_path: Path, digits: Dataset, generated: tuple[np.ndarray, np.ndarray]
) -> None:
    path = write_npz(tmp_path / "g.npz", *generated)
    recipe = Recipe().with_({"data.name": "digits", "synthetic.source": "file", "synthetic.amount": 12})
    made = prepare(recipe, digits, path).synthetic
    assert made is not None
    assert made.labels.tolist() == generated[1][:12].tolist()
    with pytest.raises(InputError, match=r"needs synthetic\.root"):
        prepare(recipe, digits)
    with pytest.raises(InputError, match="40 images asked for"):
        prepare(recipe.with_({"synthetic.amount": 40}), digits, path)


def test_bad_npz_files(tmp_path: Path, digits: Dataset, generated: tuple[np.ndarray, np.ndarray]) -> None:
    images, labels = generated
    path = tmp_path / "g.npz"

    def refused(match: str) -> None:
        with pytest.raises(InputError, match=match) as caught:
            synthetic.read(path, digits, cache=tmp_path / "cache")
        assert "\n" not in str(caught.value)

    refused("does not exist")
    np.savez(path, image=images, label=np.array([object()] * 30, dtype=object))
    refused("label holds Python objects")
    np.savez_compressed(path, image=images, label=np.array([object()] * 30, dtype=object))
    refused("label holds Python objects")
    write_npz(path, images.astype(np.float32), labels)
    refused(r"image is float32 .*\(allowed: uint8 \(N, H, W, C\)\)")
    write_npz(path, np.zeros((30, 16, 16, 1), np.uint8), labels)
    refused(r"has images \(C, H, W\) = \(1, 16, 16\) \(allowed: \(1, 8, 8\)")
    write_npz(path, images, labels + 1)
    refused(r"labels span 1…10 \(allowed: 0…9\)")
    write_npz(path, images, labels[:-1])
    refused("30 images and 29 labels")
    write_npz(path, images, np.full((30, 7), 1 / 7, np.float32))
    refused("probabilities for 7 classes")
    write_npz(path, images, np.full((30, 10), 0.3, np.float32))
    refused("no probabilities")
    write_npz(path, images, labels.astype(np.float32))
    refused("label is float32")
    np.savez(path, images=images, label=labels)
    refused("image missing")
    whole = write_npz(path, images, labels).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused("damaged or truncated")
    path.write_bytes(b"PK nothing")
    refused("damaged or truncated")
    assert not list((tmp_path / "cache").glob(".*"))  # no half-written draft


def test_generated_class_folders(tmp_path: Path, digits: Dataset) -> None:
    from PIL import Image

    for label in range(10):
        (tmp_path / "g" / str(label)).mkdir(parents=True)
        Image.fromarray(np.full((8, 8), label, np.uint8)).save(tmp_path / "g" / str(label) / "a.png")
    split = synthetic.read(tmp_path / "g", digits, cache=tmp_path / "cache")
    assert split.labels.tolist() == list(range(10))
    assert split.images[:, 0, 0, 0].tolist() == list(range(10))
    (tmp_path / "g" / "extra").mkdir()
    with pytest.raises(InputError, match="has classes 0, 1"):
        synthetic.read(tmp_path / "g", digits, cache=tmp_path / "cache")
