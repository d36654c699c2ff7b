"""Files on disk: what the system refuses is said in one line, before any work where it can be."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import resource
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from rl_sparsity_tf import files
from rl_sparsity_tf.errors import (
    ArgumentError,
    FileError,
    FileExistsRLSparsityError,
    RLSparsityError,
)

FULL, LIMIT = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 4096


@contextlib.contextmanager
def small_files(limit=LIMIT):
    """What `ulimit -f` does: no file of this process may be larger."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def raising(error):
    def raise_it(*_, **__):
        raise error

    return raise_it


def places(folder: Path, suffix: str) -> dict[str, tuple[str, str]]:
    """Paths that nothing can be read from or written to, and what is said of them."""
    (folder / "file").write_text("")
    (folder / f"loop{suffix}").symlink_to(folder / f"loop{suffix}")
    (folder / f"lost{suffix}").symlink_to(folder / "nowhere" / "gone")
    os.mkfifo(folder / f"pipe{suffix}")
    return {
        "empty": ("", r"='' names nothing\. Expected "),
        "NUL": (f"{folder}/a\0b{suffix}", r"a\\x00b.* has a character that no file's name can"),
        "no text": (f"{folder}/\ud800{suffix}", r"ud800.* has a character that no file's name can"),
        "long": (
            f"{folder}/{'x' * 300}{suffix}",
            r"cannot be used: File name too long\. Choose a shorter name\.",
        ),
        "loop": (f"{folder}/loop{suffix}", r"levels of symbolic links\. It is a link that leads"),
        "lost": (f"{folder}/lost{suffix}", r"nowhere.*does not exist"),
        "pipe": (f"{folder}/pipe{suffix}", r"is a device, a pipe or a socket\. Expected .*regular"),
        "below a file": (f"{folder}/file/x{suffix}", r"does not exist|no file"),
    }


def assert_refused(call: Callable[[str], object], folder: Path, suffix: str) -> None:
    """Every such path is refused in a line, and nothing is left beside them."""
    for case, (path, pattern) in places(folder, suffix).items():
        if case == "pipe" and not suffix:
            pattern = "is a file"  # to those who want a folder
        before = sorted(os.listdir(folder))
        with pytest.raises(RLSparsityError) as caught:
            call(path)
        message = str(caught.value)
        assert re.search(pattern, message), (case, message)
        assert isinstance(caught.value, OSError | ValueError), case
        assert "\n" not in message
        assert sorted(os.listdir(folder)) == before


def test_nothing_is_written_to_impossible_places(tmp_path):
    assert_refused(files.check_new_file, tmp_path, ".json")


def test_no_folder_is_made_in_impossible_places(tmp_path):
    assert_refused(files.check_folder, tmp_path, "")


def test_nothing_is_read_from_impossible_places(tmp_path):
    def read(path):
        found = files.as_file("path", path, "a file")
        if not found.is_file():
            raise ArgumentError("no file")  # for the caller to say

    assert_refused(read, tmp_path, ".json")


def test_a_file_that_may_not_be_read_is_said_to_be_so(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("")
    denied = PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    monkeypatch.setattr(Path, "open", raising(denied))
    with pytest.raises(FileError, match=r"file' cannot be read: Permission denied\. Give a plan"):
        files.as_file("path", file, "a plan")


@pytest.mark.parametrize("check", [files.check_new_file, files.check_folder])
@pytest.mark.parametrize(
    ("number", "pattern"),
    [
        (errno.EROFS, r"cannot be written: Read-only file system\. Choose a place that can be"),
        (errno.EACCES, r"cannot be written: Permission denied\. Choose a place that this user has"),
        (errno.ENOSPC, r"cannot be written: No space left on device\. Free some space there"),
        (errno.EMFILE, r"cannot be written: Too many open files\. Close files, or raise"),
    ],
)
def test_a_place_is_tried_before_any_work(tmp_path, monkeypatch, check, number, pattern):
    monkeypatch.setattr(os, "open", raising(OSError(number, os.strerror(number))))
    with pytest.raises(FileError, match=pattern) as caught:
        check(tmp_path / "new")
    assert isinstance(caught.value, OSError)
    assert caught.value.errno == number


def test_a_place_needs_room_for_what_will_be_written(tmp_path):
    with small_files(2**20):
        files.check_folder(tmp_path)
        with pytest.raises(FileError, match=r"cannot be written: File too large\. Raise the limit"):
            files.check_folder(tmp_path, 2**21)
    assert not os.listdir(tmp_path)


def test_room_is_found_out_where_none_can_be_set_aside(tmp_path, monkeypatch):
    for error in (errno.EOPNOTSUPP, errno.EINVAL):
        refuse = raising(OSError(error, "no such operation"))
        monkeypatch.setattr(os, "posix_fallocate", refuse, raising=False)
        files.check_room(tmp_path)
        with small_files(), pytest.raises(FileError, match="File too large"):
            files.check_room(tmp_path)
    assert not os.listdir(tmp_path)


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "plan.json"
    files.write_text(path, "old")
    with (
        small_files(),
        pytest.raises(FileError, match=r"plan\.json' cannot be written: File too large\. Raise"),
    ):
        files.write_text(path, "x" * 2 * LIMIT)
    assert [one.read_text() for one in tmp_path.iterdir()] == ["old"]


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("unable to flush: errno = 28, error message = 'No space left on device'"),
        OSError("Can't write data (file write failed, 'No space left on device')"),
        FULL,
    ],
    ids=["words", "no number", "number"],
)
def test_what_libraries_say_of_a_full_disk_is_understood(tmp_path, error):
    path, pattern = tmp_path / "x.keras", r"x\.keras' cannot be written: No space left"
    with pytest.raises(FileError, match=pattern) as caught, files.replacing(path):
        raise error
    assert caught.value.errno == errno.ENOSPC
    assert not os.listdir(tmp_path)


def test_other_errors_stay_what_they_are(tmp_path):
    for error in (KeyError("x"), FileExistsRLSparsityError("there"), FileError("said already")):
        with pytest.raises(type(error)) as caught, files.replacing(tmp_path / "x"):
            raise error
        assert caught.value is error


def test_writing_leaves_the_umask_alone(tmp_path, monkeypatch):
    (tmp_path / "ordinary").write_text("")
    wanted = (tmp_path / "ordinary").stat().st_mode
    # Of the whole process: between two calls other threads would make files anyone may write to.
    monkeypatch.setattr(os, "umask", raising(AssertionError("the umask was changed")))
    files.write_text(tmp_path / "ours", "")
    assert (tmp_path / "ours").stat().st_mode == wanted


def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path):
    (tmp_path / "far").mkdir()
    link, far = tmp_path / "link.json", tmp_path / "far" / "plan.json"
    link.symlink_to(far)
    for text in ("first", "second"):
        files.check_new_file(link, overwrite=True)
        files.write_text(link, text)
        assert link.is_symlink()
        assert far.read_text() == text
    assert os.listdir(tmp_path / "far") == ["plan.json"]
    with pytest.raises(FileExistsRLSparsityError, match="exists already"):
        files.check_new_file(link)


def test_names_may_be_as_long_as_the_system_allows(tmp_path):
    for name in ("x" * 250 + ".json", "x." + "y" * 250, "ü" * 120 + ".json"):
        files.write_text(files.check_new_file(tmp_path / name), name)
        assert (tmp_path / name).read_text() == name


def test_a_device_is_never_replaced(tmp_path):
    with pytest.raises(FileError, match=r"'/dev/null' is a device"):
        files.check_new_file("/dev/null", overwrite=True)
    assert Path("/dev/null").is_char_device()


# --------------------------------------------------------------------------- temporary files


def scratched(act=None):
    """A temporary folder in which something is done."""
    with files.scratch_folder() as folder:
        (folder / "below").mkdir()
        if act is not None:
            act(folder)


def fill(folder):
    with small_files():
        files.write_text(folder / "x", "x" * 2 * LIMIT)


@pytest.mark.parametrize("act", [None, raising(KeyboardInterrupt()), raising(KeyError("x"))])
def test_temporary_files_go_whatever_happens(tmp_path, monkeypatch, act):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with contextlib.suppress(KeyboardInterrupt, KeyError):
        scratched(act)
    assert not os.listdir(tmp_path)


def test_no_room_for_temporary_files_is_said_in_words(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    said = (
        r"' \(the folder for temporary files\) cannot be written: .* Set TMPDIR to another folder"
    )
    words = RuntimeError("convert: No space left on device")
    for act in (raising(FULL), raising(words), fill):
        with pytest.raises(FileError, match=re.escape(str(tmp_path)) + said):
            scratched(act)
    assert not os.listdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(FileError, match=re.escape(str(tmp_path / "gone")) + said):
        scratched()


def test_what_goes_wrong_elsewhere_is_not_blamed_on_temporary_files(tmp_path):
    ours = FileNotFoundError(errno.ENOENT, "no such file", str(tmp_path / "rows.csv"))
    with pytest.raises(FileNotFoundError) as caught, files.scratch_folder():
        raise ours
    assert caught.value is ours
