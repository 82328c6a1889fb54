"""The house's one-way flow, enforced: who may import whom, and what starts without torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import robudget

SOURCE = Path(robudget.__file__).parent

# Every room, with the rooms it may import. Pure data (errors, files, threat, recipe, …) may be imported by all.
PURE = {"errors", "files", "config", "threat", "recipe", "columns", "execution", "accuracy", "datasets", "formats", ""}
ALLOWED = {
    "data": set(),
    "models": set(),
    "attacks": set(),
    "losses": {"attacks"},
    "backend": {"attacks"},
    "training": {"data", "models", "attacks", "losses", "backend"},
    "evaluation": {"models", "attacks", "data", "backend"},
    "meter": {"models"},
    "forecast": {"models", "training", "attacks", "losses", "data", "meter", "backend"},
    "store": set(),
    "energy_log": {"meter", "store"},
    "runner": {"data", "attacks", "training", "evaluation", "meter", "store", "energy_log"},
    "benchmark": {"data", "attacks", "evaluation", "meter", "store", "energy_log", "runner"},
    "sweep": {"attacks", "store", "runner", "meter", "forecast"},
    "interop": {"attacks", "evaluation", "meter", "models", "store", "tables"},
    "tables": {"store", "meter"},
    "laws": {"tables"},
    "prediction": {"tables", "laws", "meter"},
    "planning": {"tables", "laws", "prediction"},
    "analysis": {"tables", "laws", "prediction", "planning"},
    "report": {"analysis", "tables", "laws", "prediction", "planning", "store"},
    "demo": {"sweep", "store", "analysis", "laws", "report", "tables"},
}


def modules() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def room(path: Path) -> str:
    first = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


def imported(path: Path) -> set[str]:
    """The rooms of robudget that a file imports, anywhere in it but under TYPE_CHECKING."""
    rooms = set()
    tree = ast.parse(path.read_text("utf-8"))
    hidden = {
        id(node)
        for test in ast.walk(tree)
        if isinstance(test, ast.If) and "TYPE_CHECKING" in ast.unparse(test.test)
        for node in ast.walk(test)
    }
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            if package == "robudget":
                first = rest.partition(".")[0]
                rooms.add(first if (SOURCE / first).is_dir() or (SOURCE / f"{first}.py").exists() else "")
    return rooms


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


@pytest.mark.parametrize(
    "statement",
    [
        "import robudget",
        "import robudget.attacks.ensemble, robudget.evaluation.specification, robudget.forecast.passes",
        "import robudget.recipe, robudget.store, robudget.sweep.local, robudget.sweep.study",
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
