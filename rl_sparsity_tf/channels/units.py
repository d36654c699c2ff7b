"""Channels that are decided together: units of tied kernels, their masks and plans."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tf_keras as keras

from rl_sparsity_tf.channels.graph import ChannelGraph
from rl_sparsity_tf.channels.groups import (
    ChannelGroup,
    ChannelUse,
    check_graph,
    check_plain,
    find_groups,
    groups_of,
)
from rl_sparsity_tf.channels.steps import Depthwise
from rl_sparsity_tf.errors import ArgumentError, PlanError
from rl_sparsity_tf.keras3.door import returns_keras_3, takes_keras_3
from rl_sparsity_tf.layers.groups import Grouping
from rl_sparsity_tf.layers.kernel_spec import KernelSpec
from rl_sparsity_tf.layers.kernels import Kernel, find_kernels
from rl_sparsity_tf.layers.operations import Operation
from rl_sparsity_tf.layers.plan import CompressionPlan, KernelPlan
from rl_sparsity_tf.layers.rules import resolve
from rl_sparsity_tf.layers.wrapping import strip


@dataclasses.dataclass(frozen=True)
class Member:
    """A kernel whose outputs are channels of a unit.

    `columns` has the unit's channel that every output of its matrix is, -1 where it is another
    unit's.
    """

    kernel: Kernel
    columns: np.ndarray


@dataclasses.dataclass(frozen=True)
class Reader:
    """A kernel that reads channels of a unit.

    `rows` has the unit's channel that every row of its matrix reads, -1 where it is another unit's.
    """

    kernel: Kernel
    rows: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class ChannelUnit(Kernel):
    """The kernels that make the same channels, viewed as one matrix: a column per channel.

    It takes the place of a kernel wherever whole channels are decided. Its path, layer and place in
    the network are those of the first kernel that makes the channels.

    Attributes:
        numbers: The channels, as the graph numbers them; -1 for those that it does not follow.
        frozen: Why no channel can be removed, or None.
        scale: Sum over the batch normalizations behind of the magnitudes of their gammas, one per
            channel; None where there are none.
    """

    numbers: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))
    members: tuple[Member, ...] = ()
    readers: tuple[Reader, ...] = ()
    frozen: str | None = None
    scale: np.ndarray | None = None

    @property
    def count(self) -> int:
        """Number of channels."""
        return len(self.numbers)

    @property
    def shape(self) -> tuple[int, ...]:
        """Weights per channel, and channels."""
        return self._inputs, self.count

    @property
    def size(self) -> int:
        """Number of weights."""
        return self._inputs * self.count

    @property
    def _inputs(self) -> int:
        return sum(
            self._repeats(m) * m.kernel.spec.matrix_shape(m.kernel.shape)[0] for m in self.members
        )

    @staticmethod
    def _repeats(member: Member) -> int:
        """Outputs of a kernel per channel, where there are most."""
        return int(np.bincount(member.columns[member.columns >= 0]).max())

    def stack(self, matrices: Mapping[str, np.ndarray]) -> np.ndarray:
        """The unit's matrix, from those of its kernels by path; 0 where a kernel has no entry."""
        parts = []
        for member in self.members:
            matrix = matrices[member.kernel.path]
            order = np.argsort(member.columns, kind="stable")
            order = order[member.columns[order] >= 0]
            owners = member.columns[order]
            first = np.searchsorted(owners, owners)  # where the channel's outputs begin
            place = np.arange(len(owners)) - first
            part = np.zeros((self._repeats(member), len(matrix), self.count), matrix.dtype)
            part[place, :, owners] = matrix[:, order].T
            parts.append(part.reshape(-1, self.count))
        return np.concatenate(parts)

    def matrix(self) -> np.ndarray:
        """The present weights of its kernels, as [stack][] lays them out."""
        return self.stack({m.kernel.path: m.kernel.matrix() for m in self.members})

    def grouping(self, group: str) -> Grouping:
        """A group per channel."""
        return Grouping("channel", self._inputs, self.count)


def find_units(graph: ChannelGraph, kernels: Sequence[Kernel]) -> list[ChannelUnit]:
    """The units in the order of their first kernels; every kernel is a member of exactly one.

    `kernels` are those that carry decisions, of the plain model or of its wrapped copy. Kernels
    whose channels have to stay form units that are frozen.
    """
    known = {kernel.path: kernel for kernel in kernels}
    numbers = graph.components()
    taken: set[str] = set()
    units = []
    for group in groups_of(graph):
        members = [m for m in _members(graph, group, known) if m.kernel.path not in taken]
        if not members:
            continue
        readers = tuple(
            Reader(known[use.path], _rows(use.variable.shape, use.channels))
            for use in group.consumers
            if use.path in known
        )
        frozen = group.frozen or _not_decided(group, known)
        taken.update(member.kernel.path for member in members)
        unit = _unit(members, readers, numbers[group.index], frozen)
        units.append(dataclasses.replace(unit, scale=_scale(group)))
    for kernel in kernels:
        if kernel.path not in taken:
            columns = np.arange(kernel.spec.matrix_shape(kernel.shape)[1])
            reason = "its channels cannot be followed"
            units.append(_unit([Member(kernel, columns)], (), np.full(len(columns), -1), reason))
    place = {kernel.path: index for index, kernel in enumerate(kernels)}
    return sorted(units, key=lambda unit: place[unit.path])


def _unit(
    members: Sequence[Member], readers: tuple[Reader, ...], numbers: np.ndarray, frozen: str | None
) -> ChannelUnit:
    first = members[0].kernel
    integers = any(member.kernel.spec.exports_int8 for member in members)
    spec = KernelSpec(first.spec.attribute, "io", exports_int8=integers)
    return ChannelUnit(
        first.path, first.layer, spec, first.wrapper, numbers, tuple(members), readers, frozen
    )


def _members(graph: ChannelGraph, group: ChannelGroup, known: Mapping[str, Kernel]) -> list[Member]:
    found = [Member(known[use.path], use.channels) for use in group.producers if use.path in known]
    depthwise = {
        f"{place.path}/{place.step.kernel}": place.step
        for place in graph.placed
        if isinstance(place.step, Depthwise)
    }
    for use in group.followers:
        if use.path in depthwise and use.path in known:
            # Output c * m + j belongs to input channel c.
            found.append(Member(known[use.path], np.repeat(use.channels, use.variable.shape[-1])))
    return found


def _scale(group: ChannelGroup) -> np.ndarray | None:
    found = [use for use in group.followers if use.path.endswith("/gamma")]
    if not found:
        return None
    total = np.zeros(group.size)
    for use in found:
        known = use.channels >= 0
        np.add.at(total, use.channels[known], np.abs(np.asarray(use.variable))[known])
    return total


def _not_decided(group: ChannelGroup, known: Mapping[str, Kernel]) -> str | None:
    """Why channels that could be removed are not: a kernel is out of a search's reach."""
    for use in (*group.producers, *group.consumers):
        if use.path not in known:
            return f"{use.path} is not compressed"
    return None


def _rows(shape: Sequence[int], channels: np.ndarray) -> np.ndarray:
    """The channel that every row of a reading kernel's matrix stands for."""
    # Inputs come last but one in the matrix's rows for every kernel that mixes channels.
    positions = int(np.prod([int(size) for size in shape[:-2]], dtype=np.int64))
    return np.tile(channels, positions)


class UnitOperations:
    """Turns what was decided on units into operations on single weights of their kernels.

    A weight is pruned if the channel it makes is pruned or the one that it reads: nothing reads a
    pruned channel any more, whatever biases and normalizations make of it.
    """

    def __init__(self, units: Sequence[ChannelUnit]):
        self._units = {unit.path: unit for unit in units}
        self._owner = {
            member.kernel.path: (unit, member) for unit in units for member in unit.members
        }
        self._sources: dict[str, list[tuple[ChannelUnit, Reader]]] = {}
        for unit in units:
            for reader in unit.readers:
                self._sources.setdefault(reader.kernel.path, []).append((unit, reader))

    def affected(self, path: str) -> list[str]:
        """Paths of the kernels that a unit's decisions change."""
        unit = self._units[path]
        members = [member.kernel.path for member in unit.members]
        return list(dict.fromkeys([*members, *(reader.kernel.path for reader in unit.readers)]))

    def of(self, path: str, operations: Mapping[str, np.ndarray]) -> np.ndarray:
        """The operations on a kernel's weights, uint8 of shape `(inputs, outputs)`.

        `operations` has those on the units by path, each of shape `(1, channels)`.
        """
        _, member = self._owner[path]
        rows, _ = member.kernel.spec.matrix_shape(member.kernel.shape)
        columns = self.of_outputs(path, operations)
        result = np.repeat(columns[None], rows, axis=0)
        for source, reader in self._sources.get(path, []):
            chosen = operations[source.path].reshape(-1)
            dead = (reader.rows >= 0) & (chosen[reader.rows] == Operation.PRUNE)
            result[dead] = Operation.PRUNE
        return result

    def of_outputs(self, path: str, operations: Mapping[str, np.ndarray]) -> np.ndarray:
        """The operations on a kernel's outputs, uint8 of shape `(outputs,)`."""
        unit, member = self._owner[path]
        chosen = operations[unit.path].reshape(-1)
        columns = np.where(member.columns >= 0, chosen[member.columns], Operation.KEEP)
        if not member.kernel.spec.exports_int8:
            columns = np.where(columns == Operation.QUANTIZE, Operation.KEEP, columns)
        return columns.astype(np.uint8)

    def of_units(self, plan: CompressionPlan) -> dict[str, np.ndarray]:
        """The operations on units, by path, that a plan of their kernels' channels means.

        A plan that has other groups than channels, prunes what has to stay, or prunes tied kernels
        differently raises a PlanError.
        """
        found = {}
        for unit in self._units.values():
            chosen = np.full((1, unit.count), Operation.KEEP, np.uint8)
            pruned: dict[int, str] = {}
            for member in unit.members:
                entry = plan.kernels.get(member.kernel.path)
                if entry is None:
                    continue
                if entry.group != "channel":
                    raise PlanError(
                        f"The plan of {entry.path!r} has groups of {entry.group!r}. Expected "
                        "'channel': only whole channels can be removed."
                    )
                known = member.columns >= 0
                chosen[0, member.columns[known]] = entry.operations[0, known]
                gone = member.columns[known & (entry.operations[0] == Operation.PRUNE)]
                pruned.update(dict.fromkeys(gone.tolist(), entry.path))
            if pruned and unit.frozen:
                raise PlanError(
                    f"The plan prunes channels of {unit.path!r}, which have to stay: "
                    f"{unit.frozen}. Leave them out of the plan."
                )
            _check_tied(unit, plan, pruned)
            chosen[0, list(pruned)] = Operation.PRUNE
            found[unit.path] = chosen
        return found

    def plan(self, operations: Mapping[str, np.ndarray]) -> CompressionPlan:
        """The plan of the kernels: every kernel's channels, those of one unit alike."""
        entries = []
        for path, (_, member) in self._owner.items():
            kernel = member.kernel
            outputs = self.of_outputs(path, operations)[None]
            entries.append(
                KernelPlan(path, kernel.shape, kernel.spec.layout, "channel", 8, outputs)
            )
        return CompressionPlan(entries)


def _check_tied(unit: ChannelUnit, plan: CompressionPlan, pruned: Mapping[int, str]) -> None:
    """Raises a PlanError unless all kernels of a unit prune the same channels."""
    for member in unit.members:
        entry = plan.kernels.get(member.kernel.path)
        for channel, path in pruned.items():
            columns = np.flatnonzero(member.columns == channel)
            if len(columns) and (
                entry is None or (entry.operations[0, columns] != Operation.PRUNE).any()
            ):
                raise PlanError(
                    f"The plan prunes channel {channel} of {path!r}, but {member.kernel.path!r} "
                    "keeps the channels that are tied to it. Expected tied kernels to be pruned "
                    "alike; rl_sparsity_tf.describe_groups(model) prints which are tied."
                )


@returns_keras_3
def mask_channels(model: keras.Model, live: Mapping[int, Any]) -> keras.Model:
    """Sets whole channels to zero: what makes them, and what would make them differ from zero.

    That is the columns of the kernels, biases, the gamma and beta of batch normalizations (the
    mean where there is no gamma), depthwise kernels and their biases.

    Args:
        model: A built, plain model of Keras 3 or `tf_keras`; it is not changed.
        live: Index of a group of [find_groups][rl_sparsity_tf.find_groups] -> one
            bool per channel, False for channels to set to zero. Other groups stay as they are.

    Returns:
        A copy, compiled as the model is, of which
        [shrink][rl_sparsity_tf.shrink] removes those channels.

    Raises:
        ArgumentError: If a group does not exist or is frozen, or a mask does not fit it.
        ModelError: If the model is not built, is wrapped, or cannot be copied.

    Example:
        >>> masked = rls.mask_channels(model, {0: [True, False] * 8})  # every other filter
        >>> rls.shrink(masked).get_layer("conv").filters
        8
    """
    check_plain(model, "mask_channels")
    copy = strip(model)
    groups = find_groups(copy)
    for index, given in live.items():
        if index not in range(len(groups)):
            raise ArgumentError(
                f"live names group {index!r}. Expected the index of one of the {len(groups)} "
                "groups that find_groups(model) lists."
            )
        group = groups[index]
        mask = np.asarray(given)
        if mask.dtype != bool or mask.shape != (group.size,):
            raise ArgumentError(
                f"The mask of group {index} has shape {mask.shape} and type {mask.dtype}. Expected "
                f"one bool for each of its {group.size} channels."
            )
        if group.frozen:
            raise ArgumentError(
                f"Group {index} is frozen: {group.frozen}. Leave it out; groups whose `frozen` is "
                "None can be masked."
            )
        if not mask.any():
            raise ArgumentError(
                f"The mask of group {index} leaves no channel. Expected at least one True."
            )
        paths = {use.path for use in group.followers}
        for use in (*group.producers, *group.followers):
            owner, _, attribute = use.path.rpartition("/")
            # A gamma of zero is enough, and fine-tuning may need the statistics.
            kept = attribute == "moving_mean" and f"{owner}/gamma" in paths
            if not kept and attribute not in ("alpha", "moving_variance"):
                _set_to_zero(use, mask)
    return copy


def _set_to_zero(use: ChannelUse, mask: np.ndarray) -> None:
    dead = (use.channels >= 0) & ~mask[use.channels]
    value = np.moveaxis(np.array(use.variable), use.axis, -1)
    value[..., dead] = 0
    use.variable.assign(np.moveaxis(value, -1, use.axis))
    if use.bias_variable is not None:
        bias = np.array(use.bias_variable)
        bias[dead] = 0
        use.bias_variable.assign(bias)


@takes_keras_3
def tie_channels(model: keras.Model, plan: CompressionPlan) -> CompressionPlan:
    """The plan of single weights that a plan of channels means.

    A plan that prunes a channel masks the weights that make it. Biases and batch normalizations
    can still give it a value, and training will. Here the weights that read the channel are masked
    too, so that nothing depends on it any more, in fine-tuning either;
    [shrink][rl_sparsity_tf.shrink] removes it.

    Args:
        model: A built, plain model with a graph, of Keras 3 or `tf_keras`.
        plan: A plan with groups of `"channel"`. Kernels that it leaves out are kept.

    Returns:
        A plan with groups of `"element"`, for `wrap`.

    Raises:
        ModelError: If the model is not built, is wrapped, or has no graph.
        PlanError: If the plan does not fit the model, prunes channels that have to stay, or prunes
            tied kernels differently.

    Example:
        >>> plan = rls.baselines.uniform(
        ...     model, sparsity=0.5, group="channel", exclude="classes"
        ... )
        >>> wrapped = rls.wrap(model, rls.tie_channels(model, plan))
        >>> history = wrapped.fit(x, y, epochs=4, verbose=0)
        >>> small = rls.shrink(rls.strip(wrapped))
    """
    check_graph(model, "tie_channels")
    kernels = find_kernels(model)
    operations = UnitOperations(find_units(ChannelGraph(model), kernels))
    decided = operations.of_units(resolve(plan, model))
    return element_plan(kernels, {k.path: operations.of(k.path, decided) for k in kernels})


def element_plan(
    kernels: Sequence[Kernel], operations: Mapping[str, np.ndarray]
) -> CompressionPlan:
    """The plan of operations on single weights, given by path, shape `(inputs, outputs)`."""
    return CompressionPlan(
        KernelPlan(k.path, k.shape, k.spec.layout, "element", 8, operations[k.path])
        for k in kernels
    )


def only_pruned(operations: np.ndarray) -> np.ndarray:
    """The same operations with all that is not pruned kept."""
    pruned = operations == Operation.PRUNE
    return np.where(pruned, Operation.PRUNE, Operation.KEEP).astype(np.uint8)
