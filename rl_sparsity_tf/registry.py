"""Which layers can be compressed: the kernels of every class, in layers within layers too."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable

import tensorflow as tf
import tf_keras as keras

from rl_sparsity_tf.errors import ArgumentError
from rl_sparsity_tf.kernel_spec import KernelSpec
from rl_sparsity_tf.sublayers import follow, named_sublayers

Rule = Callable[[keras.layers.Layer], tuple[KernelSpec, ...]]
"""Finds the kernels of a layer whose configuration decides on them."""


def _einsum_kernel(layer: keras.layers.Layer) -> tuple[KernelSpec, ...]:
    """Axes of the kernel that the equation's result keeps number outputs, the others are summed."""
    equation = layer.equation.replace(" ", "").replace("...", "")
    operands, _, result = equation.partition("->")
    kernel = operands.partition(",")[2]
    layout = "".join("o" if axis in result else "i" for axis in kernel)
    return (KernelSpec("kernel", layout),) if "o" in layout else ()


def _attention_kernels(layer: keras.layers.Layer) -> tuple[KernelSpec, ...]:
    """The projections, which exist once the layer was called; their shapes follow before that."""
    shape = layer._output_shape
    outputs = 1 if shape is None or isinstance(shape, int) else len(shape)
    heads = tuple(KernelSpec(f"_{name}_dense/kernel", "ioo") for name in ("query", "key", "value"))
    return (*heads, KernelSpec("_output_dense/kernel", "ii" + "o" * outputs))


def _local_kernel(rank: int) -> Rule:
    """Kernels that differ from place to place: every place counts as an output."""

    def rule(layer: keras.layers.Layer) -> tuple[KernelSpec, ...]:
        if layer.implementation == 1:
            return (KernelSpec("kernel", "oio", exports_int8=False),)
        if layer.implementation == 2:
            side = "i" * rank + "i" + "o" * rank + "o"
            return (KernelSpec("kernel", side, exports_int8=False),)
        return ()  # 3 keeps a vector of the non-zero entries

    return rule


def _convolutional_cell(layer: keras.layers.Layer) -> tuple[KernelSpec, ...]:
    return _recurrent("i" * (layer.rank + 1) + "o", 4)


def _recurrent(layout: str, gates: int) -> tuple[KernelSpec, ...]:
    names = ("kernel", "recurrent_kernel")
    return tuple(KernelSpec(n, layout, gates == 1, gates == 1, gates) for n in names)


_layers = keras.layers
_REGISTRY: dict[type, tuple[KernelSpec, ...] | Rule] = {
    _layers.Dense: (KernelSpec("kernel", "io"),),
    _layers.EinsumDense: _einsum_kernel,
    _layers.MultiHeadAttention: _attention_kernels,
    _layers.Embedding: (KernelSpec("embeddings", "io", False, False),),
    _layers.Conv1D: (KernelSpec("kernel", "iio"),),
    _layers.Conv2D: (KernelSpec("kernel", "iiio"),),
    # TFLite has no integer kernels for 3D convolutions with float activations.
    _layers.Conv3D: (KernelSpec("kernel", "iiiio", exports_int8=False),),
    _layers.DepthwiseConv1D: (KernelSpec("depthwise_kernel", "ioo"),),
    _layers.DepthwiseConv2D: (KernelSpec("depthwise_kernel", "iioo"),),
    _layers.SeparableConv1D: (
        KernelSpec("depthwise_kernel", "ioo"),
        KernelSpec("pointwise_kernel", "iio"),
    ),
    _layers.SeparableConv2D: (
        KernelSpec("depthwise_kernel", "iioo"),
        KernelSpec("pointwise_kernel", "iiio"),
    ),
    _layers.Conv1DTranspose: (KernelSpec("kernel", "ioi"),),
    _layers.Conv2DTranspose: (KernelSpec("kernel", "iioi"),),
    _layers.Conv3DTranspose: (KernelSpec("kernel", "iiioi", exports_int8=False),),
    _layers.LocallyConnected1D: _local_kernel(1),
    _layers.LocallyConnected2D: _local_kernel(2),
    # Recurrent layers are reached through their cells.
    _layers.SimpleRNNCell: _recurrent("io", 1),
    _layers.LSTMCell: _recurrent("io", 4),
    _layers.GRUCell: _recurrent("io", 3),
    # One class for 1, 2 and 3 dimensions, which Keras does not export.
    sys.modules[_layers.ConvLSTM2D.__mro__[1].__module__].ConvLSTMCell: _convolutional_cell,
    tf.compat.v1.keras.layers.LSTMCell: _recurrent("io", 4),
    tf.compat.v1.keras.layers.GRUCell: _recurrent("io", 3),
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
            `o` for outputs.

    Raises:
        ArgumentError: If the class is not a layer class or a layout cannot be used.

    Example:
        >>> register_layer(MyDense, kernel="io")
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
    found = list(_prunable_weights(layer))
    for path, sublayer in named_sublayers(layer):
        for spec in kernel_specs(sublayer):
            inner = dataclasses.replace(spec, attribute=f"{path}/{spec.attribute}")
            if inner.attribute not in [known.attribute for known in found]:
                found.append(inner)
    return tuple(found)


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
    """The kernels of a layer whose variables exist."""
    return tuple(spec for spec in kernel_specs(layer) if follow(layer, spec.attribute) is not None)
