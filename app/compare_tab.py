"""Compare: checkpoints on the same noise, looked at in several ways, and what came of earlier ones."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import gradio as gr

from app import recipe as recipes
from app import render
from app.catalog import Card, cards_of, results
from app.grid import varying
from app.grid_section import grid_section
from app.guard import toast
from app.judge_tab import measured
from app.sampler import Frame, sample
from app.settings import MAX_SIDES, OWN, Comparison, Side
from app.settings_panel import SettingsPanel
from app.site import AS_SENT, AT_ONCE, LATEST, QUIET, WATCHING, Site, Updates, Values, page_errors, sent, streams
from app.studio import DONE, RUNNING, WAITING, Sampling

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

    def nothing_yet(asked: Comparison | None) -> str:
        return render.empty_stage(asked is not None, site.jobs is not None)

    panel = SettingsPanel(site, first)
    with gr.Row(equal_height=True):
        start = gr.Button("Compare", variant="primary", min_width=140, scale=2, elem_id="compare")
        stop = gr.Button("Stop", interactive=False, min_width=90, scale=1, elem_id="stop")
        view = gr.Radio(VIEWS, value="sides", label="View", show_label=False, container=False, min_width=300, scale=5, elem_id="view")
    status = gr.HTML(render.message(""), elem_id="status")
    with gr.Column(elem_id="comparison"):
        stage = gr.HTML(nothing_yet(first), elem_id="stage", apply_default_css=False, js_on_load=None)
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

    def ask(values: Values, request: gr.Request) -> Updates:
        """Queue what the widgets say."""
        with page_errors():
            return queue(panel.read(values), values[kept], request)

    def queue(comparison: Comparison, before: dict, request: gr.Request) -> Updates:
        cards_of([side.checkpoint for side in comparison.sides], site.runs)  # what is damaged is told now and not in its turn
        settled = comparison.settled()
        sampling = site.studio.ask(lambda: sample(settled, site.runs), request.session_hash, settled)
        leave(before, request)
        return {shown: sampling.id, kept: {"settings": comparison.as_json(), "shown": sampling.id}}

    painting: dict[str | None, Sampling] = {}  # by page: what its stage is for

    def leave(before: dict, request: gr.Request) -> None:
        """Stop what this page was about, unless another one shows it, too."""
        painting.pop(request.session_hash, None)  # its end is not this page's any more
        if before["shown"] not in [each.id for each in list(painting.values())]:
            site.studio.leave(before["shown"])

    idle = {start: gr.update(interactive=True), stop: gr.update(interactive=False), dropped: None}
    left = {start: gr.skip(), stop: gr.skip()}

    @streams
    async def watch(id: str | None, repeats: tuple[str, str] | None, request: gr.Request) -> AsyncIterator[Updates]:
        """Everything that follows from a sampling, until it is over or the stage is for another one."""
        sampling, visitor = site.studio.find(id), request.session_hash
        file = repeats[1] if repeats and repeats[0] == id else None
        if sampling is None:
            yield idle
            return
        painting[visitor] = sampling
        try:
            if not sampling.over:
                yield {start: gr.update(interactive=False), stop: gr.update(interactive=not sampling.lasting)}
            async for state, frame, position in site.studio.watch(sampling):
                going = state in (WAITING, RUNNING)
                told = (on_the_way, frame, position) if going else (at_the_end, sampling, file)
                news = await asyncio.to_thread(*told)
                if painting.get(visitor) is not sampling:
                    yield left  # the buttons are for what the page shows now
                    return
                yield news
                if going:
                    await sent(news.get(stage))
        finally:
            if painting.get(visitor) is sampling:
                del painting[visitor]

    def on_the_way(frame: Frame | None, position: int) -> Updates:
        if frame is None:
            return {status: render.waiting(position)}
        return {stage: render.stage(frame), status: render.progress(frame)}

    def at_the_end(sampling: Sampling, file: str | None) -> Updates:
        if sampling.state != DONE:
            return {status: render.message(sampling.ending), **idle}
        frame = sampling.result
        told = render.status(frame) + (repeated(Path(file), frame) if file else "")
        return {stage: render.stage(frame), status: told, recipe: frame.recipe, **idle}

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

    follow(start.click(ask, {kept, *panel.inputs}, [shown, kept], **AS_SENT))
    stop.click(site.studio.leave, shown, None, **AT_ONCE)

    # --------------------------------------------------------------------------------------------------------- bring it back

    def bring_back(before: dict, request: gr.Request, event: gr.EventData) -> Updates:
        """An item of the history, with its settings."""
        sampling = found(event)
        leave(before, request)
        return {shown: sampling.id, kept: {"settings": sampling.about.as_json(), "shown": sampling.id}, **panel.fill(sampling.about)}

    def add(values: Values, event: gr.EventData, request: gr.Request) -> Updates:
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
            return {**queue(asked, values[kept], request), **panel.fill(asked)}

    def found(event: gr.EventData) -> Sampling:
        sampling = site.studio.find(event.id)
        if sampling is None or sampling.state != DONE:
            raise gr.Error("This one is not kept any more.", print_exception=False)
        return sampling

    def restore(file: str, before: dict, request: gr.Request) -> Updates:
        """Settings from a PNG; then they are sampled, but for those of a grid, which takes longer."""
        with page_errors():
            told = recipes.from_png(Path(file))
            asked, changed = recipes.comparison(told, site.runs)
            for line in changed:
                gr.Warning(toast(line))
            if "grid" in told:
                varied = dict(zip(varies, varying(told), strict=True))
                gr.Info("These are the settings of a grid; draw it to see it again.")
                return {**panel.fill(asked), dropped: None, grid: gr.update(open=True), **varied}
            queued = queue(asked, before, request)
            return {**queued, **panel.fill(asked), dropped: (queued[shown], file)}

    def cards_table(cards: dict[str, Card]) -> str:
        found = measured(site.jobs, [each.name for each in cards.values()])
        return render.table(cards, [[*results(each), *found[each.name]] for each in cards.values()])

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
        history.put_beside(add, {kept, *panel.inputs}, restored, **AS_SENT),
        drop.upload(restore, [drop, kept], [*restored, dropped, grid, *varies], **QUIET),
    ]

    # -------------------------------------------------------------------------------------------------------- first and again

    def load(before: Any, seen: str) -> Updates:
        """Runs that came or went since the page was built; what this visitor left, else the first comparison."""
        before = {**NOTHING_KEPT, **(before if isinstance(before, dict) else {})}
        sampling = site.studio.find(before["shown"])
        try:
            asked = Comparison.from_json(before["settings"])
        except (ValueError, TypeError):
            asked = None
        if asked is None:
            sampling = site.welcome
            asked = sampling.about if sampling else site.first_comparison()  # the settings of what is shown
        back = {shown: sampling.id if sampling else None, kept: before, stage: nothing_yet(asked), view: seen}
        return {**back, **panel.fill(asked)} if asked else back

    def look_at_cards(values: Values) -> Updates:
        with page_errors():
            return {table: cards_table(panel.cards(values))}

    def choose(values: Values) -> Updates:
        """Cards and labels of the checkpoints that are chosen now."""
        with page_errors():
            cards = panel.cards(values)
            return {table: cards_table(cards), **panel.label_updates(cards, values)}

    filled.append(page.load(load, [kept, kept_view], [*restored, stage, view], **QUIET))
    for event in filled:
        follow(event)
    in_turn = dict(concurrency_id="cards")  # both write the table, and what was asked for last is to stay
    for event in (*(each.success for each in filled), tab.select):  # on return to the tab numbers may have been measured
        event(look_at_cards, {*panel.checkpoints}, table, **AS_SENT, **in_turn)
    # runs come and go
    tab.select(lambda: dict.fromkeys(panel.checkpoints, gr.update(choices=panel.known())), None, panel.checkpoints, **AT_ONCE)
    panel.when_chosen(choose, {*panel.choices}, [table, *panel.labels], **LATEST, **in_turn)
    view.change(None, view, None, js=SHOW_VIEW)
    view.input(lambda view: view, view, kept_view, **{**AT_ONCE, "trigger_mode": "always_last"})
