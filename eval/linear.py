"""Probes: what a small classifier learns from frozen features. Softmax regression, ridge regression, attention over tokens.

All standardise features by the mean and deviation of what they are fitted to (the batch norm without affine of MAE's probe, arXiv
2111.06377 appendix A) and choose their penalty, or learning rate, on held-out parts of the training set; then they are fitted to all
of it. They are never shown a test label.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eval.knn import check_features
from models.progress import progress_bar

WEIGHT_DECAYS = (1e-5, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)  # where 1e-5 is best (masked autoencoders) 1e-6 was worse
STEPS = 20  # of the descent below
RIDGES = tuple(10 ** (power / 2) for power in range(-12, 5))
ATTENTIVE_LEARNING_RATES = (3e-4, 1e-3, 3e-3, 1e-2)
ATTENTIVE_EPOCHS, ATTENTIVE_BATCH, ATTENTIVE_HEAD_DIM = 20, 256, 64
NUMBERS_AT_ONCE = {"cpu": 2**19, "cuda": 2**26}  # logits of one chunk: a CPU's fit its cache


@dataclass(frozen=True)
class Probe:
    """What a probe says.

    Attributes:
        predictions: labels (M,) of the test images.
        chosen: the penalty, or learning rate.
        held_out_accuracy: by which it was chosen, in [0, 1].
    """

    predictions: Tensor
    chosen: float
    held_out_accuracy: float


def held_out_parts(labels: Tensor, folds: int = 10, parts: int | None = None, seed: int = 0) -> list[Tensor]:
    """Cut every class evenly into folds; the first `parts` of them are held out, one after another.

    A fold is a run of neighbours, not a random draw: variants of one picture mostly stand side by side, and if some were fitted to and
    others held out, learning by heart would look like the best choice. Where the first fold of a class begins is random.

    Args:
        labels: (N,), of the training images.
        parts: None takes so many that about 1,000 images are held out in all, but at most half of the folds: chance decides what
            suits a few images.

    Returns:
        For each part a mask (N,), True = held out. In none of them are all images of a class, and in the first there is one at least.

    Raises:
        ValueError: a class with one image.
    """
    if parts is None:
        parts = max(1, min(folds // 2, round(1000 * folds / len(labels))))
    if parts > folds or folds < 2:
        raise ValueError(f"{parts} of {folds} parts cannot be held out; choose at least 2 folds, and no more parts than that")
    generator = torch.Generator().manual_seed(seed)
    fold = torch.empty(len(labels), dtype=torch.long)
    for label in labels.unique().tolist():
        (members,) = (labels == label).nonzero(as_tuple=True)
        if len(members) < 2:
            raise ValueError(f"class {label} has one training image, and choosing a penalty holds some out; add images, or leave it out")
        start = int(torch.randint(folds, (), generator=generator))
        fold[members.cpu()] = (start + torch.arange(len(members)) * folds // len(members)) % folds
    fold -= fold.min()  # 0 unless there are few images
    return [(fold == part).to(labels.device) for part in range(parts)]


def standardise(train_x: Tensor, *others: Tensor) -> list[Tensor]:
    """Subtract the mean and divide by the deviation of `train_x` (..., D), in float32; 1e-6 is added to variances, as in MAE's probe."""
    dims = tuple(range(train_x.ndim - 1))
    variance, mean = torch.var_mean(train_x.float(), dims, correction=0)
    scale = (variance + 1e-6).rsqrt()
    return [(x.float() - mean) * scale for x in (train_x, *others)]


# ------------------------------------------------------------------------------------------------------ softmax regression


@torch.no_grad()
def softmax_probe(
    train_x: Tensor, train_y: Tensor, test_x: Tensor, held_out: Sequence[Tensor], weight_decays: Sequence[float] = WEIGHT_DECAYS
) -> Probe:
    """Softmax regression with the weight decay that suits the held-out parts best.

    Args:
        train_x, test_x: features (N, D) and (M, D).
        train_y: labels (N,).
        held_out: masks (N,); see `held_out_parts`.
        weight_decays: all are fitted at once, as one problem.
    """
    check_features(train_x, train_y, "train")
    classes, y = train_y.unique(return_inverse=True)
    scores = []
    for held in held_out:
        fitted, x = standardise(train_x[~held], train_x[held])
        weights, biases = fit_softmax(fitted, y[~held], len(classes), weight_decays)
        scores.append(_scores(x, y[held], weights, biases))
    best, accuracy = _best(scores)
    fitted, x = standardise(train_x, test_x)
    weights, biases = fit_softmax(fitted, y, len(classes), weight_decays[best : best + 1])
    predictions = torch.cat([logits[:, 0].argmax(1) for _, logits in _logits(x, weights, biases)])
    return Probe(classes[predictions], weight_decays[best], accuracy)


@torch.no_grad()
def fit_softmax(x: Tensor, y: Tensor, num_classes: int, weight_decays: Sequence[float], steps: int = STEPS) -> tuple[Tensor, Tensor]:
    """Minimise mean cross-entropy + weight_decay / 2 * |weights|^2 for several weight decays at once.

    Gradient descent over all images, with momentum (Nesterov) that starts anew when the loss rises (arXiv 1204.3982), in the
    eigenbasis of the features' covariance S. There every direction has its own step, 1 / (c * variance + weight_decay): the Hessian
    is about S times the mean of p (1 - p), and never more than S / 2 (Böhning, 1992). c begins with the first and goes towards
    the second whenever the loss rises. So nothing is drawn, there is no learning rate to choose, and features with a few strong
    directions are no harder than others: 20 steps are worth 90 epochs of SGD with its best learning rate.

    Args:
        x: standardised features (N, D), float32.
        y: classes (N,), 0 to num_classes - 1.
        weight_decays: W of them.

    Returns:
        Weights (D, W, C) and biases (W, C).
    """
    shape = x.shape[1], len(weight_decays), num_classes
    decay = x.new_tensor(weight_decays)
    variances, directions = torch.linalg.eigh((x.T @ x).double() / len(x))
    variances, directions = variances.clamp(min=0).float(), directions.float()
    variances += (1e-6 * variances[-1]).clamp(min=1e-12)  # where nothing varies
    x = x @ directions
    weights, biases = x.new_zeros(shape), x.new_zeros(shape[1:])
    ahead, biases_ahead = weights, biases
    momentum, caution = torch.ones_like(decay), torch.ones_like(decay)  # (W,), momentum is the t_k of Nesterov
    loss = torch.full_like(decay, torch.inf)
    for _ in range(steps):
        last, (loss, spread, gradient, biases_gradient) = loss, _descend(x, y, ahead, biases_ahead)
        loss = loss + decay / 2 * ahead.square().sum((0, 2))
        rises = loss > last
        caution = torch.where(rises, 2 * caution, caution)
        curvature = (caution * spread).clamp(1 / num_classes, 0.5)  # (W,), c
        step = 1 / (curvature * variances[:, None] + decay)  # (D, W)
        next_weights = ahead - step.unsqueeze(2) * (gradient + decay[:, None] * ahead)
        next_biases = biases_ahead - biases_gradient / curvature[:, None]
        next_momentum = (1 + (1 + 4 * momentum**2).sqrt()) / 2
        push = torch.where(rises, 0.0, (momentum - 1) / next_momentum).unsqueeze(1)
        momentum = torch.where(rises, 1.0, next_momentum)
        ahead, biases_ahead = next_weights + push * (next_weights - weights), next_biases + push * (next_biases - biases)
        weights, biases = next_weights, next_biases
    return (directions @ weights.flatten(1)).view(shape), biases


def _descend(x: Tensor, y: Tensor, weights: Tensor, biases: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Means over x (N, D): cross-entropy (W,), p (1 - p) of the likeliest class (W,), and gradients (D, W, C) and (W, C)."""
    loss, spread = torch.zeros_like(biases[:, 0]), torch.zeros_like(biases[:, 0])
    gradient, biases_gradient = torch.zeros_like(weights).flatten(1), torch.zeros_like(biases)
    for rows, logits in _logits(x, weights, biases):
        errors = logits.sub_(logits.amax(2, keepdim=True)).exp_()  # (n, W, C); torch's softmax takes six times as long over 9 classes
        likeliest = 1 / errors.sum(2)
        errors *= likeliest.unsqueeze(2)
        spread += (likeliest * (1 - likeliest)).sum(0)
        own = torch.arange(len(errors), device=x.device), slice(None), y[rows]
        loss -= errors[own].clamp(min=torch.finfo(errors.dtype).tiny).log().sum(0)
        errors[own] -= 1
        gradient.addmm_(x[rows].T, errors.flatten(1))
        biases_gradient += errors.sum(0)
    return loss / len(x), spread / len(x), gradient.view_as(weights) / len(x), biases_gradient / len(x)


def _logits(x: Tensor, weights: Tensor, biases: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows of x (N, D), as many as memory is meant for, and what each weight decay says of them, (n, W, C)."""
    step = max(1, NUMBERS_AT_ONCE[x.device.type] // biases.numel())
    for start in range(0, len(x), step):
        rows = slice(start, start + step)
        yield rows, torch.addmm(biases.flatten(), x[rows], weights.flatten(1)).view(-1, *biases.shape)


def _scores(x: Tensor, y: Tensor, weights: Tensor, biases: Tensor) -> Tensor:
    """Of each weight decay on x (N, D): how many are right, the summed cross-entropy, and of how many. (W, 3)"""
    found = x.new_zeros(len(biases), 3, dtype=torch.float64)
    for rows, logits in _logits(x, weights, biases):
        labels = y[rows, None].expand(-1, len(biases))
        right = logits.argmax(2) == labels
        loss = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        found += torch.stack([right.double(), loss.double(), torch.ones_like(loss, dtype=torch.float64)], dim=2).sum(0)
    return found


def _best(scores: Sequence[Tensor]) -> tuple[int, float]:
    """Which candidate is right most often over all parts, and how often; of equal ones that with the smallest loss."""
    right, loss, total = torch.stack(list(scores)).sum(0).unbind(1)
    best = min(range(len(right)), key=lambda i: (-right[i].item(), loss[i].item()))
    return best, (right[best] / total[best]).item()


# -------------------------------------------------------------------------------------------------------------------- ridge


@torch.no_grad()
def ridge_probe(train_x: Tensor, train_y: Tensor, test_x: Tensor, held_out: Sequence[Tensor], ridges: Sequence[float] = RIDGES) -> Probe:
    """Least squares on one-hot classes, in closed form, with the ridge that suits the held-out parts best.

    Args:
        train_x, train_y, test_x, held_out: as those of `softmax_probe`.
        ridges: what is added to the features' covariance, whose diagonal is 1; scikit-learn calls N times that alpha.
    """
    check_features(train_x, train_y, "train")
    classes, y = train_y.unique(return_inverse=True)
    targets = F.one_hot(y, len(classes)).double()
    scores = []
    for held in held_out:
        outputs = ridge_outputs(train_x[~held], targets[~held], train_x[held], ridges)
        right = torch.stack([(output.argmax(1) == y[held]).sum() for output in outputs])
        loss = torch.stack([(output - targets[held]).square().sum() for output in outputs])
        scores.append(torch.stack([right.double(), loss, torch.full_like(loss, held.sum())], dim=1))
    best, accuracy = _best(scores)
    (outputs,) = ridge_outputs(train_x, targets, test_x, ridges[best : best + 1])
    return Probe(classes[outputs.argmax(1)], ridges[best], accuracy)


def ridge_outputs(train_x: Tensor, targets: Tensor, test_x: Tensor, ridges: Sequence[float]) -> list[Tensor]:
    """For every ridge what the regression of `targets` (N, C) says for `test_x` (M, D): (M, C), float64. One eigenproblem for all."""
    fitted, x = (side.double() for side in standardise(train_x, test_x))
    mean = targets.double().mean(0)
    variances, directions = torch.linalg.eigh(fitted.T @ fitted / len(fitted))
    along = directions.T @ (fitted.T @ (targets - mean)) / len(fitted)  # (D, C)
    x = x @ directions
    return [x @ (along / (variances.clamp(min=0) + ridge)[:, None]) + mean for ridge in ridges]


# ---------------------------------------------------------------------------------------------------------------- attention


class AttentivePooling(nn.Module):
    """One learned query attends to a block's tokens (N, T, D), in heads; a linear layer classifies what it gathers (arXiv 2202.03026).

    The keys' projection is folded into each head's query, and the values' is applied to what was gathered: the same function, at
    a cost that does not grow with D^2 T.
    """

    def __init__(self, dim: int, num_classes: int, mean: Tensor, scale: Tensor) -> None:
        super().__init__()
        num_heads = next(heads for heads in range(max(1, dim // ATTENTIVE_HEAD_DIM), 0, -1) if dim % heads == 0)
        self.queries = nn.Parameter(0.02 * torch.randn(num_heads, dim))  # attention starts even
        self.values = nn.Parameter(torch.randn(num_heads, dim, dim // num_heads) / math.sqrt(dim))
        self.head = nn.Linear(dim, num_classes)
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)

    def forward(self, tokens: Tensor) -> Tensor:
        x = (tokens.float() - self.mean) * self.scale  # (N, T, D)
        weights = (x @ self.queries.T / math.sqrt(x.shape[2])).softmax(dim=1)  # (N, T, H)
        gathered = weights.transpose(1, 2) @ x  # (N, H, D)
        return self.head(torch.einsum("nhd,hde->nhe", gathered, self.values).flatten(1))  # (N, C)


def attentive_probe(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    held_out: Tensor,
    learning_rates: Sequence[float] = ATTENTIVE_LEARNING_RATES,
    epochs: int = ATTENTIVE_EPOCHS,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Probe:
    """Attention over tokens, by AdamW with the learning rate that suits the held-out part best; the rates train side by side.

    Args:
        train_x, test_x: tokens (N, T, D) and (M, T, D), anywhere.
        train_y: labels (N,).
        held_out: mask (N,).
        device: where it is trained.
    """
    if not (train_x.isfinite().all() and test_x.isfinite().all()):
        raise ValueError("tokens hold NaN or infinite numbers")
    classes, y = train_y.cpu().unique(return_inverse=True)
    held_out = held_out.cpu()

    def predictions(rows: Tensor, x: Tensor, rates: Sequence[float]) -> Tensor:
        """Fit to these rows of the training set; what every rate says for the tokens x: classes (len(rates), len(x))."""
        probes = _fit_attentive(train_x, y, rows, len(classes), rates, epochs, device, seed)
        with torch.no_grad():
            batches = (batch.to(device) for batch in x.split(ATTENTIVE_BATCH))
            return torch.cat([torch.stack([probe(batch).argmax(1) for probe in probes]) for batch in batches], dim=1).cpu()

    right = (predictions((~held_out).nonzero()[:, 0], train_x[held_out], learning_rates) == y[held_out]).float().mean(1)
    best = int(right.argmax())
    (found,) = predictions(torch.arange(len(y)), test_x, learning_rates[best : best + 1])
    return Probe(classes[found], learning_rates[best], right[best].item())


def _fit_attentive(
    train_x: Tensor, y: Tensor, rows: Tensor, num_classes: int, rates: Sequence[float], epochs: int, device: torch.device | str, seed: int
) -> list[AttentivePooling]:
    """One pooling for each rate, trained on the same batches from the same start."""
    generator = torch.Generator().manual_seed(seed)
    moments = torch.zeros(3, train_x.shape[2], dtype=torch.float64)  # of the channels
    for chunk in rows.split(ATTENTIVE_BATCH):
        x = train_x[chunk].double().flatten(0, 1)
        moments += torch.stack([torch.ones_like(x[0]) * len(x), x.sum(0), x.square().sum(0)])
    mean, square = moments[1:] / moments[0]
    scale = ((square - mean**2).clamp(min=0) + 1e-6).rsqrt()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first = AttentivePooling(train_x.shape[2], num_classes, mean.float(), scale.float())
    probes = [copy.deepcopy(first).to(device) for _ in rates]
    optimizer = torch.optim.AdamW([{"params": probe.parameters(), "lr": rate} for probe, rate in zip(probes, rates, strict=True)])
    steps = epochs * -(-len(rows) // ATTENTIVE_BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 + 0.5 * math.cos(math.pi * step / steps))
    with progress_bar(total=steps, desc="attentive probe", unit=" steps") as bar:
        for _ in range(epochs):
            for batch in rows[torch.randperm(len(rows), generator=generator)].split(ATTENTIVE_BATCH):
                x, labels = train_x[batch].to(device), y[batch].to(device)
                loss = sum(F.cross_entropy(probe(x), labels) for probe in probes)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
    return probes
