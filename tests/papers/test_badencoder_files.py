"""BadEncoder's experiments as files: every scale is read and planned, and their numbers are those of the logs."""

from __future__ import annotations

import pytest

from cupel.errors import DataError
from cupel.experiment import cells, packaged, plan, read_experiment

NAMES = [name for name in packaged() if name.startswith("badencoder-")]
ABLATIONS = {
    "loss-terms", "lambdas", "shadow-size", "shadow-source", "trigger-size", "references", "targets", "tasks",
    "downstream", "upstream", "latent-backdoor", "survival",
}  # fmt: skip
# clean accuracy, backdoored accuracy, ASR and ASR-B over all samples: published logs, CIFAR-10 ResNet-18, epoch 500
LOGGED = {
    "gtsrb": (0.8184, 0.8227, 0.9864, 0.0492),
    "svhn": (0.5850, 0.6932, 0.9914, 0.3753),
    "stl10": (0.7614, 0.7618, 0.9973, 0.1038),
}
METRICS = (
    "clean_accuracy", "backdoored_accuracy", "attack_success_rate_all", "attack_success_rate_baseline_all",
)  # fmt: skip


def test_every_experiment_of_the_paper_is_there():
    assert {f"badencoder-{name}" for name in ABLATIONS} <= set(NAMES)


@pytest.mark.parametrize("scale", ["cpu", "gpu", "paper"])
@pytest.mark.parametrize("name", [f"badencoder-{name}" for name in sorted(ABLATIONS)])
def test_every_scale_is_read_and_planned(name, scale, monkeypatch):
    def offline(*_: object) -> None:
        raise OSError("no network in tests")

    monkeypatch.setattr("cupel.data.sources.fetch", offline)
    found = cells(*read_experiment(name), [f"scale={scale}"])
    assert all(one.name == (name if scale == "cpu" else f"{name}-{scale}") for _, one in found)
    for _, one in found:
        assert one.paper is not None
        assert one.paper.deviations
        assert one.attack is not None
        encoder = type(one.upstream.encoder).__name__
        assert encoder == ("Fast" if scale == "cpu" else "ResNet18")
        if scale == "paper":
            assert one.upstream.objective.epochs == 1000
            if type(one.attack).__name__ == "BadEncoder":
                recipe = (one.attack.epochs, one.attack.optimizer, one.attack.lr, one.attack.batch_size)
                assert recipe == (200, "sgd", 1e-3, 256)
    ends = (found[0][1], found[-1][1])
    missing = 0
    for one in ends:
        try:
            assert any(step.name.startswith("implant ") for step in plan(one))
        except DataError:
            missing += 1
    if missing == len(ends):
        pytest.skip("data sets are not here")


@pytest.mark.parametrize("name", NAMES)
def test_published_numbers_are_those_of_the_logs(name):
    data, where = read_experiment(name)
    for scale in ["cpu", *data.get("scales", {})]:
        for _, one in cells(data, where, [f"scale={scale}"]):
            if one.paper is None:
                continue
            for key, value in one.paper.results.items():
                task, _, metric = key.rpartition("/")
                assert value == LOGGED[task or one.downstream[0].data][METRICS.index(metric)]
