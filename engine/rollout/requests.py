"""What every rollout engine asks of a list of requests before it generates."""

from collections.abc import Sequence

from tandem.engine.types import Completion, GenerationRequest, StopState


def check_requests(
    requests: Sequence[GenerationRequest],
    token_budget: int | None,
    *,
    context_length: int,
    vocab_size: int,
    policy_version: int,
    sees_images: bool = False,
) -> None:
    """Raise ValueError naming the request, the value and the rule.

    Args:
        policy_version: the one that is served.
        sees_images: False for an engine without a vision tower.
    """
    if token_budget is not None and token_budget < 0:
        raise ValueError(f"token_budget is {token_budget}; it must not be negative")
    seen: set[str] = set()
    for request in requests:
        name, length = f"request {request.request_id!r}", len(request.token_ids)
        if request.request_id in seen:
            raise ValueError(f"{name} occurs twice; request ids must differ")
        seen.add(request.request_id)
        if not length:
            raise ValueError(f"{name} has no tokens; it needs at least one to continue")
        if request.images and not sees_images:
            raise ValueError(
                f"{name} has {len(request.images)} image(s), such as {request.images[0].path}; this engine has no vision tower, set "
                "rollout.engine=sglang, or leave such prompts out"
            )
        if request.max_new_tokens < 0:
            raise ValueError(f"{name}: max_new_tokens is {request.max_new_tokens}; it must not be negative")
        if length + request.max_new_tokens > context_length:
            raise ValueError(
                f"{name}: {length} tokens and max_new_tokens={request.max_new_tokens} exceed the context of {context_length} tokens"
            )
        if not 0 <= request.num_prefix_tokens < length:
            raise ValueError(f"{name}: num_prefix_tokens is {request.num_prefix_tokens}; it must lie in [0, {length})")
        if not 0 <= request.seed < 1 << 63:
            raise ValueError(f"{name}: seed is {request.seed}; it must lie in [0, 2**63)")
        if request.temperature is not None and request.temperature < 0:
            raise ValueError(f"{name}: temperature is {request.temperature}; it must not be negative")
        if min(request.token_ids) < 0 or max(request.token_ids) >= vocab_size:
            raise ValueError(f"{name}: token ids must lie in [0, {vocab_size})")
        if request.recorded is not None:
            _check_recorded(name, request.max_new_tokens, request.recorded, policy_version)


def _check_recorded(name: str, max_new_tokens: int, recorded: Completion, policy_version: int) -> None:
    """Whether this generation could have made it."""
    version, length = recorded.policy_version, len(recorded.token_ids)
    if version != policy_version:
        raise ValueError(f"{name}: its recorded completion is of policy version {version}, the engine serves {policy_version}")
    if length > max_new_tokens:
        raise ValueError(f"{name}: its recorded completion has {length} tokens, max_new_tokens is {max_new_tokens}")
    if recorded.stop is StopState.ABORTED:
        raise ValueError(f"{name}: its recorded completion was aborted, which no request repeats; ask without it")
