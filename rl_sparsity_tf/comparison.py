"""The search's result beside simple contenders at the same evaluations and training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import tensorflow as tf
from rich.table import Table

from rl_sparsity_tf.agents import Random
from rl_sparsity_tf.candidates import Candidate
from rl_sparsity_tf.errors import ArgumentError
from rl_sparsity_tf.finishing import finish
from rl_sparsity_tf.metrics import baseline_entry
from rl_sparsity_tf.plan_evaluation import evaluate_plan
from rl_sparsity_tf.progress import SearchProgress
from rl_sparsity_tf.quiet import quiet_tensorflow
from rl_sparsity_tf.reward import bounded
from rl_sparsity_tf.rules import uniform_plan
from rl_sparsity_tf.search import Compressor, FinishedSearch
from rl_sparsity_tf.search_loop import SearchLoop
from rl_sparsity_tf.size_costs import formats_for
from rl_sparsity_tf.tables import table_lines


@quiet_tensorflow()
def compare(compressor: Compressor, verbose: int = 1) -> list[dict[str, Any]]:
    """Runs the contenders of a finished search and adds their figures to its metrics.

    Three contenders, each fine-tuned and exported as the search's plan was: uniform magnitude
    pruning, the same stored as int8, and a policy that chooses uniformly among the legal
    operations for as many episodes as the search had. The uniform plans recover for at least as
    many training steps as the search's plan did.

    Args:
        compressor: A compressor whose `search` has returned.
        verbose: As in `search`.

    Returns:
        The entries of `metrics["baselines"]`, which the compressor's last result holds too.

    Raises:
        ArgumentError: If the compressor has not searched yet.
    """
    search = compressor.last
    if search is None:
        raise ArgumentError(
            "The compressor has not searched yet, so there is nothing to compare with. Call "
            "compressor.search(...) first."
        )
    network, figures, result = search.network, search.figures, search.result
    entries = []
    progress = SearchProgress(search.episodes, network.metric.name, verbose)
    steps = sum(e.steps for e in search.loop.environments) * compressor.recovery.steps

    def add(name: str, candidate: Candidate, evaluations: int) -> None:
        tf.random.set_seed(compressor.seed)
        finished = finish(
            search.model,
            candidate,
            figures,
            epochs=search.epochs,
            quantization=search.quantization,
            formats=formats_for(compressor.target),
        )
        entries.append(baseline_entry(name, finished, figures.metric, evaluations))

    for name, quantize in (("uniform magnitude", False), ("uniform magnitude int8", True)):
        progress.say(f"fine-tuning and exporting: {name}")
        add(name, _uniform(search, compressor, quantize, steps), 1)

    network.seen.clear()
    settings = dataclasses.replace(compressor.loop_settings(), agent=Random(), warm_start=False)
    loop = SearchLoop(settings, network)
    best = loop.run(search.episodes, progress)
    progress.say("fine-tuning and exporting: random policy")
    add("random policy", best, loop.evaluations)
    result.metrics["baselines"] = entries
    return entries


def _uniform(
    search: FinishedSearch, compressor: Compressor, quantize: bool, steps: int
) -> Candidate:
    """Uniform magnitude pruning, recovered and evaluated like the search's plans."""
    network = search.network
    plan = uniform_plan(search.model, network.budget.goal, compressor.group, quantize)
    outcome = evaluate_plan(network, plan, -(-steps // len(network.kernels)))
    value = bounded(compressor.reward, outcome, None)
    return Candidate.of(network, value, 0, "uniform")


def comparison_table(metrics: dict[str, Any], print_fn: Callable[[str], Any] = print) -> None:
    """Prints dense, dense int8, the compressed model and the contenders side by side.

    Args:
        metrics: A result's metrics.
        print_fn: Called with every line.
    """
    name, tested = metrics["metric"]["name"], metrics["compressed"]["metric"] is not None
    prefix = "" if tested else "validation_"
    table = Table(title=f"{'test' if tested else 'validation'} {name} of the .tflite file")
    for title in ("", name, "sparsity", "bytes", "gzip bytes", "plans evaluated"):
        table.add_column(title, justify="left" if not title else "right")

    def row(title: str, entry: dict[str, Any], evaluations: Any) -> None:
        value = entry.get("tflite_metric") if tested else None
        value = entry.get(f"{prefix}metric") if value is None else value
        table.add_row(
            title,
            "-" if value is None else f"{value:.4f}",
            f"{entry['sparsity']:.4f}" if "sparsity" in entry else "-",
            f"{entry['tflite_bytes']:,}",
            f"{entry['gzip_bytes']:,}",
            "-" if evaluations is None else str(evaluations),
        )

    row("dense float32", metrics["dense"], None)
    row("dense int8", metrics["dense_int8"], None)
    evaluations = metrics["search"]["evaluations"]
    proposed_by = metrics["compressed"]["proposed_by"]
    title = f"compressed ({metrics['agent']}"
    title += ")" if proposed_by == metrics["agent"] else f", plan of {proposed_by})"
    row(title, metrics["compressed"], evaluations)
    for entry in metrics["baselines"]:
        row(entry["name"], entry, entry["evaluations"])
    for line in table_lines(table, width=100):
        print_fn(line.rstrip())
