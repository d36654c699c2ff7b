"""Rules in plans: what to do to a kernel, until weights say to which groups."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from rl_sparsity_tf.errors import PlanError, did_you_mean
from rl_sparsity_tf.layers.groups import GROUPS, PATTERNS

METHODS = ("magnitude",)
_EITHER = ("sparsity", "pattern")


@dataclasses.dataclass(frozen=True)
class KernelRule:
    """A rule for a kernel, or for all kernels whose path matches one with wildcards.

    Either a sparsity or a pattern says how much is pruned.

    Attributes:
        path: A kernel's path, or one with `*` and `?`, e.g. `"*"` for every kernel. A
            kernel follows the first entry of the plan that matches it; exact paths go first.
        sparsity: Share of the kernel's weights to prune, in [0, 1).
        method: What is pruned first: `"magnitude"`, the groups of smallest root mean square.
        group: Kind of groups; of a pattern always single weights.
        quantize: Whether the groups that stay are quantized.
        bits: 8 or 4, the grid if they are.
        pattern: `"2:4"` in place of a sparsity: of 4 consecutive inputs of an output the 2 largest
            weights stay, of a shorter tail half of them.
    """

    path: str
    sparsity: float | None = None
    method: str = "magnitude"
    group: str = "element"
    quantize: bool = False
    bits: int = 8
    pattern: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.path, str):
            raise PlanError(
                f"A rule has the path {self.path!r}. Expected a text: a kernel's path or a pattern."
            )
        if self.pattern is not None:
            self._check_pattern()
        elif (
            isinstance(self.sparsity, bool)
            or not isinstance(self.sparsity, int | float)
            or not 0.0 <= self.sparsity < 1.0
        ):
            raise PlanError(
                f"The rule for {self.path!r} has sparsity {self.sparsity!r}. Expected a number of "
                "at least 0 and below 1, or a pattern such as '2:4' in its place."
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

    def _check_pattern(self) -> None:
        if self.pattern not in PATTERNS:
            raise PlanError(
                f"The rule for {self.path!r} has pattern {self.pattern!r}. "
                f"{did_you_mean(self.pattern, PATTERNS)}"
            )
        if self.sparsity is not None or self.group != "element":
            raise PlanError(
                f"The rule for {self.path!r} has pattern {self.pattern!r} and sparsity="
                f"{self.sparsity!r}, group={self.group!r}. Expected the pattern alone, which says "
                "how much is pruned, and in which groups."
            )

    def to_dict(self) -> dict[str, Any]:
        """The rule's entry in format 1."""
        entry = dataclasses.asdict(self)
        return {n: v for n, v in entry.items() if v is not None or n not in _EITHER}

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
