"""``vllm_sm12x.proof``: the compile gate passes what it should and fails what it should."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import tempfile
import textwrap
from collections import Counter

import pytest
import triton
import triton.language as tl
from triton import knobs
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from vllm_sm12x import lowering
from vllm_sm12x.proof import discover, gate, machine_code
from vllm_sm12x.proof.__main__ import main
from vllm_sm12x.proof.case import CompileCase
from vllm_sm12x.proof.hardware import occupancy

BF16 = "HMMA.16816.F32.BF16"
E4M3 = "QMMA.16832.F32.E4M3"


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    monkeypatch.delenv(lowering.ENV, raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton-cache"))
    lowering.clear_cache()
    yield
    lowering.clear_cache()


@triton.jit
def products(a, b, out, count, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    place = index[:, None] * SIZE + index[None, :]
    total = tl.zeros((SIZE, SIZE), tl.float32)
    for step in range(0, count):
        at = place + step * SIZE * SIZE
        total = tl.dot(tl.load(a + at), tl.load(b + at), total)
    tl.store(out + place, total)


@triton.jit
def refused_by_triton(out):
    tl.static_assert(False, "this kernel says no")
    tl.store(out, 0.0)


@triton.jit
def refused_by_the_assembler(out):
    value = tl.inline_asm_elementwise("no.such.instruction $0;", "=r", [], tl.int32, True, 1)
    tl.store(out, value)


@gluon.jit
def in_gluon(out, SIZE: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    gl.store(out + gl.arange(0, SIZE, layout), gl.full([SIZE], 0.0, gl.float32, layout))


def case_of(dtype="*bf16", size=64, instruction=None, **changes):
    """``products`` with operands of one type."""
    instruction = instruction or {"*bf16": BF16, "*fp8e4nv": E4M3}[dtype]
    given = {
        "label": "products",
        "kernel": products,
        "signature": {"a": dtype, "b": dtype, "out": "*fp32", "count": "i32"},
        "constexprs": {"SIZE": size},
        "num_warps": 4,
        "num_stages": 2,
        "instructions": (instruction,),
        "divisible_by_16": ("a", "b", "out"),
    }
    return CompileCase(**{**given, **changes})


def other_case(kernel, constexprs=None):
    return CompileCase("other", kernel, {"out": "*fp32"}, constexprs or {}, 4, 1)


# The gate


@pytest.mark.parametrize("target", ["sm_120a", "sm_121a"])
def test_a_bfloat16_product_passes(target):
    report = gate.examine(case_of(), target)
    assert report.failures == ()
    # Each of 4 warps makes a quarter of 64 x 64 from tiles of 16 x 8, in 4 steps of 16.
    assert report.compiled.matrix_instructions == {BF16: 4 * (64 * 64 // (16 * 8)) // 4}
    # Both operands, 64 x 64 bfloat16, in the one buffer that two stages need.
    assert report.compiled.shared_bytes == 2 * 64 * 64 * 2
    assert report.compiled.num_warps == 4
    assert report.compiled.stack_bytes == 0


def test_an_fp8_product_passes_on_sm_120():
    report = gate.examine(case_of("*fp8e4nv"), "sm_120a")
    assert report.failures == ()
    assert report.compiled.has(E4M3) and not report.compiled.has("HMMA")


def test_an_fp8_product_on_sm_121_needs_sm_120s_lowering(monkeypatch):
    monkeypatch.setenv(lowering.ENV, "native")
    report = gate.examine(case_of("*fp8e4nv"), "sm_121a")
    assert len(report.failures) == 1
    assert re.fullmatch(
        r"sm_121a: products \(SIZE=64, num_warps=4, num_stages=2\): no QMMA\.16832\.F32\.E4M3;"
        r" the matrix instructions found: \d+ HMMA\.16816\.F32",
        report.failures[0],
    )
    monkeypatch.setenv(lowering.ENV, "sm120")
    lowering.clear_cache()
    assert gate.examine(case_of("*fp8e4nv"), "sm_121a").failures == ()


def test_auto_gives_sm_121_the_code_of_sm_120():
    # On a Triton that needs the option, and on one that does not.
    codes = [
        gate.examine(case_of("*fp8e4nv"), target).compiled.instructions for target in gate.TARGETS
    ]
    assert codes[0] == codes[1] and codes[0]["QMMA.16832.F32.E4M3.E4M3"] > 0


def test_spills_fail():
    report = gate.examine(case_of(size=128, maxnreg=32, num_stages=1), "sm_120a")
    compiled = report.compiled
    # A thread's share of the result alone is 128 registers.
    assert compiled.registers <= 32
    assert compiled.stack_bytes >= (128 - 32) * 4
    assert compiled.local_stores > 0 and compiled.local_loads > 0
    assert report.failures == (
        "sm_120a: products (SIZE=128, num_warps=4, num_stages=1, maxnreg=32): spills:"
        f" {compiled.stack_bytes} bytes of stack, {compiled.local_stores} STL,"
        f" {compiled.local_loads} LDL with {compiled.registers} registers; allowed: none",
    )


@pytest.mark.parametrize("found", [{"stack_bytes": 8}, {"STL.64": 1}, {"LDL": 1}])
def test_each_sign_of_a_spill_is_enough(found):
    stack = found.get("stack_bytes", 0)
    code = Counter({BF16: 1, **{name: n for name, n in found.items() if name != "stack_bytes"}})
    compiled = gate.Compiled(64, stack, 0, 4, code)
    assert ["spills" in failure for failure in gate.judge(case_of(), compiled)] == [True]


def test_too_much_shared_memory_fails():
    # Three buffers of two operands of 128 x 128 bfloat16.
    report = gate.examine(case_of(size=128, num_warps=8, num_stages=4), "sm_120a")
    assert report.compiled.shared_bytes == 3 * 2 * 128 * 128 * 2
    assert report.failures == (
        "sm_120a: products (SIZE=128, num_warps=8, num_stages=4): shared memory: 196,608 bytes,"
        " allowed: 101,376",
    )
    assert report.compiled.occupancy.blocks == 0


@pytest.mark.parametrize(("shared", "fails"), [(101_376, False), (101_377, True)])
def test_the_last_byte_that_is_allowed(shared, fails):
    compiled = gate.Compiled(64, 0, shared, 4, Counter({BF16: 1}))
    assert bool(gate.judge(case_of(), compiled)) is fails


def test_a_missing_instruction_fails():
    found = dataclasses.replace(other_case(in_gluon, {"SIZE": 128}), instructions=(BF16, E4M3))
    assert gate.examine(found, "sm_120a").failures == (
        f"sm_120a: in_gluon (SIZE=128, num_warps=4, num_stages=1): no {BF16};"
        " the matrix instructions found: none",
        f"sm_120a: in_gluon (SIZE=128, num_warps=4, num_stages=1): no {E4M3};"
        " the matrix instructions found: none",
    )


@pytest.mark.parametrize(
    ("asked", "found"),
    [("HMMA.16816.F32.BF16", True), ("HMMA", True), ("HMMA.16816.F", False), ("MMA", False)],
)
def test_an_instruction_is_named_by_whole_parts(asked, found):
    assert gate.Compiled(1, 0, 0, 1, Counter({BF16: 1})).has(asked) is found


def test_a_gluon_kernel_compiles():
    assert gate.examine(other_case(in_gluon, {"SIZE": 128}), "sm_121a").failures == ()


def test_a_kernel_that_triton_refuses_fails():
    report = gate.examine(other_case(refused_by_triton), "sm_120a")
    assert report.compiled is None and len(report.failures) == 1
    assert report.failures[0].startswith(
        "sm_120a: refused_by_triton (num_warps=4, num_stages=1) does not compile: "
    )
    assert "this kernel says no" in report.failures[0]


def test_a_kernel_that_the_assembler_refuses_fails(capsys, monkeypatch, tmp_path):
    # Triton leaves what was refused in the temporary folder.
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    report = gate.examine(other_case(refused_by_the_assembler), "sm_120a")
    assert report.compiled is None and len(report.failures) == 1
    assert "does not compile: PTXASError" in report.failures[0]
    assert "Not a name of any known instruction: 'no'" in report.failures[0]
    # Triton prints the whole program; standard output is kept for the table.
    assert capsys.readouterr().out == ""


def test_many_are_examined_as_each_alone():
    """One that is refused stands between others, in batches that do not come out even."""
    work = [
        (case_of(), "sm_120a"),
        (other_case(refused_by_triton), "sm_120a"),
        (case_of("*fp8e4nv"), "sm_121a"),
        (case_of(size=128, maxnreg=32, num_stages=1), "sm_120a"),
        (case_of(), "sm_121a"),
    ]
    alone = [gate.examine(case, target) for case, target in work]
    assert [bool(report.failures) for report in alone] == [False, True, False, True, False]
    for at_once in (2, 16):
        assert list(gate.examine_all(work, at_once)) == alone
    assert list(gate.examine_all([])) == []


def test_a_bad_target_is_refused():
    with pytest.raises(ValueError, match="^target: 'sm_90a', allowed: sm_120a, sm_121a$"):
        gate.examine(case_of(), "sm_90a")


def test_an_interpreted_kernel_is_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    interpreted = other_case(triton.jit(refused_by_triton.fn))
    with pytest.raises(ValueError, match="a InterpretedFunction, allowed: a triton.jit function"):
        gate.examine(interpreted, "sm_120a")


# A case


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"constexprs": {}}, "products: 'SIZE' is in neither of signature and constexprs"),
        ({"constexprs": {"SIZE": 64, "count": 1}}, "products: 'count' is in both of signature"),
        (
            {"constexprs": {"SIZE": 64, "Size": 1}},
            "products: 'Size' is no argument; the arguments of products are a, b, out, count, SIZE",
        ),
        ({"divisible_by_16": ("c",)}, "products: divisible_by_16 names 'c', allowed: a, b, out"),
        ({"divisible_by_16": "a"}, "products: divisible_by_16 is a string, allowed: a tuple"),
        ({"instructions": BF16}, "products: instructions is a string, allowed: a tuple"),
    ],
)
def test_a_wrong_case_is_refused(changes, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        case_of(**changes)


def test_alignment_reaches_the_compiler():
    def wide_copies(case):
        code = gate.examine(case, "sm_120a").compiled.instructions
        return sum(n for name, n in code.items() if name.startswith("LDGSTS") and "128" in name)

    assert wide_copies(case_of()) > 0
    assert wide_copies(case_of(divisible_by_16=())) == 0


# Machine code


@pytest.fixture
def cubin():
    """Of the FP8 product, for sm_120a, and the file it lies in."""
    case = case_of("*fp8e4nv")
    return triton.compile(
        gate.source_of(case),
        target=triton.backends.compiler.GPUTarget("cuda", 120, 32),
        options={"num_warps": case.num_warps, "num_stages": case.num_stages},
    ).asm["cubin"]


def test_the_code_is_read_as_the_disassembler_reads_the_whole_file(cubin, tmp_path):
    path = tmp_path / "kernel.cubin"
    path.write_bytes(cubin)
    listing = subprocess.run(
        [knobs.nvidia.nvdisasm.path, "-c", path], capture_output=True, text=True, check=True
    ).stdout
    line = re.compile(r"/\*[0-9a-f]{4,}\*/ +(?:@!?U?P[0-9T]+ +)?([A-Z][A-Z0-9_.]*)")
    expected = Counter(line.findall(listing))
    assert expected["EXIT"] > 0 and expected["QMMA.16832.F32.E4M3.E4M3"] > 0
    assert machine_code.instructions([cubin]) == [expected]


def test_files_that_are_read_together_have_the_counts_that_each_has_alone(cubin):
    case = case_of()
    other = triton.compile(
        gate.source_of(case),
        target=triton.backends.compiler.GPUTarget("cuda", 120, 32),
        options={"num_warps": case.num_warps, "num_stages": case.num_stages},
    ).asm["cubin"]
    (first,), (second,) = (machine_code.instructions([one]) for one in (cubin, other))
    assert first != second
    assert machine_code.instructions([cubin, other, cubin]) == [first, second, first]
    assert machine_code.instructions([]) == []


def test_code_that_the_disassembler_does_not_read_whole_is_refused(cubin, monkeypatch):
    run_tool = machine_code._run_tool
    monkeypatch.setattr(
        machine_code,
        "_run_tool",
        lambda *words, content: run_tool(*words, content=content[:-16]),
    )
    with pytest.raises(RuntimeError, match="^nvdisasm read [0-9]+ instructions of 16 bytes in"):
        machine_code.instructions([cubin])


def test_registers_are_those_that_the_assembler_reports(cubin, tmp_path):
    path = tmp_path / "kernel.cubin"
    path.write_bytes(cubin)
    report = subprocess.run(
        [knobs.nvidia.cuobjdump.path, "-res-usage", path],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert f"REG:{machine_code.usage(cubin, 'products').registers} STACK:0 " in report
    with pytest.raises(ValueError, match="^name: 'product', allowed: products$"):
        machine_code.usage(cubin, "product")


def test_what_is_no_cubin_is_refused():
    with pytest.raises(ValueError, match="^elf: begins with b'PK.*, allowed: a 64-bit"):
        list(machine_code.sections(b"PK\3\4" + bytes(60)))
    with pytest.raises(RuntimeError, match=r"^cuobjdump failed \(\d+\): "):
        machine_code.usage(b"no cubin", "products")


# Occupancy


@pytest.mark.parametrize(
    ("registers", "warps", "shared", "blocks", "limit"),
    [
        # 128 x 32 = 4,096 registers a warp: 4 warps in each of 4 parts of 16,384.
        (128, 4, 0, 4, "registers"),
        # 129 x 32 = 4,128, in units of 256 4,352: 3 warps in a part, 12 in all.
        (129, 4, 0, 3, "registers"),
        # The same 12 warps, by 3 (undivided, the registers would be enough for 15) and by 8.
        (129, 3, 0, 4, "registers"),
        (129, 8, 0, 1, "registers"),
        # 40 x 32 = 1,280: 12 warps in a part, 48 in all. 41: 1,536, 10 and 40.
        (40, 4, 0, 12, "registers, warps"),
        (41, 4, 0, 10, "registers"),
        # 1,024 a warp: 64 warps would have registers, 48 is the most.
        (32, 4, 0, 12, "warps"),
        (16, 1, 0, 24, "blocks"),
        (24, 32, 0, 1, "warps"),
        # 255: 8,192 a warp, 2 in a part, 8 in all; 9 warps do not fit.
        (255, 8, 0, 1, "registers"),
        (255, 9, 0, 0, "registers"),
        # 32,768 + 1,024 reserved: 3 in 102,400. 82 registers would let 5 in.
        (82, 4, 32_768, 3, "shared memory"),
        # 50,176 + 1,024 is half of 102,400; one byte more is one unit of 128 more.
        (32, 4, 50_176, 2, "shared memory"),
        (32, 4, 50_177, 1, "shared memory"),
        # A third of 102,400 is 266 units and a bit; 33,024 + 1,024 are 266 units.
        (32, 4, 33_024, 3, "shared memory"),
        (32, 4, 33_025, 2, "shared memory"),
        (32, 4, 101_376, 1, "shared memory"),
        (255, 8, 51_200, 1, "registers, shared memory"),
        (32, 4, 101_377, 0, "shared memory"),
    ],
)
def test_occupancy(registers, warps, shared, blocks, limit):
    # Computed by hand; NVIDIA's cuda_occupancy.h gives the same.
    found = occupancy(registers, warps, shared)
    assert (found.blocks, found.warps, found.limit) == (blocks, blocks * warps, limit)
    assert found.share == blocks * warps / 48


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 4, 0), "registers: 0, allowed: from 1 on"),
        ((32, 0, 0), "num_warps: 0, allowed: from 1 on"),
        ((32, 4, -1), "shared_bytes: -1, allowed: from 0 on"),
    ],
)
def test_wrong_figures_are_refused(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        occupancy(*arguments)


# Discovery

KERNEL = """
    import triton
    import triton.language as tl

    @triton.jit
    def helper(out, SIZE: tl.constexpr):
        tl.store(out + tl.arange(0, SIZE), 1.0)

    @triton.jit
    def fill(out, SIZE: tl.constexpr):
        helper(out, SIZE)
    """
CASES = """
    from vllm_sm12x.proof.case import CompileCase
    from .kernel import fill

    TABLE = {"sm_120": {64: "a row", 128: "another"}, "sm_90": {64: "Hopper's"}}
    TABLES = (TABLE,)

    def cases():
        return [
            CompileCase(f"fill {size}", fill, {"out": "*fp32"}, {"SIZE": size}, 4, 1,
                        configuration=row)
            for size, row in TABLE["sm_120"].items()
        ]
    """


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Make a package of operations: file name in it -> content; the package's name is returned."""
    # Short and unlike that of another test, which a test's own name with its parameters is not.
    name = "made_" + re.sub(r"\W", "_", tmp_path.name)
    monkeypatch.syspath_prepend(tmp_path)

    def make(**operations):
        for operation, files in operations.items():
            folder = tmp_path / name / operation
            folder.mkdir(parents=True)
            for file, content in {"__init__": "", **files}.items():
                (folder / f"{file}.py").write_text(textwrap.dedent(content).lstrip("\n"))
        (tmp_path / name / "__init__.py").touch()
        return name

    yield make
    for module in [module for module in sys.modules if module.partition(".")[0] == name]:
        del sys.modules[module]


def test_cases_are_found(package):
    name = package(filling={"kernel": KERNEL, "compile_cases": CASES}, plain={"reference": ""})
    assert discover.operations(name) == ["filling", "plain"]
    found = discover.cases(name)
    assert {op: [case.label for case in given] for op, given in found.items()} == {
        "filling": ["fill 64", "fill 128"]
    }
    assert discover.gaps(name) == []


def test_a_kernel_without_cases_is_found(package):
    # Once, though the package gives it on.
    exported = "import triton\nfrom .kernel import fill"
    name = package(filling={"kernel": KERNEL, "__init__": exported}, plain={"reference": ""})
    assert discover.gaps(name) == [
        "filling: the kernel fill of kernel.py has no case, for there is no compile_cases.py"
    ]


def test_a_kernel_beside_the_compiled_one_is_found(package):
    # A mention in a comment or a string is no call.
    more = KERNEL.replace("helper(out, SIZE)\n", "helper(out, SIZE)  # as forgotten does\n")
    more += '''
    @triton.jit
    def forgotten(out):
        """Not fill."""
        helper(out, 1)
    '''
    name = package(filling={"kernel": more, "compile_cases": CASES})
    assert discover.gaps(name) == ["filling: the kernel forgotten of kernel.py has no case"]


def test_a_row_without_a_case_is_found(package):
    cases = CASES.replace(".items()", ".items() if size == 64")
    name = package(filling={"kernel": KERNEL, "compile_cases": cases})
    assert discover.gaps(name) == [
        "filling: the row TABLES[0]['sm_120'][128] (another) has no case"
    ]


@pytest.mark.parametrize(
    ("tables", "gap"),
    [
        ("OTHER = ()", "filling: compile_cases.py names no TABLES"),
        ("TABLES = ()", "filling: compile_cases.py names no TABLES"),
        ("TABLES = ({'sm_90': {1: 2}},)", "filling: TABLES[0] has no rows for SM12x"),
        ("TABLES = ({('sm_90', 1): 2},)", "filling: TABLES[0] has no rows for SM12x"),
    ],
)
def test_tables_must_be_named_and_have_rows(package, tables, gap):
    cases = CASES.replace("TABLES = (TABLE,)", tables)
    name = package(filling={"kernel": KERNEL, "compile_cases": cases})
    assert discover.gaps(name) == [gap]


@pytest.mark.parametrize(
    ("cases", "message"),
    [
        ("def cases(): return []", r"cases\(\) gives none"),
        ("def cases(): return ['fill']", r"cases\(\) gives a str, allowed: CompileCase"),
        (CASES.replace("fill {size}", "fill"), "two cases are labelled 'fill', allowed: one"),
    ],
)
def test_wrong_compile_cases_are_refused(package, cases, message):
    name = package(filling={"kernel": KERNEL, "compile_cases": cases})
    with pytest.raises(ValueError, match=rf"^{name}\.filling\.compile_cases: {message}"):
        discover.cases(name)


ROWS = """
    from types import SimpleNamespace
    from vllm_sm12x.proof.case import CompileCase
    from .kernel import fill

    ROW = SimpleNamespace(size=64, num_warps=4, maxnreg=None, other=7)
    TABLES = ({"sm_120": ROW},)

    def cases():
        return [CompileCase("fill", fill, {"out": "*fp32"}, {"SIZE": 64}, 4, 1, configuration=ROW)]
    """


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("size=64, num_warps=4, maxnreg=None", None),
        ("size=32, num_warps=4, maxnreg=None", "size 64, allowed: 32"),
        ("size=64, num_warps=8, maxnreg=None", "num_warps 4, allowed: 8"),
        ("size=64, num_warps=4, maxnreg=128", "maxnreg None, allowed: 128"),
        ("size=64, num_stages=2", "num_stages 1, allowed: 2"),
    ],
)
def test_a_case_must_agree_with_its_configuration(package, row, message):
    cases = ROWS.replace("size=64, num_warps=4, maxnreg=None", row)
    name = package(filling={"kernel": KERNEL, "compile_cases": cases})
    if message is None:
        assert len(discover.cases(name)["filling"]) == 1 and discover.gaps(name) == []
    else:
        expected = f"'fill' has {message}, as in its configuration"
        with pytest.raises(ValueError, match=re.escape(expected)):
            discover.cases(name)


# The command


def test_the_command_prints_a_table(package, capsys):
    name = package(filling={"kernel": KERNEL, "compile_cases": CASES})
    assert main([], name) == 0
    head, titles, *rows, last = capsys.readouterr().out.splitlines()
    assert head == f"Triton {triton.__version__}, SM12X_LOWERING=auto"
    assert re.split(" {2,}", titles) == [
        *("operation", "case", "target", "regs", "stack", "shared", "blocks", "warps", "limit"),
        *("verdict", "matrix instructions"),
    ]
    assert [row.split()[:4] for row in rows] == [
        ["filling", "fill", size, target]
        for size in ("64", "128")
        for target in ("sm_120a", "sm_121a")
    ]
    # No stack, no shared memory, 12 blocks of 4 warps, all 48.
    assert all(re.search(r" \d+ +0 +0 +12 +48/48 +warps +pass$", row) for row in rows)
    assert last == "4 passed, 0 failed, 0 without a case"


def test_a_failure_is_exit_status_1(package, capsys):
    cases = CASES.replace("configuration=row", "configuration=row, instructions=('HMMA',)")
    name = package(filling={"kernel": KERNEL, "compile_cases": cases})
    assert main(["--target", "sm_120a"], name) == 1
    *_, first, second, last = capsys.readouterr().out.splitlines()
    assert first == (
        "FAILED sm_120a: fill (SIZE=64, num_warps=4, num_stages=1): no HMMA;"
        " the matrix instructions found: none"
    )
    assert second.startswith("FAILED sm_120a: fill (SIZE=128, ")
    assert last == "0 passed, 2 failed, 0 without a case"


def test_what_does_not_compile_is_in_the_table(package, capsys):
    kernel = KERNEL.replace("helper(out, SIZE)\n", "tl.static_assert(SIZE == 64)\n")
    name = package(filling={"kernel": kernel, "compile_cases": CASES})
    assert main(["--target", "sm_120a"], name) == 1
    out = capsys.readouterr().out
    assert re.search(r"^filling +fill 64 .* pass$", out, re.MULTILINE)
    assert re.search(r"^filling +fill 128 .* FAILED +does not compile$", out, re.MULTILINE)


def test_a_gap_is_exit_status_1(package, capsys):
    name = package(
        filling={"kernel": KERNEL, "compile_cases": CASES},
        pouring={"kernel": KERNEL.replace("fill", "pour")},
    )
    assert main(["--target", "sm_120a"], name) == 1
    *_, gap, last = capsys.readouterr().out.splitlines()
    assert gap.startswith("FAILED pouring: the kernel pour of kernel.py has no case")
    assert last == "2 passed, 0 failed, 1 without a case"
    assert main(["--target", "sm_120a", "--op", "filling"], name) == 0


def test_nothing_to_compile_is_exit_status_1(package, capsys):
    name = package(plain={"reference": ""})
    assert main([], name) == 1
    assert "FAILED nothing to compile" in capsys.readouterr().out


def test_an_unknown_operation_is_wrong_usage(package, capsys):
    name = package(filling={"kernel": KERNEL, "compile_cases": CASES})
    with pytest.raises(SystemExit, match="^2$"):
        main(["--op", "fil"], name)
    assert "--op: 'fil', allowed: filling" in capsys.readouterr().err


def test_the_json_has_what_the_table_has(package, capsys):
    name = package(filling={"kernel": KERNEL, "compile_cases": CASES})
    assert main(["--json", "--target", "sm_121a"], name) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["triton"], found["lowering"], found["gaps"]) == (triton.__version__, "auto", [])
    first, second = found["results"]
    assert (first["operation"], first["case"], first["kernel"]) == ("filling", "fill 64", "fill")
    assert first["configuration"] == "SIZE=64, num_warps=4, num_stages=1"
    assert first["options"] == lowering.launch_options((12, 1))
    assert first["registers"] > 0
    expected = {
        **{"target": "sm_121a", "failures": [], "stack_bytes": 0, "local_stores": 0},
        **{"local_loads": 0, "shared_bytes": 0, "blocks": 12, "warps": 48, "limit": "warps"},
        "matrix_instructions": {},
    }
    assert {key: first[key] for key in expected} == expected
    assert second["case"] == "fill 128"
