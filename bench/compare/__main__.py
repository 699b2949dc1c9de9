#!/usr/bin/env python3
"""This library beside the programs that people use, on the same weights, bits, threads and prompt, in turns.

    bash bench/compare/install.sh DIR                     the peers, in an environment of their own
    DIR/bin/python bench/compare ops                      single kernels
    DIR/bin/python bench/compare models --peers DIR --bench build/release/bin/m2lm-bench
    DIR/bin/python bench/compare ops --random             shapes drawn from --seed
    DIR/bin/python bench/compare models --random …        dims, prompts and contexts drawn from --seed

Medians of --rounds interleaved rounds, on --threads threads on both sides; --json FILE appends every row. See docs/performance.md.
"""

import argparse

import models
import ops


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    for name, module, rounds in (("ops", ops, 5), ("models", models, 5)):
        kind = kinds.add_parser(name, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        kind.add_argument("--rounds", type=int, default=rounds)
        kind.add_argument("--threads", type=int, default=2)
        kind.add_argument("--random", action="store_true", help="dims and lengths drawn from --seed")
        kind.add_argument("--seed", type=int, default=1)
        kind.add_argument("--json", help="append every row to this file")
        module.add_arguments(kind)
        kind.set_defaults(run=module.run)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
