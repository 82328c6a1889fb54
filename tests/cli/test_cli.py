import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import robudget
from robudget.config import named
from robudget.models.build import build
from robudget.prediction.features import rows_of
from robudget.recipe import Recipe

Run = Callable[..., tuple[int, str, str]]


def test_version_and_help(robudget_command: Run) -> None:
    assert robudget_command("--version") == (0, f"robudget {robudget.__version__}\n", "")
    code, out, _ = robudget_command("--help")
    assert code == 0
    assert "Examples" in out
    for verb in ("run", "eval", "sweep", "runs", "cost", "fit", "predict", "plan", "report", "demo"):
        assert f" {verb} " in out


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["run", "digit"], "did you mean 'digits'"),
        (["run", "digits", "craft.stpes=3"], "did you mean 'craft.steps'"),
        (["run", "digits", "loss=trade"], "did you mean 'trades'"),
        (["run", "digits", "model.name=wrm-10-1"], "unknown model 'wrm-10-1'"),
        (["run", "digits", "data.name=digit"], "did you mean 'digits'"),
        (["run", "digits", "threat.eps=8"], "outside (0, 1]"),
        (["run", "digits", "threat.eps=0"], "outside (0, 1]"),
        (["run", "digits", "craft.steps=0"], "craft.steps = 0 with loss = 'at'"),
        (["run", "digits", "device=cuda:9"], "CUDA GPUs"),
        (["run", "digits", "threads=some"], "threads = 'some'"),
        (["run", "cifar10-smoke"], "data.root"),
        (["run", "cifar10-smoke", "data.root=/nowhere/at/all"], "/nowhere/at/all"),
        (["sweep", "paper"], "did you mean 'paper-320'"),
        (["cost", "digit"], "did you mean 'digits'"),
        (["cost", "digits", "--device", "v1000"], "did you mean 'v100'"),
        (["runs", "nowhere"], "nowhere"),
        (["runs", "--prices", "atlantis"], "atlantis"),
        (["fit", "nothing.csv"], "nothing.csv"),
        (["predict", "digits", "--from", "nothing.csv"], "nothing.csv"),
        (["plan", "--from", "nothing.csv", "--budget", "1usd"], "nothing.csv"),
        (["study", "digts-30"], "did you mean 'digits-30'"),
        (["export", "nowhere", "tensorboard", "x"], "nowhere"),
        (["eval", "nowhere"], "nowhere"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    robudget_command: Run, args: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = robudget_command(*args)
    assert code == 2
    assert said in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert not out
    assert not list(tmp_path.rglob("run.json"))


def test_an_unknown_option_is_exit_code_2(robudget_command: Run) -> None:
    assert robudget_command("run", "digits", "--frobnicate")[0] == 2


def test_run_then_again_then_runs(robudget_command: Run, tmp_path: Path) -> None:
    store = str(tmp_path / "runs")
    args = [
        "run",
        "digits",
        "model.base=2",
        "epochs=1",
        "epoch_images=128",
        "validation.steps=1",
        "evaluation.images=10",
    ]
    code, first, _ = robudget_command(*args, "--store", store, "--json")
    assert code == 0
    code, again, err = robudget_command(*args, "--store", store, "--json")
    assert (code, json.loads(again)) == (0, json.loads(first))
    assert not err
    code, out, _ = robudget_command("runs", store, "--json")
    assert code == 0
    assert json.loads(out) == [json.loads(first)]
    code, out, _ = robudget_command("runs", store)
    assert "digits-wrn-10-1-b2-at2" in out
    prices = tmp_path / "dear.yaml"
    prices.write_text("usd_per_kwh: 1.2\n")
    code, dear, _ = robudget_command("runs", store, "--prices", str(prices), "--json")
    assert json.loads(dear)[0]["cost_usd"] == pytest.approx(10 * json.loads(first)["cost_usd"])


def test_dry_run_and_studies_list_without_running(robudget_command: Run, tmp_path: Path) -> None:
    code, out, _ = robudget_command("sweep", "paper-320", "--dry-run", "--json", "--store", str(tmp_path))
    assert code == 0
    assert len(json.loads(out)) == 320
    assert not list(tmp_path.iterdir())
    code, out, _ = robudget_command("study", "--json")
    assert {row["study"] for row in json.loads(out)} == set(named("studies"))


def test_cost_of_the_papers_recipe_on_a_named_device(robudget_command: Run) -> None:
    code, out, _ = robudget_command("cost", "paper", "--device", "v100", "--gpus", "4", "--json")
    assert code == 0
    (one,) = json.loads(out)
    forward, images = 10.49e9, 110 * 50_000
    assert one["train_flops_paper"] == pytest.approx(3 * 12 * forward * images, rel=0.01)
    assert one["parameters"] == 36_479_194
    assert one["train_seconds_low"] < one["train_seconds"] < one["train_seconds_high"]


def test_fit_predict_plan_on_the_papers_table(robudget_command: Run, shared: Path) -> None:
    table = str(shared / "data" / "paper_runs.csv")
    code, out, _ = robudget_command("fit", table, "--json")
    assert code == 0
    laws = json.loads(out)["laws"]
    published = next(law for law in laws if law["x"].startswith("published") and law["y"] == "aa_acc")
    assert published["form"] == "power"
    assert published["C"] == pytest.approx(50.86, abs=0.01)
    assert published["alpha"] == pytest.approx(0.0105, abs=0.0002)
    code, out, _ = robudget_command("predict", "paper", "--from", table, "--json")
    assert code == 0
    assert 45 < json.loads(out)["aa_acc"] < 55
    code, out, _ = robudget_command("plan", "--from", table, "--budget", "1e18flops", "--json")
    assert code == 0
    assert json.loads(out)["options"]


def test_a_model_size_that_was_not_run_has_its_parameters_by_arithmetic() -> None:
    (row,) = rows_of(Recipe.load("digits", {"model.base": 7})).to_dict("records")
    model = build("wrn-10-1", classes=10, image_size=8, channels=1, base=7)
    assert row["parameters"] == sum(p.numel() for p in model.parameters())


def test_fit_and_help_start_no_torch(shared: Path) -> None:
    table = str(shared / "data" / "paper_runs.csv")
    for args in (["--help"], ["fit", table], ["runs", "nowhere"]):
        code = (
            "import sys\nfrom robudget import cli\nsys.argv = ['robudget', *sys.argv[1:]]\n"
            "try: cli.main()\nexcept SystemExit: pass\nsys.exit('torch' in sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, check=False)
        assert done.returncode == 0, args
