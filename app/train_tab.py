"""Train: start a run or a pair, watch it, stop, go on, put away."""

import contextlib
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from app import render
from app.catalog import checkpoints
from app.job_files import TRAINING
from app.job_flags import ALL_PRESETS, advice, choices
from app.jobs import Jobs, Status
from app.site import AS_SENT, AT_ONCE, LATEST, QUIET, Site, clears, page_errors
from app.train_view import details_of, overview_of, place_of, possible, time_words, title_of

REFRESH_S = 2.0
FIRST_PRESET = "demo-decayed"
NO_PRESET, AS_PRESET = "no preset", "as it comes"
YES_NO = {AS_PRESET: None, "on": True, "off": False}
DELETE = "Delete"
PRESETS_OWN, NOTHING = ("as the preset", ""), ("nothing", "")
# fields of the form -> the training scripts' flags; what is left empty is the preset's, or the script's own
NUMBERS = {
    "resolution": "Resolution (px)",
    "patch_size": "Patch (px)",
    "alpha_min": "alpha_min",
    "max_train_steps": "Steps",
    "max_train_minutes": "or minutes",
    "train_batch_size": "Batch",
    "learning_rate": "Learning rate",
    "seed": "Seed",
}
FIELDS = {
    **{flag: label.removesuffix(" (px)").removeprefix("or ").capitalize() for flag, label in NUMBERS.items() if flag != "alpha_min"},
    **{"alpha_min": "alpha_min", "preset": "Preset", "dataset_name": "Images", "train_data_dir": "Images", "backbone": "Backbone"},
    **{"size": "Size", "long_skips": "Long skips", "init_from": "Begin with weights of"},
    "reference": "Against",  # of the form under Judge
}


def train_tab(site: Site, jobs: Jobs, page: gr.Blocks, tab: gr.Tab) -> gr.Timer:
    """The widgets of the tab, and what they do; returns what looks at the runs again and again."""
    with gr.Accordion("A new training", open=True):
        with gr.Row():
            name = gr.Textbox(label="Name of the run", placeholder="my-first", max_length=64, min_width=180, elem_id="run-name")
            presets = [(NO_PRESET, ""), *((key, key) for key in ALL_PRESETS)]
            about = ALL_PRESETS[FIRST_PRESET].about
            preset = gr.Dropdown(presets, value=FIRST_PRESET, label=FIELDS["preset"], info=about, scale=3, min_width=240, elem_id="preset")
            pair = gr.Checkbox(False, label="A pair: plain and decayed, everything else equal", min_width=220, elem_id="pair")
        with gr.Row():
            words = "openmoji, a folder, or a name of the hub"
            data = gr.Textbox(label=FIELDS["dataset_name"], placeholder=words, max_length=500, scale=2, min_width=220, elem_id="data")
            backbone = gr.Dropdown([PRESETS_OWN], value="", label=FIELDS["backbone"], min_width=110, elem_id="backbone")
            size = gr.Dropdown([PRESETS_OWN], value="", label=FIELDS["size"], min_width=90, elem_id="size")
            skips = gr.Dropdown(list(YES_NO), value=AS_PRESET, label=FIELDS["long_skips"], min_width=120, elem_id="long-skips")
            begin = gr.Dropdown([NOTHING], value="", label=FIELDS["init_from"], min_width=200, elem_id="init-from")
        with gr.Row():
            # texts: an empty field is the preset's value, which stands in it in grey
            numbers = {
                flag: gr.Textbox(
                    label=label, placeholder=_preset_value(FIRST_PRESET, flag), max_length=20, min_width=95, elem_id=f"flag-{flag}"
                )
                for flag, label in NUMBERS.items()
            }
        advised = gr.HTML(render.message(""), elem_id="advice")
        with gr.Row():
            start = gr.Button("Start", variant="primary", min_width=140, elem_id="start-training")
            check = gr.Button("Check, and estimate the time", min_width=180, elem_id="check-training")
    overview = gr.HTML("", elem_id="jobs", apply_default_css=False)
    with gr.Row(equal_height=True):
        run = gr.Dropdown([], value=None, label="Run", scale=2, min_width=200, elem_id="run")
        beside = gr.Dropdown([], value=None, label="Curves beside", scale=2, min_width=200, elem_id="beside")
    with gr.Row():
        stop = gr.Button("Stop (saves)", interactive=False, min_width=110, elem_id="stop-training")
        resume = gr.Button("Go on", interactive=False, min_width=110, elem_id="resume-training")
        more = gr.Textbox(label="Steps to go on to", placeholder="as before", max_length=12, min_width=140, elem_id="more-steps")
        rename = gr.Button("Rename", interactive=False, min_width=110, elem_id="rename-training")
        new_name = gr.Textbox(label="New name", max_length=64, min_width=160, elem_id="new-name")
    with gr.Row():
        archive = gr.Button("Archive", interactive=False, min_width=110, elem_id="archive-training")
        unarchive = gr.Button("Bring back from the archive", min_width=160, elem_id="unarchive")
        put_away = gr.Dropdown([], value=None, label="In the archive", min_width=160, elem_id="archived")
        delete = gr.Button(DELETE, interactive=False, variant="stop", min_width=110, elem_id="delete-training")
    told = gr.HTML(render.message(""), elem_id="told")
    details = gr.HTML("", elem_id="run-details", apply_default_css=False)
    timer = gr.Timer(REFRESH_S, active=False)
    seen = gr.State([])  # what was sent last
    form = [name, preset, pair, data, backbone, size, skips, begin, *numbers.values()]
    buttons = [stop, resume, archive, delete, rename]

    def options_of(preset: str, data: str, backbone: str, size: str, skips: str, begin: str, *values: Any) -> dict[str, Any]:
        """Flags of the training script."""
        own = ALL_PRESETS[preset].flags.keys() if preset in ALL_PRESETS else ()
        if not (data or "").strip() and not {"dataset_name", "train_data_dir"} & set(own):
            told = "this preset has none of its own" if preset else "or choose a preset"
            raise ValueError(f"Images is empty; give openmoji, a folder, or a name of the hub; {told}")
        options = {
            "preset": preset,
            **_source(jobs, (data or "").strip()),
            "backbone": backbone,
            "size": size,
            "long_skips": YES_NO[skips],
            "init_from": begin,
        }
        options |= {flag: (value or "").strip() for flag, value in zip(NUMBERS, values, strict=True)}
        return {option: value for option, value in options.items() if value not in (None, "")}

    def describe_preset(preset: str) -> tuple[Any, ...]:
        info = ALL_PRESETS[preset].about if preset in ALL_PRESETS else "the fields below, and the script's own defaults"
        return gr.update(info=info), *(gr.update(placeholder=_preset_value(preset, flag)) for flag in NUMBERS)

    def offer() -> tuple[Any, ...]:
        """What the form offers; it takes the libraries to know it."""
        known = {"backbone": choices("backbone"), "size": choices("size")}
        return (
            *(gr.update(choices=[PRESETS_OWN, *((name, name) for name in names)]) for names in known.values()),
            gr.update(choices=[NOTHING, *((name, name) for name in checkpoints(site.runs))]),
        )

    def on_start(name: str, preset: str, pair: bool, *values: Any) -> tuple[Any, ...]:
        with form_errors():
            options = options_of(preset, *values)
            started = jobs.start_pair(name, options) if pair else [jobs.start(name, options)]
            words = ", ".join(f"{each.name} {place_of(each)}" for each in started)
            return render.message(f"Started: {words}."), *look(started[0].name, started[-1].name if pair else None)

    def on_check(name: str, preset: str, pair: bool, *values: Any) -> str:
        with form_errors():
            options = options_of(preset, *values)
            *_, checked = jobs.check(name or secrets.token_hex(8), options, pair).values()  # of a pair the decayed one
            minutes = jobs.estimate(options)
        time_told = "How long it takes is known after the first run of this network on such images"
        if minutes is not None:
            time_told = f"About {time_words(60 * minutes * (2 if pair else 1))} here, after what earlier runs took"
        return render.message(f"This can be started{'' if name else ' once it has a name'}. {time_told}. {advice(checked)}")

    def fresh(chosen: str | None, other: str | None, seen: list[str]) -> tuple[Any, ...]:
        """`look`, without what is there already: an open list stays open."""
        values = look(chosen, other)
        for choice in values[1:3]:
            if choice["value"] in (chosen, other):
                del choice["value"]  # the visitor may choose another one meanwhile
        del values[-1]["value"]  # so with the archive
        now = [repr(value) for value in values]
        same = [i < len(seen) and seen[i] == now[i] for i in range(len(now))]
        return now, *(gr.skip() if known else value for known, value in zip(same, values, strict=True))

    def look(chosen: str | None, other: str | None) -> tuple[Any, ...]:
        """All that shows how the runs stand."""
        statuses = jobs.all()
        names = [status.name for status in statuses]
        trainings = [status.name for status in statuses if status.kind == TRAINING]
        chosen = chosen if chosen in names else next(iter(names), None)
        other = other if other in trainings and other != chosen else None
        status = next((each for each in statuses if each.name == chosen), None)
        labels = [(title_of(each), each.name) for each in statuses]
        return (
            overview_of(jobs, statuses),
            gr.update(choices=labels, value=chosen),
            gr.update(choices=[name for name in trainings if name != chosen], value=other),
            details_of(jobs, status, other),
            *(gr.update(interactive=on) for on in possible(status)),
            gr.update(choices=jobs.archived(), value=None),
        )

    looked = [overview, run, beside, details, *buttons, put_away]

    def act(words: str, change: Any) -> Any:
        """A handler that changes the chosen run, says so, and looks again."""

        def handle(chosen: str | None, other: str | None, *values: Any) -> tuple[Any, ...]:
            with page_errors():
                if not chosen:
                    raise ValueError("choose a run first")
                after = change(chosen, *values)
                name = after.name if isinstance(after, Status) else chosen
                return render.message(f"{name}: {words}."), gr.update(value=DELETE), *look(name, other)

        return handle

    def first_or_really(label: str, chosen: str | None, other: str | None) -> tuple[Any, ...]:
        """The first click asks, the second one deletes, if it is about the same run still."""
        really = f"Really delete {chosen}?"
        if chosen and label != really:
            return gr.skip(), gr.update(value=really), *[gr.skip()] * len(looked)
        return act("deleted", jobs.delete)(chosen, other)

    def from_archive(put_away: str | None, other: str | None) -> tuple[Any, ...]:
        with page_errors():
            if not put_away:
                raise ValueError("choose a run of the archive first")
            back = jobs.unarchive(put_away)
        return render.message(f"{back.name}: back from the archive."), gr.update(value=DELETE), *look(back.name, other)

    def resumed(chosen: str, more: str) -> Status:
        steps = (more or "").strip()
        if steps and not steps.isdecimal():
            raise ValueError(f"the steps to go on to cannot be {steps!r}; give a whole number, or nothing to leave them as they are")
        return jobs.resume(chosen, {"max_train_steps": steps} if steps else None)

    changed = [told, delete, *looked]
    clears([each.input for each in form] + [start.click, check.click], advised)
    clears([run.input, *(each.click for each in (stop, resume, rename, archive, delete, unarchive))], told)
    preset.input(describe_preset, preset, [preset, *numbers.values()], **QUIET)
    start.click(on_start, form, [advised, *looked], **AS_SENT)
    check.click(on_check, form, advised, **AS_SENT)
    stop.click(act("asked to stop", jobs.stop), [run, beside], changed, **AS_SENT)
    resume.click(act("goes on", resumed), [run, beside, more], changed, **AS_SENT)
    rename.click(act("is its name now", jobs.rename), [run, beside, new_name], changed, **AS_SENT)
    archive.click(act("put into the archive", jobs.archive), [run, beside], changed, **AS_SENT)
    delete.click(first_or_really, [delete, run, beside], changed, **AS_SENT)
    unarchive.click(from_archive, [put_away, beside], changed, **AS_SENT)
    gr.on([run.input, beside.input], look, [run, beside], looked, **LATEST)
    run.input(lambda: (DELETE, "", ""), None, [delete, more, new_name], **AT_ONCE)
    timer.tick(fresh, [run, beside, seen], [seen, *looked], **AS_SENT)
    page.load(look, [run, beside], looked, **AS_SENT)
    tab.select(offer, None, [backbone, size, begin], **QUIET)
    return timer


@contextlib.contextmanager
def form_errors() -> Iterator[None]:
    """`page_errors` about flags speak of the form's fields instead."""
    with page_errors():
        try:
            yield
        except ValueError as error:
            flag = r"(?<![\w-])(?:--(\w+)|(patch_size)\b)"  # not what a visitor's own names have in common with it
            words = re.sub(flag, lambda found: FIELDS.get(found[1] or found[2], found[0]), str(error))
            raise ValueError(words) from error


def _source(jobs: Jobs, data: str) -> dict[str, str]:
    """The flag for the form's images: a folder of images, else a name of the hub, or what is named like one."""
    folder = (jobs.data or Path.cwd()) / data
    if not data or not (folder.is_dir() or data.startswith(("/", "."))):
        return {"dataset_name": data}
    return {"dataset_name" if any(folder.glob("*.parquet")) else "train_data_dir": data}


def _preset_value(preset: str, flag: str) -> str:
    """What stands in an empty field."""
    value = ALL_PRESETS[preset].flags.get(flag) if preset in ALL_PRESETS else None
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
