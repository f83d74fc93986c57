"""What this machine offers, and what would make Cupel slow or useless on it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cupel
from cupel.lookup import data_roots
from cupel.threads import allowed_cores, fair_threads, others_busy, read_load, usable_cpus

__all__ = ["doctor", "doctor_command"]

_PACKAGES = ("torch", "torchvision", "numpy", "pillow", "safetensors", "pydantic", "scikit-learn", "pyarrow")
_EXTRAS = {"hub": "datasets"}
_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
_OMP = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "MKL_NUM_THREADS")
_SIDE = 1024  # of the matrix product: 50 ms at 0.05 TFLOP/s


def doctor(environment: Mapping[str, str] = os.environ, proc: Path = Path("/proc")) -> dict[str, Any]:
    """Everything as plain values; `problems` makes Cupel unusable, `warnings` makes it slow.

    Args:
        environment: Variables of the process.
        proc: Where the kernel tells of processors and load.
    """
    problems, warnings = list[str](), list[str]()
    found: dict[str, Any] = {"schema": 1, "command": "doctor", "cupel": cupel.__version__}
    found["python"] = platform.python_version()
    found["packages"] = {name: _version(name) for name in _PACKAGES}
    found["extras"] = {extra: importlib.util.find_spec(module) is not None for extra, module in _EXTRAS.items()}
    found["cpu"] = _cpu(proc)
    cpus, before = usable_cpus(), read_load(proc)
    time.sleep(0.2)
    busy = others_busy(before, read_load(proc))
    found["load"] = {"usable_cpus": cpus, "others_busy": round(busy, 2)}
    found["omp"] = {name: environment.get(name) for name in _OMP}
    try:
        import torch
    except Exception as error:  # whatever is wrong with it, nothing works without
        problems.append(f"torch cannot be imported ({type(error).__name__}: {' '.join(str(error).split())[:120]})")
    else:
        found |= _of_torch(torch, warnings)
        threads, said = fair_threads(torch.get_num_threads(), environment, cpus, busy, len(allowed_cores()))
        if said:
            warnings.append(said)
        if threads > cpus:
            warnings.append(f"OMP_NUM_THREADS asks for {threads} threads on {cpus} usable cores; set it to {cpus}")
    found["compiler"] = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    disk = shutil.disk_usage(Path.cwd())
    found["free"] = {"disk_gib": round(disk.free / 2**30, 1), "memory_gib": _memory(proc)}
    if disk.free < 2**30:
        warnings.append("less than 1 GiB of disk is free here; runs keep encoders and embeddings in their --out folder")
    found["data"] = {
        str(root): sorted(entry.name for entry in root.iterdir() if entry.is_dir() and entry.name[0] != ".")
        for root in data_roots()
        if root.is_dir()
    }
    return {**found, "problems": problems, "warnings": warnings}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu(proc: Path) -> dict[str, Any]:
    try:
        lines = [line.partition(":") for line in (proc / "cpuinfo").read_text().splitlines()]
    except OSError:
        return {"model": platform.processor() or platform.machine(), "features": []}
    table = {key.strip(): value.strip() for key, _, value in reversed(lines)}
    flags = table.get("flags", "").split()
    return {"model": table.get("model name", platform.machine()), "features": [f for f in _FEATURES if f in flags]}


def _memory(proc: Path) -> float | None:
    try:
        for line in (proc / "meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                return round(int(line.split()[1]) / 2**20, 1)
    except (OSError, ValueError, IndexError):
        pass
    return None


def _of_torch(torch: Any, warnings: list[str]) -> dict[str, Any]:
    """Threads, devices, and how fast matrices are multiplied."""
    from cupel.folding import bf16_pays

    cpu = torch.device("cpu")
    rates = {str(t).removeprefix("torch."): _rate(torch, t) for t in (torch.float32, torch.bfloat16)}
    if not bf16_pays(cpu):
        warnings.append("this processor has no bf16 arithmetic: recipes train faster with --set …precision=fp32")
    devices = [
        {"name": one.name, "memory_gib": round(one.total_memory / 2**30, 1)}
        for one in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    ]
    return {"threads": torch.get_num_threads(), "tflops": rates, "cuda": devices, "bf16": bf16_pays(cpu)}


def _rate(torch: Any, dtype: Any) -> float:
    """10¹² floating-point operations per second of a square product; the best of a few."""
    a = torch.ones(_SIDE, _SIDE, dtype=dtype)
    best, stop = float("inf"), time.perf_counter() + 0.3
    for _ in range(20):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
        if time.perf_counter() > stop:
            break
    return round(2 * _SIDE**3 / best / 1e12, 3)


def _text(found: Mapping[str, Any]) -> str:
    rows = [("cupel", f"{found['cupel']}, Python {found['python']} on {sys.platform}")]
    rows.append(("packages", ", ".join(f"{k} {v or 'missing'}" for k, v in found["packages"].items())))
    for extra, there in found["extras"].items():
        rows.append((f"[{extra}]", "installed" if there else f"not installed: pip install 'cupel[{extra}]'"))
    rows.append(
        ("processor", f"{found['cpu']['model']} ({', '.join(found['cpu']['features']) or 'no vector units known'})")
    )
    load = found["load"]
    rows.append(("cores", f"{load['usable_cpus']} usable, {load['others_busy']:.1f} kept busy by others"))
    if "threads" in found:
        rates = ", ".join(f"{name} {rate:.2f}" for name, rate in found["tflops"].items())
        rows.append(("threads", f"{found['threads']}; matrix products in TFLOP/s: {rates}"))
        cuda = "; ".join(f"{one['name']}, {one['memory_gib']} GiB" for one in found["cuda"])
        rows.append(("CUDA", cuda or "no device"))
    rows.append(("OpenMP", ", ".join(f"{name}={value or 'unset'}" for name, value in found["omp"].items())))
    rows.append(("", "two processes with two threads each on two cores took a hundred times as long as with one each;"))
    rows.append(
        ("", "OMP_WAIT_POLICY=PASSIVE did not help, and cost a third on an idle machine: lower OMP_NUM_THREADS")
    )
    rows.append(("compiler", found["compiler"] or "none: `compile: true` goes on without torch.compile"))
    memory = found["free"]["memory_gib"]
    rows.append(
        ("free", f"{found['free']['disk_gib']} GiB of disk here, {'?' if memory is None else memory} GiB of memory")
    )
    for root, names in found["data"].items():
        rows.append(("data", f"{root}: {', '.join(names) or 'empty'}"))
    if not found["data"]:
        rows.append(("data", "embedded only (digits, shapes); set CUPEL_DATA to a folder with more"))
    rows += [("warning", one) for one in found["warnings"]] + [("problem", one) for one in found["problems"]]
    return "\n".join(f"{label:<10}{text}" for label, text in rows)


def doctor_command(form: str = "text") -> int:
    """Print it.

    Args:
        form: `text` or `json`.

    Returns:
        2 if Cupel cannot work here, else 0.
    """
    found = doctor()
    print(json.dumps(found, indent=1) if form == "json" else _text(found))
    return 2 if found["problems"] else 0
