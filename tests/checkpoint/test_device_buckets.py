"""Buckets in a GPU's memory, packed and checksummed by kernels there and opened by another process. Has not run: it needs a GPU."""

import multiprocessing
import os
from multiprocessing.connection import Connection

import pytest
import torch

from tandem.engine.buckets import CHECKSUMMED, LOADED, SharedBuckets, SharedMemoryHandle
from tandem.engine.checkpoint.device_writer import DeviceWork
from tandem.engine.checkpoint.transport import Mail
from tandem.kernels.checksum import Checksums
from tandem.kernels.packing import Packer, Part

BUCKET_BYTES = 1 << 20


def read(handle: SharedMemoryHandle, pids: dict[int, int], connection: Connection) -> None:
    """An engine's process: waits for a bucket, and tells what lies in it."""
    shared = SharedBuckets((0,), pids, BUCKET_BYTES, 1, handle)
    shared.wait((0,), CHECKSUMMED, 1, swap=1, timeout_s=60, waited_for="write")
    arrived = Checksums([(256, 4096)], shared.slots[0].device).numbers(shared.slots[0])
    connection.send((int(arrived[0]), int(shared.checksums[0, 0]), shared.slots[0][256:4352].view(torch.float32).cpu().tolist()))
    shared.publish(0, LOADED, 1)
    connection.recv()  # the slots stay open until the other side has looked
    shared.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="shares the memory of a GPU")
def test_another_process_reads_what_kernels_wrote() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    values = torch.randn(1024, device=device)
    pids = {0: os.getpid()}
    shared = SharedBuckets((0,), pids, BUCKET_BYTES, 1, device=device)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=read, args=(shared.handle, pids, theirs))
    process.start()
    part = Part(source=values, start=256, dtype=torch.float32)
    checksums = Checksums([(256, 4096)], device)
    work = DeviceWork(Mail(), Packer([]), torch.empty(0, dtype=torch.uint8, device=device), 0, Packer([part]), checksums)
    work.launch(shared).finish(shared)
    shared.publish(0, CHECKSUMMED, 1)
    assert ours.poll(120), "the other process did not answer"
    arrived, sent, read_values = ours.recv()
    shared.wait((0,), LOADED, 1, swap=1, timeout_s=60, waited_for="load")
    ours.send(None)
    process.join(60)
    assert process.exitcode == 0
    assert arrived == sent
    assert read_values == values.tolist()
    shared.close()
