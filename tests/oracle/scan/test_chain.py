"""Several scanners as one: the worst verdict, everything that was tested, all that was found."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from cupel.encoders import Fast
from cupel.seeds import Seed
from cupel.types import Dataset
from cupel.verdicts import Evidence, Reference, Verdict
from cupel.vet.chain import default_chain, scan_encoder, scanner_label, together
from planted import planted
from toys import blobs


def evidence(size: float, converged: bool = True) -> Evidence:
    zeros = np.zeros((2, 2), dtype=np.float32)
    return Evidence(zeros, np.zeros((3, 2, 2), dtype=np.float32), size, converged, "test")


def said(word: str, score: float, tested: str, *found: Evidence) -> Verdict:
    details = {"forward_images": 10.0, "backward_images": 4.0, "own": score}
    return Verdict(word, score, 0.5, tested, found, details, f"because {word}", peak_memory_mib=score)


def test_one_scanner_stays_as_it_is() -> None:
    one = said("suspicious", 0.6, "a")
    assert together([("a", one)]) is one


def test_the_worst_counts_and_brings_the_others_findings() -> None:
    a, b, c, d = evidence(0.1), evidence(0.2), evidence(0.3), evidence(0.4, converged=False)
    each = [
        ("a", said("clean-by-test", 0.2, "stamps", a)),
        ("b", said("backdoored", 0.9, "windows", b)),
        ("c", said("suspicious", 0.7, "colours", c, d)),
    ]
    made = together(each)
    assert (made.verdict, made.score, made.threshold) == ("backdoored", 0.9, 0.5)
    assert made.evidence == (b, c)
    assert made.tested == "stamps; windows; colours"
    assert made.reason == "b: because backdoored"
    assert made.details == {"forward_images": 30, "backward_images": 12, "own": 0.9}
    assert made.peak_memory_mib == 0.9


@pytest.mark.parametrize(
    ("words", "worst"),
    [
        (("clean-by-test", "inconclusive"), "inconclusive"),
        (("inconclusive", "suspicious"), "suspicious"),
        (("clean-by-test", "clean-by-test"), "clean-by-test"),
    ],
)
def test_order_of_verdicts(words: tuple[str, str], worst: str) -> None:
    made = together([(word, said(word, 0.1, word)) for word in words])
    assert made.verdict == worst
    assert all(word in made.tested for word in words)


def test_scanners_of_a_chain_have_names_and_seeds_of_their_own() -> None:
    seen: list[tuple[int, bool]] = []

    @dataclasses.dataclass(frozen=True)
    class Spy:
        variant: str = "stamp"
        name: str = "spy/x"

        def scan(self, model: object, clean: Dataset, seed: Seed, reference: Reference | None = None) -> Verdict:
            seen.append((seed.value, clean.withheld_from is not None))
            return said("clean-by-test", 0.1, self.variant)

    encoder = Fast(width=4, input_size=16).build(Seed(0))
    made, each = scan_encoder(encoder, blobs(8), [Spy(), Spy(variant="linf")], Seed(3))
    assert [name for name, _ in each] == ["spy", "spy-linf"]
    assert seen[0] == (Seed(3).child("Spy").value, True)
    assert seen[1][0] != seen[0][0]
    assert made.tested == "stamp; linf"


@pytest.mark.full
@pytest.mark.parametrize("seed", [0, 1])
def test_the_default_chain_on_the_toy_and_its_twin(seed: int) -> None:
    toy = planted(20, 0.85, seed)
    for encoder, word in ((toy.encoder, "backdoored"), (toy.twin, "clean-by-test")):
        each = [
            (scanner_label(one), one.scan(encoder, toy.images.without_labels("chain"), Seed(seed)))
            for one in default_chain("smoke")
        ]
        made = together(each)
        assert made.verdict == word
        assert "stamps" in made.tested
        assert "colour" in made.tested


def test_no_labels_are_needed() -> None:
    assert not any(one.needs for one in default_chain())
