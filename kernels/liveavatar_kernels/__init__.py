"""Triton kernels of liveavatar, one op per file; liveavatar/ops.py holds their torch references and is their only caller."""

from liveavatar_kernels.attention_fp8 import attention_fp8
from liveavatar_kernels.gate_residual import gate_residual
from liveavatar_kernels.norm_modulate import norm_modulate, norm_round
from liveavatar_kernels.quantise_rows import quantise_rows
from liveavatar_kernels.rms_rows import rms_rows
from liveavatar_kernels.rope_cache import rope_cache
from liveavatar_kernels.rotate_rows import rotate_rows
from liveavatar_kernels.round_heads import restore_heads, round_heads

__all__ = ["attention_fp8", "gate_residual", "norm_modulate", "norm_round", "quantise_rows", "restore_heads", "rms_rows", "rope_cache", "rotate_rows",
           "round_heads"]  # fmt: skip
