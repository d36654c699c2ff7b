"""What a model is made of: its inputs and outputs, its layers and those inside of layers.

A path joins attribute names with `/`; an entry of a list goes by its number, one of a dict by its
key, a layer of a Sequential or functional model by its number among those that are no input
(names that Keras makes up differ from copy to copy): `"forward_layer/cell"`, `"blocks/0/ffn/1"`.

Layers that still carry wrappers of the TensorFlow Model Optimization toolkit.

They are recognised by name: a model that carries them has imported TFMOT already, and one that
does not should not have to.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeGuard

import numpy as np
import tensorflow as tf
import tf_keras as keras

from rl_sparsity_tf.checks import fits
from rl_sparsity_tf.errors import ArgumentError, ModelError

# Size given to an axis that the model leaves open, such as an image's height.
_OPEN_AXIS = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class InputSpec:
    """One input of a model.

    Attributes:
        name: The input's Keras name, or its key where a model takes a dict.
        shape: Shape of one row; None for an open axis.
        dtype: NumPy type name.
        batch: Rows per call, where the model fixes them.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: str
    batch: int | None = None

    def accepts(self, array: np.ndarray) -> bool:
        """Whether an array is a batch of rows of this input."""
        return array.ndim > 0 and fits(array.shape[1:], self.shape)

    def batch_shape(self, rows: int) -> tuple[int, ...]:
        """Shape of a batch of rows, with a size for the axes that the model leaves open."""
        return (rows, *(_OPEN_AXIS if size is None else size for size in self.shape))


def is_graph(layer: keras.layers.Layer) -> bool:
    """Whether a layer is itself a Sequential or functional model, whose graph is known."""
    return isinstance(layer, keras.Model) and (
        isinstance(layer, keras.Sequential) or bool(getattr(layer, "_is_graph_network", False))
    )


def graph_nodes(model: keras.Model) -> list[Any]:
    """The calls in a Sequential or functional model's graph, in the order they run.

    There are none where the graph is not known; those of the inputs are among them.
    """
    by_depth = getattr(model, "_nodes_by_depth", None) or {}
    return [node for depth in sorted(by_depth, reverse=True) for node in by_depth[depth]]


def input_specs(model: keras.Model) -> tuple[InputSpec, ...]:
    """Describes a model's inputs in Keras's order; empty if it was never called or built.

    Of a subclassed model, what it was called or built with is remembered; its batch size counts as
    open.
    """
    if is_graph(model):
        if not model.inputs:
            return ()
        return tuple(
            InputSpec(
                name=name,
                shape=tuple(tensor.shape[1:]),
                dtype=tf.as_dtype(tensor.dtype).name,
                batch=tensor.shape[0],
            )
            for name, tensor in zip(_graph_input_names(model), model.inputs, strict=True)
        )
    structure = _subclassed_structure(model)
    names = list(structure) if isinstance(structure, dict) else None
    # Structures of dicts are flattened in the order of their sorted keys.
    names = sorted(names) if names is not None else None
    flat = tf.nest.flatten(structure) if structure is not None else []
    return tuple(
        InputSpec(
            name=names[index] if names is not None else f"input_{index + 1}",
            shape=tuple(spec.shape[1:]),
            dtype=spec.dtype.name,
        )
        for index, spec in enumerate(flat)
    )


def pack_inputs(model: keras.Model, arrays: Sequence[Any]) -> Any:
    """Arranges one value per input as the model's call takes them."""
    if is_graph(model):
        # Also for graphs made from a dict: they take a flat list in the order of `inputs`.
        return list(arrays) if len(arrays) > 1 else arrays[0]
    return tf.nest.pack_sequence_as(_subclassed_structure(model), list(arrays))


def flat_inputs(model: keras.Model, x: Any) -> list[Any]:
    """Lists a model's inputs, given as an array, a list or tuple, or a dict by name.

    There is one per entry of [input_specs][]; other entries of a dict are left out.
    """
    if isinstance(x, dict):
        return [x[spec.name] for spec in input_specs(model)]
    return list(x) if isinstance(x, list | tuple) else [x]


def output_names(model: keras.Model, outputs: Any) -> list[str]:
    """The names of a model's outputs in Keras's order, as a `.tflite` file's signature has them.

    They are the keys of a dict, sorted; the output layers' names, numbered as Keras numbers them
    where one layer has several; else `output_1`, `output_2`, ... `outputs` is what the call of a
    subclassed model returned: its structure counts, and a None in it is left out.
    """
    if is_graph(model):
        outputs = getattr(model, "_nested_outputs", model.outputs)
    flat = tf.nest.flatten(outputs)
    names = list(getattr(model, "output_names", None) or ())
    if _is_flat_dict(outputs):
        names = sorted(str(key) for key in outputs)
    if len(names) != len(flat):
        names = [f"output_{number}" for number in range(1, len(flat) + 1)]
    return [name for name, output in zip(names, flat, strict=True) if output is not None]


def _graph_input_names(model: keras.Model) -> list[str]:
    nested: Any = getattr(model, "_nested_inputs", None)
    if _is_flat_dict(nested):
        return sorted(str(key) for key in nested)  # Keras takes a dict by its keys, in this order
    return [tensor.name.split(":")[0] for tensor in model.inputs]


def _is_flat_dict(structure: Any) -> TypeGuard[dict[Any, Any]]:
    return isinstance(structure, dict) and not any(map(tf.nest.is_nested, structure.values()))


def _subclassed_structure(model: keras.Model) -> Any:
    spec = getattr(model, "_saved_model_inputs_spec", None)
    if spec is not None:
        return spec
    shapes = getattr(model, "_build_input_shape", None)
    if shapes is None:
        return None
    if isinstance(shapes, dict):
        return {name: _float_spec(shape) for name, shape in shapes.items()}
    if isinstance(shapes, list) or (shapes and isinstance(shapes[0], tuple | list)):
        return [_float_spec(shape) for shape in shapes]
    return _float_spec(shapes)


def _float_spec(shape: Any) -> tf.TensorSpec:
    return tf.TensorSpec(tuple(shape), keras.backend.floatx())


def direct_sublayers(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    """The layers that a layer tracks itself, metrics left out."""
    return list(layer._flatten_layers(recursive=False, include_self=False))


def all_layers(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    """A layer and the layers inside it, at any depth, each once.

    Unlike `submodules`, which stumbles over the caches of recurrent layers with dropout.
    """
    return list({id(found): found for found in layer._flatten_layers()}.values())


def recurrent_layers(model: keras.Model) -> list[keras.layers.RNN]:
    """The LSTM, GRU, SimpleRNN, RNN and ConvLSTM layers of a built model, at any depth.

    Layers inside wrappers and custom layers count, too. Each is there once, in the order in which
    they are reached.
    """
    return [layer for layer in all_layers(model) if isinstance(layer, keras.layers.RNN)]


def is_fused(layer: keras.layers.Layer) -> bool:
    """Whether a layer is an LSTM that becomes one operator of TFLite, if the batch is fixed.

    Keras asks for the fused operator of a GPU, and TFLite has one, too.
    """
    return type(layer) is keras.layers.LSTM and layer._could_use_gpu_kernel and not layer.unroll


def switch_off_loop(layer: keras.layers.RNN) -> Callable[[], None]:
    """Unrolls a layer that is a loop; calling what is returned undoes that."""
    # The fused form of LSTM and GRU, chosen when the layer is made, ignores unroll.
    fused = getattr(layer, "_could_use_gpu_kernel", None)

    def switch(loop: bool) -> None:
        layer.unroll = not loop
        if fused is not None:
            layer._could_use_gpu_kernel = fused and loop

    switch(False)
    return functools.partial(switch, True)


def named_sublayers(layer: keras.layers.Layer) -> Iterator[tuple[str, keras.layers.Layer]]:
    """Yields `(path, sublayer)` of the direct sublayers that an attribute leads to, each once."""
    wanted = {id(sublayer) for sublayer in direct_sublayers(layer)}
    if is_graph(layer):
        for index, sublayer in enumerate(_graph_layers(layer)):
            yield str(index), sublayer
        return
    for name, value in vars(layer).items():
        if name.startswith("_self_"):  # Keras's own bookkeeping
            continue
        for path, found in _inside(name, value):
            if id(found) in wanted:
                wanted.discard(id(found))
                yield path, found


def unreachable_sublayers(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    """Direct sublayers that no attribute, list or dict of a layer leads to."""
    reached = {id(sublayer) for _, sublayer in named_sublayers(layer)}
    return [
        sublayer
        for sublayer in direct_sublayers(layer)
        if id(sublayer) not in reached and not isinstance(sublayer, keras.layers.InputLayer)
    ]


def follow(layer: keras.layers.Layer, path: str) -> Any:
    """What a path such as `"cell/kernel"` leads to; an empty one leads to the layer itself.

    None if it leads nowhere (yet: some layers build when called).
    """
    found: Any = layer
    for step in path.split("/") if path else ():
        if isinstance(found, keras.layers.Layer) and is_graph(found):
            found = _graph_layers(found)
        if isinstance(found, Mapping):
            found = found.get(step)
        elif isinstance(found, list | tuple):
            found = found[int(step)] if step.isdigit() and int(step) < len(found) else None
        else:
            found = getattr(found, step, None)
        if found is None:
            return None
    return found


def owner_of(layer: keras.layers.Layer, attribute: str) -> tuple[Any, str]:
    """The object that holds a kernel, e.g. `"cell/kernel"`, and the name it holds it under.

    Raises `ArgumentError` if the path leads nowhere.
    """
    path, _, name = attribute.rpartition("/")
    owner = follow(layer, path)
    if owner is None or getattr(owner, name, None) is None:
        raise ArgumentError(
            f"Layer {layer.name!r} of class {type(layer).__name__} has no {attribute!r}. Expected "
            "the path of a weight, such as 'kernel' or 'cell/kernel', and a built layer."
        )
    return owner, name


def _graph_layers(model: keras.Model) -> list[keras.layers.Layer]:
    return [layer for layer in model.layers if not isinstance(layer, keras.layers.InputLayer)]


def _inside(path: str, value: Any) -> Iterator[tuple[str, keras.layers.Layer]]:
    if isinstance(value, keras.layers.Layer):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if isinstance(key, str) and "/" not in key:
                yield from _inside(f"{path}/{key}", item)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _inside(f"{path}/{index}", item)


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


def specs_of(model: keras.Model) -> tuple[InputSpec, ...]:
    """The model's inputs; raises `ModelError` if it was never called or built."""
    specs = input_specs(model)
    if not specs:
        raise ModelError(
            f"Model {model.name!r} is not built: its input shape is unknown. Call it once on data, "
            "call model.build(input_shape), or begin it with an Input layer."
        )
    return specs


def fixed_batch(model: keras.Model) -> int | None:
    """Rows that the model takes per call, if its inputs fix them."""
    return next((spec.batch for spec in specs_of(model) if spec.batch), None)


_SMALL_INTEGERS = 2


def inputs_of_embeddings(model: keras.Model) -> set[str]:
    """Names of the inputs that go straight into an Embedding; only graphs tell which do."""
    if not is_graph(model):
        return set()
    return {
        spec.name
        for spec, tensor in zip(input_specs(model), model.inputs or (), strict=True)
        for node in tensor.node.layer.outbound_nodes
        if isinstance(node.layer, keras.layers.Embedding)
    }


def random_rows(model: keras.Model, specs: Sequence[InputSpec], rows: int) -> list[np.ndarray]:
    """Draws inputs where no data was given; the same ones at every call.

    Floats are uniform in [-1, 1], which covers scaled images and most of a standardised feature;
    8-bit integers take all their values; other integers, and floats that an Embedding reads, are
    ids: below the smallest Embedding's vocabulary, or 0 and 1 in a model without one. Raises
    `ArgumentError` if an input has a type that cannot be drawn, such as a string.
    """
    generator = np.random.default_rng(0)
    # Also those inside wrappers, custom layers and subclassed models.
    embeddings = [e for e in all_layers(model) if isinstance(e, keras.layers.Embedding)]
    vocabularies = [embedding.input_dim for embedding in embeddings]
    ids = min(vocabularies, default=_SMALL_INTEGERS)
    float_ids = inputs_of_embeddings(model)
    drawn = []
    for spec in specs:
        shape = spec.batch_shape(rows)
        dtype = np.dtype(spec.dtype) if spec.dtype in np.sctypeDict else None
        if dtype is None or dtype.kind not in "fiub":
            raise ArgumentError(
                f"Input {spec.name!r} is of type {spec.dtype}; a .tflite file can only be checked "
                "on numbers. Export the part of the model that follows the preprocessing."
            )
        if dtype.kind == "f" and spec.name in float_ids:
            drawn.append(generator.integers(0, ids, shape).astype(dtype))
        elif dtype.kind == "f":
            drawn.append(generator.uniform(-1, 1, shape).astype(dtype))
        elif dtype.itemsize == 1 and dtype.kind in "iu":
            limits = np.iinfo(dtype)
            drawn.append(generator.integers(limits.min, limits.max + 1, shape).astype(dtype))
        else:
            drawn.append(
                generator.integers(0, 2 if dtype.kind == "b" else ids, shape).astype(dtype)
            )
    return drawn
