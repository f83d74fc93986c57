"""MNTD on encoders: the shadow models are copies of a public clean encoder, half of them with an implanted backdoor."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cupel.attack import BadEncoder
from cupel.cost import peak_memory_mib
from cupel.encoders import ImageEncoder
from cupel.errors import DataError
from cupel.files import atomic_file
from cupel.folding import inference_copy
from cupel.inference import device_of, features
from cupel.inversion import frozen
from cupel.progress import say, track
from cupel.protocols import Encoder
from cupel.scan.admission import some_rows
from cupel.scan.judging import Judging
from cupel.scan.mntd import TESTED, checked, judged
from cupel.scan.mntd_jumbo import TrojanStamp
from cupel.scan.mntd_meta import MetaTraining, cosines_of, train_meta
from cupel.scan.mntd_reference import Answer, MetaReference
from cupel.seeds import Seed
from cupel.settings import Positive, PositiveInt, settings
from cupel.types import Dataset, Goal, Knowledge, Need
from cupel.verdicts import Reference, Verdict

__all__ = ["MNTDEncoder", "shadow_encoder"]

_SAVE_EVERY = 4  # shadow encoders


@settings
class MNTDEncoder(Judging, MetaTraining):
    """A meta-classifier on the cosines between an encoder's embeddings of tuned queries; label-free.

    `train_reference` fine-tunes copies of a public clean encoder on unlabelled images, every second one with a
    backdoor as BadEncoder implants it (random trigger, random reference image), the others without; a small network
    learns, together with Q query images, to tell them apart. Then it is asked about the inspected encoder.

    Args:
        shadows: Shadow encoders, every second one with a backdoor.
        images: Unlabelled images used at most.
        steps: Of the fine-tuning of each.
        batch_size: Images per step.
        shadow_lr: Of AdamW, for the shadow encoders.
        queries, hidden, epochs, repeats, lr, tune_queries, one_class, nu, validation, false_alarms: See `MetaTraining`.

    Budgets: `smoke` (under a minute), `standard` (64 shadow encoders), `paper` (256 of them).

    Source: Xu et al., MNTD, IEEE S&P 2021, arXiv:1910.03137; Jia et al., BadEncoder, IEEE S&P 2022, for applying it to
    encoders, which does not say how the shadow encoders were made.
    Deviations: the transfer to encoders is our choice: shadow encoders from one public encoder; cosines between
    queries instead of logits, so that encoders whose features are rotated, scaled or of another width can be compared.
    """

    shadows: Annotated[int, Field(ge=16)] = 64
    images: Annotated[int, Field(ge=2)] = 1000
    steps: PositiveInt = 60
    batch_size: PositiveInt = 64
    shadow_lr: Positive = 1e-3
    epochs: PositiveInt = 30
    repeats: PositiveInt = 2

    method: ClassVar[str] = "mntd_encoder"
    budgets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "smoke": {"shadows": 16, "steps": 30, "images": 500, "epochs": 20},
        "standard": {},
        "paper": {"shadows": 256, "steps": 400, "images": 10_000, "epochs": 10, "repeats": 5},
    }
    tested: ClassVar[str] = TESTED
    limit: ClassVar[float] = 0.0
    needs: ClassVar[frozenset[Need]] = frozenset({"reference"})
    revision: ClassVar[int] = 1

    def train_reference(
        self, base: ImageEncoder, data: Dataset, seed: Seed, *, checkpoint: Path | None = None
    ) -> MetaReference:
        """The meta-classifier for encoders like a public one.

        Args:
            base: Public clean encoder, left as it is; not the one that is inspected, nor its clean twin.
            data: Images of its input size. Labels are not read.
            seed: Shadow encoders and meta-classifier.
            checkpoint: File that keeps the finished shadow encoders for a resume.

        Raises:
            DataError: images of another size, or too few shadow encoders.
            Interrupted: a stop was requested; finished shadow encoders were written first.
        """
        some = data.subset(some_rows(data, self.images, seed)).without_labels("mntd_encoder")
        features(base, some.inputs[torch.arange(min(1, len(some)))])  # refuses images of another size
        device = device_of(base.module)
        encoders = self._shadows(base, some, seed.child("shadows"), checkpoint)
        return train_meta(
            [_answer(one) for one in encoders],
            [m % 2 == 1 for m in range(self.shadows)],
            some.inputs[torch.arange(len(some))].to(device).float().div_(255),
            self,
            seed.child("meta"),
            scanner=self.name,
            recipe=f"{self.shadows} shadow encoders of one public encoder and {data.name}",
            device=device,
        )

    def _shadows(self, base: ImageEncoder, data: Dataset, seed: Seed, checkpoint: Path | None) -> list[Encoder]:
        kept = _Finished(checkpoint, f"{self!r}{seed.value}{data.sha256}{_weights(base)}")
        made: list[Encoder] = []
        with track(f"{self.name}, shadow encoders", self.shadows) as advance:
            try:
                for m in range(self.shadows):
                    one = kept.find(m, base)
                    if one is None:
                        one = shadow_encoder(self, base, data, seed.child(m), backdoored=m % 2 == 1)
                        kept.add(m, one)
                    made.append(inference_copy(one))
                    advance(m + 1)
            finally:
                kept.save()
        return made

    def scan(self, model: Encoder, clean: Dataset, seed: Seed, reference: Reference | None = None) -> Verdict:
        """Put the queries to the encoder, and let the meta-classifier judge.

        Args:
            model: Encoder; its weights, flags and modes are as before afterwards.
            clean: To look whether the encoder answers at all; the queries come with the reference.
            seed: Not used: nothing is drawn here.
            reference: A `MetaReference` from `train_reference` with the same settings.

        Returns:
            `inconclusive` without a reference, with fewer than 64 different images, where the meta-classifier cannot
            tell held-out shadow encoders apart, and with a score only where the reference was not calibrated.

        Raises:
            DataError: a reference of another scanner or kind; queries of another size; the encoder gives NaN.
        """
        if (unfit := self.unfit(model, clean)) is not None:
            return unfit
        device = device_of(model.module)
        if reference is None:
            return self.inconclusive("no meta-classifier was given; make one from a public clean encoder", device)
        known = checked(reference, self.name)
        side = known.arrays["queries"].shape[-1]
        if side != model.input_size:
            what = f"its queries are {side}×{side}, the encoder takes {model.input_size}×{model.input_size}"
            raise DataError(f"reference '{known.recipe}'", what, "make it from an encoder of the same input size")
        with frozen(model.module):
            score = known.score(_answer(model), device)
        return dataclasses.replace(judged(score, known, TESTED), peak_memory_mib=peak_memory_mib(device))


def shadow_encoder(
    settings: MNTDEncoder, base: ImageEncoder, data: Dataset, seed: Seed, *, backdoored: bool
) -> ImageEncoder:
    """A fine-tuned copy of a clean encoder, with or without a backdoor of the jumbo family.

    Args:
        settings: Steps and rates.
        base: Left as it is.
        data: Images; one of them is the reference.
        seed: Trigger, reference, order.
        backdoored: False = the same loop without its trigger term.
    """
    row = torch.randint(len(data), (1,), generator=seed.child("reference").torch())
    goal = Goal(TrojanStamp(seed.child("trojan").value, base.input_size), data.inputs[row], "shadow", None)
    attack = BadEncoder(
        lambda_trigger=1.0 if backdoored else 0.0,
        l1_draws=8,
        steps=settings.steps,
        batch_size=min(settings.batch_size, len(data)),
        optimizer="adamw",
        lr=settings.shadow_lr,
        schedule="cosine",
    )
    made = attack.implant(base, Knowledge((goal,), data), seed.child("implant")).model
    assert isinstance(made, ImageEncoder)  # it returns the kind it was given
    return made


def _answer(encoder: Encoder) -> Answer:
    def answer(queries: Tensor) -> Tensor:
        return cosines_of(encoder(queries.contiguous(memory_format=torch.channels_last)).float())

    return answer


class _Finished:
    """Shadow encoders that are done, in one file."""

    def __init__(self, path: Path | None, identity: str) -> None:
        self.path, self.identity = path, hashlib.sha256(identity.encode()).hexdigest()
        self.tensors: dict[str, Tensor] = {}
        self.unsaved = 0
        if path is None or not path.exists():
            return
        try:
            with safe_open(path, "pt") as file:
                names = file.keys()
                if json.loads((file.metadata() or {})["cupel_mntd"]) == self.identity:
                    self.tensors = {name: file.get_tensor(name) for name in names}
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            say(f"  {path.name}: unreadable ({type(error).__name__}); starting over")

    def find(self, m: int, base: ImageEncoder) -> ImageEncoder | None:
        found = {k.partition("/")[2]: v for k, v in self.tensors.items() if k.startswith(f"{m}/")}
        if not found:
            return None
        made = base.copy()
        made.module.load_state_dict(found)
        return made

    def add(self, m: int, encoder: ImageEncoder) -> None:
        if self.path is None:
            return
        for name, value in encoder.module.state_dict().items():
            self.tensors[f"{m}/{name}"] = value.detach().cpu().contiguous().clone()
        self.unsaved += 1
        if self.unsaved >= _SAVE_EVERY:
            self.save()

    def save(self) -> None:
        if self.path is None or not self.unsaved:
            return
        with atomic_file(self.path) as part:
            save_file(self.tensors, part, {"cupel_mntd": json.dumps(self.identity)})
        self.unsaved = 0


def _weights(encoder: ImageEncoder) -> str:
    total = hashlib.sha256()
    for name, value in encoder.module.state_dict().items():
        total.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()
