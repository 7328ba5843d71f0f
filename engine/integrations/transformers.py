"""transformers with our kernels: ``attn_implementation="bivec"``, layers of live models, and MNTP in ``Trainer``.

A model of transformers asks two tables by the name of its implementation: one for a mask, which it makes once a batch
(and once per kind of layer), and one for the attention itself. Under "bivec" the mask is no tensor: it is a
:class:`Visibility`, which keeps what the mask function says (causal or not, window, which tokens are padding, which
sequence a token belongs to). The first layer turns it into the rows of a packed batch, the others share those. Padding
never enters the kernel, keys and values are never repeated, and no [L, L] mask exists.

What packed attention cannot say is refused, with the fix in the message: custom 4D masks, blocks and chunks in the
mask, decoding against a KV cache, attention sinks, attention weights as an output.

Read in transformers 5.2 and 5.24: ``masking_utils.py``, ``modeling_flash_attention_utils.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function, find_packed_sequence_indices

from bivec.engine.errors import ConfigError
from bivec.engine.integrations.transformers_layers import AppliedKernels, apply_kernels, remove_kernels
from bivec.engine.integrations.transformers_mntp import MntpCollator, MntpLoss, mntp_loss, use_mntp_loss
from bivec.kernels import AttentionPlan, attention_plan, flash_attention

__all__ = [
    "AppliedKernels",
    "MntpCollator",
    "MntpLoss",
    "apply_kernels",
    "mntp_loss",
    "register",
    "remove_kernels",
    "use_mntp_loss",
]

NAME = "bivec"
ELSEWHERE = 'load the model with attn_implementation="sdpa" (or call model.set_attn_implementation("sdpa")) for that'
# Arguments that change the result and that packed self-attention has no place for.
REFUSED = {
    "output_attentions": 'attention weights as an output; load the model with attn_implementation="eager" for those',
    "s_aux": f"attention sinks; {ELSEWHERE}",
    "position_bias": f"an additive position bias; {ELSEWHERE}",
    "block_table": f"continuous batching; {ELSEWHERE}",
    "read_index": f"continuous batching; {ELSEWHERE}",
}


def register() -> None:
    """Makes ``attn_implementation="bivec"`` known to transformers; calling it again changes nothing.

    Example:
        >>> register()
        >>> model = AutoModel.from_pretrained(path, attn_implementation="bivec")  # doctest: +SKIP
    """
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, visibility_mask)


@dataclass(frozen=True)
class TokenRows:
    """The real tokens of a batch [B, L], one sequence after the other."""

    indices: Tensor | None  # [T] int64: rows of the flattened batch; None = all B * L of them
    plan: AttentionPlan  # of the sequences


@dataclass(eq=False)
class Visibility:
    """Which tokens of a batch [B, L] see each other; what the layers get as ``attention_mask``."""

    causal: bool
    window: tuple[int, int] | None  # as in ``flash_attention``
    padding: Tensor | None = None  # [B, L] bool, True = a real token; None = no padding
    sequences: Tensor | None = None  # [B, L] int64: number of a token's sequence in its row; None = not packed
    _rows: dict[torch.device, TokenRows] = field(default_factory=dict, repr=False)

    def rows(self, shape: tuple[int, int], device: torch.device, packing: dict[str, Any]) -> TokenRows:
        """The rows of the batch on a device, made by the first layer that asks.

        Args:
            shape: (B, L).
            device: of the queries.
            packing: ``position_ids``, ``cu_seq_lens_q``, ``cu_seq_lens_k`` and ``max_length_q``, those that the layer
                was given.

        Raises:
            ConfigError: padding and packing together, or bounds that do not fit the batch.
        """
        if device not in self._rows:
            if self.padding is not None:
                self._rows[device] = _unpadded(self.padding, self.window, shape, device, packing)
            elif packing.get("cu_seq_lens_q") is not None:
                self._rows[device] = _given_bounds(shape, device, packing)
            else:
                self._rows[device] = _packed(self.sequences, shape, device, packing.get("position_ids"))
        return self._rows[device]


def _unpadded(
    padding: Tensor,
    window: tuple[int, int] | None,
    shape: tuple[int, int],
    device: torch.device,
    packing: dict[str, Any],
) -> TokenRows:
    padding = padding.to(device)
    if packing.get("cu_seq_lens_q") is not None:
        raise ConfigError("attn_implementation='bivec': give attention_mask or cu_seq_lens_q, not both")
    positions = packing.get("position_ids")
    if positions is not None and positions.dim() == 2:
        steps = positions.to(device).expand(shape).diff(dim=1)
        if bool(((steps < 1) & padding[:, 1:] & padding[:, :-1]).any()):
            raise ConfigError(
                "attn_implementation='bivec': position_ids start again between real tokens of a row, as in a packed "
                "batch, and there is padding in attention_mask: flatten the batch into one row without padding "
                "(DataCollatorWithFlattening) and give no attention_mask"
            )
    # a window counts positions, and taking a hole's tokens out would shift them
    if window is not None and bool((F.pad(padding.int(), (1, 0)).diff(dim=1) == 1).sum(1).gt(1).any()):
        raise ConfigError(
            "attn_implementation='bivec': attention_mask has holes between real tokens, which a sliding window cannot "
            f"be unpadded over; keep padding at the ends of a row, or {ELSEWHERE}"
        )
    lengths = padding.sum(1, dtype=torch.int32)
    plan = attention_plan(F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)), shape[1])
    return TokenRows(padding.flatten().nonzero().squeeze(1), plan)


def _given_bounds(shape: tuple[int, int], device: torch.device, packing: dict[str, Any]) -> TokenRows:
    bounds, tokens = packing["cu_seq_lens_q"].to(device=device, dtype=torch.int32), shape[0] * shape[1]
    keys = packing.get("cu_seq_lens_k")
    if keys is not None and not torch.equal(keys.to(bounds), bounds):
        raise ConfigError(
            "attn_implementation='bivec': cu_seq_lens_k must equal cu_seq_lens_q, tokens see their own text"
        )
    ends = [int(bounds[0]), int(bounds[-1])] if bounds.dim() == 1 and bounds.numel() else []
    if ends != [0, tokens]:
        raise ConfigError(
            f"attn_implementation='bivec': cu_seq_lens_q must be a vector from 0 to the {tokens} tokens of the batch, "
            f"got shape {tuple(bounds.shape)} and ends {ends}"
        )
    longest = packing.get("max_length_q")
    return TokenRows(None, attention_plan(bounds, int(bounds.diff().max() if longest is None else longest)))


def _packed(sequences: Tensor | None, shape: tuple[int, int], device: torch.device, positions: Any) -> TokenRows:
    """Without padding: a row is a sequence, or several where ``sequences`` or restarting positions say so."""
    if sequences is None and positions is not None and positions.dim() == 2:
        sequences = find_packed_sequence_indices(positions.expand(shape))  # masks that see both sides do not look
    rows, length = shape
    if sequences is None:
        bounds = torch.arange(rows + 1, device=device, dtype=torch.int32) * length
        return TokenRows(None, attention_plan(bounds, length))
    starts = F.pad(sequences.to(device).diff(dim=1) != 0, (1, 0), value=True)  # [B, L] bool
    bounds = F.pad(starts.flatten().nonzero().squeeze(1).int(), (0, 1), value=rows * length)
    return TokenRows(None, attention_plan(bounds, int(bounds.diff().max())))


def visibility_mask(
    batch_size: int,  # noqa: ARG001 - of transformers' protocol
    kv_length: int,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    q_length: int | None = None,
    cache_position: Tensor | None = None,
    **_: Any,
) -> Visibility:
    """The entry of the mask table: what the mask function says, without evaluating it.

    Args:
        batch_size: B.
        kv_length: keys of a row, those in a cache included.
        mask_function: of ``transformers.masking_utils``: causal, bidirectional, either in a window, packed.
        attention_mask: [B, kv_length] bool or 0/1, True = a real token.
        q_length: queries of a row (transformers from 5.3 or so on).
        cache_position: [q_length], what older ones give instead.

    Raises:
        ConfigError: another mask function, or fewer queries than keys.
    """
    if q_length is None:
        q_length = kv_length if cache_position is None else len(cache_position)
    _check_lengths(q_length, kv_length)
    seen = Visibility(False, None)
    left = right = -1
    for name, cells in _parts(mask_function):
        if name == "causal_mask_function":
            seen.causal = True
        elif name == "sliding_window_overlay":
            left = cells["sliding_window"] - 1
        elif name == "sliding_window_bidirectional_overlay":
            left = right = cells["sliding_window"]
        elif name == "packed_sequence_mask_function":
            seen.sequences = cells["packed_sequence_mask"]
        elif name != "bidirectional_mask_function":
            raise ConfigError(
                f"attn_implementation='bivec' takes causal, bidirectional, windowed, padded and packed attention; this "
                f"model's mask also has {name}: {ELSEWHERE}"
            )
    if (left, right) != (-1, -1):
        seen.window = (left, 0 if seen.causal else right)
    if attention_mask is not None and not bool(attention_mask.all()):
        seen.padding = attention_mask.bool()
    return seen


def _parts(mask_function: Callable[..., Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The functions that a mask function is the intersection of, by name, with what they close over."""
    name = mask_function.__qualname__
    if mask_function.__module__ != causal_mask_function.__module__:
        name = f"{mask_function.__module__}.{name}"
    name = name.removesuffix(".<locals>.inner_mask").removesuffix(".<locals>.and_mask")
    cells = [cell.cell_contents for cell in mask_function.__closure__ or ()]
    held = dict(zip(mask_function.__code__.co_freevars, cells, strict=True))
    if name == "and_masks":
        for function in held["mask_functions"]:
            yield from _parts(function)
    elif name == "remap_positions_for_packed_sequence":  # the kernel counts inside a sequence anyway
        yield from _parts(held["mask_function"])
    else:
        yield name, held


def _check_lengths(queries: int, keys: int) -> None:
    if queries != keys:
        raise ConfigError(
            f"attn_implementation='bivec' is self-attention of whole sequences, got {queries} queries for {keys} keys "
            f"(a KV cache in use, prefix tuning or cross-attention): pass use_cache=False, or {ELSEWHERE}"
        )


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Visibility | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The entry of the attention table.

    Args:
        module: the attention layer; its ``is_causal`` counts where neither the mask nor ``is_causal`` says.
        query: [B, H, L, Dh].
        key: [B, Hkv, L, Dh].
        value: [B, Hkv, L, Dh].
        attention_mask: what :func:`visibility_mask` gave; or [B, L], 1 = a real token; or None.
        dropout: on the probabilities, keyed by a draw from torch's generator.
        scaling: of the scores.
        sliding_window: counts only where the mask does not say.
        softcap: of the scores.
        is_causal: as the mask says, or what stands for it.
        kwargs: ``position_ids`` and ``cu_seq_lens_q`` … of packed batches; the rest that transformers passes along.

    Returns:
        [B, L, H, Dh], zeros where there is padding, and None for the weights.

    Raises:
        ConfigError: what packed self-attention cannot do, with the fix.
    """
    for name, what in REFUSED.items():
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise ConfigError(f"attn_implementation='bivec' has no {what}")
    batch, _, length, _ = query.shape
    _check_lengths(length, key.shape[2])
    seen = _visibility(module, attention_mask, is_causal, sliding_window)
    rows = seen.rows((batch, length), query.device, kwargs)
    q, k, v = (_flat(x, rows.indices) for x in _one_dtype(query, key, value))
    seed = torch.randint(2**63 - 1, (1,), device=query.device) if dropout > 0.0 else None
    out = flash_attention(
        q,
        k,
        v,
        rows.plan.cu_seqlens,
        rows.plan.max_seqlen,
        causal=seen.causal,
        window=seen.window,
        softmax_scale=scaling,
        softcap=softcap,
        dropout_p=dropout,
        seed=seed,
        plan=rows.plan,
    )  # [T, H, Dh]
    if rows.indices is not None:
        out = out.new_zeros(batch * length, *out.shape[1:]).index_copy(0, rows.indices, out)
    return out.view(batch, length, *out.shape[1:]), None


def _visibility(
    module: nn.Module, mask: Visibility | Tensor | None, is_causal: bool | None, sliding_window: int | None
) -> Visibility:
    if isinstance(mask, Visibility):
        if is_causal is not None and is_causal != mask.causal:
            raise ConfigError(
                f"attn_implementation='bivec': is_causal={is_causal} was passed, but the model made a mask that is "
                f"{'' if mask.causal else 'not '}causal: set model.config.is_causal instead"
            )
        return mask
    if isinstance(mask, Tensor) and mask.dim() == 2:
        padding = mask.bool()
    elif mask is None:
        padding = None
    else:
        raise ConfigError(
            f"attn_implementation='bivec' takes no mask of its own making, got {type(mask).__name__} of shape "
            f"{tuple(mask.shape)}: give a 2D attention_mask for padding, position_ids or cu_seq_lens_q for packing, or "
            f"{ELSEWHERE}"
        )
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    window = None
    if sliding_window is not None:  # as masking_utils reads it: exclusive behind, inclusive to both sides
        window = (sliding_window - 1, 0) if causal else (sliding_window, sliding_window)
    return Visibility(causal, window, None if padding is None or bool(padding.all()) else padding)


def _one_dtype(query: Tensor, key: Tensor, value: Tensor) -> Iterator[Tensor]:
    """Under autocast, and where norms are kept in fp32, rotated queries and keys are wider than the values."""
    if query.shape[-1] != value.shape[-1]:
        raise ConfigError(
            f"attn_implementation='bivec' needs one head dim, got {query.shape[-1]} for queries and {value.shape[-1]} "
            f"for values: {ELSEWHERE}"
        )
    return (x.to(value.dtype) for x in (query, key, value))


def _flat(x: Tensor, indices: Tensor | None) -> Tensor:
    """[B, heads, L, Dh] -> [T, heads, Dh]."""
    x = x.transpose(1, 2).flatten(0, 1)
    return x if indices is None else x.index_select(0, indices)
