"""What a search has paid for is not lost with a file that fails."""

from __future__ import annotations

import dataclasses
import json
import logging
from types import SimpleNamespace

import numpy as np
import pytest
import tf_keras as keras
from tiny_search import TEST, compressor, quick_search, search, trained

import rl_sparsity_tf as rls
from rl_sparsity_tf import cli
from rl_sparsity_tf.console import SearchProgress
from rl_sparsity_tf.data.metrics import Metric, Score
from rl_sparsity_tf.errors import ExportError, VerificationError
from rl_sparsity_tf.export import export
from rl_sparsity_tf.export.saved_model import own_moves
from rl_sparsity_tf.export.verification import Tolerance, compare_outputs
from rl_sparsity_tf.search import early_files, final, finishing
from rl_sparsity_tf.search.comparison import comparison_table
from rl_sparsity_tf.search.early_files import dense_files
from rl_sparsity_tf.search.finishing import Exported
from rl_sparsity_tf.search.loop import SearchLoop

layers = keras.layers


@pytest.fixture(scope="module", autouse=True)
def _quick():
    with quick_search():
        yield


def failing(*modes):
    """Exports that fail in some modes."""
    real = finishing.export_tflite

    def fails(model, path, quantization, **options):
        if quantization in modes:
            raise VerificationError(f"{quantization} differs from Keras by a lot.")
        return real(model, path, quantization, **options)

    return fails


def searched(monkeypatch, *modes, **options):
    """A search whose dense files are fine, and whose own fail in some modes."""
    real = early_files.dense_files

    def then_failing(*arguments):
        found = real(*arguments)
        monkeypatch.setattr(finishing, "export_tflite", failing(*modes))
        return found

    monkeypatch.setattr("rl_sparsity_tf.search.compressor.dense_files", then_failing)
    return search(compressor(trained()), finetune_epochs=0, test_data=TEST, **options)


@pytest.mark.slow
def test_a_safer_storage_takes_the_place_of_a_file_that_fails(monkeypatch, caplog, tmp_path):
    with caplog.at_level(logging.WARNING):
        result = searched(monkeypatch, "plan")
    assert result.report.quantization == "none"
    (warning,) = result.metrics["warnings"]
    assert warning.startswith("the .tflite file is stored as 'none', because it failed as 'plan'")
    assert "differs from Keras by a lot" in warning
    assert warning in result.report.notes
    assert warning in caplog.text
    lines = []
    result.summary(lines.append)
    assert f"warning: {warning}" in lines
    assert not any(line.startswith("note: the .tflite file is stored") for line in lines)
    assert result.export_tflite(tmp_path / "m.tflite").quantization == "none"


@pytest.mark.slow
def test_without_any_file_the_rest_is_returned_and_saved(monkeypatch, tmp_path):
    result = searched(monkeypatch, "plan", "none")
    assert result.report is None
    (warning,) = result.metrics["warnings"]
    assert warning.startswith("there is no .tflite file, because it failed as 'plan'")
    compressed = result.metrics["compressed"]
    assert compressed["metric"] is not None
    assert compressed["tflite_metric"] is compressed["tflite_bytes"] is None
    assert result.model.predict(TEST[0], verbose=0).shape == (50, 3)
    lines = []
    result.summary(lines.append)
    comparison_table(result.metrics, lines.append)
    assert any("no file" in line for line in lines)
    (tmp_path / "run").mkdir()
    for name in ("model.tflite", "model.recipe.json"):
        (tmp_path / "run" / name).write_text("of an earlier run")
    result.save(tmp_path / "run", overwrite=True)
    written = {path.name for path in (tmp_path / "run").iterdir()}
    figures = {"plan.json", "metrics.json", "history.csv", "details.json", "report.html"}
    assert written == {"model.keras"} | figures
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["format_version"] == 1
    assert metrics["warnings"] == [warning]
    monkeypatch.undo()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rl_sparsity_tf.search.result.export_tflite", failing("plan"))
        with pytest.raises(VerificationError, match="plan differs from Keras"):
            result.export_tflite(tmp_path / "m.tflite")


def test_the_command_without_a_file_exits_with_3(monkeypatch, capsys):
    kept = {"warnings": ["an early one", "there is no .tflite file, because it failed"]}
    result = SimpleNamespace(report=None, metrics=kept)
    monkeypatch.setattr("rl_sparsity_tf.demo.run_demo", lambda *_, **__: result)
    assert cli.main(["demo"]) == cli.NO_FILE == 3
    said = capsys.readouterr().err
    assert said == "rl-sparsity demo: there is no .tflite file, because it failed\n"
    made = SimpleNamespace(report="made", metrics=kept)
    monkeypatch.setattr("rl_sparsity_tf.demo.run_demo", lambda *_, **__: made)
    assert cli.main(["demo"]) == 0


@dataclasses.dataclass(frozen=True)
class Ended:
    """What is looked at of a finished model."""

    validation: Score
    exported: Exported
    candidate: object = None
    warnings: tuple = ()


@pytest.mark.parametrize(
    ("kinds", "places", "best"),
    [
        ("sound floats none", 3, 0),
        ("floats none sound", 3, 2),
        ("none floats", 2, 1),
        ("none none", 2, 0),
        ("none sound sound", 1, 1),
        # One more than there are places is finished, not all of them.
        ("floats none sound", 1, 0),
    ],
)
def test_the_next_finalist_takes_the_place_of_one_whose_file_failed(
    kinds, places, best, monkeypatch
):
    report = SimpleNamespace()
    files = {
        "sound": Exported(content=b"", report=report, test=None),
        "floats": Exported(content=b"", report=report, test=None, failure="in floats"),
        "none": Exported(content=None, report=None, test=None, failure="no file"),
    }
    kinds = kinds.split()
    ended = iter([Ended(Score(0.9 - n / 10, 1.0), files[kind]) for n, kind in enumerate(kinds)])
    monkeypatch.setattr(final, "finish_candidate", lambda *_: next(ended))
    data = [((np.zeros((10_000, 1)),), None)]
    figures = SimpleNamespace(metric=Metric("accuracy", True), validation=data)
    plans = [SimpleNamespace(found_by=str(n), plan=n) for n in range(len(kinds))]
    decisions = SimpleNamespace(group="element")
    network = SimpleNamespace(dense=Score(0.0, 1.0), decisions=decisions)
    training = SimpleNamespace(epochs=0)  # so that there are no heats
    task = SimpleNamespace(figures=figures, model=object(), network=network, training=training)
    progress = SearchProgress(1, "accuracy", 0)
    _, found = final.play_final(task, plans, [], progress, places=places, seed=0)
    assert found is plans[best]


# -- before the search ---------------------------------------------------------------------------


def never(*_, **__):
    raise AssertionError("work was begun")


def test_a_dense_file_that_fails_is_told_before_the_search(monkeypatch):
    monkeypatch.setattr(early_files, "export_and_score", never_verified)
    monkeypatch.setattr(SearchLoop, "run", never)
    with pytest.raises(VerificationError, match="No search was begun, because the file of model"):
        search(compressor(trained()))


def never_verified(*_, **__):
    raise VerificationError("it differs.")


def test_of_the_dense_files_in_integers_a_warning_is_enough(monkeypatch):
    sound = Exported(content=b"", report=None, test=None)

    def exported(model, plan, figures, quantization):
        return sound if quantization == "none" else never_verified()

    monkeypatch.setattr(early_files, "export_and_score", exported)
    monkeypatch.setattr(early_files, "export_dense_int8", never_verified)
    model = SimpleNamespace(name="m")
    dense, dense_int8, warnings = dense_files(model, None, "int8")
    assert dense is sound
    assert dense_int8.report is None
    assert [warning.split(" fails")[0] for warning in warnings] == [
        "the dense model's int8 file",
        "the dense model's file as 'int8'",
    ]


@pytest.mark.slow
def test_the_file_of_an_early_plan_is_tried_where_a_search_takes_long(monkeypatch):
    tried = []

    def fails(model, plan, figures, quantization, formats):
        tried.append((quantization, formats, figures.test))
        raise ExportError("The converter died.")

    monkeypatch.setattr(early_files, "LONG_SEARCH", 72)
    real = early_files.dense_files

    def then_failing(*arguments):
        found = real(*arguments)
        monkeypatch.setattr(early_files, "export_and_score", fails)
        return found

    monkeypatch.setattr("rl_sparsity_tf.search.compressor.dense_files", then_failing)
    result = search(compressor(trained()), finetune_epochs=0, episodes=1, test_data=TEST)
    assert tried == [("plan", "dense", None)]
    (warning,) = result.metrics["warnings"]
    assert warning.startswith("the file of an early plan (")
    assert warning.endswith("stored otherwise: The converter died.")
    assert result.report is not None
    task = SimpleNamespace(network=SimpleNamespace(decisions=None), model=trained())
    monkeypatch.setattr(early_files, "LONG_SEARCH", 73)
    early_files.check_early(task, [], SearchProgress(1, "accuracy", 0), None)  # not looked at


# -- models that move by themselves --------------------------------------------------------------


def test_how_far_a_model_moves_by_itself():
    inputs = layers.Input((2,))
    model = keras.Model(inputs, layers.Dense(1, use_bias=False)(inputs))
    x = np.ones((5, 2), np.float32)
    for weights, low, high in (([[3e6], [-3e6]], 0.1, 2.0), ([[1.0], [1.0]], 1e-7, 1e-5)):
        model.set_weights([np.float32(weights)])
        (moved,) = own_moves(model, [x], [model(x).numpy()], None)
        assert low < moved < high
        np.testing.assert_array_equal(model.get_weights()[0], np.float32(weights))


def test_a_file_may_differ_by_what_the_model_moves_by_itself():
    wanted = np.linspace(0, 1, 20, dtype=np.float32).reshape(10, 2)
    strict = Tolerance(difference=1e-3, top1=0.9)
    sensitive = dataclasses.replace(strict, moves=(0.02,))
    chaotic = dataclasses.replace(strict, moves=(float("inf"),))
    compare_outputs([wanted + np.float32(0.08)], [wanted], sensitive, "here")
    compare_outputs([wanted + np.float32(0.25)], [wanted], chaotic, "here")
    for tolerance, off in ((strict, 0.08), (sensitive, 0.09), (chaotic, 0.26)):
        with pytest.raises(VerificationError, match="differs from Keras"):
            compare_outputs([wanted + np.float32(off)], [wanted], tolerance, "here")


def test_the_note_on_a_sensitive_model(monkeypatch, tmp_path):
    """Cancels large numbers: what is left depends on the order of the sum."""
    rng = np.random.default_rng(0)
    inputs = layers.Input((64,))
    model = keras.Model(inputs, layers.Dense(3, use_bias=False)(inputs))
    model.set_weights([(1e4 * rng.normal(size=(64, 3))).astype(np.float32)])
    x = rng.normal(size=(16, 64)).astype(np.float32)
    exact = Tolerance(difference=1e-9, top1=0.9)
    monkeypatch.setattr(export, "tolerance_for", lambda *_: exact)
    report = rls.export_tflite(model, tmp_path / "m.tflite", "none", representative_data=x)
    assert any("the model is sensitive: changing its weights" in note for note in report.notes)
    with pytest.raises(VerificationError, match="differs from Keras"):
        rls.export_tflite(
            model, tmp_path / "n.tflite", "none", representative_data=x, tolerance=1e-9
        )
