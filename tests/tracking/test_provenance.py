"""The git commit of a folder is read from files; nothing in the folder is run or followed out."""

import subprocess
from pathlib import Path

import pytest

from yolo_lightning.tracking.provenance import git_state

COMMIT, OTHER = "a" * 40, "b" * 64


def git(folder: Path, *args: str) -> str:
    identity = ["-c", "user.name=n", "-c", "user.email=e@x"]
    command = ["git", "-C", str(folder), *identity, *args]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "repository"
    folder.mkdir()
    git(folder, "init", "-q", "-b", "topic/a+b")
    (folder / "file").write_text("1")
    git(folder, "add", "file")
    git(folder, "commit", "-q", "-m", "one")
    return folder


def fake(folder: Path, head: str, **files: str) -> Path:
    (folder / ".git/refs/heads").mkdir(parents=True)
    (folder / ".git/HEAD").write_text(head)
    for name, text in files.items():
        (folder / ".git" / name.replace("__", "/").replace("_", "-")).write_text(text)
    return folder


def test_the_commit_equals_that_of_git(repository):
    commit = {"git.commit": git(repository, "rev-parse", "HEAD")}
    assert git_state(repository) == commit
    (repository / "deep/er").mkdir(parents=True)
    assert git_state(repository / "deep/er") == commit
    git(repository, "pack-refs", "--all")
    assert not (repository / ".git/refs/heads/topic/a+b").exists()
    assert git_state(repository) == commit
    git(repository, "worktree", "add", "-q", "../tree", "-b", "other")
    git(repository.parent / "tree", "commit", "-q", "--allow-empty", "-m", "two")
    other = git(repository.parent / "tree", "rev-parse", "HEAD")
    assert git_state(repository.parent / "tree") == {"git.commit": other} != commit
    git(repository, "checkout", "-q", "--detach", "other")
    assert git_state(repository) == {"git.commit": other}


def test_no_program_of_the_repository_runs(repository, tmp_path):
    marker = tmp_path / "ran"
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\ntouch {marker}\ncat\n")
    program.chmod(0o755)
    git(repository, "config", "core.fsmonitor", str(program))
    git(repository, "config", "filter.x.clean", str(program))
    (repository / ".gitattributes").write_text("* filter=x\n")
    (repository / "file").write_text("2")
    assert git_state(repository)
    assert not marker.exists()


@pytest.mark.parametrize(
    "head",
    ["ref: ../../secret", "ref: refs/../../secret", "ref: refs/heads/link", "ref: refs/heads/none",
     "ref: refs/heads", "ref: refs/heads/\0", "hello", "", "a" * 41, "ref: refs/heads/pipe"],
)  # fmt: skip
def test_hostile_head_gives_no_commit(tmp_path, head):
    """A file outside may hold a token of 40 hexadecimal digits."""
    import os

    (tmp_path / "secret").write_text(COMMIT)
    folder = fake(tmp_path / "work", head)
    (folder / ".git/refs/heads/link").symlink_to(tmp_path / "secret")
    os.mkfifo(folder / ".git/refs/heads/pipe")
    assert git_state(folder) == {}


def test_links_out_of_the_repository_are_not_followed(tmp_path):
    (tmp_path / "secret").write_text(COMMIT)
    folder = fake(tmp_path / "work", "")
    (folder / ".git/HEAD").unlink()
    (folder / ".git/HEAD").symlink_to(tmp_path / "secret")
    assert git_state(folder) == {}


def test_branches_are_found_by_their_whole_name(tmp_path):
    head = "ref: refs/heads/a.b\n"
    packed = f"# pack-refs with: peeled\n{COMMIT} refs/heads/axb\n{OTHER} refs/heads/a.b\n"
    assert git_state(fake(tmp_path, head, packed_refs=packed)) == {"git.commit": OTHER}


def test_a_folder_without_repository_has_no_commit(tmp_path):
    assert git_state(tmp_path) == {}
