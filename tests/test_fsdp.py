"""FSDP2 in 16 bit as docs/training.md has it: a router in float32 inside a block in bfloat16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import sla2

H, D, N = 2, 16, 300
STEPS = 3
ROUTER = ("proj_q_delta", "proj_k_delta")
IN_FORWARD = {
    "attention.alpha_offset": torch.float32,
    **{f"attention.{name}": torch.float32 for name in ROUTER},
    "to_qkv.weight": torch.bfloat16,
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_qkv = nn.Linear(H * D, 3 * H * D, bias=False)
        self.attention = sla2.SLA2Attention(H, D, seq_len=N, topk=0.4)
        self.dtypes: dict[str, torch.dtype] = {}
        self.attention.register_forward_pre_hook(self._note_dtypes)

    def _note_dtypes(self, *_: Any) -> None:
        self.dtypes = {name: p.dtype for name, p in self.named_parameters()}

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.to_qkv(x).unflatten(-1, (3, H, D)).unbind(2)
        return x + self.attention(q, k, v).flatten(2)


def shard(attention_too: bool) -> nn.ModuleList:
    """Two blocks; without `attention_too` the router is in the block's group, in 16 bit."""
    torch.manual_seed(0)
    blocks = nn.ModuleList(Block() for _ in range(2))
    mesh = init_device_mesh("cpu", (2,))
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for block in blocks:
        if attention_too:
            fully_shard(block.attention, mesh=mesh, mp_policy=MixedPrecisionPolicy())
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return blocks


def loss_of(blocks: nn.ModuleList, step: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(2 * step + rank)
    x, target = torch.randn(2, 1, N, H * D, generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        for block in blocks:
            x = block(x)
    return F.mse_loss(x, target)


def train(stage: int, rank: int) -> dict[str, Tensor]:
    """The whole parameters after some steps, float32."""
    blocks = shard(attention_too=True)
    for block in blocks:
        block.attention.set_stage(stage)
    groups = sla2.param_groups(blocks, lr_router=1e-2, lr_alpha=1e-2, lr_model=1e-2)
    optimizer = torch.optim.AdamW(groups)
    for step in range(STEPS):
        loss_of(blocks, step, rank).backward()
        for block in blocks:
            assert block.dtypes == IN_FORWARD
            for name, parameter in block.named_parameters():
                trained = parameter.requires_grad
                assert trained == (stage == 1 or not name.endswith(ROUTER)), name
                assert (parameter.grad is not None) == trained, name
                assert not trained or parameter.grad.dtype == torch.float32, name
        optimizer.step()
        optimizer.zero_grad()
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(blocks, options=whole)


def both_stages_twice(rank: int, folder: Path) -> None:
    """One of two processes."""
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(folder / "store"), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    for stage in (1, 2):
        for run in (1, 2):
            state = train(stage, rank)
            if rank == 0:
                save_file(state, folder / f"stage{stage}-{run}.safetensors")
    with pytest.raises(TypeError, match=r"must be torch\.float32 .*wrap it on its own"):
        loss_of(shard(attention_too=False), 0, rank)
    torch.distributed.destroy_process_group()


def test_the_router_stays_float32_in_16_bit(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(both_stages_twice, (tmp_path,), nprocs=2)
    start = nn.ModuleList(Block() for _ in range(2)).state_dict()
    for stage in (1, 2):
        first, second = (load_file(tmp_path / f"stage{stage}-{run}.safetensors") for run in (1, 2))
        assert first.keys() == second.keys() == start.keys()
        for name, x in first.items():
            assert x.dtype == torch.float32 and torch.equal(x, second[name]), name
            if ".attention." in name:  # starts at zero
                assert bool(x.any()) == (stage == 1 or not name.endswith(ROUTER)), name
