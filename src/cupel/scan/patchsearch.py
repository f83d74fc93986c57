"""PatchSearch: finds the poisoned images of a self-supervised training set, by the patches that move other images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from cupel.errors import DataError
from cupel.inference import device_of, features
from cupel.inversion import frozen
from cupel.progress import track
from cupel.protocols import Encoder
from cupel.records import Metric
from cupel.scan.budgeted import Budgeted
from cupel.scan.patch_classifier import PatchClassifier
from cupel.scan.patch_scores import Scorer, k_means
from cupel.seeds import Seed
from cupel.settings import Fraction, PositiveInt, settings
from cupel.types import Dataset, Need

__all__ = ["Found", "PatchSearch", "survivors"]

LEAST_IMAGES = 64


@dataclass(frozen=True, eq=False)
class Found:
    """What the search and the classifier say.

    Args:
        keep: bool `[n]`; False = taken for poisoned.
        score: float32 `[n]`: how many of the test images the patch of an image draws into its cluster, net; NaN = the
            image was not looked at.
        ranking: int64, rows that were scored, worst first.
        patches: uint8 `[k, 3, window, window]` of the k worst images; fewer or none where they are no triggers.
        logits: float32 `[n]`, what the classifier says of each image; larger = worse, −∞ where no trigger was found.
    """

    keep: Bool[Tensor, " n"]
    score: Float[Tensor, " n"]
    ranking: Int[Tensor, " scored"]
    patches: Tensor
    logits: Float[Tensor, " n"]

    def against(self, poisoned: Iterable[int], top: int = 20) -> dict[str, Metric]:
        """Measured against the rows that are poisoned.

        Args:
            poisoned: Rows.
            top: Length of the head of the ranking that is judged.

        Returns:
            `top_purity` = poisoned images among the `top` worst of the ranking, `filter_recall` = poisoned images that
            the filter drops, `filter_precision` = poisoned images among those it drops.
        """
        truth = torch.zeros(len(self.keep), dtype=torch.bool)
        truth[torch.as_tensor(list(poisoned), dtype=torch.int64)] = True
        head, dropped = self.ranking[:top], ~self.keep
        return {
            "top_purity": Metric.of([(int(truth[head].sum()), len(head))]),
            "filter_recall": Metric.of([(int((truth & dropped).sum()), int(truth.sum()))]),
            "filter_precision": Metric.of([(int((truth & dropped).sum()), int(dropped.sum()))]),
        }


@settings
class PatchSearch(Budgeted):
    """Clusters the training images, cuts out of each what its cluster hangs on, and pastes it on other images.

    A patch that draws images of all clusters into its own is a trigger. The images with the worst patches are found by
    a search that drops the harmless clusters round by round; a small classifier that learns to see the worst patches
    then goes through the whole set.

    Args:
        clusters: l of k-means on embeddings of length 1.
        window: Side of the patches as a share of the image's side.
        test_images: Images that patches are pasted on: those closest to the centres of clusters.
        per_cluster: s, images scored per surviving cluster and round.
        top: k, worst patches that the classifier learns to see.
        cam_side: Class activation maps are taken from the last block whose maps are at least so many pixels wide.
        least: Patches that draw less than this share of the test images into their cluster are no triggers; where
            there are no others every image is kept. The authors' code takes the k worst whatever they do (0).
        classifier: How it is trained.

    Budgets: `smoke` and `standard` for small images and sets, `paper` for ImageNet-100.

    Source: Tejankar et al., Defending Against Patch-based Backdoor Attacks on Self-Supervised Learning, CVPR 2023,
    arXiv:2304.01482, and its code.
    Deviations: `least`; every round drops at least one cluster, for a quarter of three, rounded down, is none, and the
    search would not end.
    """

    clusters: Annotated[int, Field(ge=2)] = 1000
    window: Annotated[float, Field(gt=0, le=1)] = 60 / 224
    test_images: PositiveInt = 1000
    per_cluster: PositiveInt = 2
    top: Annotated[int, Field(ge=2)] = 20
    cam_side: PositiveInt = 4
    least: Fraction = 0.2
    classifier: PatchClassifier = PatchClassifier()

    method: ClassVar[str] = "patchsearch"
    budgets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "smoke": {
            "clusters": 20, "window": 0.25, "test_images": 100, "top": 5,
            "classifier": PatchClassifier(steps=200, batch_size=32, ensemble=1),
        },
        "standard": {
            "clusters": 100, "window": 0.25, "test_images": 300, "top": 10,
            "classifier": PatchClassifier(steps=600, ensemble=3),
        },
        "paper": {"least": 0.0},
    }  # fmt: skip
    needs: ClassVar[frozenset[Need]] = frozenset({"train_set"})
    revision: ClassVar[int] = 1

    def keep(self, train: Dataset, encoder: Encoder, seed: Seed) -> Bool[Tensor, " row"]:
        """Which images to train on; see `search`."""
        return self.search(train, encoder, seed).keep

    def search(self, train: Dataset, encoder: Encoder, seed: Seed) -> Found:
        """Look for poisoned images.

        Args:
            train: Training images, poisoned ones included, of the encoder's input size. Labels are not read.
            encoder: Trained on them; left as it is.
            seed: Clusters, order, places of patches, classifier.

        Raises:
            DataError: fewer than 64 images, or fewer than clusters; all images the same; images of another size; the
                encoder gives NaN, the same embedding for all, or no maps of `cam_side` pixels.
        """
        n = len(train)
        if n < max(LEAST_IMAGES, 2 * self.top):
            what = f"{n} images, at least {max(LEAST_IMAGES, 2 * self.top)} are needed"
            raise DataError(train.name, what, "give the whole training set")
        if n < self.clusters:
            raise DataError(train.name, f"{n} images are fewer than {self.clusters} clusters", "lower `clusters`")
        if len(set(train.content())) == 1:
            raise DataError(train.name, "all images are the same", "there is nothing to search for")
        device = device_of(encoder.module)
        with frozen(encoder.module):
            z = normalize(features(encoder, train), dim=1)
            if float((z - z[0]).abs().max()) < 1e-6:
                raise DataError(train.name, "the encoder gives one embedding for all images", "it has collapsed")
            centres, own = k_means(z, self.clusters, seed.child("clusters"))
            tests = (z * centres[own]).sum(1).argsort(descending=True, stable=True)[: self.test_images]
            scorer = Scorer(self.window, self.cam_side, encoder, train, centres, own, tests.cpu(), seed.child("places"))
            score = self._rounds(scorer, own.cpu(), seed.child("rounds"))
        known = (~score.isnan()).nonzero().flatten()
        ranking = known[score[known].argsort(descending=True, stable=True)]
        top = ranking[: self.top]
        top = top[score[top] >= self.least * len(tests)]
        if not len(top):
            nothing = torch.empty(0, 3, scorer.side, scorer.side, dtype=torch.uint8)
            return Found(torch.ones(n, dtype=torch.bool), score, ranking, nothing, torch.full((n,), float("-inf")))
        patches = torch.cat([scorer.patch(int(i)) for i in top])
        # the worst tenth may be poisoned, and the least suspicious images validate the classifier
        pool_out = torch.cat([ranking[: max(self.top, n // 10)], ranking[-self.top :]])
        pool = torch.ones(n, dtype=torch.bool)
        pool[pool_out] = False
        logits = self.classifier.judge(
            train, patches, pool, top, ranking[-self.top :], seed.child("classifier"), device
        )
        return Found(logits <= 0, score, ranking, patches, logits)

    def _rounds(self, scorer: Scorer, own: Tensor, seed: Seed) -> Tensor:
        """Poison scores of the images that were looked at; NaN elsewhere."""
        score = torch.full((len(own),), float("nan"))
        unseen = {
            c: rows[torch.randperm(len(rows), generator=seed.child(c).torch())].tolist()
            for c in range(self.clusters)
            if len(rows := (own == c).nonzero().flatten())
        }
        worst = dict.fromkeys(unseen, float("-inf"))
        alive, counts = sorted(unseen), survivors(len(unseen))
        with track("patchsearch", len(counts)) as advance:
            for done, left in enumerate(counts, 1):
                for c in alive:
                    for row in unseen[c][: self.per_cluster]:
                        score[row] = scorer.score(row)
                        worst[c] = max(worst[c], float(score[row]))
                    unseen[c] = unseen[c][self.per_cluster :]
                alive = sorted(sorted(alive, key=lambda c: (-worst[c], c))[:left])
                advance(done, worst=max(worst.values()))
        return score


def survivors(clusters: int) -> list[int]:
    """How many clusters are left after each round: three quarters, rounded up, but at least one fewer; ends with 0.

    Example:
        >>> survivors(20)
        [15, 12, 9, 7, 6, 5, 4, 3, 2, 1, 0]
    """
    left = []
    while clusters:
        clusters = min(clusters - 1, -(-3 * clusters // 4))
        left.append(clusters)
    return left
