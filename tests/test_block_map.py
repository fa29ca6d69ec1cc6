"""BlockMap: dense round trips, validation, hostile entries, FlexAttention's form."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import sla2
from sla2 import BlockMap
from sla2.constants import BLOCK_K, BLOCK_Q, MAX_SEQLEN

SEQLENS = (1, 64, 65, 128, 129, 300, 700)


def random_mask(seqlen: int, batch: int = 2, heads: int = 3) -> Tensor:
    """Rows of every density, an empty and a full one among them."""
    t_m, t_n = -(-seqlen // BLOCK_Q), -(-seqlen // BLOCK_K)
    mask = torch.rand(batch, heads, t_m, t_n) < torch.rand(batch, heads, t_m, 1)
    mask[0, 0, 0], mask[-1, -1, -1] = False, True
    return mask


@pytest.mark.parametrize("seqlen", SEQLENS)
def test_dense_round_trip(seqlen: int) -> None:
    mask = random_mask(seqlen)
    block_map = BlockMap.from_dense(mask, seqlen)
    block_map.validate()
    assert block_map.lut.dtype == torch.uint16 and block_map.counts.dtype == torch.int32
    assert torch.equal(block_map.to_dense(), mask)
    assert torch.equal(block_map.counts, mask.sum(-1, dtype=torch.int32))
    assert block_map.num_kv_blocks == int(mask.sum(-1).max())
    assert block_map.sparsity == pytest.approx(1.0 - mask.float().mean().item())


def test_lists_are_ascending() -> None:
    mask = torch.tensor([[[[True, False, True, False, True]]]]).expand(1, 1, 3, 5)
    block_map = BlockMap.from_dense(mask, 5 * BLOCK_K)
    assert block_map.lut.tolist() == [[[[0, 2, 4]] * 3]]


def test_nothing_listed() -> None:
    block_map = BlockMap.from_dense(torch.zeros(1, 2, 2, 3, dtype=torch.bool), 3 * BLOCK_K)
    block_map.validate()
    assert block_map.num_kv_blocks == 1 and block_map.sparsity == 1.0
    assert not block_map.to_dense().any()


def test_no_tokens_and_no_batch() -> None:
    empty = BlockMap.from_dense(torch.zeros(2, 3, 0, 0, dtype=torch.bool), 0)
    assert empty.to_dense().shape == (2, 3, 0, 0) and empty.sparsity == 0.0
    empty.validate()
    none = BlockMap.from_dense(torch.zeros(0, 3, 2, 3, dtype=torch.bool), 3 * BLOCK_K)
    assert none.to_dense().shape == (0, 3, 2, 3)
    none.validate()


def test_own_lists_count_their_sparsity() -> None:
    lut = torch.tensor([0, 1, 2, 0, 0, 0]).view(1, 1, 2, 3).to(torch.uint16)
    counts = torch.tensor([[[3, 1]]], dtype=torch.int32)
    assert BlockMap(lut, counts, seqlen=4 * BLOCK_K).sparsity == pytest.approx(1 - 4 / 8)


def test_route_knows_its_sparsity_from_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = torch.randn(2, 2, 640, 3, 16)
    block_map = sla2.route(q, k, proj_q=torch.eye(16), proj_k=torch.eye(16), num_kv_blocks=3)
    monkeypatch.setattr(Tensor, "sum", None)  # would wait for the device
    assert block_map.sparsity == pytest.approx(0.7)
    assert block_map.num_kv_blocks == 3 and block_map.seqlen == 640


@pytest.mark.parametrize("seqlen", [64, 100, 300])
def test_to_flex_selects_the_same(seqlen: int) -> None:
    from torch.nn.attention.flex_attention import flex_attention

    mask = random_mask(seqlen, 1, 2)
    mask[..., 0] = True  # flex_attention of an empty row is not defined
    block_map = BlockMap.from_dense(mask, seqlen)
    q, k, v = torch.randn(3, 1, 2, seqlen, 16, dtype=torch.float64)
    flex = block_map.to_flex()
    assert flex.BLOCK_SIZE == (BLOCK_Q, BLOCK_K)
    listed = flex.kv_num_blocks + flex.full_kv_num_blocks
    assert torch.equal(listed, mask.sum(-1, dtype=torch.int32))
    out = flex_attention(q, k, v, block_mask=flex)
    expected = sla2.block_sparse_attention(q, k, v, block_map, layout="BHND")
    torch.testing.assert_close(out, expected)


def test_to_flex_without_tokens() -> None:
    with pytest.raises(ValueError, match="zero tokens"):
        BlockMap.from_dense(torch.zeros(1, 1, 0, 0, dtype=torch.bool), 0).to_flex()


def test_to_is_idempotent_and_deepcopies() -> None:
    block_map = BlockMap.from_dense(random_mask(300), 300)
    assert block_map.to("cpu") is block_map
    moved = block_map.to("meta")
    assert moved.device.type == "meta" and moved.sparsity == block_map.sparsity
    assert torch.equal(copy.deepcopy(block_map).lut, block_map.lut)
    assert "seqlen=300" in repr(block_map)


# ---- validate -----------------------------------------------------------------------------------


def valid() -> BlockMap:
    lut = torch.tensor([0, 2, 4]).expand(1, 2, 3, 3).contiguous().to(torch.uint16)
    return BlockMap(lut, torch.full((1, 2, 3), 3, dtype=torch.int32), seqlen=5 * BLOCK_K)


def set_entry(block_map: BlockMap, position: tuple[int, ...], value: int) -> None:
    # uint16 has no indexed assignment of scalars everywhere; int16 holds the same bits.
    block_map.lut.view(torch.int16)[position] = value if value < 1 << 15 else value - (1 << 16)


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ((0, 1, 2, 2), 5, "1 entries outside 0..4, first 5 at batch 0, head 1, query block 2"),
        ((0, 1, 2, 2), 0xFFFF, "1 entries outside 0..4, first 65535 at batch 0"),
        ((0, 0, 1, 1), 0, "1 entries not above .* first 0 at .* query block 1, position 1"),
        ((0, 0, 1, 0), 3, "ascending"),
    ],
)
def test_validate_reports_entries(entry: tuple[int, ...], value: int, message: str) -> None:
    block_map = valid()
    block_map.validate()
    set_entry(block_map, entry, value)
    with pytest.raises(ValueError, match=message):
        block_map.validate()


@pytest.mark.parametrize("count", [-1, 4])
def test_validate_reports_counts(count: int) -> None:
    block_map = valid()
    block_map.counts[0, 1, 0] = count
    with pytest.raises(ValueError, match=rf"1 counts outside 0\.\.3, first {count} at"):
        block_map.validate()


def test_validate_reports_everything_at_once() -> None:
    block_map = valid()
    block_map.counts[0, 1, 0] = 7
    set_entry(block_map, (0, 0, 0, 2), 9)
    with pytest.raises(ValueError, match=r"counts outside.*; .*entries outside"):
        block_map.validate()


def test_entries_after_counts_are_free() -> None:
    block_map = valid()
    block_map.counts.fill_(2)
    set_entry(block_map, (0, 0, 0, 2), 9)
    block_map.validate()


def test_hostile_entries_are_ignored() -> None:
    """An index past the end selects nothing: the result is that of the list without it."""
    q, k, v = torch.randn(3, 1, 5 * BLOCK_K, 2, 16)
    hostile, clean = valid(), valid()
    for position, value in (((0, 0, 0, 2), 5), ((0, 1, 2, 2), 0xFFFF)):
        set_entry(hostile, position, value)
        clean.counts[position[:3]] = 2
    options = {"proj_q": None, "proj_k": None, "alpha_logit": torch.randn(2, 3)}
    out = sla2.sla2_attention(q, k, v, block_map=hostile, **options)
    assert torch.equal(hostile.to_dense(), clean.to_dense())
    assert torch.equal(out, sla2.sla2_attention(q, k, v, block_map=clean, **options))


# ---- constructor --------------------------------------------------------------------------------


def lists(*shape: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(shape, dtype=torch.uint16), torch.ones(shape[:3], dtype=torch.int32)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (
            lambda a, b: BlockMap([0], b, seqlen=300),
            TypeError,
            "lut must be a torch.Tensor; got list",
        ),
        (
            lambda a, b: BlockMap(a.int(), b, seqlen=300),
            TypeError,
            "lut must be torch.uint16; got .*int32",
        ),
        (lambda a, b: BlockMap(a, b.long(), seqlen=300), TypeError, "counts must be torch.int32"),
        (lambda a, b: BlockMap(a, b, seqlen=3.0), TypeError, "seqlen must be an int; got float"),
        (lambda a, b: BlockMap(a, b, seqlen=-1), ValueError, "seqlen=-1"),
        (lambda a, b: BlockMap(a, b, seqlen=MAX_SEQLEN + 1), ValueError, f"0..{MAX_SEQLEN}"),
        (lambda a, b: BlockMap(a, b, seqlen=100), ValueError, r"T_m=1 .*got \(1, 2, 3, 2\)"),
        (
            lambda a, b: BlockMap(a[0], b, seqlen=300),
            ValueError,
            r"lut must have shape \(B, H, T_m, K\)",
        ),
        (
            lambda a, b: BlockMap(a, b[..., :2], seqlen=300),
            ValueError,
            r"counts must have .*\(1, 2, 2\)",
        ),
        (lambda a, b: BlockMap(a[..., :0], b, seqlen=300), ValueError, r"K = 1\.\.5"),
        (lambda a, b: BlockMap(*lists(1, 2, 3, 6), seqlen=300), ValueError, r"K = 1\.\.5"),
        (lambda a, b: BlockMap(a, b.to("meta"), seqlen=300), ValueError, "cpu and meta"),
        (lambda a, b: BlockMap.from_dense(a, 300), TypeError, "mask must be torch.bool"),
        (lambda a, b: BlockMap.from_dense(a.bool(), 300), ValueError, r"\(B, H, 3, 5\)"),
        (lambda a, b: BlockMap(a, b, 300), TypeError, "positional"),
    ],
)
def test_constructor_errors(make, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make(*lists(1, 2, 3, 2))
