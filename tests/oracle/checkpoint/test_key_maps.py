"""Names under every wrapper, and what is said when they do not fit."""

from __future__ import annotations

import pytest
import torchvision

from cupel.checkpoint import match_keys
from cupel.errors import CheckpointError

Shapes = dict[str, tuple[int, ...]]
RESNET: Shapes = {
    name: tuple(t.shape) for name, t in torchvision.models.resnet18().state_dict().items() if not name.startswith("fc.")
}
HEAD: Shapes = {"fc.weight": (10, 512), "fc.bias": (10,)}
PREFIXES = (
    "", "module.", "encoder.", "backbone.", "encoder_q.", "_orig_mod.", "visual.", "f.", "model.", "state_dict.",
    "net.", "state_dict.module.encoder_q.", "model._orig_mod.module.backbone.", "model.encoder.f.",
    "state_dict.net.module.",
)  # fmt: skip


def under(prefix: str, shapes: Shapes) -> Shapes:
    return {prefix + name: shape for name, shape in shapes.items()}


@pytest.mark.parametrize("prefix", PREFIXES)
def test_every_wrapper(prefix: str) -> None:
    found = match_keys(under(prefix, RESNET | HEAD), RESNET, "file")
    assert found.prefix == prefix
    assert found.names == {name: prefix + name for name in RESNET}
    assert found.ignored == (f"{prefix}fc.weight", f"{prefix}fc.bias")


def test_moco() -> None:
    head = {"fc.0.weight": (512, 512), "fc.2.weight": (128, 512)}
    file = {
        **under("state_dict.module.encoder_q.", RESNET | head),
        **under("state_dict.module.encoder_k.", RESNET | head),
        "state_dict.module.queue": (128, 65536),
        "state_dict.module.queue_ptr": (1,),
        "optimizer.state.0.momentum_buffer": (64, 3, 7, 7),
    }
    found = match_keys(file, RESNET, "moco.pth")
    assert found.prefix == "state_dict.module.encoder_q."
    assert len(found.names) == 120
    assert len(found.ignored) == len(file) - 120


@pytest.mark.parametrize("prefix", ["state_dict.f.f.", "state_dict.module.f.f.", "state_dict.module.encoder_q.f."])
@pytest.mark.parametrize("maxpool", [False, True])
def test_numbered_children(prefix: str, maxpool: bool) -> None:
    """BadEncoder saves `nn.Sequential` of the children it keeps, and its projector as `g`."""
    model = torchvision.models.resnet18()
    kept = [(n, m) for n, m in model.named_children() if n != "fc" and (maxpool or n != "maxpool")]
    file, expected_names = {}, {}
    for place, (child, module) in enumerate(kept):
        for name, tensor in module.state_dict().items():
            file[f"{prefix}{place}.{name}"] = tuple(tensor.shape)
            expected_names[f"{child}.{name}"] = f"{prefix}{place}.{name}"
    outer = prefix.removesuffix("f.f.") if prefix.endswith("f.f.") else "state_dict.module.encoder_q."
    projector = {f"{outer}g.0.weight": (512, 512), f"{outer}g.1.num_batches_tracked": ()}
    found = match_keys(file | projector, RESNET, "model_1000.pth")
    assert found.names == expected_names
    assert found.prefix == prefix
    assert set(found.ignored) == set(projector)


def test_the_prefix_that_covers_most_wins() -> None:
    part = {"conv1.weight": RESNET["conv1.weight"]}
    file = under("model.", part) | under("net.", RESNET)
    with pytest.raises(CheckpointError) as caught:
        match_keys(file, RESNET, "file")
    assert caught.value.code == "unexpected-keys"
    assert "model.conv1.weight" in str(caught.value)


def test_two_encoders() -> None:
    with pytest.raises(CheckpointError, match=r"'backbone\.', 'net\.'") as caught:
        match_keys(under("backbone.", RESNET) | under("net.", RESNET), RESNET, "file")
    assert caught.value.code == "ambiguous-keys"


def test_missing() -> None:
    file = under("module.", RESNET)
    file["module.layer1.0.conv1.weights"] = file.pop("module.layer1.0.conv1.weight")
    with pytest.raises(CheckpointError, match="lacks 1 of the encoder's 120 tensors") as caught:
        match_keys(file, RESNET, "file")
    assert caught.value.code == "missing-keys"
    assert caught.value.exit_code == 2
    assert "did you mean 'layer1.0.conv1.weights'?" in str(caught.value)


def test_many_missing_are_counted_not_listed() -> None:
    file = {name: shape for name, shape in RESNET.items() if not name.startswith("layer4")}
    with pytest.raises(CheckpointError, match=r"lacks 30 .*: layer4\.0\.conv1\.weight, .*, …"):
        match_keys(file, RESNET, "file")


def test_nothing_fits() -> None:
    with pytest.raises(CheckpointError, match=r"lacks 120 .*called blocks\.0\.attn\.qkv\.weight") as caught:
        match_keys({"blocks.0.attn.qkv.weight": (9, 3)}, RESNET, "file")
    assert caught.value.code == "missing-keys"


def test_missing_may_be_allowed() -> None:
    file = {name: shape for name, shape in RESNET.items() if not name.endswith("num_batches_tracked")}
    with pytest.raises(CheckpointError, match="lacks 20"):
        match_keys(file, RESNET, "file")
    assert len(match_keys(file, RESNET, "file", ("*.num_batches_tracked",)).names) == 100
    with pytest.raises(CheckpointError):  # not everything: an encoder of which nothing was loaded is no encoder
        match_keys({"other": (1,)}, RESNET, "file", ("*",))


def test_wrong_shape() -> None:
    file = RESNET | {"conv1.weight": (64, 3, 3, 3)}
    with pytest.raises(
        CheckpointError, match=r"'conv1\.weight' is \(64, 3, 3, 3\), expected \(64, 3, 7, 7\)"
    ) as caught:
        match_keys(file, RESNET, "file")
    assert caught.value.code == "wrong-shape"


def test_unexpected() -> None:
    with pytest.raises(CheckpointError, match=r"1 tensors .*layer5\.weight") as caught:
        match_keys(RESNET | {"layer5.weight": (3,)}, RESNET, "file")
    assert caught.value.code == "unexpected-keys"


def test_without_counters_in_the_encoder() -> None:
    expected = {name: shape for name, shape in RESNET.items() if not name.endswith("num_batches_tracked")}
    assert len(match_keys(RESNET, expected, "file").ignored) == 20


def test_names_cannot_paint_the_terminal() -> None:
    with pytest.raises(CheckpointError) as caught:
        match_keys(RESNET | {"\x1b[2Jw": (1,)}, RESNET, "file")
    assert "\x1b" not in str(caught.value)
