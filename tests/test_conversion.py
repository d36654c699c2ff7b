"""The conversion process: started, reused, restarted, ended."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest

from rl_sparsity_tf.conversion import ConversionWorker, WorkerError
from rl_sparsity_tf.errors import ExportError


def ask(worker):
    """A request that needs no TensorFlow, and the child's answer to it."""
    with pytest.raises(WorkerError, match="run failed: ValueError") as caught:
        worker.run("none.tflite", [np.zeros((1, 2))], batch_size=1)
    return caught.value


def end(worker, how=signal.SIGKILL):
    os.kill(worker.pid, how)
    if how == signal.SIGKILL:
        worker._process.wait()


def test_a_worker_that_died_is_started_again():
    with ConversionWorker() as worker:
        assert worker.pid is None
        assert ask(worker).reason == "ValueError"
        first = worker.pid
        ask(worker)
        assert worker.pid == first
        end(worker)
        ask(worker)
        assert worker.pid not in (None, first)
    assert worker.pid is None


def test_a_death_during_a_request_is_an_export_error(monkeypatch):
    with ConversionWorker() as worker:
        ask(worker)
        send = worker._send

        def send_and_die(message):
            end(worker)
            send(message)

        monkeypatch.setattr(worker, "_send", send_and_die)
        with pytest.raises(
            ExportError, match=r"ended unexpectedly \(signal SIGKILL\) during 'run'"
        ):
            worker.request("run")
        monkeypatch.undo()
        ask(worker)


def test_a_silent_child_is_ended(monkeypatch):
    with ConversionWorker(timeout=60) as worker:
        ask(worker)
        hung = worker._process
        worker._timeout = 0.01
        end(worker, signal.SIGSTOP)
        with pytest.raises(WorkerError, match=r"did not finish 'warm' within 0\.01 s") as caught:
            worker.request("warm")
        assert caught.value.reason == "timeout"
        assert hung.returncode == -signal.SIGKILL
        assert worker.pid is None


def test_a_worker_that_cannot_start_says_so(monkeypatch):
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    with pytest.raises(ExportError, match="could not be started with '/nowhere/python'"):
        ConversionWorker().request("warm")
