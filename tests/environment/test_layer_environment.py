"""The environment of one layer, on real tiny networks."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
import tf_keras as keras
from environment_check import bits, check_environment, legal_of, play
from hypothesis import given, settings
from hypothesis import strategies as st
from tf_agents.environments import utils as environment_utils
from tiny_search import quick_search

import rl_sparsity_tf as rls
from rl_sparsity_tf.allocation.budgets import Budget
from rl_sparsity_tf.data.batches import evaluation_data, training_data
from rl_sparsity_tf.environment.features import FEATURES, STATE_SIZE, lower_bounds
from rl_sparsity_tf.environment.network import CompressedNetwork
from rl_sparsity_tf.errors import ArgumentError, TargetError
from rl_sparsity_tf.layers import registry
from rl_sparsity_tf.layers.groups import GROUPS
from rl_sparsity_tf.layers.kernel_spec import KernelSpec

layers = keras.layers
KEEP, PRUNE, QUANTIZE, SHUFFLE = rls.Operation
CONV, DENSE, LOGITS = "conv/kernel", "dense/kernel", "logits/kernel"
BUCKETS = 3


@pytest.fixture(scope="module", autouse=True)
def _quick():
    """The autoencoder's quality is not the subject here."""
    with quick_search():
        yield
    network_of.cache_clear()


def odd_model() -> keras.Model:
    """Kernels of 4 x 3, 48 x 5 and 5 x 3: most sizes divide neither by 2, 4 nor 16."""
    keras.utils.set_random_seed(3)
    model = keras.Sequential(
        [
            layers.Input((5, 5, 1)),
            layers.Conv2D(3, 2, activation="relu", name="conv"),
            layers.Flatten(),
            layers.Dropout(0.5),
            layers.Dense(5, activation="relu", name="dense"),
            layers.Dense(3, name="logits"),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, metrics=["accuracy"])
    return model


def volumes_model() -> keras.Model:
    model = keras.Sequential(
        [
            layers.Input((4, 4, 4, 1)),
            layers.Conv3D(2, 2, activation="relu", name="conv"),
            layers.GlobalAveragePooling3D(),
            layers.Dense(3, activation="softmax", name="dense"),
        ]
    )
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def build(model: keras.Model, group: str, recovery: rls.Recovery, sparsity: float):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(48, *model.input_shape[1:])).astype(np.float32)
    y = rng.integers(0, 3, 48)
    return CompressedNetwork(
        model,
        training_data((x, y), model, batch_size=16),
        evaluation_data((x[:24], y[:24]), model, "validation_data"),
        target=rls.Target(sparsity=sparsity),
        group=group,
        recovery=recovery,
    )


@functools.cache
def network_of(group: str) -> CompressedNetwork:
    return build(odd_model(), group, rls.Recovery(method="none"), 0.5)


@pytest.fixture(scope="module")
def trained() -> CompressedNetwork:
    """A network that recovers by training."""
    return build(
        odd_model(), "element", rls.Recovery(method="finetune", steps=1, learning_rate=1e-2), 0.7
    )


def environments(network: CompressedNetwork, sparsity: float | None = None):
    """One fresh environment per kernel, on a network that is dense again."""
    if sparsity is not None:
        network.target = rls.Target(sparsity=sparsity)
        sizes = [network.groupings[kernel.path].sizes for kernel in network.kernels]
        network.budget = Budget(network.target.sparsity, network.budget.elements, sizes)
    network.reset()
    return [rls.LayerEnvironment(network, k.path, buckets=BUCKETS) for k in network.kernels]


def environment(group: str, kernel: str, sparsity: float = 0.5) -> rls.LayerEnvironment:
    (found,) = [e for e in environments(network_of(group), sparsity) if e.kernel == kernel]
    return found


def fingerprint(network: CompressedNetwork) -> bytes:
    snapshot = network.snapshot()
    arrays = [*snapshot.weights, *snapshot.optimizer, *snapshot.operations.values()]
    arrays += [*snapshot.decided.values(), snapshot.pruned]
    return b"".join(np.asarray(a).tobytes() for a in arrays) + repr(snapshot.outcome).encode()


# -- the contract --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
def test_every_kernel_of_every_group_kind_passes_both_checks(group):
    for env in environments(network_of(group), 0.5):
        environment_utils.validate_py_environment(
            env,
            episodes=1,
            observation_and_action_constraint_splitter=lambda o: (o["state"], o["legal"]),
        )
        report = check_environment(env, episodes=1)
        assert report.longest_episode == env.steps
        assert "determinism" in report.rules
        assert "replay" in report.rules


def test_an_environment_that_trains_passes_our_check(trained):
    report = check_environment(environments(trained)[1], episodes=2)
    assert report.min_reward >= -1.0
    assert report.max_reward <= 1.0
    assert report.min_reward != report.max_reward


def test_observations_are_the_state_and_the_legal_operations():
    env = environment("element", DENSE, sparsity=0.04)  # the kernel behind could give all of it
    time_step = env.reset()
    state = time_step.observation["state"]
    assert state.shape == (STATE_SIZE,)
    assert state.dtype == np.float32
    assert (state >= lower_bounds(FEATURES)).all()
    assert (state <= 1.0).all()
    assert time_step.observation["legal"].tolist() == [1, 1, 1, 1]
    assert time_step.is_first()


def test_an_episode_has_a_step_per_bucket_and_decides_every_group():
    env = environment("element", LOGITS)
    steps = play(env, lambda _: KEEP)
    assert len(steps) - 1 == env.steps == BUCKETS
    assert env.network.decided[LOGITS].all()
    assert not env.network.decided[CONV].any()


def test_a_kernel_of_few_groups_has_one_step_per_group():
    # The convolution has 3 output channels; 8 buckets were asked for.
    network = network_of("channel")
    network.reset()
    assert rls.LayerEnvironment(network, CONV, buckets=8).steps == 3


def test_buckets_come_from_the_least_to_the_most_salient():
    env = environment("element", DENSE)
    saliency = []
    time_step = env.reset()
    while not time_step.is_last():
        before = env.network.decided[DENSE].copy()
        time_step = env.step(np.int32(KEEP))
        new = env.network.decided[DENSE] & ~before
        saliency.append(np.abs(env.network.latent_matrix(DENSE))[new])
    for weaker, stronger in itertools.pairwise(saliency):
        assert weaker.max() <= stronger.min()


# -- the wall ------------------------------------------------------------------------------------

STYLES = {
    "random": [1, 1, 1, 1],
    "rarely prunes": [50, 1, 50, 50],
    "mostly prunes": [1, 50, 1, 1],
    "never prunes": [1, 0, 1, 1],
}


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
@settings(max_examples=16, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    sparsity=st.floats(0.02, 0.95),
    style=st.sampled_from(sorted(STYLES)),
)
def test_any_legal_policy_meets_the_target_at_the_smallest_count(group, seed, sparsity, style):
    network = network_of(group)
    rng = np.random.default_rng(seed)

    def choose(time_step):
        legal = legal_of(time_step)
        weights = np.array(STYLES[style], float)[legal]
        if not weights.sum():
            weights += 1.0
        return rng.choice(legal, p=weights / weights.sum())

    try:
        walk = environments(network, sparsity)
    except TargetError:
        # Channels cannot go as far; the best that can is 1 - (sum of largest groups) / elements.
        largest = sum(int(network.groupings[k.path].sizes.max()) for k in network.kernels)
        assert sparsity > 1.0 - largest / network.budget.elements - 1e-9
        return
    for env in walk:
        env.commit()
        play(env, choose)
    budget = network.budget
    group_size = max(int(network.groupings[k.path].sizes.max()) for k in network.kernels)
    assert budget.wanted <= budget.pruned.sum() < budget.wanted + group_size
    if group == "element":
        assert budget.pruned.sum() == budget.wanted
    zeros = sum(int((network.effective_matrix(k.path) == 0).sum()) for k in network.kernels)
    assert zeros >= budget.wanted
    for kernel, pruned in zip(network.kernels, budget.pruned, strict=True):
        assert pruned < kernel.size, f"{kernel.path} was emptied"
    assert sum(env.illegal_actions for env in walk) == 0


def test_prune_is_the_only_legal_operation_when_the_rest_could_not_meet_the_target():
    first, second, third = environments(network_of("element"), 0.9)
    seen = [play(env, lambda step: legal_of(step)[0]) for env in (first, second, third)]
    legal = [legal_of(step) for step in (*seen[1][:-1], *seen[2][:-1])]
    assert [int(PRUNE)] in legal
    # Keep came first wherever it was legal, so nothing was pruned before it was forced.
    assert network_of("element").budget.missing == 0


def test_prune_is_illegal_once_the_target_is_met():
    network = network_of("element")
    legal, missing = [], []
    for env in environments(network, 0.2):
        env.commit()
        time_step = env.reset()
        while not time_step.is_last():
            legal.append(int(PRUNE) in legal_of(time_step))
            missing.append(network.budget.missing)
            time_step = env.step(np.int32(PRUNE if legal[-1] else KEEP))
    assert 0 in missing[:-BUCKETS]
    for allowed, still_missing in zip(legal[-BUCKETS - 1 :], missing[-BUCKETS - 1 :], strict=True):
        assert allowed == (still_missing > 0)
    assert network.budget.pruned.sum() == network.budget.wanted


def test_shuffle_is_illegal_for_channels_and_legal_for_elements():
    assert int(SHUFFLE) not in legal_of(environment("channel", DENSE, sparsity=0.03).reset())
    assert int(SHUFFLE) in legal_of(environment("element", DENSE, sparsity=0.03).reset())


def test_quantize_is_illegal_for_a_kernel_that_tflite_keeps_float(monkeypatch):
    stays_float = KernelSpec("kernel", "iiiio", exports_int8=False)
    monkeypatch.setitem(registry._REGISTRY, layers.Conv3D, (stays_float,))
    network = build(volumes_model(), "element", rls.Recovery(method="none"), 0.1)
    conv, dense = environments(network)
    assert int(QUANTIZE) not in legal_of(conv.reset())
    conv.step(np.int32(QUANTIZE))
    assert conv.illegal_actions == 1
    assert set(network.operations["conv/kernel"].reshape(-1)) == {int(KEEP)}
    play(conv, lambda _: PRUNE)
    dense.commit()
    assert int(QUANTIZE) in legal_of(dense.reset())


def test_what_the_kernels_behind_cannot_give_goes_from_the_least_salient_buckets_first():
    env = environment("element", DENSE, sparsity=0.5)
    time_step, taken = env.reset(), []
    behind = env.network.budget.room([env.network.index_of(LOGITS)])
    while not time_step.is_last():
        legal = legal_of(time_step)
        assert (legal == [int(PRUNE)]) == (env.network.budget.missing > behind)
        taken.append(legal[-1])
        time_step = env.step(np.int32(legal[-1]))
    kept = env.network.operations[DENSE].reshape(-1) != int(PRUNE)
    saliency = env.network.saliency(DENSE)
    assert saliency[kept].min() >= saliency[~kept].max()


# -- illegal actions -----------------------------------------------------------------------------


def test_an_illegal_action_is_counted_and_executed_as_keep():
    env = environment("channel", DENSE, sparsity=0.03)
    env.reset()
    before = env.network.effective_matrix(DENSE)
    time_step = env.step(np.int32(SHUFFLE))
    assert env.illegal_actions == 1
    assert float(time_step.reward) == 0.0
    np.testing.assert_array_equal(env.network.effective_matrix(DENSE), before)
    assert set(env.network.operations[DENSE].reshape(-1)) == {int(KEEP)}
    env.step(np.int32(KEEP))
    assert env.illegal_actions == 1


def test_where_only_prune_is_legal_every_action_prunes():
    env = environment("element", LOGITS, sparsity=0.9)
    for other in environments(env.network, 0.9)[:-1]:
        other.commit()
        play(other, lambda step: legal_of(step)[0])
    env.commit()
    time_step = env.reset()
    while legal_of(time_step) != [int(PRUNE)]:
        time_step = env.step(np.int32(legal_of(time_step)[0]))
    missing = env.network.budget.missing
    env.step(np.int32(KEEP))
    assert env.illegal_actions == 1
    assert env.network.budget.missing < missing


# -- resetting, committing, replaying ------------------------------------------------------------


def test_reset_undoes_an_episode(trained):
    env = environments(trained)[1]
    first = env.reset()
    before = fingerprint(trained)
    play(env, lambda step: legal_of(step)[-1], first)
    assert fingerprint(trained) != before
    again = env.reset()
    assert fingerprint(trained) == before
    assert bits(again) == bits(first)


def test_stepping_on_after_the_end_begins_a_new_episode():
    env = environment("element", CONV)
    first = env.reset()
    play(env, lambda _: QUANTIZE, first)
    assert bits(env.step(np.int32(PRUNE))) == bits(first)


def test_commit_makes_what_an_earlier_layer_decided_stay(trained):
    first, second, _ = environments(trained)
    play(first, lambda step: PRUNE if PRUNE in legal_of(step) else KEEP)
    after_first = fingerprint(trained)
    assert trained.budget.pruned[0] > 0
    second.commit()
    play(second, lambda step: PRUNE if PRUNE in legal_of(step) else KEEP)
    assert fingerprint(trained) != after_first
    second.reset()
    assert fingerprint(trained) == after_first
    # The first layer's own reset goes all the way back.
    first.reset()
    assert trained.budget.pruned.sum() == 0


def test_a_trajectory_replays_bit_for_bit(trained):
    rng = np.random.default_rng(5)
    actions: list[int] = []

    def choose(step):
        actions.append(int(rng.choice(legal_of(step))))
        return actions[-1]

    def episode(policy):
        trail = []
        for env in environments(trained):
            env.commit()
            trail += [bits(step) for step in play(env, policy)]
        return trail, fingerprint(trained)

    trail, end = episode(choose)
    recorded = iter(actions)
    assert episode(lambda _: next(recorded)) == (trail, end)
    other, _ = episode(lambda step: legal_of(step)[0])
    assert other != trail


def test_get_state_and_set_state_come_back_to_the_middle_of_an_episode(trained):
    _, env, _ = environments(trained)
    env.reset()
    middle = env.step(np.int32(PRUNE))
    state, at_middle = env.get_state(), fingerprint(trained)
    first = [bits(step) for step in play(env, lambda step: legal_of(step)[-1], middle)]
    assert fingerprint(trained) != at_middle
    env.set_state(state)
    assert fingerprint(trained) == at_middle
    assert bits(env.current_time_step()) == bits(middle)
    second = [bits(step) for step in play(env, lambda step: legal_of(step)[-1], middle)]
    assert first == second


def test_a_saved_state_is_not_changed_by_what_happens_after_it(trained):
    env = environments(trained)[0]
    env.reset()
    state = env.get_state()
    before = [value.copy() for value in state.network.weights]
    play(env, lambda _: QUANTIZE)
    for mine, theirs in zip(before, state.network.weights, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert all((value == KEEP).all() for value in state.network.operations.values())


# -- rewards and arguments -----------------------------------------------------------------------


def test_the_reward_is_asked_with_the_outcomes_after_and_before():
    network = network_of("element")
    calls = []

    def reward(outcome, previous):
        calls.append((outcome, previous))
        return 0.25

    environments(network, 0.5)
    env = rls.LayerEnvironment(network, DENSE, reward=reward, buckets=BUCKETS)
    steps = play(env, lambda step: PRUNE if PRUNE in legal_of(step) else KEEP)
    assert [float(step.reward) for step in steps[1:]] == [0.25] * BUCKETS
    assert calls[0][1].sparsity == 0.0
    assert calls[0][0].sparsity > 0.0
    assert calls[1][1] == calls[0][0]


def test_rewards_are_clipped_and_nan_never_passes():
    network = network_of("element")
    environments(network, 0.5)
    values = iter([7.0, float("nan"), float("-inf")])
    env = rls.LayerEnvironment(network, CONV, reward=lambda *_: next(values), buckets=BUCKETS)
    assert [float(step.reward) for step in play(env, lambda _: KEEP)[1:]] == [1.0, 0.0, -1.0]


def test_a_reward_that_is_no_number_is_named():
    network = network_of("element")
    environments(network, 0.5)
    env = rls.LayerEnvironment(network, CONV, reward=lambda *_: "much", buckets=BUCKETS)
    env.reset()
    with pytest.raises(ArgumentError, match=r"returned 'much'\. Expected a number, best in"):
        env.step(np.int32(KEEP))


@pytest.mark.parametrize("buckets", [0, -1, 2.5, True, "8"])
def test_wrong_buckets_are_refused(buckets):
    with pytest.raises(ArgumentError, match=r"buckets=.* Expected an integer above 0"):
        rls.LayerEnvironment(network_of("element"), CONV, buckets=buckets)


def test_an_unknown_kernel_is_refused_with_the_kernels_there_are():
    with pytest.raises(ArgumentError, match=r"no kernel 'cnv/kernel'\. Expected one of .*conv/ker"):
        rls.LayerEnvironment(network_of("element"), "cnv/kernel")


# -- least squares -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fitted() -> CompressedNetwork:
    """A network that recovers in closed form, at the end of an episode."""
    return build(odd_model(), "element", rls.Recovery(method="least_squares"), 0.5)


def pruned_episode(env: rls.LayerEnvironment, operation: int) -> list:
    steps = [env.reset()]
    while not steps[-1].is_last():
        legal = legal_of(steps[-1])
        steps.append(env.step(np.int32(operation if operation in legal else legal[0])))
    return steps


@pytest.mark.slow
def test_only_the_last_step_evaluates_and_the_others_are_estimates(fitted):
    fitted.seen.clear()
    envs = environments(fitted)
    for number, env in enumerate(envs):
        env.evaluate = number == len(envs) - 1
        env.commit()
        seen = []
        step = env.reset()
        while not step.is_last():
            legal = legal_of(step)
            wanted = PRUNE if PRUNE in legal else legal[0]
            step = env.step(np.int32(wanted))
            seen.append((fitted.evaluations, fitted.outcome))
            assert np.isfinite(step.reward)
        if number < len(envs) - 1:
            assert fitted.evaluations == 0
            errors = [fitted.output_errors[k.path] for k in fitted.kernels]
            assert fitted.outcome.output_error == pytest.approx(np.mean(errors))
            assert fitted.outcome.metric == pytest.approx(
                fitted.dense.metric * (1.0 - np.mean(errors))
            )
    assert [count for count, _ in seen[:-1]] == [0] * (len(seen) - 1)
    assert fitted.evaluations == 1
    fitted._recover()
    measured = fitted._evaluator(fitted.validation)
    assert (fitted.outcome.metric, fitted.outcome.loss) == (measured.metric, measured.loss)


def test_more_pruned_is_estimated_worse(fitted):
    fitted.reset()
    path = fitted.kernels[0].path
    count = fitted.groupings[path].count
    before = fitted.outcome
    few = fitted.decide(path, np.arange(count // 4), PRUNE)
    many = fitted.decide(path, np.arange(count // 4, count // 2), PRUNE)
    assert before.output_error == 0 < few.output_error < many.output_error < 1
    assert before.loss < few.loss < many.loss
    fitted.reset()
    assert fitted.outcome == before
    assert set(fitted.output_errors.values()) == {0.0}


def test_an_episode_leaves_no_trace_on_the_network(fitted):
    fitted.reset()
    before = fitted.model.get_weights()
    env = environments(fitted)[0]
    first = [bits(step) for step in pruned_episode(env, PRUNE)]
    assert [bits(step) for step in pruned_episode(env, PRUNE)] == first
    env.reset()
    for one, other in zip(before, fitted.model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_plan_is_evaluated_once(fitted):
    env = environments(fitted)[0]
    pruned_episode(env, PRUNE)
    outcome, calls = fitted.outcome, []
    recover = fitted.least_squares.recover
    fitted.least_squares.recover = lambda *args: calls.append(1) or recover(*args)
    try:
        pruned_episode(env, PRUNE)
        assert fitted.outcome == outcome
        assert not calls
        fitted.latent_weights()  # asked for, they are fitted again
        assert calls == [1]
    finally:
        del fitted.least_squares.recover
