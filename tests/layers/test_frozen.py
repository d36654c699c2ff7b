"""Frozen layers are left alone unless they are asked for, and so is what is excluded."""

import json

import numpy as np
import pytest
import tf_keras as keras
from tiny_search import DQN, TRAIN, VALIDATION, StoppedError, quick_search, trained
from tiny_search import search as tiny_search

import rl_sparsity_tf as rls
from rl_sparsity_tf.allocation.channel_decisions import ChannelDecisions, removable_channels
from rl_sparsity_tf.allocation.decisions import KernelDecisions
from rl_sparsity_tf.cli import main
from rl_sparsity_tf.data.batches import evaluation_data, training_data
from rl_sparsity_tf.environment.candidates import Candidate
from rl_sparsity_tf.environment.network import CompressedNetwork, evaluate_plan
from rl_sparsity_tf.errors import (
    ArgumentError,
    FileExistsRLSparsityError,
    ModelError,
    PlanError,
    TargetError,
)
from rl_sparsity_tf.export.size_model import SizeModel
from rl_sparsity_tf.layers.kernels import find_kernels
from rl_sparsity_tf.layers.operations import Operation
from rl_sparsity_tf.layers.plan import KernelPlan, KernelRule
from rl_sparsity_tf.layers.rules import KernelSelection, resolve
from rl_sparsity_tf.layers.support import support_report
from rl_sparsity_tf.layers.wrapping import plan_of, wrapped_kernels, wrappers_of
from rl_sparsity_tf.search import compressor as search_module
from rl_sparsity_tf.search.final import without_channels
from rl_sparsity_tf.training.least_squares import LeastSquares
from rl_sparsity_tf.training.preparation import prepare_for_short_recovery

L = keras.layers


def transfer(frozen=True):
    """A pretrained base of 54 + 432 weights inside the model, and a head of 256 + 96."""
    keras.utils.set_random_seed(2)
    base = keras.Sequential(
        [
            L.Input((6, 6, 1)),
            L.Conv2D(6, 3, name="stem"),
            L.BatchNormalization(name="norm"),
            L.ReLU(name="relu"),
            L.Conv2D(8, 3, strides=2, name="deep"),
            L.Flatten(name="flat"),
        ],
        name="base",
    )
    base.trainable = not frozen
    x = inputs = L.Input((6, 6, 1))
    x = L.Dense(32, activation="relu", name="hidden")(base(x))
    model = keras.Model(inputs, L.Dense(3, activation="softmax", name="head")(x), name="transfer")
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    for weight in model.get_layer("base").get_layer("norm").weights:
        weight.assign_add(np.linspace(0.1, 0.4, 6).astype(np.float32))
    return model


def images(count, seed):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 3, count)
    x = rng.normal(size=(count, 6, 6, 1)).astype(np.float32)
    x[np.arange(count), y * 2] += 1.5
    return x, y


IMAGES, MORE_IMAGES = images(96, 0), images(60, 1)
BASE = ("base/stem/kernel", "base/deep/kernel")
HEAD = ("hidden/kernel", "head/kernel")


@pytest.fixture(scope="module", autouse=True)
def _quick():
    with quick_search():
        yield


def weights_of(model, name="base"):
    return [weight.numpy() for weight in model.get_layer(name).weights]


def assert_equal(one, other):
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)


def half_pruned(kernel, operation=Operation.KEEP, seed=0):
    shape = kernel.grouping("element").shape
    live = np.random.default_rng(seed).random(shape) < 0.5
    chosen = np.where(live, operation, Operation.PRUNE).astype(np.uint8)
    return KernelPlan(kernel.path, kernel.shape, kernel.spec.layout, "element", 8, chosen)


# -- names ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed():
    inner = keras.Sequential([L.Input((5, 4)), L.Dense(6, name="wide"), L.Dense(6, name="deep")])
    inner._name = "encoder"
    return keras.Sequential(
        [
            L.Input((5, 4)),
            inner,
            L.LSTM(3, name="memory"),
            L.Dense(4, name="deep"),
            L.ReLU(name="relu"),
            L.Dense(2, name="out"),
        ]
    )


ALL = {
    "encoder/wide/kernel",
    "encoder/deep/kernel",
    "memory/cell/kernel",
    "memory/cell/recurrent_kernel",
    "deep/kernel",
    "out/kernel",
}


@pytest.mark.parametrize(
    ("patterns", "matched"),
    [
        ("out", {"out/kernel"}),
        ("wide", {"encoder/wide/kernel"}),
        ("encoder", {"encoder/wide/kernel", "encoder/deep/kernel"}),
        ("encoder/deep", {"encoder/deep/kernel"}),
        ("deep", {"encoder/deep/kernel", "deep/kernel"}),
        ("deep/kernel", {"deep/kernel"}),
        ("memory", {"memory/cell/kernel", "memory/cell/recurrent_kernel"}),
        ("memory/cell/recurrent_kernel", {"memory/cell/recurrent_kernel"}),
        ("*recurrent*", {"memory/cell/recurrent_kernel"}),
        ("[ow]*", {"out/kernel", "encoder/wide/kernel"}),
        (("o?t", "wide"), {"out/kernel", "encoder/wide/kernel"}),
        ({"out", "wide"}, {"out/kernel", "encoder/wide/kernel"}),
        ("*", ALL),
    ],
)
def test_a_pattern_matches_paths_and_names_of_kernels_layers_and_models(mixed, patterns, matched):
    assert set(KernelSelection.of(mixed, include=patterns).paths) == matched
    selection = KernelSelection.of(mixed, exclude=patterns)
    assert set(selection.left) == matched
    assert set(selection.paths) == ALL - matched


def test_exclude_wins_over_include(mixed):
    selection = KernelSelection.of(mixed, include=["encoder", "out"], exclude="wide")
    assert selection.paths == ("encoder/deep/kernel", "out/kernel")
    assert selection.to_dict() == {
        "excluded": ["encoder/wide/kernel"],
        "not included": ["memory/cell/kernel", "memory/cell/recurrent_kernel", "deep/kernel"],
    }


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            {"exclude": "ouz"},
            ["exclude='ouz' matches no kernel", "'memory'", "Did you mean 'out'?"],
        ),
        ({"include": ["out", "x*"]}, ["include='x*' matches no kernel", "'encoder/deep'"]),
        ({"exclude": "relu"}, ["matches 'relu', which has no kernel", "describe_support"]),
        ({"exclude": 3}, ["exclude=3 cannot be used", "name of a layer"]),
        ({"exclude": [L.ReLU()]}, ["cannot be used", "exclude='dense'"]),
        ({"include": []}, ["include=[] cannot be used"]),
        ({"exclude": ""}, ["exclude='' cannot be used"]),
    ],
)
def test_names_that_cannot_be_used_are_refused(mixed, arguments, words):
    with pytest.raises(ArgumentError) as caught:
        KernelSelection.of(mixed, **arguments)
    for word in words:
        assert word in str(caught.value)


# -- what is frozen ------------------------------------------------------------------------------


def test_layers_are_frozen_by_their_own_flag_or_by_that_of_a_model_around_them():
    assert KernelSelection.of(transfer(frozen=False)).paths == BASE + HEAD
    model = transfer()
    assert KernelSelection.of(model).left == dict.fromkeys(BASE, "frozen")
    # Keras trains nothing of a frozen model, whatever the layers in it say.
    model.get_layer("base").get_layer("deep").trainable = True
    assert KernelSelection.of(model).left == dict.fromkeys(BASE, "frozen")
    model.get_layer("base").trainable = True
    model.get_layer("hidden").trainable = False
    assert KernelSelection.of(model).left == {"hidden/kernel": "frozen"}
    assert KernelSelection.of(model, include="h*").paths == HEAD
    lstm = keras.Sequential([L.Input((4, 2)), L.LSTM(3, name="memory"), L.Dense(2, name="out")])
    lstm.get_layer("memory").cell.trainable = False
    assert KernelSelection.of(lstm).paths == ("out/kernel",)


def test_a_model_that_is_all_frozen_is_refused_with_the_way_out():
    model = transfer()
    model.trainable = False
    model.compile("adam", "sparse_categorical_crossentropy")
    for call in (
        lambda: rls.Compressor(model),
        lambda: rls.baselines.lamp(model, sparsity=0.5),
        lambda: KernelDecisions("element").wrap(model),
    ):
        with pytest.raises(ModelError, match="4 kernels are frozen") as caught:
            call()
        assert "layer.trainable = True" in str(caught.value)
        assert "include='*'" in str(caught.value)
    assert rls.Compressor(model, include="*").selection.paths == BASE + HEAD
    assert rls.baselines.lamp(model, sparsity=0.5, include="*").sparsity >= 0.5


def test_nothing_left_is_refused():
    with pytest.raises(ArgumentError, match="exclude leave nothing of model 'tiny'"):
        rls.Compressor(trained(), include="first", exclude="first")


def test_a_sparsity_that_frozen_layers_put_out_of_reach_is_refused_before_any_work():
    """352 of 838 weights are in the head."""
    model = transfer()
    for call in (
        lambda: rls.Compressor(model, rls.Target(sparsity=0.9)),
        lambda: rls.baselines.erk(model, sparsity=0.9),
    ):
        with pytest.raises(TargetError, match="2 kernels are frozen") as caught:
            call()
        assert "'base/stem/kernel', 'base/deep/kernel'" in str(caught.value)
        assert "include=" in str(caught.value)
    # Only the group that every kernel keeps puts this one out of reach.
    with pytest.raises(TargetError, match=r"takes no part: 2 kernels are frozen"):
        rls.baselines.lamp(model, sparsity=0.4, group="channel")


@pytest.mark.slow
def test_a_size_that_excluded_layers_put_out_of_reach_names_them():
    with pytest.raises(TargetError, match=r"1 kernel is excluded \('first/kernel'\)"):
        rls.baselines.lamp(trained(), target=rls.Target(tflite_bytes=1000), exclude="first")


# -- plans and wrap ------------------------------------------------------------------------------


@pytest.mark.slow
def test_wrap_leaves_frozen_and_excluded_kernels_unwrapped(mixed):
    model = transfer()
    assert [kernel.path for kernel in wrapped_kernels(rls.wrap(model))] == list(HEAD)
    assert len(wrappers_of(rls.wrap(model, include="stem", exclude="deep"))) == 1
    wrapped = rls.wrap(mixed, exclude="memory/cell/kernel")
    assert set(plan_of(wrapped).kernels) == ALL - {"memory/cell/kernel"}
    x = np.random.default_rng(0).normal(size=(3, 5, 4)).astype(np.float32)
    np.testing.assert_array_equal(wrapped(x), mixed(x))


def test_rules_pass_over_what_is_left_alone_and_entries_may_name_frozen_kernels():
    model = transfer()
    rule = rls.CompressionPlan([KernelRule("*", 0.5)])
    assert set(resolve(rule, model).kernels) == set(HEAD)
    assert set(plan_of(rls.wrap(model, rule, exclude="head")).kernels) == {"hidden/kernel"}
    assert set(plan_of(rls.wrap(model, rule, include="*")).kernels) == {*BASE, *HEAD}
    named = rls.CompressionPlan([KernelRule("base/stem/kernel", 0.5), KernelRule("h*", 0.5)])
    assert set(plan_of(rls.wrap(model, named)).kernels) == {"base/stem/kernel", *HEAD}
    with pytest.raises(PlanError, match=r"'base/\*' matches only kernels that are left alone"):
        rls.wrap(model, rls.CompressionPlan([KernelRule("base/*", 0.5)]))


def test_a_plan_that_changes_an_excluded_kernel_is_refused():
    model = trained()
    plan = rls.baselines.uniform(model, sparsity=0.5)
    with pytest.raises(PlanError, match="changes the kernel 'last/kernel', which is excluded"):
        rls.wrap(model, plan, exclude="last")
    with pytest.raises(PlanError, match="changes the kernel 'first/kernel', which is not included"):
        rls.wrap(model, plan, include="last")
    kept = rls.CompressionPlan([KernelRule("last/kernel", 0.0)])
    assert plan_of(rls.wrap(model, kept, exclude="last")).sparsity == 0.0


@pytest.mark.slow
def test_frozen_kernels_that_are_included_are_masked_but_never_trained():
    model = transfer()
    plan = rls.CompressionPlan([half_pruned(kernel) for kernel in find_kernels(model)])
    for mask in ("straight_through", "hard_concrete"):
        wrapped = rls.wrap(model, plan, train_masks=True, mask=mask)
        wrapped.compile("adam", "sparse_categorical_crossentropy")
        assert len(wrapped.trainable_weights) == 4 + 2  # the head, and its masks' logits
        callbacks = [rls.MaskTraining(every=1, freeze_after=1.0)]
        wrapped.fit(*IMAGES, epochs=2, verbose=0, callbacks=callbacks)
        learned, small = plan_of(wrapped), rls.strip(wrapped)
        assert all(learned.kernels[path] == plan.kernels[path] for path in BASE)
        if mask == "straight_through":
            assert any(learned.kernels[path] != plan.kernels[path] for path in HEAD)
        for kernel, before in zip(find_kernels(small)[:2], find_kernels(model)[:2], strict=True):
            live = plan.kernels[kernel.path].operations != Operation.PRUNE
            np.testing.assert_array_equal(kernel.matrix(), np.where(live, before.matrix(), 0))
        norm, original = (m.get_layer("base").get_layer("norm") for m in (small, model))
        assert_equal(norm.get_weights(), original.get_weights())


@pytest.mark.slow
def test_frozen_layers_are_measured_in_files_like_others():
    frozen, thawed = SizeModel(transfer()), SizeModel(transfer(frozen=False))
    assert frozen.file_size({}, {}).raw == thawed.file_size({}, {}).raw


# -- fits in closed form -------------------------------------------------------------------------


def test_least_squares_refits_neither_frozen_layers_nor_their_biases_and_statistics():
    model = transfer()
    model.get_layer("base").get_layer("deep").trainable = False
    wrapped = rls.wrap(model, include="*")
    prepare_for_short_recovery(wrapped)
    kernels = wrapped_kernels(wrapped)
    groupings = {kernel.path: kernel.grouping("element") for kernel in kernels}
    squares = LeastSquares(wrapped, kernels, groupings, IMAGES[0])
    for live in (Operation.KEEP, Operation.QUANTIZE, Operation.SHUFFLE):
        plan = {kernel.path: half_pruned(kernel, live).operations for kernel in kernels}
        for kernel in kernels:
            kernel.wrapper.assign_operations(kernel.spec.attribute, plan[kernel.path])
        squares.reset()
        squares.recover(plan, dict.fromkeys(plan, 8))
        for path, layer in (("stem", "stem"), ("deep", "deep"), ("norm", "norm")):
            found = wrapped.get_layer("base").get_layer(path)
            found = getattr(found, "layer", found)
            assert_equal(
                found.get_weights(), model.get_layer("base").get_layer(layer).get_weights()
            )
        head = wrapped.get_layer("hidden").layer
        assert not np.allclose(head.kernel, model.get_layer("hidden").kernel)
        assert not np.allclose(head.bias, model.get_layer("hidden").bias)
        # What the fit says a kernel will be is what the wrapper makes of it.
        for path in BASE:
            (kernel,) = (one for one in kernels if one.path == path)
            effective = kernel.wrapper.effective_kernel(kernel.spec.attribute).numpy()
            problem = squares.problems[path]
            solved = problem.solve(plan[path], 8, problem.dense)
            np.testing.assert_allclose(kernel.spec.to_matrix_numpy(effective), solved, atol=1e-6)


# -- searches ------------------------------------------------------------------------------------


def compressor(model, **options):
    options.setdefault("target", rls.Target(sparsity=0.3))
    return rls.Compressor(model, agent=DQN, buckets=3, **options)


def search(one, **options):
    options = {"finetune_epochs": 1, "episodes": 2, "finalists": 1, "verbose": 0, **options}
    return one.search(IMAGES, validation_data=MORE_IMAGES, batch_size=32, **options)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    model = transfer()
    before = model.get_weights()
    result = search(compressor(model, recovery="least_squares", directory=folder))
    assert_equal(before, model.get_weights())
    return model, result, folder


@pytest.mark.slow
def test_a_search_leaves_a_frozen_base_bit_for_bit(found):
    model, result, folder = found
    assert_equal(weights_of(result.model), weights_of(model))
    assert set(result.plan.kernels) == set(HEAD)
    assert not np.allclose(result.model.get_layer("head").bias, model.get_layer("head").bias)
    assert len(result.model.trainable_weights) == 4
    assert result.metrics["compressed"]["sparsity"] >= 0.3
    saved = json.loads((folder / "metrics.json").read_text())
    assert saved["search"]["left_alone"] == {"frozen": list(BASE)}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["arguments"]["include"], manifest["arguments"]["exclude"]) == (None, None)


@pytest.mark.slow
def test_the_summary_says_what_was_left_alone(found):
    _, result, _ = found
    lines = []
    result.summary(lines.append)
    assert "left alone (frozen): base/stem/kernel, base/deep/kernel" in lines


@pytest.mark.slow
@pytest.mark.parametrize("recovery", ["finetune", "least_squares"])
def test_a_model_that_is_frozen_as_a_whole_can_be_pruned_without_training(recovery):
    model = transfer()
    model.trainable = False
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    result = search(compressor(model, include="*", recovery=recovery))
    assert "left_alone" not in result.metrics["search"]
    plan = result.plan.kernels
    for kernel, before in zip(find_kernels(result.model), find_kernels(model), strict=True):
        live = plan[kernel.path].operations != Operation.PRUNE
        assert not live.all()
        grid = np.abs(before.matrix()).max() / 127
        expected = np.where(live, before.matrix(), 0)
        np.testing.assert_allclose(kernel.matrix().sum(), expected.sum(), atol=grid * live.size)
        if (plan[kernel.path].operations[live] == Operation.KEEP).all():
            np.testing.assert_array_equal(kernel.matrix(), expected)


@pytest.mark.slow
def test_a_run_goes_on_only_with_the_same_lists_and_frozen_layers(tmp_path, monkeypatch):
    def stop(*_, **__):
        raise StoppedError

    monkeypatch.setattr(search_module, "play_final", stop)

    def start(**options):
        model = trained()
        model.get_layer("first").trainable = options.pop("trainable", True)
        options.setdefault("exclude", "last")
        one = rls.Compressor(
            model,
            rls.Target(sparsity=0.3),
            agent=DQN,
            recovery="none",
            buckets=3,
            directory=tmp_path / "run",
            **options,
        )
        with pytest.raises(StoppedError):
            tiny_search(one, episodes=1)

    start()
    with pytest.raises(
        FileExistsRLSparsityError, match=r"exclude \(\['last'\], now \['last\*'\]\)"
    ):
        start(exclude="last*")
    with pytest.raises(FileExistsRLSparsityError, match=r"include \(None, now \['first'\]\)"):
        start(include="first")
    with pytest.raises(FileExistsRLSparsityError, match="frozen_layers"):
        start(trainable=False, include="first")
    start(exclude=["last"])


@pytest.mark.slow
def test_a_target_in_bytes_leaves_what_is_excluded_in_float(tmp_path):
    model = transfer()
    size = rls.export_tflite(model, tmp_path / "dense.tflite", "none").tflite_bytes
    one = compressor(
        model,
        target=rls.Target(tflite_bytes=size - 900),
        include=["base", "hidden"],
        exclude="stem",
        hierarchy=True,
    )
    assert one.group == "auto"
    result = search(one, finetune_epochs=0)
    assert result.metrics["compressed"]["tflite_bytes"] <= size - 900
    assert set(result.plan.kernels) == {"base/deep/kernel", "hidden/kernel"}
    stored = {tensor.kernel: tensor.dtype for tensor in result.report.tensors}
    assert (stored["base/stem/kernel"], stored["head/kernel"]) == ("float32", "float32")
    assert "int8" in (stored["base/deep/kernel"], stored["hidden/kernel"])
    assert_equal(weights_of(result.model, "head"), weights_of(model, "head"))
    stem, original = (m.get_layer("base").get_layer("stem") for m in (result.model, model))
    assert_equal(stem.get_weights(), original.get_weights())


# -- baselines -----------------------------------------------------------------------------------

QUICK = ("uniform", "erk", "global_magnitude", "lamp", "first_order", "dynamic_programming")


@pytest.mark.parametrize("name", [*QUICK, "n_m", "random_search", "hill_climbing"])
def test_baselines_change_only_what_they_may(name):
    model = trained()
    model.get_layer("last").trainable = False
    options = {"sparsity": 0.3}
    if name == "n_m":
        options = {}
    elif name in ("random_search", "hill_climbing"):
        options |= {"validation_data": VALIDATION, "evaluations": 2, "recovery": "least_squares"}
    baseline = getattr(rls.baselines, name)
    assert set(baseline(model, TRAIN, **options).kernels) == {"first/kernel"}
    if name in QUICK or name == "n_m":
        plan = baseline(model, TRAIN, **options, include=["first", "last"])
        assert set(plan.kernels) == {"first/kernel", "last/kernel"}
    with pytest.raises(ArgumentError, match="exclude='lost' matches no kernel"):
        baseline(model, TRAIN, **options, exclude="lost")


@pytest.mark.slow
def test_tfmot_prunes_only_what_it_may():
    model = trained()
    plan = rls.baselines.tfmot(model, TRAIN, sparsity=0.4, epochs=1, exclude="last")
    assert set(plan.kernels) == {"first/kernel"}
    assert plan.kernels["first/kernel"].weights_under(Operation.PRUNE) >= 0.4 * 72


# -- whole channels ------------------------------------------------------------------------------


def tied():
    """The channels of `stem` go through `depthwise` into `mix`, whose own `out` reads."""
    keras.utils.set_random_seed(4)
    model = keras.Sequential(
        [
            L.Input((6, 6, 1)),
            L.Conv2D(8, 3, name="stem"),
            L.BatchNormalization(name="norm"),
            L.DepthwiseConv2D(3, name="depthwise"),
            L.Conv2D(8, 1, activation="relu", name="mix"),
            L.GlobalAveragePooling2D(name="pool"),
            L.Dense(3, activation="softmax", name="out"),
        ],
        name="tied",
    )
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


@pytest.mark.parametrize(
    ("left", "removable"),
    [
        ("out", {"stem/kernel"}),  # it reads what mix makes
        ("mix", set()),  # it makes its own and reads those of stem
        ("depthwise", {"mix/kernel"}),  # stem's channels pass through it
        ("stem", {"mix/kernel"}),
    ],
)
def test_channels_of_what_is_left_alone_are_not_removed(left, removable):
    for frozen in (False, True):
        model = tied()
        model.get_layer(left).trainable = not frozen
        selection = KernelSelection.of(model, exclude=None if frozen else left)
        assert {unit.path for unit in removable_channels(model, selection)} == removable
    if not removable:
        with pytest.raises(
            TargetError, match=r"no channel .* 1 kernel is excluded \('mix/kernel'\)"
        ):
            rls.Compressor(model, rls.Target(macs=0.5), exclude=left)
    model.get_layer("norm").trainable = False  # has no kernel: its entries go with the channels
    selection = KernelSelection.of(model, include="*")
    found = {unit.path for unit in removable_channels(model, selection)}
    assert found == {"stem/kernel", "mix/kernel"}


@pytest.mark.slow
def test_channels_are_removed_around_what_is_left_alone():
    model = tied()
    stem = model.get_layer("stem")
    kernel = stem.kernel.numpy()
    kernel[..., 3] = 0  # a dead channel, which would go if the layer took part
    stem.kernel.assign(kernel)
    stem.bias.assign(np.zeros(8))
    selection = KernelSelection.of(model, exclude="depthwise")
    decisions = ChannelDecisions(selection=selection)
    data = training_data(IMAGES, model, batch_size=32, seed=0)
    network = CompressedNetwork(
        model,
        data,
        evaluation_data(MORE_IMAGES, model, "validation_data"),
        target=rls.Target(macs=0.9),
        decisions=decisions,
    )
    decided = {unit.path: np.zeros((1, unit.count), np.uint8) for unit in decisions.units}
    decided["mix/kernel"][0, :4] = Operation.PRUNE
    plan = network.storage.plan(network.kernels, list(decided.values()))
    evaluate_plan(network, plan)
    small, candidate = without_channels(model, decisions, Candidate.of(network, 0.0, 0, "test"))
    assert set(candidate.plan.kernels) == {"stem/kernel", "mix/kernel", "out/kernel"}
    assert small.get_layer("depthwise").depthwise_kernel.shape == (3, 3, 8, 1)
    assert_equal(
        small.get_layer("depthwise").get_weights(), model.get_layer("depthwise").get_weights()
    )
    assert small.get_layer("mix").kernel.shape == (1, 1, 8, 4)


def test_channels_of_what_is_excluded_are_not_permuted():
    model = tied()
    for exclude, held in (("mix", {"stem", "mix", "depthwise", "out"}), ("out", {"mix", "out"})):
        permuted = rls.permute_channels(model, group="block4", sparsity=0.5, exclude=exclude)
        same = {
            layer.name
            for layer in model.layers
            if layer.weights
            and all(
                np.array_equal(a, b)
                for a, b in zip(
                    layer.get_weights(),
                    permuted.get_layer(layer.name).get_weights(),
                    strict=True,
                )
            )
        }
        if exclude == "mix":
            assert held <= same
        else:
            assert "out" in same
            assert not np.array_equal(
                permuted.get_layer("mix").kernel, model.get_layer("mix").kernel
            )


# -- the list of layers, and the command ---------------------------------------------------------


@pytest.mark.slow
def test_describe_support_says_what_is_left_alone(found):
    model = found[0]
    reports = {report.path: report for report in support_report(model, exclude="head")}
    assert reports["base/stem"].kernels[0].left == "frozen"
    assert reports["head"].kernels[0].left == "excluded"
    assert reports["hidden"].kernels[0].left == ""
    lines = []
    rls.describe_support(model, lines.append, include=["hidden", "deep"])
    assert "base/stem/kernel: not included" in lines
    lines.clear()
    rls.describe_support(model, print_fn=lines.append)
    assert "base/deep/kernel: frozen, and left alone unless include names it" in lines


@pytest.mark.slow
def test_the_command_takes_lists_and_refuses_names_in_one_line(tmp_path, capsys):
    model = trained()
    model.save(tmp_path / "model.keras")
    np.savez(
        tmp_path / "data.npz",
        x_train=TRAIN[0],
        y_train=TRAIN[1],
        x_validation=VALIDATION[0],
        y_validation=VALIDATION[1],
    )
    command = ["compress", str(tmp_path / "model.keras"), "--data", str(tmp_path / "data.npz")]
    command += ["--output", str(tmp_path / "out"), "--target-sparsity", "0.3"]
    assert main([*command, "--exclude", "first", "--exclude", "losst"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "exclude='losst' matches no kernel" in error
    assert "Did you mean 'last'?" in error
    quick = ["--episodes", "1", "--finetune-epochs", "0", "--finalists", "1", "--verbose", "0"]
    assert (
        main([*command, *quick, "--include", "f*", "--include", "last", "--exclude", "last"]) == 0
    )
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert [entry["path"] for entry in plan["kernels"]] == ["first/kernel"]
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["search"]["left_alone"] == {"excluded": ["last/kernel"]}
