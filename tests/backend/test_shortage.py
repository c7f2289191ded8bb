"""What llama-servers of several builds write when memory is short, and what they write besides."""

import pytest

from trio_router.backend.shortage import short_of_memory


@pytest.mark.parametrize(
    "line",
    [
        "ggml_backend_cuda_buffer_type_alloc_buffer: allocating 9216.00 MiB on device 0: cudaMalloc failed: out of memory",
        "alloc_tensor_range: failed to allocate CUDA0 buffer of size 9663676416",
        "llama_model_load: error loading model: unable to allocate CUDA0 buffer",
        "ggml_vulkan: Device memory allocation of size 4294967296 failed.",
        "ggml_vulkan: vk::Device::allocateMemory: ErrorOutOfDeviceMemory",
        "graph_reserve: failed to allocate compute buffers",
        "terminate called after throwing an instance of 'std::bad_alloc'",
        "mmap failed: Cannot allocate memory",
    ],
)
def test_short(line: str) -> None:
    assert short_of_memory(["load_tensors: loading", line, "main: exiting due to model loading error"])


def test_not_short() -> None:
    assert not short_of_memory([])
    assert not short_of_memory(
        [
            "common_params_fit_impl: projected to use 1551 MiB of device memory vs. 81029 MiB of free device memory",
            "llama_model_load: error loading model: unknown model architecture: 'x'",
            "gguf_init_from_file: failed to open GGUF file",
        ]
    )
