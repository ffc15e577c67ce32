"""The training run: builds everything, resumes, steps, reports, saves."""

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import jax
import numpy as np
from flax import nnx

from sparse_lm import LayerPlan
from train import parallel
from train.config import TrainConfig
from train.config_json import changed_fields
from train.data.batches import TrainBatches, heldout_batches
from train.data.corpus import Corpus
from train.errors import UserError
from train.evaluate import EvaluationReport, evaluate, make_evaluator
from train.lost_process import losing_no_process
from train.run import background_errors, compilation_cache
from train.run.begin import check_trainable, held, run_corpus, run_tokenizer
from train.run.checkpoint import Checkpoints
from train.run.checkpoint_errors import check_writable, is_disk_full, making
from train.run.checkpoint_files import check_local
from train.run.checkpoint_reading import SavedData
from train.run.hooks import Clock, Hook, StopSignal
from train.run.manifest import Manifest, Parent, check_others, schedule_jumps, steers_anew
from train.run.manifest import write as write_manifest
from train.run.metrics import MetricsWriter, Record, Speed, is_finite, to_record
from train.run.parent import check_child, choose_parent, with_weights_of
from train.run.plan import Planner, Terrain
from train.run.planned_step import PlannedStep
from train.run.profile import DIRECTORY as PROFILE
from train.run.profile import ProfileWindow
from train.run.report import Reporter
from train.run.resume_checks import check_same_run
from train.run.samples import Samples
from train.run.step_memory import device_limit, step_memory
from train.run.wandb_sink import WandbSink
from train.state import Program, TrainState, build_program
from train.step import Metrics

CACHE = "cache"  # directory in the workdir of what is made from text


@dataclasses.dataclass(frozen=True)
class RunResult:
    """How a run ended.

    Attributes:
      outcome: ``"finished"``, ``"stopped"`` by a signal, or ``"already-finished"`` or a ``"dry-run"`` before
        it began.
      step: optimizer steps done in all.
      checkpoint: the newest checkpoint, if there is one.
      evaluation: held-out figures after the last step.
    """

    outcome: Literal["finished", "stopped", "already-finished", "dry-run"]
    step: int
    checkpoint: Path | None
    evaluation: EvaluationReport | None = None


def run(
    config: TrainConfig,
    *,
    source: str | None = None,
    hooks: Sequence[Hook] = (),
    dry_run: bool = False,
    cache: Path | None = None,
) -> RunResult:
    """Trains until ``config.steps``, from the newest complete checkpoint of the workdir if it has one.

    Args:
      config: the run.
      source: begin with the weights of this checkpoint (`choose_parent`), in place of random ones.
      hooks: called besides the run's own (evaluation, checkpoints), before them.
      dry_run: stop where the first step would be: everything is checked and shown, and no run is begun.
      cache: directory of what is made from text, for runs that share it; by default one in the workdir.

    Raises:
      UserError: the configuration does not fit the machine, the corpus, the checkpoint or the source; the
        loss is not finite; the disk is full. What was saved before stands.
    """
    check_local("workdir", config.workdir)
    check_trainable(config)
    config = dataclasses.replace(config, data=config.data.absolute())
    parallel.initialize_processes()
    parallel.check_devices()
    config = config.on_devices(jax.device_count())
    parallel.check_batch(config)
    parent = choose_parent(config, source)  # before anything is made in the workdir
    reporter = Reporter(config, primary=jax.process_index() == 0)
    try:
        holding = contextlib.nullcontext() if dry_run else held(config, reporter)
        compiled = compilation_cache.kept(config.compilation_cache)
        with background_errors.kept_quiet(), losing_no_process(), compiled, holding:
            checkpoints = Checkpoints(config.workdir, config.checkpoint)
            try:
                return _run(config, parent, hooks, reporter, checkpoints, dry_run, cache)
            finally:
                checkpoints.close()
    except OSError as error:
        if is_disk_full(error):
            raise UserError(
                f"the disk is full: {config.workdir} could not be written to, earlier checkpoints are "
                "intact: free some space and run the same command again"
            ) from error
        raise


def _run(
    config: TrainConfig,
    parent: Parent | None,
    hooks: Sequence[Hook],
    reporter: Reporter,
    checkpoints: Checkpoints,
    dry_run: bool,
    shared_cache: Path | None,
) -> RunResult:
    if checkpoints.ignored:
        reporter.say(f"ignoring half-written checkpoints: {', '.join(checkpoints.ignored)}")
    start = checkpoints.newest() or 0
    if start:
        check_same_run(checkpoints.config(start), config, checkpoints.path(start))
    elif parent is not None:
        check_child(config, parent)
    workdir = checkpoints.directory.parent
    cache = shared_cache or workdir / CACHE
    with making(cache.parent):
        check_writable(workdir)  # before the corpus is read
        check_others(workdir)
        tokenizer = run_tokenizer(config, checkpoints, start, parent, cache, reporter)
        if start >= config.steps:
            reporter.say(
                f"this run is finished: {start} of {config.steps} steps are done; --steps asks for more"
            )
            reporter.next_commands()
            return RunResult("already-finished", start, checkpoints.path(start))
        corpus = run_corpus(config, checkpoints, start, tokenizer, cache, reporter)
    run = _Run(config, parent, hooks, reporter, checkpoints, corpus, start)
    run.check_memory(always=dry_run)
    if dry_run:
        run.show()
        reporter.say("dry run: no step was taken")
        return RunResult("dry-run", start, checkpoints.path(start) if start else None)
    with contextlib.closing(run.open()):
        return run.train()


class _Run:
    """One run from its first step to its last."""

    def __init__(
        self,
        config: TrainConfig,
        parent: Parent | None,
        hooks: Sequence[Hook],
        reporter: Reporter,
        checkpoints: Checkpoints,
        corpus: Corpus,
        start: int,
    ) -> None:
        self.config, self.reporter, self.checkpoints = config, reporter, checkpoints
        self.corpus, self.start, self.parent = corpus, start, parent
        share = {"process_index": jax.process_index(), "process_count": jax.process_count()}
        context_length = config.model.context_length
        self.batches = TrainBatches(
            corpus, context_length=context_length, batch_size=config.batch_size, seed=config.seed, **share
        )
        self.heldout = heldout_batches(
            corpus.heldout,
            corpus.weights,
            context_length=context_length,
            tokens=config.report.evaluate_tokens,
            batch_size=config.batch_size // config.optimizer.accumulation,
            devices=jax.device_count(),
            **share,
        )
        self.samples = Samples(config, corpus.tokenizer)
        self.layout = parallel.Layout.over_all_devices(config.parallel)
        self.program: Program = build_program(config)
        self.evaluator = make_evaluator(self.program.graphdef)
        self.evaluation: EvaluationReport | None = None
        self.hooks = (
            *hooks,
            Hook(self.evaluate, config.report.evaluate_every),
            *([Hook(self.sample, config.report.evaluate_every)] if config.report.samples else []),
            Hook(
                self.save,
                config.checkpoint.every,
                clock=Clock(config.checkpoint.minutes, agree_every=config.report.every),
                on_stop=True,
            ),
        )
        self.skipped = 0  # steps in a row
        self.speed = Speed(
            start=start, steps=config.steps, tokens_per_step=config.batch_size * context_length
        )

        self.manifest = Manifest.of(
            self.program, corpus.identity, start=start, parent=parent,
            evaluated_tokens=sum(int(batch["rows"]) for batch in self.heldout) * context_length,
        )  # fmt: skip
        before = checkpoints.config(start) if start else config
        self.changes = changed_fields(before, config)
        self.jumps = schedule_jumps(before, config, start)

    def check_memory(self, *, always: bool) -> None:
        """Refuses a step that the devices have no room for, where they say how much they have; ``always``
        counts what it takes."""
        limit = device_limit()
        if always or limit is not None:
            plan = self._first_plan(Terrain.of(self.config))
            memory = step_memory(self.layout, self.program.with_plan(plan) if plan else self.program, limit)
            self.manifest = dataclasses.replace(self.manifest, step_memory=memory)
            if memory is not None:
                memory.check(self.config)

    def show(self) -> None:
        """Says what the run is, before its first step."""
        self.reporter.begin(self.manifest, self.changes, self.jumps)

    def open(self) -> MetricsWriter:
        """Makes what the run writes into; only now have configuration, corpus and tokenizer proved good."""
        workdir, primary = Path(self.config.workdir).expanduser(), jax.process_index() == 0
        if self.checkpoints.abandoned:
            names = ", ".join(self.checkpoints.abandoned)
            self.reporter.say(f"removing what a killed run left of checkpoints: {names}")
        self.checkpoints.open()
        sinks = []
        if primary:
            run_id = write_manifest(workdir, self.manifest, self.changes)
            if self.config.report.wandb:
                sinks = [WandbSink(self.config, workdir, run_id)]
        self.writer = MetricsWriter(
            workdir,
            start=self.start,
            tensorboard=self.config.report.tensorboard,
            primary=primary,
            sinks=sinks,
        )
        return self.writer

    def train(self) -> RunResult:
        """All steps that are left. Dispatches each before it reads the one before."""
        config = self.config
        self.show()
        state = self._first_state()
        self.step = self._planned_step()
        refresh_order = self.layout.order_refresh(self.program)
        pending: tuple[int, Metrics] | None = None
        window = ProfileWindow(config.report.profile_steps, Path(config.workdir).expanduser() / PROFILE)
        with self.layout.step_scope(), StopSignal() as stop, window, contextlib.closing(self.step):
            for step in range(self.start + 1, config.steps + 1):
                window.before(step)
                tokens = self.layout.place(next(self.batches)["tokens"])
                state, metrics = self.step(step, refresh_order(step, state, tokens), tokens)
                window.after(step, metrics)
                if pending is not None:
                    self._read(*pending)
                pending = step, metrics
                last = step == config.steps
                stopping = stop.reached(step) and not last
                due = [hook for hook in self.hooks if hook.due(step, last=last, stopping=stopping)]
                if due:
                    # A bad step must be known before anything is made of its state.
                    self._read(*pending)
                    pending = None
                    with self.speed.pause():
                        for hook in due:
                            hook.call(step, state)
                self.checkpoints.check()
                if stopping:
                    break
            return self._end(step, finished=last)

    def _first_plan(self, terrain: Terrain | None) -> LayerPlan | None:
        if terrain is None:
            return None
        return terrain.saved(self.checkpoints.data(self.start).plan if self.start else None)

    def _planned_step(self) -> PlannedStep:
        planner, terrain = None, Terrain.of(self.config)
        plan = self._first_plan(terrain)
        if terrain is not None:
            planner = Planner(terrain, self.config.plan_every)
            self.reporter.say(f"layers run as {plan}, which may change with their activity")
        every = self.config.report.every
        return PlannedStep(self.layout, self.program, planner, plan, say=self.reporter.say, agree_every=every)

    def _first_state(self) -> TrainState:
        abstract = self.program.abstract_state()
        placed = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            abstract,
            self.layout.state_shardings(abstract),
        )
        if not self.start:
            state = self.layout.compile_init(self.program)()
            return state if self.parent is None else with_weights_of(self.parent, state, placed)
        self.batches.seek(self.checkpoints.data(self.start).position)
        state = self.checkpoints.restore(self.start, placed)
        sparse = self.config.model.sparsity
        if sparse.schedule != "target" or steers_anew(self.changes, self.config):
            coefficient = np.float32(sparse.l1)
            state = dataclasses.replace(
                state, l1_coefficient=jax.device_put(coefficient, placed.l1_coefficient.sharding)
            )
        return state

    def _read(self, step: int, metrics: Metrics) -> None:
        """Waits for a step's metrics, stops the run if they are not finite, else reports them."""
        record = self.step.observe(to_record(step, metrics))
        if is_finite(record):
            self.skipped = 0
        else:
            self._skip_or_stop(record)
        self.speed.done(step)
        if step % self.config.report.every == 0 or step in (self.start + 1, self.config.steps):
            rate = self.speed.tokens_per_second(step)
            record |= {} if rate is None else {"tokens_per_second": rate}
            self.reporter.progress(record, tokens_per_second=rate, seconds_left=self.speed.seconds_left(step))
        self.writer.write(record)

    def _skip_or_stop(self, record: Record) -> None:
        """Says that the step was left out, or stops the run if too many were in a row."""
        self.skipped += 1
        most = self.config.optimizer.skip_nonfinite
        if self.skipped > most:
            self._stop_at_bad_loss(record)
        self.reporter.say(
            f"step {record['step']} is left out: the loss is {record['loss']} and the gradient norm "
            f"{record['grad_norm']} (in a row: {self.skipped} of at most {most})"
        )

    def _stop_at_bad_loss(self, record: Record) -> None:
        self.checkpoints.wait()
        newest = self.checkpoints.newest()
        good = (
            f"the last good checkpoint is {self.checkpoints.path(newest)}" if newest else "none was saved yet"
        )
        raise UserError(
            f"training stopped at step {record['step']}: the loss is {record['loss']} and the gradient norm "
            f"{record['grad_norm']}, both must be finite; {good}: lower optimizer.learning-rate or "
            "model.sparsity.l1 and run again"
        )

    def evaluate(self, step: int, state: TrainState) -> None:
        """Held-out evaluation of ``state``, into the metrics file and one line."""
        with self.layout.scope():
            self.evaluation = report = evaluate(
                self.evaluator, state.variables, self.heldout,
                step=step, d_ff=self.config.model.d_ff, place=self.layout.place_global,
            )  # fmt: skip
        self.writer.write({"step": step, "evaluation": report.to_dict()})
        self.reporter.say(
            f"step {step}: held-out ce {report.ce:.4f}, perplexity {report.perplexity:.2f}, "
            f"{report.bits_per_byte:.3f} bits per byte, l0 {report.l0:.1f} ({report.l0 / report.d_ff:.1%})"
        )

    def sample(self, step: int, state: TrainState) -> None:
        """Continues ``report.samples`` with the model as it is, into the metrics file and a line each."""
        with self.layout.scope():
            model = nnx.merge(self.program.graphdef, state.variables)
            texts = self.samples.continued(model, seed=step)
        self.writer.write({"step": step, "samples": texts})
        for text in texts:
            self.reporter.say(f"step {step}: {text}")

    def save(self, step: int, state: TrainState) -> None:
        """Begins a checkpoint of ``state``, with its held-out CE if it has just been evaluated."""
        evaluated = self.evaluation if self.evaluation and self.evaluation.step == step else None
        plan = tuple(self.step.plan.texts) if self.step.plan else None
        data = SavedData(self.batches.position, self.corpus.identity, plan)
        self.checkpoints.save(
            state, data, self.config, self.corpus.tokenizer,
            step=step, heldout_ce=evaluated.ce if evaluated else None,
        )  # fmt: skip

    def _end(self, step: int, *, finished: bool) -> RunResult:
        self.checkpoints.wait()
        path = self.checkpoints.path(step)
        if not finished:
            self.reporter.say(
                f"stopped by a signal after step {step} of {self.config.steps}, saved at {path}: "
                "the same command goes on from there"
            )
            return RunResult("stopped", step, path)
        assert self.evaluation is not None
        self.reporter.say(self.evaluation.table())
        self.reporter.next_commands()
        return RunResult("finished", step, path, self.evaluation)
