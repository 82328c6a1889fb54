"""The faster ways of the frontier's likelihood give the bits of the plain ones."""

import numpy as np
from scipy import special

from robudget.laws import frontier
from robudget.laws.blocks import BLOCK, in_blocks, ndtr


def test_the_normal_distribution_function_is_scipys_to_the_bit():
    x = np.concatenate([np.linspace(-45, 12, 20_001), [0.0, -0.0, 8.3, -38.6, np.inf, -np.inf]])
    assert np.array_equal(ndtr(x), special.ndtr(x))
    assert np.array_equal(ndtr(x.reshape(3, -1)), special.ndtr(x).reshape(3, -1))
    assert np.array_equal(ndtr(x[:10]), special.ndtr(x[:10]))


def test_blocks_change_no_bit_and_bound_what_is_held():
    sizes = []

    def likelihood(form, theta, t):
        sizes.append(len(theta) * len(t))
        return np.exp(-((theta[:, :1] - t) ** 2)).sum(axis=1)

    theta, t = np.random.default_rng(0).normal(size=(500, 2)), np.linspace(0, 1, 1000)
    assert np.array_equal(in_blocks(likelihood)(None, theta, t), likelihood(None, theta, t))
    assert max(sizes[:-1]) <= BLOCK
    assert in_blocks(likelihood)(None, theta[:0], t).shape == (0,)


def test_a_kept_frontier_is_the_fitted_one(grid, tmp_path, monkeypatch):
    monkeypatch.setenv("ROBUDGET_CACHE", str(tmp_path))
    monkeypatch.delenv("ROBUDGET_REMEMBER")
    first = frontier.fit_frontier(grid, test=False)
    assert len(list((tmp_path / "numbers").glob("frontier-*.json"))) == 1
    monkeypatch.setattr(frontier, "fits_of", None)  # nothing is fitted again
    again = frontier.fit_frontier(grid, test=False)
    assert again.to_dict() == first.to_dict()
    x = np.geomspace(*first.x_range, 5)
    assert all(np.array_equal(a.draws, b.draws) for a, b in zip(first.fits, again.fits, strict=True))
    assert np.array_equal(again.values(x), first.values(x))
