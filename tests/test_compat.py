"""Who may be imported before whom; every case needs an interpreter of its own."""

import subprocess
import sys

import pytest

_GOOD = {
    "tensorflow and tf_keras first": "import tensorflow, tf_keras\nimport rl_sparsity_tf\n",
    "keras first": "import keras\nimport rl_sparsity_tf\n",
}


def _run(script):
    environment = {"PATH": "/usr/bin:/bin", "TF_CPP_MIN_LOG_LEVEL": "3"}
    return subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )


@pytest.mark.slow
@pytest.mark.parametrize("order", _GOOD)
def test_imports_before_this_package_do_no_harm(order):
    script = _GOOD[order] + (
        "import rl_sparsity_tf.environment._tf_agents\n"
        "import tensorflow as tf, tf_keras\n"
        "assert tf.keras.Model is tf_keras.Model\n"
    )
    done = _run(script)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_keras_3_behind_tf_keras_is_refused_with_the_line_that_mends_it():
    done = _run("import tensorflow as tf\ntf.keras.layers\nimport rl_sparsity_tf\n")
    assert done.returncode == 1
    assert "tf.keras already means Keras 3" in done.stderr
    assert 'os.environ["TF_USE_LEGACY_KERAS"] = "1"' in done.stderr
