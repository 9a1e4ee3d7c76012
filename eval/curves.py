"""Curves of what `training.campaign` measured: over images seen, over time, and block by block."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from eval.measure import best_row, shown_k

Result = Mapping[str, Any]


@dataclass(frozen=True)
class Panel:
    """A panel of a figure.

    Attributes:
        label: of its axis.
        value: of a line of the log, or of a row of the probe; None where it was not asked for.
        log: whether the axis is logarithmic.
    """

    label: str
    value: Callable[[Result], float | None]
    log: bool = False


FD = Panel("FD (Lite0) of a quick look", lambda line: line.get("fd"))
RMS: Panel = Panel("largest RMS of a block", lambda line: max(line.get("block_norms") or [math.nan]), log=True)
KNN = Panel("kNN of a quick look, %", lambda line: percent(line.get("probe_knn")))
LINEAR = Panel("linear probe of a quick look, %", lambda line: percent(line.get("probe_linear")))
CURVES = (
    Panel("loss", lambda line: line["loss"]),
    FD,
    KNN,
    LINEAR,
    Panel("rank of the bottleneck (entropy)", lambda line: line.get("effective_rank")),
    RMS,
)
MINUTES = "minutes of training, at the fastest run's speed"
BY_BLOCK = (
    Panel("kNN, %", lambda row: percent(neighbours(row))),
    Panel("linear probe, %", lambda row: percent(row["linear"]["value"])),
    Panel("effective rank (entropy)", lambda row: row["rank_entropy"]),
    Panel("mean norm of the features", lambda row: row["norm"], log=True),
)


def percent(share: float | None) -> float | None:
    """None stays None."""
    return None if share is None else 100 * share


def best(result: Result) -> Result:
    """The place that was chosen on held-out training images."""
    return best_row(result["probe"]["results"])


def neighbours(row: Result) -> float:
    """Accuracy of weighted neighbours, of the number of them that is shown."""
    return row["knn"][shown_k([row])]["value"]


def unbroken(arms: Mapping[str, Mapping[int, Result]]) -> dict[str, Mapping[int, Result]]:
    """The arms of which no training broke down: means of the seeds that are left would flatter the others."""
    return {arm: of_seeds for arm, of_seeds in arms.items() if not any("broke" in result for result in of_seeds.values())}


def points(result: Result, panel: Panel) -> list[tuple[int, float]]:
    """(images seen, value) of a curve, where it has a finite one."""
    found = [(line["images"], panel.value(line)) for line in result["curves"]]
    return [(images, value) for images, value in found if value is not None and math.isfinite(value)]


def images_a_minute(result: Result) -> float:
    """Of the training, in the median over its log: other work on the machine, or a pause, counts little. NaN without a log."""
    return 60 * median([line["images_per_s"] for line in result["curves"]] or [math.nan])


COSTS = ("backbone", "size", "depth", "resolution", "patch_size", "images_a_step", "precision", "compile")


def network(result: Result) -> tuple[Any, ...]:
    """What tells how long a step takes, to a few percent."""
    return tuple(result["config"].get(name) or None for name in COSTS)


def fastest(results: Iterable[Result]) -> dict[tuple[Any, ...], float]:
    """network -> images a minute of the run that had most of its machine to itself."""
    speeds: dict[tuple[Any, ...], float] = {}
    for result in results:
        speeds[network(result)] = np.fmax(speeds.get(network(result), math.nan), images_a_minute(result))
    return speeds


def curves(arms: Mapping[str, Mapping[int, Result]]) -> Figure | None:
    """Over images seen, and over training time: a colour for each arm, a line for each seed. None where nothing was logged.

    A panel shows what all runs have looked at, but for those that broke down before that. Networks of several costs get panels over
    time of their own; else that is another scale of the same curves.
    """
    runs = [result for of_seeds in (unbroken(arms) or arms).values() for result in of_seeds.values()]
    shown = [panel for panel in CURVES if all(points(result, panel) for result in runs)]
    if not shown:
        return None
    speeds = fastest(result for of_seeds in arms.values() for result in of_seeds.values())
    columns = min(2, len(speeds))
    figure = Figure(figsize=(5.5 * columns + 1.5 * (columns == 1), 3 * len(shown)), layout="constrained")
    for row, panel in zip(figure.subplots(len(shown), columns, squeeze=False), shown, strict=True):
        for style, result in _styled(arms):
            images, values = zip(*points(result, panel) or [(0, math.nan)], strict=True)
            row[0].plot(images, values, **style)
            if columns == 2:
                row[1].plot([each / speeds[network(result)] for each in images], values, **style)
        for axes, below in zip(row, ("images seen", MINUTES), strict=False):
            _finish(axes, below, panel)
        row[0].xaxis.set_major_formatter(EngFormatter())
        if columns == 1:
            _minutes_above(row[0], *speeds.values())
    _legend(figure)
    return figure


def by_block(arms: Mapping[str, Mapping[int, Result]]) -> tuple[Figure, str]:
    """The probe by block, of the mean of all tokens at one time for all: a colour for each arm, a line for each seed.

    Returns:
        The figure, and in words where that is.
    """
    time = best(next(iter(next(iter(arms.values())).values())))["time"]
    figure = Figure(figsize=(11, 6), layout="constrained")
    for axes, panel in zip(figure.subplots(2, 2).flat, BY_BLOCK, strict=True):
        for style, result in _styled(arms):
            rows = [row for row in result["probe"]["results"] if (row["time"], row["pooling"]) == (time, "mean")]
            known = [(row["block"], value) for row in rows if (value := panel.value(row)) is not None]
            axes.plot([block for block, _ in known], [value for _, value in known], marker="o", markersize=3, **style)
        axes.xaxis.get_major_locator().set_params(integer=True)
        _finish(axes, "block", panel)
    _legend(figure)
    return figure, "by block, of the mean of all tokens" + (f" at t = {time:g}" if time is not None else "")


def _styled(arms: Mapping[str, Mapping[int, Result]]) -> Iterator[tuple[dict[str, Any], Result]]:
    """Every run with how it is drawn; the first of an arm has its name."""
    for i, (arm, of_seeds) in enumerate(arms.items()):
        for j, result in enumerate(of_seeds.values()):
            yield {"color": f"C{i}", "linewidth": 1.2, "label": arm if j == 0 else None}, result


def _finish(axes: Axes, below: str, panel: Panel) -> None:
    axes.set(xlabel=below, ylabel=panel.label, yscale="log" if panel.log else "linear")
    axes.spines[["top", "right"]].set_visible(False)


def _minutes_above(axes: Axes, images_a_minute: float) -> None:
    functions = (lambda images: images / images_a_minute, lambda minutes: minutes * images_a_minute)
    axes.secondary_xaxis("top", functions=functions).set_xlabel(MINUTES)


def _legend(figure: Figure) -> None:
    """One for all panels, above them, where it hides no curve."""
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
