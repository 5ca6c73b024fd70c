"""Released weights load by their names and shapes, OpenAI's and NVIDIA's, and are at once usable; files that hold code are refused."""
import json
import math
import os
import pickle
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import common
from util import SMALL, TINY, VECTORS, close, last, run_script

SHAPES = VECTORS["shapes"]
CLASSES = {"unet_A_tiny": 10, "imagenet64": 1000, "lsun256": 0}
SMALL_NVIDIA = dict(image_size=8, base=128, mult=(1, 1), blocks=1, attention=(4,), head_channels=64)
SHRUNK = f"common.NETS.update(imagenet64={TINY}, lsun256={SMALL_NVIDIA})"  # small stand-ins under the names of the released networks
FLAGS = ["--device", "cpu", "--precision", "fp32"]


def random_weights(shapes, seed=0, cheap=False):
    """Random tensors of these names and shapes, none of them zero. `cheap`: a number for each row, in memory and in a file."""
    generator, state = torch.Generator().manual_seed(seed), {}
    for name, shape in shapes.items():
        values = torch.randn(shape[0], *(1,) * (len(shape) - 1) if cheap else shape[1:], generator=generator)
        if len(shape) > 1:
            state[name] = (values / math.prod(shape[1:]) ** 0.5).expand(shape)
        else:
            state[name] = 0.1 * values + name.endswith("weight")
    return state


# ---- OpenAI's files: plain state dicts

@pytest.fixture
def shrunk(monkeypatch):
    monkeypatch.setitem(common.NETS, "imagenet64", TINY)
    monkeypatch.setitem(common.NETS, "lsun256", SMALL_NVIDIA)


def assert_usable(net, found, state):
    """The net holds `state` in float32, is ready to sample or teach with, and can be rebuilt from `model_args`."""
    assert list(net.state_dict()) == list(state)
    for name, value in net.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, state[name].float()), name
    assert not any(module.training for module in net.modules()) and not any(p.requires_grad for p in net.parameters())
    with torch.device("meta"):
        again = common.UNet(**found["model_args"])
    again.load_state_dict(net.state_dict(), assign=True)
    assert (again.classes, again.time_scale, again.null_y) == (net.classes, net.time_scale, net.null_y)
    assert found["script"] is None and found["args"] == {} and not net.extra and net.null_y is None


@pytest.mark.parametrize("key", ["imagenet64", "lsun256"])
def test_key_sets_load_strictly(tmp_path, key):
    state = random_weights(SHAPES[key], cheap=True)
    torch.save(state, tmp_path / "weights.pt")
    net, found = common.load_network(tmp_path / "weights.pt", ("cd", "ct"))
    assert_usable(net, found, state)
    assert net.classes == CLASSES[key] and net.time_scale == 1
    assert found["model_args"] == common.NETS[key] | dict(classes=CLASSES[key])
    assert sum(p.numel() for p in net.parameters()) == VECTORS["param_counts"][key]


@pytest.mark.parametrize("dtype, old", [(torch.float32, False), (torch.float16, False), (torch.bfloat16, True)])
def test_weights_become_float32(shrunk, tmp_path, dtype, old):
    """Of any dtype, written by any version of torch."""
    state = {name: value.to(dtype) for name, value in random_weights(SHAPES["unet_A_tiny"]).items()}
    torch.save(state, tmp_path / "weights.pt", _use_new_zipfile_serialization=not old)
    net, found = common.load_network(tmp_path / "weights.pt", ("cd", "ct"))
    assert_usable(net, found, state)
    assert net.classes == 10


WRONG = {
    "missing": lambda state: state.pop("middle_block.1.qkv.bias"),
    "extra": lambda state: state.update({"input_blocks.3.2.weight": torch.zeros(3)}),
    "renamed": lambda state: state.update({"out.3.bias": state.pop("out.2.bias")}),
    "wrong shape": lambda state: state.update({"time_embed.0.weight": state["time_embed.0.weight"][:, :-1]}),
    "one class, no axis": lambda state: state.update({"label_emb.weight": torch.tensor(1.0)}),
    "guided-diffusion's Conv1d": lambda state: state.update(  # as in ADM's own files, whose qkv channels have another order
        {name: value.squeeze(-1) for name, value in state.items() if ".qkv." in name or ".proj_out." in name}),
    "numbered": lambda state: state.update({0: torch.zeros(3)}),
    "wrapped": lambda state: [state.update(model=dict(state)), [state.pop(name) for name in list(state) if name != "model"]],
    "empty": lambda state: state.clear(),
    "NVIDIA's name": lambda state: state.update({"map_layer0.weight": torch.zeros(3)}),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("key", ["unet_A_tiny", "imagenet64"])
def test_other_key_sets_are_refused(request, tmp_path, key, wrong):
    if key == "unet_A_tiny":
        request.getfixturevalue("shrunk")
    state = random_weights(SHAPES[key], cheap=True)
    WRONG[wrong](state)
    torch.save(state, tmp_path / "weights.pt")
    if wrong == "numbered":
        assert 0 in torch.load(tmp_path / "weights.pt", weights_only=True)
    with pytest.raises(common.UserError) as error, warnings.catch_warnings(action="error"):
        common.load_network(tmp_path / "weights.pt", ("cd", "ct"))
    assert str(error.value).startswith(f"{tmp_path / 'weights.pt'}: these weights fit none of") and "\n" not in str(error.value)


def test_a_list_of_weights_is_refused(tmp_path):
    torch.save(list(random_weights(SHAPES["unet_A_tiny"]).values()), tmp_path / "weights.pt")
    with pytest.raises(common.UserError, match="weights.pt holds a list, not a checkpoint"):
        common.load_network(tmp_path / "weights.pt", ("cd", "ct"))


# ---- NVIDIA's files: the ADM network under other names, with other numberings, written down a second time

def nvidia_blocks(settings):
    """Name, widths in and out, resampling and attention of the blocks, in the order of construction."""
    base, mult, last = settings["base"], settings["mult"], len(settings["mult"]) - 1
    sides = [settings["image_size"] // 2**level for level in range(last + 1)]
    width, skips, rows = base * mult[0], [base * mult[0]], []
    for level, side in enumerate(sides):
        if level:
            rows.append((f"enc.{side}x{side}_down", width, width, "down", False))
            skips.append(width)
        for i in range(settings["blocks"]):
            rows.append((f"enc.{side}x{side}_block{i}", width, base * mult[level], None, side in settings["attention"]))
            width = base * mult[level]
            skips.append(width)
    for level in range(last, -1, -1):
        side = sides[level]
        if level == last:
            rows += [(f"dec.{side}x{side}_in0", width, width, None, True), (f"dec.{side}x{side}_in1", width, width, None, False)]
        else:
            rows.append((f"dec.{side}x{side}_up", width, width, "up", False))
        for i in range(settings["blocks"] + 1):
            rows.append((f"dec.{side}x{side}_block{i}", width + skips.pop(), base * mult[level], None, side in settings["attention"]))
            width = base * mult[level]
    return rows


def nvidia_shapes(settings, classes=0, augment=0):
    base, side, shapes = settings["base"], settings["image_size"], {}

    def layer(name, *shape, bias=True, filtered=None):
        if shape:
            shapes[f"{name}.weight"] = shape
            if bias:
                shapes[f"{name}.bias"] = shape[:1]
        if filtered:
            shapes[f"{name}.resample_filter"] = (1, 1, 2, 2)

    if augment:
        layer("map_augment", base, augment, bias=False)
    layer("map_layer0", 4 * base, base)
    layer("map_layer1", 4 * base, 4 * base)
    if classes:
        layer("map_label", 4 * base, classes, bias=False)
    layer(f"enc.{side}x{side}_conv", base * settings["mult"][0], 3, 3, 3)
    for name, c_in, c_out, resample, attends in nvidia_blocks(settings):
        layer(f"{name}.norm0", c_in)
        layer(f"{name}.conv0", c_out, c_in, 3, 3, filtered=resample)
        layer(f"{name}.affine", 2 * c_out, 4 * base)
        layer(f"{name}.norm1", c_out)
        layer(f"{name}.conv1", c_out, c_out, 3, 3)
        if resample or c_in != c_out:
            layer(f"{name}.skip", *([c_out, c_in, 1, 1] if c_in != c_out else []), filtered=resample)
        if attends:
            layer(f"{name}.norm2", c_out)
            layer(f"{name}.qkv", 3 * c_out, c_out, 1, 1)
            layer(f"{name}.proj", c_out, c_out, 1, 1)
    layer("out_norm", c_out)
    layer("out_conv", 3, c_out, 3, 3)
    return shapes


def nvidia_weights(settings, classes=0, augment=0, prefix="model.", **how):
    state = random_weights(nvidia_shapes(settings, classes, augment), **how)
    return {prefix + name: torch.full((1, 1, 2, 2), 0.25) if "resample" in name else value for name, value in state.items()}


def nvidia_net(state, settings, x, c_noise, y=None):
    """F(x, ln(t)/4, label) of a DhariwalUNet, from its state dict."""
    state = {name.removeprefix("model."): value for name, value in state.items()}

    def conv(name, h, resample=None):
        if resample:
            kernel = state[f"{name}.resample_filter"].expand(h.shape[1], 1, 2, 2)
            h = (F.conv2d(h, kernel, stride=2, groups=h.shape[1]) if resample == "down" else
                 F.conv_transpose2d(h, 4 * kernel, stride=2, groups=h.shape[1]))
        weight = state.get(f"{name}.weight")
        return h if weight is None else F.conv2d(h, weight, state[f"{name}.bias"], padding=weight.shape[-1] // 2)

    def norm(name, h):
        return F.group_norm(h, min(32, h.shape[1] // 4), state[f"{name}.weight"], state[f"{name}.bias"], 1e-5)

    def linear(name, h):
        return F.linear(h, state[f"{name}.weight"], state.get(f"{name}.bias"))

    half = settings["base"] // 2
    angles = c_noise[:, None] * (1 / 10000) ** (torch.arange(half) / half)
    emb = linear("map_layer1", F.silu(linear("map_layer0", torch.cat([angles.cos(), angles.sin()], 1))))
    if y is not None:
        emb = emb + linear("map_label", F.one_hot(y, state["map_label.weight"].shape[1]).float())
    emb = F.silu(emb)

    side = settings["image_size"]
    x = conv(f"enc.{side}x{side}_conv", x)
    skips = [x]
    for name, c_in, c_out, resample, attends in nvidia_blocks(settings):
        if x.shape[1] != c_in:
            x = torch.cat([x, skips.pop()], 1)
        scale, shift = linear(f"{name}.affine", emb)[:, :, None, None].chunk(2, 1)
        h = conv(f"{name}.conv0", F.silu(norm(f"{name}.norm0", x)), resample)
        h = conv(f"{name}.conv1", F.silu(norm(f"{name}.norm1", h) * (scale + 1) + shift))
        x = h + conv(f"{name}.skip", x, resample)
        if attends:
            qkv = conv(f"{name}.qkv", norm(f"{name}.norm2", x))
            q, k, v = qkv.view(len(x), c_out // 64, 64, 3, -1).unbind(3)  # (B,heads,64,HW) each
            w = torch.einsum("bhcq,bhck->bhqk", q, k / 8).softmax(-1)
            x = x + conv(f"{name}.proj", torch.einsum("bhqk,bhck->bhcq", w, v).reshape(x.shape))
        if name.startswith("enc"):
            skips.append(x)
    assert not skips
    return conv("out_conv", F.silu(norm("out_norm", x)))


def nvidia_denoiser(state, settings, y=None):
    """D(x, t) = c_skip x + c_out F(c_in x, ln(t)/4): EDM Table 1 with sigma_data = 0.5."""
    def D(x, t):
        s = t.view(-1, 1, 1, 1)
        root = (s**2 + 0.25).sqrt()
        return 0.25 / root**2 * x + 0.5 * s / root * nvidia_net(state, settings, x / root, t.log() / 4, y)
    return D


NVIDIA = {
    "attention at the coarse level": dict(image_size=16, base=128, mult=(1, 2), blocks=1, attention=(8,)),
    "attention at every other level": dict(image_size=16, base=128, mult=(1, 2, 1), blocks=2, attention=(16, 4)),
    "attention between": dict(image_size=16, base=192, mult=(1, 1, 2), blocks=1, attention=(8,)),
    "attention in the middle only": dict(image_size=8, base=128, mult=(2, 1), blocks=3, attention=()),
    "one level": dict(image_size=8, base=128, mult=(1,), blocks=1, attention=(8,)),
}


@pytest.mark.parametrize("classes, augment, prefix", [(10, 0, "model."), (0, 9, "")], ids=["labels", "no labels"])
@pytest.mark.parametrize("case", NVIDIA)
@torch.no_grad()
def test_nvidias_network_is_ours(case, classes, augment, prefix):
    settings = NVIDIA[case]
    state = nvidia_weights(settings, classes, augment, prefix)
    net = common.UNet(**settings, head_channels=64, classes=classes, time_scale=1e-3).eval()
    net.load_state_dict(common.from_nvidia(state))
    B, side = 3, settings["image_size"]
    x = torch.randn(B, 3, side, side, generator=torch.Generator().manual_seed(1))
    t, y = torch.tensor([0.01, 1.3, 60.0]), torch.tensor([1, 0, 9]) if classes else None
    expected = nvidia_net(state, settings, x, t.log() / 4, y)
    assert expected.std() > 0.1
    close(net(x, 250 * t.log(), y), expected, 1e-5, 1e-5)
    x = x * t.view(-1, 1, 1, 1)
    close(common.denoise(net, x, t, y), nvidia_denoiser(state, settings, y)(x, t), 1e-5, 1e-5)


@pytest.mark.parametrize("classes", [0, 10])
def test_nvidias_names_are_recognised(shrunk, tmp_path, classes):
    state = nvidia_weights(SMALL_NVIDIA, classes)
    torch.save(state, tmp_path / "weights.pt")
    net, found = common.load_network(tmp_path / "weights.pt", ("cd",))
    ours = common.from_nvidia(state)
    assert_usable(net, found, {name: ours[name] for name in net.state_dict()})
    assert (net.classes, net.time_scale) == (classes, 1e-3)


def test_nvidias_imagenet_model_is_recognised(tmp_path):
    """edm-imagenet-64x64-cond-adm: 295,899,267 parameters in 541 tensors, beside the constants."""
    state = nvidia_weights(common.NETS["imagenet64"], 1000, cheap=True)
    parameters = [value for name, value in state.items() if "resample_filter" not in name]
    assert len(parameters) == 541 and sum(value.numel() for value in parameters) == 295_899_267 and len(state) == 541 + 12
    assert {name: list(value.shape) for name, value in common.from_nvidia(state).items()} == SHAPES["imagenet64"]
    torch.save(state, tmp_path / "weights.pt")
    net, found = common.load_network(tmp_path / "weights.pt", ("cd",))
    assert net.classes == 1000 and found["model_args"] == common.NETS["imagenet64"] | dict(classes=1000, time_scale=1e-3)
    assert torch.equal(net.label_emb.weight, state["model.map_label.weight"].T)
    at = "model.dec.8x8_in0.qkv.bias"  # the 768 channels of (head 5, channel 40, v): 12 heads of 64
    assert net.middle_block[1].qkv.bias[2 * 768 + 5 * 64 + 40] == state[at][(5 * 64 + 40) * 3 + 2]


NOT_NVIDIAS = {
    "missing": lambda state: state.pop("model.dec.4x4_in0.qkv.bias"),
    "extra": lambda state: state.update({"model.enc.4x4_block7.conv0.bias": torch.zeros(128)}),
    "wrong shape": lambda state: state.update({"model.out_conv.bias": torch.zeros(6)}),
    "another part": lambda state: state.update({"model.head.4x4_block0.conv0.bias": torch.zeros(3)}),
    "another layer": lambda state: state.update({"model.enc.4x4_down.conv2.weight": torch.zeros(3)}),
    "qkv that does not divide": lambda state: state.update({"model.dec.4x4_in0.qkv.bias": torch.zeros(7)}),
    "labels without an axis": lambda state: state.update({"model.map_label.weight": torch.tensor(0.0)}),
    "decoder from its end": lambda state: [state.pop(name) for name in list(state) if "_in" in name or "block" in name],
    "a network of other make": lambda state: [state.pop(name) for name in list(state) if "map_layer0" not in name],
}


@pytest.mark.parametrize("wrong", NOT_NVIDIAS)
def test_what_is_not_nvidias_network_is_refused(shrunk, tmp_path, wrong):
    state = nvidia_weights(SMALL_NVIDIA, 10)
    NOT_NVIDIAS[wrong](state)
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(common.UserError, match="weights.pt: these weights fit none of"), warnings.catch_warnings(action="error"):
        common.load_network(tmp_path / "weights.pt", ("cd",))


@pytest.mark.parametrize("name, changes", [("cifar-small", {}), ("cifar10", dict(base=64))])
def test_nvidias_narrow_networks_are_refused(monkeypatch, tmp_path, name, changes):
    """Same names and shapes, another function: below 128 channels it has fewer groups, and heads are of 64 channels always."""
    monkeypatch.setitem(common.NETS, name, common.NETS[name] | changes)
    torch.save(nvidia_weights(common.NETS[name]), tmp_path / "weights.pt")
    with pytest.raises(common.UserError, match="weights.pt: these weights fit none of"):
        common.load_network(tmp_path / "weights.pt", ("cd",))


# ---- at once usable

class Code:
    """What a file can do when it is unpickled."""
    def __reduce__(self):
        return os.system, ("touch ran_code",)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with both kinds of released weights, data with labels 0 to 9, and everything that is refused."""
    folder = tmp_path_factory.mktemp("released")
    torch.save(random_weights(SHAPES["unet_A_tiny"]), folder / "openai.pt")
    torch.save(nvidia_weights(SMALL_NVIDIA, 10), folder / "nvidia.pt")
    torch.save(nvidia_weights(SMALL_NVIDIA, prefix=""), folder / "unconditional.pt")
    images = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), dtype=np.uint8)
    np.savez(folder / "ten.npz", images, np.arange(20) % 10)
    np.savez(folder / "three.npz", images, np.arange(20) % 3)
    np.savez(folder / "none.npz", images)
    Image.fromarray(images[0]).save(folder / "x.png")
    state = dict(script="cd", args=dict(stage="teacher"), model_args=TINY | dict(classes=10), ema=random_weights(SHAPES["unet_A_tiny"]))
    torch.save(state, folder / "teacher.pt")
    torch.save(state | dict(args=dict(stage="distill")), folder / "student.pt")
    torch.save(state | dict(script="ct", args={}), folder / "ct.pt")
    torch.save(dict(openai=Code()), folder / "code.pt")
    torch.save(dict(openai=Code()), folder / "old.pt", _use_new_zipfile_serialization=False)
    (folder / "pickle.pt").write_bytes(pickle.dumps(Code(), protocol=2))
    (folder / "snapshot.pkl").write_bytes(pickle.dumps(  # NVIDIA's: a network that brings its own source
        dict(ema=Code(), loss_fn=None, augment_pipe=None, dataset_kwargs={})))
    torch.save(dict(net=torch.nn.Linear(2, 2)), folder / "module.pt")  # NVIDIA's training state
    data = (folder / "openai.pt").read_bytes()
    (folder / "short.pt").write_bytes(data[:len(data) // 2])
    return folder


FORKS = """
import gc, json, os, tempfile, torch
with torch.device("meta"):  # imports much, the first time
    common.UNet(**common.NETS["imagenet64"])
gc.freeze()  # or each child would tidy up after torch, for a second
done = []
for flags in COMMANDS:
    files = [tempfile.TemporaryFile("w+") for _ in range(2)]
    child = os.fork()
    if child == 0:
        os.dup2(files[0].fileno(), 1)
        os.dup2(files[1].fileno(), 2)
        sys.argv[1:] = flags
        break
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    done.append([code, *(file.seek(0) or file.read() for file in files)])
else:
    print(json.dumps(done), flush=True)
    os._exit(0)
"""


def run_each(work, commands):
    """Run cd.py with each list of flags, forked from one process that has imported torch. Exit code, output and errors of each."""
    flags = [[str(flag) for flag in flags] for flags in commands.values()]
    done = run_script(script="cd.py", cwd=work, prelude=SHRUNK + FORKS.replace("COMMANDS", repr(flags)), code=0)
    return dict(zip(commands, json.loads(done.stdout), strict=True))


def openai_net(work):
    net = common.UNet(**TINY, classes=10).eval().requires_grad_(False)
    net.load_state_dict(torch.load(work / "openai.pt"))
    return net


DRAW = [*FLAGS, "--seed", 5, "--sample", 2, "--save"]
DISTIL = [*FLAGS, "--dataset", "ten.npz", "--total-steps", 2, "--batch-size", 4, "--micro-batch", 4, "--dist", "l2", "--N", 5,
          "--workers", 0, "--sample-every", 0]
USED = {
    "sample": ["--ckpt", "openai.pt", "--labels", 1, 7, *DRAW, "sample.npz"],
    "edit": ["--ckpt", "openai.pt", "--edit", "inpaint", "--image", "x.png", "--labels", 1, *DRAW, "edit.npz"],
    "teacher openai.pt": ["--ckpt", "openai.pt", "--stage", "teacher", "--labels", 1, 7, "--N", 3, *DRAW, "heun_openai.pt.npz"],
    "teacher nvidia.pt": ["--ckpt", "nvidia.pt", "--stage", "teacher", "--labels", 1, 7, "--N", 3, *DRAW, "heun_nvidia.pt.npz"],
    "distil openai.pt": ["--teacher", "openai.pt", *DISTIL, "--lr", 0, "--mu", 0.9, "--out-dir", "run_openai.pt"],
    "distil nvidia.pt": ["--teacher", "nvidia.pt", *DISTIL, "--lr", 0, "--mu", 0.9, "--out-dir", "run_nvidia.pt"],
    "unconditional": ["--teacher", "unconditional.pt", *DISTIL, "--lr", 1e-4, "--out-dir", "run"],
    "before": ["--ckpt", "nvidia.pt", *DRAW, "before.npz"],
    "after": ["--ckpt", "run_nvidia.pt/last.pt", *DRAW, "after.npz"],
}


@pytest.fixture(scope="module")
def used(work):
    return run_each(work, USED)


def drawn(work, used, command):
    code, _, errors = used[command]
    assert code == 0, errors
    return np.load(work / USED[command][-1])["arr_0"].astype(int)


def test_sample(work, used):
    """In one step, by the consistency function of the weights."""
    x_T = 80 * common.seeded_noise(range(2), 5)(torch.zeros(2, 3, 16, 16))
    f = common.consistency(openai_net(work), x_T, torch.full((2,), 80.0), torch.tensor([1, 7])).clamp(-1, 1)
    expected = common.to_uint8(f).numpy()
    assert np.abs(drawn(work, used, "sample") - expected).max() <= 1 and expected.std() > 5


def test_edit(work, used):
    """Two ways to fill a hole."""
    images, known, hole = drawn(work, used, "edit"), np.asarray(Image.open(work / "x.png")).astype(int), np.zeros((16, 16), bool)
    hole[4:12, 4:12] = True
    assert images.shape == (2, 16, 16, 3)
    assert np.abs(images - known)[:, ~hole].max() <= 1 and np.abs(images - known)[:, hole].max() > 50
    assert np.abs(images[0] - images[1])[hole].max() > 0


@pytest.mark.parametrize("file, size", [("openai.pt", 16), ("nvidia.pt", 8)])
def test_sample_a_teacher(work, used, file, size):
    """Heun's method on the denoiser of the weights, which --stage teacher says they are; NVIDIA's by the forward above."""
    net, y = openai_net(work), torch.tensor([1, 7])
    D = (lambda x, t: common.denoise(net, x, t, y)) if size == 16 else nvidia_denoiser(torch.load(work / file), SMALL_NVIDIA, y)
    x_T = 80 * common.seeded_noise(range(2), 5)(torch.zeros(2, 3, size, size))
    expected = common.to_uint8(common.heun_sample(D, x_T, 3)).numpy()
    assert np.abs(drawn(work, used, f"teacher {file}") - expected).max() <= 1 and expected.std() > 5
    assert "5 network call(s) each" in used[f"teacher {file}"][1]


@pytest.mark.parametrize("file", ["openai.pt", "nvidia.pt"])
def test_distil(work, used, file):
    """With a learning rate of 0 net, target and average stay what they began as: the teacher. The student knows how it was built."""
    code, _, errors = used[f"distil {file}"]
    assert code == 0, errors
    state, teacher = last(work / f"run_{file}"), torch.load(work / file)
    teacher = teacher if file == "openai.pt" else common.from_nvidia(teacher)
    assert state["step"] == 2 and state["skipped"] == 0
    for key in ("net", "target", "ema"):
        assert state[key].keys() == teacher.keys() and all(torch.equal(state[key][name], teacher[name]) for name in teacher), key
    settings = dict(classes=10, dropout=0.0, extra=False)
    assert state["model_args"] == (TINY if file == "openai.pt" else SMALL_NVIDIA | dict(time_scale=1e-3)) | settings


def test_student_draws_as_its_teacher_did(work, used):
    """NVIDIA's scale of time goes with the weights."""
    assert np.array_equal(drawn(work, used, "before"), drawn(work, used, "after"))


def test_distil_an_unconditional_teacher(work, used):
    """Labels of the data are not asked for."""
    code, _, errors = used["unconditional"]
    assert code == 0, errors
    state, teacher = last(work / "run"), common.from_nvidia(torch.load(work / "unconditional.pt"))
    assert state["model_args"]["classes"] == 0 and "label_emb.weight" not in state["net"] and state["skipped"] == 0
    assert 0 < max((state["net"][name] - value).abs().max() for name, value in teacher.items()) < 1e-3


# ---- refused

REFUSED = {
    **{f"{what}, {flag}": ([flag, file], f"{file} is no checkpoint, or holds more than tensors") for flag in ("--ckpt", "--teacher")
       for what, file in (("code", "code.pt"), ("code, old format", "old.pt"), ("a pickle", "pickle.pt"),
                          ("NVIDIA's pickle", "snapshot.pkl"), ("a module", "module.pt"))},
    "missing": (["--teacher", "nowhere.pt"], "nowhere.pt: No such file"),
    "folder": (["--teacher", "."], ".: Is a directory"),
    "half a file": (["--teacher", "short.pt"], "short.pt is no checkpoint, or is damaged"),
    "student": (["--teacher", "student.pt"], "--teacher student.pt holds a student"),
    "another script's": (["--teacher", "ct.pt"], "ct.pt was written by ct.py"),
    "other classes": (["--teacher", "openai.pt", "--dataset", "three.npz"], "--teacher openai.pt knows 10 classes, and three.npz has 3"),
    "no labels": (["--teacher", "teacher.pt", "--dataset", "none.npz"], "--teacher teacher.pt knows 10 classes, and none.npz has 0"),
    "no null label": (["--teacher", "openai.pt", "--dataset", "ten.npz", "--w-max", "4"], "--w-max: openai.pt was trained without"),
    "network": (["--teacher", "openai.pt", *SMALL], "--net does not apply with --teacher FILE"),
    "conditioning": (["--teacher", "openai.pt", "--no-class-cond"], "--class-cond does not apply with --teacher FILE"),
    "stage": (["--teacher", "openai.pt", "--stage", "teacher"], "--teacher does not apply with --stage teacher"),
    "levels of a teacher": (["--ckpt", "openai.pt", "--stage", "teacher", "--sigmas", "80", "1"],
                            "--sigmas does not apply to the teacher in openai.pt"),
    "editing by a teacher": (["--ckpt", "teacher.pt", "--edit", "denoise", "--image", "x.png", "--labels", "1"],
                             "--edit does not apply to the teacher in teacher.pt"),
    "grid of a student": (["--ckpt", "openai.pt", "--N", "18"], "--N does not apply to the consistency model in openai.pt"),
    "guidance": (["--ckpt", "openai.pt", "--w", "1"], "--w 1.0: openai.pt was trained for no guidance"),
    "no such label": (["--ckpt", "openai.pt", "--labels", "10"], "labels 0 to 9"),
    "edit what?": (["--ckpt", "openai.pt", "--edit", "inpaint", "--image", "x.png"], "--labels"),
}


@pytest.fixture(scope="module")
def refusals(work):
    return run_each(work, {case: [*([*DISTIL, "--out-dir", f"refused {case}"] if "--teacher" in flags and case != "stage" else ()), *flags]
                           for case, (flags, _) in REFUSED.items()})


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(work, refusals, case):
    code, _, errors = refusals[case]
    lines = errors.strip().splitlines()
    assert code == 2 and len(lines) == 1 and lines[0].startswith("cd.py: error: ") and REFUSED[case][1] in lines[0], errors
    assert not (work / f"refused {case}").exists()


def test_no_code_ran(work, refusals):
    assert not (work / "ran_code").exists()
