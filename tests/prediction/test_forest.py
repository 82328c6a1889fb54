"""A forest is scikit-learn's, to the bit."""

import numpy as np
import pytest
from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor

from robudget.prediction.forest import TREES, Forest


@pytest.mark.parametrize("seed", [0, 3])
def test_the_same_as_scikit_learns(seed):
    rng = np.random.default_rng(seed)
    X = rng.integers(0, 3, (60, 5)).astype(float)
    y, labels = X[:, 0] + rng.normal(size=60), X[:, 1] + rng.normal(size=60) > 1
    of_numbers, of_labels = Forest(X, y, seed), Forest(X, labels, seed)
    regressor = RandomForestRegressor(TREES, random_state=seed).fit(X, y)
    classifier = RandomForestClassifier(TREES, random_state=seed).fit(X, labels)
    np.testing.assert_allclose(of_numbers(X), regressor.predict(X), rtol=1e-12)
    np.testing.assert_allclose(of_labels(X), classifier.predict_proba(X)[:, 1], atol=1e-12)
    np.testing.assert_allclose(of_numbers.importances(), regressor.feature_importances_, atol=1e-12)


def test_no_split():
    assert Forest(np.ones((4, 2)), np.array([1.0, 2, 3, 4]), 0).importances().tolist() == [0, 0]
