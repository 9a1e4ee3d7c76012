"""Images and facts -> HTML. Every text from outside passes through `_text`."""

import base64
import html
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from app.catalog import Card
from app.sampler import Frame

SIDES = "ABCD"
TILE_PX, SMALL_TILE_PX = 128, 64  # edges on the page that enlarged images come near to; the small one for many images and narrow screens
FEW_IMAGES = 16


def png_url(image: np.ndarray) -> str:
    """uint8 (H, W, C) -> a PNG of that size as a data URL."""
    file = io.BytesIO()
    Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(file, format="png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def stage(cards: Sequence[Card], frame: Frame) -> str:
    """The galleries of a comparison, and the handle that the slider view drags."""
    return (
        '<div class="stage">'
        + "".join(_gallery(side, card, images, frame) for side, card, images in zip(SIDES, cards, frame.images, strict=False))
        + '<input class="divider" type="range" min="0" max="100" value="50" step="0.5" aria-label="Divider between A and B"></div>'
    )


def empty_stage(has_checkpoints: bool) -> str:
    """What stands where the galleries will be."""
    if has_checkpoints:
        return '<p class="empty">Press <b>Compare</b>: both checkpoints start from the same noise, image by image.</p>'
    return (
        '<div class="empty"><b>There is no checkpoint yet.</b><p>Train a small pair in a few minutes, then reload this page:</p>'
        "<pre>accelerate launch --quiet training/train_diffusion.py --preset demo-plain\n"
        "accelerate launch --quiet training/train_diffusion.py --preset demo-decayed</pre>"
        "<p>Other folders of runs are shown with <code>python -m app --runs DIR</code>.</p></div>"
    )


def _gallery(side: str, card: Card, images: np.ndarray, frame: Frame) -> str:
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
    seed, name = frame.recipe["seed"], _text(card.name)
    state = "" if frame.done else f", step {frame.step}"
    tiles = "".join(
        f'<img src="{png_url(image)}" width="{edge_px}" height="{edge_px}" title="seed {seed + i}"'
        f' alt="{name}, image {i + 1} of {len(images)}, seed {seed + i}{state}">'
        for i, image in enumerate(images)
    )
    kind = "plain" if card.is_plain else f"α<sub>min</sub> {card.alpha_min:g}" if card.alpha_min < 1 else _text(card.shortcuts)
    return (
        f'<figure class="side" data-side="{side}" style="{style}">'
        f'<figcaption><span class="letter">{side}</span><span class="name">{name}</span><span class="kind">{kind}</span></figcaption>'
        f'<div class="tiles">{tiles}</div></figure>'
    )


def status(frame: Frame) -> str:
    """One line: how far a sampling is, or what the images were made with."""
    recipe = frame.recipe
    if not frame.done:
        left_s = frame.wall_s / frame.step * (frame.num_steps - frame.step)
        return (
            f'<div class="status"><progress max="{frame.num_steps}" value="{frame.step}" aria-label="Sampling"></progress>'
            f"<span>step {frame.step} of {frame.num_steps} · {left_s:.1f} s left · seed {recipe['seed']}</span></div>"
        )
    facts = [
        " + ".join(str(len(images)) for images in frame.images) + f" images in {frame.wall_s:.1f} s",
        f"<b>seed {recipe['seed']}</b>",
        f"{recipe['sampler']}, {recipe['num_inference_steps']} steps",
        "no label" if recipe["label"] is None else f"{_text(recipe['label'])}, guidance {recipe['guidance_scale']:g}",
        recipe["precision"],
    ]
    if not recipe["same_noise"]:
        facts.append("<b>image sizes differ, so the noise is not the same</b>")
    return f'<div class="status">{" · ".join(facts)}</div>'


def message(text: str) -> str:
    """A status line of plain words."""
    return f'<div class="status">{_text(text)}</div>'


def table(cards: Sequence[Card]) -> str:
    """The cards of checkpoints as one table; rows in which they differ stand out."""
    heads = "".join(
        f'<th scope="col"><span class="letter">{side}</span> {_text(card.name)}</th>' for side, card in zip(SIDES, cards, strict=False)
    )
    rows = []
    for fact, values in zip(FACTS, zip(*map(_facts, cards), strict=True), strict=True):
        differs = ' class="differs"' if len(set(values)) > 1 else ""
        rows.append(f'<tr{differs}><th scope="row">{fact}</th>' + "".join(f"<td>{value}</td>" for value in values) + "</tr>")
    return f'<table class="cards"><thead><tr><td></td>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table>'


FACTS = (
    "α<sub>min</sub>",
    "Shortcuts",
    "α<sub>eff</sub>",
    "Backbone",
    "Parameters",
    "Images",
    "Labels",
    "Trained on",
    "Images seen",
    "Weights",
)


def _facts(card: Card) -> tuple[str, ...]:
    config, training = card.config, card.training
    depth = (
        f"{config['depth']} blocks of width {config['dim']}" if "depth" in config else f"widths {', '.join(map(str, config['channels']))}"
    )
    patch = f", patch {config['patch_size']}" if "patch_size" in config else ""
    skips = "long skips" if config.get("long_skips", True) else "no long skips"
    seen = f"{training['images_seen']:,}" if "images_seen" in training else "unknown"
    return (
        "1 (plain)" if card.is_plain else f"{card.alpha_min:g}" if card.alpha_min < 1 else "none",
        _text(card.shortcuts),
        f"{card.alpha_eff:.2g}",
        _text(f"{card.backbone}, {depth}{patch}, {skips}"),
        f"{card.num_parameters / 1e6:.2f} M",
        _text(f"{config['image_size']} × {config['image_size']} {'px' if config['in_channels'] == 3 else 'latent cells'}"),
        f'<span title="{_text(", ".join(card.class_names))}">{len(card.class_names) or "none"}</span>',
        _text(training.get("data", "unknown")),
        _text(seen),
        "averaged (EMA)" if card.averaged else "as trained",
    )


def _text(value: object) -> str:
    # braces too: Gradio's HTML component fills templates
    return html.escape(str(value)).replace("{", "&#123;").replace("}", "&#125;").replace("$", "&#36;")
