"""Settings that must be in place before TensorFlow is imported."""

import gc
import importlib
import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
if "PYTEST_XDIST_WORKER" in os.environ:
    # A process per core leaves nothing for threads to do but to wait for each other.
    for _name in ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS", "OMP_NUM_THREADS"):
        os.environ.setdefault(_name, "1")
sys.path.insert(0, str(Path(__file__).parent / "helpers"))

# Before anything that imports TF-Agents, which has to meet tf_keras; any file of tests may be
# the first, or the only one.
importlib.import_module("rl_sparsity_tf")

# Files of tests that take a minute each: begun last, they would leave one process alone with them.
_LONG = ("test_examples.py", "test_learning.py", "test_interrupted.py")


def pytest_collection_modifyitems(items):
    """Long tests first; files stay together, whose tests share what they look at."""
    items.sort(key=lambda item: item.path.name not in _LONG)


@pytest.fixture(scope="session", autouse=True)
def _graphs_as_they_are():
    """Tiny graphs run once or twice: rewriting each to be faster takes longer than it saves.

    What users run is rewritten; so it is in all tests that start a process of their own, and
    everywhere with `RL_SPARSITY_REWRITE=1`.
    """
    if os.environ.get("RL_SPARSITY_REWRITE") != "1":
        from plain_graphs import use_plain_graphs

        use_plain_graphs()


@pytest.fixture(scope="module", autouse=True)
def _quick_collections():
    """What is alive before a file of tests, TensorFlow above all, is not looked through again.

    Traces make many objects that stay a while: Python's own thresholds would have it look for
    garbage every few milliseconds.
    """
    import tf_keras

    tf_keras.backend.clear_session()
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(autouse=True)
def _no_terminal(monkeypatch):
    """Tables are as wide as they want to be, whatever terminal the tests are run in."""
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture(autouse=True)
def _fresh_names():
    """Layer names count up per process; start every test at the same names.

    The session is cleared once per file: with it goes what TensorFlow has prepared to run each
    operation, which takes a fifth of the time of tests to do again.
    """
    import tf_keras

    tf_keras.backend.reset_uids()


# What the tests of wrong calls share; imported late, because other tests have no use for it.


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    """A folder of files to call the package with."""
    from wrong_calls import make_files

    return make_files(tmp_path_factory.mktemp("shared"))


@pytest.fixture
def files(shared, tmp_path):
    """The folder and a place to write to; both must be untouched in the end."""
    from wrong_calls import Files, untouched

    with untouched(Files(shared, tmp_path)) as found:
        yield found
