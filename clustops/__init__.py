"""Ops for cluster-based self- and semi-supervised learning, for any PyTorch trainer.

k-means that never returns an empty cluster, Sinkhorn assignment and the swapped-prediction loss, the
class-aware contrastive loss, and balanced sampling over pseudo-labels. ``clustops.reference`` holds the plain
PyTorch twin of each.
"""

from . import metrics, plots, reference
from .checks import ClustopsWarning
from .contrastive import ccssl_loss, info_nce_loss, pseudo_labels, supcon_loss
from .contrastive_modules import CCSSLLoss, InfoNCELoss, SupConLoss
from .contrastive_weighted import weighted_contrastive_loss
from .integrations.estimator import KMeans
from .kmeans import (
    KMeansProgress,
    KMeansResult,
    cluster_means,
    kmeans,
    kmeans_assign,
    kmeans_plus_plus,
    repair_empty_clusters,
)
from .preprocess import pca_whiten
from .sampler import (
    InverseClusterSizeSampler,
    MPerClusterBatchSampler,
    balanced_quota,
    cluster_members,
    cluster_weights,
)
from .sinkhorn import (
    FeatureQueue,
    assign_from_potentials,
    sinkhorn,
    sinkhorn_matrix,
    sinkhorn_potentials,
    soft_cross_entropy,
    swapped_prediction_loss,
)

__version__ = "0.1.0"

__all__ = [
    "CCSSLLoss",
    "ClustopsWarning",
    "FeatureQueue",
    "InfoNCELoss",
    "InverseClusterSizeSampler",
    "KMeans",
    "KMeansProgress",
    "KMeansResult",
    "MPerClusterBatchSampler",
    "SupConLoss",
    "assign_from_potentials",
    "balanced_quota",
    "ccssl_loss",
    "cluster_means",
    "cluster_members",
    "cluster_weights",
    "info_nce_loss",
    "kmeans",
    "kmeans_assign",
    "kmeans_plus_plus",
    "metrics",
    "pca_whiten",
    "plots",
    "pseudo_labels",
    "reference",
    "repair_empty_clusters",
    "sinkhorn",
    "sinkhorn_matrix",
    "sinkhorn_potentials",
    "soft_cross_entropy",
    "supcon_loss",
    "swapped_prediction_loss",
    "weighted_contrastive_loss",
]
