"""CP of tensors of order four and more from trains of coupled CPs of order three (TT-SVD, then JIRAFE).

A tensor ``T[n1, ..., nm] = sum_r f1[n1, r] ... fm[nm, r]`` has a tensor train ``G1[n1, t1] G2[t1, n2, t2] ...
Gm[t, nm]`` of ranks up to r, each core of which is a CP of order three,

    Gk[t, n, t'] = sum_r M(k-1)[t, r] fk[n, r] N(k)[t', r],    M(k) N(k)^T = I  (for square M),

and shares M with its neighbours (Zniyed, Boyer, de Almeida, Favier, TT-HSVD and JIRAFE, 2020). So one CP of order three
fixes the terms, and every further core follows from it by rank-one approximations, one for each term.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["split_columns", "tensor_train", "train_to_factors"]


def tensor_train(tensor: Tensor, rank: int) -> list[Tensor]:
    """The cores (g, t, n, t') of the TT-SVD of a tensor (g, n1, ..., nm), of ranks up to ``rank`` (Oseledets 2011)."""
    groups, *sizes = tensor.shape
    cores, rest = [], tensor.reshape(groups, 1, -1)
    for size in sizes[:-1]:
        matrix = rest.reshape(groups, rest.shape[1] * size, -1)
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        kept = min(rank, values.shape[1])
        cores.append(left[:, :, :kept].reshape(groups, -1, size, kept))
        rest = values[:, :kept, None] * right[:, :kept]
    return [*cores, rest[..., None]]


def split_columns(columns: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Factors (g, rows, r) and (g, k, r) whose products are nearest to the columns (g, rows k, r), one by one."""
    cubes = columns.mT.unflatten(2, (rows, -1))
    left, values, right = torch.linalg.svd(cubes, full_matrices=False)
    root = values[:, :, :1].sqrt()
    return (left[..., 0] * root).mT, (right[:, :, 0] * root).mT


def train_to_factors(cores: list[Tensor], first: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
    """Factors (g, n_k, r) of the tensor that the train stands for, of m >= 3 cores.

    ``first``: the CP of the second core (g, t, n, t'), as factors (g, t, r), (g, n, r) and (g, t', r). The factor f1 is
    ``G1 M1``. As ``N^T`` is the inverse of the next core's M, ``N^T G[., n, t']`` is a rank-one matrix ``f[n]
    N'[t']`` for every term, and ``N^T Gm`` is fm. Where the terms outnumber the ranks of the train, it is but a start.
    """
    mixing, second, ahead = first
    factors = [cores[0][:, 0] @ mixing, second]
    for core in cores[2:-1]:
        factor, ahead = split_columns((ahead.mT @ core.flatten(2)).mT, core.shape[2])
        factors.append(factor)
    return [*factors, (ahead.mT @ cores[-1][..., 0]).mT]
