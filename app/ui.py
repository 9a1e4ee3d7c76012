"""The page: Gradio widgets, and which plain function each of them calls."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from app import render
from app.catalog import Card, card, cards, default_pair, shared_classes
from app.sampler import MAX_IMAGES, MAX_STEPS, OWN_SAMPLER, RANDOM_SEED, compare

TITLE = "Fading Shortcuts"
CSS = Path(__file__).with_name("page.css")
NO_LABEL = "no label"
# what the page calls the samplers of models.pipeline, which is not imported here: it takes seconds
SAMPLERS = {
    "Its own": OWN_SAMPLER,
    "Euler": "euler",
    "Heun (two evaluations a step)": "heun",
    "DPM-Solver++": "dpm++",
    "UniPC": "unipc",
    "DDIM (for DDPMs)": "ddim",
    "DDPM (for DDPMs)": "ddpm",
}
VIEWS = [("Side by side", "sides"), ("Slider", "slider")]
PREVIEW_INTERVAL_S = 0.2
QUIET: dict[str, Any] = dict(show_progress="hidden", api_visibility="private")
SAMPLING = dict(concurrency_id="sampling", concurrency_limit=1)  # comparisons queue for the machine

SHOW_VIEW = "view => { document.getElementById('comparison').dataset.view = view }"
# a preview replaces the stage, and the divider stays where the visitor left it
MOVE_DIVIDER = """
let at = 50
element.addEventListener('input', event => {
    at = event.target.value
    document.getElementById('comparison').style.setProperty('--at', at / 100)
})
watch('value', () => element.querySelectorAll('.divider').forEach(divider => { divider.value = at }))
"""


def theme() -> gr.Theme:
    """Calm colours and the fonts of the visitor's system: nothing is loaded from elsewhere."""
    return gr.themes.Default(
        primary_hue="indigo",
        neutral_hue="slate",
        font=("system-ui", "-apple-system", "Segoe UI", "sans-serif"),
        font_mono=("ui-monospace", "Menlo", "Consolas", "monospace"),
    )


def build(runs: Path) -> gr.Blocks:
    """The page over the shipped checkpoints and those in `runs`."""
    known = cards(runs)
    pair = default_pair(known)

    def show_checkpoints(a: str | None, b: str | None, label: str) -> tuple[str, Any]:
        """The table, and the labels that both know."""
        if not a or not b:
            return "", gr.skip()
        with page_errors():
            chosen = [card(a, runs), card(b, runs)]
        choices = label_choices(chosen)
        return render.table(chosen), gr.update(choices=choices, value=label if label in choices else NO_LABEL)

    def refresh(a: str | None, b: str | None, label: str) -> tuple[Any, ...]:
        """Runs that came or went since the page was built."""
        known = cards(runs)
        pair = default_pair(known) or (None, None)
        a, b = (name if name in known else standard for name, standard in zip((a, b), pair, strict=True))
        dropdowns = (gr.update(choices=list(known), value=name) for name in (a, b))
        return *dropdowns, *show_checkpoints(a, b, label), gr.update(interactive=bool(known)), render.empty_stage(bool(known))

    def compare_on_page(
        a: str, b: str, label: str, seed: int, num_images: int, steps: int, guidance: float, sampler: str
    ) -> Iterator[tuple[str, str, Any]]:
        """Stage, status and recipe, while sampling and at the end."""
        with page_errors():
            try:
                yield from frames_on_page([a, b], label, seed, num_images, steps, guidance, sampler)
            except (ValueError, OSError):
                # told here and not when the event fails: a sampling that was stopped counts as failed too
                yield gr.skip(), render.message("Nothing was sampled."), gr.skip()
                raise

    def frames_on_page(names: list[str], label: str, *settings: Any) -> Iterator[tuple[str, str, Any]]:
        chosen = [card(name, runs) for name in names]
        shown_s = 0.0
        with contextlib.closing(compare(names, runs, None if label == NO_LABEL else label, *settings)) as frames:
            for frame in frames:
                if frame.done or time.monotonic() - shown_s > PREVIEW_INTERVAL_S:
                    shown_s = time.monotonic()
                    yield render.stage(chosen, frame), render.status(frame), frame.recipe if frame.done else gr.skip()

    def compare_for_programs(
        checkpoint_a: str,
        checkpoint_b: str,
        label: str = NO_LABEL,
        seed: int = RANDOM_SEED,
        num_images: int = 8,
        steps: int = 20,
        guidance_scale: float = 2.0,
        sampler: str = OWN_SAMPLER,
    ) -> tuple[list[str], list[str], dict]:
        """Sample two checkpoints from the same noise; image i comes from seed + i.

        Parameters:
            checkpoint_a: a name that the page lists.
            checkpoint_b: another one, or the same.
            label: name or number of a class, or "no label".
            seed: -1 draws one; the recipe tells which.
            num_images: of each checkpoint, 1 to 64.
            steps: of the sampler, 1 to 250.
            guidance_scale: classifier-free guidance; 1 is none.
            sampler: euler, heun, dpm++ or unipc; ddim, ddpm, dpm++ or unipc for DDPMs; "own" for each model's own.

        Returns:
            The images of A and of B as PNG data URLs (data:image/png;base64,...), and the recipe with the resolved seed.
        """
        with page_errors():
            label_or_none = None if label == NO_LABEL else label
            arguments = (label_or_none, seed, num_images, steps, guidance_scale, sampler)
            *_, last = compare([checkpoint_a, checkpoint_b], runs, *arguments)
        a, b = ([render.png_url(image) for image in images] for images in last.images)
        return a, b, last.recipe

    with gr.Blocks(title=TITLE, analytics_enabled=False) as page:
        gr.HTML(
            f"<h1>{TITLE}</h1><p>Two diffusion models on the same noise: plain shortcuts beside shortcuts that fade with depth.</p>",
            elem_id="title",
        )
        with gr.Row():
            a, b = (
                gr.Dropdown(
                    list(known),
                    value=name,
                    label=f"Checkpoint {side}",
                    filterable=False,
                    min_width=280,
                    elem_id=f"checkpoint-{side.lower()}",
                )
                for side, name in zip("AB", pair or (None, None), strict=True)
            )
        with gr.Row():
            choices = label_choices([known[name] for name in pair or ()])
            label = gr.Dropdown(choices, value=choices[min(1, len(choices) - 1)], label="Label", min_width=200, scale=3, elem_id="label")
            sampler = gr.Dropdown(list(SAMPLERS.items()), value=OWN_SAMPLER, label="Sampler", min_width=130, scale=2, elem_id="sampler")
            seed = gr.Number(0, label="Seed (−1: random)", precision=0, min_width=130, scale=2, elem_id="seed")
            num_images = gr.Slider(1, MAX_IMAGES, 8, step=1, label="Images", min_width=130, scale=2, buttons=[], elem_id="num-images")
            steps = gr.Slider(1, MAX_STEPS, 20, step=1, label="Steps", min_width=130, scale=2, buttons=[], elem_id="steps")
            guidance = gr.Slider(0, 10, 2, step=0.1, label="Guidance", min_width=130, scale=2, buttons=[], elem_id="guidance")
        with gr.Row(equal_height=True):
            start = gr.Button("Compare", variant="primary", interactive=pair is not None, min_width=140, scale=2, elem_id="compare")
            stop = gr.Button("Stop", interactive=False, min_width=90, scale=1, elem_id="stop")
            view = gr.Radio(VIEWS, value="sides", label="View", show_label=False, container=False, min_width=200, scale=4, elem_id="view")
        status = gr.HTML(render.message(""), elem_id="status")
        with gr.Column(elem_id="comparison"):
            stage = gr.HTML(render.empty_stage(pair is not None), elem_id="stage", apply_default_css=False, js_on_load=MOVE_DIVIDER)
        table = gr.HTML("", elem_id="table", apply_default_css=False)
        with gr.Accordion("Recipe of these images", open=False):
            recipe = gr.JSON(label="Recipe", show_label=False)

        settings = [a, b, label, seed, num_images, steps, guidance, sampler]
        busy = start.click(_busy, None, [start, stop, status], **QUIET, queue=False)
        sampling = busy.then(compare_on_page, settings, [stage, status, recipe], **QUIET, **SAMPLING)
        sampling.success(_idle, None, [start, stop], **QUIET, queue=False)
        sampling.failure(_idle, None, [start, stop], **QUIET, queue=False)
        stop.click(_stopped, None, [start, stop, status], cancels=[sampling], **QUIET, queue=False)
        view.change(None, view, js=SHOW_VIEW)
        for dropdown in (a, b):
            dropdown.input(show_checkpoints, [a, b, label], [table, label], **QUIET)
        page.load(refresh, [a, b, label], [a, b, table, label, start, stage], **QUIET)
        gr.api(compare_for_programs, api_name="compare", **SAMPLING)
    return page


def _busy() -> tuple[Any, Any, str]:
    return gr.update(interactive=False), gr.update(interactive=True), render.message("Starting …")


def _idle() -> tuple[Any, Any]:
    return gr.update(interactive=True), gr.update(interactive=False)


def _stopped() -> tuple[Any, Any, str]:
    return *_idle(), render.message("Stopped.")


def label_choices(chosen: list[Card]) -> list[str]:
    """No label, then the classes that all of them know."""
    return [NO_LABEL, *shared_classes(*chosen)]


@contextlib.contextmanager
def page_errors() -> Iterator[None]:
    """Bad input becomes one sentence on the page or in the client."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise gr.Error(" ".join(str(error).split()), print_exception=False) from error
