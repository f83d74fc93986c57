"""Which globals a checkpoint may name. What is on no list is suspicious, so a new trick needs no new entry here."""

from __future__ import annotations

import re
from typing import Literal

from cupel.checkpoint.objects import Global

__all__ = ["Kind", "kind_of"]

Kind = Literal["plain", "known", "unknown", "runs-code"]

_BUILTINS = "bool bytearray bytes complex dict float frozenset int list object range set slice str tuple"
_STORAGES = "Double Float Half BFloat16 Long Int Short Char Byte Bool ComplexDouble ComplexFloat Untyped"

# What the reader understands: these become tensors, storages and plain containers.
_PLAIN = frozenset(
    [
        "collections.OrderedDict",
        "_codecs.encode",
        "torch.Size",
        "torch.storage.UntypedStorage",
        "torch._utils._rebuild_tensor",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_tensor_v3",
        "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_parameter_with_state",
        *(f"builtins.{name}" for name in _BUILTINS.split()),
        *(f"torch.{name}Storage" for name in _STORAGES.split()),
    ]
)

# What harmless research checkpoints hold beside tensors. None of it is imported or called either.
_NUMPY_CORES = ("numpy.core", "numpy._core")
_KNOWN = frozenset(
    [
        "argparse.Namespace",
        "types.SimpleNamespace",
        "copyreg._reconstructor",
        "collections.defaultdict",
        "collections.Counter",
        "collections.deque",
        "datetime.date",
        "datetime.datetime",
        "datetime.timedelta",
        "decimal.Decimal",
        "fractions.Fraction",
        "functools.partial",
        "pathlib.Path",
        "pathlib.PosixPath",
        "pathlib.PurePosixPath",
        "pathlib.WindowsPath",
        "uuid.UUID",
        "enum.Enum",
        "typing.Any",
        "numpy.ndarray",
        "numpy.dtype",
        *(f"{core}.multiarray.{name}" for core in _NUMPY_CORES for name in ("_reconstruct", "scalar")),
        *(f"{core}.numeric._frombuffer" for core in _NUMPY_CORES),
        "numpy.random._pickle.__randomstate_ctor",
        "torch.device",
        "torch.Tensor",
        "torch.Generator",
        "torch._utils._rebuild_sparse_tensor",
        "torch._utils._rebuild_qtensor",
        "torch._utils._rebuild_device_tensor_from_numpy",
        "torch._tensor._rebuild_from_type_v2",
        "torch.serialization._get_layout",
        "omegaconf.base.ContainerMetadata",
        "omegaconf.base.Metadata",
        "omegaconf.dictconfig.DictConfig",
        "omegaconf.listconfig.ListConfig",
        "omegaconf.nodes.AnyNode",
        "easydict.EasyDict",
        "yacs.config.CfgNode",
        "lightning_fabric.utilities.data.AttributeDict",
        "pytorch_lightning.utilities.parsing.AttributeDict",
    ]
)
_CLASS = r"[A-Z][A-Za-z0-9_]*"
_KNOWN_PATTERNS = tuple(
    re.compile(pattern)
    for pattern in (
        rf"torch\.nn\.(modules|parameter|parallel)(\.[a-z_]+)*\.{_CLASS}",
        rf"torch\.(optim|amp|cuda\.amp)(\.[a-z_]+)*\.{_CLASS}",
        r"torch\.nn\.functional\.(relu|relu_|gelu|silu|elu|selu|leaky_relu|sigmoid|softmax|log_softmax|tanh|normalize)",
        r"torch\._C\._nn\.(gelu|silu|softplus|hardtanh)",
        r"torch\.(relu|sigmoid|tanh|u?int(8|16|32|64)|b?float(16|32|64)|bool|complex(64|128)|float8_[a-z0-9]+)",
        rf"torchvision\.(models|ops|transforms)(\.[a-z0-9_]+)*\.{_CLASS}",
        rf"timm\.(models|layers)(\.[a-z0-9_]+)*\.{_CLASS}",
        r"numpy\.dtypes\.[A-Z][A-Za-z0-9]*DType",
        r"numpy\.(u?int(8|16|32|64)|float(16|32|64)|bool_?|complex(64|128)|str_|bytes_)",
    )
)

# Names whose only use in a pickle is to run something. The list sharpens a verdict; it never clears one.
_RUNNER_WORDS = """
    _io _operator _pickle _posixsubprocess _socket _thread _winapi aiohttp asyncio atexit bdb cProfile cPickle
    cloudpickle code codeop commands concurrent copyreg ctypes dill distutils doctest ensurepip ftplib gc http idlelib
    imaplib imp importlib inspect io joblib jsonpickle lib2to3 linecache logging marshal mmap msvcrt multiprocessing
    nt ntpath operator os pdb pickle pickletools pip pkgutil platform popen2 poplib posix posixpath profile pstats pty
    pydoc requests resource runpy setuptools shelve shutil signal site smtplib socket socketserver sqlite3 ssl
    subprocess sys sysconfig tarfile telnetlib tempfile test threading timeit trace types unittest urllib urllib2
    urllib3 venv webbrowser weakref winreg wsgiref xmlrpc yaml zipfile zipimport
"""
_RUNNERS = frozenset(_RUNNER_WORDS.split())
_BUILTIN_WORDS = """
    __build_class__ __import__ apply breakpoint compile delattr eval exec execfile exit file filter getattr globals
    help input locals map memoryview open quit raw_input reduce reload setattr vars
"""
_RUNNING_BUILTINS = frozenset(_BUILTIN_WORDS.split())
_RUNNING_PREFIXES = (
    "torch.load",
    "torch.save",
    "torch.hub.",
    "torch.jit.",
    "torch.package.",
    "torch.serialization.",
    "torch.storage._load_from_bytes",
    "torch.utils.",
    "torch.distributed.",
    "torch.multiprocessing.",
    "torch.ops.",
    "torch.classes.",
    "torch._dynamo.",
    "torch._inductor.",
    "torch.fx.",
    "torch.testing.",
    "torch.cuda._",
    "numpy.load",
    "numpy.save",
    "numpy.f2py.",
    "numpy.distutils.",
    "numpy.testing.",
    "numpy.fromfile",
    "numpy.memmap",
    "numpy.ctypeslib.",
    "pandas.eval",
    "pandas.read_pickle",
    "pandas.io.",
    "functools.reduce",
    "itertools.starmap",
)


def kind_of(found: Global) -> Kind:
    """Where a global stands: understood (`plain`), harmless ballast (`known`), on no list, or known to run code.

    Example:
        >>> [kind_of(Global(*name)) for name in [("os", "system"), ("acme.hooks", "run"), ("argparse", "Namespace")]]
        ['runs-code', 'unknown', 'known']
    """
    path = found.path
    # A dotted name walks through attributes (`relu.__globals__`), so lists are held against module and name apart.
    dotted = "." in found.name or not found.name
    if not dotted and path in _PLAIN:
        return "plain"
    if not dotted and (path in _KNOWN or any(pattern.fullmatch(path) for pattern in _KNOWN_PATTERNS)):
        return "known"
    root = path.partition(".")[0]
    if root == "builtins":
        return "runs-code" if found.name.partition(".")[0] in _RUNNING_BUILTINS else "unknown"
    if root in _RUNNERS or path.startswith(_RUNNING_PREFIXES):
        return "runs-code"
    if set(found.name.split(".")) & {"os", "sys", "subprocess", "builtins", "importlib", "__builtins__", "__globals__"}:
        return "runs-code"
    return "unknown"
