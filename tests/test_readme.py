"""The README's file tree and commands are true."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import typer

from robudget.cli import app
from robudget.config import named

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")


def tracked() -> set[str]:
    done = subprocess.run(["git", "ls-files", "src", "bench"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    return {line for line in done.stdout.split() if (ROOT / line).exists()}


def tree() -> dict[str, str]:
    """Path → its line's description, read off the indented block under `## File tree`."""
    block = README.split("## File tree", 1)[1].split("```", 2)[1]
    found, folders = {}, []
    for line in block.splitlines()[1:]:
        if not line.strip():
            continue
        depth = (len(line) - len(line.lstrip())) // 2
        name, _, about = line.strip().partition("  ")
        folders = folders[:depth]
        if name.endswith("/"):
            folders.append(name)
        else:
            found["".join(folders) + name] = about.strip()
    return found


def test_the_tree_has_one_described_line_a_file() -> None:
    python = {
        p for p in tracked() if p.endswith((".py", ".html", ".yaml", ".json", ".csv")) and not p.endswith("__init__.py")
    }
    listed = tree()
    assert set(listed) - {p for p in listed if (ROOT / p).exists()} == set(), "listed, but not there"
    assert python - set(listed) == set(), "there, but not listed"
    assert all(listed.values()), "every file has its line"


def test_every_relative_link_leads_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", README):
        assert (ROOT / target).exists(), target


def commands() -> list[str]:
    pages = [README, *(page.read_text("utf-8") for page in sorted((ROOT / "docs").glob("*.md")))]
    lines = [line for page in pages for block in page.split("```sh")[1:] for line in block.split("```")[0].splitlines()]
    return [line.split("#")[0].strip() for line in lines if line.startswith("robudget ")]


@pytest.mark.parametrize("line", commands())
def test_every_command_it_shows_is_one(line: str) -> None:
    """Parsed by the application itself: the verb, its options and what they take; the recipe or study is a real one."""
    verb, *words = shlex.split(line)[1:]
    command = typer.main.get_command(app).commands[verb]  # type: ignore[attr-defined]
    taken = command.make_context(verb, words).params
    if verb in ("run", "predict"):
        assert taken["recipe"] in named("recipes")
    if verb == "sweep":
        assert taken["study"] in named("studies")
