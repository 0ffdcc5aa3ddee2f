"""C²R in a training loop of your own: an L1 autoencoder in plain PyTorch, without C²R and with it.

    python examples/own_loop.py [--steps 1500] [--strength 0.3]

The activations are synthetic, with 112 known features in 96 dimensions: 16 parents with 4 children each, and 32
independent features. For the baseline and for C²R, the script prints the loss and the mean cosine of each decoder row
with its nearest other row, before and after training. About 25 seconds on one CPU core.
"""

import argparse

import torch
from torch.nn import functional as F

import c2r
from c2r.config.known_features import preset
from c2r.known_features.presets import known_features

BATCH, WIDTH, L1 = 512, 112, 0.03


def nearest_cosine(decoder: torch.Tensor) -> float:
    """Mean over latents of the cosine with the nearest other decoder row."""
    return c2r.nearest_neighbors(decoder.detach()).cosine.mean().item()


# --8<-- [start:loop]
def train(strength: float, steps: int) -> list[tuple[float, float]]:
    """Train one autoencoder; return (loss, mean nearest cosine) before and after."""
    torch.manual_seed(0)
    features, generator = known_features(preset("tree")), torch.Generator().manual_seed(0)
    scale = features.sample(4096, generator).x_BD.square().sum(1).mean().sqrt()  # so that the mean of ‖x‖² is 1
    decoder = torch.nn.Parameter(F.normalize(torch.randn(WIDTH, features.d_in), dim=1))  # [F, D]: one row per latent
    encoder = torch.nn.Parameter(0.1 * decoder.detach().clone())
    b_enc, b_dec = torch.nn.Parameter(torch.zeros(WIDTH)), torch.nn.Parameter(torch.zeros(features.d_in))
    optimizer = torch.optim.Adam([encoder, decoder, b_enc, b_dec], lr=3e-3)

    table = c2r.NeighborTable("lagged")  # nearest neighbours, kept up to date at little cost per step
    lam = c2r.lambda_of_strength(strength, batch=BATCH, width=WIDTH)
    history: list[tuple[float, float]] = []
    for step in range(steps):
        x = features.sample(BATCH, generator).x_BD / scale
        acts = F.relu(F.linear(x - b_dec, encoder, b_enc))  # [B, F]
        loss = (x - acts @ decoder - b_dec).square().sum(1).mean() + L1 * acts.sum(1).mean()
        neighbors = table.refresh(decoder).index  # [F]: j*(i), the latent whose decoder row is nearest to row i
        penalty = c2r.consistency_penalty(acts, decoder, neighbors=neighbors)
        if step in (0, steps - 1):
            history.append((loss.item(), nearest_cosine(decoder)))
        optimizer.zero_grad()
        (loss + lam * penalty).backward()
        optimizer.step()
        with torch.no_grad():
            decoder.copy_(F.normalize(decoder, dim=1))
    return history


# --8<-- [end:loop]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--strength", type=float, default=0.3, help="ρ, which does not depend on batch size and width")
    args = parser.parse_args()
    for name, strength in (("baseline", 0.0), (f"C²R, ρ = {args.strength}", args.strength)):
        (loss, cosine), (end_loss, end_cosine) = train(strength, args.steps)
        print(f"{name}: loss {loss:.3f} -> {end_loss:.3f}, nearest cosine {cosine:.3f} -> {end_cosine:.3f}")


if __name__ == "__main__":
    main()
