"""What a report of a scaling law must say, filled in for a law of a table.

The questions are those of (Mis)Fitting (Li, Kudugunta & Zettlemoyer 2025, arXiv 2502.18969: its checklist), in our
words: hypothesis and form, what was trained, how data were extracted, and how the form was fitted.
"""

from __future__ import annotations

from robudget.columns import column
from robudget.formats import number
from robudget.laws.fit import RUNS_PER_BIN
from robudget.laws.frontier import Frontier
from robudget.laws.law import Law

SPACES = {"linear": "least squares on y", "log": "least squares on ln y", "huber": "Huber's loss on ln y"}


def checklist(law: Law, frontier: Frontier | None = None, beside: bool = True) -> dict[str, str]:
    """Question → answer, for the paper's kind of law and, where it is given, the frontier of the same table. `beside`:
    whether the law is the headline, whose form the user chose and beside which others and other bins are fitted."""
    env, params = law.envelope, ", ".join(f"{name} = {value:.4g}" for name, value in law.params.items())
    low, high = law.alpha_interval
    top = env.points.x.max()
    bins = "every run" if env.how == "all" else "the Pareto frontier" if env.how == "pareto" else \
        f"the best run in each of {env.bins} bins ({env.how} in x; {env.n_bins} hold a run)"  # fmt: skip
    rebuilt = "" if env.how == "all" else ", the best runs chosen anew in each"
    out = {
        "Form": f"{law.formula} for {law.name}, "
        + (
            "the paper's unless another was asked for; other forms are fitted and weighed beside it"
            if beside
            else "the only form fitted"
        ),
        "Variables": f"y = {column(law.y).label} ({law.y}), x = {column(law.x).label} ({law.x})",
        "Fitted values": f"{params}; α {law.level:.0%} interval [{low:.3g}, {high:.3g}]",
        "Runs": f"{env.counts.sentence()}; {env.decades:.1f} decades of x, up to {column(law.x).write(float(top))}",
        "Hyperparameters of the runs": "those of the table; whether they were tuned at each level of x it does not say",
        "Points fitted": f"{env.n_bins}: {bins}",
        "Choice of bins": "none: there are no bins"
        if env.how in ("all", "pareto")
        else f"19 as the paper's, or fewer where a bin would have fewer than {RUNS_PER_BIN} runs, or the user's"
        + ("; refitted under others" if beside else ""),
        "Checkpoints": "final evaluations only, no curve along a run",
        "Evaluation noise": _noise(law),
        "Counting of x": "columns ending in _exact are counted FLOP, _paper the paper's convention; `*_how` says how",
        "Objective and optimiser": f"{SPACES[law.space]}, batched Levenberg-Marquardt, several starts",
        "Converged": "yes" if law.converged else "no",
        "Intervals": f"{law.resamples:,} bootstrap tables of runs{rebuilt}; Student's t where wider",
        "Goodness of fit": f"R² {law.r2:.2f}, RMSE {law.rmse:.3g} in sample",
        "Warnings": "; ".join(law.warnings) or "none",
        "Code and data": "robudget fit on the table itself",
    }
    if frontier is None:
        return out
    weights = ", ".join(f"{name} {weight:.2f}" for name, weight in frontier.families.items())
    test = frontier.test
    out["Frontier"] = (
        f"stochastic frontier over {frontier.n_runs} runs, α = {number(frontier.alpha)} "
        f"[{number(frontier.alpha_interval[0])}, {number(frontier.alpha_interval[1])}]; weights of forms: {weights}; "
        f"weight of hardly any run near it {frontier.sparse:.2f} (beforehand 0.50)"
    )
    out["Extrapolation tested"] = (
        "no" if test is None else
        f"{test.decades:.1f} decades: predicted {test.predicted:.1f} [{test.low:.1f}, {test.high:.1f}], all runs give "
        f"{test.truth:.1f}; prices are given to twice that distance"
    )  # fmt: skip
    return out


def _noise(law: Law) -> str:
    noise = law.envelope.points.noise
    known = noise[noise > 0]
    if not len(known):
        return "unknown: the table does not say how many images were evaluated"
    return f"binomial, {known.mean():.2g} points a run on average, for {len(known)} of {len(noise)} runs"
