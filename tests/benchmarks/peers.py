"""Networks of a checkout of the published code that the user has (--peer PATH); none of it is copied here."""

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import timm.models.vision_transformer as timm_vit
from torch import nn

from tests.benchmarks.published import CLASSES, PublishedDiT, PublishedMAE

Sizes = Mapping[str, int]
IMAGE = 32


def _dit(sizes: Sizes) -> dict[str, Any]:
    return dict(
        input_size=IMAGE, patch_size=sizes["patch_size"], in_channels=3, hidden_size=sizes["dim"], depth=sizes["depth"],
        num_heads=sizes["num_heads"], num_classes=CLASSES, class_dropout_prob=0.1, learn_sigma=False,
    )  # fmt: skip


def _mae(sizes: Sizes) -> dict[str, Any]:
    return dict(
        img_size=IMAGE, patch_size=sizes["patch_size"], embed_dim=sizes["dim"], depth=sizes["depth"], num_heads=sizes["num_heads"],
        decoder_embed_dim=sizes["decoder_dim"], decoder_depth=sizes["decoder_depth"], decoder_num_heads=sizes["decoder_num_heads"],
        norm_pix_loss=True,
    )  # fmt: skip


def _uvit(sizes: Sizes) -> dict[str, Any]:
    return dict(
        img_size=IMAGE, patch_size=sizes["patch_size"], in_chans=3, embed_dim=sizes["dim"], depth=sizes["depth"],
        num_heads=sizes["num_heads"], num_classes=CLASSES + 1,
    )  # fmt: skip


# backbone -> file in a checkout of SiT, DiT, mae or U-ViT, class, and its arguments for our sizes
PEERS: dict[str, tuple[tuple[str, str, Callable[[Sizes], dict[str, Any]]], ...]] = {
    "dit": (("models.py", "SiT", _dit), ("models.py", "DiT", _dit)),
    "mae": (("models_mae.py", "MaskedAutoencoderViT", _mae),),
    "uvit": (("libs/uvit.py", "UViT", _uvit),),
}


def network_of(peer: Path | None, backbone: str, sizes: Sizes) -> nn.Module:
    """The network of these sizes for images of 32 px: the peer's, else the one that is written down here.

    Raises:
        ValueError: the peer has no such network, or it cannot be used with the libraries that are here.
    """
    if peer is None:
        return {"dit": PublishedDiT, "mae": PublishedMAE}[backbone](image_size=IMAGE, **sizes)
    for file, name, arguments in PEERS[backbone]:
        if (peer / file).is_file() and f"class {name}(" in (peer / file).read_text(encoding="utf-8"):
            try:
                with _importing_from(peer):
                    module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
                    return getattr(module, name)(**arguments(sizes))
            except Exception as error:  # whatever foreign code may raise
                raise ValueError(f"{peer / file} cannot be used with the libraries that are here: {str(error).splitlines()[0]}") from error
    raise ValueError(f"{peer} has no {' or '.join(name for _, name, _ in PEERS[backbone])}; choose a case that it has, or another checkout")


@contextmanager
def _importing_from(peer: Path) -> Iterator[None]:
    """Modules of the checkout, under the names that they have there; what these names mean here comes back afterwards."""
    names = {path.stem for path in peer.glob("*.py")} | {path.name for path in peer.iterdir() if path.is_dir()}
    ours = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in names}
    sys.path.insert(0, str(peer))
    block, has_float = timm_vit.Block, hasattr(np, "float")
    # facebookresearch/mae was written for timm 0.3.2 and numpy 1.19
    if "qk_scale" not in inspect.signature(block).parameters:
        timm_vit.Block = lambda *sizes, qk_scale=None, **options: block(*sizes, **options)
    if not has_float:
        np.float = float
    try:
        yield
    finally:
        timm_vit.Block = block
        if not has_float:
            del np.float
        sys.path.remove(str(peer))
        for name in [name for name in sys.modules if name.partition(".")[0] in names]:
            del sys.modules[name]
        sys.modules.update(ours)
