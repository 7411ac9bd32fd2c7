"""What the compiler makes of each Triton kernel, for GPUs that need not be there: registers, spills, the loop.

    python bench/aot.py                               a line per kernel module, case and target
    python bench/aot.py matmul --targets sm_90 --json

    compile_cases(chosen("matmul"))                                      the same from Python: a list of `Facts`
    compile_cases(chosen("matmul", targets=("sm_90",), only=("bf16",)))  cases whose name contains one of these

The cases of each kernel module (`empf.kernels.<module>`) are those of aot_cases.py. Compilation runs in a process of
its own, because `TRITON_INTERPRET=1`, which tests without a GPU set, turns `@triton.jit` functions into something that
cannot be compiled. The disassembler and assembler are those inside the Triton wheel for Linux.
"""

import argparse
import ast
import collections
import functools
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import tokenize
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from itertools import zip_longest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # for bench.*, where this file is run as a script
from bench.aot_cases import CASES, LAUNCH
from empf import kernels

PROCESSES = 2  # that compile at a time
TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950")
TENSOR_CORE = re.compile(r"HGMMA|IGMMA|QGMMA|HMMA|IMMA|QMMA|UTC\w*MMA|v_s?mfma\w*")

PTX_TENSOR_CORE = re.compile(r"\b(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)\.")


@dataclass(frozen=True)
class Facts:
    """What one case became on one target. `loop` is the innermost loop with the most tensor-core instructions."""

    module: str
    case: str
    target: str
    registers: int  # per thread; vector registers on AMD
    shared: int  # bytes per program
    stack: int  # bytes of local memory (scratch) per thread
    spills: int  # local-memory loads and stores (LDL, STL); spilled vector registers on AMD
    tensor_core: int  # tensor-core instructions in the kernel
    instructions: int  # in the kernel
    loop_instructions: int  # per warp and step of `loop`, 0 where there is no such loop
    loop: dict[str, int]  # instructions of the loop by name: {"HGMMA": 4, "LOP3": 32, ...}


def chosen(
    *modules: str, targets: tuple[str, ...] = TARGETS, only: tuple[str, ...] = ("",)
) -> list[tuple[str, str, str]]:
    """(module, case, target) of the cases of `empf.kernels.<module>` whose name contains one of `only`."""
    for what, asked, known in (("modules", modules, CASES), ("targets", targets, TARGETS)):
        if unknown := [name for name in asked if name not in known]:
            raise ValueError(f"{what} must be among {', '.join(known)}, got {', '.join(unknown)}")
    return [
        (module, name, target)
        for module in modules
        for name, *_, options in CASES[module]()
        for target in targets
        if any(text in name for text in only) and target in _options(options, target).get("targets", TARGETS)
    ]


def in_turn() -> list[tuple[str, str, str]]:
    """Two cases of each kernel, each for a target, as (module, case, target); the targets take turns."""
    of_kernel, result = {}, []
    for module in CASES:
        for name, kernel, *_ in CASES[module]():
            of_kernel.setdefault(kernel, []).append((module, name))
    for number, cases in enumerate(of_kernel.values()):
        for turn in (number, number + 4):
            target = TARGETS[turn % len(TARGETS)]
            fitting = [case for case in chosen(cases[0][0], targets=(target,)) if case[:2] in cases]
            result.append(fitting[turn % len(fitting)])
    return result


@functools.cache
def functions() -> dict[str, tuple[str, ...]]:
    """The words of each function for Triton in the kernels, by name, without its comments and docstring."""
    found = {}
    for path in Path(kernels.__file__).parent.glob("*.py"):
        text = path.read_text()
        for function in ast.parse(text).body:
            if any("triton.jit" in ast.unparse(by) for by in getattr(function, "decorator_list", [])):
                lines = text.splitlines(keepends=True)[function.lineno - 1 : function.end_lineno]
                found[function.name] = tuple(
                    token.string.strip() or tokenize.tok_name[token.type]
                    for token in tokenize.generate_tokens(iter(lines).__next__)
                    if token.type not in (tokenize.COMMENT, tokenize.NL) and not token.string.startswith('"""')
                )
    return found


def digest(module: str, case: str, target: str) -> str:
    """Of all that is compiled for it: the kernel, the functions that it calls, and the arguments."""
    [(kernel, types, constexprs, options)] = [rest for name, *rest in CASES[module]() if name == case]
    called, todo = {}, {kernel.__name__}
    while todo:
        called |= {name: functions()[name] for name in todo}
        todo = {word for name in todo for word in called[name] if word in functions()} - called.keys()
    arguments = (types, constexprs, _options(options, target), LAUNCH, target)
    return hashlib.sha256(repr((sorted(called.items()), arguments)).encode()).hexdigest()[:12]


def compile_cases(wanted: list[tuple[str, str, str]], brief: int = 0) -> list[Facts]:
    """Compile what `chosen` names, in `PROCESSES` fresh processes, and return the facts in order.

    The first `brief` of them are not disassembled, which takes as long as compilation: their instructions, loop and
    spills are 0 on NVIDIA, where what is spilled lies on the stack.

    Raises RuntimeError, with the compiler's message, where one fails.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}

    def compiled(part):
        command = [sys.executable, __file__, "--wanted"]
        done = subprocess.run(command, input=json.dumps(part), capture_output=True, text=True, env=environment)
        if done.returncode:
            cases = [line for line in done.stderr.splitlines() if line.startswith(tuple(f"{m}: " for m in CASES))]
            raise RuntimeError(f"does not compile: {cases[-1] if cases else command}\n{done.stderr[-4000:]}")
        return [Facts(**line) for line in json.loads(done.stdout)]

    with ThreadPoolExecutor(PROCESSES) as pool:
        ordered = [(*case, number < brief) for number, case in enumerate(wanted)]
        parts = list(pool.map(compiled, (ordered[i::PROCESSES] for i in range(min(PROCESSES, len(wanted))))))
    return [facts for dealt in zip_longest(*parts) for facts in dealt if facts]


def _compile(kernel, types, constexprs, options, target):
    """The compiled kernel; pointers and integers are multiples of 16 unless `options` says otherwise."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if missing := set(kernel.arg_names) ^ (set(types) | set(constexprs)):
        raise ValueError(f"arguments of {kernel.__name__} missing or unknown: {', '.join(sorted(missing))}")
    constexprs = constexprs | {name: None for name, kind in types.items() if kind is None}
    signature = {name: "constexpr" if name in constexprs else types[name] for name in kernel.arg_names}
    even = [
        (i,)
        for i, (name, kind) in enumerate(signature.items())
        if (kind[0] == "*" or kind in ("i32", "i64")) and name not in options.get("odd", ())
    ]
    cuda = target.startswith("sm_")
    gpu = GPUTarget("cuda", int(target[3:]), 32) if cuda else GPUTarget("hip", target, 64)
    source = ASTSource(kernel, signature, constexprs, {i: [["tt.divisibility", 16]] for i in even})
    chosen = LAUNCH | {name: value for name, value in options.items() if name not in ("targets", "odd")}
    return triton.compile(source, target=gpu, options=chosen)


def _tool(name: str, *arguments: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


def _nvidia(compiled, brief: bool) -> dict:
    """Facts from the machine code; `brief` ones from its header and from PTX."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        code = "" if brief else _tool("cuobjdump", "-sass", file.name)
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
    lines = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,6})\*/\s+(.*?);", code)]
    lines = [(at, re.sub(r"^@!?U?P\w+\s+", "", text.strip())) for at, text in lines]
    jumps = [(re.match(r"BRA\S*\s.*?(0x[0-9a-f]+)", text), at) for at, text in lines]
    loops = [(int(jump[1], 16), at) for jump, at in jumps if jump and int(jump[1], 16) <= at]
    found = _count([(at, text.split()[0].split(".")[0]) for at, text in lines], loops)
    registers, stack = (int(n) for n in re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    spills = found["all"]["LDL"] + found["all"]["STL"]
    facts = _facts(found, registers=registers, shared=compiled.metadata.shared, stack=stack, spills=spills)
    return facts | ({"tensor_core": len(PTX_TENSOR_CORE.findall(compiled.asm["ptx"]))} if brief else {})


def _amd(compiled) -> dict:
    """Facts from the assembly text and its metadata."""
    text = compiled.asm["amdgcn"]
    lines, labels, loops = [], {}, []
    for at, line in enumerate(text.splitlines()):
        if label := re.match(r"(\S+):", line):
            labels[label[1]] = at
        elif instruction := re.match(r"\s+([a-z]\w+_\w+)\s*(.*)", line):
            lines.append((at, instruction[1]))
            destination = instruction[2].split()[0] if instruction[2] else ""
            if instruction[1].startswith(("s_cbranch", "s_branch")) and destination in labels:
                loops.append((labels[destination], at))
    meta = {key: int(value) for key, value in re.findall(r"^\s+\.(\w+):\s+(\d+)$", text, re.M)}
    return _facts(
        _count(lines, loops),
        registers=meta["vgpr_count"],
        shared=meta["group_segment_fixed_size"] or compiled.metadata.shared,
        stack=meta["private_segment_fixed_size"],
        spills=meta["vgpr_spill_count"],
    )


def _count(lines, loops) -> dict:
    """Instructions by name: of the kernel, and of the innermost loop that has the most tensor-core instructions."""

    def counted(low, high):
        return collections.Counter(name for at, name in lines if low <= at <= high)

    with_products = [loop for loop in loops if _tensor_core(counted(*loop))]
    innermost = [
        (low, high)
        for low, high in with_products
        if not any(low <= a and b <= high and (a, b) != (low, high) for a, b in with_products)
    ]
    best = max(innermost, key=lambda loop: _tensor_core(counted(*loop)), default=None)
    return {"all": counted(0, float("inf")), "loop": counted(*best) if best else {}}


def _tensor_core(counts) -> int:
    return sum(n for name, n in counts.items() if TENSOR_CORE.fullmatch(name))


def _facts(found, **rest) -> dict:
    counts = {"tensor_core": _tensor_core(found["all"]), "instructions": sum(found["all"].values())}
    return counts | {"loop_instructions": sum(found["loop"].values()), "loop": dict(found["loop"])} | rest


def _options(options, target) -> dict:
    return options("cuda" if target.startswith("sm_") else "hip") if callable(options) else options


def _run(wanted) -> list[Facts]:
    """Facts of all cases, in this process."""
    cases = {(module, name): rest for module in CASES for name, *rest in CASES[module]()}
    result = []
    for module, name, target, *brief in wanted:
        print(f"{module}: {name} for {target}", file=sys.stderr)  # the last one before a traceback is the culprit
        kernel, types, constexprs, options = cases[module, name]
        compiled = _compile(kernel, types, constexprs, _options(options, target), target)
        found = _nvidia(compiled, any(brief)) if target.startswith("sm_") else _amd(compiled)
        result.append(Facts(module=module, case=name, target=target, **found))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile the Triton kernels for GPUs that need not be there.")
    parser.add_argument(
        "modules", nargs="*", metavar="MODULE", help=f"of empf.kernels: {', '.join(CASES)} (default: all)"
    )
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--only", nargs="+", default=[""], help="only cases whose name contains one of these")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--wanted", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        parser.error("TRITON_INTERPRET=1 is set: nothing can be compiled")
    if arguments.wanted:  # what `compile_cases` asks for
        wanted = json.load(sys.stdin)
    else:
        try:
            wanted = chosen(*arguments.modules or CASES, targets=arguments.targets, only=arguments.only)
        except ValueError as error:
            parser.error(str(error))
    result = _run(wanted)
    if arguments.json or arguments.wanted:
        print(json.dumps([asdict(facts) for facts in result]))
        return
    columns = [column.name for column in fields(Facts) if column.name != "loop"]
    rows = [columns] + [[str(getattr(facts, column)) for column in columns] for facts in result]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


if __name__ == "__main__":
    main()
