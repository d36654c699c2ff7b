"""How the kernels of a network are cut into groups, and how many bits their integers have."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from rl_sparsity_tf.allocation.layer_errors import FLOAT
from rl_sparsity_tf.allocation.ranking import survivors
from rl_sparsity_tf.errors import ArgumentError, check_choice
from rl_sparsity_tf.layers.groups import KINDS, Grouping
from rl_sparsity_tf.layers.kernels import Kernel
from rl_sparsity_tf.layers.operations import Operation
from rl_sparsity_tf.layers.plan import CompressionPlan, KernelPlan


@dataclasses.dataclass(frozen=True)
class KernelStorage:
    """How one kernel is cut and stored.

    `bits` is 8 or 4, of its weights where they are integers. A group or a number that is not known
    raises an ArgumentError.
    """

    group: str = "element"
    bits: int = 8

    def __post_init__(self) -> None:
        check_choice("group", self.group, KINDS)
        if self.bits not in (8, 4):
            raise ArgumentError(f"bits={self.bits!r} cannot be used. Expected 8 or 4.")


@dataclasses.dataclass(frozen=True)
class Storage:
    """How the kernels of a network are cut and stored.

    Kernels in `named`, by path, have a storage of their own; `group` and `default_bits` (8 or 4, of
    integers) are those of the others.

    Example:
        >>> storage = Storage("element", {"dense/kernel": KernelStorage("block4", 8)})
        >>> storage.of("dense/kernel").group
        'block4'
    """

    group: str = "element"
    named: Mapping[str, KernelStorage] = dataclasses.field(default_factory=dict)
    default_bits: int = 8

    def of(self, path: str) -> KernelStorage:
        """How a kernel is cut and stored."""
        return self.named.get(path, KernelStorage(self.group, self.default_bits))

    def key(self, kernels: Sequence[Kernel]) -> bytes:
        """Bytes that equal storages of a network share, whatever its layers are called."""
        named = [(n, self.of(one.path)) for n, one in enumerate(kernels) if one.path in self.named]
        return repr((self.group, self.default_bits, named)).encode()

    def bits(self, paths: Iterable[str]) -> dict[str, int]:
        """The bits of kernels' integers, by path."""
        return {path: self.of(path).bits for path in paths}

    def grouping(self, kernel: Kernel) -> Grouping:
        """A kernel's groups."""
        return kernel.grouping(self.of(kernel.path).group)

    def groupings(self, kernels: Sequence[Kernel]) -> dict[str, Grouping]:
        """The groups of kernels, by path."""
        return {kernel.path: self.grouping(kernel) for kernel in kernels}

    def plan(self, kernels: Sequence[Kernel], operations: Sequence[np.ndarray]) -> CompressionPlan:
        """The plan of one operation per group, for every kernel in order."""
        return CompressionPlan(
            self._entry(kernel, chosen, self.of(kernel.path).bits)
            for kernel, chosen in zip(kernels, operations, strict=True)
        )

    def plan_from_live(
        self, kernels: Sequence[Kernel], live: Sequence[np.ndarray], quantize: bool = True
    ) -> CompressionPlan:
        """The plan in which some groups live and the others are pruned.

        With `quantize`, what lives is quantized where TFLite can store the kernel as integers;
        elsewhere, and without it, it is kept.
        """
        pairs = zip(kernels, live, strict=True)
        chosen = [
            np.where(alive, survivors(one, quantize), Operation.PRUNE) for one, alive in pairs
        ]
        return self.plan(kernels, chosen)

    def plan_at(
        self, kernels: Sequence[Kernel], live: Sequence[np.ndarray], bits: Mapping[str, int]
    ) -> CompressionPlan:
        """The plan in which some groups live, at 32, 8 or 4 bits by path."""
        entries = []
        for kernel, alive in zip(kernels, live, strict=True):
            stored = bits[kernel.path]
            stays = Operation.KEEP if stored == FLOAT else Operation.QUANTIZE
            entries.append(self._entry(kernel, np.where(alive, stays, Operation.PRUNE), stored))
        return CompressionPlan(entries)

    def _entry(self, kernel: Kernel, chosen: np.ndarray, bits: int) -> KernelPlan:
        group, layout = self.of(kernel.path).group, kernel.spec.layout
        return KernelPlan(kernel.path, kernel.shape, layout, group, bits, chosen.astype(np.uint8))
