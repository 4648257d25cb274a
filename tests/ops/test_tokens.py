"""Token operations: selection, merging, rates, MACs, the track."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gossamer.core.errors import ModelError
from gossamer.ops.attention import Attended
from gossamer.ops.token_blocks import SizeWeightedPool, TokenBlock
from gossamer.ops.token_merge import assignment, gather_groups, match_bipartite, match_cosine, merge_mean, merge_size
from gossamer.ops.token_rates import (
    TokenMacs,
    keep_mask,
    keep_probability,
    kept_count,
    masked_softmax,
    ste_ceil,
    ste_min,
)
from gossamer.ops.tokens import (
    TokenTrack,
    find_track,
    rank_tokens,
    size_bias,
    take_tokens,
    token_importance,
    weighted_token_mean,
)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -- selection ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("batch", [1, 3])
def test_take_tokens_copies_rows(batch: int) -> None:
    x, index = draw(batch, 7, 4), torch.stack([torch.randperm(7)[:3] for _ in range(batch)])
    for value in (x, x[..., 0]):
        taken = take_tokens(value, index)
        assert all(torch.equal(taken[b], value[b, index[b]]) for b in range(batch))


@pytest.mark.parametrize("num_prefix", [0, 1, 5])
def test_rank_tokens_pins_the_prefix_and_sorts_the_rest(num_prefix: int) -> None:
    importance = draw(2, 12)
    index = rank_tokens(importance, num_prefix + 4, num_prefix)
    assert torch.equal(index[:, :num_prefix], torch.arange(num_prefix).expand(2, -1))
    best = importance.argsort(descending=True)[:, :4]
    assert torch.equal(index[:, num_prefix:] - num_prefix, best)
    loose = rank_tokens(importance, num_prefix + 4, num_prefix, ordered=False)
    assert torch.equal(loose.sort().values, index.sort().values)


@pytest.mark.parametrize("has_class", [True, False])
def test_importance_is_the_same_recomputed_or_read(has_class: bool) -> None:
    q, k, bias = draw(2, 3, 9, 4), draw(2, 3, 9, 4, seed=1), draw(2, 1, 1, 9, seed=2)
    attn = (q * 0.5 @ k.transpose(-2, -1) + bias).softmax(-1)
    hidden = token_importance(Attended(q, q, k, None), 0.5, bias, 1, has_class)
    read = token_importance(Attended(q, q, k, attn), 0.5, bias, 1, has_class)
    expected = attn[:, :, 0, 1:].mean(1) if has_class else attn.mean((1, 2))[:, 1:]
    torch.testing.assert_close(hidden, expected)
    torch.testing.assert_close(read, expected)


def test_size_bias_is_log_size() -> None:
    assert size_bias(None) is None
    torch.testing.assert_close(size_bias(torch.tensor([[1.0, 2.0]])).flatten(), torch.tensor([0.0, 0.6931472]))


def test_weighted_mean() -> None:
    x, weight = draw(2, 5, 3), draw(2, 5).abs().requires_grad_()
    mean = weighted_token_mean(x, weight)
    torch.testing.assert_close(mean, (x * weight[..., None]).sum(1) / weight.sum(1, keepdim=True))
    torch.testing.assert_close(weighted_token_mean(x, torch.ones(2, 5)), x.mean(1))
    free = torch.autograd.grad(weighted_token_mean(x, weight, detach_total=True).sum(), weight)[0]
    torch.testing.assert_close(free, (x / weight.sum(1)[:, None, None]).sum(-1))


# -- merging -----------------------------------------------------------------------------------------
def test_match_cosine_finds_the_most_similar_and_spares_the_prefix() -> None:
    src, dst = draw(2, 4, 6), draw(2, 5, 6, seed=1)
    index, similarity = match_cosine(src, dst, 2)
    cosine = nn.functional.cosine_similarity(src[:, :, None], dst[:, None], dim=-1)
    cosine[..., :2] = -2
    torch.testing.assert_close(similarity, cosine.max(-1).values)
    assert torch.equal(index, cosine.argmax(-1))


@settings(max_examples=30, deadline=None)
@given(m=st.integers(1, 8), s=st.integers(1, 8), seed=st.integers(0, 99))
def test_merge_mean_is_the_mean_of_the_group(m: int, s: int, seed: int) -> None:
    dst, src = draw(1, m, 3, seed=seed), draw(1, s, 3, seed=seed + 1)
    index = torch.randint(m, (1, s), generator=torch.Generator().manual_seed(seed))
    merged = merge_mean(dst, src, assignment(index, m, dst.dtype))
    expected = dst.scatter_reduce(1, index[..., None].expand(-1, -1, 3), src, "mean", include_self=True)
    torch.testing.assert_close(merged, expected)


def test_merge_size_treats_missing_sizes_as_ones() -> None:
    groups, similarity = assignment(torch.tensor([[0, 2, 0]]), 3, torch.float32), draw(1, 3).abs()
    ones = merge_size(torch.ones(1, 3), torch.ones(1, 3), groups, similarity)
    torch.testing.assert_close(merge_size(None, None, groups, similarity), ones)
    assert merge_size(None, None, groups, None).tolist() == [[3.0, 1.0, 2.0]]


@settings(max_examples=40, deadline=None)
@given(n=st.integers(4, 24), num_prefix=st.integers(0, 3), seed=st.integers(0, 99), data=st.data())
def test_bipartite_matching_partitions_the_tokens(n: int, num_prefix: int, seed: int, data: st.DataObject) -> None:
    if n - num_prefix < 2:
        return
    r = data.draw(st.integers(1, (n - num_prefix) // 2))
    match = match_bipartite(draw(2, n, 5, seed=seed), r, num_prefix, ordered=True)
    for b in range(2):
        everyone = torch.cat((match.keep[b], match.dst[b], match.src[b]))
        assert torch.equal(everyone.sort().values, torch.arange(n))
    total = gather_groups(torch.ones(2, n, 1), match)
    assert total.shape[1] == n - r
    torch.testing.assert_close(total.sum(1), torch.full((2, 1), float(n)))


# -- rates -------------------------------------------------------------------------------------------
def test_ste_ceil_rounds_to_the_grid_and_passes_the_gradient() -> None:
    x = torch.tensor([1.2, 15.0, 15.1], requires_grad=True)
    assert ste_ceil(x).tolist() == [2.0, 15.0, 16.0]
    tiled = ste_ceil(x, 16, 1)
    assert (tiled + 1).tolist() == [16.0, 16.0, 32.0]
    assert torch.autograd.grad((tiled * torch.tensor([1.0, 2.0, 3.0])).sum(), x)[0].tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("arity", [1, 2, 3])
def test_ste_min_takes_any_number_of_counts(arity: int) -> None:
    current = torch.tensor(4.0, requires_grad=True)
    counts = [torch.tensor(float(5 - i), requires_grad=True) for i in range(arity)]
    out = ste_min(current, *counts)
    assert out.item() == min(4.0, 6.0 - arity)
    out.backward()
    assert current.grad is None
    assert [c.grad.item() for c in counts] == [1.0] * arity


@settings(max_examples=40, deadline=None)
@given(patches=st.integers(2, 40), seed=st.integers(0, 99), num_prefix=st.integers(0, 5), step=st.integers(1, 5))
def test_keep_probability_falls_from_one_and_sums_to_the_count(
    patches: int, seed: int, num_prefix: int, step: int
) -> None:
    candidates = torch.arange(patches, 0, -step).float()
    logits, n = 3 * draw(len(candidates), seed=seed), patches + num_prefix
    q = keep_probability(logits, candidates, num_prefix, n)
    assert (q.diff() <= 1e-6).all()
    torch.testing.assert_close(q[: num_prefix + 1], torch.ones(num_prefix + 1))
    expected = (candidates * logits.softmax(-1)).sum() + num_prefix
    torch.testing.assert_close(q.sum(), expected, rtol=1e-4, atol=1e-4)
    kept = kept_count(logits, candidates, num_prefix)
    assert expected - 1e-3 <= kept <= expected + 1


def test_kept_count_stops_at_all_tokens() -> None:
    candidates = torch.arange(36, 0, -1).float()
    logits = torch.zeros(36)
    logits[0] = 50
    assert kept_count(logits, candidates, 1, 16).item() == 37
    assert kept_count(torch.zeros(36), candidates, 1, 16).item() == 32


def test_keep_mask_is_hard_forward_and_soft_backward() -> None:
    q = torch.linspace(1, 0, 10, requires_grad=True)
    mask = keep_mask(q, 3, 7)
    assert mask.tolist() == [1, 1, 1, 0, 0, 0, 0, 1, 1, 1]
    assert torch.autograd.grad(mask.sum(), q)[0].tolist() == [1.0] * 10


def test_masked_softmax_gradients_match_finite_differences() -> None:
    scores = draw(2, 1, 5, 5).double().requires_grad_()
    mask = torch.tensor([[1.0, 1, 0, 1, 0], [1, 0.5, 1, 1, 1]], dtype=torch.float64, requires_grad=True)

    def by_autograd(s: Tensor, m: Tensor, eps: float = 1e-6) -> Tensor:
        eye = torch.eye(5, dtype=s.dtype)
        weight = m[:, None, None, :] * (1 - eye) + eye
        u = (s - s.amax(-1, keepdim=True)).exp() * weight
        return (u + eps / 5) / (u.sum(-1, keepdim=True) + eps)

    weight = draw(2, 1, 5, 5, seed=3).double()
    ours = torch.autograd.grad((masked_softmax(scores, mask) * weight).sum(), (scores, mask))
    theirs = torch.autograd.grad((by_autograd(scores, mask) * weight).sum(), (scores, mask))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_masked_softmax_with_nothing_masked_is_the_softmax() -> None:
    scores = draw(2, 2, 6, 6)
    torch.testing.assert_close(masked_softmax(scores, torch.ones(2, 6)), scores.softmax(-1), atol=1e-5, rtol=1e-5)


def test_macs_count_the_mlp_after_the_reduction() -> None:
    cost = TokenMacs(10, 7, (4, 4), (2, 2), (8, 8))
    assert cost.dense == 7 + 2 * (10 * 4 + 100 * 2 + 10 * 8)
    assert cost([5, 3]) == 7 + (40 + 200 + 40) + (20 + 50 + 24)
    counts = [torch.tensor(5.0, requires_grad=True), torch.tensor(3.0)]
    assert torch.autograd.grad(cost(counts), counts[0])[0].item() == 8 + 4 + 2 * 2 * 5


# -- the track ---------------------------------------------------------------------------------------
class _Holder(nn.Module):
    def __init__(self, track: TokenTrack) -> None:
        super().__init__()
        self.track = track


def test_tracks_are_found_and_copies_start_empty() -> None:
    track = TokenTrack(3)
    track.trace = True
    track.begin(draw(2, 4, 3))
    model = nn.Sequential(_Holder(track), _Holder(track))
    assert find_track(model) is track
    assert find_track(nn.Linear(2, 2)) is None
    twin = copy.deepcopy(model)
    assert twin[0].track is twin[1].track is not track
    assert twin[0].track.trace and twin[0].track.source[0] is None
    assert pickle.loads(pickle.dumps(track)).source == [None] * 4  # noqa: S301


def test_pool_weighs_tokens_by_size_and_mask() -> None:
    track = TokenTrack(1)
    pool, x = SizeWeightedPool(track, 1), draw(2, 4, 3)
    torch.testing.assert_close(pool(x), x.mean(1))
    track.size[1] = torch.tensor([[1.0, 1, 2, 1, 4]] * 2)
    weight = torch.tensor([1.0, 2, 1, 4])
    torch.testing.assert_close(pool(x), (x * weight[:, None]).sum(1) / 8)
    track.mask[1] = torch.tensor([[1.0, 1, 1, 1, 0]] * 2)
    torch.testing.assert_close(pool(x), (x[:, :3] * weight[:3, None]).sum(1) / 4)


def test_a_token_block_needs_an_open_attention() -> None:
    block = nn.Module()
    block.attn = nn.Identity()
    with pytest.raises(ModelError, match="expected OpenAttention"):
        TokenBlock(block, 0, TokenTrack(1), 1, True)
