"""Supervised contrastive training of an encoder that another run, or another project, has made.

    python recipes/supervised.py --model runs/llm2vec-mistral-7b --supervised-data echo-data
    python recipes/supervised.py --model DIR --supervised-data triples.jsonl --set supervised.template=mistral
    python recipes/supervised.py … --set supervised.causal=true --set supervised.pooling=weighted_mean    # Uni

    # from Bi+MNTP, as the paper's supervised models; its full ones go on with the adapter of SimCSE
    python recipes/supervised.py --model mistralai/Mistral-7B-Instruct-v0.2 --adapters runs/llm2vec-mistral-7b/mntp \
        --supervised-data echo-data [--set supervised.init_adapter=runs/llm2vec-mistral-7b/simcse]

``--model`` is a run directory (its merged/), any decoder or a .gguf file. The hyper-parameters are the
paper's: 512 triples a step for 1,000 steps, which gradient caching fits onto one device. Data: the public replica of
the E5 mix (``echo-data``), or your own triples (engine/triples.py says the format; recipes/entailment_triples.py makes
some of SICK, SNLI or MultiNLI). The chat template is the one of the model's folder, else that of the decoder that the
run was made of, known by its exact name; supervised.template says another. The run prints which it is.

The settings are in engine/presets.py and, the stage's, in engine/recipe.py. Source: METHOD 5.7
(train_configs/supervised of the LLM2Vec repository; paper, appendix D.2).
"""

from bivec.engine.presets import SUPERVISED as RECIPE
from bivec.engine.run_start import start


def main() -> None:
    """Supervised training, STS-B before and after."""
    with start(RECIPE, __doc__, trains=("supervised",)) as run:
        run.evaluate()
        run.supervised()
        run.evaluate()
        run.finish()


if __name__ == "__main__":
    main()
