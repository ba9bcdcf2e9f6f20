"""How an interrupted conversion goes on: its hidden folder has its plan, and a record of each complete file."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from megatron_rl.convert.sources import SourceDamaged, SourceUnreadable
from megatron_rl.convert.target import Target
from megatron_rl.durable import NoLocks, files_in, flush, replace_text
from megatron_rl.weights.manifest import MANIFEST, Damaged, read_manifest

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_RECORDS, _PLAN = "records", "plan"
_KEPT = "files that are complete are kept: make room and go on with --resume"
_Record = TypeVar("_Record", bound="DataclassInstance")


class NotWritten(OSError):
    """The system did not take what was to be written, for instance because the disk is full."""


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What is converted.

    Attributes:
        name: of the action, for messages.
        made_of: what its plan depends on, for messages.
        digest: the same for the same plan of the same source.
    """

    name: str
    made_of: str
    digest: str


def convert(conversion: Conversion, target: Target, work: Callable[[], None], *, resume: bool) -> bool:
    """Do ``work``, which fills ``target.model``, and give the target its name.

    Args:
        conversion: that ``work`` does.
        target: to write.
        work: keeps those complete files that it finds, see :func:`complete_file`.
        resume: go on with a conversion that was interrupted.

    Returns:
        False: there was nothing left to do.

    Raises:
        FileExistsError: the target, or (without ``resume``) a part of it, is there.
        OSError: it cannot be written, or the source cannot be read. Complete files stay in the hidden folder, to go on
            with, and nothing else; the target itself is not there.
        SourceDamaged: a file of the source is damaged; nothing is left.
        ValueError: what was interrupted was another plan.
    """
    if resume and _is_complete(conversion, target):
        target.discard()
        return False
    target.refuse_existing()
    if target.work.exists() and not resume:
        raise FileExistsError(
            f"{target.work} is there: an {conversion.name} to {target.path} was interrupted; go on with --resume, or "
            "remove it"
        )
    try:
        with target.open():
            _do(conversion, target, work)
    except OSError as error:
        if error.errno is None or isinstance(error, NoLocks | NotWritten | SourceUnreadable):
            raise  # it says what is wrong
        cause = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        raise NotWritten(error.errno, f"{target.path} could not be written ({cause}); {_KEPT}") from error
    return True


def complete_file(
    target: Target,
    name: str,
    *,
    read: Callable[[Any], _Record],
    check: Callable[[_Record], None],
    write: Callable[[], _Record],
) -> _Record:
    """The record of a file: of the one that is there, if it is complete and undamaged; or else of a new one.

    Args:
        target: whose file it is.
        name: of the file.
        read: a record, from JSON.
        check: that the file is what its record says; raises Damaged.
        write: the file, flushed.

    Raises:
        NotWritten: it cannot be written.
        SourceUnreadable: the source cannot be read.
    """
    kept = target.work / _RECORDS / f"{name}.json"
    if kept.is_file():
        try:
            record = _parsed(kept.read_bytes(), read)
            check(record)
        except Damaged:
            kept.unlink()
        else:
            return record
    try:
        written = write()
        flush(target.model)
        replace_text(kept, json.dumps(asdict(written)))
    except SourceUnreadable:
        raise
    except OSError as error:
        raise NotWritten(
            error.errno, f"{target.path / name} could not be written ({error.strerror}); {_KEPT}"
        ) from error
    return written


def _do(conversion: Conversion, target: Target, work: Callable[[], None]) -> None:
    _take_up(conversion, target)
    try:
        work()
    except SourceDamaged:
        target.discard()  # nothing can be made of it
        raise
    except OSError:
        for name, path in files_in(target.model).items():  # half of what makes the files look like a model
            if not (target.work / _RECORDS / f"{name}.json").is_file():
                path.unlink()
        raise
    target.finish()


def _is_complete(conversion: Conversion, target: Target) -> bool:
    """Whether the conversion was interrupted after its last act."""
    return (target.path / MANIFEST).is_file() and read_manifest(target.path).plan == conversion.digest


def _take_up(conversion: Conversion, target: Target) -> None:
    plan = target.work / _PLAN
    if not plan.is_file():
        target.discard_work()
    elif plan.read_text() != conversion.digest:
        raise ValueError(
            f"the {conversion.name} that was interrupted in {target.work} had another {conversion.made_of}; give the "
            "same ones, or remove that folder"
        )
    (target.work / _RECORDS).mkdir(exist_ok=True)
    replace_text(plan, conversion.digest)


def _parsed(content: bytes, read: Callable[[Any], _Record]) -> _Record:
    try:
        return read(json.loads(content))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"a record cannot be read: {error!r}") from error
