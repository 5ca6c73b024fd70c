"""Consistency distillation: a diffusion model made into a one-step generator. And the diffusion model.

    python cd.py                                             digits: trains a teacher, then distils it, in minutes
    torchrun --nproc_per_node=8 cd.py --stage teacher --dataset imagenet64 --data-dir /data/imagenet64
    torchrun --nproc_per_node=8 cd.py --teacher edm_imagenet64_ema.pt --dataset imagenet64 --data-dir /data/imagenet64
    python cd.py --teacher ideal --dataset my_images.npz     no teacher network: the images' exact denoiser
    python cd.py --w-max 4 --out-dir out/guided              guided: one step, guidance chosen when sampling

    python cd.py --ckpt out/cd/last.pt --sample 64 --sigmas 80 1.6 --save out.png
    python cd.py --ckpt out/cd/last.pt --eval 50000
    python cd.py --ckpt out/cd/teacher/last.pt --sample 64 --N 18 --churn 10
    python cd.py --ckpt out/cd/last.pt --edit inpaint --image photo.png --mask hole.png --labels 3
    python cd.py --ckpt out/cd/last.pt --search-times 2

`--ckpt` takes what cd.py and ct.py write, and the released consistency models and EDM teachers (the latter with
--stage teacher). The same command again resumes a run, exactly, on any number of processes.

Papers: Song et al. 2023 (CM, arXiv 2303.01469v2): Algorithm 2, its continuous-time limits (App. B), editing (Alg. 4).
Karras et al. 2022 (EDM, arXiv 2206.00364): the teacher. Ho & Salimans 2022 (arXiv 2207.12598): guidance; distilling it
into a consistency model whose input is the guidance weight is not in CM.

Log, one JSON object a line: step; images = seen so far; loss, and loss_bins its mean where t (t_n1) is below 0.1, 1, 10
and above; grad_norm; lr; images_per_s; peak_gb; skipped = steps left out because their loss was not finite.
"""
import argparse
import copy
import functools
import math
import sys
import time
from pathlib import Path

import torch
import torch.distributed

import common
from common import UserError, bcast, consistency

# Recipes: CM Table 3. glyphs and "path" (your own images) are ours, the former tuned on 2 cores; the teachers' are in common.py.
# `sigmas`: levels of the two-step samples, CM's time points or ours.
STUDENTS = {
    "glyphs": dict(batch_size=32, total_steps=3000, lr=1e-3, mu=0.0, dist="huber", times=["uniform"], weighting="inverse",
                   ema_decay=0.997, sigmas=[80.0, 1.6]),
    "path": dict(batch_size=128, total_steps=100_000, lr=2e-4, mu=0.0, dist="huber", times=["uniform"], weighting="inverse",
                 ema_decay=0.9995, sigmas=[80.0, 0.585348]),
    "cifar10": dict(batch_size=512, total_steps=800_000, lr=4e-4, mu=0.0, ema_decay=0.9999, sigmas=[80.0, 0.585348]),
    "imagenet64": dict(batch_size=2048, total_steps=600_000, lr=8e-6, mu=0.95, ema_decay=0.999943, sigmas=[80.0, 1.38237]),
    "bedroom256": dict(batch_size=2048, total_steps=600_000, lr=1e-5, mu=0.95, ema_decay=0.999943, sigmas=[80.0, 4.36556]),
    "cat256": dict(batch_size=2048, total_steps=600_000, lr=1e-5, mu=0.95, ema_decay=0.999943, sigmas=[80.0, 4.36556]),
}
CD = dict(teacher=None, objective="discrete", solver="heun", dist="lpips", times=["uniform"], weighting="one", dropout=0.0, w_max=0.0)
CONTINUOUS = {True: dict(lr=5e-6, dropout=0.3), False: dict(lr=1e-3, dropout=0.3)}  # by stop_gradient: openai's JAX code, CIFAR-10
DISCRETE = {"solver", "N", "mu", "dist", "weighting"}  # what continuous time has no use for
SOLVERS = {"heun": common.heun_step, "euler": common.euler_step}
STUDENT_ONLY = DISCRETE - {"N"} | {"teacher", "teacher_steps", "objective", "stop_gradient", "w_max"}


def recipe(given):
    """The settings of `--stage` for `--dataset`, general ones first. Raises UserError for a flag that does not apply to it."""
    def refuse(keys, why):
        for key in sorted(given.keys() & keys):
            raise UserError(f"--{key.replace('_', '-')} {why}")

    if given.get("stage") == "teacher":
        refuse(STUDENT_ONLY, "does not apply with --stage teacher")
        refuse({"sigmas"}, "does not apply with --stage teacher: a teacher draws on the grid of --N")
        return common.teacher_recipe(given)
    refuse({"label_dropout"}, "applies to --stage teacher only")
    dataset = common.known_dataset(given)
    settings = dict(class_cond=None, stage="distill", teacher_steps=common.TEACHERS[dataset]["total_steps"]) | common.DATASETS[dataset] | CD
    settings |= STUDENTS[dataset]
    if given.get("objective") == "continuous":
        refuse(DISCRETE, "does not apply with --objective continuous")
        settings = {key: value for key, value in settings.items() if key not in DISCRETE} | dict(times=["uniform"], stop_gradient=True)
        settings |= dict(lr=1e-4) if dataset in ("glyphs", "path") else CONTINUOUS[given.get("stop_gradient", True)]
    else:
        refuse({"stop_gradient"}, "applies to --objective continuous only")
    if "teacher" in given:
        if given["teacher"] == "none":
            raise UserError("--teacher none: a student needs a teacher; ct.py and ctm.py train from scratch")
        refuse({"teacher_steps"}, "does not apply with --teacher: that one is trained")
        del settings["teacher_steps"]
        if given["teacher"] != "ideal":
            refuse({"net", "class_cond"}, "does not apply with --teacher FILE: the student is built like its teacher")
            del settings["net"], settings["class_cond"]
    return settings


def flags():
    parser = common.Parser(__doc__)
    group = parser.add_argument_group("algorithm")
    group.add_argument("--stage", choices=("teacher", "distill"), help="train a teacher, or distil one (default; without --teacher "
                       "one is trained first, by its recipe). With --ckpt: what weights of unknown origin are")
    group.add_argument("--teacher", metavar="FILE", help="a teacher written by this script, released EDM weights, or the word ideal: "
                       "the exact denoiser of the training images")
    group.add_argument("--teacher-steps", type=common.positive, metavar="K", help="optimizer steps of the teacher that is trained first")
    group.add_argument("--label-dropout", type=common.number(float, 0, 1), metavar="P", help="teacher: share of labels hidden, "
                       "for guidance (default 0; 0.1 for the teacher of --w-max)")
    group.add_argument("--N", type=common.number(int, 2), metavar="N", help="noise levels of the grid: of the distillation, and of a "
                       "teacher's Heun samples, in 2 N - 1 network calls (CM, EDM 18 or 40)")
    group.add_argument("--objective", choices=("discrete", "continuous"), help="CM Algorithm 2 (default), or its limit N -> infinity")
    group.add_argument("--stop-gradient", action=argparse.BooleanOptionalAction, help="continuous: the pseudo-objective (default), or "
                       "also differentiate df/dt")
    group.add_argument("--solver", choices=SOLVERS, help="of the ODE step that the teacher takes (CM heun)")
    group.add_argument("--mu", type=common.number(float, 0, 1), metavar="MU", help="decay of the target network (CM 0 to 0.95); 0: the "
                       "target is the net itself")
    group.add_argument("--dist", choices=("l1", "l2", "huber", "lpips"), help="distance between the two outputs")
    group.add_argument("--times", nargs="+", type=common.law_of_times, metavar="MEAN STD", help="ln t ~ Normal(MEAN, STD^2) (teacher: "
                       "EDM -1.2 1.2), or the one word uniform: over the grid (distillation: CM)")
    group.add_argument("--weighting", choices=common.WEIGHTS, help="of an interval: 1 (CM), or 1 / (t_n1 - t_n)")
    group.add_argument("--w-max", type=common.number(float, 0), metavar="W", help="distil guidance too, weights w in [0, W]: w = 0 is "
                       "the conditional model, (1 + w) cond - w uncond (default 0: no guidance)")
    common.add_shared_flags(parser)
    group = parser.add_argument_group("sampling, further flags")
    group.add_argument("--w", type=common.number(float, 0), metavar="W", help="guidance weight, of a teacher trained with label dropout or a "
                       "student trained with --w-max (default 0)")
    group.add_argument("--churn", type=common.number(float, 0), metavar="S", help="of a teacher: EDM's S_churn (default 0: deterministic; "
                       "EDM ImageNet-64 40)")
    group.add_argument("--search-times", type=common.number(int, 2), metavar="M", help="find the noise levels of M steps among --N "
                       "(default 40) by the quality of --sample (default 2000) images each")
    common.add_edit_flags(parser)
    return parser


# ------------------------------------------------------------------------------------------------------------
# The method
# ------------------------------------------------------------------------------------------------------------

def c_guidance(w):
    """What the student is told of w: a scale on which its embedding tells weights apart that differ by a tenth."""
    return None if w is None else 25 * w


def loss_fn(net, target, D, x0, noise, t_n, t_n1, y, w, solver, dist, weight):
    """The consistency distillation loss of each image.

    Args:    net: f_theta.  target: f_theta^-, or the net itself.  D: (x, t, y or None) -> the teacher's denoised x.  x0, noise:
             (B,C,H,W).  t_n < t_n1: (B,) neighbours on the grid.  y: (B,) labels or None.  w: (B,) guidance weights or None.
             solver: heun_step or euler_step.  dist: (x, y) -> (B,).  weight: (t_n, t_n1) -> (B,) or a number.
    Returns: (B,). Gradient flows through net(x_tn1) alone. Both networks drop out the same units.
    Source:  CM Alg. 2, lines 4 to 6.
    """
    x_tn1 = x0 + bcast(t_n1, x0) * noise
    with torch.no_grad(), common.replay_random(x0.device):
        x_tn = solver(common.guide(D, y, w), x_tn1, t_n1, t_n)
        f_target = consistency(target, x_tn, t_n, y, c_guidance(w))
    f_net = consistency(net, x_tn1, t_n1, y, c_guidance(w))
    return weight(t_n, t_n1) * dist(f_net, f_target)


def continuous_loss(net, D, x0, noise, t, y, w, stop_gradient):
    """The limit of `loss_fn` for N -> infinity, l2. Arguments as there; t: (B,). Returns (B,). Source: CM App. B, Theorems 3 and 5."""
    x_t = x0 + bcast(t, x0) * noise
    with torch.no_grad():
        dx_dt = (x_t - common.guide(D, y, w)(x_t, t)) / bcast(t, x_t)  # the probability-flow ODE
    return common.continuous_loss(net, x_t, t, dx_dt, y, c_guidance(w), stop_gradient)


# ------------------------------------------------------------------------------------------------------------
# Sampling and the search for time points
# ------------------------------------------------------------------------------------------------------------

def clipped(net, y, w):
    """The consistency function f(x, t) to sample with. Each output is clipped to [-1, 1], as for the papers' samples."""
    return lambda x, t: consistency(net, x, t, y, c_guidance(torch.full_like(t, w)) if net.extra else None).clamp(-1, 1)


@torch.no_grad()
def sample(net, sigmas, y, noise, shape, w=0.0):
    """Draw images (B,C,H,W) with a consistency model, in len(sigmas) network calls."""
    x_T = sigmas[0] * noise(torch.zeros(shape, device=next(net.parameters()).device))
    return common.multistep_sample(clipped(net, y, w), x_T, sigmas, noise)


def ternary_search(score, low, high):
    """The integer in low .. high at which `score` is least, if it falls and then rises. Source: CM Sec. 3, openai's code."""
    score = functools.cache(score)
    while high - low >= 3:
        third = (high - low) / 3
        m1, m2 = int(low + third), int(high - third)
        low, high = (low, m2) if score(m1) < score(m2) else (m1, high)
    return min(range(low, high + 1), key=score)


def search_times(score, M, N):
    """The noise levels of M steps, found one after the other: the first is t_max, each further one the best on the grid of N.

    Args:    score: noise levels, largest first -> a number, the lower the better.
    Returns: a list of M noise levels, largest first.
    Source:  CM Sec. 3 ("time points"), with the ends of the range that openai's code mistakes.
    """
    grid = common.karras_times(N).flip(0).tolist()
    chosen = [0]
    while len(chosen) < M:
        chosen.append(ternary_search(lambda i: score([grid[j] for j in (*chosen, i)]), chosen[-1], N - 1))
    return [grid[j] for j in chosen]


def search_checkpoint(args, run, net, trained):
    """`--search-times M`, by the Frechet distance in the features of the benchmark's classifier."""
    sys.path.insert(0, str(Path(__file__).parent / "tests"))
    try:
        import bench
    except ModuleNotFoundError as error:
        raise UserError(f"--search-times measures with tests/bench.py, which should be beside this script: {error}") from error
    name, data_dir = common.dataset_of(args, trained)
    with common.main_process_first(run):
        distance = bench.feature_distance(common.load_dataset(name, data_dir, net.image_size), run.device)
    n = args.sample or 2000
    y = common.labels_to_draw(args, net, n, run.device)

    def score(sigmas):
        images = common.draw_many(run, lambda y, noise, shape, _: sample(net, sigmas, y, noise, shape, args.w), n, y,
                                  (3, net.image_size, net.image_size), args.seed, args.micro_batch)
        found = distance(images)
        if run.world > 1:  # the ranks must take the same turns
            torch.distributed.broadcast(shared := torch.tensor(found, dtype=torch.float64, device=run.device), 0)
            found = shared.item()
        if run.main:
            print(f"--sigmas {' '.join(f'{t:.6g}' for t in sigmas)}: Frechet distance {found:.4f}", flush=True)
        return found

    sigmas = search_times(score, args.search_times, args.N or 40)
    if run.main:
        print(f"found: --sigmas {' '.join(f'{t:.6g}' for t in sigmas)}")


def use_checkpoint(args, run):
    """`--ckpt`: sample, edit or search, whichever the flags ask for. Raises UserError for flags that do not apply to the weights."""
    net, trained = common.load_network(args.ckpt, ("cd", "ct"))
    teacher = (trained["args"].get("stage") or args.stage) == "teacher"
    top = trained["args"].get("w_max", 0.0) if not teacher else math.inf if net.null_y is not None else 0.0

    def refuse(keys, why):
        for key in keys:
            if getattr(args, key):
                raise UserError(f"--{key.replace('_', '-')} does not apply {why}")

    if trained["script"]:
        refuse(["stage"], f"to {args.ckpt}, which says what it is")
    elif run.main:
        print(f"{args.ckpt} is taken for " + ("a teacher" if teacher else "a consistency model; --stage teacher takes it for a teacher"))
    if teacher:
        refuse(["sigmas", "edit", "search_times"], f"to the teacher in {args.ckpt}, which draws on the grid of --N")
    else:
        refuse(["churn"] + ["N"] * (not args.search_times), f"to the consistency model in {args.ckpt}")
    if args.search_times:
        refuse(["sigmas", "edit"], "with --search-times")
    elif not args.eval:
        refuse(["dataset", "data_dir"], "without --eval or --search-times")
    common.check_edit_flags(args)
    if args.w > top:
        raise UserError(f"--w {args.w}: {args.ckpt} was trained for " + (f"weights up to {top}" if top else "no guidance"))
    net = common.place(net, run)
    if args.edit:
        return common.edit_images(args, run, net, lambda y: clipped(net, y, args.w))
    if args.search_times:
        return search_checkpoint(args, run, net, trained)
    args.sample = args.sample or 64
    if teacher:
        N = args.N or (18 if net.image_size <= 32 else 40)  # EDM's
        return common.sample_checkpoint(args, run, net, lambda y, noise, shape, _: common.sample_teacher(net, N, y, noise, shape, args.w, args.churn),
                                        (2 * N - 1) * (2 if args.w else 1), trained)
    sigmas = args.sigmas or [common.T_MAX]
    common.sample_checkpoint(args, run, net, lambda y, noise, shape, _: sample(net, sigmas, y, noise, shape, args.w), len(sigmas), trained)


SAMPLING = dict(sample=None, sigmas=None, stage=None, N=None, w=0.0, churn=0.0, search_times=None, dataset=None, data_dir=None,
                **common.EDITING_DEFAULTS)

if __name__ == "__main__":
    args = common.parse_flags(flags(), recipe, SAMPLING, both=("stage", "N"))
    run = common.setup(args)

    # ---- sampling, editing: python cd.py --ckpt FILE
    if hasattr(args, "ckpt"):
        use_checkpoint(args, run)
        common.finish(run)

    # ---- teacher: without --teacher, one is trained first
    stop = common.StopSignal()
    if args.stage == "teacher":
        finished, _ = common.train_teacher(args, run, stop)
        common.finish(run, None if finished else stop)
    continuous = args.objective == "continuous"
    common.check_times(args.times, common.karras_times(2 if continuous else args.N))
    with common.main_process_first(run):  # now, not after days of the teacher's training
        dist = None if continuous else common.make_distance(args.dist, run.device)
    if args.teacher is None:
        common.train_first_teacher(args, run, stop, "cd", 0.1 if args.w_max else 0.0)
    teacher, settings = common.open_teacher(args, run)
    size = settings["image_size"]

    # ---- data
    with common.main_process_first(run):
        dataset = common.load_dataset(args.dataset, args.data_dir, size)
    D, classes = common.teacher_denoiser(args, run, teacher, dataset)
    if args.w_max and not classes:
        raise UserError("--w-max needs labels, and there are none")
    if args.w_max and teacher is not None and teacher.null_y is None:
        raise UserError(f"--w-max: {args.teacher} was trained without --label-dropout, so it has nothing to guide with")

    # ---- networks, optimizer, resume
    model_args = settings | dict(classes=classes, dropout=args.dropout, extra=args.w_max > 0)
    common.seed_everything(common.INIT, args.seed)
    net = common.make_net(model_args)
    if teacher is not None:  # all but the embedding of w, which adds nothing at first
        net.load_state_dict(net.state_dict() | teacher.state_dict())
    net = common.place(net, run)
    mu = 0.0 if continuous else args.mu  # continuous time has no target
    target = copy.deepcopy(net).requires_grad_(False) if mu > 0 else net
    ema = copy.deepcopy(net).requires_grad_(False).eval()
    optimizer = torch.optim.RAdam(net.parameters(), args.lr, foreach=True)
    buffer, tail = common.flatten_gradients(net, tail=2 + 2 * common.BINS)  # what the ranks sum each step
    loss_sum, stop_sum, bins = tail[0], tail[1], tail[2:].view(2, -1)  # bins: of the losses, of the images

    out_dir, step, skipped, bad_in_a_row, stopping = Path(args.out_dir), 0, 0, 0, False
    if state := common.resume_state(args, run, "cd", model_args):
        step, skipped = state["step"], state["skipped"]
        for module, key in ((net, "net"), (target, "target"), (ema, "ema")):
            module.load_state_dict(state[key] or state["net"])
        common.load_optimizer(optimizer, state["optimizer"])
    del state
    if run.compile:
        modules = {teacher} - {None}
        if not continuous or not args.dropout:  # df/dt is never compiled, and f must drop out what it drops out
            modules |= {net, target}
        for module in modules:
            module.compile()  # in place: names of the weights stay as they are
    log = common.start_run(args, run, net, step)

    def save():
        """Write last.pt, which resumes the run, and ema.pt, which other tools can load."""
        if run.main:
            common.save_checkpoint(out_dir / "last.pt", dict(
                script="cd", step=step, images=step * args.batch_size, skipped=skipped, args=vars(args), model_args=model_args,
                net=net.state_dict(), target=None if target is net else target.state_dict(), ema=ema.state_dict(),
                optimizer=optimizer.state_dict(), torch_version=str(torch.__version__)))
            common.save_checkpoint(out_dir / "ema.pt", ema.state_dict())

    def sample_grid():
        """Write samples/STEP.png from the same noise every time: in one step left, in several right, or guided by 0 and by --w-max."""
        y, columns = common.grid_labels(classes, run.device), common.grid_columns(classes)
        ways = ([common.T_MAX], 0.0), ([common.T_MAX], args.w_max) if args.w_max else (args.sigmas, 0.0)
        blocks = [common.draw_many(run, lambda y, noise, shape, _: sample(ema, sigmas, y, noise, shape, w), 8 * columns, y,
                                   (3, size, size), args.seed, args.micro_batch) for sigmas, w in ways]
        if run.main:
            log.grid(step, blocks, columns)

    # ---- training
    micro_batches = args.batch_size // args.micro_batch
    indices = common.index_batches(len(dataset), args.seed, step, args.total_steps, args.batch_size, args.micro_batch,
                                   run.rank, run.world)
    loader = common.make_loader(dataset, indices, args.workers, run.device)
    if not continuous:
        times, solver = common.karras_times(args.N).to(run.device), SOLVERS[args.solver]
        p = common.interval_probabilities(times.cpu(), args.times).to(run.device)
    bar, since = common.progress(args, run, step), (time.perf_counter(), step)
    while step < args.total_steps and not stopping:
        # ------------------------------------------------------------------------------------ one training step
        buffer.zero_()
        for m in range(run.rank, micro_batches, run.world):
            common.seed_everything(common.STEP, args.seed, step, m)
            x0, y = common.to_device(next(loader), run.device, args.flip)
            y = y if classes else None
            w = args.w_max * torch.rand(len(x0), device=run.device) if args.w_max else None
            if continuous:
                t = common.random_times(len(x0), args.times, run.device).clamp(common.T_MIN, common.T_MAX)
                loss = continuous_loss(net, D, x0, torch.randn_like(x0), t, y, w, args.stop_gradient)
            else:
                n = torch.multinomial(p, len(x0), replacement=True)
                t = times[n + 1]
                loss = loss_fn(net, target, D, x0, torch.randn_like(x0), times[n], t, y, w, solver, dist, common.WEIGHTS[args.weighting])
            (loss.sum() / args.batch_size).backward()
            loss_sum += loss.detach().sum() / args.batch_size
            common.tally(bins, t, loss.detach())
        stop_sum.fill_(stop.number > 0)
        if run.world > 1:
            torch.distributed.all_reduce(buffer)

        loss, stopping = tail[:2].tolist()
        grad_norm = torch.linalg.vector_norm(buffer[:-len(tail)]).item()
        if math.isfinite(loss) and math.isfinite(grad_norm):
            bad_in_a_row = 0
            optimizer.step()
            if target is not net:
                common.ema_update(target, net, mu)
            common.ema_update(ema, net, args.ema_decay)
        else:
            bad_in_a_row, skipped = bad_in_a_row + 1, skipped + 1
        step += 1
        # -----------------------------------------------------------------------------------------------------

        if bad_in_a_row == 10:
            bar.close()
            common.too_many_bad_steps(step, loss, grad_norm, out_dir)
        bar.update()
        last = stopping or step == args.total_steps
        if args.log_every and (step % args.log_every == 0 or last) and run.main:
            since = common.report(log, bar, args, step, since, loss=loss, loss_bins=(bins[0] / bins[1]).tolist(), grad_norm=grad_norm,
                                  skipped=skipped, peak_gb=common.peak_memory_gb(run.device))
        if (args.save_every and step % args.save_every == 0) or last:
            save()
        if args.sample_every and (step % args.sample_every == 0 or step == args.total_steps):
            sample_grid()
    bar.close()
    common.finish(run, stop if step < args.total_steps else None)
