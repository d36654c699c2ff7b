"""What a file from elsewhere claims to hold, and what in it would run or reach outside.

What in a stored Keras configuration would run, import or read something of the file's choosing.

Configurations are read as plain data and looked up where Keras would look, in what is imported
already; nothing is built. Only classes that Keras makes models of pass, functions that compute, and
what the user registered.

What files claim to hold against what they are: archives and HDF5 files, before they are read.

A few bytes can claim gigabytes, and can name other files. Every limit here compares what a file
declares with its own size, so that large honest files pass and small dishonest ones do not.
"""

from __future__ import annotations

import math
import mmap
import re
import stat
import struct
import sys
import zipfile
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, BinaryIO

import h5py
import tensorflow as tf
import tf_keras as keras
from google.protobuf import json_format
from google.protobuf.message import DecodeError
from h5py import h5o, h5t
from tensorflow.python.util import dispatch, tf_export
from tf_keras.src.engine.base_layer import TensorFlowOpLayer
from tf_keras.src.export.export_lib import ReloadedLayer
from tf_keras.src.layers import serialization
from tf_keras.src.layers.core.tf_op_layer import ClassMethod, InstanceProperty, TFOpLambda

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
# A dtype such as U1000000000 would make gigabytes of a letter.
_DTYPE = re.compile(r"(bfloat|float|int|uint|complex)\d+|bool|str(ing)?|[SU|<>]{0,2}\d{0,3}")
_PLAIN = {"__bytes__", "__tuple__", "__ellipsis__", "TensorShape", "CompositeTensor"}
_FILES = {"vocabulary_file", "filepath", "file_path", "filename"}
_FILES_OR_LISTS = {"vocabulary", "initial_vocabulary"}


def foreign_parts(config: object) -> Iterator[str]:
    """Names everything in a configuration that Keras would run, import or read from elsewhere.

    The configuration is made of JSON values.
    """
    waiting: list[object] = [config]
    while waiting:
        value = waiting.pop()
        if isinstance(value, list):
            waiting.extend(reversed(value))
        elif isinstance(value, dict):
            if "class_name" in value:
                yield from _foreign_object(value)
            for key, inner in value.items():
                # Lambda, ResidualWrapper and their like store Python bytecode under these keys.
                if str(key).endswith("_type") and inner in ("lambda", "function"):
                    yield f"it stores a Python function as code ({key}={inner!r})"
            waiting.extend(reversed(list(value.values())))


def class_names(config: object) -> set[str]:
    """Names of all classes in a configuration."""
    names: set[str] = set()
    waiting: list[object] = [config]
    while waiting:
        value = waiting.pop()
        if isinstance(value, list):
            waiting.extend(value)
        elif isinstance(value, dict):
            names.add(str(value.get("class_name")))
            waiting.extend(value.values())
    return names


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
        if not _DTYPE.fullmatch(str(details.get("dtype", "float32"))):
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


FREE_BYTES = 2**28
"""What any file may claim, however small it is."""

RATIO = 100
"""Above [FREE_BYTES][]: how many bytes a file may claim per byte that it has."""

# Of arrays of texts, whose honest size cannot be told: a list of all names in the file.
_FREE_TEXT_BYTES = 2**30
_NUMBERS = {h5t.INTEGER, h5t.FLOAT, h5t.COMPOUND, h5t.ENUM, h5t.STRING, h5t.OPAQUE, h5t.BITFIELD}
# Those that HDF5 itself brings: deflate, shuffle, Fletcher's checksum, szip, nbit, scale-offset;
# and h5py's lzf. Any other one would be looked for as a library to load.
_FILTERS = {1, 2, 3, 4, 5, 6, 32000}
_HEAP = b"GCOL"


class ClaimError(ValueError):
    """A file claims what it does not hold, or leads to another file."""


def check_claim(what: str, claimed: int, real: int) -> None:
    """Raises `ClaimError`, naming both, if something claims far more bytes than it has.

    `claimed` are the bytes it would take in memory or on the disk, `real` those it takes in the
    file.
    """
    allowed = max(FREE_BYTES, RATIO * real)
    if claimed > allowed:
        raise ClaimError(
            f"{what} claims {claimed:,} bytes and takes {real:,}; at most {allowed:,} are believed"
        )


def check_archive(archive: zipfile.ZipFile, *, largest: int | None = None) -> int:
    """Raises `ClaimError` unless a zip's members stay inside it and unpack to a credible size.

    All members together may have `largest` bytes, by default as many as [check_claim][] allows.
    Returns their bytes, unpacked.
    """
    seen: set[str] = set()
    for member in archive.infolist():
        name = member.filename
        windows = PureWindowsPath(name)
        # What zipfile itself makes of them when it unpacks depends on the system.
        outside = windows.is_absolute() or windows.drive or windows.root or "\\" in name
        if outside or ".." in PurePosixPath(name).parts or member.orig_filename != name:
            raise ClaimError(f"its member {member.orig_filename!r} leads out of the archive")
        if stat.S_ISLNK(member.external_attr >> 16):
            raise ClaimError(f"its member {name!r} is a symbolic link")
        if name in seen:
            raise ClaimError(f"it has two members {name!r}")
        if member.flag_bits & 1:
            raise ClaimError(f"its member {name!r} is encrypted")
        seen.add(name)
    claimed = sum(member.file_size for member in archive.infolist())
    assert archive.fp is not None
    # What members say of their packed size is a claim too, and they may share their bytes.
    real = archive.fp.seek(0, 2)
    if largest is not None and claimed > largest:
        raise ClaimError(f"it claims to hold {claimed:,} bytes; at most {largest:,} are believed")
    check_claim("its content", claimed, real)
    return claimed


def check_members(archive: zipfile.ZipFile, known: Collection[str], folder: str) -> None:
    """Raises `ClaimError` for the first member that is no known one and lies outside a folder."""
    for name in archive.namelist():
        if name not in known and not name.startswith(f"{folder}/"):
            raise ClaimError(f"it has the member {name!r}, which no model needs")


def check_hdf5(file: h5py.File, content: BinaryIO | Path, real: int) -> int:
    """Raises `ClaimError` unless an HDF5 file holds all of its data itself, in a credible size.

    All of it has to be in plain data sets. `content` is the same file's bytes or its path, `real`
    the number of those bytes. Returns the bytes of all data sets in memory.
    """
    claimed = stored = 0
    for path, item in _objects(file):
        _check_attributes(path, item, content, real)
        if isinstance(item, h5py.Dataset):
            size, storage = _check_data_set(path, item)
            claimed, stored = claimed + size, stored + storage
    if stored > real:
        raise ClaimError(f"its data sets take {stored:,} bytes of a file of {real:,}")
    check_claim("its data sets together", claimed, real)
    return claimed


def _objects(file: h5py.File) -> Iterator[tuple[str, Any]]:
    """Every object of a file once, with its path; links lead to none but those in the file."""
    waiting: list[tuple[str, Any]] = [("/", file["/"])]
    seen = {h5o.get_info(file["/"].id).addr}
    while waiting:
        path, item = waiting.pop()
        yield path, item
        if not isinstance(item, h5py.Group):
            continue
        for name in item:
            below = f"{path.rstrip('/')}/{name}"
            try:
                link = item.get(name, getlink=True)
            except TypeError as error:
                raise ClaimError(f"its {below!r} is a link of an unknown kind") from error
            if not isinstance(link, h5py.HardLink):
                target = getattr(link, "path", "")
                where = f" of the file {link.filename!r}" if hasattr(link, "filename") else ""
                raise ClaimError(f"its {below!r} is a link to {target!r}{where}")
            child = item[name]
            address = h5o.get_info(child.id).addr
            if address not in seen:
                seen.add(address)
                waiting.append((below, child))


def _check_data_set(path: str, data_set: h5py.Dataset) -> tuple[int, int]:
    """Bytes of one data set in memory and in the file."""
    properties = data_set.id.get_create_plist()
    if properties.get_external_count():
        raise ClaimError(f"its data set {path!r} lies in the file {_external(properties)!r}")
    if data_set.is_virtual:
        raise ClaimError(f"its data set {path!r} is virtual: it is put together from other ones")
    filters = {properties.get_filter(number)[0] for number in range(properties.get_nfilters())}
    if filters - _FILTERS:
        raise ClaimError(
            f"its data set {path!r} needs the unknown filter {min(filters - _FILTERS)}"
        )
    kind = data_set.id.get_type()
    _check_type(f"data set {path!r}", kind, texts=False)
    claimed = data_set.id.get_space().get_simple_extent_npoints() * kind.get_size()
    storage = data_set.id.get_storage_size()
    if data_set.chunks is None and claimed > storage:
        raise ClaimError(
            f"its data set {path!r} claims {claimed:,} bytes and takes {storage:,} in the file"
        )
    check_claim(f"its data set {path!r}", claimed, storage)
    return claimed, storage


def _external(properties: Any) -> str:
    return properties.get_external(0)[0].decode("utf-8", "replace")


def _check_attributes(path: str, item: Any, content: BinaryIO | Path, real: int) -> None:
    for name in item.attrs:
        attribute = item.attrs.get_id(name)
        kind = attribute.get_type()
        what = f"attribute {name!r} of {path!r}"
        _check_type(what, kind, texts=True)
        count = math.prod(attribute.shape or ())
        if not (kind.get_class() == h5t.STRING and kind.is_variable_str()):
            check_claim(f"its {what}", count * kind.get_size(), real)
        elif count > 1 and count * real > _FREE_TEXT_BYTES:
            # All its texts may be the same place in the file.
            claimed = count * _longest_text(content, real)
            if claimed > max(_FREE_TEXT_BYTES, RATIO * real):
                raise ClaimError(f"its {what} may claim {claimed:,} bytes of a file of {real:,}")


def _check_type(what: str, kind: Any, *, texts: bool) -> None:
    if kind.get_class() not in _NUMBERS:
        raise ClaimError(f"its {what} holds references or lists, no numbers")
    variable = kind.get_class() == h5t.STRING and kind.is_variable_str()
    inside = kind.detect_class(h5t.VLEN) or kind.detect_class(h5t.REFERENCE)
    if inside or (variable and not texts):
        raise ClaimError(f"its {what} holds references or lists, no numbers")


def _longest_text(content: BinaryIO | Path, real: int) -> int:
    """Bytes of the longest object in the heaps that texts of any length lie in."""
    if isinstance(content, Path):
        with content.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as m:
            return _longest_in(m, real)
    content.seek(0)
    return _longest_in(content.read(), real)


def _longest_in(data: Any, real: int) -> int:
    longest, start = 0, data.find(_HEAP)
    while start >= 0:
        # A heap's head takes 16 bytes, its size the last 8; an object's head as many.
        size = struct.unpack_from("<Q", data, start + 8)[0] if start + 16 <= real else 0
        place, end = start + 16, min(start + size, real)
        while place + 16 <= end:
            index, length = struct.unpack_from("<H6xQ", data, place)
            if index:  # 0 stands for what is free
                longest = max(longest, min(length, real))
            place += 16 + (length + 7) // 8 * 8
        start = data.find(_HEAP, start + 4)
    return longest
