"""The run directory: whose folder it is, what is in the journal, and files that are never torn."""

import json
import os
import stat

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras

import rl_sparsity_tf as rls
from rl_sparsity_tf.errors import FileExistsRLSparsityError, RunError
from rl_sparsity_tf.files import check_new_file, replacing, sha256_of, write_text
from rl_sparsity_tf.run_directory import (
    RESULT_FILES,
    RunDirectory,
    check_directory,
    data_fingerprint,
    model_fingerprint,
    versions,
)

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
def test_a_journal_that_lacks_what_the_checkpoint_needs(tmp_path, text):
    run = opened(tmp_path)
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

    from rl_sparsity_tf.run_directory import model_fingerprint

    one = ZOO["dense"]()
    keras.layers.Dense(3)  # names count up
    other = ZOO["dense"]()
    assert [layer.name for layer in one.layers] != [layer.name for layer in other.layers]
    assert model_fingerprint(one) == model_fingerprint(other)
    weights = other.get_weights()
    weights[0][0, 0] += 1
    other.set_weights(weights)
    assert model_fingerprint(one) != model_fingerprint(other)
