"""A figure on disk, and the same figure inside a page."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
from fontTools import subset  # type: ignore[import-untyped]
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_pdf import FigureCanvasPdf
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from robudget import files
from robudget.report.style import COLUMN, FONTS, THEMED

DPI = 300  # of the PNG


@dataclass(frozen=True)
class Drawing:
    """A figure that a section can draw: its name on disk, its title, and a function that returns the figure with its
    caption, or None where the table has no data for it."""

    name: str
    title: str
    draw: Callable[[], tuple[Figure, str] | None]


@dataclass(frozen=True)
class FigureFile:
    """A figure on disk: one path per format, its title and its caption (n and intervals in it). `inline` is its SVG
    element for a page; `wide` figures span both columns of a paper."""

    name: str
    title: str
    caption: str
    pdf: Path
    svg: Path
    png: Path
    inline: str
    wide: bool


def save(figure: Figure, folder: Path, name: str, *, title: str, caption: str) -> FigureFile:
    """Write name.pdf, name.svg and name.png, each in one step and without a date, so that equal input gives equal
    bytes."""
    # The name in the SVG's ids makes them different from those of every other figure of a page.
    with _quiet(), mpl.rc_context({"svg.hashsalt": name}):
        # `savefig` lays out and draws everything twice for every format; once laid out, the canvases draw it once each.
        if (engine := figure.get_layout_engine()) is not None:
            engine.execute(figure)
        figure.set_layout_engine("none")
        nothing = dict.fromkeys(("Date", "Format", "Type", "Creator"))
        svg = _bytes(FigureCanvasSVG(figure).print_svg, metadata={"Title": title, **nothing}).decode("utf-8")
        svg = svg.replace("*{", f"text, tspan {{font-family: {FONTS} !important}} *{{", 1)
        with _glyphs_only():
            pdf = _bytes(FigureCanvasPdf(figure).print_pdf, metadata={"Title": title, "CreationDate": None})
        figure.set_dpi(DPI)
        png = _bytes(FigureCanvasAgg(figure).print_png, metadata={"Title": title})
    paths = {kind: folder / f"{name}.{kind}" for kind in ("pdf", "svg", "png")}
    for kind, data in (("pdf", pdf), ("svg", svg.encode("utf-8")), ("png", png)):
        files.replace(paths[kind], partial(Path.write_bytes, data=data), durable=False)
    return FigureFile(name, title, caption, **paths, inline=inline(svg), wide=figure.get_figwidth() > COLUMN)


def inline(svg: str) -> str:
    """The SVG element for a page, with the page's theme as CSS variables in place of the colours, and without the names
    of its parts, which are alike in every figure and which nothing refers to. matplotlib has no setting for these."""
    svg = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", svg[svg.index("<svg") :])
    for colour, variable in THEMED.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return svg.replace("<svg ", '<svg role="img" ', 1)


def _bytes(write: Callable[..., object], **kwargs: Any) -> bytes:
    buffer = io.BytesIO()
    write(buffer, **kwargs)
    return buffer.getvalue()


@contextmanager
def _glyphs_only() -> Iterator[None]:
    """PDFs without the tables by which other programs would set text in their fonts: glyphs are placed by their numbers
    there, and to cut these tables down takes most of the time. matplotlib has no setting for it; should it no longer
    ask fontTools in this way, this changes nothing."""
    before = subset.Options

    def options(*args: Any, **kwargs: Any) -> Any:
        chosen = before(*args, **kwargs)
        chosen.drop_tables = [*chosen.drop_tables, "GSUB", "GPOS", "GDEF", "BASE", "JSTF", "MATH", "kern"]
        return chosen

    subset.Options = options
    try:
        yield
    finally:
        subset.Options = before


@contextmanager
def _quiet() -> Iterator[None]:
    """fontTools warns about the dates inside some system fonts, which is nothing to the reader of a report."""
    logger = logging.getLogger("fontTools")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
