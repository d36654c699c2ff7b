"""Which cheap figure tells what a plan will be worth after full fine-tuning, and at what cost?

A dense network is trained per seed. Plans of equal sparsity (the heuristics' and random ones) are
judged by cheap proxies: no recovery, a fraction of an epoch of training, least squares, and the
layers' output errors without any forward pass. Each plan is then fine-tuned in full, from the
trained weights. Prints for every proxy the rank correlation (Spearman) with the accuracy and the
loss after fine-tuning, the median cost of an evaluation, and evaluations per second against the
same least squares in a plain loop and against the cheapest training that ranks as well. Then,
for the heuristics, what starting the fine-tuning from the least-squares weights brings.

    python benchmarks/recovery.py --network lenet-300-100 --sparsity 0.97 --epochs 3
    python benchmarks/recovery.py --network resnet-8 --sparsity 0.9 --epochs 1 --rows 20000

Validation data judges the proxies; the full accuracies are on test data.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf
from networks import NETWORKS, train

import rl_sparsity_tf as rls
from rl_sparsity_tf.agents.demonstrations import proposals
from rl_sparsity_tf.allocation import ranking
from rl_sparsity_tf.data.batches import TrainingData, evaluation_data, training_data
from rl_sparsity_tf.data.datasets import Data, load_dataset
from rl_sparsity_tf.data.metrics import Score
from rl_sparsity_tf.environment.candidates import Candidate
from rl_sparsity_tf.environment.network import CompressedNetwork, evaluate_plan
from rl_sparsity_tf.export.verification import score_model
from rl_sparsity_tf.layers.operations import Operation
from rl_sparsity_tf.layers.plan import CompressionPlan
from rl_sparsity_tf.layers.wrapping import strip, wrap
from rl_sparsity_tf.training.mask_training import finetune

import tf_keras as keras  # isort: skip  (after the package, which asks for Keras 2)


@dataclasses.dataclass
class Judged:
    """A proxy's figures, one per plan."""

    metrics: list[float] = dataclasses.field(default_factory=list)
    losses: list[float] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)

    def add(self, score: Any, seconds: float) -> None:
        """Notes what one plan got."""
        self.metrics.append(score.metric)
        self.losses.append(score.loss)
        self.seconds.append(seconds)


def random_plans(network: CompressedNetwork, count: int, seed: int) -> list[CompressionPlan]:
    """Magnitude pruning at densities around those of ERK, times a random factor per kernel."""
    rng = np.random.default_rng([seed, 7])
    sizes = [network.groupings[kernel.path].sizes for kernel in network.kernels]
    plans = []
    for _ in range(count):
        scores = []
        for kernel in network.kernels:
            grouping = network.groupings[kernel.path]
            saliency = ranking.mean_squares(network.originals[kernel.path], grouping)
            ratio = ranking.erk_ratio(kernel.shape) * np.exp(rng.normal(0.0, 1.0))
            scores.append(ranking.density_scores(saliency, grouping.sizes, ratio))
        live = ranking.Ranking(scores, sizes).live(network.budget.wanted)
        plans.append(network.storage.plan_from_live(network.kernels, live, quantize=False))
    return plans


def float_plan(plan: CompressionPlan) -> CompressionPlan:
    """The plan with its survivors kept, so that only the allocation is judged."""
    entries = []
    for entry in plan.kernels.values():
        pruned = entry.operations == Operation.PRUNE
        operations = np.where(pruned, Operation.PRUNE, Operation.KEEP).astype(np.uint8)
        entries.append(dataclasses.replace(entry, operations=operations))
    return CompressionPlan(entries)


class PlainLoop:
    """The same fits as a plain loop: a pass of its own for every layer, unit after unit.

    For networks in which every kernel belongs to a layer of the top level. The rows are drawn as
    the package draws them.

    Args:
        network: A network that recovers by least squares.
        x: The inputs that it is calibrated on.
        grams: Whether a layer's Gram matrix is shared by its units, or each unit forms its own
            normal equations from its surviving inputs.
    """

    def __init__(self, network: CompressedNetwork, x: np.ndarray, grams: bool):
        self._network, self._x, self._grams = network, x, grams
        model = network.model
        self._inputs = [keras.Model(model.inputs, k.wrapper.input) for k in network.kernels]

    def __call__(self, plan: CompressionPlan) -> None:
        """Fits and evaluates; the wrappers must carry the plan."""
        network = self._network
        for number, kernel in enumerate(network.kernels):
            problem = network.least_squares.problems[kernel.path]
            rows = problem.take(np.asarray(self._inputs[number](self._x, training=False)))
            live = problem.grouping.expand_numpy(
                plan.kernels[kernel.path].operations != Operation.PRUNE
            )
            centred = rows - rows.mean(axis=0) if problem.bias is not None else rows
            gram = centred.T @ centred / len(rows) if self._grams else None
            cross = centred.T @ problem._wanted / len(rows)
            strength = network.recovery.ridge * float(np.mean(np.square(centred)))
            weights = np.zeros(problem.original.shape)
            for unit in range(weights.shape[1]):
                chosen = np.flatnonzero(live[:, unit])
                if not len(chosen):
                    continue
                if gram is None:
                    seen = centred[:, chosen]
                    system = seen.T @ seen / len(rows)
                else:
                    system = gram[np.ix_(chosen, chosen)]
                system = system + strength * np.eye(len(chosen))
                wanted = cross[chosen, unit] + strength * problem.original[chosen, unit]
                weights[chosen, unit] = np.linalg.solve(system, wanted)
            matrix = kernel.spec.from_matrix_numpy(weights.astype(np.float32), kernel.shape)
            kernel.variable.assign(matrix)
        network.evaluate()


def output_errors(network: CompressedNetwork) -> list[float]:
    """How far every layer's outputs move, without a forward pass."""
    return [
        network.least_squares.error(kernel.path, network.effective_matrix(kernel.path))
        for kernel in network.kernels
    ]


def spearman(one: list[float], other: list[float]) -> float:
    """Rank correlation; ties share their mean rank."""

    def ranks(values: list[float]) -> np.ndarray:
        values = np.asarray(values)
        return np.array([(values < v).sum() + 0.5 * ((values == v).sum() - 1) for v in values])

    return float(np.corrcoef(ranks(one), ranks(other))[0, 1])


def full(
    model: keras.Model,
    plan: CompressionPlan,
    data: tuple[TrainingData, list[Any], list[Any]],
    metric: Any,
    epochs: int,
    start: Candidate | None = None,
) -> Score:
    """The score on test data after full fine-tuning."""
    training, validation, test = data
    tf.random.set_seed(0)
    wrapped = wrap(model, plan, train_masks=True)
    if start is not None:
        start.put_weights(wrapped)
    finetune(wrapped, training, validation, metric, epochs=epochs)
    return score_model(strip(wrapped), test, metric)


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """What a function returns, and the seconds it took."""
    started = time.perf_counter()
    result = function()
    return result, time.perf_counter() - started


def run(options: argparse.Namespace, data: Data, seed: int) -> dict[str, Any]:
    """Everything for one seed."""
    model = train(options.network, data, seed=seed, epochs=options.dense_epochs)
    rows = slice(0, options.rows)
    training = training_data((data.x_train[rows], data.y_train[rows]), model, seed=seed)
    validation = evaluation_data((data.x_validation, data.y_validation), model, "validation")
    test = evaluation_data((data.x_test, data.y_test), model, "test")
    steps = {
        f"training, 1/{share} epoch": max(1, len(data.x_train) // 128 // share)
        for share in options.shares
    }

    def network(method: str) -> CompressedNetwork:
        small = [tuple(None if p is None else p[: options.validation] for p in validation[0])]
        while len(small[0][0]) < options.validation and len(small) < len(validation):
            small.append(validation[len(small)])
        target = rls.Target(sparsity=options.sparsity)
        return CompressedNetwork(
            model, training, small, target=target, recovery=rls.Recovery(method=method)
        )

    fitted, plain, trained = (network(m) for m in ("least_squares", "none", "finetune"))
    named = [(name, float_plan(plan)) for name, plan in proposals(fitted)]
    random = random_plans(fitted, options.plans - len(named), seed)
    plans = [plan for _, plan in named] + random
    evaluate_plan(fitted, plans[-1])  # traces
    evaluate_plan(plain, plans[-1])
    evaluate_plan(trained, plans[-1], 1)
    judged = {name: Judged() for name in ("no recovery", *steps, "output error", "least squares")}
    evaluation_seconds: list[float] = []
    loop_seconds: tuple[list[float], list[float]] = ([], [])
    x = np.concatenate([batch[0] for batch in training.pool])
    x = x[: len(fitted.least_squares._pass._inputs)]
    loops = [PlainLoop(fitted, x, grams) for grams in (False, True)]
    starts = []
    for number, plan in enumerate(plans):
        outcome, seconds = timed(lambda plan=plan: evaluate_plan(plain, plan))
        judged["no recovery"].add(outcome, seconds)
        for name, count in steps.items():
            per_kernel = -(-count // len(trained.kernels))
            trained.reset()
            outcome, seconds = timed(
                lambda plan=plan, n=per_kernel: evaluate_plan(trained, plan, n)
            )
            judged[name].add(outcome, seconds)
        fitted.reset()
        for kernel in fitted.kernels:
            fitted.assign(kernel.path, plan.kernels[kernel.path].operations)
        errors, seconds = timed(lambda: output_errors(fitted))
        judged["output error"].add(Score(-float(np.mean(errors)), float(np.mean(errors))), seconds)
        fitted._known.clear()
        outcome, seconds = timed(lambda plan=plan: evaluate_plan(fitted, plan))
        judged["least squares"].add(outcome, seconds)
        if number < len(named):
            starts.append(Candidate.of(fitted, 0.0, 0, named[number][0]))
        evaluation_seconds.append(timed(fitted.evaluate)[1])
        if number < options.naive:
            fitted.reset()
            for kernel in fitted.kernels:
                fitted.assign(kernel.path, plan.kernels[kernel.path].operations)
            for loop, seconds in zip(loops, loop_seconds, strict=True):
                seconds.append(timed(lambda plan=plan, loop=loop: loop(plan))[1])
        print(f"seed {seed}: {number + 1}/{len(plans)} plans judged", file=sys.stderr, flush=True)
    data_of = (training, validation, test)
    results, seconds = [], []
    for number, plan in enumerate(plans):
        score, took = timed(
            lambda plan=plan: full(model, plan, data_of, fitted.metric, options.epochs)
        )
        results.append(score)
        seconds.append(took)
        print(
            f"seed {seed}: {number + 1}/{len(plans)} fine-tuned, {score.metric:.4f}",
            file=sys.stderr,
            flush=True,
        )
    from_fit = [
        full(model, plan, data_of, fitted.metric, options.epochs, start)
        for (_, plan), start in zip(named, starts, strict=True)
    ]
    table = {}
    for name, one in judged.items():
        table[name] = {
            "seconds": float(np.median(one.seconds)),
            "by_accuracy": spearman(one.metrics, [r.metric for r in results]),
            "by_loss": spearman(one.losses, [r.loss for r in results]),
            "loss_to_accuracy": spearman([-v for v in one.losses], [r.metric for r in results]),
        }
    return {
        "seed": seed,
        "dense": score_model(model, test, fitted.metric).metric,
        "plans": len(plans),
        "spread": [min(r.metric for r in results), max(r.metric for r in results)],
        "proxies": table,
        "full_seconds": float(np.median(seconds)),
        # Of the same plans, one after the other, so that other load is the same.
        "loop_ratios": [
            float(np.median(np.array(taken) / judged["least squares"].seconds[: len(taken)]))
            for taken in loop_seconds
        ],
        "evaluation_seconds": float(np.median(evaluation_seconds)),
        "starts": [
            {"name": name, "trained": dense.metric, "fitted": fit.metric}
            for (name, _), dense, fit in zip(named, results[: len(named)], from_fit, strict=True)
        ],
    }


def report(options: argparse.Namespace, runs: list[dict[str, Any]]) -> None:
    """Prints the tables."""

    def over(values: list[float], form: str = ".2f") -> str:
        low, high = min(values), max(values)
        text = f"{np.mean(values):{form}}"
        return text if len(values) == 1 else f"{text} ({low:{form}} to {high:{form}})"

    first = runs[0]
    print(
        f"\n{options.network}, {options.sparsity:.0%} zeros, {first['plans']} plans, "
        f"{len(runs)} seed(s); dense {over([r['dense'] for r in runs], '.4f')}, plans after "
        f"fine-tuning {min(r['spread'][0] for r in runs):.4f} to "
        f"{max(r['spread'][1] for r in runs):.4f}\n"
    )
    print("| proxy | cost of an evaluation | rank correlation by accuracy | by loss |")
    print("|---|---|---|---|")
    for name in first["proxies"]:
        rows = [run["proxies"][name] for run in runs]
        print(
            f"| {name} | {over([r['seconds'] for r in rows], '.3f')} s | "
            f"{over([r['by_accuracy'] for r in rows])} | {over([r['by_loss'] for r in rows])} |"
        )
    print(f"| full fine-tuning | {over([r['full_seconds'] for r in runs], '.1f')} s | 1 | 1 |\n")
    fast = [run["proxies"]["least squares"]["seconds"] for run in runs]
    for number, title in enumerate(("from its inputs", "from the layer's Gram matrix")):
        loops = [run["loop_ratios"][number] for run in runs]
        print(
            "evaluations per second, least squares against a plain loop, each unit fitted "
            f"{title}: {over(loops, '.1f')}x"
        )
    passes = [run["evaluation_seconds"] for run in runs]
    print(f"of an evaluation, the pass over the validation data takes {over(passes, '.3f')} s")
    ratios = []
    for run, seconds in zip(runs, fast, strict=True):
        wanted = run["proxies"]["least squares"]["by_loss"]
        equal = [
            row["seconds"]
            for name, row in run["proxies"].items()
            if name.startswith("training") and row["by_loss"] >= wanted
        ]
        ratios.append((min(equal) if equal else run["full_seconds"]) / seconds)
    print(
        "against the cheapest training that ranks as well (full fine-tuning where none does): "
        f"{over(ratios, '.1f')}x"
    )
    print("\n| fine-tuned from | " + " | ".join(s["name"] for s in first["starts"]) + " |")
    print("|---|" + "---|" * len(first["starts"]))
    for key, title in (("trained", "trained weights"), ("fitted", "least-squares weights")):
        cells = [
            over([run["starts"][i][key] for run in runs], ".4f")
            for i in range(len(first["starts"]))
        ]
        print(f"| {title} | " + " | ".join(cells) + " |")


def main() -> None:
    """Runs all seeds and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dataset", default="fashion_mnist")
    parser.add_argument("--network", choices=NETWORKS, default="lenet-300-100")
    parser.add_argument("--sparsity", type=float, default=0.97)
    parser.add_argument("--plans", type=int, default=25)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--dense-epochs", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=3, help="of the full fine-tuning")
    parser.add_argument("--rows", type=int, help="training rows of the full fine-tuning")
    parser.add_argument("--validation", type=int, default=2000, help="rows that judge a proxy")
    parser.add_argument("--shares", type=int, nargs="+", default=[8, 2, 1], metavar="N")
    parser.add_argument("--naive", type=int, default=3, help="plans to time the plain loop on")
    parser.add_argument("--json", help="file to append a line per seed to")
    options = parser.parse_args()
    data = load_dataset(options.dataset, seed=0)
    runs = []
    for seed in options.seeds:
        runs.append(run(options, data, seed))
        if options.json:
            with open(options.json, "a") as file:
                file.write(json.dumps({**vars(options), **runs[-1]}) + "\n")
    report(options, runs)


if __name__ == "__main__":
    main()
