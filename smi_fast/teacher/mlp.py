"""timm's MLPs, written out once, so that their hidden layer can be read."""

from __future__ import annotations

from typing import Any

from timm.layers import GluMlp, Mlp, SwiGLU
from torch import Tensor


def hidden_layer(mlp: Mlp | GluMlp | SwiGLU, y: Tensor) -> Tensor:
    """The input [B, N, F] of the MLP's second linear layer for tokens y [B, N, D].

    It is behind the activation, the gate and the norm that an MLP may have.
    """
    found: Any
    if type(mlp) is SwiGLU:
        gate = mlp.fc1_g(y)
        found = mlp.act(gate) * mlp.fc1_x(y)
    elif type(mlp) is GluMlp:
        first, second = mlp.fc1(y).chunk(2, dim=mlp.chunk_dim)
        found = first * mlp.act(second) if mlp.gate_last else mlp.act(first) * second
    else:
        found = mlp.act(mlp.fc1(y))
    hidden: Tensor = mlp.norm(mlp.drop1(found))
    return hidden


def behind_hidden(mlp: Mlp | GluMlp | SwiGLU, hidden: Tensor) -> Tensor:
    """The MLP's output [B, N, D] for its hidden layer [B, N, F]."""
    output: Tensor = mlp.drop2(mlp.fc2(hidden))
    return output
