"""Searches that learn nothing: random densities, hill climbing, and the best plan by layer errors.

What a learned policy has to beat, at the same number of evaluated plans, on the same network, with
the same recovery and reward.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import tf_keras as keras

from rl_sparsity_tf.allocation.decisions import KernelDecisions
from rl_sparsity_tf.allocation.density_plans import PlanSpace, random_ratios, shares
from rl_sparsity_tf.allocation.dynamic_programming import dynamic_programming as least_error
from rl_sparsity_tf.allocation.problem import PlanRequest
from rl_sparsity_tf.allocation.target import Target
from rl_sparsity_tf.checks import check_count, check_flag
from rl_sparsity_tf.console import without_traces
from rl_sparsity_tf.data.batches import evaluation_data, sample_rows, training_data
from rl_sparsity_tf.data.forms import as_rows
from rl_sparsity_tf.environment.moves import Move, Neighbours
from rl_sparsity_tf.environment.network import CompressedNetwork, evaluate_plan
from rl_sparsity_tf.environment.reranking import RELEASE, SCHEDULE, can_rerank, rank_anew
from rl_sparsity_tf.environment.reward import Outcome, Reward, RewardFunction, bounded
from rl_sparsity_tf.errors import ArgumentError, DataError, PlanError
from rl_sparsity_tf.export.verification import check_repeatable
from rl_sparsity_tf.files import sha256_of
from rl_sparsity_tf.layers.operations import Operation
from rl_sparsity_tf.layers.plan import CompressionPlan
from rl_sparsity_tf.layers.rules import Patterns, resolve
from rl_sparsity_tf.layers.structure import fixed_batch
from rl_sparsity_tf.search.arguments import SearchOptions
from rl_sparsity_tf.training.recovery import Recovery, as_recovery

# Proposals in a row that were evaluated before, after which there is nothing new to find.
_PATIENCE = 200
# As the search has it.
_DECISIONS = 8
# Of the moves by chance, those that rank all kernels anew.
_RANK_ALL = 0.15
# The factors by which they make a kernel denser or sparser.
_LEAST_STEP, _MOST_STEP = 1.05, 2.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class FoundPlan:
    """What a search of plans found; the plan meets the target.

    Attributes:
        outcome: Its outcome on validation data, after recovery.
        value: What the reward says of it, in [-1, 1], as for the search's candidates.
        history: The best value after every evaluation; every plan is evaluated once.
    """

    plan: CompressionPlan
    outcome: Outcome
    value: float
    history: list[float]

    @property
    def evaluations(self) -> int:
        """How many plans were evaluated."""
        return len(self.history)


def random_search(
    model: keras.Model,
    data: Any = None,
    target: Target | None = None,
    *,
    sparsity: float | None = None,
    validation_data: Any = None,
    evaluations: int = 50,
    seed: int = 0,
    group: str = "element",
    quantize: bool | None = None,
    reward: RewardFunction | None = None,
    recovery: Recovery | str | None = None,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
) -> CompressionPlan:
    """The best of many random allocations, each recovered and evaluated on validation data.

    Every kernel draws a density, log-uniform within a factor of 8 around the others'; all are
    scaled to the target, and the smallest groups go first. The last evaluations rank the best
    plan's masks anew, as in [hill_climbing][rl_sparsity_tf.baselines.hill_climbing].

    Args:
        model: A built and compiled model of Keras 3 or `tf_keras`. It is not changed.
        data: Training data as `fit` takes it, for the recovery.
        target: The target; or `sparsity`.
        sparsity: Short for `Target(sparsity=...)`.
        validation_data: What plans are evaluated on, up to 2,000 rows of it.
        evaluations: Plans to evaluate; the same plan is not evaluated twice.
        seed: Everything random follows from it.
        group: The smallest unit that is pruned.
        quantize: Whether what lives is quantized, see [baselines][rl_sparsity_tf.baselines].
        reward: What an outcome is worth, as in `Compressor`.
        recovery: How plans recover before they are evaluated, as in `Compressor`.
        include: What alone is changed, see [baselines][rl_sparsity_tf.baselines].
        exclude: What is left as it is.

    Raises:
        RLSparsityError: If an argument cannot be used, or the target is out of reach.

    Example:
        >>> plan = rls.baselines.random_search(
        ...     model, (x, y), sparsity=0.9, validation_data=(x_val, y_val), evaluations=100
        ... )
    """
    request = PlanRequest.of(
        model,
        target,
        sparsity=sparsity,
        group=group,
        quantize=quantize,
        include=include,
        exclude=exclude,
    )
    check_count("evaluations", evaluations, 1)
    check_count("seed", seed, 0)
    with without_traces():
        network, reward = _prepared(
            "random_search", request, data, validation_data, seed, reward, recovery
        )
        return search_randomly(
            network, reward, evaluations, seed=seed, quantize=request.quantize
        ).plan


def hill_climbing(
    model: keras.Model,
    data: Any = None,
    target: Target | None = None,
    *,
    sparsity: float | None = None,
    validation_data: Any = None,
    evaluations: int = 50,
    seed: int = 0,
    group: str = "element",
    quantize: bool | None = None,
    reward: RewardFunction | None = None,
    recovery: Recovery | str | None = None,
    start: CompressionPlan | None = None,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
) -> CompressionPlan:
    """Changes one thing of a plan at a time, and keeps what improves the reward.

    First weights without an effect make room for others, twice at most, and all kernels are ranked
    anew, four times at most, in the network that was fitted to the plan: `evaluations=7` does no
    more than that. Then chance decides: a kernel is ranked anew, all of them are, or one becomes
    denser or sparser, which the others pay for or gain from. Where nothing
    is fitted in closed form, and for whole channels, density moves between two kernels at a time.

    Args:
        model: A built and compiled model of Keras 3 or `tf_keras`. It is not changed.
        data: Training data as `fit` takes it, for the recovery.
        target: The target; or `sparsity`.
        sparsity: Short for `Target(sparsity=...)`.
        validation_data: What plans are evaluated on, up to 2,000 rows of it.
        evaluations: Plans to evaluate; the same plan is not evaluated twice.
        seed: Everything random follows from it.
        group: The smallest unit that is pruned.
        quantize: Whether what lives is quantized, see [baselines][rl_sparsity_tf.baselines].
        reward: What an outcome is worth, as in `Compressor`.
        recovery: How plans recover before they are evaluated, as in `Compressor`.
        start: The plan to begin with, scaled to the target; by default that of `lamp`. The groups
            that live in it are the last to go.
        include: What alone is changed, see [baselines][rl_sparsity_tf.baselines].
        exclude: What is left as it is.

    Raises:
        RLSparsityError: If an argument cannot be used, or the target is out of reach.

    Example:
        >>> plan = rls.baselines.hill_climbing(
        ...     model, (x, y), sparsity=0.9, validation_data=(x_val, y_val), evaluations=50
        ... )

        From the plan of [dynamic_programming][rl_sparsity_tf.baselines.dynamic_programming]:

        >>> plan = rls.baselines.dynamic_programming(model, (x, y), sparsity=0.9)
        >>> plan = rls.baselines.hill_climbing(
        ...     model, (x, y), sparsity=0.9, validation_data=(x_val, y_val),
        ...     start=plan, evaluations=50,
        ... )
    """
    request = PlanRequest.of(
        model,
        target,
        sparsity=sparsity,
        group=group,
        quantize=quantize,
        include=include,
        exclude=exclude,
    )
    check_count("evaluations", evaluations, 1)
    check_count("seed", seed, 0)
    if start is not None:
        start = _checked_start(start, request)
    with without_traces():
        network, reward = _prepared(
            "hill_climbing", request, data, validation_data, seed, reward, recovery
        )
        return climb(
            network, reward, evaluations, seed=seed, quantize=request.quantize, start=start
        ).plan


def dynamic_programming(
    model: keras.Model,
    data: Any = None,
    target: Target | None = None,
    *,
    sparsity: float | None = None,
    group: str = "element",
    quantize: bool | None = None,
    bits: int = 8,
    rerank: bool = False,
    validation_data: Any = None,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
) -> CompressionPlan:
    r"""The allocation that loses least by the errors of the single layers.

    At about twenty densities every kernel is pruned and fitted to give back the dense layer's
    outputs on the data; \(e_k\) is the energy of what is left of the difference, over that of the
    outputs. The densities of least \(\sum_k \sqrt{e_k}\) that meet the target follow by dynamic
    programming (Frantar & Alistarh 2022, "SPDY", arXiv 2201.13096). Within a kernel the groups
    are ranked by magnitude or by what they add to the outputs, whichever fits better. Layers that
    cannot be fitted (other than dense, convolutional and depthwise ones) count by the energy of
    their weights.

    The errors are those of a layer by itself. In the plan as a whole many weights may lead to units
    that nothing reads any more. With `rerank` the plan is fitted, and all masks are ranked anew in
    that network, as many living groups in every kernel as before. Before that, weights without an
    effect make room for others in all kernels. Six plans at most are evaluated on the validation
    data, and the best is kept.

    Args:
        model: As for every function of this [module][rl_sparsity_tf.baselines].
        data: Training data; it is needed.
        target: The target; or `sparsity`.
        sparsity: Short for `Target(sparsity=...)`.
        group: The smallest unit that is pruned.
        quantize: Whether what lives is quantized. For targets in bytes each kernel is then stored
            as floats or as integers, whichever leads to less error in all.
        bits: 8 or 4; with 4 the integers of a kernel may have 8 or 4 bits.
        rerank: Whether that is done, which takes layers that can be fitted, and 8 bits.
        validation_data: What plans are evaluated on with `rerank`, up to 2,000 rows of it.
        include: What alone is changed.
        exclude: What is left as it is.

    Raises:
        RLSparsityError: If an argument cannot be used, or the target is out of reach.

    Example:
        >>> plan = rls.baselines.dynamic_programming(model, (x, y), sparsity=0.9)
        >>> better = rls.baselines.dynamic_programming(
        ...     model, (x, y), sparsity=0.9, rerank=True, validation_data=(x_val, y_val)
        ... )
    """
    options: dict[str, Any] = {
        **{"sparsity": sparsity, "group": group, "quantize": quantize, "bits": bits},
        **{"include": include, "exclude": exclude},
    }
    if not check_flag("rerank", rerank):
        return least_error(model, data, target, **options)
    if bits != 8 or group == "channel":
        raise ArgumentError(
            f"rerank=True does not go with bits={bits!r} and group={group!r}. Expected 8 bits, and "
            "single weights or blocks; leave rerank out otherwise."
        )
    if validation_data is None:
        raise DataError(
            "dynamic_programming(rerank=True) was given no validation_data, which it tells plans "
            "apart by. Pass validation_data=(x, y), or leave rerank out."
        )
    plan = least_error(model, data, target, **options)
    request = PlanRequest.of(model, target, **options)
    with without_traces():
        name = "dynamic_programming"
        network, reward = _prepared(name, request, data, validation_data, 0, None, None)
        if not can_rerank(network):
            raise ArgumentError(
                "rerank=True: too few layers of this model can be fitted in closed form, or it has "
                "a training step of its own. Leave rerank out."
            )
        trials = _Trials(network, reward, 1 + len(SCHEDULE), _DECISIONS)
        trials.run(plan)
        trials.rerank()
        return trials.found().plan


def search_randomly(
    network: CompressedNetwork,
    reward: RewardFunction,
    evaluations: int,
    *,
    seed: int = 0,
    quantize: bool = True,
    steps: int = _DECISIONS,
) -> FoundPlan:
    """[random_search][] on a network that is there already, and is left with the last plan applied.

    `steps` are training steps per kernel, where the recovery is fine-tuning. `quantize` is whether
    what lives is quantized. Raises TargetError if a budget of bytes cannot be met without integers.
    """
    rng = np.random.default_rng([seed, 1])
    space = PlanSpace(network, quantize)
    trials = _Trials(network, reward, evaluations, steps, min(len(SCHEDULE), evaluations // 4))
    while trials.go_on():
        trials.run(space.plan(random_ratios(rng, len(network.kernels))))
    return trials.found()


def climb(
    network: CompressedNetwork,
    reward: RewardFunction,
    evaluations: int,
    *,
    seed: int = 0,
    quantize: bool = True,
    start: CompressionPlan | None = None,
    steps: int = _DECISIONS,
) -> FoundPlan:
    """[hill_climbing][] on a network that is there already, and is left with the last plan applied.

    `start` is a plan of the network's kernels and groups, by default LAMP's. `steps` are training
    steps per kernel, where the recovery is fine-tuning. `quantize` is whether what lives is
    quantized. Raises TargetError if a budget of bytes cannot be met without integers.
    """
    rng = np.random.default_rng([seed, 2])
    space = PlanSpace(network, quantize)
    if start is None:
        live = space.live(space.lamp_scores())
    else:
        live = [start.kernels[k.path].operations != Operation.PRUNE for k in network.kernels]
        space.prefer(live)
        live = space.live(space.scores(shares(live)))
    trials = _Trials(network, reward, evaluations, steps)
    trials.run(space.plan_of(live))
    if can_rerank(network):
        return _improved(trials, network, quantize, rng)
    densities = shares(live)
    # Within a kernel LAMP's order is that of magnitudes, so that densities say all of a plan.
    while trials.go_on() and len(densities) > 1:
        moved = space.step(densities, rng)
        live = space.live(space.scores(moved))
        if trials.run(space.plan_of(live)):
            densities = shares(live)
    return trials.found()


def _improved(
    trials: _Trials, network: CompressedNetwork, quantize: bool, rng: np.random.Generator
) -> FoundPlan:
    """Takes moves from the plan just evaluated: those of all kernels first, then by chance."""
    near = Neighbours(network, quantize)
    kernels = [kernel.path for kernel in network.kernels]
    first = [_of_all(powers) for powers in SCHEDULE]
    while trials.go_on():
        whole = near.of_all()
        if first:
            move = first.pop(0)
            if move not in whole:
                continue
        elif whole and rng.random() < _RANK_ALL:
            move = whole[int(rng.integers(len(whole)))]
        else:
            by_kernel = [moves for kernel in kernels if (moves := near.moves(kernel))]
            if not by_kernel:
                break
            moves = by_kernel[int(rng.integers(len(by_kernel)))]
            factor = float(np.exp(rng.uniform(np.log(_LEAST_STEP), np.log(_MOST_STEP))))
            move = dataclasses.replace(moves[int(rng.integers(len(moves)))], factor=factor)
        if trials.run(near.plan(move)):
            near.renew()
    return trials.found()


def _of_all(powers: tuple[float, float] | None) -> Move:
    """The move of all kernels that an entry of [SCHEDULE][] stands for."""
    return Move("release") if powers is RELEASE else Move("rank", None, powers[1])


class _Trials:
    """Evaluates plans, each once, and remembers the best.

    The last evaluations, as many as are reserved, go to masks that are ranked anew.
    """

    def __init__(
        self,
        network: CompressedNetwork,
        reward: RewardFunction,
        evaluations: int,
        steps: int,
        reserved: int = 0,
    ):
        self._network, self._reward = network, reward
        self._evaluations, self._steps = evaluations, steps
        self._reserved = reserved if can_rerank(network) else 0
        self._seen: set[str] = set()
        self._repeated = 0
        self._best: tuple[float, Outcome, CompressionPlan] | None = None
        self._history: list[float] = []

    def go_on(self) -> bool:
        """Whether there are evaluations left, and plans to be expected that were not seen.

        Where only the last ones are left, masks are ranked anew with these.
        """
        if self._reserved and not self._goes_on(self._evaluations - self._reserved):
            self._reserved = 0
            self.rerank()
        return self._goes_on(self._evaluations)

    def _goes_on(self, evaluations: int) -> bool:
        return len(self._history) < evaluations and self._repeated < _PATIENCE

    def run(self, plan: CompressionPlan) -> bool:
        """Evaluates a plan if it is new; whether it is the best so far."""
        digest = sha256_of(*(entry.operations.tobytes() for entry in plan.kernels.values()))
        if digest in self._seen:
            self._repeated += 1
            return False
        self._seen.add(digest)
        self._repeated = 0
        steps = self._steps * self._network.recovery.steps
        outcome = evaluate_plan(self._network, plan, steps)
        value = bounded(self._reward, outcome, None)
        improved = self._best is None or (value, -outcome.loss) > (
            self._best[0],
            -self._best[1].loss,
        )
        if improved:
            self._best = (value, outcome, plan)
        assert self._best is not None
        self._history.append(self._best[0])
        return improved

    def rerank(self) -> None:
        """Decides anew which groups of the best plan's kernels live, as long as that is better."""
        repeated, steps = self._repeated, self._steps * self._network.recovery.steps

        def restore() -> None:
            assert self._best is not None
            evaluate_plan(self._network, self._best[2], steps)

        rank_anew(self._network, restore, self.run, self._evaluations - len(self._history))
        self._repeated = repeated

    def found(self) -> FoundPlan:
        """The best plan, and how the best value rose."""
        assert self._best is not None
        value, outcome, plan = self._best
        return FoundPlan(plan=plan, outcome=outcome, value=value, history=self._history)


# ---------------------------------------------------------------------- arguments


def _prepared(
    name: str,
    request: PlanRequest,
    data: Any,
    validation_data: Any,
    seed: int,
    reward: RewardFunction | None,
    recovery: Recovery | str | None,
) -> tuple[CompressedNetwork, RewardFunction]:
    """The network that plans are evaluated on, as a search's."""
    for what, given, use in (
        ("data", data, "plans recover on before they are evaluated. Pass data=(x, y)"),
        ("validation_data", validation_data, "plans are evaluated on. Pass validation_data=(x, y)"),
    ):
        if given is None:
            raise DataError(f"{name} was given no {what}, which {use} as fit takes it.")
    reward = Reward() if reward is None else reward
    if isinstance(reward, type) or not callable(reward):
        raise ArgumentError(
            f"reward={reward!r} cannot be used. Expected rls.Reward(...) or a function "
            "(outcome, previous) -> float."
        )
    model = request.model
    rows, batch_size = as_rows(data, "train", SearchOptions.batch_size)
    train = training_data(rows, model, batch_size=batch_size, seed=seed)
    check_repeatable(model, train.pool[0][0])
    validation = evaluation_data(validation_data, model, "validation_data")
    network = CompressedNetwork(
        model,
        train,
        sample_rows(validation, SearchOptions.validation_rows, seed=seed, fixed=fixed_batch(model)),
        target=request.target,
        decisions=KernelDecisions(request.group, selection=request.selection),
        recovery=as_recovery(recovery),
        seed=seed,
    )
    return network, reward


def _checked_start(start: object, request: PlanRequest) -> CompressionPlan:
    if not isinstance(start, CompressionPlan):
        raise ArgumentError(
            f"start={start!r} is a {type(start).__name__}. Expected a CompressionPlan, for "
            "example rls.baselines.erk(model, sparsity=0.9), or None for that of lamp."
        )
    plan = resolve(start, request.model, request.selection)
    for kernel in request.kernels:
        entry = plan.kernels.get(kernel.path)
        if entry is None or entry.group != request.group:
            found = "no entry" if entry is None else f"groups of {entry.group!r}"
            raise PlanError(
                f"start has {found} for the kernel {kernel.path!r}. Expected a plan with groups "
                f"of {request.group!r} for every kernel; pass group=... to both."
            )
    return plan
