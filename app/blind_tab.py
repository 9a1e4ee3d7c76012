"""Blind test: which of two checkpoints drew better, asked without telling which is which."""

import asyncio
import secrets
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import gradio as gr

from app import render
from app.catalog import cards_of, shared_classes, variants
from app.label_list import label_list
from app.sampler import Frame, sample
from app.settings import Comparison, Settings, Side
from app.settings_panel import from_widget
from app.site import AS_SENT, QUIET, WATCHING, Site, Updates, page_errors, sent, streams
from app.studio import DONE
from app.votes import BOTH_BAD, LEFT, RIGHT, TIE, Ballot
from models.files import temporary_folder, written_aside

IMAGES = 6
CHOICES = {LEFT: "Left is better", RIGHT: "Right is better", TIE: "Equally good", BOTH_BAD: "Both bad"}


def blind_tab(site: Site, page: gr.Blocks, tab: gr.Tab) -> None:
    """The widgets of the tab, and what they do."""
    first = site.first_comparison()
    voter = gr.BrowserState(None, storage_key="fading-shortcuts-voter", secret="no secret")
    asked = gr.State(None)  # (ballot, id of the sampling), which stay on this side
    shown = gr.State(None)  # the ballot whose finished pictures are on the page: votes are about these
    csv_lock = threading.Lock()
    names = list(variants(site.runs))
    gr.Markdown("Two checkpoints draw from the same noise, on sides that are drawn by lot. Vote, and their names are shown.")
    with gr.Row():
        sides = [side.checkpoint for side in first.sides] if first else []
        one, other = (
            gr.Dropdown(names, value=sides[i] if i < len(sides) else None, label=label, min_width=200, elem_id=f"blind-{i}")
            for i, label in enumerate(("One checkpoint", "The other"))
        )
        label = label_list(site, sides, one, other, label="Label of the pictures", min_width=180, elem_id="blind-label")
        start = gr.Button("Show a pair", variant="primary", min_width=140, elem_id="blind-start")
    status = gr.HTML(render.message(""), elem_id="blind-status")
    stage = gr.HTML('<p class="empty">Press <b>Show a pair</b>, look, and vote.</p>', elem_id="blind-stage", apply_default_css=False)
    with gr.Row():
        buttons = [gr.Button(words, interactive=False, min_width=120, elem_id=f"vote-{i}") for i, words in enumerate(CHOICES.values())]
    tallies = gr.HTML(render.tallies([]), elem_id="tallies", apply_default_css=False)
    export = gr.DownloadButton("All votes as CSV", size="sm", elem_id="votes-csv")
    csv_file = temporary_folder(Path(export.GRADIO_CACHE)) / "votes.csv"  # of files elsewhere Gradio keeps a copy of every version

    def votable(yes: bool) -> Updates:
        return dict.fromkeys(buttons, gr.update(interactive=yes))

    def ask(one: str, other: str, label: str, voter: str | None, request: gr.Request) -> tuple[tuple[Ballot, str], str]:
        """A ballot, and the sampling of its pictures."""
        with page_errors():
            voter = voter if isinstance(voter, str) and voter else secrets.token_urlsafe(16)
            if not one or not other:
                raise ValueError("choose two checkpoints")
            if one == other:
                raise ValueError(f"{one} cannot be compared with itself; choose two checkpoints")
            settings = Settings(label=from_widget(label), seed=secrets.randbelow(2**31), num_images=IMAGES)
            cards = cards_of((one, other), site.runs)
            if all(each.class_names for each in cards) and not shared_classes(*cards):
                raise ValueError(f"{one} and {other} share no label, so their pictures tell which is which; choose two that do")
            names = [f"{each.name} ({each.source.hash})" for each in cards]  # a run that goes on training is another one then
            recipe = {**vars(settings), "checkpoints": [{"name": each.name, "sha256": each.source.hash} for each in cards]}
            ballot = site.votes.new_ballot((names[0], names[1]), recipe, voter)
            shown = [(one, other)[ballot.left], (one, other)[ballot.right]]
            pair = Comparison(settings, tuple(map(Side, shown)))
            return (ballot, site.studio.ask(lambda: sample(pair, site.runs), request.session_hash).id), voter

    @streams
    async def watch(asked: tuple[Ballot, str] | None) -> AsyncIterator[Updates]:
        with page_errors():
            drawn, id = asked or (None, None)
            sampling = site.studio.kept(id)
        yield {status: render.waiting(0), start: gr.update(interactive=False), shown: None, **votable(False)}
        async for _, frame, position in site.studio.watch(sampling):
            if frame is None:
                yield {status: render.waiting(position)}
            elif not frame.done:
                preview = await asyncio.to_thread(unnamed, frame)
                yield {stage: preview, status: render.progress(frame)}
                await sent(preview)
        end = {status: render.message(sampling.ending), start: gr.update(interactive=True)}
        if sampling.state == DONE:
            pictures = await asyncio.to_thread(unnamed, sampling.result)
            end |= {stage: pictures, status: render.message("Which side is better?"), shown: drawn, **votable(True)}
        yield end

    def vote(choice: str, ballot: Ballot | None) -> Updates:
        with page_errors():
            if ballot is None:
                raise ValueError("ask for a pair of pictures first")
            cast = site.votes.vote(ballot.id, choice)
            words = f"Your vote: {CHOICES[cast.choice].lower()}. Left was {_bare(cast.left)}, right was {_bare(cast.right)}."
            return {status: render.message(words), **counted(), **votable(False)}

    def refresh(one_now: str | None, other_now: str | None) -> Updates:
        """Runs come and go. What stays chosen is not sent: a newer choice would snap back."""
        known = list(variants(site.runs))
        with page_errors():
            updates = counted()
        for widget, name in ((one, one_now), (other, other_now)):
            gone = {"value": None} if name not in known else {}
            updates[widget] = gr.update(choices=known, **gone)
        return updates

    def counted() -> Updates:
        """The table, and the file to download."""
        with csv_lock, written_aside(csv_file) as aside:  # written aside by one visitor at a time
            aside.write_text(site.votes.to_csv(), encoding="utf-8")
        return {tallies: render.tallies(site.votes.tallies()), export: str(csv_file)}

    start.click(ask, [one, other, label, voter], [asked, voter], **AS_SENT).success(
        watch, asked, [stage, status, start, shown, *buttons], **WATCHING
    )
    for button, choice in zip(buttons, CHOICES, strict=True):
        button.click(lambda ballot, choice=choice: vote(choice, ballot), shown, [status, tallies, export, *buttons], **QUIET)
    tab.select(refresh, [one, other], [one, other, tallies, export], **AS_SENT)


def unnamed(frame: Frame) -> str:
    """Both sides without a word of whose they are."""
    halves = (
        render.gallery(letter, side, "", images, frame, None)
        for letter, side, images in zip("12", (LEFT, RIGHT), frame.images, strict=True)
    )
    return f'<div class="stage">{"".join(halves)}</div>'


def _bare(name: str) -> str:
    """Without the hash of its weights."""
    return name.rpartition(" (")[0]
