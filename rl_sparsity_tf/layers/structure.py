"""Layers inside layers: the attribute paths by which they can be reached.

A path joins attribute names with `/`; an entry of a list goes by its number, one of a dict by its
key, a layer of a Sequential or functional model by its number among those that are no input
(names that Keras makes up differ from copy to copy): `"forward_layer/cell"`, `"blocks/0/ffn/1"`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import tf_keras as keras

from rl_sparsity_tf.errors import ArgumentError
from rl_sparsity_tf.layers.signature import is_graph


def direct_sublayers(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    """The layers that a layer tracks itself, metrics left out."""
    return list(layer._flatten_layers(recursive=False, include_self=False))


def all_layers(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    """A layer and the layers inside it, at any depth, each once.

    Unlike `submodules`, which stumbles over the caches of recurrent layers with dropout.
    """
    return list({id(found): found for found in layer._flatten_layers()}.values())


def recurrent_layers(model: keras.Model) -> list[keras.layers.RNN]:
    """The LSTM, GRU, SimpleRNN, RNN and ConvLSTM layers of a model, at any depth.

    Args:
        model: A built model; layers inside wrappers and custom layers count, too.

    Returns:
        The layers, each once, in the order in which they are reached.
    """
    return [layer for layer in all_layers(model) if isinstance(layer, keras.layers.RNN)]


def is_fused(layer: keras.layers.Layer) -> bool:
    """Whether a layer is an LSTM that becomes one operator of TFLite, if the batch is fixed.

    Keras asks for the fused operator of a GPU, and TFLite has one, too.
    """
    return type(layer) is keras.layers.LSTM and layer._could_use_gpu_kernel and not layer.unroll


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
    """What a path leads to, or None if it leads nowhere (yet: some layers build when called).

    Args:
        layer: Where the path begins.
        path: For example `"cell/kernel"`; empty for the layer itself.
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
    """The object that holds a kernel and the name it holds it under.

    Args:
        layer: A layer.
        attribute: Path of the kernel's attribute, e.g. `"cell/kernel"`.

    Raises:
        ArgumentError: If the path leads nowhere.
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
