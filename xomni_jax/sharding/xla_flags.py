"""Flags of the TPU compiler and runtime: one reviewed table for the launch scripts, the manifests and their documentation.

    python -m xomni_jax.sharding.xla_flags v6e-64               what LIBTPU_INIT_ARGS should be on that slice
    python -m xomni_jax.sharding.xla_flags v6e-64 --slices 2    the same for two slices that train together
    python -m xomni_jax.sharding.xla_flags --table              the table as Markdown

libtpu reads the variable when it is loaded, so the launch scripts set it before Python starts; a value that is already set stays.
Standard library only: manifests are written on machines without jax.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys

from xomni_jax.core.tables import markdown

CHIPS = ("v4", "v5e", "v5p", "v6e", "tpu7x")
_TRAINED_ON = ("v5e", "v5p", "v6e")


@dataclasses.dataclass(frozen=True)
class Flag:
    """One flag: where it is set and why.

    Attributes:
      name: without the leading dashes.
      value: as text.
      chips: the generations it is set on.
      reason: one sentence for whoever wants to drop it.
      multislice: set only where several slices train together.
    """

    name: str
    value: str
    chips: tuple[str, ...]
    reason: str
    multislice: bool = False


def _flags(chips: tuple[str, ...], *rows: tuple[str, str, str], multislice: bool = False) -> tuple[Flag, ...]:
    """Flags (name, value, reason) of the same chips."""
    return tuple(Flag(name, value, chips, reason, multislice) for name, value, reason in rows)


# Asynchronous collective fusion is for v5e only: libtpu 0.0.52 refuses it on other chips (wrong results, hangs), where older guides set it.
# Compiler defaults improve: measure each group again with every new libtpu, and drop what no longer helps.
FLAGS = (
    *_flags(
        ("v5e",),
        ("xla_tpu_enable_async_collective_fusion", "true", "runs a collective beside the matmul that does not need it yet"),
        ("xla_tpu_enable_async_collective_fusion_fuse_all_gather", "true", "the same for FSDP's weight gathers, the bulk of our traffic"),
        (
            "xla_tpu_enable_async_collective_fusion_multiple_steps",
            "true",
            "lets one gather stretch over several matmuls; a layer's are short",
        ),
    ),
    *_flags(
        _TRAINED_ON,
        ("xla_tpu_overlap_compute_collective_tc", "true", "lets the TensorCore compute while it drives a collective"),
        ("xla_enable_async_all_gather", "true", "splits gathers into start and done, without which nothing can be moved between"),
    ),
    *_flags(
        ("v5p",),
        ("xla_tpu_megacore_fusion_allow_ags", "false", "keeps gathers out of fusions over both cores, where they would block again"),
        ("xla_enable_async_collective_permute", "true", "overlaps the permutes that large gathers turn into on a 3D torus"),
        ("xla_tpu_enable_ag_backward_pipelining", "true", "starts the next layer's gather early in the backward pass"),
    ),
    *_flags(
        ("v6e",),
        (
            "xla_tpu_scoped_vmem_limit_kib",
            "98304",
            "three quarters of the 128 MiB of VMEM to the running kernel: larger tiles for matmuls and splash attention",
        ),
    ),
    *_flags(
        ("tpu7x",),
        ("xla_tpu_enable_sparse_core_collective_offload_all_gather", "true", "the SparseCores drive gathers, the TensorCore computes"),
        ("xla_tpu_enable_sparse_core_collective_offload_reduce_scatter", "true", "the same for gradients"),
        ("xla_tpu_enable_sparse_core_collective_offload_all_reduce", "true", "the same for norms and replicated gradients"),
        (
            "xla_tpu_enable_async_collective_fusion_fuse_all_gather",
            "false",
            "a gather is either fused or offloaded; offloading loses when both are on",
        ),
    ),
    *_flags(
        CHIPS,
        ("xla_tpu_enable_data_parallel_all_reduce_opt", "true", "reduces gradients between slices while the backward pass still runs"),
        (
            "xla_tpu_data_parallel_opt_different_sized_ops",
            "true",
            "the same where gradients differ in size, as stacked layers and tables do",
        ),
        ("xla_tpu_use_enhanced_launch_barrier", "true", "finds hosts that start different programs before they wait for each other"),
        ("megascale_graph_hang_threshold", "10m", "a step that takes this long between slices is reported as hung"),
        ("megascale_abort_on_hangs", "true", "and ends the process, so that the launcher starts again instead of waiting"),
        multislice=True,
    ),
)


def chip_of(slice_name: str) -> str:
    """The generation of a cloud name (`v5litepod-256`, `v6e-64`), of a topology (`v5p:2x4x4`) or of a chip.

    Raises:
      ValueError: none of the known generations.
    """
    prefix = re.split(r"[-:]", slice_name.strip().lower(), maxsplit=1)[0]
    chip = {"v5litepod": "v5e", "v5lite": "v5e", "v7x": "tpu7x"}.get(prefix, prefix)
    if chip not in CHIPS:
        raise ValueError(f"{slice_name!r} is no TPU slice; use a name such as v6e-64, v5p-64, v5litepod-256 or a chip: {', '.join(CHIPS)}")
    return chip


def flags_of(slice_name: str, slices: int = 1) -> tuple[Flag, ...]:
    """The flags of one slice, or of several that train together."""
    chip = chip_of(slice_name)
    return tuple(f for f in FLAGS if chip in f.chips and (slices > 1 or not f.multislice))


def libtpu_init_args(slice_name: str, slices: int = 1) -> str:
    """The value of LIBTPU_INIT_ARGS; empty where the compiler's defaults are kept."""
    return " ".join(f"--{f.name}={f.value}" for f in flags_of(slice_name, slices))


def markdown_table() -> str:
    """The table of the documentation, one row per flag."""
    rows = [("flag", "on", "why")]
    for f in FLAGS:
        where = "every chip" if f.chips == CHIPS else ", ".join(f.chips)
        rows.append((f"`{f.name}={f.value}`", f"{where}, several slices" if f.multislice else where, f.reason))
    return markdown(rows)


def main(argv: list[str] | None = None) -> int:
    """Prints one line of flags, or the table."""
    parser = argparse.ArgumentParser(
        prog="python -m xomni_jax.sharding.xla_flags",
        description="Print the reviewed flags of a slice, for LIBTPU_INIT_ARGS.",
        epilog='example:\n  export LIBTPU_INIT_ARGS="$(python -m xomni_jax.sharding.xla_flags v6e-64)"',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("slice", nargs="?", help="such as v6e-64, v5p-64, v5litepod-256, tpu7x-128 or a chip: " + ", ".join(CHIPS))
    parser.add_argument("--slices", type=int, default=1, metavar="N", help="how many slices train together (default 1)")
    parser.add_argument("--table", action="store_true", help="print the table of all flags as Markdown")
    args = parser.parse_args(argv)
    if (args.slice is None) != args.table:
        parser.error("name a slice, such as v6e-64, or give --table")
    if args.slices < 1:
        parser.error(f"--slices {args.slices} must be at least 1")
    try:
        print(markdown_table() if args.table else libtpu_init_args(args.slice, args.slices))
    except ValueError as e:
        parser.error(str(e))
    return 0


if __name__ == "__main__":
    sys.exit(main())
