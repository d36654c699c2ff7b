"""The plans that are fine-tuned at the end: the best of every proposer."""

import dataclasses

import numpy as np
import pytest
from tiny_search import SPARSITY, TRAIN, VALIDATION, trained

import rl_sparsity_tf as rls
from rl_sparsity_tf.data.batches import evaluation_data, training_data
from rl_sparsity_tf.environment.candidates import Candidate, Finalists
from rl_sparsity_tf.environment.network import CompressedNetwork, evaluate_plan
from rl_sparsity_tf.environment.reward import Outcome
from rl_sparsity_tf.layers.operations import Operation
from rl_sparsity_tf.layers.plan import CompressionPlan, KernelPlan


def outcome(loss=1.0):
    return Outcome(
        metric=0.9,
        dense_metric=0.9,
        loss=loss,
        retention=1.0,
        sparsity=0.5,
        target_sparsity=0.5,
        stored_bits=0.25,
        reconstruction_error=0.0,
    )


def candidate(value, proposed_by, pruned=0, loss=None):
    loss = 1.0 + pruned / 100 if loss is None else loss
    operations = np.full((6, 1), Operation.KEEP, np.uint8)
    operations[:pruned] = Operation.PRUNE
    plan = CompressionPlan([KernelPlan("dense/kernel", (6, 1), "io", "element", 8, operations)])
    return Candidate(plan, {}, outcome(loss), value, 0, proposed_by)


def offered(finalists, *candidates):
    for one in candidates:
        if finalists.wants(one.value, one.outcome, one.proposed_by):
            finalists.add(one)
    return [(one.proposed_by, one.value) for one in finalists]


def test_every_proposer_has_one_place_and_the_best_is_first():
    finalists = Finalists(3)
    found = offered(
        finalists,
        candidate(0.5, "lamp", 1),
        candidate(0.7, "dqn", 2),
        candidate(0.6, "dqn", 3),
        candidate(0.9, "dqn", 4),
        candidate(0.6, "erk", 5),
    )
    assert found == [("dqn", 0.9), ("erk", 0.6), ("lamp", 0.5)]
    assert finalists.best.value == 0.9
    assert len(finalists) == 3


def test_where_there_is_no_room_the_worst_goes():
    found = offered(
        Finalists(2),
        candidate(0.5, "lamp", 1),
        candidate(0.7, "erk", 2),
        candidate(0.6, "uniform", 3),
        candidate(0.4, "dqn", 4),
    )
    assert found == [("erk", 0.7), ("uniform", 0.6)]


def test_at_equal_values_the_lower_loss_is_better():
    finalists = Finalists(1)
    found = offered(
        finalists,
        candidate(0.5, "lamp", 1, loss=1.0),
        candidate(0.5, "erk", 2, loss=0.9),
        candidate(0.5, "uniform", 3, loss=0.95),
    )
    assert found == [("erk", 0.5)]


@pytest.mark.parametrize("room", [1, 2, 3])
def test_the_same_plan_takes_one_place_whoever_proposes_it(room):
    found = offered(Finalists(room), candidate(0.5, "lamp", 2), candidate(0.5, "dqn", 2, loss=0.5))
    assert len(found) == 1


def test_plans_that_lead_to_the_same_network_take_one_place():
    """A last kernel of integers or floats can be all that two plans differ in."""
    better, worse = candidate(0.5, "dqn", 2, loss=0.7), candidate(0.4, "lamp", 3, loss=0.7)
    for order in ((better, worse), (worse, better)):
        assert offered(Finalists(3), *order) == [("dqn", 0.5)]
    apart = offered(Finalists(3), better, candidate(0.4, "lamp", 3, loss=0.7001))
    assert apart == [("dqn", 0.5), ("lamp", 0.4)]


def test_nothing_is_the_best_of_nothing():
    assert Finalists(3).best is None


def test_those_to_begin_with_are_kept():
    finalists = Finalists(2, [candidate(0.2, "a", 1), candidate(0.3, "b", 2)])
    assert [one.proposed_by for one in finalists] == ["b", "a"]


# ---------------------------------------------------------------------------- saved and read


@pytest.fixture(scope="module")
def saved():
    """A network, and the arrays of a candidate of its own."""
    model = trained()
    network = CompressedNetwork(
        model,
        training_data(TRAIN, model, batch_size=32),
        evaluation_data(VALIDATION, model, "validation_data"),
        target=rls.Target(sparsity=SPARSITY),
    )
    evaluate_plan(network, rls.baselines.lamp(model, sparsity=SPARSITY))
    return network, Candidate.of(network, 0.5, 2, "dqn").to_arrays()


def test_a_candidate_is_read_as_it_was_saved(saved):
    network, arrays = saved
    found = Candidate.from_arrays(arrays, network)
    again = found.to_arrays()
    assert set(again) == set(arrays)
    assert all(again[name].tobytes() == array.tobytes() for name, array in arrays.items())
    assert (found.value, found.episode, found.proposed_by) == (0.5, 2, "dqn")
    assert dataclasses.asdict(found.outcome) == dataclasses.asdict(network.outcome)


WRONG = {
    "the value": (lambda a: a | {"value": np.array(1.5)}, r"the value 1\.5, which is not in \[-1"),
    "a layer less": (
        lambda a: a | {"layers": a["layers"][:-1]},
        "the weights of 1 layers, not of 2",
    ),
    "a shape": (
        lambda a: a | {"weights:0:first": a["weights:0:first"][:, :-1]},
        "other weights for 'first' than the model",
    ),
    "no number": (
        lambda a: a | {"weights:0:last": np.full_like(a["weights:0:last"], np.nan)},
        "weights for 'last' that are not finite",
    ),
    "infinite": (
        lambda a: a | {"weights:1:last": np.full_like(a["weights:1:last"], np.inf)},
        "weights for 'last' that are not finite",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_no_candidate_of_the_network_is_refused(saved, what):
    network, arrays = saved
    change, message = WRONG[what]
    with pytest.raises(ValueError, match=message):
        Candidate.from_arrays(change(dict(arrays)), network)
