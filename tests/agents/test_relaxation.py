"""The relaxed reward: what its gradient says, and that PPO follows it."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras
import toy_environments as toy
import zoo
from tiny_search import quick_search

import rl_sparsity_tf as rls
from rl_sparsity_tf.agents import relaxation as relaxation_module
from rl_sparsity_tf.agents.configs import DQN, PPO, build_agent
from rl_sparsity_tf.agents.relaxation import Relaxation, gumbel_softmax, relaxed_matrix
from rl_sparsity_tf.data.batches import evaluation_data, training_data
from rl_sparsity_tf.environment.layer_environment import LayerEnvironment
from rl_sparsity_tf.environment.network import CompressedNetwork
from rl_sparsity_tf.errors import AgentStateError, ArgumentError
from rl_sparsity_tf.layers.kernels import find_kernels
from rl_sparsity_tf.layers.operations import stored_as_integers
from rl_sparsity_tf.training.recovery import Recovery

layers = keras.layers
KEEP, PRUNE, QUANTIZE, SHUFFLE = (int(operation) for operation in rls.Operation)
FIRST, LAST = "first/kernel", "last/kernel"
SMALL = PPO(hidden_layers=(8,), num_epochs=2, relaxed_reward=1.0)


@pytest.fixture(scope="module", autouse=True)
def _quick():
    """The autoencoder's error has no part in the relaxed reward."""
    with quick_search():
        yield
    half_dead.cache_clear()


def network_of(model: keras.Model, x: Any, y: Any, **options: Any) -> CompressedNetwork:
    options.setdefault("target", rls.Target(sparsity=0.25))
    return CompressedNetwork(
        model,
        training_data((x, y), model, batch_size=16),
        evaluation_data((x, y), model, "validation_data"),
        recovery=Recovery(method="none"),
        **options,
    )


@functools.cache
def half_dead() -> CompressedNetwork:
    """Kernels of 4 x 8 and 8 x 2, where nothing reads the last four units of the first.

    These 16 of the 48 weights are the target.
    """
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 4)).astype(np.float32)
    y = (x[:, 0] > 0).astype(np.int32)
    model = keras.Sequential(
        [
            layers.Input((4,)),
            layers.Dense(8, activation="tanh", name="first"),
            layers.Dense(2, name="last"),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.05), loss, metrics=["accuracy"])
    first = rng.normal(0, 0.2, (4, 8)).astype(np.float32)
    first[0] = [3, -3, 3, -3, 1, 1, 1, 1]
    last = np.array([[-1, 1], [1, -1]] * 2 + [[0, 0]] * 4, np.float32)
    model.set_weights([first, np.zeros(8, np.float32), last, np.zeros(2, np.float32)])
    return network_of(model, x, y, target=rls.Target(sparsity=16 / 48))


def columns(first: int, last: int) -> np.ndarray:
    """Flat indices of the first kernel's groups that belong to a range of its units."""
    return np.arange(32).reshape(4, 8)[:, first:last].reshape(-1)


USEFUL, USELESS = (FIRST, columns(0, 4)), (FIRST, columns(4, 8))
TWO = [USEFUL, USELESS]


def relaxed(decisions: Any = TWO, **options: Any) -> Relaxation:
    relaxation = Relaxation(half_dead(), **options)
    relaxation.follow(decisions)
    return relaxation


def zeros(decisions: int = 2) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros((decisions, 4), np.float32), np.ones((decisions, 4), np.int32)


KEPT = np.zeros(2, np.int32)


# -- the sample ----------------------------------------------------------------------------------


def test_noise_is_that_of_a_draw_with_the_outcome_given() -> None:
    """Choices drawn first and noise after them are the same as noise drawn first."""
    probabilities, count = np.array([0.1, 0.5, 0.15, 0.25]), 20_000
    rng = np.random.default_rng(0)
    logits = tf.constant(np.tile(np.log(probabilities), (count, 1)), tf.float32)
    noisy = logits.numpy() + rng.gumbel(size=(count, 4))
    chosen = rng.choice(4, count, p=probabilities)
    with tf.GradientTape() as tape:
        tape.watch(logits)
        choices = gumbel_softmax(logits, chosen, rng.uniform(size=(count, 4)).astype(np.float32))
        # The gradient of a squared soft choice would need the soft value: d/dl_1 of choice 1.
        loss = tf.reduce_sum(choices[:, 1])
    assert np.array_equal(choices.numpy(), np.eye(4)[chosen])
    got = tape.gradient(loss, logits).numpy()[:, 1]
    soft = np.exp(noisy) / np.exp(noisy).sum(axis=1, keepdims=True)
    expected = soft[:, 1] * (1 - soft[:, 1])
    assert got.mean() == pytest.approx(expected.mean(), rel=0.03)
    for outcome in range(4):
        given = expected[noisy.argmax(axis=1) == outcome]
        assert got[chosen == outcome].mean() == pytest.approx(given.mean(), rel=0.06)


def test_gradient_of_a_choice_is_finite_where_it_was_all_but_impossible() -> None:
    logits = tf.constant([[-200.0, 0.0, -1e9, 90.0]])
    with tf.GradientTape() as tape:
        tape.watch(logits)
        choices = gumbel_softmax(logits, tf.constant([0]), tf.constant([[0.5, 0.1, 0.9, 1e-30]]))
        loss = tf.reduce_sum(choices * [1.0, 2.0, 3.0, 4.0])
    assert choices.numpy().tolist() == [[1, 0, 0, 0]]
    assert np.isfinite(tape.gradient(loss, logits).numpy()).all()


# -- the kernels ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", [*zoo.ZOO, *zoo.RECURRENT_ETC])
def test_hard_kernels_are_those_of_the_wrapper(name: str) -> None:
    model = {**zoo.ZOO, **zoo.RECURRENT_ETC}[name]()
    groups = ("element", "block4", "block16", "channel")
    group = groups[len(name) % 4]
    rng = np.random.default_rng(1)
    wrapped = rls.wrap(model, group=group)
    # A mixed kernel, and two that are stored as integers because nothing is kept.
    for plan in ([KEEP, PRUNE, QUANTIZE, SHUFFLE], [SHUFFLE, PRUNE, QUANTIZE], [QUANTIZE, PRUNE]):
        for kernel in find_kernels(wrapped):
            grouping, attribute = kernel.grouping(group), kernel.spec.attribute
            operations = np.resize(np.array(plan, np.uint8), grouping.count)
            operations = rng.permutation(operations).reshape(grouping.shape)
            kernel.wrapper.assign_operations(attribute, operations)
            expected = kernel.wrapper.effective_kernel(attribute).numpy()
            matrix = kernel.spec.to_matrix(tf.convert_to_tensor(kernel.variable))
            got = relaxed_matrix(matrix, tf.one_hot(operations, 4), grouping, kernel)
            got = kernel.spec.from_matrix(got, kernel.shape).numpy()
            assert np.array_equal(got, expected), kernel.path
            assert not np.array_equal(expected, kernel.value())


@pytest.mark.slow
def test_gradient_by_a_choice_says_what_its_operation_would_change() -> None:
    relaxation = relaxed()
    kernel = half_dead().kernels[0]
    half_dead().reset()
    upstream = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    choices = tf.one_hot([KEEP, KEEP], 4)
    with tf.GradientTape() as tape:
        tape.watch(choices)
        loss = tf.reduce_sum(relaxation.kernels_for(choices)[FIRST] * upstream)
    gradient = tf.convert_to_tensor(tape.gradient(loss, choices)).numpy()
    weights = kernel.value()
    scale = np.abs(weights).max(axis=0) / 127
    swapped = weights[[1, 0, 3, 2]]
    rounding = np.round(weights / scale) * scale - weights
    for row, units in ((0, slice(0, 4)), (1, slice(4, 8))):
        part = upstream[:, units]
        assert gradient[row, KEEP] == 0
        assert gradient[row, PRUNE] == pytest.approx(-(part * weights[:, units]).sum(), rel=1e-4)
        assert gradient[row, QUANTIZE] == pytest.approx((part * rounding[:, units]).sum(), abs=1e-4)
        # A neighbour in the same bucket asks too, so that the pair's change counts twice.
        change = 2 * (part * (swapped - weights)[:, units]).sum()
        assert gradient[row, SHUFFLE] == pytest.approx(change, rel=1e-4)


def test_groups_named_twice_belong_to_the_last_and_groups_never_named_are_kept() -> None:
    relaxation = relaxed([(FIRST, columns(0, 6)), (FIRST, columns(4, 6))])
    half_dead().reset()
    kernels = relaxation.kernels_for(tf.one_hot([PRUNE, KEEP], 4))
    weights = half_dead().kernels[0].value()
    assert (kernels[FIRST].numpy()[:, :4] == 0).all()
    assert np.array_equal(kernels[FIRST].numpy()[:, 4:], weights[:, 4:])
    assert np.array_equal(kernels[LAST].numpy(), half_dead().kernels[1].value())


# -- the terms -----------------------------------------------------------------------------------


def test_expected_bits_are_those_of_all_plans() -> None:
    rng = np.random.default_rng(3)
    decisions = [USEFUL, USELESS, (LAST, np.arange(8)), (LAST, np.arange(8, 16))]
    relaxation = relaxed(decisions)
    probabilities = rng.dirichlet(np.ones(4), 4)
    expected = 0.0
    for plan in itertools.product(range(4), repeat=4):
        chance = np.prod(probabilities[np.arange(4), plan])
        stored = [stored_as_integers(np.array(plan[i : i + 2])) for i in (0, 2)]
        expected += chance * sum(
            size / 48 * (0.25 if integers else 1.0)
            for size, integers in zip((32, 16), stored, strict=True)
        )
    got = relaxation._expected_bits(tf.constant(probabilities, tf.float32), relaxation._owners)
    assert float(got) == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_the_price_meets_the_sparsity_and_its_gradient_is_exact() -> None:
    rng = np.random.default_rng(4)
    logits, weights = rng.normal(size=(3, 4)), tf.constant([0.2, 0.5, 0.3])
    upstream = rng.normal(size=(3, 4))

    def loss_of(values: Any) -> tf.Tensor:
        met = relaxation_module._at_sparsity(tf.cast(values, tf.float32), weights, 0.6)
        sparsity = tf.reduce_sum(weights * tf.nn.softmax(met)[:, PRUNE])
        assert float(sparsity) == pytest.approx(0.6, abs=1e-4)
        return tf.reduce_sum(met * upstream.astype(np.float32))

    variable = tf.constant(logits, tf.float32)
    with tf.GradientTape() as tape:
        tape.watch(variable)
        loss = loss_of(variable)
    gradient = tape.gradient(loss, variable).numpy()
    for place in np.ndindex(3, 4):
        moved = np.zeros((3, 4))
        moved[place] = 0.02
        slope = (float(loss_of(logits + moved)) - float(loss_of(logits - moved))) / 0.04
        assert gradient[place] == pytest.approx(slope, abs=5e-3)


@pytest.mark.slow
def test_gradient_is_finite_and_none_where_there_is_no_choice() -> None:
    relaxation = relaxed([USEFUL, USELESS, (LAST, np.arange(16))])
    logits, legal = zeros(3)
    legal[0, SHUFFLE] = 0
    legal[2] = [1, 0, 0, 0]
    logits[0, SHUFFLE] = np.finfo(np.float32).min  # as TF-Agents masks them
    loss, gradient = relaxation(logits, legal, np.array([PRUNE, KEEP, KEEP]), 0)
    assert np.isfinite(loss)
    assert np.isfinite(gradient).all()
    assert (gradient[:2, [KEEP, PRUNE]] != 0).all()
    np.testing.assert_allclose(gradient[2], 0, atol=1e-20)
    assert gradient[0, SHUFFLE] == 0


@pytest.mark.slow
def test_a_forced_decision_tells_what_pruning_elsewhere_would_buy() -> None:
    relaxation = relaxed(reward=rls.Reward(size=0.0))
    logits, legal = zeros()
    legal[0] = [0, 1, 0, 0]
    gradients = [relaxation(logits, legal, np.array([PRUNE, KEEP]), step)[1] for step in range(8)]
    gradient = np.mean(gradients, axis=0)
    assert gradient[0, PRUNE] > 0 > gradient[0, KEEP]
    assert gradient[1, PRUNE] < 0 < gradient[1, KEEP]
    assert (gradient[0, [QUANTIZE, SHUFFLE]] == 0).all()


def test_dense_and_empty_networks_are_the_ends_of_the_scale() -> None:
    decisions = [USEFUL, USELESS, (LAST, np.arange(16))]
    relaxation = relaxed(decisions, reward=rls.Reward(sparsity=0.0, size=0.0), integrated=False)
    logits, legal = zeros(3)

    def mean_loss(operation: int) -> float:
        actions = np.full(3, operation)
        return float(np.mean([relaxation(logits, legal, actions, step)[0] for step in range(4)]))

    assert mean_loss(KEEP) == pytest.approx(0.0, abs=1e-4)
    assert mean_loss(PRUNE) == pytest.approx(1.0, abs=1e-4)


@pytest.mark.slow
def test_descending_prunes_what_nothing_depends_on() -> None:
    relaxation = relaxed(reward=rls.Reward(size=0.0))
    values, legal = zeros()
    logits, rng = tf.Variable(values), np.random.default_rng(0)
    optimizer = keras.optimizers.Adam(0.2)
    for step in range(30):
        probabilities = tf.nn.softmax(logits).numpy().astype(np.float64)
        actions = np.array([rng.choice(4, p=row / row.sum()) for row in probabilities])
        _, gradient = relaxation(logits.numpy(), legal, actions, step)
        optimizer.apply_gradients([(tf.constant(gradient), logits)])
    useful, useless = tf.nn.softmax(logits).numpy()[:, PRUNE]
    assert useless > 0.9
    assert useful < 0.25


def test_the_loss_is_that_of_the_network_as_the_episode_left_it() -> None:
    network = half_dead()
    network.reset()
    decisions = [USEFUL, USELESS, (LAST, np.arange(16))]
    actions = np.array([PRUNE, SHUFFLE, QUANTIZE])
    only_loss = rls.Reward(sparsity=0.0, size=0.0)
    relaxation = relaxed(decisions, reward=only_loss, integrated=False)
    for (path, groups), action in zip(decisions, actions, strict=True):
        network.decide(path, groups, rls.Operation(action))
    x, y, weights = network.train.batch(2)
    loss = float(network.model.compute_loss(x, y, network.model(x, training=False), weights))
    share, _ = relaxation(*zeros(3), actions, 2)
    dense, _ = relaxation(*zeros(3), np.zeros(3), 2)
    assert share != dense
    assert share * relaxation._range + relaxation._dense == pytest.approx(loss, rel=1e-4)


# -- repeating -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_same_seed_same_figures() -> None:
    logits, legal = zeros()

    def run(seed: int, user_seed: int) -> list[Any]:
        tf.random.set_seed(user_seed)
        relaxation = relaxed(seed=seed)
        results = [relaxation(logits, legal, KEPT, step) for step in (0, 1)]
        return [(loss, gradient.tolist()) for loss, gradient in results]

    first = run(1, 5)
    assert first == run(1, 6)
    assert first[0] != first[1]
    assert first != run(2, 5)


def test_nothing_is_traced_again_and_the_network_stays_as_it_is() -> None:
    network = half_dead()
    network.reset()
    network.decide(FIRST, columns(0, 2), rls.Operation.PRUNE)
    before = network.snapshot()
    relaxation = Relaxation(network)
    logits, legal = zeros()
    for step, edge in enumerate((1, 3, 7)):
        relaxation.follow([(FIRST, columns(0, edge)), (FIRST, columns(edge, 8))])
        relaxation(logits + step, legal, KEPT + step, step)
    assert relaxation.tracing_count() == 1
    after = network.snapshot()
    assert all(map(np.array_equal, before.weights, after.weights))
    assert after.outcome == before.outcome
    assert np.array_equal(before.operations[FIRST], after.operations[FIRST])


# -- PPO -----------------------------------------------------------------------------------------


def towards(action: int) -> Any:
    """A loss that falls with the logits of one legal action."""

    def loss(logits: Any, legal: Any, actions: Any, step: int) -> tuple[float, np.ndarray]:
        gradient = np.zeros_like(logits)
        gradient[:, action] = -1.0 * legal[:, action]
        return float(-logits[:, action][legal[:, action] > 0].sum()), gradient

    return loss


def toy_agent(config: PPO, relaxed_loss: Any = None, seed: int = 0) -> tuple[Any, Any]:
    env = toy.ContextualEnvironment(seed=2)
    agent = build_agent(config, env.time_step_spec(), env.action_spec(), seed=seed)
    if relaxed_loss is not None:
        agent.attach(relaxed_loss)
    return agent, env


@pytest.mark.slow
def test_ppo_follows_the_gradient_it_is_given() -> None:
    config = PPO(hidden_layers=(16,), num_epochs=10, learning_rate=1e-2, relaxed_reward=2.0)
    chosen = {}
    for action in (1, 2):
        agent, env = toy_agent(config, towards(action))
        for _ in range(4):
            toy.play_search_episode(env, agent, 2)
            agent.end_episode()
        taken, possible = 0, 0
        for _ in range(5):
            step = env.reset()
            while not step.is_last():
                possible += int(step.observation["legal"][action])
                choice = agent.act(step)
                taken += choice == action
                step = env.step(choice)
        chosen[action] = taken / possible
        assert agent.tracing_count() == 5
    assert min(chosen.values()) > 0.9, chosen


def test_losses_that_are_not_finite_do_not_reach_the_policy() -> None:
    ruined = [float("nan"), np.nan]

    def loss(logits: Any, legal: Any, actions: Any, step: int) -> tuple[float, np.ndarray]:
        return (ruined[0], 0 * logits) if step else (0.0, logits + np.nan)

    agent, env = toy_agent(SMALL, loss)
    toy.play_search_episode(env, agent, 1)
    assert "relaxed_loss" not in agent.end_episode()
    assert all(np.isfinite(variable.numpy()).all() for variable in agent._variables)


def test_demonstrations_are_imitated_only() -> None:
    agent, env = toy_agent(SMALL, towards(0))
    step = env.reset()
    while not step.is_last():
        action = int(np.flatnonzero(step.observation["legal"])[0])
        step = env.step(agent.step(step, action=action))
        agent.observe(step)
    assert list(agent.end_episode()) == ["imitation_loss"]


def play(agent: Any, relaxation: Relaxation, episodes: int) -> list[Any]:
    """Search episodes on the tiny network; their losses and actions."""
    network = relaxation.network
    environments = [LayerEnvironment(network, k.path, buckets=3) for k in network.kernels]
    found: list[Any] = []
    for _ in range(episodes):
        network.reset()
        decisions = []
        for env in environments:
            env.commit()
            step = env.reset()
            while not step.is_last():
                before = network.decided[env.kernel].copy()
                step = env.step(np.int32(agent.step(step)))
                agent.observe(step)
                groups = np.flatnonzero(network.decided[env.kernel] & ~before)
                decisions.append((env.kernel, groups))
        relaxation.follow(decisions)
        found += [network.plan.to_dict(), agent.end_episode(bonus=0.1)]
    return found


@pytest.mark.slow
def test_saved_agent_goes_on_as_if_never_stopped(tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, episodes_per_update=2)

    def built(seed: int) -> tuple[Any, Relaxation]:
        env = LayerEnvironment(half_dead(), FIRST)
        agent = build_agent(config, env.time_step_spec(), env.action_spec(), seed=seed)
        relaxation = Relaxation(half_dead(), seed=3)
        agent.attach(relaxation)
        return agent, relaxation

    agent, relaxation = built(5)
    losses = play(agent, relaxation, 3)[1::2]
    assert all(np.isfinite(entry["relaxed_loss"]) for entry in losses)
    agent.save(tmp_path / "agent.npz")
    continued = play(agent, relaxation, 2)
    restored, fresh = built(6)
    restored.load(tmp_path / "agent.npz")
    assert play(restored, fresh, 2) == continued
    assert restored._relaxed_steps == 5 * config.num_epochs
    assert relaxation.tracing_count() == 1


def test_plain_ppo_is_what_it_was() -> None:
    plain, env = toy_agent(dataclasses.replace(SMALL, relaxed_reward=0.0))
    toy.play_search_episode(env, plain, 1)
    assert set(plain.end_episode()) == {"policy_loss", "value_loss", "entropy_loss"}
    assert "relaxed_steps" not in plain.get_state()


# -- errors --------------------------------------------------------------------------------------


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ArgumentError, match=r"PPO\(relaxed_reward=-1\): expected a number of at"):
        PPO(relaxed_reward=-1)
    with pytest.raises(
        ArgumentError, match=r"'relaxed_reward'\. It is one of PPO: leave it out, or"
    ):
        DQN.from_dict({"relaxed_reward": 1.0})
    with pytest.raises(ArgumentError, match="It is one of DQN and PPO: leave it out, or use agent"):
        rls.Random.from_dict({"discount": 1.0})
    with pytest.raises(
        ArgumentError, match=r"temperature=0\) cannot be used. Expected a number ab"
    ):
        Relaxation(half_dead(), temperature=0)
    with pytest.raises(ArgumentError, match=r"which has no gradient. Expected rls.Reward\(...\)"):
        Relaxation(half_dead(), reward=lambda outcome, previous: 0.0)


def test_wrong_decisions_are_refused() -> None:
    relaxation = relaxed()
    logits, legal = zeros(3)
    with pytest.raises(ArgumentError, match=r"shape \(3, 4\).*Expected \(2, 4\), a row for every"):
        relaxation(logits, legal, np.zeros(3), 0)
    with pytest.raises(ArgumentError, match="has no kernel 'third/kernel'"):
        relaxation.follow([("third/kernel", np.arange(3))])


def test_a_missing_loss_is_explained() -> None:
    agent, env = toy_agent(SMALL)
    toy.play_search_episode(env, agent, 1)
    with pytest.raises(AgentStateError, match=r"no loss to follow; expected agent.attach\(Relax"):
        agent.end_episode()
