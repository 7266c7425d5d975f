"""Data that crosses the border between components, and the Protocols that swappable parts meet.

Token ids are the only truth of a response: text is decoded from them for graders and people and never
tokenised again. Log-probs are natural logarithms (nats).
"""

import enum
import hashlib
from collections.abc import Collection, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch


class StopState(enum.StrEnum):
    """Why a response's newest segment ended."""

    FINISHED = "finished"  # the model emitted a stop token
    LENGTH = "length"  # the response reached its maximum length
    REPETITION = "repetition"  # the repetition detector stopped it
    BUDGET = "budget"  # the phase's token budget ran out: resumed in a later iteration
    ABORTED = "aborted"  # taken back by the caller: resumed in a later iteration

    @property
    def is_final(self) -> bool:
        """True when the response is complete and can be graded."""
        return self not in (StopState.BUDGET, StopState.ABORTED)


class PromptImage(NamedTuple):
    """An image that belongs to a prompt: a file, and a digest of its bytes, by which a file that has changed since is noticed."""

    path: str  # absolute
    digest: str  # blake2b of 16 bytes, in hexadecimal

    def read(self) -> bytes:
        """Raises: ValueError if the file is gone, or not the one that was read at the start."""
        try:
            data = Path(self.path).read_bytes()
        except OSError as error:
            raise ValueError(f"image {self.path} of a prompt cannot be read any more: {error}; put it back") from error
        if self.digest_of(data) != self.digest:
            raise ValueError(f"image {self.path} has other bytes than when the prompts were read; put the file back, or start a new run")
        return data

    @staticmethod
    def digest_of(data: bytes) -> str:
        return hashlib.blake2b(data, digest_size=16).hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One line of the prompts file, tokenised."""

    id: str
    text: str
    token_ids: tuple[int, ...]
    answer: str
    domain: str = "math"
    level: int = 0  # curriculum level, 0 is the easiest
    grading: str = ""  # JSON object for the domain's grader, as the file has it: hidden tests, the kind of answer; "" without one
    images: tuple[PromptImage, ...] = ()  # for engines with a vision tower; graders see the text


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """Tokens that one policy version generated without interruption.

    `logprobs` are the behaviour log-probs: of each sampled token under the temperature-scaled softmax over
    the whole vocabulary, before top-p and top-k cut it (no renormalisation).
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    policy_version: int
    routed_experts: np.ndarray | None = field(default=None, compare=False)  # see `Completion`

    def __post_init__(self) -> None:
        assert len(self.token_ids) == len(self.logprobs), (len(self.token_ids), len(self.logprobs))


@dataclass(frozen=True, kw_only=True, slots=True)
class Response:
    """One sampled answer to a prompt: segments of one or more policy versions, oldest first."""

    sample: int  # index within the group, 0 … k-1
    segments: tuple[Segment, ...] = ()
    stop: StopState = StopState.BUDGET

    @property
    def token_ids(self) -> tuple[int, ...]:
        return tuple(token for segment in self.segments for token in segment.token_ids)

    @property
    def behaviour_logprobs(self) -> tuple[float, ...]:
        return tuple(logprob for segment in self.segments for logprob in segment.logprobs)

    @property
    def policy_versions(self) -> tuple[int, ...]:
        """The policy version of every token."""
        return tuple(s.policy_version for s in self.segments for _ in s.token_ids)

    @property
    def num_tokens(self) -> int:
        return sum(len(segment.token_ids) for segment in self.segments)


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """A grader's judgement of one response. `graded=False` means nobody could tell: never a zero."""

    correct: bool
    answer: str | None = None  # what was extracted from the response
    reason: str = ""
    graded: bool = True
    well_formed: bool = True  # False: the response lacks one of reward.format_markers


class Grader(Protocol):
    """Grades the responses of one domain."""

    def check(self, prompt: Prompt) -> None:
        """Before a run: refuse a prompt that can never be graded. Raises: ValueError that says what it lacks."""
        ...

    def grade(self, text: str, prompt: Prompt, *, is_complete: bool) -> "Verdict | Future[Verdict]":
        """Grade the end of one response, at once or in the background.

        Returns within milliseconds. Work that may take longer, hang or crash is a future's, which ends by a deadline of its own.
        What cannot be told is `graded=False`; an exception, raised or a future's, means the same.

        Args:
            is_complete: False for a response that was cut.
        """
        ...

    def close(self) -> None:
        """End processes and connections; futures that are not done may then end in any way."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """The k responses of one prompt. Scored once `verdicts` holds one entry per response."""

    prompt: Prompt
    responses: tuple[Response, ...]
    verdicts: tuple[Verdict, ...] = ()
    first_iteration: int = 0  # the iteration in which the prompt was drawn
    serial: int = 0  # counts the groups of a run in the order drawn: tells two of one prompt apart

    @property
    def is_finished(self) -> bool:
        return all(response.stop.is_final for response in self.responses)

    @property
    def success_rate(self) -> float:
        """Fraction of graded responses that are correct; 0 when none was graded."""
        graded = [verdict for verdict in self.verdicts if verdict.graded]
        return sum(verdict.correct for verdict in graded) / len(graded) if graded else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationRequest:
    """Ask an engine to continue `token_ids` (prompt and, when resumed, what was generated before)."""

    request_id: str
    token_ids: tuple[int, ...]
    num_prefix_tokens: int  # how many of token_ids were generated in earlier segments (0 when fresh)
    max_new_tokens: int
    seed: int  # 63 bits; the token at position p of this request depends on (seed, p) and the logits only
    temperature: float | None = None  # None: the engine's; 0: greedy (log-probs then at temperature 1)
    recorded: "Completion | None" = None  # what an interrupted run already got for this very request; see `RolloutEngine.generate`
    images: tuple[PromptImage, ...] = ()  # the prompt's, in the order of their places among its tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """What an engine made of one request: new tokens only, the stop token included."""

    request_id: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    stop: StopState
    policy_version: int
    # int16 [new tokens, MoE layers, experts per token]: the experts chosen at the positions whose logits gave the new tokens, global
    # expert indices in the router's order. None where the engine does not record them.
    routed_experts: np.ndarray | None = field(default=None, compare=False)


class EngineDiedError(RuntimeError):
    """A rollout engine is gone. What it was generating is lost; `restart` makes another, which has no weights yet."""


class RolloutEngine(Protocol):
    """Generates with the weights of one policy version. Token ids in, token ids and log-probs out."""

    @property
    def policy_version(self) -> int:
        """The version whose weights are committed; -1 before the first."""
        ...

    def generate(self, requests: Sequence[GenerationRequest], *, token_budget: int | None = None) -> Generator[Completion, None, None]:
        """Yield one completion per request, as each ends, in no promised order.

        Once `token_budget` new tokens have been generated over all requests, the rest end with
        StopState.BUDGET and what they have (perhaps nothing). Closing the iterator aborts what is left.

        A request that carries a `recorded` completion is not computed again: it takes its turns and its part of the
        budget as if it were, and ends with what was recorded. Where tokens do not depend on the rest of the batch (the
        embedded engine), a phase that was interrupted therefore goes on bit for bit.
        """
        ...

    @property
    def weights_digest(self) -> str | None:
        """Equal digests: equal weights, bit for bit. None where the engine cannot tell, and before the first commit."""
        ...

    def abort(self, request_ids: Collection[str] | None = None) -> None:
        """End these running requests (all when None) with StopState.ABORTED and their partial tokens."""
        ...

    @property
    def is_alive(self) -> bool:
        """Whether the engine's process runs."""
        ...

    def wait_until_ready(self) -> None:
        """Return once the engine takes commands; starting one takes a while. Raises: EngineDiedError if it never does."""
        ...

    def restart(self) -> None:
        """Replace an engine that died by one without weights (policy_version -1)."""
        ...

    def close(self) -> None:
        """Stop the engine and everything it started."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorMeta:
    """A whole tensor under its Hugging Face name, as it lies in a safetensors file."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class BucketEntry(NamedTuple):
    """Bytes [tensor_start, tensor_start + num_bytes) of a tensor, lying at bucket_start in a bucket.

    A tuple: making and pickling a dataclass would take a good part of the time in which the bytes are copied.
    """

    name: str
    tensor_start: int
    num_bytes: int
    bucket_start: int  # a multiple of 256
    checksum: int  # xxh3-64 of these bytes as the sender wrote them


class WeightSink(Protocol):
    """The receiving side of a swap: a rollout engine. Old weights stay usable until `commit`."""

    @property
    def policy_version(self) -> int:
        """The version whose weights are committed; -1 before the first."""
        ...

    def prepare(self, policy_version: int, tensors: Sequence[TensorMeta]) -> None:
        """Begin a transaction; the names, shapes and dtypes must be those of the model."""
        ...

    def load(self, shared_memory_path: str, entries: Sequence[BucketEntry]) -> None:
        """Take over one bucket. Verifies every checksum before it returns; the buffer may then be reused.

        Raises: WeightTransferError naming the tensor whose bytes differ.
        """
        ...

    def commit(self) -> None:
        """Make the prepared version the serving one. Raises if any byte of any tensor is missing."""
        ...

    def revert(self) -> None:
        """Undo the last commit, which is not settled yet: what served before it serves again, with its version."""
        ...

    def settle(self) -> None:
        """The last commit is final; memory that only `revert` needs may go."""
        ...

    def rollback(self) -> None:
        """Forget the transaction; the old version goes on serving. Safe to call without one."""
        ...


class CheckpointError(RuntimeError):
    """A checkpoint was not saved; says on every rank what could not be written and which one is the newest. Those before it are whole."""


class DeviceMemoryError(RuntimeError):
    """A GPU has too little memory for the side whose turn it is, or the other side left too much on it; says which, how much, and what
    to lower. The trainer's state is whole."""


class WeightTransferError(RuntimeError):
    """A swap failed and was rolled back on every rank; names rank, bucket and tensor."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightShard:
    """One parameter as this trainer rank holds it (the live tensor, not a copy).

    `name` is Megatron's parameter name with *global* layer and expert indices, for example
    `decoder.layers.3.mlp.experts.local_experts.7.linear_fc1.weight`. `tp_rank` of `tp_size` is the position in the
    group that splits it: tensor parallel, or expert tensor parallel for expert weights; a parameter that is
    replicated over that group is held whole by each of its ranks.
    """

    name: str
    tensor: torch.Tensor
    tp_rank: int
    tp_size: int


class WeightSource(Protocol):
    """The sending side of a swap and of an export: the trainer."""

    @property
    def hf_config(self) -> Mapping[str, Any]:
        """The Hugging Face config.json of the model, as a dictionary."""
        ...

    def weight_shards(self) -> Iterable[WeightShard]:
        """All parameters of this rank, in a fixed order."""
        ...

    def weights_changed(self) -> None:
        """Take over values that were written into the tensors of `weight_shards`."""
        ...


class Tokenizer(Protocol):
    """What is used of a Hugging Face tokenizer."""

    eos_token_id: int | None
    pad_token_id: int | None

    def encode(self, text: str, add_special_tokens: bool = ...) -> list[int]: ...

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = ...) -> str: ...
