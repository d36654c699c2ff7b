"""Names and order of a file's inputs and outputs, and rows given by name."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras
from ai_edge_litert.interpreter import Interpreter

import rl_sparsity_tf as rls
from rl_sparsity_tf.errors import ArgumentError
from rl_sparsity_tf.export.export import convert_traced

layers = keras.layers
RNG = np.random.default_rng(0)


def ports(path):
    """The file's input and output names in its order, and the signature's runner."""
    interpreter = Interpreter(str(path))
    runner = interpreter.get_signature_runner()
    found = []
    for by_name, details in (
        (runner.get_input_details(), interpreter.get_input_details()),
        (runner.get_output_details(), interpreter.get_output_details()),
    ):
        order = [int(one["index"]) for one in details]
        found.append(sorted(by_name, key=lambda name: order.index(int(by_name[name]["index"]))))
    return found[0], found[1], runner


def three_inputs():
    return [keras.Input((s,), name=n) for s, n in ((2, "Zeta"), (3, "alpha"), (4, "b/mid one"))]


def many():
    zeta, alpha, mid = three_inputs()
    together = layers.Concatenate()([zeta, alpha, mid])
    outputs = [
        layers.Dense(size, name=f"{name}_out")(x)
        for size, name, x in ((5, "z", together), (6, "a", zeta), (7, "b", mid))
    ]
    return keras.Model([zeta, alpha, mid], outputs)


def dicts():
    zeta, alpha, _ = three_inputs()
    first = layers.Dense(2, name="first")(layers.Concatenate()([zeta, alpha]))
    second = layers.Dense(3, name="second")(zeta)
    return keras.Model({"y": zeta, "x": alpha}, {"one": first, "Another": second})


def nested():
    x = keras.Input((2,), name="inside")
    inner = keras.Model(x, [layers.Dense(2)(x), layers.Dense(3)(x)], name="inner")
    outer = keras.Input((2,), name="outer")
    first, second = inner(outer)
    return keras.Model(outer, [second, first])


def states():
    x = keras.Input((3, 2), name="steps")
    return keras.Model(x, layers.LSTM(4, return_state=True, name="lstm")(x))


def copies():
    x = keras.Input((2,), name="x")
    y = layers.Dense(2, name="y")(x)
    return keras.Model(x, [y, layers.Dense(3, name="z")(x), y, x])


def eleven():
    inputs = [keras.Input((size + 1,), name=f"i{size}") for size in range(11)]
    return keras.Model(inputs, [layers.Dense(1, name=f"o{n}")(x) for n, x in enumerate(inputs)])


class Dicts(keras.Model):
    def __init__(self):
        super().__init__()
        self.one, self.two = layers.Dense(3), layers.Dense(2)

    def call(self, inputs):
        return {"late": self.one(inputs["b"]), "early": self.two(inputs["a"]), "none": None}


class Pairs(keras.Model):
    def __init__(self):
        super().__init__()
        self.one, self.two = layers.Dense(3), layers.Dense(2)

    def call(self, inputs):
        return self.one(inputs[0]), self.two(inputs[1])


def called(model, example):
    model(example)
    return model


MODELS = {
    "many": (many, ["Zeta", "alpha", "b/mid one"], ["z_out", "a_out", "b_out"]),
    "dicts": (dicts, ["x", "y"], ["Another", "one"]),
    "nested": (nested, ["outer"], ["inner", "inner_1"]),
    "states": (states, ["steps"], ["lstm", "lstm_1", "lstm_2"]),
    "copies": (copies, ["x"], ["y", "z", "y_1", "x"]),
    "sequential": (
        lambda: keras.Sequential([layers.Input((4,), name="x"), layers.Dense(2, name="y")]),
        ["x"],
        ["y"],
    ),
    "subclassed, dicts": (
        lambda: called(Dicts(), {"b": tf.ones((1, 3)), "a": tf.ones((1, 2))}),
        ["a", "b"],
        ["early", "late"],
    ),
    "subclassed": (
        lambda: called(Pairs(), [tf.ones((1, 3)), tf.ones((1, 2))]),
        ["input_1", "input_2"],
        ["output_1", "output_2"],
    ),
    "more than ten": (eleven, [f"i{n}" for n in range(11)], [f"o{n}" for n in range(11)]),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_signature_has_the_names_and_the_order_of_keras(name, tmp_path):
    build, inputs, outputs = MODELS[name]
    given, made, runner = ports(convert_traced(build(), tmp_path, 1 if name == "states" else None))
    assert given == inputs
    assert made == outputs or name == "copies"
    assert sorted(runner.get_output_details()) == sorted(outputs)


def every(seed, *names):
    shapes = {"Zeta": 2, "alpha": 3, "b/mid one": 4}
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=(32, shapes[name])).astype(np.float32) for name in names}


@pytest.fixture(scope="module")
def model():
    model = many()
    for layer in model.layers:
        if layer.weights:
            kernel = RNG.normal(size=layer.kernel.shape)
            kernel[0] = 0  # rows of zeros, so that something can be stored sparse
            layer.kernel.assign(kernel)
    return model


def plan_for(model):
    return rls.baselines.uniform(model, sparsity=0.5, quantize=True)


HOW = {
    "float": {"quantization": "none", "formats": "raw"},
    "int8": {"quantization": "int8"},
    "plan": {"quantization": "plan"},
    "static": {"quantization": "plan", "compute": "static"},
}


@pytest.mark.parametrize("how", HOW)
def test_rows_go_by_name_through_every_way_to_store(model, how, tmp_path):
    rows = every(1, "Zeta", "alpha", "b/mid one")
    path = tmp_path / "m.tflite"
    pruned = rls.strip(rls.wrap(model, plan_for(model)))
    rls.export_tflite(
        pruned, path, plan=plan_for(model), representative_data=rows, tolerance=0.5, **HOW[how]
    )
    given, made, _ = ports(path)
    assert (given, made) == MODELS["many"][1:]
    assert "Zeta" in Interpreter(str(path)).get_input_details()[0]["name"]
    expected = pruned.predict(rows, verbose=0)
    backwards = dict(reversed(rows.items()))
    by_name = rls.predict_tflite(path, backwards)
    in_order = rls.predict_tflite(path, [rows[name] for name in given])
    for wanted, one, other in zip(expected, by_name, in_order, strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.shape == wanted.shape
        assert np.corrcoef(one.ravel(), wanted.ravel())[0, 1] > 0.99
    if how == "plan":
        for wrong, message in (
            ({**rows, "Alpha": rows["alpha"]}, r"'Alpha', which is no input.*mean 'alpha'\?$"),
            (every(1, "alpha", "Zeta"), r"lacks \['b/mid one'\]\. Expected a dict .*\['Zeta', 'al"),
            ({}, r"inputs has the shapes \[\]\. Expected at least one row"),
        ):
            with pytest.raises(ArgumentError, match=message):
                rls.predict_tflite(path, wrong)
