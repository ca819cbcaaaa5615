"""How a block joins its attention, its MLP and its norms to the residual stream."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Array

Part = Callable[[str], Any]  # a layer of the block by its role, a field of `Names`
Attend = Callable[[Array], tuple[Array, Any]]  # what attention adds, and the updated cache
Transform = Callable[[Array], Array]  # what the MLP adds
Joined = tuple[Array, Any]  # the residual stream after the block, and the updated cache


class Residual(NamedTuple):
    """One way: the norms it has, and (x, part, attend, mlp) -> what the block returns."""

    norms: tuple[str, ...]
    join: Callable[[Array, Part, Attend, Transform], Joined]


def _sequential(x: Array, part: Part, attend: Attend, mlp: Transform) -> Joined:
    attended, cache = attend(part("attention_norm")(x))
    x = x + attended
    return x + mlp(part("mlp_norm")(x)), cache


def _sandwich(x: Array, part: Part, attend: Attend, mlp: Transform) -> Joined:
    attended, cache = attend(part("attention_norm")(x))
    x = x + part("attention_post_norm")(attended)
    return x + part("mlp_post_norm")(mlp(part("mlp_norm")(x))), cache


def _post(x: Array, part: Part, attend: Attend, mlp: Transform) -> Joined:
    attended, cache = attend(x)
    x = part("attention_norm")(x + attended)
    return part("mlp_norm")(x + mlp(x)), cache


def _parallel(x: Array, part: Part, attend: Attend, mlp: Transform) -> Joined:
    attended, cache = attend(part("attention_norm")(x))
    return x + attended + mlp(part("mlp_norm")(x)), cache


def _parallel_one_norm(x: Array, part: Part, attend: Attend, mlp: Transform) -> Joined:
    normed = part("attention_norm")(x)
    attended, cache = attend(normed)
    return x + attended + mlp(normed), cache


_BOTH = ("attention_norm", "mlp_norm")

RESIDUALS: dict[str, Residual] = {
    "sequential": Residual(_BOTH, _sequential),
    "sandwich": Residual((*_BOTH, "attention_post_norm", "mlp_post_norm"), _sandwich),
    "post": Residual(_BOTH, _post),
    "parallel": Residual(_BOTH, _parallel),
    "parallel_one_norm": Residual(("attention_norm",), _parallel_one_norm),
}
