"""Recurrent layers on their way to TFLite, which has no builtin for a loop over an open batch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import tf_keras as keras

from rl_sparsity_tf.errors import ArgumentError
from rl_sparsity_tf.layers.signature import input_specs
from rl_sparsity_tf.layers.structure import is_fused, recurrent_layers
from rl_sparsity_tf.layers.wrapping import strip

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

    Args:
        model: The model; its layers are as they were when the context ends.
        kept: Whether the file is to keep the state of its fused operators between calls.
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

    Raises:
        ArgumentError: If there is none, one has no unrolled form, or the steps are not known.
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

    Raises:
        ArgumentError: If the model has no recurrent layer or one cannot be unrolled.
    """
    check_unroll(model)
    copy = strip(model)
    for layer in looping_layers(copy):
        _switch_off_loop(layer)
    return copy


@contextlib.contextmanager
def unrolled(model: keras.Model) -> Iterator[None]:
    """Lets every recurrent layer of a model be traced step by step, without a loop.

    The layers are switched, not rebuilt: that keeps shared layers, initial states, directions and
    layers inside custom ones as they are. They are as they were when the context ends.
    """
    kept = []
    try:
        for layer in looping_layers(model):
            kept.append((layer, _switch_off_loop(layer)))
        yield
    finally:
        for layer, fused in kept:
            layer.unroll = False
            if fused is not None:
                layer._could_use_gpu_kernel = fused


def _switch_off_loop(layer: keras.layers.RNN) -> bool | None:
    """Unrolls a layer; returns whether it had the fused form, None if its class has none."""
    # The fused form of LSTM and GRU, chosen when the layer is made, ignores unroll.
    fused = getattr(layer, "_could_use_gpu_kernel", None)
    layer.unroll = True
    if fused is not None:
        layer._could_use_gpu_kernel = False
    return fused
