"""Tables and laws in; figures and one offline page out. Imports no torch, and matplotlib only when it draws."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from robudget.report.page import draw_all, write

__all__ = ["draw_all", "write"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from robudget.report import page

        return getattr(page, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
