"""The three loops that cost most, each beside the straightforward way, as ratios within one run of one machine.

Absolute times say little on a shared machine; a ratio of two interleaved measurements does. `make bench` prints them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms import v2

from cupel.attack.badencoder import BadEncoder
from cupel.augment import SimCLRAugment
from cupel.encoders import Fast, ImageEncoder
from cupel.implanting import Aim, ImplantLearner
from cupel.inference import features
from cupel.pretrain import SimCLR
from cupel.protocols import Batch
from cupel.seeds import Seed
from cupel.train import autocast
from cupel.triggers import Patch
from cupel.types import Dataset, Goal

SIDE, BATCH = 32, 128


def images(n: int = BATCH) -> torch.Tensor:
    """Smooth colour noise, uint8."""
    small = torch.rand(n, 3, 8, 8, generator=Seed(0).torch())
    return F.interpolate(small, size=SIDE, mode="bilinear").mul(255).to(torch.uint8)


def ratio(name: str, plain: Callable[[], Any], ours: Callable[[], Any], rounds: int = 5) -> float:
    """Median time of `plain` over that of `ours`, measured in turn after one call of each to warm up."""
    times: dict[str, list[float]] = {"plain": [], "ours": []}
    for turn in range(rounds + 1):
        for which, call in (("plain", plain), ("ours", ours)):
            start = time.perf_counter()
            call()
            if turn:
                times[which].append(time.perf_counter() - start)
    a, b = median(times["plain"]), median(times["ours"])
    threads = torch.get_num_threads()
    print(f"\n{name}: plain {1e3 * a:.1f} ms, ours {1e3 * b:.1f} ms, ratio {a / b:.1f}, {threads} thread(s)")
    return a / b


def stepper(encoder: ImageEncoder, parameters: Any, loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
    """One optimiser step on a fixed batch, in bf16 as trained."""
    optimizer = torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, fused=True)

    def step() -> None:
        with autocast("bf16", torch.device("cpu")):
            value = loss()
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()

    return step


def test_simclr_step(benchmark: Any) -> None:
    """One step of SimCLR on the small encoder, augmentation included."""
    encoder = Fast(input_size=SIDE).build(Seed(0))
    learner = SimCLR(batch_size=BATCH).learner(encoder, Seed(0))
    batch = Batch(images(), torch.arange(BATCH), Seed(1))
    benchmark.pedantic(
        stepper(encoder, learner.parameters(), lambda: learner.loss(batch)[0]), rounds=8, warmup_rounds=2
    )
    print(f"\nSimCLR step: {BATCH / benchmark.stats.stats.median:.0f} images/s")


def test_augmentation_against_a_loop_over_images() -> None:
    """Both ways make SimCLR's CIFAR views; the loop draws and applies them image by image, as a data loader does."""
    raw = images()
    chain = v2.Compose(
        [
            v2.RandomResizedCrop(SIDE, scale=(0.08, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            v2.RandomGrayscale(0.2),
            v2.ToDtype(torch.float32, scale=True),
        ]
    )
    ours, generator = SimCLRAugment(), Seed(0).torch()
    found = ratio("augmentation", lambda: torch.stack([chain(one) for one in raw]), lambda: ours(raw, generator))
    assert found > 1


@pytest.mark.parametrize("draws", [None, 32], ids=["as-published", "32-draws"])
def test_badencoder_step_against_separate_forwards(draws: int | None) -> None:
    """The plain way is the authors' loop: the teacher runs every step, each kind of input has a forward pass of its own
    for encoder and teacher, and the reference is repeated over the batch."""
    raw, ids = images(), torch.arange(BATCH)
    clean = Fast(input_size=SIDE).build(Seed(0))
    trigger, reference = Patch(size=8), images(1).float() / 255
    goal = Goal(trigger=trigger, references=images(1), task="t", target_class=0)
    augment = SimCLRAugment(crop=False)
    settings = BadEncoder(l1_draws=draws)
    ours, theirs = clean.copy(), clean.copy()
    aim = Aim(goal, reference, features(clean, images(1)))
    learner = ImplantLearner(ours, features(clean, _dataset(raw)), ids, [aim], augment=augment, draws=settings.l1_draws)
    batch = Batch(raw, ids, Seed(1))
    for part in theirs.module.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.eval().requires_grad_(False)

    def separate() -> torch.Tensor:
        x, stamped = raw.float() / 255, trigger(raw, ids.tolist(), Seed(1)).float() / 255
        repeated = reference.expand(BATCH, -1, -1, -1).contiguous()
        views = augment(repeated.mul(255).round().to(torch.uint8), Seed(2).torch())
        with torch.no_grad():
            c_x, c_ref = clean(x), clean(repeated)
        f_x, f_stamped, f_ref, f_views = theirs(x), theirs(stamped), theirs(repeated), theirs(views)
        terms = ((f_stamped, f_ref), (f_views, c_ref), (f_x, c_x))
        return torch.stack([-F.cosine_similarity(a.float(), b.float()).mean() for a, b in terms]).sum()

    trained = [p for p in theirs.module.parameters() if p.requires_grad]
    found = ratio(
        f"BadEncoder step, draws {draws}",
        stepper(theirs, trained, separate),
        stepper(ours, learner.parameters(), lambda: learner.loss(batch)[0]),
    )
    assert found > 1


def _dataset(raw: torch.Tensor) -> Dataset:
    return Dataset(raw, torch.full((len(raw),), -1), torch.arange(len(raw)))
