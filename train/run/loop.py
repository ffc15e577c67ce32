"""The training run: builds everything, resumes, steps, reports, saves."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import jax

from train import parallel
from train.config import TrainConfig
from train.data.batches import TrainBatches, heldout_batches
from train.data.corpus import Corpus, choose_tokenizer, open_corpus
from train.data.tokenizer import Tokenizer
from train.errors import UserError
from train.evaluate import EvaluationReport, evaluate, make_evaluator
from train.run.checkpoint import (
    Checkpoints,
    SavedData,
    check_same_corpus,
    check_same_run,
    check_same_split,
    check_same_tokenizer,
)
from train.run.checkpoint_errors import check_writable, is_disk_full, making
from train.run.hooks import Hook, StopSignal
from train.run.metrics import MetricsWriter, Record, Speed, is_finite, to_record
from train.run.report import Reporter
from train.state import Program, TrainState, build_program
from train.step import Metrics

CACHE = "cache"  # directory in the workdir of what is made from text


@dataclasses.dataclass(frozen=True)
class RunResult:
    """How a run ended.

    Attributes:
      outcome: ``"finished"``, ``"stopped"`` by a signal, or ``"already-finished"`` before it began.
      step: optimizer steps done in all.
      checkpoint: the newest checkpoint; None if a signal came before the first step.
      evaluation: held-out figures after the last step.
    """

    outcome: Literal["finished", "stopped", "already-finished"]
    step: int
    checkpoint: Path | None
    evaluation: EvaluationReport | None = None


def run(config: TrainConfig, *, hooks: Sequence[Hook] = ()) -> RunResult:
    """Trains until ``config.steps``, from the newest complete checkpoint of the workdir if it has one.

    Args:
      config: the run.
      hooks: called besides the run's own (evaluation, checkpoints), before them.

    Raises:
      UserError: the configuration does not fit the machine, the corpus or the checkpoint; the loss is not
        finite; the disk is full. What was saved before stands.
    """
    config = dataclasses.replace(config, data=config.data.absolute())
    parallel.initialize_processes()
    parallel.check_batch(config)
    reporter = Reporter(config, primary=jax.process_index() == 0)
    try:
        checkpoints = Checkpoints(config.workdir, config.checkpoint)
        try:
            return _run(config, hooks, reporter, checkpoints)
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
    config: TrainConfig, hooks: Sequence[Hook], reporter: Reporter, checkpoints: Checkpoints
) -> RunResult:
    if checkpoints.ignored:
        reporter.say(f"ignoring half-written checkpoints: {', '.join(checkpoints.ignored)}")
    start = checkpoints.newest() or 0
    if start:
        check_same_run(checkpoints.config(start), config, checkpoints.path(start))
    cache = checkpoints.directory.parent / CACHE
    with making(cache.parent):
        check_writable(cache.parent)  # before the corpus is read
        tokenizer = _tokenizer(config, checkpoints, start, cache, reporter)
        if start >= config.steps:
            reporter.say(
                f"this run is finished: {start} of {config.steps} steps are done; --steps asks for more"
            )
            reporter.next_commands()
            return RunResult("already-finished", start, checkpoints.path(start))
        corpus = _corpus(config, checkpoints, start, tokenizer, cache, reporter)
    run = _Run(config, hooks, reporter, checkpoints, corpus, start)
    try:
        return run.train()
    finally:
        run.writer.close()


def _tokenizer(
    config: TrainConfig, checkpoints: Checkpoints, start: int, cache: Path, reporter: Reporter
) -> Tokenizer:
    """The tokenizer of the run; a resumed one must go on with the same one."""
    if not start:
        return choose_tokenizer(config.data, config.model.vocab_size, cache, say=reporter.say)
    saved = checkpoints.tokenizer(start)
    # A BPE fitted on the same data for the same vocabulary size is the same one: no need to fit it again.
    if (config.data.tokenizer, checkpoints.config(start).data.tokenizer) != ("bpe", "bpe"):
        given = choose_tokenizer(config.data, config.model.vocab_size, cache, say=reporter.say)
        check_same_tokenizer(saved, given, checkpoints.path(start))
    return saved


def _corpus(
    config: TrainConfig,
    checkpoints: Checkpoints,
    start: int,
    tokenizer: Tokenizer,
    cache: Path,
    reporter: Reporter,
) -> Corpus:
    """The corpus of the run; a resumed one must go on with the same one, unless it may change."""
    with reporter.tokenizing() as on_progress:
        corpus = open_corpus(config.data, tokenizer, cache, on_progress=on_progress, say=reporter.say)
        if start:
            saved = checkpoints.data(start).corpus
            if not config.data.accept_change:
                check_same_corpus(saved, corpus.identity, checkpoints.path(start))
            elif saved.threshold != corpus.identity.threshold:
                # What was trained on must not become held out.
                corpus = open_corpus(
                    config.data, tokenizer, cache, threshold=saved.threshold,
                    on_progress=on_progress, say=reporter.say,
                )  # fmt: skip
                check_same_split(saved, corpus.identity, checkpoints.path(start))
    return corpus


class _Run:
    """One run from its first step to its last."""

    def __init__(
        self,
        config: TrainConfig,
        hooks: Sequence[Hook],
        reporter: Reporter,
        checkpoints: Checkpoints,
        corpus: Corpus,
        start: int,
    ) -> None:
        self.config, self.reporter, self.checkpoints = config, reporter, checkpoints
        self.corpus, self.start = corpus, start
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
        # No checkpoint is made before the configuration, corpus and tokenizer have proved good.
        checkpoints.open()
        self.layout = parallel.Layout.over_all_devices(config.parallel)
        self.program: Program = build_program(config)
        self.evaluator = make_evaluator(self.program.graphdef)
        self.evaluation: EvaluationReport | None = None
        self.hooks = (
            *hooks,
            Hook(self.evaluate, config.report.evaluate_every),
            Hook(self.save, config.checkpoint.every, on_stop=True),
        )
        self.writer = MetricsWriter(
            Path(config.workdir).expanduser(),
            start=start,
            tensorboard=config.report.tensorboard,
            primary=jax.process_index() == 0,
        )
        self.speed = Speed(
            start=start, steps=config.steps, tokens_per_step=config.batch_size * context_length
        )

    def train(self) -> RunResult:
        """All steps that are left. Dispatches each before it reads the one before."""
        config = self.config
        self.reporter.begin(
            start=self.start, devices=jax.device_count(), device_kind=jax.devices()[0].device_kind
        )
        state = self._first_state()
        train_step = self.layout.compile_step(self.program)
        refresh_order = self.layout.order_refresh(self.program)
        pending: tuple[int, Metrics] | None = None
        with self.layout.step_scope(), StopSignal() as stop:
            for step in range(self.start + 1, config.steps + 1):
                tokens = self.layout.place(next(self.batches)["tokens"])
                state, metrics = train_step(refresh_order(step, state, tokens), tokens)
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
                            hook.action(step, state)
                self.checkpoints.check()
                if stopping:
                    break
            return self._end(step, finished=last)

    def _first_state(self) -> TrainState:
        if not self.start:
            return self.layout.compile_init(self.program)()
        abstract = self.program.abstract_state()
        placed = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            abstract,
            self.layout.state_shardings(abstract),
        )
        self.batches.seek(self.checkpoints.data(self.start).position)
        return self.checkpoints.restore(self.start, placed)

    def _read(self, step: int, metrics: Metrics) -> None:
        """Waits for a step's metrics, stops the run if they are not finite, else reports them."""
        record = to_record(step, metrics)
        if not is_finite(record):
            self._stop_at_bad_loss(record)
        self.speed.done(step)
        if step % self.config.report.every == 0 or step in (self.start + 1, self.config.steps):
            rate = self.speed.tokens_per_second(step)
            record |= {} if rate is None else {"tokens_per_second": rate}
            self.reporter.progress(record, tokens_per_second=rate, seconds_left=self.speed.seconds_left(step))
        self.writer.write(record)

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

    def save(self, step: int, state: TrainState) -> None:
        """Begins a checkpoint of ``state``, with its held-out CE if it has just been evaluated."""
        evaluated = self.evaluation if self.evaluation and self.evaluation.step == step else None
        self.checkpoints.save(
            state, SavedData(self.batches.position, self.corpus.identity), self.config, self.corpus.tokenizer,
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
