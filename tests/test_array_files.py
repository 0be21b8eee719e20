"""Files of named arrays: written whole or not at all, checked when read."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch

import array_files
from array_files import MissingFileError, open_arrays, replacing, write_arrays
from array_formats import DTYPES, FORMATS
from forward_pass import RecordFileError

ROOT = Path(__file__).resolve().parent.parent
WITH_VALUES = [name for name in FORMATS if name != "json"]
as_root = pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")


def write(path, format="safetensors", content="content", **arrays):
    write_arrays(path, format, "test", 1, content, arrays or {"a": torch.arange(3.0)})


def read(path, newest=1, kind="test"):
    with open_arrays(path, kind, newest) as stored:
        return stored.content, {name: stored.read(name) for name in stored.specs}


def leftovers(folder):
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


# --- What is in a file ----------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_content_comes_back(tmp_path, format):
    content = {
        "text": "é\u2028 \x00",
        "numbers": [1, 2.5, -0.0, 2**62],
        "none": None,
        "deep": [[[]]],
    }
    write(tmp_path / "x", format, content)
    found, arrays = read(tmp_path / "x")
    assert json.dumps(found) == json.dumps(content)
    assert arrays["a"].shape == (3,)
    assert arrays["a"].is_meta == (format == "json")


@pytest.mark.parametrize("format", WITH_VALUES)
def test_tensors_of_a_list_are_stacked_and_own_their_memory(tmp_path, format):
    big = torch.arange(100.0)
    write(tmp_path / "x", format, None, rows=[big[:3], big[3:9:2]], one=big[50:52])
    _, arrays = read(tmp_path / "x")
    assert arrays["rows"].tolist() == [[0, 1, 2], [3, 5, 7]]
    assert arrays["one"].tolist() == [50, 51]
    assert arrays["one"].untyped_storage().nbytes() == 8
    assert (tmp_path / "x").stat().st_size < 3000
    arrays["one"].zero_()
    assert big[50] == 50


@pytest.mark.parametrize("piece", [1, 8, 30, 10**9])
@pytest.mark.parametrize("format", FORMATS)
def test_arrays_are_stacked_and_split_in_pieces(tmp_path, monkeypatch, format, piece):
    monkeypatch.setattr(array_files, "PIECE", piece)
    rows = list(torch.arange(28, dtype=torch.int16).reshape(7, 4))
    write(tmp_path / "x", format, None, a=rows, empty=[torch.zeros(2, 0)] * 3)
    with open_arrays(tmp_path / "x", "test", 1) as stored:
        found = list(stored.rows("a"))
        assert [row.shape for row in stored.rows("empty")] == [(2, 0)] * 3
    assert [row.shape for row in found] == [(4,)] * 7
    if format != "json":
        assert torch.equal(torch.stack(found), torch.stack(rows))
        assert read(tmp_path / "x")[1]["a"].tolist() == torch.stack(rows).tolist()
        assert all(row.untyped_storage().nbytes() == 8 for row in found)


@pytest.mark.parametrize("format", WITH_VALUES)
def test_a_flipped_bit_is_found_when_rows_are_read(tmp_path, monkeypatch, format):
    monkeypatch.setattr(array_files, "PIECE", 8)
    write(tmp_path / "x", format, None, a=[torch.full((4,), 1.2345)] * 9)
    data = bytearray((tmp_path / "x").read_bytes())
    data[data.index(torch.tensor(1.2345).numpy().tobytes() * 4) + 100] ^= 1
    (tmp_path / "x").write_bytes(data)
    with (
        pytest.raises(RecordFileError, match="'a' does not match its checksum"),
        open_arrays(tmp_path / "x", "test", 1) as stored,
    ):
        list(stored.rows("a"))


def test_the_manifest(tmp_path):
    write(tmp_path / "x", "json")
    header = json.loads((tmp_path / "x").read_text())
    assert header["kind"] == "test"
    assert header["schema_version"] == 1
    assert header["byte_order"] == sys.byteorder
    assert header["libraries"]["torch"] == torch.__version__
    assert header["libraries"].keys() == {"torch", "transformers", "numpy", "safetensors"}
    assert header["arrays"] == {"a": {"dtype": "float32", "shape": [3]}}


@pytest.mark.parametrize("format", FORMATS)
def test_the_same_input_gives_the_same_bytes(tmp_path, format):
    write(tmp_path / "x", format)
    write(tmp_path / "another name.bin", format)
    assert (tmp_path / "x").read_bytes() == (tmp_path / "another name.bin").read_bytes()


def test_a_dtype_that_cannot_be_stored(tmp_path):
    with pytest.raises(
        RecordFileError, match=r"a has the dtype complex64; expected one of float64"
    ):
        write(tmp_path / "x", a=torch.zeros(2, dtype=torch.complex64))
    assert list(tmp_path.iterdir()) == []


def test_every_dtype_that_torch_has_a_name_for_is_one():
    assert all(isinstance(getattr(torch, name), torch.dtype) for name in DTYPES)


def test_an_unknown_format(tmp_path):
    with pytest.raises(RecordFileError, match="no format 'hdf5'; expected one of json, pickle, pt"):
        write(tmp_path / "x", "hdf5")


# --- What is no such file -------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_another_kind_and_a_newer_version(tmp_path, format):
    write(tmp_path / "x", format)
    with pytest.raises(RecordFileError, match="its header says 'test'; expected 'other'"):
        read(tmp_path / "x", kind="other")
    write_arrays(tmp_path / "x", format, "test", 7, None, {})
    with pytest.raises(RecordFileError, match=r"schema version 7.*reads 1 to 1: upgrade"):
        read(tmp_path / "x")
    assert read(tmp_path / "x", newest=7) == (None, {})


def test_another_byte_order(tmp_path, monkeypatch):
    write(tmp_path / "x")
    monkeypatch.setattr(array_files.sys, "byteorder", "big")
    with pytest.raises(RecordFileError, match="byte order is 'little'"):
        read(tmp_path / "x")


def test_what_is_not_there_or_no_file(tmp_path):
    with pytest.raises(MissingFileError, match=r"no file .*nothing"):
        read(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "nothing")
    with pytest.raises(RecordFileError, match="is no regular file"):
        read(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(RecordFileError, match="is no regular file"):
        read(tmp_path / "pipe")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "it is empty"),
        (b"hello, world, how are you?", "none of json, pickle, .*begins with b'hello"),
        (b"{}", "KeyError"),
        (b"{", "JSONDecodeError"),
        (b"[]", "none of"),
        (b"PK\x03\x04" + bytes(100), "it is truncated or damaged: File is not"),
        (b"\x80\x04}(", "it is truncated"),
        (b"\x80\x04", "pickle of something else"),
        (b"\x00" * 100, "none of"),
        ((90).to_bytes(8, "little") + b"{" + bytes(99), "UnicodeDecodeError|JSON"),
    ],
)
def test_foreign_files(tmp_path, data, message):
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(RecordFileError, match=message) as error:
        read(tmp_path / "x")
    assert str(tmp_path / "x") in str(error.value)


@pytest.mark.parametrize("format", WITH_VALUES)
def test_a_flipped_bit_in_the_values_is_found(tmp_path, format):
    write(tmp_path / "x", format, None, a=torch.full((1000,), 1.2345))
    data = bytearray((tmp_path / "x").read_bytes())
    data[data.index(torch.tensor(1.2345).numpy().tobytes() * 4) + 1234] ^= 1
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(RecordFileError, match="'a' does not match its checksum"):
        read(tmp_path / "x")


@pytest.mark.parametrize("format", FORMATS)
def test_a_changed_header_is_found(tmp_path, format):
    write(tmp_path / "x", format, "the content")
    data = (tmp_path / "x").read_bytes().replace(b"the content", b"the CONTENT")
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(RecordFileError, match="header does not match its checksum"):
        read(tmp_path / "x")


def test_json_may_be_laid_out_anew(tmp_path):
    write(tmp_path / "x", "json", {"é": 0.1})
    document = json.loads((tmp_path / "x").read_text(encoding="utf-8"))
    (tmp_path / "x").write_text(json.dumps(document, indent=7), encoding="utf-8")
    assert read(tmp_path / "x")[0] == {"é": 0.1}


def test_errors_of_the_body_name_the_file(tmp_path):
    write(tmp_path / "x")
    with (
        pytest.raises(RecordFileError, match=r"x cannot be read as test: .*KeyError: 'b'") as error,
        open_arrays(tmp_path / "x", "test", 1) as stored,
    ):
        stored.read("b")
    assert isinstance(error.value.__cause__, KeyError)


# --- Whole or not at all --------------------------------------------------------------------------


class _Failing:
    """A file that fails after some bytes, as a full disk does."""

    def __init__(self, file, error, after):
        self._file, self._error, self._left = file, error, after

    def write(self, data):
        self._left -= len(data)
        if self._left < 0:
            raise self._error
        return self._file.write(data)

    def __getattr__(self, name):
        return getattr(self._file, name)


def fail_after(monkeypatch, error, after):
    """Make the file that `replacing` gives fail."""
    real = array_files._temporary

    class Failing:
        def __init__(self, target):
            self.inner = real(target)

        def __enter__(self):
            file, path = self.inner.__enter__()
            return _Failing(file, error, after), path

        def __exit__(self, *args):
            return self.inner.__exit__(*args)

    monkeypatch.setattr(array_files, "_temporary", Failing)


@pytest.mark.parametrize("earlier", [True, False])
@pytest.mark.parametrize("after", [0, 10, 300, 1500, 4100])
@pytest.mark.parametrize("format", FORMATS)
def test_a_full_disk_changes_nothing(tmp_path, monkeypatch, format, after, earlier):
    path = tmp_path / "x"
    if earlier:
        write(path, "npz", "earlier")
    before = path.read_bytes() if earlier else None
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    fail_after(monkeypatch, full, after)
    with pytest.raises(RecordFileError, match="disk is full; free some space") as error:
        write(path, format, "x" * 5000, a=torch.zeros(1000), b=torch.zeros(1000))
    assert error.value.__cause__ is full
    assert (path.read_bytes() if earlier else None) == before
    assert leftovers(tmp_path) == []
    assert path.exists() == earlier


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError()])
def test_an_interruption_changes_nothing(tmp_path, monkeypatch, format, error):
    write(tmp_path / "x", "npz", "earlier")
    fail_after(monkeypatch, error, 200)
    with pytest.raises(type(error)):
        write(tmp_path / "x", format, a=torch.zeros(1000))
    assert read(tmp_path / "x")[0] == "earlier"
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("step", ["fsync", "replace", "chmod"])
def test_a_failure_at_the_last_steps_changes_nothing(tmp_path, monkeypatch, step):
    write(tmp_path / "x", "npz", "earlier")

    def refuse(*args, **kwargs):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(*{"fsync": (os, "fsync")}.get(step, (Path, step)), refuse)
    with pytest.raises(RecordFileError, match="quota is used up"):
        write(tmp_path / "x")
    monkeypatch.undo()
    assert read(tmp_path / "x")[0] == "earlier"
    assert leftovers(tmp_path) == []


def test_the_body_fails(tmp_path):
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "x") as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_a_reader_sees_the_earlier_file_until_the_new_one_is_whole(tmp_path):
    (tmp_path / "x").write_bytes(b"earlier")
    with replacing(tmp_path / "x") as file:
        file.write(b"new")
        file.flush()
        assert (tmp_path / "x").read_bytes() == b"earlier"
    assert (tmp_path / "x").read_bytes() == b"new"


def test_what_a_killed_process_left_goes_with_the_next_write(tmp_path):
    code = f"""
        import os, signal, sys
        from pathlib import Path
        from array_files import replacing
        with replacing(Path({str(tmp_path / "x")!r})) as file:
            file.write(b"half"); file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(leftovers(tmp_path)) == 1
    write(tmp_path / "y")
    assert len(leftovers(tmp_path)) == 1
    write(tmp_path / "x")
    assert leftovers(tmp_path) == []


def test_a_write_in_progress_is_not_taken_for_a_leftover(tmp_path):
    with replacing(tmp_path / "x") as slow:
        slow.write(b"slow")
        with replacing(tmp_path / "x") as quick:
            quick.write(b"quick")
        assert (tmp_path / "x").read_bytes() == b"quick"
    assert (tmp_path / "x").read_bytes() == b"slow"
    assert leftovers(tmp_path) == []


def test_many_threads_write_the_same_path(tmp_path):
    failures = []

    def work(number):
        try:
            for _ in range(20):
                write(tmp_path / "x", "pickle", number)
        except RecordFileError as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert failures == []
    assert read(tmp_path / "x")[0] in range(4)
    assert leftovers(tmp_path) == []


def test_permissions_are_those_of_open_or_of_the_earlier_file(tmp_path):
    before = os.umask(0o027)
    try:
        write(tmp_path / "x")
        assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640
        (tmp_path / "x").chmod(0o604)
        write(tmp_path / "x")
        assert (tmp_path / "x").stat().st_mode & 0o777 == 0o604
    finally:
        os.umask(before)


def test_a_symbolic_link_stays_one(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there" / "x")
    write(tmp_path / "link", content="first")
    write(tmp_path / "link", content="second")
    assert (tmp_path / "link").is_symlink()
    assert read(tmp_path / "there" / "x")[0] == "second"
    assert leftovers(tmp_path) == leftovers(tmp_path / "there") == []


def test_folders_are_made_and_names_are_taken_as_they_are(tmp_path):
    for name in ("a/b/c", "[x]*?", "é😀\n", "x" * 255, ".hidden"):
        write(tmp_path / name)
        assert read(tmp_path / name)[0] == "content"
    undecodable = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    write(undecodable)
    assert read(undecodable)[0] == "content"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("folder", "that is a folder; add a file name"),
        ("file/x", "a part of the path is a file"),
        ("file/x/y", "a part of the path is a file"),
        ("x" * 256, "name is too long"),
        ("pipe", "not a regular file"),
        ("loop", "cannot write"),
    ],
)
def test_places_that_cannot_be_written(tmp_path, name, message):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"here before")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(RecordFileError, match=message) as error:
        write(tmp_path / name)
    assert re.match(f"cannot write {re.escape(str(tmp_path / name))}: ", str(error.value))
    assert isinstance(error.value.__cause__, OSError)
    assert (tmp_path / "file").read_bytes() == b"here before"
    assert leftovers(tmp_path) == []


def test_a_device_is_not_replaced():
    with pytest.raises(RecordFileError, match="not a regular file"):
        write(Path(os.devnull))
    assert Path(os.devnull).is_char_device()


@as_root
def test_a_folder_and_a_file_that_may_not_be_written(tmp_path):
    write(tmp_path / "x")
    (tmp_path / "x").chmod(0o400)
    with pytest.raises(RecordFileError, match="you may not write there"):
        write(tmp_path / "x")
    (tmp_path / "x").chmod(0o600)
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(RecordFileError, match="you may not write there"):
            write(tmp_path / "y")
    finally:
        tmp_path.chmod(0o700)


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    write(tmp_path / "x")
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(RecordFileError, match="you may not read it; change its permissions"):
        read(tmp_path / "x")


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.EIO])
def test_a_folder_that_refuses(tmp_path, monkeypatch, code):
    def refuse(self, *args, **kwargs):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(RecordFileError, match=re.escape(os.strerror(code))):
        write(tmp_path / "x")
