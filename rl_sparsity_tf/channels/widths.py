"""The parts of a model that run as one operator, and how many channels go in and come out."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras as keras

from rl_sparsity_tf.channels.graph import ChannelGraph, PlacedStep, has_graph
from rl_sparsity_tf.channels.groups import check_plain, no_graph
from rl_sparsity_tf.channels.steps import Join, Mix, Opaque
from rl_sparsity_tf.errors import ModelError
from rl_sparsity_tf.keras3.door import takes_keras_3
from rl_sparsity_tf.layers.copying import copy_layer
from rl_sparsity_tf.layers.wrapping import accepted

_layers = keras.layers
# What the converter and XNNPACK put into the operator before, or what is quick beside it.
_FOLLOWERS = (
    *(_layers.BatchNormalization, _layers.Activation, _layers.ReLU, _layers.LeakyReLU),
    *(_layers.ELU, _layers.PReLU, _layers.ThresholdedReLU, _layers.Softmax, _layers.Rescaling),
)
# XNNPACK pads inside the convolution.
_PADDINGS = (_layers.ZeroPadding1D, _layers.ZeroPadding2D, _layers.ZeroPadding3D)
# Nothing is left of these in a file.
_NOTHING = (
    *(_layers.Dropout, _layers.SpatialDropout1D, _layers.SpatialDropout2D),
    *(_layers.SpatialDropout3D, _layers.GaussianNoise, _layers.GaussianDropout),
    *(_layers.AlphaDropout, _layers.ActivityRegularization),
)
# The settings that decide how long a layer takes.
_SETTINGS = (
    "kernel_size pool_size size strides padding dilation_rate groups depth_multiplier cropping "
    "use_bias activation axis interpolation"
).split()


@dataclasses.dataclass(frozen=True)
class Width:
    """Channels of a layer.

    Attributes:
        inputs: Channels that go in; of a concatenation, those of all its inputs.
        outputs: Channels that come out.
    """

    inputs: int
    outputs: int


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LayerCall:
    """A layer's call in a model's graph.

    `node` is Keras's of the call; `inputs` and `outputs` are the numbers of the tensors it reads
    and makes in the [ChannelGraph][].
    """

    path: str
    node: Any
    steps: tuple[PlacedStep, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @property
    def opaque(self) -> bool:
        """Whether its channels cannot be followed."""
        return any(isinstance(place.step, Opaque) for place in self.steps)

    @property
    def mixes(self) -> bool:
        """Whether it has a kernel whose number of outputs can be chosen."""
        return any(isinstance(place.step, Mix) for place in self.steps)

    @property
    def joins(self) -> bool:
        """Whether it concatenates channels."""
        return any(isinstance(place.step, Join) for place in self.steps)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Chain:
    """Calls that run as one operator, or take as long as one with what is quick behind it.

    Attributes:
        path: Path of the layer it is named after; the n-th call of a layer has `@n` behind it.
        calls: The calls, each of which reads what the one before makes.
        channels_in: Numbers of the channels that go in; `channels_out` of those that come out.
        inputs_free: Whether channels of the input can be removed; `outputs_free` of the output.
        tied: Whether the channels that come out are those that go in, with no kernel to mix them.
    """

    path: str
    calls: tuple[LayerCall, ...]
    channels_in: np.ndarray
    channels_out: np.ndarray
    inputs_free: bool
    outputs_free: bool
    tied: bool

    @property
    def width(self) -> Width:
        """The dense width."""
        return Width(len(self.channels_in), len(self.channels_out))

    @functools.cached_property
    def kind(self) -> str:
        """Layers, their settings and the sizes of the input: what the time depends on."""
        tensors = self.calls[0].node.keras_inputs
        sizes = ["x".join(str(size) for size in tensor.shape[1:-1]) or "1" for tensor in tensors]
        names = " + ".join(_described(call.node.layer) for call in self.calls)
        return f"{names} on {', '.join(sizes)}"

    @functools.cached_property
    def signature(self) -> str:
        """Equal for chains that take equally long at equal widths."""
        if any(call.opaque for call in self.calls):
            # Arguments of the call and weights that nobody knows may matter.
            return self.path
        types = [tensor.dtype.name for tensor in self.calls[0].node.keras_inputs]
        return f"{self.kind} {types}"

    def build(self, width: Width, prefix: str) -> tuple[list[Any], list[Any]]:
        """Builds the chain with other channels and new weights; returns Keras inputs and outputs.

        `width.outputs` counts only if the chain has a kernel. The layers' names begin with
        `prefix`.
        """
        inputs: dict[str, Any] = {}
        first = self.calls[0]
        sizes = self._input_sizes(width.inputs)
        for tensor, size in zip(first.node.keras_inputs, sizes, strict=True):
            shape = (*tensor.shape[1:-1], size) if len(tensor.shape) > 1 else ()
            inputs.setdefault(str(id(tensor)), keras.Input(shape, dtype=tensor.dtype))
        known: dict[str, Any] = dict(inputs)
        outputs: list[Any] = []
        for number, call in enumerate(self.calls):
            layer = _resized(call, width.outputs)
            layer._name = f"{prefix}_{number}"
            # Keras takes tensors out of the lists.
            lists = {name: [value] * 8 for name, value in known.items()}
            args, kwargs = call.node.map_arguments(lists)
            outputs = tf.nest.flatten(layer(*args, **kwargs))
            made = tf.nest.flatten(call.node.outputs)
            known = {str(id(old)): new for old, new in zip(made, outputs, strict=True)}
        return list(inputs.values()), outputs

    def _input_sizes(self, channels: int) -> list[int]:
        dense = [
            int(t.shape[-1]) if len(t.shape) > 1 else 1 for t in self.calls[0].node.keras_inputs
        ]
        total = len(self.channels_in)
        if self.calls[0].joins:
            ends = np.round(np.cumsum(dense) * channels / total).astype(int)
            return [max(1, int(size)) for size in np.diff(ends, prepend=0)]
        # What has another width, such as a single channel for all, keeps it.
        return [channels if size == total else size for size in dense]


class _Calls(ChannelGraph):
    """The channels of a model, and the calls of its layers in the order in which they run."""

    def __init__(self, model: keras.Model) -> None:
        self.calls: list[LayerCall] = []
        self.ends: list[int] = []
        super().__init__(model)

    def _call(self, node: Any, given: list[int], sizes: list[int]) -> list[int]:
        start = len(self.placed)
        made = super()._call(node, given, sizes)
        if id(node.layer) not in self.nested_inputs:
            call = LayerCall(
                path=self._paths.get(id(node.layer), node.layer.name),
                node=node,
                steps=tuple(self.placed[start:]),
                inputs=tuple(given),
                outputs=tuple(made),
            )
            self.calls.append(call)
        return made

    def _follow(self, model: keras.Model, inputs: list[int]) -> list[int]:
        # The last model to end is the outermost one.
        self.ends = super()._follow(model, inputs)
        return self.ends


class LayerWidths:
    """The parts of a model that cost time, and their widths for any channels that stay.

    The model is built, plain, functional or Sequential, and has inputs of fixed size; any other
    raises a ModelError. `chains` are its parts in the order in which they run.
    """

    def __init__(self, model: keras.Model) -> None:
        check_plain(model, "a latency table")
        model = accepted(model)
        if not has_graph(model):
            raise ModelError(
                f"{model.name}: {no_graph(model)}. Expected a functional or Sequential model, "
                "whose layers can be timed one by one."
            )
        for tensor in model.inputs:
            if None in tuple(tensor.shape)[1:]:
                raise ModelError(
                    f"Input {tensor.name!r} of model {model.name!r} has the shape "
                    f"{tuple(tensor.shape)}. Expected a fixed size, which latency depends on: "
                    "build the model with Input(shape=(32, 32, 3)) or the like."
                )
        graph = _Calls(model)
        self.graph: ChannelGraph = graph
        self.chains = _chains(graph)

    def dense(self) -> dict[str, Width]:
        """The widths of the model itself."""
        return {chain.path: chain.width for chain in self.chains}

    def widths(self, keep: np.ndarray) -> dict[str, Width]:
        """The widths when channels are removed.

        `keep` says for every number of a channel in the graph whether it stays.

        Example:
            >>> keep = np.ones(len(layers.graph.frozen), bool)
            >>> for numbers, group in zip(layers.graph.components(), groups_of(layers.graph)):
            ...     keep[numbers] = masks.get(group.index, True)
            >>> table.predict(layers.widths(keep))
        """
        return {
            chain.path: Width(
                int(keep[chain.channels_in].sum()), int(keep[chain.channels_out].sum())
            )
            for chain in self.chains
        }


@takes_keras_3
def widths_of(model: keras.Model) -> dict[str, Width]:
    """The channels of every layer that costs time.

    Layers that run inside another's operator, such as batch normalization and ReLU behind a
    convolution, and those that do nothing in a file are not listed.

    Args:
        model: A built, plain functional or Sequential model with inputs of fixed size.

    Returns:
        Path -> width. A layer that is called several times is listed as `path`, `path@2`, ...

    Raises:
        ModelError: If the model is another one.

    Example:
        >>> rls.widths_of(model)["hidden"]
        Width(inputs=256, outputs=64)
    """
    return LayerWidths(model).dense()


def _chains(graph: _Calls) -> list[Chain]:
    readers = Counter(number for call in graph.calls for number in call.inputs)
    readers.update(graph.ends)
    # Dropout and the like pass tensors on: a follower behind them is still one.
    alias: dict[int, int] = {}
    links: list[list[LayerCall]] = []
    open_ends: dict[int, int] = {}
    for call in graph.calls:
        given = [alias.get(number, number) for number in call.inputs]
        if isinstance(call.node.layer, _NOTHING) or _is_linear(call.node.layer):
            alias.update(zip(call.outputs, given, strict=False))
            # A call whose tensors are gone takes its readers' places.
            readers[given[0]] += readers[call.outputs[0]] - 1
            continue
        place = open_ends.get(given[0]) if len(given) == 1 and readers[given[0]] == 1 else None
        if place is not None and _joins_chain(links[place][-1], call):
            links[place].append(call)
        else:
            place = len(links)
            links.append([call])
        if len(call.outputs) == 1:
            open_ends[call.outputs[0]] = place
    counted: Counter[str] = Counter()
    chains = []
    for calls in links:
        named = next((c for c in calls if not isinstance(c.node.layer, _PADDINGS)), calls[0])
        counted[named.path] += 1
        number = counted[named.path]
        chains.append(_chain(graph, named.path if number == 1 else f"{named.path}@{number}", calls))
    return chains


def _joins_chain(last: LayerCall, call: LayerCall) -> bool:
    if isinstance(last.node.layer, _PADDINGS):
        return call.mixes or hasattr(call.node.layer, "depthwise_kernel")
    # Through an unknown layer's dropped inputs the arguments cannot be told.
    return isinstance(call.node.layer, _FOLLOWERS) and not last.joins


def _chain(graph: ChannelGraph, path: str, calls: Sequence[LayerCall]) -> Chain:
    tensors = [graph.channels[number] for number in calls[0].inputs]
    inputs = np.concatenate(tensors) if calls[0].joins else max(tensors, key=len)
    outputs = graph.channels[calls[-1].outputs[0]]
    return Chain(
        path=path,
        calls=tuple(calls),
        channels_in=inputs,
        channels_out=outputs,
        inputs_free=not graph.frozen[inputs].all(),
        outputs_free=not graph.frozen[outputs].all(),
        tied=not any(call.mixes for call in calls)
        and np.array_equal(np.unique(inputs), np.unique(outputs)),
    )


def _is_linear(layer: keras.layers.Layer) -> bool:
    return type(layer) is _layers.Activation and layer.activation is keras.activations.linear


def _resized(call: LayerCall, outputs: int) -> keras.layers.Layer:
    layer = call.node.layer
    if not call.mixes:
        return copy_layer(layer)
    config = layer.get_config()
    size = "units" if "units" in config else "filters"
    return copy_layer(layer) if config[size] == outputs else _from(layer, {**config, size: outputs})


def _from(layer: keras.layers.Layer, config: Mapping[str, Any]) -> keras.layers.Layer:
    return type(layer).from_config(dict(config))


def _described(layer: keras.layers.Layer) -> str:
    try:
        config = layer.get_config()
    except NotImplementedError:
        config = {}
    parts = []
    for name in _SETTINGS:
        value = config.get(name)
        if value is None or value in ("linear", "nearest", "valid") or _is_one(value):
            continue
        if isinstance(value, list | tuple):
            text = "x".join(str(number) for number in value)
        else:
            text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
        parts.append(text if name in ("padding", "activation") else f"{name}={text}")
    if isinstance(layer, _layers.ReLU):
        parts += [
            f"{name}={config[name]:g}" for name in ("max_value", "negative_slope") if config[name]
        ]
    return f"{type(layer).__name__}({', '.join(parts)})"


def _is_one(value: Any) -> bool:
    """Whether strides and the like are those that are meant without a word."""
    values = value if isinstance(value, list | tuple) else [value]
    return all(isinstance(v, int) and not isinstance(v, bool) and v == 1 for v in values) and (
        math.prod(values) == 1
    )
