"""The reference of the parity gate: Hugging Face transformers, float32, on the CPU. The only package that imports it.

It runs in a process of its own, a child of the driver: preparing a process for megatron-core changes torch, which must
not touch the reference; its memory goes when the gate is done; it loads while the workers start; and it takes no GPU
and no share of the cluster, as a worker would.
"""
