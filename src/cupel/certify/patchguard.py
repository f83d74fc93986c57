"""PatchGuard for an encoder: a student that sees little at a time, and a head whose strongest window is masked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from cupel.certify.certificate import MaskedClassifier
from cupel.certify.local_net import LocalEvidence, LocalNet, local_net
from cupel.certify.windows import Windows, receptive_field, squares, window_size
from cupel.errors import SettingsError
from cupel.inference import device_of, features
from cupel.losses.pulling import cosine_pull
from cupel.metrics import check_labels
from cupel.optimizers import NonNegative, Recipe
from cupel.protocols import Batch, Encoder
from cupel.seeds import Seed
from cupel.settings import Budgets, Positive, PositiveInt, settings
from cupel.train import fit
from cupel.types import Dataset, Need

__all__ = ["PatchGuard", "masked_logits"]


@settings
class PatchGuard(Recipe, Budgets):
    """A certified classifier from an encoder: its knowledge is distilled into a network with a small receptive field.

    An encoder sees the whole image at once, so one patch touches all of its features and nothing can be certified. The
    student learns its embeddings of unlabelled images as the mean of what its cells see; a linear head on each cell
    gives evidence per class, and predictions come by robust masking.

    Args:
        patch: Largest side of the patch in pixels, for prediction and certificate.
        kernels, strides: Of the student's blocks; they set what a cell sees (5 pixels) and the map's size (half the
            image's side).
        width: Channels of the first block; they double at each stride above 1.
        threshold: Share of a class's evidence above which its strongest window is masked.
        robust_training: The head is trained a second time with the strongest window of the true class taken away, as
            an attacker and the mask would. From the start this would drive all evidence to 0.
        finetune: The student is trained along with the head the second time.
        head_epochs, head_lr: Of the head, by Adam; the second time at a tenth of the rate.
        steps, epochs, lr, …: Of the distillation.

    Raises:
        SettingsError: a kernel is even, or kernels and strides differ in number.

    Source: Xiang et al., PatchGuard, USENIX Security 2021, arXiv:2005.10884; BagNet of Brendel & Bethge, ICLR 2019,
    arXiv:1904.00760. How it is put to use on an encoder is our choice.
    Deviations: images keep their size, where the published BagNet-17 sees CIFAR-10 enlarged six times in steps of 8
    pixels (17 / 6 ≈ 3 pixels of the image); blocks of our own.
    """

    patch: PositiveInt = 10
    kernels: tuple[PositiveInt, ...] = (3, 3, 1, 1)
    strides: tuple[PositiveInt, ...] = (1, 2, 1, 1)
    width: PositiveInt = 64
    threshold: Annotated[float, Field(ge=0, lt=1)] = 0.0
    robust_training: bool = True
    finetune: bool = True
    head_epochs: Annotated[int, Field(ge=0)] = 20
    head_lr: Positive = 0.01

    epochs: PositiveInt = 40
    batch_size: Annotated[int, Field(ge=2)] = 64
    optimizer: Literal["adam", "adamw", "sgd", "lars", "lars_clip"] = "adamw"
    lr: Positive = 2e-3
    weight_decay: NonNegative = 5e-4
    precision: Literal["fp32", "bf16"] = "fp32"

    title: ClassVar[str] = "PatchGuard"
    needs: ClassVar[frozenset[Need]] = frozenset({"labels"})
    revision: ClassVar[int] = 1
    budgets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "smoke": {"steps": 200, "width": 16, "head_epochs": 20},
        "standard": {},
        "paper": {"epochs": 200, "width": 128, "head_epochs": 60},
    }

    def __post_init__(self) -> None:
        if len(self.kernels) != len(self.strides) or not self.kernels:
            what = f"{len(self.kernels)} kernels and {len(self.strides)} strides"
            raise SettingsError("PatchGuard.kernels", what, "give one of each per block")
        if any(kernel % 2 == 0 for kernel in self.kernels):
            raise SettingsError("PatchGuard.kernels", f"{list(self.kernels)} has an even one", "make all odd")

    def windows(self, side: int) -> Windows:
        """What a patch can touch of the map of an image.

        Args:
            side: Of the image in pixels.

        Raises:
            SettingsError: that is all of it.
        """
        field, stride = receptive_field(self.kernels, self.strides)
        cells = -(-side // stride)
        return squares(cells, cells, window_size(self.patch, field, stride))

    def fit(
        self,
        encoder: Encoder,
        train: Dataset,
        seed: Seed,
        *,
        unlabelled: Dataset | None = None,
        checkpoint: Path | None = None,
    ) -> MaskedClassifier:
        """Distil the encoder, then fit the head on labelled images.

        Args:
            encoder: Left as it is.
            train: Labelled images of its input size.
            seed: Initialisation and order.
            unlabelled: Images for the distillation; None = those of `train`.
            checkpoint: File that keeps the state of the distillation for a resume.

        Raises:
            SettingsError: a patch touches the whole map.
            DataError, UsageError: no images, of another size, or labels that do not fit.
        """
        check_labels(train.labels, train.num_classes, train.name)
        windows, device = self.windows(encoder.input_size), device_of(encoder.module)
        student = local_net(self.width, encoder.width, self.kernels, self.strides, seed.child("student")).to(device)
        images = train if unlabelled is None else unlabelled
        with torch.enable_grad():
            if self.total_steps(len(images), images.name):
                told = _Told(student, features(encoder, images, dtype=torch.float32))
                label = "certify patchguard: distil"
                fit(told, images, self, seed.child("distil"), label=label, device=device, checkpoint=checkpoint)
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed.child("head").value)
                head = nn.Linear(encoder.width, train.num_classes)
            local = LocalEvidence(student, head.to(device))
            labels = train.labels.to(device)
            plain = _Headed(local, None, labels, finetune=False)
            second = _Headed(local, windows if self.robust_training else None, labels, finetune=self.finetune)
            stages = [("head", plain, self.head_lr)]
            if self.robust_training or self.finetune:
                stages.append(("robust head", second, self.head_lr / 10))
            for stage, learner, lr in stages if self.head_epochs else ():
                recipe = Recipe(
                    epochs=self.head_epochs,
                    batch_size=min(self.batch_size, len(train)),
                    optimizer="adam",
                    lr=lr,
                    precision=self.precision,
                )
                learner.begin()
                label = f"certify patchguard: {stage}"
                fit(learner, train, recipe, seed.child(stage), label=label, device=device)
        local.eval().requires_grad_(True)
        return MaskedClassifier(local, windows, self.patch, encoder.input_size, self.threshold, "patchguard")


class _Told:
    """The student under 1 − cos( mean over its cells, the encoder's embedding )."""

    def __init__(self, student: LocalNet, targets: Tensor) -> None:
        self.student, self.targets = student, targets
        self.state: nn.Module = student.train()

    def parameters(self) -> list[nn.Parameter]:
        return list(self.student.parameters())

    def loss(self, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        x = batch.inputs.float().div_(255).contiguous(memory_format=torch.channels_last)
        away = cosine_pull(self.student(x).mean(dim=(2, 3)), self.targets[batch.rows.to(self.targets.device)])
        return away, {"cosine": 1 - away.detach()}

    def after_step(self) -> None:
        """Nothing."""


class _Headed:
    """Head, and the student where it is tuned, under cross entropy of mean evidence, masked where windows are given."""

    def __init__(self, local: LocalEvidence, windows: Windows | None, labels: Tensor, finetune: bool) -> None:
        self.local, self.windows, self.labels, self.finetune = local, windows, labels, finetune
        self.state: nn.Module = local

    def begin(self) -> None:
        """Set modes and what is trained."""
        self.local.train()
        self.local.network.train(self.finetune).requires_grad_(self.finetune)

    def parameters(self) -> list[nn.Parameter]:
        return [one for one in self.local.parameters() if one.requires_grad]

    def loss(self, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        x = batch.inputs.float().div_(255).contiguous(memory_format=torch.channels_last)
        y, evidence = self.labels[batch.rows.to(self.labels.device)], self.local(x).float()
        logits = evidence.mean(dim=1) if self.windows is None else masked_logits(evidence, y, self.windows)
        return F.cross_entropy(logits, y), {"accuracy": (logits.detach().argmax(1) == y).float().mean()}

    def after_step(self) -> None:
        """Nothing."""


def masked_logits(
    evidence: Float[Tensor, "n cells classes"], labels: Int[Tensor, " n"], windows: Windows
) -> Float[Tensor, "n classes"]:
    """Mean evidence of each class; that of the label without its strongest window.

    Source: Xiang et al., PatchGuard, USENIX Security 2021, arXiv:2005.10884, section 3.4 (provable adversarial
    training).
    """
    own = evidence.gather(2, labels[:, None, None].expand(-1, evidence.shape[1], 1)).squeeze(2)
    strongest = (own @ windows.covers.to(own).T).amax(dim=1)
    total = evidence.sum(dim=1)
    return total.scatter_add(1, labels[:, None], -strongest.clamp_min(0)[:, None]) / evidence.shape[1]
