"""The search: an agent compresses a model layer by layer, and learns from what it costs."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import tensorflow as tf
import tf_keras as keras

from rl_sparsity_tf.agents.configs import AgentConfig, Random
from rl_sparsity_tf.agents.policies import CONSTRUCT, SavedPolicy, resolve_policy
from rl_sparsity_tf.allocation.target import Target
from rl_sparsity_tf.callbacks import DATA, DENSE_FILES, MEASURING, PREPARING, SAVING, Callback
from rl_sparsity_tf.channels.latency_table import LatencyTable
from rl_sparsity_tf.channels.permutation import permute_channels
from rl_sparsity_tf.checks import check_count, check_flag, check_type
from rl_sparsity_tf.console import SearchProgress, episode_logs, without_traces
from rl_sparsity_tf.data.batches import (
    TrainingData,
    evaluation_data,
    sample_rows,
    training_data,
)
from rl_sparsity_tf.data.checks import Batch
from rl_sparsity_tf.data.forms import as_rows
from rl_sparsity_tf.environment.curriculum import Curriculum, resolve_curriculum
from rl_sparsity_tf.environment.network import CompressedNetwork
from rl_sparsity_tf.environment.reward import Reward, RewardFunction, resolve_reward
from rl_sparsity_tf.errors import ModelError
from rl_sparsity_tf.export.recurrent import unrolled_copy
from rl_sparsity_tf.export.verification import check_repeatable
from rl_sparsity_tf.files import sha256_of
from rl_sparsity_tf.keras3.door import check_return, compare, origin_of
from rl_sparsity_tf.layers.kernels import check_constraints, find_kernels
from rl_sparsity_tf.layers.rules import KernelSelection, Patterns, as_patterns
from rl_sparsity_tf.layers.structure import fixed_batch, flat_inputs
from rl_sparsity_tf.layers.support import check_exportable
from rl_sparsity_tf.layers.wrapping import accepted, is_wrapped, strip
from rl_sparsity_tf.search.accuracy_search import AccuracySearch, check_alone, first_target
from rl_sparsity_tf.search.arguments import (
    AUTO,
    SearchOptions,
    check_int4,
    check_shuffle,
    check_strategy,
    decisions_for,
    group_for,
    keep_table,
    kept_table,
    table_for,
)
from rl_sparsity_tf.search.early_files import check_early, dense_files
from rl_sparsity_tf.search.final import play_final
from rl_sparsity_tf.search.fingerprints import describe, fingerprints_of, name_of
from rl_sparsity_tf.search.finishing import Figures, Task
from rl_sparsity_tf.search.heats import entrants
from rl_sparsity_tf.search.result import FinishedSearch, Result, build_details, build_metrics
from rl_sparsity_tf.search.run_directory import RunDirectory, bytes_of, check_directory, check_free
from rl_sparsity_tf.search.storage_choice import StorageChoice, StorageChooser
from rl_sparsity_tf.tflite.worker import start_worker
from rl_sparsity_tf.training.recovery import Recovery, as_recovery

if TYPE_CHECKING:
    from rl_sparsity_tf.search.episodes import LoopSettings


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Prepared:
    """The model that is compressed, and its data: `rows` as given, `train` in batches."""

    options: SearchOptions
    model: keras.Model
    rows: Any
    train: TrainingData
    validation: list[Batch]
    test: list[Batch] | None

    def task(self, network: CompressedNetwork, target: Target, progress: SearchProgress) -> Task:
        """What the plans of a network are finished for."""
        return Task(
            model=self.model,
            network=network,
            figures=Figures(
                train=self.train,
                validation=self.validation,
                test=self.test,
                metric=network.metric,
            ),
            target=target,
            training=self.options.training,
            quantization=self.options.quantization,
            progress=progress,
        )


class Compressor:
    """Compresses a trained model to a target by reinforcement learning.

    Args:
        model: A built and compiled Keras model, of Keras 3 or `tf_keras`: Sequential, functional,
            or subclassed with its layers in attributes. It is not changed.
        target: What to reach.
        agent: `"dqn"` (the default), `"ppo"`, `"random"` (a baseline), or a configuration such as
            `rls.DQN(learning_rate=1e-3)`. With a policy the default is its own agent.
        group: The smallest unit one operation applies to: `"element"`, the default but for some
            targets, `"block4"`, `"block16"`, or `"channel"` (for macs and latency): whole channels
            with all that is tied to them, which the result does not have any more. `"auto"` (for
            `tflite_bytes`; other sizes and an accuracy's drop may have it) chooses single weights,
            blocks of 4, or 4 bits for every kernel before the search (see
            [storage_choice][rl_sparsity_tf.search.storage_choice]).
        directory: Folder for manifest, journal, checkpoints and the result. The same call
            continues a run that was cut off; other folders that are not empty are refused, and so
            is one that another process is at work in.
        seed: Everything random follows from it. TF-Agents and dropout draw from TensorFlow's
            global generator, which is seeded at the start of every episode.
        reward: The reward; a callable `(outcome, previous) -> float` replaces the default.
        recovery: How the network recovers before it is evaluated: `"least_squares"`,
            `"finetune"`, `"none"` or a [Recovery][rl_sparsity_tf.Recovery]; by default least
            squares, where the layers allow it.
        metric: Which of the model's metrics to keep: its name, or its name and `"max"` or `"min"`.
            By default the first; the loss for models without one, and for those with several
            outputs, as it covers them all.
        buckets: Decisions per kernel and episode.
        warm_start: Whether the plans of known heuristics are evaluated before the first episode,
            and played in the first episodes (see
            [demonstrations][rl_sparsity_tf.agents.demonstrations]), so that the agent learns from
            them. The best plan evaluated is returned, whoever proposed it.
        curriculum: How the target rises over the episodes: `"constant"` (not at all), `"linear"`,
            `"staged"`, or a configuration such as `rls.Staged(stages=(0.5, 1.0))`. The last
            episodes have the full target, and only their plans are returned.
        latency_table: Times of the model's layers, for a target of latency: a
            [LatencyTable][rl_sparsity_tf.LatencyTable] or its JSON file, made on any
            device. By default the layers are measured here before the search.
        shuffle: How Shuffle moves weights: `"neighbours"`, as an operation that the agent chooses,
            which swaps the contents of neighbouring groups and changes what the network computes;
            or `"channels"`, for groups of `"block4"` and `"block16"`: before the search the
            channels are permuted so that blocks keep more
            ([permute_channels][rl_sparsity_tf.permute_channels]), which changes nothing but
            rounding, and Shuffle is no operation then.
        int4: Which kernels `group="auto"` may store in 4 bits: `"fast"` (the default), where LiteRT
            is as fast as with 8 bits (Dense layers and Embeddings, but not convolutions, which
            XNNPACK then leaves alone); `"all"` for the smallest file; or `"none"`.
        policy: What [save_policy][rl_sparsity_tf.Result.save_policy] wrote: what an agent has
            learned on other networks, by a search of the same `strategy`; or `"pretrained"`, which
            comes with the package and decides moves (`strategy="improve"`). The plan of one that
            decides buckets is evaluated first, whatever `warm_start` says; the agent goes on from
            it, explores less, and learns how much better than that a plan is.
        hierarchy: Whether a second agent chooses the next layer and how much is to go of it; the
            first then meets that goal. Else the layers come in their order.
        strategy: What an episode is. `"construct"`: every bucket of every kernel is decided, from
            the dense network on. `"improve"`: one move from the best plan so far, which ranks the
            masks of a kernel or of all anew, or makes a kernel denser or sparser at the others'
            expense (see [ImprovementEnvironment][rl_sparsity_tf.ImprovementEnvironment]); it needs
            the recovery by least squares.
        include: What alone is compressed: names of layers, paths of layers or kernels
            (`"base/conv"`, `"lstm/cell/recurrent_kernel"`), or patterns of them (`"block*"`); one
            or a list. By default all kernels that are not frozen. A frozen layer
            (`layer.trainable = False`, or a model around it) that is included is pruned and
            quantized as it is, never fitted or trained.
        exclude: What is left as it is, in the same words; it wins over `include`. Kernels that are
            left alone are in no plan, are stored as floats and keep their channels; only the
            fine-tuning changes them, unless they are frozen. They count in a sparsity and in the
            file's bytes.

    Raises:
        RLSparsityError: If an argument cannot be used; nothing has been trained by then.

    Example:
        >>> compressor = rls.Compressor(model, target=rls.Target(sparsity=0.9))
        >>> result = compressor.search((x, y), validation_data=(x_val, y_val), verbose=0)
        >>> result.summary()
        Compressed model
        ...
        sparsity 0.90... of all weights; file ... bytes, gzipped ...
    """

    def __init__(
        self,
        model: keras.Model,
        target: Target | None = None,
        agent: str | AgentConfig | None = None,
        group: str | None = None,
        directory: str | os.PathLike[str] | None = None,
        seed: int = 0,
        *,
        reward: RewardFunction | None = None,
        recovery: Recovery | str | None = None,
        metric: str | tuple[str, str] | None = None,
        buckets: int = 8,
        warm_start: bool = True,
        curriculum: str | Curriculum = "constant",
        latency_table: LatencyTable | str | os.PathLike[str] | None = None,
        shuffle: str = "neighbours",
        int4: str | None = None,
        policy: SavedPolicy | str | os.PathLike[str] | None = None,
        hierarchy: bool = False,
        strategy: str = CONSTRUCT,
        include: Patterns | None = None,
        exclude: Patterns | None = None,
    ):
        self.model = accepted(model)
        check_return(self.model)
        check_exportable(self.model)
        if is_wrapped(self.model):
            raise ModelError(
                f"Model {model.name!r} is wrapped already. Call rl_sparsity_tf.strip(model) first."
            )
        self.target = Target(sparsity=0.9) if target is None else target
        check_type("target", self.target, Target, "rls.Target(sparsity=0.9)")
        self.policy, self.agent = resolve_policy(
            policy, agent, hierarchy=bool(hierarchy), strategy=strategy
        )
        self.include, self.exclude = (
            as_patterns("include", include),
            as_patterns("exclude", exclude),
        )
        selection = KernelSelection.of(self.model, include, exclude)
        if not selection.paths and not selection.left:
            strip(self.model)  # where something hides the layers, copying them says what
        self.selection = selection.check(self.model)
        self.selection.check_sparsity(self.model, self.target.sparsity)
        check_constraints(self.selection.kernels(self.model))
        self.group = group_for(self.model, self.target, group, self.selection)
        self.latency_table = table_for(self.target, latency_table)
        self.shuffle = check_shuffle(shuffle, self.group)
        self.int4 = check_int4(int4, self.group)
        self.directory = (
            None if directory is None else check_directory(directory, bytes_of(self.model))
        )
        self.seed = check_count("seed", seed, 0)
        self.reward = resolve_reward(reward)
        self.recovery = as_recovery(recovery)
        self.metric = metric
        self.buckets = check_count("buckets", buckets, 1)
        self.warm_start = check_flag("warm_start", warm_start) and not isinstance(
            self.agent, Random
        )
        self.curriculum = check_alone(self.target, resolve_curriculum(curriculum))
        self.hierarchy = check_flag("hierarchy", hierarchy)
        self.strategy = check_strategy(
            strategy,
            group=self.group,
            recovery=self.recovery,
            hierarchy=self.hierarchy,
        )
        self.last: FinishedSearch | None = None

    @without_traces()
    def search(
        self,
        train: Any,
        validation_data: Any = None,
        test_data: Any = None,
        episodes: int = SearchOptions.episodes,
        *,
        batch_size: int = SearchOptions.batch_size,
        finetune_epochs: int | None = None,
        mask: str = SearchOptions.mask,
        distillation: float = SearchOptions.distillation,
        quantization: str = SearchOptions.quantization,
        validation_rows: int = SearchOptions.validation_rows,
        class_weight: dict[int, float] | None = None,
        unroll: bool = False,
        finalists: int = SearchOptions.finalists,
        dataset: str | None = None,
        overwrite: bool = False,
        any_versions: bool = False,
        callbacks: Sequence[Callback] | None = None,
        finetune_callbacks: Sequence[keras.callbacks.Callback] | None = None,
        verbose: int = SearchOptions.verbose,
    ) -> Result:
        """Searches, fine-tunes the best plan, and exports it.

        In every episode each kernel's buckets are decided one after the other, by one policy for
        all kernels; at its end (or, without least squares, after every decision) the network
        recovers and is evaluated on the validation data.

        In the main thread the first Ctrl-C lets the present episode end; a second one, and any
        before and after the episodes, is a `KeyboardInterrupt` at once.

        Args:
            train: Training data as `fit` takes it: `(x, y)`, `(x, y, sample_weight)`, a batched
                `tf.data.Dataset`, a `keras.utils.PyDataset` or a `Sequence`. All labels are
                checked against the model's outputs and loss first.
            validation_data: Validation data in the same forms. It steers the search.
            test_data: Test data in the same forms; only the final figures use it.
            episodes: Passes over all kernels; 0, with a policy, for its plan as it is.
            batch_size: Rows in a batch, where `train` is not batched already.
            finetune_epochs: Epochs of the final fine-tuning; by default about 1,500 steps.
            mask: How masks learn in the final fine-tuning: `"straight_through"` or
                `"hard_concrete"`.
            distillation: The dense model's share of the loss there, from 0 to 1.
            quantization: How the result is exported, see `export_tflite`.
            validation_rows: Rows of the validation data that plans are evaluated on during the
                search, drawn once; the final figures are over all of them.
            class_weight: `{class: weight}` as `fit` takes it, for models with one output: how
                much the training rows of each class count, in recoveries and the fine-tuning.
                Validation and test data are not weighted.
            unroll: Compresses and exports the recurrent layers without a loop: their kernels can
                then be stored as int8 and the file's batch size stays open, but the file grows
                with the number of time steps, which has to be fixed.
            finalists: How many plans go into the final, the best of every proposer: what is best
                after a fit in closed form is not always best after the fine-tuning, so short
                trainings decide who is trained to the end, and the validation data decides among
                these; with `group="auto"` and two or more, the
                plan of dynamic programming for single weights is one more. With a limit on the
                accuracy's drop it is always one.
            dataset: Name of the data, for metrics.json.
            overwrite: Whether a run in `directory` may be replaced.
            any_versions: Whether one that was begun with other versions of libraries, or another
                number of threads, may be continued. It then ends in other bits than it would have.
            callbacks: Who is told what the search does, and may end its episodes in time: see
                [Callback][rl_sparsity_tf.callbacks.Callback].
            finetune_callbacks: Callbacks of `tf_keras` for the final fine-tuning of every finalist;
                short trainings that only compare have none. Their `logs` are of the training data.
            verbose: 0 silent, 1 a progress display, 2 a line per episode.

        Returns:
            The finished model with its plan, figures and .tflite file.

        Raises:
            RLSparsityError: If the data does not fit, or the target is out of reach; nothing has
                been trained by then.
            SearchInterrupted: After an episode in which Ctrl-C was pressed. Everything is saved in
                `directory`, and the error has the best plan so far.
        """
        # A policy that decides buckets has a plan without a search.
        least = 0 if self.policy and self.strategy == CONSTRUCT else 1
        options = SearchOptions(
            episodes=episodes,
            batch_size=batch_size,
            finetune_epochs=finetune_epochs,
            mask=mask,
            distillation=distillation,
            quantization=quantization,
            validation_rows=validation_rows,
            class_weight=class_weight,
            unroll=unroll,
            finalists=finalists,
            dataset=dataset,
            overwrite=overwrite,
            any_versions=any_versions,
            callbacks=callbacks,
            finetune_callbacks=finetune_callbacks,
            verbose=verbose,
        ).checked(self.target, validation_data, least_episodes=least)
        if self.directory is not None:
            check_free(self.directory)
        # Only now: wrapping, plans and export work without TF-Agents.
        from rl_sparsity_tf.search.loop import SearchLoop

        started = time.monotonic()
        progress = SearchProgress(episodes, verbose=verbose, callbacks=options.callbacks)
        with progress.phase(DATA):
            data = self._prepared(options, train, validation_data, test_data)
        with self._opened(data) as run, progress.searching(self._told(run, episodes)) as told:
            start_worker()  # its imports overlap the search
            with progress.phase(MEASURING):
                build = self._network_maker(data, run)
            with progress.phase(PREPARING):
                plain = build()
            progress.metric = plain.metric.name
            task = data.task(plain, self.target, progress)
            with progress.phase(DENSE_FILES):
                dense = dense_files(task.model, task.figures, quantization)
            if run is not None:
                run.start()
                keep_table(plain.decisions, run)
            choice, chooser = self._choose_storage(plain, build, progress)
            task = dataclasses.replace(task, network=choice.network)
            kept = entrants(task, finalists)
            settings = dataclasses.replace(self.loop_settings(), finalists=kept)
            loop = SearchLoop(settings, task.network, run, interruptible=True)
            if loop.done:
                progress.say(f"going on after episode {loop.done} of {episodes}")
            noted: dict[str, Any] = {}
            if choice.slow_int4 is not None:
                noted["slow_int4"] = choice.slow_int4.to_dict()
            if self.target.max_accuracy_drop is None:
                checked = functools.partial(check_early, task, dense.warnings, progress)
                loop.run(episodes, progress, checked)
                others = choice.others if finalists > 1 else ()
                finished, best = play_final(
                    *(task, [*loop.finalists, *others], loop.proposed, progress),
                    places=finalists + len(others),
                    seed=self.seed,
                )
            else:
                found = AccuracySearch(task, loop, run, chooser).run(episodes, progress)
                task, finished, best, noted = found.task, found.finished, found.best, found.metrics
            if self.selection.left:
                noted["left_alone"] = self.selection.to_dict()
            with progress.phase(SAVING):
                metrics = build_metrics(
                    *(task, loop, finished, best, dense),
                    seconds=loop.seconds + time.monotonic() - started,
                    dataset=dataset,
                    search=noted,
                )
                details = build_details(task, loop, finished, best)
                origin, manifest = origin_of(self.model), None if run is None else run.manifest()
                result = Result(task, loop, finished, best, metrics, details, origin, manifest)
                if run is not None:
                    result.write_files(run.path)
            told["result"] = result
            self.last = FinishedSearch(
                **vars(task), plain=plain, loop=loop, result=result, episodes=loop.done
            )
        return result

    def _told(self, run: RunDirectory | None, episodes: int) -> dict[str, Any]:
        """What callbacks are told as a search begins."""
        from rl_sparsity_tf.search.loop import check_history

        history: list[dict[str, Any]] = []
        with contextlib.suppress(KeyError, ValueError):  # the loop says what is wrong with it
            entries = [] if run is None else run.played()
            check_history(entries)
            history = [episode_logs(entry) for entry in entries]
        return {
            "resumed": run is not None and run.resumed,
            "episode": len(history),
            "episodes": episodes,
            "history": history,
            "seconds": sum(entry["seconds"] for entry in history),
            "agent": self.agent.name,
            "seed": self.seed,
            "target": self.target.to_dict(),
            "directory": None if run is None else str(run.path),
        }

    def _prepared(
        self, options: SearchOptions, train: Any, validation_data: Any, test_data: Any
    ) -> _Prepared:
        model = unrolled_copy(self.model) if options.unroll else self.model
        # A shuffled dataset's order also depends on the global seed at the time it is made.
        tf.random.set_seed(self.seed)
        rows, batch_size = as_rows(train, "train", options.batch_size)
        weights = options.class_weight
        data = training_data(
            rows, model, batch_size=batch_size, seed=self.seed, class_weight=weights
        )
        check_repeatable(model, data.pool[0][0])
        compare(self.model, flat_inputs(self.model, data.pool[0][0]))
        if self.shuffle == "channels":
            model = permute_channels(
                model,
                group=self.group,
                sparsity=self.target.sparsity,
                seed=self.seed,
                exclude=tuple(self.selection.left),
            )
        validation = evaluation_data(validation_data, model, "validation_data")
        test = None if test_data is None else evaluation_data(test_data, model, "test_data")
        return _Prepared(
            options=options.resolved(data),
            model=model,
            rows=rows,
            train=data,
            validation=validation,
            test=test,
        )

    def loop_settings(self) -> LoopSettings:
        """What the episodes depend on beside the network."""
        from rl_sparsity_tf.search.episodes import LoopSettings

        return LoopSettings(
            agent=self.agent,
            reward=self.reward,
            buckets=self.buckets,
            seed=self.seed,
            warm_start=self.warm_start,
            curriculum=self.curriculum,
            policy=self.policy,
            hierarchy=self.hierarchy,
            strategy=self.strategy,
        )

    def _opened(self, data: _Prepared) -> contextlib.AbstractContextManager[RunDirectory | None]:
        """The run in the directory, if there is one, held until the search ends."""
        if self.directory is None:
            return contextlib.nullcontext()
        reward = self.reward
        described = reward.to_dict() if isinstance(reward, Reward) else name_of(reward)
        arguments = {
            "target": self.target.to_dict(),
            "agent": self.agent.to_dict(),
            "group": self.group,
            "shuffle": self.shuffle,
            "int4": self.int4,
            "seed": self.seed,
            "reward": described,
            "recovery": self.recovery.to_dict(),
            "metric": list(self.metric) if isinstance(self.metric, tuple) else self.metric,
            "buckets": self.buckets,
            "warm_start": self.warm_start,
            "curriculum": self.curriculum.to_dict(),
            "policy": self.policy and self.policy.digest,
            "hierarchy": self.hierarchy,
            # Runs from before there was a choice do not name it.
            "strategy": None if self.strategy == CONSTRUCT else self.strategy,
            "latency_table": None,
            "include": self.include and list(self.include),
            "exclude": self.exclude and list(self.exclude),
            **data.options.to_dict(),
        }
        if self.latency_table is not None:
            table = json.dumps(self.latency_table.to_dict())
            arguments["latency_table"] = sha256_of(table.encode())
        fingerprints = fingerprints_of(
            data.model, data.rows, data.train, data.validation, data.test
        )
        if self.selection.left:  # under other names patterns may match other layers
            kernels = find_kernels(self.model)
            fingerprints["decided"] = [one.path not in self.selection.left for one in kernels]
        if not isinstance(reward, Reward):
            fingerprints["reward_code"] = describe(reward)
        return RunDirectory(
            self.directory,
            arguments,
            fingerprints,
            data.options.overwrite,
            any_versions=data.options.any_versions,
        )

    def _network_maker(
        self, data: _Prepared, run: RunDirectory | None
    ) -> functools.partial[CompressedNetwork]:
        """Makes the network that is searched, or another with other decisions."""
        rows, seed = data.options.validation_rows, self.seed
        decisions = decisions_for(
            data.model,
            self.target,
            self.group,
            kept_table(data.model, self.target, run) or self.latency_table,
            data.options.quantization,
            self.shuffle,
            self.selection,
        )
        return functools.partial(
            CompressedNetwork,
            data.model,
            data.train,
            sample_rows(data.validation, rows, seed=seed, fixed=fixed_batch(data.model)),
            target=first_target(data.model, self.target),
            decisions=decisions,
            recovery=self.recovery,
            metric=self.metric,
            seed=seed,
        )

    def _choose_storage(
        self,
        plain: CompressedNetwork,
        build: functools.partial[CompressedNetwork],
        progress: SearchProgress,
    ) -> tuple[StorageChoice, StorageChooser | None]:
        """The network to begin with, and what chooses how kernels are stored, if that is open."""
        if self.group != AUTO:
            return StorageChoice(plain), None
        build = functools.partial(build, like=plain)
        chooser = StorageChooser(build=build, reward=self.reward, int4=self.int4, progress=progress)
        if self.target.max_accuracy_drop is not None:  # for every size anew
            return StorageChoice(plain), chooser
        choice = chooser.choose(plain)
        if choice.slow_int4 is not None:
            progress.say(f"note: {choice.slow_int4}")
        return choice, chooser
