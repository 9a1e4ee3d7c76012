"""Images and facts -> HTML. Every text from outside passes through `text`."""

import base64
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from app import recipe as recipes
from app.catalog import Card
from app.plots import Line, plot, text
from app.sampler import Frame
from app.settings import NO_LABEL, OWN_SAMPLER, steps_in_words
from app.votes import Tally

SIDES = "ABCD"
TILE_PX, SMALL_TILE_PX = 128, 64  # edges on the page that enlarged images come near to; the small one for many images and narrow screens
FEW_IMAGES = 16
MAX_THUMB_PX = 96  # the history shows them at 48
FEW_LABELS = 3
OWN_WORDS = {"label": "label", "seed": "seed", "steps": "steps", "guidance_scale": "guidance", "sampler": "sampler"}


def png_url(image: np.ndarray, recipe: dict[str, Any] | None = None) -> str:
    """uint8 (H, W, C) -> a PNG of that size as a data URL, with its recipe if there is one."""
    return "data:image/png;base64," + base64.b64encode(recipes.to_png(image, recipe)).decode()


def stage(frame: Frame) -> str:
    """The galleries of a comparison, and what some views need: which side, the next one, the handle that is dragged."""
    sides = frame.recipe["checkpoints"]
    galleries = "".join(
        gallery(SIDES[i], side["name"], _kind(side["alpha_min"]), images, frame, i, _own(side))
        for i, (side, images) in enumerate(zip(sides, frame.images, strict=True))
    )
    others = "".join(f'<button type="button" data-second="{side}">{side}</button>' for side in SIDES[1 : len(sides)])
    pick = f'<div class="pick" role="group" aria-label="Compare A with">A with {others}</div>' if len(sides) > 2 else ""
    flick = '<button type="button" class="flick">Show the next one</button>' if len(sides) > 1 else ""
    divider = '<input class="divider" type="range" min="0" max="100" value="50" step="0.5" aria-label="Divider">' if len(sides) > 1 else ""
    return f'{pick}{flick}<div class="stage" data-sides="{len(sides)}">{galleries}{divider}</div>'


def empty_stage(has_checkpoints: bool, trains: bool) -> str:
    """What stands where the galleries will be; `trains`: this page can train some."""
    if has_checkpoints:
        return '<p class="empty">Press <b>Compare</b>: all checkpoints start from the same noise, image by image.</p>'
    where = "under <b>Train</b> or in a shell" if trains else "in a shell"
    return (
        f'<div class="empty"><b>There is no checkpoint yet.</b><p>Train a small pair in a few minutes, {where}:</p>'
        "<pre>accelerate launch --quiet training/train_diffusion.py --preset demo-plain\n"
        "accelerate launch --quiet training/train_diffusion.py --preset demo-decayed</pre>"
        "<p>Other folders of runs are shown with <code>python -m app --runs DIR</code>.</p></div>"
    )


def gallery(letter: str, name: str, kind: str, images: np.ndarray, frame: Frame, side: int | None, own: str = "") -> str:
    """A figure of images.

    Args:
        letter, name, kind: for the caption; `kind` is HTML.
        side: whose recipe the finished images carry; None: they carry none, and tell no seed.
        own: which settings differ from the shared ones.
    """
    edge_px = images.shape[1]
    scale, small_scale = (max(1, target // edge_px) for target in (TILE_PX, SMALL_TILE_PX))
    few = len(images) <= FEW_IMAGES
    scale = scale if few else small_scale
    sizes = {
        "edge": f"{edge_px}px",
        "scale": scale,
        "small-scale": small_scale,
        "slider-scale": scale + scale // 2,  # there is twice the width, and the multiple stays whole
        "wide-columns": min(len(images), 4 if few else 8),
    }
    style = ";".join(f"--{key}:{value}" for key, value in sizes.items())
    told = frame.recipe["checkpoints"][side]["own"] if side is not None else {}
    seed = told.get("seed", frame.recipe["seed"])
    state = "" if frame.done else f", step {frame.step}"
    tiles = []
    for i, image in enumerate(images):
        recipe = recipes.of_image(frame.recipe, side, i) if frame.done and side is not None else None
        which = f", seed {seed + i}" if side is not None else ""
        alt = f"{text(name)}, image {i + 1} of {len(images)}{which}{state}"
        file = f"{name.replace('/', '-').replace(' ', '-')}-seed-{seed + i}.png" if recipe else ""
        tiles.append(
            f'<button type="button" class="tile" data-index="{i}" data-file="{text(file)}"'
            f' title="image {i + 1}{which}; click for full screen">'
            f'<img src="{png_url(image, recipe)}" width="{edge_px}" height="{edge_px}" alt="{alt}"></button>'
        )
    flag = f'<span class="flag" title="settings of its own">{own}</span>' if own else ""
    return (
        f'<figure class="side" data-side="{letter}" style="{style}">'
        f'<figcaption><span class="letter">{letter}</span><span class="name">{text(name)}</span><span class="kind">{kind}</span>{flag}'
        '<span class="measured"></span></figcaption>'
        f'<div class="tiles">{"".join(tiles)}</div></figure>'
    )


def _kind(alpha_min: float) -> str:
    return "" if alpha_min == 1 else f"α<sub>min</sub> {alpha_min:g}"


def _own(side: dict[str, Any]) -> str:
    """The overrides of a side, in words."""
    return ", ".join(f"{OWN_WORDS[name]} {text(NO_LABEL if value is None else value)}" for name, value in side["own"].items())


def progress(frame: Frame) -> str:
    """A bar with the time left."""
    left_s = frame.wall_s / frame.step * (frame.num_steps - frame.step)
    return (
        f'<div class="status"><progress max="{frame.num_steps}" value="{frame.step}" aria-label="Sampling"></progress>'
        f"<span>step {frame.step} of {frame.num_steps} · {left_s:.1f} s left</span></div>"
    )


def status(frame: Frame) -> str:
    """One line: what the finished images were made with."""
    recipe = frame.recipe
    samplers = " and ".join(dict.fromkeys(side["sampler"] for side in recipe["checkpoints"]))
    facts = [
        " + ".join(str(len(images)) for images in frame.images) + f" images in {frame.wall_s:.1f} s",
        f"<b>seed {recipe['seed']}</b>",
        f"{text(samplers)}, {steps_in_words(recipe['steps'])}",
        NO_LABEL if recipe["label"] is None else f"{text(recipe['label'])}, guidance {recipe['guidance_scale']:g}",
        recipe["precision"],
    ]
    if not recipe["same_noise"]:
        facts.append("<b>the noise is not the same: image sizes or seeds differ</b>")
    return f'<div class="status" role="status">{" · ".join(facts)}</div>'


def message(words: str) -> str:
    """A status line of plain words."""
    return f'<div class="status" role="status">{text(words)}</div>'


def waiting(position: int) -> str:
    """The place in the queue."""
    return message("Starting …" if position == 0 else f"In the queue: {position} before you.")


def history(items: Sequence[tuple[str, Frame]]) -> str:
    """What this visitor has sampled, the newest first: ids and last frames."""
    if not items:
        return '<p class="empty small">Finished comparisons of this visit gather here.</p>'
    rows = []
    for id, frame in items:
        recipe = frame.recipe
        names = " · ".join(text(side["name"]) + (f" ({own})" if (own := _own(side)) else "") for side in recipe["checkpoints"])
        pictures = "".join(f'<img src="{png_url(_thumbnail(images[0]))}" alt="">' for images in frame.images)
        label = text(NO_LABEL if recipe["label"] is None else recipe["label"])
        facts = f"{label}, seed {recipe['seed']}, {steps_in_words(recipe['steps'])}"
        rows.append(
            f'<li><span class="thumbs">{pictures}</span><span class="what"><b>{names}</b><br>{facts}</span>'
            f'<button type="button" data-do="back" data-id="{id}">Bring back</button>'
            f'<button type="button" data-do="add" data-id="{id}">Add</button></li>'
        )
    return f'<ul class="history">{"".join(rows)}</ul>'


def _thumbnail(image: np.ndarray) -> np.ndarray:
    """uint8 (H, W, C), averaged down to what the history shows: it is sent whole after every comparison."""
    factor = -(-image.shape[0] // MAX_THUMB_PX)
    height, width = (edge - edge % factor for edge in image.shape[:2])
    return image[:height, :width].reshape(height // factor, factor, width // factor, factor, -1).mean(axis=(1, 3)).astype(np.uint8)


def tallies(pairs: Sequence[Tally]) -> str:
    """Votes of every pair: the win rate with its interval."""
    if not pairs:
        return '<p class="empty small">Nobody has voted yet.</p>'
    rows = []
    for pair in pairs:
        rate = "–"
        if pair.win_rate is not None and pair.interval is not None:
            low, high = pair.interval
            rate = f"<b>{pair.win_rate:.0%}</b> [{low:.0%}, {high:.0%}]"
        counts = (pair.first_wins, pair.second_wins, pair.ties, pair.both_bad)
        cells = "".join(f"<td>{value}</td>" for value in (text(pair.first), text(pair.second), rate, *counts))
        rows.append(f"<tr>{cells}</tr>")
    titles = ("First", "Second", "First wins (95 %)", "Votes for the first", "Votes for the second", "Tie", "Both bad")
    note = "A tie is half a win for each, “both bad” is left out; Wilson intervals."
    return f'{facts_table(titles, rows)}<p class="protocol">{note}</p>'


def facts_table(titles: Sequence[str], rows: Sequence[str]) -> str:
    """Rows of HTML under titles."""
    head = "".join(f'<th scope="col">{title}</th>' for title in titles)
    return f'<div class="wide"><table class="facts"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


# -------------------------------------------------------------------------------------------------------------------- cards


def table(cards: Mapping[str, Card], results: Sequence[Sequence[dict[str, Any]]]) -> str:
    """The cards of checkpoints as one table; rows in which they differ stand out.

    Args:
        cards: by the letters of their sides.
        results: of each checkpoint, see `catalog.results`.
    """
    if not cards:
        return ""
    heads = "".join(
        f'<th scope="col"><span class="letter" data-side="{side}">{side}</span> {text(card.name)}</th>' for side, card in cards.items()
    )
    rows = []
    facts = [_facts(card) for card in cards.values()]
    for fact in facts[0]:
        values = [each[fact] for each in facts]
        differs = ' class="differs"' if len(set(values)) > 1 else ""
        rows.append(_row(fact, values, differs))
    rows.append(_row("α by depth", [_alpha_curve(card, SIDES.index(side)) for side, card in cards.items()]))
    rows.append(
        _row("Results", ["".join(f'<p class="result">{result_words(each)}</p>' for each in found) or "none yet" for found in results])
    )
    head, style = f"<thead><tr><td></td>{heads}</tr></thead>", f"--sides: {len(cards)}"
    return f'<div class="wide"><table class="cards" style="{style}">{head}<tbody>{"".join(rows)}</tbody></table></div>'


def _row(fact: str, values: Iterable[str], attributes: str = "") -> str:
    return f'<tr{attributes}><th scope="row">{fact}</th>' + "".join(f"<td>{value}</td>" for value in values) + "</tr>"


def _alpha_curve(card: Card, colour: int) -> str:
    return plot([Line("", range(1, len(card.alphas) + 1), card.alphas, colour)], "α of each sub-layer", "sub-layer", low=0.0)


def _facts(card: Card) -> dict[str, str]:
    """Title -> HTML."""
    config, training = card.config, card.training
    depth = (
        f"{config['depth']} blocks of width {config['dim']}" if "depth" in config else f"widths {', '.join(map(str, config['channels']))}"
    )
    patch = f", patch {config['patch_size']}" if "patch_size" in config else ""
    skips = "long skips" if config.get("long_skips", True) else "no long skips"
    edge = config["image_size"]
    return {
        "α<sub>min</sub>": "1 (plain)" if card.is_plain else f"{card.alpha_min:g}" if card.alpha_min < 1 else "none",
        "Shortcuts": text(card.shortcuts),
        "α<sub>eff</sub>": f"{card.alpha_eff:.2g}",
        "Backbone": text(f"{card.backbone}, {depth}{patch}, {skips}"),
        "Parameters": f"{card.num_parameters / 1e6:.2f} M",
        "Image size": text(f"{edge} × {edge} {'px' if config['in_channels'] == 3 else 'latent cells'}"),
        "Labels": _labels(card.class_names),
        "Trained on": text(training.get("data", "unknown")),
        "Steps of the last training": count(training.get("steps")),
        "Images seen in all": count(training.get("images_seen")),
        "Weights": "averaged (EMA)" if card.averaged else "as trained",
    }


def _labels(names: Sequence[str]) -> str:
    """How many and the first few, which unfold to all."""
    few = text(f"{len(names)}: {', '.join(names[:FEW_LABELS])}") if names else "none"
    if len(names) <= FEW_LABELS:
        return few
    return f"<details><summary>{few}, …</summary>{text(', '.join(names[FEW_LABELS:]))}</details>"


def count(value: Any) -> str:
    """A number with its thousands apart; "unknown" if it is none."""
    return f"{value:,}" if isinstance(value, int | float) else "unknown"


def result_words(result: dict[str, Any]) -> str:
    """A number with its interval and its protocol."""
    value = f"{result['value']:.4g}"
    interval = f" [{result['low']:.4g}, {result['high']:.4g}]" if {"low", "high"} <= result.keys() else ""
    return f'<b>{text(result["metric"])} {value}</b>{text(interval)} <span class="protocol">{text(protocol(result))}</span>'


def protocol(result: dict[str, Any]) -> str:
    """How a number was taken, in one line."""
    facts = []
    if result.get("reference"):
        split = f" ({result['reference_split']})" if result.get("reference_split") else ""
        facts.append(
            f"{count(result.get('num_samples'))} samples against {count(result.get('reference_num'))} of {result['reference']}{split}"
        )
        facts.append(str(result.get("feature_extractor")))
    elif result.get("dataset"):
        facts.append(f"{count(result.get('test_num'))} images of {result['dataset']}, fitted to {count(result.get('train_num'))}")
    if result.get("sampler"):
        interval = f" from {result['guidance_interval']}" if result.get("guidance_interval") not in (None, "0 to 1") else ""
        facts.append(f"{result['sampler']}, {steps_in_words(result.get('steps'))}, guidance {result.get('guidance_scale', 1):g}{interval}")
    facts += [f"guided by {result['guide']}"] if result.get("guide") else []
    facts += [f"labels {result['labels']}"] if result.get("labels") else []
    facts += [str(result["precision"])] if result.get("precision") else []
    return ", ".join([*facts, *of_a_row(result)])


OF_A_ROW = ("ema", "images_seen", "seed", "best", "notes")


def of_a_row(result: dict[str, Any]) -> list[str]:
    """What of a protocol may differ from row to row of one table; the fields are `OF_A_ROW`."""
    facts = ["EMA" if result["ema"] else "raw weights"] if isinstance(result.get("ema"), bool) else []
    facts += [f"{count(result['images_seen'])} images seen"] if result.get("images_seen") is not None else []
    facts += [f"seed {result['seed']}"] if result.get("seed") is not None else []
    best = result["best"] if isinstance(result.get("best"), dict) else {}
    if "block" in best:
        facts.append(f"block {best['block']}" + ("" if best.get("time") is None else f", t = {best['time']}"))
        facts += [f"chosen by {best['chosen_by']}"] if best.get("chosen_by") else []
    notes = result.get("notes")
    return facts + [str(note) for note in notes if isinstance(note, str)] if isinstance(notes, list) else facts


# `models.pipeline` has them too, and is not imported here: it takes seconds
SAMPLERS = {
    OWN_SAMPLER: "Its own",
    "euler": "Euler",
    "heun": "Heun (two evaluations a step)",
    "dpm++": "DPM-Solver++",
    "unipc": "UniPC",
    "ddim": "DDIM (for DDPMs)",
    "ddpm": "DDPM (for DDPMs)",
}
