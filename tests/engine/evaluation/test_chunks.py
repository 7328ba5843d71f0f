"""Base phrases of dependency trees: sentences parsed by hand that show the rule, clause by clause."""

from __future__ import annotations

import pytest

from bivec.engine.evaluation.chunks import Token, base_phrases
from bivec.engine.evaluation.word_data import to_bio

# word/UPOS/XPOS/head (from 1, 0 = root)/relation, and the chunks in brackets
SENTENCES = {
    "noun with what stands in front; prepositions alone": (
        (
            "Confidence/NOUN/NN/6/nsubj:pass in/ADP/IN/4/case the/DET/DT/4/det pound/NOUN/NN/1/nmod "
            "is/AUX/VBZ/7/aux:pass widely/ADV/RB/7/advmod expected/VERB/VBN/0/root to/PART/TO/9/mark "
            "take/VERB/VB/7/xcomp another/DET/DT/12/det sharp/ADJ/JJ/12/amod dive/NOUN/NN/9/obj"
        ),
        "[NP Confidence] [PP in] [NP the pound] [VP is widely expected to take] [NP another sharp dive]",
    ),
    "an adjective's own adverb belongs to the noun's chunk": (
        "a/DET/DT/4/det very/ADV/RB/3/advmod big/ADJ/JJ/4/amod house/NOUN/NN/0/root",
        "[NP a very big house]",
    ),
    "a possessive 's begins a chunk; a possessive pronoun does not": (
        (
            "Then/ADV/RB/8/advmod ,/PUNCT/,/8/punct my/PRON/PRP$/4/nmod:poss boss/NOUN/NN/7/nmod:poss "
            "'s/PART/POS/4/case new/ADJ/JJ/7/amod car/NOUN/NN/8/nsubj broke/VERB/VBD/0/root down/ADP/RP/8/compound:prt"
        ),
        "[ADVP Then] , [NP my boss] [NP 's new car] [VP broke] [PRT down]",
    ),
    "names and amounts reach to the right": (
        "George/PROPN/NNP/3/nsubj Bush/PROPN/NNP/1/flat paid/VERB/VBD/0/root $/SYM/$/3/obj 5/NUM/CD/4/nummod",
        "[NP George Bush] [VP paid] [NP $ 5]",
    ),
    "conjuncts are chunks of their own": (
        (
            "Cats/NOUN/NNS/4/nsubj and/CCONJ/CC/3/cc dogs/NOUN/NNS/1/conj sleep/VERB/VBP/0/root and/CCONJ/CC/6/cc "
            "eat/VERB/VBP/4/conj"
        ),
        "[NP Cats] and [NP dogs] [VP sleep] and [VP eat]",
    ),
    "copula and negation; a predicate adjective with its adverb": (
        (
            "It/PRON/PRP/5/nsubj is/AUX/VBZ/5/cop n't/PART/RB/5/advmod really/ADV/RB/5/advmod good/ADJ/JJ/0/root "
            "because/ADP/IN/9/case of/ADP/IN/6/fixed the/DET/DT/9/det rain/NOUN/NN/5/obl"
        ),
        "[NP It] [VP is n't] [ADJP really good] [PP because of] [NP the rain]",
    ),
    "questions: the verb's parts apart": (
        "Why/ADV/WRB/4/advmod did/AUX/VBD/4/aux he/PRON/PRP/4/nsubj go/VERB/VB/0/root ?/PUNCT/./4/punct",
        "[ADVP Why] [VP did] [NP he] [VP go] ?",
    ),
    "neighbouring verbs of two clauses do not join": (
        (
            "What/PRON/WP/5/nsubj he/PRON/PRP/3/nsubj did/VERB/VBD/1/acl:relcl really/ADV/RB/5/advmod "
            "surprised/VERB/VBD/0/root me/PRON/PRP/5/obj"
        ),
        "[NP What] [NP he] [VP did] [ADVP really] [VP surprised] [NP me]",
    ),
    "subordinating words; a preposition in front of a gerund": (
        (
            "I/PRON/PRP/2/nsubj know/VERB/VBP/0/root that/SCONJ/IN/5/mark she/PRON/PRP/5/nsubj "
            "left/VERB/VBD/2/ccomp without/SCONJ/IN/7/mark paying/VERB/VBG/5/advcl"
        ),
        "[NP I] [VP know] [SBAR that] [NP she] [VP left] [PP without] [VP paying]",
    ),
    "adjectives and determiners that stand for nouns": (
        (
            "All/DET/DT/7/nsubj of/ADP/IN/4/case the/DET/DT/4/det poor/ADJ/JJ/1/nmod were/AUX/VBD/7/cop "
            "very/ADV/RB/7/advmod hungry/ADJ/JJ/0/root"
        ),
        "[NP All] [PP of] [NP the poor] [VP were] [ADJP very hungry]",
    ),
    "conjunctions of several words, interjections, adverbs in front of a noun": (
        (
            "Oh/INTJ/UH/5/discourse ,/PUNCT/,/5/punct only/ADV/RB/5/advmod the/DET/DT/5/det best/NOUN/NN/0/root "
            "as/ADV/RB/9/cc well/ADV/RB/6/fixed as/ADP/IN/6/fixed worst/NOUN/NN/5/conj"
        ),
        "[INTJ Oh] , [NP only the best] [CONJP as well as] [NP worst]",
    ),
    "punctuation inside a chunk, but not at its edge": (
        "\"/PUNCT/``/4/punct web/NOUN/NN/4/compound -/PUNCT/HYPH/4/punct pages/NOUN/NNS/0/root \"/PUNCT/''/4/punct",
        '" [NP web - pages] "',
    ),
    "an adverb of a clause stays out of its noun": (
        "He/PRON/PRP/5/nsubj is/AUX/VBZ/5/cop probably/ADV/RB/5/advmod a/DET/DT/5/det doctor/NOUN/NN/0/root",
        "[NP He] [VP is] [ADVP probably] [NP a doctor]",
    ),
}


def tree(text: str) -> list[Token]:
    fields = [part.rsplit("/", 4) for part in text.split()]
    return [Token(form, upos, xpos, int(head) - 1, deprel) for form, upos, xpos, head, deprel in fields]


def brackets(tokens: list[Token], labels: list[str]) -> str:
    parts: list[str] = []
    for token, label in zip(tokens, labels, strict=True):
        if label.startswith("I-"):
            parts[-1] = f"{parts[-1][:-1]} {token.form}]"
        else:
            parts.append(token.form if label == "O" else f"[{label[2:]} {token.form}]")
    return " ".join(parts)


@pytest.mark.parametrize("rule", SENTENCES)
def test_rule(rule):
    parsed, expected = SENTENCES[rule]
    tokens = tree(parsed)
    labels = base_phrases(tokens)
    assert brackets(tokens, labels) == expected
    assert to_bio(labels) == labels  # every I- continues a chunk of its kind


def test_no_words():
    assert base_phrases([]) == []
