"""Swaps into real rollout engines, which watch the buckets themselves, and what is left when something fails on either side."""

import dataclasses
import os
import re
import signal
from typing import Any

import pytest
import torch.distributed as dist

from tandem.engine import buckets
from tandem.engine.checkpoint.swap import WeightSwap
from tandem.engine.config import RolloutConfig, SwapConfig
from tandem.engine.rollout.embedded import EmbeddedEngine, PendingReceive
from tandem.engine.types import GenerationRequest, WeightTransferError
from tests.checkpoint.test_names import DENSE as SIZES
from tests.checkpoint.test_swap import Source, group
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed

PUBLISH = buckets.SharedBuckets.publish
SWAP = SwapConfig(bucket_bytes=4096, timeout_s=120)
HANGING_S = 3.0  # how long an engine that is stopped is waited for
DENSE = SIZES | {"max_position_embeddings": 64, "rms_norm_eps": 1e-6, "rope_theta": 10_000.0}


def start_engine(model: dict[str, Any] = DENSE) -> EmbeddedEngine:
    engine = EmbeddedEngine(model, RolloutConfig(), dtype="float32", context_length=16, stop_token_ids=(), num_threads=1)
    return wait_for_child(engine)


def wait_for_child(engine: EmbeddedEngine) -> EmbeddedEngine:
    """Its start takes seconds, on a busy machine many, which no deadline of a swap is meant for."""
    engine.rollback()
    return engine


def served(engine: EmbeddedEngine) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """What the engine makes of a prompt: other weights give other log-probs."""
    request = GenerationRequest(request_id="0", token_ids=(1, 2, 3), num_prefix_tokens=0, max_new_tokens=4, seed=1, temperature=0.0)
    (completion,) = engine.generate([request])
    return completion.token_ids, completion.logprobs


def swap_with(fault: str) -> dict[str, Any]:
    """Version 0 is served; the swap to 1 meets the fault on rank 1; then one more swap succeeds where both engines still live."""
    rank = dist.get_rank()
    source, engine = Source(DENSE, (2, 1, 1, 1), rank), start_engine()
    swap = WeightSwap(source, engine, SWAP, control_group=group())
    with swap.serving(0):
        before = served(engine)
    source.set_version(1)
    if fault == "none":
        with swap.serving(1):
            after = served(engine)
        engine.restart()
        wait_for_child(engine)  # which has to be told of the stream again
        with swap.serving(1):
            again = served(engine)
        engine.close()
        return {"before": before, "after": after, "again": again}
    if fault == "engine hangs":
        swap._config = dataclasses.replace(SWAP, timeout_s=HANGING_S)
    if rank == 1:
        disturb(fault, engine)
    with pytest.raises(WeightTransferError) as failure, swap.serving(1):
        raise AssertionError("the block must not be entered")
    buckets.SharedBuckets.publish = PUBLISH
    swap._config, engine._timeout_s = SWAP, SWAP.timeout_s
    if engine.is_alive:
        assert engine.policy_version == 0
        assert served(engine) == before
    else:
        engine.restart()
        wait_for_child(engine)
    with swap.serving(1):
        assert served(engine) != before
    engine.close()
    swap.close()
    return {"error": str(failure.value)}


def disturb(fault: str, engine: EmbeddedEngine) -> None:
    """Make this rank's part of the next swap fail."""
    if fault == "bit flips":  # between the checksum and the engine

        def publish(self: buckets.SharedBuckets, rank: int, counter: int, value: int) -> None:
            if counter == buckets.CHECKSUMMED:
                for slot in self.slots:
                    slot[0] ^= 1
            PUBLISH(self, rank, counter, value)

        buckets.SharedBuckets.publish = publish
    elif fault == "writer":

        def publish(self: buckets.SharedBuckets, rank: int, counter: int, value: int) -> None:
            if counter == buckets.WRITTEN:
                raise MemoryError("no memory left")
            PUBLISH(self, rank, counter, value)

        buckets.SharedBuckets.publish = publish
    elif fault == "engine dies":
        os.kill(engine.pid, signal.SIGKILL)
    elif fault == "engine hangs":
        os.kill(engine.pid, signal.SIGSTOP)
        engine._timeout_s = HANGING_S


def test_engines_have_each_version_and_a_restarted_one_is_filled_again() -> None:
    results = run_ranks(swap_with, 2, "none")
    assert results[0] == results[1], "both engines have the same weights"
    assert results[0]["before"] != results[0]["after"] == results[0]["again"]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("bit flips", r"rank \d, its engine: bucket \d+ of \d+, tensor \S+, bytes \d+:\d+: checksum [0-9a-f]{16} arrived"),
        (
            "writer",
            r"rank 1, bucket 0 of \d+, tensor \S+: MemoryError: no memory left",
        ),
        ("engine dies", r"rank 1, (prepare|its engine): .*died"),
        ("engine hangs", r"rank 1, its engine: .*did not answer 'receive' within 3 s"),
    ],
)
def test_a_fault_on_either_side_leaves_the_old_version_everywhere(fault: str, message: str) -> None:
    errors = {result["error"] for result in run_ranks(swap_with, 2, fault)}
    assert len(errors) == 1, "all ranks raise the same"
    assert re.search(message, errors.pop(), re.DOTALL)


def swap_past_a_death() -> tuple[list[int], int]:
    """Rank 1's engine dies as the swap to version 1 begins; it is replaced, and the swap is done once more."""
    rank = dist.get_rank()
    engine = start_engine()
    revived: list[int] = []

    def revive() -> bool:
        if engine.is_alive:
            return False
        engine.restart()
        wait_for_child(engine)
        revived.append(rank)
        return True

    source = Source(DENSE, (2, 1, 1, 1), rank)
    swap = WeightSwap(source, engine, SWAP, control_group=group(), revive=revive)
    with swap.serving(0):
        before = served(engine)
    source.set_version(1)
    if rank == 1:
        os.kill(engine.pid, signal.SIGKILL)
    with swap.serving(1):
        assert served(engine) != before
    version = engine.policy_version
    engine.close()
    return revived, version


def test_a_swap_is_done_once_more_when_its_engine_was_replaced() -> None:
    assert run_ranks(swap_past_a_death, 2) == [([], 1), ([1], 1)]


@pytest.mark.parametrize(
    ("why", "message"),
    [
        ("another model", r"tensor \S+ has shape \[\d+, \d+\]; the model has [^;]*$"),
        ("buckets that cannot be opened", r"FileNotFoundError: [^;]*$"),  # where it cannot tell the ranks through the buckets
    ],
)
def test_an_engine_that_refuses_ends_the_swap_at_once_however_many_buckets_are_left(why: str, message: str) -> None:
    """The deadlines are far beyond this test's: whoever waited for one would not come back."""
    for errors in run_ranks(swap_refused, 2, why):
        for error in errors:
            assert re.search(f"on all ranks: rank 1, its engine: {message}", error), error


def swap_refused(why: str) -> list[str]:
    """Rank 1's engine refuses, and says so again when it is asked again."""
    rank = dist.get_rank()
    engine = start_engine(DENSE | {"vocab_size": DENSE["vocab_size"] * 2} if rank == 1 and why == "another model" else DENSE)
    receive = engine.receive
    if rank == 1 and why != "another model":

        def misled(stream: buckets.BucketStream, policy_version: int, *, swap: int, first_ticket: int) -> PendingReceive:
            nowhere = dataclasses.replace(stream, handle=dataclasses.replace(stream.handle, control=1 << 20))
            return receive(nowhere, policy_version, swap=swap, first_ticket=first_ticket)

        engine.receive = misled
    config, errors = dataclasses.replace(SWAP, timeout_s=100_000), list[str]()
    engine._timeout_s = config.timeout_s
    swap = WeightSwap(Source(DENSE, (2, 1, 1, 1), rank), engine, config, control_group=group())
    for _ in range(2):
        with pytest.raises(WeightTransferError) as failure, swap.serving(0):
            pass
        errors.append(str(failure.value))
    engine.close()
    swap.close()
    return errors
