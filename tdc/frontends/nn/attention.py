"""Torch's multi-head attention with its projections as layers, so that these can be read and replaced like others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["OpenAttention", "close_attention", "open_above", "open_attention", "opened"]


class OpenAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` with the layers ``in_proj`` (3 E, E), of queries, keys and values one below the other,
    and ``out_proj`` (E, E) in place of their weights; arguments and results are the same. A module becomes one, and
    goes back, by its class.
    """

    in_proj: nn.Module

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """See ``nn.MultiheadAttention``."""
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
        batched, first = query.dim() == 3, self.batch_first or query.dim() != 3
        # (examples, heads, positions, channels)
        q, k, v = (
            ((part if first else part.transpose(0, 1)) if batched else part[None])
            .unflatten(-1, (self.num_heads, self.head_dim))
            .transpose(1, 2)
            for part in self._projected(query, key, value)
        )
        dropout = self.dropout if self.training else 0.0
        if is_causal and key_padding_mask is None and not need_weights:
            mixed = functional.scaled_dot_product_attention(q, k, v, None, dropout, is_causal=True)
            return self._given(mixed, batched, first), None
        mask = _merged(attn_mask, key_padding_mask, q)
        if not need_weights:
            mixed = functional.scaled_dot_product_attention(q, k, v, mask, dropout)
            return self._given(mixed, batched, first), None
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        weights = torch.softmax(scores if mask is None else scores + mask, -1)
        weights = functional.dropout(weights, dropout) if dropout else weights
        mixed = self._given(weights @ v, batched, first)
        weights = weights.mean(1) if average_attn_weights else weights
        return mixed, weights if batched else weights[0]

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        if query is key and key is value:
            return self.in_proj(query).chunk(3, -1)
        pieces, layer = [slice(k * self.embed_dim, (k + 1) * self.embed_dim) for k in range(3)], self.in_proj
        given = zip((query, key, value), pieces, strict=True)
        if not isinstance(layer, nn.Linear):
            return tuple(layer(x)[..., piece] for x, piece in given)
        weight, bias = layer.weight, layer.bias
        return tuple(functional.linear(x, weight[p], None if bias is None else bias[p]) for x, p in given)

    def _given(self, mixed: Tensor, batched: bool, first: bool) -> Tensor:
        result: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(-2))
        return (result if first else result.transpose(0, 1)) if batched else result[0]

    def _get_name(self) -> str:
        return "MultiheadAttention"


def _merged(attention: Tensor | None, padding: Tensor | None, q: Tensor) -> Tensor | None:
    """What is added to the scores (examples, heads, queries, keys): minus infinity where a mask is true."""
    if padding is not None:
        padding = _added(padding, q).reshape(-1, 1, 1, padding.shape[-1])
    if attention is None:
        return padding
    attention = _added(attention, q)
    if attention.dim() == 3:
        attention = attention.unflatten(0, (-1, q.shape[1]))
    return attention if padding is None else attention + padding


def _added(mask: Tensor, q: Tensor) -> Tensor:
    if mask.is_floating_point():
        return mask
    return torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(mask, float("-inf"))


_layers: WeakKeyDictionary[nn.Module, nn.Linear] = WeakKeyDictionary()
"""The layer of each attention that was opened for a while: the same one every time."""


def _can_open(module: nn.Module) -> bool:
    """Whether it is torch's attention as it is, of one width, that nothing but its own forward looks into."""
    if type(module) is not nn.MultiheadAttention or "forward" in vars(module) or hasattr(module, "parametrizations"):
        return False
    out, weight = module.out_proj, module._parameters.get("in_proj_weight")
    plain = isinstance(weight, Tensor) and module.bias_k is None and module.bias_v is None and not module.add_zero_attn
    unseen = not (out._forward_hooks or out._forward_pre_hooks or "forward" in vars(out))
    return plain and unseen and type(out).forward is nn.Linear.forward


def open_attention(module: nn.Module) -> bool:
    """Make an attention one with layers; False where it cannot be one."""
    if isinstance(module, OpenAttention):
        return True
    if not _can_open(module):
        return False
    layer = _layers.get(module)
    if layer is None:
        layer = nn.Linear(module.embed_dim, 3 * module.embed_dim, bias=False, device="meta")  # type: ignore[arg-type,operator]
        _layers[module] = layer
    layer.training = module.training
    for name in ("weight", "bias"):
        layer._parameters[name] = module._parameters[f"in_proj_{name}"]
        module._parameters[f"in_proj_{name}"] = None
    module._modules["in_proj"] = layer
    module.__class__ = OpenAttention
    module.__dict__["_qkv_same_embed_dim"] = False  # the fused paths of torch's encoders would read the weights
    return True


def close_attention(module: nn.Module) -> None:
    """What :func:`open_attention` made, as it was, if its layers are dense."""
    layer = module._modules.get("in_proj")
    if not isinstance(module, OpenAttention):
        return
    if not isinstance(layer, nn.Linear) or not isinstance(module.out_proj, nn.Linear):
        return
    for name in ("weight", "bias"):
        module._parameters[f"in_proj_{name}"] = layer._parameters[name]
    del module._modules["in_proj"]
    module.__class__ = nn.MultiheadAttention  # type: ignore[assignment]
    module.__dict__["_qkv_same_embed_dim"] = True


def open_above(model: nn.Module, paths: Iterable[str]) -> None:
    """Open for good the attention of which these are projections."""
    for path in paths:
        parent, _, child = path.rpartition(".")
        if child in ("in_proj", "out_proj"):
            with suppress(AttributeError):  # no such module, as will be told
                open_attention(model.get_submodule(parent))


@contextmanager
def opened(model: nn.Module) -> Iterator[None]:
    """All attention of torch in the model with layers inside."""
    made = [m for m in model.modules() if not isinstance(m, OpenAttention) and open_attention(m)]
    try:
        yield
    finally:
        for module in made:
            close_attention(module)
