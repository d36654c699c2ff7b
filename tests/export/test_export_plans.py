"""Where `export_tflite` takes the plan from."""

import numpy as np
from zoo import ZOO

import rl_sparsity_tf as rls
from rl_sparsity_tf.layers.plan import KernelRule
from rl_sparsity_tf.tflite.reading import read_tensors

PLAN = rls.CompressionPlan(
    [
        KernelRule("dense/kernel", 0.5, quantize=True),
        KernelRule("dense_1/kernel", 0.5),
    ]
)


def int8_sizes(path):
    return sorted(int(np.prod(t.shape)) for t in read_tensors(path) if t.dtype == "int8")


def test_a_wrapped_model_brings_its_own_plan(tmp_path):
    wrapped = rls.wrap(ZOO["dense"](), PLAN)
    report = rls.export_tflite(wrapped, tmp_path / "model.tflite")
    assert int8_sizes(tmp_path / "model.tflite") == [13 * 17]
    assert {t.kernel: t.dtype for t in report.tensors if t.kernel} == {
        "dense/kernel": "int8",
        "dense_1/kernel": "float32",
    }


def test_rules_are_resolved_against_the_model(tmp_path):
    stripped = rls.strip(rls.wrap(ZOO["dense"](), PLAN))
    rls.export_tflite(stripped, tmp_path / "model.tflite", plan=PLAN)
    assert int8_sizes(tmp_path / "model.tflite") == [13 * 17]
