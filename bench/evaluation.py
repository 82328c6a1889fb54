"""Evaluation beside the authors' AutoAttack and torchattacks: speed, agreement, memory, growth. Prints ratios.

    python bench/evaluation.py speed --images 64 --out speed.json          one unit (attack) a call, until all are done
    python bench/evaluation.py whole --images 40 --repeats 3           `standard`, all included, beside the authors'
    python bench/evaluation.py agreement --norm linf --precision bfloat16 --state folder     resumable
    python bench/evaluation.py tiny                                        8×8 digits, the demo's networks
    python bench/evaluation.py quick --images 512 --state folder           quick against standard, confirmation's share
    python bench/evaluation.py launches                                    operations and host time of an attack's step
    python bench/evaluation.py growth                                      cost and memory from 100 to 10,000 images

`speed` and `agreement` use the reference model and images in ../shared. torchattacks is optional: install it without
its stale pins (`pip install --no-deps --target peers torchattacks`) and put that folder on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import logging
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from robudget import data
from robudget.attacks.build import build as make
from robudget.attacks.build import rows_of
from robudget.attacks.ensemble import Member, ensemble
from robudget.attacks.noise import Noise
from robudget.attacks.victim import Victim
from robudget.backend.attack_steps import StepGraphs
from robudget.backend.folding import Folded
from robudget.backend.graph import Graphs
from robudget.backend.kernels import Arithmetic
from robudget.evaluation.evaluator import evaluate
from robudget.evaluation.verdicts import page
from robudget.models import build
from robudget.threat import Threat

SHARED = Path(__file__).resolve().parents[1] / "../shared"
THREATS = {"linf": Threat("linf", 8 / 255), "l2": Threat("l2", 0.5)}
ATTACKS = ("apgd-ce", "apgd-t", "fab-t", "square")


def reference_model() -> nn.Module:
    spec = importlib.util.spec_from_file_location("reference_wrn", SHARED / "reference/wrn.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model: nn.Module = module.WideResNet(16, 2)
    model.load_state_dict(load_file(SHARED / "reference/wrn16_2_at.safetensors"))
    return model.eval()


def reference_images(start: int, n: int) -> tuple[Tensor, Tensor]:
    table = pd.read_parquet(SHARED / "data/cifar10-jpeg/test-00000-of-00001.parquet").iloc[start : start + n]
    pictures = [np.asarray(Image.open(io.BytesIO(item["bytes"]))) for item in table["img"]]
    x = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float().div(255).contiguous()
    return x, torch.tensor(table["label"].to_numpy())


# -- speed -------------------------------------------------------------------------------------------------------------


def authors(model: nn.Module, x: Tensor, y: Tensor, name: str, batch: int) -> Tensor:
    import pyautoattack

    logging.disable(logging.WARNING)
    peer = pyautoattack.AutoAttack(model, norm="Linf", eps=8 / 255, seed=0, version="custom", attacks=[name])
    peer.verbose = False
    peer.apgd.n_restarts = peer.fab.n_restarts = 1
    return peer.run_standard_evaluation(x, y, batch_size=batch)[0]


def whole(args: argparse.Namespace) -> None:
    """The authors' `standard` and ours with checks and confirmation, in turn; the ratio of each pair."""
    import pyautoattack

    logging.disable(logging.WARNING)
    torch.set_num_threads(args.threads)
    model, (x, y) = reference_model(), reference_images(args.start, args.images)
    ratios = []
    for _ in range(args.repeats):
        peer = pyautoattack.AutoAttack(model, norm="Linf", eps=8 / 255, seed=0, version="standard")
        peer.verbose = False
        began = time.perf_counter()
        x_adv = peer.run_standard_evaluation(x.clone(), y.clone(), batch_size=args.batch)[0]
        theirs = time.perf_counter() - began
        left = correct(model, x_adv, y)
        began = time.perf_counter()
        v = evaluate(model, x, y, THREATS["linf"], precision=args.precision, batch_size=args.batch)
        ours = time.perf_counter() - began
        again = sum(item.seconds for item in v.spent if "@" in item.attack)
        ratios.append(theirs / ours)
        print(
            f"{len(x)} images: authors {theirs:.1f} s, ours {ours:.1f} s ({theirs / ours:.2f}×), confirmation "
            f"{100 * again / v.seconds:.1f}%; {int(left.sum())} and {int(v.robust.sum())} stand, "
            f"{int((left.numpy() != v.robust).sum())} verdicts differ",
            flush=True,
        )
    print(f"ratio {np.mean(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}, n = {len(ratios)}")


def torchattacks_peer(model: nn.Module, x: Tensor, y: Tensor, name: str, batch: int) -> Tensor:
    import torchattacks

    eps = 8 / 255
    make: dict[str, Callable[[], object]] = {
        "apgd-ce": lambda: torchattacks.APGD(model, eps=eps, steps=100, n_restarts=1, loss="ce"),
        "apgd-t": lambda: torchattacks.APGDT(model, eps=eps, steps=100, n_restarts=1, n_classes=10),
        "fab-t": lambda: torchattacks.FAB(model, eps=eps, steps=100, n_restarts=1, multi_targeted=True, n_classes=10),
        "square": lambda: torchattacks.Square(model, eps=eps, n_queries=5000, n_restarts=1, resc_schedule=False),
    }
    attack = make[name]()
    return torch.cat([attack(x[i : i + batch], y[i : i + batch]) for i in range(0, len(x), batch)])  # type: ignore[operator]


def correct(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(part) for part in x.split(128)]).argmax(1) == y  # type: ignore[no-untyped-call]


def speed(args: argparse.Namespace) -> None:
    """One attack a call: theirs and ours on the images that ours has not broken, the authors' first."""
    out = Path(args.out)
    done = json.loads(out.read_text()) if out.exists() else {"start": args.start, "n": args.images, "units": {}}
    name = next((a for a in ATTACKS if a not in done["units"]), None)
    if name is None:
        summary(done)
        return
    torch.set_num_threads(args.threads)
    model = reference_model()
    x, y = reference_images(done["start"], done["n"])
    robust = torch.tensor(done.get("robust", correct(model, x, y).nonzero().squeeze(1).tolist()))
    x, y = x[robust], y[robust]
    unit: dict[str, object] = {"images": len(x), "threads": args.threads}
    peers = {"pyautoattack": authors}
    if args.torchattacks:
        peers["torchattacks"] = torchattacks_peer
    for peer, run in peers.items():
        began = time.perf_counter()
        x_adv = run(model, x.clone(), y.clone(), name, args.batch)
        unit[peer] = {"seconds": time.perf_counter() - began, "left": int(correct(model, x_adv, y).sum())}
        print(name, peer, unit[peer], flush=True)
    for precision in ("bfloat16", "float32"):
        began = time.perf_counter()
        v = evaluate(
            model,
            x,
            y,
            THREATS["linf"],
            attacks=[Member(name)],
            index=robust,
            batch_size=args.batch,
            precision=precision,  # type: ignore[arg-type]
            checks=False,
            state=out.with_suffix(f".{name}.{precision}") if args.resume else None,
        )
        spent = {item.attack: item for item in v.spent}
        unit[precision] = {
            "seconds": spent[name].seconds,
            "left": int(v.robust.sum()),
            "forward": spent[name].forward,
            "backward": spent[name].backward,
            "refuted": spent[name].refuted,
            "changed_by_float32": sum(i.broken for i in v.spent if "@" in i.attack),
            "whole": time.perf_counter() - began,
        }
        print(name, precision, unit[precision], flush=True)
        survivors = torch.from_numpy(np.flatnonzero(v.robust))
    done["units"][name] = unit
    done["robust"] = robust[survivors].tolist()
    out.write_text(json.dumps(done, indent=1))
    if name == ATTACKS[-1]:
        summary(done)


def summary(done: dict) -> None:
    """Per attack and in all. The confirmation (5% of the survivors again in float32) is priced from float32's own time
    per image, as it is where nothing falls."""
    total = dict.fromkeys(("pyautoattack", "torchattacks", "bfloat16", "float32"), 0.0)
    print(f"{'attack':10}" + "".join(f"{k:>16}" for k in total) + f"{'bf16 ratio':>12}{'f32 ratio':>12}   left")
    for name, unit in done["units"].items():
        row = {k: unit[k]["seconds"] for k in total if k in unit}
        for k, seconds in row.items():
            total[k] += seconds
        theirs = row["pyautoattack"]
        print(
            f"{name:10}"
            + "".join(f"{row.get(k, float('nan')):16.1f}" for k in total)
            + f"{theirs / row['bfloat16']:12.2f}{theirs / row['float32']:12.2f}   "
            + " ".join(f"{k}={unit[k]['left']}" for k in row)
        )
    theirs, low, full = total["pyautoattack"], total["bfloat16"], total["float32"]
    confirm = 0.05 * full
    print(f"in all: authors {theirs:.0f} s, float32 {full:.0f} s ({theirs / full:.2f}×), bfloat16 {low:.0f} s", end=" ")
    print(f"({theirs / low:.2f}×), with 5% of the survivors confirmed in float32 {low + confirm:.0f} s", end=" ")
    print(f"({theirs / (low + confirm):.2f}×)")
    if total["torchattacks"]:
        print(f"torchattacks {total['torchattacks']:.0f} s: {total['torchattacks'] / low:.2f}× bfloat16")


# -- agreement ---------------------------------------------------------------------------------------------------------


def agreement(args: argparse.Namespace) -> None:
    """Ours on the reference images, resumable; compared with the authors' verdicts. Stops itself after --minutes."""
    torch.set_num_threads(args.threads)
    reference = json.loads((SHARED / f"reference/verdicts-{args.norm}.json").read_text())
    theirs = np.array(reference["verdicts"])[: args.images]
    x, y = reference_images(0, len(theirs))
    end = time.monotonic() + 60 * args.minutes

    def follow(now: object) -> None:
        if time.monotonic() > end:
            print(f"stopped at {now}; call again to go on")
            raise SystemExit(3)

    v = evaluate(
        reference_model(),
        x,
        y,
        THREATS[args.norm],
        precision=args.precision,
        batch_size=args.batch,
        state=args.state,
        progress=follow,
    )
    print(page(v))
    robust = theirs == "robust"
    differ = np.flatnonzero(v.robust != robust)
    print(
        f"{args.norm} {args.precision}, {len(x)} images: ours {100 * v.robust_accuracy:.2f}%, authors "
        f"{100 * robust.mean():.2f}% (difference {100 * (v.robust_accuracy - robust.mean()):+.2f} points, "
        f"{int(v.robust.sum() - robust.sum()):+d} images); per image {100 * (v.robust == robust).mean():.2f}% agree; "
        f"first breaker the same on {100 * (v.broken_by == theirs).mean():.1f}%"
    )
    for i in differ:
        row = v.frame.iloc[i]
        print(f"  image {i}: ours {row.broken_by}, authors {theirs[i]}, worst margin {row.worst_margin:.4f}")


# -- what is saved -----------------------------------------------------------------------------------------------------


def quick(args: argparse.Namespace) -> None:
    """`quick` and `standard` on the reference images: passes, seconds, agreement; the share of the confirmation.

    With --reference-only, `standard` is not run: its verdicts are the authors', its passes those of a survivor times
    the survivors, and what they break is left out (a lower bound)."""
    torch.set_num_threads(args.threads)
    reference = json.loads((SHARED / f"reference/verdicts-{args.norm}.json").read_text())
    theirs = np.array(reference["verdicts"])[: args.images] == "robust"
    x, y = reference_images(0, len(theirs))
    threat = THREATS[args.norm]
    took: dict[str, tuple[float, int]] = {}
    for version in ("quick",) if args.reference_only else ("quick", "standard"):
        v = evaluate(
            reference_model(),
            x,
            y,
            threat,
            version=version,
            precision=args.precision,
            batch_size=args.batch,
            state=None if args.state is None else Path(args.state) / version,
            checks=False,
        )
        took[version] = v.seconds, v.total.forward + v.total.backward
        again = [item for item in v.spent if "@" in item.attack]
        passes = sum(item.forward + item.backward for item in again)
        print(page(v))
        what = "audit" if version == "quick" else "confirmation"
        print(
            f"{version}: {took[version][1]} passes, {v.seconds:.1f} s; of them the {what}: "
            f"{100 * passes / took[version][1]:.1f}% of the passes, "
            f"{100 * sum(item.seconds for item in again) / v.seconds:.1f}% of the time"
        )
        wrong = np.flatnonzero(v.robust != theirs)
        print(f"verdicts that differ from the authors': {len(wrong)} of {len(theirs)} {wrong.tolist()}")
        if v.audit_interval is not None:
            low, high = v.audit_interval
            print(
                f"estimate {100 * v.robust_accuracy:.2f}%, authors {theirs.mean():.4f}, audit [{low:.4f}, {high:.4f}]"
            )
    if args.reference_only:
        survivor = sum(member.passes(10, threat.norm).total for member in ensemble("standard", threat.norm))
        took["standard"] = float("nan"), survivor * int(theirs.sum())
    ratios = [a / b for a, b in zip(took["standard"], took["quick"], strict=True)]
    print(f"standard ÷ quick: {ratios[1]:.1f} times the passes, {ratios[0]:.1f} times the time")


# -- what the host does ------------------------------------------------------------------------------------------------


class Operations(TorchDispatchMode):
    """Counts torch's operations: on a GPU each is a launch or more."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        self.count += 1
        return func(*args, **(kwargs or {}))  # type: ignore[operator]


def launches(args: argparse.Namespace) -> None:
    """Operations and host milliseconds of an attack's step of 64 rows, on torch's device without data, where nothing is
    computed: what a GPU would wait for; and operations of a look at a state that steps as a graph."""
    torch.set_num_threads(args.threads)
    threat, meta = THREATS["linf"], torch.device("meta")
    images = torch.arange(64)
    x, y, logits = torch.rand(64, 3, 32, 32), torch.zeros(64, dtype=torch.int64), torch.rand(64, 10)
    for name in ("wrn-16-2", "wrn-28-10"):
        model = build(name, classes=10, image_size=32).eval().to(meta)
        folded = Folded(model, x[:2].to(meta), Arithmetic(torch.bfloat16, channels_last=True))
        for attack in ATTACKS:
            victim = Victim(lambda x: x.flatten(1)[:, :10], sizes=(64,))
            machine, rows = make(Member(attack), victim, threat, 0), rows_of(Member(attack, targets=1), images, logits)
            state = machine.init(rows, x, y, Noise().stream(machine.name, rows.image, rows.rank, rows.restart))
            for field in fields(state):
                setattr(state, field.name, getattr(state, field.name).to(meta))
            victim.model = folded
            steps = StepGraphs(machine, victim, Graphs(meta, print))
            steps(state, 1)
            counts = []
            for call in (lambda: machine.step(state), lambda: steps(state, 0)):  # noqa: B023 (called at once)
                with Operations() as seen:
                    call()
                counts.append(seen.count)
            times = []
            for _ in range(args.repeats + 2):
                began = time.process_time()
                machine.step(state)
                times.append(1000 * (time.process_time() - began))
            print(
                f"{name} {attack}: {counts[0]} operations a step, {np.median(times):.1f} ms of the host "
                f"({min(times):.1f} to {max(times):.1f}, n = {len(times)}); as a graph 1, and {counts[1]} at a look",
                flush=True,
            )


# -- small networks and growth -----------------------------------------------------------------------------------------


def trained(base: int, epochs: int = 10) -> tuple[nn.Module, Tensor, Tensor, float]:
    """A WideResNet on digits, adversarially trained for a few seconds, and 200 test images."""
    from robudget.attacks.geometry import GEOMETRY

    digits = data.load("digits")
    x, y = digits.train.unit(), digits.train.labels
    size = digits.image_shape[1]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build("wrn-10-1", classes=10, image_size=size, channels=digits.image_shape[0], base=base)
    g, eps, geometry = torch.Generator().manual_seed(0), 0.12, GEOMETRY["linf"]
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=5e-4)
    for _ in range(epochs):
        for part in torch.randperm(len(x), generator=g).split(64):  # type: ignore[no-untyped-call]
            model.eval()
            x_adv = geometry.inside(x[part], eps, g)
            for _ in range(2):
                x_adv.requires_grad_()
                loss = nn.functional.cross_entropy(model(x_adv), y[part])
                (gradient,) = torch.autograd.grad(loss, x_adv)
                x_adv = geometry.project(x_adv.detach() + 0.75 * eps * gradient.sign(), x[part], eps)
            model.train()
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x_adv), y[part]).backward()
            optimizer.step()
    test = digits.test
    return model.eval(), test.unit()[:200], test.labels[:200], eps


def tiny(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    for base in (4, 8, 16):
        model, x, y, eps = trained(base)
        for _ in range(args.repeats):
            wall, cpu = time.perf_counter(), time.process_time()
            v = evaluate(model, x, y, Threat("linf", eps))
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            parts = ", ".join(f"{i.attack} {i.seconds:.2f}" for i in v.spent)
            print(
                f"base {base}: {100 * v.robust_accuracy:.1f}% of {len(x)}, {wall:.2f} s wall, {cpu:.2f} s cpu ({parts})"
            )


def growth(args: argparse.Namespace) -> None:
    """Each size in its own process: seconds, and peak memory beyond what holding the images takes."""
    for n in (100, 1000, 10_000):
        code = f"import bench_evaluation as b; b.one_size({n}, {args.threads})"
        here = Path(__file__)
        loader = (
            "import importlib.util, sys; s = importlib.util.spec_from_file_location('bench_evaluation', "
            f"{str(here)!r}); m = importlib.util.module_from_spec(s); sys.modules['bench_evaluation'] = m; "
            "s.loader.exec_module(m); "
        )
        subprocess.run([sys.executable, "-c", loader + code], check=True)


def one_size(n: int, threads: int) -> None:
    torch.set_num_threads(threads)
    model, x, y, eps = trained(4)
    rows = torch.arange(n) % len(x)
    x, y = x[rows], y[rows]
    quick = [
        Member("apgd-ce", steps=20),
        Member("apgd-t", steps=10),
        Member("fab-t", steps=10),
        Member("square", steps=200),
    ]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter(), time.process_time()
    v = evaluate(model, x, y, Threat("linf", eps), attacks=quick, checks=False)
    wall, cpu = time.perf_counter() - began[0], time.process_time() - began[1]
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    passes = sum(i.forward + i.backward for i in v.spent)
    print(
        f"{n:6} images: {wall:7.2f} s wall, {cpu:7.2f} s cpu, {1e3 * cpu / n:.2f} ms cpu/image, "
        f"{passes / n:.0f} passes/image, peak memory +{grown:.0f} MiB (images {4 * x.numel() / 2**20:.0f} MiB)",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "whole", "agreement", "quick", "launches", "tiny", "growth"])
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--norm", choices=list(THREATS), default="linf")
    parser.add_argument("--precision", choices=["auto", "float32", "bfloat16"], default="auto")
    parser.add_argument("--state")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", default="speed.json")
    parser.add_argument("--torchattacks", action="store_true")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--reference-only", action="store_true")
    args = parser.parse_args()
    verbs = (speed, whole, agreement, quick, launches, tiny, growth)
    {verb.__name__: verb for verb in verbs}[args.what](args)


if __name__ == "__main__":
    main()
