"""What a search has measured of the ways to store each kernel: what could have been chosen.

Nothing is measured for it: whoever proposes plans notes down what it found out for them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np

from rl_sparsity_tf.allocation.channel_decisions import ChannelDecisions
from rl_sparsity_tf.allocation.channel_programming import ChannelProblem
from rl_sparsity_tf.allocation.problem import Problem
from rl_sparsity_tf.layers.operations import Operation
from rl_sparsity_tf.layers.plan import CompressionPlan

# Six digits tell densities and errors apart, and keep the file small.
_DIGITS = 6
_MOST_LEVELS = 32


@dataclasses.dataclass(frozen=True, eq=False)
class Alternative:
    """One way to cut and store a kernel.

    Attributes:
        group: Kind of groups.
        bits: Of what lives: 32, 8 or 4.
        live: Numbers of living weights (of channels where these are decided), ascending.
        errors: Energy of the change of the layer's outputs over that of the outputs, one per
            number; where channels are decided, summed over the kernels that read them.
        costs: Bytes with each number; None where the target is not in bytes. Where channels are
            decided, the whole network's cost as a share of the dense one's.
    """

    group: str
    bits: int
    live: np.ndarray
    errors: np.ndarray
    costs: np.ndarray | None = None

    def to_dict(self) -> dict[str, Any]:
        """The alternative as JSON-ready values."""
        costs = None if self.costs is None else _numbers(self.costs)
        found = {"group": self.group, "bits": self.bits}
        return found | {
            "live": _numbers(self.live),
            "errors": _numbers(self.errors),
            "costs": costs,
        }


def _numbers(values: np.ndarray) -> list[float]:
    return [float(f"{value:.{_DIGITS}g}") for value in values]


def note(network: Problem, path: str, found: Iterable[Alternative]) -> None:
    """Adds what was found out of a kernel; what was known of the same storage is replaced."""
    known = network.alternatives.setdefault(path, {})
    known |= {(one.group, one.bits): one for one in found}


def alternatives_of(network: Problem, plan: CompressionPlan) -> dict[str, Any]:
    """What is known of every kernel's alternatives, as JSON-ready values.

    `plan` is the network's best; the cost of other numbers of channels depends on the channels of
    all others, which are taken to be the plan's.
    """
    decisions = network.decisions
    if isinstance(decisions, ChannelDecisions):
        return {"unit": "channels", "kernels": _of_channels(network, decisions, plan)}
    known = network.alternatives
    named = {path: [one.to_dict() for one in known[path].values()] for path in known}
    return {"unit": "weights", "kernels": named}


def _of_channels(
    network: Problem, decisions: ChannelDecisions, plan: CompressionPlan
) -> dict[str, Any]:
    problem = ChannelProblem.of(network)
    chosen = [plan.kernels.get(unit.path) for unit in problem.units]
    gone = np.array([0 if one is None else _pruned(one.operations) for one in chosen], np.int64)
    found = {}
    for index, unit in enumerate(problem.units):
        if not problem.budget.able[index]:  # its channels have to stay
            continue
        errors = decisions.errors(unit, network.least_squares).errors
        live = np.unique(np.rint(np.linspace(1, unit.count, _MOST_LEVELS)).astype(np.int64))
        live = np.unique(np.append(live, unit.count - gone[index]))
        tried = np.repeat(gone[None], len(live), axis=0)
        tried[:, index] = unit.count - live
        costs = problem.costs(tried) / problem.budget.whole
        one = Alternative("channel", 8, live, errors[unit.count - live], costs)
        found[unit.path] = [one.to_dict()]
    return found


def _pruned(operations: np.ndarray) -> int:
    return int((operations == Operation.PRUNE).sum())
