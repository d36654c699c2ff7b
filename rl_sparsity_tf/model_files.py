"""Reads Keras models from disk, and refuses files that could run code before Keras opens them.

tf_keras's own safe mode covers Lambda layers in .keras files only. The check here reads the stored
configuration as plain data, names what is foreign in it, and only then lets Keras build the model.
It guards against files that bring code; it is no sandbox for TensorFlow itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import tf_keras as keras
from google.protobuf.message import DecodeError
from tensorflow.core.protobuf import saved_model_pb2
from tensorflow.python.util import tf_export
from tf_keras.protobuf import saved_metadata_pb2

# Importing it registers the wrapper, so that wrapped models can be read back.
import rl_sparsity_tf.wrapper  # noqa: F401
from rl_sparsity_tf.errors import ModelError, one_line
from rl_sparsity_tf.files import as_file

_CLASS_ROOTS = (
    "keras",
    "tf_keras",
    "tensorflow",
    "rl_sparsity_tf",
    "tensorflow_model_optimization",
)
# Plain functions (activations, losses) are taken from fewer places: those that only compute.
_FUNCTION_MODULES = re.compile(
    r"(rl_sparsity_tf|tensorflow_model_optimization)(\.\w+)*"
    r"|(tf_)?keras(\.src)?\.(activations|backend|constraints|initializers|losses|metrics|regularizers)"
    r"(\.\w+)*"
    r"|tensorflow\.python\.framework\.(constant_op|tensor_conversion)"
    r"|tensorflow\.python\.ops\.(gen_)?(array|bincount|bitwise|check|clip|confusion_matrix|embedding"
    r"|histogram|image|linalg|manip|math|nn|numerics|random|sets|sort|sparse|special_math|spectral"
    r"|stateless_random|string|tensor_getitem_override|(linalg|ragged|signal)\.\w+)"
    r"(_ops)?(_impl)?(_v2|_stack)?"
)
_KERAS_FUNCTIONS = (
    "activations",
    "constraints",
    "initializers",
    "losses",
    "metrics",
    "regularizers",
)
_TENSOR_CLASSES = ("RaggedTensor", "SparseTensor", "sparse.SparseTensor")
_TFMOT_LAYERS = {
    *("PruneLowMagnitude", "QuantizeLayer", "QuantizeWrapper", "QuantizeWrapperV2"),
    *("QuantizeAnnotate", "ClusterWeights"),
}
_FORBIDDEN_OPS = {
    *("PyFunc", "PyFuncStateless", "EagerPyFunc", "ReadFile", "WriteFile", "MatchingFiles"),
    "PrintV2",  # it can print into a file
}
_FORMATS = "a .keras or .h5 file, or a SavedModel folder, written by model.save() of tf_keras"
_RESAVE = (
    "Save it again from Keras 2: with TF_USE_LEGACY_KERAS=1 set, or with `import tf_keras as keras`"
)


def load_model(path: str | os.PathLike[str], *, trusted: bool = False) -> keras.Model:
    """Loads a model saved by tf_keras, without running code that came with the file.

    Args:
        path: A .keras file, an .h5 file or a SavedModel folder, each written by `model.save`.
        trusted: Whether to load Lambda layers and classes from any module too. That runs code
            chosen by whoever wrote the file.

    Returns:
        The model, compiled if it was saved compiled.

    Raises:
        ArgumentError: If `path` is no path.
        ModelError: If there is no model at the path, it is damaged, of a foreign format, written
            by Keras 3, or would run code.

    Example:
        >>> model.save("model.keras")
        >>> model = load_model("model.keras")
    """
    path = as_file("path", path, _FORMATS)
    configs = _read_configs(path)
    if not trusted:
        reason = next(iter(_foreign(configs)), None) or _foreign_op(path)
        if reason:
            raise ModelError(
                f"{str(path)!r} was not opened: {reason}. Expected a model of Keras's own parts "
                "and of registered classes: import what registers yours "
                "(@keras.saving.register_keras_serializable). If you trust whoever wrote the "
                "file, pass trusted=True."
            )
    try:
        with contextlib.ExitStack() as scopes:
            if _TFMOT_LAYERS & set(_class_names(configs)):
                _enter_tfmot_scopes(scopes)
            model = keras.models.load_model(path, safe_mode=not trusted)
    except Exception as error:
        raise ModelError(
            f"Keras cannot build the model in {str(path)!r}: {one_line(error, 300)}. If it has "
            "classes or functions of yours, import what registers them "
            "(@keras.saving.register_keras_serializable) before loading; else save it again."
        ) from error
    if not isinstance(model, keras.Model):
        raise ModelError(
            f"{str(path)!r} holds a {type(model).__name__}, not a model. Expected {_FORMATS}."
        )
    revived = [layer for layer in (model, *model.submodules) if _is_revived(layer)]
    if revived:
        name = type(revived[0]).__name__
        raise ModelError(
            f"{str(path)!r} has the class {name!r}; this class, or a function it uses, is not "
            "known here, only its graph was saved. Expected registered ones: put "
            "@keras.saving.register_keras_serializable() on it and import it before loading."
        )
    return model


def _read_configs(path: Path) -> list[Any]:
    """Every stored configuration, as plain data; nothing is built from it."""
    if path.is_dir():
        return _read_saved_model(path)
    if not path.exists():
        raise ModelError(f"There is no file or folder {str(path)!r}. Expected {_FORMATS}.")
    # Keras decides in this order; a file can be both.
    if path.name.endswith(".keras") and zipfile.is_zipfile(path):
        return _read_zip(path)
    if h5py.is_hdf5(path):
        return _read_hdf5(path)
    raise ModelError(f"{str(path)!r} {_seems_to_be(path)}. Expected {_FORMATS}.")


def _read_zip(path: Path) -> list[Any]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            metadata = json.loads(archive.read("metadata.json")) if "metadata.json" in names else {}
            if "config.json" not in names:
                raise ModelError(
                    f"{str(path)!r} is a zip file without a config.json. Expected {_FORMATS}."
                )
            config = json.loads(archive.read("config.json"))
            damaged = archive.testzip()
    except (OSError, ValueError, RecursionError, zipfile.BadZipFile, zlib.error) as error:
        if isinstance(error, ModelError):
            raise
        raise _damaged(path, error) from error
    if damaged:
        raise _damaged(path, zipfile.BadZipFile(f"bad checksum of {damaged}"))
    _check_version(path, metadata.get("keras_version") if isinstance(metadata, dict) else None)
    return [config]


def _read_hdf5(path: Path) -> list[Any]:
    try:
        with h5py.File(path, "r") as file:
            _check_version(path, file.attrs.get("keras_version"))
            if "model_config" not in file.attrs:
                raise ModelError(
                    f"{str(path)!r} holds weights but no model. Build the model in code, call "
                    f"model.load_weights on this file and save it with model.save. Expected "
                    f"{_FORMATS}."
                )
            stored = [file.attrs.get(name) for name in ("model_config", "training_config")]
            return [json.loads(text) for text in stored if text is not None]
    except (OSError, ValueError, RecursionError, RuntimeError) as error:
        if isinstance(error, ModelError):
            raise
        raise _damaged(path, error) from error


def _read_saved_model(path: Path) -> list[Any]:
    if not (path / "saved_model.pb").is_file():
        raise ModelError(
            f"The folder {str(path)!r} is no SavedModel: it has no saved_model.pb. Expected "
            f"{_FORMATS}."
        )
    metadata = saved_metadata_pb2.SavedMetadata()
    stored = path / "keras_metadata.pb"
    try:
        metadata.ParseFromString(stored.read_bytes() if stored.is_file() else b"")
        configs = [json.loads(node.metadata) for node in metadata.nodes]
    except (OSError, ValueError, RecursionError, DecodeError) as error:
        raise _damaged(path, error) from error
    if not configs:
        raise ModelError(
            f"The SavedModel {str(path)!r} can be run but not rebuilt: it was written by "
            f"model.export(), tf.saved_model.save() or Keras 3. {_RESAVE}. Expected {_FORMATS}."
        )
    return configs


def _check_version(path: Path, version: object) -> None:
    text = version.decode() if isinstance(version, bytes) else str(version)
    if text.startswith("3."):
        raise ModelError(
            f"{str(path)!r} was written by Keras {text}. Expected a model of Keras 2 (tf_keras). "
            f"{_RESAVE}."
        )


def _foreign(config: object) -> Iterator[str]:
    """Names everything in a configuration that Keras would run or import from elsewhere."""
    if isinstance(config, list):
        for item in config:
            yield from _foreign(item)
    elif isinstance(config, dict):
        if "class_name" in config:
            yield from _foreign_object(config)
        for key, value in config.items():
            # Lambda, ResidualWrapper and their like store Python bytecode under these keys.
            if str(key).endswith("_type") and value in ("lambda", "function"):
                yield f"it stores a Python function as code ({key}={value!r})"
            yield from _foreign(value)


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
        if keras.utils.get_registered_object(str(inner)) is None and not _computes(module, inner):
            yield f"it uses the function {inner!r} of the module {module!r}"
    elif kind == "ClassMethod" and details.get("cls_symbol") not in _TENSOR_CLASSES:
        yield f"its layer{label} calls tf.{details.get('cls_symbol')}.{details.get('method_name')}"
    elif kind == "TFOpLambda":
        symbol = tf_export.get_symbol_from_name(str(details.get("function")))
        if not _FUNCTION_MODULES.fullmatch(str(getattr(symbol, "__module__", None))):
            yield f"its layer{label} calls tf.{details.get('function')}"
    elif module is not None and keras.utils.get_registered_object(registered) is None:
        kind = str(stored.get("spec_name", kind))
        if str(module).split(".")[0] not in _CLASS_ROOTS or not kind.isidentifier():
            yield f"its part{label} is of the class {kind!r} of the module {module!r}"


def _computes(module: object, name: object) -> bool:
    if module == "builtins":  # what Keras writes for its own functions, and Python's eval too
        paths = [f"keras.{group}.{name}" for group in _KERAS_FUNCTIONS]
        return any(tf_export.get_symbol_from_name(path) is not None for path in paths)
    return str(name).isidentifier() and bool(_FUNCTION_MODULES.fullmatch(str(module)))


def _foreign_op(path: Path) -> str | None:
    """Names an operation in a SavedModel's graphs that leaves TensorFlow."""
    if not path.is_dir():
        return None
    saved = saved_model_pb2.SavedModel()
    try:
        saved.ParseFromString((path / "saved_model.pb").read_bytes())
    except (OSError, DecodeError) as error:
        raise _damaged(path, error) from error
    for graph in (meta.graph_def for meta in saved.meta_graphs):
        for nodes in (graph.node, *(function.node_def for function in graph.library.function)):
            for node in nodes:
                if node.op in _FORBIDDEN_OPS:
                    return f"its graph has the operation {node.op} ({node.name})"
    return None


def _class_names(config: object) -> Iterator[str]:
    if isinstance(config, list):
        for item in config:
            yield from _class_names(item)
    elif isinstance(config, dict):
        yield str(config.get("class_name"))
        for value in config.values():
            yield from _class_names(value)


def _enter_tfmot_scopes(scopes: contextlib.ExitStack) -> None:
    import tensorflow_model_optimization as tfmot

    scopes.enter_context(tfmot.sparsity.keras.prune_scope())
    scopes.enter_context(tfmot.clustering.keras.cluster_scope())
    scopes.enter_context(tfmot.quantization.keras.quantize_scope())


def _is_revived(layer: object) -> bool:
    """Whether Keras, not knowing the class, made up a stand-in from the saved graph."""
    return any(base.__name__.startswith("Revived") for base in type(layer).__mro__)


def _seems_to_be(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(256)
    suffix = path.suffix.lower()
    if not start:
        return "is empty"
    if start.startswith(b"PK"):
        if suffix == ".keras":
            return "is truncated: it begins as a zip file, but its end is missing"
        if suffix in (".pt", ".pth"):
            return "seems to be a PyTorch file, which has to be rebuilt in Keras"
        return "is a zip file that is not called .keras (rename it if model.save wrote it)"
    if start[4:8] == b"TFL3" or suffix == ".tflite":
        return "seems to be a TFLite file, which cannot be turned back into a Keras model"
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file itself (fetch it with git lfs pull)"
    if suffix == ".onnx":
        return "seems to be an ONNX file, which has to be rebuilt in Keras"
    if suffix in (".pt", ".pth"):
        return "seems to be a PyTorch file, which has to be rebuilt in Keras"
    if suffix in (".pb", ".pbtxt"):
        return "seems to be one file of a SavedModel or a frozen graph (pass the SavedModel folder)"
    if suffix in (".h5", ".hdf5", ".keras"):
        return f"is damaged or mislabelled: it does not begin as a {suffix} file does"
    return f"is of an unknown format ({suffix or 'no file extension'})"


def _damaged(path: Path, error: Exception) -> ModelError:
    return ModelError(
        f"{str(path)!r} is damaged or truncated ({one_line(error, 300)}). Copy it again, or save "
        f"the model again. Expected {_FORMATS}."
    )
