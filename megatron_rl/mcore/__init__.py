"""Training on Megatron-Core: the only package that imports it. One process holds one rank, see :mod:`.worker`.

Where there is no CUDA, :func:`megatron_rl.device.prepare_megatron` must have run before any module of it is imported,
:mod:`.spec` alone excepted; :func:`.spec.start_worker` sees to that in the rank's own process. The driver imports
nothing but :mod:`.spec`, so it never loads megatron-core.
"""
