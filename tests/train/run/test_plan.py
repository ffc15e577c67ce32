"""A plan for each layer: what it follows, what it withstands, and a run that changes it on the way."""

import dataclasses
import re
import signal
import threading
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import programs
import pytest
import tiny_runs

from pallas_kernels import FFNOptions, device
from pallas_kernels.device import Device
from pallas_kernels.options import Dense, Panel
from sparse_lm import LayerPlan, ModelConfig, SparsityConfig
from train import cli
from train.config import CheckpointConfig, ReportConfig, TrainConfig
from train.run import figures, plan, planned_step
from train.run.hooks import Hook
from train.run.loop import run
from train.run.plan import Activity, Planner, Terrain
from train.run.planned_step import PlannedStep

TERRAIN = Terrain(num_layers=8, d_ff=5632, tokens=32768, panel=128, panels=256, chunk=128, break_even=0.55)
# Neurons that 128 tokens activate, as in a trained model of eight layers.
TRAINED = np.array([4241, 594, 590, 620, 1100, 1618, 2435, 4369])


def counted(union, running):
    """What a step counts where panels activate ``union`` neurons and lists without room run densely."""
    full = [
        isinstance(each, Dense) or each.capacity < u / 5632
        for each, u in zip(running.layouts, union, strict=True)
    ]
    record = {
        "l0_per_layer": [10.0] * 8,
        "pairs_per_layer": [256 * int(each) for each in union],
        "dense_tokens_per_layer": [32768 * each for each in full],
    }
    return Activity.of(record, TERRAIN)


def proposals(unions, window=2):
    """Steps at which another plan is proposed, and taken at once."""
    planner, running, found = Planner(TERRAIN, window), TERRAIN.start, {}
    for step, union in enumerate(unions, 1):
        if (proposed := planner.observe(counted(union, running), running)) is not None:
            found[step] = running = proposed[0]
            planner.restart()
    return found


def test_a_plan_has_panels_with_room_where_they_pay_and_few_segments():
    chosen, _ = plan.best(counted(TRAINED, TERRAIN.start), TERRAIN)
    assert isinstance(chosen.layouts[0], Dense)
    assert isinstance(chosen.layouts[7], Dense)
    for layout, union in zip(chosen.layouts[1:7], TRAINED[1:7], strict=True):
        assert isinstance(layout, Panel)
        assert 1.2 * union / 5632 < layout.capacity < 3 * union / 5632
    assert len(chosen.segments(first_alone=False)) <= 5
    assert plan.best(counted([3400] * 8, TERRAIN.start), TERRAIN)[0] == TERRAIN.start


def test_layers_that_are_no_loop_have_each_the_least_that_it_needs():
    unrolled = dataclasses.replace(TERRAIN, unrolled=True)
    activity = counted([400, 900] * 4, TERRAIN.start)
    (loop, _), (alone, _) = (plan.best(activity, terrain) for terrain in (TERRAIN, unrolled))
    assert alone == LayerPlan((Panel(128, 0.125), Panel(128, 0.25)) * 4)
    assert loop == LayerPlan((Panel(128, 0.25),) * 8)
    assert plan.cost(alone, activity, unrolled) < plan.cost(loop, activity, unrolled)
    assert plan.cost(loop, activity, TERRAIN) < plan.cost(alone, activity, TERRAIN)


@pytest.mark.parametrize(
    ("kind", "plan", "changes"),
    [
        ("NVIDIA H100 80GB HBM3", True, {}),
        ("NVIDIA A100", True, {}),
        ("NVIDIA A100", True, {"batch_size": 2}),
        ("NVIDIA H100 80GB HBM3", False, {"plan": "off"}),
        ("NVIDIA H100 80GB HBM3", False, {"batch_size": 1}),  # 1,024 tokens train densely
        ("NVIDIA H100 80GB HBM3", False, {"ffn": FFNOptions("dense")}),
        ("NVIDIA H100 80GB HBM3", False, {"ffn": FFNOptions("panel")}),
        ("NVIDIA H100 80GB HBM3", False, {"dtype": "float32"}),
        ("NVIDIA H100 80GB HBM3", False, {"activation": "silu", "sparsity": SparsityConfig(l1=0.0)}),
        ("TPU v5", False, {}),
        ("cpu", False, {}),
    ],
)
def test_a_run_has_a_plan_where_auto_would_decide(monkeypatch, kind, plan, changes):
    """Unasked, as plans are the default."""
    gpu = Device("gpu", kind, 90 if "H100" in kind else 80, 132)
    found = gpu if "NVIDIA" in kind else Device(kind.split()[0].lower(), kind, 0, 0)
    monkeypatch.setattr(device, "current", lambda: found)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    model = ModelConfig(vocab_size=257, d_model=2048, d_ff=5632, num_layers=2, context_length=1024)
    of_model = {name: value for name, value in changes.items() if hasattr(model, name)}
    of_run = {name: value for name, value in changes.items() if name not in of_model}
    model = dataclasses.replace(model, **of_model)
    assert (Terrain.of(TrainConfig(**{"batch_size": 8, "model": model} | of_run)) is not None) == plan


@pytest.mark.parametrize(("loop", "unrolled"), [("auto", False), ("scan", False), ("unrolled", True)])
def test_the_terrain_of_a_run_knows_whether_its_layers_are_loops(loop, unrolled):
    model = dataclasses.replace(
        tiny_runs.MODEL, ffn=FFNOptions("auto(tokens=16)", backend="interpret"), layer_loop=loop
    )
    config = tiny_runs.tiny_config(Path("corpus"), Path("run"), model=model, plan="auto")
    assert Terrain.of(config).unrolled == unrolled


def test_a_plan_follows_the_activity():
    dense, sparse = np.full(8, 5000), TRAINED
    found = proposals([dense] * 9 + [sparse] * 9 + [dense] * 9)
    down, up = found
    assert 12 <= down <= 14  # the window that it began in, and two more
    assert found[down] == plan.best(counted(sparse, TERRAIN.start), TERRAIN)[0]
    assert 22 <= up <= 24
    assert found[up] == TERRAIN.start


def test_neither_a_moment_nor_a_balance_changes_a_plan():
    assert proposals([np.full(8, 5000), np.full(8, 5000), TRAINED, TRAINED] * 5) == {}
    rng = np.random.default_rng(0)
    assert len(proposals([TRAINED * rng.uniform(0.9, 1.1, 8) for _ in range(40)])) == 1
    about_even = [np.full(8, 0.57 * 5632) * rng.uniform(0.9, 1.1, 8) for _ in range(40)]
    assert proposals(about_even) == {}


def test_a_layer_without_room_gets_more():
    first, second = proposals([TRAINED] * 6 + [TRAINED * [1, 1, 2.5, 1, 1, 1, 1, 1]] * 6).values()
    assert first.layouts[2].capacity < 2.5 * TRAINED[2] / 5632 < second.layouts[2].capacity


def test_a_saved_plan_is_taken_up_where_it_fits():
    chosen, _ = plan.best(counted(TRAINED, TERRAIN.start), TERRAIN)
    assert TERRAIN.saved(chosen.texts) == chosen
    for other in (None, chosen.texts[1:], ["panel(tokens=64)"] * 8, ["hybrid"] * 8):
        assert TERRAIN.saved(other) == TERRAIN.start


# -- the step ----------------------------------------------------------------------------------------------


class Compiled:
    """A step that returns the plan it is of, and takes 2 GiB."""

    def __init__(self, plan):
        self.plan = plan

    def __call__(self, state, tokens):
        return state, self.plan

    def memory_analysis(self):
        return SimpleNamespace(
            argument_size_in_bytes=1 << 30, alias_size_in_bytes=1 << 30, output_size_in_bytes=1 << 30,
            temp_size_in_bytes=1 << 30,
        )  # fmt: skip


class Compiling:
    """A layout whose compilations end when they are told to."""

    def __init__(self, error=None):
        self.go, self.error = threading.Event(), error

    def compile_step(self, program):
        return Compiled(program)

    def compiled_step(self, program, tokens):
        self.go.wait()
        if self.error is not None:
            raise self.error
        return self.compile_step(program)


def stepped(error=None, loss=1.0, **options):
    """Ten steps of one loss; the compilation that the first ones ask for ends behind the seventh, or in the
    third if that waits for it."""
    layout, said = Compiling(error), []
    program = SimpleNamespace(with_plan=lambda chosen: str(chosen))
    planner = Planner(TERRAIN, window=1)
    step = PlannedStep(layout, program, planner, TERRAIN.start, say=said.append, agree_every=1, **options)
    ran = []
    for n in range(1, 11):
        if n == 3 and options.get("wait"):
            threading.Timer(0.1, layout.go.set).start()
        _, plan_of_step = step(n, None, np.zeros((2, 3), np.int32))
        ran.append(plan_of_step)
        counts = counted(TRAINED, LayerPlan.parse(TERRAIN.start.texts))
        record = {"step": n, "loss": loss, "grad_norm": 1.0, "l0_per_layer": counts.nnz.tolist()}
        record |= {"pairs_per_layer": counts.union * 256, "dense_tokens_per_layer": counts.dense * 32768}
        assert step.observe(record)["plan"] == plan_of_step
        if n == 7:
            layout.go.set()
            step._compiler.submit(int).result()
    step.close()
    return ran, [text for text in said if isinstance(text, str)], step


def test_another_plan_is_compiled_beside_the_steps_and_taken_when_it_is_ready():
    ran, said, step = stepped()
    chosen = plan.best(counted(TRAINED, TERRAIN.start), TERRAIN)[0]
    assert ran == [str(TERRAIN.start)] * 7 + [str(chosen)] * 3
    assert step.plan == chosen
    assert said[0] == f"step 2: compiling other formats for the layers: {chosen}"
    assert said[1] == f"step 8: layers run as {chosen}"


def test_a_step_waits_for_a_plan_if_asked_to():
    ran, said, step = stepped(wait=True)
    assert ran == [str(TERRAIN.start)] * 2 + [str(step.plan)] * 8
    assert said[1] == f"step 3: layers run as {step.plan}"
    failed, said, _ = stepped(ValueError("no room"), wait=True)
    assert failed == [str(TERRAIN.start)] * 10
    assert said[1].startswith("step 3: the layers keep their formats")


def test_no_plan_follows_steps_that_are_left_out():
    ran, said, _ = stepped(loss=np.nan)
    assert (ran, said) == ([str(TERRAIN.start)] * 10, [])


def test_a_plan_that_cannot_be_compiled_is_one_sentence():
    ran, said, _ = stepped(ValueError("shared memory is short\nand more"))
    assert ran == [str(TERRAIN.start)] * 10
    assert [line.partition(":")[0] for line in said] == ["step 2", "step 8"]
    assert "the layers keep their formats; the others cannot run here (shared memory is short" in said[1]


def test_a_plan_that_another_process_cannot_run_is_dropped(monkeypatch):
    """Also by one that is still compiling it."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    answers = [planned_step._PENDING, planned_step._FAILED]
    monkeypatch.setattr(
        planned_step.multihost_utils, "process_allgather", lambda own: np.array([own, answers.pop(0)])
    )
    ran, said, _ = stepped()
    assert ran == [str(TERRAIN.start)] * 10
    assert said[1] == "step 4: the layers keep their formats; the others cannot run here"


@pytest.mark.parametrize(("limit", "taken"), [(1 << 30, False), (3 << 30, True)])
def test_a_plan_without_room_in_the_devices_memory_is_not_begun(monkeypatch, limit, taken):
    """Its first step would end the run, with the state's buffers gone."""
    monkeypatch.setattr(planned_step, "device_limit", lambda: limit)
    ran, said, step = stepped()
    assert (step.plan == TERRAIN.start) != taken
    assert ran[7:] == [str(step.plan)] * 3
    assert ("the others cannot run here (a step would take 2 GiB of 1 GiB on a device" in said[1]) != taken


# -- a run -------------------------------------------------------------------------------------------------

PANELS = LayerPlan((Panel(16, 1.0), Panel(16, 1.0)))


class AtOnce:
    """Compiles where it is asked to, so that a run of milliseconds has a plan to take."""

    def __init__(self, *_, **__): ...

    def submit(self, function, *arguments):
        future = Future()
        future.set_result(function(*arguments))
        return future

    def shutdown(self, **_): ...


@pytest.fixture(scope="module")
def planned(corpus, tmp_path_factory):
    """Eight steps: dense at first, panels from the third step on, stopped behind the fifth and resumed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planned_step, "ThreadPoolExecutor", AtOnce)
        patch.setattr(plan, "best", lambda activity, terrain: (PANELS, 0.0))
        workdir = tmp_path_factory.mktemp("planned")
        config = config_of(corpus, workdir, FFNOptions("auto(tokens=16)", backend="interpret"))
        states, saved = {}, []

        def stop(step, state):
            states[step] = tiny_runs.snapshot(state)
            if step == 4:
                signal.raise_signal(signal.SIGTERM)

        saved.append(run(config, hooks=(Hook(stop, 1, on_stop=True),)))
        saved.append(run(config, hooks=(Hook(stop, 1, on_stop=True),)))
        return workdir, states, saved


def config_of(corpus, workdir, ffn):
    return tiny_runs.tiny_config(
        corpus, workdir, model=dataclasses.replace(tiny_runs.MODEL, ffn=ffn), plan="auto", plan_every=1,
        checkpoint=CheckpointConfig(every=100),
        report=ReportConfig(every=1, evaluate_every=0, evaluate_tokens=128),
    )  # fmt: skip


def test_a_run_takes_a_plan_saves_it_and_resumes_with_it(planned):
    workdir, _, results = planned
    assert [(result.outcome, result.step) for result in results] == [("stopped", 5), ("finished", 8)]
    records = [record for record in tiny_runs.read_records(workdir) if "ce" in record]
    dense, panels = str(LayerPlan((Dense(16), Dense(16)))), str(PANELS)
    assert [record["plan"] for record in records] == [dense] * 2 + [panels] * 6
    for record in records:
        assert len(record["union_per_layer"]) == 2
        assert record["l0"] <= np.mean(record["union_per_layer"]) <= 64
        assert record["dense_tokens_per_layer"] == ([128, 128] if record["plan"] == dense else [0, 0])


def test_the_figures_of_a_run_have_its_plans(planned):
    workdir, _, _ = planned
    found = figures.read(workdir)
    assert found["plans"] == [
        {"step": 1, "plan": str(LayerPlan((Dense(16), Dense(16))))},
        {"step": 3, "plan": str(PANELS)},
    ]
    assert found["last"]["dense_share_per_layer"] == [2 / 8, 2 / 8]
    assert all(0 < union <= 64 for union in found["last"]["union_per_layer"])


@pytest.mark.timeout(120)
def test_a_run_that_ends_does_not_wait_for_a_plan_that_is_being_compiled(corpus, tmp_path):
    """XLA compiles in its thread for as long as the process lives."""
    code = """if True:
        from train import cli
        from train.parallel import Layout
        from train.run import plan
        from sparse_lm import LayerPlan

        compiled_step = Layout.compiled_step

        def endless(self, program, tokens):
            while True:
                compiled_step(self, program, tokens)

        Layout.compiled_step = endless
        plan.best = lambda activity, terrain: (LayerPlan.parse(["panel(tokens=16)"]), 0.0)
        cli.run()
    """
    words = programs.train(
        corpus, tmp_path, "--model.ffn.format", "auto(tokens=16)", "--model.ffn.backend", "interpret",
        "--plan", "auto", "--plan-every", "1", "--report.every", "1", "--steps", "1000000",
        "--checkpoint.every", "1000000",
    )  # fmt: skip
    with programs.start_python(["-c", code, *words]) as process:
        programs.wait_for_line(process, "compiling other formats for the layers: panel(tokens=16)")
        process.send_signal(signal.SIGTERM)
        out, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (0, "SIGTERM: saving after this step; once more to exit at once\n")
    assert re.search(r"stopped by a signal after step (\d+) of 1000000, saved at .*\n$", out), out


def test_a_moving_plan_trains_the_curve_of_the_dense_layer(planned, corpus, tmp_path):
    _, states, _ = planned
    config = config_of(corpus, tmp_path, FFNOptions("dense"))
    _, dense = tiny_runs.run_recording(config)
    assert not [record for record in tiny_runs.read_records(Path(config.workdir)) if "plan" in record]
    for step, expected in dense.items():
        jax.tree.map(
            partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), states[step].params, expected.params
        )


PLANNED_BY_PROGRAM = ("--model.ffn.format", "auto(tokens=16)", "--model.ffn.backend", "interpret")


def test_a_run_without_plans_resumes_with_them(corpus, tmp_path, capsys):
    """As a run does that began when plans were no default."""
    words = programs.train(corpus, tmp_path, *PLANNED_BY_PROGRAM, "--report.evaluate-every", "0")
    assert cli.main([*words, "--plan", "off", "--steps", "2"]) == 0
    assert "layers run as" not in capsys.readouterr().out
    assert cli.main([*words, "--steps", "4"]) == 0
    said = capsys.readouterr().out
    assert "resuming after step 2 of 4\n" in said
    assert "changed on resume: plan is 'auto', was 'off'\n" in said
    assert "layers run as dense(tokens=16), which may change with their activity\n" in said
    records = [record for record in tiny_runs.read_records(tmp_path) if "ce" in record]
    assert [record.get("plan") for record in records] == [None] * 2 + ["dense(tokens=16)"] * 2


@pytest.mark.timeout(120)
def test_processes_take_a_plan_in_the_same_step(corpus, tmp_path):
    """One has compiled it at once, the other in the tenth step: both ask at every fourth."""
    code = """if True:
        import jax
        from concurrent.futures import Future

        from sparse_lm import LayerPlan
        from train import cli
        from train.run import plan, planned_step

        waiting = []

        class Compiler:
            def __init__(self, *_, **__): ...
            def shutdown(self, **_): ...
            def submit(self, function, *arguments):
                waiting.append((Future(), function(*arguments)))
                if jax.process_index() == 0:
                    waiting[0][0].set_result(waiting[0][1])
                return waiting[0][0]

        run_step = planned_step.PlannedStep.__call__

        def told(self, step, *arguments):
            if step == 10 and jax.process_index() == 1:
                waiting[0][0].set_result(waiting[0][1])
            result = run_step(self, step, *arguments)
            print(f"ran {step} {self.plan}\\n", end="", flush=True)
            return result

        planned_step.ThreadPoolExecutor = Compiler
        planned_step.PlannedStep.__call__ = told
        plan.best = lambda activity, terrain: (LayerPlan.parse(["panel(tokens=16)"]), 0.0)
        cli.run()
    """
    words = programs.train(
        corpus, tmp_path, *PLANNED_BY_PROGRAM, "--plan-every", "1", "--report.every", "4", "--steps", "14",
        "--report.evaluate-every", "0",
    )  # fmt: skip
    with programs.start_together(["-c", code, *words], 2, python=True) as processes:
        ends = [process.communicate(timeout=100) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ends
    ran = [[line.split() for line in out.splitlines() if line.startswith("ran ")] for out, _ in ends]
    dense, panels = "dense(tokens=16)", "panel(tokens=16)"
    expected = [["ran", str(step), dense if step < 12 else panels] for step in range(1, 15)]
    assert ran == [expected, expected]
