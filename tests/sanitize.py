"""The native tests under sanitizers: `make test-sanitize`, or `python -m tests.sanitize [address] [thread]`.

    address   AddressSanitizer with UndefinedBehaviorSanitizer
    thread    ThreadSanitizer

Each builds the compute core anew into an environment of its own under build/, which borrows all else from this one.
Before the tests, mistakes on purpose must end the process: a sanitizer that sees nothing would pass everything.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
TESTS = ["tests/conformance/test_kernels.py", "tests/conformance/test_engine.py"]


@dataclass(frozen=True)
class Sanitizer:
    """One build and how it is run."""

    flags: str
    library: str
    """Loaded before Python, which is not built with it."""
    options: dict[str, str]
    mistakes: tuple[str, ...]
    select: str
    """Of TESTS, as pytest's -k: what a run many times slower can do in two minutes."""


SANITIZERS = {
    "address": Sanitizer(
        "address,undefined",
        "libasan.so",
        # Leaks: Python's own at exit hide all others. Threads of a pool are few.
        {"ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1", "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1"},
        ("address", "undefined"),
        "not test_attention and not test_quantised_linear and not large",
    ),
    "thread": Sanitizer(
        "thread",
        "libtsan.so",
        {"TSAN_OPTIONS": "halt_on_error=1:exitcode=66:report_signal_unsafe=0", "OPENBLAS_NUM_THREADS": "1"},
        ("thread",),
        # What has threads: the pool's own tests, and models computed by several.
        "late_threads or left_asleep or called_over or keep_to or more_threads or agrees_with_the_reference"
        " or any_company or stopped or owe_nothing or local",
    ),
}


def build(name: str, sanitizer: Sanitizer) -> Path:
    """The environment's Python."""
    folder = REPOSITORY / "build" / f"sanitize-{name}"
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    borrowed = [path for path in sys.path if path.endswith("site-packages")]
    (folder / "lib" / version / "site-packages" / "borrowed.pth").write_text("\n".join(borrowed) + "\n")
    command = [python, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "--force-reinstall"]
    settings = [f"-Ccmake.define.HOB_SANITIZE={sanitizer.flags}", f"-Cbuild-dir={folder / 'objects'}"]
    subprocess.run([*command, *settings, str(REPOSITORY)], check=True)
    return python


def environment(sanitizer: Sanitizer) -> dict[str, str]:
    """With the sanitizer's library before all others, and the C++ library, whose `throw` it takes over at its start."""
    compiler = os.environ.get("CXX") or sysconfig.get_config_var("CXX").split()[0]
    libraries = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], check=True, capture_output=True, text=True
        ).stdout.strip()
        for name in (sanitizer.library, "libstdc++.so.6")
    ]
    return os.environ | sanitizer.options | {"LD_PRELOAD": " ".join(libraries)}


def check_it_sees(python: Path, sanitizer: Sanitizer) -> None:
    """Raises SystemExit if a mistake on purpose goes unnoticed."""
    for mistake in sanitizer.mistakes:
        code = f"from hob.native import _core; _core.provoke({mistake!r})"
        result = subprocess.run(
            [*FIXED_ADDRESSES, python, "-c", code], env=environment(sanitizer), capture_output=True, text=True
        )
        if result.returncode == 0 or not ("Sanitizer" in result.stderr or "runtime error" in result.stderr):
            raise SystemExit(
                f"a mistake of kind '{mistake}' went unnoticed: the sanitizer does not work here.\n{result.stderr}"
            )


FIXED_ADDRESSES = ["setarch", "-R"]
"""ThreadSanitizer's shadow memory cannot be where newer kernels put libraries at random."""


def main(names: list[str]) -> int:
    """Exit status of the first run that fails, else 0."""
    for name in names or list(SANITIZERS):
        sanitizer = SANITIZERS[name]
        python = build(name, sanitizer)
        check_it_sees(python, sanitizer)
        print(f"{name}: sees mistakes made on purpose", flush=True)
        command = [
            *FIXED_ADDRESSES,
            python,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            "-k",
            sanitizer.select,
            *TESTS,
        ]
        status = subprocess.run(command, cwd=REPOSITORY, env=environment(sanitizer)).returncode
        if status:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
