"""The training loop: the same result whether interrupted or not, and no silence about a loss that explodes."""

from __future__ import annotations

import pytest
import torch

from cupel import progress
from cupel.encoders import Fast
from cupel.errors import CupelError, DataError, Interrupted
from cupel.optimizers import LARS, Recipe
from cupel.pretrain import SimCLR, pretrain_encoder
from cupel.seeds import Seed
from toys import blobs

DATA = blobs(128)


def run(tmp_path, *, stop_at: int | None = None, optimizer: str = "adamw", steps: int = 12):
    objective = SimCLR(steps=steps, batch_size=32, lr=1e-3, optimizer=optimizer)
    seen = []

    def watch(encoder):
        seen.append(1)
        if stop_at is not None and len(seen) == stop_at:
            progress.request_stop(2)
        return {"seen": float(len(seen))}

    return pretrain_encoder(
        objective,
        Fast(width=4, input_size=16),
        DATA,
        Seed(3),
        checkpoint=tmp_path / "state",
        watch=watch,
        watch_every=1,
    )


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lars", "adam"])
def test_resume_is_bit_equal_to_the_unbroken_run(tmp_path, optimizer):
    whole, history = run(tmp_path / "a", optimizer=optimizer)
    try:
        with pytest.raises(Interrupted) as caught:
            run(tmp_path / "b", stop_at=7, optimizer=optimizer)
    finally:
        progress.request_stop(None)
    assert caught.value.exit_code == 130
    assert (tmp_path / "b" / "state").exists()
    resumed, again = run(tmp_path / "b", optimizer=optimizer)
    assert len(again["seen@watch"]) == 12  # 7 before, 5 after: nothing was done twice
    assert again["loss"] == history["loss"]
    for name, value in whole.module.state_dict().items():
        assert torch.equal(value, resumed.module.state_dict()[name]), name


def test_checkpoint_of_other_settings_is_not_used(tmp_path):
    try:
        with pytest.raises(Interrupted):
            run(tmp_path, stop_at=5)
    finally:
        progress.request_stop(None)
    other, _ = run(tmp_path, steps=8)
    fresh, _ = run(tmp_path / "fresh", steps=8)
    for name, value in fresh.module.state_dict().items():
        assert torch.equal(value, other.module.state_dict()[name]), name


@pytest.mark.parametrize("damage", [b"", b"garbage" * 50])
def test_damaged_checkpoint_means_starting_over(tmp_path, damage):
    (tmp_path / "state").write_bytes(damage)
    made, _ = run(tmp_path, steps=4)
    fresh, _ = run(tmp_path / "fresh", steps=4)
    assert torch.equal(made.module.backbone.conv1.weight, fresh.module.backbone.conv1.weight)


def test_global_generator_is_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    pretrain_encoder(SimCLR(steps=2, batch_size=16), Fast(width=4, input_size=16), DATA, Seed(0))
    assert torch.equal(before, torch.get_rng_state())


def test_loss_that_explodes_is_an_error():
    with pytest.raises(CupelError, match="not finite"):
        pretrain_encoder(
            SimCLR(steps=40, batch_size=16, lr=1e30, optimizer="sgd"), Fast(width=4, input_size=16), DATA, Seed(0)
        )


def test_fewer_images_than_a_batch():
    with pytest.raises(DataError, match="one batch needs 4096"):
        pretrain_encoder(SimCLR(steps=2, batch_size=4096), Fast(width=4, input_size=16), DATA, Seed(0))


def test_learning_rate_schedules():
    cosine = Recipe(lr=2.0, steps=10, warmup_steps=2)
    assert [cosine.lr_at(t, 10) for t in (0, 1, 2, 6)] == pytest.approx([1.0, 2.0, 2.0, 1.0])
    constant = Recipe(lr=0.5, schedule="constant")
    assert {constant.lr_at(t, 100) for t in range(100)} == {0.5}


def test_every_image_is_seen_once_an_epoch():
    from cupel.train import fit

    class Learner:
        def __init__(self):
            self.state = torch.nn.Linear(1, 1)
            self.rows = []

        def parameters(self):
            return list(self.state.parameters())

        def loss(self, batch):
            self.rows += batch.rows.tolist()
            return self.state(torch.ones(1, 1)).sum(), {}

        def after_step(self):
            pass

    learner = Learner()
    fit(learner, DATA, Recipe(epochs=2, batch_size=32, precision="fp32"), Seed(0), label="t")
    assert sorted(learner.rows) == sorted([*range(128), *range(128)])
    assert learner.rows[:128] != learner.rows[128:]


def test_lars_by_hand():
    w, b = torch.nn.Parameter(torch.tensor([[3.0, 4.0]])), torch.nn.Parameter(torch.tensor([1.0]))
    w.grad, b.grad = torch.tensor([[0.0, 2.0]]), torch.tensor([0.5])
    LARS([w, b], lr=0.1, momentum=0.9, weight_decay=0.5, trust=0.01).step()
    # g + wd·w = (1.5, 4.0); ‖w‖ = 5; trust·5/‖(1.5, 4)‖ scales it; the bias gets plain SGD without decay
    scale = 0.01 * 5 / (1.5**2 + 4.0**2) ** 0.5
    assert torch.allclose(w.detach(), torch.tensor([[3.0 - 0.1 * scale * 1.5, 4.0 - 0.1 * scale * 4.0]]))
    assert torch.allclose(b.detach(), torch.tensor([0.95]))
