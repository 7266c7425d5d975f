"""Partial rollouts (Kimi k1.5, 2.6.2): a phase generates a fixed number of tokens and what is unfinished goes on in the next.

Turns groups into requests for the responses that are not final, and completions back into groups.
"""

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence

from tandem.engine.config import RolloutConfig
from tandem.engine.types import Completion, EngineDiedError, GenerationRequest, Group, Prompt, Response, RolloutEngine, Segment, StopState

SeedOf = Callable[[Group, int, int], int]
RecordedOf = Callable[[Group, int, int], Completion | None]
OnCompletion = Callable[[Group, int, int, Completion], None]


def new_group(prompt: Prompt, num_samples: int, *, first_iteration: int = 0, serial: int = 0) -> Group:
    """A group whose `num_samples` responses are yet to be generated."""
    responses = tuple(Response(sample=i) for i in range(num_samples))
    return Group(prompt=prompt, responses=responses, first_iteration=first_iteration, serial=serial)


def sample_seed(run_seed: int, iteration: int, group: Group, sample: int, segment: int) -> int:
    """63 bits that differ for every segment of every sample of every group of a run; a pure function."""
    text = "\0".join((str(run_seed), str(iteration), group.prompt.id, str(group.serial), str(sample), str(segment)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generate_groups(
    engine: RolloutEngine,
    groups: Sequence[Group],
    *,
    config: RolloutConfig,
    context_length: int,
    seed_of: SeedOf,
    token_budget: int | None,
    temperature: float | None = None,
    on_death: Callable[[EngineDiedError], None] | None = None,
    recorded: RecordedOf | None = None,
    on_completion: OnCompletion | None = None,
) -> Iterator[Group]:
    """Continue every response that is not final, until all are or the budget runs out.

    Args:
        groups: fresh ones (see `new_group`) and ones cut by an earlier phase. Their order is the engine's schedule.
        context_length: most tokens of prompt plus response.
        seed_of: (group, sample, index of the segment that is generated now) → 63-bit seed.
        token_budget: new tokens over all groups; None: no limit.
        temperature: instead of the engine's; 0 is greedy (evaluation).
        on_death: called when the engine dies; if it returns, the responses that were running are yielded as they came, to be generated
            again. None: the error is raised.
        recorded: (group, sample, index of the segment) → what an interrupted run of this very phase got for it, or None. It is not
            generated again; see `RolloutEngine.generate`.
        on_completion: called with (group, sample, index of the segment, completion) as each segment ends, before its group is
            yielded, with `group` as it was given and the completion as `recorded` wants it back; not for recorded and aborted ones.
    Yields: each group as soon as all its responses are final, then those that were cut, in their order. Tokens of this
        phase are a new segment with the engine's policy version; a response that got none keeps its segments.
    Raises: ValueError naming the prompt whose group is empty, or that leaves no room for a response in the context.
    """
    for group in groups:
        if not group.responses:
            raise ValueError(f"the group of prompt {group.prompt.id!r} is empty; it needs at least one response")
        if len(group.prompt.token_ids) >= context_length:
            length = len(group.prompt.token_ids)
            raise ValueError(f"prompt {group.prompt.id!r} has {length} tokens; a context of {context_length} leaves none for a response")
    return _generate_groups(
        engine, groups, config.max_response_tokens, context_length, seed_of, token_budget, temperature, on_death, recorded, on_completion
    )


def _generate_groups(
    engine: RolloutEngine,
    groups: Sequence[Group],
    max_response_tokens: int,
    context_length: int,
    seed_of: SeedOf,
    token_budget: int | None,
    temperature: float | None,
    on_death: Callable[[EngineDiedError], None] | None,
    recorded: RecordedOf | None,
    on_completion: OnCompletion | None,
) -> Iterator[Group]:
    responses = [list(group.responses) for group in groups]
    num_waiting = [0] * len(groups)
    requests: list[GenerationRequest] = []
    place: dict[str, tuple[int, int]] = {}
    known_ids = set[str]()
    for g, group in enumerate(groups):
        for i, response in enumerate(group.responses):
            if response.stop.is_final:
                continue
            longest = min(max_response_tokens, context_length - len(group.prompt.token_ids))
            if response.num_tokens >= longest:
                responses[g][i] = dataclasses.replace(response, stop=StopState.LENGTH)
                continue
            request_id = f"{g}/{group.prompt.id}/{response.sample}"
            place[request_id] = g, i
            num_waiting[g] += 1
            segment = len(response.segments)
            known = recorded(group, response.sample, segment) if recorded is not None else None
            if known is not None:
                known = dataclasses.replace(known, request_id=request_id)
                known_ids.add(request_id)
            requests.append(
                GenerationRequest(
                    request_id=request_id,
                    token_ids=group.prompt.token_ids + response.token_ids,
                    num_prefix_tokens=response.num_tokens,
                    max_new_tokens=longest - response.num_tokens,
                    seed=seed_of(group, response.sample, segment),
                    temperature=temperature,
                    recorded=known,
                    images=group.prompt.images,
                )
            )

    def merged(g: int) -> Group:
        return dataclasses.replace(groups[g], responses=tuple(responses[g]))

    yield from (merged(g) for g in range(len(groups)) if not num_waiting[g])
    unfinished = {g for g in range(len(groups)) if num_waiting[g]}
    try:
        with contextlib.closing(engine.generate(requests, token_budget=token_budget)) as completions:
            for completion in completions:
                g, i = place[completion.request_id]
                if on_completion is not None and completion.request_id not in known_ids and completion.stop is not StopState.ABORTED:
                    before = responses[g][i]
                    on_completion(groups[g], before.sample, len(before.segments), completion)
                responses[g][i] = _extended(responses[g][i], completion)
                if all(response.stop.is_final for response in responses[g]):
                    unfinished.remove(g)
                    yield merged(g)
    except EngineDiedError as error:
        if on_death is None:
            raise
        on_death(error)
    yield from (merged(g) for g in sorted(unfinished))


def _extended(response: Response, completion: Completion) -> Response:
    segments = response.segments
    if completion.token_ids:
        segment = Segment(
            token_ids=completion.token_ids,
            logprobs=completion.logprobs,
            policy_version=completion.policy_version,
            routed_experts=completion.routed_experts,
        )
        segments = (*segments, segment)
    return dataclasses.replace(response, segments=segments, stop=completion.stop)
