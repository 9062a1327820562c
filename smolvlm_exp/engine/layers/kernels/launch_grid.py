"""How a matrix is cut into programs."""

import torch
import triton

Gain = torch.Tensor | None
WIDE = 1024  # columns a program of a plain elementwise kernel takes
BM, BN = 32, 128  # rows and columns of a tile where columns are summed on the way: measured on an H100
ROTARY_BM = 16  # the same for a head's columns
PROGRAMS = 2048  # about how many programs such a kernel is split into: several for each multiprocessor


def split_rows(rows: int, columns: int) -> tuple[int, int]:
    """(chunks, rows a chunk) for a kernel over BM x BN tiles that sums columns within each chunk."""
    chunks = min(max(PROGRAMS // triton.cdiv(columns, BN), 1), triton.cdiv(rows, BM))
    size = triton.cdiv(triton.cdiv(rows, chunks), BM) * BM
    return triton.cdiv(rows, size), size
