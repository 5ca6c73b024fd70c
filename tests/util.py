"""Inputs of the reference vectors, closed forms of Gaussian data, and a tiny network."""
import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

import common

ROOT = Path(__file__).parent.parent
VECTORS = json.loads((Path(__file__).parent / "vectors.json").read_text())
TINY = dict(image_size=16, base=32, mult=(1, 2), blocks=1, attention=(8,), head_channels=32)  # the reference's net A
SMALL = ["--net", "glyphs", "base=32", "mult=1,1", "blocks=1", "--precision", "fp32", "--device", "cpu"]


def chirp(n, phase):
    k = np.arange(n, dtype=np.float64)
    return np.sin(0.7 * k + 0.0013 * k**2 + phase)


def img(shape, phase=0.3, amp=0.9):
    return torch.tensor(amp * np.sin(0.11 * np.arange(math.prod(shape)) + phase), dtype=torch.float32).reshape(shape)


def gauss(shape, phase):
    return torch.tensor(math.sqrt(2) * chirp(math.prod(shape), phase), dtype=torch.float32).reshape(shape)


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
    torch.testing.assert_close(torch.as_tensor(actual, dtype=torch.float64).flatten(),
                               torch.as_tensor(expected, dtype=torch.float64).flatten(), rtol=rtol, atol=atol)


def full(x, t):
    return torch.full((len(x),), float(t), dtype=x.dtype)


def gaussian_denoiser(s):
    """E[x0 | x_t] for data N(0, s^2 I): the exact D."""
    return lambda x, t: x * s**2 / (s**2 + common.bcast(t, x) ** 2)


def gaussian_flow(x, t, t_next, s):
    """The probability-flow map from t to t_next for data N(0, s^2 I): x scales with the marginal's deviation."""
    return x * ((s**2 + t_next**2) / (s**2 + t**2)) ** 0.5


def run_script(*flags, script="ct.py", cwd, launcher=(), env=None, code=None, timeout=600, prelude=None):
    """Run a script as a user would. `prelude` is Python that runs before it in the same process. Checks the exit code."""
    start = ([sys.executable] if prelude is None else
             [sys.executable, "-c", f"import sys, runpy; sys.path.insert(0, {str(ROOT)!r}); import common\n{prelude}\n"
              f"sys.argv[0] = {str(ROOT / script)!r}; runpy.run_path(sys.argv[0], run_name='__main__')"])
    target = [] if prelude is not None else [str(ROOT / script)]
    done = subprocess.run([*(launcher or start), *target, *map(str, flags)], cwd=cwd, text=True, capture_output=True,
                          timeout=timeout, env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})})
    if code is not None:
        assert done.returncode == code, done.stdout + done.stderr
    return done


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def torchrun(n, *more, port=None):
    return [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={n}", f"--master_port={port or free_port()}", *more]


def last(out_dir):
    return torch.load(Path(out_dir) / "last.pt", weights_only=True)


def snapshot(folder):
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


def assert_mistake(flags, message, script, folder):
    """The command ends with exit code 2 and one line that holds `message`, and touches nothing."""
    before = snapshot(folder)
    done = run_script(*flags, script=script, cwd=folder)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and len(lines) == 1 and lines[0].startswith(f"{script}: error: ") and message in lines[0], done.stderr
    assert snapshot(folder) == before
