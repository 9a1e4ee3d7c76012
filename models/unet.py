"""The decayed U-Net: diffusers' UNet2DModel, the network of DDPM, as a backbone (arXiv 2006.11239, 2404.10947)."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import UNet2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from models.apply import set_shortcuts, shortcuts_of
from models.layers import DecayedModel, scaled_dot_product_attention
from models.shortcut import Shortcut


class SelfAttention:
    """What diffusers' `AttnProcessor2_0` computes over the pixels of (N, C, H, W), by the attention that all backbones share."""

    # `Attention.forward` warns of arguments that its processor does not name, which would break a compiled graph; these are not used
    def __call__(
        self, attn: Attention, x: Tensor, encoder_hidden_states: None = None, attention_mask: None = None, temb: Any = None
    ) -> Tensor:
        h = attn.group_norm(x.flatten(2)).transpose(1, 2)  # (N, H*W, C)
        q, k, v = (project(h).unflatten(2, (attn.heads, -1)).transpose(1, 2) for project in (attn.to_q, attn.to_k, attn.to_v))
        h = attn.to_out[0](scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        h = h.transpose(1, 2).reshape(x.shape)
        return (h + x if attn.residual_connection else h) / attn.rescale_output_factor


class UNet(DecayedModel):
    """Convolutional U-Net whose residual shortcuts fade from its first to its last sub-layer; alpha_min = 1 is the plain network.

    A level is a "down" stage of `layers_per_block` residual blocks and an "up" stage of one more; between the lowest two there is
    the middle, block - attention - block. The resolution halves from level to level. Long skips are concatenated, always.

    Args:
        image_size: edge of the square input in pixels (or latent cells); must be divisible by 2 ** (levels - 1).
        in_channels: channels of input and output.
        num_classes: 0 for an unconditional model.
        channels: widths of the levels.
        layers_per_block: residual blocks of a level on the way down.
        attention_levels: levels (0 is the highest resolution) where every residual block is followed by attention.
        alpha_min, shortcut_schedule, shortcut_placement, learnable_alpha: of the sub-layers' shortcuts; see
            `models.shortcut.make_shortcuts`. A residual block is of kind "mlp"; what the equation means there says `models.apply`.
        zero_init: start with closed branches and a zero output convolution, as DDPM does; else with small random ones.
        head_dim: channels of an attention head; must divide the widths that attend.
        norm_groups: of the group norms; must divide all widths.
        time_scale: what t is multiplied with before its sinusoids, which are made for numbers up to 1000. 1000 is for flow times in
            [0, 1]; give 1 for a DDPM's integer timesteps.

    Raises:
        ValueError: sizes that do not fit together, with the remedy.
    """

    @register_to_config
    def __init__(
        self,
        image_size: int = 32,
        in_channels: int = 3,
        num_classes: int = 0,
        channels: Sequence[int] = (32, 64, 128),
        layers_per_block: int = 2,
        attention_levels: Sequence[int] = (1, 2),
        alpha_min: float = 1.0,
        shortcut_schedule: str = "linear",
        shortcut_placement: str = "both",
        learnable_alpha: bool = False,
        zero_init: bool = True,
        head_dim: int = 32,
        norm_groups: int = 8,
        time_scale: float = 1000.0,
    ) -> None:
        super().__init__()
        levels = len(channels)
        attends = [level in attention_levels for level in range(levels)]
        if image_size % 2 ** (levels - 1):
            raise ValueError(
                f"resolution {image_size} cannot be halved {levels - 1} times; use a multiple of {2 ** (levels - 1)} or fewer channels"
            )
        if not set(attention_levels) <= set(range(levels)):
            raise ValueError(f"attention_levels {tuple(attention_levels)} must lie in 0 to {levels - 1}, as there are {levels} channels")
        if any(width % norm_groups for width in channels):
            raise ValueError(f"norm_groups {norm_groups} does not divide all channels {tuple(channels)}; choose one that does")
        if any(width % head_dim for width, here in zip(channels, [*attends[:-1], True], strict=True) if here):
            raise ValueError(
                f"head_dim {head_dim} does not divide the channels of the attention levels and of the last level; choose one that does"
            )
        self.unet = UNet2DModel(
            sample_size=image_size,
            in_channels=in_channels,
            out_channels=in_channels,
            block_out_channels=tuple(channels),
            layers_per_block=layers_per_block,
            down_block_types=tuple("AttnDownBlock2D" if here else "DownBlock2D" for here in attends),
            up_block_types=tuple("AttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attends)),
            attention_head_dim=head_dim,
            norm_num_groups=norm_groups,
            norm_eps=1e-6,  # DDPM's; where shortcuts fade, variances are small
            num_class_embeds=num_classes + 1 if num_classes else None,  # the last row stands for "no label"
        )
        for attention in self._attentions:
            attention.set_processor(SelfAttention())
        set_shortcuts(self.unet, alpha_min, shortcut_schedule, shortcut_placement, learnable_alpha)
        if zero_init:
            self._zero_branches()

    @property  # the blocks, which hold them, are a library's
    def shortcuts(self) -> list[Shortcut]:  # type: ignore[override]
        """Of the sub-layers, in the order of execution: down, middle, up."""
        return shortcuts_of(self.unet)

    @property
    def _no_split_modules(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(sorted({type(module).__name__ for module in self.modules() if isinstance(module, ResnetBlock2D)}))

    @property
    def stages(self) -> list[nn.Module]:
        """In the order of execution."""
        return [*self.unet.down_blocks, self.unet.mid_block, *self.unet.up_blocks]

    @property
    def numbers_held(self) -> int:
        """About how many numbers are in memory for one image: a block's activations, and what the long skips keep."""
        sizes = [(self.config.image_size // 2**level) ** 2 * width for level, width in enumerate(self.config.channels)]
        return 16 * max(sizes) + (self.config.layers_per_block + 1) * sum(sizes)

    @property
    def _attentions(self) -> list[Attention]:
        return [module for module in self.unet.modules() if isinstance(module, Attention)]

    def _zero_branches(self) -> None:
        """The last layer of every branch and of the network."""
        last = [self.unet.conv_out]
        last += [module.conv2 for module in self.unet.modules() if isinstance(module, ResnetBlock2D)]
        last += [attention.to_out[0] for attention in self._attentions]
        for layer in last:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self, x: Tensor, t: Tensor, labels: Tensor | None = None, return_features: bool = False
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Predict what was trained (velocity, noise, ..) from noisy images.

        Args:
            x: (N, C, H, W).
            t: (N,), flow times from 0 = noise to 1 = data, or a DDPM's timesteps; see `time_scale`.
            labels: int64 (N,) in [0, num_classes]; num_classes, as None, means "no label".
            return_features: also return the output of every down, middle and up stage, each after its resampling: a list of (N, H*W, D)
                with the H, W and D of that place.

        Returns:
            (N, C, H, W), or that and the features.
        """
        if not self.config.num_classes:
            labels = None
        elif labels is None:
            labels = torch.full_like(t, self.config.num_classes, dtype=torch.long)
        features: list[Tensor] = []

        def keep(stage: nn.Module, inputs: tuple, output: Tensor | tuple) -> None:
            output = output[0] if isinstance(output, tuple) else output  # down stages return their skips, too
            features.append(output.flatten(2).transpose(1, 2))  # (N, H*W, D)

        handles = [stage.register_forward_hook(keep) for stage in self.stages] if return_features else []
        try:
            x = self.unet(x, self.config.time_scale * t.float(), class_labels=labels, return_dict=False)[0]  # (N, C, H, W)
        finally:
            for handle in handles:
                handle.remove()
        return (x, features) if return_features else x
