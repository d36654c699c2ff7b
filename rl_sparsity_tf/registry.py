"""Which layer classes can be compressed, and how their kernels are viewed as matrices."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import tensorflow as tf
import tf_keras as keras

from rl_sparsity_tf.errors import ArgumentError
from rl_sparsity_tf.grouping import Grouping


@dataclasses.dataclass(frozen=True)
class KernelSpec:
    """How one kernel of a layer class is viewed.

    Attributes:
        attribute: Name of the layer's attribute that holds the variable, e.g. `"kernel"`.
        layout: One letter per axis: `i` for axes that are summed over (inputs, kernel positions)
            and `o` for axes that number the output units. Dense is `"io"`, Conv2D `"iiio"`.
        per_output_scale: Whether TFLite keeps one quantization scale per output unit (else one
            per tensor).
        exports_int8: Whether TFLite can hold the kernel as integers with float activations.

    Example:
        >>> KernelSpec("kernel", "iioi").matrix_shape((3, 3, 8, 4))  # Conv2DTranspose
        (36, 8)
    """

    attribute: str
    layout: str
    per_output_scale: bool = True
    exports_int8: bool = True

    def __post_init__(self) -> None:
        if not self.layout or set(self.layout) - set("io") or "o" not in self.layout:
            raise ArgumentError(
                f"layout={self.layout!r} of kernel {self.attribute!r} cannot be used. Expected one "
                "letter per axis, 'i' for inputs and 'o' for outputs, with at least one 'o', for "
                "example 'io' for a dense kernel."
            )

    @property
    def axes(self) -> tuple[int, ...]:
        """The transposition that brings the inputs first and the outputs last."""
        order = [axis for axis, letter in enumerate(self.layout) if letter == "i"]
        order += [axis for axis, letter in enumerate(self.layout) if letter == "o"]
        return tuple(order)

    def matrix_shape(self, shape: Sequence[int]) -> tuple[int, int]:
        """`(inputs, outputs)` of a kernel of the given shape."""
        if len(shape) != len(self.layout):
            raise ArgumentError(
                f"Kernel {self.attribute!r} has shape {tuple(shape)}, but its layout "
                f"{self.layout!r} describes {len(self.layout)} axes. Register the layer class with "
                "one letter per axis."
            )
        sizes = {"i": 1, "o": 1}
        for size, letter in zip(shape, self.layout, strict=True):
            sizes[letter] *= int(size)
        return sizes["i"], sizes["o"]

    def grouping(self, shape: Sequence[int], group: str) -> Grouping:
        """The groups of a kernel of the given shape."""
        return Grouping(group, *self.matrix_shape(shape))

    def to_matrix(self, kernel: tf.Tensor) -> tf.Tensor:
        """Views a kernel as `(inputs, outputs)`."""
        shape = self.matrix_shape(kernel.shape)
        if self.axes != tuple(range(len(self.axes))):
            kernel = tf.transpose(kernel, self.axes)
        return tf.reshape(kernel, shape)

    def from_matrix(self, matrix: tf.Tensor, shape: Sequence[int]) -> tf.Tensor:
        """Undoes [to_matrix][] for a kernel of the given shape."""
        kernel = tf.reshape(matrix, [shape[axis] for axis in self.axes])
        if self.axes != tuple(range(len(self.axes))):
            kernel = tf.transpose(kernel, np.argsort(self.axes))
        return kernel

    def to_matrix_numpy(self, kernel: np.ndarray) -> np.ndarray:
        """[to_matrix][] for NumPy arrays."""
        return np.transpose(kernel, self.axes).reshape(self.matrix_shape(kernel.shape))

    def from_matrix_numpy(self, matrix: np.ndarray, shape: Sequence[int]) -> np.ndarray:
        """[from_matrix][] for NumPy arrays."""
        kernel = matrix.reshape([shape[axis] for axis in self.axes])
        return np.ascontiguousarray(np.transpose(kernel, np.argsort(self.axes)))


_layers = keras.layers
_REGISTRY: dict[type, tuple[KernelSpec, ...]] = {
    _layers.Dense: (KernelSpec("kernel", "io"),),
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
}


def register_layer(
    layer_class: type, *, per_output_scale: bool = True, exports_int8: bool = True, **layouts: str
) -> None:
    """Makes a layer class compressible.

    Matches the class exactly, not its subclasses: a subclass may use its kernel differently.

    Args:
        layer_class: A subclass of `tf_keras.layers.Layer` that can be rebuilt from its config.
        per_output_scale: Whether TFLite keeps one quantization scale per output unit.
        exports_int8: Whether TFLite can hold the kernels as integers.
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
        KernelSpec(attribute, layout, per_output_scale, exports_int8)
        for attribute, layout in layouts.items()
    )


def kernel_specs(layer: keras.layers.Layer) -> tuple[KernelSpec, ...]:
    """The kernels of a layer that can be compressed; empty if its class is not registered."""
    return _REGISTRY.get(type(layer), ())


def kernel_spec(layer: keras.layers.Layer, attribute: str) -> KernelSpec:
    """The view of one kernel of a registered layer."""
    for spec in kernel_specs(layer):
        if spec.attribute == attribute:
            return spec
    raise ArgumentError(
        f"Layer {layer.name!r} of class {type(layer).__name__} has no compressible kernel "
        f"{attribute!r}. Expected one of {[spec.attribute for spec in kernel_specs(layer)]}."
    )
