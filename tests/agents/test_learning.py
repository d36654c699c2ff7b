"""The agents find the best of all plans of a small network sooner than chance does."""

import importlib.util
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def learning():
    sys.path.insert(0, str(FOLDER))
    try:
        spec = importlib.util.spec_from_file_location("learning", FOLDER / "learning.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(FOLDER))
    return module


@pytest.fixture(scope="module")
def problem(learning):
    """The benchmark's network, the value of every plan, and how many plans were evaluated."""
    network = learning.small_network(0, 0.5, 24)
    values = learning.all_values(network, 3)
    return network, values, network.evaluations


@pytest.mark.slow
@pytest.mark.parametrize("agent", ["dqn", "ppo"])
def test_an_agent_finds_the_best_plan_within_half_of_all_on_average(agent, learning, problem):
    network, values, _ = problem
    counts = [
        learning.evaluations_to(network, learning.AGENTS[agent], 3, seed, max(values))
        for seed in range(2)
    ]
    # Without learning half of the plans are needed on average.
    assert sum(counts) / len(counts) < len(values) / 2, counts


@pytest.mark.slow
def test_every_plan_is_played_once_and_some_are_better(problem):
    _, values, evaluations = problem
    assert evaluations == len(values) > 100
    assert max(values) > sorted(values)[len(values) // 2] > min(values)
