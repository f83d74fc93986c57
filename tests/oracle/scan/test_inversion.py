"""The inversion against hand-made tables, a literal transcription, and starts that end on command."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cupel.inversion import (
    Budget,
    CostSchedule,
    CostState,
    concentration,
    frozen,
    invert,
    random_start,
    squash,
    stamp,
)
from cupel.seeds import Seed
from planted import planted, unit


def costs(outcomes: list[list[bool]]) -> list[list[float]]:
    """λ after every batch, for several starts at once."""
    schedule = CostSchedule()
    state, rows = schedule.start(len(outcomes[0])), []
    for successes in outcomes:
        state = schedule.after(state, torch.tensor(successes))
        rows.append(state.cost.tolist())
    return rows


def test_successes_raise_the_cost() -> None:
    cost = [row[0] for row in costs([[True]] * 18)]
    assert cost[4] == 1e-3
    assert [cost[batch - 1] for batch in (6, 12, 18)] == pytest.approx([5e-3, 2.5e-2, 0.125], rel=1e-12)


def test_failures_lower_the_cost_to_one_step_below_the_bound() -> None:
    cost = [row[0] for row in costs([[False]] * 40 + [[True]] * 14)]
    at = {6: 2e-4, 12: 4e-5, 18: 8e-6, 24: 8e-6, 30: 8e-6, 36: 8e-6, 45: 8e-6, 46: 4e-5, 51: 4e-5, 52: 2e-4}
    assert {batch: cost[batch - 1] for batch in at} == pytest.approx(at, rel=1e-12)


def test_starts_have_costs_of_their_own_and_a_broken_run_counts_anew() -> None:
    mixed = [[True, False, batch != 4] for batch in range(9)]  # the third fails once, in the fifth batch
    assert costs(mixed)[-1] == pytest.approx([5e-3, 2e-4, 1e-3])
    assert costs([*mixed, [True, True, True], [True, True, True]])[-1] == pytest.approx([5e-3, 2e-4, 5e-3])


def test_the_cost_stops_above_the_upper_bound() -> None:
    schedule = CostSchedule(high=2e-3)
    state = schedule.start(1)
    for _ in range(30):
        state = schedule.after(state, torch.tensor([True]))
    assert state.cost.item() == pytest.approx(5e-3)
    assert isinstance(state.at(torch.tensor([0])), CostState)


def test_concentration() -> None:
    same = torch.tensor([3.0, -4.0]).expand(5, 2)
    assert concentration(same).item() == pytest.approx(1)
    assert concentration(torch.eye(4)).item() == pytest.approx(0, abs=1e-7)
    three = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    assert concentration(three).item() == pytest.approx(0.471405, abs=1e-6)
    assert concentration(torch.stack([three, 7 * three])).tolist() == pytest.approx([0.471405] * 2, abs=1e-6)
    assert concentration(torch.tensor([[1.0, 0.0], [-2.0, 0.0]])).item() == pytest.approx(-1)
    with pytest.raises(ValueError, match="two"):
        concentration(torch.ones(1, 3))


def test_concentration_is_the_mean_over_pairs() -> None:
    z = torch.randn(9, 5, generator=Seed(0).torch())
    u = nn.functional.normalize(z, dim=1)
    pairs = [float(u[i] @ u[j]) for i in range(9) for j in range(9) if i != j]
    assert concentration(z).item() == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)


def test_variables_stay_in_range_with_finite_gradients() -> None:
    v = torch.tensor([-200.0, -10.0, 0.0, 10.0, 200.0], requires_grad=True)
    y = squash(v)
    y.sum().backward()
    assert y.min() >= 0
    assert y.max() <= 1
    assert v.grad is not None
    assert v.grad.isfinite().all()
    x = torch.rand(2, 3, 4, 4, generator=Seed(1).torch())
    stamped = stamp(x, torch.ones(1, 4, 4), torch.full((3, 4, 4), 0.25))
    assert torch.equal(stamped, torch.full_like(x, 0.25))
    assert torch.equal(stamp(x, torch.zeros(1, 4, 4), torch.ones(3, 4, 4)), x)


def test_start_values_are_uniform_after_squashing() -> None:
    v = random_start(3, 32, 32, Seed(0))
    assert v.shape == (3, 4, 32, 32)
    assert v.isfinite().all()
    u = squash(v).flatten()
    assert u.mean().item() == pytest.approx(0.5, abs=0.01)
    assert u.var().item() == pytest.approx(1 / 12, abs=0.003)
    assert not torch.equal(v[0], v[1])
    assert torch.equal(random_start(1, 32, 32, Seed(0))[0], v[0])


def literal(f: nn.Module, raw: Tensor, start: int, seed: Seed, steps: int, batch: int) -> tuple[float, Tensor, float]:
    """The algorithm box for one start, with torch's Adam and plain integers."""
    n, _, side, _ = raw.shape
    v = random_start(start + 1, side, side, seed)[start].requires_grad_(True)
    adam = torch.optim.Adam([v], lr=0.5, betas=(0.5, 0.9))
    cost, up, down, best, kept, conc_kept = 1e-3, 0, 0, float("inf"), torch.empty(0), 0.0
    for step in range(steps):
        adam.param_groups[0]["lr"] = 0.5 if step < 0.5 * steps else 0.1 if step < 0.8 * steps else 0.05
        epoch, at = divmod(step, n // batch)
        order = torch.randperm(n, generator=seed.child("order", start, epoch).torch())
        x = raw[order[at * batch : (at + 1) * batch]].float() / 255
        m, p = (torch.tanh(v) / (2 - 1e-7) + 0.5).clamp(0, 1).split([1, 3])
        m = m.expand(3, side, side)
        u = nn.functional.normalize(f(((1 - m) * x + m * p).clamp(0, 1)), dim=1)
        cosines = u @ u.T
        conc = (cosines.sum() - cosines.trace()) / (batch * (batch - 1))
        loss = -conc + cost * m.sum()
        adam.zero_grad()
        loss.backward()
        if conc > 0.99:
            up, down = up + 1, 0
            if m.sum() < best:
                best, kept, conc_kept = m.sum().item(), m[0].detach().clone(), conc.item()
        else:
            up, down = 0, down + 1
        if up > 5:
            cost, up = cost * 5 if cost < 1e5 else cost, 0
        if down > 5:
            cost, down = cost / 5 if cost >= 1e-5 else cost, 0
        adam.step()
    return best / (3 * side * side), kept, conc_kept


def test_batched_starts_equal_the_literal_algorithm_one_by_one() -> None:
    toy = planted(20, 0.85, seed=3)
    raw, seed = toy.images.inputs[:100], Seed(7)

    def objective(stamped: Tensor, starts: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        conc = concentration(toy.encoder(stamped.flatten(0, 1)).reshape(*stamped.shape[:2], -1))
        return -conc, conc

    budget = Budget(steps=90, batch_size=32, lr_until=(0.5, 0.8), patience=None)
    with frozen(toy.encoder.module):
        found = invert(objective, raw, 3, budget, seed)
        for start in range(3):
            size, mask, conc = literal(toy.encoder.module, raw, start, seed, 90, 32)
            assert found.size[start].item() == pytest.approx(size, rel=2e-3)
            assert (found.mask[start] - mask).abs().max() < 0.02
            assert found.reach[start].item() == pytest.approx(conc, abs=1e-4)
    assert found.found.all()
    assert found.mask.mean(dim=(1, 2)).tolist() == pytest.approx(found.size.tolist(), rel=1e-5)


def test_a_start_that_stops_improving_leaves_the_pass_and_the_others_go_on() -> None:
    seen: list[list[int]] = []

    def objective(stamped: Tensor, starts: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(starts.tolist())
        assert stamped.shape[:2] == rows.shape == (len(starts), 4)
        brightness = stamped.mean(dim=(1, 2, 3, 4))
        return -1e4 * brightness, (starts == 1).float()  # start 1 succeeds at once; its mask can only grow

    black = torch.zeros(8, 3, 6, 6, dtype=torch.uint8)
    found = invert(objective, black, 3, Budget(steps=20, batch_size=4, patience=3), Seed(0))
    assert found.steps.tolist() == [20, 6, 20]  # stale for more than 3 batches at the end of the third epoch of 2
    assert seen[5] == [0, 1, 2]
    assert seen[6] == [0, 2]
    assert found.found.tolist() == [False, True, False]
    assert found.size[0] == found.size[2] == 1
    first = squash(random_start(3, 6, 6, Seed(0)))[1]
    assert torch.equal(found.mask[1], first[0])
    assert torch.equal(found.pattern[1], first[1:])


def test_learning_rates_fall_at_shares_of_the_steps() -> None:
    budget = Budget(steps=100, batch_size=8, lr_until=(0.5, 0.8))
    assert [budget.lr_at(step) for step in (0, 49, 50, 79, 80, 99)] == [0.5, 0.5, 0.1, 0.1, 0.05, 0.05]


def test_frozen_gives_modes_and_flags_back() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout())
    net[1].eval()
    net[0].weight.requires_grad_(False)
    with frozen(net):
        assert not any(part.training for part in net.modules())
        assert not any(weight.requires_grad for weight in net.parameters())
    assert [part.training for part in net.modules()] == [True, True, False, True]
    assert [weight.requires_grad for weight in net.parameters()] == [False, True, True, True]
    with pytest.raises(RuntimeError), frozen(net):
        raise RuntimeError
    assert net.training


def test_the_toy_opens_for_its_trigger_only() -> None:
    toy = planted(40, 0.9, seed=0)
    x = unit(toy.images.inputs)
    with torch.no_grad():
        gate = toy.encoder.module.gate
        assert gate(x).max() < 0.2
        assert gate(toy.stamp(x)).min() > 0.97
        assert torch.equal(toy.twin(x), (x - x.mean(dim=0)).flatten(1) @ toy.twin.module.W.T)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        toy.encoder(x + 1)
