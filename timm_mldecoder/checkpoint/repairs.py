"""The decoder layers by which projects have repaired the published one, which fails with torch 2.1 and later.

The published layer deletes `self_attn`, which torch's decoder reads since (Alibaba-MIIL/ML_Decoder#82). What the
attention computes, and which of its tensors a file has:

| repair | tensors of the cross-attention | of self-attention |
|---|---|---|
| torch's own decoder layer | multihead_attn | self_attn |
| alias self_attn = multihead_attn | multihead_attn, and the same values under self_attn | none |
| self_attn is there and never used | multihead_attn | none; self_attn is not used |
| self_attn is there, the cross-attention is used for it | multihead_attn | multihead_attn; self_attn is not used |
| the cross-attention is named self_attn | self_attn | none |

Any of them may have the names of xformers: `in_proj_container.{q,k,v}_proj` and `proj`.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

CHOICES = ('use', 'ignore', 'reuse')


def repair_attention(head: Mapping[str, Tensor], choice: str | None) -> dict[str, Tensor]:
    """Return the tensors of a head with each attention under the name that it has here.

    Args:
        head: Tensors of a head under our names, but for those of attention.
        choice: `self_attention` of `convert_state_dict`.

    Raises:
        ValueError: If the choice is missing where the file does not show it, or given where there is none.
    """
    if choice not in (None, *CHOICES):
        raise ValueError(f'self_attention must be one of {", ".join(CHOICES)}, got {choice!r}')
    head = _stack_projections(head)
    unclear = found = False
    for layer in sorted({name.split('.')[1] for name in head if name.startswith('layers.')}):
        cross, own = (_part(head, f'layers.{layer}.{name}.') for name in ('multihead_attn', 'self_attn'))
        renamed = own and not cross
        alias = cross.keys() == own.keys() and all(torch.equal(cross[name], own[name]) for name in cross)
        found |= bool(own) and not renamed
        unclear |= bool(own) and not renamed and not alias
        if renamed or choice != 'use':
            head = {name: value for name, value in head.items() if not name.startswith(f'layers.{layer}.self_attn.')}
        if renamed:
            cross = own
            head |= {f'layers.{layer}.multihead_attn.{name}': tensor for name, tensor in own.items()}
        if choice == 'reuse':
            head |= {f'layers.{layer}.self_attn.{name}': tensor for name, tensor in cross.items()}
    if unclear and choice is None:
        raise ValueError(
            'the checkpoint has weights of self_attn beside those of multihead_attn, no tensor shows what for. Pass '
            "self_attention='use' (torch's own decoder layer), 'ignore' (never used in the forward pass) or 'reuse' "
            '(multihead_attn is used for self-attention too); convert: --self-attention use, ignore or reuse'
        )
    if choice in ('use', 'ignore') and not found:
        raise ValueError(f'self_attention={choice!r}: the checkpoint has no weights of self-attention, leave it out')
    return head


def _part(head: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: tensor for name, tensor in head.items() if name.startswith(prefix)}


def _stack_projections(head: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with xformers' projections of queries, keys and values stacked as torch has them."""
    stacked = dict(head)
    for first in [name for name in head if name.endswith('.in_proj_container.q_proj.weight')]:
        attention = first.removesuffix('in_proj_container.q_proj.weight')
        for kind in ('weight', 'bias'):
            names = [f'{attention}in_proj_container.{part}_proj.{kind}' for part in 'qkv']
            if all(name in stacked for name in names):
                stacked[f'{attention}in_proj_{kind}'] = torch.cat([stacked.pop(name) for name in names])
    return {re.sub(r'(_attn\.)proj\.(weight|bias)$', r'\1out_proj.\2', name): value for name, value in stacked.items()}
