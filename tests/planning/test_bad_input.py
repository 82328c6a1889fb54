"""Tables and questions that hold no answer, as typed: one plain sentence with what would help, or a plain answer."""

import numpy as np
import pandas as pd
import pytest


@pytest.fixture(scope="module")
def tables(tmp_path_factory, grid_predictor):
    folder = tmp_path_factory.mktemp("tables")
    grid = grid_predictor.table
    one = pd.concat([grid.iloc[[10]]] * 14, ignore_index=True)
    one = one.assign(aa_acc=40 + np.linspace(-0.4, 0.4, 14), collapsed=False, seed=range(14)).assign(
        run_id=[f"s{i}" for i in range(14)]
    )
    for name, frame in {
        "grid": grid,
        "seeds": one,
        "tied": grid.assign(aa_acc=50.0, collapsed=False),
        "two": pd.concat([grid, grid.assign(dataset="cifar10", run_id="c-" + grid.run_id)]),
        "paper-flops": grid.rename(columns={"train_flops_exact": "train_flops_paper"}),
        "no-cost": grid.drop(columns=["train_flops_exact", "train_energy_kwh", "cost_usd"]),
    }.items():
        frame.to_csv(folder / f"{name}.csv", index=False)
    return folder


VERBS = [
    "fit {}",
    "fit {} --joint",
    "predict digits --from {}",
    "plan --from {} --target 50",
    "plan --from {} --next 2",
    "report {} --out out",
]
REFUSED = [
    *((verb, "two", "mixes 2 values of dataset") for verb in VERBS),
    *((verb, "seeds", "train|say nothing") for verb in VERBS),
    *((verb, "tied", "same robust accuracy|evaluate more images|train recipes") for verb in VERBS),
    ("predict cifar10-smoke --from {}", "grid", "give a table of such runs"),
    ("predict digits threat.norm=l2 threat.eps=0.5 --from {}", "grid", "norm L2 cannot be predicted"),
    ("plan --from {} --target 120", "grid", "less than 100"),
    ("fit {}", "paper-flops", "did you mean 'train_flops_paper'"),
    ("plan --from {} --budget 1e15flops", "paper-flops", "allowed: paper-flops"),
    ("plan --from {} --target 50", "no-cost", "a plan counts in one"),
    ("plan --from {} --next 2", "no-cost", "a plan counts in one"),
]
ANSWERED = [
    (
        "plan --from {} --target 0.5 --brief",
        "grid",
        "Every run that did not collapse reached it.*no more than the cheapest",
    ),
    ("plan --from {} --target 99 --brief", "grid", "No run reached 99%.*these runs cannot say"),
    ("plan --from {} --budget 1e3flops --brief", "grid", "No recipe of these choices fits 1e3flops: the cheapest"),
    ("plan --from {} --next 2 --brief", "paper-flops", "To know the exponent"),
    ("plan --from {} --next 2 --budget 0.0001usd", "grid", "No recipe fits the budget.*the cheapest costs $0.19"),
]


@pytest.mark.parametrize(("typed", "table", "message"), REFUSED)
def test_refused_in_one_sentence(robudget_command, tables, tmp_path, monkeypatch, typed, table, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = robudget_command(*typed.format(tables / f"{table}.csv").split())
    assert code == 2
    assert not out
    assert err.count("\n") == 1
    assert any(words in err for words in message.split("|"))


@pytest.mark.parametrize(("typed", "table", "message"), ANSWERED)
def test_answered_plainly(robudget_command, tables, typed, table, message):
    code, out, _ = robudget_command(*typed.format(tables / f"{table}.csv").split())
    assert code == 0
    said = " ".join(out.split())
    for part in message.split(".*"):
        assert part in said
