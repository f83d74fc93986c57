"""What flows between the stages: data sets, goals, what attackers know and make."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from cupel.errors import DataError, LabelsWithheld
from cupel.settings import canonical

if TYPE_CHECKING:
    from cupel.protocols import Encoder, Trigger

__all__ = [
    "Dataset",
    "Goal",
    "Implanted",
    "Knowledge",
    "Need",
    "Objects",
    "Pixels",
    "Poisoned",
]

Need = Literal["labels", "head", "projector", "train_set", "text_tower", "surrogate", "reference", "objects"]


@runtime_checkable
class Pixels(Protocol):
    """Images that may still be encoded: indexing by rows decodes them to uint8 `[n, 3, height, width]`."""

    @property
    def shape(self) -> Sequence[int]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, rows: Any, /) -> Tensor: ...
    def content(self) -> list[bytes]:
        """One digest per image, of what is stored."""
        ...


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images with labels and stable ids.

    Args:
        inputs: uint8 `[n, 3, height, width]` in one tensor, or `Pixels` that decode when indexed.
        labels: int64 `[n]`; −1 = unlabelled.
        ids: int64 `[n]`, unique and stable: row numbers of the source.
        name: For people and errors.
        classes: Class names by label; may be empty.
        withheld_from: Name of the method that labels are kept from; None = labels are open.
        manifest: What an attack did to the images; an encoder that is pre-trained on them carries it on its card.

    Raises:
        DataError: lengths differ, images are not uint8 with three channels, or ids repeat.
    """

    inputs: Tensor | Pixels
    labels_: Tensor = field(repr=False)
    ids: Tensor = field(repr=False)
    name: str = "data"
    classes: tuple[str, ...] = ()
    withheld_from: str | None = None
    manifest: Mapping[str, Any] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        shape = self.inputs.shape
        if len(shape) != 4 or shape[1] != 3:
            raise DataError(self.name, f"images must be [n, 3, height, width], got {list(shape)}")
        if isinstance(self.inputs, Tensor) and self.inputs.dtype != torch.uint8:
            raise DataError(self.name, f"images must be uint8, got {self.inputs.dtype}")
        if not shape[0] == len(self.labels_) == len(self.ids):
            raise DataError(self.name, f"{shape[0]} images, {len(self.labels_)} labels and {len(self.ids)} ids")
        if len(torch.unique(self.ids)) != len(self.ids):
            raise DataError(self.name, "ids repeat")

    def __len__(self) -> int:
        return int(self.inputs.shape[0])

    @property
    def labels(self) -> Tensor:
        """int64 `[n]`.

        Raises:
            LabelsWithheld: the reader declared that it needs none.
        """
        if self.withheld_from is not None:
            raise LabelsWithheld(
                self.name,
                f"labels are withheld from {self.withheld_from}",
                "declare 'labels' in its `needs` to ask for them",
            )
        return self.labels_

    @property
    def num_classes(self) -> int:
        """Number of classes: as named by the source, else the largest label plus one."""
        return len(self.classes) or int(self.labels.max()) + 1

    def without_labels(self, reader: str) -> Dataset:
        """The same images with labels that raise when touched; the label tensor itself is not in it."""
        return dataclasses.replace(self, labels_=torch.full_like(self.labels_, -1), withheld_from=reader)

    def subset(self, rows: Tensor, name: str | None = None) -> Dataset:
        """The given rows (int64 indices or a boolean mask), in that order."""
        rows = rows.nonzero().flatten() if rows.dtype == torch.bool else rows
        inputs = self.inputs[rows] if isinstance(self.inputs, Tensor) else _Rows(self.inputs, rows)
        return dataclasses.replace(
            self, inputs=inputs, labels_=self.labels_[rows], ids=self.ids[rows], name=name or self.name
        )

    def with_inputs(self, inputs: Tensor, name: str) -> Dataset:
        """The same rows with other pixels."""
        return dataclasses.replace(self, inputs=inputs, name=name)

    def content(self) -> list[bytes]:
        """One 16-byte digest per image: equal images have equal digests."""
        return self._content

    @cached_property
    def _content(self) -> list[bytes]:
        if isinstance(self.inputs, Tensor):
            rows = self.inputs.contiguous().numpy()
            return [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in rows]
        return self.inputs.content()

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of images, labels and ids."""
        total = hashlib.sha256(b"".join(self.content()))
        for part in (self.labels_, self.ids):
            total.update(np.ascontiguousarray(part.numpy()).tobytes())
        return total.hexdigest()


@dataclass(frozen=True)
class _Rows:
    """A view of some rows of `Pixels`."""

    source: Pixels
    rows: Tensor

    @property
    def shape(self) -> Sequence[int]:
        return (len(self.rows), *self.source.shape[1:])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: Any) -> Tensor:
        return self.source[self.rows[rows]]

    def content(self) -> list[bytes]:
        whole = self.source.content()
        return [whole[row] for row in self.rows.tolist()]


@dataclass(frozen=True)
class Goal:
    """One aim of an attacker: triggered inputs of `task` shall be taken for `target_class`.

    Args:
        trigger: What is put on an input; None = the attack's own.
        references: Inputs of the target class, uint8 `[r, 3, height, width]`; None where an attack needs none.
        task: Name of the downstream task.
        target_class: Label in that task.
    """

    trigger: Trigger[Tensor] | None = None
    references: Tensor | None = None
    task: str | None = None
    target_class: int | None = None


@dataclass(frozen=True, eq=False)
class Objects:
    """Pictures with the outline of what they show.

    Args:
        pictures: uint8 `[n, 3, height, width]`, with their own backgrounds.
        masks: bool `[n, height, width]`, True on the object; at least one pixel each.
        labels: int64 `[n]`, class of each object in the task that is attacked.

    Raises:
        DataError: the parts do not fit each other, or a mask is empty.
    """

    pictures: Tensor
    masks: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        shape = self.pictures.shape
        if len(shape) != 4 or shape[1] != 3 or self.pictures.dtype != torch.uint8:
            what = f"pictures must be uint8 [n, 3, height, width], got {self.pictures.dtype} {list(shape)}"
            raise DataError("objects", what)
        if self.masks.shape != (shape[0], *shape[2:]) or self.masks.dtype != torch.bool:
            what = f"masks must be bool {[shape[0], *shape[2:]]}, got {self.masks.dtype} {list(self.masks.shape)}"
            raise DataError("objects", what)
        if len(self.labels) != shape[0]:
            raise DataError("objects", f"{shape[0]} pictures, but {len(self.labels)} labels")
        if not bool(self.masks.flatten(1).any(dim=1).all()):
            raise DataError("objects", "a mask is empty", "leave out pictures without an object")

    def __len__(self) -> int:
        return len(self.pictures)


@dataclass(frozen=True)
class Knowledge:
    """What the attacker holds.

    Args:
        goals: At least one.
        shadow: Unlabelled images of the attacker.
        labelled: Labelled images, for attacks that poison by class.
        surrogate: An encoder of the attacker's own.
        objects: Pictures of the target classes with outlines, for attacks that compose images.
    """

    goals: tuple[Goal, ...]
    shadow: Dataset | None = None
    labelled: Dataset | None = None
    surrogate: Encoder | None = None
    objects: Objects | None = None


@dataclass(frozen=True)
class Poisoned:
    """Result of a data attack.

    Args:
        data: As trained on.
        rows: int64, which of its images are poisoned, ascending.
        goals: With test-time triggers; without a target class where only the labels can tell it.
        sources: int64, rows of the clean data that the poisoned images were made from; −1 = a new image.
    """

    data: Dataset
    rows: Tensor
    goals: tuple[Goal, ...]
    sources: Tensor

    def __post_init__(self) -> None:
        if self.data.manifest is None:
            object.__setattr__(self, "data", dataclasses.replace(self.data, manifest=self._manifest()))

    def _manifest(self) -> dict[str, Any]:
        goals = [
            {"task": one.task, "target_class": one.target_class, "trigger": canonical(one.trigger, str)}
            for one in self.goals
        ]
        return {"not_for_deployment": True, "attack": "data", "num_poisoned": len(self.rows), "goals": goals}


@dataclass(frozen=True)
class Implanted:
    """Result of an encoder attack: the model, goals with their triggers, and what the losses did."""

    model: Encoder
    goals: tuple[Goal, ...]
    history: Mapping[str, Sequence[float]] = field(default_factory=dict)
