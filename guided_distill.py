"""Distillation of guided diffusion: one network for all guidance weights, then half the steps, and
again, down to one. Without guidance this is progressive distillation.

    python guided_distill.py                       digits: teacher, guidance, then N = 32 .. 1 steps
    python guided_distill.py --sampler S --teacher out/guided_distill/teacher/last.pt --out-dir S
    torchrun --nproc_per_node=8 guided_distill.py --dataset imagenet64 --data-dir /data/imagenet64
    python guided_distill.py --ckpt out/guided_distill/N0004.pt --sample 64 --w 1 --save out.png
    python guided_distill.py --teacher diffusers:stable-diffusion-2-1/ --dataset latents.npz

Stage 1 leaves stage1.pt, which draws in any number of steps, each at half the teacher's cost; every
round of stage 2 leaves N0032.pt .. N0001.pt, each of which draws in its own number of steps. The
same command again resumes a run, exactly, on any number of processes.

Papers: Meng et al. 2022 (GD, arXiv 2210.03142): both stages. Salimans & Ho 2022 (PD, arXiv
2202.00512): the halving. The models are VP: z = alpha x + sigma noise, alpha^2 + sigma^2 = 1, time
tau in [0, 1]. With the angle phi, for which alpha = cos phi and sigma = sin phi, no formula divides
by what may vanish. Times and angles are (B,) float64 on the CPU; coefficients meet the images.

Measured: glyphs, four steps, 99.0%, 99.9% and 100% of the digits are read as the label asked for at
w = 0, 1, 4, after 9 minutes on 2 cores; the teacher, 64 steps, 97.9%, 99.9%, 100%. No code of the
paper was ever published; its recipes were not run here.
"""
import copy
import functools
import hashlib
import itertools
import json
import math
import shutil
import types
from pathlib import Path

import numpy as np
import torch

import common
from common import UserError, bcast

# --------------------------------------------------------------------------------------------------
# The method
# --------------------------------------------------------------------------------------------------

def on(c, x):
    """Coefficients (B,) float64 -> (B,1,1,1), to multiply x."""
    return bcast(c.to(x.dtype).to(x.device), x)


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
    d1, d2 = angle(tau) - angle(tau_mid), angle(tau_mid) - angle(tau_end)
    v1 = v(z, tau)
    z_mid = on(d1.cos(), z) * z - on(d1.sin(), z) * v1
    v2 = v(z_mid, torch.where(tau_mid > 0, tau_mid, tau))
    scale = (d1 + d2).sin()
    a, b = d1.sin() * d2.cos() / scale, d2.sin() / scale
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
    z = on(phi.cos(), x0) * x0 + on(phi.sin(), x0) * noise
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
    return functools.partial(edm_angle, bottom=BOTTOM) if sampler == "encoder" else edm_angle


def edm_v(D, angle):
    """v(z, tau, *c) = alpha noise - sigma x of a denoiser D(x, t, *c).

    A VP model is the same network, read at z / alpha with noise level sigma / alpha.
    """
    def v(z, tau, *c):
        phi = angle(tau)
        alpha, sigma = on(phi.cos(), z), on(phi.sin(), z)
        t = on(phi.tan(), z).flatten()
        return (alpha * z - D(z / alpha, t, *c)) / sigma  # sigma >= 0.002
    return v


def c_guidance(w):
    """What the student is told of w: a scale on which its embedding tells w from w + 0.1."""
    return 25 * w


def net_v(net, angle):
    """v(z, tau, y, w) of a student; distilled without guidance it does not look at w."""
    def D(x, t, y, w):
        return common.denoise(net, x, t, y, c_guidance(w) if net.cond else None)
    return edm_v(D, angle)


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
    delta = angle(tau) - angle(tau_end)
    return on(delta.cos(), z) * z - on(delta.sin(), z) * v(z, tau)


def renoise(angle, z, tau, tau_up, noise):
    """z at tau -> z at tau_up > tau, as if x had been noised to tau_up at once."""
    phi, up = angle(tau), angle(tau_up)
    added = ((up - phi).sin() * (up + phi).sin()).sqrt()
    return on(up.cos() / phi.cos(), z) * z + on(added / phi.cos(), z) * noise


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

    def v_y(z, tau):
        return v(z, tau, y, weights)
    return decode(sample(v_y, angle, N, sampler, z, noise))


# --------------------------------------------------------------------------------------------------
# Latent diffusion models, read by the package diffusers
# --------------------------------------------------------------------------------------------------

class Latents:
    """An .npz of latents (n,C,h,w), and embeddings (n,L,D) with `null` (L,D), or labels (n,)."""
    def __init__(self, path):
        with common.explain(f"--dataset {path} holds no latents"):
            with np.load(path) as file:
                self.text = "embeddings" in file
            key = "embeddings" if self.text else "labels"
            self.latents = common.map_array(Path(path), "latents")
            self.conditions = common.map_array(Path(path), key)
            self.null = None
            if self.text:
                null = common.map_array(Path(path), "null")
                self.null = torch.from_numpy(null.astype(np.float32))
            if len(self.latents) != len(self.conditions):
                raise UserError(f"--dataset {path}: {len(self.latents)} latents, "
                                f"{len(self.conditions)} {key}")

    def __len__(self):
        return len(self.latents)

    def __getitems__(self, indices):
        latents = torch.from_numpy(np.array(self.latents[indices])).float()
        conditions = torch.from_numpy(np.array(self.conditions[indices]))
        return latents, conditions.float() if self.text else conditions.long()


class LatentModel:
    """A UNet2DConditionModel on text or classes, predicting noise, v or x, of a pipeline."""
    def __init__(self, path, run):
        need = "--teacher diffusers:PATH needs the package diffusers"
        self.library = common.import_optional("diffusers", need)
        try:
            self.library.UNet2DConditionModel, self.library.AutoencoderKL  # naming imports them
        except (ImportError, RuntimeError) as error:
            raise UserError(f"{need}: {common.first_line(error)}") from error
        self.path, self.run, self.flag = Path(path), run, f"--teacher diffusers:{path}"
        if not (self.path / "unet").is_dir():  # diffusers would look for it on its hub
            raise UserError(f"{self.flag}: there is no folder {self.path / 'unet'}")
        with common.explain(f"{self.flag} cannot be read"):
            unet = self.library.UNet2DConditionModel.from_pretrained(path, subfolder="unet")
            self.teacher = unet.requires_grad_(False).eval().to(run.device)
            config = (self.path / "scheduler" / "scheduler_config.json").read_text()
            config = json.loads(config)
            digest = hashlib.sha256(json.dumps(config).encode())
            for part in sorted((self.path / "unet").iterdir()):
                digest.update(part.read_bytes())
            self.digest = digest.hexdigest()[:12]
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
        plain = config.in_channels == config.out_channels and isinstance(config.sample_size, int)
        if further or not plain:
            raise UserError(f"{self.flag}: this UNet takes more than square latents, a time, and a "
                            f"text or a label {' '.join(further)}")
        self.shape = config.in_channels, config.sample_size, config.sample_size
        self.classes = config.num_class_embeds

    def check(self, data, guided):
        """Raises UserError for a data set that does not fit the network."""
        width = self.teacher.config.cross_attention_dim
        if data.latents.shape[1:] != self.shape or data.text == bool(self.classes):
            kind = "labels" if self.classes else "embeddings"
            raise UserError(f"--dataset: this teacher takes latents {self.shape} and {kind}")
        if not data.text:
            return self.check_labels("--dataset", data.conditions, guided)
        one, null = data.conditions.shape[1:], tuple(data.null.shape)
        if one != null or one[1:] != (width,):
            raise UserError(f"--dataset: embeddings {data.conditions.shape} and null {null}, where "
                            f"this teacher takes (n, L, {width}) and (L, {width})")

    def check_labels(self, flag, labels, guided):
        """Raises UserError for unknown labels; with guidance the last is the null class."""
        known = self.classes - guided
        if np.ndim(labels) != 1 or not np.isin(labels, range(known)).all():
            null = ", and then the null class" * guided
            raise UserError(f"{flag}: the labels of this network are 0 to {known - 1}{null}")

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
        """v(z, tau, c, w) of a UNet: c (B,L,D) or labels (B,), None for none; w (B,) or None."""
        if self.classes:
            null = torch.tensor(self.classes - 1)

        def v(z, tau, c, w=None):
            phi = self.angle(tau)
            alpha, sigma = on(phi.cos(), z), on(phi.sin(), z)
            if c is None:
                c = null.to(z.device).expand(len(z), *null.shape)
            words = dict(encoder_hidden_states=None if self.classes else c)
            if self.classes:
                words["class_labels"] = c
            if w is not None:
                words["timestep_cond"] = w_features(w, net.config.time_cond_proj_dim)
            low = self.run.dtype != torch.float32
            with torch.autocast(z.device.type, self.run.dtype, enabled=low):
                out = net(z, (self.index(tau) - 1).to(z.device), **words).sample.float()
            if self.prediction == "epsilon":
                return (out - sigma * z) / alpha  # alpha >= 0.068 for Stable Diffusion
            return out if self.prediction == "v_prediction" else (alpha * z - out) / sigma
        return v

    @functools.cached_property
    def vae(self):
        folder = self.path / "vae"
        if not folder.is_dir():
            raise UserError(f"there is no folder {folder} to decode latents with; training needs "
                            "none with --sample-every 0")
        with common.explain(f"{folder} cannot be read"):
            vae = self.library.AutoencoderKL.from_pretrained(self.path, subfolder="vae")
            return vae.requires_grad_(False).eval().to(self.run.device)

    @functools.cached_property
    @torch.no_grad()
    def image_shape(self):
        with common.explain(f"{self.path / 'vae'} does not decode latents {self.shape}"):
            return self.decode(torch.zeros(1, *self.shape, device=self.run.device))[0].shape

    def decode(self, z):
        return self.vae.decode(z / self.vae.config.scaling_factor).sample.clamp(-1, 1)

    def draw(self, v, conditions, N, sampler, w):
        """A draw function, see `common.draw_many`: image i of condition i, in turn."""
        def images(y, noise, shape):
            c = conditions[noise.indices.cpu() % len(conditions)].to(self.run.device)
            return draw(v, self.angle, N, sampler, w, self.run.device, c, noise,
                        (len(c), *self.shape), self.decode)
        return images

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
    "glyphs": dict(batch_size=32, lr=1e-3, ema_decay=0.98, start_N=64, stage1_steps=1000,
                   round_steps=300, last_steps=900),
    "path": dict(batch_size=128, lr=2e-4, ema_decay=0.999, start_N=256, stage1_steps=20_000,
                 round_steps=5_000, last_steps=25_000),
    "cifar10": dict(batch_size=128, lr=5e-5, ema_decay=0.999, start_N=1024, stage1_steps=100_000,
                    round_steps=50_000, last_steps=100_000),
    "imagenet64": dict(batch_size=2048, lr=1e-4, ema_decay=0.999, start_N=1024,
                       stage1_steps=50_000, round_steps=50_000, last_steps=100_000),
}
# GD's for text; it starts from a teacher fine-tuned to v. Learning rate and EMA are ours.
LATENT = dict(batch_size=512, micro_batch=8, flip=False, lr=1e-5, ema_decay=0.999, start_N=512,
              stage1_steps=3000, round_steps=2000, last_steps=20_000, w_min=2.0, w_max=14.0)
PLAIN = dict(w_min=0.0, w_max=0.0, weighting="trunc", stage1_steps=0)  # PD
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
    name = common.known_dataset(flags)
    if flags.get("stage") == "teacher":
        return teacher_recipe(flags, name)
    settings = common.DATASETS[name] | GD | STUDENTS.get(name, STUDENTS["imagenet64"])
    if is_latent(flags.get("teacher")):
        settings |= LATENT | (dict(w_min=0.0) if flags.get("w_max", 14) < 2 else {})
    encoder = flags.get("sampler") == "encoder"
    w_max = flags.get("w_max", 0.0 if encoder or name in UNLABELLED else settings["w_max"])
    if not w_max:
        keep = flags.get("teacher") == "ideal"  # of which a network is made first of all
        settings |= PLAIN | (dict(stage1_steps=settings["stage1_steps"]) if keep else {})
        settings |= dict(start_N=8192) if name == "cifar10" else {}
    elif settings.get("class_cond") is False and not is_latent(flags.get("teacher")):
        settings["class_cond"] = True
    if encoder:
        settings["sample_every"] = 0
    return settings | dict(total_steps=sum(steps for _, steps in plan(settings | flags)))


# --------------------------------------------------------------------------------------------------
# Flags
# --------------------------------------------------------------------------------------------------

def make_parser():
    parser = common.Parser(__doc__)
    built = [dict(stage="teacher"), dict(teacher=(None, "ideal"))]  # not like a --teacher FILE
    common.add_shared_flags(parser, net=built, class_cond=built)

    both = parser.group("algorithm, training and sampling")
    both.flag("--stage", only=dict(ckpt=False), choices=("teacher", "distill"), help="train a "
              "teacher, or distil one (default; without --teacher one is trained first)")
    both.flag("--sampler", only=[dict(ckpt=True), dict(ckpt=False, stage="distill")],
              choices=("D", "S", "encoder"), help="what the student is trained for: deterministic "
              "steps (default), stochastic ones of double length, or the way from image to noise "
              "(with --w-max 0)")
    both.flag("--N", only=[dict(ckpt=True), dict(ckpt=False, stage="teacher")], metavar="N",
              type=common.positive, help="steps: of a teacher or a student of stage 1 any number "
              "(default 64), otherwise the student's own")
    train = parser.group("teacher", ckpt=False, stage="teacher")
    train.flag("--label-dropout", type=common.number(float, 0, 1), metavar="P",
               help="share of labels hidden, for guidance (default 0.1)")
    train.flag("--p-t", nargs="+", type=common.p_of_t, metavar="MEAN STD",
               help="ln t ~ Normal(MEAN, STD^2) (EDM -1.2 1.2), or the one word uniform")

    student = parser.group("distillation", ckpt=False, stage="distill")
    student.flag("--teacher", metavar="FILE", help="a teacher of --stage teacher or cd.py's, "
                 "released EDM weights (--w-max 0), ideal: the exact denoiser of the images, or "
                 "diffusers:PATH: a latent diffusion model")
    student.flag("--teacher-steps", only=dict(teacher=False), type=common.positive, metavar="K",
                 help="optimizer steps of the teacher that is trained first")
    student.flag("--w-min", only=dict(w_max=True), type=common.number(float, 0), metavar="W",
                 help="least guidance weight: (1 + w) cond - w uncond, w = 0 is the conditional "
                 "model (GD 0; text 2)")
    student.flag("--w-max", type=common.number(float, 0), metavar="W", help="largest guidance "
                 "weight (GD 4; latents 14); 0: plain progressive distillation")
    student.flag("--start-N", type=common.number(int, 2), metavar="N", help="DDIM steps of the "
                 "teacher of stage 2, a power of two (GD 1024; PD 8192 for CIFAR-10)")
    student.flag("--end-N", type=common.positive, metavar="N",
                 help="steps of the last round's student (default 1)")
    student.flag("--stage1-steps", only=[dict(w_max=True), dict(teacher="ideal")], metavar="K",
                 type=common.positive, help="optimizer steps of stage 1")
    student.flag("--round-steps", type=common.positive, metavar="K",
                 help="optimizer steps of a round of stage 2 (PD 50,000), but the last ones")
    student.flag("--last-steps", type=common.positive, metavar="K", help="the same for the last "
                 "rounds: N <= 4 (GD: ten times as many), without guidance N <= 2 (PD 100,000)")
    student.flag("--weighting", choices=WEIGHTS,
                 help="of the loss: 1 + SNR, which is plain in v, or truncated SNR (PD)")

    draws = parser.group("sampling and editing, further flags", ckpt=True)
    draws.flag("--w", type=common.number(float, 0), metavar="W",
               help="guidance weight (default: the least the student knows)")
    draws.flag("--edit", only=dict(eval=False), choices=("img2img", "inpaint", "style"),
               help="change the --image files, --sample results each (default 4; style 1)")
    draws.flag("--image", only=dict(edit=True), nargs="+", metavar="FILE", help="images to edit")
    draws.flag("--strength", only=dict(edit="img2img"), type=common.number(float, 0, 1),
               metavar="S", help="share of the steps that is run (default 0.5)")
    draws.flag("--mask", only=dict(edit="inpaint"), metavar="FILE", help="white where to paint "
               "(default: a central square of half the side)")
    draws.flag("--encoder", only=dict(edit="style"), metavar="FILE", help="a student of --sampler "
               "encoder, with which the images are encoded")
    draws.flag("--from-labels", only=dict(edit="style"), type=common.count, nargs="+", metavar="Y",
               help="the class each --image is; --labels: what it becomes")
    return parser


def check(args):
    """Raises UserError for values that do not fit each other."""
    if args.stage == "teacher":
        return common.check_p_t(args.p_t, common.karras_times(args.N))
    if args.total_steps != sum(steps for _, steps in plan(vars(args))):
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
    for key in ("start_N", "end_N"):
        N = getattr(args, key)
        if not math.log2(N).is_integer():
            raise UserError(f"{common.flag_name(key)} {N}: steps are halved, so name a power of "
                            "two")
    first = args.start_N if args.sampler == "S" else args.start_N // 2
    if args.end_N > first:
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
    model.check(dataset, args.w_max > 0)
    if args.start_N > model.steps:
        raise UserError(f"--start-N {args.start_N}: the teacher knows {model.steps} times")
    shape = model.image_shape if args.sample_every else None  # now: it needs a VAE

    def fetch(batch):
        return tuple(part.to(run.device, non_blocking=True) for part in batch)

    shown = dataset.__getitems__(np.arange(min(len(dataset), 8)))[1]  # the conditions of the grids

    def block(v, N, w):
        return model.draw(v, shown, N, args.sampler, w)

    return types.SimpleNamespace(
        latent=model, dataset=dataset, teacher=model.teacher, net=model.student(args.w_max > 0),
        v_teacher=model.v(model.teacher, dataset.null), v_of=model.v, angle=model.angle,
        model_args=dict(cond=args.w_max > 0), labelled=True, classes=0, columns=1, shape=shape,
        fetch=fetch, block=block, times=model.steps)


def open_pixels(args, run):
    """What is distilled, of a denoiser of images.

    Returns: a namespace: dataset, fetch (batch -> x0, y on the device), teacher, net (the
             student), v_teacher (z, tau, y), v_of (network -> its v (z, tau, y, w)), angle (tau ->
             phi), times (how many the teacher knows, None for all), block (v, N, w -> what draws a
             block of the grid), and what pictures and checkpoints need.
    """
    teacher, settings = common.open_teacher(args, run)
    size = settings["image_size"]
    dataset = common.open_dataset(args, run, size)
    D, classes = common.teacher_denoiser(args, run, teacher, dataset)
    if args.w_max and not classes:
        raise UserError("--w-max needs labels, and there are none: --w-max 0 distils without "
                        "guidance")
    if args.w_max and teacher is not None and teacher.null_y is None:
        raise UserError(f"--w-max: {args.teacher} was trained without --label-dropout, so it has "
                        "nothing to guide with")
    model_args = settings | dict(classes=classes, dropout=args.dropout, cond=args.w_max > 0)
    angle = angle_of(args.sampler)

    def block(v, N, w):
        return functools.partial(draw, v, angle, N, args.sampler, w, run.device)

    return types.SimpleNamespace(
        latent=None, dataset=dataset, teacher=teacher,
        net=common.new_network(args, run, model_args, teacher), v_teacher=edm_v(D, angle),
        v_of=functools.partial(net_v, angle=angle), angle=angle, model_args=model_args,
        labelled=classes > 0, classes=classes, columns=None, shape=(3, size, size),
        fetch=functools.partial(common.to_device, device=run.device, flip=args.flip), block=block,
        times=None)


def draw_tau(n, times):
    """tau for stage 1 (n,) float64: uniform, at the times that the teacher knows if not at all."""
    tau = torch.rand(n, dtype=torch.float64)
    return tau if times is None else (tau * times).ceil().clamp(min=1) / times


def delete_rounds(out_dir):
    """`--overwrite`: the students of a run's rounds, and what was exported of them to diffusers."""
    for old in [out_dir / "stage1.pt", *out_dir.glob("N????.pt")]:
        old.unlink(missing_ok=True)
        shutil.rmtree(old.with_suffix(""), ignore_errors=True)


def train(args, run, stop):
    """Train, or go on with the run found in --out-dir. Returns whether it came to its end."""
    if args.teacher is None:
        common.train_first_teacher(args, run, stop, "guided_distill", 0.1 if args.w_max else 0.0)
    case = open_latents(args, run) if is_latent(args.teacher) else open_pixels(args, run)
    net, angle = case.net, case.angle
    before = copy.deepcopy(net).requires_grad_(False).eval()  # of the last round: stage 2's teacher
    ema = copy.deepcopy(before)
    optimizer = torch.optim.Adam(net.parameters(), args.lr, foreach=True)
    gradients = common.flatten_gradients(net)
    totals = common.Totals(run, "loss")
    parts = dict(net=net, before=before, ema=ema, optimizer=optimizer)
    step, skipped = common.resume(args, run, "guided_distill", case.model_args, parts)
    out_dir = Path(args.out_dir)
    if args.overwrite and not step and run.main and not run.restarted:
        delete_rounds(out_dir)
    common.compile_in_place(run, case.teacher, before, net)
    log = common.start_run(args, run, net, step, skipped)
    v_net, v_before, v_ema = case.v_of(net), case.v_of(before), case.v_of(ema)

    rounds = plan(vars(args))
    starts = [0, *itertools.accumulate(steps for _, steps in rounds)]
    weight = WEIGHTS[args.weighting]
    loader = common.batches(args, run, case.dataset, step)
    stopping = False
    while step < args.total_steps and not stopping:
        r = max(r for r, start in enumerate(starts) if start <= step)  # the round
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
            x0, y = case.fetch(next(loader))
            y = y if case.labelled else None
            w = None
            if args.w_max:
                w = args.w_min + (args.w_max - args.w_min) * torch.rand(len(x0), device=run.device)

            def student(z, tau):
                return v_net(z, tau, y, w)

            def student_before(z, tau):
                return v_before(z, tau, y, w)

            if N == 0:  # stage 1
                tau = draw_tau(len(x0), case.times)
                target = common.guide(case.v_teacher, y, w)
            else:
                i = torch.randint(1, N + 1, (len(x0),)).double()
                tau, tau_mid, tau_end = times_of(i, N, args.sampler)
                target = functools.partial(two_steps_to, student_before, angle, tau_mid, tau_end)
            losses = loss_fn(student, target, angle, x0, torch.randn_like(x0), tau, weight)
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
        log.step(step, finite, last, N=N, loss=totals["loss"], loss_bins=totals.loss_bins(),
                 grad_norm=grad_norm, lr=lr)
        name = f"N{N:04d}" if N else "stage1"
        if ended:
            save_student(args, run, out_dir / name, step, N, case, ema)
        if common.due(args.save_every, step) or last or ended:
            common.save_run(args, run, "guided_distill", step, log.skipped, case.model_args, parts,
                            N=N)
        if args.sample_every and (common.due(args.sample_every, step) or ended):
            draws = [case.block(v_ema, N or 16, w) for w in weights_shown(args)]
            common.sample_grid(args, run, log, step, draws, case.classes, case.shape, f"_{name}",
                               case.columns)
    log.close()
    return step == args.total_steps and not stopping


def weights_shown(args):
    """The guidance of a grid's blocks: the least weight, a quarter of the way up, the largest."""
    if not args.w_max:
        return [None]
    return [args.w_min + share * (args.w_max - args.w_min) for share in (0, 0.25, 1)]


def two_steps_to(v, angle, tau_mid, tau_end, z, tau):
    return two_steps(v, angle, z, tau, tau_mid, tau_end)


def save_student(args, run, path, step, N, case, ema):
    """Write the student of a round, PATH.pt, and of a latent one the folder PATH for diffusers."""
    if not run.main:
        return
    common.save_checkpoint(path.with_suffix(".pt"), dict(
        script="guided_distill", step=step, images=step * args.batch_size, N=N, args=vars(args),
        model_args=case.model_args, ema=ema.state_dict(), torch_version=str(torch.__version__)))
    if case.latent:
        case.latent.export(ema, path)


# --------------------------------------------------------------------------------------------------
# Using a checkpoint
# --------------------------------------------------------------------------------------------------

def open_student(path, run, encoder=False):
    """A checkpoint to sample with.

    Returns: a namespace: v (z, tau, y, w), angle, net; N (0: any) and sampler (None: any) that it
             was trained for, w_min and w_max; calls of the network for one of v where w > 0.
    """
    net, trained = common.load_network(path, ("guided_distill", "cd"))
    settings = trained["args"]
    student = types.SimpleNamespace(net=common.place(net, run), N=0, sampler=None, w_min=0.0,
                                    w_max=0.0, calls=1)
    if trained["script"] == "guided_distill":
        student.N = trained["N"]
        student.w_min, student.w_max = settings.get("w_min", 0.0), settings["w_max"]
        if student.N:
            student.sampler = settings["sampler"]
    elif settings.get("stage", "teacher") != "teacher":
        raise UserError(f"{path} holds a consistency model: cd.py samples with it")
    if (student.sampler == "encoder") != encoder:
        if encoder:
            raise UserError(f"{path} holds no encoder: --sampler encoder trains one")
        raise UserError(f"{path} holds an encoder, which goes from image to noise: name it as "
                        "--encoder, with --edit style")
    student.angle = angle_of(student.sampler)
    if trained["script"] == "guided_distill":
        student.v = net_v(net, student.angle)
        return student
    if run.main and trained["script"] is None:  # a plain state dict does not say
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
    state = common.load_checkpoint(args.ckpt)
    if is_latent(state.get("args", {}).get("teacher")):
        return sample_latents(args, run, state)
    student = open_student(args.ckpt, run)
    N, sampler, w = check_student(args, student)
    if args.edit:
        return edit_images(args, run, student, N, sampler, w)
    args.w, args.sampler = w, sampler  # --eval says what they were
    draws = functools.partial(draw, student.v, student.angle, N, sampler, w, run.device)
    calls = N * (student.calls if w > 0 else 1)
    common.sample_checkpoint(args, run, student.net, draws, calls, state)


def sample_latents(args, run, state):
    """`--ckpt` of a latent student: draw, conditioned on the first of the data set or --labels."""
    for key in ("edit", "eval"):
        if getattr(args, key):
            raise UserError(f"--{key} does not apply to latent models: diffusers' pipelines edit "
                            "with them, torch-fidelity's own command measures a folder of samples")
    settings = state["args"]
    student = types.SimpleNamespace(N=state["N"], sampler=None, w_min=settings.get("w_min", 0.0),
                                    w_max=settings["w_max"])
    if student.N:
        student.sampler = settings["sampler"]
    N, sampler, w = check_student(args, student)
    model = LatentModel(settings["teacher"].removeprefix("diffusers:"), run)
    dataset = Latents(settings["dataset"])
    if model.digest != settings["teacher_digest"]:
        raise UserError(f"{model.path} is not the teacher any more that {args.ckpt} was made of: "
                        "its UNet or scheduler has changed")
    if N > model.steps:
        raise UserError(f"--N {N}: the teacher knows {model.steps} times")
    guided = student.w_max > 0
    net = model.student(guided).requires_grad_(False)
    net.load_state_dict(state["ema"])
    n, path = args.sample or 64, common.make_save_path(args.save)
    if args.labels and dataset.text:
        raise UserError("--labels: this network is told texts, those of its data set in turn")
    if args.labels:
        model.check_labels("--labels", args.labels, guided)
        conditions = torch.tensor(args.labels)
    else:
        conditions = dataset.__getitems__(np.arange(min(len(dataset), n)))[1]
    draws = model.draw(model.v(net), conditions, N, sampler, w if guided else None)
    batch = min(args.micro_batch, 8)
    images = common.draw_many(run, draws, n, None, model.image_shape, args.seed, batch)
    if run.main:
        common.save_samples(path, images, None, math.isqrt(n - 1) + 1)
        print(f"{n} samples, {N} network call(s) each, EMA weights of {args.ckpt}: {args.save}")


def check_edit(args, net, sampler):
    """Raises UserError if what `--edit` is given does not fit it, or the network."""
    style = args.edit == "style"
    if style and sampler == "S":
        raise UserError("--edit style decodes without noise: name a student of --sampler D")
    if not args.image or style and not args.encoder:
        raise UserError(f"--edit {args.edit} needs --image" + " and --encoder" * style)
    for key in ("labels", "from_labels") if style else ("labels",):
        if net.classes and len(getattr(args, key) or ()) not in (1, len(args.image)):
            raise UserError(f"this network draws classes: name with {common.flag_name(key)} one, "
                            "or one for each --image")


def encode(args, run, net, x0):
    """--edit style: x0 (b,C,H,W) of --from-labels at tau = 1, by --encoder (DDIB, GD)."""
    encoder = open_student(args.encoder, run, encoder=True)
    if (encoder.net.image_size, encoder.net.classes) != (net.image_size, net.classes):
        raise UserError(f"--encoder {args.encoder} and {args.ckpt} differ in image size or classes")
    y = common.labels_to_draw(args, net, len(x0), run.device, "from_labels")

    def v(z, tau):
        return encoder.v(z, tau, y, None)
    with torch.no_grad():
        return sample(v, encoder.angle, encoder.N, "encoder", x0)


def edit_images(args, run, student, N, sampler, w):
    """`--edit`: change images, and write a picture of it. A row: an image, then the results.

    img2img starts at an intermediate step from the noised image (SDEdit); inpaint pastes the known
    part, noised to the level, after each step; style encodes with one class, decodes with another.
    """
    net, angle, task = student.net, student.angle, args.edit
    check_edit(args, net, sampler)
    size, each = net.image_size, args.sample or (1 if task == "style" else 4)
    path = common.make_save_path(args.save)
    x0 = torch.stack([common.read_image(name, size)[0] for name in args.image]).to(run.device)
    start = N
    if task == "img2img":
        strength = 0.5 if args.strength is None else args.strength
        start = math.floor(strength * N + 0.5)
    hole = common.read_mask(args.mask, size).to(run.device) if task == "inpaint" else None
    z_top = encode(args, run, net, x0) if task == "style" else None

    @torch.no_grad()
    def edit(y, noise, shape):
        row = noise.indices // each
        known, weights = x0[row], x0.new_full((len(row),), w)
        first = noise(torch.zeros(shape, device=run.device))

        def noised(tau):
            return on(angle(tau).cos(), known) * known + on(angle(tau).sin(), known) * first

        def paste(z, tau):
            return hole * z + (1 - hole) * noised(tau)

        def v(z, tau):
            return student.v(z, tau, y, weights)

        z = first
        if task == "style":
            z = z_top[row]
        elif task == "img2img":
            z = noised(torch.full((len(row),), start / N, dtype=torch.float64))
        after = paste if task == "inpaint" else None
        return clip(sample(v, angle, N, sampler, z, noise, start, after))

    y = common.labels_to_draw(args, net, len(x0), run.device)
    if y is not None:
        y = y.repeat_interleave(each)
    results = common.draw_many(run, edit, len(x0) * each, y, (3, size, size), args.seed,
                               args.micro_batch)
    if not run.main:
        return
    columns = each
    if path.suffix == ".png":
        drawn = torch.from_numpy(results).unflatten(0, (len(x0), each))
        rows = torch.cat([common.to_uint8(x0).cpu()[:, None], drawn], 1)
        results, columns = rows.flatten(0, 1).numpy(), each + 1
    common.save_samples(path, results, y, columns)
    print(f"{task}: {len(x0)} row(s), {each} result(s) each, {start} of {N} steps, w = {w:g}, EMA "
          f"weights of {args.ckpt}: {args.save}")


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
