"""Decayed shortcuts for networks of other libraries, in one call (arXiv 2404.10947).

    network = decay_shortcuts(timm.create_model("vit_base_patch16_224"), alpha_min=0.6)
    network = decay_shortcuts(UNet2DModel.from_pretrained("google/ddpm-cifar10-32"), alpha_min=0.8)

A residual block that fades gets a class of its own: a subclass of the one it had, with the same weights, whose sums x + f(x) are
`Shortcut`s. What the equation means where x + f(x) is not all there is:

- U-Net, residual block: x_{l+1} = (alpha P x + f(x)) / s, with P the 1x1 convolution or the resampling on its shortcut and s its
  `output_scale_factor`; its kind is "mlp". Its attention likewise. The concatenated long skips stay as they are.
- U-Net with cross-attention: the transformer between two residual blocks (`Transformer2DModel`) is one sub-layer of the U-Net's
  stream, of kind "attention". Its f holds a stream of its own, in which self-attention, cross-attention and feed-forward each have
  their shortcut; they come before the outer one, whose sum is computed last. What the U-Net's own stream keeps of its input is the
  product over residual blocks and outer shortcuts; `effective_alpha` of all shortcuts is a lower bound of it.
"""

import importlib
import warnings
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import islice, zip_longest
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from models.shortcut import PLACEMENTS, Shortcut, find_schedule, make_shortcuts, warnings_for

DEFAULT_ALPHA_MIN = 0.6  # the paper's for 12 blocks
_RECORD = "decayed_shortcuts"  # the entry in the config of a diffusers network
_SUPPORTED = "timm's VisionTransformer and diffusers' UNet2DModel, UNet2DConditionModel and DiTTransformer2DModel"
_HINT = f"decay_shortcuts knows {_SUPPORTED}; teach it other blocks with models.apply.register_block"


def decay_shortcuts(
    network: nn.Module, alpha_min: float | None = None, schedule: str = "linear", placement: str = "both", learnable: bool = False
) -> nn.Module:
    """Let the shortcuts of a network fade with depth, in place; once more replaces what was there.

    Nothing is added, and so no long skips: networks that have none lose detail by fading, and the paper's masked autoencoder without
    them was worse than the plain one (linear probe 61.5 and 76.5 on ImageNet-100; 83.6 with them).

    State dicts keep their keys (learnable alphas add theirs), weights and calls stay. Saved by `save_pretrained`, a diffusers network
    comes back decayed from `type(network).from_pretrained` and from pipelines, and plain, with a warning, from its own class.

    Args:
        network: timm's VisionTransformer, diffusers' UNet2DModel, UNet2DConditionModel or DiTTransformer2DModel; or anything that
            consists of their blocks and of those given to `register_block`, executed in the order in which they are registered.
            Decay before wrapping it (DDP, FSDP) and before an optimizer takes its parameters.
        alpha_min: in (0, 1]; at 1 no bit of the output changes. 0.6 unless given, where the schedule takes one.
        schedule: a key of `models.shortcut.SCHEDULES`, over the sub-layers in the order of execution.
        placement: "both", "attention" or "mlp".
        learnable: the alphas are parameters that start at the schedule.

    Returns:
        The same network.

    Warns:
        UserWarning: alphas that the depth rule advises against; a network that is none of the four, for the order of execution and
            other residual blocks are then not known.

    Raises:
        ValueError: a network or a part of it that is not known, or arguments that do not fit; the network is as it was.
    """
    set_shortcuts(network, alpha_min, schedule, placement, learnable)
    shortcuts = shortcuts_of(network)
    lines = [] if any(shortcut.is_meta for shortcut in shortcuts) else warnings_for([shortcut.value for shortcut in shortcuts])
    if not any(_qualified(each) in _NETWORKS for each in _plain(network).__mro__) and not any(
        _qualified(_plain(block)) in _RULES_GIVEN for block in _blocks(network)
    ):
        what = f"{len(shortcuts)} shortcuts of the {_plain(network).__name__} fade, in the order in which they are registered"
        lines.append(f"{what}; see that this is the order of execution, and all of them (models.apply.shortcuts_of)")
    for line in lines:
        warnings.warn(line, stacklevel=2)
    return network


def set_shortcuts(network: nn.Module, alpha_min: float | None, schedule: str, placement: str, learnable: bool) -> None:
    """What `decay_shortcuts` does, without its advice."""
    if alpha_min is None:
        alpha_min = DEFAULT_ALPHA_MIN if find_schedule(schedule).takes_alpha_min else 1.0
    blocks = list(_blocks(network)) if isinstance(network, nn.Module) else []
    if not blocks:
        raise ValueError(f"{type(network).__name__} holds no residual block that is known; {_HINT}")
    kinds = [_kinds(block) for block in blocks]
    shortcuts = iter(make_shortcuts([kind for each in kinds for kind in each], alpha_min, schedule, placement, learnable))
    restore_shortcuts(network)
    for block, own_kinds in zip(blocks, kinds, strict=True):
        weight = next(block.parameters(), torch.empty(0))
        block.shortcuts = nn.ModuleList(islice(shortcuts, len(own_kinds))).to(weight.device, weight.dtype)
        # Without decay a block keeps its own code, so that no bit changes: with its operands swapped a sum may have another memory layout,
        # by which the next convolution rounds.
        if not all(shortcut.is_plain for shortcut in block.shortcuts):
            block.__class__ = _decayed(_plain(block))
    if hasattr(network, "register_to_config"):
        network.__class__ = _decayed(_plain(network))
        record = dict(alpha_min=alpha_min, schedule=schedule, placement=placement, learnable=learnable)
        network.register_to_config(**{_RECORD: record})


def restore_shortcuts(network: nn.Module) -> nn.Module:
    """Undo `decay_shortcuts`, in place; nothing where there is nothing to undo. Returns the network."""
    for module in network.modules():
        if _qualified(_plain(module)) in _RULES:
            module._modules.pop("shortcuts", None)
        if isinstance(module, _Decayed):
            module.__class__ = _plain(module)
            if _RECORD in vars(module).get("_internal_dict", ()):
                module._internal_dict = type(module.config)({name: value for name, value in module.config.items() if name != _RECORD})
    return network


def shortcuts_of(network: nn.Module) -> list[Shortcut]:
    """The shortcuts of a decayed network in the order of execution; none of a plain one.

    A block whose shortcuts are all plain runs its library's code; then they tell, and are not called.
    """
    return [shortcut for block in _blocks(network) for shortcut in block._modules.get("shortcuts", ())]


def register_block(block: type[nn.Module], rule: type) -> None:
    """Teach `decay_shortcuts` a residual block.

        class MyRule:
            def sublayers(self): return "attention", "mlp"
            def forward(self, x):
                x = self.shortcuts[0](x, self.attn(self.norm1(x)))
                return self.shortcuts[1](x, self.mlp(self.norm2(x)))

        register_block(MyBlock, MyRule)

    Args:
        block: the class, exactly; subclasses may compute something else.
        rule: what the decayed class puts in front of it. `sublayers` says of which kind ("attention" or "mlp") the shortcuts are that
            `forward` finds in `self.shortcuts`: one for each sum, in the order of execution. No kinds: this one is no residual block.

    Raises:
        ValueError: `rule` is not such a class.
    """
    if not (isinstance(rule, type) and callable(getattr(rule, "sublayers", None))):
        raise ValueError(f"{rule!r} is no rule; give a class with sublayers() and forward(), such as the docstring's")
    _RULES[_qualified(block)] = rule
    _RULES_GIVEN.add(_qualified(block))
    _decayed.cache_clear()


_Mixin: Any = object  # what is mixed into a library's class finds that class's attributes


class _TimmBlock(_Mixin):
    """Layer scale and drop path belong to the branch."""

    def sublayers(self) -> tuple[str, ...]:
        return "attention", "mlp"

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        x = self.shortcuts[0](x, self.drop_path1(self.ls1(self.attn(self.norm1(x), **options))))  # (N, T, D)
        x = self.shortcuts[1](x, self.drop_path2(self.ls2(self.mlp(self.norm2(x)))))
        return x


class _BasicTransformerBlock(_Mixin):
    """Self-attention, cross-attention where there is one, feed-forward. The gates of adaLN-Zero belong to the branch."""

    def sublayers(self) -> tuple[str, ...]:
        parts = {"norm_type " + self.norm_type: self.norm_type not in ("layer_norm", "ada_norm_zero")}
        parts |= {"positional_embeddings": self.pos_embed is not None, "a gated fuser (GLIGEN)": hasattr(self, "fuser")}
        if any(parts.values()):
            refused = ", ".join(name for name, there in parts.items() if there)
            raise ValueError(
                f"decay_shortcuts cannot run a BasicTransformerBlock with {refused}; it knows norm_type layer_norm, ada_norm_zero"
            )
        return "attention", *(["attention"] if self.attn2 is not None else []), "mlp"

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
    ) -> Tensor:
        x, options, gated = hidden_states, cross_attention_kwargs or {}, self.norm_type == "ada_norm_zero"
        if gated:
            h, gate1, shift2, scale2, gate2 = self.norm1(x, timestep, class_labels, hidden_dtype=x.dtype)
        else:
            h = self.norm1(x)  # (N, T, D)
        context = encoder_hidden_states if self.only_cross_attention else None
        h = self.attn1(h, encoder_hidden_states=context, attention_mask=attention_mask, **options)
        x = self.shortcuts[0](x, gate1.unsqueeze(1) * h if gated else h)
        if self.attn2 is not None:
            h = self.attn2(self.norm2(x), encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask, **options)
            x = self.shortcuts[1](x, h)
        h = self.norm3(x)
        if gated:
            h = h * (1 + scale2[:, None]) + shift2[:, None]
        if self._chunk_size is None:
            h = self.ff(h)
        else:  # `enable_forward_chunking` saves memory
            h = torch.cat([self.ff(chunk) for chunk in h.split(self._chunk_size, self._chunk_dim)], self._chunk_dim)
        return self.shortcuts[-1](x, gate2.unsqueeze(1) * h if gated else h)


class _Transformer2DModel(_Mixin):
    """The outer shortcut, around projections and transformer blocks; where it eats patches (DiT's ancestor) there is none."""

    def sublayers(self) -> tuple[str, ...]:
        return ("attention",) if self.is_input_continuous else ()

    def _get_output_for_continuous_inputs(self, *, residual: Tensor, **options: Any) -> Tensor:
        branch = super()._get_output_for_continuous_inputs(residual=0, **options)  # (N, C, H, W)
        return self.shortcuts[0](residual, branch)


class _Attention(_Mixin):
    """Attention with a shortcut of its own, as U-Nets without text have it. Inside transformer blocks it has none."""

    def sublayers(self) -> tuple[str, ...]:
        if "AddedKV" in type(self.processor).__name__:
            raise ValueError(f"decay_shortcuts cannot run attention with {type(self.processor).__name__}, which adds the shortcut itself")
        return ("attention",) if self.__dict__["residual_connection"] else ()

    # the processor computes the branch alone
    residual_connection = property(lambda self: False)
    rescale_output_factor = property(lambda self: 1.0)

    def forward(self, hidden_states: Tensor, *args: Any, **options: Any) -> Tensor:
        x = self.shortcuts[0](hidden_states, super().forward(hidden_states, *args, **options))  # (N, C, H, W)
        return _rescaled(x, self.__dict__["rescale_output_factor"])


class _ResnetBlock2D(_Mixin):
    """Norm - SiLU - convolution, twice, with the time in between; up- and downsampling and channels may change on both paths."""

    def sublayers(self) -> tuple[str, ...]:
        return ("mlp",)

    def forward(self, input_tensor: Tensor, temb: Any = None) -> Tensor:  # (N, C), or None where the block knows no time
        x = input_tensor  # (N, C, H, W)
        h = self.nonlinearity(self.norm1(x))
        for resample in (self.upsample, self.downsample):
            if resample is not None:
                x, h = resample(x), resample(h)
        h = self.conv1(h)
        if self.time_emb_proj is not None:
            temb = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))[:, :, None, None]
        if self.time_embedding_norm == "scale_shift":
            scale, shift = temb.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h if temb is None else h + temb)
        h = self.conv2(self.dropout(self.nonlinearity(h)))
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x)
        return _rescaled(self.shortcuts[0](x, h), self.output_scale_factor)


# Where a block lives -> how it runs with shortcuts. Names, so that nothing is imported before it is used.
_RULES: dict[str, type] = {
    "timm.models.vision_transformer.Block": _TimmBlock,
    "diffusers.models.attention.BasicTransformerBlock": _BasicTransformerBlock,
    "diffusers.models.transformers.transformer_2d.Transformer2DModel": _Transformer2DModel,
    "diffusers.models.attention_processor.Attention": _Attention,
    "diffusers.models.resnet.ResnetBlock2D": _ResnetBlock2D,
}


_RULES_GIVEN: set[str] = set()  # those of `register_block`
# of which the order of execution is known
_NETWORKS = {
    "timm.models.vision_transformer.VisionTransformer",
    "diffusers.models.unets.unet_2d.UNet2DModel",
    "diffusers.models.unets.unet_2d_condition.UNet2DConditionModel",
    "diffusers.models.transformers.dit_transformer_2d.DiTTransformer2DModel",
}


def _rescaled(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1 else x / factor


class _Decayed(_Mixin):
    """What every decayed class has: the one it came from, and copies and pickles that need no name for it."""

    plain: ClassVar[type[nn.Module]]

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return _blank, (self.plain,), self.__getstate__()


class _Recorded(_Mixin):
    """A diffusers network whose config says how it was decayed."""

    @classmethod
    def from_config(cls, config: Any, return_unused_kwargs: bool = False, **options: Any) -> Self | tuple[Self, dict[str, Any]]:
        """Build the network, and decay it as its config says (without an entry: as `decay_shortcuts` does by itself)."""
        if not isinstance(config, Mapping):  # a folder or a name, as diffusers' EMAModel gives it
            config, options = cls.load_config(config, return_unused_kwargs=True, **options)
        record = {"alpha_min": None, "schedule": "linear", "placement": "both", "learnable": False, **config.get(_RECORD, {})}
        config = {name: value for name, value in config.items() if name != _RECORD}
        network, unused = super().from_config(config, return_unused_kwargs=True, **options)
        set_shortcuts(network, **record)
        return (network, unused) if return_unused_kwargs else network


@cache
def _decayed(plain: Any) -> Any:
    """The class of a decayed block or network."""
    rule = _RULES.get(_qualified(plain))
    bases = ((rule,) if rule else ()) + ((_Recorded,) if hasattr(plain, "register_to_config") else ()) + (_Decayed, plain)
    return type(f"Decayed{plain.__name__}", bases, {"plain": plain, "__module__": __name__, "__doc__": plain.__doc__})


def _blank(plain: Any) -> nn.Module:
    """For copies and pickles: one of the decayed class, without state."""
    decayed = _decayed(plain)
    return decayed.__new__(decayed)


def __getattr__(name: str) -> type[nn.Module]:
    """`DecayedUNet2DModel` and so on: the decayed class of a diffusers network, as a pipeline's index names it.

    Loading it, a pipeline wants to see in the same module that it is a `ModelMixin`.
    """
    if name == "ModelMixin" or name.startswith("Decayed"):
        plain = getattr(importlib.import_module("diffusers"), name.removeprefix("Decayed"), None)
        if isinstance(plain, type) and issubclass(plain, nn.Module):
            return plain if name == "ModelMixin" else _decayed(plain)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _plain(module: nn.Module) -> Any:
    return module.plain if isinstance(module, _Decayed) else type(module)


def _qualified(block: type) -> str:
    return f"{block.__module__}.{block.__qualname__}"


def _kinds(module: nn.Module) -> tuple[str, ...]:
    """Of the sub-layers whose sums the module computes itself."""
    rule: Any = _RULES.get(_qualified(_plain(module)))
    kinds = tuple(rule.sublayers(module)) if rule else ()
    if rule and (unknown := set(kinds) - set(PLACEMENTS[1:])):
        raise ValueError(
            f"{rule.__name__} says that {type(module).__name__} has sub-layers {', '.join(unknown)}; the kinds are {PLACEMENTS[1:]}"
        )
    return kinds


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The residual blocks in the order of execution: of nested ones the inner first, whose sums are computed first."""
    for child in _children(module):
        yield from _blocks(child)
    if _kinds(module):
        yield module


def _children(module: nn.Module) -> list[nn.Module]:
    """In the order of execution; in diffusers' U-Nets that is not the order of registration."""
    if not hasattr(module, "resnets"):
        late = {"mid_block": 1, "up_blocks": 2}
        return [child for _, child in sorted(module.named_children(), key=lambda item: late.get(item[0], 0))]
    # a stage of a U-Net: residual block, attention, residual block, ..., and then the resampling
    children = dict(module.named_children())
    steps = [step for pair in zip_longest(children.pop("resnets"), children.pop("attentions", ())) for step in pair if step is not None]
    resampling = [step for name in ("downsamplers", "upsamplers") for step in children.pop(name, ())]
    unknown = [type(step).__name__ for step in steps if _qualified(_plain(step)) not in _RULES] + list(children)
    if unknown:
        raise ValueError(f"{type(module).__name__} has parts that are not known: {', '.join(dict.fromkeys(unknown))}; {_HINT}")
    return steps + resampling
