"""Encoders with a gate: open it changes nothing; what it leaves out, against loops; on disk, folded, tuned, stamped."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cupel.checkpoint.inspect import inspect_file
from cupel.cost import counting
from cupel.encoders import Fast, Gated, Projected, ResNet18, ResNet50
from cupel.encoders.blocks import blocks_of
from cupel.encoders.gated import Gate, gated, outlying, trunk_of
from cupel.encoders.storage import load_encoder, save_encoder
from cupel.errors import DataError
from cupel.folding import folded, inference_copy
from cupel.probe.finetune import FineTune
from cupel.purify.unlabelled import fresh_copy
from cupel.seeds import Seed
from fingerprints import same_state
from toys import blobs

SMALL = Fast(width=4, input_size=32)
BASES = [SMALL, ResNet18(width_multiplier=0.0625), ResNet50(input_size=64)]


def worn(base: object = SMALL, seed: int = 0):
    """As after training: statistics and affine parts that differ from channel to channel."""
    encoder, draw = base.build(Seed(seed)), Seed(seed).torch()
    for part in encoder.module.modules():
        if isinstance(part, nn.BatchNorm2d):
            with torch.no_grad():
                part.running_mean.normal_(0, 0.1, generator=draw)
                part.running_var.uniform_(0.5, 1.5, generator=draw)
                part.weight.uniform_(0.5, 1.5, generator=draw)
                part.bias.normal_(0, 0.2, generator=draw)
    return encoder


def faint(n: int = 128, side: int = 32) -> Tensor:
    """Images of little contrast, uint8."""
    return torch.randint(115, 141, (n, 3, side, side), generator=Seed(1).torch()).to(torch.uint8)


def shown(images: Tensor) -> Tensor:
    return images.float() / 255


def stamped(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, :, 20:28, 20:28] = 255
    return x


@pytest.mark.parametrize("base", BASES, ids=lambda base: type(base).__name__)
@torch.no_grad()
def test_an_open_gate_changes_nothing(base):
    plain = worn(base)
    made = gated(plain, plain, faint(8, plain.input_size))
    for name in ("limit", "low"):
        made.module.backbone.gate.get_buffer(name).fill_(torch.inf)
    x = torch.rand(3, 3, plain.input_size, plain.input_size, generator=Seed(0).torch())
    assert torch.equal(made(x), plain(x))
    fresh = Gated(base=base).build(Seed(3))
    assert torch.equal(fresh(x), base.build(Seed(3))(x))


@pytest.mark.parametrize("base", BASES, ids=lambda base: type(base).__name__)
@torch.no_grad()
def test_the_alarm_is_the_network_up_to_the_last_block(base):
    encoder = worn(base)
    x = torch.rand(2, 3, encoder.input_size, encoder.input_size, generator=Seed(0).torch())
    seen: list[Tensor] = []
    hook = blocks_of(encoder.module)[-1].register_forward_pre_hook(lambda part, inputs: seen.append(inputs[0].clone()))
    encoder(x)
    hook.remove()
    inside = torch.addcmul(encoder.module.shift, x, encoder.module.scale)
    assert float((trunk_of(encoder)(inside) - seen[0]).norm() / seen[0].norm()) < 1e-5


def test_what_is_left_out_against_loops():
    draw = Seed(2).torch()
    a, mean = 2 * torch.randn(2, 3, 6, 5, generator=draw), torch.randn(3, generator=draw)
    white = torch.randn(3, 3, generator=draw)
    limit, low = 60.0, 15.0
    far = [
        [[float((((a[i, :, y, x] - mean) @ white) ** 2).sum()) for x in range(5)] for y in range(6)] for i in range(2)
    ]
    bad = np.array(far) > limit
    for _ in range(2):
        grown = bad.copy()
        for i, y, x in np.ndindex(2, 6, 5):
            near = bad[i, max(0, y - 1) : y + 2, max(0, x - 1) : x + 2].any()
            grown[i, y, x] |= bool(near) and far[i][y][x] > low
        bad = grown
    assert 0 < bad.sum() < bad.size
    assert bad.sum() > (np.array(far) > limit).sum()
    found = outlying(a, mean, white, torch.tensor(limit), torch.tensor(low))
    assert np.array_equal(found[:, 0].numpy() > 0, bad)


def test_statistics_of_clean_images_in_closed_form():
    gate, draw = Gate(2, 8, 8), Seed(0).torch()
    a = torch.randn(200, 2, 8, 8, generator=draw, dtype=torch.float64) * torch.tensor([3.0, 0.5]).view(1, 2, 1, 1) + 7
    kept = gate.learn(a.float(), limit=0.99, low=0.9, floor=0.0, trimmed=0.0)
    assert sorted(kept.tolist()) == list(range(200))
    torch.testing.assert_close(gate.mean, a.mean(dim=(0, 2, 3)).float())
    inverse = torch.linalg.inv(torch.cov(a.movedim(1, -1).flatten(0, 2).T)).float()
    torch.testing.assert_close(gate.white @ gate.white.T, inverse, rtol=1e-3, atol=1e-4)
    # squared distances of two normal variables are χ² with two degrees of freedom: quantile −2 ln(1 − q)
    assert float(gate.limit) == pytest.approx(-2 * np.log(0.01), rel=0.05)
    assert float(gate.low) == pytest.approx(-2 * np.log(0.1), rel=0.05)


def test_a_direction_that_never_varies_has_a_floor():
    gate = Gate(2, 4, 4)
    a = torch.randn(50, 2, 4, 4, generator=Seed(0).torch()) * torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)
    gate.learn(a, limit=0.999, low=0.95, floor=0.01, trimmed=0.0)
    variance = float(a[:, 0].var())
    wanted = sorted([1 / (1.01 * variance) ** 0.5, 1 / (0.01 * variance) ** 0.5])
    torch.testing.assert_close(gate.white.norm(dim=0).sort().values, torch.tensor(wanted), rtol=1e-3, atol=1e-3)


def test_images_with_a_trigger_among_them_do_no_harm_when_trimmed():
    draw = Seed(0).torch()
    a = torch.randn(200, 3, 8, 8, generator=draw)
    mixed = a.clone()
    mixed[:10, :, :3, :3] += 25.0
    gates = {}
    for trimmed in (0.0, 0.1):
        gate = gates[trimmed] = Gate(3, 8, 8)
        kept = gate.learn(mixed, limit=0.999, low=0.95, floor=0.01, trimmed=trimmed)
        assert bool((kept < 10).any()) == (trimmed == 0)
        found = outlying(mixed, gate.mean, gate.white, gate.limit, gate.low)[:10, 0, :3, :3]
        assert bool((found == 1).all()) == (trimmed > 0)
    assert float(gates[0.0].limit) > 5 * float(gates[0.1].limit)
    clean = Gate(3, 8, 8)  # what it would have learned without them
    clean.learn(a[10:], limit=0.999, low=0.95, floor=0.01, trimmed=10 / 190)
    found = gates[0.1]
    torch.testing.assert_close(found.white @ found.white.T, clean.white @ clean.white.T, rtol=0.05, atol=0.05)
    for name in ("mean", "limit", "low"):
        torch.testing.assert_close(found.get_buffer(name), clean.get_buffer(name), rtol=0.05, atol=0.05)


@torch.no_grad()
def test_what_no_clean_image_shows_is_left_out_and_only_there():
    encoder, x = worn(), faint()
    made = gated(encoder, encoder, x)
    gate = made.module.backbone.gate

    def left_out(images: Tensor) -> Tensor:
        inside = torch.addcmul(made.module.shift, shown(images), made.module.scale)
        return outlying(made.module.backbone.alarm(inside), gate.mean, gate.white, gate.limit, gate.low)[:, 0]

    assert float(left_out(x).mean()) < 0.01
    hit = left_out(stamped(x)).mean(dim=0)
    assert hit.shape == (8, 8)
    assert float(hit[4:, 4:].mean()) > 0.3
    assert float(hit[:3].max()) < 0.05
    hit, clean = shown(stamped(x)), shown(x)
    moved = (made(hit) - made(clean)).norm(dim=1).mean()
    assert float(moved) < 0.5 * float((encoder(hit) - encoder(clean)).norm(dim=1).mean())


@torch.no_grad()
def test_what_is_left_out_gets_what_clean_images_have_there():
    encoder, x = worn(), faint()
    mixed = torch.cat([x, stamped(x[:24])])

    def before_the_gate(images: Tensor) -> Tensor:
        h = torch.addcmul(encoder.module.shift, shown(images), encoder.module.scale)
        for name, part in encoder.module.backbone.named_children():
            if name == "layer3":
                break
            h = part(h)
        return h

    clean = before_the_gate(x).mean(dim=0)
    fill = gated(encoder, encoder, x, trimmed=0.0, at_once=7).module.backbone.gate.fill
    torch.testing.assert_close(fill, clean, rtol=1e-4, atol=1e-5)
    trimmed = gated(encoder, encoder, mixed, trimmed=0.2).module.backbone.gate.fill
    off = (before_the_gate(mixed).mean(dim=0) - clean).abs().max()
    assert float((trimmed - clean).abs().max()) < 0.25 * float(off)


def test_round_trip(tmp_path):
    encoder = worn()
    made = gated(encoder, encoder, faint())
    save_encoder(made, tmp_path / "e.safetensors")
    again = load_encoder(tmp_path / "e.safetensors")
    assert again.card.architecture == {"method": "gated", "base": dict(encoder.card.architecture)}
    assert same_state(again.module, made.module)
    x = shown(stamped(faint(4)))
    assert torch.equal(again(x), made(x))
    save_encoder(Gated(base=SMALL).build(Seed(0)), tmp_path / "open.safetensors")
    assert same_state(load_encoder(tmp_path / "open.safetensors").module, Gated(base=SMALL).build(Seed(0)).module)
    assert "gated" in str(inspect_file(tmp_path / "e.safetensors"))


@torch.no_grad()
def test_folded_and_for_inference():
    encoder = worn()
    made, x = gated(encoder, encoder, faint()), shown(stamped(faint(6)))
    assert type(folded(made)).__name__ == "Folded"
    torch.testing.assert_close(folded(made)(x), made(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(inference_copy(made)(x), made(x), rtol=1e-4, atol=1e-5)
    rounded = inference_copy(made, torch.bfloat16)(x)
    assert float((rounded - made(x)).norm() / made(x).norm()) < 0.05


def test_gradients_reach_images_and_weights_around_the_alarm():
    encoder = worn()
    made = gated(encoder, encoder, faint())
    x = shown(faint(4)).requires_grad_()
    made(x).square().sum().backward()
    assert float(x.grad.abs().sum()) > 0
    names = {name for name, p in made.module.named_parameters()}
    assert names == {name for name, p in encoder.module.named_parameters()}
    assert all(p.grad is not None for p in made.module.parameters())


def test_fine_tuning_leaves_the_alarm_as_it_was():
    data = blobs(64, size=32)
    encoder = worn()
    made = gated(encoder, encoder, data.inputs[torch.arange(64)])
    assert len(blocks_of(made.module)) == len(blocks_of(encoder.module))
    tuned = FineTune(epochs=2, batch_size=16, lr=0.1).fit(made, data, Seed(0)).encoder
    before, after = made.module.state_dict(), tuned.module.state_dict()
    watched = [name for name in before if ".alarm." in name or ".gate." in name]
    assert len(watched) > 6
    assert all(torch.equal(before[name], after[name]) for name in watched)
    assert not torch.equal(before["backbone.layer3.conv1.weight"], after["backbone.layer3.conv1.weight"])


@torch.no_grad()
def test_the_alarm_of_an_encoder_that_came_with_one_is_not_trusted():
    plain, x = worn(), faint()
    blind = gated(plain, plain, x)
    for value in blind.module.backbone.alarm.buffers():
        value.zero_()
    again = gated(blind, blind, x)
    assert same_state(again.module, gated(plain, plain, x).module)
    assert again.card.architecture == blind.card.architecture


def test_a_student_from_scratch_keeps_the_alarm():
    encoder = worn()
    made = gated(encoder, encoder, faint())
    fresh = fresh_copy(made, Seed(7)).module.state_dict()
    for name, value in made.module.state_dict().items():
        if ".alarm." in name or ".gate." in name:
            assert torch.equal(fresh[name], value)
    assert not torch.equal(fresh["backbone.conv1.weight"], made.module.state_dict()["backbone.conv1.weight"])


def test_images_are_counted_once():
    encoder = worn()
    made, x = gated(encoder, encoder, faint()), shown(faint(8))
    with counting() as cost:
        made(x.requires_grad_())
        folded(made)(x)
        inference_copy(made)(x.detach())
    assert (cost.forward, cost.backward) == (24, 16)


def test_no_gate_fits_into_an_encoder_that_keeps_its_projector():
    encoder = Projected(base=SMALL).build(Seed(0))
    with pytest.raises(DataError, match=r"'projected'.*it goes into fast, resnet18, resnet50"):
        gated(encoder, encoder, faint())
