"""Tables and laws in; figures and one offline page out. Imports no torch.

`write` and `draw_all` bring in matplotlib when they are first asked for: whoever wants only `labels` starts light.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from robudget.report.figures.draw import draw_all
    from robudget.report.page import write

__all__ = ["draw_all", "write"]


def __getattr__(name: str) -> Any:
    if name == "write":
        from robudget.report.page import write

        return write
    if name == "draw_all":
        from robudget.report.figures.draw import draw_all

        return draw_all
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
