"""The door to TensorFlow: TF-Agents and TFMOT see Keras 2, whatever `tf.keras` means to the user.

TF-Agents and the TensorFlow Model Optimization toolkit (TFMOT) are written against Keras 2, which
lives on as `tf_keras`, and call it `tf.keras`. TensorFlow decides once per process what that is:
Keras 3, or tf_keras if TF_USE_LEGACY_KERAS=1 was set in time. The decision is the user's. Unless it
was tf_keras, the modules of those two packages get an import function of their own, which hands
them a stand-in for TensorFlow with tf_keras as its `keras`; all else in it is TensorFlow itself.

TF-Agents is loaded so whoever imports it, as it cannot build a network on Keras 3. TFMOT is only
where this package imports it: to whoever else does, it makes `tf.keras` tf_keras on purpose.
"""

from __future__ import annotations

import builtins
import contextlib
import importlib
import importlib.abc
import importlib.metadata
import importlib.util
import os
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from typing import Any

from rl_sparsity_tf.errors import RLSparsityError

VARIABLE = "TF_USE_LEGACY_KERAS"
AGENTS, TFMOT = "tf_agents", "tensorflow_model_optimization"
# Package -> its distribution and the versions whose imports have been looked through.
_KNOWN = {
    AGENTS: ("tf-agents", ("0.19",)),
    TFMOT: ("tensorflow-model-optimization", ("0.8",)),
}


class KerasVersionError(RLSparsityError, ImportError):
    """A package that needs Keras 2 cannot be given it in this process."""


def is_keras_3(module: types.ModuleType | None) -> bool:
    """Whether a `keras` module, or TensorFlow's loader of one, is Keras 3 already.

    Nothing is loaded by asking.
    """
    if module is None:
        return False
    # TensorFlow keeps a lazy loader until the first attribute is read from it; only a loaded
    # module has a version to look at without causing the load.
    version = vars(module).get("__version__")
    return version is not None and str(version).startswith("3.")


def wants_tf_keras() -> bool:
    """Whether the user has made `tf.keras` mean tf_keras, by the variable and in time."""
    if os.environ.get(VARIABLE) not in ("1", "true", "True"):
        return False
    tensorflow = sys.modules.get("tensorflow")
    return tensorflow is None or not is_keras_3(vars(tensorflow).get("keras"))


def prepare() -> None:
    """Makes TF-Agents see Keras 2 from now on; imports nothing, and leaves the environment."""
    if wants_tf_keras():
        if "tensorflow" in sys.modules:
            _find_tf_keras_first()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _FINDER)


@contextlib.contextmanager
def seeing_tf_keras(package: str) -> Iterator[None]:
    """While TF-Agents or TFMOT is imported: it sees Keras 2.

    Raises `KerasVersionError` if its version is none that this is known to work with. Whoever
    imported TF-Agents on Keras 3 before finds what works on Keras 2 in its modules afterwards.
    """
    if wants_tf_keras():
        yield
        return
    _check_version(package)
    added = package not in _FINDER.packages
    _FINDER.packages.add(package)
    stale = _taken_out(package) if package == AGENTS else {}
    try:
        with _importing_again() if stale else contextlib.nullcontext():
            yield
    except BaseException:
        for name in [name for name in sys.modules if _is_part(name, package)] if stale else ():
            del sys.modules[name]
        sys.modules.update(stale)
        raise
    finally:
        if added:
            _FINDER.packages.discard(package)
    for name, module in stale.items():
        vars(module).update(vars(importlib.import_module(name)))


def _check_version(package: str) -> None:
    distribution, known = _KNOWN[package]
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return  # whoever imports it says that it is missing
    if not _is_known(version, known):
        raise KerasVersionError(
            f"{distribution} {version} is installed, which is written for Keras 2, and tf.keras is "
            f"Keras 3 here. Expected {distribution} {' or '.join(known)}, which can be used so all "
            f'the same: pip install "{distribution}=={known[-1]}.*". Or put this line first in '
            f'your program, and build your models with tf_keras: import os; os.environ["{VARIABLE}"'
            '] = "1"'
        )


def _is_known(version: str, known: Sequence[str]) -> bool:
    return any(version == one or version.startswith(f"{one}.") for one in known)


def _is_part(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def _taken_out(package: str) -> dict[str, types.ModuleType]:
    """The modules of a package if they were loaded without the stand-in; no longer imported."""
    loaded = {name: module for name, module in sys.modules.items() if _is_part(name, package)}
    first = loaded.get(package)  # None says that it must not be imported
    if first is None or isinstance(getattr(first, "__loader__", None), _Loader):
        return {}
    for name in loaded:
        del sys.modules[name]
    return loaded


def _importing_again() -> contextlib.AbstractContextManager[None]:
    """Lets gin, which TF-Agents registers its functions with, take them a second time."""
    from gin import config

    interactive: contextlib.AbstractContextManager[None] = config.interactive_mode()
    return interactive


class _StandIn(types.ModuleType):
    """A module of TensorFlow with some names of its own; all others are the real module's."""

    def __init__(self, real: types.ModuleType, own: Mapping[str, Any]):
        super().__init__(real.__name__)
        vars(self).update(own, _real=real)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_real"], name)

    def __dir__(self) -> list[str]:
        return sorted({*dir(vars(self)["_real"]), *vars(self)})


def _stand_ins() -> dict[str, types.ModuleType]:
    import tensorflow as tf
    import tf_keras

    v1_keras = importlib.import_module("tf_keras.api._v1.keras")
    v1 = _StandIn(tf.compat.v1, {"keras": v1_keras})
    v2 = _StandIn(tf.compat.v2, {"keras": tf_keras})
    compat = _StandIn(tf.compat, {"v1": v1, "v2": v2})
    return {
        "tensorflow": _StandIn(tf, {"keras": tf_keras, "compat": compat}),
        "tensorflow.compat": compat,
        "tensorflow.compat.v1": v1,
        "tensorflow.compat.v2": v2,
        "tensorflow.keras": tf_keras,
        "tensorflow.compat.v1.keras": v1_keras,
        "tensorflow.compat.v2.keras": tf_keras,
    }


def _importer() -> Callable[..., Any]:
    """An import function that finds the stand-ins in TensorFlow's place."""
    ours: dict[str, types.ModuleType] = {}

    def load(
        name: str,
        globals: Mapping[str, Any] | None = None,
        locals: Mapping[str, Any] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> Any:
        if level or not _is_part(name, "tensorflow"):
            return builtins.__import__(name, globals, locals, fromlist or (), level)
        if not ours:
            ours.update(_stand_ins())
        for keras in ("tensorflow.keras", "tensorflow.compat.v2.keras"):
            if _is_part(name, keras):
                found = importlib.import_module("tf_keras" + name.removeprefix(keras))
                return found if fromlist else ours["tensorflow"]
        if fromlist and name in ours:
            return ours[name]
        found = builtins.__import__(name, globals, locals, fromlist or (), level)
        return found if fromlist else ours["tensorflow"]

    return load


class _Loader(SourceFileLoader):
    """Runs a module with the import function above, and takes back what it sets for TensorFlow."""

    def exec_module(self, module: types.ModuleType) -> None:
        vars(module)["__builtins__"] = {**vars(builtins), "__import__": _LOAD}
        before = os.environ.get(VARIABLE)
        try:
            super().exec_module(module)
        finally:
            if before is None:
                os.environ.pop(VARIABLE, None)
            else:
                os.environ[VARIABLE] = before


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules of the packages that need Keras 2."""

    def __init__(self) -> None:
        self.packages = {AGENTS}

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> ModuleSpec | None:
        package = name.partition(".")[0]
        if package not in self.packages or wants_tf_keras():
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or type(spec.loader) is not SourceFileLoader:
            return None
        distribution, known = _KNOWN[package]
        try:
            if not _is_known(importlib.metadata.version(distribution), known):
                return None  # as it is for others; this package says why it cannot use it
        except importlib.metadata.PackageNotFoundError:
            return None
        spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


_LOAD = _importer()
_FINDER = _Finder()


def _find_tf_keras_first() -> None:
    """Lets `import tensorflow.keras` find Keras 2 when TensorFlow was imported before us.

    `tf.keras` is decided when it is first touched, but the folder in which submodules such as
    `tensorflow.keras.layers` are looked up (TensorFlow Probability imports them so) is put on the
    package's path when TensorFlow is imported, by the variable's value at that time.
    """
    spec = importlib.util.find_spec("tf_keras")
    if spec is None or not spec.submodule_search_locations:
        return  # whoever needs tf_keras says that it is missing
    folder = os.path.join(next(iter(spec.submodule_search_locations)), "api", "_v2")
    for name in ("tensorflow", "tensorflow.compat.v2"):
        path = getattr(sys.modules.get(name), "__path__", None)
        if path is not None and folder not in path:
            path.insert(0, folder)
