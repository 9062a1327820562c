"""Numbers -> inline SVG without a script: curves, points and bars, through `templates/chart.html.jinja`.

Colours are the page's (classes s0 to s5 of `templates/report.css`), so that charts follow its light and dark themes.
Hovering shows the values at a step: every step has an invisible band that reveals its own marks.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from smolvlm_exp.reporting.html import render
from smolvlm_exp.utils.formatting import number, percent

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 460, 232
LEFT, RIGHT, TOP, BOTTOM = 56, WIDTH - 14, 20, HEIGHT - 34
MAX_POINTS = 120  # of a line: it needs no more at this width, and a page of many charts stays small
MANY = 6  # of more lines each has fewer points, and hovering shows their values without their dots
COLOURS = 6  # beyond it colours come again, dashed
OUTLIERS = 10.0  # so many times the spread of the middle 90 % away from them a value is off the scale
LARGEST = 1e100  # a value beyond it has diverged: drawing it would flatten everything else


@dataclass(frozen=True)
class Axis:
    """Values -> pixels."""

    ticks: Sequence[float]
    low: float
    high: float
    start: float  # pixels
    end: float

    def __call__(self, value: float) -> float:
        """At its end for a value beyond it."""
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)


@dataclass(frozen=True, eq=False)
class Line:
    name: str
    style: str  # of report.css
    points: Points


@dataclass(frozen=True)
class Chart:
    """What the template draws."""

    title: str
    spoken: str  # for screen readers
    height: int = HEIGHT
    x: Axis | None = None
    y: Axis | None = None
    x_label: str = ""
    show: Callable[[float], str] = number  # writes a y value
    legend: Sequence[tuple[str, str]] = ()  # style, name
    lost: int = 0  # points that are not finite
    beyond: int = 0  # points that are off the scale
    reference: tuple[str, float] | None = None
    lines: Sequence[Line] = ()
    bands: Sequence[dict[str, Any]] = ()
    dots: Sequence[tuple[float, float, str, bool]] = ()
    bars: Sequence[tuple[str, float]] = ()

    def draw(self) -> str:
        return render("chart.html.jinja", chart=self, width=WIDTH, left=LEFT, right=RIGHT, top=TOP, bottom=BOTTOM)


def line_chart(
    series: Mapping[str, Points],
    title: str,
    *,
    x_label: str = "step",
    show: Callable[[float], str] = number,
    bounds: tuple[float, float] | None = None,
    zero: bool = False,
    reference: tuple[str, float] | None = None,
    alike: Mapping[str, str] | None = None,
    legend: bool = True,
) -> str:
    """One figure: title, legend, axes, a line per series. Returns "" where there is nothing to draw.

    Args:
        series: name -> (x, y) points; points that are not finite are counted in a note instead.
        show: writes a y value.
        bounds: fixes the y axis (an accuracy: (0, 1)).
        zero: the y axis starts at zero at the latest.
        reference: a dashed horizontal line and its name.
        alike: series -> what it is one of; those have one colour, and one place in the legend. With the same `alike`
            the colours are the same in all charts.
        legend: whether the chart has its own.
    """
    finite = {name: sorted(point for point in points if abs(point[1]) < LARGEST) for name, points in series.items()}
    kinds = {name: (alike or {}).get(name, name) for name, points in finite.items() if points or alike}
    styles = chart_styles(kinds)
    most = max(8, MAX_POINTS * MANY // max(len(finite), MANY))
    lines = [Line(name, styles[name], thin(points, most)) for name, points in finite.items() if points]
    if not lines:
        return ""
    shown = {kinds[line.name]: line.style for line in lines}
    values = [y for line in lines for _, y in line.points]
    if not bounds:
        values = within_scale(values)
    named = [reference[1]] if reference and not bounds else []
    x_axis, y_axis = (
        step_axis([x for line in lines for x, _ in line.points]),
        axis(bounds or values + named, BOTTOM, TOP, zero),
    )
    return Chart(
        title,
        "; ".join(describe(line, x_label, show) for line in lines),
        x=x_axis,
        y=y_axis,
        x_label=x_label,
        show=show,
        legend=[(style, kind) for kind, style in shown.items()] if legend else (),
        lost=sum(map(len, series.values())) - sum(map(len, finite.values())),
        beyond=sum(not y_axis.low <= y <= y_axis.high for points in finite.values() for _, y in points),
        reference=reference,
        lines=lines,
        bands=hover_bands(lines, x_axis, x_label, show),
    ).draw()


def chart_styles(kinds: Mapping[str, str]) -> dict[str, str]:
    """Series -> the class of its colour, by what it is one of."""
    order = {kind: i for i, kind in enumerate(dict.fromkeys(kinds.values()))}
    return {name: f"s{order[kind] % COLOURS}{' dashed' * (order[kind] >= COLOURS)}" for name, kind in kinds.items()}


def within_scale(values: Sequence[float]) -> list[float]:
    """Without the few that would flatten all others."""
    ordered = sorted(values)
    few = len(ordered) // 20
    low, high = ordered[few], ordered[-1 - few]
    reach = OUTLIERS * (high - low) or math.inf
    return [value for value in ordered if low - reach <= value <= high + reach]


def scatter_chart(
    points: Sequence[tuple[float, float, str, bool]], title: str, *, x_label: str, show: Callable[[float], str]
) -> str:
    """One figure with a point per run; hovering tells which. Returns "" where there is nothing to draw.

    Args:
        points: (x, y, what it is, whether it is filled), all finite.
        show: writes a y value.
    """
    if not points:
        return ""
    xs, ys = [x for x, *_ in points], [y for _, y, *_ in points]
    return Chart(
        title,
        f"{len(points)} runs, from {show(min(ys))} to {show(max(ys))}",
        x=axis(xs, LEFT + 6, RIGHT - 6),
        y=axis(ys, BOTTOM, TOP),
        x_label=x_label,
        show=show,
        dots=sorted(points, key=lambda point: point[3]),  # the filled ones on top
    ).draw()


def bar_chart(shares: Mapping[str, float], title: str) -> str:
    """One figure: a bar per name, for shares of 1, the longest first."""
    bars = sorted(shares.items(), key=lambda item: -item[1])
    spoken = ", ".join(f"{name} {percent(share)}" for name, share in bars)
    return Chart(title, spoken, height=TOP + 26 * len(bars), bars=bars).draw()


def ticks(low: float, high: float, count: int = 4, whole: bool = False) -> list[float]:
    """Round numbers that enclose low to high, about `count` of them; whole numbers alone if `whole`."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * 0.999)
    if whole:
        step = max(1.0, math.ceil(step))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def step_axis(xs: Sequence[float]) -> Axis:
    low, high = min(xs), max(xs)
    if 0 < low <= 0.1 * high:
        low = 0  # training starts at zero, even where the log starts a little later
    if low == high:
        low, high = low - 1, high + 1
    within = [t for t in ticks(low, high, 5, whole=True) if low <= t <= high]
    return Axis(within, low, high, LEFT + 6, RIGHT - 6)


def axis(values: Sequence[float], start: float, end: float, zero: bool = False) -> Axis:
    """From tick to tick around the values, and around zero if `zero`; never empty."""
    shown = [*values, 0.0] if zero else values
    low, high = min(shown), max(shown)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        pad = abs(high) * 0.1 or 1.0
        low, high = low - pad, high + pad
    marks = ticks(low, high)
    return Axis(marks, marks[0], marks[-1], start, end)


def thin(points: Points, most: int = MAX_POINTS) -> Points:
    """At most so many; of every stretch its lowest and its highest stay, so that no spike is lost."""
    if len(points) <= most:
        return points
    buckets = most // 2 - 1
    chosen = {points[0], points[-1]}
    for i in range(buckets):
        bucket = points[i * len(points) // buckets : (i + 1) * len(points) // buckets]
        chosen |= {min(bucket, key=lambda p: p[1]), max(bucket, key=lambda p: p[1])}
    return sorted(chosen)


def hover_bands(
    lines: Sequence[Line], x_axis: Axis, x_label: str, show: Callable[[float], str]
) -> list[dict[str, Any]]:
    """A band per step, reaching halfway to its neighbours, with the values there; of many steps some share one."""
    at: dict[float, dict[Line, float]] = {}
    for line in lines:
        for x, y in line.points:
            at.setdefault(x, {})[line] = y
    xs = sorted(at)
    shared = -(-len(xs) // MAX_POINTS) or 1
    groups = [xs[i : i + shared] for i in range(0, len(xs), shared)]
    edges = [LEFT, *(round((x_axis(a[-1]) + x_axis(b[0])) / 2, 1) for a, b in pairwise(groups)), RIGHT]
    bands = []
    for group, (left, right) in zip(groups, pairwise(edges), strict=True):
        last = {line: (x, y) for x in group for line, y in at[x].items()}
        values = [f"{line.name} {show(y)}" if len(lines) > 1 else show(y) for line, (_, y) in last.items()]
        span = number(group[0]) if len(group) == 1 else f"{number(group[0])} to {number(group[-1])}"
        bands.append(
            {
                "left": left,
                "width": round(right - left, 1),
                "at": x_axis(group[-1]),
                "marks": [(line.style, x, y) for line, (x, y) in last.items()] if len(lines) <= MANY else [],
                "text": "  ·  ".join([f"{x_label} {span}", *values[:3]]),
                "all": "\n".join(values) if len(values) > 3 else "",  # a chart's first line holds three
            }
        )
    return bands


def describe(line: Line, x_label: str, show: Callable[[float], str]) -> str:
    (x0, y0), (x1, y1) = line.points[0], line.points[-1]
    return f"{line.name} from {show(y0)} at {x_label} {number(x0)} to {show(y1)} at {x_label} {number(x1)}"
