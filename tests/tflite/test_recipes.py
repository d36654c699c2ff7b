"""The plan's precision in the file, kernel by kernel, and the recipe that reproduces it."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import tf_keras as keras
import zoo

import rl_sparsity_tf as rls
from rl_sparsity_tf.errors import ArgumentError, FileExistsRLSparsityError, VerificationError
from rl_sparsity_tf.export import export, stored_weights
from rl_sparsity_tf.export.export import export_tflite, predict_tflite
from rl_sparsity_tf.export.matching import kernel_variables, match_kernels
from rl_sparsity_tf.export.verification import TOLERANCES, tolerance_for
from rl_sparsity_tf.layers.plan import KernelRule
from rl_sparsity_tf.tflite import recipes
from rl_sparsity_tf.tflite.integer_storage import (
    IntegerForm,
    integer_form,
    pack_integers,
    to_integers,
)
from rl_sparsity_tf.tflite.reading import read_flat_model, read_tensors
from rl_sparsity_tf.tflite.recipes import apply_recipe, operators_between, quantize_file, scope_of
from rl_sparsity_tf.tflite.worker import WorkerError, shared_worker

layers = keras.layers


def stripped(model, bits=8, **exceptions):
    """A model on the grid, as a search ends with it, and its plan: 40 % zeros."""
    rules = [KernelRule(path, 0.4) for path in exceptions.get("floats", ())]
    plan = rls.CompressionPlan([*rules, KernelRule("*", 0.4, quantize=True, bits=bits)])
    return rls.strip(rls.wrap(model, plan)), plan


def names_in(path):
    return [operator.name for operator in read_flat_model(path).operators]


def convolutions():
    """Every kind of operator between kernels, and a kernel of every static operator."""
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(8, 3, padding="same", activation="relu", name="first")(inputs)
    pooled = layers.MaxPooling2D()(x)
    x = layers.Conv2D(8, 3, padding="same", name="second")(pooled)
    x = layers.ReLU()(layers.Add()([x, pooled]))
    x = layers.Flatten()(layers.DepthwiseConv2D(3, name="depthwise")(x))
    return keras.Model(inputs, layers.Dense(5, name="last")(x))


def assert_bits_are_kept(path, model, bits, scaled=()):
    kernels = {name: np.asarray(variable) for name, variable in kernel_variables(model).items()}
    for name, held in match_kernels(kernels, read_tensors(path)).items():
        assert held, name
        for match in held:
            assert match.tensor.dtype == f"int{bits}", name
            values = match.values(kernels[name]).astype(np.float32)
            wanted = match.part(kernels[name])
            if name in scaled:  # a batch normalisation is folded in
                assert not values[wanted == 0].any()
            else:
                np.testing.assert_array_equal(values, wanted, err_msg=name)


# -- the weights in the file are those that were fine-tuned ---------------------------------------


FOLDED = {"residual": ("conv2d/kernel", "conv2d_1/kernel")}
EXACT = [
    *((name, 8, False) for name in zoo.ZOO),
    *((name, 4, False) for name in ("separable", "transposed")),
    *((name, 8, False) for name in ("words", "conv_lstm", "volumes", "signals")),
    ("attention", 8, False),
    ("transformer", 4, False),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "bits", "unroll"), EXACT)
def test_integers_stand_for_the_fine_tuned_weights_bit_for_bit(name, bits, unroll, tmp_path):
    keras.backend.reset_uids()  # names, and so paths, start from the beginning
    model, plan = stripped({**zoo.ZOO, **zoo.RECURRENT_ETC}[name](), bits)
    path = tmp_path / "m.tflite"
    export_tflite(model, path, plan=plan, unroll=unroll)
    assert_bits_are_kept(path, model, bits, FOLDED.get(name, ()))


@pytest.mark.parametrize("compute", ["dynamic", "static"])
def test_computing_on_integers_changes_no_weight(compute, tmp_path):
    model, plan = stripped(convolutions())
    path = tmp_path / "m.tflite"
    x = zoo.inputs_for(model, 40)
    export_tflite(model, path, plan=plan, compute=compute, representative_data=x)
    assert_bits_are_kept(path, model, 8)


@pytest.mark.parametrize("bits", [8, 4])
def test_the_grid_of_restored_weights_is_idempotent(bits):
    form = IntegerForm(bits=bits, axis=1, fetched=False)
    values = np.random.default_rng(0).normal(size=(50, 200)).astype(np.float32)
    values[:, 3] = 0
    integers, scales = to_integers(values, form)
    assert scales.dtype == np.float32
    assert np.abs(integers).max(axis=0).tolist() == [
        0 if n == 3 else 2 ** (bits - 1) - 1 for n in range(200)
    ]
    again, same = to_integers(integers * scales, form)
    np.testing.assert_array_equal(again, integers)
    np.testing.assert_array_equal(same, scales)


def test_four_bit_values_are_packed_two_by_two():
    values = np.array([[1, -1, 7], [-7, 0, 3], [2, 5, -2]], np.int8)
    assert pack_integers(values, 4).tolist() == [0xF1, 0x97, 0x30, 0x52, 0x0E]
    assert pack_integers(values[:1], 8).tolist() == [1, 255, 7]


# -- what computes on integers --------------------------------------------------------------------


def test_dynamic_kernels_need_no_dequantize_and_floats_stay_float(tmp_path):
    model, plan = stripped(convolutions(), floats=["second/kernel"])
    path = tmp_path / "m.tflite"
    report = export_tflite(model, path, plan=plan, compute="dynamic")
    stored = {tensor.kernel: tensor.dtype for tensor in report.tensors if tensor.kernel}
    assert stored.pop("second/kernel") == "float32"
    assert set(stored.values()) == {"int8"}
    assert "DEQUANTIZE" not in names_in(path)
    assert report.notes == ()
    assert report.tolerance == TOLERANCES["dynamic"].difference


def test_static_kernels_and_what_is_between_them_compute_on_integers(tmp_path):
    model, plan = stripped(convolutions())
    path = tmp_path / "m.tflite"
    x = zoo.inputs_for(model, 40)
    report = export_tflite(model, path, plan=plan, compute="static", representative_data=x)
    names = names_in(path)
    assert (names.count("QUANTIZE"), names.count("DEQUANTIZE")) == (1, 1)
    flat = read_flat_model(path)
    inputs, outputs = flat.graphs[0].inputs, flat.graphs[0].outputs
    assert {flat.tensor(0, index).dtype for index in (*inputs, *outputs)} == {"float32"}
    assert report.notes == ()
    assert report.tolerance == TOLERANCES["int8"].difference


def test_a_float_kernel_among_static_ones_is_fed_with_floats(tmp_path):
    model, plan = stripped(convolutions(), floats=["second/kernel"])
    path = tmp_path / "m.tflite"
    x = zoo.inputs_for(model, 40)
    export_tflite(model, path, plan=plan, compute="static", representative_data=x)
    flat = read_flat_model(path)
    convolved = [operator for operator in flat.operators if operator.name == "CONV_2D"]
    fed = [flat.tensor(0, operator.inputs[0]).dtype for operator in convolved]
    assert fed == ["int8", "float32"]


def test_ranges_are_those_of_all_rows_not_of_the_average_batch(tmp_path):
    inputs = keras.Input((4,))
    model, plan = stripped(keras.Model(inputs, layers.Dense(4, name="d")(inputs)))
    path = tmp_path / "m.tflite"
    x = np.full((200, 4), 0.1, np.float32)
    x[0] = -50.0
    export_tflite(model, path, plan=plan, compute="static", representative_data=x)
    flat = read_flat_model(path)
    (reader,) = [o for o in flat.operators if o.name == "FULLY_CONNECTED"]
    fed = flat.tensor(0, reader.inputs[0])
    assert fed.scales[0] * 255 == pytest.approx(50.1, rel=0.02)


COMPUTED_IN_FLOAT = {
    ("separable", "dynamic", 4): ("depthwise_kernel", "no DEPTHWISE_CONV_2D with 4-bit weights"),
    ("transposed", "static", 4): ("conv2d_transpose", "no TRANSPOSE_CONV with 4-bit weights"),
    ("conv3d", "dynamic", 8): ("conv3d", "no CONV_3D with 8-bit weights and dynamic activations"),
    ("simple_rnn", "static", 8): ("simple_rnn", "FULLY_CONNECTED is inside a loop"),
    ("local", "static", 8): ("locally_connected1d", "no BATCH_MATMUL with 8-bit weights"),
}


@pytest.mark.parametrize(("name", "compute", "bits"), COMPUTED_IN_FLOAT)
def test_without_an_integer_form_kernels_keep_their_bits(name, compute, bits, tmp_path):
    keras.backend.reset_uids()
    model, plan = stripped({**zoo.ZOO, **zoo.RECURRENT_ETC}[name](), bits)
    path = tmp_path / "m.tflite"
    x = zoo.inputs_for(model, 40)
    report = export_tflite(model, path, plan=plan, compute=compute, representative_data=x)
    kernel, why = COMPUTED_IN_FLOAT[name, compute, bits]
    notes = [note for note in report.notes if "computed in float32" in note]
    assert notes
    for note in notes:
        assert kernel in note
        assert f"stored as int{bits}" in note
        assert why in note
    stored = [tensor.dtype for tensor in report.tensors if kernel in (tensor.kernel or "")]
    assert stored
    assert set(stored) == {f"int{bits}"}


def test_what_comes_behind_a_loop_computes_on_integers(tmp_path):
    keras.backend.reset_uids()
    model, plan = stripped(zoo.simple_rnn())
    path = tmp_path / "m.tflite"
    x = zoo.inputs_for(model, 40)
    report = export_tflite(model, path, plan=plan, compute="static", representative_data=x)
    assert not any("last/kernel" in note for note in report.notes)
    flat = read_flat_model(path)
    (last,) = [o for o in flat.operators if o.name == "FULLY_CONNECTED" and not o.subgraph]
    assert flat.tensor(0, last.inputs[0]).dtype == "int8"


def test_without_ranges_everything_computes_in_float(tmp_path, monkeypatch):
    model, _ = stripped(zoo.dense())
    source = tmp_path / "m.tflite"
    export_tflite(model, source, "none")
    monkeypatch.setattr(recipes, "_ranges", broken)
    result = quantize_file(
        str(source), str(tmp_path / "q.tflite"), entries_of(source, model), "static", []
    )
    assert set(result["float"]) == set(plan_kernels(model))
    assert "could not be measured (no ranges)" in result["float"]["dense/kernel"]
    assert "QUANTIZE" not in names_in(tmp_path / "q.tflite")


def broken(*_):
    raise ValueError("no ranges\nfor anything")


def plan_kernels(model):
    return {path: np.asarray(variable) for path, variable in kernel_variables(model).items()}


def entries_of(source, model, bits=8):
    flat = read_flat_model(source)
    matches = match_kernels(plan_kernels(model), flat.tensors)
    wanted = dict.fromkeys(matches, bits)
    return stored_weights.quantization_entries(flat, matches, wanted)[0]


def test_a_file_that_the_quantizer_refuses_is_restored_by_operators(tmp_path, monkeypatch):
    model, plan = stripped(zoo.dense())

    def refuse(command, **arguments):
        raise WorkerError("", "KeyError", "first\nno such thing")

    request = shared_worker().request
    monkeypatch.setattr(
        shared_worker(),
        "request",
        lambda command, **rest: (refuse if command == "quantize" else request)(command, **rest),
    )
    path = tmp_path / "m.tflite"
    report = export_tflite(model, path, plan=plan, compute="dynamic")
    assert "the quantizer refused the file (KeyError: no such thing)" in report.notes[0]
    assert_bits_are_kept(path, model, 8)
    assert report.recipe is None
    assert not (tmp_path / "m.recipe.json").exists()


def test_an_unknown_reader_leaves_a_kernel_float(tmp_path):
    inputs = keras.Input((6,))
    model = keras.Model(inputs, layers.Dense(4, use_bias=False, name="d")(inputs))
    path = tmp_path / "m.tflite"
    export_tflite(model, path, "none")
    flat = read_flat_model(path)
    (kernel,) = [tensor for tensor in flat.tensors if tensor.constant and len(tensor.shape) == 2]
    assert integer_form(flat, kernel, 8) == IntegerForm(bits=8, axis=0, fetched=False)
    odd = tuple(dataclasses.replace(reader, name="SUB") for reader in flat.operators)
    assert integer_form(dataclasses.replace(flat, operators=odd), kernel, 8) is None
    assert integer_form(flat, dataclasses.replace(kernel, dtype="float16"), 8) is None


def test_rows_of_an_embedding_are_fetched_as_integers(tmp_path):
    model = keras.Sequential(
        [layers.Input((5,), dtype="int32"), layers.Embedding(40, 8), layers.Flatten()]
    )
    for bits, order in ((8, ["GATHER", "DEQUANTIZE"]), (4, ["DEQUANTIZE", "GATHER"])):
        model, plan = stripped(model, bits)
        path = tmp_path / f"{bits}.tflite"
        report = export_tflite(model, path, plan=plan)
        assert names_in(path)[:2] == order
        table = next(tensor for tensor in read_tensors(path) if tensor.shape == (40, 8))
        assert (table.dtype, table.scales.size) == (f"int{bits}", 1)
        assert "no recipe of LiteRT's quantizer describes" in report.notes[0]


def test_tolerances_follow_the_way_of_computing():
    assert tolerance_for("none", "weight_only", 32) == TOLERANCES["none"]
    assert tolerance_for("plan", "static", 32) == TOLERANCES["plan"]
    assert tolerance_for("plan", "weight_only", 8) == TOLERANCES["plan"]
    assert tolerance_for("plan", "weight_only", 4) == TOLERANCES["plan4"]
    assert tolerance_for("plan", "dynamic", 8) == TOLERANCES["dynamic"]
    assert tolerance_for("plan", "dynamic", 4) == TOLERANCES["plan4"]
    assert tolerance_for("plan", "static", 8) == TOLERANCES["int8"]
    assert tolerance_for("plan", "static", 4) == TOLERANCES["int4"]


def test_compute_is_checked_before_any_work(tmp_path, monkeypatch):
    def no_work(*_):
        raise AssertionError("work was begun")

    monkeypatch.setattr(export, "write_saved_model", no_work)
    model, plan = stripped(zoo.dense())
    path = tmp_path / "m.tflite"
    with pytest.raises(ArgumentError, match="Did you mean 'static'"):
        export_tflite(model, path, plan=plan, compute="statik")
    with pytest.raises(
        ArgumentError, match=r"quantization='int8' uses no plan\. Leave compute out"
    ):
        export_tflite(model, path, "int8", compute="dynamic")
    with pytest.raises(ArgumentError, match="compute='static' needs representative_data"):
        export_tflite(model, path, plan=plan, compute="static")
    x = zoo.inputs_for(model, 4)
    with pytest.raises(ArgumentError, match="fewer than one batch of 8"):
        export_tflite(model, path, plan=plan, compute="static", representative_data=x, batch_size=8)


# -- operators between ----------------------------------------------------------------------------


def test_operators_at_the_edge_stay_float(tmp_path):
    path = tmp_path / "m.tflite"
    export_tflite(convolutions(), path, "none")
    flat = read_flat_model(path)
    kernels = [o for o in flat.operators if o.name in ("CONV_2D", "FULLY_CONNECTED")]
    scopes = {scope_of(flat, operator) for operator in kernels}
    # The depthwise convolution is float, so the sum before it and the flattening behind are too.
    assert [entry["name"] for entry in operators_between(flat, scopes)] == []
    scopes |= {scope_of(flat, o) for o in flat.operators if o.name == "DEPTHWISE_CONV_2D"}
    between = {entry["name"] for entry in operators_between(flat, scopes)}
    assert between == {"MAX_POOL_2D", "ADD", "RESHAPE"}


# -- the recipe -----------------------------------------------------------------------------------


@pytest.mark.parametrize("compute", ["weight_only", "dynamic"])
def test_the_quantizer_makes_the_same_bytes_with_the_recipe(compute, tmp_path):
    model, plan = stripped(convolutions(), floats=["second/kernel"])
    path = tmp_path / "m.tflite"
    report = export_tflite(model, path, plan=plan, compute=compute)
    plain = tmp_path / "float.tflite"
    export_tflite(model, plain, "none")
    recipe = json.loads((tmp_path / "m.recipe.json").read_text(encoding="utf-8"))
    assert recipe == report.recipe
    assert apply_recipe(str(plain), recipe) == path.read_bytes()
    assert apply_recipe(str(plain), recipe[:-1]) != path.read_bytes()
    assert report.to_dict()["recipe"] == recipe
    assert not (tmp_path / "float.recipe.json").exists()


def test_a_recipe_that_is_there_is_replaced_only_if_asked(tmp_path):
    model, plan = stripped(zoo.dense())
    old = tmp_path / "m.recipe.json"
    old.write_text("old", encoding="utf-8")
    path = tmp_path / "m.tflite"
    with pytest.raises(FileExistsRLSparsityError, match=r"where the recipe of 'm\.tflite' goes"):
        export_tflite(model, path, plan=plan)
    assert [file.name for file in tmp_path.iterdir()] == ["m.recipe.json"]
    export_tflite(model, path, plan=plan, overwrite=True)
    assert json.loads(old.read_text(encoding="utf-8"))
    # One that does not belong to the file would mislead.
    export_tflite(model, path, "none", overwrite=True)
    assert [file.name for file in tmp_path.iterdir()] == ["m.tflite"]


def test_a_plan_without_integers_has_no_recipe(tmp_path):
    keras.backend.reset_uids()
    model, plan = stripped(zoo.dense(), floats=["dense/kernel", "dense_1/kernel"])
    report = export_tflite(model, tmp_path / "m.tflite", plan=plan)
    assert report.recipe is None
    assert [file.name for file in tmp_path.iterdir()] == ["m.tflite"]


@pytest.mark.parametrize("part", ["m.tflite", "m.recipe.json"])
def test_file_and_recipe_appear_together_or_not_at_all(part, tmp_path, monkeypatch):
    replace = recipes.replacing.__globals__["os"].replace

    def failing(source, target):
        if str(target).endswith(part):
            raise OSError("the disk is full")
        replace(source, target)

    monkeypatch.setattr("os.replace", failing)
    with (
        pytest.raises(OSError, match="disk is full"),
        recipes.replacing_with_recipe(tmp_path / "m.tflite", [{"regex": "x"}]) as temporary,
    ):
        temporary.write_bytes(b"content")
    assert list(tmp_path.iterdir()) == []


# -- sparse formats on top ------------------------------------------------------------------------


def wide():
    """Large enough for sparse tensors to pay, with kernels that cannot be sparse beside."""
    inputs = keras.Input((8, 8, 4))
    x = layers.Conv2D(32, 3, activation="relu", name="conv")(inputs)
    x = layers.GlobalAveragePooling2D()(x)
    x = layers.Dense(96, activation="relu", name="dense")(x)
    return keras.Model(inputs, layers.Dense(40, name="last")(x))


MODES = [
    ("none", "weight_only"),
    ("float16", "weight_only"),
    ("dynamic", "weight_only"),
    ("int8", "weight_only"),
    ("plan", "weight_only"),
    ("plan", "dynamic"),
    ("plan", "static"),
]


@pytest.fixture(scope="module")
def sparse_model():
    keras.utils.set_random_seed(0)
    plan = rls.CompressionPlan(
        [
            KernelRule("conv/kernel", 0.95, quantize=True),
            KernelRule("last/kernel", 0.95),
            KernelRule("dense/kernel", 0.95, quantize=True),
        ]
    )
    return rls.strip(rls.wrap(wide(), plan)), plan


@pytest.mark.slow
@pytest.mark.parametrize(("quantization", "compute"), MODES)
def test_sparse_formats_never_make_a_file_larger(quantization, compute, sparse_model, tmp_path):
    model, plan = sparse_model
    x = zoo.inputs_for(model, 40)
    reports, outputs = {}, {}
    for formats in ("dense", "raw", "gzip"):
        path = tmp_path / f"{formats}.tflite"
        reports[formats] = export_tflite(
            model,
            path,
            quantization,
            plan=plan,
            compute=compute,
            formats=formats,
            representative_data=x,
        )
        assert not any("stored dense" in note for note in reports[formats].notes)
        outputs[formats] = predict_tflite(path, x)
    assert reports["raw"].tflite_bytes <= reports["dense"].tflite_bytes
    assert reports["gzip"].gzip_bytes <= reports["dense"].gzip_bytes
    if quantization in ("none", "plan"):
        assert reports["raw"].tflite_bytes < 0.9 * reports["dense"].tflite_bytes
    for formats in ("raw", "gzip"):
        np.testing.assert_allclose(outputs[formats], outputs["dense"], atol=1e-5)


def test_a_sparse_file_that_fails_is_replaced_by_the_dense_one(sparse_model, tmp_path, monkeypatch):
    model, plan = sparse_model
    verify = export.verify_outputs

    def refuse(worker, path, *rest):
        if path.name == "sparse.tflite":
            raise VerificationError("it computes wrongly")
        return verify(worker, path, *rest)

    monkeypatch.setattr(export, "verify_outputs", refuse)
    report = export_tflite(model, tmp_path / "m.tflite", plan=plan, formats="raw")
    assert "stored dense, because the sparse file failed: it computes wrongly" in report.notes[-1]
    assert not any(tensor.sparse for tensor in read_tensors(tmp_path / "m.tflite"))
    assert (tmp_path / "m.recipe.json").exists()
