"""Runs one fuzz target: first the regression inputs and seeds, then new inputs for some seconds. Fails on any finding.

usage: python3 tests/fuzz/run.py PROGRAM [--seconds N] [--work-dir DIR] [--seed N] [libFuzzer option...]

Seeds: tests/fuzz/corpus/TARGET, tests/fuzz/regression/TARGET and, for pictures, $M2LM_ASSETS/fuzz (default ../shared/assets/fuzz).
New inputs and findings are left in DIR, whose corpus the next run goes on with; DIR/corpus may be deleted.
"""
import argparse
import os
import pathlib
import re
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve().parent
IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".pgm", ".ppm"}
# Largest input, in bytes: small ones are fast, and what can go wrong fits in them.
MAX_LENGTH = {"safetensors": 4096, "gguf": 8192, "config": 4096, "image": 16384, "tokenizer": 8192, "tokenizer_json": 12288, "chat_template": 2048, "placeholders": 256, "pytorch": 8192}


def asset_seeds(target, directory):
    """Copies the small pictures of the shared assets into `directory`; returns how many."""
    source = pathlib.Path(os.environ.get("M2LM_ASSETS") or HERE.parents[1] / "../shared/assets") / "fuzz"
    if target != "image" or not source.is_dir():
        return 0
    directory.mkdir(parents=True, exist_ok=True)
    count = 0
    for path in sorted(source.rglob("*")):
        if path.suffix.lower() in IMAGES and path.stat().st_size <= MAX_LENGTH[target]:
            (directory / f"{count:04}{path.suffix}").write_bytes(path.read_bytes())
            count += 1
    return count


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", type=pathlib.Path)
    parser.add_argument("--seconds", type=int, default=20)
    parser.add_argument("--work-dir", type=pathlib.Path, default=pathlib.Path("fuzz-run"))
    parser.add_argument("--seed", type=int, default=0, help="of libFuzzer's choices; 0: another one each time")
    arguments, options = parser.parse_known_args()
    arguments.program = arguments.program.resolve()
    target = arguments.program.name.removeprefix("fuzz_")
    corpus, findings, assets = (arguments.work_dir / name for name in ("corpus", "findings", "assets"))
    corpus.mkdir(parents=True, exist_ok=True)
    findings.mkdir(exist_ok=True)
    seeds = [d for d in (HERE / "corpus" / target, HERE / "regression" / target) if d.is_dir()]
    if count := asset_seeds(target, assets):
        seeds.append(assets)
        print(f"{count} pictures of the shared assets are seeds, too")

    command = [str(arguments.program), str(corpus), *map(str, seeds), f"-max_total_time={arguments.seconds}", f"-seed={arguments.seed}",
               f"-artifact_prefix={findings}/", f"-max_len={MAX_LENGTH.get(target, 4096)}", "-timeout=10", "-rss_limit_mb=2048",
               "-malloc_limit_mb=1024", "-print_final_stats=1", "-verbosity=1", *options]
    # No object files of other libraries are instrumented: their containers would be reported wrongly.
    environment = os.environ | {"ASAN_OPTIONS": "detect_container_overflow=0:allocator_may_return_null=1:detect_leaks=1"}
    result = subprocess.run(command, env=environment, text=True, errors="replace", stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    executions = re.search(r"stat::number_of_executed_units: *(\d+)", result.stdout)
    coverage = re.findall(r"cov: (\d+)", result.stdout)
    if result.returncode != 0 or not executions:
        print(result.stdout[-8000:])
        print(f"{target}: a finding; its input is in {findings}, run {arguments.program} with it as the argument")
        return 1
    print(f"{target}: {int(executions[1]):,} executions, {coverage[-1] if coverage else '?'} edges reached, no findings")
    return 0


if __name__ == "__main__":
    sys.exit(main())
