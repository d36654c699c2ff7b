from rl_sparsity_tf import baselines as baselines
from rl_sparsity_tf import callbacks as callbacks
from rl_sparsity_tf.agents.configs import DQN as DQN
from rl_sparsity_tf.agents.configs import PPO as PPO
from rl_sparsity_tf.agents.configs import Random as Random
from rl_sparsity_tf.allocation.heuristics import wrap as wrap
from rl_sparsity_tf.allocation.target import Target as Target
from rl_sparsity_tf.channels.costs import count_macs as count_macs
from rl_sparsity_tf.channels.groups import describe_groups as describe_groups
from rl_sparsity_tf.channels.groups import find_groups as find_groups
from rl_sparsity_tf.channels.latency_measurement import measure_latency as measure_latency
from rl_sparsity_tf.channels.latency_table import LatencyTable as LatencyTable
from rl_sparsity_tf.channels.permutation import permutation_report as permutation_report
from rl_sparsity_tf.channels.permutation import permute_channels as permute_channels
from rl_sparsity_tf.channels.shrinking import shrink as shrink
from rl_sparsity_tf.channels.units import mask_channels as mask_channels
from rl_sparsity_tf.channels.units import tie_channels as tie_channels
from rl_sparsity_tf.channels.widths import widths_of as widths_of
from rl_sparsity_tf.data import datasets as datasets
from rl_sparsity_tf.environment.curriculum import Constant as Constant
from rl_sparsity_tf.environment.curriculum import Linear as Linear
from rl_sparsity_tf.environment.curriculum import Staged as Staged
from rl_sparsity_tf.environment.features import (
    describe_selection_state as describe_selection_state,
)
from rl_sparsity_tf.environment.features import describe_state as describe_state
from rl_sparsity_tf.environment.improvement_environment import (
    ImprovementEnvironment as ImprovementEnvironment,
)
from rl_sparsity_tf.environment.improvement_environment import (
    describe_improvement_state as describe_improvement_state,
)
from rl_sparsity_tf.environment.layer_environment import LayerEnvironment as LayerEnvironment
from rl_sparsity_tf.environment.reward import Outcome as Outcome
from rl_sparsity_tf.environment.reward import Reward as Reward
from rl_sparsity_tf.environment.selection_environment import (
    LayerSelectionEnvironment as LayerSelectionEnvironment,
)
from rl_sparsity_tf.environment.sensitivity import Sensitivity as Sensitivity
from rl_sparsity_tf.environment.sensitivity import sensitivity as sensitivity
from rl_sparsity_tf.errors import ArgumentError as ArgumentError
from rl_sparsity_tf.errors import DataError as DataError
from rl_sparsity_tf.errors import ExportError as ExportError
from rl_sparsity_tf.errors import FileError as FileError
from rl_sparsity_tf.errors import ModelError as ModelError
from rl_sparsity_tf.errors import NotMeasuredError as NotMeasuredError
from rl_sparsity_tf.errors import PlanError as PlanError
from rl_sparsity_tf.errors import RLSparsityError as RLSparsityError
from rl_sparsity_tf.errors import SearchInterrupted as SearchInterrupted
from rl_sparsity_tf.errors import TargetError as TargetError
from rl_sparsity_tf.errors import VerificationError as VerificationError
from rl_sparsity_tf.export.export import export_tflite as export_tflite
from rl_sparsity_tf.export.export import predict_tflite as predict_tflite
from rl_sparsity_tf.export.micro import MicroReport as MicroReport
from rl_sparsity_tf.export.micro import export_micro as export_micro
from rl_sparsity_tf.export.report import ExportReport as ExportReport
from rl_sparsity_tf.export.size_model import SizeModel as SizeModel
from rl_sparsity_tf.layers.loading import load_model as load_model
from rl_sparsity_tf.layers.operations import Operation as Operation
from rl_sparsity_tf.layers.plan import CompressionPlan as CompressionPlan
from rl_sparsity_tf.layers.plan import KernelPlan as KernelPlan
from rl_sparsity_tf.layers.registry import register_layer as register_layer
from rl_sparsity_tf.layers.rules import resolve as resolve
from rl_sparsity_tf.layers.support import describe_support as describe_support
from rl_sparsity_tf.layers.wrapper import CompressionWrapper as CompressionWrapper
from rl_sparsity_tf.layers.wrapping import plan_of as plan_of
from rl_sparsity_tf.layers.wrapping import strip as strip
from rl_sparsity_tf.report import plots as plots
from rl_sparsity_tf.search.comparison import compare as compare
from rl_sparsity_tf.search.comparison import comparison_table as comparison_table
from rl_sparsity_tf.search.compressor import Compressor as Compressor
from rl_sparsity_tf.search.result import Result as Result
from rl_sparsity_tf.tflite.inspection import inspect_tflite as inspect_tflite
from rl_sparsity_tf.tflite.timing import benchmark_tflite as benchmark_tflite
from rl_sparsity_tf.training.mask_training import MaskTraining as MaskTraining
from rl_sparsity_tf.training.recovery import Recovery as Recovery
from rl_sparsity_tf.version import __version__ as __version__
