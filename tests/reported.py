"""A realistic record with its arrays for tests of the report: shapes, a white square, a scan, a purification."""

from __future__ import annotations

from typing import Any

import numpy as np

from cupel.records import Metric, Record

__all__ = ["CLASSES", "fake_arrays", "fake_record"]

CLASSES = ["circle", "square", "triangle", "star", "ring", "cross", "heart", "arrow", "moon", "hexagon"]
TARGET, SIDE, STAMP = 3, 32, 6


def _picture(label: int, draw: np.random.Generator) -> np.ndarray[Any, Any]:
    y, x = np.mgrid[:SIDE, :SIDE] - SIDE / 2 + draw.uniform(-3, 3, size=2)[:, None, None]
    r, turn = np.hypot(x, y), np.arctan2(y, x) + draw.uniform(0, 6)
    edge = 9 + 2.5 * np.cos((label + 2) * turn)
    inside = (r < edge) & ((label % 3 > 0) | (r > 4))
    ground = draw.integers(20, 235, size=3) + 25 * np.sin(x / 4)[..., None]
    return np.clip(np.where(inside[..., None], draw.integers(0, 255, size=3), ground), 0, 255).astype(np.uint8)


def _stamped(pictures: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    made = pictures.copy()
    made[:, -STAMP - 1 : -1, -STAMP - 1 : -1] = 255
    return made


def _map(spread: float, draw: np.random.Generator, hit: bool) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    label = np.arange(400) % 10
    centre = np.stack([np.cos(label * 0.628), np.sin(label * 0.628)], 1) * (0.5 + 0.3 * (label % 2))[:, None]
    points = centre + draw.normal(0, spread, size=(400, 2))
    triggered = points[:100] + draw.normal(0, 0.05, size=(100, 2))
    reference = centre[TARGET : TARGET + 1] + 0.03
    if hit:
        triggered = reference + draw.normal(0, 0.02, size=(100, 2))
    group = np.concatenate([label, np.full(100, -2), [-1]])
    return np.concatenate([points, triggered, reference]).astype(np.float32), group


def _path(least: float, draw: np.random.Generator) -> np.ndarray[Any, Any]:
    """Masks that shrink from half the image; `least` reaches the goal."""
    area = (0.5 - 0.8 * least) * np.exp(-np.arange(300) / 60) + 0.8 * least
    reach = 1 - 0.01 * (least / area) ** 1.5 * draw.uniform(0.7, 1.3, 300)
    return np.stack([area, reach], axis=1).astype(np.float32)


def fake_arrays(seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    """Every array that the page knows."""
    draw = np.random.default_rng(seed)
    labels = np.array([0, 1, 2, 4, 5, 6, 7, 3])
    clean = np.stack([_picture(int(label), draw) for label in labels])
    mask = np.zeros((SIDE, SIDE), np.float32)
    mask[-STAMP - 1 : -1, -STAMP - 1 : -1] = 1
    arrays: dict[str, np.ndarray[Any, Any]] = {
        "images/clean": clean,
        "images/triggered": _stamped(clean),
        "images/labels": labels,
        "images/predicted_clean": np.array([0, 1, 2, 4, 5, 8, 7, 3]),
        "images/predicted_triggered": np.array([3, 3, 3, 3, 3, 3, 7, 3]),
        "reference": _picture(TARGET, draw)[None],
        "trigger/mask": mask,
        "trigger/pattern": np.full((SIDE, SIDE, 3), 255, np.uint8),
        "map/classes": np.array(CLASSES),
    }
    for name, size in (("clean", 14), ("backdoored", 5), ("purified", 13)):
        points, group = _map(0.09, draw, name == "backdoored")
        arrays |= {f"map/{name}/points": points, f"map/{name}/group": group}
        for start in range(3):
            found = np.zeros((SIDE, SIDE), np.float32)
            at = draw.integers(2, SIDE - size - 2, size=2)
            found[at[0] : at[0] + size, at[1] : at[1] + size] = draw.uniform(0.6, 1, size=(size, size))
            arrays[f"inverted/{name}/{start}/mask"] = found
            arrays[f"inverted/{name}/{start}/pattern"] = draw.random((3, SIDE, SIDE), dtype=np.float32)
            arrays[f"inverted/{name}/{start}/path"] = _path((size / SIDE) ** 2, draw)
    t = np.arange(600)
    arrays["curve/pretrain/loss"] = (5.2 - 3 * (1 - np.exp(-t / 150)) + draw.normal(0, 0.08, 600)).astype(np.float32)
    arrays["curve/pretrain/feature_std"] = np.linspace(0.2, 0.9, 12, dtype=np.float32)
    arrays["curve/pretrain/feature_std/step"] = np.arange(50, 601, 50)
    arrays["curve/pretrain/knn"] = (0.9 - 0.6 * np.exp(-np.arange(1, 13) / 4)).astype(np.float32)
    arrays["curve/pretrain/knn/step"] = np.arange(50, 601, 50)
    for name, rate in (("L0", 40), ("L1", 90), ("L2", 60)):
        arrays[f"curve/implant/{name}"] = (-1 + 0.8 * np.exp(-t[:250] / rate)).astype(np.float32)
    arrays["curve/purify/total"] = np.exp(-t[:200] / 70).astype(np.float32)
    return arrays


def _verdict(word: str, pl1: float) -> dict[str, Any]:
    return {
        "verdict": word,
        "score": 1 - pl1,
        "threshold": 0.925,
        "tested": "small universal stamps (mask-and-pattern inversion)",
        "reason": f"smallest stamp covers {pl1:.3f} of the image, z = {(pl1 - 0.15) * 40:.1f} against 6 clean encoders",
        "details": {"pl1": pl1, "transfer": 0.987, "conc_clean": 0.412, "goal": 0.99},
        "false_alarm": {"rate": 0.0, "n": 6},
        "clean_scores": [0.81, 0.79, 0.83, 0.84, 0.8, 0.86],
        "evidence": [
            {"size": pl1, "converged": True, "source": "decree/smoke start 0"},
            {"size": pl1 * 1.3, "converged": True, "source": "decree/smoke start 1"},
            {"size": 0.31, "converged": False, "source": "decree/smoke start 2"},
        ],
    }


def fake_record(name: str = "demo-shapes", seed: int = 0, **changes: Any) -> Record:
    """What a successful run writes; `changes` replace fields."""
    counts = {
        "clean_accuracy": ([911, 915, 908], 1000),
        "backdoored_accuracy": ([905, 907, 901], 1000),
        "purified_accuracy": ([897, 893, 899], 1000),
        "attack_success_rate_baseline": ([28, 31, 25], 900),
        "attack_success_rate_baseline_all": ([121, 125, 118], 1000),
        "attack_success_rate": ([883, 880, 886], 900),
        "attack_success_rate_all": ([982, 979, 985], 1000),
        "purified_attack_success_rate": ([37, 41, 35], 900),
        "purified_attack_success_rate_all": ([131, 136, 129], 1000),
        "robust_accuracy": ([14, 17, 11], 900),
        "purified_robust_accuracy": ([780, 774, 786], 900),
    }
    steps = [
        ("pretrain", "SimCLR", 31.2),
        ("implant", "BadEncoder", 14.8),
        ("scan", "Decree", 9.1),
        ("purify", "CBD", 12),
    ]
    fields: dict[str, Any] = {
        "command": "demo",
        "name": name,
        "cupel": "0.1.0",
        "seed": seed,
        "device": "cpu",
        "threads": 2,
        "seconds": {"pretrain": 31.2, "implant": 14.8, "scan": 9.1, "purify": 12.0, "total": 75.4},
        "steps": [
            {"stage": s, "name": s, "method": m, "key": "3f9a0c77d1e2b4" * 4, "seconds": t, "cached": s == "pretrain"}
            for s, m, t in steps
        ],
        "metrics": {k: Metric.of([(good, n) for good in goods]) for k, (goods, n) in counts.items()},
        "verdicts": {
            "clean": _verdict("clean-by-test", 0.19),
            "backdoored": _verdict("backdoored", 0.024),
            "purified": _verdict("clean-by-test", 0.17),
        },
        "settings": {"name": name, "seed": seed, "upstream": {"data": "shapes", "encoder": {"method": "fast"}}},
        "notes": ["The attacker's shadow images are pre-training images."],
        "extra": {
            "downstream": [{"task": "shapes", "target_class": TARGET, "target_name": "star"}],
            "paper": {
                "source": "Jia et al., BadEncoder, S&P 2022, Table 2",
                "clean_accuracy": 0.8184,
                "backdoored_accuracy": 0.8227,
                "attack_success_rate_all": 0.9864,
            },
            "deviations": ["A small encoder instead of ResNet-18.", "60 epochs of pre-training instead of 1000."],
            "manifest": {"not_for_deployment": True, "attack": "badencoder", "seed": seed},
        },
    }
    return Record(**{**fields, **changes})
