"""Curves as SVG: no scripts, colours from the page's style sheet, readable in light and dark."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 400, 190
LEFT, RIGHT, TOP, BOTTOM = 66, 10, 10, 26  # left of it the longest tick, -0.000123, fits
TICKS = 4


@dataclass(frozen=True)
class Line:
    """A curve; points that are None or not finite are left out.

    Attributes:
        name: for the legend; "" for none.
        x, y: of the points.
        colour: number of the colour; curves of one thing share it.
        faint: one of many that belong together.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    colour: int = 0
    faint: bool = False

    @property
    def points(self) -> list[tuple[float, float]]:
        return [(x, y) for x, y in zip(self.x, self.y, strict=True) if y is not None and math.isfinite(y)]


def plot(lines: Sequence[Line], title: str, x_title: str, logarithmic: bool = False, low: float | None = None) -> str:
    """A figure with axes and a legend; "" if there is not a point.

    Args:
        logarithmic: of the vertical axis; points that are not positive are left out then.
        low: where the vertical axis begins, instead of at the least value.
    """
    drawn = [(line, [(x, y) for x, y in line.points if y > 0 or not logarithmic]) for line in lines]
    drawn = [(line, points) for line, points in drawn if points]
    if not drawn:
        return ""
    xs, ys = ([point[axis] for _, points in drawn for point in points] for axis in (0, 1))
    scale = math.log10 if logarithmic else float
    x0, x1 = _spread(min(xs), max(xs))
    y0, y1 = _spread(scale(min(ys) if low is None else low), scale(max(ys)))

    def place(x: float, y: float) -> str:
        right, down = (x - x0) / (x1 - x0), 1 - (scale(y) - y0) / (y1 - y0)
        return f"{LEFT + right * (WIDTH - LEFT - RIGHT):.1f},{TOP + down * (HEIGHT - TOP - BOTTOM):.1f}"

    parts = []
    for i in range(TICKS):
        share = i / (TICKS - 1)
        y = HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)
        value = y0 + share * (y1 - y0)
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_tick(10**value if logarithmic else value)}</text>')
    anchors = ("start", "middle", "middle", "end")
    ticks = [(x0 + i / (TICKS - 1) * (x1 - x0), anchors[i]) for i in range(TICKS)] if min(xs) < max(xs) else [(xs[0], "middle")]
    for value, anchor in ticks:
        value = round(value) if all(x == int(x) for x in xs) and x1 - x0 >= TICKS - 1 else value  # blocks and steps have no halves
        x = LEFT + (value - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 10}" text-anchor="{anchor}">{_tick(value)}</text>')
    for line, points in drawn:
        style = f"curve c{line.colour}" + " faint" * line.faint
        if len(points) == 1:
            right, down = place(*points[0]).split(",")
            parts.append(f'<circle class="{style}" cx="{right}" cy="{down}" r="3"/>')
        else:
            parts.append(f'<polyline class="{style}" points="{" ".join(place(*point) for point in points)}"/>')
    told = [(line, points) for line, points in drawn if line.name]
    legend = "".join(f'<li><span class="key c{line.colour}"></span>{text(line.name)}</li>' for line, _ in told)
    ends = "; ".join(f"{line.name} ends at {points[-1][1]:.4g}" for line, points in told)
    return (
        f'<figure class="plot"><figcaption>{text(title)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{text(f"{title} by {x_title}: {ends}")}">{"".join(parts)}</svg>'
        f'<div class="below"><ul>{legend}</ul><span>{text(x_title)}</span></div></figure>'
    )


def _spread(low: float, high: float) -> tuple[float, float]:
    """Ends of an axis that are not one place."""
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _tick(value: float) -> str:
    if abs(value) >= 10_000:
        return f"{value / 1000:.4g}k"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def text(value: object) -> str:
    """As HTML shows it."""
    # braces too: Gradio's HTML component fills templates
    return html.escape(str(value)).replace("{", "&#123;").replace("}", "&#125;").replace("$", "&#36;")
