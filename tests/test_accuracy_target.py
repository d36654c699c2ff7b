"""Targets of accuracy: the smallest file that loses no more than is allowed."""

import dataclasses
import json
import math
import types

import numpy as np
import pytest
import tf_keras as keras
from tiny_search import compressor, quick_autoencoder, search

import rl_sparsity_tf as rls
from rl_sparsity_tf import accuracy_target
from rl_sparsity_tf.accuracy_target import AccuracyTarget, Attempt, drop_of
from rl_sparsity_tf.cli import build_parser
from rl_sparsity_tf.cli_targets import target_of
from rl_sparsity_tf.objective import Metric, Score
from rl_sparsity_tf.operations import Operation

L = keras.layers
ACCURACY, LOSS = Metric("accuracy", True), Metric("loss", False)


@pytest.fixture(scope="module", autouse=True)
def _quick():
    with quick_autoencoder():
        yield


def rows(count, seed):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 3, count)
    x = rng.normal(size=(count, 60)).astype(np.float32)
    x[np.arange(count), y] += 3
    return x, y


TRAIN, VALIDATION = rows(1024, 0), rows(200, 1)
DROP = 0.06


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(3)
    layers = [L.Input((60,)), L.Dense(64, activation="relu"), L.Dense(3, activation="softmax")]
    model = keras.Sequential(layers, name="accurate")
    model.compile("adam", "sparse_categorical_crossentropy", ["accuracy"])
    model.fit(*TRAIN, epochs=6, verbose=0)
    return model


def run(model, drop, **options):
    given = {"episodes": 2, "finetune_epochs": 2, "train": TRAIN, "validation_data": VALIDATION}
    searched = {key: options.pop(key) for key in list(options) if key in (*given, "quantization")}
    one = compressor(
        model,
        "random",
        target=rls.Target(max_accuracy_drop=drop),
        recovery="least_squares",
        buckets=4,
        **options,
    )
    return one, search(one, **given | searched)


# ------------------------------------------------------------------------------ what a drop is


@pytest.mark.parametrize(
    ("metric", "dense", "value", "drop"),
    [
        (ACCURACY, 0.5, 0.45, 0.05),
        (ACCURACY, 0.5, 0.6, -0.1),
        (LOSS, 0.5, 0.6, 0.2),
        (LOSS, 0.5, 0.4, -0.2),
        (Metric("r2", True), 0.5, 0.4, 0.2),
        (Metric("likelihood", True), -2.0, -2.5, 0.25),
        (LOSS, 0.0, 0.0, 0.0),
        (LOSS, 0.0, 0.1, math.inf),
        (LOSS, 0.5, math.nan, math.inf),
    ],
)
def test_accuracies_are_compared_by_difference_and_others_by_share(metric, dense, value, drop):
    assert drop_of(metric, dense, value) == pytest.approx(drop)


# ------------------------------------------------------------------------------ the whole way


@pytest.fixture(scope="module")
def done(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("accuracy") / "run"
    return (*run(model, DROP, directory=folder), folder)


def test_the_file_holds_the_drop_on_all_validation_data(model, done):
    _, result, folder = done
    figures = json.loads((folder / "metrics.json").read_text())
    dense = model.evaluate(*VALIDATION, verbose=0)[1]
    ours = result.model.evaluate(*VALIDATION, verbose=0)[1]
    assert dense - ours <= DROP + 1e-6
    said = figures["accuracy_target"]
    assert said["validation_drop"] == pytest.approx(dense - ours, abs=1e-6)
    assert said["dense_validation_metric"] == pytest.approx(dense)
    assert (said["max_accuracy_drop"], said["relative"]) == (DROP, False)
    assert figures["compressed"]["tflite_bytes"] == (folder / "model.tflite").stat().st_size


def test_it_is_the_smallest_that_held(done):
    _, result, _ = done
    said = result.metrics["accuracy_target"]
    holding = [one["tflite_bytes"] for one in said["attempts"] if one["holds"]]
    assert result.metrics["compressed"]["tflite_bytes"] == min(holding)
    assert min(holding) < 0.9 * result.metrics["dense_int8"]["tflite_bytes"]
    # What was tried and is smaller has failed.
    for one in said["attempts"]:
        assert one["holds"] == (one["validation_drop"] <= DROP + 1e-6)
    assert 2 <= len(said["attempts"]) <= 7


def test_contenders_are_held_to_the_size_that_was_reached(done):
    one, result, _ = done
    assert one.last.target == rls.Target(tflite_bytes=result.report.tflite_bytes)
    assert result.formats == "raw"


def test_a_larger_drop_is_a_smaller_file(model, done):
    _, loose = run(model, 0.25)
    tight = done[1]
    sizes = [one.metrics["compressed"]["tflite_bytes"] for one in (loose, tight)]
    assert sizes[0] < sizes[1]
    guesses = [one.metrics["accuracy_target"]["searched_tflite_bytes"] for one in (loose, tight)]
    assert guesses[0] <= guesses[1]


def test_blocks_and_losses_can_be_held(model):
    _, result = run(model, 0.3, group="block4", metric="loss")
    said = result.metrics["accuracy_target"]
    assert said["relative"]
    assert result.metrics["metric"] == {"name": "loss", "higher_is_better": False}
    reached = result.metrics["compressed"]["validation_metric"]
    assert reached <= 1.3 * said["dense_validation_metric"] + 1e-6


# ------------------------------------------------------------------------------ which sizes


class Scripted(AccuracyTarget):
    """Fine-tunings that hold from a size on."""

    def __init__(self, size, least, smallest=1000.0, largest=50_000.0):
        self._drop, self._dense, self._relative = 0.01, 0.9, False
        self._smallest, self._largest = smallest, largest
        self._attempts = []
        self.size = rls.Target(tflite_bytes=size)
        self._least = least

    def _resized(self, best, size):
        return size


@dataclasses.dataclass
class FakeFinished:
    validation: Score
    tflite_bytes: int

    @property
    def exported(self):
        return self

    @property
    def report(self):
        return self


def attempts_of(scripted, monkeypatch):
    """Sizes that are tried, and the one that is returned."""

    def finish(_, size, *__, **___):
        accuracy = 0.9 if size >= scripted._least else 0.88
        return FakeFinished(Score(accuracy, 0.0), int(size))

    monkeypatch.setattr(accuracy_target, "finish", finish)
    monkeypatch.setattr(accuracy_target, "score_model", lambda *_: Score(0.9, 0.0))

    @dataclasses.dataclass
    class FakeTask:
        target: rls.Target = scripted.size
        figures: object = None
        model: object = None
        training: object = None
        quantization: str = "plan"

    figures = types.SimpleNamespace(metric=ACCURACY, validation=[])
    task, held = scripted.finish(FakeTask(figures=figures), scripted.size.value, 0, lambda _: None)
    assert task.target.value == held.tflite_bytes
    return [one.tflite_bytes for one in scripted._attempts], held.tflite_bytes


@pytest.mark.parametrize(
    ("start", "least"), [(10_000, 12_000), (10_000, 7_000), (10_000, 9_900), (4_000, 12_000)]
)
def test_sizes_close_in_on_the_smallest_that_holds(start, least, monkeypatch):
    tried, found = attempts_of(Scripted(start, least), monkeypatch)
    assert tried[0] == start
    assert least <= found <= 1.3 * least
    assert len(tried) <= 7
    assert len(set(tried)) == len(tried)


def test_no_size_is_below_the_smallest_possible(monkeypatch):
    tried, found = attempts_of(Scripted(1100, 0), monkeypatch)
    assert min(tried) >= 1000
    assert found == min(tried)


def test_at_last_nothing_is_pruned(monkeypatch):
    tried, found = attempts_of(Scripted(2000, 50_000), monkeypatch)
    assert found == 50_000 == tried[-1]


def test_a_drop_that_nothing_holds_is_said(monkeypatch):
    with pytest.raises(rls.TargetError) as caught:
        attempts_of(Scripted(2000, 60_000), monkeypatch)
    assert str(caught.value) == (
        "Target(max_accuracy_drop=0.01) was missed: with every kernel stored as integers and "
        "nothing pruned, accuracy on the validation data was worse by 0.02 than the dense model's "
        "0.9000. Expected a larger drop, or more fine-tuning (finetune_epochs)."
    )


def test_the_loosest_size_prunes_nothing(done):
    one, _, _ = done
    network = one.last.network
    accuracy = AccuracyTarget.of(one.target, lambda target: network_for(one, target), 4)
    candidate = accuracy._resized(one.last.result.candidate, accuracy._largest)
    for entry in candidate.plan.kernels.values():
        assert (entry.operations != Operation.PRUNE).all()
    half = accuracy._resized(one.last.result.candidate, accuracy._largest / 2)
    kept = one.last.result.candidate.plan.kernels
    pruned = {path: entry.sparsity for path, entry in half.plan.kernels.items()}
    assert all(0 < share < 1 for share in pruned.values())
    # In proportion to the densities found: what was sparser stays sparser.
    order = sorted(kept, key=lambda path: kept[path].sparsity)
    assert sorted(pruned, key=pruned.get) == order
    assert network.target.kind == "tflite_bytes"


def network_for(one, target):
    from rl_sparsity_tf.network import CompressedNetwork

    last = one.last
    return CompressedNetwork(
        last.model, last.figures.train, last.figures.validation, target=target, group=one.group
    )


# ------------------------------------------------------------------------------ wrong calls


@pytest.mark.parametrize("value", [-0.01, 1, 1.5, float("nan"), "0.01", True, None])
def test_a_drop_is_a_share(value):
    pattern = rf"Target\(max_accuracy_drop={value!r}\) cannot be met\. Expected a number of at lea"
    if value is None:
        pattern = r"Target\(\) names no goals\. .*or Target\(max_accuracy_drop=0\.01\)"
    with pytest.raises(rls.ArgumentError, match=pattern):
        rls.Target(max_accuracy_drop=value)


def test_a_drop_is_a_target_like_others():
    assert rls.Target(max_accuracy_drop=0).to_dict() == {"max_accuracy_drop": 0.0}
    assert rls.Target(max_accuracy_drop=np.float32(0.5)).kind == "max_accuracy_drop"
    with pytest.raises(rls.ArgumentError, match="names 2 goals"):
        rls.Target(max_accuracy_drop=0.01, sparsity=0.5)


def test_other_quantizations_do_not_go_with_it(model):
    with pytest.raises(rls.ArgumentError, match=r"quantization='int8' does not go with a target"):
        run(model, 0.01, quantization="int8")


def test_whole_channels_are_refused(model):
    with pytest.raises(
        rls.ArgumentError,
        match=r"max_accuracy_drop=0\.01\) does not go with group='channel'\. Expected .*'block16'",
    ):
        run(model, 0.01, group="channel")


def test_an_attempt_is_json():
    one = Attempt(tflite_bytes=1, validation_metric=0.5, validation_drop=0.1, holds=False)
    assert json.loads(json.dumps(dataclasses.asdict(one)))["holds"] is False


# ------------------------------------------------------------------------------ command line

BASE = ["compress", "m.keras", "--data", "d.npz", "--output", "o"]


@pytest.mark.parametrize(
    ("given", "target"),
    [
        ([], rls.Target(sparsity=0.9)),
        (["--target-sparsity", "0.5"], rls.Target(sparsity=0.5)),
        (["--target-bytes", "5000"], rls.Target(tflite_bytes=5000)),
        (["--target-gzip-bytes", "5000"], rls.Target(gzip_bytes=5000)),
        (["--target-macs", "0.5"], rls.Target(macs=0.5)),
        (["--target-latency", "0.5"], rls.Target(latency=0.5)),
        (["--max-accuracy-drop", "0.01"], rls.Target(max_accuracy_drop=0.01)),
    ],
)
def test_every_target_has_an_option(given, target):
    assert target_of(build_parser().parse_args([*BASE, *given])) == target


def test_one_target_is_given(capsys):
    with pytest.raises(SystemExit):
        build_parser().parse_args([*BASE, "--max-accuracy-drop", "0.1", "--target-bytes", "9"])
    assert (
        "--target-bytes: not allowed with argument --max-accuracy-drop" in capsys.readouterr().err
    )


def test_the_demo_has_sparsities_only():
    demo = build_parser().parse_args(["demo"])
    assert target_of(demo) == rls.Target(sparsity=0.9)
    with pytest.raises(SystemExit):
        build_parser().parse_args(["demo", "--max-accuracy-drop", "0.1"])
