"""Times of .tflite files: their structure, and when they are withheld."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tf_keras as keras
from tflite_files import QUANTIZED, SPARSE, convert, pack, tables, with_zeros

from rl_sparsity_tf.cli import main
from rl_sparsity_tf.errors import ArgumentError, ExportError
from rl_sparsity_tf.tflite import worker_process as child
from rl_sparsity_tf.tflite.timing import FileTiming, Timing, benchmark_tflite
from rl_sparsity_tf.tflite.worker import ConversionWorker, WorkerError

layers = keras.layers


def dense_model(inputs=64, **settings):
    shape = settings or {"shape": (inputs,)}
    return keras.Sequential([layers.Input(**shape), layers.Dense(32), layers.Dense(4)])


def timing(first, second=None) -> Timing:
    return Timing(
        file=FileTiming(path="a.tflite", samples_ms=tuple(first)),
        against=None if second is None else FileTiming(path="b.tflite", samples_ms=tuple(second)),
        threads=2,
        xnnpack=False,
        batch_size=3,
    )


STEADY = [2.0, 2.0, 2.05, 1.95, 2.0]
UNSTEADY = [4.0, 3.0, 5.0, 4.5, 3.5]  # quartiles 3.5 and 4.5


def injected(monkeypatch, *samples):
    asked = []

    def time(self, paths, **settings):
        asked.append((list(paths), settings))
        return [[value / 1e3 for value in values] for values in samples]

    monkeypatch.setattr(ConversionWorker, "time", time)
    return asked


def test_medians_spreads_and_their_ratio():
    result = timing(STEADY, [4.0, 4.0, 4.0, 4.1, 3.9])
    assert result.file.median_ms == 2.0
    assert result.ratio == 0.5
    assert result.spread == 0.0
    wide = timing([1.0, 1.05, 1.1, 1.0, 1.05])
    assert wide.spread == pytest.approx(0.05 / 1.05)
    assert wide.ratio is None
    assert wide.to_dict()["against"] is None


def test_a_spread_above_ten_percent_is_not_measured():
    result = timing(STEADY, UNSTEADY)
    assert result.against.spread == 0.25
    assert result.against.median_ms is None
    assert result.ratio is None
    values = json.loads(json.dumps(result.to_dict()))
    assert values["ratio"] is None
    assert values["against"] == {"path": "b.tflite", "median_ms": None, "spread": 0.25}
    assert values["file"]["median_ms"] == 2.0
    assert timing(UNSTEADY, STEADY).ratio is None


def test_exactly_ten_percent_still_counts():
    samples = [9.5, 9.5, 10.0, 10.5, 10.5]
    assert timing(samples).spread == pytest.approx(0.1)
    assert timing(np.multiply(samples, [1, 1, 1, 1.01, 1.01])).file.median_ms is None


def test_the_table_withholds_what_was_not_measured():
    lines: list[str] = []
    timing(STEADY, UNSTEADY).summary(lines.append)
    assert lines == [
        "a.tflite                2 ms (spread 0%)",
        "b.tflite                not measured (spread 25%)",
        "ratio (first / second)  not measured (spread 25%)",
        "Medians of 5 runs, interleaved; 2 threads, XNNPACK off, batch size 3",
        "Spread: interquartile range / median. Above 10 % nothing counts as measured.",
        "Repeat it on a machine that does nothing else.",
    ]
    lines.clear()
    timing(STEADY, [4.0] * 5).summary(lines.append)
    assert lines[2] == "ratio (first / second)  0.5 x (spread 0%)"
    assert len(lines) == 5


def test_the_command_passes_its_options_on(tmp_path, monkeypatch, capsys):
    path = str(convert(dense_model(), tmp_path / "a.tflite"))
    asked = injected(monkeypatch, STEADY, UNSTEADY)
    options = ["--runs", "7", "--threads", "2", "--no-xnnpack", "--batch-size", "3", "--json"]
    assert main(["benchmark", path, "--against", path, *options]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["ratio"] is None
    assert printed["spread"] == 0.25
    assert (printed["threads"], printed["xnnpack"], printed["batch_size"]) == (2, False, 3)
    ((paths, settings),) = asked
    assert paths == [path, path]
    assert (settings["runs"], settings["batch_size"], settings["xnnpack"]) == (7, 3, False)
    injected(monkeypatch, STEADY)
    assert main(["benchmark", path]) == 0
    assert "2 ms (spread 0%)" in capsys.readouterr().out


def test_two_files_are_run_in_turns(tmp_path):
    model = with_zeros(dense_model(), 0.5)
    first = convert(model, tmp_path / "a.tflite")
    second = convert(model, tmp_path / "b.tflite", QUANTIZED, integer=True)
    result = benchmark_tflite(first, second, runs=5, batch_size=2)
    assert result.runs == 5
    assert result.against is not None
    for times in (result.file, result.against):
        assert len(times.samples_ms) == 5
        assert min(times.samples_ms) > 0
    assert result.batch_size == 2


def test_runs_of_two_files_alternate(monkeypatch):
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    monkeypatch.setattr(child, "_prepared", lambda path, *rest: calls[path])
    monkeypatch.setattr(child, "_warmed_up", lambda call: 2)
    result = child.time_files(["a", "b"], [2, 2], 3, 1, True, 1)
    assert "".join(order) == "aabb" * 3
    assert [len(samples) for samples in result["seconds"]] == [3, 3]


@pytest.mark.parametrize(
    ("dtype", "scale", "low", "high"),
    [("int8", 0.5, -128, 127), ("uint8", 0.0, 0, 255), ("int32", 0.0, 0, 6), ("bool", 0.0, 0, 1)],
)
def test_inputs_are_random_in_their_type(dtype, scale, low, high):
    details = {"dtype": np.dtype(dtype), "shape": [50, 40], "quantization": (scale, 0), "name": "x"}
    values = child._random_input(details, 7, np.random.default_rng(0))
    assert values.dtype == dtype
    assert (values.min(), values.max()) == (low, high)
    floats = child._random_input(details | {"dtype": np.float32}, 7, np.random.default_rng(0))
    assert floats.std() == pytest.approx(1, abs=0.1)
    with pytest.raises(ValueError, match=r"no random inputs of type \S+ \(x\)"):
        child._random_input(details | {"dtype": np.dtype("O")}, 7, np.random.default_rng(0))


def test_indices_stay_inside_the_tables(tmp_path, monkeypatch):
    model = keras.Sequential([layers.Input((5,)), layers.Embedding(3, 8), layers.Dense(2)])
    path = convert(model, tmp_path / "m.tflite")
    asked = injected(monkeypatch, STEADY)
    benchmark_tflite(path)
    benchmark_tflite(convert(dense_model(), tmp_path / "d.tflite"))
    assert [settings["index_limits"] for _, settings in asked] == [[3], [2]]


def test_the_batch_size_is_what_the_files_fix(tmp_path, monkeypatch):
    fixed = convert(dense_model(batch_shape=(4, 64)), tmp_path / "four.tflite")
    other = convert(dense_model(batch_shape=(2, 64)), tmp_path / "two.tflite")
    free = convert(dense_model(), tmp_path / "free.tflite")
    injected(monkeypatch, STEADY, STEADY)
    assert benchmark_tflite(free, fixed).batch_size == 4
    assert benchmark_tflite(free, free).batch_size == 1
    assert benchmark_tflite(fixed, free, batch_size=4).batch_size == 4
    with pytest.raises(ArgumentError, match=r"two\.tflite: 2\)\. Expected one size for all"):
        benchmark_tflite(fixed, other)
    with pytest.raises(ArgumentError, match=r"four\.tflite: 4\), batch_size=8 was asked for"):
        benchmark_tflite(fixed, batch_size=8)


@pytest.mark.parametrize("wrong", [{"runs": 4}, {"threads": 0}, {"batch_size": True}])
def test_counts_are_checked(wrong):
    (name,) = wrong
    with pytest.raises(ArgumentError, match=rf"{name}=\w+ cannot be used\. Expected an integer >="):
        benchmark_tflite("m.tflite", **wrong)


def test_missing_foreign_and_failing_files_are_our_errors_in_one_line(tmp_path, capsys):
    path = tmp_path / "m.tflite"
    with pytest.raises(ArgumentError, match="There is no file"):
        benchmark_tflite(path)
    path.write_bytes(b"something else")
    assert main(["benchmark", str(path)]) == 2
    model = with_zeros(dense_model(), 0.5)
    convert(model, path, SPARSE, QUANTIZED)
    with pytest.raises(ExportError, match=r"cannot run a file with XNNPACK: .*m\.tflite: "):
        benchmark_tflite(path, runs=5)
    broken = tables(path)
    broken.subgraphs[0].operators[-1].inputs = [0]
    pack(broken, path)
    assert main(["benchmark", str(path), "--no-xnnpack"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert all(line.startswith("rl-sparsity benchmark: ") for line in said)
    assert "Time it with XNNPACK, or export the model again" in said[1]


def test_the_death_of_the_process_is_passed_on(tmp_path, monkeypatch):
    path = convert(dense_model(), tmp_path / "m.tflite")

    def die(self, paths, **settings):
        raise WorkerError("The conversion process ended unexpectedly", "died", "")

    monkeypatch.setattr(ConversionWorker, "time", die)
    with pytest.raises(WorkerError, match="ended unexpectedly"):
        benchmark_tflite(path)
