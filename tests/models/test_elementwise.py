"""Norms, SwiGLU and rotations, whose gradients are written by hand.

Values and gradients are those of the plain formulas in fp64.
"""

import math
import shutil

import pytest
import torch
from torch import nn

from src.errors import UserError
from src.models import elementwise
from src.models.elementwise import HeadNorm, RMSNorm, compile_elementwise, rms_norm, rotate, swiglu

EPS = 1e-2  # large enough to matter
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=("fp32", "bf16"))
WIDER = 6  # columns before and after what is looked at


def normed(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


def gated(joined):
    gate, up = joined[..., : joined.size(-1) // 2], joined[..., joined.size(-1) // 2 :]
    return gate / (1 + (-gate).exp()) * up


def turned(x, angles):
    """Pairs turned by their angles; x: [N, heads, d], angles: [N, d / 2]."""
    cos, sin = angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)  # [N, 1, d / 2]
    even, odd = x[..., ::2], x[..., 1::2]  # [N, heads, d / 2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


def whole(x):
    return x


def columns(*shape):
    """[N, …] out of the middle of rows that are wider."""
    return lambda wide: wide[:, WIDER : WIDER + math.prod(shape)].unflatten(-1, shape)


def swapped(x):
    return x.transpose(0, 1)


LAYOUTS = {  # what is made, and how the input is seen in it
    "2 axes": ((5, 12), whole),
    "3 axes": ((4, 3, 8), whole),
    "one row": ((1, 12), whole),
    "2 axes, sliced": ((5, 12 + 2 * WIDER), columns(12)),
    "3 axes, sliced": ((4, 3 * 8 + 2 * WIDER), columns(3, 8)),
    "3 axes, swapped": ((3, 4, 8), swapped),
}
EACH_LAYOUT = pytest.mark.parametrize("layout", LAYOUTS)


def drawn(shape, dtype=torch.float32, seed=0):
    return (1.5 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def close(ours, wanted, tolerance, what):
    assert ours.shape == wanted.shape
    worst = (ours.double() - wanted).abs() - tolerance * wanted.abs()
    assert float(worst.max()) <= tolerance * float(wanted.abs().max()), what


def check(function, reference, inputs, wants=None, up=None):
    """function and reference of the same inputs.

    Inputs that are not in `wants` (default: all) require no gradient.
    """
    dtype, wants = inputs[0].dtype, range(len(inputs)) if wants is None else wants
    ours = [x.clone().requires_grad_(i in wants) for i, x in enumerate(inputs)]
    theirs = [x.double().requires_grad_(i in wants) for i, x in enumerate(inputs)]
    out, wanted = function(*ours), reference(*theirs)
    assert out.dtype == dtype
    close(out.detach(), wanted.detach(), TOLERANCE[dtype], "value")
    up = drawn(wanted.shape, dtype, seed=9) if up is None else up(wanted.shape).to(dtype)
    before = [x.detach().clone() for x in ours]
    out.backward(up)
    wanted.backward(up.double())
    for i, (a, b) in enumerate(zip(ours, theirs)):
        assert torch.equal(a.detach(), before[i])
        if i in wants:
            assert a.grad.dtype == dtype
            close(a.grad, b.grad, TOLERANCE[dtype], f"gradient of input {i}")
        else:
            assert a.grad is None


def norm_inputs(layout, dtype=torch.float32):
    shape, view = LAYOUTS[layout]
    x = drawn(shape, dtype)
    return view, [x, drawn(view(x).size(-1), dtype, seed=1)]


@DTYPES
@EACH_LAYOUT
def test_rms_norm(layout, dtype):
    view, inputs = norm_inputs(layout, dtype)
    check(lambda x, w: rms_norm(view(x), w, EPS), lambda x, w: normed(view(x), w), inputs)


@pytest.mark.parametrize("wants", ([0], [1]), ids=("frozen weight", "frozen input"))
@EACH_LAYOUT
def test_rms_norm_when_one_of_the_two_requires_no_gradient(layout, wants):
    view, inputs = norm_inputs(layout)
    check(lambda x, w: rms_norm(view(x), w, EPS), lambda x, w: normed(view(x), w), inputs, wants)


@pytest.mark.parametrize("scale", (0.0, 1e-4, 1e4))
def test_rms_norm_of_what_epsilon_decides_and_of_what_it_does_not(scale):
    x, w = scale * drawn((3, 12)), drawn(12, seed=1)
    check(lambda x, w: rms_norm(x, w, EPS), normed, [x, w])


@pytest.mark.parametrize("kind", (RMSNorm, HeadNorm))
@DTYPES
@EACH_LAYOUT
def test_the_modules_are_the_function_with_their_weight(parallel, kind, layout, dtype):
    view, (x, w) = norm_inputs(layout, dtype)
    norm = kind(nn.Parameter(w.clone()), EPS)
    check(lambda x: norm(view(x)), lambda x: normed(view(x), w.double()), [x])
    wanted = w.double().requires_grad_()
    normed(view(x.double()), wanted).backward(drawn(view(x).shape, dtype, seed=9).double())
    close(norm.weight.grad, wanted.grad, TOLERANCE[dtype], "gradient of the weight")
    assert isinstance(norm, nn.RMSNorm)
    assert [name for name, _ in norm.named_parameters()] == ["weight"]


@DTYPES
@EACH_LAYOUT
def test_swiglu(layout, dtype):
    shape, view = LAYOUTS[layout]
    check(lambda x: swiglu(view(x)), lambda x: gated(view(x)), [drawn(shape, dtype)])


def test_swiglu_far_from_zero_stays_finite():
    x = torch.tensor([[-500.0, -90.0, 0.0, 90.0, 500.0, 2.0, -3.0, 4.0, -5.0, 6.0]])
    check(swiglu, gated, [x])


ROTATED = {name: layout for name, layout in LAYOUTS.items() if name.startswith("3")}


@DTYPES
@pytest.mark.parametrize("layout", ROTATED)
def test_rotate(layout, dtype):
    shape, view = ROTATED[layout]
    angles = 3 * drawn((4, 4), seed=2)
    rotary = torch.polar(torch.ones_like(angles), angles)
    inputs = [drawn(shape, dtype)]
    check(lambda x: rotate(view(x), rotary), lambda x: turned(view(x), angles.double()), inputs)


def test_rotate_also_scales():
    """As YaRN's attention factor and Qwen's logn do: the gradient is scaled too."""
    angles, scale = 3 * drawn((4, 4), seed=2), drawn((4, 1), seed=3).abs() + 0.5
    rotary = torch.polar(scale.expand(4, 4).contiguous(), angles)
    factor, inputs = scale.double().unsqueeze(1), [drawn((4, 3, 8))]
    check(lambda x: rotate(x, rotary), lambda x: turned(x, angles.double()) * factor, inputs)


def columns_of_a_wider_one(shape):
    return drawn((*shape[:-1], 2 * shape[-1]), seed=4)[..., 2 : 2 + shape[-1]]


UPSTREAM = {
    "one number for all": lambda shape: torch.ones(()).expand(shape),
    "swapped axes": lambda shape: drawn((shape[1], shape[0], *shape[2:]), seed=4).transpose(0, 1),
    "columns of a wider one": columns_of_a_wider_one,
}


@pytest.mark.parametrize("up", UPSTREAM)
@pytest.mark.parametrize("name", ("rms_norm", "swiglu", "rotate"))
def test_gradients_from_above_may_lie_in_memory_as_they_like(name, up):
    x, weight, angles = drawn((4, 3, 8)), drawn(8, seed=1), 3 * drawn((4, 4), seed=2)
    rotary = torch.polar(torch.ones_like(angles), angles)
    ours, plain, inputs = {
        "rms_norm": (lambda x, w: rms_norm(x, w, EPS), normed, [x, weight]),
        "swiglu": (swiglu, gated, [x]),
        "rotate": (lambda x: rotate(x, rotary), lambda x: turned(x, angles.double()), [x]),
    }[name]
    check(ours, plain, inputs, up=UPSTREAM[up])


@pytest.fixture
def compiled(monkeypatch):
    """The table of compiled functions, empty, and as it was again afterwards."""
    monkeypatch.setattr(elementwise, "_compiled", {})
    return elementwise._compiled


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="on a GPU torch.compile needs no C++ compiler"
)
def test_compiling_without_a_compiler_is_refused(compiled, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"install g\+\+"):
        compile_elementwise()
    assert not compiled


@pytest.mark.skipif(
    shutil.which("g++") is None, reason="no g++: torch.compile cannot work on the CPU"
)
def test_compiled_functions_give_the_same_for_any_number_of_rows(compiled, monkeypatch, request):
    from torch._inductor import config

    settings = {
        "cpp.vec_isa_ok": True,  # these three: a third of the time
        "compile_threads": 1,
        "cpp_cache_precompile_headers": False,
        "cpp.cxx": (None, "g++"),
    }
    for name, value in settings.items():
        monkeypatch.setattr(config, name, value)
    monkeypatch.delenv("CXX", raising=False)
    request.addfinalizer(torch._dynamo.reset)
    calls = []
    compile_elementwise()
    assert sorted(compiled) == ["rms_norm", "swiglu"]

    def counted(name, function):
        def run(*inputs):
            calls.append(name)
            return function(*inputs)

        return run

    for name, function in list(compiled.items()):
        compiled[name] = counted(name, function)
    weight = drawn(8, seed=1)
    for rows in (3, 7):
        check(lambda x, w: rms_norm(x, w, EPS), normed, [drawn((rows, 8)), weight])
        check(swiglu, gated, [drawn((rows, 8))])
    assert sorted(calls) == ["rms_norm"] * 2 + ["swiglu"] * 2
