"""`tandem parity MODEL`: the first layer and tensor in which two ways to compute a model differ, forward and then backward."""

import dataclasses
import functools
import math
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch.multiprocessing.spawn import start_processes

from tandem.engine.algo.pack import TrainingRow
from tandem.engine.architecture import Architecture
from tandem.engine.checkpoint.hf_folder import read_hf_config
from tandem.engine.checkpoint.names import NameMap
from tandem.engine.config import MeshConfig, TrainerConfig
from tandem.engine.mesh_rules import check_mesh, expert_tensor_parallel
from tandem.engine.parity.hf import run_hf
from tandem.engine.parity.layout import record_layout
from tandem.engine.parity.recording import (
    BACKWARD,
    EMBEDDING,
    FINAL_NORM,
    FORWARD,
    LOGPROBS,
    Place,
    Recording,
    layer_name,
    make_rows,
    offsets,
)
from tandem.engine.parity.rollout import record_rollout
from tandem.engine.parity.tiny_models import TINY_MODELS, write_tiny_model
from tandem.engine.trainer.megatron import MegatronTrainer

Tamper = Callable[[MegatronTrainer], None]
AXES = ("tp", "pp", "vpp", "cp", "ep", "etp", "dp")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Ranks and how they divide the model, written like tp2.pp2.sp (see `parse_layout`)."""

    text: str
    mesh: MeshConfig
    num_ranks: int
    recompute: Literal["none", "selective", "full"]
    dispatcher: Literal["alltoall", "allgather"]

    def trainer_config(self, dtype: Literal["float32", "bfloat16"]) -> TrainerConfig:
        # Without the distributed optimizer every rank holds its parameters' whole gradients.
        return TrainerConfig(dtype=dtype, recompute=self.recompute, moe_dispatcher=self.dispatcher, distributed_optimizer=False)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Of one tensor: ‖A - B‖ / ‖A‖ over its elements, of copies on several ranks the worst; log-probs by their largest, in nats."""

    direction: str
    name: str
    error: float
    where: str = ""


def parse_layout(text: str) -> Layout:
    """Axes and options joined by dots: tp2.pp2.vpp2.cp2.ep2.etp1.dp2, sp (sequence parallel), full or selective (recomputation), allgather.

    What is not named is 1; without dp the layout has the fewest ranks that hold it. "1" is one rank.
    Raises: ValueError for a part that is none of these, or comes twice.
    """
    sizes: dict[str, int] = {}
    options: set[str] = set()
    for part in text.split(".") if text != "1" else []:
        match = re.fullmatch(rf"({'|'.join(AXES)})(\d+)", part)
        if match is not None and match[1] not in sizes:
            sizes[match[1]] = int(match[2])
        elif part in ("sp", "full", "selective", "allgather") and part not in options:
            options.add(part)
        else:
            raise ValueError(
                f"layout {text!r}: {part!r} is no axis with its size ({', '.join(AXES)}), sp, full, selective or allgather, or twice"
            )
    if {"full", "selective"} <= options:
        raise ValueError(f"layout {text!r} has both full and selective recomputation; leave one out")
    num_copies = sizes.pop("dp", None)
    if num_copies == 0:
        raise ValueError(f"layout {text!r}: dp is 0; it must be at least 1")
    mesh = MeshConfig(**sizes, sequence_parallel="sp" in options)
    dense = mesh.tp * mesh.pp * mesh.cp
    expert = mesh.ep * expert_tensor_parallel(mesh) * mesh.pp if mesh.ep > 1 or mesh.etp is not None else dense
    return Layout(
        text=text,
        mesh=mesh,
        num_ranks=math.lcm(dense, expert) if num_copies is None else num_copies * dense,
        recompute="full" if "full" in options else "selective" if "selective" in options else "none",
        dispatcher="allgather" if "allgather" in options else "alltoall",
    )


@contextmanager
def model_folder(model: str, seed: int) -> Iterator[Path]:
    """The folder itself, or a folder with the tiny random model of that name, which is gone afterwards."""
    if Path(model).is_dir():
        yield Path(model)
        return
    if model not in TINY_MODELS:
        raise ValueError(f"{model!r} is no folder, and no tiny model either; those are {', '.join(TINY_MODELS)}")
    with tempfile.TemporaryDirectory() as folder:
        write_tiny_model(model, Path(folder), seed=seed)
        yield Path(folder)


def run_layout(
    model: Path, layout: Layout, rows: Sequence[TrainingRow], dtype: Literal["float32", "bfloat16"], tamper: Tamper | None = None
) -> list[Recording]:
    """Record the layout on processes of its own, one per rank: on the GPUs of this machine if there are as many, else on its CPU.

    Raises: ValueError if the model cannot be divided so.
    """
    check_mesh(layout.mesh, Architecture.from_hf(read_hf_config(model)), layout.num_ranks)
    on_gpu = torch.cuda.is_available() and torch.cuda.device_count() >= layout.num_ranks
    record = functools.partial(record_layout, model, layout.mesh, layout.trainer_config(dtype), rows, tamper)
    with tempfile.TemporaryDirectory() as folder:
        start_processes(_rank, args=(layout.num_ranks, folder, on_gpu, record), nprocs=layout.num_ranks, start_method="fork")
        return [torch.load(Path(folder) / f"rank{rank}", weights_only=False) for rank in range(layout.num_ranks)]


def _rank(rank: int, num_ranks: int, folder: str, on_gpu: bool, record: Callable[[], Recording]) -> None:
    torch.set_num_threads(1)
    if on_gpu:
        torch.cuda.set_device(rank)
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/rendezvous", rank=rank, world_size=num_ranks)
    torch.save(record(), Path(folder) / f"rank{rank}")
    dist.barrier()
    dist.destroy_process_group()


def sequence(hf_config: dict[str, Any]) -> list[tuple[str, str]]:
    """What is compared, in the order in which it is computed: forward by layers, then backward with each layer's weights after it."""
    layers = range(Architecture.from_hf(hf_config).num_layers)
    forward = [EMBEDDING, *(layer_name(i, part) for i in layers for part in ("attention", "mlp", "output")), FINAL_NORM, LOGPROBS]
    weights: dict[str, list[str]] = {}
    for meta in NameMap(hf_config).tensors(torch.float32):
        match = re.match(r"model\.layers\.(\d+)\.", meta.name)
        weights.setdefault(match[1] if match else "", []).append(meta.name)
    backward = [name for name in weights[""] if "lm_head" in name] + [FINAL_NORM] + [name for name in weights[""] if "norm" in name]
    for i in reversed(layers):
        # within a layer the feed-forward part comes after attention
        names = sorted(weights[str(i)], key=lambda name: ("self_attn" in name or "input_layernorm" in name, "norm" in name))
        backward += [layer_name(i), *names]
    backward += [EMBEDDING, *(name for name in weights[""] if "embed" in name)]
    return [*((FORWARD, name) for name in forward), *((BACKWARD, name) for name in backward)]


def compare(a: Sequence[Recording], b: Sequence[Recording], order: Sequence[tuple[str, str]]) -> list[Difference]:
    """The error of every tensor that both have, in `order`. Copies of an element on several ranks are all compared, those of A too."""
    found = []
    for key in order:
        parts = [[part for recording in of for part in recording.get(key, [])] for of in (a, b)]
        if parts[0] and parts[1]:
            found.append(_difference(key, *parts))
    return found


Parts = list[tuple[Place, torch.Tensor]]


def _difference(key: tuple[str, str], a: Parts, b: Parts) -> Difference:
    whole_a, covered_a = _whole(a)
    whole_b, covered_b = _whole(b)
    if whole_a.shape != whole_b.shape or not torch.equal(covered_a, covered_b):
        return Difference(
            direction=key[0], name=key[1], error=math.inf, where=f"{int(covered_a.sum())} elements against {int(covered_b.sum())}"
        )
    deviation = torch.zeros_like(whole_a)
    for place, values in (*a, *b):
        at = _index(place)
        difference = (values.double() - whole_a[at]).abs().nan_to_num(nan=math.inf, posinf=math.inf)
        deviation[at] = torch.maximum(deviation[at], difference)
    if key[1] == LOGPROBS:
        return Difference(
            direction=key[0], name=key[1], error=deviation.max().item(), where=f"token {int(deviation.argmax())} of the batch"
        )
    norm = whole_a.norm().item()
    error = deviation.norm().item()
    largest = [int(i) for i in torch.unravel_index(deviation.argmax(), deviation.shape)]
    return Difference(direction=key[0], name=key[1], error=error / norm if norm else error, where=f"largest at {largest}")


def _index(place: Place) -> Any:
    return place if isinstance(place, torch.Tensor) else tuple(slice(*bounds) for bounds in place)


def _whole(parts: Parts) -> tuple[torch.Tensor, torch.Tensor]:
    """The tensor that the parts make up in fp64, and which of its elements they hold."""
    shapes = [
        (int(place.max()) + 1 if len(place) else 0, values.shape[1])
        if isinstance(place, torch.Tensor)
        else tuple(stop for _, stop in place)
        for place, values in parts
    ]
    shape = [max(sizes) for sizes in zip(*shapes, strict=True)]
    whole, covered = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.bool)
    for place, values in parts:
        whole[_index(place)], covered[_index(place)] = values.double(), True
    return whole, covered


def parity(
    model: str,
    layouts: Sequence[Layout],
    *,
    against: Literal["hf", "rollout"] | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    num_rows: int = 6,
    longest: int = 24,
    seed: int = 0,
    tamper: Tamper | None = None,
) -> list[Difference]:
    """Compute the same random batch in two ways; the first is what the second is measured by.

    Args:
        model: a Hugging Face folder, or the name of a tiny random model.
        layouts: two, or one that is held against Hugging Face or the rollout engine.
        num_rows, longest: of the batch; responses have 1 to `longest` tokens.
        tamper: does damage to the last layout's trainer on every rank (for tests).
    Returns: one entry per tensor, in the order of computation.
    """
    if len(layouts) != (2 if against is None else 1):
        raise ValueError(f"{len(layouts)} layouts were given; parity compares two, or one with --against hf or rollout")
    with model_folder(model, seed) as folder:
        hf_config = read_hf_config(folder)
        rows = make_rows(hf_config["vocab_size"], num_rows, longest, seed)
        if against == "hf":
            first = [run_hf(folder, dtype, rows)]
        elif against == "rollout":
            rows, recording = record_rollout(folder, dtype, rows, seed)
            first = [recording]
        else:
            first = run_layout(folder, layouts[0], rows, dtype)
        second = run_layout(folder, layouts[-1], rows, dtype, tamper)
        return [_with_row(difference, rows) for difference in compare(first, second, sequence(hf_config))]


def _with_row(difference: Difference, rows: Sequence[TrainingRow]) -> Difference:
    """Say which row a token of the batch belongs to."""
    match = re.fullmatch(r"token (\d+) of the batch", difference.where)
    if match is None:
        return difference
    starts = offsets(rows)
    row_id = max((row_id for row_id, start in starts.items() if start <= int(match[1])), key=lambda row_id: starts[row_id])
    return dataclasses.replace(difference, where=f"row {row_id}, position {int(match[1]) - starts[row_id]}")


def report(differences: Sequence[Difference], *, tolerance: float, names: tuple[str, str], every: bool = False) -> bool:
    """Print the tensors around the first that differs, or all, and a verdict. Returns whether all are within the tolerance."""
    first = next((i for i, difference in enumerate(differences) if not difference.error <= tolerance), None)
    table = Table(title=f"A: {names[0]}    B: {names[1]}    tolerance {tolerance:g}", title_justify="left")
    for column in ("pass", "tensor", "relative error", ""):
        table.add_column(column, justify="right" if column == "relative error" else "left")
    worst = {max(range(len(differences)), key=lambda i: differences[i].error)} if differences else set[int]()
    shown = (
        range(len(differences))
        if every
        else sorted({*range(max(0, (first or 0) - 2), (first or 0) + 3), *worst} & set(range(len(differences))))
    )
    for i in shown:
        difference = differences[i]
        unit = " nats" if difference.name == LOGPROBS else ""
        mark = "" if difference.error <= tolerance else f"first, {difference.where}" if i == first else "differs"
        table.add_row(
            difference.direction, difference.name, f"{difference.error:.1e}{unit}", mark, style="bold red" if i == first else None
        )
    console = Console()
    console.print(table)
    if first is None:
        console.print(f"All {len(differences)} tensors agree within {tolerance:g}.", highlight=False)
        return True
    wrong = sum(not difference.error <= tolerance for difference in differences)
    what = f"{differences[first].direction}: {differences[first].name}"
    console.print(f"{wrong} of {len(differences)} tensors differ; the first is {what} ({differences[first].error:.1e}).", highlight=False)
    return False
