"""SSL-Cleanse: is one cluster of the embeddings reached by a far smaller stamp than the others?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field

from cupel.inference import device_of
from cupel.inversion import Inverted, frozen
from cupel.inversion.clusterwise import ClusterSearch, invert_clusters
from cupel.protocols import Encoder
from cupel.scan.admission import named, some_rows
from cupel.scan.clusters import choose_clusters, cluster, merge_small, unit
from cupel.scan.judging import Judging
from cupel.scan.neural_cleanse import anomaly_index
from cupel.scan.passes import Passes
from cupel.scan.reference import Decision, against, check_reference
from cupel.seeds import Seed
from cupel.settings import Fraction, Positive, PositiveInt, settings
from cupel.types import Dataset, Need
from cupel.verdicts import Evidence, Reference, Verdict

__all__ = ["SSLCleanse"]

LEAST_CLUSTERS = 3
FEW_CLUSTERS = 5
CODE_CONSTANT = 0.6745
"""The authors' code multiplies the deviation by 1.4826/0.6745: its index is 0.6745 times the usual one."""


@settings
class SSLCleanse(Judging):
    """The smallest trigger towards each cluster of embeddings, and whether one is an outlier; label-free.

    Embeddings are clustered by k-means; for each cluster a mask m and a pattern Δ are searched that move images of the
    others into it: minimise mean(2 − 2 cos(f((1 − m) x + m Δ), r)) + λ mean(m). Score = 1 − the smallest size. Without
    references, the threshold lies `threshold` robust deviations below the median size of the same encoder's clusters.

    Args:
        num_clusters: K; None = chosen by the knee of the inertia, at most `max_clusters`.
        max_clusters: Largest K that is tried.
        least_members: Clusters with fewer members are merged into others.
        steps: Batches per cluster.
        batch_size: Images per cluster and batch.
        images: Clean images used at most.
        lr: Of Adam.
        success: Share of a batch that must arrive.
        cost, cost_factor, patience: λ: first value, step, and the successes in a row before each.
        toward: What stamped embeddings are pulled to: a random `member` of the cluster each, or its `centre`.
        threshold: Anomaly index above which a cluster counts as an outlier; without references it makes the encoder
            suspicious. With few clusters whose sizes differ widely the index says little.
        precision: Of the encoder's passes; bf16 is used where the hardware computes in it and the encoder's clean
            embeddings agree with float32.

    Budgets: `smoke`, `standard`, and `paper` (as published: 1000 epochs of about 30 batches).

    Source: Zheng et al., SSL-Cleanse, ECCV 2024, arXiv:2303.09079, and its code.
    Deviations: the usual constant 1.4826 and true medians in the index; mask sizes instead of mask times pattern;
    embeddings of length 1; images without replacement; the budgets `smoke` and `standard`, with a larger rate; with
    references, verdicts by the smallest size.
    """

    num_clusters: Annotated[int, Field(ge=2)] | None = None
    max_clusters: Annotated[int, Field(ge=3)] = 10
    least_members: PositiveInt = 10
    steps: PositiveInt = 40
    batch_size: Annotated[int, Field(ge=2)] = 32
    images: Annotated[int, Field(ge=32)] = 1000
    lr: Positive = 0.5
    success: Fraction = 0.99
    cost: Positive = 0.1
    cost_factor: Annotated[float, Field(gt=1)] = 1.5
    patience: PositiveInt = 5
    toward: Literal["member", "centre"] = "member"
    threshold: Positive = 2.0
    precision: Literal["bf16", "fp32"] = "bf16"
    method: ClassVar[str] = "ssl_cleanse"
    budgets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "smoke": {"batch_size": 16},
        "standard": {},
        "paper": {"max_clusters": 30, "steps": 30_000, "lr": 0.1, "precision": "fp32"},
    }
    tested: ClassVar[str] = (
        "one small universal stamp towards one cluster of the embeddings (mask-and-pattern inversion)"
    )
    needs: ClassVar[frozenset[Need]] = frozenset()
    revision: ClassVar[int] = 1

    def _limit(self) -> float:
        return self.threshold

    def scan(self, model: Encoder, clean: Dataset, seed: Seed, reference: Reference | None = None) -> Verdict:
        """Look for a cluster that is too easy to reach.

        Args:
            model: Encoder; its weights, flags and modes are as before afterwards.
            clean: Images of its input size. Labels are not read.
            seed: Choice of images, clusters, starts, batches.
            reference: Smallest sizes for clean encoders of the same recipe, found with the same settings.

        Returns:
            One `Evidence` per outlying cluster, else the smallest trigger alone. `inconclusive` with fewer than 64
            usable images, 3 clusters or 3 clusters that were reached, or where the sizes do not differ.

        Raises:
            CupelError: the model holds or gives NaN or infinite values.
            DataError: images of another size or scale; a reference of another scanner or budget.
        """
        check_reference(reference, self.name)
        if (said := self.unfit(model, clean)) is not None:
            return said
        device = device_of(model.module)
        rows = some_rows(clean, self.images, seed)
        images = clean.inputs[rows].to(device)
        with frozen(model.module):
            passes = Passes(model, images, self.precision)
            z = unit(passes.embed(images))
            wanted, bent = self.num_clusters, True
            if wanted is None:
                wanted, bent = choose_clusters(z, range(2, self.max_clusters + 1), seed.child("knee"))
            made = merge_small(z, cluster(z, wanted, seed.child("clusters")), self.least_members)
            count = len(made.centres)
            details = {"clusters": float(count), "images": float(len(images)), "knee": float(bent)}
            if count < LEAST_CLUSTERS:
                why = f"the embeddings fall into {count} clusters, {LEAST_CLUSTERS} are needed"
                return self.inconclusive(f"{why}; set num_clusters", device, details | passes.costs())
            search = ClusterSearch(
                self.steps, self.batch_size, self.lr, self.success, self.cost, self.cost_factor, self.patience,
                self.toward,
            )  # fmt: skip
            found = invert_clusters(
                passes, images, z, made.own, search, seed.child("invert"), "ssl_cleanse", named(model)
            )
        for k, members in enumerate(torch.bincount(made.own).tolist()):
            details |= {f"members_{k}": float(members)}
        note = "" if bent else f"; no number of clusters stands out, {wanted} were used"
        return self._verdict(found, details | passes.costs(), note, reference, device)

    def _verdict(
        self,
        found: Inverted,
        details: dict[str, float],
        note: str,
        reference: Reference | None,
        device: torch.device,
    ) -> Verdict:
        sizes = found.size.tolist()
        for k, (size, reach) in enumerate(zip(sizes, found.reach.tolist(), strict=True)):
            details |= {f"size_{k}": size, f"arrived_{k}": reach}
        reached = int(found.found.sum())
        if reached < LEAST_CLUSTERS:
            why = f"a stamp was found towards {reached} of {len(sizes)} clusters, {LEAST_CLUSTERS} are needed{note}"
            return self.inconclusive(why, device, details)
        anomaly = anomaly_index(sizes)
        details |= {"median": anomaly.median, "mad": anomaly.mad}
        details |= {f"index_{k}": one for k, one in enumerate(anomaly.each)}
        outliers = [k for k, one in enumerate(anomaly.each) if one > self.threshold]
        shown = sorted(outliers or [sizes.index(min(sizes))], key=lambda k: sizes[k])
        evidence = tuple(
            Evidence(
                found.mask[k].numpy(),
                found.pattern[k].numpy(),
                sizes[k],
                bool(found.found[k]),
                f"{self.name} cluster {k}",
            )
            for k in shown
        )
        if anomaly.worst is None or not anomaly.spread:
            why = f"most sizes are equal, which leaves nothing to compare with{note}"
            return self.inconclusive(why, device, details, evidence)
        index = anomaly.worst
        details |= {"index": index, "index_as_coded": index * CODE_CONSTANT}
        words = (
            f"smallest stamp covers {min(sizes):.3f} of the image (cluster {shown[0]}, median of {len(sizes)} clusters "
            f"{anomaly.median:.3f}), anomaly index {index:.2f}{note}"
        )
        if len(sizes) <= FEW_CLUSTERS:
            words += f"; with {len(sizes)} clusters the index is unreliable"
        said = against(min(sizes), reference, words)
        if isinstance(said, str):
            word: Literal["suspicious", "clean-by-test"] = "suspicious" if outliers else "clean-by-test"
            said = Decision(word, max(0.0, anomaly.median - self.threshold * anomaly.mad), f"{said}: {words}")
        return self.concluded(said, 1 - min(sizes), evidence, details, device)
