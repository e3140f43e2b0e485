"""The reader of Triton's intermediate text finds what one thread may overwrite before another reads."""

import pytest

from tests.triton_ir import overwritten

KERNEL = """\
  tt.func public @_kernel(%a_ptr: !tt.ptr<f32> {tt.divisibility = 16 : i32} loc("a"(#loc)), \
%b_ptr: !tt.ptr<f32> loc("b"(#loc)), %n: i32 loc("n"(#loc))) attributes {noinline = false} {
    %at = tt.splat %a_ptr : !tt.ptr<f32> -> tensor<8x!tt.ptr<f32>> loc(#loc1)
    %to = tt.splat %b_ptr : !tt.ptr<f32> -> tensor<8x!tt.ptr<f32>> loc(#loc1)
    %at_1 = tt.addptr %at, %r : tensor<8x!tt.ptr<f32>>, tensor<8xi32> loc(#loc2)
BODY
    tt.return loc(#loc9)
  } loc(#loc)
"""
LOAD = "    %x = tt.load %at_1, %mask, %other : tensor<8x!tt.ptr<f32>> loc(#loc3)\n"
STORE = "    tt.store %at_1, %y, %mask : tensor<8x!tt.ptr<f32>> loc(#loc4)\n"
ELSEWHERE = "    tt.store %to, %y, %mask : tensor<8x!tt.ptr<f32>> loc(#loc4)\n"
ADD = "    %o = tt.atomic_rmw fadd, relaxed, gpu, %at_1, %y, %mask : (tensor<8x!tt.ptr<f32>>) loc(#l)\n"
LOOP = """\
    %p:2 = scf.for %i = %c0 to %n step %c1 iter_args(%q = %at_1, %s = %zero) -> (tensor<8xi32>) : i32 {
      %v = tt.load %q : tensor<8x!tt.ptr<f32>> loc(#loc5)
    } loc(#loc6)
"""


@pytest.mark.parametrize(
    ("body", "found"),
    [
        (LOAD + STORE, {"a_ptr"}),
        (LOAD + ADD, {"a_ptr"}),
        (LOOP + STORE, {"a_ptr"}),
        (LOAD + ELSEWHERE, set()),
        (STORE + LOAD, set()),
        (LOAD + "    gpu.barrier loc(#loc)\n" + STORE, set()),
        (LOAD + "    ttg.barrier all loc(#loc)\n" + STORE, set()),
    ],
)
def test_a_store_after_a_load_needs_a_barrier(body: str, found: set[str]) -> None:
    assert overwritten(KERNEL.replace("BODY\n", body)) == found
