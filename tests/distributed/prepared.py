"""What the fork server of :mod:`tests.distributed.ranks` loads once, so that each rank is forked with it."""

import gc

import megatron_rl.device

megatron_rl.device.prepare_megatron()
import megatron_rl.mcore.worker  # noqa: E402

# what every rank has from the start is never collected: a collection takes milliseconds
gc.collect()
gc.freeze()
