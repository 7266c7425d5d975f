"""Settings that cannot work together, found before anything starts: rows of a table over the configuration, the model and the ranks.

Every row that fails is told at once, each with the fields, their values and a change that mends it. What a single field forbids by
itself is checked by its class (config.py), and the rows about the layout alone are in mesh_rules.py.
"""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tandem.engine.architecture import Architecture
from tandem.engine.config import MeshConfig, RunConfig
from tandem.engine.data.tokenizer import load_tokenizer
from tandem.engine.hf_config import hf_config_of
from tandem.engine.mesh_rules import (
    MESH_RULES,
    RANKS,
    Changes,
    Rule,
    broken,
    heads_can_be_split,
    nearest,
    no_split,
    raise_all,
    replaced,
)
from tandem.engine.quantised import problem_of_engine


@dataclass(frozen=True, kw_only=True)
class RunCase:
    """A run on some ranks."""

    config: RunConfig
    architecture: Architecture
    num_ranks: int
    ranks_per_node: int
    longest_prompt: int | None = None  # tokens; None: the prompts have not been read yet

    @property
    def mesh(self) -> MeshConfig:
        return self.config.mesh

    @property
    def num_engines(self) -> int:
        """Rollout engines: each belongs to `rollout.tp` consecutive ranks."""
        return len(range(0, self.num_ranks, self.config.rollout.tp))

    def changed(self, changes: Changes) -> "RunCase":
        config = self.config
        for name, value in changes.items():
            config = config if name == RANKS else replaced(config, name, value)
        num_ranks = changes.get(RANKS, self.num_ranks)
        ranks_per_node = num_ranks if self.ranks_per_node == self.num_ranks else self.ranks_per_node
        return dataclasses.replace(self, config=config, num_ranks=num_ranks, ranks_per_node=ranks_per_node)


def check_run(config: RunConfig, *, num_ranks: int, ranks_per_node: int, longest_prompt: int | None = None) -> None:
    """Raise ValueError with every row that fails. Reads the model's config.json, and writes and starts nothing.

    Args:
        longest_prompt: tokens of the longest prompt to train on; None before the prompts are read.
    Raises: also FileNotFoundError or ValueError for a model folder that cannot be read, or a model that is not computed here.
    """
    architecture = Architecture.from_hf(hf_config_of(config.model, load_tokenizer(config.model.path)))
    if architecture.has_score_head and not config.preference:
        raise ValueError(f"model.path is {config.model.path}, a reward model, which generates nothing; give a language model")
    case = RunCase(
        config=config, architecture=architecture, num_ranks=num_ranks, ranks_per_node=ranks_per_node, longest_prompt=longest_prompt
    )
    raise_all(broken(RULES, case))


def _room(case: RunCase) -> int:
    """Tokens of the context that the longest prompt leaves; any prompt has at least one."""
    return case.config.model.context_length - (case.longest_prompt or 1)


def _room_problem(case: RunCase) -> str:
    longest, context = case.config.rollout.max_response_tokens, case.config.model.context_length
    if case.longest_prompt is None:
        return (
            f"rollout.max_response_tokens is {longest}; it must be less than model.context_length ({context}), which also holds the prompt"
        )
    return (
        f"rollout.max_response_tokens is {longest}; with the longest prompt ({case.longest_prompt} tokens) it must fit into "
        f"model.context_length ({context})"
    )


def _room_fixes(case: RunCase) -> Iterator[Changes]:
    response = case.config.rollout.max_response_tokens
    yield {"model.context_length": response + (case.longest_prompt or response)}
    if case.longest_prompt is not None:
        yield {"rollout.max_response_tokens": _room(case)}
    else:  # half of the context each, where nothing is known of the prompts
        yield {"rollout.max_response_tokens": case.config.model.context_length // 2}


def _problem_of_engine(case: RunCase) -> str:
    return problem_of_engine(case.architecture, case.config.rollout.tp)


def _pulled_to_old_policies(case: RunCase) -> bool:
    loss = case.config.loss
    return (
        case.config.rollout.token_budget is not None  # otherwise no response outlives an iteration
        and loss.variant == "mirror_descent"
        and loss.tau > 0
        and loss.reference == "rollout"
        and loss.stale_segments != "mask"
    )


def _ignored(field: str, section: str, *, off: object, needs: str, met: Callable[[RunCase], bool]) -> Rule[RunCase]:
    """The row "a field is at its default unless the model, or another setting, gives it something to do"."""
    name = f"{section}.{field}"

    def value(case: RunCase) -> object:
        return getattr(getattr(case.config, section), field)

    return Rule(
        fields=(name,),
        holds=lambda case: value(case) == off or met(case),
        problem=lambda case: f"{name} is {value(case)!r}; it needs {needs}",
        fixes=lambda case: [{name: off}],
    )


def _ignored_by_rest(section: str, field: str) -> Rule[RunCase]:
    """What changes rewards only is without effect where correct responses are fitted as they are."""
    name = f"{section}.{field}"

    def value(case: RunCase) -> float:
        return getattr(getattr(case.config, section), field)

    return Rule(
        fields=(name, "loss.variant"),
        holds=lambda case: case.config.loss.variant != "rest" or value(case) == 0,
        problem=lambda case: f"{name} is {value(case)}; loss.variant=rest fits correct responses as they are and would ignore it",
        fixes=lambda case: [{name: 0.0}, {"loss.variant": "mirror_descent"}],
    )


def _small_stages(case: RunCase) -> Iterator[int]:
    return (i for i, stage in enumerate(case.config.sft) if stage.batch_tokens < stage.max_tokens)


RUN_RULES: tuple[Rule[RunCase], ...] = (
    Rule(
        fields=("rollout.tp",),
        holds=lambda case: case.ranks_per_node % case.config.rollout.tp == 0,
        problem=lambda case: (
            f"rollout.tp is {case.config.rollout.tp}; it must divide the ranks of a node ({case.ranks_per_node}), because an engine lies "
            "within one"
        ),
        fixes=lambda case: ({"rollout.tp": tp} for tp in nearest(case.config.rollout.tp, case.ranks_per_node)),
    ),
    Rule(
        fields=("rollout.quantization", "rollout.tp"),
        holds=lambda case: case.config.rollout.quantization is None or not _problem_of_engine(case),
        problem=lambda case: _problem_of_engine(case),
        fixes=lambda case: [{"rollout.quantization": None}, *({"rollout.tp": tp} for tp in nearest(1, case.config.rollout.tp))],
    ),
    Rule(
        fields=("rollout.token_budget",),
        holds=lambda case: case.config.rollout.token_budget is None or case.config.rollout.token_budget >= case.num_engines,
        problem=lambda case: (
            f"rollout.token_budget is {case.config.rollout.token_budget}; each of the {case.num_engines} rollout engines needs at least "
            "one token of it"
        ),
        # A response of full length on every engine.
        fixes=lambda case: [{"rollout.token_budget": case.num_engines * case.config.rollout.max_response_tokens}],
    ),
    Rule(
        fields=("rollout.max_response_tokens", "model.context_length"),
        holds=lambda case: case.config.rollout.max_response_tokens <= _room(case),
        problem=_room_problem,
        fixes=_room_fixes,
    ),
    Rule(
        fields=("model.context_length",),
        holds=lambda case: case.config.model.path is None or case.config.model.context_length <= case.architecture.max_position_embeddings,
        problem=lambda case: (
            f"model.context_length is {case.config.model.context_length}; it must not exceed max_position_embeddings "
            f"({case.architecture.max_position_embeddings}) of {case.config.model.path}"
        ),
        fixes=lambda case: [
            {"model.context_length": case.architecture.max_position_embeddings},
        ],
    ),
    Rule(
        fields=("replay.groups_per_update", "sampling.groups_in_flight"),
        holds=lambda case: case.config.replay.groups_per_update <= case.config.sampling.groups_in_flight,
        problem=lambda case: (
            f"replay.groups_per_update is {case.config.replay.groups_per_update}; it must not exceed sampling.groups_in_flight "
            f"({case.config.sampling.groups_in_flight})"
        ),
        fixes=lambda case: [
            {"replay.groups_per_update": case.config.sampling.groups_in_flight},
            {"sampling.groups_in_flight": case.config.replay.groups_per_update},
        ],
    ),
    Rule(
        fields=("sft.batch_tokens", "sft.max_tokens"),
        holds=lambda case: not any(True for _ in _small_stages(case)),
        problem=lambda case: "; ".join(
            f"sft[{i}].batch_tokens is {case.config.sft[i].batch_tokens}; an example of sft[{i}].max_tokens "
            f"({case.config.sft[i].max_tokens}) must fit into it"
            for i in _small_stages(case)
        ),
        fixes=lambda case: [
            {f"sft[{i}].batch_tokens": case.config.sft[i].max_tokens for i in _small_stages(case)},
            {f"sft[{i}].max_tokens": case.config.sft[i].batch_tokens for i in _small_stages(case)},
        ],
    ),
    _ignored_by_rest("length_penalty", "weight"),
    _ignored_by_rest("reward", "repetition_penalty"),
    _ignored_by_rest("reward", "over_budget_penalty"),
    _ignored_by_rest("reward", "format_penalty"),
    Rule(
        fields=("loss.stale_segments", "loss.reference"),
        holds=lambda case: not _pulled_to_old_policies(case),
        problem=lambda case: (
            f"loss.stale_segments={case.config.loss.stale_segments!r} with loss.reference='rollout': the reference of tokens that an "
            "earlier iteration generated would be that iteration's policy, and mirror_descent's squared log-ratio would pull back to it"
        ),
        fixes=lambda case: [{"loss.reference": "recompute"}, {"loss.stale_segments": "mask"}],
    ),
    Rule(
        fields=("trainer.cp_attention", "mesh.tp", "mesh.cp"),
        holds=lambda case: case.config.trainer.cp_attention != "ulysses" or heads_can_be_split(case.mesh, case.architecture),
        problem=lambda case: no_split(case.mesh, case.architecture),
        fixes=lambda case: [{"trainer.cp_attention": "all_gather"}, {"trainer.cp_attention": "auto"}],
    ),
    _ignored("cp_attention", "trainer", off="auto", needs="mesh.cp > 1", met=lambda case: case.mesh.cp > 1),
    Rule(
        fields=("trainer.share_prompts", "sampling.num_samples"),
        holds=lambda case: case.config.trainer.share_prompts != "always" or case.config.sampling.num_samples > 1,
        problem=lambda case: (
            f"trainer.share_prompts is 'always'; it needs sampling.num_samples > 1 (it is {case.config.sampling.num_samples}), so that "
            "several responses have one prompt"
        ),
        fixes=lambda case: [{"trainer.share_prompts": "auto"}, {"sampling.num_samples": 8}],
    ),
    _ignored("moe_aux_loss_coef", "trainer", off=0.0, needs="a model with experts", met=lambda case: case.architecture.num_experts > 0),
    _ignored("replay_routing", "trainer", off=False, needs="a model with experts", met=lambda case: case.architecture.num_experts > 0),
    _ignored("record_routing", "rollout", off=False, needs="a model with experts", met=lambda case: case.architecture.num_experts > 0),
    Rule(
        fields=("trainer.replay_routing", "rollout.record_routing"),
        holds=lambda case: (
            not case.config.trainer.replay_routing or not case.architecture.num_experts or case.config.rollout.record_routing
        ),
        problem=lambda case: "trainer.replay_routing is True; rollout.record_routing is False, so there is nothing to replay",
        fixes=lambda case: [{"rollout.record_routing": True}, {"trainer.replay_routing": False}],
    ),
    _ignored(
        "moe_bias_update_rate",
        "trainer",
        off=0.0,
        needs="a model whose router has an expert bias (DeepSeek-V3's kind)",
        met=lambda case: case.architecture.experts is not None and case.architecture.experts.has_expert_bias,
    ),
)

RULES: tuple[Rule[RunCase], ...] = (*MESH_RULES, *RUN_RULES)
