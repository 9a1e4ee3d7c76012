"""What probes found, as pictures: curves over blocks, spectra, maps of patches, reconstructions, t-SNE."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # no global state, no display
from torch import Tensor

from eval.measure import shown_k
from models.files import written_aside

DPI = 120
TSNE_IMAGES = 1000


def save(path: Path, figure: Figure) -> None:
    """Write a PNG, whole or not at all."""
    with written_aside(path) as aside:
        figure.savefig(aside, format="png", dpi=DPI)


def draw_accuracies(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Accuracy by block, with its 95 % interval: a panel for each probe, a line for each time and pooling."""
    k = shown_k(rows)
    figure = Figure(figsize=(12, 4), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    probes = {f"kNN, k = {k}": lambda row: row["knn"][k], "linear probe": lambda row: row["linear"], "ridge": lambda row: row["ridge"]}
    for axes, (title, found) in zip(panels, probes.items(), strict=True):
        for label, line in _lines(rows):
            shares = [found(row) for row in line]
            blocks = [str(row["block"]) for row in line]
            axes.plot(blocks, [100 * share["value"] for share in shares], marker="o", markersize=3, label=label)
            axes.fill_between(blocks, *([100 * share[end] for share in shares] for end in ("low", "high")), alpha=0.15, linewidth=0)
        _finish(axes, title, "block", "test accuracy in %" if axes is panels[0] else "")
    _legend(panels[-1])
    save(path, figure)


def draw_ranks(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Effective rank and mean norm by block."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    panels = figure.subplots(1, 3)
    kinds = {
        "rank_entropy": "effective rank: entropy (the paper's)",
        "rank_exponential": "effective rank: its exponential",
        "norm": "mean norm of the features",
    }
    for axes, (key, title) in zip(panels, kinds.items(), strict=True):
        for label, line in _lines(rows):
            known = [row for row in line if row[key] is not None]
            axes.plot([str(row["block"]) for row in known], [row[key] for row in known], marker="o", markersize=3, label=label)
        _finish(axes, title, "block", "")
    panels[2].set_yscale("log")
    _legend(panels[-1])
    save(path, figure)


def draw_side_by_side(path: Path, networks: Mapping[str, tuple[Sequence[Mapping[str, Any]], Mapping[str, Any]]]) -> None:
    """Several networks: kNN, linear probe and rank by block, and the spectrum of the best one; a line for each network.

    Args:
        networks: name -> its rows, one for each block, and the best of them.
    """
    k = shown_k(next(iter(networks.values()))[0])
    figure = Figure(figsize=(12, 7), layout="constrained")
    (knn, linear), (rank, spectrum) = figure.subplots(2, 2)
    by_block = {
        knn: (f"kNN, k = {k}: test accuracy in %", lambda row: row["knn"].get(k)),
        linear: ("linear probe: test accuracy in %", lambda row: row["linear"]),
        rank: ("effective rank: entropy (the paper's)", lambda row: row["rank_entropy"]),
    }
    for name, (rows, best) in networks.items():
        for axes, (_, number) in by_block.items():
            numbered = ((row["block"] if isinstance(row["block"], int) else i, number(row)) for i, row in enumerate(rows))
            known = [(block, found) for block, found in numbered if found is not None]
            blocks, found = [block for block, _ in known], [each for _, each in known]
            if axes is not rank:
                axes.fill_between(blocks, *([100 * each[end] for each in found] for end in ("low", "high")), alpha=0.15, linewidth=0)
                found = [100 * each["value"] for each in found]
            axes.plot(blocks, found, marker="o", markersize=3, label=name)
        values = np.array(best["spectrum"] or [np.nan])
        spectrum.plot(np.arange(1, len(values) + 1), values / values[0], label=f"{name}, block {best['block']}")
    for axes, (title, _) in by_block.items():
        axes.xaxis.get_major_locator().set_params(integer=True)
        _finish(axes, title, "block", "")
    spectrum.set(xscale="log", yscale="log", ylim=(1e-5, 1.5))
    _finish(spectrum, "spectrum at the best place", "singular value", "size, the largest = 1")
    _legend(spectrum)
    save(path, figure)


def draw_spectra(path: Path, rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """Singular values of each of some places, the largest as 1."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    rows = [row for row in rows if row["spectrum"]]
    for i, row in enumerate(rows):
        values = np.array(row["spectrum"])
        axes.plot(np.arange(1, len(values) + 1), values / values[0], color=_shade(i, len(rows)), label=f"block {row['block']}")
    axes.set(xscale="log", yscale="log", ylim=(1e-5, 1.5))
    _finish(axes, title, "singular value", "size, the largest = 1")
    _legend(axes)
    save(path, figure)


def draw_cka(path: Path, names: Sequence[str], matrix: np.ndarray, title: str) -> None:
    """Linear CKA of every pair of blocks."""
    figure = Figure(figsize=(5.5, 4.8), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(matrix, vmin=0, vmax=1, cmap="magma", origin="lower")
    axes.set(xticks=range(len(names)), yticks=range(len(names)), xticklabels=names, yticklabels=names, xlabel="block", ylabel="block")
    axes.set_title(title, fontsize=10)
    figure.colorbar(image, label="linear CKA")
    save(path, figure)


def draw_tsne(path: Path, x: Tensor, labels: np.ndarray, class_names: Sequence[str], title: str) -> None:
    """Features (N, D) of test images in the plane, coloured by class; always the same way."""
    from sklearn.manifold import TSNE

    points = TSNE(init="pca", perplexity=min(30, (len(x) - 1) / 3), random_state=0).fit_transform(x.numpy())
    figure = Figure(figsize=(7.5, 6), layout="constrained")
    axes = figure.subplots()
    present = np.unique(labels)
    for i, label in enumerate(present):
        name = class_names[label] if label < len(class_names) else str(label)
        across, up = points[labels == label].T
        axes.scatter(across, up, s=8, linewidths=0, color=_colour(i, len(present)), label=name)
    axes.set(xticks=[], yticks=[])
    _finish(axes, title, "", "")
    if len(present) <= 20:
        axes.legend(frameon=False, fontsize=8, markerscale=2, loc="center left", bbox_to_anchor=(1, 0.5))
    save(path, figure)


def draw_maps(path: Path, images: np.ndarray, tokens: Mapping[str, Tensor], title: str) -> None:
    """Patches coloured by the first three principal components of their tokens, one row a picture, one column a block.

    Args:
        images: uint8 (N, H, W, 3).
        tokens: name of a column -> tokens of the patches (N, T, D), T a square.
    """
    columns = {"": images, **{name: principal_colours(x) for name, x in tokens.items()}}
    _grid(path, columns, title)


def principal_colours(tokens: Tensor) -> np.ndarray:
    """Patches' tokens (N, T, D) -> colours (N, h, w, 3) in [0, 1], T = h * w: their first three principal components over all
    pictures, each stretched between its 2 % and 98 % quantiles."""
    n, t, _ = tokens.shape
    x = tokens.flatten(0, 1).double()
    x = x - x.mean(0)
    _, _, directions = torch.linalg.svd(x, full_matrices=False)
    x = torch.nn.functional.pad(x @ directions[:3].T, (0, max(0, 3 - len(directions))))  # (N * T, 3)
    low, high = torch.quantile(x, torch.tensor([0.02, 0.98], dtype=x.dtype), dim=0)
    x = ((x - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    edge = round(t**0.5)
    return x.view(n, edge, edge, 3).numpy()


def draw_reconstructions(path: Path, images: np.ndarray, masked: np.ndarray, painted: np.ndarray, title: str) -> None:
    """What a masked autoencoder sees, and what it makes of it; uint8 (N, H, W, C) each."""
    _grid(path, {"picture": images, "what it sees": masked, "what it paints": painted}, title)


def _grid(path: Path, columns: Mapping[str, np.ndarray], title: str) -> None:
    rows = len(next(iter(columns.values())))
    figure = Figure(figsize=(1.3 * len(columns), 1.3 * rows + 0.6), layout="constrained")
    panels = figure.subplots(rows, len(columns), squeeze=False)
    for across, (name, pictures) in enumerate(columns.items()):
        for down, picture in enumerate(pictures):
            axes = panels[down][across]
            axes.imshow(picture.squeeze(), cmap="gray" if picture.shape[-1] == 1 else None, interpolation="nearest")
            axes.set_axis_off()
        panels[0][across].set_title(name, fontsize=9)
    figure.suptitle(title, fontsize=10)
    save(path, figure)


def _lines(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """Rows that differ in their block only, with a label."""
    lines: dict[str, list[Mapping[str, Any]]] = {}
    several_times = len({row["time"] for row in rows}) > 1
    for row in rows:
        label = row["pooling"] if row["time"] is None else f"t = {row['time']:g}" + (f", {row['pooling']}" if not several_times else "")
        lines.setdefault(label, []).append(row)
    return list(lines.items())


def _finish(axes: Axes, title: str, xlabel: str, ylabel: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)


def _shade(i: int, n: int) -> Any:
    import matplotlib

    return matplotlib.colormaps["viridis"](i / max(1, n - 1) * 0.9)


def _colour(i: int, n: int) -> Any:
    import matplotlib

    return matplotlib.colormaps["tab20" if n <= 20 else "hsv"](i if n <= 20 else i / n)
