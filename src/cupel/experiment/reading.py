"""Reading experiment files: safe YAML 1.2, size and nesting bounded, mistakes with line and column."""

from __future__ import annotations

import importlib.resources
import re
from pathlib import Path
from typing import Any

import yaml

from cupel.errors import DataError, SettingsError, did_you_mean

__all__ = ["packaged", "read_experiment", "yaml_value"]


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses duplicate keys and reads `1e-3` as a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key '{key.value}'", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


# YAML 1.2: `yes` and `no` are words, `1e-3` is a number
_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern) for tag, pattern in rules if tag not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float")
    ]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|false)$"), list("tf"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d+\.\d*|\.\d+|\d+(?=[eE]))(?:[eE][-+]?\d+)?$"),
    list("-+0123456789."),
)

_MAX_BYTES, _MAX_DEPTH, _MAX_VALUES = 2**20, 64, 20_000


def packaged() -> dict[str, Path]:
    """The experiments that ship with Cupel, by name."""
    root = Path(str(importlib.resources.files("cupel") / "papers"))
    return {path.stem: path for path in sorted(root.rglob("*.yaml"))}


def read_experiment(source: str | Path) -> tuple[dict[str, Any], str]:
    """The plain content of an experiment file, and its name for errors.

    Args:
        source: A path, or the name of a packaged experiment.

    Raises:
        SettingsError: not YAML, too large, too deep, duplicate keys.
        DataError: no such file.
    """
    path = Path(source)
    known = packaged()
    if not path.exists() or (path.is_dir() and str(source) in known):  # a folder of results may bear the name
        if str(source) not in known:
            raise DataError(source, "no such file or packaged experiment", did_you_mean(str(source), known))
        path = known[str(source)]
    if path.is_dir():
        raise DataError(path, "is a folder", "give a YAML file")
    if path.stat().st_size > _MAX_BYTES:
        raise SettingsError(path.name, "is larger than 1 MiB", "an experiment is a page of YAML")
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # a SafeLoader
        _check_extent(data)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{path.name}:{mark.line + 1}:{mark.column + 1}" if mark else path.name
        raise SettingsError(where, f"is not valid YAML ({error.problem})") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise SettingsError(path.name, f"is not valid YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(data, dict):
        raise SettingsError(path.name, "holds no mapping", "start with `name: …`")
    return data, path.name


def _check_extent(value: Any) -> None:
    """Refuse what is nested too deep, or grows too large when its aliases are followed."""
    layer, total = [value], 0
    for _ in range(_MAX_DEPTH):
        layer = [
            child
            for one in layer
            if isinstance(one, dict | list)
            for child in (one.values() if isinstance(one, dict) else one)
        ]
        total += len(layer)
        if total > _MAX_VALUES:
            raise RecursionError(f"holds more than {_MAX_VALUES} values")
        if not layer:
            return
    raise RecursionError(f"nested deeper than {_MAX_DEPTH}")


def yaml_value(text: str, where: str) -> Any:
    """One value as YAML, for `key=value` on the command line.

    Raises:
        SettingsError: not YAML.

    Example:
        >>> yaml_value("1e-3", "--set")
        0.001
    """
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except yaml.YAMLError:
        raise SettingsError(where, f"'{text}' is not valid YAML") from None
