"""The stream: nothing lost or repeated, the same filter for all hooks, bit-identical resuming, and its thread.

One file above 400 lines: all of it watches one stream through the same numbered activations.
"""

import itertools
import json
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from c2r.activations import reader, windows
from c2r.activations.prefetch import Ahead
from c2r.activations.reader import Part
from c2r.activations.stream import ActivationStream
from c2r.config.hooks import HookPoint
from c2r.config.known_features import of_preset
from c2r.config.run import StreamConfig
from c2r.known_features.generator import KnownFeatures
from c2r.known_features.presets import known_features
from c2r.known_features.stream import SyntheticStream

POINT, OTHER = HookPoint(0, "resid_post"), HookPoint(1, "mlp_out")


class Numbers:
    """A reader whose token i has the activation (i, 1000, 0, 0) at one hook point and (1000, i, i, 0) at the other.

    So a batch tells where it came from. Parts have differing sizes.
    """

    def __init__(self, tokens: int, *, outliers: tuple[int, ...] = (), breaks_at: int | None = None) -> None:
        self.tokens, self.outliers, self.breaks_at = tokens, outliers, breaks_at
        self.made: list[int] = []

    def read(self, start: Any = None) -> Iterator[Part]:
        first = 0 if start is None else start["token"]
        while first < self.tokens:
            size = min(20 + first % 7, self.tokens - first)
            ids = torch.arange(first, first + size)
            if self.breaks_at is not None and first >= self.breaks_at:
                raise ValueError("data: a file is gone")
            x, y = torch.zeros(2, size, 4)
            x[:, 0], x[:, 1] = ids, 1000
            y[:, 0], y[:, 1], y[:, 2] = 1000, ids, ids
            for outlier in self.outliers:
                y[ids == outlier] *= 1e6
            tensors = {POINT: x, OTHER: y}
            norms = {point: tensor.norm(dim=1) for point, tensor in tensors.items()}
            where = torch.stack([ids // 10, ids % 10], 1)
            self.made.append(first)
            yield Part(tensors, norms, ids.int(), where.int(), {"token": first})
            first += size


def numbers(stream: ActivationStream, batch: int, tokens: int) -> list[list[int]]:
    """The tokens of each batch, after checking that all hook points have the same ones."""
    found = []
    for x in stream.batches(batch, tokens):
        ids = (x[POINT][:, 0] * stream.scale[POINT]).round().long()
        assert torch.equal((x[OTHER][:, 1] * stream.scale[OTHER]).round().long(), ids)
        found.append(ids.tolist())
    return found


def plain(window: int, **changes: Any) -> StreamConfig:
    return StreamConfig.model_validate({"window_tokens": window, "max_norm_multiple": None} | changes)


@pytest.mark.parametrize(("window", "batch"), [(64, 32), (64, 7), (300, 50), (64, 64), (64, 150), (5000, 100)])
def test_every_activation_is_served_once_and_windows_follow_the_text(window: int, batch: int) -> None:
    stream = ActivationStream(Numbers(1000), plain(window))
    batches = numbers(stream, batch, 10_000)
    assert [len(b) for b in batches[:-1]] == [batch] * (len(batches) - 1)
    served = [token for b in batches for token in b]
    assert sorted(served) == list(range(1000))
    assert batch >= window or served != sorted(served)
    for first in range(0, 1000, window):  # a window is the next `window` tokens, shuffled
        assert sorted(served[first : first + window]) == list(range(first, min(first + window, 1000)))


def test_a_window_is_shuffled_over_its_whole_size() -> None:
    first = numbers(ActivationStream(Numbers(3000), plain(1000)), 100, 100)[0]
    assert max(first) - min(first) > 800


def test_seed_and_window_decide_the_shuffle_and_ahead_does_not() -> None:
    first, same, other = (
        [
            t
            for b in numbers(ActivationStream(Numbers(1000), plain(200, prefetch_tokens=a), seed=s), 100, 1000)
            for t in b
        ]
        for s, a in ((0, 1), (0, 500), (1, 1))
    )
    assert first == same
    assert first != other
    assert [t % 200 for t in first[:200]] != [t % 200 for t in first[200:400]]


def test_the_stream_stops_at_the_tokens_asked_for() -> None:
    assert [len(b) for b in numbers(ActivationStream(Numbers(1000), plain(64)), 32, 100)] == [32, 32, 32, 4]


def test_the_last_window_ends_with_the_run() -> None:
    reader = Numbers(10**6)
    stream = ActivationStream(reader, plain(100, prefetch_tokens=1), tokens=250)
    served = [t for b in numbers(stream, 40, 250) for t in b]
    assert sorted(served) == list(range(250))
    assert max(reader.made) < 350  # and the reader stops with it


def test_outliers_at_one_hook_are_dropped_at_all_and_the_rest_has_unit_mean_square() -> None:
    stream = ActivationStream(Numbers(1000, outliers=(3, 500)), StreamConfig(window_tokens=2000))
    x = list(stream.batches(100, 10_000))
    for point in (POINT, OTHER):
        assert torch.cat([b[point] for b in x]).square().sum(1).mean().item() == pytest.approx(1, rel=1e-5)
    stream = ActivationStream(Numbers(1000, outliers=(3, 500)), StreamConfig(window_tokens=2000))
    served = [t for b in numbers(stream, 100, 10_000) for t in b]
    assert sorted(served) == [i for i in range(1000) if i not in (3, 500)]
    assert stream.dropped == 2
    assert stream.median_norm[POINT] == pytest.approx((500**2 + 1000**2) ** 0.5, rel=0.01)
    assert stream.median_norm[OTHER] == pytest.approx((2 * 500**2 + 1000**2) ** 0.5, rel=0.01)


def test_a_search_among_outliers_alone_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the model is replaced and all its activations exceed the limit, reading would never end."""
    for module in (reader, windows):
        monkeypatch.setattr(module, "CALIBRATION_TOKENS", 500)
    small = StreamConfig(window_tokens=200, max_norm_multiple=2)
    stream = ActivationStream(Numbers(10**7), small)
    state = stream.state_dict() | {
        "median_norm": {POINT.name: 1e-3, OTHER.name: 1e-3}, "scale": {POINT.name: 1.0, OTHER.name: 1.0},
    }  # fmt: skip
    stream.load_state_dict(state)
    with pytest.raises(
        ValueError, match=r"stream\.max_norm_multiple: got 2\.0, but ([\d,]+) of the last \1 tokens are"
    ):
        next(stream.batches(100, 100))
    few = ActivationStream(
        Numbers(10**4, outliers=range(3, 10**4, 5)), small.model_copy(update={"max_norm_multiple": 9})
    )
    assert len(next(few.batches(100, 100))[POINT]) == 100


def test_text_without_tokens_is_named() -> None:
    with pytest.raises(ValueError, match="no tokens other than"):
        ActivationStream(Numbers(0), StreamConfig()).scale  # noqa: B018


# Resuming


@pytest.mark.parametrize("window", [64, 90, 1000])
def test_resumed_equals_uninterrupted_at_every_batch(window: int) -> None:
    """Across windows, through outliers, and over the end of the text."""
    config = StreamConfig(window_tokens=window)

    def fresh() -> ActivationStream:
        return ActivationStream(Numbers(400, outliers=(5, 70, 71, 200)), config, tokens=396, seed=3)

    whole = fresh()
    uninterrupted, states = [], []
    for x in whole.batches(17, 10_000):
        uninterrupted.append(x)
        states.append(json.loads(json.dumps(whole.state_dict())))
    for done, state in enumerate(states, 1):
        stream = fresh()
        stream.load_state_dict(state)
        assert stream.state_dict() == state
        rest = list(stream.batches(17, 10_000))
        assert len(rest) == len(uninterrupted) - done
        for resumed, expected in zip(rest, uninterrupted[done:], strict=True):
            for point in (POINT, OTHER):
                assert torch.equal(resumed[point], expected[point])
        assert stream.dropped == 4


def test_a_state_holds_no_activations_and_resuming_reads_one_window_alone() -> None:
    stream = ActivationStream(Numbers(10_000), plain(100))
    batches = stream.batches(50, 10_000)
    for _ in range(151):
        next(batches)
    state = stream.state_dict()
    stream.close()
    assert len(json.dumps(state)) < 1000
    reader = Numbers(10_000)
    resumed = ActivationStream(reader, plain(100))
    resumed.load_state_dict(state)
    next(resumed.batches(50, 50))
    assert min(reader.made) > 7450


def test_the_state_of_known_features_is_the_generators() -> None:
    features = known_features(of_preset({"source": "synthetic", "preset": "tree", "d_in": 16, "parents": 2}))
    assert isinstance(features, KnownFeatures)
    whole = SyntheticStream(features, seed=1)
    expected, states = [], []
    for x in whole.batches(3000, 30_000):
        expected.append(x)
        states.append(whole.state_dict())
    for done in (1, 5, 9):
        stream = SyntheticStream(features, seed=1)
        stream.load_state_dict(states[done - 1])
        for x, y in zip(stream.batches(3000, 30_000 - 3000 * done), expected[done:], strict=True):
            assert all(torch.equal(x[point], y[point]) for point in x)


# The thread


def threads() -> Counter[str]:
    return Counter(thread.name for thread in threading.enumerate())


def wait_for(true: Any) -> None:
    deadline = time.monotonic() + 5
    while not true() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert true()


def test_the_reader_runs_ahead_and_no_further_than_the_bound() -> None:
    reader = Numbers(10**6)
    ahead = Ahead(reader.read, 100)
    wait_for(lambda: len(reader.made) >= 5)
    time.sleep(0.1)
    waiting = sum(map(len, ahead._waiting))
    assert 60 < waiting <= 100
    assert len(reader.made) == len(ahead._waiting) + 1  # one more is held by the thread
    taken = [ahead.take() for _ in range(50)]
    assert [part.position["token"] for part in taken if part] == reader.made[:50]
    ahead.close()
    assert ahead.take() is None


def test_a_part_larger_than_the_bound_passes() -> None:
    batches = numbers(ActivationStream(Numbers(100), plain(64, prefetch_tokens=1)), 10, 100)
    assert sorted(token for b in batches for token in b) == list(range(100))


def test_an_error_of_the_reader_surfaces_after_the_whole_windows_before_it() -> None:
    served: list[int] = []
    stream = ActivationStream(Numbers(10**6, breaks_at=450), plain(100))

    def serve() -> None:
        for x in stream.batches(10, 10**6):
            served.extend((x[POINT][:, 0] * stream.scale[POINT]).round().long().tolist())

    with pytest.raises(ValueError, match="a file is gone"):
        serve()
    assert sorted(served) == list(range(400))


def test_closing_and_forgetting_a_stream_end_its_threads() -> None:
    def ours() -> Counter[str]:
        return Counter({name: count for name, count in threads().items() if name.startswith("c2r")})

    before = ours()
    for end in ("close", "forget"):
        stream = ActivationStream(Numbers(10**6), plain(64))
        batches = stream.batches(10, 10**6)
        next(batches)
        assert ours() - before == Counter({"c2r reader": 1, "c2r batches": 1})
        if end == "close":
            stream.close()
            assert ours() == before
        del stream, batches
        wait_for(lambda: ours() == before)


def test_no_two_threads_read_at_once_and_close_waits_for_the_last() -> None:
    """Even if a consumer stopped while the reader was running."""

    class Slow(Numbers):
        inside = most = 0

        def read(self, start: Any = None) -> Iterator[Part]:
            for part in super().read(start):
                self.inside += 1
                self.most = max(self.most, self.inside)
                time.sleep(0.05)
                self.inside -= 1
                yield part

    reader = Slow(10**6)
    before = threads()["c2r reader"]
    stream = ActivationStream(reader, plain(64))
    for _ in range(3):
        for _ in stream.batches(10, 10**6):
            break
    stream.close()
    assert threads()["c2r reader"] == before
    assert reader.most == 1


def test_a_second_consumer_ends_the_first_and_loses_nothing() -> None:
    stream = ActivationStream(Numbers(1000), plain(64), seed=5)
    first = stream.batches(10, 10**6)
    served = [next(first)]
    second = stream.batches(10, 10**6)
    served.append(next(second))
    with pytest.raises(RuntimeError, match=r"batches\(\) was called again"):
        next(first)
    served.extend(second)
    expected = list(ActivationStream(Numbers(1000), plain(64), seed=5).batches(10, 10**6))
    assert all(torch.equal(x[POINT], y[POINT]) for x, y in zip(served, expected, strict=True))


def test_a_batch_that_could_not_be_delivered_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = ActivationStream(Numbers(200), plain(64))
    batches = stream.batches(10, 10**6)
    served = [x[POINT] for x in itertools.islice(batches, 3)]

    def failing(*_: Any) -> None:
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patched:
        patched.setattr(stream, "_scaled", failing)
        with pytest.raises(torch.OutOfMemoryError):
            next(batches)
    served += [x[POINT] for x in stream.batches(10, 10**6)]
    tokens = (torch.cat(served)[:, 0] * stream.scale[POINT]).round().long()
    assert sorted(tokens.tolist()) == list(range(200))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_rows_are_scaled_to_fp32_whatever_their_precision(dtype: torch.dtype) -> None:
    x = torch.randn(700, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    ids = torch.arange(700, dtype=torch.int32)
    part = Part({POINT: x}, {POINT: x.float().norm(dim=1)}, ids, torch.zeros(700, 2, dtype=torch.int32), None)

    class One:
        def read(self, start: Any = None) -> Iterator[Part]:
            yield part

    stream = ActivationStream(One(), plain(1000), seed=1)
    (found,) = (batch[POINT] for batch in stream.batches(1000, 1000))
    assert found.dtype == torch.float32
    expected = x.double() / stream.scale[POINT]
    torch.testing.assert_close(found.double().sort(0).values, expected.sort(0).values, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("close", [True, False])
def test_whoever_stops_asking_goes_on_after_the_last_batch_that_was_served(close: bool) -> None:
    """Although further batches were prepared, even from the next window."""
    served = []
    stream = ActivationStream(Numbers(1000), plain(64), seed=5)
    for number in range(40):
        for x in stream.batches(7, 10**6):
            served.append(x[POINT][:, 0])
            if number < 39:
                if close:
                    stream.close()
                break
    expected = ActivationStream(Numbers(1000), plain(64), seed=5).batches(7, 10**6)
    assert torch.equal(torch.cat(served), torch.cat([x[POINT][:, 0] for x in expected]))


@pytest.mark.parametrize("widened", ["made", "started"])
def test_a_thread_runs_only_once_its_owner_can_stop_it(widened: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal may arrive between any two lines; the stream must know every running thread to stop it."""
    known: list[bool] = []

    class Looking(Numbers):
        def read(self, start: Any = None) -> Iterator[Part]:
            known.append(stream._windows.reading is not None and stream._preparing is not None)
            yield from super().read(start)

    if widened == "made":  # pause after the object is created, before its owner has it
        made = Ahead.__init__

        def slowly(*given: Any, **more: Any) -> None:
            made(*given, **more)
            time.sleep(0.05)

        monkeypatch.setattr(Ahead, "__init__", slowly)
    else:
        begun = Ahead.start

        def slow_start(ahead: Ahead[Any]) -> None:
            begun(ahead)
            time.sleep(0.05)

        monkeypatch.setattr(Ahead, "start", slow_start)
    stream = ActivationStream(Looking(200), plain(64))
    assert len(list(stream.batches(10, 200))) == 20
    assert known == [True]


def test_what_is_stopped_before_it_begins_never_reads() -> None:
    reader = Numbers(200)
    ahead = Ahead(reader.read, 10, start=False)
    ahead.stop()
    ahead.start()
    assert ahead.take() is None
    ahead.close()
    stream = ActivationStream(reader, plain(64))
    assert stream._windows.stop() is None
    assert stream._windows._ahead().take() is None
    assert reader.made == []


@pytest.mark.usefixtures("interruptible")
def test_a_signal_at_the_start_of_a_thread_leaves_none_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    stream, begun = ActivationStream(Numbers(10**6), plain(64)), Ahead.start

    def interrupted(ahead: Ahead[Any]) -> None:
        begun(ahead)
        if ahead._thread.name == "c2r batches":
            signal.raise_signal(signal.SIGINT)

    before = threads()
    with monkeypatch.context() as patched:
        patched.setattr(Ahead, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            next(stream.batches(10, 10**6))
    wait_for(lambda: not threads() - before)
    assert len(list(itertools.islice(stream.batches(10, 10**6), 3))) == 3
    stream.close()


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_reaches_a_consumer_that_waits() -> None:
    class Slow(Numbers):
        def read(self, start: Any = None) -> Iterator[Part]:
            for part in super().read(start):
                signal.raise_signal(signal.SIGINT)
                time.sleep(3)
                yield part

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        next(ActivationStream(Slow(100), plain(64)).batches(10, 10))
    assert time.monotonic() - began < 2
