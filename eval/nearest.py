"""Which of many unit vectors have the largest dot products with a query; on CPUs with bf16 in about half the time of float32."""

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from models.precision import cpu_has_bf16

GROUP = 64  # at most so many products are told apart only if the largest of them is large enough
UNIT = 2.0**-8  # the largest relative error of rounding to bf16


class Nearest:
    """Finds the k keys with the largest dot products with queries.

    On a CPU with bf16, products of rounded vectors tell which keys may be among the nearest, and only theirs are computed in float32.
    Nothing is missed but by the rounding of float32: how far a rounded product can be off is bounded, and every key is kept that reaches
    the k-th largest within twice that. Elsewhere all products are computed in float32.

    Args:
        keys: float32 (N, D), of length 1 or less.
        k: 1 to N.
    """

    def __init__(self, keys: Tensor, k: int) -> None:
        self.keys, self.k = keys, k
        self.rounds = keys.device.type == "cpu" and cpu_has_bf16()
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
            self.group = max(1, min(GROUP, len(keys) // (8 * k)))
            self.rounded = F.pad(self.rounded, (0, 0, 0, -len(keys) % self.group))
            self.rounded[len(keys) :, -1] = -torch.inf

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The largest products (M, k) of queries (M, D), float32 and of length 1 or less, with keys, and these keys' places (M, k).

        The largest come first. Of keys with the same product any may be taken; which, does not depend on the other queries.
        """
        return self._among_candidates(x) if self.rounds else (x @ self.keys.T).topk(self.k, dim=1)

    def _among_candidates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        products, off = self._rounded(x)
        in_groups = products.view(len(x), self.group, -1)  # every so-many-th key is of one group
        best = in_groups.amax(1).float()  # (M, groups)
        reached = best.topk(self.k, dim=1, sorted=False).values.amin(1)  # the k-th largest product is at least that
        enough = reached - 2.02 * (off + UNIT * reached.abs())  # the products themselves are rounded, too
        near = best >= enough[:, None]
        crowded = near.sum(1) > best.shape[1] // 3  # nearly all are tied, or k is large: candidates would be too many

        rows, groups = (near & ~crowded[:, None]).nonzero().unbind(1)
        members = in_groups[rows, :, groups].float()  # (groups that have a candidate, keys of a group)
        which, member = (members >= enough[rows, None]).nonzero().unbind(1)
        nearest, places = self._of_pairs(x, rows[which], groups[which] + in_groups.shape[2] * member)
        if crowded.any():
            nearest[crowded], places[crowded] = (x[crowded] @ self.keys.T).topk(self.k, dim=1)
        return nearest, places

    def _rounded(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Products of rounded vectors, bf16 (M, N and what fills the groups up), less q m; and how far off they are at most, (M,).

        With a~ for a rounded: |q~ x~ - q x| = |(q~ - q) x~ + q (x~ - x)| <= |q~ - q| |x~| + |q| |x~ - x|.
        """
        centred = x - self.mean
        rounded = centred.bfloat16()
        off = (rounded.float() - centred).norm(dim=1) * self.length + centred.norm(dim=1) * self.error
        return torch.cat([rounded, rounded.new_ones(len(x), 3)], dim=1) @ self.rounded.T, off

    def _of_pairs(self, x: Tensor, rows: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """The k largest products of each query, and their keys' places, among pairs of a query and a key: int64 (P,) both, by query."""
        begins = torch.searchsorted(rows, torch.arange(len(x) + 1))
        with warnings.catch_warnings(action="ignore"):  # torch calls them beta
            size = len(x), len(self.keys)
            pairs = torch.sparse_csr_tensor(begins, places, torch.zeros(len(places)), size, check_invariants=False)
        products = torch.sparse.sampled_addmm(pairs, x, self.keys.T, beta=0).values()

        column = torch.arange(len(rows)) - begins[rows]
        table = products.new_full((len(x), max(self.k, int(begins.diff().max()))), -torch.inf)  # (M, pairs of the query that has most)
        of_table = places.new_zeros(table.shape)
        table[rows, column], of_table[rows, column] = products, places
        nearest, found = table.sort(dim=1, descending=True, stable=True)  # among equals the first, however wide the table is
        return nearest[:, : self.k], of_table.gather(1, found[:, : self.k])
