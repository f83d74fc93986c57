"""A pickle machine that builds records of what a stream asks for, and does none of it.

It never imports, calls or sets anything: a global becomes a `Global`, a call becomes a `Call`, a persistent id a
`Persistent`. Its dictionaries hash atoms only and nothing in it recurses, so a stream cannot reach the interpreter's
weak spots either (deep tuples as keys, colliding integers, attributes set on functions).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cupel.checkpoint.objects import Call, Global, Opaque, Persistent, Trace
from cupel.checkpoint.opcodes import Stream, opcodes

__all__ = ["run"]

MAX_STEPS = 1_000_000
_MAX_INDEX = 2**32
_HASH_MODULUS = 2**61 - 1  # from here on, integers can be chosen to collide in a dictionary
_OLD_NAMES = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # Python 2's, mapped by every Python 3 unpickler


def run(stream: Stream, max_steps: int = MAX_STEPS) -> Trace:
    """Follow a pickle from where `stream` stands to its STOP.

    Args:
        stream: Positioned at the start of a pickle.
        max_steps: Longest stream followed.

    Returns:
        The trace. Broken streams end it with `error` set; nothing is raised.

    Example:
        >>> import io
        >>> trace = run(io.BytesIO(b"cos" + bytes([10]) + b"system" + bytes([10]) + b")R."))
        >>> [(g.path, uses) for g, uses in trace.globals.items()]
        [('os.system', {'calls'})]
    """
    machine = _Machine()
    trace = machine.trace
    try:
        for step, (name, argument) in enumerate(opcodes(stream)):
            if step >= max_steps:
                trace.error = f"more than {max_steps} steps"
                break
            _STEPS[name](machine, argument)
    except (EOFError, ValueError, LookupError, OverflowError, TypeError) as error:
        trace.error = f"{error}" if isinstance(error, (EOFError, ValueError)) else "an opcode lacks its operands"
        trace.cut = isinstance(error, EOFError)
    if not trace.error:
        trace.value, trace.end = machine.result, stream.tell()
    return trace


class _Machine:
    def __init__(self) -> None:
        self.trace = Trace()
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # stacks under the open marks
        self.memo: dict[int, Any] = {}
        self.result: Any = None

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        return self.stack.pop()

    def mark(self) -> None:
        self.below.append(self.stack)
        self.stack = []

    def pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.below.pop()
        return items

    def drop_mark(self) -> None:
        self.pop_mark()

    def pop_or_unmark(self) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.pop_mark()

    def put(self, index: int) -> None:
        if not 0 <= index < _MAX_INDEX:
            raise ValueError("memo index out of range")
        self.memo[index] = self.stack[-1]

    def named(self, module: Any, name: Any) -> Global:
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("a global without a name")
        found = Global(_OLD_NAMES.get(module, module), name)
        self.trace.globals.setdefault(found, set())
        return found

    def call(self, function: Any, arguments: Any, keywords: Any = None) -> Call:
        if not isinstance(function, (Global, Call, Persistent)):
            raise ValueError(f"calls a {type(function).__name__}")
        if not isinstance(arguments, (tuple, list)):
            # Whatever pretends to be a tuple of arguments is kept, as one of them.
            arguments = (arguments,)
        if isinstance(function, Global):
            self.trace.globals[function].add("calls")
        made = Call(function, (*arguments, keywords) if keywords else tuple(arguments))
        self.trace.calls.append(made)
        return made

    def change(self, target: Any) -> None:
        if isinstance(target, Global):
            self.trace.globals[target].add("changes")

    def set_items(self, pairs: list[Any]) -> None:
        target = self.stack[-1]
        self.change(target)
        if len(pairs) % 2:
            raise ValueError("a key without a value")
        items = target.items if isinstance(target, Call) else target if isinstance(target, dict) else {}
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            items[_key(key)] = value

    def add(self, values: list[Any]) -> None:
        target = self.stack[-1]
        self.change(target)
        if isinstance(target, Call):
            target.elements.extend(values)
        elif isinstance(target, list):
            target.extend(values)

    def build(self) -> None:
        state, target = self.pop(), self.stack[-1]
        self.change(target)
        if isinstance(target, Call):
            target.states.append(state)

    def dictionary(self) -> None:
        pairs = self.pop_mark()
        self.push({})
        self.set_items(pairs)

    def tuple_of(self, count: int) -> None:
        if len(self.stack) < count:
            raise IndexError("stack underflow")
        items = tuple(self.stack[-count:])
        self.stack[-count:] = [items]

    def persist(self, id_: Any) -> None:
        match id_:
            case ("module", Global() as class_, *_):  # torch's older format: a class, with its source for comparison
                self.push(class_)
                return
        found = Persistent(id_)
        self.trace.persistent.append(found)
        self.push(found)

    def object_(self) -> None:
        function, *arguments = self.pop_mark()
        self.push(self.call(function, tuple(arguments)))

    def reduce(self) -> None:
        arguments, function = self.pop(), self.pop()
        self.push(self.call(function, arguments))

    def new_with_keywords(self) -> None:
        keywords, arguments, function = self.pop(), self.pop(), self.pop()
        self.push(self.call(function, arguments, keywords))

    def stack_global(self) -> None:
        name, module = self.pop(), self.pop()
        self.push(self.named(module, name))

    def extension(self, code: int) -> None:
        # Resolves to whatever some other module registered under this number.
        self.push(self.named("copyreg", f"_extension_registry[{code}]"))

    def refuse(self) -> None:
        raise ValueError("needs buffers from outside the file")

    def stop(self) -> None:
        self.result = self.pop()


def _key(value: Any) -> Any:
    if isinstance(value, (str, float, bool, bytes, type(None))):
        return value
    return value if isinstance(value, int) and abs(value) < _HASH_MODULUS else Opaque(value)


_ATOMS = """
    INT BININT BININT1 BININT2 LONG LONG1 LONG4 STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8
    BYTEARRAY8 UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8 FLOAT BINFLOAT
"""

_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    **dict.fromkeys(_ATOMS.split(), _Machine.push),
    **dict.fromkeys(["PROTO", "FRAME", "READONLY_BUFFER"], lambda m, a: None),
    **dict.fromkeys(["GET", "BINGET", "LONG_BINGET"], lambda m, a: m.push(m.memo[a])),
    **dict.fromkeys(["PUT", "BINPUT", "LONG_BINPUT"], lambda m, a: m.put(a)),
    **dict.fromkeys(["EXT1", "EXT2", "EXT4"], lambda m, a: m.extension(a)),
    **dict.fromkeys(["EMPTY_LIST", "EMPTY_SET"], lambda m, a: m.push([])),  # a set's order and hashing do not matter
    **dict.fromkeys(["APPENDS", "ADDITEMS"], lambda m, a: m.add(m.pop_mark())),
    **dict.fromkeys(["LIST", "FROZENSET"], lambda m, a: m.push(m.pop_mark())),
    **dict.fromkeys(["REDUCE", "NEWOBJ"], lambda m, a: m.reduce()),
    "MEMOIZE": lambda m, a: m.put(len(m.memo)),
    "NONE": lambda m, a: m.push(None),
    "NEWTRUE": lambda m, a: m.push(True),
    "NEWFALSE": lambda m, a: m.push(False),
    "EMPTY_TUPLE": lambda m, a: m.push(()),
    "EMPTY_DICT": lambda m, a: m.push({}),
    "TUPLE": lambda m, a: m.push(tuple(m.pop_mark())),
    "TUPLE1": lambda m, a: m.tuple_of(1),
    "TUPLE2": lambda m, a: m.tuple_of(2),
    "TUPLE3": lambda m, a: m.tuple_of(3),
    "APPEND": lambda m, a: m.add([m.pop()]),
    "SETITEM": lambda m, a: m.set_items([m.pop(), m.pop()][::-1]),
    "SETITEMS": lambda m, a: m.set_items(m.pop_mark()),
    "DICT": lambda m, a: m.dictionary(),
    "MARK": lambda m, a: m.mark(),
    "POP": lambda m, a: m.pop_or_unmark(),
    "POP_MARK": lambda m, a: m.drop_mark(),
    "DUP": lambda m, a: m.push(m.stack[-1]),
    "GLOBAL": lambda m, a: m.push(m.named(*a)),
    "STACK_GLOBAL": lambda m, a: m.stack_global(),
    "INST": lambda m, a: m.push(m.call(m.named(*a), m.pop_mark())),
    "OBJ": lambda m, a: m.object_(),
    "NEWOBJ_EX": lambda m, a: m.new_with_keywords(),
    "BUILD": lambda m, a: m.build(),
    "PERSID": lambda m, a: m.persist(a),
    "BINPERSID": lambda m, a: m.persist(m.pop()),
    "NEXT_BUFFER": lambda m, a: m.refuse(),
    "STOP": lambda m, a: m.stop(),
}
