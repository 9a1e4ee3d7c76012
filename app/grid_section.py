"""The grid: checkpoints x the values of one setting, as one labelled picture to download."""

import asyncio
import base64
from collections.abc import AsyncIterator

import gradio as gr

from app import recipe as recipes
from app import render
from app.grid import ALPHA_MIN, GUIDANCE, LABEL, MAX_VALUES, SEED, STEPS, Plan, draw, plan, sample_grid
from app.sampler import Frame
from app.settings_panel import SettingsPanel
from app.site import AS_SENT, AT_ONCE, WATCHING, Site, Updates, Values, clears, page_errors, streams
from app.studio import DONE

# what varies -> its words, and values to begin with
AXES = {
    SEED: ("Seeds (how many)", "6"),
    STEPS: ("Steps", "2, 5, 10, 20"),
    GUIDANCE: ("Guidance", "1, 2, 4"),
    LABEL: ("Labels", "all"),
    ALPHA_MIN: ("alpha_min of the family (how many seeds)", "4"),
}


def grid_section(site: Site, panel: SettingsPanel) -> tuple[gr.Dropdown, gr.Textbox]:
    """The widgets, and what they do; checkpoints and other settings are the panel's.

    Returns:
        Those for what varies, and for its values.
    """
    id = gr.State(None)
    with gr.Row(equal_height=True):
        axis = gr.Dropdown(
            [(words, axis) for axis, (words, _) in AXES.items()], value=SEED, label="What varies", filterable=False, elem_id="axis"
        )
        values = gr.Textbox(
            AXES[SEED][1],
            label="Values",
            info='with commas between them; a "name, with a comma" in quotes',
            max_length=MAX_VALUES,
            elem_id="values",
        )
        start = gr.Button("Draw the grid", min_width=120, elem_id="draw-grid")
        stop = gr.Button("Stop the grid", interactive=False, min_width=100, elem_id="stop-grid")
    status = gr.HTML(render.message(""), elem_id="grid-status")
    picture = gr.HTML('<p class="empty small">The grid is drawn here, as one picture.</p>', elem_id="grid", apply_default_css=False)

    def ask(asked: Values, request: gr.Request) -> str:
        with page_errors():
            grid = plan(panel.read(asked), asked[axis], asked[values], site.runs)
            return site.studio.ask(lambda: sample_grid(grid, site.runs), request.session_hash, grid).id

    @streams
    async def watch(id: str) -> AsyncIterator[Updates]:
        with page_errors():
            sampling = site.studio.kept(id)
        yield {status: render.waiting(0), start: gr.update(interactive=False), stop: gr.update(interactive=True)}
        async for _, frame, position in site.studio.watch(sampling):
            if frame is None or not frame.done:
                yield {status: render.progress(frame) if frame else render.waiting(position)}
        told = [sampling.ending]
        end = {start: gr.update(interactive=True), stop: gr.update(interactive=False)}
        if sampling.state == DONE:
            told += sampling.about.notes
            end[picture] = await asyncio.to_thread(show, sampling.about, sampling.result)
        yield {**end, status: render.message(" ".join(told))}

    clears([start.click], status)
    busy = start.click(ask, {axis, values, *panel.inputs}, id, **AS_SENT)
    busy.success(watch, id, [picture, status, start, stop], **WATCHING)
    stop.click(site.studio.stop, id, None, **AT_ONCE)
    axis.input(lambda axis: AXES[axis][1], axis, values, **AT_ONCE)
    return axis, values


def show(grid: Plan, frame: Frame) -> str:
    """The picture, and the link to download it."""
    url = "data:image/png;base64," + base64.b64encode(recipes.to_png(draw(grid, frame), frame.recipe)).decode()
    alt = render.text(f"Grid of {', '.join(grid.rows)} by {', '.join(grid.columns)}; {grid.title}")
    return f'<div class="wide"><img src="{url}" alt="{alt}"></div><p><a href="{url}" download="grid.png">Download this grid as PNG</a></p>'
