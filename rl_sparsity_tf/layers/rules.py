"""Which kernels are decided on, and what the rules of a plan make of them."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import tf_keras as keras

from rl_sparsity_tf.errors import ArgumentError, ModelError, PlanError, TargetError, did_you_mean
from rl_sparsity_tf.keras3.door import takes_keras_3
from rl_sparsity_tf.layers.groups import Grouping
from rl_sparsity_tf.layers.kernels import Kernel, count_weights, find_kernels, walk
from rl_sparsity_tf.layers.operations import Operation, magnitude, select_live
from rl_sparsity_tf.layers.plan import CompressionPlan, KernelPlan, KernelRule

Patterns = str | Sequence[str]
"""A layer's name or path, a kernel's path, or a pattern of them with `*`, `?` and `[]`; or several.
"""

EXCLUDED, FROZEN, NOT_INCLUDED = "excluded", "frozen", "not included"
"""Why a kernel is left alone."""

_SHOWN = 4


@dataclasses.dataclass(frozen=True)
class KernelSelection:
    """The kernels of a model that are decided on, and those that are left alone.

    What is left alone is as if its layer could not be compressed: it is in no plan, is stored as
    floats, and no fit in closed form changes it. Training changes it unless it is frozen. Its
    weights count in a sparsity all the same.

    A kernel is frozen if Keras does not train it: it, its layer or a model around it is not
    `trainable`. Frozen kernels are decided on only where `include` matches them, and even then they
    are only masked, quantized or shuffled: never fitted, never trained.

    Attributes:
        paths: Paths of the kernels that are decided on, in the model's order.
        left: Path of every other kernel -> [EXCLUDED][], [NOT_INCLUDED][] or [FROZEN][].
        frozen: Paths of all frozen kernels, those that are decided on among them.
    """

    paths: tuple[str, ...]
    left: Mapping[str, str]
    frozen: frozenset[str]

    @classmethod
    def of(
        cls, model: keras.Model, include: Patterns | None = None, exclude: Patterns | None = None
    ) -> KernelSelection:
        """Sorts the kernels of a built model, plain or wrapped.

        A pattern matches a kernel by the kernel's path, the path or name of its layer, or the path
        or name of a model around it. `include` says what alone is decided on, by default all
        kernels that are not frozen; `exclude` wins over it. Raises `ArgumentError` if one of them
        is no name and no list of names, or a pattern matches no kernel.

        Example:
            >>> KernelSelection.of(model, exclude=["stem", "block*/dense/kernel"]).left
            {'stem/kernel': 'excluded', 'block1/dense/kernel': 'excluded'}
        """
        kernels = find_kernels(model)
        included = None if include is None else _matched("include", include, kernels, model)
        excluded = _matched("exclude", exclude, kernels, model) if exclude is not None else set()
        fixed = {id(weight) for weight in model.non_trainable_weights}
        frozen = frozenset(k.path for k in kernels if id(k.variable) in fixed)
        left = {}
        for kernel in kernels:
            if kernel.path in excluded:
                left[kernel.path] = EXCLUDED
            elif included is None and kernel.path in frozen:
                left[kernel.path] = FROZEN
            elif included is not None and kernel.path not in included:
                left[kernel.path] = NOT_INCLUDED
        paths = tuple(kernel.path for kernel in kernels if kernel.path not in left)
        return cls(paths, MappingProxyType(left), frozen)

    def kernels(self, model: keras.Model) -> list[Kernel]:
        """The kernels of the model, or of a copy of it, that are decided on."""
        return [kernel for kernel in find_kernels(model) if kernel.path not in self.left]

    def check(self, model: keras.Model) -> KernelSelection:
        """Returns the selection if there is something to decide on.

        Raises `ModelError` if the model has no kernel, or all of those left are frozen, and
        `ArgumentError` if `include` and `exclude` leave none.
        """
        if self.paths:
            return self
        if not self.left:
            raise ModelError(
                f"Model {model.name!r} has no layer that can be compressed. Expected at least one "
                "layer of a registered class; rl_sparsity_tf.describe_support(model) lists why "
                "each is skipped, and register_layer adds a class."
            )
        if FROZEN in self.left.values():
            raise ModelError(
                f"Model {model.name!r} has nothing that may be compressed: {self}. Expected at "
                "least one kernel that is trained: set layer.trainable = True (of the models "
                "around it, too), or name frozen layers in include, which prunes them without "
                "training them: include='*' for all."
            )
        raise ArgumentError(
            f"include and exclude leave nothing of model {model.name!r} to compress: {self}. "
            "Expected at least one kernel that exclude does not match."
        )

    def check_sparsity(self, model: keras.Model, sparsity: float | None) -> None:
        """Raises `TargetError` if what is left alone puts a sparsity out of reach.

        It does so before anything is computed, and names what is left alone.
        """
        if sparsity is None or not self.left:
            return
        _, elements = count_weights(model)
        sizes = [kernel.size for kernel in self.kernels(model)]
        reachable = sum(sizes) - len(sizes)  # a weight of each stays
        if round(sparsity * elements, 6) > reachable:
            raise TargetError(
                f"A sparsity of {sparsity:g} counts all {elements} weights of model "
                f"{model.name!r}, of which only {reachable} can be pruned: {self}. Expected a "
                f"sparsity below {reachable / max(elements, 1):.4f}, or more kernels to prune"
                f"{self._way_to_more}."
            )

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Adds what is left alone to the errors of targets that are out of reach."""
        try:
            yield
        except TargetError as error:
            if not self.left:
                raise
            raise TargetError(
                f"{error} Part of the model takes no part: {self}{self._way_to_more}."
            ) from error

    @property
    def _way_to_more(self) -> str:
        return " (include= takes frozen ones, too)" if FROZEN in self.left.values() else ""

    def __str__(self) -> str:
        """What is left alone, in words: `2 kernels are frozen ('a/kernel', 'b/kernel')`."""
        parts = []
        for reason, paths in self.to_dict().items():
            count = "1 kernel is" if len(paths) == 1 else f"{len(paths)} kernels are"
            parts.append(f"{count} {reason} ({_short_list(paths)})")
        return "; ".join(parts)

    def to_dict(self) -> dict[str, list[str]]:
        """The paths that are left alone, by reason."""
        found: dict[str, list[str]] = {}
        for path, reason in self.left.items():
            found.setdefault(reason, []).append(path)
        return found


def as_patterns(name: str, patterns: Patterns | None) -> tuple[str, ...] | None:
    """Checks `include` or `exclude`, and makes a tuple of it; None stays None.

    Raises `ArgumentError` if it is no text and no list of texts.
    """
    if patterns is None:
        return None
    given: Any = [patterns] if isinstance(patterns, str) else patterns
    texts = isinstance(given, list | tuple | set | frozenset) and all(
        isinstance(one, str) and one for one in given
    )
    if not texts or (name == "include" and not given):
        raise ArgumentError(
            f"{name}={patterns!r} cannot be used. Expected the name of a layer, the path of a "
            f"kernel, or a pattern, or a list of them: {name}='dense', "
            f"{name}=['stem', 'block*/conv/kernel']."
        )
    return tuple(sorted(given) if isinstance(given, set | frozenset) else given)


def names_of(kernel: Kernel) -> list[str]:
    """What a kernel can be called by: its path and all that it begins with, and their last names.

    Example:
        >>> names_of(kernel)  # of the layer `conv` in the model `base`
        ['base', 'base/conv', 'base/conv/kernel', 'conv']
    """
    steps = kernel.path.split("/")
    prefixes = ["/".join(steps[:end]) for end in range(1, len(steps) + 1)]
    layer = kernel.path.removesuffix(f"/{kernel.spec.label}")
    names = [name for name in (*layer.split("/"), kernel.layer.name) if name not in prefixes]
    return list(dict.fromkeys([*prefixes, *names]))


def _matched(
    name: str, patterns: Patterns, kernels: Sequence[Kernel], model: keras.Model
) -> set[str]:
    """Paths of the kernels that one of the patterns matches, each of which has to match some."""
    names = {kernel.path: names_of(kernel) for kernel in kernels}
    found: set[str] = set()
    for pattern in as_patterns(name, patterns) or ():
        hit = {
            path
            for path, known in names.items()
            if any(one == pattern or fnmatch.fnmatchcase(one, pattern) for one in known)
        }
        if not hit:
            raise ArgumentError(_no_match(name, pattern, kernels, model))
        found |= hit
    return found


def _no_match(name: str, pattern: str, kernels: Sequence[Kernel], model: keras.Model) -> str:
    without = [
        path
        for path, layer in walk(model)
        if fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(layer.name, pattern)
    ]
    if without:
        return (
            f"{name}={pattern!r} matches {_short_list(without)}, which has no kernel that could be "
            "compressed, so that there is nothing to leave or take. Expected one with a kernel; "
            "rl_sparsity_tf.describe_support(model) lists them."
        )
    layers = list(dict.fromkeys(k.path.removesuffix(f"/{k.spec.label}") for k in kernels))
    known = list(dict.fromkeys(one for kernel in kernels for one in names_of(kernel)))
    close = difflib.get_close_matches(pattern, known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return (
        f"{name}={pattern!r} matches no kernel of model {model.name!r}. Expected the name of a "
        f"layer ({', '.join(map(repr, layers))}), the path of a kernel such as "
        f"{kernels[0].path if kernels else 'dense/kernel'!r}, or a pattern.{hint}"
    )


def _short_list(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:_SHOWN]))
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"


def apply_rule(rule: KernelRule, kernel: Kernel) -> KernelPlan:
    """Turns a rule into operations for one kernel of a model."""
    group = rule.pattern or rule.group
    grouping, matrix = kernel.grouping(group), kernel.matrix()
    if rule.sparsity is None:
        live = grouping.largest(np.abs(matrix))
    else:
        live = prune_by_magnitude(matrix, grouping, rule.sparsity)
    survivors = Operation.QUANTIZE if rule.quantize else Operation.KEEP
    return KernelPlan(
        kernel.path,
        kernel.shape,
        kernel.spec.layout,
        group,
        rule.bits,
        np.where(live, survivors, Operation.PRUNE).astype(np.uint8),
    )


def prune_by_magnitude(matrix: np.ndarray, grouping: Grouping, sparsity: float) -> np.ndarray:
    """Marks the groups that live when the smallest are pruned; at least one group lives.

    The smallest number of groups is pruned that reaches `sparsity`, a share of weights. `matrix`
    has shape `(inputs, outputs)`, the result `grouping.shape`.
    """
    squares = grouping.sum_numpy(np.square(matrix, dtype=np.float64))
    scores = magnitude(matrix, squares, grouping.sizes)
    wanted = int(np.ceil(round(sparsity * matrix.size, 6)))
    return select_live(scores, grouping.sizes, wanted)


@takes_keras_3
def resolve(
    plan: CompressionPlan, model: keras.Model, selection: KernelSelection | None = None
) -> CompressionPlan:
    """Turns a plan's rules into operations and checks that its kernels fit the model.

    Rules with wildcards pass over what a selection leaves alone. An entry for one kernel may
    change a frozen kernel: that is to ask for it by name.

    Args:
        plan: A plan, with or without rules.
        model: A built model, plain or wrapped.
        selection: What may be changed; by default all kernels that are not frozen.

    Returns:
        A plan without rules.

    Raises:
        PlanError: If the plan names a kernel that the model lacks, one of another shape, or one
            that is excluded and that it would change.

    Example:
        >>> rule = {"path": "*", "group": "block4", "bits": 8, "sparsity": 0.5}
        >>> rules = rls.CompressionPlan.from_dict({"format_version": 1, "kernels": [rule]})
        >>> rls.resolve(rules, model)
        CompressionPlan(3 kernels, sparsity 0.500)
    """
    kernels = {kernel.path: kernel for kernel in find_kernels(model)}
    if selection is None:
        selection = KernelSelection.of(model)
    exact: list[KernelPlan] = []
    patterns: list[KernelRule] = []
    for path, entry in plan.kernels.items():
        if isinstance(entry, KernelRule) and path not in kernels and any(c in path for c in "*?"):
            patterns.append(entry)
            continue
        if path not in kernels:
            raise PlanError(
                f"The plan names the kernel {path!r}, which the model {model.name!r} does not "
                f"have. {did_you_mean(path, kernels)}"
            )
        kernel = kernels[path]
        if isinstance(entry, KernelRule):
            entry = apply_rule(entry, kernel)
        elif entry.shape != kernel.shape or entry.layout != kernel.spec.layout:
            raise PlanError(
                f"The plan's kernel {path!r} has shape {entry.shape} and layout {entry.layout!r}, "
                f"the model's has {kernel.shape} and {kernel.spec.layout!r}. Use a plan made for "
                "this model."
            )
        reason = selection.left.get(path, FROZEN)
        if reason != FROZEN and (entry.operations != Operation.KEEP).any():
            raise PlanError(
                f"The plan changes the kernel {path!r}, which is {reason}. Expected a plan "
                "without it, or include and exclude that leave the kernel to the plan."
            )
        exact.append(entry)
    named = {entry.path for entry in exact}
    for rule in patterns:
        matching = [path for path in kernels if fnmatch.fnmatchcase(path, rule.path)]
        if not matching:
            raise PlanError(
                f"The plan's rule for {rule.path!r} matches no kernel. The model has "
                f"{sorted(kernels)}."
            )
        if all(path in selection.left for path in matching):
            raise PlanError(
                f"The plan's rule for {rule.path!r} matches only kernels that are left alone: "
                f"{selection}. Expected a rule for others; frozen kernels are pruned where the "
                f"plan names their whole path, such as {matching[0]!r}, or include matches them."
            )
        for path in matching:
            if path not in named and path not in selection.left:
                exact.append(apply_rule(rule, kernels[path]))
                named.add(path)
    position = {path: index for index, path in enumerate(kernels)}
    return CompressionPlan(sorted(exact, key=lambda entry: position[entry.path]))


def uniform_plan(
    model: keras.Model, sparsity: float, group: str = "element", quantize: bool = False
) -> CompressionPlan:
    """The same sparsity in every compressible kernel, smallest groups first.

    `sparsity` is the share of *all* weights of rank >= 2 to prune, skipped layers included: the
    compressible kernels give proportionally more where some layers are skipped. Raises `PlanError`
    if they cannot give that many weights.
    """
    kernels = find_kernels(model)
    compressible = sum(kernel.size for kernel in kernels)
    _, elements = count_weights(model)
    share = sparsity * elements / compressible if compressible else 1.0
    if not 0.0 <= share < 1.0:
        raise PlanError(
            f"A sparsity of {sparsity} needs {sparsity * elements:.0f} of the model's {elements} "
            f"weights, but only {compressible} are in layers that can be compressed. Expected a "
            f"sparsity below {compressible / max(elements, 1):.4f}."
        )
    rule = KernelRule("*", share, group=group, quantize=quantize)
    return CompressionPlan(apply_rule(rule, kernel) for kernel in kernels)
