"""The paper's predictor exactly: gradient boosting on 70% of the runs, judged by the other 30% (Figures 1b and 1c)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from robudget.cache import remembered
from robudget.columns import PAPER_FEATURES
from robudget.files import fields
from robudget.laws.least_squares import r_squared
from robudget.prediction.features import runs_with_features
from robudget.prediction.regressors import ROOMS, paper_gbr
from robudget.prediction.repeats import recipe_codes
from robudget.tables.usable import Floats


@dataclass(frozen=True)
class PaperGBR:
    """The paper's predictor exactly: gradient boosting, 50 estimators of depth 5, fitted on 70% of the runs.

    `r2` and `mae` (points) are on the other 30%; `truth` and `predicted` (m,) are those runs' accuracies and `rows`
    (m,) their positions in the table; `importances` is the model's own, feature → share. Figures 1b and 1c.
    """

    r2: float
    mae: float
    n_train: int
    n_test: int
    seed: int
    importances: dict[str, float]
    truth: Floats = field(repr=False)
    predicted: Floats = field(repr=False)
    rows: Any = field(repr=False)

    @classmethod
    def fit(cls, frame: pd.DataFrame, seed: int = 0, features: Sequence[str] | None = None) -> PaperGBR:
        """Features as in the paper where the table has them and they vary, else whatever varies. With repeats in the
        table 30% of the recipes are held out, not of the runs."""
        named = features or (PAPER_FEATURES if set(PAPER_FEATURES) <= set(frame.columns) else None)
        runs, y, _, columns, positions = runs_with_features(frame, named)
        X, codes = columns.matrix(runs), recipe_codes(runs, columns)

        def fit() -> dict[str, Any]:
            from sklearn.model_selection import train_test_split

            members = [np.flatnonzero(codes == code) for code in range(int(codes.max()) + 1)]
            split = train_test_split(np.arange(len(members)), test_size=0.3, random_state=seed)
            train, test = (np.concatenate([members[code] for code in part]) for part in split)
            model = paper_gbr(X[train], y[train])
            shares: dict[str, float] = {}
            for name, share in zip(columns.names, model.feature_importances_, strict=True):
                shares[name] = shares.get(name, 0.0) + float(share)
            return {"test": test.tolist(), "predicted": model.predict(X[test]).tolist(), "shares": shares}

        numbers = remembered("gbr", (X, y, codes, columns.names, seed), ROOMS, fit)
        test, predicted = np.array(numbers["test"]), np.array(numbers["predicted"], dtype=np.float64)
        residual = predicted - y[test]
        return cls(
            r_squared(residual, y[test]), float(np.abs(residual).mean()), len(y) - len(test), len(test), seed,
            dict(sorted(numbers["shares"].items(), key=lambda item: -item[1])),
            y[test], predicted, positions[test],
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        return fields(self) | {"truth": self.truth.tolist(), "predicted": self.predicted.tolist()}
