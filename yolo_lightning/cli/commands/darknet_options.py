"""How a command line names Darknet's files; imports nothing heavy, for the help's sake."""

import argparse


def add_options(parser: argparse._ActionsContainer, required: bool, layouts: str = "") -> None:
    """Let a command line name Darknet's files.

    Args:
        parser: of the command.
        required: whether there has to be a file of weights.
        layouts: which released networks there are, for the help.
    """
    parser.add_argument("--cfg", help="the network's .cfg file")
    parser.add_argument("--layout", metavar="NAME", help=f"a released network instead{layouts}")
    parser.add_argument("--weights", required=required, help=".weights file, whole or partial")
    parser.add_argument("--names", help="a class name a line")
    parser.add_argument("--labels", help="a unique key a line, such as a wnid; names otherwise")
    parser.add_argument("--tree", help=".tree file: a key and its parent's number a line")
    parser.add_argument("--data", help=".data file that names names, labels and tree")
