"""Moves from one whole plan to another: each changes what it says, and the target is met."""

import numpy as np
import pytest
from tiny_search import wide, wide_network

import rl_sparsity_tf as rls
from rl_sparsity_tf.allocation.budgets import KernelState
from rl_sparsity_tf.allocation.density_plans import PlanSpace
from rl_sparsity_tf.environment.moves import BETAS, Move, Neighbours
from rl_sparsity_tf.environment.network import evaluate_plan
from rl_sparsity_tf.environment.reward import Reward
from rl_sparsity_tf.layers.operations import Operation
from rl_sparsity_tf.search.plan_search import climb

TARGETS = {
    "element": (rls.Target(sparsity=0.8), "element"),
    "block4": (rls.Target(sparsity=0.6), "block4"),
    "bytes": (rls.Target(tflite_bytes=4500), "element"),
}


def living(plan):
    return {path: entry.operations != Operation.PRUNE for path, entry in plan.kernels.items()}


def cost(network, plan):
    """Bytes; or the share of the weights that live."""
    operations = [plan.kernels[kernel.path].operations for kernel in network.kernels]
    sizes = [network.groupings[kernel.path].sizes for kernel in network.kernels]
    if network.target.in_bytes:
        states = [
            KernelState.of(size, np.ones(size.shape, bool), one)
            for size, one in zip(sizes, operations, strict=True)
        ]
        return network.budget.expected(states)
    return sum(
        size[one != Operation.PRUNE].sum() for size, one in zip(sizes, operations, strict=True)
    ) / sum(size.sum() for size in sizes)


@pytest.mark.slow
@pytest.mark.parametrize("case", TARGETS)
def test_every_move_changes_what_it_says_and_meets_the_target(case):
    target, group = TARGETS[case]
    network = wide_network(target, group)
    start = PlanSpace(network, quantize=target.in_bytes).plan(np.array([1.0, 3.0]))
    evaluate_plan(network, start)
    allowed = network.budget.limit if target.in_bytes else 1.0 - target.sparsity
    assert cost(network, start) <= allowed
    near = Neighbours(network, quantize=target.in_bytes)
    before = living(start)
    kinds = set()
    for kernel in before:
        for move in near.moves(kernel):
            kinds.add((move.kind, move.beta))
            found = living(plan := near.plan(move))
            if move.kind == "rank":
                assert found[kernel].sum() == before[kernel].sum()
                for other in set(before) - {kernel}:
                    np.testing.assert_array_equal(found[other], before[other])
            else:
                change = found[kernel].mean() / before[kernel].mean()
                others = [found[one].mean() / before[one].mean() for one in before if one != kernel]
                # The others pay for it, or gain from it; of a few large groups none may move.
                sign = 1 if move.kind == "denser" else -1
                assert sign * (change - 1.0) >= (0.01 if case == "element" else 0.0)
                assert all(sign * (one - 1.0) <= 0.0 for one in others)
                # Within every kernel either all that lived stays, or nothing is added.
                for path, alive in found.items():
                    assert not (alive & ~before[path]).any() or not (before[path] & ~alive).any()
            assert cost(network, plan) <= allowed
    assert kinds == {*(("rank", beta) for beta in BETAS), ("denser", 0.5), ("sparser", 0.5)}


def test_what_can_change_nothing_is_no_move():
    network = wide_network(rls.Target(sparsity=0.3))
    plan = rls.baselines.uniform(wide(), sparsity=0.3)
    kernels = list(plan.kernels)
    network.reset()
    for path, entry in plan.kernels.items():
        chosen = np.full_like(entry.operations, Operation.PRUNE)
        if path == kernels[0]:
            chosen[:] = Operation.KEEP
        else:
            chosen.flat[0] = Operation.KEEP
        network.assign(path, chosen)
    network.finish()
    near = Neighbours(network, quantize=False)
    assert [move.kind for move in near.moves(kernels[0])] == ["sparser"]
    kinds = {move.kind for path in kernels[1:] for move in near.moves(path)}
    assert kinds == {"rank", "denser"}


@pytest.mark.slow
def test_hill_climbing_ranks_all_first_and_then_takes_moves_of_every_kind(monkeypatch):
    """From the best plan so far, each plan once, the same for a seed."""
    network = wide_network(rls.Target(sparsity=0.9))
    taken, plans = [], []
    plan = Neighbours.plan

    def watched(self, move):
        taken.append(move)
        plans.append((living(network.plan), plan(self, move)))
        return plans[-1][1]

    monkeypatch.setattr(Neighbours, "plan", watched)
    found = climb(network, Reward(), 32, seed=1)
    first = list(taken)
    releases = next(number for number, move in enumerate(first) if move.kind != "release")
    assert releases <= 2
    opening = releases + 4
    assert first[releases:opening] == [Move("rank", None, beta) for beta in (0.0, 0.0, 0.5, 1.0)]
    assert {"rank", "denser", "sparser"} <= {move.kind for move in first[opening:]}
    assert len({move.factor for move in first[opening:] if move.kind == "denser"}) > 1
    assert {move.kernel for move in first[opening:]} == {None, *found.plan.kernels}
    assert found.history == sorted(found.history)
    assert found.evaluations == 32
    assert found.value > found.history[0]
    assert evaluate_plan(network, found.plan) == found.outcome
    taken.clear()
    again = climb(network, Reward(), 32, seed=1)
    assert (taken, again.plan, again.history) == (first, found.plan, found.history)
