"""The widgets of a comparison: settings that all share, and for each checkpoint those of its own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import gradio as gr

from app.catalog import Card, card_if_whole, cards_of, label_index, shared_classes, variants
from app.guard import toast
from app.render import SAMPLERS, SIDES
from app.settings import MAX_IMAGES, MAX_SIDES, MAX_STEPS, NO_LABEL, OWN, RANDOM_SEED, Comparison, Settings, Side
from app.site import AS_SENT, LATEST, Site, Updates, Values, page_errors

FEWEST = 2  # sides that are always there


@dataclass(frozen=True, eq=False)
class SideWidgets:
    """What belongs to one side; `own` are its own settings by name, in `group`, which is seen where `override` is on."""

    letter: str
    box: gr.Column
    checkpoint: gr.Dropdown
    override: gr.Checkbox
    group: gr.Group
    own: dict[str, gr.components.Component]


class SettingsPanel:
    """Widgets, and the way from them to a `Comparison` and back.

    Sides that are empty come after the others, so that each has the letter that it is drawn with.
    """

    def __init__(self, site: Site, first: Comparison | None) -> None:
        self.site = site
        # the shared label that was chosen last: the widget falls back to none where checkpoints share none
        self.wanted = gr.State(_in_widget(first.shared.label) if first else None)
        shown = [side.checkpoint for side in first.sides][:FEWEST] if first else []
        chosen = [*shown, *shown[-1:] * (FEWEST - len(shown))]  # the only one twice
        names = self.known()
        with gr.Row(elem_id="checkpoints"):
            self.sides = [_side(letter, names, name) for letter, name in zip_longest(SIDES[:MAX_SIDES], chosen)]
        with gr.Row():
            self.add = gr.Button("Add a checkpoint", size="sm", elem_id="add-checkpoint")
            self.remove = gr.Button(size="sm", visible=False, elem_id="remove-checkpoint")
        with gr.Row(elem_id="settings"):
            self.shared = _widgets("", labels_of(cards_of(shown, site.runs)), first.shared if first else None)
        self.shared["label"].input(lambda label: label, self.shared["label"], self.wanted, **LATEST)
        # what follows a side that came, went, or got settings of its own
        self.after_buttons = [
            self.add.click(self._add, {*self.checkpoints}, self.outputs, **AS_SENT).success,
            self.remove.click(self._remove, {*self.checkpoints}, self.outputs, **AS_SENT).success,
        ]
        shared = [self.shared[name] for name in OWN]
        for side in self.sides:
            begun = side.override.input(
                lambda values, side=side: self._begin_own(side, values),
                {side.override, side.checkpoint, *shared},
                [side.group, *side.own.values()],
                **LATEST,
            )
            self.after_buttons.append(begun.success)  # another checkpoint may have been chosen meanwhile

    @property
    def checkpoints(self) -> list[gr.Dropdown]:
        return [side.checkpoint for side in self.sides]

    @property
    def labels(self) -> list[gr.components.Component]:
        return [self.shared["label"], *(side.own["label"] for side in self.sides)]

    @property
    def inputs(self) -> list[gr.components.Component]:
        """What `read` reads."""
        own = (each for side in self.sides for each in (side.checkpoint, side.override, *side.own.values()))
        return [*self.shared.values(), *own]

    @property
    def choices(self) -> list[gr.components.Component]:
        """What `cards` and `label_updates` read."""
        return [*self.checkpoints, *(side.override for side in self.sides), self.wanted, *self.labels]

    @property
    def outputs(self) -> list[Any]:
        """What `fill` fills."""
        return [*self.inputs, *(each for side in self.sides for each in (side.box, side.group)), self.remove, self.wanted]

    def known(self) -> list[str]:
        """Names that can be chosen."""
        return list(variants(self.site.runs))

    def when_chosen(self, *handler: Any, **how: Any) -> None:
        """Attach a handler to the visitor's own choices of checkpoints, and to what follows from them; not to those of `fill`."""
        gr.on([each.input for each in self.checkpoints], *handler, **how)
        for follows in self.after_buttons:
            follows(*handler, **how)

    def read(self, values: Values) -> Comparison:
        """The comparison that the widgets ask for.

        Raises:
            ValueError: values out of range, or no checkpoint.
        """
        chosen = [side for side in self.sides if values[side.checkpoint]]
        if not chosen:
            raise ValueError("there is no checkpoint to sample; choose one, or train it first")
        for side in self.sides[: len(chosen)]:
            if side not in chosen:  # the later ones would be drawn with other letters
                raise ValueError(f"checkpoint {side.letter} is empty; choose one there")
        sides = (Side(values[side.checkpoint], _read(side.own, values) if values[side.override] else {}) for side in chosen)
        return Comparison(Settings(**_read(self.shared, values)), tuple(sides))

    def fill(self, comparison: Comparison) -> Updates:
        """For `outputs`: they show a comparison. What is not here any more, or damaged, is told and left out; others move up."""
        known = variants(self.site.runs)
        asked = dict.fromkeys(side.checkpoint for side in comparison.sides)
        whole = {name: card for name in asked if (card := card_if_whole(name, known))}
        for name in asked:
            if name not in whole:
                gr.Warning(toast(f"{name} is {'damaged' if name in known else 'not here any more'}, so it is left out."))
        there = [side for side in comparison.sides if side.checkpoint in whole]
        sharing = [whole[side.checkpoint] for side in there if "label" not in side.own]
        updates = {**_filled(self.shared, comparison.shared, sharing), self.wanted: _in_widget(comparison.shared.label)}
        for widgets, side in zip_longest(self.sides, there):
            own = bool(side and side.own)
            updates |= {
                widgets.checkpoint: gr.update(choices=list(known), value=side.checkpoint if side else None),
                widgets.override: own,
                widgets.group: gr.update(visible=own),
                **_filled(widgets.own, comparison.of(side) if side else comparison.shared, [whole[side.checkpoint]] if side else []),
            }
        return updates | self._shown(len(there))

    def cards(self, values: Values) -> dict[str, Card]:
        """Letter -> card of what is chosen.

        Raises:
            ValueError: one is not here any more, or damaged.
        """
        names = {side.letter: values[side.checkpoint] for side in self.sides if values[side.checkpoint]}
        return dict(zip(names, cards_of(names.values(), self.site.runs), strict=True))

    def label_updates(self, cards: Mapping[str, Card], values: Values) -> Updates:
        """For `labels`, after other checkpoints were chosen, or got settings of their own; see `cards` and `choices`."""
        sharing = [cards[side.letter] for side in self.sides if side.letter in cards and not values[side.override]]
        if len(sharing) > 1 and all(each.class_names for each in sharing) and not shared_classes(*sharing):
            gr.Info(toast(f"{' and '.join(dict.fromkeys(each.name for each in sharing))} share no label, so they are drawn without one."))
        updates = {self.shared["label"]: relabel(sharing, values[self.shared["label"]], values[self.wanted])}
        for side in self.sides:
            alone = [cards[side.letter]] if side.letter in cards else []
            updates[side.own["label"]] = relabel(alone, values[side.own["label"]])
        return updates

    def _begin_own(self, side: SideWidgets, values: Values) -> Updates:
        """Show the settings of a side, which begin as those of all, or hide them."""
        name = values[side.checkpoint]
        with page_errors():
            alone = cards_of([name] if name else [], self.site.runs)
        begun = {side.own[name]: values[self.shared[name]] for name in OWN}
        label = relabel(alone, None, values[self.shared["label"]])
        return {**begun, side.own["label"]: label, side.group: gr.update(visible=values[side.override])}

    def _add(self, values: Values) -> Updates:
        """Show one more side, with a checkpoint that is not shown yet and has a label in common with those that are, if they have one."""
        names = [values[each] for each in self.checkpoints]
        free = next((side for side in self.sides if not values[side.checkpoint]), None)
        if free is None:
            raise gr.Error(f"A comparison shows up to {MAX_SIDES} checkpoints.", print_exception=False)
        known = variants(self.site.runs)
        with page_errors():
            there = cards_of(filter(None, names), self.site.runs)

        def suits(name: str) -> bool:
            new = None if name in names else card_if_whole(name, known)
            return new is not None and (not shared_classes(*there) or bool(shared_classes(*there, new)))

        new = next(filter(suits, known), None)
        if new is None and there:
            new = there[0].name
            said = f"All checkpoints with these labels are shown already, so {free.letter} is {new} once more: give it settings of its own."
            gr.Info(toast(said))
        return {free.checkpoint: gr.update(choices=list(known), value=new), **self._shown(self.sides.index(free) + 1)}

    def _remove(self, values: Values) -> Updates:
        """Take the last side away: those before it keep their letters."""
        number = max(FEWEST, sum(bool(values[each]) for each in self.checkpoints) - 1)
        last = self.sides[number]
        return {last.checkpoint: None, last.override: False, last.group: gr.update(visible=False), **self._shown(number)}

    def _shown(self, number: int) -> Updates:
        """So many sides are seen, and a button to take the last of them away."""
        number = max(FEWEST, number)
        boxes = {side.box: gr.update(visible=side in self.sides[:number]) for side in self.sides}
        return {**boxes, self.remove: gr.update(value=f"Remove {SIDES[number - 1]}", visible=number > FEWEST)}


def _side(letter: str, names: list[str], chosen: str | None) -> SideWidgets:
    with gr.Column(min_width=230, visible=letter in SIDES[:FEWEST], elem_classes="side-settings") as box:
        checkpoint = gr.Dropdown(names, value=chosen, label=f"Checkpoint {letter}", elem_id=f"checkpoint-{letter.lower()}")
        override = gr.Checkbox(
            False, label=f"Own settings for {letter}", container=False, elem_id=f"own-{letter.lower()}", elem_classes="quiet"
        )
        with gr.Group(visible=False) as group:
            gr.HTML('<p class="protocol note">These stay as they are when the shared ones below change.</p>')
            own = _widgets(f" of {letter}", labels_of([]))
    return SideWidgets(letter, box, checkpoint, override, group, own)


def _read(widgets: Mapping[str, Any], values: Values) -> dict[str, Any]:
    """Settings by name."""
    return {name: from_widget(values[widget]) for name, widget in widgets.items()}


def _filled(widgets: Mapping[str, Any], settings: Settings, chosen: Sequence[Card]) -> Updates:
    """For the widgets of settings; the label is one that the chosen checkpoints know."""
    updates = {widget: getattr(settings, name) for name, widget in widgets.items()}
    return {**updates, widgets["label"]: label_update(labels_of(chosen), settings.label, chosen)}


def _widgets(whose: str, labels: list[str], values: Settings | None = None) -> dict[str, gr.components.Component]:
    """One widget for each setting, by its name; a side has no number of images of its own."""
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
