"""What is the process's, not ours: a search, an export and the rest leave it as it was."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
from pathlib import Path

import absl.logging
import pytest

from rl_sparsity_tf.console import logging_kept, quiet_tensorflow, without_traces

ABSL, ROOT = logging.getLogger("absl"), logging.getLogger()


@contextlib.contextmanager
def unconfigured():
    """Logging as it is in a process that never touched it; pytest has."""
    handlers, level = list(ROOT.handlers), ABSL.level
    ROOT.handlers.clear()
    ABSL.setLevel(logging.NOTSET)
    try:
        yield
        assert ROOT.handlers == []
        assert ABSL.level == logging.NOTSET
    finally:
        ROOT.handlers[:] = handlers
        ABSL.setLevel(level)


@pytest.mark.parametrize("keep", [logging_kept, quiet_tensorflow, without_traces])
def test_libraries_do_not_configure_logging_for_the_caller(capfd, keep):
    with unconfigured(), keep():
        absl.logging.warning("said by a library")
        absl.logging.set_verbosity(absl.logging.WARNING)  # as TensorFlow does when it saves
        logging.getLogger("mine").warning("said by the caller")
    # As Python prints where nothing is configured: once, and as they are.
    assert capfd.readouterr().err.splitlines() == ["said by a library", "said by the caller"]


def test_logging_that_is_configured_goes_on(caplog):
    before = list(ROOT.handlers)
    with logging_kept():
        assert before == ROOT.handlers
        logging.getLogger("mine").warning("said by the caller")
    assert caplog.messages == ["said by the caller"]


def failing():
    with logging_kept():
        raise KeyError


def test_an_error_does_not_leave_the_stand_in():
    with unconfigured(), pytest.raises(KeyError):
        failing()


SCRIPT = r"""
import gc, json, logging, os, random, signal, sys, tempfile, threading, warnings
import absl.logging, numpy as np
import rl_sparsity_tf as rls
import tensorflow as tf, tf_keras as keras

def state():
    umask = os.umask(0)
    os.umask(umask)
    return {
        "root handlers": [repr(one) for one in logging.root.handlers],
        "levels": [logging.getLogger(name).level for name in (None, "absl", "tensorflow", "h5py")],
        "handlers": [repr(logging.getLogger(n).handlers) for n in ("absl", "tensorflow", "h5py")],
        "logging disabled": logging.root.manager.disable,
        "absl verbosity": absl.logging.get_verbosity(),
        "sys.path": list(sys.path),
        "meta path": [repr(one) for one in sys.meta_path],
        "warnings": [repr(one) for one in warnings.filters],
        "hooks": [repr(one) for one in (sys.excepthook, sys.unraisablehook, warnings.showwarning)],
        "streams": [id(sys.stdin), id(sys.stdout), id(sys.stderr)],
        "classes": sorted(keras.utils.get_custom_objects()),
        "signals": [repr(signal.getsignal(one)) for one in sorted(signal.valid_signals())],
        "umask": umask,
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "numpy": [str(np.geterr()), str(np.get_printoptions())],
        "keras": [keras.backend.floatx(), keras.backend.epsilon(),
                  keras.backend.image_data_format(), keras.mixed_precision.global_policy().name],
        "tensorflow": [tf.config.functions_run_eagerly(), tf.config.optimizer.get_jit(),
                       str(tf.config.optimizer.get_experimental_options()),
                       tf.config.get_soft_device_placement(), repr(tf.distribute.get_strategy())],
        "garbage": [gc.isenabled(), gc.get_threshold()],
        "recursion": sys.getrecursionlimit(),
        "random": [repr(random.getstate()), repr(np.random.get_state())],
        "threads": sorted(one.name for one in threading.enumerate()),
        "temporary files": sorted(n for n in os.listdir(tempfile.gettempdir()) if "sparsity" in n),
    }

# A setting of the caller's, which makes tracing quicker.
tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
rng = np.random.default_rng(0)
x, y = rng.normal(size=(64, 6)).astype("float32"), rng.integers(0, 3, 64)
layers = keras.layers
stack = [layers.Dense(8, activation="relu"), layers.Dense(3, activation="softmax")]
model = keras.Sequential([layers.Input((6,)), *stack])
model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
model.fit(x, y, verbose=0)
# Its own classes are registered when they are imported, and rich draws a number; that is all.
own = rls.CompressionWrapper, rls.Compressor
before = state()

def compare(what):
    after = state()
    for key, value in before.items():
        if after[key] != value:
            print(what, key, value, "->", after[key])

from rl_sparsity_tf.tflite.worker import shared_worker

folder = sys.argv[1]
# The first export starts a process of its own, and neither of them says anything.
for stream in (sys.stdout, sys.stderr):
    print("begin", file=stream, flush=True)
rls.export_tflite(model, folder + "/first.tflite", "none")
for stream in (sys.stdout, sys.stderr):
    print("end", file=stream, flush=True)
for agent in ("dqn", "ppo"):
    one = rls.Compressor(model, rls.Target(sparsity=0.5), agent=agent, buckets=2,
                         recovery=rls.Recovery(method="finetune", steps=1))
    result = one.search((x, y), validation_data=(x, y), episodes=1, finalists=1,
                        finetune_epochs=int(agent == "dqn"), verbose=0)
result.save(folder + "/run")
rls.load_model(folder + "/run/model.keras")
result.export_tflite(folder + "/int8.tflite", "int8")
rls.predict_tflite(folder + "/int8.tflite", x)
rls.inspect_tflite(folder + "/int8.tflite")
rls.baselines.random_search(model, (x, y), sparsity=0.5, validation_data=(x, y), evaluations=2)
rls.strip(rls.wrap(model, rls.baselines.uniform(model, sparsity=0.5)))
# The conversion process is kept for the next call; it is the only thing that is.
shared_worker().close()
for thread in threading.enumerate():
    if "_forward_lines" in thread.name:
        thread.join(10)
compare("calls:")
import setuptools, tensorflow_probability
print("still there:", setuptools.__name__, tensorflow_probability.distributions.Normal.__name__)
"""


@pytest.mark.slow
def test_a_process_is_left_as_it_was_and_an_export_prints_nothing(tmp_path):
    temporary, output = tmp_path / "temporary", tmp_path / "output"
    temporary.mkdir()
    output.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(output)],
        capture_output=True,
        text=True,
        env={**os.environ, "TMPDIR": str(temporary)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == ["begin", "end", "still there: setuptools Normal"]
    assert done.stderr.split("begin\n")[1].startswith("end\n")
    # TensorFlow's own, which it writes for what it traces, go at the end as well.
    assert not list(Path(temporary).iterdir())
