"""Bandwidths that a swap meets, measured on all ranks at once: tens of milliseconds, before the first swap."""

import time
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from tandem.engine.checkpoint.agreement import Agreement
from tandem.engine.checkpoint.planner import Bandwidths

_COPY_BYTES = 8 << 20  # more than a core's caches hold, with the target
_LINK_BYTES = 2 << 20
_REPEATS = 3


def measure(agreement: Agreement, nodes: Sequence[str], device: torch.device) -> Bandwidths:
    """What the slowest rank gets. A collective.

    Args:
        nodes: per rank, the node that it runs on.
        device: where this rank's parameters are. Between GPUs, NCCL carries what is measured.
    Raises: WeightTransferError if a rank is gone.
    """
    on_gpu = device.type == "cuda"
    host = [torch.ones(_COPY_BYTES, dtype=torch.uint8, pin_memory=on_gpu) for _ in range(2)]
    agreement.reduce_max("measure", 0)
    found = {"host_copy": _speed(lambda: host[0].copy_(host[1]), _COPY_BYTES, device)}
    group = agreement.group
    if on_gpu:
        # larger: a launch takes as long as a GPU needs for some megabytes
        here = [torch.ones(16 * _COPY_BYTES, dtype=torch.uint8, device=device) for _ in range(2)]
        found["device_copy"] = _speed(lambda: here[0].copy_(here[1]), 16 * _COPY_BYTES, device)
        found["host_device"] = _speed(lambda: here[0][:_COPY_BYTES].copy_(host[0], non_blocking=True), _COPY_BYTES, device)
        made = dist.new_group(dist.get_process_group_ranks(group), backend="nccl")
        assert isinstance(made, dist.ProcessGroup)
        group = made
    for name, peers in (("in_node", _ring_in_nodes(nodes)), ("between_nodes", _ring_between_nodes(nodes))):
        if not peers:
            continue
        for num_bytes, label in ((_LINK_BYTES, name), (1, "latency")):
            link = [torch.ones(num_bytes, dtype=torch.uint8, device=device) for _ in range(2)]
            agreement.reduce_max("measure", 0)
            if agreement.rank in peers:
                speed = _speed(lambda link=link, peers=peers: _pass_on(link, peers, agreement.rank, group), num_bytes, device)
                found[label] = min(speed, found.get(label, speed))
    if on_gpu:
        dist.destroy_process_group(group)
    everyone = agreement.gather("measure", found)
    slowest = {name: min(each[name] for each in everyone if name in each) for name in {name for each in everyone for name in each}}
    latency_s = 1.0 / slowest.pop("latency") if "latency" in slowest else 0.0
    return Bandwidths(latency_s=latency_s, **slowest)


def _speed(action: Callable[[], object], num_bytes: int, device: torch.device) -> float:
    """Bytes per second, of the best of a few times: what disturbs only takes longer."""
    action()
    best = float("inf")
    for _ in range(_REPEATS):
        _synchronise(device)
        start = time.perf_counter()
        action()
        _synchronise(device)
        best = min(best, time.perf_counter() - start)
    return num_bytes / best


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _pass_on(link: Sequence[torch.Tensor], peers: dict[int, tuple[int, int]], rank: int, group: dist.ProcessGroup) -> None:
    to, source = peers[rank]
    operations = [
        dist.P2POp(dist.isend, link[0], group=group, group_peer=to),
        dist.P2POp(dist.irecv, link[1], group=group, group_peer=source),
    ]
    for request in dist.batch_isend_irecv(operations):
        request.wait()


def _ring_in_nodes(nodes: Sequence[str]) -> dict[int, tuple[int, int]]:
    """(rank that is sent to, rank that is received from) of every rank with a neighbour on its node."""
    rings = [ranks for ranks in _ranks_of(nodes) if len(ranks) > 1]
    return {rank: (ranks[(i + 1) % len(ranks)], ranks[i - 1]) for ranks in rings for i, rank in enumerate(ranks)}


def _ring_between_nodes(nodes: Sequence[str]) -> dict[int, tuple[int, int]]:
    """The same among the first ranks of the nodes, the second ones, …, as far as every node has one."""
    ranks_of = _ranks_of(nodes)
    if len(ranks_of) == 1:
        return {}
    rings = list(zip(*ranks_of, strict=False))
    return {rank: (ring[(i + 1) % len(ring)], ring[i - 1]) for ring in rings for i, rank in enumerate(ring)}


def _ranks_of(nodes: Sequence[str]) -> list[list[int]]:
    ranks: defaultdict[str, list[int]] = defaultdict(list)
    for rank, node in enumerate(nodes):
        ranks[node].append(rank)
    return list(ranks.values())
