"""Latency tables: widths of models, interpolation, files, and how the measured pieces add up."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tf_keras as keras

from rl_sparsity_tf.channels import latency_measurement
from rl_sparsity_tf.channels.groups import find_groups, groups_of
from rl_sparsity_tf.channels.latency_measurement import converted, layer_model, measure_latency
from rl_sparsity_tf.channels.latency_table import LatencyTable, LayerLatency
from rl_sparsity_tf.channels.shrinking import shrink
from rl_sparsity_tf.channels.units import mask_channels
from rl_sparsity_tf.channels.widths import LayerWidths, Width, widths_of
from rl_sparsity_tf.errors import (
    ArgumentError,
    ExportError,
    FileExistsRLSparsityError,
    ModelError,
    NotMeasuredError,
)
from rl_sparsity_tf.export.export import convert_traced
from rl_sparsity_tf.tflite.editing import split_file
from rl_sparsity_tf.tflite.reading import read_flat_model
from rl_sparsity_tf.tflite.worker import ConversionWorker, WorkerError

layers = keras.layers


def block_model() -> keras.Model:
    """A convolution with what is fused into it, a residual sum, a depthwise layer, a classifier."""
    inputs = keras.Input((6, 6, 2))
    x = layers.Conv2D(6, 3, padding="same", use_bias=False, name="first")(inputs)
    x = layers.ReLU(name="relu")(layers.BatchNormalization(name="norm")(x))
    y = layers.Conv2D(6, 1, name="second")(layers.Dropout(0.1, name="dropout")(x))
    x = layers.ReLU(name="relu_2")(layers.Add(name="add")([x, y]))
    x = layers.Conv2D(5, 1, activation="relu", name="third")(x)
    x = layers.ZeroPadding2D(name="pad")(x)
    x = layers.DepthwiseConv2D(3, name="depthwise")(x)
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    return keras.Model(inputs, layers.Dense(3, activation="softmax", name="classes")(x))


def narrow(model: keras.Model, *shares: float) -> keras.Model:
    """The model with the first channels of every group that can be narrowed."""
    groups = [group for group in find_groups(model) if not group.frozen]
    live = {
        group.index: np.arange(group.size) < round(share * group.size)
        for group, share in zip(groups, shares, strict=True)
    }
    return shrink(mask_channels(model, live))


def entry(**changes) -> LayerLatency:
    values = {"kind": "Conv2D", "inputs": [1, 4], "outputs": [2, 6], "ms": [[1, 2], [3, 6]]}
    return LayerLatency(**(values | changes))


def table(**changes) -> LatencyTable:
    pool = entry(kind="Pool", inputs=[2, 6], outputs=[6], ms=[[0.1], [0.5]])
    values = {
        "device": "a phone",
        "quantization": "int8",
        "threads": 2,
        "xnnpack": False,
        "layers": {"conv": entry(spread=0.02), "pool": pool},
        "overhead_ms": 0.25,
        "spread": 0.01,
    }
    return LatencyTable(**(values | changes))


# Widths.


def test_what_runs_as_one_operator_is_one_entry():
    chains = {chain.path: chain for chain in LayerWidths(block_model()).chains}
    assert {path: chain.width for path, chain in chains.items()} == {
        "first": Width(2, 6),
        "second": Width(6, 6),
        "add": Width(6, 6),
        "third": Width(6, 5),
        "depthwise": Width(5, 5),
        "pool": Width(5, 5),
        "classes": Width(5, 3),
    }
    assert chains["first"].kind == (
        "Conv2D(kernel_size=3x3, same, use_bias=false) + BatchNormalization(axis=3) + ReLU() on 6x6"
    )
    assert chains["depthwise"].kind.startswith("ZeroPadding2D(")
    free = {path: (chain.inputs_free, chain.outputs_free) for path, chain in chains.items()}
    assert free["first"] == (False, True)
    assert free["classes"] == (True, False)
    assert [path for path, chain in chains.items() if chain.tied] == [*("add", "depthwise", "pool")]


def test_widths_of_masks_are_those_of_the_narrower_model():
    model = block_model()
    small = widths_of(narrow(model, 0.5, 0.4))
    assert small["first"] == Width(2, 3)
    assert small["third"] == Width(3, 2)
    found = LayerWidths(model)
    keep = np.ones(len(found.graph.frozen), bool)
    counts = {group.index: group.size for group in groups_of(found.graph) if not group.frozen}
    for (index, size), share in zip(counts.items(), (0.5, 0.4), strict=True):
        keep[found.graph.components()[index][round(share * size) :]] = False
    assert found.widths(keep) == small


def test_every_call_counts_and_what_vanishes_does_not():
    inputs = keras.Input((4, 4, 3))
    relu = layers.ReLU(name="relu")
    parts = [layers.Conv2D(n, 1, name=f"conv_{n}")(inputs) for n in (2, 5)]
    x = layers.Concatenate(name="join")([*parts, relu(relu(inputs))])
    x = layers.Dropout(0.5)(layers.Activation("linear")(x))
    nested = keras.Sequential([layers.Input((4, 4, 10)), layers.Flatten(name="flat")], name="inner")
    widths = widths_of(keras.Model(inputs, nested(x)))
    assert widths == {
        "conv_2": Width(3, 2),
        "conv_5": Width(3, 5),
        "relu": Width(3, 3),
        "join": Width(10, 10),
        "inner/flat": Width(10, 160),
    }


def test_a_layer_called_twice_is_listed_twice():
    inputs = keras.Input((4, 3))
    pool = layers.MaxPooling1D(2, name="pool")
    widths = widths_of(keras.Model(inputs, pool(pool(inputs))))
    assert widths == {"pool": Width(3, 3), "pool@2": Width(3, 3)}


def test_a_tensor_with_two_readers_is_not_fused():
    inputs = keras.Input((4, 4, 3))
    x = layers.Conv2D(5, 1, name="conv")(inputs)
    y = layers.ReLU(name="relu")(layers.Dropout(0.1)(x))
    assert list(widths_of(keras.Model(inputs, layers.Add(name="add")([x, y])))) == [
        *("conv", "relu", "add")
    ]
    assert list(widths_of(keras.Model(inputs, [x, y]))) == ["conv", "relu"]


def test_models_without_a_graph_or_a_size_are_refused():
    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(2)

        def call(self, x):
            return self.dense(x)

    own = Own()
    own(np.zeros((1, 3), np.float32))
    with pytest.raises(ModelError, match=r"Expected a functional or Sequential model, whose"):
        widths_of(own)
    inputs = keras.Input((None, None, 3))
    with pytest.raises(ModelError, match=r"\(None, None, None, 3\)\. Expected a fixed size"):
        measure_latency(keras.Model(inputs, layers.Conv2D(2, 1)(inputs)))


# The table.


def test_times_are_linear_between_widths():
    layer = entry()
    assert layer.at(1, 2) == 1
    assert layer.at(4, 6) == 6
    # A third of the way down, half of the way across: 1.5 + (4.5 - 1.5) / 3.
    assert layer.at(2, 4) == pytest.approx(2.5)
    assert layer.at(4, 1) == 3  # below the first width
    found = table().layer_ms("conv", np.array([[1, 2], [4, 4]]), np.array([2, 4]))
    assert found == pytest.approx(np.array([[1, 2.5], [3, 4.5]]))


def test_what_has_no_kernel_follows_its_input():
    found = table().layer_ms("pool", np.array([2, 3, 6]), np.array([2, 3, 6]))
    assert found == pytest.approx([0.1, 0.2, 0.5])
    single = entry(inputs=[4], outputs=[6], ms=[[7]])
    assert single.at(4, 6) == 7


def test_a_prediction_is_the_sum_of_the_layers_and_the_overhead():
    assert table().predict({"conv": Width(2, 4), "pool": Width(4, 4)}) == pytest.approx(
        0.25 + 2.5 + 0.3
    )


def test_tables_survive_their_file(tmp_path):
    path = tmp_path / "latency.json"
    table().save(path)
    loaded = LatencyTable.load(path)
    assert loaded.to_dict() == table().to_dict()
    assert loaded.to_dict()["format_version"] == 1
    widths = {"conv": Width(3, 5), "pool": Width(5, 5)}
    assert loaded.predict(widths) == table().predict(widths)
    with pytest.raises(FileExistsRLSparsityError, match="exists already"):
        table().save(path)
    table(device="another").save(path, overwrite=True)
    assert LatencyTable.load(path).device == "another"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["format_version"], 2, r"has format_version 2\. Expected 1"),
        (["device"], 3, r"device=3 cannot be used\. Expected a description"),
        (["quantization"], "int4", r"quantization='int4' is not known\. Expected one of"),
        (["threads"], 0, r"threads=0 cannot be used\. Expected 1 or more"),
        (["xnnpack"], 1, r"xnnpack=1 cannot be used\. Expected true or false"),
        (["overhead_ms"], -1, r"overhead_ms=-1 cannot be used\. Expected a number of at least 0"),
        (["spread"], float("nan"), r"cannot be read \(NaN is no finite number\)"),
        (["layers"], [], r"layers is a list\. Expected an object with an entry per layer"),
        (["layers"], {}, r"layers is empty\. Expected the times of every layer"),
        (
            ["layers", "conv"],
            {"kind": "x"},
            r"not layer 'conv' of a latency table: it is or has \[",
        ),
        (["layers", "conv", "inputs"], [4, 1], r"Layer 'conv' .*inputs=\[4\.0, 1\.0\] cannot be"),
        (
            ["layers", "conv", "inputs"],
            [0.5, 4],
            r"inputs=.*increasing whole numbers of at",
        ),
        (["layers", "conv", "outputs"], [], r"outputs cannot be used\. Expected finite numbers"),
        (["layers", "conv", "ms"], [[1, 2], [3]], r"ms cannot .* in a list of equally long lists"),
        (["layers", "conv", "ms"], [[1, 2]], r"ms has the shape \(1, 2\) .* shape \(2, 2\)"),
        (
            ["layers", "conv", "ms"],
            [[1, 2], [3, -6]],
            r"its smallest entry is -6\. Expected",
        ),
        (["layers", "conv", "kind"], 3, r"kind=3 cannot be used\. Expected a description"),
        (["layers", "conv", "spread"], "0", r"Layer 'conv' .*spread='0' cannot be used"),
    ],
)
def test_wrong_files_are_refused(tmp_path, path, value, message):
    values = table().to_dict()
    place = values
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    file = tmp_path / "latency.json"
    file.write_text(json.dumps(values))
    with pytest.raises(ArgumentError, match=message) as caught:
        LatencyTable.load(file)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("text", ["[1]", '{"format_version": 1}', "not JSON", None])
def test_foreign_and_missing_files_are_refused(tmp_path, text):
    file = tmp_path / "latency.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ArgumentError, match=r"(cannot be read|is not a latency table).*Expected"):
        LatencyTable.load(file)


def test_unknown_layers_and_widths_are_refused():
    with pytest.raises(ArgumentError, match=r"no layer 'cnv'.*Did you mean 'conv'"):
        table().layer_ms("cnv", 1, 1)
    for inputs, outputs in ((5, 2), (1, 7), (0, 2), (np.array([1, 9]), 2)):
        with pytest.raises(ArgumentError, match=r"whole numbers from 1 to 4 -> 1 to 6, the dense"):
            table().layer_ms("conv", inputs, outputs)
    with pytest.raises(ArgumentError, match=r"'pool' of the latency table is not in the model"):
        table().predict({"conv": Width(1, 2)})
    widths = {"conv": Width(1, 2), "pool": Width(2, 2), "more": Width(1, 1)}
    with pytest.raises(ArgumentError, match=r"'more' of the model is not in the latency table"):
        table().predict(widths)


def test_a_table_of_another_model_is_refused():
    def build(units=6, activation="relu", name="a"):
        first = layers.Dense(units, activation=activation, name=name)
        return keras.Sequential([layers.Input((4,)), first, layers.Dense(3, name="b")])

    chains = LayerWidths(build()).chains
    entries = {
        chain.path: entry(
            kind=chain.kind, inputs=[chain.width.inputs], outputs=[chain.width.outputs], ms=[[1]]
        )
        for chain in chains
    }
    made = table(layers=entries)
    made.check(build())
    for other in (build(units=5), build(activation="tanh")):
        with pytest.raises(ArgumentError, match=r"table has 'a' as Dense\(.*4 -> 6 .*; in model"):
            made.check(other)
    with pytest.raises(ArgumentError, match=r"'c' of the model is not in the latency table"):
        made.check(build(name="c"))


def test_the_summary_names_layers_and_device():
    lines: list[str] = []
    table().summary(lines.append)
    assert lines == [
        "conv         6.0000 ms  Conv2D",
        "pool         0.5000 ms  Pool",
        "overhead     0.2500 ms",
        "a phone; int8, 2 threads, XNNPACK off; spread of the dense model 1%",
    ]


# Measuring.


def work_of(path) -> float:
    """A made-up time that is linear in the widths: what a file's operators read and write."""
    flat = read_flat_model(path)
    total = 0.0
    for operator in flat.operators:
        made = flat.tensor(operator.subgraph, operator.outputs[0]).elements
        read = flat.tensor(operator.subgraph, operator.inputs[0]).shape[-1]
        mixes = operator.name in ("CONV_2D", "FULLY_CONNECTED")
        total += made * (1.0 + 0.1 * read) if mixes else made
    return total


def fake_times(monkeypatch, noise=0.0):
    """Replaces the clock; returns the names of the timed files."""
    timed: list[str] = []

    def time(self, paths, *, runs, **settings):
        timed.extend(str(path) for path in paths)
        factors = 1 + noise * (np.arange(runs) % 2)
        # One microsecond is what every call costs.
        return [((1 + work_of(path)) * 1e-6 * factors).tolist() for path in paths]

    monkeypatch.setattr(ConversionWorker, "time", time)
    return timed


@pytest.mark.slow
def test_pieces_add_up_to_the_model(tmp_path, monkeypatch):
    model = block_model()
    before = [value.copy() for value in model.get_weights()]
    timed = fake_times(monkeypatch)
    lines: list[str] = []
    made = measure_latency(model, quantization="none", points=1, print_fn=lines.append)
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))
    assert len(timed) == len(set(timed))
    assert lines[1] == f"Latency: timing {len(timed)} files"
    assert lines[-1].endswith("spread of the dense model 0%")
    assert list(made.layers) == list(widths_of(model))
    made.check(model)
    small = narrow(model, 0.5, 0.4)
    file = convert_traced(small, tmp_path, None)
    assert made.predict(widths_of(small)) == pytest.approx(1e-3 * (1 + work_of(file)), rel=1e-3)
    assert made.predict(widths_of(small)) < 0.7 * made.predict(widths_of(model))


@pytest.mark.parametrize(
    ("quantization", "operators"),
    [("none", [["CONV_2D"]]), ("int8", [["CONV_2D"]]), ("plan", [["DEQUANTIZE", "CONV_2D"]])],
)
def test_pieces_are_stored_as_the_model_will_be(quantization, operators):
    inputs = keras.Input((4, 4, 3))
    (chain,) = LayerWidths(keras.Model(inputs, layers.Conv2D(8, 3, name="conv")(inputs))).chains
    builders = [layer_model(chain, Width(3, 8)), layer_model(chain, Width(3, 8))]
    with converted(builders, None, quantization) as files:
        for file in files:
            flat = read_flat_model(file)
            assert [[operator.name for operator in flat.operators]] == operators
            kernels = [t for t in flat.tensors if t.constant and len(t.shape) == 4]
            assert [kernel.dtype for kernel in kernels] == [
                "float32" if quantization == "none" else "int8"
            ]


def test_equal_layers_are_timed_once(monkeypatch):
    def build(count):
        model = keras.Sequential([layers.Input((5, 5, 4))])
        for _ in range(count):
            model.add(layers.DepthwiseConv2D(3, padding="same"))
        return model

    counts = []
    for count in (1, 3):
        timed = fake_times(monkeypatch)
        measure_latency(build(count), quantization="none")
        counts.append(len(timed))
    assert counts[0] == counts[1]


def test_models_of_nothing_but_a_call_take_the_call(monkeypatch):
    monkeypatch.setattr(
        ConversionWorker, "time", lambda self, paths, *, runs, **_: [[1e-6] * runs for _ in paths]
    )
    model = keras.Sequential([layers.Input((8,)), layers.Dense(4)])
    made = measure_latency(model, quantization="none", points=1)
    assert made.predict(widths_of(model)) == pytest.approx(1e-3)


def test_times_that_scatter_are_no_table(monkeypatch):
    model = keras.Sequential([layers.Input((8,)), layers.Dense(4), layers.Dense(2)])
    fake_times(monkeypatch, noise=0.3)
    with pytest.raises(NotMeasuredError, match=r"scatter by \d+%.*at most 10%: measure again"):
        measure_latency(model, quantization="none", points=1)


def test_what_litert_cannot_run_is_an_export_error(monkeypatch):
    def time(self, paths, **settings):
        raise WorkerError("time failed", reasons[0], "model_0.tflite: no such operator.")

    model = keras.Sequential([layers.Input((8,)), layers.Dense(4)])
    monkeypatch.setattr(ConversionWorker, "time", time)
    reasons = ["RuntimeError"]
    with pytest.raises(
        ExportError, match=r"by itself: model_0.tflite: no such operator\. Expected"
    ):
        measure_latency(model, quantization="none", points=1)
    reasons = ["died"]
    with pytest.raises(WorkerError, match="time failed"):
        measure_latency(model, quantization="none", points=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quantization": "float16"}, r"quantization='float16' is not known"),
        ({"threads": 0}, r"threads=0 cannot be used\. Expected a whole number of at least 1"),
        ({"points": 0}, r"points=0 cannot be used\. Expected a whole number of at least 1"),
        ({"runs": 4}, r"runs=4 cannot be used\. Expected a whole number of at least 5"),
        ({"xnnpack": "on"}, r"xnnpack='on' cannot be used\. Expected True or False"),
    ],
)
def test_arguments_are_checked(settings, message):
    with pytest.raises(ArgumentError, match=message):
        measure_latency(keras.Sequential([layers.Input((8,)), layers.Dense(4)]), **settings)


@pytest.mark.slow
def test_a_table_is_measured_in_litert(monkeypatch):
    # A busy machine must not fail the test.
    monkeypatch.setattr(latency_measurement, "LARGEST_SPREAD", np.inf)
    model = keras.Sequential([layers.Input((8,)), layers.Dense(16, name="a"), layers.Dense(2)])
    made = measure_latency(model, points=1, runs=5)
    assert made.layers["a"].outputs.tolist() == [1, 3, 8, 9, 16]
    assert made.layers["a"].ms.shape == (1, 5)
    assert np.isfinite(made.layers["a"].ms).all()
    assert made.predict(widths_of(model)) > 0
    assert "cores" in made.device


def test_steps_are_seen_from_both_sides():
    assert latency_measurement._steps(20) == [1, 3, 8, 9, 16, 17, 20]
    assert latency_measurement._steps(5) == [1, 5]
    wide = latency_measurement._steps(1024)
    assert wide[:4] == [1, 3, 8, 9]
    assert wide[-1] == 1024
    assert len(wide) < 60


def test_steps_carry_over_to_narrow_layers():
    def time(width):
        # Outputs cost in steps of 8, inputs by themselves, both together and neither.
        return 1.0 + 0.5 * width.inputs + (2 + 0.25 * width.inputs) * -(-width.outputs // 8)

    model = keras.Sequential([layers.Input((40,)), layers.Dense(24), layers.Dense(32)])
    model.add(layers.Dense(2))
    grid = latency_measurement._grid(LayerWidths(model).chains[1], 2)
    made = grid.filled({width: time(width) for width in grid.measured()})
    assert len(grid.measured()) < made.size
    expected = [[time(Width(i, o)) for o in grid.outputs] for i in grid.inputs]
    assert made == pytest.approx(np.array(expected))


def test_a_file_is_taken_apart_into_its_models(tmp_path):
    inputs = [keras.Input((4,)), keras.Input((4,)), keras.Input((6, 6, 2)), keras.Input((3,))]
    outputs = [
        layers.Add()(inputs[:2]),
        layers.Conv2D(5, 3, activation="relu")(inputs[2]),
        layers.Dropout(0.5)(inputs[3]),
    ]
    file = convert_traced(keras.Model(inputs, outputs), tmp_path, None)
    first, second, third = split_file(file, [2, 1, 1])
    assert third is None
    names = [[op.name for op in read_flat_model(path).operators] for path in (first, second)]
    assert names == [["ADD"], ["CONV_2D"]]
    for path, count in ((first, 2), (second, 1)):
        graph = read_flat_model(path).graphs[0]
        assert len(graph.inputs) == count
        assert len(graph.outputs) == 1
    kernel = next(t for t in read_flat_model(second).tensors if t.constant and len(t.shape) == 4)
    whole = next(t for t in read_flat_model(file).tensors if t.constant and len(t.shape) == 4)
    assert np.array_equal(kernel.raw, whole.raw)


def test_loops_and_joins_run_by_themselves():
    inputs = keras.Input((3, 4), batch_size=1)
    x = layers.GRU(5, return_sequences=True, name="gru")(inputs)
    x = layers.Concatenate(name="join")([x, layers.Conv1D(3, 1, name="conv")(x)])
    model = keras.Model(inputs, layers.Flatten(name="flat")(x))
    chains = {chain.path: chain for chain in LayerWidths(model).chains}
    builders = [
        layer_model(chains["gru"], chains["gru"].width),
        layer_model(chains["join"], Width(7, 7)),
        layer_model(chains["conv"], Width(4, 2)),
    ]
    with converted(builders, 1, "none") as files:
        loop, join, conv = (read_flat_model(file) for file in files)
        seconds = ConversionWorker.time
        with ConversionWorker() as worker:
            samples = seconds(worker, files, index_limits=[2] * 3, runs=5)
    assert np.min(samples) > 0
    assert "WHILE" in {operator.name for operator in loop.operators}
    assert [join.tensor(0, index).shape for index in join.graphs[0].inputs] == [
        (1, 3, 4),
        (1, 3, 3),
    ]
    assert [conv.tensor(0, index).shape for index in conv.graphs[0].outputs] == [(1, 3, 2)]
