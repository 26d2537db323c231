"""Command lines as people type them: recipes without `--config`, and names of other programs."""

import argparse
from collections.abc import Sequence
from itertools import zip_longest
from typing import NoReturn

from yolo_lightning.errors import InputError, nearest, short

OTHER_COMMANDS = {
    "train": "fit recipe.yaml",
    "val": "validate recipe.yaml",
    "eval": "test recipe.yaml",
    "evaluate": "test recipe.yaml",
    "resume": "fit recipe.yaml --resume auto",
    "predict": "detect best.ckpt photographs/",
    "infer": "detect best.ckpt photographs/",
    "checks": "doctor",
}
"""Commands of other programs, and what does the same here."""

_DATASET = "init PATH --output recipe.yaml"
OTHER_OPTIONS = {
    **dict.fromkeys(("epochs", "steps", "iterations", "max-steps"), "--trainer.max_steps 2000"),
    **dict.fromkeys(("lr", "lr0", "learning-rate"), "--model.learning_rate 0.001"),
    **dict.fromkeys(("momentum",), "--model.momentum 0.9"),
    **dict.fromkeys(("wd", "weight-decay"), "--model.weight_decay 0.0005"),
    **dict.fromkeys(("batch", "batch-size", "bs"), "--data.detection_batch_size 16"),
    **dict.fromkeys(("imgsz", "img", "img-size", "image-size"), "--data.image_size 416"),
    **dict.fromkeys(("workers", "num-workers"), "--data.num_workers 4"),
    **dict.fromkeys(("device", "devices", "gpus"), "--trainer.accelerator gpu --trainer.devices 1"),
    **dict.fromkeys(("amp", "half", "fp16", "precision"), "--trainer.precision 16-mixed"),
    **dict.fromkeys(("project", "name", "output"), "--trainer.default_root_dir outputs/mine"),
    **dict.fromkeys(("seed",), "--seed_everything 1"),
    **dict.fromkeys(("freeze",), "--model.backbone_lr_factor 0"),
}
"""Options of other programs, without dashes, and the same as options of a recipe."""

_SAME_MEANING = {
    **dict.fromkeys(("conf", "confidence", "conf-thres", "thresh", "score"), "--score-threshold"),
    **dict.fromkeys(("iou", "iou-thres", "nms"), "--iou-threshold"),
    **dict.fromkeys(("imgsz", "img", "img-size", "size"), "--image-size"),
    **dict.fromkeys(("batch", "bs"), "--batch-size"),
    **dict.fromkeys(("project", "name", "save-dir", "out", "output-dir"), "--output"),
    **dict.fromkeys(("save-txt", "save-json", "save-csv"), "--format"),
    **dict.fromkeys(("gpu", "gpus", "devices"), "--device"),
    **dict.fromkeys(("fp16", "amp"), "--half"),
    **dict.fromkeys(("nosave",), "--no-pictures"),
    **dict.fromkeys(("val", "valid"), "--validation"),
    **dict.fromkeys(("val-split", "split", "val-size"), "--val-fraction"),
    **dict.fromkeys(("classes", "labels"), "--names"),
    **dict.fromkeys(("weights", "model"), "--pretrained"),
}
"""Options of other programs, without dashes, and those of our commands without a recipe."""

_WEIGHTS = ("weights", "pretrained", "checkpoint", "ckpt", "model")
_FILES = (".yaml", ".yml", ".ckpt", ".pt", ".pth", ".weights")


class CommandParser(argparse.ArgumentParser):
    """The parser of a command; it answers an unknown option with one of the same meaning."""

    def error(self, message: str) -> NoReturn:
        """Raise `InputError`, for an unknown option with a hint."""
        command, (text, _, words) = self.prog.split()[-1], message.partition(": ")
        if text != "unrecognized arguments":
            raise InputError(f"{command}: {message} ({self.prog} --help lists all)")
        name = words.split()[0].partition("=")[0]
        same = _SAME_MEANING.get(name.lstrip("-").replace("_", "-").lower())
        options = [option for option in self._option_string_actions if option.startswith("--")]
        hint = f"here it is {same}" if same in options else nearest(name, options, 1)
        raise InputError(
            f"{command}: no {'option' if name[:1] == '-' else 'argument'} {short(name)}"
            f"{'; ' if hint else ''}{hint} ({self.prog} --help lists all)"
        )


def expand_recipes(args: Sequence[str]) -> list[str]:
    """Return the arguments of `fit`, `validate`, `test` or `quickstart` with `--config` added.

    A word that is neither an option nor its value is a recipe. The help of `validate` and `test`
    is shown here, since Lightning's takes ten seconds.

    Raises:
        InputError: an option of another program, or no recipe.
        SystemExit: the help was shown.
    """
    if args[0] in ("validate", "test") and {"-h", "--help"} & set(args):
        _evaluation_parser(args[0]).parse_args(["--help"])
    words, follows_option = [args[0]], False
    for word, following in zip_longest(args[1:], args[2:], fillvalue=""):
        is_option = word.startswith(("--", "-c", "-h"))
        if not follows_option or is_option:
            _check_name(args[0], word, following)
            words += [] if is_option else ["--config"]
        has_value = "=" in word or word == "--help" or word.startswith(("--print_config", "-h"))
        follows_option = is_option and not has_value
        words.append(word)
    if args[0] != "quickstart" and not any(word.startswith("-") for word in words):
        raise InputError(
            f"{args[0]} needs a recipe: yolo-lightning {args[0]} recipes/quickstart.yaml; "
            f"of your own data: yolo-lightning {_DATASET}"
        )
    return words


def _check_name(command: str, word: str, following: str) -> None:
    """Raise `InputError` if a word is an option of another program: `--lr 1`, `lr=1`, `a.pt`."""
    name, equals, value = word.partition("=")
    key, value = name.lstrip("-").replace("_", "-").lower(), value or following
    if not (word.startswith("--") or equals):
        key = "weights" if word.endswith(_FILES[2:]) else ""
    if key in ("data", "model") and not value.endswith(_FILES) and "/" not in value:
        return  # Lightning's own options, which name a class
    if key == "data":
        raise InputError(f"{name}: a recipe names its data; write one: yolo-lightning {_DATASET}")
    option = OTHER_OPTIONS.get(key)
    if key == "resume" and value != "auto":
        option = "--resume auto"
    elif key in _WEIGHTS:
        option = f"{'--model.pretrained' if command == 'fit' else '--ckpt_path'} best.ckpt"
    if option is not None:
        ours = option.split()[0]
        answer = "allowed" if name == ours else f"here the option is {ours}, for example"
        raise InputError(f"{name}: {answer}: yolo-lightning {command} recipe.yaml {option}")


def _evaluation_parser(command: str) -> argparse.ArgumentParser:
    """Return a parser that shows the help of `validate` or `test`, without Lightning's options."""
    images = "validation" if command == "validate" else "test"
    parser = argparse.ArgumentParser(
        prog=f"yolo-lightning {command}",
        description=f"Evaluate a checkpoint on the {images} images of a recipe, and write a "
        "report. Other options override values of the recipe, such as --data.image_size 608; "
        "`yolo-lightning fit --help` lists them.",
    )
    add = parser.add_argument
    add("recipe", help="of the training, or one with test data alone")
    add("--ckpt_path", metavar="CKPT", help="(default: the best one of the recipe's newest run)")
    add("--report.folder", metavar="FOLDER", help="(default: a new one in the run folder)")
    add("--report.level", metavar="N", help="of the tree, for the confusion matrix, 1 at the top")
    confidence = "minimum score in the confusion matrix and the error analysis (default: 0.25)"
    add("--report.confidence", metavar="SCORE", help=confidence)
    seen = "classes that count as trained with boxes: a file, imagenet_det_44 or coco"
    add("--report.seen_classes", metavar="FILE", help=seen)
    return parser
