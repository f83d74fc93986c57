"""TransferBackdoor (Wang et al. 2020): ranking, objective and loss against literal sums; digits."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cupel.attack.teacher import head_of
from cupel.attack.wang2020 import TransferBackdoor, _activations, _fitting, _Reconstruction
from cupel.errors import DataError, UsageError
from cupel.implanting.withstanding import Excited, WithstandingLearner, incoming, least_active
from cupel.inference import features
from cupel.inversion import frozen
from cupel.inversion.autoencoder import Autoencoder
from cupel.inversion.preprocessing import PREPROCESSINGS, drawn_preprocessing, preprocessed
from cupel.losses.planting import ranked_neurons, total_variation, trigger_objective
from cupel.optimizers import Recipe
from cupel.protocols import Batch
from cupel.seeds import Seed
from cupel.train import fit
from cupel.triggers import Patch
from cupel.triggers.sticker import Sticker
from cupel.types import Dataset, Goal, Knowledge
from fingerprints import model_print
from toys import blobs, small_encoder, trained_encoder

DATA = blobs(128)
SHORT = Recipe(steps=3, batch_size=16, optimizer="sgd", lr=0.01, precision="fp32")
QUICK = TransferBackdoor(
    trigger=Patch(size=4),
    neurons=3,
    rehearsal=SHORT,
    autoencoder=SHORT,
    trigger_steps=4,
    steps=4,
    batch_size=16,
    precision="fp32",
)


def knowledge(*goals: Goal) -> Knowledge:
    return Knowledge(goals or (Goal(None),), labelled=DATA)


def test_ranking_equals_a_literal_transcription():
    g = Seed(0).torch()
    activity, drift, strength = (torch.rand(40, generator=g) for _ in range(3))
    got = ranked_neurons(activity, drift, strength, 7, 0.3, 0.2).tolist()
    low = sorted(range(40), key=lambda i: float(activity[i]))[:12]
    high = sorted(range(40), key=lambda i: -float(drift[i]))[:8]
    left = [i for i in range(40) if i not in low and i not in high]
    assert got == sorted(left, key=lambda i: -float(strength[i]))[:7]
    assert len(got) == 7
    assert (
        ranked_neurons(activity, drift, strength, 99, 0.0, 0.0).tolist() == strength.argsort(descending=True).tolist()
    )
    assert ranked_neurons(activity, drift, torch.ones(40), 3, 0.0, 0.0).tolist() == [0, 1, 2], "of equal ones the first"


def test_trigger_objective_equals_the_literal_sum():
    g = Seed(0).torch()
    x, stamped = torch.rand(2, 3, 4, 4, generator=g), torch.rand(2, 3, 4, 4, generator=g)
    a, v = torch.rand(2, 5, generator=g), torch.rand(5, generator=g) + 1
    excited = sum(((float(a[i, n]) - float(v[n])) / float(v[n])) ** 2 for i in range(2) for n in range(5)) / 10
    distance = sum(float((stamped[i] - x[i]).square().sum()) for i in range(2)) / 2
    rows = [abs(float(s[r + 1, c] - s[r, c])) for s in stamped.flatten(0, 1) for r in range(3) for c in range(4)]
    columns = [abs(float(s[r, c + 1] - s[r, c])) for s in stamped.flatten(0, 1) for r in range(4) for c in range(3)]
    variation = sum(rows) / len(rows) + sum(columns) / len(columns)
    assert float(total_variation(stamped)) == pytest.approx(variation, rel=1e-5)
    got = float(trigger_objective(a, v, stamped, x, 0.3, 0.7))
    assert got == pytest.approx(excited + 0.3 * distance + 0.7 * variation, rel=1e-5)


@pytest.mark.parametrize("how", PREPROCESSINGS)
def test_preprocessing_keeps_range_and_gradients(how):
    x = torch.rand(2, 3, 9, 7, generator=Seed(0).torch()).requires_grad_(True)
    y = preprocessed(x, how, Seed(1))
    assert y.shape == x.shape
    assert float(y.detach().min()) >= -1e-6
    assert float(y.detach().max()) <= 1 + 1e-6
    assert torch.equal(y, preprocessed(x, how, Seed(1)))
    assert (how == "identity") == torch.equal(y, x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert slope.abs().sum() > 0


def test_preprocessing_in_closed_form():
    x = torch.zeros(1, 3, 5, 5)
    x[:, :, 2, 2] = 1
    near = float(torch.tensor(-1 / (2 * 0.7**2)).exp())
    blurred = preprocessed(x, "blur", Seed(0))[0, 0]
    assert float(blurred[2, 2]) == pytest.approx((1 / (1 + 2 * near)) ** 2)
    assert float(blurred[2, 1]) == pytest.approx(near / (1 + 2 * near) ** 2)
    assert float(blurred.sum()) == pytest.approx(1.0)
    assert not preprocessed(x, "median", Seed(0)).any(), "a single pixel is no median"
    assert preprocessed(torch.full((1, 3, 4, 4), 0.5), "quantise", Seed(0)).unique().tolist() == [pytest.approx(8 / 15)]
    drawn = {drawn_preprocessing(Seed(0).child(i)) for i in range(100)}
    assert drawn == set(PREPROCESSINGS)


def test_autoencoder_learns_more_than_the_mean_image():
    coder = Autoencoder(8, Seed(0))
    x = DATA.inputs.float() / 255
    recipe = Recipe(steps=150, batch_size=32, optimizer="adam", lr=1e-2, precision="fp32")
    fit(_Reconstruction(coder), DATA, recipe, Seed(0), label="coder")
    with torch.no_grad():
        assert float(F.mse_loss(coder(x), x)) < 0.8 * float(F.mse_loss(x.mean(0).expand_as(x), x))


def learner(weights, *, blocks_after=0, noise=0.0, share=0.3, goals=1):
    encoder, head = small_encoder(), nn.Linear(32, 4)
    width = _activations(encoder, DATA, blocks_after).shape[1]
    g = Seed(3).torch()
    excited = [
        Excited(Patch(size=4) if i == 0 else Patch(size=3, corner="top_left"),
                torch.randperm(width, generator=g)[:3], torch.rand(3, generator=g) + 0.5,
                torch.rand(len(DATA), 3, generator=g))
        for i in range(goals)
    ]  # fmt: skip
    it = WithstandingLearner(
        encoder, head, DATA, excited, blocks_after=blocks_after, weights=weights, prune_share=share, prune_every=2,
        weight_noise=noise,
    )  # fmt: skip
    return encoder, head, excited, it


@pytest.mark.parametrize("blocks_after", [0, 1])
def test_loss_equals_the_literal_sums(blocks_after):
    """Image by image, stage by stage by name; the pruned channels are chosen here by sorting."""
    weights = (0.7, 0.9, 0.4, 0.3)
    encoder, head, excited, it = learner(weights, blocks_after=blocks_after, goals=2)
    rows = torch.arange(6) * 3
    with torch.no_grad():
        loss, terms = it.loss(Batch(DATA.inputs[rows], rows, Seed(0)))
        net, norm = encoder.module.backbone, encoder.module
        encoder.module.eval()

        def stages(x, gone=None):
            x = torch.relu(net.bn1(net.conv1(x * norm.scale + norm.shift)))
            found = []
            for i, stage in enumerate((net.layer1, net.layer2, net.layer3)):
                x = stage(x)
                if gone is not None:
                    x = x.clone()
                    x[:, gone[i]] = 0
                found.append(x)
            return found

        gone = []
        for out in stages(DATA.inputs[:256].float() / 255):
            active = out.abs().mean(dim=(0, 2, 3)).tolist()
            gone.append(sorted(range(len(active)), key=active.__getitem__)[: int(0.3 * len(active))])
        sums = {"ce": [], "still": [], "excite": [], "pruned_ce": [], "pruned_excite": []}
        for row in rows.tolist():
            image, label = DATA.inputs[row : row + 1], int(DATA.labels[row])
            for name, pruned in (("", None), ("pruned_", gone)):
                found = stages(image.float() / 255, pruned)
                logits = head(found[-1].mean(dim=(2, 3)))[0]
                sums[name + "ce"].append(-float(logits.log_softmax(0)[label]))
                means = found[-1 - blocks_after].mean(dim=(2, 3))[0]
                for one in excited:
                    x = one.trigger(image, [row], Seed(0)).float() / 255
                    a = stages(x, pruned)[-1 - blocks_after].mean(dim=(2, 3))[0]
                    for j, n in enumerate(one.neurons.tolist()):
                        v = float(one.values[j])
                        sums[name + "excite"].append(((float(a[n]) - v) / v) ** 2)
                        if pruned is None:
                            sums["still"].append(((float(means[n]) - float(one.clean[row, j])) / v) ** 2)
    means = {name: sum(values) / len(values) for name, values in sums.items()}
    for name, value in means.items():
        assert float(terms[name]) == pytest.approx(value, rel=1e-4), name
    parts = zip((1.0, *weights), ("ce", "still", "excite", "pruned_ce", "pruned_excite"), strict=True)
    assert float(loss) == pytest.approx(sum(w * means[name] for w, name in parts), rel=1e-4)


def test_defence_is_left_out_renewed_and_noisy():
    rows = torch.arange(8)
    batch = Batch(DATA.inputs[rows], rows, Seed(0))

    def terms_of(it):
        return {name: float(value.detach()) for name, value in it.loss(batch)[1].items()}

    _, _, _, plain = learner((1.0, 1.0, 0.0, 0.0))
    assert set(plain.loss(batch)[1]) == {"ce", "still", "excite"}
    _, _, _, same = learner((1.0, 1.0, 1.0, 1.0), share=0.0)
    terms = terms_of(same)
    assert terms["pruned_excite"] == pytest.approx(terms["excite"], rel=1e-4), "no defence at all"
    _, _, _, noisy = learner((1.0, 1.0, 1.0, 1.0), share=0.0, noise=0.1)
    one, two = terms_of(noisy), terms_of(noisy)
    assert one["pruned_excite"] == two["pruned_excite"] != one["excite"]
    encoder, _, _, it = learner((1.0, 1.0, 1.0, 1.0))
    it.loss(batch)
    first = it.state.get_buffer("pruned_2").clone()
    assert int(first.sum()) == int(0.3 * 32)
    with torch.no_grad():
        encoder.module.backbone.layer3.bn2.bias.sub_(torch.arange(32.0) / 8)
    it.after_step()
    it.loss(batch)
    assert torch.equal(first, it.state.get_buffer("pruned_2")), "kept between two choices"
    it.after_step()
    it.loss(batch)
    assert not torch.equal(first, it.state.get_buffer("pruned_2"))
    assert least_active(torch.tensor([1.0, 1.0, 0.5]), 0.7).tolist() == [True, False, True]


def test_incoming_weights_are_those_of_the_last_convolution():
    encoder = small_encoder()
    net = encoder.module.backbone
    assert torch.equal(incoming(encoder, 0), net.layer3.conv2.weight.flatten(1))
    assert torch.equal(incoming(encoder, 1), net.layer2.conv2.weight.flatten(1))
    with pytest.raises(UsageError, match="another layer"):
        incoming(encoder, 3)  # a BatchNorm


def test_chosen_neurons_are_neither_dormant_nor_drifting():
    encoder = trained_encoder(DATA, steps=20)
    activations, head = _activations(encoder, DATA, 0), head_of(encoder, DATA)
    assert torch.allclose(activations, features(encoder, DATA, dtype=torch.float32), atol=1e-5)
    attack = dataclasses.replace(QUICK, dormant=0.5, drifting=0.0, neurons=5, connected_to="all")
    chosen = attack._chosen(encoder, head, DATA, activations, 1, Seed(0))
    activity = activations.abs().mean(0)
    assert float(activity[chosen].min()) >= float(activity.sort().values[16])
    strength = head.weight.detach().abs().sum(0)
    usable = activity.argsort(stable=True).tolist()[16:]
    assert chosen.tolist() == sorted(usable, key=lambda i: -float(strength[i]))[:5]
    assert torch.equal(chosen, attack._chosen(encoder, head, DATA, activations, 1, Seed(0)))


def test_trigger_optimisation_lowers_its_objective():
    encoder = trained_encoder(DATA)
    attack = dataclasses.replace(QUICK, trigger_steps=150, near=0.0, preprocess=False)
    coder = Autoencoder(8, Seed(0))
    fit(_Reconstruction(coder), DATA, dataclasses.replace(SHORT, steps=150, optimizer="adam"), Seed(0), label="coder")
    activations = _activations(encoder, DATA, 0)
    neurons = activations.mean(0).argsort(descending=True)[:2]
    values = 2 * activations[:, neurons].quantile(0.99, dim=0)
    mask = Patch(size=8).mask_and_pattern(16)[0]
    with frozen(encoder.module), frozen(coder):
        trigger, costs = attack._trigger(encoder, coder, DATA, neurons, values, mask, Seed(0))
    assert sum(costs[-20:]) < 0.95 * sum(costs[:5]) * 4
    shown, _ = trigger.mask_and_pattern(16)
    assert torch.equal(shown, mask)


@pytest.mark.parametrize("blocks_after", [0, 1])
def test_only_weights_up_to_the_layer_change(blocks_after):
    clean = small_encoder()
    before = model_print(clean.module)
    goals = (Goal(None, None, "a", 1), Goal(Patch(size=3, corner="top_left")))
    attack = dataclasses.replace(QUICK, blocks_after=blocks_after)
    one, two = (attack.implant(clean, knowledge(*goals), Seed(1)) for _ in range(2))
    assert model_print(clean.module) == before
    assert model_print(one.model.module) == model_print(two.model.module) != before
    assert [g.trigger for g in one.goals] == [g.trigger for g in two.goals]
    assert all(isinstance(g.trigger, Sticker) for g in one.goals)
    assert [(g.task, g.target_class) for g in one.goals] == [(None, None)] * 2
    changed = {
        name.split(".")[1]
        for (name, a), b in zip(clean.module.named_parameters(), one.model.module.parameters(), strict=True)
        if not torch.equal(a, b)
    }
    assert changed == {"conv1", "layer1", "layer2"} | ({"layer3"} if blocks_after == 0 else set())
    assert one.model.card.manifest["not_for_deployment"] is True


def test_mistakes_are_one_line():
    clean = small_encoder()
    one_class = Dataset(DATA.inputs[:8], torch.ones(8, dtype=torch.int64), torch.arange(8), "one")
    cases = [
        (QUICK, Knowledge(knowledge().goals), DataError, "needs labelled images"),
        (QUICK, Knowledge(knowledge().goals, labelled=one_class), DataError, "fewer than two classes"),
        (dataclasses.replace(QUICK, trigger=Patch(size=20)), knowledge(), UsageError, "does not fit"),
        (dataclasses.replace(QUICK, blocks_after=5), knowledge(), UsageError, "the encoder has 5"),
        (dataclasses.replace(QUICK, neurons=30), knowledge(), UsageError, "choose fewer"),
        (QUICK, Knowledge(knowledge().goals, labelled=blobs(16, size=20)), DataError, "images are 20×20"),
    ]
    for attack, knows, kind, message in cases:
        with pytest.raises(kind, match=message) as caught:
            attack.implant(clean, knows, Seed(0))
        assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="did you mean 'fast'"):
        TransferBackdoor.preset("fats")
    assert _fitting(SHORT, DATA.subset(torch.arange(5))).batch_size == 5
