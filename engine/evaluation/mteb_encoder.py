"""An encoder as MTEB calls one: the instruction of each task, on the sides that get it, and the paper's text limit.

    results = mteb.evaluate(encoder.as_mteb(), mteb.get_tasks(["SICK-R", "SciFact"]))

The protocol is the paper's (METHOD 7.1, 7.7):

* Queries of retrieval tasks get the task's instruction, their documents none (so Quora's and ArguAna's too). All other
  tasks compare like with like and both sides get it, the candidates of reranking tasks included: mteb 2 calls these
  documents, the mteb of the paper did not.
* The string is instruction, one space, text; the instructions of ``data/mteb_instructions.json`` end with a colon.
* A document is its title, one space, its text: so mteb joins them.
* A text has 400 tokens at most, see ``TextFormat.rows``; the row then as many as ``max_length`` says.
* Similarity is the cosine, but for an encoder whose settings say "dot"; vectors have unit length where they say that.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from bivec.engine.errors import ConfigError, RunError
from bivec.engine.fingerprint import model_checksum, tokenizer_checksum

if TYPE_CHECKING:
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.models.model_meta import ModelMeta
    from mteb.types import BatchedInput, PromptType
    from torch.utils.data import DataLoader

    from bivec.engine.encoder import Encoder

INSTRUCTIONS_FILE = Path(__file__).parent / "data" / "mteb_instructions.json"
MAX_TEXT_LENGTH = 400  # METHOD 7.1
DOCUMENT = "document"
# the types of tasks whose documents are texts of the same kind as their queries
SYMMETRIC_WITH_DOCUMENTS = {"Reranking"}
# mteb's later names of tasks of the paper, without what TASK_ENDINGS takes off
TASK_NAMES = {
    "ArXivHierarchicalClusteringP2P": "ArxivClusteringP2P",
    "ArXivHierarchicalClusteringS2S": "ArxivClusteringS2S",
    "SciDocs": "SCIDOCS",
    "SummEvalSummarization": "SummEval",
    "Touche2020Retrieval": "Touche2020",
    "TrecCOVID": "TRECCOVID",
}
TASK_ENDINGS = re.compile(r"(HardNegatives|Decontaminated)?(\.v\d+)?$")
CQADUPSTACK = re.compile(r"CQADupstack[A-Z][a-z]+Retrieval")


@cache
def paper_instructions() -> dict[str, str]:
    """The paper's instruction of each of its 56 tasks, by the task's name; each ends with a colon.

    Source: METHOD 7.7 (the paper's Table 10, as in the original's file).
    """
    instructions: dict[str, str] = json.loads(INSTRUCTIONS_FILE.read_text(encoding="utf-8"))
    return instructions


def paper_task_name(task: str) -> str:
    """The name that the paper has for what an MTEB task asks, whatever data a later version of the task asks it of.

    The 12 sub-forums of CQADupstack are one task; ``SciFact``, ``STS22.v2`` and ``FEVERHardNegatives.v2`` are examples
    of one name each. A task that is not of the paper keeps its name.
    """
    name = TASK_ENDINGS.sub("", task)
    return "CQADupstackRetrieval" if CQADUPSTACK.fullmatch(name) else TASK_NAMES.get(name, name)


class MTEBEncoder:
    """What ``Encoder.as_mteb`` returns; satisfies ``mteb.models.EncoderProtocol``."""

    def __init__(
        self,
        encoder: Encoder,
        *,
        instructions: Mapping[str, str] | None = None,
        paper_instructions: bool = True,
        name: str | None = None,
        revision: str | None = None,
        max_text_length: int | None = MAX_TEXT_LENGTH,
        tokens_per_batch: int | None = None,
    ) -> None:
        if name is not None and "/" not in name:
            name = f"bivec/{name}"  # mteb wants an organisation
        self.encoder = encoder
        self.instructions = dict(instructions or {})
        self.use_paper_instructions = paper_instructions
        self.max_text_length = max_text_length
        self.tokens_per_batch = tokens_per_batch
        self._name = name or f"bivec/{type(encoder.model).__name__}-{encoder.dimension}"
        self._revision = revision

    def instruction_for(self, task_metadata: TaskMetadata, prompt_type: PromptType | None = None) -> str:
        """What is put in front of the texts of one side of a task; "" for nothing.

        Args:
            task_metadata: of the task; its name and type count.
            prompt_type: "query", "document" or None, as mteb says it.
        """
        if prompt_type == DOCUMENT and task_metadata.type not in SYMMETRIC_WITH_DOCUMENTS:
            return ""
        of_paper = paper_instructions() if self.use_paper_instructions else {}
        for known in (self.instructions, of_paper):
            for name in (task_metadata.name, paper_task_name(task_metadata.name)):
                if name in known:
                    return known[name]
        return ""

    def encode(
        self,
        inputs: DataLoader[BatchedInput],
        *,
        task_metadata: TaskMetadata,
        hf_split: str | None = None,  # noqa: ARG002 - of mteb's protocol
        hf_subset: str | None = None,  # noqa: ARG002 - likewise
        prompt_type: PromptType | None = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """Embeds what mteb's loader yields.

        Args:
            inputs: batches with a list of texts under "text", where documents have their title in front already.
            task_metadata: of the task.
            hf_split: not used.
            hf_subset: not used.
            prompt_type: "query", "document" or None.
            kwargs: ``show_progress_bar``; mteb's ``batch_size`` is that of its loader: texts are packed by tokens here.

        Returns:
            float32 [N, D] in the order of the loader.

        Raises:
            ConfigError: a task without texts, or a precision that is asked for.
            RunError: an embedding is not finite.
        """
        if kwargs.get("precision") not in (None, "float32"):
            raise ConfigError(f"precision {kwargs['precision']!r}: embeddings are float32; leave precision out")
        texts = list(_texts(inputs, task_metadata.name))
        embeddings = np.asarray(
            self.encoder.encode(
                texts,
                instruction=self.instruction_for(task_metadata, prompt_type),
                tokens_per_batch=self.tokens_per_batch,
                max_text_length=self.max_text_length,
                show_progress_bar=kwargs.get("show_progress_bar"),
            )
        )
        finite = np.isfinite(embeddings).all(axis=1)
        if not finite.all():
            raise RunError(
                f"{task_metadata.name}: {np.count_nonzero(~finite)} of {len(texts)} embeddings hold NaN or infinity, "
                f"first that of {texts[int(np.argmin(finite))]!r}: the model's weights or its precision broke"
            )
        return embeddings

    def similarity(self, embeddings1: np.ndarray | Tensor, embeddings2: np.ndarray | Tensor) -> Tensor:
        """Of all [N, D] with all [M, D], as mteb computes it; [N, M]."""
        from mteb.similarity_functions import cos_sim, dot_score

        return (dot_score if self._is_dot else cos_sim)(embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: np.ndarray | Tensor, embeddings2: np.ndarray | Tensor) -> Tensor:
        """Of the rows of two [N, D], as mteb computes it; [N]."""
        from mteb.similarity_functions import pairwise_cos_sim, pairwise_dot_score

        similarities = (pairwise_dot_score if self._is_dot else pairwise_cos_sim)(embeddings1, embeddings2)
        return torch.as_tensor(similarities)

    @property
    def _is_dot(self) -> bool:
        return getattr(self.encoder.config, "similarity", "cosine") == "dot"

    @cached_property
    def mteb_model_meta(self) -> ModelMeta:
        """Name, revision and size; mteb keeps its results under name and revision."""
        from mteb.models.model_meta import ModelMeta, ScoringFunction

        parameters = list(self.encoder.model.parameters())
        return ModelMeta(
            loader=None,
            name=self._name,
            revision=self._revision or self.fingerprint(),
            release_date=None,
            languages=["eng-Latn"],
            n_parameters=sum(weight.numel() for weight in parameters),
            memory_usage_mb=sum(weight.numel() * weight.element_size() for weight in parameters) / 2**20,
            max_tokens=self.encoder.config.max_length,
            embed_dim=self.encoder.dimension,
            license=None,
            open_weights=None,
            public_training_code=None,
            public_training_data=None,
            framework=["PyTorch"],
            similarity_fn_name=ScoringFunction("dot" if self._is_dot else "cosine"),
            use_instructions=True,
            training_datasets=None,
        )

    def fingerprint(self) -> str:
        """12 hexadecimal digits that change with weights, architecture, tokenizer, pooling, instructions, text limit.

        mteb takes results of the same name and revision for this model's: two models must never share both.
        """
        parts: list[Any] = [model_checksum(self.encoder.model), tokenizer_checksum(self.encoder.tokenizer)]
        parts += [asdict(self.encoder.config), self.max_text_length, self.use_paper_instructions, self.instructions]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def _texts(inputs: Iterable[Mapping[str, Any]], task: str) -> Iterable[str]:
    for batch in inputs:
        if "text" not in batch:
            raise ConfigError(f"{task} has no texts but {', '.join(batch)}; only tasks of texts can be evaluated")
        yield from batch["text"]
