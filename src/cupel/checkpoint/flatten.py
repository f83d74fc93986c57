"""From the object of a checkpoint to its tensors under flat dotted names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from cupel.checkpoint.objects import Call, Global, Persistent, bytes_of
from cupel.checkpoint.pickled import Pickled, Storage
from cupel.checkpoint.tensors import DTYPES, View, dense
from cupel.checkpoint.text import clean, shown
from cupel.errors import CheckpointError

__all__ = ["tensors_of"]

_MAX_DEPTH = 64
_MAX_VISITS = 1_000_000
_REBUILDS = ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3")
_PARAMETERS = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")
_ARRAYS = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")
_BUFFERS = ("numpy.core.numeric._frombuffer", "numpy._core.numeric._frombuffer")
_NUMPY = re.compile(r"[<>|=]?([biufc])(1|2|4|8|16)")
_NUMPY_KINDS = {"b": "bool", "i": "int", "u": "uint", "f": "float", "c": "complex"}


def tensors_of(pickled: Pickled, where: object) -> dict[str, View]:
    """Every tensor the root object holds, checked against its storage.

    Dictionaries and lists give their keys and places to the names, modules the names of `state_dict()`, other objects
    those of their attributes.

    Raises:
        CheckpointError: a tensor lies outside its storage, two have one name, or the object never ends.
    """
    walk = _Walk(pickled, where)
    found: dict[str, View] = {}
    for name, call in walk.visit(pickled.root, (), 0):
        view = walk.tensor(call)
        if name in found:
            raise CheckpointError(where, f"holds two tensors named '{shown(name)}'", code="malformed")
        view.check(where, name)
        found[name] = view
    return found


class _Walk:
    def __init__(self, pickled: Pickled, where: object) -> None:
        self.pickled, self.where = pickled, where
        self.visits = 0

    def fault(self, what: str, code: str = "malformed") -> CheckpointError:
        return CheckpointError(self.where, what, "the file is damaged or hostile", code=code)

    def visit(self, value: Any, path: tuple[str, ...], depth: int) -> Iterator[tuple[str, Call]]:
        self.visits += 1
        if depth > _MAX_DEPTH or self.visits > _MAX_VISITS:
            raise self.fault("is nested too deep or refers to itself", "oversized")
        if isinstance(value, Call) and _is_tensor(value):
            yield clean(".".join(path) or "tensor"), value
            return
        for key, child in _children(value):
            if isinstance(child, (dict, list, tuple, Call)):
                yield from self.visit(child, (*path, key) if key else path, depth + 1)
            else:
                self.visits += 1

    def tensor(self, call: Call, depth: int = 0) -> View:
        """What a rebuilding call would make."""
        if depth > 4:
            raise self.fault("wraps a tensor too often")
        if call.of(*_PARAMETERS):
            inner = call.arguments[0] if call.arguments else None
            if isinstance(inner, Call) and _is_tensor(inner):
                return self.tensor(inner, depth + 1)
        elif call.of(*_REBUILDS):
            match call.arguments:
                case (storage, int() as offset, shape, strides, *rest) if _are_tuples(shape, strides):
                    dtype, data = self.storage(storage)
                    if call.of(_REBUILDS[2]):
                        dtype = _torch_dtype(rest[2] if len(rest) > 2 else None)
                    if dtype not in DTYPES:
                        raise self.fault("holds a tensor of an unknown type", "unsupported")
                    return View(dtype, _sizes(shape), tuple(strides), offset, data)
        elif (array := _numpy_array(call)) is not None:
            return array
        raise self.fault("describes a tensor in a way that is not read", "unsupported")

    def storage(self, value: Any) -> Storage:
        inner = self.pickled
        if isinstance(value, Call) and id(value) in inner.nested:
            inner, value = inner.nested[id(value)], inner.nested[id(value)].root
        if not isinstance(value, Persistent) or inner.storage is None:
            raise self.fault("builds a tensor on something that is no storage")
        return inner.storage(value)


def _are_tuples(*values: Any) -> bool:
    return all(isinstance(v, tuple) or (isinstance(v, Call) and v.of("torch.Size")) for v in values)


def _sizes(shape: Any) -> tuple[Any, ...]:
    if isinstance(shape, Call):  # torch.Size((…))
        shape = shape.arguments[0] if shape.arguments else ()
    return tuple(shape) if isinstance(shape, (tuple, list)) else ()


def _torch_dtype(found: Any) -> str:
    if not isinstance(found, Global) or found.module != "torch":
        return ""
    return {"double": "float64", "float": "float32", "half": "float16"}.get(found.name, found.name)


def _is_tensor(call: Call) -> bool:
    return call.of(*_REBUILDS, *_PARAMETERS) or _numpy_array(call) is not None


def _children(value: Any) -> Iterator[tuple[str, Any]]:
    """Names and parts of a container. A module's tables of parts give no name of their own."""
    if isinstance(value, dict):
        for key, child in value.items():
            yield (key if isinstance(key, str) else str(key) if isinstance(key, int) else type(key).__name__), child
    elif isinstance(value, (list, tuple)):
        for place, child in enumerate(value):
            yield str(place), child
    elif isinstance(value, Call):
        if value.of("collections.OrderedDict") and value.arguments:
            yield from _pairs(value.arguments[0])
        yield from _children(value.items)
        yield from _children(value.elements)
        for state in value.states:
            if isinstance(state, dict) and "_modules" in state:
                yield from _module(state)
            elif not value.of("collections.OrderedDict"):  # there the state is torch's bookkeeping of versions
                yield from _children(state)


def _pairs(value: Any) -> Iterator[tuple[str, Any]]:
    """The parts of `OrderedDict([[key, value], …])`, as Python 2 wrote it."""
    for pair in value if isinstance(value, (list, tuple)) else ():
        match pair:
            case [str() as key, child] | (str() as key, child):
                yield key, child


def _module(state: dict[Any, Any]) -> Iterator[tuple[str, Any]]:
    hidden = set(_names(state.get("_non_persistent_buffers_set")))
    for part in ("_parameters", "_buffers", "_modules"):
        for key, child in _children(state.get(part)):
            if part != "_buffers" or key not in hidden:
                yield key, child


def _names(value: Any) -> Iterator[str]:
    if isinstance(value, Call):
        value = value.arguments[0] if value.arguments else ()
    for name in value if isinstance(value, (list, tuple)) else ():
        if isinstance(name, str):
            yield name


def _numpy_array(call: Call) -> View | None:
    """The array that NumPy's pickles describe: by its state, or from protocol 5 on by a buffer."""
    shape: Any
    match call:
        case Call(states=[(int(), tuple() as shape, Call() as kind, bool() as columns, content)]) if call.of(*_ARRAYS):
            pass
        case Call(arguments=(content, Call() as kind, tuple() as shape, ("C" | "F") as order)) if call.of(*_BUFFERS):
            columns = order == "F"
        case _:
            return None
    dtype, data = _numpy_dtype(kind), bytes_of(content)
    if dtype is None or data is None or any(not isinstance(n, int) or n < 0 for n in shape):
        return None
    view = dense(dtype, shape[::-1] if columns else shape, memoryview(data))
    return View(dtype, shape, view.strides[::-1] if columns else view.strides, 0, view.data)


def _numpy_dtype(kind: Call) -> str | None:
    name = kind.arguments[0] if kind.arguments else None
    found = _NUMPY.fullmatch(name) if isinstance(name, str) else None
    if not kind.of("numpy.dtype"):
        return None
    big_endian = any(isinstance(s, tuple) and len(s) > 1 and s[1] == ">" for s in kind.states)
    if found is None or big_endian:
        return None
    bits = int(found[2]) * 8
    dtype = "bool" if found[1] == "b" else f"{_NUMPY_KINDS[found[1]]}{bits}"
    return dtype if dtype in DTYPES else None
