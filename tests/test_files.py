"""Files are whole or the old ones; results go where they were asked for, and never over a run."""

import errno
import json
import os
import resource
import stat
import threading

import pytest
import torch

from empf.files import check_result, fingerprint, parse_json, read_json, write_atomic, write_result


def test_write_atomic_makes_folders_and_replaces(tmp_path):
    path = tmp_path / "a" / "b" / "file"
    for data in (b"long content", b"short"):
        write_atomic(path, data)
        assert path.read_bytes() == data
    assert os.listdir(path.parent) == ["file"]


@pytest.mark.parametrize("function", ["replace", "fsync"])
def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, function):
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, function, full)
    with pytest.raises(OSError, match=r"could not write .*file \(No space left on device\): make room .* is intact"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_a_file_size_limit_leaves_the_old_file(tmp_path):
    """The real thing: the kernel refuses in the middle of the write."""
    path = tmp_path / "file"
    write_atomic(path, b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_atomic(path, bytes(200_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_a_file_in_the_place_of_a_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"could not write .*file/run/config.json \(Not a directory\)"):
        write_atomic(tmp_path / "file" / "run" / "config.json", b"")


# ---- results


def test_a_result_follows_a_link_and_leaves_devices_and_pipes_in_place(tmp_path, capsys):
    target, link, pipe = tmp_path / "target.json", tmp_path / "link.json", tmp_path / "pipe"
    link.symlink_to(target)
    write_result(link, "{}")
    assert link.is_symlink() and target.read_text() == "{}"
    os.mkfifo(pipe)
    read = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    write_result(pipe, "[1]")
    reader.join(10)
    assert read == ["[1]"] and stat.S_ISFIFO(pipe.stat().st_mode)
    write_result(tmp_path.__class__("/dev/null"), "gone")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    write_result(tmp_path.__class__("-"), "said\n")
    assert capsys.readouterr().out == "said\n"


@pytest.mark.parametrize(
    "name", ["config.json", "metrics.jsonl", "model.safetensors", "state/state.pt", "state/lock", "link"]
)
def test_files_of_a_run_are_refused(tmp_path, name):
    write_atomic(tmp_path / "config.json", b"{}")
    write_atomic(tmp_path / "state" / "state.pt", b"x")
    (tmp_path / "link").symlink_to(tmp_path / "config.json")
    for refuse in (check_result, lambda path: write_result(path, "new")):
        with pytest.raises(ValueError, match="is a file of a run: choose another name"):
            refuse(tmp_path / name)
    assert (tmp_path / "config.json").read_bytes() == b"{}"
    check_result(tmp_path / "result.json")
    check_result(None)


def test_what_is_no_result_is_not_replaced(tmp_path):
    path = tmp_path / "notes"
    for content in (b"my notes", b"\x00\xff", b'{"a": '):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="notes exists and is no result, it would be lost: choose another name"):
            write_result(path, "{}")
        assert path.read_bytes() == content
    for content in (b"", b"[1]"):
        path.write_bytes(content)
        write_result(path, "{}")
        assert path.read_text() == "{}"


# ---- JSON and fingerprints


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "1" * 10_000, f"[{-(10**400)}]", '{"a": \x1b]0;x\x07}'])
def test_what_is_no_json_is_one_short_sentence(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match="x.json is damaged") as error:
        read_json(tmp_path / "x.json")
    assert str(error.value).isprintable() and len(str(error.value)) < 300
    assert parse_json(f"[{10**300}, -1]") == [10**300, -1]


def test_a_fingerprint_is_of_names_types_and_numbers():
    state = {"a": torch.ones(2), "b": torch.zeros(2, 3)}
    others = [{"a": torch.ones(2)}, {**state, "a": torch.ones(2).double()}, {**state, "b": torch.zeros(3, 2)}]
    assert len({fingerprint(s) for s in [state, *others]}) == 4
    assert fingerprint(state) == fingerprint(json.loads("{}") | dict(reversed(state.items())))
