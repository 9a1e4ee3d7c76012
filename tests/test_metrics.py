"""Fréchet distance, effective rank and nearest neighbours against closed forms and other implementations."""

import math

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from eval.frechet import frechet_distance, mean_and_covariance
from eval.knn import knn_accuracy
from eval.rank import effective_rank
from models.compat import import_torchvision

import_torchvision()

from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric  # noqa: E402


def features(seed: int, num: int, dim: int) -> np.ndarray:
    """Correlated and off-centre float32 features (num, dim)."""
    random = np.random.default_rng(seed)
    mixing = random.normal(size=(dim, dim)) / math.sqrt(dim)
    return (random.normal(size=(num, dim)) @ mixing + random.normal(size=dim)).astype(np.float32)


def distance(x: np.ndarray, y: np.ndarray) -> float:
    return frechet_distance(*mean_and_covariance(x), *mean_and_covariance(y))


# ---------------------------------------------------------------------------------------------------------------- Fréchet


def test_frechet_of_diagonal_gaussians() -> None:
    """|mu1 - mu2|^2 + sum (s1 - s2)^2, where s are standard deviations; also after a rotation."""
    random = np.random.default_rng(0)
    mu1, mu2 = random.normal(size=(2, 5))
    std1, std2 = random.uniform(0.1, 3, size=(2, 5))
    expected = ((mu1 - mu2) ** 2).sum() + ((std1 - std2) ** 2).sum()
    assert frechet_distance(mu1, np.diag(std1**2), mu2, np.diag(std2**2)) == pytest.approx(expected, rel=1e-12)
    turn, _ = np.linalg.qr(random.normal(size=(5, 5)))
    turned = [turn @ mu1, turn @ np.diag(std1**2) @ turn.T, turn @ mu2, turn @ np.diag(std2**2) @ turn.T]
    assert frechet_distance(*turned) == pytest.approx(expected, rel=1e-10)


def test_frechet_of_covariances_that_do_not_commute() -> None:
    """In two dimensions tr (AB)^1/2 = sqrt(tr AB + 2 sqrt(det AB))."""
    a, b = np.array([[2.0, 1.0], [1.0, 3.0]]), np.array([[1.0, -0.5], [-0.5, 4.0]])
    root = math.sqrt(np.trace(a @ b) + 2 * math.sqrt(np.linalg.det(a @ b)))
    assert frechet_distance(np.zeros(2), a, np.zeros(2), b) == pytest.approx(5 + 5 - 2 * root, rel=1e-12)


@pytest.mark.parametrize("num", [40, 1000])  # singular covariances, and full ones
def test_frechet_equals_torch_fidelity(num: int) -> None:
    x, y = features(1, num, 96), features(2, num + 7, 96)
    theirs = fid_statistics_to_metric(*(fid_features_to_statistics(torch.from_numpy(side)) for side in (x, y)), False)
    assert distance(x, y) == pytest.approx(theirs[KEY_METRIC_FID], rel=1e-4)


@pytest.mark.parametrize("num", [10, 500])
def test_frechet_of_a_set_to_itself_is_zero(num: int) -> None:
    x = 10 * features(3, num, 200)
    assert 0 <= distance(x, x.copy()) < 1e-6


def test_frechet_is_symmetric_and_sees_a_shift() -> None:
    x, y = features(4, 60, 32), features(5, 50, 32)
    assert distance(x, y) == pytest.approx(distance(y, x), rel=1e-10)
    assert distance(x, x + np.float32(0.5)) == pytest.approx(32 * 0.25, rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros(3), np.eye(3), np.zeros(2), np.eye(2)), "same D"),
        ((np.zeros(3), np.eye(2), np.zeros(3), np.eye(3)), "same D"),
        ((np.zeros((1, 3)), np.eye(3), np.zeros(3), np.eye(3)), "same D"),
        ((np.array([0.0, np.nan]), np.eye(2), np.zeros(2), np.eye(2)), "NaN"),
        ((np.zeros(2), np.eye(2), np.zeros(2), np.diag([1.0, np.inf])), "infinite"),
    ],
)
def test_frechet_refuses(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        frechet_distance(*arguments)


@pytest.mark.parametrize("bad", [np.zeros(4), np.zeros((1, 4)), np.array([[0.0, np.nan], [1.0, 2.0]])])
def test_covariance_refuses(bad: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"at least 2|NaN"):
        mean_and_covariance(bad)


def test_covariance_keeps_float64_precision_of_float32_features() -> None:
    x = features(6, 300, 4) + np.float32(1000)
    mean, covariance = mean_and_covariance(torch.from_numpy(x))
    wide = x.astype(np.float64)
    np.testing.assert_allclose(covariance, (wide - mean).T @ (wide - mean) / 299, rtol=1e-9)


# ----------------------------------------------------------------------------------------------------------- effective rank


def test_effective_rank_of_known_matrices() -> None:
    assert effective_rank(np.eye(7)) == pytest.approx(math.log(7))
    assert effective_rank(np.outer(np.arange(1, 6), np.arange(1, 4))) == pytest.approx(0, abs=1e-12)
    # singular values 1, 2, 1 -> shares 1/4, 1/2, 1/4 -> 1.5 log 2
    assert effective_rank(torch.diag(torch.tensor([1.0, 2.0, 1.0]))) == pytest.approx(1.5 * math.log(2))


def test_effective_rank_ignores_scale_rotation_and_order() -> None:
    x = features(7, 50, 12).astype(np.float64)
    turn, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(12, 12)))
    for same in (1e3 * x, x @ turn, x[::-1], x.T):
        assert effective_rank(same) == pytest.approx(effective_rank(x), rel=1e-10)


@pytest.mark.parametrize(("bad", "message"), [(np.zeros((3, 3)), "0"), (np.ones(3), "N, D"), (np.full((2, 2), np.nan), "NaN")])
def test_effective_rank_refuses(bad: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        effective_rank(bad)


# -------------------------------------------------------------------------------------------------------------- neighbours


def test_knn_on_directions() -> None:
    """Length does not count; a near neighbour outvotes two distant ones when the temperature is low, and not when it is high."""
    train_x = np.array([[1.0, 0.0], [0.0, 5.0], [0.0, 1.0]])
    train_y = np.array([7, 3, 3])
    test_x, test_y = np.array([[10.0, 1.0]]), np.array([7])
    assert knn_accuracy(train_x, train_y, test_x, test_y, k=1) == 1
    assert knn_accuracy(train_x, train_y, test_x, test_y, k=3, temperature=0.07) == 1
    assert knn_accuracy(train_x, train_y, test_x, test_y, k=3, temperature=1e6) == 0


@pytest.mark.parametrize("k", [1, 5, 20])
def test_knn_equals_sklearn(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(8)
    centres = random.normal(size=(4, 16))
    train_y, test_y = random.integers(4, size=300), random.integers(4, size=101)
    train_x, test_x = (centres[y] + 1.5 * random.normal(size=(len(y), 16)) for y in (train_y, test_y))
    sklearn = KNeighborsClassifier(k, metric="cosine", weights=lambda distances: np.exp((1 - distances) / 0.07))
    expected = sklearn.fit(train_x, train_y).score(test_x, test_y)
    assert 0.3 < expected < 1
    assert knn_accuracy(train_x, train_y, test_x, test_y, k=k) == pytest.approx(expected)
    monkeypatch.setattr("eval.knn.MAX_SIMILARITIES", 1000)  # 3 rows at once, the last chunk not full
    arrays = [torch.from_numpy(array) for array in (train_x, train_y, test_x, test_y)]
    assert knn_accuracy(*arrays, k=k) == pytest.approx(expected)


def test_knn_counts_unknown_labels_as_wrong() -> None:
    assert knn_accuracy(np.eye(2), np.array([0, 1]), np.eye(2), np.array([0, 9]), k=1) == 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 4}, "choose 1 to 3"),
        ({"k": 0}, "choose 1 to 3"),
        ({"temperature": 0.0}, "above 0"),
        ({"train_x": np.full((3, 3), np.nan)}, "NaN"),
        ({"test_x": np.zeros((0, 3)), "test_y": np.zeros(0, int)}, "at least 1"),
        ({"test_y": np.arange(2)}, "shape"),
        ({"train_y": np.zeros(3)}, "integers"),
        ({"test_x": np.eye(3)[:, :2]}, "one network"),
    ],
)
def test_knn_refuses(change: dict, message: str) -> None:
    good = {"train_x": np.eye(3), "train_y": np.arange(3), "test_x": np.eye(3), "test_y": np.arange(3), "k": 1}
    with pytest.raises(ValueError, match=message):
        knn_accuracy(**{**good, **change})
