"""A list of labels beside lists of checkpoints: it follows them, and returns to what the visitor chose last."""

from collections.abc import Sequence
from typing import Any

import gradio as gr

from app.catalog import cards_of
from app.settings_panel import labels_of, relabel
from app.site import LATEST, Site, page_errors


def label_list(site: Site, names: Sequence[str], *checkpoints: gr.Dropdown, **how: Any) -> gr.Dropdown:
    """The widget, and what it does.

    Args:
        names: of the checkpoints that are chosen at first.
        checkpoints: the lists, of one checkpoint each or of several.
        how: looks of the widget.
    """
    classes = labels_of(cards_of(names, site.runs))
    label = gr.Dropdown(classes, value=classes[min(1, len(classes) - 1)], **how)
    wanted = gr.State(label.value)  # see `relabel`

    def follow(label: str, wanted: str, *chosen: str | list[str] | None) -> Any:
        names = [name for each in chosen for name in (each if isinstance(each, list) else [each]) if name]
        with page_errors():
            return relabel(cards_of(names, site.runs), label, wanted)

    label.input(lambda label: label, label, wanted, **LATEST)
    gr.on([each.input for each in checkpoints], follow, [label, wanted, *checkpoints], label, **LATEST)
    return label
