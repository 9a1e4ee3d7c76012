"""Look inside: features while an image is denoised, what probes found in every block, reconstructions of masked autoencoders."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from app import render
from app.catalog import all_results, autoencoders, sources, variants
from app.inside import reconstruct, sample_features
from app.judge_tab import measured
from app.label_list import label_list
from app.plots import Line, plot, text
from app.sampler import Frame
from app.settings import MAX_SEED, MAX_SIDES, Comparison, Settings, Side, whole
from app.settings_panel import from_widget
from app.site import AS_SENT, AT_ONCE, LATEST, QUIET, WATCHING, Site, Updates, clears, page_errors, streams
from models.files import read_json

SHIPPED_PROBES = Path(__file__).parent.parent / "eval" / "results" / "openmoji-probes.json"


def look_tab(site: Site, tab: gr.Tab) -> None:
    """The widgets of the tab, and what they do."""
    with gr.Accordion("Features of an image while it is denoised", open=True):
        _features_section(site, tab)
    with gr.Accordion("What probes found in every block", open=True):
        _probes_section(site, tab)
    with gr.Accordion("Masked autoencoders: hide patches, and paint them in", open=True):
        _autoencoders_section(site, tab)


def _features_section(site: Site, tab: gr.Tab) -> None:
    first = site.first_comparison()
    names = [side.checkpoint for side in first.sides] if first else []
    id = gr.State(None)
    gr.Markdown("Every patch as a colour, by the three principal components of a block's features, from the first step down to the last.")
    with gr.Row():
        many = dict(multiselect=True, max_choices=MAX_SIDES)
        chosen = gr.Dropdown(list(variants(site.runs)), value=names, label="Checkpoints", scale=3, min_width=260, elem_id="inside", **many)
        label = label_list(site, names, chosen, label="Label", scale=2, min_width=180, elem_id="inside-label")
        seed = gr.Number(0, label="Seed", min_width=100, elem_id="inside-seed")
        start = gr.Button("Look", variant="primary", min_width=110, elem_id="look")
        stop = gr.Button("Stop looking", interactive=False, min_width=110, elem_id="stop-look")
    status = gr.HTML(render.message(""), elem_id="look-status")
    maps = gr.HTML('<p class="empty small">Press <b>Look</b>.</p>', elem_id="maps", apply_default_css=False)

    def ask(names: list[str], label: str, seed: int, request: gr.Request) -> str:
        with page_errors():
            if not names:
                raise ValueError("choose a checkpoint first")
            settings = Settings(label=from_widget(label), seed=seed, num_images=1)
            asked = Comparison(settings, tuple(map(Side, names))).settled()
            return site.studio.ask(lambda: sample_features(asked, site.runs), request.session_hash, asked).id

    @streams
    async def watch(id: str) -> AsyncIterator[Updates]:
        with page_errors():
            sampling = site.studio.kept(id)
        yield {status: render.waiting(0), start: gr.update(interactive=False), stop: gr.update(interactive=True)}
        moments: tuple[int, ...] = ()
        async for _, frame, position in site.studio.watch(sampling):
            if frame is None:
                yield {status: render.waiting(position)}
                continue
            new = {maps: await asyncio.to_thread(_maps, frame)} if frame.recipe["moments"] != moments else {}
            moments = frame.recipe["moments"]
            yield {status: render.progress(frame), **new}
        yield {status: render.message(sampling.ending), start: gr.update(interactive=True), stop: gr.update(interactive=False)}

    clears([start.click], status)
    start.click(ask, [chosen, label, seed], id, **AS_SENT).success(watch, id, [maps, status, start, stop], **WATCHING)
    stop.click(site.studio.stop, id, None, **AT_ONCE)
    tab.select(lambda: gr.update(choices=list(variants(site.runs))), None, chosen, **AT_ONCE)


def _maps(frame: Frame) -> str:
    """A table for each checkpoint: a row for each moment, a column for each block."""
    recipe, images, tables = frame.recipe, list(frame.images), []
    for i, side in enumerate(recipe["checkpoints"]):
        blocks = recipe["blocks"][i]
        columns, images = images[: 1 + len(blocks)], images[1 + len(blocks) :]
        heads = ["Step", "Image", *(f"Block {block}" for block in blocks)]
        rows = []
        for moment, step in enumerate(recipe["moments"]):
            what = [f"{side['name']} at step {step}: {head}" for head in heads[1:]]
            cells = "".join(_cell(column[moment], alt) for column, alt in zip(columns, what, strict=True))
            rows.append(f"<tr><td>{step}</td>{cells}</tr>")
        caption = f'<h3><span class="letter" data-side="{render.SIDES[i]}">{render.SIDES[i]}</span> {text(side["name"])}</h3>'
        tables.append(caption + render.facts_table(heads, rows))
    return f'<div class="maps">{"".join(tables)}</div>'


def _cell(image: Any, alt: str) -> str:
    return f'<td><img src="{render.png_url(image)}" alt="{text(alt)}"></td>'


def _probes_section(site: Site, tab: gr.Tab) -> None:
    names = gr.Dropdown([], value=[], multiselect=True, label="Checkpoints that were probed", max_choices=MAX_SIDES, elem_id="probed")
    shown = gr.HTML("", elem_id="probes", apply_default_css=False)

    def offer(names: list[str]) -> Any:
        found = probed(site)
        return _offered(list(found), names, _first_probed(site, found))

    def curves(names: list[str]) -> str:
        found = probed(site)
        if not found:
            how = "<code>eval/probe.py</code> does it" + ", or <b>Probes</b> under <b>Judge</b>" * (site.jobs is not None)
            return f'<p class="empty small">No checkpoint was probed yet; {how}.</p>'
        return probe_curves([name for name in names if name in found], found)

    names.input(curves, names, shown, **LATEST)
    tab.select(offer, names, names, **AS_SENT).success(curves, names, shown, **AS_SENT)


def _offered(known: list[str], names: list[str], first: list[str]) -> Any:
    """What a list offers, and without those that are gone what is chosen of it, or else `first`.

    Where none is gone nothing is chosen here: what the visitor chose meanwhile would snap back.
    """
    there = [name for name in names if name in known] or first
    return gr.update(choices=known) if there == names else gr.update(choices=known, value=there)


def _first_probed(site: Site, found: dict[str, dict[str, Any]]) -> list[str]:
    """The pair that visitors see first, else two that were probed with the same images."""
    first = site.first_comparison()
    names = [side.checkpoint for side in first.sides if side.checkpoint in found] if first else []
    names = names or list(found)[:1]
    alike = (
        name for name in found if name not in names and all(found[name].get("dataset") == found[each].get("dataset") for each in names)
    )
    return [*names, *alike][:2]


def probed(site: Site) -> dict[str, dict[str, Any]]:
    """Checkpoints -> what eval/probe.py told of them, the newest; the shipped ones were probed before they were shipped."""
    found, known, there = {}, measured(site.jobs), all_results(site.runs)
    shipped = {Path(each["checkpoint"]).name: each for each in read_json(SHIPPED_PROBES)["entries"]}
    for name in sources(site.runs):
        numbers = [*known[name], *there.get(name, ()), *([shipped[name]] if name in shipped else ())]
        told = [each for each in numbers if isinstance(each.get("results"), list)]
        if told:
            found[name] = told[0]
    return dict(sorted(found.items(), key=lambda each: each[1].get("alpha_min") or 1, reverse=True))  # plain ones have the first colour


def probe_curves(names: Sequence[str], found: dict[str, dict[str, Any]]) -> str:
    """Accuracy and rank of every block, and the spectrum of the best one."""
    if not names:
        return '<p class="empty small">Choose a checkpoint above.</p>'
    accuracy, neighbours, rank, spectrum, notes = [], [], [], [], []
    for colour, name in enumerate(names):
        told = found[name]
        best = told["best"]
        rows = [row for row in told["results"] if (row["time"], row["pooling"]) == (best["time"], best["pooling"])]
        blocks = [row["block"] for row in rows]
        k = "20" if "20" in rows[0]["knn"] else next(iter(rows[0]["knn"]))
        accuracy.append(Line(name, blocks, [100 * row["linear"]["value"] for row in rows], colour))
        neighbours.append(Line(name, blocks, [100 * row["knn"][k]["value"] for row in rows], colour))
        rank.append(Line(name, blocks, [row["rank_entropy"] for row in rows], colour))
        values = next((row.get("spectrum") for row in rows if row["block"] == best["block"]), None) or []
        spectrum.append(Line(name, range(1, len(values) + 1), values, colour))
        notes.append(f'<p class="result"><b>{text(name)}</b>: {render.result_words(told)}</p>')
    plots = (
        plot(accuracy, "Linear probe, % right", "block")
        + plot(neighbours, "kNN, % right", "block")
        + plot(rank, "Effective rank (entropy)", "block")
        + plot(spectrum, "Singular values of the best block", "number", logarithmic=True)
    )
    return f'<div class="plots">{plots}</div>{"".join(notes)}'


def _autoencoders_section(site: Site, tab: gr.Tab) -> None:
    with gr.Row():
        names = gr.Dropdown(
            [], value=[], multiselect=True, label="Masked autoencoders", max_choices=MAX_SIDES, min_width=240, elem_id="maes"
        )
        picture = gr.File(label="A picture", file_types=["image"], height=120, min_width=200, elem_id="mae-picture")
        ratio = gr.Slider(0.05, 0.95, 0.75, step=0.05, label="Share of hidden patches", buttons=[], min_width=180, elem_id="mask-ratio")
        seed = gr.Number(0, label="Seed of the mask", min_width=110, elem_id="mask-seed")
    start = gr.Button("Hide and paint", variant="primary", elem_id="reconstruct")
    shown = gr.HTML("", elem_id="reconstructions", apply_default_css=False)

    def paint(names: list[str], picture: str | None, ratio: float, seed: int) -> str:
        with page_errors():
            if not names:
                raise ValueError("choose a masked autoencoder; train one with a preset that begins with mae")
            if not picture:
                raise ValueError("give a picture")
            seed = whole("the seed of the mask", seed, 0, MAX_SEED)
            heads = ("", "Picture", "Visible", "Painted")
            rows = []
            for name, images in reconstruct(names, site.runs, Path(picture), ratio, seed):
                cells = "".join(_cell(image, f"{name}: {head}") for image, head in zip(images, heads[1:], strict=True))
                rows.append(f"<tr><td>{text(name)}</td>{cells}</tr>")
            note = "Where a network predicts normalised pixels, brightness and contrast of each hidden patch are the picture's own."
            return f'<div class="maps">{render.facts_table(heads, rows)}</div><p class="protocol">{note}</p>'

    def offer(names: list[str]) -> Any:
        known = list(autoencoders(site.runs))
        return _offered(known, names, known[:2])

    start.click(paint, [names, picture, ratio, seed], shown, **QUIET)
    tab.select(offer, names, names, **AS_SENT)
