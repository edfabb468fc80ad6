"""The projected merge one concept at a time: what layers make of tokens, and what that adds to φ.

φ_l += (D_l Cᵀ) M for the changes D of all layers that read text is `add_token_outputs_(φ, A, M)` of
``A = token_outputs(D, C)``. In between, A is all that has to be kept of a concept: it is as narrow
as its tokens are few, and several concepts' are added at once, side by side. The adjoints are the
same: D̄ = Ā C is an `add_token_outputs_`, C̄ = Āᵀ D a `token_sums`.
"""

# L = layers, o_l, d = outputs and columns of one, s = tokens

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mima.ops import _checks
from mima.ops._autograd import call, call_in_place, raw_operator, refuse_graph
from mima.ops.backends import choice

_OP = "token_outputs"
_WANTED = "tensors must not require a gradient, or use projected_merge,"


def token_outputs(X: Sequence[Tensor], C: Tensor, *, backend: str | None = None) -> Tensor:
    """Return what linear layers make of tokens, A = X Cᵀ, layer below layer. Not differentiable.

    Args:
        X: L ≥ 1 tensors [o_l, d]; float32, bfloat16, float16 or float64, and all arguments of one
            dtype and device.
        C: [s, d], the tokens' embeddings.
        backend: "reference", "triton" or "native"; None chooses (see `mima.ops.backends.choice`).

    Returns:
        [Σ o_l, s].

    Raises:
        TypeError: not tensors, or dtypes or devices that differ.
        ValueError: shapes that do not agree; no layer; a gradient is asked for.
        BackendError: `backend` cannot serve.

    Examples:
        >>> token_outputs([torch.eye(2), torch.ones(1, 2)], torch.tensor([[1.0, 2.0]]))
        tensor([[1.],
                [2.],
                [3.]])
    """
    _require_layers(X)
    _checks.require_like(_OP, "C", C, X[0], "X[0]", ("s", X[0].shape[1]))
    refuse_graph(_OP, _WANTED, [*X, C])
    out: Tensor = call(_outputs, list(X), C, backend or "")
    return out


def add_token_outputs_(
    X: Sequence[Tensor], A: Tensor, M: Tensor, *, backend: str | None = None
) -> None:
    """Add A_l M to X_l, in place. Not differentiable.

    Args:
        X: L ≥ 1 tensors [o_l, d], contiguous.
        A: [Σ o_l, s], as of `token_outputs`.
        M: [s, d].
        backend: "reference", "triton" or "native"; None chooses.

    Raises:
        TypeError: not tensors, or dtypes or devices that differ.
        ValueError: shapes that do not agree; no layer; an X_l that is not contiguous; a gradient is
            asked for.
        BackendError: `backend` cannot serve.

    Examples:
        >>> X = [torch.zeros(2, 2)]
        >>> add_token_outputs_(X, torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0, 3.0]]))
        >>> X
        [tensor([[1., 3.],
                [2., 6.]])]
    """
    _require_layers(X)
    _checks.require_like(_OP, "M", M, X[0], "X[0]", ("s", X[0].shape[1]))
    _checks.require_like(_OP, "A", A, M, "X and M", (_rows(X), len(M)))
    for layer, x in enumerate(X):
        if not x.is_contiguous():
            raise ValueError(f"{_OP}: X[{layer}] must be contiguous")
    refuse_graph(_OP, _WANTED, [*X, A, M])
    call_in_place(_add, list(X), A, M, backend or "")


def token_sums(X: Sequence[Tensor], A: Tensor, *, backend: str | None = None) -> Tensor:
    """Return Σ_l A_lᵀ X_l: with Ā, the gradient at C of A = X Cᵀ. Not differentiable.

    Args:
        X: L ≥ 1 tensors [o_l, d].
        A: [Σ o_l, s], as of `token_outputs`.
        backend: "reference", "triton" or "native"; None chooses.

    Returns:
        [s, d].

    Raises:
        TypeError: not tensors, or dtypes or devices that differ.
        ValueError: shapes that do not agree; no layer; a gradient is asked for.
        BackendError: `backend` cannot serve.

    Examples:
        >>> token_sums([torch.eye(2)], torch.tensor([[1.0], [2.0]]))
        tensor([[1., 2.]])
    """
    _require_layers(X)
    _checks.require_like(_OP, "A", A, X[0], "X", (_rows(X), "s"))
    refuse_graph(_OP, _WANTED, [*X, A])
    sums: Tensor = call(_sums, list(X), A, backend or "")
    return sums


def _require_layers(X: Sequence[Tensor]) -> None:
    _checks.require_sequence(_OP, "X", X)
    if not X:
        raise ValueError(f"{_OP}: X must have a layer, got none")
    _checks.require_matrices(_OP, "X", X)


def _rows(X: Sequence[Tensor]) -> int:
    # `len` of a tensor is a Python function
    return sum([x.shape[0] for x in X])


_outputs = raw_operator(
    "token_outputs",
    "(Tensor[] X, Tensor C, str backend) -> Tensor",
    lambda X, C, name: choice.resolve(_OP, C, name).token_outputs(X, C),
    fake=lambda X, C, name: C.new_empty(_rows(X), len(C)),
)
_add = raw_operator(
    "add_token_outputs_",
    "(Tensor(a!)[] X, Tensor A, Tensor M, str backend) -> ()",
    lambda X, A, M, name: choice.resolve(_OP, M, name).add_token_outputs(X, A, M),
    fake=lambda X, A, M, name: None,
    writes=("X",),
)
_sums = raw_operator(
    "token_sums",
    "(Tensor[] X, Tensor A, str backend) -> Tensor",
    lambda X, A, name: choice.resolve(_OP, A, name).token_sums(X, A),
    fake=lambda X, A, name: A.new_empty(A.shape[1], X[0].shape[1]),
)
