"""Files that are damaged, forged or hostile: refused in words, never run, never read wrong."""

import ast
import bz2
import copyreg
import gzip
import io
import json
import lzma
import pickle
import random
import re
import signal
import struct
import tarfile
import zipfile
import zlib
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from array_files import write_arrays
from array_formats import CHECKSUMS, FORMATS, HEADER
from forward_pass import RecordFileError
from saved_files import GGUF, SAVED, bytes_of, damaged, data_of

DAMAGES, OF_RECORDS = 200, 800
"""For each kind of file, and for records, which have five formats: 13,000 in all."""

CODE = 0xF1
"""Of an extension that a pickle may call by number."""


@contextmanager
def seconds(limit):
    """Raise where something hangs."""

    def stop(*_):
        raise TimeoutError(f"no answer after {limit} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A file in memory, where the system has such a place."""
    shm = Path("/dev/shm")
    folder = tmp_path_factory.mktemp("files")
    if not shm.is_dir():
        yield folder / "x"
        return
    found = shm / f"files-{folder.name}-{random.SystemRandom().randrange(10**12)}"
    yield found
    found.unlink(missing_ok=True)


# --- Damage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAVED)
def test_a_damaged_file_is_refused_or_read_right(path, name):
    """What is read after all is, written again, the file that it was before the damage."""
    data, saved, rng = data_of(name), SAVED[name], random.Random(name)
    refused, good = 0, r" cannot be read as [a-z -]+: \S"
    times = OF_RECORDS if "." in name else DAMAGES
    for _ in range(times):
        path.write_bytes(damaged(data, rng))
        try:
            with seconds(20):
                found = saved.load(path)
        except RecordFileError as error:
            assert re.match(re.escape(str(path)) + good, str(error)), error
            refused += 1
            continue
        assert bytes_of(saved, found) == data
    assert refused > times / 2


def test_how_many_files_are_damaged():
    kinds = [OF_RECORDS if "." in name else DAMAGES for name in SAVED]
    assert sum(kinds) >= 10_000
    assert len([name for name in SAVED if "." in name]) == 2 * len(FORMATS)


def test_every_class_that_reads_a_file_is_here():
    """One that is new is damaged, forged and killed in its save like the others."""
    tried = {type(SAVED[name].make()).__name__ for name in SAVED if "." not in name}
    readers = set()
    for path in Path(__file__).parent.parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                own = {each.name for each in node.body if isinstance(each, ast.FunctionDef)}
                bases = {ast.unparse(base) for base in node.bases}
                if "load" in own or bases & {"Kept", "NodeEffects"}:
                    readers.add(node.name)
    assert readers - {"Kept", "NodeEffects"} - tried == set()


@pytest.mark.parametrize("name", SAVED)
def test_a_file_of_one_kind_is_refused_as_another(path, name):
    for other in ("record.npz", "lens", "sweep", "direction", "tuned lens", "trace"):
        path.write_bytes(data_of(other))
        if name.split(".")[0].rstrip("s") != other.split(".")[0].rstrip("s"):
            with pytest.raises(RecordFileError, match="its header says"):
                SAVED[name].load(path)


def test_a_damaged_control_vector_is_refused_or_read(path):
    """The format has no checksums: values may be others, errors may not."""
    pytest.importorskip("gguf")
    data, rng, refused = bytes_of(GGUF, GGUF.make()), random.Random(0), 0
    for _ in range(1000):
        path.write_bytes(damaged(data, rng))
        try:
            with seconds(20):
                GGUF.load(path)
        except RecordFileError:
            refused += 1
    assert refused > 300


# --- Forgeries, with checksums that are right -----------------------------------------------------

ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**20), 10**20),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
    st.just([]),
    st.just({}),
    st.lists(st.integers(0, 5), max_size=3),
    st.dictionaries(st.sampled_from(["$tuple", "$ndarray", "$tensor", "$dict", "a"]),
                    st.one_of(st.integers(), st.lists(st.integers(), max_size=3)), max_size=2),
)  # fmt: skip


def header_and_arrays(name):
    """The header of a safetensors file, and its arrays."""
    from safetensors.torch import load

    arrays = load(data_of(name))
    header = json.loads(bytes(arrays.pop(HEADER).numpy()))
    arrays.pop(CHECKSUMS)
    return header, arrays


def places(value, at=()):
    """Every place in a JSON value."""
    yield at
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(item, (*at, key))


def changed(content, at, value):
    if not at:
        return value
    content = json.loads(json.dumps(content))
    target = content
    for key in at[:-1]:
        target = target[key]
    if value is ...:
        del target[at[-1]]
    else:
        target[at[-1]] = value
    return content


@pytest.mark.parametrize("name", [n for n in SAVED if n.split(".")[-1] in (n, "safetensors")])
def test_a_forged_file_is_refused_or_read(path, name):
    """Whoever makes the checksums anew can write any header; the reader's error stays its own."""
    header, arrays = header_and_arrays(name)
    content = header["content"]
    where = list(places(content))

    @settings(max_examples=40)
    @given(st.sampled_from(where), st.one_of(st.just(...), ODD), st.data())
    def forge(at, value, data):
        if value is ... and not at:
            value = None
        given_arrays = dict(arrays)
        if data.draw(st.booleans()) and arrays:
            one = data.draw(st.sampled_from(sorted(arrays)))
            shape = data.draw(st.lists(st.integers(0, 3), max_size=4))
            dtype = data.draw(st.sampled_from([torch.float32, torch.int64, torch.bfloat16]))
            given_arrays[one] = torch.zeros(shape, dtype=dtype)
            if data.draw(st.booleans()):
                del given_arrays[one]
        write_arrays(
            path, "safetensors", header["kind"], header["schema_version"],
            changed(content, at, value), given_arrays,
        )  # fmt: skip
        try:
            with seconds(20):
                found = SAVED[name].load(path)
        except RecordFileError as error:
            assert str(path) in str(error)
        else:
            assert repr(found)

    forge()


# --- Pickles --------------------------------------------------------------------------------------


class _Reduces:
    def __init__(self, call):
        self.call = call

    def __reduce__(self):
        return self.call


class _StateRuns:
    """A class of the reader's own whose ``__setstate__`` does something."""

    def __setstate__(self, state):
        Path(state).touch()


class _NewRuns:
    """A class of the reader's own that does something when it is made."""

    def __new__(cls, place=None, *, keyword=None):
        Path(place or keyword).touch()
        return object.__new__(cls)


class _ListRuns(list):
    """A list of the reader's own that does something when it is filled."""

    def extend(self, items):
        for item in items:
            Path(item).touch()

    def append(self, item):
        Path(item).touch()


class _SetRuns:
    """What is filled like a set."""

    def add(self, item):
        Path(item).touch()


class _DictRuns(dict):
    """A mapping of that kind."""

    def __setitem__(self, place, _value):
        Path(place).touch()


def touch(place):
    Path(place).touch()


def text(value):
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def pickles(place):
    """By route: a pickle that makes a file at ``place`` when it is loaded."""
    here = __name__
    call = b"c" + f"{here}\ntouch\n".encode()
    stack = text(here) + text("touch") + b"\x93"
    new = text(here) + text("_NewRuns") + b"\x93"
    argument = text(place)

    def own(name):
        return text(here) + text(name) + b"\x93"

    found = {
        "GLOBAL REDUCE": b"\x80\x02" + call + argument + b"\x85R.",
        "STACK_GLOBAL REDUCE": b"\x80\x04" + stack + argument + b"\x85R.",
        "MEMOIZED": b"\x80\x04" + stack + b"\x940h\x00" + argument + b"\x85R.",
        "PUT GET": b"\x80\x02" + call + b"q\x070h\x07" + argument + b"\x85R.",
        "INST": b"(" + argument + f"i{here}\ntouch\n.".encode(),
        "OBJ": b"(" + call + argument + b"o.",
        "NEWOBJ": b"\x80\x04" + new + argument + b"\x85\x81.",
        "NEWOBJ_EX": b"\x80\x04" + new + b")}" + text("keyword") + argument + b"s\x92.",
        "BUILD": b"\x80\x04" + text(here) + text("_StateRuns") + b"\x93)\x81" + argument + b"b.",
        "EXT1": b"\x80\x02\x82" + bytes([CODE]) + argument + b"\x85R.",
        "EXT2": b"\x80\x02\x83" + struct.pack("<H", CODE) + argument + b"\x85R.",
        "EXT4": b"\x80\x02\x84" + struct.pack("<i", CODE) + argument + b"\x85R.",
        "APPENDS": b"\x80\x04" + own("_ListRuns") + b")\x81(" + argument + b"e.",
        "APPEND": b"\x80\x04" + own("_ListRuns") + b")\x81" + argument + b"a.",
        "ADDITEMS": b"\x80\x04" + own("_SetRuns") + b")\x81(" + argument + b"\x90.",
        "SETITEMS": b"\x80\x04" + own("_DictRuns") + b")\x81(" + argument + b"Nu.",
        "SETITEM": b"\x80\x04" + own("_DictRuns") + b")\x81" + argument + b"Ns.",
        "FRAME": b"\x80\x04\x95" + struct.pack("<Q", len(stack) + len(argument) + 3)
        + stack + argument + b"\x85R.",
        "EVAL": b"\x80\x02cbuiltins\nexec\n" + text(f"open({place!r}, 'w').close()") + b"\x85R.",
        "GETATTR": b"\x80\x04" + text("builtins") + text("getattr") + b"\x93"
        + text(here) + text("Path") + b"\x93" + text("touch") + b"\x86R"
        + text(here) + text("Path") + b"\x93" + argument + b"\x85R\x85R.",
        "DOTTED": b"\x80\x04" + text(here) + text("Path.touch") + b"\x93"
        + text(here) + text("Path") + b"\x93" + argument + b"\x85R\x85R.",
    }  # fmt: skip
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        found[f"__reduce__ {protocol}"] = pickle.dumps(_Reduces((touch, (place,))), protocol)
    nested = {"header": _Reduces((touch, (place,))), "a": [1, (2, {3})]}
    found["in a dict"] = pickle.dumps(nested, 4)
    slots = _Reduces((list, (), None, iter([_Reduces((touch, (place,)))])))
    found["APPENDS of a REDUCE"] = pickle.dumps(slots, 4)
    setter = _Reduces((list, (), place, None, None, lambda_free_setter))
    found["state setter"] = pickle.dumps(setter, 5)
    return found


def lambda_free_setter(_object, state):
    Path(state).touch()


@pytest.fixture
def marker(tmp_path):
    copyreg.add_extension(__name__, "touch", CODE)
    copyreg.clear_extension_cache()
    yield tmp_path / "executed"
    copyreg.remove_extension(__name__, "touch", CODE)


def zipped(members):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return stream.getvalue()


def tarred(members):
    """What torch.save wrote before 0.1.10."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def persistent(program):
    """A torch pickle in which a storage's persistent id is made by a hostile call."""
    body = program[2:] if program[:1] == b"\x80" else program
    return b"\x80\x02" + body[:-1] + b"Q."


def legacy_torch(program):
    """What torch.save wrote before 1.6: several pickles one after the other."""
    stream = io.BytesIO()
    torch.save({"a": torch.zeros(2)}, stream, _use_new_zipfile_serialization=False)
    return stream.getvalue() + program, b"".join(
        [
            pickle.dumps(0x1950A86A20F9469CFC6C, 2),
            pickle.dumps(1001, 2),
            pickle.dumps({}, 2),
            program,
        ]
    )


def object_array(program):
    head = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"
    head += b" " * (-(len(head) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + program


def containers(program):
    """Every file in which such a pickle could be hidden."""
    array = object_array(program)
    arrays = zipfile_of_arrays(program)
    return {
        "bare": program,
        "pickle": b"\x80\x04}(" + (program[2:] if program[:1] == b"\x80" else program),
        "persistent": persistent(program),
        "pt": zipped({"archive/data.pkl": program, "archive/version": "3\n"}),
        "pt, persistent": zipped({"a/data.pkl": persistent(program), "a/version": "3\n"}),
        "pt, code": zipped(
            {"a/data.pkl": b"\x80\x02}.", "a/constants.pkl": program, "a/code/x": ""}
        ),
        "old pt, after": legacy_torch(program)[0],
        "old pt": legacy_torch(program)[1],
        "npy": array,
        "npz": arrays,
        "npz, no header": zipped({"a.npy": array}),
        "safetensors": struct.pack("<Q", 2) + b"{}" + program,
        "persistent, as text": b"Ptext of a storage\n0" + program,
        "old pt, a tar": tarred({"pickle": program, "storages": program, "tensors": program}),
        "joblib": program,
        "joblib, zlib": zlib.compress(program),
        "gzip": gzip.compress(program),
        "bz2": bz2.compress(program),
        "xz": lzma.compress(program),
        "a zip in a zip": zipped({"archive/data.pkl": zipped({"archive/data.pkl": program})}),
        "npz of a zip": zipped({"a.npy": zipped({"a.npy": object_array(program)})}),
        "npz, pickled": zipped({"header.npy": program, "a": program, "checksums": program}),
    }


def zipfile_of_arrays(program):
    """A whole npz file of records, one array of which is of objects, with right checksums."""
    stream = io.BytesIO(data_of("record.npz"))
    with zipfile.ZipFile(stream) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = next(n for n in members if n.startswith("layer_activations"))
    members[name] = object_array(program)
    found = np.load(io.BytesIO(members[f"{CHECKSUMS}.npy"]))
    index = [n for n in members if n != f"{CHECKSUMS}.npy"].index(name)
    found[index] = zlib.crc32(program)
    changed_sums = io.BytesIO()
    np.save(changed_sums, found)
    members[f"{CHECKSUMS}.npy"] = changed_sums.getvalue()
    return zipped(members)


def test_the_pickles_are_hostile(marker):
    """Or else the next test would show nothing."""
    for route, program in pickles(str(marker)).items():
        with suppress(TypeError, AttributeError):  # what it made is of no use afterwards
            pickle.loads(program)
        assert marker.exists(), route
        marker.unlink()
        np_bytes = object_array(program)
        if route == "GLOBAL REDUCE":
            np.load(io.BytesIO(np_bytes), allow_pickle=True)
            assert marker.exists()
            marker.unlink()


LOADERS = {"records": "record.pickle", **{name: name for name in SAVED if "." not in name}}


@pytest.mark.parametrize("name", LOADERS)
def test_hostile_pickles_are_refused_and_do_nothing(tmp_path, marker, name):
    load, file = SAVED[LOADERS[name]].load, tmp_path / "x"
    for route, program in pickles(str(marker)).items():
        for container, data in containers(program).items():
            file.write_bytes(data)
            with pytest.raises(RecordFileError, match=r"x cannot be read as [a-z -]+: \S"):
                load(file)
            assert not marker.exists(), (route, container)
