"""Layers that still carry wrappers of the TensorFlow Model Optimization toolkit.

They are recognised by name: a model that carries them has imported TFMOT already, and one that
does not should not have to.
"""

from __future__ import annotations

import numpy as np
import tf_keras as keras

_PACKAGE = "tensorflow_model_optimization"


def _tfmot_name(layer: object) -> str:
    kind = type(layer)
    return kind.__name__ if kind.__module__.split(".")[0] == _PACKAGE else ""


def is_pruning_wrapper(layer: keras.layers.Layer) -> bool:
    """Whether a layer is TFMOT's PruneLowMagnitude around another."""
    return _tfmot_name(layer) == "PruneLowMagnitude"


def obstacle(layer: keras.layers.Layer) -> str:
    """Why a model with this layer has to be changed before it can be compressed; usually empty."""
    name = _tfmot_name(layer)
    if name.startswith("Quantize"):
        return (
            f"the layer {layer.name!r} is prepared for quantization-aware training by TFMOT "
            f"({name}). Give the model as it was before quantize_model; Quantize operations put "
            "weights on the same grid"
        )
    if name.startswith("Cluster"):
        return (
            f"the layer {layer.name!r} is clustered by TFMOT ({name}). Call "
            "tfmot.clustering.keras.strip_clustering(model) first"
        )
    return ""


def masked_weights(wrapper: keras.layers.Layer) -> list[np.ndarray]:
    """The weights of the layer inside a pruning wrapper, with the wrapper's masks applied."""
    masks = {id(weight): mask for weight, mask, _ in wrapper.pruning_vars}
    values = []
    for weight in wrapper.layer.weights:
        value = np.asarray(weight)
        mask = masks.get(id(weight))
        values.append(value if mask is None else value * np.asarray(mask))
    return values
