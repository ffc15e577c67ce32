"""Kills at random instants; ``tests/train/helpers/kill_runs.py`` does it a hundred times."""

import kill_runs
import pytest


@pytest.mark.timeout(240)
def test_kills_at_random_instants_lose_no_checkpoint_and_no_step(corpus, tmp_path):
    # With this seed the lives end after eleven steps, before the first, and after eleven more.
    kills = kill_runs.kill_again_and_again(corpus, tmp_path / "run", kills=3, seed=59)
    assert [kill.lost_checkpoints for kill in kills] == [0, 0, 0]
    assert max(kill.kept for kill in kills) > 0
    steps = kill_runs.assert_same_as_never_killed(corpus, tmp_path / "run", tmp_path / "reference")
    assert steps > max(kill.kept for kill in kills)
