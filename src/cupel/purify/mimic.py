"""MIMIC: a student from scratch learns what the encoder says, stage by stage as much as it knows of the input."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from cupel.augment import SimCLRAugment
from cupel.encoders.blocks import block_outputs, blocks_of
from cupel.errors import DataError, SettingsError
from cupel.losses.alignment import negative_cosine
from cupel.losses.contrastive import nt_xent
from cupel.losses.pulling import spread
from cupel.optimizers import NonNegative
from cupel.pretrain.heads import mlp
from cupel.protocols import Batch, Encoder
from cupel.purify.base import Job, OptimizerName
from cupel.purify.batch_norm import BatchNorm, set_batch_norm
from cupel.purify.bcu import redraw
from cupel.purify.mine import mutual_information
from cupel.purify.unlabelled import UnlabelledPurifier, fresh_copy, shown
from cupel.seeds import Seed
from cupel.settings import Fraction, Positive, PositiveInt, settings
from cupel.train import History
from cupel.types import Dataset

__all__ = ["MIMIC", "attention", "attention_distance", "stage_weights"]

_POOLED = 4  # side of the image that the mutual information is taken with
_ROWS = 2048  # images for it, at most


@settings
class MIMIC(UnlabelledPurifier):
    """Distillation into a student that starts from scratch, with attention maps weighted by mutual information.

    L = contrastive · NT-Xent(g(f(view₁)), g(f(view₂))) + clone · (−cos( f(x), f₀(x) )) + Σ_l w_l · AT_l

    with w_l = `attention_base` + `attention_shared` · MI_l / Σ MI over the residual stages l, AT_l = mean squared
    difference of the attention maps, MI_l between the input and what stage l makes of it.

    Args:
        start: The student begins with fresh weights (`random`), or with each entry of the given encoder's drawn anew
            with probability `rate` (`partial`).
        rate: Of `partial`.
        informed_by: Whose stages the mutual information is taken of: the given encoder's (`teacher`), as the paper
            says, or the fresh `student`'s, as its code does.
        information_steps: Training steps of each critic; 0 = equal weights.
        attention_base, attention_shared: See above.
        contrastive, clone: Weights of the terms.
        temperature: τ of NT-Xent.
        projection: Width of the projector's output.
        augment: How views are made.

    Raises:
        SettingsError: `augment` changes the size of images.

    Source: Han et al., Mutual Information Guided Backdoor Mitigation for Pre-trained Encoders, IEEE TIFS 2025,
    arXiv:2406.03508, and its code.
    Deviations: mutual information with the image averaged to 4 × 4 pixels, of stages averaged over space, on held-out
    pairs; a rate of 10⁻³, the code's own default, instead of the 10⁻² of its instructions.
    """

    start: Literal["random", "partial"] = "random"
    rate: Fraction = 0.5
    informed_by: Literal["teacher", "student"] = "teacher"
    information_steps: int = 400
    attention_base: NonNegative = 1000.0
    attention_shared: NonNegative = 10000.0
    contrastive: NonNegative = 1.0
    clone: NonNegative = 1.0
    temperature: Positive = 0.5
    projection: PositiveInt = 128
    augment: SimCLRAugment = SimCLRAugment()
    batch_norm: BatchNorm = "train"

    epochs: PositiveInt = 300
    optimizer: OptimizerName = "adam"
    lr: Positive = 1e-3
    weight_decay: NonNegative = 1e-6

    title: ClassVar[str] = "MIMIC"
    revision: ClassVar[int] = 1
    budgets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "smoke": {"steps": 300, "batch_size": 64, "lr": 3e-3, "information_steps": 100},
        "standard": {},
        "paper": {"epochs": 1000, "lr": 1e-2, "schedule": "constant"},
    }

    def __post_init__(self) -> None:
        if self.information_steps < 0:
            raise SettingsError("MIMIC.information_steps", f"{self.information_steps} is below 0", "make it 0 or more")
        if self.augment.render_size is not None:
            raise SettingsError("MIMIC.augment.render_size", "views must have the size of the images", "leave it out")

    def tune(self, job: Job, given: Encoder) -> tuple[Encoder, History]:
        """Train a student in the place of the encoder."""
        clean, seed = job.clean, job.seed
        if self.start == "random":
            student = fresh_copy(job.encoder, seed.child("student"))
        else:
            student = job.encoder
            redraw(student, [self.rate], seed.child("student"))
        told = given if self.informed_by == "teacher" else student
        weights = stage_weights(self.information(told, clean, seed.child("information")),
                                self.attention_base, self.attention_shared)  # fmt: skip
        learner = MIMICLearner(self, student, given, weights, seed.child("projector"))
        return student, self.trained(learner, clean, seed, job.checkpoint)

    def information(self, encoder: Encoder, clean: Dataset, seed: Seed) -> list[float]:
        """Mutual information between the input and each stage, in nats; all 0 without `information_steps`.

        Raises:
            DataError: the encoder has no stages with feature maps.
        """
        device = next(encoder.module.parameters()).device
        raw = clean.inputs[torch.arange(min(len(clean), _ROWS))]
        pooled: list[list[Tensor]] = []
        images = []
        encoder.module.eval()
        with torch.no_grad():
            for block in torch.split(raw, 256):
                x = shown(block.to(device))
                with stage_maps(encoder.module) as seen:
                    encoder(x)
                pooled.append([one.mean(dim=(2, 3)) for one in maps_of(seen)])
                images.append(F.adaptive_avg_pool2d(x, _POOLED).flatten(1))
        stages = [torch.cat(one) for one in zip(*pooled, strict=True)]
        if not stages:
            raise DataError("encoder", "has no residual stage with feature maps", "use another purifier")
        if self.information_steps == 0 or len(raw) < 4:
            return [0.0] * len(stages)
        image = torch.cat(images)
        return [
            mutual_information(image, stage, seed.child(i), steps=self.information_steps)
            for i, stage in enumerate(stages)
        ]


class MIMICLearner:
    """Student and projector.

    Args:
        settings: Of the method.
        student: Trained in place.
        given: The encoder as it was, frozen.
        weights: w_l, one per stage.
        seed: Of the projector.
    """

    def __init__(self, settings: MIMIC, student: Encoder, given: Encoder, weights: Sequence[float], seed: Seed) -> None:
        self.settings, self.student, self.given, self.weights = settings, student, given, list(weights)
        width, device = student.width, next(student.module.parameters()).device
        self.projector = mlp(width, width, settings.projection, seed=seed, norm=False).to(device)
        set_batch_norm(student.module, settings.batch_norm)
        self.state: nn.Module = nn.ModuleDict({"student": student.module, "projector": self.projector})

    def parameters(self) -> list[nn.Parameter]:
        """All that is trained."""
        return [one for one in self.state.parameters() if one.requires_grad]

    def loss(self, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The three terms; the student sees views and plain images in passes of their own."""
        s, x = self.settings, shown(batch.inputs)
        views = s.augment(batch.inputs.repeat(2, 1, 1, 1), batch.seed.child("views").torch(x.device))
        z1, z2 = self.projector(self.student(views.contiguous(memory_format=torch.channels_last)).float()).chunk(2)
        contrastive = nt_xent(z1, z2, s.temperature)
        with stage_maps(self.student.module) as own:
            h = self.student(x).float()
        with torch.no_grad(), stage_maps(self.given.module) as theirs:
            target = self.given(x).float()
        clone = negative_cosine(h, target)
        terms = [
            w * attention_distance(a, b) for w, a, b in zip(self.weights, maps_of(own), maps_of(theirs), strict=True)
        ]
        told = torch.stack(terms).sum()
        numbers = {"contrastive": contrastive, "cosine": -clone, "attention": told, "feature_std": spread(h)}
        return s.contrastive * contrastive + s.clone * clone + told, {k: v.detach() for k, v in numbers.items()}

    def after_step(self) -> None:
        """Nothing."""


def stage_weights(information: Sequence[float], base: float = 1000.0, shared: float = 10000.0) -> list[float]:
    """w_l = base + shared · MI_l / Σ MI; estimates below 0 count as 0, and equal shares where all are 0.

    Example:
        >>> stage_weights([0.5, 1.5, -0.2])
        [3500.0, 8500.0, 1000.0]
    """
    known = [max(0.0, one) for one in information]
    total = sum(known)
    shares = [one / total for one in known] if total > 0 else [1 / len(known)] * len(known)
    return [base + shared * share for share in shares]


def attention(maps: Float[Tensor, "n c h w"]) -> Float[Tensor, "n hw"]:
    """Where a stage looks: Σ_c F_c², as a vector of length 1.

    Source: Zagoruyko & Komodakis, Paying more attention to attention, ICLR 2017, arXiv:1612.03928, eq. 1.
    """
    return F.normalize(maps.float().square().sum(dim=1).flatten(1), dim=1)


def attention_distance(a: Float[Tensor, "n c h w"], b: Float[Tensor, "n d h w"]) -> Float[Tensor, ""]:
    """Mean squared difference of attention maps, over images and places; blind to the scale of either.

    Example:
        >>> x = torch.rand(2, 3, 4, 4)
        >>> float(attention_distance(x, 5 * x)) < 1e-12
        True
    """
    return (attention(a) - attention(b)).square().mean()


@contextmanager
def stage_maps(module: nn.Module) -> Iterator[list[list[Tensor]]]:
    """Inside the `with`, what each block but bare convolutions and BatchNorms gives in each forward pass."""
    plain = (nn.Conv2d, nn.modules.batchnorm._BatchNorm, nn.Linear)
    with ExitStack() as stack:
        yield [
            stack.enter_context(block_outputs(module, i))
            for i, block in enumerate(blocks_of(module))
            if not isinstance(block, plain)
        ]


def maps_of(seen: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """The feature maps of the last pass; outputs without places are left out."""
    return [one[-1] for one in seen if one and one[-1].ndim == 4]
