"""Every layer class of the installed Keras 3 converts, runs as a part, or is refused by name."""

import functools

import keras as keras3
import numpy as np
import pytest
import tensorflow as tf
from keras_3_layers import Case, cases

from rl_sparsity_tf.errors import ModelError
from rl_sparsity_tf.keras3.door import admitted, handed_back, origin_of

CASES = cases()
# Bases and wrappers of other frameworks; layers that Keras cannot put into a functional model.
NOT_CALLED = {
    *("Layer", "InputLayer", "InputSpec", "Wrapper", "TFSMLayer", "JaxLayer", "FlaxLayer"),
    *("TorchModuleWrapper", "MaxNumBoundingBoxes", "Equalization"),
}
REFUSED = {"RandomCrop"}
PARTS = {
    *("AdaptiveAveragePooling1D", "AdaptiveAveragePooling2D", "AdaptiveAveragePooling3D"),
    *("AdaptiveMaxPooling1D", "AdaptiveMaxPooling2D", "AdaptiveMaxPooling3D"),
    *("ReversibleEmbedding", "RMSNormalization", "SpectralNormalization", "GroupQueryAttention"),
    *("MelSpectrogram", "STFTSpectrogram", "Pipeline", "AugMix", "AutoContrast", "CutMix"),
    *("MixUp", "RandAugment", "RandomElasticTransform", "RandomErasing", "RandomGaussianBlur"),
    *("RandomGrayscale", "RandomInvert", "RandomPerspective", "RandomShear", "Solarization"),
    *("RandomHue", "RandomColorDegeneration", "RandomSaturation", "RandomSharpness"),
    *("ContrastLimitedAdaptiveHistogramEqualization", "RandomColorJitter", "RandomPosterization"),
}


def outputs(model, x):
    return [np.asarray(part) for part in tf.nest.flatten(model(tf.constant(x), training=False))]


def test_every_layer_class_is_tried():
    names = {name for name in dir(keras3.layers) if isinstance(getattr(keras3.layers, name), type)}
    # Some classes have several names.
    classes = {getattr(keras3.layers, name).__name__ for name in names}
    tried = {getattr(keras3.layers, case.kind).__name__ for case in CASES}
    assert classes - tried - NOT_CALLED == REFUSED & classes


@functools.cache
def built(index):
    model, x = CASES[index].build()
    return model, x, admitted(model)


@pytest.mark.parametrize("index", range(len(CASES)), ids=lambda index: str(CASES[index]))
def test_a_layer_computes_the_same_in_tf_keras_and_back(index):
    model, x, made = built(index)
    expected = outputs(model, x)
    half = "float16" in str(CASES[index])
    for other in (made, handed_back(made, origin_of(made))):
        for a, b in zip(expected, outputs(other, x), strict=True):
            np.testing.assert_allclose(
                b, a, rtol=0, atol=(2e-3 if half else 2e-5) * (np.ptp(a) or 1)
            )
    kind, settings = CASES[index].kind, CASES[index].settings
    runs_as_it_is = kind in PARTS or "pad_to_aspect_ratio" in settings
    assert bool(origin_of(made).notes) == runs_as_it_is, origin_of(made).notes


@pytest.mark.parametrize("kind", sorted(REFUSED & set(dir(keras3.layers))))
def test_layers_that_differ_at_inference_are_refused(kind):
    model, _ = Case(kind, (16, 16, 3), {"height": 8, "width": 8}).build()
    with pytest.raises(ModelError, match=r"gives output 0 the shape .* in place of .*build the"):
        admitted(model)
