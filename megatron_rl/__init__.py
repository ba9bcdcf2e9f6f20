"""Reinforcement learning for reasoning on Megatron-Core. Start reading at :mod:`megatron_rl.ppo`."""

__version__ = "0.1.0"
