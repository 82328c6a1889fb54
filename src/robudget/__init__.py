"""robudget: how much adversarial robustness a unit of compute buys, and what the next point would cost.

    import robudget as rb
    result = rb.run(rb.Recipe.load("digits"))
    verdicts = rb.evaluate(model, x, y, rb.Threat("linf", 8 / 255))
    law = rb.fit_power_law(rb.load_runs("runs"))

Names are imported when they are first used, so that `import robudget` is quick and only what trains or attacks starts
torch. `docs/library.md` has an example for each.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from robudget.threads import wait_considerately

__version__ = "0.1.0"
wait_considerately()  # before anything here starts torch

if TYPE_CHECKING:
    from robudget.analysis import analyse
    from robudget.errors import InputError, RobudgetError, RunFailed
    from robudget.evaluation.evaluator import evaluate
    from robudget.evaluation.verdicts import Verdicts
    from robudget.execution import Site
    from robudget.laws import fit_power_law
    from robudget.meter.prices import Prices
    from robudget.planning import plan
    from robudget.prediction import predict
    from robudget.recipe import Recipe
    from robudget.runner import run
    from robudget.sweep.study import Study
    from robudget.tables.read import load_runs
    from robudget.threat import Threat

_HOME = {
    "InputError": "errors",
    "RobudgetError": "errors",
    "RunFailed": "errors",
    "Verdicts": "evaluation.verdicts",
    "evaluate": "evaluation.evaluator",
    "analyse": "analysis",
    "fit_power_law": "laws",
    "plan": "planning",
    "predict": "prediction",
    "Prices": "meter.prices",
    "Recipe": "recipe",
    "run": "runner",
    "Site": "execution",
    "load_runs": "tables.read",
    "Study": "sweep.study",
    "Threat": "threat",
}

__all__ = [
    "InputError",
    "Prices",
    "Recipe",
    "RobudgetError",
    "RunFailed",
    "Site",
    "Study",
    "Threat",
    "Verdicts",
    "__version__",
    "analyse",
    "evaluate",
    "fit_power_law",
    "load_runs",
    "plan",
    "predict",
    "run",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'robudget' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"robudget.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
