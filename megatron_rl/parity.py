"""The gate: several implementations of one model must say the same of the same tokens.

It knows nothing of ranks, engines or libraries: whoever can score tokens and show its layers and weights
(:class:`~megatron_rl.interfaces.ScoresTokens`) can be held against another. Where two differ, it looks for the first
place inside them that differs, and there for the first tensor.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice

import torch
from torch import Tensor

from megatron_rl.batches import TokenRows
from megatron_rl.interfaces import ScoresTokens, results
from megatron_rl.maths.diagnostics import LogprobGap, logprob_gap

OUTPUT = "output"
"""The place behind the final norm: the head's log-probs or values."""
_ULPS, _STANDS_OUT = 4, 4
_ROUNDING = 1e-6
"""What float32 sums of a layer come to, relative."""
_SUBNORMAL = 2.0**-17
"""Half a step of e4m3 below its smallest normal number, relative to its largest: 2^-10 / 448, rounded up."""
_LAYER = re.compile(r"model\.layers\.(\d+)(\.self_attn)?$")


class ParityFailed(RuntimeError):
    """Two implementations differ; the message has all differences, and where the first comes from.

    Attributes:
        table: of all differences, a line per pair.
        cause: of the first: the pair, and the place and the tensor or why they are not known.
    """

    def __init__(self, failed: str, table: str, cause: str) -> None:
        super().__init__(f"{failed}\n{table}\n{cause}")
        self.table, self.cause = table, cause


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """How far two implementations may be apart.

    Attributes:
        mean: of the absolute difference per token, in nats (of values: in their own unit).
        largest: of the same, at the worst token.
        eps: machine epsilon of the type that they compute in.
        weights: how far their weights may be apart, relative to the larger: 0 unless one of them has quantised its own.
    """

    mean: float
    largest: float
    eps: float
    weights: float = 0.0


@dataclass(frozen=True)
class Pair:
    """Two that must agree: ``tested`` is held against ``against``, by its own ``tolerance`` or by that of the check."""

    tested: ScoresTokens
    against: ScoresTokens
    tolerance: Tolerance | None = None

    def __str__(self) -> str:
        """Both names."""
        return f"{self.tested.name} against {self.against.name}"


def check_parity(
    pairs: Sequence[Pair], rows: TokenRows, tolerance: Tolerance, tell: Callable[[str], None]
) -> dict[str, float]:
    """Score ``rows`` once by everyone, and compare by pairs.

    Args:
        pairs: from the reference outwards, so that the first that fails is the nearest to the cause.
        rows: the same for all; the response mask says which tokens count.
        tolerance: of the pairs that have none of their own.
        tell: gets the table of differences, where all are within it.

    Returns:
        ``<tested>_against_<other>/mean`` and ``/max``, spaces as underscores.

    Raises:
        ParityFailed: a pair is too far apart.
        Exception: what a scorer raised when it scored.
    """
    scorers = {scorer.name: scorer for pair in pairs for scorer in (pair.tested, pair.against)}
    scores = results({name: scorer.score(rows) for name, scorer in scorers.items()})
    gaps = [logprob_gap(scores[pair.tested.name], scores[pair.against.name], rows.response_mask) for pair in pairs]
    table = _table(pairs, gaps, rows, tolerance)
    failed = [pair for pair, gap in zip(pairs, gaps, strict=True) if not _within(gap, pair.tolerance or tolerance)]
    if failed:
        scored = scores[failed[0].tested.name], scores[failed[0].against.name]
        told = f"{len(failed)} of {len(pairs)} comparisons failed"
        try:
            cause = locate(failed[0], rows, scored, failed[0].tolerance or tolerance)
        except Exception as error:
            unknown = f"where is not known: {type(error).__name__}: {error}"
            raise ParityFailed(told, table, f"{failed[0]}: {unknown}") from error
        raise ParityFailed(told, table, f"{failed[0]}: {cause}")
    tell(table)
    return {
        f"{str(pair).replace(' ', '_')}/{name}": value
        for pair, gap in zip(pairs, gaps, strict=True)
        for name, value in (("mean", gap.mean_abs), ("max", gap.max_abs))
    }


def _within(gap: LogprobGap, tolerance: Tolerance) -> bool:
    return gap.mean_abs <= tolerance.mean and gap.max_abs <= tolerance.largest  # which not-a-number is not


def _table(pairs: Sequence[Pair], gaps: Sequence[LogprobGap], rows: TokenRows, tolerance: Tolerance) -> str:
    width = max(len(str(pair)) for pair in pairs)
    head = (
        f"parity on {int(rows.response_mask.sum())} tokens; allowed: mean {tolerance.mean:g}, max {tolerance.largest:g}"
    )
    lines = [
        f"  {pair!s:<{width}}  mean {gap.mean_abs:.2e}  max {gap.max_abs:.2e}  "
        f"{'ok' if _within(gap, pair.tolerance or tolerance) else 'FAILED'}{_own_bounds(pair)}"
        for pair, gap in zip(pairs, gaps, strict=True)
    ]
    return "\n".join([head, *lines])


def _own_bounds(pair: Pair) -> str:
    own = pair.tolerance
    return "" if own is None else f" (allowed: mean {own.mean:g}, max {own.largest:g})"


def locate(pair: Pair, rows: TokenRows, scored: tuple[Tensor, Tensor], tolerance: Tolerance) -> str:
    """Where two first differ: a sentence that names the place and, if one differs, the tensor.

    Args:
        pair: the two.
        rows: what they scored.
        scored: [B, T] each, what they said.
        tolerance: of the pair.
    """
    both = {side.name: side for side in (pair.tested, pair.against)}
    seen = results({name: side.activations(rows) for name, side in both.items()})
    for name, places in seen.items():
        if not places:
            return (
                f"where is not known: {name} runs compiled, so that its layers cannot be watched; check again with "
                "engine.eager=true"
            )
    distances = place_distances(seen[pair.tested.name], seen[pair.against.name])
    distances[OUTPUT] = distance(scored[0][rows.response_mask], scored[1][rows.response_mask])
    place = first_divergence(distances, max(tolerance.eps, _ROUNDING))
    if place is None:
        return (
            f"no place stands out, distances grow to {max(distances.values()):.2g} of the norm as rounding lets them; "
            "if that is what the type and the depth of this model cost, raise parity.mean_tolerance and max_tolerance"
        )
    before = max((found for name, found in distances.items() if _depth(name) < _depth(place)), default=0.0)
    text = f"the first place that differs is {place}, by {distances[place]:.2g} of its norm (before it: {before:.2g}); "
    weights = results({name: side.tensors(_prefixes(place)) for name, side in both.items()})
    return text + _tensor_told(pair, weights[pair.tested.name], weights[pair.against.name], tolerance.weights)


def _tensor_told(pair: Pair, tested: Mapping[str, Tensor], against: Mapping[str, Tensor], relative: float) -> str:
    for name in (name for name in tested if name in against):
        if (difference := tensor_difference(tested[name], against[name], relative)) is not None:
            return f"the first tensor that differs there is {name}: {difference}"
    for ours, theirs, (there, missing) in (
        (against, tested, (pair.against.name, pair.tested.name)),
        (tested, against, (pair.tested.name, pair.against.name)),
    ):
        if absent := [name for name in ours if name not in theirs]:
            return f"{absent[0]} is in {there} and {missing} has or shows no such tensor"
    return f"its {len(tested)} tensors are equal, so what is computed with them differs"


def distance(tested: Tensor, against: Tensor) -> float:
    """``||tested - against|| / max(||tested||, ||against||)``: 0 where equal, at most 2; infinite for not-a-number."""
    if tested.shape != against.shape:
        return math.inf
    size = torch.maximum(tested.double().norm(), against.double().norm())
    found = float((tested.double() - against.double()).norm() / size) if size != 0 else 0.0
    return found if math.isfinite(found) else math.inf


def place_distances(tested: Mapping[str, Tensor], against: Mapping[str, Tensor]) -> dict[str, float]:
    """The distance at each place that both show, in the order that a forward pass comes by them."""
    return {
        place: distance(tested[place], against[place]) for place in sorted(tested.keys() & against.keys(), key=_depth)
    }


def _depth(place: str) -> tuple[int, int, int]:
    """Orders places as a forward pass comes by them."""
    if (layer := _LAYER.match(place)) is not None:
        return 1, int(layer[1]), 0 if layer[2] else 1
    return {"model.embed_tokens": 0, "model.norm": 2, OUTPUT: 3}[place], 0, 0


def first_divergence(distances: Mapping[str, float], noise: float) -> str | None:
    """The place whose distance stands out most from the largest before it; None: none is four times as large.

    Rounding makes distances grow slowly, and behind a fault they do not fall back, so the growth tells the fault from
    both without a bound that would depend on the model's depth.

    Args:
        distances: in the order of a forward pass.
        noise: smaller distances count as this.
    """
    growth, before = {}, noise
    for place, found in distances.items():
        growth[place] = found / before if before < math.inf else 0.0
        before = max(before, found)
    place = max(growth, key=growth.__getitem__)
    return place if growth[place] > _STANDS_OUT else None


def tensor_difference(tested: Tensor, against: Tensor, relative: float = 0.0) -> str | None:
    """How two tensors differ element by element once both are rounded to the coarser of their types; None: not at all.

    Differences of a few float32 roundings are none: rotary frequencies are computed, not copied. Where one has been
    quantised, ``relative`` is its rounding; numbers that are tiny beside the others lose more, which counts as none.
    """
    if tested.shape != against.shape:
        return f"shape {tuple(tested.shape)}, must be {tuple(against.shape)}"
    coarser = max((tested.dtype, against.dtype), key=lambda dtype: torch.finfo(dtype).eps)
    ours, theirs = tested.to(coarser).double(), against.to(coarser).double()
    larger = torch.maximum(ours.abs(), theirs.abs())
    allowed = max(_ULPS * torch.finfo(torch.float32).eps, relative) * larger
    if relative:
        allowed += larger.amax() * _SUBNORMAL
    differs = ~((ours - theirs).abs() <= allowed)
    if not bool(differs.any()):
        return None
    first = tuple(differs.nonzero()[0].tolist())
    return (
        f"{int(differs.sum())} of {differs.numel()} elements, the first at {list(first)} "
        f"({float(ours[first]):.6g}, must be {float(theirs[first]):.6g})"
    )


def _prefixes(place: str) -> tuple[str, ...]:
    """Which tensors make a place."""
    if place == OUTPUT:
        return ("lm_head.", "score.", "model.embed_tokens.")  # the last one where it is tied
    layer = _LAYER.match(place)
    if layer is not None and layer[2]:
        inside = f"model.layers.{layer[1]}."
        return ("model.rotary_emb.inv_freq", f"{inside}input_layernorm.", f"{inside}self_attn.")
    return (f"{place}.",)


def parity_rows(texts: Iterable[Sequence[int]], *, vocabulary: int, rows: int, longest: int, pad_id: int) -> TokenRows:
    """Rows to compare on: of many lengths, so that packing has something to go wrong with, and of all token ids.

    Row i of B has ``longest * (i + 1) / B`` tokens, at least 2. The last one goes down evenly from the highest id to
    0; the others are pieces of the texts laid end to end, and again from the start where they are too short.

    Args:
        texts: token ids, such as prompts; empty: ids are drawn, always the same.
        vocabulary: number of ids.
        rows: B.
        longest: T.
        pad_id: what fills a row up.

    Returns:
        all tokens but the first of each row count.
    """
    lengths = [max(2, -(-longest * (row + 1) // rows)) for row in range(rows)]
    stream = _stream(list(texts), vocabulary)
    pieces = [list(islice(stream, length)) for length in lengths[:-1]]
    pieces.append(torch.linspace(vocabulary - 1, 0, lengths[-1]).round().long().tolist())
    tokens = torch.full((rows, lengths[-1]), pad_id)
    for row, piece in enumerate(pieces):
        tokens[row, : len(piece)] = torch.tensor(piece)
    places = torch.arange(lengths[-1])
    counts = (places > 0) & (places < torch.tensor(lengths)[:, None])
    return TokenRows(tokens=tokens, lengths=torch.tensor(lengths), response_mask=counts)


def _stream(texts: Sequence[Sequence[int]], vocabulary: int) -> Iterator[int]:
    if any(texts):
        return cycle(token for text in texts for token in text)
    drawn = torch.randint(vocabulary, (4096,), generator=torch.Generator().manual_seed(0))
    return cycle(drawn.tolist())
