"""How figures look: one drawing in a light and a dark variant, labels at the data, the same bytes in every run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib


matplotlib.use("agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator


@dataclass(frozen=True)
class Style:
    """Colours that people with colour vision deficiencies tell apart (after Okabe and Ito), for one background."""

    name: str
    ink: str
    faint: str
    colours: tuple[str, ...]


LIGHT = Style(
    "light",
    ink="#1f2328",
    faint="#d0d7de",
    colours=("#0072b2", "#d55e00", "#007f5f", "#a8508a", "#9a6a00", "#5b6770", "#2f9bd8"),
)
DARK = Style(
    "dark",
    ink="#e6edf3",
    faint="#3d444d",
    colours=("#56b4e9", "#ff8a4c", "#2fcfa0", "#e79fc4", "#f0b429", "#a9b4be", "#9edcff"),
)
MARKERS = "osD^vPX"
SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "spectral_peft",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "figure.constrained_layout.use": True,
}


def settings(style: Style) -> dict[str, Any]:
    ink = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    return {**SETTINGS, **dict.fromkeys(ink, style.ink), "grid.color": style.faint}


def write(draw: Callable[[Style], Figure], name: str, folder: Path) -> list[Path]:
    """Both variants, without a background and without a date."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for style in (LIGHT, DARK):
        with matplotlib.rc_context(settings(style)):
            figure = draw(style)
            files.append(folder / f"{name}-{style.name}.svg")
            figure.savefig(files[-1], transparent=True, metadata={"Date": None, "Creator": None})
            pyplot.close(figure)
    return files


def panels(count: int, *, columns: int = 2, height: float = 3.0, width: float = 8.0) -> tuple[Figure, list[Axes]]:
    columns = min(count, columns)
    rows = -(-count // columns)
    figure, grid = pyplot.subplots(rows, columns, figsize=(width, height * rows), squeeze=False)
    every = list(grid.flat)
    for unused in every[count:]:
        unused.remove()
    return figure, every[:count]


@dataclass(frozen=True)
class Label:
    """A text that belongs to a point of the data."""

    x: float
    y: float
    text: str
    colour: str


def label_ends(axes: Axes, labels: Sequence[Label]) -> None:
    """Names lines at their right ends: beside the axes, in the order of the ends, apart from each other."""
    axes.autoscale_view()
    inches = axes.get_position().height * axes.figure.get_size_inches()[1]
    to_axes = axes.transData + axes.transAxes.inverted()
    ends = sorted(((*to_axes.transform((label.x, label.y)), label) for label in labels), key=lambda end: end[1])
    heights = spread([height for _, height, _ in ends], apart=0.17 / inches)  # a line of text
    for (x, y, label), height in zip(ends, heights, strict=True):
        line = {"color": label.colour, "linewidth": 0.5, "transform": axes.transAxes, "clip_on": False}
        axes.plot([x, 1.02], [y, height], **line)
        axes.text(1.03, height, label.text, color=label.colour, fontsize=8.5, va="center", transform=axes.transAxes)


def spread(places: Sequence[float], apart: float) -> list[float]:
    """Ascending places, moved so that they are `apart` from each other, and between 0 and 1 if they fit."""
    moved = list(places)
    for _ in range(200):
        for i in range(len(moved) - 1):
            missing = max(0.0, apart - (moved[i + 1] - moved[i]))
            moved[i] -= missing / 2
            moved[i + 1] += missing / 2
        above = max(moved, default=0) - 1
        moved = [place - max(0.0, above) for place in moved]
        below = min(moved, default=0)
        moved = [place - min(0.0, below) for place in moved]
    return moved


def round_numbers(axis: Axis) -> None:
    """Ticks at 1, 1.5, 2, 3, 5 and 7 of a logarithmic axis, as plain numbers."""
    axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


def label_points(axes: Axes, labels: Sequence[Label]) -> None:
    """Names points beside them, where no other name and no other point is; the axes are all drawn."""
    figure = axes.figure
    figure.draw_without_rendering()
    pixel = figure.dpi / 72
    points = [axes.transData.transform((label.x, label.y)) for label in labels]
    taken = [(x - 4 * pixel, y - 4 * pixel, x + 4 * pixel, y + 4 * pixel) for x, y in points]
    frame = axes.get_window_extent()
    for label, (x, y) in sorted(zip(labels, points, strict=True), key=lambda pair: -pair[1][1]):
        width, height = 5.2 * pixel * len(label.text), 10 * pixel
        spots = [(x + dx, y + dy) for dx, dy in _places(width, pixel)]
        inside = [spot for spot in spots if frame.x0 <= spot[0] and spot[0] + width <= frame.x1 + 60 * pixel] or spots
        boxes = [(u, v - height / 2, u + width, v + height / 2) for u, v in inside]
        box = min(boxes, key=lambda box: sum(_overlap(box, other) for other in taken))
        taken.append(box)
        place = ((box[0] - x) / pixel, ((box[1] + box[3]) / 2 - y) / pixel)
        far = abs(place[1]) > 14
        axes.annotate(
            label.text,
            (label.x, label.y),
            place,
            textcoords="offset points",
            color=label.colour,
            fontsize=8.5,
            va="center",
            arrowprops={"arrowstyle": "-", "color": label.colour, "linewidth": 0.4} if far else None,
        )


def _places(width: float, pixel: float) -> list[tuple[float, float]]:
    """Offsets of the left middle of a text from its point, the preferred ones first."""
    near = [(7 * pixel, 0.0), (-width - 7 * pixel, 0.0)]
    rows = [sign * step * pixel for step in (11, 18, 26, 34, 44) for sign in (1, -1)]
    return near + [(dx, dy) for dy in rows for dx in (7 * pixel, -width / 2, -width - 7 * pixel)]


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    across = min(one[2], other[2]) - max(one[0], other[0])
    along = min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, across) * max(0.0, along)
