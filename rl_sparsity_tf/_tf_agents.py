"""The one place where TF-Agents is first imported: a clear error without it, and no greeting.

TF-Agents is optional: wrapping, plans and export work without it.
"""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Iterator

from rl_sparsity_tf.errors import MissingDependencyError


@contextlib.contextmanager
def _environment_kept() -> Iterator[None]:
    """Takes away what an import adds to the environment variables."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ.update(before)


try:
    # Gym, which TF-Agents imports, greets on standard error; the sources of TF-Agents 0.19.0
    # make newer Pythons warn when they are compiled for the first time. Gym sets a variable, too.
    with (
        contextlib.redirect_stderr(io.StringIO()),
        warnings.catch_warnings(),
        _environment_kept(),
    ):
        warnings.simplefilter("ignore", SyntaxWarning)
        import tf_agents  # noqa: F401
        from tf_agents.environments import py_environment
        from tf_agents.environments import utils as environment_utils
        from tf_agents.specs import array_spec
        from tf_agents.trajectories import time_step
        from tf_agents.typing import types
except ImportError as error:
    raise MissingDependencyError(
        f"Environments and agents need TF-Agents, which could not be imported ({error}). "
        'Install it with: pip install "rl_sparsity_tf[rl]" on Python 3.11, or with: '
        "pip install --no-deps tf-agents==0.19.0 on other versions of Python."
    ) from error

__all__ = ["array_spec", "environment_utils", "py_environment", "time_step", "types"]
