"""The manifest of a run directory: whose run it is, and in what another call differs from it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tensorflow as tf

FORMAT_VERSION = 2
UNSEALED = 1
"""The format before lines and checkpoints had checksums; its runs are continued in it."""
_NEWER = frozenset(
    "batch_size latency_table rows architecture compiled reward_code frozen_layers".split()
)
"""What runs of that format do not say."""
_ID = re.compile(r"[0-9a-f]{32}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_LARGEST_MANIFEST = 2**26
_MOST_SHOWN = 8
_PACKAGES = (
    "rl_sparsity_tf",
    "tensorflow",
    "tf-keras",
    "tf-agents",
    "tensorflow-probability",
    "numpy",
    "ai-edge-litert",
    "litert-quantizer",
)
# What TensorFlow and NumPy take the numbers of threads from, where nothing else says.
_VARIABLES = (
    "OMP_NUM_THREADS",
    "TF_NUM_INTEROP_THREADS",
    "TF_NUM_INTRAOP_THREADS",
    "TF_ENABLE_ONEDNN_OPTS",
)


def versions() -> dict[str, str]:
    """Versions and thread counts that a bit-identical repetition depends on."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    found["cpus"] = str(os.cpu_count())
    found["inter_op_threads"] = str(tf.config.threading.get_inter_op_parallelism_threads())
    found["intra_op_threads"] = str(tf.config.threading.get_intra_op_parallelism_threads())
    found |= {name: os.environ.get(name, "") for name in _VARIABLES}
    found["gpus"] = str(len(tf.config.list_physical_devices("GPU")))
    return found


def read_manifest(path: Path) -> dict[str, Any]:
    """Reads a manifest.

    Raises:
        ValueError: If it is none; also RecursionError where it is nested too deeply.
        OSError: If it cannot be read.
    """
    with open(path, "rb") as file:
        content = file.read(_LARGEST_MANIFEST + 1)
    if len(content) > _LARGEST_MANIFEST:
        raise ValueError(f"it has more than {_LARGEST_MANIFEST:,} bytes")
    found = json.loads(content.decode("utf-8"))
    if not isinstance(found, dict) or "format_version" not in found:
        raise ValueError("it is no object with a format_version")
    if found["format_version"] in (FORMAT_VERSION, UNSEALED):
        for name in ("arguments", "fingerprints", "versions"):
            if not isinstance(found.get(name), dict):
                raise ValueError(f"it has no {name}")
    return found


def id_of(manifest: Mapping[str, Any], is_sealed: bool) -> str:
    """What the run's lines and checkpoints are sealed with; nothing in a run of format 1.

    Raises:
        ValueError: If it is no id, or there should be none.
    """
    found = manifest.get("id", "")
    if not is_sealed and not found:
        return ""
    if not is_sealed or not isinstance(found, str) or not _ID.fullmatch(found):
        raise ValueError(f"its id is {short(found)}")
    return found


def differences_of(
    found: Mapping[str, Any], wanted: Mapping[str, Any], is_sealed: bool
) -> list[str]:
    """In what a call differs from the run of a manifest.

    Args:
        found: The manifest.
        wanted: `arguments` and `fingerprints` of the call, as JSON gives them back.
        is_sealed: Whether the run says everything that this version does.

    Returns:
        Names and, where they can be read, the values before and now. Of descriptions the places
        that differ are named, `"architecture.layers 2.config.activation"`.
    """
    names: list[str] = []
    for part in ("arguments", "fingerprints"):
        mine, theirs = wanted[part], found[part]
        for key in sorted(set(mine) | set(theirs)):
            old, new = theirs.get(key), mine.get(key)
            if not is_sealed and key not in theirs and (key in _NEWER or not new):
                continue
            if part == "arguments":
                names += [] if _same(old, new) else [f"{key} ({short(old)}, now {short(new)})"]
            else:
                names += _changes(key, old, new)
    shown = names[:_MOST_SHOWN]
    return shown + ([f"{len(names) - len(shown)} more"] if len(names) > len(shown) else [])


def _changes(name: str, old: Any, new: Any) -> list[str]:
    """Where two descriptions differ; of digests only that they do."""
    if _same(old, new):
        return []
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(set(old) | set(new))
        return [c for key in keys for c in _changes(f"{name}.{key}", old.get(key), new.get(key))]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True), 1)
        return [c for n, (a, b) in pairs for c in _changes(f"{name} {n}", a, b)]
    digests = all(isinstance(one, str) and _DIGEST.fullmatch(one) for one in (old, new))
    return [name if digests else f"{name} ({short(old)}, now {short(new)})"]


def _same(old: Any, new: Any) -> bool:
    return bool(old == new) or json.dumps(old, sort_keys=True) == json.dumps(new, sort_keys=True)


def short(value: Any) -> str:
    """A value from a file, fit to be quoted."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
