"""Settings of every layer class of Keras 3, with inputs to call them on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import keras as keras3
import numpy as np

layers = keras3.layers

SEQUENCE, IMAGE, VOLUME, FLAT, PICTURE = (12, 4), (8, 8, 4), (6, 6, 6, 2), (16,), (16, 16, 3)
BY_RANK = {1: SEQUENCE, 2: IMAGE, 3: VOLUME}


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer class with settings; `call` calls it in another way than on one tensor."""

    kind: str
    shape: tuple[int, ...] = FLAT
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    call: Callable[[Any, Any], Any] | None = None
    data: Any = None  # what the layer adapts to
    ids: int = 0  # the input holds ids below it
    words: tuple[str, ...] = ()  # the input holds these

    def __str__(self) -> str:
        parts = [f"{key}={getattr(v, '__name__', v)}" for key, v in self.settings.items()]
        return f"{self.kind}({', '.join(parts)})"[:60]

    def build(self, seed: int = 0) -> tuple[Any, np.ndarray]:
        """A model of the layer with weights that are not all zero, and rows."""
        generator = np.random.default_rng(seed)
        dtype = "string" if self.words else "int32" if self.ids else "float32"
        inputs = keras3.Input(self.shape, dtype=dtype)
        shape = (6, *self.shape)
        if self.words:
            x = generator.choice(self.words, shape).astype(object)
        elif self.ids:
            x = generator.integers(0, self.ids, shape).astype("int32")
        elif self.shape == PICTURE:
            x = generator.uniform(0, 255, shape).astype("float32")
        else:
            x = generator.normal(0, 1, shape).astype("float32")
        layer = getattr(layers, self.kind)(**self.settings)
        if self.data is not None:
            layer.adapt(self.data)
        outputs = layer(inputs) if self.call is None else self.call(layer, inputs)
        model = keras3.Model(inputs, outputs)
        if "Spectrogram" not in self.kind and self.kind not in _STATE:
            for weight in model.weights:
                if str(weight.dtype).startswith("float"):
                    low, high = (0.5, 1.5) if "variance" in weight.name else (-0.6, 0.6)
                    weight.assign(generator.uniform(low, high, weight.shape))
        return model, x


_STATE = ("Normalization", "StringLookup", "TextVectorization")


def _twice(layer: Any, x: Any) -> Any:
    return layer([x, layers.Rescaling(0.3)(x)])


def _of_itself(layer: Any, x: Any) -> Any:
    return layer(x, x)


def _masked(layer: Any, x: Any) -> Any:
    return layer(layers.Masking()(x))


def _embedded(layer: Any, x: Any) -> Any:
    return layer(layers.Embedding(20, 6, mask_zero=True)(x))


def _embedded_twice(layer: Any, x: Any) -> Any:
    embedded = layers.Embedding(20, 6, mask_zero=True)(x)
    return layer(embedded, embedded)


def _with_states(layer: Any, x: Any) -> Any:
    return layer(x, initial_state=[x[:, 0] * 1.0, x[:, 1] * 1.0])


_ACTIVATIONS = (
    "elu gelu hard_sigmoid hard_silu leaky_relu relu6 selu sigmoid silu softmax softplus softsign "
    "tanh exponential linear mish celu glu hard_tanh hard_shrink soft_shrink tanh_shrink "
    "log_sigmoid log_softmax squareplus sparse_plus sparsemax"
).split()


def _by_rank() -> list[Case]:
    found = []
    for rank, shape in BY_RANK.items():
        for kind in ("AveragePooling", "MaxPooling"):
            found.append(Case(f"{kind}{rank}D", shape, {"pool_size": 2}))
            same = {"pool_size": 3, "strides": 2, "padding": "same"}
            found.append(Case(f"{kind}{rank}D", shape, same))
        for kind in ("GlobalAveragePooling", "GlobalMaxPooling"):
            found.append(Case(f"{kind}{rank}D", shape))
            found.append(Case(f"{kind}{rank}D", shape, {"keepdims": True}))
        for kind in ("AdaptiveAveragePooling", "AdaptiveMaxPooling"):
            found.append(Case(f"{kind}{rank}D", shape, {"output_size": 3}))
        found.append(Case(f"SpatialDropout{rank}D", shape, {"rate": 0.3}))
        filters = {"filters": 6, "kernel_size": 3}
        found += [
            Case(f"Conv{rank}D", shape, filters),
            Case(f"Conv{rank}DTranspose", shape, filters),
        ]
        plain = {"padding": "same", "strides": 2, "activation": "silu", "use_bias": False}
        found.append(Case(f"Conv{rank}D", shape, {**filters, **plain, "kernel_regularizer": "l2"}))
        grouped = {"dilation_rate": 2, "groups": 2}
        found.append(Case(f"Conv{rank}D", shape, {**filters, **grouped}))
        padded = {"strides": 2, "padding": "same", "output_padding": 1}
        found.append(Case(f"Conv{rank}DTranspose", shape, {**filters, **padded}))
        found += [Case(f"{kind}{rank}D", shape) for kind in ("UpSampling", "ZeroPadding")]
        found.append(Case(f"Cropping{rank}D", shape))
        found.append(Case(f"ConvLSTM{rank}D", (2, *shape), {"filters": 2, "kernel_size": 3}))
        if rank < 3:
            found.append(Case(f"DepthwiseConv{rank}D", shape, {"kernel_size": 3}))
            deep = {"kernel_size": 3, "depth_multiplier": 2, "strides": 2, "padding": "same"}
            found.append(Case(f"DepthwiseConv{rank}D", shape, deep))
            found.append(Case(f"SeparableConv{rank}D", shape, filters))
    return found


def _recurrent() -> list[Case]:
    found = []
    for kind in ("LSTM", "GRU", "SimpleRNN"):
        found.append(Case(kind, SEQUENCE, {"units": 5}))
        backwards = {"units": 5, "return_sequences": True, "go_backwards": True}
        found.append(Case(kind, SEQUENCE, backwards))
        dropped = {"units": 5, "unroll": True, "dropout": 0.1, "recurrent_dropout": 0.1}
        found.append(Case(kind, SEQUENCE, dropped))
        found.append(Case(kind, SEQUENCE, {"units": 5}, _masked))
        cell = Case(f"{kind}Cell", SEQUENCE, {"units": 5}, lambda one, x: layers.RNN(one)(x))
        found.append(cell)
    found += [
        Case("GRU", SEQUENCE, {"units": 5, "reset_after": False}),
        Case("LSTM", SEQUENCE, {"units": 5, "return_state": True}),
        Case("LSTM", SEQUENCE, {"units": 4, "return_sequences": True}, _with_states),
        Case("LSTM", (7,), {"units": 5}, _embedded, ids=20),
        Case("LSTM", SEQUENCE, {"units": 5, "recurrent_activation": "hard_sigmoid"}),
        Case("Bidirectional", SEQUENCE, {"layer": layers.LSTM(4, return_sequences=True)}),
        Case("Bidirectional", SEQUENCE, {"layer": layers.GRU(4), "merge_mode": "sum"}),
        Case("RNN", SEQUENCE, {"cell": [layers.LSTMCell(4), layers.GRUCell(3)]}),
        Case(
            "StackedRNNCells",
            SEQUENCE,
            {"cells": [layers.LSTMCell(4), layers.SimpleRNNCell(3)]},
            lambda one, x: layers.RNN(one)(x),
        ),
        Case("TimeDistributed", (3, 8, 8, 4), {"layer": layers.Conv2D(5, 3)}),
    ]
    return found


def _preprocessing() -> list[Case]:
    numbers = np.random.default_rng(1).normal(2, 3, (50, 16))
    text = np.array(["a b c", "b a"])
    resizing = (
        {"height": 9, "width": 7},
        {"height": 20, "width": 20, "interpolation": "nearest"},
        {"height": 8, "width": 12, "crop_to_aspect_ratio": True},
        {"height": 8, "width": 12, "pad_to_aspect_ratio": True},
    )
    return [
        Case("Rescaling", PICTURE, {"scale": 1 / 127.5, "offset": -1}),
        *(Case("Resizing", PICTURE, settings) for settings in resizing),
        Case("CenterCrop", PICTURE, {"height": 8, "width": 9}),
        Case("Normalization", FLAT, data=numbers),
        Case("Normalization", FLAT, {"axis": None}, data=numbers),
        Case("Normalization", FLAT, {"mean": 3.0, "variance": 2.0}),
        Case("Discretization", FLAT, {"bin_boundaries": [-1.0, 0.0, 1.0]}),
        Case("Discretization", FLAT, {"num_bins": 4}, data=numbers),
        Case("CategoryEncoding", (4,), {"num_tokens": 5}, ids=5),
        Case("Hashing", (3,), {"num_bins": 7}, words=("a", "b", "c")),
        Case("HashedCrossing", (1,), {"num_bins": 7}, lambda one, x: one((x, x)), ids=9),
        Case("IntegerLookup", (3,), {"vocabulary": [1, 3, 5]}, ids=9),
        Case("StringLookup", (3,), {"vocabulary": ["a", "c"]}, words=("a", "b", "c")),
        Case(
            "TextVectorization", (1,), {"output_sequence_length": 4}, data=text, words=("a b", "c")
        ),
        Case("MelSpectrogram", (4000,)),
        Case("STFTSpectrogram", (400, 1), {"frame_length": 64, "frame_step": 32}),
        Case("Pipeline", PICTURE, {"layers": [layers.Rescaling(2.0), layers.RandomFlip()]}),
    ]


def _augmentation() -> list[Case]:
    bare = (
        *("AugMix", "AutoContrast", "CutMix", "MixUp", "RandAugment", "RandomElasticTransform"),
        *("RandomErasing", "RandomFlip", "RandomGaussianBlur", "RandomGrayscale", "RandomInvert"),
        *("RandomPerspective", "RandomShear", "Solarization"),
    )
    by_a_factor = (
        *("RandomBrightness", "RandomContrast", "RandomHue", "RandomColorDegeneration"),
        *("RandomRotation", "RandomSaturation", "RandomSharpness"),
    )
    settings: dict[str, dict[str, Any]] = {
        **{kind: {} for kind in bare},
        **{kind: {"factor": 0.2} for kind in by_a_factor},
        "ContrastLimitedAdaptiveHistogramEqualization": {},
        "RandomColorJitter": {"brightness_factor": 0.2},
        "RandomPosterization": {"factor": 4},
        "RandomTranslation": {"height_factor": 0.2, "width_factor": 0.2},
        "RandomZoom": {"height_factor": 0.2},
    }
    return [Case(kind, PICTURE, value) for kind, value in settings.items()]


def cases() -> list[Case]:
    """All of them; classes that this Keras does not have are left out."""
    merging = "Add Average Maximum Minimum Multiply Subtract Concatenate".split()
    query = {"num_heads": 2, "key_dim": 3}
    found = [
        Case("Activation", FLAT, {"activation": "relu"}),
        *(Case("Dense", FLAT, {"units": 8, "activation": name}) for name in _ACTIVATIONS),
        Case("Dense", SEQUENCE, {"units": 8, "activity_regularizer": "l2"}),
        Case("Dense", FLAT, {"units": 8, "dtype": "mixed_float16"}),
        Case("Dense", FLAT, {"units": 8, "trainable": False}),
        Case("ActivityRegularization", FLAT, {"l1": 0.1}),
        *(Case(kind, FLAT, {}, _twice) for kind in merging),
        Case("Concatenate", SEQUENCE, {"axis": 1}, _twice),
        Case("Dot", FLAT, {"axes": 1, "normalize": True}, _twice),
        *_by_rank(),
        Case("Conv1D", SEQUENCE, {"filters": 6, "kernel_size": 3, "padding": "causal"}),
        Case("UpSampling2D", IMAGE, {"size": (2, 3), "interpolation": "bilinear"}),
        *(Case(kind, FLAT, {"rate": 0.3}) for kind in ("Dropout", "AlphaDropout")),
        Case("GaussianDropout", FLAT, {"rate": 0.3}),
        Case("GaussianNoise", FLAT, {"stddev": 0.3}),
        Case(
            "EinsumDense",
            SEQUENCE,
            {"equation": "abc,cd->abd", "output_shape": (None, 5), "bias_axes": "d"},
        ),
        Case("Embedding", (7,), {"input_dim": 20, "output_dim": 5, "mask_zero": True}, ids=20),
        Case("ReversibleEmbedding", (7,), {"input_dim": 20, "output_dim": 5}, ids=20),
        Case("ELU", FLAT, {"alpha": 0.5}),
        Case("LeakyReLU"),
        Case("LeakyReLU", FLAT, {"negative_slope": 0.1}),
        Case("PReLU", IMAGE, {"shared_axes": [1, 2]}),
        Case("ReLU", FLAT, {"max_value": 6, "negative_slope": 0.1}),
        Case("Softmax", SEQUENCE, {"axis": 1}),
        *(Case(kind, IMAGE) for kind in ("Flatten", "Identity", "UnitNormalization")),
        Case("Masking", SEQUENCE),
        Case("Permute", SEQUENCE, {"dims": (2, 1)}),
        Case("RepeatVector", FLAT, {"n": 3}),
        Case("Reshape", FLAT, {"target_shape": (4, -1)}),
        Case("BatchNormalization", IMAGE),
        Case("BatchNormalization", IMAGE, {"axis": 1, "scale": False, "momentum": 0.9}),
        Case("LayerNormalization", IMAGE, {"axis": [1, 3], "epsilon": 1e-6, "center": False}),
        Case("GroupNormalization", IMAGE, {"groups": 2}),
        Case("RMSNormalization", IMAGE),
        Case("SpectralNormalization", IMAGE, {"layer": layers.Conv2D(5, 3)}),
        *_recurrent(),
        Case("Attention", SEQUENCE, {"use_scale": True}, _twice),
        Case("AdditiveAttention", SEQUENCE, {}, _twice),
        Case("MultiHeadAttention", SEQUENCE, query, _of_itself),
        Case(
            "MultiHeadAttention", SEQUENCE, {**query, "value_dim": 5, "output_shape": 7}, _of_itself
        ),
        Case("MultiHeadAttention", (7,), query, _embedded_twice, ids=20),
        Case(
            "GroupQueryAttention",
            SEQUENCE,
            {"head_dim": 4, "num_query_heads": 4, "num_key_value_heads": 2},
            _of_itself,
        ),
        Case("Lambda", FLAT, {"function": lambda x: x * 2 + 1}),
        *_preprocessing(),
        *_augmentation(),
    ]
    return [case for case in found if hasattr(layers, case.kind)]
