"""The widgets of a comparison: settings that all share, and for each checkpoint those of its own."""

from collections.abc import Sequence
from typing import Any

import gradio as gr

from app.catalog import Card, card, label_index, shared_classes, variants
from app.guard import toast
from app.render import SAMPLERS, SIDES
from app.settings import MAX_IMAGES, MAX_SIDES, MAX_STEPS, NO_LABEL, OWN, RANDOM_SEED, SETTINGS, Comparison, Settings, Side
from app.site import AS_SENT, AT_ONCE, LATEST, Site, page_errors

FEWEST = 2  # sides that are always there


class SettingsPanel:
    """Widgets, and the way from them to a `Comparison` and back.

    `inputs` are their values, in an order that `read` knows; `outputs` what `fill` gives updates for.
    """

    def __init__(self, site: Site, first: Comparison | None) -> None:
        self.site = site
        # the shared label that was chosen last: the widget falls back to none where checkpoints share none
        self.wanted = gr.State(_in_widget(first.shared.label) if first else None)
        self.boxes: list[gr.Column] = []
        self.checkpoints: list[gr.Dropdown] = []
        self.overrides: list[gr.Checkbox] = []
        self.groups: list[gr.Group] = []
        self.own: list[dict[str, gr.components.Component]] = []
        self.after_buttons: list[Any] = []  # what follows a side that came, went, or got settings of its own
        names = self.known()
        with gr.Row(elem_id="checkpoints"):
            for i, letter in enumerate(SIDES[:MAX_SIDES]):
                chosen = first.sides[min(i, len(first.sides) - 1)].checkpoint if first and i < FEWEST else None
                with gr.Column(min_width=230, visible=i < FEWEST, elem_classes="side-settings") as box:
                    self.checkpoints.append(
                        gr.Dropdown(names, value=chosen, label=f"Checkpoint {letter}", elem_id=f"checkpoint-{letter.lower()}")
                    )
                    override = gr.Checkbox(
                        False, label=f"Own settings for {letter}", container=False, elem_id=f"own-{letter.lower()}", elem_classes="quiet"
                    )
                    with gr.Group(visible=False) as group:
                        gr.HTML('<p class="protocol note">These stay as they are when the shared ones below change.</p>')
                        self.own.append(_widgets(f" of {letter}", labels_of([])))
                    if i >= FEWEST:
                        gone = gr.Button(f"Remove {letter}", size="sm")
                        removed = gone.click(
                            lambda: (gr.update(visible=False), None, False, gr.update(visible=False)),
                            None,
                            [box, self.checkpoints[i], override, group],
                            **AT_ONCE,
                        )
                        self.after_buttons.append(removed.then)
                    self.boxes.append(box)
                self.overrides.append(override)
                self.groups.append(group)
        self.add = gr.Button("Add a checkpoint", size="sm", elem_id="add-checkpoint")
        with gr.Row(elem_id="settings"):
            classes = labels_of([card(side.checkpoint, site.runs) for side in first.sides] if first else [])
            self.shared = _widgets("", classes, first.shared if first else None)
        self.shared["label"].input(lambda label: label, self.shared["label"], self.wanted, **LATEST)
        shared = [self.shared[name] for name in OWN]
        for name, on, group, own in zip(self.checkpoints, self.overrides, self.groups, self.own, strict=True):
            begun = on.input(self._begin_own, [on, name, *shared], [group, *own.values()], **LATEST)
            self.after_buttons.append(begun.success)  # another checkpoint may have been chosen meanwhile
        added = self.add.click(self._add, self.checkpoints, [*self.boxes, *self.checkpoints], **AS_SENT)
        self.after_buttons.append(added.success)

    @property
    def inputs(self) -> list[gr.components.Component]:
        sides = zip(self.checkpoints, self.overrides, self.own, strict=True)
        return [*self.shared.values(), *(each for name, on, own in sides for each in (name, on, *own.values()))]

    @property
    def outputs(self) -> list[Any]:
        return [*self.inputs, *self.boxes, *self.groups, self.wanted]

    def known(self) -> list[str]:
        """Names that can be chosen."""
        return list(variants(self.site.runs))

    def when_chosen(self, *handler: Any, **how: Any) -> None:
        """Attach a handler to the visitor's own choices of checkpoints, and to what follows from them; not to those of `fill`."""
        gr.on([each.input for each in self.checkpoints], *handler, **how)
        for follows in self.after_buttons:
            follows(*handler, **how)

    def read(self, values: Sequence[Any]) -> Comparison:
        """The comparison that the widgets ask for.

        Raises:
            ValueError: values out of range, or no checkpoint.
        """
        values = list(values)
        shared = dict(zip(SETTINGS, map(from_widget, values), strict=False))
        sides = []
        for start in range(len(SETTINGS), len(values), 2 + len(OWN)):
            name, overrides, *own = values[start : start + 2 + len(OWN)]
            if name:
                sides.append(Side(name, dict(zip(OWN, map(from_widget, own), strict=True)) if overrides else {}))
        if not sides:
            raise ValueError("there is no checkpoint to sample; train one first")
        return Comparison(Settings(**shared), tuple(sides))

    def fill(self, comparison: Comparison) -> list[Any]:
        """Updates for `outputs` that show a comparison; the side of what is not here any more is left empty, and told."""
        names = self.known()
        sides = [side if side.checkpoint in names else None for side in comparison.sides]
        for letter, side, asked in zip(SIDES, sides, comparison.sides, strict=False):
            if side is None:
                gr.Warning(toast(f"{asked.checkpoint} is not here any more, so {letter} is empty."))
        sharing = [card(side.checkpoint, self.site.runs) for side in sides if side and "label" not in side.own]
        updates = [label_update(labels_of(sharing), comparison.shared.label, sharing), *list(vars(comparison.shared).values())[1:]]
        sides += [None] * (MAX_SIDES - len(sides))
        for side in sides:
            own = vars(comparison.of(side) if side else comparison.shared)
            alone = [card(side.checkpoint, self.site.runs)] if side else []
            updates += [gr.update(choices=names, value=side.checkpoint if side else None), bool(side and side.own)]
            updates += [label_update(labels_of(alone), own["label"], alone), *(own[name] for name in OWN[1:])]
        updates += [gr.update(visible=i < max(FEWEST, len(comparison.sides))) for i in range(MAX_SIDES)]
        updates += [gr.update(visible=bool(side and side.own)) for side in sides]
        return [*updates, _in_widget(comparison.shared.label)]

    @property
    def choices(self) -> list[Any]:
        """What `label_updates` reads."""
        return [*self.checkpoints, *self.overrides, self.wanted, *self.labels]

    def label_updates(self, values: Sequence[Any]) -> list[Any]:
        """For `labels`, after other checkpoints were chosen, or got settings of their own.

        Args:
            values: of `choices`.
        """
        names, overrides = values[:MAX_SIDES], values[MAX_SIDES : 2 * MAX_SIDES]
        wanted, label, *own_labels = values[2 * MAX_SIDES :]
        chosen = [card(name, self.site.runs) if name else None for name in names]
        sharing = [each for each, overridden in zip(chosen, overrides, strict=True) if each and not overridden]
        if len(sharing) > 1 and all(each.class_names for each in sharing) and not shared_classes(*sharing):
            gr.Info(toast(f"{' and '.join(dict.fromkeys(each.name for each in sharing))} share no label, so they are drawn without one."))
        updates = [relabel(sharing, label, wanted)]
        for each, own in zip(chosen, own_labels, strict=True):
            updates.append(relabel([each] if each else [], own))
        return updates

    @property
    def labels(self) -> list[gr.components.Component]:
        return [self.shared["label"], *(own["label"] for own in self.own)]

    def _begin_own(self, on: bool, name: str | None, label: Any, *values: Any) -> tuple[Any, ...]:
        """Show the settings of a side, which begin as those of all, or hide them."""
        with page_errors():
            alone = [card(name, self.site.runs)] if name else []
        return gr.update(visible=on), relabel(alone, None, label), *values

    def _add(self, *names: str | None) -> list[Any]:
        """Show one more side, with a checkpoint that is not shown yet and has a label in common with those that are, if they have one."""
        free = next((i for i, name in enumerate(names) if not name), None)
        if free is None:
            raise gr.Error(f"A comparison shows up to {MAX_SIDES} checkpoints.", print_exception=False)
        known = self.known()
        with page_errors():
            there = [card(name, self.site.runs) for name in names if name]
        new = next((name for name in known if name not in names and (not shared_classes(*there) or self._shares(name, there))), None)
        if new is None and known:
            new = there[0].name if there else known[0]
            words = (
                f"All checkpoints with these labels are shown already, so {SIDES[free]} is {new} once more: give it settings of its own."
            )
            gr.Info(toast(words))
        updates: list[Any] = [gr.skip()] * (2 * MAX_SIDES)
        updates[free], updates[MAX_SIDES + free] = gr.update(visible=True), gr.update(choices=known, value=new)
        return updates

    def _shares(self, name: str, there: Sequence[Card]) -> bool:
        try:
            return bool(shared_classes(*there, card(name, self.site.runs)))
        except ValueError:  # a damaged one
            return False


def _widgets(whose: str, labels: list[str], values: Settings | None = None) -> dict[str, gr.components.Component]:
    """One widget for each setting, in the order of `SETTINGS`; a side has no number of images of its own."""
    values = values or Settings(seed=0)
    kind = f"{whose[-1].lower()}-" if whose else ""
    shape = dict(min_width=130, scale=2)
    made = {
        "label": gr.Dropdown(
            labels,
            value=_in_widget(values.label),
            label=f"Label{whose}",
            min_width=190,
            scale=3,
            elem_id=f"{kind}label",
        ),
        "seed": gr.Number(
            values.seed, label=f"Seed{whose}" + ("" if whose else f" ({RANDOM_SEED}: random)"), elem_id=f"{kind}seed", **shape
        ),
    }
    if not whose:
        made["num_images"] = gr.Slider(1, MAX_IMAGES, values.num_images, step=1, label="Images", buttons=[], elem_id="num-images", **shape)
    made["steps"] = gr.Slider(1, MAX_STEPS, values.steps, step=1, label=f"Steps{whose}", buttons=[], elem_id=f"{kind}steps", **shape)
    made["guidance_scale"] = gr.Slider(
        0, 10, values.guidance_scale, step=0.1, label=f"Guidance{whose}", buttons=[], elem_id=f"{kind}guidance", **shape
    )
    samplers = [(words, name) for name, words in SAMPLERS.items()]
    made["sampler"] = gr.Dropdown(
        samplers, value=values.sampler, label=f"Sampler{whose}", filterable=False, elem_id=f"{kind}sampler", **shape
    )
    return made


def from_widget(value: Any) -> Any:
    """A setting from the value of its widget."""
    return None if value == NO_LABEL else value


def _in_widget(label: str | int | None) -> str | int:
    return NO_LABEL if label is None else label


def labels_of(chosen: Sequence[Card]) -> list[str]:
    """No label, then the classes that all of them know."""
    return [NO_LABEL, *shared_classes(*chosen)]


def label_update(choices: list[str], label: str | int | None, chosen: Sequence[Card]) -> Any:
    """A label by its name; none where it is not known to all."""
    if label is not None and label not in choices and chosen:
        try:
            label = chosen[0].class_names[label_index(chosen[0], label)]  # a number, maybe as a text: programs may give one
        except (ValueError, IndexError):
            label = None
    return gr.update(choices=choices, value=label if label in choices else NO_LABEL)


def relabel(chosen: Sequence[Card], label: Any, wanted: Any = None) -> Any:
    """For a label widget after other checkpoints were chosen: the label that is wanted, or else the first one that all of them know.

    A label that stays is not sent: a newer choice would snap back.

    Args:
        label: that the widget has.
        wanted: that the visitor chose last, if any; the widget may have fallen back to none since, where checkpoints shared none.
    """
    choices = labels_of(chosen)
    wanted = wanted or label
    best = wanted if wanted in choices else choices[min(1, len(choices) - 1)]
    return gr.update(choices=choices) if label == best else gr.update(choices=choices, value=best)
