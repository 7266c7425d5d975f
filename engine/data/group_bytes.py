"""A group as bytes: the length of a JSON header (8 bytes, little endian), the header, then token ids and log-probs as plain arrays.

The header says how many there are; the arrays hold the prompt's token ids (int32), all response token ids (int32), their
behaviour log-probs (float32) and the experts that were recorded (int16), in the order of responses and segments. A segment's entry in
the header is its number of tokens and policy version and, where experts were recorded, their number of sparse layers and per token.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from tandem.engine.types import Group, Prompt, PromptImage, Response, Segment, StopState, Verdict


def group_to_bytes(group: Group) -> bytes:
    """Exact for token ids and for log-probs that are float32 values."""
    segments = [segment for response in group.responses for segment in response.segments]
    header = {
        "prompt": {**_fields(group.prompt), "token_ids": len(group.prompt.token_ids)},
        "responses": [
            {
                "sample": response.sample,
                "stop": response.stop.value,
                "segments": [_segment_header(segment) for segment in response.segments],
            }
            for response in group.responses
        ],
        "verdicts": [_fields(verdict) for verdict in group.verdicts],
        "first_iteration": group.first_iteration,
        "serial": group.serial,
    }
    encoded = json.dumps(header, ensure_ascii=False).encode("utf-8", "surrogatepass")
    token_ids = [token for segment in segments for token in segment.token_ids]
    logprobs = [logprob for segment in segments for logprob in segment.logprobs]
    return b"".join(
        [
            len(encoded).to_bytes(8, "little"),
            encoded,
            np.array(group.prompt.token_ids, dtype="<i4").tobytes(),
            np.array(token_ids, dtype="<i4").tobytes(),
            np.array(logprobs, dtype="<f4").tobytes(),
            *(segment.routed_experts.astype("<i2").tobytes() for segment in segments if segment.routed_experts is not None),
        ]
    )


def group_from_bytes(payload: bytes) -> Group:
    """The inverse of `group_to_bytes`."""
    start = 8 + int.from_bytes(payload[:8], "little")
    header = json.loads(payload[8:start].decode("utf-8", "surrogatepass"))
    num_prompt = header["prompt"]["token_ids"]
    num_tokens = sum(length for response in header["responses"] for length, *_ in response["segments"])
    prompt_ids = np.frombuffer(payload, "<i4", num_prompt, start)
    token_ids = np.frombuffer(payload, "<i4", num_tokens, start + 4 * num_prompt).tolist()
    logprobs = np.frombuffer(payload, "<f4", num_tokens, start + 4 * (num_prompt + num_tokens)).tolist()
    responses = []
    end = 0
    experts_start = start + 4 * num_prompt + 8 * num_tokens
    for response in header["responses"]:
        segments = []
        for length, policy_version, *routed in response["segments"]:
            begin, end = end, end + length
            experts = None
            if routed:
                shape = (length, *routed)
                experts = np.frombuffer(payload, "<i2", math.prod(shape), experts_start).reshape(shape).astype(np.int16)
                experts_start += experts.nbytes
            segments.append(
                Segment(
                    token_ids=tuple(token_ids[begin:end]),
                    logprobs=tuple(logprobs[begin:end]),
                    policy_version=policy_version,
                    routed_experts=experts,
                )
            )
        responses.append(Response(sample=response["sample"], segments=tuple(segments), stop=StopState(response["stop"])))
    return Group(
        prompt=Prompt(**{**header["prompt"], "token_ids": tuple(prompt_ids.tolist()), "images": _images(header["prompt"])}),
        responses=tuple(responses),
        verdicts=tuple(Verdict(**verdict) for verdict in header["verdicts"]),
        first_iteration=header["first_iteration"],
        serial=header["serial"],
    )


def _images(prompt: Mapping[str, Any]) -> tuple[PromptImage, ...]:
    return tuple(PromptImage(*image) for image in prompt.get("images", ()))  # a buffer that is older than images has none


def _segment_header(segment: Segment) -> list[int]:
    experts = segment.routed_experts
    return [len(segment.token_ids), segment.policy_version, *(() if experts is None else experts.shape[1:])]


def _fields(record: Prompt | Verdict) -> dict[str, object]:
    """A shallow dataclasses.asdict."""
    return {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
