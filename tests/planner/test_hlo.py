"""Reading HLO by hand-written modules: loops, fusions, collectives in every spelling, and the bytes that move."""

import pytest

from xomni_jax.planner import hlo
from xomni_jax.planner.collectives import collectives
from xomni_jax.planner.traffic import copies, moves

# A loop of 7 whose body slices a layer out of a stack in a fusion, multiplies, and writes one row of a cache in place.
LOOP = """
HloModule jit_f, is_scheduled=true

%fused_slice (p0: bf16[7,8,4], p1: s32[]) -> bf16[1,8,4] {
  %p0 = bf16[7,8,4]{2,1,0} parameter(0)
  %p1 = s32[]{} parameter(1)
  %zero = s32[]{} constant(0)
  ROOT %slice = bf16[1,8,4]{2,1,0} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,8,4}
}

%fused_write (c: bf16[100,4], row: bf16[1,4], at: s32[]) -> bf16[100,4] {
  %c = bf16[100,4]{1,0} parameter(0)
  %row = bf16[1,4]{1,0} parameter(1)
  %at = s32[]{} parameter(2)
  %zero.1 = s32[]{} constant(0)
  ROOT %update = bf16[100,4]{1,0} dynamic-update-slice(%c, %row, %at, %zero.1)
}

%body (t: (s32[], bf16[7,8,4], bf16[100,4])) -> (s32[], bf16[7,8,4], bf16[100,4]) {
  %t = (s32[]{}, bf16[7,8,4]{2,1,0}, bf16[100,4]{1,0}) parameter(0)
  %i = s32[]{} get-tuple-element(%t), index=0
  %w = bf16[7,8,4]{2,1,0} get-tuple-element(%t), index=1
  %cache = bf16[100,4]{1,0} get-tuple-element(%t), index=2
  %layer = bf16[1,8,4]{2,1,0:T(8,128)(2,1)S(1)} fusion(%w, %i), kind=kLoop, calls=%fused_slice
  %row.1 = bf16[1,4]{1,0:T(8,128)S(1)} custom-call(%layer), custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/
}} a line of kernel metadata that begins with braces
"}
  %cache.1 = bf16[100,4]{1,0} fusion(%cache, %row.1, %i), kind=kLoop, calls=%fused_write
  %moved = bf16[100,4]{1,0} copy(%cache.1)
  ROOT %next = (s32[]{}, bf16[7,8,4]{2,1,0}, bf16[100,4]{1,0}) tuple(%i, %w, %moved)
}

%cond (t.1: (s32[], bf16[7,8,4], bf16[100,4])) -> pred[] {
  %t.1 = (s32[]{}, bf16[7,8,4]{2,1,0}, bf16[100,4]{1,0}) parameter(0)
  %i.1 = s32[]{} get-tuple-element(%t.1), index=0
  %limit = s32[]{} constant(7)
  ROOT %lt = pred[]{} compare(%i.1, %limit), direction=LT
}

ENTRY %main (a: (s32[], bf16[7,8,4], bf16[100,4])) -> (s32[], bf16[7,8,4], bf16[100,4]) {
  %a = (s32[]{}, bf16[7,8,4]{2,1,0}, bf16[100,4]{1,0}) parameter(0)
  ROOT %loop = (s32[]{}, bf16[7,8,4]{2,1,0}, bf16[100,4]{1,0}) while(%a), condition=%cond, body=%body
}
"""


def test_a_loop_runs_as_often_as_its_condition_says():
    module = hlo.parse(LOOP)
    assert module.trips == {"body": 7} and module.unknown == []
    assert module.times["body"] == module.times["fused_slice"] == 7 and module.times["main"] == 1
    assert module.scheduled == ["main", "body", "cond"]


def test_a_loop_of_another_form_is_said_to_be_unknown():
    module = hlo.parse(LOOP.replace("direction=LT", "direction=GT"))
    assert module.unknown == ["body"] and module.times["body"] == 1


def test_a_loop_that_says_how_often_it_runs_is_believed():
    said = LOOP.replace("direction=LT", "direction=GT").replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"5"}}')
    assert hlo.parse(said).trips == {"body": 5}


def test_a_stack_that_is_copied_within_a_fusion_is_read_where_it_is_sliced():
    """As the TPU compiler slices kernels in 8 bits; without the slice the whole stack is read."""
    copying = """
%copy_fusion (stack: bf16[7,8,4]) -> bf16[7,8,4] {
  %stack = bf16[7,8,4]{2,1,0} parameter(0)
  ROOT %copied = bf16[7,8,4]{1,2,0} copy(%stack)
}

%fused_slice ("""
    text = LOOP.replace("\n%fused_slice (", copying).replace("dynamic-slice(%p0,", "dynamic-slice(%other,")
    inner = "  %zero = s32[]{} constant(0)\n"
    text = text.replace(inner, inner + "  %other = bf16[7,8,4]{1,2,0} fusion(%p0), kind=kLoop, calls=%copy_fusion\n", 1)
    read = lambda text: next(m.read for m in moves(hlo.parse(text)) if m.instruction.name == "layer") - 4  # noqa: E731 - the index
    assert read(text) == read(LOOP) == 8 * 4 * 2
    assert read(text.replace("copy(%stack)", "negate(%stack)")) == 7 * read(LOOP)


def test_bytes_that_move():
    """A layer is read, not the stack; a row is written, not the cache; what lies on chip costs nothing; a copy costs both ways."""
    by_name = {m.instruction.name: m for m in moves(hlo.parse(LOOP))}
    index = 4
    assert (by_name["layer"].read, by_name["layer"].written) == (8 * 4 * 2 + index, 0)
    assert "row.1" not in by_name
    assert (by_name["cache.1"].read, by_name["cache.1"].written) == (index, 4 * 2)
    assert (by_name["moved"].read, by_name["moved"].written, by_name["moved"].times) == (800, 800, 7)
    assert [m.instruction.name for m in copies(list(by_name.values()), 800)] == ["moved"]


MESH = {"replica": 1, "data": 1, "fsdp": 4, "tensor": 2}


def reduced(groups, kind="all-reduce", shape="bf16[6,5]{1,0}"):
    lines = ["%p = bf16[6,5]{1,0} parameter(0)", f"ROOT %r = {shape} {kind}(%p), channel_id=1, {groups}"]
    text = "\n".join([f"ENTRY %main (p: bf16[6,5]) -> {shape} {{", *lines, "}"])
    return collectives(hlo.parse(text), MESH)


@pytest.mark.parametrize(
    "groups, axes",
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", ("tensor",)),
        ("replica_groups={{0,2,4,6},{1,3,5,7}}", ("fsdp",)),
        ("replica_groups=[4,2]<=[8]", ("tensor",)),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", ("fsdp",)),
        ("replica_groups={}", ("fsdp", "tensor")),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=1,'axis_2'=2] {'axis_2'}", ("tensor",)),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4], device_ids=([4,2]T(1,0)) {'axis_1'}", ("fsdp",)),
    ],
)
def test_the_mesh_axis_of_a_collective(groups, axes):
    (found,) = reduced(groups)
    assert found.axes == axes


def test_devices_named_in_an_unknown_way_are_refused():
    with pytest.raises(ValueError, match="unknown way"):
        reduced("replica_groups=mesh['a'=8] {'a':(2)4}")


def test_bytes_of_collectives():
    """Gathered and reduced arrays by their whole size; what a device sends on a ring of 4."""
    (gather,) = reduced("replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}", "all-gather", "bf16[24,5]{1,0}")
    assert (gather.bytes, gather.sent) == (24 * 5 * 2, 24 * 5 * 2 * 3 / 4)
    (reduce,) = reduced("replica_groups=[2,4]<=[4,2]T(1,0)")
    assert (reduce.bytes, reduce.sent) == (60, 60 * 3 / 4 * 2)
    (scatter,) = reduced("replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}", "reduce-scatter", "bf16[2,5]{1,0}")
    assert (scatter.bytes, scatter.sent) == (80, 60)
    (permute,) = reduced("source_target_pairs={{0,2},{2,4},{4,6},{6,0}}", "collective-permute")
    assert (permute.axes, permute.sent) == (("fsdp",), 60)


def test_an_asynchronous_collective_counts_once_and_a_scattering_reduction_as_what_it_is():
    text = """
%all-reduce-scatter.1 (x: bf16[8,5]) -> bf16[8,5] {
  %x = bf16[8,5]{1,0} parameter(0)
  ROOT %r = bf16[8,5]{1,0} all-reduce(%x), channel_id=3, replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%add
}
%start (x.1: bf16[2,5]) -> bf16[8,5] {
  %x.1 = bf16[2,5]{1,0} parameter(0)
  ROOT %g = bf16[8,5]{1,0} all-gather(%x.1), channel_id=4, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
}
%done (x.2: bf16[2,5]) -> bf16[8,5] {
  %x.2 = bf16[2,5]{1,0} parameter(0)
  ROOT %g.1 = bf16[8,5]{1,0} all-gather(%x.2), channel_id=4, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
}
ENTRY %main (p: bf16[2,5]) -> bf16[8,5] {
  %p = bf16[2,5]{1,0} parameter(0)
  %a = bf16[8,5]{1,0} fusion(%p), kind=kCustom, calls=%start
  %b = bf16[8,5]{1,0} fusion(%p), kind=kCustom, calls=%done
  ROOT %c = bf16[8,5]{1,0} fusion(%b), kind=kCustom, calls=%all-reduce-scatter.1
}
"""
    found = collectives(hlo.parse(text), MESH)
    assert sorted((c.kind, c.times) for c in found) == [("all-gather", 1), ("reduce-scatter", 1)]


def test_loop_bodies_may_use_the_number_of_a_collective_again():
    """The same channel in two loops: two collectives."""
    gather = "  %g{n} = bf16[8,5]{{1,0}} all-gather(%cache), channel_id=4, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={{0}}\n"
    text = LOOP.replace("  %moved = ", gather.format(n=1) + "  %moved = ").replace("  ROOT %loop = ", "  %loop = ")
    body = text[text.index("%body ") : text.index("%cond ")].replace("%body ", "%body.2 ").replace("%g1", "%g2")
    second = "  ROOT %again = (s32[]{}, bf16[7,8,4]{2,1,0}, bf16[100,4]{1,0}) while(%loop), condition=%cond, body=%body.2\n}"
    text = text.replace("%cond ", body + "%cond ", 1).rstrip().removesuffix("}") + second
    assert [(c.axes, c.times) for c in collectives(hlo.parse(text), MESH)] == [(("fsdp",), 7), (("fsdp",), 7)]
