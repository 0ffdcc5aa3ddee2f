"""The first-letter task on a language model: words in context, their activations, and the ground-truth probe.

As in SAEBench 0.6.0, the concept is the first letter of a word's token, with 26 classes.

n words · B words of the training or test part · D width of the activations · R rows · T positions.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from c2r.activations.counting import Counting, LeftOut
from c2r.config.evaluations import FirstLetterSettings
from c2r.eval.absorption.concepts import Labelled
from c2r.eval.absorption.probes import LinearProbe, one_vs_rest_probe
from c2r.eval.bench import Bench
from c2r.language_model.model import LanguageModel
from c2r.progress import progress_bar
from c2r.text.packing import bos_of
from c2r.text.spelling import alphabetic_tokens

LETTERS = "abcdefghijklmnopqrstuvwxyz"
_TRAIN_SHARE = 0.8
_ROWS = 128


class Draw(NamedTuple):
    """Words in random order, and the in-context examples that precede them."""

    words: list[str]
    """Words of the training part, then of the test part."""
    train: int
    """Number of words in the training part."""
    groups: list[tuple[list[str], str]]
    """Consecutive words that share the same examples, and these examples as text."""

    @property
    def labels_n(self) -> Tensor:
        """Index of each word's first letter in the alphabet, from 0."""
        return torch.tensor([LETTERS.index(letter_of(word).lower()) for word in self.words])


class Collection(NamedTuple):
    """Data of one seed, shared by all SAEs."""

    seed: int
    words: list[str]
    """Words of the training part, then of the test part."""
    data: Labelled
    probe: LinearProbe
    key: dict[str, Any]
    """Everything that the probe depends on, as a key of the cache."""


def letter_of(word: str) -> str:
    """The first letter in upper case."""
    return word.lstrip(" ")[0].upper()


def words_of(tokenizer: Any, kind: Literal["all", "spaced"]) -> dict[str, int]:
    """Text and id of vocabulary entries that consist of A-Z and a-z, with or without a leading space.

    Only entries that the tokenizer uses to encode their own text are included. SAEBench also includes the others, and
    thus reads a different token for them.
    """
    entries = {text: index for text, index in alphabetic_tokens(tokenizer) if kind == "all" or text[0] == " "}
    if not entries:
        return {}
    rows = tokenizer([f"\n{text}" for text in entries], add_special_tokens=False)["input_ids"]
    return {text: index for (text, index), row in zip(entries.items(), rows, strict=True) if row[-1] == index}


def draw(words: Sequence[str], settings: FirstLetterSettings, seed: int) -> Draw:
    """Split the words 80/20 and draw examples; no example is a word of the group, whatever its case and spacing.

    Raises:
        ValueError: the template does not contain {word} exactly once, there are too few words, or no training word
            begins with some letter.
    """
    if settings.template.count("{word}") != 1:
        raise ValueError(f"template: got {settings.template!r}; accepted are texts that contain {{word}} exactly once")
    rng = random.Random(seed)
    ordered = sorted(words)
    shuffled = rng.sample(ordered, min(settings.max_words or len(ordered), len(ordered)))
    train = int(_TRAIN_SHARE * len(shuffled))
    missing = sorted(set(LETTERS.upper()) - {letter_of(word) for word in shuffled[:train]})
    if missing:
        raise ValueError(
            f"tokenizer: none of {train} training words begins with {', '.join(missing)}, but every letter needs some; "
            f"the vocabulary has {len(ordered)} entries that consist of letters (max_words: {settings.max_words})"
        )
    groups = []
    for part in (shuffled[:train], shuffled[train:]):
        spellings = Counter(_plain(word) for word in part)
        for start in range(0, len(part), settings.words_per_prompt):
            group = part[start : start + settings.words_per_prompt]
            taken = {_plain(word) for word in group}
            enough = settings.examples + sum(spellings[word] for word in taken)
            if enough > len(part):
                raise ValueError(
                    f"tokenizer: {len(part)} words are too few for {settings.examples} examples in addition to the "
                    f"{len(group)} words that share them; at least {enough} are needed"
                )
            chosen = [word for word in rng.sample(part, enough) if _plain(word) not in taken][: settings.examples]
            lines = [f"\n{settings.template.replace('{word}', word)} {letter_of(word)}" for word in chosen]
            groups.append((group, "".join(lines)))
    return Draw(shuffled, train, groups)


def token_rows(
    tokenizer: Any,
    words: dict[str, int],
    drawn: Draw,
    settings: FirstLetterSettings,
    prepend_bos: bool | None = None,
) -> list[list[int]]:
    """Each word's prompt as token ids, up to the position whose activations are read.

    Arguments:
        prepend_bos: as `data.prepend_bos`.

    Raises:
        ValueError: the token at that position is not the word's.
    """
    line = f"\n{settings.template}"
    texts = [opening + line.replace("{word}", word) for group, opening in drawn.groups for word in group]
    rows: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    tail = tokenizer(line.partition("{word}")[2], add_special_tokens=False)["input_ids"]
    position = settings.position or -len(tail) - 1
    read = [row[position] if len(row) >= -position else None for row in rows]
    wrong = [i for i, (word, index) in enumerate(zip(drawn.words, read, strict=True)) if words[word] != index]
    if wrong:
        found = read[wrong[0]]
        raise ValueError(
            f"position: the token at {position} of {texts[wrong[0]][-60:]!r} is "
            f"{'missing' if found is None else repr(tokenizer.decode([found]))}, not the token of "
            f"{drawn.words[wrong[0]]!r} (likewise for {len(wrong)} of {len(rows)} words); choose another position or "
            "template"
        )
    bos = bos_of(tokenizer, prepend_bos)
    opening = [] if bos is None else [bos]
    return [opening + row[: len(row) + position + 1] for row in rows]


def read_activations(lm: LanguageModel, rows: list[list[int]], sizes: Sequence[int], bar: Any) -> Tensor:
    """Activations `[n, D]` at the end of each row; the common prefix of a group's rows is read only once.

    Arguments:
        sizes: number of rows per group; groups are consecutive.
        bar: a progress bar.
    """
    alike: dict[tuple[int, int], list[int]] = defaultdict(list)
    for first, size in zip(itertools.accumulate(sizes, initial=0), sizes, strict=False):
        group = rows[first : first + size]
        shared = next((i for i, ids in enumerate(zip(*group, strict=False)) if len(set(ids)) > 1), len(group[0]))
        alike[min(shared, *(len(row) - 1 for row in group), len(group[0]) - 1), size].append(first)
    x_nD = torch.empty(len(rows), lm.d_in)
    task = bar.add_task("first letters", total=len(rows))
    for (shared, size), firsts in alike.items():
        step = max(1, _ROWS // size)
        for some in (firsts[i : i + step] for i in range(0, len(firsts), step)):
            index = [i for first in some for i in range(first, first + size)]
            tails = [rows[i][shared:] for i in index]
            longest = max(map(len, tails))  # padding comes after the position that is read, so it has no effect
            ids_RT = torch.tensor([tail + [tail[-1]] * (longest - len(tail)) for tail in tails])
            openings = torch.tensor([rows[first][:shared] for first in some])
            x_RTD = lm.continuations(openings, ids_RT) if shared else lm.activations(ids_RT)
            last = torch.tensor([len(tail) - 1 for tail in tails])
            x_nD[index] = x_RTD[torch.arange(len(index)), last.to(x_RTD.device)].cpu()
            bar.advance(task, len(index))
    return x_nD


def collect(bench: Bench, words: dict[str, int], settings: FirstLetterSettings, seed: int) -> Collection:
    """Activations of all words and the ground-truth probe, from the cache on disk if they are there.

    Raises:
        ValueError: see `draw` and `token_rows`.
    """
    drawn = draw(list(words), settings, seed)
    rows = token_rows(bench.lm.tokenizer, words, drawn, settings, bench.data.prepend_bos)
    digest = hashlib.sha256(json.dumps([drawn.words, rows]).encode()).hexdigest()
    key: dict[str, Any] = {**bench.model_key, "words and ids": digest}

    def make() -> dict[str, Tensor]:
        with progress_bar(bench.console) as bar:
            return {"x": read_activations(bench.lm, rows, [len(group) for group, _ in drawn.groups], bar)}

    x_nD, y_n, cut = bench.cache.get("first_letters", key, make)["x"], drawn.labels_n, drawn.train
    data = Labelled(x_nD[:cut], y_n[:cut], x_nD[cut:], y_n[cut:])

    key |= {"train": cut, "seed": seed}
    return Collection(seed, drawn.words, data, _probe(bench, data, key), key)


def counted_words(bench: Bench, found: Collection, rule: Counting) -> tuple[Collection, LeftOut]:
    """The words whose activations count; if some do not, with a ground-truth probe trained on the others."""
    data = found.data
    train_B, test_B = rule.of(data.x_train_BD), rule.of(data.x_test_BD)
    count_n = torch.cat([train_B, test_B])
    left_out = LeftOut(rule, len(count_n), int((~count_n).sum()), "words")
    if not left_out.outliers or left_out.outliers == left_out.tokens:
        return found, left_out
    kept = Labelled(
        data.x_train_BD[train_B], data.y_train_B[train_B], data.x_test_BD[test_B], data.y_test_B[test_B]
    )  # fmt: skip
    words = [word for word, counts in zip(found.words, count_n.tolist(), strict=True) if counts]
    key = found.key | {"max_norm": rule.max_norm}
    return Collection(found.seed, words, kept, _probe(bench, kept, key), key), left_out


def _probe(bench: Bench, data: Labelled, key: dict[str, Any]) -> LinearProbe:
    """The ground-truth probe, from the cache on disk if it is there."""

    def train() -> dict[str, Tensor]:
        return one_vs_rest_probe(data.x_train_BD, data.y_train_B, len(LETTERS), seed=key["seed"])._asdict()

    return LinearProbe(**bench.cache.get("first_letter_probe", key, train))


def _plain(word: str) -> str:
    return word.strip().lower()
