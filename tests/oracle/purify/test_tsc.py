"""TSC: permutations that change nothing, assignments, curves and statistics in closed form."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cupel.encoders import ENCODERS, Fast, ImageEncoder
from cupel.errors import DataError, SettingsError
from cupel.pretrain.heads import mlp
from cupel.protocols import Batch
from cupel.purify.symmetry import ChannelGroups, Moments, assignment, permuted
from cupel.purify.tsc import TSC
from cupel.purify.tsc_learner import CurveLearner, along, middle
from cupel.purify.unlabelled import recompute_statistics
from cupel.seeds import Seed
from cupel.types import Dataset
from fingerprints import same_state
from toys import blobs, small_encoder, trained_encoder

DATA = blobs(64)
SHORT: dict[str, Any] = {"projector_epochs": 1, "warmup_epochs": 1, "tuning_epochs": 1, "batch_size": 32}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lively(encoder: ImageEncoder) -> nn.Sequential:
    """Encoder and projector in eval mode, with statistics and affine parts that tell channels apart."""
    network = nn.Sequential(encoder.module, mlp(encoder.width, 12, 5, seed=Seed(1)))
    with torch.no_grad():
        for i, part in enumerate(network.modules()):
            if isinstance(part, nn.BatchNorm2d | nn.BatchNorm1d):
                part.weight.uniform_(0.5, 1.5, generator=Seed(i).torch())
                part.bias.normal_(0, 0.3, generator=Seed(i).torch())
                part.get_buffer("running_mean").normal_(0, 0.2, generator=Seed(i).torch())
    return network.eval()


def shuffles(groups: ChannelGroups, network: nn.Module, seed: int = 0) -> list[Tensor]:
    state = network.state_dict()
    sizes = [state[entries[0][0]].shape[entries[0][1]] for entries in groups.members]
    return [torch.randperm(n, generator=Seed(seed).child(i).torch()) for i, n in enumerate(sizes)]


def small(name: str) -> ImageEncoder:
    sizes: dict[str, dict[str, Any]] = {
        "fast": {"width": 8},
        "resnet18": {"width_multiplier": 0.0625},
        "projected": {"base": Fast(width=4, input_size=16)},
    }
    extra = {} if name == "projected" else {"input_size": 16}
    return ENCODERS[name](**sizes[name], **extra).build(Seed(0))


@pytest.mark.parametrize("name", ["fast", "resnet18", "projected"])
def test_permuting_changes_weights_but_no_output(name: str) -> None:
    network = lively(small(name))
    groups = ChannelGroups.of(network)
    x = torch.rand(4, 3, 16, 16, generator=Seed(0).torch())
    state = {k: v.clone() for k, v in network.state_dict().items()}
    other = permuted(state, groups, shuffles(groups, network))
    assert sum(not torch.equal(other[k], v) for k, v in state.items()) > len(state) / 2
    with torch.no_grad():
        before = network(x)
        network.load_state_dict(other)
        after = network(x)
    assert float((before - after).abs().max()) < 1e-5
    assert float(before.std()) > 0.01


def test_every_hidden_channel_is_in_a_group_and_streams_share_one() -> None:
    network = lively(small("fast"))
    groups = ChannelGroups.of(network)
    assert len(groups.members) == 7  # three streams, three inner layers, the projector's
    entries = list(itertools.chain(*groups.members))
    assert len(entries) == len(set(entries))
    free = {("0.backbone.conv1.weight", 1), ("1.3.weight", 0), ("1.3.bias", 0)}  # pixels, and the output
    dims = {(k, d) for k, v in network.state_dict().items() for d in range(min(v.ndim, 2))}
    assert dims - set(entries) == free
    stream = next(g for g in groups.members if ("0.backbone.conv1.weight", 0) in g)
    assert {("0.backbone.layer1.conv2.weight", 0), ("0.backbone.layer2.downsample.0.weight", 1)} <= set(stream)


def test_networks_that_cannot_be_followed_are_refused() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if float(x.sum()) > 0 else -x

    with pytest.raises(DataError, match="cannot be traced"):
        ChannelGroups.of(Odd())
    with pytest.raises(DataError, match="cannot be followed through '1'"):
        ChannelGroups.of(nn.Sequential(nn.Conv2d(3, 4, 1), nn.PixelShuffle(2)))
    with pytest.raises(DataError, match="grouped"):
        ChannelGroups.of(nn.Sequential(nn.Conv2d(4, 4, 3, groups=4)))


@pytest.mark.parametrize("metric", ["correlation", "l2"])
def test_the_best_assignment_finds_the_shuffle(metric: Any) -> None:
    network = lively(small("fast"))
    groups, method = ChannelGroups.of(network), TSC(metric=metric, statistics_batch=24)
    state = {k: v.clone() for k, v in network.state_dict().items()}
    known = shuffles(groups, network)
    other = permuted(state, groups, known)
    found = method.orders(groups, other, state, DATA, best=True)
    for order, true, seen in zip(found, known, groups.activations(other, DATA.inputs.float() / 255), strict=True):
        alive = seen.std(dim=0) > 1e-6  # channels that are always 0 cannot be told apart
        assert int(alive.sum()) >= 3
        assert torch.equal(order[alive], true[alive])
    assert all(torch.equal(v, state[k]) for k, v in network.state_dict().items())  # nothing is left behind


def test_worst_is_at_most_identity_is_at_most_best() -> None:
    network = lively(small("fast"))
    groups, method = ChannelGroups.of(network), TSC()
    state = dict(network.state_dict())
    a = groups.activations(state, DATA.inputs.float() / 255)
    other = permuted(state, groups, shuffles(groups, network, 3))
    b = groups.activations(other, DATA.inputs.float() / 255)
    for i, (p, q) in enumerate(zip(a, b, strict=True)):
        alike = Moments.of(p, q).likeness()
        total = {}
        for best in (False, True):
            order = assignment(alike, best)
            total[best] = float(alike[torch.arange(len(order)), order].sum())
            assert sorted(order.tolist()) == list(range(len(order)))
        assert total[False] <= float(alike.diagonal().sum()) <= total[True]
        worst = method.orders(groups, state, other, DATA, best=False)[i]
        assert float(alike[torch.arange(len(worst)), worst].sum()) == pytest.approx(total[False], abs=1e-6)


def test_likeness_is_correlation_and_squared_distance_of_all_rows() -> None:
    a, b = draw(50, 3) + 4, 2 * draw(50, 3, seed=1) - 1
    b[:, 2] = 7.0  # never changes
    sums = Moments.of(a[:20], b[:20]).plus(Moments.of(a[20:], b[20:]))
    wanted = torch.corrcoef(torch.cat([a, b[:, :2]], dim=1).double().T)[:3, 3:]
    torch.testing.assert_close(sums.likeness()[:, :2], wanted, atol=1e-9, rtol=0)
    assert sums.likeness()[:, 2].abs().max() == 0
    apart = ((a[:, :, None] - b[:, None, :]).double() ** 2).mean(dim=0)
    torch.testing.assert_close(sums.likeness("l2"), -apart, atol=1e-5, rtol=0)


def test_the_curve() -> None:
    a, c, b = ({"w": draw(3, seed=s)} for s in range(3))
    assert torch.equal(along(0.0, a, c, b)["w"], a["w"])
    assert torch.equal(along(1.0, a, c, b)["w"], b["w"])
    one = {"w": torch.ones(1, dtype=torch.float64)}
    for t in torch.linspace(0, 1, 11).tolist():
        assert float(along(t, one, one, one)["w"]) == pytest.approx(1)
        straight = along(t, a, middle(a, b), b)["w"]
        torch.testing.assert_close(straight, (1 - t) * a["w"] + t * b["w"])


def ends(network: nn.Sequential) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    groups = ChannelGroups.of(network)
    a = {k: v.clone() for k, v in network.state_dict().items()}
    return a, permuted(a, groups, shuffles(groups, network))


def test_the_loss_on_the_curve_falls_below_that_on_the_line_and_its_ends_stay() -> None:
    settings = TSC(steps=25, batch_size=32, lr=0.01)
    network = lively(trained_encoder(blobs(128), steps=20))
    a, b = ends(network)
    kept = [{k: v.clone() for k, v in one.items()} for one in (a, b)]
    learner = CurveLearner(settings, network, a, b)
    first = {k: v.detach().clone() for k, v in network.named_parameters()}
    torch.testing.assert_close(first["1.0.weight"], (a["1.0.weight"] + b["1.0.weight"]) / 2)
    _ = settings.trained(learner, DATA, Seed(0), None)

    def loss_at_half() -> float:
        batch = Batch(DATA.inputs, torch.arange(64), Seed(5))
        with torch.no_grad():
            return float(learner.contrast(batch, learner.at(0.5))[0])

    curved = loss_at_half()
    learner.put(first)
    assert curved < loss_at_half() - 0.05
    for one, before in zip((a, b), kept, strict=True):
        assert all(torch.equal(v, before[k]) for k, v in one.items())


def test_the_penalty_is_half_its_weight_times_the_square_of_the_point() -> None:
    network = lively(small_encoder())
    a, b = ends(network)
    batch, losses = Batch(DATA.inputs[:16], torch.arange(16), Seed(5)), []
    for penalty in (0.0, 0.5):
        learner = CurveLearner(TSC(penalty=penalty), network, a, b)
        losses.append(learner.loss(batch)[0].item())
        t = float(torch.rand((), generator=batch.seed.child("t").torch()))
        square = sum(v.square().sum().item() for v in learner.at(t).values())
    assert losses[1] - losses[0] == pytest.approx(0.25 * square, rel=1e-3)


def test_statistics_are_those_of_one_pass_whatever_was_stored() -> None:
    made = []
    for start in (0.0, 5.0):
        net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        with torch.no_grad():
            net[0].weight.copy_(draw(4, 3, 1, 1))
            net[0].bias.zero_()
            net[1].running_mean.fill_(start)
        net.eval()
        recompute_statistics(net, DATA, 24)
        made.append(net)
        assert not net[1].training
        assert net[1].momentum == 0.1
    seen = made[0][0](DATA.inputs[:48].float() / 255).detach()  # two full batches; the rest of 16 is left out
    batches = seen.split(24)
    mean = sum(one.mean(dim=(0, 2, 3)) for one in batches) / 2
    var = sum(one.var(dim=(0, 2, 3)) for one in batches) / 2
    for net in made:
        torch.testing.assert_close(net[1].running_mean, mean)
        torch.testing.assert_close(net[1].running_var, var)


def test_at_t_nought_only_the_order_of_channels_and_statistics_change() -> None:
    given = trained_encoder(blobs(128), steps=20)
    settings = TSC(**{**SHORT, "warmup_epochs": 0}, t=0.0, rounds=1, steps=2)
    made = settings.purify(given, DATA, Seed(0))
    for (name, a), b in zip(given.module.named_parameters(), made.module.parameters(), strict=True):
        assert torch.equal(a.detach().flatten().sort().values, b.detach().flatten().sort().values), name
    x = DATA.inputs.float() / 255
    recomputed = given.copy()
    recompute_statistics(recomputed.module, DATA, settings.statistics_batch)
    with torch.no_grad():
        wanted, got = recomputed(x), made(x)
    torch.testing.assert_close(got.sort(dim=1).values, wanted.sort(dim=1).values, atol=1e-4, rtol=1e-3)


@pytest.mark.full
def test_the_whole_method_leaves_the_input_alone_and_repeats_itself(tmp_path: Any) -> None:
    given = trained_encoder(blobs(128), steps=20)
    before = given.copy()
    settings = TSC(**SHORT, rounds=2, steps=3)
    data: Dataset = DATA.without_labels("tsc")
    made, history = settings.purify_with_history(given, data, Seed(0), checkpoint=tmp_path / "state")
    assert same_state(given.module, before.module)
    assert len(history["loss"]) == 2 + 2 + 3 * 4 + 2  # projector, warm-up, four curves, one tuning
    assert same_state(made.module, settings.purify(given, data, Seed(0)).module)
    assert not same_state(made.module, settings.purify(given, data, Seed(1)).module)
    assert list(tmp_path.iterdir()) == []


def test_statistics_cannot_be_kept() -> None:
    with pytest.raises(SettingsError, match="batch_norm"):
        TSC(batch_norm="frozen")
