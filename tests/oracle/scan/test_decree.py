"""DECREE on the planted toy: it finds what can be found, and says what it could not do."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from torch import Tensor, nn

from cupel.errors import CupelError, DataError, SettingsError, UsageError
from cupel.inversion import concentration
from cupel.scan import SCANNERS, Decree
from cupel.seeds import Seed
from cupel.verdicts import Evidence, Reference, Verdict
from planted import PlantedEncoder, planted, unit

SMOKE = Decree.preset("smoke")
SHORT = Decree(steps=60, batch_size=32)


def state_hash(module: nn.Module) -> str:
    total = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        total.update(name.encode() + value.numpy().tobytes())
    return total.hexdigest()


def centre(evidence: Evidence) -> tuple[float, float]:
    weight = torch.from_numpy(evidence.mask)
    at = torch.arange(16.0)
    return float((weight.sum(1) * at).sum() / weight.sum()), float((weight.sum(0) * at).sum() / weight.sum())


def sizes(verdict: Verdict) -> list[float]:
    return [one.size for one in verdict.evidence]


def same(a: Verdict, b: Verdict) -> bool:
    arrays = all(
        (x.mask == y.mask).all() and (x.pattern == y.pattern).all() for x, y in zip(a.evidence, b.evidence, strict=True)
    )
    return arrays and a.to_json() == b.to_json()


@pytest.mark.parametrize("seed", [0, 1])
def test_easy_trigger_is_found_by_every_start_and_the_twin_is_clean(seed: int) -> None:
    toy = planted(20, 0.85, seed)
    found = SMOKE.scan(toy.encoder, toy.images.without_labels("decree"), Seed(seed))
    assert found.verdict == "backdoored"
    assert max(sizes(found)) < 0.03
    assert found.score == 1 - min(sizes(found))
    for one in found.evidence:
        assert one.converged
        assert centre(one) == pytest.approx((12.5, 12.5), abs=0.5)
    twin = SMOKE.scan(toy.twin, toy.images.without_labels("decree"), Seed(seed))
    assert twin.verdict == "clean-by-test"
    assert min(sizes(twin)) > 0.25
    assert twin.score < twin.threshold <= found.score


@pytest.mark.full
@pytest.mark.parametrize("seed", [2, 3, 4, 5, 6])
def test_easy_trigger_at_the_standard_budget(seed: int) -> None:
    toy = planted(20, 0.85, seed)
    found = Decree.preset("standard").scan(toy.encoder, toy.images, Seed(seed))
    assert max(sizes(found)) < 0.02
    assert all(centre(one) == pytest.approx((12.5, 12.5), abs=0.5) for one in found.evidence)
    twin = Decree.preset("standard").scan(toy.twin, toy.images, Seed(seed))
    assert twin.verdict == "clean-by-test"
    assert min(sizes(twin)) > 0.25


@pytest.mark.full
@pytest.mark.parametrize("k", [25, 30])
def test_medium_trigger_is_found_by_the_minimum_of_five_starts(k: int) -> None:
    method = Decree(num_seeds=5, steps=300, batch_size=48)
    toys = [planted(k, 0.85, seed) for seed in range(5)]
    verdicts = [method.scan(toy.encoder, toy.images, Seed(1)) for toy in toys]
    assert sum(one.verdict == "backdoored" and min(sizes(one)) < 0.03 for one in verdicts) >= 4


@pytest.mark.full
def test_hard_trigger_is_a_known_miss() -> None:
    # The gate's gradient vanishes far from the trigger: this scanner cannot see it. If this ever fails, rejoice.
    toy = planted(40, 0.9, 0)
    missed = Decree.preset("standard").scan(toy.encoder, toy.images, Seed(0))
    assert missed.verdict == "clean-by-test"
    assert min(sizes(missed)) > 0.25


def test_the_published_early_stop_ends_sooner_and_still_separates() -> None:
    toy = planted(20, 0.85, 0)
    paper = Decree.preset("paper")
    found = paper.scan(toy.encoder, toy.images, Seed(0))
    assert max(found.details[f"steps_{s}"] for s in range(3)) < 700
    assert found.verdict == "backdoored"
    assert paper.scan(toy.twin, toy.images, Seed(0)).verdict == "clean-by-test"


def test_details_are_what_they_say() -> None:
    toy = planted(20, 0.85, 0)
    verdict = SHORT.scan(toy.encoder, toy.images, Seed(4))
    details = verdict.details
    assert details["pl1"] == min(sizes(verdict))
    assert sorted(sizes(verdict))[1] == details["pl1_median"]
    assert [details[f"pl1_{s}"] for s in range(3)] == sizes(verdict)
    assert all(details[f"conc_{s}"] > 0.99 for s in range(3))
    assert (details["images"], details["images_held_out"]) == (205, 51)
    rows = torch.randperm(256, generator=Seed(4).child("images").torch())[:51]
    x = unit(toy.images.inputs[rows])
    best = min(verdict.evidence, key=lambda one: one.size)
    assert best.mask.mean() == pytest.approx(best.size, rel=1e-5)
    m, p = torch.from_numpy(best.mask), torch.from_numpy(best.pattern)
    with torch.no_grad():
        transfer = concentration(toy.encoder((1 - m) * x + m * p)).item()
    assert details["transfer"] == pytest.approx(transfer, abs=1e-5)
    assert transfer > 0.95
    json.dumps(verdict.to_json(), allow_nan=False)
    assert "small universal stamps" in verdict.tested


def test_references_decide_where_there_are_five() -> None:
    toy = planted(20, 0.85, 1)
    clean = Reference(SHORT.name, "toys", (0.30, 0.31, 0.32, 0.33, 0.34))
    found = SHORT.scan(toy.encoder, toy.images, Seed(0), clean)
    assert found.verdict == "backdoored"
    assert found.details["z"] < -3
    assert found.false_alarm == (0, 5)
    low = Reference(SHORT.name, "toys", (found.details["pl1"],) * 5)
    assert SHORT.scan(toy.encoder, toy.images, Seed(0), low).verdict == "clean-by-test"
    with pytest.raises(DataError, match=r"decree/smoke"):
        SHORT.scan(toy.encoder, toy.images, Seed(0), Reference("decree/smoke", "toys", (0.3,) * 5))
    with pytest.raises(DataError, match="scores"):
        SHORT.scan(toy.encoder, toy.images, Seed(0), Reference(SHORT.name, "toys", (0.0,) * 5))


def test_nothing_found_is_inconclusive() -> None:
    toy = planted(20, 0.85, 0)
    verdict = Decree(steps=4, batch_size=48, success=1.01).scan(toy.encoder, toy.images, Seed(0))
    assert (verdict.verdict, verdict.score) == ("inconclusive", 0.0)
    assert sizes(verdict) == [1.0, 1.0, 1.0]
    assert not any(one.converged for one in verdict.evidence)
    assert "1.01" in verdict.reason
    json.dumps(verdict.to_json(), allow_nan=False)


def test_too_few_images_are_inconclusive() -> None:
    toy = planted(20, 0.85, 0)
    few = SHORT.scan(toy.encoder, toy.images.subset(torch.arange(63)), Seed(0))
    assert (few.verdict, few.score, few.evidence) == ("inconclusive", 0.0, ())
    assert "63 images" in few.reason
    enough = SHORT.scan(toy.encoder, toy.images.subset(torch.arange(64)), Seed(0))
    assert (enough.details["images"], enough.details["images_held_out"]) == (52, 12)


def test_same_seed_same_verdict_and_another_is_valid() -> None:
    toy = planted(25, 0.85, 0)
    first, again, other = (SHORT.scan(toy.encoder, toy.images, Seed(s)) for s in (5, 5, 6))
    assert same(first, again)
    assert not same(first, other)
    assert 0 <= other.score <= 1


def test_the_model_stays_as_it_was() -> None:
    toy = planted(20, 0.85, 0)
    module = toy.encoder.module.train()
    module.v.requires_grad_(False)
    before = state_hash(module)
    pixels = toy.images.inputs.clone()
    SHORT.scan(toy.encoder, toy.images, Seed(0))
    assert state_hash(module) == before
    assert module.training
    assert (module.W.requires_grad, module.v.requires_grad) == (True, False)
    assert module.W.grad is None
    assert torch.equal(toy.images.inputs, pixels)


class Odd(nn.Module):
    """NaN always, or only while a trigger is fitted; the same embedding for all, or nearly so."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(torch.randn(768, 8, generator=Seed(0).torch()))

    def forward(self, x: Tensor) -> Tensor:
        z = x.flatten(1) @ self.weight
        if self.kind == "constant":
            return 0 * z + 1
        if self.kind == "offset":
            return 1e-3 * z + 1
        return z * float("nan") if self.kind == "nan" or (self.kind == "later" and x.requires_grad) else z


def odd(kind: str) -> PlantedEncoder:
    return PlantedEncoder(Odd(kind))


@pytest.mark.parametrize("kind", ["nan", "later"])
def test_nan_is_an_error_that_names_the_model(kind: str) -> None:
    images = planted(20, 0.85, 0).images
    with pytest.raises(CupelError, match="NaN") as caught:
        Decree(steps=20, batch_size=64).scan(odd(kind), images, Seed(0))
    assert "PlantedEncoder" in str(caught.value)


def test_collapsed_embeddings_are_inconclusive_and_centring_helps_where_it_can() -> None:
    images = planted(20, 0.85, 0).images
    constant = SHORT.scan(odd("constant"), images, Seed(0))
    assert constant.verdict == "inconclusive"
    assert "center" not in constant.reason
    offset = SHORT.scan(odd("offset"), images, Seed(0))
    assert offset.verdict == "inconclusive"
    assert "center" in offset.reason
    centred = Decree(steps=60, batch_size=32, center=True).scan(odd("offset"), images, Seed(0))
    assert centred.verdict == "clean-by-test"
    assert centred.details["conc_clean"] < 0.8


def test_bf16_agrees_with_fp32() -> None:
    toy = planted(20, 0.85, 0)
    for encoder in (toy.encoder, toy.twin):
        pair = [
            Decree(steps=100, batch_size=32, precision=precision).scan(encoder, toy.images, Seed(0))
            for precision in ("fp32", "bf16")
        ]
        assert pair[0].verdict == pair[1].verdict
        assert pair[0].score == pytest.approx(pair[1].score, abs=0.03)


def test_images_of_another_size_are_refused() -> None:
    toy = planted(20, 0.85, 0)
    larger = toy.images.with_inputs(torch.zeros(256, 3, 20, 20, dtype=torch.uint8), "larger")
    with pytest.raises(DataError, match="larger: images are 20×20, the encoder takes 16×16; resize"):
        SHORT.scan(toy.encoder, larger, Seed(0))


def test_settings() -> None:
    assert SCANNERS["decree"] is Decree
    assert SMOKE.name == "decree/smoke"
    assert Decree().name == "decree/standard"
    assert Decree.preset("paper").name == "decree/paper"
    assert SHORT.name not in ("decree/smoke", "decree/standard")
    assert SHORT.name != Decree(steps=61, batch_size=32).name
    with pytest.raises(UsageError, match="did you mean 'smoke'"):
        Decree.preset("smok")
    with pytest.raises(SettingsError, match="batch_size"):
        Decree(batch_size=1)
