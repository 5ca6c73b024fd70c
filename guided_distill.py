"""Distillation of guided diffusion: one network for all guidance weights, then half the steps, and
again, down to one. Without guidance this is progressive distillation.

    python guided_distill.py                       digits: teacher, guidance, then N = 32 .. 1 steps
    python guided_distill.py --sampler S --teacher out/guided_distill/teacher/last.pt --out-dir S
    torchrun --nproc_per_node=8 guided_distill.py --dataset imagenet64 --data-dir /data/imagenet64
    python guided_distill.py --ckpt out/guided_distill/N0004.pt --sample 64 --w 1 --save out.png
    python guided_distill.py --teacher diffusers:stable-diffusion-2-1/ --dataset latents.npz

Stage 1 leaves stage1.pt, which draws in any number of steps, each at half the teacher's cost; the
rounds of stage 2 leave N0032.pt .. N0001.pt, which draw in just so many. The same command again
resumes a run, exactly, on any number of processes.

Papers: Meng et al. 2022 (GD, arXiv 2210.03142): both stages. Salimans & Ho 2022 (PD, arXiv
2202.00512): the halving. The models are VP: z = alpha x + sigma noise, alpha^2 + sigma^2 = 1, time
tau in [0, 1]. With the angle phi, for which alpha = cos phi and sigma = sin phi, no formula divides
by what may vanish. Times and angles are (B,) float64 on the CPU; coefficients meet the images.

Measured: glyphs, four steps, 99.0%, 99.9% and 100% of the digits are read as the label asked for at
w = 0, 1, 4, after 9 minutes on 2 cores; the teacher, 64 steps, 97.9%, 99.9%, 100%. No code of the
paper was ever published; its recipes were not run here.
"""
import bisect
import copy
import functools
import hashlib
import itertools
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

def on(c, x):
    """Coefficients (B,) float64 -> (B,1,1,1), to multiply x."""
    return bcast(c.to(x.dtype).to(x.device), x)


def alpha_sigma(phi, x):
    """cos phi and sin phi, to multiply x: of phi (B,) float64 -> (B,1,1,1) each."""
    return on(phi.cos(), x), on(phi.sin(), x)


def times_of(i, N, sampler):
    """tau, tau_mid, tau_end (B,) of the student's jump from i in 1 .. N, the teacher's by tau_mid.

    An S student jumps two intervals, its teacher one and one; from i = 1 both have but one.
    GD Alg. 2, and its variant for the stochastic sampler; an encoder is a decoder in reversed time.
    """
    if sampler == "D":
        return i / N, (i - 0.5) / N, (i - 1) / N
    if sampler == "S":
        return i / N, (i - 1) / N, (i - 2).clamp(min=0) / N
    return (i - 1) / N, (i - 0.5) / N, i / N


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
    """The distillation loss of each image, of either stage. GD Alg. 1 and 2.

    Args:    student: (z, tau) -> v, of theta.  target: (z, tau) -> the v to match: in stage 1 the
             guided teacher's, in stage 2 `two_steps` of the student before.  angle: tau -> phi.
             x0, noise: (B,C,H,W).  tau: (B,) float64.  weight: phi -> factors (B,).
    Returns: (B,). Gradient flows through the student alone.
    """
    phi = angle(tau)
    alpha, sigma = alpha_sigma(phi, x0)
    z = alpha * x0 + sigma * noise
    with torch.no_grad():
        v_target = target(z, tau)
    return on(weight(phi), x0).flatten() * common.l2(student(z, tau), v_target)


def truncated_snr(phi):
    """max(SNR, 1) |x - x'|^2 = max(alpha^2, sigma^2) |v - v'|^2 (PD).

    SNR alone would be 0 at tau = 1, where a one-step student lives.
    """
    return torch.maximum(phi.cos() ** 2, phi.sin() ** 2)


WEIGHTS = {"snr+1": torch.ones_like, "trunc": truncated_snr}  # factors on the error of v
BOTTOM, TOP = math.atan(common.T_MIN), math.atan(common.T_MAX)


def edm_angle(tau, bottom=0.0):
    """phi(tau): the cosine schedule over EDM's noise levels tan phi, 0.002 to 80; (B,) float64.

    Args:    bottom: phi(0). At 0 there is no noise, so that the last step gives the denoised x
             (PD); an encoder, which calls the network there, begins at the least noise it knows.
    Source:  PD's code, whose log SNR runs over [-20, 20]; here over what the teachers know.
    """
    return torch.where(tau > 0, BOTTOM + tau * (TOP - BOTTOM), bottom)


def angle_of(sampler):
    return partial(edm_angle, bottom=BOTTOM) if sampler == "encoder" else edm_angle


def edm_v(D, angle):
    """v(z, tau, *c) = alpha noise - sigma x of a denoiser D(x, t, *c).

    A VP model is the same network, read at z / alpha with noise level sigma / alpha.
    """
    def v(z, tau, *c):
        phi = angle(tau)
        alpha, sigma = alpha_sigma(phi, z)  # sigma >= 0.002
        t = on(phi.tan(), z).flatten()
        return (alpha * z - D(z / alpha, t, *c)) / sigma
    return v


def net_v(net, angle):
    """v(z, tau, y, w) of a student; distilled without guidance it does not look at w."""
    def D(x, t, y, w):
        return common.denoise(net, x, t, y, common.c_guidance(w) if net.cond else None)
    return edm_v(D, angle)


def conditioned(v, y, w):
    """v(z, tau, y, w) -> v(z, tau) for these labels and weights."""
    return lambda z, tau: v(z, tau, y, w)


def plan(settings):
    """The rounds: (N, optimizer steps) each, stage 1 first with N = 0; settings: of the run.

    The first student has half its teacher's steps, an S one as many.
    """
    stochastic = settings["sampler"] == "S"
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


def sample(v, angle, N, sampler, z, noise=torch.randn_like, start=None, paste=None):
    """Run the N steps, or the last `start` of them, from z down to the image; for an encoder up.

    Args:    v: (z, tau) -> v.  sampler: D, S or encoder.  z: (B,C,H,W) at tau = 1, or start / N.
             noise: x -> unit noise like x, called N - 1 times by S.  paste: (z, tau) -> z, called
             after each step, or None.
    Source:  DDIM; GD's stochastic sampler: jump to i - 2, add noise up to i - 1; plain from 1.
    """
    def at(i):
        return z.new_full((len(z),), i / N, dtype=torch.float64, device="cpu")

    for i in range(N if start is None else start, 0, -1):
        if sampler == "encoder":
            z = ddim(v, angle, z, at(N - i), at(N - i + 1))
            continue
        k = max(i - 2, 0) if sampler == "S" else i - 1
        z = ddim(v, angle, z, at(i), at(k))
        if k < i - 1:
            z = renoise(angle, z, at(k), at(i - 1), noise(z))
        if paste:
            z = paste(z, at(i - 1))
    return z


def clip(z):
    return z.clamp(-1, 1)


@torch.no_grad()
def draw(v, angle, N, sampler, w, device, y, noise, shape, decode=clip):
    """Draw images (B,C,H,W) in N calls of v: (z, tau, y, w); w: a number or None."""
    z = noise(torch.zeros(shape, device=device))
    weights = None if w is None else z.new_full((len(z),), w)
    return decode(sample(conditioned(v, y, weights), angle, N, sampler, z, noise))


# --------------------------------------------------------------------------------------------------
# Latent diffusion models, read by the package diffusers
# --------------------------------------------------------------------------------------------------

class Latents:
    """An .npz of latents (n,C,h,w), and embeddings (n,L,D) with `null` (L,D), or labels (n,)."""
    def __init__(self, path):
        path = Path(path)
        with common.explain(f"--dataset {path} holds no latents"):
            with np.load(path) as file:
                self.text = "embeddings" in file
            key = "embeddings" if self.text else "labels"
            self.latents = common.map_array(path, "latents")
            self.conditions = common.map_array(path, key)
            self.null = None
            if self.text:
                null = common.map_array(path, "null")
                self.null = torch.from_numpy(null.astype(np.float32))
        if len(self.latents) != len(self.conditions):
            raise UserError(f"--dataset {path}: {len(self.latents)} latents, "
                            f"{len(self.conditions)} {key}")

    def __len__(self):
        return len(self.latents)

    def __getitems__(self, indices):
        latents = torch.from_numpy(np.array(self.latents[indices]))
        conditions = torch.from_numpy(np.array(self.conditions[indices]))
        return latents.float(), conditions.float() if self.text else conditions.long()


class LatentModel:
    """A UNet2DConditionModel on text or classes, predicting noise, v or x, of a pipeline."""
    def __init__(self, path, run):
        need = "--teacher diffusers:PATH needs the package diffusers"
        self.library = common.import_optional("diffusers", need)
        with common.explain(need):
            self.library.UNet2DConditionModel, self.library.AutoencoderKL  # naming imports them
        self.run = run
        self.path = Path(path)
        self.flag = f"--teacher diffusers:{path}"
        unet = self.path / "unet"
        if not unet.is_dir():  # diffusers would look for it on its hub
            raise UserError(f"{self.flag}: there is no folder {unet}")
        with common.explain(f"{self.flag} cannot be read"):
            network = self.library.UNet2DConditionModel
            teacher = network.from_pretrained(path, subfolder="unet")
            file = self.path / "scheduler" / "scheduler_config.json"
            config = json.loads(file.read_text())
            digest = hashlib.sha256(json.dumps(config).encode())
            for part in sorted(unet.iterdir()):
                digest.update(part.read_bytes())
        self.digest = digest.hexdigest()[:12]
        self.teacher = teacher.requires_grad_(False).eval().to(run.device)
        # What a student of N steps is sampled with: from the top, to alpha = 1, unclipped.
        self.scheduler = self.library.DDIMScheduler.from_config(
            config, timestep_spacing="trailing", clip_sample=False, thresholding=False,
            set_alpha_to_one=True)
        self.prediction = self.scheduler.config.prediction_type
        self.steps = self.scheduler.config.num_train_timesteps
        alpha = self.scheduler.alphas_cumprod.double().sqrt()
        if self.prediction == "epsilon" and alpha[-1] < 1e-3:
            raise UserError(f"{self.flag}: predicting noise, it says nothing about x at zero SNR; "
                            "fine-tune it to v first")
        self.angles = torch.cat([torch.zeros(1, dtype=torch.float64), alpha.acos()])
        self.check_unet(self.teacher.config)

    def check_unet(self, config):
        """Raises UserError for a UNet of more than square latents, a time, a text or label."""
        keys = "addition_embed_type encoder_hid_dim_type class_embed_type time_cond_proj_dim"
        further = [key for key in keys.split() if config.get(key)]
        C, size = config.in_channels, config.sample_size
        if further or C != config.out_channels or not isinstance(size, int):
            raise UserError(f"{self.flag}: this UNet takes more than square latents, a time, and a "
                            f"text or a label {' '.join(further)}")
        self.shape = C, size, size
        self.classes = config.num_class_embeds

    def check(self, data, guided):
        """Raises UserError for a data set that does not fit the network."""
        conditions = data.conditions.shape
        if self.classes:
            known = self.classes - guided
            wanted = f"labels 0 to {known - 1}"
            if guided:
                wanted += ", and then the null class"
            fits = not data.text and len(conditions) == 1
            fits = fits and np.isin(data.conditions, range(known)).all()
        else:
            width = self.teacher.config.cross_attention_dim
            wanted = f"embeddings (n, L, {width}) with null (L, {width})"
            fits = data.text and conditions[1:] == data.null.shape and conditions[2:] == (width,)
        if data.latents.shape[1:] != self.shape or not fits:
            parts = [data.latents, data.conditions, data.null]
            shapes = [tuple(part.shape) for part in parts if part is not None]
            raise UserError(f"--dataset: this teacher takes latents {self.shape} and {wanted}, not "
                            f"{shapes}")

    def index(self, tau):
        """tau in [0, 1] -> 0 .. steps; the network's timestep is one less, and at 0 is no noise."""
        return (tau * self.steps).round().long()

    def angle(self, tau):
        return self.angles[self.index(tau)]

    def student(self, guided):
        """The teacher's copy; with room for w, added to the time's sinusoid, zero at first."""
        config = dict(self.teacher.config)
        if guided:
            config["time_cond_proj_dim"] = 256
        net = self.library.UNet2DConditionModel.from_config(config)
        net.load_state_dict(self.teacher.state_dict(), strict=False)
        if guided:
            torch.nn.init.zeros_(net.time_embedding.cond_proj.weight)
        return net.to(self.run.device).eval()  # no dropout

    def v(self, net, null=None):
        """v(z, tau, y, w) of a UNet: y (B,L,D), labels (B,) or None for none; w (B,) or None."""
        key = "encoder_hidden_states"
        if self.classes:
            key = "class_labels"
            null = torch.tensor(self.classes - 1)

        def v(z, tau, y, w=None):
            if y is None:
                y = null.to(z.device).expand(len(z), *null.shape)
            inputs = dict(encoder_hidden_states=None) | {key: y}
            if w is not None:
                inputs["timestep_cond"] = w_features(w, net.config.time_cond_proj_dim)
            k = (self.index(tau) - 1).to(z.device)
            low = self.run.dtype != torch.float32
            with torch.autocast(z.device.type, self.run.dtype, enabled=low):
                out = net(z, k, **inputs).sample.float()
            if self.prediction == "v_prediction":
                return out
            alpha, sigma = alpha_sigma(self.angle(tau), z)
            if self.prediction == "epsilon":
                return (out - sigma * z) / alpha  # alpha >= 0.068 for Stable Diffusion
            return (alpha * z - out) / sigma
        return v

    @functools.cached_property
    def vae(self):
        folder = self.path / "vae"
        if not folder.is_dir():
            raise UserError(f"there is no folder {folder} to decode latents with; training needs "
                            "none with --sample-every 0")
        with common.explain(f"{folder} cannot be read"):
            vae = self.library.AutoencoderKL.from_pretrained(folder)
        return vae.requires_grad_(False).eval().to(self.run.device)

    @functools.cached_property
    @torch.no_grad()
    def image_shape(self):
        with common.explain(f"{self.path / 'vae'} does not decode latents {self.shape}"):
            return self.decode(torch.zeros(1, *self.shape, device=self.run.device))[0].shape

    def decode(self, z):
        return clip(self.vae.decode(z / self.vae.config.scaling_factor).sample)

    def draw(self, v, data, N, sampler, w, y, noise, shape):
        """Draw images, see `draw`; for y None image i is drawn of condition i of the data."""
        device = self.run.device
        if y is None:
            i = noise.indices.cpu().numpy() % len(data)
            y = data.__getitems__(i)[1].to(device)
        latents = len(y), *self.shape
        return draw(v, self.angle, N, sampler, w, device, y, noise, latents, self.decode)

    def export(self, net, path):
        """A folder that diffusers' pipelines load: the teacher's, with this UNet and scheduler."""
        with common.explain(f"cannot write {path}"):
            for part in self.path.iterdir():  # VAE, tokenizer, text encoder
                if part.is_dir() and part.name not in ("unet", "scheduler"):
                    shutil.copytree(part, path / part.name, dirs_exist_ok=True)
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
    angles = 1000 * w[:, None] * torch.exp(-math.log(10000) / (half - 1) * powers)
    return torch.cat([angles.sin(), angles.cos()], 1)


# --------------------------------------------------------------------------------------------------
# Recipes: PD's distillation, whose numbers GD's pixel models are taken to share. start_N: DDIM
# steps of the first teacher. glyphs and "path", your own images, are ours.
# --------------------------------------------------------------------------------------------------

GD = dict(stage="distill", sampler="D", w_min=0.0, w_max=4.0, weighting="snr+1", dropout=0.0,
          end_N=1)
STUDENTS = {
    "glyphs": dict(
        batch_size=32, lr=1e-3, ema_decay=0.98, start_N=64,
        stage1_steps=1000, round_steps=300, last_steps=900),
    "path": dict(
        batch_size=128, lr=2e-4, ema_decay=0.999, start_N=256,
        stage1_steps=20_000, round_steps=5_000, last_steps=25_000),
    "cifar10": dict(
        batch_size=128, lr=5e-5, ema_decay=0.999, start_N=1024,
        stage1_steps=100_000, round_steps=50_000, last_steps=100_000),
    "imagenet64": dict(
        batch_size=2048, lr=1e-4, ema_decay=0.999, start_N=1024,
        stage1_steps=50_000, round_steps=50_000, last_steps=100_000),
}
# GD's for text; it starts from a teacher fine-tuned to v. Learning rate and EMA are ours.
LATENT = dict(
    batch_size=512, micro_batch=8, flip=False, lr=1e-5, ema_decay=0.999, start_N=512,
    stage1_steps=3000, round_steps=2000, last_steps=20_000, w_min=2.0, w_max=14.0)
PLAIN = dict(w_min=0.0, w_max=0.0, weighting="trunc")  # PD
PLAIN_STUDENTS = {"cifar10": dict(start_N=8192)}
UNLABELLED = "bedroom256", "cat256"


def is_latent(teacher):
    return str(teacher).startswith("diffusers:")


def teacher_recipe(flags, name):
    """The settings of --stage teacher: cd.py's, with labels to drop where there are any."""
    import cd
    settings = cd.teacher_recipe(flags) | dict(out_dir="out/guided_distill/teacher")
    if name in UNLABELLED or flags.get("class_cond") is False:
        return settings
    if settings.get("class_cond") is False:
        settings["class_cond"] = True
    return settings | dict(label_dropout=0.1)


def recipe(flags):
    """The settings of --stage for --dataset, --teacher and --sampler, general ones first."""
    name, teacher = common.known_dataset(flags), flags.get("teacher")
    if flags.get("stage") == "teacher":
        return teacher_recipe(flags, name)
    settings = common.DATASETS[name] | GD | STUDENTS.get(name, STUDENTS["imagenet64"])
    if is_latent(teacher):
        settings |= LATENT
    if flags.get("sampler") == "encoder":
        settings |= dict(w_max=0.0, sample_every=0)
    w_max = flags.get("w_max", 0.0 if name in UNLABELLED else settings["w_max"])
    if w_max < settings["w_min"]:
        settings["w_min"] = 0.0
    if w_max and settings.get("class_cond") is False and not is_latent(teacher):
        settings["class_cond"] = True
    if not w_max:
        settings |= PLAIN | PLAIN_STUDENTS.get(name, {})
    if not w_max and teacher != "ideal":  # of which a network is made first of all
        settings["stage1_steps"] = 0
    return settings | dict(total_steps=sum(steps for _, steps in plan(settings | flags)))


# --------------------------------------------------------------------------------------------------
# Flags
# --------------------------------------------------------------------------------------------------

def make_parser():
    parser = common.Parser(__doc__)
    built = [dict(stage="teacher"), dict(teacher=(None, "ideal"))]  # not like a --teacher FILE
    common.add_shared_flags(parser, built)
    weight = number(float, 0)
    share = number(float, 0, 1)

    both = parser.group("algorithm, training and sampling")
    sampling = dict(ckpt=True)
    both.flag("--stage", only=dict(ckpt=False), choices=("teacher", "distill"), help="train a "
              "teacher, or distil one (default; without --teacher one is trained first)")
    both.flag("--sampler", only=[sampling, dict(ckpt=False, stage="distill")],
              choices=("D", "S", "encoder"), help="what the student is trained for: deterministic "
              "steps (default), stochastic ones of double length, or the way from image to noise "
              "(with --w-max 0)")
    both.flag("--N", only=[sampling, dict(ckpt=False, stage="teacher")], type=positive,
              metavar="N", help="steps: of a teacher or a student of stage 1 any number (default "
              "64), otherwise the student's own")
    train = parser.group("teacher", ckpt=False, stage="teacher")
    train.flag("--label-dropout", type=share, metavar="P",
               help="share of labels hidden, for guidance (default 0.1)")
    train.flag("--p-t", nargs="+", type=common.p_of_t, metavar="MEAN STD",
               help="ln t ~ Normal(MEAN, STD^2) (EDM -1.2 1.2), or the one word uniform")

    student = parser.group("distillation", ckpt=False, stage="distill")
    student.flag("--teacher", metavar="FILE", help="a teacher of --stage teacher or cd.py's, "
                 "released EDM weights (--w-max 0), ideal: the exact denoiser of the images, or "
                 "diffusers:PATH: a latent diffusion model")
    student.flag("--teacher-steps", only=dict(teacher=False), type=positive, metavar="K",
                 help="optimizer steps of the teacher that is trained first")
    student.flag("--w-min", only=dict(w_max=True), type=weight, metavar="W",
                 help="least guidance weight: (1 + w) cond - w uncond, w = 0 is the conditional "
                 "model (GD 0; text 2)")
    student.flag("--w-max", type=weight, metavar="W", help="largest guidance weight (GD 4; "
                 "latents 14); 0: plain progressive distillation")
    student.flag("--start-N", type=number(int, 2), metavar="N", help="DDIM steps of the teacher "
                 "of stage 2, a power of two (GD 1024; PD 8192 for CIFAR-10)")
    student.flag("--end-N", type=positive, metavar="N",
                 help="steps of the last round's student (default 1)")
    student.flag("--stage1-steps", only=[dict(w_max=True), dict(teacher="ideal")], type=positive,
                 metavar="K", help="optimizer steps of stage 1")
    student.flag("--round-steps", type=positive, metavar="K",
                 help="optimizer steps of a round of stage 2 (PD 50,000), but the last ones")
    student.flag("--last-steps", type=positive, metavar="K", help="the same for the last rounds: "
                 "N <= 4 (GD: ten times as many), without guidance N <= 2 (PD 100,000)")
    student.flag("--weighting", choices=WEIGHTS,
                 help="of the loss: 1 + SNR, which is plain in v, or truncated SNR (PD)")

    draws = parser.group("sampling and editing, further flags", ckpt=True)
    style = dict(edit="style")
    draws.flag("--w", type=weight, metavar="W",
               help="guidance weight (default: the least the student knows)")
    edits = common.add_edit_flags(parser, ("img2img", "inpaint", "style"))
    edits.flag("--strength", only=dict(edit="img2img"), type=share, metavar="S",
               help="share of the steps that is run (default 0.5)")
    edits.flag("--encoder", only=style, metavar="FILE", help="a student of --sampler encoder, "
               "with which the images are encoded")
    edits.flag("--from-labels", only=style, type=common.count, nargs="+", metavar="Y",
               help="the class each --image is; --labels: what it becomes")
    return parser


def check(args):
    """Raises UserError for values that do not fit each other."""
    if args.stage == "teacher":
        return common.check_p_t(args.p_t, common.karras_times(args.N))
    rounds = plan(vars(args))
    if args.total_steps != sum(steps for _, steps in rounds):
        raise UserError("--total-steps does not apply with --stage distill: name --stage1-steps, "
                        "--round-steps and --last-steps")
    if args.teacher == "none":
        raise UserError("--teacher none: what is distilled here is a teacher")
    if args.sampler == "encoder" and args.w_max:
        raise UserError("--sampler encoder goes with --w-max 0: encoding with guidance is "
                        "ill-conditioned")
    if args.sampler == "encoder" and args.sample_every:
        raise UserError("--sample-every does not apply with --sampler encoder, which draws nothing")
    if is_latent(args.teacher):
        if args.dataset in common.DATASETS or args.sampler == "encoder":
            raise UserError("--teacher diffusers:PATH needs --dataset FILE.npz, of latents (see "
                            "the README), and has no --sampler encoder")
        common.refuse(args, ["flip", "dropout"], "with --teacher diffusers:PATH")
    elif args.w_max and getattr(args, "class_cond", None) is False:
        raise UserError("--no-class-cond goes with --w-max 0: guidance needs labels")
    for flag, N in (("--start-N", args.start_N), ("--end-N", args.end_N)):
        if not math.log2(N).is_integer():
            raise UserError(f"{flag} {N}: steps are halved, so name a power of two")
    if not any(N for N, _ in rounds):
        raise UserError(f"--end-N {args.end_N}: the first round of --start-N {args.start_N} has "
                        "fewer steps")
    if args.w_max and args.w_min > args.w_max:
        raise UserError(f"--w-min {args.w_min} is above --w-max {args.w_max}")


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------

def open_latents(args, run):
    """What is distilled, of a latent model, see `open_pixels`."""
    with common.main_process_first(run):
        model = LatentModel(args.teacher.removeprefix("diffusers:"), run)
        dataset = Latents(args.dataset)
    args.teacher_digest = model.digest
    args.teacher = f"diffusers:{model.path.resolve()}"  # a student is sampled with both
    args.dataset = str(Path(args.dataset).resolve())
    guided = args.w_max > 0
    model.check(dataset, guided)
    if args.start_N > model.steps:
        raise UserError(f"--start-N {args.start_N}: the teacher knows {model.steps} times")
    shape = model.image_shape if args.sample_every else None  # now: it needs a VAE

    def fetch(batch):
        return [part.to(run.device, non_blocking=True) for part in batch]

    def draws(v, N, w):
        return partial(model.draw, v, dataset, N, args.sampler, w)

    return SimpleNamespace(
        latent=model, dataset=dataset, teacher=model.teacher, net=model.student(guided),
        v_teacher=model.v(model.teacher, dataset.null), v_of=model.v, angle=model.angle,
        fetch=fetch, times=model.steps, draws=draws, shape=shape, classes=0, columns=1,
        model_args=dict(cond=guided))


def open_pixels(args, run):
    """What is distilled, of a denoiser of images.

    Returns: a namespace: dataset, fetch (batch -> x0, y on the device), teacher, net (the
             student), v_teacher (z, tau, y), v_of (network -> its v (z, tau, y, w)), angle (tau ->
             phi), times (how many the teacher knows, None for all), draws (v, N, w -> what draws a
             block of the grid), and what pictures and checkpoints need.
    """
    teacher, settings = common.open_teacher(args, run)
    size = settings["image_size"]
    dataset = common.open_dataset(args, run, size)
    D, classes = common.teacher_denoiser(args, run, teacher, dataset)
    common.check_guidance(args, teacher, classes)
    model_args = settings | dict(classes=classes, dropout=args.dropout, cond=args.w_max > 0)
    angle = angle_of(args.sampler)

    def fetch(batch):
        x0, y = common.to_device(batch, run.device, args.flip)
        return x0, y if classes else None

    def draws(v, N, w):
        return partial(draw, v, angle, N, args.sampler, w, run.device)

    return SimpleNamespace(
        latent=None, dataset=dataset, teacher=teacher,
        net=common.new_network(args, run, model_args, teacher),
        v_teacher=edm_v(D, angle), v_of=partial(net_v, angle=angle), angle=angle,
        fetch=fetch, times=None, draws=draws, shape=(3, size, size), classes=classes, columns=None,
        model_args=model_args)


def draw_tau(n, times):
    """tau for stage 1 (n,) float64: uniform, at the times that the teacher knows if not at all."""
    tau = torch.rand(n, dtype=torch.float64)
    return tau if times is None else (tau * times).ceil().clamp(min=1) / times


def train(args, run, stop):
    """Train, or go on with the run found in --out-dir. Returns whether it came to its end."""
    if args.teacher is None:
        label_dropout = 0.1 if args.w_max else 0.0
        common.train_first_teacher(args, run, stop, "guided_distill", label_dropout)
    task = open_latents(args, run) if is_latent(args.teacher) else open_pixels(args, run)
    net, angle = task.net, task.angle
    before = copy.deepcopy(net).requires_grad_(False).eval()  # of the last round: stage 2's teacher
    ema = copy.deepcopy(before)
    optimizer = torch.optim.Adam(net.parameters(), args.lr, foreach=True)
    gradients = common.flatten_gradients(net)
    totals = common.Totals(run, "loss")
    parts = dict(net=net, before=before, ema=ema, optimizer=optimizer)
    step, skipped = common.resume(args, run, "guided_distill", task.model_args, parts)
    if args.overwrite and not step and run.main and not run.restarted:
        delete_students(args)
    common.compile_in_place(run, task.teacher, before, net)
    log = common.start_run(args, run, net, step, skipped)

    v_net, v_before, v_ema = task.v_of(net), task.v_of(before), task.v_of(ema)
    weight = WEIGHTS[args.weighting]
    weights = [None]  # of guidance, in grids of samples
    if args.w_max:
        weights = [args.w_min + share * (args.w_max - args.w_min) for share in (0, 0.25, 1)]
    rounds = plan(vars(args))
    starts = [0, *itertools.accumulate(steps for _, steps in rounds)]
    loader = common.batches(args, run, task.dataset, step)
    stopping = False
    while step < args.total_steps and not stopping:
        r = bisect.bisect(starts, step) - 1
        N, steps = rounds[r]
        if step == starts[r]:  # from the raw weights of the last one, whose net is the teacher
            before.load_state_dict(net.state_dict())
            ema.load_state_dict(net.state_dict())
            optimizer = torch.optim.Adam(net.parameters(), args.lr, foreach=True)
            parts["optimizer"] = optimizer
        # ------------------------------------------------------------------------ one training step
        lr = args.lr * (1 - (step - starts[r]) / steps)  # PD: to 0 within each round
        if args.sampler == "S" and N == 1:
            lr = 0.0  # it is its teacher already; Adam would make a step of a rounded gradient of 0
        optimizer.param_groups[0]["lr"] = lr
        gradients.zero_()
        totals.zero()
        for m in common.micro_batches(args, run):
            common.seed_everything(common.STEP, args.seed, step, m)
            x0, y = task.fetch(next(loader))
            w = None
            if args.w_max:
                w = args.w_min + (args.w_max - args.w_min) * torch.rand(len(x0), device=run.device)
            if N == 0:  # stage 1
                tau = draw_tau(len(x0), task.times)
                target = common.guide(task.v_teacher, y, w)
            else:
                i = torch.randint(1, N + 1, (len(x0),)).double()
                tau, tau_mid, tau_end = times_of(i, N, args.sampler)
                target = partial(two_steps, conditioned(v_before, y, w), angle, tau_mid=tau_mid,
                                 tau_end=tau_end)
            noise = torch.randn_like(x0)
            losses = loss_fn(conditioned(v_net, y, w), target, angle, x0, noise, tau, weight)
            (losses.sum() / args.batch_size).backward()
            totals.add(1 / args.batch_size, loss=losses.sum())
            totals.bin(on(angle(tau).tan(), x0).flatten(), losses)
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
        # grad_norm is that before it is clipped; N is 0 in stage 1
        last = stopping or step == args.total_steps
        ended = step == starts[r + 1]
        name = f"N{N:04d}" if N else "stage1"
        log.step(step, finite, last, N=N, loss=totals["loss"], loss_bins=totals.loss_bins(),
                 grad_norm=grad_norm, lr=lr)
        if ended and run.main:
            save_student(args, Path(args.out_dir, name), step, N, task, ema)
        if common.due(args.save_every, step) or last or ended:
            common.save_run(args, run, "guided_distill", step, log.skipped, task.model_args, parts,
                            N=N)
        if args.sample_every and (common.due(args.sample_every, step) or ended):
            draws = [task.draws(v_ema, N or 16, w) for w in weights]
            common.sample_grid(args, run, log, step, draws, task.classes, task.shape, f"_{name}",
                               task.columns)
    log.close()
    return step == args.total_steps and not stopping


def save_student(args, path, step, N, task, ema):
    """Write the student of a round, PATH.pt, and of a latent one the folder PATH for diffusers."""
    common.save_checkpoint(path.with_suffix(".pt"), dict(
        script="guided_distill", step=step, images=step * args.batch_size, N=N, args=vars(args),
        model_args=task.model_args, ema=ema.state_dict(), torch_version=str(torch.__version__)))
    if task.latent:
        task.latent.export(ema, path)


def delete_students(args):
    """`--overwrite`: the students of a run's rounds, and what was exported of them to diffusers."""
    out_dir = Path(args.out_dir)
    for old in [out_dir / "stage1.pt", *out_dir.glob("N????.pt")]:
        old.unlink(missing_ok=True)
        shutil.rmtree(old.with_suffix(""), ignore_errors=True)


# --------------------------------------------------------------------------------------------------
# Using a checkpoint
# --------------------------------------------------------------------------------------------------

def trained_for(checkpoint):
    """N (0: any), sampler (None: any), w_min and w_max of a checkpoint that this script wrote."""
    settings, N = checkpoint["args"], checkpoint["N"]
    return SimpleNamespace(N=N, sampler=settings["sampler"] if N else None, w_max=settings["w_max"],
                           w_min=settings.get("w_min", 0.0), calls=1)


def open_student(path, run, encoder=False):
    """A student or a teacher of images, to sample with.

    Returns: a namespace: v (z, tau, y, w), angle, net; what `trained_for` says; calls of the
             network for one of v where w > 0.
    """
    net, checkpoint = common.load_network(path, ("guided_distill", "cd"))
    teacher = checkpoint["script"] != "guided_distill"
    student = SimpleNamespace(N=0, sampler=None, w_min=0.0, w_max=0.0, calls=1)
    if not teacher:
        student = trained_for(checkpoint)
    elif checkpoint["args"].get("stage", "teacher") != "teacher":
        raise UserError(f"{path} holds a consistency model: cd.py samples with it")
    if encoder and student.sampler != "encoder":
        raise UserError(f"{path} holds no encoder: --sampler encoder trains one")
    if not encoder and student.sampler == "encoder":
        raise UserError(f"{path} holds an encoder, which goes from image to noise: name it as "
                        "--encoder, with --edit style")
    student.net = common.place(net, run)
    student.angle = angle_of(student.sampler)
    student.v = net_v(net, student.angle)
    if not teacher:
        return student
    if run.main and checkpoint["script"] is None:  # a plain state dict does not say
        print(f"{path} is taken for a teacher")
    if net.null_y is not None:
        student.w_max, student.calls = math.inf, 2
    v = edm_v(common.net_denoiser(net), student.angle)

    def guided(z, tau, y, w):
        return common.guide(v, y, w if w.any() else None)(z, tau)
    student.v = guided
    return student


def check_student(args, student):
    """N, sampler and w to draw with. Raises UserError for what --ckpt was not trained for."""
    if student.N and args.N not in (None, student.N):
        raise UserError(f"--N {args.N}: {args.ckpt} was trained for {student.N} step(s); each "
                        "round's student is in a file of its own")
    if student.sampler and args.sampler not in (None, student.sampler):
        raise UserError(f"--sampler {args.sampler}: {args.ckpt} was trained for sampler "
                        f"{student.sampler}")
    if args.sampler == "encoder":
        raise UserError("--sampler encoder applies to training only")
    w = student.w_min if args.w is None else args.w
    if not student.w_min <= w <= student.w_max:
        known = "no guidance"
        if student.w_max:
            known = f"weights from {student.w_min:g} to {student.w_max:g}"
        raise UserError(f"--w {w:g}: {args.ckpt} was trained for {known}")
    return student.N or args.N or 64, student.sampler or args.sampler or "D", w


def use_checkpoint(args, run):
    """`--ckpt`: sample, measure or edit."""
    checkpoint = common.load_checkpoint(args.ckpt)
    if is_latent(checkpoint.get("args", {}).get("teacher")):
        return sample_latents(args, run, checkpoint)
    student = open_student(args.ckpt, run)
    N, sampler, w = check_student(args, student)
    if args.edit:
        return edit_images(args, run, student, N, sampler, w)
    args.w, args.sampler = w, sampler  # --eval says what they were
    draws = partial(draw, student.v, student.angle, N, sampler, w, run.device)
    calls = N * (student.calls if w > 0 else 1)
    common.sample_checkpoint(args, run, student.net, draws, calls, checkpoint)


def sample_latents(args, run, checkpoint):
    """`--ckpt` of a latent student: draw, of --labels or of the data set's conditions, in turn."""
    common.refuse(args, ["edit", "eval"], "to latent models: diffusers' pipelines edit with them, "
                  "torch-fidelity's own command measures a folder of samples")
    N, sampler, w = check_student(args, trained_for(checkpoint))
    settings = checkpoint["args"]
    model = LatentModel(settings["teacher"].removeprefix("diffusers:"), run)
    dataset = Latents(settings["dataset"])
    if model.digest != settings["teacher_digest"]:
        raise UserError(f"{model.path} is not the teacher any more that {args.ckpt} was made of: "
                        "its UNet or scheduler has changed")
    if N > model.steps:
        raise UserError(f"--N {N}: the teacher knows {model.steps} times")
    guided = settings["w_max"] > 0
    net = model.student(guided).requires_grad_(False)
    net.load_state_dict(checkpoint["ema"])
    net.image_size = model.image_shape[-1]
    net.classes = 0  # conditions are the data set's, in turn
    if args.labels and model.classes:
        net.classes = model.classes - guided
    args.micro_batch = min(args.micro_batch, 8)
    draws = partial(model.draw, model.v(net), dataset, N, sampler, w if guided else None)
    common.sample_checkpoint(args, run, net, draws, N, checkpoint)


def encode(args, run, net, x0, sampler):
    """--edit style: x0 (b,C,H,W) of --from-labels at tau = 1, by --encoder (DDIB, GD)."""
    common.check_images(args, net, "from_labels")
    if sampler == "S":
        raise UserError("--edit style decodes without noise: name a student of --sampler D")
    if not args.encoder:
        raise UserError("--edit style needs --encoder")
    encoder = open_student(args.encoder, run, encoder=True)
    if (encoder.net.image_size, encoder.net.classes) != (net.image_size, net.classes):
        raise UserError(f"--encoder {args.encoder} and {args.ckpt} differ in image size or classes")
    y = common.labels_to_draw(args, net, len(x0), run.device, "from_labels")
    with torch.no_grad():
        return sample(conditioned(encoder.v, y, None), encoder.angle, encoder.N, "encoder", x0)


def edit_images(args, run, student, N, sampler, w):
    """`--edit`. A row of the picture: an image, then the results.

    img2img starts at an intermediate step from the noised image (SDEdit); inpaint pastes the known
    part, noised to the level, after each step; style encodes with one class, decodes with another.
    """
    net, angle, task = student.net, student.angle, args.edit
    common.check_images(args, net)
    size, start = net.image_size, N
    x0 = torch.stack([common.read_image(name, size)[0] for name in args.image]).to(run.device)
    if task == "img2img":
        strength = 0.5 if args.strength is None else args.strength
        start = math.floor(strength * N + 0.5)
    elif task == "inpaint":
        hole = common.read_mask(args.mask, size).to(run.device)
    else:
        z_top = encode(args, run, net, x0, sampler)
    each = args.sample or (1 if task == "style" else 4)

    @torch.no_grad()
    def draw_edit(y, noise, shape):
        row = noise.indices // each
        first = noise(torch.zeros(shape, device=run.device))

        def noised(tau):
            alpha, sigma = alpha_sigma(angle(tau), first)
            return alpha * x0[row] + sigma * first

        def paste(z, tau):
            return hole * z + (1 - hole) * noised(tau)

        if task == "img2img":
            z = noised(torch.full((len(row),), start / N, dtype=torch.float64))
        else:
            z = first if task == "inpaint" else z_top[row]
        v = conditioned(student.v, y, first.new_full((len(row),), w))
        after = paste if task == "inpaint" else None
        return clip(sample(v, angle, N, sampler, z, noise, start, after))

    how = f"{start} of {N} steps, w = {w:g}"
    common.draw_edits(args, run, net, draw_edit, len(x0), each, how, before=x0)


if __name__ == "__main__":
    args = common.parse_flags(make_parser(), recipe, check)
    run = common.setup(args)
    if args.ckpt:
        use_checkpoint(args, run)
        common.finish(run)
    stop = common.StopSignal()
    if args.stage == "teacher":
        import cd
        finished = cd.train(args, run, stop)
    else:
        finished = train(args, run, stop)
    common.finish(run, None if finished else stop)

# Where this differs from the papers; no official code was published
#   pixel models      the teacher is an EDM denoiser; the cosine schedule runs over its noise
#                     levels, 0.002 to 80: one teacher for all scripts. PD's log SNR: [-20, 20]
#   encoder           starts at noise level 0.002, not at 0: the least the network knows
#   stage 2's target  angles multiplied out, coefficients in float64: the papers' quotient loses
#                     digits where neighbouring levels are close
#   embedding of w    pixel models: sinusoids of 25 w, one linear layer of each block zero. The
#                     papers' factor of 1000 tells 4 from 4.1 too well for short training
