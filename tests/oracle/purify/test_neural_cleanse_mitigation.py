"""Neural Cleanse's mitigations: a known shortcut is unlearned, dimensions are silenced exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from cupel.encoders import ENCODERS, Fast, ResNet18
from cupel.errors import DataError, LabelsWithheld
from cupel.inference import classify, features
from cupel.inversion.classwise import ClassSearch
from cupel.probe import Linear
from cupel.purify.neural_cleanse_prune import NeuralCleansePrune, pruning_order
from cupel.purify.neural_cleanse_unlearn import NeuralCleanseUnlearn
from cupel.purify.silencing import silence
from cupel.seeds import Seed
from cupel.types import Dataset
from cupel.verdicts import Evidence
from fingerprints import model_print, same_state
from hijacked import Hijacked, bars, hijacked, with_pixel
from toys import blobs, small_encoder, trained_encoder


def rates(encoder: Hijacked, data: Dataset) -> tuple[float, float]:
    """Clean accuracy and success of the true pixel, with a new probe."""
    head = Linear(subsample=1.0).fit_features(features(encoder, data), data.labels, 7, Seed(0))
    clean = classify(head, features(encoder, data)) == data.labels
    others = data.labels != 2
    hit = classify(head, features(encoder, with_pixel(data))) == 2
    return float(clean.float().mean()), float(hit[others].float().mean())


def test_unlearning_removes_the_true_trigger() -> None:
    data, encoder = bars(), hijacked(1.0)
    before = model_print(encoder.module)
    accuracy, success = rates(encoder, bars(140, seed=1))
    assert success > 0.95
    method = NeuralCleanseUnlearn(epochs=30, lr=0.1, search=ClassSearch(steps=60, images_per_step=64))
    made, history = method.purify_with_history(encoder, data, Seed(0))
    assert model_print(encoder.module) == before
    after, left = rates(made, bars(140, seed=1))
    assert left <= success - 0.8
    assert after >= accuracy - 0.02
    assert history["loss"][-1] < history["loss"][0]


def pixel_evidence(size: int, converged: bool = True, area: float = 0.02) -> Evidence:
    mask, pattern = np.zeros((size, size), np.float32), np.ones((3, size, size), np.float32)
    mask[-3:, -3:] = 1
    return Evidence(mask, pattern, area, converged, "by hand")


def test_evidence_is_used_and_checked() -> None:
    data, encoder = blobs(128), small_encoder()
    method = NeuralCleanseUnlearn(steps=4, batch_size=16)
    made = method.purify(encoder, data, Seed(0), [pixel_evidence(16)])
    again = method.purify(encoder, data, Seed(0), [pixel_evidence(16), pixel_evidence(16, False, 0.001)])
    assert same_state(made.module, again.module), "what did not converge is left out"
    with pytest.raises(DataError, match="8×8"):
        method.purify(encoder, data, Seed(0), [pixel_evidence(8)])
    with pytest.raises(LabelsWithheld):
        method.purify(encoder, data.without_labels("purifier"), Seed(0))
    with pytest.raises(LabelsWithheld):
        NeuralCleansePrune().purify(encoder, data.without_labels("purifier"), Seed(0))
    nothing = ClassSearch(steps=1, images_per_step=16, batch_size=16, success=1.0)
    with pytest.raises(DataError, match="no trigger was found"):
        NeuralCleanseUnlearn(steps=4, batch_size=16, search=nothing).purify(hijacked(0.0), bars(), Seed(0))


@pytest.mark.parametrize("mode", ["frozen", "eval_affine", "train"])
def test_batch_norm_is_touched_as_said(mode: str) -> None:
    data, encoder = blobs(128), small_encoder()
    method = NeuralCleanseUnlearn(steps=3, batch_size=16, batch_norm=mode)
    made = method.purify(encoder, data, Seed(0), [pixel_evidence(16)])
    changed = {
        name.rpartition(".")[2]
        for name, value in made.module.state_dict().items()
        if "bn" in name and not torch.equal(value, encoder.module.state_dict()[name])
    }
    wanted = {"frozen": set(), "eval_affine": {"weight", "bias"}}
    statistics = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    assert changed == wanted.get(mode, statistics)


def test_zero_steps_change_nothing() -> None:
    encoder = small_encoder()
    made = NeuralCleanseUnlearn(steps=0).purify(encoder, blobs(64).without_labels("x"), Seed(0))
    assert made.module is not encoder.module
    assert same_state(made.module, encoder.module)


@pytest.mark.parametrize("architecture", [Fast(width=4, input_size=16), ResNet18(width_multiplier=1 / 16), "projected"])
def test_silenced_dimensions_are_zero_and_the_others_as_they_were(architecture: object) -> None:
    made = ENCODERS["projected"](base=Fast(width=4)) if architecture == "projected" else architecture
    encoder = made.build(Seed(0))
    images = torch.randint(0, 256, (40, 3, encoder.input_size, encoder.input_size), generator=Seed(1).torch())
    images = images.to(torch.uint8)
    before = features(encoder, images, dtype=torch.float32)
    silence(encoder, torch.tensor([1, 5]), images[:8], "it")
    after = features(encoder, images, dtype=torch.float32)
    assert not after[:, [1, 5]].any()
    assert before[:, [1, 5]].any()
    rest = [i for i in range(encoder.width) if i not in (1, 5)]
    assert torch.allclose(after[:, rest], before[:, rest], rtol=1e-4, atol=1e-5)


def test_pruning_takes_the_excited_dimensions_until_the_trigger_fails() -> None:
    data = blobs(256)
    encoder = trained_encoder(data, steps=30)
    made, history = NeuralCleansePrune(success=0.3, most=0.9).purify_with_history(
        encoder, data, Seed(0), [pixel_evidence(16)]
    )
    x: Tensor = torch.as_tensor(data.inputs).float() / 255
    stamped = x.clone()
    stamped[:, :, -3:, -3:] = 1
    before = features(encoder, x, dtype=torch.float32)
    order = pruning_order(before, features(encoder, stamped, dtype=torch.float32))
    count = len(history["success"])
    gone = set((features(made, x, dtype=torch.float32).abs().amax(0) == 0).nonzero().flatten().tolist())
    assert gone >= set(order[:count].tolist())
    assert history["success"][-1] <= 0.3 or count == round(0.9 * encoder.width)
    assert all(one > 0.3 for one in history["success"][:-1])
    assert "purified" not in made.card.to_json()["source"]


def test_an_architecture_that_cannot_be_silenced_is_refused() -> None:
    encoder = hijacked()
    before = model_print(encoder.module)
    with pytest.raises(DataError, match="cannot be silenced"):
        NeuralCleansePrune().purify(encoder, bars(), Seed(0), [pixel_evidence(8)])
    assert model_print(encoder.module) == before
