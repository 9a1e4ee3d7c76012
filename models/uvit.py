"""The decayed U-ViT: everything is a token, and long skips are concatenated (arXiv 2209.12152, 2404.10947)."""

from collections.abc import Sequence

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from models.layers import Block, DecayedModel, LabelEmbedding, check_patches, patchify, sinusoids, unpatchify
from models.shortcut import Shortcut, make_shortcuts


class UViTBlock(Block):
    """The block of ViT without bias in qkv; a decoder block first merges its long skip, Linear(concat(x, skip))."""

    def __init__(self, dim: int, num_heads: int, shortcuts: Sequence[Shortcut], long_skip: bool) -> None:
        super().__init__(dim, num_heads, shortcuts, qkv_bias=False, eps=1e-5)
        self.skip = nn.Linear(2 * dim, dim) if long_skip else None

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if self.skip is not None:
            x = self.skip(torch.cat([x, skip], dim=-1))  # (N, T, 2D) -> (N, T, D)
        return super().forward(x)


class UViT(DecayedModel):
    """U-ViT whose residual shortcuts fade with depth; alpha_min = 1 is the plain network, exactly.

    The tokens are [label,] time and patches; a label or a time is told apart from a patch by its learned position alone. Of the
    depth + 1 blocks the first half is the encoder, then comes one middle block, then the decoder. With `long_skips`, encoder block
    i hands its output to block depth - i.

    Args:
        image_size: edge of the square input in pixels (or latent cells).
        patch_size: edge of a patch; must divide `image_size`.
        in_channels: channels of input and output.
        num_classes: real classes, 0 for an unconditional model. "No label" has one more row of its own, always (the published
            configs count it among the classes where they guide).
        depth: depth // 2 blocks before and after the middle one, as published; so it is even, and there are depth + 1 blocks.
        dim: width, even and divisible by `num_heads`.
        num_heads: attention heads.
        alpha_min, shortcut_schedule, shortcut_placement, learnable_alpha: of the 2 * (depth + 1) sub-layers' shortcuts; see
            `models.shortcut.make_shortcuts`.
        long_skips: connect encoder blocks to decoder blocks.
        zero_init: start the last linear of every branch and the head at zero, so that norms stay small at alpha_min <= 0.7 and a
            fresh network predicts 0. On for plain networks too, so that a pair differs in alpha alone; False is the published
            U-ViT: a truncated normal of 0.02 in every linear.
        mlp_time_embed: the time token is an MLP of the sinusoids, instead of the sinusoids themselves.
        conv: end with a 3x3 convolution over the image (the published "huge" ones do not).
        time_scale, time_offset: the number that is embedded is time_scale * t + time_offset. Sinusoids of t in [0, 1] alone barely
            move, so the default is for flow times; timesteps 0..999 want time_scale 1. Published weights saw n = 1..1000 (discrete
            latent models: 1 and 1) or 999 t with t in (0, 1], t = n / 1000 (all others: 0.999 and 0.999), from timesteps n - 1.

    Raises:
        ValueError: sizes that do not fit together, with the remedy.
    """

    _no_split_modules = ("UViTBlock",)

    @register_to_config
    def __init__(
        self,
        image_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 3,
        num_classes: int = 0,
        depth: int = 12,
        dim: int = 512,
        num_heads: int = 8,
        alpha_min: float = 1.0,
        shortcut_schedule: str = "linear",
        shortcut_placement: str = "both",
        learnable_alpha: bool = False,
        long_skips: bool = True,
        zero_init: bool = True,
        mlp_time_embed: bool = False,
        conv: bool = True,
        time_scale: float = 1000.0,
        time_offset: float = 0.0,
    ) -> None:
        super().__init__()
        check_patches(image_size, patch_size)
        if depth % 2:
            raise ValueError(f"depth {depth} is odd, and U-ViT has depth // 2 blocks on each side of its middle one; use an even depth")
        if dim % num_heads or dim % 2:
            raise ValueError(f"dim {dim} must be even and divisible by num_heads {num_heads}")
        kinds = ("attention", "mlp") * (depth + 1)
        self.shortcuts = make_shortcuts(kinds, alpha_min, shortcut_schedule, shortcut_placement, learnable_alpha)
        num_patches = (image_size // patch_size) ** 2
        self.num_extras = 2 if num_classes else 1  # tokens before the patches

        self.patch_embed = nn.Linear(in_channels * patch_size**2, dim)
        hidden_dim = 4 * dim
        self.time_embed = nn.Sequential(nn.Linear(dim, hidden_dim), nn.SiLU(), nn.Linear(hidden_dim, dim)) if mlp_time_embed else None
        self.label_embed = LabelEmbedding(num_classes, dim) if num_classes else None
        self.positions = nn.Parameter(torch.zeros(1, self.num_extras + num_patches, dim))
        self.blocks = nn.ModuleList(
            UViTBlock(dim, num_heads, self.shortcuts[2 * i : 2 * i + 2], long_skip=long_skips and i > depth // 2) for i in range(depth + 1)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-5)
        self.head = nn.Linear(dim, patch_size**2 * in_channels)
        self.final_conv = nn.Conv2d(in_channels, in_channels, 3, padding=1) if conv else None
        self._initialize()

    @property
    def numbers_held(self) -> int:
        """About how many numbers are in memory for one image: a block's activations, and what the long skips keep."""
        return self.positions.numel() * (16 + (self.config.depth // 2 if self.config.long_skips else 0))

    def _initialize(self) -> None:
        """As published: truncated normals in linears and positions, N(0, 1) for labels; then the zeros of `zero_init`."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        # the patches' linear is a convolution there, with torch's own start; this is the same one
        self.patch_embed.reset_parameters()
        nn.init.trunc_normal_(self.positions, std=0.02)
        if self.label_embed is not None:
            nn.init.normal_(self.label_embed.weight)
        if not self.config.zero_init:
            return
        for block in self.blocks:
            nn.init.zeros_(block.attn.proj.weight)
            nn.init.zeros_(block.mlp.fc2.weight)
        nn.init.zeros_(self.head.weight)
        if self.final_conv is not None:  # its weight stays: behind a zero one the head would not learn
            nn.init.zeros_(self.final_conv.bias)

    def forward(
        self, x: Tensor, t: Tensor, labels: Tensor | None = None, return_features: bool = False
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Predict what was trained (velocity, noise, ..) from noisy images.

        Args:
            x: (N, C, H, W).
            t: (N,), flow times from 0 = noise to 1 = data, or a DDPM's timesteps; see `time_scale`.
            labels: int64 (N,) in [0, num_classes]; num_classes, as None, means "no label".
            return_features: also return the output of every block at the patches, a list of (N, H/p * W/p, D); the time and label
                tokens are left out, so a mean over tokens is one over the picture.

        Returns:
            (N, C, H, W), or that and the features.
        """
        config, (height, width) = self.config, x.shape[-2:]
        x = self.patch_embed(patchify(x, config.patch_size))  # (N, H/p * W/p, D)
        time = sinusoids(config.time_scale * t.float() + config.time_offset, config.dim).to(self.positions.dtype)  # (N, D)
        tokens = [(time if self.time_embed is None else self.time_embed(time)).unsqueeze(1), x]
        if self.label_embed is not None:
            labels = labels if labels is not None else t.new_full(t.shape, config.num_classes).long()
            tokens.insert(0, self.label_embed(labels).unsqueeze(1))
        x = torch.cat(tokens, dim=1)  # (N, T, D)
        x = x + self.positions.to(x.dtype)

        features: list[Tensor] = []
        skips: list[Tensor] = []  # last in, first out
        half = config.depth // 2 if config.long_skips else 0
        for i, block in enumerate(self.blocks):
            x = self.recomputing(block, x, skips.pop() if skips and i > half else None)  # (N, T, D)
            if i < half:
                skips.append(x)
            if return_features:  # else what no skip needs makes room, where no way back keeps it
                features.append(x[:, self.num_extras :])

        x = self.head(self.norm(x)[:, self.num_extras :])  # (N, H/p * W/p, p * p * C)
        x = unpatchify(x, config.patch_size, height, width)  # (N, C, H, W)
        if self.final_conv is not None:
            x = self.final_conv(x)
        return (x, features) if return_features else x
