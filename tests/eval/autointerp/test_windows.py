"""Windows for a judge: where they may lie, what is in them, how they are drawn and written."""

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from builders import TEXT, tiny_tokenizer
from c2r.eval.autointerp.windows import Counts, Firings, Text, marked, pick, plain
from c2r.eval.bench import TextActivations
from c2r.sae.model import SAE, Extra

SMALL = Counts(explain_top=3, explain_sampled=2, score_top=1, score_sampled=1, score_silent=4, radius=2)


def text_of(rows: list[int], positions: list[int], ids: list[int], radius: int) -> Text:
    x_nD = torch.zeros(len(ids), 1)
    return Text(TextActivations(x_nD, *(torch.tensor(values) for values in (ids, rows, positions))), radius)


@settings(max_examples=60)
@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=12), min_size=1, max_size=5), st.integers(0, 4))
def test_windows_stay_in_their_piece_of_text(real: list[list[bool]], radius: int) -> None:
    places = [(r, t) for r, row in enumerate(real) for t, kept in enumerate(row) if kept]
    if not places:
        return
    text = text_of([r for r, _ in places], [t for _, t in places], list(range(len(places))), radius)
    for n, (r, t) in enumerate(places):
        low, high = t, t  # walk from the token as far as the radius and real tokens allow
        while low > max(0, t - radius) and real[r][low - 1]:
            low -= 1
        while high < min(len(real[r]) - 1, t + radius) and real[r][high + 1]:
            high += 1
        assert [places[i] for i in range(text.start_n[n], text.stop_n[n])] == [(r, i) for i in range(low, high + 1)]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.02, 0.3))
def test_what_is_picked(seed: int, density: float) -> None:
    rng = np.random.default_rng(seed)
    n = 400
    strength_n = rng.exponential(size=n).astype(np.float32) * (rng.random(n) < density)
    strength_n[rng.integers(n, size=3)] = 1e-6  # fires, but far too weakly to count
    ids = rng.integers(0, 5, size=n)
    text = text_of(
        np.repeat(np.arange(10), 40).tolist(), np.tile(np.arange(40), 10).tolist(), ids.tolist(), SMALL.radius
    )
    tokens_K = strength_n.nonzero()[0].astype(np.int32)
    try:
        found = pick(text, tokens_K, strength_n[tokens_K], SMALL, (0, 1))
    except ValueError:
        reject()
    assert [len(part) for part in found] == [5, 2, 4]
    windows = [window for part in found for window in part]
    covered = [n for window in windows for n in range(*window)]
    assert len(covered) == len(set(covered))
    assert len({tuple(ids[slice(*window)]) for window in windows}) == len(windows)
    assert all(len({i // 40 for i in range(*window)}) == 1 for window in windows)
    floor = 0.01 * strength_n.max()
    assert all((strength_n[slice(*window)] >= floor).any() for window in found.explain + found.firing)
    assert all((strength_n[slice(*window)] == 0).all() for window in found.silent)
    again = pick(text, tokens_K, strength_n[tokens_K], SMALL, (0, 1))
    assert again == found
    # The strongest token of all is in a window of the latent's strongest.
    strongest = int(strength_n.argmax())
    assert any(window.start <= strongest < window.stop for window in found.explain + found.firing)


def test_weaker_tokens_are_sampled_by_their_square() -> None:
    n, counts = 60, Counts(1, 1, 0, 0, 1, radius=1)
    text = text_of([0] * n, list(range(n)), list(range(n)), 1)
    tokens_K, strength_K = np.array([5, 15, 25]), np.array([10.0, 3.0, 1.0], dtype=np.float32)
    draws = [pick(text, tokens_K, strength_K, counts, (seed,)).explain for seed in range(1500)]
    assert all(windows[0] == (4, 7) for windows in draws)  # strongest first
    share = np.mean([windows[1] == (14, 17) for windows in draws])
    assert abs(share - 9 / 10) < 4 * (0.9 * 0.1 / 1500) ** 0.5


def test_every_window_of_silence_is_as_likely() -> None:
    n, counts = 12, Counts(1, 0, 0, 0, 1, radius=1)
    text = text_of([0] * n, list(range(n)), list(range(n)), 1)
    starts = [pick(text, np.array([1]), np.array([1.0]), counts, (seed,)).silent[0].start for seed in range(1800)]
    # Token 1 fires, its window takes 0 to 2: silent and free are those around 4 to 11, the last one cut short.
    assert set(starts) == set(range(3, 11))
    assert np.bincount(starts)[3:].min() > 225 - 5 * 15  # 1800 / 8, less five standard deviations


@pytest.mark.parametrize(
    ("firing", "says"),
    [
        ([3, 4, 5, 6], "1 distinct windows around its strongest firings; 4 are needed"),
        ([2, 12, 22, 32], "0 distinct windows around weaker firings; 3 are needed"),
        (list(range(100)), "0 distinct windows in which it is silent; 4 are needed"),
    ],
)
def test_too_little_text_for_a_latent(firing: list[int], says: str) -> None:
    text = text_of([0] * 100, list(range(100)), list(range(100)), 2)
    tokens_K = np.array(firing)
    with pytest.raises(ValueError, match=says):
        pick(text, tokens_K, np.linspace(1, 2, len(firing)), SMALL, (0,))


def test_repeated_text_counts_once() -> None:
    ids = list(range(10)) * 10
    text = text_of([0] * 100, list(range(100)), ids, 2)
    with pytest.raises(ValueError, match="1 distinct windows around its strongest"):
        pick(text, np.arange(5, 100, 10), np.linspace(1, 2, 10), SMALL, (0,))


@pytest.mark.parametrize("architecture", ["standard", "abs_topk"])
def test_firings_are_the_columns_of_the_activations(architecture: str) -> None:
    generator = torch.Generator().manual_seed(0)
    W_FD, x_nD = torch.randn(7, 4, generator=generator), torch.randn(50, 4, generator=generator)
    extra = Extra(k=2) if architecture == "abs_topk" else Extra()
    sae = SAE(W_FD, torch.full((7,), -1.0), W_FD, torch.zeros(4), architecture=architecture, extra=extra)
    acts_nF = sae.encode(x_nD).detach()
    firings = Firings(sae, x_nD, batch=8)
    assert firings.fired_F.tolist() == (acts_nF != 0).sum(0).tolist()
    for latent in range(7):
        tokens_K, strength_K = firings.of(latent)
        assert tokens_K.tolist() == acts_nF[:, latent].nonzero().flatten().tolist()
        assert np.allclose(strength_K, acts_nF[tokens_K, latent].abs())


@settings(max_examples=60)
@given(st.text(alphabet="ab é☃\n\u2028\r𝕏", min_size=1, max_size=12), st.lists(st.booleans(), min_size=40, max_size=40))
def test_marks_are_all_that_marking_adds(written: str, flags: list[bool]) -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer(written, add_special_tokens=False)["input_ids"]
    line = plain(tokenizer, ids)
    assert len(line.splitlines()) == 1
    shown = marked(tokenizer, ids, flags[: len(ids)])
    assert shown.replace("⟦", "").replace("⟧", "") == line
    assert ("⟦" in shown) == any(flags[: len(ids)])
    assert "⟦⟧" not in shown
    assert "⟧⟦" not in shown


def test_marks_stand_around_the_tokens_that_fire() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer("ab☃c", add_special_tokens=False)["input_ids"]
    assert [tokenizer.decode([i]) for i in ids] == ["a", "b", "�", "�", "�", "c"]
    assert marked(tokenizer, ids, [True, True, False, False, False, True]) == "⟦ab⟧☃⟦c⟧"
    for part in (2, 3, 4):  # a character fires if one of its tokens does
        assert marked(tokenizer, ids, [i == part for i in range(6)]) == "ab⟦☃⟧c"
    assert plain(tokenizer, tokenizer("a\r\nb\n\nc")["input_ids"]) == "a↵↵b↵↵c"


def test_marks_with_a_tokenizer_whose_decoder_drops_the_first_space() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    inner = Tokenizer(models.Unigram())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    inner.train_from_iterator([TEXT] * 5, trainers.UnigramTrainer(vocab_size=120, show_progress=False))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner)
    ids = tokenizer("the lazy dog")["input_ids"]
    pieces = [tokenizer.convert_ids_to_tokens(i) for i in ids]
    fires = [piece.startswith("▁l") or (n > 0 and not piece.startswith("▁")) for n, piece in enumerate(pieces)]  # pyright: ignore[reportAttributeAccessIssue]
    assert marked(tokenizer, ids, fires).replace("⟦", "").replace("⟧", "") == " the lazy dog"
    assert "⟦" in marked(tokenizer, ids, fires)
