"""A budget for whole channels: what the network costs without those that are pruned."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from rl_sparsity_tf.allocation.budgets import CostBudget, KernelState
from rl_sparsity_tf.channels.units import ChannelUnit
from rl_sparsity_tf.errors import TargetError

# The share of channels that meets the limit if all units are pruned alike is looked for among this
# many.
_SHARES = 512
# A unit's floor, as a share of the channels that the target leaves on average.
_FLOOR_SHARE = 0.25
_SWEEPS, _LEVELS = 4, 33


@dataclasses.dataclass(frozen=True, eq=False)
class ChannelCost:
    """What the network costs.

    Attributes:
        total: `(live, integers) -> cost`: the shares of the units' channels that live, of shape
            `(..., units)`, and whether each unit's kernels are stored as integers, `(units,)`.
        integers: Whether storing integers changes the cost.
    """

    total: Callable[[np.ndarray, np.ndarray], np.ndarray]
    integers: bool = False


class ChannelBudget(CostBudget):
    """A budget that whole channels are pruned for.

    The cost of a layer depends on the channels it reads as well as on those it makes, so it is
    always the whole network that is counted. `whole` is what the dense network costs; `able` says
    which units can give channels. A limit that cannot be reached raises a TargetError that names
    the least that can.
    """

    def __init__(self, limit: float, cost: ChannelCost, units: Sequence[ChannelUnit], name: str):
        self.limit, self.name = limit, name
        self.cost = cost
        self.units = units
        self.totals = np.array([unit.size for unit in units], np.int64)
        self.able = np.array([unit.frozen is None and unit.count > 1 for unit in units])
        self._integers = np.array([unit.spec.exports_int8 for unit in units])
        self._column = np.array([unit.shape[0] for unit in units], np.int64)
        self.elements = int(self.totals.sum())
        none = np.zeros(len(units), np.int64)
        self.whole = self._of(none)
        self.slack = 1e-6 * self.whole
        self.pruned = none.copy()
        self._share = self._even_share()
        self.wanted = round(self._share * float(self.totals[self.able].sum()))
        self.capacity = self._worthwhile(self._capacities(_FLOOR_SHARE * (1.0 - self._share)))
        if self._of(self.capacity) > limit + self.slack:
            self.capacity = self._worthwhile(self._capacities(0.0))
        least = self._of(self.capacity)
        if least > limit + self.slack:
            reached = np.ceil(1e4 * least / self.whole) / 1e4
            raise TargetError(
                f"{name} cannot be reached: with every set of channels pruned as far as it pays, "
                f"{reached:.4g} of the dense network's cost is left. Expected at least that much; "
                "rl_sparsity_tf.describe_groups(model) says which channels have to stay."
            )
        self.goal = 1.0 - limit / self.whole

    def limited(self, limit: float, name: str | None = None) -> ChannelBudget:
        """The same costs under another limit, with nothing pruned yet."""
        name = self.name if name is None else name
        return ChannelBudget(limit, self.cost, self.units, name)

    @property
    def smallest(self) -> float:
        """What is left with every set of channels pruned as far as it pays."""
        return self._of(self._worthwhile(self._capacities(0.0)))

    def _capacities(self, density: float) -> np.ndarray:
        kept = np.maximum(1, np.ceil(density * self.totals / self._column)).astype(np.int64)
        return np.where(self.able, self.totals - kept * self._column, 0)

    def _worthwhile(self, capacity: np.ndarray) -> np.ndarray:
        """What units can give without becoming dearer again.

        On real processors a layer of one channel can take longer than one of eight.
        """
        pruned = capacity.copy()
        for _ in range(_SWEEPS):
            before = pruned.copy()
            for index in np.flatnonzero(self.able):
                most = int(capacity[index] // self._column[index])
                counts = np.unique(np.linspace(0, most, _LEVELS).astype(np.int64))[::-1]
                tried = np.repeat(pruned[None], len(counts), axis=0)
                tried[:, index] = counts * self._column[index]
                costs = self.cost.total(self.live(tried), self._integers)
                # The first of equals prunes most.
                pruned[index] = tried[int(np.argmin(np.round(costs / self.whole, 9))), index]
            if (pruned == before).all():
                break
        return pruned

    def _even_share(self) -> float:
        """The least share of channels that meets the limit if all units give the same."""
        shares = np.arange(_SHARES) / _SHARES
        live = 1.0 - shares[:, None] * self.able
        costs = self.cost.total(live, self._integers)
        met = np.flatnonzero(costs <= self.limit + self.slack)
        return float(shares[met[0]]) if len(met) else float(shares[-1])

    def live(self, pruned: Sequence[float] | np.ndarray) -> np.ndarray:
        """The share of every unit's channels that lives."""
        return 1.0 - np.asarray(pruned) / self.totals

    def _of(self, pruned: np.ndarray) -> float:
        """The cost if all that can be is stored as integers."""
        return float(self.cost.total(self.live(pruned), self._integers))

    def total(
        self, pruned: Sequence[float] | np.ndarray, integers: Sequence[bool] | np.ndarray
    ) -> float:
        """The cost of a whole plan."""
        return float(self.cost.total(self.live(pruned), np.asarray(integers, bool)))

    def _stored(self, states: Sequence[KernelState]) -> np.ndarray:
        """Which units are, or can still be, stored as integers."""
        open_to = [(s.quantized or s.undecided > 0) and not s.kept for s in states]
        return np.array(open_to) & self._integers

    def least(self, states: Sequence[KernelState]) -> float:
        """The cost if the undecided channels go, as far as the floors allow."""
        pruned = np.array([state.pruned for state in states], np.int64)
        undecided = np.array([state.undecided for state in states], np.int64)
        more = np.minimum(undecided, np.maximum(self.capacity - pruned, 0))
        return self.total(pruned + more, self._stored(states))

    def expected(self, states: Sequence[KernelState]) -> float:
        """The cost if nothing more is pruned."""
        return self.total([s.pruned for s in states], self._stored(states))

    def stored_share(self, states: Sequence[KernelState]) -> float:
        """Bits that living weights are stored in, or all of them where bytes are the target."""
        quarter = np.array([state.integers for state in states]) & self._integers
        if self.cost.integers:
            pruned = [state.pruned for state in states]
            return self.total(pruned, quarter) / self.total(
                np.zeros(len(states)), np.zeros(len(states), bool)
            )
        return float((self.totals * np.where(quarter, 0.25, 1.0)).sum() / self.elements)

    @property
    def sparsity(self) -> float:
        """Share of the cost that is saved."""
        return 1.0 - self._of(self.pruned) / self.whole

    @property
    def progress(self) -> float:
        """Share of the target that is met, in [0, 1]."""
        wanted = self.whole - self.limit
        return float(np.clip((self.whole - self._of(self.pruned)) / wanted, 0.0, 1.0))

    @property
    def pruned_share(self) -> float:
        """Share of every unit's channels that go if all are pruned alike."""
        return self._share
