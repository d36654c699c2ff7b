"""What a compression wrapper can do to one kernel."""

from __future__ import annotations

import dataclasses
from typing import Any

from rl_sparsity_tf.errors import check_choice
from rl_sparsity_tf.layers.groups import KINDS
from rl_sparsity_tf.layers.kernel_spec import KernelSpec


@dataclasses.dataclass(frozen=True)
class KernelSettings:
    """What a wrapper can do to one kernel.

    Attributes:
        group: Kind of groups.
        prune: Whether the kernel has a mask.
        quantize: Whether groups can be put on the integer grid.
        shuffle: Whether neighbouring groups can swap.
        layout: The kernel's layout, kept so that a saved wrapper does not need the registry.
        per_output_scale: One scale per output unit, or one per tensor.
        gates: Tensors that lie side by side in the kernel and have a scale each.
    """

    group: str = "element"
    prune: bool = True
    quantize: bool = True
    shuffle: bool = True
    layout: str = "io"
    per_output_scale: bool = True
    gates: int = 1

    def __post_init__(self) -> None:
        check_choice("group", self.group, KINDS)

    @classmethod
    def of(cls, spec: KernelSpec, **choices: Any) -> KernelSettings:
        """Settings of a kernel that is viewed as the spec says."""
        return cls(
            layout=spec.layout,
            per_output_scale=spec.per_output_scale,
            gates=spec.gates,
            **choices,
        )
