"""The arguments of every command; standard library only."""

from __future__ import annotations

import argparse

SHAPES = {  # preset -> (B, H, N, D)
    "wan1.3b-480p": (1, 12, 32760, 128),
    "wan14b-720p": (1, 40, 75600, 128),
}
QUANT_MODES = ("none", "int8_fp16", "int8_fp8")
DTYPES = ("bfloat16", "float16", "float32")
PATHS = ("auto", "portable", "sm90")
PEERS = ("sdpa-flash", "sdpa-cudnn", "flex")


def build_parser() -> argparse.ArgumentParser:
    """The parser of the `sla2` command; `command` is the chosen subcommand."""
    parser = argparse.ArgumentParser(
        prog="sla2", description="Sparse-linear attention with learnable routing (SLA2)."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_env(commands)
    _add_selftest(commands)
    _add_bench(commands)
    _add_demo(commands)
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive integer")
    return value


def _non_negative(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


def _fraction(text: str) -> float:
    value = float(text)
    if not 0.0 < value <= 1.0:
        raise argparse.ArgumentTypeError(f"{text} is not in (0, 1]")
    return value


def _grid(text: str) -> tuple[int, int, int]:
    parts = text.lower().split("x")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(
            f"{text} is not a token grid FRAMESxHEIGHTxWIDTH such as 21x30x52"
        )
    frames, height, width = (int(part) for part in parts)
    return frames, height, width


def parse_shape(text: str) -> tuple[int, int, int, int]:
    """(B, H, N, D) of a preset's name or of BxHxNxD."""
    if text in SHAPES:
        return SHAPES[text]
    parts = text.lower().split("x")
    if len(parts) != 4 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(
            f"{text} is neither a model ({', '.join(SHAPES)}) nor BxHxNxD such as 1x12x32760x128"
        )
    batch, heads, seqlen, head_dim = (int(part) for part in parts)
    return batch, heads, seqlen, head_dim


Subparsers = argparse._SubParsersAction  # the type has no public name


def _add_env(commands: Subparsers[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "env", help="what is installed here, and whether the kernels can run; for bug reports"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_selftest(commands: Subparsers[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "selftest", help="check the installed kernels against the reference on this device"
    )
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument(
        "--quick",
        dest="amount",
        action="store_const",
        const="quick",
        help="small cases, under a minute (default)",
    )
    amount.add_argument(
        "--full",
        dest="amount",
        action="store_const",
        const="full",
        help="every case, video lengths included",
    )
    parser.set_defaults(amount="quick")
    _add_device(parser)
    parser.add_argument(
        "--path",
        choices=PATHS,
        default="auto",
        help="kernels to test on a GPU (default auto: those SLA2_PATH names)",
    )
    parser.add_argument(
        "--filter", metavar="TEXT", default="", help="only the cases whose name contains TEXT"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _add_bench(commands: Subparsers[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "bench", help="time the operation, its stages and other attention on this device"
    )
    parser.add_argument(
        "--shape",
        type=parse_shape,
        nargs="+",
        action="extend",
        help=f"{', '.join(SHAPES)} or BxHxNxD; may be repeated (default: wan1.3b-480p)",
    )
    parser.add_argument("--batch", type=_positive, help="B of a shape of your own (default 1)")
    parser.add_argument("--heads", type=_positive, help="H of a shape of your own (default 12)")
    parser.add_argument("--seqlen", type=_positive, help="N of a shape of your own")
    parser.add_argument(
        "--head-dim", type=int, choices=(64, 128), help="D of a shape of your own (default 128)"
    )
    parser.add_argument(
        "--topk",
        type=_fraction,
        nargs="+",
        default=[0.03],
        metavar="FRACTION",
        help="shares of key blocks kept (default: 0.03, which is 97 %% sparsity)",
    )
    parser.add_argument(
        "--quant",
        choices=QUANT_MODES,
        nargs="+",
        default=["none"],
        help="precision of the sparse branch (default: none)",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument(
        "--path",
        choices=PATHS,
        default="auto",
        help="kernels to time on a GPU (default auto: those SLA2_PATH names)",
    )
    parser.add_argument(
        "--backward", action="store_true", help="also time forward + backward (a training step)"
    )
    parser.add_argument(
        "--peers",
        nargs="*",
        choices=PEERS,
        help="other attention to time in the same run; without names: all that run here",
    )
    parser.add_argument(
        "--stages", action="store_true", help="also time each stage, and each kernel"
    )
    parser.add_argument(
        "--refcheck",
        action="store_true",
        help="also compare sampled rows with the reference; a failure gives exit code 1",
    )
    parser.add_argument("--iters", type=_positive, default=30, help="timed iterations (default 30)")
    parser.add_argument("--warmup", type=_non_negative, default=5, help="untimed ones (default 5)")
    parser.add_argument("--output", metavar="FOLDER", help="write bench.json, bench.csv, bench.png")
    parser.add_argument(
        "--report",
        action="store_true",
        help="time nothing: write benchmarks.md and its plots from results that are recorded",
    )
    parser.add_argument(
        "--results",
        metavar="FOLDER",
        help="with --report: the recorded results (default: bench/results); "
        "--output is docs by default then",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="with --report: change nothing; exit code 1 where the results give another page",
    )
    parser.add_argument(
        "--commit", help="commit to record (default: that of the installed package)"
    )
    parser.add_argument("--seed", type=int, default=0)
    _add_device(parser)


def _add_demo(commands: Subparsers[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "demo", help="SLA2 next to full attention on a clip made from photographs"
    )
    parser.add_argument(
        "--input",
        nargs="+",
        metavar="FILE",
        help="your own photographs, or one video, in place of the bundled photographs",
    )
    parser.add_argument(
        "--grid",
        type=_grid,
        metavar="TxHxW",
        help="token grid (default: 21x30x52, which is 81 frames at 832x480)",
    )
    parser.add_argument("--heads", type=_positive, help="(default: 12 on a GPU, 2 on a CPU)")
    parser.add_argument(
        "--head-dim", type=int, choices=(64, 128), help="(default: 128 on a GPU, 64 on a CPU)"
    )
    parser.add_argument(
        "--topk", type=_fraction, default=0.03, help="share of key blocks kept (default: 0.03)"
    )
    parser.add_argument(
        "--quant",
        choices=QUANT_MODES,
        help="precision of the sparse branch (default: 8 bit where this GPU can, otherwise none)",
    )
    parser.add_argument(
        "--head", type=_non_negative, default=0, help="the head to draw (default 0)"
    )
    parser.add_argument(
        "--output", metavar="FOLDER", default="sla2-demo", help="(default: ./sla2-demo)"
    )
    _add_device(parser)


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", help="torch device such as cpu or cuda:1 (default: the GPU if there is one)"
    )
