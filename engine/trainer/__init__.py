"""The trainer's room. Importing any of it makes the CPU a Megatron device where there is no CUDA, and repairs what Megatron misses
without Transformer Engine; both must happen before megatron.core is imported. Never import it in the rollout engine's process.
"""

from tandem.engine.trainer import device, without_te

device.install()
without_te.install()
