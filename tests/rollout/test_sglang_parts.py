"""Two processes of a real SGLang server, each with buckets that hold its part of the tensors and NaN for the rest."""

import dataclasses
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tandem.engine.buckets import CHECKSUMMED, LOADED, NUM_SLOTS, BucketSlice, BucketStream, PeerFailed, SharedBuckets
from tandem.engine.rollout.sglang import SGLangEngine
from tandem.engine.rollout.sglang_server import SGLangServer
from tandem.engine.types import WeightTransferError
from tests.rollout.models import CONTEXT_LENGTH, VOCAB_SIZE, buckets, disk_tensors, metas, serve, tiny_model
from tests.rollout.sglang_servers import MARKS, need_sglang, setup_of
from tests.rollout.test_sglang import CONFIG, call, serves

pytestmark = [*(mark for mark in MARKS), pytest.mark.slow]

BUCKET_BYTES = 1 << 14


def tiny_llama(seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": CONTEXT_LENGTH}
    config = LlamaConfig(**sizes, tie_word_embeddings=True, initializer_range=0.2, bos_token_id=None, eos_token_id=None)
    return LlamaForCausalLM(config).eval()


def model_of(kind: str, seed: int) -> PreTrainedModel:
    if kind == "llama":
        return tiny_llama(seed)
    changes: dict[str, Any] = {"mlp_only_layers": []} if kind == "qwen3_moe" else {}
    return tiny_model(kind, seed=seed, **changes)


class Writer:
    """The trainer's side: buckets for each process, in which this one process writes what it is given."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], num_processes: int) -> None:
        self._layout = [entries for _, entries in buckets(tensors, BUCKET_BYTES)]
        sizes = (0,), {}, BUCKET_BYTES, max(map(len, self._layout))
        self._shared = [SharedBuckets(*sizes) for _ in range(num_processes)]
        slices = tuple(tuple(BucketSlice(e.name, e.tensor_start, e.num_bytes, e.bucket_start) for e in entries) for entries in self._layout)
        streams = [
            BucketStream(tuple(metas(tensors)), slices, *sizes[:3], shared.handle, leader=0, timeout_s=60.0, process=process)
            for process, shared in enumerate(self._shared)
        ]
        self.stream = dataclasses.replace(streams[0], following=tuple(streams[1:]))
        self._swap = 0

    def swap(self, engine: SGLangEngine, of_processes: Sequence[Mapping[str, torch.Tensor]], version: int, *, damage: bool = False) -> None:
        """One version but for its commit; `damage` flips a bit of the last process's third bucket."""
        self._swap += 1
        first_ticket = self._swap * (len(self._layout) + 1)
        pending = engine.receive(self.stream, version, swap=self._swap, first_ticket=first_ticket)

        def write(process: int) -> None:
            shared = self._shared[process]
            for number, (data, entries) in enumerate(buckets(of_processes[process], BUCKET_BYTES)):
                waits = {"swap": self._swap, "timeout_s": 60.0, "waited_for": "load"}
                if number >= NUM_SLOTS:
                    shared.wait([0], LOADED + process, first_ticket + number - NUM_SLOTS, **waits)
                slot = number % NUM_SLOTS
                shared.memories[slot][: len(data)] = data
                shared.checksums[slot, : len(entries)] = [entry.checksum for entry in entries]
                if damage and number == 2 and process == len(self._shared) - 1:
                    for entry in entries:
                        shared.memories[slot][entry.bucket_start] ^= 1
                shared.publish(0, CHECKSUMMED, first_ticket + number)

        def write_until_it_fails(process: int) -> None:
            with suppress(PeerFailed):
                write(process)

        threads = [threading.Thread(target=write_until_it_fails, args=(process,), daemon=True) for process in range(len(self._shared))]
        for thread in threads:
            thread.start()
        try:
            pending.wait()
        except WeightTransferError:
            for shared in self._shared:
                shared.fail(self._swap)  # as the ranks do: the others need not wait
            raise
        for thread in threads:
            thread.join()

    def close(self) -> None:
        for shared in self._shared:
            shared.close()


def parts_of(tensors: Mapping[str, torch.Tensor], wanted: Sequence[tuple[str, tuple[tuple[int, int], ...]]]) -> dict[str, torch.Tensor]:
    """The tensors with NaN in place of what is not wanted."""
    parts = {name: torch.full_like(tensor, torch.nan) for name, tensor in tensors.items()}
    for name, region in wanted:
        box = tuple(slice(*bounds) for bounds in region)
        parts[name][box] = tensors[name][box]
    return parts


def own_checksums(engine: SGLangEngine, model: PreTrainedModel) -> Any:
    """SGLang's checksums of its parameters after it has loaded the model from disk by itself."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        call(engine.server, "/update_weights_from_disk", model_path=folder, load_format="auto")
    return call(engine.server, "/weights_checker", action="checksum")


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe", "llama"])
def test_each_process_has_its_part_bit_for_bit_and_both_flip_or_none(kind: str, tmp_path: Path) -> None:
    need_sglang()
    models = [model_of(kind, seed) for seed in range(2)]
    config = dataclasses.replace(CONFIG, tp=2)
    log = tmp_path / "log"
    with SGLangEngine(SGLangServer(setup_of(models[0], tp=2, log_path=log)), config, stop_token_ids=(), timeout_s=200.0) as engine:
        wanted = engine.wanted_regions()
        versions = [disk_tensors(model) for model in models]
        parts = [[parts_of(tensors, regions) for regions in wanted if regions is not None] for tensors in versions]
        assert all(any(tensor.isnan().any() for tensor in tensors.values()) for tensors in parts[0])
        writer = Writer(versions[0], 2)
        for number in (0, 1, 0):
            writer.swap(engine, parts[number], number)
            engine.commit()
            assert serves(engine, models[number], number)
        with pytest.raises(WeightTransferError, match=r"bucket 2 of \d+, tensor \S+, bytes \d+:\d+: checksum"):
            writer.swap(engine, parts[1], 3, damage=True)
        engine.rollback()
        assert serves(engine, models[0], 0)

        writer.swap(engine, parts[1], 4)
        send, commands = engine._weights._send, list[str]()

        async def one_process_forgets(command: str, arguments: Sequence[Sequence[Any]]) -> list[Any]:
            commands.append(command)
            if command == "commit" and commands.count("commit") == 1:
                arguments = [arguments[0], ("no number",) * 2]  # the last process cannot carry this out
            return await send(command, arguments)

        engine._weights._send = one_process_forgets
        with pytest.raises(TypeError):
            engine.commit()
        assert commands == ["commit", "revert"]
        assert serves(engine, models[0], 0)
        engine._weights._send = send

        serve(engine, models[1], policy_version=5)  # by buckets that are handed to it
        assert serves(engine, models[1], 5)
        ours = call(engine.server, "/weights_checker", action="checksum")
        assert ours == own_checksums(engine, models[1])
        writer.close()
    assert log.read_text().count("the spare is kept and exchanged by pointer") == 2
