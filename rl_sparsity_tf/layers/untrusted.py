"""What in a stored model would run, import or read something of the file's choosing.

Configurations are read as plain data and looked up where Keras would look, in what is imported
already; nothing is built. Only classes that Keras makes models of pass, functions that compute, and
what the user registered. Of graphs, only operations pass that compute and do not reach outside.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import tensorflow as tf
import tf_keras as keras
from google.protobuf import json_format
from google.protobuf.message import DecodeError
from tensorflow.python.util import dispatch, tf_export
from tf_keras.src.engine.base_layer import TensorFlowOpLayer
from tf_keras.src.export.export_lib import ReloadedLayer
from tf_keras.src.layers import serialization
from tf_keras.src.layers.core.tf_op_layer import ClassMethod, InstanceProperty, TFOpLambda

from rl_sparsity_tf.claims import DTYPE, dicts_of

# Python; files and what reads or writes them; networks and other devices; whatever ends or stops
# the process; and operations that carry a program of their own.
_REACHING_OUT = re.compile(
    r"PyFunc|File(?!name|spec)|Reader|Record|Dataset|Iterator|Snapshot|LMDB|Sql|BigQuery|CSV"
    r"|Save|Restore|Checkpoint|LoadAndRemap|Vocab|Print|Summary|ImportEvent|Debug|Dump"
    r"|Rpc|DataService|Remote|Recv|Send|Collective|Nccl|TPU|Tpu|DTensor|Heartbeat|Session"
    r"|Abort|Sleep|Proto|CustomCall|CustomAggregator|Xla|BoostedTrees"
)
# What writes and reads a SavedModel's own variables, on request only.
_OF_SAVERS = {"SaveV2", "RestoreV2", "MergeV2Checkpoints"}


def reaches_out(operation: str) -> bool:
    """Whether an operation touches files, networks, Python or the process.

    Example:
        >>> reaches_out("ReadFile"), reaches_out("MatMul")
        (True, False)
    """
    return bool(_REACHING_OUT.search(operation))


def forbidden_nodes(meta_graphs: Iterable[Any]) -> Iterator[tuple[str, str]]:
    """Operation and name of every node of a SavedModel that reaches out, its functions included.

    It is read from `MetaGraphDef` messages.
    """
    for meta in meta_graphs:
        graph = meta.graph_def
        saving = _saver_functions(meta)
        for node in graph.node:
            if reaches_out(node.op):
                yield node.op, node.name
        for function in graph.library.function:
            saves = function.signature.name in saving
            for node in function.node_def:
                if reaches_out(node.op) and not (saves and node.op in _OF_SAVERS):
                    yield node.op, node.name


def _saver_functions(meta: Any) -> set[str]:
    """Functions that only a SavedModel's saver calls: loading in Keras never runs them."""
    saver = meta.saver_def
    own = {name.partition(":")[0] for name in (saver.save_tensor_name, saver.restore_op_name)}
    called: set[str] = set()
    elsewhere = set(meta.object_graph_def.concrete_functions)
    for node in meta.graph_def.node:
        names = called if node.name in own else elsewhere
        names.update(_functions_of(node))
    for function in meta.graph_def.library.function:
        for node in function.node_def:
            elsewhere.update(_functions_of(node))
    return called - elsewhere


def _functions_of(node: Any) -> Iterator[str]:
    yield node.op
    for value in node.attr.values():
        yield value.func.name
        yield from (function.name for function in value.list.func)


ROOTS = ("keras", "tf_keras", "tensorflow", "rl_sparsity_tf", "tensorflow_model_optimization")
# What models are made of; optimizers in both forms.
PARTS = (
    *(keras.layers.Layer, keras.layers.InputSpec, keras.losses.Loss, keras.metrics.Metric),
    *(keras.initializers.Initializer, keras.regularizers.Regularizer),
    *(keras.constraints.Constraint, keras.mixed_precision.Policy),
    *(keras.optimizers.Optimizer, keras.optimizers.legacy.Optimizer),
    keras.optimizers.schedules.LearningRateSchedule,
)
# Functions (activations, losses) are taken from fewer places: those that only compute.
_FUNCTION_MODULES = re.compile(
    r"(tf_)?keras(\.src)?\.(activations|backend|constraints|initializers|losses|metrics|regularizers)"
    r"(\.\w+)*"
    r"|tensorflow\.python\.framework\.(constant_op|tensor_conversion)"
    r"|tensorflow\.python\.ops\.(gen_)?(array|bincount|bitwise|check|clip|confusion_matrix|embedding"
    r"|histogram|image|linalg|manip|math|nn|numerics|random|sets|sort|sparse|special_math|spectral"
    r"|stateless_random|string|tensor_getitem_override|(linalg|ragged|signal)\.\w+)"
    r"(_ops)?(_impl)?(_v2|_stack)?"
)
_KERAS_FUNCTIONS = (
    *("activations", "constraints", "initializers", "losses", "metrics", "regularizers"),
)
_NOT_COMPUTING = {"get", "serialize", "deserialize", "print_tensor"}
_TENSOR_CLASSES = ("RaggedTensor", "SparseTensor", "sparse.SparseTensor")
# What Keras hands on to ragged and sparse tensors in a functional model.
_TENSOR_ATTRIBUTES = {
    *("values", "flat_values", "row_splits", "nested_row_splits", "indices", "dense_shape"),
    *("value_rowids", "nested_value_rowids", "nrows", "row_starts", "row_limits", "row_lengths"),
    *("nested_row_lengths", "bounding_shape", "with_values", "with_flat_values"),
    *("with_row_splits_dtype", "merge_dims", "to_tensor", "to_sparse"),
}
_TENSOR_MAKERS = {
    *("from_value_rowids", "from_row_splits", "from_row_lengths", "from_row_starts"),
    *("from_row_limits", "from_uniform_row_length", "from_nested_value_rowids"),
    *("from_nested_row_splits", "from_nested_row_lengths", "from_tensor", "from_sparse"),
}
_SPECS = (tf.TensorSpec, tf.RaggedTensorSpec, tf.SparseTensorSpec)
_SPEC_NAMES = {f"tf.{spec.__name__}" for spec in _SPECS}
_PLAIN = {"__bytes__", "__tuple__", "__ellipsis__", "TensorShape", "CompositeTensor"}
_FILES = {"vocabulary_file", "filepath", "file_path", "filename"}
_FILES_OR_LISTS = {"vocabulary", "initial_vocabulary"}


def foreign_parts(config: object) -> Iterator[str]:
    """Names everything in a configuration that Keras would run, import or read from elsewhere.

    The configuration is made of JSON values.
    """
    for value in dicts_of(config):
        if "class_name" in value:
            yield from _foreign_object(value)
        for key, inner in value.items():
            # Lambda, ResidualWrapper and their like store Python bytecode under these keys.
            if str(key).endswith("_type") and inner in ("lambda", "function"):
                yield f"it stores a Python function as code ({key}={inner!r})"


def class_names(config: object) -> set[str]:
    """Names of all classes in a configuration."""
    return {str(value.get("class_name")) for value in dicts_of(config)}


def _foreign_object(stored: dict[str, Any]) -> Iterator[str]:
    module, inner = stored.get("module"), stored.get("config")
    kind = str(stored["class_name"])
    registered = str(stored.get("registered_name") or kind)
    details = inner if isinstance(inner, dict) else {}
    label = f" {details['name']!r}" if isinstance(details.get("name"), str) else ""
    # Keras also looks a class up under its registered name.
    if {"Lambda", "__lambda__"} & {kind, registered.rsplit(">", 1)[-1]}:
        yield f"its layer{label} is a Lambda, which runs Python code stored in the file"
    elif kind == "function":
        if _registered(str(inner)) is None and not _computes(module, inner, registered):
            yield f"it uses the function {inner!r} of the module {module!r}"
    elif kind == "TypeSpec":
        if str(stored.get("type_spec")) not in _SPEC_NAMES:
            yield f"it describes a tensor by the class {stored.get('type_spec')!r}"
    elif kind == "__typespec__":
        name = str(stored.get("spec_name"))
        found = _found(module, name, stored.get("registered_name"))
        if not found or any(spec not in _SPECS for spec in found):
            yield f"its part{label} is of the class {name!r} of the module {module!r}"
    elif kind in ("__numpy__", "__tensor__"):
        if not DTYPE.fullmatch(str(details.get("dtype", "float32"))):
            yield f"it holds an array of the type {str(details.get('dtype'))[:40]!r}"
    elif not (kind in _PLAIN and module is None):
        yield from _foreign_class(stored, kind, registered, details, label)


def _foreign_class(
    stored: dict[str, Any], kind: str, registered: str, details: dict[str, Any], label: str
) -> Iterator[str]:
    """Judges every class that one of Keras's ways of looking it up would find."""
    module = stored.get("module")
    serialization.populate_deserializable_objects()
    own = _registered(registered)
    places = []
    if own is None and module is not None:
        places = _found(module, kind, stored.get("registered_name"))
    unknown = f"is of the class {kind!r} of the module {module!r}"
    for part in (serialization.LOCAL.ALL_OBJECTS.get(kind), *places):
        if part is None:
            continue
        reason = _fault(part, details, str(module).split(".")[0])
        if reason is not None:
            yield f"its part{label} {reason or unknown}"
    if own is None:
        # Keras would import the module to look there.
        if module is not None and not places:
            yield f"its part{label} {unknown}"
        for key in _FILES | _FILES_OR_LISTS:
            if isinstance(details.get(key), str):
                yield f"its part{label} reads the file {details[key]!r}"


def _fault(part: Any, details: dict[str, Any], root: str) -> str | None:
    """Why a class is not let through; empty if it is no part of models at all."""
    if not isinstance(part, type):
        return ""
    if issubclass(part, keras.layers.Lambda):
        return "is a Lambda, which runs Python code stored in the file"
    if issubclass(part, ReloadedLayer):
        return "loads another model from a place that the file names"
    if issubclass(part, TensorFlowOpLayer):
        return _foreign_node(details.get("node_def"))
    if issubclass(part, TFOpLambda):
        name = str(details.get("function"))
        known = _is_mathematics(tf_export.get_symbol_from_name(name))
        return None if known else f"calls tf.{name}"
    if issubclass(part, ClassMethod):
        owner, method = str(details.get("cls_symbol")), str(details.get("method_name"))
        known = owner in _TENSOR_CLASSES and method in _TENSOR_MAKERS
        return None if known else f"calls tf.{owner}.{method}"
    if issubclass(part, InstanceProperty):
        wanted = str(details.get("attr_name"))
        return None if wanted in _TENSOR_ATTRIBUTES else f"asks a tensor for its {wanted!r}"
    ours = root == "tensorflow_model_optimization" and part.__module__.startswith(root)
    return None if ours or issubclass(part, PARTS) else ""


def _foreign_node(stored: Any) -> str | None:
    """Judges the operation that a TensorFlowOpLayer would make."""
    node = tf.compat.v1.NodeDef()
    try:
        if isinstance(stored, dict):
            json_format.ParseDict(stored, node)
        else:
            node.ParseFromString(str(stored).encode("utf-8"))
    except (json_format.ParseError, DecodeError, ValueError) as error:
        return f"has an operation that cannot be read ({type(error).__name__})"
    if not node.op or reaches_out(node.op):
        return f"has the operation {node.op or stored!r}"
    return None


def _found(module: Any, name: str, registered: Any) -> list[Any]:
    """What Keras may find under a name in a module, of what is imported already."""
    path = str(module)
    if path.split(".")[0] not in ROOTS:
        return []
    symbol = f"{path}.{name}"
    symbol = f"compat.v1.{symbol}" if "__internal__.legacy" in symbol else symbol
    found = [tf_export.get_symbol_from_name(symbol)]
    loaded = sys.modules.get(f"tf_{path}" if path.startswith("keras") else path)
    if loaded is not None:
        inside = vars(loaded)
        outer, _, nested = name.partition(".")
        found += [inside.get(name), inside.get(str(registered))]
        found.append(getattr(inside.get(outer), nested, None) if nested else None)
    return [thing for thing in found if thing is not None]


def _registered(name: str) -> Any:
    return keras.utils.get_registered_object(name)


def _computes(module: Any, name: Any, registered: str) -> bool:
    if module == "builtins":  # what Keras writes for its own functions, and Python's eval too
        paths = [f"keras.{group}.{name}" for group in _KERAS_FUNCTIONS]
        found = [tf_export.get_symbol_from_name(path) for path in paths]
        found = [function for function in found if function is not None]
    elif str(name).isidentifier() and _FUNCTION_MODULES.fullmatch(str(module)):
        found = _found(module, str(name), registered)
    else:
        return False
    return bool(found) and all(_is_mathematics(function) for function in found)


def _is_mathematics(function: Any) -> bool:
    """Whether something is a function of tensors, by what TensorFlow itself says of it."""
    module = str(getattr(function, "__module__", None))
    if not callable(function) or not _FUNCTION_MODULES.fullmatch(module):
        return False
    if getattr(function, "__name__", "") in _NOT_COMPUTING:
        return False
    # Keras's backend and TensorFlow's modules have functions that change settings as well.
    settings = "backend" in module or module.startswith("tensorflow")
    return not settings or hasattr(function, dispatch.FALLBACK_DISPATCH_ATTR)
