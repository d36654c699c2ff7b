"""Removes the dead channels of a model physically."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tf_keras as keras
from rich.table import Table

from rl_sparsity_tf.channels.graph import ChannelGraph, PlacedStep, has_graph
from rl_sparsity_tf.channels.groups import check_plain, no_graph
from rl_sparsity_tf.channels.steps import Depthwise, Mix
from rl_sparsity_tf.channels.units import element_plan, only_pruned, tie_channels
from rl_sparsity_tf.console import printing, table_lines, without_traces
from rl_sparsity_tf.errors import RLSparsityError, one_line
from rl_sparsity_tf.keras3.door import returns_keras_3
from rl_sparsity_tf.layers.copy_checks import check_copy
from rl_sparsity_tf.layers.copying import copy_compile_state, copy_layer, copy_weights, freeze_alike
from rl_sparsity_tf.layers.kernels import find_kernels, layer_pairs
from rl_sparsity_tf.layers.plan import CompressionPlan
from rl_sparsity_tf.layers.structure import is_graph
from rl_sparsity_tf.layers.wrapping import accepted, strip, wrap

_WIDTH = 120


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerChange:
    """How many output channels a layer has before and after.

    `reason` says why channels that are constant, or the channels of its group, stay; else it is
    empty.
    """

    path: str
    before: int
    after: int
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShrinkReport:
    """What [shrink][rl_sparsity_tf.shrink] did.

    Attributes:
        layers: The layers with kernels whose channels can be followed.
        weights_before: Weights of the model before, biases and statistics included.
        notes: What kept layers, or the whole model, as they are.
    """

    layers: tuple[LayerChange, ...]
    weights_before: int
    weights_after: int
    notes: tuple[str, ...]

    @property
    def removed(self) -> int:
        """Number of output channels that were removed, over all layers."""
        return sum(layer.before - layer.after for layer in self.layers)

    def summary(self, print_fn: Callable[[str], Any] = print) -> None:
        """Prints the channels of every layer before and after, and why others stay."""
        print_fn = printing(print_fn)
        table = Table(title="Channels", title_justify="left")
        table.add_column("layer", overflow="fold")
        table.add_column("before", justify="right")
        table.add_column("after", justify="right")
        table.add_column("stays because", overflow="fold")
        for layer in self.layers:
            table.add_row(layer.path, str(layer.before), str(layer.after), layer.reason)
        for line in table_lines(table, _WIDTH):
            print_fn(line)
        for note in self.notes:
            print_fn(note)
        print_fn(f"{self.weights_before:,} weights before, {self.weights_after:,} after")


@without_traces()
@returns_keras_3
def shrink(
    model: keras.Model,
    plan: CompressionPlan | None = None,
    *,
    print_fn: Callable[[str], Any] | None = None,
) -> keras.Model:
    """Removes the dead channels of a model, so that it computes the same with fewer weights.

    A channel is dead if nothing reads it, or if it is a constant, whatever the input, that the
    layers reading it can take up in their biases. It does not matter what set its weights to zero.

    Args:
        model: A built, plain model of Keras 3 or `tf_keras`. A subclassed one is copied as it is.
        plan: Channels to prune first: a plan with groups of `"channel"`, as a search of channels
            saves it in channels.json. Its other operations are not applied.
        print_fn: Called with every line of a table of what was removed and why others stay.

    Returns:
        A plain model of the same class, compiled as the model is. At least one channel of every
        layer stays.

    Raises:
        ModelError: If the model is not built, is wrapped, or cannot be copied.
        PlanError: If the plan does not fit the model, prunes channels that have to stay, or prunes
            tied kernels differently.

    Example:
        >>> plan = rls.baselines.uniform(
        ...     model, sparsity=0.5, group="channel", exclude="classes"
        ... )
        >>> small = rls.shrink(rls.strip(rls.wrap(model, plan)), print_fn=print)
        Channels
        ...
        │ conv    │     16 │     8 │ ...
        │ hidden  │     64 │    30 │ ...
        ...
        17,258 weights before, 4,260 after
    """
    if plan is not None:
        tied = tie_channels(model, plan).kernels.values()
        pruned = {entry.path: only_pruned(entry.operations) for entry in tied}
        model = strip(wrap(model, element_plan(find_kernels(model), pruned)))
    small, report = shrink_with_report(model)
    if print_fn is not None:
        report.summary(print_fn)
    return small


def shrink_with_report(
    model: keras.Model, held: Mapping[str, str] | None = None
) -> tuple[keras.Model, ShrinkReport]:
    """[shrink][], and what it did.

    `held` has the paths of kernels that keep all their channels, and why.
    """
    check_plain(model, "shrink")
    model = accepted(model)
    if not has_graph(model):
        return strip(model), _unchanged(model, (), f"{model.name}: {no_graph(model)}.")
    graph = ChannelGraph(model, held)
    values = graph.constants()
    keep = _to_keep(graph, values)
    notes = tuple(f"{path}: {reason}" for path, reason in graph.opaque.items())
    if all(keep[channels].all() for channels in graph.channels):
        small = strip(model)
    else:
        try:
            small = _rebuilt(model, graph, values, keep)
        except RLSparsityError:
            raise
        except Exception as error:
            note = f"{model.name}: its smaller layers cannot be put together ({one_line(error)})."
            return strip(model), _unchanged(model, notes, note)
    layers = _changes(graph, values, keep)
    before, after = model.count_params(), small.count_params()
    report = ShrinkReport(layers=layers, weights_before=before, weights_after=after, notes=notes)
    return small, report


def _unchanged(model: keras.Model, notes: tuple[str, ...], note: str) -> ShrinkReport:
    count = model.count_params()
    return ShrinkReport(layers=(), weights_before=count, weights_after=count, notes=(*notes, note))


# Which channels stay.


def _to_keep(
    graph: ChannelGraph,
    values: list[np.ndarray],
    *,
    foldable: bool = False,
    floor: bool = True,
) -> np.ndarray:
    """For every number whether such channels must stay, so that the outputs stay the same.

    With `foldable`, every constant is taken to be one that its readers can take up; with `floor`,
    every tensor keeps a channel.
    """
    reads = [
        (place, (place.step.matrices() != 0).any(0), _usable(place, values, foldable))
        for place in graph.placed
        if isinstance(place.step, Mix)
    ]
    keep = graph.frozen.copy()
    while True:
        _spread(graph, reads, keep)
        # No tensor may lose all its channels. What stays for that reason reads others in turn.
        empty = [some for some in graph.channels if some.size and not keep[some].any()]
        if not floor or not empty:
            return keep
        keep[empty[0][0]] = True


def _spread(
    graph: ChannelGraph, reads: list[tuple[PlacedStep, np.ndarray, np.ndarray]], keep: np.ndarray
) -> None:
    """Keeps what is read by what stays, until nothing is added."""
    count = -1
    while count != keep.sum():
        count = keep.sum()
        for place, entries, usable in reversed(reads):
            columns = keep[graph.channels[place.outputs[0]]]
            needed = entries[:, columns].any(1) & ~usable
            keep[graph.channels[place.inputs[0]][needed]] = True


def _usable(place: PlacedStep, values: list[np.ndarray], foldable: bool) -> np.ndarray:
    """Which of a kernel's inputs are constants that its bias can take up."""
    assert isinstance(place.step, Mix)
    given = values[place.inputs[0]]
    return ~np.isnan(given) if foldable or not place.step.obstacle() else given == 0


def _changes(
    graph: ChannelGraph, values: list[np.ndarray], keep: np.ndarray
) -> tuple[LayerChange, ...]:
    stuck = keep & ~_to_keep(graph, values, foldable=True, floor=False)
    changes = []
    for place in graph.placed:
        if not isinstance(place.step, Mix | Depthwise):
            continue
        if isinstance(place.step, Depthwise) and not place.step.bias:
            continue  # the first half of a separable convolution
        channels = graph.channels[place.outputs[0]]
        after = int(keep[channels].sum())
        reason = graph.reason(channels) or ""
        if not reason and stuck[channels].any():
            reason = _obstacle(graph, values, channels[stuck[channels]])
        changes.append(
            LayerChange(path=place.path, before=len(channels), after=after, reason=reason)
        )
    return tuple(changes)


def _obstacle(graph: ChannelGraph, values: list[np.ndarray], stuck: np.ndarray) -> str:
    """Which layer keeps constant channels from being removed."""
    for place in graph.placed:
        if not isinstance(place.step, Mix) or not place.step.obstacle():
            continue
        given = values[place.inputs[0]]
        hit = np.isin(graph.channels[place.inputs[0]], stuck) & ~np.isnan(given) & (given != 0)
        if hit.any():
            constant = given[hit][0]
            return f"some are constant ({constant:.3g}), but {place.path} {place.step.obstacle()}"
    return "a layer keeps at least one channel"


# How the smaller model is put together.


def _rebuilt(
    model: keras.Model, graph: ChannelGraph, values: list[np.ndarray], keep: np.ndarray
) -> keras.Model:
    sizes: dict[int, int] = {}
    weights: dict[int, dict[str, np.ndarray]] = {}
    for place in graph.placed:
        layer = place.step.layer
        if layer.weights:
            weights.setdefault(id(layer), {}).update(_smaller(place, graph, values, keep))
        if isinstance(place.step, Mix) or isinstance(layer, keras.layers.Reshape):
            sizes[id(layer)] = int(keep[graph.channels[place.outputs[0]]].sum())
    converted: dict[int, keras.layers.Layer] = {}

    def visit(layer: keras.layers.Layer) -> keras.layers.Layer:
        if id(layer) not in converted:
            if is_graph(layer):
                numbers = graph.nested_inputs.get(id(layer), [])
                counts = [int(keep[graph.channels[number]].sum()) for number in numbers]
                converted[id(layer)] = _cloned(layer, counts, visit)
                freeze_alike(layer, converted[id(layer)])
            else:
                converted[id(layer)] = _resized(layer, sizes.get(id(layer)))
        return converted[id(layer)]

    policy = keras.mixed_precision.global_policy()
    keras.mixed_precision.set_global_policy(model.dtype_policy)
    try:
        small = _cloned(model, [], visit)
    finally:
        keras.mixed_precision.set_global_policy(policy)
    for old, new in layer_pairs(model, small):
        if weights.get(id(old)):
            names = {id(getattr(old, name)): value for name, value in weights[id(old)].items()}
            new.set_weights([names.get(id(w), np.asarray(w)) for w in old.weights])
            freeze_alike(old, new)
        else:
            copy_weights(old, new)
    freeze_alike(model, small)
    check_copy(model, small, folded=True)
    copy_compile_state(model, small)
    return small


def _cloned(
    model: keras.Model, channels: list[int], visit: Callable[[keras.layers.Layer], Any]
) -> keras.Model:
    """A copy of a model's graph, whose inputs have the numbers of channels given."""
    shapes = [tuple(tensor.shape) for tensor in model.inputs]
    wanted = [
        (*shape[:-1], count) if len(shape) > 1 else shape
        for shape, count in zip(shapes, channels, strict=False)
    ]
    inputs = None
    if wanted and wanted != shapes:
        inputs = [
            keras.layers.InputLayer(
                batch_input_shape=shape, dtype=tensor.dtype, name=tensor._keras_history.layer.name
            ).output
            for tensor, shape in zip(model.inputs, wanted, strict=True)
        ]
    copy = keras.models.clone_model(model, input_tensors=inputs, clone_function=visit)
    if not copy.built or not copy.inputs:
        copy.build(wanted[0] if wanted else model.input_shape)
    return copy


def _resized(layer: keras.layers.Layer, size: int | None) -> keras.layers.Layer:
    if size is None:
        return copy_layer(layer)
    config = layer.get_config()
    if isinstance(layer, keras.layers.Reshape):
        shape = (*layer.output_shape[1:-1], size)
        return keras.layers.Reshape.from_config({**config, "target_shape": shape})
    return type(layer).from_config({**config, _size_name(config): size})


def _size_name(config: Mapping[str, Any]) -> str:
    return "units" if "units" in config else "filters"


def _smaller(
    place: PlacedStep, graph: ChannelGraph, values: list[np.ndarray], keep: np.ndarray
) -> dict[str, np.ndarray]:
    """The weights of a step without the channels that go; constants go into the bias."""
    step, layer = place.step, place.step.layer
    before, after = (graph.channels[tensors[0]] for tensors in (place.inputs, place.outputs))
    stays = {"input": keep[before], "output": keep[after]}
    found = {
        attribute: np.asarray(getattr(layer, attribute))[..., stays[side]]
        for attribute, side in step.scaled().items()
    }
    if isinstance(step, Depthwise):
        found[step.kernel] = np.asarray(getattr(layer, step.kernel))[..., stays["input"], :]
    if isinstance(step, Mix):
        kernel = np.asarray(getattr(layer, step.kernel))
        kernel = np.compress(stays["input"], kernel, step.input_axis)
        found[step.kernel] = np.compress(stays["output"], kernel, step.output_axis)
        if step.bias:
            given = values[place.inputs[0]]
            folded = np.where(stays["input"] | np.isnan(given), 0, given)
            bias = np.asarray(layer.bias, np.float64)
            if folded.any():
                bias = bias + folded @ step.matrices().sum(0)
            found["bias"] = bias[stays["output"]].astype(layer.bias.dtype.as_numpy_dtype)
    return found
