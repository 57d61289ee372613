"""What the compiler made of a kernel, read from its cubin: no GPU is needed.

Registers, stack and memory come from ``cuobjdump --dump-resource-usage``, instructions from ``cuobjdump -sass``, which
runs ``nvdisasm``. Both tools come with the extra ``test``; a CUDA toolkit's on the PATH serve as well.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from cute_attn.compile import compile_only
from cute_attn.layouts.base import Config
from cute_attn.problem import Problem

REMEDY = "try pip install 'cute-attn[test]', or put a CUDA toolkit's bin folder on the PATH"
RESOURCES = re.compile(r"^ Function (?P<name>\S+):\n\s+(?P<values>REG:.*)$", re.MULTILINE)
FUNCTION = re.compile(r"^(?=[ \t]+Function : )", re.MULTILINE)
RESOURCE = re.compile(r"(REG|STACK|SHARED|LOCAL):(\d+)")
# "/*0070*/  @!P1 BRA 0x230 ;" -> "BRA"; the instruction's code stands behind it in a comment that holds no ";".
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)


@dataclass(frozen=True)
class Compiled:
    """One kernel as compiled. ``instructions`` maps a mnemonic with its modifiers (``"HGMMA.64x128x16.F32.BF16"``) to
    how often it stands in the code, not how often it runs.

    ``registers`` is what a thread is launched with; where warps are specialised, ``Config.mma_registers`` and
    ``copy_registers`` say what ``setmaxnreg`` makes of it. ``static_smem_bytes`` is shared memory of a size that the
    code fixes; the operands' is asked for at launch and is the plan's to know.
    """

    registers: int
    stack_bytes: int
    local_bytes: int
    static_smem_bytes: int
    instructions: dict[str, int]

    def count(self, mnemonic: str) -> int:
        """Instructions of that name, whatever their modifiers: ``count("HGMMA")`` of warpgroups, ``count("HMMA")`` of warps."""
        return sum(n for name, n in self.instructions.items() if name.split(".", 1)[0] == mnemonic)

    @property
    def size(self) -> int:
        """All instructions."""
        return sum(self.instructions.values())

    @property
    def spill_stores(self) -> int:
        """Stores to local memory: a register that did not fit, or an array indexed at run time."""
        return self.count("STL")

    @property
    def spill_loads(self) -> int:
        """Loads from local memory."""
        return self.count("LDL")


def inspect(problem: Problem, config: Config) -> Compiled:
    """Compile a problem that has one kernel, past every cache, and read its cubin.

    Raises ``NotImplementedError`` where the DSL or the tools are missing, ``RuntimeError`` where a tool fails.
    """
    tools()  # said before anything is compiled
    with tempfile.TemporaryDirectory(prefix="cute_attn_") as folder:
        compile_only(problem, config, f"--keep-cubin --dump-dir={folder}")
        cubins = sorted(Path(folder).glob("*.cubin"))
        if len(cubins) != 1:
            raise RuntimeError(f"the DSL left {len(cubins)} cubins; 1 is needed: is its version the pinned one?")
        return read(cubins[0])


def read(cubin: Path) -> Compiled:
    """What a file of one kernel holds."""
    return parse(_run("--dump-resource-usage", str(cubin)), listing(cubin))


def listing(cubin: Path) -> str:
    """The machine code of a file, as text."""
    return _run("-sass", str(cubin))


def parse(resources: str, sass: str, kernel: str = "") -> Compiled:
    """The record of the one kernel whose name has ``kernel`` in it, from what the two tools print."""
    kernels = [found for found in RESOURCES.findall(resources) if kernel in found[0]]
    if len(kernels) != 1:
        of_name = f" of {kernel}" if kernel else ""
        text = f"cuobjdump lists {len(kernels)} kernels{of_name}; 1 is needed: its output began {resources[:200]!r}"
        raise RuntimeError(text)
    (name, values), code = kernels[0], code_of(sass, kernel)
    found = {key: int(value) for key, value in RESOURCE.findall(values)}
    instructions = Counter(INSTRUCTION.findall(code))
    if len(found) != 4 or not instructions:
        raise RuntimeError(f"cuobjdump's output isn't understood: {name}, {values!r}, {len(instructions)} instructions")
    return Compiled(found["REG"], found["STACK"], found["LOCAL"], found["SHARED"], dict(instructions.most_common()))


def code_of(sass: str, kernel: str) -> str:
    """The part of the disassembly that is the kernels' with ``kernel`` in their name; all of it for ``""``."""
    parts = FUNCTION.split(sass)
    return "".join(part for part in parts if kernel in part.partition("\n")[0])


def tools() -> tuple[Path, Path]:
    """The tools: ``(cuobjdump, nvdisasm)``. Raises ``NotImplementedError`` where one is missing."""
    return _tool("cuobjdump"), _tool("nvdisasm")


def _tool(name: str) -> Path:
    """A tool from its own package, or from the PATH."""
    try:
        for path in metadata.files(f"nvidia-cuda-{name}") or ():
            if path.stem == name and path.parent.name == "bin" and Path(str(path.locate())).exists():
                return Path(str(path.locate()))
    except metadata.PackageNotFoundError:
        pass
    found = shutil.which(name)
    if found is None:
        raise NotImplementedError(f"{name} is not installed; it reads what the compiler made of a kernel: {REMEDY}")
    return Path(found)


def _run(*arguments: str) -> str:
    tool, disassembler = tools()
    path = os.pathsep.join([str(disassembler.parent), os.environ.get("PATH", "")])  # cuobjdump looks for it there
    done = subprocess.run(
        [str(tool), *arguments], capture_output=True, text=True, check=False, env={**os.environ, "PATH": path}
    )
    if done.returncode:
        raise RuntimeError(f"cuobjdump {' '.join(arguments)} failed ({done.returncode}): {done.stderr.strip()[:500]}")
    return done.stdout
