"""Which channels of a model belong together, so that one cannot be removed without the others."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import numpy as np
import tensorflow as tf
import tf_keras as keras
from rich.table import Table

from rl_sparsity_tf.channels.graph import ChannelGraph, PlacedStep, has_graph
from rl_sparsity_tf.channels.steps import Depthwise, Mix
from rl_sparsity_tf.console import printing, table_lines
from rl_sparsity_tf.errors import ModelError
from rl_sparsity_tf.keras3.door import takes_keras_3
from rl_sparsity_tf.layers.kernels import check_model
from rl_sparsity_tf.layers.wrapping import is_wrapped

_WIDTH = 150


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ChannelUse:
    """A weight with an axis along which a group's channels lie.

    Attributes:
        path: The weight's path, e.g. `"block/conv/kernel"`.
        variable: The weight.
        axis: The axis, counted from the end.
        channels: For every position of the axis the group's channel that lies there, -1 where it
            is a channel of another group.
        bias: Path of the bias of the same outputs (of producers that have one).
        bias_variable: That bias.
    """

    path: str
    variable: tf.Variable
    axis: int
    channels: np.ndarray
    bias: str | None = None
    bias_variable: tf.Variable | None = None

    def rows(self, channel: int) -> np.ndarray:
        """Rows of the `(inputs, outputs)` view of a consumer's kernel that read a channel."""
        shape = self.variable.shape
        positions = np.arange(math.prod(shape[:-2]))[:, None]
        return (positions * shape[self.axis] + np.flatnonzero(self.channels == channel)).ravel()


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ChannelGroup:
    """Channels that lie along tied axes: channel c of all of them is removed together.

    Attributes:
        index: Its number in the list of groups.
        size: Number of channels.
        producers: Kernels that make the channels.
        followers: Weights with an entry per channel behind them: batch normalization, depthwise
            kernels and their biases, slopes of PReLU.
        consumers: Kernels that read the channels.
        frozen: Why its channels cannot be emptied and removed, or None if they can.
    """

    index: int
    size: int
    producers: tuple[ChannelUse, ...]
    followers: tuple[ChannelUse, ...]
    consumers: tuple[ChannelUse, ...]
    frozen: str | None


def check_plain(model: keras.Model, verb: str) -> None:
    """Raises a ModelError that says what to do unless a model is built and has no wrappers.

    `verb` is the name of the function that errors say it is for.
    """
    check_model(model)
    if is_wrapped(model):
        raise ModelError(
            f"Model {model.name!r} is wrapped; {verb} needs a plain one. Call "
            "rl_sparsity_tf.strip(model) first."
        )


def check_graph(model: keras.Model, verb: str) -> None:
    """Raises a ModelError unless a model is built and plain, and the order of its layers is known.

    The error says what to do about it.
    """
    check_plain(model, verb)
    if not has_graph(model):
        raise ModelError(f"{verb} cannot follow the model {model.name!r}: {no_graph(model)}.")


@takes_keras_3
def find_groups(model: keras.Model) -> list[ChannelGroup]:
    """Finds which output channels of a model's layers belong together.

    Args:
        model: A built, plain model of Keras 3 or `tf_keras`.

    Returns:
        The groups in the order in which their channels are first made; none for a subclassed
        model, whose graph is not known.

    Raises:
        ModelError: If the model is not built or is wrapped.

    Example:
        >>> [group.size for group in rls.find_groups(model) if not group.frozen]
        [16, 64]
    """
    check_plain(model, "find_groups")
    return groups_of(ChannelGraph(model)) if has_graph(model) else []


def groups_of(graph: ChannelGraph) -> list[ChannelGroup]:
    """The groups of a graph (see [find_groups][])."""
    obstacles = _zero_obstacles(graph)
    groups = []
    for index, numbers in enumerate(graph.components()):
        position = np.full(len(graph.frozen), -1)
        position[numbers] = np.arange(len(numbers))
        producers, followers, consumers = [], [], []
        for place in graph.placed:
            before, after = (
                position[graph.channels[tensors[0]]] for tensors in (place.inputs, place.outputs)
            )
            step = place.step
            use = functools.partial(_use, place)
            if isinstance(step, Mix):
                if (before >= 0).any():
                    consumers.append(use(step.kernel, step.input_axis, before))
                if (after >= 0).any():
                    producers.append(use(step.kernel, step.output_axis, after, bias=step.bias))
            elif isinstance(step, Depthwise) and (before >= 0).any():
                followers.append(use(step.kernel, -2, before))
            sides = {"input": before, "output": after}
            for attribute, side in step.scaled().items():
                if (sides[side] >= 0).any():
                    followers.append(use(attribute, -1, sides[side]))
        reasons = (obstacles[number] for number in numbers.tolist() if number in obstacles)
        groups.append(
            ChannelGroup(
                index=index,
                size=len(numbers),
                producers=tuple(producers),
                followers=tuple(followers),
                consumers=tuple(consumers),
                frozen=graph.reason(numbers) or next(reasons, None),
            )
        )
    return groups


def _use(
    place: PlacedStep, attribute: str, axis: int, channels: np.ndarray, *, bias: bool = False
) -> ChannelUse:
    layer = place.step.layer
    return ChannelUse(
        path=f"{place.path}/{attribute}",
        variable=getattr(layer, attribute),
        axis=axis,
        channels=channels,
        bias=f"{place.path}/bias" if bias else None,
        bias_variable=layer.bias if bias else None,
    )


def _zero_obstacles(graph: ChannelGraph) -> dict[int, str]:
    """Channels that, set to zero, become a constant that the layers behind cannot take up."""
    values = graph.constants(masked=True)
    found: dict[int, str] = {}
    for place in graph.placed:
        if isinstance(place.step, Mix) and place.step.obstacle():
            number = place.inputs[0]
            channels = graph.channels[number]
            stuck = (values[number] != 0) & ~graph.frozen[channels]
            for channel, value in zip(channels[stuck], values[number][stuck], strict=True):
                reason = f"zeros become {value:.3g}, and {place.path} {place.step.obstacle()}"
                found.setdefault(int(channel), reason)
    return found


@takes_keras_3
def describe_groups(model: keras.Model, print_fn: Callable[[str], object] = print) -> None:
    """Prints which channels belong together, and which cannot be removed and why.

    Args:
        model: A built, plain model of Keras 3 or `tf_keras`.
        print_fn: Called with every line.

    Raises:
        ModelError: If the model is not built or is wrapped.

    Example:
        >>> rls.describe_groups(model)
        Groups of channels
        ...
        │     0 │       16 │ conv    │             │ hidden  │ ...
        │     1 │       64 │ hidden  │             │ classes │ ...
        ...
    """
    print_fn = printing(print_fn)
    check_plain(model, "describe_groups")
    if not has_graph(model):
        print_fn(f"{model.name}: {no_graph(model)}")
        return
    graph = ChannelGraph(model)
    table = Table(title="Groups of channels", title_justify="left")
    for title in ("group", "channels"):
        table.add_column(title, justify="right")
    for title in ("made by", "followed by", "read by", "stays because"):
        table.add_column(title, overflow="fold")
    for group in groups_of(graph):
        uses = (group.producers, group.followers, group.consumers)
        names = (", ".join(dict.fromkeys(_layer_of(use) for use in some)) for some in uses)
        table.add_row(str(group.index), str(group.size), *names, group.frozen or "")
    for line in table_lines(table, _WIDTH):
        print_fn(line)
    for path, reason in graph.opaque.items():
        print_fn(f"{path}: {reason}")


def _layer_of(use: ChannelUse) -> str:
    return use.path.rpartition("/")[0]


def no_graph(model: keras.Model) -> str:
    """Why nothing is known of a model's channels."""
    return (
        f"{type(model).__name__} is a subclassed model, whose layers' order is only known to its "
        "call(); build it with keras.Model(inputs, outputs) to have its channels followed"
    )
