"""Charts as SVG: axes, points, lines. Colours are classes, for the page's style to fill in."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from html import escape

Point = tuple[float, float]
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring", "bar")
"""Marks of series, so that colours are not all that tells them apart."""

_LETTER, _LINE = 7.0, 15.0
_MOST_TICKS = 6
_LEAST_LOG = 1e-9


def compact(value: float) -> str:
    """A number as SVG wants it, in few letters."""
    found = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if found == "-0" else found


def linear_ticks(low: float, high: float, most: int = _MOST_TICKS) -> list[float]:
    """Round numbers between two others, ascending.

    Example:
        >>> linear_ticks(0.0, 1.0)
        [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    span = high - low
    if span <= 0:
        return [low]
    rough = span / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * one for one in (1, 2, 5, 10) if power * one >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    count = math.floor(high / step + 1e-9) - first + 1
    return [round((first + n) * step, 12) for n in range(max(0, min(count, 3 * most)))]


def log_ticks(low: float, high: float, most: int = _MOST_TICKS) -> list[float]:
    """Ones, twos and fives of powers of ten between two numbers above zero, ascending.

    Example:
        >>> log_ticks(900.0, 6000.0)
        [1000.0, 2000.0, 5000.0]
    """
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for parts in ((1, 2, 5), (1, 3), (1,)):
        found = [part * 10.0**power for power in powers for part in parts]
        found = [one for one in found if low * (1 - 1e-9) <= one <= high * (1 + 1e-9)]
        if len(found) <= most:
            break
    found = found[:: max(1, math.ceil(len(found) / most))]
    return found if len(found) > 2 else linear_ticks(low, high, most)


@dataclasses.dataclass(frozen=True)
class Axis:
    """Numbers from `low` to `high` on a line from `start` to `end`, in pixels."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False
    most: float | None = None

    @classmethod
    def over(cls, values: Iterable[float], start: float, end: float, log: bool = False) -> Axis:
        """The axis on which values have some room on both sides."""
        found = [max(one, _LEAST_LOG) if log else one for one in values] or [1.0 if log else 0.0]
        low, high = min(found), max(found)
        if log:
            spread = max(high / low, 1.2) ** 0.08
            return cls(low / spread, high * spread, start, end, True)
        margin = 0.06 * (high - low) or 0.05 * abs(high) or 0.5
        return cls(low - margin, high + margin, start, end)

    def at(self, value: float) -> float:
        """Where a number is, in pixels."""
        low, high = self.low, self.high
        if self.log:
            value, low, high = (math.log(max(one, _LEAST_LOG)) for one in (value, low, high))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    @property
    def ticks(self) -> list[float]:
        """Round numbers on it."""
        found = (log_ticks if self.log else linear_ticks)(self.low, self.high)
        return [one for one in found if self.most is None or one <= self.most]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Frame:
    """A chart's axes and place.

    Attributes:
        x_name: What is to the right.
        y_name: What is up.
        x_text: Writes a number of the x axis, as `y_text` does of the y axis.
    """

    x: Axis
    y: Axis
    x_name: str
    y_name: str
    x_text: Callable[[float], str]
    y_text: Callable[[float], str]
    width: float
    height: float

    def svg(self, title: str, parts: Sequence[str]) -> str:
        """The chart with what was drawn on it."""
        x, y = self.x, self.y
        left, right, bottom, top = x.start, x.end, y.start, y.end
        drawn = [f'<title>{escape(title)}</title><g class="axis">']
        for value in y.ticks:
            place = compact(y.at(value))
            drawn.append(f'<path class="grid" d="M{compact(left)} {place}H{compact(right)}"/>')
            drawn.append(_words(left - 7, y.at(value) + 4, self.y_text(value), "end"))
        for value in x.ticks:
            drawn.append(
                f'<path class="tick" d="M{compact(x.at(value))} {compact(bottom)}v4"/>'
                + _words(x.at(value), bottom + 18, self.x_text(value), "middle")
            )
        drawn.append(
            f'<path class="base" d="M{compact(left)} {compact(bottom)}H{compact(right)}"/>'
        )
        drawn.append(_words((left + right) / 2, self.height - 4, self.x_name, "middle", "name"))
        drawn.append(_words(0, top - 12, self.y_name, "start", "name"))
        drawn.append("</g>")
        return svg(self.width, self.height, [*drawn, *parts], title)


def frame(
    points: Sequence[Point],
    *,
    x_name: str,
    y_name: str,
    x_text: Callable[[float], str],
    y_text: Callable[[float], str],
    width: float = 470,
    height: float = 300,
    x_log: bool = False,
    y_log: bool = False,
    y_most: float | None = None,
) -> Frame:
    """Axes that all points have room on; of the y axis no tick is above `y_most`."""
    ys = Axis.over([y for _, y in points], height - 42, 28, y_log)
    ys = dataclasses.replace(ys, most=y_most)
    widest = max(len(y_text(value)) for value in ys.ticks or [0.0])
    left = 12 + _LETTER * widest
    xs = Axis.over([x for x, _ in points], left, width - 14, x_log)
    return Frame(
        x=xs,
        y=ys,
        x_name=x_name,
        y_name=y_name,
        x_text=x_text,
        y_text=y_text,
        width=width,
        height=height,
    )


def svg(width: float, height: float, parts: Iterable[str], label: str, kind: str = "chart") -> str:
    """A drawing that is as wide as there is room, and no wider than it was made."""
    return (
        f'<svg class="{kind}" viewBox="0 0 {compact(width)} {compact(height)}" role="img" '
        f'aria-label="{escape(label)}" style="max-width:{compact(width)}px">{"".join(parts)}</svg>'
    )


def _words(x: float, y: float, words: str, anchor: str, kind: str = "") -> str:
    given = f' class="{kind}"' if kind else ""
    return (
        f'<text{given} x="{compact(x)}" y="{compact(y)}" text-anchor="{anchor}">'
        f"{escape(words)}</text>"
    )


def mark(x: float, y: float, shape: str, kind: str, title: str = "", size: float = 4.0) -> str:
    """A point; what it is is shown where a pointer rests on it."""
    told = f"<title>{escape(title)}</title>" if title else ""
    s = size
    if shape in ("circle", "ring"):
        hollow = " hollow" if shape == "ring" else ""
        place = f'cx="{compact(x)}" cy="{compact(y)}" r="{compact(s)}"'
        return f'<circle class="{kind}{hollow}" {place}>{told}</circle>'
    t = 1.2 * s
    moves = {
        "square": f"m{-s} {-s}h{2 * s}v{2 * s}h{-2 * s}z",
        "triangle": f"m0 {-t}l{t} {2 * s}h{-2 * t}z",
        "diamond": f"m0 {-t}l{t} {t}l{-t} {t}l{-t} {-t}z",
        "cross": f"m{-s} {-s}l{2 * s} {2 * s}m0 {-2 * s}l{-2 * s} {2 * s}",
        "bar": f"m{-s} {-s / 2}h{2 * s}v{s}h{-2 * s}z",
    }
    stroked = " stroked" if shape == "cross" else ""
    place = f"M{compact(x)} {compact(y)}{moves[shape]}"
    return f'<path class="{kind}{stroked}" d="{place}">{told}</path>'


def line(points: Sequence[Point], kind: str, *, steps: bool = False) -> str:
    """A line through points in pixels, straight or in steps."""
    if not points:
        return ""
    parts = [f"M{compact(points[0][0])} {compact(points[0][1])}"]
    for x, y in points[1:]:
        to = f"H{compact(x)}V{compact(y)}" if steps else f"L{compact(x)} {compact(y)}"
        parts.append(to)
    return f'<path class="line {kind}" d="{"".join(parts)}"/>'


def labelled(points: Sequence[tuple[float, float, str]], chart: Frame, gap: float = 9) -> list[str]:
    """Short texts beside points in pixels, where they hide neither points nor each other."""
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y, _ in points]
    drawn = []
    for x, y, words in points:
        wide = _LETTER * len(words)
        places = [
            (dx * (gap + wide / 2) if dx else 0.0, dy * gap * 1.35)
            for dx, dy in ((0, -1), (1, 0), (0, 1), (-1, 0), (1, -1), (1, 1), (-1, -1), (-1, 1))
        ]
        places += [(2 * dx, 2 * dy) for dx, dy in places]

        def box(place: Point, x: float = x, y: float = y, wide: float = wide) -> tuple[float, ...]:
            left, top = x + place[0] - wide / 2, y + place[1] - _LINE / 2
            return left, top, left + wide, top + _LINE

        def cost(place: Point, of: Callable[[Point], tuple[float, ...]] = box) -> int:
            a = of(place)
            outside = (
                a[0] < chart.x.start or a[2] > chart.width or a[1] < 16 or a[3] > chart.y.start
            )
            hits = sum(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for b in taken)
            return hits + 3 * outside

        best = min(places, key=cost)
        taken.append(box(best))  # type: ignore[arg-type]
        drawn.append(_words(x + best[0], y + best[1] + 4.5, words, "middle", "label"))
    return drawn
