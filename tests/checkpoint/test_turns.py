"""Who has the device when, on two ranks with a real trainer and real swaps; the engine's memory is counted, as a GPU's would be."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import tandem.engine.trainer  # noqa: F401  before megatron
from tandem.engine.checkpoint.engine_side import EngineSide, Resident
from tandem.engine.checkpoint.swap import WeightSwap
from tandem.engine.checkpoint.turns import Turns
from tandem.engine.config import LogConfig, LossConfig, MeshConfig, SwapConfig
from tandem.engine.log import RunLog
from tandem.engine.resident import MemoryMeter, memory_metrics, own_bytes
from tandem.engine.trace import part_path, read_part
from tandem.engine.trainer.megatron import MegatronTrainer
from tandem.engine.trainer.mesh import build_mesh
from tandem.engine.types import DeviceMemoryError, EngineDiedError, WeightTransferError
from tests.checkpoint.sinks import MemorySink
from tests.ranks import run_ranks
from tests.trainer.test_memory import same, state_of, step
from tests.trainer.test_state import CONFIG, hf_config

PARTS = {"kv_cache": 1000, "cuda_graph": 30, "weights": 200}  # bytes
ROOM = 2000  # bytes of the GPU that the parts lie on


class CountedEngine:
    """Parts of some bytes on a GPU of its own reckoning. Notes what it is asked for, and what the trainer then has on the device."""

    def __init__(self, trainer: MegatronTrainer | None) -> None:
        self.parts = tuple(PARTS)
        self.released: set[str] = set()
        self.asked: list[tuple[str, str, str]] = []
        self.dies_of = ""  # this call
        self._trainer = trainer

    def release(self, part: str) -> None:
        self._note("release", part)
        self.released.add(part)

    def resume(self, part: str) -> None:
        self._note("resume", part)
        self.released.remove(part)

    def _note(self, what: str, part: str) -> None:
        if f"{what} {part}" == self.dies_of:
            raise EngineDiedError("killed")
        assert self._trainer is not None
        memory = self._trainer.memory
        self.asked.append((what, part, "awake" if memory.is_awake else "asleep" if memory.resident_bytes == 0 else "parameters"))

    @property
    def used(self) -> int:
        return sum(size for part, size in PARTS.items() if part not in self.released)


class Rank:
    """A trainer, a sink on rank 0, and their turns."""

    def __init__(self, folder: str, *, budget_bytes: int = 0, measure: Callable[["Rank"], Resident] | None = None) -> None:
        self.number = dist.get_rank()
        model = hf_config()
        self.trainer = MegatronTrainer(model, build_mesh(MeshConfig(), model), CONFIG, LossConfig(), 1.0, 7)
        self.sink = MemorySink() if self.number == 0 else None
        self.engine = CountedEngine(self.trainer)
        self.log = RunLog(Path(folder), rank=self.number, num_ranks=2, config=LogConfig(tensorboard=False, progress=False), num_steps=1)
        group: Any = dist.group.WORLD
        self.meter = MemoryMeter(on_gpu=False)
        self.meter.trainer = self.trainer.memory
        self.swap = WeightSwap(self.trainer, self.sink, SwapConfig(timeout_s=20), control_group=group, log=self.log)
        read = self.meter.read if measure is None else lambda: measure(self)
        self.turns = Turns(
            self.swap,
            self.trainer.memory,
            EngineSide(self.engine, budget_bytes=budget_bytes, measure=read, log=self.log) if self.number == 0 else None,
            sleeps=True,
            budget_bytes=budget_bytes,
            measure=read,
            gather=self.gather,
            log=self.log,
        )

    def gather(self, value: Any) -> list[Any]:
        found: list[Any] = [None, None]
        dist.all_gather_object(found, value)
        return found


def _turns(folder: str) -> dict[str, Any]:
    rank = Rank(folder)
    found: dict[str, Any] = {}
    for version in (0, 1):
        with rank.turns.serving(version):
            assert rank.trainer.memory.resident_bytes == 0
            with pytest.raises(RuntimeError, match="while the trainer sleeps"):
                step(rank.trainer)
            before: dict[str, torch.Tensor] = {}
            if rank.sink is not None:
                assert rank.sink.policy_version == version
                before = {name: tensor.clone() for name, tensor in rank.sink.weights.items()}
                rank.sink.policy_version = -1  # as of an engine that was replaced
            with rank.turns.serving(version):
                assert rank.trainer.memory.resident_bytes == 0
                if rank.sink is not None:
                    assert rank.sink.policy_version == version
                    assert all(torch.equal(rank.sink.weights[name], tensor) for name, tensor in before.items())
        assert rank.trainer.memory.is_awake
        step(rank.trainer)
    found["asked"] = rank.engine.asked
    found["metrics"] = memory_metrics(rank.gather(rank.turns.take_memory()))
    assert rank.turns.take_memory() == {}
    found["whole"] = rank.trainer.memory.resident_bytes
    rank.log.flush()
    return found


@pytest.mark.distributed
def test_each_side_leaves_before_the_other_comes(tmp_path: Path) -> None:
    leader, other = run_ranks(_turns, 2, str(tmp_path))
    # At first nothing was released, so nothing is resumed. The cache needs the room that the parameters leave.
    released = [("release", part, "asleep") for part in PARTS]
    resumed = [("resume", "weights", "parameters"), ("resume", "cuda_graph", "parameters"), ("resume", "kv_cache", "asleep")]
    assert leader["asked"] == [*released, *resumed, *released]
    assert other["asked"] == []
    metrics = leader["metrics"]
    assert metrics["memory/train/trainer_bytes"] == leader["whole"]
    assert 0 < metrics["memory/swap/trainer_bytes"] < leader["whole"]
    assert metrics["memory/serve/trainer_bytes"] == metrics["memory/between/trainer_bytes"] == 0
    assert metrics["memory/serve/process_bytes"] > 1 << 20
    assert metrics["memory/serve/arena_bytes"] > metrics["memory/swap/trainer_bytes"]
    for number in (0, 1):
        events = list(read_part(part_path(tmp_path / "trace", number)))
        counted = [event["args"] for event in events if event["ph"] == "C" and event["name"] == "memory"]
        phases = [event["args"]["phase"] for event in events if event["ph"] == "i" and event["name"] == "memory"]
        assert phases == ["train", "swap", "serve", "between"] * 2
        assert [values["trainer_bytes"] > 0 for values in counted] == [True, True, False, False] * 2


def _failing(folder: str, case: str) -> tuple[str, list[tuple[str, str, str]]]:
    """One serving phase that fails, and whether the trainer is as before; then one that does not."""
    free = [ROOM]

    def measure(rank: Rank) -> Resident:
        trainer_bytes = rank.trainer.memory.resident_bytes
        if case == "budget" and rank.number == 1 and trainer_bytes == 0:
            trainer_bytes = 123_456
        others = rank.engine.used + (777 if case == "engine's budget" else 0)
        return Resident(
            trainer_bytes=trainer_bytes,
            process_bytes=trainer_bytes,
            arena_bytes=0,
            device_bytes=others,
            free_bytes=free[0] - rank.engine.used,
            others_bytes=others,
        )

    rank = Rank(folder, measure=measure)
    before = state_of(rank.trainer)
    error: Exception | None = None
    if case == "no room":
        with rank.turns.serving(0):
            pass
        free[0] = PARTS["weights"] + PARTS["cuda_graph"] + 999
    try:
        with rank.turns.serving(1):
            if rank.sink is not None and case == "swap":
                raise AssertionError("the swap was to fail")
            if case == "in the block":
                raise LookupError("from the block")
    except (DeviceMemoryError, WeightTransferError, LookupError) as caught:
        error = caught
    assert error is not None
    assert rank.trainer.memory.is_awake
    assert same(before, state_of(rank.trainer))
    step(rank.trainer)
    return f"{type(error).__name__}: {error}", rank.engine.asked


@pytest.mark.distributed
def test_what_the_trainer_leaves_is_held_against_the_budget(tmp_path: Path) -> None:
    for said, asked in run_ranks(_failing, 2, str(tmp_path), "budget"):
        assert said.startswith("DeviceMemoryError: rank 1: phase 'serve': the trainer sleeps and still has 123,456 bytes of its device")
        assert "swap.sleep_budget_bytes allows 0; raise it, and lower rollout.sglang.memory_fraction" in said
        assert ("resume", "kv_cache", "asleep") not in asked


@pytest.mark.distributed
def test_what_the_engine_leaves_is_held_against_the_budget(tmp_path: Path) -> None:
    for said, _ in run_ranks(_failing, 2, str(tmp_path), "engine's budget"):
        assert said.startswith("DeviceMemoryError: rank 0: the rollout engine sleeps and still has 777 bytes of the GPU")
        assert "swap.sleep_budget_bytes allows 0; set rollout.sglang.release=all, or raise the budget" in said


@pytest.mark.distributed
def test_an_engine_is_not_asked_to_take_back_what_the_gpu_does_not_have(tmp_path: Path) -> None:
    for said, asked in run_ranks(_failing, 2, str(tmp_path), "no room"):
        assert said.startswith("DeviceMemoryError: rank 0: the rollout engine cannot wake: 1,000 bytes of its kv_cache are to return")
        assert "where 999 are free; lower rollout.sglang.memory_fraction, rollout.sglang.kv_tokens or swap.bucket_bytes" in said
        assert ("resume", "kv_cache", "asleep") not in asked


@pytest.mark.distributed
def test_an_error_in_the_block_leaves_the_trainer_awake(tmp_path: Path) -> None:
    for said, _ in run_ranks(_failing, 2, str(tmp_path), "in the block"):
        assert said == "LookupError: from the block"


def _swap_that_fails(folder: str) -> str:
    rank = Rank(folder)
    if rank.sink is not None:
        rank.sink.refuses = "not today"
    before = state_of(rank.trainer)
    with pytest.raises(WeightTransferError, match="not today") as raised, rank.turns.serving(0):
        pass
    assert rank.trainer.memory.is_awake
    assert same(before, state_of(rank.trainer))
    if rank.sink is not None:
        rank.sink.refuses = ""
    with rank.turns.serving(0):
        assert rank.trainer.memory.resident_bytes == 0
    return str(raised.value)


@pytest.mark.distributed
def test_after_a_swap_that_failed_the_trainer_is_awake_and_the_next_may_do_better(tmp_path: Path) -> None:
    assert len(run_ranks(_swap_that_fails, 2, str(tmp_path))) == 2


def _engine_that_dies(folder: str) -> int:
    """A dead engine is for the swap, or who generates, to find: the trainer sleeps and wakes as ever."""
    rank = Rank(folder)
    for version, dies_of in enumerate(("release weights", "resume kv_cache")):
        rank.engine.dies_of = dies_of
        with rank.turns.serving(version):
            pass
        assert rank.trainer.memory.is_awake
    rank.log.flush()
    return sum(event["name"] == "engine died" for event in read_part(part_path(Path(folder) / "trace", rank.number)))


@pytest.mark.distributed
def test_an_engine_that_dies_of_its_turn_takes_nothing_along(tmp_path: Path) -> None:
    assert run_ranks(_engine_that_dies, 2, str(tmp_path)) == [2, 0]


class Listed:
    """As NVML lists a process."""

    def __init__(self, pid: int, used: int | None) -> None:
        self.pid, self.usedGpuMemory = pid, used


def test_a_process_that_nvml_does_not_tell_apart_is_not_counted_as_nothing() -> None:
    assert own_bytes([Listed(1, 50), Listed(2, 7)], 2) == 7
    assert own_bytes([Listed(1, 50)], 2) is None  # other numbers, as in a container
    assert own_bytes([Listed(2, None)], 2) is None  # no bytes, as under Windows' driver model
    assert own_bytes([Listed(2, 3), Listed(2, 4)], 2) == 7
