"""Collectives are read from a program as XLA writes it."""

from pallas_kernels.bench.collectives import Collective, bytes_by_kind, collectives

PROGRAM = """
HloModule jit_step, is_scheduled=true

%sum (x: f32[], y: f32[]) -> f32[] {
  ROOT %add = f32[] add(%x, %y)
}

%body (state: (s32[], f32[8])) -> (s32[], f32[8]) {
  %gathered = f32[8]{0} all-gather(%part), dimensions={0}
  ROOT %next = (s32[], f32[8]{0}) tuple(%count, %gathered)
}

%condition (state: (s32[], f32[8])) -> pred[] {
  ROOT %less = pred[] compare(%count, %end), direction=LT
}

%wrapped (p: bf16[8,2]) -> bf16[4,2] {
  ROOT %rs = bf16[4,2]{1,0} reduce-scatter(%p), dimensions={0}
}

%not_called (p: f32[8]) -> f32[8] {
  ROOT %unused = f32[8]{0} all-reduce(%p), to_apply=%sum
}

ENTRY %main (a: f32[2,16]) -> f32[8] {
  %all-reduce.1 = (f32[2,16]{1,0}, s32[]) all-reduce(%a, %b), channel_id=1, to_apply=%sum
  %ar = ((f32[3]{0}), f32[3]{0}) all-reduce-start(%e), to_apply=%sum
  %ar2 = f32[5]{0} all-reduce-start(%e), to_apply=%sum
  %ag = (u16[8]{0}, u16[32]{0}) all-gather-start(%c), dimensions={0}
  %agd = u16[32]{0} all-gather-done(%ag)
  %start = ((bf16[8,2]{1,0}), bf16[4,2]{1,0}) async-start(%d), calls=%wrapped
  %looped = (s32[], f32[8]{0}) while(%init), condition=%condition, body=%body, """ + (
    """backend_config={"known_trip_count":{"n":"3"}}
  %once = (s32[], f32[8]{0}) while(%init), condition=%condition, body=%body
  ROOT %none = f32[8]{0} add(%all-reduce.1, %ag)
}
"""
)


def test_each_result_on_a_device_is_counted_as_often_as_it_is_sent():
    assert collectives(PROGRAM) == [
        Collective("all-reduce", "f32", 32),
        Collective("all-reduce", "s32", 1),
        Collective("all-reduce", "f32", 3),
        Collective("all-reduce", "f32", 5),
        Collective("all-gather", "u16", 32),
        Collective("reduce-scatter", "bf16", 8),
        *[Collective("all-gather", "f32", 8)] * 4,
    ]


def test_bytes_are_summed_by_kind_and_type():
    assert bytes_by_kind(PROGRAM) == {
        "all-reduce f32": 160,
        "all-reduce s32": 4,
        "all-gather u16": 64,
        "reduce-scatter bf16": 16,
        "all-gather f32": 128,
    }


def test_bytes():
    sizes = [Collective("all-reduce", dtype, 8).nbytes for dtype in ("pred", "u16", "bf16", "f32", "s64")]
    assert sizes == [8, 16, 16, 32, 64]


def test_a_text_without_a_program_sends_nothing():
    assert collectives("") == []
