"""The toy run: chained arithmetic on two CPU cores, from random weights to a policy that reasons."""

from tandem.engine.config import RunConfig


def toy_cpu() -> RunConfig:
    """Chained arithmetic on two CPU cores, in minutes."""
    return RunConfig(name="toy_cpu")
