"""The Mistral decoder: LLaMA with a sliding window in the first release (v0.1: 4096; v0.2 and later: none)."""

from __future__ import annotations

from bivec.models.llama import Llama


class Mistral(Llama):
    def attention_window(self, causal: bool) -> tuple[int, int] | None:
        """A window of w keys means the last w when causal, itself included, and w on either side when bidirectional."""
        window = self.config.sliding_window
        if window is None:
            return None
        return (window - 1, 0) if causal else (window, window)
