"""Every way of spreading a step over devices gives the step of one device."""

import dataclasses
import shutil
import socket
from collections.abc import Callable

import jax
import numpy as np
import programs
import pytest
import tiny_runs
from jax.sharding import AxisType

from train.config import ParallelConfig
from train.errors import UserError
from train.parallel import AXIS, Layout, check_batch, initialize_processes
from train.state import TrainState, build_program, is_matrix

TOKENS = np.random.default_rng(0).integers(0, 257, (8, 17)).astype(np.int32)
LAYOUTS = {
    "data-parallel": ParallelConfig(),
    "zero1": ParallelConfig(shard="zero1"),
    "fsdp": ParallelConfig(shard="fsdp"),
    "pmap": ParallelConfig(mode="pmap"),
}


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return build_program(
        tiny_runs.tiny_config(tmp_path_factory.mktemp("none"), tmp_path_factory.mktemp("none"))
    )


@pytest.fixture(scope="module")
def steps(program) -> Callable[[Layout], tuple[TrainState, TrainState, list]]:
    """First state, state after two steps, and the metrics of both, of a layout."""

    def two_steps(layout: Layout):
        with layout.step_scope():
            state = layout.compile_init(program)()
            first = tiny_runs.snapshot(state)
            train_step = layout.compile_step(program)
            history = []
            for rotation in range(2):
                state, metrics = train_step(state, layout.place(np.roll(TOKENS, rotation, axis=1)))
                history.append(jax.device_get(metrics))
        return first, state, history

    return two_steps


@pytest.fixture(scope="module")
def alone(steps):
    mesh = jax.make_mesh((1,), (AXIS,), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
    return steps(Layout(ParallelConfig(), mesh))


@pytest.fixture(scope="module", params=LAYOUTS)
def together(request, steps):
    """The four simulated devices under one layout: its name and what its steps gave."""
    assert jax.device_count() == 4
    return request.param, *steps(Layout.over_all_devices(LAYOUTS[request.param]))


def test_first_state_does_not_depend_on_the_layout(together, alone):
    jax.tree.map(np.testing.assert_array_equal, together[1], alone[0])


def test_state_after_two_steps_is_that_of_one_device(together, alone):
    # Sums over 4 devices in another order: f32 rounding, 2^-23 of weights and moments of at most about 1.
    jax.tree.map(
        lambda found, expected: np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-6),
        tiny_runs.snapshot(together[2]),
        tiny_runs.snapshot(alone[1]),
    )


def test_metrics_are_those_of_one_device(together, alone):
    for found, expected in zip(together[3], alone[2], strict=True):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=2e-5, atol=1e-6, err_msg=name)


def test_state_is_split_as_promised(together):
    name, _, state, _ = together

    def share(tree) -> float:
        """The largest part of any matrix that one device holds."""
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        matrices = [leaf for path, leaf in leaves if leaf.ndim >= 2 and is_matrix(path)]
        return max(leaf.addressable_shards[0].data.size / leaf.size for leaf in matrices)

    expected = {"data-parallel": (1, 1), "zero1": (1, 0.25), "fsdp": (0.25, 0.25), "pmap": (1, 1)}
    assert (share(state.params), share(state.opt_state)) == expected[name]


def test_batch_that_does_not_divide_is_refused_with_the_numbers(finished):
    config = dataclasses.replace(finished.config, batch_size=12)
    with pytest.raises(
        UserError, match=r"devices × optimizer.accumulation = 4 × 2 = 8; got 12: choose 8 or 16"
    ):
        check_batch(config)
    with pytest.raises(UserError, match=r"got 4: choose 8$"):
        check_batch(dataclasses.replace(config, batch_size=4))
    check_batch(dataclasses.replace(config, batch_size=16))


def test_half_a_description_of_the_processes_is_refused(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1234")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(
        UserError, match=r"JAX_NUM_PROCESSES='two', JAX_PROCESS_ID=None: set all three or none"
    ):
        initialize_processes()


def run_two_processes(corpus, workdir) -> list[str]:
    """What each of two processes with two devices printed; both end well."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    processes = [
        tiny_runs.start_process(
            corpus,
            workdir,
            mode="plain",
            environment={
                "XLA_FLAGS": programs.xla_flags(devices=2),
                "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": str(index),
            },
        )
        for index in range(2)
    ]
    outputs = [process.communicate(timeout=150)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    return outputs


@pytest.mark.timeout(180)
def test_two_processes_train_the_same_model(finished, corpus, tmp_path):
    outputs = run_two_processes(corpus, tmp_path)
    assert "step 8/8" in outputs[0]
    assert "step" not in outputs[1]
    found, expected = (tiny_runs.read_records(path) for path in (tmp_path, finished.workdir))
    assert [record["step"] for record in found] == [record["step"] for record in expected]
    for name in ("ce", "l1", "l0", "grad_norm"):
        values = [[record[name] for record in records if name in record] for records in (found, expected)]
        np.testing.assert_allclose(*values, rtol=2e-5, err_msg=name)
    evaluations = [
        [r["evaluation"]["ce"] for r in records if "evaluation" in r] for records in (found, expected)
    ]
    np.testing.assert_allclose(*evaluations, rtol=2e-5)


@pytest.mark.timeout(180)
def test_a_checkpoint_of_one_process_resumes_on_two_and_one_of_two_on_one(finished, corpus, tmp_path):
    workdir = shutil.copytree(finished.workdir, tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints" / "8")
    outputs = run_two_processes(corpus, workdir)
    assert "resuming after step 6 of 8" in outputs[0]
    found, expected = (tiny_runs.read_records(path)[-3:] for path in (workdir, finished.workdir))
    assert [record["step"] for record in found] == [7, 8, 8]
    for name in ("ce", "grad_norm"):
        values = [[record[name] for record in records[:2]] for records in (found, expected)]
        np.testing.assert_allclose(*values, rtol=2e-5, err_msg=name)
    longer = dataclasses.replace(finished.config, workdir=str(workdir), steps=9)
    result, states = tiny_runs.run_recording(longer)
    assert (result.step, sorted(states)) == (9, [9])
