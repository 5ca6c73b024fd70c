"""What two or more of the scripts share: mathematics, network, then the machine room.

In this order: noise levels; preconditioning; solvers and samplers; denoisers; what losses are made
of; continuous time; the network; errors and files; data; processes and seeds; checkpoints; logs and
pictures; samples; flags; teachers; editing.

t is a noise level everywhere, the standard deviation of the noise (EDM's sigma, and `--sigmas` on
the command line): x_t = x0 + t * noise. Images x are (B,C,H,W) in [-1, 1], t and labels y (B,).

CM = Song et al. 2023, arXiv 2303.01469v2. iCT = Song & Dhariwal 2023, arXiv 2310.14189. ECT = Geng
et al. 2024, arXiv 2406.14548. EDM = Karras et al. 2022, arXiv 2206.00364. ADM = Dhariwal & Nichol
2021, arXiv 2105.05233.
"""
import argparse
import atexit
import colorsys
import contextlib
import datetime
import difflib
import fnmatch
import functools
import gzip
import hashlib
import importlib
import io
import json
import math
import os
import pickle
import re
import shutil
import signal
import socket
import sys
import tarfile
import time
import types
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

T_MIN, T_MAX = 0.002, 80.0  # EDM Table 1; CM calls t_min epsilon and t_max T
RHO, SIGMA_DATA = 7.0, 0.5
C_NOISE = 250

# --------------------------------------------------------------------------------------------------
# Noise levels
# --------------------------------------------------------------------------------------------------

def karras_times(N, t_min=T_MIN, t_max=T_MAX, rho=RHO):
    """The N noise levels t_min = times[0] < ... < times[N-1] = t_max: (N,), N-1 intervals.

    The paper counts t_1 .. t_N; times[n] is its t_{n+1}. Source: CM Sec. 2, EDM Eq. 5.
    """
    if N < 2:
        raise ValueError(f"a grid of noise levels needs at least 2 points, got {N}")
    i = torch.arange(N, dtype=torch.float64)
    low, high = t_min ** (1 / rho), t_max ** (1 / rho)
    return ((low + i / (N - 1) * (high - low)) ** rho).float()

def interval_probabilities(times, p_t):
    """P(n), n = 0 .. N-2, of drawing the interval times[n] .. times[n+1]: (N-1,) float32.

    p_t: ["uniform"] over n (CM Alg. 2 and 3), or [mean, std]: what ln t ~ Normal(mean, std^2) gives
    the interval (iCT Table 1).
    """
    if p_t == ["uniform"]:
        return torch.full_like(times[1:], 1 / (len(times) - 1))
    mean, std = p_t
    standard = (times.double().log() - mean) / std
    P = (standard / math.sqrt(2)).erf().diff()
    return (P / P.sum()).float()

def random_times(n, p_t, device):
    """(n,) noise levels: for p_t = [mean, std] ln t ~ Normal(mean, std^2), not clipped (EDM Table
    1); for ["uniform"] uniform in t^(1/RHO), karras_times with N -> infinity (CM App. B)."""
    if p_t == ["uniform"]:
        low, high = T_MIN ** (1 / RHO), T_MAX ** (1 / RHO)
        t = (low + torch.rand(n, device=device) * (high - low)) ** RHO
        return t.clamp(T_MIN, T_MAX)
    mean, std = p_t
    return (mean + std * torch.randn(n, device=device)).exp()

# --------------------------------------------------------------------------------------------------
# Preconditioning
# --------------------------------------------------------------------------------------------------

def bcast(t, x):
    """(B,) -> (B,1,1,1), to multiply x."""
    return t.view(-1, *[1] * (x.ndim - 1))

def levels_like(x, t):
    """(B,): the noise level t for each image of x."""
    return torch.full_like(x[:, 0, 0, 0], t)

def edm_scalings(t):
    """c_skip, c_out, c_in of a denoiser at noise level t, each like t. Source: EDM Table 1."""
    root = (t**2 + SIGMA_DATA**2).sqrt()
    return (SIGMA_DATA / root) ** 2, t * SIGMA_DATA / root, 1 / root

def cm_scalings(t):
    """c_skip, c_out, c_in of a consistency function: c_skip(t_min) = 1, c_out(t_min) = 0, exactly.

    Source: CM App. C; t_min is subtracted in the numerator of c_out, not under its root.
    """
    root = (t**2 + SIGMA_DATA**2).sqrt()
    c_skip = SIGMA_DATA**2 / ((t - T_MIN) ** 2 + SIGMA_DATA**2)
    return c_skip, SIGMA_DATA * (t - T_MIN) / root, 1 / root

def free_scalings(t):
    """`cm_scalings` of the other parametrisation: f is x at t_min, the network alone above it.

    Source: CM Eq. 4; c_in as there.
    """
    at_t_min = (t <= T_MIN).to(t.dtype)
    _, _, c_in = edm_scalings(t)
    return at_t_min, 1 - at_t_min, c_in

def c_noise(t):
    """What the network is told of t: EDM's ln(t)/4, times 1000 as ADM's embedding expects."""
    return C_NOISE * t.log()

def c_guidance(w):
    """What a student is told of the guidance weight w: on this scale 4 is told from 4.1."""
    return None if w is None else 25 * w

def precondition(net, x, t, y, cond, masks, scalings):
    assert x.ndim == 4 and t.shape == x.shape[:1], (x.shape, t.shape)
    assert t.dtype == x.dtype, (t.dtype, x.dtype)
    c_skip, c_out, c_in = (bcast(c, x) for c in scalings(t))
    F_x = net(c_in * x, c_noise(t), y, cond, masks)  # float32
    return c_skip * x + c_out * F_x

def denoise(net, x, t, y=None, cond=None, masks=None):
    """D(x, t), an estimate of E[x0 | x_t = x], like x. Source: EDM Eq. 7.

    net: a UNet. x: (B,C,H,W) float32 at noise level t (B,) > 0. y: (B,) int64 labels. cond: (B,)
    the net's second scalar, if it has one. masks: of dropout, see `dropout_masks`.
    """
    return precondition(net, x, t, y, cond, masks, edm_scalings)

def consistency(net, x, t, y=None, cond=None, masks=None):
    """f(x, t), the end at t_min of the probability-flow trajectory through (x, t).

    f(x, t_min) = x to the last bit. Arguments as `denoise`. Source: CM Sec. 3, App. C; Eq. 5, or
    where the net says so, `net.parametrisation`, Eq. 4.
    """
    free = getattr(net, "parametrisation", "skip") == "free"
    scalings = free_scalings if free else cm_scalings
    return precondition(net, x, t, y, cond, masks, scalings)

# --------------------------------------------------------------------------------------------------
# Solvers and samplers. D: (x (B,C,H,W), t (B,)) -> clean estimate, f: the same -> x at t_min.
# noise: x -> unit noise like x. x_T: (B,C,H,W), the first level times unit noise.
# --------------------------------------------------------------------------------------------------

def euler_step(D, x, t, t_next):
    """One Euler step of the probability-flow ODE dx/dt = (x - D(x, t)) / t, from t to t_next (B,).

    Source: EDM Alg. 1 without its correction; a solver of CM Alg. 2.
    """
    d_cur = (x - D(x, t)) / bcast(t, x)
    return x + bcast(t_next - t, x) * d_cur

def heun_step(D, x, t, t_next):
    """One Heun step of the same ODE: Euler, then the trapezoid rule; to t_next = 0 Euler's alone.

    Always two calls of D. Source: EDM Alg. 1, lines 3-8.
    """
    d_cur = (x - D(x, t)) / bcast(t, x)
    dt = bcast(t_next - t, x)
    x_next = x + dt * d_cur
    t_safe = torch.where(t_next > 0, t_next, t)  # the slope at 0 is 0/0
    d_prime = (x_next - D(x_next, t_safe)) / bcast(t_safe, x)
    x_heun = x + dt * (d_cur + d_prime) / 2
    return torch.where(bcast(t_next > 0, x), x_heun, x_next)

def dpm2_step(D, x, t, t_next):
    """One step of DPM-Solver-2 to t_next > 0, with the slope midway in ln t; two calls of D.

    Source: Lu et al. 2022 (2206.00927) Alg. 1, for alpha = 1.
    """
    t_mid = (t * t_next).sqrt()
    x_mid = euler_step(D, x, t, t_mid)
    d_mid = (x_mid - D(x_mid, t_mid)) / bcast(t_mid, x)
    return x + bcast(t_next - t, x) * d_mid

def ancestral_step(D, x, t, t_next, noise):
    """Draw x at t_next from the posterior q(x_t_next | x_t, x0) with x0 = D(x, t).

    Source: Ho et al. 2020 (DDPM, 2006.11239) Eq. 6 and 7, for alpha = 1.
    """
    x_denoised = D(x, t)
    kept = (t_next / t) ** 2
    std = t_next * (1 - kept).sqrt()
    return x_denoised + bcast(kept, x) * (x - x_denoised) + bcast(std, x) * noise(x)

def heun_sample(D, x_T, N, churn=0.0, churn_min=0.05, churn_max=50.0,
                churn_noise=1.003, noise=torch.randn_like, step=heun_step):
    """Go from T_MAX to 0 in N steps: of Heun's, 2 N - 1 calls of D, or of another `step`.

    The last step, to 0, is Euler's, which lands on D. With churn the SDE is solved: churn,
    churn_min, churn_max, churn_noise are EDM's S_churn, S_tmin, S_tmax, S_noise.
    Source: EDM Alg. 1 (churn = 0) and Alg. 2.
    """
    x = x_T
    times = [*karras_times(N).tolist()[::-1], 0.0]
    for t, t_next in zip(times[:-1], times[1:]):
        gamma = min(churn / N, math.sqrt(2) - 1) if churn_min <= t <= churn_max else 0.0
        if gamma > 0:
            t_hat = t * (1 + gamma)
            x = x + math.sqrt(t_hat**2 - t**2) * churn_noise * noise(x)
            t = t_hat
        solver = step if t_next > 0 else euler_step
        x = solver(D, x, levels_like(x, t), levels_like(x, t_next))
    return x

def ancestral_sample(D, x_T, N, noise=torch.randn_like):
    """Draw on the grid of `heun_sample`, in N calls of D; noise is called N - 1 times."""
    return heun_sample(D, x_T, N, step=functools.partial(ancestral_step, noise=noise))

def dpm_plus_plus_slope(history, t_next):
    """DPM-Solver++(2M): D at the middle of the step in ln t, on the line through the last two.

    Source: Lu et al. 2022 (2211.01095) Alg. 2, for alpha = 1.
    """
    t, x, x_denoised = history[-1]
    if len(history) > 1:
        t_last, _, x_denoised_last = history[-2]
        r = math.log(t_last / t) / math.log(t / t_next)  # of the steps
        x_denoised = x_denoised + (x_denoised - x_denoised_last) / (2 * r)
    return (x - x_denoised) / t

def deis_slope(history, t_next):
    """DEIS of degree 3: the mean over the step of the cubic in t through the last four slopes.

    Of a lower degree while there are fewer. The weights are those that have the powers of
    u = (t' - t) / (t_next - t) right, whose means over [0, 1] are 1 / (k + 1).
    Source: Zhang & Chen 2022 (2204.13902), rho-AB3: its rho is t.
    """
    t = history[-1][0]
    u = [(level - t) / (t_next - t) for level, _, _ in history]
    slopes = [(x - x_denoised) / level for level, x, x_denoised in history]
    k = torch.arange(len(u))
    powers = torch.tensor(u, dtype=torch.float64) ** k[:, None]
    weights = torch.linalg.solve(powers, 1 / (k + 1).double())
    return sum(weight * slope for weight, slope in zip(weights.tolist(), slopes))

def linear_multistep_sample(D, x_T, N, slope, noise=None):
    """Solve the ODE on the grid of `heun_sample` in N calls of D; no noise is drawn.

    slope: (history, t_next) -> dx/dt to step with; history: (t, x, D(x, t)) of the last four calls.
    """
    x, history = x_T, []
    times = [*karras_times(N).tolist()[::-1], 0.0]
    for t, t_next in zip(times[:-1], times[1:]):
        history = [*history[-3:], (t, x, D(x, levels_like(x, t)))]
        if t_next == 0:
            history = history[-1:]  # with one alone the step lands on D
        x = x + (t_next - t) * slope(history, t_next)
    return x

SAMPLERS = {  # (D, x_T, N, noise=) -> samples
    "heun": heun_sample,
    "euler": functools.partial(heun_sample, step=euler_step),
    "dpm2": functools.partial(heun_sample, step=dpm2_step),
    "dpm++2m": functools.partial(linear_multistep_sample, slope=dpm_plus_plus_slope),
    "deis": functools.partial(linear_multistep_sample, slope=deis_slope),
    "ancestral": ancestral_sample,
}

def sampler_calls(sampler, N):
    """How often one of SAMPLERS calls D."""
    return 2 * N - 1 if sampler in ("heun", "dpm2") else N

def renoised(x, tau, noise):
    """x at t_min, noised up to level tau (CM Alg. 1, line 4)."""
    return x + math.sqrt(max(tau**2 - T_MIN**2, 0)) * noise(x)

def multistep_sample(f, x_T, taus, noise=torch.randn_like):
    """Draw with a consistency function, a call for each of the noise levels taus, largest first.

    Source: CM Alg. 1.
    """
    x = f(x_T, levels_like(x_T, taus[0]))
    for tau in taus[1:]:
        x = f(renoised(x, tau, noise), levels_like(x, tau))
    return x

# --------------------------------------------------------------------------------------------------
# Denoisers D(x, t, y)
# --------------------------------------------------------------------------------------------------

def ideal_denoiser(data, labels=None, chunk=4096):
    """The denoiser that minimises EDM's loss on a finite data set: the posterior mean over it.

    data: (n,C,H,W), uint8 or float in [-1, 1], on the device to compute on. labels: (n,) int64.
    chunk: images at a time; memory is about chunk * C*H*W * 8 bytes. With y the mean is over the
    images of that label, and not a number if there are none.
    Source: EDM App. B.3. The logits -|x - x_i|^2 / 2t^2 reach 1e9 at t = 0.002, so they are taken
    in float64, without |x|^2, which all share, and summed with a running maximum.
    """
    def D(x, t, y=None):
        flat = x.flatten(1).to(data.device).double()  # (B,D)
        inverse_variance = t.to(data.device).double()[:, None] ** -2  # (B,1)
        peak = torch.full_like(inverse_variance, -torch.inf)  # of the logits so far
        total, mean = torch.zeros_like(peak), torch.zeros_like(flat)
        for start in range(0, len(data), chunk):
            part = data[start:start + chunk].flatten(1).double()  # (chunk,D)
            if data.dtype == torch.uint8:
                part = part / 127.5 - 1
            logits = (flat @ part.T - part.square().sum(1) / 2) * inverse_variance  # (B,chunk)
            if y is not None:
                other = labels[start:start + chunk] != y.to(data.device)[:, None]
                logits = logits.masked_fill(other, -torch.inf)
            new_peak = torch.maximum(peak, logits.amax(1, keepdim=True))
            shift = new_peak.nan_to_num(neginf=0.0)  # no image of label y yet: exp(-inf - 0) = 0
            rescale, p = (peak - shift).exp(), (logits - shift).exp()
            total = total * rescale + p.sum(1, keepdim=True)
            mean = mean * rescale + p @ part
            peak = new_peak
        return (mean / total).view_as(x).to(x)
    return D

def net_denoiser(net):
    """D(x, t, y) of a network, whose null label stands for y = None if it has one."""
    def D(x, t, y):
        if y is None and net.null_y is not None:
            y = torch.full_like(t, net.null_y, dtype=torch.int64)
        return denoise(net, x, t, y)
    return D

def guide(D, y, w):
    """D(x, t) for labels y; if w (B,) is given, (1 + w) D(x, t, y) - w D(x, t, None): at w = -1
    the unconditional D."""
    if w is None:
        return lambda x, t: D(x, t, y)

    def guided(x, t):
        weight = bcast(w, x)
        return (1 + weight) * D(x, t, y) - weight * D(x, t, None)
    return guided

# --------------------------------------------------------------------------------------------------
# What losses are made of: distances d(x, y) -> (B,), weights, dropout masks
# --------------------------------------------------------------------------------------------------

def l1(x, y):
    """Mean absolute difference over pixels and channels."""
    return (x - y).abs().flatten(1).mean(1)

def l2(x, y):
    """Mean squared difference over pixels and channels (the papers call the square l2 too)."""
    return (x - y).square().flatten(1).mean(1)

def pseudo_huber(x, y):
    """sqrt(|x - y|^2 + c^2) - c, one norm an image, c = 0.00054 sqrt(C*H*W): iCT Table 1."""
    c = 0.00054 * math.sqrt(x[0].numel())
    square = (x - y).square().flatten(1).sum(1)
    return (square + c**2).sqrt() - c

def norm(x, y):
    """|x - y|, one norm an image; its gradient where x = y is 0: ECT (pseudo-Huber, c = 0)."""
    return torch.linalg.vector_norm((x - y).flatten(1), dim=1)

class LPIPS(nn.Module):
    """LPIPS with VGG16 and average pooling, on images resized to 224 if they are smaller than 256.

    pretrained: False leaves VGG16 random, which needs no download (for tests).
    On CUDA in TF32, where `allows_tf32`: emulated, with a random VGG16, distances of 0.05 and 0.004
    agree with float32's to 3e-4 and 5e-4; in bf16 only to 3e-3 and 7e-3, and 4e-5 is half noise.
    Source: CM App. C. Pooling and sizes as in openai's code; the paper does not name the pooling.
    """
    def __init__(self, pretrained=True):
        super().__init__()
        lpips = import_optional("lpips", "--dist lpips needs the packages lpips and torchvision")
        folder = Path(torch.hub.get_dir(), "checkpoints")
        with explain(f"--dist lpips: put VGG16's vgg16-397923af.pth into {folder}, or choose "
                     "another --dist; could not get it otherwise"):
            self.model = lpips.LPIPS(net="vgg", pnet_rand=not pretrained, verbose=False)
        self.model.requires_grad_(False)
        for part in self.model.net.children():
            for name, layer in part.named_children():
                if isinstance(layer, nn.MaxPool2d):
                    setattr(part, name, nn.AvgPool2d(2))

    def forward(self, x, y):
        if x.shape[-1] < 256:
            x = F.interpolate(x, size=(224, 224), mode="bilinear")
            y = F.interpolate(y, size=(224, 224), mode="bilinear")
        return self.model(x, y).flatten()  # (B,1,1,1) -> (B,)

def make_distance(name, device):
    """The distance called l1, l2, norm, huber or lpips. LPIPS' weights are sought only here."""
    if name == "lpips":
        return LPIPS().to(device)
    return {"l1": l1, "l2": l2, "norm": norm, "huber": pseudo_huber}[name]

def edm_loss(net, x0, noise, t, y, cond=None):
    """The denoising loss of each image (B,), weighted by lambda(t) = 1/t^2 + 1/sigma_data^2.

    x0, noise: (B,C,H,W). t: (B,). y, cond: as `denoise`. The mean over pixels; in the source, EDM
    Eq. 8 and Table 1, the sum.
    """
    masks = dropout_masks(net, len(x0))
    D_x = denoise(net, x0 + bcast(t, x0) * noise, t, y, cond, masks)
    return (1 / t**2 + 1 / SIGMA_DATA**2) * l2(D_x, x0)

def weight_one(t_n, t_n1):
    return 1.0

def weight_inverse(t_n, t_n1):
    return 1 / (t_n1 - t_n)

WEIGHTS = {"one": weight_one, "inverse": weight_inverse}  # lambda of an interval: CM, iCT

def dropout_masks(net, n):
    """What `net` keeps of the features of n images, drawn anew: see UNet.draw_masks. None for a
    network without dropout."""
    return net.draw_masks(n) if isinstance(net, UNet) else None

# --------------------------------------------------------------------------------------------------
# Continuous time: the limits N -> infinity of the consistency losses
# --------------------------------------------------------------------------------------------------

BANDWIDTH = 2.5  # of features of t, in rad per unit of ln t: a teacher's loss does not feel the cut
# sCM Alg. 1 and Tables 3 to 6; p_t is CIFAR-10's.
SCM = dict(lr=1e-4, p_t=[-1.0, 1.4], r=1.0, warm_up=10_000, tangent_c=0.1, lr_decay=None)

def cut_time_embedding(net, bandwidth):
    """Cut off, for good, what `net` sees of t in features faster than `bandwidth`, in rad per unit
    of ln t.

    250 ln t in sinusoids of frequency up to 1 turns by 250 rad a unit. A trained network ignores
    such features, but is not smooth in them: nearly all of df/dt is theirs otherwise. Their columns
    of the layer that reads them are zeroed here, and so are the gradients of these from now on.
    Raises UserError if nothing would be left.
    """
    weight = net.time_embed[0].weight  # (4 base, base)
    turns = C_NOISE * net.time_scale * embedding_frequencies(net.base, weight)
    if turns.min() > bandwidth:
        raise UserError(f"--bandwidth {bandwidth:g} would cut all that the network sees of t; the "
                        f"slowest feature turns by {turns.min():.2g} rad per unit of ln t")
    keep = F.pad((turns <= bandwidth).repeat(2), (0, net.base % 2)).float()
    with torch.no_grad():
        weight *= keep
    weight.register_hook(lambda gradient: gradient * keep)

def network_derivative(net, x, t, dx_dt, y=None, cond=None, masks=None, h=1e-3):
    """F(x, t) and dF/dln t along a path through (x, t) with velocity dx_dt, (B,C,H,W) each.

    F: the network, told of t and of x scaled. From two passes at ln t - h and ln t + h, in float32,
    as bf16's three digits are too few: the errors are of order h^2. A training step takes 0.7 of
    one with an exact derivative, compiles, and works with every kernel of attention.
    """
    def F_at(step):
        t_h = t * math.exp(step)
        x_h = x + step * bcast(t, x) * dx_dt
        _, _, c_in = edm_scalings(t_h)
        return net(bcast(c_in, x) * x_h, c_noise(t_h), y, cond, masks, dtype=x.dtype)

    F_0, F_1 = F_at(-h), F_at(h)
    return (F_0 + F_1) / 2, (F_1 - F_0) / (2 * h)

def continuous_loss(net, x_t, t, dx_dt, y, cond, masks, stop_gradient):
    """|df/dt|^2 of each image (B,), the mean over pixels: 0 for a consistency function.

    stop_gradient: differentiate with respect to f but not df/dt, as if a target network supplied
    it: CM's pseudo-objective 2 f . df/dt, which has the same gradient but a value that says
    nothing. Both its branches drop out the same units.
    Source: CM App. B, l2: Theorems 3 (without stop_gradient), 5 and 6, with lambda so that no
    factor is left. The gradients are the limits of those of the discrete losses with weights
    1 / (t_n1 - t_n)^2 and 1 / (t_n1 - t_n).
    """
    scalings, slopes = torch.func.jvp(cm_scalings, (t,), (torch.ones_like(t),))
    c_skip, c_out, _ = (bcast(c, x_t) for c in scalings)
    dc_skip, dc_out, _ = (bcast(dc, x_t) for dc in slopes)
    with torch.set_grad_enabled(not stop_gradient):
        F_x, dF = network_derivative(net, x_t, t, dx_dt, y, cond, masks)
        df_dt = dc_skip * x_t + c_skip * dx_dt + dc_out * F_x + c_out * dF / bcast(t, x_t)
    if not stop_gradient:  # differs from openai's JAX code, which takes the norm, not its square
        return df_dt.square().flatten(1).mean(1)
    f_net = consistency(net, x_t, t, y, cond, masks)
    return l2(f_net, f_net.detach() - df_dt)

def scm_loss(net, x_t, t, dx_dt, y, cond, masks, r, c):
    """sCM's loss of each image (B,), and the rms of its tangent g before it is normalised (B,).

    TrigFlow's x^ is cos(theta) x_t for tan(theta) = t / sigma_data, its F^ is -F, so its target
    F^ + g is F - g here, and its consistency function f is `denoise`, with the end at 0. Then
    g = cos(theta) df/dtheta = R df/dt, R^2 = t^2 + sigma_data^2.
    r: share of g's second term, in [0, 1]. Held below 1, f ends as the mean of the denoiser D along
    the trajectory, over levels of which the share (sin theta_s / sin theta_t)^(1/r - 1) is below s;
    at r = 1 all of it is at 0. c: added to the norm of g, its rms.
    Source: Lu & Song 2024, Alg. 1, without the learned weight, which undoes what c does.
    """
    S = SIGMA_DATA
    R = bcast((t**2 + S**2).sqrt(), x_t)
    c_skip, c_out, c_in = (bcast(scaling, x_t) for scaling in edm_scalings(t))
    with torch.no_grad():
        F_x, dF = network_derivative(net, x_t, t, dx_dt, y, cond, masks)
        F_path = (bcast(t, x_t) * x_t / R - R * dx_dt) / S  # of a denoiser with this dx_dt
        g = S * c_skip * (F_x - F_path) + r * (S * dF - c_skip * c_out / S * x_t)
        rms = g.square().flatten(1).mean(1).sqrt()
        g = g / bcast(rms + c, g)
    F_net = net(c_in * x_t, c_noise(t), y, cond, masks)
    return l2(F_net, F_net.detach() - g), rms

# --------------------------------------------------------------------------------------------------
# Network: the ADM UNet, with the names, shapes and order of operations of the released checkpoints
# --------------------------------------------------------------------------------------------------

class Conv2d(nn.Conv2d):
    """Keeps float32 weights and computes in the dtype of its input."""
    def forward(self, x):
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return self._conv_forward(x, weight, bias)

class GroupNorm32(nn.GroupNorm):
    """32 groups; statistics and affine map in float32, result in the dtype of the input."""
    def __init__(self, channels):
        super().__init__(32, channels)

    def forward(self, x):
        if x.device.type == "cpu":  # its kernel takes bfloat16 with a float32 map: float32 inside
            return super().forward(x)
        return super().forward(x.float()).to(x.dtype)

def zeroed(layer):
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer

def embedding_frequencies(dim, like):
    """(dim // 2,): from 1 down to nearly 1/10000, on the device and in the dtype of `like`."""
    powers = torch.arange(dim // 2, device=like.device, dtype=like.dtype)
    return torch.exp(-math.log(10000) / (dim // 2) * powers)

def sinusoidal_embedding(t, dim):
    """(B,) -> (B,dim): cosines, then sines, of t times the frequencies."""
    angles = t[:, None] * embedding_frequencies(dim, t)
    embedding = torch.cat([angles.cos(), angles.sin()], 1)
    return F.pad(embedding, (0, dim % 2))

class Downsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.op = Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x):
        return self.op(x)

class Upsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0))

class ResBlock(nn.Module):
    """size: of its output, pixels of a side. number: of its dropout mask, set by the UNet."""
    def __init__(self, c_in, c_out, size, emb_dim, dropout, scale_shift, cond, resample=None):
        super().__init__()
        width = 2 * c_out if scale_shift else c_out
        self.scale_shift, self.resample = scale_shift, resample
        self.shape, self.number, self.keep = (c_out, size, size), 0, 1 - dropout
        self.in_layers = nn.Sequential(
            GroupNorm32(c_in), nn.SiLU(), Conv2d(c_in, c_out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_dim, width))
        if cond:  # zero: a net with the second scalar begins as the net without it
            self.emb_layers_s = nn.Sequential(nn.SiLU(), zeroed(nn.Linear(emb_dim, width)))
        self.out_layers = nn.Sequential(
            GroupNorm32(c_out), nn.SiLU(), nn.Identity(),  # where the mask comes in
            zeroed(Conv2d(c_out, c_out, 3, padding=1)))
        self.skip_connection = nn.Identity() if c_in == c_out else Conv2d(c_in, c_out, 1)

    def forward(self, x, emb, emb_s, mask):
        h = self.in_layers[:2](x)
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = self.in_layers[2](h)
        e = self.emb_layers(emb)
        if emb_s is not None:
            e = e + self.emb_layers_s(emb_s)
        e = e.to(h.dtype)[:, :, None, None]  # (B,C) or (B,2C) -> (...,1,1)
        norm, silu, _, conv = self.out_layers
        if self.scale_shift:
            scale, shift = e.chunk(2, 1)
            h = norm(h) * (1 + scale) + shift
        else:
            h = norm(h + e)
        h = silu(h)
        if mask is not None:
            h = h * mask / self.keep
        return self.skip_connection(x) + conv(h)

class AttentionBlock(nn.Module):
    def __init__(self, channels, head_channels):
        super().__init__()
        self.heads = channels // head_channels
        self.norm = GroupNorm32(channels)
        self.qkv = Conv2d(channels, 3 * channels, 1)
        self.proj_out = zeroed(Conv2d(channels, channels, 1))

    def forward(self, x):
        B, C, H, W = x.shape
        width = C // self.heads
        # The 3C channels are q of all heads, k of all heads, v of all heads. They are taken apart
        # channels last: so is their gradient then, and the convolution need not copy it.
        qkv = self.qkv(self.norm(x)).permute(0, 2, 3, 1).reshape(B, H * W, 3, self.heads, width)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # (B,heads,HW,width) each
        if x.device.type == "cpu":  # twice as fast there, forward and backward, as the fused kernel
            attention = torch.softmax((q * width**-0.5) @ k.transpose(2, 3), -1)
            h = attention @ v
        else:
            h = F.scaled_dot_product_attention(q, k, v)
        h = h.transpose(2, 3).reshape(B, C, H, W)
        return x + self.proj_out(h)

class Layers(nn.Sequential):
    """One entry of the encoder, middle or decoder: its residual blocks see embeddings and masks."""
    def forward(self, h, emb, emb_s, masks):
        for layer in self:
            if isinstance(layer, ResBlock):
                mask = None if masks is None else masks[layer.number]
                h = layer(h, emb, emb_s, mask)
            else:
                h = layer(h)
        return h

PARAMETRISATIONS = "skip", "free"  # of a consistency function

class UNet(nn.Module):
    """The ADM UNet F(x, c_noise, y, cond), with the settings of openai's consistency models.

    image_size: pixels of a side. base: channels, times mult at each level. blocks: residual blocks
    a level. attention: sizes of the maps that get it, in heads of head_channels. classes: labels, 0
    for none. scale_shift: the embedding scales and shifts the second norm, otherwise it is added.
    resblock_updown: resample inside residual blocks. cond: room for a second scalar (CTM's s,
    guidance weight w), which at first changes nothing. null: one more label, numbered `classes`,
    for "no label". time_scale: factor on c_noise (1/1000 in old students of NVIDIA's weights).
    parametrisation: of the consistency function that it was trained as, see `consistency`.
    dropout_size: the largest maps that drop out, pixels of a side; 0: all do.
    Raises ValueError if the sizes do not fit each other.
    """
    def __init__(self, image_size, base, mult, blocks, attention, head_channels, classes=0,
                 dropout=0.0, scale_shift=True, resblock_updown=True, cond=False, null=False,
                 time_scale=1.0, channels=3, parametrisation="skip", dropout_size=0):
        super().__init__()
        halvings, widths = len(mult) - 1, [base * m for m in mult]
        if image_size % 2**halvings or image_size < 8:
            raise ValueError(f"{image_size=} does not halve {halvings} times, or is below 8")
        if any(width % 32 or width % head_channels for width in widths):
            raise ValueError(f"widths {widths} are not multiples of 32 and of {head_channels=}")
        if null and not classes:
            raise ValueError("a null label needs other labels beside it")
        if parametrisation not in PARAMETRISATIONS:
            raise ValueError(f"{parametrisation=} is none of {', '.join(PARAMETRISATIONS)}")
        self.image_size, self.base, self.classes, self.cond = image_size, base, classes, cond
        self.null_y, self.time_scale = classes if null else None, time_scale
        self.scale_shift, self.parametrisation = scale_shift, parametrisation
        self.dtype = torch.float32  # of convolutions and attention
        self.layout = torch.contiguous_format
        self.checkpointing = False  # recompute activations in the backward pass: less memory
        self.dropout = dropout
        emb_dim = 4 * base

        def time_mlp():
            first, second = nn.Linear(base, emb_dim), nn.Linear(emb_dim, emb_dim)
            return nn.Sequential(first, nn.SiLU(), second)

        def res(c_in, c_out, size, resample=None):
            return ResBlock(c_in, c_out, size, emb_dim, dropout, scale_shift, cond, resample)

        def attend(size, width):
            return [AttentionBlock(width, head_channels)] if size in attention else []

        self.time_embed = time_mlp()
        if cond:
            self.time_embed_s = time_mlp()
        if classes:
            self.label_emb = nn.Embedding(classes + null, emb_dim)

        size, width = image_size, widths[0]
        first = Conv2d(channels, width, 3, padding=1)
        self.input_blocks = nn.ModuleList([Layers(first)])
        skips = [width]
        for level, wide in enumerate(widths):
            for _ in range(blocks):
                self.input_blocks.append(Layers(res(width, wide, size), *attend(size, wide)))
                width = wide
                skips.append(width)
            if level < halvings:
                size //= 2
                down = res(width, width, size, functools.partial(F.avg_pool2d, kernel_size=2))
                self.input_blocks.append(Layers(down if resblock_updown else Downsample(width)))
                skips.append(width)

        self.middle_block = Layers(res(width, width, size), AttentionBlock(width, head_channels),
                                   res(width, width, size))

        self.output_blocks = nn.ModuleList()
        for level, wide in reversed(list(enumerate(widths))):
            for i in range(blocks + 1):
                layers = [res(width + skips.pop(), wide, size), *attend(size, wide)]
                width = wide
                if level > 0 and i == blocks:
                    size *= 2
                    up = res(width, width, size, functools.partial(F.interpolate, scale_factor=2.0))
                    layers.append(up if resblock_updown else Upsample(width))
                self.output_blocks.append(Layers(*layers))
        head = zeroed(Conv2d(width, channels, 3, padding=1))
        self.out = nn.Sequential(GroupNorm32(width), nn.SiLU(), head)

        blocks = [module for module in self.modules() if isinstance(module, ResBlock)]
        self.block_shapes = [block.shape for block in blocks]  # (C,H,W) each
        for number, block in enumerate(blocks):
            block.number = number
        smallest = min(shape[2] for shape in self.block_shapes)
        if 0 < dropout_size < smallest:
            raise ValueError(f"{dropout_size=}: the smallest map has {smallest} pixels, so none "
                             "would drop out")
        self.dropout_size = dropout_size or image_size

    def draw_masks(self, n):
        """What dropout keeps of n images: for each residual block (n,C,H,W) bool, or None where its
        map is larger than dropout_size; None if nothing drops out.

        An argument of `forward`, so that several passes can share them, and drawn outside it, as
        what torch.compile makes of a random number depends on the graph around it.
        """
        if self.dropout == 0 or not self.training:
            return None
        device = next(self.parameters()).device
        masks = []
        for shape in self.block_shapes:
            if shape[2] > self.dropout_size:
                masks.append(None)
                continue
            u = torch.empty(n, *shape, device=device, memory_format=self.layout).uniform_()
            masks.append(u >= self.dropout)
        return masks

    def forward(self, x, c_noise, y=None, cond=None, masks=None, dtype=None):
        """x (B,C,H,W) float32, c_noise (B,), y (B,) iff `classes`, cond (B,) iff `cond` -> like x.

        masks: of `draw_masks`; needed in training mode with dropout. Convolutions and attention run
        in `dtype`, by default self.dtype; embeddings, norms and the head in float32, their products
        on CUDA in TF32 where `allows_tf32`.
        """
        assert (y is not None) == (self.classes > 0), "labels do not fit the net"
        assert (cond is not None) == self.cond, "the second scalar does not fit the net"
        drops = self.dropout > 0 and self.training
        assert (masks is not None) == drops, "dropout masks are for training with dropout"
        emb = self.time_embed(sinusoidal_embedding(c_noise * self.time_scale, self.base))
        if y is not None:
            emb = emb + self.label_emb(y)
        emb_s = None
        if self.cond:
            emb_s = self.time_embed_s(sinusoidal_embedding(cond, self.base))

        def run(block, h):
            if self.checkpointing and torch.is_grad_enabled():
                return checkpoint(block, h, emb, emb_s, masks, use_reentrant=False,
                                  preserve_rng_state=False)  # nothing random inside
            return block(h, emb, emb_s, masks)

        h = x.to(dtype or self.dtype)
        skips = []
        for block in self.input_blocks:
            h = run(block, h)
            skips.append(h)
        h = run(self.middle_block, h)
        for block in self.output_blocks:
            h = run(block, torch.cat([h, skips.pop()], 1))
        return self.out(h.to(x.dtype))

# Settings of the named networks; `--net NAME KEY=VALUE ...` changes single ones. imagenet64 and
# lsun256 are those of the released checkpoints. The papers' CIFAR-10 net is an NCSN++; cifar10 here
# is the ADM net of its depth and width.
NETS = {
    "glyphs": dict(image_size=16, base=32, mult=(1, 2, 2), blocks=1,
                   attention=(), head_channels=32, resblock_updown=False),
    "mnist": dict(image_size=28, base=32, mult=(1, 2, 2), blocks=1,
                  attention=(), head_channels=32, resblock_updown=False),
    "cifar-small": dict(image_size=32, base=64, mult=(1, 2, 2), blocks=2,
                        attention=(16,), head_channels=32),
    "cifar10": dict(image_size=32, base=128, mult=(2, 2, 2), blocks=4,
                    attention=(16,), head_channels=64),
    "imagenet64": dict(image_size=64, base=192, mult=(1, 2, 3, 4), blocks=3,
                       attention=(32, 16, 8), head_channels=64),
    "lsun256": dict(image_size=256, base=256, mult=(1, 1, 2, 2, 4, 4), blocks=2,
                    attention=(32, 16, 8), head_channels=64, scale_shift=False),
}

def parse_like(example, text):
    """`text` as a value of the example's type: ints between commas, true or false, a number."""
    if isinstance(example, tuple):
        return tuple(int(word) for word in text.split(",") if word)
    if isinstance(example, bool):
        return {"true": True, "false": False}[text]
    return type(example)(text)

def net_settings(words):
    """The model arguments that `--net NAME KEY=VALUE ...` asks for. Raises UserError."""
    name, *changes = words
    if name not in NETS:
        raise UserError(f"--net {name}: not one of {', '.join(NETS)}")
    settings = dict(scale_shift=True, resblock_updown=True) | NETS[name]
    for change in changes:
        key, _, value = change.partition("=")
        if key not in settings:
            raise UserError(f"--net {change}: the keys are {', '.join(settings)}")
        like = f"{key}={show_value(settings[key])}"
        try:
            settings[key] = parse_like(settings[key], value)
        except (ValueError, KeyError):
            raise UserError(f"--net {change}: {key} is like {like}") from None
    maps = [settings["image_size"] // 2**level for level in range(len(settings["mult"]))]
    lost = [size for size in settings["attention"] if size not in maps]
    if lost:
        raise UserError(f"--net: attention={lost[0]} does nothing, the maps have "
                        f"{show_value(tuple(maps))} pixels: name some of these, or attention= for "
                        "none but the middle's")
    return settings

def make_net(settings):
    """The UNet of these settings. Raises UserError if they do not fit each other."""
    with explain("--net"):
        return UNet(**settings)

@torch.no_grad()
def ema_update(average, net, decay):
    """average <- decay * average + (1 - decay) * net, in one fused call; decay 0 copies."""
    old, new = list(average.parameters()), list(net.parameters())
    torch._foreach_lerp_(old, new, 1 - decay)

# --------------------------------------------------------------------------------------------------
# Errors and files
# --------------------------------------------------------------------------------------------------

class UserError(Exception):
    """Something the user can put right: the scripts print it as one line, with exit code 2."""

ranks_differ = False  # once they run, each process meets its own errors; until then all the same
bars = []  # the progress bars on the screen, which an error message closes

def progress_bar(*iterable, **settings):
    from tqdm import tqdm
    bars.append(tqdm(*iterable, dynamic_ncols=True, **settings))
    return bars[-1]

def one_line_errors(kind, error, trace):
    """An excepthook: a UserError, a GPU that is full, a compiler that is not there are one line and
    exit code 2, Ctrl-C one and 130."""
    dynamo = sys.modules.get("torch._dynamo.exc")  # imported by what compiles alone
    code = 2
    if issubclass(kind, KeyboardInterrupt):
        error, code = "interrupted", 128 + signal.SIGINT
    elif issubclass(kind, torch.OutOfMemoryError):
        error = f"out of memory, lower --micro-batch: {first_line(error)}"
    elif dynamo is not None and issubclass(kind, dynamo.TorchDynamoException):
        cause = getattr(error, "inner_exception", error)
        error = f"torch.compile fails, --no-compile does without: {first_line(cause)}"
    elif not issubclass(kind, UserError):
        return sys.__excepthook__(kind, error, trace)
    rank = environ("RANK")
    alone = "MASTER_ADDR" not in os.environ  # a LOCAL_RANK is left over, then
    if ranks_differ or alone or environ("LOCAL_RANK") == 0:
        for bar in bars:
            bar.close()
        where = f"rank {rank}: " if rank else ""
        print(f"{Path(sys.argv[0]).name}: error: {where}{last_line(error)}", file=sys.stderr,
              flush=True)
    raise SystemExit(code)

def last_line(error):
    """What a UserError says, after the traceback of a loader's worker if it comes from one."""
    return str(error).strip().splitlines()[-1].removeprefix("common.UserError: ")

def first_line(error):
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].split(" <_io.")[0]  # Pillow names the object it read from

@contextlib.contextmanager
def explain(what):
    """Whatever goes wrong inside becomes a UserError: damaged files surface in many ways."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        name = str(getattr(error, "filename", None) or "")
        if name not in what:
            reason += f": {name}"
        raise UserError(f"{what}: {reason}") from error

def import_optional(name, need):
    """Import a package of an optional feature. Raises UserError that begins with `need`."""
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:  # a torchvision built for another torch
        raise UserError(f"{need} (pip install {name}), and a torchvision, if any, built for torch "
                        f"{torch.__version__}: {first_line(error)}") from error

def import_beside(name, need):
    """Import cd.py, or a file of tests/. Raises UserError that begins with `need`."""
    if name in ("evaluate", "judge"):
        sys.path.insert(0, str(Path(__file__).parent / "tests"))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UserError(f"{need}, which must lie beside this script: {error}") from error

@contextlib.contextmanager
def atomic_file(path, mode="wb", later=None):
    """Open a file that appears at `path` whole or not at all; what stood there stays till then.

    later: a dictionary that receives path: temporary name, for the caller to rename it; or None.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}.tmp")  # one a writer
    try:
        with open(temporary, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if later is None:
            os.replace(temporary, path)
        else:
            later[path] = temporary
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        cause = error if isinstance(error, OSError) else error.__context__ or error
        reason = getattr(cause, "strerror", None) or cause
        raise UserError(f"cannot write {path}: {reason}") from error
    finally:
        if later is None or path not in later:
            temporary.unlink(missing_ok=True)

# --------------------------------------------------------------------------------------------------
# Data: uint8 until it is on the device. A data set answers len() and __getitems__(indices) with a
# batch (images (b,C,H,W) uint8, labels (b,) int64); `labels` is an (n,) int64 array or None, and
# `classes` their number, 0 without labels. What does not fit is a UserError that names the file.
# --------------------------------------------------------------------------------------------------

def glyphs(n, seed, size=16):
    """n coloured digits in Pillow's font: shifted, turned, slanted, stretched, light on dark.

    Returns: images (n,size,size,3) uint8, labels (n,) int64, the digits. Pure in its arguments.
    """
    from PIL import Image, ImageDraw, ImageFont
    font, big = ImageFont.load_default(60), 4 * size  # drawn four times as large, then averaged
    digits = []
    for digit in "0123456789":
        digits.append(Image.new("L", (64, 64)))
        pen = ImageDraw.Draw(digits[-1])
        pen.text((32, 32), digit, fill=255, font=font, anchor="mm", stroke_width=2)

    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 10, n)
    turn = rng.uniform(-0.2, 0.2, n)  # radians
    slant = rng.uniform(-0.2, 0.2, n)  # dx/dy
    wide = rng.uniform(0.8, 1.15, n)
    high = rng.uniform(0.85, 1.15, n)
    shift = rng.uniform(-0.08, 0.08, (n, 2)) * 64
    hue = rng.uniform(0, 1, (n, 2))
    saturation = rng.uniform(0, 0.8, (n, 2))
    value = rng.uniform((0, 0.8), (0.35, 1), (n, 2))  # back, front
    hsv = np.stack([hue, saturation, value], 2)

    images = np.empty((n, size, size, 3), np.uint8)
    for i in range(n):
        # Output pixel -> page: the inverse of stretch, slant, turn, shift, about both middles.
        cos, sin = math.cos(turn[i]), math.sin(turn[i])
        turned = np.array([[cos, sin], [-sin, cos]]) * (64 / big)
        slanted = np.array([[1, slant[i]], [0, 1]])
        A = np.diag([1 / wide[i], 1 / high[i]]) @ slanted @ turned
        b = 32 - A @ np.full(2, big / 2) - shift[i]
        affine = *A[0], b[0], *A[1], b[1]
        mask = digits[labels[i]].transform((big, big), Image.Transform.AFFINE, affine,
                                           Image.Resampling.BILINEAR)
        m = np.asarray(mask.reduce(4), np.float64)[:, :, None] / 255
        back, front = (np.array(colorsys.hsv_to_rgb(*colour)) for colour in hsv[i])
        images[i] = np.round(255 * (back + m * (front - back)))
    return images, labels

ORIENTATION = 0x0112  # the EXIF tag: how a camera was held, 1 upright

def upright(image):
    """A Pillow image, turned and mirrored as its EXIF orientation says."""
    from PIL import ImageOps
    with contextlib.suppress(Exception):  # a damaged EXIF says nothing
        if image.getexif().get(ORIENTATION, 1) != 1:
            return ImageOps.exif_transpose(image)
    return image

def is_transparent(image):
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info

def to_rgb(image, source):
    """A Pillow image as RGB of 8 bits, what is transparent on white. Raises UserError where the
    range of its numbers is not known."""
    from PIL import Image
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        if is_transparent(image):
            raise UserError(f"{source} is grey of 16 bits with a transparent value: save it with 8")
        grey = np.asarray(image).clip(0, 65535) / 257
    elif image.mode == "I":
        raise UserError(f"{source} has integers of 32 bits, whose range is not known: save it with "
                        "8 or 16")
    elif image.mode == "F":
        grey = 255 * np.asarray(image)
        if not (grey.min() >= 0 and grey.max() <= 255):  # nor is it if there is a NaN
            raise UserError(f"{source} has floating-point numbers that are not all in [0, 1]: save "
                            "it with integers of 8 or 16 bits")
    elif is_transparent(image):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    else:
        return image.convert("RGB")
    return Image.fromarray(grey.round().astype(np.uint8)).convert("RGB")

def fit_image(image, size, source):
    """A Pillow image as (size,size,3) uint8 RGB, upright, what is transparent on white, shrunk to
    `size` on its short side and cropped.

    As ADM does: halve with a box filter while twice too large, then bicubic.
    """
    from PIL import Image
    image = to_rgb(upright(image), source)
    if min(image.size) < size:
        raise UserError(f"{source} is {image.width}x{image.height}, smaller than the network's "
                        f"{size} pixels")
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    scaled = round(image.width * scale), round(image.height * scale)
    image = image.resize(scaled, Image.Resampling.BICUBIC)
    left, above = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image)[above:above + size, left:left + size]

LOOKED_AT = 16  # images whose sizes are reported

def listed(words, most=4):
    """The first of the words, as a text."""
    return ", ".join([*map(str, words[:most]), *[".."] * (len(words) > most)])

class Images:
    """n images of `size` pixels: `read(i)` gives one, (size,size,3) uint8.

    names: of the classes, in the order of the labels, or None. present: the labels that occur.
    notes: what was left out, and why. files: their names, if they have any. own_order: the classes
    are in another order than networks of others have them.
    """
    files, own_order = (), False

    def __init__(self, n, labels, size, source, names=None, notes=()):
        self.n, self.size, self.source, self.notes = n, size, source, notes
        self.labels, self.names, self.classes, self.present = None, None, 0, []
        if labels is not None:
            labels = np.asarray(labels)
            whole = labels.dtype.kind in "iu"
            if labels.shape != (n,) or not whole or labels.min() < 0:
                raise UserError(f"{source}: the labels must be {n} integers, none negative, and "
                                f"are {labels.dtype} of shape {labels.shape}")
            highest = int(labels.max())
            if highest >= max(n, 1000):  # each class takes memory; 1000: a few images of ImageNet
                raise UserError(f"{source} has a label {highest}, far beyond its {n} images: "
                                "number the classes 0, 1, 2, ..")
            if names is not None and highest >= len(names):
                raise UserError(f"{source} has a label {highest}, and {len(names)} class names")
            self.labels, self.names = labels.astype(np.int64), names
            self.classes = len(names or range(highest + 1))
            self.present = np.unique(self.labels).tolist()

    def __len__(self):
        return self.n

    def describe(self):
        """What it is, in one line."""
        sizes = sorted(self.some_sizes(), key=math.prod)
        ends = dict.fromkeys(f"{width}x{height}" for width, height in sizes[:1] + sizes[-1:])
        pixels = f"{' to '.join(ends) or '?'} pixels"
        if len(self.files) > LOOKED_AT:
            pixels += f" (of {LOOKED_AT} looked at)"
        classes = "no labels"
        if self.classes:
            classes = f"{self.classes} class{'es' * (self.classes > 1)}"
            if len(self.present) < self.classes:
                classes += f", of which {len(self.present)} occur"
            names = self.names or range(self.classes)
            classes += f": {listed([names[label] for label in self.present])}"
        line = f"{self.source}: {self.n:,} images of {pixels}, {classes}"
        line = "; ".join([line, *self.notes])
        return line.encode(errors="replace").decode()  # of a name that is no text

    def summary(self):
        """What a checkpoint remembers of it."""
        digest = hashlib.sha256(np.array(self.files).tobytes())
        if self.classes:
            digest.update(self.labels.tobytes())
        return dict(n=self.n, names=self.names, present=self.present,
                    digest=digest.hexdigest()[:12])

    def __getitems__(self, indices):
        images = np.stack([self.read(int(i)) for i in indices])  # (b,H,W,3)
        labels = np.zeros(len(images), np.int64)
        if self.labels is not None:
            labels = self.labels[indices]
        images = images.transpose(0, 3, 1, 2).copy()
        return torch.from_numpy(images), torch.from_numpy(labels)

def stamp(file):
    """(inode, size, time of the last change); None if there is no such file."""
    with contextlib.suppress(OSError):
        status = os.stat(file)
        return status.st_ino, status.st_size, status.st_mtime_ns

class ArrayImages(Images):
    """Images in arrays (n,H,W,3) uint8, one after the other: in memory or memory-mapped."""
    def __init__(self, parts, labels, size, source, names=None, notes=()):
        self.parts, self.ends = parts, np.cumsum([len(part) for part in parts])
        self.stamps = {part.filename: stamp(part.filename)
                       for part in parts if isinstance(part, np.memmap)}
        super().__init__(int(self.ends[-1]), labels, size, source, names, notes)

    def some_sizes(self):
        """(width, height) of the images."""
        return [part.shape[2:0:-1] for part in self.parts]

    def check(self):
        """Raises UserError if the images are smaller than the network's."""
        for width, height in self.some_sizes():
            if min(width, height) < self.size:
                raise UserError(f"{self.source} has images of {width}x{height} pixels, smaller "
                                f"than the network's {self.size}")

    def __getitems__(self, indices):
        for file, before in self.stamps.items():
            now = stamp(file)
            if now and now != before and now[0] == before[0]:  # one moved into its place is another
                raise UserError(f"{file} was overwritten while it is in use: to replace it, move "
                                "another into its place")
        return super().__getitems__(indices)

    def read(self, i):
        from PIL import Image
        part = int(np.searchsorted(self.ends, i, side="right"))
        image = np.asarray(self.parts[part][i - self.ends[part]])  # counted from the part's end
        if image.shape == (self.size, self.size, 3):
            return image
        image = Image.fromarray(np.ascontiguousarray(image))
        return fit_image(image, self.size, f"{self.source}: image {i}")

class FileImages(Images):
    """Image files of a folder or a zip, decoded when asked for."""
    def __init__(self, source, files, labels, size, names=None, notes=()):
        self.files = np.array([os.fsencode(name) for name in files])  # bytes: compact, and shared
        super().__init__(len(files), labels, size, source, names, notes)

    def some_sizes(self):
        """(width, height) of LOOKED_AT of the images, by their headers."""
        from PIL import Image
        sizes = []
        for name in self.files[::math.ceil(self.n / LOOKED_AT)]:
            with contextlib.suppress(Exception):  # an unreadable one is named when it is read
                file = io.BytesIO(read_file(self.source, os.fsdecode(name)))
                sizes.append(Image.open(file).size)
        return sizes

    def check(self):
        """Look at the header of each file, 0.1 ms on a local disk. Raises UserError that names
        those that are empty, no images, or smaller than the network's."""
        with ThreadPoolExecutor(16) as pool:
            problems = pool.map(self.problem, range(self.n))
            refuse_images(self.source, self.n, filter(None, progress_bar(
                problems, total=self.n, unit="file", leave=False, disable=self.n < 20000)))

    def problem(self, i):
        """What is wrong with file i, by its header, in words; None if nothing is."""
        from PIL import Image
        name = os.fsdecode(self.files[i])
        try:
            with open_file(self.source, name) as file:
                if not file.read(1):
                    return f"{name} is empty"
                file.seek(0)
                with Image.open(file) as image:
                    if min(image.size) >= self.size:
                        return None
                    return (f"{name} is {image.width}x{image.height}, smaller than the network's "
                            f"{self.size} pixels")
        except Exception as error:  # damage surfaces in many ways
            return f"{name} cannot be read as an image: {first_line(error)}"

    def read(self, i):
        name = os.fsdecode(self.files[i])
        with explain(f"{self.source}/{name} cannot be read as an image"):
            with open_image(io.BytesIO(read_file(self.source, name))) as image:
                return fit_image(image, self.size, f"{self.source}/{name}")

@functools.lru_cache(1)
def open_zip(path, pid):  # one handle a process: forked ones would share their place in the file
    return zipfile.ZipFile(path)

def open_file(source, name):
    """A file of a folder or zip, open to be read."""
    if source.is_file():
        return open_zip(source, os.getpid()).open(name)
    return open(source / name, "rb")

def read_file(source, name):
    """A file's bytes, of a folder or zip."""
    with open_file(source, name) as file:
        return file.read()

def open_image(file):
    """The Pillow image of an open file; a PNG's checksums, which decoding leaves out, are right."""
    from PIL import Image
    image = Image.open(file)
    if image.format == "PNG":
        image.verify()  # 0.04 ms at 64 pixels; the image is of no use afterwards
        file.seek(0)
        image = Image.open(file)
    return image

def refuse_images(source, n, problems):
    """Raises UserError if there are `problems`, texts, with some of its n images."""
    problems = list(problems)
    if problems:
        raise UserError(f"{source}: {len(problems):,} of {n:,} images cannot be used: "
                        f"{listed(problems, 10)}; mend or remove them")

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".avif", ".bmp", ".gif", ".tif",
                  ".tiff", ".ppm", ".pgm")
SPLIT = re.compile("(train(ing)?|val(id|idation)?|dev|test(ing)?)[-_ ]?(set|images|data|[0-9]*)",
                   re.IGNORECASE)
FOREIGN = {  # files that are no images, by their names: what they are, and the way from there
    "data.mdb": "LSUN's lmdb: EDM's dataset_tool.py makes a zip of it",
    "data_batch_1 cifar-10-*.tar.gz": "CIFAR-10 as an archive or as pickles, which are never read: "
    "--dataset cifar10, without --data-dir, fetches it as plain bytes",
    "*idx?-ubyte*": "MNIST's: --dataset mnist reads its four files *.gz in the folder that "
    "--data-dir names, and fetches them into an empty one",
    "*.tar *.tar.gz *.tgz": "a tar: unpack it, that of a class into a folder of the class's name, "
    "and name the folder of those",
    "*.pkl *.pickle": "a pickle, which could run code and is never read. If it is EDM2's, and "
    "you trust it: np.savez('x.npz', **pickle.load(open('x.pkl', 'rb'))['fid']) writes an .npz",
    "train_data_batch_*.npz": "ImageNet-64 in official batches: --dataset imagenet64 reads them, "
    "with --data-dir for their folder",
    "*.npz *.npy": "arrays: name the file itself",
}

def is_hidden(name):
    return any(part.startswith((".", "__MACOSX")) for part in name.split("/"))

def is_image(name):
    return name.lower().endswith(IMAGE_SUFFIXES) and not is_hidden(name)

def count_kinds(files):
    """How many files there are, and of which suffixes, in words."""
    kinds = sorted({Path(name).suffix or Path(name).name for name in files})
    return f"{len(files):,} file{'s' * (len(files) > 1)} ({listed(kinds)})"

def what_it_is(files):
    """What files that are no images are, and the way from there, in words; "" if not known."""
    names = [name.rpartition("/")[2] for name in files]
    return next((what for patterns, what in FOREIGN.items() for pattern in patterns.split()
                 if fnmatch.filter(names, pattern)), "")

def list_folder(source):
    """The paths of the files below a folder, and of the folders, which end in a /. Links are
    followed. Raises UserError if one leads nowhere, or to a folder that is there already."""
    paths, pending = [], [""]
    seen = {folder: folder for folder in Path(os.path.realpath(source)).parents}
    while pending:
        folder = pending.pop()
        real = Path(os.path.realpath(source / folder))
        if real in seen:
            raise UserError(f"{source / folder} is {seen[real]} once more, by a link: its images "
                            "would count twice; delete the link")
        seen[real] = source / folder
        for entry in os.scandir(source / folder):
            path = folder + entry.name
            if is_hidden(entry.name):
                continue
            if entry.is_dir():
                path += "/"
                pending.append(path)
            elif entry.is_symlink() and not entry.is_file():
                raise UserError(f"{source / path} is a link to nothing: mend it, or delete it")
            paths.append(path)
    return paths

def top_folder(paths):
    """The folder that a data set lies in if its `source` holds nothing else: "set/", say, or ""."""
    folders = {path.split("/")[0] for path in paths if "/" in path}
    loose = [path for path in paths if "/" not in path]
    if len(folders) != 1 or "dataset.json" in loose or any(map(is_image, loose)):
        return ""
    folder, = folders
    inside = [path.removeprefix(f"{folder}/") for path in paths if path.startswith(f"{folder}/")]
    loose = [path for path in inside if "/" not in path]
    one_class = any(map(is_image, loose)) and "dataset.json" not in loose
    if one_class and not SPLIT.fullmatch(folder):
        return ""
    return f"{folder}/{top_folder(inside)}"

def naming(flag, source, folder):
    """How a folder of a data set is named on the command line."""
    return f"{flag} {source}/{folder}" if source.is_dir() else f"{flag} with a zip of {folder}"

def classes_of_folders(source, images, folders, flag):
    """The names of the classes, and the labels of `images`, which lie in `folders`, one a class.
    Raises UserError if the folders are something else."""
    class_of = [name.split("/")[0] for name in images]
    names = sorted(set(class_of))
    homes = {name.rpartition("/")[0] for name in images}
    unlabelled = 'put a dataset.json there, {"labels": null} or {"labels": [["a/b.png", 0], ..]}'
    splits = list(filter(SPLIT.fullmatch, names))
    if len(splits) > 1 or splits == names:
        training = [name for name in splits if "train" in name.lower()] or splits
        raise UserError(f"{source} holds splits, no classes ({listed(names)}): "
                        f"{naming(flag, source, training[0])}")
    if all(name.isdecimal() and len(name) >= 5 for name in names):
        raise UserError(f"{source}: {listed(names)} look like parts of a set without classes: "
                        f"{unlabelled}; call classes otherwise")
    if all("/" in home for home in homes) and len(homes) > len(names):
        raise UserError(f"{source} holds folders of folders ({listed(sorted(homes))}): which are "
                        f"classes? {naming(flag, source, names[0])}, or {unlabelled}")
    empty = sorted(folders.difference(names))
    if empty:
        raise UserError(f"{source}/{empty[0]} holds no images, and later classes would get its "
                        "label: fill it, or delete it")
    names.sort(key=lambda name: int(name) if name.isdecimal() else math.inf)  # 10 comes after 9
    label_of = {name: label for label, name in enumerate(names)}
    return names, [label_of[name] for name in class_of]

def load_files(source, size, flag="--dataset"):
    """A folder or zip of images, labelled by `dataset.json` (EDM's layout) or by sub-folders.
    flag: which named it."""
    from PIL import features
    if source.is_file():
        one = is_image(source.name)
        what = "one image: name a folder of images" if one else what_it_is([source.name])
        if what:
            raise UserError(f"{source} is {what}")
    with explain(f"{source} cannot be read"):
        if source.is_file():
            names = open_zip(source, os.getpid()).namelist()
            paths = sorted({name for name in names if not is_hidden(name)})
        else:
            paths = sorted(list_folder(source))
        top = top_folder(paths)
        place = source / top
        inside = [path.removeprefix(top) for path in paths if path.startswith(top)]
        index = read_file(source, f"{top}dataset.json") if "dataset.json" in inside else None
    images = list(filter(is_image, inside))
    others = [path for path in paths if not is_image(path)
              and not path.endswith("/") and path != f"{top}dataset.json"]
    if not images:
        found = what_it_is(others) or (count_kinds(others) if others else "nothing")
        raise UserError(f"{source} holds no images ({', '.join(IMAGE_SUFFIXES)}), but {found}")
    if any(name.lower().endswith(".avif") for name in images) and not features.check("avif"):
        raise UserError(f"{source} holds .avif images, which need pillow 11.3 or newer")
    labels = names = None
    notes = [f"all of it in {top}"] if top else []
    folders = {path.split("/")[0] for path in inside if "/" in path}
    loose = [name for name in images if "/" not in name]
    nested = [path for path in inside if path.endswith("/dataset.json")]
    if index is not None:
        with explain(f"{place}/dataset.json does not list an integer label for each image"):
            pairs = json.loads(index)["labels"]
            if pairs is not None:
                label_of = dict(pairs)
                labels = [label_of[name] for name in images]
                wrong = [label for label in labels if type(label) is not int]
                if wrong:
                    raise ValueError(f"label {wrong[0]!r}")
                if len(label_of) > len(images):
                    notes.append(f"{len(label_of) - len(images):,} in dataset.json have no file")
    elif nested:
        folder = nested[0].removesuffix("/dataset.json")
        raise UserError(f"{place}/{nested[0]} is of that folder alone: "
                        f"{naming(flag, place, folder)}")
    elif len(loose) == len(images):
        words = sorted({name.partition("_")[0] for name in images})  # ADM takes them for classes
        if all("_" in name for name in images) and 1 < len(words) <= len(images) / 2:
            notes.append(f"{listed(words)} are classes if each is moved into a folder of its own")
    elif loose:
        raise UserError(f"{place}/{loose[0]} has no label: other images lie in sub-folders, one "
                        "for each class")
    else:
        names, labels = classes_of_folders(place, images, folders, flag)
        if any(name.count("/") > 1 for name in images):
            notes.append("folders within a class belong to it")
    if others:
        notes.append(f"skipped {count_kinds(others)}")
    files = [top + name for name in images]
    return FileImages(source, files, labels, size, names, notes)

def read_header(file):
    """Of an open .npy: shape, is it in Fortran's order, dtype; `file` is at its numbers then."""
    version, _ = np.lib.format.read_magic(file)
    shape, fortran, dtype = getattr(np.lib.format, f"read_array_header_{version}_0")(file)
    if dtype.hasobject:
        raise ValueError("it holds pickled objects")
    return shape, fortran, dtype

def reading(path, key):
    """What goes wrong with a .npy, or with an array of an .npz, becomes a UserError."""
    kind = "an array" if key is None else f"an npz with {key}"
    return explain(f"{path} cannot be read as {kind}")

def header_of(path, key=None):
    """Shape and dtype of a .npy, or of one array of an .npz."""
    with reading(path, key):
        if key is None:
            with open(path, "rb") as file:
                shape, _, dtype = read_header(file)
        else:
            with zipfile.ZipFile(path) as archive, archive.open(f"{key}.npy") as file:
                shape, _, dtype = read_header(file)
        return shape, dtype

def map_array(path, key=None, cache_dir=None):
    """Memory-map a .npy, or one array of an .npz; a compressed one is unpacked first, see
    `unpacked`."""
    with reading(path, key):
        member = None
        if key is not None:
            with zipfile.ZipFile(path) as archive:
                member = archive.getinfo(f"{key}.npy")
            if member.compress_type != zipfile.ZIP_STORED:
                path, member = unpacked(path, member, cache_dir), None
        with open(path, "rb") as file:
            length = os.fstat(file.fileno()).st_size
            if member is not None:  # 30 bytes, then name and extra field, of these lengths
                file.seek(member.header_offset + 26)
                lengths = np.frombuffer(file.read(4), "<u2")
                file.seek(lengths.sum(dtype=int), os.SEEK_CUR)
                length = file.tell() + member.file_size
            shape, fortran, dtype = read_header(file)
            if file.tell() + math.prod(shape) * dtype.itemsize != length:
                raise ValueError(f"it has not the length of {dtype} {shape}")
            return np.memmap(file, dtype, "r", file.tell(), shape, "F" if fortran else "C")

def unpacked(path, member, cache_dir=None):
    """The file that a member of an .npz was unpacked into, once: in `cache_dir`, by default in
    .unpacked beside it, or in the user's cache where that cannot be written.

    Its name holds the checksum of the member, and it appears whole or not at all: runs may unpack
    at the same time, and another .npz in the place of the first is unpacked into another file.
    """
    name = f"{path.stem}.{member.filename.removesuffix('.npy')}.{member.CRC:08x}.npy"
    user = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    folders = [path.parent / ".unpacked", user / "few-step-diffusion"]
    if cache_dir:
        folders = [Path(cache_dir)]
    for folder in folders:
        file = folder / name
        if file.exists() and file.stat().st_size == member.file_size:
            return file
    with zipfile.ZipFile(path) as archive, archive.open(member) as source:
        read_header(source)  # of objects nothing is unpacked
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with zipfile.ZipFile(path) as archive, archive.open(member) as source, \
                    atomic_file(folder / name) as target:
                shutil.copyfileobj(source, target, 1 << 24)  # checks the checksum at its end
            return folder / name
        except (OSError, UserError) as error:
            problem = error
    raise UserError(f"{path} has to be unpacked: {first_line(problem)}; name a --cache-dir")

IMAGE_KEYS = "arr_0", "images", "x", "data", "x_train"
LABEL_KEYS = "arr_1", "labels", "label", "targets", "y", "y_train"
NAME_KEYS = "class_names",

def one_key(path, keys, wanted):
    """The one of the keys of an npz that is `wanted`, or None."""
    found = [key for key in keys if key.lower() in wanted]
    if len(found) > 1:
        raise UserError(f"{path}: {' and '.join(found)} could both be meant: leave one of them out")
    return found[0] if found else None

def load_arrays(path, size, cache_dir=None):
    """A .npy of images, or an .npz: images, labels and names of classes by IMAGE_KEYS and so on."""
    key = labels_key = names_key = labels = names = None
    keys, notes = [], []
    if path.suffix == ".npz":
        with explain(f"{path} cannot be read as an npz"), zipfile.ZipFile(path) as archive:
            keys = [name.removesuffix(".npy") for name in archive.namelist()]
        key, labels_key, names_key = (one_key(path, keys, wanted)
                                      for wanted in (IMAGE_KEYS, LABEL_KEYS, NAME_KEYS))
        if key is None:
            raise UserError(f"{path} holds {', '.join(keys)}: call the images arr_0, labels arr_1")
    shape, dtype = header_of(path, key)
    channels = 1, 3, 4
    grey = len(shape) == 3
    planar = len(shape) == 4 and shape[3] not in channels
    shaped = grey or (len(shape) == 4 and (shape[1] if planar else shape[3]) in channels)
    if dtype != np.uint8 or not shaped or shape[0] == 0:  # before anything is unpacked
        raise UserError(f"{path}: images must be uint8 of shape (n, height, width, 3), got "
                        f"{dtype} {shape}")
    if labels_key:
        labels = map_array(path, labels_key, cache_dir)
    if labels_key and names_key:
        names = map_array(path, names_key, cache_dir)
        if names.dtype.kind != "U" or names.ndim != 1:
            raise UserError(f"{path}: {names_key} must be the names of the classes, and are "
                            f"{names.dtype} of shape {names.shape}")
        names = names.tolist()
    unused = [name for name in keys if name not in (key, labels_key, names_key)]
    if unused:
        notes.append(f"neither images nor labels: {listed(unused)}")
    images = map_array(path, key, cache_dir)
    if grey:
        images = images[..., None]
    if planar:
        images = images.transpose(0, 2, 3, 1)
    if images.shape[3] == 1:  # grey
        images = np.broadcast_to(images, (*images.shape[:3], 3), subok=True)
    return ArrayImages([images], labels, size, path, names, notes)

FETCHED = {  # data sets: where their files are, and the MD5 of each
    "mnist": ("https://ossci-datasets.s3.amazonaws.com/mnist/", {
        "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
        "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
        "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c"}),
    "cifar10": ("https://www.cs.toronto.edu/~kriz/", {
        "cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530"}),
}
CIFAR10_NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship",
                 "truck"]

def fetch(name, folder):
    """{path: contents} of the files of a data set of FETCHED; what `folder` lacks is fetched.
    Raises UserError if it cannot be, or is damaged."""
    url, md5s = FETCHED[name]
    contents = {}
    for file, md5 in md5s.items():
        path = folder / file
        if not path.exists():
            with explain(f"--dataset {name}: put {url}{file} into {folder}, or name other images "
                         "with --data-dir; it cannot be fetched"):
                folder.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(url + file, str(path))
        contents[path] = path.read_bytes()
        if hashlib.md5(contents[path]).hexdigest() != md5:
            raise UserError(f"{path} is damaged (MD5): delete it, and it is fetched again")
    return contents

def is_fetched(data_dir):
    """Whether `fetch` is to look into `data_dir`: it is a folder of FETCHED's files, or empty."""
    if data_dir is None:
        return True
    path = Path(data_dir)
    if path.is_file() or path.suffix in (".npz", ".npy", ".zip"):  # perhaps not there
        return False
    theirs = [file for _, files in FETCHED.values() for file in files]
    return not any(path.glob("*")) or any((path / file).exists() for file in theirs)

def load_cifar10(folder, size):
    """CIFAR-10's 50,000 training images; their archive is fetched into `folder` if missing."""
    (archive, data), = fetch("cifar10", folder).items()
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        names = [f"cifar-10-batches-bin/data_batch_{i}.bin" for i in range(1, 6)]
        parts = [np.frombuffer(tar.extractfile(name).read(), np.uint8) for name in names]
    rows = np.concatenate(parts).reshape(50000, 3073)  # one byte of label, then planes of 32x32
    planes = rows[:, 1:].reshape(-1, 3, 32, 32)
    images = planes.transpose(0, 2, 3, 1)
    return ArrayImages([images], rows[:, 0], size, archive, CIFAR10_NAMES)

def load_mnist(folder, size, test=False):
    """MNIST's 60,000 training digits, or the 10,000 of its test; its four files are fetched into
    `folder` if missing."""
    files = list(fetch("mnist", folder).items())
    (source, images), (_, labels) = files[2:] if test else files[:2]
    images, labels = (np.frombuffer(gzip.decompress(data), np.uint8) for data in (images, labels))
    grey = images[16:].reshape(-1, 28, 28, 1)  # behind a header of four numbers; labels: of two
    colours = np.broadcast_to(grey, (len(grey), 28, 28, 3))
    return ArrayImages([colours], labels[8:], size, source, list("0123456789"))

def load_imagenet64(path, batches, size, cache_dir=None):
    """The official train_data_batch_*.npz, whose labels count from 1, in an order of their own.

    With ImageNet's map_clsloc.txt ("n02119789 1 kit_fox") beside them the classes are renumbered to
    the order of their names, which others train by.
    """
    batches.sort(key=lambda batch: (len(batch.stem), batch.stem))  # 10 comes after 9
    parts, labels = [], []
    for batch in batches:
        data = map_array(batch, "data", cache_dir)
        if data.dtype != np.uint8 or data.shape[1:] != (3 * 64 * 64,):
            raise UserError(f"{batch}: the images must be uint8 of shape (n, 12288)")
        planes = data.reshape(-1, 3, 64, 64)
        parts.append(planes.transpose(0, 2, 3, 1))
        labels.append(map_array(batch, "labels", cache_dir))
    labels = np.concatenate(labels).astype(np.int64) - 1
    if labels.min() < 0:  # it would count from the end of the list below
        raise UserError(f"{path}: the labels of the official batches count from 1, not from 0")
    index, names = path / "map_clsloc.txt", None
    notes = ["the official batches, not shrunk like the images of EDM, CM and CTM: numbers do not "
             "compare"]
    if index.exists():
        with explain(f"{index} is not ImageNet's list of classes"):
            lines = [line.split() for line in index.read_text().splitlines()]
            wnid_of = {int(number): wnid for wnid, number, *_ in lines}
            wnids = [wnid_of[number] for number in sorted(wnid_of)]
            names = sorted(wnids)
            labels = np.searchsorted(names, wnids)[labels]
    else:
        notes.append(f"its classes in an order of their own, without {index}")
    dataset = ArrayImages(parts, labels, size, path, names, notes)
    dataset.own_order = names is None
    return dataset

NAMED = *FETCHED, "imagenet64", "bedroom256", "cat256"

def load_dataset(name, data_dir, size, cache_dir=None):
    """The images of `size` pixels called `name`: glyphs, one of NAMED, or a path.

    A folder or zip of images, an .npz or .npy. data_dir: where a named one lies, in any of those
    forms; FETCHED are fetched into it. cache_dir: see `unpacked`.
    """
    if name == "glyphs":
        images, labels = glyphs(20000, seed=0, size=size)
        return ArrayImages([images], labels, size, name, list("0123456789"))
    known = name in NAMED
    if known and data_dir is None and name not in FETCHED:
        raise UserError(f"--dataset {name} needs --data-dir: a folder or zip of its images, or, of "
                        "imagenet64, the folder of the official train_data_batch_*.npz")
    path = Path(data_dir or "data") if known else Path(name)
    if name in FETCHED and is_fetched(data_dir):
        load = load_mnist if name == "mnist" else load_cifar10
        return load(path, size)
    flag = "--data-dir" if known else "--dataset"
    if not path.exists():
        raise UserError(f"{flag} {path} does not exist; the named data sets are glyphs, "
                        f"{', '.join(NAMED)}")
    if path.suffix in (".npz", ".npy"):
        return load_arrays(path, size, cache_dir)
    official = list(path.rglob("train_data_batch_*.npz")) if name == "imagenet64" else []
    if official:
        return load_imagenet64(path, official, size, cache_dir)
    return load_files(path, size, flag)

def open_dataset(args, run, size):
    """`--dataset`, loaded by rank 0 first, which may have to fetch or unpack it, says what it is,
    and looks at each file; `run.data` is what checkpoints remember of it."""
    with main_process_first(run):
        dataset = load_dataset(args.dataset, args.data_dir, size, args.cache_dir)
    refused = None
    if run.main:
        print(dataset.describe())
        try:
            dataset.check()
            check_live(args, dataset)
        except UserError as error:
            refused = error
    if any_rank(run, refused is not None):
        raise refused or UserError(f"--dataset {args.dataset}: the first process refuses it")
    run.data = dataset.summary()
    return dataset

def check_live(args, dataset):
    """Raises UserError if `--eval-every` cannot measure: without labels it takes Inception."""
    if not args.eval_every:
        return
    import_beside("judge", "--eval-every measures with tests/judge.py")
    if len(dataset) < 12:
        raise UserError(f"--eval-every: {args.dataset} has {len(dataset)} images, too few to "
                        "measure a distance to")
    if not dataset.classes:
        need = f"--eval-every needs labels, which {args.dataset} has none of, or Inception"
        try:
            import_beside("evaluate", "tests/evaluate.py").Inception(args.inception, "cpu")
        except UserError as error:
            raise UserError(f"{need}: {error}") from error

def data_differences(old, new):
    """What data sets differ in, by their summaries: texts; none if one of them is not known. old:
    of a checkpoint of these scripts, which at first did not say its data."""
    if not new or old == new:
        return []
    if not old:
        names = new["names"] or []
        moved = names != sorted(names) and any(map(str.isdecimal, names))
        return ["an older version sorted classes as words, 10 before 2, now as numbers"] * moved
    before, now = (set(data["names"] or ()) for data in (old, new))
    texts = []
    if before != now:
        texts.append(f"classes only there: {listed(sorted(before - now)) or 'none'}, only now: "
                     f"{listed(sorted(now - before)) or 'none'}")
    if old["n"] != new["n"]:
        texts.append(f"{old['n']:,} images there, {new['n']:,} now")
    return texts or ["other labels, or names of classes or files"]

def has_more_or_fewer(old, new):
    """Whether data sets differ in the number of their images, but not in their classes."""
    if not old or not new or old["n"] == new["n"]:
        return False
    return old["names"] == new["names"] and old["present"] == new["present"]

def check_class_order(dataset, script, data, path):
    """Raises UserError if a network's classes are not in the order of official ImageNet-64 batches.
    script, data: of its checkpoint; of before there are some that do not say their data."""
    if dataset.own_order and data != dataset.summary() and (data or not script):
        raise UserError(f"{dataset.source}: put ImageNet's map_clsloc.txt there; without it the "
                        f"classes are in another order than those of {path}")

def index_batches(n, seed, step, total_steps, batch_size, micro_batch, rank=0, world=1):
    """Yield the indices of micro-batches rank, rank + world, ... of every step from `step` on.

    The images form one endless stream, a fresh permutation of all n for each pass; micro-batch m of
    step k is the piece of it that (k, m) says: the data depend on nothing but (seed, step, m).
    """
    @functools.lru_cache(2)  # a batch spans at most two passes, or many of a tiny data set
    def order(epoch):
        return np.random.default_rng((seed, epoch)).permutation(n)

    for k in range(step, total_steps):
        for m in range(rank, batch_size // micro_batch, world):
            places = np.arange(micro_batch) + k * batch_size + m * micro_batch
            yield np.array([order(int(p) // n)[p % n] for p in places])

def leave_group(worker):
    """Ctrl-C and torchrun's SIGTERM go to a process group, but the step still needs its images."""
    if hasattr(os, "setpgrp"):  # not on Windows
        os.setpgrp()

def in_shared_memory(batch):
    """The batch of a worker. A full /dev/shm is an error here; on the way to the main process the
    batch would be lost, and that would wait for ever."""
    with explain("--workers: shared memory is full, --workers 0 does without; a container gets "
                 "more of it by --shm-size=8g"):
        return tuple(part.share_memory_() if isinstance(part, Tensor) else part for part in batch)

def batches_of(loader):
    """The batches of a DataLoader; a worker that died is a UserError."""
    try:
        yield from loader
    except RuntimeError as error:
        if "exited unexpectedly" not in str(error):
            raise
        raise UserError("the system killed a process of --workers: for want of memory, which fewer "
                        "of them spare, or because a file changed that it was reading") from error

def make_loader(dataset, batches, workers, device):
    """The batches that the iterator of indices `batches` asks for, decoded ahead by `workers`."""
    if workers is None:
        cores = os.cpu_count()
        if hasattr(os, "sched_getaffinity"):  # fewer, in a container or under SLURM
            cores = len(os.sched_getaffinity(0))
        share = cores // environ("LOCAL_WORLD_SIZE", 1) - 1
        mapped = any(isinstance(part, np.memmap) for part in getattr(dataset, "parts", ()))
        workers = int(mapped and sys.platform == "linux")  # it waits for a cold disk
        if isinstance(dataset, FileImages):
            workers = min(max(share, 1), 8)
    ahead = {}
    if workers:
        ahead = dict(prefetch_factor=4, worker_init_fn=leave_group)
        if sys.platform == "linux":  # Python 3.14's default would copy the arrays
            ahead["multiprocessing_context"] = "fork"
    with explain(f"--workers {workers}: cannot start them"):
        loader = iter(torch.utils.data.DataLoader(
            dataset, batch_sampler=batches, num_workers=workers,
            collate_fn=in_shared_memory if workers else tuple,
            pin_memory=device.type == "cuda", **ahead))
    with contextlib.suppress(AttributeError, ValueError):  # on Windows, in another thread
        # torch's handler raises the death of a worker anywhere; the loader notices it too.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    return batches_of(loader)

def batches(args, run, dataset, step):
    """This rank's micro-batches (uint8 images, labels), from step `step` on."""
    indices = index_batches(len(dataset), args.seed, step, args.total_steps, args.batch_size,
                            args.micro_batch, run.rank, run.world)
    return make_loader(dataset, indices, args.workers, run.device)

def micro_batches(args, run):
    """The numbers of this rank's micro-batches in every step."""
    return range(run.rank, args.batch_size // args.micro_batch, run.world)

def steps(args, run, log, totals, dataset, step, kinds, optimizers):
    """Yield (step, micro-batches (m, batch) of this rank, is it a trial?) for the steps to come.

    First a micro-batch of each of `kinds`, {name: a step like it}, is tried, and its gradients are
    to be discarded: networks are compiled, and a run whose steps do not fit into memory does not
    begin. Once more after the last step: is the loss of the weights that it has made finite?

    If the images of a step cannot be read the step before is the last, and is saved; then this
    raises a UserError that names them.
    """
    loader = batches(args, run, dataset, step)  # its workers start now: afterwards threads run
    if args.eval_every and step < args.total_steps:
        log.labels = dataset.labels
        if run.main:
            judge = import_beside("judge", "--eval-every")
            log.judge = judge.live_judge(args, run, dataset, log.say)
    if step < args.total_steps:
        # What the optimizers will hold from their first step on: two numbers a parameter.
        sizes = [p.numel() for optimizer in optimizers if not optimizer.state
                 for group in optimizer.param_groups for p in group["params"]]
        ballast = torch.empty(2 * sum(sizes), device=run.device)
        if run.compile:
            log.say("compiling each network at its first call: minutes, in all")
        batch = dataset.__getitems__(np.arange(args.micro_batch) % len(dataset))
        for name, like in kinds.items():
            if like >= args.total_steps:
                continue
            start = time.perf_counter()
            yield like, [(0, batch)], True
            if run.compile or run.device.type == "cuda":
                log.say(f"tried {name}: {time.perf_counter() - start:.0f} s, at most "
                        f"{peak_memory_gb(run.device):.1f} GB so far")
        del ballast
        log.restart_clock()
    ready = []  # the micro-batches of the next step

    def read():
        try:
            ready[:] = zip(micro_batches(args, run), loader)
        except UserError as error:
            totals.problem = error

    def leave_if_unreadable(saved=""):
        if any_rank(run, totals.problem is not None):
            log.close()
            why = last_line(totals.problem or "another process cannot read its images")
            raise UserError(f"{why}{saved}")

    def read_while_the_device_works():
        yield from list(ready)
        read()
    read()
    leave_if_unreadable()
    for k in range(step, args.total_steps):
        yield k, read_while_the_device_works(), False
        if log.last:
            break
    if log.last:
        if log.sound:
            yield k, [(0, batch)], True
        log.end((~totals.numbers.isfinite()).any().item())
        leave_if_unreadable(f". Step {log.done} is saved: mend it or remove it, then the same "
                            "command goes on")

def to_device(batch, device, flip):
    """uint8 batch -> x0 (b,C,H,W) float32 in [-1, 1], half of them mirrored if `flip`; y (b,)."""
    x0, y = (part.to(device, non_blocking=True) for part in batch)
    x0 = x0.float() / 127.5 - 1
    if flip:
        mirrored = torch.rand(len(x0), device=device) < 0.5
        x0 = torch.where(bcast(mirrored, x0), x0.flip(3), x0)
    return x0, y

# --------------------------------------------------------------------------------------------------
# Processes and seeds. The unit of work is the micro-batch: micro-batch m of step k draws its images
# and all its random numbers from (seed, k, m) alone, so a run does not depend on how many processes
# share it, nor on where it was resumed.
# --------------------------------------------------------------------------------------------------

def environ(name, default=0):
    """A number that torchrun tells its processes."""
    return int(os.environ.get(name) or default)

def choose_device(name, local):
    """The torch.device of `--device`, of this process. Raises UserError if it is not there."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if cuda else "mps" if mps else "cpu"
    if not dict(cuda=cuda, mps=mps, cpu=True)[name]:
        raise UserError(f"--device {name}: this machine, or this build of torch, has none")
    if name != "cuda":
        return torch.device(name)
    torch.cuda.set_device(local)
    torch.backends.cudnn.benchmark = True
    return torch.device(name, local)

def allows_tf32(args):
    """Whether what is not in bf16, above all LPIPS and critics, may compute in TF32, in which the
    papers' runs did. It may not where fp32 is asked for; nor in continuous time, where a derivative
    is a difference of two outputs and needs all bits; nor where FID is measured, to be compared.
    Raises UserError if tf32 is asked for there."""
    flags = vars(args)
    why_not = None
    if flags.get("objective") in ("continuous", "scm"):
        why_not = f"--objective {args.objective}, whose derivatives are differences in fp32"
    elif flags.get("eval"):
        why_not = f"--eval {args.eval}: what is measured is drawn and seen in bf16 or fp32"
    if why_not and args.precision == "tf32":
        raise UserError(f"--precision tf32 does not apply with {why_not}: name auto, bf16 or fp32")
    return args.precision != "fp32" and why_not is None

def join_processes(device, rank, world, restarts):
    """Make the process group of what torchrun started. Returns the restarts of any node."""
    # Imported later, as by the optimizer, its default arguments would hold the group, whose threads
    # then outlive destroy_process_group and at times abort the process.
    import torch.distributed.nn.functional
    with explain(f"WORLD_SIZE={world}: the other processes do not come, were they started?"):
        wait = datetime.timedelta(minutes=10)
        store, _, _ = next(torch.distributed.rendezvous("env://", timeout=wait))
    if environ("GROUP_WORLD_SIZE") == 1:
        # One node keeps its store when it restarts its workers, with the dead ones' addresses.
        store = torch.distributed.PrefixStore(f"restart {restarts}", store)
    patience = datetime.timedelta(hours=2)  # of unpacking ImageNet, say
    backend = dict(backend="gloo")
    if device.type == "cuda":
        backend = dict(backend="nccl", device_id=device)
    torch.distributed.init_process_group(store=store, rank=rank, world_size=world,
                                         timeout=patience, **backend)
    sys.excepthook = one_line_errors  # torch has just wrapped it
    most = torch.tensor(restarts, device=device)  # only the failed worker's node counts it
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    return most.item()

def setup(args):
    """Join the processes that torchrun started, if it did, and choose device and precision.

    Returns a namespace: rank, world, main (is this rank 0?), restarted (by torchrun, after a worker
    died), device, dtype (of convolutions and attention), compile, checkpointing, and capturable: an
    optimizer's counter of each tensor lies on the GPU; 541 on the CPU cost 12 ms a step.
    """
    rank, local = environ("RANK"), environ("LOCAL_RANK")
    world, restarts = environ("WORLD_SIZE", 1), environ("TORCHELASTIC_RESTART_COUNT")
    launcher = "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"
    absent = [name for name in launcher if not os.environ.get(name)]
    if absent and (rank, local, world) != (0, 0, 1):
        raise UserError(f"the environment holds RANK {rank}, LOCAL_RANK {local}, WORLD_SIZE {world}"
                        f", but no {absent[0]}: start with torchrun, or unset them")
    tf32 = allows_tf32(args)
    device = choose_device(args.device, local)
    if world > 1:
        restarts = join_processes(device, rank, world, restarts)
    has_bf16 = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        torch.backends.cudnn.allow_tf32 = tf32
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")  # it is so on purpose
    bf16 = args.precision == "bf16" or (args.precision == "auto" and has_bf16)
    dtype = torch.bfloat16 if bf16 else torch.float32
    compiled = device.type == "cuda" if args.compile is None else args.compile
    return types.SimpleNamespace(rank=rank, world=world, main=rank == 0, restarted=restarts > 0,
                                 device=device, dtype=dtype, compile=compiled,
                                 checkpointing=getattr(args, "gradient_checkpointing", False),
                                 capturable=device.type == "cuda", data=None)

@contextlib.contextmanager
def main_process_first(run):
    """Rank 0 passes through alone, then the others: what it fetches or unpacks they find ready."""
    if run.world > 1 and not run.main:
        torch.distributed.barrier()
    yield
    if run.world > 1 and run.main:
        torch.distributed.barrier()

def place(net, run):
    """Move a net to the device, in the memory format and compute dtype that suit it."""
    net.dtype, net.checkpointing = run.dtype, run.checkpointing
    if run.device.type == "cuda":
        net.layout = torch.channels_last
    return net.to(run.device, memory_format=net.layout)

def compile_in_place(run, *modules):
    """torch.compile each module that is not None, if the run compiles; names of weights stay."""
    for module in set(modules) - {None}:
        if run.compile:
            module.compile()

# What a seed is for stands first in its key, so that no two uses share a stream.
INIT, STEP, SAMPLE, SOLVER = 1, 2, 3, 4

def seed_of(*key):
    """A seed made of the integers `key`."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)

def seed_everything(*key):
    """Seed torch's generators of all devices with the integers `key`."""
    torch.manual_seed(seed_of(*key))

def new_network(args, run, model_args, teacher=None):
    """The network to train, placed: seeded, with the teacher's weights for all that it has."""
    seed_everything(INIT, args.seed)
    net = make_net(model_args)
    if teacher is not None:
        net.load_state_dict(net.state_dict() | teacher.state_dict())
    return place(net, run)

def flatten_gradients(net):
    """One buffer (P,) that holds all gradients, as views. Zero it instead of calling zero_grad."""
    parameters = list(net.parameters())
    size = sum(p.numel() for p in parameters)
    gradients = torch.zeros(size, device=parameters[0].device)
    start = 0
    for p in parameters:  # with the strides of p: the optimizer's fused updates need no copies then
        part = gradients[start:start + p.numel()]
        p.grad = part.as_strided(p.shape, p.stride())
        start += p.numel()
    return gradients

BIN_EDGES = [0.1, 1.0, 10.0]  # of noise levels, that the log reports the loss between

class Totals:
    """What a step's micro-batches add up to on all ranks beside their gradients: the numbers called
    `names`, the losses of each bin of noise levels, and whether to stop; problem: a reason for it,
    the UserError of images that cannot be read."""
    problem = None

    def __init__(self, run, *names):
        self.names, bins = names, len(BIN_EDGES) + 1
        self.edges = torch.tensor(BIN_EDGES, device=run.device)
        self.buffer = torch.zeros(len(names) + 2 * bins + 1, device=run.device)
        views = self.buffer.split([len(names), bins, bins, 1])
        self.numbers, self.bin_losses, self.bin_counts, self.stop = views

    def zero(self):
        self.buffer.zero_()

    def add(self, share, **values):
        """Add `share` of each value to the number of that name."""
        for name, value in values.items():
            self.numbers[self.names.index(name)] += share * value.detach()

    def bin(self, t, losses):
        """Add the losses (B,) of images at noise levels t (B,) to their bins."""
        which = torch.bucketize(t, self.edges)
        self.bin_losses.index_add_(0, which, losses.detach())
        self.bin_counts.index_add_(0, which, torch.ones_like(losses))

    def __getitem__(self, name):
        return self.numbers[self.names.index(name)].item()

    def loss_bins(self):
        """The mean loss of each bin; not a number where there was no image."""
        return (self.bin_losses / self.bin_counts).tolist()

def sum_over_ranks(run, stop, gradients, totals):
    """Sum the gradients and the totals over the ranks. Returns whether any rank is to stop."""
    totals.stop.fill_(stop.number > 0 or totals.problem is not None)
    if run.world > 1:
        torch.distributed.all_reduce(gradients)
        torch.distributed.all_reduce(totals.buffer)
    return totals.stop.item() > 0

def any_rank(run, flag):
    """Whether `flag` is set on any rank; all of them ask."""
    if run.world == 1:
        return flag
    flags = torch.tensor(float(flag), device=run.device)
    torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
    return flags.item() > 0

class StopSignal:
    """Remembers SIGTERM or Ctrl-C, for the loop to finish its step and save. A second kills."""
    def __init__(self):
        self.number = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.catch)

    def catch(self, number, frame):
        if self.number:
            raise KeyboardInterrupt
        self.number = number

def finish(run, stop=None):
    """Leave: exit code 0, or 128 + the number of the signal that stopped the run, on any rank."""
    if run.world > 1:
        torch.distributed.barrier()  # or torchrun would interrupt the saving of another
        torch.distributed.destroy_process_group()
    raise SystemExit(128 + (stop.number or signal.SIGTERM) if stop else 0)

# --------------------------------------------------------------------------------------------------
# Checkpoints: one dictionary of tensors and plain values, loaded without unpickling anything else.
# A run has parts: its networks and optimizers, or None, by their key in the checkpoint.
# --------------------------------------------------------------------------------------------------

RENAMED = {"times": "p_t", "extra": "cond"}  # settings of older checkpoints
ABOUT = "few_step"  # the place of what ema.pt knows of itself, in the `_metadata` of a state dict

def load_checkpoint(path):
    """Read a checkpoint. Raises UserError if it is missing, damaged, or could run code.

    An ema.pt that knows what it is reads like the last.pt beside it, but for what only resumes.
    """
    try:
        if zipfile.is_zipfile(path):  # torch does not look at the checksums
            with zipfile.ZipFile(path) as archive:
                wrong = archive.testzip()
            if wrong:
                raise ValueError(f"the checksum of {wrong} is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} is no checkpoint, or holds more than tensors and plain values. It "
                        "was not loaded: that could run code") from error
    except Exception as error:  # a damaged archive surfaces in many ways
        raise UserError(f"{path} is no checkpoint, or is damaged: {first_line(error)}") from error
    if not isinstance(state, dict):
        raise UserError(f"{path} holds a {type(state).__name__}, not a checkpoint")
    metadata = getattr(state, "_metadata", None)
    if isinstance(metadata, dict) and isinstance(metadata.get(ABOUT), dict):
        state = metadata[ABOUT] | dict(ema=state)
    for part in ("args", "model_args"):
        if isinstance(state.get(part), dict):
            settings = state[part].items()
            state[part] = {RENAMED.get(key, key): value for key, value in settings}
    return state

def file_sha(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]

# Flags that may change when a run is resumed: where things lie, what is reported, the machine
FREE_FLAGS = {"data_dir", "cache_dir", "teacher", "out_dir", "overwrite", "log_every",
              "sample_every", "save_every", "workers", "device", "compile", "ckpt", "micro_batch",
              "micro_batch_limit", "gradient_checkpointing", "eval_every", "inception"}

locked = set()  # the folders that are this process' own

def lock_folder(folder, run, make=True):
    """Keep other runs out of a folder, if it is there or `make`, for the life of this process.
    Raises UserError, on all ranks, if one is in it."""
    refused = take_lock(Path(folder).resolve(), folder, make) if run.main else None
    if any_rank(run, refused is not None):
        raise UserError(refused or f"--out-dir {folder} is in use by another run")

def take_lock(folder, name, make):
    """Returns None, or why the lock of a folder cannot be had. It is a POSIX one, as fcntl's: over
    NFS it holds on all nodes; it goes with the process, and unlike flock's does not stay with a
    loader's workers that outlive it."""
    if folder in locked or not (make or folder.exists()):
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a+")
    except OSError as error:
        return f"--out-dir {name}: {error.strerror}"
    locked.add(folder)
    atexit.register(file.close)  # not before: that would release the lock
    try:
        import fcntl
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        who = file.read().strip() or "just started"
        return (f"--out-dir {name} is in use by another run ({who}): wait for its "
                "end, stop it, or choose another")
    except (OSError, ImportError) as error:  # a file system without locks; Windows
        print(f"note: --out-dir {name} cannot be locked ({first_line(error)}): start no other run "
              "in it")
        return None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    # What a killed run was writing
    for pattern in (".*.pt*.tmp", ".log.jsonl*.tmp", "samples/.*.png.*.tmp"):
        for old in folder.glob(pattern):
            old.unlink(missing_ok=True)
    return None

def spans_the_run(args):
    """Whether a schedule depends on --total-steps: N(k), ECT's stages, rounds of distillation."""
    return "s1" in args or "round_steps" in args or args.get("stages", 1) > 1

def settings_of_run(args, model_args):
    """What a resumed run must share with the one before, as written on the command line."""
    free = FREE_FLAGS if spans_the_run(args) else FREE_FLAGS | {"total_steps"}
    flags = {flag_name(key): value for key, value in args.items() if key not in free}
    if args.get("teacher") in ("ideal", "none"):  # of a file the digest counts
        flags["--teacher"] = args["teacher"]
    return {key: show_value(value) for key, value in (flags | model_args).items()}

# What a run of before there were these settings had.
LATER_SETTINGS = {
    "--stage": "distill", "--dsm-weight": "1.0", "--lr-ramp": "0",
    "--dropout-size": "0", "dropout_size": "0",
    "--parametrisation": "skip", "parametrisation": "skip"}

def check_resumable(args, state, script, model_args, data):
    """Raises UserError if the run of a checkpoint was another script's, or had other flags or data.
    data: a summary, as checkpoints hold one."""
    if state.get("script") != script:
        raise UserError(f"--out-dir {args.out_dir} holds a run of {state.get('script')}.py; choose "
                        "another, or --overwrite it")
    old = LATER_SETTINGS | settings_of_run(state["args"], state["model_args"])
    new = settings_of_run(vars(args), model_args)
    changed = [f"{key} {old.get(key, 'none')} there, {new.get(key, 'none')} now"
               for key in sorted({"--teacher", "--teacher-digest", *new})  # others do not apply
               if old.get(key, "none") != new.get(key, "none")]
    if not has_more_or_fewer(state.get("data"), data):
        changed += data_differences(state.get("data"), data)
    if changed:
        why = ""
        if old.get("--total-steps") != new.get("--total-steps"):
            why = "; its schedule spans all its steps, so a longer run has to start anew"
        raise UserError(f"--out-dir {args.out_dir} holds a run with other settings "
                        f"({'; '.join(changed)}){why}; use its own, choose another, or "
                        "--overwrite it")
    if args.total_steps < state["step"]:
        raise UserError(f"--total-steps {args.total_steps}: the run in --out-dir {args.out_dir} is "
                        f"at step {state['step']}; name more, choose another, or --overwrite it")

def delete_run(out_dir):
    """`--overwrite`: what a run left in its folder is deleted."""
    with explain(f"--out-dir {out_dir}"):
        for pattern in ("last.pt", "ema.pt", "judge.pt", "samples/*.png"):
            for old in out_dir.glob(pattern):
                old.unlink(missing_ok=True)

# Bytes of memory that training takes, of bf16 networks, as measured: tests/results.
ACTIVATION_BYTES = dict(eager=29, compiled=14.5, checkpointing=6.2)  # a unit of blocks' outputs
LPIPS_BYTES, CRITIC_BYTES = 185e6, 196e6  # an image

def bytes_an_image(args, run, script, net):
    """What an image of a micro-batch adds to the peak of memory, mostly for the backward pass."""
    mode = "compiled" if run.compile else "eager"
    if run.checkpointing:
        mode = "checkpointing"
    units = sum(math.prod(shape) for shape in net.block_shapes)
    graph = ACTIVATION_BYTES[mode] * units * (run.dtype.itemsize / 2)
    if not net.scale_shift and not run.checkpointing:
        graph *= 0.85  # scale, shift and their products are not kept
    if not getattr(args, "stop_gradient", True):  # two passes in float32, whatever the dtype
        graph *= 2.75 * 2 / run.dtype.itemsize
    total = graph
    if net.dropout:  # the masks
        total += sum(math.prod(shape) for shape in net.block_shapes if shape[2] <= net.dropout_size)
    if script == "ctm":
        total += graph  # of the jump, and of the target's jump that goes on from it
    if getattr(args, "dist", None) == "lpips":
        total += LPIPS_BYTES
    if getattr(args, "disc", None) == "projected":
        total += CRITIC_BYTES
    return total

def bytes_a_weight(args, script):
    """What training adds, for each parameter, to weights, gradient and averages: the optimizer's
    state and bf16 copies; for CTM, gradients of its terms."""
    if getattr(args, "disc", None) == "projected":
        return 28.0
    return 16.0 if script == "ctm" else 10.3

def images_that_fit(args, run, script, net):
    """How many images of a micro-batch fit into the free memory of the smallest GPU."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(run.device)
    free = 0.9 * free - bytes_a_weight(args, script) * sum(p.numel() for p in net.parameters())
    fit = torch.tensor(free / bytes_an_image(args, run, script, net), device=run.device)
    if run.world > 1:
        torch.distributed.all_reduce(fit, torch.distributed.ReduceOp.MIN)
    return max(int(fit), 1)

def default_micro_batch(args, run, script, parts):
    """A divisor of --batch-size, at most the recipe's, and what fits into the memory of the GPUs.

    Of the largest and those down to half of it, the one with which the busiest process has the
    fewest images a step.
    """
    most = min(args.micro_batch_limit, max(args.batch_size // run.world, 1))
    if run.device.type == "cuda" and isinstance(parts["net"], UNet):
        fit = images_that_fit(args, run, script, parts["net"])
        if run.main and fit < most:
            print(f"note: micro-batches of {fit} images at most fit into the GPU's free memory")
        most = min(most, fit)
    sizes = [size for size in range(1, most + 1) if args.batch_size % size == 0]
    largest = sizes[-1]
    sizes = [size for size in sizes if size >= largest / 2]

    def images_of_the_busiest(size):
        return math.ceil(args.batch_size // size / run.world) * size
    return min(reversed(sizes), key=images_of_the_busiest)

def resume(args, run, script, model_args, parts):
    """Load `parts` from the run found in `args.out_dir`, if there is one, with the same flags, and
    choose args.micro_batch, if it was not given: that of the run, or `default_micro_batch`.

    Returns its step, and how many steps it has left out; 0, 0 for a new run.
    """
    lock_folder(args.out_dir, run)
    out_dir, state = Path(args.out_dir), dict(step=0, skipped=0, args={})
    if args.overwrite and not run.restarted:  # a restarted run has obeyed --overwrite already
        if run.main:
            delete_run(out_dir)
    elif (out_dir / "last.pt").exists():
        state = load_checkpoint(out_dir / "last.pt")
        with explain(f"{out_dir}/last.pt cannot be resumed"):
            check_resumable(args, state, script, model_args, run.data)
            before = state["args"]["total_steps"]
        if has_more_or_fewer(state.get("data"), run.data) and run.main:
            print(f"note: {state['data']['n']:,} images until now, {run.data['n']:,} from here on")
        if args.total_steps != before and run.main:
            print(f"note: --total-steps {args.total_steps}, and {before} until now: "
                  f"{args.total_steps - state['step']} more steps")
    elif (out_dir / "ema.pt").exists():
        raise UserError(f"--out-dir {out_dir} holds an ema.pt without last.pt: --overwrite it?")
    if run.world > 1:
        steps = torch.tensor([state["step"], -state["step"]], device=run.device)
        torch.distributed.all_reduce(steps, torch.distributed.ReduceOp.MAX)
        if steps.sum() != 0:  # the largest is not the smallest
            raise UserError(f"--out-dir {out_dir} is not the same folder on all nodes")
    recorded = state["args"].get("micro_batch")
    if args.micro_batch is None:
        args.micro_batch = recorded or default_micro_batch(args, run, script, parts)
    elif recorded not in (None, args.micro_batch) and state["step"] < args.total_steps and run.main:
        print(f"note: --micro-batch {args.micro_batch}, and {recorded} until now: what is random "
              "differs from here on")
    vars(args).pop("micro_batch_limit", None)
    if state["step"] == 0:
        return 0, 0
    with explain(f"{out_dir}/last.pt cannot be resumed"):
        for key, part in parts.items():
            if isinstance(part, torch.optim.Optimizer):
                load_optimizer(part, state[key])
            elif part is not None:
                part.load_state_dict(state[key])
    return state["step"], state["skipped"]

def load_optimizer(optimizer, state):
    """Restore an optimizer, its tensors in the strides of their parameters, for fused updates."""
    for group, own in zip(state["param_groups"], optimizer.param_groups):
        group["capturable"] = own["capturable"]  # as this device needs it
    optimizer.load_state_dict(state)
    for p, values in optimizer.state.items():
        for key, value in values.items():
            if value.shape == p.shape:
                values[key] = torch.empty_like(p).copy_(value)

def save_checkpoint(path, state, later=None):
    """Write `state` to `path`, see `atomic_file`. Raises UserError if it cannot be written."""
    with atomic_file(path, later=later) as file:
        torch.save(state, file)

def about_run(args, run, script, step, model_args, **more):
    """What a checkpoint says of itself, in plain values."""
    return dict(script=script, step=step, images=step * args.batch_size, args=vars(args),
                model_args=model_args, data=run.data,
                torch_version=str(torch.__version__), **more)

def save_run(args, run, script, step, log, model_args, parts, **more):
    """Write last.pt, which resumes the run, and ema.pt, which other tools can load; on rank 0.

    Not while steps are left out; and they get their names by `log.confirm`.
    """
    if not run.main or not log.sound:
        return
    about = about_run(args, run, script, step, model_args, skipped=log.skipped, **more)
    state = {key: part if part is None else part.state_dict() for key, part in parts.items()}
    wrong = not_finite(state["net"]) or not_finite(state["ema"])
    if wrong:
        return log.say(f"step {step} is not saved: its weights are not finite ({wrong})")
    ema = parts["ema"].state_dict()
    ema._metadata[ABOUT] = about
    # Before last.pt: a run killed between the two resumes from the older one, and makes both anew
    save_checkpoint(Path(args.out_dir, "ema.pt"), ema, log.written)
    save_checkpoint(Path(args.out_dir, "last.pt"), about | state, log.written)
    log.written_at = step

def not_finite(weights):
    """The name of a tensor of a state dict in which a number is not finite, None if all are."""
    wrong = torch.stack([(~value.isfinite()).any() for value in weights.values()]).tolist()
    return next((name for name, bad in zip(weights, wrong) if bad), None)

def shapes_of(state):
    return {name: value.shape for name, value in state.items()}

PREFIXES = "module.", "_orig_mod."  # of DistributedDataParallel and of torch.compile
NESTED = "ema", "params_ema", "state_dict", "model"  # where others keep weights; averages first

def plain_weights(state):
    """The tensors of another tool's checkpoint by their name, in float32; what was done to get
    them, a list of words."""
    done = []
    for key in NESTED:
        inner = state.get(key)
        if isinstance(inner, dict) and any(isinstance(value, Tensor) for value in inner.values()):
            state = inner
            done.append(f"its {key!r}")
            break
    weights = {str(name): value.float() for name, value in state.items()
               if isinstance(value, Tensor)}
    for prefix in PREFIXES * 2:  # one may stand within the other
        if weights and all(name.startswith(prefix) for name in weights):
            weights = {name.removeprefix(prefix): value for name, value in weights.items()}
            done.append(f"without {prefix!r} before each name")
    return weights, done

def settings_of_weights(path, state, scripts):
    """The one of NETS that a plain state dict fits: name and settings. Raises UserError."""
    shapes, changes = shapes_of(state), dict(classes=0)
    if shapes.get("label_emb.weight"):
        changes["classes"] = shapes["label_emb.weight"][0]
    if "time_embed_s.0.weight" in shapes:
        changes["cond"] = True
        if "ctm" not in scripts:
            raise UserError(f"{path} has one more input: a trajectory model, which goes to ctm.py "
                            "--ckpt, or a guided student, of which name last.pt")
    differ = {}
    for name, settings in NETS.items():
        with torch.device("meta"):
            net = UNet(**settings | changes)
        wanted = shapes_of(net.state_dict())
        differ[name] = [f"{key} {show_shape(shapes.get(key))}, not {show_shape(wanted.get(key))}"
                        for key in wanted | shapes if wanted.get(key) != shapes.get(key)]
    fitting = [name for name in NETS if not differ[name]]
    if len(fitting) > 1:  # of as many weights, but other pixels
        raise UserError(f"{path}: these weights fit {' and '.join(fitting)} alike: name last.pt, "
                        "which says what it is")
    if fitting:
        return fitting[0], NETS[fitting[0]] | changes
    near = min(NETS, key=lambda name: len(differ[name]))
    raise UserError(f"{path}: these weights fit none of the networks {', '.join(NETS)}; nearest is "
                    f"{near}, where {len(differ[near])} tensors differ: "
                    f"{'; '.join(differ[near][:3])}. Of a run of these scripts name last.pt")

def show_shape(shape):
    return "absent" if shape is None else "x".join(map(str, shape)) or "a number"

def load_network(path, scripts):
    """The network to sample with: `ema` of a checkpoint of one of the `scripts`, or plain weights,
    of which rank 0 says what they are taken for.

    Returns the net in eval mode on the CPU, without gradients; and the checkpoint, of which
    `script`, `args` (None and {} for plain weights) and `model_args` say what it is. net.levels: N
    of the grid that a network of ct.py was last trained on, None for others.
    """
    state = load_checkpoint(path)
    if "model_args" not in state:
        weights, done = plain_weights(state)
        name, settings = settings_of_weights(path, weights, scripts)
        labels = f"{settings['classes']} classes, none of them a null label"
        done += [f"{settings['image_size']} pixels", f"heads of {settings['head_channels']}",
                 labels if settings["classes"] else "no labels"]
        if environ("RANK") == 0:
            print(f"{path} does not say what it is, and is taken for {name}: {', '.join(done)}")
        state = dict(script=None, args={}, model_args=settings)
    elif state.get("script") not in scripts:
        writer = f"{state['script']}.py" if state.get("script") else "another tool"
        wanted = " or ".join(f"{script}.py" for script in scripts)
        raise UserError(f"{path} was written by {writer}; what is wanted is written by {wanted}")
    with explain(f"{path} holds no network of this version"):
        if state["script"]:
            weights = state["ema"]
        net = UNet(**state["model_args"])
        net.load_state_dict(weights)
    wrong = not_finite(net.state_dict())
    if wrong:
        raise UserError(f"{path}: its weights are not finite ({wrong}): name one from before")
    net.levels = state.get("levels")
    return net.requires_grad_(False).eval(), state

# --------------------------------------------------------------------------------------------------
# Logs and pictures
# --------------------------------------------------------------------------------------------------

def append_record(path, record):
    """Add a line of JSON to a file, after whatever a killed process may have left there."""
    try:
        with open(path, "a+b") as file:
            file.seek(max(file.tell() - 1, 0))
            if file.read(1) not in (b"", b"\n"):
                file.write(b"\n")
            file.write(json.dumps(record).encode() + b"\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error

def step_of(line):
    """The step of a line of log.jsonl, inf if it is no record of one."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError, OverflowError):
        return math.inf

class Log:
    """A run's progress bar and `log.jsonl`, of which what a killed run wrote after the step that it
    resumes from is dropped. On other ranks than 0 it only counts."""
    def __init__(self, args, run, step, skipped):
        self.args, self.run, self.skipped = args, run, skipped
        self.path = Path(args.out_dir, "log.jsonl")
        self.bad_in_a_row, self.values = {}, {}
        self.sound, self.last = True, False  # was the last step of each player taken? does it end?
        self.done = self.written_at = self.saved = step
        self.written = {}  # at that step, see `confirm`
        self.reported = step, time.perf_counter()
        self.shown = {}
        self.judge = self.labels = None  # of --eval-every
        if not run.main:
            return
        lines = []
        if step and self.path.exists():
            lines = self.path.read_bytes().splitlines()
        strange = sum(step_of(line) == math.inf for line in lines)
        if strange:
            print(f"note: {strange} line(s) of {self.path} hold no step, or half of one: dropped")
        with atomic_file(self.path) as file:
            for line in lines:
                if step_of(line) <= step:
                    file.write(line + b"\n")
        self.bar = progress_bar(total=args.total_steps, initial=step, unit="step")

    def say(self, text):
        if self.run.main:
            self.bar.write(text)

    def restart_clock(self):
        """What was done since the beginning, trials and compiling, does not count as training."""
        self.reported = self.reported[0], time.perf_counter()
        if self.run.main:
            self.bar.unpause()

    def step(self, step, finite, last, player=0, **values):
        """Count a step, and write a line of the log every --log-every steps.

        finite: whether loss and gradient were, and so the step was taken; ten in a row that were
        not end the run with exit code 1. last: of this process. player: whose step it was, where
        several take turns. values: those not passed keep the last ones.
        """
        self.values |= values
        self.bad_in_a_row[player] = 0 if finite else self.bad_in_a_row.get(player, 0) + 1
        self.skipped += not finite
        if self.sound and not finite:
            self.say(f"step {step} is left out, its loss or gradient is not finite: nothing is "
                     "saved until one is")
        self.sound = not any(self.bad_in_a_row.values())
        # A signal during bad steps waits for a good one, after which there is something to save.
        self.last = last and (self.sound or step == self.args.total_steps)
        if self.sound:
            self.confirm()
        self.done = step
        if self.bad_in_a_row[player] == 10:
            for bins in ("loss_bins", "tangent_bins"):
                values.pop(bins, None)
            self.fail(f"stopped at step {step}: the loss or its gradient was not finite 10 steps "
                      f"in a row ({values})")
        if self.run.main:
            self.bar.update()
            if due(self.args.log_every, step, last):
                self.report(step)

    def confirm(self):
        """What was written when weights were new replaces what was there: their loss is finite."""
        for path, temporary in self.written.items():
            os.replace(temporary, path)
        self.written, self.saved = {}, self.written_at

    def end(self, bad):
        """After the last step: keep what it has saved, or leave with exit code 1. bad: the loss of
        its weights is not finite."""
        unsaved = self.run.main and self.written_at < self.done
        if any_rank(self.run, unsaved or bad):
            self.fail("ended while the loss or the weights were not finite")
        self.confirm()

    def fail(self, why):
        self.close()
        kept = f"holds step {self.saved}" if self.saved else "holds no checkpoint"
        raise SystemExit(f"{Path(sys.argv[0]).name}: {why}. {self.args.out_dir} {kept}; start anew "
                         "with a lower --lr")

    def report(self, step):
        before, then = self.reported
        self.reported = step, time.perf_counter()
        speed = (step - before) * self.args.batch_size / (self.reported[1] - then)
        record = dict(step=step, images=step * self.args.batch_size, lr=self.args.lr)
        record |= self.values
        record |= dict(images_per_s=speed, skipped=self.skipped,
                       peak_gb=peak_memory_gb(self.run.device))
        self.write(record)
        self.show({key: f"{record[key]:.4g}" for key in ("loss", "N")
                   if record.get(key) is not None} | {"img/s": f"{speed:.0f}"})

    def show(self, values):
        """Texts by their name at the end of the progress bar, until there are newer ones."""
        self.shown |= values
        self.bar.set_postfix(self.shown)

    @contextlib.contextmanager
    def pause(self):
        """What is done meanwhile does not count as training."""
        start = time.perf_counter()
        yield
        before, then = self.reported
        self.reported = before, then + time.perf_counter() - start
        if self.run.main:
            self.bar.unpause()

    def write(self, record):
        text = json.dumps(record)
        record = json.loads(text, parse_constant=lambda word: None)  # JSON knows no NaN
        append_record(self.path, record)

    def close(self):
        if self.run.main:
            self.bar.close()
        for temporary in self.written.values():
            temporary.unlink(missing_ok=True)

def due(every, step, last=False):
    return every > 0 and (step % every == 0 or last)

def precision_of(run):
    """What a run computes in, in words."""
    dtype = str(run.dtype).removeprefix("torch.")
    allowed = run.device.type == "cuda" and torch.get_float32_matmul_precision() == "high"
    if not allowed or not torch.cuda.is_bf16_supported(including_emulation=False):  # as is TF32
        return dtype
    return "TF32, the rest float32" if dtype == "float32" else f"{dtype}, the rest TF32"

def start_run(args, run, net, step, skipped):
    """Make the output folder, say what runs, open the log. Raises UserError."""
    global ranks_differ
    ranks_differ = True
    if run.main:
        with explain(f"--out-dir {args.out_dir}"):
            Path(args.out_dir, "samples").mkdir(parents=True, exist_ok=True)
        print(" ".join(f"{key}={show_value(value)}" for key, value in vars(args).items()))
        size = sum(p.numel() for p in net.parameters()) / 1e6
        resumed = f"; resumed at step {step}" if step else ""
        print(f"{size:.2f}M parameters, {run.world} process(es) on {run.device.type}, "
              f"{precision_of(run)}{resumed}")
        if "bandwidth" in args:
            cut = (net.time_embed[0].weight == 0).all(0).sum()
            print(f"time embedding: {cut} of {net.base} features turn by more than "
                  f"{args.bandwidth:g} rad per unit of ln t and are cut off")
        if getattr(args, "warm_up", 0) > args.total_steps:
            print(f"note: --warm-up {args.warm_up} outlasts the run: r ends at "
                  f"{args.r * args.total_steps / args.warm_up:.2g}")
        images = args.total_steps * args.batch_size
        if getattr(args, "lr_ramp", 0) > images:
            print(f"note: --lr-ramp {args.lr_ramp} outlasts the run of {images:,} images: the "
                  f"learning rate ends at {learning_rate(args, args.total_steps):.2g}")
        pieces = args.batch_size // args.micro_batch
        if run.world > pieces:
            print(f"note: {run.world} processes share {pieces} micro-batches: some idle")
    return Log(args, run, step, skipped)

def peak_memory_gb(device):
    """The most memory this process has held: the GPU's where there is one, else resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    unit = 1e9 if sys.platform == "darwin" else 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit

def to_uint8(x):
    """(n,C,H,W) in [-1, 1] -> (n,H,W,C) uint8, rounded, so that it inverts x/127.5 - 1."""
    pixels = ((x + 1) * 127.5).round().clamp(0, 255)  # openai's code truncates
    return pixels.to(torch.uint8).permute(0, 2, 3, 1)

def save_grid(path, blocks, columns):
    """Write a PNG, enlarged if small: each block (n,H,W,C) uint8 a grid of `columns`."""
    from PIL import Image
    size, grids = blocks[0].shape[1], []
    for images in blocks:
        rows = math.ceil(len(images) / columns)
        grid = np.zeros((rows * columns, *images.shape[1:]), np.uint8)  # black where none is left
        grid[:len(images)] = images
        grid = grid.reshape(rows, columns, size, size, 3).swapaxes(1, 2)
        white = np.full((rows * size, 4, 3), 255, np.uint8)
        grids += [grid.reshape(rows * size, columns * size, 3), white]
    picture = Image.fromarray(np.concatenate(grids[:-1], 1))
    zoom = max(1, 48 // size)
    enlarged = picture.width * zoom, picture.height * zoom
    with atomic_file(path) as file:
        picture.resize(enlarged, Image.Resampling.NEAREST).save(file, "PNG")

def saved_samples(folder):
    """What `save_samples` has left in a folder: 000000.png and on, and its dataset.json."""
    files = [file for file in folder.glob("??????*.png") if file.stem.isdecimal()]
    if folder / "000000.png" in files:  # else it is not ours
        files += folder.glob("dataset.json")
    return files

def delete_samples(folder):
    for file in saved_samples(folder)[::-1]:  # dataset.json first
        file.unlink(missing_ok=True)

def make_save_path(args):
    """See that samples can be saved at `--save`, before hours are spent on drawing them."""
    path = Path(args.save)
    if path.suffix not in ("", ".png", ".npz"):
        raise UserError(f"--save {path}: name a .png, an .npz or a folder")
    folder = path.parent if path.suffix else path
    with explain(f"--save {path}"):
        folder.mkdir(parents=True, exist_ok=True)
        files = [] if path.suffix else list(path.iterdir())
    old = saved_samples(path) if args.overwrite else []
    for file in files:
        if file not in old and (is_image(file.name) or file.name == "dataset.json"):
            raise UserError(f"--save {path} holds {file.name}, and would mix old images with new: "
                            "choose another, or --overwrite what samples it holds")
    return path

def save_samples(path, images, labels, columns):
    """Write samples (n,H,W,C) uint8 as a .png grid, a folder of PNGs that is a data set, or an .npz
    as ADM's evaluator reads it: arr_0 the images, arr_1 the labels. All of a folder, or nothing."""
    from PIL import Image
    if path.suffix == ".png":
        save_grid(path, [images], columns)
    elif path.suffix == ".npz":
        arrays = [images] if labels is None else [images, labels.cpu().numpy()]
        with atomic_file(path) as file:
            np.savez(file, *arrays)
    else:
        delete_samples(path)  # of before, with --overwrite
        names = [f"{i:06d}.png" for i in range(len(images))]
        try:
            for name, image in zip(names, images):
                with atomic_file(path / name) as file:
                    Image.fromarray(image).save(file, "PNG")
            if labels is not None:
                pairs = list(zip(names, labels.tolist()))
                with atomic_file(path / "dataset.json", "w") as file:
                    json.dump({"labels": pairs}, file)
        except BaseException:  # a full disk, Ctrl-C
            delete_samples(path)
            raise

# --------------------------------------------------------------------------------------------------
# Samples
# --------------------------------------------------------------------------------------------------

class SeededNoise:
    """Unit noise, x -> noise like x, in which image i has a generator of its own, seeded by
    (seed, i): a sample depends neither on its batch nor on the device."""
    def __init__(self, indices, seed):
        self.indices = indices
        self.generators = [torch.Generator().manual_seed(seed_of(SAMPLE, seed, i))
                           for i in indices.tolist()]

    def __call__(self, x):
        shape = x.shape[1:]
        noise = [torch.randn(shape, generator=generator) for generator in self.generators]
        return torch.stack(noise).to(x.device)

def initial_noise(net, noise, shape, t):
    """t * unit noise (b,C,H,W), on the device of the net: where sampling begins."""
    return t * noise(torch.zeros(shape, device=next(net.parameters()).device))

class NotFinite(UserError):
    """Samples that are not; the network is to blame."""

def draw_part(draw, part, y, shape, seed):
    """Images `part` (b,) of those that `draw_many` draws: (b,H,W,C) uint8."""
    y_part = None if y is None else y[part]
    noise = SeededNoise(part, seed)
    x = draw(y_part, noise, (len(part), *shape))
    if (~x.isfinite()).any():
        raise NotFinite("the network draws what is not finite: it has diverged, or --precision "
                        "fp32 helps")
    return to_uint8(x)

def draw_many(run, draw, n, y, shape, seed, batch=64):
    """n images (n,H,W,C) uint8, shared out among the ranks; image i depends on (seed, i) alone.

    draw: (y (b,), noise, shape (b,C,H,W)) -> images (b,C,H,W) in [-1, 1], b <= `batch`. noise: a
    SeededNoise, whose `indices` (b,) say which of the n images they are.
    """
    C, H, W = shape
    images = torch.zeros(n, H, W, C, dtype=torch.uint8, device=run.device)
    parts = torch.arange(n, device=run.device).split(batch)
    quick = n <= 8 * batch
    for part in progress_bar(parts[run.rank::run.world], unit="batch", leave=False,
                             disable=quick or not run.main):
        images[part] = draw_part(draw, part, y, shape, seed)
    if run.world > 1:
        torch.distributed.all_reduce(images)
    return images.cpu().numpy()

def labels_that_occur(net):
    """Those of a network's labels that occur in the data it was trained on, as far as is known."""
    data = getattr(net, "data", None)
    return data["present"] if data and net.classes else list(range(net.classes))

def show_samples(args, run, step, log, draws, classes, shape, last=None, **more):
    """`sample_grid` and, of the first of `draws`, `measure_samples`, where they are due: at the
    `last` step, too (default: of the run)."""
    if last is None:
        last = step == args.total_steps
    if log.sound and due(args.sample_every, step, last):
        sample_grid(args, run, step, log, draws, classes, shape, **more)
    if log.sound and due(args.eval_every, step, last):
        measure_samples(args, run, step, log, draws[0], classes, shape)

def sample_grid(args, run, step, log, draws, classes, shape, name="", columns=None):
    """Write samples/STEP.png from the same noise every time: a block of 8 rows for each of `draws`,
    see `draw_many`. classes: those that occur in turn, a column each, at most 10; 0: 8 columns."""
    labels = run.data["present"] if run.data and classes else list(range(classes))
    columns = columns or min(len(labels), 10) or 8
    y = torch.tensor(labels * 8 * columns, device=run.device)[:8 * columns] if classes else None
    with saved_for_good(log):
        blocks = [draw_many(run, draw, 8 * columns, y, shape, args.seed, args.micro_batch)
                  for draw in draws]
        if run.main:
            save_grid(Path(args.out_dir, "samples", f"{step:06d}{name}.png"), blocks, columns)

@contextlib.contextmanager
def saved_for_good(log):
    """If the run ends in here what it has saved stays, unless that draws what is not finite."""
    try:
        yield
    except NotFinite:
        raise
    except BaseException:
        log.confirm()
        raise

LIVE_SAMPLES = 500  # that --eval-every measures

def measure_samples(args, run, step, log, draw, classes, shape):
    """`--eval-every`: a line of log.jsonl on LIVE_SAMPLES images, from the same noise every time.

    draw: see `draw_many`. classes: 0, or they are of the data's labels in proportion.
    """
    y, labels = None, log.labels
    if classes:
        places = np.arange(LIVE_SAMPLES) * len(labels) // LIVE_SAMPLES
        y = torch.from_numpy(np.sort(labels)[places]).to(run.device)
    with log.pause(), saved_for_good(log):
        images = draw_many(run, draw, LIVE_SAMPLES, y, shape, args.seed, args.micro_batch)
        if run.main:
            values = log.judge.measure(images, y)
            log.write(dict(step=step) | values)
            names = dict(distance="dist", read="read")
            log.show({names[key]: f"{value:.3g}" for key, value in values.items()})

def labels_to_draw(args, net, n, device, key="labels"):
    """`--labels` in turn, or all that occurred in training, for n images: (n,) int64; None without
    labels."""
    labels = getattr(args, key) or labels_that_occur(net)
    if labels and max(labels) >= net.classes:
        known = f"the labels 0 to {net.classes - 1}" if net.classes else "no labels"
        raise UserError(f"{flag_name(key)} {' '.join(map(str, labels))}: this network has {known}")
    if not labels:
        return None
    turns = math.ceil(n / len(labels))
    return torch.tensor(labels * turns, device=device)[:n]

def sampling_net(args, run, scripts):
    """The network of `--ckpt`, placed, and its checkpoint, see `load_network`."""
    net, trained = load_network(args.ckpt, scripts)
    net.data = trained.get("data")
    return place(net, run), trained

def nearest_level(N, sigma):
    """Of the N levels of the Karras grid the one nearest to `sigma` in ln t, as a network sees t;
    but not t_min, where a consistency function is the identity."""
    return min(karras_times(N)[1:].tolist(), key=lambda level: abs(math.log(level / sigma)))

def note_levels(net, sigmas):
    """Say whether a consistency model from scratch has not seen some of `sigmas`: it learned the
    levels of its last grid alone, and may draw noise at others. A student begins as its teacher,
    which knows them all."""
    if not net.levels:
        return
    nearest = [nearest_level(net.levels, sigma) for sigma in sigmas]
    # up to 5% beside a level did no harm on MNIST
    if any(abs(math.log(level / sigma)) > 0.05 for level, sigma in zip(nearest, sigmas)):
        words = " ".join(f"{level:.4g}" for level in dict.fromkeys(nearest))
        print(f"note: this network learned {net.levels} noise levels, and may draw badly at "
              f"others; the nearest are --sigmas {words}")

def sample_checkpoint(args, run, net, draw, calls, trained):
    """`--ckpt`: draw images and save them, or with `--eval n` measure them.

    draw: see `draw_many`. calls: of the net for an image. trained: the checkpoint it is of.
    """
    compile_in_place(run, net)
    shape = 3, net.image_size, net.image_size
    n = args.eval or args.sample or 64
    y = labels_to_draw(args, net, n, run.device)
    if args.eval:
        evaluate = import_beside("evaluate", "--eval measures with tests/evaluate.py")
        return evaluate.evaluate(args, run, draw, y, shape, calls, trained, args.micro_batch)
    path = make_save_path(args)
    images = draw_many(run, draw, n, y, shape, args.seed, args.micro_batch)
    if run.main:
        side = math.isqrt(n - 1) + 1
        turn = len(args.labels or labels_that_occur(net))
        if not 0 < turn <= 16:
            turn = 1
        save_samples(path, images, y, columns=turn * max(round(side / turn), 1))  # a column a label
        print(f"{n} samples, {calls} network call(s) each, EMA weights of {args.ckpt}: {args.save}")

# --------------------------------------------------------------------------------------------------
# Flags. Each is said once, where it is added, with the condition under which it applies.
# --------------------------------------------------------------------------------------------------

def flag_name(key):
    return "--" + key.replace("_", "-")

def show_value(value):
    """A setting as it is written on the command line."""
    if isinstance(value, (tuple, list)):
        return ",".join(map(str, value))
    return str(value).lower() if value in (None, True, False) else str(value)

def number(kind, low, high=math.inf, name="number"):
    """An argparse type: `kind` within [low, high]."""
    def convert(text):
        value = kind(text)
        if not low <= value <= high:
            raise ValueError
        return value
    convert.__name__ = name
    return convert

positive = number(int, 1, name="positive integer")
count = number(int, 0, name="count")
probability = number(float, 0, 1)
guidance_weight = number(float, -1, name="guidance weight (-1 or more)")
noise_level = number(float, T_MIN, T_MAX, "noise level")

def p_of_t(word):
    """The argparse type of `--p-t MEAN STD | uniform`."""
    return word if word == "uniform" else float(word)

def check_p_t(p_t, times):
    """See that p(t) can be drawn from on the grid `times`. Raises UserError."""
    lognormal = len(p_t) == 2 and "uniform" not in p_t and p_t[1] > 0
    drawable = p_t == ["uniform"] or lognormal
    if not drawable or not interval_probabilities(times, p_t).isfinite().all():
        raise UserError(f"--p-t {' '.join(map(str, p_t))}: name MEAN STD of ln t, or uniform")

def condition_holds(value, wanted):
    """wanted: True or False: the value is truthy or falsy; else it, or one of a tuple of values."""
    if isinstance(wanted, bool):
        return bool(value) == wanted
    return value in (wanted if isinstance(wanted, tuple) else (wanted,))

def with_setting(key, value):
    """"with --key value" as a message says it, "without --key" if there is no value."""
    if value is True:
        return f"with {flag_name(key)}"
    name = flag_name(key)
    return f"with {name} {show_value(value)}" if value else f"without {name}"

def describe(only):
    """The condition in words, for --help."""
    parts = []
    for key, wanted in only.items():
        values = wanted if isinstance(wanted, tuple) else (wanted,)
        parts.append(" or ".join(with_setting(key, value) for value in values))
    return ", ".join(parts)

class FlagGroup:
    """Flags under one title of --help, all with the conditions `only`."""
    def __init__(self, parser, title, only):
        self.parser, self.only = parser, only
        self.group = parser.add_argument_group(f"{title} ({describe(only)})" if only else title)

    def flag(self, name, *, only=None, default=None, help, **settings):
        """Add a flag. only: the settings with which it applies, {key: what `condition_holds`
        takes}, or a list of such, any of which will do. default: if the recipe has none."""
        alternatives = only if isinstance(only, list) else [only or {}]
        key = name.removeprefix("--").replace("-", "_")
        self.parser.conditions[key] = [self.only | alternative for alternative in alternatives]
        self.parser.defaults[key] = default
        note = "; or ".join(filter(None, map(describe, alternatives)))
        self.group.add_argument(name, help=f"{help} [{note}]" if note else help, **settings)

class Parser(argparse.ArgumentParser):
    """Flags are absent unless given; an error is one line with exit code 2."""
    def __init__(self, description):
        super().__init__(description=description, argument_default=argparse.SUPPRESS,
                         allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.conditions, self.defaults = {}, {}

    def group(self, title, **only):
        return FlagGroup(self, title, only)

    def error(self, message):
        if message.startswith("unrecognized arguments: --"):
            wrong = message.split()[2].split("=")[0]
            near = difflib.get_close_matches(wrong, self._option_string_actions, 1)
            near = MOVED.get(wrong, near)
            message += f" (did you mean {near[0]}?)" if near else ""
        raise UserError(message)

    def why_not(self, key, settings):
        """Why a flag does not apply with these settings ("with --recipe ect"), None if it does."""
        failures = []
        for only in self.conditions.get(key, [{}]):
            failed = [name for name, wanted in only.items()
                      if not condition_holds(settings.get(name), wanted)]
            if not failed:
                return None
            met_before = list(only).index(failed[0])
            value = settings.get(failed[0])
            failures.append((met_before, with_setting(failed[0], value)))
        return max(failures)[1]  # of the alternative that came nearest

    def can_sample(self, key):
        """Whether a flag may apply with --ckpt."""
        alternatives = self.conditions.get(key, [{}])
        return any(only.get("ckpt") is not False for only in alternatives)

MOVED = {  # flags of before
    "--times": ["--p-t"],
    "--stage": ["python cd.py --stage"],
    "--label-dropout": ["python cd.py --stage teacher --label-dropout"],
    "--search-times": ["python tests/bench.py search-times"],
    "--tensorboard": ["python tests/bench.py tensorboard"],
}
# What the teacher that a script trains first shares with its student.
RUN_FLAGS = ("dataset", "data_dir", "cache_dir", "class_cond", "flip", "net", "workers",
             "overwrite", "seed", "log_every", "sample_every", "eval_every", "save_every",
             "inception", "device", "precision", "compile", "gradient_checkpointing")
PRECISIONS = "auto", "bf16", "tf32", "fp32"
SAMPLING_DEFAULTS = dict(micro_batch=64, compile=False, dataset=None)  # others than in training

def add_shared_flags(parser, net_only):
    """The flags that mean the same in all four scripts. net_only: when a net is to be chosen."""
    measured = dict(ckpt=True, eval=True)
    switch = argparse.BooleanOptionalAction
    data = parser.group("data")
    data.flag("--dataset", only=[dict(ckpt=False), measured], default="glyphs", metavar="NAME",
              help=f"glyphs (default), {', '.join(NAMED)}, or a path: a folder (class = "
              "sub-folder) or zip of images, an .npz or .npy of uint8 images")
    data.flag("--data-dir", only=[dict(ckpt=False, dataset=NAMED), measured], metavar="DIR",
              help="where a named data set lies; mnist and cifar10 are fetched into it (data)")
    data.flag("--cache-dir", only=[dict(ckpt=False), measured], metavar="DIR",
              help="where compressed arrays are unpacked (default: in .unpacked beside them, or, "
              "where that cannot be written, in ~/.cache)")
    net = parser.group("data and network, training", ckpt=False)
    net.flag("--class-cond", only=net_only, action=switch,
             help="condition on the labels (default: as the paper; for a path, if it has any)")
    net.flag("--flip", action=switch,
             help="mirror half of the images (default: not for digits, nor for ECT's data sets)")
    net.flag("--net", only=net_only, nargs="+", metavar="NAME KEY=VALUE",
             help=f"{', '.join(NETS)}, and changes to its settings, e.g. --net cifar-small base=32 "
             "mult=1,2,2 blocks=1 attention=16,8 image_size=32")
    net.flag("--dropout", type=probability, metavar="P", help="dropout in the residual blocks")
    net.flag("--dropout-size", only=dict(dropout=True), default=0, type=count, metavar="S",
             help="of these the ones whose maps have S pixels or fewer a side (iCT, ECT, sCM "
             "ImageNet-64 16); 0: all (default)")
    net.flag("--workers", type=count, metavar="N",
             help="processes that read images ahead (default: of files cores - 1, at most 8; of "
             "arrays on a disk 1, in memory 0)")

    train = parser.group("training", ckpt=False)
    out_dir = f"out/{parser.prog.removesuffix('.py')}"
    train.flag("--out-dir", default=out_dir, metavar="DIR",
               help=f"receives last.pt, ema.pt, log.jsonl, samples/ (default {out_dir}). A run "
               "found there is resumed")
    train.flag("--total-steps", type=positive, metavar="K", help="optimizer steps of the whole run")
    train.flag("--batch-size", type=positive, metavar="B", help="images a step, of all processes")
    train.flag("--lr", type=number(float, 0), metavar="LR",
               help="learning rate: constant, but falls to 0 in each round of guided_distill.py")
    train.flag("--ema-decay", type=probability, metavar="D",
               help="decay, a step, of the average used for sampling")
    train.flag("--gradient-checkpointing", default=False, action="store_true",
               help="recompute each block in the backward pass: less memory, one forward pass more")
    every = dict(type=count, metavar="K")
    train.flag("--log-every", default=50, **every,
               help="steps between lines of log.jsonl; 0 = never (default 50)")
    train.flag("--sample-every", default=500, **every,
               help="steps between grids of samples; 0 = never (default 500)")
    train.flag("--eval-every", default=0, **every,
               help=f"steps between measurements of {LIVE_SAMPLES} samples of the grid's first "
               "kind, into log.jsonl: Frechet distance to the data, in features of a classifier "
               "that is trained first (Inception's, without labels), and share read as asked; 0 = "
               "never (default)")
    train.flag("--save-every", default=500, **every,
               help="steps between checkpoints; 0 = only at the end (default 500)")

    sample = parser.group("sampling", ckpt=True)
    unmeasured = dict(eval=False)
    sample.flag("--sample", only=unmeasured, type=positive, metavar="N",
                help="how many images (default 64)")
    sample.flag("--eval", type=number(int, 10, name="count (10 or more)"), metavar="N",
                help="draw N images and measure FID, IS, precision and recall against --dataset, "
                "by default what the checkpoint was trained on, or an .npz of statistics (mu, "
                "sigma). Called FID where N is 50000, FID@N elsewhere")
    sample.flag("--inception", only=[measured, dict(ckpt=False, eval_every=True)], metavar="FILE",
                help="weights of torch-fidelity's Inception (default: its own place)")
    sample.flag("--labels", type=count, nargs="+", metavar="Y",
                help="classes to draw, in turn (default: all)")
    sample.flag("--save", only=unmeasured, default="samples.png", metavar="PATH",
                help="a .png grid, an .npz as ADM's evaluator reads it, or a folder, which is a "
                "data set (default samples.png)")

    both = parser.group("sampling and training")
    both.flag("--ckpt", metavar="FILE",
              help="sample with this checkpoint's EMA weights instead of training")
    both.flag("--overwrite", only=[dict(ckpt=False), dict(eval=False)], default=False,
              action="store_true", help="start anew in --out-dir; delete old samples in --save DIR")
    both.flag("--seed", default=0, type=count, metavar="S", help="of everything random (default 0)")
    both.flag("--micro-batch", type=positive, metavar="B",
              help="images a pass through the network, part of the seed: when training it divides "
              "--batch-size; the default depends on recipe, processes and GPU memory, and is kept "
              "on resume. When sampling 64 by default. Lower it if memory runs out")
    both.flag("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"),
              help="default: the first of these that is there")
    both.flag("--precision", default="auto", choices=PRECISIONS,
              help="of convolutions and attention: auto: bf16 where the device computes in it; "
              "tf32: TF32 on CUDA, fp32 elsewhere (default: auto; ct.py's ict and ect, but for "
              "digits and paths, tf32). On CUDA the rest, LPIPS and critics above all, is in TF32 "
              "unless fp32 is named")
    both.flag("--compile", action=switch,
              help="torch.compile the network (default: on CUDA, when training)")

def parse_flags(parser, recipe, check=None):
    """Read the command line: a namespace of all settings; when training, of those that apply.

    recipe: what the user gave, a dict -> the settings it implies. check: raises UserError for
    settings that do not fit each other, when training.
    """
    sys.excepthook = one_line_errors
    flags = vars(parser.parse_args())
    sampling = "ckpt" in flags
    defaults = SAMPLING_DEFAULTS if sampling else recipe(flags)
    settings = parser.defaults | defaults | flags
    for key in flags:
        reason = parser.why_not(key, settings)
        if reason:
            raise UserError(f"{flag_name(key)} does not apply {reason}")
    sigmas = settings.get("sigmas") or [T_MAX]
    if sorted(sigmas, reverse=True) != sigmas:
        raise UserError(f"--sigmas {' '.join(map(str, sigmas))}: name the largest first")
    if sampling:
        kept = {key: value for key, value in settings.items() if parser.can_sample(key)}
        return argparse.Namespace(**kept)

    batch_size, micro_batch = settings["batch_size"], flags.get("micro_batch")
    if micro_batch and batch_size % micro_batch:
        raise UserError(f"--batch-size {batch_size} is not a multiple of --micro-batch "
                        f"{micro_batch}")
    settings["micro_batch_limit"] = settings["micro_batch"]  # the recipe's
    settings["micro_batch"] = micro_batch  # None: chosen by `resume`
    kept = {key: value for key, value in settings.items()
            if key in FREE_FLAGS or not parser.why_not(key, settings)}
    args = argparse.Namespace(**kept)
    if check:
        check(args)
    return args

def refuse(args, keys, why):
    """Raises UserError for the first of `keys` that is set: "--key does not apply {why}"."""
    for key in keys:
        if getattr(args, key):
            raise UserError(f"{flag_name(key)} does not apply {why}")

def add_parametrisation_flag(group):
    group.flag("--parametrisation", only=dict(objective="discrete"), choices=PARAMETRISATIONS,
               default="skip", help="f = c_skip x + c_out F (skip, CM Eq. 5, default), or F alone "
               "above t_min (free, CM Eq. 4)")

def add_continuous_flags(group):
    """Of the objectives in continuous time, for a parser's `group`."""
    group.flag("--bandwidth", only=dict(objective=("continuous", "scm")), type=number(float, 0),
               metavar="RAD", help="cut off features of the time embedding that turn faster, in "
               f"rad per unit of ln t (default {BANDWIDTH:g}, digits 1; inf: none)")
    scm = dict(objective="scm")
    group.flag("--r", only=scm, type=probability, metavar="R",
               help="share of the tangent's second term, in the end (sCM 1). Below 1: part of the "
               "way to the end of the trajectory, part denoising")
    group.flag("--warm-up", only=scm, type=positive, metavar="K",
               help="steps in which r rises from 0 (sCM 10000)")
    group.flag("--tangent-c", only=scm, type=number(float, 1e-6, 1e3), metavar="C",
               help="the tangent is divided by its rms + C (sCM 0.1)")
    group.flag("--lr-decay", only=scm, type=positive, metavar="K",
               help="the learning rate falls as sqrt(K / step) after K steps (sCM ImageNet-64 "
               "35000; default: constant)")

def learning_rate(args, step):
    """That of a step: constant, or what --lr-ramp, by the images before it, and --lr-decay make."""
    lr = args.lr
    lr_ramp, lr_decay = (getattr(args, key, None) for key in ("lr_ramp", "lr_decay"))
    if lr_ramp:
        lr *= min(step * args.batch_size / lr_ramp, 1)
    if lr_decay:
        lr /= math.sqrt(max(step / lr_decay, 1))
    return lr

def dropout_settings(args):
    """The net settings that --dropout and --dropout-size make."""
    return dict(dropout=args.dropout, dropout_size=getattr(args, "dropout_size", 0))

# --------------------------------------------------------------------------------------------------
# Teachers: denoisers that students are distilled from
# --------------------------------------------------------------------------------------------------

BIG = dict(flip=True, N=40)
DATASETS = {  # what a teacher and the students distilled from it have in common
    "glyphs": dict(net=["glyphs"], flip=False, micro_batch=32, N=18),
    "mnist": dict(net=["mnist"], flip=False, micro_batch=16, N=18),
    "path": dict(net=["cifar-small"], flip=True, micro_batch=32, N=18),  # your own images
    "cifar10": dict(net=["cifar10"], flip=True, micro_batch=128, N=18, class_cond=False),
    "imagenet64": dict(net=["imagenet64"], micro_batch=64, class_cond=True) | BIG,
    "bedroom256": dict(net=["lsun256"], micro_batch=8, class_cond=False) | BIG,
    "cat256": dict(net=["lsun256"], micro_batch=8, class_cond=False) | BIG,
}

DIGITS = "glyphs", "mnist"  # whose recipes were tuned here, for minutes on 2 cores

def known_dataset(flags):
    """The name under which the recipes of `--dataset` stand: "path" for your own images."""
    dataset = flags.get("dataset", "glyphs")
    return dataset if dataset in DATASETS else "path"

def train_first_teacher(args, run, stop, script, label_dropout=0.0):
    """Train the teacher that a `script` without --teacher begins with; args names it afterwards."""
    cd = import_beside("cd", "without --teacher one is trained first, by cd.py")
    cd.train_first_teacher(args, run, stop, script, label_dropout)

def open_teacher(args, run):
    """The network of `--teacher FILE`, placed, or None for `ideal` and `none`; its model arguments.

    The file's digest is kept in `args.teacher_digest`: a resumed run notices another teacher.
    """
    if args.teacher in ("ideal", "none"):
        return None, net_settings(args.net)
    if Path(args.teacher).resolve().parent == Path(args.out_dir).resolve():
        raise UserError(f"--out-dir {args.out_dir} holds the --teacher: choose another")
    with main_process_first(run):
        teacher, trained = load_network(args.teacher, ("cd",))
        args.teacher_digest = file_sha(args.teacher)
    if trained["args"].get("stage", "teacher") != "teacher":
        raise UserError(f"--teacher {args.teacher} holds a student, and no teacher")
    teacher.data, teacher.script = trained.get("data"), trained["script"]
    if trained["script"] is None and run.main:
        print(f"--teacher {args.teacher} is taken for a teacher")
    return place(teacher, run), trained["model_args"]

def teacher_denoiser(args, run, teacher, dataset):
    """What the student is distilled from, D(x, t, y or None) -> denoised x, None for `none`; and
    how many labels it knows. Raises UserError if teacher and data do not fit."""
    if teacher is not None:
        if teacher.classes and dataset.classes != teacher.classes:
            raise UserError(f"--teacher {args.teacher} knows {teacher.classes} classes, and "
                            f"{args.dataset} has {dataset.classes}")
        if teacher.classes:
            check_class_order(dataset, teacher.script, teacher.data, args.teacher)
        changed = data_differences(teacher.data, run.data) if teacher.script else []
        known = (teacher.data or {}).get("names", ())  # (): of an older version
        if teacher.classes and changed and dataset.names and known not in (None, dataset.names):
            raise UserError(f"--teacher {args.teacher} was trained on other classes than "
                            f"{args.dataset} has ({changed[0]})")
        if changed and run.main:
            print(f"note: --teacher {args.teacher} was trained on other images than {args.dataset} "
                  f"({'; '.join(changed)})")
        return net_denoiser(teacher), teacher.classes
    if args.class_cond and not dataset.classes:
        raise UserError(f"--class-cond: {args.dataset} has no labels")
    classes = 0 if args.class_cond is False else dataset.classes
    if args.teacher == "none":
        return None, classes
    if len(dataset) * 3 * dataset.size**2 > 4e9:
        raise UserError(f"--teacher ideal goes through all images of {args.dataset}: too many")
    everything = dataset.__getitems__(np.arange(len(dataset)))
    where = "cpu" if run.device.type == "mps" else run.device  # mps knows no float64
    images, labels = (part.to(where) for part in everything)
    if args.flip:
        images = torch.cat([images, images.flip(3)])
        labels = labels.repeat(2)
    return ideal_denoiser(images, labels), classes

def check_guidance(args, teacher, classes):
    """Raises UserError if `--w-max` asks for guidance, and the teacher cannot guide."""
    if args.w_max and not classes:
        raise UserError("--w-max needs labels, and there are none: --w-max 0 does without")
    if args.w_max and teacher is not None and teacher.null_y is None:
        raise UserError(f"--w-max: {args.teacher}, trained without --label-dropout, cannot guide")

# --------------------------------------------------------------------------------------------------
# Editing: what the scripts' ways have in common
# --------------------------------------------------------------------------------------------------

def add_edit_flags(parser, tasks):
    """The flags of any editing. Returns their group, for more."""
    group = parser.group("editing", ckpt=True)
    group.flag("--edit", only=dict(eval=False), choices=tasks, help="what to do to the --image "
               "files, --sample results each (default 4; denoise and style 1, interpolate 10)")
    group.flag("--image", only=dict(edit=True), nargs="+", metavar="FILE",
               help="images to edit; interpolate needs none")
    group.flag("--mask", only=dict(edit="inpaint"), metavar="FILE",
               help="white where to paint (default: a central square of half the side)")
    return group

def add_zero_shot_flags(parser):
    """Those of editing with a consistency function, see cd.py."""
    group = add_edit_flags(parser, ("inpaint", "colorize", "superres", "stroke", "denoise",
                                    "interpolate"))
    group.flag("--factor", only=dict(edit="superres"), type=number(int, 2), metavar="P",
               help="pixels of a patch's side (default: size / 32, at least 2; CM 8 at 256 pixels)")
    group.flag("--noise-level", only=dict(edit="denoise"), type=noise_level, metavar="T",
               help="standard deviation, in units of [-1, 1] (default 0.296)")
    group.flag("--noisy", only=dict(edit="denoise"), action="store_true",
               help="the images carry that noise already; add none")

def read_image(path, size, factor=None):
    """An `--image` file -> (3,size,size) in [-1, 1], and whether it was whole: with `factor` one of
    size / factor pixels will do too, and is not."""
    from PIL import Image
    what = f"--image {path}"
    with explain(f"{what} cannot be read as an image"), open(path, "rb") as file:
        image = to_rgb(upright(open_image(file)), what)
        small = factor is not None and image.size == (size // factor, size // factor)
        if small:
            image = image.resize((size, size), Image.Resampling.NEAREST)
        pixels = torch.from_numpy(fit_image(image, size, what).copy())
        return pixels.permute(2, 0, 1) / 127.5 - 1, not small

def read_mask(path, size, images=()):
    """(1,1,size,size): 1 where the mask is transparent, or, if it is so nowhere, nearer to white
    than to black; without one, the central square.

    images: the files that it is for, whose aspect ratio it must have: it is cropped as they are.
    """
    from PIL import Image
    mask = torch.zeros(1, 1, size, size)
    if path is None:
        middle = slice(size // 4, size - size // 4)
        mask[..., middle, middle] = 1
        return mask
    what = f"--mask {path}"
    with explain(f"{what} cannot be read as an image"), open(path, "rb") as file:
        image = upright(open_image(file))
        rgba = np.asarray(image.convert("RGBA")) if is_transparent(image) else None
        white = np.asarray(to_rgb(image, what)).mean(2)
    if rgba is not None and rgba[..., 3].min() < 255:
        white = 255.0 - rgba[..., 3]
        if set(np.unique(rgba[white == 0][:, :3])) in ({255}, {0, 255}):
            raise UserError(f"{what} is transparent in some places and white in others: leave one "
                            "of them out")
    elif white.max() <= 1:  # a mask of 0 and 1
        white = 255 * white
    height, width = white.shape
    for name in images:
        with explain(f"--image {name} cannot be read as an image"), Image.open(name) as image:
            wide, high = upright(image).size
        if abs(wide * height - high * width) > max(wide, high, width, height):  # a pixel or more
            raise UserError(f"{what} is {width}x{height}, of another shape than {name}, {wide}x"
                            f"{high}: it would be in the wrong place")
    grey = Image.fromarray(white.round().astype(np.uint8))
    mask[0, 0] = torch.from_numpy(fit_image(grey, size, what)[..., 0] > 127.5)
    if mask.min() == mask.max():
        raise UserError(f"{what} paints {'everything' if mask.max() else 'nothing'}: it should be "
                        "white where to paint, black elsewhere")
    return mask

def check_images(args, net, key="labels"):
    """Raises UserError if `--edit` has no --image, or not one label, or one for each image."""
    if not args.image:
        raise UserError(f"--edit {args.edit} needs --image")
    labels = getattr(args, key) or ()
    if net.classes and len(labels) not in (1, len(args.image)):
        raise UserError(f"this network draws classes: say with {flag_name(key)} which each --image "
                        "is, one for all or one for each")

def draw_edits(args, run, net, draw, rows, each, summary, before=None, after=None):
    """`--edit`: draw and save `each` results in each of `rows` rows: result i is of row i // each.

    draw: see `draw_many`. before, after: (rows,C,H,W), shown at the ends of a .png's rows, or None.
    """
    path = make_save_path(args)
    y = labels_to_draw(args, net, rows, run.device)
    if y is not None:
        y = y.repeat_interleave(each)
    shape = 3, net.image_size, net.image_size
    images = draw_many(run, draw, rows * each, y, shape, args.seed, args.micro_batch)
    if not run.main:
        return
    columns = each
    if path.suffix == ".png":
        blocks = [torch.from_numpy(images).unflatten(0, (rows, each))]
        if before is not None:
            blocks.insert(0, to_uint8(before)[:, None].cpu())
        if after is not None:
            blocks.append(to_uint8(after)[:, None].cpu())
        picture = torch.cat(blocks, 1)  # (rows,columns,H,W,3)
        images, columns = picture.flatten(0, 1).numpy(), picture.shape[1]
    save_samples(path, images, y, columns)
    print(f"{args.edit}: {rows} row(s), {each} result(s) each, {summary}, EMA weights of "
          f"{args.ckpt}: {args.save}")

# --------------------------------------------------------------------------------------------------
# Packing: python common.py IMAGES OUT.npz --size 64
# --------------------------------------------------------------------------------------------------

class Packed:
    """Batches of a data set for `pack`: images (b,H,W,C) uint8, black where one cannot be read; and
    what was wrong, texts."""
    def __init__(self, dataset):
        self.dataset = dataset

    def __getitems__(self, indices):
        size, problems = self.dataset.size, []
        images = np.zeros((len(indices), size, size, 3), np.uint8)
        for place, i in enumerate(indices):
            try:
                images[place] = self.dataset.read(i)
            except UserError as error:
                problems.append(str(error))
        return torch.from_numpy(images), problems

def pack(path, dataset, workers):
    """Write a data set to an .npz that need not be unpacked: arr_0 the images, (n,size,size,3)
    uint8, cropped and shrunk as ADM does; arr_1 the labels, class_names the names of the classes,
    if there are. Raises UserError that names all images that cannot be read; nothing is left then.
    """
    n, shape = len(dataset), (len(dataset), dataset.size, dataset.size, 3)
    pieces = np.array_split(np.arange(n), math.ceil(n / 64))
    loader = make_loader(Packed(dataset), pieces, workers, torch.device("cpu"))
    problems = []
    with atomic_file(path) as file, zipfile.ZipFile(file, "w") as archive:
        def member(name):
            return archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True)
        with member("arr_0") as target:
            header = dict(descr="|u1", fortran_order=False, shape=shape)
            np.lib.format.write_array_header_1_0(target, header)
            for images, wrong in progress_bar(loader, total=len(pieces), unit="batch"):
                target.write(images.numpy())
                problems += wrong
        refuse_images(dataset.source, n, problems)
        extra = dict(arr_1=dataset.labels) if dataset.classes else {}
        if dataset.names:
            extra["class_names"] = np.array(dataset.names)
        for name, array in extra.items():
            with member(name) as target:
                np.lib.format.write_array(target, array, allow_pickle=False)

def main():
    """Pack the images that the command line names."""
    parser = argparse.ArgumentParser(
        description="Make of any data set one .npz that the scripts map into memory: its images "
        "are cropped and shrunk once, not at every step.")
    parser.add_argument("images", help="as --dataset: a folder, a zip, an .npz, cifar10, ..")
    parser.add_argument("out", type=Path, help="the .npz to write")
    parser.add_argument("--size", type=number(int, 8), required=True, help="pixels of a side")
    parser.add_argument("--data-dir", metavar="DIR", help="where a named data set lies")
    parser.add_argument("--cache-dir", metavar="DIR", help="where compressed arrays are unpacked")
    parser.add_argument("--workers", type=count, default=os.cpu_count(), metavar="N",
                        help="processes that decode (default: one a core)")
    args = parser.parse_args()
    if args.out.suffix != ".npz" or args.out.exists():
        raise UserError(f"{args.out}: name an .npz that does not exist yet")
    dataset = load_dataset(args.images, args.data_dir, args.size, args.cache_dir)
    print(dataset.describe())
    dataset.check()
    pack(args.out, dataset, args.workers)
    print(f"{args.out}: {len(dataset):,} images of {args.size} pixels, {dataset.classes} classes, "
          f"{args.out.stat().st_size / 1e6:,.1f} MB, SHA-256 {file_sha(args.out)}..")

if __name__ == "__main__":
    sys.excepthook = one_line_errors
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that nothing is left behind
    main()
