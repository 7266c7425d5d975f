"""Which layouts of the ranks a model can have: rows of a table, read by the trainer's mesh and by the check before a run starts.

A row names its fields, says when it holds, what is wrong otherwise, and proposes changes. Only proposals after which the row holds, and
no other row fails that held before, are told.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, Protocol, Self, TypeVar

from tandem.engine.architecture import Architecture
from tandem.engine.config import MeshConfig

# Field → value, as on the command line; "ranks" is their number.
Changes = Mapping[str, Any]
RANKS = "ranks"
MAX_PROPOSALS = 2


class Case(Protocol):
    """What the rows about the layout look at."""

    @property
    def mesh(self) -> MeshConfig: ...
    @property
    def architecture(self) -> Architecture: ...
    @property
    def num_ranks(self) -> int: ...
    def changed(self, changes: Changes) -> Self:
        """The case after these changes. Raises: ValueError for a value that a field forbids by itself."""
        ...


C = TypeVar("C", bound=Case)
In = TypeVar("In", bound=Case, contravariant=True)


@dataclass(frozen=True, kw_only=True)
class Rule(Generic[In]):
    """One row."""

    fields: tuple[str, ...]
    holds: Callable[[In], bool]
    problem: Callable[[In], str]
    """What was found and what is needed, with the values of the fields. Called only where the row does not hold."""
    fixes: Callable[[In], Iterable[Changes]]
    """Proposals, the most helpful first; they need not all help."""


@dataclass(frozen=True, kw_only=True)
class MeshCase:
    """A model on some ranks."""

    mesh: MeshConfig
    architecture: Architecture
    num_ranks: int

    def changed(self, changes: Changes) -> "MeshCase":
        mesh = self.mesh
        for name, value in changes.items():
            mesh = mesh if name == RANKS else replaced(mesh, name.removeprefix("mesh."), value)
        return dataclasses.replace(self, mesh=mesh, num_ranks=changes.get(RANKS, self.num_ranks))


def replaced(config: Any, name: str, value: Any) -> Any:
    """A configuration with one field changed: "rollout.tp", or "sft[0].max_tokens" in a tuple."""
    head, _, rest = name.partition(".")
    indexed = re.fullmatch(r"(\w+)\[(\d+)\]", head)
    if indexed is None:
        return dataclasses.replace(config, **{head: replaced(getattr(config, head), rest, value) if rest else value})
    items = list(getattr(config, indexed[1]))
    items[int(indexed[2])] = replaced(items[int(indexed[2])], rest, value)
    return dataclasses.replace(config, **{indexed[1]: tuple(items)})


def broken(rules: Sequence[Rule[C]], case: C) -> list[str]:
    """A message for every row that does not hold."""
    messages = []
    for rule in rules:
        if not rule.holds(case):
            told = [_tell(changes) for changes in proposals(rules, rule, case)]
            messages.append(f"{rule.problem(case)}; {', or '.join(told) if told else 'change ' + ' or '.join(rule.fields)}")
    return messages


def proposals(rules: Sequence[Rule[C]], rule: Rule[C], case: C) -> list[Changes]:
    """At most two of the row's proposals that mend it and break nothing, each about other fields."""
    held = [other for other in rules if other.holds(case)]
    found: list[Changes] = []
    for changes in rule.fixes(case):
        if any(changes.keys() == earlier.keys() for earlier in found):
            continue
        try:
            after = case.changed(changes)
        except ValueError:
            continue
        if rule.holds(after) and all(other.holds(after) for other in held):
            found.append(changes)
        if len(found) == MAX_PROPOSALS:
            break
    return found


def _tell(changes: Changes) -> str:
    if RANKS in changes:
        return f"launch {changes[RANKS]} rank{'s' if changes[RANKS] > 1 else ''}"
    return "set " + " and ".join(f"{name}={value!r}" for name, value in changes.items())


def heads_can_be_split(mesh: MeshConfig, architecture: Architecture) -> bool:
    """Whether every context-parallel rank can have whole key/value heads, the same number each."""
    return kv_heads_in_attention(architecture) % (mesh.tp * mesh.cp) == 0


def kv_heads_in_attention(architecture: Architecture) -> int:
    """Latent attention expands its latent to a key and a value for every query head."""
    return architecture.num_heads if architecture.latent is not None else architecture.num_kv_heads


def splits_heads(asked: Literal["auto", "ulysses", "all_gather"], mesh: MeshConfig, architecture: Architecture) -> bool:
    """trainer.cp_attention, resolved: whether context-parallel ranks attend by Ulysses. The others gather keys and values.

    Raises: ValueError if it is asked for, and the heads cannot be split.
    """
    if mesh.cp == 1 or asked == "all_gather":
        return False
    fits = heads_can_be_split(mesh, architecture)
    if asked == "ulysses" and not fits:
        raise ValueError(f"{no_split(mesh, architecture)}; set trainer.cp_attention='all_gather'")
    return fits


def no_split(mesh: MeshConfig, architecture: Architecture) -> str:
    """Why Ulysses is impossible."""
    return (
        f"trainer.cp_attention='ulysses' with mesh.tp={mesh.tp} x mesh.cp={mesh.cp} ({mesh.tp * mesh.cp}) needs a multiple of that many "
        f"key/value heads; the model has {kv_heads_in_attention(architecture)}"
    )


def check_mesh(mesh: MeshConfig, architecture: Architecture, num_ranks: int) -> None:
    """Raise ValueError with every row that fails unless `num_ranks` ranks can train the model on this mesh."""
    raise_all(broken(MESH_RULES, MeshCase(mesh=mesh, architecture=architecture, num_ranks=num_ranks)))


def raise_all(messages: Sequence[str]) -> None:
    """Raise one ValueError that holds all messages, if there are any."""
    if len(messages) == 1:
        raise ValueError(messages[0])
    if messages:
        numbered = "".join(f"\n  {number}. {message}" for number, message in enumerate(messages, start=1))
        raise ValueError(f"{len(messages)} things cannot be as they are:{numbered}")


def expert_tensor_parallel(mesh: MeshConfig) -> int:
    """mesh.etp, resolved: 1 when experts are spread over ranks, else tp."""
    if mesh.etp is not None:
        return mesh.etp
    return 1 if mesh.ep > 1 else mesh.tp


def nearest(current: int, most: int) -> Iterator[int]:
    """1 … most but for `current`, the nearest first and of two the smaller."""
    return iter(sorted((value for value in range(1, most + 1) if value != current), key=lambda value: (abs(value - current), value)))


def _set(name: str) -> Callable[[Case], Iterator[Changes]]:
    """Proposals for one field of the mesh, a few ranks' worth of values."""

    def fixes(case: Case) -> Iterator[Changes]:
        current = expert_tensor_parallel(case.mesh) if name == "etp" else getattr(case.mesh, name)
        return ({f"mesh.{name}": value} for value in nearest(current, max(case.num_ranks, current)))

    return fixes


def _dense_ranks(case: Case) -> int:
    return case.mesh.tp * case.mesh.pp * case.mesh.cp


def _expert_ranks(case: Case) -> int:
    return case.mesh.ep * expert_tensor_parallel(case.mesh) * case.mesh.pp


def _launch(case: Case) -> Iterator[Changes]:
    """The numbers of ranks next to this one that hold whole copies of the model."""
    copy = math.lcm(_dense_ranks(case), _expert_ranks(case)) if case.architecture.num_experts else _dense_ranks(case)
    above = -(-case.num_ranks // copy) * copy
    return ({RANKS: ranks} for ranks in (above, above - copy) if ranks > 0)


def _fit_ranks(*names: str) -> Callable[[Case], Iterator[Changes]]:
    """Proposals for what divides the ranks: smaller parts, then other ranks."""

    def fixes(case: Case) -> Iterator[Changes]:
        for name in names:
            yield from _set(name)(case)
        yield from _launch(case)

    return fixes


def _divides(size: str, value: Callable[[Architecture], int], axis: str = "tp") -> Rule[Case]:
    """The row "mesh.AXIS divides a size of the model"; a size of 0 is a part that the model lacks."""

    def parts(case: Case) -> int:
        return expert_tensor_parallel(case.mesh) if axis == "etp" else getattr(case.mesh, axis)

    return Rule(
        fields=(f"mesh.{axis}",),
        holds=lambda case: value(case.architecture) % parts(case) == 0,
        problem=lambda case: f"mesh.{axis}={parts(case)} does not divide the model's {size}={value(case.architecture)}",
        fixes=_set(axis),
    )


def _dense_width(architecture: Architecture) -> int:
    return 0 if all(architecture.sparse_layers) else architecture.intermediate_size


def _stages(case: Case) -> str:
    return f"mesh.pp={case.mesh.pp} x mesh.vpp={case.mesh.vpp}"


def _layers_per_stage_fixes(case: Case) -> Iterator[Changes]:
    yield from _set("vpp")(case)
    yield from _set("pp")(case)
    yield from ({"mesh.pp": changes["mesh.pp"], "mesh.vpp": 1} for changes in _set("pp")(case))


# A microbatch count that the interleaved schedule (vpp) refuses, and lengths that context parallelism could not cut, are no rows: the
# trainer adds empty microbatches, and cuts sequences of any length.
MESH_RULES: tuple[Rule[Case], ...] = (
    Rule(
        fields=("mesh.tp", "mesh.pp", "mesh.cp"),
        holds=lambda case: case.num_ranks % _dense_ranks(case) == 0,
        problem=lambda case: (
            f"{case.num_ranks} ranks do not hold tp={case.mesh.tp} x pp={case.mesh.pp} x cp={case.mesh.cp} ({_dense_ranks(case)})"
        ),
        fixes=_fit_ranks("pp", "cp", "tp"),
    ),
    Rule(
        fields=("mesh.ep", "mesh.etp", "mesh.pp"),
        holds=lambda case: not case.architecture.num_experts or case.num_ranks % _expert_ranks(case) == 0,
        problem=lambda case: (
            f"{case.num_ranks} ranks do not hold ep={case.mesh.ep} x etp={expert_tensor_parallel(case.mesh)} x pp={case.mesh.pp} "
            f"({_expert_ranks(case)})"
        ),
        fixes=_fit_ranks("ep", "etp", "pp"),
    ),
    _divides("num_attention_heads", lambda architecture: architecture.num_heads),
    Rule(
        fields=("mesh.tp",),
        # Megatron gives a key/value head to tp / kv_heads ranks where tp is the larger.
        holds=lambda case: case.architecture.num_kv_heads % case.mesh.tp == 0 or case.mesh.tp % case.architecture.num_kv_heads == 0,
        problem=lambda case: (
            f"mesh.tp={case.mesh.tp} and the model's num_key_value_heads={case.architecture.num_kv_heads} do not divide each other: a rank "
            "holds several whole key/value heads, or several ranks share one"
        ),
        fixes=_set("tp"),
    ),
    _divides("vocab_size", lambda architecture: architecture.vocab_size),
    _divides("intermediate_size", _dense_width),
    _divides("n_shared_experts * moe_intermediate_size", lambda a: a.experts.shared_intermediate_size if a.experts else 0),
    _divides("moe_intermediate_size", lambda architecture: architecture.experts.intermediate_size if architecture.experts else 0, "etp"),
    Rule(
        fields=("mesh.pp", "mesh.vpp"),
        holds=lambda case: case.mesh.pp * case.mesh.vpp <= case.architecture.num_layers,
        problem=lambda case: f"{_stages(case)} is more stages than the model's num_hidden_layers={case.architecture.num_layers}",
        fixes=_layers_per_stage_fixes,
    ),
    Rule(
        fields=("mesh.pp", "mesh.vpp"),
        holds=lambda case: (
            case.mesh.pp * case.mesh.vpp > case.architecture.num_layers
            or case.architecture.num_layers % (case.mesh.pp * case.mesh.vpp) == 0
        ),
        problem=lambda case: f"{_stages(case)} does not divide the model's num_hidden_layers={case.architecture.num_layers}",
        fixes=_layers_per_stage_fixes,
    ),
    Rule(
        fields=("mesh.vpp", "mesh.pp"),
        holds=lambda case: case.mesh.vpp == 1 or case.mesh.pp > 1,
        problem=lambda case: f"mesh.vpp is {case.mesh.vpp}; it needs mesh.pp > 1 (pp is {case.mesh.pp})",
        fixes=lambda case: [{"mesh.vpp": 1}, *_set("pp")(case)],
    ),
    Rule(
        fields=("mesh.sequence_parallel", "mesh.tp"),
        holds=lambda case: not case.mesh.sequence_parallel or case.mesh.tp > 1,
        problem=lambda case: f"mesh.sequence_parallel is True; it needs mesh.tp > 1 (tp is {case.mesh.tp})",
        fixes=lambda case: [{"mesh.sequence_parallel": False}, *_set("tp")(case)],
    ),
    Rule(
        fields=("mesh.ep", "mesh.etp"),
        holds=lambda case: case.architecture.num_experts > 0 or (case.mesh.ep == 1 and case.mesh.etp in (None, 1)),
        problem=lambda case: f"mesh.ep={case.mesh.ep}, mesh.etp={case.mesh.etp}, but {case.architecture.model_type} has no experts",
        fixes=lambda case: [{"mesh.ep": 1, "mesh.etp": None}],
    ),
    _divides("num_experts", lambda architecture: architecture.num_experts, "ep"),
    Rule(
        fields=("mesh.etp", "mesh.ep", "mesh.tp"),
        holds=lambda case: not case.architecture.num_experts or case.mesh.ep > 1 or expert_tensor_parallel(case.mesh) == case.mesh.tp,
        problem=lambda case: (
            f"mesh.etp={case.mesh.etp} with mesh.ep=1 and mesh.tp={case.mesh.tp}: Megatron reduces the gradients of experts that are not "
            "spread over ranks like dense ones, which is wrong unless etp is tp"
        ),
        fixes=lambda case: [{"mesh.etp": case.mesh.tp}, *_set("ep")(case)],
    ),
    Rule(
        fields=("mesh.tp", "mesh.sequence_parallel"),
        holds=lambda case: not case.architecture.num_experts or case.mesh.tp == 1 or case.mesh.sequence_parallel,
        problem=lambda case: (
            f"mesh.tp={case.mesh.tp} with num_experts={case.architecture.num_experts} needs mesh.sequence_parallel=True: without it every "
            "tp rank would send the same tokens to the experts"
        ),
        fixes=lambda case: [{"mesh.sequence_parallel": True}],
    ),
)
