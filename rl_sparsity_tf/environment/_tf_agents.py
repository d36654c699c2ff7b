"""The one place where TF-Agents is first imported: a clear error without it, and no greeting.

TF-Agents is optional: wrapping, plans and export work without it.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import warnings
from collections.abc import Iterator

import tf_keras as keras

from rl_sparsity_tf._compat import AGENTS, KerasVersionError, seeing_tf_keras
from rl_sparsity_tf.errors import MissingDependencyError


@contextlib.contextmanager
def _process_kept() -> Iterator[None]:
    """Takes away what an import adds to the process beside modules.

    That is an environment variable of gym's; an entry of setuptools' in `sys.path`; and classes
    that TF-Agents and TensorFlow Probability register under bare names, such as "ExpandDims":
    Keras would take them for a caller's own of that name, and one of them unpickles its
    configuration. Whoever has imported those libraries before keeps what they registered.
    """
    variables, path = dict(os.environ), list(sys.path)
    modules, classes = set(sys.modules), keras.utils.get_custom_objects()
    registered = dict(classes)
    try:
        yield
    finally:
        for name in set(os.environ) - set(variables):
            del os.environ[name]
        os.environ.update(variables)
        for name in set(classes) - set(registered):
            del classes[name]
        if sys.path != path:
            sys.path[:] = path
            # It adds the entry once, when it is loaded; who imports it later needs that again.
            for name in set(sys.modules) - modules:
                if name.partition(".")[0] in ("setuptools", "distutils", "_distutils_hack"):
                    del sys.modules[name]


try:
    # Gym, which TF-Agents imports, greets on standard error; the sources of TF-Agents 0.19.0
    # make newer Pythons warn when they are compiled for the first time. Gym sets a variable, too.
    with (
        contextlib.redirect_stderr(io.StringIO()),
        warnings.catch_warnings(),
        _process_kept(),
        seeing_tf_keras(AGENTS),
    ):
        warnings.simplefilter("ignore", SyntaxWarning)
        import tf_agents  # noqa: F401
        from tf_agents.environments import py_environment
        from tf_agents.environments import utils as environment_utils
        from tf_agents.specs import array_spec
        from tf_agents.trajectories import time_step
        from tf_agents.typing import types
except KerasVersionError:
    raise
except ImportError as error:
    raise MissingDependencyError(
        f"Environments and agents need TF-Agents, which could not be imported ({error}). "
        'Install it with: pip install "rl_sparsity_tf[rl]" on Python 3.11, or with: '
        "pip install --no-deps tf-agents==0.19.0 on other versions of Python."
    ) from error

__all__ = ["array_spec", "environment_utils", "py_environment", "time_step", "types"]
