"""Pickles of the papers' authors, read without running anything that they hold.

What may come out is dict, list, tuple, str, numbers and NumPy arrays of numbers or text. A pickle asks for functions
and types by name; the few names of `_KNOWN` answer with builders of ours, every other one is refused. So nothing that
a file names is ever imported or called.
"""

from __future__ import annotations

import math
import os
import pickle
import re
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from recipe_lib.data.recipe import DataError

_REFUSED = "refused: a pickle of this data holds only dict, list, str, numbers and arrays of them"
# GLOBAL and the like stay: they end in find_class, which says what was asked for. What is not here is refused.
_PLAIN = """PROTO FRAME STOP POP DUP MARK POP_MARK MEMOIZE PUT BINPUT LONG_BINPUT GET BINGET LONG_BINGET NONE NEWTRUE
 NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE
 SHORT_BINUNICODE BINUNICODE8 EMPTY_LIST LIST APPEND APPENDS EMPTY_DICT DICT SETITEM SETITEMS EMPTY_TUPLE TUPLE TUPLE1
 TUPLE2 TUPLE3 GLOBAL STACK_GLOBAL INST PERSID BINPERSID""".split()
_CODES = {getattr(pickle, name)[0] for name in _PLAIN}
_DTYPE = re.compile(r"[iu][1248]|f[248]|b1|U[1-9][0-9]{0,4}")
_MAX_DIMENSIONS = 4


class _Refused(Exception):
    """What a pickle asked for."""


class _Builder:
    """Stands for a name of `_KNOWN`; `build` makes data of what the pickle calls it with."""

    def __init__(self, build: Callable[..., Any] | None = None):
        self.build = build


class _Bytes:
    """Raw bytes: a part of arrays, never of the data."""

    def __init__(self, data: bytes):
        self.data = data


class _DType:
    """A NumPy type of numbers or text, in the byte order that its state tells."""

    def __init__(self, name: str):
        self.value = np.dtype(name)


_LEAVES = frozenset((str, int, float, bool, type(None), np.ndarray))


def _check_plain(value: Any) -> None:
    """Data all the way down; what holds itself is looked into once."""
    pending, seen = [value], set()
    while pending:
        holder = pending.pop()
        if type(holder) not in (dict, list, tuple):
            _refuse()
        if id(holder) not in seen:
            seen.add(id(holder))
            parts = chain(holder, holder.values()) if type(holder) is dict else holder
            pending.extend(part for part in parts if type(part) not in _LEAVES)


def _refuse(_: pickle._Unpickler | None = None) -> None:
    raise _Refused("it holds another type")


def _check(holds: Any, what: str) -> None:
    if not holds:
        raise _Refused(f"it builds {what}")


# ---- builders ----


def _dict(*args: Any) -> dict:
    _check(not args or (len(args) == 1 and type(args[0]) is dict), "a dict of another type")
    return dict(*args)


def _default_dict(*args: Any) -> dict:
    _check(len(args) < 2 and all(arg is None or arg in _FACTORIES for arg in args), "a defaultdict of another type")
    return {}


def _encoded(*args: Any) -> _Bytes:
    """Bytes as protocol 2 writes them: text, to be encoded."""
    _check(len(args) == 2 and all(type(arg) is str for arg in args) and args[1] == "latin1", "other bytes")
    return _Bytes(args[0].encode("latin1"))


def _no_bytes(*args: Any) -> _Bytes:
    """How protocol 2 writes none."""
    _check(not args, "other bytes")
    return _Bytes(b"")


def _dtype(*args: Any) -> _DType:
    _check(args and type(args[0]) is str and _DTYPE.fullmatch(args[0]), "an array of objects or of another type")
    return _DType(args[0])


def _scalar(*args: Any) -> Any:
    _check(len(args) == 2 and type(args[0]) is _DType and type(args[1]) is _Bytes, "another scalar")
    return _array(args[1], args[0], (1,), False).tolist()[0]


def _empty_array(*args: Any) -> np.ndarray:
    _check(len(args) == 3 and args[0] is _NDARRAY, "an array of another type")
    return np.empty(0, np.int8)  # its state follows


def _from_buffer(*args: Any) -> np.ndarray:
    _check(len(args) == 4 and args[3] in ("C", "F"), "another array")
    return _array(*args[:3], args[3] == "F")


def _array(data: Any, dtype: Any, shape: Any, fortran: Any) -> np.ndarray:
    _check(type(data) is _Bytes and type(dtype) is _DType and type(shape) is tuple, "an array of objects")
    _check(1 <= len(shape) <= _MAX_DIMENSIONS and all(type(n) is int and n >= 0 for n in shape), "an odd array")
    # No shape stands for more than the bytes that are there: no lists of a billion empty ones.
    fits = math.prod(shape) * dtype.value.itemsize == len(data.data) and (shape[0] == 0 or 0 not in shape)
    _check(fits, "an array that does not fit its bytes")
    return np.frombuffer(data.data, dtype.value).reshape(shape, order="F" if fortran else "C")


_NDARRAY = _Builder()
_FACTORIES = [_Builder() for _ in ("list", "int", "dict")]
_NUMPY = {"multiarray._reconstruct": _empty_array, "multiarray.scalar": _scalar, "numeric._frombuffer": _from_buffer}
_KNOWN = {
    "collections.defaultdict": _Builder(_default_dict),
    "collections.OrderedDict": _Builder(_dict),
    "collections.Counter": _Builder(_dict),
    "_codecs.encode": _Builder(_encoded),
    "__builtin__.bytes": _Builder(_no_bytes),
    "numpy.ndarray": _NDARRAY,
    "numpy.dtype": _Builder(_dtype),
    # NumPy 2 moved core to _core.
    **{f"numpy.{core}.{name}": _Builder(build) for core in ("core", "_core") for name, build in _NUMPY.items()},
    **dict(zip(("builtins.list", "builtins.int", "builtins.dict"), _FACTORIES, strict=True)),
    # Python 2's names, which protocols 0 to 2 write.
    **dict(zip(("__builtin__.list", "__builtin__.long", "__builtin__.dict"), _FACTORIES, strict=True)),
    "__builtin__.int": _FACTORIES[1],
}  # fmt: skip


class _PlainUnpickler(pickle._Unpickler):
    """Builds data and refuses all else.

    The unpickler in Python, at 30 MB per second: it looks each operation up in a table, which here lacks those that
    call something of the file's choice, and a few bytes cannot make it reserve gigabytes, as they can the one in C.
    """

    dispatch: ClassVar = {
        code: load if code in _CODES else _refuse for code, load in pickle._Unpickler.dispatch.items()
    }

    def __init__(self, file: Any, size: int):
        super().__init__(file, encoding="utf-8")
        self._size = size

    def find_class(self, module: str, name: str) -> Any:
        builder = _KNOWN.get(f"{module}.{name}")
        if builder is None:
            raise _Refused(f"it asks for {f'{module}.{name}'[:60]!a}")
        return builder

    def persistent_load(self, pid: Any) -> Any:
        raise _Refused("it refers to an object outside of it")

    def _reduce(self) -> None:
        args, builder = self.stack.pop(), self.stack[-1]
        if type(builder) is not _Builder or builder.build is None or type(args) is not tuple:
            raise _Refused("it calls something")
        self.stack[-1] = builder.build(*args)

    def _build(self) -> None:
        state, built = self.stack.pop(), self.stack[-1]
        if type(built) is _DType and type(state) is tuple and len(state) > 1 and state[1] in ("<", ">", "|", "="):
            built.value = built.value.newbyteorder(state[1])
        elif type(built) is np.ndarray and type(state) is tuple and len(state) == 5:
            value = _array(state[4], state[2], state[1], state[3])
            # In place, for the pickle may refer to it again; NumPy checks the length once more.
            built.__setstate__((1, value.shape, value.dtype, bool(state[3]), state[4].data))
        else:
            _refuse()

    def _bytes(self, width: int) -> None:
        length = int.from_bytes(self.read(width), "little")
        if length > self._size:  # before anything is reserved
            raise EOFError
        self.append(_Bytes(bytes(self.read(length))))

    dispatch |= {
        pickle.REDUCE[0]: _reduce, pickle.BUILD[0]: _build,
        pickle.SHORT_BINBYTES[0]: lambda self: self._bytes(1), pickle.BINBYTES[0]: lambda self: self._bytes(4),
        pickle.BINBYTES8[0]: lambda self: self._bytes(8), pickle.BYTEARRAY8[0]: lambda self: self._bytes(8),
    }  # fmt: skip


def read_plain_pickle(path: Path) -> dict:
    """The dict in a pickle file: dict (also those of `collections`), list, tuple, str, numbers (also NumPy's), arrays.

    Raises:
        DataError: in one line, for a file that is cut off, none, or holds anything else.
    """
    try:
        with path.open("rb") as file:
            value = _PlainUnpickler(file, os.fstat(file.fileno()).st_size).load()
        if isinstance(value, dict):
            _check_plain(value)
    except _Refused as reason:
        raise DataError(f"{path}: {reason}; {_REFUSED}") from None
    except Exception:  # whatever a broken file makes an unpickler stumble over
        raise DataError(f"{path}: not a complete pickle; download it or make it again") from None
    if not isinstance(value, dict):
        kind = ascii(value[:60] if isinstance(value, str) else type(value).__name__)
        raise DataError(f"{path}: holds {kind}, must hold a dict; make it again")
    return value


def as_list(value: Any) -> Any:
    """An array as the list it stands for; everything else as it is."""
    return value.tolist() if isinstance(value, np.ndarray) else value
