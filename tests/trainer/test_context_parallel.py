"""The split of packed sequences over context-parallel ranks."""

import numpy as np
import pytest

from tandem.engine.trainer.context_parallel import split_tokens, token_order

CU_SEQLENS = np.array([0, 3, 4, 20, 61, 61, 100])


@pytest.mark.parametrize("cp_size", [1, 2, 4])
@pytest.mark.parametrize("token_multiple", [1, 4])
def test_every_token_is_held_once_and_found_again(cp_size: int, token_multiple: int) -> None:
    split_CL = split_tokens(CU_SEQLENS, cp_size, token_multiple)
    assert split_CL.shape[1] % token_multiple == 0
    held = split_CL[split_CL >= 0]
    assert sorted(held.tolist()) == list(range(100))
    assert split_CL.reshape(-1)[token_order(split_CL, 100)].tolist() == list(range(100))


def test_ranks_have_the_same_causal_work_and_few_padded_tokens() -> None:
    lengths = np.random.default_rng(0).integers(20, 400, 50)
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)])
    position = np.arange(cu_seqlens[-1]) - np.repeat(cu_seqlens[:-1], lengths)
    split_CL = split_tokens(cu_seqlens, 4, 1)
    work = [(position[tokens[tokens >= 0]] + 1).sum() for tokens in split_CL]
    assert max(work) < 1.03 * min(work)
    assert (split_CL < 0).mean() < 0.01
