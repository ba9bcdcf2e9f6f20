"""Whether there is room for the workers of a run. Loads no Ray, so that it can be asked where none is installed."""


def missing_room(
    workers: int, *, gpus: float, cpus: float, cpus_per_worker: float, where: str
) -> tuple[str, str] | None:
    """What is asked and what is there, and what to change; None: they have room.

    Args:
        workers: with a device of their own each.
        gpus: that are there; 0: workers share CPUs.
        cpus: that are there.
        cpus_per_worker: the setting.
        where: whose they are, such as ``this machine``.
    """
    if gpus:
        if workers <= gpus:
            return None
        return (
            f"the layouts need {workers} workers of one GPU each, {where} has {gpus:g} GPUs",
            "use smaller layouts or set cluster.address to a larger Ray cluster",
        )
    needed = workers * cpus_per_worker
    if needed <= cpus + 1e-6:
        return None
    return (
        f"the layouts need {workers} workers x cluster.cpus_per_worker={cpus_per_worker} = {needed:g} CPUs, {where} "
        f"has {cpus:g}",
        f"use smaller layouts or set cluster.cpus_per_worker={cpus / workers:.2f} to let them share",
    )
