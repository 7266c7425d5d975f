"""The recipes by name, and the command line over a recipe's fields."""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, TypeVar

import tyro

from tandem.engine.config import RunConfig
from tandem.engine.errors import fail
from tandem.engine.recipes.gpu_loop import gpu_loop
from tandem.engine.recipes.sft_two_stage import sft_two_stage
from tandem.engine.recipes.toy_code import toy_code
from tandem.engine.recipes.toy_cpu import toy_cpu
from tandem.engine.recipes.toy_reward_model import toy_reward_model

# every recipe, listed by hand: a reader finds its code by following the import
RECIPES: tuple[Callable[[], RunConfig], ...] = (toy_cpu, toy_code, sft_two_stage, toy_reward_model, gpu_loop)

T = TypeVar("T", RunConfig, "Launch")


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How `tandem train` starts a run."""

    config: Annotated[RunConfig, tyro.conf.arg(name="")]
    nproc: int = 1
    """Ranks to start on this machine. 1: this process is the only one."""


def parse_recipe(argv: Sequence[str], *, prog: str = "torchrun … -m tandem.engine.train") -> RunConfig:
    """The recipe named by argv[0] with the fields that the rest of argv changes ("--rollout.temperature 0.8").

    Raises: SystemExit: 0 after --help, 2 after a message for an unknown recipe, an unknown field or a value that a rule forbids.
    """
    recipe = _find_recipe(argv, prog)
    return _parse(RunConfig, recipe(), recipe, argv[1:], prog)


def parse_launch(argv: Sequence[str], *, prog: str = "tandem train") -> Launch:
    """As parse_recipe, with the options of the launcher."""
    recipe = _find_recipe(argv, prog)
    return _parse(Launch, Launch(config=recipe()), recipe, argv[1:], prog)


def _parse(kind: type[T], default: T, recipe: Callable[[], RunConfig], argv: Sequence[str], prog: str) -> T:
    name = recipe.__name__
    try:
        return tyro.cli(
            kind,
            default=default,
            args=list(argv),
            prog=f"{prog} {name}",
            description=recipe.__doc__,
            # every option takes a value (--log.progress False), and a field of several classes has the recipe's
            config=(tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands),
            use_underscores=True,
        )
    except ValueError as error:  # raised by a configuration class about itself
        fail(str(error))


def _find_recipe(argv: Sequence[str], prog: str) -> Callable[[], RunConfig]:
    by_name = {recipe.__name__: recipe for recipe in RECIPES}
    listing = "\n".join(f"  {name:<12} {(recipe.__doc__ or '').splitlines()[0]}" for name, recipe in by_name.items())
    usage = f"usage: {prog} RECIPE [--field value ...]\n\nRecipes:\n{listing}\n\n{prog} RECIPE --help explains every field."
    if not argv:
        fail(f"no recipe was named\n\n{usage}")
    if argv[0] in ("-h", "--help"):
        print(usage)
        raise SystemExit(0)
    if argv[0] not in by_name:
        near = difflib.get_close_matches(argv[0], by_name, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        fail(f"{argv[0]!r} is no recipe; {hint}known recipes: {', '.join(by_name)}")
    return by_name[argv[0]]
