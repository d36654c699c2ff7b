"""Compress trained Keras models by reinforcement learning and export verified TFLite files.

Example:
    >>> import rl_sparsity_tf as rls  # before tf.keras is used
    >>> compressor = rls.Compressor(model, target=rls.Target(sparsity=0.9), agent="dqn")
    >>> result = compressor.search((x_train, y_train), validation_data=(x_val, y_val))
    >>> result.export_tflite("model.tflite")

Importing the package is cheap: TensorFlow and its companions are imported when the first name that
needs them is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rl_sparsity_tf._compat import use_tf_keras
from rl_sparsity_tf.version import __version__

use_tf_keras()

# Public name -> module. This table is the whole public surface.
_EXPORTS = {
    "ArgumentError": "errors",
    "CompressionPlan": "plan",
    "CompressionWrapper": "wrapper",
    "Compressor": "search",
    "Constant": "curriculum",
    "DQN": "agents",
    "DataError": "errors",
    "EnvironmentCheckError": "errors",
    "ExportError": "errors",
    "ExportReport": "export",
    "FileError": "errors",
    "KernelPlan": "plan",
    "LatencyTable": "latency_table",
    "LayerEnvironment": "environment",
    "LayerSelectionEnvironment": "selection_environment",
    "Linear": "curriculum",
    "MaskTraining": "mask_training",
    "MicroReport": "micro_report",
    "ModelError": "errors",
    "NotMeasuredError": "errors",
    "Operation": "operations",
    "Outcome": "reward",
    "PPO": "agents",
    "PlanError": "errors",
    "RLSparsityError": "errors",
    "Random": "agents",
    "Recovery": "recovery",
    "Result": "result",
    "Reward": "reward",
    "SearchInterrupted": "errors",
    "SizeModel": "size_model",
    "Staged": "curriculum",
    "Target": "target",
    "TargetError": "errors",
    "VerificationError": "errors",
    "benchmark_tflite": "timing",
    "check_environment": "environment_check",
    "compare": "comparison",
    "comparison_table": "comparison",
    "count_macs": "channel_costs",
    "describe_groups": "channel_groups",
    "describe_selection_state": "selection_state",
    "describe_state": "state",
    "describe_support": "support",
    "export_micro": "microcontroller",
    "export_tflite": "export",
    "find_groups": "channel_groups",
    "inspect_tflite": "inspection",
    "load_model": "model_files",
    "mask_channels": "channel_masks",
    "measure_latency": "latency_measurement",
    "permutation_report": "channel_permutation",
    "permute_channels": "channel_permutation",
    "plan_of": "wrapping",
    "predict_tflite": "export",
    "register_layer": "registry",
    "resolve": "rules",
    "shrink": "shrinking",
    "strip": "wrapping",
    "tie_channels": "channel_plans",
    "widths_of": "layer_widths",
    "wrap": "wrapping",
}

# Modules that are used as namespaces.
_MODULES = ("baselines", "datasets")

if TYPE_CHECKING:
    from rl_sparsity_tf import baselines, datasets
    from rl_sparsity_tf.agents import DQN, PPO, Random
    from rl_sparsity_tf.channel_costs import count_macs
    from rl_sparsity_tf.channel_groups import describe_groups, find_groups
    from rl_sparsity_tf.channel_masks import mask_channels
    from rl_sparsity_tf.channel_permutation import permutation_report, permute_channels
    from rl_sparsity_tf.channel_plans import tie_channels
    from rl_sparsity_tf.comparison import compare, comparison_table
    from rl_sparsity_tf.curriculum import Constant, Linear, Staged
    from rl_sparsity_tf.environment import LayerEnvironment
    from rl_sparsity_tf.environment_check import check_environment
    from rl_sparsity_tf.errors import (
        ArgumentError,
        DataError,
        EnvironmentCheckError,
        ExportError,
        FileError,
        ModelError,
        NotMeasuredError,
        PlanError,
        RLSparsityError,
        SearchInterrupted,
        TargetError,
        VerificationError,
    )
    from rl_sparsity_tf.export import ExportReport, export_tflite, predict_tflite
    from rl_sparsity_tf.inspection import inspect_tflite
    from rl_sparsity_tf.latency_measurement import measure_latency
    from rl_sparsity_tf.latency_table import LatencyTable
    from rl_sparsity_tf.layer_widths import widths_of
    from rl_sparsity_tf.mask_training import MaskTraining
    from rl_sparsity_tf.micro_report import MicroReport
    from rl_sparsity_tf.microcontroller import export_micro
    from rl_sparsity_tf.model_files import load_model
    from rl_sparsity_tf.operations import Operation
    from rl_sparsity_tf.plan import CompressionPlan, KernelPlan
    from rl_sparsity_tf.recovery import Recovery
    from rl_sparsity_tf.registry import register_layer
    from rl_sparsity_tf.result import Result
    from rl_sparsity_tf.reward import Outcome, Reward
    from rl_sparsity_tf.rules import resolve
    from rl_sparsity_tf.search import Compressor
    from rl_sparsity_tf.selection_environment import LayerSelectionEnvironment
    from rl_sparsity_tf.selection_state import describe_selection_state
    from rl_sparsity_tf.shrinking import shrink
    from rl_sparsity_tf.size_model import SizeModel
    from rl_sparsity_tf.state import describe_state
    from rl_sparsity_tf.support import describe_support
    from rl_sparsity_tf.target import Target
    from rl_sparsity_tf.timing import benchmark_tflite
    from rl_sparsity_tf.wrapper import CompressionWrapper
    from rl_sparsity_tf.wrapping import plan_of, strip, wrap

__all__ = [
    "ArgumentError",
    "CompressionPlan",
    "CompressionWrapper",
    "Compressor",
    "Constant",
    "DQN",
    "DataError",
    "EnvironmentCheckError",
    "ExportError",
    "ExportReport",
    "FileError",
    "KernelPlan",
    "LatencyTable",
    "LayerEnvironment",
    "LayerSelectionEnvironment",
    "Linear",
    "MaskTraining",
    "MicroReport",
    "ModelError",
    "NotMeasuredError",
    "Operation",
    "Outcome",
    "PPO",
    "PlanError",
    "RLSparsityError",
    "Random",
    "Recovery",
    "Result",
    "Reward",
    "SearchInterrupted",
    "SizeModel",
    "Staged",
    "Target",
    "TargetError",
    "VerificationError",
    "__version__",
    "baselines",
    "benchmark_tflite",
    "check_environment",
    "compare",
    "comparison_table",
    "count_macs",
    "datasets",
    "describe_groups",
    "describe_selection_state",
    "describe_state",
    "describe_support",
    "export_micro",
    "export_tflite",
    "find_groups",
    "inspect_tflite",
    "load_model",
    "mask_channels",
    "measure_latency",
    "permutation_report",
    "permute_channels",
    "plan_of",
    "predict_tflite",
    "register_layer",
    "resolve",
    "shrink",
    "strip",
    "tie_channels",
    "widths_of",
    "wrap",
]


def __getattr__(name: str) -> Any:
    # A submodule of the same name as a function (wrap) is bound on the package when it is
    # imported; the function must win, so every name is resolved and bound here, once.
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
