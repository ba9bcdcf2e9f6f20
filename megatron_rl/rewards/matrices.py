"""Arithmetic of matrices that an answer writes out: sums, products, scalar multiples and transposes.

A product needs rational entries and is computed at once, so that a chain of products grows no tree.
"""

from __future__ import annotations

from megatron_rl.rewards.expressions import Apply, Bracketed, Matrix, Node, Number, Scalar, Undecided, exact


def plus(left: Node, right: Node) -> Matrix:
    """The sum, entry by entry.

    Raises:
        Undecided: they are not two matrices of scalars of one shape.
    """
    if not (isinstance(left, Matrix) and isinstance(right, Matrix)) or _shape(left) != _shape(right):
        raise Undecided("a sum of a matrix and something of another shape")
    return Matrix(
        tuple(
            tuple(Apply("+", (_entry(a), _entry(b))) for a, b in zip(row, other, strict=True))
            for row, other in zip(left.rows, right.rows, strict=True)
        )
    )


def times(left: Node, right: Node) -> Matrix:
    """The product of two matrices, or of a scalar and a matrix in either order.

    Raises:
        Undecided: the shapes do not fit, or the entries of two matrices are no rational numbers.
    """
    if isinstance(left, Matrix) and isinstance(right, Matrix):
        if _shape(left)[1] != _shape(right)[0]:
            raise Undecided("a product of matrices whose shapes do not fit")
        columns = transpose(right).rows
        return Matrix(tuple(tuple(_dot(row, column) for column in columns) for row in left.rows))
    matrix, factor = (left, right) if isinstance(left, Matrix) else (right, left)
    if not isinstance(matrix, Matrix) or not isinstance(factor, Scalar):
        raise Undecided("a matrix has no product with this")
    return Matrix(tuple(tuple(Apply("*", (factor, _entry(entry))) for entry in row) for row in matrix.rows))


def transpose(node: Node) -> Matrix:
    """Rows for columns; a tuple or ``[a,b]`` is a row, which gives a column.

    Raises:
        Undecided: it is neither.
    """
    if isinstance(node, Bracketed) and (node.opening, node.closing) in (("(", ")"), ("[", "]")):
        return Matrix(tuple((item,) for item in node.items))
    if not isinstance(node, Matrix):
        raise Undecided("only a matrix or a vector can be transposed")
    return Matrix(tuple(zip(*node.rows, strict=True)))


def _shape(matrix: Matrix) -> tuple[int, int]:
    return len(matrix.rows), len(matrix.rows[0])


def _entry(node: Node) -> Node:
    if not isinstance(node, Scalar):
        raise Undecided("an entry that is no scalar")
    return node


def _dot(row: tuple[Node, ...], column: tuple[Node, ...]) -> Number:
    total = exact(Apply("+", tuple(Apply("*", pair) for pair in zip(row, column, strict=True))))
    if total is None:
        raise Undecided("a product of matrices needs rational entries")
    return Number(total)
