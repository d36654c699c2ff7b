"""Recurrent layers in files: unrolled or one row at a time, every call begun at zero.

The state that TFLite's fused LSTM keeps between calls, and how a file starts each call at zero.

The operator reads its state from variable tensors and leaves the new one there, so that a second
call goes on from where the first one ended; Keras starts every call at zero. An operator in front
of it that writes the initial values costs some hundred bytes and no time that can be measured.
BROADCAST_TO is the one that LiteRT, XNNPACK beside it, and TFLM all have for the types of a state:
TFLM's FILL knows no int16, and the ZEROS_LIKE of all of them no int8.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tf_keras as keras
from ai_edge_litert import schema_py_generated as schema

from rl_sparsity_tf.errors import ArgumentError
from rl_sparsity_tf.files import replacing
from rl_sparsity_tf.layers.structure import (
    input_specs,
    is_fused,
    recurrent_layers,
    switch_off_loop,
)
from rl_sparsity_tf.layers.wrapping import strip
from rl_sparsity_tf.tflite.editing import FileEditor, make_operator
from rl_sparsity_tf.tflite.reading import FlatModel, FlatTensor, read_flat_model

_CONVOLUTIONAL = (keras.layers.ConvLSTM1D, keras.layers.ConvLSTM2D, keras.layers.ConvLSTM3D)


def looping_layers(model: keras.Model) -> list[keras.layers.RNN]:
    """The recurrent layers that become a loop in the graph, not unrolled ones."""
    return [layer for layer in recurrent_layers(model) if not layer.unroll]


def names_of(layers: list[keras.layers.RNN]) -> str:
    """The layers' names and classes, for messages."""
    return ", ".join(f"{layer.name!r} ({type(layer).__name__})" for layer in layers)


@contextlib.contextmanager
def stateless(model: keras.Model, kept: bool = False) -> Iterator[list[str]]:
    """Makes every recurrent layer start from zero state, and gives notes on those that did not.

    A stateful layer would assign its state in the trace, and the comparison with Keras would
    change the state of the caller's model.

    The layers are as they were when the context ends. `kept` says whether the file is to keep the
    state of its fused operators between calls.
    """
    stateful = [layer for layer in recurrent_layers(model) if layer.stateful]
    try:
        for layer in stateful:
            layer.stateful = False
        yield [
            f"{layer.name} is stateful in Keras; in the file every call starts from zero state"
            for layer in stateful
            if not (kept and is_fused(layer))
        ]
    finally:
        for layer in stateful:
            layer.stateful = True


def can_unroll(model: keras.Model) -> bool:
    """Whether `unroll=True` can be advised."""
    try:
        check_unroll(model)
    except ArgumentError:
        return False
    return True


def check_unroll(model: keras.Model) -> None:
    """Raises unless the recurrent layers of a model can be unrolled.

    The ArgumentError says that there is none, one has no unrolled form, or the steps are not known.
    """
    layers = recurrent_layers(model)
    if not layers:
        raise ArgumentError(
            f"unroll=True was given, but model {model.name!r} has no recurrent layer. Leave unroll "
            "out."
        )
    fixed = [layer for layer in layers if isinstance(layer, _CONVOLUTIONAL)]
    if fixed:
        raise ArgumentError(
            f"unroll=True does not work for {names_of(fixed)}: convolutional recurrent layers have "
            "no unrolled form. Pass batch_size=1 instead of unroll=True."
        )
    ragged = [spec for spec in input_specs(model) if spec.shape[:1] == (None,)]
    if ragged:
        raise ArgumentError(
            f"unroll=True needs a fixed number of time steps, but input {ragged[0].name!r} has the "
            f"shape {(None, *ragged[0].shape)}. Build the model with Input((steps, ...)), or pass "
            "batch_size=1 instead of unroll=True."
        )


def unrolled_copy(model: keras.Model) -> keras.Model:
    """A copy of a model whose recurrent layers have no loop, in Keras too.

    Their kernels then are those of dense operators, which TFLite can store as integers.

    An ArgumentError is raised if the model has no recurrent layer or one cannot be unrolled.
    """
    check_unroll(model)
    copy = strip(model)
    for layer in looping_layers(copy):
        switch_off_loop(layer)
    return copy


@contextlib.contextmanager
def unrolled(model: keras.Model) -> Iterator[None]:
    """Lets every recurrent layer of a model be traced step by step, without a loop.

    The layers are switched, not rebuilt: that keeps shared layers, initial states, directions and
    layers inside custom ones as they are. They are as they were when the context ends.
    """
    with contextlib.ExitStack() as stack:
        for layer in looping_layers(model):
            stack.callback(switch_off_loop(layer))
        yield


_VERSION = 2  # of BROADCAST_TO, the first that has int8


def kept_states(flat: FlatModel) -> list[FlatTensor]:
    """The variable tensors that keep their values from one call to the next.

    Only the operators that read them write them, and in float16 files a DEQUANTIZE: LiteRT restores
    a float16 constant at the first call only.
    """
    written = {
        (operator.subgraph, index)
        for operator in flat.operators
        if operator.name != "DEQUANTIZE"
        for index in operator.outputs
        if index not in operator.inputs
    }
    return [
        tensor
        for tensor in flat.tensors
        if tensor.variable and (tensor.subgraph, tensor.index) not in written
    ]


def start_at_zero(file: Path) -> None:
    """Lets every call of a file begin with the initial state; a file without state stays as it is.

    The file is replaced.
    """
    states = kept_states(read_flat_model(file))
    if not states:
        return
    resets = _Resets(file.read_bytes())
    for subgraph in sorted({state.subgraph for state in states}):
        resets.insert(subgraph, {s.index: s for s in states if s.subgraph == subgraph})
    with replacing(file) as temporary:
        temporary.write_bytes(resets.editor.packed())


class _Resets:
    """A file that gets resets; constants that are alike are added once for a subgraph."""

    def __init__(self, content: bytes):
        self.editor = FileEditor(content)
        self._added: dict[tuple[int, str, bytes], int] = {}
        self._code = self.editor.add_code(schema.BuiltinOperator.BROADCAST_TO, _VERSION)

    def insert(self, subgraph: int, states: dict[int, FlatTensor]) -> None:
        """Puts a reset of each state in front of every operator that reads it."""
        graph = self.editor.model.subgraphs[subgraph]
        operators = []
        for operator in graph.operators:
            read = () if operator.inputs is None else operator.inputs
            if any(index in states and index not in read for index in operator.outputs):
                continue  # the DEQUANTIZE of a float16 file
            operators += [self._reset(subgraph, states[i]) for i in read if i in states]
            operators.append(operator)
        graph.operators = operators

    def _reset(self, subgraph: int, state: FlatTensor) -> Any:
        # An integer state is at zero where its integers are at the zero point.
        zero = int(state.zero_points[0]) if state.quantized else 0
        value = self._constant(subgraph, np.array([zero], state.dtype), state)
        shape = self._constant(subgraph, np.array(state.shape, np.int32), None)
        options = schema.BroadcastToOptionsT()
        return make_operator(self._code, [value, shape], state.index, options)

    def _constant(self, subgraph: int, array: np.ndarray, like: FlatTensor | None) -> int:
        """Adds a vector, of the type and scale of another tensor if there is one."""
        graph = self.editor.model.subgraphs[subgraph]
        scale = b"" if like is None else like.scales.tobytes()
        key = (subgraph, str(array.dtype), array.tobytes() + b":" + scale)
        if key not in self._added:
            tensor = schema.TensorT()
            tensor.name = b"initial_state_%d" % len(self._added)
            tensor.shape, tensor.hasRank = np.array(array.shape, np.int32), True
            tensor.buffer = self.editor.add_buffer(array)
            tensor.type = schema.TensorType.INT32
            if like is not None:
                stored = graph.tensors[like.index]
                tensor.type, tensor.quantization = stored.type, stored.quantization
            graph.tensors.append(tensor)
            self._added[key] = len(graph.tensors) - 1
        return self._added[key]
