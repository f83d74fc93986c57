"""Files that want to run code, lie about their size, or are broken: named, refused, never run."""

from __future__ import annotations

import io
import pickle
import random
import struct
import time
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from crafted_pickles import tensor_pickle

from cupel.checkpoint import inspect_file, read_tensors
from cupel.errors import CheckpointError, UnsafeFile

pytestmark = pytest.mark.usefixtures("nothing_ran")


def evil(function: str, *arguments: object, protocol: int = 2) -> bytes:
    """The pickle of a list with a call of `function` (module and name) in it."""
    module, name = function.split(" ")
    body = b"".join(pickle.dumps(a, protocol)[2 if protocol < 4 else 11 : -1] for a in arguments)
    return b"\x80\x02]c" + f"{module}\n{name}\n".encode() + b"(" + body + b"tRa."


UNSAFE = {
    "reduce": evil("os system", "echo"),
    "posix": evil("posix system", "echo"),
    "subprocess": evil("subprocess Popen", "echo"),
    "eval": evil("builtins eval", "1"),
    "old builtins": evil("__builtin__ exec", "1"),
    "getattr": evil("builtins getattr", "x", "y"),
    "import": evil("builtins __import__", "os"),
    "nested pickle": evil("pickle loads", evil("os system", "echo")),
    "torch.load": evil("torch load", "x"),
    "hub": evil("torch.hub load", "x"),
    "nested storage": evil("torch.storage _load_from_bytes", b"\x80\x02cos\nsystem\n)R."),
    "operator": evil("operator attrgetter", "system"),
    "inst": b"(S'echo'\nios\nsystem\n.",
    "obj": b"(cos\nsystem\nS'echo'\no.",
    "newobj": b"\x80\x02cos\nsystem\nU\x04echo\x85\x81.",
    "newobj_ex": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04echo\x85}\x92.",
    "stack_global by memo": b"\x80\x04\x8c\x06system\x94\x8c\x02os\x94h\x01h\x00\x93\x8c\x04echo\x85R.",
    "dotted name": b"\x80\x04\x8c\x05torch\x8c\x09os.system\x93\x8c\x04echo\x85R.",
    "handed on": b"\x80\x02cbuiltins\nlist\ncos\nsystem\n\x85R.",
    "extension registry": b"\x80\x02\x82\x01)R.",
    "escaped": b"S'o\\x73'\nS'\\163ystem'\n\x93)R.",
    "popped": b"\x80\x02cos\nsystem\nU\x04echo\x85R0N.",
    "broken after the call": b"\x80\x02cos\nsystem\nU\x04echo\x85R\xff\xff",
    "sys.modules changed": b"\x80\x02csys\nmodules\nU\x01aNs.",
}
SUSPICIOUS = {
    "unknown": evil("acme.hooks run", 1),
    "named only": b"\x80\x02cacme.hooks\nrun\n.",
    "dotted benign": b"\x80\x04\x8c\x13torch.nn.functional\x8c\x0drelu.__code__\x93.",
    "class changed": b"\x80\x02ctorch.nn.modules.linear\nLinear\nN}U\x07forwardNs\x86b.",
    "computed": b"\x80\x02cfunctools\npartial\ncbuiltins\nlist\n\x85R)R.",
}


@pytest.mark.parametrize("name", UNSAFE)
@pytest.mark.parametrize("form", ["pickle", "zip", "deflated", "safetensors"])
def test_code_is_named_and_not_run(name: str, form: str, tmp_path: Path, archived: Callable[..., Path]) -> None:
    if form in ("pickle", "safetensors"):
        path = tmp_path / f"encoder.{form}"
        path.write_bytes(UNSAFE[name])
    else:
        path = archived(UNSAFE[name], method=zipfile.ZIP_DEFLATED if form == "deflated" else zipfile.ZIP_STORED)
    found = inspect_file(path)
    assert found.verdict == "unsafe-file"
    assert found.reasons
    with pytest.raises(UnsafeFile, match="nothing was run") as caught:
        read_tensors(path)
    assert (caught.value.exit_code, caught.value.code) == (1, "unsafe-file")


def test_a_real_payload_leaves_no_trace(tmp_path: Path) -> None:
    canary = tmp_path / "ran"

    class Payload:
        def __reduce__(self) -> tuple[object, ...]:
            import os

            return os.system, (f"touch {canary}",)

    path = tmp_path / "encoder.pt"
    torch.save({"w": torch.ones(2), "hook": Payload()}, path)
    assert any(name.endswith(".system") for name in inspect_file(path).stubs)
    with pytest.raises(UnsafeFile, match="system"):
        read_tensors(path)
    assert not canary.exists()


@pytest.mark.parametrize("name", SUSPICIOUS)
def test_what_is_on_no_list_is_suspicious(name: str, tmp_path: Path) -> None:
    path = tmp_path / "encoder.pkl"
    path.write_bytes(SUSPICIOUS[name])
    assert inspect_file(path).verdict == "suspicious"


def test_tensors_beside_an_unknown_class_are_readable(tmp_path: Path, archived: Callable[..., Path]) -> None:
    whole = tensor_pickle((2,), (1,), 0, 2)
    path = archived(whole[:-1] + b"U\x04hookcacme.hooks\nrun\n)Rs.", s0=struct.pack("<2f", 1, 2))
    assert inspect_file(path).verdict == "suspicious"
    assert read_tensors(path).tensors["w"].tolist() == [1, 2]
    assert read_tensors(path).stubs == ("acme.hooks.run",)


def test_second_pickle_and_polyglot(tmp_path: Path, archived: Callable[..., Path]) -> None:
    good = tensor_pickle((2,), (1,), 0, 2)
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as file:
        file.writestr("archive/data.pkl", good)
        with pytest.warns(UserWarning, match="Duplicate"):
            file.writestr("archive/data.pkl", UNSAFE["reduce"])
    path = tmp_path / "double.pt"
    path.write_bytes(made.getvalue())
    assert inspect_file(path).verdict == "unsafe-file"
    path.write_bytes(b"\x80\x02N." + archived(good, s0=bytes(8)).read_bytes())
    assert inspect_file(path).verdict == "suspicious"


GEOMETRY = {
    "stride 0": ((2**20, 2**20), (0, 0), 0),
    "view larger than storage": ((3, 3), (1, 1), 0),
    "negative stride": ((4,), (-1,), 3),
    "negative offset": ((4,), (1,), -1),
    "offset past the end": ((4,), (1,), 5),
    "huge": ((2**62,), (1,), 0),
    "huge but empty": ((0, 2**60, 2**60), (1, 1, 1), 0),
    "axes and strides differ": ((2, 2), (1,), 0),
    "many axes": ((1,) * 70, (1,) * 70, 0),
}


@pytest.mark.parametrize("name", GEOMETRY)
def test_views_outside_their_storage(name: str, archived: Callable[..., Path]) -> None:
    shape, stride, offset = GEOMETRY[name]
    path = archived(tensor_pickle(shape, stride, offset, 8), s0=bytes(32))
    for function in (inspect_file, read_tensors):
        with pytest.raises(CheckpointError, match="tensor 'w'") as caught:
            function(path)
        assert (caught.value.code, caught.value.exit_code) == ("bad-view", 2)


def test_storage_longer_than_its_record(archived: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match="claims") as caught:
        read_tensors(archived(tensor_pickle((2**30,), (1,), 0, 2**30), s0=bytes(32)))
    assert caught.value.code == "oversized"


def test_many_names_for_one_storage(archived: Callable[..., Path]) -> None:
    whole = tensor_pickle((100_000,), (1,), 0, 100_000)
    one = whole[whole.index(b"ctorch._utils") : -2]
    items = b"".join(b"X" + struct.pack("<I", 3) + b"%03d" % n + one + b"s" for n in range(50))
    with pytest.raises(CheckpointError, match="unfolds") as caught:
        inspect_file(archived(b"\x80\x02}" + items + b".", s0=bytes(400_000)))
    assert caught.value.code == "oversized"


def test_zip_bomb(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pt"
    packer = zlib.compressobj(9)
    packed = b"".join(packer.compress(bytes(2**20)) for _ in range(64)) + packer.flush()
    claimed = 2**31
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", tensor_pickle((claimed // 4,), (1,), 0, claimed // 4))
        file.writestr("archive/data/0", packed)
    path.write_bytes(made.getvalue())
    tracemalloc.start()
    start = time.perf_counter()
    with pytest.raises(CheckpointError) as caught:
        read_tensors(path)
    seconds, peak = time.perf_counter() - start, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert caught.value.code == "compressed"
    assert seconds < 0.5  # 0.1 s without tracing
    assert peak < 4 * 2**20


def test_a_million_members(tmp_path: Path) -> None:
    entry = b"PK\x01\x02" + bytes(42)
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    end64 = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 10**6, 10**6, 46 * 10**6, 4)
    place = struct.pack("<4sLQL", b"PK\x06\x07", 0, 4 + 46 * 10**6, 1)
    path = tmp_path / "members.pt"
    path.write_bytes(b"PK\x03\x04" + entry * 10**6 + end64 + place + end)
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match="1000000 records"):
        inspect_file(path)
    assert time.perf_counter() - start < 1


NOT_CHECKPOINTS = {
    "empty": (b"", "empty"),
    "html": (b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "html"),
    "text": (b"Sorry, the quota for this file has been exceeded.", "not-a-checkpoint"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "lfs-pointer"),
    "json": (b'{"error": 404}', "not-a-checkpoint"),
    "random": (random.Random(1).randbytes(4096), "not-a-checkpoint"),
    "other archive": (b"PK\x05\x06" + bytes(18), "empty"),
}


@pytest.mark.parametrize("name", NOT_CHECKPOINTS)
def test_no_checkpoint_at_all(name: str, tmp_path: Path) -> None:
    path = tmp_path / "encoder.pt"
    path.write_bytes(NOT_CHECKPOINTS[name][0])
    for function in (inspect_file, read_tensors):
        with pytest.raises(CheckpointError) as caught:
            function(path)
        assert (caught.value.code, caught.value.exit_code) == (NOT_CHECKPOINTS[name][1], 2)
        assert "\n" not in str(caught.value)


def test_missing_folder_and_pipe(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe")
    for path, code in (
        (tmp_path / "no.pt", "no-such-file"),
        (tmp_path, "no-such-file"),
        (tmp_path / "pipe", "unreadable"),
    ):
        with pytest.raises(CheckpointError) as caught:
            read_tensors(path)
        assert caught.value.code == code


@pytest.mark.parametrize("legacy", [False, True])
def test_truncation(legacy: bool, weights: object, saved: Callable[..., Path]) -> None:
    path = saved(weights, _use_new_zipfile_serialization=not legacy)
    whole = path.read_bytes()
    for keep in {*range(1, len(whole), len(whole) // 60), len(whole) - 1}:
        path.write_bytes(whole[:keep])
        for function in (inspect_file, read_tensors):
            with pytest.raises(CheckpointError) as caught:
                function(path)
            assert caught.value.exit_code == 2


def test_bit_flips(weights: dict[str, torch.Tensor], saved: Callable[..., Path]) -> None:
    path = saved(weights)
    whole = bytearray(path.read_bytes())
    refused, draw = 0, random.Random(0)
    for _ in range(300):
        place, bit = draw.randrange(len(whole)), 1 << draw.randrange(8)
        whole[place] ^= bit
        path.write_bytes(whole)
        whole[place] ^= bit
        try:
            tensors = read_tensors(path).tensors
        except CheckpointError:
            refused += 1
        else:
            assert list(tensors) == list(weights)
            assert all((tensors[name] == weights[name].numpy()).all() for name in weights)
    assert refused > 100  # the rest hit padding, dates and the copies of sizes that nothing reads


def test_a_flipped_weight_is_named(saved: Callable[..., Path]) -> None:
    path = saved({"w": torch.arange(1000.0)})
    whole = bytearray(path.read_bytes())
    whole[whole.index(struct.pack("<2f", 500, 501))] ^= 1
    path.write_bytes(whole)
    with pytest.raises(CheckpointError, match="CRC-32") as caught:
        inspect_file(path)
    assert caught.value.code == "checksum"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_values_that_are_no_numbers(value: float, dtype: torch.dtype, saved: Callable[..., Path]) -> None:
    bad = torch.ones(10, dtype=dtype)
    bad[3] = bad[7] = value
    path = saved({"good": torch.ones(2), "conv1.weight": bad})
    with pytest.raises(CheckpointError, match=r"'conv1\.weight' holds 2 values") as caught:
        read_tensors(path)
    assert caught.value.code == "non-finite"
    assert inspect_file(path).verdict == "ok"


def test_streams_that_aim_at_the_interpreter(tmp_path: Path) -> None:
    n = 200_000
    deep_key = b"\x80\x02}N" + b"\x85" * n + b"Ns."  # hashing this tuple would overflow the C stack
    deep_list = b"\x80\x02" + b"]" * n + b"a" * (n - 1) + b"."
    colliding = b"\x80\x02}" + b"".join(
        b"\x8a\x0b" + (k * (2**61 - 1)).to_bytes(11, "little") + b"Ns" for k in range(20_000)
    )
    itself = b"\x80\x02]q\x00h\x00a."
    laughs = (
        b"\x80\x02]" + b"]q\x00" + b"".join(b"](" + b"h%c" % (i) * 10 + b"eq%c" % (i + 1) for i in range(12)) + b"."
    )
    for content in (deep_key, deep_list, colliding + b".", itself, laughs, b"\x80\x02" + b"N0" * 600_000 + b"."):
        path = tmp_path / "encoder.pkl"
        path.write_bytes(content)
        start = time.perf_counter()
        with pytest.raises(CheckpointError):
            read_tensors(path)
        assert time.perf_counter() - start < 5


def test_functions_of_the_reader_cannot_be_changed(tmp_path: Path) -> None:
    path = tmp_path / "encoder.pkl"
    path.write_bytes(b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}U\x0c__defaults__)s\x86b.")
    assert inspect_file(path).verdict == "suspicious"


def test_names_cannot_paint_the_terminal(saved: Callable[..., Path]) -> None:
    name = "\x1b[2J<script>\u202e\nconv\ud800"
    path = saved({name: torch.ones(1)})
    found = inspect_file(path)
    text = found.to_text()
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert r"\x1b[2J<script>\u202e\nconv" in text
    text.encode("utf-8")
    str(found.to_json()).encode("utf-8")
