"""Downstream classifiers.

`fit(encoder, train, seed)` gives a classifier for images. Probes that leave the encoder as it is have a second door:
`fit_features(features, labels, num_classes, seed, watch)` gives the head alone, so that embeddings are computed once
and shared by the head seeds and by the clean and the triggered test set. Heads take raw embeddings and scale them
inside; `watch` is called with the head, in eval mode, after every epoch (once by heads that have no epochs).
"""

from __future__ import annotations

from cupel.inference import FrozenProbe
from cupel.metrics import check_labels, check_target
from cupel.probe.finetune import FineTune
from cupel.probe.knn import Knn
from cupel.probe.linear import Linear
from cupel.probe.linear_std import LinearStd
from cupel.probe.mlp2 import Mlp2
from cupel.settings import registry

__all__ = ["PROBES", "FineTune", "FrozenProbe", "Knn", "Linear", "LinearStd", "Mlp2", "check_labels", "check_target"]

PROBES = registry("probes", {"finetune": FineTune, "knn": Knn, "linear": Linear, "linear_std": LinearStd, "mlp2": Mlp2})
