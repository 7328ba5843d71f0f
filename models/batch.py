"""The packed batch: what flows from the tokenizer's side into the models.

A batch is the concatenation of its sequences. No pad token ever enters a model: attention reads the sequence bounds
from ``cu_seqlens`` and every other operator works row by row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

POSITION_BITS = 24  # token_ids() keeps the position in the low bits: sequences up to 16.7 M tokens


@dataclass(frozen=True)
class PackedBatch:
    """B sequences of T tokens together.

    ``cu_seqlens[b] : cu_seqlens[b + 1]`` are the rows of sequence ``b``. ``sample_ids`` key the dropout masks, so that
    a sequence meets the same mask in whatever micro-batch, rank or recomputation it is run.
    """

    input_ids: Tensor  # [T] int64
    cu_seqlens: Tensor  # [B + 1] int32
    max_seqlen: int  # length of the longest sequence, or an upper bound of it
    position_ids: Tensor  # [T] int64, restarts at 0 for every sequence
    sample_ids: Tensor  # [B] int64

    @classmethod
    def from_sequences(
        cls,
        sequences: Sequence[Sequence[int]],
        sample_ids: Sequence[int] | None = None,
        device: torch.device | str | None = None,
    ) -> PackedBatch:
        """Packs lists of token ids.

        Args:
            sequences: B lists of token ids; a list may be empty.
            sample_ids: B integers that name the sequences to the dropout generator; 0 … B-1 by default.
            device: where the tensors go; CPU by default.

        Raises:
            ValueError: ``sample_ids`` has another length than ``sequences``.
        """
        if sample_ids is not None and len(sample_ids) != len(sequences):
            raise ValueError(f"sample_ids has {len(sample_ids)} entries for {len(sequences)} sequences")
        lengths = torch.tensor([len(sequence) for sequence in sequences], dtype=torch.int64)
        cu_seqlens = torch.zeros(len(sequences) + 1, dtype=torch.int32)
        cu_seqlens[1:] = lengths.cumsum(0)
        flat = [token for sequence in sequences for token in sequence]
        starts = torch.repeat_interleave(cu_seqlens[:-1].long(), lengths)
        batch = cls(
            input_ids=torch.tensor(flat, dtype=torch.int64),
            cu_seqlens=cu_seqlens,
            max_seqlen=int(lengths.max()) if len(sequences) else 0,
            position_ids=torch.arange(len(flat)) - starts,
            sample_ids=torch.arange(len(sequences)) if sample_ids is None else torch.tensor(sample_ids).long(),
        )
        return batch if device is None else batch.to(device)

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch on another device."""
        # towards the CPU a copy in the background could be read before it has arrived
        background = torch.device(device).type != "cpu"
        return PackedBatch(
            self.input_ids.to(device, non_blocking=background),
            self.cu_seqlens.to(device, non_blocking=background),
            self.max_seqlen,
            self.position_ids.to(device, non_blocking=background),
            self.sample_ids.to(device, non_blocking=background),
        )

    @property
    def num_tokens(self) -> int:
        """T, those of all sequences."""
        return self.input_ids.shape[0]

    @property
    def num_sequences(self) -> int:
        """B, empty sequences included."""
        return self.cu_seqlens.shape[0] - 1

    def check(self, positions: int, vocabulary: int) -> None:
        """Raises ValueError unless a model of so many positions and tokens can run it.

        On a CPU the ids are looked at too; reading them would stall a GPU.
        """
        if self.max_seqlen > positions:
            raise ValueError(
                f"a sequence of {self.max_seqlen} tokens exceeds the model's {positions} positions "
                "(max_position_embeddings); shorten it (max_length)"
            )
        if self.input_ids.device.type == "cpu" and self.num_tokens:
            lowest, highest = (int(bound) for bound in self.input_ids.aminmax())
            if lowest < 0 or highest >= vocabulary:
                raise ValueError(
                    f"token ids {lowest} … {highest} are not all inside the model's vocabulary of {vocabulary}; "
                    "use the tokenizer of this checkpoint"
                )

    def token_ids(self) -> Tensor:
        """[T] int64: one number per (sample, position), the key of per-token dropout (LoRA inputs)."""
        lengths = self.cu_seqlens.diff().long()
        samples = torch.repeat_interleave(self.sample_ids, lengths, output_size=self.num_tokens)
        return (samples << POSITION_BITS) | self.position_ids
