"""Compression plans, and the rules in them: what every group of every kernel becomes.

A plan is what the search produces, what [wrap][rl_sparsity_tf.wrap] applies and what the exporter
reads. It is frozen, and its JSON (format 1) is meant to be read and edited by hand.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from rl_sparsity_tf.errors import ArgumentError, PlanError, did_you_mean
from rl_sparsity_tf.files import as_file, check_new_file, parse_json, read_text, write_text
from rl_sparsity_tf.layers.groups import GROUPS, KINDS, PATTERNS, Grouping
from rl_sparsity_tf.layers.kernel_spec import KernelSpec
from rl_sparsity_tf.layers.operations import Operation

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
        quantize: Whether the groups that stay are quantized, to the grid of `bits`, 8 or 4.
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
        """Reads a rule's entry; raises `PlanError` if a field is missing, unknown or malformed."""
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


FORMAT_VERSION = 1
_BITS = (32, 8, 4)
# What the kernels of a plan's text may have together: a line of text can claim any number.
_MOST_GROUPS = 2**28
_FIELDS = {"path", "shape", "layout", "group", "bits", "default", "exceptions"}


@dataclasses.dataclass(frozen=True, eq=False)
class KernelPlan:
    """The operations chosen for one kernel.

    Attributes:
        path: Layer path and attribute, e.g. `"encoder/dense/kernel"`.
        shape: The kernel's shape.
        layout: One letter per axis, `i` or `o` (see [KernelSpec][]).
        group: Kind of groups, or a pattern: `"2:4"`.
        bits: The grid of quantized groups, 8 or 4; 32 where none is quantized.
        operations: [Operation][] values, uint8 of shape `(rows, outputs)`, read-only.

    Example:
        >>> entry = plan.kernels["hidden/kernel"]
        >>> entry.shape, entry.group, entry.weights_under(rls.Operation.PRUNE)
        ((256, 64), 'element', 15067)
    """

    path: str
    shape: tuple[int, ...]
    layout: str
    group: str
    bits: int
    operations: np.ndarray

    def __post_init__(self) -> None:
        grouping = _grouping(self.path, self.shape, self.layout, self.group)
        _check_bits(self.path, self.bits)
        given = np.asarray(self.operations)
        if given.dtype.kind not in "iu":  # a cast would turn 0.9 and 256 into Keep
            raise PlanError(
                f"The plan of {self.path!r} has operations of type {given.dtype}. Expected "
                "integers: values of Operation."
            )
        if given.size and not 0 <= int(given.min()) <= int(given.max()) <= max(Operation):
            wrong = int(given.min()) if int(given.min()) < 0 else int(given.max())
            raise PlanError(
                f"The plan of {self.path!r} holds the operation {wrong}. Expected "
                f"values of Operation: {[f'{int(op)} ({op.name})' for op in Operation]}."
            )
        operations = np.array(given, dtype=np.uint8)
        if operations.shape != grouping.shape:
            raise PlanError(
                f"The plan of {self.path!r} has operations of shape {operations.shape}. Expected "
                f"{grouping.shape}: one per group of {self.group!r} in shape {self.shape}."
            )
        if (operations == Operation.PRUNE).all():
            raise PlanError(
                f"The plan prunes every group of {self.path!r}, which leaves the layer's output "
                "constant. Leave at least one group unpruned."
            )
        if (operations == Operation.PRUNE).any():
            _check_pattern(self.path, grouping, operations != Operation.PRUNE)
        quantized = bool((operations == Operation.QUANTIZE).any())
        if quantized and self.bits == 32:
            raise PlanError(
                f"The plan quantizes groups of {self.path!r} but says bits=32. Expected 8 or 4."
            )
        if not quantized:
            object.__setattr__(self, "bits", 32)
        operations.setflags(write=False)
        object.__setattr__(self, "shape", tuple(int(size) for size in self.shape))
        object.__setattr__(self, "operations", operations)

    @property
    def grouping(self) -> Grouping:
        """How the kernel is cut."""
        return _grouping(self.path, self.shape, self.layout, self.group)

    @property
    def size(self) -> int:
        """Number of weights."""
        return int(np.prod(self.shape))

    def weights_under(self, operation: Operation) -> int:
        """Number of weights under an operation."""
        return int(self.grouping.sizes[self.operations == operation].sum())

    @property
    def sparsity(self) -> float:
        """Share of the kernel's weights that are pruned."""
        return self.weights_under(Operation.PRUNE) / self.size

    @property
    def exported_bits(self) -> int:
        """Bits per stored weight in the exported file, 8 or 4 when no living group is kept."""
        return 32 if (self.operations == Operation.KEEP).any() else self.bits

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, KernelPlan):
            return NotImplemented
        mine = (self.path, self.shape, self.layout, self.group, self.bits)
        theirs = (other.path, other.shape, other.layout, other.group, other.bits)
        return mine == theirs and bool(np.array_equal(self.operations, other.operations))

    def to_dict(self) -> dict[str, Any]:
        """The kernel's entry in format 1: a default and the runs that differ from it."""
        flat = self.operations.reshape(-1)
        default = int(np.bincount(flat, minlength=len(Operation)).argmax())
        edges = np.flatnonzero(np.diff(flat)) + 1
        starts = np.concatenate([[0], edges])
        lengths = np.diff(np.concatenate([starts, [flat.size]]))
        exceptions = [
            [int(start), int(length), Operation(int(flat[start])).name.lower()]
            for start, length in zip(starts, lengths, strict=True)
            if flat[start] != default
        ]
        return {
            "path": self.path,
            "shape": list(self.shape),
            "layout": self.layout,
            "group": self.group,
            "bits": self.bits,
            "default": Operation(default).name.lower(),
            "exceptions": exceptions,
        }

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> KernelPlan:
        """Reads an entry of format 1.

        Raises:
            PlanError: If a field is missing, unknown or malformed.
        """
        path = _path_of(entry)
        _check_fields(path, entry, _FIELDS)
        missing = _FIELDS - set(entry) - {"exceptions", "default"}
        if missing:
            raise PlanError(
                f"The plan's entry for {path!r} lacks {sorted(missing)}. Give them, or write a "
                'rule such as {"path": ..., "sparsity": 0.8, "method": "magnitude"}.'
            )
        shape, layout, group = entry["shape"], entry["layout"], entry["group"]
        if not isinstance(shape, list) or not all(_is_count(size) for size in shape):
            raise PlanError(
                f"The plan of {path!r} has shape {_short(shape)}. Expected a list of positive "
                "integers."
            )
        grouping = _grouping(path, tuple(shape), layout, group)
        if grouping.count > _MOST_GROUPS:
            raise _too_many(path, grouping.count)
        flat = np.full(grouping.count, _operation(path, entry.get("default", "keep")), np.uint8)
        runs = entry.get("exceptions", [])
        if not isinstance(runs, list):
            raise PlanError(
                f"The plan of {path!r} has exceptions {_short(runs)}. Expected a list of "
                '[first group, number of groups, operation], for example [[12, 4, "prune"]].'
            )
        for run in runs:
            if not (isinstance(run, list) and len(run) == 3 and _is_count(run[1])):
                raise PlanError(
                    f"The plan of {path!r} has the exception {_short(run)}. Expected "
                    '[first group, number of groups, operation], for example [12, 4, "prune"].'
                )
            start, length, name = run
            if not isinstance(start, int) or start < 0 or start + length > flat.size:
                raise PlanError(
                    f"The plan of {path!r} has the exception {_short(run)}, beyond its {flat.size} "
                    f"groups. Expected groups 0 to {flat.size - 1}."
                )
            flat[start : start + length] = _operation(path, name)
        return cls(path, tuple(shape), layout, group, entry["bits"], flat.reshape(grouping.shape))


class CompressionPlan:
    """One plan or [rule][rl_sparsity_tf.layers.plan.KernelRule] per kernel, frozen.

    Args:
        kernels: The kernels' plans and rules. Kernels of a model that a plan does not name are
            kept as they are.

    Raises:
        PlanError: If two entries are for the same kernel.

    Example:
        >>> plan = rls.CompressionPlan.load("plan.json")
        >>> plan
        CompressionPlan(3 kernels, sparsity 0.900)
        >>> small = rls.strip(rls.wrap(model, plan))
    """

    def __init__(self, kernels: Iterable[KernelPlan | KernelRule] = ()):
        entries: dict[str, Any] = {}
        for kernel in kernels if isinstance(kernels, Iterable) else [kernels]:
            if not isinstance(kernel, KernelPlan | KernelRule):
                raise PlanError(
                    f"A CompressionPlan was given {_short(kernel)}. Expected KernelPlan and "
                    "KernelRule objects; CompressionPlan.from_dict reads what to_dict wrote."
                )
            if kernel.path in entries:
                raise PlanError(
                    f"The plan has two entries for {kernel.path!r}. Expected one per kernel."
                )
            entries[kernel.path] = kernel
        self._kernels = MappingProxyType(entries)

    @property
    def kernels(self) -> Mapping[str, Any]:
        """Path to kernel plan (or rule, until it is resolved against a model)."""
        return self._kernels

    @property
    def is_resolved(self) -> bool:
        """Whether every entry names its operations, so that no rule is left."""
        return all(isinstance(kernel, KernelPlan) for kernel in self._kernels.values())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, CompressionPlan):
            return NotImplemented
        return dict(self._kernels) == dict(other._kernels)

    __hash__ = None  # type: ignore[assignment]

    def __setattr__(self, name: str, value: object) -> None:
        if hasattr(self, "_kernels"):
            raise AttributeError("A CompressionPlan is frozen. Make a new one instead.")
        super().__setattr__(name, value)

    def __repr__(self) -> str:
        if not self.is_resolved:
            return f"CompressionPlan({len(self._kernels)} entries, with rules)"
        return f"CompressionPlan({len(self._kernels)} kernels, sparsity {self.sparsity:.3f})"

    @property
    def sparsity(self) -> float:
        """Share of the weights of the plan's kernels that are pruned."""
        sizes = sum(kernel.size for kernel in self._resolved())
        pruned = sum(kernel.weights_under(Operation.PRUNE) for kernel in self._resolved())
        return pruned / sizes if sizes else 0.0

    def count_operations(self) -> dict[str, int]:
        """Number of weights under each operation, by lower-case name."""
        return {
            operation.name.lower(): sum(
                kernel.weights_under(operation) for kernel in self._resolved()
            )
            for operation in Operation
        }

    def _resolved(self) -> list[KernelPlan]:
        if not self.is_resolved:
            raise PlanError(
                "The plan holds rules, whose operations depend on a model's weights. Call "
                "rls.wrap(model, plan), or resolve it first with rules.resolve(plan, model)."
            )
        return list(self._kernels.values())

    # ------------------------------------------------------------------ JSON

    def to_dict(self) -> dict[str, Any]:
        """The plan in format 1."""
        return {
            "format_version": FORMAT_VERSION,
            "kernels": [kernel.to_dict() for kernel in self._kernels.values()],
        }

    def to_json(self) -> str:
        """Format 1 as text, one kernel per line."""
        lines = [json.dumps(kernel.to_dict()) for kernel in self._kernels.values()]
        body = ",\n    ".join(lines)
        body = f"\n    {body}\n  " if lines else ""
        return f'{{\n  "format_version": {FORMAT_VERSION},\n  "kernels": [{body}]\n}}\n'

    @classmethod
    def from_dict(cls, document: Any) -> CompressionPlan:
        """Reads format 1.

        Raises:
            PlanError: Naming the entry and field that is wrong.
        """
        if not isinstance(document, dict) or "kernels" not in document:
            raise PlanError(
                "This is not a compression plan. Expected an object with format_version and "
                f"kernels, received {_short(document)}."
            )
        if document.get("format_version") != FORMAT_VERSION:
            raise PlanError(
                f"The plan has format_version {document.get('format_version')!r}. Expected "
                f"{FORMAT_VERSION}; a newer version of this package may read it."
            )
        _check_fields("the plan", document, {"format_version", "kernels"})
        entries = document["kernels"]
        if not isinstance(entries, list):
            raise PlanError(f"The plan's kernels are {_short(entries)}. Expected a list.")
        kernels: list[KernelPlan | KernelRule] = []
        groups = 0
        for entry in entries:
            if isinstance(entry, dict) and not {"sparsity", "pattern"} & set(entry):
                kernel = KernelPlan.from_dict(entry)
                kernels.append(kernel)
                groups += kernel.operations.size
                if groups > _MOST_GROUPS:
                    raise _too_many(kernel.path, groups)
            else:
                kernels.append(KernelRule.from_dict(entry))
        return cls(kernels)

    @classmethod
    def from_json(cls, text: str) -> CompressionPlan:
        """Reads format 1 from text.

        Raises:
            PlanError: If the text is not JSON or not a plan.
        """
        try:
            return cls.from_dict(parse_json(text))
        except RecursionError as error:  # of the parser, or of what looks at its result
            raise PlanError(
                "The plan's JSON is nested too deeply to be read. Expected an object with "
                "format_version and kernels, as plan.save(path) writes it."
            ) from error

    def save(self, path: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Writes the plan as JSON.

        Raises:
            FileExistsRLSparsityError: If the file exists and `overwrite` is false.
        """
        write_text(check_new_file(path, overwrite), self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CompressionPlan:
        """Reads a plan's JSON file.

        Raises:
            ArgumentError: If `path` is no path.
            PlanError: If the file is missing, unreadable or no plan.
        """
        path = as_file("path", path, "the path of a JSON file written by plan.save")
        return cls.from_json(read_text(path))


def _too_many(path: str, groups: int) -> PlanError:
    return PlanError(
        f"The plan has {groups:,} groups up to {path!r}. Expected at most {_MOST_GROUPS:,}, those "
        "of a model's kernels: check its shape."
    )


def _grouping(path: str, shape: tuple[int, ...], layout: Any, group: Any) -> Grouping:
    if not isinstance(layout, str):
        raise PlanError(
            f"The plan of {path!r} does not fit together: it has the layout {_short(layout)}. "
            "Expected a text with a letter per axis, 'i' or 'o', such as 'io'."
        )
    if group not in KINDS:
        raise PlanError(
            f"The plan of {path!r} has group {_short(group)}. {did_you_mean(group, KINDS)}"
        )
    try:
        return KernelSpec("kernel", layout).grouping(shape, group)
    except (ValueError, TypeError) as error:
        raise PlanError(
            f"The plan of {path!r} does not fit together: {str(error)[:400]}"
        ) from error


def _check_pattern(path: str, grouping: Grouping, live: np.ndarray) -> None:
    try:
        grouping.check_pattern(live)
    except ArgumentError as error:
        raise PlanError(f"The plan of {path!r} does not keep its pattern. {error}") from error


def _check_bits(path: str, bits: Any) -> None:
    if not isinstance(bits, int | np.integer) or bits not in _BITS:
        raise PlanError(f"The plan of {path!r} has bits {_short(bits)}. Expected 32, 8 or 4.")


def _check_fields(path: str, entry: Mapping[str, Any], known: set[str]) -> None:
    for name in entry:
        if name not in known:
            raise PlanError(
                f"{path!r} has the unknown field {name!r}. {did_you_mean(name, sorted(known))}"
            )


def _path_of(entry: Any) -> str:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("path"), str):
        raise PlanError(
            f"The plan has the entry {_short(entry)}. Expected an object with the path of a kernel."
        )
    return str(entry["path"])


def _operation(path: str, name: Any) -> int:
    names = [operation.name.lower() for operation in Operation]
    if not isinstance(name, str) or name.lower() not in names:
        raise PlanError(
            f"The plan of {path!r} has the operation {_short(name)}. {did_you_mean(name, names)}"
        )
    return int(Operation[name.upper()])


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
