"""Targets in bytes, from the wall to the real file."""

import json

import numpy as np
import pytest
import tf_keras as keras
from tiny_search import (
    WIDE_TRAIN,
    WIDE_VALIDATION,
    compressor,
    quick_search,
    search,
    wide,
    wide_rows,
)

import rl_sparsity_tf as rls
from rl_sparsity_tf.data.batches import evaluation_data, training_data
from rl_sparsity_tf.environment.layer_environment import LayerEnvironment
from rl_sparsity_tf.environment.network import CompressedNetwork
from rl_sparsity_tf.layers.kernels import find_kernels
from rl_sparsity_tf.layers.operations import Operation
from rl_sparsity_tf.search import final
from rl_sparsity_tf.search.episodes import LoopSettings, make_episodes
from rl_sparsity_tf.search.final import pruned_further

TRAIN, VALIDATION, TEST = WIDE_TRAIN, WIDE_VALIDATION, wide_rows(60, 2)


@pytest.fixture(scope="module", autouse=True)
def _quick():
    with quick_search():
        yield


@pytest.fixture(scope="module")
def model():
    return wide()


def run(model, target, directory=None, **options):
    one = compressor(model, "random", target=target, buckets=4, directory=directory)
    data = {"train": TRAIN, "validation_data": VALIDATION, "test_data": TEST}
    return one, search(one, **data, **{"episodes": 3, "finetune_epochs": 1, **options})


def network_for(model, target):
    """The network of a search, as it is before the first episode."""
    return CompressedNetwork(
        model,
        training_data(TRAIN, model, batch_size=32),
        evaluation_data(VALIDATION, model, "validation_data"),
        target=target,
        recovery=rls.Recovery(method="none"),
    )


# Dense, the file has 17.7 kB in float32 and 6.6 kB as int8.
@pytest.mark.slow
@pytest.mark.parametrize(
    "target", [rls.Target(tflite_bytes=4500), rls.Target(gzip_bytes=3600)], ids=["raw", "gzip"]
)
def test_the_real_file_is_within_the_target(model, target, tmp_path):
    one, result = run(model, target, tmp_path / "run")
    figures = result.metrics["compressed"]
    assert figures[target.kind] <= target.value
    assert figures[target.kind] == (
        (tmp_path / "run" / "model.tflite").stat().st_size
        if target.kind == "tflite_bytes"
        else figures["gzip_bytes"]
    )
    assert figures["sparsity"] > 0
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["arguments"]["target"] == target.to_dict()
    budget = one.last.network.budget
    # Every plan that was evaluated at the end of an episode met the size by the model of it.
    assert budget.limit < target.value
    for environment in one.last.loop.episodes.environments:
        assert environment.illegal_actions == 0


@pytest.mark.slow
def test_a_size_that_integers_meet_needs_no_zeros(model):
    _, result = run(model, rls.Target(tflite_bytes=7300), episodes=1, finetune_epochs=0)
    assert result.metrics["compressed"]["tflite_bytes"] <= 7300


@pytest.mark.slow
def test_the_wall_leaves_no_choice_when_the_size_is_tight(model):
    network = network_for(model, rls.Target(tflite_bytes=3400))
    environment = LayerEnvironment(network, network.kernels[0].path, buckets=4)
    legal = environment.reset().observation["legal"]
    assert legal[Operation.PRUNE] == 1
    assert legal[Operation.KEEP] == 0  # a float kernel alone would have 15 kB


def test_an_unreachable_size_is_refused_before_training(model, monkeypatch):
    monkeypatch.setattr(keras.Model, "train_step", None)
    with pytest.raises(rls.TargetError, match=r"Target\(tflite_bytes=900\) cannot be reached") as e:
        run(model, rls.Target(tflite_bytes=900))
    assert "Expected at least that many" in str(e.value)


def test_other_quantizations_do_not_go_with_a_size(model):
    with pytest.raises(rls.ArgumentError, match="quantization='int8' does not go with a target in"):
        run(model, rls.Target(tflite_bytes=5000), quantization="int8")


@pytest.mark.slow
def test_a_file_that_came_out_too_large_is_pruned_further(model, monkeypatch):
    """Pretends that every first file is larger than the model of it said."""
    monkeypatch.setattr("rl_sparsity_tf.allocation.size_budget.MARGINS", {"tflite_bytes": -0.2})
    seen = []
    finish = final.finish

    def watched(*arguments, **options):
        finished = finish(*arguments, **options)
        seen.append(finished.exported.report.tflite_bytes)
        return finished

    monkeypatch.setattr(final, "finish", watched)
    _, result = run(model, rls.Target(tflite_bytes=4500), episodes=1, finetune_epochs=0)
    assert seen[0] > 4500 >= seen[-1]
    assert result.metrics["compressed"]["tflite_bytes"] == seen[-1]


@pytest.mark.slow
def test_a_size_that_is_missed_for_good_is_said(model, monkeypatch):
    monkeypatch.setattr(final, "pruned_further", lambda _, plan, __: plan)
    monkeypatch.setattr(final, "_ATTEMPTS", 2)
    monkeypatch.setattr("rl_sparsity_tf.allocation.size_budget.MARGINS", {"tflite_bytes": -0.2})
    with pytest.raises(rls.TargetError, match=r"Target\(tflite_bytes=4500\) was missed.*then"):
        run(model, rls.Target(tflite_bytes=4500), episodes=1, finetune_epochs=0)


def test_pruning_further_takes_the_smallest_of_what_lives(model):
    plan = rls.CompressionPlan.from_json(
        json.dumps(
            {
                "format_version": 1,
                "kernels": [{"path": "*", "sparsity": 0.5, "quantize": True}],
            }
        )
    )
    wrapped = rls.wrap(model, plan)
    from rl_sparsity_tf.layers.wrapping import plan_of

    before = plan_of(wrapped)
    after = pruned_further(rls.strip(wrapped), before, 0.8)
    for kernel in find_kernels(model):
        old, new = before.kernels[kernel.path], after.kernels[kernel.path]
        assert new.sparsity == pytest.approx(0.6, abs=1 / kernel.size)
        assert (new.operations[old.operations == Operation.PRUNE] == Operation.PRUNE).all()
        matrix = np.abs(kernel.matrix())
        gone = (new.operations == Operation.PRUNE) & (old.operations != Operation.PRUNE)
        assert matrix[gone].max() <= matrix[new.operations != Operation.PRUNE].min() * 1.02


@pytest.mark.slow
def test_random_episodes_end_within_the_limit_where_integers_bring_many_scales():
    """Each of 120 outputs has a scale as int8: with few weights left floats are smaller."""
    keras.utils.set_random_seed(0)
    stack = [keras.layers.Dense(120, activation="relu"), keras.layers.Dense(3)]
    model = keras.Sequential([keras.layers.Input((60,)), *stack])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, metrics=["accuracy"])
    network = network_for(model, rls.Target(tflite_bytes=10**6))
    generous = network.budget
    assert not generous.integers_pay(0, 2.0)
    settings = LoopSettings(
        agent=rls.Random(), reward=rls.Reward(), buckets=4, seed=0, warm_start=False
    )
    stored = set()
    for factor in (1.25, 1.4):
        network.retarget(generous.limited(factor * generous.smallest))
        episodes, budget = make_episodes(settings, network), network.budget
        for _ in range(20):
            episodes.play()
            size = budget.fixed + budget.kernel_bytes(network.states())
            assert size <= budget.limit + budget.slack
            stored |= {entry.exported_bits for entry in network.plan.kernels.values()}
    assert stored == {8, 32}
