"""The training step that benchmarks/train_step.py compares ours with: transformers + PEFT, as the original trains.

The decoder is transformers' own, made bidirectional by ``config.is_causal = False``, on SDPA, with PEFT's LoRA of fp32
matrices on the trunk (METHOD 2.6 and 3.4). MNTP gives blocks and labels to the CausalLM, which forms the logits of
every token and scores a label at the position before it; SimCSE runs the two views one after the other, each padded on
the left to its longest sentence, and pools by the attention mask. Optimiser, schedule and clipping are those of ours.

It computes with our model's very tensors: both must give the same losses, and the weights are held once.
"""

from __future__ import annotations

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor

from bivec.engine.lora import Adapter
from bivec.engine.masking import MntpBatch, mask_batch
from bivec.engine.objectives import MntpObjective, SimcseObjective
from bivec.engine.optim import OptimConfig, learning_rate_at, make_optimizer
from bivec.engine.packing import indices_for_step
from bivec.models import Checkpoint

PACKAGES = ("transformers", "peft")
ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}


def missing() -> str | None:
    """Why there is no peer; None where there is one."""
    absent = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(absent)}" if absent else None


def causal_lm(checkpoint: Checkpoint, attention_dropout: float) -> torch.nn.Module:
    """transformers' model around the tensors of ours, frozen and bidirectional; call it before an adapter is added."""
    import transformers

    fields = checkpoint.config.to_dict() | {"is_causal": False, "attention_dropout": attention_dropout}
    config = transformers.AutoConfig.for_model(**fields, attn_implementation="sdpa")
    embedding, head = checkpoint.model.embed_tokens.weight, checkpoint.lm_head_weight
    with torch.device("meta"):
        model = getattr(transformers, ARCHITECTURES[config.model_type])(config)
    tensors = {f"model.{name}": p.detach() for name, p in checkpoint.model.named_parameters()}
    tensors["lm_head.weight"] = (embedding if head is None else head).detach()
    model.load_state_dict(tensors, assign=True)
    with embedding.device:  # its frequencies are no tensor of the checkpoint
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.requires_grad_(False)


def attach_lora(model: torch.nn.Module, adapter: Adapter) -> list[torch.nn.Parameter]:
    """Wraps the trunk in PEFT's LoRA with the values of our adapter; returns what is trained."""
    import peft

    ours = adapter.config
    config = peft.LoraConfig(
        r=ours.rank, lora_alpha=ours.alpha, lora_dropout=ours.dropout, target_modules=list(ours.targets), bias="none"
    )
    model.model = peft.get_peft_model(model.model, config)
    theirs = {name: p for name, p in model.model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, value in adapter.named_parameters().items():
            theirs["base_model.model." + name.replace(".weight", ".default.weight")].copy_(value)
    return list(theirs.values())


class PaddedPeer:
    """The peer on one stage; ``step`` is what the benchmark times."""

    def __init__(
        self,
        model: torch.nn.Module,
        adapter: Adapter,
        objective: MntpObjective | SimcseObjective,
        optim: OptimConfig,
        *,
        recompute: bool,
    ):
        """``model`` is what ``causal_lm`` made before our adapter was added; it gets the values of that adapter."""
        self.model, self.objective, self.optim = model, objective, optim
        self.parameters = attach_lora(model, adapter)
        self.device = self.parameters[0].device
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()  # dropout
        self.optimizer = make_optimizer(self.parameters, optim)

    def step(self, number: int) -> float:
        """One optimiser step on the samples of ours; the loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_at(number, self.optim)
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.mntp_loss(number) if isinstance(self.objective, MntpObjective) else self.simcse_loss(number)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.optim.max_grad_norm)
        value = float(loss.detach())
        self.optimizer.step()
        return value

    def mntp_loss(self, number: int) -> Tensor:
        """Of one micro-batch, by the model's own loss."""
        input_ids, labels = mntp_rows(self.objective, number)
        output = self.model(input_ids=input_ids.to(self.device), labels=labels.to(self.device), use_cache=False)
        return output.loss

    def simcse_loss(self, number: int) -> Tensor:
        """Two dropout views of the sentences of a step, embedded one after the other."""
        input_ids, mask = (x.to(self.device) for x in simcse_rows(self.objective, number))
        first, second = self.embed(input_ids, mask), self.embed(input_ids, mask)
        cosines = F.normalize(first, dim=-1) @ F.normalize(second, dim=-1).T
        return F.cross_entropy(cosines * self.objective.scale, torch.arange(len(cosines), device=self.device))

    def embed(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """[B, D] fp32: the mean of the true tokens."""
        output = self.model.model(input_ids=input_ids, attention_mask=mask, use_cache=False)
        weight = mask[..., None].float()
        return (output.last_hidden_state.float() * weight).sum(1) / weight.sum(1)


def mntp_rows(objective: MntpObjective, step: int) -> tuple[Tensor, Tensor]:
    """input_ids and labels [B, L] of a step: the masks of ours, a label at every masked token, else -100."""
    blocks, size = objective.blocks, objective.batch_size
    rows = indices_for_step(len(blocks), size, objective.seed, step)
    packed: MntpBatch = mask_batch(
        blocks.input_ids[rows],
        blocks.special_mask[rows],
        objective.masking,
        seed=objective.seed,
        sample_ids=range(step * size, (step + 1) * size),
    )
    labels = torch.full_like(packed.batch.input_ids, -100)
    labels[packed.index + 1] = packed.targets
    return packed.batch.input_ids.view(size, -1), labels.view(size, -1)


def simcse_rows(objective: SimcseObjective, step: int) -> tuple[Tensor, Tensor]:
    """input_ids and mask [B, L] of a step, padded on the left to the longest sentence."""
    rows = indices_for_step(len(objective.sentences), objective.batch_size, objective.seed, step)
    sentences = [objective.sentences[row] for row in rows]
    longest = max(map(len, sentences))
    input_ids = torch.zeros(len(sentences), longest, dtype=torch.int64)
    mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(sentences):
        input_ids[row, longest - len(ids) :] = torch.tensor(ids)
        mask[row, longest - len(ids) :] = 1
    return input_ids, mask
