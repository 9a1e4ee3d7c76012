"""The masked autoencoder, plain (arXiv 2111.06377) or with shortcuts that fade in the encoder and long skips (arXiv 2404.10947)."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from models.layers import Block, DecayedModel, check_patches, patchify, sincos_positions, unpatchify
from models.shortcut import Shortcut, make_shortcuts


class MAEOutput(NamedTuple):
    """What a masked autoencoder returns.

    Attributes:
        loss: scalar, float32; the mean squared error of the hidden patches' (normalised) pixels.
        prediction: (N, T, p * p * C), the (normalised) pixels of every patch, the channel last.
        mask: (N, T), 1 = hidden, 0 = visible.
    """

    loss: Tensor
    prediction: Tensor
    mask: Tensor


def unshuffle(tokens: Tensor, mask_token: Tensor, places: Tensor, length: int) -> Tensor:
    """Put tokens (N, 1 + V, D) at their places (N, 1 + V) in a sequence (N, length, D) of mask tokens (1, 1, D)."""
    n, _, d = tokens.shape
    hidden = mask_token.to(tokens.dtype).expand(n, length, d)
    return hidden.scatter(1, places.unsqueeze(-1).expand_as(tokens), tokens)


class SkipLayer(nn.Module):
    """A long skip: Linear - SiLU - Linear of an encoder block's output beside the decoder's stream, added to that stream."""

    def __init__(self, dim: int, decoder_dim: int) -> None:
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(dim + decoder_dim, decoder_dim), nn.SiLU(), nn.Linear(decoder_dim, decoder_dim))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))

    def forward(self, x: Tensor, tokens: Tensor, places: Tensor) -> Tensor:
        first, silu, last = self.fc
        # the first linear of [skip, x] in two halves: of the skip once for the mask token, not for every hidden place, and of a
        # stream x that is the same for all images, (1, 1 + T, D_dec), once
        of_skip, of_x = first.weight.split([tokens.shape[-1], x.shape[-1]], dim=1)
        skip = unshuffle(F.linear(tokens, of_skip), F.linear(self.mask_token, of_skip), places, x.shape[1])  # (N, 1 + T, D_dec)
        return x + last(silu(F.linear(x, of_x, first.bias) + skip))  # (N, 1 + T, D_dec)


class MAE(DecayedModel):
    """Masked autoencoder: the encoder sees a few patches, the decoder predicts the pixels of the others.

    Two forms, between which `long_skips` chooses; in both, alpha may fade over the encoder's sub-layers, never in the decoder.

    - True, the paper's: every second encoder block (1, 3, .., depth - 1) hands its output on through a `SkipLayer`: the last one to
      decoder block 0, the one before to decoder block 1, and so on. With more of them than decoder blocks (ViT-L: 12 and 8) the
      first ones hand nothing on; with fewer, the last decoder blocks get none. The decoder starts from a class token and positions
      alone, so all content comes through the skips. There is no encoder norm. The authors' code makes depth / 2 skip layers, used
      or not; here are only those that are used.
    - False, the plain one: encoder norm, `decoder_embed`, one mask token, no skips. With alpha_min < 1 it is the ablation.

    Args:
        image_size: edge of the square input in pixels.
        patch_size: edge of a patch; must divide `image_size`.
        in_channels: channels of the images.
        depth: number of encoder blocks; even where `long_skips` is on.
        dim: width of the encoder, divisible by 4 and by `num_heads`.
        num_heads: attention heads of the encoder.
        decoder_depth: number of decoder blocks.
        decoder_dim: width of the decoder, divisible by 4 and by `decoder_num_heads`.
        decoder_num_heads: attention heads of the decoder.
        alpha_min, shortcut_schedule, shortcut_placement, learnable_alpha: of the shortcuts of the encoder's 2 * depth sub-layers; see
            `models.shortcut.make_shortcuts`.
        long_skips: which form.
        zero_init: start with zeros in the last linear of every branch (attention, MLP, long skip) and in the one that reads out, which
            keeps norms from exploding where alpha is small; else Xavier there too. None: as the form's authors do, zeros with
            `long_skips` and Xavier without.
        norm_pixels: predict pixels normalised by the mean and the deviation of their patch.

    Raises:
        ValueError: sizes that do not fit together, with the remedy.
    """

    _no_split_modules = ("Block",)

    @register_to_config
    def __init__(
        self,
        image_size: int = 224,
        patch_size: int = 16,
        in_channels: int = 3,
        depth: int = 12,
        dim: int = 768,
        num_heads: int = 12,
        decoder_depth: int = 8,
        decoder_dim: int = 512,
        decoder_num_heads: int = 16,
        alpha_min: float = 1.0,
        shortcut_schedule: str = "linear",
        shortcut_placement: str = "both",
        learnable_alpha: bool = False,
        long_skips: bool = True,
        zero_init: bool | None = None,
        norm_pixels: bool = True,
    ) -> None:
        super().__init__()
        check_patches(image_size, patch_size)
        if long_skips and depth % 2:
            raise ValueError(f"depth {depth} is odd, and every second block must hand on; use an even depth or switch long skips off")
        if min(depth, decoder_depth) < 1:
            raise ValueError(f"depth is {depth} and decoder_depth {decoder_depth}; both must be at least 1")
        for name, width, heads in (("", dim, num_heads), ("decoder_", decoder_dim, decoder_num_heads)):
            if width % heads:
                raise ValueError(f"{name}dim {width} is not divisible by {name}num_heads {heads}; choose heads that divide it")
        self.shortcuts = make_shortcuts(("attention", "mlp") * depth, alpha_min, shortcut_schedule, shortcut_placement, learnable_alpha)
        grid = image_size // patch_size
        self.num_patches = grid**2

        self.patch_embed = nn.Linear(in_channels * patch_size**2, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.blocks = nn.ModuleList(Block(dim, num_heads, self.shortcuts[2 * i : 2 * i + 2]) for i in range(depth))
        num_skips = min(depth // 2, decoder_depth) if long_skips else 0
        self.skip = nn.ModuleList(SkipLayer(dim, decoder_dim) for _ in range(num_skips))
        if long_skips:
            self.norm = nn.Identity()
            self.decoder_cls_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
            self.decoder_embed = nn.Linear(decoder_dim, decoder_dim)  # of what the decoder starts from
        else:
            self.norm = nn.LayerNorm(dim, eps=1e-6)
            self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
            self.decoder_embed = nn.Linear(dim, decoder_dim)
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_dim, decoder_num_heads, (Shortcut(kind="attention"), Shortcut(kind="mlp"))) for _ in range(decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_dim, patch_size**2 * in_channels)
        for name, width in (("positions", dim), ("decoder_positions", decoder_dim)):  # (1 + T, D), zero for the class token
            self.register_buffer(name, F.pad(sincos_positions(width, grid, grid), (0, 0, 1, 0)), persistent=False)
        self._initialize()

    def _initialize(self) -> None:
        """Xavier in every matrix, small random tokens, and zeros as `zero_init` says."""
        for name, parameter in self.named_parameters():
            if name.endswith(("cls_token", "mask_token")):
                nn.init.normal_(parameter, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module is not self.patch_embed:  # a convolution in the authors' code, whose bias keeps its default
                    nn.init.zeros_(module.bias)
        zero_init = self.config.zero_init
        if self.config.long_skips if zero_init is None else zero_init:
            for block in (*self.blocks, *self.decoder_blocks):
                nn.init.zeros_(block.attn.proj.weight)
                nn.init.zeros_(block.mlp.fc2.weight)
            for last in (*(layer.fc[-1] for layer in self.skip), self.decoder_pred):
                nn.init.zeros_(last.weight)

    def forward(
        self,
        images: Tensor,
        noise: Tensor | None = None,
        mask_ratio: float = 0.75,
        generator: torch.Generator | None = None,
        return_features: bool = False,
    ) -> MAEOutput | tuple[MAEOutput, list[Tensor]]:
        """Hide patches and predict them.

        Args:
            images: (N, C, H, W).
            noise: (N, T), decides the mask: the patches of the smallest noise stay visible. None draws it uniformly.
            mask_ratio: share of the patches that are hidden; int(T * (1 - mask_ratio)) = V stay visible.
            generator: what the noise is drawn from, on its device: a CPU's gives the same masks everywhere.
            return_features: also return the output of every encoder block, a list of (N, 1 + V, D), the class token first.

        Returns:
            The loss, the prediction and the mask; or those and the features.

        Raises:
            ValueError: images or noise of another shape, a mask that hides nothing or everything.
        """
        patches = self._patchify(images)  # (N, T, C * p * p)
        n, t, _ = patches.shape
        num_visible = int(t * (1 - mask_ratio))
        if not 0 < num_visible < t:
            raise ValueError(f"mask_ratio {mask_ratio} leaves {num_visible} of {t} patches visible; some must be, and some not")
        if noise is None:
            noise = torch.rand(n, t, device=generator.device if generator else images.device, generator=generator).to(images.device)
        elif noise.shape != (n, t):
            raise ValueError(f"noise has the shape {tuple(noise.shape)}; {n} images of {t} patches need {(n, t)}")
        visible = noise.argsort(dim=1)[:, :num_visible]  # (N, V)
        mask = torch.ones_like(noise, dtype=torch.float32).scatter(1, visible, 0.0)  # (N, T)
        places = F.pad(visible + 1, (1, 0))  # (N, 1 + V), the class token is at 0

        features = self._encode(patches.gather(1, visible.unsqueeze(-1).expand(-1, -1, patches.shape[2])), places)
        prediction = self._decode(features, places).clone()  # (N, T, p * p * C), no view: FSDP2 hooks what it is given back

        pixels = self._channels_last(patches).float()
        mean, deviation = self._statistics(pixels)
        error = (prediction.float() - (pixels - mean) / deviation).square().mean(dim=-1)  # (N, T)
        output = MAEOutput((error * mask).sum() / mask.sum(), prediction, mask)
        return (output, features) if return_features else output

    def features(self, images: Tensor) -> list[Tensor]:
        """Features for probes: of the whole images (N, C, H, W), one (N, 1 + T, D) for each encoder block, the class token first.

        They are the blocks' outputs, as `forward` returns them, except that the last one of the plain form has gone through the
        encoder norm, which ends its encoder.
        """
        patches = self._patchify(images)
        features = self._encode(patches, torch.arange(1 + self.num_patches, device=images.device).unsqueeze(0))
        return [*features[:-1], self.norm(features[-1])]

    def reconstruct(
        self, images: Tensor, noise: Tensor | None = None, mask_ratio: float = 0.75, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """The images (N, C, H, W) twice: the hidden patches 0, which is grey, and painted in by the decoder, not clamped.

        Arguments are those of `forward`. With `norm_pixels` the network says nothing of a patch's mean and deviation: they are
        taken from the image itself.
        """
        _, prediction, mask = self(images, noise, mask_ratio, generator)
        pixels = self._channels_last(self._patchify(images)).float()
        mean, deviation = self._statistics(pixels)
        hidden = mask.unsqueeze(-1) > 0  # (N, T, 1)
        seen = pixels.masked_fill(hidden, 0)  # (N, T, p * p * C)
        painted = torch.where(hidden, prediction.float() * deviation + mean, pixels)
        seen, painted = (unpatchify(each, self.config.patch_size, *images.shape[-2:]).to(images.dtype) for each in (seen, painted))
        return seen, painted

    def _encode(self, patches: Tensor, places: Tensor) -> list[Tensor]:
        """Patches (N, V, C * p * p), at places (N or 1, 1 + V) -> the output (N, 1 + V, D) of every block, the class token first."""
        x = self.patch_embed(patches)  # (N, V, D)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.positions[places]  # (N, 1 + V, D)
        features = []
        for block in self.blocks:
            x = self.recomputing(block, x)
            features.append(x)
        return features

    def _decode(self, features: list[Tensor], places: Tensor) -> Tensor:
        """The encoder's features, at places (N, 1 + V) -> a prediction (N, T, p * p * C)."""
        if self.config.long_skips:
            start = torch.cat([self.decoder_cls_token, self.decoder_positions[None, 1:]], dim=1)  # (1, 1 + T, D_dec)
            x = self.decoder_embed(start)  # the first skip makes it (N, 1 + T, D_dec)
        else:
            x = self.decoder_embed(self.norm(features[-1]))  # (N, 1 + V, D_dec)
            x = unshuffle(x, self.mask_token, places, 1 + self.num_patches) + self.decoder_positions  # (N, 1 + T, D_dec)
        for i, block in enumerate(self.decoder_blocks):
            if i < len(self.skip):
                x = self.skip[i](x, features[-1 - 2 * i], places)  # the deepest first
            x = self.recomputing(block, x)  # (N, 1 + T, D_dec)
        return self.decoder_pred(self.decoder_norm(x[:, 1:]))

    def _patchify(self, images: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, T, C * p * p)."""
        size = self.config.image_size
        if images.shape[1:] != (self.config.in_channels, size, size):
            raise ValueError(f"images are {tuple(images.shape[1:])}, the model takes {(self.config.in_channels, size, size)}; resize them")
        return patchify(images, self.config.patch_size)

    def _channels_last(self, patches: Tensor) -> Tensor:
        """(N, T, C * p * p) -> (N, T, p * p * C)."""
        return patches.unflatten(2, (self.config.in_channels, -1)).transpose(2, 3).flatten(2)

    def _statistics(self, pixels: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """Mean and deviation (N, T, 1) by which every patch's pixels are normalised."""
        if not self.config.norm_pixels:
            return 0.0, 1.0
        variance, mean = torch.var_mean(pixels, dim=-1, keepdim=True)
        return mean, (variance + 1e-6).sqrt()
