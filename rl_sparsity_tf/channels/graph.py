"""The channels of a model's graph: which are one, which must stay, which are constants."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras as keras

from rl_sparsity_tf.channels.layer_rules import (
    NotFollowedError,
    is_operation,
    operation_steps,
    steps_of,
)
from rl_sparsity_tf.channels.steps import Mix, Opaque, Step
from rl_sparsity_tf.layers.kernels import walk
from rl_sparsity_tf.layers.structure import graph_nodes, is_graph


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PlacedStep:
    """A step in a model's graph.

    `path` is the layer's; `inputs` and `outputs` are the numbers of the tensors it reads and makes.
    """

    path: str
    step: Step
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


class ChannelGraph:
    """The channels of a functional or Sequential model.

    Channels are numbered; those that are removed together have one number.

    Attributes:
        channels: For every tensor of the graph the numbers of its channels.
        placed: The steps in the order they run.
        nested_inputs: id of a model inside the model -> its inputs' tensors.
        opaque: Path of every layer whose channels cannot be followed -> the reason.
    """

    def __init__(self, model: keras.Model, held: Mapping[str, str] | None = None) -> None:
        """Follows the channels of a built model whose graph is known.

        `held` has the paths of kernels that are to stay as they are, and why: the channels that
        they make, read or pass on stay.
        """
        self.channels: list[np.ndarray] = []
        self.placed: list[PlacedStep] = []
        self.nested_inputs: dict[int, list[int]] = {}
        self.opaque: dict[str, str] = {}
        self._parent: list[int] = []
        self._reasons: dict[int, str] = {}
        self._paths = {id(layer): path for path, layer in walk(model)}
        self._calls = _count_calls(model)
        inputs = [self._add(self.fresh(_width(tensor.shape))) for tensor in model.inputs]
        for number in inputs:
            self.freeze(self.channels[number], "the model's inputs stay")
        for number in self._follow(model, inputs):
            self.freeze(self.channels[number], "the model's outputs stay")
        self._hold(held or {})
        self._settle()

    # What rules call.

    def fresh(self, count: int) -> np.ndarray:
        """Numbers of new channels."""
        start = len(self._parent)
        self._parent += range(start, start + count)
        return np.arange(start, start + count)

    def tie(self, first: np.ndarray, second: np.ndarray) -> None:
        """Makes channels one, pair by pair."""
        for one, other in zip(first.tolist(), second.tolist(), strict=True):
            self._join(one, other)

    def _hold(self, held: Mapping[str, str]) -> None:
        for place in self.placed:
            path = f"{place.path}/{getattr(place.step, 'kernel', '')}"
            if path in held:
                for number in (*place.inputs, *place.outputs):
                    self.freeze(self.channels[number], f"{path} is {held[path]}")

    def freeze(self, channels: np.ndarray, reason: str) -> None:
        """Keeps channels from being removed; the first reason given is remembered."""
        for channel in channels.tolist():
            self._reasons.setdefault(channel, reason)

    # What others read.

    @functools.cached_property
    def frozen(self) -> np.ndarray:
        """For every number whether such channels must stay."""
        mask = np.zeros(len(self._parent), bool)
        mask[list(self._reasons)] = True
        return mask

    def reason(self, channels: np.ndarray) -> str | None:
        """Why channels must stay; None if none of them must."""
        return next((self._reasons[c] for c in channels.tolist() if c in self._reasons), None)

    def constants(self, *, masked: bool = False) -> list[np.ndarray]:
        """For every tensor the constant that each channel is, NaN where it is none.

        With `masked`, all channels that need not stay count as set to zero.
        """
        values = [np.full(len(channels), np.nan) for channels in self.channels]
        for place in self.placed:
            given = [values[number] for number in place.inputs]
            for number in place.outputs:
                channels = self.channels[number]
                empty = ~self.frozen[channels] if masked else np.zeros(len(channels), bool)
                values[number] = place.step.constants(given, empty)
        return values

    def components(self) -> list[np.ndarray]:
        """The groups: numbers of channels that are columns of one kernel, or of tied ones."""
        order: dict[int, list[int]] = {}
        for number in self._produced():
            order.setdefault(self._component[number], []).append(number)
        return [np.array(numbers) for numbers in order.values()]

    # How it is built.

    def _add(self, channels: np.ndarray) -> int:
        self.channels.append(channels)
        return len(self.channels) - 1

    def _find(self, channel: int) -> int:
        while self._parent[channel] != channel:
            self._parent[channel] = self._parent[self._parent[channel]]
            channel = self._parent[channel]
        return channel

    def _join(self, one: int, other: int) -> None:
        first, second = sorted((self._find(one), self._find(other)))
        self._parent[second] = first

    def _produced(self) -> list[int]:
        """Numbers of the channels that kernels make, each once."""
        places = [place for place in self.placed if isinstance(place.step, Mix)]
        numbers = [self.channels[place.outputs[0]].tolist() for place in places]
        return list(dict.fromkeys(number for some in numbers for number in some))

    def _follow(self, model: keras.Model, inputs: list[int]) -> list[int]:
        """Adds the steps of a model that reads the tensors given; returns its outputs."""
        known = {id(tensor): n for tensor, n in zip(model.inputs, inputs, strict=True)}
        for node in graph_nodes(model):
            outputs = tf.nest.flatten(node.outputs)
            if node.is_input or all(id(tensor) in known for tensor in outputs):
                continue
            given = [known[id(tensor)] for tensor in node.keras_inputs]
            made = self._call(node, given, [_width(tensor.shape) for tensor in outputs])
            known.update({id(t): n for t, n in zip(outputs, made, strict=True)})
        return [known[id(tensor)] for tensor in model.outputs]

    def _call(self, node: Any, given: list[int], sizes: list[int]) -> list[int]:
        layer = node.layer
        path = self._paths.get(id(layer), layer.name)
        try:
            shapes = [tuple(tensor.shape) for tensor in node.keras_inputs]
            if is_operation(layer):
                steps = operation_steps(node, shapes)
            else:
                steps = [] if is_graph(layer) else steps_of(layer, shapes)
                _check_call(node, self._calls[id(layer)])
            if is_graph(layer):
                self.nested_inputs[id(layer)] = given
                return self._follow(layer, given)
        except NotFollowedError as error:
            steps = [Opaque(layer, str(error), tuple(sizes))]
        for step in steps:
            if isinstance(step, Opaque):
                self.opaque[path] = step.reason
            made = [
                self._add(channels)
                for channels in step.connect([self.channels[number] for number in given], self)
            ]
            place = PlacedStep(path=path, step=step, inputs=tuple(given), outputs=tuple(made))
            self.placed.append(place)
            given = made
        return given

    def _settle(self) -> None:
        """Gives tied channels one number, and groups one reason to stay."""
        self.channels = [
            np.array([self._find(channel) for channel in channels.tolist()], np.int64)
            for channels in self.channels
        ]
        roots = [self._find(channel) for channel in range(len(self._parent))]
        for place in self.placed:
            if isinstance(place.step, Mix):
                columns = self.channels[place.outputs[0]].tolist()
                for column in columns[1:]:
                    self._join(columns[0], column)
        self._component = [self._find(root) for root in roots]
        reasons: dict[int, str] = {}
        for channel, reason in self._reasons.items():
            reasons.setdefault(self._component[channel], reason)
        self._reasons = {
            channel: reasons[component]
            for channel, component in enumerate(self._component)
            if component in reasons
        }


def _width(shape: tf.TensorShape) -> int:
    return int(shape[-1]) if len(shape) > 1 and shape[-1] is not None else 0


def _count_calls(model: keras.Model) -> collections.Counter[int]:
    """How often every layer runs in a model, and in the models inside it."""
    calls: collections.Counter[int] = collections.Counter()
    for node in (node for node in graph_nodes(model) if not node.is_input):
        calls[id(node.layer)] += 1
        if is_graph(node.layer) and has_graph(node.layer):
            calls.update(_count_calls(node.layer))
    return calls


def has_graph(model: keras.Model) -> bool:
    """Whether the graph of a model is known: a Sequential one has none before it is called."""
    return is_graph(model) and bool(graph_nodes(model) and model.inputs)


def _check_call(node: Any, calls: int) -> None:
    """Raises a NotFollowedError unless a call is of the graph's tensors, and its layer's only."""
    layer = node.layer
    if calls > 1 and (layer.weights or is_graph(layer)):
        raise NotFollowedError(f"{layer.name} is called {calls} times")
    extra = [*node.call_args[1:], *node.call_kwargs.values()]
    first = tf.nest.flatten(node.call_args[:1])
    if any(value is not None and value is not False for value in extra):
        raise NotFollowedError(f"{layer.name} is called with further arguments")
    if len(first) != len(node.keras_inputs):
        raise NotFollowedError(f"{layer.name} reads constants beside the model's tensors")
    if not is_graph(layer):
        return
    # Keras sorts the entries of a dict by their keys.
    plain = all(not isinstance(s, dict) for s in (layer._nested_inputs, layer._nested_outputs))
    if not has_graph(layer) or not plain:
        raise NotFollowedError(f"{layer.name} is a model whose inputs and outputs are not a list")
