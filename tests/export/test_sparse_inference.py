"""Files whose 1x1 convolutions skip zeros on ARM, and what models without them are told."""

from __future__ import annotations

import types

import numpy as np
import pytest
import tf_keras as keras
from tflite_files import convert, with_zeros

from rl_sparsity_tf.errors import ArgumentError, VerificationError
from rl_sparsity_tf.export.export import export_tflite
from rl_sparsity_tf.export.matching import kernel_variables
from rl_sparsity_tf.export.sparse_inference import store_for_sparse_inference
from rl_sparsity_tf.tflite.inspection import inspect_tflite
from rl_sparsity_tf.tflite.reading import read_flat_model
from rl_sparsity_tf.tflite.xnnpack import SparseClusters

layers = keras.layers
YES = "XNNPACK sparse cluster: yes, zeros are skipped on ARM; elsewhere no faster"
NO = "sparse inference on ARM: no, because "
SEPARABLE = "inside the cluster use DepthwiseConv2D and a 1x1 convolution instead"


def network(
    *middle, channels=3, stride=2, pad=True, stem=3, stem_arguments=None, pool=True, point=None
):
    padding = "valid" if pad else "same"
    return keras.Sequential(
        [
            layers.Input((16, 16, channels)),
            *([layers.ZeroPadding2D(1)] if pad else []),
            layers.Conv2D(
                8, stem, stride, padding, activation="relu", name="stem", **(stem_arguments or {})
            ),
            layers.Conv2D(16, 1, name="first", **(point or {})),
            *middle,
            layers.Conv2D(16, 1, name="second"),
            *([layers.GlobalAveragePooling2D()] if pool else []),
        ]
    )


def sparse(model, share=0.85):
    """Random weights; of the 1x1 kernels exactly this share is zero."""
    with_zeros(model, 0.0)
    rng = np.random.default_rng(1)
    for layer in model.layers:
        if isinstance(layer, layers.Conv2D) and tuple(layer.kernel_size) == (1, 1):
            kernel, *bias = layer.get_weights()
            flat = kernel.reshape(-1)
            flat[rng.permutation(flat.size)[: round(share * flat.size)]] = 0
            layer.set_weights([flat.reshape(kernel.shape), *bias])
    return model


def notes_of(model, tmp_path):
    """What is said of a model, without exporting it."""
    kernels = {path: value.numpy() for path, value in kernel_variables(model).items()}
    stored = store_for_sparse_inference(convert(model, tmp_path / "m.tflite"), kernels, "dense")
    assert (stored.file is None) == bool(stored.notes)
    return stored.notes


def plan_for(model, bits):
    entries = {
        path: types.SimpleNamespace(path=path, shape=tuple(value.shape), exported_bits=bits)
        for path, value in kernel_variables(model).items()
    }
    return types.SimpleNamespace(kernels=entries)


# ------------------------------------------------------------------------- models that qualify


def test_a_qualifying_model_gets_sparse_1x1_convolutions_and_nothing_else(tmp_path):
    model = sparse(network(layers.DepthwiseConv2D(3, padding="same", name="depth")))
    report = export_tflite(model, tmp_path / "m.tflite", "none", sparse_inference="arm")
    assert report.sparse_inference is True
    assert not [note for note in report.notes if "sparse inference" in note]
    found = {tensor.shape: tensor for tensor in inspect_tflite(report.path).tensors}
    for shape in ((16, 1, 1, 8), (16, 1, 1, 16)):
        assert (found[shape].format, found[shape].exploited) == ("CSR", YES)
    assert found[1, 3, 3, 16].format == found[8, 3, 3, 3].format == "dense"
    assert inspect_tflite(report.path).operators["DENSIFY"] == 2
    lines = []
    report.summary(lines.append)
    assert "Sparse inference on ARM: zeros are skipped" in lines
    assert report.to_dict()["sparse_inference"] is True
    assert report.max_abs_difference < 1e-4 * report.output_range


def test_weights_that_the_plan_stores_as_int8_are_skipped_too(tmp_path):
    model = sparse(network())
    report = export_tflite(
        model, tmp_path / "m.tflite", plan=plan_for(model, 8), sparse_inference="arm"
    )
    assert report.sparse_inference is True
    stored = {t.kernel: (t.dtype, t.format) for t in report.tensors if t.kernel}
    assert stored == {
        "stem/kernel": ("int8", "dense"),
        "first/kernel": ("int8", "CSR"),
        "second/kernel": ("int8", "CSR"),
    }
    flat = read_flat_model(report.path)
    clusters = SparseClusters(flat)
    pointwise = [operator for operator in flat.operators if clusters.pointwise(operator)]
    assert [clusters.obstacle(operator) for operator in pointwise] == [None, None]


def test_int4_is_not_unpacked_at_load_and_that_is_said(tmp_path):
    model = sparse(network())
    report = export_tflite(
        model, tmp_path / "m.tflite", plan=plan_for(model, 4), sparse_inference="arm"
    )
    assert report.sparse_inference is False
    assert any(
        f"{NO}first: the weights of CONV_2D are not float32" in note
        and note.endswith("store them as float32 or, with a plan, as int8")
        for note in report.notes
    )


def test_other_tensors_still_take_their_smallest_format(tmp_path):
    inputs = keras.Input((16, 16, 3))
    x = layers.Conv2D(8, 3, 2, name="stem")(layers.ZeroPadding2D(1)(inputs))
    x = layers.Conv2D(16, 1, name="first")(x)
    x = layers.GlobalAveragePooling2D()(x)
    model = sparse(keras.Model(inputs, layers.Dense(200, name="wide")(x)))
    dense = model.get_layer("wide")
    kernel, bias = dense.get_weights()
    kernel[:, 20:] = 0
    dense.set_weights([kernel, bias])
    report = export_tflite(
        model, tmp_path / "m.tflite", "none", sparse_inference="arm", formats="raw"
    )
    stored = {t.kernel: t.format for t in report.tensors if t.kernel}
    assert stored["first/kernel"] == "CSR"
    assert stored["wide/kernel"] != "dense"
    assert report.sparse_inference is True


def test_a_file_that_fails_is_written_dense_with_a_note(tmp_path, monkeypatch):
    from rl_sparsity_tf.export import export

    verify = export.verify_outputs

    def refuse_sparse(worker, file, *arguments):
        if "sparse" in file.name:
            raise VerificationError("it is wrong")
        return verify(worker, file, *arguments)

    monkeypatch.setattr(export, "verify_outputs", refuse_sparse)
    report = export_tflite(sparse(network()), tmp_path / "m.tflite", "none", sparse_inference="arm")
    assert report.sparse_inference is False
    assert any("because the sparse file failed: it is wrong" in note for note in report.notes)
    assert {tensor.format for tensor in report.tensors} == {"dense"}


# --------------------------------------------------------------------- models that do not qualify

CASES = {
    "grey": (
        lambda: network(channels=1),
        "stem: CONV_2D 3x3 reads 1 channels, not 3. To mend it: the first convolution must read 3: "
        "repeat the grey channel with Concatenate()([x, x, x])",
    ),
    "four channels": (
        lambda: network(channels=4),
        "stem: CONV_2D 3x3 reads 4 channels, not 3. To mend it: the first convolution must read 3",
    ),
    "same": (
        lambda: network(pad=False),
        "stem: CONV_2D 3x3 is not padded by 1 on every side. To mend it: padding='same' with "
        "stride 2 pads asymmetrically: use ZeroPadding2D(1) and padding='valid'",
    ),
    "stride": (
        lambda: network(stride=1),
        "stem: CONV_2D 3x3 has stride 1x1, not 2x2. To mend it: use strides=2 if it is the first; "
        + SEPARABLE,
    ),
    "kernel": (
        lambda: network(stem=5),
        "stem: CONV_2D 5x5 has no channels-first form. To mend it: use 3x3 with strides=2 if it is "
        "the first; " + SEPARABLE,
    ),
    "dilated": (
        lambda: network(stride=1, stem_arguments={"dilation_rate": 2}),
        "stem: BATCH_TO_SPACE_ND has no channels-first form. To mend it: use dilation_rate=1",
    ),
    "second stem": (
        lambda: network(
            layers.Conv2D(3, 1), layers.ZeroPadding2D(1), layers.Conv2D(8, 3, 2, name="again")
        ),
        "again: a 3x3 convolution of stride 2 can only be its first operator",
    ),
    "1x1 stride": (
        lambda: network(point={"strides": 2}),
        "first: CONV_2D 1x1 has stride 2x2. To mend it: use strides=1 and stride the depthwise "
        "convolution before it",
    ),
    "depthwise same": (
        lambda: network(layers.DepthwiseConv2D(3, 2, "same", name="half")),
        "half: DEPTHWISE_CONV_2D 3x3 is not padded by 1 on every side. To mend it: use "
        "ZeroPadding2D(1) and padding='valid'",
    ),
    "depthwise 5x5": (
        lambda: network(layers.DepthwiseConv2D(5, 2, "same", name="half")),
        "half: DEPTHWISE_CONV_2D 5x5 is not padded by 2 on every side. To mend it: use "
        "ZeroPadding2D(2) and padding='valid'",
    ),
    "depthwise 7x7": (
        lambda: network(layers.DepthwiseConv2D(7, padding="same", name="large")),
        "large: DEPTHWISE_CONV_2D 7x7 has no channels-first form. To mend it: use kernels of 3x3 "
        "or 5x5",
    ),
    "multiplier": (
        lambda: network(layers.DepthwiseConv2D(3, padding="same", depth_multiplier=2, name="more")),
        "more: DEPTHWISE_CONV_2D 3x3 has a depth multiplier of 2. To mend it: use "
        "depth_multiplier=1 and widen with a 1x1 convolution",
    ),
    "pooling": (
        lambda: network(layers.MaxPooling2D(name="pool")),
        "pool: MAX_POOL_2D has no channels-first form. To mend it: let the depthwise convolution "
        "before it have strides=2",
    ),
    "operator": (
        lambda: network(layers.Softmax(name="shares")),
        "shares: SOFTMAX has no channels-first form. To mend it: move it before the first "
        "convolution or behind the global average pooling",
    ),
    "end": (
        lambda: network(pool=False),
        "the cluster has no end in a global average pooling. To mend it: end it in "
        "GlobalAveragePooling2D",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_condition_names_its_layer_and_the_rewrite(tmp_path, case):
    build, expected = CASES[case]
    notes = notes_of(sparse(build()), tmp_path)
    assert any(note.startswith(f"{NO}{expected}") for note in notes), notes


def test_a_model_that_starts_with_a_1x1_convolution_has_no_start(tmp_path):
    model = keras.Sequential(
        [
            layers.Input((8, 8, 3)),
            layers.Conv2D(16, 1, name="point"),
            layers.GlobalAveragePooling2D(),
        ]
    )
    (note,) = notes_of(sparse(model), tmp_path)
    assert note == (
        f"{NO}the cluster has no start. To mend it: let it start with ZeroPadding2D(1) and "
        "Conv2D(..., 3, strides=2, padding='valid') on 3 channels"
    )


def test_all_conditions_are_named_at_once(tmp_path):
    model = sparse(network(layers.MaxPooling2D(name="pool"), channels=1, pool=False))
    notes = notes_of(model, tmp_path)
    assert len(notes) == len(set(notes)) == 3
    for text in ("stem: CONV_2D 3x3 reads 1 channels", "pool: MAX_POOL_2D", "has no end"):
        assert any(text in note for note in notes), text


@pytest.mark.slow
def test_too_few_zeros_are_counted_layer_by_layer(tmp_path):
    model = sparse(network(), share=0.5)
    assert notes_of(model, tmp_path) == (
        f"{NO}only 50.0% zeros in the cluster's 1x1 convolutions, more than 66.7 % are needed "
        "(first 64 of 128, second 128 of 256). To mend it: prune them further",
    )
    # Exactly two thirds are not more than two thirds.
    for zeros, qualifies in ((192, False), (193, True)):
        for name, count in (("first", 64), ("second", zeros)):
            kernel, bias = model.get_layer(name).get_weights()
            flat = np.ones(kernel.size, np.float32)
            flat[:count] = 0
            model.get_layer(name).set_weights([flat.reshape(kernel.shape), bias])
        assert (not notes_of(model, tmp_path)) == qualifies


def test_a_model_without_1x1_convolutions_is_told_so(tmp_path):
    model = keras.Sequential([layers.Input((8, 8, 3)), layers.Conv2D(4, 3), layers.Flatten()])
    (note,) = notes_of(sparse(model), tmp_path)
    assert note == (
        f"{NO}the model has no 1x1 convolution, and only those skip zeros. To mend it: {SEPARABLE}"
    )


def test_a_model_that_does_not_qualify_is_exported_as_without(tmp_path):
    model = sparse(network(channels=1))
    with_notes = export_tflite(model, tmp_path / "a.tflite", "none", sparse_inference="arm")
    plain = export_tflite(model, tmp_path / "b.tflite", "none")
    assert (tmp_path / "a.tflite").read_bytes() == (tmp_path / "b.tflite").read_bytes()
    assert with_notes.sparse_inference is False
    assert plain.sparse_inference is None
    assert any("stem: CONV_2D 3x3 reads 1 channels" in note for note in with_notes.notes)
    assert not [note for note in plain.notes if "sparse inference" in note]
    lines = []
    with_notes.summary(lines.append)
    assert "Sparse inference on ARM: no zeros are skipped" in lines


# --------------------------------------------------------- chains that XNNPACK computes wrongly


def chain(*middle, padding="valid", zeros=0.85):
    return sparse(
        keras.Sequential(
            [
                layers.Input((16, 16, 3)),
                layers.ZeroPadding2D(1),
                layers.Conv2D(8, 3, 2, padding, name="stem"),
                layers.Conv2D(16, 1, name="first"),
                *middle,
                layers.Conv2D(16, 1, name="second"),
                layers.GlobalAveragePooling2D(),
            ]
        ),
        zeros,
    )


# In LiteRT 2.3 on emulated aarch64, with the 1x1 convolutions stored sparse, those that are said to
# be broken were off by a quarter of the output's range and more, the others equal.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "broken"),
    [
        (lambda: chain(layers.MaxPooling2D()), True),
        (lambda: chain(layers.AveragePooling2D()), True),
        (lambda: chain(layers.Softmax()), True),
        (lambda: chain(layers.DepthwiseConv2D(3, 2, "same")), True),
        (lambda: chain(layers.DepthwiseConv2D(7, padding="same")), True),
        (lambda: chain(layers.Conv2D(8, 3, padding="same")), True),
        (lambda: chain(layers.PReLU(shared_axes=[1, 2])), True),
        (lambda: chain(layers.Conv2D(3, 1), layers.ZeroPadding2D(1), layers.Conv2D(8, 3, 2)), True),
        (lambda: chain(), False),
        (lambda: chain(layers.DepthwiseConv2D(3, padding="same")), False),
        (lambda: chain(layers.MaxPooling2D(), padding="same"), False),
        (lambda: chain(layers.MaxPooling2D(), zeros=0.5), False),
        (lambda: sparse(network(layers.MaxPooling2D(), pool=False)), False),
    ],
)
def test_chains_that_start_and_do_not_end_are_recognised(tmp_path, build, broken):
    flat = read_flat_model(convert(build(), tmp_path / "m.tflite"))
    assert (SparseClusters(flat).broken() is not None) == broken


def test_nothing_is_unpacked_in_a_file_with_such_a_chain(tmp_path):
    model = chain(layers.MaxPooling2D(), layers.Conv2D(64, 1), layers.Conv2D(128, 1), zeros=0.95)
    report = export_tflite(model, tmp_path / "m.tflite", "none", formats="raw")
    assert {tensor.format for tensor in report.tensors} == {"dense"}
    (note,) = [note for note in report.notes if "channels-first" in note]
    assert note.startswith("tensors that would need DENSIFY are stored dense, because with one")
    assert "stem" in note
    # The same network without a start that XNNPACK takes.
    model = chain(
        *(layers.MaxPooling2D(), layers.Conv2D(64, 1), layers.Conv2D(128, 1)),
        padding="same",
        zeros=0.95,
    )
    report = export_tflite(model, tmp_path / "n.tflite", "none", formats="raw")
    assert "CSR" in {tensor.format for tensor in report.tensors}
    assert not [note for note in report.notes if "channels-first" in note]


def test_tensors_that_need_no_unpacking_stay_sparse_beside_such_a_chain(tmp_path):
    inputs = keras.Input((16, 16, 3))
    x = layers.Conv2D(8, 3, 2, name="stem")(layers.ZeroPadding2D(1)(inputs))
    x = layers.MaxPooling2D()(layers.Conv2D(64, 1, name="first")(x))
    x = layers.GlobalAveragePooling2D()(layers.Conv2D(256, 1, name="second")(x))
    model = sparse(keras.Model(inputs, layers.Dense(64, name="wide")(x)), 0.95)
    kernel, bias = model.get_layer("wide").get_weights()
    kernel[32:] = 0
    model.get_layer("wide").set_weights([kernel, bias])
    report = export_tflite(model, tmp_path / "m.tflite", "none", formats="raw")
    stored = {tensor.kernel: tensor.format for tensor in report.tensors if tensor.kernel}
    assert stored["wide/kernel"] == "block 1x4"
    assert stored["second/kernel"] == "dense"
    assert "DENSIFY" not in inspect_tflite(report.path).operators


def test_a_whole_cluster_beside_such_a_chain_is_held_back(tmp_path):
    model = chain(layers.Conv2D(3, 1), layers.ZeroPadding2D(1), layers.Conv2D(8, 3, 2, name="next"))
    notes = notes_of(model, tmp_path)
    assert any(
        note.startswith(f"{NO}XNNPACK would compute the chain that starts at stem wrongly")
        for note in notes
    )


# ------------------------------------------------------------------------------- wrong arguments


@pytest.mark.parametrize("quantization", ["dynamic", "int8", "float16"])
def test_kernels_that_do_not_compute_in_float32_skip_nothing(tmp_path, quantization):
    with pytest.raises(
        ArgumentError, match=rf"'arm' cannot be used with quantization='{quantization}': only kern"
    ):
        export_tflite(
            network(),
            tmp_path / "m.tflite",
            quantization,
            sparse_inference="arm",
            representative_data=np.zeros((4, 16, 16, 3), np.float32),
        )
    assert not list(tmp_path.iterdir())


def test_the_choice_and_the_way_to_compute_are_checked(tmp_path):
    with pytest.raises(ArgumentError, match=r"sparse_inference='x86' is not known"):
        export_tflite(network(), tmp_path / "m.tflite", "none", sparse_inference="x86")
    with pytest.raises(ArgumentError, match=r"cannot be used with compute='dynamic': only"):
        export_tflite(network(), tmp_path / "m.tflite", compute="dynamic", sparse_inference="arm")
