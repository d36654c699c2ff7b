"""Which layers can be compressed: the kernels of every class, in layers within layers too."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable

import tensorflow as tf
import tf_keras as keras
from tf_keras.api._v1.keras import layers as _layers_of_v1

from rl_sparsity_tf.errors import ArgumentError, did_you_mean
from rl_sparsity_tf.layers.kernel_spec import KernelSpec
from rl_sparsity_tf.layers.structure import follow, is_fused, named_sublayers

Rule = Callable[[keras.layers.Layer], tuple[KernelSpec, ...]]
"""Finds the kernels of a layer whose configuration decides on them."""


def _one(attribute: str, layout: str, kind: str) -> tuple[KernelSpec, ...]:
    return (KernelSpec.of_kind(attribute, layout, kind),)


def _einsum_kernel(layer: keras.layers.Layer) -> tuple[KernelSpec, ...]:
    """Axes of the kernel that the equation's result keeps number outputs, the others are summed."""
    equation = layer.equation.replace(" ", "").replace("...", "")
    operands, _, result = equation.partition("->")
    kernel = operands.partition(",")[2]
    layout = "".join("o" if axis in result else "i" for axis in kernel)
    return _one("kernel", layout, "fully_connected") if "o" in layout else ()


def _attention_kernels(layer: keras.layers.Layer) -> tuple[KernelSpec, ...]:
    """The projections, which exist once the layer was called; their shapes follow before that."""
    shape = layer._output_shape
    outputs = 1 if shape is None or isinstance(shape, int) else len(shape)
    layouts = {"query": "ioo", "key": "ioo", "value": "ioo", "output": "ii" + "o" * outputs}
    return tuple(
        KernelSpec.of_kind(f"_{name}_dense/kernel", layout, "fully_connected")
        for name, layout in layouts.items()
    )


def _local_kernel(rank: int) -> Rule:
    """Kernels that differ from place to place: every place counts as an output."""

    def rule(layer: keras.layers.Layer) -> tuple[KernelSpec, ...]:
        if layer.implementation == 3:  # keeps a vector of the entries that are not zero
            return ()
        layout = "oio" if layer.implementation == 1 else f"{'i' * (rank + 1)}{'o' * (rank + 1)}"
        spec = KernelSpec.of_kind("kernel", layout, "batch_matmul")
        # TFLite's scales go across places, which the grid here does not.
        return (dataclasses.replace(spec, exports_int8=False),)

    return rule


def _recurrent_layer(layer: keras.layers.Layer) -> tuple[KernelSpec, ...]:
    """A layer's cell, or cells; how it is unrolled or fused decides how its kernels are stored."""
    kind = "fully_connected" if layer.unroll else "lstm" if is_fused(layer) else "recurrent_loop"
    return tuple(
        KernelSpec.of_kind(f"cell/{spec.attribute}", spec.layout, kind)
        if spec.kind == "recurrent_loop"
        else dataclasses.replace(spec, attribute=f"cell/{spec.attribute}")
        for spec in kernel_specs(layer.cell)
    )


def _convolutional_cell(layer: keras.layers.Layer) -> tuple[KernelSpec, ...]:
    layout = "i" * (layer.rank + 1) + "o"
    return _one("kernel", layout, "conv_lstm") + _one("recurrent_kernel", layout, "conv_lstm")


_layers = keras.layers
_CELL = _one("kernel", "io", "recurrent_loop") + _one("recurrent_kernel", "io", "recurrent_loop")
_REGISTRY: dict[type, tuple[KernelSpec, ...] | Rule] = {
    _layers.Dense: _one("kernel", "io", "fully_connected"),
    _layers.EinsumDense: _einsum_kernel,
    _layers.MultiHeadAttention: _attention_kernels,
    _layers.Embedding: _one("embeddings", "io", "gather"),
    _layers.Conv1D: _one("kernel", "iio", "conv2d"),
    _layers.Conv2D: _one("kernel", "iiio", "conv2d"),
    _layers.Conv3D: _one("kernel", "iiiio", "conv3d"),
    _layers.DepthwiseConv1D: _one("depthwise_kernel", "ioo", "depthwise_conv2d"),
    _layers.DepthwiseConv2D: _one("depthwise_kernel", "iioo", "depthwise_conv2d"),
    _layers.SeparableConv1D: _one("depthwise_kernel", "ioo", "depthwise_conv2d")
    + _one("pointwise_kernel", "iio", "conv2d"),
    _layers.SeparableConv2D: _one("depthwise_kernel", "iioo", "depthwise_conv2d")
    + _one("pointwise_kernel", "iiio", "conv2d"),
    _layers.Conv1DTranspose: _one("kernel", "ioi", "transpose_conv"),
    _layers.Conv2DTranspose: _one("kernel", "iioi", "transpose_conv"),
    _layers.Conv3DTranspose: _one("kernel", "iiioi", "conv3d"),
    _layers.LocallyConnected1D: _local_kernel(1),
    _layers.LocallyConnected2D: _local_kernel(2),
    _layers.LSTM: _recurrent_layer,
    _layers.GRU: _recurrent_layer,
    _layers.SimpleRNN: _recurrent_layer,
    _layers.RNN: _recurrent_layer,
    _layers.LSTMCell: _CELL,
    _layers.GRUCell: _CELL,
    _layers.SimpleRNNCell: _CELL,
    _layers_of_v1.LSTMCell: _CELL,
    _layers_of_v1.GRUCell: _CELL,
    # One class for 1, 2 and 3 dimensions, which Keras does not export.
    sys.modules[_layers.ConvLSTM2D.__mro__[1].__module__].ConvLSTMCell: _convolutional_cell,
}


def register_layer(
    layer_class: type,
    *,
    per_output_scale: bool = True,
    exports_int8: bool = True,
    gates: int = 1,
    **layouts: str,
) -> None:
    """Makes a layer class compressible.

    Matches the class exactly, not its subclasses: a subclass may use its kernel differently. A
    class that only holds layers of known classes needs no registration.

    Args:
        layer_class: A subclass of `tf_keras.layers.Layer` that can be rebuilt from its config.
        per_output_scale: Whether TFLite keeps one quantization scale per output unit.
        exports_int8: Whether TFLite can hold the kernels as integers.
        gates: Matrices side by side in every kernel that have a scale each (4 for an LSTM), where
            there is not one per output unit.
        **layouts: For every kernel attribute, one letter per axis: `i` for inputs (summed over),
            `o` for outputs. Whether a layer has the attributes is seen once it is built:
            [describe_support][rl_sparsity_tf.describe_support] names those it has not.

    Raises:
        ArgumentError: If the class is not a layer class or a layout cannot be used.

    Example:
        >>> class MyDense(keras.layers.Dense):
        ...     pass  # computes with a kernel of shape (inputs, outputs)
        >>> rls.register_layer(MyDense, kernel="io")
    """
    if not (isinstance(layer_class, type) and issubclass(layer_class, keras.layers.Layer)):
        raise ArgumentError(
            f"register_layer received {layer_class!r}. Expected a subclass of "
            "tf_keras.layers.Layer (the class itself, not an instance)."
        )
    if not layouts:
        raise ArgumentError(
            f"register_layer({layer_class.__name__}) names no kernel. Pass one layout per kernel "
            "attribute, for example register_layer(MyDense, kernel='io')."
        )
    _REGISTRY[layer_class] = tuple(
        KernelSpec(attribute, layout, per_output_scale, exports_int8, gates)
        for attribute, layout in layouts.items()
    )


def registered_base(layer: keras.layers.Layer) -> type | None:
    """The registered class that an unregistered layer's class derives from, if there is one."""
    bases = type(layer).__mro__[1:]
    return next((base for base in bases if base in _REGISTRY), None)


def kernel_specs(layer: keras.layers.Layer) -> tuple[KernelSpec, ...]:
    """The kernels of a layer that can be compressed.

    A registered class says so itself. Any other layer has the weights that it returns from TFMOT's
    `get_prunable_weights`, and the kernels of the layers that its attributes lead to: cells,
    wrapped layers, the parts of a custom layer or of a subclassed model.
    """
    rule = _REGISTRY.get(type(layer))
    if rule is not None:
        return rule(layer) if callable(rule) else rule
    inner = {}
    for path, sublayer in named_sublayers(layer):
        for spec in kernel_specs(sublayer):
            attribute = f"{path}/{spec.attribute}"
            inner[attribute] = dataclasses.replace(spec, attribute=attribute)
    # TFMOT gives a layer that it prunes the method, too; a registered class knows its kernels best.
    offered = {spec.attribute: spec for spec in _prunable_weights(layer)}
    return tuple({**offered, **inner}.values())


def _prunable_weights(layer: keras.layers.Layer) -> tuple[KernelSpec, ...]:
    """What a layer with TFMOT's `PrunableLayer` interface offers, its last axis as the outputs."""
    method = getattr(layer, "get_prunable_weights", None)
    if not callable(method) or not layer.built:
        return ()
    wanted = [id(weight) for weight in method() if len(weight.shape) >= 2]
    specs = []
    for path, owner in _owners(layer):
        for name, value in vars(owner).items():
            if isinstance(value, tf.Variable) and id(value) in wanted:
                wanted.remove(id(value))
                layout = "i" * (len(value.shape) - 1) + "o"
                specs.append(KernelSpec(f"{path}{name}", layout))
    return tuple(specs)


def _owners(layer: keras.layers.Layer) -> list[tuple[str, keras.layers.Layer]]:
    owners = [("", layer)]
    for path, sublayer in named_sublayers(layer):
        owners += [(f"{path}/{rest}", owner) for rest, owner in _owners(sublayer)]
    return owners


def kernel_spec(layer: keras.layers.Layer, attribute: str) -> KernelSpec:
    """The view of one kernel of a layer."""
    specs = kernel_specs(layer)
    for spec in specs:
        if spec.attribute == attribute:
            return spec
    raise ArgumentError(
        f"Layer {layer.name!r} of class {type(layer).__name__} has no compressible kernel "
        f"{attribute!r}. Expected one of {[spec.attribute for spec in specs]}."
    )


def built_kernel_specs(layer: keras.layers.Layer) -> tuple[KernelSpec, ...]:
    """The kernels of a layer whose variables exist, and have the axes that are expected."""
    return tuple(spec for spec in kernel_specs(layer) if not _obstacle(layer, spec))


def wrong_registrations(layer: keras.layers.Layer) -> list[str]:
    """What was registered for a built layer, or for one inside it, and does not fit it."""
    registered = [spec for spec in kernel_specs(layer) if not spec.kind]
    return [text for spec in registered if (text := _obstacle(layer, spec))] if layer.built else []


def _obstacle(layer: keras.layers.Layer, spec: KernelSpec) -> str:
    """Why a layer's attribute is not the kernel that a spec describes; empty if it is."""
    found = follow(layer, spec.attribute)
    if found is None:
        path, _, name = spec.attribute.rpartition("/")
        owner = follow(layer, path)
        names = [key for key, value in vars(owner).items() if _is_weight(value)] if owner else []
        expected = did_you_mean(name, names) if names else "Expected that of a weight."
        return f"{spec.attribute!r}, which register_layer names, is no attribute of it. {expected}"
    if not _is_weight(found):
        return f"{spec.attribute!r}, which register_layer names, is no weight of rank 2 or more"
    if len(found.shape) != len(spec.layout):
        return (
            f"{spec.attribute!r} has {len(found.shape)} axes, the layout {spec.layout!r} that "
            f"register_layer was given has {len(spec.layout)}"
        )
    return ""


def _is_weight(value: object) -> bool:
    return hasattr(value, "assign") and len(getattr(value, "shape", ())) >= 2
