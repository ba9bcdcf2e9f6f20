"""Training on Megatron-Core: the only package that imports it. One process holds one rank, see :mod:`.worker`.

Importing any module of this package first prepares megatron-core for machines without CUDA.
"""

from megatron_rl.device import prepare_megatron

prepare_megatron()
