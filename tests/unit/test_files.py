from __future__ import annotations

import os
from pathlib import Path

import pytest

from tdc import files
from tdc.errors import DestinationError
from tdc.files import atomic_write, checked_destination


def test_bytes_are_written_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    atomic_write(path, b"one")
    atomic_write(str(path), b"two")
    assert path.read_bytes() == b"two"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("broken", ["replace", "fsync", "chmod"])
def test_a_failure_leaves_nothing_and_what_was_there_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with monkeypatch.context() as patch:
        patch.setattr(files.os, broken, fail)
        with pytest.raises(DestinationError, match=r"a\.bin cannot be written: No space left on device"):
            atomic_write(path, b"new")
        with pytest.raises(DestinationError):
            atomic_write(tmp_path / "b.bin", b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_mode_is_that_of_a_plain_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    atomic_write(tmp_path / "ours", b"")
    assert os.stat(tmp_path / "ours").st_mode == os.stat(tmp_path / "plain").st_mode


def test_a_missing_folder_a_folder_and_a_link_are_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for path, text in (("no/a", "does not exist"), (".", "is a folder"), ("link", "symbolic link")):
        with pytest.raises(DestinationError, match=text):
            checked_destination(tmp_path / path)
    assert not (tmp_path / "nowhere").exists()


def test_a_destination_error_is_an_oserror_and_not_a_bug(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="does not exist"):
        atomic_write(tmp_path / "no" / "a", b"")
    assert DestinationError.exit_code == 6
