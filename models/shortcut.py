"""Decayed residual shortcuts: the equation, its schedules and the depth rule (arXiv 2404.10947).

    x_{l+1} = alpha_l * x_l + f_l(x_l),      alpha_eff = prod_l alpha_l

One alpha for every sub-layer, in the order of execution: attention of block 0, MLP of block 0, attention of block 1, ...
Only the identity path is scaled, never the branch f (but for the ablations that say so).

    python -m models.shortcut --depth 12
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# Section "depth rule" of the paper: the share of the input that should reach the last layer by the shortcuts alone, and the alpha_min
# up to which training was unstable whatever the depth.
ALPHA_EFF_WINDOW = (1e-3, 1e-2)
UNSTABLE_UP_TO = 0.4
PLACEMENTS = ("both", "attention", "mlp")


def decayed_add(x: Tensor, branch: Tensor, alpha: float | Tensor) -> Tensor:
    """x_{l+1} = alpha_l * x_l + f_l(x_l) in one kernel.

    Args:
        x: the shortcut, any shape.
        branch: f_l(x_l), same shape.
        alpha: share of x that is kept; 1 is the plain residual, bit for bit. A tensor of no dimensions where it is learned.
    """
    if isinstance(alpha, Tensor):
        return torch.addcmul(branch, x, alpha.to(x.dtype))  # else autocast on a GPU would turn the stream into float32
    return torch.add(branch, x, alpha=alpha)


class Shortcut(nn.Module):
    """The residual connection of one sub-layer; it joins the shortcut and the branch.

    Args:
        alpha: share of the shortcut that is kept.
        branch_scale: factor of the branch; 1 but for two ablations.
        learnable: alpha is a parameter, and starts there.
        kind: "attention" or "mlp" (in a U-Net: a convolutional block), which `placement` chooses from.
    """

    def __init__(self, alpha: float = 1.0, branch_scale: float = 1.0, learnable: bool = False, kind: str = "mlp") -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor(float(alpha))) if learnable else alpha
        self.branch_scale, self.kind = branch_scale, kind

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        return decayed_add(x, branch if self.branch_scale == 1 else self.branch_scale * branch, self.alpha)

    @property
    def value(self) -> float:
        """alpha as a number; as learned, where it is."""
        return float(self.alpha.detach()) if isinstance(self.alpha, Tensor) else self.alpha

    @property
    def is_meta(self) -> bool:
        """alpha has no value yet."""
        return isinstance(self.alpha, Tensor) and self.alpha.is_meta

    @property
    def is_plain(self) -> bool:
        """x + f(x), and it stays so."""
        return not isinstance(self.alpha, Tensor) and self.alpha == 1 and self.branch_scale == 1

    def extra_repr(self) -> str:
        return f"alpha={self.value:.4g}" + (f", branch_scale={self.branch_scale:.4g}" if self.branch_scale != 1 else "")


def linear_schedule(num_sublayers: int, alpha_min: float) -> tuple[float, ...]:
    """alpha_l = 1 - delta * l, from exactly 1 in the first sub-layer to exactly alpha_min in the last.

    Args:
        num_sublayers: how many shortcuts there are (2 for each transformer block), at least 1.
        alpha_min: in (0, 1].

    Raises:
        ValueError: a count below 1 or an alpha_min outside (0, 1].
    """
    _check(num_sublayers, alpha_min)
    if num_sublayers == 1:
        return (float(alpha_min),)
    delta = (1 - alpha_min) / (num_sublayers - 1)
    return (*(1 - delta * layer for layer in range(num_sublayers - 1)), float(alpha_min))


def cosine_schedule(num_sublayers: int, alpha_min: float) -> tuple[float, ...]:
    """alpha_l = 1 - (1 - alpha_min) * (1 - cos(pi * l / (L - 1))) / 2, flat at both ends."""
    _check(num_sublayers, alpha_min)
    fall = (math.sin(math.pi / 2 * layer / max(1, num_sublayers - 1)) ** 2 for layer in range(num_sublayers - 1))  # 0 to 1
    return (*(1 - (1 - alpha_min) * share for share in fall), float(alpha_min))


def constant_schedule(num_sublayers: int, alpha_min: float) -> tuple[float, ...]:
    """alpha_l = alpha_min in every sub-layer."""
    _check(num_sublayers, alpha_min)
    return (float(alpha_min),) * num_sublayers


@dataclass(frozen=True)
class Schedule:
    """A row of the paper's ablation table.

    Attributes:
        about: one line for help texts.
        alphas: (number of sub-layers, alpha_min) -> one alpha for each.
        branch_scale: factor of every branch.
        takes_alpha_min: whether alpha_min says anything.
    """

    about: str
    alphas: Callable[[int, float], tuple[float, ...]]
    branch_scale: float = 1.0
    takes_alpha_min: bool = True


_SQRT_HALF = math.sqrt(0.5)
SCHEDULES: dict[str, Schedule] = {
    "linear": Schedule("from 1 down to alpha_min, the paper's", linear_schedule),
    "cosine": Schedule("from 1 to alpha_min along half a cosine", cosine_schedule),
    "constant": Schedule("alpha_min everywhere", constant_schedule),
    "sqrt-half": Schedule("sqrt(.5) on both paths", lambda n, _: (_SQRT_HALF,) * n, _SQRT_HALF, takes_alpha_min=False),
    "sqrt-half-branch": Schedule("sqrt(.5) on the branch only", lambda n, _: (1.0,) * n, _SQRT_HALF, takes_alpha_min=False),
}


def make_shortcuts(
    kinds: Sequence[str], alpha_min: float = 1.0, schedule: str = "linear", placement: str = "both", learnable: bool = False
) -> list[Shortcut]:
    """One shortcut for each sub-layer of a network.

    Args:
        kinds: "attention" or "mlp" for each sub-layer, in the order of execution.
        alpha_min: the schedule's; in (0, 1], 1 for schedules that take none.
        schedule: a key of `SCHEDULES`. It runs over the sub-layers that `placement` chooses; the others stay plain.
        placement: one of `PLACEMENTS`.
        learnable: the chosen alphas are parameters that start at the schedule.

    Raises:
        ValueError: an unknown name, or an alpha_min that does not fit.
    """
    rule = find_schedule(schedule)
    if not rule.takes_alpha_min and alpha_min != 1:
        raise ValueError(f"alpha_min is {alpha_min}, but the schedule {schedule} has none; leave it away, or give 1")
    if placement not in PLACEMENTS:
        raise ValueError(f"there is no shortcut placement {placement!r}; choose from {', '.join(PLACEMENTS)}")
    chosen = [placement in ("both", kind) for kind in kinds]
    alphas = iter(rule.alphas(sum(chosen), alpha_min) if any(chosen) else ())
    plain = (1.0, 1.0, False)
    return [
        Shortcut(*((next(alphas), rule.branch_scale, learnable) if fades else plain), kind)
        for kind, fades in zip(kinds, chosen, strict=True)
    ]


def find_schedule(name: str) -> Schedule:
    """The row of that name; ValueError names those that exist."""
    if name not in SCHEDULES:
        raise ValueError(f"there is no shortcut schedule {name!r}; choose from {', '.join(SCHEDULES)}")
    return SCHEDULES[name]


def describe(shortcuts: Sequence[Shortcut]) -> str:
    """In words: "plain shortcuts", or how alpha runs, where, and what else is scaled or learned."""
    fading = [shortcut for shortcut in shortcuts if not shortcut.is_plain]
    if not fading:
        return "plain shortcuts"
    kinds = {shortcut.kind for shortcut in fading}
    chosen = [shortcut.value for shortcut in shortcuts if shortcut.kind in kinds]  # the first of a fall has alpha 1
    first, last = chosen[0], chosen[-1]
    parts = [f"alpha {first:.3g}" if first == last else f"alpha {first:.3g} -> {last:.3g}"]
    parts += [f"{kind} only" for kind in kinds if len(kinds) < len({shortcut.kind for shortcut in shortcuts})]
    parts += [f"branches x {fading[0].branch_scale:.3g}"] if fading[0].branch_scale != 1 else []
    parts += ["learned"] if isinstance(fading[0].alpha, Tensor) else []
    return ", ".join(parts)


def effective_alpha(alphas: Sequence[float]) -> float:
    """alpha_eff = prod_l alpha_l, the share of the input that reaches the last layer by the shortcuts alone."""
    return math.prod(alphas)


def alpha_min_for(num_sublayers: int, effective: float = 3e-3, schedule: str = "linear") -> float:
    """The alpha_min whose schedule over `num_sublayers` has alpha_eff = `effective`.

    Raises:
        ValueError: fewer than 2 sub-layers (the first one may always have alpha = 1), `effective` outside (0, 1], a schedule
            without alpha_min.
    """
    rule = find_schedule(schedule)
    if num_sublayers < 2:
        raise ValueError(f"num_sublayers is {num_sublayers}; the depth rule needs at least 2")
    if not 0 < effective <= 1:
        raise ValueError(f"alpha_eff is {effective}; it must lie in (0, 1]")
    if not rule.takes_alpha_min:
        raise ValueError(f"the schedule {schedule} has no alpha_min, so alpha_eff cannot be chosen")
    low, high = 0.0, 1.0  # alpha_eff rises with alpha_min: bisect down to the last bit
    while low < (middle := (low + high) / 2) < high:
        if effective_alpha(rule.alphas(num_sublayers, middle)) < effective:
            low = middle
        else:
            high = middle
    return high


def alpha_window(num_sublayers: int, schedule: str = "linear") -> tuple[float, float]:
    """The range of alpha_min that the depth rule advises: alpha_eff in [1e-3, 1e-2)."""
    low, high = ALPHA_EFF_WINDOW
    return alpha_min_for(num_sublayers, low, schedule), alpha_min_for(num_sublayers, high, schedule)


def advised(shortcuts: Sequence[Shortcut], schedule: str = "linear", placement: str = "both") -> str | None:
    """What the depth rule advises for a network, in words: its window without what is unstable; None for a schedule without alpha_min."""
    if not SCHEDULES[schedule].takes_alpha_min:
        return None
    num_sublayers = sum(placement in ("both", shortcut.kind) for shortcut in shortcuts)
    low, high = alpha_window(num_sublayers, schedule)
    if high <= UNSTABLE_UP_TO:
        return "more blocks"
    window = f"from {low:.2f} to {high:.2f}" if low > UNSTABLE_UP_TO else f"above {UNSTABLE_UP_TO:g}, up to {high:.2f}"
    return f"alpha_min {window} for {num_sublayers} sub-layers"


def warnings_for(alphas: Sequence[float]) -> list[str]:
    """What the paper would say against these alphas: one line each, none for a plain network."""
    lines, effective, smallest = [], effective_alpha(alphas), min(alphas, default=1.0)
    if smallest <= UNSTABLE_UP_TO:
        lines.append(f"alpha falls to {smallest:.2g}; at {UNSTABLE_UP_TO:g} and less the paper saw unstable training at any depth")
    low, high = ALPHA_EFF_WINDOW
    if effective < 1 and not low <= effective < high:
        lines.append(f"alpha_eff is {effective:.2g}; the depth rule keeps it in [{low:g}, {high:g})")
    return lines


def advice(num_blocks: int, alpha_min: float | None = None, schedule: str = "linear", placement: str = "both") -> str:
    """The depth rule for a transformer of `num_blocks` blocks, as text: the window of alpha_min, the alphas, alpha_eff, warnings.

    Args:
        alpha_min: the one to look at; None takes the middle of the window, alpha_eff = 3e-3, or 0.41 if that is more: the least that
            was stable, to two digits.
        placement: "attention" or "mlp" let one sub-layer of each block fade, "both" both.

    Raises:
        ValueError: too few blocks, or an alpha_min outside (0, 1].
    """
    num_sublayers = num_blocks * (2 if placement == "both" else 1)
    if num_sublayers < 2:
        raise ValueError(f"{num_blocks} blocks have {max(0, num_sublayers)} shortcuts that fade; the depth rule needs at least 2")
    low, high = alpha_window(num_sublayers, schedule)
    if alpha_min is None:
        alpha_min = max(UNSTABLE_UP_TO + 0.01, alpha_min_for(num_sublayers, schedule=schedule))
    alphas = SCHEDULES[schedule].alphas(num_sublayers, alpha_min)
    lines = [
        f"{num_blocks} blocks, {num_sublayers} sub-layers that fade, schedule {schedule}",
        f"window    alpha_min {low:.3f} to {high:.3f}, for alpha_eff in [{ALPHA_EFF_WINDOW[0]:g}, {ALPHA_EFF_WINDOW[1]:g})",
        f"alpha_min {alpha_min:.3f}, alpha_eff {effective_alpha(alphas):.3g}",
        f"alphas    {' '.join(f'{alpha:.3f}' for alpha in alphas)}",
        *(f"warning:  {line}" for line in warnings_for(alphas)),
    ]
    if high <= UNSTABLE_UP_TO:
        lines.append(f"warning:  the whole window is unstable, as is all up to {UNSTABLE_UP_TO:g}: choose more blocks")
    elif low <= UNSTABLE_UP_TO:
        lines.append(f"warning:  of the window only {UNSTABLE_UP_TO:g} < alpha_min < {high:.3f} is stable")
    return "\n".join(lines)


def _check(num_sublayers: int, alpha_min: float) -> None:
    if isinstance(alpha_min, bool) or not isinstance(alpha_min, int | float):
        raise ValueError(f"alpha_min is {alpha_min!r}; it must be a number in (0, 1]")
    if num_sublayers < 1:
        raise ValueError(f"num_sublayers is {num_sublayers}; the schedule needs at least 1")
    if not 0 < alpha_min <= 1:
        raise ValueError(f"alpha_min is {alpha_min}; it must lie in (0, 1], and 1 is the plain network")


def main() -> None:
    """The command line."""
    from models.files import Parser, one_line_errors

    flags = Parser(description="The depth rule: which alpha_min suits a transformer of that depth.")
    flags.add_argument("--depth", type=int, required=True, help="number of blocks, each of two sub-layers")
    flags.add_argument("--alpha_min", type=float, help="look at this value (default: the one with alpha_eff 3e-3, or 0.41 if that is more)")
    names = [name for name, schedule in SCHEDULES.items() if schedule.takes_alpha_min]
    flags.add_argument("--schedule", choices=names, default="linear", help="how alpha falls (default: %(default)s)")
    flags.add_argument("--placement", choices=PLACEMENTS, default="both", help="which sub-layers fade (default: %(default)s)")
    parsed = flags.parse_args()
    with one_line_errors():
        print(advice(parsed.depth, parsed.alpha_min, parsed.schedule, parsed.placement))


if __name__ == "__main__":
    main()
