"""Groups and bits by kernel: what a network makes of them, how they are chosen, and the file."""

import dataclasses
import json
import math

import numpy as np
import pytest
import tf_keras as keras
from tiny_search import quick_search

import rl_sparsity_tf as rls
from rl_sparsity_tf import baselines
from rl_sparsity_tf.allocation.decisions import KernelDecisions
from rl_sparsity_tf.allocation.dynamic_programming import POWER, POWERS, propose, propose_all
from rl_sparsity_tf.allocation.size_budget import kernel_costs
from rl_sparsity_tf.allocation.storage import KernelStorage, Storage
from rl_sparsity_tf.data.batches import evaluation_data, training_data
from rl_sparsity_tf.data.metrics import Score
from rl_sparsity_tf.environment.network import CompressedNetwork, evaluate_plan
from rl_sparsity_tf.export.size_model import KernelBytes, SizeModel
from rl_sparsity_tf.layers.kernels import find_kernels
from rl_sparsity_tf.layers.operations import Operation
from rl_sparsity_tf.search import final, storage_choice
from rl_sparsity_tf.search.comparison import compare
from rl_sparsity_tf.search.storage_choice import (
    SlowInt4,
    choose_storage,
    propose_storages,
    storage_options,
)

L = keras.layers


def rows(count, seed):
    """Classes that all inputs have a say in, so that zeros cost more than rounding."""
    says = np.random.default_rng(9).normal(size=(64, 4))
    x = np.random.default_rng(seed).normal(size=(count, 64)).astype("f")
    return x, (x @ says).argmax(1)


TRAIN, VALIDATION, TEST = rows(512, 0), rows(192, 1), rows(96, 2)


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(4)
    made = keras.Sequential(
        [
            L.Input((64,)),
            L.Dense(96, activation="relu", name="wide"),
            L.Dense(32, activation="relu", name="middle"),
            L.Dense(4, activation="softmax", name="last"),
        ]
    )
    made.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    made.fit(*TRAIN, epochs=20, verbose=0)
    return made


@pytest.fixture(scope="module")
def sizes(model):
    """What the model's bytes go by."""
    return SizeModel(model, "raw")


@pytest.fixture(scope="module")
def limit(model, sizes):
    """A little more than everything takes at 4 bits: some six tenths of the weights in int8."""
    kernels = find_kernels(model)
    bits = {kernel.path: 4 for kernel in kernels}
    whole = sizes.file_size({k.path: k.value() for k in kernels}, bits)
    return round(1.04 * whole.raw)


def network_of(model, target, decisions, recovery="least_squares", like=None):
    with quick_search():
        return CompressedNetwork(
            model,
            training_data(TRAIN, model, batch_size=32),
            evaluation_data(VALIDATION, model, "validation_data"),
            target=target,
            decisions=decisions,
            recovery=rls.Recovery(method=recovery),
            like=like,
        )


# ---------------------------------------------------------------------- a storage


def test_kernels_that_are_not_named_are_alike():
    storage = Storage("block4", {"wide/kernel": KernelStorage("element", 4)})
    assert storage.of("wide/kernel") == KernelStorage("element", 4)
    assert storage.of("last/kernel") == KernelStorage("block4", 8)
    assert storage.bits(["wide/kernel", "last/kernel"]) == {"wide/kernel": 4, "last/kernel": 8}


@pytest.mark.parametrize(
    ("values", "message"),
    [(("row", 8), "group='row'"), (("element", 5), "bits=5 cannot be used. Expected 8 or 4")],
)
def test_what_is_no_storage_is_refused(values, message):
    with pytest.raises(rls.ArgumentError, match=message):
        KernelStorage(*values)


def test_plans_have_the_groups_and_bits_of_their_kernels(model):
    storage = Storage("block4", {"wide/kernel": KernelStorage("element", 4)})
    kernels = find_kernels(model)
    live = [np.ones(storage.grouping(kernel).shape, bool) for kernel in kernels]
    live[0][0] = False
    plan = storage.plan_from_live(kernels, live)
    found = {path: (entry.group, entry.bits) for path, entry in plan.kernels.items()}
    assert found == {
        "wide/kernel": ("element", 4),
        "middle/kernel": ("block4", 8),
        "last/kernel": ("block4", 8),
    }
    assert (plan.kernels["wide/kernel"].operations[0] == Operation.PRUNE).all()
    at = storage.plan_at(kernels, live, {**storage.bits(found), "last/kernel": 32})
    assert (at.kernels["last/kernel"].operations == Operation.KEEP).all()
    assert (at.kernels["wide/kernel"].operations == plan.kernels["wide/kernel"].operations).all()


# ---------------------------------------------------------------------- a network of it


def whole(network):
    """Every group of every kernel lives."""
    return [np.ones(grouping.shape, bool) for grouping in network.groupings.values()]


def levels_used(network, path):
    """The most values that the weights of one output have."""
    matrix = network.effective_matrix(path)
    return max(len(np.unique(column)) for column in matrix.T)


@pytest.mark.slow
@pytest.mark.parametrize("recovery", ["least_squares", "finetune"])
def test_a_network_quantizes_each_kernel_to_its_bits(model, recovery):
    storage = Storage("element", {"wide/kernel": KernelStorage("block4", 4)})
    decisions = KernelDecisions(storage)
    network = network_of(model, rls.Target(sparsity=0.3), decisions, recovery)
    assert network.groupings["wide/kernel"].shape == (16, 96)
    assert network.groupings["middle/kernel"].shape == (96, 32)
    everything = np.arange(network.groupings["wide/kernel"].count)
    network.decide("wide/kernel", everything, Operation.QUANTIZE)
    assert levels_used(network, "wide/kernel") <= 15
    halfway = network.snapshot()
    network.decide("wide/kernel", everything, Operation.PRUNE)
    network.restore(halfway)
    assert 4 < levels_used(network, "wide/kernel") <= 15
    network.decide("middle/kernel", np.arange(96 * 32), Operation.QUANTIZE)
    assert levels_used(network, "middle/kernel") > 15
    assert {p: (e.group, e.bits) for p, e in network.plan.kernels.items()} == {
        "wide/kernel": ("block4", 4),
        "middle/kernel": ("element", 8),
        "last/kernel": ("element", 32),  # all of it is kept as yet
    }


@pytest.mark.slow
def test_equal_operations_in_another_storage_are_another_evaluation(model):
    coarse = {f"{name}/kernel": KernelStorage("element", 4) for name in ("wide", "middle")}
    storages = [
        Storage(),
        Storage("element", coarse),
        Storage("element", dict([*coarse.items()][::-1])),
    ]
    seen = []
    for storage in storages:
        network = network_of(model, rls.Target(sparsity=0.1), KernelDecisions(storage))
        evaluate_plan(network, storage.plan_from_live(network.kernels, whole(network)))
        seen.append(network.seen)
    assert len(seen[0] | seen[1]) == 2
    assert seen[1] == seen[2]


@pytest.mark.slow
def test_recovery_fits_to_the_coarser_grid(model):
    coarse = Storage("element", {f"{n}/kernel": KernelStorage("element", 4) for n in ("wide",)})
    target = rls.Target(sparsity=0.1)
    losses = []
    for storage in (Storage(), coarse):
        network = network_of(model, target, KernelDecisions(storage))
        plan = storage.plan_from_live(network.kernels, whole(network))
        evaluate_plan(network, plan)
        weights = network.latent_weights()
        wrapped = rls.wrap(model, plan)
        layer = next(one for one in wrapped.layers if one.name == "wide")
        layer.layer.set_weights(weights["wide"])
        kernel = layer.effective_kernel("kernel").numpy()
        # Fitted weights lie on the grid already: quantizing them changes nothing.
        np.testing.assert_allclose(kernel, weights["wide"][0], atol=1e-6)
        losses.append(len(np.unique(kernel[:, 0])))
    assert losses[1] <= 15 < losses[0]


# ---------------------------------------------------------------------- the choice


@pytest.fixture(scope="module")
def chosen(model, limit, sizes):
    """The network that it began with, what was chosen, and the networks that were made."""
    target = rls.Target(tflite_bytes=limit)
    sizes = KernelBytes(sizes, target.kind)
    plain = network_of(model, target, KernelDecisions("element", sizes=sizes))
    made = []

    def build(decisions):
        made.append(network_of(model, target, decisions))
        return made[-1]

    return plain, choose_storage(plain, build, rls.Reward()), made


@pytest.mark.slow
def test_proposals_keep_to_the_bytes(chosen, model):
    plain, _, _ = chosen
    sizes = plain.decisions.sizes
    found = propose_storages(plain, storage_options(plain, sizes)).values()
    assert found
    for storage in found:
        network = network_of(model, plain.target, KernelDecisions(storage, sizes=sizes))
        for plan in propose_all(network, (0.5,)):
            assert sizes.sizes.plan_size(plan).raw <= plain.target.value


@pytest.mark.slow
def test_four_bits_are_chosen_where_they_save_what_zeros_would_cost(chosen):
    """There int4 fits everything; sparse int8 would have to lose three weights in four."""
    plain, best = chosen[0], chosen[1].network
    bits = best.storage.bits(best.groupings)
    assert 4 in bits.values()
    assert plain.storage == Storage("element")
    (plan,) = propose_all(best, (0.5,))
    wide = plan.kernels["wide/kernel"]
    assert wide.exported_bits == 4
    assert wide.sparsity < 0.1


@pytest.mark.slow
def test_the_chosen_network_is_the_one_of_least_loss_and_counts_all_evaluations(chosen):
    plain, best, made = chosen[0], chosen[1].network, chosen[2]
    powers = (1.0, 0.5, 0.25)

    def loss(network):
        found = min(evaluate_plan(network, plan).loss for plan in propose_all(network, powers))
        network.reset()
        return found

    assert loss(best) == min(loss(network) for network in (plain, *made))
    storages = [network.storage for network in (plain, *made)]
    assert all(storage not in storages[:n] for n, storage in enumerate(storages))
    # Every network has evaluated plans of its own.
    assert best.evaluations > max(len(propose_all(one, powers)) for one in made)
    assert not any(decided.any() for decided in best.decided.values())


@pytest.mark.slow
def test_the_baseline_of_single_weights_is_held_against_the_choice(chosen):
    plain, choice, _ = chosen
    (other,) = choice.others
    assert other.plan == propose(plain)  # what `compare` calls dynamic_programming
    assert {entry.group for entry in other.plan.kernels.values()} == {"element"}
    assert {entry.bits for entry in other.plan.kernels.values()} <= {8, 32}
    # Its outcome and weights are those that it was evaluated with.
    assert evaluate_plan(plain, other.plan) == other.outcome
    for path, weights in plain.latent_weights().items():
        for one, kept in zip(weights, other.weights[path], strict=True):
            np.testing.assert_array_equal(one, kept)
    plain.reset()


@pytest.mark.slow
def test_a_network_like_another_does_not_measure_the_dense_one_again(chosen, model, monkeypatch):
    plain, decisions = chosen[0], KernelDecisions("block4", sizes=chosen[0].decisions.sizes)
    measured = network_of(model, plain.target, decisions)
    for name in ("WeightAutoencoder", "StatisticsCollector.__call__"):
        monkeypatch.setattr(
            f"rl_sparsity_tf.environment.network.{name}", None
        )  # fails if it is called
    taken_over = network_of(model, plain.target, decisions, like=plain)
    assert taken_over.dense == measured.dense
    (plan,) = propose_all(measured, (0.5,))
    assert propose_all(taken_over, (0.5,)) == [plan]
    assert evaluate_plan(taken_over, plan) == evaluate_plan(measured, plan)
    for path, found in measured.dense_statistics.items():
        np.testing.assert_allclose(
            taken_over.dense_statistics[path].gradient, found.gradient, rtol=1e-4, atol=1e-6
        )


@pytest.mark.slow
def test_single_weights_that_were_chosen_have_their_baseline_beside_them_too(chosen):
    """Every network made is the same as that of the start, so that none is better."""
    plain = chosen[0]
    choice = choose_storage(plain, lambda decisions: plain, rls.Reward())
    assert choice.network is plain
    (other,) = choice.others
    assert other.plan == propose(plain)


@pytest.fixture(scope="module")
def convolutional():
    """Convolutions and dense layers under a limit that all of them meet in 4 bits."""
    keras.utils.set_random_seed(4)
    made = keras.Sequential(
        [
            L.Input((64,)),
            L.Reshape((8, 8, 1)),
            L.Conv2D(12, 5, activation="relu", name="conv"),
            L.Conv2D(24, 3, activation="relu", name="convs"),
            L.Flatten(),
            L.Dense(32, activation="relu", name="middle"),
            L.Dense(4, activation="softmax", name="last"),
        ]
    )
    made.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    made.fit(*TRAIN, epochs=10, verbose=0)
    kernels = find_kernels(made)
    sizes = SizeModel(made, "raw")
    whole = sizes.file_size({k.path: k.value() for k in kernels}, {k.path: 4 for k in kernels})
    target = rls.Target(tflite_bytes=round(1.1 * whole.raw))
    counted = KernelBytes(sizes, target.kind)
    return network_of(made, target, KernelDecisions("element", sizes=counted))


def kernels_in_4_bits(network, storages):
    paths = list(network.groupings)
    return {path for one in storages for path, bits in one.bits(paths).items() if bits == 4}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("int4", "expected"),
    [
        ("all", {"convs/kernel", "middle/kernel"}),
        ("fast", {"middle/kernel"}),
        ("none", set()),
    ],
)
def test_only_kernels_that_may_have_4_bits_are_proposed_in_4(convolutional, int4, expected):
    options = storage_options(convolutional, convolutional.decisions.sizes, int4)
    found = propose_storages(convolutional, options, int4).values()
    assert found
    in_4 = kernels_in_4_bits(convolutional, found)
    assert expected <= in_4
    if int4 != "all":
        assert not any(path.startswith("conv") for path in in_4)
    if int4 == "none":
        assert not in_4


@pytest.mark.slow
def test_the_choice_keeps_to_what_may_have_4_bits(chosen, model, limit):
    plain, with_4 = chosen[0], chosen[1].network

    def build(decisions):
        return network_of(model, rls.Target(tflite_bytes=limit), decisions)

    without = choose_storage(plain, build, rls.Reward(), "none").network
    assert kernels_in_4_bits(with_4, [with_4.storage])
    assert not kernels_in_4_bits(without, [without.storage])


@pytest.mark.slow
def test_what_4_bits_in_slow_kernels_would_be_worth_is_said(convolutional, monkeypatch):
    """All kernels fit the limit in 4 bits; with 8 bits convolutions have to lose half of theirs."""
    made, sizes = rls.strip(convolutional.model), convolutional.decisions.sizes
    made.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    built = []

    def build(decisions):
        built.append(network_of(made, convolutional.target, decisions))
        return built[-1]

    plain = build(KernelDecisions("element", sizes=sizes))
    monkeypatch.setattr(storage_choice, "_MUCH", 1e-6)  # the network is small
    choice = choose_storage(plain, build, rls.Reward(), "fast")
    found = choice.slow_int4
    assert isinstance(found, SlowInt4)
    assert "convs/kernel" in found.kernels
    assert not any(path.startswith(("middle", "last")) for path in found.kernels)
    # The figures are those of the two networks' own plans.
    best = min(
        (evaluate_plan(choice.network, plan) for plan in propose_all(choice.network, POWERS)),
        key=lambda outcome: outcome.loss,
    )
    assert found.metric == best.metric
    (plan,) = propose_all(built[-1], (POWER,))
    assert found.possible == evaluate_plan(built[-1], plan).metric > found.metric
    # What is not searched is no evaluation of the search.
    assert not built[-1].seen <= choice.network.seen
    text = json.loads(json.dumps(found.to_dict()))["note"]
    assert text == str(found)
    assert f"from {found.metric:.4f} to {found.possible:.4f}" in text
    # Nothing is said where it is asked for, forbidden, or worth little.
    for int4 in ("all", "none"):
        assert choose_storage(plain, build, rls.Reward(), int4).slow_int4 is None
    monkeypatch.setattr(storage_choice, "_MUCH", 1.0)
    assert choose_storage(plain, build, rls.Reward(), "fast").slow_int4 is None


@pytest.mark.slow
def test_storages_that_cannot_reach_a_size_are_passed_over(convolutional):
    """A convolution's last block of four takes more than its last single weight."""
    made, sizes = rls.strip(convolutional.model), convolutional.decisions.sizes
    made.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    target = rls.Target(tflite_bytes=math.ceil(convolutional.budget.smallest / 0.99) + 1)

    def build(decisions):
        return network_of(made, target, decisions)

    plain = build(KernelDecisions("element", sizes=sizes))
    with pytest.raises(rls.TargetError, match="cannot be reached"):
        build(KernelDecisions("block4", sizes=sizes))
    assert choose_storage(plain, build, rls.Reward()).network.target == target


def test_raw_bytes_alone_are_the_raw_bytes_of_both(model, sizes):
    kernel = find_kernels(model)[0]
    value = np.where(np.abs(kernel.value()) > 0.1, kernel.value(), 0).astype("f")
    for bits in (32, 8, 4):
        both = sizes.kernel_size(kernel.path, value, bits)
        raw = sizes.kernel_size(kernel.path, value, bits, compressed=False)
        assert raw.raw == both.raw
        assert np.isnan(raw.gzip)
        assert not np.isnan(both.gzip)


def test_four_bits_cost_the_same_at_every_density(model, sizes):
    counted = KernelBytes(sizes, "tflite_bytes")
    costs = kernel_costs(counted, find_kernels(model)[0], KernelStorage("element", 4))
    assert np.ptp(costs.integers) == 0
    whole = kernel_costs(counted, find_kernels(model)[0], KernelStorage())
    extra = sizes.kernel_size("wide/kernel", find_kernels(model)[0].value(), 8).raw - 64 * 96
    assert costs.integers[-1] == pytest.approx(64 * 96 / 2 + extra)
    assert whole.integers[-1] == pytest.approx(64 * 96 + extra)


@pytest.mark.slow
def test_dynamic_programming_at_four_bits_leaves_dense_kernels_dense(model, limit, sizes):
    """The least excess of the whole file over its parts used to cost every kernel its half."""
    target = rls.Target(tflite_bytes=limit)
    plan = baselines.dynamic_programming(model, TRAIN, target, bits=4)
    wide = plan.kernels["wide/kernel"]
    assert (wide.exported_bits, wide.sparsity) == (4, pytest.approx(0, abs=0.1))
    assert sizes.plan_size(plan).raw <= target.value


# ---------------------------------------------------------------------- searches


def search(model, limit, finalists, episodes, **options):
    """A search of groups and bits; the compressor and its result."""
    target = rls.Target(tflite_bytes=limit)
    one = rls.Compressor(
        model, target, buckets=3, **{"agent": "random", "group": "auto", **options}
    )
    arguments = {"finetune_epochs": int(finalists == 1), "finalists": finalists, "verbose": 0}
    with quick_search():
        return one, one.search(TRAIN, VALIDATION, TEST, episodes, **arguments)


@pytest.mark.slow
def test_single_weights_win_where_they_are_better_in_the_end(model, limit, monkeypatch):
    """The chosen storage leads to less loss before the fine-tuning; here it is ruined by it."""
    real, seen = final.finish_candidate, []

    def ruined(task, one, others):
        seen.append(one.proposed_by)
        finished = real(task, one, others)
        if one.proposed_by == "dynamic_programming_element":
            return finished
        return dataclasses.replace(finished, validation=Score(metric=0.0, loss=9.0))

    monkeypatch.setattr(final, "finish_candidate", ruined)
    _, result = search(model, limit, finalists=2, episodes=1)
    assert seen.count("dynamic_programming_element") == 1
    assert seen[0] != "dynamic_programming_element"
    assert result.metrics["compressed"]["proposed_by"] == "dynamic_programming_element"
    groups = {(entry.group, entry.exported_bits) for entry in result.plan.kernels.values()}
    assert groups <= {("element", 8), ("element", 32)}
    assert result.metrics["compressed"]["tflite_bytes"] <= limit


@pytest.mark.slow
def test_a_search_stores_every_kernel_as_the_bytes_want_it(model, limit, tmp_path):
    agent = rls.DQN(hidden_layers=(8,), train_steps=2, batch_size=8)
    options = {"agent": agent, "directory": tmp_path / "run"}
    one, result = search(model, limit, finalists=1, episodes=3, **options)
    path = tmp_path / "run" / "model.tflite"
    assert path.stat().st_size <= limit
    types = {tensor.dtype for tensor in rls.inspect_tflite(path).tensors}
    assert "int4" in types
    bits = {entry.exported_bits for entry in result.plan.kernels.values()}
    assert 4 in bits
    # One finalist is one: single weights were not fine-tuned.
    assert result.metrics["compressed"]["proposed_by"] != "dynamic_programming_element"
    found = (rls.predict_tflite(path, TEST[0]).argmax(1) == TEST[1]).mean()
    assert found == pytest.approx(result.metrics["compressed"]["tflite_accuracy"])
    # Contenders decide on single weights at 8 bits, whatever the search chose.
    (entry,) = compare(one, ["lamp"], 0)
    assert entry["tflite_bytes"] <= limit
    assert one.last.plain.storage == Storage("element")
    assert one.last.network.storage != Storage("element")


@pytest.mark.slow
def test_a_search_without_4_bits_stores_none(model, limit, tmp_path):
    options = {"int4": "none", "directory": tmp_path / "run"}
    _, result = search(model, limit, finalists=1, episodes=1, **options)
    path = tmp_path / "run" / "model.tflite"
    assert path.stat().st_size <= limit
    assert "int4" not in {tensor.dtype for tensor in rls.inspect_tflite(path).tensors}
    assert {entry.exported_bits for entry in result.plan.kernels.values()} <= {8, 32}
    # A run is continued with the arguments that it was begun with.
    assert (
        json.loads((tmp_path / "run" / "manifest.json").read_text())["arguments"]["int4"] == "none"
    )


@pytest.mark.parametrize("int4", ["all", "fast", "none"])
def test_where_all_kernels_have_8_bits_int4_is_refused(model, int4):
    target = rls.Target(sparsity=0.5)
    with pytest.raises(rls.ArgumentError, match=rf"int4='{int4}' does not go with group='element'"):
        rls.Compressor(model, target, int4=int4)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (rls.Target(tflite_bytes=9_999), ("auto", "fast")),
        (rls.Target(gzip_bytes=9_999), ("element", "none")),
        (rls.Target(max_accuracy_drop=0.1), ("element", "none")),
        (rls.Target(sparsity=0.5), ("element", "none")),
        (rls.Target(macs=0.5), ("channel", "none")),
    ],
)
def test_raw_bytes_have_groups_and_bits_chosen(model, target, expected):
    one = rls.Compressor(model, target)
    assert (one.group, one.int4) == expected


def test_an_unknown_int4_is_refused(model):
    with pytest.raises(rls.ArgumentError, match=r"int4='nome' is not known.*'none'"):
        rls.Compressor(model, rls.Target(tflite_bytes=9_999), group="auto", int4="nome")


@pytest.mark.parametrize(
    "target", [rls.Target(sparsity=0.5), rls.Target(latency=0.5), rls.Target(macs=0.5)]
)
def test_auto_is_for_targets_in_bytes(model, target):
    with pytest.raises(rls.ArgumentError, match=r"group='auto' does not go with Target\("):
        rls.Compressor(model, target, group="auto")
