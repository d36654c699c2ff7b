"""A run's folder is read as plain values, whatever is in it."""

import json
import os

import pytest
from made_runs import HISTORY, METRICS, made_run, write_run

from rl_sparsity_tf.errors import ArgumentError, FileError, RunError
from rl_sparsity_tf.report import reading
from rl_sparsity_tf.report.reading import read_run


def test_what_was_written_is_read(tmp_path):
    found = read_run(write_run(tmp_path / "run", made_run()))
    assert found == made_run()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1, 1.0),
        (0.5, 0.5),
        (True, None),
        ("1", None),
        (None, None),
        (float("nan"), None),
        (float("inf"), None),
        (10**30, None),
        (-1e16, None),
        ([1], None),
    ],
)
def test_only_finite_numbers_of_sensible_size_are_numbers(value, expected):
    assert reading.number(value) == expected


def test_what_counts_is_whole_and_not_below_zero():
    assert [reading.whole(v) for v in (3, 3.0, 3.5, -1, "3")] == [3, 3, None, None, None]


def test_texts_only_stand_there():
    assert reading.text("a\x1b[2J\u202e\ud800") == "a\\x1b[2J\\u202e\\ud800"
    assert reading.text("x" * 10, 4) == "xxxx..."
    assert reading.text(3) is None
    assert reading.texts(["a", 3, None, "b"]) == ["a", "b"]


def test_mappings_lists_and_numbers_of_other_types_are_empty():
    assert reading.fields([1]) == {} == reading.fields("x")
    assert reading.fields({1: 2, "a": 3}) == {"a": 3}
    assert reading.entries([{"a": 1}, 3, []]) == [{"a": 1}]
    assert reading.entries({"a": 1}) == []
    assert reading.numbers([1, 2.5]) == [1.0, 2.5]
    assert reading.numbers([1, "2"]) is None is reading.numbers(3)


def test_a_torn_journal_is_read_up_to_the_tear(tmp_path):
    folder = write_run(tmp_path / "run", made_run())
    with open(folder / "journal.jsonl", "a") as file:
        file.write('{"episode": 3, "rew')
    assert read_run(folder)["history"] == HISTORY


def test_without_a_journal_the_table_is_read(tmp_path):
    folder = write_run(tmp_path / "run", made_run(history=[]))
    (folder / "history.csv").write_text("episode,reward,proposed_by,improved\n0,0.5,dqn,True\n")
    row = {"episode": 0.0, "reward": 0.5, "proposed_by": "dqn", "improved": True}
    assert read_run(folder)["history"] == [row]


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe", b'"x"', b"[" * 100_000])
def test_a_damaged_document_is_left_out_with_a_reason(tmp_path, content):
    folder = write_run(tmp_path / "run", made_run())
    (folder / "plan.json").write_bytes(content)
    found = read_run(folder)
    assert found["plan"] is None
    assert list(found["problems"]) == ["plan.json"]
    assert found["metrics"] == METRICS


@pytest.mark.parametrize("content", ["{", "[]"])
def test_damaged_figures_are_an_error(tmp_path, content):
    folder = write_run(tmp_path / "run", made_run())
    (folder / "metrics.json").write_text(content)
    with pytest.raises(RunError, match=r"metrics\.json in .* cannot be used .*Put a copy"):
        read_run(folder)


def test_an_endless_document_is_left_out(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "run", made_run())
    monkeypatch.setattr(reading, "_LARGEST_FILE", 5_000)
    (folder / "plan.json").write_text(json.dumps({"kernels": ["x" * 5_000]}))
    assert "more than 5,000 bytes" in read_run(folder)["problems"]["plan.json"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_a_pipe_is_not_waited_for(tmp_path):
    folder = write_run(tmp_path / "run", made_run())
    (folder / "plan.json").unlink()
    os.mkfifo(folder / "plan.json")
    assert "no regular file" in read_run(folder)["problems"]["plan.json"]
    (folder / "channels.json").mkdir()
    assert "no regular file" in read_run(folder)["problems"]["channels.json"]


def test_a_file_that_may_not_be_read_is_an_error(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "run", made_run())

    def refused(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refused)
    with pytest.raises(FileError, match=r"cannot be read .*Give a folder whose files this user"):
        read_run(folder)


def test_numbers_that_are_none_are_taken_for_missing(tmp_path):
    folder = write_run(tmp_path / "run", made_run())
    (folder / "details.json").write_text('{"a": NaN, "b": Infinity, "c": 1' + "0" * 40 + "}")
    assert read_run(folder)["details"] == {"a": None, "b": None, "c": None}


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(RunError, match=r"is no folder. Expected the folder of a run"):
        read_run(tmp_path / "missing")
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(RunError, match=r"holds no run: it has no metrics\.json and no"):
        read_run(tmp_path)
    with pytest.raises(ArgumentError, match="directory=3"):
        read_run(3)
