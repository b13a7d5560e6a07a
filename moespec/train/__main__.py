"""`python -m moespec.train` is `python -m moespec train`."""

import argparse
import sys

from moespec.train.cli import add_train_parser, run_train

parser = argparse.ArgumentParser(prog="python -m moespec")
add_train_parser(parser.add_subparsers(dest="command", required=True))
sys.exit(run_train(parser.parse_args(["train", *sys.argv[1:]])))
