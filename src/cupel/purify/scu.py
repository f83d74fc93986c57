"""SSL-Cleanse's unlearning: stamped images are sent to where unstamped ones live."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from cupel.augment import SimCLRAugment
from cupel.errors import SettingsError
from cupel.folding import folded, inference_copy
from cupel.inference import features
from cupel.losses.pulling import EmbeddingScale, PullName, pull_distance, spread
from cupel.losses.regression import byol_loss
from cupel.optimizers import NonNegative
from cupel.pretrain.heads import mlp
from cupel.progress import say
from cupel.protocols import Batch, Encoder
from cupel.purify.adversaries import applied, boosted, patch_search
from cupel.purify.base import Job, OptimizerName
from cupel.purify.batch_norm import set_batch_norm
from cupel.purify.evidence import usable_evidence
from cupel.purify.unlabelled import UnlabelledPurifier, shown
from cupel.seeds import Seed
from cupel.settings import Fraction, Positive, PositiveInt, settings
from cupel.train import History

__all__ = ["SCU", "cluster_mates", "nearest_others"]


@settings
class SCU(UnlabelledPurifier):
    """SSL-Cleanse's cluster-based unlearning: L = α₁ · L_clean + α₄ · L_trig, with f₀ the encoder as given.

    L_trig = mean of 1 − cos( f(stamp(x)), f₀(x⁺) ), of standardised embeddings by default. Stamps are the triggers that
    a scanner inverted, varied as CBD varies them, and on a few images patches of random content. Without converged
    evidence there are only the latter, and a line says so: nothing is then unlearned.

    Args:
        clean_term: `anchor`: L_clean = mean of 1 − cos( f(view), f₀(view) ). `byol`: BYOL's loss of two views, with
            a fresh projector and predictor on f, and f₀ under a frozen copy of the projector as the target network.
        positive: x⁺: the image `own`, its nearest `neighbour` by the cosine under f₀, or a random member of its k-means
            `cluster`.
        clusters: k of `cluster`.
        pull: Distance of `anchor` and L_trig; the published one is `cosine`. See `cupel.losses.pulling`.
        alpha_clean, alpha_trigger: α₁, α₄ ≥ 0.
        patches: Share of a batch that bears patches of random content instead of triggers.
        window: Smallest and largest side of these patches, as shares of the image's side.
        boost, shift, dilation, evidence_ratio: How triggers are varied and chosen; see `cupel.purify.CBD`.
        augment: How views are made. Without crops by default: a zoomed stroke can look like a patch trigger.

    Raises:
        SettingsError: a range is upside down, or `augment` changes the size of images.

    Source: Zheng et al., SSL-Cleanse, ECCV 2024, arXiv:2303.09079.
    Deviations: the anchor instead of BYOL, whose projector encoders come without; x⁺ = x; boosted triggers; whitened
    cosines, which on uncentred embeddings see far more; SGD for 20 epochs at lr 0.05 (our choices). `preset("paper")`
    has BYOL, cluster mates, the plain cosine and the published steps.
    """

    clean_term: Literal["anchor", "byol"] = "anchor"
    positive: Literal["own", "neighbour", "cluster"] = "own"
    clusters: Annotated[int, Field(ge=2)] = 10
    pull: PullName = "whitened"
    alpha_clean: NonNegative = 1.0
    alpha_trigger: NonNegative = 1.0
    patches: Fraction = 0.1
    window: tuple[Fraction, Fraction] = (0.05, 0.2)
    boost: tuple[NonNegative, NonNegative] = (0.7, 3.0)
    shift: Annotated[int, Field(ge=0)] = 2
    dilation: Annotated[int, Field(ge=0)] = 1
    evidence_ratio: Annotated[float, Field(ge=1)] | None = 4.0
    augment: SimCLRAugment = SimCLRAugment(crop=False)

    epochs: PositiveInt = 20
    optimizer: OptimizerName = "sgd"
    lr: Positive = 0.05

    title: ClassVar[str] = "SSL-Cleanse (SCU)"
    revision: ClassVar[int] = 1
    budgets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "smoke": {"steps": 250, "batch_size": 48},
        "standard": {},
        "paper": {
            "clean_term": "byol", "positive": "cluster", "pull": "cosine", "patches": 0.0, "boost": (1.0, 1.0),
            "shift": 0, "dilation": 0, "augment": SimCLRAugment(), "batch_norm": "train", "optimizer": "adam",
            "lr": 3e-3, "batch_size": 1536, "epochs": 500,
        },
    }  # fmt: skip

    def __post_init__(self) -> None:
        for name in ("window", "boost"):
            low, high = getattr(self, name)
            if low > high:
                raise SettingsError(f"SCU.{name}", f"{low:g} is above {high:g}", "give the smaller number first")
        if self.augment.render_size is not None:
            raise SettingsError("SCU.augment.render_size", "views must have the size of the images", "leave it out")

    def tune(self, job: Job, given: Encoder) -> tuple[Encoder, History]:
        """Unlearn the triggers of the evidence."""
        triggers = usable_evidence(job.evidence, job.encoder.input_size, self.evidence_ratio)
        if triggers is None:
            say("  scu: no converged trigger was given; only random patches are unlearned")
        embeddings = features(given, job.clean, dtype=torch.float32)
        learner = SCULearner(self, job.encoder, given, embeddings, triggers, job.seed)
        return job.encoder, self.trained(learner, job.clean, job.seed, job.checkpoint)


class SCULearner:
    """The encoder under α₁ · L_clean + α₄ · L_trig.

    Args:
        settings: Of the method.
        encoder: Trained in place.
        given: The encoder as it was, frozen.
        clean: Its embeddings of the data set, by row.
        triggers: Masks and patterns; None = random patches alone.
        seed: Of clusters and heads.
    """

    def __init__(
        self,
        settings: SCU,
        encoder: Encoder,
        given: Encoder,
        clean: Float[Tensor, "n width"],
        triggers: tuple[Tensor, Tensor] | None,
        seed: Seed,
    ) -> None:
        self.settings, self.encoder, self.clean = settings, encoder, clean
        self.given, self.scale = inference_copy(given), EmbeddingScale.of(clean)
        self.triggers = None if triggers is None else (triggers[0].to(clean.device), triggers[1].to(clean.device))
        set_batch_norm(encoder.module, settings.batch_norm)
        self.network = encoder if settings.batch_norm == "train" else folded(encoder)
        parts = {"encoder": encoder.module}
        if settings.clean_term == "byol":
            width = encoder.width
            self.projector = mlp(width, 2 * width, width, seed=seed.child("projector")).to(clean.device)
            self.predictor = mlp(width, 2 * width, width, seed=seed.child("predictor")).to(clean.device)
            self.target = copy.deepcopy(self.projector).requires_grad_(False)
            parts |= {"projector": self.projector, "predictor": self.predictor, "target": self.target}
        self.state: nn.Module = nn.ModuleDict(parts)
        if settings.positive == "neighbour":
            self.neighbours = nearest_others(clean)
        if settings.positive == "cluster":
            self.assigned = k_means(clean, min(settings.clusters, len(clean)), seed.child("clusters"))

    def parameters(self) -> list[nn.Parameter]:
        """All that is trained."""
        return [one for one in self.state.parameters() if one.requires_grad]

    def loss(self, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Both terms, one pass for views and stamped images."""
        s, device = self.settings, batch.inputs.device
        stamped, target = self.stamped(batch), self.clean[self.positives(batch)]
        draw = batch.seed.child("views").torch(device)
        twice = batch.inputs.repeat(2, 1, 1, 1) if s.clean_term == "byol" else batch.inputs
        views = s.augment(twice, draw).contiguous(memory_format=torch.channels_last)
        f = self.network(torch.cat([views, stamped])).float()
        on_views, on_stamped = f[: len(views)], f[len(views) :]
        with torch.no_grad():
            wanted = self.given(views).float()
        if s.clean_term == "byol":
            p1, p2 = self.predictor(self.projector(on_views)).chunk(2)
            with torch.no_grad():
                z1, z2 = self.target(wanted).chunk(2)
            clean = byol_loss(p1, p2, z1, z2)
        else:
            clean = pull_distance(s.pull, on_views, wanted, self.scale)
        trigger = pull_distance(s.pull, on_stamped, target, self.scale)
        numbers = {"clean": clean.detach(), "trigger": trigger.detach(), "feature_std": spread(on_views.detach())}
        return s.alpha_clean * clean + s.alpha_trigger * trigger, numbers

    def positives(self, batch: Batch) -> Int[Tensor, " n"]:
        """Rows of x⁺."""
        rows = batch.rows.to(self.clean.device)
        match self.settings.positive:
            case "own":
                return rows
            case "neighbour":
                return self.neighbours[rows]
            case "cluster":
                return cluster_mates(rows, self.assigned, batch.seed.child("mates").torch(self.clean.device))

    def stamped(self, batch: Batch) -> Float[Tensor, "n 3 height width"]:
        """The images of the batch with a trigger or a random patch, in [0, 1]."""
        s, x = self.settings, shown(batch.inputs)
        generator = batch.seed.child("stamps").torch(x.device)
        at = 0 if self.triggers is None else round((1 - s.patches) * len(x))
        done, rest = x[:at], x[at:]
        if self.triggers is not None and at:
            masks, patterns = boosted(*self.triggers, at, generator, boost=s.boost, shift=s.shift, dilation=s.dilation)
            done = torch.lerp(done, patterns, masks).clamp(0, 1)
        if len(rest):
            search = patch_search(rest, s.window, 1.0, None, generator)
            rest = applied(rest, search, search.start)
        return torch.cat([done, rest]).contiguous(memory_format=torch.channels_last)

    def after_step(self) -> None:
        """Nothing."""


def nearest_others(embeddings: Float[Tensor, "n width"], block: int = 1024) -> Int[Tensor, " n"]:
    """For each row the other row with the largest cosine.

    Example:
        >>> nearest_others(torch.tensor([[1.0, 0.0], [0.0, 1.0], [9.0, 1.0]])).tolist()
        [2, 2, 0]
    """
    u, found = F.normalize(embeddings, dim=1), []
    for rows in torch.split(torch.arange(len(u), device=u.device), block):
        similarity = u[rows] @ u.T
        similarity[torch.arange(len(rows), device=u.device), rows] = -torch.inf
        found.append(similarity.argmax(dim=1))
    return torch.cat(found)


def cluster_mates(rows: Int[Tensor, " b"], assigned: Int[Tensor, " n"], draw: torch.Generator) -> Int[Tensor, " b"]:
    """For each row a uniformly drawn row of the same cluster; it may be the row itself.

    Args:
        rows: Rows of the data set.
        assigned: Cluster of every row.
        draw: On their device.
    """
    order = assigned.argsort(stable=True)
    sizes = torch.bincount(assigned)
    first = sizes.cumsum(0) - sizes
    own = assigned[rows]
    u = torch.rand(len(rows), generator=draw, device=rows.device)
    at = torch.minimum((u * sizes[own]).long(), sizes[own] - 1)
    return order[first[own] + at]


def k_means(embeddings: Float[Tensor, "n width"], clusters: int, seed: Seed) -> Int[Tensor, " n"]:
    """Cluster of every embedding, by scikit-learn's k-means on rows of length 1."""
    from sklearn.cluster import KMeans  # a second, which other methods need not wait

    unit = F.normalize(embeddings, dim=1).cpu().numpy()
    found = KMeans(clusters, n_init=10, random_state=seed.value % 2**32).fit_predict(unit)
    return torch.as_tensor(found, dtype=torch.int64, device=embeddings.device)
