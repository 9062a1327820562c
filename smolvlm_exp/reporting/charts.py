"""Numbers -> inline SVG: `line_chart` draws curves that need no script, `number` and `percent` write values for people.

Colours come from the page (`templates/report.css`: classes s0 to s5), so that a chart follows the page's light and dark
themes. Hovering shows the values at a step: every step has an invisible band that reveals its own marks.
"""

import html
import math
from collections.abc import Callable, Mapping, Sequence

from smolvlm_exp.utils.formatting import number, percent

Points = Sequence[tuple[float, float]]
Scale = Callable[[float], float]

WIDTH, HEIGHT = 460, 232
LEFT, RIGHT, TOP, BOTTOM = 50, 14, 20, 34
MAX_POINTS = 200  # more than a chart of this width can show
COLOURS = 6  # beyond it colours come again, dashed
LARGEST = 1e100  # a value beyond it has diverged: drawing it would flatten everything else


def ticks(low: float, high: float, count: int = 4, whole: bool = False) -> list[float]:
    """Round numbers that enclose low to high, about `count` of them; whole numbers alone if `whole`."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * 0.999)
    if whole:
        step = max(1.0, math.ceil(step))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def thin(points: Points, limit: int = MAX_POINTS) -> list[tuple[float, float]]:
    """At most `limit` points; of every stretch its lowest and its highest stay, so that no spike is lost."""
    if len(points) <= limit:
        return list(points)
    kept: list[tuple[float, float]] = []
    buckets = max(1, limit // 2 - 1)
    for i in range(buckets):
        bucket = points[i * len(points) // buckets : (i + 1) * len(points) // buckets]
        kept += {min(bucket, key=lambda p: p[1]), max(bucket, key=lambda p: p[1])}
    return sorted({*kept, points[0], points[-1]})


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
) -> str:
    """One figure: title, legend, axes, a line a series. Returns "" where there is nothing to draw.

    Args:
        series: name -> (x, y) points; points that are not finite are counted in a note instead.
        show: writes a y value.
        bounds: fixes the y axis (an accuracy: (0, 1)).
        zero: the y axis starts at zero at the latest.
        reference: a dashed horizontal line and its name.
        alike: series -> what it is one of; those have one colour, and one place in the legend.
    """
    drawable = {name: _drawable(points) for name, points in series.items()}
    lost = sum(len(points) for points in series.values()) - sum(len(points) for points in drawable.values())
    clean = {name: thin(points) for name, points in drawable.items() if points}
    if not clean:
        return ""
    xs = [x for points in clean.values() for x, _ in points]
    ys = [y for points in clean.values() for _, y in points]
    if reference and not bounds:
        ys.append(reference[1])
    y_ticks = ticks(*(bounds or _spread(min(ys), max(ys), zero)))
    x_low, x_high = min(xs), max(xs)
    if 0 < x_low <= 0.1 * x_high:
        x_low = 0  # training starts at zero, even where the log starts a little later
    if x_low == x_high:
        x_low, x_high = x_low - 1, x_high + 1
    x_ticks = [t for t in ticks(x_low, x_high, 5, whole=True) if x_low <= t <= x_high]

    def px(x: float) -> float:
        return LEFT + 6 + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT - 12)

    def py(y: float) -> float:
        share = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return TOP + (1 - share) * (HEIGHT - TOP - BOTTOM)

    body = [_axes(x_ticks, y_ticks, px, py, x_label, show)]
    if reference:
        y = py(reference[1])
        body.append(f'<line class="reference" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        name = html.escape(reference[0])
        body.append(f'<text class="note" x="{WIDTH - RIGHT - 2}" y="{y - 5:.1f}" text-anchor="end">{name}</text>')
    kinds = {name: (alike or {}).get(name, name) for name in clean}
    names = list(dict.fromkeys(kinds.values()))
    colours = {name: names.index(kind) for name, kind in kinds.items()}
    body += [_line(points, colours[name], px, py) for name, points in clean.items()]
    body.append(_hover(clean, colours, px, py, x_label, show))
    label = html.escape(f"{title}: {'; '.join(_spoken(n, p, x_label, show) for n, p in clean.items())}")
    return (
        f'<figure class="chart"><figcaption><span class="title">{html.escape(title)}</span>'
        f"{_lost(lost)}{_legend(names)}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(body)}</svg></figure>'
    )


def scatter_chart(
    points: Sequence[tuple[float, float, str, bool]],
    title: str,
    *,
    x_label: str,
    show: Callable[[float], str] = number,
) -> str:
    """One figure with a point a run; hovering tells which. Returns "" where there is nothing to draw.

    Args:
        points: (x, y, what it is, whether it is filled), all finite.
        show: writes a y value.
    """
    if not points:
        return ""
    xs, ys = [x for x, *_ in points], [y for _, y, *_ in points]
    x_ticks, y_ticks = (ticks(*_spread(min(values), max(values), zero=False)) for values in (xs, ys))

    def px(x: float) -> float:
        return LEFT + 6 + (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]) * (WIDTH - LEFT - RIGHT - 12)

    def py(y: float) -> float:
        return TOP + (1 - (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])) * (HEIGHT - TOP - BOTTOM)

    dots = "".join(
        f'<circle class="{"dot s0" if filled else "line s5"}" cx="{px(x):.1f}" cy="{py(y):.1f}" r="4.4">'
        f"<title>{html.escape(f'{name}: {show(y)} at {number(x)}')}</title></circle>"
        for x, y, name, filled in sorted(points, key=lambda point: point[3])  # the filled ones on top
    )
    label = html.escape(f"{title}: {len(points)} runs, from {show(min(ys))} to {show(max(ys))}")
    return (
        f'<figure class="chart"><figcaption><span class="title">{html.escape(title)}</span></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
        f"{_axes(x_ticks, y_ticks, px, py, x_label, show)}{dots}</svg></figure>"
    )


def bar_chart(shares: Mapping[str, float], title: str) -> str:
    """One figure: a bar a name, for shares of 1, the longest first."""
    step, left = 26, 190
    bars = []
    for i, (name, share) in enumerate(sorted(shares.items(), key=lambda item: -item[1])):
        y, length = TOP + i * step, share * (WIDTH - left - 60)
        line = f'x1="{left}" x2="{left + length:.1f}" y1="{y}" y2="{y}"'
        bars.append(
            f'<text x="{left - 10}" y="{y + 4}" text-anchor="end">{html.escape(name)}</text>'
            f'<line class="s0" stroke="var(--c)" stroke-width="12" {line}/>'
            f'<text x="{left + length + 8:.1f}" y="{y + 4}">{percent(share)}</text>'
        )
    spoken = html.escape(f"{title}: {', '.join(f'{name} {percent(share)}' for name, share in shares.items())}")
    return (
        f'<figure class="chart"><figcaption><span class="title">{html.escape(title)}</span></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {TOP + len(shares) * step}" role="img" aria-label="{spoken}">'
        f"{''.join(bars)}</svg></figure>"
    )


def _drawable(points: Points) -> list[tuple[float, float]]:
    return sorted((x, y) for x, y in points if math.isfinite(x) and abs(y) < LARGEST)


def _spread(low: float, high: float, zero: bool) -> tuple[float, float]:
    """The y range, never empty."""
    if zero:
        low, high = min(0.0, low), max(0.0, high)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        pad = abs(high) * 0.1 or 1.0
        low, high = low - pad, high + pad
    return low, high


def _style(i: int) -> str:
    return f"s{i % COLOURS}" + (" dashed" if i >= COLOURS else "")


def _axes(
    x_ticks: list[float], y_ticks: list[float], px: Scale, py: Scale, x_label: str, show: Callable[[float], str]
) -> str:
    out = []
    floor = HEIGHT - BOTTOM
    for i, t in enumerate(y_ticks):
        kind = "axis" if i == 0 else "grid"
        out.append(f'<line class="{kind}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py(t):.1f}" y2="{py(t):.1f}"/>')
        out.append(f'<text x="{LEFT - 8}" y="{py(t) + 4:.1f}" text-anchor="end">{show(t)}</text>')
    for t in x_ticks:
        out.append(f'<line class="axis" x1="{px(t):.1f}" x2="{px(t):.1f}" y1="{floor}" y2="{floor + 4}"/>')
        out.append(f'<text x="{px(t):.1f}" y="{floor + 17}" text-anchor="middle">{number(t)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    out.append(f'<text class="note" x="{middle}" y="{HEIGHT - 3}" text-anchor="middle">{html.escape(x_label)}</text>')
    return "".join(out)


def _line(points: Points, i: int, px: Scale, py: Scale) -> str:
    path = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in points)
    out = f'<polyline class="line {_style(i)}" points="{path}"/>' if len(points) > 1 else ""
    if len(points) <= 12:  # few points: show where they are
        out += "".join(
            f'<circle class="dot {_style(i)}" cx="{px(x):.1f}" cy="{py(y):.1f}" r="2.6"/>' for x, y in points
        )
    return out


def _hover(
    series: Mapping[str, Points],
    colours: Mapping[str, int],
    px: Scale,
    py: Scale,
    x_label: str,
    show: Callable[[float], str],
) -> str:
    """A band a step, reaching halfway to its neighbours."""
    at: dict[float, list[tuple[int, str, float]]] = {}
    for name, points in series.items():
        for x, y in points:
            at.setdefault(x, []).append((colours[name], name, y))
    xs = sorted(at)
    out = []
    for k, x in enumerate(xs):
        left = (px(xs[k - 1]) + px(x)) / 2 if k else LEFT
        right = (px(x) + px(xs[k + 1])) / 2 if k + 1 < len(xs) else WIDTH - RIGHT
        values = [f"{name} {show(y)}" for _, name, y in at[x]]
        head = f"{x_label} {number(x)}"
        marks = "".join(
            f'<circle class="dot {_style(i)}" cx="{px(x):.1f}" cy="{py(y):.1f}" r="3.2"/>' for i, _, y in at[x]
        )
        spoken = [head, *values] if len(series) > 1 else [head, show(at[x][0][2])]
        readout = html.escape("  ·  ".join(spoken[:4]))
        box = f'x="{left:.1f}" y="{TOP}" width="{right - left:.1f}" height="{HEIGHT - TOP - BOTTOM}"'
        out.append(
            f'<g class="at"><rect {box}/><g class="marks">'
            f'<line class="cross" x1="{px(x):.1f}" x2="{px(x):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>{marks}'
            f'<text class="readout" x="{WIDTH - RIGHT}" y="11" text-anchor="end">{readout}</text></g></g>'
        )
    return "".join(out)


def _lost(count: int) -> str:
    return f'<span class="lost">{count:,} not finite</span>' if count else ""


def _legend(names: Sequence[str]) -> str:
    if len(names) < 2:
        return ""
    items = "".join(f'<li class="{_style(i)}">{html.escape(name)}</li>' for i, name in enumerate(names))
    return f'<ul class="legend">{items}</ul>'


def _spoken(name: str, points: Points, x_label: str, show: Callable[[float], str]) -> str:
    (x0, y0), (x1, y1) = points[0], points[-1]
    return f"{name} from {show(y0)} at {x_label} {number(x0)} to {show(y1)} at {x_label} {number(x1)}"
