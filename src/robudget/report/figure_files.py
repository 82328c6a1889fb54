"""A figure on disk, and the same figure inside a page."""

from __future__ import annotations

import io
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_pdf import FigureCanvasPdf
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from robudget import files
from robudget.report.style import COLUMN, THEMED

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
    """A figure on disk: one path per format, its title and its caption (n and intervals in it).

    For a page: `inline`, its SVG element with the theme's colours as CSS variables and ids that no other figure of the
    page has, but for the letters, which figures share: `glyphs` maps their ids to their shapes, which the page defines
    once. `wide` figures span both columns of a paper.
    """

    name: str
    title: str
    caption: str
    pdf: Path
    svg: Path
    png: Path
    inline: str
    glyphs: dict[str, str]
    wide: bool


def save(figure: Figure, folder: Path, name: str, *, title: str, caption: str) -> FigureFile:
    """Write name.pdf, name.svg and name.png, each in one step and without a date, so that equal input gives equal
    bytes."""
    with _quiet():
        # `savefig` lays out and draws everything twice for every format; once laid out, the canvases draw it once each.
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        vector = _bytes(FigureCanvasSVG(figure).print_svg, metadata={"Date": None, "Title": title})
        made = {
            "svg": vector,
            "pdf": _bytes(FigureCanvasPdf(figure).print_pdf, metadata={"CreationDate": None, "Title": title}),
        }
        figure.set_dpi(DPI)
        made["png"] = _bytes(FigureCanvasAgg(figure).print_png, metadata={"Title": title})
    paths = {kind: folder / f"{name}.{kind}" for kind in made}
    for kind, data in made.items():
        files.replace(paths[kind], partial(Path.write_bytes, data=data), durable=False)
    inline, glyphs = _inline(vector.decode("utf-8"), name, f"{title}. {caption}")
    wide = figure.get_figwidth() > COLUMN
    return FigureFile(name, title, caption, paths["pdf"], paths["svg"], paths["png"], inline, glyphs, wide)


def _bytes(write: Callable[..., object], **kwargs: Any) -> bytes:
    buffer = io.BytesIO()
    write(buffer, **kwargs)
    return buffer.getvalue()


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


_GLYPH = re.compile(r'<path id="([^"]+)" d="([^"]*)" transform="(scale\(0\.015625\))"/>')
_DIGITS = re.compile(r"-?\d+\.\d{3,}")


def _inline(svg: str, name: str, label: str) -> tuple[str, dict[str, str]]:
    """The SVG element for a page, with no more digits than a screen shows, and the letters it uses."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<title>.*?</title>|<!--.*?-->", "", svg, flags=re.S)
    svg = re.sub(r'\b(d|x|y)="([^"]*)"', lambda m: f'{m[1]}="{_DIGITS.sub(_shorter, " ".join(m[2].split()))}"', svg)
    letters = {m[1]: f'<path id="glyph-{m[1]}" d="{m[2]}" transform="{m[3]}"/>' for m in _GLYPH.finditer(svg)}
    svg = _GLYPH.sub("", svg)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'href="#([^"]+)"', lambda m: f'href="#{"glyph" if m[1] in letters else name}-{m[1]}"', svg)
    svg = svg.replace("url(#", f"url(#{name}-")
    for colour, variable in THEMED.items():
        svg = svg.replace(colour, f"var(--{variable})")
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)  # it takes the width that the page gives it
    svg = re.sub(r">\s+<", "><", svg).replace("<defs></defs>", "")
    svg = _classes(svg, f"figure-{name}")
    safe = label.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{safe}" ', 1), letters


def _classes(svg: str, prefix: str) -> str:
    """The styles that recur as classes, written once: a scatter repeats one of a few for each of its points."""
    uses = Counter(re.findall(r'style="([^"]+)"', svg))
    names = {style: f"{prefix}-{i}" for i, (style, n) in enumerate(uses.items()) if n > 3}
    svg = re.sub(r'style="([^"]+)"', lambda m: f'class="{names[m[1]]}"' if m[1] in names else m[0], svg)
    rules = "".join(f".{name}{{{style}}}" for style, name in names.items())
    return svg.replace("<defs>", f"<style>{rules}</style><defs>", 1) if rules else svg


def _shorter(match: re.Match[str]) -> str:
    return f"{float(match[0]):.2f}".rstrip("0").rstrip(".")
