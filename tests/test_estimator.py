from __future__ import annotations

import copy
import doctest
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import DEVICES, assert_message, generator, seeds, small_sizes

import clustops
from clustops.integrations import estimator
from clustops.integrations.estimator import KMeans
from clustops.kmeans import kmeans, kmeans_assign


def blobs(
    n: int = 60, d: int = 3, k: int = 4, seed: int = 0, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    """``n`` rows around ``k`` well separated centres."""
    g = generator(seed)
    centres = 20 * torch.randn(k, d, generator=g, dtype=torch.float64)
    noise = torch.randn(n, d, generator=g, dtype=torch.float64)
    return (centres[torch.arange(n) % k] + noise).to(dtype)


def noise(n: int = 60, d: int = 3, seed: int = 0) -> torch.Tensor:
    """Rows without clusters, in which each start ends elsewhere."""
    return torch.randn(n, d, generator=generator(seed), dtype=torch.float64)


# Third-party judges


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "model", [KMeans(), KMeans(3), KMeans(2, metric="cosine"), KMeans(3, empty="farthest")], ids=repr
)
def test_scikit_learn_accepts_the_estimator(model: KMeans) -> None:
    checks = pytest.importorskip("sklearn.utils.estimator_checks")
    results = checks.check_estimator(model, on_skip=None, on_fail=None)
    assert len(results) > 40
    assert [r for r in results if r["status"] not in ("passed", "skipped")] == []
    # Those for clusterers run only on subclasses of ClusterMixin.
    for check in checks._yield_clustering_checks(model):
        check("KMeans", model)


@pytest.mark.parametrize("weighted", [False, True])
def test_scikit_learn_ends_at_the_same_centres_from_the_same_start(weighted: bool) -> None:
    cluster = pytest.importorskip("sklearn.cluster")
    x = noise(200, 4).numpy()
    weights = np.linspace(0.5, 3, 200) if weighted else None
    theirs = cluster.KMeans(5, init=x[:5], n_init=1, tol=0, max_iter=300).fit(x, sample_weight=weights)
    ours = KMeans(5, init=x[:5], tol=1e-12, max_iter=300).fit(x, sample_weight=weights)
    np.testing.assert_allclose(ours.cluster_centers_, theirs.cluster_centers_, rtol=1e-9)
    np.testing.assert_array_equal(ours.labels_, theirs.labels_)
    np.testing.assert_allclose(ours.inertia_, theirs.inertia_, rtol=1e-9)
    new = noise(50, 4, seed=1).numpy()
    np.testing.assert_array_equal(ours.predict(new), theirs.predict(new))
    np.testing.assert_allclose(ours.transform(new), theirs.transform(new), rtol=1e-6)
    np.testing.assert_allclose(ours.score(new), theirs.score(new), rtol=1e-9)


@pytest.mark.parametrize("weighted", [False, True])
def test_batches_move_the_centres_of_scikit_learn_s_mini_batches(weighted: bool) -> None:
    cluster = pytest.importorskip("sklearn.cluster")
    x = noise(200, 4).numpy()
    # Its own rule for centres with few rows is switched off; ours moves only those that never got one.
    theirs = cluster.MiniBatchKMeans(5, init=x[:5], n_init=1, reassignment_ratio=0)
    ours = KMeans(5, init=x[:5])
    for batch, weights in zip(np.split(x, 8), np.split(np.linspace(0.5, 3, 200), 8), strict=True):
        chosen = weights if weighted else None
        theirs.partial_fit(batch, sample_weight=chosen)
        ours.partial_fit(batch, sample_weight=chosen)
        np.testing.assert_allclose(ours.cluster_centers_, theirs.cluster_centers_, rtol=1e-9)
        np.testing.assert_array_equal(ours.labels_, ours.predict(batch))
    new = noise(50, 4, seed=1).numpy()
    np.testing.assert_array_equal(ours.predict(new), theirs.predict(new))
    np.testing.assert_allclose(ours.score(new), theirs.score(new), rtol=1e-9)


def test_pipelines_and_grid_searches_take_it() -> None:
    pytest.importorskip("sklearn")
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x = blobs().numpy()
    pipeline = make_pipeline(StandardScaler(), KMeans())
    search = GridSearchCV(pipeline, {"kmeans__n_clusters": [1, 2, 4]}, cv=2).fit(x)
    assert search.best_params_ == {"kmeans__n_clusters": 4}
    assert len(set(pipeline.set_params(kmeans__n_clusters=4).fit_predict(x)[:4])) == 4


def test_scikit_learn_need_not_be_there() -> None:
    code = """
import sys
import clustops.integrations.estimator
assert "sklearn" not in sys.modules
sys.modules["sklearn"] = None
import numpy as np
model = clustops.integrations.estimator.KMeans(2)
try:
    model.predict([[0.0]])
except AttributeError as error:
    assert "call fit" in str(error)
x = np.array([[0.0], [1.0], [9.0], [8.0]])
print(model, model.fit(x).inertia_, model.partial_fit(x).n_iter_ > 1, model.get_params()["n_clusters"])
"""
    out = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(Path(clustops.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert out.stdout.strip() == "KMeans(n_clusters=2) 1.0 True 2", out.stderr


# fit


def test_fit_is_kmeans_from_the_same_start() -> None:
    x = noise(100, 3)
    model = KMeans(6, init=x[:6], max_iter=7, tol=0.0, empty="farthest").fit(x)
    result = kmeans(x, 6, init=x[:6], max_iter=7, tol=0.0, empty="farthest")
    assert torch.equal(model.cluster_centers_, result.centroids)
    assert torch.equal(model.labels_, result.labels)
    assert model.inertia_ == float(result.inertia)
    assert model.n_iter_ == 7


@given(st.integers(1, 5), st.integers(1, 4), seeds)
def test_the_order_of_rows_changes_nothing(k: int, d: int, seed: int) -> None:
    x = noise(40, d, seed=seed)
    shuffle = torch.randperm(40, generator=generator(seed))
    one, other = KMeans(k, seed=seed).fit(x), KMeans(k, seed=seed).fit(x[shuffle])
    assert torch.equal(one.cluster_centers_, other.cluster_centers_)
    assert torch.equal(one.labels_[shuffle], other.labels_)


@given(st.integers(1, 4), seeds)
def test_a_row_of_weight_two_is_two_rows_wherever_they_stand(k: int, seed: int) -> None:
    x = noise(30, 2, seed=seed)
    weights = torch.randint(0, 3, (30,), generator=generator(seed))
    weights[:4] = 1
    repeated = x.repeat_interleave(weights, 0).flip(0)
    one = KMeans(k, seed=seed).fit(x, sample_weight=weights)
    other = KMeans(k, seed=seed).fit(repeated)
    torch.testing.assert_close(one.cluster_centers_, other.cluster_centers_)
    assert one.inertia_ == pytest.approx(other.inertia_)


def test_large_inputs_are_not_copied_into_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimator, "_ORDERED", 10)
    monkeypatch.setattr(estimator, "_canonical_order", pytest.fail)
    x = blobs(40)
    model = KMeans(4).fit(x)
    assert torch.equal(model.labels_, kmeans(x, 4, max_iter=300).labels)
    assert torch.equal(model.predict(x), model.labels_)


@pytest.mark.parametrize("init", ["k-means++", "random", "rows"])
@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("device", DEVICES)
def test_labels_and_inertia_belong_to_the_centres(init: str, metric: str, device: str) -> None:
    x = noise(70).to(device)
    start: Any = x[:5] if init == "rows" else init
    model = KMeans(5, init=start, metric=metric, max_iter=2).fit(x)
    labels, distances = kmeans_assign(x, model.cluster_centers_, metric=metric)
    assert torch.equal(model.labels_, labels)
    assert torch.equal(model.predict(x), labels)
    assert model.inertia_ == pytest.approx(float(distances.sum()))
    assert model.score(x) == pytest.approx(-model.inertia_)
    torch.testing.assert_close(model.transform(x).square().amin(1), distances)


def test_restarts_keep_the_best() -> None:
    x = noise(80)
    single = KMeans(7, init="random", n_init=1).fit(x)
    assert KMeans(7, init="random", n_init="auto").fit(x).inertia_ < single.inertia_
    assert KMeans(7, init="random", n_init=10).fit(x).inertia_ == KMeans(7, init="random").fit(x).inertia_


@pytest.mark.parametrize("seed", [0, 1])
def test_same_seed_same_bits(seed: int) -> None:
    x = noise()
    one, other = KMeans(6, seed=seed).fit(x), KMeans(6, seed=seed).fit(x)
    assert torch.equal(one.cluster_centers_, other.cluster_centers_)


def test_another_seed_is_another_start() -> None:
    x = noise()
    centres = [KMeans(6, seed=seed, max_iter=0).fit(x).cluster_centers_ for seed in (0, 1)]
    assert not torch.equal(centres[0], centres[1])


def test_transform_gives_distances_in_the_order_of_centres() -> None:
    x = noise(20)
    model = KMeans(4).fit(x)
    torch.testing.assert_close(model.transform(x), torch.cdist(x, model.cluster_centers_))
    assert torch.equal(model.fit_transform(x), model.transform(x))
    assert model.transform(x[:1]).shape == (1, 4)
    assert KMeans(1).fit(x).transform(x).shape == (20, 1)


def test_score_weighs_rows() -> None:
    x, weights = noise(30), torch.linspace(0, 2, 30, dtype=torch.float64)
    model = KMeans(3).fit(x, sample_weight=weights)
    assert model.score(x, sample_weight=weights) == pytest.approx(-model.inertia_)
    assert model.score(x) != pytest.approx(-model.inertia_)


# Kinds of input


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_tensors_give_tensors(dtype: torch.dtype) -> None:
    x = blobs(dtype=dtype)
    for model in (KMeans(4).fit(x), KMeans(4).partial_fit(x)):
        assert model.cluster_centers_.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert torch.equal(model.predict(x), model.labels_)
        assert model.labels_.dtype == torch.int64
        assert isinstance(model.transform(x), torch.Tensor)


@pytest.mark.parametrize("form", ["array", "list", "integers", "objects", "memmap"])
def test_other_kinds_give_numpy_arrays(form: str, tmp_path: Path) -> None:
    x: Any = blobs().round().numpy()
    expected = KMeans(4).fit(torch.from_numpy(x)).cluster_centers_.numpy()
    np.save(tmp_path / "x.npy", x)
    same = {
        "array": x,
        "list": x.tolist(),
        "integers": x.astype(np.int32),
        "objects": x.astype(object),
        "memmap": np.load(tmp_path / "x.npy", mmap_mode="r"),
    }[form]
    before = copy.deepcopy(same)
    model = KMeans(4).fit(same)
    for out in (model.cluster_centers_, model.labels_, model.predict(same), model.transform(same)):
        assert isinstance(out, np.ndarray)
    np.testing.assert_array_equal(model.cluster_centers_, expected)
    np.testing.assert_array_equal(np.asarray(same), np.asarray(before))


class Frame:
    """What a data frame shows of itself: columns and an array."""

    def __init__(self, values: Any, columns: list[Any]) -> None:
        self.values, self.columns = values, columns

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return np.asarray(self.values, dtype=dtype)


def test_columns_of_data_frames_are_remembered() -> None:
    x = blobs().numpy()
    model = KMeans(4).fit(Frame(x, ["a", "b", "c"]))
    assert model.feature_names_in_.tolist() == ["a", "b", "c"]
    assert isinstance(model.predict(Frame(x, ["a", "b", "c"])), np.ndarray)
    for columns, words in [
        (["c", "b", "a"], "must be in the same order"),
        (["a", "b", "z"], "unseen at fit time:\n- z\nFeature names seen at fit time, yet now missing:\n- c"),
    ]:
        for method in (model.predict, model.transform, model.score, model.partial_fit):
            with pytest.raises(ValueError, match=words):
                method(Frame(x, columns))
    assert not hasattr(model.fit(x), "feature_names_in_")
    assert not hasattr(model.fit(Frame(x, [0, 1, 2])), "feature_names_in_")


def test_a_model_fitted_on_tensors_predicts_arrays_and_the_reverse() -> None:
    x = blobs()
    model = KMeans(4).fit(x)
    assert isinstance(model.predict(x.numpy()), np.ndarray)
    assert isinstance(KMeans(4).fit(x.numpy()).predict(x), torch.Tensor)


def test_gradients_do_not_flow() -> None:
    x = blobs().requires_grad_()
    model = KMeans(4).fit(x)
    assert not model.cluster_centers_.requires_grad
    assert not model.transform(x).requires_grad
    # One centre so far off that it is moved to a row.
    start = torch.cat([blobs()[:1], torch.full((1, 3), 1e6, dtype=torch.float64)])
    assert not KMeans(2, init=start).partial_fit(x).cluster_centers_.requires_grad


@pytest.mark.cuda
def test_rows_are_streamed_to_the_device() -> None:
    x = noise(500)
    here, there = KMeans(5).fit(x), KMeans(5, device="cuda").fit(x)
    assert there.cluster_centers_.is_cuda
    torch.testing.assert_close(here.cluster_centers_, there.cluster_centers_.cpu())
    assert torch.equal(there.predict(x).cpu(), here.predict(x))
    torch.testing.assert_close(there.transform(x).cpu(), here.transform(x))
    assert there.partial_fit(x).cluster_centers_.is_cuda


def test_a_device_by_name_changes_nothing_where_rows_lie_there() -> None:
    x = noise()
    assert torch.equal(KMeans(4, device="cpu").fit(x).cluster_centers_, KMeans(4).fit(x).cluster_centers_)


# partial_fit


def sculley(batches: list[torch.Tensor], centres: torch.Tensor) -> torch.Tensor:
    """The published loop: a batch is assigned, then each row moves its centre by one over its count."""
    centres, seen = centres.double().clone(), [0] * len(centres)
    for batch in batches:
        nearest = torch.cdist(batch.double(), centres).argmin(1)
        for row, c in zip(batch.double(), nearest.tolist(), strict=True):
            seen[c] += 1
            centres[c] += (row - centres[c]) / seen[c]
    return centres


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(1, 5), seeds)
def test_batches_move_centres_as_one_row_after_the_other_does(sizes: list[int], k: int, seed: int) -> None:
    batches = [noise(n, 2, seed=seed + i) for i, n in enumerate([12, *sizes])]
    start = noise(k, 2, seed=seed + 100)
    # Every centre gets a row of the first batch, so that none is moved to a far row.
    batches[0][:k] = start
    model = KMeans(k, init=start)
    for i, batch in enumerate(batches):
        model.partial_fit(batch)
        assert model.n_iter_ == i + 1
        assert torch.equal(model.labels_, model.predict(batch))
        assert model.inertia_ == pytest.approx(-model.score(batch))
    torch.testing.assert_close(model.cluster_centers_, sculley(batches, start))


def test_centres_of_float32_batches_are_kept_in_float64() -> None:
    batches = [noise(20, 2, seed=seed).float() for seed in range(3)]
    model = KMeans(3, init=batches[0][:3])
    for batch in batches:
        model.partial_fit(batch)
    expected = sculley(batches, batches[0][:3])
    torch.testing.assert_close(model._centres, expected, rtol=1e-14, atol=1e-14)
    assert torch.equal(model.cluster_centers_, model._centres.float())


def test_one_batch_is_one_step_from_the_start() -> None:
    x = noise()
    model = KMeans(5).partial_fit(x)
    start = kmeans(x, 5, max_iter=0).centroids
    torch.testing.assert_close(model.cluster_centers_, kmeans(x, 5, init=start, max_iter=1).centroids)


def test_batches_find_well_separated_clusters() -> None:
    x = blobs(4000)[torch.randperm(4000, generator=generator(0))]
    model = KMeans(4)
    for batch in x.split(100):
        model.partial_fit(batch)
    assert model.score(x) == pytest.approx(-KMeans(4).fit(x).inertia_, rel=1e-3)


@given(seeds)
def test_a_weight_of_two_in_a_batch_is_two_rows(seed: int) -> None:
    start = noise(3, seed=seed + 9)
    one, other = KMeans(3, init=start), KMeans(3, init=start)
    for i in range(3):
        x, weights = noise(20, seed=seed + i), torch.randint(0, 3, (20,), generator=generator(seed + i))
        weights[:3] = 1
        one.partial_fit(x, sample_weight=weights)
        other.partial_fit(x.repeat_interleave(weights, 0))
    torch.testing.assert_close(one.cluster_centers_, other.cluster_centers_)


def test_counts_go_on_past_2_to_the_24() -> None:
    x = torch.tensor([[0.0], [2.0]])
    model = KMeans(1).partial_fit(x, sample_weight=[2.0**24 + 1, 2.0**24 + 1])
    for _ in range(8):
        model.partial_fit(torch.tensor([[9.0]]))
    assert float(model._centres) == pytest.approx((2**25 + 74) / (2**25 + 10), rel=1e-14, abs=0)


def test_partial_fit_goes_on_from_fit() -> None:
    x, more = blobs(), blobs(seed=0)[:7]
    model = KMeans(4).fit(x)
    before = model.cluster_centers_.clone()
    labels = model.predict(more)
    model.partial_fit(more)
    for k in range(4):
        rows = more[labels == k]
        expected = (15 * before[k] + rows.sum(0)) / (15 + len(rows))
        torch.testing.assert_close(model.cluster_centers_[k], expected)


def test_a_fit_forgets_the_batches_before_it() -> None:
    x = blobs()
    used = KMeans(4).partial_fit(noise())
    assert torch.equal(used.fit(x).cluster_centers_, KMeans(4).fit(x).cluster_centers_)
    assert torch.equal(used.partial_fit(x).cluster_centers_, KMeans(4).fit(x).partial_fit(x).cluster_centers_)


def test_cosine_centres_stay_on_the_sphere() -> None:
    model = KMeans(3, metric="cosine")
    for seed in range(3):
        x = noise(20, seed=seed)
        model.partial_fit(x)
        torch.testing.assert_close(model.cluster_centers_.norm(dim=1), torch.ones(3, dtype=torch.float64))
        assert torch.equal(model.predict(5 * x), model.labels_)


def test_long_rows_count_no_more_for_cosine() -> None:
    x, start = noise(30), noise(3, seed=1)
    lengths = torch.logspace(-3, 3, 30, dtype=torch.float64).unsqueeze(1)
    one, other = (KMeans(3, metric="cosine", init=start).partial_fit(rows) for rows in (x, x * lengths))
    torch.testing.assert_close(one.cluster_centers_, other.cluster_centers_)


def test_opposite_rows_leave_a_cosine_centre_its_direction() -> None:
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    model = KMeans(1, metric="cosine", init=x[:1]).partial_fit(x)
    assert model.cluster_centers_.tolist() == [[1.0, 0.0]]


def test_centres_that_never_got_a_row_move_to_the_farthest_rows() -> None:
    x = torch.tensor([[0.0], [1.0], [10.0], [30.0]])
    far = torch.tensor([[0.0], [1000.0], [2000.0]])
    model = KMeans(3, init=far).partial_fit(x)
    # The mean of all rows is 10.25; 30 is farthest from it, then 0 from both.
    assert model.cluster_centers_.tolist() == [[10.25], [30.0], [0.0]]
    assert model.labels_.tolist() == [2, 2, 0, 1]
    model.partial_fit(torch.tensor([[31.0]]))
    assert model.cluster_centers_.tolist() == [[10.25], [31.0], [0.0]]


def test_rows_of_weight_zero_attract_no_idle_centre() -> None:
    x = torch.tensor([[0.0], [1.0], [99.0]])
    model = KMeans(2, init=torch.tensor([[0.0], [1000.0]])).partial_fit(x, sample_weight=[1.0, 1.0, 0.0])
    assert model.cluster_centers_[1].tolist() == [0.0]


def test_fewer_distinct_rows_than_clusters_end() -> None:
    x = torch.ones(6, 2)
    model = KMeans(4).partial_fit(x)
    assert torch.isfinite(model.cluster_centers_).all()
    assert model.inertia_ == 0
    model.partial_fit(torch.tensor([[1.0, 1.0], [5.0, 5.0], [7.0, 9.0]]))
    assert len(model.cluster_centers_.unique(dim=0)) >= 3


@settings(max_examples=10)
@given(small_sizes, seeds)
def test_partial_fit_ignores_how_rows_of_a_batch_are_ordered(n: int, seed: int) -> None:
    x, start = noise(n + 3, seed=seed), noise(3, seed=seed + 1)
    one = KMeans(3, init=start).partial_fit(x)
    other = KMeans(3, init=start).partial_fit(x.flip(0))
    # A centre without a row would start anew at some row.
    if len(kmeans_assign(x, start)[0].unique()) == 3:
        assert torch.equal(one.cluster_centers_, other.cluster_centers_)


# Parameters and state


def test_parameters_are_read_and_set_by_name() -> None:
    model = KMeans(3, seed=5)
    assert model.get_params()["seed"] == 5
    assert model.set_params(n_clusters=7, metric="cosine") is model
    assert repr(model) == "KMeans(n_clusters=7, seed=5, metric='cosine')"
    assert KMeans(**model.get_params()).get_params() == model.get_params()


def test_a_fitted_model_is_copied_and_pickled_whole() -> None:
    x = blobs()
    model = KMeans(4).fit(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin.predict(x), model.labels_)
        assert torch.equal(
            twin.partial_fit(x).cluster_centers_, copy.deepcopy(model).partial_fit(x).cluster_centers_
        )


def test_names_of_the_columns_of_transform() -> None:
    assert KMeans(2).fit(blobs()).get_feature_names_out().tolist() == ["kmeans0", "kmeans1"]


@pytest.mark.parametrize("method", ["predict", "transform", "score", "get_feature_names_out"])
def test_before_a_fit_methods_say_so(method: str) -> None:
    with pytest.raises(AttributeError, match="call fit or partial_fit first"):
        getattr(KMeans(), method)(blobs())


X = blobs(10)


@pytest.mark.parametrize(
    ("model", "x", "weights", "error", "parts"),
    [
        (KMeans(11), X, None, ValueError, ("n_clusters must be at most n_samples=10", "got n_clusters=11")),
        (KMeans(0), X, None, ValueError, ("n_clusters must be at least 1", "got 0")),
        (KMeans(2.0), X, None, TypeError, ("n_clusters must be an integer", "got 2.0")),  # type: ignore[arg-type]
        (KMeans(2, n_init="many"), X, None, ValueError, ("n_init must be one of 'auto'", "got 'many'")),
        (KMeans(2, n_init=0), X, None, ValueError, ("n_init must be at least 1", "got 0")),
        (KMeans(2, init="best"), X, None, ValueError, ("init must be one of", "got 'best'")),
        (KMeans(2, init=X[:3]), X, None, ValueError, ("init must be [2, 3]", "got [3, 3]")),
        (KMeans(2, init=X[:2] * 1j), X, None, ValueError, ("init must be real", "Complex")),
        (KMeans(2, metric="l1"), X, None, ValueError, ("metric must be one of", "got 'l1'")),
        (
            KMeans(2),
            X[0],
            None,
            ValueError,
            ("X must be [n_samples, n_features]", "got [3]", "Reshape your data"),
        ),
        (KMeans(2), X[None], None, ValueError, ("X must be [n_samples, n_features]", "got [1, 10, 3]")),
        (KMeans(2), X[:0], None, ValueError, ("X must be", "got 0 sample(s) (shape=(0, 3))")),
        (KMeans(2), X[:, :0], None, ValueError, ("X must be", "got 0 feature(s) (shape=(10, 0))")),
        (KMeans(2), X.where(X < 1, torch.nan), None, ValueError, ("X must be finite", "NaN")),
        (KMeans(2), X * 1j, None, ValueError, ("X must be real", "Complex data not supported")),
        (KMeans(2), X.to_sparse(), None, TypeError, ("X must be dense", "sparse", "X.to_dense()")),
        (KMeans(2), "text", None, TypeError, ("X must be an array of real numbers",)),
        (KMeans(2), X, X[0], ValueError, ("sample_weight must be [10]", "got [3]")),
        (KMeans(2), X, -torch.ones(10), ValueError, ("sample_weight must be at least 0", "got -1.0")),
        (KMeans(2), X, torch.zeros(10), ValueError, ("sample_weight must be above zero", "all zero weights")),
        (KMeans(2), X, torch.full((10,), torch.nan), ValueError, ("sample_weight must be finite", "NaN")),
    ],
)
@pytest.mark.parametrize("method", ["fit", "partial_fit"])
def test_bad_input_says_what_and_how_to_cure_it(
    model: KMeans, x: Any, weights: Any, error: type[Exception], parts: tuple[str, ...], method: str
) -> None:
    model = copy.deepcopy(model)
    with pytest.raises(error) as raised:
        getattr(model, method)(x, sample_weight=weights)
    assert_message(raised.value, *parts)
    assert not model.__sklearn_is_fitted__()


def test_a_small_first_batch_names_the_cure() -> None:
    with pytest.raises(ValueError, match="larger first batch") as raised:
        KMeans(5).partial_fit(X[:4])
    assert_message(raised.value, "n_clusters must be at most n_samples=4", "got n_clusters=5")
    KMeans(4).fit(X).partial_fit(X[:1])


@pytest.mark.parametrize("method", ["predict", "transform", "score", "partial_fit"])
def test_other_features_than_those_of_the_fit_are_refused(method: str) -> None:
    with pytest.raises(ValueError, match="X has 2 features, but KMeans is expecting 3") as raised:
        getattr(KMeans(2).fit(X), method)(X[:, :2])
    assert_message(raised.value, "X must be [n_samples, 3]")


def test_other_numbers_of_clusters_between_batches_are_refused() -> None:
    with pytest.raises(ValueError, match="call fit") as raised:
        KMeans(2).partial_fit(X).set_params(n_clusters=3).partial_fit(X)
    assert_message(raised.value, "n_clusters must be the same in all batches", "got 3 after 2")


@pytest.mark.parametrize("name", ["random_state", "clusters"])
def test_unknown_parameters_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="params must be among n_clusters") as raised:
        KMeans().set_params(**{name: 1})
    assert_message(raised.value, f"got {name}")


def test_examples_in_docstrings() -> None:
    assert doctest.testmod(estimator).failed == 0
