"""Consistency distillation and its teacher: losses, guidance, continuous time and stop-gradients,
against vectors and closed forms."""
import argparse
import copy
import math
import types

import numpy as np
import pytest
import torch

import cd
import common
import ct
import guided_distill
from test_ct import Bent
from test_unet import reference_lpips
from util import (TINY, VECTORS, close, exact_derivative, fill, full, gauss, gaussian_denoiser,
                  gradient, img)

X0, NOISE, LABELS = img((4, 3, 16, 16)), gauss((4, 3, 16, 16), 5), torch.tensor([0, 3, 7, 9])
ONE, INVERSE = common.WEIGHTS["one"], common.WEIGHTS["inverse"]


def tiny(offset=0.0, **more):
    return fill(common.UNet(**TINY | dict(classes=10) | more), offset)


def double(net):
    """The net in float64, where a gradient has no rounding error to speak of."""
    net.dtype = torch.float64
    return net.double()


def slim(offset=0.0, **more):
    """One level, with attention: forward derivatives of group norms start slowly, for any shape."""
    return tiny(offset, mult=(1,), attention=(16,), **more)


def frozen_D(net):
    return common.net_denoiser(net.requires_grad_(False))


def column(v):
    return v.view(-1, 1, 1, 1)


def cd_loss(net, target, D, x0, noise, t_n, t_n1, weight=ONE):
    """Without labels and guidance, with Heun's solver and l2."""
    masks = common.dropout_masks(net, len(x0))
    return cd.loss_fn(net, target, D, x0, noise, t_n, t_n1, None, None, masks, common.heun_step,
                      common.l2, weight)


def assert_slopes(net, loss, places, step, rtol, atol=1e-6):
    """The gradients at (parameter, index) are those of finite differences of `loss`."""
    for p, i in places:
        values = []
        for change in (step, -2 * step):
            p.data[i] += change
            with torch.no_grad():
                values.append(loss().sum().item())
        p.data[i] += step
        close(p.grad[i], (values[0] - values[1]) / (2 * step), rtol, atol)


# ---- the loss

def reference_loss(dist, weight=ONE, dtype=torch.float32):
    """The networks of the reference, the loss of four images, and t_n1, t_n."""
    nets = tiny(0.0), tiny(0.05), tiny(0.1).requires_grad_(False)
    t, x0, noise = common.karras_times(40).flip(0).to(dtype), X0.to(dtype), NOISE.to(dtype)
    if dtype == torch.float64:
        nets = tuple(map(double, nets))
    net, target, teacher = nets
    i = torch.tensor([0, 10, 25, 38])  # the reference counts from t_max down
    close(t[i], VECTORS["cd_loss"]["t"])
    close(t[i + 1], VECTORS["cd_loss"]["t2"])
    D = common.net_denoiser(teacher)
    losses = cd.loss_fn(net, target, D, x0, noise, t[i + 1], t[i], LABELS, None, None,
                        common.heun_step, dist, weight)
    return nets, losses, t[i], t[i + 1]


@pytest.mark.parametrize("name, atol", [("l1", 2e-6), ("l2", 5e-10), ("lpips", 1e-8)])
def test_loss_vectors(name, atol, monkeypatch):
    """The last image's loss, at the smallest levels, is a difference of nearly equal numbers: 1e-7,
    known to 1e-9."""
    if name == "lpips":
        pytest.importorskip("lpips")
        dist, tolerance = reference_lpips(monkeypatch, "average"), 1e-4
    else:
        dist, tolerance = common.make_distance(name, "cpu"), 1e-5
    wanted = VECTORS["cd_loss"][name]
    (net, target, teacher), losses, _, _ = reference_loss(dist)
    close(losses, wanted["per_sample"], tolerance, atol)
    close(losses.mean(), wanted["mean"], tolerance)
    if "grad_norm_total" in wanted:
        if name == "l2":
            (net, target, teacher), losses, _, _ = reference_loss(dist, dtype=torch.float64)
        losses.mean().backward()
        close(gradient(net).norm(), wanted["grad_norm_total"], tolerance)
        for key, norm in wanted["grad_norm"].items():
            close(net.get_parameter(key).grad.norm(), norm, tolerance)
        for module in (target, teacher):
            assert all(p.grad is None for p in module.parameters())


def test_solver_vectors():
    """One Heun step of the teacher, at all noise levels, in one batch."""
    times, D = common.karras_times(40).flip(0), common.net_denoiser(tiny(0.1))
    t_n1, t_n = times[torch.tensor([[0, 10, 25, 38], [1, 11, 26, 39]])]
    with torch.no_grad():
        x = common.heun_step(common.guide(D, LABELS, None), X0 + column(t_n1) * NOISE, t_n1, t_n)
    close(x.flatten(1)[:, :4], VECTORS["cd_loss"]["x_t2_per_sample_first4"], 1e-5, 1e-6)


def test_weightings():
    _, plain, t_n1, t_n = reference_loss(common.l2)
    close(reference_loss(common.l2, INVERSE)[1], plain / (t_n1 - t_n))
    # which of the two times the reference weighs by
    close(plain / t_n1**2, VECTORS["cd_loss"]["l2_weight_snr"], 1e-4, 1e-10)


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_loss_by_hand(solver):
    """CM Alg. 2 written out anew, for both solvers, with guidance."""
    w = torch.tensor([0.0, 0.5, 2.0, 3.0])
    t_n1, t_n = torch.tensor([70.0, 5.0, 0.9, 0.1]), torch.tensor([60.0, 4.0, 0.7, 0.08])
    net, target = tiny(cond=True), tiny(0.05, cond=True)
    teacher, null = tiny(0.1, null=True), torch.full((4,), 10)
    losses = cd.loss_fn(net, target, common.net_denoiser(teacher), X0, NOISE, t_n, t_n1, LABELS, w,
                        None, cd.SOLVERS[solver], common.l2, ONE)

    def slope(x, t):
        D_y, D_null = (common.denoise(teacher, x, t, y) for y in (LABELS, null))
        return (x - (1 + column(w)) * D_y + column(w) * D_null) / column(t)
    with torch.no_grad():
        x = X0 + column(t_n1) * NOISE
        d = slope(x, t_n1)
        x_hat = x + column(t_n - t_n1) * d
        if solver == "heun":
            x_hat = x + column(t_n - t_n1) * (d + slope(x_hat, t_n)) / 2
        a = common.consistency(net, x, t_n1, LABELS, 25 * w)
        b = common.consistency(target, x_hat, t_n, LABELS, 25 * w)
        close(losses, (a - b).square().mean((1, 2, 3)), 1e-5)


def test_edm_loss_vectors():
    nvidia = VECTORS["edm_loss"]["nvlabs"]
    t = (-1.2 + 1.2 * gauss((4, 1, 1, 1), 7)).exp().flatten()
    close(t, nvidia["sigma"])

    def toy(x, c_noise, y, cond, masks):  # F = 0: D = c_skip x, their toy
        return torch.zeros_like(x)
    losses = common.edm_loss(toy, X0, NOISE, t, None)
    close(losses, nvidia["per_sample_mean"])
    close(losses * X0[0].numel(), nvidia["per_sample_sum"])
    losses = common.edm_loss(tiny(), X0, NOISE, torch.tensor([0.01, 0.3, 2.0, 40.0]), LABELS)
    close(losses, VECTORS["edm_loss"]["openai"]["mse"], 1e-5)


def test_edm_loss_gradient_by_finite_differences():
    net, t = tiny(), torch.tensor([0.05, 0.3, 2.0, 10.0])

    def loss():
        return common.edm_loss(net, X0, NOISE, t, LABELS)
    loss().sum().backward()
    assert_slopes(net, loss, [(net.out[2].bias, i) for i in range(3)], 1e-2, 2e-3)


def test_edm_loss_is_least_at_the_ideal_denoiser():
    """On four images no change of D by a factor or an offset lowers the loss (EDM App. B.3)."""
    torch.manual_seed(0)
    data = column(torch.tensor([-0.9, -0.2, 0.1, 0.7]))
    x0, noise = data[torch.randint(4, (40_000,))], torch.randn(40_000, 1, 1, 1)
    t = common.random_times(40_000, [-1.2, 1.2], "cpu")
    c_skip, c_out, c_in = map(column, common.edm_scalings(t))

    def loss(factor, offset):
        def F(x_in, c_noise, y, cond, masks):
            x = x_in / c_in
            D_x = factor * common.ideal_denoiser(data)(x, t) + offset
            return (D_x - c_skip * x) / c_out
        return common.edm_loss(F, x0, noise, t, None).mean().item()
    changes = (1.05, 0), (0.95, 0), (1, 0.02), (1, -0.02)
    assert min(loss(*change) for change in changes) > loss(1, 0)


def test_random_times():
    torch.manual_seed(0)
    ln_t = common.random_times(100_000, [-1.2, 1.2], "cpu").log()
    close([ln_t.mean(), ln_t.std()], [-1.2, 1.2], 0.02)
    t = common.random_times(100_000, ["uniform"], "cpu")
    assert common.T_MIN <= t.min() and t.max() <= common.T_MAX
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    u = (t.double() ** (1 / 7) - low) / (high - low)
    close(torch.histc(u.float(), 10, 0, 1) / 1e5, [0.1] * 10, 0.05)


# ---- guidance

@torch.no_grad()
def test_guided_denoiser():
    teacher, x, t = tiny(0.1, null=True), X0, torch.tensor([0.1, 0.5, 2.0, 30.0])
    D, w = common.net_denoiser(teacher), torch.tensor([0.5, 1.0, 2.0, 3.0])
    cond, uncond = D(x, t, LABELS), D(x, t, None)
    assert (cond - uncond).abs().max() > 0.01
    for weights, wanted in ((None, cond), (torch.zeros(4), cond), (-torch.ones(4), uncond)):
        assert torch.equal(common.guide(D, LABELS, weights)(x, t), wanted)
    close(common.guide(D, LABELS, w)(x, t), cond + column(w) * (cond - uncond), 1e-5, 1e-5)
    close(uncond, common.denoise(teacher, x, t, torch.full((4,), 10)), 1e-6)


def test_guided_mean_of_gaussian_classes():
    """For classes N(m_y, s^2) guidance moves the denoised mean along m_y minus the mean over
    classes, by a known factor."""
    means, s = torch.tensor([-0.5, 0.5]), 0.3
    x, t = column(torch.linspace(-2, 2, 9)), full(torch.zeros(9), 0.7)
    y, w = torch.arange(9) % 2, torch.full((9,), 1.5)

    def D(x, t, y):
        variance = s**2 + column(t) ** 2
        if y is not None:
            return column(means[y]) + (x - column(means[y])) * s**2 / variance
        p = torch.softmax(torch.stack([-(x - m) ** 2 / (2 * variance) for m in means]), 0)
        return sum(p[k] * (m + (x - m) * s**2 / variance) for k, m in enumerate(means))
    moved = common.guide(D, y, w)(x, t) - D(x, t, y)
    variance = s**2 + 0.49
    p = torch.sigmoid(x.flatten() * (means[1] - means[0]) / variance)  # posterior of class 1
    wanted = 1.5 * (1 - s**2 / variance) * (means[y] - (p * means[1] + (1 - p) * means[0]))
    close(moved, wanted, 1e-5, 1e-6)


@torch.no_grad()
def test_a_guided_student_begins_as_its_teacher():
    teacher, student = tiny(0.1, null=True), common.UNet(**TINY, classes=10, null=True, cond=True)
    student.load_state_dict(student.state_dict() | teacher.state_dict())
    t = torch.tensor([0.1, 0.5, 2.0, 30.0])
    for w in (0.0, 1.0, 4.0):
        D_x = common.denoise(student, X0, t, LABELS, common.c_guidance(full(t, w)))
        assert torch.equal(D_x, common.denoise(teacher, X0, t, LABELS))


def test_the_embedding_of_w_tells_weights_apart():
    """A tenth apart they correlate, but not wholly; one apart, less."""
    e = common.sinusoidal_embedding(common.c_guidance(torch.tensor([2.0, 2.1, 3.0])), 64)
    near, far = torch.cosine_similarity(e[:1], e[1:])
    assert 0.5 < near < 0.95 and far < near - 0.1


# ---- continuous time

def paths():
    t = torch.tensor([0.3, 1.0, 4.0, 40.0])
    return X0 + column(t) * NOISE, t


def exact_slope(net, x, t, v, y=None, masks=None):
    """df/dt of the consistency function, by forward derivatives."""
    def f(x, t):
        return common.consistency(net, x, t, y, None, masks)
    return torch.func.jvp(f, (x, t), (v, torch.ones_like(t)))[1]


def test_df_dt_is_the_derivative_of_the_consistency_function(monkeypatch):
    """That which the full objective squares: assembled from F and dF/dln t, to t_min."""
    monkeypatch.setattr(common, "network_derivative", exact_derivative)
    net, v = double(slim()), gauss(X0.shape, 9).double()
    t = torch.tensor([0.002, 0.3, 4.0, 80.0]).double()
    x = X0.double() + column(t) * NOISE.double()
    with torch.no_grad():
        loss = common.continuous_loss(net, x, t, v, LABELS, None, None, False)
        close(loss, exact_slope(net, x, t, v, LABELS).square().mean((1, 2, 3)), 1e-10)


def test_full_objective_and_its_gradient(monkeypatch):
    """|df/dt|^2 along the teacher's slope, and its gradient, which goes through df/dt."""
    monkeypatch.setattr(common, "network_derivative", exact_derivative)
    net, D = double(slim()), frozen_D(double(slim(0.1)))
    x, t = (value.double() for value in paths())

    def loss():
        return cd.continuous_loss(net, D, X0.double(), NOISE.double(), t, LABELS, None, None, False)
    v = (x - D(x, t, LABELS)) / column(t)
    df = exact_slope(net, x, t, v, LABELS)
    close(loss().detach(), df.square().mean((1, 2, 3)).detach(), 1e-6)
    loss().sum().backward()
    places = (net.out[2].bias, 0), (net.time_embed[0].bias, 3), (net.input_blocks[0][0].bias, 5)
    assert_slopes(net, loss, places, 1e-5, 1e-5, 1e-5 * gradient(net).abs().max().item())


def test_pseudo_objective_has_the_papers_gradient(monkeypatch):
    """2 f . sg(df/dt), the paper's formula, has another value than ours but the same gradient; the
    full objective has not."""
    monkeypatch.setattr(common, "network_derivative", exact_derivative)
    net, (x, t), D = slim(), paths(), frozen_D(slim(0.1))
    with torch.no_grad():
        v = (x - D(x, t, LABELS)) / column(t)
        df = exact_slope(net, x, t, v, LABELS)
    (2 * common.consistency(net, x, t, LABELS) * df).mean((1, 2, 3)).sum().backward()
    wanted = gradient(net)
    losses = {}
    for stop_gradient in (True, False):
        net.zero_grad()
        loss = cd.continuous_loss(net, D, X0, NOISE, t, LABELS, None, None, stop_gradient)
        loss.sum().backward()
        losses[stop_gradient] = loss.detach()
        off = (gradient(net) - wanted).norm() / wanted.norm()
        assert off < 1e-4 if stop_gradient else off > 0.1
    close(losses[True], losses[False], 1e-3)


class Smooth(torch.nn.Module):
    """F(x, t) = a(t) x + b(t), a and b smooth: sums of Gaussian bumps over ln t. It can be every f
    of Gaussian data."""
    def __init__(self, bumps=16, deviation=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.centres = torch.linspace(-7, 5, bumps)
        self.a = torch.nn.Parameter(deviation * torch.randn(bumps))
        self.b = torch.nn.Parameter(deviation * torch.randn(bumps))

    def forward(self, x, c_noise, y=None, cond=None, masks=None, dtype=None):
        bumps = (-(c_noise[:, None] / 250 - self.centres) ** 2 / 2).exp()
        return column(bumps @ self.a) * x + column(bumps @ self.b)


@pytest.mark.parametrize("stop_gradient", [True, False])
def test_discrete_gradient_tends_to_the_continuous_one(stop_gradient):
    """Theorems 3 and 5: the gradient of the discrete loss, per interval or its square, is off by
    O(1/N)."""
    net = Smooth(deviation=0.5).double()
    net.centres = net.centres.double()
    D = common.guide(lambda x, t, y: gaussian_denoiser(0.5)(x, t), None, None)
    x0, noise = gauss((64, 1, 2, 2), 1).double() / 2, gauss((64, 1, 2, 2), 2).double()
    middle = common.karras_times(66)[1:65].double()

    def D_y(x, t, y):
        return D(x, t)
    losses = cd.continuous_loss(net, D_y, x0, noise, middle, None, None, None, stop_gradient)
    losses.sum().backward()
    wanted, errors = gradient(net), []
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    for N in (400, 800):
        u = middle ** (1 / 7)
        t_n, t_n1 = (u - (high - low) / (N - 1)).clamp(min=low) ** 7, u**7
        net.zero_grad()
        if stop_gradient:
            cd_loss(net, net, D_y, x0, noise, t_n, t_n1, INVERSE).sum().backward()
        else:  # CM Alg. 2 with theta^- = theta, not stopped
            x_tn1 = x0 + column(t_n1) * noise
            x_tn = common.heun_step(D, x_tn1, t_n1, t_n)
            off = common.consistency(net, x_tn1, t_n1) - common.consistency(net, x_tn, t_n)
            (off.square().mean((1, 2, 3)) / (t_n1 - t_n) ** 2).sum().backward()
        errors.append(((gradient(net) - wanted).norm() / wanted.norm()).item())
    assert errors[0] < 0.15 and 1.7 < errors[0] / errors[1] < 2.4, errors


class Exact(torch.nn.Module):
    """A network whose consistency function is the exact one of data N(0, s^2)."""
    def __init__(self, s):
        super().__init__()
        self.s, self.one = s, torch.nn.Parameter(torch.ones(()))

    def forward(self, x_in, c_noise, y=None, cond=None, masks=None, dtype=None):
        t = (c_noise / 250).exp()
        c_skip, c_out, c_in = map(column, common.cm_scalings(t))
        x = x_in / c_in
        scale = ((self.s**2 + common.T_MIN**2) / (self.s**2 + t**2)).sqrt()
        return self.one * (x * column(scale) - c_skip * x) / c_out


@pytest.mark.parametrize("s", [0.3, 1.0])
def test_losses_vanish_at_the_exact_consistency_function(s):
    net, t, x0 = Exact(s), torch.tensor([0.1, 0.5, 3.0, 30.0]), s * X0

    def D(x, t, y):
        return gaussian_denoiser(s)(x, t)

    def wrong(x, t, y):
        return 0.9 * D(x, t, y)
    assert cd.continuous_loss(net, D, x0, NOISE, t, None, None, None, False).max() < 1e-6
    assert cd.continuous_loss(net, wrong, x0, NOISE, t, None, None, None, False).max() > 1e-3
    # the slope of one image is not the mean slope
    assert ct.continuous_loss(net, x0, NOISE, t, None, None)[:2].min() > 1e-3
    times, n = common.karras_times(200), torch.tensor([60, 90, 130, 190])
    assert cd_loss(net, net, D, x0, NOISE, times[n], times[n + 1]).max() < 1e-7


def test_continuous_training_has_the_gradient_of_continuous_distillation():
    """Theorem 6: on average, with the exact denoiser."""
    torch.manual_seed(0)
    n, data = 400_000, column(torch.tensor([-0.9, -0.2, 0.1, 0.7]))
    net, ideal = Bent(torch.full((n, 1, 1, 1), 0.8)), common.ideal_denoiser(data)
    x0, noise = data[torch.randint(4, (n,))], torch.randn(n, 1, 1, 1)
    t = common.random_times(n, [0.0, 1.0], "cpu")

    def D(x, t, y):
        return ideal(x, t)
    losses = (ct.continuous_loss(net, x0, noise, t, None, None),
              cd.continuous_loss(net, D, x0, noise, t, None, None, None, True))
    training, distillation = (torch.autograd.grad(loss.sum(), net.a)[0].flatten().double()
                              for loss in losses)
    gap = training - distillation
    error = gap.std() / math.sqrt(n)
    assert gap.mean().abs() < 4 * error and distillation.mean().abs() > 20 * error > 0


# ---- stop-gradients and dropout

def test_gradient_reaches_the_net_alone():
    """With mu = 0 the gradient is that of a frozen copy as target; none reaches a teacher that
    could take it."""
    t_n, t_n1 = torch.tensor([0.2, 0.4, 3.0, 20.0]), torch.tensor([0.3, 0.5, 4.0, 25.0])
    teacher, grads = tiny(0.1), []
    net, other = tiny(), tiny()
    for student, target in ((net, net), (tiny(), other)):
        losses = cd.loss_fn(student, target, common.net_denoiser(teacher), X0, NOISE, t_n, t_n1,
                            LABELS, None, None, common.heun_step, common.pseudo_huber, INVERSE)
        losses.sum().backward()
        grads.append(gradient(student))
    assert all(p.grad is None for module in (teacher, other) for p in module.parameters())
    assert grads[0].norm() > 0 and torch.equal(*grads)


def test_no_gradient_reaches_the_teacher_in_continuous_time():
    net, teacher, (_, t) = slim(), slim(0.1), paths()
    D = common.net_denoiser(teacher)
    for stop_gradient in (True, False):
        net.zero_grad()
        cd.continuous_loss(net, D, X0, NOISE, t, LABELS, None, None, stop_gradient).sum().backward()
        assert gradient(net).norm() > 0 and all(p.grad is None for p in teacher.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_continuous_loss_on_a_gpu(dtype, monkeypatch):
    """Value and gradient of the full objective, with fused attention and channels_last, are the
    CPU's."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    nets = slim(), slim().to("cuda", memory_format=torch.channels_last)
    nets[1].dtype, losses = dtype, []
    for net, device in zip(nets, ("cpu", "cuda")):
        x, t, v, y = (value.to(device) for value in (*paths(), gauss(X0.shape, 9), LABELS))
        losses.append(common.continuous_loss(net, x, t, v, y, None, None, False))
        losses[-1].sum().backward()
    close(losses[1].detach().cpu(), losses[0].detach(), 1e-3)
    wanted = gradient(nets[0])
    assert (gradient(nets[1]).cpu() - wanted).norm() < 1e-2 * wanted.norm()


def dropped(**more):
    return fill(common.UNet(**TINY | dict(mult=(1,), attention=(), dropout=0.5) | more))


def test_both_branches_drop_out_the_same_units():
    """A teacher whose step changes nothing and equal times: the loss is 0 if and only if the masks
    agree."""
    torch.manual_seed(0)
    net, t = dropped(), torch.tensor([0.5, 1.0, 2.0, 3.0])

    def still(x, t, y):
        return x
    for target in (net, copy.deepcopy(net)):
        assert cd_loss(net, target, still, X0, NOISE, t, t).max() < 1e-9
    with torch.no_grad():
        a, b = (common.consistency(net, X0, t, masks=common.dropout_masks(net, 4))
                for _ in range(2))
        assert common.l2(a, b).min() > 1e-4


def test_the_pseudo_objective_differentiates_the_branch_it_trains(monkeypatch):
    """df/dt and f drop out the same units."""
    monkeypatch.setattr(common, "network_derivative", exact_derivative)
    net, t = dropped(), torch.tensor([0.5, 1.0, 2.0, 3.0])
    torch.manual_seed(3)
    masks = common.dropout_masks(net, 4)
    ct.continuous_loss(net, X0, NOISE, t, None, masks).sum().backward()
    ours = gradient(net)
    net.zero_grad()
    x = X0 + column(t) * NOISE
    with torch.no_grad():
        df = exact_slope(net, x, t, NOISE, None, masks)
        other = exact_slope(net, x, t, NOISE, None, common.dropout_masks(net, 4))
    assert common.l2(df, other).min() > 1e-4
    f_net = common.consistency(net, x, t, masks=masks)
    (2 * f_net * df).mean((1, 2, 3)).sum().backward()
    assert (gradient(net) - ours).norm() < 1e-4 * ours.norm()


def test_a_loaded_teacher_drops_nothing_out(tmp_path):
    settings = TINY | dict(mult=(1,), dropout=0.5)
    state = fill(common.UNet(**settings)).state_dict()
    torch.save(dict(script="cd", args={}, model_args=settings, ema=state), tmp_path / "teacher.pt")
    teacher, _ = common.load_network(tmp_path / "teacher.pt", ("cd",))
    D, t = common.net_denoiser(teacher), torch.tensor([0.5, 1.0, 2.0, 3.0])
    D_x = D(X0, t, None)
    assert torch.equal(D(X0, t, None), D_x) and not D_x.requires_grad
    teacher.train()
    with pytest.raises(AssertionError, match="masks"):
        D(X0, t, None)


def test_the_ideal_denoiser_is_on_the_cpu_where_there_is_no_float64():
    """On mps; nothing is sent there."""
    data = common.ArrayImages([np.zeros((4, 8, 8, 3), np.uint8)], None, 8, "zeros")
    args = argparse.Namespace(teacher="ideal", class_cond=False, flip=True, dataset="zeros")
    run = types.SimpleNamespace(device=torch.device("mps"))
    D, classes = common.teacher_denoiser(args, run, None, data)
    assert classes == 0 and (D(torch.zeros(2, 3, 8, 8), torch.ones(2)) == -1).all()
    assert guided_distill.times_device(run.device).type == "cpu"
    assert guided_distill.times_device(torch.device("cuda", 1)) == torch.device("cuda", 1)


# ---- training to the exact solution

def fit(net, losses, lr, steps):
    """Minimise the mean of `losses`(), drawn anew each step."""
    optimizer = torch.optim.Adam(net.parameters(), lr, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        losses().mean().backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("objective, lr, steps, p_t", [
    ("discrete", 0.01, 800, [0.0, 2.0]), ("pseudo", 0.005, 800, [0.0, 2.0]),
    ("full", 0.03, 600, ["uniform"])])
def test_a_small_student_learns_the_exact_consistency_function(objective, lr, steps, p_t):
    """Data N(0.2, 0.4^2), its exact denoiser as teacher: f(x, t) = 0.2 + (x - 0.2)
    sqrt((s^2 + t_min^2) / (s^2 + t^2)).

    Seen errors, at worst over t and x within two deviations: 3%, 3% and 0.5% of the deviation.
    """
    torch.manual_seed(0)
    m, s = 0.2, 0.4
    net, times = Smooth(), common.karras_times(40)
    p = common.interval_probabilities(times, p_t)
    t = common.karras_times(50)[5:]
    x = m + (s**2 + t**2).sqrt() * torch.linspace(-2, 2, 45)[torch.randperm(45)]
    exact = m + (x - m) * ((s**2 + common.T_MIN**2) / (s**2 + t**2)).sqrt()

    def D(x, t, y):
        return m + gaussian_denoiser(s)(x - m, t)

    @torch.no_grad()
    def error():
        return (common.consistency(net, column(x), t).flatten() - exact).abs().max().item() / s

    def losses():
        x0, noise = m + s * torch.randn(256, 1, 1, 1), torch.randn(256, 1, 1, 1)
        if objective == "discrete":
            n = torch.multinomial(p, 256, replacement=True)
            return cd_loss(net, net, D, x0, noise, times[n], times[n + 1], INVERSE)
        levels = common.random_times(256, p_t, "cpu").clamp(common.T_MIN, common.T_MAX)
        return cd.continuous_loss(net, D, x0, noise, levels, None, None, None,
                                  objective == "pseudo")
    before = error()
    fit(net, losses, lr, steps)
    assert before > 0.5 and error() < 0.06, (before, error())


# ---- recipes

def test_recipes_are_the_papers():
    """CM Table 3 and EDM's training settings."""
    big = dict(batch_size=2048, mu=0.95, N=40, ema_decay=0.999943, total_steps=600_000,
               dist="lpips", solver="heun", weighting="one", dropout=0, p_t=["uniform"])
    lsun = dict(lr=1e-4, batch_size=2048, N=40)
    wanted = {
        ("distill", "cifar10"): big | dict(lr=4e-4, batch_size=512, mu=0, N=18, ema_decay=0.9999,
                                           total_steps=800_000),
        ("distill", "imagenet64"): big | dict(lr=8e-6),
        ("distill", "bedroom256"): big | dict(lr=1e-5),
        ("distill", "cat256"): big | dict(lr=1e-5),
        ("teacher", "cifar10"): dict(lr=1e-3, batch_size=512, dropout=0.13, ema_decay=0.99929,
                                     total_steps=400_000, N=18),
        ("teacher", "imagenet64"): dict(lr=1e-4, batch_size=4096, dropout=0.1, N=40,
                                        ema_decay=0.9999432),
        ("teacher", "bedroom256"): lsun | dict(total_steps=600_000),
        ("teacher", "cat256"): lsun | dict(total_steps=300_000),
    }
    for (stage, dataset), settings in wanted.items():
        recipe = cd.recipe(dict(stage=stage, dataset=dataset))
        if stage == "teacher":
            settings["p_t"] = [-1.2, 1.2]
        assert settings.items() <= recipe.items(), (stage, dataset)
        assert recipe["batch_size"] % recipe["micro_batch"] == 0
    imagenet = cd.recipe(dict(stage="teacher", dataset="imagenet64"))
    assert abs(imagenet["total_steps"] * 4096 / 2500e6 - 1) < 0.01
    for dataset in common.DATASETS:
        ramp = cd.recipe(dict(stage="teacher", dataset=dataset)).get("lr_ramp", 0)
        assert ramp == (10e6 if dataset in ("cifar10", "imagenet64") else 0)
    # EDM's half-lives, in images
    assert abs(0.5 ** (4096 / 50e6) - imagenet["ema_decay"]) < 1e-7
    assert abs(0.5 ** (512 / 0.5e6) - 0.99929) < 1e-6


@pytest.mark.parametrize("stop_gradient, lr", [(True, 5e-6), (False, 1e-3)])
def test_continuous_recipes_are_those_of_the_official_code(stop_gradient, lr):
    flags = dict(dataset="cifar10", objective="continuous", stop_gradient=stop_gradient)
    assert dict(lr=lr, dropout=0.3, p_t=["uniform"]).items() <= cd.recipe(flags).items()
    assert cd.recipe(flags | dict(dataset="glyphs"))["lr"] == 1e-4


@pytest.mark.parametrize("dataset, N, index", [
    ("cifar10", 18, 6), ("imagenet64", 40, 17), ("bedroom256", 40, 22)])
def test_two_step_levels_are_the_papers_time_points(dataset, N, index):
    """CM's published indices 11 of 17, 22 and 17 of 39 count from t_max."""
    wanted = [80.0, common.karras_times(N)[index].item()]
    close(cd.recipe(dict(dataset=dataset))["sigmas"], wanted)
