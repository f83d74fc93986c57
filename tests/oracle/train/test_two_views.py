"""What all objectives with two views share: passes, the exact chain, compiling, no waiting for the device."""

from __future__ import annotations

import copy
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cupel.augment import SimCLRAugment
from cupel.encoders import Fast
from cupel.losses import nt_xent
from cupel.pretrain import SimCLR, pretrain_encoder
from cupel.pretrain.compiling import Compiled
from cupel.progress import reporting
from cupel.protocols import Batch
from cupel.seeds import Seed
from cupel.train import autocast
from toys import blobs, small_encoder

AUGMENT = SimCLRAugment(min_scale=0.8)
COMPILER = shutil.which("g++") or shutil.which("clang++")


def batch(n: int = 12, seed: int = 0) -> Batch:
    return Batch(blobs(n).inputs, torch.arange(n), Seed(seed))


class Said:
    """Keeps what the user would read."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def say(self, text: str) -> None:
        self.texts.append(text)

    def track(self, label: str, total: int) -> Any:
        raise AssertionError("no loop here")


def test_separate_views_are_two_passes_with_their_own_batch_statistics() -> None:
    together, apart = (
        SimCLR(augment=AUGMENT, separate_views=one).learner(small_encoder(), blobs(32), Seed(0))
        for one in (False, True)
    )
    encoder, projector = copy.deepcopy(together.state["encoder"]), copy.deepcopy(together.projector)
    raw = batch().inputs
    views = AUGMENT(torch.cat([raw, raw]), Seed(0).torch())
    first, second = (encoder(one) for one in views.chunk(2))
    z1, z2 = projector(first), projector(second)
    loss, numbers = apart.loss(batch())
    torch.testing.assert_close(loss, nt_xent(z1, z2, 0.5))
    assert set(numbers) == {"feature_std"}
    for mine, literal in zip(apart.state["encoder"].buffers(), encoder.buffers(), strict=True):
        torch.testing.assert_close(mine, literal)
    other, _ = together.loss(batch())
    assert abs(other.item() - loss.item()) > 1e-5
    assert together.state["encoder"].backbone.bn1.num_batches_tracked == 1
    assert apart.state["encoder"].backbone.bn1.num_batches_tracked == 2


def test_without_batch_statistics_separate_views_change_nothing() -> None:
    losses = []
    for apart in (False, True):
        learner = SimCLR(augment=AUGMENT, separate_views=apart, projector="plain").learner(
            small_encoder(), blobs(32), Seed(0)
        )
        learner.state.eval()
        losses.append(learner.loss(batch())[0])
    torch.testing.assert_close(losses[0], losses[1])


def test_the_exact_chain_is_used_where_it_is_asked_for() -> None:
    objective = SimCLR(augment=AUGMENT, augmentation="exact")
    raw = batch().inputs
    assert torch.equal(objective.views(batch()), AUGMENT.exact(torch.cat([raw, raw]), Seed(0).torch()))
    assert torch.equal(SimCLR(augment=AUGMENT).views(batch()), AUGMENT(torch.cat([raw, raw]), Seed(0).torch()))
    state = torch.random.get_rng_state()
    settings = SimCLR(augment=AUGMENT, augmentation="exact", separate_views=True, steps=2, batch_size=16)
    encoder, history = pretrain_encoder(settings, small_made(), blobs(32).without_labels("pretrain"), Seed(0))
    again, _ = pretrain_encoder(settings, small_made(), blobs(32).without_labels("pretrain"), Seed(0))
    assert len(history["loss"]) == 2
    assert all(torch.equal(a, b) for a, b in zip(encoder.module.parameters(), again.module.parameters(), strict=True))
    assert torch.equal(torch.random.get_rng_state(), state)


def small_made() -> Fast:
    return Fast(width=8, input_size=16)


def failing(graph: Any, inputs: Any) -> Any:
    raise RuntimeError("no compiler here\nand a second line")


def failing_backward(graph: Any, inputs: Any) -> Any:
    """A backend whose code runs forward, and fails on the way back."""

    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            raise RuntimeError("no way back")

    return lambda *given: [Broken.apply(one) if one.requires_grad else one for one in graph(*given)]


@pytest.mark.parametrize(
    ("backend", "reason"), [(failing, "no compiler here"), (failing_backward, "no way back"), ("nonsense", "nonsense")]
)
def test_where_compiling_fails_training_goes_on(backend: Any, reason: str) -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).train()
    other, said, x = copy.deepcopy(net), Said(), torch.rand(6, 4)
    compiled = Compiled(net, backend)
    with reporting(said):
        out = [compiled(x), compiled(x)]
    assert len(said.texts) == 1
    assert reason in said.texts[0]
    assert "\n" not in said.texts[0]
    assert torch.equal(out[0], other(x))
    assert torch.equal(out[1], other(x))
    assert all(torch.equal(a, b) for a, b in zip(net.buffers(), other.buffers(), strict=True))  # counted once each
    assert all(one.grad is None for one in net.parameters())
    out[1].sum().backward()


def losses(compile: bool, steps: int = 3) -> tuple[list[float], Any, Any]:
    encoder = small_encoder()
    settings = SimCLR(augment=AUGMENT, compile=compile, precision="fp32", optimizer="sgd", lr=0.05)
    learner = settings.learner(encoder, blobs(32), Seed(0))
    optimizer, seen = settings.make_optimizer(learner.parameters()), []
    for t in range(steps):
        loss, _ = learner.loss(batch(seed=t))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    return seen, encoder, learner


def test_compiling_leaves_names_and_copies_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    eager = SimCLR().learner(small_encoder(), blobs(32), Seed(0))
    made = torch.compile
    monkeypatch.setattr(torch, "compile", lambda net, backend, dynamic: made(net, backend="eager", dynamic=dynamic))
    seen, encoder, learner = losses(compile=True)
    assert list(learner.state.state_dict()) == list(eager.state.state_dict())
    assert len(learner.parameters()) == len(eager.parameters())
    assert type(encoder.copy().module) is type(encoder.module)
    assert list(encoder.copy().module.state_dict()) == list(encoder.module.state_dict())
    assert seen == pytest.approx(losses(compile=False)[0], rel=1e-5)


@pytest.mark.slow  # 40 s, most of it the compiler
@pytest.mark.skipif(COMPILER is None, reason="torch.compile needs a C++ compiler, and none is here")
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiled_losses_are_those_without() -> None:
    said = Said()
    with reporting(said):
        seen, encoder, _ = losses(compile=True)
    assert said.texts == []
    plain, other, _ = losses(compile=False)
    assert seen == pytest.approx(plain, rel=1e-3)
    for a, b in zip(encoder.module.buffers(), other.module.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


class NoWaiting(TorchDispatchMode):
    """Raises where the host would wait for the device: a number read, a shape that depends on values, a copy."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "is_nonzero", "equal"), name
        # torch.tensor(…) on the device would be a copy from the host; scalars of an expression are none
        assert name != "lift_fresh", name
        if name in ("index", "index_put", "index_put_"):
            assert not any(one is not None and one.dtype == torch.bool for one in args[1]), "boolean mask"
        return func(*args, **(kwargs or {}))


def test_the_watchman_sees_waiting() -> None:
    x = torch.rand(4)
    for wrong in (
        lambda: x.sum().item(),
        lambda: bool(x.sum() > 0),
        lambda: x[x > 0.5],
        lambda: x.nonzero(),
        lambda: torch.tensor([1.0, 2.0]),
    ):
        with pytest.raises(AssertionError), NoWaiting():
            wrong()


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("augment", [AUGMENT, SimCLRAugment(crop=False), SimCLRAugment(crop=False, render_size=8)])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lars"])
def test_nothing_in_a_step_waits_for_the_device(apart: bool, augment: SimCLRAugment, optimizer: Any) -> None:
    settings = SimCLR(augment=augment, separate_views=apart, optimizer=optimizer)
    learner = settings.learner(small_encoder(), blobs(32), Seed(0))
    made = settings.make_optimizer(learner.parameters())

    def step() -> None:
        with autocast("bf16", torch.device("cpu")):
            loss, _ = learner.loss(batch())
        loss.backward()
        made.step()
        made.zero_grad(set_to_none=True)

    step()  # constants and optimiser states are made once
    given = batch()
    with NoWaiting():
        with autocast("bf16", torch.device("cpu")):
            loss, numbers = learner.loss(given)
        loss.backward()
        made.step()
    assert all(isinstance(one, Tensor) for one in numbers.values())


@pytest.mark.gpu
@pytest.mark.parametrize("apart", [False, True])
def test_nothing_in_a_step_waits_for_the_gpu(apart: bool) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    encoder = small_encoder()
    encoder.module.cuda()
    learner = SimCLR(augment=AUGMENT, separate_views=apart).learner(encoder, blobs(32), Seed(0))
    made = SimCLR().make_optimizer(learner.parameters())
    given = batch()._replace(inputs=batch().inputs.cuda())

    def step() -> None:
        with autocast("bf16", torch.device("cuda")):
            loss, _ = learner.loss(given)
        loss.backward()
        made.step()
        made.zero_grad(set_to_none=True)

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
