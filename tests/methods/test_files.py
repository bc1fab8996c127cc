"""Only regular files are opened, and nothing waits."""

import os
import stat

import pytest

from prmim_methods.files import is_special, open_regular

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has other pipes")


def test_files_are_read_and_appended_to(tmp_path):
    for _ in range(2):
        with open_regular(tmp_path / "file", "a") as file:
            file.write(b"line\n")
    with open_regular(tmp_path / "file") as file:
        assert file.readall() == b"line\nline\n"
    assert (tmp_path / "file").stat().st_mode & 0o111 == 0
    assert not is_special(tmp_path / "file")


def test_links_to_files_are_followed(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "link").symlink_to("file")
    with open_regular(tmp_path / "link") as file:
        assert file.readall() == b"x"
    assert not is_special(tmp_path / "link")


SPECIAL = {
    "pipe": lambda path: os.mkfifo(path),
    "socket": lambda path: os.mknod(path, stat.S_IFSOCK | 0o600),
    "device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("mode", ["r", "a"])
@pytest.mark.parametrize("make", SPECIAL.values(), ids=SPECIAL)
def test_other_things_are_refused_at_once(make, mode, tmp_path):
    make(tmp_path / "thing")
    assert is_special(tmp_path / "thing")
    with pytest.raises(ValueError, match=r"^not a regular file, but a pipe, a socket or a device$"):
        open_regular(tmp_path / "thing", mode)


def test_a_pipe_with_a_writer_is_refused_too(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    other = os.open(tmp_path / "pipe", os.O_RDWR)
    try:
        for mode in ("r", "a"):
            with pytest.raises(ValueError, match="not a regular file"):
                open_regular(tmp_path / "pipe", mode)
    finally:
        os.close(other)


def test_missing_files_and_folders_are_what_they_are(tmp_path):
    assert not is_special(tmp_path)
    assert not is_special(tmp_path / "none")
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "none")
    with pytest.raises(IsADirectoryError):
        open_regular(tmp_path)
