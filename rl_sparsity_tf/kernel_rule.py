"""Rules in plans: what to do to a kernel, until weights say to which groups."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from rl_sparsity_tf.errors import PlanError, did_you_mean
from rl_sparsity_tf.grouping import GROUPS

METHODS = ("magnitude",)


@dataclasses.dataclass(frozen=True)
class KernelRule:
    """A rule for a kernel, or for all kernels whose path matches a pattern.

    Attributes:
        path: A kernel's path, or a pattern with `*` and `?`, e.g. `"*"` for every kernel. A
            kernel follows the first entry of the plan that matches it; exact paths go first.
        sparsity: Share of the kernel's weights to prune, in [0, 1).
        method: What is pruned first: `"magnitude"`, the groups of smallest root mean square.
        group: Kind of groups.
        quantize: Whether the groups that stay are quantized.
        bits: 8 or 4, the grid if they are.
    """

    path: str
    sparsity: float
    method: str = "magnitude"
    group: str = "element"
    quantize: bool = False
    bits: int = 8

    def __post_init__(self) -> None:
        if not isinstance(self.path, str):
            raise PlanError(
                f"A rule has the path {self.path!r}. Expected a text: a kernel's path or a pattern."
            )
        if (
            isinstance(self.sparsity, bool)
            or not isinstance(self.sparsity, int | float)
            or not 0.0 <= self.sparsity < 1.0
        ):
            raise PlanError(
                f"The rule for {self.path!r} has sparsity {self.sparsity!r}. Expected a number of "
                "at least 0 and below 1."
            )
        for name, value, choices in (
            ("method", self.method, METHODS),
            ("group", self.group, GROUPS),
        ):
            if value not in choices:
                raise PlanError(
                    f"The rule for {self.path!r} has {name} {value!r}. "
                    f"{did_you_mean(value, choices)}"
                )
        if not isinstance(self.quantize, bool) or self.bits not in (8, 4):
            raise PlanError(
                f"The rule for {self.path!r} has quantize={self.quantize!r} and bits="
                f"{self.bits!r}. Expected true or false, and 8 or 4."
            )

    def to_dict(self) -> dict[str, Any]:
        """The rule's entry in format 1."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, entry: Any) -> KernelRule:
        """Reads a rule's entry.

        Raises:
            PlanError: If a field is missing, unknown or malformed.
        """
        if not isinstance(entry, Mapping) or not isinstance(entry.get("path"), str):
            raise PlanError(
                f"The plan has the entry {entry!r}. Expected an object with the path of a kernel."
            )
        names = [field.name for field in dataclasses.fields(cls)]
        for name in entry:
            if name not in names:
                raise PlanError(
                    f"The rule for {entry['path']!r} has the unknown field {name!r}. "
                    f"{did_you_mean(name, names)}"
                )
        return cls(**entry)
