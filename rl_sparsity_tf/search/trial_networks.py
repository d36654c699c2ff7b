"""The network that is searched at a size: one for all sizes, or stored as each size wants it."""

from __future__ import annotations

import dataclasses
import math

from rl_sparsity_tf.allocation.budgets import CostBudget
from rl_sparsity_tf.allocation.decisions import KernelDecisions
from rl_sparsity_tf.allocation.size_costs import MARGINS
from rl_sparsity_tf.environment.network import CompressedNetwork
from rl_sparsity_tf.layers.plan import CompressionPlan
from rl_sparsity_tf.search.storage_choice import StorageChooser

_SHARE = 1.0 - MARGINS["tflite_bytes"]


class TrialNetworks:
    """Makes the network of every size that is tried.

    Args:
        plain: The network, made for more bytes than any file of it.
        chooser: What chooses how its kernels are cut and stored at every size; None for one way at
            all of them.

    Attributes:
        plain: The same.
    """

    def __init__(self, plain: CompressedNetwork, chooser: StorageChooser | None = None):
        budget = plain.budget
        assert isinstance(budget, CostBudget)
        self.plain, self._chooser = plain, chooser
        self._smallest = budget.smallest

    @property
    def smallest(self) -> int:
        """Bytes of the smallest file in reach."""
        return math.ceil(self._smallest / _SHARE)

    def at(self, limit: int) -> CompressedNetwork:
        """The network whose plans make files of so many bytes at most."""
        self.limit(self.plain, limit)
        if self._chooser is None:
            return self.plain
        build = self._chooser.build

        def limited(decisions: KernelDecisions) -> CompressedNetwork:
            other = build(decisions=decisions)
            self.limit(other, limit)
            return other

        return dataclasses.replace(self._chooser, build=limited).choose(self.plain).network

    @staticmethod
    def limit(network: CompressedNetwork, limit: int) -> None:
        """Brings a network back to its beginning, under a limit of bytes.

        Raises:
            TargetError: If it is out of reach.
        """
        budget = network.budget
        assert isinstance(budget, CostBudget)
        network.retarget(budget.limited(limit * _SHARE, f"Target(tflite_bytes={limit})"))


def is_stored_as(network: CompressedNetwork, plan: CompressionPlan) -> bool:
    """Whether a plan's kernels are cut and stored as those of a network, or kept."""
    pairs = [(plan.kernels[k.path], network.storage.of(k.path)) for k in network.kernels]
    return all(
        entry.group == storage.group and entry.bits in (storage.bits, 32)
        for entry, storage in pairs
    )
