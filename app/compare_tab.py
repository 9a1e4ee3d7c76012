"""Compare: checkpoints on the same noise, looked at in several ways, and what came of earlier ones."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import gradio as gr

from app import recipe as recipes
from app import render
from app.catalog import card, results
from app.grid import varying
from app.grid_section import grid_section
from app.guard import toast
from app.judge_tab import measured
from app.sampler import Frame, sample
from app.settings import MAX_SIDES, OWN, Comparison, Side
from app.settings_panel import SettingsPanel
from app.site import AS_SENT, AT_ONCE, LATEST, QUIET, WATCHING, Site, page_errors
from app.studio import DONE, FAILED, RUNNING, WAITING, Sampling

VIEWS = [("Side by side", "sides"), ("Slider", "slider"), ("Flicker", "flicker"), ("Difference", "difference")]
MAX_HISTORY = 20
NOTHING_KEPT: dict[str, Any] = {"settings": None, "shown": None}
SHOW_VIEW = "view => { showView(view); return view }"
HISTORY_EVENTS = """
element.addEventListener('click', event => {
    const button = event.target.closest('button')
    if (button) trigger(button.dataset.do === 'add' ? 'put_beside' : 'bring_back', { id: button.dataset.id })
})
"""


def compare_tab(site: Site, page: gr.Blocks, tab: gr.Tab) -> None:
    """The widgets of the tab, and what they do."""
    first = site.first_comparison()
    # what a refresh brings back stays in the visitor's browser; each is written by one kind of event, so that none undoes another's
    kept, kept_history, kept_view = (
        gr.BrowserState(nothing, storage_key=f"fading-shortcuts-{what}", secret="no secret")
        for what, nothing in (("comparison", NOTHING_KEPT), ("history", []), ("view", "sides"))
    )  # settings and the id of what is shown; ids of finished samplings; one of VIEWS
    shown = gr.State(None)  # id of a sampling
    dropped = gr.State(None)  # (id of a sampling, the PNG whose recipe it follows)

    panel = SettingsPanel(site, first)
    with gr.Row(equal_height=True):
        start = gr.Button("Compare", variant="primary", interactive=first is not None, min_width=140, scale=2, elem_id="compare")
        stop = gr.Button("Stop", interactive=False, min_width=90, scale=1, elem_id="stop")
        view = gr.Radio(VIEWS, value="sides", label="View", show_label=False, container=False, min_width=300, scale=5, elem_id="view")
    status = gr.HTML(render.message(""), elem_id="status")
    with gr.Column(elem_id="comparison"):
        stage = gr.HTML(render.empty_stage(first is not None), elem_id="stage", apply_default_css=False, js_on_load=None)
    with gr.Accordion("The checkpoints", open=True):
        table = gr.HTML("", elem_id="table", apply_default_css=False)
    with gr.Accordion("Grid: one setting in many values", open=False, elem_id="grid-section") as grid:
        varies = grid_section(site, panel)
    with gr.Accordion("Bring a picture back", open=False, elem_id="restore-section"):
        gr.Markdown(
            "Every finished picture can be downloaded from full screen (click on it), and carries its recipe. Drop one here to repeat it."
        )
        drop = gr.File(label="PNG of this page", file_types=[".png"], height=120, elem_id="drop")
        recipe = gr.JSON(label="Recipe of the images above", elem_id="recipe")
    with gr.Accordion("History", open=False, elem_id="history-section"):
        history = gr.HTML(render.history([]), elem_id="history", apply_default_css=False, js_on_load=HISTORY_EVENTS)

    # ------------------------------------------------------------------------------------------------------------- sampling

    def ask(kept: dict, request: gr.Request, *values: Any) -> tuple[Any, ...]:
        """Queue what the widgets say."""
        with page_errors():
            return queue(panel.read(values), kept, request)

    def queue(comparison: Comparison, kept: dict, request: gr.Request) -> tuple[Any, ...]:
        for side in comparison.sides:
            card(side.checkpoint, site.runs)  # told now and not in its turn
        settled = comparison.settled()
        sampling = site.studio.ask(lambda: sample(settled, site.runs), request.session_hash, settled)
        leave(kept, request)
        return sampling.id, {"settings": comparison.as_json(), "shown": sampling.id}

    painting: dict[str | None, Sampling] = {}  # by page: what its stage is for

    def leave(kept: dict, request: gr.Request) -> None:
        """Stop what this page was about, unless another one shows it, too."""
        # its end is not this page's any more: buttons that change twice at once may stay as they were
        painting.pop(request.session_hash, None)
        if kept["shown"] not in [each.id for each in list(painting.values())]:
            site.studio.leave(kept["shown"])

    async def watch(id: str | None, dropped: tuple[str, str] | None, request: gr.Request) -> AsyncIterator[tuple[Any, ...]]:
        """Everything that follows from a sampling, until it is over or the stage is for another one."""
        sampling, visitor = site.studio.find(id), request.session_hash
        file = dropped[1] if dropped and dropped[0] == id else None
        if sampling is None:
            yield gr.skip(), gr.skip(), gr.skip(), gr.update(interactive=True), gr.update(interactive=False), None
            return
        painting[visitor] = sampling
        try:
            if sampling.state in (WAITING, RUNNING):  # else the buttons would change twice at once, and the browser may mix that up
                yield gr.skip(), gr.skip(), gr.skip(), gr.update(interactive=False), gr.update(interactive=True), gr.skip()
            async for state, frame, position in site.studio.watch(sampling):
                if state in (WAITING, RUNNING):
                    news = *await asyncio.to_thread(on_the_way, frame, position), *[gr.skip()] * 4
                else:
                    news = await asyncio.to_thread(at_the_end, sampling, file)
                if painting.get(visitor) is not sampling:
                    break
                yield news
            yield (gr.skip(),) * 6  # Gradio sends what was yielded last once more at the end
        finally:
            if painting.get(visitor) is sampling:
                del painting[visitor]

    def on_the_way(frame: Frame | None, position: int) -> tuple[Any, Any]:
        if frame is None:
            return gr.skip(), render.waiting(position)
        return render.stage(frame), render.progress(frame)

    def at_the_end(sampling: Sampling, file: str | None) -> tuple[Any, ...]:
        idle = gr.update(interactive=True), gr.update(interactive=False)
        if sampling.state != DONE:
            words = sampling.message if sampling.state == FAILED else "Stopped."
            return gr.skip(), render.message(words), gr.skip(), *idle, None
        frame = sampling.result
        told = render.status(frame) + (repeated(Path(file), frame) if file else "")
        return render.stage(frame), told, frame.recipe, *idle, None

    def remember(id: str | None, ids: list[str]) -> tuple[list[str], str]:
        """What is finished, in the history."""
        sampling = site.studio.find(id)
        ids = ids if isinstance(ids, list) else []
        if sampling is not None and sampling.state == DONE:
            ids = [sampling.id, *(each for each in ids if each != sampling.id)][:MAX_HISTORY]
        known = filter(None, map(site.studio.find, ids))
        return ids, render.history([(each.id, each.result) for each in known if each.state == DONE])

    def follow(event: Any) -> None:
        """Watch the sampling that an event begins or brings back."""
        several: dict[str, Any] = dict(trigger_mode="multiple")  # one more may begin while the last one's end is on its way
        watched = event.success(watch, [shown, dropped], [stage, status, recipe, start, stop, dropped], **several, **WATCHING)
        watched.success(remember, [shown, kept_history], [kept_history, history], **several, **QUIET)

    follow(start.click(ask, [kept, *panel.inputs], [shown, kept], **AS_SENT))
    stop.click(site.studio.stop, shown, None, **AT_ONCE)

    # --------------------------------------------------------------------------------------------------------- bring it back

    def bring_back(kept: dict, request: gr.Request, event: gr.EventData) -> tuple[Any, ...]:
        """An item of the history, with its settings."""
        sampling = found(event)
        leave(kept, request)
        return sampling.id, {"settings": sampling.about.as_json(), "shown": sampling.id}, *panel.fill(sampling.about)

    def add(kept: dict, event: gr.EventData, request: gr.Request, *values: Any) -> tuple[Any, ...]:
        """An item of the history beside what the widgets say, where it differs as overrides."""
        with page_errors():
            asked, other = panel.read(values), found(event).about
            there = [(side.checkpoint, asked.of(side)) for side in asked.sides]
            new = [side for side in other.sides if (side.checkpoint, other.of(side)) not in there]
            if not new:
                raise ValueError("all of it is shown already")
            if len(there) + len(new) > MAX_SIDES:
                raise ValueError(f"a comparison shows up to {MAX_SIDES} checkpoints; remove one first")
            added = tuple(Side(side.checkpoint, {name: vars(other.of(side))[name] for name in OWN}) for side in new)
            asked = Comparison(asked.shared, (*asked.sides, *added)).settled()
            return *queue(asked, kept, request), *panel.fill(asked)

    def found(event: gr.EventData) -> Sampling:
        sampling = site.studio.find(event.id)
        if sampling is None or sampling.state != DONE:
            raise gr.Error("This one is not kept any more.", print_exception=False)
        return sampling

    def restore(file: str, shown: str | None, kept: dict, request: gr.Request) -> tuple[Any, ...]:
        """Settings from a PNG; then they are sampled, but for those of a grid, which takes longer."""
        with page_errors():
            recipe = recipes.from_png(Path(file))
            asked, changed = recipes.comparison(recipe, site.runs)
            for line in changed:
                gr.Warning(toast(line))
            if "grid" in recipe:
                what = varying(recipe)
                gr.Info("These are the settings of a grid; draw it to see it again.")
                return shown, kept, *panel.fill(asked), None, gr.update(open=True), *what
            id, kept = queue(asked, kept, request)
            return id, kept, *panel.fill(asked), (id, file), *[gr.skip()] * 3

    def cards_table(names: list[str | None]) -> str:
        there = [name for name in names if name]
        found = measured(site.jobs, there)
        return render.table([card(name, site.runs) for name in there], [[*results(name, site.runs), *found[name]] for name in there])

    def repeated(file: Path, frame: Frame) -> str:
        """Whether a dropped image came out again."""
        try:
            same = recipes.same_pixels(file, frame)
        except (ValueError, OSError):
            return ""
        return render.message(
            "The dropped image came out the same, bit for bit." if same else "The dropped image came out differently here."
        )

    restored = [shown, kept, *panel.outputs]
    filled = [
        history.bring_back(bring_back, kept, restored, **QUIET),
        history.put_beside(add, [kept, *panel.inputs], restored, **AS_SENT),
        drop.upload(restore, [drop, shown, kept], [*restored, dropped, grid, *varies], **QUIET),
    ]

    # -------------------------------------------------------------------------------------------------------- first and again

    def load(kept: dict, view: str) -> tuple[Any, ...]:
        """Runs that came or went since the page was built; what this visitor left, else the first comparison."""
        kept = {**NOTHING_KEPT, **(kept if isinstance(kept, dict) else {})}
        sampling = site.studio.find(kept["shown"])
        try:
            asked = Comparison.from_json(kept["settings"])
        except (ValueError, TypeError):
            asked = None
        if asked is None:
            sampling = site.welcome
            asked = sampling.about if sampling else site.first_comparison()  # the settings of what is shown
        if asked is None:
            return None, kept, *[gr.skip()] * len(panel.outputs), render.empty_stage(False), gr.update(interactive=False), "sides"
        back = sampling.id if sampling else None
        return back, kept, *panel.fill(asked), render.empty_stage(True), gr.update(interactive=True), view

    def look_at_cards(*names: str | None) -> str:
        with page_errors():
            return cards_table(list(names))

    def choose(*values: Any) -> tuple[Any, ...]:
        """Cards and labels of the checkpoints that are chosen now; see `SettingsPanel.choices`."""
        with page_errors():
            return cards_table(list(values[:MAX_SIDES])), *panel.label_updates(values)

    filled.append(page.load(load, [kept, kept_view], [*restored, stage, start, view], **QUIET))
    for event in filled:
        follow(event)
    for event in (*(each.success for each in filled), tab.select):  # on return to the tab numbers may have been measured
        event(look_at_cards, panel.checkpoints, table, **AS_SENT)
    # runs come and go
    tab.select(lambda: [gr.update(choices=panel.known()) for _ in panel.checkpoints], None, panel.checkpoints, **AT_ONCE)
    panel.when_chosen(choose, panel.choices, [table, *panel.labels], **LATEST)
    view.change(None, view, None, js=SHOW_VIEW)
    view.input(lambda view: view, view, kept_view, **{**AT_ONCE, "trigger_mode": "always_last"})
