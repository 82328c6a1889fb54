"""The one-way flow of imports: between rooms as ALLOWED says, between files in no circle; what starts without torch."""

import ast
import subprocess
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import robudget

SOURCE = Path(robudget.__file__).parent

# Every room, with the rooms it may import. Pure data (errors, files, threat, recipe, …) may be imported by all.
PURE = {
    "errors", "files", "config", "threat", "recipe", "losses", "columns", "execution", "accuracy",
    "datasets", "formats", "cache", "threads", "stop", "",
}  # fmt: skip
ALLOWED = {
    "data": set(),
    "models": set(),
    "attacks": set(),
    "backend": {"attacks"},
    "training": {"data", "models", "attacks", "backend"},
    "evaluation": {"models", "attacks", "backend"},
    "meter": {"models"},
    "forecast": {"training", "attacks", "data", "meter", "backend", "evaluation"},
    "lease": set(),
    "store": {"lease"},
    "energy_log": {"meter", "store"},
    "environment": {"backend", "meter"},
    "metered": {"data", "attacks", "evaluation", "meter", "store", "energy_log"},
    "runner": {
        "data",
        "attacks",
        "backend",
        "training",
        "evaluation",
        "meter",
        "store",
        "lease",
        "energy_log",
        "environment",
        "metered",
    },
    "benchmark": {"data", "attacks", "evaluation", "meter", "store", "energy_log", "environment", "metered"},
    "doctor": {"backend", "meter", "environment"},
    "sweep": {"store", "lease", "runner", "environment", "forecast", "meter"},
    "beyond": {"data", "evaluation", "meter", "store", "energy_log", "environment", "benchmark", "report"},
    "interop": {"attacks", "evaluation", "store", "tables"},
    "tables": {"store", "meter"},
    "laws": {"tables"},
    "prediction": {"tables", "laws", "meter"},
    "planning": {"tables", "laws", "prediction", "meter"},
    "analysis": {"tables", "laws", "prediction", "planning"},
    "answers": {"tables", "laws", "prediction"},
    "report": {"analysis", "answers", "tables", "laws", "prediction", "planning"},
    "demo": {"sweep", "store", "analysis", "report", "tables"},
}


def modules() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def room(path: Path) -> str:
    first = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


def file_of(name: str) -> Path | None:
    """The file of a dotted module name, `robudget.data` being its `__init__.py`; None for what is no module of ours."""
    package, *rest = name.split(".")
    place = SOURCE.joinpath(*rest)
    if package != "robudget":
        return None
    if place.is_dir():
        return place / "__init__.py"
    return place.with_suffix(".py") if place.with_suffix(".py").exists() else None


@cache
def imports(path: Path) -> frozenset[Path]:
    """The files of robudget that a file imports, anywhere in it (in a function too) but under TYPE_CHECKING."""
    tree = ast.parse(path.read_text("utf-8"))
    hidden = {
        id(node)
        for test in ast.walk(tree)
        if isinstance(test, ast.If) and "TYPE_CHECKING" in ast.unparse(test.test)
        for node in ast.walk(test)
    }
    files = set()
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            files |= {file_of(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            # `from robudget.data import stream` imports a file, `from robudget.data import load` a name of the room's.
            files |= {file_of(f"{node.module}.{alias.name}") or file_of(str(node.module)) for alias in node.names}
    return frozenset(file for file in files if file is not None)


def imported(path: Path) -> set[str]:
    """The rooms of robudget that a file imports."""
    return {room(file) for file in imports(path)}


def circle(graph: Mapping[str, Iterable[str]]) -> list[str]:
    """The names along one circle of the graph, its first again at the end; empty where there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        names: list[str] = error.args[1]
        return names
    return []


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_go_one_way(path: Path) -> None:
    mine = room(path)
    if mine in ("", "cli", "__main__"):
        return
    allowed = ALLOWED.get(mine, set()) if mine not in PURE else set()
    wrong = imported(path) - allowed - PURE - {mine}
    assert not wrong, f"{path.relative_to(SOURCE)} may not import {sorted(wrong)}"


def test_every_room_has_its_rule() -> None:
    rooms = {room(path) for path in modules()}
    assert rooms - PURE - {"cli", "__main__"} <= set(ALLOWED), "a new room: say in ALLOWED what it may import"


def test_rooms_stand_in_no_circle() -> None:
    assert not circle(ALLOWED)


def test_files_stand_in_no_circle() -> None:
    names = {path: str(path.relative_to(SOURCE)) for path in modules()}
    assert not circle({name: {names[file] for file in imports(path)} for path, name in names.items()})


@pytest.mark.parametrize(
    "statement",
    [
        "import robudget",
        "import robudget.attacks.ensemble, robudget.evaluation.specification, robudget.forecast.passes",
        "import robudget.recipe, robudget.columns, robudget.store, robudget.sweep.local, robudget.sweep.study",
        "import robudget.laws, robudget.report, robudget.tables.published",
        "import robudget.cli, robudget.demo",
    ],
)
def test_what_is_light_imports_no_torch(statement: str) -> None:
    code = f"{statement}; import sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_nothing_imports_the_command_line() -> None:
    for path in modules():
        assert "cli" not in imported(path) or room(path) in ("cli", "__main__"), path
