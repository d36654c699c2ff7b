"""Which layers of a model can be compressed and how the exporter stores them, or why not."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import tf_keras as keras

from rl_sparsity_tf.checks import check_flag
from rl_sparsity_tf.console import fitted_lines, printing
from rl_sparsity_tf.errors import ModelError
from rl_sparsity_tf.keras3.door import takes_keras_3
from rl_sparsity_tf.layers.kernel_spec import INTEGER_MODES, KernelSpec
from rl_sparsity_tf.layers.kernels import Kernel, check_model, find_kernels, rank_of, walk
from rl_sparsity_tf.layers.registry import registered_base, wrong_registrations
from rl_sparsity_tf.layers.rules import (
    EXCLUDED,
    FROZEN,
    NOT_INCLUDED,
    KernelSelection,
    Patterns,
)
from rl_sparsity_tf.layers.structure import all_layers, unreachable_sublayers
from rl_sparsity_tf.layers.wrapper import unwrapped

MODES = ("plan", "dynamic", "int8", "float16")
"""The export modes that store weights in fewer bits."""

# Below this many elements the converter's dynamic range leaves a tensor as it is.
_DYNAMIC_ELEMENTS = 1024
_WIDTH = 150
_NO_WEIGHTS = "has no weights of rank 2 or more"
# They look words and ids up in tables, hash or count them: TFLite has no builtin for that.
_LOOKUPS = (
    keras.layers.CategoryEncoding,
    keras.layers.HashedCrossing,
    keras.layers.Hashing,
    keras.layers.IntegerLookup,
    keras.layers.StringLookup,
    keras.layers.TextVectorization,
)
_LEFT = {
    FROZEN: "frozen, and left alone unless include names it",
    EXCLUDED: "excluded",
    NOT_INCLUDED: "not included",
}


@dataclasses.dataclass(frozen=True)
class KernelReport:
    """What is known of one kernel.

    Attributes:
        layout: One letter per axis: `i` is summed over, `o` numbers the output units.
        scales: What shares a quantization scale: `"per output"`, `"per gate"` or `"per tensor"`.
        stored: Per export mode the type of its tensors in the file: `"int8"`, `"float16"`,
            `"float32"`, or `"crash"` where the converter crashes. `"plan"` is for a kernel that the
            plan quantizes to 8 bits.
        left: Why a search leaves it alone, `"frozen"`, `"excluded"` or `"not included"`; empty if
            it does not.
    """

    path: str
    shape: tuple[int, ...]
    layout: str
    scales: str
    stored: dict[str, str]
    left: str = ""


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """What is known of one layer.

    Attributes:
        kernels: The kernels that can be compressed.
        weights: Elements of its weights of rank >= 2.
        reason: Why it, or a part of it, is skipped; empty if all of it can be compressed.
    """

    path: str
    layer_class: str
    kernels: tuple[KernelReport, ...]
    weights: int
    reason: str


@takes_keras_3
def support_report(
    model: keras.Model, include: Patterns | None = None, exclude: Patterns | None = None
) -> list[LayerReport]:
    """Lists every layer of a model with its compressible kernels, or the reason to skip it.

    Raises `ArgumentError` if `include` or `exclude` matches nothing, and `ModelError` if the model
    is not built.
    """
    check_model(model)
    left = KernelSelection.of(model, include, exclude).left
    kernels = find_kernels(model)
    reports = []
    for path, layer in walk(model):
        inner = unwrapped(layer)
        own = [kernel for kernel in kernels if kernel.layer is inner]
        weights = sum(int(w.shape.num_elements()) for w in inner.weights if rank_of(w) >= 2)
        reports.append(
            LayerReport(
                path,
                type(inner).__name__,
                tuple(_kernel_report(kernel, left.get(kernel.path, "")) for kernel in own),
                weights,
                _reason(inner, own, weights),
            )
        )
    return reports


def check_exportable(model: keras.Model) -> None:
    """Raises `ModelError` if layers prepare the model's data in a way no .tflite file can."""
    found = [layer for layer in all_layers(model) if isinstance(layer, _LOOKUPS)]
    inside = {id(part) for layer in found for part in all_layers(layer)[1:]}
    found = [layer for layer in found if id(layer) not in inside]
    if not found:
        return
    names = ", ".join(f"{layer.name!r} ({type(layer).__name__})" for layer in found)
    raise ModelError(
        f"Model {model.name!r} has the preprocessing layer{'s' * (len(found) > 1)} {names}, which "
        "TFLite's builtin operators cannot compute. Put it in front of the model, in the data "
        "pipeline: dataset.map(lambda x, y: (layer(x), y)); build the model without it, its input "
        "being what the layer puts out, and copy the weights with set_weights."
    )


def stored_types(spec: KernelSpec, elements: int) -> dict[str, str]:
    """How a kernel of a number of elements is stored in each of [MODES][]."""
    plan = "int8" if spec.exports_int8 else "float32"
    if not spec.kind:  # registered by the user
        return {"plan": plan, "dynamic": "?", "int8": "?", "float16": "?"}
    measured = INTEGER_MODES[spec.kind]
    stored = {mode: measured[mode].dtype for mode in MODES if mode != "plan"}
    per_tensor = elements // measured["dynamic"].tensors
    if per_tensor < _DYNAMIC_ELEMENTS and stored["dynamic"] == "int8":
        stored["dynamic"] = "float32"
    return {"plan": plan, **stored}


def _kernel_report(kernel: Kernel, left: str) -> KernelReport:
    spec = kernel.spec
    stored = stored_types(spec, kernel.size)
    return KernelReport(kernel.path, kernel.shape, spec.layout, spec.scales, stored, left)


def _reason(layer: keras.layers.Layer, kernels: list[Kernel], weights: int) -> str:
    of_keras_3 = getattr(layer, "keras_3_reason", "")
    if of_keras_3:
        return f"runs as it is in Keras 3, and is not compressed: {of_keras_3}"
    if isinstance(layer, _LOOKUPS):
        return "cannot be exported: put it in front of the model, in the data pipeline"
    wrong = wrong_registrations(layer)
    if wrong:
        return "; ".join(wrong)
    if kernels:
        left = weights - sum(kernel.size for kernel in kernels)
        return f"{left:,} of its weights are in no known kernel" if _rest(layer, left) else ""
    if not weights:
        return _NO_WEIGHTS
    name = type(layer).__name__
    base = registered_base(layer)
    if base is not None:
        return (
            f"class {name} derives from {base.__name__} but may use its weights otherwise "
            f"(register_layer({name}, ...) adds it)"
        )
    hidden = unreachable_sublayers(layer)
    if hidden:
        return f"its layers {[sublayer.name for sublayer in hidden]} are in no attribute of it"
    return f"class {name} is not registered (register_layer adds it)"


def _rest(layer: keras.layers.Layer, left: int) -> bool:
    # Biases of rank 2 (GRU, attention) are never compressed and no cause for doubt.
    biases = sum(
        int(weight.shape.num_elements())
        for weight in layer.weights
        if rank_of(weight) >= 2 and weight.name.split(":")[0].endswith("bias")
    )
    return left > biases


def describe_support(
    model: keras.Model,
    print_fn: Callable[[str], None] = print,
    *,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    show_all: bool = False,
) -> None:
    """Prints which layers of a model can be compressed and why the others are skipped.

    For every kernel: its axes (`i` for inputs, `o` for outputs), what shares a quantization scale,
    and how each export mode stores it. Below the table come the kernels that a search leaves alone,
    because they are frozen or because `include` and `exclude` say so.

    Args:
        model: A built model, plain or wrapped.
        print_fn: Called with every line.
        include: As in `Compressor`.
        exclude: As in `Compressor`.
        show_all: Whether layers that have nothing to compress (activations, pooling, normalization)
            are listed, too, and not only counted.

    Raises:
        ArgumentError: If `include` or `exclude` matches nothing.
        ModelError: If the model is not built.

    Example:
        >>> rls.describe_support(model, exclude="conv")
        Layers
        ...
        ...hidden/kernel...Dense...16,384...256i 64o...
        ...
        2 layers without kernels left out (show_all=True lists them)
        conv/kernel: excluded
    """
    print_fn = printing(print_fn)
    check_flag("show_all", show_all)
    rows, left_out = [], 0
    reports = support_report(model, include, exclude)
    for report in reports:
        for kernel in report.kernels:
            axes = " ".join(f"{s}{a}" for s, a in zip(kernel.shape, kernel.layout, strict=True))
            size = math.prod(kernel.shape)
            row = [kernel.path, report.layer_class, f"{size:,}", axes, kernel.scales]
            rows.append([*row, *(kernel.stored[mode] for mode in MODES)])
        if report.reason == _NO_WEIGHTS and not show_all:
            left_out += 1
        elif not report.kernels:
            row = [report.path, report.layer_class, f"{report.weights:,}", "skipped"]
            rows.append([*row, *[""] * (1 + len(MODES))])
    for line in fitted_lines(
        "Layers",
        ["kernel or layer", "class", "weights", "axes", "scale", *MODES],
        rows,
        right=["weights"],
        spare=["class", "scale"],
        width=_WIDTH,
    ):
        print_fn(line)
    if left_out:
        layers = "layer" if left_out == 1 else "layers"
        print_fn(f"{left_out} {layers} without kernels left out (show_all=True lists them)")
    for report in reports:
        if report.reason not in ("", _NO_WEIGHTS):
            print_fn(f"{report.path}: {report.reason}")
        for kernel in report.kernels:
            if kernel.left:
                print_fn(f"{kernel.path}: {_LEFT[kernel.left]}")
