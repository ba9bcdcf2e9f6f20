r"""Our ``seed_exact`` beside the parser of the seed's training job, latex2sympy2 1.9.1, out of process.

That package pins antlr4-python3-runtime 4.7.2 and cannot be installed beside math-verify, so it gets an environment::

    python3 -m venv ORACLE
    ORACLE/bin/pip install latex2sympy2==1.9.1 antlr4-python3-runtime==4.7.2 sympy==1.13.3
    python benchmarks/seed_oracle.py --python ORACLE/bin/python --cases FILE.jsonl --responses FILE.jsonl

``--cases`` takes rows with ``gold`` and ``pred``, ``--responses`` rows with ``gt`` and a list ``pred``. Compared is
the one step of the seed's grader that is not plain text rewriting: whether two formulas have the same value. It prints
how many verdicts agree, how many pairs the oracle cannot read, and each pair that differs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path

from megatron_rl.rewards.seed_grader import strip, symbolically_equal

ORACLE = r"""
import json, math, signal, sys
from latex2sympy2 import latex2sympy
from sympy import N, simplify

class Late(Exception):
    pass

def ring(number, frame):
    raise Late

def same(pred, gold):
    signal.alarm(5)
    try:
        left, right = latex2sympy(pred), latex2sympy(gold)
        if left == right or simplify(left - right) == 0:
            return True
        return math.isclose(float(N(left)), float(N(right)), rel_tol=1e-4)
    except Late:
        return None
    except TypeError:
        return False
    except Exception:
        return None
    finally:
        signal.alarm(0)

signal.signal(signal.SIGALRM, ring)
print(json.dumps([same(*pair) for pair in json.load(sys.stdin)]))
"""


def read_pairs(cases: Path | None, responses: Path | None) -> list[tuple[str, str]]:
    """The distinct (stripped prediction, gold) pairs that are written differently."""
    pairs: list[tuple[str, str]] = []
    if cases:
        rows = [json.loads(line) for line in cases.read_text().splitlines()]
        pairs += [(strip(row["pred"]), row["gold"]) for row in rows if row["pred"]]
    if responses:
        rows = [json.loads(line) for line in responses.read_text().splitlines()]
        pairs += [(strip(pred), row["gt"]) for row in rows for pred in row["pred"]]
    return [pair for pair in dict.fromkeys(pairs) if pair[0] != pair[1] and len(pair[0]) < 200]


def main() -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, required=True, help="the interpreter of the oracle's environment")
    parser.add_argument("--cases", type=Path)
    parser.add_argument("--responses", type=Path)
    options = parser.parse_args()
    pairs = read_pairs(options.cases, options.responses)
    done = subprocess.run(
        [options.python, "-c", ORACLE], input=json.dumps(pairs), capture_output=True, text=True, check=True
    )
    verdicts = json.loads(done.stdout.splitlines()[-1])
    read = [(pair, verdict) for pair, verdict in zip(pairs, verdicts, strict=True) if verdict is not None]
    different = [(pair, verdict) for pair, verdict in read if symbolically_equal(*pair) != verdict]
    print(f"{len(read) - len(different)} of {len(read)} verdicts agree; {len(pairs) - len(read)} pairs it cannot read")
    for (pred, gold), verdict in different:
        print(f"  oracle {verdict}, ours {not verdict}: prediction {pred!r}, gold {gold!r}")


if __name__ == "__main__":
    main()
