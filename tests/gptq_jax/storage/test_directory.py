import errno
import os
import signal
import subprocess
import sys
from collections import namedtuple

import pytest

from gptq_jax.storage import directory
from gptq_jax.storage.directory import acquire, check_target, discard, release, replacing, take_place


def folder(path, text):
    path.mkdir()
    (path / "gptq_jax.json").write_text(text)
    return path


def text(path):
    return (path / "gptq_jax.json").read_text()


@pytest.mark.parametrize("exchange", [True, False])
def test_two_directories_change_places(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(directory, "_exchange", lambda *_: False)
    new, old = folder(tmp_path / "new", "new"), folder(tmp_path / "out", "old")
    take_place(new, old)
    assert (text(old), text(new)) == ("new", "old")
    take_place(new, tmp_path / "third")
    assert text(tmp_path / "third") == "old"
    assert sorted(os.listdir(tmp_path)) == ["out", "third"]


def test_the_file_system_here_exchanges_in_one_step(tmp_path):
    if not sys.platform.startswith("linux"):
        pytest.skip("renameat2 is Linux's")
    new, old = folder(tmp_path / "new", "new"), folder(tmp_path / "out", "old")
    assert directory._exchange(new, old)
    with pytest.raises(OSError, match="No such file") as error:
        directory._exchange(tmp_path / "nowhere", old)
    assert error.value.errno == errno.ENOENT


@pytest.mark.parametrize("fails_at", ["first rename", "second rename"])
def test_killed_between_two_renames_the_old_directory_comes_back(tmp_path, monkeypatch, fails_at):
    """What is left when the process is gone at either rename of the way without exchange."""
    out = folder(tmp_path / "out", "old")
    real, calls = os.rename, []

    def rename(one, two):
        calls.append(one)
        if len(calls) >= (1 if fails_at == "first rename" else 2):
            raise KeyboardInterrupt  # and so does every later one: a killed process undoes nothing
        real(one, two)

    new = folder(tmp_path / ".out.partial", "new")
    monkeypatch.setattr(directory, "_exchange", lambda *_: False)
    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        take_place(new, out)
    monkeypatch.setattr(os, "rename", real)
    assert out.exists() is (fails_at == "first rename")
    check_target(out, overwrite=True)
    assert text(out) == "old"
    with replacing(out) as partial:
        (partial / "gptq_jax.json").write_text("new")
    assert text(out) == "new"
    assert os.listdir(tmp_path) == ["out"]


def test_leftovers_of_killed_runs_are_removed(tmp_path):
    folder(tmp_path / ".out.partial", "half")
    folder(tmp_path / ".out.partial.discarded", "less")
    out = folder(tmp_path / "out", "old")
    with replacing(out) as partial:
        assert list(partial.iterdir()) == []
        (partial / "gptq_jax.json").write_text("new")
    assert text(out) == "new"
    assert os.listdir(tmp_path) == ["out"]


HOLD = """
import fcntl, sys, time
lock = open(sys.argv[1], "ab")
fcntl.flock(lock, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(60)
"""


def test_one_process_writes_at_a_time_and_a_lock_dies_with_it(tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-c", HOLD, str(tmp_path / ".out.lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(BlockingIOError, match=f"{out} is being written by another process: wait"), replacing(out):
            pytest.fail("two at once")
        process.send_signal(signal.SIGKILL)
    with replacing(out) as partial:
        (partial / "gptq_jax.json").write_text("new")
    assert os.listdir(tmp_path) == ["out"]


def test_a_lock_is_taken_by_one_after_the_other(tmp_path):
    first = acquire(tmp_path / "out")
    with pytest.raises(BlockingIOError):
        acquire(tmp_path / "out")
    release(first)
    release(first)
    second = acquire(tmp_path / "out")
    release(second)
    assert os.listdir(tmp_path) == []


def test_links_are_followed_and_mount_points_refused(tmp_path, monkeypatch):
    folder(tmp_path / "real", "old")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "link").symlink_to(tmp_path / "real")
    with replacing(tmp_path / "elsewhere" / "link") as partial:
        assert partial.parent == tmp_path
        (partial / "gptq_jax.json").write_text("new")
    assert text(tmp_path / "real") == "new"
    assert (tmp_path / "elsewhere" / "link").is_symlink()
    with pytest.raises(OSError, match="/proc is a mount point, which cannot be replaced as a whole: name a directory"):
        check_target("/proc", overwrite=True)


def test_room_is_checked(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(directory.shutil, "disk_usage", lambda _: usage(2**40, 2**40, 70 * 2**20))
    with pytest.raises(OSError, match="has 70 MiB free, but 84 are needed"):
        check_target(tmp_path / "out", overwrite=False, nbytes=20 * 2**20)


def test_discarding_half_way_leaves_no_whole_name(tmp_path, monkeypatch):
    whole = folder(tmp_path / "whole", "x")
    monkeypatch.setattr(directory.shutil, "rmtree", lambda *_, **__: None)
    discard(whole)
    assert os.listdir(tmp_path) == ["whole.discarded"]
