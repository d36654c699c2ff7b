"""Plans without a search: rules that a model's own weights turn into operations."""

from __future__ import annotations

import fnmatch

import numpy as np
import tf_keras as keras

from rl_sparsity_tf.errors import PlanError, did_you_mean
from rl_sparsity_tf.layers.groups import Grouping
from rl_sparsity_tf.layers.kernel_rule import KernelRule
from rl_sparsity_tf.layers.kernel_selection import FROZEN, KernelSelection
from rl_sparsity_tf.layers.kernels import Kernel, count_weights, find_kernels
from rl_sparsity_tf.layers.masks import magnitude, select_live
from rl_sparsity_tf.layers.operations import Operation
from rl_sparsity_tf.layers.plan import CompressionPlan, KernelPlan


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
    """Marks the groups that live when the smallest are pruned.

    Args:
        matrix: Kernel, shape `(inputs, outputs)`.
        grouping: How it is cut.
        sparsity: Share of weights to prune; the smallest number of groups that reaches it is.

    Returns:
        Booleans of shape `grouping.shape`; at least one group lives.
    """
    squares = grouping.sum_numpy(np.square(matrix, dtype=np.float64))
    scores = magnitude(matrix, squares, grouping.sizes)
    wanted = int(np.ceil(round(sparsity * matrix.size, 6)))
    return select_live(scores, grouping.sizes, wanted)


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

    Args:
        model: A built model.
        sparsity: Share of *all* weights of rank >= 2 to prune, skipped layers included: the
            compressible kernels give proportionally more where some layers are skipped.
        group: Kind of groups.
        quantize: Whether the groups that stay are quantized.

    Raises:
        PlanError: If the compressible kernels cannot give that many weights.
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
