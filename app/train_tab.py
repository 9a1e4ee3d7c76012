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
from app.job_status import Status
from app.jobs import Jobs
from app.site import AS_SENT, AT_ONCE, LATEST, QUIET, Site, Updates, Values, clears, page_errors
from app.train_view import details_of, overview_of, possible, state_words, time_words, title_of

REFRESH_S = 2.0
FIRST_PRESET = "demo-decayed"
AS_PRESET = "as it comes"
YES_NO = {AS_PRESET: None, "on": True, "off": False}
DELETE = "Delete"
NO_PRESET, PRESETS_OWN, NOTHING, NO_RUN = ("no preset", ""), ("as the preset", ""), ("nothing", ""), ("choose a run", "")
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


def train_tab(site: Site, jobs: Jobs, tab: gr.Tab) -> gr.Timer:
    """The widgets of the tab, and what they do; returns what looks at the runs again and again."""
    with gr.Accordion("A new training", open=True):
        with gr.Row():
            name = gr.Textbox(label="Name of the run", placeholder="my-first", max_length=64, min_width=180, elem_id="run-name")
            presets = [NO_PRESET, *ALL_PRESETS]
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
    seen = gr.State({})  # see `unseen`
    form = [name, preset, pair, data, backbone, size, skips, begin, *numbers.values()]
    buttons = {"stop": stop, "resume": resume, "archive": archive, "delete": delete, "rename": rename}
    looked = [overview, run, beside, details, *buttons.values(), put_away]

    def options_of(asked: Values) -> dict[str, Any]:
        """Flags of the training script, from the form."""
        chosen, images = asked[preset], (asked[data] or "").strip()
        own = ALL_PRESETS[chosen].flags.keys() if chosen in ALL_PRESETS else ()
        if not images and not {"dataset_name", "train_data_dir"} & set(own):
            told = "this preset has none of its own" if chosen else "or choose a preset"
            raise ValueError(f"Images is empty; give openmoji, a folder, or a name of the hub; {told}")
        options = {
            "preset": chosen,
            **_source(jobs, images),
            "backbone": asked[backbone],
            "size": asked[size],
            "long_skips": YES_NO[asked[skips]],
            "init_from": asked[begin],
            **{flag: (asked[number] or "").strip() for flag, number in numbers.items()},
        }
        return {option: value for option, value in options.items() if value not in (None, "")}

    def describe_preset(chosen: str) -> Updates:
        info = ALL_PRESETS[chosen].about if chosen in ALL_PRESETS else "the fields below, and the script's own defaults"
        values = {number: gr.update(placeholder=_preset_value(chosen, flag)) for flag, number in numbers.items()}
        return {preset: gr.update(info=info), **values}

    def offer() -> Updates:
        """What the form offers; it takes the libraries to know it."""
        return {
            backbone: gr.update(choices=[PRESETS_OWN, *choices("backbone")]),
            size: gr.update(choices=[PRESETS_OWN, *choices("size")]),
            begin: gr.update(choices=[NOTHING, *checkpoints(site.runs)]),
        }

    def on_start(asked: Values) -> Updates:
        with form_errors():
            options = options_of(asked)
            started = jobs.start_pair(asked[name], options) if asked[pair] else [jobs.start(asked[name], options)]
            words = ", ".join(f"{each.name} ({state_words(each)})" for each in started)
            return {advised: render.message(f"Started: {words}."), **look(started[0].name, started[-1].name)}

    def on_check(asked: Values) -> str:
        with form_errors():
            options = options_of(asked)
            checked = list(jobs.check(asked[name] or secrets.token_hex(8), options, asked[pair]).values())
            minutes = jobs.estimate(options)
        time_told = "How long it takes is known after the first run of this network on such images"
        if minutes is not None:
            time_told = f"About {time_words(60 * minutes * len(checked))} here, after what earlier runs took"
        unnamed = "" if asked[name] else " once it has a name"
        return render.message(f"This can be started{unnamed}. {time_told}. {advice(checked[-1])}")  # of a pair the decayed one

    def fresh(chosen: str | None, other: str | None, known: dict[Any, int]) -> Updates:
        """What has changed of `look`."""
        values = look(chosen, other)
        for choice, sent in ((run, chosen), (beside, other), (put_away, None)):
            if values[choice]["value"] == sent:
                del values[choice]["value"]  # the visitor may choose another one meanwhile
        return unseen(values, seen, known)

    def look(chosen: str | None, other: str | None) -> Updates:
        """All that shows how the runs stand."""
        statuses: dict[str | None, Status] = {status.name: status for status in jobs.all()}
        if chosen is None:  # nothing was chosen yet
            chosen = next(iter(statuses), None)
        elif chosen not in statuses:  # it is gone, and no other one takes its place: the next click would be about that
            chosen = ""
        runs = [(title_of(status), each) for each, status in statuses.items()]
        others = [each for each, status in statuses.items() if status.kind == TRAINING and each != chosen]
        other = other if other in others else None
        status = statuses.get(chosen)
        return {
            overview: overview_of(jobs, list(statuses.values())),
            run: gr.update(choices=[NO_RUN, *runs] if chosen == "" else runs, value=chosen),
            beside: gr.update(choices=others, value=other),
            details: details_of(jobs, status, statuses.get(other)),
            **{button: gr.update(interactive=what in possible(status)) for what, button in buttons.items()},
            put_away: gr.update(choices=jobs.archived(), value=None),
        }

    def changed(words: str, chosen: str, other: str | None) -> Updates:
        """What was done, and `look` after it."""
        values = look(chosen, other)
        values[delete]["value"] = DELETE
        return {told: render.message(f"{chosen}: {words}."), **values}

    def act(words: str, change: Any) -> Any:
        """A handler that changes the chosen run, says so, and looks again."""

        def handle(chosen: str | None, other: str | None, *values: Any) -> Updates:
            with page_errors():
                if not chosen:
                    raise ValueError("choose a run first")
                after = change(chosen, *values)
                return changed(words, after.name if isinstance(after, Status) else chosen, other)

        return handle

    def first_or_really(label: str, chosen: str | None, other: str | None) -> Updates:
        """The first click asks, the second one deletes, if it is about the same run still."""
        really = f"Really delete {chosen}?"
        if chosen and label != really:
            return {delete: gr.update(value=really)}
        return act("deleted", jobs.delete)(chosen, other)

    def from_archive(put_away: str | None, other: str | None) -> Updates:
        with page_errors():
            if not put_away:
                raise ValueError("choose a run of the archive first")
            return changed("back from the archive", jobs.unarchive(put_away).name, other)

    def resumed(chosen: str, more: str) -> Status:
        steps = (more or "").strip()
        if steps and not steps.isdecimal():
            raise ValueError(f"the steps to go on to cannot be {steps!r}; give a whole number, or nothing to leave them as they are")
        return jobs.resume(chosen, {"max_train_steps": steps} if steps else None)

    after = [told, *looked]
    clears([each.input for each in form] + [start.click, check.click], advised)
    clears([run.input, *(each.click for each in (stop, resume, rename, archive, delete, unarchive))], told)
    preset.input(describe_preset, preset, [preset, *numbers.values()], **QUIET)
    start.click(on_start, set(form), [advised, *looked], **AS_SENT)
    check.click(on_check, set(form), advised, **AS_SENT)
    stop.click(act("asked to stop", jobs.stop), [run, beside], after, **AS_SENT)
    resume.click(act("goes on", resumed), [run, beside, more], after, **AS_SENT)
    rename.click(act("is its name now", jobs.rename), [run, beside, new_name], after, **AS_SENT)
    archive.click(act("put into the archive", jobs.archive), [run, beside], after, **AS_SENT)
    delete.click(first_or_really, [delete, run, beside], after, **AS_SENT)
    unarchive.click(from_archive, [put_away, beside], after, **AS_SENT)
    gr.on([run.input, beside.input], look, [run, beside], looked, **LATEST)
    run.input(lambda: (DELETE, "", ""), None, [delete, more, new_name], **AT_ONCE)
    gr.on([tab.select, timer.tick], fresh, [run, beside, seen], [seen, *looked], **AS_SENT)
    tab.select(offer, None, [backbone, size, begin], **QUIET)
    return timer


def unseen(values: Updates, seen: gr.State, known: dict[Any, int]) -> Updates:
    """Updates for those widgets whose value was not sent last: what is there already would close an open list.

    Args:
        seen: remembers what was sent, by hashes: each visitor has one, and the values hold pictures.
        known: what it remembers.
    """
    now = {widget: hash(repr(value)) for widget, value in values.items()}
    return {seen: now, **{widget: value for widget, value in values.items() if known.get(widget) != now[widget]}}


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
