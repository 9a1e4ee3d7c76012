"""Probes and similarities against scikit-learn, closed forms, published code and plain loops."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import silhouette_score
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors
from torch import Tensor, nn

from eval import linear
from eval.knn import knn_predictions
from eval.linear import attentive_probe, fit_softmax, held_out_parts, ridge_outputs, ridge_probe, softmax_probe, standardise
from eval.measure import draw_share, spread_over
from eval.nearest import Nearest
from eval.rank import effective_rank, singular_values, spectral_entropy
from eval.similarity import cka_matrix, cknna, graph_alignment, linear_cka, neighbour_graph, silhouette


def blobs(num: int, dim: int, classes: int, noise: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Classes around random centres, in directions of very different strength, off-centre."""
    random = np.random.default_rng(seed)
    centres, scales = np.random.default_rng(1).normal(size=(classes, dim)), np.geomspace(3, 0.03, dim)
    y = random.integers(classes, size=num)
    x = (centres[y] + noise * random.normal(size=(num, dim))) * scales + 5
    return torch.from_numpy(x).float(), torch.from_numpy(y)


def right(predictions: Tensor, labels: Tensor) -> float:
    return (predictions == labels).double().mean().item()


# -------------------------------------------------------------------------------------------------------------- neighbours


def test_every_k_of_one_search_equals_sklearn(monkeypatch: pytest.MonkeyPatch) -> None:
    (x, y), (z, _) = blobs(400, 12, 5, 1.5), blobs(150, 12, 5, 1.5, seed=2)
    found = knn_predictions(x, y, z, (20, 1, 200))
    monkeypatch.setattr("eval.knn.MAX_SIMILARITIES", 3000)  # 7 rows at once
    chunked = knn_predictions(x, y, z, (20, 1, 200))
    assert sorted(found) == [1, 20, 200]
    for k, predictions in found.items():
        theirs = KNeighborsClassifier(k, metric="cosine", weights=lambda distances: np.exp((1 - distances) / 0.07))
        assert predictions.tolist() == theirs.fit(x.double(), y).predict(z.double()).tolist()
        assert torch.equal(predictions, chunked[k])


def vectors(kind: str, num: int, seed: int) -> Tensor:
    """(num, 24): in all directions, crowded far from the origin on few axes, with most products tied, or all the same."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(num, 24, generator=random)
    axes = torch.randn(3, 24, generator=torch.Generator().manual_seed(7))
    return {
        "spread": lambda: F.normalize(x, dim=1),
        "crowded": lambda: F.normalize(5 + 0.1 * x[:, :3] @ axes + 0.01 * x, dim=1),
        "tied": lambda: torch.randint(5, (num, 24), generator=random).float() / 8,
        "equal": lambda: torch.full((num, 24), 0.3),
    }[kind]()


@pytest.fixture(params=[True, False], ids=["rounded", "float32"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Of finding neighbours; rounding works on every CPU, if slowly."""
    monkeypatch.setattr("eval.nearest.cpu_has_bf16", lambda: request.param)
    return request.param


@pytest.mark.parametrize("kind", ["spread", "crowded", "tied", "equal"])
@pytest.mark.parametrize("k", [1, 40, 1003])
def test_the_nearest_are_exact(kind: str, k: int, way: bool) -> None:
    keys, x = vectors(kind, 1003, 0), vectors(kind, 17, 1)
    products, places = Nearest(keys, k)(x)
    all_products = x.double() @ keys.double().T
    expected = all_products.topk(k, dim=1).values
    torch.testing.assert_close(products.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(all_products.gather(1, places), expected, rtol=1e-5, atol=1e-6)
    assert all(len(set(row)) == k for row in places.tolist())


def test_no_rounding_hides_a_neighbour(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few dimensions and few keys, where errors do not cancel, short and long vectors, and a mean far off, against float64."""
    monkeypatch.setattr("eval.nearest.cpu_has_bf16", lambda: True)
    random = torch.Generator().manual_seed(0)
    draw = lambda *sizes: torch.rand(*sizes, generator=random, dtype=torch.float64)  # noqa: E731
    for _ in range(1500):
        dim, num = int(1 + 3 * draw(1)), int(2 + 4 * draw(1)) if draw(1) < 0.5 else 1000
        k = max(1, int(num * (0.01, 0.1, 0.25, 0.5)[int(4 * draw(1))]))
        keys, x = (draw(count, dim) - 0.5 + (0, 0, 30)[int(3 * draw(1))] for count in (num, 20))
        scale = (0, -4)[int(2 * draw(1))]
        keys, x = ((each / each.norm(dim=1).max() * 10 ** (scale * draw(len(each), 1))).float() for each in (keys, x))
        _, places = Nearest(keys, k)(x)
        products = x.double() @ keys.double().T
        missed = products.topk(k, dim=1).values[:, -1] - products.gather(1, places).amin(1)
        noise = 16 * 2.0**-24 * x.double().norm(dim=1) * keys.double().norm(dim=1).max()
        assert (missed <= noise).all(), (dim, num, k, (missed / noise).max())


def test_rounded_products_leave_few_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eval.nearest.cpu_has_bf16", lambda: True)
    keys, x = (F.normalize(torch.randn(num, 64, generator=torch.Generator().manual_seed(num)), dim=1) for num in (5000, 200))
    asked = []
    nearest_of = Nearest(keys, 20)
    nearest_of._of_pairs = lambda x, rows, places, exact=nearest_of._of_pairs: asked.append(len(rows)) or exact(x, rows, places)
    nearest_of(x)
    assert 20 * len(x) <= asked[0] < 2.5 * 20 * len(x)


def test_twins_vote_alike_whoever_else_is_asked_for(way: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which of several keys with one product are taken does not depend on the other queries."""
    random = torch.Generator().manual_seed(0)
    x, z = torch.randn(40, 16, generator=random).repeat(50, 1), torch.randn(300, 16, generator=random)
    y = torch.randint(9, (len(x),), generator=random)
    together = knn_predictions(x, y, z, (20,))[20]
    monkeypatch.setattr("eval.knn.MAX_SIMILARITIES", 7 * len(x))
    assert torch.equal(knn_predictions(x, y, z, (20,))[20], together)


# ------------------------------------------------------------------------------------------------------ softmax regression


def objective(x: Tensor, y: Tensor, weights: Tensor, biases: Tensor, weight_decay: float) -> float:
    return (F.cross_entropy(x @ weights + biases, y) + weight_decay / 2 * weights.square().sum()).item()


@pytest.mark.parametrize(("classes", "noise"), [(2, 2.0), (4, 1.5), (30, 1.0)])
def test_softmax_regression_equals_sklearn(classes: int, noise: float) -> None:
    """At the optimum the same loss and the same probabilities; after the probe's 20 steps a loss that is hardly above it."""
    x, y = blobs(600, 10, classes, noise)
    (x,) = standardise(x)
    decays = (1e-3, 1e-2, 1e-1)
    weights, biases = fit_softmax(x, y, classes, decays, steps=300)
    early, early_biases = fit_softmax(x, y, classes, decays)
    for i, decay in enumerate(decays):
        columns = 1 if classes == 2 else classes  # of two classes it has one column, whose weights are twice as long
        theirs = LogisticRegression(C=(2 if columns == 1 else 1) / (decay * len(x)), max_iter=5000, tol=1e-8).fit(x.double(), y)
        coefficients, intercepts = torch.from_numpy(theirs.coef_.T).float(), torch.from_numpy(theirs.intercept_).float()
        if columns == 1:
            coefficients, intercepts = torch.cat([-coefficients, coefficients], 1) / 2, torch.cat([-intercepts, intercepts]) / 2
        best = objective(x, y, coefficients, intercepts, decay)
        assert objective(x, y, weights[:, i], biases[i], decay) == pytest.approx(best, rel=1e-4)
        ours = (x @ weights[:, i] + biases[i]).softmax(1)
        torch.testing.assert_close(ours, (x @ coefficients + intercepts).softmax(1), atol=5e-3, rtol=0)
        assert objective(x, y, early[:, i], early_biases[i], decay) <= best * 1.02 + 1e-4


def test_weight_decays_do_not_touch_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = blobs(300, 8, 5, 1.0)
    (x,) = standardise(x)
    together, biases = fit_softmax(x, y, 5, (0.0, 1e-3, 1e-1))
    monkeypatch.setitem(linear.NUMBERS_AT_ONCE, "cpu", 50)  # 10 rows at once instead of all
    for i, decay in enumerate((0.0, 1e-3, 1e-1)):
        alone, alone_biases = fit_softmax(x, y, 5, (decay,))
        torch.testing.assert_close(alone[:, 0], together[:, i], atol=2e-3, rtol=1e-2)
        torch.testing.assert_close(alone_biases[0], biases[i], atol=2e-3, rtol=1e-2)


@pytest.mark.parametrize("num", [6, 40])
def test_fewer_images_than_dimensions_and_constants_are_no_trouble(num: int) -> None:
    x = torch.cat([torch.randn(num, 50, generator=torch.Generator().manual_seed(0)), torch.full((num, 3), 7.0)], dim=1)
    y = torch.arange(num) % 2
    weights, biases = fit_softmax(standardise(x)[0], y, 2, (0.0, 1e-2, 1.0))
    assert weights.isfinite().all() and biases.isfinite().all()
    assert ((standardise(x)[0] @ weights[:, 0] + biases[0]).argmax(1) == y).all()
    constant = torch.full((num, 4), 3.0)
    assert fit_softmax(standardise(constant)[0], y, 2, (0.0, 1.0))[0].abs().max() == 0


def sgd_probe(x: Tensor, y: Tensor, z: Tensor, classes: int, rate: float) -> Tensor:
    """The usual way: batch norm without affine, a linear layer, 90 epochs of SGD with momentum along a cosine."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.BatchNorm1d(x.shape[1], affine=False, eps=1e-6), nn.Linear(x.shape[1], classes))
    nn.init.zeros_(network[1].weight)
    optimizer = torch.optim.SGD(network.parameters(), lr=rate, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 90)
    for _ in range(90):
        for rows in torch.randperm(len(x)).split(256):
            optimizer.zero_grad()
            F.cross_entropy(network(x[rows]), y[rows]).backward()
            optimizer.step()
        schedule.step()
    return network.eval()(z).argmax(1)


def test_probe_is_as_good_as_90_epochs_of_sgd() -> None:
    (x, y), (z, labels) = blobs(2000, 24, 10, 1.6), blobs(4000, 24, 10, 1.6, seed=2)
    (held_out,) = held_out_parts(y, parts=1)
    rates = (0.003, 0.01, 0.03, 0.1, 0.3)
    best = max(rates, key=lambda rate: right(sgd_probe(x[~held_out], y[~held_out], x[held_out], 10, rate), y[held_out]))
    theirs = right(sgd_probe(x, y, z, 10, best), labels)
    ours = right(softmax_probe(x, y, z, held_out_parts(y)).predictions, labels)
    assert 0.5 < theirs < 0.95
    assert ours == pytest.approx(theirs, abs=0.005)


def test_penalties_are_chosen_where_it_matters() -> None:
    """120 images and 100 dimensions, 3 of which say something: without a penalty the noise is learned by heart."""
    draws = torch.Generator().manual_seed(0)
    y, labels = torch.randint(3, (120,), generator=draws), torch.randint(3, (2000,), generator=draws)
    x, z = (2.0 * F.one_hot(each, 100) + torch.randn(len(each), 100, generator=draws) for each in (y, labels))
    parts = held_out_parts(y)
    for probe in (softmax_probe, ridge_probe):
        chosen = probe(x, y, z, parts)
        weakest = probe(x, y, z, parts, (1e-6,))
        assert chosen.chosen >= 1e-2
        assert right(chosen.predictions, labels) > right(weakest.predictions, labels) + 0.03
        assert 0.4 < chosen.held_out_accuracy < 1


def test_probes_keep_labels_and_ignore_scale_and_shift() -> None:
    (x, y), (z, _) = blobs(300, 10, 3, 1.0), blobs(100, 10, 3, 1.0, seed=2)
    names = torch.tensor([7, -1, 100])
    for probe in (softmax_probe, ridge_probe):
        plain = probe(x, names[y], z, held_out_parts(y)).predictions
        assert set(plain.tolist()) == {7, -1, 100}
        moved = probe(100 * x - 3, names[y], 100 * z - 3, held_out_parts(y)).predictions
        assert right(plain, moved) >= 0.99


# -------------------------------------------------------------------------------------------------------------------- ridge


def test_ridge_equals_sklearn() -> None:
    (x, y), (z, _) = blobs(200, 15, 4, 1.0), blobs(50, 15, 4, 1.0, seed=2)
    targets, ridges = F.one_hot(y, 4).double(), (1e-4, 1e-2, 1.0)
    fitted, tested = (side.double().numpy() for side in standardise(x, z))
    for ours, ridge in zip(ridge_outputs(x, targets, z, ridges), ridges, strict=True):
        theirs = Ridge(alpha=len(x) * ridge).fit(fitted, targets.numpy()).predict(tested)
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------- held out


def test_held_out_parts_are_cut_by_class() -> None:
    labels = torch.tensor([0] * 50 + [1] * 20 + [2] * 2)
    parts = held_out_parts(labels, folds=10, parts=10)
    assert torch.stack(parts).sum(0).tolist() == [1] * 72  # each image is held out once
    for part in parts:
        assert (part & (labels == 0)).sum() == 5 and (part & (labels == 1)).sum() == 2
        assert (~part & (labels == 2)).sum() >= 1  # some are left to learn from
    assert all(part[:50].roll(1).ne(part[:50]).sum() == 2 for part in parts), "neighbours stay together"
    assert not torch.equal(parts[0], held_out_parts(labels, seed=1)[0])
    assert [len(held_out_parts(torch.arange(num) % 2)) for num in (100, 5000, 50_000)] == [5, 2, 1]


def test_the_first_part_is_never_empty() -> None:
    for seed in range(20):
        (part,) = held_out_parts(torch.tensor([0, 0, 1, 1]), 5, 1, seed)
        assert 1 <= part.sum() <= 2 and not part[:2].all() and not part[2:].all()


@pytest.mark.parametrize(("labels", "options", "message"), [([0, 0, 1], {}, "class 1 has one"), ([0, 0], {"folds": 1}, "at least 2")])
def test_held_out_parts_refuse(labels: list[int], options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        held_out_parts(torch.tensor(labels), **options)


def test_shares_are_drawn_from_every_class() -> None:
    labels = torch.tensor([0] * 100 + [1] * 40 + [2] * 3)
    rows = draw_share(labels, 0.1, seed=0)
    assert labels[rows].bincount().tolist() == [10, 4, 2]
    assert len(rows.unique()) == 16
    assert (rows.diff() > 0).all(), "neighbours stay neighbours, for held_out_parts"
    assert spread_over(5, 10).tolist() == [0, 1, 2, 3, 4]
    assert spread_over(100, 3).tolist() == [0, 50, 99]


# ---------------------------------------------------------------------------------------------------------------- attention


def test_attention_finds_the_token_that_matters() -> None:
    """One token of eight, anywhere, is marked and says the class; the others say something else, so their mean is of no use."""

    def draw(num: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        draws = torch.Generator().manual_seed(seed)
        says = torch.randint(4, (num, 8), generator=draws)
        marked = torch.randint(8, (num,), generator=draws)
        tokens = torch.cat([F.one_hot(says, 4), F.one_hot(marked, 8).unsqueeze(2)], dim=2).float()
        return tokens + 0.1 * torch.randn(tokens.shape, generator=draws), says[torch.arange(num), marked], marked

    (x, y, _), (z, labels, _) = draw(1500, 0), draw(500, 1)
    (held_out,) = held_out_parts(y, parts=1)
    probe = attentive_probe(x, y + 5, z, held_out, learning_rates=(1e-3, 3e-2))
    assert right(probe.predictions, labels + 5) > 0.9
    assert probe.chosen == 3e-2 and probe.held_out_accuracy > 0.9
    assert right(softmax_probe(x.mean(1), y, z.mean(1), [held_out]).predictions, labels) < 0.6
    with pytest.raises(ValueError, match="NaN"):
        attentive_probe(x * torch.nan, y, z, held_out)


# --------------------------------------------------------------------------------------------------------------- similarity


def similar() -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(60, 5, generator=draws)
    near = x[:, :3] + 0.3 * torch.randn(60, 3, generator=draws)
    return x, torch.cat([near, torch.randn(60, 4, generator=draws)], dim=1)


def test_cka_by_hand_and_its_invariances() -> None:
    x, y = torch.tensor([[1.0], [0.0], [-1.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    # centred y: (1, -1/3), (0, 2/3), (-1, -1/3): |x^T y|^2 = 4, |x^T x|^2 = 4, |y^T y|^2 = 4 + (2/3)^2
    assert linear_cka(x, y) == pytest.approx(4 / math.sqrt(4 * (4 + 4 / 9)))
    x, y = similar()
    turn, _ = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(1)))
    assert linear_cka(x, 3 * x @ turn + 7) == pytest.approx(1, abs=1e-6)
    assert linear_cka(x.repeat(1, 30), y) == pytest.approx(linear_cka(x, y), rel=1e-6)  # by images instead of dimensions
    matrix = cka_matrix([x, y, x @ turn])
    assert matrix[0, 1] == matrix[1, 0] == linear_cka(x, y) and matrix[0, 2] == pytest.approx(1)
    # minyoungg/platonic-rep (07ef02a), AlignmentMetrics.cka of the same features
    assert linear_cka(x, y) == pytest.approx(0.4242783, abs=1e-6)


# minyoungg/platonic-rep (07ef02a), AlignmentMetrics.cknna of `similar`, normalised; it adds 1e-6 to the denominator.
@pytest.mark.parametrize(("k", "published"), [(2, 0.1601049), (5, 0.2157044), (10, 0.3137321), (20, 0.5244492)])
def test_cknna_equals_published_code(k: int, published: float, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = similar()
    assert cknna(x, y, k) == pytest.approx(published, abs=2e-5)
    monkeypatch.setattr("eval.similarity.MAX_SIMILARITIES", 420)  # 7 rows at once
    assert cknna(x, y, k) == pytest.approx(published, abs=2e-5)
    assert cknna(5 * x, x, k) == pytest.approx(1)


def test_neighbour_graph_equals_sklearn() -> None:
    x, _ = similar()
    graph = neighbour_graph(x, 6)
    distances, theirs = NearestNeighbors(n_neighbors=6, metric="cosine").fit(x).kneighbors()
    assert graph.indices.reshape(60, 6).tolist() == theirs.tolist()
    np.testing.assert_allclose(graph.data.reshape(60, 6), 1 - distances, atol=1e-6)
    assert graph_alignment(graph, graph) == pytest.approx(1)


def test_silhouette_equals_sklearn() -> None:
    x, _ = similar()
    labels = torch.randint(4, (60,), generator=torch.Generator().manual_seed(0))
    labels[0] = 9  # alone in its class
    assert silhouette(x, labels) == pytest.approx(silhouette_score(x, labels, metric="cosine"), abs=1e-6)
    apart = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [0.0, 3.0]])
    assert silhouette(apart, torch.tensor([0, 0, 1, 1])) == pytest.approx(1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: linear_cka(x, x[1:]), "same images"),
        (lambda x: linear_cka(x, torch.ones(60, 2)), "all images have the same"),
        (lambda x: linear_cka(x, x * torch.nan), "NaN"),
        (lambda x: cknna(x, x, 60), "choose 2 to 59"),
        (lambda x: neighbour_graph(torch.ones(60, 2) + 1e-7 * x[:, :2]), "all images have the same"),
        (lambda x: silhouette(x, torch.zeros(60, dtype=torch.long)), "at least 2"),
        (lambda x: silhouette(torch.ones(60, 2), torch.arange(60) % 2), "all images have the same"),
        (lambda x: softmax_probe(x, torch.zeros(60), x, []), "integers"),
        (lambda x: ridge_probe(x * torch.inf, torch.zeros(60, dtype=torch.long), x, []), "infinite"),
    ],
)
def test_similarities_and_probes_refuse(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(similar()[0])


# --------------------------------------------------------------------------------------------------------------------- rank


def test_spectrum_and_its_entropy() -> None:
    values = singular_values(np.diag([1.0, 4.0, 1.0, 2.0]))
    assert values.tolist() == [4, 2, 1, 1]
    assert spectral_entropy(values) == pytest.approx(1.75 * math.log(2), abs=1e-12)  # shares 1/2, 1/4, 1/8, 1/8
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    assert effective_rank(x) == spectral_entropy(singular_values(x))
    turned, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(50, 8)))
    assert math.exp(effective_rank(turned)) == pytest.approx(8, abs=1e-6)
