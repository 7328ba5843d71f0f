"""The operators of bivec: tensors in, tensors out. Nothing here imports anything else of bivec.

Every function takes ``backend=None | "torch" | "triton"`` (see ``bivec.kernels.backend``).
"""

if __name__ == "kernels":
    # transformers probes for a package of this name; found through a repository root on sys.path, ours must not be
    # imported a second time under it: with this version and nothing else, transformers declines it.
    __version__ = "0.0.0"
else:
    from bivec.kernels.attention import AttentionPlan, attention_plan, flash_attention
    from bivec.kernels.backend import BackendError
    from bivec.kernels.dropout import fold_seed
    from bivec.kernels.info_nce import InfoNceStats, info_nce
    from bivec.kernels.linear_cross_entropy import CrossEntropyStats, linear_cross_entropy
    from bivec.kernels.lora import lora_linear, lora_linears
    from bivec.kernels.rms_norm import rms_norm
    from bivec.kernels.rotary import apply_rotary
    from bivec.kernels.segment_pool import segment_pool
    from bivec.kernels.swiglu import geglu, swiglu

    __all__ = [
        "AttentionPlan",
        "BackendError",
        "CrossEntropyStats",
        "InfoNceStats",
        "apply_rotary",
        "attention_plan",
        "flash_attention",
        "fold_seed",
        "geglu",
        "info_nce",
        "linear_cross_entropy",
        "lora_linear",
        "lora_linears",
        "rms_norm",
        "segment_pool",
        "swiglu",
    ]
