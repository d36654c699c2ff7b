"""Opens models that Keras saved, with the user's own modules for their classes.

tf_keras's own safe mode covers Lambda layers in .keras files only. The check here reads the stored
configuration as plain data, names what is foreign in it, compares what the file claims to hold with
its size, and only then lets Keras build the model. It guards against files that bring code, lead to
other files or take all memory; it is no sandbox for TensorFlow itself.

The user's own modules, which bring the classes that a saved model is made of.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import math
import os
import sys
import traceback
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any

import h5py
import tensorflow as tf
import tf_keras as keras
from google.protobuf.message import DecodeError
from tensorflow.core.protobuf import saved_model_pb2
from tf_keras.protobuf import saved_metadata_pb2

# Importing it registers the wrapper, so that wrapped models can be read back.
import rl_sparsity_tf.layers.wrapper  # noqa: F401
from rl_sparsity_tf._compat import TFMOT, seeing_tf_keras
from rl_sparsity_tf.claims import FREE_BYTES, ClaimError, check_archive, check_hdf5, check_members
from rl_sparsity_tf.console import logging_kept
from rl_sparsity_tf.errors import ArgumentError, ModelError, did_you_mean, one_line
from rl_sparsity_tf.files import as_file
from rl_sparsity_tf.layers.untrusted import (
    PARTS,
    ROOTS,
    class_names,
    forbidden_nodes,
    foreign_parts,
)
from rl_sparsity_tf.randomness import python_and_numpy_random_kept

_TFMOT_LAYERS = {
    *("PruneLowMagnitude", "QuantizeLayer", "QuantizeWrapper", "QuantizeWrapperV2"),
    *("QuantizeAnnotate", "ClusterWeights"),
}
# A configuration is text that people can read; of large models it has a megabyte.
_LARGEST_CONFIG = 2**25
_WEIGHTS = "model.weights.h5"
_MEMBERS = {"config.json", "metadata.json", _WEIGHTS, "assets/"}
# What a model may hold beside what is stored: the state of its optimizer, if it has not begun.
_COPIES = 8
# What zipfile, zlib, h5py and json raise of damaged files.
_DAMAGE = (
    *(OSError, ValueError, LookupError, RuntimeError, TypeError, NotImplementedError),
    *(RecursionError, zipfile.BadZipFile, zlib.error),
)
_FORMATS = (
    "a .keras or .h5 file, or a SavedModel folder, written by model.save() of tf_keras, or a "
    ".keras file of Keras 3"
)
_RESAVE = (
    "Save it again from Keras 2, with `import tf_keras as keras`, or from Keras 3 as a .keras file"
)


def load_model(path: str | os.PathLike[str], *, trusted: bool = False) -> Any:
    """Loads a model saved by Keras 3 or tf_keras, without running code that came with the file.

    Args:
        path: A .keras file, or an .h5 file or a SavedModel folder of tf_keras, each written by
            `model.save`.
        trusted: Whether to load Lambda layers and classes from any module too, and to believe what
            the file claims to hold. That runs code chosen by whoever wrote the file.

    Returns:
        The model, compiled if it was saved compiled; of Keras 3 if that wrote it.

    Raises:
        ArgumentError: If `path` is no path.
        ModelError: If there is no model at the path, it is damaged, of a foreign format, would run
            code or read other files, or claims far more than it holds.

    Example:
        >>> model.save("model.keras")
        >>> model = rls.load_model("model.keras")
    """
    path = as_file("path", path, _FORMATS)
    try:
        stored = 0 if trusted else _check_claims(path)
    except ClaimError as error:
        raise ModelError(
            f"{str(path)!r} was not opened: {error}. Expected a model as model.save writes it, "
            "which holds all of its data itself: save it again. If you trust whoever wrote the "
            "file, pass trusted=True."
        ) from error
    configs = _read_configs(path)
    if _is_of_keras_3(path):
        return _load_keras_3(path, configs, stored, trusted=trusted)
    with contextlib.ExitStack() as scopes:
        if _TFMOT_LAYERS & class_names(configs):
            _enter_tfmot_scopes(scopes)
        if not trusted:
            reason = next(foreign_parts(configs), None) or _foreign_graph(path)
            if reason:
                raise _foreign(path, reason)
            scopes.enter_context(_held_to(path, stored))
        # Keras draws the seeds of initialisers, and complains of weights through absl.
        scopes.enter_context(logging_kept())
        scopes.enter_context(python_and_numpy_random_kept())
        try:
            model = keras.models.load_model(path, safe_mode=not trusted)
        except ModelError:
            raise
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


def _load_keras_3(path: Path, configs: list[Any], stored: int, *, trusted: bool) -> Any:
    from rl_sparsity_tf.keras3 import loading as keras_3

    with contextlib.ExitStack() as scopes:
        if not trusted:
            reason = next(keras_3.foreign_parts(configs), None)
            if reason:
                raise _foreign(path, reason)
            scopes.enter_context(_held_to(path, stored))
        scopes.enter_context(logging_kept())
        scopes.enter_context(python_and_numpy_random_kept())
        return keras_3.load_keras_3(path, trusted=trusted)


def _is_of_keras_3(path: Path) -> bool:
    """Whether a .keras file that has been read was written by Keras 3."""
    if path.is_dir() or not (path.name.endswith(".keras") and zipfile.is_zipfile(path)):
        return False
    with zipfile.ZipFile(path) as archive:
        if "metadata.json" not in archive.namelist():
            return False
        metadata = json.loads(archive.read("metadata.json"))
    return isinstance(metadata, dict) and str(metadata.get("keras_version")).startswith("3.")


def _foreign(path: Path, reason: str) -> ModelError:
    return ModelError(
        f"{str(path)!r} was not opened: {reason}. Expected a model of Keras's own parts and of "
        "registered classes: import what registers yours "
        "(@keras.saving.register_keras_serializable). If you trust whoever wrote the file, pass "
        "trusted=True."
    )


def _check_claims(path: Path) -> int:
    """Raises unless a file holds all of its data itself; returns the bytes of its weights.

    What is no model at all passes: that is for those to say who read it.
    """
    if path.is_dir():
        return _check_folder(path)
    if not path.is_file():
        return 0
    try:
        if path.name.endswith(".keras") and zipfile.is_zipfile(path):
            return _check_zip(path)
        if h5py.is_hdf5(path):
            with h5py.File(path, "r") as file:
                return check_hdf5(file, path, path.stat().st_size)
    except _DAMAGE as error:
        if isinstance(error, ClaimError):
            raise
        raise _damaged(path, error) from error
    return 0


def _check_zip(path: Path) -> int:
    with zipfile.ZipFile(path) as archive:
        check_archive(archive)
        sizes = {member.filename: member.file_size for member in archive.infolist()}
        for name in ("config.json", "metadata.json"):
            if sizes.get(name, 0) > _LARGEST_CONFIG:
                raise ClaimError(
                    f"its {name} has {sizes[name]:,} bytes; at most {_LARGEST_CONFIG:,} are read"
                )
        if "config.json" not in sizes:
            return 0
        check_members(archive, _MEMBERS, "assets")
        try:
            weights = io.BytesIO(archive.read(_WEIGHTS))
        except (KeyError, zipfile.BadZipFile):
            return 0
    with h5py.File(weights, "r") as file:
        return check_hdf5(file, weights, sizes[_WEIGHTS])


def _check_folder(path: Path) -> int:
    """What a SavedModel names, and what is linked into it, has to lie in its folder."""
    if not (path / "saved_model.pb").is_file():
        return 0
    root = path.resolve()
    for place in path.rglob("*"):
        if place.is_symlink() and not place.resolve().is_relative_to(root):
            raise ClaimError(f"its {str(place.relative_to(path))!r} is a link out of the folder")
    for meta in _graphs(path):
        for asset in meta.asset_file_def:
            name = PurePosixPath(asset.filename.replace("\\", "/"))
            if name.is_absolute() or ".." in name.parts or "://" in asset.filename:
                raise ClaimError(f"its asset {asset.filename!r} lies outside the folder")
    return sum(place.stat().st_size for place in path.glob("variables/*") if place.is_file())


@contextlib.contextmanager
def _held_to(path: Path, stored: int) -> Iterator[None]:
    """Refuses variables, before they take memory, that no weights in the file stand for."""
    allowed, made = max(FREE_BYTES, _COPIES * stored), 0

    def create(make: Any, **arguments: Any) -> Any:
        nonlocal made
        made += _variable_bytes(arguments)
        if made > allowed:
            raise ModelError(
                f"{str(path)!r} was not opened: its layers claim {made:,} bytes of weights, and it "
                f"holds {stored:,}. Expected a model with its weights, as model.save writes it. If "
                "you trust whoever wrote the file, pass trusted=True."
            )
        return make(**arguments)

    with tf.variable_creator_scope(create):
        yield


def _variable_bytes(arguments: dict[str, Any]) -> int:
    value = arguments.get("initial_value")
    shape = arguments.get("shape")
    shape = getattr(value, "shape", None) if shape is None else shape
    dtype = arguments.get("dtype") or getattr(value, "dtype", None) or tf.float32
    sizes = tf.TensorShape(shape)
    known = sizes.as_list() if sizes.rank is not None else []
    return math.prod(size or 1 for size in known) * max(tf.as_dtype(dtype).size, 1)


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
            if "metadata.json" in names:
                json.loads(archive.read("metadata.json"))
            if "config.json" not in names:
                raise ModelError(
                    f"{str(path)!r} is a zip file without a config.json. Expected {_FORMATS}."
                )
            config = json.loads(archive.read("config.json"))
            damaged = archive.testzip()
    except _DAMAGE as error:
        if isinstance(error, ModelError):
            raise
        raise _damaged(path, error) from error
    if damaged:
        raise _damaged(path, zipfile.BadZipFile(f"bad checksum of {damaged}"))
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
            return [_parse(text) for text in stored if text is not None]
    except _DAMAGE as error:
        if isinstance(error, ModelError):
            raise
        raise _damaged(path, error) from error


def _parse(text: Any) -> Any:
    # As Keras does; json itself would take other encodings.
    return json.loads(text.decode("utf-8") if isinstance(text, bytes) else text)


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
            f"{str(path)!r} was written by Keras {text}. Expected a .keras file, the one format of "
            "Keras 3 that is opened: save the model again as model.keras."
        )


def _graphs(path: Path) -> Sequence[Any]:
    """The graphs of a SavedModel as messages; nothing is loaded from them."""
    saved = saved_model_pb2.SavedModel()
    try:
        saved.ParseFromString((path / "saved_model.pb").read_bytes())
    except (OSError, DecodeError) as error:
        raise _damaged(path, error) from error
    return saved.meta_graphs


def _foreign_graph(path: Path) -> str | None:
    """Names an operation in a SavedModel's graphs that leaves TensorFlow."""
    for operation, name in forbidden_nodes(_graphs(path)) if path.is_dir() else ():
        return f"its graph has the operation {operation} ({name})"
    return None


def _enter_tfmot_scopes(scopes: contextlib.ExitStack) -> None:
    with seeing_tf_keras(TFMOT):
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


@contextlib.contextmanager
def user_modules(names: Sequence[str]) -> Iterator[None]:
    """Imports modules; while the context lasts, Keras knows their classes, registered or not.

    The current folder is looked through first. Raises `ArgumentError` if a module cannot be
    imported.
    """
    for name in names:
        _check_name(name)
    classes: dict[str, type] = {}
    for name in names:
        classes |= _classes_of(_imported(name))
    of_keras_3 = {name: cls for name, cls in classes.items() if not issubclass(cls, PARTS)}
    with contextlib.ExitStack() as scopes:
        scopes.enter_context(
            keras.utils.custom_object_scope(
                {name: cls for name, cls in classes.items() if name not in of_keras_3}
            )
        )
        if of_keras_3:
            scopes.enter_context(
                importlib.import_module("keras").saving.custom_object_scope(of_keras_3)
            )
        yield


def _check_name(name: str) -> None:
    path = Path(name)
    if path.suffix == ".py" or "/" in name or os.sep in name:
        folder = "" if path.parent == Path(".") else f" after: cd {path.parent}"
        raise ArgumentError(
            f"--import {name} is a path. Expected the name of a module, installed or in the "
            f"current folder: --import {path.stem}{folder}"
        )
    if not all(part.isidentifier() for part in name.split(".")):
        raise ArgumentError(
            f"--import {name!r} is no name of a module. Expected one such as layers, or "
            "project.layers."
        )


def _imported(name: str) -> ModuleType:
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        # What was looked for before the folder had it is remembered as missing.
        importlib.invalidate_caches()
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or name
        if missing == name or name.startswith(f"{missing}."):
            raise _not_found(name, folder) from error
        raise _failing(name, error) from error
    except (Exception, SystemExit) as error:  # whatever the user's module raises
        raise _failing(name, error) from error
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(folder)


def _not_found(name: str, folder: str) -> ArgumentError:
    here = sorted(
        path.stem
        for path in Path(folder).iterdir()
        if path.suffix == ".py" or (path / "__init__.py").is_file()
    )
    known = f" {did_you_mean(name, here)}" if 0 < len(here) <= 20 else ""
    return ArgumentError(
        f"--import {name}: there is no module of that name, neither installed nor in the current "
        f"folder {folder!r}. Run the command in the folder that holds it, or put that on "
        f"PYTHONPATH.{known}"
    )


def _failing(name: str, error: BaseException) -> ArgumentError:
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    if isinstance(error, SyntaxError):
        where = f" ({error.filename}, line {error.lineno})"
    return ArgumentError(
        f"--import {name} fails: {one_line(error)}{where}. Expected a module that can be imported: "
        f"try python -c 'import {name}' in this folder."
    )


def _classes_of(module: ModuleType) -> dict[str, type]:
    """The user's classes in a module that models are made of, also those it took from elsewhere."""
    found = {}
    for value in vars(module).values():
        if not isinstance(value, type) or value.__module__.split(".")[0] in ROOTS:
            continue
        of_keras_3 = any(base.__module__.split(".")[0] == "keras" for base in value.__mro__)
        if of_keras_3 or issubclass(value, PARTS):
            found[value.__name__] = value
    return found
