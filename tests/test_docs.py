"""Everything that the README and the docs show runs, as typed: shell commands page by page, Python examples in order.

Each page's commands run in the order of the page, in a folder of their own, in this process, with the words that bash
makes of the line. What is not there on a fresh machine is put there first: a small `~/cifar10` in the Hub's layout,
`my_model.py` with its `load`, a folder of runs, the authors' table, RobustBench's folder. To be quick, the recipes and
studies that ship are made small (`SMALL`): fewer epochs, smaller models, fewer images; laws have fewer resamples, and
what starts a Python program gets a fork. Nothing else differs from what a reader types, and nothing in the product
knows of it. Exceptions, each checked in another way:

- `make …` sets up a virtual environment: make itself has to know the target (`make --dry-run`).
- `torchrun …` starts processes of its own: torchrun and robudget parse the line, and two processes run a recipe in
  tests/test_torchrun.py.
- `robudget export … tensorboard …` needs that extra: without it, its one-line error is what has to come.

The trees of files in the README and in docs/architecture.md are the files' own first sentences. To write them anew:

    python tests/test_docs.py --tree
"""

from __future__ import annotations

import ast
import importlib.util
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import typer
import yaml
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import robudget as rb
from robudget import analysis, config
from robudget.analysis import analyse
from robudget.cli import app
from robudget.models.build import build
from robudget.recipe import Recipe
from robudget.store import RunFolder, Store

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]

Run = Callable[..., tuple[int, str, str]]


def blocks(page: Path, language: str) -> list[str]:
    """The page's fenced blocks of a language, without the fences."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[str]:
    return [line for block in blocks(page, "sh") for line in block.splitlines() if line.split("#")[0].strip()]


# -- what a reader's machine has, made small --------------------------------------------------------------------------

TINY = {"model.base": 2, "epochs": 1, "validation.steps": 2, "validation.images": 10, "evaluation.images": 4}
SMALL: dict[str, dict[str, dict[str, Any]]] = {
    "recipes": {
        "digits": TINY | {"epoch_images": 256},
        "cifar10-smoke": TINY | {"epoch_images": 128, "validation.fraction": 0.2},
        "paper": TINY
        | {"model.name": "wrn-10-1", "batch_size": 64, "epoch_images": 64, "craft.steps": 1}
        | {"optim.warmup_epochs": 0, "evaluation.images": 2},
    },
}
SMALL_STUDIES = {
    "digits-30": {"size": ["small"], "training": ["at-1", "at-2"], "data": ["real"]},
    "paper-320": {"model": ["wrn-28-10"], "steps": ["1", "10"]},
}
RESAMPLES = 100
FEW = 18  # test images, none of them of the last class
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
MODEL = """
import torch
from torch import nn


def load():
    torch.manual_seed(0)
    return nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(192, 10))


def smooth(model):
    return model
"""


def small_resources(folder: str) -> dict[str, str]:
    texts = config_named(folder)
    for name, changes in SMALL.get(folder, {}).items():
        texts[name] = yaml.safe_dump(config.merge(yaml.safe_load(texts[name]), config.nest(changes)))
    if folder == "studies":
        for name, axes in SMALL_STUDIES.items():
            study = yaml.safe_load(texts[name])
            for axis, keys in axes.items():
                study["axes"][axis] = {key: study["axes"][axis][key] for key in keys}
            texts[name] = yaml.safe_dump(study, sort_keys=False)
    return texts


config_named = config.named


def write_cifar10(folder: Path, train: int, test: int) -> None:
    """Parquet shards in the Hub's layout: noisy patches, each class its own colour."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    colours = random.integers(40, 216, (10, 3))
    names = {"info": {"features": {"label": {"names": list(CLASSES), "_type": "ClassLabel"}}}}
    for split, n in (("train", train), ("test", test)):
        labels = np.arange(n) % (9 if n == FEW else 10)
        noise = random.integers(-40, 40, (n, 8, 8, 3))
        small = np.clip(colours[labels][:, None, None] + noise, 0, 255).astype(np.uint8)
        images = [{"bytes": png(image.repeat(4, 0).repeat(4, 1)), "path": None} for image in small]
        frame = pd.DataFrame({"img": images, "label": labels})
        frame.attrs = {"huggingface": json.dumps(names)}
        frame.to_parquet(folder / f"{split}-00000-of-00001.parquet")


def png(image: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG", compress_level=1)
    return out.getvalue()


def write_runs(store: Path, finished: Path) -> None:
    """A record for each recipe of digits-30, with accuracies and costs of known laws: what a real sweep leaves."""
    record = json.loads((finished / "run.json").read_text("utf-8"))
    random = np.random.default_rng(0)
    for recipe in rb.Study.load("digits-30").recipes:
        loss = {"standard": 0.0, "at": 1.0, "trades": 1.02}[recipe.loss]
        flops = 2e10 * recipe.model.base**2 * (1 + recipe.craft.steps * loss) * (1 + 0.2 * recipe.synthetic.share)
        robust = (0.02 if recipe.loss == "standard" else 0.4 * loss) * (flops / 1e12) ** 0.07
        robust += random.normal(0, 0.005) + 0.02 * recipe.synthetic.share
        mine = json.loads(json.dumps(record)) | {"id": recipe.id, "slug": recipe.slug, "recipe": recipe.to_dict()}
        mine["training"] |= {"flops_exact": flops, "flops_paper": 1.5 * flops, "images_seen": 20_000}
        mine["training"]["seconds"] = 5.0 * flops / 1e12
        mine["training"]["energy"] |= {"kwh": 1e-5 * flops / 1e12, "seconds": 5.0 * flops / 1e12}
        mine["evaluation"] |= {"id": recipe.evaluation_id, "n": 200, "robust": robust, "clean": 0.97}
        mine["evaluation"] |= {"low": robust - 0.05, "high": robust + 0.05}
        mine["model"]["parameters"] = 800 * recipe.model.base**2
        folder = Store(store).folder(recipe)
        folder.open(recipe)
        folder.finish(mine)


def write_paper_table(path: Path) -> None:
    """A table with the columns of the authors' CSV, from the paper's rule of FLOPs and a law of known exponent."""
    random = np.random.default_rng(0)
    rows = []
    for model, (parameters, forward) in {
        "wide_resnet28_10_dm": (36.5, 10.49),
        "wide_resnet70_16_dm": (267.2, 77.53),
    }.items():
        for loss in ("pgd", "trades"):
            for steps in (1, 2, 5, 10):
                for epochs in (110, 400):
                    for synthetic in (0, 1):
                        flops = 3 * (steps + (2 if loss == "pgd" else 3)) * forward * 50_000 / 4 / 1000
                        accuracy = 50 * (flops * epochs) ** 0.01 - 10 + 10 * synthetic + random.normal(0, 0.3)
                        rows.append({
                            "train_flops": flops, "train_electricity_cost": flops * 1e-5, "train_emissions": 0.85,
                            "epochs": epochs, "model": model, "model_parameters": parameters * 1e6,
                            "synthetic_data": synthetic, "at": loss, "at_steps": steps,
                            "aa_robust_acc": accuracy / 100, "eval_acc": 0.85,
                        })  # fmt: skip
    pd.DataFrame(rows).to_csv(path, index=False)


def write_robustbench(folder: Path) -> None:
    folder.mkdir(parents=True)
    for name, architecture, accuracy in (
        ("Madry2018Towards", "WideResNet-28-10", "44.04"),
        ("Gowal2020Uncovering_70_16", "WideResNet-70-16", "57.14"),
        ("Wang2023Better_WRN-28-10", "WideResNet-28-10", "67.31"),
    ):
        entry = {
            "link": "https://arxiv.org", "name": name, "authors": "…", "venue": "…", "dataset": "cifar10",
            "architecture": architecture, "eps": "8/255", "clean_acc": "90.00", "reported": accuracy,
            "autoattack_acc": accuracy, "additional_data": False, "number_forward_passes": 1, "unreliable": False,
        }  # fmt: skip
        (folder / f"{name}.json").write_text(json.dumps(entry))


def write_weights(path: Path) -> None:
    """A PreActResNet-18 that takes every image for a truck, of which the small test split has none."""
    network = build("preact-resnet-18", classes=10, image_size=32, channels=3, mean=(0.5,) * 3, std=(0.25,) * 3)
    state = network.state_dict()
    head = [name for name in state if name.endswith(".bias") and state[name].shape == (10,)][-1]
    state[head][9] = 1e4
    save_file(state, path)


def write_evaluated_run(folder: Path, finished: Path) -> None:
    """A finished run at ε = 1, at which every image breaks soon."""
    from safetensors import safe_open

    recipe = Recipe.load(finished / "recipe.yaml", {"threat.eps": 1})
    RunFolder(folder).open(recipe)
    with safe_open(finished / "best.safetensors", framework="pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    save_file(weights, folder / "best.safetensors", metadata={"recipe": recipe.to_yaml(), "recipe_id": recipe.id})
    record = json.loads((finished / "run.json").read_text("utf-8"))
    RunFolder(folder).finish(record | {"recipe": recipe.to_dict(), "id": recipe.id, "slug": recipe.slug})


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Makes this a reader's machine, at the point where they begin with a page: in an empty folder, with their data."""
    finished = next(iter(sorted((ROOT / "tests" / "golden" / "0.1.0" / "sweep").iterdir())))

    def prepare(page: Path) -> None:
        text = page.read_text("utf-8")
        home, work = tmp_path / "home", tmp_path / "work"
        work.mkdir()
        write_cifar10(home / "cifar10", 320, 512 if "--samples 512" in text else FEW)
        monkeypatch.setenv("HOME", str(home))
        for name in ("ROBUDGET_CACHE", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.chdir(work)
        (work / "theirs.csv").write_text("robust\n" + "true\n" * FEW)
        for name in ("my_model.py", "their_model.py"):
            (work / name).write_text(MODEL)
        for store in ("demo/runs", *(["runs"] if page.name in ("laws.md", "bill.md") else [])):
            write_runs(work / store, finished)
        for run in re.findall(r"\bruns/digits\S*", "\n".join(commands(page))):
            write_evaluated_run(work / run, finished)
        if "weights.safetensors --model" in text:
            write_weights(work / "weights.safetensors")
        write_paper_table(work / "paper_runs.csv")
        write_robustbench(work / "robustbench" / "cifar10" / "Linf")
        for block in blocks(page, "yaml"):
            if name := re.match(r"# ([\w-]+\.yaml)\b", block):
                (work / name[1]).write_text(block)
        monkeypatch.setattr(config, "named", small_resources)
        monkeypatch.setitem(analyse.__kwdefaults__, "resamples", RESAMPLES)
        monkeypatch.setattr(analysis, "SPLIT_RESAMPLES", RESAMPLES)

    return prepare


def words_of(line: str) -> list[str]:
    """What bash makes of a command line: tildes, quotes and comments are its business."""
    done = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True, check=True)
    return done.stdout.split("\0")[:-1]


@pytest.mark.usefixtures("forks")
@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=lambda page: page.name)
def test_the_commands_of_a_page_run_as_typed(
    page: Path, machine: Callable[[Path], None], robudget_command: Run
) -> None:
    machine(page)
    for line in commands(page):
        program, *words = words_of(line)
        if program == "make":
            subprocess.run(["make", "--dry-run", *words], cwd=ROOT, capture_output=True, check=True)
        elif program == "torchrun":
            check_torchrun(words)
        else:
            assert program == "robudget", line
            code, out, error = robudget_command(*words)
            if words[0] == "export" and importlib.util.find_spec(words[2]) is None:
                assert code == 2
                assert f"robudget[{words[2]}]" in error
                continue
            assert code == 0, f"{line}\n{error}"
            assert out.strip(), line


def inline_commands(page: Path) -> list[str]:
    """`robudget …` in the running text, with more than a verb."""
    return re.findall(
        r"`(robudget [\w-]+ [^`]+)`", re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.M | re.S)
    )


@pytest.mark.parametrize("line", [line for page in PAGES for line in (*commands(page), *inline_commands(page))])
def test_every_command_shown_is_one(line: str) -> None:
    """Parsed by the application itself: the verb, its options and what they take; the recipe or study is a real one."""
    program, *words = words_of(line)
    if program != "robudget":
        return
    verb, *rest = words
    command = typer.main.get_command(app).commands[verb]  # type: ignore[attr-defined]
    taken = command.make_context(verb, rest).params
    if verb in ("run", "predict"):
        assert taken["recipe"] in config.named("recipes")
    if verb == "sweep" and not taken["study"].endswith(".yaml"):
        assert taken["study"] in config.named("studies")


def check_torchrun(words: list[str]) -> None:
    from torch.distributed.run import get_args_parser

    parsed = get_args_parser().parse_args(words)
    assert parsed.module
    assert parsed.training_script == "robudget"
    verb, *rest = parsed.training_script_args
    typer.main.get_command(app).commands[verb].make_context(verb, rest)  # type: ignore[attr-defined]


# -- Python -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("forks")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_examples_run(page: Path, machine: Callable[[Path], None]) -> None:
    machine(page)
    # The README speaks of "any PyTorch classifier" and of a folder of runs; docs/library.md has everything it needs.
    namespace: dict[str, object] = {}
    if page.name == "README.md":
        torch.manual_seed(0)
        namespace = {"model": nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), "x": torch.rand(8, 1, 8, 8)}
        namespace["y"] = torch.arange(8)
        Path("demo/runs").rename("runs")
    for number, code in enumerate(blocks(page, "python"), 1):
        exec(compile(code, f"{page.name}, example {number}", "exec"), namespace)


def test_the_library_page_has_examples_for_every_public_name() -> None:
    text = "\n".join(blocks(DOCS / "library.md", "python"))
    missing = [name for name in rb.__all__ if f"rb.{name}" not in text]
    assert not missing


# -- the pages are true of the source ---------------------------------------------------------------------------------

SOURCE = ROOT / "src" / "robudget"
ARCHITECTURE = DOCS / "architecture.md"
# In the order in which a recipe, its runs and their table pass through them.
TOP = (
    "recipe/", "recipes/", "studies/", "threat.py", "losses.py", "execution.py", "threads.py",
    "columns.py", "datasets.py", "accuracy.py", "formats.py", "config.py", "files.py", "cache.py", "stop.py",
    "errors.py", "data/", "models/", "attacks/",
    "backend/", "training/", "evaluation/", "meter/", "forecast/", "lease.py", "store.py", "energy_log.py",
    "environment.py", "metered.py", "runner.py",
    "benchmark.py", "beyond.py", "sweep/", "tables/", "laws/", "prediction/", "planning/", "analysis.py", "answers/",
    "report/",
    "interop/", "demo.py", "doctor.py", "cli/", "__main__.py",
)  # fmt: skip
ABOUT = {"recipes/": "the recipes that ship", "studies/": "the studies that ship"}
WIDTH = 22  # of the column of names


def first_sentence(path: Path) -> str:
    """Of a module's docstring, of a template's or a YAML file's first comment; without its full stop."""
    text = path.read_text("utf-8")
    if path.suffix == ".py":
        paragraph = (ast.get_docstring(ast.parse(text)) or "").split("\n\n")[0]
    elif path.suffix == ".html":
        paragraph = text.split("#}")[0].strip("{#- ").removesuffix("-")
    else:
        paragraph = " ".join(line.strip("# ") for line in takewhile(lambda line: line[:2] == "# ", text.splitlines()))
    sentence = re.split(r"(?<=\.)\s+(?=[^a-z\d(])", " ".join(paragraph.split()) + " ")[0]
    return sentence.strip().rstrip(".:")


def branches(folder: Path, names: Iterable[str], depth: int = 1) -> Iterator[str]:
    """A line for each of these files and folders (whose names end in a slash), and for all that is in them."""
    for name in names:
        path = folder / name
        about = ABOUT.get(name) or first_sentence(path / "__init__.py" if name.endswith("/") else path)
        yield f"{'  ' * depth + name:{WIDTH + 2 * depth}}  {about}"
        if name.endswith("/"):
            yield from branches(path, contents(path), depth + 1)


def contents(folder: Path) -> list[str]:
    """Tracked files and folders, by name; folders have a slash. `__init__.py` speaks for its folder."""
    done = subprocess.run(["git", "ls-files", "."], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    names = {
        path.split("/")[0] + ("/" if "/" in path else "") for path in done.stdout.split() if (folder / path).exists()
    }
    return sorted(names - {"__init__.py", "py.typed"})


def tree_of_files() -> str:
    bench = [
        f"  {name:{WIDTH}}  {first_sentence(ROOT / 'bench' / name)}"
        for name in contents(ROOT / "bench")
        if name.endswith(".py")
    ]
    return "\n".join(["src/robudget/", *branches(SOURCE, TOP), "bench/", *bench])


def tree_of_rooms() -> str:
    lines = [line for line in branches(SOURCE, TOP) if not line.startswith("    ")]
    return "\n".join(["src/robudget/", *lines])


TREES: dict[Path, Callable[[], str]] = {ROOT / "README.md": tree_of_rooms, ARCHITECTURE: tree_of_files}


def with_tree(page: Path) -> str:
    """The page with its tree written anew: the block whose first line is `src/robudget/`."""
    text, tree = page.read_text("utf-8"), TREES[page]()
    return re.sub(r"^```\n(src/robudget/\n.*?)?^```", lambda _: f"```\n{tree}\n```", text, count=1, flags=re.M | re.S)


@pytest.mark.parametrize("page", TREES, ids=lambda page: page.name)
def test_the_tree_is_that_of_the_files(page: Path) -> None:
    assert page.read_text("utf-8") == with_tree(page), "python tests/test_docs.py --tree writes it"


def test_every_file_says_what_it_is() -> None:
    assert sorted(TOP) == contents(SOURCE)
    lines = tree_of_files().splitlines()[1:]
    assert not [line for line in lines if line.strip() == line.split()[0] and line != "bench/"], (
        "a docstring is missing"
    )
    assert not [line for line in lines if len(line) > 160]
    assert len(tree_of_rooms().splitlines()) <= 46


def test_what_the_architecture_page_names_is_there() -> None:
    text = ARCHITECTURE.read_text("utf-8").split("## Every file")[0]
    references = set(re.findall(r"`([\w/]+\.(?:py|yaml))(?::([\w.]+))?`", text))
    assert len(references) > 60
    for file, name in references:
        path = ROOT / file if file.startswith("tests/") else SOURCE / file
        assert path.exists(), file
        assert not name or name in names_in(path), f"{file}:{name}"


def names_in(path: Path) -> set[str]:
    """What a module defines: functions, classes, their methods, and variables."""
    names = set()
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text("utf-8")):
        assert (page.parent / target).exists(), target


if __name__ == "__main__" and "--tree" in sys.argv:
    for page in TREES:
        page.write_text(with_tree(page), "utf-8")
