"""What a network's decisions are about: its kernels, each by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import tf_keras as keras

from rl_sparsity_tf.allocation import ranking
from rl_sparsity_tf.allocation.budgets import Budget
from rl_sparsity_tf.allocation.layer_errors import best_saliency
from rl_sparsity_tf.allocation.ranking import saliency_of
from rl_sparsity_tf.allocation.size_budget import make_budget
from rl_sparsity_tf.allocation.storage import Storage
from rl_sparsity_tf.allocation.target import Target
from rl_sparsity_tf.export.size_model import KernelBytes
from rl_sparsity_tf.layers.groups import Grouping
from rl_sparsity_tf.layers.kernels import Kernel
from rl_sparsity_tf.layers.operations import Operation
from rl_sparsity_tf.layers.rules import KernelSelection
from rl_sparsity_tf.layers.wrapping import wrap
from rl_sparsity_tf.training.least_squares import LeastSquares
from rl_sparsity_tf.training.statistics import KernelStatistics

PartMatrix = Callable[[str], np.ndarray]
"""A wrapped kernel's present effective weights, by its path."""


class KernelDecisions:
    """Decisions on single kernels: what is decided is what is wrapped.

    A network that decides on something else has another of these; see
    [ChannelDecisions][rl_sparsity_tf.allocation.channel_decisions.ChannelDecisions].

    Args:
        storage: How the kernels are cut and stored, or the kind of groups of all of them.
        shuffles: Whether Shuffle is among the operations.
        sizes: The bytes that a target in bytes is met by; by default they are found out.
        selection: The kernels of the model that are decided on; by default all that are not frozen.

    Attributes:
        group: The kind of groups that decisions are about, where they are not named.
        storage: How what is decided on is cut and stored.
        part_storage: How the wrapped kernels are.
        selection: None until a model is wrapped, if not given.
        removable: Weights that every kernel can give at most; None for all but one group of each.
        least_share: The least share of groups to prune that buckets are cut for.
        by_magnitude: Whether magnitude alone says which groups of a kernel are the least salient.
    """

    removable: np.ndarray | None = None
    # A size that hardly asks for zeros still wants edges to choose among.
    least_share = 0.5
    heuristics: Sequence[str] = ranking.HEURISTICS
    by_magnitude = False

    def __init__(
        self,
        storage: Storage | str,
        shuffles: bool = True,
        sizes: KernelBytes | None = None,
        selection: KernelSelection | None = None,
    ):
        storage = Storage(storage) if isinstance(storage, str) else storage
        self.group = storage.group
        self.storage = self.part_storage = storage
        self.shuffles = shuffles
        self.sizes = sizes
        self.selection = selection

    def selected(self, model: keras.Model) -> KernelSelection:
        """The kernels of a model that are decided on; a ModelError says that there are none."""
        if self.selection is None:
            self.selection = KernelSelection.of(model)
        return self.selection.check(model)

    def wrap(self, model: keras.Model) -> keras.Model:
        """The wrapped copy of a model that takes the decisions."""
        used = [one for one in Operation if self.shuffles or one != Operation.SHUFFLE]
        groups = {path: one.group for path, one in self.storage.named.items()}
        paths = self.selected(model).paths
        return wrap(model, group=self.group, groups=groups, operations=used, include=paths)

    def kernels(self, model: keras.Model, parts: Sequence[Kernel]) -> list[Kernel]:
        """What is decided on, given the kernels of the wrapped copy of a model."""
        return list(parts)

    def budget(self, model: keras.Model, kernels: list[Kernel], target: Target) -> Budget:
        """The budget of a target; its errors say what part of the model takes no part."""
        with self.selected(model).explained():
            return make_budget(model, kernels, target, self.storage, self.sizes)

    def adopt(self, budget: Budget) -> None:
        """Follows the network to another budget of its own."""

    def operations(
        self, decided: Mapping[str, np.ndarray], paths: Sequence[str]
    ) -> dict[str, np.ndarray]:
        """The operations on some of the wrapped kernels that follow from what was decided."""
        return {path: decided[path] for path in paths}

    def affected(self, path: str) -> Sequence[str]:
        """The wrapped kernels that a decision changes."""
        return [path]

    def matrix(self, path: str, part_matrix: PartMatrix) -> np.ndarray:
        """The present effective weights of what is decided on."""
        return part_matrix(path)

    def statistics(self, parts: Mapping[str, KernelStatistics]) -> dict[str, KernelStatistics]:
        """Statistics of what is decided on, from those of the wrapped kernels."""
        return dict(parts)

    def moved(self, path: str, part_matrix: PartMatrix, fits: LeastSquares) -> float:
        """How far outputs move by what was done to a kernel, before recovery."""
        return fits.error(path, part_matrix(path))

    def saliency(
        self,
        path: str,
        matrix: np.ndarray,
        grouping: Grouping,
        fits: LeastSquares | None,
        density: float,
    ) -> np.ndarray:
        """What the groups are pruned by: the least salient first; flat, 1 is average.

        Magnitude, or with least squares what a group adds to its layer's outputs, whichever leaves
        the smaller error at the density that the target leaves; with `by_magnitude` always that.
        """
        problem = None if fits is None or self.by_magnitude else fits.problems.get(path)
        if problem is None:
            return saliency_of(matrix, grouping)
        _, found = best_saliency(matrix, grouping, problem, density)
        return np.sqrt(found / max(float(found.mean()), 1e-30)).reshape(-1)

    def scores(
        self,
        name: str,
        kernels: Sequence[Kernel],
        groupings: Mapping[str, Grouping],
        matrices: Mapping[str, np.ndarray],
        gradients: Mapping[str, np.ndarray],
        fits: LeastSquares | None,
    ) -> list[np.ndarray] | None:
        """Scores of all groups by a heuristic, lowest first; None if it has nothing to rank by."""
        return ranking.scores(name, kernels, groupings, matrices, gradients)
