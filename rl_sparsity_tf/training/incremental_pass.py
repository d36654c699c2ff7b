"""A forward pass layer by layer that runs again only what has changed since the last one."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras as keras

from rl_sparsity_tf.layers.structure import all_layers, graph_nodes, is_graph
from rl_sparsity_tf.layers.wrapper import CompressionWrapper

BeforeCall = Callable[[CompressionWrapper, Any, str, bool], None]
"""`(wrapper, its inputs, their key, first)`: called before a wrapper computes.

`first` is whether this is the wrapper's first call in the model: shared layers have more."""


@dataclasses.dataclass
class _Step:
    """One call of a layer in the graph, and what it gave the last time."""

    layer: keras.layers.Layer
    node: Any
    wrappers: list[CompressionWrapper]
    norm: bool
    dense_key: str = ""
    key: str = ""
    outputs: list[tf.Tensor] = dataclasses.field(default_factory=list)
    weights: list[np.ndarray] = dataclasses.field(default_factory=list)
    present: bool = False


class IncrementalPass:
    """Runs a wrapped model on fixed inputs, reusing what does not depend on a change.

    Every tensor has a key: a digest of how it came about (the layers before it and the decisions
    on their kernels). A layer whose inputs and decisions are those of the last pass gives the
    tensors of the last pass, with the weights of the last pass put back. The layers of nested
    models are run together; subclassed models have no graph, and all of their layers are.

    The first pass is that of the dense network. In later ones, batch-norm layers behind a change
    re-estimate their statistics.

    Noise layers must be switched off, and the inputs are all rows in one batch. Where activations
    take more than `memory` bytes, nothing is reused.
    """

    def __init__(self, model: keras.Model, inputs: Any, *, memory: int = 2**30):
        self._model = model
        self._inputs = tf.nest.map_structure(tf.convert_to_tensor, inputs)
        self._memory = memory
        self._norms = [
            layer
            for layer in all_layers(model)
            if isinstance(layer, keras.layers.BatchNormalization)
        ]
        self._steps = [self._step(node.layer, node) for node in _nodes(model)]
        if not self._steps:
            self._steps = [self._step(model, None)]
        self._first_steps: dict[int, _Step] = {}
        for step in self._steps:
            for wrapper in step.wrappers:
                self._first_steps.setdefault(id(wrapper), step)
        self._keep = True

    def _step(self, layer: keras.layers.Layer, node: Any) -> _Step:
        inside = [layer, *all_layers(layer)]
        wrappers = [part for part in inside if isinstance(part, CompressionWrapper)]
        norm = any(isinstance(part, keras.layers.BatchNormalization) for part in inside)
        return _Step(layer, node, list(dict.fromkeys(wrappers)), norm)

    @property
    def wrappers(self) -> list[CompressionWrapper]:
        """All wrappers in the order in which they first compute."""
        return list(dict.fromkeys(wrapper for step in self._steps for wrapper in step.wrappers))

    def forget_weights(self) -> None:
        """To be called when someone else has set the model's weights."""
        for step in self._steps:
            step.present = False

    def run(self, digests: Mapping[int, str], before_call: BeforeCall) -> None:
        """Runs the model; `digests` say by the wrapper's id what was decided on its kernels.

        `before_call` may set the wrapper's weights.
        """
        with self._fresh_statistics():
            if self._steps[0].node is None:
                self._run_whole(digests, before_call)
            else:
                self._run_graph(digests, before_call)

    def _run_whole(self, digests: Mapping[int, str], before_call: BeforeCall) -> None:
        (step,) = self._steps
        key = _key("whole", *(digests[id(wrapper)] for wrapper in step.wrappers))
        if key == step.key and step.present:
            return
        with self._observed(step, key, before_call):
            step.layer(self._inputs, training=self._trains(step, key))
        step.key, step.present = key, True

    @staticmethod
    def _trains(step: _Step, key: str) -> bool:
        """Whether batch-norm layers estimate anew: not before anything has changed."""
        step.dense_key = step.dense_key or key
        return step.norm and key != step.dense_key

    def _run_graph(self, digests: Mapping[int, str], before_call: BeforeCall) -> None:
        given = tf.nest.flatten(self._model._flatten_to_reference_inputs(self._inputs))
        values: dict[str, _Always] = {}
        keys: dict[str, str] = {}
        for number, (symbol, tensor) in enumerate(zip(self._model.inputs, given, strict=True)):
            values[str(id(symbol))] = _Always(
                self._model._conform_to_reference_input(tensor, symbol)
            )
            keys[str(id(symbol))] = f"input {number}"
        kept = 0
        for number, step in enumerate(self._steps):
            node = step.node
            before = _key(*(keys[str(name)] for name in node.flat_input_ids))
            key = _key(str(number), before, *(digests[id(w)] for w in step.wrappers))
            if key == step.key and step.outputs:
                if not step.present:
                    _set_weights(step)
                outputs = step.outputs
            else:
                # A wrapper called directly knows its inputs; in a nested model they depend on
                # the decisions inside, too.
                known = before if step.wrappers == [step.layer] else key
                arguments, options = node.map_arguments(values)
                if self._trains(step, key):
                    options = {**options, "training": True}
                with self._observed(step, known, before_call):
                    outputs = tf.nest.flatten(step.layer(*arguments, **options))
                step.key, step.weights = key, _weights(step)
                step.outputs = outputs if self._keep else []
            step.present = True
            kept += sum(t.shape.num_elements() * t.dtype.size for t in outputs)
            for name, tensor in zip(node.flat_output_ids, outputs, strict=True):
                values[str(name)] = _Always(tensor)
                keys[str(name)] = key
        if self._keep and kept > self._memory:
            self._keep = False
            for step in self._steps:
                step.outputs = []

    @contextlib.contextmanager
    def _observed(self, step: _Step, key: str, before_call: BeforeCall) -> Iterator[None]:
        seen = {id(one) for one in step.wrappers if self._first_steps[id(one)] is not step}

        def called(wrapper: CompressionWrapper, inputs: Any) -> None:
            first = id(wrapper) not in seen
            seen.add(id(wrapper))
            before_call(wrapper, inputs, key, first)

        with contextlib.ExitStack() as stack:
            for wrapper in step.wrappers:
                stack.enter_context(wrapper.observed(functools.partial(called, wrapper)))
            yield

    @contextlib.contextmanager
    def _fresh_statistics(self) -> Iterator[None]:
        """Batch-norm layers take the statistics of the pass as they are."""
        momenta = [layer.momentum for layer in self._norms]
        try:
            for layer in self._norms:
                layer.momentum = 0.0
            yield
        finally:
            for layer, momentum in zip(self._norms, momenta, strict=True):
                layer.momentum = momentum


class _Always(list):
    """A tensor that Keras's graph may take any number of times."""

    def __init__(self, tensor: tf.Tensor):
        super().__init__([tensor])

    def pop(self, index: Any = -1) -> tf.Tensor:
        return self[0]


def _nodes(model: keras.Model) -> list[Any]:
    """The calls of a functional or Sequential model's graph, in the order they are run."""
    # A subclass of a functional model may call its layers in another way than its graph.
    own_call = not type(model).call.__module__.startswith("tf_keras.")
    if own_call or not is_graph(model):
        return []
    return [node for node in graph_nodes(model) if not node.is_input]


def _key(*parts: str) -> str:
    return hashlib.sha1("\0".join(parts).encode(), usedforsecurity=False).hexdigest()


def _own(step: _Step) -> list[tf.Variable]:
    return list(step.layer.weights) if step.wrappers or step.norm else []


def _weights(step: _Step) -> list[np.ndarray]:
    return [variable.numpy() for variable in _own(step)]


def _set_weights(step: _Step) -> None:
    for variable, value in zip(_own(step), step.weights, strict=True):
        variable.assign(value)
