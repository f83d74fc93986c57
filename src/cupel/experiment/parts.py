"""Parts of an experiment: pre-training, what attacker and defender hold, later tasks, the paper."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from cupel.distort import DISTORTIONS, Distortion
from cupel.encoders import ENCODERS, Architecture, Fast
from cupel.pretrain import OBJECTIVES, SimCLR
from cupel.probe import PROBES, Linear
from cupel.protocols import Objective, Probe, Trigger
from cupel.retuning import Retuning
from cupel.settings import DataFile, Fraction, OneOf, PositiveInt, settings
from cupel.triggers import TRIGGERS

__all__ = ["Attacker", "Defender", "Downstream", "Paper", "References", "Shadow", "Upstream"]


@settings
class Upstream:
    """The victim's pre-training.

    Args:
        data: Source of the images.
        size: How many; None = all.
        encoder: Architecture.
        objective: Pre-training method.
        monitor_every: Steps between looks of the k-NN monitor; 0 = none. Nothing is chosen by it.
    """

    data: str
    size: PositiveInt | None = None
    encoder: Annotated[Architecture, OneOf(ENCODERS)] = Fast()
    objective: Annotated[Objective, OneOf(OBJECTIVES)] = SimCLR()
    monitor_every: Annotated[int, Field(ge=0)] = 0


@settings
class Shadow:
    """The attacker's images; attacks that need no labels do not see theirs.

    Args:
        data: Source; None = the pre-training images themselves (as in BadEncoder's experiments; the record says so).
        size: How many; None = all.
        disjoint: Of the pre-training source, but none of the images that pre-training drew.
        classes: Images of these classes alone, numbered anew in this order; None = all. With an attack on a teacher
            (`latent_backdoor`) they are the teacher's task, which must not have the target class.
    """

    data: str | None = None
    size: PositiveInt | None = None
    disjoint: bool = False
    classes: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] | None = None


@settings
class References:
    """The attacker's inputs of the target class.

    Args:
        file: A published reference file (`.npz`); None = drawn from the reference split of the downstream task.
        size: How many to draw.
        choose: True = the ones that a probe on the clean encoder, fitted on downstream train, takes for the target
            class most surely; False = at random.
    """

    file: DataFile | None = None
    size: PositiveInt = 1
    choose: bool = False


@settings
class Attacker:
    """What the attacker holds."""

    shadow: Shadow = Shadow()
    references: References = References()


@settings
class Downstream:
    """A later task on the frozen encoder.

    Args:
        data: Source; its train and test splits are used.
        target_class: What triggered inputs shall be taken for; None where the attack names no class, as `neuba` does:
            then it is the class that each trigger turns out to lead to.
        probe: Classifier on the embeddings.
        head_seeds: Heads that are fitted; metrics are means over them.
        size, test_size: How many images; None = all.
        trigger, references: For this task, in place of the attack's and the attacker's.
        on_training_data: Fit the classifier on the victim's pre-training images with the labels they were trained with,
            poisoned ones included, instead of on the train split; for supervised pre-training, where one data set
            makes encoder and head.
        distortions: Each gives accuracy and attack success once more, with its name at the end of the metrics'
            (`attack_success_rate_jpeg_50`); heads are fitted once, on undistorted images.
        retuning: How little it takes to wake the backdoor again, in purified encoders and, for comparison, in the clean
            twin; None = not measured.
    """

    data: str
    target_class: Annotated[int, Field(ge=0)] | None = None
    probe: Annotated[Probe, OneOf(PROBES)] = Linear()
    head_seeds: PositiveInt = 3
    size: PositiveInt | None = None
    test_size: PositiveInt | None = None
    trigger: Annotated[Trigger[Tensor], OneOf(TRIGGERS)] | None = None
    references: References | None = None
    on_training_data: bool = False
    distortions: tuple[Annotated[Distortion, OneOf(DISTORTIONS)], ...] = ()
    retuning: Retuning | None = None


@settings
class Defender:
    """What the defender holds: unlabelled images, no trigger, no target. Defences that need labels get images of the
    first task's train split instead.

    Args:
        data: Source; None = images drawn from the pre-training set.
        size: How many.
        labelled: How many labelled ones; None = the whole train split.
        triggered: Share of the unlabelled images that bear the attack's trigger, unknown to the defender; drawn by
            seed. Scanners and purifiers are handed them as they are.
    """

    data: str | None = None
    size: PositiveInt = 1000
    labelled: PositiveInt | None = None
    triggered: Fraction = 0.0


@settings
class Paper:
    """Published numbers beside ours.

    Args:
        source: Where they stand (paper, table, page).
        results: Metric name → value in [0, 1]; with several tasks `task/metric`.
        deviations: How this experiment differs from the published one.
    """

    source: str
    results: dict[str, float] = Field(default_factory=dict)
    deviations: tuple[str, ...] = ()
