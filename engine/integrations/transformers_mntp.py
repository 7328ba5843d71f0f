"""Masked next-token prediction in transformers' ``Trainer``: a data collator, and the loss on a live model.

``Trainer(model, data_collator=MntpCollator(tokenizer), …)`` after ``use_mntp_loss(model)`` is the MNTP step of the
paper, with the label shift, masking and mean of ``bivec.engine``. The loss takes the place of the model's own, on this
instance only: the trunk runs, then ``linear_cross_entropy`` scores the rows in front of the hidden tokens. Logits of
the whole batch never exist, and since the call still goes through the model's forward, DDP, PEFT and gradient
checkpointing work as before.

Source: BehnamGhader et al. 2024 (LLM2Vec), section 2.1; METHOD 3.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from bivec.engine.errors import ConfigError
from bivec.engine.integrations.transformers_layers import FAMILIES, family_of
from bivec.engine.masking import MaskingConfig, mask_batch
from bivec.engine.tokenizer import mask_token_id
from bivec.kernels import linear_cross_entropy

IGNORED = -100
ONE_TEXT_A_ROW = ("eager", "sdpa", "flex_attention")  # these do not read the bounds of packed texts


@dataclass(frozen=True)
class MntpCollator:
    """Hides tokens of a batch; the labels are the hidden tokens at their own places, -100 elsewhere.

    The draws follow torch's generator, which Trainer seeds and restores. A hidden token that opens a text has no row
    in front of it and no label.
    """

    tokenizer: Any  # a tokenizer of transformers
    probability: float = 0.2  # share of the ordinary tokens that is selected
    style: Literal["bert", "all_mask"] = "bert"
    mask_token: str = "blank"  # noqa: S105 - kind of ``bivec.engine.tokenizer.mask_token_id``
    packed: bool = True  # one row of all texts, for attn_implementation="bivec"; False = padded rows, for any
    seed: int = 0

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, Tensor | int]:
        """A batch of tokenized texts.

        Args:
            features: each has ``input_ids``, a list or vector of token ids with the special tokens, and may have
                ``special_tokens_mask``; other columns are left out.

        Returns:
            ``input_ids`` and ``labels``, int64. Packed: [1, T], with ``position_ids`` [1, T] and the bounds of the
            texts ``cu_seq_lens_q``, ``cu_seq_lens_k`` [B + 1] int32, ``max_length_q``, ``max_length_k``. Padded on the
            right: [B, L], with ``attention_mask`` [B, L].

        Raises:
            ConfigError: a tokenizer without a pad token where rows are padded.
        """
        texts = [list(map(int, feature["input_ids"])) for feature in features]
        special = [self._special(text, feature) for text, feature in zip(texts, features, strict=True)]
        masking = MaskingConfig(
            mask_token_id(self.tokenizer, self.mask_token), len(self.tokenizer), self.probability, self.style
        )
        draws = torch.randint(2**62, (len(texts),)).tolist()
        masked = mask_batch(texts, special, masking, seed=self.seed, sample_ids=draws)
        batch = masked.batch
        labels = torch.full_like(batch.input_ids, IGNORED)  # [T]
        labels[masked.index + 1] = masked.targets
        if not self.packed:
            return self._padded(batch.input_ids, labels, batch.cu_seqlens)
        return {
            "input_ids": batch.input_ids[None],
            "labels": labels[None],
            "position_ids": batch.position_ids[None],
            "cu_seq_lens_q": batch.cu_seqlens,
            "cu_seq_lens_k": batch.cu_seqlens,
            "max_length_q": batch.max_seqlen,
            "max_length_k": batch.max_seqlen,
        }

    def _special(self, text: list[int], feature: dict[str, Any]) -> list[bool]:
        given = feature.get("special_tokens_mask")
        if given is None:
            given = self.tokenizer.get_special_tokens_mask(text, already_has_special_tokens=True)
        return list(map(bool, given))

    def _padded(self, input_ids: Tensor, labels: Tensor, cu_seqlens: Tensor) -> dict[str, Tensor | int]:
        if self.tokenizer.pad_token_id is None:
            raise ConfigError("MntpCollator(packed=False): the tokenizer has no pad token; set tokenizer.pad_token")
        lengths = cu_seqlens.diff()
        real = torch.arange(int(lengths.max()))[None] < lengths[:, None]  # [B, L] bool
        rows = torch.full(real.shape, self.tokenizer.pad_token_id)
        targets = torch.full(real.shape, IGNORED)
        rows[real], targets[real] = input_ids, labels
        return {"input_ids": rows, "labels": targets, "attention_mask": real.long()}


def mntp_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    *,
    softcap: float | None = None,
) -> Tensor:
    """The MNTP loss of a batch of transformers: a label at position t is scored from the state at t - 1.

    Args:
        hidden: [B, L, D] last hidden states, after the final norm.
        weight: [V, D] of the language-model head; it gets a gradient if it requires one.
        labels: [B, L] int64, -100 where there is none. The first label of a row is left out; in a packed batch the
            first of every text must be -100, as :class:`MntpCollator` makes them.
        num_items_in_batch: what to divide the sum by: labels of the whole step under gradient accumulation, as Trainer
            counts them. None = those of this batch.
        softcap: of the scores: ``config.final_logit_softcapping`` (Gemma 2).

    Returns:
        0-dim loss in fp32 (float64 for float64); 0 without a label.

    Source: LLM2Vec, section 2.1; METHOD 3.3.
    """
    shifted = F.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()  # [B * L]
    index = (shifted != IGNORED).nonzero().squeeze(1)
    return linear_cross_entropy(
        hidden.flatten(0, 1),
        weight,
        shifted[index].to(hidden.device),
        index.to(hidden.device),
        normalizer=num_items_in_batch,
        softcap=softcap,
    )


@dataclass(frozen=True)
class MntpLoss:
    """What :func:`use_mntp_loss` changed."""

    model: nn.Module

    def remove(self) -> None:
        """Gives the model its own loss back."""
        del self.model.forward


def use_mntp_loss(model: nn.Module) -> MntpLoss:
    """Makes a causal language model of transformers return the MNTP loss where it is given labels.

    Args:
        model: a ``…ForCausalLM`` of a known family, or a PEFT model around one; changed in place, on the instance.
            ``model.config.is_causal`` must be False. Call it before ``Trainer(model, …)``.

    Returns:
        A handle with ``remove()``.

    Raises:
        ConfigError: another kind of model, a causal one, or a head that is no plain linear layer. In training: a packed
            batch under an attention that takes it for one text.
    """
    for inner in model.modules():
        if (family_of(inner) or ("", ""))[1] == "ForCausalLM":
            break
    else:
        raise ConfigError(
            f"use_mntp_loss: no causal language model of a known family in this {type(model).__name__}: load it with "
            f"AutoModelForCausalLM; known are {', '.join(FAMILIES)}"
        )
    if getattr(inner.config, "is_causal", True):
        raise ConfigError(
            "use_mntp_loss: the model is causal, and MNTP names a hidden token from both sides: set "
            "model.config.is_causal = False first"
        )
    head: Any = inner.lm_head
    if type(head) is not nn.Linear or getattr(head, "bias", None) is not None:
        raise ConfigError(
            f"use_mntp_loss: the head is a {type(head).__name__}, and the loss takes the weight of a linear "
            "layer without bias: leave lm_head out of PEFT's target_modules and modules_to_save"
        )
    own = vars(inner).get("forward")
    if own is not None:
        raise ConfigError(f"use_mntp_loss: this model has a forward of its own already ({own!r}); remove that first")
    inner.forward = types.MethodType(_with_mntp_loss(type(inner).forward), inner)
    return MntpLoss(inner)


def _with_mntp_loss(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)  # Trainer reads the signature
    def mntp_forward(self: Any, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        if labels is None:
            return forward(self, *args, **kwargs)
        implementation = self.config._attn_implementation  # noqa: SLF001 - transformers has no public name for it
        if "cu_seq_lens_q" in kwargs and implementation in ONE_TEXT_A_ROW:
            raise ConfigError(
                f"use_mntp_loss: attn_implementation={implementation!r} would let the texts of a "
                "packed batch see each other: load the model with attn_implementation='bivec', or use "
                "MntpCollator(packed=False)"
            )
        items = kwargs.pop("num_items_in_batch", None)
        for name in ("logits_to_keep", "return_dict"):
            kwargs.pop(name, None)
        outputs = self.model(*args, **kwargs, return_dict=True)
        softcap = getattr(self.config, "final_logit_softcapping", None)
        loss = mntp_loss(outputs.last_hidden_state, self.lm_head.weight, labels, items, softcap=softcap)
        return CausalLMOutputWithPast(loss=loss, hidden_states=outputs.hidden_states)

    return mntp_forward
