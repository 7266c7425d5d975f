"""Prompts with images: read and checked before work starts, carried to the engine, and back from the buffer as they were."""

import json
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tandem.engine.algo.pack import build_microbatch, rows_of
from tandem.engine.config import DataConfig, RewardConfig, RolloutConfig
from tandem.engine.data import images
from tandem.engine.data.group_bytes import group_from_bytes, group_to_bytes
from tandem.engine.data.journal import segment_digest
from tandem.engine.data.prompts import load_prompts
from tandem.engine.data.replay import ReplayBuffer
from tandem.engine.data.tokenizer import byte_tokenizer
from tandem.engine.reward.judge import Judge
from tandem.engine.rollout.budget import generate_groups, new_group
from tandem.engine.rollout.requests import check_requests
from tandem.engine.types import Completion, GenerationRequest, Prompt, PromptImage, StopState

TOKENIZER = byte_tokenizer()


def picture(path: Path, colour: str = "red", size: tuple[int, int] = (8, 6)) -> Path:
    Image.new("RGB", size, colour).save(path)
    return path


def load(folder: Path, *records: dict[str, Any], config: DataConfig | None = None) -> list[Prompt]:
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps({"question": "What colour?", "answer": "7", **record}) + "\n" for record in records))
    return load_prompts(file, TOKENIZER, config or DataConfig(), context_length=100)


def test_images_are_found_beside_the_prompts_file_and_named_by_their_bytes(tmp_path: Path) -> None:
    red, blue = picture(tmp_path / "red.png"), picture(tmp_path / "blue.png", "blue")
    one, two, none = load(tmp_path, {"image": "red.png"}, {"images": ["red.png", str(blue)]}, {})
    assert one.images == (PromptImage(str(red), PromptImage.digest_of(red.read_bytes())),)
    assert [image.path for image in two.images] == [str(red), str(blue)]
    assert two.images[0].read() == red.read_bytes()
    assert none.images == ()
    assert len({one.id, two.id, none.id}) == 3  # one question about three things


def test_an_image_is_put_before_the_question_by_the_chat_template(tmp_path: Path) -> None:
    picture(tmp_path / "red.png")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
        "{% if part.type == 'image' %}[IMG]{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
    )
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"question": "Q?", "answer": "7", "images": ["red.png", "red.png"]}) + "\n")
    (prompt,) = load_prompts(file, tokenizer, DataConfig(use_chat_template=True), context_length=100)
    assert tokenizer.decode(prompt.token_ids) == "[IMG][IMG]Q?"


def test_what_is_no_image_is_refused_with_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(tmp_path / "red.png")
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "cut.png").write_bytes((tmp_path / "red.png").read_bytes()[:40])
    for record, message in (
        ({"image": "missing.png"}, r"prompts\.jsonl:1: image .*missing\.png does not exist"),
        ({"image": "text.png"}, r"text\.png cannot be decoded"),
        ({"image": "cut.png"}, r"cut\.png cannot be decoded"),
        ({"image": 3}, "they must be paths of files"),
        ({"images": "red.png"}, "they must be paths of files"),
        ({"image": "red.png", "images": []}, "found both 'image' and 'images'"),
    ):
        with pytest.raises(ValueError, match=message):
            load(tmp_path, record)
    monkeypatch.setattr(images, "MAX_IMAGE_PIXELS", 47)
    with pytest.raises(ValueError, match=r"red\.png has 8 x 6 pixels; at most 47"):
        load(tmp_path, {"image": "red.png"})
    monkeypatch.setattr(images, "MAX_IMAGE_BYTES", 10)
    with pytest.raises(ValueError, match="bytes; at most 10 are allowed"):
        load(tmp_path, {"image": "red.png"})


def test_a_file_that_changes_afterwards_is_noticed(tmp_path: Path) -> None:
    file = picture(tmp_path / "red.png")
    (prompt,) = load(tmp_path, {"image": "red.png"})
    picture(file, "green")
    with pytest.raises(ValueError, match=r"red\.png has other bytes than when the prompts were read"):
        prompt.images[0].read()
    file.unlink()
    with pytest.raises(ValueError, match=r"red\.png of a prompt cannot be read any more"):
        prompt.images[0].read()


def test_a_journal_does_not_take_another_images_segment(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png", "blue")
    a, b = (load(tmp_path, {"id": "same", "image": name})[0] for name in ("a.png", "b.png"))
    of_a, of_b = (segment_digest(b"", "w", new_group(prompt, 1, first_iteration=0), 0) for prompt in (a, b))
    assert of_a != of_b


class RecordedEngine:
    """Answers "7" to every prompt that comes with the image that it was recorded with."""

    policy_version, weights_digest, is_alive = 0, None, True

    def __init__(self, image: bytes) -> None:
        self._image = image

    def generate(self, requests: Sequence[GenerationRequest], *, token_budget: int | None = None) -> Generator[Completion, None, None]:
        check_requests(requests, token_budget, context_length=100, vocab_size=300, policy_version=0, sees_images=True)
        for request in requests:
            saw = [image.read() for image in request.images] == [self._image]
            tokens = (ord("7") if saw else ord("0"), 258)
            yield Completion(
                request_id=request.request_id, token_ids=tokens, logprobs=(-0.5, -0.25), stop=StopState.FINISHED, policy_version=0
            )


def test_a_prompt_with_an_image_goes_through_engine_judge_buffer_and_packing(tmp_path: Path) -> None:
    file = picture(tmp_path / "red.png")
    (prompt,) = load(tmp_path, {"image": "red.png"})
    engine: Any = RecordedEngine(file.read_bytes())
    group = new_group(prompt, 2, first_iteration=0)
    config = RolloutConfig(max_response_tokens=10)
    (finished,) = generate_groups(engine, [group], config=config, context_length=100, seed_of=lambda *_: 1, token_budget=None)
    judge = Judge(RewardConfig(), TOKENIZER)
    try:
        judge.submit(finished)
        (scored,) = judge.finish()
    finally:
        judge.close()
    assert [verdict.correct for verdict in scored.verdicts] == [True, True]
    buffer = ReplayBuffer(tmp_path / "replay.sqlite")
    buffer.begin_iteration(0)
    buffer.push_scored([scored])
    (popped,) = buffer.pop_scored()
    buffer.close()
    assert popped == scored
    assert popped.prompt.images == prompt.images
    assert group_from_bytes(group_to_bytes(popped)) == popped
    microbatch = build_microbatch(rows_of(popped, [1.0, -1.0], 0, "mask"))
    assert microbatch.num_rows == 2


def test_an_engine_without_a_vision_tower_refuses_an_image(tmp_path: Path) -> None:
    picture(tmp_path / "red.png")
    (prompt,) = load(tmp_path, {"id": "colour-1", "image": "red.png"})
    request = GenerationRequest(
        request_id=f"0/{prompt.id}/0", token_ids=prompt.token_ids, num_prefix_tokens=0, max_new_tokens=1, seed=0, images=prompt.images
    )
    with pytest.raises(
        ValueError, match=r"request '0/colour-1/0' has 1 image\(s\), such as .*red\.png; this engine has no vision tower, set"
    ):
        check_requests([request], None, context_length=100, vocab_size=300, policy_version=0)
