"""What every layer loses alone: closed forms on linear layers, tables, files, errors."""

import csv
import sys

import numpy as np
import pytest
import tf_keras as keras
from tiny_search import TRAIN, VALIDATION, trained

import rl_sparsity_tf as rls
from rl_sparsity_tf.layers.operations import grid_scale

L = keras.layers
WEIGHTS = np.array([[1.0, -2.0], [3.0, 4.0], [-5.0, 6.0], [7.0, 8.0]], np.float32)
# Columns of mean 0 that are orthogonal: what lives is fitted best as it is.
SIGNS = np.array([[1]])
for _ in range(3):
    SIGNS = np.block([[SIGNS, SIGNS], [SIGNS, -SIGNS]])
X = np.tile(SIGNS[:, 1:5], (16, 1)).astype(np.float32)
Y = X @ WEIGHTS
DATA = (X, Y)


def linear(weights=WEIGHTS):
    model = keras.Sequential([L.Input((len(weights),)), L.Dense(weights.shape[1], name="linear")])
    model.set_weights([weights, np.zeros(weights.shape[1], np.float32)])
    model.compile("sgd", "mse")
    return model


def of_least(share):
    """Energy of the least weights, as a share of that of all, when so many live."""
    squares = np.sort(np.square(WEIGHTS), axis=None)
    return float(squares[: squares.size - round(share * squares.size)].sum() / squares.sum())


def test_the_error_of_a_linear_layer_is_the_energy_of_what_is_pruned():
    found = rls.sensitivity(linear(), DATA, densities=(1.0, 0.75, 0.5, 0.25), bits=(32,))
    assert [row.live for row in found.rows] == [8, 6, 4, 2]
    expected = [of_least(row.density) for row in found.rows]
    assert [row.error for row in found.rows] == pytest.approx(expected, rel=1e-2, abs=1e-5)
    assert all(row.fitted and row.metric is None for row in found.rows)


def test_the_loss_with_one_layer_changed_is_that_energy_per_output():
    found = rls.sensitivity(linear(), DATA, DATA, densities=(0.5, 0.25), bits=(32,), evaluate=True)
    energy = float(np.square(WEIGHTS).sum())
    expected = [of_least(row.density) * energy / 2 for row in found.rows]
    assert [row.metric for row in found.rows] == pytest.approx(expected, rel=1e-2)
    assert (found.metric, found.dense_metric) == ("loss", pytest.approx(0.0, abs=1e-6))


def test_inputs_that_say_the_same_cost_nothing_after_the_fit():
    twice = np.repeat(X[:, :2], 2, axis=1)
    model = linear(np.array([[1.0], [2.0], [3.0], [1.5]], np.float32))
    data = (twice, model.predict(twice, verbose=0))
    half, one = rls.sensitivity(model, data, densities=(0.5, 0.25), bits=(32,)).rows
    # The larger of each pair carries both: without a fit that would be (1 + 2.25) / 16.25.
    assert half.error < 0.01
    assert one.error > 0.3


def test_rounding_adds_a_twelfth_of_the_squared_step():
    dense = rls.sensitivity(linear(), DATA, densities=(1.0,), bits=(32, 8)).rows
    assert [row.bits for row in dense] == [32, 8]
    step = grid_scale(WEIGHTS, np.float32(127.0), True, None).numpy()
    noise = np.square(np.broadcast_to(step, WEIGHTS.shape)).sum() / 12
    assert dense[1].error - dense[0].error == pytest.approx(
        noise / np.square(WEIGHTS).sum(), rel=1e-2
    )


@pytest.fixture(scope="module")
def found():
    return rls.sensitivity(
        trained(), TRAIN, VALIDATION, densities=(1, 0.5, 0.1), bits=(4, 32, 8), evaluate=True
    )


def test_rows_are_by_kernel_precision_and_density(found):
    keys = [(row.kernel, row.bits, row.density) for row in found.rows]
    assert keys == [
        (kernel, bits, density)
        for kernel in ("first/kernel", "last/kernel")
        for bits in (32, 8, 4)
        for density in (1.0, 0.5, 0.1)
    ]
    errors = {key: row.error for key, row in zip(keys, found.rows, strict=True)}
    for (kernel, bits, density), error in errors.items():
        assert error <= errors[kernel, bits, 0.1]
        assert error >= errors[kernel, 32, density] * (1 - 1e-9)
    assert found.rows[0].metric == pytest.approx(found.dense_metric)
    assert min(row.metric for row in found.rows) < found.dense_metric


def test_the_errors_do_not_depend_on_whether_the_network_is_evaluated(found):
    cheap = rls.sensitivity(trained(), TRAIN, densities=(1, 0.5, 0.1), bits=(4, 32, 8))
    assert [row.error for row in cheap.rows] == pytest.approx([row.error for row in found.rows])
    assert cheap.metric is None


def test_the_model_is_not_changed_and_twice_is_the_same():
    model = trained()
    before = [weight.copy() for weight in model.get_weights()]
    options = {"densities": (0.5, 0.1), "evaluate": True}
    one, two = (rls.sensitivity(model, TRAIN, VALIDATION, **options) for _ in range(2))
    assert one == two
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_tables_and_files(found, tmp_path):
    lines = []
    found.summary(lines.append)
    text = "\n".join(lines)
    for title in ("Error of the outputs, floats", "Error of the outputs, 8 bits", "4 bits"):
        assert title in text
    assert text.count("first/kernel") == 6
    assert lines[-1].endswith(f"of the dense network: {found.dense_metric:.4f}")
    path = tmp_path / "found.csv"
    found.to_csv(path)
    with path.open(newline="") as file:
        read = list(csv.DictReader(file))
    assert [float(row["error"]) for row in read] == [row.error for row in found.rows]
    assert read[0]["kernel"] == "first/kernel"
    with pytest.raises(rls.RLSparsityError, match=r"found\.csv"):
        found.to_csv(path)
    found.to_csv(path, overwrite=True)


def test_layers_that_cannot_be_fitted_are_marked():
    model = keras.Sequential([L.Input((5,), dtype="int32"), L.Embedding(9, 4, name="words")])
    found = rls.sensitivity(
        model, (np.arange(40).reshape(8, 5) % 9, np.zeros((8, 5, 4))), bits=(32,), densities=(0.5,)
    )
    (row,) = found.rows
    assert not row.fitted
    squares = np.sort(np.square(model.get_weights()[0]), axis=None)
    assert row.error == pytest.approx(squares[:18].sum() / squares.sum(), rel=1e-5)
    lines = []
    found.summary(lines.append)
    assert lines[-1].startswith("* not fitted")
    assert any("words/embeddings *" in line for line in lines)


def test_it_is_drawn_on_axes_that_are_given(found):
    drawn = []

    class Axes:
        def plot(self, x, y, style, label):
            drawn.append((label, list(x), list(y), style))

        def __getattr__(self, name):
            return lambda *arguments: None

    axes = Axes()
    assert found.plot(axes) is axes
    assert [label for label, *_ in drawn][:3] == [
        "first/kernel",
        "first/kernel, 8 bits",
        "first/kernel, 4 bits",
    ]
    assert drawn[0][2] == [row.error for row in found.rows[:3]]
    assert drawn[0][1][0] == 1.0


def test_without_matplotlib_it_says_what_to_install(found, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(rls.RLSparsityError, match=r"pip install \"rl_sparsity_tf\[plots\]\""):
        found.plot()


WRONG = {
    "densities": ({"densities": (0.5, 0.0)}, r"densities=\(0\.5, 0\.0\) cannot be used\. Expected"),
    "no densities": ({"densities": ()}, r"densities=\(\) cannot be used"),
    "percent": ({"densities": 50}, r"densities=50 cannot be used\. Expected numbers above 0"),
    "bits": ({"bits": (16,)}, r"bits=\(16,\) cannot be used\. Expected some of 32, 8 and 4"),
    "no validation": ({"evaluate": True}, r"no validation_data.*Pass validation_data=\(x, y\)"),
    "unused": ({"validation_data": DATA}, r"evaluate=True was not.*Pass both, or neither"),
    "no data": ({"data": None}, r"was given no data.*Pass data=\(x, y\)"),
    "flag": ({"evaluate": "yes"}, r"evaluate='yes' cannot be used\. Expected True or False"),
    "group": ({"group": "blok4"}, r"group='blok4' is not known\. .*Did you mean 'block4'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_refused(case):
    options, pattern = WRONG[case]
    with pytest.raises(rls.RLSparsityError, match=pattern):
        rls.sensitivity(linear(), **{"data": DATA, **options})
