"""Which groups and how many bits each kernel should have, where a target in bytes leaves it open.

A sparse int8 weight takes two or three bytes with its index, one in a block of four a byte and a
quarter, a dense int4 weight half a byte: which is best depends on the kernel, on what the others
take, and on the size wanted. The knapsack of [dynamic_programming][] is given all of them; what it
finds, and the plain ways to store everything alike, are compared by the networks they lead to.

Bytes are not time: XNNPACK restores int8 constants when LiteRT loads a file, but no int4 ones, and
computes convolutions with constant kernels only. Those in 4 bits are left to slower kernels.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from rl_sparsity_tf.allocation.alternatives import Alternative, note
from rl_sparsity_tf.allocation.decisions import KernelDecisions
from rl_sparsity_tf.allocation.dynamic_programming import (
    DYNAMIC_PROGRAMMING,
    LARGEST_ERROR,
    POWER,
    POWERS,
    affordable,
    knapsack,
    propose_all,
)
from rl_sparsity_tf.allocation.layer_errors import FLOAT, KernelErrors, kernel_errors
from rl_sparsity_tf.allocation.size_budget import KernelCosts, SizeBudget, kernel_costs
from rl_sparsity_tf.allocation.storage import KernelStorage, Storage
from rl_sparsity_tf.callbacks import STORAGE
from rl_sparsity_tf.console import SearchProgress, silent
from rl_sparsity_tf.environment.candidates import PROPOSED, Candidate, figures_of
from rl_sparsity_tf.environment.network import CompressedNetwork, evaluate_plan
from rl_sparsity_tf.environment.reward import Outcome, RewardFunction, bounded
from rl_sparsity_tf.errors import TargetError
from rl_sparsity_tf.export.size_model import KernelBytes
from rl_sparsity_tf.layers.kernel_spec import INT4_AS_FAST, has_int4
from rl_sparsity_tf.layers.kernels import Kernel

GROUPS = ("element", "block4")
"""The kinds of groups that are compared. Blocks of 16 were 1.6, 1.2 and 0.3 points behind those of
4 (LeNet-300-100, Fashion-MNIST, one seed, 12, 20 and 40 % of the dense int8 file)."""

INT4 = ("all", "fast", "none")
"""Which kernels may have 4 bits, where TFLite has them: any, those with which LiteRT is as fast as
in 8 bits ([INT4_AS_FAST][rl_sparsity_tf.layers.kernel_spec.INT4_AS_FAST]), or none."""

_UNITS = 8192

# Of the dense model's metric: what 4 bits in slow kernels must be worth to be worth a word.
_MUCH = 0.01
_NAMED = 3
# Less than any plan is worth.
_WORST = Outcome(
    metric=math.nan,
    dense_metric=math.nan,
    loss=math.inf,
    retention=0.0,
    sparsity=0.0,
    target_sparsity=0.0,
    stored_bits=1.0,
    reconstruction_error=0.0,
)

SINGLE_WEIGHTS = "dynamic_programming_element"
"""Who proposed the plan of a [StorageChoice][]."""

Build = Callable[..., CompressedNetwork]
"""Makes a network of `decisions=KernelDecisions(...)`."""


@dataclasses.dataclass(frozen=True)
class StorageChoice:
    """What to search, and what the choice is held against in the end.

    Attributes:
        network: The network whose best plan by dynamic programming has the lowest validation loss
            after recovery, with nothing decided. All plans that were evaluated count as its
            evaluations.
        others: The plan of dynamic programming for single weights at 8 bits: what is behind after a
            recovery in closed form may be ahead after the fine-tuning.
        slow_int4: What 4 bits would be worth where they cost time, if that was asked and is much.
    """

    network: CompressedNetwork
    others: Sequence[Candidate] = ()
    slow_int4: SlowInt4 | None = None


@dataclasses.dataclass(frozen=True)
class SlowInt4:
    """What is lost by keeping 4 bits out of kernels that LiteRT computes slower with them.

    Attributes:
        metric: The best plan's validation metric after the fit, as the search stores kernels.
        possible: The same with 4 bits in any kernel, in no more bytes.
        kernels: The kernels that would have 4 bits then, and may not.
    """

    metric: float
    possible: float
    kernels: Sequence[str]

    def to_dict(self) -> dict[str, Any]:
        """As metrics.json has it."""
        return {
            "metric": self.metric,
            "metric_with_int4_all": self.possible,
            "kernels": list(self.kernels),
            "note": str(self),
        }

    def __str__(self) -> str:
        others = len(self.kernels) - _NAMED
        named = ", ".join(self.kernels[:_NAMED]) + (f" and {others} more" if others > 0 else "")
        return (
            f"4 bits in {named}, too, would bring the best plan of the start "
            f"from {self.metric:.4f} to {self.possible:.4f} after the fit, in no more bytes. Pass "
            "int4='all' if that is worth its time: LiteRT computes convolutions with 8 bits faster "
            "(benchmarks: 1.1 to 6 times)."
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class StorageChooser:
    """What [choose_storage][] needs beside a network.

    `build` makes another network of the same model; `int4` says which kernels may have 4
    bits, one of [INT4][].
    """

    build: Build
    reward: RewardFunction
    int4: str = "all"
    progress: SearchProgress = dataclasses.field(default_factory=silent)

    def choose(self, network: CompressedNetwork) -> StorageChoice:
        """The best storage for a network's budget."""
        with self.progress.phase(STORAGE):
            return choose_storage(network, self.build, self.reward, self.int4, self.progress)


def choose_storage(
    network: CompressedNetwork,
    build: Build,
    reward: RewardFunction,
    int4: str = "all",
    progress: SearchProgress | None = None,
) -> StorageChoice:
    """Compares how kernels can be cut and stored for a target in bytes.

    The network has all kernels in single weights, at 8 bits; `build` makes another of the same
    model. `int4` is which kernels may have 4 bits, one of [INT4][].
    """
    decisions = network.decisions
    sizes = decisions.sizes
    assert sizes is not None
    options = storage_options(network, sizes, int4)
    proposed = propose_storages(network, options, int4)
    wanted = [Storage("block4"), *proposed.values()]
    single_weights = []
    told = functools.partial(_tell, progress or silent(), reward)
    best, lowest = network, _WORST
    for power, outcome in _evaluated(network):
        lowest = _lower(lowest, outcome)
        told(network)
        if power == POWER:  # what the contender of that name is given
            value = bounded(reward, outcome, None)
            single_weights.append(Candidate.of(network, value, PROPOSED, SINGLE_WEIGHTS))
    seen = set(network.seen)

    def built(storage: Storage) -> CompressedNetwork | None:
        try:
            return build(
                decisions=KernelDecisions(storage, decisions.shuffles, sizes, decisions.selection)
            )
        except TargetError:  # the last block of every kernel takes more than a last single weight
            return None

    for number, storage in enumerate(wanted):
        if storage in wanted[:number] or storage == network.storage:
            continue
        other = built(storage)
        if other is None:
            continue
        found = _WORST
        for _, outcome in _evaluated(other):
            found = _lower(found, outcome)
            told(other)
        seen |= other.seen
        if found.loss < lowest.loss:
            best, lowest = other, found
    best.seen |= seen
    for path, ways in network.alternatives.items():
        known = best.alternatives.get(path, {})
        note(best, path, [one for key, one in ways.items() if key not in known])
    slow = None
    if int4 == "fast":
        with_all = propose_storages(network, options, "all", (POWER,)).get(POWER)
        if with_all is not None and with_all not in proposed.values():
            slow = _slow_int4(network, lowest, with_all, built)
    return StorageChoice(best, single_weights, slow)


def _slow_int4(
    network: CompressedNetwork,
    chosen: Outcome,
    storage: Storage,
    built: Callable[[Storage], CompressedNetwork | None],
) -> SlowInt4 | None:
    """What the plan of least layer error is worth with 4 bits in any kernel; None if no more."""
    if not math.isfinite(chosen.loss):
        return None
    slow = [
        kernel.path
        for kernel in network.kernels
        if storage.of(kernel.path).bits == 4 and not _may_have_int4(kernel, "fast")
    ]
    other = built(storage) if slow else None
    if other is None:
        return None
    (plan,) = propose_all(other, (POWER,))
    outcome = evaluate_plan(other, plan, other.recovery.steps)
    if not outcome.retention - chosen.retention >= _MUCH:
        return None
    return SlowInt4(chosen.metric, outcome.metric, slow)


def storage_options(
    network: CompressedNetwork, sizes: KernelBytes, int4: str = "all"
) -> list[list[_Option]]:
    """Every kernel's ways to be cut and stored.

    The network has all kernels in single weights, at 8 bits. `int4` is which kernels may have 4
    bits, one of [INT4][]; with `"fast"`, 4 bits in slow kernels are among the options, too, to be
    compared with. Those that it allows are noted as what else was possible.
    """
    limit, density = _limit(network), 1.0 - network.budget.goal
    measured = "all" if int4 == "fast" else int4
    options = [
        _options(network, one, sizes, density, limit, _may_have_int4(one, measured))
        for one in network.kernels
    ]
    for kernel, one in zip(network.kernels, _allowed(network, options, int4), strict=True):
        note(network, kernel.path, [option.alternative for option in one])
    return options


def _allowed(
    network: CompressedNetwork, options: Sequence[Sequence[_Option]], int4: str
) -> list[list[_Option]]:
    return [
        [option for option in one if option.storage.bits != 4 or _may_have_int4(kernel, int4)]
        for kernel, one in zip(network.kernels, options, strict=True)
    ]


def _limit(network: CompressedNetwork) -> float:
    budget = network.budget
    assert isinstance(budget, SizeBudget)
    return budget.limit - budget.fixed


def propose_storages(
    network: CompressedNetwork,
    options: Sequence[Sequence[_Option]],
    int4: str = "all",
    powers: Sequence[float] = POWERS,
) -> dict[float, Storage]:
    """What the knapsack chooses at each power of the layers' errors, where it finds anything.

    `options` are those of [storage_options][], of which `int4` may allow fewer.
    """
    limit = _limit(network)
    options = _allowed(network, options, int4)
    costs = [np.concatenate([option.costs for option in one]) for one in options]
    found = {}
    for power in powers:
        errors = [
            np.concatenate([option.errors for option in one]).clip(0, LARGEST_ERROR) ** power
            for one in options
        ]
        entries = knapsack(errors, costs, limit, _UNITS)
        if entries is None:
            continue
        named = {}
        for kernel, one, entry in zip(network.kernels, options, entries, strict=True):
            sizes_of = np.cumsum([len(option.costs) for option in one])
            named[kernel.path] = one[int(np.searchsorted(sizes_of, entry, side="right"))].storage
        found[power] = Storage("element", named)
    return found


def _may_have_int4(kernel: Kernel, int4: str) -> bool:
    """Whether a kernel can, and may, be stored in 4 bits."""
    kind = kernel.spec.kind
    allowed = int4 == "all" or (int4 == "fast" and kind in INT4_AS_FAST)
    return allowed and kernel.spec.exports_int8 and has_int4(kind)


@dataclasses.dataclass(frozen=True, eq=False)
class _Option:
    """One way to cut and store a kernel, and what is known of it."""

    storage: KernelStorage
    alternative: Alternative

    @property
    def errors(self) -> np.ndarray:
        """By how much of it lives."""
        return self.alternative.errors

    @property
    def costs(self) -> np.ndarray:
        """Bytes, by how much of it lives."""
        assert self.alternative.costs is not None
        return self.alternative.costs


def _options(
    network: CompressedNetwork,
    kernel: Kernel,
    sizes: KernelBytes,
    density: float,
    limit: float,
    int4: bool,
) -> list[_Option]:
    fits = network.least_squares
    problem = None if fits is None else fits.problems.get(kernel.path)
    matrix = network.originals[kernel.path]
    found = []
    for group in GROUPS:
        grouping = kernel.grouping(group)
        costs = kernel_costs(sizes, kernel, KernelStorage(group))
        errors = kernel_errors(
            matrix,
            grouping,
            kernel.spec,
            None if problem is None else problem.regrouped(grouping),
            bits=[FLOAT, 8] if kernel.spec.exports_int8 else [FLOAT],
            density=density,
            most=affordable(costs, limit),
        )
        for bits in errors.errors:
            found.append(_option(errors, costs, KernelStorage(group), bits))
    if int4:
        # There is no sparse form of 4 bits, so that zeros save nothing: only the whole kernel.
        storage = KernelStorage("element", 4)
        costs = kernel_costs(sizes, kernel, storage)
        errors = kernel_errors(
            matrix,
            kernel.grouping("element"),
            kernel.spec,
            problem,
            bits=[4],
            counts=[kernel.size],
        )
        found.append(_option(errors, costs, storage, 4))
    return found


def _option(errors: KernelErrors, costs: KernelCosts, storage: KernelStorage, bits: int) -> _Option:
    prices = np.array([costs.cost(float(live), bits < FLOAT) for live in errors.live])
    way = Alternative(storage.group, bits, errors.live, errors.errors[bits], prices)
    return _Option(storage, way)


def _evaluated(network: CompressedNetwork) -> Iterator[tuple[float, Outcome]]:
    """The outcome of what dynamic programming proposes at each power of the layers' errors.

    While one is looked at, the network is as it was evaluated; afterwards nothing is decided.
    """
    for power, plan in zip(POWERS, propose_all(network, POWERS), strict=True):
        yield power, evaluate_plan(network, plan, network.recovery.steps)
    network.reset()


def _tell(progress: SearchProgress, reward: RewardFunction, network: CompressedNetwork) -> None:
    """Tells of a network's plan, which was evaluated."""
    value = bounded(reward, network.outcome, None)
    figures = functools.partial(figures_of, network, value, DYNAMIC_PROGRAMMING)
    progress.evaluated(None, value, figures)


def _lower(lowest: Outcome, outcome: Outcome) -> Outcome:
    return outcome if outcome.loss < lowest.loss else lowest
