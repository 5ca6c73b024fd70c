"""Inputs of the reference vectors, closed forms of Gaussian data, scripts run as a user would."""
import atexit
import contextlib
import functools
import gc
import importlib
import json
import math
import multiprocessing
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter
from tqdm import tqdm

import common

ROOT = Path(__file__).resolve().parent.parent
VECTORS = json.loads((Path(__file__).parent / "vectors.json").read_text())
TINY = dict(image_size=16, base=32, mult=(1, 2), blocks=1, attention=(8,), head_channels=32)
SMALL = ["--net", "glyphs", "base=32", "mult=1,1", "blocks=1",
         "--precision", "fp32", "--device", "cpu"]


def chirp(n, phase):
    k = np.arange(n, dtype=np.float64)
    return np.sin(0.7 * k + 0.0013 * k**2 + phase)


def img(shape, phase=0.3, amp=0.9):
    values = amp * np.sin(0.11 * np.arange(math.prod(shape)) + phase)
    return torch.tensor(values, dtype=torch.float32).reshape(shape)


def gauss(shape, phase):
    values = math.sqrt(2) * chirp(math.prod(shape), phase)
    return torch.tensor(values, dtype=torch.float32).reshape(shape)


def fill(net, offset=0.0):
    """Give every parameter the reference's deterministic values, the zero-initialised ones too."""
    state = {}
    for name, p in net.state_dict().items():
        a = chirp(p.numel(), sum((i + 1) * ord(c) for i, c in enumerate(name)) % 997 + offset)
        if p.ndim >= 2:
            a = a * math.sqrt(2 / math.prod(p.shape[1:]))
        else:
            a = 1 + 0.1 * a if name.endswith("weight") else 0.1 * a
        state[name] = torch.tensor(a, dtype=torch.float32).reshape(p.shape)
    net.load_state_dict(state)
    return net


def numbered_noise(first=101):
    """A noise source whose i-th call returns gauss(shape, first + i)."""
    calls = iter(range(first, first + 1000))
    return lambda x: gauss(tuple(x.shape), next(calls))


def close(actual, expected, rtol=1e-5, atol=1e-6):
    actual = torch.as_tensor(actual, dtype=torch.float64).flatten()
    expected = torch.as_tensor(expected, dtype=torch.float64).flatten()
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def full(x, t):
    return torch.full((len(x),), float(t), dtype=x.dtype)


def gradient(net):
    return torch.cat([p.grad.flatten() for p in net.parameters()])


def gaussian_denoiser(s):
    """E[x0 | x_t] for data N(0, s^2 I): the exact D."""
    return lambda x, t: x * s**2 / (s**2 + common.bcast(t, x) ** 2)


def gaussian_flow(x, t, t_next, s):
    """The probability-flow map from t to t_next for N(0, s^2 I): x scales with the deviation."""
    return x * ((s**2 + t_next**2) / (s**2 + t**2)) ** 0.5


def exact_derivative(net, x, t, dx_dt, y=None, cond=None, masks=None):
    """As common.network_derivative: F(x, t) and dF/dln t, by forward derivatives."""
    def F(x, t):
        c_in = common.bcast(1 / (t**2 + 0.25).sqrt(), x)
        return net.forward(c_in * x, 250 * t.log(), y, cond, masks, dtype=x.dtype)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return torch.func.jvp(F, (x, t), (common.bcast(t, x) * dx_dt, t))


# ---- TF32, as a GPU computes in it: operands rounded to 10 bits, sums in float32

def round_to_tf32(x):
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


class Operand(torch.autograd.Function):
    """Rounded on the way in."""
    @staticmethod
    def forward(context, x):
        return round_to_tf32(x)

    @staticmethod
    def backward(context, gradient):
        return gradient


class Result(torch.autograd.Function):
    """Whose gradient is an operand of the backward pass."""
    @staticmethod
    def forward(context, x):
        return x.clone()

    @staticmethod
    def backward(context, gradient):
        return round_to_tf32(gradient)


@contextlib.contextmanager
def tf32():
    """Convolutions and linear layers compute as in TF32."""
    def rounded(function):
        def compute(x, weight, bias=None, *more, **settings):
            x, weight = Operand.apply(x), Operand.apply(weight)
            return Result.apply(function(x, weight, bias, *more, **settings))
        return compute
    with pytest.MonkeyPatch.context() as patch:
        for name in ("conv2d", "conv_transpose2d", "linear"):
            function = getattr(torch.nn.functional, name)
            patch.setattr(torch.nn.functional, name, rounded(function))
        yield


# ---- scripts, run as a user would

MODULES = ("common", "cd", "ct", "ctm", "guided_distill", "evaluate", "judge", "bench",
           "scoreboard")
KEPT = tempfile.TemporaryDirectory()


@functools.lru_cache(4)
def glyphs(n, seed, size=16, folder=KEPT.name, draw=common.glyphs):
    """common.glyphs, a pure function that takes seconds: once for all processes of a session."""
    path = Path(folder, f"{n} {seed} {size}.npz")
    if path.exists():
        with np.load(path) as kept:
            return kept["arr_0"], kept["arr_1"]
    images, labels = draw(n, seed, size)
    partial = path.with_suffix(f".{os.getpid()}")
    with open(partial, "wb") as file:
        np.savez(file, images, labels)
    partial.rename(path)
    return images, labels


def glyph_set(size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "glyphs", glyphs)
        return common.load_dataset("glyphs", None, size)


PRELUDE = f"""
import runpy, sys
sys.path.insert(0, {str(ROOT)!r})
import common
import pytest
monkeypatch = pytest.MonkeyPatch()
"""


def run_script(*flags, script="ct.py", cwd, launcher=(), ranks=0, env=None, code=None, timeout=600,
               prelude=None, process=False):
    """Run a script as a user would. Returns its returncode, stdout and stderr; checks `code`.

    It runs in this process, with modules imported anew, unless a launcher, a number of ranks, a
    search path for packages, or `process` asks for others. `prelude` is Python that runs before it
    and knows `common`; what is not of this project it changes with `monkeypatch.setattr`.
    """
    command = [str(ROOT / script), *map(str, flags)]
    env = {"OMP_NUM_THREADS": "1"} | (env or {})
    if ranks:
        done = run_ranks(command, [cwd] * ranks, env, timeout, prelude)
    elif launcher or process or "PYTHONPATH" in env:
        start = [*launcher] or [sys.executable]
        if prelude is not None:
            end = f"sys.argv[0] = {command[0]!r}\nrunpy.run_path(sys.argv[0], run_name='__main__')"
            start = [sys.executable, "-c", "\n".join((PRELUDE, prelude, end))]
            del command[0]
        done = subprocess.run(start + command, cwd=cwd, text=True, capture_output=True,
                              timeout=timeout, env=os.environ | env)
    else:
        for word in ("SIGKILL", "setrlimit", "PDEATHSIG"):
            assert word not in (prelude or ""), f"{word} needs process=True"
        done = run_here(command, cwd, env, timeout, prelude or "")
    if code is not None:
        assert done.returncode == code, done.stdout + done.stderr
    return done


def run_here(command, cwd, env, timeout, prelude):
    """Run a script and do as the interpreter would; then everything is as it was before."""
    generators = torch.get_rng_state(), np.random.get_state(), random.getstate()
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    deterministic = torch.are_deterministic_algorithms_enabled()
    environment, modules = dict(os.environ), dict(sys.modules)
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)
    handlers = [signal.getsignal(number) for number in numbers]

    def late(number, frame):
        raise subprocess.TimeoutExpired(command, timeout)

    def whole():
        names = dict(sys=sys, runpy=runpy, common=sys.modules["common"], monkeypatch=patch)
        exec(prelude, names | {"__name__": "prelude"})
        runpy.run_path(command[0], run_name="__main__")

    elsewhere = [path for path in sys.path if Path(path).resolve() not in (ROOT, ROOT / "tests")]
    streams = [tempfile.TemporaryFile("w+", errors="replace") for _ in range(2)]
    with redirected(streams), pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.chdir(cwd)
        patch.setattr(sys, "argv", command)
        patch.setattr(sys, "path", [str(ROOT), *elsewhere])
        patch.setattr(sys, "excepthook", sys.__excepthook__)
        patch.setattr(warnings, "_showwarnmsg_impl", SHOW_WARNING)
        warnings.resetwarnings()
        for kind in (ImportWarning, ResourceWarning, DeprecationWarning):
            warnings.simplefilter("ignore", kind)  # as in an interpreter without options
        leaving = []
        patch.setattr(atexit, "register", functools.partial(register, leaving))
        os.environ.update(env)
        for name in MODULES:
            sys.modules.pop(name, None)
        importlib.import_module("common").glyphs = glyphs
        if not prelude:
            sys.path.remove(str(ROOT))
        sys.path.insert(0, str(Path(command[0]).parent))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGALRM, late)
        signal.alarm(math.ceil(timeout))
        try:
            code = exit_code(whole)
            for action in reversed(leaving):
                action()
        finally:
            signal.alarm(0)
            for bar in list(getattr(tqdm, "_instances", ())):
                bar.close()
            for number, handler in zip(numbers, handlers):
                signal.signal(number, handler)
            for name, module in list(sys.modules.items()):
                if name in MODULES or module is None or modules.get(name, module) is not module:
                    del sys.modules[name]
            sys.modules.update(modules)
            os.environ.clear()
            os.environ.update(environment)
            torch.set_rng_state(generators[0])
            np.random.set_state(generators[1])
            random.setstate(generators[2])
            torch.set_num_threads(threads)
            torch.set_default_dtype(dtype)
            torch.use_deterministic_algorithms(deterministic)
    out, err = (stream.seek(0) or stream.read() for stream in streams)
    return subprocess.CompletedProcess(command, code, out, err)


SHOW_WARNING = warnings._showwarnmsg_impl  # pytest has put its own in its place while a test runs


def register(leaving, action, *values, **more):
    """atexit.register of the scripts; what a package registers stays until this process ends."""
    if sys._getframe(1).f_globals["__name__"] not in (*MODULES, "__main__", "prelude"):
        return AT_EXIT(action, *values, **more)
    leaving.append(functools.partial(action, *values, **more))
    return action


AT_EXIT = atexit.register


@contextlib.contextmanager
def redirected(streams):
    """What this process and its children write to stdout and stderr goes to these files."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    before = [os.dup(number) for number in (1, 2)]
    texts = [open(os.dup(stream.fileno()), "w", buffering=1) for stream in streams]
    try:
        for number, stream in enumerate(streams, start=1):
            os.dup2(stream.fileno(), number)
        with contextlib.redirect_stdout(texts[0]), contextlib.redirect_stderr(texts[1]):
            yield
    finally:
        for number, text in enumerate(texts, start=1):
            text.close()
            os.dup2(before[number - 1], number)
            os.close(before[number - 1])


def exit_code(body):
    """Call `body`, and end it as the interpreter ends a script."""
    try:
        try:
            body()
            return 0
        except (SystemExit, subprocess.TimeoutExpired):
            raise
        except BaseException as error:
            sys.excepthook(type(error), error, error.__traceback__)
            return -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    except SystemExit as end:
        end_workers()
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return end.code or 0


def end_workers():
    """End those of loaders: the garbage collector would wait five seconds for each."""
    if multiprocessing.active_children():
        for thing in gc.get_objects():
            if type(thing) is _MultiProcessingDataLoaderIter:
                thing._shutdown_workers()


# ---- processes, forked from one that has imported torch

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "torch._dynamo", "PIL.Image", "tqdm", "pytest"])


def be_script(command, cwd, env, outputs, prelude, folder):
    """What a process does that `start_script` has made."""
    for number, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.chdir(cwd)
    os.environ.update(env)
    torch.set_num_threads(1)
    for name in MODULES:
        sys.modules.pop(name, None)
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != ROOT / "tests"]
    sys.path[:0] = [str(Path(command[0]).parent), str(ROOT)]
    sys.argv = command
    importlib.import_module("common").glyphs = functools.partial(glyphs, folder=folder)
    if prelude:
        exec(PRELUDE + prelude, {"__name__": "prelude"})
    code = exit_code(lambda: runpy.run_path(command[0], run_name="__main__"))
    end_workers()
    sys.exit(code)


def start_script(command, cwd, outputs=(os.devnull, os.devnull), env=None, prelude=None):
    """A process that runs a script as an interpreter of its own would."""
    process = FORKS.Process(target=be_script, args=(command, cwd, env or {}, outputs, prelude,
                                                   KEPT.name))
    process.start()
    return process


def run_ranks(command, folders, env, timeout=600, prelude=None):
    """Run a script by a process in each of these folders, as torchrun would, with its store."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    world = str(len(folders))
    env = env | dict(WORLD_SIZE=world, LOCAL_WORLD_SIZE=world, GROUP_WORLD_SIZE="1",
                     MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.port),
                     TORCHELASTIC_RESTART_COUNT="0", TORCHELASTIC_USE_AGENT_STORE="True")
    with tempfile.TemporaryDirectory() as place:
        outputs = [Path(place, name) for name in ("out", "err")]
        processes = []
        for rank, folder in enumerate(map(str, folders)):
            own = dict(RANK=str(rank), LOCAL_RANK=str(rank))
            processes.append(start_script(command, folder, outputs, env | own, prelude))
        deadline = time.monotonic() + timeout
        while any(process.is_alive() for process in processes):
            if any(process.exitcode for process in processes) or time.monotonic() > deadline:
                for process in processes:  # as torchrun does, but for its patience
                    process.join(2)
                    process.kill()
            time.sleep(0.02)
        code = next((process.exitcode for process in processes if process.exitcode), 0)
        return subprocess.CompletedProcess(command, code, *(path.read_text() for path in outputs))


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def torchrun(n, *more, port=None):
    start = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={n}"]
    return [*start, f"--master_port={port or free_port()}", *more]


def last(out_dir):
    return torch.load(Path(out_dir) / "last.pt", weights_only=True)


def snapshot(folder):
    """When each file was changed, and its size; a lock is nobody's."""
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) if path.is_file() else None
            for path in folder.rglob("*") if path.name != ".lock"}


def assert_mistake(flags, message, script, folder, prelude=None):
    """The command ends with exit code 2 and one line that holds `message`, and touches nothing."""
    before = snapshot(folder)
    done = run_script(*flags, script=script, cwd=folder, prelude=prelude, code=2)
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"{script}: error: "), done.stderr
    assert message in lines[0], done.stderr
    assert snapshot(folder) == before
