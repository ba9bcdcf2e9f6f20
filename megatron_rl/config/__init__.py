"""Settings: a typed schema (:mod:`~megatron_rl.config.schema`) and its loader (:mod:`~megatron_rl.config.load`)."""
