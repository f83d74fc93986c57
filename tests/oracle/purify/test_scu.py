"""SCU: its terms against loops, its positives, and the planted backdoor removed by the true trigger."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cupel.augment import SimCLRAugment
from cupel.encoders import ImageEncoder
from cupel.errors import DataError, SettingsError
from cupel.inference import features
from cupel.protocols import Batch
from cupel.purify.base import copied
from cupel.purify.scu import SCU, SCULearner, cluster_mates, k_means, nearest_others
from cupel.seeds import Seed
from cupel.verdicts import Evidence
from planted import planted, unit
from toys import blobs, small_encoder

DATA = blobs(64)
MASK, PATTERN = torch.zeros(16, 16), torch.ones(3, 16, 16)
MASK[:4, :4] = 1
FOUND = Evidence(MASK.numpy(), PATTERN.numpy(), float(MASK.mean()), True, "truth")


def cosine(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum() / a.norm() / b.norm())


def learner(settings: SCU, *, found: bool = True) -> tuple[SCULearner, ImageEncoder]:
    given = small_encoder()
    given.module.requires_grad_(False)
    student = copied(given)
    with torch.no_grad():
        for weight in student.module.parameters():
            weight.mul_(1.1)
    triggers = (MASK[None], PATTERN[None]) if found else None
    embeddings = features(given, DATA, dtype=torch.float32)
    assert isinstance(student, ImageEncoder)
    return SCULearner(settings, student, given, embeddings, triggers, Seed(3)), given


def batch(n: int = 16) -> Batch:
    rows = torch.arange(n) * 3
    assert isinstance(DATA.inputs, Tensor)
    return Batch(DATA.inputs[rows], rows, Seed(4))


def test_the_loss_is_that_of_a_loop() -> None:
    one, given = learner(SCU(pull="cosine", alpha_clean=0.7, alpha_trigger=1.3, batch_norm="frozen"))
    b = batch()
    loss, numbers = one.loss(b)
    stamped, views = one.stamped(b), one.settings.augment(b.inputs, b.seed.child("views").torch())
    with torch.no_grad():
        f, f_views = one.encoder(stamped), one.encoder(views)
        t, t_views = given(unit(b.inputs)), given(views)
    clean = sum(1 - cosine(f_views[i], t_views[i]) for i in range(16)) / 16
    trigger = sum(1 - cosine(f[i], t[i]) for i in range(16)) / 16
    assert float(numbers["clean"]) == pytest.approx(clean, abs=1e-5)
    assert float(numbers["trigger"]) == pytest.approx(trigger, abs=1e-5)
    assert loss.item() == pytest.approx(0.7 * clean + 1.3 * trigger, abs=1e-5)


def test_most_images_bear_the_trigger_and_some_a_random_patch() -> None:
    plain: dict[str, Any] = {"boost": (1.0, 1.0), "shift": 0, "dilation": 0}
    one, _ = learner(SCU(**plain, patches=0.25, window=(0.2, 0.3)))
    b = batch()
    x, stamped = unit(b.inputs), one.stamped(b)
    assert torch.equal(stamped[:12], torch.lerp(x[:12], PATTERN, MASK))
    changed = (stamped[12:] != x[12:]).any(dim=1)
    for area in changed:  # a square of a fifth to three tenths of the side, pixels may agree by chance
        rows, columns = area.any(1).nonzero(), area.any(0).nonzero()
        assert 3 <= int(rows.max() - rows.min()) + 1 <= 5
        assert 3 <= int(columns.max() - columns.min()) + 1 <= 5
    without, _ = learner(SCU(**plain), found=False)
    assert not torch.equal(without.stamped(b)[0], torch.lerp(x[0], PATTERN, MASK))
    assert bool((without.stamped(b) != x).flatten(1).any(1).all())


def test_byol_compares_views_crosswise_with_the_frozen_network() -> None:
    one, given = learner(SCU(clean_term="byol", alpha_trigger=0.0))
    one.predictor.eval(), one.projector.eval(), one.target.eval()
    b = batch()
    loss, _ = one.loss(b)
    views = one.settings.augment(b.inputs.repeat(2, 1, 1, 1), b.seed.child("views").torch())
    with torch.no_grad():
        p = one.predictor(one.projector(one.encoder(views)))
        z = one.target(given(views))
    wanted = sum(2 - 2 * cosine(p[i], z[(i + 16) % 32]) for i in range(32)) / 16
    assert float(loss.detach()) == pytest.approx(wanted, abs=1e-4)
    assert all(not weight.requires_grad for weight in one.target.parameters())
    assert len(one.parameters()) > len(list(one.encoder.module.parameters()))


def test_neighbours_are_those_of_a_loop() -> None:
    z = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    wanted = [max((j for j in range(40) if j != i), key=lambda j, i=i: cosine(z[i], z[j])) for i in range(40)]
    assert nearest_others(z, block=7).tolist() == wanted


def test_mates_are_drawn_evenly_from_the_own_cluster() -> None:
    assigned = torch.tensor([0, 1, 0, 2, 1, 0])
    rows = torch.tensor([0, 1, 3]).repeat(3000)
    mates = cluster_mates(rows, assigned, torch.Generator().manual_seed(0))
    assert torch.equal(assigned[mates], assigned[rows])
    counts = torch.bincount(mates[rows == 0], minlength=6).tolist()
    assert [c > 0 for c in counts] == [True, False, True, False, False, True]
    assert all(abs(c - 1000) < 4 * (3000 * 2 / 9) ** 0.5 for c in counts if c)


def test_clusters_are_those_of_separated_blobs() -> None:
    centre = torch.eye(4, 8).repeat_interleave(25, dim=0)
    z = centre + 0.05 * torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
    found = k_means(z, 4, Seed(0))
    assert [len(found[i * 25 : (i + 1) * 25].unique()) for i in range(4)] == [1, 1, 1, 1]
    assert len(found.unique()) == 4


def test_the_true_trigger_as_evidence_removes_the_planted_backdoor() -> None:
    toy = planted(40, 0.9, seed=0)
    truth = Evidence((0.9 * toy.mask).numpy(), toy.pattern.numpy(), float(toy.mask.mean()), True, "truth")
    colours = SimCLRAugment(crop=False, flip=0.0, jitter_probability=0.0, grayscale=0.0)
    method = SCU(
        pull="nmse", epochs=30, batch_size=64, lr=5e-4, momentum=0.0, schedule="constant", shift=0, dilation=0,
        augment=colours,
    )  # fmt: skip
    made, history = method.purify_with_history(toy.encoder, toy.images, Seed(1), [truth])
    x = unit(toy.images.inputs)

    def shift(model: Any) -> float:
        with torch.no_grad():
            return float((1 - F.cosine_similarity(model(toy.stamp(x)), model(x))).mean())

    with torch.no_grad():
        kept = float(F.cosine_similarity(made(x), toy.twin(x)).mean())
    assert shift(toy.encoder) > 0.9
    assert shift(made) < shift(toy.encoder) / 5
    assert kept > 0.95
    assert history["trigger"][-1] < history["trigger"][0] / 5


def test_wrong_settings_and_evidence_are_refused() -> None:
    with pytest.raises(SettingsError, match="boost"):
        SCU(boost=(2.0, 1.0))
    small = Evidence(MASK[:8, :8].numpy(), PATTERN[:, :8, :8].numpy(), 0.2, True, "other")
    with pytest.raises(DataError, match="8×8"):
        SCU(steps=1, batch_size=8).purify(small_encoder(), DATA, Seed(0), [small])
