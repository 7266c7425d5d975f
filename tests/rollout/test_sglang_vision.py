"""A vision-language model behind a real SGLang server: prompts with images go from a JSONL file to a verdict, and the image counts."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from tandem.engine.config import DataConfig, RepetitionConfig, RewardConfig, RolloutConfig, SGLangConfig
from tandem.engine.data.prompts import load_prompts
from tandem.engine.data.tokenizer import byte_tokenizer
from tandem.engine.reward.judge import Judge
from tandem.engine.rollout.sglang_client import SGLangClient
from tandem.engine.rollout.sglang_generation import Generation
from tandem.engine.rollout.sglang_members import Member
from tandem.engine.rollout.sglang_server import ServerSetup, SGLangServer
from tandem.engine.types import Completion, GenerationRequest, Group, Response, Segment, StopState
from tests.rollout.sglang_servers import need_sglang, shared_files

CONTEXT, NUM_TOKENS = 128, 4
SPECIAL = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")  # 259 to 262
TEMPLATE = (
    "{% for turn in messages %}{% for part in turn.content %}{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}"
)
SCALING = {"rescale_factor": 1 / 255, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3}
STEPS = {"do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True}
PATCHES = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2, "min_pixels": 784, "max_pixels": 12544}


def write_model(folder: Path) -> Qwen2VLForConditionalGeneration:
    """A random Qwen2-VL of two layers, its tokenizer and its image processor."""
    fields: dict[str, Any] = dict(
        text_config={
            **{"vocab_size": 288, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4},
            **{"num_key_value_heads": 2, "max_position_embeddings": CONTEXT, "tie_word_embeddings": False},
            **{"bos_token_id": None, "eos_token_id": None},
            "rope_parameters": {"rope_type": "default", "type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
        },
        vision_config={
            **{"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14},
            **{"in_channels": 3, "in_chans": 3, "spatial_merge_size": 2, "temporal_patch_size": 2},
        },
        **{"vision_start_token_id": 259, "vision_end_token_id": 260, "image_token_id": 261, "video_token_id": 262},
    )
    config = Qwen2VLConfig(**fields)
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:  # large enough that tokens differ
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    tokenizer: Any = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    processor = {
        "processor_class": "Qwen2VLProcessor",
        "size": {"shortest_edge": 784, "longest_edge": 12544},
        **SCALING,
        **STEPS,
        **PATCHES,
    }
    for name, kind in (("preprocessor", "image_processor"), ("video_preprocessor", "video_processor")):
        of_kind = {f"{kind}_type": "Qwen2VL" + kind.title().replace("_", "")}
        (folder / f"{name}_config.json").write_text(json.dumps(processor | of_kind))
    return model


class VisionServer(SGLangServer):
    """With weights and processor of a folder."""

    def __init__(self, model: Qwen2VLForConditionalGeneration, folder: Path) -> None:
        self._folder = folder
        options = ("--load-format", "auto", "--weight-version", "0", "--enable-multimodal")
        config = SGLangConfig(extra_args=options, start_timeout_s=600.0)
        hf_config = model.config.to_dict() | {"architectures": [type(model).__name__]}
        super().__init__(ServerSetup(hf_config=hf_config, config=config, dtype="float32", context_length=CONTEXT, max_running=4))

    def _command(self, folder: Path) -> list[str]:
        shutil.copytree(self._folder, folder / "model", dirs_exist_ok=True)
        return super()._command(folder)


@pytest.fixture
def client(tmp_path: Path) -> Iterator[SGLangClient]:
    need_sglang()
    before = shared_files()
    server = VisionServer(write_model(tmp_path / "model"), tmp_path / "model")
    with contextlib.closing(server):
        server.wait_until_healthy()
        client = SGLangClient(server.url)
        with contextlib.closing(client):
            yield client
    assert shared_files() <= before  # its processes of image processors share semaphores


def answered(client: SGLangClient, requests: list[GenerationRequest]) -> dict[str, Completion]:
    config = RolloutConfig(max_batch=4, repetition=RepetitionConfig(max_period=0, ngram=0))
    member = Member(name="vision", client=client, capacity=4)
    nothing: dict[str, Any] = {"architecture": None}  # is asked of for routed experts only
    generation = Generation(config, requests, [member], stop_token_ids=(), token_budget=None, policy_version=0, **nothing)
    return {completion.request_id: completion for completion in generation.completions(client)}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_completion_depends_on_the_image_and_is_graded(client: SGLangClient, tmp_path: Path) -> None:
    for name, colour in (("red.png", "red"), ("blue.png", "blue"), ("again.png", "red")):
        Image.new("RGB", (56, 56), colour).save(tmp_path / name)
    lines = [
        {"id": name, "question": "Which colour?", "answer": "red", "domain": "k12", "image": f"{name}.png"}
        for name in ("red", "blue", "again")
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tokenizer: Any = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    tokenizer.chat_template = TEMPLATE
    prompts = load_prompts(tmp_path / "prompts.jsonl", tokenizer, DataConfig(use_chat_template=True), context_length=CONTEXT)
    assert len({prompt.token_ids for prompt in prompts}) == 1  # the text is the same

    requests = [
        GenerationRequest(
            request_id=one.id,
            token_ids=one.token_ids,
            num_prefix_tokens=0,
            max_new_tokens=NUM_TOKENS,
            seed=1,
            temperature=0.0,
            images=one.images,
        )
        for one in prompts
    ]
    completions = answered(client, requests)
    red, blue, again = (torch.tensor(completions[name].logprobs) for name in ("red", "blue", "again"))
    assert red.shape == (NUM_TOKENS,)
    assert (red - again).abs().max() < 1e-3  # one from the prefix cache
    assert (red[0] - blue[0]).abs() > 0.01

    # Of random weights nobody expects the word red
    with contextlib.closing(Judge(RewardConfig(), tokenizer)) as judge:
        for prompt in prompts:
            completion = completions[prompt.id]
            segment = Segment(token_ids=completion.token_ids, logprobs=completion.logprobs, policy_version=0)
            judge.submit(Group(prompt=prompt, responses=(Response(sample=0, segments=(segment,), stop=StopState.FINISHED),)))
        verdicts = [group.verdicts[0] for group in judge.finish()]
    assert all(verdict.graded and not verdict.correct for verdict in verdicts)
