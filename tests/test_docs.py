"""Every Python example in the docs runs, as it stands, in order, in a fresh folder."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


def examples(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)


PAGES = [page for page in sorted(DOCS.glob("*.md")) if examples(page)]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for number, code in enumerate(examples(page), 1):
        exec(compile(code, f"{page.name}, example {number}", "exec"), namespace)


def test_the_library_page_has_examples_for_every_public_name() -> None:
    import robudget

    text = "\n".join(examples(DOCS / "library.md"))
    missing = [n for n in robudget.__all__ if f"rb.{n}" not in text]
    assert not missing
