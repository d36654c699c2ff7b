"""Which layers can be compressed, and why the others are skipped."""

import numpy as np
import pytest
import tf_keras as keras
from zoo import ZOO

import rl_sparsity_tf as rls
from rl_sparsity_tf.layers.kernel_spec import KernelSpec
from rl_sparsity_tf.layers.kernels import find_kernels
from rl_sparsity_tf.layers.support import describe_support, stored_types, support_report
from rl_sparsity_tf.layers.wrapping import wrappers_of


class Table(keras.layers.Embedding):
    """A subclass of a known class, which is not known itself."""


class Hidden(keras.layers.Layer):
    """Keeps a layer where no attribute leads."""

    def __init__(self):
        super().__init__(name="hidden")
        inner = keras.layers.Dense(3, name="inner")
        self._self_tracked_trackables.append(inner)
        self.work = lambda x: inner(x)

    def call(self, x):
        return self.work(x)


class Own(keras.layers.Layer):
    """A kernel of its own beside a layer with one."""

    def build(self, input_shape):
        self.matrix = self.add_weight(name="matrix", shape=(4, 4))
        self.dense = keras.layers.Dense(2)

    def call(self, x):
        return self.dense(x @ self.matrix)


@pytest.fixture(scope="module")
def mixed():
    model = keras.Sequential(
        [
            keras.layers.Input((7,)),
            Table(50, 6, name="table"),
            keras.layers.SeparableConv1D(5, 3, name="separable"),
            keras.layers.BatchNormalization(name="norm"),
            keras.layers.Flatten(name="flat"),
            keras.layers.Dense(1000, name="wide"),
        ]
    )
    model.compile("sgd", "mse")
    return model


def test_every_layer_is_listed_with_its_kernels_or_a_reason(mixed):
    table, separable, norm, flat, wide = support_report(mixed)
    assert (table.layer_class, table.kernels, table.weights) == ("Table", (), 300)
    assert table.reason == (
        "class Table derives from Embedding but may use its weights otherwise "
        "(register_layer(Table, ...) adds it)"
    )
    assert [kernel.path for kernel in separable.kernels] == [
        "separable/depthwise_kernel",
        "separable/pointwise_kernel",
    ]
    assert separable.weights == 3 * 6 + 6 * 5
    assert separable.reason == ""
    for report in (norm, flat):
        assert (report.kernels, report.weights) == ((), 0)
        assert report.reason == "has no weights of rank 2 or more"
    (kernel,) = wide.kernels
    assert (wide.path, kernel.path, wide.weights) == ("wide", "wide/kernel", 25_000)
    assert (kernel.shape, kernel.layout, kernel.scales) == ((25, 1000), "io", "per output")
    assert kernel.stored == {
        "plan": "int8",
        "dynamic": "int8",
        "int8": "int8",
        "float16": "float16",
    }
    # The converter's dynamic range leaves small tensors as they are.
    assert separable.kernels[0].stored["dynamic"] == "float32"


@pytest.mark.parametrize("name", ZOO)
def test_the_report_agrees_with_the_kernels_found_plain_or_wrapped(name):
    model = ZOO[name]()
    for each in (model, rls.wrap(model)):
        reports = support_report(each)
        listed = [kernel.path for report in reports for kernel in report.kernels]
        assert listed == [kernel.path for kernel in find_kernels(each)]
        assert all(bool(report.reason) != bool(report.kernels) for report in reports)
    # The wrapper's masks and grids are no weights of the model.
    assert support_report(rls.wrap(model)) == support_report(model)


def test_reasons():
    inputs = keras.Input((4,))
    model = keras.Model(inputs, Own(name="own")(Hidden()(keras.layers.Dense(4)(inputs)) @ W))
    reports = {report.path: report for report in support_report(model)}
    assert reports["hidden"].reason == "its layers ['inner'] are in no attribute of it"
    assert reports["own"].reason == "16 of its weights are in no known kernel"
    assert [kernel.path for kernel in reports["own"].kernels] == ["own/dense/kernel"]


W = np.ones((3, 4), np.float32)


def test_kernels_registered_by_the_user_are_not_measured():
    spec = KernelSpec("kernel", "io")
    assert stored_types(spec, 5000) == {"plan": "int8", "dynamic": "?", "int8": "?", "float16": "?"}


def test_the_gates_of_an_lstm_are_tensors_by_themselves():
    inputs = keras.Input((5, 16))
    model = keras.Model(inputs, keras.layers.LSTM(32)(inputs))
    kernel, recurrent = support_report(model)[-1].kernels
    assert (kernel.shape, kernel.scales) == ((16, 128), "per output")
    assert kernel.stored["dynamic"] == "float32"  # 512 elements in a gate
    assert recurrent.stored["dynamic"] == "int8"  # 1,024
    assert kernel.stored["plan"] == "int8"


def test_it_is_printed(capsys, mixed):
    rls.describe_support(mixed)
    lines = capsys.readouterr().out.splitlines()
    (row,) = [line for line in lines if "wide/kernel" in line]
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    assert cells == [
        *("wide/kernel", "Dense", "25,000", "25i 1000o", "per output"),
        *("int8", "int8", "int8", "float16"),
    ]
    assert not [line for line in lines if "norm" in line]
    assert lines[-2] == "2 layers without kernels left out (show_all=True lists them)"
    assert lines[-1].startswith("table: class Table derives from Embedding")
    (skipped,) = [line for line in lines if "skipped" in line]
    assert "table" in skipped  # it has weights
    assert "300" in skipped


def test_layers_without_kernels_are_listed_on_request(mixed):
    lines = []
    rls.describe_support(mixed, lines.append, show_all=True)
    assert [line for line in lines if "skipped" in line and "norm" in line]
    assert not [line for line in lines if "left out" in line]


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_the_table_fits_the_terminal_and_cuts_no_number(columns, mixed, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = []
    rls.describe_support(mixed, lines.append)
    table = lines[: next(i for i, line in enumerate(lines) if "left out" in line)]
    assert max(map(len, table)) <= columns
    text = "".join(lines)
    assert "25,000" in text
    assert "\N{HORIZONTAL ELLIPSIS}" not in text


def test_what_is_the_same_everywhere_is_said_once_where_there_is_no_room(monkeypatch):
    model = keras.Sequential([keras.layers.Input((40,), name="in")])
    for i in range(3):
        model.add(keras.layers.Dense(40, name=f"a_layer_of_a_long_name_{i}"))
    monkeypatch.setenv("COLUMNS", "75")
    lines = []
    rls.describe_support(model, lines.append)
    assert (
        "the same for all (class: Dense, weights: 1,600, axes: 40i 40o, scale: per output"
        in (lines[-1])
    )
    assert sum("a_layer_of_a_long_name_" in line for line in lines) == 3


def test_models_that_cannot_be_wrapped_are_refused():
    with pytest.raises(rls.ModelError, match="Expected a tf_keras model"):
        describe_support("model")
    with pytest.raises(rls.ModelError, match="is not built"):
        describe_support(keras.Sequential([keras.layers.Dense(2)]))


WRONG = {
    "misspelt": (
        {"kernal": "io"},
        "'kernal', which register_layer names, is no attribute of it. Expected one of 'kernel'. "
        "Did you mean 'kernel'?",
    ),
    "a number": (
        {"units": "io"},
        "'units', which register_layer names, is no weight of rank 2 or more",
    ),
    "a vector": (
        {"bias": "io"},
        "'bias', which register_layer names, is no weight of rank 2 or more",
    ),
    "axes": (
        {"kernel": "iio"},
        "'kernel' has 2 axes, the layout 'iio' that register_layer was given has 3",
    ),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("nested", [False, True])
def test_a_registration_that_does_not_fit_is_named_and_passed_over(case, nested):
    class Mine(keras.layers.Dense):
        pass

    layouts, expected = WRONG[case]
    rls.register_layer(Mine, **layouts)
    layer = Mine(4, name="mine")
    if nested:
        layer = keras.layers.TimeDistributed(layer, name="mine")
        expected = f"'layer/{expected[1:]}"
    steps = [layer, keras.layers.Flatten(), keras.layers.Dense(3, name="last")]
    model = keras.Sequential([keras.layers.Input((2, 5)), *steps])
    lines = []
    rls.describe_support(model, print_fn=lines.append)
    assert f"mine: {expected}" in lines
    (wrapper,) = wrappers_of(rls.wrap(model))
    assert wrapper.name == "last"


def test_a_registration_that_fits_in_part_is_used_as_far_as_it_does():
    class Mine(keras.layers.Dense):
        pass

    rls.register_layer(Mine, kernel="io", table="io")
    model = keras.Sequential([keras.layers.Input((5,)), Mine(4, name="mine")])
    lines = []
    rls.describe_support(model, print_fn=lines.append)
    assert any(line.startswith("mine: 'table', which register_layer names,") for line in lines)
    rls.strip(rls.wrap(model))(np.zeros((1, 5)))
    (wrapper,) = wrappers_of(rls.wrap(model))
    assert list(wrapper.kernels) == ["kernel"]
