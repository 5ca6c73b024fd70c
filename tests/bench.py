"""Benchmarks: how readable the digits are, and how fast the training step is. No test depends on a number printed here.

    python tests/bench.py quality --ckpt out/ct/last.pt      share of generated glyphs that are the digit asked for
    python tests/bench.py speed                              images/s of the training step, share of the GEMM rate, memory
"""
import argparse
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import common  # noqa: E402
import ct  # noqa: E402


class Classifier(nn.Module):
    """A small convolutional network; `features` (B,128) also serve as the space of the Frechet distance."""
    def __init__(self, classes=10):
        super().__init__()
        def block(c_in, c_out):
            return nn.Sequential(nn.Conv2d(c_in, c_out, 3, padding=1), nn.BatchNorm2d(c_out), nn.ReLU())
        self.features = nn.Sequential(block(3, 32), block(32, 32), nn.MaxPool2d(2), block(32, 64), block(64, 64),
                                      nn.MaxPool2d(2), block(64, 128), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(128, classes)

    def forward(self, x):
        return self.head(self.features(x))


def load_glyphs(n, seed):
    images, labels = common.glyphs(n, seed)
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1, torch.from_numpy(labels)


def train_classifier(steps=1200, batch=128):
    """A classifier of glyphs it shares no image with the training set of the generators, and its accuracy on held-out ones."""
    torch.manual_seed(0)
    x, y = load_glyphs(30000, seed=1)
    net = Classifier()
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for _ in range(steps):
        i = torch.randint(len(x), (batch,))
        noisy = x[i] + 0.1 * torch.rand(batch, 1, 1, 1) * torch.randn_like(x[i])
        F.cross_entropy(net(noisy), y[i], label_smoothing=0.05).backward()
        optimizer.step(), optimizer.zero_grad(), schedule.step()
    net.eval()
    x, y = load_glyphs(10000, seed=2)
    return net, read(net, x, y), x


@torch.no_grad()
def read(classifier, x, y):
    """The share of images that the classifier reads as their label."""
    return torch.cat([classifier(part).argmax(1) for part in x.split(1000)]).eq(y).double().mean().item()


@torch.no_grad()
def frechet(classifier, a, b):
    """Frechet distance of two sets of images in the classifier's features: |m1-m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))."""
    (m1, s1), (m2, s2) = ((f.mean(0), f.T.cov()) for f in (torch.cat([classifier.features(p) for p in x.split(1000)]).double()
                                                           for x in (a, b)))
    roots = torch.linalg.eigvals(s1 @ s2).real.clamp(min=0).sqrt().sum()
    return ((m1 - m2).square().sum() + s1.trace() + s2.trace() - 2 * roots).item()


def quality(args):
    classifier, accuracy, real = train_classifier()
    print(f"classifier: {accuracy:.2%} of 10,000 held-out glyphs; Frechet distance between two halves of them "
          f"{frechet(classifier, real[:5000], real[5000:]):.3f}")
    net, _ = common.load_network(args.ckpt, "ct")
    net = common.place(net, argparse.Namespace(device=torch.device("cpu"), dtype=torch.float32))
    y = torch.arange(args.n) % 10
    for sigmas in ([80.0], [80.0, args.mid]):
        images = torch.cat([ct.sample(net, sigmas, y[i:i + 250], common.seeded_noise(range(i, i + 250), args.seed),
                                      (250, 3, 16, 16)) for i in range(0, args.n, 250)])
        print(f"{len(sigmas)} step(s) {sigmas}: {read(classifier, images, y):.1%} of {args.n} read as the label asked for, "
              f"Frechet distance {frechet(classifier, images, real):.3f}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("quality", help="how readable generated glyphs are")
    command.add_argument("--ckpt", default="out/ct/last.pt", help="a checkpoint trained on glyphs")
    command.add_argument("--n", type=int, default=2000, help="samples, a multiple of 250")
    command.add_argument("--mid", type=float, default=0.8, help="the second noise level of the two-step samples")
    command.add_argument("--seed", type=int, default=1, help="of the samples")
    command.set_defaults(run=quality)
    args = parser.parse_args()
    args.run(args)
