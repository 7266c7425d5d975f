"""Swaps whose buckets are packed by a kernel, as parameters on a GPU are; in the interpreter where there is none."""

import pytest

from tests.kernels.interpreter import DEVICE  # before any kernel

import torch  # isort: skip

from tandem.engine.checkpoint.staging import Copy, stage
from tandem.kernels import backend
from tandem.kernels.packing import Packer
from tests.checkpoint.test_names import DENSE, MOE, random_hf_state
from tests.checkpoint.test_swap import serve_twice
from tests.ranks import run_ranks

CASES = {
    "tp2, two nodes": (DENSE | {"num_hidden_layers": 1}, (2, 1, 1, 1), [0, 1], ["a", "b"], torch.bfloat16),
    "tp2, groups cut, biases": (
        DENSE | {"model_type": "qwen2", "num_key_value_heads": 1, "num_hidden_layers": 1},
        *((2, 1, 1, 1), [0], ["a", "a"], torch.bfloat16),
    ),
    "ep2 moe, the engine's node holds one rank": (MOE | {"num_hidden_layers": 1}, (1, 1, 2, 1), [0], ["a", "b", "b"], None),
}


def serve_packed(case: str) -> tuple[int, int]:
    """Bytes as every engine checks them, and launches."""
    launches = []
    plain = Packer.pack

    def pack(self: Packer, bucket: torch.Tensor) -> None:
        launches.append(len(bucket))
        plain(self, bucket)

    Packer.pack = pack  # this process ends with the test
    with backend.chosen("triton"):
        return serve_twice(*CASES[case]), len(launches)


@pytest.mark.distributed
@pytest.mark.skipif(DEVICE == "cuda", reason="the ranks are forked, their parameters on the CPU: for the interpreter")
@pytest.mark.parametrize("case", CASES)
def test_a_packed_swap_brings_the_same_bytes(case: str) -> None:
    """Swaps three versions and compares every tensor; what crosses nodes is packed before it is sent."""
    config, _, leaders, nodes, dtype = CASES[case]
    num_bytes = sum(tensor.numel() * (dtype or tensor.dtype).itemsize for tensor in random_hf_state(config, 0).values())
    for received, launches in run_ranks(serve_packed, len(nodes), case):
        assert received == num_bytes * len(leaders)
        assert launches >= 3


def test_buckets_are_staged_in_one_memory_and_read_anew() -> None:
    first, second = torch.arange(6.0, device=DEVICE).view(2, 3), torch.zeros(300, device=DEVICE)
    targets = [torch.zeros(3, 2, dtype=torch.bfloat16), torch.zeros(2, 3), torch.zeros(300)]
    buckets = [[Copy(targets[0], first.T), Copy(targets[1], first)], [], [Copy(targets[2], second)]]
    with backend.chosen("triton"):
        (one, none, two), hosts = stage(buckets)
    assert none is None
    assert one is not None
    assert two is not None
    second += 5
    one.fill()
    assert torch.equal(hosts[id(buckets[0][0].source)], first.T.bfloat16().cpu())
    assert torch.equal(hosts[id(first)], first.cpu())
    two.fill()
    assert torch.equal(hosts[id(second)], second.cpu())
    assert two.on_host.data_ptr() == one.on_host.data_ptr()


def test_what_the_cpu_copies_itself_is_not_staged() -> None:
    source = torch.zeros(4)
    assert stage([[Copy(torch.zeros(4), source)], []]) == ([None, None], {})
