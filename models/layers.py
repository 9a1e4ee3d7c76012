"""Parts that backbones share: attention, MLP, the embeddings of patches' positions, time and labels, and what all backbones are."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from models.shortcut import Shortcut


class DecayedModel(ModelMixin, ConfigMixin):
    """A backbone whose `shortcuts` fade, in the order of execution; saved and loaded as diffusers' models are."""

    shortcuts: list[Shortcut]
    gradient_checkpointing = False  # see `enable_gradient_checkpointing`, of diffusers
    _supports_gradient_checkpointing = True
    _no_split_modules: tuple[str, ...]  # classes of the blocks: FSDP gathers one of them at a time

    def recomputing(self, block: nn.Module, *arguments: Tensor | None) -> Tensor:
        """block(*arguments). With gradient checkpointing what is inside is not kept, but computed again on the way back."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(block, *arguments)
        return block(*arguments)

    @property
    def alphas(self) -> tuple[float, ...]:
        """Of the sub-layers (of an MAE: the encoder's), in the order of execution; as learned, where they are."""
        return tuple(shortcut.value for shortcut in self.shortcuts)


UNFUSED_UP_TO = 1024  # tokens; beyond, (T, T) scores that are kept for the way back take more memory than they save time


def scaled_dot_product_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for 3 x (N, H, T, d)."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[-2] <= UNFUSED_UP_TO:
        # on CPUs torch's fused kernel in bf16 takes 2.7 to 6 times as long, forward and back, as three plain steps at 64 to 256 tokens
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (N, H, T, T)
        return scores.softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """Multi-head self-attention over (N, T, D)."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        qkv = self.qkv(x).view(n, t, 3, self.num_heads, d // self.num_heads)  # (N, T, 3, H, D/H)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # 3 x (N, H, T, D/H)
        x = scaled_dot_product_attention(q, k, v)  # (N, H, T, D/H)
        return self.proj(x.transpose(1, 2).reshape(n, t, d))  # (N, T, D)


def gelu(x: Tensor, approximate: str) -> Tensor:
    """x * Phi(x), exact ("none") or with Phi(x) approximated by tanh ("tanh")."""
    if approximate == "tanh" and torch.compiler.is_compiling():
        # (1 + tanh u) / 2 = sigmoid(2u): what is compiled for a CPU takes a fourth of the time with exp that it takes with tanh
        return x * torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x * x * x))
    return F.gelu(x, approximate=approximate)


class MLP(nn.Module):
    """Linear - GELU - Linear over (..., D). GELU is exact (ViT, MAE, U-ViT) or by tanh (DiT)."""

    def __init__(self, dim: int, hidden_dim: int, gelu: str = "none") -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.gelu = gelu

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(gelu(self.fc1(x), self.gelu))


class Block(nn.Module):
    """The transformer block of ViT: attention and MLP behind layer norms, each on its (decayed) shortcut.

    Args:
        shortcuts: of the attention and of the MLP.
        qkv_bias: ViT and MAE have it, U-ViT has not.
        eps: of the layer norms.
    """

    def __init__(self, dim: int, num_heads: int, shortcuts: Sequence[Shortcut], qkv_bias: bool = True, eps: float = 1e-6) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, num_heads, qkv_bias)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = MLP(dim, 4 * dim)
        self.shortcut1, self.shortcut2 = shortcuts

    def forward(self, x: Tensor) -> Tensor:
        x = self.shortcut1(x, self.attn(self.norm1(x)))
        x = self.shortcut2(x, self.mlp(self.norm2(x)))
        return x


def sinusoids(t: Tensor, dim: int) -> Tensor:
    """Times (N,) -> float32 (N, D), cosines first; dim is even."""
    # computed anew, in float32: a buffer of frequencies would be rounded with the weights of a bf16 model
    exponents = -math.log(10_000) * torch.arange(dim // 2, device=t.device, dtype=torch.float32) / (dim // 2)
    angles = t[:, None].float() * exponents.exp()  # (N, D/2)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class TimestepEmbedding(nn.Module):
    """Time (N,) -> sinusoids -> MLP -> (N, D)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(256, dim)
        self.fc2 = nn.Linear(dim, dim)
        nn.init.normal_(self.fc1.weight, std=0.02)
        nn.init.normal_(self.fc2.weight, std=0.02)

    def forward(self, t: Tensor) -> Tensor:
        return self.fc2(F.silu(self.fc1(sinusoids(t, self.fc1.in_features).to(self.fc1.weight.dtype))))


class LabelEmbedding(nn.Embedding):
    """Labels (N,) -> (N, D). The last row stands for "no label": classifier-free guidance trains and asks it."""

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__(num_classes + 1, dim)
        nn.init.normal_(self.weight, std=0.02)


def check_patches(image_size: int, patch_size: int) -> None:
    """Raise ValueError where patches do not cover an image."""
    if image_size % patch_size:
        raise ValueError(f"resolution {image_size} is not divisible by patch_size {patch_size}; choose a patch that divides it")


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """(N, C, H, W) -> (N, T, C * p * p), a patch's values ordered as a convolution's kernel."""
    n, c, h, w = images.shape
    p = patch_size
    return images.view(n, c, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5).reshape(n, (h // p) * (w // p), c * p * p)


def unpatchify(patches: Tensor, patch_size: int, height_px: int, width_px: int) -> Tensor:
    """(N, T, p * p * C) -> (N, C, H, W), a patch's values ordered with the channel last (as in MAE, DiT, SiT)."""
    n, p = len(patches), patch_size
    grid = patches.view(n, height_px // p, width_px // p, p, p, -1)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(n, -1, height_px, width_px)


def sincos_positions(dim: int, height: int, width: int) -> Tensor:
    """Fixed two-dimensional sine-cosine positions (T, D): the first half encodes the column, the second the row (MAE)."""
    if dim % 4:
        raise ValueError(f"sin-cos positions need a width divisible by 4, not {dim}; choose {max(4, dim // 4 * 4)}")
    omega = 1 / 10_000 ** (torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    halves = [axis.reshape(-1, 1) * omega for axis in (columns, rows)]  # 2 x (T, D/4)
    return torch.cat([part for angles in halves for part in (angles.sin(), angles.cos())], dim=1).float()
