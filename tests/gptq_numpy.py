"""GPTQ in float64 numpy, straight from the paper: the inverse Hessian's Cholesky factor, one column at a time."""

import numpy as np


def minmax_grid(group, bits, symmetric):
    """Scale and zero of each output; group [rows, d_out]."""
    top = 2**bits - 1
    if symmetric:
        span = 2 * np.abs(group).max(0)
        return np.where(span == 0, 1.0, span / top), np.full(span.shape, 2.0 ** (bits - 1))
    low, high = np.minimum(group.min(0), 0), np.maximum(group.max(0), 0)
    scale = np.where(high == low, 1.0, (high - low) / top)
    return scale, np.round(-low / scale)


def search_grid(group, importance, bits, symmetric, norm):
    """Scale and zero, and by how much the best scale beats the second best."""
    full, zero = minmax_grid(group, bits, symmetric)
    losses = []
    for step in range(61):
        scale = full * (1 - step / 80)
        error = np.abs(group - (np.clip(np.round(group / scale) + zero, 0, 2**bits - 1) - zero) * scale) ** norm
        losses.append((importance[:, None] * error).sum(0))
    best = np.argmin(losses, axis=0)
    least, second = np.sort(losses, axis=0)[:2]
    return full * (1 - best / 80), zero, (second - least) / np.maximum(least, 1e-30)


def gptq(weight, hessian, *, bits, group_size, symmetric, order, static_groups, grid="minmax", damping=0.01):
    """The dequantized weight, and which of its columns float32 can be held to; weight [d_in, d_out].

    Columns are independent. Where one comes within a hair of a tie, in rounding (the symmetric grid makes some:
    its largest weight lies at half a code) or between two candidate scales, either answer is right.
    """
    safe = np.ones(weight.shape[1], bool)
    weight, hessian = weight.astype(np.float64).copy(), hessian.astype(np.float64).copy()
    d_in = weight.shape[0]
    group_rows = d_in if group_size == -1 else min(group_size, d_in)
    diagonal = np.diag(hessian).copy()
    hessian += damping * diagonal.mean() * np.eye(d_in)
    hessian[diagonal == 0, diagonal == 0] = 1.0

    if order == "activation":
        permutation = np.argsort(-diagonal, kind="stable")
    elif order == "group":
        starts = range(0, d_in, group_rows)
        groups = [np.arange(s, min(s + group_rows, d_in)) for s in starts]
        groups.sort(key=lambda rows: -diagonal[rows].max())
        permutation = np.concatenate([rows[np.argsort(-diagonal[rows], kind="stable")] for rows in groups])
    else:
        permutation = np.arange(d_in)

    hessian = hessian[np.ix_(permutation, permutation)]
    original = weight.copy()
    weight = weight[permutation]
    inverse_factor = np.linalg.cholesky(np.linalg.inv(hessian)).T
    pivots = np.diag(inverse_factor) ** -2.0

    def fit(rows, importance):
        if grid == "minmax":
            return minmax_grid(rows, bits, symmetric)
        importance, norm = (np.ones(len(rows)), 2.4) if grid == "mse" else (importance, 2.0)
        scale, zero, margin = search_grid(rows, importance, bits, symmetric, norm)
        safe[margin < 1e-4] = False
        return scale, zero

    back = np.argsort(permutation)
    static = [fit(original[s : s + group_rows], pivots[back][s : s + group_rows]) for s in range(0, d_in, group_rows)]
    quantized = np.zeros_like(weight)
    current = None
    for j in range(d_in):
        home = permutation[j] // group_rows if static_groups or order == "group" else j // group_rows
        if static_groups:
            scale, zero = static[home]
        else:
            if home != current:
                count = min(group_rows, d_in - home * group_rows)
                # The paper updates lazily; here every weight is current, so the group is what it will be.
                scale, zero = fit(weight[j : j + count], pivots[j : j + count])
                current = home
        exact = weight[j] / scale
        safe[np.abs(exact - np.floor(exact) - 0.5) < 2e-4] = False
        code = np.clip(np.round(exact) + zero, 0, 2**bits - 1)
        quantized[j] = (code - zero) * scale
        error = (weight[j] - quantized[j]) / inverse_factor[j, j]
        weight[j:] -= np.outer(inverse_factor[j, j:], error)
    return quantized[back], safe


def column_losses(weight, quantized, hessian):
    """The squared output error of each column."""
    error = weight.astype(np.float64) - np.asarray(quantized, np.float64)
    return np.sum(error * (hessian.astype(np.float64) @ error), axis=0)


def proxy_loss(weight, quantized, hessian):
    return float(column_losses(weight, quantized, hessian).sum())
