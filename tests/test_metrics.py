"""Fréchet distance, effective rank and nearest neighbours against closed forms and other implementations."""

import math

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kernel_mmd, kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from eval.frechet import INFINITY_SAMPLES, frechet_distance, frechet_infinity, frechet_influence, mean_and_covariance
from eval.intervals import Estimate, difference, of_repeats, share, verdict
from eval.knn import knn_accuracy
from eval.memorisation import memorisation, nearest
from eval.metrics import Reference, extrapolated, frechet, inception_score, kernel_distance, kernel_influence, precision_recall
from eval.rank import effective_rank


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
    low, high = frechet(x, Reference(*mean_and_covariance(x))).interval()
    assert 0 <= low <= high < 1e-6  # no distance is below 0; how the last digits round depends on the threads


@pytest.mark.parametrize("num", [60, 900])  # singular covariances, and full ones
def test_frechet_keeps_what_spectra_of_many_orders_end_with(num: int) -> None:
    """The trace of the root is the sum of the singular values of X Y^T of the centred sets, which are exact without any square."""
    draws = np.random.default_rng(10).normal(size=(2, num, 120)) * np.exp(-np.linspace(0, 18, 120) / 2)
    x, y = ((draw - draw.mean(0)) / math.sqrt(num - 1) for draw in draws)
    root = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    expected = (x**2).sum() + (y**2).sum() - 2 * root
    zero = np.zeros(120)
    assert frechet_distance(zero, x.T @ x, zero, y.T @ y) == pytest.approx(expected, abs=1e-11)
    assert frechet_distance(zero, x.T @ x, zero, x.T @ x) < 1e-11


def test_frechet_is_symmetric_and_sees_a_shift() -> None:
    x, y = features(4, 60, 32), features(5, 50, 32)
    assert distance(x, y) == pytest.approx(distance(y, x), rel=1e-10)
    assert distance(x, x + np.float32(0.5)) == pytest.approx(32 * 0.25, rel=1e-4)


@pytest.mark.parametrize("num", [400, 30])  # full covariances, and singular ones
def test_influence_is_the_derivative(num: int) -> None:
    """Weighing one sample a little more moves the distance by its influence."""
    x, y = features(8, num, 40).astype(np.float64), features(9, 300, 40)
    mu, sigma = mean_and_covariance(y)
    value, influence = frechet_influence(x, mu, sigma)
    assert value == pytest.approx(frechet_distance(*mean_and_covariance(x), mu, sigma), rel=1e-12)
    assert influence.mean() == pytest.approx(0, abs=1e-9)
    step = 1e-5 / num

    def weighted(i: int, step: float) -> float:
        weights = np.full(num, (1 - step) / num)
        weights[i] += step
        centre = weights @ x
        return frechet_distance(centre, (weights[:, None] * (x - centre)).T @ (x - centre) * num / (num - 1), mu, sigma)

    for i in (0, 7, 29):
        derivative = (weighted(i, step) - weighted(i, -step)) / (2 * step)
        assert influence[i] == pytest.approx(derivative, rel=0.05, abs=0.05 * influence.std())


def test_extrapolation_takes_away_the_bias() -> None:
    """Samples of the reference's own Gaussian: the distance is 0, finitely many say more, the line over 1 / N finds it."""
    dim, mu, sigma = 12, np.zeros(12), np.eye(12)
    draws = np.random.default_rng(0).normal(size=(40, 300, dim))
    at_n = [frechet_influence(x, mu, sigma)[0] for x in draws]
    infinite = [frechet_infinity(x, mu, sigma)[0] for x in draws]
    expected = dim / 300 + dim * (dim + 1) / 4 / 300  # of the mean; of the covariance, to first order
    assert np.mean(at_n) == pytest.approx(expected, rel=0.1)
    assert abs(np.mean(infinite)) < 0.1 * expected


def test_extrapolation_holds_from_the_number_of_samples_that_is_asked_for() -> None:
    """On a spectrum like that of real features the bias is below its standard error, and what is left of the interval covers."""
    dim, trials = 60, 40
    scales = np.exp(-np.linspace(0, 3, dim))
    mu, sigma = np.full(dim, 0.02), np.diag((0.9 * scales) ** 2)
    truth = (mu**2).sum() + ((0.1 * scales) ** 2).sum()
    random, reference = np.random.default_rng(12), Reference(mu, sigma)
    found = []
    for _ in range(trials):
        x = random.normal(size=(INFINITY_SAMPLES * dim, dim)) * scales
        found.append(extrapolated(x, reference, frechet(x, reference)))
    errors = np.array([each.value - truth for each in found])
    assert abs(errors.mean()) < np.mean([each.standard_error for each in found])
    assert np.mean([low <= truth <= high for low, high in (each.interval() for each in found)]) > 0.87


def test_two_halves_of_one_set_give_the_small_number_of_theory() -> None:
    dim = 10
    sets = np.random.default_rng(1).normal(size=(20, 1000, dim))
    expected = 2 * (dim / 500 + dim * (dim + 1) / 4 / 500)
    assert np.mean([distance(x[:500], x[500:]) for x in sets]) == pytest.approx(expected, rel=0.1)


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


# --------------------------------------------------------------------------------------------------------------- intervals

DIM, NUM = 6, 200
REFERENCE = np.full(DIM, 0.2), np.eye(DIM)  # mean and covariance
SCALES = np.linspace(0.6, 1.8, DIM)  # of the generated Gaussian, around 0
TRUE_DISTANCE = float((REFERENCE[0] ** 2).sum() + ((SCALES - 1) ** 2).sum())


@pytest.fixture(scope="module")
def trials() -> dict[str, np.ndarray]:
    """For each number (trials, 3): value, and both ends of its interval, of fresh samples."""
    random = np.random.default_rng(3)
    real = (random.normal(size=(250, DIM)) + REFERENCE[0]).astype(np.float32)
    reference = Reference(*REFERENCE)
    rows: dict[str, list] = {}
    for _ in range(150):
        x = (random.normal(size=(NUM, DIM)) * SCALES).astype(np.float32)
        at_n = frechet(x, reference)
        found = {"frechet": at_n, "infinity": extrapolated(x, reference, at_n), "scores": inception_score(2 * x)}
        found["precision"], found["recall"] = precision_recall(x, real)
        found["kernel"] = Estimate(kernel_mmd(x.astype(float), real[:NUM].astype(float)), kernel_influence(x, real[:NUM]))
        for name, estimate in found.items():
            rows.setdefault(name, []).append((estimate.value, *estimate.interval()))
    return {name: np.array(values) for name, values in rows.items()}


@pytest.mark.parametrize("name", ["frechet", "infinity", "kernel", "scores", "precision", "recall"])
def test_intervals_cover_as_often_as_they_say(trials: dict[str, np.ndarray], name: str) -> None:
    """95 %, of the number's mean over samplings; of the extrapolation, of the distance that the Gaussians have."""
    value, low, high = trials[name].T
    truth = TRUE_DISTANCE if name == "infinity" else value.mean()
    assert 0.89 <= ((low <= truth) & (truth <= high)).mean() <= 0.99
    assert np.mean(high - low) == pytest.approx(2 * 1.96 * value.std(ddof=1), rel=0.2)


def test_where_samples_are_few_the_interval_is_too_wide_rather_than_too_narrow() -> None:
    random, reference = np.random.default_rng(4), Reference(np.zeros(60), np.eye(60))
    found = [frechet(1.2 * random.normal(size=(80, 60)) + 0.1, reference) for _ in range(60)]
    ratio = np.mean([each.standard_error for each in found]) / np.std([each.value for each in found], ddof=1)
    assert 0.9 < ratio < 2


def test_pairs_see_what_single_numbers_cannot() -> None:
    """A model that adds a little to each of another's images: told apart by the pairs, not by two intervals."""
    random, reference = np.random.default_rng(5), Reference(np.zeros(5), np.eye(5))
    x = random.normal(size=(500, 5)) + 0.3
    one, other = frechet(x, reference), frechet(x - 0.03, reference)
    paired = difference(other, one)
    assert paired.value == pytest.approx(other.value - one.value)
    assert verdict(*paired.interval(), lower_is_better=True) == "better"
    assert other.interval()[1] > one.interval()[0]
    assert paired.standard_error < 0.2 * one.standard_error
    assert difference(one, one).interval() == (0, 0)
    with pytest.raises(ValueError, match="paired"):
        difference(one, frechet(x[:100], reference))


def test_paired_extrapolations_cover_and_are_not_too_wide() -> None:
    """The fits of a pair go over the same subsets, so their errors are of one draw, too: they are not counted twice."""
    random, reference = np.random.default_rng(6), Reference(*REFERENCE)
    truth = ((1.02 * SCALES - 1) ** 2).sum() - ((SCALES - 1) ** 2).sum()
    found = []
    for _ in range(150):
        x = random.normal(size=(NUM, DIM)) * SCALES
        one, other = (extrapolated(each, reference, frechet(each, reference)) for each in (x, 1.02 * x))
        found.append((other.value - one.value, *difference(other, one).interval()))
    value, low, high = np.array(found).T
    assert 0.89 <= ((low <= truth) & (truth <= high)).mean() <= 0.99
    assert np.mean(high - low) == pytest.approx(2 * 1.96 * value.std(ddof=1), rel=0.2)


@pytest.mark.parametrize(
    ("low", "high", "lower_is_better", "word"),
    [(-2, -1, True, "better"), (-2, -1, False, "worse"), (1, 2, True, "worse"), (1, 2, False, "better"), (-1, 1, True, "undecided")],
)
def test_verdict(low: float, high: float, lower_is_better: bool, word: str) -> None:
    assert verdict(low, high, lower_is_better) == word


def test_a_share_of_nothing_has_an_interval() -> None:
    """Wilson: no hit of 16 leaves room up to z^2 / (n + z^2)."""
    low, high = share(np.zeros(16, bool)).interval()
    assert low == 0 and high == pytest.approx(3.8415 / (16 + 3.8415), rel=1e-3)


def test_repeats_give_students_interval() -> None:
    found = of_repeats([1.0, 2.0, 3.0])
    assert (found["value"], found["std"]) == (2, 1)
    assert found["high"] - 2 == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)
    assert [of_repeats([0.1, 0.9], share(np.ones(2, bool)).limits)[end] for end in ("low", "high")] == [0, 1]


def test_metrics_equal_torch_fidelity_with_more_images_than_a_subset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eval.metrics.KID_SUBSET_SIZE", 50)
    x, y = features(12, 120, 16), features(13, 90, 16)
    both = torch.from_numpy(x), torch.from_numpy(y)
    estimate, how = kernel_distance(x, y)
    theirs = kid_features_to_metric(*both, kid_subset_size=50, kid_subsets=100, verbose=False)
    assert (estimate.value, how["std"]) == (theirs["kernel_inception_distance_mean"], theirs["kernel_inception_distance_std"])
    theirs = prc_features_to_metric(*both, save_cpu_ram=True, verbose=False)
    assert [each.value for each in precision_recall(x, y)] == pytest.approx([theirs["precision"], theirs["recall"]])


# ------------------------------------------------------------------------------------------------------------ memorisation


def test_nearest_neighbours_are_those_of_sklearn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eval.memorisation.MAX_NUMBERS", 7 * 40)
    x, y = features(14, 30, 8), features(15, 40, 8)
    indices, distances = nearest(x, y, k=3)
    theirs = NearestNeighbors(n_neighbors=3).fit(y).kneighbors(x)
    assert np.array_equal(indices, theirs[1])
    np.testing.assert_allclose(distances, theirs[0], rtol=1e-3)
    alone, _ = nearest(y, y, skip_self=True)
    assert not (alone[:, 0] == np.arange(40)).any()


def copying(generated: np.ndarray, train: np.ndarray, held_out: np.ndarray | None) -> dict:
    return memorisation(nearest(generated, train)[1][:, 0], train, held_out)


@pytest.mark.parametrize("with_held_out", [True, False])
def test_memorisation_tells_copying_from_sampling(with_held_out: bool) -> None:
    random = np.random.default_rng(6)
    train, held_out, fresh = (random.normal(size=(num, 8)) for num in (500, 400, 300))
    held = held_out if with_held_out else None
    honest = copying(fresh, train, held)
    assert honest["closer"]["low"] < 0.5 < honest["closer"]["high"]
    assert honest["copied"]["low"] < 0.02 and honest["copied"]["value"] < 0.05
    copies = copying(train[:300] + 0.01 * random.normal(size=(300, 8)), train, held)
    assert copies["closer"]["value"] > 0.99 and copies["copied"]["value"] > 0.99
    half = copying(np.concatenate([train[:150] + 0.01, fresh[:150]]), train, held)
    assert half["copied"]["value"] == pytest.approx(0.5, abs=0.05)
    assert half["copied"]["low"] > half["copied"]["expected_high"]


@pytest.mark.parametrize("num_held_out", [20, 150])
def test_an_honest_model_is_rarely_called_a_copier(num_held_out: int) -> None:
    """Few held-out images are a yardstick that varies itself: 95 % of honest models are within what is expected of them."""
    random = np.random.default_rng(11)
    found = [copying(*(random.normal(size=(num, 4)) for num in (1000, 200, num_held_out))) for _ in range(200)]
    assert np.mean([each["closer"]["low"] <= 0.5 <= each["closer"]["high"] for each in found]) > 0.89
    copied = [each["copied"] for each in found]
    assert np.mean([each["expected_low"] <= each["value"] <= each["expected_high"] for each in copied]) > 0.92
    assert np.mean([each["value"] for each in copied]) == pytest.approx(copied[0]["expected"], rel=0.2)


def test_copies_are_not_counted_where_training_images_have_twins() -> None:
    """No image is nearer than 0: a share of 0 % would say that nothing is copied, whatever is."""
    random = np.random.default_rng(7)
    train = random.normal(size=(100, 8)) + 100
    train[:10] = train[10:20]
    assert copying(train, train, None)["copied"] is None
    twins = nearest(train, train, skip_self=True)[1][:20, 0]
    assert (twins == 0).all()  # where a matrix product would leave a distance
    train[:10] *= 1 + 1e-7  # as features of another batch differ
    found = copying(train[10:20], train, None)
    assert found["copied"] is None and found["closer"]["value"] == pytest.approx(1 - 20 / 200)


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
