"""Repetition: a decoding step of a batch, and whole responses.

python benchmarks/repetition.py [--case step] [--out DIR]        options: benchmarks/harness.py
"""

import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.harness import Case, Subject, main
from tandem.kernels.backend import chosen
from tandem.kernels.repetition import Detector, Rule, first_repetition

RULE = Rule(max_period=64, min_repeats=8, min_tokens=32, ngram=8, ngram_threshold=20.0)  # what runs have by default
STEPS = 32  # of one call: a step alone is shorter than a launch


class Step(NamedTuple):
    tokens_SB: torch.Tensor
    detectors: dict[str, Detector]  # of each backend; they go on from call to call


def _tokens(num_rows: int, num_tokens: int, device: torch.device) -> torch.Tensor:
    """[B, T]: every fourth row ends in a loop of its own length."""
    tokens_BT = torch.randint(0, 150_000, (num_rows, num_tokens), device=device)
    for row in range(0, num_rows, 4):
        period, loop = 1 + row % 64, num_tokens - num_tokens // 4
        tokens_BT[row, loop:] = tokens_BT[row, :period].repeat(-(-(num_tokens - loop) // period))[: num_tokens - loop]
    return tokens_BT


def _step_inputs(num_rows: int, backends: list[Any], device: torch.device) -> Step:
    detectors = {}
    for backend in backends:
        with chosen(backend):
            detectors[backend] = Detector(RULE, num_rows, max_tokens=32_768, device=device)
    return Step(_tokens(num_rows, STEPS, device).T.contiguous(), detectors)


def _steps(backend: str) -> Callable[[Step], torch.Tensor]:
    return lambda x: torch.stack([x.detectors[backend].push(tokens_B) for tokens_B in x.tokens_SB])


def _steps_exactly(x: Step) -> list[torch.Tensor]:
    """From the definition of both tests, token by token."""
    fired = torch.zeros(x.tokens_SB.shape, dtype=torch.float64)
    for row, tokens in enumerate(x.tokens_SB.T.tolist()):
        fired[:, row] = torch.tensor([float(_fires(tokens[:end])) for end in range(1, len(tokens) + 1)])
    return [fired.to(x.tokens_SB.device)]


def _fires(tokens: list[int]) -> bool:
    for period in range(1, min(RULE.max_period, len(tokens) - 1) + 1):
        run = 0
        while run < len(tokens) - period and tokens[-1 - run] == tokens[-1 - run - period]:
            run += 1
        if run >= max(period * (RULE.min_repeats - 1), RULE.min_tokens - period):
            return True
    seen, total = set(), 0
    for end in range(RULE.ngram, len(tokens) + 1):
        ngram = tuple(tokens[end - RULE.ngram : end])
        total = max(0, total + (1 if ngram in seen else -1))
        seen.add(ngram)
    return total > RULE.ngram_threshold


def _whole_inputs(num_rows: int, num_tokens: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Responses of different lengths, one after the other."""
    tokens_BT = _tokens(num_rows, num_tokens, device)
    lengths = np.linspace(num_tokens // 2, num_tokens, num_rows).astype(int).tolist()
    flat = torch.cat([tokens[num_tokens - length :] for tokens, length in zip(tokens_BT, lengths, strict=True)])
    return flat, torch.tensor([0, *np.cumsum(lengths).tolist()], dtype=torch.int32, device=device)


def _whole(backend: Any) -> Callable[[Any], torch.Tensor]:
    def run(x: Any) -> torch.Tensor:
        with chosen(backend):
            return first_repetition(x[0], x[1], RULE)

    return run


def _whole_exactly(x: Any) -> list[torch.Tensor]:
    tokens, offsets = x[0].tolist(), x[1].tolist()
    found = []
    for start, end in itertools.pairwise(offsets):
        text = tokens[start:end]
        found.append(next((t for t in range(len(text)) if _fires(text[: t + 1])), -1))
    return [torch.tensor(found, dtype=torch.float64, device=x[0].device)]


def cases(device: torch.device) -> list[Case]:
    """The smallest first. Both tests are exact, so that no error is allowed."""
    on_gpu = device.type == "cuda"
    names = {"kernel": "auto", "reference": "reference"} if on_gpu else {"reference": "reference"}

    def step(num_rows: int, check_on: Case | None = None) -> Case:
        # A token, 64 counters read and written, 64 tokens compared, 8 of the n-gram and a cell of the table.
        num_bytes = STEPS * num_rows * (8 + RULE.max_period * (2 * 4 + 8) + 8 * RULE.ngram + 16)
        return Case(
            name=f"{STEPS} steps",
            shape={"B": num_rows},
            dtype=torch.float32,  # nothing is multiplied; integers have no matrix rate on a GPU
            flop=0,
            bytes=num_bytes,
            inputs=lambda device: _step_inputs(num_rows, list(names.values()), device),
            exact=_steps_exactly,
            tolerances=[0.0],
            runs={name: _steps(backend) for name, backend in names.items()},
            check_on=check_on,
        )

    def whole(num_rows: int, num_tokens: int, check_on: Case | None = None, *, runs: Sequence[str] = tuple(names)) -> Case:
        return Case(
            name="whole responses",
            shape={"R": num_rows, "T": num_tokens},
            dtype=torch.float32,  # nothing is multiplied; integers have no matrix rate on a GPU
            flop=0,
            bytes=num_rows * num_tokens * 3 / 4 * 8,  # every token once
            inputs=lambda device: _whole_inputs(num_rows, num_tokens, device),
            exact=_whole_exactly,
            tolerances=[0.0],
            runs={name: _whole(names[name]) for name in runs},
            check_on=check_on,
        )

    found = [step(64, step(8)), step(512, step(8)), whole(8, 4096, whole(6, 260))]
    if on_gpu:  # several seconds for the reference, which works on the CPU
        found.append(whole(256, 32_768, whole(6, 260), runs=["kernel"]))
    return found


SUBJECT = Subject(name="repetition", about="the repetition detector", cases=cases)

if __name__ == "__main__":
    main(SUBJECT)
