"""CLP: gains against NumPy's singular values, the channel that stands out, shortcuts and their BatchNorms."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cupel.encoders import Fast, ImageEncoder
from cupel.errors import DataError, UsageError
from cupel.purify.clp import CLP, channel_gains, outliers
from cupel.seeds import Seed
from planted import planted

NO_DATA: Any = SimpleNamespace(manifest=None)  # neither images nor labels are looked at


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def encoder() -> ImageEncoder:
    """Channels of a layer have gains of one size, as those of a trained one do."""
    made = Fast(width=16, input_size=16).build(Seed(0))
    with torch.no_grad():
        for part in made.module.modules():
            if isinstance(part, nn.Conv2d):
                factors = torch.linspace(0.98, 1.02, len(part.weight)).view(-1, 1, 1, 1)
                part.weight.copy_(part.weight[:1].expand_as(part.weight) * factors)
    return made


def test_gains_are_singular_values_times_the_scale_of_batch_norm() -> None:
    kernel, gamma, variance = draw(5, 3, 3, 3), draw(5, seed=1), draw(5, seed=2).square() + 0.1
    wanted = [
        np.linalg.svd(kernel[k].reshape(3, 9).numpy().astype(float), compute_uv=False)[0]
        * abs(float(gamma[k])) / math.sqrt(float(variance[k]))
        for k in range(5)
    ]  # fmt: skip
    np.testing.assert_allclose(channel_gains(kernel, gamma, variance).numpy(), wanted, rtol=1e-5)


def test_a_gain_bounds_what_a_channel_can_amplify() -> None:
    """For a 1×1 kernel the gain is the Lipschitz constant itself."""
    kernel, gamma, variance = draw(1, 4, 1, 1), torch.tensor([2.0]), torch.tensor([0.25])
    gain = float(channel_gains(kernel, gamma, variance))
    x = draw(1000, 4, seed=3)
    out = (x @ kernel.flatten()) * 2.0 / 0.5
    assert float((out.abs() / x.norm(dim=1)).max()) <= gain + 1e-4
    direction = kernel.flatten() / kernel.norm()
    assert float((direction @ kernel.flatten()) * 4).__abs__() == pytest.approx(gain, rel=1e-5)


@pytest.mark.parametrize("u", [0.5, 2.0, 3.0])
def test_outliers_are_those_of_the_formula(u: float) -> None:
    gains = [1.0, 1.1, 0.9, 1.0, 1.2, 0.8, 1.0, 1.05, 0.95, 1.0, 1.1, 0.9, 6.0]
    mean = sum(gains) / len(gains)
    std = math.sqrt(sum((g - mean) ** 2 for g in gains) / (len(gains) - 1))
    assert outliers(torch.tensor(gains), u).tolist() == [g > mean + u * std for g in gains]
    assert outliers(torch.tensor([7.0]), u).tolist() == [False]


def test_only_the_channel_that_stands_out_is_cut() -> None:
    given = encoder()
    with torch.no_grad():
        given.module.backbone.layer1.conv1.weight[5] *= 20
    before = {k: v.clone() for k, v in given.module.state_dict().items()}
    made, history = CLP().purify_with_history(given, NO_DATA, Seed(0))
    assert all(torch.equal(before[k], v) for k, v in given.module.state_dict().items())
    changed = {k for k, v in made.module.state_dict().items() if not torch.equal(before[k], v)}
    assert changed <= {"backbone.layer1.bn1.weight", "backbone.layer1.bn1.bias"}
    norm = made.module.backbone.layer1.bn1
    assert norm.weight.ne(0).tolist() == [k != 5 for k in range(16)]
    assert norm.bias[5].item() == 0
    assert sorted(history["pruned"])[-2:] == [0.0, 1 / 16]
    untouched = CLP(u=math.inf).purify(given, NO_DATA, Seed(0))
    assert all(torch.equal(before[k], v) for k, v in untouched.module.state_dict().items())


def test_a_shortcut_is_paired_with_its_own_batch_norm() -> None:
    given = encoder()
    with torch.no_grad():
        given.module.backbone.layer2.downsample[0].weight[7] *= 50
    made = CLP().purify(given, NO_DATA, Seed(0)).module.backbone
    assert (made.layer2.downsample[1].weight == 0).nonzero().tolist() == [[7]]
    assert bool((made.layer2.bn2.weight != 0).all())


def test_an_encoder_without_batch_norm_is_refused() -> None:
    with pytest.raises(DataError, match="no convolution with a BatchNorm"):
        CLP().purify(planted(30, 0.85, seed=0, n=8).encoder, NO_DATA, Seed(0))
    with pytest.raises(UsageError, match="unknown 'smok'"):
        CLP.preset("smok")
