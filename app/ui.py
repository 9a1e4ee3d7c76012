"""The page: its tabs, its colours, and where it begins."""

import gradio as gr

from app.blind_tab import blind_tab
from app.compare_tab import compare_tab
from app.guard import GuardedBlocks
from app.judge_tab import judge_tab
from app.look_tab import look_tab
from app.programs import programs
from app.site import QUIET, Site
from app.train_tab import train_tab

TITLE = "Fading Shortcuts"
UPLOADS_S = (3600, 86400)  # how often those are looked for that are to be deleted, and how old they are then


def theme() -> gr.Theme:
    """Calm colours and the fonts of the visitor's system: nothing is loaded from elsewhere."""
    return gr.themes.Default(
        primary_hue="indigo",
        neutral_hue="slate",
        font=("system-ui", "-apple-system", "Segoe UI", "sans-serif"),
        font_mono=("ui-monospace", "Menlo", "Consolas", "monospace"),
    ).set(body_text_color_subdued="*neutral_500")  # the default's is hard to read on white


def build(site: Site) -> gr.Blocks:
    """The page over the shipped checkpoints and those in the site's runs."""
    with GuardedBlocks(title=TITLE, analytics_enabled=False, delete_cache=UPLOADS_S) as page:
        gr.HTML(
            f"<h1>{TITLE}</h1><p>Generative models on the same noise: plain shortcuts beside shortcuts that fade with depth.</p>",
            elem_id="title",
        )
        timers = {}  # of the tabs that look at jobs
        with gr.Tabs(overflow_behavior="wrap") as tabs:
            with gr.Tab("Compare") as tab:
                compare_tab(site, page, tab)
            with gr.Tab("Blind test") as tab:
                blind_tab(site, page, tab)
            with gr.Tab("Look inside") as tab:
                look_tab(site, tab)
            if site.jobs is not None:
                with gr.Tab("Train") as tab:
                    timers[tab.label] = train_tab(site, site.jobs, tab)
            with gr.Tab("Judge") as tab:
                timers[tab.label] = judge_tab(site, tab)
        _run_where_looked_at(tabs, timers)
        programs(site)
    return page


def _run_where_looked_at(tabs: gr.Tabs, timers: dict[str, gr.Timer]) -> None:
    """Each timer runs while its tab is the open one."""

    def turn(event: gr.SelectData) -> list[gr.Timer]:
        return [gr.Timer(active=name == event.value) for name in timers]

    tabs.select(turn, None, list(timers.values()), trigger_mode="multiple", **QUIET)
