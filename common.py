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
import functools
import hashlib
import importlib
import io
import json
import math
import os
import pickle
import shutil
import signal
import socket
import sys
import tarfile
import time
import types
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

T_MIN, T_MAX = 0.002, 80.0  # EDM Table 1; CM calls t_min epsilon and t_max T
RHO, SIGMA_DATA = 7.0, 0.5

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

def c_noise(t):
    """What the network is told of t: EDM's ln(t)/4, times 1000 as ADM's embedding expects."""
    return 250 * t.log()

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

    f(x, t_min) = x to the last bit. Arguments as `denoise`. Source: CM Sec. 3, App. C.
    """
    return precondition(net, x, t, y, cond, masks, cm_scalings)

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

def heun_sample(D, x_T, N, churn=0.0, churn_min=0.05, churn_max=50.0,
                churn_noise=1.003, noise=torch.randn_like):
    """Solve the ODE from T_MAX to 0 in N Heun steps, 2 N - 1 calls of D; with churn, the SDE.

    churn, churn_min, churn_max, churn_noise: EDM's S_churn, S_tmin, S_tmax, S_noise.
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
        step = heun_step if t_next > 0 else euler_step
        x = step(D, x, levels_like(x, t), levels_like(x, t_next))
    return x

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
    """D(x, t) for labels y; if w (B,) is given, (1 + w) D(x, t, y) - w D(x, t, None)."""
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

def consistency_jvp(net, x, t, dx_dt, y=None, cond=None, masks=None):
    """f(x, t) and df/dt along a path through (x, t) with velocity dx_dt, (B,C,H,W) each, exact.

    Both carry gradients to the parameters unless those are switched off. Source: CM App. B.
    """
    # float32: a derivative needs more than bf16's three digits. forward is never the compiled one.
    forward = functools.partial(net.forward, dtype=x.dtype)

    def f(x, t):
        return consistency(forward, x, t, y, cond, masks)

    # The fused attention kernels have no forward derivative.
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return torch.func.jvp(f, (x, t), (dx_dt, torch.ones_like(t)))

def continuous_loss(net, x_t, t, dx_dt, y, cond, masks, stop_gradient):
    """|df/dt|^2 of each image (B,), the mean over pixels: 0 for a consistency function.

    stop_gradient: differentiate with respect to f but not df/dt, as if a target network supplied
    it: CM's pseudo-objective 2 f . df/dt, which has the same gradient but a value that says
    nothing. Both its branches drop out the same units.
    Source: CM App. B, l2: Theorems 3 (without stop_gradient), 5 and 6, with lambda so that no
    factor is left. The gradients are the limits of those of the discrete losses with weights
    1 / (t_n1 - t_n)^2 and 1 / (t_n1 - t_n).
    """
    if not stop_gradient:  # differs from openai's JAX code, which takes the norm, not its square
        _, df_dt = consistency_jvp(net, x_t, t, dx_dt, y, cond, masks)
        return df_dt.square().flatten(1).mean(1)
    with torch.no_grad():
        _, df_dt = consistency_jvp(net, x_t, t, dx_dt, y, cond, masks)
    f_net = consistency(net, x_t, t, y, cond, masks)
    return l2(f_net, f_net.detach() - df_dt)

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

def sinusoidal_embedding(t, dim):
    """(B,) -> (B,dim): cosines, then sines, of t times frequencies 1 down to nearly 1/10000."""
    half = dim // 2
    powers = torch.arange(half, device=t.device, dtype=t.dtype)
    frequencies = torch.exp(-math.log(10000) / half * powers)
    angles = t[:, None] * frequencies
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
        # The 3C channels are q of all heads, k of all heads, v of all heads.
        qkv = self.qkv(self.norm(x))
        qkv = qkv.reshape(B, 3, self.heads, width, H * W)
        q, k, v = qkv.transpose(3, 4).unbind(1)  # (B,heads,HW,width) each
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

class UNet(nn.Module):
    """The ADM UNet F(x, c_noise, y, cond), with the settings of openai's consistency models.

    image_size: pixels of a side. base: channels, times mult at each level. blocks: residual blocks
    a level. attention: sizes of the maps that get it, in heads of head_channels. classes: labels, 0
    for none. scale_shift: the embedding scales and shifts the second norm, otherwise it is added.
    resblock_updown: resample inside residual blocks. cond: room for a second scalar (CTM's s,
    guidance weight w), which at first changes nothing. null: one more label, numbered `classes`,
    for "no label". time_scale: factor on c_noise (1/1000 in old students of NVIDIA's weights).
    Raises ValueError if the sizes do not fit each other.
    """
    def __init__(self, image_size, base, mult, blocks, attention, head_channels, classes=0,
                 dropout=0.0, scale_shift=True, resblock_updown=True, cond=False, null=False,
                 time_scale=1.0, channels=3):
        super().__init__()
        halvings, widths = len(mult) - 1, [base * m for m in mult]
        if image_size % 2**halvings or image_size < 8:
            raise ValueError(f"{image_size=} does not halve {halvings} times, or is below 8")
        if any(width % 32 or width % head_channels for width in widths):
            raise ValueError(f"widths {widths} are not multiples of 32 and of {head_channels=}")
        if null and not classes:
            raise ValueError("a null label needs other labels beside it")
        self.image_size, self.base, self.classes, self.cond = image_size, base, classes, cond
        self.null_y, self.time_scale = classes if null else None, time_scale
        self.scale_shift = scale_shift
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

    def draw_masks(self, n):
        """What dropout keeps of n images: for each residual block (n,C,H,W) bool; None if all.

        An argument of `forward`, so that several passes can share them, and drawn outside it, as
        what torch.compile makes of a random number depends on the graph around it.
        """
        if self.dropout == 0 or not self.training:
            return None
        device = next(self.parameters()).device
        masks = []
        for shape in self.block_shapes:
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
    exit code 2."""
    dynamo = sys.modules.get("torch._dynamo.exc")  # imported by what compiles alone
    if issubclass(kind, torch.OutOfMemoryError):
        error = f"out of memory, lower --micro-batch: {first_line(error)}"
    elif dynamo is not None and issubclass(kind, dynamo.TorchDynamoException):
        cause = getattr(error, "inner_exception", error)
        error = f"torch.compile fails, --no-compile does without: {first_line(cause)}"
    elif not issubclass(kind, UserError):
        return sys.__excepthook__(kind, error, trace)
    rank = environ("RANK")
    if ranks_differ or environ("LOCAL_RANK") == 0:
        for bar in bars:
            bar.close()
        message = str(error).strip().splitlines()[-1]  # after a loader's worker's traceback
        message = message.removeprefix("common.UserError: ")
        where = f"rank {rank}: " if rank else ""
        print(f"{Path(sys.argv[0]).name}: error: {where}{message}", file=sys.stderr, flush=True)
    raise SystemExit(2)

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
    """Import cd.py, or evaluate.py of tests/. Raises UserError that begins with `need`."""
    if name == "evaluate":
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

def fit_image(image, size, source):
    """A Pillow image as (size,size,3) uint8 RGB, shrunk to `size` on its short side and cropped.

    As ADM does: halve with a box filter while twice too large, then bicubic.
    """
    from PIL import Image
    if image.mode.startswith("I"):  # 16 bits a pixel
        grey = np.asarray(image).clip(0, 65535) / 257
        image = Image.fromarray(grey.round().astype(np.uint8))
    image = image.convert("RGB")
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

class Images:
    """n images of `size` pixels: `read(i)` gives one, (size,size,3) uint8."""
    def __init__(self, n, labels, size, source):
        self.n, self.size, self.source = n, size, source
        self.labels, self.classes = None, 0
        if labels is not None:
            labels = np.asarray(labels)
            whole = labels.dtype.kind in "iu"
            if labels.shape != (n,) or not whole or labels.min() < 0:
                raise UserError(f"{source}: the labels must be {n} integers, none negative, and "
                                f"are {labels.dtype} of shape {labels.shape}")
            self.labels = labels.astype(np.int64)
            self.classes = int(labels.max()) + 1

    def __len__(self):
        return self.n

    def __getitems__(self, indices):
        images = np.stack([self.read(int(i)) for i in indices])  # (b,H,W,3)
        labels = np.zeros(len(images), np.int64)
        if self.labels is not None:
            labels = self.labels[indices]
        images = images.transpose(0, 3, 1, 2).copy()
        return torch.from_numpy(images), torch.from_numpy(labels)

class ArrayImages(Images):
    """Images in arrays (n,H,W,3) uint8, one after the other: in memory or memory-mapped."""
    def __init__(self, parts, labels, size, source):
        self.parts, self.ends = parts, np.cumsum([len(part) for part in parts])
        super().__init__(int(self.ends[-1]), labels, size, source)

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
    def __init__(self, source, names, labels, size):
        self.names = np.array([os.fsencode(name) for name in names])  # bytes: compact, and shared
        super().__init__(len(names), labels, size, source)

    def read(self, i):
        from PIL import Image
        name = os.fsdecode(self.names[i])
        with explain(f"{self.source}/{name} cannot be read as an image"):
            with Image.open(io.BytesIO(read_file(self.source, name))) as image:
                image.load()
                return fit_image(image, self.size, f"{self.source}/{name}")

@functools.lru_cache(1)
def open_zip(path, pid):  # one handle a process: forked ones would share their place in the file
    return zipfile.ZipFile(path)

def read_file(source, name):
    """A file's bytes, of a folder or zip."""
    if source.is_file():
        return open_zip(source, os.getpid()).read(name)
    return (source / name).read_bytes()

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")

def is_image(name):
    hidden = any(part.startswith((".", "__MACOSX")) for part in name.split("/"))
    return name.lower().endswith(IMAGE_SUFFIXES) and not hidden

def load_files(source, size):
    """A folder or zip of images, labelled by `dataset.json` (EDM's layout) or by sub-folders."""
    with explain(f"{source} cannot be read"):
        if source.is_file():
            files = open_zip(source, os.getpid()).namelist()
        else:
            files = [Path(folder, file).relative_to(source).as_posix()  # a class may be a link
                     for folder, _, names in os.walk(source, followlinks=True) for file in names]
        index = read_file(source, "dataset.json") if "dataset.json" in files else None
    names = sorted(filter(is_image, files))
    if not names:
        raise UserError(f"{source} holds no images ({', '.join(IMAGE_SUFFIXES)})")
    labels = None
    classes = [name.split("/")[0] if "/" in name else "" for name in names]
    if index is not None:
        with explain(f"{source}/dataset.json does not list an integer label for each image"):
            pairs = json.loads(index)["labels"]
            if pairs is not None:
                label_of = dict(pairs)
                labels = [label_of[name] for name in names]
                wrong = [label for label in labels if type(label) is not int]
                if wrong:
                    raise ValueError(f"label {wrong[0]!r}")
    elif source.is_dir() and any(classes):
        if "" in classes:
            raise UserError(f"{source}/{names[classes.index('')]} has no label: other images lie "
                            "in sub-folders, one for each class")
        labels = np.searchsorted(sorted(set(classes)), classes)
    return FileImages(source, names, labels, size)

def map_array(path, key=None):
    """Memory-map a .npy, or one array of an .npz, unpacked beside it if it is compressed."""
    kind = "an array" if key is None else f"an npz with {key}"
    with explain(f"{path} cannot be read as {kind}"):
        if key is None:
            return np.lib.format.open_memmap(path, mode="r")
        with zipfile.ZipFile(path) as archive:
            member = archive.getinfo(f"{key}.npy")
            if member.compress_type == zipfile.ZIP_STORED:
                return map_stored(path, member.header_offset)
            unpacked = path.with_name(f"{path.stem}.{key}.npy")
            if not unpacked.exists() or unpacked.stat().st_mtime < path.stat().st_mtime:
                with archive.open(member) as source, atomic_file(unpacked) as target:
                    shutil.copyfileobj(source, target, 1 << 24)
        return np.lib.format.open_memmap(unpacked, mode="r")

def map_stored(path, offset):
    """Memory-map an array that lies in a zip as it is, from the member's header at `offset` on."""
    with open(path, "rb") as file:
        file.seek(offset + 26)  # a header has 30 bytes, then name and extra field, of these lengths
        lengths = np.frombuffer(file.read(4), "<u2")
        file.seek(lengths.sum(dtype=int), os.SEEK_CUR)
        version, _ = np.lib.format.read_magic(file)
        read_header = getattr(np.lib.format, f"read_array_header_{version}_0")
        shape, fortran, dtype = read_header(file)
        if dtype.hasobject:
            raise ValueError("it holds pickled objects")
        return np.memmap(file, dtype, "r", file.tell(), shape, "F" if fortran else "C")

IMAGE_KEYS, LABEL_KEYS = ("arr_0", "images", "x", "data"), ("arr_1", "labels", "y")

def load_arrays(path, size):
    """A .npy of images, or an .npz with them as one of IMAGE_KEYS, labels as one of LABEL_KEYS."""
    key, labels = None, None
    if path.suffix == ".npz":
        with explain(f"{path} cannot be read as an npz"), zipfile.ZipFile(path) as archive:
            keys = [name.removesuffix(".npy") for name in archive.namelist()]
        key = next((key for key in IMAGE_KEYS if key in keys), None)
        if key is None:
            raise UserError(f"{path} holds {', '.join(keys)}: call the images arr_0, labels arr_1")
        for labels_key in LABEL_KEYS:
            if labels is None and labels_key in keys:
                labels = map_array(path, labels_key)
    images = map_array(path, key)
    shape, channels = images.shape, (1, 3, 4)
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim == 4 and images.shape[3] not in channels:  # planar
        images = images.transpose(0, 2, 3, 1)
    shaped = images.ndim == 4 and images.shape[3] in channels and len(images) > 0
    if images.dtype != np.uint8 or not shaped:
        raise UserError(f"{path}: images must be uint8 of shape (n, height, width, 3), got "
                        f"{images.dtype} {shape}")
    if images.shape[3] == 1:  # grey
        images = np.broadcast_to(images, (*images.shape[:3], 3))
    return ArrayImages([images[..., :3]], labels, size, path)

CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR10_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"

def load_cifar10(folder, size):
    """CIFAR-10's 50,000 training images; their archive is fetched into `folder` if missing."""
    archive = folder / CIFAR10_URL.split("/")[-1]
    if not archive.exists():
        with explain(f"--dataset cifar10: put {CIFAR10_URL} into {folder}, or name other images "
                     "with --data-dir; it cannot be fetched"):
            folder.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(CIFAR10_URL, str(archive))
    data = archive.read_bytes()
    if hashlib.md5(data).hexdigest() != CIFAR10_MD5:
        raise UserError(f"{archive} is damaged (MD5): delete it, and it is fetched again")
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        names = [f"cifar-10-batches-bin/data_batch_{i}.bin" for i in range(1, 6)]
        parts = [np.frombuffer(tar.extractfile(name).read(), np.uint8) for name in names]
    rows = np.concatenate(parts).reshape(50000, 3073)  # one byte of label, then planes of 32x32
    planes = rows[:, 1:].reshape(-1, 3, 32, 32)
    images = planes.transpose(0, 2, 3, 1)
    return ArrayImages([images], rows[:, 0], size, archive)

def load_imagenet64(path, batches, size):
    """The official train_data_batch_*.npz, whose labels count from 1, in an order of their own.

    With ImageNet's map_clsloc.txt ("n02119789 1 kit_fox") beside them the classes are renumbered to
    the order of their names, which others train by.
    """
    batches.sort(key=lambda batch: (len(batch.stem), batch.stem))  # 10 comes after 9
    parts, labels = [], []
    for batch in batches:
        data = map_array(batch, "data")
        if data.dtype != np.uint8 or data.shape[1:] != (3 * 64 * 64,):
            raise UserError(f"{batch}: the images must be uint8 of shape (n, 12288)")
        planes = data.reshape(-1, 3, 64, 64)
        parts.append(planes.transpose(0, 2, 3, 1))
        labels.append(map_array(batch, "labels"))
    labels = np.concatenate(labels).astype(np.int64) - 1
    if labels.min() < 0:  # it would count from the end of the list below
        raise UserError(f"{path}: the labels of the official batches count from 1, not from 0")
    names = path / "map_clsloc.txt"
    if names.exists():
        with explain(f"{names} is not ImageNet's list of classes"):
            lines = [line.split() for line in names.read_text().splitlines()]
            wnid_of = {int(number): wnid for wnid, number, *_ in lines}
            wnids = [wnid_of[number] for number in sorted(wnid_of)]
            labels = np.searchsorted(sorted(wnids), wnids)[labels]
    return ArrayImages(parts, labels, size, path)

NAMED = "cifar10", "imagenet64", "bedroom256", "cat256"

def load_dataset(name, data_dir, size):
    """The images of `size` pixels called `name`: glyphs, one of NAMED, or a path.

    A folder or zip of images, an .npz or .npy. data_dir: where a named one lies, in any of those
    forms; cifar10 is fetched into it.
    """
    if name == "glyphs":
        images, labels = glyphs(20000, seed=0, size=size)
        return ArrayImages([images], labels, size, name)
    known = name in NAMED
    if known and data_dir is None and name != "cifar10":
        raise UserError(f"--dataset {name} needs --data-dir: a folder or zip of its images, or, of "
                        "imagenet64, the folder of the official train_data_batch_*.npz")
    path = Path(data_dir or "data") if known else Path(name)
    if name == "cifar10":
        archive = path / CIFAR10_URL.split("/")[-1]
        empty = not path.is_file() and not any(path.glob("*"))
        if data_dir is None or archive.exists() or empty:
            return load_cifar10(path, size)
    if not path.exists():
        raise UserError(f"{'--data-dir' if known else '--dataset'} {path} does not exist; the "
                        f"named data sets are glyphs, {', '.join(NAMED)}")
    if path.suffix in (".npz", ".npy"):
        return load_arrays(path, size)
    official = list(path.rglob("train_data_batch_*.npz")) if name == "imagenet64" else []
    return load_imagenet64(path, official, size) if official else load_files(path, size)

def open_dataset(args, run, size):
    """`--dataset`, loaded by rank 0 first, which may have to fetch or unpack it."""
    with main_process_first(run):
        return load_dataset(args.dataset, args.data_dir, size)

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
    return iter(torch.utils.data.DataLoader(
        dataset, batch_sampler=batches, collate_fn=tuple, num_workers=workers,
        pin_memory=device.type == "cuda", **ahead))

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
    """
    loader = batches(args, run, dataset, step)  # its workers start now: afterwards threads run
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
    for k in range(step, args.total_steps):
        yield k, zip(micro_batches(args, run), loader), False
        if log.last:
            break
    if log.last:
        if log.sound:
            yield k, [(0, batch)], True
        log.end((~totals.numbers.isfinite()).any().item())

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
    return int(os.environ.get(name, default))

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
    papers' runs did: not where fp32 is asked for, a derivative taken, or FID measured."""
    flags = vars(args)
    continuous = flags.get("objective") == "continuous"
    return flags["precision"] != "fp32" and not continuous and not flags.get("eval")

def join_processes(device, rank, world, restarts):
    """Make the process group of what torchrun started. Returns the restarts of any node."""
    # Imported later, as by the optimizer, its default arguments would hold the group, whose threads
    # then outlive destroy_process_group and at times abort the process.
    import torch.distributed.nn.functional
    store, _, _ = next(torch.distributed.rendezvous("env://"))
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
    device = choose_device(args.device, local)
    if world > 1:
        restarts = join_processes(device, rank, world, restarts)
    has_bf16 = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        tf32 = allows_tf32(args)
        torch.backends.cudnn.allow_tf32 = tf32
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")  # it is so on purpose
    bf16 = args.precision == "bf16" or (args.precision == "auto" and has_bf16)
    dtype = torch.bfloat16 if bf16 else torch.float32
    compiled = device.type == "cuda" if args.compile is None else args.compile
    return types.SimpleNamespace(rank=rank, world=world, main=rank == 0, restarted=restarts > 0,
                                 device=device, dtype=dtype, compile=compiled,
                                 checkpointing=getattr(args, "gradient_checkpointing", False),
                                 capturable=device.type == "cuda")

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
    `names`, the losses of each bin of noise levels, and whether to stop."""
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
    totals.stop.fill_(stop.number > 0)
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
FREE_FLAGS = {"data_dir", "teacher", "out_dir", "overwrite", "log_every", "sample_every",
              "save_every", "workers", "device", "compile", "ckpt", "micro_batch",
              "micro_batch_limit", "gradient_checkpointing"}

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

def check_resumable(args, state, script, model_args):
    """Raises UserError if the run of a checkpoint was another script's, or had other flags."""
    if state.get("script") != script:
        raise UserError(f"--out-dir {args.out_dir} holds a run of {state.get('script')}.py; choose "
                        "another, or --overwrite it")
    old = settings_of_run(state["args"], state["model_args"])
    new = settings_of_run(vars(args), model_args)
    changed = [f"{key} {old.get(key, 'none')} there, {new.get(key, 'none')} now"
               for key in sorted({"--teacher", "--teacher-digest", *new})  # others do not apply
               if old.get(key, "none") != new.get(key, "none")]
    if changed:
        why = ""
        if old.get("--total-steps") != new.get("--total-steps"):
            why = "; its schedule spans all its steps, so a longer run has to start anew"
        raise UserError(f"--out-dir {args.out_dir} holds a run with other settings "
                        f"({'; '.join(changed)}){why}; use its flags, choose another, or "
                        "--overwrite it")
    if args.total_steps < state["step"]:
        raise UserError(f"--total-steps {args.total_steps}: the run in --out-dir {args.out_dir} is "
                        f"at step {state['step']}; name more, choose another, or --overwrite it")

def delete_run(out_dir):
    """`--overwrite`: what a run left in its folder is deleted."""
    with explain(f"--out-dir {out_dir}"):
        for pattern in ("last.pt", "ema.pt", "samples/*.png"):
            for old in out_dir.glob(pattern):
                old.unlink(missing_ok=True)

# Bytes of memory that training takes, of bf16 networks, as measured: tests/results.
ACTIVATION_BYTES = dict(eager=29, compiled=14.5, checkpointing=6.2)  # a unit of blocks' outputs
FULL_GRADIENT_BYTES = 267  # the same for --no-stop-gradient: float32, tangents, never compiled
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
    if not getattr(args, "stop_gradient", True):
        graph = FULL_GRADIENT_BYTES * units
    total = graph
    if net.dropout:
        total += units  # the masks
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
            check_resumable(args, state, script, model_args)
            before = state["args"]["total_steps"]
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
                model_args=model_args, data=getattr(run, "data", None),
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
    save_checkpoint(Path(args.out_dir, "last.pt"), about | state, log.written)
    state["ema"]._metadata[ABOUT] = about
    save_checkpoint(Path(args.out_dir, "ema.pt"), state["ema"], log.written)
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
        if not differ[name]:
            return name, settings | changes
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
    `script`, `args` (None and {} for plain weights) and `model_args` say what it is.
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
        self.sound, self.last = not any(self.bad_in_a_row.values()), last
        if self.sound:
            self.confirm()
        self.done = step
        if self.bad_in_a_row[player] == 10:
            values.pop("loss_bins", None)
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
        shown = {key: f"{record[key]:.4g}" for key in ("loss", "N") if record.get(key) is not None}
        self.bar.set_postfix(**shown, **{"img/s": f"{speed:.0f}"})

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

def start_run(args, run, net, step, skipped):
    """Make the output folder, say what runs, open the log. Raises UserError."""
    global ranks_differ
    ranks_differ = True
    if run.main:
        with explain(f"--out-dir {args.out_dir}"):
            Path(args.out_dir, "samples").mkdir(parents=True, exist_ok=True)
        print(" ".join(f"{key}={show_value(value)}" for key, value in vars(args).items()))
        size = sum(p.numel() for p in net.parameters()) / 1e6
        precision = str(run.dtype).removeprefix("torch.")
        resumed = f"; resumed at step {step}" if step else ""
        print(f"{size:.2f}M parameters, {run.world} process(es) on {run.device.type}, "
              f"{precision}{resumed}")
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

def make_save_path(path):
    """See that samples can be saved at `path`, before hours are spent on drawing them."""
    path = Path(path)
    if path.suffix not in ("", ".png", ".npz"):
        raise UserError(f"--save {path}: name a .png, an .npz or a folder")
    folder = path.parent if path.suffix else path
    with explain(f"--save {path}"):
        folder.mkdir(parents=True, exist_ok=True)
    return path

def save_samples(path, images, labels, columns):
    """Write samples (n,H,W,C) uint8 as a .png grid, a folder of PNGs, or an .npz as ADM's evaluator
    reads it: arr_0 the images, arr_1 the labels."""
    from PIL import Image
    if path.suffix == ".png":
        save_grid(path, [images], columns)
    elif path.suffix == ".npz":
        arrays = [images] if labels is None else [images, labels.cpu().numpy()]
        with atomic_file(path) as file:
            np.savez(file, *arrays)
    else:
        for i, image in enumerate(images):
            with atomic_file(path / f"{i:06d}.png") as file:
                Image.fromarray(image).save(file, "PNG")

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

def draw_part(draw, part, y, shape, seed):
    """Images `part` (b,) of those that `draw_many` draws: (b,H,W,C) uint8."""
    y_part = None if y is None else y[part]
    noise = SeededNoise(part, seed)
    x = draw(y_part, noise, (len(part), *shape))
    if (~x.isfinite()).any():
        raise UserError("the network draws what is not finite: it has diverged, or --precision "
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

def sample_grid(args, run, step, draws, classes, shape, name="", columns=None):
    """Write samples/STEP.png from the same noise every time: a block of 8 rows for each of `draws`,
    see `draw_many`. classes: a column each, at most 10; 0: no labels, 8 columns."""
    columns = columns or min(classes, 10) or 8
    y = torch.arange(8 * columns, device=run.device) % classes if classes else None
    blocks = [draw_many(run, draw, 8 * columns, y, shape, args.seed, args.micro_batch)
              for draw in draws]
    if run.main:
        save_grid(Path(args.out_dir, "samples", f"{step:06d}{name}.png"), blocks, columns)

def labels_to_draw(args, net, n, device, key="labels"):
    """`--labels` in turn, or all classes in turn, for n images: (n,) int64; None without labels."""
    labels = getattr(args, key) or list(range(net.classes))
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
    return place(net, run), trained

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
    path = make_save_path(args.save)
    images = draw_many(run, draw, n, y, shape, args.seed, args.micro_batch)
    if run.main:
        side = math.isqrt(n - 1) + 1
        turn = len(args.labels or range(net.classes))
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
RUN_FLAGS = ("dataset", "data_dir", "class_cond", "flip", "net", "workers", "overwrite", "seed",
             "log_every", "sample_every", "save_every", "device", "precision", "compile",
             "gradient_checkpointing")
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
              help="where a named data set lies; cifar10 is fetched into it (data)")
    net = parser.group("data and network, training", ckpt=False)
    net.flag("--class-cond", only=net_only, action=switch,
             help="condition on the labels (default: as the paper; for a path, if it has any)")
    net.flag("--flip", action=switch, help="mirror half of the images (default: not for glyphs)")
    net.flag("--net", only=net_only, nargs="+", metavar="NAME KEY=VALUE",
             help=f"{', '.join(NETS)}, and changes to its settings, e.g. --net cifar-small base=32 "
             "mult=1,2,2 blocks=1 attention=16,8 image_size=32")
    net.flag("--dropout", type=probability, metavar="P", help="dropout in the residual blocks")
    net.flag("--workers", type=count, metavar="N",
             help="processes that read images ahead (default: of files cores - 1, at most 8; of "
             "arrays on a disk 1, in memory 0)")

    train = parser.group("training", ckpt=False)
    out_dir = f"out/{parser.prog.removesuffix('.py')}"
    train.flag("--out-dir", default=out_dir, metavar="DIR",
               help=f"receives last.pt, ema.pt, log.jsonl, samples/ (default {out_dir}). A run "
               "found there is resumed")
    train.flag("--overwrite", default=False, action="store_true", help="start anew in --out-dir")
    train.flag("--total-steps", type=positive, metavar="K", help="optimizer steps of the whole run")
    train.flag("--batch-size", type=positive, metavar="B", help="images a step, of all processes")
    train.flag("--lr", type=number(float, 0), metavar="LR",
               help="learning rate: constant; guided_distill.py: falls to 0 in each round")
    train.flag("--ema-decay", type=probability, metavar="D",
               help="decay, a step, of the average used for sampling")
    train.flag("--gradient-checkpointing", default=False, action="store_true",
               help="recompute each block in the backward pass: less memory, one forward pass more")
    every = dict(type=count, metavar="K")
    train.flag("--log-every", default=50, **every,
               help="steps between lines of log.jsonl; 0 = never (default 50)")
    train.flag("--sample-every", default=500, **every,
               help="steps between grids of samples; 0 = never (default 500)")
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
    sample.flag("--inception", only=measured, metavar="FILE",
                help="weights of torch-fidelity's Inception (default: its own place)")
    sample.flag("--labels", type=count, nargs="+", metavar="Y",
                help="classes to draw, in turn (default: all)")
    sample.flag("--save", only=unmeasured, default="samples.png", metavar="PATH",
                help="a .png grid, an .npz as ADM's evaluator reads it, or a folder (default "
                "samples.png)")

    both = parser.group("sampling and training")
    both.flag("--ckpt", metavar="FILE",
              help="sample with this checkpoint's EMA weights instead of training")
    both.flag("--seed", default=0, type=count, metavar="S", help="of everything random (default 0)")
    both.flag("--micro-batch", type=positive, metavar="B",
              help="images a pass through the network, part of the seed: when training it divides "
              "--batch-size; the default depends on recipe, processes and GPU memory, and is kept "
              "on resume. When sampling 64 by default. Lower it if memory runs out")
    both.flag("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"),
              help="default: the first of these that is there")
    both.flag("--precision", default="auto", choices=("auto", "bf16", "fp32"),
              help="of convolutions and attention (default: bf16 where the device computes in "
              "it). On CUDA the rest, LPIPS and critics above all, is in TF32 unless fp32 is named")
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

# --------------------------------------------------------------------------------------------------
# Teachers: denoisers that students are distilled from
# --------------------------------------------------------------------------------------------------

BIG = dict(flip=True, N=40)
DATASETS = {  # what a teacher and the students distilled from it have in common
    "glyphs": dict(net=["glyphs"], flip=False, micro_batch=32, N=18),
    "path": dict(net=["cifar-small"], flip=True, micro_batch=32, N=18),  # your own images
    "cifar10": dict(net=["cifar10"], flip=True, micro_batch=128, N=18, class_cond=False),
    "imagenet64": dict(net=["imagenet64"], micro_batch=64, class_cond=True) | BIG,
    "bedroom256": dict(net=["lsun256"], micro_batch=8, class_cond=False) | BIG,
    "cat256": dict(net=["lsun256"], micro_batch=8, class_cond=False) | BIG,
}

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

def read_image(path, size, factor=None, flag="--image"):
    """An image file -> (3,size,size) in [-1, 1], and whether it was whole: with `factor` one of
    size / factor pixels will do too, and is not."""
    from PIL import Image
    with explain(f"{flag} {path} cannot be read as an image"), Image.open(path) as image:
        image.load()
        small = factor is not None and image.size == (size // factor, size // factor)
        if small:
            image = image.resize((size, size), Image.Resampling.NEAREST)
        pixels = torch.from_numpy(fit_image(image, size, f"{flag} {path}").copy())
        return pixels.permute(2, 0, 1) / 127.5 - 1, not small

def read_mask(path, size):
    """(1,1,size,size): 1 where the mask is nearer to white; without one, the central square."""
    mask = torch.zeros(1, 1, size, size)
    if path is None:
        middle = slice(size // 4, size - size // 4)
        mask[..., middle, middle] = 1
        return mask
    image, _ = read_image(path, size, flag="--mask")
    return (image.mean(0) > 0).float().expand_as(mask)

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
    path = make_save_path(args.save)
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
