"""An unpickler of data alone: what NumPy and `collections` write is plain, what could run anything is refused."""

import functools
import operator
import pickle
from collections import Counter, OrderedDict, defaultdict

import numpy as np
import pytest

from recipe_lib.data.plain_pickle import as_list, read_plain_pickle
from recipe_lib.data.recipe import DataError


def read(tmp_path, data: bytes):
    (tmp_path / "x.pkl").write_bytes(data)
    return read_plain_pickle(tmp_path / "x.pkl")


def nested(*pairs) -> defaultdict:
    table = defaultdict(list)
    for key, value in pairs:
        table[key].append(value)
    return table


PLAIN = [
    ({"a": np.int64(3), np.int32(4): np.float32(0.5), "c": np.bool_(True), "d": np.float64(0.1), "e": np.uint8(255)},
     {"a": 3, 4: 0.5, "c": True, "d": 0.1, "e": 255}),
    ({"s": np.str_("leek"), "b": np.array(3)[()]}, {"s": "leek", "b": 3}),
    (nested(("a", 1), ("b", 2), ("a", 3)), {"a": [1, 3], "b": [2]}),
    ({"n": defaultdict(int, x=1), "d": defaultdict(dict, x={}), "p": defaultdict(None, y=2)},
     {"n": {"x": 1}, "d": {"x": {}}, "p": {"y": 2}}),
    (OrderedDict(b=1, a=OrderedDict()), {"b": 1, "a": {}}),
    (Counter("aab"), {"a": 2, "b": 1}),
]  # fmt: skip
ARRAYS = [
    np.arange(6, dtype=np.int64), np.arange(6).reshape(2, 3), np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    np.arange(6.0).reshape(2, 3).T, np.arange(9, dtype=np.float16)[::2], np.array([True, False]), np.array([], np.int8),
    np.arange(3, dtype=">i4"), np.array(["ä", "leeks"]), np.ones((2, 1, 3), np.float32), np.empty((0, 7), np.float32),
]  # fmt: skip


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(("value", "expected"), PLAIN)
def test_what_comes_out_is_plain(tmp_path, value, expected, protocol):
    if protocol < 2 and not isinstance(value, dict):
        pytest.skip("as protocol 2")
    plain = read(tmp_path, pickle.dumps(value, protocol))
    assert plain == expected and list(plain) == list(expected)

    def kinds(value) -> set:
        inside = [*value, *value.values()] if type(value) is dict else value if type(value) is list else []
        return {type(value)}.union(*map(kinds, inside))

    assert kinds(plain) <= {dict, list, str, int, float, bool}


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize("core", ["_core", "core"])
@pytest.mark.parametrize("array", ARRAYS, ids=lambda array: f"{array.dtype.str}{array.shape}")
def test_arrays(tmp_path, array, protocol, core):
    """As NumPy 2 writes them and, with other names of its modules, NumPy 1; twice the same one."""
    data = pickle.dumps({"a": array, "b": [array]}, protocol)
    if core == "core":
        other, sizes = (b"numpy._core.", b"numpy.core."), (b"\x8c\x16", b"\x8c\x15")
        assert other[0] in data
        data = data.replace(b"\x8c\x16" + other[0], sizes[1] + other[1]).replace(
            b"\x8c\x13" + other[0], b"\x8c\x12" + other[1]
        )
        data = data.replace(b"cnumpy._core.", b"cnumpy.core.")
        if protocol > 3:  # the frame is a byte shorter, or two
            data = pickle.dumps(None, protocol)[:2] + data[11:]
    plain = read(tmp_path, data)
    for loaded in (plain["a"], plain["b"][0]):
        assert type(loaded) is np.ndarray and loaded.dtype.str[1:] == array.dtype.str[1:] and (loaded == array).all()
        assert loaded.shape == array.shape and as_list(loaded) == array.tolist()


class Calls:
    def __init__(self, function, *args, state=None):
        self.what = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.what


class Odd(dict):
    pass


HARM = ("open('pwned.txt', 'w').close()",)


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (Calls(exec, *HARM), "for '(builtins|__builtin__).exec'"),
        (Calls(defaultdict, exec), "for '(builtins|__builtin__).exec'"),
        (Calls(defaultdict, Counter), "a defaultdict of another type"),
        (Calls(defaultdict, list, [("a", 1)]), "a defaultdict of another type"),
        (Calls(list, (1, 2)), "calls something"),
        (Calls(int, "7"), "calls something"),
        (Calls(OrderedDict, {"a": 1}, state={"__class__": 1}), "another type"),
        (Calls(Counter, 10**9), "a dict of another type"),
        (Calls(functools.partial, exec, *HARM), "for 'functools.partial'"),
        (Calls(operator.attrgetter, "__class__"), "for 'operator.attrgetter'"),
        (np.array([Odd(), None]), "another type|objects"),
        (np.array([(1, 2.0)], "i4,f4"), "objects or of another type"),
        (np.array(3), "an odd array"),
        (np.array([1 + 2j]), "objects or of another type"),
        (np.datetime64("2020-01-01"), "objects or of another type"),
        (np.zeros((1, 1, 1, 1, 1)), "an odd array"),
        (np.dtype("f4"), "another type"),
        (np.ndarray, "another type"),
        (list, "another type"),
        (b"x", "another type"),
        ((1, (b"x",)), "another type"),
        (Odd(), "for '.*Odd'|another type"),
        ({1, 2}, "another type|calls something|for '"),
    ],
)
def test_what_is_no_data_is_refused(tmp_path, monkeypatch, value, reason, protocol):
    monkeypatch.chdir(tmp_path)
    for holder in ({"a": value}, {"a": [value]}, {"a": [value, value]}):
        with pytest.raises(DataError, match=rf"x.pkl: it .*({reason}).*; refused:") as error:
            read(tmp_path, pickle.dumps(holder, protocol))
        assert "\n" not in str(error.value)
    assert not (tmp_path / "pwned.txt").exists()


def array_state(shape, dtype="i1", data=b"x", state=(3, "<", None, None, None, -1, -1, 0)) -> bytes:
    """An array of any claims, as protocol 3 writes it."""
    kind = Calls(np.dtype, dtype, False, True, state=state)
    whole = Calls(np.zeros(1).__reduce__()[0], np.ndarray, (0,), b"b", state=(1, shape, kind, False, data))
    return pickle.dumps({"a": whole}, 3)


@pytest.mark.parametrize(
    "data",
    [
        array_state((1 << 40,)), array_state((1 << 40, 0), data=b""),
        array_state((-1, -1)), array_state((2,)), array_state(()), array_state((1.0,)), array_state([1]),
        array_state((1,), "O"), array_state((1 << 40,), "U0", b""), array_state((1,), "V1"), array_state((1,), "S1"),
        array_state((1,), data="x"), array_state((1,), state=(3, "|O", None, None, None, -1, -1, 0)),
    ],
)  # fmt: skip
def test_arrays_that_lie_are_refused(tmp_path, data):
    with pytest.raises(DataError, match=r"x.pkl: it (builds|holds)"):
        read(tmp_path, data)


BOMBS = {
    "a memo of 2 billion places": b"\x80\x04}r\xff\xff\xff\x7f.",
    "a text of an exabyte": b"\x80\x04\x8d" + (1 << 60).to_bytes(8, "little") + b"x.",
    "a frame of an exabyte": b"\x80\x04\x95" + (1 << 60).to_bytes(8, "little") + b"}.",
    "16 GB of bytes": b"\x80\x05\x96" + (1 << 34).to_bytes(8, "little") + b"x.",
    "4 GB of bytes": b"\x80\x03}X\x01\x00\x00\x00aB\xff\xff\xff\xffxs.",
}


@pytest.mark.parametrize(
    "data", [b"", b"{}", b'{"a": 1}', b"\x80", pickle.dumps({"a": [1] * 9})[:-9], b"\x80\x63}.", b"\x80\x04]}s."]
)
def test_what_is_no_pickle_is_one_line(tmp_path, data):
    (tmp_path / "x.pkl").write_bytes(data)
    with pytest.raises(DataError, match=r"x.pkl: not a complete pickle; download it or make it again$"):
        read_plain_pickle(tmp_path / "x.pkl")


@pytest.mark.parametrize("name", BOMBS)
def test_a_few_bytes_take_no_gigabytes(tmp_path, name):
    resource = pytest.importorskip("resource")
    (tmp_path / "x.pkl").write_bytes(BOMBS[name])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        assert read_plain_pickle(tmp_path / "x.pkl") == {}, "a number of a place alone does no harm"
    except DataError as error:
        assert "x.pkl" in str(error)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000, "kB"


def test_what_holds_itself_or_one_thing_many_times_is_looked_into_once(tmp_path):
    many: tuple = ()
    for _ in range(60):  # 2^60 tuples, were each followed by itself
        many = (many, many)
    circle: list = [1]
    circle.append(circle)
    plain = read(tmp_path, pickle.dumps({"many": many, "circle": circle}))
    assert plain["circle"][1] is plain["circle"] and plain["many"][0] is plain["many"][1]
    circle.append(b"x")
    with pytest.raises(DataError, match="holds another type"):
        read(tmp_path, pickle.dumps({"circle": circle}))
