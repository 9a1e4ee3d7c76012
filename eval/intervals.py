"""How far a number would move with other samples: estimates with intervals, their differences, and a verdict.

The reference is taken as known, as every published distance takes it; what varies are the generated images. Nothing is resampled
with replacement: a bootstrap repeats images, which for a Fréchet distance adds its bias (about 1 / N) a second time, and for
neighbours makes balls of radius 0. Instead the spread comes from the influence of every image on the number (the infinitesimal
jackknife, which is the bootstrap's limit and leaves the number where it is), or, where there is no derivative, from random halves.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any

import numpy as np
from scipy.stats import t as student

LEVEL = 0.95
Z = NormalDist().inv_cdf((1 + LEVEL) / 2)
HALVES = 50


@dataclass(frozen=True)
class Estimate:
    """A number and what its spread is made of.

    Attributes:
        value: of all N samples.
        spread: (N,) of mean 0, what every sample does to the value (its influence), which varies as their mean does.
        extra_se: spread from elsewhere, such as the random subsets of a KID.
        fit: (P,) residuals whose norm is the standard error of a fit over subsets; the same subsets for all estimates of one N.
        how: in words.
        limits: that the number cannot leave.
    """

    value: float
    spread: np.ndarray = field(repr=False)
    extra_se: float = 0.0
    fit: np.ndarray | None = field(default=None, repr=False)
    how: str = ""
    limits: tuple[float, float] = (-math.inf, math.inf)

    @property
    def standard_error(self) -> float:
        of_fit = 0.0 if self.fit is None else float(np.linalg.norm(self.fit))
        return float(np.linalg.norm([self._of_samples(), self.extra_se, of_fit]))

    def _of_samples(self) -> float:
        return self.spread.std(ddof=1) / len(self.spread) ** 0.5

    def interval(self) -> tuple[float, float]:
        """Both ends."""
        reach = Z * self.standard_error
        return max(self.limits[0], self.value - reach), min(self.limits[1], self.value + reach)

    def as_json(self) -> dict[str, Any]:
        low, high = self.interval()
        return {"value": self.value, "low": low, "high": high, "level": LEVEL, "interval": self.how}


@dataclass(frozen=True)
class OfHalves(Estimate):
    """A number that has no derivative: its spread is (HALVES,) the number of random halves of the samples.

    It varies around its mean as the value does around its own (the delete-half jackknife, Shao and Wu 1989). The same halves for all
    estimates of one N, so that differences are paired.
    """

    def _of_samples(self) -> float:
        return self.spread.std(ddof=1)


@dataclass(frozen=True)
class Share(Estimate):
    """A share of the samples, such as a precision: Wilson's interval, which does not shrink to nothing at 0 and 1."""

    def interval(self) -> tuple[float, float]:
        """Both ends, within [0, 1]."""
        num = len(self.spread)
        middle = (self.value + Z**2 / (2 * num)) / (1 + Z**2 / num)
        reach = Z / (1 + Z**2 / num) * math.sqrt(self.value * (1 - self.value) / num + Z**2 / (4 * num**2))
        return max(0.0, middle - reach), min(1.0, middle + reach)


@dataclass(frozen=True)
class ShareDifference(Estimate):
    """A difference of two shares of the same samples: Bonett and Price's interval (2012).

    One more sample is counted for either side, so it neither shrinks to nothing where both agree on all samples, nor leaves out 0
    because of the first few on which they do not.
    """

    def interval(self) -> tuple[float, float]:
        """Both ends, within [-1, 1]."""
        changes, num = np.rint(self.spread + self.value), len(self.spread) + 2  # -1, 0 or 1
        gained, lost = ((int((changes == sign).sum()) + 1) / num for sign in (1, -1))
        reach = Z * math.sqrt((gained + lost - (gained - lost) ** 2) / num)
        return max(-1.0, gained - lost - reach), min(1.0, gained - lost + reach)


def share(hits: np.ndarray, how: str = "") -> Share:
    """Of bool (N,)."""
    return Share(float(hits.mean()), hits - hits.mean(), how=how, limits=(0, 1))


def halves_of(num: int, seed: int = 0) -> list[np.ndarray]:
    """`HALVES` random halves of range(num), as sorted indices."""
    random = np.random.default_rng(seed)
    return [np.sort(random.permutation(num)[: num // 2]) for _ in range(HALVES)]


def difference(one: Estimate, other: Estimate) -> Estimate:
    """`one` - `other`, sample i of both from the same noise: what they share takes no part in its spread.

    Raises:
        ValueError: not as many samples, or not the same kind of number.
    """
    if isinstance(one, OfHalves) != isinstance(other, OfHalves) or len(one.spread) != len(other.spread):
        raise ValueError("only numbers of one kind, over as many samples, can be paired")
    fit = None if one.fit is None or other.fit is None else one.fit - other.fit
    kind: type[Estimate] = OfHalves if isinstance(one, OfHalves) else Estimate
    how = f"paired, {one.how}"
    if isinstance(one, Share) and isinstance(other, Share):
        kind, how = ShareDifference, "paired, Bonett and Price's"
    extra_se = float(np.hypot(one.extra_se, other.extra_se))
    return kind(one.value - other.value, one.spread - other.spread, extra_se, fit, how)


def verdict(low: float, high: float, lower_is_better: bool) -> str:
    """ "better", "worse" or "undecided", of a difference's interval: the first against the second."""
    if low <= 0 <= high:
        return "undecided"
    return "better" if (high < 0) == lower_is_better else "worse"


def of_repeats(values: Sequence[float], limits: tuple[float, float] = (-math.inf, math.inf)) -> dict[str, Any]:
    """Mean of the numbers of several sampling seeds, and the interval of that mean (Student's t), within the limits."""
    mean, std = float(np.mean(values)), float(np.std(values, ddof=1))
    reach = float(student.ppf((1 + LEVEL) / 2, len(values) - 1)) * std / len(values) ** 0.5
    how = f"Student's t over {len(values)} sampling seeds"
    low, high = max(limits[0], mean - reach), min(limits[1], mean + reach)
    return {"value": mean, "low": low, "high": high, "level": LEVEL, "interval": how, "std": std, "repeats": list(values)}
