"""The specification of each op in plain PyTorch: same names and signatures as ``clustops``."""

from .contrastive import ccssl_loss, info_nce_loss, pseudo_labels, supcon_loss, weighted_contrastive_loss
from .kmeans import cluster_means, kmeans, kmeans_assign, kmeans_plus_plus
from .kmeans_repair import repair_empty_clusters
from .preprocess import pca_whiten
from .sampler import cluster_members
from .sinkhorn import (
    assign_from_potentials,
    sinkhorn,
    sinkhorn_matrix,
    sinkhorn_potentials,
    soft_cross_entropy,
    swapped_prediction_loss,
)

__all__ = [
    "assign_from_potentials",
    "ccssl_loss",
    "cluster_means",
    "cluster_members",
    "info_nce_loss",
    "kmeans",
    "kmeans_assign",
    "kmeans_plus_plus",
    "pca_whiten",
    "pseudo_labels",
    "repair_empty_clusters",
    "sinkhorn",
    "sinkhorn_matrix",
    "sinkhorn_potentials",
    "soft_cross_entropy",
    "supcon_loss",
    "swapped_prediction_loss",
    "weighted_contrastive_loss",
]
