"""A process killed while it saves, and a disk that is full: the earlier file or the new one."""

import gc
import os
import random
import resource
import signal
import time

import numpy as np
import pytest

import heat_maps
import interactive_figures
from array_files import open_arrays, write_arrays
from array_formats import FORMATS
from figure_canvas import write_whole
from forward_pass import RecordFileError
from saved_files import SAVED, bytes_of, data_of

KILLS = 30
SIZE = 40_000
"""Numbers in a file: enough that writing takes a while."""

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def in_child(work):
    """Run a function in a fork of this process, which has everything imported; its process id."""
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        os.read(reading, 1)
        os.close(reading)
        return child
    try:
        gc.disable()  # a collection of all that the tests before left would take longer than a save
        os.write(writing, b"!")
        work()
    finally:
        os._exit(0)


def kill(child, after):
    time.sleep(after)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "it ended by itself"


def hidden(folder):
    return [path for path in folder.iterdir() if path.name.startswith(".")]


# --- Killed ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_a_killed_save_leaves_a_whole_file(tmp_path, format):
    import torch

    path, rng, unfinished = tmp_path / "x", random.Random(format), 0

    def write(number):
        write_arrays(
            path, format, "test", 1, {"number": number, "text": str(number) * 3000},
            {"a": torch.full((SIZE,), float(number))},
        )  # fmt: skip

    def write_for_ever():
        number = first
        while True:
            number += 1
            write(number)

    seen = {0}
    write(0)
    began = time.perf_counter()
    os.waitpid(in_child(lambda: write(0)), 0)  # slower than here: a fork copies what it touches
    longest = max(0.02, 1.5 * (time.perf_counter() - began))  # a save or more, on any machine
    kills = 0
    while kills < KILLS or (kills < 10 * KILLS and not (unfinished and len(seen) > 3)):
        kills, first = kills + 1, kills * 10**6
        kill(in_child(write_for_ever), rng.uniform(0.0, longest))
        unfinished += len(hidden(tmp_path))
        with open_arrays(path, "test", 1) as stored:
            number, array = stored.content["number"], stored.read("a")
        assert format == "json" or bool((array == number).all())
        seen.add(number)
        assert len(hidden(tmp_path)) <= 1, "the next save removed what was left"
    write(1)
    assert hidden(tmp_path) == []
    assert unfinished > 0, "no kill came in the middle of a save"
    assert len(seen) > 3, "no save was finished"


@pytest.mark.parametrize("name", [n for n in SAVED if "." not in n])
def test_a_result_whose_save_is_killed_is_whole(tmp_path, name):
    saved = SAVED[name]
    path, found = tmp_path / "x", saved.make()
    saved.save(found, path)

    def save_for_ever():
        while True:
            saved.save(found, path)

    rng = random.Random(name)
    for _ in range(5):
        kill(in_child(save_for_ever), rng.uniform(0.001, 0.006))
        assert path.read_bytes() == data_of(name)
        assert bytes_of(saved, saved.load(path)) == data_of(name)
    saved.save(found, path)
    assert hidden(tmp_path) == []


def test_a_picture_whose_save_is_killed_is_whole(tmp_path):
    path = tmp_path / "a[1].png"
    whole = {bytes([n]) * 100_000 for n in range(3)}

    def slowly(part, data):
        with part.open("wb") as file:
            for start in range(0, len(data), 1000):
                file.write(data[start : start + 1000])

    def save_for_ever():
        while True:
            for data in sorted(whole):
                write_whole(path, lambda part, data=data: slowly(part, data))

    write_whole(path, lambda part: part.write_bytes(max(whole)))
    other = tmp_path / f".a[1]-{os.getppid()}.png"
    other.touch()  # of a process that is alive
    rng, unfinished = random.Random(0), 0
    kills = 0
    while kills < KILLS or (kills < 10 * KILLS and not unfinished):
        kills += 1
        kill(in_child(save_for_ever), rng.uniform(0.0, 0.003))
        assert path.read_bytes() in whole
        unfinished += len(hidden(tmp_path)) - 1
        assert len(hidden(tmp_path)) <= 3
    write_whole(path, lambda part: part.write_bytes(max(whole)))
    assert hidden(tmp_path) == [other]
    assert unfinished > 0, "no kill came in the middle of a save"


# --- No more room ---------------------------------------------------------------------------------


def limited(work, nbytes):
    """Whether a function ran in a process that may write files of so many bytes only."""

    def with_limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, nbytes))
        work()
        os._exit(7)

    _, status = os.waitpid(in_child(with_limit), 0)
    assert os.WIFEXITED(status)
    return os.WEXITSTATUS(status) == 7


def test_the_limit_is_one(tmp_path):
    assert limited(lambda: (tmp_path / "x").write_bytes(bytes(100)), 100)
    assert not limited(lambda: (tmp_path / "x").write_bytes(bytes(101)), 100)


@pytest.mark.parametrize("name", SAVED)
@pytest.mark.parametrize("part", [0.0, 0.95])
def test_no_room_leaves_the_earlier_file(tmp_path, name, part):
    """The system itself refuses to write more."""
    path, saved = tmp_path / "x", SAVED[name]
    found, data = saved.make(), data_of(name)
    path.write_bytes(data)

    def save():
        with pytest.raises(
            RecordFileError, match=r"x: the file is larger than is allowed .*unchanged"
        ):
            saved.save(found, path)

    assert limited(save, int(len(data) * part))
    assert path.read_bytes() == data
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("kind", ["png", "html"])
def test_no_room_for_a_picture_leaves_the_earlier_one(tmp_path, kind):
    path = tmp_path / f"x.{kind}"
    path.write_bytes(b"earlier")
    values = np.eye(3)

    def save():
        with pytest.raises(OSError, match="File too large"):
            if kind == "html":
                pytest.importorskip("plotly")
                page = interactive_figures.heatmap(values)
                interactive_figures.finish_interactive(page, path)
            else:
                heat_maps.plot_heatmap(values, save_path=path)

    assert limited(save, 1000)
    assert path.read_bytes() == b"earlier"
    assert hidden(tmp_path) == []
