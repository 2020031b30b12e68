"""Places names beside points without overlaps: each name takes the nearest position that is still free."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.transforms import Bbox

# All lengths are in points (1/72 inch).
_DISTANCES = (6, 10, 15, 21, 28, 36, 46, 58, 72, 90, 110, 135)  # from the data point
# In degrees, without straight up and down, where intervals are drawn.
_ANGLES = (15, -15, 165, -165, 45, -45, 135, -135, 75, -75, 105, -105)
_NEAR = 11  # a name farther away gets a line to its point
_RADIUS, _BAR = 4, 1  # half the width of a data point and of its interval


class Named(NamedTuple):
    """A named point in the units of the axes, and the ends of its interval."""

    name: str
    x: float
    y: float
    low: float
    high: float


class _Offset(NamedTuple):
    """Offsets from the point: of a name's lower left corner, and of the end of its line."""

    corner: tuple[float, float]
    end: tuple[float, float]


def place(ax: Axes, points: Sequence[Named], bold: str | None = None) -> None:
    """Names the points in a figure that was drawn. A later change of resolution does not move anything."""
    per_pixel = 72 / ax.figure.dpi
    inside = _scaled(ax.bbox, per_pixel)
    legend = ax.get_legend()
    taken = [_scaled(artist.get_window_extent(), per_pixel) for artist in (*ax.texts, *([legend] if legend else []))]
    taken += [box for point in points for box in _obstacles(ax, point, per_pixel)]
    for point in points:
        text = ax.annotate(
            *(point.name, (point.x, point.y), (0, 0)),
            textcoords="offset points",
            fontsize=7.5,
            fontweight="bold" if point.name == bold else "normal",
            bbox={"boxstyle": "square,pad=0.05", "facecolor": "white", "edgecolor": "none", "alpha": 0.75},
            zorder=2.5,  # under the points, over the lines
        )
        size, at = _scaled(text.get_window_extent(), per_pixel), _at(ax, point.x, point.y, per_pixel)
        offset, box = _nearest(at, size.width + 2, size.height, taken, inside)
        text.set_position(offset.corner)
        taken.append(box)
        if math.hypot(*offset.end) > _NEAR:
            line = {"arrowstyle": "-", "color": "#8a8a8a", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3}
            ax.annotate("", (point.x, point.y), offset.end, textcoords="offset points", arrowprops=line, zorder=1.5)


def _nearest(
    at: tuple[float, float], width: float, height: float, taken: Sequence[Bbox], inside: Bbox
) -> tuple[_Offset, Bbox]:
    """Returns the nearest free position, or the nearest of all if none is free."""
    places = [(offset, _box(at, offset.corner, width, height)) for offset in _offsets(width, height)]
    return next((place for place in places if _free(place[1], taken, inside)), places[0])


def _obstacles(ax: Axes, point: Named, per_pixel: float) -> Iterator[Bbox]:
    from matplotlib.transforms import Bbox

    yield _box(_at(ax, point.x, point.y, per_pixel), (-_RADIUS, -_RADIUS), 2 * _RADIUS, 2 * _RADIUS)
    (x, low), (_, high) = (_at(ax, point.x, end, per_pixel) for end in (point.low, point.high))
    yield Bbox.from_extents(x - _BAR, low, x + _BAR, high)


def _offsets(width: float, height: float) -> Iterator[_Offset]:
    """Yields possible offsets, the nearest first."""
    for distance in _DISTANCES:
        for angle in map(math.radians, _ANGLES):
            x, y = distance * math.cos(angle), distance * math.sin(angle)
            yield _Offset((x if x > 0 else x - width, y - height / 2), (x, y))


def _at(ax: Axes, x: float, y: float, per_pixel: float) -> tuple[float, float]:
    right, up = ax.transData.transform((x, y))
    return right * per_pixel, up * per_pixel


def _scaled(box: Bbox, per_pixel: float) -> Bbox:
    from matplotlib.transforms import Bbox

    return Bbox(box.get_points() * per_pixel)


def _box(at: tuple[float, float], offset: tuple[float, float], width: float, height: float) -> Bbox:
    from matplotlib.transforms import Bbox

    return Bbox.from_bounds(at[0] + offset[0], at[1] + offset[1], width, height)


def _free(box: Bbox, taken: Sequence[Bbox], inside: Bbox) -> bool:
    fits = inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1
    return fits and not any(box.overlaps(other) for other in taken)
