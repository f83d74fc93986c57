"""What the machine can do, measured in the process that uses it, and what a network asks of it."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["Line", "describe", "fit_line", "forward_flops", "gemm", "processor", "rate"]


def processor() -> str:
    """Name of the CPU, and which bf16 instructions it has."""
    name, flags = platform.processor() or platform.machine(), ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        fields = dict(line.split(":", 1) for line in cpuinfo.read_text().splitlines() if ":" in line)
        found = {key.strip(): value.strip() for key, value in fields.items()}
        family = f"family {found['cpu family']} model {found['model']}" if "cpu family" in found else ""
        name, flags = f"{found.get('model name', name)} {family}".strip(), found.get("flags", "")
    kinds = [word for word in ("avx512_bf16", "amx_bf16") if word in flags.split()]
    return f"{name} ({', '.join(kinds) or 'no bf16 instructions'})"


def gemm(dtype: torch.dtype, size: int = 2048, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Two square matrices whose product is the yardstick of the roofline."""
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator, device=device).to(dtype) for _ in range(2))
    return a, b


def rate(dtype: torch.dtype, size: int = 2048, seconds: float = 0.5) -> float:
    """FLOP/s of a square matrix product on the CPU: the best of as many as fit into `seconds`."""
    a, b = gemm(dtype, size)
    a @ b
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def forward_flops(module: nn.Module, side: int) -> float:
    """FLOP of one image's forward pass, a multiply-add counted as two; a training pass is taken as three forward."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(torch.zeros(1, 3, side, side, device=next(module.parameters()).device))
    return float(counter.get_total_flops())


def describe() -> dict[str, Any]:
    """What a ratio depends on."""
    return {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "unset"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "bf16_gemm_tflops": round(rate(torch.bfloat16) / 1e12, 3),
        "fp32_gemm_tflops": round(rate(torch.float32) / 1e12, 3),
    }


class Line(NamedTuple):
    """Least-squares line through points."""

    intercept: float
    slope: float
    r2: float


def fit_line(x: Sequence[float], y: Sequence[float]) -> Line:
    """The line, and the share of the variance of `y` that it explains.

    Example:
        >>> fit_line([1, 2, 3], [3.0, 5.0, 7.0])
        Line(intercept=1.0, slope=2.0, r2=1.0)
    """
    n = len(x)
    mean_x, mean_y = sum(x) / n, sum(y) / n
    spread = sum((a - mean_x) ** 2 for a in x)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread
    intercept = mean_y - slope * mean_x
    rest = sum((b - intercept - slope * a) ** 2 for a, b in zip(x, y, strict=True))
    total = sum((b - mean_y) ** 2 for b in y)
    return Line(intercept, slope, 1 - rest / total if total else 1.0)
