"""The fast samplers of a teacher: orders of convergence, what theory says is exact, the papers'
formulas in their own notation (lambda = -ln t, the log of alpha / sigma), calls and noise."""
import functools
import itertools
import math

import numpy as np
import pytest
import torch

import common
from util import close, full, gauss

X_T = 80 * gauss((2, 3, 4, 4), 50).double()
MU, SOLVERS = 0.4, ("euler", "heun", "dpm2", "dpm++2m", "deis")
RULES = {"dpm++2m": (common.dpm_plus_plus_slope, 2), "deis": (common.deis_slope, 4)}


def curved(x, t):
    """A D that is not affine."""
    t = common.bcast(t, x)
    return (0.3 * x / (t**2 + 1).sqrt() + 0.2 + 0.1 * t.log().sin()).tanh()


def levels(N):
    return common.karras_times(N).tolist()[::-1]


def gaussian(s):
    """D of data N(MU, s^2), and the flow (x, t, t_next) -> x at t_next."""
    def D(x, t):
        t = common.bcast(t, x)
        return (t**2 * MU + s**2 * x) / (t**2 + s**2)

    def flow(x, t, t_next):
        return MU + (x - MU) * math.sqrt((s**2 + t_next**2) / (s**2 + t**2))
    return D, flow


def no_noise(x):
    raise AssertionError("it is deterministic")


# ---- convergence

@pytest.mark.parametrize("s", [0.3, 2.0])
@pytest.mark.parametrize("name", SOLVERS)
def test_samplers_converge_to_the_flow(name, s):
    """Euler with order 1, the others with 2 or more; from t_min they end on D."""
    D, flow = gaussian(s)
    end = flow(X_T, levels(2)[0], levels(2)[1])
    wanted, errors = D(end, full(end, levels(2)[1])), []
    for N in (161, 321):
        x = common.SAMPLERS[name](D, X_T, N, noise=no_noise)
        errors.append((x - wanted).abs().max().item())
    order = math.log2(errors[0] / errors[1])
    assert order > (0.85 if name == "euler" else 1.85), (order, errors)
    assert errors[1] < (0.03 if name == "euler" else 1e-3)


@pytest.mark.parametrize("s", [0.3, 2.0])
def test_order_of_dpm_solver_2(s):
    (D, flow), errors = gaussian(s), []
    for N in (161, 321, 641):
        x, times = X_T, levels(N)
        for t, t_next in itertools.pairwise(times):
            x = common.dpm2_step(D, x, full(x, t), full(x, t_next))
        errors.append((x - flow(X_T, times[0], times[-1])).abs().max().item())
    orders = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert all(abs(order - 2) < 0.15 for order in orders), orders


@pytest.mark.parametrize("s", [0.3, 2.0])
@pytest.mark.parametrize("name", RULES)
def test_order_of_multistep_solvers(name, s):
    """Begun with a history that is exact, which Euler's first step would not be."""
    (D, flow), errors, (slope, wanted) = gaussian(s), [], RULES[name]
    for N in (161, 321, 641):
        times, history = levels(N), []
        x = X_T
        for i, (t, t_next) in enumerate(itertools.pairwise(times)):
            history = [*history[-3:], (t, x, D(x, full(x, t)))]
            x = x + (t_next - t) * slope(history, t_next)
            if i < 3:
                x = flow(X_T, times[0], t_next)
        errors.append((x - flow(X_T, times[0], times[-1])).abs().max().item())
    orders = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert all(abs(order - wanted) < 0.25 for order in orders), orders


# ---- what is exact

@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_deis_integrates_polynomials(degree):
    """Noise that is a polynomial in t of a degree below the number of the last calls."""
    P = np.polynomial.Polynomial([0.7, -0.4, 0.9, 0.3][:degree + 1])
    times, x = [5.0, 3.1, 2.5, 1.2][3 - degree:], gauss((2, 3, 4, 4), 1).double()

    def step(P, times):
        history = [(t, x, x - t * P(t)) for t in times]  # any x: the slope is P(t)
        return x + (0.4 - times[-1]) * common.deis_slope(history, 0.4)

    integral = P.integ()
    close(step(P, times), x + integral(0.4) - integral(1.2), 1e-12, 1e-12)
    Q = P * np.polynomial.Polynomial([0, 1])  # one degree more
    off = step(Q, times) - x - (Q.integ()(0.4) - Q.integ()(1.2))
    assert off.abs().min() > 1e-3


@pytest.mark.parametrize("name", [*SOLVERS, "ancestral"])
def test_one_clean_image(name):
    """D constant: all end on it. And a constant noise all but the stochastic one integrate."""
    x0, slope = gauss((2, 3, 4, 4), 2).double(), gauss((2, 3, 4, 4), 3).double()
    still = common.SAMPLERS[name](lambda x, t: x0, X_T, 5, noise=torch.zeros_like)
    close(still, x0, 1e-12, 1e-12)
    if name != "ancestral":
        x = common.SAMPLERS[name](lambda x, t: x - common.bcast(t, x) * slope, X_T, 5)
        close(x, X_T - 80 * slope, 1e-9, 1e-9)


def test_dpm_plus_plus_extrapolates_in_ln_t():
    """D affine in ln t is taken midway in ln t, whatever the steps."""
    a, b, x = (gauss((2, 3, 4, 4), i).double() for i in (4, 5, 6))
    D = lambda t: a + b * math.log(t)
    for t_last, t, t_next in ((7.0, 2.0, 0.3), (3.0, 2.0, 0.01)):
        history = [(t_last, 0 * x, D(t_last)), (t, x, D(t))]
        found = x + (t_next - t) * common.dpm_plus_plus_slope(history, t_next)
        ratio = t_next / t
        close(found, ratio * x + (1 - ratio) * D(math.sqrt(t * t_next)), 1e-12, 1e-12)


# ---- the papers' formulas

def test_dpm_solver_2_in_log_snr():
    """DPM-Solver Alg. 1, of the noise and h = lambda_t_next - lambda_t; t differs by image."""
    t, t_next = torch.tensor([[40.0, 0.6], [9.0, 0.5]], dtype=torch.float64)
    x = gauss((2, 3, 4, 4), 7).double() * common.bcast(t, X_T)
    noise = lambda x, t: (x - curved(x, t)) / common.bcast(t, x)
    h = t.log() - t_next.log()
    s = (-(-t.log() + h / 2)).exp()
    u = x - common.bcast(s * torch.expm1(h / 2), x) * noise(x, t)
    wanted = x - common.bcast(t_next * torch.expm1(h), x) * noise(u, s)
    close(common.dpm2_step(curved, x, t, t_next), wanted, 1e-12, 1e-12)


def dpm_plus_plus_by_hand(D, x, times):
    """DPM-Solver++ Alg. 2 in lambda, then x itself at 0."""
    lam, last = [-math.log(t) for t in times], None
    for i in range(1, len(times)):
        x_theta = D(x, full(x, times[i - 1]))
        D_i, h = x_theta, lam[i] - lam[i - 1]
        if i > 1:
            r = (lam[i - 1] - lam[i - 2]) / h
            D_i = (1 + 1 / (2 * r)) * x_theta - 1 / (2 * r) * last
        x = math.exp(-h) * x - math.expm1(-h) * D_i
        last = x_theta
    return D(x, full(x, times[-1]))


def deis_by_hand(D, x, times):
    """Lagrange polynomials through the last four noises, integrated numerically."""
    nodes, parts = np.polynomial.legendre.leggauss(12)
    noises = []
    for i, (t, t_next) in enumerate(itertools.pairwise(times)):
        noises.append((x - D(x, full(x, t))) / t)
        known = range(max(i - 3, 0), i + 1)
        rho = (t + t_next) / 2 + (t_next - t) / 2 * nodes
        for j in known:
            others = [(rho - times[k]) / (times[j] - times[k]) for k in known if k != j]
            ell = np.prod(others, axis=0) if others else np.ones_like(rho)
            x = x + (t_next - t) / 2 * float((parts * ell).sum()) * noises[j]
    return D(x, full(x, times[-1]))


@pytest.mark.parametrize("name, by_hand", [
    ("dpm++2m", dpm_plus_plus_by_hand), ("deis", deis_by_hand)])
@pytest.mark.parametrize("N", [2, 5, 12])
def test_multistep_solvers_by_hand(name, by_hand, N):
    found = common.SAMPLERS[name](curved, X_T, N)
    close(found, by_hand(curved, X_T, levels(N)), 1e-9, 1e-9)


def test_single_step_solvers_by_hand():
    """The loop over Karras' grid, Euler's step to 0 at its end."""
    for name in ("euler", "dpm2"):
        step, x, times = getattr(common, f"{name}_step"), X_T, levels(7)
        for t, t_next in itertools.pairwise(times):
            x = step(curved, x, full(x, t), full(x, t_next))
        close(common.SAMPLERS[name](curved, X_T, 7), curved(x, full(x, times[-1])), 1e-12, 1e-12)


def test_ancestral_step_is_the_posterior():
    """x_s and x_t given x0 are jointly Gaussian; x_s given x_t too, by conditioning."""
    for s, t in ((0.5, 2.0), (30.0, 31.0), (0.002, 5.0)):
        x = t * gauss((1, 3, 4, 4), 8).double()
        levels = full(x, t), full(x, s)
        x0 = curved(x, levels[0])
        covariance = np.array([[s**2, s**2], [s**2, t**2]])  # x_t = x_s + more noise
        gain = covariance[0, 1] / covariance[1, 1]
        deviation = math.sqrt(np.linalg.det(covariance) / covariance[1, 1])
        mean = common.ancestral_step(curved, x, *levels, torch.zeros_like)
        above = common.ancestral_step(curved, x, *levels, torch.ones_like)
        close(mean, x0 + gain * (x - x0), 1e-10, 1e-10)
        close(above - mean, torch.full_like(x, deviation), 1e-7, 1e-7)


@pytest.mark.parametrize("N", [6, 200])
def test_deviation_of_ancestral_samples(N):
    """On N(MU, s^2) each step maps the variance linearly; in many steps it ends at the data's."""
    torch.manual_seed(0)
    s, n, times = 0.7, 40_000, [*levels(N), 0.0]
    D, _ = gaussian(s)
    x_T = MU + math.sqrt(80**2 + s**2) * torch.randn(1, 1, 200, n // 200, dtype=torch.float64)
    x = common.ancestral_sample(D, x_T, N)
    variance = 80**2 + s**2
    for t, t_next in itertools.pairwise(times):
        kept = (t_next / t) ** 2
        gain = kept + (1 - kept) * s**2 / (s**2 + t**2)
        variance = gain**2 * variance + t_next**2 - t_next**4 / t**2
    error = 4 / math.sqrt(2 * n)
    assert abs(x.std().item() / math.sqrt(variance) - 1) < error
    assert abs(x.mean() - MU) < 4 * s / math.sqrt(n)
    assert (abs(math.sqrt(variance) / s - 1) < 0.05) == (N == 200)
    correlation = torch.corrcoef(torch.stack([x.flatten(), x_T.flatten()]))[0, 1]
    assert abs(correlation) < 0.05


# ---- calls and noise

@pytest.mark.parametrize("N", [2, 5, 18])
@pytest.mark.parametrize("name", common.SAMPLERS)
def test_calls(name, N):
    """As many as is said, from 80 to 0.002; noise is asked for N - 1 times, or not at all."""
    asked, noises = [], []

    def D(x, t):
        asked.append(t[0].item())
        return curved(x, t)

    def noise(x):
        noises.append(gauss(tuple(x.shape), len(noises)).double())
        return noises[-1]

    x = common.SAMPLERS[name](D, X_T, N, noise=noise)
    assert x.shape == X_T.shape and x.isfinite().all()
    assert len(asked) == common.sampler_calls(name, N)
    assert len(asked) == (2 * N - 1 if name in ("heun", "dpm2") else N)
    assert set(levels(N)) <= set(asked) and asked[0] == levels(N)[0] and asked[-1] == levels(N)[-1]
    assert len(noises) == (N - 1 if name == "ancestral" else 0)


# ---- other implementations

def test_diffusers_dpm_plus_plus():
    diffusers = pytest.importorskip("diffusers")
    for N in (5, 20):
        scheduler = diffusers.EDMDPMSolverMultistepScheduler()  # second order, Karras, to 0
        scheduler.set_timesteps(N)
        x = X_T
        for i, k in enumerate(scheduler.timesteps):
            t = scheduler.sigmas[i].double()
            c_skip, c_out, _ = common.edm_scalings(t)
            F = (curved(x, full(x, t)) - c_skip * x) / c_out
            x = scheduler.step(F, k, x).prev_sample
        close(common.SAMPLERS["dpm++2m"](curved, X_T, N), x, 1e-4, 1e-4)


def test_diffusers_linear_multistep():
    """Its weights, with the polynomial's degree 3 the same method."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.LMSDiscreteScheduler()
    times = levels(9)
    scheduler.sigmas = torch.tensor(times, dtype=torch.float64)
    zero = torch.zeros(1, 1, 1, 1)
    for i in range(3, 8):
        for j in range(4):  # back from the newest: the slope 1 there alone
            slopes = [float(k == i - j) for k in range(9)]
            history = [(times[k], zero, zero - times[k] * slopes[k]) for k in range(i - 3, i + 1)]
            weight = (times[i + 1] - times[i]) * common.deis_slope(history, times[i + 1]).item()
            close(weight, scheduler.get_lms_coefficient(4, i, j), 1e-3, 1e-5)


def test_diffusers_ancestral():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.EulerAncestralDiscreteScheduler()
    scheduler.set_timesteps(10)
    scheduler.is_scale_input_called = True
    t, t_next = scheduler.sigmas[4].double(), scheduler.sigmas[5].double()
    x = gauss((2, 3, 4, 4), 9).double() * t
    noise_prediction = (x - curved(x, full(x, t))) / t
    drawn = torch.Generator().manual_seed(0)
    noise = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(0))
    wanted = scheduler.step(noise_prediction, scheduler.timesteps[4], x, drawn).prev_sample
    step = functools.partial(common.ancestral_step, curved, x, full(x, t), full(x, t_next))
    close(step(lambda x: noise), wanted, 1e-4, 1e-4)
