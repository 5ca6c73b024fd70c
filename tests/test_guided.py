"""Guided distillation: schedule, targets, samplers and losses against the closed forms of
Gaussian data."""
import argparse
import copy
import functools
import itertools
import json
import math

import pytest
import torch

import common
import guided_distill as gd
from util import TINY, close, fill, gauss, img

EDM = gd.edm_angle
Z = torch.linspace(-3, 3, 24, dtype=torch.float64).view(24, 1, 1, 1)
LABELS = torch.tensor([0, 3, 7, 9])


def cosine(tau):
    """The plain cosine schedule: exactly noise at 1, exactly data at 0."""
    return tau * math.pi / 2


ANGLES = {"cosine": cosine, "edm": EDM}
both_angles = pytest.mark.parametrize("angle", ANGLES.values(), ids=ANGLES)


def at(tau, like=Z):
    return torch.full((len(like),), float(tau), dtype=torch.float64)


def column(c):
    return c.view(-1, 1, 1, 1)


def waves(phi, like=Z):
    """alpha and sigma, to multiply `like`."""
    return column(phi.cos()).to(like.dtype), column(phi.sin()).to(like.dtype)


def gaussian_v(s, m=0.0, angle=cosine):
    """v(z, tau) of data N(m, s^2)."""
    def v(z, tau):
        alpha, sigma = waves(angle(tau), z)
        gain = alpha * sigma * (1 - s**2) / (alpha**2 * s**2 + sigma**2)
        return gain * (z - alpha * m) - sigma * m
    return v


def exact_v(angle, s, m, N, sampler):
    """The v whose DDIM jumps are the probability-flow ODE's, at the points and with the lengths
    of this student."""
    def v(z, tau):
        i = (tau * N).round() + (sampler == "encoder")
        phi, end = angle(tau), angle(gd.times_of(i, N, sampler)[2])
        V, V_end = (c.cos() ** 2 * s**2 + c.sin() ** 2 for c in (phi, end))
        z_end = column(end.cos()) * m + column((V_end / V).sqrt()) * (z - column(phi.cos()) * m)
        alpha, sigma = waves(phi - end)
        return (alpha * z - z_end) / sigma
    return v


def student_of(v, angle, N, sampler):
    """The ideal student: the target function itself, defined on the grid of N alone."""
    def student(z, tau):
        i = tau * N + (sampler == "encoder")
        assert (i - i.round()).abs().max() < 1e-9, "off its grid"
        assert (i.round() >= 1).all() and (i.round() <= N).all(), "off its grid"
        return gd.two_steps(v, angle, z, *gd.times_of(i.round(), N, sampler))
    return student


def tiny(offset=0.0, **more):
    return fill(common.UNet(**TINY | dict(classes=10) | more), offset)


# ---- schedule and parameterisation

def test_schedule():
    tau = torch.linspace(0, 1, 1001, dtype=torch.float64)
    phi, encoder = EDM(tau), EDM(tau, "encoder")
    close(phi[1000].tan(), 80.0, 1e-12)
    assert phi[0] == 0 and encoder[0] == gd.BOTTOM and (phi.diff() > 0).all()
    assert torch.equal(encoder[1:], phi[1:])
    close(encoder.tan()[0], 0.002, 1e-12)
    close(phi[1:].diff(), [(math.atan(80) - math.atan(0.002)) / 1000] * 999, 1e-9)
    logsnr = -2 * phi[1:].tan().log()
    assert logsnr.isfinite().all() and logsnr.max() < 12.43
    assert abs(logsnr.min() + 2 * math.log(80)) < 1e-9


def test_a_denoiser_read_as_v():
    """x, eps and v round trips; and v of a network is that of its denoised image, at the levels
    the network was trained for."""
    net, z = tiny(), img((4, 3, 16, 16))
    tau = torch.tensor([1e-3, 0.2, 0.7, 1.0], dtype=torch.float64)
    phi = EDM(tau)
    alpha, sigma = waves(phi, z)
    seen = []

    def D(x, t, y):
        seen.append(t)
        return common.denoise(net, x, t, y)

    with torch.no_grad():
        v = gd.edm_v(D, EDM)(z, tau, LABELS)
        x = common.denoise(net, z / alpha, phi.tan().float(), LABELS)
    close(seen[0], phi.tan(), 1e-6)
    close(alpha * z - sigma * v, x, 1e-5, 1e-5)
    eps = sigma * z + alpha * v
    close(alpha * x + sigma * eps, z, 1e-5, 1e-5)
    close(alpha * eps - sigma * x, v, 1e-4, 1e-4)


@both_angles
def test_ddim_of_gaussian_data(angle):
    """One step is a gain on what differs from the mean; onto phi = 0 it is the denoised image."""
    s, m = 0.6, 0.3
    v = gaussian_v(s, m, angle)
    for tau, end in ((1.0, 0.5), (0.7, 0.6), (0.3, 0.0), (0.2, 0.5)):
        (alpha, sigma), (alpha_end, sigma_end) = waves(angle(at(tau))), waves(angle(at(end)))
        gain = (alpha_end * alpha * s**2 + sigma_end * sigma) / (alpha**2 * s**2 + sigma**2)
        wanted = alpha_end * m + gain * (Z - alpha * m)
        close(gd.ddim(v, angle, Z, at(tau), at(end)), wanted, 1e-12, 1e-12)
    alpha, sigma = waves(angle(at(0.3)))
    posterior = m + alpha * s**2 / (alpha**2 * s**2 + sigma**2) * (Z - alpha * m)
    close(gd.ddim(v, angle, Z, at(0.3), at(0.0)), posterior, 1e-12, 1e-12)


def test_deviation_after_n_steps():
    """N steps keep the mean and give the known deviations."""
    m, steps = 0.4, (2, 4, 8, 16, 64)
    for s, deviations in ((1.0, (0.5, 0.728553, 0.856232, 0.925676, 0.980906)),
                          (0.5, (0.2, 0.33344, 0.41138, 0.45393, 0.48809)),
                          (2.0, (0.8, 1.33376, 1.6455, 1.81571, 1.95238))):
        for N, wanted in zip(steps, deviations, strict=True):
            z = gd.sample(gaussian_v(s, m), cosine, N, "D", Z)
            close((z[-1] - z[0]) / (Z[-1] - Z[0]), wanted, 2e-5)
            z = gd.sample(gaussian_v(s, m), cosine, N, "D", torch.zeros_like(Z))
            close(z.mean(), m, 1e-9)


# ---- weights

def test_weights_are_those_of_x():
    """The factor on the v error, times sigma^2 for the x error, is the named function of the
    SNR."""
    phi = EDM(torch.linspace(0.01, 1, 50, dtype=torch.float64))
    snr = phi.tan() ** -2
    for name, wanted in (("snr+1", snr + 1), ("trunc", snr.clamp(min=1))):
        close(gd.WEIGHTS[name](phi) / phi.sin() ** 2, wanted, 1e-9)
        assert gd.WEIGHTS[name](phi).min() >= 0.5 - 1e-12  # never 0, at tau = 1 least of all


def test_loss_by_hand():
    """x0 and noise mixed by cosine and sine, weight, mean square; the target without a
    gradient, 0 iff the student is the target."""
    x0, noise = img((3, 3, 8, 8)), gauss((3, 3, 8, 8), 3)
    tau = torch.tensor([0.1, 0.6, 1.0], dtype=torch.float64)
    a, b = (torch.tensor(value, requires_grad=True) for value in (0.7, 0.2))

    def loss_of(student, weight):
        return gd.loss_fn(lambda z, tau: student * z, lambda z, tau: b * z, EDM, x0, noise, tau,
                          weight)

    loss = loss_of(a, gd.WEIGHTS["trunc"])
    phi = EDM(tau)
    alpha, sigma = waves(phi, x0)
    z = alpha * x0 + sigma * noise
    weight = torch.maximum(phi.cos() ** 2, phi.sin() ** 2).float()
    close(loss, weight * (0.5 * z).square().mean((1, 2, 3)), 1e-5)
    loss.sum().backward()
    assert b.grad is None and a.grad > 0
    assert loss_of(b, torch.ones_like).max() == 0


# ---- guidance

def test_guided_gaussian():
    """Classes of equal deviation, guided, are the data N(m_w, s^2); w = 0 is the conditional
    model, w = -1 the unconditional."""
    s, m_c, m_0, tau = 0.5, 0.8, -0.1, at(0.4)
    v = lambda z, tau, y: gaussian_v(s, m_0 if y is None else m_c, EDM)(z, tau)
    for w in (0.0, 1.0, 4.0, -0.5, -1.0):
        wanted = gaussian_v(s, (1 + w) * m_c - w * m_0, EDM)(Z, tau)
        close(common.guide(v, 0, at(w))(Z, tau), wanted, 1e-10, 1e-10)
    close(common.guide(v, 0, at(-1))(Z, tau), v(Z, tau, None), 1e-15)
    assert torch.equal(common.guide(v, 0, at(0))(Z, tau), v(Z, tau, 0))
    mean = (v(Z, tau, 0) + v(Z, tau, None)) / 2
    close(common.guide(v, 0, at(-0.5))(Z, tau), mean, 1e-12, 1e-12)


def test_guided_different_deviations():
    """The unconditional model of classes m_c ~ N(m_0, r^2) is wider; guided, slope and offset
    are combined likewise."""
    s, r, m_c, m_0, w, tau = 0.5, 0.6, 0.8, -0.1, 1.7, at(0.6)
    cond, uncond = gaussian_v(s, m_c, EDM), gaussian_v(math.hypot(s, r), m_0, EDM)
    v = lambda z, tau, y: (uncond if y is None else cond)(z, tau)
    alpha, sigma = (c[0] for c in waves(EDM(tau)))
    A_c, A_0 = (alpha * q / (alpha**2 * q + sigma**2) for q in (s**2, s**2 + r**2))
    slope = (1 + w) * A_c - w * A_0
    offset = (1 + w) * (m_c - A_c * alpha * m_c) - w * (m_0 - A_0 * alpha * m_0)
    x = alpha * Z - sigma * common.guide(v, 0, at(w))(Z, tau)
    close(x, slope * Z + offset, 1e-10, 1e-10)


def test_a_student_begins_as_its_conditional_teacher():
    """To the last bit, at every w; and the branch of w has a gradient from the first step."""
    teacher, student = tiny(0.1, null=True), common.UNet(**TINY, classes=10, null=True, cond=True)
    student.load_state_dict(student.state_dict() | teacher.state_dict())
    z, y = img((4, 3, 16, 16)), LABELS
    tau = torch.tensor([0.01, 0.3, 0.8, 1.0], dtype=torch.float64)
    v_teacher, v_student = gd.edm_v(common.net_denoiser(teacher), EDM), gd.net_v(student, EDM)
    with torch.no_grad():
        for w in (0.0, 1.0, 4.0):
            assert torch.equal(v_student(z, tau, y, torch.full((4,), w)), v_teacher(z, tau, y))
        for w, wanted in ((0.0, y), (-1.0, None)):
            found = common.guide(v_teacher, y, torch.full((4,), w))(z, tau)
            assert torch.equal(found, v_teacher(z, tau, wanted))
    w = torch.tensor([0.0, 1.0, 2.0, 4.0])
    losses = gd.loss_fn(gd.conditioned(v_student, y, w), common.guide(v_teacher, y, w), EDM, z,
                        gauss(z.shape, 3), tau, torch.ones_like)
    losses.sum().backward()
    grads = [layer.weight.grad.abs().max() for name, layer in student.named_modules()
             if name.endswith("emb_layers_s.1")]
    assert grads and min(grads) > 0 and all(p.grad is None for p in teacher.parameters())


def test_the_embedding_of_w_tells_weights_apart():
    """A tenth apart they correlate, but not wholly; one apart, less."""
    e = common.sinusoidal_embedding(common.c_guidance(torch.tensor([2.0, 2.1, 3.0])), 32)
    near, far = (torch.cosine_similarity(e[0], e[k], dim=0) for k in (1, 2))
    assert 0.5 < near < 0.95 and far < near - 0.1


# ---- targets of stage 2

@both_angles
@pytest.mark.parametrize("sampler", ["D", "S", "encoder"])
def test_target_lands_where_the_teacher_does(angle, sampler):
    """One DDIM step of the target is two of the teacher; the paper's, the angle and the convex
    forms agree where they are defined."""
    if angle is EDM:
        angle = functools.partial(EDM, sampler=sampler)
    v, N = gaussian_v(0.6, 0.3, angle), 8
    for i in range(1, N + 1):
        tau, mid, end = gd.times_of(at(i), N, sampler)
        z_mid = gd.ddim(v, angle, Z, tau, mid)
        z_end = z_mid if sampler == "S" and i == 1 else gd.ddim(v, angle, z_mid, mid, end)
        found = gd.two_steps(v, angle, Z, tau, mid, end)
        close(gd.ddim(lambda z, tau: found, angle, Z, tau, end), z_end, 1e-12, 1e-12)
        if sampler != "D":
            continue
        p, p1, p2 = (angle(t)[0] for t in (tau, mid, end))
        x = p.cos() * Z - p.sin() * found
        close(x, (p.sin() * z_end - p2.sin() * Z) / (p - p2).sin(), 1e-10, 1e-10)
        r = p2.sin() / p.sin()
        close(x, (z_end - r * Z) / (p2.cos() - r * p.cos()), 1e-10, 1e-10)
        x1 = p.cos() * Z - p.sin() * v(Z, tau)
        x2 = p1.cos() * z_mid - p1.sin() * v(z_mid, mid)
        share = p2.sin() * (p - p1).sin() / (p1.sin() * (p - p2).sin())
        assert 0 <= share <= 1 and (share == 0) == (i == 1)
        close(x, share * x1 + (1 - share) * x2, 1e-10, 1e-10)
        if i == 1:
            close(x, x2, 1e-12, 1e-12)


def test_affine_target():
    """For an affine teacher, x = a z + b, the target is this affine function."""
    a, b = lambda tau: 0.4 + 0.3 * tau, lambda tau: 0.2 - 0.1 * tau

    def v(z, tau):
        alpha, sigma = waves(EDM(tau))
        return (alpha * z - column(a(tau)) * z - column(b(tau))) / sigma

    def step(tau, end):
        p, q = EDM(tau)[0], EDM(end)[0]
        M = q.cos() * a(tau)[0] + q.sin() / p.sin() * (1 - p.cos() * a(tau)[0])
        return M, (q.cos() - q.sin() * p.cos() / p.sin()) * b(tau)[0]

    tau, mid, end = gd.times_of(at(3), 4, "D")
    (M1, k1), (M2, k2) = step(tau, mid), step(mid, end)
    p, q = EDM(tau)[0], EDM(end)[0]
    r = q.sin() / p.sin()
    wanted = ((M2 * M1 - r) * Z + M2 * k1 + k2) / (q.cos() - r * p.cos())
    x = p.cos() * Z - p.sin() * gd.two_steps(v, EDM, Z, tau, mid, end)
    close(x, wanted, 1e-11, 1e-11)


def test_unit_gaussian_after_k_halvings():
    """v = (cos D - cos(d)^(2^K)) / sin D z; after the first, -tan(pi / 4N) / 2 z."""
    start, v = 64, gaussian_v(1.0)
    delta = math.pi / 2 / start
    for K in range(1, 6):
        N = start >> K
        v = student_of(v, cosine, N, "D")
        D = 2**K * delta
        wanted = (math.cos(D) - math.cos(delta) ** 2**K) / math.sin(D)
        if K == 1:
            close(wanted, -math.tan(math.pi / (4 * N)) / 2, 1e-10)
        for i in {1, max(N // 2, 1), N}:
            close(v(Z, at(i / N)) / Z, [wanted] * 24, 1e-10)


@pytest.mark.parametrize("s", [0.5, 2.0])
def test_target_of_an_exact_teacher(s):
    """x = m + (sqrt(V''/V) sigma - sigma'') / sin Delta (z - alpha m); in one step from pure
    noise, m + s z: the generator."""
    m = 0.3
    for N in (4, 1):
        v = student_of(exact_v(cosine, s, m, 2 * N, "D"), cosine, N, "D")
        for i in range(1, N + 1):
            p, q = i / N * math.pi / 2, (i - 1) / N * math.pi / 2
            V, V_end = (math.cos(c) ** 2 * s**2 + math.sin(c) ** 2 for c in (p, q))
            gain = (math.sqrt(V_end / V) * math.sin(p) - math.sin(q)) / math.sin(p - q)
            x = math.cos(p) * Z - math.sin(p) * v(Z, at(i / N))
            close(x, m + gain * (Z - math.cos(p) * m), 1e-10, 1e-10)
    close(gd.sample(v, cosine, 1, "D", Z), m + s * Z, 1e-10, 1e-10)


@both_angles
def test_students_end_where_the_first_teacher_does(angle):
    """Over all rounds from 64 steps, N steps of the ideal student are the first teacher's 64,
    from the same noise."""
    v = gaussian_v(0.6, 0.3, angle)
    wanted = gd.sample(v, angle, 64, "D", Z)
    for N in (32, 16, 8, 4, 2, 1):
        v = student_of(v, angle, N, "D")
        close(gd.sample(v, angle, N, "D", Z), wanted, 1e-10, 1e-10)


@both_angles
def test_stochastic_students(angle):
    """S(2N) at even points, without noise, is D(N); S(1) is D(1). Each asks of the one before
    only what that was trained for."""
    def students(sampler, N):
        v, found = gaussian_v(0.6, 0.3, angle), {}
        while N:
            v = found[N] = student_of(v, angle, N, sampler)
            N //= 2
        return found

    S, D = students("S", 16), students("D", 8)  # the teacher's 16 steps, both times
    for N in (8, 4, 2, 1):
        for i in range(1, N + 1):
            close(S[2 * N](Z, at(i / N)), D[N](Z, at(i / N)), 1e-10, 1e-10)
    close(S[1](Z, at(1)), D[1](Z, at(1)), 1e-10, 1e-10)


def test_what_a_round_asks_of_its_teacher():
    """By enumeration: every jump (from, to) that S(N) asks of S(2N) is one that S(2N) was
    trained to make; likewise D."""
    def times(N, sampler):
        i = torch.arange(1, N + 1, dtype=torch.float64)
        return [t.tolist() for t in gd.times_of(i, N, sampler)]

    for sampler, N in itertools.product(("D", "S", "encoder"), (1, 2, 4, 8)):
        tau, _, end = times(2 * N, sampler)
        jumps = set(zip(tau, end))
        for a, b, c in zip(*times(N, sampler)):
            assert (a, b) in jumps and (b == c or (b, c) in jumps), (sampler, N, a, b, c)


def test_single_jump_of_the_stochastic_student():
    """At i = 1 the target is the teacher's own prediction, to the last bit, and nothing is
    asked at tau = 0."""
    seen, teacher = [], gaussian_v(0.6, 0.3, EDM)

    def v(z, tau):
        seen.append(tau)
        return teacher(z, tau)

    z, tau = Z.float(), gd.times_of(at(1), 4, "S")
    assert torch.equal(gd.two_steps(v, EDM, z, *tau), teacher(z, tau[0]))
    assert len(seen) == 2 and all((t > 0).all() for t in seen)


@pytest.mark.parametrize("sampler", ["D", "S"])
@pytest.mark.parametrize("N", [4, 1024, 4096])
def test_float32_targets(sampler, N):
    """Against float64, for the finest steps and the last ones. The paper's form is off by 1e-3
    here."""
    v = gaussian_v(0.6, 0.3, EDM)
    for i in (1, 2, 3, N // 2, N):
        times = gd.times_of(at(i), N, sampler)
        exact, found = (gd.two_steps(v, EDM, z, *times) for z in (Z, Z.float()))
        assert found.dtype == torch.float32
        close(found, exact, 1e-5, 3e-6)


@torch.no_grad()
def test_float32_targets_of_a_network():
    """A denoiser's v at the least noise level is a difference divided by 0.003; its target
    still keeps four digits."""
    net, z = tiny(), img((4, 3, 16, 16)) + 0.001 * gauss((4, 3, 16, 16), 3)
    exact = copy.deepcopy(net).double()
    exact.dtype = torch.float64
    v_exact, v_net = (gd.conditioned(gd.net_v(n, EDM), torch.arange(4), None)
                      for n in (exact, net))
    for N, i in ((4096, 1), (4096, 2), (4096, 4096), (4, 1), (4, 4)):
        times = gd.times_of(at(i, z), N, "D")
        wanted = gd.two_steps(v_exact, EDM, z.double(), *times)
        far = (gd.two_steps(v_net, EDM, z, *times) - wanted).abs().max()
        assert far < 8e-5 * wanted.abs().max(), (N, i, far)


@pytest.mark.parametrize("angle", [cosine, functools.partial(EDM, sampler="encoder")],
                         ids=ANGLES)
def test_encoder_and_decoder(angle):
    """Up by an encoder's targets and down by a decoder's, of the exact ODE, is the identity;
    the start of the way up included."""
    s, m = 0.6, 0.3
    up, down = (exact_v(angle, s, m, 32, sampler) for sampler in ("encoder", "D"))
    for N in (16, 8, 4, 2, 1):
        up, down = student_of(up, angle, N, "encoder"), student_of(down, angle, N, "D")
        z = gd.sample(up, angle, N, "encoder", Z)
        close(gd.sample(down, angle, N, "D", z), Z, 1e-8, 1e-8)
        if angle is cosine:
            close(z, (Z - m) / s, 1e-8, 1e-8)


def test_a_toy_is_distilled():
    """Four clusters in the plane, their exact denoiser as teacher: 8, 4, 2 steps, after which
    two go where sixteen of the teacher do."""
    torch.manual_seed(0)
    centres = torch.tensor([[0.8, 0.8], [-0.8, 0.6], [0.2, -0.9], [-0.6, -0.7]])

    def D(x, t):
        V = t.square()[:, None] + 0.1**2
        distances = (x.flatten(1)[:, None] - centres).square().sum(2)  # (B,4)
        mean = torch.softmax(-distances / (2 * V), 1) @ centres
        return (mean + 0.1**2 / V * (x.flatten(1) - mean)).view_as(x)

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.Sequential(
                torch.nn.Linear(10, 96), torch.nn.SiLU(), torch.nn.Linear(96, 96), torch.nn.SiLU(),
                torch.nn.Linear(96, 2))

        def forward(self, z, tau):
            phases = EDM(tau).float()[:, None] * 2 ** torch.arange(4)
            return self.layers(torch.cat([z.flatten(1), phases.sin(), phases.cos()], 1)).view_as(z)

    z_1, teacher = torch.randn(1000, 2, 1, 1), gd.edm_v(D, EDM)
    wanted = gd.sample(teacher, EDM, 16, "D", z_1)
    before, net = teacher, Net()
    for N, steps in ((8, 1000), (4, 400), (2, 400)):
        optimizer = torch.optim.Adam(net.parameters())
        for k in range(steps):
            optimizer.param_groups[0]["lr"] = 4e-3 * (1 - k / steps)
            x0 = (centres[torch.randint(4, (256,))] + 0.1 * torch.randn(256, 2)).view(256, 2, 1, 1)
            tau, mid, end = gd.times_of(torch.randint(1, N + 1, (256,)).double(), N, "D")
            target = functools.partial(gd.two_steps, before, EDM, tau_mid=mid, tau_end=end)
            losses = gd.loss_fn(net, target, EDM, x0, torch.randn_like(x0), tau, torch.ones_like)
            optimizer.zero_grad()
            losses.mean().backward()
            optimizer.step()
        before = copy.deepcopy(net).requires_grad_(False)
    with torch.no_grad():
        distilled, teachers = (
            (gd.sample(v, EDM, 2, "D", z_1) - wanted).flatten(1).norm(dim=1).mean()
            for v in (net, teacher))
    assert distilled < 0.2 < 0.4 < teachers, (distilled, teachers)


# ---- samplers

def test_renoise():
    """From z at tau_k, mean and variance are those of z at tau_s, whatever x."""
    k, s = at(0.25), at(0.5)
    phi_k, phi_s = EDM(k)[0], EDM(s)[0]
    zero, one = torch.zeros_like(Z), torch.ones_like(Z)
    gain, noise = (gd.renoise(EDM, z, k, s, added)[0].item()
                   for z, added in ((one, zero), (zero, one)))
    close(gain * phi_k.cos(), phi_s.cos(), 1e-12)
    close(gain**2 * phi_k.sin() ** 2 + noise**2, phi_s.sin() ** 2, 1e-12)


def test_stochastic_steps_by_hand():
    """The sampler by hand for N = 4: where v is asked, and by which formula z goes on; N - 1
    draws of noise."""
    v, N, seen, draws = gaussian_v(0.6, 0.3, EDM), 4, [], []

    def watched(z, tau):
        seen.append(tau[0].item())
        return v(z, tau)

    def noise(z):
        draws.append(gauss(tuple(z.shape), len(draws)).double())
        return draws[-1]

    found = gd.sample(watched, EDM, N, "S", Z, noise)
    assert seen == [1.0, 0.75, 0.5, 0.25] and len(draws) == 3
    z = Z
    a, b = (lambda i: EDM(at(i / N)).cos()[0]), (lambda i: EDM(at(i / N)).sin()[0])
    for i, k, s in ((4, 2, 3), (3, 1, 2), (2, 0, 1)):
        x = a(i) * z - b(i) * v(z, at(i / N))
        z_k = a(k) * x + b(k) * (z - a(i) * x) / b(i)
        ratio = a(s) / a(k)
        z = ratio * z_k + (b(s) ** 2 - ratio**2 * b(k) ** 2).sqrt() * draws[4 - i]
    close(found, a(1) * z - b(1) * v(z, at(1 / N)), 1e-12, 1e-12)


@pytest.mark.parametrize("N", [1, 2, 4])
def test_stochastic_sampler_keeps_the_deviation(N):
    """Exact jumps, 1e5 samples: mean and deviation are the data's, at any N."""
    torch.manual_seed(0)
    z = torch.randn(100_000, 1, 1, 1, dtype=torch.float64)
    x = gd.sample(exact_v(cosine, 0.6, 0.3, N, "S"), cosine, N, "S", z)
    close(x.std(), 0.6, 0.01)
    close(x.mean(), 0.3, 0.03)


# ---- clipping

@both_angles
@pytest.mark.parametrize("sampler", ["D", "S"])
def test_clipped_steps_by_hand(angle, sampler):
    """x clipped to [-1, 1], the noise what z then holds beside it, DDIM's step with these two."""
    wild = lambda z, tau: -2 - z.sin()
    found = gd.sample(gd.clipped(wild, angle), angle, 4, sampler, Z, gauss_like)
    z, beyond = Z, 0
    for i in (4, 3, 2, 1):
        tau, tau_mid, tau_end = (at(k / 4) for k in (i, i - 1, max(i - 2, 0)))
        if sampler == "D":
            tau_end = tau_mid
        alpha, sigma = waves(angle(tau))
        x = alpha * z - sigma * wild(z, tau)
        beyond += (x.abs() > 1).any().item()
        x = x.clamp(-1, 1)
        epsilon = (z - alpha * x) / sigma
        alpha, sigma = waves(angle(tau_end))
        z = alpha * x + sigma * epsilon
        if sampler == "S" and i > 1:
            z = gd.renoise(angle, z, tau_end, tau_mid, gauss_like(z))
    assert beyond > 1
    close(found, z, 1e-10, 1e-10)
    close(found.abs().max(), 1.0, 1e-12)
    assert (gd.sample(wild, angle, 4, sampler, Z, gauss_like).abs() > 1.1).any()


def test_nothing_is_clipped_that_is_within():
    """Then v is what it was, and at the least level too there is nothing to divide by."""
    v = lambda z, tau: (waves(EDM(tau))[0] * z - 0.9 * z.sin()) / waves(EDM(tau))[1]  # x 0.9 sin z
    for tau in (1.0, 0.3, 1 / 1024, 1e-9):
        z = Z.clamp(-50, 50)
        close(gd.clipped(v, EDM)(z, at(tau)), v(z, at(tau)), 1e-9, 1e-9)
    close(gd.sample(gd.clipped(v, EDM), EDM, 8, "D", Z), gd.sample(v, EDM, 8, "D", Z), 1e-9, 1e-9)


def test_images_are_drawn_clipped_and_latents_are_not():
    v = lambda z, tau, y, w: -2 - z.sin()
    plain = lambda z, tau: v(z, tau, None, None)
    drawn = functools.partial(gd.draw, v, EDM, 4, "D", 0.0, torch.device("cpu"), None,
                              gauss_like, Z.shape)
    z = gauss_like(torch.zeros(Z.shape))
    close(drawn(), gd.sample(gd.clipped(plain, EDM), EDM, 4, "D", z))
    assert torch.equal(drawn(clip=False), gd.sample(plain, EDM, 4, "D", z))
    assert drawn().abs().max() < 1 + 1e-5 < drawn(clip=False).abs().max()


def gauss_like(z):
    return gauss(tuple(z.shape), 5).to(z.dtype)


@pytest.mark.parametrize("sampler", ["D", "S"])
def test_starting_midway(sampler):
    """From N of N steps it is plain sampling, from 0 the input."""
    v = gaussian_v(0.6, 0.3, EDM)
    run = functools.partial(gd.sample, v, EDM, 4, sampler, Z, gauss_like)
    assert torch.equal(run(start=4), run()) and torch.equal(run(start=0), Z)
    z = Z
    for i in (2, 1):
        k = max(i - 2, 0) if sampler == "S" else i - 1
        z = gd.ddim(v, EDM, z, at(i / 4), at(k / 4))
        if k < i - 1:
            z = gd.renoise(EDM, z, at(k / 4), at((i - 1) / 4), gauss_like(Z))
    close(run(start=2), z, 1e-12, 1e-12)


@pytest.mark.parametrize("sampler", ["D", "S"])
def test_pasting(sampler):
    """The known part is pasted after every step, at its level."""
    seen = []

    def paste(z, tau):
        seen.append(tau[0].item())
        return torch.where(column(torch.arange(24) % 2 > 0), z, 7.0)

    x = gd.sample(gaussian_v(0.6, 0.3, EDM), EDM, 4, sampler, Z, paste=paste)
    assert seen == [0.75, 0.5, 0.25, 0.0] and (x[::2] == 7).all() and (x[1::2] != 7).all()


# ---- the rounds

def test_plans():
    settings = dict(stage1_steps=10, round_steps=2, last_steps=5, start_N=32, end_N=1, w_max=4.0,
                    sampler="D")
    D = [(0, 10), (16, 2), (8, 2), (4, 5), (2, 5), (1, 5)]
    S = [(0, 10), (32, 2), (16, 2), (8, 2), (4, 5), (2, 5), (1, 1)]
    plain = dict(w_max=0.0, stage1_steps=0, end_N=2)
    assert gd.plan(settings) == D
    assert gd.plan(settings | dict(sampler="S")) == S
    assert gd.plan(settings | plain) == [(16, 2), (8, 2), (4, 2), (2, 5)]
    places = [(N, k, steps) for N, steps in D for k in range(steps)]
    assert [gd.round_of(step, D) for step in range(29)] == places


def test_true_v():
    """With it z is turned into x0 and noise; what is learned is E[v | z], here of data N(0, s^2):
    alpha sigma (1 - s^2) z / var z."""
    s, n = 0.5, 200_000
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, n, 1, 1, 1, generator=generator, dtype=torch.float64)
    x0 *= s
    tau = torch.full((n,), 0.3, dtype=torch.float64)
    phi = gd.edm_angle(tau[:1])
    alpha, sigma = phi.cos(), phi.sin()
    z = alpha * x0 + sigma * noise
    v = gd.true_v(x0, noise, gd.edm_angle)
    torch.testing.assert_close(alpha * z - sigma * v(z, tau), x0)
    torch.testing.assert_close(sigma * z + alpha * v(z, tau), noise)
    c = (alpha * sigma * (1 - s**2) / (alpha**2 * s**2 + sigma**2)).requires_grad_()
    losses = gd.loss_fn(lambda z, tau: c * z, v, gd.edm_angle, x0, noise, tau, torch.ones_like)
    slope, = torch.autograd.grad(losses.mean(), c)
    assert abs(slope.item()) < 0.02  # five standard errors


def test_recipes(tmp_path):
    """The published numbers; what each stage refuses is tested in test_guided_scripts.py."""
    def has(flags, **wanted):
        settings = gd.recipe(flags)
        assert {key: settings[key] for key in wanted} == wanted

    has(dict(dataset="cifar10", w_max=0.0), start_N=8192, batch_size=128, lr=5e-5, ema_decay=0.999,
        stage1_steps=0, round_steps=50_000, last_steps=100_000, weighting="trunc",
        total_steps=11 * 50_000 + 2 * 100_000)
    has(dict(dataset="imagenet64", w_max=0.0), start_N=1024, batch_size=2048, lr=1e-4,
        total_steps=600_000)
    has(dict(dataset="cifar10"), class_cond=True)
    has({}, w_max=4)
    latent = dict(teacher="diffusers:pipe", dataset="latents.npz")
    has(latent, w_min=2, ema_decay=0.999, total_steps=3000 + 6 * 2000 + 3 * 20_000)  # GD's text
    has(latent | dict(w_max=1.0), w_min=0)
    (tmp_path / "unet").mkdir()
    for classes, w_min in ((1000, 0), (None, 2)):
        (tmp_path / "unet" / "config.json").write_text(json.dumps(dict(num_class_embeds=classes)))
        has(latent | dict(teacher=f"diffusers:{tmp_path}"), w_min=w_min, w_max=14)
    has(latent | dict(w_max=0.0), w_min=0)
    has(latent | dict(stage="teacher"), label_dropout=0.1, weighting="snr+1", lr=1e-5)
    # An ideal teacher is made a network first of all.
    has(dict(dataset="bedroom256", teacher="ideal"), w_max=0, stage1_steps=50_000)
    has(dict(sampler="encoder", teacher="t.pt"), w_max=0, stage1_steps=0, sample_every=0)


def test_a_run_of_before_there_were_stages():
    args = dict(lr=1.0, total_steps=3, round_steps=1, out_dir="x")
    state = dict(script="guided_distill", args=args, model_args={}, data=None, step=1)
    new = argparse.Namespace(**args, stage="distill")
    common.check_resumable(new, state, "guided_distill", {}, None)
    new.stage = "teacher"
    with pytest.raises(common.UserError, match="--stage distill there, teacher now"):
        common.check_resumable(new, state, "guided_distill", {}, None)


def test_what_a_student_draws_with():
    """--N, --sampler and --w if they are given and fit, else the student's own and its least w."""
    def chosen(own, **given):
        args = argparse.Namespace(**dict(ckpt="x.pt", N=None, sampler=None, w=None) | given)
        student = argparse.Namespace(**dict(zip(("N", "sampler", "w_min", "w_max"), own)))
        gd.choose(args, student)
        return student.N, student.sampler, student.w

    assert chosen((4, "S", 2.0, 14.0)) == (4, "S", 2.0)
    assert chosen((4, "S", 2.0, 14.0), N=4, sampler="S", w=7.5) == (4, "S", 7.5)
    assert chosen((0, None, 1.0, 4.0)) == (64, "D", 1.0)
    assert chosen((0, None, 1.0, 4.0), N=3, sampler="S") == (3, "S", 1.0)
    assert chosen((4, "D", -1.0, 4.0)) == (4, "D", 0.0)
    assert chosen((0, None, -1.0, math.inf), w=-1.0) == (64, "D", -1.0)
    for own, given, message in (
            ((4, "D", 0.0, 4.0), dict(N=8), "--N 8: x.pt was trained for N 4"),
            ((4, "D", 0.0, 4.0), dict(sampler="S"), "trained for sampler D"),
            ((0, None, 0.0, 4.0), dict(sampler="encoder"), "applies to training only"),
            ((4, "D", 2.0, 4.0), dict(w=1.0), "--w 1: x.pt was trained for weights from 2 to 4"),
            ((4, "D", 0.0, 0.0), dict(w=1.0), "trained for weights from 0 to 0"),
            ((4, "D", -0.5, 4.0), dict(w=-1.0), "--w -1: x.pt was trained for weights from -0.5"),
            ((4, "D", 0.0, 4.0), dict(w=-0.5), "--w -0.5: x.pt was trained for weights from 0")):
        with pytest.raises(common.UserError, match=message):
            chosen(own, **given)
