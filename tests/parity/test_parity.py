"""The tool that finds where two ways to compute a model part: it agrees where they agree, and names damage where it was done."""

from typing import Any

import pytest
import torch

from tandem.engine.cli import main
from tandem.engine.parity.compare import Difference, compare, parity, parse_layout, report
from tandem.engine.parity.recording import BACKWARD, FORWARD, LOGPROBS, Recording, make_rows
from tandem.engine.trainer.megatron import MegatronTrainer

TOLERANCE = 1e-5
SMALL: dict[str, Any] = {"num_rows": 3, "longest": 8}


def first_different(found: list[Difference]) -> Difference | None:
    return next((difference for difference in found if difference.error > TOLERANCE), None)


@pytest.mark.parametrize(
    ("text", "fields", "num_ranks"),
    [
        ("1", {}, 1),
        ("tp2.pp2.cp2.sp", {"tp": 2, "pp": 2, "cp": 2, "sequence_parallel": True}, 8),
        ("ep4", {"ep": 4}, 4),
        ("tp2.sp.ep4.etp1.pp2", {"tp": 2, "ep": 4, "etp": 1, "pp": 2, "sequence_parallel": True}, 8),
        ("dp3.full", {}, 3),
        ("pp2.vpp2.dp2.allgather", {"pp": 2, "vpp": 2}, 4),
    ],
)
def test_a_layout_is_written_as_its_axes(text: str, fields: dict[str, Any], num_ranks: int) -> None:
    layout = parse_layout(text)
    assert layout.num_ranks == num_ranks
    assert all(getattr(layout.mesh, name) == value for name, value in fields.items())
    assert layout.recompute == ("full" if "full" in text else "none")
    assert layout.dispatcher == ("allgather" if "allgather" in text else "alltoall")


@pytest.mark.parametrize("text", ["tp", "tp2.tp2", "tp2,pp2", "xp2", "", "full.selective", "dp0"])
def test_a_layout_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="layout"):
        parse_layout(text)


@pytest.mark.distributed
def test_a_layout_agrees_with_transformers_in_every_layer_and_gradient() -> None:
    found = parity("qwen3", [parse_layout("tp2.sp")], against="hf", **SMALL)
    assert first_different(found) is None, first_different(found)
    names = [(difference.direction, difference.name) for difference in found]
    # 4 layers of attention, mlp and output between embedding, norm and log-probs; then 5 layer outputs, the norm and 47 weights
    assert len([name for direction, name in names if direction == FORWARD]) == 15
    assert len([name for direction, name in names if direction == BACKWARD]) == 6 + 47
    assert names.index((BACKWARD, "layer 3 output")) < names.index((BACKWARD, "model.layers.0.mlp.up_proj.weight"))


@pytest.mark.distributed
def test_the_rollout_engine_agrees_with_the_trainer() -> None:
    (found,) = parity("qwen3", [parse_layout("1")], against="rollout", **SMALL)
    assert found.name == LOGPROBS
    assert found.error < TOLERANCE


def perturb(trainer: MegatronTrainer) -> None:
    """One weight of layer 2's feed-forward, on the second tensor-parallel rank only."""
    if trainer.mesh.tp_rank == 1:
        with torch.no_grad():
            dict(trainer.chunks[0].named_parameters())["decoder.layers.2.mlp.linear_fc2.weight"][5, 3] += 0.1


def scale_gradient(trainer: MegatronTrainer) -> None:
    """Layer 1's output projection gets a gradient that is 1 % too large."""
    weight = dict(trainer.chunks[0].named_parameters())["decoder.layers.1.self_attention.linear_proj.weight"]
    weight.register_hook(lambda gradient: 1.01 * gradient)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("tamper", "direction", "name", "num_layers"),
    [(perturb, FORWARD, "layer 2 mlp", 4), (scale_gradient, BACKWARD, "model.layers.1.self_attn.o_proj.weight", 4)],
    ids=["a weight on one rank", "a gradient's scale"],
)
def test_damage_is_found_where_it_was_done(tamper: Any, direction: str, name: str, num_layers: int) -> None:
    found = parity("qwen3", [parse_layout("1"), parse_layout("tp2")], tamper=tamper, **SMALL)
    first = first_different(found)
    assert first is not None
    assert (first.direction, first.name) == (direction, name)
    if tamper is scale_gradient:  # nothing else is wrong
        assert first.error == pytest.approx(0.01, rel=1e-3)
        assert [difference.name for difference in found if difference.error > TOLERANCE] == [name]


def test_copies_that_differ_and_elements_that_are_missing_are_differences() -> None:
    key, here = (FORWARD, "x"), torch.tensor([0, 1])
    whole: Recording = {key: [(here, torch.tensor([[3.0], [4.0]]))]}
    copies: Recording = {key: [(here[:1], torch.tensor([[3.0]])), (here, torch.tensor([[3.0], [4.5]]))]}
    part: Recording = {key: [(here[:1], torch.tensor([[3.0]]))]}
    nan: Recording = {key: [(here, torch.tensor([[3.0], [float("nan")]]))]}
    assert compare([whole], [whole], [key])[0].error == 0
    assert compare([whole], [whole, copies], [key])[0].error == pytest.approx(0.5 / 5)
    assert compare([whole], [part], [key])[0].error == float("inf")
    assert compare([whole], [nan], [key])[0].error == float("inf")


def test_the_report_names_the_first_and_counts(capsys: pytest.CaptureFixture[str]) -> None:
    found = [Difference(direction=FORWARD, name=f"layer {i} output", error=10.0 ** (i - 8)) for i in range(8)]
    assert not report(found, tolerance=1e-4, names=("a", "b"))
    shown = " ".join(capsys.readouterr().out.split())
    assert "3 of 8 tensors differ; the first is forward: layer 5 output (1.0e-03)." in shown
    assert "layer 0 output" not in shown
    assert report(found, tolerance=1.0, names=("a", "b"))
    assert "All 8 tensors agree within 1." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("layouts", "status", "says"),
    [
        (("tp3", "1"), 2, "mesh.tp=3 does not divide the model's num_attention_heads=4"),
        (("tp2",), 2, "1 layouts were given; parity compares two"),
        (("1", "dp2"), 1, "tensors differ; the first is"),
    ],
    ids=["impossible", "too few", "different"],
)
@pytest.mark.distributed
def test_the_command_ends_with_a_status(layouts: tuple[str, ...], status: int, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = [option for layout in layouts for option in ("--layout", layout)]
    with pytest.raises(SystemExit) as ended:
        main(["parity", "qwen3", *options, "--tolerance", "1e-15", "--rows", "3", "--longest", "8"])
    assert ended.value.code == status
    assert says in " ".join("".join(capsys.readouterr()).split())


def test_rows_have_uneven_lengths_and_known_tokens() -> None:
    rows = make_rows(vocab_size=11, num_rows=9, longest=20, seed=1)
    assert len({row.num_tokens for row in rows}) > 3
    assert all(1 <= len(row.response_ids) <= 20 and row.response_ids.max() < 11 for row in rows)
