"""The least that the exporter takes for a plan: a path, a shape and bits per kernel."""

import dataclasses

from rl_sparsity_tf.export.matching import kernel_variables


@dataclasses.dataclass
class FakeKernelPlan:
    path: str
    shape: tuple[int, ...]
    exported_bits: int


@dataclasses.dataclass
class FakePlan:
    kernels: dict[str, FakeKernelPlan]


def plan_for(model, bits=8, **exceptions) -> FakePlan:
    return FakePlan(
        {
            path: FakeKernelPlan(path, tuple(variable.shape), exceptions.get(path, bits))
            for path, variable in kernel_variables(model).items()
        }
    )
