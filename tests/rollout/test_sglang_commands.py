"""Every call to a server that a swap makes fails once, or from then on: all of its processes have the old version, or all the new one."""

import asyncio
import base64
import pickle
import tempfile
from collections.abc import Coroutine, Sequence
from typing import Any

import pytest
import torch

from tandem.engine.architecture import Architecture
from tandem.engine.rollout import sglang_receiver
from tandem.engine.rollout.sglang_versions import SGLangVersion
from tandem.engine.rollout.sglang_weights import UnknownWeightsError, WeightCommands
from tests.rollout.models import buckets, disk_tensors, metas, tiny_model
from tests.rollout.sharded_model import ShardedModel, loaded

TP = 2
WHEN = ["before it was carried out", "and only its answer is lost"]


class InMemory:
    """What SGLang does with weight commands, with our receivers in this process. One call fails, or all from that one on."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.models = [ShardedModel(tensors, index, TP) for index in range(TP)]
        self.label, self.session_is_open, self.num_calls = "", False, 0
        self.paths = list[str]()
        self.faulty: Sequence[int] = ()
        self.loses_answer = False

    def fail(self, faulty: Sequence[int], *, loses_answer: bool) -> None:
        self.num_calls, self.paths, self.faulty, self.loses_answer = 0, [], faulty, loses_answer

    async def call(self, path: str, **fields: Any) -> None:
        number, self.num_calls = self.num_calls, self.num_calls + 1
        self.paths.append(path)
        if number not in self.faulty or self.loses_answer:
            self._carry_out(path, **fields)
        if number in self.faulty:
            raise RuntimeError(f"injected into call {number}, {path}")

    def _carry_out(self, path: str, **fields: Any) -> None:
        if path == "/update_weight_version":
            self.label = fields["new_version"]
            return
        if self.session_is_open == (path == "/begin_weight_update"):
            raise RuntimeError(f"{path}: the session is {'open' if self.session_is_open else 'not open'}")
        if path == "/update_weights_from_tensor":
            for model, serialised in zip(self.models, fields["serialized_named_tensors"], strict=True):
                sglang_receiver.serve(model, pickle.loads(base64.b64decode(serialised)))
        else:
            assert path in ("/begin_weight_update", "/end_weight_update")
            self.session_is_open = not self.session_is_open


class Swapping:
    """Version i has the weights of model i % 2."""

    def __init__(self) -> None:
        model = tiny_model()
        self.tensors = [disk_tensors(model), disk_tensors(tiny_model(seed=1))]
        self.server = InMemory(self.tensors[0])
        of = Architecture.from_hf(model.config.to_dict()), torch.float32
        self.commands = WeightCommands(self.server, SGLangVersion("0.5.21"), TP, *of)  # pyright: ignore[reportArgumentType]
        self.version = -1
        self.swap()

    def swap(self) -> bool:
        """To the next version, as `WeightSwap` does it. Returns whether it was committed. Raises: what failed."""
        following, has_committed = self.version + 1, False
        tensors = self.tensors[following % 2]
        try:
            run(self.commands.run("prepare", following, metas(tensors)))
            with tempfile.NamedTemporaryFile(dir="/dev/shm", prefix="tandem-test-") as file:
                for data, entries in buckets(tensors, 1 << 17):
                    file.seek(0)
                    file.write(data)
                    file.flush()
                    run(self.commands.run("load", file.name, tuple(entries)))
            run(self.commands.commit(following, self.version))
            has_committed = True
            self.version = following
            run(self.commands.settle())
        except UnknownWeightsError:
            raise
        except RuntimeError:
            if not has_committed:
                run(self.commands.rollback())
            raise
        return has_committed

    def assert_whole(self) -> None:
        assert self.server.label == str(self.version)
        for index, model in enumerate(self.server.models):
            assert model.equals(loaded(self.tensors[self.version % 2], index, TP))


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(work)


@pytest.fixture(scope="module")
def swapping() -> Swapping:
    return Swapping()


def num_calls_of_a_swap(swapping: Swapping) -> int:
    swapping.server.fail((), loses_answer=False)
    assert swapping.swap()
    return swapping.server.num_calls


def failure_of(swapping: Swapping) -> RuntimeError | None:
    try:
        swapping.swap()
    except RuntimeError as error:
        return error
    return None


@pytest.mark.parametrize("when", WHEN)
def test_a_call_that_fails_leaves_the_old_version_or_the_new_one_and_the_next_swap_works(swapping: Swapping, when: str) -> None:
    num_calls, failed_in = num_calls_of_a_swap(swapping), dict[str, int]()
    for number in range(num_calls):
        before = swapping.version
        swapping.server.fail((number,), loses_answer=when == WHEN[1])
        failure = failure_of(swapping)
        assert not isinstance(failure, UnknownWeightsError)
        if failure is None:
            assert (swapping.server.paths[number], when) == ("/begin_weight_update", WHEN[1]), "a session that is open is found out"
        else:
            assert f"injected into call {number}, " in str(failure)
        failed_in[swapping.server.paths[number]] = failed_in.get(swapping.server.paths[number], 0) + 1
        assert swapping.version in (before, before + 1)
        swapping.assert_whole()
        swapping.server.fail((), loses_answer=False)
        assert swapping.swap()
        swapping.assert_whole()
    assert set(failed_in) == {"/begin_weight_update", "/update_weights_from_tensor", "/end_weight_update", "/update_weight_version"}
    assert failed_in["/update_weights_from_tensor"] > 4, "prepare, several buckets, commit and settle"


@pytest.mark.parametrize("when", WHEN)
def test_when_the_way_back_fails_too_nobody_generates_with_weights_that_nobody_knows(when: str) -> None:
    """From one call on all fail: before the commit the old version is still there; in it, the engine is told to kill the server."""
    num_calls, ends = num_calls_of_a_swap(Swapping()), list[str]()
    for number in range(num_calls):
        swapping = Swapping()
        swapping.server.fail(range(number, 1000), loses_answer=when == WHEN[1])
        failure = failure_of(swapping)
        assert failure is not None
        if isinstance(failure, UnknownWeightsError):
            ends.append("unknown")
            assert "going back to version 0 failed" in str(failure)
        else:
            ends.append(f"version {swapping.version}")
            swapping.assert_whole()
    assert ends == sorted(ends, key=["version 0", "unknown", "version 1"].index)
    assert ends.count("unknown") == 3, "the commit, the end of its session, the label"
