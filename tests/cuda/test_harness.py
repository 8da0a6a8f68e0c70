# SPDX-License-Identifier: Apache-2.0
"""The harness: every planted bug is caught, its correct twin is not, and the samples are right."""

import ctypes
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from tests.cuda.harness import build

HERE = Path(__file__).resolve().parent
PLANTED = sorted((HERE / "planted").glob("*.cu"))
SAMPLES = sorted((HERE / "samples").glob("*.cu"))
RIGHT, WRONG, REFUSED, RACE = 0, 1, 2, 66


@dataclass(frozen=True)
class Caught:
    """Which of the checks must catch a bug; any other may.

    wrong: the results, in every order. says: a check of the harness, in every order, in these
    words and, with `line`, pointing to a line that reads so. asan: words of the sanitizers. tsan:
    a data race, with `line` if that is given.
    """

    wrong: bool = False
    says: str = ""
    line: str = ""
    asan: str = ""
    tsan: bool = False


OVERFLOW = "AddressSanitizer: heap-buffer-overflow"
BUGS = {
    "missing_barrier": Caught(wrong=True, tsan=True),
    "reused_buffer": Caught(wrong=True, tsan=True),
    "barrier_after_staging": Caught(tsan=True),
    "barrier_after_atomics": Caught(tsan=True),
    "missing_syncwarp": Caught(tsan=True),
    "divergent_barrier": Caught(says="divergent barrier", line="__syncthreads();"),
    "early_exit": Caught(says="early exit", line="__syncthreads();"),
    "divergent_shuffle": Caught(says="early exit: __shfl_sync", line="sum += __shfl_xor_sync"),
    "lane_outside_mask": Caught(says="lane 15 reads lane 16", line="__shfl_sync(mask"),
    "collectives": Caught(wrong=True),
    "missing_wait": Caught(says="nobody waited", line="__pipeline_memcpy_async"),
    "wait_for_too_few": Caught(wrong=True),
    "missing_cluster_sync": Caught(wrong=True, tsan=True),
    "peer_not_started": Caught(says="may not have started", line="map_shared_rank"),
    "missing_final_cluster_sync": Caught(says="missing cluster barrier", line="map_shared_rank"),
    "read_after_exit": Caught(wrong=True, asan="AddressSanitizer: use-after-poison"),
    "static_shared_in_cluster": Caught(says="static __shared__"),
    "global_out_of_bounds": Caught(asan=OVERFLOW),
    "dynamic_out_of_bounds": Caught(asan=OVERFLOW),
    "static_out_of_bounds": Caught(asan="index 64 out of bounds"),
    "misaligned_intrinsic": Caught(says="misaligned", line="__ldcs"),
    "misaligned_access": Caught(asan="misaligned address"),
    "missing_fence_before": Caught(tsan=True),
    "missing_fence_after": Caught(tsan=True),
    "atomics": Caught(wrong=True),
    "missing_grid_sync": Caught(wrong=True, tsan=True),
    "not_cooperative": Caught(says="the launch is not cooperative", line="this_grid"),
    "race_between_blocks": Caught(tsan=True),
    "endless_spin": Caught(says="timeout", line="while (atomicAdd"),
    "too_many_threads": Caught(says="threads per block must be in 1..1024; got 1056"),
    "shared_not_asked_for": Caught(says="cudaFuncSetAttribute allowed; got 102400"),
    "shared_beyond_the_limit": Caught(says="invalid argument"),
    "cluster_not_asked_for": Caught(says="more than 8 blocks"),
    "broken_cluster": Caught(says="the grid must be whole clusters; got 6"),
    "empty_grid": Caught(says="the grid's x must be in 1..2^31-1; got 0"),
}


def one_source(folder, *sources):
    """Sources as one: the headers take longer than the kernels."""
    path = folder / "all.cu"
    path.write_text("".join(f'#include "{source}"\n' for source in sources))
    return path


@pytest.fixture(scope="session")
def program(tmp_path_factory):
    """Builds the planted kernels in a mode, once."""
    built = {}

    def make(mode):
        if reason := build.missing(mode):
            pytest.skip(reason)
        if mode not in built:
            folder = tmp_path_factory.mktemp(mode)
            source = one_source(folder, *PLANTED, HERE / "planted" / "main.cpp")
            built[mode] = build.compile_host(
                [source], folder / "planted", mode, flags=("-Werror",), executable=True
            )
        return built[mode]

    return make


def test_every_planted_bug_is_listed(program):
    assert set(build.start(program("plain")).stdout.split()) == set(BUGS)


# The sanitizers see much the same in every order; three are enough.
RUNS = [("plain", order) for order in build.ORDERS]
RUNS += [(mode, order) for mode in ("asan", "tsan") for order in ("fifo", "lifo", "1")]


@pytest.mark.parametrize(("mode", "order"), RUNS)
def test_correct_kernels_pass(mode, order, program):
    done = build.start(program(mode), "correct", mode=mode, order=order)
    assert done.returncode == RIGHT, done.stdout[-6000:]
    assert len(re.findall(" right$", done.stdout, re.M)) == len(BUGS)
    assert "simt:" not in done.stdout


def points_to(text, line):
    """Whether some place that the text names as file:line reads so there."""
    places = re.findall(r"(/\S+\.cu):(\d+)", text)
    return any(line in Path(file).read_text().splitlines()[int(n) - 1] for file, n in places)


@pytest.mark.parametrize("order", build.ORDERS)
def test_results_or_checks_find_planted_bugs(order, program):
    for name, caught in BUGS.items():
        done = build.start(program("plain"), "broken", name, order=order)
        if caught.wrong:
            assert done.returncode == WRONG, f"{name}\n{done.stdout}"
        if caught.says:
            assert done.returncode == REFUSED, f"{name}\n{done.stdout}"
            assert re.search(f"^{name} .*{re.escape(caught.says)}", done.stdout, re.M), done.stdout
            assert points_to(done.stdout, caught.line) or not caught.line, f"{name}\n{done.stdout}"


@pytest.mark.parametrize("mode", ["plain", "asan"])
def test_a_failed_launch_leaves_nothing_behind(mode, program):
    names = [name for name, caught in BUGS.items() if caught.says]
    done = build.start(program(mode), "both", *names, mode=mode, order="lifo")
    assert done.returncode == RIGHT, done.stdout[-6000:]
    assert len(re.findall("^simt: ", done.stdout, re.M)) >= len(names) - 1  # one has no launch


@pytest.mark.parametrize("name", [name for name, caught in BUGS.items() if caught.asan])
def test_address_sanitizer_finds_planted_bugs(name, program):
    done = build.start(program("asan"), "broken", name, mode="asan", order="lifo")
    assert done.returncode != RIGHT
    assert BUGS[name].asan in done.stdout, done.stdout[-6000:]


@pytest.mark.parametrize("name", [name for name, caught in BUGS.items() if caught.tsan])
def test_thread_sanitizer_finds_planted_bugs(name, program):
    done = build.start(program("tsan"), "broken", name, mode="tsan")
    assert done.returncode == RACE, done.stdout[-6000:]
    assert "ThreadSanitizer: data race" in done.stdout
    # In the kernel, not in the harness.
    assert points_to(done.stdout[: done.stdout.find("Previous")], ""), done.stdout[-6000:]


# Python ---------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def samples(tmp_path_factory):
    if reason := build.missing():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("samples")
    return ctypes.CDLL(str(build.compile_host(SAMPLES, folder / "samples.so", flags=("-Werror",))))


def address(x):
    return ctypes.c_void_p(x.ctypes.data)


@pytest.mark.parametrize("order", build.ORDERS)
@pytest.mark.parametrize(("kind", "classes"), [(0, 100), (1, 1000), (2, 1024)])
@pytest.mark.parametrize(("dtype", "error"), [(np.float32, 4e-7), (np.float16, 5e-4)])
def test_softmax_agrees_with_float64(kind, classes, dtype, error, order, samples):
    z = (np.random.default_rng(0).normal(size=(7, classes)) * 3).astype(dtype)
    e = np.exp(z.astype(np.float64) - z.max(-1, keepdims=True).astype(np.float64))
    p = e / e.sum(-1, keepdims=True)
    found = np.full_like(z, -1)
    samples.simt_set_order(order.encode())
    code = (np.float32, np.float16).index(dtype)
    assert samples.planted_softmax(kind, code, address(z), address(found), 7, classes) == 0
    assert np.abs(found - p).max() <= error


def test_16_bit_types_round_as_numpy_does(samples):
    bits = np.arange(1 << 16, dtype=np.uint32)
    every = bits.astype(np.uint16)
    wide = np.empty((1 << 16, 2), np.float32)
    assert samples.widen(address(every), address(every), address(wide), 1 << 16) == 0
    assert np.array_equal(wide[:, 0], every.view(np.float16).astype(np.float32), equal_nan=True)
    assert np.array_equal(wide[:, 1], (bits << 16).view(np.float32), equal_nan=True)

    # Every value of either type, half way to the next, and a little to both sides of that.
    values = [wide.ravel()]
    for column in wide.T:
        ordered = np.sort(column[np.isfinite(column)]).astype(np.float64)
        middles = ((ordered[:-1] + ordered[1:]) / 2).astype(np.float32)
        values += [middles, *(np.nextafter(middles, s) for s in np.float32([-np.inf, np.inf]))]
    values = np.concatenate(values)
    half, bfloat = (np.empty(values.size, np.uint16) for _ in range(2))
    assert samples.round_floats(address(values), address(half), address(bfloat), values.size) == 0
    with np.errstate(over="ignore"):
        assert np.array_equal(half.view(np.float16), values.astype(np.float16), equal_nan=True)
    u = values.view(np.uint32).astype(np.uint64)
    expected = ((u + 0x7FFF + (u >> 16 & 1)) >> 16).astype(np.uint16)
    numbers = ~np.isnan(values)
    assert np.array_equal(bfloat[numbers], expected[numbers])
    assert np.isnan((bfloat[~numbers].astype(np.uint32) << 16).view(np.float32)).all()


@pytest.mark.parametrize("mode", ["asan", "tsan"])
def test_python_loads_sanitized_libraries(mode, tmp_path):
    """An array that is a row too short is noticed, and a right call is not."""
    if reason := build.missing(mode):
        pytest.skip(reason)
    library = build.compile_host([HERE / "samples" / "softmax.cu"], tmp_path / "softmax.so", mode)
    source = tmp_path / "drive.py"
    source.write_text(
        "import ctypes, sys\nimport numpy as np\n"
        f"library = ctypes.CDLL({str(library)!r})\n"
        "x, y = np.zeros((2, 7, 128), np.float32)[:, : int(sys.argv[1])].copy()\n"
        "a, b = (ctypes.c_void_p(v.ctypes.data) for v in (x, y))\n"
        "for kind in range(3):\n"
        "    assert library.planted_softmax(kind, 0, a, b, 7, 128) == 0\n"
        "assert np.allclose(y[:7], 1 / 128)\nprint('done')\n"
    )
    done = build.start(source, 7, mode=mode)
    assert done.returncode == 0, done.stdout[-6000:]
    assert done.stdout.endswith("done\n")
    if mode == "asan":
        done = build.start(source, 6, mode=mode)
        assert "AddressSanitizer: heap-buffer-overflow" in done.stdout, done.stdout[-6000:]


# The dialect ----------------------------------------------------------------------------------


def test_activemask_is_refused(tmp_path):
    if reason := build.missing():
        pytest.skip(reason)
    source = tmp_path / "mask.cu"
    source.write_text(
        "#include <cuda_runtime.h>\n__global__ void k(unsigned *m) { *m = __activemask(); }\n"
    )
    with pytest.raises(RuntimeError, match="which lanes run together is undefined"):
        build.compile_host([source], tmp_path / "mask.so")


def test_a_loop_that_never_ends_is_ended(tmp_path):
    if reason := build.missing():
        pytest.skip(reason)
    source = tmp_path / "spin.cu"
    source.write_text(
        f'#include "{HERE}/planted/planted.h"\n'
        "__global__ void k(volatile int *p) { while (!*p) {} }\n"
        "int main() { int zero = 0; return planted::launch({1, 32}, k, &zero); }\n"
    )
    program = build.compile_host([source], tmp_path / "spin", executable=True)
    done = build.start(program, SIMT_SECONDS="0.2")
    assert done.returncode != 0
    assert "timeout: a thread runs on and on" in done.stdout


def test_nvcc_compiles_the_same_sources(tmp_path):
    """What only the harness understood would prove nothing about CUDA."""
    if not shutil.which("nvcc"):
        pytest.skip("nvcc is not installed: whether the harness's kernels are CUDA is not checked")
    source = one_source(tmp_path, *PLANTED, *SAMPLES)
    build.run("nvcc", "-std=c++17", "-arch=sm_90", "-c", source, "-o", tmp_path / "all.o")


def test_shadows_have_the_names_that_csrc_has():
    names = re.compile(r"^MSDKERN_DEVICE [^;{]*?(\w+)\(", re.M)
    for shadow in (path for path in (build.HERE / "shadow").rglob("*") if path.is_file()):
        original = build.CSRC / shadow.relative_to(build.HERE / "shadow")
        if not original.exists():
            pytest.skip(f"csrc has no {original.name}, for which {shadow.name} would stand in")
        ours, theirs = (set(names.findall(path.read_text())) for path in (shadow, original))
        assert theirs
        assert theirs <= ours, f"not in {shadow}: {sorted(theirs - ours)}"
