"""Operators with compressed activations: exact forward, the usual gradient at x_hat, and what they really keep."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gossamer.core.errors import RecipeError
from gossamer.kernels import cpu
from gossamer.ops import compressed
from gossamer.ops.act_store import ActStore, NoiseSource


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


X, W, B = normal(4, 9, 24), normal(24, 24, seed=1), normal(24, seed=2)
Q, K = normal(2, 3, 9, 8), normal(2, 3, 9, 8, seed=1)
IMAGE, FILTER = normal(2, 6, 8, 8), normal(6, 3, 3, 3, seed=1)
GEOMETRY = ((2, 2), (1, 1), (1, 1), 2)
Op = Callable[..., Tensor]
CASES: dict[str, tuple[Op, Op, tuple[Tensor, ...], tuple[int, ...], int]] = {
    # name: compressed, plain, inputs, which of them are kept, dimension of the groups
    "linear": (lambda x, w, b, s: compressed.linear(x, w, b, *s), F.linear, (X, W, B), (0,), -1),
    "matmul": (
        lambda a, b, s: compressed.matmul(a, b.transpose(-2, -1), *s), lambda a, b: a @ b.transpose(-2, -1),
        (Q, K), (0, 1), 1,
    ),
    "gelu": (lambda x, s: compressed.gelu(x, *s), F.gelu, (X,), (0,), -1),
    "gelu tanh": (
        lambda x, s: compressed.gelu(x, *s, approximate="tanh"), lambda x: F.gelu(x, approximate="tanh"),
        (X,), (0,), -1,
    ),
    "layer norm": (
        lambda x, w, b, s: compressed.layer_norm(x, (24,), w, b, 1e-6, *s),
        lambda x, w, b: F.layer_norm(x, (24,), w, b, 1e-6), (X, B + 2, B), (0,), -1,
    ),
    "conv": (
        lambda x, w, b, s: compressed.conv2d(x, w, b, GEOMETRY, *s), lambda x, w, b: F.conv2d(x, w, b, *GEOMETRY),
        (IMAGE, FILTER, B[:6]), (0,), 1,
    ),
    "batch norm": (
        lambda x, w, b, s: compressed.batch_norm(x, w, b, (None, None), 0.1, 1e-5, *s),
        lambda x, w, b: F.batch_norm(x, None, None, w, b, True, 0.1, 1e-5), (IMAGE, B[:6] + 2, B[:6]), (0,), 1,
    ),
}  # fmt: skip


def stores(case: str, bits: int = 8, groups: int = 3) -> list[ActStore]:
    noise = NoiseSource()
    return [ActStore(groups, CASES[case][4], bits, noise=noise) for _ in CASES[case][3]]


def run(op: Op, inputs: tuple[Tensor, ...], *rest: object) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return output and the gradients of all inputs under a fixed output gradient."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = op(*leaves, *rest)
    grads = torch.autograd.grad(out, leaves, normal(*out.shape, seed=9).to(out.dtype))
    return out.detach(), grads


@pytest.fixture(params=["native", "plain"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "native" and not cpu.available():
        pytest.skip(f"native kernels {cpu.describe()}")
    if request.param == "plain":
        monkeypatch.setattr(cpu, "_native", None)
    return request.param


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_is_exact_and_gradients_are_the_formula_at_x_hat(case: str, dtype: torch.dtype, kernels: str) -> None:
    op, plain, inputs, kept, _ = CASES[case]
    inputs = tuple(x.to(dtype) for x in inputs)
    mine = stores(case)
    twins = copy.deepcopy(mine)  # give the same x_hat again: ranges and noise are functions of the calls so far
    out, grads = run(op, inputs, mine)
    expected, exact = run(plain, inputs)
    assert torch.equal(out, expected)
    hats = [twin.pack(x if case != "matmul" or i == 0 else x.transpose(-2, -1)) for i, (twin, x) in
            enumerate(zip(twins, [inputs[k] for k in kept], strict=True))]  # fmt: skip
    at_hat = _gradients_at(case, plain, inputs, kept, [h.values(dtype) for h in hats])
    close = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.06, "rtol": 0.03}
    for ours, theirs in zip(grads, at_hat, strict=True):
        torch.testing.assert_close(ours, theirs, **close)
    if case in ("linear", "conv"):  # input and bias gradients never saw x_hat
        assert torch.equal(grads[0], exact[0]) and torch.equal(grads[2], exact[2])
        assert not torch.equal(grads[1], exact[1])


def _gradients_at(
    case: str, plain: Op, inputs: tuple[Tensor, ...], kept: tuple[int, ...], hats: list[Tensor]
) -> list[Tensor]:
    """Return the plain operator's gradients at x_hat; statistics of normalisations stay those of x."""
    dtype = inputs[0].dtype
    if case in ("linear", "conv", "gelu", "gelu tanh"):
        return list(run(plain, (hats[0], *inputs[1:]))[1])
    if case == "matmul":
        grad = normal(2, 3, 9, 9, seed=9).to(dtype)
        return [grad @ hats[1].transpose(-2, -1), (hats[0].transpose(-2, -1) @ grad).transpose(-2, -1)]
    x, weight, bias = inputs
    grad = normal(*x.shape, seed=9).to(dtype)
    if case == "layer norm":
        _, mean, rstd = torch.native_layer_norm(x, (24,), weight, bias, 1e-6)
        return list(
            torch.ops.aten.native_layer_norm_backward(grad, hats[0], (24,), mean, rstd, weight, bias, [True] * 3)
        )
    _, mean, inverse = torch.native_batch_norm(x, weight, bias, None, None, True, 0.1, 1e-5)
    return list(
        torch.ops.aten.native_batch_norm_backward(
            grad, hats[0], weight, None, None, mean, inverse, True, 1e-5, [True] * 3
        )
    )


@pytest.mark.parametrize("case", CASES)
def test_kept_exactly_the_gradients_are_the_plain_ones(case: str) -> None:
    op, plain, inputs, _, _ = CASES[case]
    (out, grads), (expected, exact) = run(op, inputs, stores(case, bits=32)), run(plain, inputs)
    assert torch.equal(out, expected)
    for ours, theirs in zip(grads, exact, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


def probabilities(scores: Tensor, store: ActStore) -> Tensor:
    return compressed.softmax(scores, -1, store)


def test_softmax_needs_its_output_only(kernels: str) -> None:
    scores, store = normal(2, 3, 9, 9), ActStore(3, 1, noise=NoiseSource())
    twin = copy.deepcopy(store)
    out, (grad,) = run(probabilities, (scores,), store)
    assert torch.equal(out, scores.softmax(-1))
    hat, upstream = twin.pack(out).values(torch.float32), normal(2, 3, 9, 9, seed=9)
    torch.testing.assert_close(grad, hat * (upstream - (upstream * hat).sum(-1, keepdim=True)), atol=1e-6, rtol=1e-5)
    exact = ActStore(3, 1, bits=32)
    assert torch.autograd.gradcheck(
        lambda s: compressed.softmax(s, -1, exact), scores[:1, :, :3, :4].double().requires_grad_()
    )


@pytest.mark.parametrize("case", ["gelu", "layer norm"])
def test_gradcheck_of_the_stored_form(case: str) -> None:
    op, _, inputs, _, _ = CASES[case]
    leaves = [x.double().requires_grad_() for x in inputs]
    leaves[0] = leaves[0].detach()[:1, :3].requires_grad_()
    assert torch.autograd.gradcheck(lambda *a: op(*a, stores(case, bits=32)), leaves)


@pytest.mark.parametrize("high", [float("inf"), 6.0])
def test_relu_is_exact_from_one_bit(high: float) -> None:
    x = 5 * normal(3, 5, 7)
    x[0, 0, :3] = torch.tensor([0.0, 6.0, -0.0])
    plain = F.relu if high == float("inf") else F.relu6
    (out, (grad,)), (expected, (exact,)) = run(compressed.relu, (x,), high), run(plain, (x,))
    assert torch.equal(out, expected) and torch.equal(grad, exact)
    assert kept_bytes(lambda: compressed.relu(x.clone().requires_grad_(), high)) == -(-x.numel() // 8)


def kept_bytes(call: Callable[[], object]) -> int:
    kept: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        kept[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
        held.append(t)
        return t

    held: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        result = call()
    del result
    return sum(kept.values())


def test_probabilities_are_kept_once_for_softmax_and_product() -> None:
    scores, v = normal(2, 3, 9, 9).requires_grad_(), normal(2, 3, 9, 8).requires_grad_()
    a, b, c = (ActStore(3, 1) for _ in range(3))
    grids = 2 * 2 * 3 * 4
    one = kept_bytes(lambda: compressed.matmul(probabilities(scores, a), v, b, c))
    assert one == scores.numel() + v.numel() + grids and b.seen == 0
    two = kept_bytes(lambda: compressed.matmul(probabilities(scores, a) * 1.0, v, b, c))
    assert two == 2 * scores.numel() + v.numel() + grids * 3 // 2 and b.seen == 1
    release = ActStore(3, 1)
    three = kept_bytes(lambda: compressed.matmul(compressed.softmax(scores, -1, a, release), v, b, c))
    assert three == 3 * scores.numel() + v.numel() + 2 * grids


def test_a_changed_probability_tensor_is_packed_again() -> None:
    scores, v = normal(2, 3, 9, 9).requires_grad_(), normal(2, 3, 9, 8).requires_grad_()
    y = probabilities(scores, ActStore(3, 1))
    with torch.no_grad():
        y.mul_(0.5)
    store = ActStore(3, 1)
    compressed.matmul(y, v, store, ActStore(3, 1))
    assert store.seen == 1 and store.bounds.sum(0).max() <= 0.5


def test_what_no_gradient_needs_is_not_kept() -> None:
    store, x = ActStore(3, -1), X.clone().requires_grad_()
    assert kept_bytes(lambda: compressed.linear(x, W, B, store)) == W.numel() * 4
    assert store.seen == 0


def test_two_uses_before_the_backward_pass_read_their_own_grids() -> None:
    store = ActStore(1, -1, ema=0.0)
    weight = W.clone().requires_grad_()
    small, large = X, 100 * X + 50
    (first,) = torch.autograd.grad(compressed.linear(small, weight, None, copy.deepcopy(store)).sum(), weight)
    one = compressed.linear(small, weight, None, store)
    compressed.linear(large, weight, None, store)  # moves the range far away
    assert store.seen == 2
    (again,) = torch.autograd.grad(one.sum(), weight)
    assert torch.equal(first, again)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_moves_no_range(reentrant: bool) -> None:
    x, weight = X.clone().requires_grad_(), W.clone().requires_grad_()
    once, store = ActStore(3, -1), ActStore(3, -1)

    def layer(v: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return compressed.linear(v, weight, None, store)
        store.observe(v)
        return F.linear(v, weight)

    for scale in (1.0, 2.0):
        compressed.linear(scale * x, weight, None, once)
        checkpoint(layer, scale * x, use_reentrant=reentrant).sum().backward()
    assert store.seen == once.seen == 2
    assert torch.equal(store.bounds, once.bounds)


def test_shuffled_heads_give_shuffled_groups_and_the_same_gradients() -> None:
    order = torch.tensor([2, 0, 1])
    plain = run(CASES["matmul"][0], (Q, K), [ActStore(3, 1), ActStore(3, 1)])[1]
    mixed = run(
        lambda a, b, s: CASES["matmul"][0](a[:, order], b[:, order], s)[:, order.argsort()],
        (Q, K),
        [ActStore(3, 1), ActStore(3, 1)],
    )[1]
    for a, b in zip(plain, mixed, strict=True):
        assert torch.equal(a, b)


def test_gradient_of_the_weight_is_unbiased() -> None:
    store = ActStore(3, -1, bits=4, noise=NoiseSource())
    draws = [run(CASES["linear"][0], (X, W, B), [store])[1][1] for _ in range(400)]
    exact = run(F.linear, (X, W, B))[1][1]
    mean, error = torch.stack(draws).mean(0), torch.stack(draws).std(0) / 20
    assert ((mean - exact).abs() < 5 * error + 1e-4).all()


@pytest.mark.parametrize("case", ["linear", "matmul", "gelu", "layer norm"])
def test_autocast_gives_the_plain_forward(case: str) -> None:
    op, plain, inputs, _, _ = CASES[case]
    with torch.autocast("cpu", torch.bfloat16):
        (out, grads), (expected, exact) = run(op, inputs, stores(case, bits=32)), run(plain, inputs)
    assert out.dtype == expected.dtype and torch.equal(out, expected)
    for ours, theirs in zip(grads, exact, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize(("bits", "ema"), [(1, 0.9), (9, 0.9), (16, 0.9), (8, 1.0), (8, -0.1)])
def test_bad_settings_are_refused(bits: int, ema: float) -> None:
    with pytest.raises(RecipeError, match="allowed"):
        ActStore(3, -1, bits, ema)


def test_state_round_trip() -> None:
    store, other, wider = ActStore(3, -1), ActStore(3, -1), ActStore(4, -1)
    store.pack(X)
    for target in (other, wider):
        target.load_saved_state(store.saved_state())
    assert torch.equal(other.bounds, store.bounds) and other.seen == 1
    assert wider.seen == 0 and not store.state_dict()


def test_second_derivatives_are_refused() -> None:
    x = X.clone().requires_grad_()
    (grad,) = torch.autograd.grad(compressed.gelu(x, ActStore(3, -1)).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
