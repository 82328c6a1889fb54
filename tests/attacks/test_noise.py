"""Philox against its published vectors; noise that does not know its batch."""

import pytest
import torch

from robudget.attacks.noise import STREAMS, Noise, Stream, below, philox, symmetric, unit

# Random123's kat_vectors for philox4x32-10: counter, key, answer.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_known_answers(counter, key, answer):
    words = philox(tuple(torch.tensor(c) for c in counter), key)
    assert tuple(int(w) for w in words) == answer


def stream(index, *, seed=5, attack="square", target=None, restart=None):
    index = torch.as_tensor(index)
    zero = torch.zeros_like(index)
    return Stream(seed, attack, index, zero if target is None else target, zero if restart is None else restart)


def test_noise_is_bit_identical_under_any_batching():
    whole = stream(range(100))
    for split in ([range(7), range(7, 100)], [range(64), range(64, 100)], [[i] for i in range(100)]):
        for draw in (
            lambda s: s.words(3, 10),
            lambda s: s.uniform(0, (3, 8, 8)),
            lambda s: s.gaussian(0, (3, 8, 8)),
        ):
            parts = torch.cat([draw(stream(list(part))) for part in split])
            assert torch.equal(parts, draw(whole))


def test_rows_of_a_batch_may_be_at_different_iterations():
    at = torch.tensor([4, 0, 9])
    mixed = stream([1, 2, 3]).words(at, 6)
    for row, (image, iteration) in enumerate(zip([1, 2, 3], at.tolist(), strict=True)):
        assert torch.equal(mixed[row : row + 1], stream([image]).words(iteration, 6))


def test_a_block_is_its_iterations_one_by_one():
    first = torch.tensor([0, 11, 2])
    block = stream([5, 6, 7]).block(first, 4, 7)
    assert block.shape == (4, 3, 7)
    for k in range(4):
        assert torch.equal(block[k], stream([5, 6, 7]).words(first + k, 7))


def test_everything_that_keys_the_noise_changes_it():
    base = stream([3]).words(0, 8)
    one = torch.tensor([1])
    others = [
        stream([4]).words(0, 8),
        stream([3]).words(1, 8),
        stream([3], seed=6).words(0, 8),
        stream([3], seed=5 + (1 << 32)).words(0, 8),
        stream([3], attack="apgd-ce").words(0, 8),
        stream([3], target=one).words(0, 8),
        stream([3], restart=one).words(0, 8),
    ]
    assert len({tuple(w.flatten().tolist()) for w in [base, *others]}) == 8


def test_attack_numbers_never_change():
    assert STREAMS == {
        "pgd": 1,
        "apgd-ce": 2,
        "apgd-dlr": 3,
        "apgd-t": 4,
        "fab": 5,
        "fab-t": 6,
        "square": 7,
        "fmn": 16,
        "elastic": 17,
        "jpeg": 18,
        "gabor": 19,
        "transfer": 8,
        "check": 9,
        "audit": 10,
    }


def test_moments():
    uniform = stream(range(200)).uniform(0, (1000,))
    assert uniform.abs().max() < 1
    assert abs(float(uniform.mean())) < 0.01
    assert float(uniform.var()) == pytest.approx(1 / 3, abs=0.01)
    normal = stream(range(200)).gaussian(0, (1001,))
    assert normal.shape == (200, 1001)
    assert abs(float(normal.mean())) < 0.01
    assert float(normal.var()) == pytest.approx(1, abs=0.01)
    assert float((normal.abs() > 1.96).float().mean()) == pytest.approx(0.05, abs=0.005)


def test_below_covers_its_range_evenly():
    words = stream(range(1000)).words(0, 24)
    n = 6
    counts = torch.bincount(below(words, n).flatten(), minlength=n)
    assert len(counts) == n
    assert float(counts.float().std() / counts.float().mean()) < 0.05
    assert int(below(words, 0).abs().max()) == 0


def test_extreme_words():
    ends = torch.tensor([0, 0xFFFFFFFF])
    assert 0 < float(unit(ends)[0]) < float(unit(ends)[1]) < 1
    assert float(symmetric(ends).sum()) == 0


def test_noise_is_keyed_by_the_row_in_the_full_split():
    position, zero = torch.arange(3), torch.zeros(3, dtype=torch.int64)
    shard = Noise(1, torch.tensor([40, 41, 42])).stream("apgd-ce", position, zero, zero)
    assert shard.index.tolist() == [40, 41, 42]
    assert Noise(1).stream("apgd-ce", position, zero, zero).index.tolist() == [0, 1, 2]
