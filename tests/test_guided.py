"""Guided distillation: schedule, targets, samplers and losses against the closed forms of
Gaussian data."""

import argparse
import copy
import functools
import itertools
import math

import pytest
import torch

import common
import guided_distill as gd
from util import TINY, close, fill, gauss, img

COSINE = lambda tau: (
    tau * math.pi / 2
)  # the plain cosine schedule: exactly noise at 1, exactly data at 0
ANGLES = {"cosine": COSINE, "edm": gd.edm_angle}
Z = torch.linspace(-3, 3, 24, dtype=torch.float64).view(24, 1, 1, 1)


def at(tau, like=Z):
    return torch.full((len(like),), float(tau), dtype=torch.float64)


def column(c):
    return c.view(-1, 1, 1, 1)


def gaussian_v(s, m=0.0, angle=COSINE):
    """v(z, tau) of data N(m, s^2)."""

    def v(z, tau):
        phi = angle(tau)
        alpha, sigma = column(phi.cos()).to(z.dtype), column(phi.sin()).to(z.dtype)
        return (
            alpha * sigma * (1 - s**2) / (alpha**2 * s**2 + sigma**2) * (z - alpha * m) - sigma * m)

    return v


def exact_v(angle, s, m, N, sampler):
    """The v whose DDIM jumps are the probability-flow ODE's, at the points and with the lengths
    of this student."""

    def v(z, tau):
        i = (tau * N).round() + (sampler == "encoder")
        phi, end = angle(tau), angle(gd.times_of(i, N, sampler)[2])
        V, V_end = ((c.cos() ** 2 * s**2 + c.sin() ** 2) for c in (phi, end))
        z_end = column(end.cos()) * m + column((V_end / V).sqrt()) * (z - column(phi.cos()) * m)
        return (column((phi - end).cos()) * z - z_end) / column((phi - end).sin())

    return v


def student_of(v, angle, N, sampler):
    """The ideal student: the target function itself, defined on the grid of N alone."""

    def student(z, tau):
        i = tau * N + (sampler == "encoder")
        assert (
            (i - i.round()).abs().max() < 1e-9 and (i.round() >= 1).all() and (i.round() <= N).all()
        ), "off its grid"
        return gd.two_steps(v, angle, z, *gd.times_of(i.round(), N, sampler))

    return student


def tiny(offset=0.0, **more):
    return fill(common.UNet(**TINY | dict(classes=10) | more), offset)


# ---- schedule and parameterisation


def test_schedule():
    tau = torch.linspace(0, 1, 1001, dtype=torch.float64)
    phi = gd.edm_angle(tau)
    close(phi.tan()[[1000]], [80.0], 1e-12)
    assert phi[0] == 0 and gd.edm_angle(tau, "encoder")[0] == gd.BOTTOM and (phi.diff() > 0).all()
    close(gd.edm_angle(tau, "encoder").tan()[0], 0.002, 1e-12)
    close(phi[1:].diff(), [(math.atan(80) - math.atan(0.002)) / 1000] * 999, 1e-9)
    close(phi.cos() ** 2 + phi.sin() ** 2, torch.ones(1001), 1e-15)
    logsnr = -2 * phi[1:].tan().log()
    assert (
        logsnr.isfinite().all() and logsnr.max() < 12.43
        and abs(logsnr.min() + 2 * math.log(80)) < 1e-9)


def test_a_denoiser_read_as_v():
    """x, eps and v round trips; and v of a network is that of its denoised image, at the levels
    the network was trained for."""
    net, z, tau = (
        tiny(), img((4, 3, 16, 16)), torch.tensor([1e-3, 0.2, 0.7, 1.0], dtype=torch.float64))
    phi = gd.edm_angle(tau)
    alpha, sigma, y = (
        column(phi.cos()).float(), column(phi.sin()).float(), torch.tensor([0, 3, 7, 9]))
    seen = []

    def D(x, t, y):
        seen.append(t)
        return common.denoise(net, x, t, y)

    with torch.no_grad():
        v = gd.edm_v(D, gd.edm_angle)(z, tau, y)
        x = common.denoise(net, z / alpha, phi.tan().float(), y)
    close(seen[0], phi.tan(), 1e-6)
    close(alpha * z - sigma * v, x, 1e-5, 1e-5)
    eps = sigma * z + alpha * v
    close(alpha * x + sigma * eps, z, 1e-5, 1e-5)
    close(alpha * eps - sigma * x, v, 1e-4, 1e-4)


@pytest.mark.parametrize("name", ANGLES)
def test_ddim_of_gaussian_data(name):
    """One step is a gain; onto phi = 0 it is the denoised image; N steps keep the mean and give
    the known deviations."""
    angle, s, m = ANGLES[name], 0.6, 0.3
    v = gaussian_v(s, m, angle)
    for tau, end in ((1.0, 0.5), (0.7, 0.6), (0.3, 0.0), (0.2, 0.5)):
        phi, to = angle(at(tau)), angle(at(end))
        gain = (to.cos() * phi.cos() * s**2 + to.sin() * phi.sin()) / (
            phi.cos() ** 2 * s**2 + phi.sin() ** 2)
        wanted = column(to.cos()) * m + column(gain) * (Z - column(phi.cos()) * m)
        close(gd.ddim(v, angle, Z, at(tau), at(end)), wanted, 1e-12, 1e-12)
    phi = angle(at(0.3))
    posterior = m + column(phi.cos() * s**2 / (phi.cos() ** 2 * s**2 + phi.sin() ** 2)) * (
        Z - column(phi.cos()) * m)
    close(gd.ddim(v, angle, Z, at(0.3), at(0.0)), posterior, 1e-12, 1e-12)


DEVIATIONS = {
    1.0: {2: 0.5, 4: 0.728553, 8: 0.856232, 16: 0.925676, 64: 0.980906},
    0.5: {2: 0.2, 4: 0.33344, 8: 0.41138, 16: 0.45393, 64: 0.48809},
    2.0: {2: 0.8, 4: 1.33376, 8: 1.6455, 16: 1.81571, 64: 1.95238}}


@pytest.mark.parametrize("s", DEVIATIONS)
def test_deviation_after_n_steps(s):
    for N, wanted in DEVIATIONS[s].items():
        m = 0.4
        z = gd.sample(gaussian_v(s, m), COSINE, N, "D", Z)
        slope = (z[-1] - z[0]) / (Z[-1] - Z[0])
        close(slope, wanted, 2e-5)
        close(gd.sample(gaussian_v(s, m), COSINE, N, "D", torch.zeros_like(Z)).mean(), m, 1e-9)


# ---- weights


def test_weights_are_those_of_x():
    """The factor on the v error, times sigma^2 for the x error, is the named function of the
    SNR."""
    phi = gd.edm_angle(torch.linspace(0.01, 1, 50, dtype=torch.float64))
    snr = phi.tan() ** -2
    for name, wanted in (("snr+1", snr + 1), ("trunc", snr.clamp(min=1))):
        close(gd.WEIGHTS[name](phi) / phi.sin() ** 2, wanted, 1e-9)
        assert gd.WEIGHTS[name](phi).min() >= 0.5 - 1e-12  # never 0, at tau = 1 least of all


def test_loss_by_hand():
    """x0 and noise mixed by cosine and sine, weight, mean square; the target without a
    gradient, 0 iff the student is the target."""
    x0, noise, tau = (
        img((3, 3, 8, 8)), gauss((3, 3, 8, 8), 3),
        torch.tensor([0.1, 0.6, 1.0], dtype=torch.float64))
    a, b = (torch.tensor(value, requires_grad=True) for value in (0.7, 0.2))
    loss = gd.loss_fn(
        lambda z, tau: a * z, lambda z, tau: b * z, gd.edm_angle, x0, noise, tau,
        gd.WEIGHTS["trunc"])
    phi = gd.edm_angle(tau)
    z = column(phi.cos()).float() * x0 + column(phi.sin()).float() * noise
    close(
        loss,
        torch.maximum(phi.cos() ** 2, phi.sin() ** 2).float() * (0.5 * z).square().mean((1, 2, 3)),
        1e-5)
    loss.sum().backward()
    assert b.grad is None and a.grad > 0
    assert (
        gd.loss_fn(
            lambda z, tau: b * z, lambda z, tau: b * z, gd.edm_angle, x0, noise, tau,
            torch.ones_like).max()
        == 0
    )


# ---- guidance


def test_guided_gaussian():
    """Classes of equal deviation, guided, are the data N(m_w, s^2); w = 0 is the conditional
    model, w = -1 the unconditional."""
    s, m_c, m_0, tau = 0.5, 0.8, -0.1, at(0.4)
    v = lambda z, tau, y: gaussian_v(s, m_0 if y is None else m_c, gd.edm_angle)(z, tau)
    for w in (0.0, 1.0, 4.0, -1.0):
        found = common.guide(v, 0, torch.full((24,), w, dtype=torch.float64))(Z, tau)
        close(found, gaussian_v(s, (1 + w) * m_c - w * m_0, gd.edm_angle)(Z, tau), 1e-10, 1e-10)
    close(common.guide(v, 0, at(-1))(Z, tau), v(Z, tau, None), 1e-15)
    assert torch.equal(common.guide(v, 0, at(0))(Z, tau), v(Z, tau, 0))


def test_guided_different_deviations():
    """The unconditional model of classes m_c ~ N(m_0, r^2) is wider; guided, slope and offset
    are combined likewise."""
    s, r, m_c, m_0, w, angle = 0.5, 0.6, 0.8, -0.1, 1.7, gd.edm_angle
    v = lambda z, tau, y: gaussian_v(
        math.hypot(s, r) if y is None else s, m_0 if y is None else m_c, angle)(z, tau)
    phi = angle(at(0.6))
    alpha, sigma = phi.cos()[0], phi.sin()[0]
    A_c, A_0 = (alpha * q / (alpha**2 * q + sigma**2) for q in (s**2, s**2 + r**2))
    slope = (1 + w) * A_c - w * A_0
    offset = (1 + w) * (m_c - A_c * alpha * m_c) - w * (m_0 - A_0 * alpha * m_0)
    close(
        alpha * Z - sigma * common.guide(v, 0, at(w))(Z, at(0.6)), slope * Z + offset, 1e-10, 1e-10)


def test_a_student_begins_as_its_conditional_teacher():
    """To the last bit, at every w; and the branch of w has a gradient from the first step."""
    teacher, student = tiny(0.1, null=True), common.UNet(**TINY, classes=10, null=True, cond=True)
    student.load_state_dict(student.state_dict() | teacher.state_dict())
    z, tau, y = (
        img((4, 3, 16, 16)), torch.tensor([0.01, 0.3, 0.8, 1.0], dtype=torch.float64),
        torch.tensor([0, 3, 7, 9]))
    v_teacher, v_student = (
        gd.edm_v(common.net_denoiser(teacher), gd.edm_angle), gd.net_v(student, gd.edm_angle))
    with torch.no_grad():
        for w in (0.0, 1.0, 4.0):
            assert torch.equal(v_student(z, tau, y, torch.full((4,), w)), v_teacher(z, tau, y))
        w0, minus = torch.zeros(4), -torch.ones(4)
        assert torch.equal(common.guide(v_teacher, y, w0)(z, tau), v_teacher(z, tau, y))
        assert torch.equal(common.guide(v_teacher, y, minus)(z, tau), v_teacher(z, tau, None))
    w = torch.tensor([0.0, 1.0, 2.0, 4.0])
    gd.loss_fn(
        lambda z, tau: v_student(z, tau, y, w), common.guide(v_teacher, y, w), gd.edm_angle, z,
        gauss(z.shape, 3), tau, torch.ones_like).sum().backward()
    grads = [
        layer.weight.grad.abs().max() for name, layer in student.named_modules()
        if name.endswith("emb_layers_s.1")]
    assert grads and min(grads) > 0 and all(p.grad is None for p in teacher.parameters())


def test_the_embedding_of_w_tells_weights_apart():
    """A tenth apart they correlate, but not wholly; one apart, less."""
    e = common.sinusoidal_embedding(common.c_guidance(torch.tensor([2.0, 2.1, 3.0])), 32)
    near, far = (
        torch.cosine_similarity(e[0], e[1], dim=0), torch.cosine_similarity(e[0], e[2], dim=0))
    assert 0.5 < near < 0.95 and far < near - 0.1


# ---- targets of stage 2


@pytest.mark.parametrize("angle", ANGLES.values(), ids=ANGLES)
@pytest.mark.parametrize("sampler", ["D", "S", "encoder"])
def test_target_lands_where_the_teacher_does(angle, sampler):
    """One DDIM step of the target is two of the teacher; the paper's, the angle and the convex
    forms agree where they are defined."""
    angle = (
        functools.partial(angle, sampler="encoder") if sampler == "encoder" and angle is gd.edm_angle
        else angle)
    v, N = gaussian_v(0.6, 0.3, angle), 8
    for i in range(1, N + 1):
        tau, mid, end = gd.times_of(at(i), N, sampler)
        z_mid = gd.ddim(v, angle, Z, tau, mid)
        z_end = z_mid if sampler == "S" and i == 1 else gd.ddim(v, angle, z_mid, mid, end)
        found = gd.two_steps(v, angle, Z, tau, mid, end)
        close(gd.ddim(lambda z, tau: found, angle, Z, tau, end), z_end, 1e-12, 1e-12)
        if sampler == "D":
            p, p1, p2 = (angle(t)[0] for t in (tau, mid, end))
            x = p.cos() * Z - p.sin() * found
            close(x, (p.sin() * z_end - p2.sin() * Z) / (p - p2).sin(), 1e-10, 1e-10)
            r = p2.sin() / p.sin()
            close(x, (z_end - r * Z) / (p2.cos() - r * p.cos()), 1e-10, 1e-10)
            x1, x2 = p.cos() * Z - p.sin() * v(Z, tau), p1.cos() * z_mid - p1.sin() * v(z_mid, mid)
            share = p2.sin() * (p - p1).sin() / (p1.sin() * (p - p2).sin())
            assert 0 <= share <= 1 and share == 0 if i == 1 else share > 0
            close(x, share * x1 + (1 - share) * x2, 1e-10, 1e-10)
            if i == 1:
                close(x, x2, 1e-12, 1e-12)


def test_affine_target():
    """For an affine teacher the target is this affine function."""
    angle, N, i = gd.edm_angle, 4, 3
    a, b = lambda tau: 0.4 + 0.3 * tau, lambda tau: 0.2 - 0.1 * tau  # x = a z + b

    def v(z, tau):
        phi = angle(tau)
        return (column(phi.cos()) * z - column(a(tau)) * z - column(b(tau))) / column(phi.sin())

    def step(tau, end):
        p, q = angle(tau)[0], angle(end)[0]
        M = q.cos() * a(tau)[0] + q.sin() / p.sin() * (1 - p.cos() * a(tau)[0])
        return M, (q.cos() - q.sin() * p.cos() / p.sin()) * b(tau)[0]

    tau, mid, end = gd.times_of(at(i), N, "D")
    (M1, k1), (M2, k2) = step(tau, mid), step(mid, end)
    p, q = angle(tau)[0], angle(end)[0]
    r = q.sin() / p.sin()
    wanted = ((M2 * M1 - r) * Z + M2 * k1 + k2) / (q.cos() - r * p.cos())
    close(p.cos() * Z - p.sin() * gd.two_steps(v, angle, Z, tau, mid, end), wanted, 1e-11, 1e-11)


def test_unit_gaussian_after_k_halvings():
    """v = (cos D - cos(d)^(2^K)) / sin D z; after the first, -tan(pi / 4N) / 2 z."""
    start, v = 64, gaussian_v(1.0)
    for K in range(1, 6):
        N = start >> K
        v = student_of(v, COSINE, N, "D")
        delta = math.pi / 2 / start
        D = 2**K * delta
        for i in (1, N // 2, N):
            if i:
                found = v(Z, at(i / N)) / Z
                close(found, [(math.cos(D) - math.cos(delta) ** 2**K) / math.sin(D)] * 24, 1e-10)
                if K == 1:
                    close(found, [-math.tan(math.pi / (4 * N)) / 2] * 24, 1e-10)


@pytest.mark.parametrize("s", [0.5, 2.0])
def test_target_of_an_exact_teacher(s):
    """x = m + (sqrt(V''/V) sigma - sigma'') / sin Delta (z - alpha m); in one step from pure
    noise, m + s z: the generator."""
    N, m = 4, 0.3
    for sampler, n in (("D", N), ("D", 1)):
        v = student_of(exact_v(COSINE, s, m, 2 * n, "D"), COSINE, n, sampler)
        for i in range(1, n + 1):
            p, q = i / n * math.pi / 2, (i - 1) / n * math.pi / 2
            V, V_end = (math.cos(c) ** 2 * s**2 + math.sin(c) ** 2 for c in (p, q))
            wanted = m + (math.sqrt(V_end / V) * math.sin(p) - math.sin(q)) / math.sin(p - q) * (
                Z - math.cos(p) * m)
            close(math.cos(p) * Z - math.sin(p) * v(Z, at(i / n)), wanted, 1e-10, 1e-10)
    close(gd.sample(v, COSINE, 1, "D", Z), m + s * Z, 1e-10, 1e-10)


@pytest.mark.parametrize("angle", ANGLES.values(), ids=ANGLES)
def test_students_end_where_the_first_teacher_does(angle):
    """Over all rounds from 64 steps, N steps of the ideal student are the first teacher's 64,
    from the same noise."""
    v = gaussian_v(0.6, 0.3, angle)
    wanted = gd.sample(v, angle, 64, "D", Z)
    for N in (32, 16, 8, 4, 2, 1):
        v = student_of(v, angle, N, "D")
        close(gd.sample(v, angle, N, "D", Z), wanted, 1e-10, 1e-10)


@pytest.mark.parametrize("angle", ANGLES.values(), ids=ANGLES)
def test_stochastic_students(angle):
    """S(2N) at even points, without noise, is D(N); S(1) is D(1). Each asks of the one before
    only what that was trained for."""
    teacher = gaussian_v(0.6, 0.3, angle)
    S, D, before = {}, {}, teacher
    for N in (16, 8, 4, 2, 1):
        before = S[N] = student_of(before, angle, N, "S")
    before = teacher
    for N in (8, 4, 2, 1):  # the teacher's 16 steps, both times
        before = D[N] = student_of(before, angle, N, "D")
    for N in (8, 4, 2, 1):
        for i in range(1, N + 1):
            close(S[2 * N](Z, at(i / N)), D[N](Z, at(i / N)), 1e-10, 1e-10)
    close(S[1](Z, at(1)), D[1](Z, at(1)), 1e-10, 1e-10)


def test_what_a_round_asks_of_its_teacher():
    """By enumeration: every jump (from, to) that S(N) asks of S(2N) is one that S(2N) was
    trained to make; likewise D."""
    for sampler, N in itertools.product(("D", "S", "encoder"), (1, 2, 4, 8)):

        def jumps(N):
            tau, _, end = gd.times_of(torch.arange(1, N + 1, dtype=torch.float64), N, sampler)
            return set(zip(tau.tolist(), end.tolist()))

        tau, mid, end = (
            t.tolist() for t in gd.times_of(torch.arange(1, N + 1, dtype=torch.float64), N, sampler)
        )
        for a, b, c in zip(tau, mid, end):
            assert (a, b) in jumps(2 * N) and (b == c or (b, c) in jumps(2 * N)), (
                sampler, N, a, b, c)


def test_single_jump_of_the_stochastic_student():
    """At i = 1 the target is the teacher's own prediction, to the last bit, and nothing is
    asked at tau = 0."""
    seen = []

    def v(z, tau):
        seen.append(tau)
        return gaussian_v(0.6, 0.3, gd.edm_angle)(z, tau)

    z, tau = Z.float(), gd.times_of(at(1), 4, "S")
    target = gd.two_steps(v, gd.edm_angle, z, *tau)
    assert (
        torch.equal(target, gaussian_v(0.6, 0.3, gd.edm_angle)(z, tau[0])) and len(seen) == 2
        and all((t > 0).all() for t in seen))


@pytest.mark.parametrize("sampler", ["D", "S"])
@pytest.mark.parametrize("N", [4, 1024, 4096])
def test_float32_targets(sampler, N):
    """Against float64, for the finest steps and the last ones. The paper's form is off by 1e-3
    here."""
    v, angle = gaussian_v(0.6, 0.3, gd.edm_angle), gd.edm_angle
    for i in (1, 2, 3, N // 2, N):
        times = gd.times_of(at(i), N, sampler)
        exact, found = (gd.two_steps(v, angle, z, *times) for z in (Z, Z.float()))
        assert found.dtype == torch.float32
        close(found, exact, 1e-5, 3e-6)


def test_float32_targets_of_a_network():
    """A denoiser's v at the least noise level is a difference divided by 0.003; its target
    still keeps four digits."""
    net, y = tiny(), torch.arange(4)
    exact, z = copy.deepcopy(net).double(), img((4, 3, 16, 16)) + 0.001 * gauss((4, 3, 16, 16), 3)
    exact.dtype = torch.float64
    for N, i in ((4096, 1), (4096, 2), (4096, 4096), (4, 1), (4, 4)):
        times = gd.times_of(at(i, z), N, "D")
        with torch.no_grad():
            a, b = (
                gd.two_steps(
                    lambda z, tau: gd.net_v(n, gd.edm_angle)(z, tau, y, None), gd.edm_angle, x,
                    *times)
                for n, x in ((exact, z.double()), (net, z))
            )
        assert (a - b).abs().max() < 8e-5 * a.abs().max(), (N, i, (a - b).abs().max())


@pytest.mark.parametrize(
    "angle", [COSINE, functools.partial(gd.edm_angle, sampler="encoder")], ids=["cosine", "edm"])
def test_encoder_and_decoder(angle):
    """Up by an encoder's targets and down by a decoder's, of the exact ODE, is the identity;
    the start of the way up included."""
    s, m = 0.6, 0.3
    up, down = exact_v(angle, s, m, 32, "encoder"), exact_v(angle, s, m, 32, "D")
    for N in (16, 8, 4, 2, 1):
        up, down = student_of(up, angle, N, "encoder"), student_of(down, angle, N, "D")
        z = gd.sample(up, angle, N, "encoder", Z)
        close(gd.sample(down, angle, N, "D", z), Z, 1e-8, 1e-8)
    close(
        gd.sample(up, COSINE, 1, "encoder", Z), (Z - m) / s, 1e-8, 1e-8
    ) if angle is COSINE else None


def test_a_toy_is_distilled():
    """Four clusters in the plane, their exact denoiser as teacher: 8, 4, 2 steps, after which
    two go where sixteen of the teacher do."""
    torch.manual_seed(0)
    centres = torch.tensor([[0.8, 0.8], [-0.8, 0.6], [0.2, -0.9], [-0.6, -0.7]])

    def D(x, t):
        V = t.square()[:, None] + 0.1**2
        nearest = torch.softmax(
            -(x.flatten(1)[:, None] - centres).square().sum(2) / (2 * V), 1
        )  # (B,4)
        mean = nearest @ centres
        return (mean + 0.1**2 / V * (x.flatten(1) - mean)).view_as(x)

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.Sequential(
                torch.nn.Linear(10, 96), torch.nn.SiLU(), torch.nn.Linear(96, 96), torch.nn.SiLU(),
                torch.nn.Linear(96, 2))

        def forward(self, z, tau):
            phases = gd.edm_angle(tau).float()[:, None] * 2 ** torch.arange(4)
            return self.layers(torch.cat([z.flatten(1), phases.sin(), phases.cos()], 1)).view_as(z)

    z_1, teacher = torch.randn(1000, 2, 1, 1), gd.edm_v(D, gd.edm_angle)
    wanted = gd.sample(teacher, gd.edm_angle, 16, "D", z_1)
    before, net = teacher, Net()
    for N, steps in ((8, 1000), (4, 400), (2, 400)):
        optimizer = torch.optim.Adam(net.parameters())
        for k in range(steps):
            optimizer.param_groups[0]["lr"] = 4e-3 * (1 - k / steps)
            x0 = (centres[torch.randint(4, (256,))] + 0.1 * torch.randn(256, 2)).view(256, 2, 1, 1)
            tau, mid, end = gd.times_of(torch.randint(1, N + 1, (256,)).double(), N, "D")
            target = functools.partial(gd.two_steps, before, gd.edm_angle, tau_mid=mid, tau_end=end)
            loss = gd.loss_fn(
                net, lambda z, tau: target(z, tau), gd.edm_angle, x0, torch.randn_like(x0), tau,
                torch.ones_like).mean()
            optimizer.zero_grad(), loss.backward(), optimizer.step()
        before = copy.deepcopy(net).requires_grad_(False)
    far = lambda x: (x - wanted).flatten(1).norm(dim=1).mean()
    with torch.no_grad():
        distilled, teachers = (
            far(gd.sample(net, gd.edm_angle, 2, "D", z_1)),
            far(gd.sample(teacher, gd.edm_angle, 2, "D", z_1)))
    assert distilled < 0.2 < 0.4 < teachers, (distilled, teachers)


# ---- samplers


def test_renoise():
    """From z at tau_k, mean and variance are those of z at tau_s, whatever x."""
    angle, k, s = gd.edm_angle, at(0.25), at(0.5)
    phi_k, phi_s = angle(k)[0], angle(s)[0]
    zero, one = torch.zeros_like(Z), torch.ones_like(Z)
    gain, noise = (
        gd.renoise(angle, one, k, s, zero)[0].item(), gd.renoise(angle, zero, k, s, one)[0].item())
    close(gain * phi_k.cos(), phi_s.cos(), 1e-12)
    close(gain**2 * phi_k.sin() ** 2 + noise**2, phi_s.sin() ** 2, 1e-12)


def test_stochastic_steps_by_hand():
    """The sampler by hand for N = 4: where v is asked, and by which formula z goes on; N - 1
    draws of noise."""
    angle, v, N, seen, draws = gd.edm_angle, gaussian_v(0.6, 0.3, gd.edm_angle), 4, [], []

    def watched(z, tau):
        seen.append(tau[0].item())
        return v(z, tau)

    def noise(z):
        draws.append(gauss(tuple(z.shape), len(draws)).double())
        return draws[-1]

    found = gd.sample(watched, angle, N, "S", Z, noise)
    assert seen == [1.0, 0.75, 0.5, 0.25] and len(draws) == 3
    z = Z
    a, b = (lambda i: angle(at(i / N)).cos()[0]), (lambda i: angle(at(i / N)).sin()[0])
    for i, (k, s) in {4: (2, 3), 3: (1, 2), 2: (0, 1)}.items():
        x = a(i) * z - b(i) * v(z, at(i / N))
        z_k = a(k) * x + b(k) * (z - a(i) * x) / b(i)
        z = a(s) / a(k) * z_k + (b(s) ** 2 - (a(s) / a(k)) ** 2 * b(k) ** 2).sqrt() * draws[4 - i]
    close(found, a(1) * z - b(1) * v(z, at(1 / N)), 1e-12, 1e-12)


@pytest.mark.parametrize("N", [1, 2, 4])
def test_stochastic_sampler_keeps_the_deviation(N):
    """Exact jumps, 1e5 samples: mean and deviation are the data's, at any N."""
    torch.manual_seed(0)
    z = torch.randn(100_000, 1, 1, 1, dtype=torch.float64)
    x = gd.sample(exact_v(COSINE, 0.6, 0.3, N, "S"), COSINE, N, "S", z)
    close(x.std(), 0.6, 0.01)
    close(x.mean(), 0.3, 0.03)


def test_starting_midway_and_pasting():
    """From N of N steps it is plain sampling, from 0 the input; the known part is pasted after
    every step, at its level."""
    angle, v, seen = gd.edm_angle, gaussian_v(0.6, 0.3, gd.edm_angle), []
    for sampler in ("D", "S"):
        assert torch.equal(
            gd.sample(v, angle, 4, sampler, Z, gauss_like, start=4),
            gd.sample(v, angle, 4, sampler, Z, gauss_like))
        assert torch.equal(gd.sample(v, angle, 4, sampler, Z, gauss_like, start=0), Z)
        tail = gd.sample(v, angle, 4, "D", gd.sample(v, angle, 4, "D", Z), start=0)
        assert torch.equal(tail, gd.sample(v, angle, 4, "D", Z))
        half = gd.sample(v, angle, 4, sampler, Z, gauss_like, start=2)
        by_hand = Z
        for i in (2, 1):
            k = max(i - 2, 0) if sampler == "S" else i - 1
            by_hand = gd.ddim(v, angle, by_hand, at(i / 4), at(k / 4))
            by_hand = (
                gd.renoise(angle, by_hand, at(k / 4), at((i - 1) / 4), gauss_like(Z)) if k < i - 1
                else by_hand)
        close(half, by_hand, 1e-12, 1e-12)

    def paste(z, tau):
        seen.append(tau[0].item())
        return torch.where(column(torch.arange(24) % 2 > 0), z, 7.0)

    x = gd.sample(v, angle, 4, "D", Z, paste=paste)
    assert seen == [0.75, 0.5, 0.25, 0.0] and (x[::2] == 7).all() and (x[1::2] != 7).all()


def gauss_like(z):
    return gauss(tuple(z.shape), 5).to(z.dtype)


# ---- the rounds


def test_plans():
    settings = dict(
        stage1_steps=10, round_steps=2, last_steps=5, start_N=32, end_N=1, w_max=4.0, sampler="D")
    assert gd.plan(settings) == [(0, 10), (16, 2), (8, 2), (4, 5), (2, 5), (1, 5)]
    assert gd.plan(settings | dict(sampler="S")) == [
        (0, 10), (32, 2), (16, 2), (8, 2), (4, 5), (2, 5), (1, 1)]
    assert gd.plan(settings | dict(w_max=0.0, stage1_steps=0, end_N=2)) == [
        (16, 2), (8, 2), (4, 2), (2, 5)]


def test_recipes():
    """PD's published numbers without guidance; what each stage refuses is tested in
    test_guided_scripts.py."""
    plain = gd.recipe(dict(dataset="cifar10", w_max=0.0))
    assert (
        (
            plain["start_N"], plain["batch_size"], plain["lr"], plain["round_steps"],
            plain["last_steps"], plain["weighting"])
        == (8192, 128, 5e-5, 50_000, 100_000, "trunc")
        and plain["stage1_steps"] == 0
        and plain["total_steps"] == 11 * 50_000 + 2 * 100_000
    )
    imagenet = gd.recipe(dict(dataset="imagenet64", w_max=0.0))
    assert (
        imagenet["start_N"], imagenet["batch_size"], imagenet["lr"], imagenet["total_steps"]
    ) == (1024, 2048, 1e-4, 600_000)
    assert gd.recipe(dict(dataset="cifar10"))["class_cond"] and gd.recipe({})["w_max"] == 4
    latent = dict(teacher="diffusers:pipe", dataset="latents.npz")
    assert [
        gd.recipe(latent | more)["w_min"] for more in ({}, dict(w_max=1.0), dict(w_max=0.0))
    ] == [2, 0, 0]
    assert (
        gd.recipe(latent)["total_steps"] == 3000 + 6 * 2000 + 3 * 20_000
    )  # GD's text: from 512 steps
    assert (
        gd.recipe(dict(dataset="bedroom256", teacher="ideal"))["stage1_steps"] == 50_000
    )  # a network of it, first of all
    assert (
        gd.recipe(dict(sampler="encoder", teacher="t.pt")).items()
        >= dict(w_max=0, stage1_steps=0, sample_every=0).items())


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
    for own, given, message in (
            ((4, "D", 0.0, 4.0), dict(N=8), "--N 8: x.pt was trained for N 4"),
            ((4, "D", 0.0, 4.0), dict(sampler="S"), "trained for sampler D"),
            ((0, None, 0.0, 4.0), dict(sampler="encoder"), "applies to training only"),
            ((4, "D", 2.0, 4.0), dict(w=1.0), "--w 1: x.pt was trained for weights from 2 to 4"),
            ((4, "D", 0.0, 0.0), dict(w=1.0), "trained for weights from 0 to 0")):
        with pytest.raises(common.UserError, match=message):
            chosen(own, **given)
