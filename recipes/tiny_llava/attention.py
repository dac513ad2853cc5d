"""Attention functions of training, written out because that is what a CPU trains fastest in bf16."""

import torch
from render import LENGTH


def softmax_attention(module, query, key, value, attention_mask=None, scaling=1.0, **kwargs):
    """Full attention written out; (batch, heads, tokens, dim) each. Trains faster than SDPA in bf16 on a CPU."""
    weights = torch.softmax((query * scaling) @ key.transpose(-1, -2), -1)
    return (weights @ value).transpose(1, 2), None


def block_attention(module, query, key, value, attention_mask=None, scaling=1.0, prefix=None, **kwargs):
    """Causal attention of a prefix, followed by blocks that see the prefix and themselves but not each other.

    So one pass over an image serves many questions. The number of blocks is (tokens - prefix) / LENGTH.

    Args:
        query: (batch, heads, tokens, dim).
        key, value: (batch, key heads, tokens, dim).
        prefix: tokens of the prefix.

    Returns:
        (batch, tokens, heads, dim) and None.
    """
    batch, heads, tokens, dim = query.shape
    groups, blocks = key.shape[1], (tokens - prefix) // LENGTH
    query = (query * scaling).view(batch, groups, -1, tokens, dim)  # third: query heads of one key head
    key_prefix, value_prefix = key[:, :, :prefix].transpose(-1, -2), value[:, :, :prefix]

    scores = (query[..., :prefix, :].flatten(2, 3) @ key_prefix).view(batch, groups, -1, prefix, prefix)
    weights = torch.softmax(scores + _causal(prefix, scores), -1)
    of_prefix = (weights.flatten(2, 3) @ value_prefix).view(batch, heads, prefix, dim)

    in_blocks = (batch, groups, -1, blocks, LENGTH)
    query, key, value = query[..., prefix:, :].flatten(2, 3), key[:, :, prefix:], value[:, :, prefix:]
    to_prefix = (query @ key_prefix).view(*in_blocks, prefix)
    to_block = query.view(*in_blocks, dim) @ key.reshape(*in_blocks, dim).transpose(-1, -2)
    weights = torch.softmax(torch.cat([to_prefix, to_block + _causal(LENGTH, to_block)], -1), -1)
    of_blocks = (weights[..., :prefix].flatten(2, 4) @ value_prefix).view(*in_blocks, dim)
    of_blocks = of_blocks + weights[..., prefix:] @ value.reshape(*in_blocks, dim)
    return torch.cat([of_prefix, of_blocks.reshape(batch, heads, -1, dim)], 2).transpose(1, 2), None


def _causal(tokens, like):
    """Additive mask (tokens, tokens): -1e4 above the diagonal, else 0."""
    return like.new_full((tokens, tokens), -1e4).triu(1)
