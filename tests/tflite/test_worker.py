"""The conversion process: started, reused, restarted, ended."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from rl_sparsity_tf.errors import ExportError
from rl_sparsity_tf.tflite.worker import ConversionWorker, WorkerError


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


def folder_of(worker):
    """The child's folder, with something in it that the child would leave when it dies."""
    folder = worker._folder
    (folder / "__autograph_generated_file0.py").write_text("")
    return folder


def test_a_child_has_temporary_files_of_its_own_which_go_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with ConversionWorker() as worker:
        ask(worker)
        first = folder_of(worker)
        environment = Path(f"/proc/{worker.pid}/environ").read_bytes().decode().split("\0")
        assert {f"{name}={first}" for name in ("TMPDIR", "TEMP", "TMP")} <= set(environment)
        end(worker)
        assert first.exists()  # nobody has seen it die yet
        ask(worker)
        assert not first.exists()
        second = folder_of(worker)
        assert os.listdir(tmp_path) == [second.name]
    assert not os.listdir(tmp_path)


PARENT = """
import os, signal, sys
from rl_sparsity_tf.tflite.worker import ConversionWorker, WorkerError
worker = ConversionWorker()
try:
    worker.request("nothing")
except WorkerError:
    print(worker.pid, worker._folder, flush=True)
sys.stdin.readline()
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="waits for a process of another's")
def test_a_child_whose_parent_was_killed_removes_its_files_itself(tmp_path):
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert parent.stdout is not None
    pid, folder = parent.stdout.readline().split()
    assert os.listdir(tmp_path) == [Path(folder).name]
    child = os.pidfd_open(int(pid))
    parent.communicate("die\n")
    assert parent.returncode == -signal.SIGKILL
    assert select.select([child], [], [], 60)[0]
    os.close(child)
    assert not os.listdir(tmp_path)


def test_a_forked_process_leaves_its_parents_child_and_files_alone():
    with ConversionWorker() as worker:
        ask(worker)
        folder = folder_of(worker)
        if (pid := os.fork()) == 0:
            worker.close()
            os._exit(0)
        os.waitpid(pid, 0)
        assert folder.exists()
        ask(worker)
