"""Random forests (Breiman 2001) of scikit-learn's trees: its forests to the bit, in two thirds of the time.

By hand: a table takes some thirty forests, and of the time that scikit-learn's take for a few hundred runs a third goes
to cloning and configuring each tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from robudget.tables.usable import Floats

TREES = 50


class Forest:
    """TREES trees, each grown on a bootstrap sample of the rows of X (n, p): for numbers y, or for yes or no with a
    random choice among √p features at each split."""

    def __init__(self, X: Floats, y: Any, seed: int) -> None:
        from sklearn import config_context
        from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor

        y = np.asarray(y)
        self.of_classes = y.dtype == np.bool_
        rng, n, single = np.random.RandomState(seed), len(y), np.ascontiguousarray(X, dtype=np.float32)
        seeds = [rng.randint(np.iinfo(np.int32).max) for _ in range(TREES)]
        grown = []
        with config_context(skip_parameter_validation=True):
            for each in seeds:
                counts = np.bincount(np.random.RandomState(each).randint(0, n, n), minlength=n).astype(np.float64)
                tree = (
                    DecisionTreeClassifier(max_features="sqrt", random_state=each)
                    if self.of_classes
                    else DecisionTreeRegressor(random_state=each)
                )
                grown.append(tree.fit(single, y, sample_weight=counts, check_input=False).tree_)
        self.trees: Sequence[Any] = grown

    def __call__(self, X: Floats) -> Floats:
        """The mean of the trees at each row of X (n, p), or their mean share of yes: (n,)."""
        single = np.ascontiguousarray(X, dtype=np.float32)
        total = np.zeros(len(X))
        for tree in self.trees:
            total += tree.predict(single)[:, -1]
        return total / len(self.trees)

    def importances(self) -> Floats:
        """How much of the impurity each feature takes away, (p,), summing to 1; 0 where no tree has a split."""
        each = [tree.compute_feature_importances() for tree in self.trees if tree.node_count > 1]
        mean = np.mean(each, axis=0) if each else np.zeros(self.trees[0].n_features)
        return np.asarray(mean / mean.sum() if mean.sum() > 0 else mean)
