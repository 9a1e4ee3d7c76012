"""Which of many vectors have the largest dot products with a query: exactly, and on CPUs with bf16 in a third of the time of float32."""

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from models.precision import precision

GROUP = 64  # at most so many products are told apart only if the largest of them is large enough
UNIT = 2.0**-9  # the largest relative error of rounding to bf16
NEVER = -1e30  # the product with a key that fills a group up


class Nearest:
    """Finds the k keys with the largest dot products with queries.

    On a CPU with bf16, products of rounded vectors tell which keys may be among the nearest, and only theirs are computed in float32.
    Nothing is missed: how far a rounded product can be off is bounded (`_rounded`), and every key is kept that reaches the k-th largest
    within twice that. Elsewhere all products are computed in float32.

    Args:
        keys: float32 (N, D).
        k: 1 to N.
    """

    def __init__(self, keys: Tensor, k: int) -> None:
        self.keys, self.k = keys, k
        self.rounds = keys.device.type == "cpu" and precision("auto") == "bf16"
        if self.rounds:
            # Around their mean m, vectors are short and rounding is fine: q x = (q - m)(x - m) + m (x - m) + q m. The last is the same for
            # all keys and left away; the middle one rides along as three numbers in bf16, which hold a float32, times 1.
            self.mean = keys.mean(0)
            centred = keys - self.mean
            rounded = centred.bfloat16()
            first = centred @ self.mean
            second = first - first.bfloat16().float()
            third = second - second.bfloat16().float()
            self.rounded = torch.cat([rounded, torch.stack([first, second, third], dim=1).bfloat16()], dim=1)  # (N, D + 3)
            self.length, self.error = rounded.float().norm(dim=1).max(), (rounded.float() - centred).norm(dim=1).max()
            # more groups than k by far, and all of the same size: those that fill the last ones up are never near
            self.group = max(1, min(GROUP, len(keys) // (4 * k)))
            self.rounded = F.pad(self.rounded, (0, 0, 0, -len(keys) % self.group))
            self.rounded[len(keys) :, -1] = NEVER

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Products (M, k) of queries (M, D), float32, with their k nearest keys, the largest first, and the places (M, k) of those keys.

        Of keys with the same product any may come first.
        """
        return self._among_candidates(x) if self.rounds else (x @ self.keys.T).topk(self.k, dim=1)

    def _among_candidates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        m, n = len(x), len(self.keys)
        rows, places = self._candidates(x)
        begins = torch.searchsorted(rows, torch.arange(m + 1))
        with warnings.catch_warnings(action="ignore"):  # torch calls them beta
            pairs = torch.sparse_csr_tensor(begins, places, torch.zeros(len(places)), (m, n), check_invariants=False)
        products = torch.sparse.sampled_addmm(pairs, x, self.keys.T, beta=0).values()

        column = torch.arange(len(rows)) - begins[rows]
        table = products.new_full((m, int(begins.diff().max())), -torch.inf)  # (M, candidates of the row that has most)
        of_table = places.new_zeros(table.shape)
        table[rows, column], of_table[rows, column] = products, places
        nearest, found = table.topk(self.k, dim=1)
        return nearest, of_table.gather(1, found)

    def _candidates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Pairs of a query and a key that may be one of its k nearest, as two int64 (P,), in the order of the queries."""
        products, off = self._rounded(x)
        # the k-th largest is at least the k-th largest of the largest of groups; every so-many-th key is of one group
        in_groups = products.view(len(x), self.group, -1)
        best = in_groups.amax(1).float()  # (M, groups)
        reached = best.topk(self.k, dim=1, sorted=False).values.amin(1)
        enough = reached - 2.02 * (off + 2 * UNIT * reached.abs())  # the products themselves are rounded, too

        rows, groups = (best >= enough[:, None]).nonzero().unbind(1)
        members = in_groups[rows, :, groups].float()  # (groups that have one, keys of a group)
        which, member = (members >= enough[rows, None]).nonzero().unbind(1)
        return rows[which], groups[which] + in_groups.shape[2] * member

    def _rounded(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Products of rounded vectors, bf16 (M, N and what fills the groups up), less q m; and how far off they are at most, (M,).

        With a~ for a rounded: |q~ x~ - q x| = |(q~ - q) x~ + q (x~ - x)| <= |q~ - q| |x~| + |q| |x~ - x|.
        """
        centred = x - self.mean
        rounded = centred.bfloat16()
        off = (rounded.float() - centred).norm(dim=1) * self.length + centred.norm(dim=1) * self.error
        return torch.cat([rounded, rounded.new_ones(len(x), 3)], dim=1) @ self.rounded.T, off
