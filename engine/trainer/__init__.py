"""The trainer's room. Importing any of it makes the CPU a Megatron device where there is no CUDA, and repairs what Megatron misses
without Transformer Engine; both must happen before megatron.core is imported. Never import it in the rollout engine's process.
"""

import warnings

from tandem.engine.trainer import device, without_te

# On every rank, and nothing a user can act on: Transformer Engine and Apex are missing, c10d renames a collective that Megatron calls.
warnings.filterwarnings("ignore", module=r"megatron\.core")
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
device.install()
without_te.install()
