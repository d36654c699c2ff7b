"""The run directory: whose folder it is, what is in the journal, and files that are never torn."""

import errno
import json
import os
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras
from tiny_search import strip_seals

import rl_sparsity_tf as rls
from rl_sparsity_tf.errors import FileExistsRLSparsityError, RunError
from rl_sparsity_tf.files import check_new_file, replacing, sha256_of, write_text
from rl_sparsity_tf.search import run_directory, run_files
from rl_sparsity_tf.search.run_directory import (
    RESULT_FILES,
    RunDirectory,
    check_directory,
    check_free,
    check_unfinished,
    data_fingerprint,
    model_fingerprint,
)
from rl_sparsity_tf.search.run_files import versions

ARGUMENTS = {"target": {"sparsity": 0.9}, "seed": 0, "agent": {"name": "dqn"}}
ONE, TWO, THREE = (sha256_of(text) for text in (b"1", b"2", b"3"))
PRINTS = {"model": ONE, "train": TWO}


def opened(path, overwrite=False, prints=PRINTS, any_versions=False, **changes):
    """A run that was begun or continued, as if its process were gone by now."""
    arguments = {**ARGUMENTS, **changes}
    with RunDirectory(path, arguments, prints, overwrite, any_versions=any_versions) as run:
        run.start()
    return run


def listing(path):
    return sorted(file.name for file in path.iterdir())


# ---------------------------------------------------------------------------- files


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "metrics.json"
    write_text(path, "old")

    def half_written():
        with replacing(path) as temporary:
            temporary.write_text("ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        half_written()
    assert path.read_text() == "old"
    assert listing(tmp_path) == ["metrics.json"]


def test_a_write_is_complete_before_it_gets_its_name(tmp_path, monkeypatch):
    path, seen = tmp_path / "plan.json", []
    real_sync, real_replace = os.fsync, os.replace

    def sync(handle):
        seen.append("sync")
        real_sync(handle)

    def replace(source, destination):
        seen.append(("replace", source.read_text()))
        real_replace(source, destination)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", replace)
    write_text(path, "whole")
    assert seen == ["sync", ("replace", "whole")]
    assert path.read_text() == "whole"


def test_files_get_the_mode_of_any_new_file(tmp_path):
    (tmp_path / "plain").write_text("")
    write_text(tmp_path / "written", "")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "written")]
    assert modes[0] == modes[1]


def test_check_new_file(tmp_path):
    assert check_new_file(str(tmp_path / "new.json")) == tmp_path / "new.json"
    (tmp_path / "old.json").touch()
    with pytest.raises(FileExistsRLSparsityError, match=r"exists already.*overwrite=True"):
        check_new_file(tmp_path / "old.json")
    assert check_new_file(tmp_path / "old.json", overwrite=True).exists()
    with pytest.raises(rls.ArgumentError, match=r"is a folder\. Expected the name of a file"):
        check_new_file(tmp_path, overwrite=True)
    with pytest.raises(rls.ArgumentError, match=r"does not exist\. Create it first"):
        check_new_file(tmp_path / "none" / "new.json")


def test_sha256_of_chunks_is_that_of_the_whole():
    assert sha256_of(b"ab", b"c") == sha256_of(b"abc") == sha256_of(b"", b"abc")
    assert sha256_of(b"abc").startswith("ba7816bf")


# ---------------------------------------------------------------------------- the folder


def test_a_new_run_writes_its_manifest(tmp_path):
    run = opened(tmp_path / "run")
    assert not run.resumed
    assert listing(run.path) == ["checkpoints", "journal.jsonl", "manifest.json"]
    manifest = json.loads((run.path / "manifest.json").read_text())
    assert manifest["format_version"] == 2
    assert manifest["arguments"] == ARGUMENTS
    assert manifest["fingerprints"] == PRINTS
    assert manifest["versions"]["tensorflow"] == tf.__version__
    assert set(versions()) >= {"python", "machine", "numpy", "cpus", "intra_op_threads"}


def test_an_empty_folder_is_taken(tmp_path):
    assert not opened(tmp_path).resumed
    assert "manifest.json" in listing(tmp_path)


def test_equal_arguments_resume(tmp_path):
    first = opened(tmp_path / "run", extra=(1, 2))
    first.append({"episode": 0})
    first.save_checkpoint("agent", {"w": np.arange(3)})
    second = opened(tmp_path / "run", extra=[1, 2])  # equal once both are JSON
    assert second.resumed
    assert second.read_journal(1) == [{"episode": 0}]
    np.testing.assert_array_equal(second.load_checkpoint("agent")["w"], [0, 1, 2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, r"unfinished run that differs in seed \(0, now 1\)\. Call with the same"),
        ({"target": {"sparsity": 0.8}}, r"differs in target \(\{'sparsity': 0.9\}, now"),
        ({"more": 1}, r"differs in more \(None, now 1\)"),
        ({"seed": 1, "prints": {"model": THREE, "train": TWO}}, r"seed \(0, now 1\), model\."),
        ({"prints": {"model": ONE, "train": THREE}}, r"differs in train\."),
    ],
)
def test_different_arguments_do_not_resume(tmp_path, changes, message):
    opened(tmp_path / "run").append({"episode": 0})
    with pytest.raises(FileExistsRLSparsityError, match=message):
        opened(tmp_path / "run", **changes)
    assert opened(tmp_path / "run").read_journal(1) == [{"episode": 0}]  # nothing was touched


def test_another_format_does_not_resume(tmp_path):
    opened(tmp_path)
    manifest = tmp_path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format_version": 2', '"format_version": 3'))
    with pytest.raises(FileExistsRLSparsityError, match="differs in format_version 3"):
        opened(tmp_path)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_foreign_folder_is_never_touched(tmp_path, overwrite):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsRLSparsityError, match=r"not empty and holds no run.*empty it"):
        opened(tmp_path, overwrite)
    assert listing(tmp_path) == ["thesis.txt"]


def test_a_finished_run_is_kept_unless_told_otherwise(tmp_path):
    run = opened(tmp_path)
    run.append({"episode": 0})
    run.save_checkpoint("agent", {"w": np.zeros(2)})
    for name in RESULT_FILES:
        (tmp_path / name).write_text("{}")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsRLSparsityError, match=r"holds a finished run.*overwrite=True"):
        opened(tmp_path)
    again = opened(tmp_path, overwrite=True, seed=3)
    assert not again.resumed
    assert again.read_journal(0) == []
    assert again.load_checkpoint("agent") is None
    assert listing(tmp_path) == ["checkpoints", "journal.jsonl", "manifest.json", "notes.txt"]
    assert json.loads((tmp_path / "manifest.json").read_text())["arguments"]["seed"] == 3


def test_overwriting_starts_an_unfinished_run_again(tmp_path):
    opened(tmp_path).append({"episode": 0})
    again = opened(tmp_path, overwrite=True)
    assert not again.resumed
    assert (tmp_path / "journal.jsonl").read_text() == ""


@pytest.mark.parametrize("text", ["{", "[]", "3", "{}", '{"arguments": {}}', "\xff"])
def test_a_damaged_manifest(tmp_path, text):
    opened(tmp_path)
    (tmp_path / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(RunError, match=r"manifest .* cannot be read.*overwrite=True"):
        opened(tmp_path)
    assert not opened(tmp_path, overwrite=True).resumed
    assert opened(tmp_path).resumed


LACKING = [
    '{"format_version": 1}',
    '{"format_version": 2, "arguments": 3}',
    '{"format_version": 2, "arguments": [], "fingerprints": {}, "versions": {}}',
    '{"format_version": 2, "arguments": {}, "fingerprints": {}, "versions": 1}',
    '{"format_version": 2, "arguments": {}, "fingerprints": {}, "versions": {}, "id": "../x"}',
    '{"format_version": 1, "arguments": {}, "fingerprints": {}, "versions": {}, "id": "0"}',
    "[" * 100_000,
]


@pytest.mark.parametrize("text", LACKING)
def test_a_manifest_that_lacks_its_arguments(tmp_path, text):
    opened(tmp_path)
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(rls.RLSparsityError, match=r"overwrite=True"):
        opened(tmp_path)


def test_places_that_cannot_hold_a_run(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(rls.ArgumentError, match=r"is a file\. Expected a folder"):
        opened(tmp_path / "file")
    with pytest.raises(rls.ArgumentError, match=r"does not exist\. Create it first"):
        opened(tmp_path / "none" / "run")
    assert check_directory(tmp_path / "new") == tmp_path / "new"


# ---------------------------------------------------------------------------- the journal


def test_a_torn_last_line_is_forgotten(tmp_path):
    run = opened(tmp_path)
    for episode in range(3):
        run.append({"episode": episode, "reward": episode / 7})
    journal = tmp_path / "journal.jsonl"
    journal.write_text(journal.read_text()[:-9])  # the machine went down in the third line
    run = opened(tmp_path)
    entries = run.read_journal(2)
    assert [entry["reward"] for entry in entries] == [0.0, 1 / 7]
    run.append({"episode": 2})
    assert [entry["episode"] for entry in run.read_journal(3)] == [0, 1, 2]


def test_lines_behind_the_checkpoint_are_done_again(tmp_path):
    run = opened(tmp_path)
    for episode in range(4):
        run.append({"episode": episode})
    assert run.read_journal(2) == [{"episode": 0}, {"episode": 1}]
    assert len((tmp_path / "journal.jsonl").read_text().splitlines()) == 2
    assert run.read_journal(0) == []
    assert (tmp_path / "journal.jsonl").read_text() == ""


@pytest.mark.parametrize(
    "text",
    [
        '{"episode": 0}\n',
        '{"episode": 0}\n{"episode"',
        '{"episode": 1}\n{"episode": 0}\n',
        "3\n4\n",
    ],
)
@pytest.mark.parametrize("is_sealed", [True, False])
def test_a_journal_that_lacks_what_the_checkpoint_needs(tmp_path, text, is_sealed):
    run = opened(tmp_path)
    run.sealed = is_sealed
    (tmp_path / "journal.jsonl").write_text(text)
    with pytest.raises(RunError, match=r"journal .* is damaged.*overwrite=True"):
        run.read_journal(2)
    assert (tmp_path / "journal.jsonl").read_text() == text


def test_a_missing_or_unreadable_journal_is_damaged(tmp_path):
    run = opened(tmp_path)
    (tmp_path / "journal.jsonl").write_bytes(b"\xff\xfe\n")
    with pytest.raises(RunError, match="is damaged"):
        run.read_journal(1)
    (tmp_path / "journal.jsonl").unlink()
    with pytest.raises(RunError, match="is damaged"):
        run.read_journal(1)


def test_lines_are_on_the_disk_when_append_returns(tmp_path, monkeypatch):
    run, synced = opened(tmp_path), []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (synced.append(handle), real(handle)))
    run.append({"episode": 0})
    assert len(synced) == 1


def three_lines(path):
    run = opened(path)
    for episode in range(3):
        run.append({"episode": episode, "reward": episode / 8})
    return run


DAMAGE = {
    "a digit": (
        lambda a, b, c: a + b.replace(b"0.125", b"0.225") + c,
        r"line 2 of 3: it does not ",
    ),
    "exchanged": (lambda a, b, c: b + a + c, r"line 1 of 3: it does not have the checksum"),
    "lost": (lambda a, b, c: a + c, r"line 2 of 3: it does not have the checksum"),
    "the last": (lambda a, b, c: a + b, r"line 3 of 3: it is missing; lines 1 to 2 are whole"),
    "no checksum": (
        lambda a, b, c: a[:-33] + b"}\n" + b + c,
        "line 1 of 3: it does not end",
    ),
    "endless": (
        lambda a, b, c: a + b"[" * 2**20 + b + c,
        "line 2 of 3: it has more than",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_line_is_named_with_what_is_whole(tmp_path, damage):
    run = three_lines(tmp_path)
    run.save_checkpoint("finalist-1-dqn", {"x": np.zeros(1)})
    journal = tmp_path / "journal.jsonl"
    change, message = DAMAGE[damage]
    damaged = change(*journal.read_bytes().splitlines(keepends=True))
    journal.write_bytes(damaged)
    with pytest.raises(RunError, match=message) as caught:
        opened(tmp_path).read_journal(3)
    assert "the agent after 3 episodes and 1 of its plans" in str(caught.value)
    assert "Put a copy of journal.jsonl back, or pass overwrite=True" in str(caught.value)
    assert journal.read_bytes() == damaged
    if damage == "a digit":
        assert "lines 1 and 3 are whole" in str(caught.value)


def test_another_runs_journal_and_checkpoints_are_not_taken(tmp_path):
    for name in ("one", "other"):
        run = three_lines(tmp_path / name)
        run.save_checkpoint("latest", {"x": np.zeros(1)})
    for file in ("journal.jsonl", "checkpoints/latest.npz"):
        (tmp_path / "one" / file).write_bytes((tmp_path / "other" / file).read_bytes())
    run = opened(tmp_path / "one")
    with pytest.raises(RunError, match=r"line 1 of 3.*no line is whole"):
        run.read_journal(3)
    with pytest.raises(RunError, match=r"latest.npz' cannot be read .*or is of another run"):
        run.load_checkpoint("latest")
    checkpoints = tmp_path / "other" / "checkpoints"
    (checkpoints / "latest.npz").rename(checkpoints / "agent.npz")
    with pytest.raises(RunError, match=r"agent.npz' cannot be read"):
        opened(tmp_path / "other").load_checkpoint("agent")


def test_runs_of_format_1_are_continued_in_it(tmp_path):
    run = three_lines(tmp_path)
    run.save_checkpoint("latest", {"weights:0:a": np.float32([1, 2])})
    strip_seals(tmp_path)
    again = opened(tmp_path, batch_size=32, shuffle=None)  # which it does not know
    assert again.resumed
    assert not again.sealed
    assert [entry["reward"] for entry in again.read_journal(3)] == [0.0, 0.125, 0.25]
    again.append({"episode": 3})
    again.save_checkpoint("latest", again.load_checkpoint("latest"))
    assert [entry["episode"] for entry in opened(tmp_path).read_journal(4)] == [0, 1, 2, 3]
    assert "checksum" not in (tmp_path / "journal.jsonl").read_text()
    assert list(opened(tmp_path).load_checkpoint("latest")) == ["weights:0:a"]
    with pytest.raises(FileExistsRLSparsityError, match=r"differs in shuffle \(None, now 'x'\)"):
        opened(tmp_path, shuffle="x")
    again.save_checkpoint("latest", {"weights:0:a": np.float32([1, np.nan])})
    with pytest.raises(RunError, match=r"'weights:0:a' holds 1 NaN or infinite"):
        again.load_checkpoint("latest")


# ---------------------------------------------------------------------------- checkpoints


def test_checkpoints_come_back_bit_for_bit_and_can_be_dropped(tmp_path):
    run = opened(tmp_path)
    arrays = {"a/b:0": np.float32([0.1, np.nan]), "n": np.int64(7), "flag": np.zeros((0, 3), bool)}
    run.save_checkpoint("agent", arrays)
    run.save_checkpoint("best", {"x": np.ones(1)})
    found = run.load_checkpoint("agent")
    assert set(found) == set(arrays)
    for name, value in arrays.items():
        assert found[name].dtype == value.dtype
        assert found[name].tobytes() == value.tobytes()
    run.save_checkpoint("agent", {"x": np.zeros(1)})  # replaces
    assert list(run.load_checkpoint("agent")) == ["x"]
    run.drop_checkpoints({"best"})
    assert run.load_checkpoint("agent") is None
    assert listing(tmp_path / "checkpoints") == ["best.npz"]


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "garbage", "pickle"])
def test_damaged_checkpoints(tmp_path, damage):
    run = opened(tmp_path)
    run.save_checkpoint("agent", {"x": np.arange(500)})
    path = tmp_path / "checkpoints" / "agent.npz"
    if damage == "pickle":
        np.savez(path, x=np.array([{"a": 1}], dtype=object))
    else:
        whole = path.read_bytes()
        flipped = whole[:900] + bytes([whole[900] ^ 1]) + whole[901:]
        damaged = {"cut": whole[:300], "flip": flipped, "empty": b"", "garbage": b"not a zip"}
        path.write_bytes(damaged[damage])
    with pytest.raises(RunError, match=r"checkpoint .*agent\.npz.* cannot be read.*overwrite"):
        run.load_checkpoint("agent")


def npy(shape, dtype="<f4", body=b""):
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (63 - (len(header) + 10) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + body


BOMBS = {
    "a shape of 4 TB": ({"x": npy(f"({10**12},)")}, 0, "0 bytes for"),
    "compressed": ({"x": npy("(5000000,)", body=bytes(20_000_000))}, 8, "more bytes than it has"),
    "slightly": (
        {"x": npy("(16,)", body=bytes(64))},
        8,
        "compressed or|more bytes than",
    ),
    "negative": ({"x": npy("(-2, -8)", body=bytes(64))}, 0, "bytes for the shape"),
    "no bytes each": ({"x": npy(f"({10**12},)", "<U0")}, 0, "holds nothing in the shape"),
    "records": ({"x": npy("(1,)", "|V4", bytes(4))}, 0, "of type .* where numbers and text"),
    "objects": ({"x": npy("(1,)", "|O", bytes(8))}, 0, "of type object"),
    "no array": ({"x": b"text, and no array"}, 0, "magic string is not correct"),
    "no member": ({}, 0, "does not have the checksum"),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_checkpoints_take_no_more_memory_than_their_files(tmp_path, bomb):
    run = opened(tmp_path)
    members, method, message = BOMBS[bomb]
    with zipfile.ZipFile(tmp_path / "checkpoints" / "latest.npz", "w", method) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    with pytest.raises(RunError, match=rf"latest\.npz' cannot be read \(.*{message}"):
        run.load_checkpoint("latest")


# ---------------------------------------------------------------------------- versions


def test_other_versions_are_named_and_can_be_accepted(tmp_path, monkeypatch):
    opened(tmp_path).append({"episode": 0})
    now = {**versions(), "numpy": "9.9", "cpus": "1024"}
    monkeypatch.setattr(run_directory, "versions", lambda: now)
    with pytest.raises(
        RunError, match=r"other versions: numpy \('[\d.]+', now '9.9'\), cpus \(.*,"
    ) as e:
        opened(tmp_path)
    assert "would not end in the same bits. Go back to those to continue it" in str(e.value)
    assert "pass any_versions=True to go on all the same, choose another folder" in str(e.value)
    assert opened(tmp_path, any_versions=True).read_journal(1) == [{"episode": 0}]
    assert not opened(tmp_path, overwrite=True).resumed
    assert opened(tmp_path).resumed  # begun anew with these


def test_descriptions_are_compared_place_by_place(tmp_path):
    layers = [{"class": "Dense", "config": {"units": 3, "activation": "relu"}}, {"class": "ReLU"}]
    prints = {**PRINTS, "architecture": {"layers": layers, "scale": float("nan")}}
    opened(tmp_path, prints=prints)
    assert opened(tmp_path, prints=prints).resumed
    changed = json.loads(json.dumps(prints))
    changed["architecture"]["layers"][0]["config"]["activation"] = "tanh"
    message = r"differs in architecture\.layers 1\.config\.activation \('relu', now 'tanh'\)\. Call"
    with pytest.raises(FileExistsRLSparsityError, match=message):
        opened(tmp_path, prints=changed)
    many = {**PRINTS, "architecture": {"layers": [{str(n): n} for n in range(40)]}}
    with pytest.raises(FileExistsRLSparsityError, match=r"differs in .*, now \[\{'0': 0\}"):
        opened(tmp_path, prints=many)


# ---------------------------------------------------------------------------- killed too early


def test_a_run_killed_before_it_had_a_journal_begins_again(tmp_path):
    for name in (".manifest-abcd_123.json", f".manifest-{'0a' * 8}.json", f".try-{'0a' * 8}"):
        (tmp_path / name).write_text("{")  # in the middle of its first file
    (tmp_path / ".lock").touch()
    run = opened(tmp_path)
    assert not run.resumed
    assert listing(tmp_path) == ["checkpoints", "journal.jsonl", "manifest.json"]
    (tmp_path / "journal.jsonl").unlink()
    (tmp_path / "checkpoints").rmdir()
    (tmp_path / ".model-abcd1234.keras").touch()
    again = opened(tmp_path)
    assert listing(tmp_path) == ["checkpoints", "journal.jsonl", "manifest.json"]
    assert (tmp_path / "journal.jsonl").read_text() == ""
    assert again.load_checkpoint("latest") is None
    again.begin_again()
    again.append({"episode": 0})
    assert opened(tmp_path).read_journal(1) == [{"episode": 0}]


def test_a_users_hidden_files_are_not_ours(tmp_path):
    for name in (".manifest-short.json", ".bashrc", ".notes-abcd1234.json"):
        (tmp_path / name).write_text("mine")
        with pytest.raises(FileExistsRLSparsityError, match="holds no run of this package"):
            opened(tmp_path)
        (tmp_path / name).unlink()


def test_places_of_a_run_that_hold_something_else(tmp_path):
    opened(tmp_path)
    (tmp_path / "journal.jsonl").unlink()
    (tmp_path / "journal.jsonl").mkdir()
    for overwrite in (False, True):
        with pytest.raises(RunError, match=r"journal.jsonl' is no file, as a run has there"):
            opened(tmp_path, overwrite)
    (tmp_path / "journal.jsonl").rmdir()
    (tmp_path / "checkpoints").rmdir()
    (tmp_path / "checkpoints").symlink_to("/nowhere")
    with pytest.raises(RunError, match=r"checkpoints' is no folder, as a run has there"):
        opened(tmp_path)


# ---------------------------------------------------------------------------- the lock


def test_a_second_search_in_the_folder_is_refused_at_once(tmp_path):
    path = tmp_path / "run"
    with RunDirectory(path, ARGUMENTS, PRINTS) as first:
        first.start()
        in_use = rf"in use by another search \(process {os.getpid()} on .*\)\. Wait until that has"
        for overwrite in (False, True):
            with pytest.raises(RunError, match=in_use):
                RunDirectory(path, ARGUMENTS, PRINTS, overwrite)
        for check in (check_free, check_unfinished):
            with pytest.raises(RunError, match=in_use):
                check(path)
    assert ".lock" not in listing(path)
    check_free(path)
    assert opened(path).resumed
    with pytest.raises(FileExistsRLSparsityError, match="differs in seed"):
        RunDirectory(path, {**ARGUMENTS, "seed": 1}, PRINTS)
    assert opened(path).resumed  # a refusal holds no lock


def test_two_that_begin_at_the_same_time(tmp_path):
    one, other = (RunDirectory(tmp_path / "run", ARGUMENTS, PRINTS) for _ in range(2))
    with one, other:
        one.start()
        with pytest.raises(RunError, match="in use by another search"):
            other.start()
        one.close()
        with pytest.raises(RunError, match=r"Another process has just begun to write to .*Choose"):
            other.start()


@pytest.mark.slow
def test_a_dead_processs_lock_is_taken_over(tmp_path):
    opened(tmp_path)
    child = """
import sys, time
from pathlib import Path
from rl_sparsity_tf.search.run_files import RunLock
lock = RunLock(Path(sys.argv[1]))
lock.acquire()
print("held", flush=True)
time.sleep(600)
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(rls.__file__).parents[1])}
    with subprocess.Popen(
        [sys.executable, "-c", child, str(tmp_path)], stdout=subprocess.PIPE, env=environment
    ) as process:
        try:
            assert process.stdout.readline() == b"held\n"
            with pytest.raises(
                RunError, match=rf"in use by another search \(process {process.pid} on"
            ):
                opened(tmp_path)
        finally:
            process.kill()
    assert (tmp_path / ".lock").exists()
    assert opened(tmp_path).resumed


def test_where_there_are_no_locks(tmp_path, monkeypatch, caplog):
    def none(descriptor, how):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(run_files.fcntl, "flock", none)
    opened(tmp_path)
    assert "has no locks ([Errno 95] Operation not supported): make sure that no" in caplog.text
    monkeypatch.setattr(run_files, "fcntl", None)  # Windows
    assert opened(tmp_path).resumed


def test_a_lock_writes_to_no_other_file(tmp_path):
    opened(tmp_path)
    (tmp_path / "thesis.txt").write_text("years of work")
    (tmp_path / ".lock").symlink_to("thesis.txt")
    with pytest.raises(RunError, match=r"cannot be locked \(.*: \.lock\)\. Expected a"):
        opened(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    (tmp_path / ".lock").unlink()
    os.mkfifo(tmp_path / ".lock")
    with pytest.raises(RunError, match=r"cannot be locked: \.lock is no file\. Remove it"):
        opened(tmp_path)


# ---------------------------------------------------------------------------- fingerprints


def test_fingerprints_change_with_weights_architecture_and_data():
    def model(units=3, seed=0):
        initializer = keras.initializers.GlorotUniform(seed=seed)
        dense = keras.layers.Dense(units, kernel_initializer=initializer, name="dense")
        return keras.Sequential([keras.layers.Input((4,), name="in"), dense], name="model")

    one, again, other = model(), model(), model()
    assert model_fingerprint(one) == model_fingerprint(again)
    other.layers[0].kernel.assign_add(tf.fill((4, 3), 1e-3))
    assert len({model_fingerprint(m) for m in (one, other, model(units=2))}) == 3

    x, y = tf.ones((3, 2)), tf.zeros((3,))
    prints = {
        data_fingerprint([(x, y, None)]),
        data_fingerprint([(x, y + 1, None)]),
        data_fingerprint([(x * 2, y, None)]),
        data_fingerprint([(x, y, y)]),
    }
    assert len(prints) == 4
    assert data_fingerprint([(x, y, None)]) == data_fingerprint(iter([(x, y, None)]))


def test_looking_changes_nothing_on_disk(tmp_path):
    RunDirectory(tmp_path / "run", ARGUMENTS, {})
    assert not (tmp_path / "run").exists()


def test_the_models_fingerprint_ignores_names_and_sees_weights():
    import tf_keras as keras
    from zoo import ZOO

    from rl_sparsity_tf.search.run_directory import model_fingerprint

    one = ZOO["dense"]()
    keras.layers.Dense(3)  # names count up
    other = ZOO["dense"]()
    assert [layer.name for layer in one.layers] != [layer.name for layer in other.layers]
    assert model_fingerprint(one) == model_fingerprint(other)
    weights = other.get_weights()
    weights[0][0, 0] += 1
    other.set_weights(weights)
    assert model_fingerprint(one) != model_fingerprint(other)
