"""Block-fp8 weights in SGLang's processes: taken as they come, computed with as what they stand for, or refused with the reason."""

import copy
import dataclasses
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tandem.engine.architecture import Architecture
from tandem.engine.quantised import FP8, is_quantised, scale_name
from tandem.engine.rollout.sglang import SGLangEngine
from tandem.engine.rollout.sglang_cpu import tandem_sglang_fp8
from tandem.engine.rollout.sglang_receiver import Receiver
from tandem.engine.rollout.sglang_server import SGLangServer
from tandem.engine.types import WeightTransferError
from tandem.kernels.block_fp8 import BLOCK, dequantise, quantise
from tests.rollout.models import disk_tensors, reference_logprobs, send, tiny_model
from tests.rollout.sglang_servers import need_sglang, setup_of
from tests.rollout.sharded_model import ShardedModel
from tests.rollout.test_sglang import CONFIG, PROMPT, ask
from tests.rollout.test_sglang_receiver import transfer

Tensors = Mapping[str, torch.Tensor]


def quantised_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """As they lie in a block-fp8 checkpoint of the model."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in disk_tensors(model).items():
        found[name] = tensor
        if is_quantised(name):
            found[name], found[scale_name(name)] = quantise(tensor)
    return found


# ---- the receiver


class Fp8Model(ShardedModel):
    """Its matrices are float8_e4m3fn, as SGLang's are that was started with such a configuration."""

    def __init__(self, tensors: Tensors) -> None:
        super().__init__(tensors)
        for name, tensor in tensors.items():
            if tensor.dtype == FP8:
                parameter = self.get_parameter(self._places[name])
                parameter.data = parameter.data.to(FP8)


@pytest.fixture(scope="module")
def versions() -> list[dict[str, torch.Tensor]]:
    return [quantised_tensors(tiny_model(seed=seed)) for seed in range(2)]


@pytest.fixture(scope="module")
def architecture() -> Architecture:
    return Architecture.from_hf(tiny_model().config.to_dict())


def bytes_of(model: torch.nn.Module) -> dict[str, bytes]:
    return {name: parameter.data.contiguous().view(torch.uint8).numpy().tobytes() for name, parameter in model.named_parameters()}


def test_matrices_and_scales_are_taken_like_other_tensors(versions: list[dict[str, torch.Tensor]], architecture: Architecture) -> None:
    model = Fp8Model(versions[0])
    receiver = Receiver(model, architecture, torch.float32, 0, "block_fp8")
    digests = []
    for number in (0, 1, 0):
        transfer(receiver.run, versions[number], number, bucket_bytes=4096 + 512 * number)
        receiver.run("commit", (number,))
        digests.append(receiver.run("digest", ()))
        expected = Fp8Model(versions[number])
        expected.load_weights(versions[number].items())
        assert bytes_of(model) == bytes_of(expected)
    assert digests[0] == digests[2] != digests[1]
    receiver.run("revert", (0,))
    assert receiver.run("digest", ()) == digests[1]


@pytest.mark.parametrize("damaged", ["model.layers.1.mlp.down_proj.weight", "model.layers.1.mlp.down_proj.weight_scale_inv"])
def test_a_damaged_matrix_or_scale_is_named(versions: list[dict[str, torch.Tensor]], architecture: Architecture, damaged: str) -> None:
    model = Fp8Model(versions[0])
    receiver = Receiver(model, architecture, torch.float32, 0, "block_fp8")
    transfer(receiver.run, versions[0], 0)
    receiver.run("commit", (0,))
    before = bytes_of(model)

    def load_damaged(command: str, arguments: Any) -> Any:
        if command == "load":
            arguments = arguments[0], [e._replace(checksum=e.checksum ^ (e.name == damaged)) for e in arguments[1]]
        return receiver.run(command, arguments)

    with pytest.raises(WeightTransferError, match=rf"tensor {damaged}, bytes \d+:\d+: checksum"):
        transfer(load_damaged, versions[1], 1)
    with pytest.raises(WeightTransferError, match="roll back"):
        receiver.run("commit", (1,))
    assert bytes_of(model) == before


def test_weights_that_were_not_quantised_or_lack_scales_are_refused(
    versions: list[dict[str, torch.Tensor]], architecture: Architecture
) -> None:
    receiver = Receiver(Fp8Model(versions[0]), architecture, torch.float32, 0, "block_fp8")
    with pytest.raises(WeightTransferError, match=r"tensors of the model are missing, the first is .*weight_scale_inv"):
        transfer(receiver.run, disk_tensors(tiny_model()), 0)
    plain = {name: tensor.float() for name, tensor in versions[0].items()}
    with pytest.raises(WeightTransferError, match=r"q_proj\.weight is torch\.float32; the model is torch\.float8_e4m3fn"):
        transfer(receiver.run, plain, 0)
    of_plain = Receiver(ShardedModel(disk_tensors(tiny_model())), architecture, torch.float32, 0)
    with pytest.raises(WeightTransferError, match=r"q_proj\.weight is torch\.float8_e4m3fn; the model is torch\.float32"):
        transfer(of_plain.run, versions[0], 0)


@pytest.mark.parametrize(
    ("owner", "mark", "value", "said"),
    [
        ("layer", "use_intel_amx_backend", True, "packed for AMX"),
        ("layer", "workspace", torch.zeros(1), "repacked for Marlin"),
        ("parameter", "format_ue8m0", True, "scales that are powers of two, for DeepGEMM"),
        ("parameter", "is_shuffled", True, "shuffled for AITER"),
    ],
)
def test_weights_that_sglang_keeps_in_another_way_are_refused(
    versions: list[dict[str, torch.Tensor]], architecture: Architecture, owner: str, mark: str, value: object, said: str
) -> None:
    model = Fp8Model(versions[0])
    name = next(name for name, parameter in model.named_parameters() if parameter.dtype == FP8)
    setattr(model if owner == "layer" else model.get_parameter(name), mark, value)
    with pytest.raises(WeightTransferError, match=rf"{said} on this machine, .* set rollout\.quantization to None"):
        Receiver(model, architecture, torch.float32, 0, "block_fp8")
    setattr(model if owner == "layer" else model.get_parameter(name), mark, False)
    Receiver(model, architecture, torch.float32, 0, "block_fp8")


def test_a_parameter_with_other_blocks_is_named(versions: list[dict[str, torch.Tensor]], architecture: Architecture) -> None:
    model = Fp8Model(versions[0])
    scales = next(name for name, _ in model.named_parameters() if name.endswith("o_proj_weight_scale_inv"))
    model.get_parameter(scales).data = model.get_parameter(scales).data.to(torch.bfloat16)
    with pytest.raises(WeightTransferError, match=rf"weight_scale_inv is torch\.float32, SGLang's parameter {scales} torch\.bfloat16"):
        Receiver(model, architecture, torch.float32, 0, "block_fp8")
    with pytest.raises(WeightTransferError, match=r"no parameter of SGLang's ShardedModel is float8_e4m3fn after it has started"):
        Receiver(ShardedModel(versions[0]), architecture, torch.float32, 0, "block_fp8")


def test_a_model_that_computes_with_what_it_loads_is_refused(versions: list[dict[str, torch.Tensor]], architecture: Architecture) -> None:
    class Rescaling(Fp8Model):
        def load_weights(self, weights: Any) -> None:
            super().load_weights((name, tensor * 2 if name.endswith("_scale_inv") else tensor) for name, tensor in weights)

    with pytest.raises(WeightTransferError, match=r"Rescaling computes with what it loads .*; set rollout\.quantization to None"):
        Receiver(Rescaling(versions[0]), architecture, torch.float32, 0, "block_fp8")


# ---- what a server on a CPU computes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_multiplies_with_what_its_blocks_stand_for(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight, bias, x = torch.randn(384, 200).to(dtype), torch.randn(384).to(dtype), torch.randn(3, 200).to(dtype)
    fp8, scale = quantise(weight)
    found = tandem_sglang_fp8.linear(None, SimpleNamespace(weight=fp8, weight_scale_inv=scale), x, bias)
    exact = x.double() @ in_fp64(weight).T + bias.double()
    assert found.dtype == dtype
    assert torch.allclose(found.double(), exact, rtol=0, atol=1e-4 if dtype == torch.float32 else 0.5)
    experts = tandem_sglang_fp8.Experts(torch.stack([fp8, fp8]), torch.stack([scale, 2 * scale]), dtype)
    assert torch.equal(experts[1], 2 * experts[0])


# ---- a real server


def in_fp64(weight: torch.Tensor) -> torch.Tensor:
    """What the format makes of a matrix, worked out in fp64 from its definition: 448 is the largest of e4m3, which has three bits after
    the leading one down to 2^-6 and steps of 2^-9 below."""
    back = torch.zeros(weight.shape, dtype=torch.float64)
    for rows in range(0, weight.shape[0], BLOCK):
        for columns in range(0, weight.shape[1], BLOCK):
            block = weight[rows : rows + BLOCK, columns : columns + BLOCK].double()
            largest = block.abs().max()
            scale = (largest / 448).float().double() if largest > 0 else torch.tensor(1.0, dtype=torch.float64)
            scaled = (block.float() * (1 / scale.float())).double()  # the format's own arithmetic is fp32
            step = torch.exp2(torch.clamp(torch.floor(torch.log2(scaled.abs().clamp(min=2.0**-20))), min=-6) - 3)
            back[rows : rows + BLOCK, columns : columns + BLOCK] = (torch.round(scaled / step) * step).clamp(-448, 448) * scale
    return back


def test_the_formula_in_fp64_is_that_of_the_kernel() -> None:
    torch.manual_seed(1)
    weight = torch.randn(200, 300) * torch.logspace(-3, 3, 300)
    weight[:BLOCK, :BLOCK] = 0
    assert torch.equal(dequantise(*quantise(weight)), in_fp64(weight).float())


def model_of_what_is_served(model: PreTrainedModel) -> PreTrainedModel:
    """Hugging Face's model with the weights that the quantised ones stand for."""
    served = copy.deepcopy(model)
    with torch.no_grad():
        for name, tensor in served.state_dict().items():
            matrices = tensor if tensor.dim() == 3 else [tensor]
            if name.endswith("gate_up_proj"):
                matrices = [half for expert in tensor for half in expert.chunk(2)]
            for matrix in matrices if "_proj" in name and "norm" not in name else ():
                matrix.copy_(in_fp64(matrix))
    return served


@pytest.mark.slow
@pytest.mark.sglang
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("kind", "tp"), [("qwen3", 1), ("qwen3_moe", 2)])
def test_a_server_generates_with_the_numbers_that_its_blocks_stand_for(kind: str, tp: int) -> None:
    """A hidden size that is no multiple of 128; fused projections and experts; two processes that have a part of the blocks each."""
    need_sglang()
    sizes: dict[str, Any] = {"hidden_size": 200, "intermediate_size": 256 * tp, "num_attention_heads": 2 * tp, "num_key_value_heads": tp}
    sizes |= {"head_dim": 128, "num_hidden_layers": 2, "initializer_range": 0.05}
    if kind == "qwen3_moe":
        sizes |= {"moe_intermediate_size": 128 * tp, "mlp_only_layers": []}
    models = [tiny_model(kind, seed=seed, **sizes) for seed in range(2)]
    served = [model_of_what_is_served(model) for model in models]
    config = dataclasses.replace(CONFIG, tp=tp, quantization="block_fp8", engine="sglang")
    slow_start = dataclasses.replace(CONFIG.sglang, start_timeout_s=900.0)
    server = SGLangServer(setup_of(models[0], quantization="block_fp8", tp=tp, config=slow_start))
    with SGLangEngine(server, config, stop_token_ids=(), timeout_s=300.0) as engine:

        def difference(model: PreTrainedModel) -> float:
            (completion,) = engine.generate([ask(max_new_tokens=16)])
            assert completion.policy_version == engine.policy_version
            return (reference_logprobs(model, PROMPT, completion.token_ids) - torch.tensor(completion.logprobs)).abs().max().item()

        digests = []
        for version in (0, 1, 2):
            send(engine, quantised_tensors(models[version % 2]), version)
            engine.commit()
            engine.settle()
            digests.append(engine.weights_digest)
            assert difference(served[version % 2]) <= 1e-5
            assert difference(models[version % 2]) > 1e-3, "what quantisation makes of it"
        assert digests[0] == digests[2] != digests[1]

        def damage(number: int, data: bytearray) -> None:
            data[-1] ^= 1

        with pytest.raises(WeightTransferError, match=r"tensor \S+, bytes \d+:\d+: checksum"):
            send(engine, quantised_tensors(models[1]), 3, corrupt=damage)
        engine.rollback()
        assert difference(served[0]) <= 1e-5
