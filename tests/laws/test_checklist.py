"""The reporting checklist, filled in from the law itself."""

from robudget.laws import fit_frontier, fit_law
from robudget.laws.checklist import checklist


def test_every_question_has_the_laws_own_numbers(paper):
    law, frontier = fit_law(paper, resamples=50), fit_frontier(paper)
    answers = checklist(law, frontier)
    assert law.envelope.counts.sentence() in answers["Runs"]
    assert "alpha = 0.01099" in answers["Fitted values"]
    assert answers["Points fitted"].startswith("19: the best run in each of 19 bins")
    assert answers["Evaluation noise"] == "binomial, 0.5 points a run on average, for 244 of 244 runs"
    assert "1.0 decades: predicted" in answers["Extrapolation tested"]
    assert all(answers.values())
    assert "Frontier" not in checklist(law)


def test_a_law_of_costs_has_no_bins_and_no_other_forms(paper):
    answers = checklist(fit_law(paper, y="train_seconds", how="all", resamples=50), beside=False)
    assert answers["Choice of bins"] == "none: there are no bins"
    assert answers["Form"] == "y = C·x^α for power, the only form fitted"
    assert "chosen anew" not in answers["Intervals"]


def test_from_the_command_line(shared, robudget_command):
    code, out, _ = robudget_command("fit", str(shared / "data" / "paper_runs.csv"), "--checklist")
    assert code == 0
    assert out.startswith("Form: y = C·x^α")
