"""The network against the reference implementation: names, shapes, values, dropout, compute dtypes."""
import copy
import math

import pytest
import torch

import common
from util import TINY, VECTORS, chirp, close, fill, gauss, img


def reference_net(**changes):
    return fill(common.UNet(**(TINY | dict(classes=10) | changes))).eval()


def reference_call(net, **extra):
    y = torch.tensor([1, 7]) if net.classes else None
    with torch.no_grad():
        return net(img((2, 3, 16, 16)), torch.tensor([-100.0, 250.0]), y, **extra)


def test_net_A_entry_by_entry():
    net, seen = reference_net(), {}
    named = dict(net.named_modules())
    for name in VECTORS["unet_A"]["activations"]:
        named[name].register_forward_hook(lambda module, args, out, name=name: seen.update({name: out}))
    out = reference_call(net)
    for name, first8 in VECTORS["unet_A"]["activations"].items():
        close(seen[name].flatten()[:8], first8, 1e-5, 5e-6)
    close(out, VECTORS["unet_A"]["out"], 1e-5, 5e-6)


@pytest.mark.parametrize("key, changes", [("unet_B", dict(classes=0, scale_shift=False)), ("unet_C", dict(resblock_updown=False))])
def test_nets_B_and_C(key, changes):
    net = reference_net(**changes)
    assert sum(p.numel() for p in net.parameters()) == VECTORS[key]["n_params"]
    close(reference_call(net).flatten()[::16], VECTORS[key]["out_every_16"], 1e-5, 5e-6)


@pytest.mark.parametrize("key, settings", [("unet_A_tiny", TINY | dict(classes=10)),
                                           ("imagenet64", common.NETS["imagenet64"] | dict(classes=1000)),
                                           ("lsun256", common.NETS["lsun256"])])
def test_released_names_and_shapes(key, settings):
    with torch.device("meta"):
        net = common.UNet(**settings)
    assert {name: list(p.shape) for name, p in net.state_dict().items()} == VECTORS["shapes"][key]
    assert list(net.state_dict()) == list(VECTORS["shapes"][key])  # in the order of the files, too
    if key in VECTORS["param_counts"]:
        assert sum(p.numel() for p in net.parameters()) == VECTORS["param_counts"][key]


def test_sinusoidal_embedding():
    table = VECTORS["embedding"]
    t = torch.tensor([0, 1, *(250 * math.log(sigma) for sigma in (0.5, 0.002, 80)), 999])
    close(t, table["t"])
    # At |t| of 1000 a float32 angle is known to 6e-5
    close(common.sinusoidal_embedding(t, 8), sum(table["dim8"], []), 1e-5, 1e-4)
    close(common.sinusoidal_embedding(t, 7), sum(table["dim7"], []), 1e-5, 1e-4)
    wide = common.sinusoidal_embedding(t, 192)
    close(torch.cat([wide[:, :4], wide[:, 96:100]], 1), sum(table["dim192_first4_cos_and_first4_sin"], []), 1e-5, 1e-4)


class FusedOnly(torch.Tensor):
    """Says it is on another device, to take the code path of accelerators on the CPU."""
    @property
    def device(self):
        return torch.device("cuda")


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: x.as_subclass(FusedOnly)], ids=["cpu", "fused"])
def test_attention_channel_order(wrap):
    """q of all heads, then k, then v: on the CPU's path and through scaled_dot_product_attention."""
    block = common.AttentionBlock(64, 32)
    qkv = torch.tensor(chirp(2 * 192 * 9, 2.0), dtype=torch.float32).reshape(2, 192, 3, 3)
    block.norm, block.proj_out, block.qkv.forward = torch.nn.Identity(), torch.nn.Identity(), lambda x: wrap(qkv)
    h = block(wrap(torch.zeros(2, 64, 3, 3))).as_subclass(torch.Tensor)
    close(h.flatten()[::8], VECTORS["attention"], 1e-5, 1e-6)


def test_zero_initialised_layers():
    """A new net answers 0, and its residual and attention blocks pass their input on."""
    torch.manual_seed(0)
    net = common.UNet(**TINY)
    assert not net(gauss((2, 3, 16, 16), 1), torch.zeros(2)).any()
    h, emb = torch.randn(2, 32, 16, 16), torch.randn(2, 128)
    assert torch.equal(net.input_blocks[1](h, emb, None), h)
    h = torch.randn(2, 64, 8, 8)
    assert torch.equal(net.middle_block(h, emb, None), h)


def test_norm_is_float32_inside():
    norm, x = common.GroupNorm32(64), (1000 + torch.randn(2, 64, 8, 8)).bfloat16()
    h = x.double().view(2, 32, -1)
    expected = ((h - h.mean(-1, True)) / (h.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()).view(x.shape)
    for path in (x, x.as_subclass(FusedOnly)):
        out = norm(path).as_subclass(torch.Tensor)
        assert out.dtype == torch.bfloat16
        close(out, expected, 0.01, 0.01)


def test_extra_input_changes_nothing_at_first():
    torch.manual_seed(0)
    plain, more = reference_net(), common.UNet(**TINY, classes=10, extra=True).eval()
    missing, unexpected = more.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and all(name.startswith("time_embed_s.") or ".emb_layers_s." in name for name in missing)
    assert len(missing) == 4 + 2 * sum(isinstance(m, common.ResBlock) for m in more.modules())
    for s in (0.0, 3.0):
        assert torch.equal(reference_call(more, extra=torch.full((2,), s)), reference_call(plain))
    fill(more)
    a, b = (reference_call(more, extra=torch.full((2,), s)) for s in (0.0, 3.0))
    assert (a - b).abs().max() > 0.01
    net = common.UNet(**TINY, extra=True)
    fill(net)(torch.randn(2, 3, 16, 16), torch.zeros(2), None, torch.ones(2)).sum().backward()
    assert all(p.grad.abs().sum() > 0 for name, p in net.named_parameters() if "_s." in name)


def test_bfloat16_stays_close_and_keeps_float32_outside():
    net, half = reference_net(), reference_net()
    half.dtype, seen = torch.bfloat16, {}
    for name in ("time_embed", "input_blocks.1.0.emb_layers", "input_blocks.1", "middle_block", "out"):
        half.get_submodule(name).register_forward_hook(lambda m, a, out, name=name: seen.update({name: out.dtype}))
    error = (reference_call(net) - reference_call(half)).abs().max()
    assert 0 < error < 0.15  # the reference in float16, 8 times as precise, is 0.018 off
    assert seen == {"time_embed": torch.float32, "input_blocks.1.0.emb_layers": torch.float32, "out": torch.float32,
                    "input_blocks.1": torch.bfloat16, "middle_block": torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in half.parameters())


@pytest.mark.parametrize("settings", [dict(image_size=8, mult=(1,), attention=()), dict(image_size=24, mult=(1, 2, 1), attention=(6, 24)),
                                      dict(image_size=16, base=96, mult=(1,), attention=(16,), channels=1),
                                      dict(image_size=48, mult=(1, 1, 1, 1, 1), blocks=2, attention=(12,))])
def test_other_sizes(settings):
    settings = TINY | settings
    x = torch.randn(2, settings.get("channels", 3), settings["image_size"], settings["image_size"])
    net = fill(common.UNet(**settings))
    assert net(x, torch.zeros(2)).shape == x.shape
    found = sum(isinstance(m, common.AttentionBlock) for m in net.modules())
    assert found == 1 + len(settings["attention"]) * (2 * settings["blocks"] + 1)


@pytest.mark.parametrize("settings", [dict(image_size=4), dict(image_size=20, mult=(1, 1, 1, 1)), dict(base=40),
                                      dict(base=96, head_channels=64)])
def test_sizes_that_do_not_fit(settings):
    with pytest.raises(ValueError):
        common.UNet(**(TINY | settings))


def test_dropout_sits_before_the_last_convolution_and_sleeps_in_eval():
    net = fill(common.UNet(**TINY, dropout=0.5))
    x, t = img((2, 3, 16, 16)), torch.zeros(2)
    torch.manual_seed(0)
    assert not torch.equal(net(x, t), net(x, t))
    net.eval()
    assert torch.equal(net(x, t), net(x, t))
    assert all(isinstance(m.out_layers[2], torch.nn.Dropout) for m in net.modules() if isinstance(m, common.ResBlock))


def test_ema_update():
    torch.manual_seed(0)
    net = common.UNet(**TINY)
    average = copy.deepcopy(net)
    before = [p.clone().double() for p in average.parameters()]
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn_like(p))
    common.ema_update(average, net, 0.9)
    for old, new, now in zip(before, net.parameters(), average.parameters()):
        close(now.detach(), 0.9 * old + 0.1 * new.detach().double(), 1e-6, 1e-7)
    common.ema_update(average, net, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(average.parameters(), net.parameters()))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_flat_gradients_are_the_gradients(layout):
    torch.manual_seed(0)
    nets = [fill(common.UNet(**TINY)) for _ in range(2)]
    nets[0].to(memory_format=layout)
    buffer, tail = common.flatten_gradients(nets[0], 3)
    for net in nets:
        net(img((2, 3, 16, 16)).contiguous(memory_format=layout), torch.zeros(2)).square().mean().backward()
    for p, q in zip(*(net.parameters() for net in nets)):
        assert p.grad.stride() == p.stride() and p.grad.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
        close(p.grad, q.grad, 1e-4, 1e-6)
    assert not tail.any() and len(tail) == 3
    norm = sum(q.grad.double().square().sum() for q in nets[1].parameters()).sqrt()
    close(buffer.double().norm(), norm, 1e-5)


# ---- LPIPS

def reference_lpips(pool):
    lpips = common.LPIPS(pretrained=False)
    features, i = [m for part in lpips.model.net.children() for m in part], 0
    state = {}
    for i, layer in enumerate(features):
        if isinstance(layer, torch.nn.Conv2d):
            state |= {f"{i}.weight": layer.weight, f"{i}.bias": layer.bias}

    class Names:  # fill() by the reference's names
        state_dict = staticmethod(lambda: state)

        @staticmethod
        def load_state_dict(new):
            for name, p in state.items():
                p.data.copy_(new[name])
    fill(Names)
    for j, lin in enumerate(lpips.model.lins):
        lin.model[-1].weight.data.copy_(torch.tensor(abs(chirp(lin.model[-1].weight.numel(), j))).view_as(lin.model[-1].weight))
    if pool == "max":
        for part in lpips.model.net.children():
            for name, layer in part.named_children():
                if isinstance(layer, torch.nn.AvgPool2d):
                    setattr(part, name, torch.nn.MaxPool2d(2))
    return lpips


@pytest.fixture(scope="module")
def lpips_nets():
    pytest.importorskip("lpips")
    return {pool: reference_lpips(pool) for pool in ("average", "max")}


def test_lpips_vectors(lpips_nets):
    x, y = img((2, 3, 32, 32), 0.1, 0.9), img((2, 3, 32, 32), 1.3, 0.7)
    close(lpips_nets["average"](x, y), VECTORS["lpips"]["avgpool_after_bilinear_224"], 1e-4)
    close(lpips_nets["average"].model(x, y), VECTORS["lpips"]["avgpool"], 1e-4)
    close(lpips_nets["max"].model(x, y), VECTORS["lpips"]["maxpool"], 1e-4)


def test_lpips_keeps_large_images_as_they_are(lpips_nets):
    sizes = []
    hook = lpips_nets["average"].model.scaling_layer.register_forward_pre_hook(lambda m, x: sizes.append(x[0].shape[-1]))
    x = torch.zeros(1, 3, 256, 256)
    lpips_nets["average"](x, x)
    lpips_nets["average"](x[..., :64, :64], x[..., :64, :64])
    hook.remove()
    assert sizes == [256, 256, 224, 224]


def test_lpips_gradient_reaches_the_image_only(lpips_nets):
    x = img((1, 3, 32, 32), 0.1).requires_grad_()
    lpips_nets["average"](x, img((1, 3, 32, 32), 1.3)).backward()
    assert x.grad.abs().sum() > 0 and all(p.grad is None for p in lpips_nets["average"].parameters())
