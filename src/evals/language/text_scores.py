"""Scores of generated answers and captions against reference texts: VQA accuracy, BLEU, ROUGE-L and CIDEr-D."""

from __future__ import annotations

import collections
import itertools
import math
import re
from collections.abc import Iterable, Sequence

# Contractions, as they are written; without some of their apostrophes they are the same word (VQA v2).
CONTRACTIONS = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd "
    "he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've "
    "needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll "
    "somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's "
    "there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've "
    "weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've "
    "why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll "
    "you're you've"
)
NUMBERS = "zero one two three four five six seven eight nine ten"
ARTICLES = ("a", "an", "the")
SIGNS = ';/[]"{}()=+\\_-><@`,?!'
PERIOD, COMMA = re.compile(r"\.(?!\d)"), re.compile(r"\d,\d")
BETA = 1.2  # of ROUGE-L: the weight of recall
DEVIATION = 6.0  # of CIDEr-D: words that two texts may differ in length by


def _spellings(word: str) -> Iterable[str]:
    """A contraction without one or more of its apostrophes."""
    places = [i for i, sign in enumerate(word) if sign == "'"]
    for count in range(1, len(places) + 1):
        for left_out in itertools.combinations(places, count):
            yield "".join(sign for i, sign in enumerate(word) if i not in left_out)


WORDS = {spelling: word for word in CONTRACTIONS.split() for spelling in _spellings(word)}
WORDS |= {word: str(number) for number, word in enumerate(NUMBERS.split())} | {"none": "0"}


def normalized(answer: str) -> str:
    """An answer as VQA v2 compares them (Goyal et al. 2017): small letters, without punctuation and articles, number
    words up to ten as digits, and contractions with their apostrophes.

    A sign is removed where it stands beside a space, or where the answer has a comma between two digits; elsewhere it
    becomes a space. A period goes unless a digit follows.
    """
    told = text = " ".join(answer.split())
    joined = COMMA.search(told) is not None
    for sign in SIGNS:
        apart = joined or f"{sign} " in told or f" {sign}" in told
        text = text.replace(sign, "" if apart else " ")
    words = [WORDS.get(word, word) for word in PERIOD.sub("", text).lower().split()]
    return " ".join(word for word in words if word not in ARTICLES)


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """The accuracy of one answer, 0 to 1. Of several references, those of different people: the mean over all groups
    without one of them of min(matches / 3, 1); of a single one: whether it is the same."""
    said = normalized(answer)
    same = [said == normalized(each) for each in references]
    if len(same) == 1:
        return float(same[0])
    return sum(min((sum(same) - each) / 3, 1.0) for each in same) / len(same)


def words_of(text: str) -> list[str]:
    """The words of a text for BLEU, ROUGE-L and CIDEr-D: small letters and digits, without signs."""
    return re.findall(r"\w+(?:'\w+)*", text.lower())


def bleu(answers: Sequence[str], references: Sequence[Sequence[str]], most: int = 4) -> float:
    """BLEU of a whole set (Papineni et al. 2002), 0 to 1: precisions of 1 to `most` words, with the brevity penalty;
    the reference nearest in length counts, the shorter of two. 0 where no `most` words in a row match."""
    right, total, said, meant = [0] * most, [0] * most, 0, 0
    for answer, each in zip(answers, references, strict=True):
        words, others = words_of(answer), [words_of(text) for text in each]
        said += len(words)
        meant += min((len(other) for other in others), key=lambda size: (abs(size - len(words)), size))
        for order in range(1, most + 1):
            counts = _grams(words, order)
            best: collections.Counter[tuple[str, ...]] = collections.Counter()
            for other in others:
                best |= _grams(other, order)
            right[order - 1] += sum((counts & best).values())
            total[order - 1] += sum(counts.values())
    if not all(right):
        return 0.0
    mean = sum(math.log(r / t) for r, t in zip(right, total, strict=True)) / most
    return math.exp(mean + min(0.0, 1 - meant / said))


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """ROUGE-L of one answer (Lin 2004), 0 to 1: from the longest common subsequence of words, the largest precision and
    the largest recall over the references, with β = 1.2, as COCO's captions are scored."""
    words = words_of(answer)
    found = [(_common(words, other), len(other)) for other in map(words_of, references)]
    precision = max((common / len(words) for common, _ in found), default=0.0) if words else 0.0
    recall = max((common / size for common, size in found if size), default=0.0)
    if not precision or not recall:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def cider_d(answers: Sequence[str], references: Sequence[Sequence[str]], most: int = 4) -> float:
    """CIDEr-D of a whole set (Vedantam et al. 2015), 0 to 10: the mean over answers, their references and 1 to `most`
    words in a row of the cosine of the weighted counts, 10 times and less for a reference of another length.

    A count is weighted by log(rows / rows that have it in a reference), so that what every row has counts nothing, and
    a set of one row is 0. It counts up to how often the reference has it. Counts are not divided by the length of the
    text, as in the published code (pycocoevalcap) and not in the paper.
    """
    cooked = [[_all_grams(text, most) for text in each] for each in references]
    rows = collections.Counter(gram for each in cooked for gram in set().union(*(set(found) for found in each)))
    total = sum(
        sum(_cosines(_all_grams(answer, most), other, rows, len(cooked)) for other in each) / len(each)
        for answer, each in zip(answers, cooked, strict=True)
    )
    return 10.0 * total / (most * len(cooked))


def _cosines(
    said: collections.Counter[tuple[str, ...]],
    meant: collections.Counter[tuple[str, ...]],
    rows: collections.Counter[tuple[str, ...]],
    count: int,
) -> float:
    """The sum over the lengths of grams of the clipped cosine, and less for texts of another length."""
    weight = lambda gram: math.log(count / max(rows[gram], 1))
    dot: collections.Counter[int] = collections.Counter()
    squares = [collections.Counter(), collections.Counter()]
    for counts, square in zip((said, meant), squares, strict=True):
        for gram, times in counts.items():
            square[len(gram)] += (times * weight(gram)) ** 2
    for gram, times in (said & meant).items():
        dot[len(gram)] += times * meant[gram] * weight(gram) ** 2
    apart = _length(said) - _length(meant)
    found = sum(value / math.sqrt(squares[0][order] * squares[1][order]) for order, value in dot.items() if value)
    return found * math.exp(-(apart**2) / (2 * DEVIATION**2))


def _length(counts: collections.Counter[tuple[str, ...]]) -> int:
    """The number of words."""
    return sum(times for gram, times in counts.items() if len(gram) == 1)


def _all_grams(text: str, most: int) -> collections.Counter[tuple[str, ...]]:
    """How often each 1 to `most` words in a row occur."""
    words = words_of(text)
    return sum((_grams(words, order) for order in range(1, most + 1)), collections.Counter())


def _grams(words: Sequence[str], order: int) -> collections.Counter[tuple[str, ...]]:
    return collections.Counter(tuple(words[i : i + order]) for i in range(len(words) - order + 1))


def _common(one: Sequence[str], other: Sequence[str]) -> int:
    """The length of the longest common subsequence."""
    before = [0] * (len(other) + 1)
    for word in one:
        row = [0]
        for place, second in enumerate(other):
            row.append(before[place] + 1 if word == second else max(before[place + 1], row[place]))
        before = row
    return before[-1]
