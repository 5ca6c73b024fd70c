"""The scoreboard: every method on the same net, data and number of training steps; and the
consistency paper's Figure 3 at this scale.

    python tests/bench.py quality                            glyphs, within two hours on 2 cores
    python tests/bench.py quality --dataset cifar10.zip --net glyphs image_size=16    your own

Trainings are the scripts themselves, a process each, in folders under --work; the teacher first,
then the longest. Whatever is done is kept: the same command goes on where it was stopped, and at
its end writes a table and pictures into --results. A training that fails is a line of the table.
"""

import argparse
import functools
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Callable, NamedTuple

import bench
import torch

import cd
import common
import ct
import ctm
import guided_distill

ROOT = Path(__file__).parent.parent
FOUR = ctm.step_levels(4)  # of consistency models too: evenly spaced on the Karras grid


class Way(NamedTuple):
    """A way to draw."""

    calls: int  # of the network for an image: NFE
    how: str
    w: float  # guidance weight
    file: str  # the checkpoint, in the training's folder
    open: Callable  # (path, run) -> the network, and its draw(y, noise, shape)


class Method(NamedTuple):
    """A training. `flags` of its script; in them {K}, {half} are steps, {teacher} a file and
    NET the flag --net if it was given."""

    title: str
    script: str
    flags: str
    cost: (
        float  # of a step, that of ct.py being 1: for the order of the trainings and the time to go
    )
    ways: list


def open_net(path, run):
    return common.place(common.load_network(path, ("cd", "ct", "ctm"))[0], run)


def heun(N, w=0.0):
    def opened(path, run):
        net = open_net(path, run)
        return net, functools.partial(cd.sample_teacher, net, N, w=w)

    return Way((2 * N - 1) * (1 + (w > 0)), f"{N} Heun steps", w, "last.pt", opened)


def multistep(*sigmas):
    def opened(path, run):
        net = open_net(path, run)
        return net, functools.partial(cd.sample, net, sigmas)

    return Way(
        len(sigmas), "from " + ", ".join(f"{sigma:.3g}" for sigma in sigmas), 0.0, "last.pt", opened
    )


def jumps(n, gamma):
    def opened(path, run):
        net = open_net(path, run)
        return net, functools.partial(ctm.sample, net, ctm.step_levels(n), gamma)

    return Way(n, f"gamma {gamma:g}" if n > 1 else "one jump", 0.0, "last.pt", opened)


def ddim(N, w=0.0, file=None, what="", sampler="D"):
    """The teacher's, of two calls a step if it is guided, or of the student in `file`."""

    def opened(path, run):
        student = guided_distill.open_student(path, run)
        draw = functools.partial(
            guided_distill.draw, student.v, student.angle, N, sampler, w, run.device
        )
        return student.net, draw

    return Way(
        N * (1 + (w > 0 and not file)),
        what + ("DDIM" if sampler == "D" else "stochastic"),
        w,
        file or "last.pt",
        opened,
    )


CONSISTENCY = [
    multistep(80.0),
    multistep(80.0, 1.6),
    multistep(*FOUR),
]  # 1.6: of the glyphs recipes of cd.py and ct.py
JUMPS = [jumps(1, 0.0), *(jumps(n, gamma) for gamma in (0.0, 1.0) for n in (2, 4))]
WEIGHTS = 0.0, 1.0
CT, CD, CTM, GD = "ct.py", "cd.py", "ctm.py", "guided_distill.py"
STUDENT = "--teacher {teacher} --total-steps {K}"
METHODS = {
    "teacher": Method(
        "teacher",
        CD,
        "--stage teacher --label-dropout 0.1 NET --total-steps {teacher_steps}",
        0.9,
        [*(heun(18, w) for w in WEIGHTS), *(ddim(N, w) for w in WEIGHTS for N in (4, 2, 1))],
    ),
    "pd": Method(
        "progressive distillation",
        GD,
        "--teacher {teacher} --w-max 0 --start-N 16 --round-steps {pd_round} --last-steps "
        "{pd_last}",
        1.9,
        [ddim(N, 0.0, f"N{N:04d}.pt") for N in (4, 2, 1)],
    ),
    "guided-d": Method(
        "guided distillation D",
        GD,
        "--teacher {teacher} --start-N 16 --stage1-steps {d_1} --round-steps {d_round} "
        "--last-steps {d_last}",
        1.9,
        [
            *(ddim(N, w, "stage1.pt", "stage 1, ") for w in WEIGHTS for N in (16, 4)),
            *(ddim(N, w, f"N{N:04d}.pt") for w in WEIGHTS for N in (4, 2, 1)),
        ],
    ),
    "guided-s": Method(
        "guided distillation S",
        GD,
        "--sampler S --teacher {teacher} --start-N 16 --stage1-steps {s_1} --round-steps {s_round} "
        "--last-steps {s_last}",
        1.9,
        [ddim(N, w, f"N{N:04d}.pt", sampler="S") for w in WEIGHTS for N in (4, 2, 1)],
    ),
    "cd": Method("CD", CD, STUDENT, 1.5, CONSISTENCY),
    # In continuous time, of which the recipes are the papers' with a lower learning rate, the
    # average over fewer steps: the README's setting
    "cd-continuous": Method(
        "continuous CD", CD, STUDENT + " --objective continuous --ema-decay 0.99", 3.5, CONSISTENCY
    ),
    "ct": Method("CT", CT, "--recipe ct NET --total-steps {K}", 1.0, CONSISTENCY),
    "ict": Method("iCT", CT, "--recipe ict NET --total-steps {K}", 1.0, CONSISTENCY),
    "ect": Method("ECT", CT, "--recipe ect " + STUDENT, 1.0, CONSISTENCY),
    "ct-continuous": Method(
        "continuous CT", CT, STUDENT + " --objective continuous --ema-decay 0.99", 3.5, CONSISTENCY
    ),
    "ctm": Method("CTM", CTM, STUDENT, 4.1, JUMPS),
    "ctm-critic": Method(
        "CTM, critic", CTM, STUDENT + " --disc conv --disc-start {half}", 4.1, JUMPS
    ),
    "ctm-scratch": Method(
        "CTM from scratch", CTM, "--teacher none NET --total-steps {K}", 3.1, JUMPS
    ),
}

ONE_STEP = [multistep(80.0)]
# with cd.py's and ct.py's recipes otherwise: Heun, N = 18, Huber; N = 2 to 21, mu0 = 0.9, l2
ABLATIONS = {
    **{
        f"cd-{dist}": Method(
            "", CD, f"--teacher {{teacher}} --total-steps {{A}} --dist {dist}", cost, ONE_STEP
        )
        for dist, cost in (("l1", 1.5), ("l2", 1.5), ("lpips", 100.0))
    },
    **{
        f"cd-{solver}-{N}": Method(
            "",
            CD,
            f"--teacher {{teacher}} --total-steps {{A}} --solver {solver} --N {N}",
            cost,
            ONE_STEP,
        )
        for solver, cost, Ns in (("heun", 1.5, (9, 18, 36, 72)), ("euler", 1.3, (9, 18, 72)))
        for N in Ns
    },
    "ct-adaptive": Method("", CT, "--recipe ct NET --total-steps {A}", 1.0, ONE_STEP),
    # N levels always, and the mu that the adaptive run has at N: mu0^(s0 / N) = 0.9^(2 / N)
    **{
        f"ct-fixed-{N}": Method(
            "",
            CT,
            f"--recipe ct NET --total-steps {{A}} --schedule double --s0 {N - 1} --s1 {N - 1} "
            f"--mu0 {0.9 ** (2 / (N - 1)):.6f}",
            1.0,
            ONE_STEP,
        )
        for N in (10, 40, 150)
    },
}
PANELS = {  # label of a curve: its training
    "Metric functions in CD": {
        "l1": "cd-l1",
        "l2": "cd-l2",
        "Huber": "cd-heun-18",
        "LPIPS": "cd-lpips",
    },
    "Solver and N in CD": {
        f"{solver.title()}, N = {N}": f"cd-{solver}-{N}"
        for N in (9, 18, 72)
        for solver in ("heun", "euler")
    },
    "N with Heun in CD": {f"N = {N}": f"cd-heun-{N}" for N in (9, 18, 36, 72)},
    "Adaptive N and mu in CT": {"adaptive": "ct-adaptive"}
    | {f"N = {N}": f"ct-fixed-{N}" for N in (10, 40, 150)},
}


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------


def budgets(K, teacher_steps, A):
    """What stands in braces in the flags. The rounds of a distillation add up to K: stage 1
    three tenths, each last round two tenths."""
    d_round, last, pd_round = K - 3 * K // 10 - 3 * (K // 5), K // 5, K // 5
    s_round = (K - 3 * K // 10 - 2 * last - 1) // 2
    return dict(
        K=K,
        half=K // 2,
        teacher_steps=teacher_steps,
        A=A,
        d_1=3 * K // 10,
        d_round=d_round,
        d_last=last,
        s_1=K - 2 * s_round - 2 * last - 1,
        s_round=s_round,
        s_last=last,  # its round of N = 1 is one step long
        pd_round=pd_round,
        pd_last=K // 2 - pd_round,
    )


OURS = {
    "net",
    "flip",
    "out_dir",
    "dataset",
    "teacher_steps",
    "total_steps",
    "start_N",
    "stage1_steps",
    "round_steps",
    "last_steps",
}


def merged(module, flags):
    """The settings that a script has with these flags, as far as they apply: as
    `common.parse_flags`."""
    parser = module.make_parser()
    settings = parser.defaults | common.SHARED_DEFAULTS | module.recipe(flags) | flags
    return {key: value for key, value in settings.items() if not parser.why_not(key, settings)}


def command(method, args, teacher, folder):
    """The command line of a training: [python, script, flags ...]. Of a path it has the
    settings of the glyphs recipe: its own is for GPUs."""
    numbers = budgets(args.total_steps, args.teacher_steps, args.ablation_steps) | dict(
        teacher=teacher
    )
    net = ["--net", *args.net] if args.net else []
    words = [
        word
        for part in method.flags.split()
        for word in (net if part == "NET" else [part.format(**numbers)])
    ]
    if args.dataset != "glyphs":
        module = dict(zip((CD, CT, CTM, GD), (cd, ct, ctm, guided_distill)))[method.script]
        flags = vars(module.make_parser().parse_args(words))
        mine, theirs = merged(module, flags), merged(module, flags | dict(dataset=args.dataset))
        for key, value in mine.items():
            if key not in OURS | flags.keys() and theirs.get(key) != value:
                words += [
                    "--" + key.replace("_", "-"),
                    *map(str, value if isinstance(value, list) else [value]),
                ]
        words += ["--dataset", args.dataset] + ["--workers", "0"] * (args.jobs > 1)
    words += ["--batch-size", str(args.batch_size)] if args.batch_size else []
    return [
        sys.executable,
        str(ROOT / method.script),
        *words,
        "--seed",
        str(args.seed),
        "--sample-every",
        "0",
        "--out-dir",
        str(folder),
    ]


def read_record(folder):
    """What is known of a training: its command, seconds, error if it failed, done, and the
    measured rows."""
    try:
        return json.loads((folder / "result.json").read_text())
    except FileNotFoundError:
        return dict(seconds=0.0, done=False, rows={})


def write_record(folder, record):
    folder.mkdir(parents=True, exist_ok=True)
    with common.atomic_file(folder / "result.json", "w") as file:
        json.dump(record, file, indent=1)


def last_line(path):
    lines = [
        line
        for line in path.read_text(errors="replace").replace("\r", "\n").splitlines()
        if line.strip()
    ]
    return lines[-1].strip() if lines else "it said nothing"


def train(todo, commands, folders, jobs, stop):
    """Run the trainings `todo` (name -> cost), `jobs` at once; result.json says how each went.

    The others wait for "teacher" if it is in their command. When `stop` has caught a signal, they
    are told to save, and waited for.
    """

    def keep(name, seconds, **news):
        record = read_record(folders[name]) | dict(command=commands[name][1:]) | news
        write_record(folders[name], record | dict(seconds=record["seconds"] + seconds))

    waiting, running, begun, told = (
        sorted(todo, key=lambda name: (name != "teacher", -todo[name])),
        {},
        time.perf_counter(),
        False,
    )
    seen = {}
    env = {**os.environ, "OMP_NUM_THREADS": str(max(cores() // jobs, 1))}
    try:
        while running or waiting and not stop.number:
            for name in list(waiting) if not stop.number else []:
                needs = "--teacher" in commands[name] and "none" not in commands[name]
                if needs and ("teacher" in waiting or "teacher" in running) or len(running) == jobs:
                    continue
                waiting.remove(name)
                if needs and not read_record(folders["teacher"])["done"]:
                    keep(name, 0.0, done=False, error="its teacher was not trained")
                    continue
                folders[name].mkdir(parents=True, exist_ok=True)
                with open(
                    folders[name] / "output.txt", "a"
                ) as output:  # a session of its own: Ctrl-C reaches it through here, once
                    process = subprocess.Popen(
                        commands[name],
                        stdout=output,
                        stderr=output,
                        env=env,
                        start_new_session=True,
                    )
                running[name] = process, time.perf_counter()
            if stop.number and not told:
                for process, _ in running.values():
                    process.terminate()
                told = True
            time.sleep(0.1)
            for name, (process, started) in list(running.items()):
                pid, status, usage = os.wait4(process.pid, os.WNOHANG)
                if name in ABLATIONS:
                    seen[name] = keep_snapshot(folders[name], seen.get(name))
                if not pid:
                    continue
                del running[name]
                process.returncode = code = os.waitstatus_to_exitcode(status)
                seconds = (
                    time.perf_counter() - started
                    if torch.cuda.is_available()
                    else usage.ru_utime + usage.ru_stime
                )
                failed = code and not stop.number
                keep(
                    name,
                    seconds,
                    done=code == 0,
                    error=last_line(folders[name] / "output.txt") if failed else None,
                )
                left = sum(todo[other] for other in (*waiting, *running))
                elapsed = time.perf_counter() - begun
                print(
                    f"{name}: "
                    + (
                        "FAILED: " + last_line(folders[name] / "output.txt")
                        if failed
                        else "stopped"
                        if code
                        else "trained"
                    )
                    + f", {read_record(folders[name])['seconds'] / 60:.1f} min; {elapsed / 60:.0f} "
                    "min gone, about "
                    f"{elapsed * left / max(sum(todo.values()) - left, 1e-9) / 60:.0f} to go",
                    flush=True,
                )
    finally:
        for process, _ in running.values():
            process.kill()


def keep_snapshot(folder, seen):
    """Keep what there is to draw with in a new last.pt, for a curve. Returns when it was
    written; `seen`: when the last one was."""
    written = (folder / "last.pt").stat().st_mtime_ns if (folder / "last.pt").exists() else None
    if written != seen:
        state = common.load_checkpoint(folder / "last.pt")
        common.save_checkpoint(
            folder / f"at{state['step']:06d}.pt",
            {key: state[key] for key in ("script", "step", "args", "model_args", "ema")},
        )
    return written


def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


# --------------------------------------------------------------------------------------------------
# Measuring
# --------------------------------------------------------------------------------------------------


def measure(name, ways, folder, run, judge, args, stop):
    """Rows of a training: [calls, how, w, steps trained, share read, Frechet distance, images
    drawn a second]. Kept in result.json."""
    record, rows = read_record(folder), []
    for way in ways:
        if stop.number:
            break
        path = folder / way.file
        with open(path, "rb") as file:
            sha = hashlib.file_digest(file, "sha256").hexdigest()[:12]
            key = f"{sha} {way.calls} {way.how} {way.w:g} {args.n} {args.seed}"
        if key not in record["rows"]:
            net, draw = way.open(path, run)
            step = common.load_checkpoint(path)["step"]
            record["rows"][key] = [
                way.calls,
                way.how,
                way.w,
                step,
                *bench.score(judge(), net, draw, args.n, args.seed),
            ]
            write_record(folder, record)
            print(
                f"{name}, {way.how}, {way.calls} calls, w = {way.w:g}: "
                f"{record['rows'][key][4]:.1%}, {record['rows'][key][5]:.3f}",
                flush=True,
            )
        rows.append(record["rows"][key])
    return rows


def machine():
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        model = next(
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        )
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{cores()} cores, {model}"


# --------------------------------------------------------------------------------------------------
# What is expected, and whether it came out
# --------------------------------------------------------------------------------------------------


def judged(claim, pairs):
    """A line on a claim. pairs: (name, a, b), of which a is to be below b, or None where one
    was not measured."""
    pairs = [(name, a, b) for name, a, b in pairs if a is not None and b is not None]
    if not pairs:
        return f"- {claim}: *not measured*."
    right = sum(a < b for _, a, b in pairs)
    return (
        f"- {claim}: "
        f"**{'holds' if right == len(pairs) else 'holds in part' if right else 'does not hold'}** ("
        + "; ".join(f"{name} {a:.3f} {'<' if a < b else '≥'} {b:.3f}" for name, a, b in pairs)
        + ")."
    )


def expectations(rows):
    """Lines on what the papers lead one to expect of the table. rows: name of the training ->
    its rows."""

    def distance(name, calls, w=0.0, how="", column=5):
        return next(
            (
                row[column]
                for row in rows.get(name, ())
                if (row[0], row[2]) == (calls, w) and row[1].startswith(how)
            ),
            None,
        )

    def with_steps(names, how=""):
        found = (
            (
                METHODS[name].title,
                [distance(name, n) if n == 1 else distance(name, n, 0.0, how) for n in (1, 2, 4)],
            )
            for name in names
        )
        return [(title, a, b, c) for title, (a, b, c) in found]

    consistency = [name for name, method in METHODS.items() if method.ways is CONSISTENCY]
    ctms = [name for name, method in METHODS.items() if method.ways is JUMPS]
    lines = [
        judged(
            "CD is better than CT at equal steps",
            [(f"NFE {n}", distance("cd", n), distance("ct", n)) for n in (1, 2, 4)],
        ),
        judged(
            "Two steps are better than one",
            [
                (title, two, one)
                for title, one, two, _ in with_steps(consistency) + with_steps(ctms, "gamma 1")
            ],
        ),
        judged(
            "CTM with gamma 0 improves with steps",
            [
                pair
                for title, one, two, four in with_steps(ctms, "gamma 0")
                for pair in ((f"{title}, two", two, one), (f"{title}, four", four, two))
            ],
        ),
    ]
    lines += [
        judged(
            f"{METHODS[name].title} is ahead of CT",
            [(f"NFE {n}", distance(name, n), distance("ct", n)) for n in (1, 2, 4)],
        )
        for name in ("ict", "ect")
    ]
    shares = [
        (
            f"{name[-1].upper()}, w = {w:g}, short by",
            distance("teacher", calls, w, "", 4),
            distance(name, 4, w, how, 4),
        )
        for w, calls in ((0.0, 35), (1.0, 70))
        for name, how in (("guided-d", "DDIM"), ("guided-s", "stochastic"))
    ]
    return lines + [
        judged(
            "Guided distillation at 4 steps is read within 2 points of its teacher",
            [
                (name, teacher - student, 0.02)
                for name, teacher, student in shares
                if teacher is not None and student is not None
            ],
        )
    ]


def conclusions(curves):
    """Lines on the paper's conclusions from its Figure 3. curves: name of the training ->
    {step: Frechet distance}."""

    def at(name, *step):  # or where it ended
        return curves[name].get(*step or [max(curves[name])]) if curves.get(name) else None

    def pairs(label, *names):
        return [(label(other), at(names[0]), at(other)) for other in names[1:]]

    first = min(
        curves.get("ct-fixed-10", {}).keys() & curves.get("ct-fixed-150", {}).keys(), default=0
    )  # a stopped run has more
    lines = [
        judged(
            "(a) LPIPS is better than l1 and l2",
            pairs(lambda name: "LPIPS beside " + name[3:], "cd-lpips", "cd-l1", "cd-l2"),
        )
        + "".join(
            f" {label}: {at(name):.3f}."
            for label, name in PANELS["Metric functions in CD"].items()
            if at(name)
        ),
        judged(
            "(b) Heun is better than Euler at equal N",
            [(f"N = {N}", at(f"cd-heun-{N}"), at(f"cd-euler-{N}")) for N in (9, 18, 72)],
        ),
        judged(
            "(c) With Heun N = 18 is the best, and more is no use",
            pairs(lambda name: f"18 beside {name[8:]}", *(f"cd-heun-{N}" for N in (18, 9, 36, 72))),
        ),
        judged(
            "(d) In CT a small N converges faster",
            [
                (
                    "first checkpoint, N = 10 beside 150",
                    at("ct-fixed-10", first),
                    at("ct-fixed-150", first),
                )
            ],
        ),
        judged(
            "(d) but to worse samples than a large N",
            [("last checkpoint, N = 150 beside 10", at("ct-fixed-150"), at("ct-fixed-10"))],
        ),
        judged(
            "(d) and adaptive N and mu are better than fixed ones",
            pairs(
                lambda name: f"adaptive beside N = {name[9:]}",
                "ct-adaptive",
                *(f"ct-fixed-{N}" for N in (10, 40, 150)),
            ),
        ),
    ]
    return lines


# --------------------------------------------------------------------------------------------------
# The table and the pictures
# --------------------------------------------------------------------------------------------------


def table(rows, records):
    teacher = records.get("teacher", {}).get("seconds", 0.0) / 60
    lines = [
        "| method | NFE | drawn | w | read as asked | Fréchet distance | images/s | training "
        "minutes | steps |",
        "|---" * 9 + "|",
    ]
    for name in rows:
        record, method = records[name], METHODS[name]
        if not rows[name]:
            lines.append(
                f"| {method.title} | failed: "
                f"{(record.get('error') or 'not trained').replace('|', '/')} |"
                + " |" * 7
            )
        minutes = f"{record['seconds'] / 60:.1f}" + f" + {teacher:.1f}" * (
            "{teacher}" in method.flags
        )
        lines += [
            f"| {method.title} | {calls} | {how} | {w:g} | {share:.1%} | {distance:.2f} | "
            f"{rate:,.0f} | {minutes} | {step} |"
            for calls, how, w, step, share, distance, rate in rows[name]
        ]
    return lines


def draw_curves(path, rows):
    """Quality against network calls, without guidance."""
    from matplotlib import figure

    drawing = figure.Figure(figsize=(12, 5), layout="constrained")
    for axis, column, title in zip(
        drawing.subplots(1, 2), (4, 5), ("read as the label asked for, %", "Fréchet distance")
    ):
        for number, (name, found) in enumerate(rows.items()):
            for kind in sorted({curve_of(row) for row in found}):
                points = sorted(
                    (row[0], row[column] * (100 if column == 4 else 1))
                    for row in found
                    if row[2] == 0 and curve_of(row) == kind
                )
                label = METHODS[name].title + (f", {kind}" if kind else "")
                axis.plot(
                    *zip(*points),
                    marker="*" if kind == "Heun" else "osD^v"[number % 5],
                    label=label,
                    color=f"C{number % 10}",
                    linestyle=":" if kind else "--" if number > 9 else "-",
                )
        axis.set(
            xscale="log",
            xlabel="network calls (NFE)",
            title=title,
            yscale="log" if column == 5 else "linear",
        )
        axis.set_xticks([1, 2, 4, 16, 35], ["1", "2", "4", "16", "35"], minor=False)
        axis.grid(alpha=0.3)
    drawing.legend(*axis.get_legend_handles_labels(), loc="outside right center", fontsize=8)
    drawing.savefig(path, dpi=100)


def curve_of(row):
    """Rows that make one curve, of several sorts that a method has."""
    return (
        "stage 1"
        if row[1].startswith("stage 1")
        else "Heun"
        if "Heun" in row[1]
        else "gamma 1"
        if row[1] == "gamma 1"
        else ""
    )


def draw_figure3(path, curves):
    from matplotlib import figure

    drawing = figure.Figure(figsize=(14, 3.6), layout="constrained")
    for axis, (title, lines) in zip(drawing.subplots(1, 4), PANELS.items()):
        for number, (label, name) in enumerate(lines.items()):
            if curves.get(name):
                pairs = title.startswith("Solver")
                axis.plot(
                    *zip(*curves[name].items()),
                    marker=".",
                    label=label,
                    color=f"C{number // 2 if pairs else number}",
                    linestyle="--" if pairs and number % 2 else "-",
                )
        axis.set(title=title, xlabel="training steps", yscale="log")
        axis.grid(alpha=0.3, which="both")
        if axis.lines:
            axis.legend(fontsize=8)
    drawing.supylabel("Fréchet distance, one step")
    drawing.savefig(path, dpi=100)


def picture(draw, path, *what):
    try:
        draw(path, *what)
    except ImportError:
        print(f"{path} was not drawn: pip install matplotlib")


# --------------------------------------------------------------------------------------------------


def choose(args):
    """The trainings asked for: name -> Method, their teacher among them. Raises UserError for a
    name that is none."""
    every = (
        METHODS
        | {
            name: method
            for name, method in ABLATIONS.items()
            if name != "cd-lpips" or torch.cuda.is_available()
        }
        if args.ablation_steps
        else METHODS
    )
    if wrong := [name for name in args.only or () if name not in every]:
        raise common.UserError(
            f"--only {wrong[0]}: there is no such training; there are {', '.join(every)}"
        )
    chosen = {name: method for name, method in every.items() if not args.only or name in args.only}
    teacher = (
        {"teacher": METHODS["teacher"]}
        if any("{teacher}" in method.flags for method in chosen.values())
        else {}
    )
    return teacher | chosen


def main(args):
    stop, chosen = common.StopSignal(), choose(args)
    run = common.setup(argparse.Namespace(device="auto", precision="auto", compile=False))
    run.main = False  # nobody is to be told what a checkpoint is taken for
    args.jobs = args.jobs or (1 if run.device.type == "cuda" else cores())
    if (
        args.dataset != "glyphs" and not Path(args.dataset).exists()
    ):  # now, not when every training has failed
        raise common.UserError(
            f"--dataset {args.dataset} does not exist: name glyphs or the path of images with "
            "labels"
        )
    args.dataset = args.dataset if args.dataset == "glyphs" else str(Path(args.dataset).resolve())
    stem = Path(args.dataset).stem
    size = common.net_settings(
        args.net or common.DATASETS[common.known_dataset(vars(args))]["net"]
    )["image_size"]
    folders = {name: (Path(args.work) / stem / name).resolve() for name in chosen}
    commands = {
        name: command(method, args, folders.get("teacher", Path()) / "last.pt", folders[name])
        for name, method in chosen.items()
    }
    for name in chosen.keys() & ABLATIONS.keys():
        commands[name] += ["--save-every", str(max(args.ablation_steps // 5, 1))]

    # ---- training
    steps = {
        name: args.ablation_steps
        if name in ABLATIONS
        else args.teacher_steps
        if name == "teacher"
        else args.total_steps
        for name in chosen
    }
    todo = {
        name: method.cost * steps[name]
        for name, method in chosen.items()
        if not (record := read_record(folders[name]))["done"]
        or record["command"] != commands[name][1:]
    }
    train(todo, commands, folders, args.jobs, stop)

    # ---- measuring, one at a time, in one thread
    torch.set_num_threads(1)
    judge = functools.cache(lambda: bench.make_judge(args.dataset, size, run.device))
    told = Path(args.work) / stem / f"judge{size}.txt"
    if not stop.number and not told.exists():
        told.parent.mkdir(parents=True, exist_ok=True)
        told.write_text(judge()[2])
    records, rows, curves = {}, {}, {}
    for name, method in chosen.items():
        records[name], found = read_record(folders[name]), []
        if records[name]["done"] and name in ABLATIONS:
            ways = [
                method.ways[0]._replace(file=path.name)
                for path in sorted(folders[name].glob("at*.pt"))
            ]
            curves[name] = {
                step: distance
                for *_, step, _, distance, _ in measure(
                    name, ways, folders[name], run, judge, args, stop
                )
            }
        elif records[name]["done"]:
            found = measure(name, method.ways, folders[name], run, judge, args, stop)
        if name in METHODS:
            rows[name] = found
    if stop.number:
        print("stopped: the same command goes on from here")
        raise SystemExit(128 + stop.number)

    # ---- the report
    results = Path(args.results)
    results.mkdir(parents=True, exist_ok=True)
    batch = args.batch_size or cd.STUDENTS["glyphs"]["batch_size"]
    failed = {name: records[name].get("error") for name in chosen if not records[name]["done"]}
    given = {
        key: getattr(args, key)
        for key in (
            "dataset",
            "net",
            "batch_size",
            "total_steps",
            "teacher_steps",
            "ablation_steps",
            "n",
            "seed",
            "only",
        )
    }
    given["dataset"] = Path(args.dataset).name
    lines = [
        f"# Scoreboard: {stem}",
        "",
        "`python tests/bench.py quality "
        + " ".join(
            f"--{key.replace('_', '-')} "
            f"{' '.join(map(str, value)) if isinstance(value, list) else value}"
            for key, value in given.items()
            if value is not None
        )
        + "`",
        "",
        f"{machine()}; torch {torch.__version__}, {str(run.dtype).removeprefix('torch.')}; one "
        f"run, one seed. Every student took {args.total_steps} "
        f"optimizer steps of {batch} images, the teacher {args.teacher_steps}; the settings are "
        "those of the glyphs recipes, but for continuous CD "
        "and CT --ema-decay 0.99.",
        f"{args.n} samples each; {told.read_text()}.",
        "",
        *table(rows, records),
        "",
        "- *read as asked*: share of the samples that the classifier reads as the label asked for. "
        "*Fréchet distance*: in its features, to held-out "
        "images; for w > 0 too, though guidance moves away from the data as it is meant to.",
        "- *images/s*: when sampling, "
        + ("on the GPU." if run.device.type == "cuda" else "in one thread.")
        + " *training minutes*: of "
        + ("the machine" if run.device.type == "cuda" else "processor time")
        + ", start included, + those of the teacher where there is one; of a distillation in "
        "rounds all its rounds, of which *steps* counts those "
        f"up to that student. Stage 1 has {3 * args.total_steps // 10} of guided distillation D's "
        f"{args.total_steps} steps.",
        "- Consistency models draw from the noise levels named, in four steps from those of the "
        "Karras grid of N = 5 but its end, on which CTM "
        "jumps too. Steps are the critic's own turns too.",
        "",
        "## What was expected",
        "",
        "Smaller Fréchet distance is better.",
        "",
        *expectations(rows),
        "",
    ]
    if curves or any(name in ABLATIONS for name in failed):
        lines += [
            "## Consistency models, Figure 3, at this scale",
            "",
            f"One-step samples, Fréchet distance after {args.ablation_steps} steps. "
            "Settings otherwise: in CD Heun, N = 18, Huber, mu = 0; in CT N from 2 to 21, mu0 = "
            "0.9, l2."
            + " LPIPS takes a GPU and a download."
            * ("cd-lpips" not in chosen),
            "",
            *conclusions(curves),
            "",
            *(f"- {name} failed: {error}" for name, error in failed.items() if name in ABLATIONS),
        ]
        picture(draw_figure3, results / f"figure3_{stem}.png", curves)
    with common.atomic_file(results / f"quality_{stem}.md", "w") as file:
        file.write("\n".join(lines).rstrip() + "\n")
    picture(draw_curves, results / f"quality_{stem}.png", rows)
    print(
        f"{results / f'quality_{stem}.md'}: "
        + (f"{', '.join(failed)} failed" if failed else "all trained and measured")
    )
    raise SystemExit(1 if failed else 0)
