"""The training engine: data, masking, packing, LoRA, objectives, trainer, checkpoints, encoder and evaluation."""
