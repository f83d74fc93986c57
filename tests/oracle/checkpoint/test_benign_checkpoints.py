"""What research code really saves: read to the bit as torch reads it, and never accused."""

from __future__ import annotations

import argparse
import datetime
import pathlib
import pickle
import subprocess
import sys
import time
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from cupel.checkpoint import TensorInfo, inspect_file, read_tensors
from cupel.errors import CheckpointError

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex64, torch.complex128, torch.uint16,
]  # fmt: skip


def same(found: np.ndarray[Any, Any], expected: torch.Tensor) -> bool:
    """Equal to the bit, but for bfloat16, which comes as float32."""
    there = expected.detach().contiguous()
    there = there.float() if there.dtype == torch.bfloat16 else there
    array = there.numpy()
    return found.dtype == array.dtype and found.shape == array.shape and found.tobytes() == array.tobytes()


@pytest.mark.parametrize("legacy", [False, True])
def test_every_type_and_layout(legacy: bool, saved: Callable[..., Path]) -> None:
    base = torch.arange(24).reshape(2, 3, 4)
    tensors = {f"{dtype}".removeprefix("torch."): (base % 7).to(dtype) for dtype in DTYPES}
    tensors |= {
        "transposed": base.permute(2, 0, 1).double(),
        "slice": base.float()[1:, ::2, 1],
        "expanded": torch.arange(6.0)[:2, None].expand(2, 3),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 5),
        "parameter": nn.Parameter(base.float()),
        "subnormal": torch.tensor([1e-40, -0.0]),
    }
    path = saved(tensors, _use_new_zipfile_serialization=not legacy)
    found = read_tensors(path)
    assert list(found.tensors) == list(tensors)
    assert all(same(found.tensors[name], tensors[name]) for name in tensors)
    seen = inspect_file(path)
    assert seen.verdict == "ok"
    assert seen.format == found.format == ("torch-legacy" if legacy else "torch-zip")
    assert TensorInfo("bfloat16", "bfloat16", (2, 3, 4)) in seen.tensors


def test_arrays_outlive_the_file(saved: Callable[..., Path]) -> None:
    path = saved({"w": torch.ones(5), "tied": torch.ones(5)})
    array = read_tensors(path).tensors["w"]
    path.unlink()
    array += 1
    assert array.tolist() == [2] * 5


def test_training_checkpoint(weights: OrderedDict[str, torch.Tensor], saved: Callable[..., Path]) -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    path = saved(
        {
            "epoch": 3,
            "state_dict": OrderedDict({f"module.{name}": tensor for name, tensor in weights.items()}),
            "optimizer": optimizer.state_dict(),
            "args": argparse.Namespace(lr=0.1, out=pathlib.PurePosixPath("a"), started=datetime.datetime(2026, 1, 1)),
            "best": np.float64(0.93),
            "history": defaultdict(list, loss=[1.0, 0.5]),
            "seen": {1, 2},
            "curve": np.arange(6.0).reshape(2, 3),
            "device": torch.device("cpu"),
            "dtype": torch.float32,
        }
    )
    found = read_tensors(path)
    assert all(same(found.tensors[f"state_dict.module.{name}"], tensor) for name, tensor in weights.items())
    assert same(found.tensors["optimizer.state.0.exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])
    assert found.tensors["curve"].tolist() == [[0, 1, 2], [3, 4, 5]]
    seen = inspect_file(path)
    assert seen.verdict == "ok"
    assert {"argparse.Namespace", "numpy._core.multiarray.scalar", "pathlib.PurePosixPath"} <= set(seen.stubs)
    assert "argparse" in seen.to_text()


@pytest.mark.parametrize("legacy", [False, True])
def test_whole_module(legacy: bool, saved: Callable[..., Path]) -> None:
    block = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Sequential(nn.Linear(4, 2)))
    block.register_buffer("hidden", torch.ones(3), persistent=False)
    block.register_buffer("kept", torch.ones(2))
    path = saved(nn.DataParallel(block), _use_new_zipfile_serialization=not legacy)
    found, expected = read_tensors(path), nn.DataParallel(block).state_dict()
    assert set(found.tensors) == set(expected)
    assert all(same(found.tensors[name], tensor) for name, tensor in expected.items())
    seen = inspect_file(path)
    assert seen.verdict == "ok"
    assert "torch.nn.modules.conv.Conv2d" in seen.stubs


@pytest.mark.parametrize("protocol", range(2, 6))
def test_bare_pickles(protocol: int, weights: OrderedDict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / "encoder.pkl"
    columns = np.asfortranarray(np.arange(6, dtype=np.int16).reshape(2, 3))
    path.write_bytes(pickle.dumps({"torch": weights, "columns": columns, "half": np.ones(3, np.float16)}, protocol))
    found = read_tensors(path)
    assert all(same(found.tensors[f"torch.{name}"], tensor) for name, tensor in weights.items())
    assert (found.tensors["columns"] == columns).all()
    assert found.tensors["half"].dtype == np.float16
    assert inspect_file(path).verdict == "ok"


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_cut_pickle_is_damaged_not_unsafe(protocol: int, weights: Any, tmp_path: Path) -> None:
    path = tmp_path / "encoder.pkl"
    whole = pickle.dumps(weights, protocol)
    for keep in range(20, len(whole), 37):
        path.write_bytes(whole[:keep])
        with pytest.raises(CheckpointError) as caught:
            read_tensors(path)
        assert caught.value.code == "truncated"


@pytest.mark.parametrize("protocol", [2, 4])
def test_torch_with_another_pickle_protocol(protocol: int, weights: Any, saved: Callable[..., Path]) -> None:
    path = saved(weights, pickle_protocol=protocol)
    assert all(same(read_tensors(path).tensors[name], tensor) for name, tensor in weights.items())


def test_resnet18_is_read_fast_and_named_as_in_torch(saved: Callable[..., Path]) -> None:
    model = torchvision.models.resnet18()
    path = saved(model.state_dict())
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        seen = inspect_file(path)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.5
    assert seen.size > 45e6
    assert [(t.name, t.shape) for t in seen.tensors] == [(n, tuple(t.shape)) for n, t in model.state_dict().items()]
    assert seen.stubs == ()
    tensors = read_tensors(path).tensors
    assert all(same(tensors[name], tensor) for name, tensor in model.state_dict().items())


def test_torchscript_is_inspected_only(tmp_path: Path) -> None:
    path = tmp_path / "scripted.pt"
    with warnings.catch_warnings(action="ignore"):  # scripting is deprecated, but its files are still about
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)
    assert inspect_file(path).verdict == "suspicious"


def test_no_torch_is_imported() -> None:
    code = (
        "import sys; from cupel.checkpoint import inspect_file, read_tensors, match_keys, write_safetensors;"
        "print([m for m in ('torch', 'torchvision', 'pydantic') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
