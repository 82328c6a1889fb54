"""Makes the golden files of a version of robudget: what it left on the disk, finished, half done, and tabulated.

    python tests/golden/make.py tests/golden/0.1.0 [PART…]

Run it with the version whose files they are to be (on PYTHONPATH or installed), before that version is changed; the
files are committed, and `tests/test_golden.py` holds every later version to reading and finishing them. It uses only
the command line and the public names of robudget, so that any version can make its own. Its parts:

    recipes               ids of recipes, and of all recipes of the studies that ship with robudget
    sweep                 a small sweep's store, whose first run has its checkpoint too; the table of it, as
                          `load_runs` gave it, in table.csv and table.parquet; environment.json: versions, CPU
                          capability and threads, with which the same bits can be expected
    half-trained          runs that were killed (SIGKILL) while they trained, one for each kind of state
    half-evaluated        a run that was killed while it was evaluated
    half-eval             evaluations of weights.safetensors by `robudget eval` that were killed
    shards                two finished evaluations of it, with their adversarial examples

expected.json holds what each part gives where nothing disturbs it.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

import robudget as rb

# Digits, a WideResNet of some thousand parameters, float32 so that every machine can go on with it.
TINY = {
    "model.base": 2,
    "threat.eps": 0.1,
    "epochs": 5,
    "epoch_images": 640,
    "batch_size": 64,
    "craft.steps": 1,
    "precision": "float32",
    "validation.images": 20,
    "validation.steps": 2,
    "validation.every": 1,
    "collapse.images": 16,
    "collapse.steps": 2,
    "evaluation.images": 4,
    "evaluation.batch_size": 4,
}
KINDS: dict[str, dict[str, Any]] = {
    "ema": TINY | {"ema.decay": 0.9},
    "adamw": TINY | {"optim.name": "adamw", "optim.lr": 0.01, "optim.nesterov": False},
    "trades-synthetic-cutmix": TINY
    | {"loss": "trades", "synthetic.source": "mixture", "synthetic.amount": 500, "data.cutmix": True},
    "free-at": TINY | {"loss": "free-at", "craft.steps": 2},
    "awp-randaugment-restore": TINY
    | {"awp.gamma": 0.01, "data.randaugment": 5, "data.crop": 1, "collapse.action": "restore"},
    # Long enough for a note of the energy of the open window, which is written every few seconds.
    "noted": TINY | {"epochs": 24, "seed": 3},
}
EVALUATED = TINY | {"epochs": 8, "evaluation.images": 12, "seed": 1}
STUDY = """\
question: What do size and loss buy on a few hundred digits?
base:
  data: {name: digits, crop: 0, flip: false}
  model: {name: wrn-10-1}
  threat: {norm: linf, eps: 0.1}
  craft: {steps: 1}
  epochs: 4
  epoch_images: 640
  batch_size: 64
  precision: float32
  optim: {lr: 0.2, lr_batch: null, nesterov: true, weight_decay: 1e-4, warmup_epochs: 1}
  validation: {images: 20, steps: 2, every: 2}
  collapse: {images: 16, steps: 2}
  evaluation: {images: 12, batch_size: 4}
axes:
  size:
    small: {model.base: 2}
    large: {model.base: 3}
  training:
    at: {loss: at}
    trades: {loss: trades, ema.decay: 0.9}
"""
VARIED: list[tuple[str, dict[str, Any]]] = [
    ("digits", {"seed": 3}),
    ("digits", {"loss": "trades", "beta": 5}),
    ("digits", {"loss": "standard", "craft.steps": 0}),
    ("digits", {"evaluation.threat": {"norm": "l2", "eps": 0.5}, "evaluation.version": "plus"}),
    ("digits", TINY),
    ("paper", {"craft.step_size": "2/255", "ema.decay": 0.995, "data.cutmix": True}),
    ("paper", {"model.name": "wrn-70-16", "model.activation": "silu", "model.variant": "deepmind"}),
    ("paper", {"synthetic.source": "file", "synthetic.amount": 1000000, "craft.batchnorm": "batch"}),
    ("paper", {"loss": "mart", "threat.eps": "4/255", "data.name": "imagenet", "data.image_size": 224}),
    ("paper", {"loss": "fgsm-rs", "craft.steps": 1, "optim.schedule": "onecycle", "precision": "bfloat16"}),
    ("cifar10-smoke", {"awp.gamma": 0.005, "awp.after_epochs": 1, "collapse.action": "restore"}),
    ("cifar10-smoke", {"model.name": "vit_tiny_patch16_224", "model.patch": 4, "optim.name": "adamw", "optim.clip": 1}),
    ("cifar10-smoke", {"loss": "n-fgsm", "craft.steps": 1, "data.randaugment": 2.5, "metric": "squared"}),
]
EVALUATION = ["eval", "weights.safetensors", "--data", "digits", "--eps", "0.05", "--device", "cpu", "--threads", "1"]


def attacks(*texts: str) -> list[str]:
    return [word for text in texts for word in ("--attack", text)]


EVALUATIONS: dict[str, list[str]] = {
    # The first attack takes the ten seconds after which an evaluation's energy is noted; the kill comes in the last.
    "noted": [*attacks("square:steps=5000", "apgd-ce:steps=10", "apgd-t:steps=60,targets=9"), "--samples", "40"],
    "quick": [*attacks("apgd-ce:steps=20", "fab-t:steps=30,targets=3", "square:steps=500"), "--samples", "24"],
}
SHARD = [*attacks("apgd-ce:steps=20", "square:steps=200"), "--samples", "24", "--examples"]
NAMED = ("digits", "cifar10-smoke", "paper")
STUDIES = ("digits-30", "paper-320")


def main(out: Path, *names: str) -> None:
    out.mkdir(parents=True, exist_ok=True)
    os.chdir(out)  # so that paths in records are relative
    torch.set_num_threads(1)
    path = Path("expected.json")
    expected = json.loads(path.read_text("utf-8")) if path.exists() else {}
    for name in names or PARTS:
        expected[name] = PARTS[name]()
        write("expected.json", expected)
    for file in Path().rglob("*.json"):  # what would say which machine it was
        file.write_text(file.read_text("utf-8").replace(platform.platform(), platform.system()), "utf-8")


def sweep() -> dict[str, Any]:
    Path("study.yaml").write_text(STUDY)
    robudget("sweep", "study.yaml", "--store", "sweep", "--workers", "1", "device=cpu", "threads=1")
    table = rb.load_runs("sweep")
    table.to_csv("table.csv", index=False)
    table.to_parquet("table.parquet")
    first, *others = sorted(Path("sweep").iterdir())
    (first / "previous.pt").unlink()
    for folder in others:
        for file in folder.iterdir():  # the golden files are to be small
            if file.name not in ("recipe.yaml", "environment.json", "run.json", "best.safetensors", "evals"):
                file.unlink()
    write("environment.json", json.loads((first / "environment.json").read_text()))
    shutil.copy(first / "best.safetensors", "weights.safetensors")
    return {"weights": weights(first), "verdicts": verdicts(first)}


def half_trained() -> dict[str, Any]:
    expected = {}
    for kind, changes in KINDS.items():
        words = [f"{key}={value}" for key, value in changes.items()]
        command = ["run", "digits", *words, "device=cpu", "threads=1"]
        store = Path("half-trained") / kind
        until(in_training(store, noted=kind == "noted"), store, *command, "--store", str(store))
        if kind != "trades-synthetic-cutmix":
            (previous,) = store.glob("*/previous.pt")
            previous.unlink()
        expected[kind] = undisturbed(*command)
    return expected


def half_evaluated() -> dict[str, Any]:
    command = ["run", "digits", *(f"{key}={value}" for key, value in EVALUATED.items()), "device=cpu", "threads=1"]
    store = Path("half-evaluated")
    until(in_evaluation(store, "*/evals/*/state"), store, *command, "--store", str(store))
    (previous,) = store.glob("*/previous.pt")
    previous.unlink()
    return undisturbed(*command)


def half_eval() -> dict[str, Any]:
    expected = {}
    for name, options in EVALUATIONS.items():
        command = [*EVALUATION, *options, "--batch-size", "4"]
        path = Path("half-eval") / name
        until(in_evaluation(path, "state", rule=name), path, *command, "--out", str(path))
        with tempfile.TemporaryDirectory() as whole:
            robudget(*command, "--out", whole)
            expected[name] = {"command": command, "verdicts": frame(Path(whole))}
    return expected


def shards() -> dict[str, Any]:
    for i in (1, 2):
        robudget(*EVALUATION, *SHARD, "--shard", f"{i}/2", "--out", f"shards/{i}")
    with tempfile.TemporaryDirectory() as whole:
        robudget(*EVALUATION, *SHARD, "--out", whole)
        return frame(Path(whole))


def robudget(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "robudget", *words], check=True, stdout=subprocess.DEVNULL)


def until(half_done: Callable[[], bool], place: Path, *words: str) -> None:
    """The command, killed as soon as `half_done` says so; tried again where the kill came too late."""
    for _ in range(20):
        shutil.rmtree(place, ignore_errors=True)
        process = subprocess.Popen([sys.executable, "-m", "robudget", *words], stdout=subprocess.DEVNULL)
        while process.poll() is None and not half_done():
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        if process.wait() == -signal.SIGKILL and half_done():
            for torn in place.rglob(".*-*-*.*"):  # a temporary file of the writer that was killed
                torn.unlink()
            return
    raise RuntimeError(f"robudget {' '.join(words)} was never caught half done")


def in_training(store: Path, *, noted: bool) -> Callable[[], bool]:
    def half_done() -> bool:
        for log in store.glob("*/log.jsonl"):
            epochs = log.read_text().count('"event": "epoch"')
            if (log.parent / "last.pt").exists() and epochs >= 2 and (epochs < 5 or noted):
                return not noted or (log.parent / "energy.json").exists()
        return False

    return half_done


def in_evaluation(place: Path, state: str, *, rule: str = "") -> Callable[[], bool]:
    """Where the fourth stage or a later one (the fifth, where a note is asked for) is over for some images only."""

    def half_done() -> bool:
        if rule == "noted" and not (place / "bill.json").exists():
            return False
        for path in place.glob(f"{state}/evaluation.npz"):
            try:
                with np.load(path) as data:
                    about, finished = json.loads(str(data["about"])), data["finished"]
            except (OSError, ValueError, EOFError):
                return False
            stages = list(about["spent"].values())
            return len(stages) >= (5 if rule == "noted" else 4) and not stages[-1]["done"] and bool(finished.any())
        return False

    return half_done


def undisturbed(*words: str) -> dict[str, Any]:
    """What the run gives that nothing disturbs: a digest of its weights, its epochs, its verdicts."""
    with tempfile.TemporaryDirectory() as store:
        robudget(*words, "--store", store)
        (folder,) = Path(store).iterdir()
        events = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        epochs = [
            {key: value for key, value in event.items() if key not in ("event", "at", "seconds")}
            for event in events
            if event["event"] == "epoch"
        ]
        return {"weights": weights(folder), "epochs": epochs, "verdicts": verdicts(folder)}


def weights(folder: Path) -> str:
    """SHA-256 of a run's best weights: names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(folder / "best.safetensors").items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def verdicts(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("evals/*/result.json")
    return frame(path.parent)


def frame(path: Path) -> dict[str, Any]:
    """The verdicts in a folder, a list for each column."""
    return rb.Verdicts.load(path).frame.to_dict("list")


def recipes() -> dict[str, Any]:
    """Ids of named and of varied recipes, and of all recipes of the studies."""
    asked = [*((name, {}) for name in NAMED), *VARIED]
    ids = []
    for name, changes in asked:
        recipe = rb.Recipe.load(name, changes)
        ids.append([name, changes, {"id": recipe.id, "evaluation_id": recipe.evaluation_id, "slug": recipe.slug}])
    studies = {name: [[r.id, r.evaluation_id, r.slug] for r in rb.Study.load(name).recipes] for name in STUDIES}
    return {
        "recipes": ids,
        "studies": {
            name: {"recipes": len(rows), "sha256": hashlib.sha256(json.dumps(rows).encode()).hexdigest()}
            for name, rows in studies.items()
        },
    }


def write(name: str, value: Any) -> None:
    Path(name).write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", "utf-8")


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "recipes": recipes,
    "sweep": sweep,
    "half-trained": half_trained,
    "half-evaluated": half_evaluated,
    "half-eval": half_eval,
    "shards": shards,
}

if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
