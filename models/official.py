"""Published weights <-> ours: `from_official` and `to_official`.

Kinds: sit (willisma/SiT), dit (facebookresearch/DiT), decayed-sit and decayed-mae (xiao7199/decayed_Identity_shortcuts),
uvit (baofff/U-ViT), mae (facebookresearch/mae), timm-mae (encoders alone: timm's vit_*.mae, mae_pretrain_vit_*.pth).

Not everything crosses exactly as it is:
- Tables of sine-cosine positions are compared and dropped; on the way back they are computed.
- A label table of one row is an unconditional DiT: that row is a constant, and joins the bias of the time embedding.
- A label table without a row for "no label" (U-ViT at 64 px) gets one, the mean of the others; no guidance with it.
- The authors' MAE makes skip layers that it never uses (ViT-L, ViT-H); they are dropped, and zeros on the way back.
- timm-mae has no decoder: ours stays as freshly initialised. It predicts nothing until it is trained; the features are exact.
- U-ViT's guidance scale s is ours less 1: their 0.4 is our 1.4.
- Published MAEs want images normalised by ImageNet's statistics, and still do so here (see models/convert.py).
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from inspect import signature
from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from models.registry import BACKBONES

Weights = Mapping[str, Tensor]
IMAGENET_CLASSES = 1000  # a label table of so many rows has none for "no label"; any other is taken to end with that one
_THE_SCHEDULE = dict(shortcut_schedule="linear", shortcut_placement="both", learnable_alpha=False)
POSITIONS_TOLERANCE = 1e-2  # half precision, or an average (EMA) over a table that never moved
# How U-ViT counted time in training: (time_scale, time_offset) of `models.uvit.UViT`, and the betas of a DDPM that does the same.
UVIT_TIMES: dict[str, tuple[tuple[float, float], dict[str, Any]]] = {
    # train_ldm_discrete.py: the "huge" ones, fed n = 1 .. 1000
    "discrete": ((1.0, 1.0), dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)),
    # train.py, train_ldm.py: all others, fed 999 t; the VP-SDE (beta from .1 to 20, arXiv 2011.13456) at t = (k + 1) / 1000
    "continuous": ((0.999, 0.999), dict(trained_betas=[-math.expm1(-(1e-4 + 9.95e-6 * (2 * k + 1))) for k in range(1000)])),
}


@dataclass(frozen=True)
class Kind:
    """A family of published weights.

    Attributes:
        backbone: key of `models.registry.BACKBONES`.
        source: where the weights' code is.
        mark: a name that tells these weights from the others.
        blocks: number of our blocks -> their names for them.
        names: our modules (or tensors) -> theirs; what is not here has the same name. "{i}" and "{block}" run over the blocks. Where
            ours stands for several of theirs, it is cut into 6 widths of rows for each.
        positions: their sine-cosine tables -> our buffers.
        sizes: weights -> arguments of the backbone, as far as the weights tell.
        fixed: arguments of the backbone for which the kind stands.
        defaults: arguments that the weights do not tell.
        needed: the argument that must be given, and why.
        fresh: our modules that these weights do not have.
    """

    backbone: str
    source: str
    mark: str
    blocks: Callable[[int], list[str]]
    names: dict[str, tuple[str, ...]]
    positions: dict[str, str]
    sizes: Callable[["Reader"], dict[str, Any]]
    fixed: dict[str, Any] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)
    needed: tuple[str, str] | None = None
    fresh: tuple[str, ...] = ()

    @property
    def label_table(self) -> str | None:
        """Their name of the table of labels."""
        return f"{self.names['label_embed'][0]}.weight" if "label_embed" in self.names else None


class Piece(NamedTuple):
    """One of their tensors, and the rows of ours that it is."""

    theirs: str
    ours: str
    rows: slice
    our_shape: tuple[int, ...]
    their_shape: tuple[int, ...]


class Reader:
    """Reads sizes off weights; what is missing is a ValueError that says which kind the weights are."""

    def __init__(self, kind: str, weights: Weights) -> None:
        self.kind, self.weights = kind, weights

    def shape(self, name: str, dimensions: int) -> tuple[int, ...]:
        """Of a tensor that must be there, with so many dimensions."""
        if name not in self.weights:
            raise misfit(self.kind, self.weights, [f"{name} is missing"])
        shape = tuple(self.weights[name].shape)
        if len(shape) != dimensions:
            raise misfit(self.kind, self.weights, [f"{name} has the shape {shape} instead of one of {dimensions} dimensions"])
        return shape

    def depth(self, prefix: str) -> int:
        """How many blocks there are whose name begins like that."""
        return len({match[0] for name in self.weights if (match := re.match(prefix + r"\.\d+\.", name))})

    def patches(self, name: str) -> dict[str, int]:
        """From the convolution that embeds patches."""
        dim, in_channels, patch_size, _ = self.shape(name, 4)
        return dict(dim=dim, in_channels=in_channels, patch_size=patch_size)

    def image_size(self, positions: str, extras: int, patch_size: int) -> dict[str, int]:
        """From a table of positions (1, extras + T, D); nothing if it was left away."""
        if positions not in self.weights:
            return {}
        tokens = self.shape(positions, 3)[1] - extras
        edge = math.isqrt(max(tokens, 0))
        if edge**2 != tokens:
            raise misfit(self.kind, self.weights, [f"{positions} has {tokens} patches, which make no square"])
        return dict(image_size=edge * patch_size)


def _dit_sizes(reader: Reader) -> dict[str, Any]:
    patches = reader.patches("x_embedder.proj.weight")
    return dict(
        **patches,
        **reader.image_size("pos_embed", 0, patches["patch_size"]),
        depth=reader.depth("(enc_|dec_)?blocks"),
        label_rows=reader.shape("y_embedder.embedding_table.weight", 2)[0],
        learn_sigma=reader.shape("final_layer.linear.weight", 2)[0] == 2 * patches["patch_size"] ** 2 * patches["in_channels"],
    )


def _uvit_sizes(reader: Reader) -> dict[str, Any]:
    patches, conv = reader.patches("patch_embed.proj.weight"), "final_layer.weight" in reader.weights
    label_rows = reader.shape("label_emb.weight", 2)[0] if "label_emb.weight" in reader.weights else 0
    return dict(
        **patches,
        **reader.image_size("pos_embed", 2 if label_rows else 1, patches["patch_size"]),
        depth=reader.depth("(in|out)_blocks"),
        label_rows=label_rows,
        long_skips="out_blocks.0.skip_linear.weight" in reader.weights,
        mlp_time_embed="time_embed.0.weight" in reader.weights,
        conv=conv,
    )


def _mae_sizes(reader: Reader) -> dict[str, Any]:
    patches = reader.patches("patch_embed.proj.weight")
    sizes = dict(**patches, **reader.image_size("pos_embed", 1, patches["patch_size"]), depth=reader.depth("blocks"))
    if KINDS[reader.kind].fresh:
        return sizes
    return sizes | dict(decoder_depth=reader.depth("decoder_blocks"), decoder_dim=reader.shape("decoder_pred.weight", 2)[1])


_DIT: dict[str, Any] = dict(
    backbone="dit",
    names={
        "patch_embed": ("x_embedder.proj",),
        "time_embed.fc1": ("t_embedder.mlp.0",),
        "time_embed.fc2": ("t_embedder.mlp.2",),
        "label_embed": ("y_embedder.embedding_table",),
        "blocks.{i}": ("{block}",),
        "modulation": ("{block}.adaLN_modulation.1", "final_layer.adaLN_modulation.1"),
        "head": ("final_layer.linear",),
    },
    positions={"pos_embed": "positions"},
    sizes=_dit_sizes,
)
_PLAIN_DIT: dict[str, Any] = dict(
    **_DIT,
    mark="blocks.0.adaLN_modulation.1.weight",
    blocks=lambda n: [f"blocks.{i}" for i in range(n)],
    fixed=dict(long_skips=False, alpha_min=1.0),
)
_MAE: dict[str, Any] = dict(
    backbone="mae",
    blocks=lambda n: [f"blocks.{i}" for i in range(n)],
    names={"patch_embed": ("patch_embed.proj",)},
    sizes=_mae_sizes,
)
_PLAIN_MAE: dict[str, Any] = dict(**_MAE, fixed=dict(long_skips=False, alpha_min=1.0))
_BOTH_TABLES = {"pos_embed": "positions", "decoder_pos_embed": "decoder_positions"}
KINDS: dict[str, Kind] = {
    "sit": Kind(**_PLAIN_DIT, source="willisma/SiT, models.py"),
    "dit": Kind(**_PLAIN_DIT, source="facebookresearch/DiT, models.py"),
    "decayed-sit": Kind(
        **_DIT,
        source="xiao7199/decayed_Identity_shortcuts, SiT/models.py",
        mark="enc_blocks.0.adaLN_modulation.1.weight",
        blocks=lambda n: [f"enc_blocks.{i}" for i in range(n // 2)] + [f"dec_blocks.{i}" for i in range(n - n // 2)],
        fixed=dict(long_skips=True),
        defaults=dict(alpha_min=0.8),  # min_sigma of the authors' class, training, sampling and README alike
    ),
    "uvit": Kind(
        backbone="uvit",
        source="baofff/U-ViT, libs/uvit.py",
        mark="in_blocks.0.norm1.weight",
        blocks=lambda n: [f"in_blocks.{i}" for i in range(n // 2)] + ["mid_block"] + [f"out_blocks.{i}" for i in range(n // 2)],
        names={
            "patch_embed": ("patch_embed.proj",),
            "positions": ("pos_embed",),
            "label_embed": ("label_emb",),
            "blocks.{i}": ("{block}",),
            "blocks.{i}.skip": ("{block}.skip_linear",),
            "head": ("decoder_pred",),
            "final_conv": ("final_layer",),
        },
        positions={},
        sizes=_uvit_sizes,
        fixed=dict(alpha_min=1.0),
    ),
    "mae": Kind(**_PLAIN_MAE, source="facebookresearch/mae, models_mae.py", mark="mask_token", positions=_BOTH_TABLES),
    "decayed-mae": Kind(
        **_MAE,
        source="xiao7199/decayed_Identity_shortcuts, MAE/models_mae.py",
        mark="decoder_cls_token",
        positions=_BOTH_TABLES,
        fixed=dict(long_skips=True),
        # 1 in the authors' code, .7 in their README, .6 in the paper
        needed=("alpha_min", "give the min_decay that they were trained with"),
    ),
    "timm-mae": Kind(
        **_PLAIN_MAE,
        source="timm, vit_*.mae",
        mark="cls_token",
        positions={"pos_embed": "positions"},
        fresh=("mask_token", "decoder_embed", "decoder_blocks", "decoder_norm", "decoder_pred"),
    ),
}


def from_official(kind: str, state_dict: Weights, **sizes: Any) -> nn.Module:
    """Published weights -> our model, in float32 and evaluation mode; it shares no memory with them.

    Args:
        kind: a key of `KINDS`.
        state_dict: as the published class gives it; `weights_of` takes it out of a training checkpoint.
        sizes: arguments of the backbone (None: not given). What the weights tell is read off them; a size that contradicts them is an
            error. What they do not tell:
            num_heads, decoder_num_heads: those of the published models of that width; to be given for any other width.
            alpha_min: .8 for decayed-sit; to be given for decayed-mae.
            num_classes: a label table ends with the row for "no label", unless it has 1000 rows; give the number of rows if that is
            wrong.
            image_size: needed if the positions were left away.
            time_scale, time_offset: of uvit; "discrete" of `UVIT_TIMES` without a last convolution, else "continuous", as published.
            norm_pixels: of mae, what the loss was; decoder_depth, decoder_dim: of timm-mae, for the fresh decoder.

    Raises:
        ValueError: weights of another kind or size, or sizes that contradict them, with what was found and what fits.
    """
    row = find_kind(kind)
    strange = [str(name) for name, value in state_dict.items() if not isinstance(value, Tensor)]
    if strange:
        raise ValueError(f"{', '.join(strange[:4])} are no tensors; of a training checkpoint give one part, its 'ema' or its 'model'")
    if row.mark not in state_dict:
        raise misfit(kind, state_dict, [f"{row.mark} is missing"])
    config = _arguments(kind, row.sizes(Reader(kind, state_dict)), sizes)
    with init_empty_weights() if not row.fresh else nullcontext():
        model = BACKBONES[row.backbone].load()(**config)

    theirs, table = dict(state_dict), row.label_table
    if table in theirs and len(theirs[table]) == config["num_classes"]:
        theirs[table] = torch.cat([theirs[table], theirs[table].mean(dim=0, keepdim=True)])
    pieces = list(_pieces(row, model))
    _compare(row, model, kind, theirs, pieces)

    parts: dict[str, list[Tensor]] = {}
    for piece in pieces:
        parts.setdefault(piece.ours, []).append(theirs[piece.theirs].detach().to("cpu", torch.float32).reshape(piece.our_shape))
    ours = {name: torch.cat(tensors) for name, tensors in parts.items()}
    if table in theirs and not config["num_classes"]:
        ours["time_embed.fc2.bias"] += theirs[table][0].float()
    model.load_state_dict(ours, strict=not row.fresh, assign=not row.fresh)
    return model.eval()


def to_official(kind: str, model: nn.Module, empty_row: bool = True) -> dict[str, Tensor]:
    """Our model -> weights that the published class loads, strictly; the inverse of `from_official`.

    Args:
        empty_row: the label table keeps its row for "no label", which the published classes count as a class or have for dropout.

    Raises:
        ValueError: the published class cannot be this model.
    """
    row = find_kind(kind)
    if not isinstance(model, BACKBONES[row.backbone].load()):
        raise ValueError(f"weights of the kind {kind} are a {BACKBONES[row.backbone].class_name}, not a {type(model).__name__}")
    for name, value in {**_THE_SCHEDULE, **row.fixed}.items():
        if model.config[name] != value:
            raise ValueError(f"the model has {name} {model.config[name]}, and the kind {kind} ({row.source}) stands for {value}")
    ours = model.state_dict()
    theirs = {piece.theirs: ours[piece.ours][piece.rows].reshape(piece.their_shape).clone() for piece in _pieces(row, model)}
    theirs |= {name: getattr(model, buffer)[None].clone() for name, buffer in row.positions.items()}
    theirs |= {name: torch.zeros(shape) for name, shape in _unused(row, model).items()}
    if row.label_table in theirs and not empty_row:
        theirs[row.label_table] = theirs[row.label_table][:-1].clone()
    return theirs


def find_kind(kind: str) -> Kind:
    """The row of that name; ValueError names those that exist."""
    if kind not in KINDS:
        raise ValueError(f"there is no kind {kind!r} of published weights; choose from {', '.join(KINDS)}")
    return KINDS[kind]


def misfit(kind: str, weights: Weights, found: list[str]) -> ValueError:
    """The error for weights that are not of this kind, with the kinds that they may be."""
    mark = next((row.mark for row in KINDS.values() if row.mark in weights), None)
    others = [name for name, row in KINDS.items() if row.mark == mark]
    hint = f"; they look like {' or '.join(others)}" if others and kind not in others else ""
    rest = f" and {len(found) - 3} more such things" if len(found) > 3 else ""
    return ValueError(f"these weights do not fit the kind {kind} ({KINDS[kind].source}): {', '.join(found[:3])}{rest}{hint}")


def _arguments(kind: str, told: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the backbone: what the weights told, what was given, and what is known of the published models."""
    row, given = KINDS[kind], {name: value for name, value in given.items() if value is not None}
    backbone = BACKBONES[row.backbone]
    known = signature(backbone.load()).parameters
    if unknown := sorted(given.keys() - known):
        raise ValueError(f"the kind {kind} has no {', '.join(unknown)}; leave that away")

    rows = told.pop("label_rows", None)
    if rows is not None:
        fitting = sorted({max(rows - 1, 0), rows})
        all_real = rows == IMAGENET_CLASSES or (row.backbone == "uvit" and rows == 1)
        told["num_classes"] = given["num_classes"] if given.get("num_classes") in fitting else fitting[-1 if all_real else 0]
    told = {**told, **row.fixed}
    for name in given.keys() & told:
        if given[name] != told[name]:
            raise ValueError(f"{name} is {given[name]}, but these weights of the kind {kind} have {told[name]}; leave it away")

    config = {**row.defaults, **told, **given}
    if row.backbone == "uvit" and "time_scale" not in config:
        config["time_scale"], config["time_offset"] = UVIT_TIMES["continuous" if config["conv"] else "discrete"][0]
    for heads, width in (("num_heads", "dim"), ("decoder_num_heads", "decoder_dim")):
        published = {sizes[width]: sizes[heads] for sizes in backbone.sizes.values() if width in sizes}
        if width in config and heads not in config:
            if config[width] not in published:
                raise ValueError(f"{heads} is not in the weights, and no published model has {width} {config[width]}; give {heads}")
            config[heads] = published[config[width]]
    if "image_size" not in config:
        raise ValueError("there are no positions to read the image_size from; give it (--image_size)")
    if row.needed and row.needed[0] not in config:
        raise ValueError(f"{row.needed[0]} is not in the weights; {row.needed[1]}")
    return config


def _pieces(row: Kind, model: nn.Module) -> Iterator[Piece]:
    """Every tensor of ours, cut where it holds several of theirs."""
    blocks = row.blocks(len(model.blocks))
    names: dict[str, list[str]] = {}
    for ours, theirs in row.names.items():
        if "{i}" in ours:
            names |= {ours.format(i=i): [name.format(block=block) for name in theirs] for i, block in enumerate(blocks)}
        else:
            names[ours] = [name.format(block=block) for name in theirs for block in (blocks if "{block}" in name else [""])]

    config = model.config
    kernel = (config.dim, config.in_channels, config.patch_size, config.patch_size)  # their patches are embedded by a convolution
    for ours, tensor in model.state_dict().items():
        if ours.startswith(row.fresh):
            continue
        parts = ours.split(".")
        prefixes = (".".join(parts[:end]) for end in range(len(parts), 0, -1))  # the longest first
        prefix = next((prefix for prefix in prefixes if prefix in names), ours)
        sources = [name + ours[len(prefix) :] for name in names.get(prefix, [prefix])]
        height = 6 * config.dim if len(sources) > 1 else len(tensor)
        for k, name in enumerate(sources):
            rows = slice(k * height, (k + 1) * height)
            shape = tuple(tensor[rows].shape)
            yield Piece(name, ours, rows, shape, kernel if ours == "patch_embed.weight" else shape)


def _unused(row: Kind, model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Tensors of theirs, with their shapes, that have no counterpart in ours."""
    if row.label_table and row.backbone == "dit":
        return {} if model.config.num_classes else {row.label_table: (1, model.config.dim)}
    if row.backbone != "mae" or not model.config.long_skips:
        return {}
    spare = range(len(model.skip), model.config.depth // 2)
    return {f"skip.{k}.{name}": tuple(tensor.shape) for k in spare for name, tensor in model.skip[0].state_dict().items()}


def _compare(row: Kind, model: nn.Module, kind: str, theirs: Weights, pieces: list[Piece]) -> None:
    """ValueError unless the names and shapes are those of the kind, and their positions ours."""
    expected = {piece.theirs: piece.their_shape for piece in pieces} | _unused(row, model)
    tables = {name: getattr(model, buffer)[None] for name, buffer in row.positions.items() if name in theirs}
    expected |= {name: tuple(table.shape) for name, table in tables.items()}
    wrong = [f"{name} is missing" for name in expected if name not in theirs]
    wrong += [f"{name} is unknown there" for name in theirs if name not in expected]
    for name in expected.keys() & theirs:
        if theirs[name].shape != expected[name]:
            wrong.append(f"{name} is {tuple(theirs[name].shape)} instead of {expected[name]}")
    if wrong:
        raise misfit(kind, theirs, wrong)
    for name, table in tables.items():
        difference = (theirs[name].float().cpu() - table).abs().max().item()
        if not difference <= POSITIONS_TOLERANCE:
            raise misfit(kind, theirs, [f"{name} is {difference:.2g} away from the sine-cosine table"])
