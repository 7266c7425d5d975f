"""Triton reads when it is imported whether it interprets, and collecting the trainer's tests imports it: chosen before any of them."""

from tests.kernels import interpreter  # noqa: F401  (before what imports triton)
from tests.rollout.sglang_servers import sglang_servers  # noqa: F401  (a fixture)
from tests.small_toy import run_dir, warm_started  # noqa: F401  (fixtures)
