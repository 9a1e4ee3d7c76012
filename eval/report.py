"""Runs -> one page of HTML with pictures and curves, everything inside the file."""

import base64
import html
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from models.files import written_aside
from training.monitor import read_metrics

ENLARGE = 3
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 960px; margin: 40px auto; padding: 0 20px; color: #1e293b; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2em; }
table { border-collapse: collapse; } th, td { padding: 6px 16px 6px 0; text-align: left; border-bottom: 1px solid #e2e8f0; }
img { max-width: 100%; image-rendering: pixelated; } figure { margin: 12px 0; } figcaption, .protocol { color: #64748b; font-size: .9rem; }
.warning { padding: 12px 16px; border-left: 4px solid #6366f1; background: #eef2ff; }
"""


@dataclass(frozen=True)
class Section:
    """A heading, and HTML below it."""

    title: str
    body: str


def write_report(path: Path, title: str, warning: str, sections: Sequence[Section]) -> None:
    """Write the page, whole or not at all."""
    parts = [f"<h2>{html.escape(section.title)}</h2>{section.body}" for section in sections]
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    page = f'{head}<h1>{html.escape(title)}</h1><p class="warning">{html.escape(warning)}</p>{"".join(parts)}</html>\n'
    with written_aside(path) as aside:
        aside.write_text(page, encoding="utf-8")


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One row a dict; the keys of the first are the columns."""
    head = "".join(f"<th>{html.escape(str(column))}</th>" for column in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(value))}</td>" for value in row.values()) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def as_text(rows: Sequence[dict[str, str]]) -> str:
    """A table in plain text; columns that are empty are left out."""
    columns = [column for column in rows[0] if any(row[column] for row in rows)]
    widths = {column: max(len(column), *(len(row[column]) for row in rows)) for column in columns}
    lines = [{column: column for column in columns}, *rows]
    return "\n".join("  ".join(line[column].ljust(widths[column]) for column in columns).rstrip() for line in lines)


def paragraph(text: str) -> str:
    """Small print: protocols."""
    return f'<p class="protocol">{html.escape(text)}</p>'


def strip(images: np.ndarray, caption: str) -> str:
    """uint8 (N, H, W, 3) side by side, enlarged by a whole number."""
    row = np.concatenate(list(images), axis=1).repeat(ENLARGE, 0).repeat(ENLARGE, 1)
    file = io.BytesIO()
    Image.fromarray(row).save(file, format="png")
    return _figure(file.getvalue(), caption)


def loss_curves(runs: dict[str, Path], caption: str) -> str:
    """Loss over images seen, one line a run."""
    return _curves(runs, lambda line: line["loss"], "loss", caption)


def norm_curves(runs: dict[str, Path], caption: str) -> str:
    """Root mean square of the last block's output over images seen."""
    return _curves(runs, lambda line: line["block_norms"][-1], "RMS of the last block", caption)


def rank_curves(runs: dict[str, Path], caption: str) -> str:
    """Effective rank of the bottleneck over images seen."""
    return _curves(runs, lambda line: line["effective_rank"], "entropy of the singular values", caption)


def probe_curves(runs: dict[str, Path], caption: str, key: str = "probe_knn") -> str:
    """An accuracy of --probe_every over images seen; nothing if no run has any.

    Args:
        key: of the log, `probe_knn` or `probe_linear`.
    """
    probed = {name: run for name, run in runs.items() if any(key in line for line in read_metrics(run))}
    return _curves(probed, lambda line: line.get(key), "share", caption) if probed else ""


def _curves(runs: dict[str, Path], value: Callable[[dict[str, Any]], float | None], label: str, caption: str) -> str:
    """One line a run; lines of the log without a value are left out."""
    from matplotlib.figure import Figure  # no global state, no display

    figure = Figure(figsize=(8, 3), layout="constrained")
    axes = figure.subplots()
    for name, run in runs.items():
        points = [(line["images"], value(line)) for line in read_metrics(run)]
        points = [point for point in points if point[1] is not None]
        axes.plot(*zip(*points, strict=True) if points else ([], []), label=name)
    axes.set(xlabel="images seen", ylabel=label)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    return _figure(file.getvalue(), caption)


def _figure(png: bytes, caption: str) -> str:
    image = f'<img alt="{html.escape(caption)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
    return f"<figure>{image}<figcaption>{html.escape(caption)}</figcaption></figure>"
