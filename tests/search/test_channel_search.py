"""Whole channels are searched, removed and exported, and the target is held to the small model."""

import json

import numpy as np
import pytest
import tf_keras as keras
from channel_search import TEST, TRAIN, VALIDATION, compressor, layers, searched, table_for, trained
from hypothesis import given, settings
from hypothesis import strategies as st
from same_outputs import assert_same
from tiny_search import PPO, quick_search

import rl_sparsity_tf as rls
from rl_sparsity_tf.allocation.channel_programming import (
    ChannelProblem,
    propose_channels,
    pruned_to,
)
from rl_sparsity_tf.channels.elimination import eliminate
from rl_sparsity_tf.channels.graph import ChannelGraph
from rl_sparsity_tf.channels.units import find_units
from rl_sparsity_tf.channels.widths import widths_of
from rl_sparsity_tf.cli import main
from rl_sparsity_tf.environment.network import evaluate_plan
from rl_sparsity_tf.errors import ArgumentError, TargetError
from rl_sparsity_tf.layers.kernels import find_kernels
from rl_sparsity_tf.layers.operations import Operation
from rl_sparsity_tf.search.comparison import compare
from rl_sparsity_tf.search.final import size_held
from rl_sparsity_tf.tflite.timing import FileTiming, Timing
from rl_sparsity_tf.training.ridge import fit_masked


@pytest.fixture(scope="module")
def macs_search(tmp_path_factory):
    one = compressor(rls.Target(macs=0.4), directory=tmp_path_factory.mktemp("runs") / "run")
    return one, searched(one)


@pytest.mark.slow
def test_the_result_has_fewer_channels_and_meets_the_target(macs_search):
    one, result = macs_search
    share = rls.count_macs(result.model) / rls.count_macs(one.model)
    assert 0.2 < share <= 0.4
    assert result.channels.macs == pytest.approx(share)
    assert result.metrics["compressed"]["macs"] == pytest.approx(share)
    assert result.model.get_layer("stem").kernel.shape[-1] < 8 or any(
        result.model.get_layer(name).kernel.shape[-1] < trained().get_layer(name).kernel.shape[-1]
        for name in ("inner", "hidden")
    )
    elements = sum(np.size(w) for w in result.model.get_weights() if np.ndim(w) >= 2)
    zeros = sum(np.sum(w == 0) for w in result.model.get_weights() if np.ndim(w) >= 2)
    whole = sum(np.size(w) for w in trained().get_weights() if np.ndim(w) >= 2)
    expected = 1 - (elements - zeros) / whole
    assert result.metrics["compressed"]["sparsity"] == pytest.approx(expected)
    assert result.metrics["compressed"]["accuracy"] > 0.6


@pytest.mark.slow
def test_the_file_has_the_small_models_tensors(macs_search, tmp_path):
    _, result = macs_search
    report = result.export_tflite(tmp_path / "small.tflite")
    shapes = {tensor.kernel: tensor.shape for tensor in report.tensors if tensor.kernel}
    inner = result.model.get_layer("inner").kernel.shape
    assert shapes["inner/kernel"] == (inner[3], *inner[:2], inner[2])
    assert report.top1_agreement == 1.0
    # Another mode is made from the same small model.
    assert result.export_tflite(tmp_path / "float.tflite", "none").tflite_bytes > 0
    assert rls.export_tflite(result, tmp_path / "again.tflite").tflite_bytes == report.tflite_bytes


@pytest.mark.slow
def test_the_run_holds_the_plan_of_the_original_models_channels(macs_search):
    one, result = macs_search
    plan = rls.CompressionPlan.load(one.directory / "channels.json")
    assert plan == result.channels.plan
    small = rls.shrink(one.model, plan)
    for layer, other in zip(small.layers, result.model.layers, strict=True):
        assert [w.shape for w in layer.weights] == [w.shape for w in other.weights]
    saved = json.loads((one.directory / "metrics.json").read_text())
    assert saved["compressed"]["macs"] == pytest.approx(result.channels.macs)
    assert set(rls.CompressionPlan.load(one.directory / "plan.json").kernels) == set(plan.kernels)


@pytest.mark.slow
def test_the_summary_says_what_is_left(macs_search):
    _, result = macs_search
    lines = []
    result.summary(lines.append)
    assert f"left: {result.channels.macs:.4f} of the multiplications" in lines


@pytest.mark.slow
def test_no_action_of_the_agent_was_illegal(macs_search):
    one, result = macs_search
    assert all(entry["illegal_actions"] == 0 for entry in result.history)
    # The frozen classifier is decided, too, but never pruned.
    assert [kernel.path for kernel in one.last.network.kernels][-1] == "classes/kernel"
    classes = result.channels.plan.kernels["classes/kernel"].operations
    assert (classes != Operation.PRUNE).all()


@pytest.mark.slow
def test_an_episode_ends_within_the_limit(macs_search):
    network = macs_search[0].last.network
    for entry in macs_search[1].history:
        assert entry["sparsity"] >= network.budget.goal - 1e-6


@pytest.mark.slow
def test_tied_kernels_are_pruned_alike(macs_search):
    plan = macs_search[1].channels.plan.kernels
    stem = plan["stem/kernel"].operations == Operation.PRUNE
    np.testing.assert_array_equal(plan["outer/kernel"].operations == Operation.PRUNE, stem)
    depthwise = plan["depthwise/depthwise_kernel"].operations == Operation.PRUNE
    np.testing.assert_array_equal(depthwise, stem)


@pytest.mark.slow
def test_a_plan_evaluated_is_the_small_model_it_stands_for(macs_search):
    """Masks in the network and removed channels compute the same, least squares included."""
    from rl_sparsity_tf.environment.candidates import Candidate
    from rl_sparsity_tf.search.final import without_channels

    one, _ = macs_search
    network = one.last.network
    (plan,) = propose_channels(network, (1.0,))
    outcome = evaluate_plan(network, plan)
    candidate = Candidate.of(network, 0.0, 0, "test")
    small, smaller = without_channels(one.model, network.decisions, candidate)
    restored = rls.wrap(small, smaller.plan)
    restored.compile(**{"loss": "sparse_categorical_crossentropy", "metrics": ["accuracy"]})
    loss, accuracy = restored.evaluate(*VALIDATION, verbose=0)
    assert accuracy == pytest.approx(outcome.metric, abs=1e-6)
    assert loss == pytest.approx(outcome.loss, rel=1e-3)


@pytest.mark.slow
def test_a_size_is_met_by_removing_channels():
    target = rls.Target(tflite_bytes=9_000)
    result = searched(compressor(target, agent="random"), episodes=2, finetune_epochs=0)
    assert size_held(result.report, target) <= target.value


@pytest.mark.slow
def test_ppo_and_training_as_recovery_work_as_well():
    recovery = rls.Recovery(method="finetune", steps=1)
    one = compressor(rls.Target(macs=0.5), agent=PPO, recovery=recovery)
    result = searched(one, episodes=1, finetune_epochs=0)
    assert rls.count_macs(result.model) <= 0.5 * rls.count_macs(one.model)
    assert one.last.network.least_squares is None


@pytest.mark.slow
def test_searches_repeat(macs_search):
    _, result = macs_search
    again = searched(compressor(rls.Target(macs=0.4)))
    assert result.channels.plan == again.channels.plan
    first, second = result.model.get_weights(), again.model.get_weights()
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_contenders_remove_channels_too(macs_search):
    one, _ = macs_search
    names = ["global_magnitude", "uniform_output_error", "dynamic_programming"]
    entries = compare(one, names, 0)
    assert [entry["name"] for entry in entries] == [
        "global magnitude int8",
        "uniform output error int8",
        "dynamic programming",
    ]
    assert all(entry["macs"] <= 0.4 for entry in entries)


@pytest.mark.slow
def test_channels_without_batch_normalization_have_no_scales_to_rank_by(macs_search):
    with pytest.raises(ArgumentError, match=r"'global_gamma' finds no plan: it has nothing"):
        compare(macs_search[0], ["global_gamma"], 0)


@pytest.mark.slow
def test_heuristics_for_channels_are_for_channels():
    from tiny_search import VALIDATION as VECTORS
    from tiny_search import trained as tiny

    one = rls.Compressor(tiny(), rls.Target(sparsity=0.5), "random")
    with quick_search():
        one.search(VECTORS, VECTORS, episodes=1, finetune_epochs=0, verbose=0)
    with pytest.raises(ArgumentError, match=r"uniform_gamma ranks whole channels, .*'element'"):
        compare(one, ["uniform_gamma"], 0)


@pytest.mark.slow
def test_tfmot_cannot_remove_channels(macs_search):
    with pytest.raises(ArgumentError, match=r"tfmot prunes single weights, .*without tfmot"):
        compare(macs_search[0], ["tfmot"], 0)


@pytest.mark.slow
def test_models_whose_channels_all_stay_are_masked_and_the_log_says_so(caplog):
    inputs = layers.Input((6,))
    x = layers.Reshape((6, 1))(layers.Dense(6, activation="relu")(inputs))
    model = keras.Model(inputs, layers.Dense(3, activation="softmax")(layers.Flatten()(x)))
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    one = rls.Compressor(model, rls.Target(sparsity=0.2), "random", group="channel")
    x, y = np.random.default_rng(0).normal(size=(64, 6)).astype("float32"), np.arange(64) % 3
    with quick_search():
        result = one.search((x, y), (x, y), episodes=1, finetune_epochs=1, verbose=0)
    assert "become zero, and stay in the file" in caplog.text
    assert result.channels is None
    assert result.metrics["compressed"]["sparsity"] >= 0.2


# What cannot be asked for.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"target": rls.Target(macs=0.5), "group": "element"},
            r"macs=0.5\) does not go with group",
        ),
        ({"target": rls.Target(latency=0.5), "group": "block4"}, r"latency=0.5\) does not go with"),
        ({"target": rls.Target(macs=0.5), "latency_table": "t.json"}, r"macs=...\) does not need"),
        ({"target": rls.Target(latency=0.5), "latency_table": 7}, r"latency_table=7 is a int"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        rls.Compressor(trained(), **arguments)


def test_targets_of_macs_decide_on_channels_by_themselves():
    assert rls.Compressor(trained(), rls.Target(macs=0.5)).group == "channel"
    assert rls.Compressor(trained(), rls.Target(sparsity=0.5)).group == "element"


def test_models_without_removable_channels_are_refused():
    model = keras.Sequential([layers.Input((4,)), layers.Dense(3, activation="softmax")])
    model.compile("adam", "sparse_categorical_crossentropy")
    with pytest.raises(TargetError, match=r"no channel of the model .* can be removed"):
        rls.Compressor(model, rls.Target(macs=0.5))


def test_a_target_out_of_reach_is_refused_before_training():
    with pytest.raises(TargetError, match=r"macs=0.001\) cannot be reached: .*describe_groups"):
        searched(compressor(rls.Target(macs=0.001)))


# Latency, by a table made by hand.


@pytest.mark.slow
def test_a_table_given_predicts_the_latency(tmp_path, monkeypatch):
    def timed(path, against, **_):
        """What this processor takes for so small a model says nothing: two fifths."""
        file, dense = (
            FileTiming(path=str(one), samples_ms=(ms,) * 5)
            for one, ms in ((path, 0.4), (against, 1.0))
        )
        return Timing(file=file, against=dense, threads=1, xnnpack=True, batch_size=1)

    monkeypatch.setattr("rl_sparsity_tf.search.final.benchmark_tflite", timed)
    model = trained()
    table = table_for(model)
    table.save(tmp_path / "table.json")
    options = {"agent": "random", "latency_table": tmp_path / "table.json"}
    one = compressor(rls.Target(latency=0.5), **options)
    result = searched(one, episodes=2, finetune_epochs=0)
    predicted = table.predict(widths_of(result.model)) / table.predict(widths_of(model))
    assert result.channels.predicted_latency == pytest.approx(predicted)
    assert predicted <= 0.5 + 1e-6
    assert result.channels.latency == pytest.approx(0.4)
    assert result.metrics["compressed"]["predicted_latency"] == pytest.approx(predicted)


def test_a_table_of_another_quantization_is_refused():
    one = compressor(rls.Target(latency=0.5), latency_table=table_for(trained(), "none"))
    with pytest.raises(
        ArgumentError, match=r"quantization='none' files, but .*quantization='plan'"
    ):
        searched(one)


# What goes first, and how many.


@pytest.mark.slow
def test_elimination_knows_what_a_refit_loses(macs_search):
    """Against solving the normal equations anew for every set of channels that goes."""
    network = macs_search[0].last.network
    unit = next(unit for unit in network.kernels if unit.path == "inner/kernel")
    problems = network.least_squares.problems
    found = eliminate(unit, problems)
    problem = problems["outer/kernel"]
    (reader,) = unit.readers
    gram, weights = problem.dense.gram, problem.original.astype(np.float64)
    strength = problem.ridge * np.mean(np.diag(gram))
    for gone in range(1, unit.count):
        live = ~np.isin(reader.rows, found.order[:gone])[:, None] & np.ones(weights.shape, bool)
        fitted = fit_masked(gram, gram @ weights, weights, live, ridge=problem.ridge)
        change = weights - fitted
        energy = np.vdot(change, (gram + strength * np.eye(len(gram))) @ change)
        assert found.errors[gone] == pytest.approx(energy / problem.energy, rel=1e-3, abs=1e-6)


@pytest.mark.slow
def test_the_first_to_go_is_the_one_that_is_missed_least(macs_search):
    network = macs_search[0].last.network
    unit = next(unit for unit in network.kernels if unit.path == "hidden/kernel")
    found = eliminate(unit, network.least_squares.problems)
    problem = network.least_squares.problems["classes/kernel"]
    gram = problem.dense.gram
    inverse = np.linalg.inv(gram + problem.ridge * np.mean(np.diag(gram)) * np.eye(len(gram)))
    alone = np.square(problem.original).sum(1) / np.diag(inverse)
    assert found.order[0] == np.argmin(alone)
    assert (np.diff(found.saliency[found.order]) >= 0).all()


@pytest.mark.slow
def test_without_readers_that_can_be_fitted_weights_decide(macs_search):
    unit = next(u for u in macs_search[0].last.network.kernels if u.path == "inner/kernel")
    found = eliminate(unit, {})
    energies = np.square(unit.matrix()).sum(0)
    np.testing.assert_array_equal(found.order, np.argsort(energies, kind="stable"))
    assert found.errors[-1] == pytest.approx(1)


class _Cost:
    """Stands in for a budget: the product of what two units keep, and a third by itself."""

    def __init__(self, counts):
        self.counts, self.able, self.whole = counts, np.ones(3, bool), 1.0
        self.cost = self

    def total(self, live, _):
        return 0.6 * live[..., 0] * live[..., 1] + 0.4 * live[..., 2]


class _Unit:
    spec = type("Spec", (), {"exports_int8": True})

    def __init__(self, count):
        self.count = count


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), limit=st.floats(0.2, 0.9))
def test_numbers_of_channels_are_close_to_the_best_there_are(seed, limit):
    rng = np.random.default_rng(seed)
    counts = [5, 4, 6]
    losses = [np.concatenate([[0], np.cumsum(np.sort(rng.random(n) ** 2))]) for n in counts]
    problem = ChannelProblem(
        _Cost(counts), [_Unit(n) for n in counts], losses, [np.arange(n) for n in counts]
    )
    gone = problem.solve(limit)
    assert problem.costs(gone) <= limit
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in counts), indexing="ij"), -1).reshape(-1, 3)
    allowed = grid[problem.costs(grid) <= limit]
    best = min(problem.loss(one) for one in allowed)
    assert problem.loss(gone) <= 1.35 * best + 0.12
    # Nothing that is gone could have stayed.
    for index in np.flatnonzero(gone):
        more = gone.copy()
        more[index] -= 1
        assert problem.costs(more) > limit


@pytest.mark.slow
def test_a_plan_is_pruned_further_to_a_limit(macs_search):
    network = macs_search[0].last.network
    (plan,) = propose_channels(network, (1.0,))
    limit = 0.5 * network.budget.limit
    further = pruned_to(network, plan, limit)
    live = [
        (further.kernels[unit.path].operations != Operation.PRUNE).mean()
        for unit in network.kernels
    ]
    integers = np.ones(len(live), bool)
    assert network.budget.cost.total(np.array(live), integers) <= limit
    for path, entry in plan.kernels.items():
        gone = entry.operations == Operation.PRUNE
        assert (further.kernels[path].operations[gone] == Operation.PRUNE).all()


@pytest.mark.slow
def test_shrunk_results_are_the_wrapped_ones(macs_search):
    _, result = macs_search
    again = rls.shrink(result.model)
    assert_same(result.model, again, rows=128)
    units = find_units(ChannelGraph(result.model), find_kernels(result.model))
    assert all(unit.count >= 1 for unit in units)


# Shuffle's second mode.


@pytest.mark.slow
def test_channels_are_permuted_before_a_search_of_blocks():
    one = rls.Compressor(
        trained(), rls.Target(sparsity=0.6), "random", group="block16", shuffle="channels"
    )
    result = searched(one, episodes=2, finetune_epochs=0)
    permuted = rls.permute_channels(trained(), group="block16", sparsity=0.6)
    np.testing.assert_array_equal(
        one.last.model.get_layer("outer").kernel, permuted.get_layer("outer").kernel
    )
    # What is compressed computes what the model did.
    np.testing.assert_allclose(
        one.last.model.predict(TEST[0], verbose=0),
        trained().predict(TEST[0], verbose=0),
        atol=1e-5,
    )
    operations = result.metrics["search"]["operations"]
    assert operations["shuffle"] == 0
    assert all(entry["operations"]["shuffle"] == 0 for entry in result.history)
    legal = one.last.loop.episodes.environments[0].reset().observation["legal"]
    assert not legal[Operation.SHUFFLE]


@pytest.mark.parametrize("group", ["element", "channel"])
def test_the_order_of_channels_only_matters_to_blocks(group):
    with pytest.raises(
        ArgumentError, match=rf"shuffle='channels' does not go with group='{group}'"
    ):
        compressor(rls.Target(sparsity=0.5), group=group, shuffle="channels")


def test_modes_of_shuffle_that_are_not_known_are_refused():
    with pytest.raises(ArgumentError, match=r"shuffle='chanels' is not known.*'channels'"):
        compressor(rls.Target(sparsity=0.5), shuffle="chanels")


@pytest.mark.parametrize("name", ["lamp", "dynamic_programming", "random_search"])
def test_baselines_for_kernels_refuse_targets_of_channels(name):
    call = getattr(rls.baselines, name)
    with pytest.raises(ArgumentError, match=r"macs=0.5\) is met by removing whole channels, which"):
        call(trained(), TRAIN, rls.Target(macs=0.5))


@pytest.mark.slow
def test_the_command_line_removes_channels(tmp_path, capsys):
    trained().save(tmp_path / "model.keras")
    (x, y), (x_validation, y_validation) = TRAIN, VALIDATION
    arrays = {
        "x_train": x,
        "y_train": y,
        "x_validation": x_validation,
        "y_validation": y_validation,
    }
    np.savez(tmp_path / "data.npz", **arrays)
    command = ["compress", str(tmp_path / "model.keras"), "--data", str(tmp_path / "data.npz")]
    command += ["--output", str(tmp_path / "run"), "--target-macs", "0.5", "--episodes", "1"]
    command += ["--finalists", "1"]
    with quick_search():
        assert main([*command, "--finetune-epochs", "1", "--verbose", "1"]) == 0
    assert "of the multiplications" in capsys.readouterr().out
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["compressed"]["macs"] <= 0.5
    assert (tmp_path / "run" / "channels.json").is_file()
    wrong = [*command, "--group", "element", "--overwrite"]
    assert main(wrong) == 2
    assert "does not go with group='element'" in capsys.readouterr().err


@pytest.mark.slow
def test_a_plan_that_had_to_be_pruned_further_gives_way_to_a_better_one(macs_search, monkeypatch):
    """Where a file takes longer than is predicted, the second best may be the best."""
    from rl_sparsity_tf.environment.candidates import Candidate
    from rl_sparsity_tf.search import final

    one, _ = macs_search
    network = one.last.network
    good = propose_channels(network, (1.0,))[0]
    poor = pruned_to(network, good, 0.6 * network.budget.limit)
    evaluate_plan(network, poor)
    candidate = Candidate.of(network, 0.5, 3, "dqn")
    measured = final._Ruler.measure

    def slower(ruler, small):
        """What was given takes twice as long as it should; others do not."""
        found, timing = measured(ruler, small)
        return (2 * found if found < 0.3 else found), timing

    seen = []
    monkeypatch.setattr(final._Ruler, "measure", slower)
    monkeypatch.setattr(
        final,
        "finish",
        lambda model, chosen, *_, **__: seen.append(chosen) or _done(model),
    )
    finished = final.finish_candidate(one.last, candidate, [("lamp", good)])
    assert finished.candidate.plan == good
    assert finished.candidate.proposed_by == "lamp"
    # Nothing is evaluated in place of a candidate that meets the target.
    evaluate_plan(network, good)
    again = Candidate.of(network, 0.5, 3, "dqn")
    finished = final.finish_candidate(one.last, again, [("lamp", poor)])
    assert finished.candidate.plan == good
    assert finished.candidate.proposed_by == "dqn"


def _done(model):
    from rl_sparsity_tf.search.finishing import Finished

    return Finished(model=model, plan=None, validation=None, test=None, exported=None)
