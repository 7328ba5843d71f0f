"""The training engine: data to packed batches, objectives, LoRA, the trainer, checkpoints, the encoder and its evaluation."""
