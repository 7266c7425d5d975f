"""What a swap takes beside the model and one spare of it."""

import tracemalloc
from pathlib import Path

import pytest

from benchmarks.swap import large_model, measure
from tandem.engine.checkpoint import writer
from tandem.engine.checkpoint.swap import WeightSwap
from tandem.engine.config import SwapConfig
from tests.checkpoint.sinks import MemorySink
from tests.checkpoint.test_names import DENSE
from tests.checkpoint.test_swap import SMALL_BUCKETS, Source, group
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed

ROUNDED_BYTES = 4 << 20  # what kernel and allocators round up, with huge pages too; the smallest model has tensors of 16 MiB
MODEL = large_model(48, 2)


def test_a_swap_takes_three_buckets_beside_the_weights(tmp_path: Path) -> None:
    """The third swap and the fourth, into an embedded engine."""
    bucket_bytes = SwapConfig().bucket_bytes
    (found,) = run_ranks(measure, 1, "embedded", MODEL, "bfloat16", None, SwapConfig(), 2, str(tmp_path))
    assert found["buckets"] > 20
    assert 2 * bucket_bytes < found["shared_bytes"] < 3 * bucket_bytes
    assert found["extra_bytes"] < 3 * bucket_bytes + ROUNDED_BYTES


def bytes_per_entry() -> float:
    swap = WeightSwap(Source(DENSE, (1, 1, 1, 1), 0), MemorySink(), SMALL_BUCKETS, control_group=group())
    tracemalloc.start()
    with swap.serving(0):
        pass
    of_writer = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(True, writer.__file__)])
    tracemalloc.stop()
    num_entries = sum(len(work.entries) for work in swap._work if isinstance(work, writer.BucketWork))
    assert num_entries > 40
    return sum(trace.size for trace in of_writer.traces) / num_entries


def test_who_copies_what_is_noted_in_few_bytes() -> None:
    """A memoryview or tensor for either side of every copy would take some KiB for each of a large model's thousands of entries."""
    assert run_ranks(bytes_per_entry, 1)[0] < 1024
