"""Distillation of guided diffusion: one network for all guidance weights, then half the steps, and again, down to one.

    python guided_distill.py                                 digits: a teacher, its guidance, then N = 32 .. 1 steps
    python guided_distill.py --sampler S --teacher out/guided_distill/teacher/last.pt --out-dir out/stochastic
    python guided_distill.py --w-max 0 --out-dir out/plain   progressive distillation alone: no guidance, or no labels
    torchrun --nproc_per_node=8 guided_distill.py --dataset imagenet64 --data-dir /data/imagenet64
    torchrun --nproc_per_node=8 guided_distill.py --teacher diffusers:stable-diffusion-2-1/ --dataset latents.npz

    python guided_distill.py --ckpt out/guided_distill/N0004.pt --sample 64 --w 1 --save out.png
    python guided_distill.py --ckpt out/guided_distill/stage1.pt --sample 64 --N 32 --w 4
    python guided_distill.py --ckpt out/guided_distill/N0004.pt --eval 50000 --w 0.5
    python guided_distill.py --ckpt out/guided_distill/teacher/last.pt --sample 64 --N 256 --w 4

Stage 1 leaves stage1.pt, which draws in any number of steps, each at half the teacher's cost; every round of stage 2
leaves N0032.pt .. N0001.pt, each of which draws in its own number of steps. The same command again resumes a run,
exactly, on any number of processes.

Papers: Meng et al. 2022 (GD, arXiv 2210.03142): both stages. Salimans & Ho 2022 (PD, arXiv 2202.00512): the halving.
The models are VP: z = alpha x + sigma noise, alpha^2 + sigma^2 = 1, time tau in [0, 1]. With the angle phi, for which
alpha = cos phi and sigma = sin phi, every formula here is free of divisions by what may vanish.

Log, one JSON object a line: step, over all rounds; N = steps of the student in training, 0 in stage 1; loss, and
loss_bins its mean where the noise level tan phi is below 0.1, 1, 10 and above; grad_norm, before it is clipped; lr;
images_per_s; peak_gb; skipped = steps left out because their loss was not finite.
"""
import copy
import functools
import hashlib
import itertools
import json
import math
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed

import common
from common import UserError, bcast

# Recipes: PD's distillation, whose numbers GD's pixel models are taken to share; `start_N`: DDIM steps of the first teacher. glyphs and
# "path" (your own images) are ours, the former tuned on 2 cores; the teachers' are in common.py.
GD = dict(teacher=None, sampler="D", w_min=0.0, w_max=4.0, weighting="snr+1", dropout=0.0, end_N=1)
STUDENTS = {
    "glyphs": dict(batch_size=32, lr=1e-3, ema_decay=0.98, start_N=64, stage1_steps=1000, round_steps=300, last_steps=900),
    "path": dict(batch_size=128, lr=2e-4, ema_decay=0.999, start_N=256, stage1_steps=20_000, round_steps=5_000, last_steps=25_000),
    "cifar10": dict(batch_size=128, lr=5e-5, ema_decay=0.999, start_N=1024, stage1_steps=100_000, round_steps=50_000, last_steps=100_000),
    "imagenet64": dict(batch_size=2048, lr=1e-4, ema_decay=0.999, start_N=1024, stage1_steps=50_000, round_steps=50_000,
                       last_steps=100_000),
}
# GD's for text; it starts from a teacher fine-tuned to v. Learning rate and EMA are ours.
LATENT = dict(batch_size=512, micro_batch=8, flip=False, lr=1e-5, ema_decay=0.999, start_N=512, stage1_steps=3000, round_steps=2000,
              last_steps=20_000, w_min=2.0, w_max=14.0)
PLAIN = dict(w_min=0.0, w_max=0.0, weighting="trunc")  # PD
LAST_N = {True: 4, False: 2}  # rounds that take --last-steps, guided (GD) or not (PD)
STUDENT_ONLY = {"teacher", "teacher_steps", "sampler", "w_min", "w_max", "start_N", "end_N", "stage1_steps", "round_steps", "last_steps",
                "weighting"}


def recipe(given):
    """The settings of `--stage` for `--dataset`, general ones first. Raises UserError for a flag that does not apply to it."""
    def refuse(keys, why):
        for key in sorted(given.keys() & keys):
            raise UserError(f"--{key.replace('_', '-')} {why}")

    refuse({"sigmas"}, "does not apply: a student of N steps draws on its own grid")
    dataset, teacher, encoder = common.known_dataset(given), given.get("teacher"), given.get("sampler") == "encoder"
    unlabelled = dataset in ("bedroom256", "cat256")
    if given.get("stage") == "teacher":
        refuse(STUDENT_ONLY, "does not apply with --stage teacher")
        settings, labelled = common.teacher_recipe(given), given.get("class_cond") is not False and not unlabelled
        settings |= dict(out_dir="out/guided_distill/teacher", label_dropout=0.1 if labelled else 0.0)
        return settings | (dict(class_cond=True) if labelled and settings["class_cond"] is False else {})
    refuse({"label_dropout"}, "applies to --stage teacher only")
    refuse({"N"}, "does not apply: the rounds go from half of --start-N down to --end-N")
    refuse({"total_steps"}, "does not apply: name --stage1-steps, --round-steps and --last-steps")
    settings = dict(class_cond=None, stage="distill", teacher_steps=common.TEACHERS[dataset]["total_steps"]) | common.DATASETS[dataset] | GD
    settings |= STUDENTS.get(dataset, STUDENTS["imagenet64"])
    del settings["N"]
    if str(teacher).startswith("diffusers:"):
        refuse({"flip", "dropout"}, "does not apply with --teacher diffusers:PATH")
        if "dataset" not in given or encoder:
            raise UserError("--teacher diffusers:PATH needs --dataset FILE.npz, of latents (see the README), and has no --sampler encoder")
        settings |= LATENT | (dict(w_min=0.0) if given.get("w_max", 14) < 2 else {})
    if not given.get("w_max", 0 if encoder or unlabelled else 4):
        refuse({"w_min"}, "does not apply without --w-max")
        if teacher != "ideal":  # of which a network is made first of all
            refuse({"stage1_steps"}, "does not apply without --w-max: there is no guidance to distil")
            settings["stage1_steps"] = 0
        settings |= PLAIN | (dict(start_N=8192) if dataset == "cifar10" else {})
    elif encoder:
        raise UserError("--sampler encoder goes with --w-max 0: encoding with guidance is ill-conditioned")
    elif given.get("class_cond") is False:
        raise UserError("--no-class-cond goes with --w-max 0: guidance needs labels")
    elif settings["class_cond"] is False and teacher in (None, "ideal"):
        settings["class_cond"] = True
    if encoder:
        settings["sample_every"] = 0
        if given.get("sample_every"):
            raise UserError("--sample-every does not apply with --sampler encoder, which draws nothing")
    if teacher == "none":
        raise UserError("--teacher none: what is distilled here is a teacher")
    if teacher is not None:
        refuse({"teacher_steps"}, "does not apply with --teacher: that one is trained")
        del settings["teacher_steps"]
        if teacher != "ideal":
            refuse({"net", "class_cond"}, "does not apply with --teacher FILE: the student is built like its teacher")
            del settings["net"], settings["class_cond"]
    both = settings | given
    for key in ("start_N", "end_N"):
        if both[key] & both[key] - 1:
            raise UserError(f"--{key.replace('_', '-')} {both[key]}: steps are halved, so name a power of two")
    if both["end_N"] > both["start_N"] // (1 if both["sampler"] == "S" else 2):
        raise UserError(f"--end-N {both['end_N']}: the first round of --start-N {both['start_N']} has fewer steps")
    if both["w_min"] > both["w_max"]:
        raise UserError(f"--w-min {both['w_min']} is above --w-max {both['w_max']}")
    return settings | dict(total_steps=sum(steps for _, steps in plan(both)))


def flags():
    parser = common.Parser(__doc__)
    group = parser.add_argument_group("algorithm")
    group.add_argument("--stage", choices=("teacher", "distill"), help="train a teacher, or distil one (default; without --teacher one is "
                       "trained first, by its recipe)")
    group.add_argument("--teacher", metavar="FILE", help="a teacher written by --stage teacher or cd.py's, released EDM weights "
                       "(--w-max 0), ideal: the exact denoiser of the training images, or diffusers:PATH: a latent diffusion model")
    group.add_argument("--teacher-steps", type=common.positive, metavar="K", help="optimizer steps of the teacher that is trained first")
    group.add_argument("--label-dropout", type=common.number(float, 0, 1), metavar="P", help="teacher: share of labels hidden, for "
                       "guidance (default 0.1)")
    group.add_argument("--sampler", choices=("D", "S", "encoder"), help="what the student is trained for: deterministic steps (default), "
                       "stochastic ones of double length, or the way from image to noise (with --w-max 0)")
    group.add_argument("--w-min", type=common.number(float, 0), metavar="W", help="least guidance weight, in the paper's sense: "
                       "(1 + w) cond - w uncond, w = 0 is the conditional model (GD 0; text 2)")
    group.add_argument("--w-max", type=common.number(float, 0), metavar="W", help="largest guidance weight (GD 4; latents 14); 0: plain "
                       "progressive distillation, of conditional or unconditional models")
    group.add_argument("--start-N", type=common.number(int, 2), metavar="N", help="DDIM steps of the teacher when stage 2 begins, a power "
                       "of two (GD 1024; PD 8192 for CIFAR-10)")
    group.add_argument("--end-N", type=common.positive, metavar="N", help="steps of the last round's student (default 1)")
    group.add_argument("--stage1-steps", type=common.positive, metavar="K", help="optimizer steps of stage 1")
    group.add_argument("--round-steps", type=common.positive, metavar="K", help="optimizer steps of a round of stage 2 (PD 50,000), but the last "
                       "ones")
    group.add_argument("--last-steps", type=common.positive, metavar="K", help="the same for the last rounds: those of N <= 4 (GD: ten times "
                       "as many), without guidance N <= 2 (PD 100,000)")
    group.add_argument("--weighting", choices=WEIGHTS, help="of the loss: 1 + SNR, which is plain in v, or truncated SNR (PD)")
    common.add_shared_flags(parser)
    group = parser.add_argument_group("sampling, further flags")
    group.add_argument("--w", type=common.number(float, 0), metavar="W", help="guidance weight (default: the least the student knows)")
    group.add_argument("--N", type=common.positive, metavar="N", help="steps: of a teacher or a student of stage 1 any number (default "
                       "64), otherwise the student's own")
    group.add_argument("--edit", choices=("img2img", "inpaint", "style"), help="change the --image files, --sample results each (default "
                       "4; style 1)")
    group.add_argument("--image", nargs="+", metavar="FILE", help="images to edit")
    group.add_argument("--strength", type=common.number(float, 0, 1), metavar="S", help="img2img: share of the steps that is run, to the "
                       "nearest step (default 0.5)")
    group.add_argument("--mask", metavar="FILE", help="inpaint: white where to paint (default: a central square of half the side)")
    group.add_argument("--encoder", metavar="FILE", help="style: a student of --sampler encoder, with which the images are encoded")
    group.add_argument("--from-labels", type=common.count, nargs="+", metavar="Y", help="style: the class each --image is; --labels: "
                       "what it becomes")
    return parser


# ------------------------------------------------------------------------------------------------------------
# The method. Times and angles are (B,) float64 on the CPU; only the coefficients made of them meet the images.
# ------------------------------------------------------------------------------------------------------------

BOTTOM, TOP = math.atan(common.T_MIN), math.atan(common.T_MAX)


def edm_angle(tau, bottom=0.0):
    """phi(tau), where alpha = cos phi and sigma = sin phi: the cosine schedule over EDM's noise levels tan phi, 0.002 to 80.

    Args:    tau: (B,) float64 in [0, 1].  bottom: phi(0). At 0 there is no noise, so that the last step to it gives the denoised x (PD);
             an encoder, which calls the network there, begins at the least noise the network knows: BOTTOM.
    Source:  PD's code, in which log SNR runs over [-20, 20]; here over what the teachers are trained for.
    """
    return torch.where(tau > 0, BOTTOM + tau * (TOP - BOTTOM), bottom)


def on(c, x):
    """Coefficients (B,) float64 -> (B,1,1,1), to multiply x."""
    return bcast(c.to(x.dtype).to(x.device), x)


def edm_v(D, angle):
    """v(z, tau, *c) = alpha noise - sigma x of a denoiser D(x, t, *c): a VP model is the same network, read at z / alpha with noise
    level sigma / alpha."""
    def v(z, tau, *c):
        phi = angle(tau)
        alpha, sigma = on(phi.cos(), z), on(phi.sin(), z)
        return (alpha * z - D(z / alpha, on(phi.tan(), z).flatten(), *c)) / sigma  # sigma >= 0.002
    return v


def c_guidance(w):
    """What the student is told of w: a scale on which its embedding tells weights apart that differ by a tenth."""
    return 25 * w


def net_v(net, angle):
    """v(z, tau, y, w) of a student; one that was distilled without guidance does not look at w."""
    return edm_v(lambda x, t, y, w: common.denoise(net, x, t, y, c_guidance(w) if net.extra else None), angle)


def ddim(v, angle, z, tau, tau_end):
    """One DDIM step of v: (z, tau) -> (B,C,H,W), from tau to tau_end, either way. Source: PD Eq. 8, in angles."""
    delta = angle(tau) - angle(tau_end)
    return on(delta.cos(), z) * z - on(delta.sin(), z) * v(z, tau)


def times_of(i, N, sampler):
    """tau, tau_mid, tau_end of the student's jump from index i in 1 .. N, (B,) each: from tau to tau_end, the teacher by way of tau_mid.

    A stochastic student jumps two intervals, its teacher one and one; from i = 1 there is but one, for both: tau_mid = tau_end = 0.
    Source:  GD Alg. 2; for S its variant for the stochastic sampler; an encoder is a decoder with time reversed.
    """
    if sampler == "D":
        return i / N, (i - 0.5) / N, (i - 1) / N
    if sampler == "S":
        return i / N, (i - 1) / N, (i - 2).clamp(min=0) / N
    return (i - 1) / N, (i - 0.5) / N, i / N


def two_steps(v, angle, z, tau, tau_mid, tau_end):
    """The v that takes z from tau to tau_end in one DDIM step, as the teacher's v does in two, by way of tau_mid.

    Args:    v: (z, tau) -> (B,C,H,W).  z: (B,C,H,W) at tau.  Where tau_mid = 0 its second call is made at tau, and counts nothing.
    Returns: (B,C,H,W): (cos(d1 + d2) z - z_end) / sin(d1 + d2), d1 and d2 the angles of the two steps, multiplied out: nothing cancels.
    Source:  GD Alg. 2, PD Alg. 2. With sigma_end = 0 it is the teacher's second prediction of x; with d2 = 0 its first v, exactly.
    """
    d1, d2 = angle(tau) - angle(tau_mid), angle(tau_mid) - angle(tau_end)
    v1 = v(z, tau)
    z_mid = on(d1.cos(), z) * z - on(d1.sin(), z) * v1
    v2 = v(z_mid, torch.where(tau_mid > 0, tau_mid, tau))
    a, b, c = (f / (d1 + d2).sin() for f in (d1.sin() * d2.cos(), d2.sin(), d1.sin() * d2.sin()))
    return on(a, z) * v1 + on(b, z) * v2 - on(c, z) * z


WEIGHTS = {"snr+1": torch.ones_like, "trunc": lambda phi: torch.maximum(phi.cos() ** 2, phi.sin() ** 2)}  # factors on the v error:
# max(SNR, 1) |x - x'|^2 = max(alpha^2, sigma^2) |v - v'|^2. SNR alone would be 0 at tau = 1, where a one-step student lives (PD).


def loss_fn(student, target, angle, x0, noise, tau, weight):
    """The distillation loss of each image, of either stage.

    Args:    student: (z, tau) -> v, of theta.  target: (z, tau) -> the v to match: in stage 1 the guided teacher's, in stage 2
             `two_steps` of the student before.  angle: tau -> phi.  x0, noise: (B,C,H,W).  tau: (B,) float64.  weight: phi -> factors (B,).
    Returns: (B,). Gradient flows through the student alone.
    Source:  GD Alg. 1 and 2.
    """
    phi = angle(tau)
    z = on(phi.cos(), x0) * x0 + on(phi.sin(), x0) * noise
    with torch.no_grad():
        v_target = target(z, tau)
    return on(weight(phi), x0).flatten() * common.l2(student(z, tau), v_target)


def plan(settings):
    """The rounds: (N, optimizer steps) each, stage 1 first with N = 0. The first student has half its teacher's steps, an S one as many."""
    rounds = [(0, settings["stage1_steps"])] if settings["stage1_steps"] else []
    N, last = settings["start_N"] // (1 if settings["sampler"] == "S" else 2), LAST_N[settings["w_max"] > 0]
    while N >= settings["end_N"]:
        rounds.append((N, settings["last_steps" if N <= last else "round_steps"]))
        N //= 2
    if settings["sampler"] == "S" and settings["end_N"] == 1:
        rounds[-1] = 1, 1  # its only jump is one that its teacher, with whose weights it begins, makes already: the loss is 0
    return rounds


# ------------------------------------------------------------------------------------------------------------
# Sampling
# ------------------------------------------------------------------------------------------------------------

def renoise(angle, z, tau, tau_up, noise):
    """z at tau -> z at tau_up > tau, by adding noise: as if x had been noised to tau_up at once."""
    phi, up = angle(tau), angle(tau_up)
    return on(up.cos() / phi.cos(), z) * z + on(((up - phi).sin() * (up + phi).sin()).sqrt() / phi.cos(), z) * noise


def sample(v, angle, N, sampler, z, noise=torch.randn_like, start=None, paste=None):
    """Run the N steps, or the last `start` of them, from z: (B,C,H,W) at tau = 1, or start / N, down to the image; for an encoder up.

    Args:    v: (z, tau) -> v.  sampler: D, S or encoder.  noise: x -> unit noise shaped like x, called N - 1 times by S.
             paste: (z, tau) -> z, called after each step, or None.
    Source:  DDIM; GD's stochastic sampler: jump to k = i - 2, add noise up to i - 1; the last step, from 1, is plain.
    """
    for i in range(N if start is None else start, 0, -1):
        at = lambda i: z.new_full((len(z),), i / N, dtype=torch.float64, device="cpu")  # noqa: B023,E731
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


@torch.no_grad()
def draw(v, angle, N, sampler, w, y, noise, shape, device, decode=lambda z: z.clamp(-1, 1)):
    """Draw images (B,C,H,W) in N calls of v: (z, tau, y, w)."""
    z = noise(torch.zeros(shape, device=device))
    w = None if w is None else z.new_full((len(z),), w)
    return decode(sample(lambda z, tau: v(z, tau, y, w), angle, N, sampler, z, noise))


def open_student(path, run, encoder=False):
    """A checkpoint to sample with: v(z, tau, y, w), the angle, its N (0: any), its sampler (None: any), the range of w, and the network."""
    net, trained = common.load_network(path, ("guided_distill", "cd"))
    if trained["script"] != "guided_distill":
        if trained["args"].get("stage", "teacher") != "teacher":
            raise UserError(f"{path} holds a consistency model: cd.py samples with it")
        if run.main and trained["script"] is None:  # a plain state dict does not say
            print(f"{path} is taken for a teacher")
        found = 0, None, 0.0, math.inf if net.null_y is not None else 0.0
    else:
        args = trained["args"]
        found = trained["N"], args["sampler"] if trained["N"] else None, args["w_min"], args["w_max"]
    if (found[1] == "encoder") != encoder:
        raise UserError(f"{path} " + ("holds no encoder: --sampler encoder trains one" if encoder else
                                      "holds an encoder, which goes from image to noise: name it as --encoder, with --edit style"))
    net = common.place(net, run)
    angle = functools.partial(edm_angle, bottom=BOTTOM) if encoder else edm_angle
    if trained["script"] == "guided_distill":
        return net_v(net, angle), angle, *found, net
    D = edm_v(common.net_denoiser(net), angle)
    return lambda z, tau, y, w: common.guide(D, y, w if w.any() else None)(z, tau), angle, *found, net


# ------------------------------------------------------------------------------------------------------------
# Latent diffusion models, read by the package diffusers
# ------------------------------------------------------------------------------------------------------------

class Latents:
    """Encoded images (n,C,h,w) as the UNet sees them, and what they are conditioned on: embeddings (n,L,D) or labels (n,). An .npz."""
    def __init__(self, path):
        with common.explain(f"--dataset {path} holds no latents"):
            with np.load(path) as file:
                self.text = "embeddings" in file
            key = "embeddings" if self.text else "labels"
            self.latents, self.conditions = (common.map_array(Path(path), name) for name in ("latents", key))
            self.null = torch.from_numpy(common.map_array(Path(path), "null").astype(np.float32)) if self.text else None  # (L,D)
            if len(self.latents) != len(self.conditions):
                raise UserError(f"--dataset {path}: {len(self.latents)} latents, {len(self.conditions)} {key}")

    def __len__(self):
        return len(self.latents)

    def __getitems__(self, indices):
        latents, conditions = (torch.from_numpy(np.array(part[indices])) for part in (self.latents, self.conditions))
        return latents.float(), conditions.float() if self.text else conditions.long()


class LatentModel:
    """A UNet2DConditionModel, class- or text-conditional, predicting noise, v or x, in the folder of a pipeline."""
    def __init__(self, path, run):
        try:
            import diffusers
            self.library, _ = diffusers, (diffusers.UNet2DConditionModel, diffusers.AutoencoderKL)  # naming them imports them
        except (ImportError, RuntimeError) as error:
            raise UserError(f"--teacher diffusers:PATH needs the package diffusers: {common.first_line(error)}") from error
        self.path, self.run = Path(path), run
        if not (self.path / "unet").is_dir():  # what is not there, diffusers would look for on its hub
            raise UserError(f"--teacher diffusers:{path}: there is no folder {self.path / 'unet'}")
        with common.explain(f"--teacher diffusers:{path} cannot be read"):
            unet = diffusers.UNet2DConditionModel.from_pretrained(path, subfolder="unet")
            self.teacher = unet.requires_grad_(False).eval().to(run.device)
            scheduler = json.loads((self.path / "scheduler" / "scheduler_config.json").read_text())
            digest = hashlib.sha256(json.dumps(scheduler).encode())
            for part in sorted((self.path / "unet").iterdir()):
                digest.update(part.read_bytes())
            self.digest = digest.hexdigest()[:12]
        # What a student of N steps is sampled with: from the top, to alpha = 1, unclipped.
        self.scheduler = diffusers.DDIMScheduler.from_config(scheduler, timestep_spacing="trailing", clip_sample=False,
                                                             thresholding=False, set_alpha_to_one=True)
        self.prediction, self.steps = self.scheduler.config.prediction_type, self.scheduler.config.num_train_timesteps
        alpha = self.scheduler.alphas_cumprod.double().sqrt()
        if self.prediction == "epsilon" and alpha[-1] < 1e-3:
            raise UserError(f"--teacher diffusers:{path}: predicting noise, it says nothing about x at zero SNR; fine-tune it to v first")
        self.angles = torch.cat([torch.zeros(1, dtype=torch.float64), alpha.acos()])
        config = self.teacher.config
        further = [key for key in ("addition_embed_type", "encoder_hid_dim_type", "class_embed_type", "time_cond_proj_dim") if config.get(key)]
        if further or config.in_channels != config.out_channels or not isinstance(config.sample_size, int):
            raise UserError(f"--teacher diffusers:{path}: this UNet takes more than square latents, a time, and a text or a label"
                            + f" ({', '.join(further)})" * bool(further))
        self.shape, self.classes = (config.in_channels, config.sample_size, config.sample_size), config.num_class_embeds

    def check(self, data, guided):
        """Raises UserError for a data set that does not fit the network."""
        width, (n, *one) = self.teacher.config.cross_attention_dim, data.conditions.shape
        if data.latents.shape[1:] != self.shape or data.text == bool(self.classes):
            raise UserError(f"--dataset: this teacher takes latents {self.shape} and " + ("labels" if self.classes else "embeddings"))
        if data.text and not one == list(data.null.shape) == [*one[:1], width]:
            raise UserError(f"--dataset: embeddings {n, *one} and null {tuple(data.null.shape)}, where this teacher takes (n, L, {width}) and "
                            f"(L, {width})")
        if not data.text:
            self.check_labels("--dataset", data.conditions, guided)

    def check_labels(self, flag, labels, guided):
        """Raises UserError for labels that the network does not know; with guidance its last one is the null class."""
        if np.ndim(labels) != 1 or not np.isin(labels, range(self.classes - guided)).all():
            raise UserError(f"{flag}: the labels of this network are 0 to {self.classes - guided - 1}" + ", and then the null class" * guided)

    def index(self, tau):
        """tau in [0, 1] -> 0 .. steps; the network's timestep is one less, and at 0 there is no noise. Grids of N nest for any N."""
        return (tau * self.steps).round().long()

    def angle(self, tau):
        return self.angles[self.index(tau)]

    def student(self, guided):
        """The teacher's copy; with room for w, added to the time's sinusoid before the MLP, and zero at first."""
        config = dict(self.teacher.config) | (dict(time_cond_proj_dim=256) if guided else {})
        net = self.library.UNet2DConditionModel.from_config(config)
        net.load_state_dict(self.teacher.state_dict(), strict=False)
        if guided:
            torch.nn.init.zeros_(net.time_embedding.cond_proj.weight)
        return net.to(self.run.device).eval()  # no dropout

    def v(self, net, null=None):
        """v(z, tau, c, w) of a UNet: c (B,L,D) or labels (B,), None for none; w (B,) or None, told as diffusers' pipelines tell it."""
        def v(z, tau, c, w=None):
            phi = self.angle(tau)
            alpha, sigma = on(phi.cos(), z), on(phi.sin(), z)
            if c is None:
                c = (torch.tensor(self.classes - 1) if self.classes else null).to(z.device)
                c = c.expand(len(z), *c.shape)
            text = dict(encoder_hidden_states=None, class_labels=c) if self.classes else dict(encoder_hidden_states=c)
            w = None if w is None else w_features(w, net.config.time_cond_proj_dim)
            with torch.autocast(z.device.type, self.run.dtype, enabled=self.run.dtype != torch.float32):
                out = net(z, (self.index(tau) - 1).to(z.device), timestep_cond=w, **text).sample
            out = out.float()
            if self.prediction == "epsilon":
                return (out - sigma * z) / alpha  # alpha >= 0.068 for Stable Diffusion
            return out if self.prediction == "v_prediction" else (alpha * z - out) / sigma
        return v

    @functools.cached_property
    def vae(self):
        if not (self.path / "vae").is_dir():
            raise UserError(f"there is no folder {self.path / 'vae'} to decode latents with; training needs none with --sample-every 0")
        with common.explain(f"{self.path / 'vae'} cannot be read"):
            return self.library.AutoencoderKL.from_pretrained(self.path, subfolder="vae").requires_grad_(False).eval().to(self.run.device)

    @functools.cached_property
    @torch.no_grad()
    def image_shape(self):
        with common.explain(f"{self.path / 'vae'} does not decode latents {self.shape}"):
            return self.decode(torch.zeros(1, *self.shape, device=self.run.device))[0].shape

    def decode(self, z):
        return self.vae.decode(z / self.vae.config.scaling_factor).sample.clamp(-1, 1)

    def draw(self, v, conditions, N, sampler, w):
        """A function as `common.draw_many` takes it: image i is of condition i, from the first again after the last."""
        def part(y, noise, shape, indices):
            c = conditions[indices.cpu() % len(conditions)].to(self.run.device)
            return draw(v, self.angle, N, sampler, w, c, noise, (len(indices), *self.shape), self.run.device, self.decode)
        return part

    def export(self, net, path):
        """A folder that diffusers' pipelines load: that of the teacher, with this UNet and the scheduler of its steps."""
        with common.explain(f"cannot write {path}"):
            for part in self.path.iterdir():  # VAE, tokenizer, text encoder; not a checkpoint of the whole that may lie beside them
                if part.is_dir() and part.name not in ("unet", "scheduler"):
                    shutil.copytree(part, path / part.name, dirs_exist_ok=True)
            net.save_pretrained(path / "unet")
            self.scheduler.save_pretrained(path / "scheduler")
            if (self.path / "model_index.json").exists():
                index = json.loads((self.path / "model_index.json").read_text()) | dict(scheduler=["diffusers", "DDIMScheduler"])
                (path / "model_index.json").write_text(json.dumps(index, indent=2))


def w_features(w, dim):
    """(B,) -> (B, dim), diffusers' embedding of guidance_scale - 1 = w. In float32: half of it would round 1000 w."""
    half = dim // 2
    angles = 1000 * w[:, None] * torch.exp(-math.log(10000) / (half - 1) * torch.arange(half, device=w.device))
    return torch.cat([angles.sin(), angles.cos()], 1)


def sample_latents(args, run, state):
    """`--ckpt` of a latent student: draw, conditioned on the first of the data set or on --labels, and decode."""
    for key in ("edit", "eval"):
        if getattr(args, key):
            raise UserError(f"--{key} does not apply to latent models: diffusers' pipelines edit with them, torch-fidelity's own command "
                            "measures a folder of samples")
    given = state["args"]
    guided, own = given["w_max"] > 0, given["sampler"] if state["N"] else None
    N, sampler, w = check_student(args, state["N"], own, given["w_min"], given["w_max"])
    model, dataset = LatentModel(given["teacher"].removeprefix("diffusers:"), run), Latents(given["dataset"])
    if model.digest != given["teacher_digest"]:
        raise UserError(f"{model.path} is not the teacher any more that {args.ckpt} was made of: its UNet or scheduler has changed")
    if N > model.steps:
        raise UserError(f"--N {N}: the teacher knows {model.steps} times")
    net = model.student(guided).requires_grad_(False)
    net.load_state_dict(state["ema"])
    n, path = args.sample or 64, common.make_save_path(args.save)
    if args.labels and dataset.text:
        raise UserError("--labels: this network is told texts, those of its data set in turn")
    if args.labels:
        model.check_labels("--labels", args.labels, guided)
    conditions = torch.tensor(args.labels) if args.labels else dataset.__getitems__(np.arange(min(len(dataset), n)))[1]
    draw_some = model.draw(model.v(net), conditions, N, sampler, w if guided else None)
    images = common.draw_many(run, draw_some, n, None, model.image_shape, args.seed, min(args.micro_batch, 8))
    if run.main:
        common.save_samples(path, images, None, math.isqrt(n - 1) + 1)
        print(f"{n} samples, {N} network call(s) each, EMA weights of {args.ckpt}: {args.save}")


# ------------------------------------------------------------------------------------------------------------
# Sampling and editing with a checkpoint
# ------------------------------------------------------------------------------------------------------------

def check_student(args, N, sampler, w_min, w_max):
    """N, sampler and w to draw with. Raises UserError for what --ckpt was not trained for. N: its steps, 0 for any; sampler: None for any."""
    if args.sigmas or args.stage:
        raise UserError(f"--{'sigmas' if args.sigmas else 'stage'} does not apply with --ckpt: a student draws on its own grid")
    if N and args.N not in (None, N):
        raise UserError(f"--N {args.N}: {args.ckpt} was trained for {N} step(s); each round's student is in a file of its own")
    if sampler and args.sampler not in (None, sampler):
        raise UserError(f"--sampler {args.sampler}: {args.ckpt} was trained for sampler {sampler}")
    if args.sampler == "encoder":
        raise UserError("--sampler encoder applies to training only")
    w = w_min if args.w is None else args.w
    if not w_min <= w <= w_max:
        raise UserError(f"--w {w:g}: {args.ckpt} was trained for " + (f"weights from {w_min:g} to {w_max:g}" if w_max else "no guidance"))
    return N or args.N or 64, sampler or args.sampler or "D", w


def use_checkpoint(args, run):
    """`--ckpt`: sample or edit. Raises UserError for what the student was not trained for."""
    for key in ("image", "strength", "mask", "encoder", "from_labels"):
        if getattr(args, key) is not None and not args.edit:
            raise UserError(f"--{key.replace('_', '-')} does not apply without --edit")
    state = common.load_checkpoint(args.ckpt)
    if str(state.get("args", {}).get("teacher")).startswith("diffusers:"):
        return sample_latents(args, run, state)
    v, angle, *own, net = open_student(args.ckpt, run)  # own: N, sampler, w_min, w_max
    N, sampler, w = check_student(args, *own)
    if args.edit:
        return edit_images(args, run, net, v, angle, N, sampler, w)
    args.sample, args.w, args.sampler = args.sample or 64, w, sampler  # --eval says what they were
    calls = N * (2 if own[-1] == math.inf and w > 0 else 1)  # a guided teacher's
    common.sample_checkpoint(args, run, net, lambda y, noise, shape, _: draw(v, angle, N, sampler, w, y, noise, shape, run.device), calls,
                             state)


def edit_images(args, run, net, v, angle, N, sampler, w):
    """`--edit`: change images, and write a picture of it. A row: an image, then the results.

    img2img starts at an intermediate step from the noised image (SDEdit); inpaint pastes the known part, noised to the level, after
    each step; style encodes with one class and decodes with another (DDIB, GD).
    """
    for key, task in (("strength", "img2img"), ("mask", "inpaint"), ("encoder", "style"), ("from_labels", "style")):
        if getattr(args, key) is not None and args.edit != task:
            raise UserError(f"--{key.replace('_', '-')} applies to --edit {task} only")
    if args.edit == "style" and sampler == "S":
        raise UserError("--edit style decodes without noise: name a student of --sampler D")
    if not args.image or args.edit == "style" and not args.encoder:
        raise UserError(f"--edit {args.edit} needs --image" + " and --encoder" * (args.edit == "style"))
    for flag, given in (("--labels", args.labels), ("--from-labels", args.from_labels)):
        if net.classes and (flag == "--labels" or args.edit == "style") and len(given or ()) not in (1, len(args.image)):
            raise UserError(f"this network draws classes: name with {flag} one, or one for each --image")
    size, each, path = net.image_size, args.sample or (1 if args.edit == "style" else 4), common.make_save_path(args.save)
    x0 = torch.stack([common.read_image(name, size)[0] for name in args.image]).to(run.device)
    start = math.floor((0.5 if args.strength is None else args.strength) * N + 0.5) if args.edit == "img2img" else N
    hole = common.read_mask(args.mask, size).to(run.device) if args.edit == "inpaint" else None
    if args.edit == "style":
        v_up, angle_up, N_up, *_, encoder = open_student(args.encoder, run, encoder=True)
        if (encoder.image_size, encoder.classes) != (size, net.classes):
            raise UserError(f"--encoder {args.encoder} and {args.ckpt} differ in image size or classes")
        y_up = common.labels_to_draw(args, net, len(x0), run.device, "from_labels")
        with torch.no_grad():
            z_top = sample(lambda z, tau: v_up(z, tau, y_up, None), angle_up, N_up, "encoder", x0)

    @torch.no_grad()
    def edit(y, noise, shape, indices):
        known, w_all, first = x0[indices // each], x0.new_full((len(indices),), w), noise(torch.zeros(shape, device=run.device))

        def noised(tau):
            return on(angle(tau).cos(), known) * known + on(angle(tau).sin(), known) * first
        paste = None if hole is None else lambda z, tau: hole * z + (1 - hole) * noised(tau)
        at_start = torch.full((len(known),), start / N, dtype=torch.float64)
        z = z_top[indices // each] if args.edit == "style" else noised(at_start) if args.edit == "img2img" else first
        return sample(lambda z, tau: v(z, tau, y, w_all), angle, N, sampler, z, noise, start, paste).clamp(-1, 1)

    y = common.labels_to_draw(args, net, len(x0), run.device)
    y = None if y is None else y.repeat_interleave(each)
    results = common.draw_many(run, edit, len(x0) * each, y, (3, size, size), args.seed, args.micro_batch)
    if run.main:
        rows = torch.cat([common.to_uint8(x0).cpu()[:, None], torch.from_numpy(results).unflatten(0, (len(x0), each))], 1)
        common.save_samples(path, rows.flatten(0, 1).numpy() if path.suffix == ".png" else results, y, columns=each + 1)
        print(f"{args.edit}: {len(x0)} row(s), {each} result(s) each, {start} of {N} steps, w = {w:g}, EMA weights of {args.ckpt}: "
              f"{args.save}")


SAMPLING = dict.fromkeys("sample sigmas stage sampler N w edit image strength mask encoder from_labels".split())

if __name__ == "__main__":
    args = common.parse_flags(flags(), recipe, SAMPLING, both=("stage", "sampler", "N"))
    run = common.setup(args)

    # ---- sampling, editing: python guided_distill.py --ckpt FILE
    if hasattr(args, "ckpt"):
        use_checkpoint(args, run)
        common.finish(run)

    # ---- teacher: without --teacher, one is trained first
    stop = common.StopSignal()
    if args.stage == "teacher":
        finished, _ = common.train_teacher(args, run, stop)
        common.finish(run, None if finished else stop)
    if args.teacher is None:
        common.train_first_teacher(args, run, stop, "guided_distill", 0.1 if args.w_max else 0.0)

    # ---- teacher, data, networks
    angle, classes = functools.partial(edm_angle, bottom=BOTTOM) if args.sampler == "encoder" else edm_angle, 0
    latent = args.teacher.startswith("diffusers:")
    if latent:
        with common.main_process_first(run):
            model, dataset = LatentModel(args.teacher.removeprefix("diffusers:"), run), Latents(args.dataset)
        args.teacher_digest, teacher, angle, model_args = model.digest, model.teacher, model.angle, dict(extra=args.w_max > 0)
        args.teacher, args.dataset = f"diffusers:{model.path.resolve()}", str(Path(args.dataset).resolve())  # a student is sampled with both
        model.check(dataset, args.w_max > 0)
        if args.start_N > model.steps:
            raise UserError(f"--start-N {args.start_N}: the teacher knows {model.steps} times")
        shape = model.image_shape if args.sample_every else None  # now, not at the first picture: it needs a VAE
        net, v_teacher = model.student(args.w_max > 0), model.v(teacher, dataset.null)
        fetch = lambda batch: tuple(part.to(run.device, non_blocking=True) for part in batch)  # noqa: E731
    else:
        teacher, settings = common.open_teacher(args, run)
        size = settings["image_size"]
        shape = (3, size, size)
        with common.main_process_first(run):
            dataset = common.load_dataset(args.dataset, args.data_dir, size)
        D, classes = common.teacher_denoiser(args, run, teacher, dataset)
        if args.w_max and not classes:
            raise UserError("--w-max needs labels, and there are none: --w-max 0 distils without guidance")
        if args.w_max and teacher is not None and teacher.null_y is None:
            raise UserError(f"--w-max: {args.teacher} was trained without --label-dropout, so it has nothing to guide with")
        model_args = settings | dict(classes=classes, dropout=args.dropout, extra=args.w_max > 0)
        common.seed_everything(common.INIT, args.seed)
        net = common.make_net(model_args)
        if teacher is not None:  # all but the embedding of w, which adds nothing at first
            net.load_state_dict(net.state_dict() | teacher.state_dict())
        net, v_teacher = common.place(net, run), edm_v(D, angle)
        fetch = lambda batch: common.to_device(batch, run.device, args.flip)  # noqa: E731
    before = copy.deepcopy(net).requires_grad_(False).eval()  # the student of the round before: stage 2's teacher
    ema = copy.deepcopy(before)
    optimizer = torch.optim.Adam(net.parameters(), args.lr, foreach=True)
    buffer, tail = common.flatten_gradients(net, tail=2 + 2 * common.BINS)  # what the ranks sum each step
    loss_sum, stop_sum, bins = tail[0], tail[1], tail[2:].view(2, -1)  # bins: of the losses, of the images

    out_dir, step, skipped, bad_in_a_row, stopping = Path(args.out_dir), 0, 0, 0, False
    rounds = plan(vars(args))
    starts = [0, *itertools.accumulate(steps for _, steps in rounds)]
    if state := common.resume_state(args, run, "guided_distill", model_args):
        step, skipped = state["step"], state["skipped"]
        for module, key in ((net, "net"), (before, "before"), (ema, "ema")):
            module.load_state_dict(state[key])
        common.load_optimizer(optimizer, state["optimizer"])
    elif args.overwrite and run.main and not run.restarted:
        for old in [out_dir / "stage1.pt", *out_dir.glob("N????.pt")]:
            old.unlink(missing_ok=True)
            shutil.rmtree(old.with_suffix(""), ignore_errors=True)  # what was exported to diffusers
    del state
    if run.compile:
        for module in {teacher, before, net} - {None}:
            module.compile()  # in place: names of the weights stay as they are
    log = common.start_run(args, run, net, step)
    v_net, v_before, v_ema = (model.v(module) if latent else net_v(module, angle) for module in (net, before, ema))

    def save(*more):
        """Write last.pt, which resumes the run, and ema.pt, which other tools can load; and at the end of a round its student."""
        if run.main:
            student = dict(script="guided_distill", step=step, images=step * args.batch_size, N=N, args=vars(args), model_args=model_args,
                           ema=ema.state_dict(), torch_version=str(torch.__version__))
            for name in more:
                common.save_checkpoint(out_dir / f"{name}.pt", student)
                if latent:
                    model.export(ema, out_dir / name)
            common.save_checkpoint(out_dir / "last.pt", student | dict(
                skipped=skipped, net=net.state_dict(), before=before.state_dict(), optimizer=optimizer.state_dict()))
            common.save_checkpoint(out_dir / "ema.pt", ema.state_dict())

    def sample_grid():
        """Write samples/STEP_N.png from the same noise every time: guided by the least weight, a quarter of the way up, and the largest."""
        y, columns = (None, 1) if latent else (common.grid_labels(classes, run.device), common.grid_columns(classes))
        how, blocks = (N or 16, args.sampler), []
        for w in [args.w_min + share * (args.w_max - args.w_min) for share in (0, 0.25, 1)] if args.w_max else [None]:
            block = (model.draw(v_ema, dataset.__getitems__(np.arange(min(len(dataset), 8)))[1], *how, w) if latent else
                     lambda y, noise, shape, _: draw(v_ema, angle, *how, w, y, noise, shape, run.device))  # noqa: B023
            blocks.append(common.draw_many(run, block, 8 * columns, y, shape, args.seed, args.micro_batch))
        if run.main:
            log.grid(step, blocks, columns, f"_N{N:04d}" if N else "_stage1")

    # ---- training
    micro_batches = args.batch_size // args.micro_batch
    indices = common.index_batches(len(dataset), args.seed, step, args.total_steps, args.batch_size, args.micro_batch,
                                   run.rank, run.world)
    loader = common.make_loader(dataset, indices, args.workers, run.device)
    weight = WEIGHTS[args.weighting]
    bar, since = common.progress(args, run, step), (time.perf_counter(), step)
    while step < args.total_steps and not stopping:
        r = max(r for r, start in enumerate(starts) if start <= step)  # the round
        N, steps = rounds[r]
        if step == starts[r]:  # it starts from the raw weights of the last one, whose student is its teacher
            before.load_state_dict(net.state_dict())
            ema.load_state_dict(net.state_dict())
            optimizer = torch.optim.Adam(net.parameters(), args.lr, foreach=True)
        # ------------------------------------------------------------------------------------ one training step
        lr = args.lr * (1 - (step - starts[r]) / steps)  # PD: to 0 within each round
        if args.sampler == "S" and N == 1:
            lr = 0.0  # it is its teacher already, and Adam would make a step of the rounding of a gradient that is 0
        optimizer.param_groups[0]["lr"] = lr
        buffer.zero_()
        for m in range(run.rank, micro_batches, run.world):
            common.seed_everything(common.STEP, args.seed, step, m)
            x0, y = fetch(next(loader))
            y = y if classes or latent else None
            w = args.w_min + (args.w_max - args.w_min) * torch.rand(len(x0), device=run.device) if args.w_max else None
            if N == 0:  # stage 1
                tau, target = torch.rand(len(x0), dtype=torch.float64), common.guide(v_teacher, y, w)
                tau = (tau * model.steps).ceil().clamp(min=1) / model.steps if latent else tau  # times that its teacher knows
            else:
                tau, tau_mid, tau_end = times_of(torch.randint(1, N + 1, (len(x0),)).double(), N, args.sampler)
                target = lambda z, tau: two_steps(lambda z, tau: v_before(z, tau, y, w), angle, z, tau, tau_mid, tau_end)  # noqa: B023,E731
            loss = loss_fn(lambda z, tau: v_net(z, tau, y, w), target, angle, x0, torch.randn_like(x0), tau, weight)
            (loss.sum() / args.batch_size).backward()
            loss_sum += loss.detach().sum() / args.batch_size
            common.tally(bins, on(angle(tau).tan(), x0).flatten(), loss.detach())
        stop_sum.fill_(stop.number > 0)
        if run.world > 1:
            torch.distributed.all_reduce(buffer)

        loss, stopping = tail[:2].tolist()
        grad_norm = torch.linalg.vector_norm(buffer[:-len(tail)]).item()
        if math.isfinite(loss) and math.isfinite(grad_norm):
            bad_in_a_row = 0
            buffer[:-len(tail)] *= min(1.0, 1.0 / max(grad_norm, 1e-12))  # PD clips the norm at 1
            optimizer.step()
            common.ema_update(ema, net, args.ema_decay)
        else:
            bad_in_a_row, skipped = bad_in_a_row + 1, skipped + 1
        step += 1
        # -----------------------------------------------------------------------------------------------------

        if bad_in_a_row == 10:
            bar.close()
            common.too_many_bad_steps(step, loss, grad_norm, out_dir)
        bar.update()
        last, ended = stopping or step == args.total_steps, step == starts[r + 1]
        if args.log_every and (step % args.log_every == 0 or last) and run.main:
            since = common.report(log, bar, args, step, since, N=N, loss=loss, loss_bins=(bins[0] / bins[1]).tolist(), grad_norm=grad_norm,
                                  lr=lr, skipped=skipped, peak_gb=common.peak_memory_gb(run.device))
        if (args.save_every and step % args.save_every == 0) or last or ended:
            save(*[f"N{N:04d}" if N else "stage1"] * ended)
        if args.sample_every and (step % args.sample_every == 0 or ended):
            sample_grid()
    bar.close()
    common.finish(run, stop if step < args.total_steps else None)
