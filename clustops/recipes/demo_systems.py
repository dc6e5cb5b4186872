"""The rows of the demo: which systems run, and which control belongs beside which."""

from __future__ import annotations

from . import ccssl, daino, deepcluster, suave, supervised
from .demo import Job, System

_raw, _weak, _strong, _untrained = (
    (supervised.train, supervised.Config(method=method)) for method in ("raw", "weak", "strong", "untrained")
)
_fixmatch, _two_views, _ccssl = (
    (ccssl.train, ccssl.Config(method=method)) for method in ("fixmatch", "fixmatch_two_views", "ccssl")
)
_swav, _suave = ((suave.train, suave.Config(stage=stage)) for stage in ("pretrain", "full"))
_dino, _daino = ((daino.train, daino.Config(stage=stage)) for stage in ("pretrain", "full"))
_deepcluster, _warm, _released = (
    (deepcluster.train, config)
    for config in (
        deepcluster.Config(),
        deepcluster.Config(n_clusters=100, init="warm"),
        deepcluster.Config(published_indices=True),
    )
)

# In the order of the table; a system stands beside its controls. The numbers are CPU seconds on digits.
JOBS: tuple[Job, ...] = (
    (System("Raw pixels + probe", "labels", "control: no network", *_raw, 0.2),),
    (System("Supervised, weak", "labels", "control: weak augmentation", *_weak, 1.4),),
    (System("Supervised, strong", "labels", "control: strong augmentation", *_strong, 1.5),),
    (System("FixMatch", "fixmatch", "pseudo-labels on one strong view", *_fixmatch, 7.5),),
    (System("FixMatch, two views", "fixmatch", "control: CCSSL's views alone", *_two_views, 11.0),),
    (System("FixMatch + CCSSL", "fixmatch", "contrastive loss on two strong views", *_ccssl, 12.5),),
    (
        System("SwAV + probe", "suave", "control: what Suave starts from", *_swav, 8.0),
        System("Suave", "suave", "from SwAV, whose seconds come on top", *_suave, 8.0),
    ),
    (
        System("DINO + probe", "daino", "control: what Daino starts from", *_dino, 10.0),
        System("Daino", "daino", "from DINO, whose seconds come on top", *_daino, 9.0),
    ),
    (System("Untrained net + probe", "deepcluster", "control: before training", *_untrained, 0.2),),
    (System("DeepCluster + probe", "deepcluster", "labels for the probe alone", *_deepcluster, 10.0),),
    (
        System(
            "DeepCluster, 100 warm", "deepcluster", "ablation: ten clusters a class, kept on", *_warm, 11.0
        ),
    ),
    (
        System(
            "DeepCluster, released", "deepcluster", "ablation: draws by the mixed-up index", *_released, 10.0
        ),
    ),
)
