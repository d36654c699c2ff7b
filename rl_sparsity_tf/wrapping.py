"""`wrap` puts compression wrappers around a model's layers; `strip` takes them off again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tf_keras as keras

from rl_sparsity_tf.compile_state import copy_compile_state
from rl_sparsity_tf.errors import ModelError, PlanError, check_choice
from rl_sparsity_tf.grouping import GROUPS
from rl_sparsity_tf.kernels import Kernel, check_model, find_kernels, walk
from rl_sparsity_tf.masks import MASKS
from rl_sparsity_tf.operations import Operation
from rl_sparsity_tf.plan import CompressionPlan, KernelPlan
from rl_sparsity_tf.rules import resolve
from rl_sparsity_tf.signature import is_graph
from rl_sparsity_tf.wrapper import CompressionWrapper, KernelSettings, settings_of


def wrap(
    model: keras.Model,
    plan: CompressionPlan | None = None,
    *,
    group: str = "element",
    mask: str = "straight_through",
    train_masks: bool = False,
) -> keras.Model:
    """Copies a model with its compressible layers wrapped, and applies a plan.

    The model given is not changed. The copy is compiled as the model was (with a fresh optimizer),
    so it can be trained at once; layers of classes that are not registered stay as they are
    (see [describe_support][rl_sparsity_tf.describe_support]).

    Args:
        model: A built Sequential or functional `tf_keras` model.
        plan: What to do. Without a plan every compressible layer is wrapped with everything kept
            and every operation open to `assign_operations`; with a plan, the layers it names.
        group: Kind of groups, where there is no plan.
        mask: Gradient of learnable masks, `"straight_through"` or `"hard_concrete"`.
        train_masks: Whether masks learn, with each kernel's sparsity held, instead of staying
            fixed (see [MaskTraining][rl_sparsity_tf.mask_training.MaskTraining]).

    Returns:
        The wrapped model.

    Raises:
        ModelError: If the model cannot be wrapped or is wrapped already.
        PlanError: If the plan does not fit the model.

    Example:
        >>> wrapped = rls.wrap(model, rls.CompressionPlan.load("plan.json"))
        >>> wrapped.fit(x, y)
        >>> small = rls.strip(wrapped)
    """
    check_model(model)
    check_choice("group", group, GROUPS)
    check_choice("mask", mask, MASKS)
    if is_wrapped(model):
        raise ModelError(
            f"Model {model.name!r} is wrapped already. Call rl_sparsity_tf.strip(model) first."
        )
    if plan is not None and not isinstance(plan, CompressionPlan):
        raise PlanError(
            f"plan is a {type(plan).__name__}. Expected a CompressionPlan, for example "
            "CompressionPlan.load('plan.json')."
        )
    kernels = find_kernels(model)
    entries = None if plan is None else resolve(plan, model).kernels
    settings: dict[int, dict[str, KernelSettings]] = {}
    for kernel in kernels:
        if entries is None:
            chosen = settings_of(kernel.layer, kernel.spec.attribute, group=group)
        elif kernel.path in entries:
            chosen = _settings_for(kernel, entries[kernel.path])
        else:
            continue
        settings.setdefault(id(kernel.layer), {})[kernel.spec.attribute] = chosen

    def convert(layer: keras.layers.Layer) -> keras.layers.Layer:
        copy = layer.__class__.from_config(layer.get_config())
        if id(layer) not in settings:
            return copy
        return CompressionWrapper(
            copy, group=group, mask=mask, train_masks=train_masks, kernels=settings[id(layer)]
        )

    wrapped = _rebuild(model, convert)
    _copy_weights(model, wrapped)
    if entries is not None:
        apply_plan(wrapped, entries)
    copy_compile_state(model, wrapped)
    return wrapped


def strip(model: keras.Model) -> keras.Model:
    """Copies a wrapped model without its wrappers, masks, grids and permutations folded in.

    Args:
        model: A wrapped model (a plain one is copied).

    Returns:
        A plain `tf_keras` model that computes the same bits, compiled as the wrapped one was; it
        can be saved as .keras or .h5 and loaded without this package.

    Raises:
        ModelError: If the model is not a built Sequential or functional model.
    """
    check_model(model)

    def convert(layer: keras.layers.Layer) -> keras.layers.Layer:
        inner = layer.layer if isinstance(layer, CompressionWrapper) else layer
        config = inner.get_config()
        if isinstance(layer, CompressionWrapper):
            config["trainable"] = layer.trainable
        return inner.__class__.from_config(config)

    stripped = _rebuild(model, convert)
    _copy_weights(model, stripped)
    copy_compile_state(model, stripped)
    return stripped


def is_wrapped(model: keras.Model) -> bool:
    """Whether any layer of a model is wrapped."""
    return any(isinstance(layer, CompressionWrapper) for _, layer in walk(model))


def wrappers_of(model: keras.Model) -> list[CompressionWrapper]:
    """The wrappers of a model, in the order of its layers."""
    return [layer for _, layer in walk(model) if isinstance(layer, CompressionWrapper)]


def apply_plan(wrapped: keras.Model, entries: Mapping[str, KernelPlan]) -> None:
    """Sets the operations of a wrapped model's kernels."""
    for kernel in find_kernels(wrapped):
        entry = entries.get(kernel.path)
        if entry is not None and kernel.wrapper is not None:
            kernel.wrapper.assign_operations(kernel.spec.attribute, entry.operations, entry.bits)


def plan_of(wrapped: keras.Model) -> CompressionPlan:
    """Reads the plan that a wrapped model carries, learned masks included."""
    entries = []
    for kernel in find_kernels(wrapped):
        wrapper, attribute = kernel.wrapper, kernel.spec.attribute
        if wrapper is None or attribute not in wrapper.kernels:
            continue
        entries.append(
            KernelPlan(
                kernel.path,
                kernel.shape,
                kernel.spec.layout,
                wrapper.kernels[attribute].group,
                wrapper.bits(attribute),
                wrapper.operations(attribute),
            )
        )
    return CompressionPlan(entries)


def _settings_for(kernel: Kernel, entry: KernelPlan) -> KernelSettings:
    # Only what the plan uses is compiled into the layer, so that an all-Keep kernel costs nothing.
    used = set(np.unique(entry.operations).tolist())
    return settings_of(
        kernel.layer,
        kernel.spec.attribute,
        group=entry.group,
        prune=int(Operation.PRUNE) in used,
        quantize=int(Operation.QUANTIZE) in used,
        shuffle=int(Operation.SHUFFLE) in used,
    )


def _rebuild(
    model: keras.Model, convert: Callable[[keras.layers.Layer], keras.layers.Layer]
) -> keras.Model:
    """Rebuilds a model with every layer converted, descending into nested models."""
    converted: dict[int, keras.layers.Layer] = {}

    def visit(layer: keras.layers.Layer) -> keras.layers.Layer:
        if id(layer) not in converted:
            converted[id(layer)] = (
                keras.models.clone_model(layer, clone_function=visit)
                if is_graph(layer)
                else convert(layer)
            )
        return converted[id(layer)]

    rebuilt = keras.models.clone_model(model, clone_function=visit)
    if not rebuilt.built or not rebuilt.inputs:
        rebuilt.build(model.input_shape)
    if not model.trainable:  # setting it to True would also thaw layers that are frozen one by one
        rebuilt.trainable = False
    return rebuilt


def _copy_weights(source: keras.Model, destination: keras.Model) -> None:
    for (_, old), (_, new) in zip(walk(source), walk(destination), strict=True):
        old_inner, new_inner = _inner(old), _inner(new)
        new_inner.set_weights(old_inner.get_weights())
        if isinstance(old, CompressionWrapper):
            for attribute in old.kernels:
                getattr(new_inner, attribute).assign(old.effective_kernel(attribute))


def _inner(layer: Any) -> keras.layers.Layer:
    return layer.layer if isinstance(layer, CompressionWrapper) else layer
