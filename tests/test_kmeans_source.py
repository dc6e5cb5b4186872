"""Rows read by slices give the result of rows in memory, in little memory, a chunk ahead."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import assert_message, generator, seeds, small_sizes
from torch import Tensor

from clustops import kmeans_source
from clustops.integrations import estimator, estimator_input
from clustops.integrations.estimator import KMeans
from clustops.kmeans import cluster_means, kmeans, kmeans_assign, kmeans_plus_plus, repair_empty_clusters
from clustops.kmeans_source import Reader, Source, read_ahead

dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64).to(dtype)


class Sliced:
    """Rows of which slices can be had, and nothing else; it counts the rows read."""

    def __init__(self, rows: Any, dtype: Any = None) -> None:
        self.rows, self.shape, self.dtype = rows, tuple(rows.shape), dtype or rows.dtype
        self.read = 0

    def __getitem__(self, index: slice) -> Any:
        assert isinstance(index, slice)
        assert index.step is None
        assert 0 <= index.start < index.stop <= self.shape[0]
        self.read += index.stop - index.start
        return self.rows[index]


@pytest.fixture
def small_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kmeans_source, "_READ", 20)


def assert_equal(found: Any, expected: Any) -> None:
    values = zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]
    for a, b in values:
        a, b = torch.as_tensor(a), torch.as_tensor(b)
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def readers() -> set[threading.Thread]:
    return {t for t in threading.enumerate() if t.name.startswith("clustops-reader")}


# --- the same bits


@given(
    seeds,
    small_sizes,
    st.integers(1, 90),
    dtypes,
    st.sampled_from(["l2", "cosine"]),
    st.sampled_from(["split", "farthest", "random", "keep"]),
    st.sampled_from(["k-means++", "random", "far"]),
    st.booleans(),
)
@pytest.mark.filterwarnings("ignore::clustops.checks.ClustopsWarning")
def test_kmeans_of_slices_is_kmeans_in_memory(
    seed: int, d: int, read: int, dtype: torch.dtype, metric: str, empty: str, init: str, weighted: bool
) -> None:
    x = normal(seed, 41, d, dtype=dtype)
    start: Any = init
    if init == "far":
        start = torch.cat([x[:4], torch.full((3, d), 100.0, dtype=dtype)])
    weights = torch.randint(0, 3, (41,), generator=generator(seed)).float() if weighted else None
    options: dict[str, Any] = {
        "metric": metric,
        "empty": empty,
        "init": start,
        "weights": weights,
        "seed": seed,
    }
    options |= {"n_init": 1 if init == "far" else 2, "max_iter": 3, "tol": 1e-9}
    expected = kmeans(x, 7, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kmeans_source, "_READ", read)
        found = kmeans(Sliced(x), 7, **options)
    assert_equal(tuple(vars(found).values()), tuple(vars(expected).values()))


@given(seeds, small_sizes, small_sizes, st.integers(1, 200), dtypes)
def test_the_steps_of_slices_are_those_in_memory(
    seed: int, n: int, d: int, read: int, dtype: torch.dtype
) -> None:
    x, k = normal(seed, n, d, dtype=dtype), 1 + n // 2
    centroids = normal(seed + 1, k + 2, d, dtype=dtype)
    labels = torch.randint(-1, k, (n,), generator=generator(seed))
    counts = torch.bincount(labels[labels >= 0], minlength=k + 2)
    weights = torch.rand(n, generator=generator(seed)) + 0.1
    steps: list[Callable[[Any], Any]] = [
        lambda rows: kmeans_assign(rows, centroids),
        lambda rows: kmeans_assign(rows, centroids, metric="cosine", top=k),
        lambda rows: cluster_means(rows, labels, k),
        lambda rows: cluster_means(rows, labels, k, weights=weights),
        lambda rows: kmeans_plus_plus(rows, k, weights=weights, seed=seed),
        lambda rows: repair_empty_clusters(rows, labels, centroids, counts),
        lambda rows: repair_empty_clusters(rows, labels, centroids, counts, policy="farthest"),
    ]
    for step in steps:
        expected = step(x)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kmeans_source, "_READ", read)
            patch.setattr(kmeans_source, "_BLOCK", read)
            assert_equal(step(Sliced(x)), expected)


def test_no_rows_are_no_reads(small_reads: None) -> None:
    nothing = Sliced(torch.empty(0, 3))
    assert kmeans_assign(nothing, torch.ones(2, 3))[0].shape == (0,)
    assert cluster_means(nothing, torch.empty(0, dtype=torch.int64), 2)[1].tolist() == [0, 0]
    assert nothing.read == 0


@pytest.mark.parametrize("dtype", ["f4", "f8", "f2", ">f4"])
@pytest.mark.parametrize("layout", ["rows", "columns", "reversed", "every second", "writeable"])
@pytest.mark.filterwarnings("error")
def test_a_memory_map_of_any_layout_is_clustered_as_in_memory(
    dtype: str, layout: str, tmp_path: Path, small_reads: None
) -> None:
    values = normal(0, 60, 6).numpy().astype(dtype)
    np.save(tmp_path / "x.npy", np.asfortranarray(values) if layout == "columns" else values)
    x = np.load(tmp_path / "x.npy", mmap_mode="r+" if layout == "writeable" else "r")
    x = {"reversed": x[::-1, ::-1], "every second": x[::2, 1::2]}.get(layout, x)
    assert isinstance(x, np.memmap)
    before = (tmp_path / "x.npy").read_bytes()
    found, expected = kmeans(x, 5), kmeans(torch.from_numpy(x.astype(x.dtype.newbyteorder("="))), 5)
    assert all(isinstance(value, np.ndarray) for value in vars(found).values())
    assert_equal(tuple(vars(found).values()), tuple(vars(expected).values()))
    assert (tmp_path / "x.npy").read_bytes() == before


def test_batches_of_problems_may_be_a_memory_map(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", normal(0, 3, 20, 2).numpy())
    x = np.load(tmp_path / "x.npy", mmap_mode="r")
    assert_equal(kmeans(x, 4).labels, kmeans(np.array(x), 4).labels)


def test_slices_may_be_lists_arrays_or_tensors(small_reads: None) -> None:
    x = normal(0, 30, 2, dtype=torch.float64)
    expected = kmeans(x, 4).labels

    class Lists(Sliced):
        def __getitem__(self, index: slice) -> Any:
            return super().__getitem__(index).tolist()

    for source in (Lists(x, "float64"), Sliced(x), Sliced(x.numpy())):
        labels = kmeans(source, 4).labels
        assert isinstance(labels, Tensor)
        assert torch.equal(labels, expected)


def test_an_hdf5_data_set_is_a_source(tmp_path: Path, small_reads: None) -> None:
    h5py = pytest.importorskip("h5py")
    x = normal(0, 80, 3)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        data = file.create_dataset("x", data=x.numpy(), chunks=(7, 3), compression="gzip")
        assert_equal(kmeans(data, 5).centroids, kmeans(x, 5).centroids)
        assert_equal(KMeans(5).fit(data).labels_, KMeans(5).fit(x.numpy()).labels_)


# --- few reads, little memory


def test_no_pass_is_made_for_checks_alone(small_reads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimator_input, "_SMALL", 0)
    x = normal(0, 50, 4)
    for passes, call in [
        (1, lambda rows: kmeans_assign(rows, x[:3])),
        (2, lambda rows: cluster_means(rows, torch.arange(50) % 3, 3)),
        # Bounds, two iterations, and the labels of the centroids returned.
        (4, lambda rows: kmeans(rows, 3, init=x[:3], max_iter=2, tol=0)),
        # Bounds, the step, and the labels after it.
        (3, lambda rows: KMeans(3, init=x[:3]).fit(x).partial_fit(rows)),
    ]:
        rows = Sliced(x)
        call(rows)
        assert rows.read == passes * 50


def test_single_rows_are_read_once_each(small_reads: None) -> None:
    rows = Sliced(normal(0, 50, 4))
    index = torch.tensor([3, 49, 3, 0, 3])
    assert torch.equal(Reader(rows, "x").take(index), rows.rows[index])
    assert rows.read == 3


OUT_OF_CORE = """
import resource, sys, threading
import numpy as np, torch, clustops

n, d, k = 300_000, 256, 3
x = np.memmap(sys.argv[1], dtype=np.float32, mode="w+", shape=(n, d))
for start in range(0, n, 50_000):
    x[start:start + 50_000] = np.random.default_rng(start).standard_normal((50_000, d), dtype=np.float32)
x = np.memmap(sys.argv[1], dtype=np.float32, mode="r", shape=(n, d))

class Slices:
    shape, dtype = x.shape, x.dtype
    def __getitem__(self, rows):
        return np.array(x[rows])

rows = {"map": x, "transposed map": x.reshape(d, n).T, "slices": Slices()}[sys.argv[2]]
clustops.kmeans(x[:1000], k, init=x[:k])
now = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData"))
limit = now * 1024 + 256 * 2**20
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
try:
    np.array(rows[:])
    print("the limit does not hold")
except MemoryError:
    pass
first = np.array(rows[:k])
result = clustops.kmeans(rows, k, init=first, max_iter=1)
clustops.kmeans(rows, k, init=first, max_iter=1, metric="cosine")
labels, _ = clustops.kmeans_assign(rows, result.centroids)
clustops.cluster_means(rows, labels, k)
model = clustops.KMeans(k, init=first, max_iter=1).fit(rows)
print(np.array_equal(np.asarray(result.labels), model.predict(rows)), model.partial_fit(rows).n_iter_)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["map", "transposed map", "slices"])
def test_rows_larger_than_the_memory_that_is_left(kind: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", OUT_OF_CORE, str(tmp_path / "x.bin"), kind]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert run.stdout.strip() == "True 2", run.stdout + run.stderr


# --- reading ahead


def test_the_next_chunk_is_read_while_one_is_used() -> None:
    reading = [threading.Event() for _ in range(4)]

    def read(rows: slice) -> Tensor:
        reading[rows.start].set()
        return torch.tensor(rows.start)

    for turn, part in enumerate(read_ahead(read, [slice(i, i + 1) for i in range(4)])):
        assert int(part) == turn
        assert turn == 3 or reading[turn + 1].wait(10)
        assert not any(event.is_set() for event in reading[turn + 2 :])


class Broken(Sliced):
    """Slices that cannot be read from a row on."""

    def __getitem__(self, index: slice) -> Any:
        if index.stop > 33:
            raise OSError("the disk is gone")
        return super().__getitem__(index)


def test_what_the_reader_raises_arrives_and_its_thread_ends(small_reads: None) -> None:
    with pytest.raises(OSError, match="the disk is gone"):
        kmeans(Broken(normal(0, 50, 4)), 3)
    assert not readers()


def test_the_thread_ends_with_a_caller_that_stops_or_fails(small_reads: None) -> None:
    def use(fail: bool) -> None:
        for _ in Source(Reader(Sliced(normal(0, 50, 4)), "x")).chunks():
            assert readers()
            if fail:
                raise KeyError
            break

    use(fail=False)
    assert not readers()
    with pytest.raises(KeyError):
        use(fail=True)
    assert not readers()


def test_no_thread_is_made_for_one_chunk() -> None:
    class Here(Sliced):
        def __getitem__(self, index: slice) -> Any:
            assert threading.current_thread() is threading.main_thread()
            return super().__getitem__(index)

    kmeans(Here(normal(0, 50, 4)), 3)


# --- progress


class Slow(Sliced):
    """Slices that take their time."""

    def __getitem__(self, index: slice) -> Any:
        time.sleep(0.03)
        return super().__getitem__(index)


def test_progress_shows_a_long_pass_and_only_that(
    small_reads: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kmeans_source, "_PATIENCE", 0.1)
    x = normal(0, 50, 4)
    options: dict[str, Any] = {"init": x[:3], "max_iter": 1, "tol": 0}
    kmeans(Slow(x), 3, **options)
    kmeans(Slow(x[:5]), 3, progress=True, **options)
    assert "chunks" not in capfd.readouterr().err
    kmeans(Slow(x), 3, progress=True, **options)
    assert "chunks" in capfd.readouterr().err


# --- bad input

X = normal(0, 10, 2)


@pytest.mark.parametrize(
    ("source", "error", "parts"),
    [
        (Sliced(X[0]), ValueError, ("[N, D] where it is read by slices", "[2]", "shape of its rows")),
        (Sliced(X[None]), ValueError, ("[N, D] where it is read by slices", "[1, 10, 2]", "as arrays")),
        (Sliced(X.long()), TypeError, ("x must be float32", "torch.int64", "to float32")),
        (Sliced(X[:, :0]), ValueError, ("at least one feature", "[10, 0]", "skip")),
        (Sliced(X, "f8"), ValueError, ("of torch.float64 in host memory at [0:10]", "torch.float32", "let")),
        (Sliced(X, "U1"), TypeError, ("x must be an array of real numbers", "<U1", "astype")),
        (Sliced(X / 0), ValueError, ("x must be finite", "NaN or inf", "remove or mask")),
    ],
)
def test_a_bad_source_is_named_with_its_cure(
    source: Any, error: type[Exception], parts: tuple[str, ...]
) -> None:
    for call in (
        lambda: kmeans(source, 2),
        lambda: kmeans_assign(source, torch.ones(2, 2)),
        lambda: cluster_means(source, torch.zeros(10, dtype=torch.int64), 1),
        lambda: kmeans_plus_plus(source, 2),
    ):
        with pytest.raises(error) as raised:
            call()
        assert_message(raised.value, *parts)


def test_slices_of_another_shape_are_refused() -> None:
    class Short(Sliced):
        def __getitem__(self, index: slice) -> Any:
            return super().__getitem__(index)[1:]

    with pytest.raises(ValueError, match="let its shape") as raised:
        kmeans(Short(X), 2)
    assert_message(raised.value, "x must be [10, 2]", "got [9, 2]")


# --- the estimator


def test_the_estimator_out_of_core_is_the_estimator_in_memory(
    monkeypatch: pytest.MonkeyPatch, small_reads: None
) -> None:
    x, weights = normal(0, 70, 3), torch.rand(70, generator=generator(1)).numpy()
    monkeypatch.setattr(estimator, "_ORDERED", 0)
    monkeypatch.setattr(estimator_input, "_SMALL", 0)
    for metric in ("l2", "cosine"):
        inside, outside = (KMeans(5, metric=metric) for _ in range(2))
        for rows, model in ((x.numpy(), inside), (Sliced(x), outside)):
            model.fit(rows, sample_weight=weights).partial_fit(rows, sample_weight=weights)
        for name in ("cluster_centers_", "labels_", "inertia_", "n_iter_"):
            assert_equal(getattr(outside, name), getattr(inside, name))
        assert isinstance(outside.labels_, np.ndarray)
        assert_equal(outside.predict(Sliced(x)), inside.predict(x.numpy()))
        assert_equal(outside.transform(Sliced(x)), inside.transform(x.numpy()))
        assert outside.score(Sliced(x), sample_weight=weights) == inside.score(x, sample_weight=weights)


def test_batches_by_slices_start_and_reseed_as_in_memory(
    monkeypatch: pytest.MonkeyPatch, small_reads: None
) -> None:
    monkeypatch.setattr(estimator_input, "_SMALL", 0)
    x = normal(0, 40, 3)
    for init in ("k-means++", "random", torch.cat([x[:2], torch.full((3, 3), 1e3)])):
        inside, outside = (KMeans(5, init=init) for _ in range(2))
        for batch in x.split(10):
            inside.partial_fit(batch.numpy())
            outside.partial_fit(Sliced(batch))
            assert_equal(outside.cluster_centers_, inside.cluster_centers_)


def test_integers_are_read_as_float64_by_the_estimator(
    monkeypatch: pytest.MonkeyPatch, small_reads: None
) -> None:
    monkeypatch.setattr(estimator_input, "_SMALL", 0)
    x = (10 * normal(0, 40, 3)).to(torch.int16)
    start = x[:3].numpy()
    found = KMeans(3, init=start).fit(Sliced(x))
    assert_equal(found.cluster_centers_, KMeans(3, init=start).fit(x.numpy()).cluster_centers_)
    assert found.cluster_centers_.dtype == np.float64


# --- on the way to a GPU


@pytest.mark.cuda
@pytest.mark.parametrize("form", ["tensor", "source"])
def test_chunks_on_a_gpu_hold_what_was_read(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kmeans_source, "_READ", 1 << 14)
    monkeypatch.setattr(kmeans_source, "_CHUNK", 1 << 14)
    x = normal(0, 5000, 32)
    source = Source(x if form == "tensor" else Reader(Sliced(x), "x"), device=torch.device("cuda"))
    busy = torch.randn(4096, 4096, device="cuda")
    for rows, chunk in source.chunks():
        # Work that is late: the buffers must not be overwritten before it ran.
        busy = (busy @ busy).tanh()
        x_there = chunk + 0 * busy[0, 0]
        assert torch.equal(x_there[0].cpu(), x[rows])


@pytest.mark.cuda
def test_rows_on_the_host_pass_a_gpu_in_two_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kmeans_source, "_CHUNK", 1 << 16)
    x = normal(0, 100_000, 64)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = kmeans(x, 10, device="cuda", init=x[:10], max_iter=2)
    assert torch.cuda.max_memory_allocated() - before < 16e6
    assert torch.equal(found.labels.cpu(), kmeans(x.cuda(), 10, init=x[:10].cuda(), max_iter=2).labels.cpu())


@pytest.mark.cuda
def test_rows_on_a_gpu_may_be_clustered_on_the_host() -> None:
    x = normal(0, 100_000, 64)
    there = x.cuda()
    for _ in range(4):
        torch.cuda._sleep(10_000_000)
        found = kmeans(there, 5, device="cpu", init=x[:5], max_iter=1)
        assert torch.equal(found.labels, kmeans(x, 5, init=x[:5], max_iter=1).labels)
