"""A conversion streams: the host holds about a file of the model at a time, and never the whole model."""

from pathlib import Path

import measure_memory
import pytest


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read as Linux shows it")
def test_host_memory_stays_under_1_3_of_the_largest_file():
    """A model of 190 MB in two files: all of it at once would be twice the largest one."""
    sizes = {"vocab_size": 4096, "hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16}
    fields = measure_memory.FIELDS | sizes | {"num_hidden_layers": 7}
    for way, (used, largest) in measure_memory.measure(fields, shards=2).items():
        assert used < 1.3 * largest, (way, used, largest)
        assert used > 0.2 * largest, "or nothing was measured"
