"""TF-Agents and TFMOT on Keras 2 beside a user's Keras 3; every order needs a fresh interpreter."""

import subprocess
import sys
import types

import pytest

from rl_sparsity_tf import _compat

# What users have imported before they come to this package.
_ORDERS = {
    "nothing": "",
    "tf.keras": "import tensorflow as tf\nfrom tensorflow import keras\nkeras.layers\n",
    "keras": "import keras\n",
    "tf_agents": (
        "import tensorflow as tf\ntf.keras.layers\n"
        "from tf_agents.networks import q_network\n"
        "from tf_agents.environments import py_environment as before\n"
    ),
    "TFMOT": (
        "import os\nimport tensorflow as tf\ntf.keras.layers\n"
        "import tensorflow_model_optimization\ndel os.environ['TF_USE_LEGACY_KERAS']\n"
    ),
}
# Networks, agents and TFMOT's registry of layers are of tf_keras; nothing else has changed.
_WORKS = """
import os, sys
variables, path = dict(os.environ), list(sys.path)
import rl_sparsity_tf
from rl_sparsity_tf.agents import dqn, ppo
from rl_sparsity_tf.allocation.tfmot import load_tfmot
from rl_sparsity_tf.environment._tf_agents import py_environment
import tensorflow as tf, tf_keras
from tf_agents.networks import q_network
from tf_agents.specs import tensor_spec
network = q_network.QNetwork(
    tensor_spec.TensorSpec((3,), tf.float32),
    tensor_spec.BoundedTensorSpec((), tf.int32, 0, 1), fc_layer_params=(4,),
)
network.create_variables()
assert isinstance(network, tf_keras.layers.Layer), type(network).__mro__
assert network(tf.ones((2, 3)))[0].shape == (2, 2)
pruning = load_tfmot()
cells = [tf_keras.layers.GRUCell(2), tf_keras.layers.LSTMCell(2)]
assert pruning.prune_low_magnitude(tf_keras.layers.RNN(cells)).layer.cell.cells == cells
set_by_tensorflow = {"TF2_BEHAVIOR", "ENABLE_RUNTIME_UPTIME_TELEMETRY", "KMP_DUPLICATE_LIB_OK"}
added = set(os.environ) - set(variables) - set_by_tensorflow
assert not {name for name in added if "KERAS" in name}, added
"""
_KERAS_3_STAYS = """
assert tf.keras.__version__.startswith("3."), tf.keras.__version__
import keras
assert tf.keras.layers.Dense is keras.layers.Dense
assert sys.argv[1:] or tf.compat.v2.keras.layers.Dense is keras.layers.Dense
import subprocess
child = "import tensorflow as tf; print(tf.keras.__version__)"
done = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True)
assert done.stdout.startswith("3."), done
"""
_SAME_CLASSES = "assert before.PyEnvironment is py_environment.PyEnvironment\n"
_TF_KERAS_STAYS = """
assert tf.keras.Model is tf_keras.Model
assert not any(type(finder).__module__ == "rl_sparsity_tf._compat" for finder in sys.meta_path)
"""


def _run(script, *arguments, **variables):
    environment = {"PATH": "/usr/bin:/bin", "TF_CPP_MIN_LOG_LEVEL": "3", **variables}
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("order", _ORDERS)
def test_agents_and_tfmot_work_beside_keras_3_in_every_order_of_imports(order):
    last = _SAME_CLASSES if order == "tf_agents" else ""
    # TFMOT itself makes tf.compat.v2.keras tf_keras where a user imports it.
    arguments = ["without compat"] if order == "TFMOT" else []
    done = _run(_ORDERS[order] + _WORKS + _KERAS_3_STAYS + last, *arguments)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("order", ["nothing", "tf.keras"])
def test_who_sets_the_variable_has_tf_keras_as_before(order):
    done = _run(_ORDERS[order] + _WORKS + _TF_KERAS_STAYS, TF_USE_LEGACY_KERAS="1")
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture
def without_tf_keras(monkeypatch):
    monkeypatch.delenv(_compat.VARIABLE, raising=False)


def test_versions_that_nobody_looked_through_are_refused(monkeypatch, without_tf_keras):
    monkeypatch.setattr(_compat.importlib.metadata, "version", lambda name: "0.20.1")
    with (
        pytest.raises(_compat.KerasVersionError) as error,
        _compat.seeing_tf_keras(_compat.AGENTS),
    ):
        raise AssertionError("not reached")
    message = str(error.value)
    assert "tf-agents 0.20.1 is installed" in message
    assert 'pip install "tf-agents==0.19.*"' in message
    assert 'os.environ["TF_USE_LEGACY_KERAS"] = "1"' in message


def test_users_load_versions_that_nobody_looked_through_as_they_are(monkeypatch, without_tf_keras):
    finder = _compat._Finder()
    found = finder.find_spec("tf_agents", None)
    assert type(found.loader) is _compat._Loader
    monkeypatch.setattr(_compat.importlib.metadata, "version", lambda name: "0.20.1")
    assert finder.find_spec("tf_agents", None) is None


def test_no_other_imports_are_touched(monkeypatch, without_tf_keras):
    finder = _compat._Finder()
    assert finder.find_spec("tf_keras", None) is None
    assert finder.find_spec("tensorflow_model_optimization", None) is None  # the user's own import
    monkeypatch.setenv(_compat.VARIABLE, "1")
    monkeypatch.setitem(sys.modules, "tensorflow", types.ModuleType("tensorflow"))
    assert finder.find_spec("tf_agents", None) is None


@pytest.mark.parametrize("early", [True, False])
def test_the_variable_counts_only_where_it_was_set_in_time(monkeypatch, early):
    tensorflow, keras = types.ModuleType("tensorflow"), types.ModuleType("keras")
    keras.__version__ = "2.21.0" if early else "3.13.2"
    tensorflow.keras = keras
    monkeypatch.setitem(sys.modules, "tensorflow", tensorflow)
    monkeypatch.setenv(_compat.VARIABLE, "1")
    assert _compat.wants_tf_keras() is early


def test_preparing_twice_adds_one_finder(monkeypatch, without_tf_keras):
    monkeypatch.setattr(sys, "meta_path", [])
    _compat.prepare()
    _compat.prepare()
    assert sys.meta_path == [_compat._FINDER]
