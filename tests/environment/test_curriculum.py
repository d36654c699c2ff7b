"""Curricula: the shares of the target, stages that build on one another, and what is returned."""

from __future__ import annotations

import json

import numpy as np
import pytest
from byte_budgets import budget as bytes_budget
from byte_budgets import dense_costs, sparse_costs
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_search import (
    DQN,
    SPARSITY,
    TRAIN,
    VALIDATION,
    WIDE_TRAIN,
    WIDE_VALIDATION,
    compressor,
    episodes_of,
    figures_of,
    interrupt,
    journal_of,
    quick_search,
    search,
    trained,
    wide,
)

import rl_sparsity_tf as rls
from rl_sparsity_tf.allocation.budgets import Budget
from rl_sparsity_tf.allocation.density_plans import pruned_to_budget
from rl_sparsity_tf.cli import build_parser
from rl_sparsity_tf.console import SearchProgress
from rl_sparsity_tf.data.batches import evaluation_data, training_data
from rl_sparsity_tf.environment.curriculum import Constant, Linear, Staged, resolve_curriculum
from rl_sparsity_tf.environment.layer_environment import LayerEnvironment
from rl_sparsity_tf.environment.network import CompressedNetwork, evaluate_plan
from rl_sparsity_tf.environment.reranking import SCHEDULE
from rl_sparsity_tf.layers.operations import Operation
from rl_sparsity_tf.search.episodes import LoopSettings
from rl_sparsity_tf.search.loop import PREVIOUS, SearchLoop

CURRICULA = (Constant(), Linear(), Linear(start=0.2), Staged(), Staged(stages=(0.4, 1.0)))
WEIGHTS = 72


@pytest.fixture(scope="module", autouse=True)
def _quick():
    with quick_search():
        yield


# ---------------------------------------------------------------------------- the shares


@pytest.mark.parametrize(
    ("curriculum", "episodes", "expected"),
    [
        (Constant(), 24, [(1.0, 24)]),
        (Linear(), 9, [(0.5, 3), (0.75, 3), (1.0, 3)]),
        (Linear(start=0.2), 24, [*((0.2 + 0.16 * i, 3) for i in range(5)), (1.0, 9)]),
        (Linear(), 6, [(0.5, 3), (1.0, 3)]),
        (Linear(), 5, [(1.0, 5)]),  # no room for a step and as many with the full target
        (Staged(), 24, [(0.5, 8), (0.75, 8), (1.0, 8)]),
        (Staged(), 8, [(0.5, 2), (0.75, 2), (1.0, 4)]),
        (Staged(), 2, [(1.0, 2)]),
        (Staged(stages=[0.5, 1]), 5, [(0.5, 2), (1.0, 3)]),
        (Staged(stages=(1.0,)), 5, [(1.0, 5)]),
    ],
)
def test_the_shares_of_a_curriculum_are_those_computed_by_hand(curriculum, episodes, expected):
    found = curriculum.shares(episodes)
    assert [count for _, count in found] == [count for _, count in expected]
    assert [share for share, _ in found] == pytest.approx([share for share, _ in expected])


@given(st.sampled_from(CURRICULA), st.integers(1, 200))
@example(Linear(), 5)
def test_stages_follow_on_one_another_and_the_last_is_the_full_target(curriculum, episodes):
    stages = curriculum.schedule(episodes)
    assert [stage.start for stage in stages] == [0, *(stage.end for stage in stages[:-1])]
    assert stages[-1].end == episodes
    shares = [stage.share for stage in stages]
    assert shares == sorted(set(shares))
    assert shares[-1] == 1.0
    assert all(stage.episodes >= 1 for stage in stages)
    # No stage has more episodes than the last, and a linear one leaves it a third.
    assert stages[-1].episodes == max(stage.episodes for stage in stages)
    if curriculum.name == "linear":
        assert 3 * stages[-1].episodes >= episodes


@pytest.mark.parametrize("curriculum", CURRICULA)
def test_curricula_are_read_back_from_their_dictionaries(curriculum):
    values = json.loads(json.dumps(curriculum.to_dict()))
    assert values["curriculum"] == curriculum.name
    assert type(curriculum).from_dict(values) == curriculum


def test_names_and_objects_mean_the_same():
    for curriculum in (Constant(), Linear(), Staged()):
        assert resolve_curriculum(curriculum.name) == curriculum
        assert resolve_curriculum(curriculum) is curriculum
    assert (rls.Constant, rls.Linear, rls.Staged) == (Constant, Linear, Staged)


@pytest.mark.parametrize("start", [0, 1, 1.5, -0.1, float("nan"), "0.5", True, None])
def test_a_wrong_start_is_refused(start):
    with pytest.raises(rls.ArgumentError, match=r"Linear\(start=.*above 0 and below 1.*Constant"):
        Linear(start=start)


@pytest.mark.parametrize(
    "stages",
    [
        (),
        0.5,
        "0.5",
        (0.5,),
        (0.5, 0.9),
        (0.75, 0.5, 1.0),
        (0.5, 0.5, 1.0),
        (0, 1.0),
        (0.5, 1.5),
        (float("nan"), 1.0),
        ("0.5", 1.0),
        (True,),
    ],
)
def test_wrong_stages_are_refused(stages):
    with pytest.raises(rls.ArgumentError, match=r"Staged\(stages=.*each above the one before and"):
        Staged(stages=stages)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"curriculum": "linear"},
            r"Staged\.from_dict\(\) received .*curriculum='linear'\. Exp",
        ),
        ({"stage": [1.0]}, r"Staged has no setting 'stage'\. .*Did you mean 'stages'\?"),
    ],
)
def test_dictionaries_of_something_else_are_refused(values, message):
    with pytest.raises(rls.ArgumentError, match=message):
        Staged.from_dict(values)
    with pytest.raises(rls.ArgumentError, match=r"Constant has no setting 'start'\. It has none"):
        Constant.from_dict({"start": 0.5})


@pytest.mark.parametrize(
    ("curriculum", "message"),
    [
        ("stages", r"curriculum='stages' is not known\. .*Did you mean 'staged'\?"),
        (Staged, r"curriculum=Staged is a class\. Expected an object: write Staged\(\)\."),
        (0.5, r"curriculum=0\.5 is a float\. Expected 'constant', 'linear', 'staged', or"),
        (None, r"curriculum=None is a NoneType\. Expected"),
    ],
)
def test_what_is_no_curriculum_is_refused(curriculum, message):
    with pytest.raises(rls.ArgumentError, match=message):
        compressor(trained(), curriculum=curriculum)


def test_the_command_line_knows_the_names():
    parse = build_parser().parse_args
    assert parse(["demo"]).curriculum == "constant"
    assert parse(["demo", "--curriculum", "linear"]).curriculum == "linear"
    common = ["compress", "m.keras", "--data", "d.npz", "--output", "o"]
    assert parse([*common, "--curriculum", "staged"]).curriculum == "staged"


# ---------------------------------------------------------------------------- eased budgets


def test_half_the_way_to_a_sparsity_is_half_of_it():
    sizes = [np.ones((10, 4), np.int64), np.ones((6, 10), np.int64)]
    full = Budget(0.9, 100, sizes)
    assert full.eased(0.5).wanted == 45
    assert full.eased(1.0).wanted == full.wanted == 90
    full.pruned[:] = [3, 4]
    assert full.eased(0.5).missing == 45  # nothing is pruned yet


def test_half_the_way_to_a_size_is_half_of_what_integers_leave_to_save():
    # As integers the unpruned network has 100 + 2 * 1500 = 3,100 bytes; 700 is 2,400 away.
    full = bytes_budget(700, [sparse_costs(1000), sparse_costs(500)], [1000, 500])
    assert full.unpruned == pytest.approx(3100)
    assert full.eased(0.5).limit == pytest.approx(1900)
    assert full.eased(1.0).limit == pytest.approx(full.limit)
    assert full.eased(0.5).name == full.name
    assert full.smallest == pytest.approx(104)  # a weight of each kernel


def test_a_size_that_integers_meet_is_no_way_at_all():
    full = bytes_budget(2000, [dense_costs(1000), dense_costs(500)], [1000, 500])
    assert full.unpruned < full.limit
    assert full.eased(0.25).limit == full.limit


def test_a_limit_out_of_reach_is_refused_by_the_name_of_the_target():
    full = bytes_budget(700, [sparse_costs(1000)], [1000])
    with pytest.raises(rls.TargetError, match=r"Target\(tflite_bytes=50\) cannot be reached"):
        full.limited(50, "Target(tflite_bytes=50)")
    with pytest.raises(rls.TargetError, match=r"Target\(tflite_bytes=700\) cannot be reached"):
        full.limited(50)


# ---------------------------------------------------------------------------- a network


def network_for(target=None) -> CompressedNetwork:
    """The tiny network, or for a size the one that is large enough for it."""
    model = trained() if target is None else wide()
    train, validation = (TRAIN, VALIDATION) if target is None else (WIDE_TRAIN, WIDE_VALIDATION)
    return CompressedNetwork(
        model,
        training_data(train, model, batch_size=32),
        evaluation_data(validation, model, "validation_data"),
        target=target or rls.Target(sparsity=SPARSITY),
    )


@pytest.fixture(scope="module")
def network() -> CompressedNetwork:
    return network_for()


def pruned(plan: rls.CompressionPlan) -> dict[str, np.ndarray]:
    return {path: one.operations == Operation.PRUNE for path, one in plan.kernels.items()}


def count(plan: rls.CompressionPlan) -> int:
    return sum(int(mask.sum()) for mask in pruned(plan).values())


def assert_nested(earlier: rls.CompressionPlan, later: rls.CompressionPlan) -> None:
    before, after = pruned(earlier), pruned(later)
    for path, mask in before.items():
        assert after[path][mask].all(), path


def random_plan(network: CompressedNetwork, sparsity: float, seed: int) -> rls.CompressionPlan:
    rng = np.random.default_rng(seed)
    entries = []
    for kernel in network.kernels:
        shape = network.groupings[kernel.path].shape
        operations = rng.choice([Operation.KEEP, Operation.QUANTIZE, Operation.SHUFFLE], shape)
        flat = operations.reshape(-1)
        flat[rng.permutation(flat.size)[: int(sparsity * flat.size)]] = Operation.PRUNE
        entries.append(
            rls.KernelPlan(
                kernel.path,
                kernel.shape,
                "io",
                network.decisions.group,
                8,
                operations.astype(np.uint8),
            )
        )
    return rls.CompressionPlan(entries)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.0, 0.6), st.floats(0.5, 1.0))
def test_a_plan_pruned_further_meets_the_budget_and_keeps_what_was_pruned(
    network, seed, sparsity, share
):
    plan, full = random_plan(network, sparsity, seed), network.budget
    network.budget = full.eased(share)
    wanted = network.budget.wanted
    try:
        further = pruned_to_budget(network, plan)
    finally:
        network.budget = full
    assert_nested(plan, further)
    assert count(further) == max(wanted, count(plan))
    # What lives keeps its operation.
    for path, mask in pruned(further).items():
        living = further.kernels[path].operations[~mask]
        np.testing.assert_array_equal(living, plan.kernels[path].operations[~mask])


@pytest.mark.slow
def test_a_plan_of_floats_becomes_integers_where_that_lets_more_live():
    network = network_for(rls.Target(tflite_bytes=20_000))
    floats = random_plan(network, 0.0, 0)
    assert pruned_to_budget(network, floats).to_json() == floats.to_json()  # 17.7 kB
    network.budget.limit = 9_000.0
    integers = pruned_to_budget(network, floats)
    assert count(integers) == 0  # 6.6 kB
    assert not any((one.operations == Operation.KEEP).any() for one in integers.kernels.values())
    for limit in (4_500.0, np.ceil(network.budget.smallest)):
        network.budget.limit = limit
        further = pruned_to_budget(network, integers)
        assert_nested(integers, further)
        assert count(further) > 0
        evaluate_plan(network, further)
        assert network.budget.expected(network.states()) <= limit
    network.budget.limit = network.budget.smallest - 1
    assert pruned_to_budget(network, floats) is None


def test_a_retargeted_network_knows_its_plans_and_what_is_wanted_now():
    network = network_for()
    full = network.budget
    plan = random_plan(network, 0.7, 3)
    standing = network.group_ranks.of("lamp", network.kernels[0].path)
    before = evaluate_plan(network, plan)
    network.retarget(full.eased(0.5))
    assert network.budget.missing == network.budget.wanted == 22  # of 72 * 0.3 = 21.6
    assert network.outcome.target_sparsity == pytest.approx(0.3)
    assert (network.group_ranks.of("lamp", network.kernels[0].path) >= standing).all()
    known = dict(network._known)
    after = evaluate_plan(network, plan)
    assert network._known == known  # it was not evaluated again
    assert (after.metric, after.loss) == (before.metric, before.loss)
    assert (before.target_sparsity, after.target_sparsity) == (SPARSITY, pytest.approx(0.3))
    assert network.evaluations == 1
    network.reset()
    assert network.outcome.target_sparsity == pytest.approx(0.3)
    network.retarget(full)
    assert evaluate_plan(network, plan) == before


@pytest.mark.slow
def test_the_share_of_a_size_that_is_reached_follows_the_target():
    network = network_for(rls.Target(tflite_bytes=4000))
    full, plan = network.budget, random_plan(network, 0.3, 0)
    before = evaluate_plan(network, plan)
    assert 0 < before.progress < 1
    network.retarget(full.limited(12_000))
    after = evaluate_plan(network, plan)
    assert after.progress == network.budget.saved(network.states()) > before.progress
    assert after.metric == before.metric
    network.retarget(full)
    assert evaluate_plan(network, plan) == before


def test_environments_follow_to_another_target():
    network = network_for()
    one = LayerEnvironment(network, network.kernels[0].path, buckets=6)
    before, steps = one._edges.copy(), one.steps
    network.retarget(network.budget.eased(0.9))
    one.retarget()
    fresh = LayerEnvironment(network, network.kernels[0].path, buckets=6)
    np.testing.assert_array_equal(one._edges, fresh._edges)
    assert (one._edges != before).any()
    assert one.steps == steps
    assert one.goal == pytest.approx(0.9 * SPARSITY)
    np.testing.assert_array_equal(
        one.reset().observation["state"], fresh.reset().observation["state"]
    )


# ---------------------------------------------------------------------------- a search

STAGED = {"curriculum": Staged(stages=(0.5, 1.0)), "recovery": "least_squares"}


class Stages:
    """Notes the best plan of every stage, and what was evaluated at its start."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.ends, self.proposed, self.begun = [], [], []
        play, begin = SearchLoop.play, SearchLoop.begin

        def playing(loop, progress):
            play(loop, progress)
            self.ends.append(loop.best)

        def beginning(loop, stage, budget, previous, progress):
            self.begun.append(previous)
            begin(loop, stage, budget, previous, progress)
            self.proposed.append(dict(loop.proposed))

        patch.setattr(SearchLoop, "play", playing)
        patch.setattr(SearchLoop, "begin", beginning)


RUNS = {
    "dqn": {"agent": DQN},
    "two levels": {"agent": DQN, "hierarchy": True},
}


@pytest.fixture(scope="module", params=RUNS)
def staged(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("staged") / "run"
    with pytest.MonkeyPatch.context() as patch:
        stages = Stages(patch)
        one = compressor(trained(), directory=folder, **RUNS[request.param], **STAGED)
        result = search(one, episodes=7, verbose=0)
    return one, result, stages, folder


@pytest.mark.slow
def test_the_target_rises_over_the_episodes(staged):
    _, result, _, folder = staged
    assert [entry["stage"] for entry in result.history] == [0.5] * 3 + [1.0] * 4
    sparsities = np.array([entry["sparsity"] for entry in result.history])
    np.testing.assert_allclose(sparsities[:3], 22 / WEIGHTS, atol=1e-9)
    np.testing.assert_allclose(sparsities[3:], 44 / WEIGHTS, atol=1e-9)
    assert (folder / "history.csv").read_text().splitlines()[1].split(",")[1] == "0.5"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["arguments"]["curriculum"] == {"curriculum": "staged", "stages": [0.5, 1.0]}


@pytest.mark.slow
def test_a_stage_begins_with_the_best_of_the_one_before(staged):
    one, result, stages, _ = staged
    first, last = stages.ends
    assert stages.begun == [None, first.plan]
    further = stages.proposed[1][PREVIOUS]
    assert_nested(first.plan, further)
    assert count(further) == 44
    assert PREVIOUS not in stages.proposed[0]
    # It is shown to the agent before anything else.
    assert result.history[3]["proposed_by"] == PREVIOUS
    # Among the candidates is the further pruned plan itself: nothing worse is returned.
    reward = rls.Reward()
    assert last.value >= reward(evaluate_plan(one.last.network, further), None)
    one.last.network.reset()


@pytest.mark.slow
def test_only_plans_of_the_full_target_are_returned(staged):
    _, result, stages, _ = staged
    first, last = stages.ends
    assert first.outcome.sparsity == pytest.approx(22 / WEIGHTS)
    assert result.candidate is last
    assert last.outcome.target_sparsity == SPARSITY
    assert count(result.candidate.plan) == 44
    assert result.metrics["compressed"]["sparsity"] >= SPARSITY


@pytest.mark.slow
def test_the_agent_goes_on_with_what_it_has_learned(staged):
    one, _, _, _ = staged
    agent = one.last.loop.episodes.agent
    assert agent.episodes == 7
    decisions = 6 + 2 * one.hierarchy
    assert len(one.last.loop.episodes.tree.to_array()) == 4 * decisions  # of the last stage


@pytest.mark.slow
def test_a_plan_of_an_earlier_stage_never_wins_by_its_value():
    """To a reward that is against sparsity, every plan of the first stage is worth more."""

    def dense_is_best(outcome, previous):
        return 1.0 - outcome.sparsity if previous is None else 0.0

    one = compressor(trained(), "random", reward=dense_is_best, **STAGED)
    with pytest.MonkeyPatch.context() as patch:
        stages = Stages(patch)
        result = search(one, episodes=4, finetune_epochs=0)
    assert stages.ends[0].value > stages.ends[1].value
    assert count(result.candidate.plan) == 44


@pytest.mark.slow
def test_nothing_is_traced_again_from_stage_to_stage():
    network = network_for()
    agent = rls.PPO(hidden_layers=(8,), num_epochs=2, relaxed_reward=1.0)
    curriculum = Staged(stages=(0.4, 0.7, 1.0))
    settings = LoopSettings(
        agent=agent, reward=rls.Reward(), buckets=3, seed=0, warm_start=True, curriculum=curriculum
    )
    loop = SearchLoop(settings, network)
    counts = []
    play = loop.play

    def counting(progress):
        play(progress)
        counts.append((network.tracing_count(), loop.episodes._relaxation.tracing_count()))

    loop.play = counting
    loop.run(6, SearchProgress(6, "accuracy", 0))
    assert counts[0] == counts[1] == counts[2]
    assert counts[0][1] == 1
    assert loop.episodes.illegal_actions == 0


@pytest.mark.slow
def test_sizes_rise_too_and_the_file_meets_the_last():
    target = rls.Target(tflite_bytes=4500)
    one = compressor(wide(), "random", target=target, curriculum="staged", recovery="none")
    data = {"train": WIDE_TRAIN, "validation_data": WIDE_VALIDATION}
    with pytest.MonkeyPatch.context() as patch:
        stages = Stages(patch)
        result = search(one, episodes=6, finetune_epochs=0, **data)
    shares = [stage.outcome.stored_bits for stage in stages.ends]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > shares[-1]
    for earlier, proposed in zip(stages.ends, stages.proposed[1:], strict=False):
        assert_nested(earlier.plan, proposed[PREVIOUS])
    assert result.metrics["compressed"]["tflite_bytes"] <= 4500


@pytest.mark.slow
def test_channels_go_stage_by_stage():
    from channel_search import compressor as channels
    from channel_search import searched, trained

    options = {"agent": "random", "curriculum": Staged(stages=(0.5, 1.0))}
    one = channels(rls.Target(sparsity=0.6), **options)
    with pytest.MonkeyPatch.context() as patch:
        stages = Stages(patch)
        result = searched(one, episodes=4, finetune_epochs=0)
    first, last = stages.ends
    assert_nested(first.plan, stages.proposed[1][PREVIOUS])
    assert first.outcome.target_sparsity == pytest.approx(last.outcome.target_sparsity / 2)
    assert result.history[2]["proposed_by"] == PREVIOUS
    assert result.metrics["compressed"]["sparsity"] >= 0.6
    left = sum(np.size(w) for w in result.model.get_weights())
    assert left < 0.6 * sum(np.size(w) for w in trained().get_weights())


@pytest.mark.slow
def test_the_display_says_where_the_target_stands(capsys):
    one = compressor(trained(), "random", **STAGED)
    search(one, episodes=2, finetune_epochs=0, verbose=2)
    lines = capsys.readouterr().out.splitlines()
    begun = lines.index("0.5 of the way to the target")
    after = lines.index("1 of the way to the target")
    assert any(line.startswith("random search: ") for line in lines[begun:after])
    assert sum(line.startswith("episode ") for line in lines[begun:after]) == 1
    assert sum(line.startswith("episode ") for line in lines[after:]) == 1


@pytest.mark.slow
def test_contenders_play_at_the_full_target_alone():
    from rl_sparsity_tf.search.comparison import compare

    one = compressor(trained(), "random", **STAGED)
    search(one, episodes=4, finetune_epochs=0)
    (entry,) = compare(one, ["random_policy"], verbose=0)
    assert entry["sparsity"] >= SPARSITY
    assert entry["evaluations"] <= 4 + len(SCHEDULE)  # the best plan's masks are ranked anew


# ---------------------------------------------------------------------------- going on


@pytest.mark.slow
@pytest.mark.parametrize("staged", ["two levels"], indirect=True)
def test_a_search_cut_off_between_stages_ends_in_the_same_bits(staged, tmp_path):
    one, result, _, folder = staged
    options = {"agent": one.agent, "hierarchy": one.hierarchy}
    cut = compressor(trained(), directory=tmp_path / "cut", **options, **STAGED)
    interrupt(cut, after=6 * 3 + 3, episodes=7)
    assert len(journal_of(tmp_path / "cut")) == 3
    again = search(
        compressor(trained(), directory=tmp_path / "cut", **options, **STAGED), episodes=7
    )
    assert figures_of(again.history) == figures_of(result.history)
    assert again.plan.to_json() == result.plan.to_json()
    assert again.candidate.found_by == result.candidate.found_by
    assert [value.tobytes() for value in again.model.get_weights()] == [
        value.tobytes() for value in result.model.get_weights()
    ]
    assert (tmp_path / "cut" / "model.tflite").read_bytes() == (
        folder / "model.tflite"
    ).read_bytes()


def test_another_curriculum_does_not_continue_a_run(tmp_path):
    cut = compressor(trained(), "random", directory=tmp_path / "run", **STAGED)
    interrupt(cut, after=8, episodes=7)
    with pytest.raises(rls.RLSparsityError, match=r"differs in curriculum \(\{'curriculum': 'sta"):
        search(
            compressor(trained(), "random", directory=tmp_path / "run", recovery="least_squares"),
            episodes=7,
        )


@pytest.mark.slow
def test_a_constant_curriculum_is_what_searches_have_always_done(tmp_path):
    runs = [
        episodes_of(compressor(trained(), "random", directory=tmp_path / str(index), **options))
        for index, options in enumerate([{}, {"curriculum": Staged(stages=(1.0,))}])
    ]
    assert figures_of(runs[0]) == figures_of(runs[1])
    assert {entry["stage"] for entry in runs[0]} == {1.0}
