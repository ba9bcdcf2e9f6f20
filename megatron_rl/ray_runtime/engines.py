"""The engines of a run, which outlive the death of some of them: a rollout and a push go on with new processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from megatron_rl.dataflow import Prompt, Rollout, Sampling
from megatron_rl.experience.expected_length import ExpectedLength
from megatron_rl.experience.packing import split_rows
from megatron_rl.interfaces import WeightSync
from megatron_rl.ray_runtime.roles import RemoteEngine
from megatron_rl.ray_runtime.workers import WorkerDied, WorkerFailed


class Engines:
    """Generates and takes pushes; a :class:`~megatron_rl.interfaces.RolloutEngine` and ``WeightSync``.

    An engine that is found dead, in a rollout, before a push or while it is started anew, is started anew up to
    ``restarts`` times. New weights reach engines in no other way than a push to all of them, so the last push is
    repeated: until it ends, the new engine is stale. What the dead one had not finished is drawn again with the same
    seeds, so samples are the same. A death during a push ends the run.

    How long responses were decides who gets which prompt, and an engine's numbers depend on what it computes beside
    them: so the lengths are part of a run's progress.
    """

    def __init__(
        self,
        engine: RemoteEngine,
        sync: WeightSync,
        *,
        restarts: int,
        restart: Callable[[Sequence[int]], None],
        tell: Callable[[str], None],
        describe: Callable[[], str] | None = None,
    ) -> None:
        """Take note.

        Args:
            engine: all of them.
            sync: pushes to all of them.
            restarts: of each.
            restart: makes those of the given ranks anew, all of them also where it raises for one, and opens the
                channel of the pushes again.
            tell: gets a line about each death.
            describe: what pushes send, known after the first, which is told then.
        """
        self._engine = engine
        self._sync = sync
        self._left = [restarts] * len(engine.group.names)
        self._restarts = restarts
        self._restart = restart
        self._tell = tell
        self._describe = describe
        self._version: int | None = None
        self._expected = ExpectedLength()

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[Sequence[int]]) -> list[Rollout]:
        """One sample per prompt and seed, in order; engines get prompts of about the same expected tokens.

        Raises:
            WorkerDied: an engine died and its restarts are used up, or another worker of the run did.
        """
        rollouts = self.draw(prompts, sampling, seeds)
        self._expected = self._expected.after(rollouts)
        return rollouts

    def draw(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[Sequence[int]]) -> list[Rollout]:
        """The same, without taking note of how long responses were."""
        done: dict[int, Rollout] = {}
        while missing := [row for row in range(len(prompts)) if row not in done]:
            costs = {
                row: len(seeds[row]) * self._expected.of(prompts[row], sampling.max_tokens)
                + len(prompts[row].token_ids)
                for row in missing
            }
            deal = split_rows([costs.get(row, 0.0) for row in range(len(prompts))], missing, len(self._left))
            drawing = {
                rank: self._engine.draw(rank, [prompts[row] for row in rows], sampling, [seeds[row] for row in rows])
                for rank, rows in enumerate(deal)
                if rows
            }
            deaths: list[WorkerDied] = []
            for rank, pending in drawing.items():
                try:
                    done |= zip(deal[rank], pending.result(), strict=True)
                except WorkerDied as died:
                    deaths.append(died)
            if deaths:
                self._revive(deaths)
        return [done[row] for row in range(len(prompts))]

    def state(self) -> list[tuple[str, int, float]]:
        """What :meth:`restore` needs; plain data."""
        return self._expected.state()

    def restore(self, state: Sequence[tuple[str, int, float]]) -> None:
        """Deal prompts out as the engines did of which :meth:`state` was taken."""
        self._expected = ExpectedLength.restored(state)

    def push(self, version: int) -> Mapping[str, float]:
        """Push to all engines, having started the dead ones anew; see :meth:`~megatron_rl.interfaces.WeightSync.push`.

        Raises:
            WorkerDied: as :meth:`generate`; or an engine died during the push.
        """
        if dead := self._engine.group.deaths():
            self._start_anew(dead)
        found = self._push(version)
        if self._version is None and self._describe is not None:
            self._tell(self._describe())
        self._version = version
        return found

    def _revive(self, deaths: Sequence[WorkerDied]) -> None:
        names = self._engine.group.names
        for died in deaths:
            if died.worker not in names:
                raise died
        idle = self._engine.group.deaths()  # one that had answered may have died since
        self._start_anew({**idle, **{names.index(died.worker): str(died) for died in deaths}})
        if self._version is not None:
            self._push(self._version)

    def _push(self, version: int) -> Mapping[str, float]:
        """Why: the trainer, which waits for an engine that died, fails as well, and is told first."""
        try:
            return self._sync.push(version)
        except WorkerFailed as failed:
            for rank, how in self._engine.group.deaths().items():
                died = WorkerDied(how, worker=self._engine.group.names[rank])
                for note in getattr(failed, "__notes__", ()):
                    died.add_note(note)
                raise died from failed
            raise

    def _start_anew(self, dead: Mapping[int, str]) -> None:
        """Until all are up: what ended the old one may end the new one as well."""
        while dead:
            for rank, how in dead.items():
                name = self._engine.group.names[rank]
                if not self._left[rank]:
                    raise WorkerDied(f"{how}\nno restart is left of engine.restarts={self._restarts}", worker=name)
                self._left[rank] -= 1
                self._tell(f"{how}\n{name} is started anew; restarts left: {self._left[rank]}")
            try:
                self._restart(sorted(dead))
            except (WorkerDied, WorkerFailed) as error:
                dead = self._dead_engines(error)
                if not dead:
                    raise
            else:
                return

    def _dead_engines(self, error: WorkerDied | WorkerFailed) -> dict[int, str]:
        """Whose deaths explain an error, and how they came; none where it is another worker's."""
        names = self._engine.group.names
        if not isinstance(error, WorkerDied):
            return self._engine.group.deaths()
        if error.worker not in names:
            return {}
        return {**self._engine.group.deaths(), names.index(error.worker): str(error)}


@dataclass(frozen=True)
class Evaluated:
    """A run's engines as an evaluation sees them; a :class:`~megatron_rl.interfaces.RolloutEngine`. However often a run
    evaluates, and whether it does so anew where it goes on, its rollouts are dealt out alike.
    """

    engines: Engines

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[Sequence[int]]) -> list[Rollout]:
        """See :meth:`Engines.draw`."""
        return self.engines.draw(prompts, sampling, seeds)
