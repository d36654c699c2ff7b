"""Compress trained Keras models by reinforcement learning and export verified TFLite files.

Example:
    >>> import rl_sparsity_tf as rls
    >>> compressor = rls.Compressor(model, target=rls.Target(sparsity=0.9), agent="dqn")
    >>> result = compressor.search((x_train, y_train), validation_data=(x_val, y_val))
    >>> result.export_tflite("model.tflite")

Importing the package is cheap: TensorFlow and its companions are imported when the first name that
needs them is used.
"""

from __future__ import annotations

import importlib
from typing import Any

from rl_sparsity_tf._compat import prepare
from rl_sparsity_tf.version import __version__ as __version__

prepare()

# Public name -> module. This table is the whole public surface; __init__.pyi says the same to type
# checkers.
_EXPORTS = {
    "ArgumentError": "errors",
    "CompressionPlan": "layers.plan",
    "CompressionWrapper": "layers.wrapper",
    "Compressor": "search.compressor",
    "Constant": "environment.curriculum",
    "DQN": "agents.configs",
    "DataError": "errors",
    "ExportError": "errors",
    "ExportReport": "export.report",
    "FileError": "errors",
    "ImprovementEnvironment": "environment.improvement_environment",
    "KernelPlan": "layers.plan",
    "LatencyTable": "channels.latency_table",
    "LayerEnvironment": "environment.layer_environment",
    "LayerSelectionEnvironment": "environment.selection_environment",
    "Linear": "environment.curriculum",
    "MaskTraining": "training.mask_training",
    "MicroReport": "export.micro",
    "ModelError": "errors",
    "NotMeasuredError": "errors",
    "Operation": "layers.operations",
    "Outcome": "environment.reward",
    "PPO": "agents.configs",
    "PlanError": "errors",
    "RLSparsityError": "errors",
    "Random": "agents.configs",
    "Recovery": "training.recovery",
    "Result": "search.result",
    "Reward": "environment.reward",
    "SearchInterrupted": "errors",
    "Sensitivity": "environment.sensitivity",
    "SizeModel": "export.size_model",
    "Staged": "environment.curriculum",
    "Target": "allocation.target",
    "TargetError": "errors",
    "VerificationError": "errors",
    "benchmark_tflite": "tflite.timing",
    "compare": "search.comparison",
    "comparison_table": "search.comparison",
    "count_macs": "channels.costs",
    "describe_groups": "channels.groups",
    "describe_improvement_state": "environment.improvement_environment",
    "describe_selection_state": "environment.features",
    "describe_state": "environment.features",
    "describe_support": "layers.support",
    "export_micro": "export.micro",
    "export_tflite": "export.export",
    "find_groups": "channels.groups",
    "inspect_tflite": "tflite.inspection",
    "load_model": "layers.loading",
    "mask_channels": "channels.units",
    "measure_latency": "channels.latency_measurement",
    "permutation_report": "channels.permutation",
    "permute_channels": "channels.permutation",
    "plan_of": "layers.wrapping",
    "predict_tflite": "export.export",
    "register_layer": "layers.registry",
    "resolve": "layers.rules",
    "sensitivity": "environment.sensitivity",
    "shrink": "channels.shrinking",
    "strip": "layers.wrapping",
    "tie_channels": "channels.units",
    "widths_of": "channels.widths",
    "wrap": "allocation.heuristics",
}

# Modules that are used as namespaces.
_MODULES = {
    "baselines": "baselines",
    "callbacks": "callbacks",
    "datasets": "data.datasets",
    "plots": "report.plots",
}

__all__ = sorted([*_EXPORTS, *_MODULES, "__version__"])


def __getattr__(name: str) -> Any:
    # A submodule of the same name as a public one is bound on the package when it is imported; the
    # public one must win, so every name is resolved and bound here, once.
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{_MODULES[name]}")
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
