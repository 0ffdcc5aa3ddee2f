"""Pairs for a reader: which are picked, and the text around a latent's strongest tokens."""

import torch

from c2r.eval.bench import TextActivations
from c2r.eval.splitting import reading
from c2r.eval.splitting.cofiring import Cofiring
from c2r.eval.splitting.reading import pairs_to_read, snippets


class Letters:
    """Token 0 is a, 1 is b, …"""

    def decode(self, ids: list[int], **_: bool) -> str:
        return "".join(chr(97 + i) for i in ids)


def text(rows: list[int]) -> TextActivations:
    """Rows of these lengths; the n-th token is the n-th letter."""
    row = torch.cat([torch.full((length,), i) for i, length in enumerate(rows)])
    n = len(row)
    return TextActivations(torch.zeros(n, 1), torch.arange(n), row, torch.cat([torch.arange(k) for k in rows]))


def test_snippets_stay_within_their_row() -> None:
    cofiring = Cofiring(torch.eye(2))
    acts = torch.zeros(20, 2)
    acts[[5, 6, 19], 0] = torch.tensor([1.0, 3.0, 2.0])
    cofiring.add(acts)
    found = snippets(cofiring, 0, text([6, 10, 4]), Letters())
    assert found == [
        {"before": "", "token": "g", "after": "hijklm", "activation": 3.0},
        {"before": "qrs", "token": "t", "after": "", "activation": 2.0},
        {"before": "abcde", "token": "f", "after": "", "activation": 1.0},
    ]


def test_context_is_twelve_before_and_six_after() -> None:
    cofiring = Cofiring(torch.eye(2))
    acts = torch.zeros(25, 2)
    acts[15, 1] = 1.0
    cofiring.add(acts)
    (found,) = snippets(cofiring, 1, text([25]), Letters())
    assert (found["before"], found["token"], found["after"]) == ("defghijklmno", "p", "qrstuv")


def test_the_duplicate_comes_first_and_each_pair_once(monkeypatch) -> None:
    monkeypatch.setattr(reading, "PAIRS", 2)
    generator = torch.Generator().manual_seed(0)
    decoder = torch.randn(12, 6, generator=generator)
    acts = torch.relu(torch.randn(26, 12, generator=generator))
    decoder[9], acts[:, 9] = decoder[2], acts[:, 2]
    cofiring = Cofiring(decoder)
    cofiring.add(acts)
    found = pairs_to_read(cofiring, text([26]), Letters())
    assert sorted(found[0]["latents"]) == [2, 9]
    assert found[0]["among_highest"] == ["cosine", "phi"]
    assert found[0]["cosine"] > 0.999
    assert found[0]["jaccard"] == found[0]["p_j_given_i"] == found[0]["p_i_given_j"] == 1
    assert found[0]["densities"] == [(acts[:, 2] > 0).double().mean().item()] * 2
    assert found[0]["snippets"][0] == found[0]["snippets"][1]
    assert 2 <= len(found) <= 4
    assert len({frozenset(pair["latents"]) for pair in found}) == len(found)
    assert sum("cosine" in pair["among_highest"] for pair in found) == 2


def test_no_pairs_where_one_latent_lives() -> None:
    cofiring = Cofiring(torch.eye(3))
    cofiring.add(torch.tensor([[1.0, 0, 0]]))
    assert pairs_to_read(cofiring, text([1]), Letters()) == []
