"""Recipes without `--config`, and names that other programs use."""

import dataclasses

import pytest

from yolo_lightning.cli import main
from yolo_lightning.cli.arguments import OTHER_COMMANDS, expand_recipes
from yolo_lightning.errors import InputError
from yolo_lightning.evaluation.report import ReportOptions


@pytest.mark.parametrize(
    ("words", "expanded"),
    [
        ("fit a.yaml", "fit --config a.yaml"),
        ("fit --config a.yaml", "fit --config a.yaml"),
        ("fit -c a.yaml", "fit -c a.yaml"),
        ("fit a.yaml b.yaml", "fit --config a.yaml --config b.yaml"),
        ("test --ckpt_path b.ckpt a.yaml", "test --ckpt_path b.ckpt --config a.yaml"),
        ("test --ckpt_path=b.ckpt a.yaml", "test --ckpt_path=b.ckpt --config a.yaml"),
        ("fit --trainer.max_epochs -1 a.yaml", "fit --trainer.max_epochs -1 --config a.yaml"),
        ("fit --print_config a.yaml", "fit --print_config --config a.yaml"),
        ("fit a.yaml --resume auto", "fit --config a.yaml --resume auto"),
        ("fit a.yaml --model.tree [a,b=c]", "fit --config a.yaml --model.tree [a,b=c]"),
        ("fit --help", "fit --help"),
        ("quickstart", "quickstart"),
        ("fit --model my.Model --data my.Data", "fit --model my.Model --data my.Data"),
    ],
)
def test_words_that_are_neither_options_nor_values_are_recipes(words, expanded):
    assert expand_recipes(words.split()) == expanded.split()


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        ("fit a.yaml --epochs 50", "fit recipe.yaml --trainer.max_steps 2000"),
        ("fit a.yaml --lr=0.1", "fit recipe.yaml --model.learning_rate 0.001"),
        ("fit a.yaml lr0=0.1", "fit recipe.yaml --model.learning_rate 0.001"),
        ("fit --batch_size 4 a.yaml", "fit recipe.yaml --data.detection_batch_size 16"),
        ("fit a.yaml --imgsz 640", "fit recipe.yaml --data.image_size 416"),
        ("quickstart --device 0", "--trainer.accelerator gpu --trainer.devices 1"),
        ("fit a.yaml --weights a.pt", "fit recipe.yaml --model.pretrained best.ckpt"),
        ("test a.yaml --weights a.pt", "test recipe.yaml --ckpt_path best.ckpt"),
        ("test best.ckpt", "test recipe.yaml --ckpt_path best.ckpt"),
        ("fit model=yolo.pt data=coco.yaml", "fit recipe.yaml --model.pretrained best.ckpt"),
        ("fit --data coco.yaml", "init PATH --output recipe.yaml"),
        ("fit a.yaml --freeze 10", "fit recipe.yaml --model.backbone_lr_factor 0"),
        ("fit a.yaml --resume", "--resume: allowed: yolo-lightning fit recipe.yaml --resume auto"),
        ("fit a.yaml --resume last.ckpt", "fit recipe.yaml --resume auto"),
        ("fit", "fit recipes/quickstart.yaml"),
        ("validate", "validate recipes/quickstart.yaml"),
    ],
)
def test_options_of_other_programs_are_answered_with_ours(words, answer):
    with pytest.raises(InputError) as refused:
        expand_recipes(words.split())
    message = str(refused.value)
    assert answer in message
    assert "\n" not in message


def test_commands_of_other_programs_are_answered_with_ours(capsys):
    for name, command in OTHER_COMMANDS.items():
        assert main.main([name, "--epochs", "3"]) == 2
        assert capsys.readouterr().err == (
            f"yolo-lightning: unknown command {name!r}; here: yolo-lightning {command}\n"
        )
        assert command.split()[0] in main.COMMANDS


@pytest.mark.parametrize("command", ["validate", "test"])
def test_the_help_of_evaluations_lists_the_options_of_the_report(command, capsys):
    with pytest.raises(SystemExit) as leaving:
        main.main([command, "--help"])
    assert leaving.value.code == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(ReportOptions):
        assert f"--report.{field.name}" in text


def test_recipes_may_also_be_given_as_config_where_they_are_words(workplace, capsys):
    assert main.main(["check-data", "--config", "none.yaml"]) == 2
    assert main.main(["anchors", "--config=none.yaml"]) == 2
    assert capsys.readouterr().err.count("'none.yaml' not found") == 2


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        ("detect a.ckpt b --confidence 0.3", "detect: no option '--confidence'; here it is "
         "--score-threshold (yolo-lightning detect --help lists all)"),
        ("detect a.ckpt b --img_size=640", "no option '--img_size'; here it is --image-size ("),
        ("detect a.ckpt b --qiet", "no option '--qiet'; did you mean '--quiet'? ("),
        ("detect a.ckpt b --split x", "no option '--split' ("),  # an option of init
        ("init set --weights a.weights", "no option '--weights'; here it is --pretrained ("),
        ("init set other", "no argument 'other' ("),
        ("init", "arguments are required: PATH ("),
        ("classify a.ckpt", "arguments are required: IMAGE ("),
    ],
)  # fmt: skip
def test_unknown_options_of_other_commands_are_answered_too(words, answer, capsys):
    assert main.main(words.split()) == 2
    error = capsys.readouterr().err
    assert answer in error
    assert error.startswith("yolo-lightning: error: ")
    assert error.count("\n") == 1
