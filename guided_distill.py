"""Distillation of guided diffusion: one network for all guidance weights, then half the steps, and
again, down to one. Without guidance this is progressive distillation.

Papers: Meng et al. 2022 (GD, arXiv 2210.03142), both stages; Salimans & Ho 2022 (PD, arXiv
2202.00512), the halving. The models are VP: z = alpha x + sigma noise at times tau in [0, 1]. With
the angle phi, alpha = cos phi and sigma = sin phi, no formula divides by what may vanish. Times
and angles are (B,) float64; their coefficients meet the images.

    python guided_distill.py                       digits: teacher, guidance, then N = 32 .. 1 steps
    python guided_distill.py --sampler S --teacher out/guided_distill/teacher/last.pt --out-dir S
    torchrun --nproc_per_node=8 guided_distill.py --dataset imagenet64 --data-dir /data/imagenet64
    python guided_distill.py --ckpt out/guided_distill/N0004.pt --sample 64 --w 1 --save out.png
    python guided_distill.py --teacher diffusers:stable-diffusion-2-1/ --dataset latents.npz

Stage 1 leaves stage1.pt, which draws in any number of steps, each at half the teacher's cost; the
rounds of stage 2 leave N0032.pt .. N0001.pt, which draw in just so many. The same command again
resumes a run, exactly, on any number of processes. A latent model of noise is first fine-tuned
to v: --stage teacher leaves v.pt and the folder v/, the --teacher diffusers:.../v of stage 1.

Measured: of glyphs in four steps 99.2%, 99.9% and 100% are read as the label asked for at w = 0, 1,
4, after 9 minutes on 2 cores; of the teacher's in 64, 98.2%, 99.9%, 100%. No code of the paper was
ever published; its recipes were not run here.
"""
import copy
import hashlib
import json
import math
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import common
from common import UserError, bcast, number, positive

# --------------------------------------------------------------------------------------------------
# The method
# --------------------------------------------------------------------------------------------------

def times_device(device):
    """Where times and angles are: on the device, or on the CPU if that, mps, has no float64."""
    return torch.device("cpu") if device.type == "mps" else device


def on(c, x):
    """Coefficients (B,) float64 -> (B,1,1,1), to multiply x."""
    return bcast(c.to(x.dtype).to(x.device), x)


def alpha_sigma(phi, x):
    """cos phi and sin phi, to multiply x: of phi (B,) float64 -> (B,1,1,1) each."""
    return on(phi.cos(), x), on(phi.sin(), x)


def times_of(i, N, sampler):
    """tau, tau_mid, tau_end (B,): the student's jump from i in 1 .. N; its teacher's by tau_mid.

    S: the student jumps two intervals, its teacher one at a time; from i = 1 one is left for both.
    Source: GD Alg. 2, and its stochastic variant.
    """
    if sampler == "D":
        return i / N, (i - 0.5) / N, (i - 1) / N
    if sampler == "S":
        return i / N, (i - 1) / N, (i - 2).clamp(min=0) / N
    return (i - 1) / N, (i - 0.5) / N, i / N  # encoder: up


def two_steps(v, angle, z, tau, tau_mid, tau_end):
    """The v that takes z from tau to tau_end in one DDIM step, as the teacher's v does in two.

    (cos(d1 + d2) z - z_end) / sin(d1 + d2), multiplied out so that nothing cancels; d1, d2 are the
    angles of the two steps. With d2 = 0 it is the first v, exactly, and the second call, made at
    tau, counts nothing. GD Alg. 2, PD Alg. 2; z: (B,C,H,W) at tau.
    """
    d1 = angle(tau) - angle(tau_mid)
    d2 = angle(tau_mid) - angle(tau_end)
    v1 = v(z, tau)
    alpha, sigma = alpha_sigma(d1, z)
    z_mid = alpha * z - sigma * v1
    v2 = v(z_mid, torch.where(tau_mid > 0, tau_mid, tau))
    scale = (d1 + d2).sin()
    a = d1.sin() * d2.cos() / scale
    b = d2.sin() / scale
    c = d1.sin() * d2.sin() / scale
    return on(a, z) * v1 + on(b, z) * v2 - on(c, z) * z


def loss_fn(student, target, angle, x0, noise, tau, weight):
    """The loss of each image, in stage 1 and in stage 2. GD Alg. 1 and 2.

    Args:    student: (z, tau) -> v, of theta.  target: (z, tau) -> the v to match: in stage 1 the
             guided teacher's, in stage 2 `two_steps` of the student before; with `true_v` this
             trains a diffusion model.  angle: tau -> phi.  x0, noise: (B,C,H,W).
             tau: (B,) float64.  weight: phi -> factors (B,).
    Returns: (B,). Gradient flows through the student alone.
    """
    phi = angle(tau)
    alpha, sigma = alpha_sigma(phi, x0)
    z = alpha * x0 + sigma * noise
    with torch.no_grad():
        v_target = target(z, tau)
    losses = common.l2(student(z, tau), v_target)
    return on(weight(phi), x0).flatten() * losses


def true_v(x0, noise, angle):
    """A target of `loss_fn`: alpha noise - sigma x0, whose mean given z is the data's own v."""
    def v(z, tau):
        alpha, sigma = alpha_sigma(angle(tau), z)
        return alpha * noise - sigma * x0
    return v


WEIGHTS = {  # factors on |v - v'|^2 = (SNR + 1) |x - x'|^2; PD: SNR itself is 0 at tau = 1
    "snr+1": torch.ones_like,
    "trunc": lambda phi: torch.maximum(phi.cos() ** 2, phi.sin() ** 2),  # max(SNR, 1) |x - x'|^2
}
BOTTOM, TOP = math.atan(common.T_MIN), math.atan(common.T_MAX)


def edm_angle(tau, sampler="D"):
    """phi(tau) (B,): the cosine schedule over EDM's noise levels tan phi, 0.002 to 80.

    phi(0) = 0 makes the last step the denoised x (PD); but an encoder calls the network there.
    """
    start = BOTTOM if sampler == "encoder" else 0.0
    return torch.where(tau > 0, BOTTOM + tau * (TOP - BOTTOM), start)


def edm_v(D, angle):
    """v(z, tau, *c) = alpha noise - sigma x of a denoiser D(x, t, *c), read at z / alpha."""
    def v(z, tau, *c):
        phi = angle(tau)
        alpha, sigma = alpha_sigma(phi, z)  # sigma >= 0.002
        t = on(phi.tan(), z).flatten()
        return (alpha * z - D(z / alpha, t, *c)) / sigma
    return v


def net_v(net, angle):
    """v(z, tau, y, w) of a student; distilled without guidance it does not look at w."""
    def D(x, t, y, w):
        cond = common.c_guidance(w) if net.cond else None
        masks = common.dropout_masks(net, len(x))
        return common.denoise(net, x, t, y, cond, masks)
    return edm_v(D, angle)


def conditioned(v, y, w):
    """v(z, tau, y, w) -> v(z, tau) for these labels and weights."""
    return lambda z, tau: v(z, tau, y, w)


NAMES = {None: "v", 0: "stage1"}  # of what a round leaves; others: N0032, ..


def plan(settings):
    """The rounds of a run: (N, optimizer steps) each. N = 0 is stage 1, None is noise to v."""
    if settings.get("stage") == "teacher":
        return [(None, settings["total_steps"])]
    stochastic = settings["sampler"] == "S"  # the first student has all its teacher's steps
    last_N = 4 if settings["w_max"] > 0 else 2  # rounds that take --last-steps: GD, PD
    rounds = []
    if settings.get("stage1_steps"):
        rounds.append((0, settings["stage1_steps"]))
    N = settings["start_N"] if stochastic else settings["start_N"] // 2
    while N >= settings["end_N"]:
        rounds.append((N, settings["last_steps" if N <= last_N else "round_steps"]))
        N //= 2
    if stochastic and settings["end_N"] == 1:
        rounds[-1] = 1, 1  # its only jump is its teacher's own, with whose weights it begins
    return rounds


# --------------------------------------------------------------------------------------------------
# Sampling
# --------------------------------------------------------------------------------------------------

def ddim(v, angle, z, tau, tau_end):
    """One DDIM step of v: (z, tau) -> (B,C,H,W), from tau to tau_end, either way. PD Eq. 8."""
    alpha, sigma = alpha_sigma(angle(tau) - angle(tau_end), z)
    return alpha * z - sigma * v(z, tau)


def renoise(angle, z, tau, tau_up, noise):
    """z at tau -> z at tau_up > tau, as if x had been noised to tau_up at once."""
    phi = angle(tau)
    up = angle(tau_up)
    added = ((up - phi).sin() * (up + phi).sin()).sqrt()
    kept = on(up.cos() / phi.cos(), z) * z
    return kept + on(added / phi.cos(), z) * noise


def clipped(v, angle):
    """v as it is if its x = alpha z - sigma v is clipped to [-1, 1], and its noise is what z then
    holds beside x. (z, tau) -> v like v. As the code of PD samples; no part of training."""
    def v_clipped(z, tau):
        alpha, sigma = alpha_sigma(angle(tau), z)  # sigma >= 0.002
        x = alpha * z - sigma * v(z, tau)
        return (alpha * z - x.clamp(-1, 1)) / sigma
    return v_clipped


def sample(v, angle, N, sampler, z, noise=torch.randn_like, start=None, paste=None):
    """Run the N steps, or the last `start` of them, from z down to the image; for an encoder up.

    Args:    v: (z, tau) -> v.  z: (B,C,H,W) at tau = 1, or start / N.  noise: x -> unit noise like
             x, called N - 1 times by S.  paste: (z, tau) -> z, called after each step, or None.
    Source:  DDIM; GD's stochastic sampler: jump to i - 2, add noise up to i - 1; plain from 1.
    """
    steps = range(N if start is None else start, 0, -1)
    for step in reversed(steps) if sampler == "encoder" else steps:
        i = torch.full((len(z),), step, dtype=torch.float64, device=times_device(z.device))
        tau, tau_mid, tau_end = times_of(i, N, sampler)
        z = ddim(v, angle, z, tau, tau_end)
        if sampler == "S" and step > 1:
            z = renoise(angle, z, tau_end, tau_mid, noise(z))
        if paste:
            z = paste(z, (i - 1) / N)
    return z


@torch.no_grad()
def draw(v, angle, N, sampler, w, device, y, noise, shape, clip=True):
    """Draw images (B,C,H,W) in N calls of v: (z, tau, y, w); w: a number. Latents: clip=False."""
    z = noise(torch.zeros(shape, device=device))
    weights = z.new_full((len(z),), w)
    v = conditioned(v, y, weights)
    if clip:
        v = clipped(v, angle)
    return sample(v, angle, N, sampler, z, noise)


# --------------------------------------------------------------------------------------------------
# Latent diffusion models, read by the package diffusers
# --------------------------------------------------------------------------------------------------

class Latents:
    """An .npz of latents (n,C,h,w), and embeddings (n,L,D) with `null` (L,D), or labels (n,); for
    inpainting also masks (n,1,h,w), 1 where to paint, and masked (n,C,h,w), latents of the rest."""
    def __init__(self, path):
        self.path = path
        with common.explain(f"--dataset {path} holds no latents"):
            with np.load(path) as file:
                text = "embeddings" in file
                extra = [key for key in ("masks", "masked") if key in file]
            keys = ["latents", "embeddings" if text else "labels", *extra]
            arrays = [common.map_array(Path(path), key) for key in keys]
            self.shapes = {key: array.shape for key, array in zip(keys, arrays)}
            self.null = None
            if text:
                null = common.map_array(Path(path), "null")
                self.null = torch.tensor(null, dtype=torch.float32)
                self.shapes["null"] = null.shape
        if text and not self.null.isfinite().all():
            raise UserError(f"--dataset {path}: null holds inf or nan")
        self.dtype = torch.float32 if text else torch.int64
        self.parts = arrays
        self.latents, self.conditions, *self.extra = arrays

    def __len__(self):
        return len(self.latents)

    def __getitems__(self, indices):
        """latents (b,C,h,w), conditions (b,..), extra channels: masks and masked (b,1+C,h,w) or
        none (b,0,h,w)."""
        latents = torch.tensor(self.latents[indices], dtype=torch.float32)
        conditions = torch.tensor(self.conditions[indices], dtype=self.dtype)
        extra = [torch.tensor(part[indices], dtype=torch.float32) for part in self.extra]
        extra = torch.cat([latents[:, :0], *extra], 1)
        for i, *parts in zip(indices, latents, conditions, extra):
            sample = f"--dataset {self.path}: sample {i}, counted from 0"
            if not all(part.isfinite().all() for part in parts):
                raise UserError(f"{sample}, holds inf or nan")
            mask = parts[2][:1]
            if ((mask < 0) | (mask > 1)).any():
                raise UserError(f"{sample}, has a mask outside [0, 1]: 1 is to be painted, 0 kept")
        return latents, conditions, extra


# diffusers' samplers of a network that predicts noise, v or x, at the discrete times of its betas
SCHEDULERS = (
    "DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "LMSDiscreteScheduler",
    "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler")


class LatentModel:
    """A UNet2DConditionModel on text or classes, predicting noise, v or x; its student and data.

    y is a text or label, and extra channels: for inpainting mask and masked latents (B,1+C,h,w),
    else none (B,0,h,w). to_v: the student is a teacher, too: the same network, to predict v.
    """
    latent = True
    grid = dict(classes=0, shape=None)  # of pictures, until `open_vae`: none are drawn

    def __init__(self, teacher, dataset, guided, run, to_v=False):
        self.diffusers = common.import_optional(
            "diffusers", "--teacher diffusers:PATH needs the package diffusers")
        self.path = Path(teacher.removeprefix("diffusers:"))
        self.run = run
        self.dataset = Latents(dataset)
        unet = self.path / "unet"
        file = self.path / "scheduler" / "scheduler_config.json"
        with common.explain(f"--teacher {teacher}: cannot read {unet} and {file}"):
            settings = json.loads(file.read_text())
            self.scheduler = self.make_scheduler(teacher, settings)
            digest = hashlib.sha256(json.dumps(settings).encode())
            for part in sorted(unet.iterdir()):
                digest.update(part.read_bytes())
            net = self.read(self.diffusers.UNet2DConditionModel, unet)
        self.digest = digest.hexdigest()[:12]
        self.teacher = net.requires_grad_(False).eval().to(run.device)
        self.first_prediction = self.scheduler.config.prediction_type
        self.prediction = self.first_prediction
        self.times = self.scheduler.config.num_train_timesteps
        alpha = self.scheduler.alphas_cumprod.double().sqrt()
        no_noise = torch.zeros(1, dtype=torch.float64)
        self.angles = torch.cat([no_noise, alpha.acos()]).to(times_device(run.device))
        if to_v:
            self.prediction = "v_prediction"
            self.scheduler.register_to_config(prediction_type=self.prediction)
        if self.prediction == "epsilon" and alpha[-1] < 1e-3:
            raise UserError(f"--teacher {teacher}: predicting noise, it says nothing about x at "
                            "zero SNR; fine-tune it to v first, with --stage teacher")
        C = net.config.out_channels
        self.inpaints = net.config.in_channels == C + 1 + C
        size = net.config.sample_size
        keys = "addition_embed_type encoder_hid_dim_type class_embed_type time_cond_proj_dim"
        further = [key for key in keys.split() if net.config.get(key)]
        known = self.inpaints or net.config.in_channels == C
        if further or not known or not isinstance(size, int):
            raise UserError(f"--teacher {teacher}: this UNet takes more than square latents, a "
                            f"time, a text or a label, and what to inpaint: {further}, "
                            f"{net.config.in_channels} channels in and {C} out")
        self.shape = C, size, size
        self.classes = net.config.num_class_embeds
        self.labels = 0  # how many there is data of
        null = self.dataset.null
        if self.classes:
            self.labels = self.classes - guided
            null = torch.tensor(self.classes - 1)
        self.check_data(net.config.cross_attention_dim)
        self.null = null.to(run.device)
        takes_w = guided and not to_v
        self.model_args = dict(cond=takes_w)
        self.net = self.make_student(takes_w)
        self.v_teacher = None if to_v else self.v(self.teacher)

    def read(self, kind, folder):
        """A model of diffusers' class `kind`: float32, whatever its files hold."""
        names = [file.name for file in folder.glob("diffusion_pytorch_model*")]
        variant = "fp16" if names and all(".fp16" in name for name in names) else None
        if variant and self.run.main:
            print(f"{folder} holds weights in fp16 only")
        model, found = kind.from_pretrained(folder, variant=variant, output_loading_info=True)
        if found["missing_keys"]:  # they would be random
            raise UserError(f"{folder} holds no weights {found['missing_keys'][0]}")
        return model

    def make_scheduler(self, teacher, settings):
        """What a student of N steps is sampled with: from the top, to alpha = 1, unclipped; with
        the betas of the teacher's scheduler, of `settings`. Raises UserError for other families."""
        name = settings.get("_class_name")
        if name not in SCHEDULERS:
            raise UserError(f"--teacher {teacher}: its scheduler is {name}; what can be distilled "
                            f"has one of {', '.join(SCHEDULERS)}")
        own = dict(getattr(self.diffusers, name).from_config(settings).config)
        own.pop("_use_default_values", None)  # DDIMScheduler's would take the place of its own
        scheduler = self.diffusers.DDIMScheduler.from_config(
            own, timestep_spacing="trailing", clip_sample=False, thresholding=False,
            set_alpha_to_one=True)
        prediction = scheduler.config.prediction_type
        other = own.get("use_flow_sigmas") or own.get("timestep_type") == "continuous"
        if other or prediction not in ("epsilon", "v_prediction", "sample"):
            raise UserError(f"--teacher {teacher}: its {name} is set up for a flow or continuous "
                            f"times ({prediction}), and a teacher predicts noise, v or x")
        return scheduler

    def check_data(self, width):
        """Raises UserError for a data set that does not fit the network."""
        n, *rest = self.dataset.conditions.shape
        L = rest[0] if rest else 1
        wanted = dict(embeddings=(n, L, width), null=(L, width))
        if self.classes:
            wanted = dict(labels=(n,))
        C, h, w = self.shape
        if self.inpaints:
            wanted |= dict(masks=(n, 1, h, w), masked=(n, C, h, w))
        wanted = dict(latents=(n, C, h, w)) | wanted
        if self.dataset.shapes != wanted:
            raise UserError(f"--dataset: this teacher takes {wanted}, not {self.dataset.shapes}")
        if self.classes and not np.isin(self.dataset.conditions, range(self.labels)).all():
            raise UserError(f"--dataset: this teacher takes labels 0 to {self.labels - 1}; if "
                            "guided, its last class is the null class")

    def make_student(self, takes_w):
        """The teacher's copy; with room for w, added to the time's sinusoid, zero at first."""
        config = dict(self.teacher.config, time_cond_proj_dim=256 if takes_w else None)
        net = self.diffusers.UNet2DConditionModel.from_config(config)
        net.load_state_dict(self.teacher.state_dict(), strict=False)
        if takes_w:
            torch.nn.init.zeros_(net.time_embedding.cond_proj.weight)
        if self.run.checkpointing:
            net.enable_gradient_checkpointing()
        return net.to(self.run.device).eval()  # no dropout

    def index(self, tau):
        """tau in [0, 1] -> 0 .. times; the network's timestep is one less, and at 0 is no noise."""
        return (tau * self.times).round().long()

    def angle(self, tau):
        return self.angles[self.index(tau)]

    def v(self, net):
        """v(z, tau, y, w) of a UNet: y: text (B,L,D), labels (B,) or None for none, and extra
        channels; w (B,)."""
        w_dim = net.config.time_cond_proj_dim

        def v(z, tau, y, w=None):
            condition, extra = y
            if condition is None:
                condition = self.null.expand(len(z), *self.null.shape)
            text, labels = (None, condition) if self.classes else (condition, None)
            features = w_features(w, w_dim) if w_dim else None
            k = (self.index(tau) - 1).to(z.device)  # the timestep
            inputs = torch.cat([z, extra], 1)
            dtype = self.run.dtype
            with torch.autocast(z.device.type, dtype, enabled=dtype != torch.float32):
                out = net(inputs, k, text, class_labels=labels, timestep_cond=features)
            out = out.sample.float()
            if self.prediction == "v_prediction":
                return out
            alpha, sigma = alpha_sigma(self.angle(tau), z)
            if self.prediction == "epsilon":
                return (out - sigma * z) / alpha  # alpha >= 0.068 for Stable Diffusion
            return (alpha * z - out) / sigma
        return v

    def guide(self, v, y, w):
        """`common.guide`: without its text or label an image keeps its extra channels."""
        condition, extra = y

        def v_given(z, tau, condition):
            return v(z, tau, (condition, extra))
        return common.guide(v_given, condition, w)

    def fetch(self, batch):
        x0, *y = [part.to(self.run.device, non_blocking=True) for part in batch]
        return x0, y

    def drop_labels(self, y, share):
        """Replace that share of texts or labels by the null one."""
        condition, extra = y
        dropped = torch.rand(len(condition), device=condition.device) < share
        return torch.where(bcast(dropped, condition), self.null, condition), extra

    @torch.no_grad()
    def open_vae(self):
        """Read what decodes latents; `grid` is what pictures need."""
        folder = self.path / "vae"
        with common.explain(f"{folder} does not decode latents {self.shape}; training needs it "
                            "for --sample-every only"):
            vae = self.read(self.diffusers.AutoencoderKL, folder.resolve(strict=True))
            self.vae = vae.requires_grad_(False).eval().to(self.run.device)
            zeros = torch.zeros(1, *self.shape, device=self.run.device)
            self.grid = dict(classes=0, shape=self.decode(zeros)[0].shape, columns=1)

    def decode(self, z):
        return self.vae.decode(z / self.vae.config.scaling_factor).sample

    def draw(self, v, angle, N, sampler, w, device, y, noise, shape):
        """Draw as `draw` does, image i of the y of sample i, or of labels y if given."""
        i = noise.indices.cpu().numpy() % len(self.dataset)
        _, (condition, extra) = self.fetch(self.dataset.__getitems__(i))
        y = (condition if y is None else y), extra
        latents = len(i), *self.shape
        z = draw(v, angle, N, sampler, w, device, y, noise, latents, clip=False)
        return self.decode(z)

    def export(self, net, path):
        """A folder that diffusers' pipelines load: the teacher's, with this UNet and scheduler."""
        with common.explain(f"cannot write {path}"):
            for part in self.path.iterdir():  # VAE, tokenizer, text encoder
                if part.is_dir() and part.name not in ("unet", "scheduler"):
                    shutil.copytree(part, path / part.name, dirs_exist_ok=True)
            for half in path.glob("*/*.fp16.*"):  # pipelines seek one kind of names in all parts
                plain = half.with_name(half.name.replace(".fp16", ""))
                if not plain.exists():
                    half.rename(plain)
            net.save_pretrained(path / "unet")
            self.scheduler.save_pretrained(path / "scheduler")
            index = self.path / "model_index.json"
            if index.exists():
                parts = json.loads(index.read_text())
                parts["scheduler"] = ["diffusers", "DDIMScheduler"]
                (path / index.name).write_text(json.dumps(parts, indent=2))


def w_features(w, dim):
    """(B,) -> (B,dim), diffusers' embedding of guidance_scale - 1 = w, in float32."""
    half = dim // 2
    powers = torch.arange(half, device=w.device)
    rates = torch.exp(-math.log(10000) / (half - 1) * powers)
    angles = 1000 * w[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1)


# --------------------------------------------------------------------------------------------------
# Recipes: GD's and PD's distillation, whose numbers GD's pixel models are taken to share. start_N:
# DDIM steps of the first teacher. Digits and "path", your own images, are ours.
# --------------------------------------------------------------------------------------------------

GD = dict(
    sampler="D", w_min=0.0, w_max=4.0, weighting="snr+1",
    dropout=0.0, ema_decay=0.999,
    start_N=1024, end_N=1, round_steps=50_000, last_steps=100_000)
STUDENTS = {
    "glyphs": dict(batch_size=32, lr=1e-3, ema_decay=0.98, start_N=64,
                   stage1_steps=1000, round_steps=300, last_steps=900),
    "mnist": dict(batch_size=16, lr=1e-3, ema_decay=0.98, start_N=16,
                  stage1_steps=1200, round_steps=300, last_steps=700),
    "path": dict(batch_size=128, lr=2e-4, start_N=256,
                 stage1_steps=20_000, round_steps=5_000, last_steps=25_000),
    "cifar10": dict(batch_size=128, lr=5e-5, stage1_steps=100_000),
    "imagenet64": dict(batch_size=2048, lr=1e-4, stage1_steps=50_000),
}
LSUN = STUDENTS["imagenet64"] | dict(w_max=0.0)  # bedroom256, cat256: ours; without labels
# GD's for text; with labels w_min is 0. Learning rate and EMA are ours. GD starts from a teacher
# fine-tuned to v; how long is not known here, label dropout is Stable Diffusion's.
LATENT = dict(
    w_min=2.0, w_max=14.0, batch_size=512, micro_batch=8, flip=False, lr=1e-5,
    start_N=512, stage1_steps=3000, round_steps=2000, last_steps=20_000)
LATENT_TEACHER = dict(total_steps=2000, label_dropout=0.1, out_dir="out/v_teacher")
PLAIN = dict(w_min=0.0, w_max=0.0, weighting="trunc")  # PD
PLAIN_STUDENTS = {"cifar10": dict(start_N=8192)}
LABELLED = {"cifar10": dict(class_cond=True)}  # others are without being told


def is_latent(teacher):
    return str(teacher).startswith("diffusers:")


def takes_labels(teacher):
    """Whether diffusers:PATH is a model of classes, not of text."""
    file = Path(teacher.removeprefix("diffusers:"), "unet", "config.json")
    with common.explain(f"--teacher {teacher}: cannot read {file}"):
        return file.exists() and bool(json.loads(file.read_text()).get("num_class_embeds"))


def recipe(flags):
    """The settings for --dataset, --teacher and --sampler, general ones first."""
    name, teacher = common.known_dataset(flags), flags.get("teacher")
    settings = common.DATASETS[name] | GD | STUDENTS.get(name, LSUN)
    if is_latent(teacher):
        settings |= LATENT
        if takes_labels(teacher):
            settings["w_min"] = 0.0
    if flags.get("stage") == "teacher":
        return settings | LATENT_TEACHER
    if flags.get("sampler") == "encoder":
        settings |= dict(w_max=0.0, sample_every=0)
    w_max = flags.get("w_max", settings["w_max"])
    if w_max < settings["w_min"]:
        settings["w_min"] = 0.0
    if w_max:
        settings |= LABELLED.get(name, {})
    else:
        settings |= PLAIN | PLAIN_STUDENTS.get(name, {})
    if not w_max and teacher != "ideal":  # of which a network is made first of all
        settings["stage1_steps"] = 0
    rounds = plan(settings | flags)
    return settings | dict(total_steps=sum(steps for _, steps in rounds))


def check(args):
    """Raises UserError for values that do not fit each other."""
    latent = is_latent(args.teacher)
    distil = args.stage == "distill"
    rounds = plan(vars(args))
    if args.total_steps != sum(steps for _, steps in rounds):
        raise UserError("--total-steps does not apply to rounds: name --stage1-steps, "
                        "--round-steps and --last-steps")
    if not distil and not latent:
        raise UserError("--stage teacher goes with --teacher diffusers:PATH; teachers of images "
                        "are trained by python cd.py --stage teacher")
    if args.teacher == "none":
        raise UserError("--teacher none: what is distilled here is a teacher")
    if not distil and args.sampler != "D":
        raise UserError(f"--sampler {args.sampler} does not apply with --stage teacher")
    drawn = args.sample_every or args.eval_every
    if args.sampler == "encoder" and (latent or args.w_max or drawn):
        raise UserError("--sampler encoder goes with --w-max 0, --sample-every 0 and --eval-every "
                        "0: guided it is ill-conditioned, and it draws nothing; and with a teacher "
                        "of images")
    if latent and args.dataset in common.DATASETS:
        raise UserError("--teacher diffusers:PATH needs --dataset FILE.npz, of latents (see the "
                        "README)")
    if latent:
        common.refuse(args, ["flip", "dropout", "eval_every"], "with --teacher diffusers:PATH")
    if not distil:
        return
    powers = math.log2(args.start_N).is_integer() and math.log2(args.end_N).is_integer()
    if not powers or not any(N for N, _ in rounds):
        raise UserError(f"--start-N {args.start_N} --end-N {args.end_N}: steps are halved, so name "
                        "two powers of two, and at least one round")
    if args.w_max and args.w_min > args.w_max:
        raise UserError(f"--w-min {args.w_min} is above --w-max {args.w_max}")


# --------------------------------------------------------------------------------------------------
# Flags
# --------------------------------------------------------------------------------------------------

def make_parser():
    parser = common.Parser(__doc__)
    built = dict(teacher=(None, "ideal"))  # not like a --teacher FILE
    common.add_shared_flags(parser, built)

    both = parser.group("algorithm, training and sampling")
    both.flag("--sampler", choices=("D", "S", "encoder"),
              help="deterministic steps (default), stochastic ones of double length, or the way "
              "from image to noise (training, with --w-max 0)")
    train = parser.group("algorithm, training", ckpt=False)
    train.flag("--stage", choices=("teacher", "distill"), default="distill",
               help="teacher: fine-tune a latent diffusion model to v, as Meng et al. did first to "
               "one of noise (into out/v_teacher); or distil a teacher (default)")
    train.flag("--teacher", metavar="FILE",
               help="a teacher written by cd.py, released EDM weights (--w-max 0), "
               "ideal: the exact denoiser, or diffusers:PATH: a latent diffusion model")
    train.flag("--label-dropout", only=dict(stage="teacher"), type=common.probability, metavar="P",
               help="share of texts or labels that are dropped, so that the teacher guides (0.1)")
    train.flag("--weighting", choices=WEIGHTS,
               help="of the loss: 1 + SNR, which is plain in v, or truncated SNR (PD)")
    student = parser.group("algorithm, distillation", ckpt=False, stage="distill")
    student.flag("--teacher-steps", only=dict(teacher=False), type=positive,
                 help="optimizer steps of the teacher that is trained first")
    student.flag("--w-min", only=dict(w_max=True), type=common.guidance_weight,
                 help="least guidance weight w: (1 + w) cond - w uncond (GD 0; text 2); at -1 it "
                 "is the model without labels or text")
    student.flag("--w-max", type=number(float, 0),
                 help="largest (GD 4; latents 14); 0: plain progressive distillation")
    student.flag("--start-N", type=number(int, 2),
                 help="DDIM steps of stage 2's teacher (GD 1024; PD 8192 for CIFAR-10)")
    student.flag("--end-N", type=positive, help="steps of the last student (default 1)")
    student.flag("--stage1-steps", only=[dict(w_max=True), dict(teacher="ideal")], type=positive,
                 help="optimizer steps of stage 1")
    student.flag("--round-steps", type=positive,
                 help="optimizer steps of a round of stage 2 (PD 50,000), but the last ones")
    student.flag("--last-steps", type=positive,
                 help="of those of N <= 4 (GD), or 2 with --w-max 0 (PD 100,000)")

    draws = parser.group("sampling and editing, further flags", ckpt=True)
    draws.flag("--N", type=positive,
               help="steps, of a teacher or of stage 1 (default 64); of others their own")
    draws.flag("--w", type=common.guidance_weight,
               help="guidance weight (default: 0, or the least above it that the student knows); "
               "of a teacher from -1, which is without labels")
    edits = common.add_edit_flags(parser, ("img2img", "inpaint", "style"))
    edits.flag("--strength", only=dict(edit="img2img"), type=common.probability, default=0.5,
               help="share of the steps that is run (default 0.5)")
    edits.flag("--encoder", only=dict(edit="style"), metavar="FILE",
               help="a student of --sampler encoder, with which the images are encoded")
    edits.flag("--from-labels", only=dict(edit="style"), type=common.count, nargs="+",
               help="the class each --image is; --labels: what it becomes")
    return parser


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------

def open_latents(args, run):
    """The LatentModel of a run. What it leaves is drawn with it and its data, wherever they are."""
    to_v = args.stage == "teacher"
    guides = args.label_dropout > 0 if to_v else args.w_max > 0
    with common.main_process_first(run):
        model = LatentModel(args.teacher, args.dataset, guides, run, to_v)
    path = model.path.resolve()
    if Path(args.out_dir).resolve() in (path, *path.parents):
        raise UserError(f"--out-dir {args.out_dir} is or holds the --teacher: choose another")
    if to_v and run.main:
        print(f"{model.path} predicts {model.first_prediction}; its weights are where v begins")
    if model.inpaints and run.main:
        print(f"{model.path} inpaints: masks and masked latents of {args.dataset} tell it where")
    if not to_v and args.start_N > model.times:
        raise UserError(f"--start-N {args.start_N}: the teacher knows {model.times} times")
    if args.sample_every:
        model.open_vae()
    args.teacher_digest = model.digest
    args.teacher = f"diffusers:{model.path.resolve()}"
    args.dataset = str(Path(args.dataset).resolve())
    return model


def open_pixels(args, run):
    """A denoiser of images to distil.

    Returns: a namespace of what `train` needs: v: network -> its v (z, tau, y, w); v_teacher
             (z, tau, y); net: the student; fetch: batch -> x0, y; grid: for pictures; and so on.
    """
    teacher, settings = common.open_teacher(args, run)
    size = settings["image_size"]
    dataset = common.open_dataset(args, run, size)
    D, classes = common.teacher_denoiser(args, run, teacher, dataset)
    common.check_guidance(args, teacher, classes)
    model_args = settings | common.dropout_settings(args)
    model_args |= dict(classes=classes, cond=args.w_max > 0)
    net = common.new_network(args, run, model_args, teacher)
    angle = partial(edm_angle, sampler=args.sampler)

    def fetch(batch):
        x0, y = common.to_device(batch, run.device, args.flip)
        return x0, y if classes else None

    return SimpleNamespace(
        latent=False, dataset=dataset, fetch=fetch, angle=angle, draw=draw, guide=common.guide,
        teacher=teacher, v_teacher=edm_v(D, angle),
        net=net, v=partial(net_v, angle=angle), model_args=model_args,
        grid=dict(classes=classes, shape=(3, size, size)))


def round_of(step, rounds):
    """The round of a step: N, how many steps came before in it, and how many it has."""
    for N, steps in rounds:
        if step < steps:
            return N, step, steps
        step -= steps


def train(args, run, stop):
    """Train, or go on with the run found in --out-dir. Returns whether it came to its end."""
    distil = args.stage == "distill"
    w_max = args.w_max if distil else 0.0
    if args.teacher is None:
        label_dropout = 0.1 if w_max else 0.0
        common.train_first_teacher(args, run, stop, "guided_distill", label_dropout)
    open_task = open_latents if is_latent(args.teacher) else open_pixels
    task = open_task(args, run)
    net, angle = task.net, task.angle
    before = copy.deepcopy(net).requires_grad_(False).eval()  # of the last round: stage 2's teacher
    ema = copy.deepcopy(before)
    optimizer = torch.optim.Adam(net.parameters(), args.lr, foreach=True,
                                 capturable=run.capturable)
    gradients = common.flatten_gradients(net)
    totals = common.Totals(run, "loss")
    parts = dict(net=net, before=before, ema=ema, optimizer=optimizer)
    step, skipped = common.resume(args, run, "guided_distill", task.model_args, parts)
    if args.overwrite and run.main and not run.restarted:
        delete_students(args)
    common.compile_in_place(run, task.teacher, before, net)
    log = common.start_run(args, run, net, step, skipped)

    v_net = task.v(net)
    v_before = task.v(before)
    v_ema = task.v(ema)
    weight = WEIGHTS[args.weighting]
    shown_weights = [0.0]  # of guidance, in grids of samples
    if w_max:
        span = w_max - args.w_min
        shown_weights = [args.w_min + share * span for share in (0, 0.25, 1)]
    elif not distil and args.label_dropout:
        v_ema = guided_v(v_ema, task.guide)
        shown_weights = [0.0, 2.0]
    rounds = plan(vars(args))
    clock = times_device(run.device)
    kinds = {"a step": step}
    N, stage1_steps = rounds[0]
    if N == 0 and step < stage1_steps:
        kinds["a step of stage 2"] = stage1_steps
    all_steps = common.steps(args, run, log, totals, task.dataset, step, kinds, [optimizer])
    for step, micro_batches, trial in all_steps:
        N, done, steps = round_of(step, rounds)
        # From the raw weights of the last round, whose net is the teacher: GD Alg. 2.
        if done == 0 and not trial:
            before.load_state_dict(net.state_dict())
            ema.load_state_dict(net.state_dict())
            optimizer.state.clear()
        # ------------------------------------------------------------------------ one training step
        lr = args.lr
        if distil:
            lr *= 1 - done / steps  # PD: to 0 within each round
        if args.sampler == "S" and N == 1:
            lr = 0.0  # it is its teacher already; Adam would make a step of a rounded gradient of 0
        optimizer.param_groups[0]["lr"] = lr
        gradients.zero_()
        totals.zero()
        for m, batch in micro_batches:
            common.seed_everything(common.STEP, args.seed, step, m)
            x0, y = task.fetch(batch)
            w = None
            if w_max:
                w = args.w_min + span * torch.rand(len(x0), device=run.device)
            if N:
                i = torch.randint(1, N + 1, (len(x0),), device=clock).double()
                tau, tau_mid, tau_end = times_of(i, N, args.sampler)
            else:
                tau = torch.rand(len(x0), dtype=torch.float64, device=clock)
                if task.latent:  # the next that the teacher knows
                    tau = (tau * task.times).ceil().clamp(min=1) / task.times
            noise = torch.randn_like(x0)
            if not distil:  # noise to v
                y = task.drop_labels(y, args.label_dropout)
                target = true_v(x0, noise, angle)
            elif N == 0:  # stage 1: GD Alg. 1
                target = task.guide(task.v_teacher, y, w)  # v is affine in x: guides like x
            else:  # stage 2: GD Alg. 2
                teacher = conditioned(v_before, y, w)
                target = partial(two_steps, teacher, angle, tau_mid=tau_mid, tau_end=tau_end)
            student = conditioned(v_net, y, w)
            losses = loss_fn(student, target, angle, x0, noise, tau, weight)
            (losses.sum() / args.batch_size).backward()
            totals.add(1 / args.batch_size, loss=losses.sum())
            totals.bin(on(angle(tau).tan(), x0).flatten(), losses)
        if trial:
            continue
        stopping = common.sum_over_ranks(run, stop, gradients, totals)
        grad_norm = torch.linalg.vector_norm(gradients).item()
        finite = math.isfinite(totals["loss"]) and math.isfinite(grad_norm)
        if finite:
            gradients *= min(1.0, 1.0 / max(grad_norm, 1e-12))  # PD clips the norm at 1
            optimizer.step()
            common.ema_update(ema, net, args.ema_decay)
        step += 1
        # ------------------------------------------------------------------------------------------
        # log.jsonl: loss_bins is the mean loss where tan phi is below 0.1, 1, 10 and above;
        # grad_norm is that before it is clipped; N is 0 in stage 1, null in --stage teacher
        last = stopping or step == args.total_steps
        ended = done + 1 == steps
        name = NAMES.get(N) or f"N{N:04d}"
        log.step(step, finite, last, N=N, loss=totals["loss"], loss_bins=totals.loss_bins(),
                 grad_norm=grad_norm, lr=lr)
        if ended and run.main and not common.not_finite(ema.state_dict()):
            save_student(args, run, Path(args.out_dir, name), step, N, task, ema, log)
        if common.due(args.save_every, step) or last or ended:
            common.save_run(args, run, "guided_distill", step, log, task.model_args, parts,
                            N=N)
        draws = [partial(task.draw, v_ema, angle, N or 16, args.sampler, w, run.device)
                 for w in shown_weights]
        common.show_samples(args, run, step, log, draws, last=ended, name=f"_{name}", **task.grid)
    log.close()
    return log.done == args.total_steps


def save_student(args, run, path, step, N, task, ema, log):
    """Write the student of a round, PATH.pt, and of a latent one the folder PATH for diffusers."""
    about = common.about_run(args, run, "guided_distill", step, task.model_args, N=N)
    state = about | dict(ema=ema.state_dict())
    common.save_checkpoint(path.with_suffix(".pt"), state, log.written)
    if task.latent:
        task.export(ema, path)


def delete_students(args):
    """`--overwrite`: the students of a run, and what was exported of them to diffusers."""
    out_dir = Path(args.out_dir)
    names = [f"{name}.pt" for name in NAMES.values()]
    for old in [*map(out_dir.joinpath, names), *out_dir.glob("N????.pt")]:
        if old.exists():  # a folder alone is none of ours
            shutil.rmtree(old.with_suffix(""), ignore_errors=True)
            old.unlink()


# --------------------------------------------------------------------------------------------------
# Using a checkpoint
# --------------------------------------------------------------------------------------------------

def trained_for(checkpoint, **parts):
    """A namespace of N (0, None: any), sampler (None: any), w_min, w_max and `parts`."""
    settings = checkpoint["args"]
    N = checkpoint.get("N", 0)  # a teacher's has none
    return SimpleNamespace(
        N=N, sampler=settings["sampler"] if N else None, w_min=settings.get("w_min", 0.0),
        w_max=settings.get("w_max", 0.0), calls=1, **parts)


def open_student(path, run, encoder=False):
    """A student or a teacher of images: what `trained_for` says, net, v (z, tau, y, w), angle, draw
    and calls of the network for one of v where w > 0."""
    net, checkpoint = common.load_network(path, ("guided_distill", "cd"))
    script = checkpoint["script"]
    net.data = checkpoint.get("data")
    student = trained_for(checkpoint, net=common.place(net, run), draw=draw)
    if encoder != (student.sampler == "encoder"):
        raise UserError(f"{path}: what --sampler encoder trains, and only that, is to be named as "
                        "--encoder, with --edit style")
    if script == "cd" and checkpoint["args"].get("stage", "teacher") != "teacher":
        raise UserError(f"{path} holds a consistency model: cd.py samples with it")
    if run.main and script is None:  # a plain state dict does not say
        print(f"{path} is taken for a teacher")
    student.angle = partial(edm_angle, sampler=student.sampler)
    student.v = net_v(net, student.angle)
    if script == "guided_distill":
        return student

    v_teacher = edm_v(common.net_denoiser(net), student.angle)
    if net.null_y is not None:
        student.w_min, student.w_max = -1.0, math.inf
        student.calls = 2

    student.v = guided_v(v_teacher, common.guide)
    return student


def guided_v(v, guide):
    """v(z, tau, y, w) of a teacher's v (z, tau, y), guided by two calls where w is not 0."""
    return lambda z, tau, y, w: guide(v, y, w if w.any() else None)(z, tau)


def open_latent_student(args, run, checkpoint):
    """The same of a latent student, which draws --labels, or the data's conditions in turn."""
    settings = checkpoint["args"]
    to_v = settings.get("stage") == "teacher"
    guides = settings["label_dropout" if to_v else "w_max"] > 0
    model = LatentModel(settings["teacher"], settings["dataset"], guides, run, to_v)
    if model.digest != settings["teacher_digest"]:
        raise UserError(f"{model.path} is not the teacher any more that {args.ckpt} was made of: "
                        "its UNet or scheduler has changed")
    if args.N and args.N > model.times:
        raise UserError(f"--N {args.N}: the teacher knows {model.times} times")
    model.open_vae()
    net = model.net
    net.load_state_dict(checkpoint["ema"])
    net.image_size = model.grid["shape"][-1]
    net.classes = model.labels if args.labels else 0
    args.micro_batch = min(args.micro_batch, 8)
    student = trained_for(checkpoint, net=net, v=model.v(net), angle=model.angle, draw=model.draw)
    if to_v:
        student.v = guided_v(student.v, model.guide)
    if to_v and guides:
        student.w_min, student.w_max = -1.0, math.inf
        student.calls = 2
    return student


def choose(args, student):
    """Set student.N, sampler and w, to draw with. Raises UserError for what it was not made for."""
    for key in ("N", "sampler"):
        trained = getattr(student, key)
        wanted = getattr(args, key)
        if trained and wanted not in (None, trained):
            raise UserError(f"--{key} {wanted}: {args.ckpt} was trained for {key} {trained}")
    if args.sampler == "encoder":
        raise UserError("--sampler encoder applies to training only")
    student.N = student.N or args.N or 64
    student.sampler = student.sampler or args.sampler or "D"
    student.w = max(student.w_min, 0.0) if args.w is None else args.w
    if student.w == 0:
        student.calls = 1
    if not student.w_min <= student.w <= student.w_max:
        raise UserError(f"--w {student.w:g}: {args.ckpt} was trained for weights from "
                        f"{student.w_min:g} to {student.w_max:g}")


def use_checkpoint(args, run):
    """`--ckpt`: sample, measure or edit."""
    checkpoint = common.load_checkpoint(args.ckpt)
    if is_latent(checkpoint.get("args", {}).get("teacher")):
        common.refuse(args, ["edit", "eval"], "to latent models: diffusers' pipelines edit with "
                      "them, torch-fidelity's own command measures a folder of samples")
        student = open_latent_student(args, run, checkpoint)
    else:
        student = open_student(args.ckpt, run)
    choose(args, student)
    if args.edit:
        return edit_images(args, run, student)
    args.w, args.sampler = student.w, student.sampler  # --eval says what they were
    draws = partial(student.draw, student.v, student.angle, student.N, student.sampler,
                    student.w, run.device)
    calls = student.N * student.calls
    common.sample_checkpoint(args, run, student.net, draws, calls, checkpoint)


def encode(args, run, student, x0):
    """--edit style: x0 (b,C,H,W) of --from-labels at tau = 1, by --encoder (DDIB, GD)."""
    net = student.net
    common.check_images(args, net, "from_labels")
    if student.sampler == "S":
        raise UserError("--edit style decodes without noise: name a student of --sampler D")
    if not args.encoder:
        raise UserError("--edit style needs --encoder")
    encoder = open_student(args.encoder, run, encoder=True)
    if (encoder.net.image_size, encoder.net.classes) != (net.image_size, net.classes):
        raise UserError(f"--encoder {args.encoder} and {args.ckpt} differ in image size or classes")
    y = common.labels_to_draw(args, net, len(x0), run.device, "from_labels")
    v = conditioned(encoder.v, y, None)
    with torch.no_grad():
        return sample(v, encoder.angle, encoder.N, "encoder", x0)


def edit_images(args, run, student):
    """`--edit`: img2img starts midway, from the noised image (SDEdit); inpaint pastes the known
    part, noised, after each step; style encodes with one class and decodes with another."""
    net, task = student.net, args.edit
    common.check_images(args, net)
    images = [common.read_image(name, net.image_size)[0] for name in args.image]
    x0 = torch.stack(images).to(run.device)
    hole = common.read_mask(args.mask, net.image_size, args.image).to(run.device)
    start = student.N
    if task == "img2img":
        start = math.floor(args.strength * student.N + 0.5)
    if task == "style":
        z_top = encode(args, run, student, x0)
    each = args.sample or (1 if task == "style" else 4)

    @torch.no_grad()
    def draw_edit(y, noise, shape):
        row = noise.indices // each
        first = noise(torch.zeros(shape, device=run.device))

        def noised(tau):
            alpha, sigma = alpha_sigma(student.angle(tau), first)
            return alpha * x0[row] + sigma * first

        def paste(z, tau):
            return hole * z + (1 - hole) * noised(tau)

        z = first
        if task == "img2img":
            tau = torch.full((len(row),), start / student.N, dtype=torch.float64,
                             device=times_device(run.device))
            z = noised(tau)
        elif task == "style":
            z = z_top[row]
        w = first.new_full((len(row),), student.w)
        v = clipped(conditioned(student.v, y, w), student.angle)
        after = paste if task == "inpaint" else None
        return sample(v, student.angle, student.N, student.sampler, z, noise, start, after)

    summary = f"{start} of {student.N} steps, w = {student.w:g}"
    common.draw_edits(args, run, net, draw_edit, len(x0), each, summary, before=x0)


if __name__ == "__main__":
    args = common.parse_flags(make_parser(), recipe, check)
    run = common.setup(args)
    if args.ckpt:
        use_checkpoint(args, run)
        common.finish(run)
    stop = common.StopSignal()
    ended = train(args, run, stop)
    common.finish(run, None if ended else stop)

# Where this differs from the papers; no official code was published
#   pixel models      the teacher is an EDM denoiser; the cosine schedule runs over its noise
#                     levels, 0.002 to 80: one teacher for all scripts. PD's log SNR: [-20, 20]
#   averages          students are drawn with the average of a round's weights; PD draws with the
#                     raw ones. The next round starts from the raw ones, as in PD
#   encoder           starts at noise level 0.002, not at 0: the least the network knows
#   stage 2's target  angles multiplied out, coefficients in float64: the papers' quotient loses
#                     digits where neighbouring levels are close
#   latent models     noise to v: 2,000 steps at a constant 1e-5 are ours. The output for noise is
#                     where v begins, as it is: turned into v it would be divided by alpha. Texts,
#                     latents and masks are made once, by the user. w enters as diffusers has it:
#                     sinusoids of 1000 w, one linear layer, zero, added to those of time. The last
#                     step ends at alpha = 1; Stable Diffusion's betas end at 0.9996
#   embedding of w    pixel models: sinusoids of 25 w, one linear layer of each block zero. The
#                     papers' factor of 1000 tells 4 from 4.1 too well for short training
