"""Which layers can be compressed, and why the others are skipped."""

import pytest
import tf_keras as keras
from zoo import ZOO

import rl_sparsity_tf as rls
from rl_sparsity_tf.kernels import find_kernels
from rl_sparsity_tf.support import describe_support, support_report


@pytest.fixture(scope="module")
def mixed():
    model = keras.Sequential(
        [
            keras.layers.Input((7,)),
            keras.layers.Embedding(50, 6, name="table"),
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
    assert (table.layer_class, table.kernels, table.weights) == ("Embedding", (), 300)
    assert table.reason == "class Embedding is not registered (register_layer adds it)"
    assert separable.kernels == ("depthwise_kernel", "pointwise_kernel")
    assert separable.weights == 3 * 6 + 6 * 5
    assert separable.reason == ""
    for report in (norm, flat):
        assert (report.kernels, report.weights) == ((), 0)
        assert report.reason == "has no weights of rank 2 or more"
    assert (wide.path, wide.kernels, wide.weights) == ("wide", ("kernel",), 25_000)


@pytest.mark.parametrize("name", ZOO)
def test_the_report_agrees_with_the_kernels_found_plain_or_wrapped(name):
    model = ZOO[name]()
    for each in (model, rls.wrap(model)):
        reports = support_report(each)
        listed = [f"{r.path}/{attribute}" for r in reports for attribute in r.kernels]
        assert listed == [kernel.path for kernel in find_kernels(each)]
        assert all(bool(report.reason) != bool(report.kernels) for report in reports)
    # The wrapper's masks and grids are no weights of the model.
    assert support_report(rls.wrap(model)) == support_report(model)


def test_the_table():
    inputs = keras.Input((4,))
    model = keras.Model(inputs, keras.layers.Dense(3, name="a_rather_long_name")(inputs))
    lines = []
    describe_support(model, lines.append)
    assert [line.split() for line in lines] == [
        ["layer", "class", "weights", "compressible"],
        [model.layers[0].name, "InputLayer", "0", *"no: has no weights of rank 2 or more".split()],
        ["a_rather_long_name", "Dense", "12", "kernel"],
    ]
    columns = {line.rindex(word) for line, word in zip(lines, ("comp", "no:", "kern"), strict=True)}
    assert len(columns) == 1


def test_it_is_printed(capsys, mixed):
    rls.describe_support(mixed)
    printed = capsys.readouterr().out
    assert "25,000" in printed
    assert "no: class Embedding is not registered" in printed


def test_models_that_cannot_be_wrapped_are_refused():
    with pytest.raises(rls.ModelError, match="Expected a tf_keras model"):
        describe_support("model")
    with pytest.raises(rls.ModelError, match="is not built"):
        describe_support(keras.Sequential([keras.layers.Dense(2)]))
