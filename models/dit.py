"""The decayed diffusion transformer: DiT / SiT with fading shortcuts and long skips (arXiv 2212.09748, 2401.08740, 2404.10947)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from models.layers import (
    MLP,
    Attention,
    DecayedModel,
    LabelEmbedding,
    TimestepEmbedding,
    check_patches,
    patchify,
    sincos_positions,
    unpatchify,
)
from models.shortcut import Shortcut, make_shortcuts


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x * (1 + scale) + shift; x is (N, T, D), shift and scale are (N, 1, D)."""
    return x * (1 + scale) + shift


class DiTBlock(nn.Module):
    """Attention and MLP with adaLN-Zero, each on a decayed shortcut; a decoder block first adds its long skip."""

    def __init__(self, dim: int, num_heads: int, shortcuts: Sequence[Shortcut], long_skip: bool) -> None:
        super().__init__()
        self.skip = nn.Linear(dim, dim) if long_skip else None
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.mlp = MLP(dim, 4 * dim, gelu="tanh")
        self.shortcut1, self.shortcut2 = shortcuts

    def forward(self, x: Tensor, modulation: Tensor, skip: Tensor | None = None) -> Tensor:
        if self.skip is not None:
            x = x + self.skip(skip)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.unsqueeze(1).chunk(6, dim=-1)  # 6 x (N, 1, D)
        x = self.shortcut1(x, gate1 * self.attn(modulate(self.norm1(x), shift1, scale1)))
        x = self.shortcut2(x, gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2)))
        return x


class DiT(DecayedModel):
    """Diffusion transformer whose residual shortcuts fade with depth; alpha_min = 1 is the plain network, exactly.

    The first half of the blocks is the encoder, the second the decoder. With `long_skips`, encoder block i hands its output to
    decoder block depth - 1 - i, which adds Linear(skip) before its attention.

    Args:
        image_size: edge of the square input in pixels (or latent cells).
        patch_size: edge of a patch; must divide `image_size`.
        in_channels: channels of input and output.
        num_classes: 0 for an unconditional model.
        depth: number of blocks; even where `long_skips` is on.
        dim: width, divisible by 4 and by `num_heads`.
        num_heads: attention heads.
        alpha_min, shortcut_schedule, shortcut_placement, learnable_alpha: of the 2 * depth sub-layers' shortcuts; see
            `models.shortcut.make_shortcuts`.
        long_skips: connect encoder blocks to decoder blocks.
        zero_init: start with closed gates and a zero head (adaLN-Zero); else with small random ones.
        learn_sigma: predict twice the channels, the second half for the variance (DiT) or for nothing (SiT).

    Raises:
        ValueError: sizes that do not fit together, with the remedy.
    """

    _no_split_modules = ("DiTBlock",)

    @register_to_config
    def __init__(
        self,
        image_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 3,
        num_classes: int = 0,
        depth: int = 28,
        dim: int = 1152,
        num_heads: int = 16,
        alpha_min: float = 1.0,
        shortcut_schedule: str = "linear",
        shortcut_placement: str = "both",
        learnable_alpha: bool = False,
        long_skips: bool = True,
        zero_init: bool = True,
        learn_sigma: bool = False,
    ) -> None:
        super().__init__()
        check_patches(image_size, patch_size)
        if long_skips and depth % 2:
            raise ValueError(f"depth {depth} is odd, and long skips need equal halves; use an even depth or switch long skips off")
        if dim % num_heads:
            raise ValueError(f"dim {dim} is not divisible by num_heads {num_heads}; choose heads that divide it")
        self.shortcuts = make_shortcuts(("attention", "mlp") * depth, alpha_min, shortcut_schedule, shortcut_placement, learnable_alpha)
        grid = image_size // patch_size

        self.patch_embed = nn.Linear(in_channels * patch_size**2, dim)
        self.register_buffer("positions", sincos_positions(dim, grid, grid), persistent=False)
        self.time_embed = TimestepEmbedding(dim)
        self.label_embed = LabelEmbedding(num_classes, dim) if num_classes else None
        # adaLN of all blocks and of the final layer in one matrix product: shift, scale, gate of every sub-layer, then shift, scale
        self.modulation = nn.Linear(dim, (6 * depth + 2) * dim)
        self.blocks = nn.ModuleList(
            DiTBlock(dim, num_heads, self.shortcuts[2 * i : 2 * i + 2], long_skip=long_skips and i >= depth // 2) for i in range(depth)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.head = nn.Linear(dim, patch_size**2 * in_channels * (2 if learn_sigma else 1))
        self._initialize()

    @property
    def numbers_held(self) -> int:
        """About how many numbers are in memory for one image: a block's activations, and what the long skips keep."""
        return len(self.positions) * self.config.dim * (16 + (self.config.depth // 2 if self.config.long_skips else 0))

    @torch.no_grad()
    def drop_variance(self) -> None:
        """Predict no variance from now on: `forward` gives the first C of the 2C channels that it gave with `learn_sigma`."""
        rows, kept = self.head, nn.Linear(self.config.dim, self.head.out_features // 2)
        for name, parameter in kept.named_parameters():
            pixels = rows.get_parameter(name).unflatten(0, (self.config.patch_size**2, 2, -1))  # the channels come last
            parameter.copy_(pixels[:, 0].flatten(0, 1))
        self.head = kept.to(rows.weight)
        self.register_to_config(learn_sigma=False)

    def _initialize(self) -> None:
        """Xavier in every matrix outside the embeddings; zero gates and a zero head (adaLN-Zero), so the network starts at 0."""
        for module in (*self.blocks.modules(), self.patch_embed):
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for zero in (self.modulation, self.head):
            nn.init.normal_(zero.weight, std=0.0 if self.config.zero_init else 0.02)
            nn.init.zeros_(zero.bias)

    def forward(
        self, x: Tensor, t: Tensor, labels: Tensor | None = None, return_features: bool = False
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Predict what was trained (velocity, noise, ..) from noisy images.

        Args:
            x: (N, C, H, W).
            t: (N,), flow times from 0 = noise to 1 = data, or a DDPM's timesteps from 0 = data to 999 = noise.
            labels: int64 (N,) in [0, num_classes]; num_classes, as None, means "no label".
            return_features: also return the output of every block, a list of (N, T, D).

        Returns:
            (N, C, H, W), with learn_sigma (N, 2C, H, W); or that and the features.
        """
        height, width = x.shape[-2:]
        x = self.patch_embed(patchify(x, self.config.patch_size))  # (N, T, D)
        # under autocast the stream stays in bf16, as in diffusers' DiT; SiT's is float32, which takes longer (tests/benchmarks/RESULTS.md)
        x = x + self.positions.to(x.dtype)
        c = self.time_embed(t)  # (N, D)
        if self.label_embed is not None:
            c = c + self.label_embed(labels if labels is not None else t.new_full(t.shape, self.config.num_classes).long())
        *modulations, final = self.modulation(F.silu(c)).split(6 * self.config.dim, dim=-1)  # depth x (N, 6D), (N, 2D)

        features: list[Tensor] = []
        skips: list[Tensor] = []  # last in, first out
        half = len(self.blocks) // 2 if self.config.long_skips else 0
        for i, (block, modulation) in enumerate(zip(self.blocks, modulations, strict=True)):
            x = self.recomputing(block, x, modulation, skips.pop() if skips and i >= half else None)  # (N, T, D)
            if i < half:
                skips.append(x)
            if return_features:  # else what no skip needs makes room, where no way back keeps it
                features.append(x)

        x = modulate(self.norm(x), *final.unsqueeze(1).chunk(2, dim=-1))
        x = unpatchify(self.head(x), self.config.patch_size, height, width)  # (N, C, H, W)
        return (x, features) if return_features else x
