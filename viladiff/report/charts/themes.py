"""Figures by matplotlib in a light and a dark theme, as SVG files and as data URIs inside a page."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from viladiff.core.atomic import write_atomically
from viladiff.core.hashing import sha256_hex

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

THEMES = {
    "light": {"ink": "#1b1c20", "faint": "#585b64", "line": "#e0e0da", "ground": "#ffffff"},
    "dark": {"ink": "#e9e9eb", "faint": "#a5a8b1", "line": "#33363d", "ground": "#131417"},
}
"""As in page.css."""
LIGHT = THEMES["light"]
_FORM = 7
"""Raised when the same numbers are drawn otherwise."""


def save_drawn(numbers: object, picture: Callable[[], Figure], folder: Path, name: str) -> dict[str, Path]:
    """Write ``<name>-light.svg`` and ``<name>-dark.svg``; what was drawn from the same numbers is left as it is.

    picture: draws the light one. numbers: all that it is drawn from, as JSON takes them. Returns paths by theme.
    """
    folder.mkdir(parents=True, exist_ok=True)
    digest = sha256_hex(json.dumps([_FORM, numbers]))
    paths = {theme: folder / f"{name}-{theme}.svg" for theme in THEMES}
    old = [path for path in paths.values() if not path.is_file() or digest not in _head(path)]
    drawn = _svg(picture(), digest) if old else ""
    for theme, path in paths.items():
        if path in old:
            write_atomically(path, _coloured(drawn, theme).encode())
    return paths


def uri(path: Path) -> str:
    """Encode an SVG file as a data URI."""
    return f"data:image/svg+xml;base64,{base64.b64encode(path.read_bytes()).decode()}"


def new_figure(width: float, height: float) -> Figure:
    """Make an empty light figure; width and height in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # not pyplot: it keeps figures and picks a display

    figure = Figure(figsize=(width, height), facecolor=LIGHT["ground"])
    FigureCanvasAgg(figure)
    return figure


def style_axes(axes: Axes, title: str, across: str, upwards: str) -> None:
    """Set grid, spines, ticks and the three texts in the theme's colours."""
    axes.set_facecolor(LIGHT["ground"])
    axes.grid(color=LIGHT["line"], linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, colors=LIGHT["faint"])
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(LIGHT["line"])
    axes.set_title(plain(title), fontsize=9, color=LIGHT["ink"], loc="left")
    axes.set_xlabel(plain(across), fontsize=8, color=LIGHT["faint"])
    axes.set_ylabel(plain(upwards), fontsize=8, color=LIGHT["faint"])


def plain(text: str) -> str:
    """Escape dollars, between which matplotlib reads mathematics."""
    return text.replace("$", r"\$")


def _head(path: Path) -> str:
    """Return the start of a file, which says what it was drawn from."""
    return path.read_text(encoding="utf-8", errors="replace")[:2000]


def _coloured(svg: str, theme: str) -> str:
    """Recolour a light figure for another theme, which takes no time."""
    for name, colour in LIGHT.items():
        svg = svg.replace(colour, THEMES[theme][name])
    return svg


def _svg(figure: Figure, digest: str) -> str:
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "viladiff", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Description": digest}, facecolor="auto")
    return buffer.getvalue().decode()
