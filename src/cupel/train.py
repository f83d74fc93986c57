"""The one training loop: progress, finite losses, atomic checkpoints, and a resume that repeats the unbroken run."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from cupel.data.ahead import ahead
from cupel.errors import CupelError, Interrupted
from cupel.files import atomic_file
from cupel.progress import say, stop_if_requested, track
from cupel.protocols import Batch, Learner, Training
from cupel.seeds import Seed
from cupel.threads import guarded
from cupel.types import Dataset

__all__ = ["History", "Watch", "autocast", "fit"]

History = dict[str, list[float]]
"""Numbers by name, one per step; `<name>@watch` and `step@watch` for what was measured now and then."""

Watch = Callable[[], Mapping[str, float]]

_LOOK_EVERY = 20  # steps between reads of the loss: each read waits for the device
_SAVE_EVERY_SECONDS = 60.0


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """bf16 for the matrix products where asked for."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def fit(
    learner: Learner,
    data: Dataset,
    recipe: Training,
    seed: Seed,
    *,
    label: str,
    device: torch.device | str = "cpu",
    checkpoint: Path | None = None,
    watch: Watch | None = None,
    watch_every: int = 0,
) -> History:
    """Train `learner` on `data`.

    Step `t` draws its rows from `seed` and the epoch, and all else from `seed.child("step", t)`; no generator
    outlives a step, so a resumed run equals the unbroken one bit for bit (same machine, same threads).

    Args:
        learner: Parameters and loss; trained in place.
        data: Images; labels are not touched here.
        recipe: Steps, batch, optimiser, precision.
        seed: Randomness of the whole training.
        label: Shown with the progress.
        device: Where batches are put; the learner must be there already.
        checkpoint: File that keeps the state; read if it stands there, removed at the end by the caller.
        watch: Measured every `watch_every` steps and after the last; for the log alone, nothing is chosen by it.

    Returns:
        The loss and the learner's numbers, one value per step.

    Raises:
        CupelError: the loss is no longer finite.
        Interrupted: a stop was requested; the checkpoint was written first.
        DataError: fewer images than one batch.
    """
    device = torch.device(device)
    per_epoch, total = recipe.steps_per_epoch(len(data), data.name), recipe.total_steps(len(data), data.name)
    parameters = learner.parameters()
    optimizer = _optimizer(recipe, learner, parameters)
    identity = hashlib.sha256(f"{recipe!r}{data.sha256}{seed.value}{len(parameters)}".encode()).hexdigest()
    state = _State(learner, optimizer, checkpoint, identity)
    start, kept = state.load()
    pending: dict[str, list[Tensor]] = {}
    steps, saved = _rows(len(data), per_epoch, recipe.batch_size, range(start, total), seed), time.monotonic()

    def settle(done: int) -> dict[str, float]:
        """Move pending numbers from the device, and refuse a loss that is not finite."""
        for name, values in pending.items():
            kept.setdefault(name, []).extend(torch.stack(values).float().tolist() if values else [])
        pending.clear()
        last = {name: values[-1] for name, values in kept.items() if values and not name.endswith("@watch")}
        if any(v != v or abs(v) == float("inf") for v in last.values()):
            raise CupelError(label, f"the loss is not finite before step {done}", "lower `lr`, or use precision fp32")
        return last

    guard = guarded(device.type, torch.get_num_threads, torch.set_num_threads)
    with track(label, total) as advance, ahead(data.inputs, steps, device) as batches:
        for t, (rows, pixels) in enumerate(batches, start):
            batch = Batch(pixels, rows, seed.child("step", t))
            for group in optimizer.param_groups:
                if group.get("scheduled", True):
                    group["lr"] = recipe.lr_at(t, total)
            with autocast(recipe.precision, device):
                loss, numbers = learner.loss(batch)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            learner.after_step()
            if guard is not None:
                guard.step()
            for name, value in {"loss": loss, **numbers}.items():
                pending.setdefault(name, []).append(value.detach())
            done = t + 1
            if watch is not None and watch_every and (done % watch_every == 0 or done == total):
                for name, number in {"step": float(done), **watch()}.items():
                    kept.setdefault(f"{name}@watch", []).append(number)
            try:
                if done % _LOOK_EVERY == 0 or done == total:
                    advance(done, **settle(done))
                else:
                    stop_if_requested()
            except Interrupted:
                settle(done)
                state.save(done, kept)
                raise
            if checkpoint is not None and time.monotonic() - saved > _SAVE_EVERY_SECONDS:
                settle(done)
                state.save(done, kept)
                saved = time.monotonic()
    return kept


def _optimizer(recipe: Training, learner: Learner, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimiser; weights that a learner names in `unscheduled()` keep the peak rate (SimSiam's predictor does)."""
    steady: list[nn.Parameter] = getattr(learner, "unscheduled", list)()
    apart = {id(one) for one in steady}
    optimizer = recipe.make_optimizer([one for one in parameters if id(one) not in apart])
    if steady:
        optimizer.add_param_group({"params": steady, "scheduled": False})
    return optimizer


def _rows(n: int, per_epoch: int, batch_size: int, steps: range, seed: Seed) -> Iterator[Tensor]:
    """The rows of each step: an epoch goes through one permutation, which depends on its number alone."""
    order, order_epoch = torch.empty(0, dtype=torch.int64), -1
    for t in steps:
        epoch, k = divmod(t, per_epoch)
        if epoch != order_epoch:
            order = torch.randperm(n, generator=seed.child("epoch", epoch).torch())
            order_epoch = epoch
        yield order[k * batch_size : (k + 1) * batch_size]


class _State:
    """Weights, buffers and optimiser state in one safetensors file; the rest as JSON in its header."""

    def __init__(self, learner: Learner, optimizer: torch.optim.Optimizer, path: Path | None, identity: str) -> None:
        self.learner, self.optimizer, self.path, self.identity = learner, optimizer, path, identity

    def save(self, step: int, history: History) -> None:
        if self.path is None:
            return
        tensors = {f"model/{k}": v for k, v in self.learner.state.state_dict().items()}
        for i, parameter in enumerate(self.learner.parameters()):
            for name, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer/{i}/{name}"] = torch.as_tensor(value)
        note = {"step": step, "identity": self.identity, "history": history}
        with atomic_file(self.path) as part:
            # clones: tied or sliced tensors share memory, which the format refuses
            save_file(
                {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()},
                part,
                {"cupel": json.dumps(note)},
            )

    def load(self) -> tuple[int, History]:
        if self.path is None or not self.path.exists():
            return 0, {}
        try:
            with safe_open(self.path, "pt") as file:
                note = json.loads(file.metadata()["cupel"])
                names = file.keys()
                tensors = {name: file.get_tensor(name) for name in names}
        except Exception as error:  # safetensors raises its own types; whatever is wrong, starting over is right
            say(f"  {self.path.name}: unreadable checkpoint ({error}); starting over")
            return 0, {}
        if note["identity"] != self.identity:
            say(f"  {self.path.name}: checkpoint of other settings; starting over")
            return 0, {}
        model = {k.removeprefix("model/"): v for k, v in tensors.items() if k.startswith("model/")}
        self.learner.state.load_state_dict(model)
        parameters = self.learner.parameters()
        for key, value in tensors.items():
            if key.startswith("optimizer/"):
                _, i, name = key.split("/")
                parameter = parameters[int(i)]
                layout = {} if value.ndim != 4 else {"memory_format": torch.channels_last}
                on_device = value.to(parameter.device if value.ndim else value.device, **layout)
                self.optimizer.state[parameter][name] = on_device
        say(f"  resuming at step {note['step']}")
        return int(note["step"]), note["history"]
