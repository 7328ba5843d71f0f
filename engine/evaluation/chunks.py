"""Base phrases of a dependency tree: what chunking is measured on where no chunk corpus can be shipped.

CoNLL-2000's chunks were cut from phrase-structure trees; these are cut from Universal Dependencies by the rule below,
in their spirit and with their names: a chunk is a head word with what stands in front of it, never with what follows
it; chunks do not overlap; conjunctions, and punctuation between chunks, belong to none (O). In this order, a word that
one step has taken being out of reach of the next:

1. NP. Its head is a noun, name, pronoun or number, a determiner that stands alone ("all of them"), an adjective with a
   nominal relation or a determiner ("the poor"), a symbol or foreign word with a nominal relation; those nearest to the
   root go first. To the left it takes words as long as each is, or is below, a dependent of the head that is a
   determiner, adjective, number, compound, possessive, description or part of a name ("a [very big] house"), or an
   adverb if the head has no subject ("[only the] best"). To the right it takes the rest of a name, number or compound
   ("George Bush", "$ 5"). A possessive 's begins a chunk, as in CoNLL: [NP John] [NP 's house]. Conjuncts are chunks of
   their own: [NP cats] and [NP dogs].
2. VP. Verbs, auxiliaries and copulas, infinitival "to", "not", and the adverbs between two of them. Neighbours share a
   chunk if they are parts of one verb or if the right verb is an open complement of the left one:
   [VP is widely expected to take], [VP is n't] [ADJP good]; [VP did] [NP he] [VP go].
3. PRT: particles of verbs. PP: prepositions, alone: [PP in] [NP the pound], and those in front of a gerund. SBAR: other
   subordinating words. CONJP: conjunctions of several words. INTJ, LST: interjections, list marks.
4. ADJP, ADVP: adjectives and adverbs that are left, with the adverbs in front that modify them ([ADVP very quickly]);
   when, where, why, how are ADVP.
5. A word fixed to another one, or written apart from it, joins its chunk if it is next to it: [PP because of].

Not as in CoNLL-2000: coordinations of bare nouns are cut, punctuation at the edge of a chunk belongs to none, and UCP
does not occur.

Source: Tjong Kim Sang & Buchholz, CoNLL-2000; relations as in universaldependencies.org, English EWT.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

NOMINALS = {"NOUN", "PROPN", "PRON", "NUM"}
NOMINAL_RELATIONS = {"nsubj", "obj", "iobj", "obl", "nmod", "appos", "vocative", "expl", "dislocated", "list"}
LEFT_OF_NOUN = {"det", "amod", "nummod", "compound", "nmod:poss", "nmod:desc", "flat", "goeswith"}
RIGHT_OF_NOUN = {"flat", "nummod", "compound", "goeswith", "fixed"}
VERBAL = {"VERB", "AUX"}
NOT = {"not", "n't", "n’t", "nt"}


@dataclass(frozen=True)
class Token:
    """A word of a dependency tree."""

    form: str
    upos: str  # universal part of speech
    xpos: str  # Penn Treebank tag
    head: int  # position of the head in the sentence, from 0; -1 for the root
    deprel: str  # relation to the head

    @property
    def relation(self) -> str:
        """Without its subtype: "nmod" for "nmod:poss"."""
        return self.deprel.split(":")[0]


def base_phrases(tokens: Sequence[Token]) -> list[str]:
    """The chunk labels of a sentence.

    Args:
        tokens: the words in order; their heads form a tree.

    Returns:
        One BIO label a word: O, B-NP, I-NP, …
    """
    sentence = _Sentence(tokens)
    _noun_phrases(sentence)
    _verb_phrases(sentence)
    _function_words(sentence)
    _modifiers(sentence)
    _fixed_words(sentence)
    return sentence.labels


class _Sentence:
    """The words and the labels they have so far."""

    def __init__(self, tokens: Sequence[Token]) -> None:
        self.tokens = tokens
        self.labels = ["O"] * len(tokens)
        self.taken = [token.upos == "PUNCT" for token in tokens]
        self.children: list[list[int]] = [[] for _ in tokens]
        for position, token in enumerate(tokens):
            if token.head >= 0:
                self.children[token.head].append(position)

    def has(self, position: int, *relations: str) -> bool:
        """True if a word has a dependent with one of these relations, subtypes included."""
        return any(self.tokens[child].relation in relations for child in self.children[position])

    def free(self, position: int) -> bool:
        return 0 <= position < len(self.tokens) and not self.taken[position]

    def depth(self, position: int) -> int:
        steps = 0
        while (position := self.tokens[position].head) >= 0:
            steps += 1
        return steps

    def branch(self, position: int, above: int) -> int | None:
        """The child of ``above`` under which a word stands; None if it stands elsewhere."""
        while position >= 0:
            head = self.tokens[position].head
            if head == above:
                return position
            position = head
        return None

    def put(self, kind: str, start: int, end: int) -> None:
        """Labels the words start … end - 1 as one chunk."""
        for position in range(start, end):
            self.labels[position] = f"{'B' if position == start else 'I'}-{kind}"
            self.taken[position] = True


def _noun_phrases(sentence: _Sentence) -> None:
    heads = sorted(range(len(sentence.tokens)), key=lambda position: (sentence.depth(position), position))
    for head in heads:
        if sentence.free(head) and _is_nominal(sentence, head):
            start = _extend(sentence, head, -1, partial(_precedes_noun, sentence, head=head))
            end = _extend(sentence, head, 1, lambda child: sentence.tokens[child].relation in RIGHT_OF_NOUN)
            sentence.put("NP", start, end + 1)


def _is_nominal(sentence: _Sentence, position: int) -> bool:
    token = sentence.tokens[position]
    if token.xpos == "LS" or token.relation in ("fixed", "goeswith"):
        return False
    if token.upos in NOMINALS:
        return True
    if token.upos == "DET":  # stands for a noun, or floats: "we all"
        return token.relation != "cc"
    nominal_role = token.relation in NOMINAL_RELATIONS or token.xpos in ("$", "NN", "NNS", "NNP", "ADD", "FW")
    if token.upos == "ADJ":
        return nominal_role or sentence.has(position, "det")
    return token.upos in ("SYM", "X") and (nominal_role or sentence.has(position, "nummod"))


def _precedes_noun(sentence: _Sentence, child: int, head: int) -> bool:
    token = sentence.tokens[child]
    if token.deprel in LEFT_OF_NOUN or token.relation in LEFT_OF_NOUN:
        return not sentence.has(child, "cop", "nsubj")
    of_clause = sentence.has(head, "cop", "nsubj")  # "he is probably a doctor"
    return token.relation == "advmod" and token.upos == "ADV" and token.xpos != "WRB" and not of_clause


def _extend(sentence: _Sentence, head: int, step: int, belongs: Callable[[int], bool]) -> int:
    """The last word that the head's phrase takes on its way to the left (step -1) or to the right (+1)."""
    last, position = head, head + step
    while 0 <= position < len(sentence.tokens):
        token = sentence.tokens[position]
        child = sentence.branch(position, head)
        punctuation = token.upos == "PUNCT"
        if child is None or not ((punctuation and child == position) or belongs(child)):
            break
        if not punctuation:  # punctuation is kept between words only
            if sentence.taken[position]:
                break
            last = position
            if token.xpos == "POS" and step < 0:  # the possessor in front is a phrase of its own
                break
        position += step
    return last


def _verb_phrases(sentence: _Sentence) -> None:
    tokens = sentence.tokens
    verbal = [sentence.free(position) and _is_verbal(sentence, position) for position in range(len(tokens))]
    start = 0
    while start < len(tokens):
        if not verbal[start]:
            start += 1
            continue
        end = start + 1
        while True:
            following = end
            while sentence.free(following) and tokens[following].upos == "ADV" and not verbal[following]:
                following += 1
            if following >= len(tokens) or not verbal[following] or not _one_verb(sentence, end - 1, following):
                break
            end = following + 1
        sentence.put("VP" if not _is_not(tokens[start]) or end - start > 1 else "ADVP", start, end)
        start = end


def _is_not(token: Token) -> bool:
    return token.form.lower() in NOT and token.relation == "advmod"


def _is_verbal(sentence: _Sentence, position: int) -> bool:
    token = sentence.tokens[position]
    return token.upos in VERBAL or token.xpos in ("TO", "MD") or _is_not(token)


def _one_verb(sentence: _Sentence, left: int, right: int) -> bool:
    """True if two verbal words belong to one verb, or the right one's verb completes the left one's."""
    first, second = (_verb_of(sentence, position) for position in (left, right))
    return first == second or (sentence.tokens[second].head == first and sentence.tokens[second].relation == "xcomp")


def _verb_of(sentence: _Sentence, position: int) -> int:
    """The word whose auxiliary, copula, "to" or "not" this is; else the word itself."""
    token = sentence.tokens[position]
    depends = token.relation in ("aux", "cop") or (token.xpos == "TO" and token.relation == "mark") or _is_not(token)
    return token.head if depends and token.head >= 0 else position


def _function_words(sentence: _Sentence) -> None:
    for position in range(len(sentence.tokens)):
        kind = _function_kind(sentence, position) if sentence.free(position) else None
        if kind is not None:
            sentence.put(kind, position, position + 1)


def _function_kind(sentence: _Sentence, position: int) -> str | None:  # noqa: PLR0911 - the task's rules, one by one
    token = sentence.tokens[position]
    if token.relation in ("fixed", "goeswith"):
        return None
    if token.xpos == "POS":
        return "NP"
    if token.deprel == "compound:prt" or token.xpos == "RP":
        return "PRT"
    if token.xpos == "LS":
        return "LST"
    if token.upos == "INTJ":
        return "INTJ"
    if token.relation == "cc" and sentence.has(position, "fixed"):
        return "CONJP"
    if token.xpos == "WRB":
        return None  # an adverb
    if token.relation == "mark":
        gerund = sentence.tokens[token.head].xpos == "VBG"
        return "PP" if gerund and token.upos in ("ADP", "SCONJ") else "SBAR"
    if token.relation == "case" or token.upos == "ADP":
        return "PP"
    return "SBAR" if token.upos == "SCONJ" else None


def _modifiers(sentence: _Sentence) -> None:
    heads = sorted(range(len(sentence.tokens)), key=lambda position: (sentence.depth(position), position))
    for head in heads:
        token = sentence.tokens[head]
        if sentence.free(head) and token.upos in ("ADJ", "ADV") and token.relation not in ("fixed", "goeswith"):
            start = _extend(sentence, head, -1, lambda child: sentence.tokens[child].relation == "advmod")
            sentence.put("ADJP" if token.upos == "ADJ" else "ADVP", start, head + 1)


def _fixed_words(sentence: _Sentence) -> None:
    """Words that belong to the one in front take over its chunk."""
    for position in range(1, len(sentence.tokens)):
        token = sentence.tokens[position]
        before = sentence.labels[position - 1]
        if sentence.free(position) and token.relation in ("fixed", "goeswith") and before != "O":
            joined = sentence.branch(position - 1, token.head) is not None or token.head == position - 1
            if joined:
                sentence.labels[position], sentence.taken[position] = f"I-{before[2:]}", True
