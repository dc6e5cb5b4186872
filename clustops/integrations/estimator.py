"""k-means as a scikit-learn estimator. It needs no scikit-learn."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import arrays
from ..checks import check_choice, check_count, reject
from ..kmeans import kmeans
from ..kmeans_source import Reader
from ..reference.philox import normal
from . import estimator_input as given
from . import estimator_minibatch as minibatch

_ORDERED = 1 << 24  # up to so many numbers are put in order before a fit
_ORDER = 0x6B6D6F72646572  # stream of the direction along which rows are put in order


class KMeans:
    """k-means clustering with the methods, attributes and conventions of scikit-learn's estimators.

    ``fit`` is ``clustops.kmeans``; ``partial_fit`` is mini-batch k-means, in which a centre is the weighted
    mean of all rows that it was ever given.

    Where ``fit`` draws its start from an ``X`` of up to 2^24 numbers, it first puts the rows in an order of
    its own: the result does not depend on the order they came in, and, for ``init="k-means++"``, a row of
    weight 2 is two rows wherever they stand.

    Args:
        n_clusters: number of clusters K.
        init: ``"k-means++"``, ``"random"`` or centres ``[K, D]``.
        n_init: restarts; ``"auto"``: 10 for ``"random"``, otherwise 1.
        max_iter: iterations of ``fit`` at most.
        tol: ``fit`` stops when the squared shifts of the centres sum to at most this times the mean variance
            of the features.
        seed: of all random draws.
        metric: ``"l2"`` or ``"cosine"`` (rows and centres are normalised).
        empty, precision: as in ``clustops.kmeans``.
        device: where to compute; default: where ``X`` lies. Rows elsewhere are streamed to it in chunks.

    Attributes:
        cluster_centers_: ``[K, D]``, fp32, or fp64 for fp64 and integer input; the kind of array fitted.
        labels_: ``[N]`` int64, of the rows last fitted; equal to ``predict`` of them.
        inertia_: ``sum_n w_n ||x_n - c_label(n)||^2`` of the rows last fitted.
        n_iter_: iterations of ``fit``, plus one for each batch of ``partial_fit``.
        n_features_in_: D.
        feature_names_in_: names of the columns, where a data frame was fitted.

    >>> X = [[0.0, 0.0], [0.0, 1.0], [9.0, 9.0], [9.0, 8.0]]
    >>> model = KMeans(2).fit(X)
    >>> model.cluster_centers_[model.labels_], model.inertia_
    (array([[0. , 0.5],
           [0. , 0.5],
           [9. , 8.5],
           [9. , 8.5]]), 1.0)
    >>> model.predict([[8.0, 8.0]]) == model.labels_[2]
    array([ True])

    Source: Lloyd 1982; Sculley, "Web-scale k-means clustering", WWW 2010 (``partial_fit``).
    """

    cluster_centers_: Any
    labels_: Any
    inertia_: float
    n_iter_: int
    n_features_in_: int
    feature_names_in_: Any

    def __init__(
        self,
        n_clusters: int = 8,
        *,
        init: Any = "k-means++",
        n_init: int | str = "auto",
        max_iter: int = 300,
        tol: float = 1e-4,
        seed: int = 0,
        metric: str = "l2",
        empty: str = "split",
        precision: str | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.n_clusters = n_clusters
        self.init = init
        self.n_init = n_init
        self.max_iter = max_iter
        self.tol = tol
        self.seed = seed
        self.metric = metric
        self.empty = empty
        self.precision = precision
        self.device = device

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> KMeans:
        """This estimator with centres for ``X``.

        Args:
            X: ``[N, D]`` with ``N >= n_clusters``: a tensor, an array, a data frame, a list of rows, or what
                ``clustops.kmeans`` reads by slices. Integers count as fp64.
            y: ignored.
            sample_weight: ``[N]``, at least 0.

        Raises:
            TypeError, ValueError: a parameter or an argument is not as documented.

        Cost, memory: of ``clustops.kmeans``.
        """
        rows, weights = self._input(X, sample_weight, fitting=True)
        self._check_enough(rows, "or pass more rows")
        if isinstance(self.init, str) and isinstance(rows, Tensor) and rows.numel() <= _ORDERED:
            order = _canonical_order(rows)
            ordered = None if weights is None else weights[order]
            found = self._kmeans(rows[order], ordered, max_iter=self.max_iter, empty=self.empty)
            labels = torch.empty_like(found.labels).scatter_(0, order.to(found.labels.device), found.labels)
        else:
            found = self._kmeans(rows, weights, max_iter=self.max_iter, empty=self.empty)
            labels = found.labels
        self._centres = found.centroids.double()
        self._mass = minibatch.mass_of(labels, weights, self.n_clusters)
        self._keep(X, found.centroids, labels, float(found.inertia), int(found.n_iter))
        return self

    def partial_fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> KMeans:
        """This estimator, having learnt from one more batch.

        The first batch chooses centres by ``init``. Then each batch is assigned to the nearest centres
        ``c_k`` and, with ``m_k`` the mean and ``b_k`` the total weight of its rows in cluster k::

            v_k <- v_k + b_k;    c_k <- c_k + (m_k - c_k) b_k / v_k

        in fp64 (``metric="cosine"`` then normalises). A centre that no row was ever given moves to the row of
        the batch that is farthest from all centres, while there is one at a distance. After ``fit`` a centre
        starts with the weight of its cluster.

        Args:
            X: ``[N, D]``; the first batch has ``N >= n_clusters``.
            y: ignored.
            sample_weight: ``[N]``, at least 0.

        Raises:
            TypeError, ValueError: a parameter or an argument is not as documented.

        Cost: two assignments of the batch, which is read three times. Memory beside the batch: O(N + K D)
        and a few chunks.
        """
        first = not hasattr(self, "_centres")
        rows, weights = self._input(X, sample_weight, fitting=first)
        if first:
            self._check_enough(rows, "pass a larger first batch, or call fit first")
            self._centres = self._kmeans(rows, weights, max_iter=0, empty="keep").centroids.double()
            self._mass = self._centres.new_zeros(self.n_clusters)
            self.n_iter_ = 0
        elif self.n_clusters != self._centres.shape[0]:
            got = f"{self.n_clusters} after {self._centres.shape[0]} before"
            reject("n_clusters", "the same in all batches", got, "call fit, or start from a new estimator")
        self._centres, self._mass = minibatch.learn(
            rows,
            weights,
            self._centres.to(self._device(rows)),
            self._mass.to(self._device(rows)),
            metric=self.metric,
            precision=self.precision,
        )
        centres = self._centres.to(torch.float64 if rows.dtype == torch.float64 else torch.float32)
        labels, distances = self._nearest(rows, centres, 1)
        inertia = float(_weighted(distances[:, 0], weights).sum())
        self._keep(X, centres, labels[:, 0], inertia, self.n_iter_ + 1)
        return self

    def fit_predict(self, X: Any, y: Any = None, sample_weight: Any = None) -> Any:
        """``labels_`` of ``fit``: ``[N]`` int64."""
        return self.fit(X, sample_weight=sample_weight).labels_

    def fit_transform(self, X: Any, y: Any = None, sample_weight: Any = None) -> Any:
        """Distances of the rows of ``X`` to the centres of ``fit``: ``[N, K]``."""
        return self.fit(X, sample_weight=sample_weight).transform(X)

    def predict(self, X: Any) -> Any:
        """Index of the nearest centre of each row of ``X``, ties to the lowest: ``[N]`` int64."""
        rows, centres = self._fitted(X)
        labels, _ = self._nearest(rows, centres, 1)
        return given.kind_of(X)(labels[:, 0])

    def transform(self, X: Any) -> Any:
        """Distance ``||x_n - c_k||`` of each row to each centre: ``[N, K]`` (of unit vectors for cosine)."""
        rows, centres = self._fitted(X)
        order, distances = self._nearest(rows, centres, centres.shape[0])
        return given.kind_of(X)(torch.empty_like(distances).scatter_(1, order, distances.sqrt()))

    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:
        """``-sum_n w_n min_k ||x_n - c_k||^2``: the higher, the closer the rows are to the centres."""
        rows, centres = self._fitted(X)
        weights = given.weights_of(sample_weight, rows)
        _, distances = self._nearest(rows, centres, 1)
        return -float(_weighted(distances[:, 0], weights).sum())

    def get_feature_names_out(self, input_features: Any = None) -> Any:
        """Names of the columns of ``transform``: ``kmeans0``, ``kmeans1``, ..."""
        self._check_fitted()
        return np.asarray([f"kmeans{k}" for k in range(len(self.cluster_centers_))], dtype=object)

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The constructor's arguments by name."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def set_params(self, **params: Any) -> KMeans:
        """This estimator with other constructor's arguments; what was fitted stays."""
        known = self.get_params()
        for name, value in params.items():
            if name not in known:
                reject("params", f"among {', '.join(known)}", name, "see the names in get_params()")
            setattr(self, name, value)
        return self

    def __repr__(self) -> str:
        defaults = inspect.signature(type(self)).parameters
        changed = (
            f"{name}={value!r}"
            for name, value in self.get_params().items()
            if value is not defaults[name].default
        )
        return f"{type(self).__name__}({', '.join(changed)})"

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "cluster_centers_")

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import InputTags, Tags, TargetTags, TransformerTags

        return Tags(
            estimator_type="clusterer",
            target_tags=TargetTags(required=False),
            transformer_tags=TransformerTags(preserves_dtype=["float64", "float32"]),
            input_tags=InputTags(),
        )

    def _input(self, X: Any, sample_weight: Any, fitting: bool) -> tuple[Tensor | Reader, Tensor | None]:
        check_count(self.n_clusters, "n_clusters", 1, "ask for one cluster or more")
        names = given.names_of(X)
        if not fitting:
            given.check_names(names, getattr(self, "feature_names_in_", None))
        rows = given.rows_of(X, type(self).__name__, None if fitting else self.n_features_in_)
        weights = given.weights_of(sample_weight, rows)
        if fitting:
            self.n_features_in_ = rows.shape[1]
            vars(self).pop("feature_names_in_", None)
            if names is not None:
                self.feature_names_in_ = names
        return rows, weights

    def _check_enough(self, rows: Tensor | Reader, cure: str) -> None:
        if rows.shape[0] < self.n_clusters:
            got = f"n_clusters={self.n_clusters}"
            reject("n_clusters", f"at most n_samples={rows.shape[0]}", got, f"lower it, {cure}")

    def _kmeans(self, rows: Tensor | Reader, weights: Tensor | None, *, max_iter: int, empty: str) -> Any:
        named, n_init = isinstance(self.init, str), self.n_init
        if isinstance(n_init, str):
            check_choice(n_init, "n_init", ("auto",))
            n_init = 10 if named and self.init == "random" else 1
        return kmeans(
            rows,
            self.n_clusters,
            weights=weights,
            metric=self.metric,
            init=self.init if named else given.as_numbers(self.init, "init").to(rows.device),
            n_init=n_init,
            max_iter=max_iter,
            tol=self.tol,
            empty=empty,
            precision=self.precision,
            seed=self.seed,
            device=self.device,
        )

    def _nearest(self, rows: Tensor | Reader, centres: Tensor, top: int) -> tuple[Tensor, Tensor]:
        """Labels and squared distances ``[N, top]`` of the nearest centres."""
        centres = centres.to(self._device(rows))
        return minibatch.nearest(rows, centres, top, metric=self.metric, precision=self.precision)

    def _device(self, rows: Tensor | Reader) -> torch.device:
        return rows.device if self.device is None else torch.device(self.device)

    def _keep(self, X: Any, centres: Tensor, labels: Tensor, inertia: float, n_iter: int) -> None:
        kind = given.kind_of(X)
        self.cluster_centers_, self.labels_ = kind(centres), kind(labels)
        self.inertia_, self.n_iter_ = inertia, n_iter

    def _fitted(self, X: Any) -> tuple[Tensor | Reader, Tensor]:
        self._check_fitted()
        given.check_names(given.names_of(X), getattr(self, "feature_names_in_", None))
        rows = given.rows_of(X, type(self).__name__, self.n_features_in_)
        return rows, arrays.to_tensor(self.cluster_centers_, "cluster_centers_")

    def _check_fitted(self) -> None:
        if not hasattr(self, "cluster_centers_"):
            raise given.not_fitted()(
                f"This {type(self).__name__} has no centres yet; call fit or partial_fit first"
            )


def _canonical_order(rows: Tensor) -> Tensor:
    """``[N]``: the rows by their place along a fixed direction. Equal rows become neighbours."""
    direction = normal(0, _ORDER, torch.arange(rows.shape[1])).to(rows.device)
    return (rows.double() * direction).sum(1).argsort(stable=True)


def _weighted(values: Tensor, weights: Tensor | None) -> Tensor:
    return values.double() if weights is None else values.double() * weights.to(values.device)
