"""A server's memory on loan, with a real server: on a CPU SGLang answers and moves nothing, but it minds the order as on a GPU."""

from typing import Any

import pytest
from transformers import PreTrainedModel

from tandem.engine.config import RolloutConfig
from tandem.engine.rollout.sglang_memory import parts_of
from tests.rollout.models import serve, tiny_model
from tests.rollout.sglang_servers import Servers, need_sglang
from tests.rollout.test_sglang import CONFIG, ask, marked, serves

ALL = ("kv_cache", "cuda_graph", "weights")


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model(seed=0)


@marked
def test_released_weights_are_no_version_and_come_back_with_the_next_swap(sglang_servers: Servers, model: PreTrainedModel) -> None:
    need_sglang()
    engine = sglang_servers.engine(model, CONFIG)
    serve(engine, model, policy_version=0)
    assert serves(engine, model, 0)
    for version in (1, 2):
        running = engine.generate([ask("cut", max_new_tokens=50), ask("b", max_new_tokens=50)])
        running.close()  # aborted: SGLang may still be taking them out
        for part in ALL:
            engine.release(part)
            engine.release(part)  # the second time nothing happens
        assert engine.released == set(ALL)
        assert (engine.policy_version, engine.weights_digest) == (-1, None)
        with pytest.raises(RuntimeError, match="has no weights; commit a version first"):
            next(engine.generate([ask()]))
        engine.resume("weights")
        engine.resume("cuda_graph")
        serve(engine, model, policy_version=version)
        engine.resume("kv_cache")
        engine.resume("kv_cache")  # SGLang would die of it
        assert not engine.released
        assert serves(engine, model, version)


@marked
def test_a_cache_alone_is_released_with_the_weights_kept(sglang_servers: Servers, model: PreTrainedModel) -> None:
    need_sglang()
    engine = sglang_servers.engine(model, CONFIG)
    serve(engine, model, policy_version=3)
    engine.release("kv_cache")
    engine.resume("kv_cache")
    assert serves(engine, model, 3)


@pytest.mark.parametrize(
    ("release", "on_gpu", "parts"),
    [("auto", True, ALL), ("auto", False, ()), ("all", False, ALL), ("kv_cache", True, ("kv_cache",)), ("nothing", True, ())],
)
def test_what_is_released_follows_the_configuration(release: Any, on_gpu: bool, parts: tuple[str, ...]) -> None:
    assert parts_of(release, on_gpu=on_gpu) == parts
    assert RolloutConfig().sglang.release == "auto"
