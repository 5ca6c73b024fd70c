"""CTM's critics against notes of the reference: DiffAugment, taps, projections, heads, weights."""
import copy
import itertools
import math
import os
import socket
import sys
import time

import numpy as np
import pytest
import torch
from torch import nn

import ctm
from common import UserError
from util import VECTORS, close, img, tf32

WANTED = VECTORS["critic"]
EFFICIENTNET, DEIT = "tf_efficientnet_lite0", "deit_base_distilled_patch16_224"
BOTH = pytest.mark.parametrize("name", [EFFICIENTNET, DEIT])


def seeded(build, seed=0):
    torch.manual_seed(seed)
    return build()


def parametrized(module):
    return [layer for layer in module.modules() if nn.utils.parametrize.is_parametrized(layer)]


def convolutions(module):
    return [layer for layer in module.modules() if isinstance(layer, nn.Conv2d)]


def same_state(a, b):
    return all(torch.equal(value, b[key]) for key, value in a.items())


def upsampled(n, position):
    """(m,n): the weights of linear interpolation between n pixels at m positions."""
    return (1 - (position[:, None] - torch.arange(n)).abs()).clamp(0)


# ---- augmentation

def test_augment_vector():
    draws, x = WANTED["diffaug"], (torch.arange(216) / 100 - 1).view(2, 3, 6, 6)
    shift, hole = (torch.tensor([draws[f"{kind}_x"], draws[f"{kind}_y"]]).T
                   for kind in ("trans", "offset"))
    colours = [torch.tensor(draws[key]) for key in ("brightness", "saturation", "contrast")]
    y = ctm.augment(x, *colours, shift, hole)
    close(y[0, 0], sum(draws["y_b0_c0"], []))
    close(y[1, 2], sum(draws["y_b1_c2"], []))
    close(y.sum(), draws["sum"], 1e-5, 1e-5)


def clamped(first, side, size):
    """Pixels of a hole along one axis, by the reference's rule."""
    return np.unique(np.clip(np.arange(side) + first - side // 2, 0, size - 1))


@pytest.mark.parametrize("size", [16, 32])
def test_augment_pixel_by_pixel(size):
    rng, B = np.random.default_rng(size), 8
    reach, side = int(0.125 * size + 0.5), int(0.2 * size + 0.5)
    last = size - side % 2
    x = rng.uniform(-1, 1, (B, 3, size, size))
    colours = rng.uniform([-0.5, 0, 0.5], [0.5, 2, 1.5], (B, 3)).T
    shift, hole = rng.integers(-reach, reach + 1, (B, 2)), rng.integers(0, last + 1, (B, 2))
    shift[:2], hole[:2] = [[reach, -reach], [-reach, reach]], [[0, last], [last, 0]]
    found = ctm.augment(*(torch.tensor(value) for value in (x, *colours, shift, hole)))
    expected = np.zeros_like(x)
    for b in range(B):
        image = x[b] + colours[0, b]
        image = (image - image.mean(0)) * colours[1, b] + image.mean(0)
        image = (image - image.mean()) * colours[2, b] + image.mean()
        for i, j in itertools.product(range(size), repeat=2):
            row, column = i + shift[b, 0], j + shift[b, 1]
            if 0 <= row < size and 0 <= column < size:
                expected[b, :, i, j] = image[:, row, column]
        rows, columns = (clamped(hole[b, i], side, size) for i in (0, 1))
        expected[b][:, rows[:, None], columns] = 0
    close(found, expected, 1e-10, 1e-10)


@pytest.mark.parametrize("size, side", [(8, 2), (13, 3), (16, 3), (20, 4), (32, 6)])
def test_holes_at_all_places_are_the_references(size, side):
    places = list(itertools.product(range(size + 1 - side % 2), repeat=2))
    n = len(places)
    zeros, ones, still = torch.zeros(n), torch.ones(n), torch.zeros(n, 2, dtype=torch.long)
    white, places = torch.ones(n, 1, size, size), torch.tensor(places)
    found = ctm.augment(white, zeros, ones, ones, still, places)
    expected = torch.ones_like(found)
    for image, (i, j) in zip(expected.numpy(), places.tolist()):
        image[0][clamped(i, side, size)[:, None], clamped(j, side, size)] = 0
    assert torch.equal(found, expected)


def test_gradient_of_augment():
    colours = torch.tensor([[0.1, -0.2], [1.5, 0.5], [0.8, 1.2]]).double()
    places = torch.tensor([[[1, -1], [0, 2]], [[2, 3], [5, 0]]])
    x = img((2, 3, 6, 6)).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ctm.augment(x, *colours, *places), x)


@pytest.mark.parametrize("ranges", WANTED["aug_ranges"], ids=lambda ranges: str(ranges["size"]))
def test_random_draws(ranges, monkeypatch):
    """Each even on its range, both ends included, independent of the others and other images'."""
    B, size, r, end = 40_000, ranges["size"], ranges["shift"], ranges["offset_exclusive_hi"]
    monkeypatch.setattr(ctm, "augment", lambda x, *draws: draws)
    *colours, shift, hole = seeded(lambda: ctm.random_augment(torch.empty(B, 0, size, size)))
    for draw, low in zip(colours, (-0.5, 0.0, 0.5)):
        high = low + (2 if low == 0 else 1)
        assert draw.shape == (B,)
        assert low <= draw.min() < low + 0.001 and high - 0.001 < draw.max() <= high
        assert (torch.histc(draw, 10, low, high) / B - 0.1).abs().max() < 0.01
    for draw, low, high in ((shift, -r, r + 1), (hole, 0, end)):
        assert draw.shape == (B, 2) and draw.min() == low and draw.max() == high - 1
        for i in (0, 1):
            counts = torch.bincount(draw[:, i] - low, minlength=high - low)
            worst = (counts / B * (high - low) - 1).abs().max()
            assert worst < 6 * math.sqrt((high - low) / B)
    together = torch.corrcoef(torch.stack([*colours, *shift.T, *hole.T]))
    assert (together - torch.eye(7)).abs().max() < 0.03


def test_images_are_augmented_independently_and_gradient_flows():
    x = img((1, 3, 16, 16)).repeat(4, 1, 1, 1).requires_grad_()
    y = seeded(lambda: ctm.random_augment(x))
    assert all(not torch.equal(y[a], y[b]) for a, b in itertools.combinations(range(4), 2))
    y.sum().backward()
    assert (x.grad.flatten(1).abs().sum(1) > 0).all()


# ---- hinge loss

def test_hinge_loss_by_hand():
    real = torch.tensor([[2.0, 0.5], [-1.0, 0.9]], requires_grad=True)
    fake = torch.tensor([[-2.0, 0.0], [0.5, -0.25]], requires_grad=True)
    loss = ctm.hinge_loss(nn.Identity(), real, fake)
    close(loss.detach(), (0 + 0.5 + 2 + 0.1) / 4 + (0 + 1 + 1.5 + 0.75) / 4)
    loss.backward()
    close(real.grad, [0, -0.25, -0.25, -0.25])  # a step against it raises real logits
    close(fake.grad, [0, 0.25, 0.25, 0.25])


# ---- spectral norms, batch statistics

def half(*widths):
    """A layer of a head that halves the size."""
    return ctm.make_head([], widths, kernel_size=1)[0]


def small_critic(seed=0, size=16):
    return seeded(lambda: ctm.ConvCritic(size, width=8), seed).eval()


def test_power_iteration_advances_once_a_step_and_never_in_a_pass():
    critic, x = small_critic(), img((2, 3, 16, 16))
    before = copy.deepcopy(critic)
    critic(x).sum().backward()
    assert same_state(critic.state_dict(), before.state_dict())
    ctm.renew_norms(critic)
    assert not any(module.training for module in critic.modules())
    for layer, old in zip(parametrized(critic), parametrized(before), strict=True):
        W = layer.parametrizations.weight.original.detach().flatten(1)
        norm = layer.parametrizations.weight[0]
        u = torch.nn.functional.normalize(W @ old.parametrizations.weight[0]._v, dim=0)
        close(norm._u, u, 1e-4, 1e-5)
        close(norm._v, torch.nn.functional.normalize(W.T @ u, dim=0), 1e-4, 1e-5)


def test_spectral_norms_become_1():
    critic = seeded(lambda: nn.Sequential(ctm.ConvCritic(16, width=8), half(6, 5)))
    with torch.no_grad():
        for p in critic.parameters():
            p.mul_(3).add_(0.1)
    for _ in range(100):
        ctm.renew_norms(critic)
    assert convolutions(critic) == parametrized(critic) != []
    for layer in convolutions(critic):
        close(torch.linalg.svdvals(layer.weight.detach().flatten(1))[0], 1, 1e-4)


def test_heads_use_batch_statistics_in_eval_mode_too():
    block = seeded(lambda: half(3, 8)).eval()
    x, norm = img((4, 3, 16, 16), 0.5), block[1]
    wide = block[0](x).detach()
    deviation = (wide.var((0, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
    expected = (wide - wide.mean((0, 2, 3), True)) / deviation
    close(block(x).detach(), torch.where(expected > 0, expected, 0.2 * expected), 1e-4, 1e-5)
    assert block(x).shape == (4, 8, 8, 8)
    assert norm.weight.requires_grad and not list(norm.buffers())
    assert not any("running" in key for key in small_critic().state_dict())


# ---- the small critic

@pytest.mark.parametrize("size, logits", [(8, [16, 16, 4]), (16, [16] * 3), (32, [16] * 3),
                                          (64, [16] * 3)])
def test_conv_critic_judges_three_scales(size, logits, monkeypatch):
    critic, x, seen = small_critic(size=size), img((2, 3, size, size)), []
    monkeypatch.setattr(ctm, "random_augment", lambda x: x.flip(3))
    for head in critic.heads:
        head.register_forward_hook(lambda head, args, out: seen.append((args[0], out)))
    out = critic(x)
    assert out.shape == (2, sum(logits)) and [part[0].numel() for _, part in seen] == logits
    assert torch.equal(out, torch.cat([part for _, part in seen], 1))
    widths = [layer.out_channels for layer in convolutions(critic.heads[0])]
    assert widths == [8, 16, 32, 32, 32][:int(math.log2(size)) - 1] + [1]
    for scale, (shown, _) in enumerate(seen):
        n = 2**scale
        close(shown, x.flip(3).view(2, 3, size // n, n, size // n, n).mean((3, 5)))


def test_conv_critic_learns_a_shape():
    """Stripes lie or stand: told apart, whatever the colours; those of one kind are not."""
    def stripes(stand):
        bands = torch.sign(torch.sin(math.pi / 2 * (torch.arange(16) + 0.5))).view(1, 1, 16, 1)
        wave = torch.randn(16, 3, 1, 1) * bands
        return (0.5 * (wave if stand else wave.mT)).expand(16, 3, 16, 16)
    losses = []
    for other in (1, 0):
        critic, history = small_critic(1), []
        optimizer = torch.optim.RAdam(critic.heads.parameters(), 5e-3, betas=(0.5, 0.9))
        for _ in range(60):
            ctm.renew_norms(critic)
            loss = ctm.hinge_loss(critic, stripes(0), stripes(other))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.append(loss.item())
        losses.append(np.mean(history[-10:]))
    assert losses[0] < 1 and 1.8 < losses[1] < 2.2, losses  # found 0.8 and 2.0


def test_a_seed_is_a_critic_and_its_draws():
    x = img((2, 3, 16, 16))
    a, b, c = small_critic(), small_critic(), small_critic(1)
    assert same_state(a.state_dict(), b.state_dict())
    assert torch.equal(seeded(lambda: a(x)), seeded(lambda: b(x)))
    assert not torch.equal(seeded(lambda: a(x)), seeded(lambda: a(x), 1))
    assert not torch.equal(seeded(lambda: a(x)), seeded(lambda: c(x)))


@pytest.mark.parametrize("build", [small_critic, lambda: efficientnet_critic()],
                         ids=["conv", "projected"])
def test_generator_and_critic_get_gradient_in_turn(build):
    critic, x = build(), img((2, 3, 16, 16)).requires_grad_()
    critic.heads.requires_grad_(False)
    (-critic(x).mean()).backward()
    assert (x.grad.flatten(1).abs().sum(1) > 0).all()
    assert all(p.grad is None for p in critic.parameters())
    critic.heads.requires_grad_(True)
    ctm.hinge_loss(critic, x.detach(), 0.5 * x.detach().flip(2)).backward()
    assert all(p.grad.isfinite().all() for p in critic.heads.parameters())
    assert all(p.grad.any() for p in critic.heads.parameters() if p.ndim == 4)


# ---- the projected critic

@pytest.fixture(scope="module")
def projectors():
    """Both, random, with what they and their networks were shown and gave: {name: (it, seen)}."""
    pytest.importorskip("timm")
    found = {}
    for name in (EFFICIENTNET, DEIT):
        projector, seen = seeded(lambda: ctm.Projector(name, pretrained=False)), {}
        modules = {f"layer{i}_ccm": layer for i, layer in enumerate(projector.channels)}
        for key, module in (modules | dict(taps=projector.features[0])).items():
            def keep(module, args, out, key=key, seen=seen):
                seen[key] = args[0].detach(), out
            module.register_forward_hook(keep)
        seen["x"] = img((2, 3, 32, 32)).requires_grad_()
        seen["features"] = projector(seen["x"])
        found[name] = projector, seen
    return found


@BOTH
def test_shapes_along_the_way(name, projectors):
    _, seen = projectors[name]
    for key, shapes in WANTED[name]["ccm_in_out"].items():
        assert [list(value.shape) for value in seen[key]] == shapes, key
    shapes = [list(feature.shape) for feature in seen["features"]]
    assert shapes == list(WANTED[name]["features"].values())


@BOTH
def test_taps_are_those_of_the_whole_network(name, projectors):
    """EfficientNet after stages 1, 2, 4, 6; DeiT after blocks 2, 5, 8, 11, before the last norm,
    without class and distillation token."""
    import timm
    projector, seen = projectors[name]
    whole, outputs = timm.create_model(name).eval(), []
    features = projector.features[0].state_dict()
    state = {key.removeprefix("model."): value for key, value in features.items()}
    missing, unexpected = whole.load_state_dict(state, strict=False)
    ends = {"conv_head", "bn2", "classifier", "norm", "head", "head_dist"}
    assert not unexpected and {key.split(".")[0] for key in missing} <= ends
    for i in (1, 2, 4, 6) if name == EFFICIENTNET else (2, 5, 8, 11):
        whole.blocks[i].register_forward_hook(lambda module, args, out: outputs.append(out))
    shown, taps = seen["taps"]
    with torch.no_grad():
        whole.forward_features(shown[:1])
    for tap, output in zip(taps, outputs, strict=True):
        if name == DEIT:
            assert output.shape == (1, 198, 768)
            output = output[:, 2:].mT.reshape(1, 768, 14, 14)
        close(tap[:1].detach(), output, 1e-4, 1e-4)


@BOTH
def test_the_network_sees_normalised_images_of_224_pixels(name, projectors):
    _, seen = projectors[name]
    mean, std = (torch.tensor(WANTED[name]["norm"][key]).view(3, 1, 1) for key in ("mean", "std"))
    x = ((seen["x"].detach() + 1) / 2 - mean) / std
    position = ((torch.arange(224) + 0.5) * 32 / 224 - 0.5).clamp(0, 31)  # corners not aligned
    weights = upsampled(32, position)
    close(seen["taps"][0], weights @ x @ weights.T, 1e-4, 1e-4)


@pytest.mark.parametrize("size", [224, 256, 320])
def test_large_images_are_resized_too(size, projectors):
    """DeiT takes 224 pixels only."""
    projector, shown = copy.deepcopy(projectors[DEIT][0]), []
    projector.features = (lambda x: shown.append(x) or [torch.zeros(2, 768, 14, 14)] * 4,)
    features = projector(img((2, 3, size, size)))
    assert [feature.shape[-1] for feature in features] == [112, 56, 28, 14]
    assert shown[0].shape == (2, 3, 224, 224)


@BOTH
def test_projections_step_by_step(name, projectors):
    """From the taps: across channels, then from coarse to fine, by the weights alone."""
    projector, seen = projectors[name]
    state, F, coarse = projector.state_dict(), torch.nn.functional, 0
    for i in (3, 2, 1, 0):
        x = seen["taps"][1][i].detach()
        if name == DEIT:
            weight, bias = (state[f"reassemble.{i}.0.{kind}"] for kind in ("weight", "bias"))
            x = F.conv2d(x, weight, bias)
            weight, bias = (state.get(f"reassemble.{i}.1.{kind}") for kind in ("weight", "bias"))
            if i == 3:
                x = F.conv2d(x, weight, bias, 2, 1)
            elif i < 2:
                x = F.conv_transpose2d(x, weight, bias, [4, 2][i])
        x = torch.einsum("bchw,ic->bihw", x, state[f"channels.{i}.weight"][:, :, 0, 0])
        x = x + state[f"channels.{i}.bias"].view(-1, 1, 1) + coarse
        n = x.shape[-1]
        position = torch.arange(2 * n) * (n - 1) / (2 * n - 1)  # corners aligned
        weights = upsampled(n, position)
        large, mix = weights @ x @ weights.T, state[f"scales.{i}.weight"][:, :, 0, 0]
        coarse = torch.einsum("bchw,ic->bihw", large, mix)
        coarse = coarse + state[f"scales.{i}.bias"].view(-1, 1, 1)
        close(seen["features"][i].detach(), coarse, 1e-3, 1e-4)


@BOTH
def test_gradient_reaches_the_image_from_every_scale(name, projectors):
    """The coarsest alone, through the whole network, and the finest by its own tap."""
    _, seen = projectors[name]
    for i, target in ((3, seen["x"]), (0, seen["taps"][1][0])):
        loss = seen["features"][i].square().sum()
        gradient, = torch.autograd.grad(loss, target, retain_graph=True)
        assert (gradient.flatten(1).abs().sum(1) > 0).all()


@BOTH
def test_frozen_projections_are_saved_and_the_network_is_not(name, projectors):
    """Weights by the reference's names; its counts of projections, network and resampling."""
    projector, _ = projectors[name]
    state, wanted = projector.state_dict(), WANTED[name]
    names = {f"channels.{i}": f"layer{i}_ccm" for i in range(4)}
    names |= {f"scales.{i}": f"layer{i}_csm.out_conv" for i in range(4)}
    names |= {f"reassemble.{i}.{j}": f"layer{i + 1}.{j + 3}" for i in range(4) for j in range(2)}
    shapes, resampling = {}, 0
    for key, value in state.items():
        layer, _, kind = key.rpartition(".")
        shapes[f"{names[layer]}.{kind}"] = list(value.shape)
        resampling += value.numel() * layer.startswith("reassemble")
    assert shapes == wanted["scratch_weights"] | wanted.get("reassemble_weights", {})
    total = sum(value.numel() for value in state.values())
    assert total - resampling == wanted["n_params_scratch"]
    network = list(projector.features[0].parameters())
    unused = 2 * 769_000 + 1536 if name == DEIT else 0  # its classifiers and last norm
    total = sum(p.numel() for p in network) + resampling + unused
    assert total == wanted["n_params_backbone_module"]
    assert not any(p.requires_grad for p in (*projector.parameters(), *network))


def efficientnet_critic(seed=0):
    """A critic on EfficientNet alone, which is 30 times smaller than DeiT."""
    pytest.importorskip("timm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ctm.Projector, "TAPS", {EFFICIENTNET: ctm.Projector.TAPS[EFFICIENTNET]})
        return seeded(lambda: ctm.ProjectedCritic(16, pretrained=False), seed).eval()


def test_the_projected_critic_in_tf32():
    """Logits to 5% of their deviation, gradients to 0.3 radian: random weights amplify."""
    critic, found = efficientnet_critic(), []
    x = img((4, 3, 16, 16)).requires_grad_()

    def judge():
        logits = seeded(lambda: critic(x), 1)
        found.append((logits, torch.autograd.grad(logits.sum(), x)[0].flatten()))
    judge()
    with tf32():
        judge()
    (exact, gradient), (rounded, other) = found
    assert 0 < (rounded - exact).abs().max() < 0.05 * exact.std()
    assert torch.cosine_similarity(gradient, other, 0) > 0.955


def test_heads_of_the_projected_critic(projectors, monkeypatch):
    """Both networks see the image, augmented anew; head by head the reference's shapes, counts."""
    class Known(nn.Module):
        TAPS = ctm.Projector.TAPS

        def __init__(self, name, pretrained):
            super().__init__()
            self.name, self.pretrained = name, pretrained

        def forward(self, x):
            self.x = x
            return [feature.detach() for feature in projectors[self.name][1]["features"]]
    monkeypatch.setattr(ctm, "Projector", Known)
    critic, seen, maps = seeded(lambda: ctm.ProjectedCritic(32)).eval(), [], []
    built = [(projector.name, projector.pretrained) for projector in critic.projectors]
    assert built == [(EFFICIENTNET, True), (DEIT, True)]
    for head in critic.heads:
        head.register_forward_hook(lambda head, args, out: seen.append((args[0], out)))
        head[-2].register_forward_hook(lambda last, args, out: maps.append(out))
    x = img((2, 3, 32, 32))
    logits = critic(x)
    for n, (name, wanted) in enumerate((name, WANTED[name]) for name in (EFFICIENTNET, DEIT)):
        heads, calls = critic.heads[4 * n:4 * n + 4], seen[4 * n:4 * n + 4]
        assert sum(p.numel() for p in heads.parameters()) == wanted["n_params_disc"]
        for i, (head, (shown, out)) in enumerate(zip(heads, calls)):
            count = sum(p.numel() for p in head.parameters())
            assert count == wanted["n_params_head"][str(i)]
            layers = convolutions(head)
            shapes = [list(layer.weight.shape) for layer in layers]
            assert layers == parametrized(head) and shapes == wanted["head_convs"][str(i)]
            assert [layer.bias is None for layer in layers] == [False] * (4 - i) + [True]
            assert torch.equal(shown, projectors[name][1]["features"][i])
            assert list(maps[4 * n + i].shape) == wanted["head_logits"][str(i)]
        part = logits[:, 64 * n:64 * n + 64]
        assert list(part.shape) == wanted["logits"]
        assert torch.equal(part, torch.cat([out for _, out in calls], 1))
    assert logits.shape == (2, 128)
    views = [x, *(projector.x for projector in critic.projectors)]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(views, 2))


def test_only_heads_train_and_the_network_stays_in_eval_mode():
    critic, x = efficientnet_critic(), img((2, 3, 16, 16))
    network = critic.projectors[0].features[0]
    before = copy.deepcopy(network.state_dict())
    assert any("running_mean" in key for key in before)
    for name, p in critic.named_parameters():
        assert p.requires_grad == name.startswith("heads.")
    assert not any(key.startswith("projectors.0.features") for key in critic.state_dict())
    for prepare in (critic.train, lambda: ctm.renew_norms(critic)):
        prepare()
        critic(x)
        assert not any(module.training for module in network.modules())
        assert same_state(network.state_dict(), before)


def test_a_move_or_a_cast_reaches_the_network(monkeypatch):
    monkeypatch.setattr(ctm, "random_augment", lambda x: x)
    critic, x = efficientnet_critic(), img((2, 3, 16, 16))
    single, double = critic(x).detach(), copy.deepcopy(critic).double()(x.double()).detach()
    assert single.dtype == torch.float32 and double.dtype == torch.float64
    close(single, double, 1e-3, 1e-3)
    moved = copy.deepcopy(critic).to("meta")
    for module in (moved, moved.projectors[0].features[0]):
        assert all(value.is_meta for value in (*module.parameters(), *module.buffers()))
    assert not any(p.is_meta for p in critic.projectors[0].features[0].parameters())


def test_a_saved_critic_is_the_same_critic(tmp_path):
    """All but the pretrained network, which both have: here the first one's, as it is random."""
    x, first, same, other = img((2, 3, 16, 16)), *(efficientnet_critic(seed) for seed in (0, 0, 1))
    wanted = seeded(lambda: first(x))
    assert torch.equal(wanted, seeded(lambda: same(x)))
    other.projectors[0].features = first.projectors[0].features
    assert not torch.equal(wanted, seeded(lambda: other(x)))
    ctm.renew_norms(first)
    torch.save(first.state_dict(), tmp_path / "critic.pt")
    other.load_state_dict(torch.load(tmp_path / "critic.pt", weights_only=True))
    assert torch.equal(seeded(lambda: first(x)), seeded(lambda: other(x)))


# ---- timm and its weights

def test_weights_from_a_folder(tmp_path, monkeypatch):
    """Where torch.hub keeps its files, under the name they are published by."""
    timm = pytest.importorskip("timm")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    whole, folder = seeded(lambda: timm.create_model(EFFICIENTNET), 5), tmp_path / "hub/checkpoints"
    folder.mkdir(parents=True)
    torch.save(whole.state_dict(), folder / os.path.basename(whole.default_cfg["url"]))
    state = ctm.Projector(EFFICIENTNET).features[0].state_dict()
    assert same_state(state, whole.state_dict()) and len(state) > 200


@BOTH
def test_weights_that_cannot_be_had(name, tmp_path, monkeypatch):
    """One line, at once, that says which file to put where."""
    timm = pytest.importorskip("timm")

    def unknown(*args, **kwargs):
        raise socket.gaierror(-2, "Name or service not known")
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it tries again"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError) as caught:
        ctm.Projector(name)
    message, url = str(caught.value), timm.get_pretrained_cfg(name).url
    assert "\n" not in message
    for part in (f"weights of {name} ", "Name or service not known", os.path.basename(url),
                 f"{tmp_path}/hub/checkpoints", "choose another --disc"):
        assert part in message


def test_timm_is_missing_or_does_not_import(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "timm", None)
        with pytest.raises(UserError, match="pip install timm"):
            ctm.Projector(EFFICIENTNET)
    broken = "raise RuntimeError('operator torchvision::nms does not exist')"  # for another torch
    (tmp_path / "timm.py").write_text(broken)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    with pytest.raises(UserError, match="torchvision.*nms does not exist"):
        ctm.Projector(EFFICIENTNET)
