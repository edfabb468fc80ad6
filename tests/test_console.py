import logging
import os
import sys

import pytest

from mima import console


@pytest.mark.parametrize("log", ["/dev/full", "a pipe without a reader"])
def test_a_log_that_takes_nothing_ends_nothing(monkeypatch, capsys, log):
    if log == "/dev/full":
        writes = os.open(log, os.O_WRONLY)
    else:
        reads, writes = os.pipe()
        os.close(reads)
    with os.fdopen(writes, "w", buffering=1) as log, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", log)
        lines = console.Lines(console.stderr())
        lines.update(lines.add_task("many", total=10), completed=5)
        console._OneLine().emit(logging.makeLogRecord({"msg": "x", "levelno": logging.WARNING}))
        console.show_error("x")
        # closing the file would fail otherwise, as the end of the program
        console.drop_unwritten()
    console.say("results")
    assert capsys.readouterr().out == "results\n"


def test_text_is_printed_as_it_is(capsys):
    console.stdout().print("out [red] is a :cat:")
    assert capsys.readouterr().out == "out [red] is a :cat:\n"


def test_a_command_can_be_pasted_into_a_shell():
    assert console.command("report", "a 'b") == """mima report 'a '"'"'b'"""


def test_lines_come_at_each_tenth_and_not_for_a_few_parts(capsys):
    lines = console.Lines(console.stdout())
    few, many = lines.add_task("few", total=9), lines.add_task("many")
    for done in range(1, 10):
        lines.update(few, completed=done)
    lines.update(many, completed=0, total=25)
    for done in range(1, 26):
        lines.update(many, completed=done, note=f"note {done}")
        lines.update(many, completed=done)
    assert capsys.readouterr().out.splitlines() == [
        f"many: {done} of 25 · note {done}" for done in (3, 5, 8, 10, 13, 15, 18, 20, 23, 25)
    ]


def test_only_parts_that_have_room_are_shown():
    assert console.fitting(["one", "two", "three"], 12) == "one · two"
    assert console.fitting(["one", "a longer part", "x"], 9) == "one"
    assert console.fitting(["much too long"], 3) == ""
