"""What a llama-server says at its start, as it was seen on an H100 and without a GPU."""

from hypothesis import given
from hypothesis import strategies as st

from trio_router.memory.projection import MIB, Projection, Share, StartLog

H100 = """\
0.00.085.100 I cmn  common_param:   - Vulkan0 : NVIDIA H100 80GB HBM3 (81559 MiB, 81062 MiB free)
0.00.277.954 I common_memory_breakdown_print: | memory breakdown [MiB]       | total    free    self   model   context   compute    unaccounted |
0.00.277.962 I common_memory_breakdown_print: |   - Vulkan0 (H100 80GB HBM3) | 81559 = 81029 + (1551 =    92 +    1440 +      19) +       -1021 |
0.00.277.963 I common_memory_breakdown_print: |   - Host                     |                    38 =    28 +       0 +      10                |
0.00.311.552 I common_params_fit_impl: projected to use 1551 MiB of device memory vs. 81029 MiB of free device memory
"""
CPU = """\
0.00.366.276 I common_memory_breakdown_print: | memory breakdown [MiB] | total   free    self   model   context   compute    unaccounted |
0.00.369.321 I common_memory_breakdown_print: |   - Host               |                  287 =    92 +     180 +      15                |
0.00.394.869 I common_params_fit_impl: projected to use 287 MiB of host memory vs. 24105 MiB of total host memory
"""
LOADS = """\
0.00.366.720 I llama_model_loader: loaded meta data with 33 key-value pairs and 272 tensors from m.gguf (version GGUF V3)
0.00.380.983 I load_tensors: offloading 29 repeating layers to GPU
"""


def said(*texts: str) -> StartLog:
    log = StartLog()
    for line in "".join(texts).splitlines():
        log.hear(line)
    return log


def share(name: str, model: int, context: int, compute: int) -> Share:
    return Share(name=name, model=model * MIB, context=context * MIB, compute=compute * MIB)


def test_on_a_gpu() -> None:
    log = said(H100)
    assert log.projection == Projection(devices=(share("Vulkan0", 92, 1440, 19),), host=share("Host", 28, 0, 10))
    assert (log.projection.kind, log.loads) == ("Vulkan", False)
    assert log.projection.devices[0].total == 1551 * MIB


def test_without_one() -> None:
    assert said(CPU).projection == Projection(host=share("Host", 92, 180, 15))
    assert said(CPU).projection.kind is None


def test_what_is_tried_with_less_does_not_count() -> None:
    tried = H100.replace("(1551 =    92 +    1440 +      19)", "( 200 =    92 +      89 +      19)")
    assert said(H100, tried).projection == said(H100).projection


def test_the_last_table_before_the_sum_counts() -> None:
    """With a context of its own choice llama-server first looks at one slot's."""
    first = "\n".join(H100.splitlines()[:4]).replace("1551", " 600").replace("1440", " 489") + "\n"
    assert said(first, H100).projection == said(H100).projection


def test_a_draft_model_before_the_other() -> None:
    table = "\n".join(CPU.splitlines()[:2]) + "\n"
    between = "0.00.582.532 I srv    load_model: [spec] estimated memory usage of draft model is 287.00 MiB\n"
    found = said(table, between, CPU.replace("287 =    92 +     180", "151 =    92 +      44")).projection
    assert found == Projection(host=share("Host", 92, 44, 15), draft=(share("Host", 92, 180, 15),))


def test_a_draft_model_after_it() -> None:
    lines = H100.splitlines(keepends=True)
    extra = "0.1 T common_params_fit_impl: getting device memory data for the extra model at a context size of 8192:\n"
    table = "".join(lines[1:4]).replace("1551", "  50").replace("  92", "  20").replace("1440", "  11")
    found = said(*lines[:4], extra, table, lines[4]).projection
    assert found.devices == (share("Vulkan0", 92, 1440, 19),)
    assert found.draft == (share("Vulkan0", 20, 11, 19), share("Host", 28, 0, 10))


def test_two_devices() -> None:
    lines = H100.splitlines(keepends=True)
    second = lines[2].replace("Vulkan0", "Vulkan1").replace("1551", " 700").replace("1440", " 588")
    second = second.replace("    92", "    93")
    assert [one.name for one in said(*lines[:3], second, *lines[3:]).projection.devices] == ["Vulkan0", "Vulkan1"]


def test_other_buffers_are_the_hosts() -> None:
    """Weights that are laid out anew for the CPU stand in a row of their own."""
    row = "x |   - CPU_REPACK               |                    50 =    50 +       0 +       0                |\n"
    lines = H100.splitlines(keepends=True)
    found = said(*lines[:4], row, lines[4]).projection
    assert [one.name for one in found.devices] == ["Vulkan0"]
    assert found.host == share("Host", 78, 0, 10)


def test_rounding_is_made_up_for() -> None:
    """Each number is rounded down: what the sum has more lies somewhere, and compute buffers are the least exact."""
    found = said(H100.replace("1551 =", "1553 =")).projection
    assert found.devices[0].total == 1553 * MIB


def test_it_is_heard_when_it_loads() -> None:
    log = said(LOADS)
    assert (log.loads, log.projection) == (True, None)


def test_layers_and_a_smaller_context() -> None:
    assert said("load_tensors: offloaded 31/31 layers to GPU").fitted == ()
    assert said("load_tensors: offloaded 0/31 layers to GPU").fitted == ()
    assert said("load_tensors: offloaded 20/31 layers to GPU").fitted == ("20 of 31 layers on GPUs",)
    reduced = "f: context size reduced from 131072 to 16384 -> need 900 MiB less memory in total"
    assert said(reduced).fitted == ("context 16384 of 131072 tokens",)


def test_a_sum_without_a_table_is_nothing() -> None:
    assert said(H100.splitlines()[-1]).projection is None


PIECES = [
    "| memory breakdown [MiB]",
    "|   - X | 1 = 2 + (3 = 4 + 5 + 6)",
    "projected to use 3 MiB of host memory",
    "MiB",
]


@given(st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=80)), max_size=40))
def test_whatever_is_written_is_heard(lines: list[str]) -> None:
    log = StartLog()
    for line in lines:
        log.hear(line)
    assert log.projection is None or log.projection.devices or log.projection.host
