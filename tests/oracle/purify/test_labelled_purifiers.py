"""What all purifiers with labels share: the classifier, the head that encoders get, BatchNorm, and bad input."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from cupel.encoders import ImageEncoder
from cupel.errors import DataError, Interrupted, LabelsWithheld, UsageError
from cupel.inference import FrozenProbe, features
from cupel.progress import request_stop
from cupel.protocols import Batch
from cupel.purify.abl import ABL
from cupel.purify.anp import ANP, ANPLearner
from cupel.purify.batch_norm import batch_norms, set_batch_norm, statistics_kept
from cupel.purify.classifier_learner import ClassifierLearner
from cupel.purify.fine_pruning import FinePruning
from cupel.purify.ft_sam import FTSAM
from cupel.purify.ibau import IBAU, IBAULearner
from cupel.purify.labelled import LabelledPurifier, accuracy_of, linear_head, split_off
from cupel.purify.nad import NAD
from cupel.purify.tuning import FST, FT, LP, FETuning, FTInit, TuningLearner
from cupel.seeds import Seed
from fingerprints import model_print, same_state
from toys import blobs, small_encoder

DATA = blobs(48)
SHORT: dict[type[LabelledPurifier], dict[str, Any]] = {
    FT: {}, LP: {}, FETuning: {}, FTInit: {}, FST: {}, FTSAM: {"rho": 0.1}, NAD: {"teacher_epochs": 1},
    ANP: {"lr": 1.0}, IBAU: {}, FinePruning: {}, ABL: {"isolation_epochs": 1, "unlearning_epochs": 1, "isolated": 0.05},
}  # fmt: skip
ALL = [pytest.param(cls, more, id=cls.__name__) for cls, more in SHORT.items()]


def short(cls: Any, **more: Any) -> Any:
    return cls(**{"steps": 3, "batch_size": 16, "augment": None} | SHORT[cls] | more)


def classifier(seed: int = 0) -> FrozenProbe:
    encoder = small_encoder(seed, width=4)
    return FrozenProbe(encoder, linear_head(encoder, DATA, 5e-4))


def batch_of(n: int = 16) -> Batch:
    rows = torch.arange(n)
    return Batch(DATA.inputs[rows], rows, Seed(4))


@pytest.mark.parametrize(("cls", "more"), ALL)
def test_the_given_classifier_stays_and_a_copy_in_eval_mode_comes_out(cls: Any, more: Any) -> None:
    model = classifier()
    model.encoder.module.requires_grad_(False)
    before, head = model_print(model.encoder.module), model.head.state_dict()["weight"].clone()
    made, history = short(cls).purify_classifier(model, DATA, Seed(1))
    assert model_print(model.encoder.module) == before
    assert torch.equal(model.head.state_dict()["weight"], head)
    assert not any(p.requires_grad for p in model.encoder.module.parameters())
    for part in (made.encoder.module, made.head):
        assert not any(one.training for one in part.modules())
        assert all(p.requires_grad and p.grad is None for p in part.parameters())
    assert made.encoder.module is not model.encoder.module
    assert all(np.isfinite(values).all() for values in history.values())
    again, _ = short(cls).purify_classifier(model, DATA, Seed(1))
    assert same_state(made.encoder.module, again.encoder.module)
    assert same_state(made.head, again.head)


@pytest.mark.parametrize(("cls", "more"), ALL)
def test_without_labels_nothing_is_touched(cls: Any, more: Any) -> None:
    encoder = small_encoder(width=4)
    before = model_print(encoder.module)
    unlabelled = dataclasses.replace(DATA, labels_=torch.full_like(DATA.labels, -1))
    with pytest.raises(LabelsWithheld, match="labels are withheld"):
        short(cls).purify(encoder, DATA.without_labels("it"), Seed(0))
    with pytest.raises(DataError, match="48 of 48 images have no label") as caught:
        short(cls).purify(encoder, unlabelled, Seed(0))
    assert "\n" not in str(caught.value)
    assert model_print(encoder.module) == before


@pytest.mark.parametrize(("cls", "more"), ALL)
def test_no_steps_change_nothing_and_read_no_label(cls: Any, more: Any) -> None:
    model = classifier()
    made, history = short(cls, steps=0).purify_with_history(model.encoder, DATA.without_labels("it"), Seed(0))
    assert history == {}
    assert made.module is not model.encoder.module
    assert same_state(made.module, model.encoder.module)


@pytest.mark.parametrize("mode", ["frozen", "eval_affine", "train"])
@pytest.mark.parametrize(("cls", "more"), ALL)
def test_batch_norm_does_as_it_is_told(cls: Any, more: Any, mode: Any) -> None:
    model = classifier()
    old = batch_norms(model.encoder.module)
    new = batch_norms(short(cls, batch_norm=mode).purify_classifier(model, DATA, Seed(1))[0].encoder.module)
    statistics = [torch.equal(a.running_mean, new[name].running_mean) for name, a in old.items()]
    affine = [torch.equal(a.weight, new[name].weight) for name, a in old.items()]
    if cls is not ABL:  # which starts from fresh weights
        assert statistics == [mode != "train"] * len(old)
    if cls not in (ABL, ANP, FinePruning):  # which prune by the affine part
        assert all(affine) == (mode == "frozen" or cls is LP)


def test_defaults_of_batch_norm() -> None:
    assert {cls: cls().batch_norm for cls in SHORT} == {
        FT: "train", LP: "frozen", FETuning: "train", FTInit: "train", FST: "train", FTSAM: "train", ABL: "train",
        NAD: "eval_affine", IBAU: "eval_affine", FinePruning: "eval_affine", ANP: "frozen",
    }  # fmt: skip


@pytest.mark.parametrize(("cls", "more"), ALL)
def test_presets(cls: Any, more: Any) -> None:
    assert cls.preset("paper") == cls()
    assert cls.preset("smoke") != cls()
    assert cls.preset("smoke").total_steps(1000, "x") <= 200
    with pytest.raises(UsageError, match="did you mean 'smoke'"):
        cls.preset("smok")
    assert "labels" in cls.needs


def test_fewer_images_than_a_batch_make_a_smaller_batch() -> None:
    made, history = FT(epochs=2, batch_size=500, augment=None).purify_classifier(classifier(), DATA, Seed(0))
    assert len(history["loss"]) == 2
    assert not same_state(made.encoder.module, classifier().encoder.module)


def test_heads_that_are_no_linear_layer_are_refused() -> None:
    encoder = small_encoder(width=4)
    with pytest.raises(DataError, match="works on one linear layer on the embedding, the head is a Sequential"):
        short(FT).purify_classifier(FrozenProbe(encoder, nn.Sequential(nn.Linear(16, 4))), DATA, Seed(0))
    with pytest.raises(UsageError, match="class index 3 is outside the 2 classes"):
        short(FT).purify_classifier(FrozenProbe(encoder, nn.Linear(16, 2)), DATA, Seed(0))


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(DataError, match="the encoder takes 16×16"):
        short(FT).purify(small_encoder(width=4), blobs(48, size=32), Seed(0))


def test_the_head_of_an_encoder_minimises_the_penalised_cross_entropy() -> None:
    encoder = small_encoder(width=4)
    head, x = linear_head(encoder, DATA, 5e-3), features(encoder, DATA, dtype=torch.float32).double()
    W, b = (p.detach().double() for p in (head.weight, head.bias))
    error = (x @ W.T + b).softmax(1) - torch.nn.functional.one_hot(DATA.labels, 4)
    assert float((error.T @ x / len(x) + 5e-3 * W).abs().max()) < 1e-4
    assert float(error.mean(dim=0).abs().max()) < 1e-4


def test_an_encoder_is_its_classifier_with_that_head() -> None:
    model = classifier()
    by_encoder = short(FT).purify(model.encoder, DATA, Seed(3))
    by_classifier, _ = short(FT).purify_classifier(model, DATA, Seed(3))
    assert same_state(by_encoder.module, by_classifier.encoder.module)
    assert isinstance(by_encoder, ImageEncoder)
    assert isinstance(model.encoder, ImageEncoder)
    assert by_encoder.card == model.encoder.card


def test_split_off_parts_the_images() -> None:
    rest, held = split_off(DATA, 0.25, Seed(0))
    assert len(held) == 12
    assert sorted([*rest.ids.tolist(), *held.ids.tolist()]) == DATA.ids.tolist()
    assert split_off(DATA, 0.25, Seed(0))[1].ids.tolist() == held.ids.tolist()
    assert split_off(DATA, 0.25, Seed(1))[1].ids.tolist() != held.ids.tolist()
    assert [len(part) for part in split_off(DATA.subset(torch.arange(2)), 0.01, Seed(0))] == [1, 1]
    with pytest.raises(DataError, match="holds 1 image"):
        split_off(DATA.subset(torch.arange(1)), 0.5, Seed(0))


def test_accuracy_counts_right_answers() -> None:
    encoder = small_encoder(width=4)
    head = nn.Linear(16, 4)
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(torch.tensor([0.0, 0.0, 1.0, 0.0]))
    assert accuracy_of(FrozenProbe(encoder, head), DATA) == 0.25


def test_statistics_kept_means_statistics_of_the_batch_but_none_stored() -> None:
    module = small_encoder(width=4).module.train()
    set_batch_norm(module, "train")
    x = batch_of().inputs.float() / 255
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with statistics_kept(module):
        inside = module(x)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert torch.equal(module(x), inside)
    assert not torch.equal(module.state_dict()["backbone.bn1.running_mean"], before["backbone.bn1.running_mean"])


@pytest.mark.parametrize(
    ("cls", "learner"), [(FST, TuningLearner), (IBAU, IBAULearner), (ANP, ANPLearner)], ids=["FST", "IBAU", "ANP"]
)
def test_a_stopped_run_goes_on_as_if_nothing_had_happened(
    cls: Any, learner: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, file, model = short(cls, steps=8), tmp_path / "run.part", classifier()
    whole, history = settings.purify_classifier(model, DATA, Seed(2))
    after_step, done = learner.after_step, []

    def stop_after_five(self: ClassifierLearner) -> None:
        after_step(self)
        done.append(1)
        if len(done) == 5:
            request_stop(2)

    with monkeypatch.context() as patch:
        patch.setattr(learner, "after_step", stop_after_five)
        try:
            with pytest.raises(Interrupted):
                settings.purify_classifier(model, DATA, Seed(2), checkpoint=file)
        finally:
            request_stop(None)
    resumed, again = settings.purify_classifier(model, DATA, Seed(2), checkpoint=file)
    assert history == again
    assert same_state(whole.encoder.module, resumed.encoder.module)
    assert same_state(whole.head, resumed.head)
