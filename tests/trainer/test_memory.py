"""The trainer's state leaves and comes back: bit for bit, whatever Megatron's buffers alias, and whole after any failure."""

import math
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import tandem.engine.trainer  # noqa: F401  before megatron
from tandem.engine.checkpoint.disk import load_latest
from tandem.engine.checkpoint.save import CheckpointSaver
from tandem.engine.config import LossConfig, MeshConfig, TrainerConfig
from tandem.engine.trainer.arena import HostArena, alignment_of
from tandem.engine.trainer.megatron import MegatronTrainer
from tandem.engine.trainer.mesh import build_mesh
from tandem.engine.trainer.optimizer import parts_of
from tandem.engine.types import DeviceMemoryError
from tests.ranks import run_ranks
from tests.trainer.compare import microbatches_of
from tests.trainer.test_state import CONFIG, NUM_TARGETS, hf_config

SP = {"sequence_parallel": True}


def trainers_of(mesh: MeshConfig, model: dict[str, Any], config: TrainerConfig, *seeds: int) -> list[MegatronTrainer]:
    built = build_mesh(mesh, model)
    return [MegatronTrainer(model, built, config, LossConfig(), 1.0, seed) for seed in seeds]


def step(trainer: MegatronTrainer) -> float:
    return trainer.sft_step(microbatches_of(trainer.mesh), NUM_TARGETS)["loss"]


def state_of(trainer: MegatronTrainer) -> list[torch.Tensor]:
    """Copies of everything that a step changes, on this rank."""
    found = [shard.tensor.clone() for shard in trainer.weight_shards()]
    for part in parts_of(trainer._optimizer):
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                state = part.optimizer.state[parameter]
                found += [parameter.detach().clone(), *(state[name].clone() for name in ("step", "exp_avg", "exp_avg_sq"))]
    return found


def same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))


def _nights(mesh: MeshConfig, model: dict[str, Any], config: TrainerConfig) -> dict[str, Any]:
    """Three iterations of log-probs and a step, slept between and not."""
    awake, sleeper = trainers_of(mesh, model, config, 7, 7)
    found: dict[str, Any] = {"resident": [], "gone": []}
    for _ in range(3):
        found["resident"].append(sleeper.memory.resident_bytes)
        sleeper.memory.begin_sleep()
        addresses = [shard.tensor.data_ptr() for shard in sleeper.weight_shards()]
        assert all(addresses), "the parameters stay until the swap has moved them"
        sleeper.memory.end_sleep()
        found["gone"].append(sleeper.memory.resident_bytes)
        sleeper.memory.wake()
        logprobs = [trainer.logprobs(microbatches_of(trainer.mesh)) for trainer in (awake, sleeper)]
        assert same(*logprobs)
        assert step(awake) == step(sleeper)
    found["same"] = same(state_of(awake), state_of(sleeper))
    found["arena"] = sleeper.memory.arena_bytes
    # 4 bytes of gradient for each element of the model, none of which the arena keeps
    chunks: Any = sleeper._ddp
    found["gradients"] = sum(buffer.grad_data.nbytes for chunk in chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers))
    return found


CASES = [
    (2, MeshConfig(), {}, {}),
    (2, MeshConfig(), {"tie_word_embeddings": False}, {"distributed_optimizer": False}),
    (2, MeshConfig(), {}, {"dtype": "bfloat16"}),
    (2, MeshConfig(), {}, {"dtype": "bfloat16", "distributed_optimizer": False, "overlap_grad_reduce": True}),
    (2, MeshConfig(tp=2, **SP), {}, {}),
    (2, MeshConfig(pp=2), {}, {"dtype": "bfloat16"}),
    (2, MeshConfig(pp=2, vpp=2), {}, {"distributed_optimizer": False}),
    (2, MeshConfig(ep=2), {"num_experts": 4}, {}),
    (2, MeshConfig(tp=2, **SP), {"num_experts": 4}, {"dtype": "bfloat16"}),
]
QUICK = (0, 3, 5, 7)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("num_ranks", "mesh", "model", "trainer"),
    [pytest.param(*case, marks=() if i in QUICK else pytest.mark.slow) for i, case in enumerate(CASES)],
)
def test_training_with_sleep_in_every_iteration_is_training_without_bit_for_bit(
    num_ranks: int, mesh: MeshConfig, model: dict[str, Any], trainer: dict[str, Any]
) -> None:
    config = TrainerConfig(optimizer=CONFIG.optimizer, **trainer)
    for found in run_ranks(_nights, num_ranks, mesh, hf_config(**model), config):
        assert found["same"]
        assert found["gone"] == [0, 0, 0]
        assert len(set(found["resident"])) == 1
        assert found["arena"] == found["resident"][0] - found["gradients"], "to the byte, and every storage once"


def _misuse(config: TrainerConfig) -> list[str]:
    (trainer,) = trainers_of(MeshConfig(), hf_config(), config, 7)
    trainer.memory.end_sleep()
    said = []
    calls = (
        lambda: trainer.logprobs(microbatches_of(trainer.mesh)),
        lambda: step(trainer),
        trainer.reset_optimizer,
        trainer.weights_changed,
        lambda: trainer.load_sharded({}),
    )
    for call in calls:
        with pytest.raises(RuntimeError, match="while the trainer sleeps: its gradients and optimizer and parameters") as raised:
            call()
        said.append(str(raised.value).partition(" ")[0])
    trainer.memory.wake()
    assert math.isfinite(step(trainer))
    return said


@pytest.mark.distributed
def test_a_sleeping_trainer_says_so() -> None:
    wanted = ["logprobs", "supervised", "reset_optimizer", "weights_changed", "load_sharded"]
    assert run_ranks(_misuse, 2, CONFIG) == [wanted, wanted]


def _for_a_new_engine(config: TrainerConfig) -> bool:
    (trainer,) = trainers_of(MeshConfig(), hf_config(), config, 7)
    before = [shard.tensor.clone() for shard in trainer.weight_shards()]
    trainer.memory.end_sleep()
    brought = [shard.tensor.clone() for shard in trainer.weight_shards()]
    assert not trainer.memory.is_awake
    assert 0 < trainer.memory.resident_bytes < trainer.memory.arena_bytes
    trainer.memory.end_sleep()
    assert trainer.memory.resident_bytes == 0
    trainer.memory.wake()
    return same(before, brought)


@pytest.mark.distributed
def test_the_parameters_alone_come_back_when_a_swap_reads_them() -> None:
    assert run_ranks(_for_a_new_engine, 2, CONFIG) == [True, True]


def _failing(config: TrainerConfig) -> list[str]:
    """A host that refuses each copy in turn, in each direction; what a step then gives is what it gives a trainer that never slept."""
    wanted, trainer = trainers_of(MeshConfig(), hf_config(), config, 7, 7)
    for each in (wanted, trainer):
        step(each)
    trainer.memory.end_sleep()
    arena = trainer.memory._arena
    trainer.memory.wake()
    assert arena is not None
    slot, said = arena.slot, []
    for failing_copy in (0, 1, len(arena.sizes) - 1):
        for waking in (False, True):
            calls = 0

            def refuse(number: int, at: int = failing_copy) -> torch.Tensor:
                nonlocal calls
                calls += 1
                if calls == at + 1:
                    raise OSError("refused")
                return slot(number)

            if waking:
                trainer.memory.end_sleep()
            arena.slot = refuse  # pyright: ignore[reportAttributeAccessIssue]
            with pytest.raises(OSError, match="refused"):
                trainer.memory.wake() if waking else trainer.memory.end_sleep()
            said.append("asleep" if trainer.memory.resident_bytes == 0 else "between")
            arena.slot = slot  # pyright: ignore[reportAttributeAccessIssue]
            trainer.memory.wake()
            assert same(state_of(trainer), state_of(wanted))
    assert step(trainer) == step(wanted)
    assert same(state_of(trainer), state_of(wanted))
    return said


@pytest.mark.distributed
@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_whatever_fails_on_the_way_the_state_is_whole(dtype: Any) -> None:
    config = TrainerConfig(dtype=dtype, optimizer=CONFIG.optimizer)
    # Where waking failed, everything is on the host again; where falling asleep did, part of it is still on the device.
    for said in run_ranks(_failing, 2, config):
        assert said == ["between", "asleep"] * 3


def _no_room(config: TrainerConfig) -> str:
    # One storage is longer than what malloc may have at hand from before (it maps whatever is longer than 32 MiB)
    (trainer,) = trainers_of(MeshConfig(), hf_config(hidden_size=512, intermediate_size=4096), config, 7)
    before = state_of(trainer)
    trainer.memory.end_sleep()
    arena = trainer.memory._arena
    assert arena is not None
    assert max(arena.sizes) > 32 << 20
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 20), limits[1]))
    try:
        with pytest.raises(DeviceMemoryError) as raised:
            trainer.memory.wake()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert trainer.memory.resident_bytes == 0
    trainer.memory.wake()
    assert same(before, state_of(trainer))
    return str(raised.value)


@pytest.mark.distributed
def test_a_device_without_room_is_named_with_the_bytes_and_what_to_lower() -> None:
    for said in run_ranks(_no_room, 2, CONFIG):
        assert "the trainer cannot wake" in said
        assert "bytes of its parameters" in said or "bytes of its optimizer" in said
        assert "its state is whole in host memory. Lower rollout.sglang.memory_fraction or swap.bucket_bytes" in said


def _save_asleep(mesh: MeshConfig, model: dict[str, Any], config: TrainerConfig, folder: str) -> bool:
    trainer, other = trainers_of(mesh, model, config, 7, 8)
    step(trainer)
    wanted = state_of(trainer)
    trainer.memory.end_sleep()
    with CheckpointSaver(Path(folder), keep=1, asynchronous=False) as saver:
        saver.save(1, trainer.sharded_state_dict())
    assert trainer.memory.resident_bytes == 0
    trainer.memory.wake()
    assert same(state_of(trainer), wanted)
    step(other)
    loaded = load_latest(Path(folder), other.sharded_state_dict)
    assert loaded is not None
    other.load_sharded(loaded.state)
    dist.barrier()
    return same(state_of(other), wanted) and step(other) == step(trainer)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("num_ranks", "mesh", "model", "trainer"), [CASES[0], *(pytest.param(*CASES[i], marks=pytest.mark.slow) for i in (3, 4, 5, 8))]
)
def test_a_checkpoint_of_a_sleeping_trainer_is_that_of_one_awake(
    num_ranks: int, mesh: MeshConfig, model: dict[str, Any], trainer: dict[str, Any], tmp_path: Path
) -> None:
    config = TrainerConfig(optimizer=CONFIG.optimizer, **trainer)
    assert all(run_ranks(_save_asleep, num_ranks, mesh, hf_config(**model), config, str(tmp_path)))


def test_an_arena_has_no_byte_too_many_and_every_slot_is_aligned_to_its_elements() -> None:
    sizes = [10, 4096, 2, 0, 12, 1 << 20, 6]
    arena = HostArena(sizes, is_page_locked=False)
    assert arena.num_bytes == sum(sizes)
    for number, size in enumerate(sizes):
        arena.slot(number).fill_(number)
        assert arena.slot(number).data_ptr() % alignment_of(size) == 0
    assert all(arena.slot(number).tolist() == [number] * size for number, size in enumerate(sizes) if number != 5)


def test_a_view_of_an_arena_is_the_tensor_that_left() -> None:
    whole = torch.arange(24, dtype=torch.float32)
    part = whole[4:16].view(3, 4).t()
    arena = HostArena([6, whole.nbytes], is_page_locked=False)
    arena.slot(1).view(torch.float32).copy_(whole)
    assert torch.equal(arena.view(1, part), part)
